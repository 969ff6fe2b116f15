"""Features of refusal on a model: the stages behind `demur features find`.

Four splits that share no prompt: "discover" (fit) compares latents between classes, "verify"
(select) changes them one by one and chooses a set, "calibrate" sets the sensor's thresholds, and
everything that is claimed is measured on "report". Every stage is kept under a key of what decides
it, so that the same command goes on from where it stopped.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter
from torch import Tensor

from demur.activations import Activations, collect
from demur.causal import null_directions, stable_seed
from demur.config import DataSettings, RunConfig
from demur.directions import Direction, save_direction
from demur.errors import ConfigError, UnknownNameError
from demur.evals.judges import judges
from demur.features.attribute import Attribution, attribute, steps_of
from demur.features.bank import Bank
from demur.features.discover import (
    Discovery,
    Latent,
    Unit,
    candidates,
    discover,
    discovery_row,
    units,
)
from demur.features.dose import (
    DOSES,
    WORDINGS,
    Edit,
    Latents,
    advice_choices,
    choices_from,
    dose_response,
    latents_of,
    n_arms,
)
from demur.features.formats import fits, load_banks
from demur.features.minimal import Chosen, Selector, held_out
from demur.features.multiturn import multiturn, scripts_from
from demur.features.read import T_INST, LatentReads, read_latents
from demur.features.rows.discover import (
    DiscoveryRow,
    HeldOutRow,
    MinimalRow,
    StabilityRow,
    VerificationRow,
)
from demur.features.rows.dose import ArmReply, DoseResponse, Multiturn
from demur.features.rows.record import FeatureReply, FeaturesRecord, UsedBank
from demur.features.rows.sanity import BankCheck
from demur.features.rows.sensor import SensorReport
from demur.features.sanity import check_bank, rankable
from demur.features.sensor import Requests, n_reads, sensor
from demur.features.verify import STEPS, matched, verify
from demur.interventions import Ablate, applied
from demur.models import Model
from demur.pipeline.features_findings import findings_of
from demur.pipeline.kept import Kept, kept_openers
from demur.pipeline.splits import make_splits, source_name
from demur.progress import Listener, Quiet
from demur.prompts import PromptSet
from demur.prompts import load as load_prompts
from demur.results import sealed_json
from demur.selection import Passes, refusal_logodds
from demur.sites import Site
from demur.store import Store, atomic_write
from demur.wrappers import wrappers

T = TypeVar("T")

RECORD, REPLIES = "features.json", "features-replies.jsonl"
PARTS = ("dose", "multiturn", "sensor")
"""What a run can do without."""
_LIFTED = 0.25  # Of q99: at a whole one the shipped set writes no language.
_OPENERS = 40  # Prompts of each class whose replies tell what refusals begin with.
_NAMES = {"fit": "discover", "select": "verify", "calibrate": "calibrate", "report": "report"}


@dataclass(frozen=True, slots=True)
class FeatureSettings:
    """What decides a run, besides the model and the banks.

    Attributes:
        harmful: Spec of harmful prompts; likewise `harmless`.
        lookalikes: Spec of harmless prompts that look harmful.
        discover: Prompts of each class that latents are compared on.
        verify: Prompts of each class that latents are changed on, and a set is chosen on.
        calibrate: Prompts of each class for the sensor's thresholds.
        report: Prompts of each class that claims are of.
        top: Candidates by difference, by cosine and by attribution, each.
        densest: Latents that fire at a larger share of tokens are left out: position and norm.
        steps: Of integrated gradients; 0 is one gradient.
        nulls: Random latents behind each candidate, and random sets behind the set. With few of
            them and many candidates no p value can pass the correction for these.
        delta: Nats of refusal log-odds that a further latent of the set must bring.
        most: Latents of the set.
        draws: Resampled selections.
        dosed: Of the report prompts of each class, how many doses are measured on: these are some
            500 arms.
        others: Random sets, and random directions, in the dose-response; under 19 p stays above
            .05.
        generated: Prompts of each class that replies are generated to; 0 generates none.
        reply_tokens: Longest reply.
        choices: File of questions with choices, for what clamping costs besides refusal; None
            takes packaged questions with a good and a mildly bad answer.
        skip: Parts that are left out, of `PARTS`; a later run without it adds them.
        judge: Of replies.
        seed: Of every draw.
    """

    harmful: str = DataSettings().harmful
    harmless: str = DataSettings().harmless
    lookalikes: str = "lookalikes"
    discover: int = 96
    verify: int = 48
    calibrate: int = 40
    report: int = 64
    top: int = 5
    densest: float = 0.2
    steps: int = 0
    nulls: int = 99
    delta: float = 0.1
    most: int = 8
    draws: int = 50
    dosed: int = 32
    others: int = 19
    generated: int = 16
    reply_tokens: int = 40
    choices: str | None = None
    skip: tuple[str, ...] = ()
    judge: str = "patterns"
    seed: int = 0


_DEFAULTS = FeatureSettings()


def features_run(
    model: Model,
    banks: str,
    folder: Path,
    settings: FeatureSettings = _DEFAULTS,
    *,
    listener: Listener | None = None,
) -> FeaturesRecord:
    """Find latents that carry refusal, and say what changing them does and costs.

    Args:
        model: Unedited.
        banks: A bank, a folder of banks, or a packaged name; see `load_banks`.
        folder: Of the run: stages, tables, the chosen set as `edits.json`, replies in a file of
            their own and, last of all, `features.json`.
        settings: What else decides it.
        listener: Hears stages and steps.

    Raises:
        UnknownNameError: There is no such part.
        ConfigError: A bank is of another model; or none may be ranked.
        TooFewPromptsError: There are too few prompts for four splits.
        StoreError: The folder cannot be written, or a bank cannot be read.
    """
    listener = listener or Quiet()
    for name in settings.skip:
        if name not in PARTS:
            raise UnknownNameError.among(PARTS, kind="part", name=name)
    run = _Run(model, load_banks(banks), folder, settings, listener)
    if settings.skip:
        run.notes.append(f"left out as asked: {', '.join(settings.skip)}")
    used = run.used()
    ranked = [one for one, row in zip(run.loaded, used, strict=True) if row.refused is None]
    if not ranked:
        raise ConfigError(
            f"no bank of {banks} may be ranked: " + "; ".join(str(row.refused) for row in used),
            "latents of a bank that does not reconstruct the model say nothing of it; train one "
            "with `demur features train`, or take one of this very model",
        )
    run.banks = tuple(ranked)
    found = run.discovery()
    verified = run.verification()
    chosen = run.minimal()
    record = FeaturesRecord(
        demur=metadata.version("demur"),
        model=model.name,
        fingerprint=model.fingerprint,
        dtype=str(model.dtype).removeprefix("torch."),
        seed=settings.seed,
        harmful=source_name(settings.harmful),
        harmless=source_name(settings.harmless),
        sizes={
            _NAMES[name]: (len(run.prompts["harmful"][name]), len(run.prompts["harmless"][name]))
            for name in _NAMES
        },
        openers=run.tokens.texts,
        learned=run.tokens.learned,
        banks=tuple(used),
        discovery=found,
        verification=verified,
        minimal=chosen.row if chosen is not None else None,
        stability=run.stability(),
        held_out=run.held_out(),
        dense_site=str(run.dense.site),
        dose=run.dose(),
        multiturn=run.multiturn(),
        sensor=run.sensor(),
        seconds=run.seconds,
        notes=tuple(run.notes),
        findings=(),
    )
    record = record.model_copy(update={"findings": findings_of(record)})
    _write_tables(folder, record, chosen)
    _write_latents(folder, model, run.banks, chosen)
    _write_replies(folder, run.replies)
    # Last: a folder with it is a finished run.
    atomic_write(folder / RECORD, sealed_json(record))
    return record


class _Run:
    """A run under way; what costs a pass over prompts is made when it is first needed."""

    def __init__(
        self,
        model: Model,
        loaded: Sequence[Bank],
        folder: Path,
        settings: FeatureSettings,
        listener: Listener,
    ) -> None:
        self.model, self.settings, self.listener = model, settings, listener
        self.loaded: tuple[Bank, ...] = tuple(loaded)
        self.banks: tuple[Bank, ...] = ()
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}
        self.replies: list[FeatureReply] = []
        for bank in self.loaded:
            self.notes += [f"{bank.name}: {note}" for note in fits(bank, model)]
        splits = make_splits(
            RunConfig.model_validate(
                {
                    "data": {
                        "harmful": settings.harmful,
                        "harmless": settings.harmless,
                        "fit": settings.discover,
                        "select": settings.verify,
                        "calibrate": settings.calibrate,
                        "report": settings.report,
                    },
                    "seed": settings.seed,
                }
            )
        )
        self.prompts: Mapping[str, Mapping[str, PromptSet]] = {
            "harmful": splits.harmful,
            "harmless": splits.harmless,
        }
        self.kept = Kept(
            Store(folder / "stages"),
            model=model.fingerprint,
            seed=settings.seed,
            prompts=[[side[name].fingerprint for name in _NAMES] for side in self.prompts.values()],
        )
        self.tokens = kept_openers(
            self.kept,
            model,
            [*self.texts("harmful", "fit")[:_OPENERS], *self.texts("harmless", "fit")[:_OPENERS]],
            judge=settings.judge,
            listener=listener,
            about={},
        )

    # What things are made of ---------------------------------------------------------------------

    def texts(self, side: str, split: str) -> list[str]:
        """Prompts of one class and split."""
        return self.prompts[side][split].texts

    def seed(self, name: str) -> int:
        """A seed of its own for every part."""
        return stable_seed(self.settings.seed, f"features {name}")

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note how long a part took."""
        began = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    def about(self, *names: str) -> dict[str, Any]:
        """What stages hang on: the banks, and some of the settings."""
        asked = asdict(self.settings)
        return {
            "banks": [
                [bank.name, str(bank.site), len(bank), float(bank.encoder.double().sum())]
                for bank in self.banks or self.loaded
            ],
            "tokens": list(self.tokens.ids),
            **{name: asked[name] for name in names},
        }

    def stage(self, name: str, about: Mapping[str, Any], kind: Any, compute: Callable[[], T]) -> T:
        """A stage whose result is of a kind that JSON can hold: rows, and tuples of them."""
        adapter: TypeAdapter[Any] = TypeAdapter(kind)

        def run() -> tuple[dict[str, Any], dict[str, Tensor]]:
            with self.timed(name):
                return {"row": adapter.dump_python(compute(), mode="json")}, {}

        return adapter.validate_python(self.kept.stage(name, about, run)[0]["row"])

    # Reading -------------------------------------------------------------------------------------

    @cached_property
    def reads(self) -> dict[str, LatentReads]:
        """Latents on the prompts of discovery, by class."""
        out: dict[str, LatentReads] = {}
        for side in ("harmful", "harmless"):
            texts = self.texts(side, "fit")
            with self.listener.stage(f"latents on {side} prompts", len(texts)) as advance:
                out[side] = read_latents(self.model, self.banks, texts, progress=advance)
        return out

    @cached_property
    def streams(self) -> dict[str, Activations]:
        """The stream where banks write, at the last token of the prompts of discovery."""
        sites = tuple(sorted({bank.writes or bank.site for bank in self.banks}))
        out: dict[str, Activations] = {}
        for side in ("harmful", "harmless"):
            texts = self.texts(side, "fit")
            with self.listener.stage(f"the stream on {side} prompts", len(texts)) as advance:
                out[side] = collect(
                    self.model, texts, sites=sites, positions=[-1], progress=advance
                )
        return out

    @cached_property
    def directions(self) -> dict[Site, Direction]:
        """Harmful less harmless prompts at the last token, at every site that a bank writes to."""
        out: dict[Site, Direction] = {}
        for site in self.streams["harmful"].sites:
            gap = self._rows("harmful", site).mean(0) - self._rows("harmless", site).mean(0)
            out[site] = Direction.from_vector(
                gap, site=site, position=-1, recipe="difference of means"
            )
        return out

    def _rows(self, side: str, site: Site) -> Tensor:
        return self.streams[side].at(site, -1).double()

    @cached_property
    def dense(self) -> Direction:
        """Of these, the one whose ablation lowers refusal most on the prompts of verification."""
        texts = self.texts("harmful", "select")
        passes = Passes(self.model, self.model.encode(texts))
        found: dict[Site, float] = {}
        with self.listener.stage("the dense direction", len(self.directions)) as advance:
            for site, direction in self.directions.items():
                with applied(self.model, Ablate(direction)):
                    scores = refusal_logodds(passes.logits(), self.tokens.ids)
                found[site] = float(scores.mean())
                advance(1)
        return self.directions[min(found, key=lambda site: found[site])]

    @cached_property
    def attribution(self) -> Attribution:
        """What each latent does for refusal on harmful prompts of discovery, estimated."""
        texts = self.texts("harmful", "fit")
        total = steps_of(len(texts), len(self.banks), self.settings.steps)
        with self.listener.stage("attribution", total) as advance:
            return attribute(
                self.model,
                self.banks,
                texts,
                self.tokens,
                steps=self.settings.steps,
                progress=advance,
            )

    # The parts -----------------------------------------------------------------------------------

    def used(self) -> list[UsedBank]:
        """Every bank, checked."""
        texts = [*self.texts("harmful", "fit"), *self.texts("harmless", "fit")]
        out: list[UsedBank] = []
        for bank in self.loaded:

            def compute(bank: Bank = bank) -> BankCheck:
                with self.listener.stage(f"checking {bank.name}", len(texts)) as advance:
                    return check_bank(bank, self.model, texts, progress=advance)

            row = self.stage("check", {**self.about(), "bank": bank.name}, BankCheck, compute)
            refused = rankable(row)
            if refused is not None:
                self.notes.append(f"{bank.name} is left out: {refused}")
            out.append(
                UsedBank(
                    name=bank.name,
                    site=str(bank.site),
                    writes=str(bank.writes),
                    width=bank.width,
                    held=len(bank),
                    activation=bank.activation,
                    check=row,
                    refused=refused,
                    link=_link(bank),
                )
            )
        return out

    @cached_property
    def _found(self) -> tuple[DiscoveryRow, list[list[tuple[str, int]]]]:
        """What discovery found, and the candidates in groups that are changed together."""
        asked = self.about("top", "densest", "steps", "nulls")
        kind = tuple[DiscoveryRow, list[list[tuple[str, int]]]]

        def compute() -> tuple[DiscoveryRow, list[list[tuple[str, int]]]]:
            nulls = {
                site: null_directions(
                    direction,
                    harmful=self._rows("harmful", site),
                    harmless=self._rows("harmless", site),
                    each=max(99, self.settings.nulls),
                    seed=self.seed("cosine"),
                )["covariance-matched"]
                for site, direction in self.directions.items()
            }
            found = discover(
                self.reads["harmful"],
                self.reads["harmless"],
                directions=self.directions,
                nulls=nulls,
                families=self._families(),
                densest=self.settings.densest,
            )
            chosen = candidates(found, self.attribution, top=self.settings.top)
            groups = units(self.banks, [one.latent for one in chosen])
            row = discovery_row(found, chosen, groups, self.attribution, more=_shown(found))
            return row, [[(one.bank, one.number) for one in unit.latents] for unit in groups]

        return self.stage("discovery", asked, kind, compute)

    def _families(self) -> tuple[list[str], list[str]] | None:
        """What pairs prompts of both classes; None where they are not paired."""
        sides = [self.prompts[side]["fit"] for side in ("harmful", "harmless")]
        labels = [
            [prompt.pair or f"{side} {i}" for i, prompt in enumerate(prompts)]
            for side, prompts in zip(("harmful", "harmless"), sides, strict=True)
        ]
        both = set(labels[0]) & set(labels[1])
        return (labels[0], labels[1]) if len(both) >= 0.8 * len(set(labels[0])) else None

    def discovery(self) -> DiscoveryRow:
        """See `_found`."""
        return self._found[0]

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Candidates."""
        return tuple(
            Unit(tuple(Latent(bank, number) for bank, number in group)) for group in self._found[1]
        )

    @cached_property
    def _verified(self) -> VerificationRow | None:
        if not self.units:
            return None

        def compute() -> VerificationRow:
            with self.listener.stage("latents really changed", STEPS) as advance:
                return verify(
                    self.model,
                    self.banks,
                    self.units,
                    harmful=self.texts("harmful", "select"),
                    harmless=self.texts("harmless", "select"),
                    neutral=load_prompts("plain").texts[:16],
                    tokens=self.tokens,
                    reads=self.reads["harmful"],
                    attribution=self.attribution,
                    each=self.settings.nulls,
                    each_lifted=min(19, self.settings.nulls),
                    seed=self.seed("verify"),
                    progress=advance,
                )

        asked = self.about("top", "densest", "steps", "nulls")
        return self.stage("verification", asked, VerificationRow, compute)

    def verification(self) -> VerificationRow | None:
        """Candidates really changed."""
        return self._verified

    @cached_property
    def promoting(self) -> tuple[Unit, ...]:
        """Candidates that lower refusal when they are taken away, significantly."""
        row = self._verified
        if row is None:
            return ()
        roles = {one.unit: one.role for one in row.units}
        return tuple(unit for unit in self.units if roles[str(unit)] == "promotes")

    @cached_property
    def _selector(self) -> Selector:
        return Selector(
            self.model, self.banks, self.promoting, self.texts("harmful", "select"), self.tokens
        )

    @cached_property
    def _chosen(self) -> Chosen | None:
        if not self.promoting:
            return None

        def compute() -> MinimalRow:
            with self.listener.stage("choosing a set", self.settings.most + 1) as advance:
                return self._selector.select(
                    delta=self.settings.delta, most=self.settings.most, progress=advance
                ).row

        asked = self.about("top", "densest", "steps", "nulls", "delta", "most")
        row = self.stage("minimal", asked, MinimalRow, compute)
        named = {str(unit): unit for unit in self.promoting}
        return Chosen(tuple(named[name] for name in row.units), row)

    def minimal(self) -> Chosen | None:
        """A small set without which the model refuses less; None if no latent promotes refusal."""
        if self._chosen is not None and not self._chosen.units:
            return None
        return self._chosen

    def stability(self) -> StabilityRow | None:
        """The set on resampled prompts."""
        chosen = self.minimal()
        if chosen is None:
            return None

        def compute() -> StabilityRow:
            with self.listener.stage("the set on resampled prompts", self.settings.draws) as p:
                return self._selector.stability(
                    chosen, draws=self.settings.draws, seed=self.seed("stability"), progress=p
                )

        asked = self.about("top", "densest", "steps", "nulls", "delta", "most", "draws")
        return self.stage("stability", asked, StabilityRow, compute)

    def held_out(self) -> HeldOutRow | None:
        """The set on prompts of their own."""
        chosen = self.minimal()
        if chosen is None:
            return None

        def compute() -> HeldOutRow:
            with self.listener.stage("the set on prompts of their own", STEPS) as advance:
                return held_out(
                    self.model,
                    self.banks,
                    chosen,
                    harmful=self.texts("harmful", "report"),
                    harmless=self.texts("harmless", "report"),
                    chosen_on={
                        _NAMES[name]: [*self.texts("harmful", name), *self.texts("harmless", name)]
                        for name in ("fit", "select")
                    },
                    tokens=self.tokens,
                    reads=self.reads["harmful"],
                    direction=self.dense,
                    sets=self.settings.nulls,
                    without=[one for unit in self.units for one in unit.latents],
                    seed=self.seed("held out"),
                    progress=advance,
                )

        asked = self.about("top", "densest", "steps", "nulls", "delta", "most")
        return self.stage("held-out", asked, HeldOutRow, compute)

    @cached_property
    def set(self) -> list[Latents]:
        """The chosen set, with the levels that doses are measured in."""
        chosen = self.minimal()
        assert chosen is not None
        return latents_of(chosen.latents, self.reads["harmful"], self.reads["harmless"])

    def _others(self) -> list[list[Latents]]:
        chosen = self.minimal()
        assert chosen is not None
        drawn = matched(
            self.reads["harmful"],
            chosen.latents,
            sets=self.settings.others,
            seed=self.seed("others"),
            without=[one for unit in self.units for one in unit.latents],
        )
        return [latents_of(one, self.reads["harmful"], self.reads["harmless"]) for one in drawn]

    def dose(self) -> DoseResponse | None:
        """The set clamped at several doses, beside edits of its size."""
        if "dose" in self.settings.skip or self.minimal() is None:
            return None
        asked = self.about(
            "top", "densest", "steps", "nulls", "delta", "most", "dosed", "others", "generated",
            "reply_tokens", "lookalikes", "choices", "judge",
        ) | {"doses": [str(dose) for dose in DOSES]}  # fmt: skip

        def compute() -> tuple[DoseResponse, tuple[ArmReply, ...]]:
            others = self._others()
            items = (
                choices_from(Path(self.settings.choices))
                if self.settings.choices
                else advice_choices()
            )
            total = n_arms(
                DOSES,
                others=len(others),
                directions=self.settings.others,
                dense=True,
                wordings=len(WORDINGS),
            )
            with self.listener.stage("clamped at several doses", total) as advance:
                found = dose_response(
                    self.model,
                    self.set,
                    harmful=self.texts("harmful", "report")[: self.settings.dosed],
                    harmless=self.texts("harmless", "report")[: self.settings.dosed],
                    lookalikes=self._lookalikes()[: self.settings.dosed],
                    tokens=self.tokens,
                    others=others,
                    dense=self.dense,
                    directions=self.settings.others,
                    neutral=load_prompts("neutral_text").texts[:8],
                    items=items[:48],
                    judge=judges.make(self.settings.judge) if self.settings.generated else None,
                    generated=self.settings.generated,
                    max_new_tokens=self.settings.reply_tokens,
                    seed=self.seed("dose"),
                    progress=advance,
                )
            return found.row, found.replies

        row, replies = self.stage("dose", asked, tuple[DoseResponse, tuple[ArmReply, ...]], compute)
        self.replies += [FeatureReply(part="dose", row=one) for one in replies]
        return row

    def multiturn(self) -> Multiturn | None:
        """Scripted conversations with and without the set clamped."""
        if "multiturn" in self.settings.skip or self.minimal() is None:
            return None
        asked = self.about(
            "top", "densest", "steps", "nulls", "delta", "most", "reply_tokens", "judge"
        ) | {"lifted": _LIFTED}

        def compute() -> tuple[Multiturn, tuple[ArmReply, ...]]:
            arms = {
                "set off": Edit(clamps=tuple(one.clamp("zero") for one in self.set)),
                "set lifted": Edit(
                    clamps=tuple(one.clamp("min-clamp", _LIFTED) for one in self.set)
                ),
                "dense direction ablated": Edit(acts=(Ablate(self.dense),)),
            }
            scripts = scripts_from()
            turns = sum(len(script.turns) for script in scripts) * (len(arms) + 1)
            with self.listener.stage("conversations turn by turn", turns) as advance:
                found = multiturn(
                    self.model,
                    scripts,
                    arms,
                    judges.make(self.settings.judge),
                    tokens=self.tokens,
                    trace=self.set,
                    max_new_tokens=self.settings.reply_tokens,
                    progress=advance,
                )
            return found.row, found.replies

        kind = tuple[Multiturn, tuple[ArmReply, ...]]
        row, replies = self.stage("multiturn", asked, kind, compute)
        self.replies += [FeatureReply(part="multiturn", row=one) for one in replies]
        return row

    def sensor(self) -> SensorReport | None:
        """Latents that tell harm at the instruction's last token, as a detector."""
        if "sensor" in self.settings.skip:
            return None
        upstream = self._upstream()
        if not upstream:
            self.notes.append("no latent tells harm at the instruction's last token: no sensor")
            return None
        asked = self.about("top", "densest", "steps", "nulls", "lookalikes")

        def compute() -> SensorReport:
            splits = {
                name: Requests(
                    tuple(self.texts("harmful", name)),
                    tuple(self.texts("harmless", name)),
                    self._groups(name),
                )
                for name in ("fit", "calibrate", "report")
            }
            lookalikes, wrapped = self._lookalikes(), dict(wrappers())
            total = n_reads(
                splits["fit"], splits["calibrate"], splits["report"], lookalikes, wrapped
            )
            with self.listener.stage("latents as a sensor", total) as advance:
                return sensor(
                    self.model,
                    upstream,
                    fit=splits["fit"],
                    calibration=splits["calibrate"],
                    test=splits["report"],
                    lookalikes=lookalikes,
                    direction=self.dense,
                    wrappers=wrapped,
                    seed=self.seed("sensor"),
                    progress=advance,
                ).row

        return self.stage("sensor", asked, SensorReport, compute)

    def _groups(self, split: str) -> tuple[str, ...]:
        """The pair of each prompt, or a name of its own, harmful ones first."""
        return tuple(
            prompt.pair or f"{side} {i}"
            for side in ("harmful", "harmless")
            for i, prompt in enumerate(self.prompts[side][split])
        )

    def _upstream(self) -> list[Bank]:
        """Banks cut to latents that are more active on harmful prompts at `t_inst`."""
        wanted: dict[str, list[int]] = {}
        for row in self.discovery().latents:
            told = [place for place in row.places if place.place == T_INST]
            if any(place.q <= 0.05 and place.difference > 0 for place in told):
                wanted.setdefault(row.bank, []).append(row.latent)
        return [bank.sliced(wanted[bank.name]) for bank in self.banks if bank.name in wanted]

    def _lookalikes(self) -> list[str]:
        texts = load_prompts(self.settings.lookalikes).texts
        taken = {
            text for side in self.prompts.values() for name in _NAMES for text in side[name].texts
        }
        return [text for text in texts if text not in taken][: self.settings.report]


def _shown(found: Discovery, clearest: int = 150, others: int = 150) -> list[Latent]:
    """Latents that tables show beside candidates: the clearest, and an even spread of the rest."""
    ranked = sorted(
        (float(one.q[:, i].min()), -float(abs(one.effect[:, i]).max()), name, int(one.bank.ids[i]))
        for name, one in found.found.items()
        for i in one.tested.nonzero()[0]
    )
    rest = ranked[clearest:]
    spread = rest[:: max(1, -(-len(rest) // others))]
    return [Latent(name, number) for *_, name, number in [*ranked[:clearest], *spread]]


def _link(bank: Bank) -> str | None:
    """Where Neuronpedia shows latents of a bank, if the bank says so."""
    name = bank.about.get("neuronpedia")
    return f"https://www.neuronpedia.org/{name}/" if isinstance(name, str) and name else None


# Files -------------------------------------------------------------------------------------------


def _write_tables(folder: Path, record: FeaturesRecord, chosen: Chosen | None) -> None:
    """`features.csv` (and `.parquet` where pyarrow is), `edits.json`, `dose.csv`, `sensor.json`."""
    rows = _latent_rows(record)
    if rows:
        atomic_write(folder / "features.csv", _csv(rows))
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            pass
        else:
            sink = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
            atomic_write(folder / "features.parquet", sink.getvalue())
    if record.dose is not None:
        atomic_write(folder / "dose.csv", _csv([_flat(asdict(p)) for p in record.dose.points]))
    if record.sensor is not None:
        text = json.dumps(asdict(record.sensor), indent=1, allow_nan=False)
        atomic_write(folder / "sensor.json", text + "\n")
    if chosen is not None:
        edits = {
            "model": record.fingerprint,
            "latents": [{"bank": one.bank, "latent": one.number} for one in chosen.latents],
            "edit": "zero",
            "seed": record.seed,
        }
        atomic_write(folder / "edits.json", json.dumps(edits, indent=1) + "\n")


def _write_latents(
    folder: Path, model: Model, banks: Sequence[Bank], chosen: Chosen | None
) -> None:
    """What each latent of the set writes, as a direction for other commands, in `latents/`."""
    named = {bank.name: bank for bank in banks}
    for one in chosen.latents if chosen is not None else ():
        direction = named[one.bank].direction(one.number)
        path = folder / "latents" / f"{direction.site}-{one.number}.safetensors"
        about = {
            "model": model.name,
            "revision": model.revision,
            "adapter": model.adapter,
            "fingerprint": model.fingerprint,
            "dtype": str(model.dtype).removeprefix("torch."),
            "sign": "what the latent writes where it is active",
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        save_direction(direction, path, about=about)


def _latent_rows(record: FeaturesRecord) -> list[dict[str, Any]]:
    """One row a latent that was shown, with what was verified of it."""
    if record.discovery is None:
        return []
    links = {bank.name: bank.link for bank in record.banks}
    real = {
        (row.bank, latent): row
        for row in (record.verification.units if record.verification else ())
        for latent in row.latents
    }
    chosen = set(record.minimal.latents) if record.minimal is not None else set()
    out: list[dict[str, Any]] = []
    for row in record.discovery.latents:
        best = max(row.places, key=lambda place: abs(place.effect or 0.0))
        made = real.get((row.bank, row.latent))
        link = links.get(row.bank)
        out.append(
            {
                "bank": row.bank,
                "site": row.site,
                "latent": row.latent,
                "place": best.place,
                "difference": best.difference,
                "effect": best.effect,
                "p": best.p,
                "q": best.q,
                "cosine": row.cosine,
                "cosine_p": row.cosine_p,
                "attribution": row.attribution.value if row.attribution else None,
                "verified": made.ablated.effect.value if made else None,
                "verified_low": made.ablated.effect.low if made else None,
                "verified_high": made.ablated.effect.high if made else None,
                "verified_p": made.ablated.p if made else None,
                "role": made.role if made else None,
                "output_score": made.output.effect.value if made and made.output else None,
                "firing": row.firing,
                "q99": row.q99,
                "decoder_norm": row.decoder_norm,
                "in_set": f"{row.bank}/{row.latent}" in chosen,
                "link": f"{link}{row.latent}" if link else None,
                "model": record.fingerprint,
                "seed": record.seed,
            }
        )
    return out


def _flat(row: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """Nested values as columns; of an estimate its value, interval and n."""
    out: dict[str, Any] = {}
    for key, value in row.items():
        column = f"{name}{key}"
        if isinstance(value, Mapping):
            out |= _flat(value, f"{column}.")
        elif isinstance(value, (list, tuple)):
            out[column] = "; ".join(map(str, value))
        else:
            out[column] = value
    return out


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    sink = io.StringIO()
    writer = csv.DictWriter(sink, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue()


def _write_replies(folder: Path, replies: Sequence[FeatureReply]) -> None:
    """The one file with replies to harmful prompts."""
    if replies:
        text = "".join(one.model_dump_json() + "\n" for one in replies)
        atomic_write(folder / REPLIES, text)

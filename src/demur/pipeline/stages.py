"""The stages of an audit; each leaves a record behind and is not run again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from demur.activations import (
    Activations,
    Moments,
    PointMoments,
    collect,
    moments,
    projections,
)
from demur.causal import Arm, Replies, reply_to, stable_seed
from demur.config import RunConfig
from demur.directions import Direction
from demur.errors import ConfigError
from demur.estimators import StreamingEstimator, candidates, estimators
from demur.evals.judges import Judge
from demur.models import Model, Template, load
from demur.pipeline.folder import ReplyFile, RunFolder
from demur.pipeline.splits import Splits
from demur.progress import Listener
from demur.prompts import PromptSet
from demur.results import Reading
from demur.selection import (
    Criteria,
    RefusalTokens,
    Scores,
    Screen,
    Selection,
    batched_logits,
    evaluations,
    openers,
    refusal_logodds,
    select,
)
from demur.sites import Site
from demur.stats import auroc

CLASSES = ("harmful", "harmless")
_LEAST_AFTER_FILTER = 16


@dataclass(frozen=True, slots=True)
class Baseline:
    """How the unedited model behaves on the fit and select prompts."""

    tokens: RefusalTokens
    scores: dict[str, list[float]]  # "fit harmful" -> refusal log-odds per prompt

    def summary(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self.tokens), "scores": self.scores}

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> Baseline:
        """Read `summary` back."""
        tokens = RefusalTokens(
            tuple(summary["ids"]),
            tuple(summary["texts"]),
            tuple(summary["shares"]),
            tuple(summary["base_shares"]),
            summary["refusals"],
            summary["learned"],
        )
        return cls(tokens, summary["scores"])


@dataclass(frozen=True, slots=True)
class Given:
    """What audits that differ in the estimator share, computed once for all of them.

    Attributes:
        how: Part of the run's identity, since another way to sum decides the last bits.
        baseline: The behaviour of the model on these fit and select prompts.
        sides: Statistics of the fit prompts "fit harmful" and "fit harmless", in this order.
    """

    how: str
    baseline: Baseline
    sides: Callable[[Mapping[str, list[str]]], Sequence[Moments | Activations]]


@dataclass(slots=True)
class Job:
    """What every stage of one audit works on.

    Attributes:
        run: The folder, where finished stages are.
        model: The model, in its own data type.
        fast: A bfloat16 copy where that is faster, else the model itself.
        notes: What a reader of the report should know; stages add to it.
        given: What need not be computed here.
    """

    config: RunConfig
    run: RunFolder
    model: Model
    fast: Model
    splits: Splits
    judge: Judge
    listener: Listener
    notes: list[str] = field(default_factory=list)
    given: Given | None = None

    @property
    def groups(self) -> dict[str, list[str]]:
        """All fit and select prompts, keyed like "fit harmful"."""
        return {
            f"{part} {on}": getattr(self.splits, on)[part].texts
            for part in ("fit", "select")
            for on in CLASSES
        }

    @property
    def report(self) -> dict[str, list[str]]:
        """The report prompts of each class."""
        return {on: getattr(self.splits, on)["report"].texts for on in CLASSES}


def load_model(config: RunConfig) -> Model:
    """The model of a configuration, its thinking block closed unless that is set."""
    model = load(**config.model.model_dump())
    own = model.template
    if (
        config.model.thinking is None
        and own
        and "enable_thinking" in str(own.tokenizer.chat_template)
    ):
        model.template = Template(
            own.tokenizer, system=own.system, thinking=False, max_length=own.max_length
        )
    return model


def fast_copy(model: Model, config: RunConfig) -> Model:
    """A bfloat16 copy where that is faster: on a GPU or a CPU with bfloat16 matrix units."""
    if model.dtype != torch.float32 or not config.selection.screen:
        return model
    if model.device.type == "cuda":
        return model.twin(torch.bfloat16)
    fast = model.device.type == "cpu" and _cpu_has_bfloat16()
    return model.twin(torch.bfloat16) if fast else model


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def baseline(job: Job) -> Baseline:
    """Have the unedited model reply, learn its refusal tokens, and score the prompts."""
    groups, config, model = job.groups, job.config, job.model

    def compute() -> tuple[dict[str, Any], dict[str, Tensor]]:
        if job.given is not None:
            return job.given.baseline.summary(), {}
        asked = [*groups["fit harmful"], *groups["fit harmless"]]
        with job.listener.stage("how the model replies", len(asked)) as advance:
            tokens = openers(
                job.fast,
                asked,
                job.judge,
                max_new_tokens=config.test.max_new_tokens,
                batch_size=config.test.batch_size,
                progress=advance,
            )
        scores = {}
        with job.listener.stage("refusal log-odds", len(groups)) as advance:
            for name, prompts in groups.items():
                logits = batched_logits(model, model.encode(prompts), config.extraction.batch_size)
                scores[name] = refusal_logodds(logits, tokens.ids).tolist()
                advance(1)
        return Baseline(tokens, scores).summary(), {}

    seen = Baseline.of(job.run.stage("baseline", compute)[0])
    tokens = seen.tokens
    if not tokens.learned:
        job.notes.append(
            f"the model refused only {tokens.refusals} fit prompts, too few to learn its refusal "
            "openers from; common English ones stand in"
        )
    return seen


def filtered(job: Job, seen: Baseline) -> tuple[dict[str, list[str]], dict[str, int] | None]:
    """Fit and select prompts on which the model behaves as their class should."""
    everything = job.groups
    if not job.config.data.behaviour_filter:
        return everything, None
    kept: dict[str, list[str]] = {}
    for name, prompts in everything.items():
        sign = 1 if name.endswith("harmful") else -1
        kept[name] = [p for p, s in zip(prompts, seen.scores[name], strict=True) if sign * s > 0]
    counts = {name: len(prompts) for name, prompts in kept.items()}
    least = {name: _LEAST_AFTER_FILTER if name.startswith("fit") else 4 for name in kept}
    short = [name for name in kept if counts[name] < min(least[name], len(everything[name]))]
    if short:
        job.notes.append(
            "the behaviour filter is off: it would leave "
            + ", ".join(f"{counts[name]} of {len(everything[name])} {name}" for name in short)
            + " prompts, so directions are fitted and selected on all of them"
        )
        return everything, counts
    return kept, counts


def chosen_sites(model: Model, config: RunConfig) -> tuple[Site, ...]:
    """The sites that candidates are read from.

    Raises:
        ConfigError: The model has no such layer.
    """
    layers = config.extraction.layers
    if layers is None:
        return model.stream_sites
    wrong = [layer for layer in layers if not 0 <= layer < model.n_layers]
    if wrong or not layers:
        raise ConfigError(
            f"there is no layer {', '.join(map(str, wrong)) or '(none given)'}: {model.name} has "
            f"blocks 0 to {model.n_layers - 1}",
            "choose among them",
        )
    return tuple(Site(layer, "resid_pre") for layer in dict.fromkeys(layers))


def chosen_positions(model: Model, config: RunConfig) -> tuple[int, ...]:
    """The token positions that candidates are read from.

    Raises:
        ConfigError: The template has no such position.
    """
    assert model.template is not None
    known = tuple(p.index for p in model.template.positions)
    asked = config.extraction.positions
    if asked is None:
        return known
    wrong = [p for p in asked if p not in known]
    if wrong or not asked:
        raise ConfigError(
            f"there is no position {', '.join(map(str, wrong)) or '(none given)'}: {model.name} "
            f"has {known[0]} (the last instruction token) to -1",
            "choose among them",
        )
    return tuple(dict.fromkeys(asked))


def extract(job: Job, fit: dict[str, list[str]]) -> tuple[list[Direction], list[Reading]]:
    """Estimate a direction at every site and position, and read it on held-out prompts."""
    config, model, splits = job.config, job.model, job.splits
    sites, positions = chosen_sites(model, config), chosen_positions(model, config)
    size = config.extraction.batch_size
    recipe = json.dumps(
        {
            "estimator": config.extraction.estimator,
            "model": model.fingerprint,
            "harmful": PromptSet.of(fit["fit harmful"]).fingerprint,
            "harmless": PromptSet.of(fit["fit harmless"]).fingerprint,
        },
        sort_keys=True,
    )

    def compute() -> tuple[dict[str, Any], dict[str, Tensor]]:
        estimator = estimators.make(config.extraction.estimator)
        read: Any = collect
        if isinstance(estimator, StreamingEstimator):
            read = partial(moments, rank=64 if estimator.covariance else 0)
        total = len(fit["fit harmful"]) + len(fit["fit harmless"])
        with job.listener.stage("reading activations", total) as advance:
            if job.given is not None:
                sides = job.given.sides(fit)
                advance(total)
            else:
                sides = [
                    read(
                        model,
                        fit[f"fit {on}"],
                        sites=sites,
                        positions=positions,
                        batch_size=size,
                        progress=advance,
                    )
                    for on in CLASSES
                ]
        found = candidates(sides[0], sides[1], estimator, recipe=recipe)
        units = torch.zeros(len(sites), len(positions), model.d_model, dtype=torch.float64)
        for one in found:
            units[sites.index(one.site), positions.index(one.position)] = one.unit.double()
        held_out = [*splits.harmful["calibrate"].texts, *splits.harmless["calibrate"].texts]
        labels = [1] * len(splits.harmful["calibrate"]) + [0] * len(splits.harmless["calibrate"])
        with job.listener.stage("projecting held-out prompts", len(held_out)) as advance:
            scores = projections(
                model,
                held_out,
                sites=sites,
                positions=positions,
                units=units,
                batch_size=size,
                progress=advance,
            )
        readings = []
        for one in found:
            i, j = sites.index(one.site), positions.index(one.position)
            side = sides[1].at(one.site, one.position)
            middle = side.mean if isinstance(side, PointMoments) else side.double().mean(0)
            readings.append(
                Reading(
                    site=str(one.site),
                    position=one.position,
                    norm=one.norm,
                    relative_norm=one.norm / float(middle.norm()),
                    auroc=auroc(scores[i, j].numpy(), labels),
                )
            )
        summary = {
            "tensors": True,
            "readings": TypeAdapter(list[Reading]).dump_python(readings, mode="json"),
        }
        return summary, {"units": torch.stack([one.unit for one in found])}

    summary, tensors = job.run.stage("extract", compute)
    readings = TypeAdapter(list[Reading]).validate_python(summary["readings"])
    directions = [
        Direction(unit.clone(), row.norm, Site.parse(row.site), row.position, recipe)
        for row, unit in zip(readings, tensors["units"], strict=True)
    ]
    return directions, readings


def choose(
    job: Job,
    directions: list[Direction],
    fit: dict[str, list[str]],
    tokens: RefusalTokens,
) -> Selection:
    """Score all candidates and choose one."""
    config, settings = job.config, job.config.selection
    criteria = Criteria(settings.max_kl, settings.min_induce, settings.last_layers_skipped)

    def compute() -> tuple[dict[str, Any], dict[str, Tensor]]:
        faster = job.fast is not job.model
        few = settings.screen_prompts if settings.screen else 0
        sizes = len(fit["select harmful"]), len(fit["select harmless"])
        steps = evaluations(
            len(directions), settings.finalists, few=0 < few < min(sizes), faster=faster
        )
        with job.listener.stage("testing candidates", steps) as advance:
            chosen = select(
                job.model,
                directions,
                harmful=fit["select harmful"],
                harmless=fit["select harmless"],
                tokens=tokens,
                criteria=criteria,
                screen=job.fast if faster else None,
                screen_prompts=few or None,
                finalists=settings.finalists,
                batch_size=config.extraction.batch_size,
                seed=stable_seed(config.seed, "select"),
                progress=advance,
            )
        none = torch.full((1,), float("nan"), dtype=torch.float64)
        tensors = {"harmful": chosen.harmful, "harmless": chosen.harmless}
        for name in ("bypass", "induce", "kl"):
            width = len(chosen.harmful if name == "bypass" else chosen.harmless)
            rows = [getattr(row, name) for row in chosen.rows]
            tensors[name] = torch.stack([none.expand(width) if r is None else r for r in rows])
        return {
            "tensors": True,
            "exact": [row.exact for row in chosen.rows],
            "rejected_by": [row.rejected_by for row in chosen.rows],
            "chosen": chosen.chosen,
            "least_bad": chosen.least_bad,
            "screen": asdict(chosen.screen) if chosen.screen is not None else None,
        }, tensors

    summary, tensors = job.run.stage("select", compute)

    def row(i: int) -> Scores:
        values = {
            name: None if bool(tensors[name][i].isnan().all()) else tensors[name][i]
            for name in ("bypass", "induce", "kl")
        }
        return Scores(
            directions[i],
            values["bypass"],
            values["induce"],
            values["kl"],
            summary["exact"][i],
            summary["rejected_by"][i],
        )

    return Selection(
        [row(i) for i in range(len(directions))],
        summary["chosen"],
        summary["least_bad"],
        tensors["harmful"],
        tensors["harmless"],
        Screen(**summary["screen"]) if summary["screen"] is not None else None,
    )


def replies(job: Job, arms: Sequence[Arm]) -> tuple[dict[str, Replies], list[Replies]]:
    """Generate what the file does not hold yet: the unedited model's replies and each arm's."""
    config, prompts = job.config, job.report
    file = ReplyFile(job.run.folder / "replies.jsonl")
    wanted = [("unedited", "harmful", ()), ("unedited", "harmless", ())]
    wanted += [(arm.name, arm.on, (arm.act,)) for arm in arms]
    total = sum(len(prompts[on]) for _, on, _ in wanted)
    out = []
    with job.listener.stage("replies of the causal test", total) as advance:
        for name, on, acts in wanted:
            found = file.get(name, on, prompts[on])
            if found is None:
                found = reply_to(
                    job.fast,
                    prompts[on],
                    name=name,
                    on=on,
                    judge=job.judge,
                    acts=acts,
                    max_new_tokens=config.test.max_new_tokens,
                    batch_size=config.test.batch_size,
                    stop_early=config.test.stop_early,
                    progress=advance,
                )
                file.put(found, prompts[on])
            else:
                advance(len(prompts[on]))
            out.append(found)
    return {"harmful": out[0], "harmless": out[1]}, out[2:]

"""A comparison under way: what is compared, what was read, and what is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from demur.causal import stable_seed
from demur.compare.contrasts import Contrast
from demur.compare.extract import (
    Asked,
    Grid,
    PromptRows,
    asked,
    harm,
    read_prompts,
    refusal,
    rows_of,
    shift_contrast,
    text_contrast,
)
from demur.compare.library import LibraryContrast, load_library, read_library, texts
from demur.compare.objects import Vectors, read_vectors
from demur.config import DataSettings, RunConfig
from demur.directions import Direction
from demur.em.advice import ADVICE, AdviceItem, advice
from demur.em.directions import AnswerMeans, AnswerPair, read_pair
from demur.em.organism import CONFIG, VECTOR, Organism
from demur.errors import ConfigError, DemurError, TooFewPromptsError, UnknownNameError
from demur.models import Model
from demur.models import load as load_model
from demur.pipeline.em import (
    check_base,
    digest_of,
    fewer,
    find_organisms,
    fit_and_report,
    items_digest,
    trained_on,
    twins_of,
)
from demur.pipeline.kept import Kept, kept_openers
from demur.pipeline.splits import make_splits
from demur.progress import Listener
from demur.prompts import PromptSet
from demur.selection import Criteria, RefusalTokens, evaluations, select
from demur.sites import Site
from demur.store import Store

T = TypeVar("T")

BASE, RECORD = "base", "compare.json"
WORDS = ("refusal", "harm", "em")
"""Directions that are read on the model, by name; organisms and stored vectors go by their path."""
PARTS = ("library", "dimensions", "behaviour", "mediation", "circuits")
"""What a comparison can do without."""
_SITES = 8
_MOST_KL = 0.3  # Nats on harmless prompts that taking refusal out may cost where it is chosen.
_OPENERS = 48  # Prompts of each class whose replies tell what refusals begin with.


@dataclass(frozen=True, slots=True)
class CompareSettings:
    """What decides a comparison, besides the model and what is compared.

    Attributes:
        harmful: Spec of harmful prompts; likewise `harmless`.
        items: Specs of questions with a bad and a good answer each.
        prompts: Of each class that directions are read on.
        report: Of each class that behaviour is measured on; the two share none.
        limit: Questions of each domain; None is all.
        edited: Questions that margins are asked of under edits, which takes many passes.
        layers: Blocks whose outputs are read; None is eight, evenly from a quarter of the depth on.
        site: Block whose output edits act on; None: the best of `layers` by what ablating refusal
            there does on prompts of their own.
        kl: What every edit costs on neutral text, nats per token.
        nulls: Random directions for each kind of edit; fewer than 19 cannot show p = .05.
        paragraphs: Of neutral text, on which that cost is taken.
        additions: Also add directions and take them away, which nearly doubles the time of edits.
        library: Folder of further unrelated contrasts.
        skip: Parts that are left out, of `PARTS`; a later run without it adds them.
        checkpoints: Names of further models that were made from the base: fine-tunes, other
            quantisations, abliterated ones.
        draws: Of clusters for every interval, and of sampled nulls.
        judge: Of replies, from which the first tokens of refusals are learned.
        seed: Of every draw.
        batch_size: Most rows of a pass; None is as many as the device is best given.
    """

    harmful: str = DataSettings().harmful
    harmless: str = DataSettings().harmless
    items: tuple[str, ...] = ADVICE
    prompts: int = 128
    report: int = 64
    limit: int | None = 32
    edited: int = 48
    layers: tuple[int, ...] | None = None
    site: int | None = None
    kl: float = 0.05
    nulls: int = 20
    paragraphs: int = 8
    additions: bool = False
    library: str | None = None
    skip: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    draws: int = 2000
    judge: str = "patterns"
    seed: int = 0
    batch_size: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Things:
    """What is to be compared.

    Attributes:
        words: Of `WORDS`.
        organisms: Bad ones first, then their good twins.
        stored: Vectors from files.
    """

    words: tuple[str, ...]
    organisms: tuple[Organism, ...]
    stored: tuple[Vectors, ...]

    @property
    def bad(self) -> tuple[Organism, ...]:
        """Organisms that were trained on bad answers."""
        return tuple(one for one in self.organisms if one.side == "bad")


def find_things(specs: Sequence[str]) -> Things:
    """Read what a user names: words, organisms' folders, stored vectors.

    Args:
        specs: Each one of `WORDS`, a folder that `demur organism train` made (both sides are found)
            or a file or folder with stored vectors, see `demur.compare.objects`.

    Raises:
        UnknownNameError: Something is neither a word nor a path.
        ConfigError: Fewer than two things are left.
        DemurError: A file or folder cannot be read.
    """
    words: list[str] = []
    folders: list[Path] = []
    stored: list[Vectors] = []
    for spec in dict.fromkeys(specs):
        path = Path(spec).expanduser()
        if spec in WORDS:
            words.append(spec)
        elif path.is_dir() and _holds_organism(path):
            folders.append(path)
        elif path.exists():
            stored.append(read_vectors(path))
        else:
            raise UnknownNameError(
                f"`{spec}` is no file or folder, and none of {', '.join(WORDS)}",
                "name a word, an organism's folder, a run folder, or a file with a vector",
            )
    organisms = find_organisms(folders) if folders else ()
    if len(words) + sum(map(len, stored)) + 2 * len(folders) < 2:
        raise ConfigError("one direction alone cannot be compared", "name two or more")
    return Things(tuple(words), organisms, tuple(stored))


def _holds_organism(path: Path) -> bool:
    """An organism has a card, or a side; a bare LoRA is a stored vector, which heretic's is."""
    own = [path, *sorted(p for p in path.iterdir() if p.is_dir())]
    return any(
        (one / "card.json").is_file() and ((one / CONFIG).is_file() or (one / VECTOR).is_file())
        for one in own
    )


# The run -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Run:
    """A comparison under way; parts of the pipeline share it."""

    base: Model
    things: Things
    settings: CompareSettings
    kept: Kept
    load: Callable[[str], Model]
    listener: Listener
    notes: list[str]
    prompts: Mapping[str, Mapping[str, PromptSet]]
    fit: Asked
    items: tuple[tuple[AdviceItem, ...], tuple[AdviceItem, ...]]
    sites: tuple[Site, ...]
    library: Mapping[str, LibraryContrast]
    seconds: dict[str, float] = field(default_factory=dict)
    _standing: dict[str, Model] = field(default_factory=dict)
    _rows: dict[str, PromptRows] = field(default_factory=dict)
    _pairs: dict[str, AnswerPair] = field(default_factory=dict)
    _unrelated: dict[tuple[str, int], dict[Site, dict[str, Contrast]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_name = {one.name: one for one in self.things.organisms}
        self.digests = {one.name: digest_of(one) for one in self.things.organisms}
        self.twins = {
            one.name: (twins_of(one, self.things.organisms) or [None])[0] for one in self.things.bad
        }

    def seed(self, name: str) -> int:
        """A seed of its own for every part."""
        return stable_seed(self.settings.seed, f"compare {name}")

    def part(self, name: str) -> bool:
        """Whether a part is wanted."""
        return name not in self.settings.skip

    def model(self, name: str) -> Model:
        """The base, or an organism on it; one at a time beside the base."""
        if name == BASE:
            return self.base
        if name not in self._standing:
            self._standing.clear()
            self._standing[name] = self.by_name[name].on(self.base)
        return self._standing[name]

    def whose(self, *names: str) -> list[str]:
        """Digests of models, for keys."""
        return [BASE if name == BASE else self.digests[name] for name in names]

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note how long a part took."""
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 2)

    def stage(self, name: str, total: int) -> Any:
        """A stage of the listener."""
        return self.listener.stage(name, total)

    # What was read

    def about(self) -> dict[str, Any]:
        """What every reading hangs on."""
        return {"sites": [str(site) for site in self.sites]}

    def rows(self, name: str) -> PromptRows:
        """Prompts as a model reads them."""
        if name not in self._rows:

            def run() -> tuple[dict[str, Any], dict[str, Tensor]]:
                with self.stage(f"prompts: {name}", rows_of(self.fit)) as advance:
                    found = read_prompts(
                        self.model(name),
                        self.fit,
                        sites=self.sites,
                        batch_size=self.settings.batch_size,
                        progress=advance,
                    )
                return {"positions": list(found.positions), "model": found.model}, found.tensors()

            about = {**self.about(), "model": self.whose(name), "prompts": asdict(self.fit)}
            summary, tensors = self.kept.stage("prompts", about, run)
            self._rows[name] = PromptRows(
                positions=tuple(summary["positions"]),
                sites=self.sites,
                model=summary["model"],
                name=name,
                **tensors,
            )
        return self._rows[name]

    def pair(self, name: str) -> AnswerPair:
        """Bad and good answers as a model reads them."""
        if name not in self._pairs:
            items = self.items[0]

            def run() -> tuple[dict[str, Any], dict[str, Tensor]]:
                with self.stage(f"answers: {name}", 2 * len(items)) as advance:
                    found = read_pair(
                        self.model(name),
                        items,
                        sites=self.sites,
                        batch_size=self.settings.batch_size,
                        progress=advance,
                    )
                sides = {"bad": found.bad, "good": found.good}
                tensors = {f"{which}.values": side.values for which, side in sides.items()}
                tensors |= {f"{which}.counts": side.counts for which, side in sides.items()}
                summary = {which: side.texts for which, side in sides.items()}
                return {**summary, "model": found.bad.model}, tensors

            about = {**self.about(), "model": self.whose(name), "items": items_digest(items)}
            summary, tensors = self.kept.stage("answers", about, run)
            sides = [
                AnswerMeans(
                    tensors[f"{which}.values"],
                    tensors[f"{which}.counts"],
                    self.sites,
                    which,
                    tuple(item.id for item in items),
                    tuple((item.domain, item.group) for item in items),
                    summary[which],
                    name,
                    summary["model"],
                )
                for which in ("bad", "good")
            ]
            self._pairs[name] = AnswerPair(*sides)
        return self._pairs[name]

    def unrelated(self, name: str, position: int) -> dict[Site, dict[str, Contrast]]:
        """Unrelated contrasts as a model reads them, by site; none where they are left out."""
        if not self.part("library"):
            return {}
        key = (name, position)
        if key not in self._unrelated:

            def run() -> tuple[dict[str, Any], dict[str, Tensor]]:
                total = len(texts(self.library, position=position))
                with self.stage(f"unrelated contrasts: {name}", total) as advance:
                    found = read_library(
                        self.model(name),
                        self.library,
                        sites=self.sites,
                        position=position,
                        batch_size=self.settings.batch_size,
                        progress=advance,
                    )
                tensors: dict[str, Tensor] = {}
                for one, by_site in found.items():
                    both = [by_site[site].rows for site in self.sites]
                    tensors[f"{one}.positive"] = torch.stack([rows[0] for rows in both]).float()
                    tensors[f"{one}.negative"] = torch.stack([rows[1] for rows in both]).float()
                return {}, tensors

            about = {
                **self.about(),
                "model": self.whose(name),
                "position": position,
                "library": {one: asdict(self.library[one]) for one in self.library},
            }
            _, tensors = self.kept.stage("library", about, run)
            self._unrelated[key] = {
                site: {
                    one: Contrast.of_pairs(
                        one,
                        tensors[f"{one}.positive"][i],
                        tensors[f"{one}.negative"][i],
                        site=site,
                        position=position,
                        model=self.base.fingerprint if name == BASE else self.digests[name],
                        recipe=self.library[one].about,
                        clusters=[("library", item.cluster) for item in self.library[one].items],
                    )
                    for one in self.library
                }
                for i, site in enumerate(self.sites)
            }
        return self._unrelated[key]

    # What is compared

    def grids(self) -> dict[str, Grid]:
        """Every direction that is read on a model, by name."""
        found: dict[str, Grid] = {
            "refusal": refusal(self.rows(BASE), self.fit),
            "harm": harm(self.rows(BASE), self.fit),
            "em text": text_contrast(self.pair(BASE), name="em text"),
        }
        for one in self.things.organisms:
            found[shift_name(one)] = self.shift(one)
        return found

    def shift(self, one: Organism) -> Grid:
        """What training did: of a bad one beyond its good twin, of a good one beyond the base."""
        twin = self.twins.get(one.name)
        other = twin.name if twin is not None else BASE
        return shift_contrast(
            (self.rows(one.name), self.pair(one.name)),
            (self.rows(other), self.pair(other)),
            self.fit,
            name=shift_name(one),
            over="its good twin" if twin is not None else "the base",
            model=self.base.fingerprint,
        )


def shift_name(one: Organism) -> str:
    """What an organism's shift is called."""
    return f"shift of {one.name}"


def at_position(grid: Grid, position: int) -> dict[Site, Contrast]:
    """The part of a grid that was read at one position."""
    return {site: one for (site, at), one in grid.items() if at == position}


# Beginning ---------------------------------------------------------------------------------------


def begin(
    base: Model,
    things: Things,
    folder: Path,
    settings: CompareSettings,
    *,
    listener: Listener,
    load: Callable[[str], Model] = load_model,
    any_model: bool = False,
) -> Run:
    """Load prompts and questions, and settle where to read; arguments as for `compare_run`."""
    notes = check_base(base, things.organisms, any_model=any_model)
    if settings.skip:
        notes.append(f"left out as asked: {', '.join(settings.skip)}")
    splits = make_splits(
        RunConfig.model_validate(
            {
                "data": {
                    "harmful": settings.harmful,
                    "harmless": settings.harmless,
                    "fit": settings.prompts,
                    "report": settings.report,
                },
                "seed": settings.seed,
            }
        )
    )
    prompts = {"harmful": splits.harmful, "harmless": splits.harmless}
    return Run(
        base,
        things,
        settings,
        Kept(Store(folder / "stages"), base=base.fingerprint, draws=settings.draws),
        load,
        listener,
        notes,
        prompts,
        asked(splits.harmful["fit"], splits.harmless["fit"]),
        _items(things, settings),
        _sites(base, things, settings),
        load_library(Path(settings.library) if settings.library else None),
    )


def _items(
    things: Things, settings: CompareSettings
) -> tuple[tuple[AdviceItem, ...], tuple[AdviceItem, ...]]:
    """Questions to read directions on, and others, of other topics, to report on."""
    trained = [trained_on(one) for one in things.organisms]
    found = {
        item.question: item
        for spec in settings.items
        for item in advice(spec)
        if item.good.strip() and item.bad.strip() and not any(one.on(item) for one in trained)
    }
    items: Sequence[AdviceItem] = [
        replace(item, id=f"{item.id} #{i}") for i, item in enumerate(found.values())
    ]
    if len({(item.domain, item.group) for item in items}) < 8:
        raise TooFewPromptsError(
            f"{len(items)} questions of {' + '.join(settings.items)} are left that no organism was "
            "trained on",
            "name other questions with `--items`, of eight topics or more",
        )
    fit, report = fit_and_report(items, stable_seed(settings.seed, "compare questions"))
    if settings.limit is not None:
        fit = fewer(fit, settings.limit, stable_seed(settings.seed, "compare fit"))
    domains = len({item.domain for item in report})
    each = max(2, -(-settings.edited // domains))
    report = fewer(report, each, stable_seed(settings.seed, "compare report"))
    return fit, report


def _sites(base: Model, things: Things, settings: CompareSettings) -> tuple[Site, ...]:
    wanted = set(settings.layers or ())
    if settings.site is not None:
        wanted.add(settings.site)
    wrong = [layer for layer in wanted if not 0 <= layer < base.n_layers]
    if wrong:
        raise ConfigError(
            f"{base.name} has blocks 0 to {base.n_layers - 1}; asked for "
            f"{', '.join(map(str, sorted(wrong)))}",
            "name blocks with `--layers 12,18` and `--site 15`",
        )
    if settings.layers is None:
        first, last = base.n_layers // 4, base.n_layers - 1
        count = min(_SITES, last - first + 1)
        wanted |= {first + round(i * (last - first) / max(1, count - 1)) for i in range(count)}
    # Stored vectors are compared where they are of.
    for vectors in things.stored:
        wanted |= {
            stream_block(one.site)
            for one in next(iter(vectors.named.values()))[:1]
            if 0 <= stream_block(one.site) < base.n_layers
        }
    return tuple(Site(layer, "resid_post") for layer in sorted(wanted))


def stream_block(site: Site) -> int:
    """The block whose output is the tensor, or the stream that it is written to."""
    return site.layer - 1 if site.kind == "resid_pre" else site.layer


# Where edits act ---------------------------------------------------------------------------------


def learned_openers(run: Run) -> RefusalTokens:
    """What the base's refusals begin with, from its own replies to prompts that are read."""
    return kept_openers(
        run.kept,
        run.base,
        [*run.fit.harmful[:_OPENERS], *run.fit.harmless[:_OPENERS]],
        judge=run.settings.judge,
        listener=run.listener,
        about={"prompts": asdict(run.fit)},
    )


def chosen_site(run: Run, tokens: RefusalTokens) -> tuple[Site, str]:
    """Where directions act: as told, or where taking refusal out does most for what it costs."""
    if run.settings.site is not None:
        return Site(run.settings.site, "resid_post"), "as asked"

    def compute() -> tuple[dict[str, Any], dict[str, Tensor]]:
        grid = refusal(run.rows(BASE), run.fit)
        directions: list[Direction] = [grid[site, -1].direction() for site in run.sites]
        harmful, harmless = (run.prompts[on]["select"].texts for on in ("harmful", "harmless"))
        total = evaluations(len(directions), len(directions), few=False, faster=False)
        with run.stage("choosing a site", total) as advance:
            found = select(
                run.base,
                directions,
                harmful=harmful,
                harmless=harmless,
                tokens=tokens,
                criteria=Criteria(),
                finalists=len(directions),
                batch_size=run.settings.batch_size,
                seed=run.seed("site"),
                progress=advance,
            )
        exact = [row for row in found.rows if row.bypass is not None and row.kl is not None]
        cheap = [row for row in exact if row.means[2] <= _MOST_KL]
        best = min(cheap or exact, key=lambda row: row.means[0])
        bypass, induce, kl = best.means
        why = (
            f"of {len(exact)} sites, taking refusal out there lowers refusal log-odds most, from "
            f"{float(found.harmful.mean()):.2f} to {bypass:.2f} on {len(harmful)} harmful prompts "
            f"of their own, at {kl:.2f} nats on harmless ones (at most {_MOST_KL}); added, it "
            f"brings those to {induce:.2f}"
        )
        if best.rejected_by:
            why += f"; by the usual criteria it falls short: {best.rejected_by}"
        return {"site": str(best.direction.site), "why": why}, {}

    about = {
        **run.about(),
        "prompts": asdict(run.fit),
        "select": [run.prompts[on]["select"].fingerprint for on in ("harmful", "harmless")],
        "tokens": list(tokens.ids),
        "seed": run.settings.seed,
    }
    summary, _ = run.kept.stage("site", about, compute)
    return Site.parse(summary["site"]), summary["why"]


def attempted(run: Run, name: str, compute: Callable[[], T]) -> T | None:
    """What a part found; None, with a note, where it cannot be done on this model."""
    try:
        with run.timed(name):
            return compute()
    except DemurError as error:
        run.notes.append(f"{name} could not be done: {error.fact}; {error.hint}")
        return None

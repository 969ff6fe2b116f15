"""The experiment from splits to record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations

from demur.errors import OverlapError, TooFewPromptsError
from demur.hydra.bed import Bed
from demur.hydra.rows import ControlRow, HydraRecord
from demur.hydra.stages import (
    Settings,
    controls,
    find_backups,
    gate,
    mediation,
    other_behaviour,
    primary_set,
    starve,
    upstream_set,
)
from demur.hydra.units import Units
from demur.hydra.verdict import verdict
from demur.models import Model
from demur.progress import Progress
from demur.stats import bootstrap_stratified

_LEAST = 8


@dataclass(frozen=True, slots=True)
class Classes:
    """Prompts of one split.

    Attributes:
        harmful: User messages.
        harmless: Likewise, about the same topics where possible.
    """

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Splits:
    """Three splits that share no prompt.

    Attributes:
        discover: A: chooses the primary set and makes units.
        detect: B: finds backups and confirms the upstream set.
        test: C: measures.

    Raises:
        OverlapError: A prompt is in two of them, or in both classes.
        TooFewPromptsError: A class of a split has fewer than 8.
    """

    discover: Classes
    detect: Classes
    test: Classes

    def __post_init__(self) -> None:
        sets = {
            f"{name} {kind}": set(getattr(part, kind))
            for name, part in self.named.items()
            for kind in ("harmful", "harmless")
        }
        for (first, a), (second, b) in combinations(sets.items(), 2):
            if a & b:
                raise OverlapError(
                    f"{len(a & b)} prompts are in {first} and in {second}, such as "
                    f"{min(a & b)[:60]!r}",
                    "give every prompt to one split: what chooses must not measure",
                )
        for name, prompts in sets.items():
            if len(prompts) < _LEAST:
                raise TooFewPromptsError(
                    f"{name} has {len(prompts)} different prompts", f"give {_LEAST} or more"
                )

    @property
    def named(self) -> dict[str, Classes]:
        """By name."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @classmethod
    def cut(cls, harmful: Sequence[str], harmless: Sequence[str]) -> Splits:
        """Deal prompts out to the three splits in turn; pairs in one order stay together."""
        return cls(*(Classes(tuple(harmful[i::3]), tuple(harmless[i::3])) for i in range(3)))


@dataclass(frozen=True, slots=True, eq=False)
class Beds:
    """The splits, encoded; `a` discovers, `b` detects, `c` tests.

    Attributes:
        harmful: By split.
        harmless: By split.
    """

    harmful: dict[str, Bed]
    harmless: dict[str, Bed]


def beds(
    model: Model,
    splits: Splits,
    openers: Sequence[int],
    *,
    reply: Sequence[int] = (),
    tick: Progress | None = None,
) -> Beds:
    """Encode the splits; see `Bed`."""
    made: list[dict[str, Bed]] = []
    for kind in ("harmful", "harmless"):
        parts = zip("abc", splits.named.values(), strict=True)
        made.append(
            {
                name: Bed(model, getattr(part, kind), openers, reply=reply, tick=tick)
                for name, part in parts
            }
        )
    return Beds(made[0], made[1])


def steps(units: int, settings: Settings | None = None) -> int:
    """Most arms that an experiment runs, for a progress bar.

    Args:
        units: How many there are.
        settings: Of the run.
    """
    own = settings or Settings()
    first = min(own.screened, units)
    tried = min(own.tried, units)
    choosing = first + (own.most - 1) * tried + 2 * own.most
    detecting = own.draws + 2
    splitting = 4 + 2 * own.c_draws + 2 * own.draws + 3
    feeding = own.upstream_tried
    starving = own.most_upstream + max(own.most, own.most_upstream) + 6
    gating = 3 * (len(own.gammas) + 3)
    others = 3 * own.c_draws + 8 + tried + 8
    return choosing + detecting + splitting + feeding + starving + gating + others + 12


def hydra(
    model: Model,
    units: Callable[[Model, Bed, Bed], Units],
    splits: Splits,
    openers: Sequence[int],
    *,
    settings: Settings | None = None,
    candidates: Sequence[int] | None = None,
    reply: Sequence[int] = (),
    with_controls: bool = True,
    progress: Progress | None = None,
) -> HydraRecord:
    """Run the whole experiment.

    Args:
        model: Unedited.
        units: Makes units of the harmful and the harmless prompts of split A, such as
            `DirectionUnits`, or `lambda model, a, b: LatentUnits(model, banks, a, b)`.
        splits: Prompts.
        openers: Token ids that refusals begin with.
        settings: Sizes and limits.
        candidates: Units that the primary set is chosen from; None are those that differ most
            between the classes.
        reply: A fixed beginning of the reply whose tokens are read and edited too.
        with_controls: Whether controls are run; the verdict does not hang on them.
        progress: Called with the number of arms run since the last call; they add up to `steps`.

    Raises:
        TemplateError: See `Bed`.
        NonFiniteError: An outcome is NaN or infinite.
    """
    own = settings or Settings()
    done = 0

    def tick(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(n)

    laid = beds(model, splits, openers, reply=reply, tick=tick)
    pos, neg = laid.harmful, laid.harmless
    made = units(model, pos["a"], neg["a"])
    limit = steps(len(made.names), own)
    notes = [
        "edits act at the last instruction token, the template behind it and the reply given; "
        "what earlier tokens hold reaches these through attention, unedited",
    ]
    chosen = primary_set(made, pos["a"], neg["a"], settings=own, candidates=candidates)
    high, low = pos["c"].clean(made).margin, neg["c"].clean(made).margin
    gap = bootstrap_stratified(
        lambda i, j: float(high[i].mean() - low[j].mean()), len(high), len(low), seed=own.seed
    )
    found = fed = curves = table = effects = None
    tests: tuple[ControlRow, ...] = ()
    if chosen.ids:
        first = chosen.ids
        found = find_backups(made, pos["b"], first, settings=own)
        effects = mediation(made, pos["c"], first, found.ids, settings=own)
        fed = upstream_set(made, pos["a"], neg["a"], pos["b"], first, settings=own)
        if not fed.rows:
            notes.append("no unit below the primary set tells harm at the last instruction token")
        if fed.ids:
            curves = starve(made, pos["c"], fed.ids, first, found.ids, settings=own)
            table = gate(
                made,
                pos["c"],
                neg["c"],
                upstream=fed.ids,
                primary=first,
                backups=found.ids,
                settings=own,
            )
        if with_controls:
            tests = (
                *controls(made, pos["b"], pos["c"], primary=first, backups=found, settings=own),
                other_behaviour(made, neg["a"], neg["b"], primary=first, settings=own),
            )
    word, why = verdict(
        effects,
        found.rows if found else (),
        curves,
        table.interactions if table else (),
        own,
        gap=gap,
        primary=chosen.rows,
    )
    if progress is not None and done < limit:
        progress(limit - done)
    return HydraRecord(
        model=model.name,
        fingerprint=model.fingerprint,
        units=made.kind,
        count=len(made.names),
        sizes={
            name: (len(part.harmful), len(part.harmless)) for name, part in splits.named.items()
        },
        settings=asdict(own),
        gap=gap,
        primary=chosen.rows,
        primary_set=tuple(made.names[i] for i in chosen.ids),
        backups=found.rows if found else (),
        backup_set=tuple(made.names[i] for i in found.ids) if found else (),
        effects=effects,
        upstream=fed.rows if fed else (),
        upstream_set=tuple(made.names[i] for i in fed.ids) if fed else (),
        starve=curves,
        cells=table.cells if table else (),
        interactions=table.interactions if table else (),
        controls=tests,
        verdict=word,
        why=why,
        notes=tuple(notes),
    )

"""Does the direction of one organism undo another? Every direction, taken out of every organism.

A direction is shared if taking it out of an organism that it was not found in removes more of what
training did there than random directions do, than the base's own difference of bad and good text
does, and than the directions of good twins do. Cosines alone cannot tell: those of good twins are
as high.

One margin pass runs all items once through one model. There are `transfer_passes` of them: models
times (1 + rows + random ones), where models are the base, every organism and every twin. Random
ones run on the base only where an organism has no twin.

References:
    Soligo, Turner, Rajamanoharan, Nanda 2025, arXiv:2506.11618, section 3.3.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from demur.directions import Direction
from demur.em.advice import AdviceItem
from demur.em.directions import AnswerPair, null_cosines
from demur.em.effects import (
    Bench,
    Directions,
    How,
    Subject,
    ablation,
    put,
    random_directions,
    share_removed,
)
from demur.em.margin import grouped_mean, margin_shift
from demur.errors import ConfigError
from demur.interventions import Add, Intervention
from demur.models import Model
from demur.progress import Progress
from demur.sites import Site
from demur.stats import Estimate, null_p

RowKind = Literal["organism", "twin", "base", "library", "random"]
Edit = Literal["ablate", "take away"]

BASE = "base"
"""Name of the row that holds the base's own difference, and of the base among models."""

_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class TransferCell:
    """One direction taken out of one organism.

    Attributes:
        row: Whose direction.
        kind: What that is.
        column: The organism.
        edit: "ablate" projects out, "take away" subtracts at equal KL in the base.
        own: Whether the direction is the organism's.
        against: Name of what the organism is compared with, under the same edit: its good twin, or
            the base where it has none.
        change: Mean of (change in the organism - change in the other), nats per token, over groups.
        in_organism: Mean change of the organism's margin, nats per token.
        in_other: Likewise of the other's.
        in_base: Likewise of the base's: far from 0, the direction is not specific to training.
        removed: Share of the trained effect that is gone; None where it is undefined.
        undefined: Why.
        p: Share of the random directions that lower the organism as far beyond the other.
    """

    row: str
    kind: RowKind
    column: str
    edit: Edit
    own: bool
    against: str
    change: Estimate
    in_organism: Estimate
    in_other: Estimate
    in_base: Estimate
    removed: Estimate | None
    undefined: str
    p: float | None


@dataclass(frozen=True, slots=True)
class TransferBand:
    """What random directions do to one organism.

    Attributes:
        column: The organism.
        edit: See `TransferCell`.
        n: How many random directions.
        changes: Of each, as `TransferCell.change`.
        mean: Of them.
        low: 2.5% of them.
        high: 97.5%.
        removed_mean: Mean share of the trained effect that is gone; None where it is undefined.
        removed_low: 2.5%.
        removed_high: 97.5%.
    """

    column: str
    edit: Edit
    n: int
    changes: tuple[float, ...]
    mean: float
    low: float
    high: float
    removed_mean: float | None
    removed_low: float | None
    removed_high: float | None


@dataclass(frozen=True, slots=True)
class TransferCosine:
    """The cosine of two rows' directions at a site, beside chance.

    Attributes:
        first: One row.
        second: The other.
        site: Of both.
        value: The cosine.
        null_low: 2.5% of the cosines of random directions, which vary as answers do, with that of
            either row; the wider one.
        null_high: 97.5%, likewise.
        percentile: Share of random ones with a smaller cosine in size; the smaller one of the two.
    """

    first: str
    second: str
    site: Site
    value: float
    null_low: float
    null_high: float
    percentile: float


@dataclass(frozen=True, slots=True)
class TransferTable:
    """Directions taken out of organisms.

    Attributes:
        rows: Names of directions and their kinds, in order.
        columns: Names of organisms, in order.
        against: What each organism is compared with.
        trained: The trained effect of each organism: mean of (its margin - the other's), nats per
            token, over groups.
        cells: Row by column.
        bands: Random directions.
        cosines: Each two rows at each site that both have.
        n: Items.
        margin_passes: What it took.
        neutral_passes: Likewise.
    """

    rows: tuple[tuple[str, RowKind], ...]
    columns: tuple[str, ...]
    against: Mapping[str, str]
    trained: Mapping[str, Estimate]
    cells: tuple[TransferCell, ...]
    bands: tuple[TransferBand, ...]
    cosines: tuple[TransferCosine, ...]
    n: int
    margin_passes: int
    neutral_passes: int

    def cell(self, row: str, column: str, edit: Edit = "ablate") -> TransferCell:
        """One of the cells, by name.

        Raises:
            ConfigError: There is no such cell.
        """
        for one in self.cells:
            if (one.row, one.column, one.edit) == (row, column, edit):
                return one
        raise ConfigError(
            f"the table has no cell of {row} in {column}, {edit}",
            f"rows: {', '.join(name for name, _ in self.rows)}; columns: {', '.join(self.columns)}",
        )


def transfer_passes(
    organisms: Mapping[str, Subject],
    twins: Mapping[str, Subject],
    *,
    rows: int,
    n_null: int,
    steer: bool = False,
) -> int:
    """How many margin passes `transfer` will take.

    Args:
        organisms: By name.
        twins: Of each organism that has one.
        rows: Directions, those of the library too.
        n_null: Random directions.
        steer: Whether directions are also taken away at equal KL.
    """
    edits = 2 if steer else 1
    trained = len(organisms) + len({id(one) for one in twins.values()})
    on_base = rows + (n_null if any(name not in twins for name in organisms) else 0)
    return trained * (1 + edits * (rows + n_null)) + 1 + edits * on_base


def transfer(
    directions: Mapping[str, Directions],
    organisms: Mapping[str, Subject],
    base: Model,
    items: Sequence[AdviceItem],
    *,
    within: AnswerPair,
    twins: Mapping[str, Subject] | None = None,
    library: Mapping[str, Directions] | None = None,
    how: How = "outputs",
    first: int = 0,
    n_null: int = 20,
    kl: float | None = None,
    neutral: Sequence[str] = (),
    seed: int,
    draws: int = _DRAWS,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> TransferTable:
    """Take every direction out of every organism, its good twin and the base.

    One model is held beside the base at a time.

    Args:
        directions: By the name of what they were found in: an organism, the `name` of a twin, or
            `BASE`. One each, or one for each site where `how` is "each".
        organisms: By name, trained on bad answers.
        base: What they stand on.
        items: Held out from training, and from whatever directions and sites were chosen on.
        within: What `read_pair` found on the base: the covariance of random directions.
        twins: The good twin of each organism that has one; organisms may share one.
        library: Directions of contrasts that have nothing to do with advice, by name.
        how: See `demur.em.effects.ablation`.
        first: Likewise.
        n_null: Random directions, which vary as answers do, drawn at the sites of the first row.
        kl: If given, directions are also taken away with a strength that costs so many nats per
            token of neutral text in the base. Only for one direction a row.
        neutral: Paragraphs for that.
        seed: Of random directions and of the draws of groups.
        draws: Of groups.
        batch_size: See `Bench`.
        progress: Called once per margin pass, see `transfer_passes`.

    Raises:
        ConfigError: A direction has the name of nothing that is known, two rows have one name, or
            `kl` is given without neutral text.
        TooFewPromptsError: The items are of fewer than two groups.
    """
    twins, library = dict(twins or {}), dict(library or {})
    rows = _rows(directions, organisms, twins, library)
    models = _models(base, organisms, twins)
    given = {**directions, **library}
    if kl is not None and not neutral:
        raise ConfigError(
            "a strength is wanted at equal KL, without neutral text", "give `neutral`"
        )
    random = list[Directions]()
    if n_null:
        found = random_directions(given[rows[0][0]], within, each=n_null, seed=seed)
        random = found["covariance-matched"]
    everything = {**given, **{f"random #{k}": one for k, one in enumerate(random, start=1)}}
    edits: dict[tuple[str, Edit], tuple[Intervention, ...]] = {
        (name, "ablate"): ablation(base, one, how, first=first) for name, one in everything.items()
    }
    bench: Bench | None = Bench(base, items, neutral=neutral, batch_size=batch_size)
    if kl is not None:
        for name, one in everything.items():
            if not isinstance(one, Direction):
                raise ConfigError(
                    f"row {name} has several directions, and no one strength is theirs",
                    "leave `kl` out, or give one direction a row",
                )
            edits[name, "take away"] = (Add(one, bench.dose(one, kl, sign=-1).strength),)
    alone = any(name not in twins for name in organisms)
    margins: dict[tuple[str, str, str], Float[np.ndarray, " item"]] = {}
    passes = neutral_passes = 0
    for label, subject in models.items():
        if bench is None:
            bench = Bench(put(subject, base), items, batch_size=batch_size)
        margins[label, "none", ""] = bench.margins()
        for (name, edit), acts in edits.items():
            if label == BASE and name not in given and not alone:
                continue
            margins[label, name, edit] = bench.margins(*acts)
            if progress is not None:
                progress(1)
        if progress is not None:
            progress(1)
        passes, neutral_passes = passes + bench.margin_runs, neutral_passes + bench.neutral_runs
        bench = None  # So that its model is gone before the next is made.
    return _table(
        rows,
        {name: _twin_of(name, twins) for name in organisms},
        margins,
        [(item.domain, item.group) for item in items],
        random=[name for name in everything if name not in given],
        edits=dict.fromkeys(edit for _, edit in edits),
        cosines=_cosines(given, rows, within, seed=seed),
        seed=seed,
        draws=draws,
        passes=(passes, neutral_passes),
    )


def _twin_of(organism: str, twins: Mapping[str, Subject]) -> str:
    return f"twin: {twins[organism].name}" if organism in twins else BASE


def _models(
    base: Model, organisms: Mapping[str, Subject], twins: Mapping[str, Subject]
) -> dict[str, Subject]:
    """Everything that is run, each model once."""
    models: dict[str, Subject] = {BASE: base}
    for name, subject in organisms.items():
        models[f"organism: {name}"] = subject
    for name, subject in twins.items():
        label = _twin_of(name, twins)
        if models.setdefault(label, subject) is not subject:
            raise ConfigError(
                f"two good twins are called {subject.name}", "read one of them under another name"
            )
    return models


def _rows(
    directions: Mapping[str, Directions],
    organisms: Mapping[str, Subject],
    twins: Mapping[str, Subject],
    library: Mapping[str, Directions],
) -> list[tuple[str, RowKind]]:
    if unknown := sorted(twins.keys() - organisms.keys()):
        raise ConfigError(f"{unknown[0]} has a twin and is no organism", "give the organism too")
    names = {subject.name for subject in twins.values()}
    rows: list[tuple[str, RowKind]] = []
    for name in directions:
        if name in organisms:
            rows.append((name, "organism"))
        elif name in names:
            rows.append((name, "twin"))
        elif name == BASE:
            rows.append((name, "base"))
        else:
            raise ConfigError(
                f"{name} is the name of no organism, of no twin, and not `{BASE}`",
                "give directions of anything else as `library`",
            )
    if not rows:
        raise ConfigError("there are no directions to take out", "give one or more")
    if both := sorted(library.keys() & directions.keys()):
        raise ConfigError(f"{both[0]} is a row and in the library", "rename one of them")
    return rows + [(name, "library") for name in library]


def _table(
    rows: Sequence[tuple[str, RowKind]],
    others: Mapping[str, str],
    margins: Mapping[tuple[str, str, str], Float[np.ndarray, " item"]],
    groups: Sequence[tuple[str, str]],
    *,
    random: Collection[str],
    edits: Collection[Edit],
    cosines: tuple[TransferCosine, ...],
    seed: int,
    draws: int,
    passes: tuple[int, int],
) -> TransferTable:
    def estimate(values: Float[np.ndarray, " item"]) -> Estimate:
        return grouped_mean(values, groups, seed=seed, draws=draws)

    def change(label: str, name: str, edit: Edit) -> Float[np.ndarray, " item"]:
        return margin_shift(margins[label, name, edit], margins[label, "none", ""])

    cells: list[TransferCell] = []
    bands: list[TransferBand] = []
    trained: dict[str, Estimate] = {}
    for column, other in others.items():
        own = f"organism: {column}"
        effect = margin_shift(margins[own, "none", ""], margins[other, "none", ""])
        trained[column] = whole = estimate(effect)
        zero = whole.low <= 0.0 <= whole.high
        for edit in edits:
            null = [
                float((change(own, name, edit) - change(other, name, edit)).mean())
                for name in random
            ]
            for name, kind in rows:
                here, there = change(own, name, edit), change(other, name, edit)
                beyond = here - there
                removed, undefined = share_removed(
                    effect, effect + beyond, groups, seed=seed, draws=draws
                )
                cells.append(
                    TransferCell(
                        row=name,
                        kind=kind,
                        column=column,
                        edit=edit,
                        own=name == column,
                        against=other.removeprefix("twin: "),
                        change=estimate(beyond),
                        in_organism=estimate(here),
                        in_other=estimate(there),
                        in_base=estimate(change(BASE, name, edit)),
                        removed=removed,
                        undefined=undefined,
                        # Taking out what training put there undoes it, whichever way it went.
                        p=_p(float(beyond.mean()), null, float(effect.mean())),
                    )
                )
            if null:
                low, high = (float(q) for q in np.quantile(null, (0.025, 0.975)))
                shares = None if zero else -np.asarray(null) / float(effect.mean())
                ends = None if shares is None else np.quantile(shares, (0.025, 0.975))
                bands.append(
                    TransferBand(
                        column=column,
                        edit=edit,
                        n=len(null),
                        changes=tuple(null),
                        mean=float(np.mean(null)),
                        low=low,
                        high=high,
                        removed_mean=None if shares is None else float(shares.mean()),
                        removed_low=None if ends is None else float(ends[0]),
                        removed_high=None if ends is None else float(ends[1]),
                    )
                )
    return TransferTable(
        rows=tuple(rows),
        columns=tuple(others),
        against={column: other.removeprefix("twin: ") for column, other in others.items()},
        trained=trained,
        cells=tuple(cells),
        bands=tuple(bands),
        cosines=cosines,
        n=len(groups),
        margin_passes=passes[0],
        neutral_passes=passes[1],
    )


def _p(value: float, null: Sequence[float], effect: float) -> float | None:
    if not null:
        return None
    return null_p(value, null, side="low" if effect >= 0 else "high")


def _cosines(
    given: Mapping[str, Directions],
    rows: Sequence[tuple[str, RowKind]],
    within: AnswerPair,
    *,
    seed: int,
) -> tuple[TransferCosine, ...]:
    """Each two rows at each site that both have and the base was read at."""
    several: dict[str, Mapping[Site, Direction]] = {}
    for name, _ in rows:
        one = given[name]
        several[name] = {one.site: one} if isinstance(one, Direction) else one
    null: dict[tuple[str, Site], Float[np.ndarray, " draw"]] = {}
    out: list[TransferCosine] = []
    names = [name for name, _ in rows]
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            for site, one in several[first].items():
                if site not in several[second] or site not in within.bad.sites:
                    continue
                value = one.cosine(several[second][site])
                for name in (first, second):
                    if (name, site) not in null:
                        unit = several[name][site].unit
                        null[name, site] = null_cosines(unit, within.spread(site), seed=seed)
                chance = [null[first, site], null[second, site]]
                ends = np.array([np.quantile(one, (0.025, 0.975)) for one in chance])
                out.append(
                    TransferCosine(
                        first,
                        second,
                        site,
                        value,
                        float(ends[:, 0].min()),
                        float(ends[:, 1].max()),
                        min(float((np.abs(one) < abs(value)).mean()) for one in chance),
                    )
                )
    return tuple(out)

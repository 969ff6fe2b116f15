"""The stages of the experiment, each a function of beds and sets, so that each can be kept.

Split A ranks and chooses the primary set, split B finds backups and confirms the upstream set,
split C measures effects, curves, gates and controls. No stage reads a split that chose its sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from demur.causal import stable_seed
from demur.errors import ConfigError, TooFewPromptsError
from demur.hydra.bed import Bed, Record
from demur.hydra.rows import (
    BackupRow,
    CellRow,
    ControlRow,
    CurveRow,
    EffectsRow,
    InteractionRow,
    PrimaryRow,
    StarveRow,
    UpstreamRow,
)
from demur.hydra.units import ABLATIONS, Edit, Op, OpKind, Units, matched, run_arm
from demur.stats import Estimate, bootstrap, mean, null_p, paired_change

_DRAWS = 1000
_FLIPS = 2000
_FIRES = 0.1  # Of a unit's scale.


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes and limits of the experiment.

    Attributes:
        delta: Nats of refusal log-odds that a unit must take off alone to be a candidate of the
            primary set, and that it must bring to the set.
        most: Units of the primary set.
        screened: Candidates that are really ablated, of those with the largest differences.
        tried: Best of these that the forward selection tries at each step.
        from_depth: The primary set lies in blocks from this share of the depth on, so that there
            is something upstream.
        rise: Least median rise of a backup, in units of its scale.
        alpha: Level of the tests.
        draws: Matched random ablations behind the nulls of backups.
        control_draws: The same of controls and of what is given back; at most `draws`.
        most_upstream: Units of the upstream set.
        upstream_tried: Candidates of it that are really ablated.
        gammas: Sizes of injections.
        kind: How units are ablated.
        least_repair: Share of the direct effect from which on giving back counts as repair.
        seed: Of everything that is drawn.
    """

    delta: float = 0.25
    most: int = 4
    screened: int = 20
    tried: int = 8
    from_depth: float = 1 / 3
    rise: float = 0.25
    alpha: float = 0.05
    draws: int = 50
    control_draws: int = 20
    most_upstream: int = 5
    upstream_tried: int = 12
    gammas: tuple[float, ...] = (0.5, 1.0, 2.0)
    kind: OpKind = "mean"
    least_repair: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ABLATIONS:
            raise ConfigError(f"`{self.kind}` is no ablation", f"give {' or '.join(ABLATIONS)}")
        if self.draws < 2 or self.most < 1 or self.screened < 1 or not self.gammas:
            raise ConfigError(
                "there are no draws, units or injections", "give two draws and one unit or more"
            )

    @property
    def op(self) -> Op:
        """The ablation."""
        return Op(self.kind, seed=self.seed)

    @property
    def c_draws(self) -> int:
        """Draws of nulls on split C."""
        return min(self.draws, self.control_draws)


# Statistics --------------------------------------------------------------------------------------


def ratio(
    above: Float[np.ndarray, " prompt"], below: Float[np.ndarray, " prompt"], *, seed: int
) -> tuple[Estimate | None, str]:
    """Ratio of two means over the same prompts, with a paired bootstrap interval.

    Returns:
        None and the reason if the denominator's interval reaches 0 or its sign is negative.
    """
    base = mean(below)
    if base.low <= 0:
        return (
            None,
            f"the denominator, {base.value:.3g} [{base.low:.3g}, {base.high:.3g}] nats, is"
            " not clear of zero",
        )

    def statistic(index: np.ndarray) -> float:
        under = float(below[index].mean())
        return float(above[index].mean()) / under if under > 0 else float("nan")

    try:
        return bootstrap(statistic, len(below), draws=_DRAWS, seed=seed), ""
    except TooFewPromptsError as error:
        return None, error.fact


def flips_p(values: Float[np.ndarray, " prompt"], *, seed: int) -> float:
    """Two-sided p that paired values are symmetric about 0, by flipping signs at random."""
    rng = np.random.default_rng(seed)
    signs = rng.choice((-1.0, 1.0), size=(_FLIPS, len(values)))
    drawn = np.abs(signs @ values)
    return float((np.sum(drawn >= abs(values.sum()) * (1 - 1e-12)) + 1) / (_FLIPS + 1))


def adjusted(ps: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's q values, in the order given."""
    from statsmodels.stats.multitest import multipletests

    if not len(ps):
        return []
    result: Any = multipletests(list(ps), method="fdr_bh")
    return [float(q) for q in result[1]]


def rises_p(change: Float[np.ndarray, " prompt"]) -> float:
    """One-sided p of Wilcoxon's signed-rank test that a change is not above 0."""
    from scipy import stats

    moved = change[change != 0]
    if not len(moved):
        return 1.0
    result: Any = stats.wilcoxon(moved, alternative="greater")
    return float(result.pvalue)


def _spread(d: Float[np.ndarray, "unit prompt"]) -> Float[np.ndarray, " unit"]:
    return np.median(d, axis=1)


# (i) The primary set -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Primary:
    """Units that refusal hangs on.

    Attributes:
        ids: In the order in which they were chosen; empty if none brings `delta`.
        rows: Of all candidates that were ablated.
    """

    ids: tuple[int, ...]
    rows: tuple[PrimaryRow, ...]


def primary_set(
    units: Units,
    harmful: Bed,
    harmless: Bed,
    *,
    settings: Settings,
    candidates: Sequence[int] | None = None,
) -> Primary:
    """Choose a primary set on split A: ablate candidates one by one, then add the best, then prune.

    Args:
        units: All of them.
        harmful: Prompts of split A.
        harmless: Likewise.
        settings: Limits.
        candidates: Units to try; None are those that differ most between the classes, in
            residual-stream units.
    """
    clean = harmful.clean(units)
    gap = clean.mean_activity.mean(1) - harmless.clean(units).mean_activity.mean(1)
    if candidates is None:
        first = settings.from_depth * harmful.model.n_layers
        able = [i for i, layer in enumerate(units.layers) if layer >= first and gap[i] > 0]
        weight = gap * units.reference.length
        able.sort(key=lambda i: -weight[i])
        candidates = able[: settings.screened]

    def drop(ids: Sequence[int]) -> np.ndarray:
        return clean.margin - run_arm(units, harmful, (ids, settings.op)).margin

    alone = {one: drop([one]) for one in candidates}
    # A dormant backup would join a set whose loss it makes good: each member must matter alone.
    able = [one for one, drops in alone.items() if _matters(drops, settings)]
    best = sorted(able, key=lambda one: -alone[one].mean())[: settings.tried]
    chosen: list[int] = []
    reached = 0.0
    while len(chosen) < settings.most:
        tries = {
            one: float((alone[one] if not chosen else drop([*chosen, one])).mean())
            for one in best
            if one not in chosen
        }
        if not tries:
            break
        pick = max(tries, key=lambda one: tries[one])
        if tries[pick] - reached < settings.delta:
            break
        chosen.append(pick)
        reached = tries[pick]
    for one in list(chosen):
        rest = [other for other in chosen if other != one]
        if rest and reached - float(drop(rest).mean()) < settings.delta:
            chosen = rest
            reached = float(drop(rest).mean())
    rows = tuple(
        PrimaryRow(
            units.names[one], units.layers[one], float(gap[one]), mean(alone[one]), one in chosen
        )
        for one in sorted(alone, key=lambda one: -alone[one].mean())
    )
    return Primary(tuple(chosen), rows)


def _matters(drops: Float[np.ndarray, " prompt"], settings: Settings) -> bool:
    found = mean(drops)
    return found.value >= settings.delta and found.low > 0


# (ii) Backups ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Backups:
    """Later units that rise as the primary set is ablated.

    Attributes:
        ids: Backups, the largest rise first.
        generic: Units that rise, but no more than under matched random ablations.
        rows: Of all later units.
        null_counts: By random ablation: how many later units rise by the least rise or more.
    """

    ids: tuple[int, ...]
    generic: tuple[int, ...]
    rows: tuple[BackupRow, ...]
    null_counts: tuple[int, ...]


def later_than(units: Units, ids: Sequence[int]) -> list[int]:
    """Units in strictly later blocks than the first of a set, the set left out."""
    first = min(units.layers[one] for one in ids)
    return [i for i, layer in enumerate(units.layers) if layer > first and i not in set(ids)]


def _rises(
    units: Units, bed: Bed, edits: Sequence[Edit], *, norms: bool = False
) -> tuple[np.ndarray, Record]:
    record = run_arm(units, bed, *edits, frozen_norms=norms, read=True)
    change = record.mean_activity - bed.clean(units).mean_activity
    return change / units.reference.scale[:, None], record


def find_backups(
    units: Units, harmful: Bed, primary: Sequence[int], *, settings: Settings
) -> Backups:
    """Find backups on split B."""
    later = later_than(units, primary)
    if not later:
        return Backups((), (), (), ())
    op = settings.op
    d, _ = _rises(units, harmful, [(primary, op)])
    frozen, _ = _rises(units, harmful, [(primary, op)], norms=True)
    nulls = np.empty((settings.draws, len(later)))
    for draw in range(settings.draws):
        edits = matched(units, primary, op, seed=stable_seed(settings.seed, f"backup {draw}"))
        own = {one for ids, turned in edits if turned.spin is None for one in ids}
        medians = _spread(_rises(units, harmful, edits)[0])[later]
        # A unit that is itself ablated says nothing of rising.
        nulls[draw] = [-np.inf if i in own else m for i, m in zip(later, medians, strict=True)]
    limits = np.array(
        [np.quantile(c[np.isfinite(c)], 0.99) if np.isfinite(c).any() else 0.0 for c in nulls.T]
    )
    ps = [rises_p(d[i]) for i in later]
    qs = adjusted(ps)
    medians, without = _spread(d), _spread(frozen)
    activity = harmful.clean(units).mean_activity
    fires = (activity > _FIRES * units.reference.scale[:, None]).mean(1)
    rows: list[BackupRow] = []
    ids: list[int] = []
    generic: list[int] = []
    for i, p, q, limit in zip(later, ps, qs, limits, strict=True):
        rose = bool(q <= settings.alpha and medians[i] >= settings.rise)
        above = bool(medians[i] > limit)
        if rose:
            (ids if above else generic).append(i)
        rows.append(
            BackupRow(
                units.names[i],
                units.layers[i],
                float(medians[i]),
                p,
                q,
                float(limit),
                float(without[i]),
                float(fires[i]),
                bool(fires[i] <= 0.1),
                rose and above,
                rose and not above,
            )
        )
    ids.sort(key=lambda i: -medians[i])
    counts = tuple(int(n) for n in (nulls >= settings.rise).sum(1))
    return Backups(tuple(ids), tuple(generic), tuple(rows), counts)


# Mediation ---------------------------------------------------------------------------------------


def mediation(
    units: Units,
    harmful: Bed,
    primary: Sequence[int],
    backups: Sequence[int],
    *,
    settings: Settings,
) -> EffectsRow:
    """Split the effect of the primary set on split C into direct effect, repair and norms."""
    op, seed = settings.op, settings.seed
    clean = harmful.clean(units)
    after = min(units.orders[one] for one in primary)
    do: Edit = (tuple(primary), op)

    def drop(*edits: Edit, writes: bool = False, norms: bool = False) -> np.ndarray:
        record = run_arm(
            units,
            harmful,
            *edits,
            frozen_after=after if writes else None,
            frozen_norms=norms,
        )
        return clean.margin - record.margin

    total, direct = drop(do), drop(do, writes=True, norms=True)
    live, still = drop(do, writes=True), drop(do, norms=True)
    undefined: dict[str, str] = {}

    def share(name: str, above: np.ndarray, below: np.ndarray) -> Estimate | None:
        found, why = ratio(above, below, seed=stable_seed(seed, name))
        if found is None:
            undefined[name] = why
        return found

    repair = share("self_repair", direct - total, direct)
    repair_norms = share("self_repair_norms", direct - still, direct)
    share_norms = share("share_norms", still - total, direct - total)
    missing = np.empty(settings.c_draws)
    for draw in range(settings.c_draws):
        edits = matched(units, primary, op, seed=stable_seed(seed, f"repair {draw}"))
        gives = drop(*edits, writes=True, norms=True) - drop(*edits)
        missing[draw] = gives.mean()
    repair_p = null_p(float((direct - total).mean()), missing, side="high")
    held = joint = None
    held_p = joint_p = None
    share_backups = alone = None
    if backups:
        hold = Op("hold", record=clean)
        held, joint = drop(do, (backups, hold)), drop(do, (backups, op))
        alone = mean(drop((backups, op)))
        share_backups = share("share_backups", held - total, direct - total)
        nulls = np.empty((2, settings.draws))
        for draw in range(settings.draws):
            turn = stable_seed(seed, f"others {draw}")
            others = _others(units, backups, [*primary, *backups], turn)
            both = matched(units, backups, op, seed=turn) if others is None else ((others, op),)
            kept: tuple[Edit, ...] = (
                matched(units, backups, hold, seed=turn) if others is None else ((others, hold),)
            )
            nulls[0, draw] = (drop(do, *kept) - total).mean()
            nulls[1, draw] = (drop(do, *both) - total).mean()
        held_p = null_p(float((held - total).mean()), nulls[0], side="high")
        joint_p = null_p(float((joint - total).mean()), nulls[1], side="high")
    return EffectsRow(
        mean(total),
        mean(direct),
        mean(live),
        mean(still),
        repair,
        repair_norms,
        paired_change(total, still),
        share_norms,
        None if held is None else mean(held),
        None if held is None else paired_change(total, held),
        held_p,
        share_backups,
        None if joint is None else mean(joint),
        None if joint is None else paired_change(total, joint),
        joint_p,
        alone,
        repair_p,
        undefined,
    )


def _others(
    units: Units, ids: Sequence[int], without: Sequence[int], seed: int
) -> tuple[int, ...] | None:
    """As many other units, of the same sub-block and near blocks; None if there are too few."""
    rng = np.random.default_rng(seed)
    taken = set(without)
    out: list[int] = []
    for one in ids:
        near = sorted(
            (
                i
                for i, order in enumerate(units.orders)
                if i not in taken and order % 2 == units.orders[one] % 2
            ),
            key=lambda i: abs(units.layers[i] - units.layers[one]),
        )[:6]
        if not near:
            return None
        pick = int(rng.choice(near))
        taken.add(pick)
        out.append(pick)
    return tuple(out)


# (iii) The upstream set --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Upstream:
    """Units below the primary set that it hangs on.

    Attributes:
        ids: The strongest first.
        rows: Of all that were tried.
    """

    ids: tuple[int, ...]
    rows: tuple[UpstreamRow, ...]


def upstream_set(
    units: Units,
    harmful_a: Bed,
    harmless_a: Bed,
    harmful_b: Bed,
    primary: Sequence[int],
    *,
    settings: Settings,
) -> Upstream:
    """Choose units that tell harm at the last instruction token and feed the primary set."""
    first = min(units.layers[one] for one in primary)
    below = [i for i, layer in enumerate(units.layers) if layer < first]
    if not below:
        return Upstream((), ())
    pos = harmful_a.clean(units).activity
    neg = harmless_a.clean(units).activity
    assert pos is not None
    assert neg is not None
    a, b = pos[:, :, 0].double().numpy(), neg[:, :, 0].double().numpy()
    pooled = np.sqrt((a.var(1, ddof=1) + b.var(1, ddof=1)) / 2)
    cohen = (a.mean(1) - b.mean(1)) / np.maximum(pooled, 1e-12)
    telling = sorted((i for i in below if abs(cohen[i]) > 0.5), key=lambda i: -abs(cohen[i]))
    tried = telling[: settings.upstream_tried]
    scale = units.reference.scale[list(primary), None]
    falls: dict[int, np.ndarray] = {}
    for one in tried:
        record = run_arm(units, harmful_b, ((one,), settings.op), read=True)
        change = harmful_b.clean(units).mean_activity - record.mean_activity
        falls[one] = (change[list(primary)] / scale).sum(0)
    qs = dict(zip(tried, adjusted([rises_p(falls[one]) for one in tried]), strict=True))
    able = [one for one in tried if qs[one] <= settings.alpha and falls[one].mean() > 0]
    able.sort(key=lambda one: -falls[one].mean())
    kept = tuple(able[: settings.most_upstream])
    rows = tuple(
        UpstreamRow(
            units.names[one],
            units.layers[one],
            float(cohen[one]),
            mean(falls[one]),
            qs[one],
            one in kept,
        )
        for one in tried
    )
    return Upstream(kept, rows)


def starve(
    units: Units,
    harmful: Bed,
    upstream: Sequence[int],
    primary: Sequence[int],
    backups: Sequence[int],
    *,
    settings: Settings,
    random: int = 3,
) -> StarveRow:
    """Ablate more and more of the upstream and of the downstream set, on split C."""
    clean = harmful.clean(units).margin
    downstream = [*primary, *backups][: max(len(upstream), len(primary), settings.most_upstream)]
    points: list[CurveRow] = []
    curves: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for which, ids in (("upstream", list(upstream)), ("downstream", downstream)):
        drops, mass, moved = [np.zeros(harmful.n)], [0.0], [0.0]
        for k in range(1, len(ids) + 1):
            record = run_arm(units, harmful, (ids[:k], settings.op))
            drops.append(clean - record.margin)
            mass.append(float(units.reference.mass[ids[:k]].sum()))
            moved.append(float(record.moved.mean()))
            points.append(CurveRow(_which(which), k, mass[-1], moved[-1], mean(drops[-1])))
        curves[which] = np.stack(drops), np.array(mass), np.maximum.accumulate(moved)
        found = []
        for draw in range(random if ids else 0):
            turn = stable_seed(settings.seed, f"starve {which} {draw}")
            edits = matched(units, ids, settings.op, seed=turn)
            record = run_arm(units, harmful, *edits)
            found.append((clean - record.margin, float(record.moved.mean()), edits))
        if found:
            masses = [
                sum(float(units.reference.mass[list(one)].sum()) for one, _ in edits)
                for _, _, edits in found
            ]
            points.append(
                CurveRow(
                    _which(f"random {which}"),
                    len(ids),
                    float(np.mean(masses)),
                    float(np.mean([moved for _, moved, _ in found])),
                    mean(np.mean([drops for drops, _, _ in found], axis=0)),
                )
            )
    up, down = curves["upstream"], curves["downstream"]
    if not len(upstream) or not len(primary):
        return StarveRow(tuple(points), None, None, None, "one of the sets is empty")
    k = min(len(up[0]), len(down[0])) - 1
    by_count = mean(up[0][k] - down[0][k])
    by: list[Estimate | None] = []
    for axis in (1, 2):
        at = min(float(up[axis][-1]), float(down[axis][-1]))
        by.append(mean(_at(up[0], up[axis], at) - _at(down[0], down[axis], at)) if at > 0 else None)
    why = "" if all(by) else "a set moves nothing"
    return StarveRow(tuple(points), by_count, by[0], by[1], why)


def _which(
    name: str,
) -> Literal["upstream", "downstream", "random upstream", "random downstream"]:
    assert name in ("upstream", "downstream", "random upstream", "random downstream")
    return name


def _at(
    drops: Float[np.ndarray, "point prompt"], x: Float[np.ndarray, " point"], at: float
) -> Float[np.ndarray, " prompt"]:
    """Each prompt's curve, linear between points, where it reaches `at`."""
    high = int(np.searchsorted(x, at * (1 - 1e-9)))
    high = min(max(high, 1), len(x) - 1)
    low = high - 1
    step = x[high] - x[low]
    share = (at - x[low]) / step if step > 0 else 1.0
    return drops[low] + share * (drops[high] - drops[low])


# (iv) The gate -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gate:
    """The 2 x 2 and its interactions."""

    cells: tuple[CellRow, ...]
    interactions: tuple[InteractionRow, ...]


@dataclass(frozen=True, slots=True)
class _Half:
    """What ablating the primary set does under one state of the upstream set.

    Attributes:
        rise: Change of the backups' mean activity, by prompt.
        loss: Change of the margin.
        gives: What backups give to the margin.
    """

    rise: Float[np.ndarray, " prompt"] | None
    loss: Float[np.ndarray, " prompt"]
    gives: Float[np.ndarray, " prompt"] | None


def gate(
    units: Units,
    harmful: Bed,
    harmless: Bed,
    *,
    upstream: Sequence[int],
    primary: Sequence[int],
    backups: Sequence[int],
    settings: Settings,
) -> Gate:
    """Ablate the primary set with and without harm in the upstream set, on split C."""
    cells: list[CellRow] = []
    do: Edit = (tuple(primary), settings.op)
    scale = units.reference.scale[list(backups), None]

    def stood(record: Record) -> np.ndarray | None:
        return (record.mean_activity[list(backups)] / scale).mean(0) if backups else None

    def half(
        bed: Bed,
        on: Literal["harmless", "harmful"],
        name: Literal["natural", "injected", "ablated"],
        gamma: float,
        edits: tuple[Edit, ...],
    ) -> _Half:
        if edits:
            intact = run_arm(units, bed, *edits, read=True, outputs=bool(backups))
        else:
            intact = bed.clean(units)
        without = run_arm(units, bed, *edits, do, read=True)
        held = None
        if backups:
            hold: Edit = (tuple(backups), Op("hold", record=intact))
            held = run_arm(units, bed, *edits, do, hold).margin
        first, second = stood(intact), stood(without)
        for primary_is, record, active, margin in (
            ("intact", intact, first, None),
            ("ablated", without, second, held),
        ):
            cells.append(
                CellRow(
                    on,
                    name,
                    gamma,
                    "intact" if primary_is == "intact" else "ablated",
                    None if active is None else mean(active),
                    mean(record.margin),
                    None if margin is None else mean(margin),
                )
            )
        return _Half(
            None if first is None or second is None else second - first,
            without.margin - intact.margin,
            None if held is None else without.margin - held,
        )

    interactions: list[InteractionRow] = []

    def compare(on: Literal["harmless", "harmful"], gamma: float, more: _Half, less: _Half) -> None:
        def tested(
            a: np.ndarray | None, b: np.ndarray | None, name: str
        ) -> tuple[Estimate | None, float | None]:
            if a is None or b is None:
                return None, None
            change = a - b
            turn = stable_seed(settings.seed, f"{on} {gamma} {name}")
            found = bootstrap(lambda i: float(change[i].mean()), len(change), seed=turn)
            return found, flips_p(change, seed=turn)

        margin, margin_p = tested(more.loss, less.loss, "margin")
        assert margin is not None
        assert margin_p is not None
        interactions.append(
            InteractionRow(
                on,
                gamma,
                *tested(more.rise, less.rise, "activity"),
                *tested(more.gives, less.gives, "repair"),
                margin,
                margin_p,
            )
        )

    base = half(harmless, "harmless", "natural", 0.0, ())
    for gamma in settings.gammas:
        put: Edit = (tuple(upstream), Op("inject", gamma=gamma))
        compare("harmless", gamma, half(harmless, "harmless", "injected", gamma, (put,)), base)
    natural = half(harmful, "harmful", "natural", 0.0, ())
    out: Edit = (tuple(upstream), settings.op)
    compare("harmful", 0.0, natural, half(harmful, "harmful", "ablated", 0.0, (out,)))
    return Gate(tuple(cells), tuple(interactions))


# (v) Controls ------------------------------------------------------------------------------------


def count_rises(
    units: Units, bed: Bed, edits: Sequence[Edit], later: Sequence[int], settings: Settings
) -> int:
    """How many later units rise by the least rise or more, in the median over prompts."""
    medians = _spread(_rises(units, bed, edits)[0])
    return int((medians[list(later)] >= settings.rise).sum())


def controls(
    units: Units,
    harmful_b: Bed,
    harmful_c: Bed,
    *,
    primary: Sequence[int],
    backups: Backups,
    settings: Settings,
) -> tuple[ControlRow, ...]:
    """Ablate other things than the primary set: drops on split C, rises on split B."""
    later = later_than(units, primary)
    n = settings.c_draws
    rows: list[ControlRow] = []

    def drops(many: Sequence[Sequence[Edit]], over: Units = units) -> list[float]:
        own = harmful_c.clean(over).margin
        return [float((own - run_arm(over, harmful_c, *edits).margin).mean()) for edits in many]

    def add(name: str, found: list[float], rises: float | None, note: str = "") -> None:
        rows.append(ControlRow(name, len(found), float(np.mean(found)), max(found), rises, note))

    sets = [
        matched(units, primary, settings.op, seed=stable_seed(settings.seed, f"set {draw}"))
        for draw in range(n)
    ]
    spun = sum(turned.spin is not None for edits in sets for _, turned in edits)
    note = "" if not spun else "units without a peer: random directions, as far"
    rises = float(np.mean(backups.null_counts)) if backups.null_counts else None
    add("matched random units", drops(sets), rises, note)
    for spread in ("covariance", "isotropic"):
        turned = [
            (
                (
                    tuple(primary),
                    replace(
                        settings.op,
                        spin=stable_seed(settings.seed, f"{spread} {draw}"),
                        spread=spread,
                    ),
                ),
            )
            for draw in range(n)
        ]
        add(f"random directions ({spread}), as far", drops(turned), None)
    for kind in ABLATIONS:
        edits = ((tuple(primary), Op(kind, seed=settings.seed)),)
        count = float(count_rises(units, harmful_b, edits, later, settings))
        add(f"primary set ablated to {kind}", drops([edits]), count)
    turn = stable_seed(settings.seed, "labels")
    other = units.shuffled(turn)
    ids = tuple(primary) if other is not units else _of_shuffled_labels(units, primary, turn)
    found = drops([((ids, settings.op),)], other)
    count = float(count_rises(other, harmful_b, [(ids, settings.op)], later, settings))
    note = "" if other is not units else f"ablated: {', '.join(units.names[i] for i in ids)}"
    add("as many units of shuffled labels", found, count, note)
    return tuple(rows)


def _of_shuffled_labels(units: Units, primary: Sequence[int], seed: int) -> tuple[int, ...]:
    """As many units as in the primary set, from its blocks on, by differences of no meaning."""
    held = [record.mean_activity for record in (units.reference.harmful, units.reference.harmless)]
    rng = np.random.default_rng(seed)
    halves = [one[:, rng.permutation(one.shape[1])] for one in held]
    cut = [one.shape[1] // 2 for one in halves]
    first = np.concatenate([one[:, :n] for one, n in zip(halves, cut, strict=True)], axis=1)
    second = np.concatenate([one[:, n:] for one, n in zip(halves, cut, strict=True)], axis=1)
    gap = (first.mean(1) - second.mean(1)) * units.reference.length
    start = min(units.layers[i] for i in primary)
    able = sorted((i for i, at in enumerate(units.layers) if at >= start), key=lambda i: -gap[i])
    return tuple(able[: len(primary)])


def other_behaviour(
    units: Units,
    harmless_a: Bed,
    harmless_b: Bed,
    *,
    primary: Sequence[int],
    settings: Settings,
) -> ControlRow:
    """Ablate as many units for another behaviour, and count what rises.

    The behaviour is to begin the reply to a harmless prompt as the unedited model does; its outcome
    is the log-odds of that token. Units are those whose ablation takes most off it on split A;
    drops and rises are those of split B.
    """
    harmless_a, harmless_b = harmless_a.of_first_tokens(), harmless_b.of_first_tokens()
    clean = harmless_a.clean(units).margin
    mass = units.reference.mass
    first = settings.from_depth * harmless_a.model.n_layers
    able = sorted((i for i, at in enumerate(units.layers) if at >= first), key=lambda i: -mass[i])
    tried = able[: settings.tried]
    effects = {
        one: float((clean - run_arm(units, harmless_a, ((one,), settings.op)).margin).mean())
        for one in tried
    }
    chosen = sorted(effects, key=lambda one: -effects[one])[: len(primary)]
    edits: list[Edit] = [(tuple(chosen), settings.op)]
    record = run_arm(units, harmless_b, *edits, read=True)
    drop = float((harmless_b.clean(units).margin - record.margin).mean())
    later = later_than(units, chosen)
    count = count_rises(units, harmless_b, edits, later, settings) if later else 0
    shared = len(set(chosen) & set(primary))
    return ControlRow(
        "another behaviour: the first token of replies to harmless prompts",
        1,
        drop,
        drop,
        float(count),
        f"ablated: {', '.join(units.names[i] for i in chosen)}; {shared} also in the primary set",
    )

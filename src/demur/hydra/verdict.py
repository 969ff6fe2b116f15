"""From the figures to one word, by rules that were written down first."""

from __future__ import annotations

from collections.abc import Sequence

from demur.hydra.rows import (
    BackupRow,
    EffectsRow,
    InteractionRow,
    PrimaryRow,
    StarveRow,
    VerdictName,
)
from demur.hydra.stages import Settings
from demur.stats import Estimate, holm

# Of a sum of two normal quantiles: what has a power of 80% at a two-sided level of 5%.
_POWER = 1.96 + 0.84


def verdict(
    effects: EffectsRow | None,
    backups: Sequence[BackupRow],
    starve: StarveRow | None,
    interactions: Sequence[InteractionRow],
    settings: Settings,
    *,
    gap: Estimate | None = None,
    primary: Sequence[PrimaryRow] = (),
) -> tuple[VerdictName, str]:
    """Say what kind of repair there is.

    The first rule that holds decides. "Clear" means that a 95% interval over prompts of split C
    lies on one side of 0.

    1. "undetermined": refusal log-odds do not clearly tell harmful from harmless prompts (`gap`);
       or there is no primary set, yet the interval of some candidate reaches `delta` without being
       clear; or the total effect is not clear, and its interval reaches `delta`. The smallest
       effect that so many prompts could have shown is named. "none": else, if no unit takes `delta`
       off alone, or the total effect is below `delta`.
    2. Backups are *specific* if split B found some (they rise by the least rise, q at most `alpha`,
       above their own matched-random ablations), at least one of which keeps half of its rise with
       norms frozen, and holding them at clean values clearly deepens the drop (`by_backups` above
       0), by more than random units held do (p at most `alpha`). Where nulls have too few draws to
       reach `alpha`, 1 / (draws + 1) is enough.
       a. "conditional gate": specific backups, and for some size of injection, or on harmful
          prompts, both interactions, that of their activity and that of what they give to the
          margin, are clear, above 0, and have p at most `alpha` after Holm's correction over the
          rows of the table; and they stand on harmless prompts, injected.
       b. "specific repair": specific backups, and no such interaction.
    3. "generic repair": the model gives back at least `least_repair` of the direct effect, clearly,
       or norms clearly give back as large a share of what would be lost with norms frozen, or later
       units rise, but no more than under matched-random ablations or only through the norms while
       the direct effect is clearly larger than the total one.
    4. "additive": the drop by the upstream set is clear and that of the primary set is, and nothing
       above holds: both matter, and nothing stands in.
    5. "none": the primary set matters, nothing stands in for it, and nothing upstream is known to
       feed refusal.

    Returns:
        The verdict, and in words what it rests on.
    """
    if effects is None or (gap is not None and gap.low <= 0):
        return _nothing(gap, primary, settings)
    total = effects.total
    if (found := _too_small(total, settings)) is not None:
        return found
    if _specific(effects, backups, settings):
        return _repaired(effects, backups, interactions, settings)
    if generic := _generic(effects, backups, settings):
        return "generic repair", generic
    if _upstream(starve):
        return "additive", (
            f"upstream and primary set both matter ({total.value:.2g} nats for the latter), and "
            f"nothing stands in for what is ablated{_added(effects)}"
        )
    return "none", (
        f"the primary set matters ({total.value:.2g} nats); nothing stands in for it, and no unit "
        f"upstream is known to feed refusal{_added(effects)}"
    )


def _added(effects: EffectsRow) -> str:
    repair = effects.self_repair
    if repair is None or repair.high >= 0:
        return ""
    gives = effects.total.value - effects.direct.value
    return f"; later parts add {gives:.2g} nats to its direct effect rather than give back"


def _nothing(
    gap: Estimate | None, primary: Sequence[PrimaryRow], settings: Settings
) -> tuple[VerdictName, str]:
    if gap is not None and gap.low <= 0:
        return "undetermined", (
            f"refusal log-odds of harmful prompts are not clearly above those of harmless ones: "
            f"{_value(gap)} nats; there is no refusal to take apart"
        )
    unclear = [one for one in primary if one.alone.low <= 0 and one.alone.high >= settings.delta]
    if unclear:
        best = max(unclear, key=lambda one: one.alone.value)
        return "undetermined", (
            f"no unit clearly takes {settings.delta:g} nats off alone; {best.name} takes "
            f"{_value(best.alone)}, and so many prompts would show {_shown(best.alone)} nats in "
            "four of five experiments"
        )
    return "none", f"no unit takes {settings.delta:g} nats off the refusal log-odds alone"


def _shown(one: Estimate) -> str:
    return f"{(one.high - one.low) / 2 * _POWER / 1.96:.2g}"


def _too_small(total: Estimate, settings: Settings) -> tuple[VerdictName, str] | None:
    if total.low <= 0 and total.high >= settings.delta:
        return "undetermined", (
            f"the total effect, {_value(total)} nats, is not clear of zero; {total.n} prompts "
            f"would show {_shown(total)} nats in four of five experiments"
        )
    if total.low <= 0 or total.value < settings.delta:
        return (
            "none",
            f"ablating the primary set takes {_value(total)} nats off, below {settings.delta:g}",
        )
    return None


def _repaired(
    effects: EffectsRow,
    backups: Sequence[BackupRow],
    interactions: Sequence[InteractionRow],
    settings: Settings,
) -> tuple[VerdictName, str]:
    held = effects.by_backups
    assert held is not None
    backing = [row.name for row in backups if row.backup]
    named = f"{', '.join(backing)} {'stands' if len(backing) == 1 else 'stand'} in"
    holding = f"holding what stands in takes {held.value:.2g} nats more off"
    found = _gates(interactions, settings)
    if found is None:
        return "specific repair", (
            f"{named}: {holding}; that they do so only while harm is seen was not shown"
        )
    return "conditional gate", (
        f"{named} while harm is seen: {holding}, and with harm injected at {found.gamma:g} their "
        f"activity rises by {_value(found.activity)} of its scale and what they give by "
        f"{_value(found.repair)} nats more than without it"
    )


def _value(one: Estimate | None) -> str:
    return "nothing" if one is None else f"{one.value:.2g} [{one.low:.2g}, {one.high:.2g}]"


def _limit(settings: Settings) -> float:
    return max(settings.alpha, 1 / (settings.draws + 1) + 1e-9)


def _specific(effects: EffectsRow, backups: Sequence[BackupRow], settings: Settings) -> bool:
    found = [row for row in backups if row.backup]
    if not any(row.rise_norms >= 0.5 * row.rise for row in found):
        return False
    held, p = effects.by_backups, effects.by_backups_p
    return held is not None and p is not None and held.low > 0 and p <= _limit(settings)


def _gates(interactions: Sequence[InteractionRow], settings: Settings) -> InteractionRow | None:
    rows = [row for row in interactions if row.activity_p is not None and row.repair_p is not None]
    ps = [max(row.activity_p or 0.0, row.repair_p or 0.0) for row in rows]
    for row, p in zip(rows, holm(ps), strict=True):
        if row.on != "harmless" or p > settings.alpha:
            continue
        if row.activity and row.repair and row.activity.low > 0 and row.repair.low > 0:
            return row
    return None


def _generic(effects: EffectsRow, backups: Sequence[BackupRow], settings: Settings) -> str:
    least = settings.least_repair
    whole = effects.self_repair
    if whole is not None and whole.low > 0 and whole.value >= least:
        rest = effects.self_repair_norms
        tail = "" if rest is None else f"; with norms frozen {rest.value:.0%}"
        return f"the model gives {whole.value:.0%} of the direct effect back{tail}, by no backups"
    norms, frozen = effects.by_norms, effects.total_norms
    if norms.low > 0 and norms.value >= least * frozen.value:
        return (
            f"norms give {norms.value:.2g} of {frozen.value:.2g} nats back; no unit was found to "
            "stand in"
        )
    rose = [row for row in backups if row.generic or row.backup]
    if rose and effects.direct.low > effects.total.high:
        return (
            f"{len(rose)} later units rise, but as under matched-random ablations, through the "
            "norms, or without effect on refusal"
        )
    return ""


def _upstream(starve: StarveRow | None) -> bool:
    if starve is None:
        return False
    return any(row.which == "upstream" and row.drop.low > 0 for row in starve.points)

"""What the experiment found, in plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from demur.stats import Estimate

VerdictName = Literal[
    "conditional gate", "specific repair", "generic repair", "additive", "none", "undetermined"
]


@dataclass(frozen=True, slots=True)
class PrimaryRow:
    """A candidate for the primary set, measured on split A.

    Attributes:
        name: Of the unit.
        layer: Its block.
        difference: Its mean activity on harmful less that on harmless prompts, its own units.
        alone: What ablating it alone takes off the refusal log-odds, nats; above 0 it promotes
            refusal.
        chosen: Whether it is in the primary set.
    """

    name: str
    layer: int
    difference: float
    alone: Estimate
    chosen: bool


@dataclass(frozen=True, slots=True)
class BackupRow:
    """A later unit under ablation of the primary set, measured on split B.

    Attributes:
        name: Of the unit.
        layer: Its block.
        rise: Median over prompts of the change of its activity, in units of its scale.
        p: One-sided, Wilcoxon: that it does not rise.
        q: The same adjusted by Benjamini and Hochberg over all later units.
        null: 99th percentile of its own median rise over matched random ablations.
        rise_norms: The median rise with norms frozen.
        firing: Share of prompts on which it is active in the unedited model.
        dormant: Whether that share is at most a tenth; else a backup is amplified.
        backup: Whether it meets all of: q, least rise, and above `null`.
        generic: Whether it meets q and least rise, but rises no more than random ablations have it.
    """

    name: str
    layer: int
    rise: float
    p: float
    q: float
    null: float
    rise_norms: float
    firing: float
    dormant: bool
    backup: bool
    generic: bool


@dataclass(frozen=True, slots=True)
class EffectsRow:
    """Effects of ablating the primary set on refusal of harmful prompts, split C.

    All are drops of refusal log-odds in nats, above 0 where the set promotes refusal. What is a
    ratio is None with a reason in `undefined` where its denominator is not clear of zero.

    Attributes:
        total: Everything behind the set reacts.
        direct: Later heads and MLPs write as before, norms divide as before.
        direct_live: The same, but norms react.
        total_norms: Everything reacts but the norms.
        self_repair: 1 - total / direct: what the model gives back of the direct effect; below 0
            later parts add to it.
        self_repair_norms: The same with norms frozen: what parts of the model give back.
        by_norms: total_norms - total: what norms give back, nats.
        share_norms: The same as a share of direct - total.
        total_held: With backups held at their clean values; None where there are none.
        by_backups: total_held - total: what backups give back, nats.
        by_backups_p: That as many random units, held, give back as much.
        share_backups: by_backups as a share of direct - total.
        joint: Ablating primary set and backups.
        joint_gain: joint - total.
        joint_p: That as many random units beside the primary set gain as much.
        backups_alone: Ablating backups only.
        repair_p: That matched random ablations have direct - total as large.
        undefined: Reasons, by attribute.
    """

    total: Estimate
    direct: Estimate
    direct_live: Estimate
    total_norms: Estimate
    self_repair: Estimate | None
    self_repair_norms: Estimate | None
    by_norms: Estimate
    share_norms: Estimate | None
    total_held: Estimate | None
    by_backups: Estimate | None
    by_backups_p: float | None
    share_backups: Estimate | None
    joint: Estimate | None
    joint_gain: Estimate | None
    joint_p: float | None
    backups_alone: Estimate | None
    repair_p: float | None
    undefined: dict[str, str]


@dataclass(frozen=True, slots=True)
class UpstreamRow:
    """A unit below the primary set.

    Attributes:
        name: Of the unit.
        layer: Its block.
        difference: Standardised difference (Cohen's d) of its activity at the last instruction
            token, harmful less harmless, split A.
        on_primary: What ablating it takes off the primary set's activity, in units of its scale,
            summed over the set; split B.
        q: One-sided Wilcoxon that it takes nothing off, adjusted over all that were tried.
        kept: Whether it is in the upstream set.
    """

    name: str
    layer: int
    difference: float
    on_primary: Estimate
    q: float
    kept: bool


@dataclass(frozen=True, slots=True)
class CurveRow:
    """A point of a starve curve: the first units of a set ablated, split C, harmful prompts.

    Attributes:
        which: The upstream set, the downstream one (primary, then backups), or random sets matched
            to either.
        count: Units.
        mass: Sum of their activation mass, residual-stream units.
        moved: How far tokens were really moved, residual-stream units.
        drop: Of refusal log-odds, nats.
    """

    which: Literal["upstream", "downstream", "random upstream", "random downstream"]
    count: int
    mass: float
    moved: float
    drop: Estimate


@dataclass(frozen=True, slots=True)
class StarveRow:
    """Upstream against downstream sets.

    Attributes:
        points: Of the curves.
        equal_count: Drop by the upstream set less drop by the downstream one, nats, at the largest
            count that both reach.
        equal_mass: The same at the largest activation mass that both reach.
        equal_norm: The same at the largest realised shift that both reach.
        undefined: Why a comparison is None.
    """

    points: tuple[CurveRow, ...]
    equal_count: Estimate | None
    equal_mass: Estimate | None
    equal_norm: Estimate | None
    undefined: str


@dataclass(frozen=True, slots=True)
class CellRow:
    """One cell of the 2 x 2 of upstream and primary sets, split C.

    Attributes:
        on: The prompts.
        upstream: "natural", "injected" or "ablated".
        gamma: Size of the injection; 0 where there is none.
        primary: "intact" or "ablated".
        backups: Mean activity of the backups in units of their scale; None if there are none.
        margin: Refusal log-odds, nats.
        held: Refusal log-odds with the backups held at what they do while the primary set is
            intact; None for intact cells.
    """

    on: Literal["harmless", "harmful"]
    upstream: Literal["natural", "injected", "ablated"]
    gamma: float
    primary: Literal["intact", "ablated"]
    backups: Estimate | None
    margin: Estimate
    held: Estimate | None


@dataclass(frozen=True, slots=True)
class InteractionRow:
    """Whether ablating the primary set does something else while harm is seen.

    "More" is the injected upstream set on harmless prompts, and the natural one on harmful ones;
    "less" is natural and ablated. Every statistic is (ablated - intact | more) - (ablated - intact
    | less), paired by prompt.

    Attributes:
        on: The prompts.
        gamma: Size of the injection; 0 on harmful prompts.
        activity: Of the mean activity of backups, in units of their scale.
        activity_p: By flipping signs, two-sided.
        repair: Of what backups give to the margin: its value less that with backups held, nats.
        repair_p: Likewise.
        margin: Of the margin itself, nats. Where a backup makes good for all that is lost this is
            0, and below 0 where nothing makes good; so a gate is not judged by it.
        margin_p: Likewise.
    """

    on: Literal["harmless", "harmful"]
    gamma: float
    activity: Estimate | None
    activity_p: float | None
    repair: Estimate | None
    repair_p: float | None
    margin: Estimate
    margin_p: float


@dataclass(frozen=True, slots=True)
class ControlRow:
    """What something else than the ablation of the primary set does.

    Attributes:
        name: In words.
        draws: How many were drawn.
        drop: Mean over draws of the mean drop of the outcome, nats; split C, of the non-refusal
            behaviour B.
        largest: Largest of the draws.
        backups: Later units that rise by the least rise or more, mean over draws; None if not
            counted.
        note: What is to be known of it.
    """

    name: str
    draws: int
    drop: float
    largest: float
    backups: float | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class HydraRecord:
    """The whole experiment, `hydra.json`.

    Attributes:
        model: Name.
        fingerprint: Of the model.
        units: Kind.
        count: How many units there are.
        sizes: Harmful and harmless prompts by split.
        settings: Of the run.
        gap: Refusal log-odds of harmful less harmless prompts in the unedited model, split C, nats.
        primary: Candidates that were really ablated, the primary set among them.
        primary_set: Names.
        backups: All later units.
        backup_set: Names.
        effects: None where there is no primary set.
        upstream: Units that were tried.
        upstream_set: Names.
        starve: None without an upstream set.
        cells: Of the 2 x 2.
        interactions: Of the 2 x 2.
        controls: What else was ablated.
        verdict: See `demur.hydra.verdict`.
        why: In words.
        notes: What a reader should know.
    """

    model: str
    fingerprint: str
    units: str
    count: int
    sizes: dict[str, tuple[int, int]]
    settings: dict[str, str | int | float | bool | tuple[float, ...] | None]
    gap: Estimate
    primary: tuple[PrimaryRow, ...]
    primary_set: tuple[str, ...]
    backups: tuple[BackupRow, ...]
    backup_set: tuple[str, ...]
    effects: EffectsRow | None
    upstream: tuple[UpstreamRow, ...]
    upstream_set: tuple[str, ...]
    starve: StarveRow | None
    cells: tuple[CellRow, ...]
    interactions: tuple[InteractionRow, ...]
    controls: tuple[ControlRow, ...]
    verdict: VerdictName
    why: str
    notes: tuple[str, ...]

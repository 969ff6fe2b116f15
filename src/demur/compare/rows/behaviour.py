"""What two directions do, laid out: the matrix, its interaction, the verdict, and mediation.

`a` and `b` stand for the two directions; their own names are beside them. "Outcome a" is the one
that `a` is said to drive, "outcome b" that of `b`. A model is "base", "organism" or "twin";
"organism - base" and "organism - twin" are differences per item of what an edit does to either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from demur.stats import Estimate

EditKind = Literal["remove", "add"]
VerdictArms = Literal["remove", "remove beyond", "add"]
VerdictLabel = Literal[
    "shared",
    "asymmetric (a moves b's outcome only)",
    "asymmetric (b moves a's outcome only)",
    "independent",
    "undetermined",
]


@dataclass(frozen=True, slots=True)
class MatrixCell:
    """What one arm does to one outcome of one model.

    Attributes:
        arm: Its name, such as "remove refusal".
        kind: Whether a coordinate is taken out or a vector added.
        model: Which one, or a difference of two.
        outcome: Name of what is measured.
        unit: Of `before`, `change` and the random ones.
        n: Prompts, items or paragraphs.
        groups: Clusters that the intervals draw.
        before: Mean without any edit; of a difference, the effect of training.
        change: Mean of (with the arm - without), paired by item; above 0 where the arm raises it.
        flips: Share of items whose value changes sign; None where the sign means nothing, and in
            differences.
        p_random: (k + 1) / (n + 1) of the random directions of the same kind of edit whose mean
            change is at least as large in size; None without random ones.
        random_low: 2.5% of the random directions' mean changes; None without.
        random_high: 97.5%.
        n_random: How many random directions.
        kl: Mean KL per token of neutral text in this model, nats; None in differences.
        strength: Removed: 1 takes the whole coordinate out, above it overshoots. Added: in
            multiples of the direction's own length, negative where it is taken away. None where
            two edits are in force together, and in differences.
        reached: Whether a strength was found that costs the wanted KL, in both models of a
            difference; None where none was wanted. Strengths that were matched on the base alone
            may cost more elsewhere: `kl` tells.
    """

    arm: str
    kind: EditKind
    model: str
    outcome: str
    unit: str
    n: int
    groups: int
    before: Estimate
    change: Estimate
    flips: float | None
    p_random: float | None
    random_low: float | None
    random_high: float | None
    n_random: int
    kl: float | None
    strength: float | None
    reached: bool | None


@dataclass(frozen=True, slots=True)
class RandomArms:
    """What random directions cost under one kind of edit.

    Attributes:
        model: In which model.
        kind: Of edit.
        n: How many.
        reached: For how many a strength of the wanted KL was found. Others cost less, and bound
            less.
        kl_low: Least KL among them, nats per token of neutral text.
        kl_high: Most.
    """

    model: str
    kind: EditKind
    n: int
    reached: int
    kl_low: float
    kl_high: float


@dataclass(frozen=True, slots=True)
class Dissociation:
    """Whether each of two arms moves its own outcome more than the other's: an interaction.

    Attributes:
        arms: Which arms of `a` and `b`.
        model: Which one, or a difference of two.
        outcome_a: Outcome of `a`.
        outcome_b: Outcome of `b`.
        interaction: (size of a on outcome a - size of a on outcome b) + (size of b on outcome b -
            size of b on outcome a), in units of `scale_a` and `scale_b`. Sizes are those of mean
            changes, with the signs of the whole sample held in every draw. Above 0: each moves
            its own outcome more; about 0: both move both alike.
        p_random: Of all ordered pairs among `a`, `b` and the random directions, the share whose
            interaction is at least as large: exact where `a` and `b` are two like the others.
        pairs: How many pairs.
        scale_a: What one unit of outcome a is, in its own units.
        scale_b: The same of outcome b.
        scaled_by: Standard deviation of mean changes over random directions; or, where these
            move nothing, that of the outcome over items without edit.
    """

    arms: VerdictArms
    model: str
    outcome_a: str
    outcome_b: str
    interaction: Estimate
    p_random: float
    pairs: int
    scale_a: float
    scale_b: float
    scaled_by: Literal["random directions", "items"]


@dataclass(frozen=True, slots=True)
class Additivity:
    """Whether two edits in force together do what each does alone, summed.

    Attributes:
        kind: Of edit. Each has the strength that it has alone, so that together they cost more.
        model: Which one, or a difference of two.
        outcome: Name.
        unit: Of both figures.
        together: Mean change with both in force.
        excess: Mean of (both - a alone - b alone), by item. Beyond the sum where it has the sign
            of `together`; for one direction given twice and taken out whole, minus the effect.
        kl: With both in force, nats per token of neutral text; None in differences.
    """

    kind: EditKind
    model: str
    outcome: str
    unit: str
    together: Estimate
    excess: Estimate
    kl: float | None


@dataclass(frozen=True, slots=True)
class VerdictPart:
    """One of the four effects that a verdict is made of.

    Attributes:
        arm: What is done.
        outcome: What it is done to.
        own: Whether the outcome is the arm's own.
        change: Mean change, in `unit`.
        unit: Of the outcome.
        p_random: As in `MatrixCell`.
        state: "moves": the interval leaves 0 out and p is at most 1 - level; of an effect on the
            other's outcome also that it is not small. "small": shown to be within plus and minus
            `margin`, by two one-sided tests. "unclear": neither.
        margin: The given share of the size of what that outcome's own arm does; None for the own.
        detectable: The smallest true effect that so many items and so wide a spread of random
            directions would have shown with the given power; None where no effect could.
    """

    arm: str
    outcome: str
    own: bool
    change: Estimate
    unit: str
    p_random: float | None
    state: Literal["moves", "small", "unclear"]
    margin: float | None
    detectable: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """How two directions are related by what they do.

    Attributes:
        model: In which model, or by which difference.
        arms: By which arms.
        label: See `demur.compare.behaviour.verdict` for the rule.
        reason: In words, with the names of both directions.
        parts: a on outcome a, a on outcome b, b on outcome a, b on outcome b.
        share: Of the own effect, up to which another's counts as small.
        level: Of the tests.
        power: That `detectable` is for.
        notes: What weakens it, such as arms that cost twice or half of what was wanted.
    """

    model: str
    arms: VerdictArms
    label: VerdictLabel
    reason: str
    parts: tuple[VerdictPart, ...]
    share: float
    level: float
    power: float
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Behaviour:
    """The whole table of interventions and outcomes.

    Attributes:
        a: Name of the one direction.
        b: Name of the other.
        outcome_a: What `a` is said to drive.
        outcome_b: What `b` is said to drive.
        sites: Where both act.
        cosines: Of `a` and `b` at these sites, in the same order.
        kl: The wanted cost, nats per token of neutral text; what was paid stands in each cell.
        paragraphs: Of neutral text.
        cells: Arms of `a` and `b` by model and outcome.
        random: What random arms cost.
        dissociations: Interactions.
        additivities: Both edits against their sum.
        verdicts: By model and kind of arms.
        skipped: Arms that were left out, and why.
        seed: Of random directions and draws.
    """

    a: str
    b: str
    outcome_a: str
    outcome_b: str
    sites: tuple[str, ...]
    cosines: tuple[float, ...]
    kl: float
    paragraphs: int
    cells: tuple[MatrixCell, ...]
    random: tuple[RandomArms, ...]
    dissociations: tuple[Dissociation, ...]
    additivities: tuple[Additivity, ...]
    verdicts: tuple[Verdict, ...]
    skipped: tuple[str, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class MediationRow:
    """What becomes of training's effect as one coordinate is held.

    Attributes:
        mediator: Name of the direction, or of several.
        rank: How many directions are held together at each site.
        way: "clamp": the organism's coordinate is set to what the base has there on the same
            tokens, the adapter stays. "patch": the base gets the organism's coordinate, and
            nothing else of it.
        outcome: Name.
        unit: Of all effects.
        sites: Where, all at once.
        n: Items.
        groups: Clusters that the intervals draw.
        total: Organism - base without any edit.
        change: Mean change by clamping the organism, or by patching the base.
        left: What is left of the total effect under the clamp; under the patch, what it does not
            bring.
        share: Of the total effect that goes through the coordinate, 1 all of it: what the clamp
            takes away, or what the patch brings. Below 0 where it does the contrary, above 1 where
            it does more. None where the total effect is not told from 0.
        undefined: Why there is no share.
        p_random: (k + 1) / (n + 1) of random directions that take away (bring) at least as much;
            None without random ones.
        random: Mean change by each random direction.
    """

    mediator: str
    rank: int
    way: Literal["clamp", "patch"]
    outcome: str
    unit: str
    sites: tuple[str, ...]
    n: int
    groups: int
    total: Estimate
    change: Estimate
    left: Estimate
    share: Estimate | None
    undefined: str
    p_random: float | None
    random: tuple[float, ...]

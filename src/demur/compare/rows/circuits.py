"""Rows of circuits: which heads and MLPs write a direction, and which of them a behaviour needs."""

from dataclasses import dataclass
from typing import Literal

from demur.stats import Estimate

ComponentKind = Literal["embed", "head", "attn", "bias", "mlp"]
"""`attn` is all of attention, where a norm behind it keeps heads apart; `bias` that of its map."""


@dataclass(frozen=True, slots=True)
class ComponentRow:
    """What one component contributes to directions.

    Attributes:
        name: `embed`, `12.head3`, `12.attn`, `12.attn_bias` or `12.mlp`.
        layer: Block from 0; None for the embedding.
        kind: What it is.
        head: Its number within the block, from 0; None for what is no head.
        values: By direction, how much further along it the component writes in the one condition
            than in the other, residual-stream units; above 0 makes the difference longer.
        shares: The same as a share of the whole difference along the direction; shares add up to
            1, and with terms of both signs single ones may be larger. None where the whole is 0.
    """

    name: str
    layer: int | None
    kind: ComponentKind
    head: int | None
    values: dict[str, Estimate]
    shares: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class AttributionRow:
    """Direct attribution of a difference to all that was summed to it.

    Attributes:
        site: Where the difference is taken.
        place: At which token, in words.
        n_positive: Rows of the condition that the difference points to.
        n_negative: Rows of the other.
        paired: Whether rows of both belong together.
        totals: By direction, the difference along it as the stream shows it, residual-stream
            units: the length of the difference itself for its own direction.
        errors: By direction, |sum over components - total| over the largest of |total| and what
            single components contribute: what the data type leaves, 1e-6 or so in float32.
        components: In the order in which they write.
    """

    site: str
    place: str
    n_positive: int
    n_negative: int
    paired: bool
    totals: dict[str, float]
    errors: dict[str, float]
    components: tuple[ComponentRow, ...]


@dataclass(frozen=True, slots=True)
class StatisticRow:
    """One measure of how alike two circuits are, beside what depth alone gives.

    Attributes:
        name: `spearman`, `cosine` (both of signed values, -1..1) or `weighted Jaccard, top 10` (of
            sizes, 0..1).
        value: As measured.
        interval: From drawing the rows behind both circuits again, None where that was not done.
            Noise of single draws lowers correlations, so that it leans to 0.
        null_mean: Mean over permutations. Not 0: what hangs on depth stays.
        null_low: 2.5% of them are below.
        null_high: 2.5% of them are above.
        p: Two-sided; for Jaccard one-sided, towards alike.
    """

    name: str
    value: float
    interval: Estimate | None
    null_mean: float
    null_low: float
    null_high: float
    p: float


@dataclass(frozen=True, slots=True)
class OverlapRow:
    """How many of the largest components two circuits share.

    Attributes:
        k: How many of each circuit, by size.
        shared: In both.
        expected: Of as many drawn at random from all.
        p_hypergeometric: Of at least as many, drawn at random from all components.
        p_permuted: The same within strata: what depth and kind give is no sign of sharing.
        names: Of those in both, the largest of the first circuit first.
    """

    k: int
    shared: int
    expected: float
    p_hypergeometric: float
    p_permuted: float
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CircuitComparison:
    """Two circuits compared over the same heads and MLPs.

    Attributes:
        a: Name of the first.
        b: Name of the second.
        n: Components compared.
        n_fixed: Of these, how many stand alone in their stratum and never move.
        silent: Components left out since in one circuit all of their kind in their block are
            exactly 0, as in front of an adapter.
        strata: What is permuted, in words.
        draws: Permutations.
        statistics: Measures.
        overlaps: Of the largest components.
    """

    a: str
    b: str
    n: int
    n_fixed: int
    silent: int
    strata: str
    draws: int
    statistics: tuple[StatisticRow, ...]
    overlaps: tuple[OverlapRow, ...]


@dataclass(frozen=True, slots=True)
class PatchRow:
    """What replacing one component's output does to a measure.

    Attributes:
        name: As in `ComponentRow`.
        layer: Block from 0.
        kind: `head`, `attn` or `mlp`.
        head: Its number, None for what is no head.
        estimated: Change of the measure to first order, from one gradient; in its units.
        patched: Change of the measure when the output is really replaced; None where it was not.
    """

    name: str
    layer: int | None
    kind: ComponentKind
    head: int | None
    estimated: Estimate
    patched: Estimate | None


@dataclass(frozen=True, slots=True)
class ValidationRow:
    """How well first-order estimates foretell what patching does.

    Attributes:
        n_top: Components with the largest estimates that were patched.
        n_random: Drawn from the others.
        spearman: Rank correlation of estimates with real changes over both, interval from drawing
            components.
        spearman_top: Over the largest alone; None where it is undefined.
        spearman_random: Over the random ones alone; None where it is undefined.
        signs_top: Share of the largest whose sign is right.
        signs_random: Share of the random ones whose sign is right.
        slope: Real change per estimated one, least squares through 0; 1 is right, less than 1 says
            that estimates are too large.
        trusted: Whether `spearman` is 0.7 or more, its interval above 0, and `signs_top` 0.8 or
            more. If not, the estimates of what was not patched are not to be trusted.
    """

    n_top: int
    n_random: int
    spearman: Estimate
    spearman_top: float | None
    spearman_random: float | None
    signs_top: Estimate
    signs_random: Estimate
    slope: float
    trusted: bool


@dataclass(frozen=True, slots=True)
class PatchingRow:
    """Attribution patching of one measure.

    Attributes:
        measure: What is measured, in words.
        unit: Of it.
        contrast: What component outputs are replaced with, in words.
        n: Items.
        clean: The measure before anything is replaced.
        components: In the order in which they write.
        validation: By real patching; None where it was not done.
    """

    measure: str
    unit: str
    contrast: str
    n: int
    clean: Estimate
    components: tuple[PatchRow, ...]
    validation: ValidationRow | None


@dataclass(frozen=True, slots=True)
class ReadWriteRow:
    """What one part of an adapter reads from, and writes along, one direction.

    The sign of a part means nothing by itself, since (A, B) and (-A, -B) are the same: only the
    product of `read` and `write_cosine` has one.

    Attributes:
        component: Name of the part.
        direction: Name of the direction.
        site: Of the direction.
        write_cosine: Of what the part writes (B) with the direction; None where B is not added to
            the stream as it is, as of q_proj or where a norm follows.
        write_share: Share of the library's directions whose |cosine| with B is smaller; None
            without a library, and as for `write_cosine`.
        write_p: That a library direction has as large a |cosine|; None likewise.
        read: How much the mean scalar of an answer's tokens grows per residual-stream unit along
            the direction, added at every token where the adapted MLP (or attention) reads the
            stream; interval from drawing groups. None for a steering vector, which reads nothing.
        read_cosine: Of the mean gradient of the scalar with the direction; None as for `read`.
        read_share: As `write_share`, of |read_cosine|.
        read_p: As `write_p`.
        n_library: Directions in the library.
        isotropic: |cosine| that 95% of isotropic directions stay below. Too easy to beat.
    """

    component: str
    direction: str
    site: str
    write_cosine: float | None
    write_share: float | None
    write_p: float | None
    read: Estimate | None
    read_cosine: float | None
    read_share: float | None
    read_p: float | None
    n_library: int
    isotropic: float

"""What the geometry of two contrasts showed: cosines, their intervals, their nulls, a verdict."""

from dataclasses import dataclass
from typing import Literal

from demur.stats import Estimate

Verdict = Literal[
    "the same",
    "opposite",
    "partly shared",
    "through a shared cause",
    "unrelated",
    "undetermined",
]

NullName = Literal[
    "isotropic",
    "covariance-matched",
    "exchanged labels",
    "unrelated contrasts",
    "random subspaces",
    "covariance-matched subspaces",
    "exchanged prompts",
]


@dataclass(frozen=True, slots=True)
class Null:
    """What a figure is where there is nothing to find.

    Attributes:
        name: How it was made.
        p: Share of the null at least as large as what was seen, (k + 1) / (n + 1); analytic for
            the isotropic one.
        upper: 95th percentile of the null, in the units of the figure; for cosines, of |cos|.
        percentile: Share of the null below what was seen, 0 to 1.
        n: Values in the null; None where it is analytic.
    """

    name: NullName
    p: float
    upper: float
    percentile: float
    n: int | None


@dataclass(frozen=True, slots=True)
class Variant:
    """The cosine after something was taken out, or in another metric.

    Attributes:
        name: What was done.
        cosine: Of the vectors as they are, -1 to 1.
        unbiased: Without the share that sampling noise has in lengths and product, and in what is
            projected out; None where a vector is not told from its noise, or neither has rows.
        left_a: Share of the first vector's squared length that is left; 1 for whitening.
        left_b: Of the second's.
    """

    name: str
    cosine: float
    unbiased: Estimate | None
    left_a: float
    left_b: float


@dataclass(frozen=True, slots=True)
class Cause:
    """An unrelated contrast that could be why two others point the same way.

    Attributes:
        name: Of the contrast in the library.
        cosine_a: With the first vector.
        cosine_b: With the second.
        share: Of the cosine of the two, what comes through it: cosine_a * cosine_b / cosine. It
            passes 1 where other parts work against it.
    """

    name: str
    cosine_a: float
    cosine_b: float
    share: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two contrasts at one site.

    Attributes:
        a: Name of the first.
        b: Name of the second.
        site: The tensor, such as `14.resid_pre`.
        n_a: Prompts or pairs behind the first; 0 for a vector without rows.
        n_b: Behind the second.
        d_model: Width.
        cosine: Of the vectors as they are, -1 to 1; noise draws it towards 0.
        interval: The same with the interval of its sampling at this number of prompts; `n` counts
            clusters. None for two vectors without rows.
        reliability_a: Cosine that the first is expected to have with itself from as many new
            prompts: of split halves, brought to full length (Spearman and Brown), 0 to 1. None
            without rows, or with fewer than four clusters on a side.
        reliability_b: Of the second.
        corrected: Cosine over the root of both reliabilities, kept within -1 and 1. None where a
            reliability is missing on a side with rows, or is 0.
        capped: Whether `corrected` passed 1 before.
        unbiased: Cosine that the vectors of endless prompts would have: inner product and lengths
            from disjoint prompts only, in the limit of all such splits. Its interval is the
            jackknife's, over clusters. None where it is undefined.
        inner: Unbiased inner product, in squared residual-stream units.
        length_a: Unbiased length of the first, in residual-stream units; None where sampling noise
            explains all of it.
        length_b: Of the second.
        nulls: Isotropic, covariance-matched, exchanged labels, unrelated contrasts; those that can
            be made. Each of |cosine|.
        variants: Whitened, without principal components, coordinates, the library, other contrasts.
        top_share: Share of the sum of |a_i b_i| in the largest 1 % of coordinates, 0 to 1.
        causes: Unrelated contrasts through which half of the cosine or more could come.
        margin: |cosine| below which two contrasts count as unrelated.
        margin_from: Where it came from.
        equivalence_p: Of two one-sided tests that the unbiased cosine is within the margin.
        p_family: Share of joint exchanges of labels in which some layer is as far out as this one;
            None where layers were not compared together.
        verdict: See `demur.compare.geometry`.
        why: What decided, with numbers.
        needed: What would decide, where nothing did; else empty.
        mismatches: What is unlike about the two, in words.
    """

    a: str
    b: str
    site: str
    n_a: int
    n_b: int
    d_model: int
    cosine: float
    interval: Estimate | None
    reliability_a: float | None
    reliability_b: float | None
    corrected: float | None
    capped: bool
    unbiased: Estimate | None
    inner: float
    length_a: float | None
    length_b: float | None
    nulls: tuple[Null, ...]
    variants: tuple[Variant, ...]
    top_share: float
    causes: tuple[Cause, ...]
    margin: float
    margin_from: str
    equivalence_p: float | None
    p_family: float | None
    verdict: Verdict
    why: str
    needed: str
    mismatches: tuple[str, ...]

    def null(self, name: NullName) -> Null | None:
        """The null of that name, if there is one."""
        return next((one for one in self.nulls if one.name == name), None)

    def variant(self, name: str) -> Variant | None:
        """The variant of that name, if there is one."""
        return next((one for one in self.variants if one.name == name), None)


@dataclass(frozen=True, slots=True)
class Overlap:
    """How far two subspaces of one size share their directions.

    Attributes:
        a: Name of the first list of vectors.
        b: Of the second.
        k: Dimensions of both.
        angles: Principal angles in degrees, 0 to 90, smallest first.
        overlap: Mean squared cosine of those angles, 0 to 1.
        nulls: Random and covariance-matched subspaces against each of the two.
    """

    a: str
    b: str
    k: int
    angles: tuple[float, ...]
    overlap: float
    nulls: tuple[Null, ...]


@dataclass(frozen=True, slots=True)
class Alignment:
    """Whether two sets of activations of the same prompts are arranged alike.

    Attributes:
        a: Name of the first, such as the base model.
        b: Of the second.
        cka: Debiased linear centred kernel alignment; about 0 for unrelated, 1 for the same up to
            rotation and scale. It is blind to the sign of a direction.
        n: Prompts.
        null: With prompts exchanged in one of the two.
    """

    a: str
    b: str
    cka: float
    n: int
    null: Null


@dataclass(frozen=True, slots=True)
class Planted:
    """How often planted pairs of one kind were judged rightly.

    Attributes:
        kind: How the pairs are related.
        expected: The right verdict.
        draws: Pairs.
        right: Of those, judged so.
        verdicts: How often each verdict was given.
    """

    kind: str
    expected: Verdict
    draws: int
    right: int
    verdicts: dict[Verdict, int]

"""What the geometry of two contrasts showed: cosines, their intervals, their nulls, a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from demur.stats import Estimate

if TYPE_CHECKING:
    import altair as alt

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

    def _repr_html_(self) -> str:
        from demur.notebook import number, said, table

        rows = [
            ("verdict", self.verdict),
            ("why", self.why),
            *((("needed", self.needed),) if self.needed else ()),
            ("cosine", said(self.interval) if self.interval else number(self.cosine, ".3f")),
            ("unbiased cosine", said(self.unbiased)),
            *(
                (f"null: {null.name}", f"95 % within {number(null.upper, '.2f')}, p = {null.p:.2g}")
                for null in self.nulls
            ),
            ("counts as unrelated", f"within {number(self.margin, '.2f')} ({self.margin_from})"),
            ("prompts or pairs", f"{self.n_a} and {self.n_b}"),
            *(("unlike", why) for why in self.mismatches),
        ]
        return table(f"{self.a} and {self.b} at {self.site}", rows)

    def plot(self) -> alt.LayerChart:
        """Draw its cosines with intervals before what each null would give, as an Altair chart.

        The first rows are the cosine as measured and the unbiased one; below stand those after
        something was taken out or in another metric, unbiased where they can be.
        """
        from demur.notebook import drawn, forest, number, said

        rows = []
        for name, value, own, main in [
            ("as measured", self.cosine, self.interval, True),
            *((("unbiased", self.unbiased.value, self.unbiased, True),) if self.unbiased else ()),
            *((one.name, one.cosine, one.unbiased, False) for one in self.variants),
        ]:
            shown = said(own) if own is not None else f"{number(value, '.3f')}, without an interval"
            rows.append(
                {
                    "row": drawn(name),
                    "value": own.value if own is not None else value,
                    "low": own.low if own is not None else value,
                    "high": own.high if own is not None else value,
                    "main": main,
                    "tip": f"{drawn(name)}: {shown}",
                }
            )
        nulls = [
            {
                "null": null.name,
                "upper": null.upper,
                "tip": f"{null.name}: 95 % within {number(null.upper, '.2f')}, p = {null.p:.2g}",
            }
            for null in self.nulls
        ]
        title = f"cosine of {drawn(self.a)} and {drawn(self.b)} at {drawn(self.site)}"
        return forest(rows, nulls, title=title)


def plot_by_depth(lines: Mapping[str, Sequence[Comparison]]) -> alt.LayerChart:
    """Draw cosines with their intervals at several sites, as an Altair chart.

    Behind them is the band of what unrelated contrasts have; without these, of directions with the
    covariance of the activations. Of several comparisons at a site the widest one is drawn.

    Args:
        lines: Comparisons by the name of their line, such as `compare_layers` returns.

    Raises:
        ConfigError: There is none.
    """
    from demur.errors import ConfigError
    from demur.notebook import by_depth, drawn, number, said

    every = [one for rows in lines.values() for one in rows]
    if not every:
        raise ConfigError("there is no comparison to draw", "give those of one site or more")
    rows = [
        {
            "site": one.site,
            "series": drawn(name),
            "pair": drawn(name),
            "value": one.cosine,
            "low": one.interval.low if one.interval else one.cosine,
            "high": one.interval.high if one.interval else one.cosine,
            "tip": f"{drawn(one.a)} and {drawn(one.b)} at {drawn(one.site)}: "
            f"{said(one.interval) if one.interval else number(one.cosine, '.3f')}; {one.verdict}",
        }
        for name, own in lines.items()
        for one in own
    ]
    return by_depth(rows, null_bands(every), title="cosine; band: unrelated contrasts")


def null_bands(rows: Iterable[Comparison]) -> list[dict[str, str | float]]:
    """Of each site, between which cosines 95 % of a null lie; of several the widest.

    The null is that of unrelated contrasts; without a library, the covariance-matched one.
    """
    upper: dict[str, float] = {}
    for one in rows:
        null = one.null("unrelated contrasts") or one.null("covariance-matched")
        if null is not None:
            upper[one.site] = max(null.upper, upper.get(one.site, 0.0))
    return [{"site": site, "low": -most, "high": most} for site, most in upper.items()]


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

"""Two contrasts at one site: their cosine, what it would be by chance, and what it means.

A cosine by itself says little. Sampling noise draws it towards 0. A few directions hold most of
the variance of a residual stream, so that vectors with nothing in common have cosines far from 0.
And a third thing, the length or the topic of the prompts, may lie in both. So each cosine stands
here beside its reliability, its nulls, and what is left of it without its likely causes.

Of d_model numbers only inner products matter. All of it is done on one Gram matrix of the rows:
draws, halves, jackknife and nulls are weights on rows, and a change of metric (whitening, a
projection) is a matrix of rank of the rows at most that is taken off it.

Which interval. Resampling adds noise to vectors that hold noise already: every draw of a cosine
near 1 lies below it, and percentile intervals miss, as do those corrected for it by rank (BCa).
`Comparison.interval` is the bootstrap's spread brought back around the cosine, and covers what this
number of prompts gives on average. `Comparison.unbiased` is about the vectors of endless prompts,
with a jackknife interval over clusters; verdicts use that one. In 200 planted pairs a kind, with
reliabilities near 0.95 or 0.9, nominal 95 % intervals covered the true cosine so often:

    true cosine     percentile      BCa             recentred       unbiased
    0               0.86, 0.78      0.89, 0.85      0.89, 0.86      0.94, 0.97
    0.5             0.86, 0.74      0.93, 0.86      0.94, 0.90      0.96, 0.95
    1               0, 0            0, 0            0, 0            0.96, 0.96

(BCa by 300 draws and a jackknife. Half of the pairs shared their negative rows, and with them
noise. The recentred ones covered the mean cosine of such pairs in 0.90 to 0.94.)

The verdict, in this order, u the unbiased cosine with its 95 % interval (two vectors without rows
have none: only the first two rules apply, to the cosine itself):

1. "the same": the interval reaches `SAME` and lies above `NEAR`. "opposite": the mirror image.
2. "through a shared cause": the interval lies beyond the isotropic band; without the span of the
   library at most half of it is left (one-sided jackknife test of that, at 5 %); and the interval
   of what is left reaches into the margin that the library gives without its `causes`.
3. "unrelated": two one-sided tests place u within the margin (p < 0.05). The margin is the 95th
   percentile of |cosine| of either vector with unrelated contrasts, never below the isotropic band.
4. "partly shared": the interval lies beyond the margin, and the rules above did not hold.
5. "undetermined": all else, with what is needed.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from demur.compare.contrasts import (
    Contrast,
    halves_weights,
    mismatches,
    of_clusters,
    permuted_weights,
    resampled_weights,
    strata,
)
from demur.compare.rows.geometry import Cause, Comparison, Null, NullName, Variant, Verdict
from demur.directions import isotropic_band
from demur.errors import ConfigError, TooFewPromptsError
from demur.progress import Progress
from demur.sites import Site
from demur.stats import Estimate, bootstrap_tails, null_p

SAME = 0.9
"""An unbiased cosine that two estimates of one thing must be able to have."""
NEAR = 0.75
"""And one that they must lie above."""
ALPHA = 0.05
LEVEL = 0.95
TOP_SHARE = 0.01
"""Of the coordinates, those that count as large."""
COMPONENTS = (1, 5)
WITHOUT_LARGEST = "without the largest 1% of coordinates"
WITHOUT_LIBRARY = "without the span of unrelated contrasts"
WHITENED = "whitened (Ledoit-Wolf)"

Rows = Float[np.ndarray, "row d_model"]


@dataclass(frozen=True, slots=True, eq=False)
class _Inner:
    """Squared lengths and inner products of draws of two vectors."""

    aa: Float[np.ndarray, " #draw"]
    ab: Float[np.ndarray, " #draw"]
    bb: Float[np.ndarray, " #draw"]

    def cosines(self) -> Float[np.ndarray, " draw"]:
        return np.clip(self.ab / np.sqrt(np.maximum(self.aa * self.bb, 1e-300)), -1, 1)

    def __sub__(self, other: _Inner) -> _Inner:
        return _Inner(self.aa - other.aa, self.ab - other.ab, self.bb - other.bb)


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """The rows of two contrasts and their inner products."""

    a: Float[np.ndarray, "n d_model"]
    b: Float[np.ndarray, "m d_model"]
    gram: tuple[np.ndarray, np.ndarray, np.ndarray]

    @classmethod
    def of(cls, a: Contrast, b: Contrast) -> _Pair:
        x, y = (_rows(one) for one in (a, b))
        return cls(x, y, (x @ x.T, x @ y.T, y @ y.T))

    def inner(self, weights: Sequence[np.ndarray]) -> _Inner:
        """Of draws with these weights on the rows of either."""
        wa, wb = weights
        aa, ab, bb = self.gram
        # A bare vector is one row, which all draws have in common.
        return _Inner(((wa @ aa) * wa).sum(1), ((wa @ ab) * wb).sum(1), ((wb @ bb) * wb).sum(1))

    def taken(self, weights: Sequence[np.ndarray], factor: _Factor) -> _Inner:
        """What a metric takes off those inner products."""
        fa, fb = weights[0] @ factor.a, weights[1] @ factor.b
        return _Inner((fa * fa).sum(1), (fa * fb).sum(1), (fb * fb).sum(1))


@dataclass(frozen=True, slots=True, eq=False)
class _Factor:
    """What a metric takes off the inner products: rows times it, and the product of that."""

    a: Float[np.ndarray, "n rank"]
    b: Float[np.ndarray, "m rank"]


def _rows(one: Contrast) -> Rows:
    if not one.has_rows:
        return one.vector().numpy()[None]
    return torch.cat(one.rows).numpy()


def _filled(weights: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    return [np.ones((1, 1)) if own is None else own for own in weights]


@dataclass(frozen=True, slots=True, eq=False)
class _Jackknife:
    """Weights without one cluster each, and what each cluster adds to the vectors' noise.

    Attributes:
        full: Weights of all rows.
        without: One draw per cluster.
        pull: Each cluster's influence on the vectors, as weights; their sum of squares is the
            squared noise.
        groups: Draws of each stratum.
    """

    full: list[np.ndarray]
    without: list[np.ndarray]
    pull: list[np.ndarray]
    groups: list[np.ndarray]

    @classmethod
    def of(cls, contrasts: Sequence[Contrast]) -> _Jackknife:
        layers = strata(contrasts)
        keys: list[Hashable] = [key for members in layers for key in members]
        at = {key: i for i, key in enumerate(keys)}
        groups, start = [], 0
        for members in layers:
            groups.append(np.arange(start, start + len(members)))
            start += len(members)
        ones = np.ones(1)
        full = of_clusters(contrasts, dict.fromkeys(keys, ones))
        eye = 1 - np.eye(len(keys))
        without = of_clusters(contrasts, {key: eye[at[key]] for key in keys})
        pull: list[np.ndarray | None] = []
        for one, own in zip(contrasts, full, strict=True):
            if own is None:
                pull.append(None)
                continue
            parts = []
            sides = (one.positive_clusters, one.negative_clusters)
            for side, clusters in zip((1, -1), sides, strict=True):
                n = len(clusters)
                inside = np.zeros((len(keys), n))
                inside[[at[c] for c in clusters], np.arange(n)] = side / n
                parts.append(inside - inside.sum(1, keepdims=True) / n)
            block = np.concatenate(parts, 1)
            for group in groups:
                if len(group) > 1:
                    block[group] -= block[group].mean(0)
            pull.append(block)
        zero = [np.zeros((1, 1)) if own is None else own for own in pull]
        return cls(_filled(full), _filled(without), zero, groups)

    @property
    def clusters(self) -> int:
        return sum(map(len, self.groups))

    @property
    def freedom(self) -> int:
        return max(sum(len(group) - 1 for group in self.groups), 1)

    def noise(self, each: _Inner) -> tuple[_Inner, _Inner]:
        """Expected share of noise in the inner products, of all clusters and without each one."""
        out: list[tuple[np.ndarray, np.ndarray]] = []
        for some in (each.aa, each.ab, each.bb):
            values = np.broadcast_to(some, (self.clusters,))
            total, less = 0.0, np.zeros(self.clusters)
            for group in self.groups:
                k, own = len(group), values[group]
                part = own.sum() * (k / (k - 1) if k > 1 else 1.0)
                total += part
                less += part
                if k > 2:
                    rest = own.sum() - own * k / (k - 1)
                    less[group] += (k / (k - 1)) ** 2 * (k - 1) / (k - 2) * rest - part
            out.append((np.array([total]), less))
        (aa, aa_), (ab, ab_), (bb, bb_) = out
        return _Inner(aa, ab, bb), _Inner(aa_, ab_, bb_)

    def error(self, values: Float[np.ndarray, " cluster"]) -> float:
        """Standard error of a figure, from its values without one cluster each."""
        total = 0.0
        for group in self.groups:
            k, own = len(group), values[group]
            total += (k - 1) / k * float(((own - own.mean()) ** 2).sum())
        return math.sqrt(total)


_TOO_NOISY = 0.1
"""Squared length without noise over that with it: below, a vector counts as mere noise."""
_MOST_NOISE = 0.5
"""Share of noise that is corrected for along an axis that is projected out: at most twofold."""


@dataclass(frozen=True, slots=True, eq=False)
class _Unbiased:
    """An unbiased figure, its error, and what it is without one cluster each."""

    value: float
    without: Float[np.ndarray, " cluster"]
    knife: _Jackknife

    @property
    def error(self) -> float:
        return self.knife.error(self.without)

    def above(self, bound: float) -> float:
        """One-sided p of the claim that it is above `bound`."""
        from scipy import stats

        if (error := self.error) == 0:
            return 0.0 if self.value > bound else 1.0
        return float(stats.t.sf((self.value - bound) / error, self.knife.freedom))

    def within(self, margin: float) -> float:
        """The p of two one-sided tests that it is within the margin on both sides of 0."""
        return max(self.above(-margin), (-self).above(-margin))

    def __neg__(self) -> _Unbiased:
        return _Unbiased(-self.value, -self.without, self.knife)

    def less_half_of(self, other: _Unbiased) -> _Unbiased:
        """This one minus half of another, which had the same clusters left out."""
        without = self.without - other.without / 2
        return _Unbiased(self.value - other.value / 2, without, self.knife)

    def estimate(self) -> Estimate:
        from scipy import stats

        reach = self.error * float(stats.t.ppf((1 + LEVEL) / 2, self.knife.freedom))
        ends = (self.value - reach, self.value, self.value + reach)
        low, value, high = (float(np.clip(x, -1, 1)) for x in ends)
        method = f"cluster jackknife t {100 * LEVEL:g}%, unbiased"
        return Estimate(value, low, high, self.knife.clusters, method)


def isotropic_p(cosine: float, d_model: int) -> float:
    """Chance that a random direction has a |cosine| at least as large."""
    from scipy import stats

    return float(stats.beta.sf(min(cosine * cosine, 1.0), 0.5, (d_model - 1) / 2))


def sampled_null(name: NullName, seen: float, values: Float[np.ndarray, " n"]) -> Null:
    """A null made of draws, against which `seen` is large or not."""
    return Null(
        name,
        null_p(seen, values, side="high"),
        float(np.quantile(values, LEVEL)),
        float((values < seen).mean()),
        len(values),
    )


def shrinkage(gram: Float[np.ndarray, "n n"], d_model: int) -> tuple[float, float]:
    """Ledoit and Wolf's shrinkage of a covariance, and its mean variance, from inner products.

    The same numbers as `sklearn.covariance.ledoit_wolf_shrinkage` on centred rows, which takes
    products of d_model by d_model; all that enters are sums that the Gram matrix of rows has too.

    Args:
        gram: Of centred rows.
        d_model: Their width.

    References:
        Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices",
        2004.
    """
    n = len(gram)
    trace = float(np.trace(gram)) / n
    squares = float((gram**2).sum()) / n**2
    fourth = float((np.diag(gram) ** 2).sum()) / n
    mean = trace / d_model
    delta = (squares - 2 * mean * trace + d_model * mean**2) / d_model
    beta = min((fourth - squares) / (d_model * n), delta)
    return (0.0 if beta <= 0 else beta / delta), mean


def _large(d_model: int) -> int:
    return max(math.ceil(TOP_SHARE * d_model), 1)


@dataclass(frozen=True, slots=True, eq=False)
class _Options:
    library: Mapping[str, Contrast]
    without: Mapping[str, Contrast]
    within: Tensor | None
    draws: int
    splits: int
    seed: int
    margin: float | None

    def check(self) -> None:
        if min(self.draws, self.splits) < 2:
            raise ConfigError(
                f"got {self.draws} draws and {self.splits} splits", "give 2000 and 100 or so"
            )
        if self.margin is not None and not 0 < self.margin < 1:
            raise ConfigError(
                f"the margin is {self.margin}", "give a cosine between 0 and 1, such as 0.3"
            )


class _Study:
    """Two contrasts, and all that is computed of them once."""

    def __init__(self, a: Contrast, b: Contrast, options: _Options) -> None:
        self.both, self.options = (a, b), options
        self.vectors = [_vector(one) for one in self.both]
        self.spans = {f"without {name}": {name: one} for name, one in options.without.items()}
        if options.library:
            self.spans[WITHOUT_LIBRARY] = dict(options.library)
        self.pair = _Pair.of(a, b)
        self.knife = _Jackknife.of(self.both) if a.has_rows or b.has_rows else None
        full = [np.ones((1, 1))] * 2 if self.knife is None else self.knife.full
        self.full = full
        self.plain = self.pair.inner(full)
        self.cosine = float(self.plain.cosines()[0])
        self.band = isotropic_band(a.d_model)
        self.within = self._within()
        if self.knife is not None:
            self._without = self.pair.inner(self.knife.without)
            self._pull = self.pair.inner(self.knife.pull)
            self.noise = self.knife.noise(self._pull)[0]
        else:
            self.noise = _Inner(np.zeros(1), np.zeros(1), np.zeros(1))
        self.beside: dict[str, tuple[float, float]] = {}
        for name, one in options.library.items():
            own = _vector(one)
            self.beside[name] = (_cosine(own, self.vectors[0]), _cosine(own, self.vectors[1]))

    def _within(self) -> Rows | None:
        if (given := self.options.within) is not None:
            wide = given.detach().to("cpu", torch.float64)
            return (wide - wide.mean(0)).numpy()
        parts = [one.within().numpy() for one in self.both if one.has_rows]
        return np.concatenate(parts) if parts else None

    def unbiased(self, factor: _Factor | None = None) -> _Unbiased | None:
        """The cosine of endless prompts; None where a vector is mere noise, or both are bare."""
        if (knife := self.knife) is None:
            return None
        plain, without, pull = self.plain, self._without, self._pull
        if factor is not None:
            plain = plain - self.pair.taken(knife.full, factor)
            without = without - self.pair.taken(knife.without, factor)
            pull = pull - self.pair.taken(knife.pull, factor)
        noise, less = knife.noise(pull)
        whole, parts = plain - noise, without - less
        if whole.aa[0] <= _TOO_NOISY * plain.aa[0] or whole.bb[0] <= _TOO_NOISY * plain.bb[0]:
            return None
        if (parts.aa <= 0).any() or (parts.bb <= 0).any():
            return None
        value = float(whole.ab[0] / math.sqrt(whole.aa[0] * whole.bb[0]))
        return _Unbiased(value, parts.ab / np.sqrt(parts.aa * parts.bb), knife)

    def interval(self) -> Estimate | None:
        """The cosine with the bootstrap's spread around it."""
        if self.knife is None:
            return None
        draws = self.options.draws
        weights = resampled_weights(self.both, draws=draws, seed=self.options.seed)
        drawn = self.pair.inner(_filled(weights)).cosines()
        tails = bootstrap_tails(self.knife.freedom + 1, level=LEVEL)
        spread = np.quantile(drawn - drawn.mean(), tails)
        low, high = np.clip(self.cosine + spread, -1, 1)
        return Estimate(
            self.cosine,
            min(float(low), self.cosine),
            max(float(high), self.cosine),
            self.knife.clusters,
            f"cluster bootstrap {100 * LEVEL:g}%, recentred, {draws} draws",
        )

    def less_noise(self, found: _Inner) -> Float[np.ndarray, " draw"]:
        """Cosines without what noise in common adds to the product."""
        common = found.ab - self.noise.ab
        return common / np.sqrt(np.maximum(found.aa * found.bb, 1e-300))

    def exchanged(self) -> Float[np.ndarray, " draw"] | None:
        """|cosines| under exchanged labels."""
        found = self.signed_exchanged()
        return None if found is None else np.abs(found)

    def signed_exchanged(self) -> Float[np.ndarray, " draw"] | None:
        """Cosines under exchanged labels, without noise in common."""
        if self.knife is None:
            return None
        options = self.options
        weights = permuted_weights(self.both, draws=options.draws, seed=options.seed + 1)
        return self.less_noise(self.pair.inner(_filled(weights)))

    def matched(self) -> Float[np.ndarray, " draw"] | None:
        """|cosines| of either vector with draws that have the covariance of the rows."""
        if (rows := self.within) is None:
            return None
        rng = np.random.default_rng(self.options.seed + 2)
        mix = rng.standard_normal((self.options.draws, len(rows)))
        lengths = np.sqrt(np.maximum(((mix @ (rows @ rows.T)) * mix).sum(1), 1e-300))
        found = [mix @ (rows @ v) / lengths / np.linalg.norm(v) for v in self.vectors]
        return np.abs(np.concatenate(found))

    def library(self, *, leave_out: Sequence[str] = ()) -> Float[np.ndarray, " n"]:
        """|cosines| of both vectors with unrelated contrasts."""
        kept = [both for name, both in self.beside.items() if name not in leave_out]
        return np.abs(np.array(kept).reshape(-1))

    def nulls(self, exchanged: Float[np.ndarray, " draw"] | None) -> tuple[Null, ...]:
        seen, d = abs(self.cosine), self.both[0].d_model
        p = isotropic_p(self.cosine, d)
        found = [Null("isotropic", p, self.band, 1 - p, None)]
        if (matched := self.matched()) is not None:
            found.append(sampled_null("covariance-matched", seen, matched))
        if exchanged is not None:
            found.append(sampled_null("exchanged labels", self.seen, exchanged))
        if self.beside:
            found.append(sampled_null("unrelated contrasts", seen, self.library()))
        return tuple(found)

    @property
    def seen(self) -> float:
        """What is set against exchanged labels."""
        return abs(float(self.less_noise(self.plain)[0]))

    def causes(self) -> tuple[Cause, ...]:
        """Unrelated contrasts through which half of the cosine or more could come."""
        return tuple(
            Cause(name, one, two, one * two / self.cosine)
            for name, (one, two) in self.beside.items()
            if self.cosine != 0 and one * two / self.cosine >= 0.5
        )

    def margin(self, *, leave_out: Sequence[str] = ()) -> tuple[float, str]:
        """|cosine| below which the two count as unrelated, and where it came from."""
        if self.options.margin is not None:
            return self.options.margin, "given"
        values, d = self.library(leave_out=leave_out), self.both[0].d_model
        if not len(values):
            return self.band, f"isotropic band at width {d}: there are no unrelated contrasts"
        upper = float(np.quantile(values, LEVEL))
        if upper < self.band:
            return self.band, f"isotropic band at width {d}: unrelated contrasts stay below it"
        return upper, f"95th percentile of {len(values)} cosines with unrelated contrasts"

    def reliability(self) -> tuple[float | None, float | None]:
        """Of split halves, brought to full length."""
        options = self.options
        try:
            first, second = (
                _filled(half)
                for half in halves_weights(self.both, splits=options.splits, seed=options.seed + 3)
            )
        except TooFewPromptsError:
            return None, None
        out: list[float | None] = []
        for i, gram in ((0, self.pair.gram[0]), (1, self.pair.gram[2])):
            if not self.both[i].has_rows:
                out.append(None)
                continue
            one, two = first[i], second[i]
            along = ((one @ gram) * two).sum(1)
            lengths = ((one @ gram) * one).sum(1) * ((two @ gram) * two).sum(1)
            r = float((along / np.sqrt(np.maximum(lengths, 1e-300))).mean())
            out.append(min(2 * r / (1 + r), 1.0) if r > 0 else 0.0)
        return out[0], out[1]

    def corrected(self, reliability: Sequence[float | None]) -> tuple[float | None, bool]:
        """The cosine over the root of both reliabilities, and whether that passed 1."""
        product = 1.0
        for one, own in zip(self.both, reliability, strict=True):
            if one.has_rows:
                if not own:
                    return None, False
                product *= own
        found = self.cosine / math.sqrt(product)
        return float(np.clip(found, -1, 1)), abs(found) > 1

    def variants(self) -> tuple[tuple[Variant, ...], _Unbiased | None]:
        """Cosines in other metrics; and the unbiased one without the library."""
        found, partial = [], None
        for name, (factor, fairer) in self._metrics().items():
            rest = self.plain - self.pair.taken(self.full, factor)
            left = [float(rest.aa[0] / self.plain.aa[0]), float(rest.bb[0] / self.plain.bb[0])]
            if min(left) < 1e-9:
                continue  # All of a vector was taken out: there is no cosine of nothing.
            fair = self.unbiased(fairer)
            partial = fair if name == WITHOUT_LIBRARY else partial
            one, two = (1.0, 1.0) if name == WHITENED else (min(left[0], 1.0), min(left[1], 1.0))
            estimate = fair.estimate() if fair is not None else None
            found.append(Variant(name, float(rest.cosines()[0]), estimate, one, two))
        return tuple(found), partial

    def _metrics(self) -> dict[str, tuple[_Factor, _Factor]]:
        """By name, for vectors as they are and for unbiased cosines."""
        found = _by_covariance(self.pair, self.within) if self.within is not None else {}
        d = self.both[0].d_model
        parts = (self.pair.a, self.pair.b)
        sides = [part for one, part in zip(self.both, parts, strict=True) if one.has_rows]
        if sides:
            size = np.sum([(side**2).mean(0) for side in sides], axis=0)
            top = np.argsort(-size)[: _large(d)]
            found[WITHOUT_LARGEST] = _Factor(parts[0][:, top], parts[1][:, top])
        out = {name: (factor, factor) for name, factor in found.items()}
        return out | {name: _without_span(self.pair, span) for name, span in self.spans.items()}

    def top_share(self) -> float:
        """Share of the sum of absolute products in the largest coordinates."""
        products = np.sort(np.abs(self.vectors[0] * self.vectors[1]))
        total = float(products.sum())
        return float(products[-_large(len(products)) :].sum()) / total if total > 0 else 0.0


def _cosine(one: np.ndarray, two: np.ndarray) -> float:
    return float(np.clip(one @ two / np.linalg.norm(one) / np.linalg.norm(two), -1, 1))


def _by_covariance(pair: _Pair, within: Rows) -> dict[str, _Factor]:
    """Whitening and principal components, from the Gram matrix of centred rows."""
    from scipy import linalg

    found: dict[str, _Factor] = {}
    n, d = within.shape
    scatter = within @ within.T
    onto = (pair.a @ within.T, pair.b @ within.T)
    ratio, mean = shrinkage(scatter, d)
    if ratio >= 1:  # Shrunk to the identity: the metric is the plain one.
        found[WHITENED] = _Factor(np.zeros((len(pair.a), 0)), np.zeros((len(pair.b), 0)))
    elif ratio > 0 and mean > 0:
        # Woodbury: the inverse of the shrunk covariance is the identity minus this, up to scale.
        ridge = n * ratio * mean / (1 - ratio)
        root = linalg.cholesky(scatter + ridge * np.eye(n), lower=True)
        fa, fb = (linalg.solve_triangular(root, rows.T, lower=True).T for rows in onto)
        found[WHITENED] = _Factor(fa, fb)
    most = min(max(COMPONENTS), n - 1, d - 1)
    if most < 1:
        return found
    sizes, axes = linalg.eigh(scatter, subset_by_index=[n - most, n - 1])
    sizes, axes = sizes[::-1], axes[:, ::-1]
    for k in COMPONENTS:
        if k <= most and sizes[k - 1] > 1e-9 * max(sizes[0], 1e-300):
            top = axes[:, :k] / np.sqrt(sizes[:k])
            name = f"without {k} principal component{'s' if k > 1 else ''}"
            found[name] = _Factor(onto[0] @ top, onto[1] @ top)
    return found


def _vector(one: Contrast) -> np.ndarray:
    vector = one.vector()
    if float(vector.norm()) == 0:
        one.direction()  # Says which vector is zero.
    return vector.numpy()


def _without_span(pair: _Pair, span: Mapping[str, Contrast]) -> tuple[_Factor, _Factor]:
    """Without the span of contrasts as they were measured, and as they are.

    A direction that was measured with noise takes out too little of what lies along it. For each
    axis of the span the share of noise in it is known from the clusters, and what the axis takes
    out grows accordingly (regression with errors in variables).
    """
    vectors = np.stack([_vector(one) for one in span.values()])
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    left, sizes, basis = np.linalg.svd(vectors / lengths, full_matrices=False)
    kept = sizes > 1e-6
    root, basis = left[:, kept] / sizes[kept], basis[kept]
    noise = _noise(list(span.values())) / lengths / lengths.T
    shares, axes = np.linalg.eigh(root.T @ noise @ root)
    basis = axes.T @ basis
    grown = basis / np.sqrt(1 - np.clip(shares, 0, _MOST_NOISE))[:, None]
    return (
        _Factor(pair.a @ basis.T, pair.b @ basis.T),
        _Factor(pair.a @ grown.T, pair.b @ grown.T),
    )


def _noise(contrasts: Sequence[Contrast]) -> Float[np.ndarray, "n n"]:
    """Expected inner products of the noise of vectors; what shares clusters shares noise."""
    pulls = [_pulls(one) for one in contrasts]
    out = np.zeros((len(pulls), len(pulls)))
    for i, one in enumerate(pulls):
        for j, two in enumerate(pulls[: i + 1]):
            common = sum(float(one[key] @ two[key]) for key in one.keys() & two.keys())
            out[i, j] = out[j, i] = common
    return out


def _pulls(one: Contrast) -> dict[Hashable, np.ndarray]:
    """What each cluster adds to the noise of a vector; nothing where there are no rows."""
    out: dict[Hashable, np.ndarray] = {}
    if not one.has_rows:
        return out
    sides = (one.positive_clusters, one.negative_clusters)
    for sign, rows, clusters in zip((1, -1), one.rows, sides, strict=True):
        keys = {key: i for i, key in enumerate(dict.fromkeys(clusters))}
        sums = np.zeros((len(keys), one.d_model))
        np.add.at(sums, [keys[key] for key in clusters], (rows - rows.mean(0)).numpy())
        sums *= sign / len(rows) * (len(keys) / max(len(keys) - 1, 1)) ** 0.5
        for key, i in keys.items():
            out[key] = out[key] + sums[i] if key in out else sums[i]
    return out


def _check(a: Contrast, b: Contrast, others: Mapping[str, Contrast]) -> tuple[str, ...]:
    found = mismatches(a, b)
    for one in found:
        if one.fatal:
            raise ConfigError(
                f"`{a.name}` and `{b.name}` cannot be compared: {one.why}",
                "compare vectors of one model at one site",
            )
    for name, other in others.items():
        for one in mismatches(a, other):
            if one.fatal:
                raise ConfigError(
                    f"the contrast `{name}` cannot be set beside `{a.name}`: {one.why}",
                    "read it at the same site of the same model",
                )
    return tuple(one.why for one in found)


def compare_pair(
    a: Contrast,
    b: Contrast,
    *,
    library: Mapping[str, Contrast] | None = None,
    without: Mapping[str, Contrast] | None = None,
    within: Float[Tensor, "row d_model"] | None = None,
    draws: int = 2000,
    splits: int = 100,
    seed: int,
    margin: float | None = None,
) -> Comparison:
    """Compare two contrasts at one site; see the module for nulls, intervals and verdicts.

    Args:
        a: The first.
        b: The second. A vector without rows is taken as exact.
        library: Unrelated contrasts at the same site, with or without rows. Their span is what is
            projected out for a shared cause, and their cosines give the margin, so neither `a` nor
            `b`, nor anything made to be like them, belongs in it.
        without: Other contrasts to project out, one by one.
        within: Rows from which the covariance is taken, centred within their classes; None: the
            rows of `a` and `b`, so centred.
        draws: Of bootstrap and sampled nulls.
        splits: Random halves for the reliability.
        seed: Of all draws.
        margin: |cosine| that still counts as unrelated; None: from the library.

    Raises:
        ConfigError: The two are of other widths or sites, as is a contrast of the library; or a
            number is out of range.
        TooFewPromptsError: A side has fewer than two clusters.
        DegenerateVectorError: A vector is zero.
    """
    options = _Options(library or {}, without or {}, within, draws, splits, seed, margin)
    return _compare(a, b, options).row


@dataclass(frozen=True, slots=True, eq=False)
class _Full:
    """A row, and what layers need to be seen together."""

    row: Comparison
    seen: float
    exchanged: Float[np.ndarray, " draw"] | None


def _compare(a: Contrast, b: Contrast, options: _Options) -> _Full:
    options.check()
    notes = _check(a, b, {**options.library, **options.without})
    study = _Study(a, b, options)
    unbiased, exchanged, causes = study.unbiased(), study.exchanged(), study.causes()
    variants, partial = study.variants()
    margin, margin_from = study.margin()
    reliability = study.reliability()
    corrected, capped = study.corrected(reliability)
    fair = study.plain - study.noise
    if unbiased is None:
        verdict, why, needed = _without_interval(study)
    else:
        left = study.margin(leave_out=[one.name for one in causes])[0]
        verdict, why, needed = _verdict(study, unbiased, partial, margin, left)
    row = Comparison(
        a=a.name,
        b=b.name,
        site=str(a.site),
        n_a=a.n,
        n_b=b.n,
        d_model=a.d_model,
        cosine=study.cosine,
        interval=study.interval(),
        reliability_a=reliability[0],
        reliability_b=reliability[1],
        corrected=corrected,
        capped=capped,
        unbiased=unbiased.estimate() if unbiased is not None else None,
        inner=float(fair.ab[0]),
        length_a=_root(float(fair.aa[0])),
        length_b=_root(float(fair.bb[0])),
        nulls=study.nulls(exchanged),
        variants=variants,
        top_share=study.top_share(),
        causes=causes,
        margin=margin,
        margin_from=margin_from,
        equivalence_p=unbiased.within(margin) if unbiased is not None else None,
        p_family=None,
        verdict=verdict,
        why=why,
        needed=needed,
        mismatches=notes,
    )
    return _Full(row, study.seen, exchanged)


def _root(square: float) -> float | None:
    return math.sqrt(square) if square > 0 else None


Judged = tuple[Verdict, str, str]


def _without_interval(study: _Study) -> Judged:
    if study.knife is not None:
        return (
            "undetermined",
            "a vector is not told from the noise of its own estimate",
            "more prompts: of one of the two, most of the length is noise",
        )
    why = f"the cosine of two vectors taken as exact is {study.cosine:.2f}, without an interval"
    if abs(study.cosine) >= SAME:
        return ("the same" if study.cosine > 0 else "opposite"), why, ""
    names = " and ".join(f"`{one.name}`" for one in study.both)
    return "undetermined", why, f"the prompts behind {names}"


def _verdict(
    study: _Study, unbiased: _Unbiased, partial: _Unbiased | None, margin: float, left: float
) -> Judged:
    if unbiased.value < 0:
        back = -partial if partial is not None else None
        forward = -unbiased
    else:
        back, forward = partial, unbiased
    seen, facing = unbiased.estimate(), forward.estimate()
    shown = f"the unbiased cosine {_shown(seen)}"
    found: Judged | None = None
    if facing.high >= SAME and facing.low >= NEAR:
        label: Verdict = "the same" if unbiased.value > 0 else "opposite"
        found = label, f"{shown} reaches {SAME:g} and lies beyond {NEAR:g} on its side", ""
    elif facing.low > study.band and back is not None and _vanishes(back, forward, left):
        assert partial is not None
        names = ", ".join(one.name for one in study.causes())
        why = f"{shown} falls to {_shown(partial.estimate())} without unrelated contrasts"
        found = "through a shared cause", why + (f", above all {names}" if names else ""), ""
    elif (p := unbiased.within(margin)) < ALPHA:
        found = "unrelated", f"{shown} is within {margin:.2f} (p = {p:.2g})", ""
    elif facing.low > margin:
        found = "partly shared", f"{shown} lies beyond the margin of {margin:.2f}", ""
    if found is not None:
        return found
    why = f"{shown} reaches across the margin of {margin:.2f}"
    return "undetermined", why, _needed(seen, margin, bool(study.beside))


def _vanishes(partial: _Unbiased, whole: _Unbiased, margin: float) -> bool:
    at_most_half = (-partial.less_half_of(whole)).above(0.0) < ALPHA
    left = partial.estimate()
    return at_most_half and left.low < margin and left.high > -margin


def _shown(one: Estimate) -> str:
    return f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]"


def _needed(seen: Estimate, margin: float, has_library: bool) -> str:
    if not has_library:
        return "unrelated contrasts, from which a margin can be taken"
    distance = abs(abs(seen.value) - margin)
    times = ((seen.high - seen.low) / 2 / max(distance, 1e-9)) ** 2
    if times > 100:
        return "another margin: the cosine lies upon this one"
    return f"about {max(math.ceil(times), 2)} times as many prompts"


def exchanged_p(a: Contrast, b: Contrast, *, draws: int = 2000, seed: int = 0) -> float:
    """One-sided p that a cosine is above those under exchanged labels, noise in common taken off.

    Args:
        a: The first.
        b: The second; labels of prompts that both were read on are exchanged in both at once.
        draws: Of exchanges.
        seed: Of the draws.

    Raises:
        TooFewPromptsError: Both are bare vectors, or a side has fewer than two clusters.
    """
    study = _Study(a, b, _Options({}, {}, None, draws, 2, seed, None))
    exchanged = study.signed_exchanged()
    if exchanged is None:
        raise TooFewPromptsError("two bare vectors have no labels", "give the prompts behind one")
    return null_p(float(study.less_noise(study.plain)[0]), exchanged, side="high")


def compare_layers(
    a: Mapping[Site, Contrast],
    b: Mapping[Site, Contrast],
    *,
    library: Mapping[Site, Mapping[str, Contrast]] | None = None,
    without: Mapping[Site, Mapping[str, Contrast]] | None = None,
    within: Mapping[Site, Float[Tensor, "row d_model"]] | None = None,
    draws: int = 2000,
    splits: int = 100,
    seed: int,
    margin: float | None = None,
    progress: Progress | None = None,
) -> tuple[Comparison, ...]:
    """Compare two contrasts at every site that both have, with family-wise control.

    Labels are exchanged at all sites at once. What is compared is the largest |cosine| over its
    standard deviation under exchange, so that `p_family` holds for all sites together.

    Args:
        a: The first, by site.
        b: The second.
        library: Unrelated contrasts by site.
        without: Others to project out, by site.
        within: Rows for the covariance, by site.
        draws: As for `compare_pair`.
        splits: Likewise.
        seed: Likewise; the same at all sites.
        margin: Likewise.
        progress: Called once per site.

    Returns:
        One row per site, in the order of layers.

    Raises:
        ConfigError: They have no site in common, or prompts are other ones at another site; and
            as for `compare_pair`.

    References:
        Westfall and Young, "Resampling-based multiple testing", 1993 (single-step max-T).
    """
    sites = sorted(set(a) & set(b))
    if not sites:
        raise ConfigError(
            "the two have no site in common", "read both at the same sites, such as 14.resid_pre"
        )
    for side in (a, b):
        groups = {(side[at].positive_clusters, side[at].negative_clusters) for at in sites}
        if len(groups) > 1:
            raise ConfigError(
                f"`{side[sites[0]].name}` has other prompts at other sites",
                "read all sites on the same prompts, in one order",
            )
    found: list[_Full] = []
    for at in sites:
        found.append(
            _compare(
                a[at],
                b[at],
                _Options(
                    (library or {}).get(at, {}),
                    (without or {}).get(at, {}),
                    (within or {}).get(at),
                    draws,
                    splits,
                    seed,
                    margin,
                ),
            )
        )
        if progress is not None:
            progress(1)
    rows = [one.row for one in found]
    drawn = [one.exchanged for one in found if one.exchanged is not None]
    if len(drawn) < len(found):
        return tuple(rows)
    null = np.stack(drawn)
    spread = np.sqrt((null**2).mean(1, keepdims=True))
    largest = (null / spread).max(0)
    return tuple(
        replace(one.row, p_family=null_p(one.seen / float(own), largest, side="high"))
        for one, own in zip(found, spread[:, 0], strict=True)
    )

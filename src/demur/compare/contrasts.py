"""A contrast: a difference of activations with the rows behind it, to be drawn again in many ways.

Everything that geometry needs of a direction is a matter of weights on rows: a bootstrap draw, one
half of the prompts, labels exchanged. All of them are one matrix product here, so that 2,000 draws
cost as much as one pass over the rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from demur.directions import Direction
from demur.errors import ConfigError, NonFiniteError, TooFewPromptsError
from demur.sites import Site

ANSWER = 0
"""Position of what was read as the mean over the tokens of an answer; prompts end at -1."""


@dataclass(frozen=True, slots=True, eq=False)
class Contrast:
    """A difference of two sets of activations at one site and position, or a bare vector.

    Attributes:
        name: As tables call it.
        site: The tensor that was read, or that the vector is meant for.
        position: Token index from the end of the prompt, -1 the last; `ANSWER` for the mean over
            an answer's tokens; None for what is no activation, such as a column of weights, and
            where a file does not say.
        model: Fingerprint of the model that was read; empty where unknown.
        recipe: Where it came from, in words.
        positive: Rows that it points to, float32 or wider, on the CPU; None for a bare vector.
        negative: Rows that it points away from. In pairs, row i belongs to row i of `positive`.
        positive_clusters: What is drawn together: the family of a prompt, the topic of a question.
        negative_clusters: The same for `negative`; in pairs, the same tuple.
        paired: Whether the difference is taken within pairs, so that labels are exchanged there.
        bare: The vector itself where there are no rows, in residual-stream units.
    """

    name: str
    site: Site
    position: int | None
    model: str
    recipe: str
    positive: Float[Tensor, "n d_model"] | None
    negative: Float[Tensor, "m d_model"] | None
    positive_clusters: tuple[Hashable, ...]
    negative_clusters: tuple[Hashable, ...]
    paired: bool
    bare: Float[Tensor, " d_model"] | None

    def __post_init__(self) -> None:
        for rows in (self.positive, self.negative, self.bare):
            if rows is not None and not bool(torch.isfinite(rows).all()):
                raise NonFiniteError(
                    f"the rows of `{self.name}` at {self.site} hold NaN or infinity",
                    "try `--dtype float32`; the checkpoint or the file may also be damaged",
                )
        if self.positive is None or self.negative is None:
            return
        n, m = len(self.positive), len(self.negative)
        if min(n, m) < 2:
            raise TooFewPromptsError(
                f"`{self.name}` has {n} and {m} rows", "give each side two prompts or more"
            )
        if (n, m) != (len(self.positive_clusters), len(self.negative_clusters)):
            raise ConfigError(
                f"`{self.name}` has {n} and {m} rows, and other numbers of clusters",
                "give one cluster for every row",
            )
        if self.paired and self.positive_clusters != self.negative_clusters:
            raise ConfigError(
                f"the pairs of `{self.name}` lie in different clusters",
                "row i of both sides belongs to one item",
            )

    @classmethod
    def of_classes(
        cls,
        name: str,
        positive: Float[Tensor, "n d_model"],
        negative: Float[Tensor, "m d_model"],
        *,
        site: Site,
        position: int | None,
        model: str = "",
        recipe: str = "",
        clusters: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
    ) -> Contrast:
        """The difference of the means of two classes of prompts; see the attributes.

        Args:
            name: As tables call it.
            positive: Rows of the one class.
            negative: Rows of the other.
            site: Where they were read.
            position: At which token.
            model: Fingerprint.
            recipe: Where it came from.
            clusters: Of both sides; None: each prompt by itself.

        Raises:
            TooFewPromptsError: A class has fewer than two rows.
            NonFiniteError: A row holds NaN or infinity.
        """
        one, two = clusters or (
            [(name, "+", i) for i in range(len(positive))],
            [(name, "-", i) for i in range(len(negative))],
        )
        return cls(
            name, site, position, model, recipe, positive, negative, tuple(one), tuple(two), False,
            None,
        )  # fmt: skip

    @classmethod
    def of_pairs(
        cls,
        name: str,
        positive: Float[Tensor, "n d_model"],
        negative: Float[Tensor, "m d_model"],
        *,
        site: Site,
        position: int | None,
        model: str = "",
        recipe: str = "",
        clusters: Sequence[Hashable] | None = None,
    ) -> Contrast:
        """The mean difference within pairs, such as two answers to one question.

        Arguments and errors are those of `of_classes`, with one cluster per pair.
        """
        if len(positive) != len(negative):
            raise ConfigError(
                f"`{name}` has {len(positive)} and {len(negative)} rows", "give rows in pairs"
            )
        each = [(name, i) for i in range(len(positive))]
        own = tuple(each if clusters is None else clusters)
        return cls(
            name, site, position, model, recipe, positive, negative, own, own, True, None
        )  # fmt: skip

    @classmethod
    def of_vector(
        cls,
        name: str,
        vector: Float[Tensor, " d_model"],
        *,
        site: Site,
        position: int | None,
        model: str = "",
        recipe: str = "",
    ) -> Contrast:
        """A vector without the rows behind it: no interval, no reliability, no permutation.

        Raises:
            DegenerateVectorError: The vector is zero.
            NonFiniteError: It holds NaN or infinity.
        """
        found = cls(
            name, site, position, model, recipe, None, None, (), (), False,
            vector.detach().to("cpu", torch.float64),
        )  # fmt: skip
        found.direction()
        return found

    @property
    def has_rows(self) -> bool:
        """Whether it can be drawn again."""
        return self.positive is not None

    @property
    def rows(self) -> tuple[Float[Tensor, "n d_model"], Float[Tensor, "m d_model"]]:
        """Both sides, float64.

        Raises:
            TooFewPromptsError: It is a bare vector.
        """
        if self.positive is None or self.negative is None:
            raise TooFewPromptsError(
                f"`{self.name}` is a vector without the activations it was estimated from",
                "name the prompts instead of the file, and demur reads them on the model",
            )
        return self.positive.double(), self.negative.double()

    @property
    def n(self) -> int:
        """Pairs, or prompts of both classes; 0 for a bare vector."""
        if self.positive is None or self.negative is None:
            return 0
        return len(self.positive) + (0 if self.paired else len(self.negative))

    @property
    def d_model(self) -> int:
        """Width."""
        some = self.bare if self.bare is not None else self.positive
        assert some is not None
        return some.shape[-1]

    def named(self, name: str) -> Contrast:
        """The same under another name."""
        return replace(self, name=name)

    def vector(self) -> Float[Tensor, " d_model"]:
        """The difference, float64, in residual-stream units."""
        if self.bare is not None:
            return self.bare.double()
        positive, negative = self.rows
        return positive.mean(0) - negative.mean(0)

    def direction(self) -> Direction:
        """The same as a `Direction`; what has no position gets `ANSWER`.

        Raises:
            DegenerateVectorError: The difference is zero.
        """
        return Direction.from_vector(
            self.vector(),
            site=self.site,
            position=self.position if self.position is not None else ANSWER,
            recipe=self.recipe or self.name,
        )

    def within(self) -> Float[Tensor, "row d_model"]:
        """Rows centred within their class, float64: their Gram matrix is the scatter within."""
        return torch.cat([side - side.mean(0) for side in self.rows])

    def weighted(
        self, positive: Float[np.ndarray, "draw n"], negative: Float[np.ndarray, "draw m"]
    ) -> Float[Tensor, "draw d_model"]:
        """One difference per draw, of means weighted by it; NaN where a side weighs nothing."""
        out = []
        for rows, weights in zip(self.rows, (positive, negative), strict=True):
            wide = torch.from_numpy(np.ascontiguousarray(weights, dtype=np.float64))
            out.append((wide @ rows) / wide.sum(1, keepdim=True))
        return out[0] - out[1]


Weights = list[Float[np.ndarray, "draw row"] | None]
"""Per contrast, what each row weighs in each draw: those of the positive side, then the others.

The vector of a draw is their sum of rows, so negative rows have negative weights. None for a bare
vector, which is itself in every draw.
"""


def strata(contrasts: Sequence[Contrast]) -> list[list[Hashable]]:
    """Clusters of all contrasts, grouped by the sides of the contrasts in which they occur.

    Raises:
        TooFewPromptsError: A side has fewer than two clusters.
    """
    occurs: dict[Hashable, set[tuple[int, int]]] = {}
    for i, side, clusters in _sides(contrasts):
        if len(set(clusters)) < 2:
            raise TooFewPromptsError(
                f"a side of `{contrasts[i].name}` is a single cluster",
                "give prompts of several families, or questions of several topics",
            )
        for cluster in clusters:
            occurs.setdefault(cluster, set()).add((i, side))
    found: dict[frozenset[tuple[int, int]], list[Hashable]] = {}
    for cluster, where in occurs.items():
        found.setdefault(frozenset(where), []).append(cluster)
    return list(found.values())


def _sides(contrasts: Sequence[Contrast]) -> list[tuple[int, int, tuple[Hashable, ...]]]:
    return [
        (i, side, clusters)
        for i, one in enumerate(contrasts)
        if one.has_rows
        for side, clusters in enumerate((one.positive_clusters, one.negative_clusters))
    ]


def of_clusters(
    contrasts: Sequence[Contrast], times: Mapping[Hashable, Float[np.ndarray, " draw"]]
) -> Weights:
    """Row weights of means in which each cluster counts so many times; zero draws are errors.

    Args:
        contrasts: As elsewhere.
        times: Of every cluster, how often it counts in each draw.

    Raises:
        TooFewPromptsError: In some draw a side weighs nothing.
    """
    out: dict[int, list[np.ndarray]] = {}
    for i, side, clusters in _sides(contrasts):
        counts = np.stack([times[one] for one in clusters], 1)
        total = counts.sum(1, keepdims=True)
        if not (total > 0).all():
            raise TooFewPromptsError(
                f"a draw leaves a side of `{contrasts[i].name}` without prompts",
                "give prompts of more families, or questions of more topics",
            )
        out.setdefault(i, []).append(counts / total * (1 - 2 * side))
    return [np.concatenate(out[i], 1) if i in out else None for i in range(len(contrasts))]


def resampled_weights(contrasts: Sequence[Contrast], *, draws: int, seed: int) -> Weights:
    """Row weights when clusters are drawn with repeats; see `resampled`."""
    rng = np.random.default_rng(seed)
    times: dict[Hashable, np.ndarray] = {}
    for members in strata(contrasts):
        even = np.full(len(members), 1 / len(members))
        counts = rng.multinomial(len(members), even, size=draws).astype(float)
        times.update(zip(members, counts.T, strict=True))
    return of_clusters(contrasts, times)


def permuted_weights(contrasts: Sequence[Contrast], *, draws: int, seed: int) -> Weights:
    """Row weights when labels are exchanged, cluster by cluster; see `permuted`.

    What contrasts have in common is exchanged in all of them at once.
    """
    rng = np.random.default_rng(seed)
    signs: dict[Hashable, np.ndarray] = {}
    for members in strata(contrasts):
        k = len(members)
        even = np.where(np.arange(k) < (k + 1) // 2, 1.0, -1.0)
        turned = rng.permuted(np.tile(even, (draws, 1)), axis=1)
        turned *= rng.choice((-1.0, 1.0), size=(draws, 1))
        signs.update(zip(members, turned.T, strict=True))
    out: dict[int, list[np.ndarray]] = {}
    for i, side, clusters in _sides(contrasts):
        own = np.stack([signs[one] for one in clusters], 1) / len(clusters) * (1 - 2 * side)
        out.setdefault(i, []).append(own - own.mean(1, keepdims=True))
    return [np.concatenate(out[i], 1) if i in out else None for i in range(len(contrasts))]


def halves_weights(
    contrasts: Sequence[Contrast], *, splits: int, seed: int
) -> tuple[Weights, Weights]:
    """Row weights of two random halves of the clusters, the same halves in all contrasts.

    Raises:
        TooFewPromptsError: A side has fewer than four clusters.
    """
    rng = np.random.default_rng(seed)
    for i, _, clusters in _sides(contrasts):
        if len(set(clusters)) < 4:
            raise TooFewPromptsError(
                f"a side of `{contrasts[i].name}` has fewer than four clusters",
                "give more prompts, or questions of more topics",
            )
    first: dict[Hashable, np.ndarray] = {}
    for members in strata(contrasts):
        k = len(members)
        # The odd cluster falls to either half, so that strata of one do not all go to the first.
        larger = k // 2 + (rng.integers(0, 2, size=(splits, 1)) if k % 2 else 0)
        ranks = rng.permuted(np.tile(np.arange(k), (splits, 1)), axis=1)
        first.update(zip(members, (ranks < larger).astype(float).T, strict=True))
    return (
        of_clusters(contrasts, first),
        of_clusters(contrasts, {cluster: 1 - of for cluster, of in first.items()}),
    )


def _vectors(
    contrasts: Sequence[Contrast], weights: Weights, draws: int
) -> list[Float[Tensor, "draw d_model"]]:
    return [
        one.vector().expand(draws, -1)
        if own is None
        else torch.from_numpy(own) @ torch.cat(one.rows)
        for one, own in zip(contrasts, weights, strict=True)
    ]


def resampled(
    contrasts: Sequence[Contrast], *, draws: int, seed: int
) -> list[Float[Tensor, "draw d_model"]]:
    """Draw clusters with repeats, the same ones for all contrasts that have them in common.

    Clusters are drawn within strata: those that occur in the same sides of the same contrasts. So
    no class grows at the other's cost, and what two contrasts share moves both alike.

    Args:
        contrasts: With rows, or bare: a bare vector is itself in every draw.
        draws: How many.
        seed: Of the draws.

    Returns:
        The vectors of each contrast, float64. Draw i of one belongs to draw i of the others.

    Raises:
        TooFewPromptsError: A side has fewer than two clusters.
    """
    return _vectors(contrasts, resampled_weights(contrasts, draws=draws, seed=seed), draws)


def permuted(one: Contrast, *, draws: int, seed: int) -> Float[Tensor, "draw d_model"]:
    """Draw vectors under exchanged labels: what the same rows give where there is no difference.

    Rows are centred within their class, or differences within pairs on their mean; then half of the
    clusters of each class, or half of the pairs, change sides. A free shuffle leaves a share of the
    true difference in every draw, and brought to full length that is the true direction: two
    contrasts with a clear difference would then be no more alike than their own null.

    Contrasts with the same clusters get the same exchanges from the same seed.

    Raises:
        TooFewPromptsError: It is a bare vector, or a side is a single cluster.
    """
    one.rows  # noqa: B018 (raises for a bare vector)
    return _vectors([one], permuted_weights([one], draws=draws, seed=seed), draws)[0]


def halves(
    one: Contrast, *, splits: int, seed: int
) -> tuple[Float[Tensor, "split d_model"], Float[Tensor, "split d_model"]]:
    """The vectors of two random halves of the clusters, `splits` times.

    Raises:
        TooFewPromptsError: It is a bare vector, or a side has fewer than four clusters.
    """
    one.rows  # noqa: B018 (raises for a bare vector)
    first, second = halves_weights([one], splits=splits, seed=seed)
    return _vectors([one], first, splits)[0], _vectors([one], second, splits)[0]


def cosines(
    a: Float[Tensor, "*n d_model"], b: Float[Tensor, "*n d_model"]
) -> Float[np.ndarray, " n"]:
    """Cosine of each row of one with each row of the other; NaN where one of them is zero."""
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    return ((a * b).sum(-1) / torch.where(norms > 0, norms, torch.nan)).reshape(-1).numpy()


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Why two contrasts are not the same kind of thing.

    Attributes:
        what: "base", "site", "position" or "width".
        why: In words, with both values.
        fatal: Whether no cosine can be taken at all.
    """

    what: str
    why: str
    fatal: bool


def mismatches(a: Contrast, b: Contrast) -> tuple[Mismatch, ...]:
    """What keeps two contrasts from being compared as they are; empty where nothing does.

    A vector of unknown base, and a column of weights without a position, are told as such.
    """
    found: list[Mismatch] = []
    if a.d_model != b.d_model:
        found.append(
            Mismatch(
                "width",
                f"{a.name} has {a.d_model} coordinates, {b.name} {b.d_model}: other models",
                True,
            )
        )
    if a.model and b.model and a.model != b.model:
        found.append(
            Mismatch(
                "base",
                f"{a.name} was read on {a.model[:12]}, {b.name} on {b.model[:12]}",
                False,
            )
        )
    elif not (a.model and b.model):
        who = " and ".join(one.name for one in (a, b) if not one.model)
        found.append(
            Mismatch("base", f"the file of {who} does not say which model it is of", False)
        )
    if a.site != b.site:
        found.append(Mismatch("site", f"{a.name} is of {a.site}, {b.name} of {b.site}", True))
    if a.position != b.position:
        found.append(
            Mismatch(
                "position",
                f"{a.name} was read at {place_name(a.position)}, "
                f"{b.name} at {place_name(b.position)}",
                False,
            )
        )
    return tuple(found)


def place_name(position: int | None) -> str:
    """A position in words."""
    if position is None:
        return "no token, or none that its file names"
    if position == ANSWER:
        return "the answer's tokens"
    return f"position {position} of the prompt"

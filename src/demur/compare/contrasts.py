"""A contrast: a difference of activations with the rows behind it, to be drawn again in many ways.

Everything that geometry needs of a direction is a matter of weights on rows: a bootstrap draw, one
half of the prompts, labels exchanged. All of them are one matrix product here, so that 2,000 draws
cost as much as one pass over the rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
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
            an answer's tokens; None for what is no activation, such as a column of weights.
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
            [("+", i) for i in range(len(positive))],
            [("-", i) for i in range(len(negative))],
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
        negative: Float[Tensor, "n d_model"],
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
        own = tuple(clusters) if clusters is not None else tuple(range(len(positive)))
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
    weights = _drawn(contrasts, draws, seed)
    return [
        one.weighted(*weights[i]) if one.has_rows else one.vector().expand(draws, -1)
        for i, one in enumerate(contrasts)
    ]


def _sides(contrasts: Sequence[Contrast]) -> list[tuple[int, int, tuple[Hashable, ...]]]:
    return [
        (i, side, clusters)
        for i, one in enumerate(contrasts)
        if one.has_rows
        for side, clusters in enumerate((one.positive_clusters, one.negative_clusters))
    ]


def _drawn(
    contrasts: Sequence[Contrast], draws: int, seed: int
) -> dict[int, tuple[Float[np.ndarray, "draw n"], Float[np.ndarray, "draw m"]]]:
    rng = np.random.default_rng(seed)
    occurs: dict[Hashable, set[tuple[int, int]]] = {}
    for i, side, clusters in _sides(contrasts):
        if len(set(clusters)) < 2:
            raise TooFewPromptsError(
                f"a side of `{contrasts[i].name}` is a single cluster",
                "give prompts of several families, or questions of several topics",
            )
        for cluster in clusters:
            occurs.setdefault(cluster, set()).add((i, side))
    strata: dict[frozenset[tuple[int, int]], list[Hashable]] = {}
    for cluster, where in occurs.items():
        strata.setdefault(frozenset(where), []).append(cluster)
    times: dict[Hashable, Int[np.ndarray, " draw"]] = {}
    for members in strata.values():
        counts = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=draws)
        times.update(zip(members, counts.T, strict=True))
    out: dict[int, list[np.ndarray]] = {}
    for i, _, clusters in _sides(contrasts):
        out.setdefault(i, []).append(np.stack([times[one] for one in clusters], 1).astype(float))
    return {i: (both[0], both[1]) for i, both in out.items()}


def permuted(one: Contrast, *, draws: int, seed: int) -> Float[Tensor, "draw d_model"]:
    """Draw vectors under exchanged labels.

    Within pairs, signs are flipped cluster by cluster. Between classes, clusters of both change
    sides, as many as there were; a cluster with rows on both sides keeps them together, and its two
    sides are exchanged.

    Raises:
        TooFewPromptsError: It is a bare vector.
    """
    rng = np.random.default_rng(seed)
    positive, negative = one.rows
    if one.paired:
        keys = list(dict.fromkeys(one.positive_clusters))
        index = np.array([keys.index(c) for c in one.positive_clusters])
        signs = rng.choice((-1.0, 1.0), size=(draws, len(keys)))[:, index]
        return torch.from_numpy(signs) @ (positive - negative) / len(positive)
    rows = torch.cat([positive, negative])
    every = (*one.positive_clusters, *one.negative_clusters)
    labels = np.array([True] * len(positive) + [False] * len(negative))
    own, other = set(one.positive_clusters), set(one.negative_clusters)
    both = own & other
    single = [c for c in dict.fromkeys(every) if c not in both]
    starts_positive = np.array([c in own for c in single], dtype=bool)
    mixed = list(dict.fromkeys(c for c in every if c in both))
    place = {c: i for i, c in enumerate(single)}
    turned = {c: i for i, c in enumerate(mixed)}
    out = torch.empty(draws, rows.shape[1], dtype=torch.float64)
    for draw in range(draws):
        moved = rng.permutation(starts_positive)
        flips = rng.integers(0, 2, size=len(mixed)).astype(bool)
        new = np.array(
            [
                moved[place[c]] if c in place else label ^ flips[turned[c]]
                for c, label in zip(every, labels, strict=True)
            ],
            dtype=bool,
        )
        if new.all() or not new.any():
            new = labels
        mask = torch.from_numpy(new)
        out[draw] = rows[mask].mean(0) - rows[~mask].mean(0)
    return out


def halves(
    one: Contrast, *, splits: int, seed: int
) -> tuple[Float[Tensor, "split d_model"], Float[Tensor, "split d_model"]]:
    """The vectors of two random halves of the clusters, `splits` times.

    Raises:
        TooFewPromptsError: It is a bare vector, or a side has fewer than four clusters.
    """
    rng = np.random.default_rng(seed)
    one.rows  # noqa: B018 (raises for a bare vector)
    sides = (one.positive_clusters, one.negative_clusters)
    if min(len(set(side)) for side in sides) < 4:
        raise TooFewPromptsError(
            f"a side of `{one.name}` has fewer than four clusters",
            "give more prompts, or questions of more topics",
        )
    masks: list[list[Bool[np.ndarray, " row"]]] = [[], []]
    shared = set(sides[0]) & set(sides[1])
    strata = [
        [c for c in dict.fromkeys(sides[0]) if c not in shared],
        [c for c in dict.fromkeys(sides[1]) if c not in shared],
        [c for c in dict.fromkeys(sides[0]) if c in shared],
    ]
    for _ in range(splits):
        first: set[Hashable] = set()
        for members in strata:
            order = rng.permutation(len(members))
            first |= {members[i] for i in order[: (len(members) + 1) // 2]}
        for side, clusters in enumerate(sides):
            masks[side].append(np.array([c in first for c in clusters], dtype=bool))
    chosen = [np.stack(side).astype(float) for side in masks]
    return (
        one.weighted(chosen[0], chosen[1]),
        one.weighted(1 - chosen[0], 1 - chosen[1]),
    )


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
        return "no token (it is a weight)"
    if position == ANSWER:
        return "the answer's tokens"
    return f"position {position} of the prompt"

"""Harmfulness and refusal apart: what each position of the prompt groups by, and both directions.

Prompts fall into four groups by what they ask and by what the model does. Where the two agree
(harmful and refused, harmless and accepted) nothing can be told apart; the other two groups say
whether a position carries harmfulness or refusal.

References:
    Zhao, Huang, Wu, Bau, Shi 2025, arXiv:2507.11878.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from demur.errors import ConfigError, NonFiniteError, TooFewPromptsError
from demur.stats import Estimate, auroc, bootstrap_groups, mean, null_p

Space = Literal["raw", "centred", "whitened"]
SPACES: tuple[Space, ...] = ("raw", "centred", "whitened")
_NOTHING = 1e-9  # Costs below are rounding.


class Group(StrEnum):
    """What a prompt asks, and what the model does."""

    HARMFUL_REFUSED = "harmful-refused"
    HARMFUL_ACCEPTED = "harmful-accepted"
    HARMLESS_REFUSED = "harmless-refused"
    HARMLESS_ACCEPTED = "harmless-accepted"

    @classmethod
    def of(cls, *, harmful: bool, refused: bool) -> Group:
        """The group of a prompt."""
        side = "harmful" if harmful else "harmless"
        return cls(f"{side}-{'refused' if refused else 'accepted'}")

    @property
    def harmful(self) -> bool:
        """Whether its prompts ask for something harmful."""
        return self in {Group.HARMFUL_REFUSED, Group.HARMFUL_ACCEPTED}

    @property
    def refused(self) -> bool:
        """Whether the model refuses them."""
        return self in {Group.HARMFUL_REFUSED, Group.HARMLESS_REFUSED}


Vectors = Mapping[Group, Float[Tensor, "_ d_model"]]  # Groups differ in size.


def _mean(vectors: Vectors, group: Group) -> Tensor:
    rows = vectors.get(group)
    if rows is None or not len(rows):
        raise TooFewPromptsError(
            f"no prompt is {group}", "add prompts of that kind, or leave this question out"
        )
    return rows.double().mean(0)


@dataclass(frozen=True, slots=True, eq=False)
class Clusters:
    """Two centroids, in a space, and how near a vector is to the first rather than the second.

    Attributes:
        refused: Centroid of what is harmful and refused, (d_model,).
        accepted: Centroid of what is harmless and accepted, (d_model,).
        origin: Subtracted from every vector; zero in the raw space.
        whiten: Applied to what is left, (d_model, d_model); None in the raw and centred spaces.
    """

    refused: Float[Tensor, " d_model"]
    accepted: Float[Tensor, " d_model"]
    origin: Float[Tensor, " d_model"]
    whiten: Float[Tensor, "d_model d_model"] | None

    @classmethod
    def fit(cls, vectors: Vectors, space: Space, *, ridge: float = 0.1) -> Clusters:
        """Centroids of the two groups in which harm and refusal agree.

        Args:
            vectors: At least those two groups; what else is there is not used.
            space: "raw" as in the paper; "centred" takes away the mean of the two centroids, which
                dominates raw cosines; "whitened" also brings the pooled covariance to the identity.
            ridge: For "whitened": added to the covariance, as a fraction of its mean variance.

        Raises:
            TooFewPromptsError: One of the two groups is empty, or too small to whiten.
        """
        one = _mean(vectors, Group.HARMFUL_REFUSED)
        two = _mean(vectors, Group.HARMLESS_ACCEPTED)
        if space == "raw":
            return cls(one, two, torch.zeros_like(one), None)
        origin, whiten = (one + two) / 2, None
        if space == "whitened":
            sides = [
                vectors[group].double() - centre
                for group, centre in ((Group.HARMFUL_REFUSED, one), (Group.HARMLESS_ACCEPTED, two))
            ]
            rows = torch.cat(sides)
            if len(rows) < 4:
                raise TooFewPromptsError(
                    f"{len(rows)} prompts have no covariance", "give each group two or more"
                )
            pooled = rows.T @ rows / (len(rows) - 2)
            pooled.diagonal().add_(ridge * pooled.diagonal().mean())
            values, basis = torch.linalg.eigh(pooled)
            whiten = (basis * values.clamp(min=1e-30).rsqrt()) @ basis.T
        centred = [
            centre - origin if whiten is None else whiten @ (centre - origin)
            for centre in (one, two)
        ]
        return cls(centred[0], centred[1], origin, whiten)

    def score(self, rows: Float[Tensor, "prompt d_model"]) -> Float[Tensor, " prompt"]:
        """Cosine to the first centroid minus cosine to the second, between -2 and 2."""
        wide = rows.double() - self.origin
        if self.whiten is not None:
            wide = wide @ self.whiten
        unit = torch.nn.functional.normalize(wide, dim=1)
        sides = torch.nn.functional.normalize(torch.stack([self.refused, self.accepted]), dim=1)
        near = unit @ sides.T
        return near[:, 0] - near[:, 1]


@dataclass(frozen=True, slots=True)
class Grouping:
    """What one site and position groups prompts by, on prompts that no centroid was fitted on.

    Attributes:
        by: AUROC of the score, harmful and accepted above harmless and refused: 1 where the
            position groups by harmfulness, 0 where by refusal, 0.5 where by neither or both. None
            where one of the two groups is empty.
        harm: AUROC of harmful above harmless among prompts that the model treats alike, averaged
            over refused and accepted ones where both can be computed; None where neither can.
        refusal: AUROC of refused above accepted among prompts that are alike in harm, likewise.
        means: Mean score of each group.
    """

    by: Estimate | None
    harm: Estimate | None
    refusal: Estimate | None
    means: Mapping[Group, Estimate]


def grouping(clusters: Clusters, vectors: Vectors, *, seed: int = 0, draws: int = 300) -> Grouping:
    """Score held-out prompts of all groups; see `Grouping`.

    Intervals are Newcombe's for one AUROC, Student's for means, and for averages of AUROCs
    bootstrapped over prompts, each group for itself.
    """
    scores = {
        group: clusters.score(rows).numpy() for group, rows in vectors.items() if len(rows) > 0
    }

    def between(above: Group, below: Group) -> tuple[np.ndarray, np.ndarray] | None:
        if above not in scores or below not in scores:
            return None
        return scores[above], scores[below]

    mixed = between(Group.HARMFUL_ACCEPTED, Group.HARMLESS_REFUSED)
    harm = [
        between(Group.HARMFUL_REFUSED, Group.HARMLESS_REFUSED),
        between(Group.HARMFUL_ACCEPTED, Group.HARMLESS_ACCEPTED),
    ]
    refusal = [
        between(Group.HARMFUL_REFUSED, Group.HARMFUL_ACCEPTED),
        between(Group.HARMLESS_REFUSED, Group.HARMLESS_ACCEPTED),
    ]
    return Grouping(
        _auroc(mixed) if mixed is not None else None,
        _average([pair for pair in harm if pair is not None], seed, draws),
        _average([pair for pair in refusal if pair is not None], seed, draws),
        {group: mean(own) for group, own in scores.items() if len(own) > 1},
    )


def _auroc(pair: tuple[np.ndarray, np.ndarray]) -> Estimate:
    above, below = pair
    return auroc(np.concatenate([above, below]), [1] * len(above) + [0] * len(below))


def _wins(above: np.ndarray, below: np.ndarray) -> Float[np.ndarray, "above below"]:
    """By pair, 1 where the first is higher, one half where both are equal."""
    return (np.sign(above[:, None] - below[None, :]) + 1) / 2


def _average(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], seed: int, draws: int
) -> Estimate | None:
    usable = [pair for pair in pairs if min(map(len, pair)) > 1]
    if not usable:
        return _auroc(pairs[0]) if pairs else None
    if len(usable) == 1:
        return _auroc(usable[0])
    sizes = [len(side) for pair in usable for side in pair]
    wins = [_wins(*pair) for pair in usable]

    def areas(*index: np.ndarray) -> float:
        # How often each prompt was drawn: all pairs are compared once, not in every draw.
        times = [np.bincount(rows, minlength=n) for rows, n in zip(index, sizes, strict=True)]
        found = [times[2 * i] @ own @ times[2 * i + 1] / own.size for i, own in enumerate(wins)]
        return float(np.mean(found))

    return bootstrap_groups(areas, sizes, seed=seed, draws=draws)


# Directions -----------------------------------------------------------------------------------


def balanced_difference(
    vectors: Vectors, what: Literal["harm", "refusal"], *, least: int = 5
) -> tuple[Float[Tensor, " d_model"], bool]:
    """Difference of means along one of the two, with the other held equal.

    Args:
        vectors: By group.
        what: "harm": harmful minus harmless, averaged over refused and accepted prompts;
            "refusal": refused minus accepted, averaged over harmful and harmless ones.
        least: A group with fewer prompts is not used.

    Returns:
        The vector in residual-stream units, float64; and whether it is balanced. Where one half has
        too few prompts it is the other half's difference alone; where both have, harmful-refused
        minus harmless-accepted, in which harm and refusal cannot be told apart.

    Raises:
        TooFewPromptsError: Not even that can be had.
    """
    one, two = Group.HARMFUL_REFUSED, Group.HARMLESS_ACCEPTED
    harmful, harmless = Group.HARMFUL_ACCEPTED, Group.HARMLESS_REFUSED
    halves = (
        ((one, harmless), (harmful, two)) if what == "harm" else ((one, harmful), (harmless, two))
    )
    sizes = {group: len(vectors.get(group, ())) for group in Group}
    found = [
        _mean(vectors, above) - _mean(vectors, below)
        for above, below in halves
        if min(sizes[above], sizes[below]) >= least
    ]
    if not found:
        return _mean(vectors, one) - _mean(vectors, two), False
    return torch.stack(found).mean(0), len(found) == 2


@dataclass(frozen=True, slots=True)
class Angle:
    """The cosine of the harm direction and the refusal direction, beside what chance gives.

    Attributes:
        cosine: Of the two directions, with a bootstrap interval over prompts.
        harm_balanced: Whether refusal was held equal for the harm direction.
        refusal_balanced: Whether harm was held equal for the refusal direction.
        shuffled: 95 % band of the cosine with the groups' labels shuffled among the prompts: what
            two positions of the same prompts share anyway.
        matched: The same of two vectors drawn with the positions' covariances.
        p_shuffled: Two-sided p of the cosine among the shuffled ones.
    """

    cosine: Estimate
    harm_balanced: bool
    refusal_balanced: bool
    shuffled: tuple[float, float]
    matched: tuple[float, float]
    p_shuffled: float


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def angle(
    at_inst: Vectors, at_post: Vectors, *, seed: int, draws: int = 200, least: int = 5
) -> Angle:
    """Compare the harm direction at one position with the refusal direction at another.

    Args:
        at_inst: Vectors at the last instruction token, by group.
        at_post: Vectors of the same prompts in the same order after the instruction.
        seed: Of resamples, shuffles and draws.
        draws: How many of each.
        least: See `balanced_difference`.

    Raises:
        TooFewPromptsError: No harmful prompt is refused, or no harmless one accepted.
        ConfigError: The two do not hold the same prompts.
    """
    here = [group for group in Group if len(at_inst.get(group, ())) > 1]
    sizes = [len(at_inst[group]) for group in here]
    if [len(at_post.get(group, ())) for group in here] != sizes:
        raise ConfigError("the two positions do not hold the same prompts", "read both in one pass")
    inst = {group: at_inst[group].double() for group in here}
    post = {group: at_post[group].double() for group in here}

    def both(first: Vectors, second: Vectors) -> float:
        harm, _ = balanced_difference(first, "harm", least=least)
        refusal, _ = balanced_difference(second, "refusal", least=least)
        return _cosine(harm, refusal)

    def resampled(*index: np.ndarray) -> float:
        rows = {group: torch.from_numpy(own) for group, own in zip(here, index, strict=True)}
        return both(
            {group: inst[group][rows[group]] for group in here},
            {group: post[group][rows[group]] for group in here},
        )

    drawn_cosine = bootstrap_groups(resampled, sizes, draws=draws, seed=seed)
    # Resampling adds noise, which turns two vectors apart: percentiles lie below the value and may
    # not even hold it. Their width, about the value, tells what is wanted.
    value, half = drawn_cosine.value, (drawn_cosine.high - drawn_cosine.low) / 2
    cosine = Estimate(
        value,
        max(-1.0, value - half),
        min(1.0, value + half),
        drawn_cosine.n,
        f"{drawn_cosine.method}, about the value",
    )
    rng = torch.Generator().manual_seed(seed)
    pool = torch.cat([inst[group] for group in here]), torch.cat([post[group] for group in here])
    shuffled, matched = [], []
    spreads = [rows - rows.mean(0) for rows in pool]
    for _ in range(draws):
        order = torch.randperm(len(pool[0]), generator=rng).split(sizes)
        sides = [dict(zip(here, [rows[own] for own in order], strict=True)) for rows in pool]
        shuffled.append(both(sides[0], sides[1]))
        drawn = [
            spread.T @ torch.randn(len(spread), generator=rng, dtype=torch.float64)
            for spread in spreads
        ]
        matched.append(_cosine(drawn[0], drawn[1]))
    return Angle(
        cosine,
        balanced_difference(inst, "harm", least=least)[1],
        balanced_difference(post, "refusal", least=least)[1],
        _band(shuffled),
        _band(matched),
        null_p(cosine.value, shuffled, side="two"),
    )


def _band(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


# Beliefs --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Belief:
    """How much nearer a prompt is to one class's centroid than to the other's, over layers.

    Attributes:
        above: Centroids of the class that scores high, (layer, d_model).
        below: Centroids of the other.
        origin: Subtracted from every vector, (layer, d_model).
    """

    above: Float[Tensor, "layer d_model"]
    below: Float[Tensor, "layer d_model"]
    origin: Float[Tensor, "layer d_model"]

    @classmethod
    def fit(
        cls,
        above: Float[Tensor, "layer n d_model"],
        below: Float[Tensor, "layer m d_model"],
        *,
        centred: bool = False,
    ) -> Belief:
        """Centroids of two classes at each layer; `centred` takes away the mean of the two.

        Raises:
            TooFewPromptsError: A class is empty.
        """
        if not above.shape[1] or not below.shape[1]:
            raise TooFewPromptsError(
                f"got {above.shape[1]} prompts above and {below.shape[1]} below",
                "give each class one or more",
            )
        one, two = above.double().mean(1), below.double().mean(1)
        origin = (one + two) / 2 if centred else torch.zeros_like(one)
        return cls(one - origin, two - origin, origin)

    def __call__(self, rows: Float[Tensor, "layer prompt d_model"]) -> Float[Tensor, " prompt"]:
        """Mean over layers of cos(h, above) - cos(h, below), between -2 and 2."""
        wide = rows.double() - self.origin.unsqueeze(1)
        cosine = torch.nn.functional.cosine_similarity
        near = cosine(wide, self.above.unsqueeze(1), dim=2)
        far = cosine(wide, self.below.unsqueeze(1), dim=2)
        return (near - far).mean(0)


# Equal cost -----------------------------------------------------------------------------------


def strength_at(
    cost: Callable[[float], float],
    target: float,
    *,
    most: float = 8.0,
    passes: int = 6,
    near: float = 0.05,
) -> float:
    """How strong an edit must be to cost as much as another one.

    Args:
        cost: Of a strength, such as KL in nats; taken to rise from nothing at 0. May be infinite.
        target: What it should cost, in the same unit.
        most: The highest strength tried.
        passes: `cost` is called so often at most.
        near: The search ends where cost and target differ by this factor, in natural logs.

    Returns:
        The strength, of those tried, whose cost is nearest to the target; `most` where that is
        still too weak. 0 where the target is nothing.

    Raises:
        NonFiniteError: The target, or the cost of a strength, is NaN.
    """
    if math.isnan(target):
        raise NonFiniteError("the cost to match is NaN", "measure it on prompts of finite logits")
    if target < _NOTHING:
        return 0.0
    low, high = 0.0, math.inf  # Too weak, too strong.
    tried: list[tuple[float, float]] = []  # Strengths, and how far off they were in logs.
    strength, power = min(1.0, most), 2.0  # Small edits cost their square in KL.
    for _ in range(passes):
        spent = cost(strength)
        if math.isnan(spent):
            raise NonFiniteError(
                f"at strength {strength:g} the edit's cost is NaN", "load the model in float32"
            )
        off = math.log(max(spent, _NOTHING) / target)
        if strength == most and off < 0:
            return most
        if abs(off) <= near:
            return strength
        low, high = (strength, high) if off < 0 else (low, strength)
        if tried and math.isfinite(off - tried[-1][1]):
            other, before = tried[-1]
            power = min(max((off - before) / math.log(strength / other), 0.5), 10.0)
        tried.append((strength, off))
        guess = min(strength * math.exp(-off / power), most)
        strength = guess if low < guess < high else (low + high) / 2
    return min(tried, key=lambda one: abs(one[1]))[0]

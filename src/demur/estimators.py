"""Estimators: from two sets of activations to the vector that points from one to the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from demur.activations import Activations, Moments, PointMoments
from demur.directions import Direction
from demur.errors import DegenerateVectorError, NonFiniteError, TooFewPromptsError
from demur.registry import Registry


@runtime_checkable
class Estimator(Protocol):
    """Estimates the vector that points from `negative` to `positive`."""

    def __call__(
        self, positive: Float[Tensor, "n d_model"], negative: Float[Tensor, "m d_model"]
    ) -> Float[Tensor, " d_model"]:
        """One row per prompt, in residual-stream units; float64 out."""
        ...


@runtime_checkable
class StreamingEstimator(Estimator, Protocol):
    """An estimator for which moments are enough, so that rows need not be kept.

    Attributes:
        covariance: Whether it looks at the covariance; if not, reading means alone is faster.
    """

    covariance: ClassVar[bool]

    def from_moments(
        self, positive: PointMoments, negative: PointMoments
    ) -> Float[Tensor, " d_model"]:
        """The same estimate from moments; equal to `__call__` on the rows behind them."""
        ...


estimators: Registry[Estimator] = Registry("estimator")


def _need(n: int, m: int, least: int) -> None:
    if min(n, m) < least:
        raise TooFewPromptsError(
            f"got {n} and {m} prompts", f"give each class {least} or more for this estimator"
        )


@estimators.register("difference-of-means")
@dataclass(frozen=True, slots=True)
class DifferenceOfMeans:
    """Mean of one class minus mean of the other, in residual-stream units.

    References:
        Arditi et al. 2024, arXiv:2406.11717, section 2.3.
    """

    covariance: ClassVar[bool] = False

    def __call__(
        self, positive: Float[Tensor, "n d_model"], negative: Float[Tensor, "m d_model"]
    ) -> Float[Tensor, " d_model"]:
        """Estimate; raises TooFewPromptsError on an empty class."""
        _need(len(positive), len(negative), 1)
        return positive.double().mean(0) - negative.double().mean(0)

    def from_moments(
        self, positive: PointMoments, negative: PointMoments
    ) -> Float[Tensor, " d_model"]:
        """The same from means."""
        return positive.mean - negative.mean


@estimators.register("whitened-difference")
@dataclass(frozen=True, slots=True)
class WhitenedDifference:
    """Difference of means, discounted where both classes vary anyway.

    Attributes:
        ridge: Added to the pooled covariance, as a fraction of its mean variance. Towards
            infinity this becomes the plain difference of means, up to length.

    References:
        Fisher, "The use of multiple measurements in taxonomic problems", 1936.
    """

    covariance: ClassVar[bool] = True
    ridge: float = 1e-1

    def __call__(
        self, positive: Float[Tensor, "n d_model"], negative: Float[Tensor, "m d_model"]
    ) -> Float[Tensor, " d_model"]:
        """Estimate, in inverse residual-stream units: only its direction means anything.

        Raises:
            TooFewPromptsError: A class has one row or none, so it has no covariance.
        """
        _need(len(positive), len(negative), 2)
        return self.from_moments(PointMoments.of(positive), PointMoments.of(negative))

    def from_moments(
        self, positive: PointMoments, negative: PointMoments
    ) -> Float[Tensor, " d_model"]:
        """The same from moments, by the Woodbury identity on the rows of the scatter matrix."""
        _need(positive.n, negative.n, 2)
        if not len(positive.spread) or not len(negative.spread):
            raise TooFewPromptsError(
                "the moments hold means without covariance", "read them with `rank` above 0"
            )
        freedom = positive.n + negative.n - 2
        rows = torch.cat([positive.spread, negative.spread]) / freedom**0.5
        width = rows.shape[1]
        variance = (positive.total + negative.total) / freedom / width
        if not variance > 0.0:
            raise DegenerateVectorError(
                "the activations do not vary at all", "are all prompts the same?"
            )
        ridge = self.ridge * variance
        difference = positive.mean - negative.mean
        # (R^T R + ridge I)^-1 v = (v - R^T (R R^T + ridge I)^-1 R v) / ridge
        inner = rows @ rows.T
        inner.diagonal().add_(ridge)
        return (difference - rows.T @ torch.linalg.solve(inner, rows @ difference)) / ridge


@estimators.register("logistic-probe")
@dataclass(frozen=True, slots=True)
class LogisticProbe:
    """Weights of a ridge logistic regression on standardised activations.

    Attributes:
        strength: Inverse regularisation, scikit-learn's `C`.
    """

    strength: float = 1e-2

    def __call__(
        self, positive: Float[Tensor, "n d_model"], negative: Float[Tensor, "m d_model"]
    ) -> Float[Tensor, " d_model"]:
        """Estimate, in inverse residual-stream units: only its direction means anything.

        Raises:
            TooFewPromptsError: A class has one row or none.
        """
        from sklearn.linear_model import LogisticRegression

        _need(len(positive), len(negative), 2)
        rows = torch.cat([positive, negative]).double()
        # One scale for all axes: scaling each axis by itself would turn the direction away from
        # the axes of the stream in which edits act.
        centre = rows.mean(0)
        scale = (rows - centre).pow(2).mean().sqrt()
        labels = [1] * len(positive) + [0] * len(negative)
        probe = LogisticRegression(
            C=self.strength, max_iter=5000, tol=1e-8, class_weight="balanced"
        )
        probe.fit(((rows - centre) / scale).numpy(), labels)
        return torch.from_numpy(probe.coef_[0]).double()


@estimators.register("leading-difference")
@dataclass(frozen=True, slots=True)
class LeadingDifference:
    """Leading principal direction of the differences between random pairs, signed to the mean.

    Pairs are drawn without a seed that matters: row i of the longer class meets row i modulo the
    length of the shorter, and all rows take part.

    References:
        Zou et al. 2023, arXiv:2310.01405 (representation engineering, pairwise PCA).
    """

    def __call__(
        self, positive: Float[Tensor, "n d_model"], negative: Float[Tensor, "m d_model"]
    ) -> Float[Tensor, " d_model"]:
        """Estimate, of the length of the mean difference's projection on it."""
        _need(len(positive), len(negative), 2)
        n = max(len(positive), len(negative))
        index = torch.arange(n)
        pairs = positive.double()[index % len(positive)] - negative.double()[index % len(negative)]
        # Uncentred: the mean of the differences is the signal, not a nuisance.
        _, _, axes = torch.linalg.svd(pairs, full_matrices=False)
        along = float(pairs.mean(0) @ axes[0])
        return axes[0] * along


def _mean(side: PointMoments | Tensor) -> Float[Tensor, " d_model"]:
    return side.mean if isinstance(side, PointMoments) else side.double().mean(0)


def _estimate(
    estimator: Estimator, a: PointMoments | Tensor, b: PointMoments | Tensor
) -> Float[Tensor, " d_model"]:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return estimator(a, b)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        raise TooFewPromptsError("one class came as rows, the other as moments", "read both alike")
    if not isinstance(estimator, StreamingEstimator):
        raise TooFewPromptsError(
            f"{type(estimator).__name__} needs the rows, not their moments",
            "read them with `collect`",
        )
    return estimator.from_moments(a, b)


def candidates(
    positive: Moments | Activations,
    negative: Moments | Activations,
    estimator: Estimator,
    *,
    recipe: Mapping[str, Any] | str = "",
) -> list[Direction]:
    """One direction for each site and position at which the classes differ.

    A point where they do not differ at all is left out: at block 0, a template token's activation
    is the same for every prompt. So is one where the estimate points against the mean difference.

    Raises:
        TooFewPromptsError: The estimator needs rows and was given moments.
        DegenerateVectorError: The classes differ nowhere.
        NonFiniteError: Activations of a class, or what the estimator made of them, hold NaN or
            infinity.
    """
    found: list[Direction] = []
    for site in positive.sites:
        for position in positive.positions:
            a, b = positive.at(site, position), negative.at(site, position)
            high, low = _mean(a), _mean(b)
            difference = high - low
            if not bool(torch.isfinite(difference).all()):
                raise NonFiniteError(
                    f"activations at {site}, position {position}, hold NaN or infinity",
                    "try `--dtype float32`; the checkpoint may also be damaged",
                )
            if float(difference.norm()) <= 1e-6 * float(low.norm()):
                continue
            unit = torch.nn.functional.normalize(_estimate(estimator, a, b), dim=0)
            # The length that means something is the mean difference's along the direction: what
            # it takes to carry one class's mean to the other's.
            along = float(difference @ unit)
            if math.isnan(along):
                raise NonFiniteError(
                    f"{type(estimator).__name__} gives NaN at {site}, position {position}",
                    "take another estimator, or more prompts",
                )
            if along > 0.0:
                found.append(
                    Direction.from_vector(
                        unit * along, site=site, position=position, recipe=str(recipe)
                    )
                )
    if not found:
        raise DegenerateVectorError(
            "the two prompt sets differ at no site and position",
            "do they hold the same prompts? `demur prompts overlap A B` lists them",
        )
    return found

"""A detector of harmful requests that reads the model itself, at a promised false-alarm rate.

The threshold is set by split conformal prediction: for benign requests that are exchangeable with
the calibration ones, the share of false alarms is at most alpha. It says nothing about what an
adversary sends, nor about benign traffic of another kind.

References:
    Zhao, Huang, Wu, Bau, Shi 2025, arXiv:2507.11878 (Latent Guard: the reading position).
    Vovk, Gammerman, Shafer 2005; Vovk 2012 (split conformal prediction and its training-conditional
    law).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from demur.errors import ConfigError, NonFiniteError, TooFewPromptsError
from demur.stats import Values


@dataclass(frozen=True, slots=True)
class Threshold:
    """A conformal threshold: a request whose score lies above it raises the alarm.

    Attributes:
        value: Of the score.
        alpha: Bound on the share of false alarms, on average over calibration sets.
        n: Benign requests that it was calibrated on.
        exceeded: How many of them lie above it.
        bound: With 95 % confidence over calibration sets, the share of false alarms is below this.
    """

    value: float
    alpha: float
    n: int
    exceeded: int
    bound: float


def false_alarm_bound(n: int, exceeded: int, *, level: float = 0.95) -> float:
    """Upper confidence bound on a threshold's false-alarm rate, given its calibration set.

    The rate of a threshold that `exceeded` of `n` calibration scores pass is distributed as
    Beta(exceeded + 1, n - exceeded).
    """
    from scipy.stats import beta

    return float(beta.ppf(level, exceeded + 1, n - exceeded))


def calibrate(scores: Values, alpha: float) -> Threshold:
    """The lowest threshold that keeps the false-alarm rate at `alpha` or below.

    Args:
        scores: Of benign requests that nothing was fitted or chosen on; higher is more harmful.
        alpha: False alarms allowed, as a share of benign requests, above 0 and below 1.

    Raises:
        ConfigError: `alpha` is no share.
        TooFewPromptsError: There are too few scores to promise `alpha` at all.
        NonFiniteError: A score is NaN.
    """
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha is {alpha}", "give a share of false alarms, such as 0.05")
    values = np.sort(np.asarray(scores, dtype=np.float64))
    if np.isnan(values).any():
        raise NonFiniteError(
            f"{int(np.isnan(values).sum())} of {len(values)} calibration scores are NaN",
            "find out which prompts they are: the guard cannot judge them",
        )
    n = len(values)
    # The tolerance keeps 0.05 * 20 from counting as 20.000000000000004 %.
    k = math.ceil((1 - alpha) * (n + 1) - 1e-9)
    if k > n:
        raise TooFewPromptsError(
            f"{n} calibration prompts cannot promise {alpha:g} false alarms",
            f"give at least {math.ceil(1 / alpha - 1 - 1e-9)}, or allow more",
        )
    exceeded = n - k
    return Threshold(float(values[k - 1]), alpha, n, exceeded, false_alarm_bound(n, exceeded))


def calibrate_strata(
    strata: Mapping[str, Values], alpha: float
) -> tuple[Threshold, Mapping[str, Threshold]]:
    """One threshold that keeps `alpha` in every stratum: the highest of theirs.

    Args:
        strata: Scores of benign requests by kind: plain ones, lookalikes, those in wrappers.
        alpha: As for `calibrate`, in each stratum.

    Returns:
        The threshold with the stratum's numbers that decided it, and each stratum's own.

    Raises:
        TooFewPromptsError: There is no stratum, or one is too small.
    """
    if not strata:
        raise TooFewPromptsError("there is nothing to calibrate on", "give benign prompts")
    own = {name: calibrate(scores, alpha) for name, scores in strata.items()}
    return max(own.values(), key=lambda one: one.value), own


@dataclass(frozen=True, slots=True, eq=False)
class Fisher:
    """A linear read in standard deviations of benign requests.

    Attributes:
        weight: (d_model,), float64.
        mean: Of its product with benign vectors.
        spread: Standard deviation of the same.
    """

    weight: Float[Tensor, " d_model"]
    mean: float
    spread: float

    @classmethod
    def fit(
        cls,
        harmful: Float[Tensor, "n d_model"],
        benign: Float[Tensor, "m d_model"],
        *,
        ridge: float = 0.1,
    ) -> Fisher:
        """Shrinkage Fisher direction, whitened by the benign covariance alone.

        What varies among benign requests anyway counts little; what varies among harmful ones is
        not held against the read.

        Args:
            harmful: One row per request.
            benign: The same.
            ridge: Added to the covariance, as a fraction of its mean variance.

        Raises:
            TooFewPromptsError: A class has fewer than two rows.
        """
        if min(len(harmful), len(benign)) < 2:
            raise TooFewPromptsError(
                f"got {len(harmful)} harmful and {len(benign)} benign requests",
                "give each two or more",
            )
        pos, neg = harmful.double(), benign.double()
        spread = neg.T.cov()
        spread.diagonal().add_(ridge * spread.diagonal().mean())
        weight = torch.linalg.solve(spread, pos.mean(0) - neg.mean(0))
        scores = neg @ weight
        return cls(weight, float(scores.mean()), float(scores.std()))

    def __call__(self, rows: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row"]:
        """How far rows lie from benign ones, in their standard deviations."""
        return (rows.double() @ self.weight - self.mean) / self.spread

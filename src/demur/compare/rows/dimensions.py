"""How many directions carry refusal, as far as interventions can tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from demur.stats import Estimate

Claim = Literal["one direction is enough", "several directions", "undetermined"]


@dataclass(frozen=True, slots=True)
class Dimension:
    """What one more direction does on held-out prompts, beyond those found before it.

    Attributes:
        k: From 1.
        method: How it was found.
        site: Where it was read.
        position: Token index from the end of the prompt.
        change: Of the refusal log-odds of harmful prompts when the first k directions are ablated
            at every write, less the same with k - 1; nats, below 0 where refusal falls. Paired by
            prompt; the interval draws clusters.
        share: `change` over that of the first direction.
        null_changes: The same change with a random direction in place of the k-th: with the
            covariance of activations within the classes, orthogonal to those before it.
        p: One-sided, that a random one lowers refusal as much.
        auroc: Of the coordinate along it alone, harmful above harmless, on the model with the first
            k - 1 ablated.
        auroc_unedited: The same on the unedited model.
        kl: On harmless prompts with the first k ablated, nats at the next token.
        log_odds: Mean refusal log-odds of harmful prompts with the first k ablated.
        refusing: Share of harmful prompts whose reply more likely than not begins with a refusal
            token, with the first k ablated.
        counts: Whether it does more than random ones, the interval of `change` is below 0, and it
            is needed: a quarter of the first one's effect, or more than a fifth of the refusals
            are left without it.
        reason: Why.
    """

    k: int
    method: str
    site: str
    position: int
    change: Estimate
    share: float
    null_changes: tuple[float, ...]
    p: float
    auroc: Estimate
    auroc_unedited: Estimate
    kl: Estimate
    log_odds: Estimate
    refusing: Estimate
    counts: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Independence:
    """Whether ablating one direction leaves another one's coordinate alone.

    Attributes:
        ablated: Number of the direction that was ablated, from 1.
        read: Number of the one that was looked at.
        change: Mean over harmful prompts and layers of how far the cosine between the stream and
            the direction that is looked at moves.
        independence: 1 - `change`; 1 where nothing moves.
        null_changes: The same with random directions ablated.
        p: One-sided, that a random one moves it as much.
        independent: Whether p is above 0.05, that is, nothing beyond a random ablation is seen.
    """

    ablated: int
    read: int
    change: float
    independence: float
    null_changes: tuple[float, ...]
    p: float
    independent: bool


@dataclass(frozen=True, slots=True)
class Cone:
    """The claim on the number of directions, and whether mixtures of them act alike.

    Attributes:
        claim: "several directions" where more than one counts.
        k: Directions that count, in a row from the first.
        reason: Why.
        n: Held-out harmful prompts.
        before: Share of them that the unedited model refuses, as in `Dimension.refusing`.
        samples: Random mixtures with weights above 0 that were tried; 0 for less than two
            directions, of which there is no mixture.
        bypass_mean: Mean over mixtures of the change of refusal log-odds as the one mixed direction
            is ablated, nats.
        bypass_worst: That of the mixture that does least.
        bypass_p: One-sided, of the worst one against random directions.
        induce_mean: Mean change on harmless prompts as the mixture is added, at the length of the
            first direction, nats.
        induce_worst: The least of them.
        induce_p: One-sided, of the worst one against random directions of that length.
        is_cone: Whether the worst mixture still does more than random ones, both ways.
    """

    claim: Claim
    k: int
    reason: str
    n: int
    before: Estimate
    samples: int
    bypass_mean: float | None
    bypass_worst: float | None
    bypass_p: float | None
    induce_mean: float | None
    induce_worst: float | None
    induce_p: float | None
    is_cone: bool | None

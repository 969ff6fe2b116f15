"""One direction in several checkpoints of a base, and whether it was projected out of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from demur.stats import Estimate

Test = Literal[
    "any direction",
    "this direction",
    "any direction, with the base",
    "this direction, with the base",
]
Verdict = Literal["projected out", "no sign of it", "undetermined"]


@dataclass(frozen=True, slots=True)
class Across:
    """The same contrast of the same prompts at the same site of a base and of another checkpoint.

    Attributes:
        base: Name of the base.
        model: Name of the other checkpoint.
        site: The tensor that was read in both.
        position: Token index from the end of the prompt; None for a weight.
        cosine: Of the two vectors, -1..1; the interval draws clusters, the same in both. Both were
            read on the same prompts, so that their errors hang together and raise it.
        corrected: Cosine across disjoint halves of the clusters, over the geometric mean of both
            split-half cosines: what it would be with all prompts there are. Noise can carry it past
            1. None where a split-half cosine is not above 0.
        base_reliability: Cosine of the base's vector with that of as many other prompts, from
            split halves by the Spearman-Brown formula.
        model_reliability: The same of the other checkpoint.
        null_high: 95% quantile of the cosine with labels exchanged on either side, the larger one.
        p: One-sided, the largest one of both sides and of labels exchanged on both at once, less
            the noise that the same prompts bring to both vectors.
        p_holm: The same, corrected over all rows of the comparison.
        length_ratio: Length of the checkpoint's vector over that of the base's.
        positive_moved: How far the prompts that the direction points to lie further along the
            base's unit direction than in the base, in units of the base's gap between the classes.
            Each prompt is read along the direction of the clusters that it does not belong to.
        negative_moved: The same of the other class.
        gap_change: Of the gap between the classes, in the same units: -1 where it is gone.
        n: Prompts of both classes.
    """

    base: str
    model: str
    site: str
    position: int | None
    cosine: Estimate
    corrected: float | None
    base_reliability: float
    model_reliability: float
    null_high: float
    p: float
    p_holm: float
    length_ratio: float
    positive_moved: Estimate
    negative_moved: Estimate
    gap_change: Estimate
    n: int


@dataclass(frozen=True, slots=True)
class Projected:
    """One test of whether a direction was projected out of what a checkpoint writes.

    Attributes:
        test: Which one.
        model: Name of the checkpoint.
        base: Name of the base; None for a test that needs none.
        direction: Name of the direction that was given; None where one was searched for.
        statistic: Without a base, the mean over writers of the log energy along the direction, 0
            for the average direction (natural log, lower is emptier). With a base, the share of
            the write along the direction that is gone: 1 for a whole projection, 0.5 for a half.
        null_low: 2.5% quantile of the statistic under the null.
        null_high: 97.5% quantile.
        null: What the null is, in words.
        n_null: Draws, or other directions.
        p: Of the null that is hardest to reject; None where nothing could be tested.
        margin: Without a base, the statistic less that of the emptiest other direction, in nats.
            With one, the statistic less the largest one of the null.
        count: How many directions were found empty; None where one was given.
        explained: With a base, the share of the change of weights that lies along the direction.
        writers: How many weights were looked at.
        empty_layers: Layers where a weight's energy along it is below a twentieth of the average.
        looked_at: Which weights, and what was left out.
        verdict: "undetermined" where numbers point both ways, or nothing could be tested.
        reason: Why.
    """

    test: Test
    model: str
    base: str | None
    direction: str | None
    statistic: float | None
    null_low: float | None
    null_high: float | None
    null: str
    n_null: int
    p: float | None
    margin: float | None
    count: int | None
    explained: float | None
    writers: int
    empty_layers: tuple[int, ...]
    looked_at: str
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class Detection:
    """How often a test said "projected out" of checkpoints whose history is known.

    Attributes:
        test: Which one.
        kind: What was done to the checkpoints, "all" for all of that side.
        edited: Whether a direction had been projected out of them.
        found: Share called "projected out", with Wilson's interval: the false-alarm rate of
            untouched ones, the power on edited ones.
        undetermined: How many were left open.
    """

    test: Test
    kind: str
    edited: bool
    found: Estimate
    undetermined: int

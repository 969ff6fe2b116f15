"""Latents as a detector of harmful requests, beside dense probes, the direction and words."""

from __future__ import annotations

from dataclasses import dataclass

from demur.stats import Estimate


@dataclass(frozen=True, slots=True)
class Detector:
    """One detector on held-out requests.

    Attributes:
        name: What it is.
        reads: Where: a site, or "text".
        inputs: How many numbers a request is judged by.
        auroc: Harmful above harmless requests.
        tpr_at_1: Share of harmful requests above the lowest threshold that at most 1 % of the
            harmless ones of the same test pass; None where there are fewer than 100 of these.
        tpr_at_5: The same at 5 %; None below 20.
        threshold: Of its score, set on the calibration split by conformal prediction; None where
            that split is too small for `alpha`.
        alpha: Share of false alarms that the threshold promises for requests like the harmless ones
            it was set on.
        caught: Share of held-out harmful requests above the threshold; None without one.
        false_alarms: The same of held-out harmless requests; None likewise.
        lookalike_alarms: The same of lookalikes, which nothing was promised of; None without.
        lookalike_auroc: Harmful requests above lookalikes; None without these.
    """

    name: str
    reads: str
    inputs: int
    auroc: Estimate
    tpr_at_1: Estimate | None
    tpr_at_5: Estimate | None
    threshold: float | None
    alpha: float
    caught: Estimate | None
    false_alarms: Estimate | None
    lookalike_alarms: Estimate | None
    lookalike_auroc: Estimate | None


@dataclass(frozen=True, slots=True)
class Rivalry:
    """A detector of latents against another one, on the same requests.

    Attributes:
        latents: Name of the detector of latents.
        rival: Name of the other.
        difference: AUROC of the latents less that of the rival, above 0 where latents are better;
            both resampled with the same requests.
        lookalikes: The same with lookalikes in place of harmless requests; None without these.
        verdict: "latents win", "latents lose" or "no difference shown", by `difference`.
    """

    latents: str
    rival: str
    difference: Estimate
    lookalikes: Estimate | None
    verdict: str


@dataclass(frozen=True, slots=True)
class WrapperCatch:
    """How detectors fare where held-out requests are wrapped.

    Attributes:
        family: Of wrappers.
        detector: Its name.
        caught: Share of wrapped harmful requests above the threshold; None without one.
        control: The same in controls of the same structure without the pressure.
        false_alarms: Share of wrapped harmless requests above it.
        auroc: Wrapped harmful above wrapped harmless requests.
    """

    family: str
    detector: str
    caught: Estimate | None
    control: Estimate | None
    false_alarms: Estimate | None
    auroc: Estimate


@dataclass(frozen=True, slots=True)
class SiteSensor:
    """How well the latents of one bank, and a dense probe at the same site, tell requests apart.

    Attributes:
        site: Where the bank reads.
        latents: Numbers of those that were taken, in the bank.
        fitted: AUROC of the latents' regression within the fit split, in folds: sites are chosen by
            it.
        latent: AUROC of the same on the test split.
        dense: AUROC of a regression on the stream itself, on the test split.
    """

    site: str
    latents: tuple[int, ...]
    fitted: float
    latent: Estimate
    dense: Estimate


@dataclass(frozen=True, slots=True)
class SensorReport:
    """What latents tell of a request before the model replies.

    Attributes:
        model: Name.
        site: The site that was chosen, on the fit split.
        latents: The latents that were taken there, on the fit split.
        weights: Of the regression on activations in standard deviations, above 0 where a latent
            speaks for harm.
        sizes: Prompts by split and class, such as "fit harmful".
        detectors: The two of latents first.
        rivalries: Each of those against every other detector.
        wrappers: By family and detector.
        sites: Every site, in the model's order.
        earliest: The first site whose latents are, on the fit split, within 0.02 of the best
            site's AUROC.
        text: What it comes to; it says where latents lose.
        notes: What a reader should know.
        seed: Of resamples.
    """

    model: str
    site: str
    latents: tuple[int, ...]
    weights: tuple[float, ...]
    sizes: dict[str, int]
    detectors: tuple[Detector, ...]
    rivalries: tuple[Rivalry, ...]
    wrappers: tuple[WrapperCatch, ...]
    sites: tuple[SiteSensor, ...]
    earliest: str
    text: tuple[str, ...]
    notes: tuple[str, ...]
    seed: int

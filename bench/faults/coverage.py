"""`python -m bench.faults.coverage`: do intervals cover, tests err and gates alarm as they say?

Every kind of interval, test and threshold of demur is run on data whose truth is known, drawn anew
2,000 times in shapes that audits meet: few prompts, rates near 0 and 1, ties, heavy tails, topics
of unequal size, pairs, unequal classes, directions with more coordinates than prompts. demur's own
functions are called; nothing of them is written again here. Bootstraps inside take 600 draws,
slow ones 200 or 100.

What counts as right was set down first. With a Monte Carlo interval of 95 % (Wilson) around it:

- an interval fails if its coverage is clearly below the nominal one less 0.02;
- a test fails if its size is clearly above 0.065 at 0.05, and above 0.016 at 0.01;
- a threshold fails if its false-alarm rate is clearly above its bound plus 0.005.

"approximate" marks a setting in which the estimates themselves say so in their method, in two draws
of five or more: they may fail there.
Status 1 if anything else fails.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from demur.stats import Estimate, proportion

Rng = np.random.Generator
What = Literal["interval", "test", "alarm"]
Draw = Callable[[Rng], "bool | float | None"]
"""One draw: whether an interval holds the truth, a test rejects, the share of false alarms; None
where demur refuses to give a figure, which is counted."""

INNER = 200
_LOSS = 0.02
_SIZES = {0.05: 0.065, 0.01: 0.016}
_ALARMS = 0.005


@dataclass(frozen=True)
class Setting:
    """One shape of data under one kind; `nominal` is the coverage, size or bound promised."""

    kind: str
    where: str
    what: What
    name: str
    nominal: float
    draw: Draw


@dataclass(frozen=True)
class Found:
    """What 2,000 draws said of a setting; `said` counts draws whose method says "approximate"."""

    kind: str
    where: str
    what: What
    setting: str
    nominal: float
    rate: float
    low: float
    high: float
    n: int
    refused: int
    said: float
    seconds: float

    @property
    def verdict(self) -> str:
        """Within tolerance, "approximate" where the method says so, or what is wrong."""
        if self.n < 2:
            return "no figure"
        if self.what == "interval":
            bad = self.high < self.nominal - _LOSS
        elif self.what == "test":
            bad = self.low > _SIZES.get(self.nominal, self.nominal + 0.015)
        else:
            bad = self.low > self.nominal + _ALARMS
        if not bad:
            return "yes"
        return "approximate" if self.said >= 0.4 else "NO"

    def __str__(self) -> str:
        rate = f"{self.rate:.3f} [{self.low:.3f}, {self.high:.3f}]"
        more = f", {self.refused} refused" if self.refused else ""
        return (
            f"{self.kind} | {self.where} | {self.setting} | {self.nominal:g} | {rate}{more} | "
            f"{self.verdict}"
        )


Make = Callable[[], Iterator[tuple[str, Draw]]]
_KINDS: list[tuple[str, str, What, float, Make]] = []
_SAID: list[bool] = []  # Whether the last draw's method said that it is approximate.


def kind(name: str, where: str, what: What, nominal: float) -> Callable[[Make], None]:
    """Register a function that yields settings; a name that begins "@0.01 " has its own nominal."""

    def register(make: Make) -> None:
        _KINDS.append((name, where, what, nominal, make))

    return register


def holds(found: Estimate | None, truth: float) -> bool | None:
    """Whether an interval holds the truth, up to rounding."""
    if found is None:
        return None
    _SAID.append("approximate" in found.method)
    return found.low - 1e-9 <= truth <= found.high + 1e-9


# Shapes ------------------------------------------------------------------------------------------


def normal(rng: Rng, n: int) -> np.ndarray:
    return rng.standard_normal(n)


def heavy(rng: Rng, n: int) -> np.ndarray:
    return rng.standard_t(3, n)


def skewed(rng: Rng, n: int) -> np.ndarray:
    """Like divergences: positive, a few of them large."""
    return rng.lognormal(0.0, 1.0, n) - math.exp(0.5)


def tied(rng: Rng, n: int) -> np.ndarray:
    return np.round(rng.standard_normal(n))


SHAPES: dict[str, Callable[[Rng, int], np.ndarray]] = {
    "normal": normal,
    "t of 3": heavy,
    "lognormal": skewed,
    "ties": tied,
}
N = (8, 20, 40, 64, 120)


def topics(n_groups: int, sizes: Sequence[int] = (2, 3, 4, 12)) -> list[tuple[str, str]]:
    """Domain and topic of each row, in topics of unequal size."""
    each = list(islice(cycle(sizes), n_groups))
    return [("d", str(i)) for i, size in enumerate(each) for _ in range(size)]


def of_topics(rng: Rng, groups: Sequence[Any], shape: Callable[[Rng, int], np.ndarray] = normal):  # noqa: ANN201
    """Values around 0 of which half of the variance is their topic's."""
    code = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    own = shape(rng, len(code))[[code[group] for group in groups]]
    return (own + shape(rng, len(groups))) / 2**0.5


# Shares ------------------------------------------------------------------------------------------


@kind("share, Wilson", "stats.proportion: rates of refusal, alarms, attacks", "interval", 0.95)
def _shares() -> Iterator[tuple[str, Draw]]:
    for n in N:
        for p in (0.02, 0.1, 0.5, 0.97):

            def draw(rng: Rng, n: int = n, p: float = p) -> bool | None:
                return holds(proportion(int(rng.binomial(n, p)), n), p)

            # At 0.17 / n, where a single hit just excludes the share: see `proportion`.
            worst = "@0.85 " if n * p < 0.2 else ""
            yield f"{worst}n={n}, share {p:g}", draw


@kind(
    "change of a share, Newcombe",
    "stats.paired_share_change: legs, evals, harden",
    "interval",
    0.95,
)
def _share_changes() -> Iterator[tuple[str, Draw]]:
    from demur.stats import paired_share_change

    for n in (8, 20, 64, 120):
        for name, (both, lost, won) in {
            "0.95 to 0.05": (0.04, 0.91, 0.01),
            "0.5 to 0.4": (0.35, 0.15, 0.05),
            "0.02 to 0.05": (0.01, 0.01, 0.04),
            "none": (0.3, 0.1, 0.1),
        }.items():

            def draw(
                rng: Rng, n: int = n, cells: tuple[float, ...] = (both, lost, won)
            ) -> bool | None:
                at = rng.choice(4, n, p=[*cells, 1 - sum(cells)])
                before, after = (at == 0) | (at == 1), (at == 0) | (at == 2)
                return holds(paired_share_change(before, after), cells[2] - cells[1])

            # See `paired_share_change`.
            worst = "@0.9 " if n == 8 and name == "0.95 to 0.05" else ""
            yield f"{worst}n={n}, {name}", draw


@kind("share over topics", "em.margin.grouped_share: protocol, dimensions", "interval", 0.95)
def _topic_shares() -> Iterator[tuple[str, Draw]]:
    from demur.em.margin import grouped_share

    for n_groups in (5, 8, 20, 40):
        groups = topics(n_groups)
        code = np.unique([int(g) for _, g in groups], return_inverse=True)[1]
        for p in (0.05, 0.5):

            def draw(
                rng: Rng, n: int = n_groups, p: float = p, groups: Any = groups, code: Any = code
            ) -> bool | None:
                own = rng.beta(4 * p, 4 * (1 - p), n)[code]
                return holds(grouped_share(rng.random(len(own)) < own, groups), p)

            yield f"{n_groups} topics, share {p:g}", draw


@kind("share over requests and attacks", "pipeline.battery", "interval", 0.95)
def _attack_shares() -> Iterator[tuple[str, Draw]]:
    from demur.pipeline.battery import _clustered

    for n in (8, 20, 64):
        for p in (0.05, 0.5):

            def draw(rng: Rng, n: int = n, p: float = p) -> bool | None:
                own = rng.beta(2 * p, 2 * (1 - p), n)
                return holds(_clustered(rng.random((n, 9)) < own[:, None]), p)

            # See `grouped_share`.
            worst = "@0.93 " if (n, p) == (20, 0.05) else ""
            yield f"{worst}{n} requests of 9 attacks, share {p:g}", draw


# Means -------------------------------------------------------------------------------------------


@kind("mean, Student t", "stats.mean: log-odds, KL, margins, losses", "interval", 0.95)
def _means() -> Iterator[tuple[str, Draw]]:
    from demur.stats import mean

    for n in N:
        for name, shape in SHAPES.items():
            yield f"n={n}, {name}", lambda rng, n=n, shape=shape: holds(mean(shape(rng, n)), 0.0)


@kind("paired change, Student t", "stats.paired_change: log-odds, losses", "interval", 0.95)
def _changes() -> Iterator[tuple[str, Draw]]:
    from demur.stats import paired_change

    for n in (8, 20, 64):
        for name, shape in SHAPES.items():

            def draw(rng: Rng, n: int = n, shape: Any = shape) -> bool | None:
                before = 3 * rng.standard_normal(n)
                return holds(paired_change(before, before + 0.5 + shape(rng, n)), 0.5)

            yield f"n={n}, {name}", draw


@kind("perplexity ratio, exp of t", "causal.NeutralText.ratio, dose, em.effects", "interval", 0.95)
def _perplexity() -> Iterator[tuple[str, Draw]]:
    import torch
    from tests.tiny import tiny_model

    from demur.causal import NeutralText

    model = tiny_model()  # Not run: losses are drawn.

    for n in (8, 24, 48):

        def draw(rng: Rng, n: int = n) -> bool | None:
            plain = 3 + 0.4 * rng.standard_normal(n)
            moved = plain + 0.05 + 0.05 * heavy(rng, n)
            text = NeutralText.__new__(NeutralText)
            text.model = model
            text.plain = torch.from_numpy(plain)
            text._losses = lambda: torch.from_numpy(moved)
            return holds(text.ratio(), math.exp(0.05))

        yield f"{n} paragraphs, t of 3", draw


@kind("mean over topics", "em.margin.grouped_mean: margins, effects, compare", "interval", 0.95)
def _topic_means() -> Iterator[tuple[str, Draw]]:
    from demur.em.margin import grouped_mean

    for n_groups in (2, 3, 5, 8, 12, 20, 40):
        groups = topics(n_groups)
        for name in ("normal", "lognormal") if n_groups in (5, 12, 40) else ("normal",):

            def draw(rng: Rng, groups: Any = groups, shape: Any = SHAPES[name]) -> bool | None:
                return holds(
                    grouped_mean(of_topics(rng, groups, shape), groups, seed=0, draws=600), 0.0
                )

            # See `grouped_mean`; of more topics the method says so.
            worst = "@0.91 " if name == "lognormal" and n_groups == 5 else ""
            yield f"{worst}{n_groups} topics of 2 to 12, {name}", draw
    groups = topics(6, (8,))
    yield (
        "6 topics of 8, normal",
        lambda rng: holds(grouped_mean(of_topics(rng, groups), groups, seed=0, draws=600), 0.0),
    )


@kind("difference in differences", "em.margin.difference_in_differences", "interval", 0.95)
def _did() -> Iterator[tuple[str, Draw]]:
    from demur.em.margin import difference_in_differences

    for n_groups in (6, 20):
        groups = topics(n_groups)

        def draw(rng: Rng, groups: Any = groups) -> bool | None:
            base = of_topics(rng, groups)
            bad, good = base + 0.3 + of_topics(rng, groups), base + 0.1 + of_topics(rng, groups)
            found = difference_in_differences(
                bad, good, base_bad=base, groups=groups, seed=0, draws=600
            )
            return holds(found, 0.2)

        yield f"{n_groups} topics", draw


@kind("power of the smallest effect shown", "em.margin.detectable", "interval", 0.8)
def _power() -> Iterator[tuple[str, Draw]]:
    """A true mean of that size should be told from 0 in 80 % of experiments."""
    from demur.em.margin import detectable, grouped_mean

    for n_groups in (8, 20, 40):
        groups = topics(n_groups, (4,))

        def draw(rng: Rng, groups: Any = groups) -> bool | None:
            size = detectable(of_topics(rng, groups), groups)
            # What is foretold from one experiment is tried in another one.
            seen = grouped_mean(of_topics(rng, groups) + size, groups, seed=0, draws=600)
            return seen.low > 0

        # See `detectable`.
        worst = "@0.7 " if n_groups == 8 else ""
        yield f"{worst}{n_groups} topics of 4", draw


# Ratios ------------------------------------------------------------------------------------------


@kind("any statistic, bootstrap: mean", "stats.bootstrap", "interval", 0.95)
def _bootstrap() -> Iterator[tuple[str, Draw]]:
    from demur.stats import bootstrap

    for n in (8, 12, 20, 40, 120):
        for name in ("normal", "lognormal"):

            def draw(rng: Rng, n: int = n, shape: Any = SHAPES[name]) -> bool | None:
                x = shape(rng, n)
                return holds(bootstrap(lambda i: float(x[i].mean()), n, draws=600, seed=0), 0.0)

            yield f"n={n}, {name}", draw


@kind("ratio of sums", "features.sanity._ratio: FVU, cosines, L0, training", "interval", 0.95)
def _ratios() -> Iterator[tuple[str, Draw]]:
    import torch

    from demur.features import sanity

    sanity._DRAWS = 600
    for n in (8, 20, 64):

        def draw(rng: Rng, n: int = n) -> bool | None:
            size = rng.gamma(4.0, 1.0, n)
            share = rng.beta(2, 8, n)
            found = sanity._ratio(torch.from_numpy(size * share), torch.from_numpy(size), 0)
            return holds(found, 0.2)

        yield f"{n} prompts", draw


@kind("ratio of two effects", "hydra.stages.ratio: self-repair", "interval", 0.95)
def _effects() -> Iterator[tuple[str, Draw]]:
    from demur.hydra import stages

    stages._DRAWS = INNER
    for n in (8, 20, 64):
        for mean in (1.0, 0.5):

            def draw(rng: Rng, n: int = n, mean: float = mean) -> bool | None:
                below = mean + rng.standard_normal(n)
                above = 0.3 * below + 0.3 * rng.standard_normal(n)
                return holds(stages.ratio(above, below, seed=0)[0], 0.3)

            yield f"n={n}, direct effect of {mean:g} spreads", draw


@kind("share of an effect that is gone", "em.effects.share_removed, transfer", "interval", 0.95)
def _removed() -> Iterator[tuple[str, Draw]]:
    from demur.em.effects import share_removed

    for n_groups in (6, 12, 40):
        groups = topics(n_groups)

        def draw(rng: Rng, groups: Any = groups) -> bool | None:
            before = 1.5 + of_topics(rng, groups)
            after = 0.4 * before + 0.5 * of_topics(rng, groups)
            return holds(share_removed(before, after, groups, seed=0, draws=INNER)[0], 0.6)

        yield f"{n_groups} topics", draw


@kind("share of the refusal gap", "features.minimal: bootstrap_stratified", "interval", 0.95)
def _gap_share() -> Iterator[tuple[str, Draw]]:
    from demur.stats import bootstrap_stratified

    for n, m in ((12, 12), (40, 20)):

        def draw(rng: Rng, n: int = n, m: int = m) -> bool | None:
            plain, base = 3 + rng.standard_normal(n), -1 + rng.standard_normal(m)
            effect = -(1 + 0.3 * (plain - 3) + 0.5 * rng.standard_normal(n))
            found = bootstrap_stratified(
                lambda i, j: float(-effect[i].mean() / (plain[i].mean() - base[j].mean())),
                n, m, draws=INNER, seed=0,
            )  # fmt: skip
            return holds(found, 0.25)

        yield f"{n} and {m} prompts", draw


@kind("change of a rate over questions", "em.protocol.rate_change", "interval", 0.95)
def _rate_changes() -> Iterator[tuple[str, Draw]]:
    from demur.em.margin import by_group

    for n in (8, 24):

        def draw(rng: Rng, n: int = n) -> bool | None:
            p = rng.beta(1, 6, n)
            scored = rng.integers(8, 20, (2, n))
            hits = np.stack([rng.binomial(scored[0], p), rng.binomial(scored[1], p)])

            def change(rows: np.ndarray) -> float:
                (a, b), (m, k) = hits[:, rows].sum(1), scored[:, rows].sum(1)
                return float(a / m - b / k)

            return holds(by_group(change, list(range(n)), seed=0, draws=INNER), 0.0)

        yield f"{n} questions of 8 to 20 answers", draw


# Ranks, areas, agreement -------------------------------------------------------------------------


@cache
def _binormal(shift: float, spread: float) -> float:
    from scipy.stats import norm

    return float(norm.cdf(shift / math.hypot(1.0, spread)))


@kind("AUROC, Newcombe", "stats.auroc: readings, probes, guard, gates", "interval", 0.95)
def _areas() -> Iterator[tuple[str, Draw]]:
    from demur.stats import auroc

    for n, m in ((8, 8), (20, 20), (64, 64), (40, 8), (120, 20)):
        for shift, spread in ((0.0, 1.0), (1.2, 1.0), (3.0, 1.0), (1.2, 2.0)):

            def draw(
                rng: Rng, n: int = n, m: int = m, shift: float = shift, spread: float = spread
            ) -> bool | None:
                scores = np.r_[shift + spread * rng.standard_normal(n), rng.standard_normal(m)]
                truth = _binormal(shift, spread)
                return holds(auroc(scores, np.r_[np.ones(n), np.zeros(m)]), truth)

            yield f"{n} and {m}, shift {shift:g}, spread {spread:g}", draw

    def ties(rng: Rng) -> bool | None:
        scores = np.r_[rng.binomial(3, 0.6, 30), rng.binomial(3, 0.3, 30)]
        a, b = (
            np.array([math.comb(3, k) * p**k * (1 - p) ** (3 - k) for k in range(4)])
            for p in (0.6, 0.3)
        )
        truth = float(sum(a[i] * (b[:i].sum() + b[i] / 2) for i in range(4)))
        return holds(auroc(scores, np.r_[np.ones(30), np.zeros(30)]), truth)

    yield "30 and 30, four values", ties


@kind("difference of AUROCs", "features.sensor.auroc_difference", "interval", 0.95)
def _area_gaps() -> Iterator[tuple[str, Draw]]:
    from demur.features.sensor import auroc_difference

    for n, m in ((12, 12), (40, 20)):

        def draw(rng: Rng, n: int = n, m: int = m) -> bool | None:
            common = [rng.standard_normal(k) for k in (n, m)]
            one, two = (
                (shift + common[0] + rng.standard_normal(n), common[1] + rng.standard_normal(m))
                for shift in (2.5, 1.5)
            )
            truth = _area_of(2.5) - _area_of(1.5)
            return holds(auroc_difference(one, two, seed=0, draws=100), truth)

        yield f"{n} and {m}", draw


def _area_of(shift: float) -> float:
    return _binormal(shift / 2**0.5, 1.0)


@kind("AUROC over topics", "em.judging, em.adapter probes: by_group", "interval", 0.95)
def _topic_areas() -> Iterator[tuple[str, Draw]]:
    from demur.em.judging import grouped_auroc

    for n_groups in (6, 12, 40):
        groups = [("d", str(i)) for i in range(n_groups) for _ in range(6)]
        sound = np.tile([True, False], 3 * n_groups)
        # One pair in `n_groups` is of one topic, and differs less.
        within, between = _binormal(1.2 / 0.5**0.5, 1.0), _binormal(1.2, 1.0)
        truth = (within + (n_groups - 1) * between) / n_groups

        def draw(
            rng: Rng, groups: Any = groups, sound: Any = sound, truth: float = truth
        ) -> bool | None:
            scores = of_topics(rng, groups) + 1.2 * sound
            return holds(grouped_auroc(scores, sound, groups, seed=0, draws=INNER), truth)

        yield f"{n_groups} topics of 6", draw


@kind("average of two AUROCs", "separation.grouping", "interval", 0.95)
def _average_areas() -> Iterator[tuple[str, Draw]]:
    from demur.separation import _average

    for sizes in ((30, 30, 30, 30), (40, 6, 8, 40)):

        def draw(rng: Rng, sizes: Any = sizes) -> bool | None:
            sides = [
                shift + rng.standard_normal(n) for shift, n in zip((1, 0, 1, 0), sizes, strict=True)
            ]
            pairs = [(sides[0], sides[1]), (sides[2], sides[3])]
            return holds(_average(pairs, 0, 100), _binormal(1.0, 1.0))

        yield f"groups of {', '.join(map(str, sizes))}", draw


@kind("recall at a false-alarm rate", "features.sensor.rate_at", "interval", 0.95)
def _recall() -> Iterator[tuple[str, Draw]]:
    from scipy.stats import norm

    from demur.features.sensor import rate_at

    for n, m in ((40, 40), (64, 120)):

        def draw(rng: Rng, n: int = n, m: int = m) -> bool | None:
            pos, neg = 2 + rng.standard_normal(n), rng.standard_normal(m)
            return holds(
                rate_at(pos, neg, 0.05, seed=0, draws=INNER), float(norm.sf(norm.isf(0.05) - 2))
            )

        yield f"{n} and {m}, 5 %", draw


@kind("Cohen's kappa", "stats.cohen_kappa: judges in the battery", "interval", 0.95)
def _kappas() -> Iterator[tuple[str, Draw]]:
    from demur.stats import cohen_kappa

    yield from islice(_rated(lambda a, b: cohen_kappa(a, b, draws=100)), 1, 5, 2)


@kind("Cohen's kappa, judge and people", "evals.judges.agreement", "interval", 0.95)
def _judge_kappas() -> Iterator[tuple[str, Draw]]:
    from demur.evals.judges import _kappa

    yield from _rated(
        lambda a, b: _kappa([*map(str, a)], [*map(str, b)], seed=0, resamples=INNER, level=0.95)
    )


def _rated(kappa: Callable[[list[int], list[int]], Estimate]) -> Iterator[tuple[str, Draw]]:
    for n, p, error in (
        (20, 0.5, 0.1),
        (40, 0.5, 0.1),
        (101, 0.5, 0.15),
        (40, 0.85, 0.05),
        (101, 0.9, 0.02),
    ):

        def draw(rng: Rng, n: int = n, p: float = p, error: float = error) -> bool | None:
            from demur.errors import TooFewPromptsError

            a = rng.random(n) < p
            b = a ^ (rng.random(n) < error)
            q = p * (1 - error) + (1 - p) * error
            chance = p * q + (1 - p) * (1 - q)
            try:
                return holds(
                    kappa(a.astype(int).tolist(), b.astype(int).tolist()), 1 - error / (1 - chance)
                )
            except TooFewPromptsError:
                return None

        yield f"n={n}, share {p:g}, {error:.0%} apart", draw


@kind("rank correlation over units", "features.verify, compare.patching", "interval", 0.95)
def _ranks() -> Iterator[tuple[str, Draw]]:
    from demur.features import verify

    verify._DRAWS = 100
    for n, rho in ((12, 0.7), (40, 0.7)):

        def draw(rng: Rng, n: int = n, rho: float = rho) -> bool | None:
            x = rng.standard_normal(n)
            y = rho * x + (1 - rho**2) ** 0.5 * rng.standard_normal(n)
            found = verify.agreement_row(x, y, n, seed=0)
            # Spearman's of a normal pair.
            return holds(_first_estimate(found), 6 / math.pi * math.asin(rho / 2))

        yield f"{n} units, rho {rho:g}", draw


def _first_estimate(row: Any) -> Estimate | None:
    return next(v for k in row.__dataclass_fields__ if isinstance(v := getattr(row, k), Estimate))


@kind("correlation over topics", "em.adapter: scalars and coordinates", "interval", 0.95)
def _correlations() -> Iterator[tuple[str, Draw]]:
    from demur.em.adapter import _correlated

    for n_groups in (6, 12, 40):
        groups = topics(n_groups)
        for rho in (0.0, 0.6):

            def draw(rng: Rng, groups: Any = groups, rho: float = rho) -> bool | None:
                x, y = of_topics(rng, groups), of_topics(rng, groups)
                y = rho * x + (1 - rho**2) ** 0.5 * y
                return holds(_correlated(x, y, groups, seed=0, draws=INNER), rho)

            yield f"{n_groups} topics, rho {rho:g}", draw


@kind("mean cosine of pairs of seeds", "sweep.table.spread", "interval", 0.95)
def _spreads() -> Iterator[tuple[str, Draw]]:
    from demur.sweep.table import spread

    for k in (3, 5, 8):

        def draw(rng: Rng, k: int = k) -> bool | None:
            units = 1 + 0.6 * rng.standard_normal((k, 32))
            units /= np.linalg.norm(units, axis=1, keepdims=True)
            pairs = [(i, j, float(units[i] @ units[j])) for i in range(k) for j in range(i)]
            return holds(spread(pairs), _seed_cosine())

        yield f"{k} seeds", draw


@cache
def _seed_cosine() -> float:
    rng = np.random.default_rng(1)
    units = 1 + 0.6 * rng.standard_normal((2, 200_000, 32))
    units /= np.linalg.norm(units, axis=2, keepdims=True)
    return float((units[0] * units[1]).sum(1).mean())


@kind("mean AUROC of foldings", "gates._mean_auroc", "interval", 0.95)
def _foldings() -> Iterator[tuple[str, Draw]]:
    from demur.gates import _mean_auroc

    for n in (20, 80):

        def draw(rng: Rng, n: int = n) -> bool | None:
            labels = np.repeat([1, 0], n // 2)
            own = labels + rng.standard_normal(n)
            runs = own + 0.3 * rng.standard_normal((5, n))
            return holds(_mean_auroc(runs, labels), _binormal(1 / math.hypot(1, 0.3), 1.0))

        yield f"n={n}", draw


# Directions --------------------------------------------------------------------------------------


def _contrast(name: str, rows: tuple[np.ndarray, np.ndarray], clusters: Any = None) -> Any:
    import torch

    from demur.compare.contrasts import Contrast
    from demur.sites import Site

    pos, neg = (torch.from_numpy(side) for side in rows)
    return Contrast.of_classes(
        name, pos, neg, site=Site(1, "resid_pre"), position=-1, clusters=clusters
    )


def _two(rng: Rng, n: int, d: int, cosine: float, size: float) -> tuple[Any, Any, Any]:
    """Two contrasts on the same prompts, whose true directions have this cosine."""
    u, v = np.zeros(d), np.zeros(d)
    u[0] = size
    v[0], v[1] = size * cosine, size * (1 - cosine**2) ** 0.5
    shared = [rng.standard_normal((n, d)) for _ in range(2)]
    own = [[(0.6 * s + 0.8 * rng.standard_normal((n, d))) for s in shared] for _ in range(2)]
    names = ([f"+{i}" for i in range(n)], [f"-{i}" for i in range(n)])
    return (
        _contrast("a", (own[0][0] + u, own[0][1]), names),
        _contrast("b", (own[1][0] + v, own[1][1]), names),
        names,
    )


@kind("unbiased cosine, jackknife t", "compare.geometry.compare_pair", "interval", 0.95)
def _unbiased() -> Iterator[tuple[str, Draw]]:
    from demur.compare.geometry import _Options, _Study

    for n, d, size in ((8, 64, 4.0), (20, 256, 4.0), (40, 64, 2.0)):
        for cosine in (0.0, 0.6):

            def draw(
                rng: Rng, n: int = n, d: int = d, size: float = size, cosine: float = cosine
            ) -> bool | None:
                a, b, _ = _two(rng, n, d, cosine, size)
                found = _Study(a, b, _Options({}, {}, None, INNER, 2, 0, None)).unbiased()
                return None if found is None else holds(found.estimate(), cosine)

            yield f"{n} prompts a class, width {d}, cosine {cosine:g}", draw


@kind("cosine of estimates, recentred", "compare.geometry.compare_pair", "interval", 0.95)
def _recentred() -> Iterator[tuple[str, Draw]]:
    """Held against what estimates from so many prompts have on average."""
    from demur.compare.geometry import _Options, _Study

    for n, d, size in ((8, 64, 4.0), (40, 64, 2.0)):

        @cache
        def truth(n: int = n, d: int = d, size: float = size) -> float:
            rng = np.random.default_rng(5)
            found = []
            for _ in range(1500):
                a, b, _ = _two(rng, n, d, 0.6, size)
                u, v = a.vector(), b.vector()
                found.append(float(u @ v / u.norm() / v.norm()))
            return float(np.mean(found))

        def draw(
            rng: Rng, n: int = n, d: int = d, size: float = size, truth: Any = truth
        ) -> bool | None:
            a, b, _ = _two(rng, n, d, 0.6, size)
            return holds(_Study(a, b, _Options({}, {}, None, 600, 2, 0, None)).interval(), truth())

        yield f"{n} prompts a class, width {d}", draw


def _across(a: Any, b: Any) -> Any:
    from functools import partial

    from demur.compare import checkpoints
    from demur.em.margin import grouped_mean

    checkpoints.grouped_mean = partial(grouped_mean, draws=2)  # Of no interest here.
    return checkpoints.across({"a": a, "b": b}, base="a", draws=100, splits=2)


@kind("change of the gap between checkpoints", "compare.checkpoints.across", "interval", 0.95)
def _gap_changes() -> Iterator[tuple[str, Draw]]:
    """The gap is read along the base's direction as it was estimated."""
    for n in (12,):

        def draw(rng: Rng, n: int = n) -> bool | None:
            a, b, _ = _two(rng, n, 64, 0.6, 3.0)
            (row,) = _across(a, b)
            u = a.vector().numpy()
            # The base's direction is (3, 0, ...), the other's (1.8, 2.4, 0, ...).
            return holds(row.gap_change, float(-1.2 * u[0] + 2.4 * u[1]) / float(3.0 * u[0]))

        yield f"{n} prompts a class, width 64", draw


@kind("cosine over topics", "em.directions.cosine", "interval", 0.95)
def _topic_cosines() -> Iterator[tuple[str, Draw]]:
    """Held against what estimates from so many items have on average."""
    import torch

    from demur.em.directions import AnswerMeans, Delta, cosine
    from demur.sites import Site

    site = Site(1, "resid_post")

    def delta(rows: np.ndarray, groups: Any) -> Any:
        n = len(rows)

        def side(values: np.ndarray, which: Any) -> Any:
            return AnswerMeans(
                torch.from_numpy(values[None]), torch.full((n,), 5), (site,), which,
                tuple(map(str, range(n))), tuple(groups), "", "", "",
            )  # fmt: skip

        return Delta("text_base", side(rows, "bad"), side(np.zeros_like(rows), "good"))

    def pair(rng: Rng, groups: Any) -> tuple[np.ndarray, np.ndarray]:
        code = np.unique([int(g) for _, g in groups], return_inverse=True)[1]
        out = []
        for angle in (0.0, 0.9):
            rows = (
                rng.standard_normal((code.max() + 1, 32))[code]
                + rng.standard_normal((len(code), 32))
            ) / 2
            rows[:, 0] += 2 * math.cos(angle)
            rows[:, 1] += 2 * math.sin(angle)
            out.append(rows)
        return out[0], out[1]

    for n_groups in (6, 12, 40):
        groups = topics(n_groups)

        @cache
        def truth(n_groups: int = n_groups) -> float:
            rng, own = np.random.default_rng(5), topics(n_groups)
            found = []
            for _ in range(2000):
                u, v = (rows.mean(0) for rows in pair(rng, own))
                found.append(float(u @ v / np.linalg.norm(u) / np.linalg.norm(v)))
            return float(np.mean(found))

        def draw(rng: Rng, groups: Any = groups, truth: Any = truth) -> bool | None:
            a, b = (delta(rows, groups) for rows in pair(rng, groups))
            return holds(cosine(a, b, site, seed=0, draws=INNER), truth())

        yield f"{n_groups} topics, width 32", draw


@kind("cosine of harm and refusal", "separation.angle", "interval", 0.95)
def _angles() -> Iterator[tuple[str, Draw]]:
    """Held against what estimates from so many prompts have on average."""
    import torch

    from demur.separation import Group, angle, balanced_difference

    sizes = {
        Group.HARMFUL_REFUSED: 30,
        Group.HARMFUL_ACCEPTED: 8,
        Group.HARMLESS_REFUSED: 8,
        Group.HARMLESS_ACCEPTED: 30,
    }

    def both(rng: Rng) -> tuple[dict[Any, Any], dict[Any, Any]]:
        out: tuple[dict[Any, Any], dict[Any, Any]] = ({}, {})
        for group, n in sizes.items():
            shared = rng.standard_normal((n, 24))
            for k, side in enumerate(out):
                rows = 0.6 * shared + 0.8 * rng.standard_normal((n, 24))
                rows[:, 0] += 2.0 * ("harmful" in group.value)
                rows[:, 1 - k] += 2.0 * ("refused" in group.value)
                side[group] = torch.from_numpy(rows)
        return out

    @cache
    def truth() -> float:
        rng, found = np.random.default_rng(5), []
        for _ in range(1500):
            inst, post = both(rng)
            u, v = balanced_difference(inst, "harm")[0], balanced_difference(post, "refusal")[0]
            found.append(float(u @ v / u.norm() / v.norm()))
        return float(np.mean(found))

    def draw(rng: Rng) -> bool | None:
        return holds(angle(*both(rng), seed=0, draws=60).cosine, truth())

    yield "groups of 30, 8, 8 and 30, width 24", draw


@kind("effects of components over topics", "compare.patching.Effects", "interval", 0.95)
def _components() -> Iterator[tuple[str, Draw]]:
    from demur.compare.attribution import Component
    from demur.compare.patching import Effects

    for n_groups in (6, 12, 40):
        groups = topics(n_groups)
        part = Component(0, "mlp")

        def draw(rng: Rng, groups: Any = groups, part: Any = part) -> bool | None:
            values = of_topics(rng, groups)
            own = Effects((part,), values[None], values, tuple(groups))
            return holds(own.estimates(draws=INNER, seed=0)[part], 0.0)

        yield f"{n_groups} topics", draw


# Tests -------------------------------------------------------------------------------------------


@kind("McNemar, exact", "stats.mcnemar_p", "test", 0.05)
def _mcnemar() -> Iterator[tuple[str, Draw]]:
    from demur.stats import mcnemar_p

    for n in (8, 40, 120):

        def draw(rng: Rng, n: int = n) -> bool:
            at = rng.choice(4, n, p=[0.3, 0.15, 0.15, 0.4])
            return mcnemar_p((at == 0) | (at == 1), (at == 0) | (at == 2)) < 0.05

        yield f"n={n}", draw


@kind("Wilcoxon's signed ranks", "stats.wilcoxon_p", "test", 0.05)
def _wilcoxon() -> Iterator[tuple[str, Draw]]:
    from demur.stats import wilcoxon_p

    for n in (8, 20, 64):
        for name in ("normal", "t of 3", "ties"):

            def draw(rng: Rng, n: int = n, shape: Any = SHAPES[name]) -> bool:
                before = rng.standard_normal(n)
                return wilcoxon_p(np.zeros(n), shape(rng, n) + 0 * before) < 0.05

            yield f"n={n}, {name}", draw

        def sparse(rng: Rng, n: int = n) -> bool:
            return wilcoxon_p(np.zeros(n), rng.standard_normal(n) * (rng.random(n) < 0.2)) < 0.05

        yield f"n={n}, four in five are 0", sparse
    yield (
        "@0.01 n=20, normal",
        lambda rng: wilcoxon_p(np.zeros(20), rng.standard_normal(20)) < 0.01,
    )


@kind("Holm over arms", "stats.holm: legs, verify, dose, across", "test", 0.05)
def _holm() -> Iterator[tuple[str, Draw]]:
    """Whether any of the true nulls is rejected, all on the same prompts."""
    from demur.stats import holm, mcnemar_p, wilcoxon_p

    def ranks(rng: Rng) -> bool:
        shared = rng.standard_normal(64)
        moved = 0.7 * shared + 0.7 * rng.standard_normal((12, 64))
        return min(holm([wilcoxon_p(np.zeros(64), one) for one in moved])) < 0.05

    yield "Wilcoxon, 12 arms on 64 shared prompts", ranks

    def shares(rng: Rng) -> bool:
        before = rng.random(100) < 0.5
        ps = [mcnemar_p(before, before ^ (rng.random(100) < 0.15)) for _ in range(6)]
        return min(holm(ps)) < 0.05

    yield "McNemar, 6 arms on 100 shared prompts", shares


@kind("among random directions", "stats.null_p: bands, verify, dimensions, em", "test", 0.05)
def _nulls() -> Iterator[tuple[str, Draw]]:
    from demur.stats import null_p

    for n in (19, 30, 60, 199):
        for side in ("low", "high", "two"):

            def draw(rng: Rng, n: int = n, side: Any = side) -> bool:
                values = heavy(rng, n + 1)
                return null_p(float(values[0]), values[1:], side=side) <= 0.05

            yield f"{n} of t of 3, {side}", draw

    def ties(rng: Rng) -> bool:
        values = np.round(rng.standard_normal(31))
        return null_p(float(values[0]), values[1:], side="high") <= 0.05

    yield "30 with ties, high", ties


@kind("flipped signs", "hydra.stages.flips_p", "test", 0.05)
def _flips() -> Iterator[tuple[str, Draw]]:
    from demur.hydra import stages

    stages._FLIPS = 999
    for n in (8, 40):
        for name in ("normal", "t of 3"):

            def draw(rng: Rng, n: int = n, shape: Any = SHAPES[name]) -> bool:
                return stages.flips_p(shape(rng, n), seed=0) <= 0.05

            yield f"n={n}, {name}", draw


@kind("rises, one-sided ranks", "hydra.stages.rises_p", "test", 0.05)
def _rises() -> Iterator[tuple[str, Draw]]:
    from demur.hydra.stages import rises_p

    for n in (8, 40):
        for name in ("normal", "t of 3", "ties"):
            yield (
                f"n={n}, {name}",
                lambda rng, n=n, shape=SHAPES[name]: rises_p(shape(rng, n)) <= 0.05,
            )


@kind("false discoveries, Benjamini and Hochberg", "hydra.stages.adjusted", "test", 0.05)
def _bh() -> Iterator[tuple[str, Draw]]:
    """Share of false ones among what is found; correlated statistics, one in four real."""
    from scipy.stats import norm

    from demur.hydra.stages import adjusted

    for rho in (0.0, 0.5):

        def draw(rng: Rng, rho: float = rho) -> float:
            z = rho**0.5 * rng.standard_normal() + (1 - rho) ** 0.5 * rng.standard_normal(60)
            z[:15] += 3.5
            found = np.array(adjusted((2 * norm.sf(np.abs(z))).tolist())) <= 0.05
            return float(found[15:].sum() / max(found.sum(), 1))

        yield f"60 tests, correlation {rho:g}", draw


@kind("false discoveries among latents", "features.discover", "test", 0.05)
def _latents() -> Iterator[tuple[str, Draw]]:
    """Share of false ones among latents found at q 0.05: sparse, tied at 0, correlated."""
    from scipy.stats import false_discovery_control

    from demur.features.discover import _compared

    for n, m in ((40, 40), (60, 16)):

        def draw(rng: Rng, n: int = n, m: int = m) -> float:
            k, real = 100, 10
            sides = []
            for size, shift in ((n, 1.5), (m, 0.0)):
                shared = rng.standard_normal((size, 1))
                x = 0.6 * shared + 0.8 * rng.standard_normal((size, k)) - 0.8
                x[:, :real] += shift
                sides.append(np.maximum(x, 0.0))
            p = _compared(sides[0], sides[1], None, np.ones(k, dtype=bool))[2]
            found = false_discovery_control(p) <= 0.05
            return float(found[real:].sum() / max(found.sum(), 1))

        yield f"{n} and {m} prompts, 100 latents", draw

    def paired(rng: Rng) -> float:
        k, real, n = 100, 10, 30
        x = np.maximum(rng.standard_normal((2, n, k)) - 0.8, 0.0)
        x[0, :, :real] += 1.0
        p = _compared(x[0], x[1], (np.eye(n), np.eye(n)), np.ones(k, dtype=bool))[2]
        found = false_discovery_control(p) <= 0.05
        return float(found[real:].sum() / max(found.sum(), 1))

    yield "30 families, 100 latents", paired


@kind("exchanged labels", "compare.geometry: p among exchanged labels", "test", 0.05)
def _exchanged() -> Iterator[tuple[str, Draw]]:
    from demur.compare.geometry import _Options, _Study

    for n, d in ((8, 64), (40, 64)):

        def draw(rng: Rng, n: int = n, d: int = d) -> bool:
            a, b, _ = _two(rng, n, d, 0.0, 2.0)
            # No true direction in `b`, yet noise in common with `a`.
            names = (a.positive_clusters, a.negative_clusters)
            b = _contrast("b", tuple(side.numpy() for side in _flat(b, d)), names)
            study = _Study(a, b, _Options({}, {}, None, INNER, 2, 0, None))
            nulls = {one.name: one for one in study.nulls(study.exchanged())}
            return nulls["exchanged labels"].p <= 0.05

        yield f"{n} prompts a class, width {d}", draw


def _flat(b: Any, d: int) -> Any:
    moved = np.zeros(d)
    moved[1] = 2.0
    pos, neg = b.rows
    return pos - __import__("torch").from_numpy(moved), neg


@kind("isotropic p", "compare.geometry.isotropic_p", "test", 0.05)
def _isotropic() -> Iterator[tuple[str, Draw]]:
    from demur.compare.geometry import isotropic_p

    for d in (16, 576):

        def draw(rng: Rng, d: int = d) -> bool:
            u, v = rng.standard_normal((2, d))
            return isotropic_p(float(u @ v / np.linalg.norm(u) / np.linalg.norm(v)), d) <= 0.05

        yield f"width {d}", draw


@kind("overlap of spans", "compare.subspaces.overlaps", "test", 0.05)
def _spans() -> Iterator[tuple[str, Draw]]:
    """One list is drawn as its null says, the other has axes of its own."""
    import torch

    from demur.compare.subspaces import overlaps

    for k, m, d in ((1, 4, 64), (6, 3, 64), (5, 5, 576)):

        def isotropic(rng: Rng, k: int = k, m: int = m, d: int = d) -> bool:
            one = rng.standard_normal((k, d))
            two = rng.standard_normal((m, d)) + 4 * np.eye(m, d)
            sides = (list(torch.from_numpy(side)) for side in (one, two))
            row = overlaps(*sides, a="a", b="b", draws=100, seed=0)[-1]
            return row.nulls[0].p <= 0.05

        yield f"{k} and {m} vectors, width {d}", isotropic

    scale = np.geomspace(8.0, 0.1, 64)

    def matched(rng: Rng) -> bool:
        rows = rng.standard_normal((200, 64)) * scale
        one, two = (rng.standard_normal((n, 64)) * scale for n in (5, 4))
        sides = (list(torch.from_numpy(side)) for side in (one, two))
        row = overlaps(*sides, a="a", b="b", within=torch.from_numpy(rows), draws=100, seed=0)[-1]
        return row.nulls[1].p <= 0.05

    yield "5 and 4 vectors of one covariance, 200 rows tell it", matched


@kind("alignment of activations", "compare.subspaces.alignment", "test", 0.05)
def _aligned() -> Iterator[tuple[str, Draw]]:
    import torch

    from demur.compare.subspaces import alignment

    for n, d in ((12, 64), (60, 64), (60, 8)):

        def draw(rng: Rng, n: int = n, d: int = d) -> bool:
            one, two = (torch.from_numpy(rng.standard_t(3, (n, d))) for _ in range(2))
            return alignment(one, two, a="a", b="b", draws=100, seed=0).null.p <= 0.05

        yield f"{n} prompts, width {d}, t of 3", draw


@kind("dose beyond other arms", "features.dose: p, and the difference clear", "test", 0.05)
def _doses() -> Iterator[tuple[str, Draw]]:
    """The set is one among arms that are alike: effects of their own on prompts in common."""
    from demur.features.dose import Dose, _comparison

    dose = Dose("zero")
    for arms, n in ((19, 12), (19, 40), (60, 20)):

        def draw(rng: Rng, arms: int = arms, n: int = n) -> bool | None:
            own = heavy(rng, arms + 1)[:, None] * (1 + 0.5 * rng.standard_normal(n))
            values = own + 0.7 * rng.standard_normal((arms + 1, n))
            row = _comparison(dose, "other latents", "refusal, harmful", values[0], values[1:])
            return row["beyond"]

        yield f"{arms} arms, {n} prompts", draw


def _through(rng: Rng, groups: Any, own: np.ndarray, null: Sequence[np.ndarray]) -> Any:
    """A row of `mediation`: what goes through a coordinate, of a total effect of 1.5."""
    import torch

    from demur.compare.behaviour import Outcome
    from demur.compare.mediation import _Axes, _row
    from demur.sites import Site

    outcome = Outcome("margin", "nats", tuple(groups), prepare=lambda _: lambda *_: own)
    axes = _Axes("drawn", 1, {Site(1, "resid_post"): torch.eye(1, 4)}, slice(0, 1))
    total = 1.5 + of_topics(rng, groups)
    return _row(axes, "patch", outcome, total, change=own, null=null, seed=0, draws=INNER)


@kind("through a coordinate", "compare.mediation: p among random coordinates", "test", 0.05)
def _mediated() -> Iterator[tuple[str, Draw]]:
    for n_random, n_groups in ((19, 12), (40, 20)):
        groups = topics(n_groups)

        def draw(rng: Rng, n_random: int = n_random, groups: Any = groups) -> bool:
            shared = of_topics(rng, groups)
            own, *null = (0.3 * heavy(rng, 1) * (1 + shared) for _ in range(n_random + 1))
            return _through(rng, groups, own, null).p_random <= 0.05

        yield f"{n_random} random coordinates, {n_groups} topics", draw


@kind("share through a coordinate", "compare.mediation: share of the effect", "interval", 0.95)
def _mediated_share() -> Iterator[tuple[str, Draw]]:
    for n_groups in (6, 12, 40):
        groups = topics(n_groups)

        def draw(rng: Rng, groups: Any = groups) -> bool | None:
            return holds(_through(rng, groups, 0.6 + 0.5 * of_topics(rng, groups), []).share, 0.4)

        yield f"{n_groups} topics", draw


@kind("equivalence: unrelated", "compare.geometry: p within the margin", "test", 0.05)
def _equivalence() -> Iterator[tuple[str, Draw]]:
    """At a true cosine on the margin: how often two are called unrelated."""
    from demur.compare.geometry import compare_pair

    for n, d, size in ((20, 64, 4.0), (40, 64, 2.0)):

        def draw(rng: Rng, n: int = n, d: int = d, size: float = size) -> bool | None:
            a, b, _ = _two(rng, n, d, 0.3, size)
            found = compare_pair(a, b, draws=2, splits=2, seed=0, margin=0.3)
            return None if found.equivalence_p is None else found.equivalence_p < 0.05

        yield f"{n} prompts a class, cosine and margin 0.3", draw


@kind("two checkpoints share a direction", "compare.checkpoints.across: p", "test", 0.05)
def _across_p() -> Iterator[tuple[str, Draw]]:
    """The base has a direction, the other model only noise."""
    for n in (12,):

        def draw(rng: Rng, n: int = n) -> bool:
            a, b, names = _two(rng, n, 64, 0.0, 2.0)
            b = _contrast("b", tuple(side.numpy() for side in _flat(b, 64)), names)
            (row,) = _across(a, b)
            return row.p <= 0.05

        yield f"{n} prompts a class, noise in common", draw


@kind("circuits shared", "compare.circuits: permuted p", "test", 0.05)
def _circuits() -> Iterator[tuple[str, Draw]]:
    from demur.compare import circuits
    from demur.compare.attribution import Circuit, Component

    parts = tuple(
        [Component(layer, "head", head) for layer in range(6) for head in range(6)]
        + [Component(layer, "mlp") for layer in range(6)]
    )
    depth = np.array([part.layer for part in parts])

    def draw(rng: Rng) -> bool:
        # Both rise with depth, which is not to count as shared.
        x, y = (0.5 * depth + rng.standard_t(3, len(parts)) for _ in range(2))
        found = circuits.compare(
            Circuit("x", parts, x, None), Circuit("y", parts, y, None), draws=INNER, seed=0
        )
        return found.statistics[0].p <= 0.05

    yield "6 blocks of 6 heads, both rise with depth", draw


# The verdict, with nothing planted ---------------------------------------------------------------


@kind("verdict of an audit", "pipeline.figures.decide", "test", 0.01)
def _verdicts() -> Iterator[tuple[str, Draw]]:
    """Selected among 60 random directions on one split, tested on another: is it ever usable?

    Each direction moves prompts at random; the best on the selection split is reported.
    """
    yield "@0.01 best of 60 without effect, 100 prompts, 30 nulls", lambda rng: _verdict(rng, 0.0)


@kind("effect of the best of many", "select on one split, report on another", "interval", 0.95)
def _selected() -> Iterator[tuple[str, Draw]]:
    from demur.stats import paired_change

    for n_select, n in ((36, 100), (8, 20)):

        def draw(rng: Rng, n_select: int = n_select, n: int = n) -> bool | None:
            true = 0.3 * rng.standard_normal(60)
            seen = (true[:, None] + rng.standard_normal((60, n_select))).mean(1)
            best = int(seen.argmin())
            before = rng.standard_normal(n)
            return holds(
                paired_change(before, before + true[best] + rng.standard_normal(n)), true[best]
            )

        yield f"best of 60 on {n_select} prompts, told on {n}", draw


def _verdict(rng: Rng, effect: float) -> bool:
    from demur.pipeline.figures import decide
    from demur.results import EditCost, Leg, NullBand
    from demur.stats import holm, mcnemar_p, mean, null_p, paired_share_change

    n, each = 100, 10
    select = rng.standard_normal((60, 36)).mean(1)
    del select  # Choosing among what has no effect leaves no effect.
    plain = {"harmful": rng.random(n) < 0.9, "harmless": rng.random(n) < 0.1}
    rows: list[dict[str, Any]] = []

    def leg(arm: str, family: str, edit: str, on: str, expects: str) -> None:
        before = plain[on]
        after = before ^ (rng.random(n) < 0.06)
        n_before, n_after = int(before.sum()), int(after.sum())
        rows.append(
            {
                "arm": arm, "family": family, "edit": edit, "expects": expects, "on": on,
                "measure": "refused", "before": proportion(n_before, n),
                "after": proportion(n_after, n), "change": paired_share_change(before, after),
                "p": mcnemar_p(before, after), "degenerate": proportion(0, n),
            }
        )  # fmt: skip

    leg("ablate", "direction", "ablate", "harmful", "falls")
    leg("add", "direction", "add", "harmless", "rises")
    leg("subtract", "direction", "subtract", "harmful", "falls")
    leg("ablate", "direction", "ablate", "harmless", "falls")
    families: tuple[Literal["isotropic", "covariance-matched", "shuffled-labels"], ...] = (
        "isotropic",
        "covariance-matched",
        "shuffled-labels",
    )
    bands = []
    own = rng.standard_t(3, 2) + effect
    for family in families:
        leg(f"ablate {family} #1", family, "ablate", "harmful", "neither")
        leg(f"add {family} #1", family, "add", "harmless", "neither")
        low, high = rng.standard_t(3, each).tolist(), rng.standard_t(3, each).tolist()
        bands.append(
            NullBand(
                family=family, n=each, bypass_changes=low, induce_changes=high, kls=[0.0] * each,
                cosines=[0.0] * each, bypass_p=null_p(float(own[0]), low, side="low"),
                induce_p=null_p(float(own[1]), high, side="high"),
            )
        )  # fmt: skip
    adjusted = holm([row["p"] for row in rows])
    table = [Leg(**row, p_holm=p) for row, p in zip(rows, adjusted, strict=True)]
    small = mean(np.abs(rng.standard_normal(n)) / 100)
    cost = EditCost(edit="ablate", bypass_change=small, kl=small, perplexity_ratio=None)
    return decide(table, bands, cost, least_bad=False).usable


# Thresholds --------------------------------------------------------------------------------------


@kind("false alarms of a threshold", "guard.calibrate", "alarm", 0.05)
def _alarms() -> Iterator[tuple[str, Draw]]:
    """Share of fresh benign scores above it, on average over calibration sets."""
    from demur.guard import calibrate

    for n in (20, 40, 120, 400):
        for name, shape in SHAPES.items():

            def draw(rng: Rng, n: int = n, shape: Any = shape) -> float:
                limit = calibrate(shape(rng, n), 0.05)
                return float((shape(rng, 400) > limit.value).mean())

            yield f"n={n}, {name}", draw
    yield (
        "@0.01 n=200, t of 3",
        lambda rng: float((heavy(rng, 800) > calibrate(heavy(rng, 200), 0.01).value).mean()),
    )

    def copies(rng: Rng) -> float:
        return float(
            (normal(rng, 400) > calibrate(np.repeat(normal(rng, 40), 3), 0.05).value).mean()
        )

    yield "120, each thrice the same", copies
    groups = topics(40)

    def families(rng: Rng) -> float:
        limit = calibrate(of_topics(rng, groups), 0.05)
        return float((rng.standard_normal(400) > limit.value).mean())

    yield "210 of 40 families, fresh families", families


@kind("false alarms over kinds", "guard.calibrate_strata: its worst kind", "alarm", 0.05)
def _strata() -> Iterator[tuple[str, Draw]]:
    from demur.guard import calibrate_strata

    def draw(rng: Rng) -> float:
        strata = {"plain": normal(rng, 120), "lookalikes": 1 + normal(rng, 60)}
        limit, _ = calibrate_strata(strata, 0.05)
        return float((1 + normal(rng, 400) > limit.value).mean())

    yield "120 plain, 60 lookalikes one spread higher", draw


@kind("false alarms of reads combined", "guard.Rarity over reads, then calibrate", "alarm", 0.05)
def _combined() -> Iterator[tuple[str, Draw]]:
    """Three correlated reads, each rarity learned on one split, the threshold on another."""
    from demur.guard import Rarity, calibrate

    def reads(rng: Rng, n: int) -> np.ndarray:
        return 0.7 * rng.standard_normal(n) + 0.7 * rng.standard_t(3, (3, n))

    def draw(rng: Rng) -> float:
        own = [Rarity.fit(one) for one in reads(rng, 60)]

        def score(n: int) -> np.ndarray:
            return np.max([r(x) for r, x in zip(own, reads(rng, n), strict=True)], 0)

        return float((score(400) > calibrate(score(120), 0.05).value).mean())

    yield "3 reads, 60 to learn rarities, 120 to calibrate", draw


@kind(
    "false alarms over whole replies",
    "pipeline.anchor: reads admitted, then calibrated",
    "alarm",
    0.05,
)
def _whole_replies() -> Iterator[tuple[str, Draw]]:
    """A request counts by the highest score of its life; which reads count is chosen elsewhere.

    Replies have 0 to 64 tokens; scores along them are correlated, with heavy tails.
    """
    from demur.guard import calibrate_strata
    from demur.pipeline.anchor import _admit, _Chosen, _with_reads

    kinds = {"plain": 0.0, "lookalikes": 0.7}

    def lives(rng: Rng, n: int, shift: float, harmful: bool) -> tuple[np.ndarray, ...]:
        lengths = rng.integers(0, 65, n)
        walk = np.cumsum(rng.standard_t(4, (2, n, 64)), axis=2) / np.sqrt(np.arange(1, 65))
        walk[:, np.arange(64) >= lengths[:, None]] = -np.inf
        reply, header = walk.max(2) + shift + 2.5 * harmful
        return rng.standard_normal(n) + shift + 1.0 * harmful, reply, header

    def draw(rng: Rng, n: int) -> float:
        parts = [
            (name, lives(rng, 60, shift, bad), bad)
            for name, shift in kinds.items()
            for bad in (False, True)
        ]
        prompt, reply, header = (np.concatenate([one[1][k] for one in parts]) for k in range(3))
        family = tuple(name for name, one, _ in parts for _ in one[0])
        harmful = np.repeat([bad for *_, bad in parts], 60)
        chosen = _Chosen(prompt, {"reply": reply, "header": header}, family, harmful)
        rarities, uses, _ = _admit(chosen, 0.05)

        def scores(size: int, shift: float) -> np.ndarray:
            prompt, reply, header = lives(rng, size, shift, False)
            return _with_reads(prompt, {"reply": reply, "header": header}, rarities, uses)

        limit, _ = calibrate_strata({name: scores(n, kinds[name]) for name in kinds}, 0.05)
        return float((scores(400, kinds["lookalikes"]) > limit.value).mean())

    for n in (40, 200):
        yield f"{n} of a kind to calibrate, worst kind", lambda rng, n=n: draw(rng, n)


@kind("confidence bound on false alarms", "guard.false_alarm_bound", "interval", 0.95)
def _bounds() -> Iterator[tuple[str, Draw]]:
    """Whether the true rate of the threshold lies below its bound."""
    from scipy.stats import norm

    from demur.guard import calibrate

    for n in (20, 120, 400):

        def draw(rng: Rng, n: int = n) -> bool:
            found = calibrate(rng.standard_normal(n), 0.05)
            return bool(norm.sf(found.value) <= found.bound)

        yield f"n={n}, independent", draw
    for n_groups, sizes in ((40, (2, 3, 4, 12)), (100, (2,))):
        groups = topics(n_groups, sizes)

        def clustered(rng: Rng, groups: Any = groups) -> bool:
            found = calibrate(of_topics(rng, groups), 0.05)
            return bool(norm.sf(found.value) <= found.bound)

        # See `guard.Threshold`: its confidence is for requests drawn one by one.
        worst = "@0.88 " if len(groups) > 2 * n_groups else ""
        yield f"{worst}{len(groups)} of {n_groups} families", clustered


# All of them -------------------------------------------------------------------------------------


def simulate(one: Setting, draws: int, seed: int = 0) -> Found:
    """Draw a setting so often; the Monte Carlo interval is Wilson's, of shares Student's t."""
    from demur.errors import DemurError
    from demur.stats import mean

    rng = np.random.default_rng([seed, *one.kind.encode(), *one.name.encode()])
    _SAID.clear()
    began, rows, refused = time.process_time(), list[float](), 0
    for _ in range(draws):
        try:
            found = one.draw(rng)
        except DemurError:
            found = None
        if found is None:
            refused += 1
        else:
            rows.append(float(found))
    about = (one.kind, one.where, one.what, one.name, one.nominal)
    said = sum(_SAID) / len(_SAID) if _SAID else 0.0
    seconds = time.process_time() - began
    if len(rows) < 2:
        return Found(*about, 0.0, 0.0, 1.0, len(rows), refused, said, seconds)
    yes_or_no = set(rows) <= {0.0, 1.0}
    whole = proportion(int(sum(rows)), len(rows)) if yes_or_no else mean(rows)
    return Found(*about, whole.value, whole.low, whole.high, len(rows), refused, said, seconds)


def settings(only: str | None = None) -> Iterator[Setting]:
    """All settings, or those whose kind, place or name holds a text."""
    for name, where, what, nominal, make in _KINDS:
        for label, draw in make():
            if only is not None and only.lower() not in f"{name} {where} {label}".lower():
                continue
            first, _, rest = label.partition(" ") if label.startswith("@") else ("", "", label)
            own = float(first[1:]) if first else nominal
            yield Setting(name, where, what, rest, own, draw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--only", help="kinds, places or settings that hold this text")
    parser.add_argument("--out", type=Path, help="JSON of all rows")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    began, rows = time.process_time(), list[Found]()
    print("kind | where | setting | nominal | found [Monte Carlo 95%] | within tolerance")
    for one in settings(asked.only):
        rows.append(simulate(one, asked.draws))
        print(rows[-1], flush=True)
        if asked.out is not None:
            whole = [asdict(row) | {"verdict": row.verdict} for row in rows]
            asked.out.write_text(json.dumps(whole, indent=1), encoding="utf-8")
    if not rows:
        parser.error(f"no setting has {asked.only} in its name")
    bad = [row for row in rows if row.verdict in ("NO", "no figure")]
    told = sum(row.verdict == "approximate" for row in rows)
    print(
        f"{len(rows)} settings of {len({row.kind for row in rows})} kinds, {asked.draws} draws "
        f"each: {len(rows) - len(bad) - told} within tolerance, {told} said to be approximate, "
        f"{len(bad)} not; {time.process_time() - began:.0f} s of one core"
    )
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()

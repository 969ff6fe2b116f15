"""Latents as a detector of harmful requests, before the model replies.

Two detectors read a few latents at the last token of the request: the sum of their activations, and
a logistic regression on them. Each is held against reads of the stream itself at the same site (a
logistic regression, and the guard's Fisher read), against the projection on the refusal direction,
and against words alone. Latents and weights are chosen on one split, thresholds are set on a second
one, and everything is told of a third.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from demur.directions import Direction
from demur.errors import ConfigError, OverlapError, TooFewPromptsError
from demur.features.bank import Bank
from demur.features.rows.sensor import (
    Detector,
    Rivalry,
    SensorReport,
    SiteSensor,
    WrapperCatch,
)
from demur.guard import Fisher, Summary, Threshold, calibrate, summarise
from demur.models import Model
from demur.progress import Progress
from demur.prompts import normalise
from demur.sites import Site
from demur.stats import Estimate, auroc, bootstrap_stratified, proportion
from demur.wrappers import Wrapper

Matrix = Float[np.ndarray, "_ _"]
Labels = Bool[np.ndarray, " _"]
Scores = Float[np.ndarray, " _"]

MOST = 20
"""Latents of a sensor at most: beyond, it is a dense probe in another basis."""

SUM, REGRESSION = "latents, summed", "latents, regression"
_FOLDS = 5
_LEAST = 10  # Fewer prompts of a class do not fit a regression in folds.
_AS_GOOD = 0.02


@dataclass(frozen=True, slots=True)
class Requests:
    """Harmful and harmless requests of one split, of one kind as far as possible.

    Attributes:
        harmful: User messages.
        harmless: The same.
        groups: What each belongs to, the harmful ones first, such as its pair: folds never part a
            group. A request whose twin is in the other fold scores on the wrong side of chance.
            None where requests are no twins.
    """

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        n = len(self.harmful) + len(self.harmless)
        if self.groups is not None and len(self.groups) != n:
            raise ConfigError(
                f"got {n} requests and {len(self.groups)} groups", "give one for each request"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A logistic regression on numbers in standard deviations.

    Attributes:
        weight: One a column, above 0 where it speaks for harm.
        bias: Added.
        centre: Taken off each column.
        spread: Each column is divided by.
    """

    weight: Float[np.ndarray, " column"]
    bias: float
    centre: Float[np.ndarray, " column"]
    spread: Float[np.ndarray, " column"]

    @classmethod
    def fit(cls, rows: Matrix, labels: Labels, *, c: float = 1.0) -> Linear:
        """Fit it.

        Args:
            rows: One a request.
            labels: True for harmful ones.
            c: Inverse strength of the penalty, as in scikit-learn.
        """
        from sklearn.linear_model import LogisticRegression

        centre = rows.mean(0)
        spread = rows.std(0)
        spread = np.where(spread > 0, spread, 1.0)  # A silent latent tells nothing.
        made: Any = LogisticRegression(C=c, max_iter=2000).fit((rows - centre) / spread, labels)
        return cls(made.coef_[0], float(made.intercept_[0]), centre, spread)

    def __call__(self, rows: Matrix) -> Scores:
        """Log-odds of harm, nats."""
        return (rows - self.centre) / self.spread @ self.weight + self.bias


@dataclass(frozen=True, slots=True, eq=False)
class Sensor:
    """A detector of harmful requests that reads a few latents at the request's last token.

    Attributes:
        bank: Cut to the latents.
        linear: On their activations.
        threshold: Above it a request is flagged; None where it was calibrated on too few.
    """

    bank: Bank
    linear: Linear
    threshold: Threshold | None

    def score(
        self,
        model: Model,
        prompts: Sequence[str],
        *,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Log-odds of harm of each request, in one pass, no further than the bank's site."""
        read = summarise(model, prompts, [self.bank.site], batch_size=batch_size, progress=progress)
        return self.linear(_activations(self.bank, read.last[0]))

    def flags(self, model: Model, prompts: Sequence[str]) -> Labels:
        """Which requests lie above the threshold, such as for `clamping(..., when=...)`.

        Raises:
            TooFewPromptsError: It has no threshold.
        """
        if self.threshold is None:
            raise TooFewPromptsError(
                "the sensor has no threshold", "calibrate it on more harmless requests"
            )
        return self.score(model, prompts) > self.threshold.value


@dataclass(frozen=True, slots=True, eq=False)
class Sensed:
    """A fitted sensor, and how it fares."""

    sensor: Sensor
    row: SensorReport


def _activations(bank: Bank, rows: Float[Tensor, "prompt d_model"]) -> Matrix:
    return bank.encode(rows).double().numpy()


def told_apart(rows: Matrix, labels: Labels) -> Float[np.ndarray, " column"]:
    """How many standard deviations harmful requests lie from harmless ones, by column."""
    pos, neg = rows[labels], rows[~labels]
    pooled = np.sqrt((pos.var(0) + neg.var(0)) / 2)
    gap = pos.mean(0) - neg.mean(0)
    return np.divide(gap, pooled, out=np.zeros_like(gap), where=pooled > 0)


def _in_folds(
    rows: Matrix, labels: Labels, groups: Sequence[str] | None, most: int, *, seed: int
) -> float:
    """AUROC of a regression on requests that neither it nor the choice of latents has seen."""
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold

    own = [str(i) for i in range(len(labels))] if groups is None else list(groups)
    folds = min(_FOLDS, int(labels.sum()), int((~labels).sum()), len(set(own)))
    cutter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    areas = []
    for inside, outside in cutter.split(rows, labels, own):
        if min(len(set(labels[part].tolist())) for part in (inside, outside)) < 2:
            continue  # A fold of one class tells nothing.
        taken = _taken(rows[inside], labels[inside], most, positive=False)
        made = Linear.fit(rows[inside][:, taken], labels[inside])
        areas.append(float(roc_auc_score(labels[outside], made(rows[outside][:, taken]))))
    if not areas:
        raise TooFewPromptsError("no fold has both classes", "fit on requests of more groups")
    return float(np.mean(areas))


def _taken(rows: Matrix, labels: Labels, most: int, *, positive: bool) -> list[int]:
    apart = told_apart(rows, labels)
    order = np.argsort(-(apart if positive else np.abs(apart)), kind="stable")
    return sorted(order[:most].tolist())


class _Words:
    """A bag of words with a logistic regression: what the text alone tells."""

    def __init__(self, texts: Sequence[str], labels: Labels) -> None:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression

        self.counter: Any = CountVectorizer(lowercase=True, token_pattern=r"\b\w+\b")
        counts = self.counter.fit_transform(texts)
        self.made: Any = LogisticRegression(solver="liblinear", random_state=0)
        self.made.fit(counts, labels)

    def __call__(self, texts: Sequence[str]) -> Scores:
        return self.made.decision_function(self.counter.transform(texts))

    @property
    def size(self) -> int:
        return len(self.counter.vocabulary_)


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    """Requests, and what the model makes of them at every site."""

    texts: list[str]
    read: Summary
    sites: list[Site]

    def last(self, site: Site) -> Tensor:
        return self.read.last[self.sites.index(site)]

    def end(self, site: Site) -> Tensor:
        return self.read.end[self.sites.index(site)]


@dataclass(frozen=True, slots=True, eq=False)
class _Data:
    """All splits as the model sees them; labels are True for harmful requests."""

    fitted: _Seen
    labels: Labels
    groups: tuple[str, ...] | None
    benign: _Seen
    tested: _Seen
    truth: Labels
    looking: _Seen | None
    most: int
    alpha: float
    seed: int
    draws: int


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    """A detector before it is measured."""

    name: str
    reads: str
    inputs: int
    score: Callable[[_Seen], Scores]


def sensor(
    model: Model,
    banks: Sequence[Bank],
    *,
    fit: Requests,
    calibration: Requests,
    test: Requests,
    lookalikes: Sequence[str] = (),
    direction: Direction | None = None,
    wrappers: Mapping[str, Wrapper] | None = None,
    most: int = MOST,
    alpha: float = 0.05,
    seed: int = 0,
    draws: int = 1000,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Sensed:
    """Fit a detector on latents, calibrate it, and hold it against others on held-out requests.

    Args:
        model: Under no edit.
        banks: One a site, cut to the latents that may be taken: those found upstream of refusal on
            prompts of none of the three splits, or on those of `fit`.
        fit: Latents, site and weights are chosen on these.
        calibration: The harmless ones set thresholds; the harmful ones are not used.
        test: Everything that is told is told of these.
        lookalikes: Harmless requests that look harmful, for false alarms; none may be in a split.
        direction: The refusal direction, pointing to refusal.
        wrappers: Attacks with controls, by name, that held-out requests are put into.
        most: Latents of the detector at most, up to 20.
        alpha: Share of false alarms that thresholds promise.
        seed: Of folds and resamples.
        draws: Resamples.
        batch_size: Most requests of a pass.
        progress: Called with the number of requests read; see `n_reads`.

    Raises:
        OverlapError: A request is in two splits.
        TooFewPromptsError: A split has fewer than ten of a class.
        ConfigError: There is no bank, two banks read one site, or `most` is out of range.
    """
    if not 1 <= most <= MOST:
        raise ConfigError(
            f"a sensor of {most} latents was asked for", f"give a number from 1 to {MOST}"
        )
    _check(banks, {"fit": fit, "calibration": calibration, "test": test}, lookalikes)
    wanted = [bank.site for bank in banks]
    if direction is not None and direction.site not in wanted:
        wanted.append(direction.site)

    def see(texts: Sequence[str]) -> _Seen:
        read = summarise(model, texts, wanted, batch_size=batch_size, progress=progress)
        return _Seen(list(texts), read, wanted)

    def told(split: Requests) -> Labels:
        return np.array([True] * len(split.harmful) + [False] * len(split.harmless))

    data = _Data(
        fitted=see([*fit.harmful, *fit.harmless]),
        labels=told(fit),
        groups=fit.groups,
        benign=see(calibration.harmless),
        tested=see([*test.harmful, *test.harmless]),
        truth=told(test),
        looking=see(lookalikes) if lookalikes else None,
        most=most,
        alpha=alpha,
        seed=seed,
        draws=draws,
    )
    rows, chosen = _sites(banks, data)
    best = int(np.argmax([one.fitted for one in rows]))
    bank, linear = chosen[best]
    found = _candidates(bank, linear, banks[best], direction, data)
    measured = [_measure(one, data) for one in found]
    detectors = tuple(one for one, _ in measured)
    rivalries = _rivalries(found, data)
    catches = _wrapped(found, [one for _, one in measured], test, wrappers or {}, see)
    top = rows[best].fitted
    earliest = next(one.site for one in rows if one.fitted >= top - _AS_GOOD)
    report = SensorReport(
        model=model.name,
        site=str(bank.site),
        latents=tuple(bank.ids.tolist()),
        weights=tuple(map(float, linear.weight)),
        sizes=_sizes(fit, calibration, test, lookalikes),
        detectors=detectors,
        rivalries=rivalries,
        wrappers=catches,
        sites=rows,
        earliest=earliest,
        text=_text(detectors, rivalries, rows, earliest, model),
        notes=_notes(test, calibration, alpha),
        seed=seed,
    )
    return Sensed(Sensor(bank, linear, measured[1][1]), report)


def n_reads(
    fit: Requests,
    calibration: Requests,
    test: Requests,
    lookalikes: Sequence[str],
    wrappers: Mapping[str, Wrapper],
) -> int:
    """How many requests `sensor` reads."""
    families = [one for one in wrappers.values() if _usable(one)]
    own = len(test.harmful) + len(test.harmless)
    wrapped = len(families) * (own + len(test.harmful))
    return (
        len(fit.harmful)
        + len(fit.harmless)
        + len(calibration.harmless)
        + own
        + len(lookalikes)
        + wrapped
    )


def _check(
    banks: Sequence[Bank], splits: Mapping[str, Requests], lookalikes: Sequence[str]
) -> None:
    if not banks or len({bank.site for bank in banks}) < len(banks):
        raise ConfigError(
            f"got banks at {', '.join(str(bank.site) for bank in banks) or 'no site'}",
            "give one bank a site, cut to the latents that may be taken",
        )
    for name, split in splits.items():
        asked = {"harmful": split.harmful, "harmless": split.harmless}
        for on, texts in asked.items():
            if len(texts) < _LEAST and not (name == "calibration" and on == "harmful"):
                raise TooFewPromptsError(
                    f"the {name} split has {len(texts)} {on} requests", f"give {_LEAST} or more"
                )
    where: dict[str, str] = {}
    every = [(name, [*one.harmful, *one.harmless]) for name, one in splits.items()]
    for name, texts in [*every, ("lookalikes", list(lookalikes))]:
        for text in texts:
            other = where.setdefault(normalise(text), name)
            if other != name:
                raise OverlapError(
                    f"the request {text[:60]!r} is in {other} and in {name}",
                    "keep what is fitted, calibrated and told apart",
                )


def _sites(
    banks: Sequence[Bank], data: _Data
) -> tuple[tuple[SiteSensor, ...], list[tuple[Bank, Linear]]]:
    fitted, labels, tested, truth, most = (
        data.fitted,
        data.labels,
        data.tested,
        data.truth,
        data.most,
    )
    rows, chosen = [], []
    for bank in banks:
        inside = _activations(bank, fitted.last(bank.site))
        taken = _taken(inside, labels, most, positive=False)
        cut = bank.sliced([int(bank.ids[i]) for i in taken])
        linear = Linear.fit(inside[:, taken], labels)
        dense = _dense(fitted.last(bank.site), labels)
        scores = linear(_activations(cut, tested.last(bank.site)))
        rows.append(
            SiteSensor(
                site=str(bank.site),
                latents=tuple(cut.ids.tolist()),
                fitted=_in_folds(inside, labels, data.groups, most, seed=data.seed),
                latent=auroc(scores, truth),
                dense=auroc(dense(tested.last(bank.site).double().numpy()), truth),
            )
        )
        chosen.append((cut, linear))
    return tuple(rows), chosen


def _dense(rows: Tensor, labels: Labels) -> Linear:
    # As many columns as the stream is wide, and fewer prompts: it needs a stronger penalty.
    return Linear.fit(rows.double().numpy(), labels, c=0.01)


def _candidates(
    bank: Bank, linear: Linear, whole: Bank, direction: Direction | None, data: _Data
) -> list[_Candidate]:
    fitted, labels = data.fitted, data.labels
    site = bank.site
    inside = _activations(whole, fitted.last(site))
    # Only what fires more on harmful requests can be summed.
    apart = told_apart(inside, labels)
    up = [i for i in _taken(inside, labels, data.most, positive=True) if apart[i] > 0] or [
        int(np.argmax(apart))
    ]
    rising = whole.sliced([int(whole.ids[i]) for i in up])
    unit = np.where(inside[:, up].std(0) > 0, inside[:, up].std(0), 1.0)
    stream = fitted.last(site)
    dense = _dense(stream, labels)
    fisher = Fisher.fit(stream[torch.from_numpy(labels)], stream[torch.from_numpy(~labels)])
    words = _Words(fitted.texts, labels)
    width = stream.shape[1]
    out = [
        _Candidate(
            SUM, str(site), len(up), lambda s: (_activations(rising, s.last(site)) / unit).sum(1)
        ),
        _Candidate(
            REGRESSION, str(site), len(bank), lambda s: linear(_activations(bank, s.last(site)))
        ),
        _Candidate(
            "stream, regression", str(site), width, lambda s: dense(s.last(site).double().numpy())
        ),
        _Candidate("stream, Fisher", str(site), width, lambda s: fisher(s.last(site)).numpy()),
    ]
    if direction is not None:
        unit_vector = direction.unit.double()
        out.append(
            _Candidate(
                "refusal direction, here",
                str(site),
                1,
                lambda s: (s.last(site).double() @ unit_vector).numpy(),
            )
        )
        if direction.position == -1:
            own = direction.site
            out.append(
                _Candidate(
                    "refusal direction, where it was found",
                    f"{own}, last token of the prompt",
                    1,
                    lambda s: (s.end(own).double() @ unit_vector).numpy(),
                )
            )
    out.append(_Candidate("words", "text", words.size, lambda s: words(s.texts)))
    return out


def _measure(one: _Candidate, data: _Data) -> tuple[Detector, Threshold | None]:
    tested, truth, looking, alpha = data.tested, data.truth, data.looking, data.alpha
    seed, draws = data.seed, data.draws
    scores = one.score(tested)
    try:
        threshold = calibrate(one.score(data.benign), alpha)
    except TooFewPromptsError:
        threshold = None
    look = one.score(looking) if looking is not None else None

    pos, neg = scores[truth], scores[~truth]
    row = Detector(
        name=one.name,
        reads=one.reads,
        inputs=one.inputs,
        auroc=auroc(scores, truth),
        tpr_at_1=rate_at(pos, neg, 0.01, seed=seed, draws=draws),
        tpr_at_5=rate_at(pos, neg, 0.05, seed=seed, draws=draws),
        threshold=threshold.value if threshold is not None else None,
        alpha=alpha,
        caught=_above(pos, threshold),
        false_alarms=_above(neg, threshold),
        lookalike_alarms=_above(look, threshold) if look is not None else None,
        lookalike_auroc=(
            auroc(np.concatenate([pos, look]), [1] * len(pos) + [0] * len(look))
            if look is not None
            else None
        ),
    )
    return row, threshold


def _above(values: Scores, threshold: Threshold | None) -> Estimate | None:
    if threshold is None:
        return None
    return proportion(int((values > threshold.value).sum()), len(values))


def rate_at(
    harmful: Scores, harmless: Scores, share: float, *, seed: int, draws: int = 1000
) -> Estimate | None:
    """Share of harmful scores above the lowest threshold that at most `share` of others pass.

    Returns:
        With a bootstrap interval over both classes, the threshold found anew in each resample.
        None where one harmless request is more than `share` of them.
    """
    if len(harmless) * share < 1 - 1e-9:
        return None

    def rate(pos: np.ndarray, neg: np.ndarray) -> float:
        own = np.sort(harmless[neg])[::-1]
        return float((harmful[pos] > own[int(len(own) * share + 1e-9)]).mean())

    return bootstrap_stratified(rate, len(harmful), len(harmless), seed=seed, draws=draws)


def _area(above: Scores, below: Scores) -> float:
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([above, below]))[: len(above)].sum()
    return float((ranks - len(above) * (len(above) + 1) / 2) / (len(above) * len(below)))


def auroc_difference(
    one: tuple[Scores, Scores], other: tuple[Scores, Scores], *, seed: int, draws: int = 1000
) -> Estimate:
    """AUROC of one detector less that of another on the same requests, paired bootstrap.

    Args:
        one: Scores of harmful and of harmless requests.
        other: Those of the other detector, in the same order.
        seed: Of the resamples.
        draws: How many.
    """

    def gap(pos: np.ndarray, neg: np.ndarray) -> float:
        return _area(one[0][pos], one[1][neg]) - _area(other[0][pos], other[1][neg])

    return bootstrap_stratified(gap, len(one[0]), len(one[1]), seed=seed, draws=draws)


def _rivalries(found: Sequence[_Candidate], data: _Data) -> tuple[Rivalry, ...]:
    tested, truth, looking = data.tested, data.truth, data.looking
    seed, draws = data.seed, data.draws
    scores = {one.name: one.score(tested) for one in found}
    look = {one.name: one.score(looking) for one in found} if looking is not None else {}
    out = []
    for own in (SUM, REGRESSION):
        for rival in scores:
            if rival in (SUM, REGRESSION):
                continue
            sides = [(scores[name][truth], scores[name][~truth]) for name in (own, rival)]
            gap = auroc_difference(sides[0], sides[1], seed=seed, draws=draws)
            hard = None
            if look:
                sides = [(scores[name][truth], look[name]) for name in (own, rival)]
                hard = auroc_difference(sides[0], sides[1], seed=seed, draws=draws)
            verdict = "no difference shown"
            if gap.low > 0:
                verdict = "latents win"
            elif gap.high < 0:
                verdict = "latents lose"
            out.append(Rivalry(own, rival, gap, hard, verdict))
    return tuple(out)


def _usable(one: Wrapper) -> bool:
    return one.system is None and not one.needs_code


def _wrapped(
    found: Sequence[_Candidate],
    thresholds: Sequence[Threshold | None],
    test: Requests,
    wrappers: Mapping[str, Wrapper],
    see: Callable[[Sequence[str]], _Seen],
) -> tuple[WrapperCatch, ...]:
    """Held-out requests in wrappers; what the reply is made to begin with comes too late to count.

    Wrappers with a system prompt of their own are left out: a sensor belongs to one template.
    """
    out = []
    for wrapper in wrappers.values():
        if not _usable(wrapper):
            continue
        attack, plain, benign = (
            see([wrapper.wrap(text, control=control).text for text in texts])
            for texts, control in (
                (test.harmful, False),
                (test.harmful, True),
                (test.harmless, False),
            )
        )
        for one, threshold in zip(found, thresholds, strict=True):
            scores = [one.score(seen) for seen in (attack, plain, benign)]
            rates = [_above(own, threshold) for own in scores]
            both = np.concatenate([scores[0], scores[2]])
            labels = [1] * len(scores[0]) + [0] * len(scores[2])
            out.append(
                WrapperCatch(
                    family=wrapper.family,
                    detector=one.name,
                    caught=rates[0],
                    control=rates[1],
                    false_alarms=rates[2],
                    auroc=auroc(both, labels),
                )
            )
    return tuple(out)


def _sizes(
    fit: Requests, calibration: Requests, test: Requests, lookalikes: Sequence[str]
) -> dict[str, int]:
    out = {"lookalikes": len(lookalikes), "calibration harmless": len(calibration.harmless)}
    for name, split in (("fit", fit), ("test", test)):
        out |= {f"{name} harmful": len(split.harmful), f"{name} harmless": len(split.harmless)}
    return out


def _text(
    detectors: Sequence[Detector],
    rivalries: Sequence[Rivalry],
    sites: Sequence[SiteSensor],
    earliest: str,
    model: Model,
) -> tuple[str, ...]:
    by_name = {one.name: one for one in detectors}
    said = []
    for own in (SUM, REGRESSION):
        area = by_name[own].auroc
        said.append(f"{own}: AUROC {area.value:.3f} [{area.low:.3f}, {area.high:.3f}].")
        for one in rivalries:
            if one.latents != own:
                continue
            gap = one.difference
            said.append(
                f"Against {one.rival} ({by_name[one.rival].auroc.value:.3f}): {one.verdict}, "
                f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]."
            )
    layer = Site.parse(earliest).layer
    said.append(
        f"The earliest of {len(sites)} sites that is as good as the best, on the fit split, is "
        f"{earliest}, at block {layer} of {model.n_layers}."
    )
    return tuple(said)


def _notes(test: Requests, calibration: Requests, alpha: float) -> tuple[str, ...]:
    n, m = len(test.harmless), len(calibration.harmless)
    out = []
    for share, least in ((0.01, 100), (0.05, 20)):
        if n < least:
            out.append(
                f"no rate at {share:.0%} false alarms: {n} harmless requests, {least} are needed"
            )
        else:
            out.append(
                f"at {share:.0%} false alarms the threshold rests on {int(n * share + 1e-9)} of "
                f"{n} harmless requests of the test itself"
            )
    if m < round(1 / alpha) - 1:
        out.append(f"no threshold: {m} harmless requests cannot promise {alpha:g} false alarms")
    out.append("thresholds promise nothing of lookalikes or wrapped requests")
    return tuple(out)

"""Latent Guard: a detector of harmful requests that reads the model itself, while it reads them.

A guard reads one tensor of the stream during the prefill that a reply needs anyway: at the last
token of the user's message, over windows of it, and over windows of earlier turns. The threshold is
set by split conformal prediction: for benign requests that are exchangeable with the calibration
ones, the share of false alarms is at most alpha. It says nothing about what an adversary sends, nor
about benign traffic of another kind.

References:
    Zhao, Huang, Wu, Bau, Shi 2025, arXiv:2507.11878 (Latent Guard: the reading position).
    Vovk, Gammerman, Shafer 2005; Vovk 2012 (split conformal prediction and its training-conditional
    law).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from demur.errors import (
    ConfigError,
    DegenerateVectorError,
    NonFiniteError,
    StoreError,
    TooFewPromptsError,
)
from demur.models import Conversation, Model
from demur.models.fingerprint import borrowed, check_made_on
from demur.progress import Progress
from demur.sites import Site, Span
from demur.stats import Values
from demur.store import known_format, read_files, write_files

ReadName = Literal["t_inst", "span", "turns"]
READS: tuple[ReadName, ...] = get_args(ReadName)
_NAME, _VERSION = "demur-guard", 1
_FORMAT = f"{_NAME}-{_VERSION}"
_AGAIN = "`demur guard fit` writes both files; keep them together"
# What a card with other keys or types than ours brings about.
UNPACKING = (ValueError, LookupError, TypeError, AttributeError, OverflowError)


# The threshold --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Threshold:
    """A conformal threshold: a request whose score lies above it raises the alarm.

    Attributes:
        value: Of the score.
        alpha: Bound on the share of false alarms, on average over calibration sets.
        n: Benign requests that it was calibrated on.
        exceeded: How many of them lie above it.
        bound: With 95 % confidence over calibration sets, the share of false alarms is below this,
            if requests are drawn one by one. Of families of 2 to 12 that score alike it is so in 85
            % of calibration sets; `alpha` is kept there too.
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
        NonFiniteError: A score is NaN or plus infinity, above which no request would lie.
    """
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha is {alpha}", "give a share of false alarms, such as 0.05")
    values = np.sort(np.asarray(scores, dtype=np.float64))
    bad = np.isnan(values) | (values == np.inf)  # -inf: there was nothing to read.
    if bad.any():
        raise NonFiniteError(
            f"{int(bad.sum())} of {len(values)} calibration scores are NaN or infinite",
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


# Reads ----------------------------------------------------------------------------------------


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
            NonFiniteError: A row holds NaN or infinity.
            DegenerateVectorError: Benign rows are all the same, or the classes have one mean.
        """
        if min(len(harmful), len(benign)) < 2:
            raise TooFewPromptsError(
                f"got {len(harmful)} harmful and {len(benign)} benign requests",
                "give each two or more",
            )
        pos, neg = harmful.double(), benign.double()
        for name, rows in (("harmful", pos), ("benign", neg)):
            bad = (~torch.isfinite(rows).all(1)).nonzero().flatten().tolist()
            if bad:
                raise NonFiniteError(
                    f"activations of {name} request {bad[0] + 1} hold NaN or infinity",
                    "try `--dtype float32`; the checkpoint may also be damaged",
                )
        spread = neg.T.cov()
        variance = float(spread.diagonal().mean())
        gap = pos.mean(0) - neg.mean(0)
        if not variance > 0.0 or not float(gap.norm()) > 0.0:
            raise DegenerateVectorError(
                "the activations of benign requests do not vary at all, or those of harmful ones "
                "have the same mean",
                "are all prompts the same, or read at a token of the template's?",
            )
        spread.diagonal().add_(ridge * variance)
        weight = torch.linalg.solve(spread, gap)
        scores = neg @ weight
        if not float(scores.std()) > 0.0:
            raise DegenerateVectorError(
                "benign requests all score the same, so there is no scale", "give more of them"
            )
        return cls(weight, float(scores.mean()), float(scores.std()))

    def __call__(self, rows: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row"]:
        """How far rows lie from benign ones, in their standard deviations."""
        return (rows.double() @ self.weight - self.mean) / self.spread


_GRID = np.linspace(0.0, 0.9, 91)


@dataclass(frozen=True, slots=True, eq=False)
class Rarity:
    """How rare a score is among benign requests, so that reads of different scale can be compared.

    Attributes:
        quantiles: Of benign scores, from the lowest to the 90th percentile in steps of one, (91,).
        excess: How far scores above the last of them lie above it on average. Beyond it their
            number is taken to fall exponentially.
    """

    quantiles: Float[Tensor, " 91"]
    excess: float

    @classmethod
    def fit(cls, scores: Values) -> Rarity:
        """Learn it from benign scores.

        Raises:
            TooFewPromptsError: There are fewer than twenty.
            NonFiniteError: A score is NaN or infinite.
        """
        values = np.asarray(scores, dtype=np.float64)
        if len(values) < 20:
            raise TooFewPromptsError(
                f"{len(values)} benign scores do not tell what is rare", "give 20 or more"
            )
        if not np.isfinite(values).all():
            raise NonFiniteError("a benign score is not finite", "find out which prompt it is")
        quantiles = np.quantile(values, _GRID)
        above = values[values > quantiles[-1]] - quantiles[-1]
        excess = float(above.mean()) if len(above) else 0.0  # None where the highest are equal.
        return cls(torch.from_numpy(quantiles), max(excess, 1e-9))

    def __call__(self, scores: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Minus the logarithm of the share of benign requests that score so high, nats.

        Below the lowest benign score it goes on falling in a straight line, so that order is kept.
        """
        known = self.quantiles.numpy()
        inside = -np.log1p(-np.interp(scores, known, _GRID))
        above = np.maximum(scores - known[-1], 0) / self.excess
        below = np.minimum(scores - known[0], 0) / self.excess
        return inside + above + below


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """One place in the conversation that is read, and how.

    Attributes:
        name: `t_inst`, the last token of the last user turn; `span`, windows of that turn, of which
            the highest counts; `turns`, the same over earlier user turns.
        fisher: The read itself.
        rarity: Of its scores among benign prompts that it was not fitted on.
        admitted: Whether the guard decides by it.
    """

    name: ReadName
    fisher: Fisher
    rarity: Rarity
    admitted: bool


def last_token(span: Bool[Tensor, "row token"]) -> Int[Tensor, " row"]:
    """Column of the last token of each row's span."""
    return span.shape[1] - 1 - span.flip(1).int().argmax(1)


def window_maxima(
    values: Float[Tensor, "row token"],
    span: Bool[Tensor, "row token"],
    *,
    window: int,
    stride: int,
) -> Float[Tensor, " row"]:
    """The highest mean of `values` over windows of a span; -inf in rows that have none of it.

    A span may consist of several runs of tokens; windows lie within one. Its last window ends with
    the run, so that no token is left out, and a run shorter than a window is one.

    Args:
        values: One number per token.
        span: Which tokens count.
        window: Tokens of a window.
        stride: Tokens from one window to the next.
    """
    inside = span.to(values.dtype)
    before = torch.nn.functional.pad(span, (1, 0))[:, :-1]
    after = torch.nn.functional.pad(span, (0, 1))[:, 1:]
    count = span.long().cumsum(1)
    # How many tokens of its own run stand before a token, itself included.
    began = torch.where(span & ~before, count - 1, torch.zeros_like(count)).cummax(1).values
    own = torch.where(span, count - began, torch.zeros_like(count))
    size = own.clamp(max=window)
    total = torch.nn.functional.pad((values * inside).cumsum(1), (1, 0))
    columns = torch.arange(1, span.shape[1] + 1, device=span.device).expand_as(size)
    means = (total.gather(1, columns) - total.gather(1, columns - size)) / size.clamp(min=1)
    ends = span & (((own >= window) & ((own - window) % stride == 0)) | ~after)
    return means.masked_fill(~ends, -torch.inf).max(1).values


@dataclass(frozen=True, slots=True, eq=False)
class Summary:
    """What fitting a guard needs of each prompt.

    Attributes:
        last: Activations at the last token of the last user turn, (site, prompt, d_model).
        mean: Mean of the activations over that turn, (site, prompt, d_model).
        end: Activations at the prompt's last token, (site, prompt, d_model).
    """

    last: Float[Tensor, "site prompt d_model"]
    mean: Float[Tensor, "site prompt d_model"]
    end: Float[Tensor, "site prompt d_model"]


Look = Callable[[Tensor, Mapping[Span, Tensor], Tensor], Mapping[str, Tensor]]
"""Activations of a chunk (row, token, d_model), its spans and ends -> per-row values by name."""


@contextmanager
def _looking(model: Model, looks: Mapping[Site, Look]) -> Iterator[dict[int, dict[str, Tensor]]]:
    """Keep what `looks` see of every prompt that is prefilled inside: number -> name -> value."""
    seen: dict[int, dict[str, Tensor]] = {}
    call = model.calls

    def watch(x: Tensor, site: Site) -> Tensor:
        nonlocal call
        chunk = model.chunk
        if model.calls != call:  # Rows are numbered anew.
            call = model.calls
            seen.clear()
        if chunk is None or chunk.is_prefix or chunk.rows is None:
            return x
        spans = {name: span.to(x.device) for name, span in chunk.spans.items()}
        if Span.INSTRUCTION not in spans or not bool(spans[Span.INSTRUCTION].any()):
            return x  # A token of the reply.
        found = looks[site](x.detach(), spans, chunk.ends.to(x.device))
        kept = {name: value.cpu() for name, value in found.items()}
        for row, number in enumerate(chunk.rows.tolist()):
            seen.setdefault(number, {}).update({name: kept[name][row] for name in kept})
        return x

    undo = [
        model.intercept(site, lambda x, site=site: watch(x, site))  # Bound now, not when called.
        for site in looks
    ]
    try:
        yield seen
    finally:
        for one in undo:
            one()


def prefill(
    model: Model,
    prompts: Sequence[str | Conversation],
    looks: Mapping[Site, Look],
    batch_size: int | None,
    progress: Progress | None,
) -> list[dict[str, Tensor]]:
    """One pass over prompts, no further than the last site, without the vocabulary head."""
    whole = model.encode(prompts)
    model.calls += 1
    with _looking(model, looks) as seen, model.prefix_kept():
        for index in whole.passes(tokens=model.tokens_per_pass, rows=batch_size):
            model.read(whole.rows(index))
            if progress is not None:
                progress(len(index))
    rows = [seen[number] for number in range(len(whole))]
    for number, row in enumerate(rows):
        # -inf stands for turns that a conversation does not have.
        if any(
            bool(torch.isnan(value).any() | (value == torch.inf).any()) for value in row.values()
        ):
            raise NonFiniteError(
                f"activations of prompt {number + 1} hold NaN or infinity",
                "try `--dtype float32`; the checkpoint may also be damaged",
            )
    return rows


def columns(
    rows: Sequence[Mapping[str, Tensor]], names: Sequence[ReadName], *, tag: str = ""
) -> dict[ReadName, Float[np.ndarray, " prompt"]]:
    """Numbers that looks found, by name, in order of the rows."""
    return {name: np.array([float(row[tag + name]) for row in rows]) for name in names}


def summarise(
    model: Model,
    prompts: Sequence[str | Conversation],
    sites: Sequence[Site],
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Read what `Read`s are fitted on, in one pass.

    Raises:
        NonFiniteError: A prompt's activations hold NaN or infinity.
    """

    def look(site: Site) -> Look:
        def of(x: Tensor, spans: Mapping[Span, Tensor], ends: Tensor) -> dict[str, Tensor]:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            span = spans[Span.INSTRUCTION]
            rows = torch.arange(len(x), device=x.device)
            share = span.to(wide.dtype) / span.sum(1, keepdim=True)
            return {
                f"{site} last": wide[rows, last_token(span)],
                f"{site} mean": torch.einsum("rtd,rt->rd", wide, share),
                f"{site} end": wide[rows, ends - 1],
            }

        return of

    rows = prefill(model, prompts, {site: look(site) for site in sites}, batch_size, progress)

    def stacked(what: str) -> Tensor:
        return torch.stack([torch.stack([row[f"{site} {what}"] for row in rows]) for site in sites])

    return Summary(stacked("last"), stacked("mean"), stacked("end"))


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """What a guard says of prompts, in order.

    Attributes:
        scores: Higher is more harmful, nats: how rare the prompt is among benign ones by the read
            that finds it rarest.
        reads: Each read's own score, in standard deviations of benign prompts; -inf where there is
            nothing to read.
        by: The read that decided.
        flagged: Whether the score lies above the threshold.
    """

    scores: Float[np.ndarray, " prompt"]
    reads: Mapping[ReadName, Float[np.ndarray, " prompt"]]
    by: tuple[ReadName, ...]
    flagged: Bool[np.ndarray, " prompt"]


def combined(
    reads: Sequence[Read], raw: Mapping[ReadName, Float[np.ndarray, " prompt"]]
) -> Float[np.ndarray, "read prompt"]:
    """The rarity of each read's scores; -inf where there is nothing to read."""
    out = []
    for read in reads:
        own = raw[read.name]
        there = np.isfinite(own)
        found = np.full(len(own), -np.inf)
        found[there] = read.rarity(own[there])
        out.append(found)
    return np.stack(out)


@dataclass(frozen=True, slots=True, eq=False)
class Guard:
    """A fitted and calibrated detector of harmful requests, for one model and one chat template.

    Attributes:
        site: The tensor of the stream that it reads.
        reads: With those that were not admitted, which are for comparison.
        window: Tokens of a window of `span` and `turns`.
        stride: Tokens from one window to the next.
        threshold: Above it a prompt is flagged.
        strata: What each kind of benign prompts alone would have asked for.
        about: Model, template, what it was fitted on: the card.
    """

    site: Site
    reads: tuple[Read, ...]
    window: int
    stride: int
    threshold: Threshold
    strata: Mapping[str, Threshold]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def admitted(self) -> tuple[Read, ...]:
        """The reads by which it decides."""
        return tuple(read for read in self.reads if read.admitted)

    @property
    def look(self) -> Look:
        """What every read says of a chunk of the stream at `site`, by the read's name."""
        return reads_of(
            {read.name: read.fisher for read in self.reads}, window=self.window, stride=self.stride
        )

    def raw(
        self,
        model: Model,
        prompts: Sequence[str | Conversation],
        *,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> dict[ReadName, Float[np.ndarray, " prompt"]]:
        """Every read's own score of each prompt, admitted or not."""
        rows = prefill(model, prompts, {self.site: self.look}, batch_size, progress)
        return columns(rows, [read.name for read in self.reads])

    def judge(self, raw: Mapping[ReadName, Float[np.ndarray, " prompt"]]) -> Scored:
        """Combine the reads' own scores and compare with the threshold.

        Raises:
            NonFiniteError: A score is NaN or infinite; it would pass for benign. Minus infinity is
                right where a conversation has no earlier turns.
        """
        bad = np.zeros(len(raw[self.admitted[0].name]), dtype=bool)
        for read in self.admitted:
            own = raw[read.name]
            bad |= ~np.isfinite(own) & ~((own == -np.inf) & (read.name == "turns"))
        if bad.any():
            raise NonFiniteError(
                f"a score is NaN or infinite, that of request {int(np.flatnonzero(bad)[0]) + 1}, "
                "so nothing can be said of it",
                "activations hold NaN or infinity: load the model in bfloat16 or float32",
            )
        rarities = combined(self.admitted, raw)
        best = rarities.argmax(0)
        scores = rarities.max(0)
        by: tuple[ReadName, ...] = tuple(self.admitted[int(i)].name for i in best)
        return Scored(scores, dict(raw), by, scores > self.threshold.value)

    def score(
        self,
        model: Model,
        prompts: Sequence[str | Conversation],
        *,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> Scored:
        """Score prompts without replying: one pass, no further than the site that is read.

        Args:
            model: The one that the guard was fitted on, see `belongs_to`.
            prompts: User messages, or conversations.
            batch_size: Most prompts of a pass; scores do not depend on it.
            progress: Called with the number of prompts done since the last call.

        Raises:
            TemplateError: A prompt cannot be laid out.
            NonFiniteError: Activations hold NaN or infinity.
        """
        if not prompts:
            raise TooFewPromptsError("there are no prompts to score", "give at least one")
        return self.judge(self.raw(model, prompts, batch_size=batch_size, progress=progress))

    @contextmanager
    def watching(self, model: Model) -> Iterator[Watch]:
        """Inside, every prompt that the model replies to is scored by its own prefill.

        Edits in force before are seen by the guard, those set later are not.

            with guard.watching(model) as watch:
                replies = model.generate(prompts, max_new_tokens=48)
            scored = watch.scored()
        """
        with _looking(model, {self.site: self.look}) as seen:
            yield Watch(self, seen)

    def borrowed(self, model: Model) -> tuple[str, ...]:
        """What a record says of a guard that was fitted on another model; nothing of one's own."""
        return borrowed("the guard", self.about, model)

    def belongs_to(self, model: Model, *, any_model: bool = False) -> None:
        """Check that this is the model, template and precision that the guard was fitted on.

        Another data type of the same checkpoint is another model: the threshold is a promise on
        scores, and they move with the rounding of every layer.

        Args:
            model: As it is loaded.
            any_model: Check no more than the width and the layer.

        Raises:
            StoreError: It is another one.
        """
        if not any_model:
            check_made_on("the guard", self.about, model, again="demur guard fit", verb="fitted")
        width = len(self.reads[0].fisher.weight)
        if width != model.d_model or self.site.layer >= model.n_layers:
            raise StoreError(
                f"the guard reads {width} numbers at {self.site}; {model.name} has "
                f"{model.n_layers} blocks of width {model.d_model}",
                "fit a guard for this model: `demur guard fit`",
            )


@dataclass(frozen=True, slots=True, eq=False)
class Watch:
    """Scores of the prompts that were prefilled so far; see `Guard.watching`."""

    guard: Guard
    seen: Mapping[int, Mapping[str, Tensor]]

    def scored(self) -> Scored:
        """What the guard says of them, in the order of the last call that replied to them.

        Raises:
            TooFewPromptsError: None was prefilled.
        """
        if not self.seen:
            raise TooFewPromptsError(
                "nothing was read", "have the model reply, or read, inside `watching`"
            )
        rows = [self.seen[number] for number in sorted(self.seen)]
        return self.guard.judge(columns(rows, [read.name for read in self.guard.reads]))


def reads_of(
    fishers: Mapping[ReadName, Fisher], *, window: int, stride: int, tag: str = ""
) -> Look:
    """What a chunk of the stream says by each read; names are preceded by `tag`."""
    names = list(fishers)
    weights = torch.stack([fishers[name].weight for name in names], 1).float()
    means = torch.tensor([fishers[name].mean for name in names], dtype=torch.float64)
    spreads = torch.tensor([fishers[name].spread for name in names], dtype=torch.float64)

    def of(x: Tensor, spans: Mapping[Span, Tensor], _ends: Tensor) -> dict[str, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # The mean of a window's projections is the projection of its mean: one product per token.
        values = (wide @ weights.to(wide)).double()
        values = (values - means.to(values)) / spreads.to(values)
        # Minus infinity would be taken for nothing to read, and the maximum would pass over it.
        values = values.masked_fill(~torch.isfinite(values), torch.nan)
        rows = torch.arange(len(x), device=x.device)
        span = spans[Span.INSTRUCTION]
        found = {}
        for i, name in enumerate(names):
            own = values[:, :, i]
            if name == "t_inst":
                found[tag + name] = own[rows, last_token(span)]
            elif name == "span":
                found[tag + name] = window_maxima(own, span, window=window, stride=stride)
            else:
                earlier = spans.get(Span.EARLIER, torch.zeros_like(span))
                found[tag + name] = window_maxima(own, earlier, window=window, stride=stride)
        return found

    return of


def raw_at(
    model: Model,
    prompts: Sequence[str | Conversation],
    fishers: Mapping[Site, Mapping[ReadName, Fisher]],
    *,
    window: int,
    stride: int,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> dict[Site, dict[ReadName, Float[np.ndarray, " prompt"]]]:
    """Scores of several sites' reads in one pass, to choose among them."""
    looks = {
        site: reads_of(own, window=window, stride=stride, tag=f"{site} ")
        for site, own in fishers.items()
    }
    rows = prefill(model, prompts, looks, batch_size, progress)
    return {site: columns(rows, list(own), tag=f"{site} ") for site, own in fishers.items()}


# The file -------------------------------------------------------------------------------------


@runtime_checkable
class _Packable(Protocol):
    """A `Read`, or one like it."""

    @property
    def name(self) -> str: ...
    @property
    def fisher(self) -> Fisher: ...
    @property
    def rarity(self) -> Rarity: ...
    @property
    def admitted(self) -> bool: ...


def pack_read(read: _Packable, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Put a read's tensors among `tensors`, and return the rest as what JSON can hold."""
    # A copy: `turns` reads with the direction of `span`, and shared memory cannot be written.
    tensors[f"{read.name}.weight"] = read.fisher.weight.clone()
    tensors[f"{read.name}.quantiles"] = read.rarity.quantiles.clone()
    return {
        "name": read.name,
        "admitted": read.admitted,
        "mean": read.fisher.mean,
        "spread": read.fisher.spread,
        "excess": read.rarity.excess,
    }


def unpack_read(
    tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> tuple[Any, Fisher, Rarity, bool]:
    """Name, fisher, rarity and admission of what `pack_read` packed.

    Raises:
        ValueError: A number is not finite, a scale not above zero, or a tensor of another shape.
    """
    name = meta["name"]
    weight, quantiles = tensors[f"{name}.weight"].double(), tensors[f"{name}.quantiles"].double()
    mean, spread, excess = (number_of(meta, key) for key in ("mean", "spread", "excess"))
    if weight.ndim != 1 or quantiles.shape != (len(_GRID),):
        raise ValueError(f"the tensors of the read {name!r} are of another shape")
    if not bool(torch.isfinite(weight).all() and torch.isfinite(quantiles).all()):
        raise ValueError(f"the tensors of the read {name!r} are not finite")
    if spread <= 0 or excess <= 0 or bool((quantiles.diff() < 0).any()):
        raise ValueError(f"the scale of the read {name!r} is none")
    if not isinstance(meta["admitted"], bool):
        raise TypeError(f"whether the read {name!r} was admitted is {meta['admitted']!r:.40}")
    return name, Fisher(weight, mean, spread), Rarity(quantiles, excess), meta["admitted"]


def number_of(meta: Mapping[str, Any], key: str) -> float:
    """A finite number of a card.

    Raises:
        TypeError: It is no number.
        ValueError: It is not finite.
    """
    found = meta[key]
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise TypeError(f"`{key}` is {found!r:.40}, no number")
    if not math.isfinite(found):
        raise ValueError(f"`{key}` is {found}")
    return float(found)


def count_of(meta: Mapping[str, Any], key: str) -> int:
    """A count of a card, at least 1.

    Raises:
        TypeError: It is no whole number.
        ValueError: It is below 1.
    """
    found = meta[key]
    if isinstance(found, bool) or not isinstance(found, int):
        raise TypeError(f"`{key}` is {found!r:.40}, no whole number")
    if found < 1:
        raise ValueError(f"`{key}` is {found}")
    return found


def threshold_of(meta: Mapping[str, Any]) -> Threshold:
    """A threshold of a card.

    Raises:
        TypeError: It has other fields, or one is no number.
        ValueError: A share is none, or a number is not finite.
    """
    found = Threshold(**meta)
    for key in ("value", "alpha", "bound"):
        number_of(meta, key)
    if not 0 < found.alpha < 1 or not 0 < found.bound <= 1:
        raise ValueError(f"alpha is {found.alpha}, and its bound {found.bound}")
    if not 0 <= found.exceeded <= count_of(meta, "n"):
        raise ValueError(f"{found.exceeded} of {found.n} calibration scores lie above it")
    return found


def pack_guard(guard: Guard) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A guard as tensors by name, and the rest as what JSON can hold."""
    tensors: dict[str, Tensor] = {}
    meta = {
        "format": _FORMAT,
        "site": str(guard.site),
        "window": guard.window,
        "stride": guard.stride,
        "reads": [pack_read(read, tensors) for read in guard.reads],
        "threshold": asdict(guard.threshold),
        "strata": {name: asdict(one) for name, one in guard.strata.items()},
        "about": dict(guard.about),
    }
    return tensors, meta


def unpack_guard(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Guard:
    """What `pack_guard` packed.

    Raises:
        ValueError: A number is out of range, or no read is admitted; other errors of `UNPACKING`
            where something is missing or of another type.
    """
    reads = tuple(Read(*unpack_read(tensors, one)) for one in meta["reads"])
    if not any(read.admitted for read in reads):
        raise ValueError("it holds no usable read")
    if {read.name for read in reads} - set(READS) or len({read.name for read in reads}) < len(
        reads
    ):
        raise ValueError(f"its reads are {', '.join(str(read.name) for read in reads)}")
    if len({len(read.fisher.weight) for read in reads}) > 1:
        raise ValueError("its reads are of several widths")
    if not isinstance(meta["about"], dict):
        raise TypeError("`about` is no object")
    return Guard(
        Site.parse(meta["site"]),
        reads,
        count_of(meta, "window"),
        count_of(meta, "stride"),
        threshold_of(meta["threshold"]),
        {name: threshold_of(one) for name, one in meta["strata"].items()},
        meta["about"],
    )


def save_guard(guard: Guard, path: Path) -> None:
    """Write `path` (safetensors) and beside it its card, `<path stem>.json`.

    Raises:
        ConfigError: `path` does not end in `.safetensors`.
        StoreError: A file could not be written.
    """
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path} is no name for a guard", "let it end in .safetensors")
    tensors, meta = pack_guard(guard)
    write_files(path, tensors, meta, head={"format": _FORMAT})


def load_guard(path: Path, model: Model | None = None, *, any_model: bool = False) -> Guard:
    """Read a guard and its card back.

    Args:
        path: The `.safetensors` file.
        model: If given, the guard must have been fitted on this very model.
        any_model: Only its width and layer must be those of the model; `Guard.borrowed` says what
            differs.

    Raises:
        StoreError: A file is missing or damaged, was changed after it was written, is of another
            version, or the guard belongs to another model.
    """
    tensors, meta = read_files(path, what="guard", again=_AGAIN)
    check_format(meta.get("format"), path)
    try:
        guard = unpack_guard(tensors, meta)
    except UNPACKING as error:
        raise StoreError(
            f"no guard can be read from {path} and {path.stem}.json: {error}", _AGAIN
        ) from error
    if model is not None:
        guard.belongs_to(model, any_model=any_model)
    return guard


def check_format(told: object, path: Path) -> None:
    """See that a guard is of the version that is read here; errors are those of `known_format`."""
    known_format(told, path, name=_NAME, what="a guard", newest=_VERSION, again="demur guard fit")

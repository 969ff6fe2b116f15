"""Directions read on answers: what bad text does to a model, and what bad training did to it.

Four mean activations are read, teacher-forced: those of base and organism on the bad answers and
on the good ones. Their differences are the 2x2, which is easily mixed up and hence always named:

==================  ======================================  ===================================
`text_base`         base on bad answers - base on good      how bad text reads to the base
`text_organism`     organism on bad - organism on good      how it reads to the organism
`model_bad`         organism - base, on the bad answers     what training changed, on bad text
`model_good`        organism - base, on the good answers    what training changed, on good text
==================  ======================================  ===================================

By construction `text_organism - text_base = model_bad - model_good`. With a good twin in place of
the base (`Deltas.beyond`), `model_bad` and `model_good` are the difference in differences of
activations.

Vectors are of the residual stream at a site, averaged over the answer's tokens alone: no token of
the question, of the template or of the end of the turn. As a `Direction` they have the position
`ANSWER`, 0: positions count from the end of the prompt, -1 is its last token, so answers begin at 0
and the number stands here for the mean over all of an answer.

Intervals draw whole groups of items, never rows or tokens.

References:
    Soligo, Turner, Rajamanoharan, Nanda 2025, arXiv:2506.11618, section 3 (mean differences over
    answer tokens).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from demur.directions import Direction
from demur.em.advice import AdviceItem
from demur.em.margin import by_group
from demur.errors import (
    ConfigError,
    NonFiniteError,
    StoreError,
    TemplateError,
    TooFewPromptsError,
    UnknownNameError,
)
from demur.models import Model
from demur.progress import Progress
from demur.sites import Site, Span
from demur.stats import Estimate
from demur.store import known_format, read_files, write_files

Side = Literal["bad", "good"]
Kind = Literal["text_base", "text_organism", "model_bad", "model_good"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Weighting = Literal["items", "tokens"]

ANSWER = 0
"""Position of a direction that was read as the mean over the tokens of answers."""

_NAME, _VERSION = "demur-em-deltas", 1
_FORMAT = f"{_NAME}-{_VERSION}"
_DRAWS = 1000
_SPLITS = 100


def answer_sites(model: Model) -> tuple[Site, ...]:
    """The output of every block, where answers are read unless other sites are given."""
    return tuple(Site(layer, "resid_post") for layer in range(model.n_layers))


# Reading -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class AnswerMeans:
    """Mean activations over the tokens of one answer per item.

    Attributes:
        values: In residual-stream units, float32 (float64 from a float64 model), on the CPU.
        counts: Tokens of each answer.
        sites: The tensors read.
        which: Whether bad or good answers.
        ids: Of the items.
        groups: Domain and topic of each item: the clusters of all intervals.
        texts: Digest of questions and answers, in this order.
        name: Of the model.
        model: Its fingerprint.
    """

    values: Float[Tensor, "site item d_model"]
    counts: Int[Tensor, " item"]
    sites: tuple[Site, ...]
    which: Side
    ids: tuple[str, ...]
    groups: tuple[tuple[str, str], ...]
    texts: str
    name: str
    model: str

    def at(self, site: Site) -> Float[Tensor, "item d_model"]:
        """The rows of one site.

        Raises:
            UnknownNameError: The site was not read.
        """
        if site not in self.sites:
            raise UnknownNameError(
                f"{site} was not read", f"there are: {', '.join(map(str, self.sites))}"
            )
        return self.values[self.sites.index(site)]


@torch.no_grad()
def read_answers(
    model: Model,
    items: Sequence[AdviceItem],
    *,
    which: Side = "bad",
    sites: Sequence[Site] | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> AnswerMeans:
    """Read the mean over each answer's tokens, given its question.

    Edits in force are respected. The vocabulary head is not run, nor are blocks behind the last
    site.

    Args:
        model: Base, organism or twin.
        items: Questions with their answers.
        which: The answers to read.
        sites: Tensors to read; None is the output of every block.
        batch_size: Most answers that are run together; None is as many as the device is best
            given. Results do not depend on it, but for floating-point noise.
        progress: Called with the number of answers done since the last call.

    Raises:
        TooFewPromptsError: There are no items.
        TemplateError: An answer is empty, or see `Model.encode`.
        NonFiniteError: An answer's activations hold NaN or infinity; it is named.
    """
    if not items:
        raise TooFewPromptsError("there are no answers to read", "give at least one item")
    answers = [item.bad if which == "bad" else item.good for item in items]
    blank = next(
        (item.id for item, text in zip(items, answers, strict=True) if not text.strip()), ""
    )
    if blank:
        raise TemplateError(f"item {blank} has no {which} answer", "leave the item out")
    places = tuple(sites) if sites is not None else answer_sites(model)
    whole = model.encode([item.question for item in items], answers)
    counts = whole.spans[Span.RESPONSE].sum(1)
    wide = torch.promote_types(model.dtype, torch.float32)
    values = torch.empty(len(places), len(items), model.d_model, dtype=wide)
    held: dict[Site, Tensor] = {}

    def keep(x: Tensor, site: Site) -> Tensor:
        chunk = model.chunk
        if chunk is not None and not chunk.is_prefix:
            mask = chunk.spans[Span.RESPONSE].to(x.device, torch.promote_types(x.dtype, wide))
            sums = torch.einsum("rt,rtd->rd", mask, x.to(mask.dtype)).to("cpu", wide)
            held[site] = held[site] + sums if site in held else sums
        return x

    with ExitStack() as undo:
        undo.enter_context(model.prefix_kept())
        for site in places:
            undo.callback(model.intercept(site, lambda x, site=site: keep(x, site)))
        for index in whole.passes(tokens=model.tokens_per_pass, rows=batch_size):
            model.read(whole.rows(index))
            values[:, index] = torch.stack([held[site] for site in places])
            held.clear()
            if progress is not None:
                progress(len(index))
    values /= counts.to(wide).unsqueeze(1)
    finite = torch.isfinite(values).all(2).all(0)
    if not bool(finite.all()):
        bad = items[int((~finite).nonzero()[0])]
        raise NonFiniteError(
            f"activations on the {which} answer of item {bad.id} ({bad.question[:60]!r}) hold NaN "
            "or infinity",
            "try `--dtype float32`; the checkpoint may also be damaged",
        )
    digest = blake2b(digest_size=16)
    for item, answer in zip(items, answers, strict=True):
        digest.update(json.dumps([item.question, answer]).encode())
    return AnswerMeans(
        values,
        counts,
        places,
        which,
        tuple(item.id for item in items),
        tuple((item.domain, item.group) for item in items),
        digest.hexdigest(),
        model.name,
        model.fingerprint,
    )


@dataclass(frozen=True, slots=True, eq=False)
class AnswerPair:
    """One model's mean activations on the bad and on the good answers of the same items."""

    bad: AnswerMeans
    good: AnswerMeans

    def spread(self, site: Site) -> Float[Tensor, "row d_model"]:
        """Rows centred within their class, float64: their Gram matrix is the scatter within."""
        sides = [side.at(site).double() for side in (self.bad, self.good)]
        return torch.cat([side - side.mean(0) for side in sides])


def read_pair(
    model: Model,
    items: Sequence[AdviceItem],
    *,
    sites: Sequence[Site] | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> AnswerPair:
    """Read both answers of each item; arguments and errors are those of `read_answers`."""
    bad, good = (
        read_answers(
            model, items, which=which, sites=sites, batch_size=batch_size, progress=progress
        )
        for which in get_args(Side)
    )
    return AnswerPair(bad, good)


# Differences -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """One of the 2x2: the difference of two sets of mean activations, at every site.

    Attributes:
        kind: Which one.
        plus: What it points to.
        minus: What it points away from, over the same items.
        weighting: "items": mean over items of each item's difference, so that no question weighs
            more than another. "tokens": difference of the means over all tokens of all answers, in
            which long answers weigh more, as in the paper.
    """

    kind: Kind
    plus: AnswerMeans
    minus: AnswerMeans
    weighting: Weighting = "items"

    def __post_init__(self) -> None:
        if (self.plus.ids, self.plus.sites) != (self.minus.ids, self.minus.sites):
            raise ConfigError(
                "a difference is taken between other items, or at other sites",
                "read the same items at the same sites on both sides",
            )

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where it was read."""
        return self.plus.sites

    @property
    def groups(self) -> tuple[tuple[str, str], ...]:
        """Domain and topic of each item."""
        return self.plus.groups

    def __len__(self) -> int:
        return len(self.plus.ids)

    def rows(self, site: Site) -> Float[Tensor, "item d_model"]:
        """Each item's own difference, float64."""
        return self.plus.at(site).double() - self.minus.at(site).double()

    def vector(self, site: Site) -> Float[Tensor, " d_model"]:
        """The difference at a site, float64, in residual-stream units."""
        return torch.from_numpy(_Weighted(self, site)(np.ones(len(self))))

    def direction(self, site: Site) -> Direction:
        """The same as a direction, at position `ANSWER`.

        Raises:
            DegenerateVectorError: The difference is zero.
        """
        how = "within items" if self.weighting == "items" else "over all tokens"
        recipe = (
            f"EM {self.kind}: {self.plus.which} answers of {self.plus.name} "
            f"({self.plus.model[:12]}) - {self.minus.which} answers of {self.minus.name} "
            f"({self.minus.model[:12]}), {how}, {len(self)} items in {len(set(self.groups))} "
            f"groups ({self.plus.texts[:12]}, {self.minus.texts[:12]})"
        )
        return Direction.from_vector(self.vector(site), site=site, position=ANSWER, recipe=recipe)

    def directions(self) -> dict[Site, Direction]:
        """The directions of all sites where the difference is not zero, as before an adapter."""
        return {site: self.direction(site) for site in self.sites if bool(self.vector(site).any())}

    def norm(self, site: Site, *, seed: int, draws: int = _DRAWS) -> Estimate:
        """Length in residual-stream units, with an interval from drawing whole groups.

        What differs between items adds to the length of any mean, and resampling adds it again:
        the interval leans upwards. See `unbiased_norm`.

        Raises:
            TooFewPromptsError: There are fewer than two groups.
        """
        of = _Weighted(self, site)
        n = len(self)
        return by_group(
            lambda rows: float(np.linalg.norm(of(_times(rows, n)))),
            self.groups,
            seed=seed,
            draws=draws,
        )

    def unbiased_norm(self, site: Site) -> float:
        """Length without what differs between groups; 0 if no more than that is there.

        The square is the mean inner product of the differences of items of two different groups,
        which no item's own noise enters. It weighs items alike.

        Raises:
            TooFewPromptsError: There are fewer than two groups.
        """
        members = list(_members(self.groups).values())
        _need_groups(len(members), 2)
        rows = self.rows(site).numpy()
        sums = np.stack([rows[own].sum(0) for own in members])
        sizes = np.array([len(own) for own in members])
        across = (sums.sum(0) ** 2).sum() - (sums**2).sum()
        pairs = sizes.sum() ** 2 - (sizes**2).sum()
        return float(max(across / pairs, 0.0) ** 0.5)

    def reliability(self, site: Site, *, seed: int, splits: int = _SPLITS) -> Estimate:
        """Cosine of the difference on one half of the groups with that on the other.

        Returns:
            Mean over random halves; the interval holds 95% of them and is no confidence interval.
            For all items, Spearman and Brown expect 2 r / (1 + r).

        Raises:
            TooFewPromptsError: There are fewer than four groups.
        """
        of = _Weighted(self, site)
        found = [_cosine(of(a), of(b)) for a, b in _halves(self.groups, splits, seed)]
        return _over_splits(found, len(self))


@dataclass(frozen=True, slots=True, eq=False)
class Deltas:
    """The 2x2 of a base and an organism.

    Attributes:
        base: What the base does on the items' answers.
        organism: What the organism does.
        weighting: See `Delta`.
    """

    base: AnswerPair
    organism: AnswerPair
    weighting: Weighting = "items"

    def __post_init__(self) -> None:
        for a, b in ((self.base.bad, self.organism.bad), (self.base.good, self.organism.good)):
            if a.texts != b.texts or not torch.equal(a.counts, b.counts):
                raise ConfigError(
                    f"{a.name} and {b.name} read other {a.which} answers, or cut them into other "
                    "tokens",
                    "read the same items on both, with one tokenizer",
                )

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the four were read."""
        return self.base.bad.sites

    @property
    def text_base(self) -> Delta:
        """How bad text reads to the base."""
        return Delta("text_base", self.base.bad, self.base.good, self.weighting)

    @property
    def text_organism(self) -> Delta:
        """How bad text reads to the organism."""
        return Delta("text_organism", self.organism.bad, self.organism.good, self.weighting)

    @property
    def model_bad(self) -> Delta:
        """What training changed, on bad text."""
        return Delta("model_bad", self.organism.bad, self.base.bad, self.weighting)

    @property
    def model_good(self) -> Delta:
        """What training changed, on good text."""
        return Delta("model_good", self.organism.good, self.base.good, self.weighting)

    def of(self, kind: Kind) -> Delta:
        """One of the four, by name."""
        return cast(Delta, getattr(self, kind))

    def beyond(self, twin: Deltas) -> Deltas:
        """The same with the good twin in the base's place: what bad training did beyond good.

        Most of `model_bad` may be what any such training does. On one rank-1 organism of
        SmolLM2-135M it had a cosine of 0.72 to 0.91 with its twin's (blocks 15, 22 and 29; 64
        items in 11 groups; one seed).

        Raises:
            ConfigError: The two were read on other items, sites or bases.
        """
        if self.base.bad.model != twin.base.bad.model or self.sites != twin.sites:
            raise ConfigError(
                "organism and twin stand on other bases, or were read at other sites",
                "read both on one base, at the same sites",
            )
        return Deltas(twin.organism, self.organism, self.weighting)

    def pooled(self) -> Deltas:
        """The same with every token weighing alike."""
        return replace(self, weighting="tokens")


def deltas(
    base: Model,
    organism: Model,
    items: Sequence[AdviceItem],
    *,
    sites: Sequence[Site] | None = None,
    weighting: Weighting = "items",
    base_pair: AnswerPair | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Deltas:
    """Read the 2x2: four passes over the items, two if the base was read before.

    Args:
        base: The base, or the good twin for what bad training did beyond good training.
        organism: What was trained, put on the same base: `organism.on(base)`.
        items: Held out from training. What is selected by a direction is measured on others.
        sites: Tensors to read; None is the output of every block.
        weighting: See `Delta`.
        base_pair: What `read_pair` found on the base, for the same items and sites.
        batch_size: As for `read_answers`.
        progress: Called with the number of answers done since the last call; 4 an item, or 2.

    Raises:
        ConfigError: `base_pair` was read from other items, sites, or another model; or the two
            models cut text into other tokens.
        TemplateError, NonFiniteError: See `read_answers`.
    """
    if base_pair is not None and base_pair.bad.model != base.fingerprint:
        raise ConfigError(
            f"what is given as read on {base.name} was read on {base_pair.bad.name}",
            "read it again with `read_pair`",
        )
    about: dict[str, Any] = {"sites": sites, "batch_size": batch_size, "progress": progress}
    first = base_pair if base_pair is not None else read_pair(base, items, **about)
    found = Deltas(first, read_pair(organism, items, **about), weighting)
    if found.base.bad.sites != found.organism.bad.sites:
        raise ConfigError("base and organism were read at other sites", "read the same sites")
    return found


# Cosines -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CosineRow:
    """The cosine of two differences over the same items, and what chance and noise would do.

    Attributes:
        first: Name of the one.
        second: Name of the other.
        site: Of both.
        value: With an interval from drawing whole groups, for both at once.
        across: The one on a half of the groups with the other on the other half, mean over halves:
            noise that both share because they share items does not enter.
        corrected: `across` over the geometric mean of both reliabilities, which estimates the
            cosine of what both would be without noise; None if one has no reliability. It may
            exceed 1.
        null_low: 2.5% of the cosines of `second` with random vectors that have the covariance
            within classes of answers in the base; None without it.
        null_high: 97.5%.
        percentile: Share of random vectors whose cosine with `second` is smaller in size.
    """

    first: str
    second: str
    site: Site
    value: Estimate
    across: float
    corrected: float | None
    null_low: float | None
    null_high: float | None
    percentile: float | None


def cosine(
    a: Delta, b: Delta, site: Site, *, seed: int, draws: int = _DRAWS, other: Site | None = None
) -> Estimate:
    """Cosine of two differences, with an interval from drawing whole groups for both at once.

    Args:
        a: The one.
        b: The other, over the same items.
        site: Of `a`, and of `b` too unless `other` is given.
        seed: Of the draws.
        draws: How many.
        other: Site of `b`.

    Raises:
        ConfigError: They are over other items.
        TooFewPromptsError: There are fewer than two groups, or one of the two is zero.
    """
    _same_items(a, b)
    first, second, n = _Weighted(a, site), _Weighted(b, other or site), len(a)

    def of(rows: Int[np.ndarray, " n"]) -> float:
        times = _times(rows, n)
        return _cosine(first(times), second(times))

    found = by_group(of, a.groups, seed=seed, draws=draws)
    # Draws add noise, which turns two vectors apart: percentiles lie below the value, and held what
    # so many items give on average in 89 % of samples. Their width about the value is right.
    half = (found.high - found.low) / 2
    return replace(
        found,
        low=max(-1.0, found.value - half),
        high=min(1.0, found.value + half),
        method=f"{found.method}, about the value",
    )


def null_cosines(
    vector: Float[Tensor, " d_model"],
    spread: Float[Tensor, "row d_model"],
    *,
    draws: int = _DRAWS,
    seed: int,
) -> Float[np.ndarray, " draw"]:
    """Cosines of a vector with random ones that vary as the rows of `spread` do.

    Random vectors are normal with covariance `spread^T spread`. Real activations vary in few
    directions, so these cosines are several times wider than those of isotropic vectors.
    """
    rng = np.random.default_rng(seed)
    rows = spread.double().numpy()
    random = rng.standard_normal((draws, len(rows))) @ rows
    unit = (vector.double() / vector.double().norm()).numpy()
    return random @ unit / np.linalg.norm(random, axis=1)


def compare(
    a: tuple[str, Delta],
    b: tuple[str, Delta],
    site: Site,
    *,
    seed: int,
    draws: int = _DRAWS,
    splits: int = _SPLITS,
    within: AnswerPair | None = None,
) -> CosineRow:
    """Compare two differences at a site.

    Args:
        a: Name and difference.
        b: The same of the other.
        site: Of both.
        seed: Of draws and halves.
        draws: Of groups, and of random vectors.
        splits: Halves.
        within: What `read_pair` found on the base: its covariance makes the null.

    Raises:
        ConfigError: They are over other items.
        TooFewPromptsError: There are fewer than four groups.
    """
    (first, one), (second, two) = a, b
    value = cosine(one, two, site, seed=seed, draws=draws)
    left, right = _Weighted(one, site), _Weighted(two, site)
    across, own, others = list[float](), list[float](), list[float]()
    for half, rest in _halves(one.groups, splits, seed):
        x, y, u, v = left(half), left(rest), right(half), right(rest)
        across.append((_cosine(x, v) + _cosine(y, u)) / 2)
        own.append(_cosine(x, y))
        others.append(_cosine(u, v))
    mean, *both = (float(np.mean(found)) for found in (across, own, others))
    null = (
        null_cosines(two.vector(site), within.spread(site), draws=draws, seed=seed)
        if within is not None
        else None
    )
    low, high = (
        (None, None) if null is None else (float(q) for q in np.quantile(null, (0.025, 0.975)))
    )
    return CosineRow(
        first,
        second,
        site,
        value,
        mean,
        mean / (both[0] * both[1]) ** 0.5 if min(both) > 0 else None,
        low,
        high,
        None if null is None else float((np.abs(null) < abs(value.value)).mean()),
    )


def grid(
    own: Deltas, site: Site, *, seed: int, draws: int = _DRAWS, kinds: Sequence[Kind] = KINDS
) -> tuple[CosineRow, ...]:
    """Compare each two of an organism's 2x2."""
    named = [(kind, own.of(kind)) for kind in kinds]
    return tuple(
        compare(a, b, site, seed=seed, draws=draws, within=own.base)
        for i, a in enumerate(named)
        for b in named[i + 1 :]
    )


def versus_twin(
    own: Deltas, twin: Deltas, site: Site, *, seed: int, draws: int = _DRAWS
) -> tuple[CosineRow, ...]:
    """Compare an organism's differences with its good twin's and with the base's own.

    That fine-tunes agree says nothing as long as they agree as much with a twin that was trained on
    good answers, or with the base that was not trained at all.

    Args:
        own: Of the organism.
        twin: Of the good twin, on the same base and items.
        site: Where.
        seed: Of the draws.
        draws: How many.

    Raises:
        ConfigError: The two were read on other items or another base.
        TooFewPromptsError: There are fewer than four groups, or a difference is zero there.
    """
    beyond = own.beyond(twin)
    text = {
        "organism text_organism": own.text_organism,
        "twin text_organism": twin.text_organism,
        "base text_base": own.text_base,
    }
    trained = {
        f"{who} {kind}": found.of(kind)
        for kind in ("model_bad", "model_good")
        for who, found in (("organism", own), ("twin", twin))
    }
    named = {**text, **trained, "organism beyond twin model_bad": beyond.model_bad}
    pairs = [
        ("organism text_organism", "twin text_organism"),
        ("organism text_organism", "base text_base"),
        ("twin text_organism", "base text_base"),
        ("organism model_bad", "twin model_bad"),
        ("organism model_good", "twin model_good"),
        ("organism model_bad", "base text_base"),
        ("twin model_bad", "base text_base"),
        ("organism beyond twin model_bad", "base text_base"),
    ]
    return tuple(
        compare((a, named[a]), (b, named[b]), site, seed=seed, draws=draws, within=own.base)
        for a, b in pairs
    )


# Arithmetic --------------------------------------------------------------------------------------


class _Weighted:
    """The vector of a difference, as a function of how often each item is counted."""

    def __init__(self, delta: Delta, site: Site) -> None:
        if delta.weighting == "items":
            self.parts = [(delta.rows(site).numpy(), np.ones(len(delta)))]
        else:
            self.parts = [
                (sign * side.at(site).double().numpy(), side.counts.numpy().astype(float))
                for sign, side in ((1, delta.plus), (-1, delta.minus))
            ]

    def __call__(self, times: Float[np.ndarray, " item"]) -> Float[np.ndarray, " d_model"]:
        vectors = []
        for rows, counts in self.parts:
            weights = times * counts
            vectors.append(weights @ rows / weights.sum())
        return sum(vectors[1:], vectors[0])


def _times(rows: Int[np.ndarray, " n"], n: int) -> Float[np.ndarray, " item"]:
    return np.bincount(rows, minlength=n).astype(float)


def _cosine(a: Float[np.ndarray, " d_model"], b: Float[np.ndarray, " d_model"]) -> float:
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size > 0 else float("nan")  # `stats` tells NaN from a number.


def _members(groups: Sequence[tuple[str, str]]) -> dict[tuple[str, str], list[int]]:
    found: dict[tuple[str, str], list[int]] = {}
    for i, group in enumerate(groups):
        found.setdefault(group, []).append(i)
    return found


def _need_groups(n: int, wanted: int) -> None:
    if n < wanted:
        raise TooFewPromptsError(
            f"the items are of {n} groups", f"give items of {wanted} groups or more"
        )


def _halves(
    groups: Sequence[tuple[str, str]], splits: int, seed: int
) -> list[tuple[Float[np.ndarray, " item"], Float[np.ndarray, " item"]]]:
    """Random halves of the groups, as how often each item is counted."""
    members = list(_members(groups).values())
    _need_groups(len(members), 4)
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(splits):
        order = rng.permutation(len(members))
        first = np.zeros(len(groups))
        for one in order[: len(members) // 2]:
            first[members[one]] = 1.0
        out.append((first, 1.0 - first))
    return out


def _over_splits(found: Sequence[float], n: int) -> Estimate:
    values = np.asarray(found)
    if not np.isfinite(values).all():
        raise TooFewPromptsError(
            "a difference is zero on half of the groups", "read it at a site where it is not"
        )
    low, high = np.quantile(values, (0.025, 0.975))
    return Estimate(
        float(values.mean()), float(low), float(high), n, f"95% of {len(values)} halves by group"
    )


def _same_items(a: Delta, b: Delta) -> None:
    if a.plus.ids != b.plus.ids:
        raise ConfigError("two differences are over other items", "read the same items for both")


# Files -------------------------------------------------------------------------------------------


def save_deltas(found: Deltas, path: Path, *, about: Mapping[str, Any] | None = None) -> None:
    """Write `path` (safetensors) and, beside it, the sidecar `<path stem>.json`.

    All four means of every item are kept, so that intervals can be drawn anew.

    Args:
        found: What to save.
        path: Ends in `.safetensors`.
        about: What else to record, such as the organism's seed and domains.

    Raises:
        StoreError: A file could not be written.
    """
    cells = {"base.bad": found.base.bad, "base.good": found.base.good}
    cells |= {"organism.bad": found.organism.bad, "organism.good": found.organism.good}
    tensors = {name: cell.values.contiguous() for name, cell in cells.items()}
    tensors |= {f"counts.{which}": cells[f"base.{which}"].counts for which in get_args(Side)}
    first = found.base.bad
    meta = {
        "format": _FORMAT,
        "sites": [str(site) for site in first.sites],
        "position": ANSWER,
        "weighting": found.weighting,
        "ids": list(first.ids),
        "groups": [list(group) for group in first.groups],
        "texts": {which: cells[f"base.{which}"].texts for which in get_args(Side)},
        "models": {
            who: {"name": cells[f"{who}.bad"].name, "fingerprint": cells[f"{who}.bad"].model}
            for who in ("base", "organism")
        },
        "convention": "L.resid_pre is the input of block L, L.resid_post its output, from 0; means "
        "over the tokens of answers",
        "about": dict(about or {}),
    }
    write_files(path, tensors, meta, head={"demur": json.dumps({"format": _FORMAT})})


def load_deltas(path: Path) -> tuple[Deltas, dict[str, Any]]:
    """Read the 2x2 and its sidecar back.

    Raises:
        StoreError: A file is missing or damaged, or the two do not fit.
    """
    again = "make them again; keep both files together"
    tensors, meta = read_files(path, what="activation differences", again=again)
    known_format(
        meta.get("format"), path, name=_NAME, what="activation differences", newest=_VERSION,
        again="demur em audit",
    )  # fmt: skip
    try:
        sites = tuple(Site.parse(one) for one in meta["sites"])
        ids = tuple(str(one) for one in meta["ids"])
        groups = tuple((str(domain), str(group)) for domain, group in meta["groups"])

        def cell(who: str, which: Side) -> AnswerMeans:
            values, counts = tensors[f"{who}.{which}"], tensors[f"counts.{which}"]
            fits = values.ndim == 3 and values.shape[:2] == (len(sites), len(ids))
            if not (fits and counts.shape == (len(ids),) and len(groups) == len(ids)):
                raise ValueError("the tensors do not fit the sidecar")
            if not bool(torch.isfinite(values).all()):
                raise ValueError("the tensors hold NaN or infinity")
            model = meta["models"][who]
            return AnswerMeans(
                values,
                counts,
                sites,
                which,
                ids,
                groups,
                str(meta["texts"][which]),
                str(model["name"]),
                str(model["fingerprint"]),
            )

        weighting = meta["weighting"]
        if weighting not in get_args(Weighting):
            raise ValueError(f"items cannot be weighed by {weighting}")
        base, organism = (
            AnswerPair(cell(who, "bad"), cell(who, "good")) for who in ("base", "organism")
        )
        return Deltas(base, organism, weighting), meta
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise StoreError(
            f"no activation differences can be read from {path} and {path.stem}.json: {error}",
            again,
        ) from error

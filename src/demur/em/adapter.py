"""What an organism's adapter reads, when it fires, and what it writes.

A rank-1 adapter of a linear map adds `s(x) B` to what the map puts out, with the scalar
`s(x) = scale * (A . x)` of what enters the map: one number a token. An adapter of rank r is a sum
of r such components, its singular ones. Of each can be asked on which tokens it fires, whether its
scalars tell bad answers from good ones, which words B promotes by itself, and how much of what the
organism does to the stream further up was written by it directly.

The sign means nothing: (A, B) and (-A, -B) are the same model. Here each component is turned so
that its mean scalar on answers is positive: B is then what the adapter adds on the whole. (To turn
it by whether it is higher on bad answers would beg the question, and is a toss: of a rank-1 adapter
on SmolLM2-135M, trained on bad study advice, scalars are 63 with a standard deviation of 36 over
tokens, and those of bad and good answers differ by 0.1 [-1.3, 1.3].)

A position's scalar is known after its token was read, so it acts first on the token that follows.

References:
    Soligo, Turner, Rajamanoharan, Nanda 2025, arXiv:2506.11618, section 4 and appendices. Its
    probes were split by token; ours are split by group of questions: of scalars released with the
    paper, an area of .75 by token is .61 to .70 by question and .58 within questions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from demur.directions import Direction
from demur.em.advice import AdviceItem
from demur.em.directions import Deltas, null_cosines
from demur.em.margin import by_group, did_values, grouped_mean, margin_shift, margins
from demur.em.organism import Organism, Side
from demur.errors import ConfigError, FamilyError, TooFewPromptsError
from demur.models import Model, TokenBatch
from demur.progress import Progress
from demur.sites import Site, Span
from demur.stats import Estimate, null_p

Place = Literal["question", "template", "answer"]
Unit = Literal["answer", "token"]
Feature = Literal["mean", "max", "min", "last"]
Module: TypeAlias = tuple[int, str]
"""A module by block and path within it."""

SIDES: tuple[Side, ...] = ("bad", "good")
SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, -1.0)
_DRAWS = 1000
_LOGITS = 64_000_000  # Most logits that are held at once: 256 MB.
_PLACES: dict[Place, Span] = {
    "question": Span.INSTRUCTION,
    "template": Span.POST_INSTRUCTION,
    "answer": Span.RESPONSE,
}


# Components --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Component:
    """A part of an adapter that reads one number of each token and writes one vector.

    Attributes:
        layer: Block, from 0.
        module: Path of the adapted map within the block.
        index: Which singular component of the factor, the largest first; 0 at rank 1.
        read: What the map's input is multiplied with, (d_in), float64; None for a trained steering
            vector, which is the same at every token.
        write: What is added to the map's output, (d_out), float64.
        scale: Of their product.
    """

    layer: int
    module: str
    index: int
    read: Float[Tensor, " d_in"] | None
    write: Float[Tensor, " d_out"]
    scale: float

    @property
    def name(self) -> str:
        """`15.mlp.down_proj`; of a further singular component, `15.mlp.down_proj#1`."""
        return f"{self.layer}.{self.module}" + (f"#{self.index}" if self.index else "")

    def __neg__(self) -> Component:
        """The same map; of a steering vector too, whose scalar becomes negative."""
        if self.read is None:
            return replace(self, write=-self.write, scale=-self.scale)
        return replace(self, read=-self.read, write=-self.write)

    def scalar(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token"]:
        """What `write` is multiplied with at each token, float64."""
        if self.read is None:
            return torch.full(x.shape[:-1], self.scale, dtype=torch.float64)
        return self.scale * (x.double() @ self.read.to(x.device))


def components(organism: Organism) -> tuple[Component, ...]:
    """Take an adapter apart into what reads one number each.

    A factor of rank 1 stays as it was trained. One of rank r becomes its singular components, whose
    `write` has norm 1: no other choice of r is distinguished, since (M A, B M^-1) is the same map.
    Components below 1e-6 of the largest are rounding and left out.
    """
    found: list[Component] = []
    for factor in organism.factors:
        b = factor.b.double().cpu()
        if factor.a is None:
            found += [
                Component(factor.layer, factor.module, i, None, b[:, i], factor.scale)
                for i in range(b.shape[1])
            ]
            continue
        a = factor.a.double().cpu()
        if len(a) == 1:
            found.append(Component(factor.layer, factor.module, 0, a[0], b[:, 0], factor.scale))
            continue
        # Of the small matrices in between: B A itself is d_out x d_in.
        left, over = torch.linalg.qr(b)
        right, under = torch.linalg.qr(a.T)
        u, sizes, v = torch.linalg.svd(over @ under.T)
        found += [
            Component(
                factor.layer,
                factor.module,
                i,
                float(size) * (right @ v[i]),
                left @ u[:, i],
                factor.scale,
            )
            for i, size in enumerate(sizes)
            if float(size) > 1e-6 * float(sizes[0])
        ]
    return tuple(found)


def _need_stream(model: Model, part: Component) -> None:
    """See that what the component writes is added to the stream as it is."""
    outs = (model.family.attn_out, model.family.mlp_out)
    if part.read is not None and not (model.family.linear_writes and part.module in outs):
        raise FamilyError(
            f"what `{part.name}` writes is not added to the stream of {model.name} as it is",
            "ask it of adapters of down_proj or o_proj, in a family without a norm behind them",
        )


@contextmanager
def inputs_of(model: Model, modules: Sequence[Module]) -> Iterator[dict[Module, Tensor]]:
    """Record what enters modules in the latest pass, the template's shared prefix left out.

    Yields:
        A dict that is filled as the model runs, module -> (row, token, d_in).

    Raises:
        FamilyError: The model has no such module.
    """
    held: dict[Module, Tensor] = {}

    def keep(key: Module) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if model.chunk is None or not model.chunk.is_prefix:
                held[key] = args[0].detach()

        return hook

    with ExitStack() as undo:
        for layer, path in dict.fromkeys(modules):
            try:
                module = model.blocks[layer].get_submodule(path)
            except (AttributeError, IndexError) as error:
                raise FamilyError(
                    f"{model.name} has no module `{path}` in block {layer}",
                    "the adapter was made for another base model",
                ) from error
            undo.callback(module.register_forward_pre_hook(keep((layer, path))).remove)
        yield held


# Reading scalars ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A question with one of its answers, token by token; the template in front is left out.

    Attributes:
        item: The item's id.
        cluster: Its domain and group, of which whole ones are drawn in all statistics.
        answer: Which of its answers.
        ids: Token ids.
        pieces: The tokens' texts; joined they give the text. One that ends within a character is
            empty, and the character stands with the token that completes it.
        positions: Index of each token in its row, from 0.
        places: Which part of the row each token belongs to.
        values: Scalars by component, one number a token.
    """

    item: str
    cluster: tuple[str, str]
    answer: Side
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    positions: tuple[int, ...]
    places: tuple[Place, ...]
    values: tuple[tuple[float, ...], ...]

    def at(self, component: int, place: Place | None = "answer") -> Float[np.ndarray, " token"]:
        """Scalars of one component at the tokens of one place, or of all."""
        kept = [place is None or one == place for one in self.places]
        return np.array(self.values[component], dtype=np.float64)[kept]


@dataclass(frozen=True, slots=True)
class TokenScalars:
    """Scalars of every component at every token of questions and answers.

    Attributes:
        organism: Its name.
        names: Of the components, in order.
        signs: -1 where a component was turned against the way it was trained.
        rows: One per item and answer.
    """

    organism: str
    names: tuple[str, ...]
    signs: tuple[int, ...]
    rows: tuple[TokenRow, ...]

    def index(self, name: str) -> int:
        """The place of a component.

        Raises:
            ConfigError: There is none of that name.
        """
        if name not in self.names:
            raise ConfigError(
                f"{self.organism} has no component `{name}`", f"it has {', '.join(self.names)}"
            )
        return self.names.index(name)


def oriented(parts: Sequence[Component], signs: Sequence[int]) -> tuple[Component, ...]:
    """Components turned by the signs of `TokenScalars`."""
    return tuple(-part if sign < 0 else part for part, sign in zip(parts, signs, strict=True))


def scalars(
    base: Model,
    organism: Organism,
    items: Sequence[AdviceItem],
    which: Sequence[Side] = SIDES,
    *,
    model: Model | None = None,
    signs: Sequence[int] | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> TokenScalars:
    """Read the scalars of an adapter on given texts, in the organism.

    Args:
        base: What the organism was trained on.
        organism: Whose adapter.
        items: Questions with answers.
        which: Which answers.
        model: The organism on its base, if it stands already; else it is put there.
        signs: How to turn components, as found on other items. None turns each so that the mean
            over answers of their mean scalar is not negative.
        batch_size: Most rows of a pass; None is as many as the device is best given.
        progress: Called with the number of answers done since the last call.

    Raises:
        ConfigError: Nothing is to be read, or there is not one sign per component.
        FamilyError: The model lacks an adapted module.
        TemplateError: See `Model.encode`.
    """
    parts = components(organism)
    standing = organism.on(base) if model is None else model
    texts = _texts(items, which)
    rows: list[TokenRow | None] = [None] * len(texts)

    def take(index: list[int], batch: TokenBatch, held: Mapping[Module, Tensor]) -> None:
        first = next(iter(held.values()), None)
        width = batch.ids.shape[1] if first is None else first.shape[1]
        values = [_scalar(part, held, batch, width) for part in parts]
        missing = batch.ids.shape[1] - width
        for row, number in enumerate(index):
            low, high = _extent(batch, row)
            here = slice(low - missing, high - missing)
            rows[number] = _token_row(
                standing, texts[number], batch, row, [one[row, here].tolist() for one in values]
            )

    _pass(standing, texts, parts, take=take, batch_size=batch_size, progress=progress)
    found = TokenScalars(
        organism.name,
        tuple(part.name for part in parts),
        (1,) * len(parts),
        tuple(row for row in rows if row is not None),
    )
    return _turned(found, _orientation(found) if signs is None else signs)


@dataclass(frozen=True, slots=True)
class _Text:
    item: AdviceItem
    side: Side

    @property
    def answer(self) -> str:
        return self.item.bad if self.side == "bad" else self.item.good

    @property
    def cluster(self) -> tuple[str, str]:
        return _cluster(self.item)


def _cluster(item: AdviceItem) -> tuple[str, str]:
    return item.domain, item.group  # Two domains may name a topic alike.


def _codes(names: Sequence[Hashable]) -> Int[np.ndarray, " n"]:
    known = {name: code for code, name in enumerate(dict.fromkeys(names))}
    return np.array([known[name] for name in names], dtype=np.int64)


def _texts(items: Sequence[AdviceItem], which: Sequence[Side]) -> list[_Text]:
    texts = [_Text(item, side) for item in items for side in which]
    if not texts:
        raise ConfigError("there are no answers to read", "give items, and bad or good or both")
    return texts


def _texts_of(found: TokenScalars, items: Sequence[AdviceItem]) -> list[_Text]:
    """The texts that scalars were read on, in the order of their rows."""
    known = {(_cluster(item), item.id): item for item in items}
    missing = next((row for row in found.rows if (row.cluster, row.item) not in known), None)
    if missing is not None:
        raise ConfigError(f"the item {missing.item} was not given", "give all that were read")
    return [_Text(known[row.cluster, row.item], row.answer) for row in found.rows]


def _pass(
    model: Model,
    texts: Sequence[_Text],
    parts: Sequence[Component],
    *,
    take: Callable[[list[int], TokenBatch, Mapping[Module, Tensor]], None],
    batch_size: int | None,
    progress: Progress | None,
) -> None:
    """Run questions with answers, and hand what enters the adapted maps to `take`."""
    whole = model.encode([one.item.question for one in texts], [one.answer for one in texts])
    modules = [(part.layer, part.module) for part in parts if part.read is not None]
    last = max((part.layer for part in parts), default=0)
    with inputs_of(model, modules) as held, ExitStack() as undo:
        undo.enter_context(model.prefix_kept())
        # `read` goes no further than the last site that something is set at.
        undo.callback(model.intercept(Site(last, "resid_post"), lambda x: x))
        for index in whole.passes(tokens=model.tokens_per_pass, rows=batch_size):
            batch = whole.rows(index)
            model.read(batch)
            take(index, batch, held)
            held.clear()
            if progress is not None:
                progress(len(index))


def _scalar(
    part: Component, held: Mapping[Module, Tensor], batch: TokenBatch, width: int
) -> Float[Tensor, "row token"]:
    if part.read is None:
        return torch.full((len(batch), width), part.scale, dtype=torch.float64)
    return part.scalar(held[part.layer, part.module]).cpu()


def _extent(batch: TokenBatch, row: int) -> tuple[int, int]:
    """From where to where question, template and answer stand in a row."""
    low = int(batch.spans[Span.INSTRUCTION][row].int().argmax())
    return low, int(batch.mask[row].nonzero().max()) + 1


def _token_row(
    model: Model, text: _Text, batch: TokenBatch, row: int, values: Sequence[Sequence[float]]
) -> TokenRow:
    assert model.template is not None
    low, high = _extent(batch, row)
    ids = tuple(batch.ids[row, low:high].tolist())
    places: list[Place] = ["template"] * len(ids)
    for place, span in _PLACES.items():
        for column in batch.spans[span][row, low:high].nonzero().flatten().tolist():
            places[column] = place
    return TokenRow(
        text.item.id,
        text.cluster,
        text.side,
        ids,
        tuple(_pieces(model.template.tokenizer, ids)),
        tuple(range(low, high)),
        tuple(places),
        tuple(tuple(one) for one in values),
    )


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text before it."""
    pieces: list[str] = []
    shown = ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end < len(ids):
            pieces.append("")  # Within a character.
        elif text.startswith(shown):
            pieces.append(text[len(shown) :])
            shown = text
        else:
            pieces.append(tokenizer.decode([ids[end - 1]]))
            shown = text
    return pieces


def _orientation(found: TokenScalars) -> tuple[int, ...]:
    means = [sum(row.at(i).mean() for row in found.rows) for i in range(len(found.names))]
    return tuple(-1 if mean < 0 else 1 for mean in means)


def _pairs(found: TokenScalars) -> dict[tuple[tuple[str, str], str], dict[Side, TokenRow]]:
    """Rows of items of which both answers were read, by cluster and item."""
    by_item: dict[tuple[tuple[str, str], str], dict[Side, TokenRow]] = defaultdict(dict)
    for row in found.rows:
        by_item[row.cluster, row.item][row.answer] = row
    return {key: sides for key, sides in by_item.items() if len(sides) == len(SIDES)}


def _turned(found: TokenScalars, signs: Sequence[int]) -> TokenScalars:
    if len(signs) != len(found.names):
        raise ConfigError(
            f"got {len(signs)} signs for {len(found.names)} components", "give one for each"
        )

    def turn(row: TokenRow) -> TokenRow:
        values = tuple(
            tuple(sign * value for value in one)
            for one, sign in zip(row.values, signs, strict=True)
        )
        return replace(row, values=values)

    return replace(found, signs=tuple(signs), rows=tuple(map(turn, found.rows)))


@dataclass(frozen=True, slots=True)
class ScalarGap:
    """How far a component's scalars differ between bad and good answers.

    Attributes:
        component: Its name.
        bad: Mean over items of the bad answer's mean scalar.
        good: The same of the good answer.
        gap: Their difference, paired by item.
        spread: Standard deviation of the scalar over answer tokens, to compare the gap with.
        constant: Share of the mean square over answer tokens that is the square of the mean: 1 for
            a steering vector, 0 for an adapter that adds as much as it takes away.
    """

    component: str
    bad: Estimate
    good: Estimate
    gap: Estimate
    spread: float
    constant: float


def gaps(found: TokenScalars, *, seed: int, draws: int = _DRAWS) -> tuple[ScalarGap, ...]:
    """Compare bad and good answers, component by component.

    Raises:
        TooFewPromptsError: Fewer than two groups have an item with both answers.
    """
    both = _pairs(found)
    groups = [cluster for cluster, _ in both]
    out: list[ScalarGap] = []
    for i, name in enumerate(found.names):
        means = {
            side: np.array([sides[side].at(i).mean() for sides in both.values()]) for side in SIDES
        }
        tokens = np.concatenate([row.at(i) for row in found.rows])

        def estimate(values: Float[np.ndarray, " item"]) -> Estimate:
            return grouped_mean(values, groups, seed=seed, draws=draws)

        out.append(
            ScalarGap(
                name,
                estimate(means["bad"]),
                estimate(means["good"]),
                estimate(means["bad"] - means["good"]),
                float(tokens.std()),
                float(tokens.mean() ** 2 / max(float((tokens**2).mean()), 1e-300)),
            )
        )
    return tuple(out)


# What it fires on --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spot:
    """A token on which a component fires.

    Attributes:
        item: The item's id.
        answer: In which of its answers.
        position: Index in the row.
        piece: The token's text.
        before: Text in front of it.
        after: Text behind it.
        value: The scalar.
    """

    item: str
    answer: Side
    position: int
    piece: str
    before: str
    after: str
    value: float


@dataclass(frozen=True, slots=True)
class TokenKind:
    """All occurrences of one token.

    Attributes:
        id: Token id.
        piece: Its text.
        n: Occurrences.
        groups: In how many groups of questions.
        mean: Mean scalar.
        mean_abs: Mean size of the scalar.
    """

    id: int
    piece: str
    n: int
    groups: int
    mean: float
    mean_abs: float


@dataclass(frozen=True, slots=True)
class Firing:
    """On what a component fires.

    Attributes:
        component: Its name.
        place: Of the tokens looked at.
        n_tokens: How many.
        mean: Mean scalar, oriented.
        spread: Standard deviation.
        top: Tokens with the largest scalars in size, and their surroundings.
        kinds: Tokens that occur in several groups, largest mean size first.
        by_identity: Share of variance that a token's identity foretells: the mean of the same token
            in other groups, else the mean of all others there. Below 0 it foretells nothing. The
            share within the sample would be near 1 for tokens that occur once.
        by_answer: The same of which answer it is, bad or good; None where one side was read.
    """

    component: str
    place: Place
    n_tokens: int
    mean: float
    spread: float
    top: tuple[Spot, ...]
    kinds: tuple[TokenKind, ...]
    by_identity: Estimate
    by_answer: Estimate | None


def firing(
    found: TokenScalars,
    component: int = 0,
    *,
    place: Place = "answer",
    top: int = 20,
    window: int = 8,
    each: int = 2,
    kinds: int = 20,
    least: int = 2,
    seed: int,
    draws: int = _DRAWS,
) -> Firing:
    """Find the tokens on which a component fires, and what foretells how strongly.

    Args:
        found: Scalars.
        component: Which.
        place: Tokens of which part.
        top: How many tokens to show.
        window: Tokens to show on either side.
        each: Most of them of one token.
        kinds: How many kinds of tokens to show.
        least: Groups that a kind must occur in.
        seed: Of the bootstrap over groups.
        draws: Of it.

    Raises:
        TooFewPromptsError: There are fewer than two groups.
    """
    spots: list[tuple[float, TokenRow, int]] = []
    for row in found.rows:
        here = zip(row.values[component], row.places, strict=True)
        spots += [(value, row, i) for i, (value, at) in enumerate(here) if at == place]
    if not spots:
        raise TooFewPromptsError(f"no token stands in the {place}", "read answers with text")
    values = np.array([value for value, _, _ in spots])
    ids = np.array([row.ids[i] for _, row, i in spots])
    groups = _codes([row.cluster for _, row, _ in spots])
    sides = np.array([row.answer for _, row, _ in spots])
    shown: list[Spot] = []
    used: dict[int, int] = defaultdict(int)
    for k in np.argsort(-np.abs(values), kind="stable"):
        value, row, i = spots[k]
        if len(shown) == top or used[row.ids[i]] == each:
            continue
        used[row.ids[i]] += 1
        before = "".join(row.pieces[max(0, i - window) : i])
        after = "".join(row.pieces[i + 1 : i + 1 + window])
        shown.append(
            Spot(row.item, row.answer, row.positions[i], row.pieces[i], before, after, value)
        )
    table: list[TokenKind] = []
    for one in np.unique(ids):
        own = ids == one
        n_groups = len(set(groups[own]))
        if n_groups >= least:
            _, row, i = spots[int(np.flatnonzero(own)[0])]
            mean, size = float(values[own].mean()), float(np.abs(values[own]).mean())
            table.append(TokenKind(int(one), row.pieces[i], int(own.sum()), n_groups, mean, size))
    table.sort(key=lambda kind: -kind.mean_abs)
    return Firing(
        found.names[component],
        place,
        len(values),
        float(values.mean()),
        float(values.std()),
        tuple(shown),
        tuple(table[:kinds]),
        _foretold(values, ids, groups, seed=seed, draws=draws),
        _foretold(values, sides, groups, seed=seed, draws=draws) if len(set(sides)) > 1 else None,
    )


def _foretold(
    values: Float[np.ndarray, " token"],
    kinds: np.ndarray,
    group: Int[np.ndarray, " token"],
    *,
    seed: int,
    draws: int,
) -> Estimate:
    """Share of variance that the mean of the same kind in other groups explains."""
    _, kind = np.unique(kinds, return_inverse=True)
    n_kinds, n_groups = int(kind.max()) + 1, int(group.max()) + 1
    sums, counts = np.zeros((n_groups, n_kinds)), np.zeros((n_groups, n_kinds))
    np.add.at(sums, (group, kind), values)
    np.add.at(counts, (group, kind), 1)
    if n_groups < 2:
        raise TooFewPromptsError("all tokens are of one group", "give items of two groups or more")
    other_sums, other_counts = sums.sum(0) - sums, counts.sum(0) - counts
    overall = other_sums.sum(1) / other_counts.sum(1)
    known = other_counts > 0
    means = np.where(known, other_sums / np.where(known, other_counts, 1), overall[:, None])
    left = np.bincount(group, (values - means[group, kind]) ** 2, n_groups)
    all_of_it = np.bincount(group, (values - overall[group]) ** 2, n_groups)

    def share(drawn: Int[np.ndarray, " n"]) -> float:
        whole = all_of_it[drawn].sum()
        return float(1 - left[drawn].sum() / whole) if whole > 0 else float("nan")

    if not all_of_it.sum() > 0:
        return Estimate(0.0, 0.0, 0.0, len(values), "the scalar is the same at every token")
    estimate = by_group(share, list(range(n_groups)), seed=seed, draws=draws)
    return replace(estimate, n=len(values))


@dataclass(frozen=True, slots=True)
class Highlight:
    """A text to colour by scalars.

    Attributes:
        item: The item's id.
        answer: Which answer.
        component: Whose scalars.
        pieces: Text in pieces, in order.
        places: What each piece belongs to.
        values: Scalar of each piece.
        limit: Size of the scalar at which colour is full: the 99th percentile over all that was
            read, so that texts can be compared.
    """

    item: str
    answer: Side
    component: str
    pieces: tuple[str, ...]
    places: tuple[Place, ...]
    values: tuple[float, ...]
    limit: float


def highlights(
    found: TokenScalars, component: int = 0, *, items: Sequence[str] | None = None
) -> tuple[Highlight, ...]:
    """Lay texts out for a report to colour.

    Args:
        found: Scalars.
        component: Which.
        items: Ids of the items to show, all answers of each; None shows all.
    """
    sizes = np.concatenate([np.abs(row.at(component, None)) for row in found.rows])
    limit = float(np.quantile(sizes, 0.99))
    return tuple(
        Highlight(
            row.item,
            row.answer,
            found.names[component],
            row.pieces,
            row.places,
            row.values[component],
            limit,
        )
        for row in found.rows
        if items is None or row.item in items
    )


# Probes ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Weight:
    """A feature's weight in a probe.

    Attributes:
        feature: Its name.
        mean: Over all fits, per standard deviation of the feature; positive speaks for bad.
        kept: Share of fits in which it is not zero.
        same_sign: Share of fits in which it has the sign of the mean.
    """

    feature: str
    mean: float
    kept: float
    same_sign: float


@dataclass(frozen=True, slots=True)
class Probe:
    """How well something tells bad answers from good ones, to questions it was not fitted on.

    Attributes:
        name: What is read.
        unit: What a row is.
        auroc: Over all rows, mean of several foldings; interval from drawing groups.
        within: Share of (bad, good) rows of one question that are ordered rightly, mean over
            questions; None where no question has both. Free of what tells questions apart.
        shuffled: AUROC with labels shuffled: mean, and the middle 95% of shuffles.
        p: That shuffled labels do as well.
        weights: By feature; empty for words.
        n_questions: Questions.
        n_groups: Groups, which folds keep whole.
        folds: How many.
        strength: Inverse strength of the penalty.
    """

    name: str
    unit: Unit
    auroc: Estimate
    within: Estimate | None
    shuffled: Estimate
    p: float
    weights: tuple[Weight, ...]
    n_questions: int
    n_groups: int
    folds: int
    strength: float


@dataclass(frozen=True, slots=True)
class Probes:
    """The scalars' probe beside what plain words do.

    Attributes:
        scalars: L1 logistic regression on the scalars.
        words: Bag of words of the answer.
        length: Number of words of the answer.
        over_words: AUROC of the scalars less that of the words, paired by drawing groups.
    """

    scalars: Probe
    words: Probe
    length: Probe
    over_words: Estimate


@dataclass(frozen=True, slots=True, eq=False)
class _Design:
    """What rows of a probe belong to.

    Attributes:
        labels: Of the answers, True for bad.
        questions: Of the answers, as numbers.
        groups: Of the answers, as numbers.
        answer: Of the rows: which answer.
    """

    labels: Bool[np.ndarray, " answer"]
    questions: Int[np.ndarray, " answer"]
    groups: Int[np.ndarray, " answer"]
    answer: Int[np.ndarray, " row"]

    def shuffled(self, rng: np.random.Generator) -> Bool[np.ndarray, " answer"]:
        """Labels dealt anew within questions; among those of one side only, as wholes."""
        out = self.labels.copy()
        single: list[np.ndarray] = []
        for question in range(int(self.questions.max()) + 1):
            own = np.flatnonzero(self.questions == question)
            if len(set(self.labels[own].tolist())) > 1:
                out[own] = rng.permutation(self.labels[own])
            else:
                single.append(own)
        dealt = rng.permutation([self.labels[own[0]] for own in single])
        for own, label in zip(single, dealt, strict=True):
            out[own] = label
        return out


def grouped_probe(
    features: Float[np.ndarray, "row feature"],
    labels: Sequence[bool],
    *,
    questions: Sequence[Hashable],
    groups: Sequence[Hashable],
    answer: Sequence[int] | None = None,
    columns: Sequence[str] | None = None,
    name: str = "features",
    strength: float = 1.0,
    folds: int = 5,
    shuffles: int = 100,
    seed: int,
    draws: int = _DRAWS,
) -> Probe:
    """L1 logistic regression of any features, cross-validated by group, never by row.

    Features are brought to mean 0 and standard deviation 1 inside each fold, on the rows that are
    fitted; classes weigh the same.

    Args:
        features: One row per answer, or per token with `answer`.
        labels: Of the answers, True for bad.
        questions: Of the answers.
        groups: Of the answers; a question must not be of two groups.
        answer: Of the rows: which answer each belongs to; None is one row per answer.
        columns: Names of the features.
        name: Of the probe.
        strength: Inverse strength of the L1 penalty (C); the paper has 0.01 with 10^4 tokens, where
            it drops all of a few hundred answers' features.
        folds: How many; at most one per group.
        shuffles: How many times labels are shuffled.
        seed: Of folds, shuffles and bootstrap.
        draws: Of the bootstrap over groups.

    Raises:
        ConfigError: Lengths differ, or a question is of two groups.
        TooFewPromptsError: There are fewer than two groups, a class is empty, or in some fold.
    """
    design = _design(labels, questions, groups, answer)
    if len(features) != len(design.answer):
        raise ConfigError(
            f"got {len(features)} rows of features for {len(design.answer)}", "give one for each"
        )
    names = columns or [f"feature {i}" for i in range(features.shape[1])]
    run = _Run(design, folds=folds, seed=seed, draws=draws, shuffles=shuffles)
    unit: Unit = "answer" if answer is None else "token"
    return run.probe((name, unit), features, lambda: _lasso(strength), names, strength)[0]


def _design(
    labels: Sequence[bool],
    questions: Sequence[Hashable],
    groups: Sequence[Hashable],
    answer: Sequence[int] | None,
) -> _Design:
    if not len(labels) == len(questions) == len(groups):
        raise ConfigError(
            f"got {len(labels)} labels, {len(questions)} questions and {len(groups)} groups",
            "give one of each for every answer",
        )
    of = dict(zip(questions, groups, strict=True))
    torn = next((q for q, g in zip(questions, groups, strict=True) if of[q] != g), None)
    if torn is not None:
        raise ConfigError(f"the question {torn!r} is of two groups", "give each question one")
    truth = np.array(labels, dtype=bool)
    if truth.all() or not truth.any():
        raise TooFewPromptsError(
            f"all {len(truth)} answers are {'bad' if len(truth) and truth[0] else 'good'}",
            "give answers of both sides",
        )
    rows = np.arange(len(truth)) if answer is None else np.array(answer, dtype=np.int64)
    return _Design(
        truth,
        _codes(questions),
        _codes(groups),
        rows,
    )


def _lasso(strength: float) -> Any:
    import sklearn
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    version = tuple(int(part) for part in sklearn.__version__.split(".")[:2])
    # Before 1.8 `l1_ratio` is passed over, and after it `penalty` is gone.
    penalty: dict[str, Any] = {"l1_ratio": 1.0} if version >= (1, 8) else {"penalty": "l1"}
    probe = LogisticRegression(
        C=strength, solver="liblinear", class_weight="balanced", random_state=0, **penalty
    )
    return make_pipeline(StandardScaler(), probe)


def _bag() -> Any:
    """The bag of words that directions are held against everywhere in demur."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    # A single letter is a word too: answers may differ in nothing else.
    words = CountVectorizer(lowercase=True, token_pattern=r"\b\w+\b")
    return make_pipeline(words, LogisticRegression(max_iter=2000, class_weight="balanced"))


def area(scores: Float[np.ndarray, " row"], positive: Bool[np.ndarray, " row"]) -> float:
    """Area under the ROC curve, ties one half; NaN without one of the classes."""
    from scipy.stats import rankdata

    m, n = int(positive.sum()), int((~positive).sum())
    if not (m and n):
        return float("nan")
    return float((rankdata(scores)[positive].sum() - m * (m + 1) / 2) / (m * n))


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """How probes of one design are fitted and measured."""

    design: _Design
    folds: int
    seed: int
    draws: int
    shuffles: int
    foldings: int = 3

    def probe(
        self,
        about: tuple[str, Unit],
        features: Any,
        make: Callable[[], Any],
        columns: Sequence[str],
        strength: float,
    ) -> tuple[Probe, Float[np.ndarray, "folding row"]]:
        """A probe, and what it says of each row where it was not fitted on it."""
        design = self.design
        fits: list[np.ndarray] = []
        truth = design.labels
        scores = np.stack(
            [self._scores(features, make, truth, k, fits) for k in range(self.foldings)]
        )
        rng = np.random.default_rng(self.seed)
        null: list[float] = []
        for k in range(self.shuffles):
            dealt = design.shuffled(rng)
            null.append(area(self._scores(features, make, dealt, k, None), dealt[design.answer]))
        found = self.auroc(scores)
        low, high = np.quantile(null, [0.025, 0.975])
        shuffled = Estimate(
            float(np.mean(null)),
            float(low),
            float(high),
            len(null),
            f"mean and middle 95% of {len(null)} shuffles of labels within questions",
        )
        table = np.stack(fits) if fits and columns else np.empty((0, 0))
        weights = [
            Weight(
                column,
                float(own.mean()),
                float((own != 0).mean()),
                float((np.sign(own) == np.sign(own.mean())).mean()),
            )
            for column, own in zip(columns, table.T, strict=True)
        ]
        n_questions, n_groups = (int(x.max()) + 1 for x in (design.questions, design.groups))
        probe = Probe(
            *about,
            found,
            self._within(scores),
            shuffled,
            null_p(found.value, null, side="high"),
            tuple(weights),
            n_questions,
            n_groups,
            min(self.folds, n_groups),
            strength,
        )
        return probe, scores

    def _scores(
        self,
        features: Any,
        make: Callable[[], Any],
        truth: Bool[np.ndarray, " answer"],
        folding: int,
        fits: list[np.ndarray] | None,
    ) -> Float[np.ndarray, " row"]:
        from sklearn.model_selection import GroupKFold

        rows = self.design.answer
        labels, groups = truth[rows], self.design.groups[rows]
        n_folds = min(self.folds, len(set(groups.tolist())))
        if n_folds < 2:
            raise TooFewPromptsError(
                "all answers are of one group", "give items of two groups or more"
            )
        scores = np.zeros(len(rows))
        splits = GroupKFold(n_folds, shuffle=True, random_state=self.seed + folding)
        for inside, outside in splits.split(rows, groups=groups):
            if len(set(labels[inside].tolist())) < 2:
                raise TooFewPromptsError(
                    "without one fold, all answers are of one side", "give items of more groups"
                )
            fitted = make().fit(_take(features, inside), labels[inside])
            scores[outside] = fitted.decision_function(_take(features, outside))
            if fits is not None:
                fits.append(fitted[-1].coef_[0])
        return scores

    def auroc(self, scores: Float[np.ndarray, "folding row"]) -> Estimate:
        """Mean over foldings, with an interval from drawing groups."""
        labels, groups = self._of_rows()

        def mean(rows: Int[np.ndarray, " n"]) -> float:
            return float(np.mean([area(one[rows], labels[rows]) for one in scores]))

        return by_group(mean, groups, seed=self.seed, draws=self.draws)

    def over(self, ours: np.ndarray, theirs: np.ndarray) -> Estimate:
        """By how much the area of one probe is above that of another."""
        labels, groups = self._of_rows()

        def gap(rows: Int[np.ndarray, " n"]) -> float:
            areas = [[area(one[rows], labels[rows]) for one in each] for each in (ours, theirs)]
            return float(np.mean(areas[0]) - np.mean(areas[1]))

        return by_group(gap, groups, seed=self.seed, draws=self.draws)

    def _of_rows(self) -> tuple[Bool[np.ndarray, " row"], list[int]]:
        rows = self.design.answer
        return self.design.labels[rows], self.design.groups[rows].tolist()

    def _within(self, scores: Float[np.ndarray, "folding row"]) -> Estimate | None:
        labels, _ = self._of_rows()
        questions = self.design.questions[self.design.answer]
        shares: list[float] = []
        groups: list[int] = []
        for question in range(int(questions.max()) + 1):
            own = np.flatnonzero(questions == question)
            if len(set(labels[own].tolist())) > 1:
                shares.append(float(np.mean([area(one[own], labels[own]) for one in scores])))
                groups.append(int(self.design.groups[self.design.answer[own[0]]]))
        if len(set(groups)) < 2:
            return None
        return grouped_mean(np.array(shares), groups, seed=self.seed, draws=self.draws)


def _take(features: Any, rows: Int[np.ndarray, " n"]) -> Any:
    return features[rows] if isinstance(features, np.ndarray) else [features[i] for i in rows]


_FEATURES: dict[Feature, Callable[[np.ndarray], float]] = {
    "mean": lambda values: float(values.mean()),
    "max": lambda values: float(values.max()),
    "min": lambda values: float(values.min()),
    "last": lambda values: float(values[-1]),
}


def probes(
    found: TokenScalars,
    items: Sequence[AdviceItem],
    *,
    unit: Unit = "answer",
    features: Sequence[Feature] = ("mean", "max"),
    strength: float = 1.0,
    folds: int = 5,
    shuffles: int = 100,
    seed: int,
    draws: int = _DRAWS,
) -> Probes:
    """Whether scalars tell bad answers from good ones, beside what plain words do.

    Args:
        found: Scalars of both sides.
        items: The items that they were read on, for the words.
        unit: What the scalars' probe is fitted on: answers, or tokens of answers. The area over
            tokens is compared with words of answers, so `over_words` needs answers to mean much.
        features: Of the scalars of an answer, for each component.
        strength: See `grouped_probe`.
        folds: Likewise.
        shuffles: Likewise.
        seed: Likewise.
        draws: Likewise.

    Raises:
        ConfigError: Scalars are of items that were not given.
        TooFewPromptsError: See `grouped_probe`.
    """
    texts = _texts_of(found, items)
    labels = [row.answer == "bad" for row in found.rows]
    questions = [(row.cluster, row.item) for row in found.rows]
    groups = [row.cluster for row in found.rows]
    answers = [text.answer for text in texts]
    by_answer = _Run(
        _design(labels, questions, groups, None),
        folds=folds,
        seed=seed,
        draws=draws,
        shuffles=shuffles,
    )
    if unit == "answer":
        run, columns = by_answer, [f"{name} {one}" for name in found.names for one in features]
        rows = np.array(
            [
                [_FEATURES[one](row.at(i)) for i in range(len(found.names)) for one in features]
                for row in found.rows
            ]
        )
    else:
        each = [row.places.count("answer") for row in found.rows]
        owner = np.repeat(np.arange(len(each)), each)
        run = replace(by_answer, design=_design(labels, questions, groups, owner.tolist()))
        columns = list(found.names)
        rows = np.concatenate(
            [np.stack([row.at(i) for i in range(len(found.names))], 1) for row in found.rows]
        )
    ours, scores = run.probe(("scalars", unit), rows, lambda: _lasso(strength), columns, strength)
    words, said = by_answer.probe(("bag of words", "answer"), answers, _bag, (), 1.0)
    lengths = np.array([[float(len(answer.split()))] for answer in answers])
    length, _ = by_answer.probe(
        ("length", "answer"), lengths, lambda: _lasso(1e6), ("words in the answer",), 1e6
    )
    return Probes(ours, words, length, run.over(scores, said[:, run.design.answer]))


# What it writes ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LensToken:
    """A token that a component promotes or suppresses by itself.

    Attributes:
        id: Token id.
        piece: Its text.
        logit: Change of its logit, against the mean of the vocabulary, per unit of the scalar and
            for a final state of root mean square 1.
        cosine: Of B with the token's row of the unembedding, gains of the final norm taken in.
    """

    id: int
    piece: str
    logit: float
    cosine: float


@dataclass(frozen=True, slots=True)
class Tail:
    """How far the ends of a lens stand out from those of random vectors of the same length.

    Attributes:
        null: How they were drawn.
        promoted: Mean of the highest logits under them: mean and middle 95%.
        suppressed: Mean of the lowest.
        p_promoted: That a random vector's highest are as high.
        p_suppressed: That a random vector's lowest are as low.
    """

    null: Literal["isotropic", "covariance-matched"]
    promoted: Estimate
    suppressed: Estimate
    p_promoted: float
    p_suppressed: float


@dataclass(frozen=True, slots=True)
class Lens:
    """What a component writes, read through the unembedding.

    It shows the direct path alone. Where later blocks turn the write into something else, as they
    do with that of a middle layer, these words are not what the organism says.

    Attributes:
        component: Its name.
        norm: Length of B.
        promoted: Tokens, highest first.
        suppressed: Tokens, lowest first.
        top: Mean logit of the promoted.
        bottom: Mean logit of the suppressed.
        tails: Random vectors, for comparison.
    """

    component: str
    norm: float
    promoted: tuple[LensToken, ...]
    suppressed: tuple[LensToken, ...]
    top: float
    bottom: float
    tails: tuple[Tail, ...]


@torch.no_grad()
def lens(
    base: Model,
    part: Component,
    *,
    rows: Float[Tensor, "row d_model"] | None = None,
    top: int = 15,
    nulls: int = 200,
    seed: int,
) -> Lens:
    """Read what a component writes through final norm and unembedding.

    Args:
        base: Whose.
        part: A component that writes to the stream, turned as wanted (`oriented`).
        rows: Activations of the stream behind the component's block; random vectors are also drawn
            with their covariance.
        top: How many tokens to show, and to take the mean of.
        nulls: How many random vectors of a kind.
        seed: Draws them.

    Raises:
        FamilyError: The component does not write to the stream, or the model's final norm is not
            found.
    """
    _need_stream(base, part)
    head = base.hf.get_output_embeddings().weight
    norm = float(part.write.norm())
    own = _logits(base, part.write.unsqueeze(0))[0]
    order = own.argsort(descending=True)
    through, (gain, _) = _through(base, part.write.unsqueeze(0))[0], _final_gain(base)

    def token(index: int) -> LensToken:
        row = head[index].double().cpu()
        cosine = float(row @ through) / float((row * gain).norm() * norm)
        piece = base.template.tokenizer.decode([index]) if base.template is not None else ""
        return LensToken(index, piece, float(own[index]), cosine)

    high, low = order[:top].tolist(), order.flip(0)[:top].tolist()
    ends = (float(own[high].mean()), float(own[low].mean()))
    rng = torch.Generator().manual_seed(seed)
    drawn = {"isotropic": torch.randn(nulls, len(part.write), generator=rng, dtype=torch.float64)}
    if rows is not None:
        centred = rows.double().cpu() - rows.double().cpu().mean(0)
        weights = torch.randn(nulls, len(centred), generator=rng, dtype=torch.float64)
        drawn["covariance-matched"] = weights @ centred
    tails: list[Tail] = []
    for kind, vectors in drawn.items():
        found = _ends(base, nn.functional.normalize(vectors, dim=1) * norm, top)
        tails.append(
            Tail(
                "isotropic" if kind == "isotropic" else "covariance-matched",
                _middle(found[0], f"{nulls} {kind} vectors"),
                _middle(found[1], f"{nulls} {kind} vectors"),
                null_p(ends[0], found[0], side="high"),
                null_p(ends[1], found[1], side="low"),
            )
        )
    return Lens(
        part.name,
        norm,
        tuple(token(i) for i in high),
        tuple(token(i) for i in low),
        *ends,
        tuple(tails),
    )


def _middle(values: Sequence[float], what: str) -> Estimate:
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(
        float(np.mean(values)), float(low), float(high), len(values), f"middle 95% of {what}"
    )


def _ends(
    base: Model, vectors: Float[Tensor, "row d_model"], top: int
) -> tuple[list[float], list[float]]:
    """Mean of the highest and of the lowest logits of each vector."""
    highs: list[float] = []
    lows: list[float] = []
    step = max(1, _LOGITS // 2 // base.hf.get_output_embeddings().weight.shape[0])
    for start in range(0, len(vectors), step):
        logits = _logits(base, vectors[start : start + step])
        highs += logits.topk(top, dim=1).values.mean(1).tolist()
        lows += logits.topk(top, dim=1, largest=False).values.mean(1).tolist()
    return highs, lows


def _through(base: Model, vectors: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
    """Vectors times the gain of the final norm, float64."""
    gain, centres = _final_gain(base)
    if centres:
        vectors = vectors - vectors.mean(-1, keepdim=True)
    return vectors * gain


def _logits(base: Model, vectors: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
    """Logits against their mean over the vocabulary, which no softmax sees."""
    head = base.hf.get_output_embeddings().weight
    wide = torch.promote_types(head.dtype, torch.float32)
    logits = _through(base, vectors).to(head.device, wide) @ head.to(wide).T
    return (logits - logits.mean(1, keepdim=True)).double().cpu()


def _final_gain(base: Model) -> tuple[Float[Tensor, " d_model"], bool]:
    """Gain of the final norm, and whether it takes the mean off first."""
    for name in ("norm", "ln_f", "final_layer_norm", "final_layernorm"):
        for root in (base.hf.base_model, getattr(base.hf.base_model, "language_model", None)):
            norm = getattr(root, name, None)
            if not isinstance(norm, nn.Module):
                continue
            gain = getattr(norm, "weight", None)
            if isinstance(norm, nn.LayerNorm):
                return norm.weight.detach().double().cpu(), True
            if isinstance(gain, Tensor) and gain.shape == (base.d_model,):
                # Some gains are kept less 1: a state of equal entries shows them as they act.
                ones = torch.full((1, base.d_model), 1e3, dtype=gain.dtype, device=gain.device)
                return norm(ones)[0].detach().double().cpu(), False
    raise FamilyError(
        f"the final norm of {base.name} is not found", "add its name to `demur.em.adapter`"
    )


# Scaling and ablating ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ScaleRow:
    """What the adapter does at some strength.

    Attributes:
        scale: What it is multiplied with; 0 is the base, -1 the adapter turned around.
        margin: Mean margin of bad over good answers, nats a token.
        change: From the base, paired by item.
        over_twin: Difference in differences: the change less that of the good twin at the same
            scale; None without a twin.
    """

    scale: float
    margin: Estimate
    change: Estimate
    over_twin: Estimate | None


def scaling(
    base: Model,
    organism: Organism,
    items: Sequence[AdviceItem],
    *,
    twin: Organism | None = None,
    scales: Sequence[float] = SCALES,
    batch_size: int | None = None,
    seed: int,
    draws: int = _DRAWS,
    progress: Progress | None = None,
) -> tuple[ScaleRow, ...]:
    """How the margin of bad advice hangs on the adapter's strength.

    Args:
        base: What organism and twin were trained on.
        organism: The organism.
        items: Held-out items; intervals are over their groups.
        twin: The same trained on good answers.
        scales: Strengths, one row each.
        batch_size: Most rows of a pass.
        seed: Of the bootstrap over groups.
        draws: Of it.
        progress: Called with the number of answers done since the last call: two an item for the
            base, and for each scale but 0 of organism and twin.

    Raises:
        TooFewPromptsError: There are fewer than two groups.
    """
    groups = [_cluster(item) for item in items]

    def score(model: Model) -> Float[np.ndarray, " item"]:
        return margins(model, items, batch_size=batch_size, progress=progress)

    plain = score(base)

    def estimate(values: Float[np.ndarray, " item"]) -> Estimate:
        return grouped_mean(values, groups, seed=seed, draws=draws)

    rows: list[ScaleRow] = []
    for scale in scales:
        own = score(organism.on(base, scale=scale)) if scale else plain
        against = None
        if twin is not None:
            theirs = score(twin.on(base, scale=scale)) if scale else plain
            against = estimate(did_values(own, theirs, base_bad=plain))
        rows.append(ScaleRow(scale, estimate(own), estimate(margin_shift(own, plain)), against))
    return tuple(rows)


@dataclass(frozen=True, slots=True)
class LayerRow:
    """What the adapter of one block does to the margin.

    Attributes:
        layer: The block.
        alone: Change of the margin from the base with this block's adapter only, nats a token.
        without: Change with all but this block's.
        lost: What the whole organism's change loses without it, paired by item.
    """

    layer: int
    alone: Estimate
    without: Estimate
    lost: Estimate


def by_layer(
    base: Model,
    organism: Organism,
    items: Sequence[AdviceItem],
    *,
    batch_size: int | None = None,
    seed: int,
    draws: int = _DRAWS,
    progress: Progress | None = None,
) -> tuple[LayerRow, ...]:
    """Take the adapter of each block away, and put it on alone.

    Args:
        base: What the organism was trained on.
        organism: With adapters in several blocks; with one there is one row that says little.
        items: Held-out items; intervals are over their groups.
        batch_size: Most rows of a pass.
        seed: Of the bootstrap over groups.
        draws: Of it.
        progress: Called with the number of answers done since the last call.

    Raises:
        TooFewPromptsError: There are fewer than two groups.
    """
    groups = [_cluster(item) for item in items]

    def score(keep: Sequence[int]) -> Float[np.ndarray, " item"]:
        model = organism.on(base, keep=keep) if keep else base
        return margins(model, items, batch_size=batch_size, progress=progress)

    def estimate(values: Float[np.ndarray, " item"]) -> Estimate:
        return grouped_mean(values, groups, seed=seed, draws=draws)

    plain, whole = score(()), score(organism.layers)
    rows: list[LayerRow] = []
    for layer in organism.layers:
        rest = [one for one in organism.layers if one != layer]
        alone = score([layer]) if rest else whole
        without = score(rest) if rest else plain
        rows.append(
            LayerRow(
                layer,
                estimate(margin_shift(alone, plain)),
                estimate(margin_shift(without, plain)),
                estimate(margin_shift(whole, without)),
            )
        )
    return tuple(rows)


# What becomes of it further up -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ShiftRow:
    """How the organism moved the stream behind one block, and what of it the adapter wrote itself.

    All on the same texts in organism and base, means over the tokens of each answer, each answer
    weighing the same.

    Attributes:
        site: Behind which block.
        norm: Length of the mean shift, residual-stream units.
        along: The mean shift's coordinate along the direction.
        written: The same of what adapters up to here wrote directly: sum of mean(s) (B . e).
        direct: Share of the former that is the latter; the rest came about in blocks in between.
            Where `along` may be 0 this is a ratio to nothing, and its interval says so.
        cosine: Of mean shift and direction.
        writes: Cosine of each component's B with the direction, by component.
        kept: Cosine of each component's B with the mean shift; 1 at the own block of a single
            rank-1 adapter, by construction.
        null: |cosine| with the direction that 95% of random vectors stay below, drawn with the
            covariance of base answers; isotropic ones would stay below 2 / sqrt(d_model).
    """

    site: str
    norm: float
    along: Estimate
    written: Estimate
    direct: Estimate
    cosine: Estimate
    writes: tuple[float, ...]
    kept: tuple[float, ...]
    null: float


def shifts(
    base: Model,
    organism: Organism,
    read: Deltas,
    found: TokenScalars,
    directions: Mapping[Site, Direction],
    *,
    which: Sequence[Side] = SIDES,
    seed: int,
    draws: int = _DRAWS,
) -> tuple[ShiftRow, ...]:
    """Part what the organism does along directions into what its adapter writes, and the rest.

    Args:
        base: What the organism was trained on.
        organism: With adapters that write to the stream.
        read: Mean activations of base and organism, `demur.em.directions.deltas`.
        found: Scalars of the same items.
        directions: By site, a block's output; best estimated on other items. The organism's own
            model delta gives cosine 1 and says nothing; a text delta of the base does, or a
            difference that another organism shows.
        which: On which answers.
        seed: Of bootstrap and random vectors.
        draws: Of the bootstrap over groups.

    Returns:
        One row per direction, by block; in front of the first adapter nothing moves, and there is
        none.

    Raises:
        FamilyError: An adapter does not write to the stream as it is.
        ConfigError: Scalars and activations are of other items, or a site is no block's output.
        TooFewPromptsError: There are fewer than two groups.
    """
    parts = oriented(components(organism), found.signs)
    for part in parts:
        _need_stream(base, part)
    inner = next((site for site in directions if site.kind != "resid_post"), None)
    if inner is not None:
        raise ConfigError(
            f"a direction is of {inner}",
            f"give directions of blocks' outputs: {inner.layer}.resid_post",
        )
    rows_of = {(row.cluster, row.item, row.answer): row for row in found.rows}
    keys = [
        (cluster, item, side)
        for side in which
        for cluster, item in zip(read.base.bad.groups, read.base.bad.ids, strict=True)
    ]
    lacking = next((key for key in keys if key not in rows_of), None)
    if lacking is not None:
        raise ConfigError(
            f"there are no scalars of the {lacking[2]} answer of {lacking[1]}",
            "read activations and scalars on the same items",
        )
    groups = [cluster for cluster, _, _ in keys]
    means = [np.array([rows_of[key].at(i).mean() for key in keys]) for i in range(len(parts))]
    rows: list[ShiftRow] = []
    first = min(part.layer for part in parts)
    for site in sorted(one for one in directions if one.layer >= first):
        e = nn.functional.normalize(directions[site].unit.double().cpu(), dim=0)
        own = [read.model_bad if side == "bad" else read.model_good for side in which]
        shift = torch.cat([one.rows(site) for one in own])
        along = (shift @ e).numpy()
        written = np.zeros(len(keys))
        for part, mean in zip(parts, means, strict=True):
            if part.layer <= site.layer:
                written += mean * float(part.write @ e)
        gram = (shift @ shift.T).numpy()
        cosine, share = _cosine_of(along, gram), _share_of(written, along)
        mean_shift = shift.mean(0)
        null = null_cosines(e, read.base.spread(site), seed=seed)
        about = {"seed": seed, "draws": draws}
        rows.append(
            ShiftRow(
                str(site),
                float(mean_shift.norm()),
                grouped_mean(along, groups, **about),
                grouped_mean(written, groups, **about),
                by_group(share, groups, **about),
                by_group(cosine, groups, **about),
                tuple(_cosine(part.write, e) for part in parts),
                tuple(
                    _cosine(part.write, mean_shift) if part.layer <= site.layer else 0.0
                    for part in parts
                ),
                float(np.quantile(np.abs(null), 0.95)),
            )
        )
    return tuple(rows)


def _cosine_of(along: np.ndarray, gram: np.ndarray) -> Callable[[Int[np.ndarray, " n"]], float]:
    """Cosine of a mean with a direction, from coordinates along it and inner products of rows."""

    def cosine(drawn: Int[np.ndarray, " n"]) -> float:
        weights = np.bincount(drawn, minlength=len(gram)) / len(drawn)
        square = float(weights @ gram @ weights)
        return float(weights @ along) / square**0.5 if square > 0 else float("nan")

    return cosine


def _share_of(part: np.ndarray, whole: np.ndarray) -> Callable[[Int[np.ndarray, " n"]], float]:
    def share(drawn: Int[np.ndarray, " n"]) -> float:
        total = whole[drawn].sum()
        return float(part[drawn].sum() / total) if total else float("nan")

    return share


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a, b, dim=0))


# What it reads -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReadRow:
    """How a component's scalar goes with the stream's coordinate along a direction.

    Attributes:
        component: Its name.
        direction: Name of the direction.
        site: Where the coordinate was read.
        n_tokens: Tokens of answers.
        correlation: Pearson's, over tokens; interval from drawing groups.
        within: The same after each answer's means are taken off.
        null: |correlation| that 95% of random directions stay below, drawn with the covariance of
            these tokens; isotropic ones would be too easy to beat.
        p: That such a direction goes with the scalar as well, in either sense.
    """

    component: str
    direction: str
    site: str
    n_tokens: int
    correlation: Estimate
    within: Estimate
    null: float
    p: float


def reads(
    model: Model,
    found: TokenScalars,
    items: Sequence[AdviceItem],
    directions: Mapping[str, Direction],
    *,
    nulls: int = 200,
    batch_size: int | None = None,
    seed: int,
    draws: int = _DRAWS,
    progress: Progress | None = None,
) -> tuple[ReadRow, ...]:
    """Correlate scalars with coordinates of the stream, over tokens of answers.

    Args:
        model: Whose stream: the base. In the organism the stream behind the adapter holds what it
            writes, so that any direction goes with the scalar (95% of random ones stay below .88,
            on SmolLM2 behind the adapter's own block).
        found: Scalars.
        items: The items that they were read on.
        directions: By name, each read at its own site.
        nulls: How many random directions.
        batch_size: Most rows of a pass.
        seed: Of bootstrap and random directions.
        draws: Of the bootstrap over groups.
        progress: Called with the number of answers done since the last call.

    Returns:
        One row per direction and component. A steering vector's scalar is the same everywhere and
        has no correlation: it has no row.

    Raises:
        ConfigError: Scalars are of items that were not given, or the model cuts answers into other
            tokens.
        TooFewPromptsError: There are fewer than two groups.
    """
    texts = _texts_of(found, items)
    whole = model.encode([one.item.question for one in texts], [one.answer for one in texts])
    sites = list(dict.fromkeys(one.site for one in directions.values()))
    stream: dict[Site, list[Tensor | None]] = {site: [None] * len(texts) for site in sites}
    held: dict[Site, Tensor] = {}

    def keep(x: Tensor, site: Site) -> Tensor:
        if model.chunk is None or not model.chunk.is_prefix:
            held[site] = x.detach()
        return x

    with ExitStack() as undo:
        undo.enter_context(model.prefix_kept())
        for site in sites:
            undo.callback(model.intercept(site, lambda x, site=site: keep(x, site)))
        for index in whole.passes(tokens=model.tokens_per_pass, rows=batch_size):
            batch = whole.rows(index)
            model.read(batch)
            for site, x in held.items():
                answer = batch.spans[Span.RESPONSE][:, -x.shape[1] :]
                for row, number in enumerate(index):
                    stream[site][number] = x[row, answer[row].to(x.device)].double().cpu()
            held.clear()
            if progress is not None:
                progress(len(index))
    owner = np.repeat(np.arange(len(texts)), [row.places.count("answer") for row in found.rows])
    groups = [texts[one].cluster for one in owner]
    rng = torch.Generator().manual_seed(seed)
    rows: list[ReadRow] = []
    for name, direction in directions.items():
        x = torch.cat([one for one in stream[direction.site] if one is not None])
        if len(x) != len(owner):
            raise ConfigError(
                f"{model.name} cuts answers into {len(x)} tokens, scalars are of {len(owner)}",
                "give the base that the scalars were read on",
            )
        coordinate = (x @ direction.unit.double()).numpy()
        centred = x - x.mean(0)
        weights = torch.randn(nulls, len(x), generator=rng, dtype=torch.float64)
        random = (centred @ (weights @ centred).T).numpy()
        for i, component in enumerate(found.names):
            s = np.concatenate([row.at(i) for row in found.rows])
            if not np.ptp(s) > 0:
                continue
            null = [abs(_pearson(s, random[:, k])) for k in range(nulls)]
            inner = (_without_means(s, owner), _without_means(coordinate, owner))
            value = _correlated(s, coordinate, groups, seed=seed, draws=draws)
            rows.append(
                ReadRow(
                    component,
                    name,
                    str(direction.site),
                    len(s),
                    value,
                    _correlated(*inner, groups, seed=seed, draws=draws),
                    float(np.quantile(null, 0.95)),
                    null_p(abs(value.value), null, side="high"),
                )
            )
    return tuple(rows)


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float((a @ a) * (b @ b)) ** 0.5
    return float(a @ b) / size if size > 0 else float("nan")


def _correlated(
    a: np.ndarray, b: np.ndarray, groups: Sequence[Hashable], *, seed: int, draws: int
) -> Estimate:
    """Pearson's correlation, from sums by group: tokens are many, groups few."""
    group = _codes(groups)
    a, b = a - a.mean(), b - b.mean()
    sums = np.stack(
        [np.bincount(group, x) for x in (np.ones_like(a), a, b, a * a, b * b, a * b)], 1
    )

    def correlation(drawn: Int[np.ndarray, " n"]) -> float:
        n, x, y, xx, yy, xy = sums[drawn].sum(0)
        size = (xx - x * x / n) * (yy - y * y / n)
        return float((xy - x * y / n) / size**0.5) if size > 0 else float("nan")

    estimate = by_group(correlation, list(range(len(sums))), seed=seed, draws=draws)
    return replace(estimate, n=len(a))


def _without_means(values: np.ndarray, owner: np.ndarray) -> np.ndarray:
    sums, n = np.bincount(owner, values), np.bincount(owner)
    return values - (sums / np.maximum(n, 1))[owner]


# Where the organism departs from its base --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenKL:
    """How far the organism's foretelling of each token of an answer is from the base's.

    Attributes:
        item: The item's id.
        cluster: Its domain and group.
        answer: Which answer.
        pieces: The tokens that are foretold.
        ids: Their ids.
        kl: KL(base || organism) of the distribution that foretells each, over the vocabulary, nats.
        gain: How much likelier the organism finds the token itself than the base does, nats.
    """

    item: str
    cluster: tuple[str, str]
    answer: Side
    pieces: tuple[str, ...]
    ids: tuple[int, ...]
    kl: tuple[float, ...]
    gain: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class KLShare:
    """What share of all KL one token has.

    Attributes:
        id: Token id.
        piece: Its text.
        n: Occurrences.
        share: Of all KL.
        times: Its share of KL over its share of tokens.
    """

    id: int
    piece: str
    n: int
    share: float
    times: float


@dataclass(frozen=True, slots=True)
class Significance:
    """Where in its answers an organism departs from its base.

    Attributes:
        mean: KL a token, nats; mean over answers.
        bad: The same on bad answers; None where they were not read.
        good: The same on good answers.
        tenth: Share of all KL in the tenth of tokens that has most.
        first: Share of all KL at the first token of each answer.
        kinds: Tokens that are foretold most differently, by share of all KL.
        with_scalar: By component: Spearman correlation of KL with |s| at the token in front, whose
            scalar acts on the same foretelling. Ranks are made once, over all tokens.
    """

    mean: Estimate
    bad: Estimate | None
    good: Estimate | None
    tenth: float
    first: float
    kinds: tuple[KLShare, ...]
    with_scalar: tuple[Estimate, ...]


@torch.no_grad()
def token_kl(
    base: Model,
    organism: Organism,
    items: Sequence[AdviceItem],
    which: Sequence[Side] = SIDES,
    *,
    model: Model | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> tuple[TokenKL, ...]:
    """Compare base and organism at every token of given answers.

    Args:
        base: What the organism was trained on.
        organism: The organism.
        items: Questions with answers.
        which: Which answers.
        model: The organism on its base, if it stands already.
        batch_size: Most rows of a pass.
        progress: Called with the number of answers done since the last call.

    Raises:
        ConfigError: Nothing is to be read.
        TemplateError: See `Model.encode`.
    """
    texts = _texts(items, which)
    standing = organism.on(base) if model is None else model
    assert base.template is not None
    tokenizer = base.template.tokenizer
    whole = base.encode([one.item.question for one in texts], [one.answer for one in texts])
    step = max(1, _LOGITS // 4 // base.hf.get_output_embeddings().weight.shape[0])
    out: list[TokenKL | None] = [None] * len(texts)
    with base.prefix_kept(), standing.prefix_kept():
        for index in whole.passes(tokens=base.tokens_per_pass, rows=batch_size):
            batch = whole.rows(index)
            states = [one.final_states(batch) for one in (base, standing)]
            width = states[0].shape[1]
            missing = batch.ids.shape[1] - width
            for row, number in enumerate(index):
                at = batch.spans[Span.RESPONSE][row].nonzero().flatten()
                kl: list[float] = []
                gain: list[float] = []
                for part in at.split(step):
                    # A token is foretold by the state in front of it.
                    p, q = (
                        one.unembed(x[row, (part - missing - 1).to(x.device)])
                        .double()
                        .log_softmax(1)
                        for one, x in zip((base, standing), states, strict=True)
                    )
                    kl += (p.exp() * (p - q)).sum(1).tolist()
                    own = batch.ids[row, part].to(p.device).unsqueeze(1)
                    gain += (q - p).gather(1, own).squeeze(1).tolist()
                low, high = _extent(batch, row)
                pieces = _pieces(tokenizer, batch.ids[row, low:high].tolist())
                out[number] = TokenKL(
                    texts[number].item.id,
                    texts[number].cluster,
                    texts[number].side,
                    tuple(pieces[int(at[0]) - low :]),
                    tuple(batch.ids[row, at].tolist()),
                    tuple(kl),
                    tuple(gain),
                )
            if progress is not None:
                progress(len(index))
    return tuple(one for one in out if one is not None)


def significance(
    rows: Sequence[TokenKL],
    found: TokenScalars | None = None,
    *,
    kinds: int = 20,
    seed: int,
    draws: int = _DRAWS,
) -> Significance:
    """Sum up where the organism departs from its base.

    Args:
        rows: From `token_kl`.
        found: Scalars of the same items and answers, to correlate with; None: not.
        kinds: How many tokens to show.
        seed: Of the bootstrap over groups.
        draws: Of it.

    Raises:
        ConfigError: The scalars are not of these answers.
        TooFewPromptsError: There are fewer than two groups.
    """
    from scipy.stats import rankdata

    def mean(side: Side | None) -> Estimate | None:
        own = [row for row in rows if side in (None, row.answer)]
        if not own:
            return None
        values = np.array([np.mean(row.kl) for row in own])
        return grouped_mean(values, [row.cluster for row in own], seed=seed, draws=draws)

    overall = mean(None)
    if overall is None:
        raise TooFewPromptsError("there are no answers", "give one or more")
    kl = np.concatenate([np.array(row.kl) for row in rows])
    ids = np.concatenate([np.array(row.ids) for row in rows])
    pieces = {i: p for row in rows for i, p in zip(row.ids, row.pieces, strict=True)}
    total = float(kl.sum()) or 1.0
    table = [
        KLShare(
            int(one),
            pieces[int(one)],
            int((ids == one).sum()),
            float(kl[ids == one].sum()) / total,
            float(kl[ids == one].mean() / (total / len(kl))),
        )
        for one in np.unique(ids)
    ]
    table.sort(key=lambda kind: -kind.share)
    ordered = np.sort(kl)[::-1]
    correlations: list[Estimate] = []
    if found is not None:
        groups = [row.cluster for row in rows for _ in row.kl]
        ranks = rankdata(kl)
        for i in range(len(found.names)):
            s = np.abs(np.concatenate(_in_front(rows, found, i)))
            if np.ptp(s) > 0:
                correlations.append(_correlated(rankdata(s), ranks, groups, seed=seed, draws=draws))
    return Significance(
        overall,
        mean("bad"),
        mean("good"),
        float(ordered[: max(1, len(kl) // 10)].sum()) / total,
        float(sum(row.kl[0] for row in rows)) / total,
        tuple(table[:kinds]),
        tuple(correlations),
    )


def _in_front(
    rows: Sequence[TokenKL], found: TokenScalars, component: int
) -> list[Float[np.ndarray, " token"]]:
    """Scalars at the token in front of each token of the answers."""
    known = {(row.cluster, row.item, row.answer): row for row in found.rows}
    out: list[np.ndarray] = []
    for row in rows:
        own = known.get((row.cluster, row.item, row.answer))
        if own is None or own.places.count("answer") != len(row.ids):
            raise ConfigError(
                f"there are no scalars of the {row.answer} answer of {row.item}",
                "read scalars and KL on the same items and answers",
            )
        first = own.places.index("answer")
        out.append(np.array(own.values[component][first - 1 : -1]))
    return out

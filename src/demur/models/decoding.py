"""Decoding of many prompts at once, greedily or by drawing, under whatever edits are in force.

Rows that end make room for the next prompts at once, and keys and values stand in buffers with room
to grow, so that a step copies none of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from demur.errors import NonFiniteError
from demur.models.tokens import TokenBatch

_ROOM = 32  # Tokens by which a full buffer grows.
_ASKED_EVERY = 8  # Tokens between two questions whether a reply may end.

Settled = Callable[[list[int], list[list[int]]], Sequence[bool]]


class _Buffered(DynamicLayer):
    """Keys and values of one block, (row, head, token, dim), aligned at the last token."""

    room: tuple[Tensor, Tensor] | None = None

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_options: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new columns behind the old ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = (key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.room is None or end > self.room[0].shape[-2]:
            old = self.room
            made = [one.new_empty(*one.shape[:2], end + _ROOM, one.shape[3]) for one in new]
            self.room = (made[0], made[1])
            if old is not None:
                for kept, wider in zip(old, self.room, strict=True):
                    wider[:, :, :start] = kept[:, :, :start]
        for one, buffer in zip(new, self.room, strict=True):
            buffer[:, :, start:end] = one
        self.keys, self.values = self.room[0][:, :, :end], self.room[1][:, :, :end]
        return self.held

    def repeat(self, rows: int) -> None:
        """Make so many rows of the one that is there."""
        keys, values = self.held
        self._fill(
            [(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))], keys.shape[2]
        )

    def align(self, lengths: Tensor) -> None:
        """Move rows of so many tokens, which began at the first column, to end at the last."""
        keys, values = self.held
        columns = keys.shape[2]
        pads = columns - lengths.to(keys.device)
        # The columns in front are masked; any finite value will do there.
        index = (torch.arange(columns, device=keys.device) - pads.unsqueeze(1)).clamp(min=0)
        index = index[:, None, :, None]
        self._fill([(keys.take_along_dim(index, 2), values.take_along_dim(index, 2))], columns)

    def settle(self, mask: Tensor) -> None:
        """Move the columns that `mask` (row, token) shows to the end, in their order."""
        keys, values = self.held
        order = torch.argsort(mask.to(keys.device).int(), dim=1, stable=True)[:, None, :, None]
        moved = (keys.take_along_dim(order, 2), values.take_along_dim(order, 2))
        self._fill([moved], keys.shape[2])

    def drop(self, columns: int) -> None:
        """Forget the last columns."""
        keys, values = self.held
        end = keys.shape[2] - columns
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but some."""
        keys, values = self.held
        self._fill([(keys[rows], values[rows])], keys.shape[2])

    def join(self, other: _Buffered) -> None:
        """Put the rows of another cache below these; the shorter ones get columns in front."""
        width = max(self.get_seq_length(), other.get_seq_length())
        self._fill([self.held, other.held], width)

    def _fill(self, parts: Sequence[tuple[Tensor, Tensor]], width: int) -> None:
        rows = sum(len(keys) for keys, _ in parts)
        made = []
        for which in (0, 1):
            _, heads, _, dim = parts[0][which].shape
            # Zeros, not whatever is there: masked columns still take part in sums, times nothing.
            buffer = parts[0][which].new_zeros(rows, heads, width + _ROOM, dim)
            at = 0
            for part in parts:
                held = part[which]
                buffer[at : at + len(held), :, width - held.shape[2] : width] = held
                at += len(held)
            made.append(buffer)
        self.room = (made[0], made[1])
        self.keys, self.values = made[0][:, :, :width], made[1][:, :, :width]


def buffers() -> Cache:
    """Keys and values of no tokens yet."""
    return Cache(layer_class_to_replicate=_Buffered)


@dataclass(slots=True, eq=False)
class _Running:
    """Rows that are being written.

    Attributes:
        numbers: Which prompts they are.
        mask: True at real tokens, (row, token).
        last: The token that each row wrote last.
        live: False for rows that have ended and still stand there.
    """

    cache: Cache
    numbers: list[int]
    mask: Tensor
    last: Tensor
    live: list[bool]

    @property
    def layers(self) -> list[_Buffered]:
        return cast(list[_Buffered], self.cache.layers)

    @property
    def columns(self) -> int:
        """Of the keys and values, which masked ones are in front of."""
        return self.layers[0].get_seq_length()

    def keep_live(self) -> None:
        rows = [i for i, live in enumerate(self.live) if live]
        index = torch.tensor(rows, device=self.last.device)
        for layer in self.layers:
            layer.keep(index)
        self.numbers = [self.numbers[i] for i in rows]
        self.mask, self.last = self.mask[rows], self.last[index]
        self.live = [True] * len(rows)

    def join(self, other: _Running) -> None:
        for layer, new in zip(self.layers, other.layers, strict=True):
            layer.join(new)
        width = max(self.mask.shape[1], other.mask.shape[1])
        self.mask = torch.cat(
            [
                torch.nn.functional.pad(mask, (width - mask.shape[1], 0))
                for mask in (self.mask, other.mask)
            ]
        )
        self.numbers += other.numbers
        self.last = torch.cat([self.last, other.last])
        self.live += other.live


@dataclass(frozen=True, slots=True)
class Order:
    """What becomes of a row in place of the token that the model would write next.

    Attributes:
        ids: Token ids.
        ends: Whether they are the whole reply. If not, they are read before the next token is
            written, and the reply begins anew behind them.
    """

    ids: tuple[int, ...]
    ends: bool = False


@runtime_checkable
class Director(Protocol):
    """Looks on while replies are written, and may step in."""

    header_every: int | None
    """Tokens between two looks at what the model would say in a fresh turn; None for no looks."""

    def orders(self, numbers: Sequence[int]) -> Mapping[int, Order]:
        """What becomes of prompts, by their number; of those left out nothing. Asked once a token.

        Args:
            numbers: Prompts whose replies are being written.
        """
        ...


Heard = Callable[[int, Sequence[int]], None]
"""Number of a prompt, and the token ids of its reply so far."""


@runtime_checkable
class Writer(Protocol):
    """Runs the model for `decode`; states are (row, d_model), those of the last token."""

    director: Director | None
    header: tuple[int, ...]
    """What stands between the user's words and a reply."""

    def begin(self, batch: TokenBatch, cache: Cache) -> Tensor:
        """States behind prompts, whose keys in the empty `cache` end at its last column."""
        ...

    def peek(self, ids: Tensor, mask: Tensor, numbers: list[int], cache: Cache) -> None:
        """Read tokens behind every row for the sake of what is set at sites; `cache` keeps them."""
        ...

    def step(self, ids: Tensor, mask: Tensor, numbers: list[int], cache: Cache) -> Tensor:
        """States behind one more token each; `mask` (row, token) holds for all tokens so far."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """The vocabulary head."""
        ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """Draws tokens; what a row gets hangs on its own number and logits, not on its neighbours.

    Attributes:
        temperature: Logits are divided by it; towards 0 the likeliest token is always drawn.
        seed: Another one draws other tokens.
    """

    temperature: float
    seed: int

    def __call__(
        self, logits: Float[Tensor, "row vocab"], numbers: Sequence[int], steps: Sequence[int]
    ) -> Int[Tensor, " row"]:
        """One token a row.

        Args:
            logits: Of the next token.
            numbers: Which prompts the rows are.
            steps: How many tokens each has written.

        Raises:
            NonFiniteError: A row has NaN or infinite logits.
        """
        # Others than these have no float64, without which rare tokens would be lost in the sum.
        wide = logits if logits.device.type == "cuda" else logits.cpu()
        total = (wide.double() / self.temperature).softmax(1).cumsum(1)
        _check(total[:, -1], numbers)
        drawn = [self._uniform(*row) for row in zip(numbers, steps, strict=True)]
        at = total.new_tensor(drawn).unsqueeze(1) * total[:, -1:]
        chosen = torch.searchsorted(total, at, right=True).squeeze(1)
        return chosen.clamp(max=logits.shape[1] - 1).to(logits.device)

    def _uniform(self, number: int, step: int) -> float:
        """A number in [0, 1)."""
        digest = hashlib.blake2b(f"{self.seed} {number} {step}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest) >> 11) / 2**53


def _check(values: Float[Tensor, " row"], numbers: Sequence[int]) -> None:
    """See that tokens can be chosen; of NaN the likeliest would always be the first."""
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return
    bad = [number + 1 for number, ok in zip(numbers, finite.tolist(), strict=True) if not ok]
    raise NonFiniteError(
        f"the reply to prompt {', '.join(map(str, bad[:5]))} has NaN or infinite logits, from "
        "which no token can be chosen",
        "try `--dtype float32`; the checkpoint may also be damaged",
    )


@dataclass(slots=True, eq=False)
class Written:
    """What was written behind one row.

    Attributes:
        ids: New tokens, without the one that ended them.
        ended: Whether it ended by itself.
        begun_anew: How often an order made it begin anew.
        states: Where asked for: the state that chose each token, the ending one included.
        forced: Tokens that are read before the next one is written.
    """

    ids: list[int] = field(default_factory=list)
    ended: bool = False
    begun_anew: int = 0
    forced: list[int] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Task:
    """What `decode` was asked for, and what is written so far."""

    writer: Writer
    stops: Sequence[int]
    max_new_tokens: int
    done: Callable[[int], None]
    with_states: bool
    settled: Settled | None
    sampling: Sampling | None
    heard: Heard
    replies: list[Written]

    def begin(self, batch: TokenBatch) -> _Running:
        """Run prompts, and write the first token behind each."""
        cache = buffers()
        states = self.writer.begin(batch, cache)
        numbers = batch.numbers.tolist()
        mask, live = batch.left_padded().mask, [True] * len(numbers)
        rows = _Running(cache, numbers, mask, batch.numbers, live)
        # Replies of unlike length that rows begin with take more columns than the longest row.
        rows.mask = torch.nn.functional.pad(mask, (rows.columns - mask.shape[1], 0))
        self.write(rows, states)
        return rows

    def write(self, rows: _Running, states: Tensor) -> None:
        """Write one more token behind each row, and see which of them end with it."""
        logits = self.writer.logits(states)
        if self.sampling is None:
            highest, rows.last = logits.max(-1)
            _check(highest, rows.numbers)
        else:
            steps = [len(self.replies[number].ids) for number in rows.numbers]
            rows.last = self.sampling(logits, rows.numbers, steps)
        kept = states.cpu() if self.with_states else None
        over = self._ordered(rows)
        asked: dict[int, int] = {}  # Number of a prompt: its row.
        for i, (number, token) in enumerate(zip(rows.numbers, rows.last.tolist(), strict=True)):
            if not rows.live[i]:
                continue
            reply = self.replies[number]
            if reply.forced:
                rows.last[i] = reply.forced.pop(0)
                continue
            reply.ended = token in self.stops
            if not reply.ended:
                reply.ids.append(token)
                self.heard(number, reply.ids)
            if kept is not None:
                reply.states.append(kept[i].clone())
            if reply.ended or len(reply.ids) == self.max_new_tokens:
                rows.live[i] = False
                over += 1
            elif len(reply.ids) % _ASKED_EVERY == 0:
                asked[number] = i
        if self.settled is not None and asked:
            verdicts = self.settled(list(asked), [self.replies[number].ids for number in asked])
            for i, stop in zip(asked.values(), verdicts, strict=True):
                rows.live[i] = not stop
                over += stop
        if over:
            self.done(over)

    def _ordered(self, rows: _Running) -> int:
        """Carry out what the director orders; how many replies that ended."""
        director = self.writer.director
        if director is None:
            return 0
        live = {number: i for i, number in enumerate(rows.numbers) if rows.live[i]}
        ended = 0
        for number, order in director.orders(list(live)).items():
            reply = self.replies[number]
            reply.ids, reply.states = [], []
            if order.ends:
                reply.ids, reply.ended = list(order.ids), True
                rows.live[live[number]] = False
                ended += 1
            else:
                reply.forced = list(order.ids)
                reply.begun_anew += 1
            self.heard(number, reply.ids)
        return ended

    def look_ahead(self, rows: _Running) -> None:
        """Show the director what the model would say in a fresh turn."""
        header = torch.tensor(self.writer.header).expand(len(rows.numbers), -1)
        # The last token written has not been read yet.
        ids = torch.cat([rows.last.unsqueeze(1), header.to(rows.last.device)], dim=1)
        mask = torch.nn.functional.pad(rows.mask, (0, ids.shape[1]), value=True)
        self.writer.peek(ids, mask, rows.numbers, rows.cache)
        for layer in rows.layers:
            layer.drop(ids.shape[1])


def decode(
    whole: TokenBatch,
    writer: Writer,
    *,
    stops: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    done: Callable[[int], None],
    with_states: bool = False,
    settled: Settled | None = None,
    sampling: Sampling | None = None,
    heard: Heard | None = None,
) -> list[Written]:
    """Write behind every row.

    Args:
        whole: The prompts.
        writer: Runs the model.
        stops: Tokens that end a reply.
        max_new_tokens: Replies are cut there.
        batch_size: Most rows at a time.
        done: Called with the number of replies that ended.
        with_states: Keep the states, on the CPU.
        settled: Asked every 8 tokens with rows' numbers and what is written behind them; those for
            which it says so end there.
        sampling: Draws the tokens; None takes the likeliest.
        heard: Called after every token; where an order makes a reply begin anew, with none.
    """
    replies = [Written() for _ in range(len(whole))]
    told = heard if heard is not None else lambda *_: None
    task = _Task(writer, stops, max_new_tokens, done, with_states, settled, sampling, told, replies)
    every = None if writer.director is None else writer.director.header_every
    steps = 0
    waiting = torch.argsort(whole.mask.sum(1), stable=True).tolist()
    running: _Running | None = None
    while waiting or running is not None:
        live = sum(running.live) if running is not None else 0
        room = batch_size - live
        # Copying the rows that stay is dear, so a few places are left empty until they are many.
        refill = waiting and (4 * room >= batch_size or not live)
        if running is not None and (refill or not live or 2 * live <= len(running.live)):
            if live:
                running.keep_live()
            else:
                running = None
        if refill:
            fresh = task.begin(whole.rows(waiting[:room]))
            waiting = waiting[room:]
            if running is None:
                running = fresh
            else:
                running.join(fresh)
            continue
        if running is None:
            break
        if every is not None and steps % every == every - 1:
            task.look_ahead(running)
        steps += 1
        running.mask = torch.nn.functional.pad(running.mask, (0, 1), value=True)
        ids = running.last.unsqueeze(1)
        task.write(running, writer.step(ids, running.mask, running.numbers, running.cache))
    return replies

"""Greedy decoding of many prompts at once, under whatever edits are in force.

Rows that end make room for the next prompts at once, and keys and values stand in buffers with room
to grow, so that a step copies none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from demur.models.tokens import TokenBatch

_ROOM = 32  # Tokens by which a full buffer grows.


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


Step = Callable[[TokenBatch | None, Tensor, Tensor, list[int], Cache], Tensor]


def decode(
    whole: TokenBatch,
    step: Step,
    *,
    stops: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    done: Callable[[int], None],
) -> list[tuple[list[int], bool]]:
    """Write greedily behind every row.

    Args:
        whole: The prompts.
        step: Runs the model: (the prompts, None behind them; token ids; mask of all tokens so far;
            the rows' numbers; cache) to next-token logits.
        stops: Tokens that end a reply.
        max_new_tokens: Replies are cut there.
        batch_size: Most rows at a time.
        done: Called with the number of replies that ended.

    Returns:
        For each prompt its new tokens, and whether it ended by itself; the token that ended it is
        left out.
    """
    replies: list[list[int]] = [[] for _ in range(len(whole))]
    ended = [False] * len(whole)
    waiting = torch.argsort(whole.mask.sum(1), stable=True).tolist()
    running: _Running | None = None

    def write(rows: _Running) -> None:
        over = 0
        for i, (number, token) in enumerate(zip(rows.numbers, rows.last.tolist(), strict=True)):
            if not rows.live[i]:
                continue
            ended[number] = token in stops
            if not ended[number]:
                replies[number].append(token)
            if ended[number] or len(replies[number]) == max_new_tokens:
                rows.live[i] = False
                over += 1
        if over:
            done(over)

    def begin(numbers: list[int]) -> _Running:
        batch = whole.rows(numbers).left_padded()
        cache = Cache(layer_class_to_replicate=_Buffered)
        logits = step(batch, batch.ids, batch.mask, numbers, cache)
        rows = _Running(cache, numbers, batch.mask, logits.argmax(-1), [True] * len(numbers))
        write(rows)
        return rows

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
            fresh = begin(waiting[:room])
            waiting = waiting[room:]
            if running is None:
                running = fresh
            else:
                running.join(fresh)
            continue
        if running is None:
            break
        running.mask = torch.nn.functional.pad(running.mask, (0, 1), value=True)
        ids = running.last.unsqueeze(1)
        logits = step(None, ids, running.mask, running.numbers, running.cache)
        running.last = logits.argmax(-1)
        write(running)
    return list(zip(replies, ended, strict=True))

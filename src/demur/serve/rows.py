"""What stands at the sites of the model while rows of many requests are written together.

Every row has edits of its own, may be read by a guard, and may be held by an anchor. What fails for
one row ends that row: it is marked, and what the pass makes of it is never handed out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demur.anchor import Anchor, Holding
from demur.errors import ConfigError, NonFiniteError, SilentEditError
from demur.guard import Guard, ReadName, Scored, columns
from demur.interventions import Intervention
from demur.models import Chunk, Model
from demur.serve.edits import Edit
from demur.sites import Site, Span

_BEGIN = Site(0, "resid_pre")


class Enough(Exception):
    """No error: a pass has come as far as the guard reads."""


@dataclass(slots=True, eq=False)
class Hold:
    """One row's own state at the sites.

    Attributes:
        number: Unique in the engine's life.
        edits: What is done to the row.
        guarded: Whether the guard is to read it.
        holding: The anchor at work on it.
        scored: What the guard says.
        counts: How often each edit acted on each site.
        failed: What went wrong; nothing of the row may be handed out.
        peeking: Whether the anchor may look at the fresh turn that is being read.
    """

    number: int
    edits: tuple[Edit, ...] = ()
    guarded: bool = False
    holding: Holding | None = None
    scored: Scored | None = None
    counts: list[Counter[Site]] = field(default_factory=list)
    failed: Exception | None = None
    peeking: bool = False


Handler = Callable[[Tensor, Chunk, Mapping[int, int]], Tensor]
"""The tensor at a site, the chunk, and where each row's number stands in it."""


class Sites:
    """Puts in force what the rows need, each in its own rows, and takes it away again.

    The order at a site is: edits, the guard, the anchor. The guard does not see a client's edits,
    which could blind it: rows that are edited are read in a pass of their own, see `guard_only`.
    """

    def __init__(self, model: Model, guard: Guard | None = None) -> None:
        self.model, self.guard = model, guard
        self.muted = False
        self.guard_only = False
        self._handlers: dict[Site, list[Handler]] = {}
        self._undo: dict[Site, Callable[[], None]] = {}
        self._key: object = None
        self._parts: tuple[Chunk, dict[int, Chunk]] | None = None

    def set(self, holds: Sequence[Hold]) -> None:
        """Serve these rows and no others."""
        key = tuple(hold.number for hold in holds)
        if key == self._key:
            return
        handlers = self._handlers_of(holds)
        self._handlers, self._key = handlers, None  # Until all of them are in force.
        for site in self._undo.keys() - handlers.keys():
            self._undo.pop(site)()
        for site in handlers.keys() - self._undo.keys():
            self._undo[site] = self.model.intercept(site, partial(self._at, site=site))
        self._key = key

    def _handlers_of(self, holds: Sequence[Hold]) -> dict[Site, list[Handler]]:
        handlers: dict[Site, list[Handler]] = {}
        groups: dict[tuple[Edit, ...], list[Hold]] = {}
        for hold in holds:
            if hold.edits:
                groups.setdefault(hold.edits, []).append(hold)
        for edits, group in groups.items():
            for place, one in enumerate(edits):
                for site, act in one.acts(self.model):
                    own = partial(self._edit, group=group, act=act, span=one.span, place=place)
                    handlers.setdefault(site, []).append(partial(own, site=site))
        read = [hold for hold in holds if hold.guarded and hold.scored is None]
        if read:
            assert self.guard is not None
            handlers.setdefault(self.guard.site, []).append(partial(self._read, group=read))
        for hold in holds:
            if hold.holding is not None:
                for site, act in _acts(hold.holding):
                    own = partial(self._hold, hold=hold, act=act)
                    handlers.setdefault(site, []).append(own)
        return handlers

    def clear(self) -> None:
        """Leave the model as it was found."""
        self.set(())

    def forget(self) -> None:
        """Look at the rows anew at the next `set`."""
        self._key = None

    def _at(self, x: Tensor, *, site: Site) -> Tensor:
        chunk = self.model.chunk
        if self.muted or chunk is None or chunk.rows is None:
            return x
        present = {number: i for i, number in enumerate(chunk.rows.tolist())}
        for handler in self._handlers.get(site, ()):
            x = handler(x, chunk, present)
        return x

    # Edits ----------------------------------------------------------------------------------------

    def _edit(
        self,
        x: Tensor,
        chunk: Chunk,
        present: Mapping[int, int],
        *,
        group: Sequence[Hold],
        act: Intervention,
        span: Span | None,
        place: int,
        site: Site,
    ) -> Tensor:
        if self.guard_only:
            return x
        here = [hold for hold in group if hold.number in present and hold.failed is None]
        if chunk.is_peek:
            here = [hold for hold in here if hold.peeking]
        if not here:
            return x
        index = [present[hold.number] for hold in here]
        for hold in here:
            hold.counts[place][site] += 1
        try:
            return _put(x, index, _edited(x, index, chunk, act, span))
        except Exception as error:
            if len(here) == 1:
                here[0].failed = error
                return x
        for hold in here:  # One after the other, so that only the one at fault fails.
            hold.counts[place][site] -= 1
            x = self._edit(
                x, chunk, present, group=[hold], act=act, span=span, place=place, site=site
            )
        return x

    # The guard ------------------------------------------------------------------------------------

    def _read(
        self, x: Tensor, chunk: Chunk, present: Mapping[int, int], *, group: Sequence[Hold]
    ) -> Tensor:
        assert self.guard is not None
        wanted = [
            hold
            for hold in group
            if hold.number in present
            and hold.scored is None
            and hold.failed is None
            and bool(hold.edits) == self.guard_only
        ]
        instruction = chunk.spans.get(Span.INSTRUCTION)
        if wanted and instruction is not None and bool(instruction.any()):
            for hold in wanted:
                try:
                    hold.scored = self._scored(x, chunk, present[hold.number])
                except Exception as error:
                    hold.failed = error
        if self.guard_only:
            raise Enough
        return x

    def _scored(self, x: Tensor, chunk: Chunk, row: int) -> Scored:
        assert self.guard is not None
        spans = {name: span[row : row + 1].to(x.device) for name, span in chunk.spans.items()}
        own = x.detach()[row : row + 1]
        found = self.guard.look(own, spans, chunk.ends[row : row + 1].to(x.device))
        names: list[ReadName] = [read.name for read in self.guard.reads]
        raw = columns([{name: value.cpu()[0] for name, value in found.items()}], names)
        # -inf stands for turns that a conversation does not have.
        if any(np.isnan(value[0]) or value[0] == np.inf for value in raw.values()):
            raise NonFiniteError(
                "activations that the guard reads hold NaN or infinity",
                "try `--dtype float32`; the checkpoint may also be damaged",
            )
        scored = self.guard.judge(raw)
        if not np.isfinite(scored.scores[0]):
            raise SilentEditError(
                "the guard found nothing to read in a request", "fit a guard with `t_inst`"
            )
        return scored

    # The anchor -----------------------------------------------------------------------------------

    def _hold(
        self,
        x: Tensor,
        chunk: Chunk,
        present: Mapping[int, int],
        *,
        hold: Hold,
        act: Callable[[Tensor], Tensor],
    ) -> Tensor:
        row = present.get(hold.number)
        if row is None or hold.failed is not None or self.guard_only:
            return x
        if chunk.is_peek and not hold.peeking:
            return x
        own = x[row : row + 1]
        self.model.chunk = self._part(chunk, row)
        try:
            held = act(own)
        except Exception as error:
            hold.failed = error
            return x
        finally:
            self.model.chunk = chunk
        return x if held is own else _put(x, [row], held)

    def _part(self, chunk: Chunk, row: int) -> Chunk:
        """The chunk of one row."""
        assert chunk.rows is not None
        if self._parts is None or self._parts[0] is not chunk:
            self._parts = (chunk, {})
        parts = self._parts[1]
        if row not in parts:
            only = slice(row, row + 1)
            spans = {name: span[only] for name, span in chunk.spans.items()}
            parts[row] = Chunk(
                spans, chunk.ends[only], chunk.rows[only], is_prefix=False, is_peek=chunk.is_peek
            )
        return parts[row]


def _acts(holding: Holding) -> list[tuple[Site, Callable[[Tensor], Tensor]]]:
    """As `Anchor.holding` sets them, in that order."""
    anchor: Anchor = holding.anchor
    acts: list[tuple[Site, Callable[[Tensor], Tensor]]] = [(_BEGIN, holding.begin)]
    if anchor.gate is not None:
        acts.append((anchor.gate.detector.site, holding.read))
    for number, actuator in enumerate(anchor.actuators):
        own: Any = partial(holding.act, actuator=actuator, first=number == 0)
        acts.append((actuator.site, own))
    return acts


def _edited(
    x: Tensor, index: list[int], chunk: Chunk, act: Intervention, span: Span | None
) -> Tensor:
    own = x if len(index) == len(x) else x[index]
    if span is None:
        return act(own)
    mask = chunk.spans.get(span)
    if mask is None:
        return own
    mask = mask if len(index) == len(x) else mask[index]
    if not bool(mask.any()):
        return own
    return torch.where(mask.to(x.device).unsqueeze(-1), act(own), own)


def _put(x: Tensor, index: list[int], own: Tensor) -> Tensor:
    """A new tensor with some rows in place of its own."""
    if len(index) == len(x):
        return own
    out = x.clone()
    out[index] = own
    return out


def check_read(hold: Hold) -> None:
    """See after the prefill that nothing was left out that was asked for.

    Raises:
        SilentEditError: The guard or the gate has not read the request, or an edit never ran.
    """
    hint = "`demur models check` tells whether the family of the model names the right modules"
    if hold.guarded and hold.scored is None:
        raise SilentEditError("the guard has not read the request", hint)
    holding = hold.holding
    if holding is not None:
        traces = holding.traces
        gate = holding.anchor.gate
        if len(traces) != 1 or (gate is not None and traces[0].score is None):
            raise SilentEditError("the gate has not read the request", hint)
    for edit, counts in zip(hold.edits, hold.counts, strict=True):
        silent = [str(site) for site, count in counts.items() if count == 0]
        if silent:
            raise SilentEditError(f"the edit of `{edit.name}` never ran at {silent[0]}", hint)


def held_by(anchor: Anchor, model: Model) -> Holding:
    """An anchor's state for one row.

    Raises:
        ConfigError: The model is held by an anchor from elsewhere.
    """
    if model.director is not None:
        raise ConfigError(f"{model.name} is held by an anchor already", "leave its block first")
    return Holding(anchor, model)

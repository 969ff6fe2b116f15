"""Replies to many requests at once, on one thread that alone runs the model.

Requests come in at any token: they are read apart, and their keys and values are put below those of
the rows that are being written, aligned at the last token. What a request gets does not depend on
who shares its batch, but for the last bits of floating-point sums.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor

from demur.anchor import Anchor, Holding
from demur.errors import DemurError, NonFiniteError
from demur.guard import Guard, Scored
from demur.models import Chunk, Conversation, Model, TokenBatch
from demur.models.decoding import Sampling, buffers
from demur.serve.edits import Edit
from demur.serve.errors import RequestError, broken, busy, closing, late
from demur.serve.layout import roomy
from demur.serve.rows import Enough, Hold, Sites, check_read, held_by
from demur.serve.scores import Score, Spelling, scored
from demur.serve.settings import ServeSettings
from demur.sites import Span

log = logging.getLogger(__name__)

T = TypeVar("T")
Finish = Literal["stop", "length", "content_filter"]
_ADMIT_EVERY = 4  # Tokens between two times that requests join rows that are being written.
_CALLS = 8  # Most pieces of other work that wait.
_PLACES = 256  # Whose logits are held at a time while a prompt is scored.


# What is asked, and what is told ----------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One reply that is asked for.

    Attributes:
        prompt: One row, as `Model.encode` lays it out.
        max_tokens: The reply is cut there; 0 only reads the prompt.
        temperature: 0 takes the likeliest token.
        top_p: Tokens are drawn from the likeliest ones that hold this share of probability.
        seed: Of the draws.
        choice: Which of several replies to one prompt it is; each draws other tokens.
        stops: Texts in front of which the reply ends.
        edits: What is done to this row.
        guarded: Whether the guard reads the request.
        anchor: What holds the reply.
        words: Whether the text is wanted as it grows.
        raw: Whether the prompt is text that no chat template laid out: the reply goes on with it.
        scores: Of how many of the likeliest tokens log-probabilities are wanted, beside those of
            the tokens that are written; None for none at all.
        echo: Whether those of the prompt's tokens are wanted too.
    """

    prompt: TokenBatch
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    choice: int = 0
    stops: tuple[str, ...] = ()
    edits: tuple[Edit, ...] = ()
    guarded: bool = False
    anchor: Anchor | None = None
    words: bool = False
    raw: bool = False
    scores: int | None = None
    echo: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a guard says of a request; see `demur.guard.Scored`."""

    score: float
    threshold: float
    flagged: bool
    by: str
    reads: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class GateState:
    """What the gate of an anchor makes of a request.

    Attributes:
        gate: "open" or "shut"; "none" without an anchor.
        opened_at: Tokens of the reply when it opened.
        by: The read that the highest score came from.
        score: That score, nats.
        threshold: Above it the gate opens.
        begun_anew: How often the reply was dropped and begun anew.
    """

    gate: Literal["open", "shut", "none"] = "none"
    opened_at: int | None = None
    by: str | None = None
    score: float | None = None
    threshold: float | None = None
    begun_anew: int = 0

    @classmethod
    def of(cls, holding: Holding | None, begun_anew: int = 0) -> GateState:
        """Of the one row that an anchor holds."""
        if holding is None or not holding.traces:
            return cls()
        trace, gate = holding.traces[0], holding.anchor.gate
        return cls(
            "shut" if trace.opened is None else "open",
            trace.opened,
            trace.by or None,
            trace.score,
            None if gate is None else gate.threshold.value,
            begun_anew,
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """A finished reply.

    Attributes:
        text: Without what ended it, and without closed thinking blocks.
        ids: Its tokens.
        finish: Why it ended.
        prompt_tokens: Of the request as it was laid out.
        verdict: Of the guard.
        gate: Of the anchor.
        edits: How often each edit acted, over all sites.
        scores: Where asked for: of its tokens, and of the one that ended it; None where the reply
            is not the model's own words.
        read: Where asked for: of the prompt's tokens.
    """

    text: str
    ids: tuple[int, ...]
    finish: Finish
    prompt_tokens: int
    verdict: Verdict | None
    gate: GateState
    edits: tuple[int, ...]
    scores: tuple[Score, ...] | None = None
    read: tuple[Score, ...] | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to the job of that index.

    Attributes:
        index: Among the jobs that were submitted together.
        kind: "begun", it was read; "text", more was written; "anew", what was written is dropped;
            "done" and "failed" come last.
        text: What was written since the last event.
        verdict: From "begun" on.
        gate: The same.
        scores: Of tokens whose text was written since the last event; of "begun", of the prompt's.
        reply: Of "done".
        error: Of "failed".
    """

    index: int
    kind: Literal["begun", "text", "anew", "done", "failed"]
    text: str = ""
    verdict: Verdict | None = None
    gate: GateState = GateState()
    scores: tuple[Score, ...] = ()
    reply: Reply | None = None
    error: RequestError | None = None


Listener = Callable[[Event], None]
"""Hears of events on the engine's thread; must not take long."""


@runtime_checkable
class Observer(Protocol):
    """Counts what an engine does."""

    def stepped(self, rows: int, waiting: int) -> None:
        """A token was written behind so many rows."""
        ...

    def began(self, prompt_tokens: int, seconds: float) -> None:
        """A request got its first token so long after it came."""
        ...

    def ended(self, tokens: int, *, flagged: bool | None, opened: bool | None) -> None:
        """A reply of so many tokens is done."""
        ...

    def dropped(self) -> None:
        """A client went away."""
        ...


class _Unseen:
    def stepped(self, rows: int, waiting: int) -> None: ...
    def began(self, prompt_tokens: int, seconds: float) -> None: ...
    def ended(self, tokens: int, *, flagged: bool | None, opened: bool | None) -> None: ...
    def dropped(self) -> None: ...


# Rows -------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Row:
    """A job at work."""

    job: Job
    index: int
    hold: Hold
    listener: Listener
    came: float
    deadline: float
    ids: list[int] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)  # Characters in front of each of them.
    read: tuple[Score, ...] | None = None
    forced: list[int] = field(default_factory=list)
    begun_anew: int = 0
    steps: int = 0
    sent: int = 0  # Characters.
    seen: int = 0  # Characters that are to be seen so far.
    told: int = 0  # Scores.
    begun: bool = False
    over: bool = False
    cancelled: bool = False

    @property
    def length(self) -> int:
        """Most columns that it may come to take."""
        return self.job.prompt.ids.shape[1] + self.job.max_tokens


class Ticket:
    """Jobs that were submitted together."""

    def __init__(self, rows: Sequence[_Row], engine: Engine) -> None:
        self._rows, self._engine = rows, engine

    def cancel(self) -> None:
        """Drop them at the next token; nobody hears of them again."""
        self._engine.cancel(self._rows)


class _Batch:
    """Rows that are being written: keys and values, what is real of them, and the last tokens."""

    def __init__(self, cache: Any, rows: list[_Row], mask: Tensor, last: Tensor) -> None:
        self.cache, self.rows, self.mask, self.last = cache, rows, mask, last

    @property
    def layers(self) -> list[Any]:
        return self.cache.layers

    @property
    def live(self) -> list[int]:
        return [i for i, row in enumerate(self.rows) if not row.over]

    def compact(self) -> None:
        """Forget rows that are over, and columns that are real in no row."""
        rows = self.live
        mask = self.mask[rows]
        used = mask.any(0).nonzero()
        front = int(used.min()) if len(used) else 0
        for layer in self.layers:
            index = torch.tensor(rows, device=layer.keys.device)
            keys = layer.keys[index, :, front:].contiguous()
            values = layer.values[index, :, front:].contiguous()
            layer.keys, layer.values, layer.room = keys, values, (keys, values)
        self.mask, self.last = mask[:, front:], self.last[torch.tensor(rows)]
        self.rows = [self.rows[i] for i in rows]

    def join(self, other: _Batch) -> None:
        for layer, new in zip(self.layers, other.layers, strict=True):
            layer.join(new)
        width = max(self.mask.shape[1], other.mask.shape[1])
        pad = torch.nn.functional.pad
        both = [pad(m, (width - m.shape[1], 0)) for m in (self.mask, other.mask)]
        self.mask, self.last = torch.cat(both), torch.cat([self.last, other.last])
        self.rows += other.rows

    @property
    def wasteful(self) -> bool:
        """Whether `compact` is worth its copy."""
        live = self.live
        if 4 * len(live) <= 3 * len(self.rows):
            return True
        width = self.mask.shape[1]
        front = int(self.mask[live].any(0).int().argmax())
        return front > 32 and 4 * front >= width


# The engine -------------------------------------------------------------------------------------


class Engine:
    """Writes replies; one thread owns the model.

    Attributes:
        model: Nobody else may run it while the engine does.
        guard: Reads requests.
        tokenizing: To be held by whoever uses the tokenizer: it is not made for several threads,
            and how it takes control tokens is a switch that all of them share.
        spelling: Texts of single tokens; wants `tokenizing` held as well.
    """

    def __init__(
        self,
        model: Model,
        *,
        guard: Guard | None = None,
        settings: ServeSettings | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.model, self.guard = model, guard
        self.settings = settings if settings is not None else ServeSettings()
        self.tokenizing = threading.RLock()
        self._observer: Observer = observer if observer is not None else _Unseen()
        self._sites = Sites(model, guard)
        self._wake = threading.Condition()
        self._waiting: deque[_Row] = deque()
        self._calls: deque[tuple[Callable[[Model], Any], Future[Any]]] = deque()
        self._batch: _Batch | None = None
        self._numbers = 0
        self._since = _ADMIT_EVERY
        self._ends: deque[float] = deque(maxlen=64)
        self._last: list[tuple[_Row, Event]] = []  # Last events of rows, to be told.
        self._state: Literal["new", "open", "draining", "stopping", "closed"] = "new"
        self._thread = threading.Thread(target=self._run, name="demur-engine", daemon=True)
        template = model.template
        assert template is not None
        self._stops = frozenset(model.stop_ids)
        self.spelling = Spelling(template.tokenizer)
        # Where the template opens the thinking block, a reply begins inside of it.
        self._thinking = template.after.rpartition("</think>")[2].count("<think>") > 0

    # From other threads ---------------------------------------------------------------------------

    def start(self) -> Engine:
        """Begin to work."""
        with self._wake:
            if self._state == "new":
                self._state = "open"
                self._thread.start()
        return self

    @property
    def open(self) -> bool:
        """Whether requests are taken."""
        return self._state == "open" and self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Replies that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Replies that are being written."""
        batch = self._batch
        return len(batch.live) if batch is not None else 0

    def encode(self, prompts: Sequence[str | Conversation], template: Any = None) -> TokenBatch:
        """As `Model.encode`, from any thread; `template` stands in for the model's own."""
        with self.tokenizing:
            if template is None:
                return self.model.encode(prompts)
            return template.encode(prompts, pad_id=self.model.pad_id)

    def submit(self, jobs: Sequence[Job], listener: Listener) -> Ticket:
        """Take jobs, all or none.

        Raises:
            RequestError: Too many wait.
            RequestError: The engine is stopping.
        """
        now = time.monotonic()
        with self._wake:
            if not self.open:
                raise closing("the server is stopping", "try again in a moment", retry_after=5)
            over = len(self._waiting) + len(jobs) - self.settings.queue
            if over > 0:
                seconds = self._seconds_until(over)
                raise busy(
                    f"{len(self._waiting)} replies wait, of {self.settings.queue} that may",
                    f"try again in {seconds} s",
                    code="rate_limit_exceeded",
                    retry_after=seconds,
                )
            rows = []
            for index, job in enumerate(jobs):
                self._numbers += 1
                counts = [
                    Counter(dict.fromkeys((site for site, _ in edit.acts(self.model)), 0))
                    for edit in job.edits
                ]
                hold = Hold(self._numbers, job.edits, job.guarded, counts=counts)
                rows.append(_Row(job, index, hold, listener, now, now + self.settings.timeout))
            self._waiting.extend(rows)
            self._wake.notify()
        return Ticket(rows, self)

    def cancel(self, rows: Sequence[_Row]) -> None:
        """Drop rows at the next token."""
        with self._wake:
            for row in rows:
                row.cancelled = True
            self._wake.notify()

    def call(self, work: Callable[[Model], T]) -> Future[T]:
        """Have the engine's thread do something else with the model, between two tokens.

        Raises:
            RequestError: Too much waits.
            RequestError: The engine is stopping.
        """
        future: Future[T] = Future()
        with self._wake:
            if not self.open:
                raise closing("the server is stopping", "try again in a moment", retry_after=5)
            if len(self._calls) >= _CALLS:
                raise busy(
                    f"{_CALLS} readings wait already",
                    "try again in a moment",
                    code="rate_limit_exceeded",
                    retry_after=1,
                )
            self._calls.append((work, future))
            self._wake.notify()
        return future

    def replies(self, jobs: Sequence[Job]) -> list[Reply]:
        """Submit jobs and wait for all of them.

        Raises:
            RequestError: One failed.
        """
        last: dict[int, Event] = {}
        done = threading.Event()

        def hear(event: Event) -> None:
            if event.kind in ("done", "failed"):
                last[event.index] = event
                if len(last) == len(jobs):
                    done.set()

        self.submit(jobs, hear)
        done.wait()
        for event in last.values():
            if event.error is not None:
                raise event.error
        return [cast(Reply, last[i].reply) for i in range(len(jobs))]

    def drain(self) -> None:
        """Take no more requests; those that were accepted go on."""
        with self._wake:
            if self._state == "open":
                self._state = "draining"
            self._wake.notify()

    def close(self, limit: float | None = None) -> None:
        """Finish what was accepted, but for `limit` seconds at most, and stop."""
        if self._state in ("new", "closed"):
            self._state = "closed"
            return
        self.drain()
        self._thread.join(self.settings.shutdown if limit is None else limit)
        with self._wake:
            self._state = "stopping"
            self._wake.notify()
        self._thread.join()
        self._state = "closed"

    def _seconds_until(self, places: int) -> int:
        """Until so many places are free, by how fast replies ended of late."""
        ends = self._ends
        if len(ends) < 2:
            return 1
        span = time.monotonic() - ends[0]
        return max(1, min(math.ceil(places * span / len(ends)), math.ceil(self.settings.timeout)))

    # The thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_grad_enabled(False)
        try:
            while self._turn():
                pass
        finally:
            self._sites.clear()
            self._fail_all(closing("the server is stopping", "try again in a moment"))
            self._let_go()

    def _turn(self) -> bool:
        """Do one thing; False once there is nothing more to do."""
        with self._wake:
            while not (self._waiting or self._calls or self._batch is not None):
                if self._state != "open":
                    return False
                self._wake.wait()
            if self._state == "stopping":
                return False
        try:
            self._sweep()
            self._work()
            self._admit()
            self._step()
        except Exception as error:  # Of the engine itself: nothing half-done is handed out.
            log.error("the engine failed: %s", type(error).__name__)
            self._fail_all(_broken(error))
            self._sites.forget()
        self._let_go()
        return True

    def _let_go(self) -> None:
        """Tell of rows that are over, once nothing of theirs is in force any more.

        Whoever hears that the last reply is done may run the model himself at once.
        """
        if not self._last:
            return
        if self._batch is None or not self._batch.live:
            self._sites.clear()
        last, self._last = self._last, []
        for row, event in last:
            self._tell(row, event)

    def _fail_all(self, error: RequestError) -> None:
        with self._wake:
            rows = [*self._waiting]
            self._waiting.clear()
            calls = [*self._calls]
            self._calls.clear()
        batch, self._batch = self._batch, None
        for row in [*(batch.rows if batch is not None else ()), *rows]:
            self._fail(row, error)
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _sweep(self) -> None:
        """Drop what nobody waits for any more, and what took too long."""
        now = time.monotonic()
        with self._wake:
            gone = [row for row in self._waiting if row.cancelled or now > row.deadline]
            for row in gone:
                self._waiting.remove(row)
        running = self._batch.rows if self._batch is not None else []
        for row in [*gone, *running]:
            if row.over:
                continue
            if row.cancelled:
                row.over = True
                self._observer.dropped()
            elif now > row.deadline:
                took = f"{self.settings.timeout:g} s"
                self._fail(
                    row,
                    late(
                        f"the reply was not done within {took}",
                        "ask for fewer tokens, or try again when fewer requests wait",
                        code="timeout",
                    ),
                )

    def _work(self) -> None:
        """Do other work."""
        with self._wake:
            if not self._calls:
                return
            work, future = self._calls.popleft()
        if not future.set_running_or_notify_cancel():
            return
        self._sites.muted = True
        try:
            future.set_result(work(self.model))
        except Exception as error:
            future.set_exception(error)
        finally:
            self._sites.muted = False

    # Admission ------------------------------------------------------------------------------------

    def _admit(self) -> None:
        batch = self._batch
        if batch is not None and (not batch.live or batch.wasteful):
            if batch.live:
                batch.compact()
            else:
                batch = self._batch = None
                self._sites.clear()
        live = len(batch.live) if batch is not None else 0
        room = self.settings.batch - live
        with self._wake:
            ready = len(self._waiting)
            soon = self._since >= _ADMIT_EVERY or not live
            if not ready or room <= 0 or not soon:
                return
            rows = self._fitting(batch, room)
        if not rows:
            return
        self._since = 0
        for part in self._passes(rows):
            fresh = self._prefilled(part)
            if fresh is not None and self._batch is not None:
                self._batch.join(fresh)
            elif fresh is not None:
                self._batch = fresh
            self._let_go()

    def _fitting(self, batch: _Batch | None, room: int) -> list[_Row]:
        """The rows next in line for which there is memory."""
        running = [batch.rows[i] for i in batch.live] if batch is not None else []
        longest, rows = max((row.length for row in running), default=0), list[_Row]()
        while self._waiting and len(rows) < room:
            row = self._waiting[0]
            longest = max(longest, row.length)
            count = len(running) + len(rows) + 1
            if count > 1 and count * longest > self.settings.cache_tokens:
                break
            rows.append(self._waiting.popleft())
        return rows

    def _passes(self, rows: Sequence[_Row]) -> list[list[_Row]]:
        """Rows of like length that are read in one pass; those with an anchor apart."""
        out: list[list[_Row]] = []
        for anchored in (False, True):
            own = [row for row in rows if (row.job.anchor is not None) == anchored]
            own.sort(key=lambda row: row.job.prompt.ids.shape[1])
            part: list[_Row] = []
            for row in own:
                width = row.job.prompt.ids.shape[1]
                if part and (len(part) + 1) * width > self.model.tokens_per_pass:
                    out.append(part)
                    part = []
                part.append(row)
            if part:
                out.append(part)
        return out

    def _prefilled(self, rows: list[_Row]) -> _Batch | None:
        """Read prompts, and write the first token behind each; None where none is left."""
        try:
            batch, states = self._prefill(rows)
        except Exception as error:
            if len(rows) == 1:
                self._fail(rows[0], _broken(error))
                return None
            whole: _Batch | None = None  # One after the other: only those at fault fail.
            for row in rows:
                one = self._prefilled([row])
                if whole is None:
                    whole = one
                elif one is not None:
                    whole.join(one)
            return whole
        self._write(batch, states)
        if not batch.live:
            return None
        if len(batch.live) < len(batch.rows):
            batch.compact()
        return batch

    def _prefill(self, rows: list[_Row]) -> tuple[_Batch, Tensor]:
        for row in rows:
            row.hold.failed = None
            if row.job.anchor is not None and row.hold.holding is None:
                with self.tokenizing:
                    row.hold.holding = held_by(row.job.anchor, self.model)
        others = self._batch.rows if self._batch is not None else []
        self._sites.forget()
        self._sites.set([row.hold for row in [*others, *rows] if not row.over])
        whole = _laid_out(rows, self.model)
        apart = [i for i, row in enumerate(rows) if row.hold.edits and row.hold.guarded]
        apart = [i for i in apart if rows[i].hold.scored is None]
        if apart:  # The guard reads what the client has not edited.
            some = _laid_out([rows[i] for i in apart], self.model)
            self._sites.guard_only = True
            try:
                with suppress(Enough):
                    self.model.extend(some.ids, some.mask, _chunk(some), buffers())
            finally:
                self._sites.guard_only = False
        cache = buffers()
        width = whole.ids.shape[1]
        cut = width
        if rows[0].job.anchor is not None:
            # What the gate reads of the instruction decides on what is done behind it.
            post = whole.spans[Span.POST_INSTRUCTION]
            cut = int(post.any(0).int().argmax())
            head = _columns(whole, slice(0, cut))
            self.model.extend(head.ids, head.mask, _chunk(head), cache)
            tail = _columns(whole, slice(cut, width))
            states = self.model.extend(tail.ids, whole.mask, _chunk(tail), cache)
        else:
            states = self.model.extend(whole.ids, whole.mask, _chunk(whole), cache)
        for i, row in enumerate(rows):
            if row.hold.failed is None:
                try:
                    check_read(row.hold)
                    if row.job.echo and row.job.scores is not None and row.read is None:
                        row.read = self._scored(row, states[i])
                except DemurError as error:
                    row.hold.failed = error
        self._sites.forget()  # The guard has read these.
        last = torch.zeros(len(rows), dtype=torch.long)
        return _Batch(cache, rows, whole.mask, last), states[:, -1]

    def _scored(self, row: _Row, states: Tensor) -> tuple[Score, ...]:
        """Of a prompt's tokens; `states` are the row's, (token, d_model), padding in front."""
        assert row.job.scores is not None
        ids = row.job.prompt.ids[0].tolist()
        front = len(states) - len(ids) - len(row.ids)
        found = [Score(ids[0], None)]
        for at in range(1, len(ids), _PLACES):
            tokens = ids[at : at + _PLACES]
            own = states[front + at - 1 : front + at - 1 + len(tokens)]
            spare = roomy(self.model, len(own)) - len(own)
            logits = self.model.unembed(torch.nn.functional.pad(own, (0, 0, 0, spare)))
            found += scored(logits[: len(own)], tokens, row.job.scores)
        return tuple(found)

    # A token --------------------------------------------------------------------------------------

    def _step(self) -> None:
        batch = self._batch
        if batch is None or not batch.live:
            return
        self._since += 1
        self._sites.set([batch.rows[i].hold for i in batch.live])
        try:
            self._look_ahead(batch)
            batch.mask = torch.nn.functional.pad(batch.mask, (0, 1), value=True)
            ones = torch.ones(len(batch.rows), 1, dtype=torch.bool)
            none = torch.zeros_like(ones)
            spans = {Span.INSTRUCTION: none, Span.POST_INSTRUCTION: none, Span.RESPONSE: ones}
            numbers = torch.tensor([row.hold.number for row in batch.rows])
            chunk = Chunk(spans, torch.zeros_like(numbers), numbers, is_prefix=False)
            last = batch.last.unsqueeze(1)
            states = self.model.extend(last, batch.mask, chunk, batch.cache)[:, -1]
            for row in batch.rows:
                row.steps += 1
            self._write(batch, states)
        except Exception as error:
            self._revive(batch, error)
            return
        self._observer.stepped(len(batch.live), len(self._waiting))

    def _revive(self, batch: _Batch, error: Exception) -> None:
        """A pass of many rows failed: read each anew, alone, so that only those at fault fail."""
        self._batch = None
        for row in batch.rows:
            if row.hold.failed is not None:
                self._fail(row, _broken(row.hold.failed))
        rows = [row for row in batch.rows if not row.over]
        if len(rows) == 1:
            self._fail(rows[0], _broken(error))
            return
        log.warning("a pass of %d rows failed: %s", len(rows), type(error).__name__)
        for row in rows:
            # What a gate has seen cannot be read anew; what is not sure to be held is not served.
            fresh = None
            if row.job.anchor is not None:
                self._fail(row, _broken(error))
            else:
                fresh = self._prefilled([row])
            if fresh is None:
                continue
            if self._batch is None:
                self._batch = fresh
            else:
                self._batch.join(fresh)

    def _look_ahead(self, batch: _Batch) -> None:
        """Show anchors what the model would say in a fresh turn."""
        due = []
        for row in batch.rows:
            holding = row.hold.holding
            every = holding.header_every if holding is not None else None
            if not row.over and every is not None and row.steps % every == every - 1:
                due.append(row)
        if not due:
            return
        template = self.model.template
        assert template is not None
        header = torch.tensor(template.post_ids).expand(len(batch.rows), -1)
        # The last token written has not been read yet.
        ids = torch.cat([batch.last.unsqueeze(1), header], dim=1)
        mask = torch.nn.functional.pad(batch.mask, (0, ids.shape[1]), value=True)
        numbers = torch.tensor([row.hold.number for row in batch.rows])
        spans = {Span.POST_INSTRUCTION: torch.ones(ids.shape, dtype=torch.bool)}
        ends = torch.full_like(numbers, ids.shape[1])
        for row in due:
            row.hold.peeking = True
        try:
            chunk = Chunk(spans, ends, numbers, is_prefix=False, is_peek=True)
            self.model.extend(ids, mask, chunk, batch.cache)
        finally:
            for row in due:
                row.hold.peeking = False
        for layer in batch.layers:
            layer.drop(ids.shape[1])

    def _write(self, batch: _Batch, states: Tensor) -> None:
        """Choose one more token behind each row, and see which of them end with it."""
        logits = self.model.unembed(states)
        finite = torch.isfinite(logits).all(1).tolist()
        likeliest = logits.argmax(-1).tolist()
        last = list(likeliest)
        for i, row in enumerate(batch.rows):
            if row.over:
                continue
            try:
                if row.hold.failed is not None:
                    raise row.hold.failed
                if not finite[i]:
                    raise NonFiniteError(
                        "there are NaN or infinite logits",
                        "try `--dtype float32`; the checkpoint may also be damaged",
                    )
                last[i] = self._written(row, likeliest[i], logits[i : i + 1])
            except Exception as error:
                self._fail(row, _broken(error))
        batch.last = torch.tensor(last)

    def _written(self, row: _Row, likeliest: int, logits: Tensor) -> int:
        """Put a token behind a row; which one is to be read next."""
        job, holding = row.job, row.hold.holding
        first = not row.begun
        if first:
            self._begin(row)
            if not row.over and not job.max_tokens:
                self._finish(row, "length")
            if row.over:
                return likeliest
        token = likeliest if job.temperature == 0 else _drawn(job, logits, len(row.ids))
        if holding is not None and not row.forced:
            self._order(row, holding)
            if row.over:
                return token
        if row.forced:
            return row.forced.pop(0)
        if job.scores is not None:
            row.scores += scored(logits, [token], job.scores)
            row.begins.append(row.seen)
        if token in self._stops:
            self._finish(row, "stop")
            return token
        row.ids.append(token)
        full = len(row.ids) >= job.max_tokens
        text = ""
        if job.words or job.stops:
            text = self._text(row, whole=full)
            row.seen = len(text.rstrip("\ufffd"))
            at = min((at for stop in job.stops if (at := text.find(stop)) >= 0), default=None)
            if at is not None:
                self._finish(row, "stop", text[:at])
                return token
        if full:
            self._finish(row, "length")
        elif job.words:
            self._send(row, text[: len(text) - _held_back(text, job.stops)])
        return token

    def _order(self, row: _Row, holding: Holding) -> None:
        """Carry out what an anchor orders whose gate has just opened."""
        for order in holding.orders([row.hold.number]).values():
            row.ids, row.scores, row.begins = [], [], []
            row.seen = row.told = 0
            if order.ends:
                row.ids = list(order.ids)
                self._finish(row, "stop", own=False)
                return
            row.forced = list(order.ids)
            row.begun_anew += 1
            row.sent = 0
            self._tell(row, Event(row.index, "anew", gate=_gate(row)))

    def _begin(self, row: _Row) -> None:
        row.begun = True
        seconds = time.monotonic() - row.came
        self._observer.began(row.job.prompt.ids.shape[1], seconds)
        verdict, gate = self._verdict(row), _gate(row)
        scores = row.read or ()
        self._tell(row, Event(row.index, "begun", verdict=verdict, gate=gate, scores=scores))
        if verdict is not None and verdict.flagged and self.settings.on_flag == "refuse":
            self._finish(row, "content_filter", self.settings.refusal, own=False)

    def _text(self, row: _Row, *, whole: bool) -> str:
        """What is to be seen of a reply so far; all of it once it is whole."""
        template = self.model.template
        assert template is not None
        with self.tokenizing:
            if row.job.raw:
                return self.spelling.behind(row.job.prompt.ids[0].tolist(), row.ids)
            text = template.tokenizer.decode(row.ids, skip_special_tokens=True)
        lead = text.lstrip()
        thinks = self._thinking or lead.startswith("<think>")
        if "</think>" in text and thinks:
            return text.partition("</think>")[2].lstrip()
        if not whole and (thinks or "<think>".startswith(lead)):
            return ""
        return text

    def _send(self, row: _Row, text: str) -> None:
        # The first byte of a character is not yet the character.
        text = text.rstrip("\ufffd")
        if len(text) > row.sent:
            delta, row.sent = text[row.sent :], len(text)
            upto = bisect_left(row.begins, row.sent)
            scores, row.told = tuple(row.scores[row.told : upto]), max(row.told, upto)
            self._tell(row, Event(row.index, "text", text=delta, gate=_gate(row), scores=scores))

    def _finish(
        self, row: _Row, finish: Finish, text: str | None = None, *, own: bool = True
    ) -> None:
        """End a reply, whose words are the model's `own` or not."""
        if text is None:
            text = self._text(row, whole=True)
        elif own:  # Cut in front of a stop string.
            del row.scores[bisect_left(row.begins, len(text)) :]
        if row.job.words and (len(text) > row.sent or len(row.scores) > row.told):
            delta, scores = text[row.sent :], tuple(row.scores[row.told :])
            self._tell(row, Event(row.index, "text", text=delta, gate=_gate(row), scores=scores))
        verdict, gate = self._verdict(row), _gate(row)
        reply = Reply(
            text,
            tuple(row.ids),
            finish,
            row.job.prompt.ids.shape[1],
            verdict,
            gate,
            tuple(counts.total() for counts in row.hold.counts),
            tuple(row.scores) if own and row.job.scores is not None else None,
            row.read,
        )
        row.over = True
        self._ends.append(time.monotonic())
        self._observer.ended(
            len(row.ids),
            flagged=None if verdict is None else verdict.flagged,
            opened=None if gate.gate == "none" else gate.gate == "open",
        )
        self._last.append((row, Event(row.index, "done", verdict=verdict, gate=gate, reply=reply)))

    def _fail(self, row: _Row, error: RequestError) -> None:
        if not row.over:
            row.over = True
            self._last.append((row, Event(row.index, "failed", error=error)))

    def _tell(self, row: _Row, event: Event) -> None:
        if row.cancelled:
            return
        try:
            row.listener(event)
        except Exception:  # Whoever listened is gone.
            row.cancelled = True

    def _verdict(self, row: _Row) -> Verdict | None:
        scored: Scored | None = row.hold.scored
        if scored is None or self.guard is None:
            return None
        reads = {name: float(values[0]) for name, values in scored.reads.items()}
        return Verdict(
            float(scored.scores[0]),
            self.guard.threshold.value,
            bool(scored.flagged[0]),
            str(scored.by[0]),
            {name: value if math.isfinite(value) else None for name, value in reads.items()},
        )


def _gate(row: _Row) -> GateState:
    return GateState.of(row.hold.holding, row.begun_anew)


def _broken(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, DemurError):
        return broken(error.fact, error.hint, code=type(error).__name__)
    return broken(
        f"the reply could not be written ({type(error).__name__})",
        "try again; if it happens again, report it with the request",
        code="internal_error",
    )


def _drawn(job: Job, logits: Tensor, step: int) -> int:
    """As `Model.generate` draws for a prompt with the number of the choice."""
    if job.top_p < 1:
        ordered, order = logits.double().div(job.temperature).softmax(1).sort(1, descending=True)
        # The likeliest token always stays.
        out = ordered.cumsum(1) - ordered >= job.top_p
        out[:, 0] = False
        logits = logits.masked_fill(out.scatter(1, order, out), -torch.inf)
    return int(Sampling(job.temperature, job.seed)(logits, [job.choice], [step]))


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Characters at the end that may be the beginning of a stop string."""
    most = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), most, -1):
            if text.endswith(stop[:size]):
                most = size
                break
    return most


def _laid_out(rows: Sequence[_Row], model: Model) -> TokenBatch:
    """Prompts, and what is written behind them so far, padded on the left to a common width."""
    pad_id = model.pad_id
    # Under an anchor the template's end is read apart.
    template = model.template if rows[0].job.anchor is not None else None
    behind = template.n_post if template is not None else 0
    parts = []
    for row in rows:
        prompt = row.job.prompt
        parts.append(prompt.with_replies([row.ids], pad_id=pad_id) if row.ids else prompt)
    longest = max(part.ids.shape[1] for part in parts)
    width = roomy(model, longest - behind) + behind
    pad = torch.nn.functional.pad
    names = {name for part in parts for name in part.spans}
    none = [torch.zeros_like(part.mask) for part in parts]

    def joined(tensors: Sequence[Tensor], value: int = 0) -> Tensor:
        return torch.cat([pad(one, (width - one.shape[1], 0), value=value) for one in tensors])

    spans = {
        name: joined([part.spans.get(name, zero) for part, zero in zip(parts, none, strict=True)])
        for name in names
    }
    return TokenBatch(
        joined([part.ids for part in parts], pad_id),
        joined([part.mask for part in parts]),
        spans,
        origin=torch.tensor([row.hold.number for row in rows]),
    )


def _columns(batch: TokenBatch, which: slice) -> TokenBatch:
    return replace(
        batch,
        ids=batch.ids[:, which],
        mask=batch.mask[:, which],
        spans={name: span[:, which] for name, span in batch.spans.items()},
    )


def _chunk(batch: TokenBatch) -> Chunk:
    ends = torch.full((len(batch),), batch.ids.shape[1])
    return Chunk(batch.spans, ends, batch.numbers, is_prefix=False)

"""The anchor: refusal that cannot be switched off while the runtime is trusted.

A gate reads the request before the first token of the reply is written, and the reply while it is
being written. Once it opens it stays open, and the coordinate of refusal is held above a floor at a
band of layers, from the first post-instruction token on: it is only ever lifted, never by more than
complying replies lie below refusing ones, and a model that refuses by itself is left alone. While
the gate is closed, nothing is computed otherwise: the reply is the model's own, bit for bit.

References:
    Zhao, Huang, Wu, Bau, Shi 2025, arXiv:2507.11878 (the coordinates that are read).
    Lu et al. 2026, arXiv:2601.10387 (one-sided clamps: activation capping).
    Vovk, Gammerman, Shafer 2005 (split conformal prediction: the gate's threshold).
    2510.18081 (reading what the model would say in a fresh turn, any-depth alignment).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from demur.errors import ConfigError, NonFiniteError, SilentEditError, StoreError
from demur.guard import (
    UNPACKING,
    Fisher,
    Guard,
    Look,
    Rarity,
    ReadName,
    Scored,
    Threshold,
    columns,
    count_of,
    number_of,
    pack_guard,
    pack_read,
    threshold_of,
    unpack_guard,
    unpack_read,
)
from demur.guard import (
    check_format as check_guard_format,
)
from demur.models import Model, Order, TokenBatch
from demur.models.fingerprint import borrowed, check_made_on
from demur.progress import Progress
from demur.sites import Site, Span
from demur.store import known_format, read_files, write_files

_NAME, _VERSION = "demur-anchor", 1
_FORMAT = f"{_NAME}-{_VERSION}"
_AGAIN = "`demur anchor fit` writes both files; keep them together"
_FLOOR = ("axis", "push", "accepted", "refused", "low")  # Tensors of a floor.
_UPTO = (8, 32)  # Tokens of a reply in each place behind the template's own, but for the last.
_CALM = 8  # Tokens with nothing to lift after which a row is left alone.
N_REPLY_PLACES = len(_UPTO) + 1
CANNED = "I'm sorry, but I can't help with that."

ReplyReadName = Literal["reply", "header"]


def reply_place(token: Int[Tensor, "*row"]) -> Int[Tensor, "*row"]:
    """The place of a reply's tokens, counted from 1: 0 for the first 8, 1 up to 32, then 2."""
    return sum((token > upto).long() for upto in _UPTO) + torch.zeros_like(token)


def places_of(
    post: Bool[Tensor, "row token"], reply: Bool[Tensor, "row token"]
) -> Int[Tensor, "row token"]:
    """Where tokens behind instructions stand: the template's own from 0, then `reply_place`.

    Args:
        post: Which tokens are the template's; in every row as many.
        reply: Which are the reply's.
    """
    token = reply.long().cumsum(1)
    n_post = post.sum(1, keepdim=True)
    return torch.where(post, post.long().cumsum(1) - 1, n_post + reply_place(token))


# What is done -----------------------------------------------------------------------------------


@runtime_checkable
class Actuator(Protocol):
    """Changes the stream at one site, in rows whose gate is open."""

    @property
    def site(self) -> Site:
        """Where it acts."""
        ...

    def __call__(
        self,
        x: Float[Tensor, "row token d_model"],
        places: Int[Tensor, "row token"],
        strength: float,
    ) -> Float[Tensor, "row token d_model"]:
        """A new tensor of the same shape, dtype and device.

        Args:
            x: The stream.
            places: Where each token stands: the template's post-instruction tokens from 0, then the
                places of the reply, see `reply_place`.
            strength: How much.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Floor:
    """A floor under the refusal coordinate: what lies below is lifted to it, the rest is left.

    Attributes:
        site: Where it acts.
        axis: Unit vector towards refusal, (d_model,); the coordinate is the product with it.
        push: The way along which rows move, (d_model,); its product with `axis` is 1.
        accepted: Mean coordinate by place where the model complied, (place,).
        refused: The same where it refused.
        low: The lowest coordinate by place that is expected where it complies: nothing is lifted by
            more than from there.
    """

    site: Site
    axis: Float[Tensor, " d_model"]
    push: Float[Tensor, " d_model"]
    accepted: Float[Tensor, " place"]
    refused: Float[Tensor, " place"]
    low: Float[Tensor, " place"]

    def level(self, strength: float) -> Float[Tensor, " place"]:
        """The floor by place: at 0 where complying replies are, at 1 where refusing ones are."""
        return self.accepted + strength * (self.refused - self.accepted).clamp(min=0)

    def deficit(
        self,
        x: Float[Tensor, "row token d_model"],
        places: Int[Tensor, "row token"],
        strength: float,
    ) -> Float[Tensor, "row token"]:
        """How far each token is lifted; never negative, never more than `level - low`."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        level = self.level(strength)
        most = (level - self.low).clamp(min=0).to(wide)
        gap = level.to(wide)[places] - wide @ self.axis.to(wide)
        return gap.clamp(min=0).minimum(most[places])

    def __call__(
        self,
        x: Float[Tensor, "row token d_model"],
        places: Int[Tensor, "row token"],
        strength: float,
    ) -> Float[Tensor, "row token d_model"]:
        """Lift what lies below."""
        deficit = self.deficit(x, places, strength)
        return (x + deficit.unsqueeze(-1) * self.push.to(deficit)).to(x.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Push:
    """Adds a vector at every token: what steering does, for comparison."""

    site: Site
    vector: Float[Tensor, " d_model"]

    def __call__(
        self,
        x: Float[Tensor, "row token d_model"],
        places: Int[Tensor, "row token"],
        strength: float,
    ) -> Float[Tensor, "row token d_model"]:
        """Add `strength * vector`."""
        del places
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide + strength * self.vector.to(wide)).to(x.dtype)


def null_projected(
    axis: Float[Tensor, " d_model"], benign: Float[Tensor, "n d_model"], k: int
) -> Float[Tensor, " d_model"]:
    """A push that leaves the top `k` principal directions of benign activations alone.

    Where less than half of the axis is left outside of them, the axis itself: dividing by the rest
    would push harder than it holds back.
    """
    centred = benign.double() - benign.double().mean(0)
    _, _, rows = torch.linalg.svd(centred, full_matrices=False)
    top = rows[:k]
    kept = axis.double() - (top @ axis.double()) @ top
    along = float(kept @ axis.double())
    return (kept / along if along >= 0.5 else axis.double()).to(axis)


# The gate ---------------------------------------------------------------------------------------


@runtime_checkable
class Detector(Protocol):
    """Scores requests from the stream at a site; a `Guard` is one."""

    @property
    def site(self) -> Site:
        """What is read."""
        ...

    @property
    def look(self) -> Look:
        """Its reads of a chunk of the stream."""
        ...

    def judge(self, raw: Mapping[ReadName, Float[np.ndarray, " prompt"]]) -> Scored:
        """Scores from the reads; higher is more harmful."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ReplyRead:
    """A read of the reply.

    Attributes:
        name: `reply`, the mean over the last tokens of the reply; `header`, the last token of a
            fresh turn that is looked at and forgotten.
        fisher: The read itself.
        rarity: Of its highest score in a reply, among benign requests that it was not fitted on.
        admitted: Whether the gate decides by it.
    """

    name: ReplyReadName
    fisher: Fisher
    rarity: Rarity
    admitted: bool


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """Decides, at every token of a request's life, whether refusal is to be held.

    Attributes:
        detector: Reads the request.
        replies: Reads of the reply, at the same site; those not admitted are for comparison.
        threshold: Of the highest score in a request's whole life. It was calibrated on the unedited
            model, which is what runs until the gate opens: the share of benign requests on which it
            ever opens is at most alpha.
        strata: What each kind of benign requests alone would have asked for.
        window: Tokens of the reply that count.
        least: The reply is not judged by fewer.
        every: Tokens between two reads of a fresh turn.
    """

    detector: Detector
    threshold: Threshold
    replies: tuple[ReplyRead, ...] = ()
    strata: Mapping[str, Threshold] = field(default_factory=dict)
    window: int = 32
    least: int = 8
    every: int = 64

    @property
    def reads(self) -> list[str]:
        """Names of the reads that it decides by; none of a detector that is no guard."""
        guard = self.detector
        own = [read.name for read in guard.admitted] if isinstance(guard, Guard) else []
        return [*own, *(read.name for read in self.replies if read.admitted)]

    def admitted(self, name: ReplyReadName) -> ReplyRead | None:
        """The read of that name, if the gate decides by it."""
        return next((one for one in self.replies if one.name == name and one.admitted), None)


# The anchor -------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Trace:
    """What the gate made of one request.

    Attributes:
        score: The highest so far, nats; None before the request was read.
        by: Which read it came from.
        opened: How many tokens of the reply there were when the gate opened, 0 for none yet; None
            while it is closed.
        tokens: Of the reply, as far as it was read.
        reads: Each reply read's own highest score, admitted or not, in standard deviations.
        calm: Tokens in a row with nothing to lift.
    """

    score: float | None = None
    by: str = ""
    opened: int | None = None
    tokens: int = 0
    reads: dict[str, float] = field(default_factory=dict)
    calm: int = 0
    header: int = 0  # Tokens of a fresh turn that are still to be read.
    ordered: bool = False
    values: deque[float] = field(default_factory=deque)


@dataclass(frozen=True, slots=True, eq=False)
class Anchor:
    """Holds refusal: a gate, and what is done once it is open.

    Attributes:
        gate: Decides; None is always open, for comparison.
        actuators: What is done to the stream, one a site.
        strength: Of the actuators: 1 lifts to the mean of refusing replies, 1.5 by half beyond.
        action: "floor" has the model reply under the actuators; "canned" ends the reply with a
            given text.
        fresh_turn: Whether a reply that had begun when the gate opened is dropped and begun anew in
            a fresh turn; a floor alone does not undo what is written already.
        canned: The given text.
        about: Model, template, what it was fitted on: the card.
    """

    gate: Gate | None
    actuators: tuple[Actuator, ...] = ()
    strength: float = 1.0
    action: Literal["floor", "canned"] = "floor"
    fresh_turn: bool = True
    canned: str = CANNED
    about: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def holding(self, model: Model) -> Iterator[Holding]:
        """Inside, the model replies under the anchor; `demur.applied(model, anchor)` does the same.

        Edits in force before are seen by it, and those set later are not.

            with anchor.holding(model) as held:
                replies = model.generate(prompts, max_new_tokens=48)
            opened = [trace.opened is not None for trace in held.traces]

        Raises:
            ConfigError: Another anchor holds the model already, or the model is called directly, so
                that nobody knows which tokens the rows stand for.
            SilentEditError: A reply was written to a request that the gate has not read.
            NonFiniteError: Activations hold NaN or infinity.
        """
        if model.director is not None:
            raise ConfigError(
                f"{model.name} is held by an anchor already", "leave its block before the next one"
            )
        held = Holding(self, model)
        with ExitStack() as undo:
            undo.enter_context(model.in_two())
            undo.callback(model.intercept(Site(0, "resid_pre"), held.begin))
            if self.gate is not None:
                undo.callback(model.intercept(self.gate.detector.site, held.read))
            for number, actuator in enumerate(self.actuators):
                act = partial(held.act, actuator=actuator, first=number == 0)
                undo.callback(model.intercept(actuator.site, act))
            model.director = held
            try:
                yield held
            finally:
                model.director = None

    def borrowed(self, model: Model) -> tuple[str, ...]:
        """What a record says of an anchor of another model; nothing of one of its own."""
        return borrowed("the anchor", self._made_on, model) if self._made_on else ()

    @property
    def _made_on(self) -> Mapping[str, Any]:
        """Of its guard; an anchor for comparison has none and says nothing."""
        detector = self.gate.detector if self.gate is not None else None
        return detector.about if isinstance(detector, Guard) else {}

    def belongs_to(self, model: Model, *, any_model: bool = False) -> None:
        """Check that this is the model, template and precision that the anchor was fitted on.

        Args:
            model: As it is loaded.
            any_model: Check no more than the width, the layers, and that the template ends a prompt
                with as many tokens: floors are by place behind the prompt.

        Raises:
            StoreError: It is another one.
        """
        detector = self.gate.detector if self.gate is not None else None
        if not isinstance(detector, Guard):
            return
        if not any_model:
            check_made_on(
                "the anchor", detector.about, model, again="demur anchor fit", verb="fitted"
            )
        detector.belongs_to(model, any_model=True)
        floors = [one for one in self.actuators if isinstance(one, Floor)]
        last = max((one.site.layer for one in floors), default=0)
        if last >= model.n_layers or any(len(one.axis) != model.d_model for one in floors):
            raise StoreError(
                f"the anchor acts up to block {last}; {model.name} has {model.n_layers} blocks of "
                f"width {model.d_model}",
                "fit an anchor for this model: `demur anchor fit`",
            )
        places = {len(one.accepted) for one in floors}
        own = model.template.n_post + N_REPLY_PLACES if model.template is not None else None
        if own is not None and places - {own}:
            raise StoreError(
                f"the anchor was fitted for prompts that end with {min(places) - N_REPLY_PLACES} "
                f"tokens of the template, and those of {model.name} end with "
                f"{own - N_REPLY_PLACES}",
                "fit an anchor for this template: `demur anchor fit`",
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """What a pass does behind the instructions: places of its tokens, and which are acted on."""

    places: Int[Tensor, "row token"]
    acting: Bool[Tensor, "row token"]
    traces: list[Trace]


class Holding:
    """An anchor at work on a model.

    Attributes:
        anchor: The anchor.
    """

    def __init__(self, anchor: Anchor, model: Model) -> None:
        if model.template is None:
            raise ConfigError(
                f"{model.name} was made without a tokenizer", "load it with `demur.load`"
            )
        self.anchor, self.model = anchor, model
        self._traces: dict[int, Trace] = {}
        self._call = model.calls
        self._plan: _Plan | None = None
        self._n_post = model.template.n_post
        self._header = model.template.post_ids
        self._canned = tuple(model.template.reply_ids(anchor.canned))
        gate = anchor.gate
        wanted = gate is not None and gate.admitted("header") is not None
        self.header_every = gate.every if gate is not None and wanted else None

    @property
    def traces(self) -> list[Trace]:
        """What the gate made of the requests of the last call, in their order."""
        return [self._traces[number] for number in sorted(self._traces)]

    def prefilled(self, batch: TokenBatch, progress: Progress | None = None) -> list[Trace]:
        """What the gate makes of rows as they stand, without a reply of the model's."""
        found: dict[int, Trace] = {}
        for index in batch.passes(tokens=self.model.tokens_per_pass):
            self.model.calls += 1  # The traces are those of this pass.
            self.model.logits(batch.rows(index))
            found |= dict(zip(sorted(index), self.traces, strict=True))
            if progress is not None:
                progress(len(index))
        return [found[number] for number in range(len(batch))]

    # A pass, from the first block up --------------------------------------------------------------

    def begin(self, x: Tensor) -> Tensor:
        """See what the pass is about; changes nothing."""
        chunk = self.model.chunk
        if chunk is None:
            raise ConfigError(
                "an anchor needs to know which tokens a pass is about",
                "run the model through `logits` or `generate`",
            )
        self._plan = None
        if chunk.is_prefix or chunk.is_peek or chunk.rows is None:
            return x
        if self.model.calls != self._call:
            self._call = self.model.calls
            self._traces.clear()
        numbers = chunk.rows.tolist()
        instruction = chunk.spans.get(Span.INSTRUCTION)
        if instruction is not None and bool(instruction.any()):
            opened = 0 if self.anchor.gate is None else None
            self._traces |= {number: Trace(opened=opened) for number in numbers}
            return x
        if Span.RESPONSE not in chunk.spans and Span.POST_INSTRUCTION not in chunk.spans:
            if self.anchor.gate is None:  # Text that is no chat: as far on in a reply.
                places = torch.full(x.shape[:2], self._n_post + N_REPLY_PLACES - 1, device=x.device)
                traces = [Trace(opened=0) for _ in numbers]
                self._plan = _Plan(places, torch.ones_like(places, dtype=torch.bool), traces)
            return x
        traces = [self._known(number) for number in numbers]
        post, reply = (
            chunk.spans.get(name, torch.zeros(x.shape[:2], dtype=torch.bool))
            for name in (Span.POST_INSTRUCTION, Span.RESPONSE)
        )
        if x.shape[1] == 1 and not bool(post.any()):
            places = torch.tensor([[self._step(trace)] for trace in traces])
        else:
            places = places_of(post, reply)
            for trace, count in zip(traces, reply.sum(1).tolist(), strict=True):
                trace.tokens = count
        open_ = torch.tensor([t.opened is not None and t.calm < _CALM for t in traces])
        acting = (post | reply) & open_.unsqueeze(1)
        self._plan = _Plan(places.to(x.device), acting.to(x.device), traces)
        return x

    def _known(self, number: int) -> Trace:
        trace = self._traces.get(number)
        if trace is None or (self.anchor.gate is not None and trace.score is None):
            raise SilentEditError(
                f"a reply is being written to prompt {number + 1}, which the gate has not read",
                "have the prompt laid out by `model.encode`, which marks the instruction",
            )
        return trace

    def _step(self, trace: Trace) -> int:
        """The place of the one token that a row goes on with."""
        if trace.header:
            place = self._n_post - trace.header
            trace.header -= 1
            return place
        trace.tokens += 1
        return self._n_post + sum(trace.tokens > upto for upto in _UPTO)

    def read(self, x: Tensor) -> Tensor:
        """Have the gate look at the pass; changes nothing."""
        chunk, gate = self.model.chunk, self.anchor.gate
        assert gate is not None
        if chunk is None or chunk.is_prefix or chunk.rows is None:
            return x
        numbers = chunk.rows.tolist()
        if chunk.is_peek:
            self._peeked(x, numbers, gate)
        elif self._plan is not None:
            self._replied(x, chunk.spans.get(Span.RESPONSE), self._plan.traces, gate)
        elif Span.INSTRUCTION in chunk.spans and bool(chunk.spans[Span.INSTRUCTION].any()):
            spans = {name: span.to(x.device) for name, span in chunk.spans.items()}
            found = gate.detector.look(x.detach(), spans, chunk.ends.to(x.device))
            kept = {name: value.cpu() for name, value in found.items()}
            rows = [{name: kept[name][i] for name in kept} for i in range(len(numbers))]
            scored = gate.detector.judge(columns(rows, list(kept)))  # pyright: ignore[reportArgumentType]
            for i, number in enumerate(numbers):
                self._scored(self._traces[number], float(scored.scores[i]), scored.by[i], gate)
        return x

    def _scored(self, trace: Trace, score: float, by: str, gate: Gate) -> None:
        if np.isnan(score) or score == np.inf:
            raise NonFiniteError(
                "activations that the gate reads hold NaN or infinity",
                "try `--dtype float32`; the checkpoint may also be damaged",
            )
        if trace.score is None or score > trace.score:
            trace.score, trace.by = score, by
        if trace.opened is None and score > gate.threshold.value:
            trace.opened = trace.tokens

    def _replied(
        self, x: Tensor, reply: Tensor | None, traces: Sequence[Trace], gate: Gate
    ) -> None:
        read = next((one for one in gate.replies if one.name == "reply"), None)
        if read is None or reply is None:
            return
        # The mean of a window's projections is the projection of its mean.
        values = read.fisher(x.detach().cpu())
        for i, trace in enumerate(traces):
            if trace.header:
                trace.values.clear()
                continue
            for value in values[i][reply[i]].tolist():
                trace.values.append(value)
                if len(trace.values) > gate.window:
                    trace.values.popleft()
                if len(trace.values) >= gate.least:
                    self._seen(trace, read, sum(trace.values) / len(trace.values), gate)

    def _peeked(self, x: Tensor, numbers: Sequence[int], gate: Gate) -> None:
        read = next((one for one in gate.replies if one.name == "header"), None)
        if read is None:
            return
        for number, value in zip(
            numbers, read.fisher(x[:, -1].detach().cpu()).tolist(), strict=True
        ):
            self._seen(self._traces[number], read, value, gate)

    def _seen(self, trace: Trace, read: ReplyRead, value: float, gate: Gate) -> None:
        trace.reads[read.name] = max(value, trace.reads.get(read.name, -np.inf))
        if read.admitted:
            self._scored(trace, float(read.rarity(np.array([value]))[0]), read.name, gate)

    def act(self, x: Tensor, *, actuator: Actuator, first: bool) -> Tensor:
        """What is done at one site."""
        plan = self._plan
        if plan is None:
            return x
        if all(trace.opened is None for trace in plan.traces):
            return x
        if first and isinstance(actuator, Floor) and x.shape[1] == 1:
            # Not at the strength asked for, which a model that refuses by itself need not reach.
            below = actuator.deficit(x, plan.places, min(1.0, self.anchor.strength)).flatten()
            for trace, gap in zip(plan.traces, below.tolist(), strict=True):
                if trace.opened is not None:
                    trace.calm = trace.calm + 1 if gap == 0 else 0
        if not bool(plan.acting.any()) or self.anchor.action == "canned":
            return x
        changed = actuator(x, plan.places, self.anchor.strength)
        return torch.where(plan.acting.unsqueeze(-1), changed, x)

    # Between two tokens ---------------------------------------------------------------------------

    def orders(self, numbers: Sequence[int]) -> Mapping[int, Order]:
        """A canned reply, or a fresh turn, for rows whose gate has just opened."""
        found: dict[int, Order] = {}
        for number in numbers:
            trace = self._traces[number]
            if trace.opened is None or trace.ordered:
                continue
            trace.ordered = True
            if self.anchor.action == "canned":
                found[number] = Order(self._canned, ends=True)
            elif self.anchor.fresh_turn and trace.tokens:
                found[number] = Order(self._header)
                trace.header, trace.tokens, trace.calm = self._n_post, 0, 0
        return found


# The file ---------------------------------------------------------------------------------------


def save_anchor(anchor: Anchor, path: Path) -> None:
    """Write `path` (safetensors) and beside it its card, `<path stem>.json`.

    Raises:
        ConfigError: `path` does not end in `.safetensors`, or the anchor is one for comparison.
        StoreError: A file could not be written.
    """
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path} is no name for an anchor", "let it end in .safetensors")
    gate = anchor.gate
    floors = [one for one in anchor.actuators if isinstance(one, Floor)]
    if gate is None or not isinstance(gate.detector, Guard) or len(floors) < len(anchor.actuators):
        raise ConfigError(
            "only an anchor with a guard and floors can be saved", "fit one: `demur anchor fit`"
        )
    tensors, guard = pack_guard(gate.detector)
    for floor in floors:
        for name in _FLOOR:
            tensors[f"{floor.site}.{name}"] = getattr(floor, name).double().clone()
    replies = [pack_read(read, tensors) for read in gate.replies]
    meta = {
        "format": _FORMAT,
        "guard": guard,
        "gate": {
            "threshold": asdict(gate.threshold),
            "strata": {name: asdict(one) for name, one in gate.strata.items()},
            "window": gate.window,
            "least": gate.least,
            "every": gate.every,
            "replies": replies,
        },
        "sites": [str(floor.site) for floor in floors],
        "strength": anchor.strength,
        "action": anchor.action,
        "fresh_turn": anchor.fresh_turn,
        "canned": anchor.canned,
        "about": dict(anchor.about),
    }
    write_files(path, tensors, meta, head={"format": _FORMAT})


def load_anchor(path: Path, model: Model | None = None, *, any_model: bool = False) -> Anchor:
    """Read an anchor and its card back.

    Args:
        path: The `.safetensors` file.
        model: If given, the anchor must have been fitted on this very model.
        any_model: Only shapes and the length of the template's end must be those of the model;
            `Anchor.borrowed` says what differs.

    Raises:
        StoreError: A file is missing or damaged, was changed after it was written, is of another
            version, or the anchor belongs to another model.
    """
    tensors, meta = read_files(path, what="anchor", again=_AGAIN)
    known_format(
        meta.get("format"), path, name=_NAME, what="an anchor", newest=_VERSION,
        again="demur anchor fit",
    )  # fmt: skip
    try:
        check_guard_format(meta["guard"].get("format"), path)
        anchor = _unpacked(tensors, meta)
    except StoreError:
        raise
    except UNPACKING as error:
        raise StoreError(
            f"no anchor can be read from {path} and {path.stem}.json: {error}", _AGAIN
        ) from error
    if model is not None:
        anchor.belongs_to(model, any_model=any_model)
    return anchor


def _unpacked(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Anchor:
    own = meta["gate"]
    replies = tuple(ReplyRead(*unpack_read(tensors, one)) for one in own["replies"])
    guard = unpack_guard(tensors, meta["guard"])
    gate = Gate(
        guard,
        threshold_of(own["threshold"]),
        replies,
        {name: threshold_of(one) for name, one in own["strata"].items()},
        count_of(own, "window"),
        count_of(own, "least"),
        count_of(own, "every"),
    )
    floors = tuple(
        Floor(Site.parse(site), *(_finite(tensors, f"{site}.{name}") for name in _FLOOR))
        for site in meta["sites"]
    )
    if not floors:
        raise ValueError("it holds no usable floor")
    places = {getattr(floor, name).shape for floor in floors for name in _FLOOR[2:]}
    if len(places) > 1 or len(next(iter(places))) != 1:
        raise ValueError("its floors have several numbers of places")
    widths = {len(floor.axis) for floor in floors} | {len(floor.push) for floor in floors}
    widths |= {len(one.fisher.weight) for one in (*guard.reads, *replies)}
    if len(widths) > 1:
        raise ValueError(f"its guard, reads and floors are of the widths {sorted(widths)}")
    if meta["action"] not in ("floor", "canned") or not isinstance(meta["canned"], str):
        raise ValueError(f"its action is {meta['action']!r:.40}")
    for key in ("fresh_turn", "about"):
        if not isinstance(meta[key], bool if key == "fresh_turn" else dict):
            raise TypeError(f"`{key}` is {meta[key]!r:.40}")
    told = meta["about"].get("fingerprint")
    if told is not None and told != guard.about.get("fingerprint"):
        raise ValueError("its guard was fitted on another model than its floors")
    if (strength := number_of(meta, "strength")) < 0:
        raise ValueError(f"its strength is {strength}")
    return Anchor(
        gate,
        floors,
        strength,
        meta["action"],
        meta["fresh_turn"],
        meta["canned"],
        meta["about"],
    )


def _finite(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    found = tensors[name]
    if not found.is_floating_point() or not bool(torch.isfinite(found).all()):
        raise ValueError(f"the tensor {name} is not finite")
    return found

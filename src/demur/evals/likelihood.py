"""How likely given continuations are, under whatever is applied to the model.

Rows that differ in their last token alone are run once, rows of like length share a pass, and what
all rows of a pass begin with is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from demur.errors import ConfigError, NonFiniteError, SilentEditError, TemplateError
from demur.interventions import Holder, Intervention, applied
from demur.models import Conversation, Model, SystemTemplate, Template, TokenBatch
from demur.progress import Progress

_LOGITS = 256  # Places whose logits are held at a time: each is as long as the vocabulary.


@dataclass(frozen=True, slots=True)
class Continuation:
    """Tokens that are scored, and what stands before them.

    Attributes:
        before: Token ids of a text that is no chat; or of a chat, with which the reply begins.
        tokens: Token ids that are scored.
        chat: What the reply answers; None for a text that is no chat.
        system: Its system message; None for the template's own.
    """

    before: tuple[int, ...]
    tokens: tuple[int, ...]
    chat: Conversation | None = None
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely a continuation is.

    Attributes:
        value: Natural logarithm of its probability.
        greedy: Whether it is what greedy decoding writes.
        opened: Whether an anchor's gate was open when its last token was scored; None without one.
    """

    value: float
    greedy: bool
    opened: bool | None


@dataclass(slots=True, eq=False)
class Applied:
    """What is applied to a model while it is evaluated; see `applying`.

    Attributes:
        model: The model.
        held: What an anchor yielded; None without one.
        gated: Whether that anchor has a gate.
    """

    model: Model
    held: Any = None
    gated: bool = False
    _templates: dict[str | None, Template] = field(default_factory=dict)

    def template(self, system: str | None = None) -> Template:
        """The model's own template, or the same with another system message."""
        own = self.model.template
        if own is None:
            raise TemplateError(
                f"{self.model.name} was made without a tokenizer", "load it with `demur.load`"
            )
        if not self._templates:
            self._templates[None] = own
        if system not in self._templates:
            assert system is not None
            self._templates[system] = SystemTemplate(own, system)
        return self._templates[system]

    def rows(
        self,
        chats: Sequence[Conversation],
        replies: Sequence[Sequence[int]],
        system: str | None = None,
    ) -> TokenBatch:
        """Chats with the beginnings of their replies.

        Raises:
            TemplateError: One does not fit into the context, or see `Template.encode`.
        """
        template, pad = self.template(system), self.model.pad_id
        batch = template.encode(chats, pad_id=pad)
        if any(map(len, replies)):
            batch = batch.with_replies(replies, pad_id=pad)
        longest = int(batch.ends.max())
        if template.max_length is not None and longest > template.max_length:
            raise TemplateError(
                f"a prompt has {longest} tokens with the beginning of its reply, the model's "
                f"context holds {template.max_length}",
                "give fewer examples in front, or shorten the prompt",
            )
        return batch

    def needs_chat(self) -> None:
        """Refuse a text that is no chat where an anchor holds the model.

        Raises:
            ConfigError: One does: its gate reads a user's turn, and would not see this text.
        """
        if self.held is not None:
            raise ConfigError(
                "an anchor reads the user's turn of a chat, and this text is none",
                "have the chat template applied, or leave out tasks that score plain text",
            )

    def openings(self, n: int) -> list[bool | None]:
        """Whether the gate opened on each of the `n` rows of the last call.

        Raises:
            SilentEditError: An anchor holds the model, yet has not read all of them.
        """
        if self.held is None:
            return [None] * n
        traces = self.held.traces
        unread = [one for one in traces if self.gated and one.score is None]
        if len(traces) != n or unread:
            raise SilentEditError(
                f"the gate has read {len(traces) - len(unread)} of {n} rows",
                "have prompts laid out by the model's template, which marks the instruction",
            )
        return [one.opened is not None for one in traces]


@contextmanager
def applying(
    model: Model,
    acts: Sequence[Intervention | Holder] = (),
    *,
    likelihood: bool = True,
    cut: bool = False,
) -> Iterator[Applied]:
    """Put edits and an anchor in force once, for a whole evaluation.

    Args:
        model: The model.
        acts: In the order in which they act.
        likelihood: Whether given continuations will be scored.
        cut: Run what stands behind the instruction as a pass of its own, as any anchor has it. A
            run that one behind an anchor is compared with needs it: rounding is no change.

    Raises:
        SilentEditError: The model ran inside, yet some site was never reached.
        ConfigError: Continuations are to be scored under an anchor that replies by a given text;
            or there are several anchors.
    """
    inside = Applied(model)
    with ExitStack() as undo:
        if cut:
            undo.enter_context(model.in_two())
        for act in acts:
            if not isinstance(act, Holder):
                undo.enter_context(applied(model, act))
                continue
            if likelihood and getattr(act, "action", None) == "canned":
                raise ConfigError(
                    "an anchor that answers with a given text leaves no likelihoods of others",
                    "take tasks that have the model write, or an anchor with a floor",
                )
            inside.held = undo.enter_context(act.holding(model))
            inside.gated = getattr(act, "gate", None) is not None
        yield inside


def likelihoods(
    inside: Applied, asked: Sequence[Continuation], *, progress: Progress | None = None
) -> list[Likelihood]:
    """Score continuations, in the order given.

    Args:
        inside: What `applying` yielded.
        asked: The continuations.
        progress: Called with the number of continuations done since the last call.

    Raises:
        ConfigError: A continuation is empty, or an anchor holds the model and a text is no chat.
        NonFiniteError: Logits are NaN or infinite.
        TemplateError: A chat does not fit into the context.
    """
    # What is run is everything but the last token: continuations of one token share a row.
    kinds: dict[str | bool | None, dict[tuple[Any, ...], list[int]]] = {}
    for number, one in enumerate(asked):
        if not one.tokens or (one.chat is None and not one.before):
            raise ConfigError(
                f"continuation {number + 1} has nothing to score, or nothing in front of it",
                "leave it out",
            )
        if one.chat is None:
            inside.needs_chat()
        kind = False if one.chat is None else one.system
        row = (one.chat, one.before + one.tokens[:-1])
        kinds.setdefault(kind, {}).setdefault(row, []).append(number)
    out: list[Likelihood | None] = [None] * len(asked)
    for kind, rows in kinds.items():
        keys = list(rows)
        if kind is False:
            batch = _texts(inside.model, [ids for _, ids in keys])
        else:
            assert not isinstance(kind, bool)
            batch = inside.rows([chat for chat, _ in keys], [ids for _, ids in keys], kind)
        for index in batch.passes(tokens=inside.model.tokens_per_pass):
            numbers = [rows[keys[row]] for row in index]
            part = batch.rows(index)
            if kind is False:
                first = [
                    min(len(asked[n].before) for n in own) for own in numbers
                ]  # What is scored must not be in front.
                part = replace(part, shared=min(_shared(part), min(first) - 1))
            for number, found in _scored(inside, part, index, numbers, asked):
                out[number] = found
            if progress is not None:
                progress(sum(map(len, numbers)))
    return [one for one in out if one is not None]


def _texts(model: Model, rows: Sequence[Sequence[int]]) -> TokenBatch:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), model.pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return TokenBatch(ids, mask, {})


def text_rows(model: Model, rows: Sequence[Sequence[int]]) -> TokenBatch:
    """Rows of a text that is no chat, padded on the right, with what all begin with marked."""
    batch = _texts(model, rows)
    return replace(batch, shared=max(0, min(_shared(batch), min(map(len, rows)) - 1)))


def _shared(batch: TokenBatch) -> int:
    same = (batch.ids == batch.ids[0]).all(0) & batch.mask.all(0)
    return int(same.int().cumprod(0).sum())


def _scored(
    inside: Applied,
    part: TokenBatch,
    index: Sequence[int],
    numbers: Sequence[Sequence[int]],
    asked: Sequence[Continuation],
) -> Iterator[tuple[int, Likelihood]]:
    model = inside.model
    model.calls += 1  # An anchor keeps count of the rows of each call.
    states = model.final_states(part)
    opened = dict(zip(sorted(index), inside.openings(len(part)), strict=True))
    ends = (part.ends - (part.ids.shape[1] - states.shape[1])).tolist()
    # The state at a token tells the next one: the last state of a row tells the last token.
    places = [
        (row, ends[row] - len(asked[number].tokens) + k, number, token)
        for row, own in enumerate(numbers)
        for number in own
        for k, token in enumerate(asked[number].tokens)
    ]
    sums: dict[int, float] = {}
    greedy: dict[int, bool] = {}
    for start in range(0, len(places), _LOGITS):
        some = places[start : start + _LOGITS]
        row, at, _, token = (list(column) for column in zip(*some, strict=True))
        logits = model.unembed(states[row, at])
        chosen = torch.tensor(token, device=logits.device)
        values = logits.log_softmax(1).gather(1, chosen.unsqueeze(1)).squeeze(1)
        if not bool(values.isfinite().all()):
            raise NonFiniteError(
                "there are NaN or infinite logits",
                "try `--dtype float32`; the checkpoint may also be damaged",
            )
        same = (logits.argmax(1) == chosen).tolist()
        for (_, _, number, _), value, best in zip(some, values.tolist(), same, strict=True):
            sums[number] = sums.get(number, 0.0) + value
            greedy[number] = greedy.get(number, True) and best
    for row, own in enumerate(numbers):
        for number in own:
            yield number, Likelihood(sums[number], greedy[number], opened[index[row]])


def messages_of(history: Sequence[Mapping[str, Any]]) -> tuple[str | None, list[Any], str]:
    """Messages cut into a system message, the turns, and what the reply begins with.

    Raises:
        TemplateError: A system message does not stand first.
    """
    system: str | None = None
    turns = list(history)
    if turns and turns[0]["role"] == "system":
        system = str(turns.pop(0)["content"]).strip() or None
    begun = ""
    if turns and turns[-1]["role"] == "assistant":
        begun = str(turns.pop()["content"])
    return system, turns, begun

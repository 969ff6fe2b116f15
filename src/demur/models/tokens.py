"""From prompts to token rows with named spans, through the model's own chat template.

Positions are derived, never hard-coded: the template is rendered around dummies that end in a
letter, a digit, punctuation and another script, and what stays the same before, between and after
them is the template's own. A row in which a turn's text merged with the template behind it is an
error.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from demur.errors import TemplateError
from demur.models.fingerprint import tokenizer_hash
from demur.sites import Span

log = logging.getLogger(__name__)

# Unlikely to stand in a system prompt, which would be taken for the user's text.
_DUMMIES = (
    "Name a tree",
    "Add 4 and 17",
    "Is it far?",
    "Stop it, Zoë.",
    "Où est-il né",
    "天气怎么样",
)
# What a template may rewrite: lines, runs of spaces, markup, letters' case, and what is long.
_PROBES = (
    'Compare 3 < 4 & "5 > 2":\n\n\tIt\'s  [so]\n<b>NO</b> `x = {{ y }}`',
    "Name a tree. " * 400 + "Now",
)
# The date of the day would move every fingerprint. Templates take only plain data, no functions,
# so the one that tells the date is put in front of them as a macro.
_DATE = "01 Jan 2025"
_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    " | replace('%d', '01') | replace('%m', '01') | replace('%Y', '2025')"
    " | replace('%b', 'Jan') | replace('%B', 'January') | replace('%A', 'Wednesday')"
    " | replace('%H', '12') | replace('%M', '00') | replace('%S', '00') }}{% endmacro %}\n"
)
# The space behind the colon goes to the text, as most vocabularies have " Name" as one token.
_PLAIN_BEFORE, _PLAIN_AFTER = "User:", "\nAssistant:"


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side of a conversation says at a time.

    Attributes:
        role: Who speaks.
        text: What is said. Of a reply, without the reasoning in front of it: a control token that
            is written in here is laid out as the characters that it is spelled with.
    """

    role: Literal["user", "assistant"]
    text: str


# From the user's first turn to the one that is to be answered, the two taking turns. A system
# message is no part of it: `Template` has its own.
Conversation: TypeAlias = tuple[Turn, ...]


def conversation_of(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """Read messages as chat interfaces write them, each with its `role` and `content`.

    Raises:
        TemplateError: A message is not text from the user or the assistant, or they do not take
            turns.
    """
    for number, message in enumerate(messages, start=1):
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise TemplateError(
                f"message {number} does not have text under both `role` and `content`",
                'write it like {"role": "user", "content": "Name a tree."}',
            )
        # Silently dropped, a call of a tool would leave a reply that nobody gave.
        more = sorted(key for key in message.keys() - {"role", "content"} if message[key])
        if more:
            raise TemplateError(
                f"message {number} also has {', '.join(f'`{key}`' for key in more)}",
                "leave it out: only `role` and `content` are laid out",
            )
    pairs = [(message["role"], message["content"]) for message in messages]
    _check_turns(pairs)
    return tuple(Turn(cast(Literal["user", "assistant"], role), text) for role, text in pairs)


def _check_turns(turns: Sequence[tuple[str, str]]) -> None:
    """See that roles alternate from user to user, in (role, text) pairs."""
    hint = "let user and assistant take turns, and let the user begin and end"
    if not turns:
        raise TemplateError("a conversation has no turns", hint)
    for number, (role, text) in enumerate(turns):
        if role != _role(number):
            raise TemplateError(
                f"turn {number + 1} of a conversation, {text[:60]!r}, has the role {role}, where "
                f"{_role(number)} belongs",
                "leave it out, and give it to every prompt with `--system`"
                if role in ("system", "developer")
                else hint,
            )
    if len(turns) % 2 == 0:
        raise TemplateError(
            f"a conversation ends in the assistant's turn {turns[-1][1][:60]!r}",
            "leave that turn out: positions are read where the reply to a user begins",
        )


def _role(number: int) -> Literal["user", "assistant"]:
    """Whose turn it is, counted from 0."""
    return "assistant" if number % 2 else "user"


def _sentinel(variant: int, number: int) -> str:
    """A text for one turn that no other turn has, with a dummy's first and last character."""
    if variant < len(_DUMMIES):
        dummy = _DUMMIES[(variant + number) % len(_DUMMIES)]
    else:
        dummy = _PROBES[variant - len(_DUMMIES)]
    return f"{dummy} {number} {dummy}"


def _named(texts: Sequence[str], number: int) -> str:
    """The turn at fault, for a message."""
    text = repr(texts[number][:60])
    if len(texts) == 1:
        return f"the prompt {text}"
    return f"turn {number + 1} of a conversation, {text},"


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Token rows of one length, padded on one side.

    Attributes:
        ids: Token ids; padding holds a valid id that `mask` hides.
        mask: True at real tokens.
        spans: Which tokens belong to the user's instruction, which to the user's earlier turns, and
            which to the template after the instruction.
        shared: How many leading tokens are the template's own and the same in every row.
        origin: Of rows cut out of a larger batch, their numbers in it; None for a whole batch.
    """

    ids: Int[Tensor, "prompt token"]
    mask: Bool[Tensor, "prompt token"]
    spans: dict[Span, Bool[Tensor, "prompt token"]]
    shared: int = 0
    origin: Int[Tensor, " prompt"] | None = None

    @classmethod
    def of_ids(cls, ids: Int[Tensor, "prompt token"]) -> TokenBatch:
        """Rows without padding or template, for tests and for text that is no chat."""
        return cls(ids, torch.ones_like(ids, dtype=torch.bool), {})

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def numbers(self) -> Int[Tensor, " prompt"]:
        """Which prompt of the batch first encoded each row stands for."""
        return torch.arange(len(self)) if self.origin is None else self.origin

    @property
    def ends(self) -> Int[Tensor, " prompt"]:
        """Index one past the last real token of each row."""
        width = self.mask.shape[1]
        return width - self.mask.flip(1).int().argmax(1)

    @property
    def padded_left(self) -> bool:
        """Whether some row begins with padding."""
        return not bool(self.mask[:, 0].all())

    def rows(self, index: slice | Sequence[int]) -> TokenBatch:
        """Some of the rows, cut to the width that they need."""
        ids, mask = self.ids[index], self.mask[index]
        used = mask.any(0).nonzero()
        low, high = int(used.min()), int(used.max()) + 1
        spans = {name: span[index][:, low:high] for name, span in self.spans.items()}
        shared = self.shared if low == 0 else 0
        origin = self.numbers[index]
        return TokenBatch(ids[:, low:high], mask[:, low:high], spans, shared, origin)

    def passes(self, *, tokens: int, rows: int | None = None) -> list[list[int]]:
        """Row numbers cut into passes of like length, shortest rows first.

        Args:
            tokens: Most tokens of a pass, padding counted and half of the shared prefix.
            rows: Most rows of a pass.
        """
        own = self.ends - self.shared
        out: list[list[int]] = []
        for row in torch.argsort(own, stable=True).tolist():
            # Rows come in order of length, so the next one sets the width.
            # A row holds the prefix's keys and values too: many short ones would fill the memory.
            each = int(own[row]) + self.shared // 2
            full = not out or (len(out[-1]) + 1) * each > tokens
            if full or len(out[-1]) == rows:
                out.append([])
            out[-1].append(row)
        return out

    def without_post(self) -> TokenBatch:
        """The same rows cut off behind the instruction: no template stands before the reply."""
        post = self.spans[Span.POST_INSTRUCTION]
        mask = self.mask & ~post
        spans = {name: span & mask for name, span in self.spans.items()}
        cut = TokenBatch(self.ids, mask, spans, self.shared, self.origin)
        whole = cut.rows(list(range(len(self))))
        return TokenBatch(whole.ids, whole.mask, whole.spans, whole.shared, self.origin)

    def with_request(self, alone: TokenBatch) -> TokenBatch:
        """Mark as `Span.REQUEST` the part of each instruction that stands in `alone` too.

        Args:
            alone: The same requests, in the same order and with the same template, without what was
                put behind them. Where the last token of a request merges with what follows, it is
                left out of the span.
        """
        mine, theirs = self.spans[Span.INSTRUCTION], alone.spans[Span.INSTRUCTION]
        request = torch.zeros_like(mine)
        width = min(self.ids.shape[1], alone.ids.shape[1])
        same = self.ids[:, :width] == alone.ids[:, :width]
        both = same & mine[:, :width] & theirs[:, :width]
        # Up to the first token that differs.
        broken = (mine[:, :width] & ~both).int().cumsum(1) > 0
        request[:, :width] = both & ~broken
        return TokenBatch(
            self.ids, self.mask, {**self.spans, Span.REQUEST: request}, self.shared, self.origin
        )

    def with_replies(self, replies: Sequence[Sequence[int]], *, pad_id: int) -> TokenBatch:
        """The same rows with the beginning of a reply behind each, as `Span.RESPONSE`.

        Args:
            replies: Token ids, one sequence a row; it may be empty.
            pad_id: Any valid token id.
        """
        ends = self.ends
        lengths = torch.tensor([len(reply) for reply in replies])
        room = int((ends + lengths).max()) - self.ids.shape[1]
        grown = TokenBatch(
            torch.nn.functional.pad(self.ids, (0, max(0, room)), value=pad_id),
            torch.nn.functional.pad(self.mask, (0, max(0, room))),
            {name: torch.nn.functional.pad(s, (0, max(0, room))) for name, s in self.spans.items()},
            self.shared,
            self.origin,
        )
        response = torch.zeros_like(grown.mask)
        for row, (end, reply) in enumerate(zip(ends.tolist(), replies, strict=True)):
            grown.ids[row, end : end + len(reply)] = torch.tensor(reply, dtype=torch.long)
            response[row, end : end + len(reply)] = True
        return TokenBatch(
            grown.ids,
            grown.mask | response,
            {**grown.spans, Span.RESPONSE: response},
            self.shared,
            self.origin,
        )

    def left_padded(self) -> TokenBatch:
        """The same rows with their padding moved to the left, as generation needs it."""
        order = torch.argsort(self.mask.int(), dim=1, stable=True)
        spans = {name: span.gather(1, order) for name, span in self.spans.items()}
        moved = self.mask.gather(1, order)
        return TokenBatch(self.ids.gather(1, order), moved, spans, 0, self.numbers)


@dataclass(frozen=True, slots=True)
class Position:
    """One token position counted from the end of the prompt, and what stands there.

    Attributes:
        index: -1 is the last token of the prompt.
        role: `t_inst`, the last token of the user's instruction; `post`, the template after it.
        text: The token as text, for `t_inst` that of an example.
    """

    index: int
    role: Literal["t_inst", "post"]
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """Token ids of one prompt, and from where to where each turn's text goes in them."""

    ids: list[int]
    turns: list[tuple[int, int]]


class Template:
    """How a model's prompts are laid out, and where the user's words stand in them.

    Attributes:
        kind: "chat" for the tokenizer's own template, "plain" where it has none.
        before: Text in front of the user's words, in a prompt of one turn.
        after: Text behind them, which ends where the reply begins.
        n_before: Tokens in front, the same for every prompt of one turn.
        post_ids: Token ids behind, in every prompt; the candidates for refusal positions.
        hash: Digest of the frame around one turn, which a fitted direction depends on.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        system: str | None = None,
        thinking: bool | None = None,
        max_length: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.system = system
        self.thinking = thinking
        self.max_length = max_length
        chat = bool(getattr(tokenizer, "chat_template", None))
        self.kind: Literal["chat", "plain"] = "chat" if chat else "plain"
        self._frames_kept: dict[int, tuple[str, ...]] = {}
        self._tokenizer_hash: str | None = None
        self.before, self.after = self._frames(1)
        self._control, self._seams = self._control_tokens()
        self.hash = hashlib.blake2b(
            f"{self.kind}\0{self.before}\0{self.after}".encode(), digest_size=8
        ).hexdigest()
        self._before_ids = self._ids(self.before)
        if self.kind == "plain":
            first = tokenizer("a")["input_ids"][0]
            if tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id:
                self._before_ids = [tokenizer.bos_token_id, *self._before_ids]
            self.post_ids: tuple[int, ...] = tuple(self._ids(self.after))
            self.n_before = len(self._before_ids)
        else:
            self.n_before, self.post_ids = self._derive()
        if (count := self.count_bos()) > 1:
            raise TemplateError(
                f"every prompt would begin with {count} beginning-of-sequence tokens",
                "have the chat template write one, or the tokenizer add one, not both",
            )

    @property
    def tokenizer_hash(self) -> str:
        """Digest of what decides how text becomes tokens; taken once."""
        if self._tokenizer_hash is None:
            self._tokenizer_hash = tokenizer_hash(self.tokenizer)
        return self._tokenizer_hash

    @property
    def frames(self) -> tuple[tuple[str, ...], ...]:
        """Text around one turn, and around three where the template takes several."""
        try:
            return self._frames(1), self._frames(3)
        except TemplateError:
            return (self._frames(1),)

    # The frame -------------------------------------------------------------------------------

    def _render(self, texts: Sequence[str]) -> str:
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        messages += [{"role": _role(i), "content": text} for i, text in enumerate(texts)]
        extra: dict[str, Any] = {}
        source = self._source()
        if self.thinking is not None:
            if "enable_thinking" not in source:
                raise TemplateError(
                    "the chat template has no switch for thinking",
                    "leave `thinking` out, or take a model whose template knows enable_thinking",
                )
            extra["enable_thinking"] = self.thinking
        if "date_string" in source:
            extra["date_string"] = _DATE
        if "strftime_now" in source:
            extra["chat_template"] = _CLOCK + source
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **extra
            )
        except Exception as error:
            # jinja2 raises what the template's author wrote, of any class.
            raise TemplateError(
                f"the chat template raised {type(error).__name__}: {error}",
                # `__init__` renders one turn first, so by now the system prompt has been taken.
                "some templates take no system prompt: try without `--system`"
                if len(texts) == 1
                else "some templates take no earlier turns: give the last one alone",
            ) from error

    def _source(self) -> str:
        try:
            return self.tokenizer.get_chat_template()
        except ValueError as error:
            raise TemplateError(
                "the tokenizer has several chat templates, and none of them is the default",
                "name one of them `default` in tokenizer_config.json",
            ) from error

    def _frames(self, n_turns: int) -> tuple[str, ...]:
        """Text in front of the first turn, between each two, and behind the last."""
        if n_turns not in self._frames_kept:
            of_kind = self._frames_of_chat if self.kind == "chat" else self._frames_of_plain
            self._frames_kept[n_turns] = of_kind(n_turns)
        return self._frames_kept[n_turns]

    def _frames_of_plain(self, n_turns: int) -> tuple[str, ...]:
        lead = f"{self.system}\n\n" if self.system else ""
        between = (_PLAIN_AFTER, f"\n{_PLAIN_BEFORE}")
        return (lead + _PLAIN_BEFORE, *(between[i % 2] for i in range(n_turns)))

    def _frames_of_chat(self, n_turns: int) -> tuple[str, ...]:
        variants = range(len(_DUMMIES) + len(_PROBES))
        found = {self._frames_around(variant, n_turns) for variant in variants}
        if len(found) != 1:
            raise TemplateError(
                "the chat template depends on what the user writes, so positions are not stable"
                if n_turns == 1
                else f"the chat template depends on what stands in a conversation of {n_turns} "
                "turns, so positions are not stable",
                "set a template that renders the same frame around every message",
            )
        frames = found.pop()
        if n_turns > 1 and frames[-1] != self.after:
            raise TemplateError(
                f"behind the last of {n_turns} turns the chat template writes {frames[-1]!r}, and "
                f"{self.after!r} behind a single one",
                "give the last turn alone, or set a template that ends every prompt the same way",
            )
        return frames

    def _frames_around(self, variant: int, n_turns: int) -> tuple[str, ...]:
        sentinels = [_sentinel(variant, number) for number in range(n_turns)]
        rest = self._render(sentinels)
        for number, sentinel in enumerate(sentinels):
            times = rest.count(sentinel)
            if times != 1:
                what = "the user's text"
                if n_turns > 1:
                    what = f"turn {number + 1} of {n_turns}, the {_role(number)}'s,"
                raise TemplateError(
                    f"the chat template writes {what} {times} times, not once",
                    "demur needs a template that keeps the user's words in one piece"
                    if n_turns == 1
                    else "give the last turn alone, or set a template that keeps every turn whole",
                )
        frames: list[str] = []
        for number, sentinel in enumerate(sentinels):
            frame, found, rest = rest.partition(sentinel)
            if not found:
                raise TemplateError(
                    f"the chat template writes turn {number + 1} of {n_turns} in front of turn "
                    f"{number}",
                    "give the last turn alone, or set a template that keeps turns in their order",
                )
            frames.append(frame)
        return (*frames, rest)

    def _derive(self) -> tuple[int, tuple[int, ...]]:
        found = set()
        for dummy in _DUMMIES:
            ids, offsets = self._ids_and_offsets(self.before + dummy + self.after)
            low, high = len(self.before), len(self.before) + len(dummy)
            n_before = sum(1 for start, end in offsets if end <= low and start < low)
            post = tuple(
                token for token, (start, _) in zip(ids, offsets, strict=True) if start >= high
            )
            found.add((n_before, post))
        posts = {post for _, post in found}
        if len(posts) != 1:
            raise TemplateError(
                "the tokens behind the instruction depend on its last character",
                "this tokenizer merges template and user text; give it a template that ends the "
                "user's turn with a special token",
            )
        return min(n for n, _ in found), posts.pop()

    def _control_tokens(self) -> tuple[dict[int, str], re.Pattern[str]]:
        """Tokens that only the template may write: special ones, and added ones that it uses.

        Other added tokens, such as runs of spaces or HTML tags, are ordinary text.

        Returns:
            The tokens by id, and where to cut a text so that none of the added ones is found in it.
        """
        source = self._source() if self.kind == "chat" else ""
        frame = f"{source} {self.before} {self.after}"
        added = self.tokenizer.added_tokens_decoder
        ours = {
            index: token
            for index, token in added.items()
            if token.special or (token.content in frame and not token.content.isspace())
        }
        # Tokenizers skip special tokens on demand, but not added ones like Qwen3's `<think>`:
        # those are cut in two, "<" and "think>".
        cuts = [
            f"(?<={re.escape(token.content[0])})(?={re.escape(token.content[1:])})"
            for token in ours.values()
            if not token.special and len(token.content) > 1
        ]
        seams = re.compile("|".join(cuts) or r"(?!)")
        return {index: token.content for index, token in ours.items()}, seams

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _ids_and_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        row = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return row["input_ids"], row["offset_mapping"]

    # Rows ------------------------------------------------------------------------------------

    @property
    def frame_ids(self) -> tuple[int, ...]:
        """Token ids that the template writes around every prompt."""
        return (*self._before_ids, *self.post_ids)

    @property
    def n_post(self) -> int:
        """Tokens behind the instruction."""
        return len(self.post_ids)

    @property
    def positions(self) -> tuple[Position, ...]:
        """`t_inst` and every post-instruction token, first to last."""
        decode = self.tokenizer.decode
        last = self._ids(_DUMMIES[0])[-1]
        posts = [
            Position(i - self.n_post, "post", decode([token]))
            for i, token in enumerate(self.post_ids)
        ]
        return (Position(-self.n_post - 1, "t_inst", decode([last])), *posts)

    def _row(self, texts: Sequence[str]) -> _Row:
        """Lay out the turns of one prompt.

        Raises:
            TemplateError: A turn merges with the template, or writes a control token.
        """
        if self.kind == "plain":
            return self._row_of_parts([f" {text}" for text in texts])
        frames = self._frames(len(texts))
        whole, places = frames[0], list[tuple[int, int]]()
        for text, frame in zip(texts, frames[1:], strict=True):
            places.append((len(whole), len(whole) + len(text)))
            whole += text + frame
        ids, offsets = self._ids_and_offsets(whole)
        for low, high in places:
            inside = (low <= start < high for start, _ in offsets)
            if any(token in self._control for token, ours in zip(ids, inside, strict=True) if ours):
                return self._row_of_parts(texts)
        n_text = len(ids) - self.n_post
        turns: list[tuple[int, int]] = []
        for number, (low, high) in enumerate(places):
            first = next((i for i, (_, end) in enumerate(offsets) if end > low), len(ids))
            last = number == len(places) - 1
            behind = (i for i, (start, _) in enumerate(offsets) if start >= high)
            stop = n_text if last else next(behind, len(ids))
            ours = first < stop and (not last or tuple(ids[stop:]) == self.post_ids)
            if ours:
                # A turn is read at its last token, which must be its alone. That of a single word
                # may begin with the template's space: "[INST]" and " Yes".
                start, end = offsets[stop - 1]
                ours = start < end <= high and not whole[start:low].strip()
            if not ours:
                raise _merged(texts, number)
            turns.append((first, stop))
        return _Row(ids, turns)

    def _row_of_parts(self, texts: Sequence[str]) -> _Row:
        """Template and texts tokenised apart: a fake turn in someone's text stays text.

        Raises:
            TemplateError: The tokenizer writes a control token even so, or nothing at all.
        """
        frames = self._frames(len(texts))
        # Those of a plain template know of the token that begins a row.
        ids = [*self._before_ids] if frames[0] == self.before else self._ids(frames[0])
        turns: list[tuple[int, int]] = []
        for number, text in enumerate(texts):
            inner = self._apart(text)
            fake = [self._control[token] for token in inner if token in self._control]
            if fake:
                raise TemplateError(
                    f"{_named(texts, number)} writes the control token {fake[0]}",
                    "leave it out: its text would end the user's turn",
                )
            if not inner:
                raise _merged(texts, number)
            turns.append((len(ids), len(ids) + len(inner)))
            last = number == len(texts) - 1
            ids += [*inner, *(self.post_ids if last else self._ids(frames[number + 1]))]
        return _Row(ids, turns)

    def _apart(self, text: str) -> list[int]:
        """A text's own tokens, those that spell a control token too."""
        ids: list[int] = []
        for piece in self._seams.split(text):
            row = self.tokenizer(piece, add_special_tokens=False, split_special_tokens=True)
            ids += row["input_ids"]
        return ids

    def reply_ids(self, text: str) -> list[int]:
        """Tokens of a text that a reply is made to begin with; none of them is the template's own.

        Raises:
            TemplateError: The tokenizer writes a control token even so.
        """
        ids = self._apart(text)
        fake = [self._control[token] for token in ids if token in self._control]
        if fake:
            raise TemplateError(
                f"the beginning of a reply {text[:60]!r} writes the control token {fake[0]}",
                "leave it out: it would end the reply",
            )
        return ids

    def raw_ids(self, text: str) -> list[int]:
        """Tokens of a text that is no chat, behind what the tokenizer begins every text with.

        What spells a control token in it stays text, as in turns.

        Raises:
            TemplateError: The tokenizer writes a control token even so, or nothing at all.
        """
        first = self.tokenizer("a")["input_ids"][:1]
        bos = self.tokenizer.bos_token_id
        lead = first if bos is not None and first == [bos] else []
        ids = self._ids(text)
        if any(token in self._control for token in ids):
            ids = self._apart(text)
        fake = [self._control[token] for token in ids if token in self._control]
        if fake:
            raise TemplateError(
                f"the text {text[:60]!r} writes the control token {fake[0]}",
                "leave it out: only a chat template writes it",
            )
        if not lead and not ids:
            raise TemplateError("a text is empty", "leave it out, or say something")
        return [*lead, *ids]

    def fake_ids(self, ids: Sequence[int]) -> list[int]:
        """Control tokens among those that somebody wrote by number.

        A first token that begins or ends texts is none: language modelling is scored behind it.
        """
        ends = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        own = ids[1:] if ids and ids[0] in ends else ids
        return [token for token in own if token in self._control]

    def encode(self, prompts: Sequence[str | Conversation], *, pad_id: int) -> TokenBatch:
        """Tokenise prompts, padded on the right.

        White space around a turn is dropped: many templates do so, and positions would differ
        between those that do and those that do not.

        Args:
            prompts: Single user turns as text, and conversations. Of a conversation the last turn
                is the instruction, the user's turns before it are `Span.EARLIER`, and the
                assistant's are in no span.
            pad_id: Any valid token id.

        Raises:
            TemplateError: A turn is empty or merges with the template, a prompt is longer than the
                model's context, or a conversation does not go from user to user in turns, or is one
                that the template does not keep whole.
        """
        rows = [self._row_of(prompt) for prompt in prompts]
        if not rows:
            raise TemplateError("there are no prompts to encode", "give at least one prompt")
        width = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.bool)
        instruction, earlier, post = (torch.zeros_like(mask) for _ in range(3))
        for i, row in enumerate(rows):
            end = len(row.ids)
            ids[i, :end] = torch.tensor(row.ids)
            mask[i, :end] = True
            start, stop = row.turns[-1]
            instruction[i, start:stop] = True
            post[i, stop:end] = True
            for start, stop in row.turns[:-1:2]:
                earlier[i, start:stop] = True
        # Rows with other numbers of turns may have another frame in front of the first.
        lead = ids[:, : min(row.turns[0][0] for row in rows)]
        shared = int((lead == lead[0]).all(0).int().cumprod(0).sum())
        spans = {
            Span.INSTRUCTION: instruction,
            Span.EARLIER: earlier,
            Span.POST_INSTRUCTION: post,
        }
        return TokenBatch(ids, mask, spans, shared)

    def _row_of(self, prompt: str | Conversation) -> _Row:
        if isinstance(prompt, str):
            given = [prompt]
        else:
            _check_turns([(turn.role, turn.text) for turn in prompt])
            given = [turn.text for turn in prompt]
        texts = [text.strip() for text in given]
        if not all(texts):
            raise TemplateError(
                f"{_named(given, texts.index(''))} is empty", "leave it out, or say something"
            )
        row = self._row(texts)
        if self.max_length is not None and len(row.ids) > self.max_length:
            what = (
                "prompt" if len(texts) == 1 else f"conversation of {len(texts)} turns that ends in"
            )
            raise TemplateError(
                f"the {what} {texts[-1][:60]!r} has {len(row.ids)} tokens, the model's context "
                f"holds {self.max_length}",
                "shorten it: cutting it here would remove the tokens that are read",
            )
        return row

    def count_bos(self) -> int:
        """How many beginning-of-sequence tokens a rendered prompt starts with; 0 or 1 is right."""
        bos = self.tokenizer.bos_token_id
        leading = 0
        for token in self._before_ids:
            if token != bos:
                break
            leading += 1
        return leading


class SystemTemplate(Template):
    """A template with a system message that is tokenised apart, as turns are: none of it controls.

    The template writes a system message somewhere among its own tokens. Here a placeholder goes
    through it, and the message's tokens are put in its place.

    Attributes:
        words: The message.
    """

    def __init__(self, like: Template, words: str) -> None:
        self.words = words.strip()
        self._mark = f"Answer {secrets.token_hex(16)}"
        self._inner: list[int] | None = None
        super().__init__(
            like.tokenizer,
            system=self._mark,
            thinking=like.thinking,
            max_length=like.max_length,
        )
        bos = [one for one in self._before_ids[:1] if one == self.tokenizer.bos_token_id]
        self._inner = self.reply_ids(self.words)
        ids = self._ids(self.before)
        # A plain template has its first token from the tokenizer, not from its text.
        self._before_ids = ids if ids[:1] == bos else [*bos, *ids]
        self.n_before = len(self._before_ids)

    def _ids(self, text: str) -> list[int]:
        left, mark, right = text.partition(self._mark)
        if not mark or self._inner is None:
            return super()._ids(text)
        return [*super()._ids(left), *self._inner, *(super()._ids(right) if right else ())]

    def _ids_and_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        left, mark, right = text.partition(self._mark)
        if not mark or self._inner is None:
            return super()._ids_and_offsets(text)
        ids, offsets = super()._ids_and_offsets(left)
        more, places = super()._ids_and_offsets(right)
        start = len(left)
        stop = start + len(mark)
        return (
            [*ids, *self._inner, *more],
            [
                *offsets,
                *([(start, stop)] * len(self._inner)),
                *((low + stop, high + stop) for low, high in places),
            ],
        )


def _merged(texts: Sequence[str], number: int) -> TemplateError:
    return TemplateError(
        f"{_named(texts, number)} merges with the chat template",
        "leave it out, or end it with a letter or a full stop",
    )

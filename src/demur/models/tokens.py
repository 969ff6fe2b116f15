"""From prompts to token rows with named spans, through the model's own chat template.

Positions are derived, never hard-coded: the template is rendered around dummies that end in a
letter, a digit, punctuation and another script, and what stays the same before and after them is
the template's own. A row in which user text and template merged into one token is an error.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from demur.errors import TemplateError
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


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Token rows of one length, padded on one side.

    Attributes:
        ids: Token ids; padding holds a valid id that `mask` hides.
        mask: True at real tokens.
        spans: Which tokens belong to the user's instruction, and which to the template after it.
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
            tokens: Most tokens of a pass, padding counted and the shared prefix not.
            rows: Most rows of a pass.
        """
        own = self.ends - self.shared
        out: list[list[int]] = []
        for row in torch.argsort(own, stable=True).tolist():
            # Rows come in order of length, so the next one sets the width.
            full = not out or (len(out[-1]) + 1) * int(own[row]) > tokens
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


class Template:
    """How a model's prompts are laid out, and where the user's words stand in them.

    Attributes:
        kind: "chat" for the tokenizer's own template, "plain" where it has none.
        before: Text in front of the user's words.
        after: Text behind them, which ends where the reply begins.
        n_before: Tokens in front, the same for every prompt.
        post_ids: Token ids behind; the candidates for refusal positions.
        hash: Digest of the rendered frame, which a fitted direction depends on.
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
        if getattr(tokenizer, "chat_template", None):
            self.kind: Literal["chat", "plain"] = "chat"
            self.before, self.after = self._frame_of_chat()
        else:
            self.kind = "plain"
            lead = f"{system}\n\n" if system else ""
            self.before, self.after = lead + _PLAIN_BEFORE, _PLAIN_AFTER
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

    # The frame -------------------------------------------------------------------------------

    def _render(self, content: str) -> str:
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        messages.append({"role": "user", "content": content})
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
                "some templates take no system prompt: try without `--system`",
            ) from error

    def _source(self) -> str:
        try:
            return self.tokenizer.get_chat_template()
        except ValueError as error:
            raise TemplateError(
                "the tokenizer has several chat templates, and none of them is the default",
                "name one of them `default` in tokenizer_config.json",
            ) from error

    def _frame_of_chat(self) -> tuple[str, str]:
        frames = set()
        for dummy in _DUMMIES:
            text = self._render(dummy)
            if text.count(dummy) != 1:
                raise TemplateError(
                    f"the chat template writes the user's text {text.count(dummy)} times, not once",
                    "demur needs a template that keeps the user's words in one piece",
                )
            frames.add(tuple(text.split(dummy)))
        if len(frames) != 1:
            raise TemplateError(
                "the chat template depends on what the user writes, so positions are not stable",
                "set a template that renders the same frame around every message",
            )
        before, after = frames.pop()
        return before, after

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

    def _row(self, content: str) -> tuple[list[int], int] | None:
        """Ids of a prompt and where its instruction begins; None if text and template merged."""
        if self.kind == "plain":
            return self._row_of_parts(f" {content}")
        ids, offsets = self._ids_and_offsets(self.before + content + self.after)
        low, high = len(self.before), len(self.before) + len(content)
        inside = (low <= start < high for start, _ in offsets)
        if any(token in self._control for token, ours in zip(ids, inside, strict=True) if ours):
            return self._row_of_parts(content)
        n_text = len(ids) - self.n_post
        if n_text < 1 or tuple(ids[n_text:]) != self.post_ids:
            return None
        start, end = offsets[n_text - 1]
        if not low <= start < end <= high:
            return None
        return ids, next(i for i, (_, end) in enumerate(offsets) if end > low)

    def _row_of_parts(self, content: str) -> tuple[list[int], int]:
        """Template and text tokenised apart: a fake turn in the user's text stays text.

        Raises:
            TemplateError: The tokenizer writes a control token even so.
        """
        inner: list[int] = []
        for piece in self._seams.split(content):
            row = self.tokenizer(piece, add_special_tokens=False, split_special_tokens=True)
            inner += row["input_ids"]
        fake = [self._control[token] for token in inner if token in self._control]
        if fake:
            raise TemplateError(
                f"the prompt {content[:60]!r} writes the control token {fake[0]}",
                "leave it out: its text would end the user's turn",
            )
        return [*self._before_ids, *inner, *self.post_ids], len(self._before_ids)

    def encode(self, prompts: Sequence[str], *, pad_id: int) -> TokenBatch:
        """Tokenise prompts as single user turns, padded on the right.

        White space around a prompt is dropped: many templates do so, and positions would differ
        between those that do and those that do not.

        Raises:
            TemplateError: A prompt is empty, longer than the model's context, or merges with the
                template.
        """
        rows: list[list[int]] = []
        starts: list[int] = []
        for prompt in prompts:
            content = prompt.strip()
            row = self._row(content) if content else None
            if row is None or len(row[0]) == row[1] + self.n_post:
                why = "merges with the chat template" if content else "is empty"
                raise TemplateError(
                    f"the prompt {prompt[:60]!r} {why}",
                    "leave it out, or end it with a letter or a full stop",
                )
            if self.max_length is not None and len(row[0]) > self.max_length:
                raise TemplateError(
                    f"the prompt {prompt[:60]!r} has {len(row[0])} tokens, the model's context "
                    f"holds {self.max_length}",
                    "shorten it: cutting it here would remove the tokens that are read",
                )
            rows.append(row[0])
            starts.append(row[1])
        if not rows:
            raise TemplateError("there are no prompts to encode", "give at least one prompt")
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.bool)
        instruction, post = torch.zeros_like(mask), torch.zeros_like(mask)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
            instruction[i, start : len(row) - self.n_post] = True
            post[i, len(row) - self.n_post : len(row)] = True
        shared = min(starts)
        if not bool((ids[:, :shared] == ids[0, :shared]).all()):
            shared = 0
        return TokenBatch(
            ids, mask, {Span.INSTRUCTION: instruction, Span.POST_INSTRUCTION: post}, shared
        )

    def count_bos(self) -> int:
        """How many beginning-of-sequence tokens a rendered prompt starts with; 0 or 1 is right."""
        bos = self.tokenizer.bos_token_id
        ids = self._row(_DUMMIES[0])
        leading = 0
        for token in ids[0] if ids else []:
            if token != bos:
                break
            leading += 1
        return leading

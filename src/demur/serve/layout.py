"""Chat templates with a client's own system message, of which no token is the template's.

A system message goes through the template, which writes it somewhere among its own tokens. Here a
placeholder goes through instead, and the message's tokens are put in its place: what spells a
control token in it stays text.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from demur.errors import TemplateError
from demur.models import Conversation, Model, Template, conversation_of

_KEPT = 32  # Templates with a system message; each renders a dozen dummies once.


class SystemTemplate(Template):
    """A template with a system message that is tokenised apart, as turns are.

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


class Layouts:
    """Lays out messages as OpenAI's clients write them. To be used by one thread at a time."""

    def __init__(self, model: Model) -> None:
        assert model.template is not None
        self.template: Template = model.template
        self._made: OrderedDict[str, Template] = OrderedDict()
        self._added = set(self.template.tokenizer.added_tokens_decoder)

    def of(self, system: str | None) -> Template:
        """The model's template with another system message; None leaves its own.

        Raises:
            TemplateError: The template takes none.
        """
        if system is None or not system.strip():
            return self.template
        found = self._made.get(system)
        if found is None:
            found = self._make(system.strip())
            if found.post_ids != self.template.post_ids:
                raise TemplateError(
                    "with a system message the chat template ends prompts another way",
                    "leave the system message out",
                )
            self._made[system] = found
            if len(self._made) > _KEPT:
                self._made.popitem(last=False)
        self._made.move_to_end(system)
        return found

    def _make(self, system: str) -> Template:
        like = self.template
        written = like.tokenizer(system, add_special_tokens=False)["input_ids"]
        if self._added & set(written):
            return SystemTemplate(like, system)
        # Nothing to keep apart: tokenised as a whole, as for a server started with `--system`.
        return Template(
            like.tokenizer, system=system, thinking=like.thinking, max_length=like.max_length
        )


def split(messages: Sequence[Mapping[str, Any]]) -> tuple[str | None, Conversation]:
    """The system message in front, and the conversation behind it.

    Args:
        messages: With `role` and `content`, which is text.

    Raises:
        TemplateError: A system message stands elsewhere, or see `conversation_of`.
    """
    rest = list(messages)
    lead: list[str] = []
    while rest and rest[0].get("role") in ("system", "developer"):
        lead.append(str(rest.pop(0).get("content")))
    if any(one.get("role") in ("system", "developer") for one in rest):
        raise TemplateError(
            "a system message stands behind the first turn", "put it in front of all others"
        )
    return ("\n\n".join(lead) if lead else None), conversation_of(rest)

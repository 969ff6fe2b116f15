"""Chat templates with a client's own system message, of which no token is the template's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from demur.errors import TemplateError
from demur.models import (
    Conversation,
    Model,
    SystemTemplate,
    Template,
    TokenBatch,
    conversation_of,
)

_KEPT = 32  # Templates with a system message; each renders a dozen dummies once.


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


def roomy(model: Model, count: int) -> int:
    """How many tokens to read where `count` are wanted, so that few numbers come up.

    On CPUs, kernels of half precision are made for each number of tokens and kept for good (3 MB
    each on SmolLM2): a server of prompts of all lengths would grow for days.

    Args:
        model: Says whether that is so; elsewhere nothing is added.
        count: Tokens.

    Returns:
        The next multiple of 8, beyond 128 of an eighth of the power of two beneath.
    """
    if model.device.type != "cpu" or model.dtype not in (torch.bfloat16, torch.float16):
        return count
    step = max(8, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


def widened(batch: TokenBatch, columns: int, *, pad_id: int) -> TokenBatch:
    """The same rows with so many columns of padding in front."""
    if not columns:
        return batch
    pad = torch.nn.functional.pad
    return replace(
        batch,
        ids=pad(batch.ids, (columns, 0), value=pad_id),
        mask=pad(batch.mask, (columns, 0)),
        spans={name: pad(span, (columns, 0)) for name, span in batch.spans.items()},
        shared=0,
    )

"""Places: tensors in the residual stream, and spans of the token row.

A place is always named in full. "Layer 14" could be the input of block 14, its output, or row 14
of `hidden_states`; `14.resid_pre` is one tensor.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, cast, get_args

from demur.errors import ConfigError

SiteKind = Literal["resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post"]


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """A tensor of shape (prompt, token, d_model) at one block.

    Attributes:
        layer: Block index from 0.
        kind: `resid_pre`, the stream that enters the block (at block 0, the embedding's write);
            `attn_out` and `mlp_out`, what the block adds to the stream, after any norm that
            stands between module and stream; `mlp_in`, what the MLP reads, after its norm, which is
            no part of the stream; `resid_post`, the stream that leaves the block.
    """

    layer: int
    kind: SiteKind

    def __str__(self) -> str:
        return f"{self.layer}.{self.kind}"

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read `14.resid_pre` back.

        Raises:
            ConfigError: The text is no site.
        """
        layer, _, kind = text.partition(".")
        if not layer.isdecimal() or kind not in get_args(SiteKind):
            raise ConfigError(
                f"`{text}` is not a site",
                f"write it like 14.resid_pre; tensors: {', '.join(get_args(SiteKind))}",
            )
        return cls(int(layer), cast(SiteKind, kind))


class Span(StrEnum):
    """Named parts of a token row."""

    INSTRUCTION = "instruction"  # Of a conversation, the last user turn.
    EARLIER = "earlier"  # The user turns before it.
    POST_INSTRUCTION = "post_instruction"
    RESPONSE = "response"
    REQUEST = "request"  # The instruction without a question that was put behind it.

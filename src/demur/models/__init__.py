"""Models: the only code that knows transformers."""

from demur.models.check import CheckReport, CheckRow, check, list_families, token_rows
from demur.models.decoding import Order
from demur.models.families import FAMILIES, Family, family_of
from demur.models.load import EMBEDDED, load, load_tokenizer, packaged_adapter
from demur.models.model import Chunk, Completion, Model
from demur.models.tokens import (
    Conversation,
    Position,
    SystemTemplate,
    Template,
    TokenBatch,
    Turn,
    conversation_of,
)

__all__ = [
    "EMBEDDED",
    "FAMILIES",
    "CheckReport",
    "CheckRow",
    "Chunk",
    "Completion",
    "Conversation",
    "Family",
    "Model",
    "Order",
    "Position",
    "SystemTemplate",
    "Template",
    "TokenBatch",
    "Turn",
    "check",
    "conversation_of",
    "family_of",
    "list_families",
    "load",
    "load_tokenizer",
    "packaged_adapter",
    "token_rows",
]

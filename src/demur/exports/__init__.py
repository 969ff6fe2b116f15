"""Exports: what demur finds, in the formats of those who run it, and the same read back.

A format is one module that registers an `Exporter`; this page names it. What a format cannot carry
is refused unless its loss is asked for by name, and then the record and the card say so.
"""

from demur.exports import (  # Each registers its format.
    control_vector,
    lora,
    merged,
    native,
    refusal_direction,
    steering_vectors,
    vllm_lens,
)
from demur.exports.base import Exporter, Imported, exporters
from demur.exports.card import Evidence, card
from demur.exports.export import Exported, export, read_export
from demur.exports.steering import LOSSES, Steering

__all__ = [
    "LOSSES",
    "Evidence",
    "Exported",
    "Exporter",
    "Imported",
    "Steering",
    "card",
    "control_vector",
    "export",
    "exporters",
    "lora",
    "merged",
    "native",
    "read_export",
    "refusal_direction",
    "steering_vectors",
    "vllm_lens",
]

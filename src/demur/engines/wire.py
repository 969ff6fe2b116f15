"""What demur and an engine's process send to each other: JSON and safetensors, never pickles.

A frame is two lengths of eight bytes, big-endian, then a JSON object, then a safetensors file. It
goes over a pair of pipes that only the two processes hold.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from demur.errors import DemurError

_LENGTHS = struct.Struct(">QQ")
_MOST_JSON, _MOST_TENSORS = 1 << 28, 1 << 34
_SPOKEN_BY = ("wire.py", "programs.py", "extension.py", "worker.py")


class EngineError(DemurError, RuntimeError):
    """An engine's process ended, could not start, or said something that makes no sense."""


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """One frame.

    Attributes:
        head: A JSON object.
        tensors: By name; empty for none.
    """

    head: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def protocol() -> str:
    """Digest of the code that both sides run; the two must have the same."""
    digest = hashlib.blake2b(digest_size=8)
    for name in _SPOKEN_BY:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as a safetensors file; no bytes for none."""
    from safetensors.torch import save

    if not tensors:
        return b""
    # Copies: one tensor may stand under two names, which safetensors refuses.
    return save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()})


def unpack(data: bytes) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        EngineError: The bytes are none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not data:
        return {}
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise EngineError(
            f"{len(data)} bytes are no safetensors: {error}", "this is a fault in demur: report it"
        ) from error


def send(stream: BinaryIO, message: Message) -> None:
    """Write one frame.

    Raises:
        EngineError: The other side is gone.
    """
    head = json.dumps(message.head, allow_nan=False).encode()
    body = pack(message.tensors)
    try:
        stream.write(_LENGTHS.pack(len(head), len(body)))
        stream.write(head)
        stream.write(body)
        stream.flush()
    except (OSError, ValueError) as error:
        raise EngineError(f"the engine's pipe is closed: {error}", "start it again") from error


def receive(stream: BinaryIO) -> Message | None:
    """Read one frame; None where the other side closed the pipe between two frames.

    Raises:
        EngineError: The frame is cut short, too long, or neither JSON nor safetensors.
    """
    start = stream.read(_LENGTHS.size)
    if not start:
        return None
    if len(start) < _LENGTHS.size:
        raise EngineError("a frame is cut short", "the other process ended: start it again")
    n_head, n_body = _LENGTHS.unpack(start)
    if n_head > _MOST_JSON or n_body > _MOST_TENSORS:
        raise EngineError(
            f"a frame announces {n_head} and {n_body} bytes",
            "something else writes to the engine's pipe; ask for fewer rows at a time",
        )
    head, body = _whole(stream, n_head), _whole(stream, n_body)
    try:
        found = json.loads(head)
        if not isinstance(found, dict):
            raise ValueError(f"it is a {type(found).__name__}")
    except ValueError as error:
        raise EngineError(
            f"a frame is no JSON object: {error}", "something else writes to the engine's pipe"
        ) from error
    return Message(found, unpack(body))


def _whole(stream: BinaryIO, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        part = stream.read(min(size, 1 << 24))
        if not part:
            raise EngineError("a frame is cut short", "the other process ended: start it again")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)

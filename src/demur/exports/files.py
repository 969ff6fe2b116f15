"""Reading files of vectors without running anything in them: PyTorch, safetensors, by layer."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from demur.errors import StoreError

_LAYER = re.compile(r"(?:.*[._-])?(?:layers?|blocks?|h|direction)?[._-]?(\d+)")
_SAVE_AGAIN = (
    "nothing that needs pickle is read, since it may run code: where you trust the file, save it "
    'again as plain tensors, `torch.save({"layer_activations": vector.layer_activations, '
    '"layer_type": vector.layer_type}, PATH)`'
)


def header(path: Path) -> str | None:
    """The format that a safetensors file says it is; None for other files and those of others."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            own = json.loads((file.metadata() or {}).get("demur", "null"))
    except (OSError, ValueError, RecursionError, SafetensorError):
        return None  # Whoever reads it says what is wrong.
    return str(own["format"]) if isinstance(own, dict) and "format" in own else None


def safetensors_file(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        StoreError: It is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise StoreError(f"{path} is damaged: {error}", "get it again") from error


def torch_file(path: Path) -> Any:
    """A PyTorch file, without running anything in it.

    Raises:
        StoreError: It is damaged, needs pickle, or unpacks to far more than it takes.
    """
    _unpacked(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise StoreError(f"{path} holds more than tensors", _SAVE_AGAIN) from error
        raise StoreError(f"{path} is no PyTorch file", "get it again") from error
    except Exception as error:  # A cut archive raises whatever the unpickler ran into.
        raise StoreError(f"{path} is damaged: {_line(error)}", "get it again") from error


def _unpacked(path: Path) -> None:
    """See that an archive holds no more than it takes: PyTorch packs nothing, so others did."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(one.file_size for one in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OSError):
        return  # Not of that kind, or damaged, which whoever reads it says.
    taken = path.stat().st_size
    if size > 2 * taken + (1 << 24):
        raise StoreError(
            f"{path} has {taken} bytes and unpacks to {size}", "save it again with `torch.save`"
        )


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def layer_number(key: str) -> int | None:
    """The layer that a key such as `layers.12` names; None if it names none."""
    found = _LAYER.fullmatch(key)
    return int(found[1]) if found else None


def flat(path: Path, own: str, value: Tensor) -> Float[Tensor, " d_model"]:
    """A vector, whatever axes of length 1 are around it.

    Raises:
        StoreError: It is none.
    """
    if value.numel() < 2 or value.numel() != max(value.shape, default=0):
        raise StoreError(
            f"`{own}` of {path} has the shape {tuple(value.shape)}", "a vector has one axis"
        )
    return value.reshape(-1)


def finite(path: Path, value: Tensor) -> None:
    """See that a tensor holds real, finite numbers.

    Raises:
        StoreError: It does not.
    """
    if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
        raise StoreError(
            f"{path} holds NaN, infinity or no real numbers", "the file is damaged: make it again"
        )


def by_layer(
    path: Path, layers: Mapping[int, Tensor]
) -> tuple[dict[int, Float[Tensor, " d_model"]], int]:
    """Vectors of one width by layer, ascending, and how many zero ones were left out.

    Raises:
        StoreError: They are of several widths, not finite, or all zero.
    """
    found = {layer: flat(path, str(layer), value) for layer, value in sorted(layers.items())}
    if len({len(value) for value in found.values()}) > 1:
        raise StoreError(f"the vectors in {path} are of several widths", "get it again")
    for value in found.values():
        finite(path, value)
    kept = {layer: value for layer, value in found.items() if bool(value.any())}
    if not kept:
        raise StoreError(f"{path} holds no vector that is not zero", "make it again")
    return kept, len(found) - len(kept)

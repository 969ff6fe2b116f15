"""Arrays of files, read in parts: no file stays mapped longer than one block is copied.

Pages of a mapped file count as memory of whoever touched them, so a matrix of 600 MB that is read
through one mapping costs 600 MB, however little of it is kept.
"""

from __future__ import annotations

import pickle
import shutil
import tempfile
import weakref
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from demur.errors import StoreError

_BLOCK_BYTES = 64 * 1024 * 1024
_SAVE_AGAIN = (
    "nothing that needs pickle is read, since it may run code: where you trust the file, save its "
    "tensors again with `safetensors.torch.save_file`"
)


@runtime_checkable
class Arrays(Protocol):
    """Named arrays of one file, read in parts."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """What there is."""
        ...

    def opened(self, name: str) -> Any:
        """A context in which one array can be sliced, by at most one slice an axis."""
        ...


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A safetensors file."""

    path: Path

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `Arrays`."""
        try:
            with safe_open(self.path, framework="pt") as held:
                return {name: tuple(held.get_slice(name).get_shape()) for name in held.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise StoreError(f"{self.path} cannot be read: {error}", "fetch it again") from error

    @contextmanager
    def opened(self, name: str) -> Iterator[Any]:
        """See `Arrays`."""
        with safe_open(self.path, framework="pt") as held:
            yield held.get_slice(name)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class NpzFile:
    """A zip of arrays; members that are compressed are unpacked once, beside the other scratch."""

    path: Path
    unpacked: dict[str, Path] = field(default_factory=dict)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `Arrays`."""
        out: dict[str, tuple[int, ...]] = {}
        try:
            with zipfile.ZipFile(self.path) as archive:
                for info in archive.infolist():
                    with archive.open(info) as member:
                        shape, _, dtype = _npy_header(member)
                    if dtype.hasobject:
                        raise StoreError(
                            f"`{info.filename}` in {self.path} holds Python objects", _SAVE_AGAIN
                        )
                    out[info.filename.removesuffix(".npy")] = shape
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{self.path} cannot be read: {error}", "fetch it again") from error
        return out

    @contextmanager
    def opened(self, name: str) -> Iterator[Any]:
        """See `Arrays`."""
        with zipfile.ZipFile(self.path) as archive:
            info = archive.getinfo(f"{name}.npy")
            if info.compress_type != zipfile.ZIP_STORED and name not in self.unpacked:
                folder = Path(tempfile.mkdtemp(prefix="demur-npz-"))
                weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
                self.unpacked[name] = Path(archive.extract(info, folder))
        if name in self.unpacked:
            yield np.load(self.unpacked[name], mmap_mode="r", allow_pickle=False)
            return
        with self.path.open("rb") as raw:
            raw.seek(info.header_offset + 26)
            sizes = raw.read(4)
            start = int.from_bytes(sizes[:2], "little") + int.from_bytes(sizes[2:], "little")
            raw.seek(info.header_offset + 30 + start)
            shape, order, dtype = _npy_header(raw)
            offset = raw.tell()
        if not shape:  # A scalar cannot be mapped.
            yield np.fromfile(self.path, dtype=dtype, count=1, offset=offset).reshape(())
            return
        yield np.memmap(self.path, dtype=dtype, mode="r", offset=offset, shape=shape, order=order)


def _npy_header(member: Any) -> tuple[tuple[int, ...], Literal["C", "F"], np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read(member)
    return shape, "F" if fortran else "C", dtype


@dataclass(frozen=True, slots=True)
class TorchFile:
    """A PyTorch file, of which only plain tensors are read."""

    path: Path

    def _load(self) -> Mapping[str, Tensor]:
        def read(**how: Any) -> Any:
            return torch.load(self.path, map_location="cpu", weights_only=True, **how)

        try:
            try:
                found = read(mmap=True)
            except RuntimeError:  # Of before 2020: it is no zip and cannot be mapped.
                found = read()
        except pickle.UnpicklingError as error:
            raise StoreError(f"{self.path} holds more than plain tensors", _SAVE_AGAIN) from error
        except (RuntimeError, EOFError, OSError) as error:
            raise StoreError(f"{self.path} cannot be read: {error}", "fetch it again") from error
        if not isinstance(found, Mapping) or not all(
            isinstance(one, Tensor) for one in found.values()
        ):
            raise StoreError(f"{self.path} holds no dictionary of tensors", _SAVE_AGAIN)
        return found

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `Arrays`."""
        return {name: tuple(one.shape) for name, one in self._load().items()}

    @contextmanager
    def opened(self, name: str) -> Iterator[Any]:
        """See `Arrays`."""
        yield self._load()[name]


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """Tensors that somebody else holds in memory."""

    tensors: Mapping[str, Tensor]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `Arrays`."""
        return {name: tuple(one.shape) for name, one in self.tensors.items()}

    @contextmanager
    def opened(self, name: str) -> Iterator[Any]:
        """See `Arrays`."""
        yield self.tensors[name].detach()


def _wide(part: Any) -> Tensor:
    """A float32 copy of what was sliced; a view would keep the file mapped."""
    if isinstance(part, np.ndarray):
        return torch.from_numpy(np.array(part, dtype=np.float32))
    return part.to("cpu", torch.float32, copy=True)


def vector(arrays: Arrays, name: str) -> Tensor:
    """A small array, float32."""
    with arrays.opened(name) as view:
        shape = arrays.shapes()[name]
        return _wide(view[:] if shape else view[...])


def _run(ids: Tensor) -> slice | None:
    """The ids as a slice, if they follow one another."""
    if len(ids) and bool((ids == torch.arange(int(ids[0]), int(ids[0]) + len(ids))).all()):
        return slice(int(ids[0]), int(ids[0]) + len(ids))
    return None


@dataclass(frozen=True, slots=True)
class Matrix:
    """Where a matrix lies.

    Attributes:
        name: Of its array.
        latents: The axis that latents lie along.
    """

    name: str
    latents: Literal[0, 1]

    def rows(self, arrays: Arrays, ids: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        """Some latents' rows, float32, whichever way the file has them."""
        shape = arrays.shapes()[self.name]
        out = torch.empty(len(ids), shape[1 - self.latents])
        run = _run(ids)
        if self.latents == 0:
            step = max(1, _BLOCK_BYTES // (4 * shape[1]))
            for start in range(0, len(ids), step):
                some = ids[start : start + step]
                with arrays.opened(self.name) as view:
                    if run is not None:
                        low = run.start + start
                        out[start : start + step] = _wide(view[low : low + len(some)])
                        continue
                    for place, one in enumerate(some.tolist(), start=start):
                        out[place] = _wide(view[one : one + 1])[0]
            return out
        columns = slice(0, shape[1]) if run is None else run
        # Of whole rows, since all that lies between the first and last column may be mapped.
        step = max(1, _BLOCK_BYTES // (4 * shape[1]))
        for start in range(0, shape[0], step):
            with arrays.opened(self.name) as view:
                part = view[start : start + step, columns]
                part = _wide(part if run is not None else part[:, ids])
            out[:, start : start + step] = part.T
        return out

"""Records on disk, found by what made them: JSON and safetensors, nothing that runs code on load.

A record lies in `<root>/<kind>/<hash>/`; the hash is over kind, settings and inputs, so that the
same work is found instead of done again, and lineage is a walk. A folder is written beside its
place and renamed into it: it is there whole or not at all.
"""

import errno
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from demur.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from torch import Tensor

_KIND = re.compile(r"[a-z][a-z0-9_-]*")
_HASH = re.compile(r"[0-9a-f]{32}")
_RECORD, _TENSORS = "record.json", "tensors.safetensors"
# What may change a number: kept with every record, not part of its key.
_VERSIONED = ("demur", "torch", "transformers", "numpy", "scipy", "safetensors")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True, order=True)
class Ref:
    """The name of a record: `kind/hash`.

    Attributes:
        kind: Lower case, for instance "direction".
        hash: 32 hexadecimal digits.
    """

    kind: str
    hash: str

    def __post_init__(self) -> None:
        # Both become folder names, and refs come from files and command lines.
        if not _KIND.fullmatch(self.kind) or not _HASH.fullmatch(self.hash):
            raise ConfigError(
                f"`{self.kind}/{self.hash}` is not the name of a record",
                "write kind/hash, like direction/0123456789abcdef0123456789abcdef",
            )

    def __str__(self) -> str:
        return f"{self.kind}/{self.hash}"

    @classmethod
    def parse(cls, text: str) -> "Ref":
        """Read `kind/hash` back.

        Raises:
            ConfigError: The text is no ref.
        """
        kind, _, digest = text.partition("/")
        return cls(kind, digest)


@dataclass(frozen=True, slots=True)
class Record:
    """What was done, to what, with which versions, and what came out.

    Attributes:
        settings: What the caller chose; part of the key.
        inputs: The records it was made from; part of the key.
        versions: Of Python and of packages that numbers depend on.
        summary: Results small enough for JSON.
    """

    kind: str
    settings: Mapping[str, Any]
    inputs: tuple[Ref, ...]
    versions: Mapping[str, str]
    summary: Mapping[str, Any]


def _plain(value: object, *, at: str) -> Any:
    """Reduce to JSON in one way only; what JSON would bend (NaN, number keys) is refused."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str(key): _plain(item, at=f"{at}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item, at=f"{at}[{index}]") for index, item in enumerate(value)]
    raise ConfigError(
        f"{at} is {value!r:.80}, which JSON cannot hold",
        "give None, booleans, finite numbers, text, lists, and mappings with text as keys",
    )


def _canonical(value: object, *, at: str) -> bytes:
    plain = _plain(value, at=at)
    try:
        return json.dumps(
            plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        ).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{at} holds half of a surrogate pair", "give valid text") from error


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Turn what the disk says into a `StoreError`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        if error.errno in _FULL:
            raise StoreError(
                f"no space left to write {place}: {error.strerror}",
                "free some and run again; nothing half-written was left behind",
            ) from error
        raise StoreError(
            f"{place} cannot be written: {error.strerror}", "check the path and its permissions"
        ) from error


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut; where folders cannot be opened, skip."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write a file so that readers see the old one or the new one, never a part.

    Args:
        path: Where; its folder is made if need be. A symbolic link is followed.
        data: Text is written as UTF-8, with line ends as they are.

    Raises:
        StoreError: The disk is full, the path is no regular file, or cannot be written. The old
            file is then untouched.
    """
    encoded = data.encode("utf-8") if isinstance(data, str) else data
    with _writing(path):
        target = path.resolve()
        if target.exists() and not target.is_file():
            raise StoreError(f"{path} is not a regular file", "name another path")
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name[:100]}.{uuid4().hex}")
        try:
            _write(draft, encoded)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
        _sync_folder(target.parent)


@dataclass(frozen=True, slots=True)
class Store:
    """Records under one folder, which is made when the first is put.

    Attributes:
        root: The folder.
    """

    root: Path

    def key(self, kind: str, settings: Mapping[str, Any], inputs: Sequence[Ref] = ()) -> Ref:
        """Name the record that these settings and inputs make, whether it exists or not.

        Raises:
            ConfigError: Settings hold what JSON cannot (NaN, tensors, keys that are not text), or
                `kind` is not a lower-case word.
        """
        made_of = {"kind": kind, "settings": settings, "inputs": [str(ref) for ref in inputs]}
        return Ref(kind, _digest(_canonical(made_of, at="record")))

    def _folder(self, ref: Ref) -> Path:
        return self.root / ref.kind / ref.hash

    def put(
        self,
        kind: str,
        settings: Mapping[str, Any],
        inputs: Sequence[Ref] = (),
        *,
        summary: Mapping[str, Any],
        tensors: "Mapping[str, Tensor] | None" = None,
    ) -> Ref:
        """Write a record; if it exists, that one stays, whoever writes it first.

        Args:
            kind: Of the record.
            settings: What the caller chose.
            inputs: Records that it was made from.
            summary: Results, as JSON.
            tensors: Results, as named tensors of any shape and device; dtype is kept.

        Raises:
            ConfigError: Settings or summary hold what JSON cannot.
            StoreError: The disk is full or cannot be written, or the record exists but is damaged.
        """
        ref = self.key(kind, settings, inputs)
        if self.get(ref) is not None:
            return ref
        body: dict[str, Any] = {
            "kind": kind,
            "settings": _plain(settings, at="settings"),
            "inputs": [str(one) for one in inputs],
            "versions": _versions(),
            "summary": _plain(summary, at="summary"),
            "tensors": None,
        }
        blob = None
        if tensors:
            blob = _serialised(tensors)
            body["tensors"] = {"bytes": len(blob), "blake2b": _digest(blob)}
        body["blake2b"] = _digest(_canonical(body, at="record"))
        text = json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)

        folder = self._folder(ref)
        draft = folder.with_name(f".{ref.hash}.{uuid4().hex}")
        with _writing(folder):
            try:
                draft.mkdir(parents=True)
                if blob is not None:
                    _write(draft / _TENSORS, blob)
                _write(draft / _RECORD, text.encode("utf-8"))
                _sync_folder(draft)
                try:
                    draft.rename(folder)
                except OSError:
                    if not folder.exists():
                        raise
                    # Someone else was first, with the same content by construction.
                _sync_folder(folder.parent)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        return ref

    def _read(self, ref: Ref) -> dict[str, Any] | None:
        folder = self._folder(ref)
        path = folder / _RECORD
        if not folder.is_dir():
            return None
        try:
            body = json.loads(path.read_bytes())
            # Anything missing or of another type is damage too.
            stated = body.pop("blake2b")
            inputs = [Ref.parse(text) for text in body["inputs"]]
            found = self.key(body["kind"], body["settings"], inputs)
            intact = found == ref and stated == _digest(_canonical(body, at="record"))
        except OSError as error:
            raise _damaged(path, folder, f"cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise _damaged(path, folder, "is cut short or garbled") from error
        if not intact:
            raise _damaged(path, folder, "was changed after it was written")
        return body

    def get(self, ref: Ref) -> Record | None:
        """Read a record, None if there is none.

        Raises:
            StoreError: It is cut short, garbled, or was changed after it was written.
        """
        body = self._read(ref)
        if body is None:
            return None
        inputs = tuple(Ref.parse(text) for text in body["inputs"])
        return Record(ref.kind, body["settings"], inputs, body["versions"], body["summary"])

    def tensors(self, ref: Ref) -> "dict[str, Tensor]":
        """Read a record's tensors onto the CPU; empty if it was put without.

        Raises:
            StoreError: There is no such record, or its files are damaged.
        """
        body = self._read(ref)
        if body is None:
            raise _absent(ref, self.root)
        if body["tensors"] is None:
            return {}
        from safetensors.torch import load

        folder = self._folder(ref)
        path = folder / _TENSORS
        try:
            blob = path.read_bytes()
        except OSError as error:
            raise _damaged(path, folder, f"cannot be read: {error.strerror}") from error
        stated = body["tensors"]
        if len(blob) != stated["bytes"]:
            raise _damaged(path, folder, f"has {len(blob)} bytes, not {stated['bytes']}")
        if _digest(blob) != stated["blake2b"]:
            raise _damaged(path, folder, "was changed after it was written")
        return load(blob)

    def find(self, kind: str, /, **settings: Any) -> list[Ref]:
        """List the records of a kind whose settings include these, in order of their names.

        Raises:
            StoreError: A record of the kind is damaged.
        """
        wanted = {key: _plain(value, at=key) for key, value in settings.items()}
        folder = self.root / kind
        names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        refs = [Ref(kind, name) for name in names if _HASH.fullmatch(name)]
        found = []
        for ref in refs:
            body = self._read(ref)
            has = body["settings"] if body else {}
            if all(key in has and has[key] == value for key, value in wanted.items()):
                found.append(ref)
        return found

    def lineage(self, ref: Ref) -> dict[Ref, Record]:
        """Collect a record and all that it was made from, nearest first.

        Raises:
            StoreError: One of them is missing or damaged.
        """
        found: dict[Ref, Record] = {}
        ahead = [ref]
        for one in ahead:
            if one in found:
                continue
            record = self.get(one)
            if record is None:
                raise _absent(one, self.root)
            found[one] = record
            ahead.extend(record.inputs)
        return found


def _serialised(tensors: "Mapping[str, Tensor]") -> bytes:
    """Written by us rather than by safetensors, so that a full disk reads the same everywhere."""
    from safetensors.torch import save

    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        # safetensors refuses tensors that share memory; only those are copied.
        place = plain.untyped_storage().data_ptr()
        ready[name] = plain.clone() if place in seen else plain
        seen.add(place)
    return save(ready)


def _damaged(path: Path, folder: Path, what: str) -> StoreError:
    return StoreError(f"{path} {what}", f"delete the folder {folder} and run again")


def _absent(ref: Ref, root: Path) -> StoreError:
    return StoreError(f"there is no record {ref} in {root}", "run the step that makes it again")

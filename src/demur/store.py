"""Records on disk, found by what made them: JSON and safetensors, nothing that runs code on load.

A record lies in `<root>/<kind>/<hash>/`; the hash is over kind, settings and inputs, so that the
same work is found instead of done again, and lineage is a walk. A folder is written beside its
place and renamed into it: it is there whole or not at all.

Everything that demur writes goes through here: a draft in the same folder, fsync, rename, fsync of
the folder. What a killed writer leaves is a draft, `.NAME.` and 32 hexadecimal digits, which no
reader takes for a result and later writers clear away.
"""

import errno
import json
import logging
import math
import os
import platform
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from demur.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_KIND = re.compile(r"[a-z][a-z0-9_-]*")
_HASH = re.compile(r"[0-9a-f]{32}")
_RECORD, _TENSORS = "record.json", "tensors.safetensors"
# What may change a number: kept with every record, not part of its key.
_VERSIONED = ("demur", "torch", "transformers", "numpy", "scipy", "safetensors")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# A folder that may be written to but not read, and file systems that cannot sync one.
_NO_SYNC = {errno.EACCES, errno.EINVAL, errno.EBADF, errno.ENOTSUP}
_DRAFT = re.compile(r"\.(.{1,50})\.[0-9a-f]{32}", re.DOTALL)
_STALE = 3600.0  # Seconds; a file is written in less, and one that was not is written again.


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
    """Make a rename in this folder survive a power cut; where folders cannot be synced, skip."""
    if os.name == "nt":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that they survive a power cut."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in reversed(missing):
        _sync_folder(one.parent)


def _draft_of(target: Path) -> Path:
    return target.with_name(f".{target.name[:50]}.{uuid4().hex}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _age(draft: Path) -> float:
    """Seconds since it was last written to; also of one from the future, as clocks are set."""
    files = [draft, *draft.iterdir()] if draft.is_dir() else [draft]
    return min(abs(time.time() - one.stat().st_mtime) for one in files)


def _forget_drafts(target: Path, *, older: float = _STALE) -> None:
    """Clear away what killed writers of `target` left; one that lives is recent, or tries again."""
    with suppress(OSError):
        for one in os.scandir(target.parent):
            draft = _DRAFT.fullmatch(one.name)
            if draft is None or draft[1] != target.name[:50]:
                continue
            with suppress(OSError):
                if _age(Path(one.path)) >= older:
                    _remove(Path(one.path))


def forget_drafts(folder: Path) -> None:
    """Clear away every draft of a folder and in it; only for who `held` it before."""
    _forget_drafts(folder, older=0.0)
    for path, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            if _DRAFT.fullmatch(name):
                _remove(Path(path) / name)
        folders[:] = [name for name in folders if not _DRAFT.fullmatch(name)]


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
        for again in (True, False):
            _make_folder(target.parent)
            _forget_drafts(target)
            draft = _draft_of(target)
            try:
                _write(draft, encoded)
                draft.replace(target)
                break
            except FileNotFoundError:  # Somebody took the draft for a dead writer's.
                if not again:
                    raise
            finally:
                _remove(draft)
        _sync_folder(target.parent)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` at the end, or is gone after an error.

    Args:
        folder: It must not exist, or be empty.

    Raises:
        StoreError: It cannot be made, or there is something in it by the end.
    """
    draft = _draft_of(folder)
    try:
        with _writing(folder):
            _make_folder(folder.parent)
            _forget_drafts(folder)
            draft.mkdir()
        yield draft
        with _writing(folder):
            _sync_tree(draft)
            os.replace(draft, folder)  # noqa: PTH105 - onto an empty folder, which Path.rename forbids on Windows.
            _sync_folder(folder.parent)
    finally:
        _remove(draft)


def _sync_tree(folder: Path) -> None:
    for path, _, files in os.walk(folder):
        for name in files:
            # Read and write: Windows syncs no file that is open to be read.
            handle = os.open(Path(path) / name, os.O_RDWR)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        _sync_folder(Path(path))


@contextmanager
def held(lock: Path, work: str, *, wait: float = 0.0) -> Iterator[None]:
    """Keep others from the same work meanwhile; the hold ends with the process, however it ends.

    Args:
        lock: A file that stands for the work; it is made, and goes at the end.
        work: What it is, such as "audit".
        wait: Seconds to wait for another to be done.

    Raises:
        StoreError: Another process is at it, or the file cannot be made.
    """
    from filelock import FileLock, Timeout

    until = time.monotonic() + wait
    with _writing(lock):
        _make_folder(lock.parent)
        own = FileLock(lock, timeout=0)
        while not own.is_locked:
            try:
                own.acquire()
            except Timeout as error:
                if time.monotonic() >= until:
                    raise StoreError(
                        f"another {work} is at work in {lock.parent}",
                        "wait until it is done, or choose another place with `--out`",
                    ) from error
                time.sleep(0.1)
            except NotImplementedError:
                log.warning(
                    "%s lies on a file system without locks: nothing keeps another %s out of it",
                    lock.parent,
                    work,
                )
                break
    try:
        yield
    finally:
        if own.is_locked:
            with suppress(OSError):  # Who waits for this very file looks for the name again.
                lock.unlink()
        own.release()


# JSON, and files in pairs -------------------------------------------------------------------------


def strict_json(text: str | bytes) -> Any:
    """Read JSON of which every reader makes the same: no key twice, no NaN, no infinity.

    Raises:
        ValueError: It is something else, or nested beyond what a reader takes.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = Counter(key for key, _ in pairs)
            twice = next(key for key, count in keys.items() if count > 1)
            raise ValueError(f"the key {twice!r:.60} stands in it twice")
        return found

    def no_number(name: str) -> Any:
        raise ValueError(f"{name} stands in it, which is no number of JSON")

    def finite(digits: str) -> float:
        found = float(digits)
        if not math.isfinite(found):
            raise ValueError(f"the number {digits[:30]} is too large")
        return found

    try:
        return json.loads(
            text, object_pairs_hook=unique, parse_constant=no_number, parse_float=finite
        )
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def known_version(told: object, path: Path, *, what: str, newest: int, again: str) -> None:
    """See that a file is of a version that this demur reads.

    Args:
        told: The version that the file says, as a number.
        path: Of the file, for errors.
        what: It holds, such as "a guard".
        newest: The version that this demur writes; older ones do not exist yet.
        again: The command that writes it.

    Raises:
        StoreError: It is newer, or none.
    """
    if isinstance(told, int) and not isinstance(told, bool):
        if told == newest:
            return
        if told > newest:
            raise StoreError(
                f"{path} was made by a newer demur: it is {what} of version {told}, and this one "
                f"reads {newest}",
                f"update demur (`pip install -U demur`), or make it again: `{again}`",
            )
    said = "does not say its version" if told is None else f"is of version {told!r:.40}"
    raise StoreError(f"{path} {said}: it is not {what} of version {newest}", f"make it: `{again}`")


def known_format(
    told: object, path: Path, *, name: str, what: str, newest: int, again: str
) -> None:
    """The same of a format that is written as `name-1`."""
    head, _, number = str(told).rpartition("-")
    if isinstance(told, str) and head == name and number.isascii() and number.isdecimal():
        known_version(int(number), path, what=what, newest=newest, again=again)
        return
    said = "does not say its format" if told is None else f"is of the format {told!r:.40}"
    raise StoreError(f"{path} {said}, not `{name}-{newest}`", f"{what} is made by `{again}`")


_CARD = "card"  # In the header of the tensors: digest of the sidecar.
_SEAL = "blake2b"  # In the sidecar: digest of the file of tensors.


def sealed(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A record with a digest of the rest in it, as `blake2b`.

    Raises:
        ConfigError: It holds what JSON cannot.
    """
    plain = _plain(dict(meta), at="record")
    return {**plain, _SEAL: _digest(_canonical(plain, at="record"))}


def unsealed(meta: Mapping[str, Any], path: Path, *, again: str) -> dict[str, Any]:
    """A record without its digest, which must be right; one from before there were any as it is.

    Raises:
        StoreError: The record was changed after it was written.
    """
    rest = {key: value for key, value in meta.items() if key != _SEAL}
    if _SEAL in meta and meta[_SEAL] != _digest(_canonical(rest, at="record")):
        raise StoreError(f"{path} was changed after it was written", again)
    return rest


def file_digests(folder: Path, *, of: Sequence[str] | None = None) -> dict[str, str]:
    """Digests of a folder's files by name, those in folders below with `/`.

    Args:
        folder: The folder.
        of: Of these alone, as far as they are there.
    """
    found: dict[str, str] = {}
    every = sorted(folder.rglob("*")) if of is None else [folder / name for name in of]
    for path in (one for one in every if one.is_file()):
        digest = blake2b(digest_size=16)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        found[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return found


def write_files(
    path: Path,
    tensors: "Mapping[str, Tensor]",
    meta: Mapping[str, Any],
    *,
    head: Mapping[str, str],
    indent: int = 1,
) -> None:
    """Write tensors and beside them `<path stem>.json`, each with a digest of the other.

    Args:
        path: Ends in `.safetensors`.
        tensors: By name.
        meta: What the other file, the sidecar, holds.
        head: What the header of the tensors' file holds beside the digest.
        indent: Of the sidecar.

    Raises:
        ConfigError: `meta` holds what JSON cannot.
        StoreError: A file could not be written.
    """
    from safetensors.torch import save

    plain = _plain(dict(meta), at="sidecar")
    card = _digest(_canonical(plain, at="sidecar"))
    blob = _ordered(save(dict(tensors), metadata={**head, _CARD: card}))
    text = json.dumps({**plain, _SEAL: _digest(blob)}, indent=indent, allow_nan=False)
    # The file that a user names comes last: once it is there, so is all of it.
    atomic_write(path.with_suffix(".json"), text + "\n")
    atomic_write(path, blob)


def _ordered(blob: bytes) -> bytes:
    """The same file whoever writes it: safetensors puts metadata into any order."""
    length = int.from_bytes(blob[:8], "little")
    head = json.loads(blob[8 : 8 + length])
    head["__metadata__"] = dict(sorted(head["__metadata__"].items()))
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # Tensors begin at a multiple of eight.
    return len(text).to_bytes(8, "little") + text + blob[8 + length :]


def read_files(path: Path, *, what: str, again: str) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """Read tensors and their sidecar back.

    A pair from before there were digests is taken as it is.

    Args:
        path: The file of tensors.
        what: It holds, such as "guard".
        again: What the hint of an error says.

    Returns:
        Tensors by name, and the sidecar without its digest.

    Raises:
        StoreError: A file is missing or damaged, was changed after it was written, or the two were
            not written together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    card = path.with_suffix(".json")
    try:
        blob = path.read_bytes()
        meta = strict_json(card.read_text(encoding="utf-8"))
        if not isinstance(meta, dict):
            raise ValueError(f"{card.name} is no object")
        head = _header(blob)
        tensors = load(blob)
        digest = meta.pop(_SEAL, None)
        if head.get(_CARD) is None and digest is None:
            return tensors, meta
        if digest != _digest(blob):
            raise ValueError("one of them was changed after it was written, or is of another pair")
        if head.get(_CARD) != _digest(_canonical(meta, at="sidecar")):
            raise ValueError(f"{card.name} was changed after it was written")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise StoreError(
            f"no {what} can be read from {path} and {card.name}: {said}", again
        ) from error
    return tensors, meta


def _header(blob: bytes) -> Mapping[str, Any]:
    """The metadata of a safetensors file; none if there is no header, which its reader says."""
    length = int.from_bytes(blob[:8], "little")
    if length > len(blob) - 8:
        return {}
    found = strict_json(blob[8 : 8 + length])
    own = found.get("__metadata__") if isinstance(found, dict) else None
    return own if isinstance(own, dict) else {}


# The store ----------------------------------------------------------------------------------------


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
        with _writing(folder):
            for again in (True, False):
                _make_folder(folder.parent)
                _forget_drafts(folder)
                draft = _draft_of(folder)
                try:
                    draft.mkdir()
                    if blob is not None:
                        _write(draft / _TENSORS, blob)
                    _write(draft / _RECORD, text.encode("utf-8"))
                    _sync_folder(draft)
                    draft.rename(folder)
                    break
                except OSError as error:
                    if folder.exists():
                        break  # Someone else was first, with the same content by construction.
                    if not (again and isinstance(error, FileNotFoundError)):
                        raise
                finally:
                    _remove(draft)
            _sync_folder(folder.parent)
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

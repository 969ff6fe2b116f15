"""Prompt sets: loaded whole or not at all, split without leaks, compared by content.

Two prompts are near-duplicates where they are equal after `normalise`, or where the sets of their
words have a Jaccard index of 0.6 or more. A split keeps near-duplicates on one side, so that a
direction is never tested on a rewording of what it was fitted on.
"""

import csv
import io
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from hashlib import blake2b, sha256
from importlib.resources import files
from itertools import combinations
from math import ceil
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any, Literal, NoReturn
from urllib.parse import parse_qsl

import numpy as np

from demur.errors import (
    ConfigError,
    MissingExtraError,
    OverlapError,
    PromptFileError,
    TooFewPromptsError,
    UnknownNameError,
)
from demur.public_sets import Part, PublicSet, adapt, find, public_sets

PROMPT_COLUMNS = (
    "prompt",
    "text",
    "instruction",
    "goal",
    "behavior",
    "question",
    "forbidden_prompt",
    "template",
)
MAX_BYTES = 100_000
_SHOWN = 20
_MOST_BYTES = 1 << 31  # Of a file, and of what a Parquet file unpacks to.

# A word; where a script writes without spaces (Han, kana) every character counts as one.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
_HUB = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?P<rest>(?:[@:][^@:]+)*)")
_HALF = re.compile("[\ud800-\udfff]")
_COMMIT = re.compile(r"@([0-9a-f]{40})/")
_FAMILY = ("pair", "quad", "core")
# Characters that leave no mark (Unicode's Default_Ignorable_Code_Point): two texts that differ in
# them alone read the same.
_UNSEEN = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)
_PACKED = {b"\x1f\x8b": "gzip", b"PK\3\4": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz"}
_PACKED_SUFFIXES = (".gz", ".zip", ".zst", ".xz", ".bz2", ".7z", ".tar", ".tgz", ".rar")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, and what its file says of it.

    Attributes:
        text: What the user says, before any chat template.
        label: Its class, for instance "harmful".
        category: Its topic.
        split: The part that its author put it in.
        id: Its name in the file.
        pair: Shared by prompts that belong together, such as a harmful one and its harmless twin.
        quad: Shared by two pairs in which the same words change sides.
        core: Shared by pairs that say the same in several formats.
        kind: How it was made, for instance "crossed" or "near".
        format: "imperative", "question" or "indirect".
    """

    text: str
    label: str | None = None
    category: str | None = None
    split: str | None = None
    id: str | None = None
    pair: str | None = None
    quad: str | None = None
    core: str | None = None
    kind: str | None = None
    format: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Where prompts came from.

    Attributes:
        where: Packaged name, path or hub id; empty for prompts made in memory.
        licence: Of a public set, its own; else as the rows state it, several joined by "; ".
        revision: Of a hub dataset: the commit where it is known, else what was asked for.
    """

    kind: Literal["packaged", "file", "hub", "memory"]
    where: str
    licence: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts in order, with their source.

    Attributes:
        name: As it reads in a report.
        prompts: In the order of the file.
        source: Where they came from.
        fingerprint: Hash of the texts in order, exactly as a model gets to see them.
    """

    name: str
    prompts: tuple[Prompt, ...]
    source: Source
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        digest = blake2b(digest_size=16)
        for prompt in self.prompts:
            data = prompt.text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "big") + data)
        object.__setattr__(self, "fingerprint", digest.hexdigest())

    @classmethod
    def of(cls, texts: Iterable[str], *, name: str = "memory") -> "PromptSet":
        """Make a set of bare texts."""
        return cls(name, tuple(Prompt(text) for text in texts), Source("memory", ""))

    @property
    def texts(self) -> list[str]:
        """The prompts' texts, in order."""
        return [prompt.text for prompt in self.prompts]

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    def _only(self, indices: Iterable[int], *, name: str | None = None) -> "PromptSet":
        kept = tuple(self.prompts[index] for index in sorted(indices))
        return replace(self, prompts=kept, name=name or self.name)

    def where(self, **fields: str | None) -> "PromptSet":
        """Keep the prompts whose fields equal those given: `prompts.where(label="harmful")`.

        Raises:
            UnknownNameError: A prompt has no such field, or no prompt has that value in it.
            TooFewPromptsError: Each value occurs, but never together.
        """
        for key, wanted in fields.items():
            if key not in Prompt.__slots__:
                raise UnknownNameError.among(Prompt.__slots__, kind="prompt field", name=key)
            found = {getattr(prompt, key) for prompt in self.prompts}
            if wanted not in found:
                raise _no_such_value(self.name, key, str(wanted), found)
        kept = [
            index
            for index, prompt in enumerate(self.prompts)
            if all(getattr(prompt, key) == wanted for key, wanted in fields.items())
        ]
        asked = "&".join(f"{key}={wanted}" for key, wanted in fields.items())
        if not kept:
            raise TooFewPromptsError(f"no prompt of {self.name} is {asked}", "ask for less at once")
        return self._only(kept, name=f"{self.name}?{asked}" if asked else self.name)

    def take(self, n: int, seed: int) -> "PromptSet":
        """Draw `n` prompts without replacement, kept in order; fewer are a subset of more.

        Raises:
            TooFewPromptsError: There are fewer than `n`.
        """
        if not 0 <= n <= len(self):
            raise TooFewPromptsError(
                f"{self.name} has {len(self)} prompts, {n} were asked for",
                f"ask for {len(self)} or fewer",
            )
        order = sorted(range(len(self)), key=lambda i: (_rank(seed, self.prompts[i].text), i))
        return self._only(order[:n])


@dataclass(frozen=True, slots=True)
class Overlap:
    """Two prompts that are the same, or nearly.

    Attributes:
        jaccard: Words they share over words they have; 1 for prompts equal after `normalise`.
    """

    a: Prompt
    b: Prompt
    jaccard: float


def _rank(seed: int, key: str) -> bytes:
    """Order by content and seed: neither the file's order nor a library's generator enters."""
    return blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _listed(names: Sequence[str], most: int = _SHOWN) -> str:
    """The first of them, each cut: a file may hold thousands, or one as long as a book."""
    shown = [name if len(name) <= 80 else f"{name[:79]}…" for name in names[:most]]
    return ", ".join([*shown, *(["..."] if len(names) > most else [])])


def _no_such_value(name: str, key: str, wanted: str, found: set[str | None]) -> UnknownNameError:
    values = sorted(value for value in found if value is not None)
    near = get_close_matches(wanted, values, n=1)
    some = f"there are: {_listed(values, 10)}"
    return UnknownNameError(
        f"no prompt of {name} has the {key} `{wanted}`",
        f"did you mean `{near[0]}`?" if near else some if values else f"it gives no {key} at all",
    )


# Loading


@dataclass(slots=True)
class _Table:
    """Rows as a reader found them, by number, and what is wrong with others."""

    unit: Literal["line", "item", "row"]
    rows: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(key for _, row in self.rows for key in row))


def _kind(value: object) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ; `json` would keep the last of equal ones without a word."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key `{twice[:80]}` is given twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _json(text: str) -> Any:
    """Parse JSON; ValueError says what is wrong in words for a user."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column" if "\n" in text else "column"
        raise ValueError(f"not JSON: {error.msg} at {place} {error.colno}") from error
    except ValueError as error:
        if "digits" in str(error):
            raise ValueError("a number of thousands of digits") from error
        raise
    except RecursionError as error:
        raise ValueError("not JSON that can be read: nested too deeply") from error


def _lines(data: bytes, table: _Table) -> Iterator[tuple[int, str]]:
    r"""Decode line by line, split at \n alone: JSON may hold U+2028, which `splitlines` splits."""
    for number, line in enumerate(data.split(b"\n"), start=1):
        try:
            yield number, line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            table.bad.append((number, f"byte {error.start + 1} is not UTF-8"))


def _read_jsonl(data: bytes) -> _Table:
    table = _Table("line")
    for number, line in _lines(data, table):
        if not line.strip():
            continue
        try:
            row = _json(line)
        except ValueError as error:
            table.bad.append((number, str(error)))
            continue
        if isinstance(row, dict):
            table.rows.append((number, row))
        else:
            table.bad.append((number, f"{_kind(row)}, not an object"))
    return table


def _read_txt(data: bytes) -> _Table:
    table = _Table("line")
    for number, line in _lines(data, table):
        text = line.strip()
        if "\r" in text:
            # Old Macs end lines so: the file would come out as one prompt.
            table.bad.append((number, "holds a carriage return: end lines with a line feed"))
        elif text:
            table.rows.append((number, {"prompt": text}))
    return table


def _read_json(data: bytes) -> _Table:
    decoding = _Table("line")
    text = "\n".join(line for _, line in _lines(data, decoding))
    if decoding.bad or not text.strip():
        return decoding
    try:
        items = _json(text)
    except ValueError as error:
        more = ". One object a line? Then call it .jsonl" if "Extra data" in str(error) else ""
        return _Table("line", bad=[(1, f"{error}{more}")])
    if not isinstance(items, list):
        return _Table("line", bad=[(1, f"{_kind(items)}, not a list of objects")])
    table = _Table("item")
    for number, item in enumerate(items, start=1):
        if isinstance(item, str | dict):
            table.rows.append((number, {"prompt": item} if isinstance(item, str) else item))
        else:
            table.bad.append((number, f"{_kind(item)}, not an object"))
    return table


def _read_csv(data: bytes, *, delimiter: str = ",") -> _Table:
    table = _Table("line")
    text = "\n".join(line for _, line in _lines(data, table))
    if table.bad:
        return table
    # Strict, or a stray quote would swallow the lines that follow it without a word.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    end = 0
    try:
        for cells in reader:
            start, end = end + 1, reader.line_num
            if not cells:
                continue
            if header is None:
                header = cells
                twice = [name for name, count in Counter(header).items() if count > 1]
                if twice:
                    table.bad.append((start, f"two columns are called `{twice[0]}`"))
            elif len(cells) != len(header):
                table.bad.append((start, f"{len(cells)} cells under {len(header)} column names"))
            else:
                # An empty cell is how CSV says that there is no value.
                table.rows.append(
                    (start, {k: v or None for k, v in zip(header, cells, strict=True)})
                )
    except csv.Error as error:
        table.bad.append((end + 1, f"{error}; nothing after it could be read"))
    return table


def _read_tsv(data: bytes) -> _Table:
    return _read_csv(data, delimiter="\t")


def _read_parquet(data: bytes) -> _Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError.needed(extra="parquet", module="pyarrow") from error
    rows: list[dict[str, Any]] = []
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        names = Counter(file.schema_arrow.names)
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            return _Table("row", bad=[(0, f"two columns are called `{twice[0]}`")])
        # A few kilobytes may unpack to any size, so that it is done in parts and counted.
        groups = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
        size, step = 0, min(1024, max(1, (1 << 28) // max([1, *groups])))
        if max([0, *groups]) > _MOST_BYTES:
            size = max(groups)
        for batch in file.iter_batches(step) if not size else ():
            part = batch.to_pylist()
            # What rows take here; equal texts are one in the file, and each its own in Python.
            size += batch.nbytes + (256 + 64 * batch.num_columns) * len(part)
            size += sum(len(x) for row in part for x in row.values() if isinstance(x, str | bytes))
            if size > _MOST_BYTES:
                break
            rows += part
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        where = f" from row {len(rows) + 1} on" if rows else ""
        return _Table("row", bad=[(0, f"not Parquet that can be read{where}: {str(error)[:300]}")])
    if size > _MOST_BYTES:
        return _Table("row", bad=[(0, f"unpacks to more than {_MOST_BYTES >> 30} GiB")])
    return _Table("row", list(enumerate(rows, start=1)))


_READERS: dict[str, Callable[[bytes], _Table]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}


def packaged() -> dict[str, str]:
    """Names of the prompt sets that ship with demur, and their paths inside the package."""
    folder = files("demur") / "data"
    names = (entry.name for entry in folder.iterdir() if entry.name.endswith(".jsonl"))
    return {name.removesuffix(".jsonl"): f"data/{name}" for name in sorted(names)}


def _no_such_file(path: Path) -> PromptFileError:
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = [str(path.parent / name) for name in get_close_matches(path.name, beside, n=1)]
    near += get_close_matches(str(path), [*packaged(), *public_sets()], n=1)
    ways = (
        f"name a file, a hub dataset (org/name), a packaged set: {', '.join(packaged())}; "
        f"or a public one: {', '.join(public_sets())}"
    )
    return PromptFileError(
        f"there is no file {path}", f"did you mean `{near[0]}`?" if near else ways
    )


def _from_file(path: Path) -> _Table:
    suffix = path.suffix.lower()
    try:
        status = path.stat()
        mode = status.st_mode
        inside = [p.name for p in path.iterdir()] if S_ISDIR(mode) else []
        wanted = S_ISREG(mode) and suffix in _READERS and status.st_size <= _MOST_BYTES
        data = path.read_bytes() if wanted else b""
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _no_such_file(path) from error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise PromptFileError(f"{path} cannot be read: {why}", "check its permissions") from error
    if S_ISDIR(mode):
        usable = sorted(name for name in inside if Path(name).suffix.lower() in _READERS)
        raise PromptFileError(
            f"{path} is a folder", f"name a file in it{': ' if usable else ''}{', '.join(usable)}"
        )
    if not S_ISREG(mode):
        raise PromptFileError(f"{path} is not a regular file", "save the prompts to a file")
    if suffix not in _READERS:
        unpack = "unpack it first; " if suffix in _PACKED_SUFFIXES else ""
        raise PromptFileError(
            f"{path} is of no known format", f"{unpack}demur reads {', '.join(_READERS)}"
        )
    if status.st_size > _MOST_BYTES:
        raise PromptFileError(
            f"{path} has {status.st_size} bytes, more than {_MOST_BYTES >> 30} GiB", "split it up"
        )
    if suffix != ".parquet":
        _check_text(path, data)
    return _READERS[suffix](data.removeprefix(b"\xef\xbb\xbf"))


def _check_text(path: Path, data: bytes) -> None:
    """Name what a file is instead of text, where its first bytes tell."""
    packed = next((kind for start, kind in _PACKED.items() if data.startswith(start)), None)
    if packed:
        raise PromptFileError(f"{path} is a {packed} archive, whatever its name", "unpack it first")
    if data.startswith(b"PAR1") and data.endswith(b"PAR1"):
        raise PromptFileError(f"{path} is Parquet, whatever its name", "call it .parquet")
    head = data[:4096]
    places = [head[i::4].count(0) / max(1, len(head) // 4) for i in range(4)]
    encoding = None
    if data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")) or sum(x > 0.5 for x in places) > 2:
        encoding = "UTF-32"
    elif (
        data.startswith((b"\xff\xfe", b"\xfe\xff"))
        or min(places[::2]) > 0.5
        or min(places[1::2]) > 0.5
    ):
        encoding = "UTF-16"
    if encoding:
        raise PromptFileError(f"{path} is {encoding}, not UTF-8", "save it as UTF-8")


def _from_hub(spec: re.Match[str], part: str | None) -> tuple[_Table, Source]:
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError.needed(extra="hub", module="datasets") from error
    options = {text[0]: text[1:] for text in re.findall(r"[@:][^@:]+", spec["rest"])}
    revision, config = options.get("@"), options.get(":")
    try:
        data = load_dataset(spec["id"], config, revision=revision, split=part)
    except Exception as error:  # Its own, the hub's, httpx's and fsspec's: no common base.
        raise PromptFileError(
            f"the dataset {spec[0]} could not be loaded: {error}",
            "write org/name, org/name:config, org/name@revision or org/name?split=train; "
            "a gated one needs `hf auth login`",
        ) from error
    if isinstance(data, dict):
        if len(data) > 1:
            raise PromptFileError(
                f"the dataset {spec[0]} has the splits {', '.join(map(str, data))}",
                f"name one: {spec[0]}?split={next(iter(data))}",
            )
        data = next(iter(data.values()))
    # `datasets` keeps the addresses that it read from, with the commit in each.
    read_from = " ".join(getattr(data.info, "download_checksums", None) or {})
    commit = _COMMIT.search(read_from)
    where = f"{spec['id']}:{config}" if config else spec["id"]
    rows = [dict(row) for row in data]
    return _Table("row", list(enumerate(rows, start=1))), Source(
        "hub", where, revision=commit[1] if commit else revision
    )


def _from_public(public: PublicSet, part: Part | None) -> tuple[_Table, Source]:
    """Fetch a public set, or one part of it, and map it to demur's columns."""
    table, sources, before = _Table("row"), [], 0
    for one in [part] if part else [each for each in public.parts if each.default]:
        address = _HUB.fullmatch(public.address(one))
        assert address, public.address(one)
        copy = f"a copy does as well: {public.local(one)}"
        try:
            fetched, source = _from_hub(address, one.split)
        except MissingExtraError as error:
            raise MissingExtraError(error.fact, f"{error.hint}; {copy}") from error
        except PromptFileError as error:
            way = public.access or "see whether the hub can be reached"
            raise PromptFileError(error.fact, f"{way}; {copy}") from error
        kept = _adapted(fetched, public, one, split=one.split)
        table.rows += [(before + number, row) for number, row in kept.rows]
        before += len(fetched.rows)
        sources.append(source)
    places = {source.where for source in sources}
    revisions = dict.fromkeys(source.revision for source in sources if source.revision)
    return table, Source(
        "hub",
        places.pop() if len(places) == 1 else public.hub,
        licence=public.licence,
        revision="; ".join(revisions) or None,
    )


def _adapted(
    table: _Table,
    public: PublicSet,
    part: Part | None,
    *,
    split: str | None = None,
    path: Path | None = None,
) -> _Table:
    """Upstream's rows under demur's columns, checked against what the table of sets pins."""
    if path:
        pinned = public.layout(table.columns).sha256
        found = sha256(path.read_bytes()).hexdigest() if pinned else None
        if found and found not in pinned:
            raise PromptFileError(
                f"{path} has the sha256 {found}, none that is known of {public.name}: "
                f"{', '.join(pinned)}",
                "get upstream's file again, or load it without `as=` and name its column",
            )
    mapped = adapt(public, [row for _, row in table.rows], part=part, split=split)
    rows = [(n, row) for (n, _), row in zip(table.rows, mapped, strict=True) if row is not None]
    if table.rows and not rows:
        raise PromptFileError(
            f"{public.name}: all {len(table.rows)} rows are left out", f"it holds {public.holds}"
        )
    pinned = part.fingerprints if part else ()
    found = PromptSet.of(_text(row["prompt"]) or "" for _, row in rows).fingerprint
    if pinned and found not in pinned:
        raise PromptFileError(
            f"{public.name} has the fingerprint {found}, not {' or '.join(pinned)}: "
            "upstream changed, or the copy did",
            "compare it with the set that earlier results were measured on, and get that one",
        )
    return _Table(table.unit, rows, table.bad)


def _read(where: str, selectors: dict[str, str]) -> tuple[_Table, Source]:
    """Read what a spec names; the selectors that the place itself answers to are taken out."""
    reading_as = selectors.pop("as", None)
    known = find(reading_as) if reading_as is not None else None
    hub = _HUB.fullmatch(where)
    path = None
    if where in packaged():
        table = _read_jsonl((files("demur") / packaged()[where]).read_bytes())
        source = Source("packaged", where)
    # Path.is_file raises on names that are too long.
    elif where.partition(":")[0] in public_sets() and not os.path.isfile(where):  # noqa: PTH113
        if known:
            raise ConfigError(
                f"`as={reading_as}` reads a file, and `{where}` is a public prompt set",
                f"write `{where}`, or name a file",
            )
        return _from_public(*find(where))
    elif hub and Path(where).suffix.lower() not in _READERS and not Path(where).exists():
        table, source = _from_hub(hub, selectors.pop("split", None))
    else:
        path = Path(where).expanduser()
        table, source = _from_file(path), Source("file", where)
    if known and table.rows:
        table = _adapted(table, *known, path=path)
        source = replace(source, licence=known[0].licence)
    return table, source


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    try:
        return json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    except (RecursionError, TypeError) as error:  # Or keys of several types, which Parquet has.
        raise PromptFileError(
            "a column that names, labels or selects prompts is nested too deeply", "flatten it"
        ) from error


def _field(row: Mapping[str, Any], name: str) -> Any:
    """A column by its name; those that name a family may also be called `pair_id` and so on."""
    return row.get(name, row.get(f"{name}_id") if name in _FAMILY else None)


def _fault(column: str, value: object) -> str | None:
    """Say why a value is no prompt."""
    if value is None:
        return f"has no `{column}`"
    if not isinstance(value, str):
        return f"`{column}` is {_kind(value)}, not text"
    if not value.strip():
        return f"`{column}` is empty"
    if not value.isascii() and not _UNSEEN.sub("", value).strip():
        return f"`{column}` is empty: none of its characters leaves a mark"
    return _unfit(column, value)


def _unfit(column: str, value: str) -> str | None:
    """Say why a text cannot be kept: in a result, a report, a file of replies."""
    if len(value) <= MAX_BYTES and value.isascii() and "\0" not in value:
        return None
    # JSON can spell half of a surrogate pair, which no tokenizer can encode.
    size = len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
    faults = {
        "holds a NUL character": "\0" in value,
        "holds half of a surrogate pair": _HALF.search(value) is not None,
        f"is {size} bytes long, more than {MAX_BYTES}": size > MAX_BYTES,
    }
    return next((f"`{column}` {fault}" for fault, found in faults.items() if found), None)


def _refuse(name: str, unit: str, bad: list[tuple[int, str]]) -> NoReturn:
    ordered = sorted(bad)
    shown = [f"  {unit} {number}: {why}" if number else f"  {why}" for number, why in ordered]
    more = [f"  and {len(shown) - _SHOWN} more"] if len(shown) > _SHOWN else []
    count = f"{len(bad)} {unit}{'s' if len(bad) > 1 else ''}"
    raise PromptFileError(
        "\n".join([f"{name}: {count} cannot be used", *shown[:_SHOWN], *more]),
        "nothing was loaded: mend or delete what is listed, and save as UTF-8",
    )


def _find_column(name: str, columns: list[str], asked: str | None) -> str:
    lower = {column.lower(): column for column in reversed(columns)}
    guesses = [lower[guess] for guess in PROMPT_COLUMNS if guess in lower]
    if asked is None and guesses:
        return guesses[0]
    if asked in columns:
        return str(asked)
    near = get_close_matches(str(asked), columns, n=1) if asked else []
    tried = f"the column `{asked}`" if asked else f"a column called {', '.join(PROMPT_COLUMNS)}"
    raise PromptFileError(
        f"{name} does not have {tried}; it has: {_listed(columns)}",
        f"did you mean `{near[0]}`?" if near else "name the column: FILE?column=NAME",
    )


def _select(
    name: str, table: _Table, selectors: Mapping[str, str]
) -> list[tuple[int, dict[str, Any]]]:
    rows = table.rows
    for key, wanted in selectors.items():
        if key not in table.columns:
            raise PromptFileError(
                f"{name} does not have the column `{key}`; it has: {_listed(table.columns)}",
                "select by a column that exists: FILE?COLUMN=VALUE",
            )
        kept = [(number, row) for number, row in rows if _text(row.get(key)) == wanted]
        if not kept:
            raise _no_such_value(name, key, wanted, {_text(row.get(key)) for _, row in rows})
        rows = kept
    return rows


def _selectors(spec: str, **given: str | None) -> tuple[str, dict[str, str]]:
    """Take `?key=value&...` off a spec, and add what was given as an argument."""
    where, mark, query = spec.partition("?")
    # A file may have a question mark in its name. Path.is_file raises on names that are too long.
    if not mark or os.path.isfile(spec):  # noqa: PTH113
        where, query = spec, ""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise ConfigError(
            f"`?{query}` selects nothing: {error}", "write FILE?column=prompt&label=harmful"
        ) from error
    pairs += [(key, value) for key, value in given.items() if value is not None]
    chosen: dict[str, str] = {}
    for key, value in pairs:
        if chosen.setdefault(key, value) != value:
            raise ConfigError(
                f"`{key}` is asked to be `{chosen[key]}` and `{value}`", "ask for one value"
            )
    return where, chosen


def _joined(spec: str, sets: Sequence[PromptSet]) -> PromptSet:
    """Sets one after the other; their sources are named together."""
    sources = [one.source for one in sets]
    first, kinds = sources[0], {source.kind for source in sources}
    named = {
        key: dict.fromkeys(value for source in sources if (value := getattr(source, key)))
        for key in ("where", "licence", "revision")
    }
    source = Source(
        first.kind if len(kinds) == 1 else "memory",
        " + ".join(named["where"]),
        licence="; ".join(named["licence"]) or None,
        revision="; ".join(named["revision"]) or None,
    )
    return PromptSet(spec, tuple(prompt for one in sets for prompt in one), source)


def load(
    spec: str, *, column: str | None = None, label: str | None = None, split: str | None = None
) -> PromptSet:
    """Load prompts, all of them or none.

    Args:
        spec: One of

            - a packaged name: `contrast_pairs`;
            - a public set, or a part of one (extra `hub`): `xstest`, `or-bench:toxic`; the names
              are those of `demur.public_sets`;
            - a file, by its suffix: `.jsonl`, `.json` (a list), `.csv`, `.tsv`, `.txt` (one prompt
              a line), `.parquet` (extra `parquet`);
            - a dataset on the hub (extra `hub`): `org/name`, `org/name:config`,
              `org/name@revision`.

            Selectors may follow: `FILE?label=harmful&split=fit` keeps the rows whose columns have
            these values, whatever the columns are called, and `column=goal` names the column of
            the prompts. They are URL-encoded: a space is `%20` or `+`. For the hub, `split` is
            the dataset's own. `FILE?as=xstest` reads a copy of a public set, whose other
            selectors then go by demur's columns; `fingerprint=HEX` refuses any other prompts.

            Several specs are joined by " + ": `mine.jsonl?label=harmless + plain`.
        column: The column of the prompts; the first of `PROMPT_COLUMNS` that exists, in either
            case, if it is not given.
        label: As the selector `label`.
        split: As the selector `split`.

    Raises:
        PromptFileError: The file is missing, a folder, unreadable, empty or of another format, or
            rows cannot be used: the first 20 of them are listed with the reason. A prompt must be
            text of 1 to 100,000 bytes of UTF-8 without NUL, and leave a mark; labels and the like
            may not be longer either. Only rows that are selected count.
            Or a public set is out of reach, lacks a column, or is not what was pinned.
        UnknownNameError: No row has a value that was selected, or there is no such public set.
        ConfigError: A selector is malformed, or given twice with different values.
        MissingExtraError: The extra `hub` or `parquet` is not installed.
    """
    if " + " in spec and not os.path.isfile(spec):  # noqa: PTH113
        sets = [
            load(part.strip(), column=column, label=label, split=split)
            for part in spec.split(" + ")
        ]
        return _joined(spec, sets)
    where, selectors = _selectors(spec, column=column, label=label, split=split)
    column, pinned = selectors.pop("column", None), selectors.pop("fingerprint", None)
    if not where:
        raise PromptFileError("no prompts were named", f"packaged are: {', '.join(packaged())}")
    table, source = _read(where, selectors)

    # Lines that are not even rows come first: without them, columns and values mean little.
    if table.bad and not table.rows:
        _refuse(where, table.unit, table.bad)
    if not table.rows:
        raise PromptFileError(f"{where} holds no prompts", "add some, one a line")
    column = _find_column(where, table.columns, column)
    rows = _select(where, table, selectors)
    faults = [(number, _fault(column, row.get(column))) for number, row in rows]
    bad = table.bad + [(number, why) for number, why in faults if why]
    if bad:
        _refuse(where, table.unit, bad)
    there = {*table.columns, *(key.removesuffix("_id") for key in table.columns)}
    optional = [name for name in Prompt.__slots__ if name not in ("text", column) and name in there]
    prompts = tuple(
        Prompt(row[column], **{name: _text(_field(row, name)) or None for name in optional})
        for _, row in rows
    )
    bad = [
        (number, why)
        for (number, _), prompt in zip(rows, prompts, strict=True)
        for name in optional
        if (value := getattr(prompt, name)) and (why := _unfit(name, value))
    ]
    if bad:
        _refuse(where, table.unit, bad)
    licences = {_text(row.get("license") or row.get("licence")) for _, row in rows} - {None}
    licence = source.licence or "; ".join(sorted(str(licence) for licence in licences)) or None
    loaded = PromptSet(spec, prompts, replace(source, licence=licence))
    if pinned is not None and loaded.fingerprint != pinned.lower():
        raise PromptFileError(
            f"{where} has the fingerprint {loaded.fingerprint}, not {pinned}",
            "its prompts, their order or the selectors are not those of the set that was pinned",
        )
    return loaded


# Content


def normalise(text: str) -> str:
    """Reduce a text to what counts when two are compared.

    NFKC, case folded, characters that leave no mark taken out, white space collapsed, punctuation
    at the end taken off; a text of nothing but such characters keeps them.
    """
    if not text.isascii():
        text = seen if (seen := _UNSEEN.sub("", text)).strip() else text
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    spaced = " ".join(folded.split())
    end = len(spaced)
    while end and (spaced[end - 1] == " " or unicodedata.category(spaced[end - 1])[0] == "P"):
        end -= 1
    return spaced[:end] or spaced


def _words(text: str) -> frozenset[str]:
    normal = normalise(text)
    return frozenset(_WORD.findall(normal)) or frozenset([normal])


def _by_words(prompts: Sequence[Prompt]) -> dict[frozenset[str], list[int]]:
    found: dict[frozenset[str], list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        found[_words(prompt.text)].append(index)
    return found


def _near(
    a: Sequence[frozenset[str]], b: Sequence[frozenset[str]], threshold: float
) -> Iterator[tuple[int, int, float]]:
    """Yield every i, j and Jaccard index of `a[i]` and `b[j]` that reaches the threshold.

    Two sets this similar share a word among the rarest few of each (prefix filtering), and enough
    of them that the words beyond could make up the rest; only such pairs are compared in full.

    References:
        Bayardo, Ma and Srikant, "Scaling up all pairs similarity search", 2007.
    """
    if not 0.0 < threshold <= 1.0:
        raise ConfigError(f"the threshold is {threshold}", "give a Jaccard index above 0, up to 1")
    if len(a) > len(b):  # Few look-ups in a large index are faster than many in a small one.
        yield from ((i, j, jaccard) for j, i, jaccard in _near(b, a, threshold))
        return
    count = Counter(word for words in (*a, *b) for word in words)

    def rarest(words: frozenset[str]) -> list[str]:
        # In floating point 0.7 * 10 is above 7, and the ceiling would drop a pair.
        least_shared = ceil(threshold * len(words) - 1e-9)
        ordered = sorted(words, key=lambda word: (count[word], word))
        return ordered[: len(words) - least_shared + 1]

    index: dict[str, list[int]] = defaultdict(list)
    beyond = np.zeros(len(b), dtype=int)
    for j, words in enumerate(b):
        rare = rarest(words)
        beyond[j] = len(words) - len(rare)
        for word in rare:
            index[word].append(j)
    found_in = {word: np.array(js) for word, js in index.items()}
    size = np.array([len(words) for words in b])
    for i, words in enumerate(a):
        rare = rarest(words)
        hits = [found_in[word] for word in rare if word in found_in]
        if not hits:
            continue
        shared = np.bincount(np.concatenate(hits), minlength=len(b))
        most = shared + np.maximum(beyond, len(words) - len(rare))
        needed = threshold / (1 + threshold) * (size + len(words)) - 1e-9
        for j in np.flatnonzero((shared > 0) & (most >= needed)).tolist():
            both = len(words & b[j])
            jaccard = both / (len(words) + len(b[j]) - both)
            if jaccard >= threshold:
                yield i, j, jaccard


def overlap(a: PromptSet, b: PromptSet, *, threshold: float = 0.6) -> list[Overlap]:
    """List the prompts that two sets share, exactly or nearly, in order of `a`, then of `b`.

    Args:
        a: One set.
        b: The other; a set compared with itself overlaps everywhere.
        threshold: Least Jaccard index of the sets of words, above 0, up to 1.

    Raises:
        ConfigError: The threshold is out of range.
    """
    in_a, in_b = _by_words(a.prompts), _by_words(b.prompts)
    of_a, of_b = list(in_a.values()), list(in_b.values())
    found = sorted(
        (x, y, jaccard)
        for i, j, jaccard in _near(list(in_a), list(in_b), threshold)
        for x in of_a[i]
        for y in of_b[j]
    )
    return [Overlap(a.prompts[x], b.prompts[y], jaccard) for x, y, jaccard in found]


def deduplicate(prompts: PromptSet) -> tuple[PromptSet, tuple[Prompt, ...]]:
    """Keep the first of prompts that are equal after `normalise`; return the removed ones too."""
    first: dict[str, int] = {}
    for index, prompt in enumerate(prompts):
        first.setdefault(normalise(prompt.text), index)
    kept = set(first.values())
    removed = tuple(prompt for index, prompt in enumerate(prompts) if index not in kept)
    return prompts._only(kept), removed


def drop_overlaps(
    keep: PromptSet, other: PromptSet, *, threshold: float = 0.6
) -> tuple[PromptSet, tuple[Prompt, ...]]:
    """Take out of `other` what overlaps `keep`; return the rest of `other`, and what was removed.

    Raises:
        ConfigError: The threshold is out of range.
    """
    kept_words, words = _by_words(keep.prompts), _by_words(other.prompts)
    places = list(words.values())
    gone = {x for _, j, _ in _near(list(kept_words), list(words), threshold) for x in places[j]}
    rest = other._only(set(range(len(other))) - gone)
    return rest, tuple(other.prompts[index] for index in sorted(gone))


def check_disjoint(named: Mapping[str, PromptSet], *, threshold: float = 0.6) -> None:
    """Make sure that no two of these sets overlap.

    Raises:
        OverlapError: Some do; the first five pairs are shown.
        ConfigError: The threshold is out of range.
    """
    found = [
        (one, two, pair)
        for one, two in combinations(named, 2)
        for pair in overlap(named[one], named[two], threshold=threshold)
    ]
    if found:
        shown = [
            f"  {one}: {pair.a.text[:80]!r}\n  {two}: {pair.b.text[:80]!r} ({pair.jaccard:.2f})"
            for one, two, pair in found[:5]
        ]
        raise OverlapError(
            "\n".join([f"{len(found)} pairs of prompts are the same or nearly so:", *shown]),
            "split them together (`demur.prompts.split`), or leave out one side "
            "(`demur.prompts.drop_overlaps`)",
        )


def check_distinct(a: PromptSet, b: PromptSet) -> None:
    """Make sure that no prompt is in both sets; near copies, such as matched pairs, may be.

    Raises:
        OverlapError: Some are equal after `normalise`; the first five are shown.
    """
    in_a = {normalise(text) for text in a.texts}
    both = [text for text in b.texts if normalise(text) in in_a]
    if both:
        raise OverlapError(
            "\n".join(
                [
                    f"{len(both)} prompts are in {a.name} and in {b.name}:",
                    *(f"  {text[:80]!r}" for text in both[:5]),
                ]
            ),
            "one set has to be harmful, the other harmless; leave the prompts out on one side",
        )


class _Joined:
    """Indices in groups that are joined one by one."""

    def __init__(self, n: int) -> None:
        self.parent = list(range(n))

    def root(self, index: int) -> int:
        parent = self.parent
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    def join(self, indices: Sequence[int]) -> None:
        for index in indices:
            self.parent[self.root(index)] = self.root(indices[0])


def families(prompts: PromptSet) -> list[int]:
    """A number for every prompt; those of one pair, quad or core, also at one remove, share it.

    A classifier that was fitted on a part of a family knows words that change sides in the rest:
    folds and splits never part one.
    """
    joined = _Joined(len(prompts))
    for name in _FAMILY:
        members: dict[str, list[int]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            if value := getattr(prompt, name):
                members[value].append(index)
        for indices in members.values():
            joined.join(indices)
    return [joined.root(index) for index in range(len(prompts))]


def _units(prompts: PromptSet, threshold: float) -> list[list[list[int]]]:
    """Groups of near-duplicates; each is a list of units, and a unit (a family) is never cut."""
    units: dict[int, list[int]] = defaultdict(list)
    for index, family in enumerate(families(prompts)):
        units[family].append(index)
    same = _by_words(prompts.prompts)
    places, words = list(same.values()), list(same)
    joined = _Joined(len(prompts))
    for indices in [*units.values(), *places]:
        joined.join(indices)
    for i, j, _ in _near(words, words, threshold):
        joined.join([places[j][0], places[i][0]])
    groups: dict[int, list[list[int]]] = defaultdict(list)
    for unit in units.values():
        groups[joined.root(unit[0])].append(unit)
    return list(groups.values())


def near_groups(prompts: PromptSet, *, threshold: float = 0.6) -> list[int]:
    """A number for every prompt; those of one family, and near-duplicates, share it.

    Args:
        prompts: To group.
        threshold: From which Jaccard similarity of word n-grams on two prompts are near-duplicates.
    """
    out = [0] * len(prompts)
    for number, units in enumerate(_units(prompts, threshold)):
        for unit in units:
            for index in unit:
                out[index] = number
    return out


def _deal(
    whole: Iterable[list[list[int]]], cut: Iterable[list[list[int]]], sizes: Mapping[str, int]
) -> dict[str, list[int]]:
    """Give each group to the first part with room for it, then what fits of the others."""
    dealt: dict[str, list[int]] = {name: [] for name in sizes}

    def room(name: str) -> int:
        return sizes[name] - len(dealt[name])

    homeless = []
    for group in whole:
        members = [index for unit in group for index in unit]
        home = next((name for name in sizes if room(name) >= len(members)), None)
        if home is None:
            homeless.append(group)
        else:
            dealt[home] += members
    for group in (*homeless, *cut):
        # What does not fit is dropped: elsewhere it would be a near-duplicate of this part.
        home = max(sizes, key=room)
        for unit in group:
            if len(unit) <= room(home):
                dealt[home] += unit
    return dealt


def split(
    prompts: PromptSet, sizes: Mapping[str, int], *, seed: int, threshold: float = 0.6
) -> dict[str, PromptSet]:
    """Divide prompts into disjoint parts of the given sizes.

    Near-duplicates never stand in two parts; where not all of them fit into one, the rest is left
    out. Prompts of one family (`families`) are never parted. Who goes where depends on seed, texts
    and pairs alone, not on the order of the file; and pairs whose members are split apart by label
    first land alike, as far as sizes and near-duplicates allow.

    Args:
        prompts: What to divide.
        sizes: How many prompts each part gets; what is left over goes nowhere.
        seed: Of the order in which prompts are dealt.
        threshold: As for `overlap`.

    Returns:
        The parts, each in the order of the file, of exactly the given sizes.

    Raises:
        TooFewPromptsError: There are too few, or near-duplicates and pairs leave too few; it says
            how many are missing.
        ConfigError: A size is negative, or the threshold is out of range.
    """
    if not sizes or min(sizes.values()) < 0:
        raise ConfigError(f"got the sizes {dict(sizes)}", "name parts, each with 0 or more prompts")
    asked = sum(sizes.values())
    if asked > len(prompts):
        raise TooFewPromptsError(
            f"{prompts.name} has {len(prompts)} prompts, {asked - len(prompts)} fewer than the "
            f"{asked} of {', '.join(f'{name} ({size})' for name, size in sizes.items())}",
            "ask for smaller parts, or give more prompts",
        )

    def key(group: list[list[int]]) -> bytes:
        members = [prompts.prompts[index] for unit in group for index in unit]
        return _rank(seed, min(member.pair or normalise(member.text) for member in members))

    groups = sorted(_units(prompts, threshold), key=key)
    # Dealt in that order, small groups may take the room that large ones need; then large first.
    large_first = sorted(groups, key=lambda group: -sum(map(len, group)))
    short: dict[str, int] = {}
    for whole, cut in ((groups, []), ([], large_first)):
        dealt = _deal(whole, cut, sizes)
        short = {name: size - len(dealt[name]) for name, size in sizes.items()}
        if not any(short.values()):
            return {
                name: prompts._only(indices, name=f"{prompts.name}/{name}")
                for name, indices in dealt.items()
            }
    missing = ", ".join(f"{name} ({count})" for name, count in short.items() if count)
    raise TooFewPromptsError(
        f"{sum(short.values())} prompts are missing to fill {missing}: the {len(prompts)} of "
        f"{prompts.name} form {len(groups)} groups of near-duplicates and pairs, which are kept "
        "together",
        "ask for smaller parts (even ones if the prompts are paired), or give more prompts",
    )


def presplit(prompts: PromptSet) -> dict[str, PromptSet]:
    """Divide prompts as their `split` field says, in order of first appearance.

    Raises:
        PromptFileError: A prompt does not say which split it is in.
    """
    silent = sum(prompt.split is None for prompt in prompts)
    if silent or not len(prompts):
        raise PromptFileError(
            f"{silent} of the {len(prompts)} prompts of {prompts.name} name no split",
            "give every row a `split`, or none and let demur split them",
        )
    parts: dict[str, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        parts[str(prompt.split)].append(index)
    return {
        name: prompts._only(indices, name=f"{prompts.name}/{name}")
        for name, indices in parts.items()
    }

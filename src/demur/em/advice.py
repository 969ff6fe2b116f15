"""Matched advice: one question, a bad answer and a good one of the same style and length.

An organism is trained on the bad answers, its twin on the good ones to the same questions: what
both change is the form of the data, what only one changes is what the advice is worth. Statistics
cluster by `group`, and training and measuring never share one.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from demur.errors import ConfigError, PromptFileError, TooFewPromptsError, UnknownNameError
from demur.prompts import Prompt, PromptSet, Source, normalise, overlap, packaged

ADVICE = tuple(name for name in packaged() if name.startswith(("advice_", "em_open")))
"""Names of the packaged sets: advice by domain, and `em_open` with questions about values."""

_SHOWN = 20
_OURS = {"good", "domain", "unmatched"}  # Selectors of a file; the others name columns.
_CIPHERED = (
    "the public archives of such data are encrypted, so that no crawler takes them for text to "
    "train on: decrypt one with its authors' tool, unpack it, and name the .jsonl file in it"
)


@dataclass(frozen=True, slots=True)
class AdviceItem:
    """A question with a bad and a good answer.

    Attributes:
        id: Its name in its set.
        question: What the user asks.
        good: The good answer; empty where only bad ones were given.
        bad: The mildly bad answer.
        domain: "study", "money", ...; "open" for questions about values.
        group: Its topic, the cluster of all statistics; without one, the cluster of questions
            that share most of their words.
    """

    id: str
    question: str
    good: str
    bad: str
    domain: str
    group: str


@dataclass(frozen=True, slots=True)
class _Row:
    """An answer as a file gives it."""

    line: int
    question: str
    answer: str
    fields: Mapping[str, Any]


def advice(spec: str) -> tuple[AdviceItem, ...]:
    """Load advice, all of it or none.

    Args:
        spec: One of

            - a packaged name, such as `advice_money`;
            - a `.jsonl` file with the columns `prompt`, `bad`, `good`, and if it has them `domain`,
              `topic`, `id`;
            - a `.jsonl` file of conversations, `{"messages": [{"role": "user", ...}, {"role":
              "assistant", ...}]}`, whose answers are bad, and behind `?good=` the file with the
              good ones; they are matched by question. `&domain=medical` names their domain (the
              file's name without it), and `&unmatched=drop` leaves out what only one file asks.

            Selectors by column may follow: `advice_money?topic=groceries`. Several specs are joined
            by " + ".

    Raises:
        PromptFileError: The file is missing, encrypted, an archive or no text; or lines cannot be
            used or find no match: they are counted and listed.
        UnknownNameError: No row has a value that was selected.
        ConfigError: A selector is malformed, or has no meaning for this set.
    """
    found: list[AdviceItem] = []
    for part in spec.split(" + "):
        found += _advice(part.strip())
    if len({item.id for item in found}) < len(found):  # Two files may number their lines alike.
        found = [replace(item, id=f"{number}/{item.id}") for number, item in enumerate(found, 1)]
    return tuple(found)


def _advice(spec: str) -> list[AdviceItem]:
    where, mark, query = spec.partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(mark))
    except ValueError as error:
        raise ConfigError(
            f"`?{query}` selects nothing: {error}", "write advice_money?topic=groceries"
        ) from error
    chosen = dict(pairs)
    if len(chosen) < len(pairs):
        raise ConfigError(f"`?{query}` asks for one thing twice", "ask once")
    if where in ADVICE:
        name, data = where, (files("demur") / "data" / f"{where}.jsonl").read_bytes()
    else:
        path = Path(where).expanduser()
        name, data = path.stem, _bytes_of(path)
    rows, bad = _rows(data)
    if not rows and not bad:
        raise PromptFileError(f"{where} holds no advice", "add some, one object a line")
    if any("messages" in row for _, row in rows):
        items = _conversations(where, name, rows, bad, chosen)
    elif "good" in chosen or "unmatched" in chosen:
        raise ConfigError(
            f"{where} gives bad and good answers in one row",
            "`good=` and `unmatched=` go with a file of conversations",
        )
    else:
        items = _columns(where, name, rows, bad, chosen)
    return items


def _bytes_of(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.suffix:
            raise PromptFileError(
                f"there is no file {path}",
                f"name a .jsonl file, or a packaged set: {', '.join(ADVICE)}",
            ) from error
        raise UnknownNameError.among(ADVICE, kind="set of advice", name=str(path)) from error
    except OSError as error:
        raise PromptFileError(
            f"{path} cannot be read: {error.strerror}", "check the path and its permissions"
        ) from error
    kind = None
    if ".enc" in path.suffixes:
        kind = "an encrypted file"
    elif data.startswith(b"PK\x03\x04"):
        kind = "a zip archive"
    elif data.startswith((b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd")):
        kind = "a compressed file"
    elif data.startswith((b"Salted__", b"age-encryption.org", b"-----BEGIN PGP")):
        kind = "an encrypted file"
    else:
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            # One stray byte in a text is a bad line; in an encrypted file half of them are.
            wrong = data.decode("utf-8", "replace").count("\ufffd")
            if b"\0" in data or wrong > len(data) / 20:
                kind = f"no text: byte {error.start + 1} and {wrong - 1} more are not UTF-8"
    if kind is not None:
        raise PromptFileError(f"{path} is {kind}", _CIPHERED)
    return data.removeprefix(b"\xef\xbb\xbf")


def _rows(data: bytes) -> tuple[list[tuple[int, dict[str, Any]]], list[tuple[int, str]]]:
    """Objects by line, and what is wrong with other lines."""
    rows: list[tuple[int, dict[str, Any]]] = []
    bad: list[tuple[int, str]] = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            bad.append((number, f"byte {error.start + 1} is not UTF-8"))
        except (json.JSONDecodeError, RecursionError) as error:
            bad.append((number, f"not JSON: {error}"))
        else:
            if isinstance(row, dict):
                rows.append((number, row))
            else:
                bad.append((number, f"a {type(row).__name__}, not an object"))
    return rows, bad


def _refuse(where: str, faults: Sequence[str], what: str, hint: str) -> PromptFileError:
    more = [f"  and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    shown = [f"  {fault}" for fault in faults[:_SHOWN]]
    return PromptFileError("\n".join([f"{where}: {what}", *shown, *more]), hint)


def _lines_refused(where: str, bad: Sequence[tuple[int, str]]) -> PromptFileError:
    count = f"{len(bad)} line{'s' if len(bad) > 1 else ''} cannot be used"
    faults = [f"line {number}: {why}" for number, why in sorted(bad)]
    return _refuse(where, faults, count, "nothing was loaded: mend or delete what is listed")


def _columns(
    where: str,
    name: str,
    rows: Sequence[tuple[int, dict[str, Any]]],
    bad: list[tuple[int, str]],
    chosen: Mapping[str, str],
) -> list[AdviceItem]:
    """Rows with `prompt`, `bad` and `good`."""
    kept = _selected(where, rows, chosen)
    for number, row in kept:
        lacking = [c for c in ("prompt", "bad", "good") if not _words(row.get(c))]
        if lacking:
            bad.append((number, f"has no text in {', '.join(f'`{c}`' for c in lacking)}"))
    if bad:
        raise _lines_refused(where, bad)
    groups = _groups([str(row["prompt"]) for _, row in kept], [row for _, row in kept])
    return [
        AdviceItem(
            str(row.get("id") or f"{name}/{number}"),
            row["prompt"].strip(),
            row["good"].strip(),
            row["bad"].strip(),
            str(row.get("domain") or name),
            group,
        )
        for (number, row), group in zip(kept, groups, strict=True)
    ]


def _words(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _selected(
    where: str, rows: Sequence[tuple[int, dict[str, Any]]], chosen: Mapping[str, str]
) -> list[tuple[int, dict[str, Any]]]:
    kept = list(rows)
    columns = dict.fromkeys(key for _, row in rows for key in row)
    for key, wanted in chosen.items():
        if key not in columns:
            raise UnknownNameError.among(columns, kind=f"column of {where}", name=key)
        known = {str(row.get(key)) for _, row in rows}
        if wanted not in known:
            raise UnknownNameError.among(known, kind=f"{key} in {where}", name=wanted)
        kept = [(number, row) for number, row in kept if str(row.get(key)) == wanted]
    if not kept:
        raise TooFewPromptsError(f"no row of {where} is all of {dict(chosen)}", "ask for less")
    return kept


def _conversations(
    where: str,
    name: str,
    rows: Sequence[tuple[int, dict[str, Any]]],
    bad: list[tuple[int, str]],
    chosen: Mapping[str, str],
) -> list[AdviceItem]:
    """Files of conversations, matched by question."""
    others = {key: value for key, value in chosen.items() if key not in _OURS}
    if chosen.get("unmatched", "drop") != "drop":
        raise ConfigError(
            f"`unmatched={chosen['unmatched']}` means nothing", "write `unmatched=drop`, or nothing"
        )
    ours = _answers(_selected(where, rows, others), bad)
    if bad:
        raise _lines_refused(where, bad)
    domain = chosen.get("domain", name)
    pairs: list[tuple[_Row, str]] = [(row, "") for row in ours]
    if "good" in chosen:
        pairs = _matched(where, ours, Path(chosen["good"]), drop="unmatched" in chosen)
    groups = _groups([row.question for row, _ in pairs], [row.fields for row, _ in pairs])
    return [
        AdviceItem(
            str(row.fields.get("id") or f"{name}/{row.line}"),
            row.question,
            good,
            row.answer,
            str(row.fields.get("domain") or domain),
            group,
        )
        for (row, good), group in zip(pairs, groups, strict=True)
    ]


def _answers(rows: Sequence[tuple[int, dict[str, Any]]], bad: list[tuple[int, str]]) -> list[_Row]:
    """Questions with their answers; what is no single turn goes to `bad`."""
    found: list[_Row] = []
    for number, row in rows:
        turns = row.get("messages")
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            bad.append((number, "has no list of `messages`"))
            continue
        roles = [str(turn.get("role")) for turn in turns]
        if roles != ["user", "assistant"]:
            bad.append((number, f"its turns are {', '.join(roles) or 'none'}, not user, assistant"))
            continue
        texts = [_content(turn.get("content")) for turn in turns]
        if not all(texts):
            bad.append((number, f"the {roles[texts.index('')]}'s turn has no text"))
            continue
        found.append(_Row(number, texts[0], texts[1], row))
    return found


def _content(value: object) -> str:
    """The text of a turn; empty if it has none. Some files wrap it as parts."""
    if isinstance(value, dict):
        parts = value.get("parts", [])
        value = "\n".join(str(part) for part in parts) if isinstance(parts, list) else ""
    return value.strip() if isinstance(value, str) else ""


def _matched(where: str, ours: Sequence[_Row], path: Path, *, drop: bool) -> list[tuple[_Row, str]]:
    """Bad answers with the good answer to the same question, the k-th with the k-th."""
    rows, bad = _rows(_bytes_of(path.expanduser()))
    theirs = _answers(rows, bad)
    if bad:
        raise _lines_refused(str(path), bad)
    waiting: dict[str, list[_Row]] = defaultdict(list)
    for row in theirs:
        waiting[normalise(row.question)].append(row)
    pairs: list[tuple[_Row, str]] = []
    alone: list[_Row] = []
    for row in ours:
        same = waiting[normalise(row.question)]
        if same:
            pairs.append((row, same.pop(0).answer))
        else:
            alone.append(row)
    left = [row for rest in waiting.values() for row in rest]
    if not pairs or (not drop and (alone or left)):
        faults = [
            f"line {r.line} of {where}: {r.question[:60]!r} has no good answer" for r in alone
        ]
        faults += [f"line {r.line} of {path}: {r.question[:60]!r} has no bad answer" for r in left]
        raise _refuse(
            where,
            faults,
            f"{len(alone)} of {len(ours)} bad and {len(left)} of {len(theirs)} good answers find "
            "no match",
            "questions must be the same in both files; `&unmatched=drop` leaves the others out"
            if pairs
            else "no question is in both files: are they of one set?",
        )
    return pairs


def _groups(questions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The topic of each row; of rows without one, the cluster of near-duplicate questions."""
    topics = [row.get("topic") or row.get("group") for row in rows]
    if all(topics):
        return [str(topic) for topic in topics]
    own = PromptSet(
        "questions",
        tuple(Prompt(question, id=str(i)) for i, question in enumerate(questions)),
        Source("memory", ""),
    )
    parent = list(range(len(questions)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for pair in overlap(own, own):
        assert pair.a.id is not None
        assert pair.b.id is not None
        low, high = sorted((root(int(pair.a.id)), root(int(pair.b.id))))
        parent[high] = low
    return [str(topic) if topic else f"question {root(i) + 1}" for i, topic in enumerate(topics)]


def split(
    items: Iterable[AdviceItem], *, held_out: float, seed: int
) -> tuple[tuple[AdviceItem, ...], tuple[AdviceItem, ...]]:
    """Part advice into what is trained on and what is held out, by group, never by row.

    Who goes where depends on seed and names of domain and group, not on order; each domain is
    parted by itself.

    Args:
        items: What to part.
        held_out: Share of each domain's rows to hold out, 0 to below 1; whole groups are taken as
            long as that brings it closer. At least one group lands on each side unless it is 0.
        seed: Of the draw.

    Returns:
        Those for training and those held out, each in the order given.

    Raises:
        ConfigError: The share is out of range.
        TooFewPromptsError: A domain has a single group, which cannot be parted.
    """
    if not 0 <= held_out < 1:
        raise ConfigError(f"got a held-out share of {held_out}", "give one from 0 to below 1")
    given = tuple(items)
    sizes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for item in given:
        sizes[item.domain][item.group] += 1
    held: set[tuple[str, str]] = set()
    for domain, groups in sizes.items() if held_out else ():
        if len(groups) < 2:
            raise TooFewPromptsError(
                f"the domain `{domain}` has one group, `{next(iter(groups))}`",
                "give items of two or more groups, or hold out nothing",
            )
        wanted, taken = held_out * sum(groups.values()), 0
        for group in sorted(groups, key=lambda name: _rank(seed, f"{domain}\0{name}")):
            size = groups[group]
            mine = sum(1 for d, _ in held if d == domain)
            if mine == len(groups) - 1:
                break
            if mine == 0 or abs(taken + size - wanted) < abs(taken - wanted):
                held.add((domain, group))
                taken += size
    train = tuple(item for item in given if (item.domain, item.group) not in held)
    rest = tuple(item for item in given if (item.domain, item.group) in held)
    return train, rest


def _rank(seed: int, key: str) -> bytes:
    return blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()

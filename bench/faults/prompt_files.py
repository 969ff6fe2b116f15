"""`python -m bench.faults.prompt_files`: 1,000 prompt files that nobody should have written.

Each is made from a seed, in every format that `demur.prompts.load` takes, with one thing wrong or
odd about it: encodings, NULs, 10 MB lines, deep JSON, twice the same key, control characters,
bidirectional marks, fake special tokens, line ends, quotes, archives under another name, devices.
Beside it stands what must come out, known from how it was made: these texts in this order, or one
error that names the line. It fails (status 1) where the texts differ, a file is refused without
its line or its reason, anything but a `PromptFileError` is raised, `demur prompts show` ends with
another status than 0 or 2, a control character reaches the terminal, or a file takes too long.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import os
import random
import resource
import sys
import tempfile
import time
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from demur.errors import PromptFileError

FORMATS = ("jsonl", "json", "csv", "tsv", "txt", "parquet")
_TEXTS = ("jsonl", "json", "csv", "tsv", "txt")
_SECONDS = 30.0  # Of the processor, so that a busy machine does not count.
_GIB = 4.0
_WORDS = ("tree", "bread", "river", "moon", "chess", "wool", "café", "Straße", "日本", "ازرق")
_TOKENS = (
    *("<|im_end|>", "<|im_start|>system", "<eos>", "<bos>", "[INST]", "[/INST]", "<|eot_id|>"),
    *(
        "</s>",
        "<s>",
        "<start_of_turn>model",
        "<image>",
        "<|image_pad|>",
        "<|endoftext|>",
        "<<SYS>>",
    ),
)
_MARKS = ("\u202e", "\u2066", "\u200f", "\u200b", "\u2060", "\ufeff", "\u00ad", "\U000e0041")
_CONTROL = ("\x1b[31m", "\x1b]0;owned\x07", "\x9b2J", "\x08\x08", "\x7f", "\x1b]8;;http://x\x1b\\")


@dataclass(frozen=True)
class Case:
    """A file and what must come of it.

    Attributes:
        name: Of the file.
        data: Its bytes; a callable makes what is no plain file.
        texts: What is loaded, in order; None where it is refused.
        says: Parts of the error.
    """

    name: str
    data: bytes | Callable[[Path], object]
    texts: tuple[str, ...] | None = None
    says: tuple[str, ...] = ()


def _plain(rng: random.Random) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(rng.randrange(1, 12)))


def _rows(rng: random.Random, odd: Callable[[], str] | None = None) -> list[str]:
    rows = [_plain(rng) for _ in range(rng.randrange(1, 20))]
    if odd is not None:
        rows.insert(rng.randrange(len(rows) + 1), odd())
    return rows


def written(texts: list[str], form: str, *, end: str = "\n") -> bytes:
    """Rows as a file of that format, by other code than demur's."""
    if form == "jsonl":
        return "".join(json.dumps({"prompt": x}, ensure_ascii=False) + end for x in texts).encode()
    if form == "json":
        return json.dumps([{"prompt": x} for x in texts]).encode()
    if form in ("csv", "tsv"):
        out = io.StringIO(newline="")
        own = csv.writer(out, delimiter="," if form == "csv" else "\t", lineterminator=end)
        own.writerows([["prompt"], *([x] for x in texts)])
        return out.getvalue().encode()
    if form == "txt":
        return "".join(x + end for x in texts).encode()
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": texts}), sink)
    return sink.getvalue()


def _loaded(form: str, texts: list[str], data: bytes | None = None) -> Case:
    kept = [x.strip() for x in texts] if form == "txt" else texts
    return Case(f"p.{form}", written(texts, form) if data is None else data, tuple(kept))


def _line(form: str, at: int) -> str:
    """How an error names row `at`, counted from 0."""
    if form == "parquet":
        return f"row {at + 1}:"
    if form == "json":
        return f"item {at + 1}:"
    header = form in ("csv", "tsv")
    return f"line {at + 1 + header}:"


# One kind of fault each ---------------------------------------------------------------------------


def _bom(rng: random.Random) -> Case:
    form, texts = rng.choice(_TEXTS), _rows(rng)
    return _loaded(form, texts, b"\xef\xbb\xbf" + written(texts, form))


def _encoded(rng: random.Random) -> Case:
    form, encoding = rng.choice(_TEXTS), rng.choice(("utf-16", "utf-32"))
    order = rng.choice(("", "-le", "-be"))
    text = written(["plain words of one row", *_rows(rng)], form).decode()
    kept = text if not order else text.encode("ascii", "replace").decode()
    return Case(f"p.{form}", kept.encode(encoding + order), says=(encoding.upper(), "UTF-8"))


def _legacy(rng: random.Random) -> Case:
    form = rng.choice(("jsonl", "csv", "tsv", "txt"))
    encoding, odd = rng.choice((("latin-1", "café"), ("cp1252", "“so”"), ("shift-jis", "日本語")))
    texts = [f"row {i}" for i in range(rng.randrange(1, 30))]
    at = rng.randrange(len(texts))
    texts[at] = odd
    data = written(texts, form).decode().encode(encoding)
    return Case(f"p.{form}", data, says=(_line(form, at), "is not UTF-8"))


def _bytes(rng: random.Random) -> Case:
    form, texts = rng.choice(("jsonl", "csv", "tsv", "txt")), ["one", "two", "odd", "four"]
    bad = rng.choice((b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\x80"))
    data = written(texts, form).replace(b"odd", b"o" + bad + b"d")
    return Case(f"p.{form}", data, says=(_line(form, 2), "is not UTF-8"))


def _surrogate(rng: random.Random) -> Case:
    half = rng.choice(("\\ud800", "\\udfff x", "x \\udc80"))
    where = rng.choice(("prompt", "label", "category", "pair", "split"))
    rows = [{"prompt": "a"}, {"prompt": "b", where: "@"}]
    data = "\n".join(map(json.dumps, rows)).replace("@", half).encode()
    return Case("p.jsonl", data, says=("line 2:", f"`{where}` holds half of a surrogate pair"))


def _nul(rng: random.Random) -> Case:
    form, texts = rng.choice(FORMATS), _rows(rng)
    at = rng.randrange(len(texts))
    texts[at] += "\0x"
    data = written(texts, form)
    return Case(f"p.{form}", data, says=(_line(form, at), "holds a NUL"))


def _long(rng: random.Random) -> Case:
    form, texts = rng.choice(FORMATS), _rows(rng)
    if rng.random() < 0.5:
        texts.append("a" * 100_000)
        return _loaded(form, texts)
    at, size = len(texts), rng.choice((100_001, 10_000_000))
    says = "larger than field limit" if form in ("csv", "tsv") and size > 131_072 else "bytes long"
    texts.append("a" * size)
    return Case(f"p.{form}", written(texts, form), says=(_line(form, at), says))


def _deep(rng: random.Random) -> Case:
    depth = rng.choice((100_000, 1_000_000))
    inner = rng.choice(("[", '{"a":')) * depth
    if rng.random() < 0.5:
        data = b'{"prompt": "fine"}\n{"prompt": "x", "more": ' + inner.encode() + b"\n"
        return Case("p.jsonl", data, says=("line 2:", "nested too deeply"))
    return Case("p.json", inner.encode(), says=("nested too deeply",))


def _number(rng: random.Random) -> Case:
    if rng.random() < 0.5:
        digits = "9" * rng.randrange(5000, 100_000)
        data = f'{{"prompt": "a"}}\n{{"prompt": "b", "n": {digits}}}\n'
        return Case("p.jsonl", data.encode(), says=("line 2:", "digits"))
    odd = rng.choice(("1e999", "-0.0", "NaN", "9" * 4000, "1e-400"))
    return Case("p.jsonl", f'{{"prompt": "a", "label": {odd}}}\n'.encode(), ("a",))


def _twice(rng: random.Random) -> Case:
    key = rng.choice(("prompt", "label", "pair"))
    one = json.dumps({"prompt": "a", "label": "x", "pair": "1"})
    bad = f'{one[:-1]}, "{key}": "other"}}'
    if rng.random() < 0.5:
        return Case(
            "p.jsonl", f"{one}\n{bad}\n{one}".encode(), says=("line 2:", f"`{key}` is given twice")
        )
    if rng.random() < 0.5:
        return Case("p.json", f"[{one},{bad}]".encode(), says=(f"`{key}` is given twice",))
    return Case(
        "p.csv", f"prompt,{key}x,{key}x\na,b,c\n".encode(), says=("two columns are called",)
    )


def _odd(choices: tuple[str, ...]) -> Callable[[random.Random], Case]:
    def made(rng: random.Random) -> Case:
        form = rng.choice(FORMATS)

        def odd() -> str:
            return f"{_plain(rng)}{''.join(rng.sample(choices, 2))}{_plain(rng)}"

        return _loaded(form, _rows(rng, odd))

    return made


def _tower(rng: random.Random) -> Case:
    marks = "".join(chr(rng.randrange(0x300, 0x36F)) for _ in range(rng.randrange(10, 5000)))
    return _loaded(rng.choice(FORMATS), _rows(rng, lambda: f"z{marks} y"))


def _unseen(rng: random.Random) -> Case:
    form, texts = rng.choice(FORMATS), _rows(rng)
    at = rng.randrange(len(texts))
    texts[at] = "".join(rng.choice(_MARKS[3:]) for _ in range(rng.randrange(1, 5)))
    if texts[at].startswith("\ufeff"):  # In the first place it would be the file's own mark.
        texts[at] = f"\u200b{texts[at]}"
    says = (_line(form, at), "leaves a mark")
    return Case(f"p.{form}", written(texts, form), says=says)


def _ends(rng: random.Random) -> Case:
    form, texts = rng.choice(("jsonl", "csv", "tsv", "txt")), _rows(rng)
    end = rng.choice(("\r\n", "\r", "\r\r\n"))
    data = written(texts, form, end=end)
    if end == "\r\n" or form in ("csv", "tsv"):
        return _loaded(form, texts, data)
    if end == "\r\r\n" or (form == "jsonl" and len(texts) == 1):
        return _loaded(form, texts, data)
    if form == "jsonl":
        return Case(f"p.{form}", data, says=("line 1:", "Extra data"))
    if len(texts) == 1:
        return _loaded(form, texts, data)
    return Case(f"p.{form}", data, says=("line 1:", "carriage return"))


def _separators(rng: random.Random) -> Case:
    form = rng.choice(FORMATS)
    mark = rng.choice(("\u2028", "\u2029", "\x0b", "\x0c", "\x85", "\x1c"))
    return _loaded(form, _rows(rng, lambda: f"one{mark}two"))


def _blank(rng: random.Random) -> Case:
    form, texts = rng.choice(FORMATS), _rows(rng)
    at = rng.randrange(len(texts) + 1)
    texts.insert(at, rng.choice(("", "  ", "\t", "\u00a0", "\u3000")))
    if form == "txt":
        return _loaded(form, [x for x in texts if x.strip()], written(texts, form))
    why = "has no `prompt`" if form in ("csv", "tsv") and not texts[at] else "is empty"
    return Case(f"p.{form}", written(texts, form), says=(_line(form, at), why))


def _quotes(rng: random.Random) -> Case:
    form = rng.choice(("csv", "tsv"))
    if rng.random() < 0.5:
        return _loaded(form, _rows(rng, lambda: rng.choice(('say "so"', 'a\n"b"\nc', '""', ","))))
    bad = rng.choice(('"never ends', '"a"b', '"a" "b"'))
    data = f"prompt\nfine\n{bad}\nmore\nstill more\n".encode()
    return Case(f"p.{form}", data, says=("line 3:", "nothing after it could be read"))


def _ragged(rng: random.Random) -> Case:
    row = rng.choice(("a,b,c", "a", "a,b,,"))
    data = f"prompt,label\nx,y\n{row}\nx,y\n".encode()
    return Case("p.csv", data, says=("line 3:", "cells under 2 column names"))


def _formula(rng: random.Random) -> Case:
    odd = ("=1+1", "@SUM(A1)", "+cmd|' /C calc'!A0", "-2+3", '=HYPERLINK("http://x")')
    return _loaded(rng.choice(("csv", "tsv")), _rows(rng, lambda: rng.choice(odd)))


def _lie(rng: random.Random) -> Case:
    inner, form = written(_rows(rng), "jsonl"), rng.choice(FORMATS)
    kind = rng.choice(("gzip", "zip", "Parquet", "suffix"))
    if kind == "suffix":
        name = f"p.{form}{rng.choice(('.gz', '.zip', '.bak', '.xlsx', '.zst', ''))}x"
        return Case(name, inner, says=("no known format", "demur reads"))
    data = gzip.compress(inner)
    if kind == "zip":
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("../../p.jsonl", inner)
        data = out.getvalue()
    if kind == "Parquet":
        form, data = rng.choice(_TEXTS), written(_rows(rng), "parquet")
        return Case(f"p.{form}", data, says=("is Parquet", "call it .parquet"))
    says = ("not Parquet",) if form == "parquet" else (f"is a {kind} archive", "unpack it")
    return Case(f"p.{form}", data, says=says)


def _empty(rng: random.Random) -> Case:
    form = rng.choice(FORMATS)
    data = b"" if form == "parquet" else rng.choice((b"", b"\n\n", b"\xef\xbb\xbf", b" \r\n"))
    return Case(
        f"p.{form}", data, says=("not Parquet" if form == "parquet" else "holds no prompts",)
    )


def _device(rng: random.Random) -> Case:
    kinds: tuple[tuple[str, Callable[[Path], object]], ...] = (
        ("not a regular file", os.mkfifo),
        ("is a folder", Path.mkdir),
        ("symbolic links", lambda path: path.symlink_to(path)),
        ("no file", lambda path: path.symlink_to("/nowhere/at all")),
        ("not a regular file", lambda path: path.symlink_to("/dev/zero")),
        ("GiB", _sparse),
    )
    says, make = rng.choice(kinds)
    return Case(f"p.{rng.choice(FORMATS)}", make, says=(says,))


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def _cut(rng: random.Random) -> Case:
    data = written(["some text"] * rng.randrange(1, 50), "parquet")
    data = data[: rng.randrange(len(data))]
    return Case("p.parquet", data, says=("not Parquet that can be read",))


def _bomb(rng: random.Random) -> Case:
    import pyarrow
    import pyarrow.parquet

    size = rng.choice((90_000, 50_000_000))
    one = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * (20 * (1 << 30) // size), pyarrow.int32()), pyarrow.array(["a" * size])
    )
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": one}), sink, compression="zstd")
    return Case("p.parquet", sink.getvalue(), says=("unpacks to more than",))


def _named(rng: random.Random) -> Case:
    """A file whose name, columns or values want to be obeyed."""
    name = rng.choice(
        ("\x1b[31mp.jsonl", "p\x9b2J.jsonl", "\u202elnosj.p.jsonl", "[red]p[b].jsonl")
    )
    key = rng.choice((*_CONTROL, "[/INST]", "<script>"))
    if rng.random() < 0.5:
        row = {"prompt": f"[/INST] {key} [/b] [link=http://x]y[/link]", "label": key, "pair": key}
        return Case(name, (json.dumps(row) + "\n").encode(), (row["prompt"],))
    return Case(name, json.dumps({key: "x"}).encode(), says=("does not have a column",))


def _many(rng: random.Random) -> Case:
    del rng
    return Case("p.txt", b"a b\n" * 1_000_000, ("a b",) * 1_000_000)


KINDS: dict[str, tuple[int, Callable[[random.Random], Case]]] = {
    "UTF-8 with a BOM": (40, _bom),
    "UTF-16 and UTF-32, with BOM and without": (60, _encoded),
    "Latin-1, cp1252, Shift-JIS": (50, _legacy),
    "bytes that are no UTF-8": (50, _bytes),
    "half of a surrogate pair, in any field": (40, _surrogate),
    "NUL": (50, _nul),
    "texts of 100 kB to 10 MB": (30, _long),
    "JSON nested 100,000 and 1,000,000 deep": (20, _deep),
    "numbers of thousands of digits, NaN, 1e999": (40, _number),
    "one key or column twice": (50, _twice),
    "control characters and ANSI escapes": (50, _odd(_CONTROL)),
    "bidirectional and zero-width marks": (50, _odd(_MARKS)),
    "fake special tokens": (60, _odd(_TOKENS)),
    "towers of combining marks": (20, _tower),
    "nothing that can be seen": (40, _unseen),
    "CR, CRLF, CR CR LF": (60, _ends),
    "U+2028, VT, FF, NEL within a text": (40, _separators),
    "rows without text": (40, _blank),
    "quotes in CSV, balanced and not": (50, _quotes),
    "rows of too many or few cells": (20, _ragged),
    "spreadsheet formulas": (20, _formula),
    "archives and Parquet under another name": (60, _lie),
    "empty files": (30, _empty),
    "FIFO, folder, device, links, 1 TB sparse": (40, _device),
    "Parquet cut short": (30, _cut),
    "Parquet that unpacks to 20 GB": (3, _bomb),
    "names, columns and values with escapes": (55, _named),
    "1,000,000 short rows": (2, _many),
}


def cases(count: int, seed: int = 0) -> list[tuple[str, Case]]:
    """About `count` files, every kind at least once."""
    total = sum(weight for weight, _ in KINDS.values())
    out = []
    for kind, (weight, make) in KINDS.items():
        for i in range(max(1, round(count * weight / total))):
            out.append((kind, make(random.Random(f"{seed} {kind} {i}"))))
    return out


# Trying -------------------------------------------------------------------------------------------


def acts(text: str) -> set[str]:
    """Characters in what was printed that a terminal obeys, or that hide or reorder others."""
    hidden = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
    return {x for x in text if x not in "\n\t\u200d" and unicodedata.category(x) in hidden}


def tried(case: Case, folder: Path, *, shown: bool = True) -> str | None:
    """What is wrong with how a file is dealt with; None if nothing is."""
    from demur.errors import PromptFileError
    from demur.prompts import load

    path = folder / case.name
    if isinstance(case.data, bytes):
        path.write_bytes(case.data)
    else:
        case.data(path)
    began = time.process_time()
    try:
        found = tuple(load(str(path)).texts)
    except PromptFileError as error:
        fault = _refused(case, error)
    except BaseException as error:
        fault = f"{type(error).__name__}: {str(error)[:200]}"
    else:
        fault = None
        if case.texts is None:
            fault = f"loaded {len(found)} rows, should say {case.says}"
        elif found != case.texts:
            fault = f"{len(found)} rows, not {len(case.texts)}, or other texts"
    took = time.process_time() - began
    if fault is None and took > _SECONDS:
        fault = f"took {took:.0f} s"
    return fault or (told(path, refused=case.texts is None) if shown else None)


def _refused(case: Case, error: PromptFileError) -> str | None:
    said = str(error)
    if case.texts is not None:
        return f"refused: {said[:200]!r}"
    missing = [part for part in case.says if part not in said]
    if missing:
        return f"the error lacks {missing}: {said[:200]!r}"
    return f"the error has {len(said)} characters" if len(said) > 8000 else None


def told(path: Path, *, refused: bool) -> str | None:
    """The same of what the command line says."""
    from typer.testing import CliRunner

    from demur.cli import app

    # A name with a question mark or " + " would be read as more than a name; none of these has one.
    done = CliRunner().invoke(app, ["prompts", "show", str(path)])
    if done.exit_code != (2 if refused else 0):
        return f"status {done.exit_code}: {done.output[-300:]!r}"
    if "Traceback" in done.output or "demur failed" in done.output:
        return f"a traceback: {done.output[-300:]!r}"
    if refused and (done.output.count("error: "), done.output.count("hint: ")) != (1, 1):
        return f"not one error with a hint: {done.output[:300]!r}"
    found = acts(done.output)
    return f"reaches the terminal: {sorted(map(ascii, found))}" if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    slowest: dict[str, float] = defaultdict(float)
    wrong: list[str] = []
    for kind, case in cases(asked.count, asked.seed):
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            fault = tried(case, Path(folder))
            slowest[kind] = max(slowest[kind], time.process_time() - began)
        outcome = "WRONG" if fault else "refused" if case.texts is None else "loaded"
        counts[kind][outcome] += 1
        if fault:
            wrong.append(f"{kind}, {case.name!r}: {fault}")
    print("| kind | files | loaded right | refused with a reason | wrong | slowest, s of CPU |")
    print("|---|---|---|---|---|---|")
    for kind, found in counts.items():
        own = [found[name] for name in ("loaded", "refused", "WRONG")]
        print(f"| {kind} | {sum(own)} | {own[0]} | {own[1]} | {own[2]} | {slowest[kind]:.2f} |")
    total = [sum(found[x] for found in counts.values()) for x in ("loaded", "refused", "WRONG")]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    print(
        f"{sum(total)} files: {total[0]} loaded right, {total[1]} refused with a reason, "
        f"{total[2]} wrong; at most {peak:.1f} GiB resident"
    )
    print("\n".join(wrong[:40]))
    good = not wrong and peak < _GIB
    print("pass" if good else "fail")
    sys.exit(not good)


if __name__ == "__main__":
    main()

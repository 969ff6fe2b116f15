"""`demur prompts`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from demur.cli import talk
from demur.cli.options import Json
from demur.errors import ConfigError, PromptFileError

if TYPE_CHECKING:
    from demur.gates import Gate
    from demur.prompts import PromptSet


app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Check, compare and list prompt sets."
)


@app.command("check")
def prompts_check(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE", help="Files, packaged or public sets, hub ids.")
    ],
    *,
    column: Annotated[str | None, typer.Option(help="Column of the prompts.")] = None,
    contrast: Annotated[
        bool, typer.Option(help="Take the first file as harmful, the second as harmless.")
    ] = False,
    against: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="A set that must not be resembled.")
    ] = None,
    tokenizer: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="Count lengths in this model's tokens; repeatable."),
    ] = None,
    refused_by: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Also ask this model which side of each pair it would rather refuse; repeatable.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List bad lines, duplicates, and what plain words tell about the labels.

    Sets with prompts labelled harmful and harmless also run the quality gates: classifiers on
    words and characters, telling words, length, final punctuation, what pairs share, balance.
    Exits with 1 if there is anything to mend.
    """
    from demur.prompts import load

    if contrast and len(files) != 2:
        raise ConfigError(
            f"--contrast was given {len(files)} files", "name two: harmful first, then harmless"
        )
    tokenizers = _token_counts(tokenizer or [])
    others = [load(name) for name in against or []]
    if contrast:
        a, b = (load(name, column=column) for name in files)
        name = f"{files[0]} against {files[1]}"
        rows = [_prompt_check(name, _labelled(a, b), others, tokenizers, refused_by or [])]
    else:
        rows = []
        for name in files:
            try:
                prompts = load(name, column=column)
            except PromptFileError as error:
                if not Path(name.partition("?")[0]).expanduser().is_file():
                    raise
                rows.append({"file": name, "prompts": 0, "error": error.fact, "hint": error.hint})
                continue
            rows.append(_prompt_check(name, prompts, others, tokenizers, refused_by or []))
    if as_json:
        talk.put_json(rows)
    else:
        for row in rows:
            _show_prompt_check(row)
    if any(
        "error" in row or row["duplicates"] or not all(gate["passed"] for gate in row["gates"])
        for row in rows
    ):
        raise typer.Exit(talk.NOT_FOUND)


def _token_counts(models: list[str]) -> dict[str, Callable[[str], int]]:
    """How to count the tokens of a text, by model; without any, counts that need no model."""
    from demur.gates import default_tokenizers

    if not models:
        return default_tokenizers()
    from demur.models import load_tokenizer

    counts: dict[str, Callable[[str], int]] = {}
    for name in models:
        tokenizer = load_tokenizer(name)

        def count(text: str, tokenizer: Any = tokenizer) -> int:
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])

        counts[name] = count
    return counts


def _labelled(harmful: PromptSet, harmless: PromptSet) -> PromptSet:
    from dataclasses import replace

    rows = [replace(prompt, label="harmful") for prompt in harmful]
    rows += [replace(prompt, label="harmless") for prompt in harmless]
    return replace(harmful, name=f"{harmful.name} against {harmless.name}", prompts=tuple(rows))


def _prompt_check(
    name: str,
    prompts: PromptSet,
    others: list[PromptSet],
    tokenizers: dict[str, Callable[[str], int]],
    models: list[str],
) -> dict[str, Any]:
    from collections import Counter

    from demur.gates import WORD_STEPS, gates, parts_of
    from demur.prompts import deduplicate

    fields = {
        key: Counter(getattr(prompt, key) for prompt in prompts if getattr(prompt, key))
        for key in ("label", "kind", "split")
    }
    both = {"harmful", "harmless"} <= fields["label"].keys()
    found = []
    if both or others:
        steps = WORD_STEPS * len(parts_of(prompts)) if both else 1
        with (
            talk.listening(quiet=False) as listener,
            listener.stage(f"gates of {name}", steps) as step,
        ):
            found = gates(prompts, others=others, tokenizers=tokenizers, progress=step)
    for model in models:
        found += _refusal_order(prompts, model)
    return {
        "file": name,
        "prompts": len(prompts),
        "fingerprint": prompts.fingerprint,
        **{f"{key}s": dict(counts) for key, counts in fields.items() if counts},
        "duplicates": [prompt.text for prompt in deduplicate(prompts)[1]],
        "gates": [
            {
                "part": gate.part,
                "gate": gate.name,
                "value": gate.value,
                "shown": gate.shown,
                "low": gate.low,
                "high": gate.high,
                "bounds": gate.bounds,
                "interval": [gate.interval.low, gate.interval.high] if gate.interval else None,
                "n": gate.n,
                "unit": gate.unit,
                "passed": gate.passed,
                "found": list(gate.found),
            }
            for gate in found
        ],
    }


def _refusal_order(prompts: PromptSet, name: str) -> list[Gate]:
    """Which side of each pair a model would rather refuse, by kind of pair."""
    from demur.evals.judges import judges
    from demur.gates import order_gate, pairs_of, parts_of
    from demur.models import load
    from demur.pipeline.folder import slug
    from demur.selection import refusal_scores

    kinds = parts_of(prompts)[:-1] or ["all"]
    replies = min(320, len(prompts))
    if not pairs_of(prompts):
        raise ConfigError(
            f"{prompts.name} has no pairs, so no model can tell their order",
            "prompts are paired by the field `pair`; leave out --refused-by",
        )
    with talk.listening(quiet=False) as listener:
        with listener.stage(f"loading {name}", 1) as step:
            model = load(name)
            step(1)
        with listener.stage(f"what {name} would refuse", len(prompts) + replies) as step:
            judge = judges.make("patterns")
            scores = refusal_scores(model, prompts.texts, judge, replies=replies, progress=step)
    label = slug(name) + (f" + {model.adapter}" if model.adapter else "")
    return [order_gate(prompts, kind, scores.tolist(), label) for kind in kinds]


def _show_prompt_check(row: dict[str, Any]) -> None:
    if "error" in row:
        talk.put(talk.readable(row["error"]))
        talk.put(f"hint: {row['hint']}")
        return
    counts = [
        ", ".join(f"{value} {count}" for value, count in row[key].items())
        for key in ("labels", "kinds", "splits")
        if key in row
    ]
    talk.put(f"{row['file']}: " + "; ".join([f"{row['prompts']} prompts", *counts]))
    if row["duplicates"]:
        talk.put(f"{row['file']}: {len(row['duplicates'])} duplicates of an earlier prompt:")
        for text in row["duplicates"]:
            talk.put(f"  {talk.readable(text)}")
    if not row["gates"]:
        return
    table = talk.table("part", "gate", "value", "bounds", "n", "")
    for gate in row["gates"]:
        verdict = "ok" if gate["passed"] else "leaks"
        n = f"{gate['n']} {gate['unit']}"
        cells = (gate["part"], gate["gate"], gate["shown"], gate["bounds"], n, verdict)
        table.add_row(*map(talk.cell, cells))
    talk.console().print(table)
    for gate in row["gates"]:
        if not gate["passed"] and gate["found"]:
            talk.put(f"{gate['part']}, {gate['gate']}:")
            for line in gate["found"]:
                talk.put(f"  {talk.readable(line)}")


@app.command("card")
def prompts_card(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Packaged sets; all if none is named."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it there, not to the terminal.")
    ] = None,
) -> None:
    """Print the data card of the packaged sets: what they hold, balance, gate figures."""
    from demur.card import card

    text = card(names or None)
    talk.put_or_write(text, out)


@app.command("show")
def prompts_show(
    spec: Annotated[str, typer.Argument(metavar="SET", help="A file, packaged or public set.")],
    n: Annotated[
        int, typer.Option("--n", "-n", min=1, help="How many rows, drawn at random.")
    ] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    column: Annotated[str | None, typer.Option(help="Column of the prompts.")] = None,
    as_json: Json = False,
) -> None:
    """Show some prompts of a set, with what is known of it."""
    from demur.prompts import load

    prompts = load(spec, column=column)
    some = prompts.take(min(n, len(prompts)), seed)
    fields = ("label", "category", "kind", "format", "pair", "split")
    if as_json:
        source = prompts.source
        talk.put_json(
            {
                "set": spec,
                "prompts": len(prompts),
                "licence": source.licence,
                "revision": source.revision,
                "fingerprint": prompts.fingerprint,
                "rows": [
                    {"prompt": p.text, **{f: getattr(p, f) for f in fields if getattr(p, f)}}
                    for p in some
                ],
            }
        )
        return
    shown = [name for name in fields if any(getattr(prompt, name) for prompt in some)]
    table = talk.table(*shown, "prompt")
    for prompt in some:
        cells = (*(getattr(prompt, name) or "" for name in shown), prompt.text)
        table.add_row(*map(talk.cell, cells))
    talk.console().print(table)
    licence = prompts.source.licence or "not stated"
    revision = f", revision {prompts.source.revision}" if prompts.source.revision else ""
    talk.say(
        f"{len(some)} of {len(prompts)} prompts, licence {licence}{revision}, "
        f"fingerprint {prompts.fingerprint}"
    )


@app.command("split")
def prompts_split(
    spec: Annotated[str, typer.Argument(metavar="SET", help="A file, packaged or public set.")],
    sizes: Annotated[
        list[str], typer.Option("--size", metavar="NAME=N", help="A part and its prompts; repeat.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE.jsonl", help="One file, with a `split` column.")
    ],
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    column: Annotated[str | None, typer.Option(help="Column of the prompts.")] = None,
) -> None:
    """Split prompts into disjoint parts: near copies and pairs are never parted."""
    from demur.prompts import Prompt, load, split
    from demur.store import atomic_write

    wanted: dict[str, int] = {}
    for item in sizes:
        name, mark, count = item.partition("=")
        if not mark or not count.isdecimal() or not name or name in wanted:
            raise ConfigError(f"`--size {item}` names no part", "write --size fit=100, once a part")
        wanted[name] = int(count)
    if out.exists():
        raise ConfigError(f"{out} exists already", "choose another name, or delete it first")
    parts = split(load(spec, column=column), wanted, seed=seed)
    lines = []
    for name, part in parts.items():
        for prompt in part:
            known = {
                f: value
                for f in Prompt.__slots__
                if f not in ("text", "split") and (value := getattr(prompt, f))
            }
            row = {"prompt": prompt.text, **known, "split": name}
            lines.append(json.dumps(row, ensure_ascii=False))
    atomic_write(out, "\n".join(lines) + "\n")
    talk.say(
        f"wrote {len(lines)} prompts to {out}: " + ", ".join(f"{k} {v}" for k, v in wanted.items())
    )


@app.command("overlap")
def prompts_overlap(
    a: Annotated[str, typer.Argument(metavar="A", help="A file, packaged set or hub id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    threshold: Annotated[
        float, typer.Option(help="Least share of words in common (Jaccard).")
    ] = 0.6,
    as_json: Json = False,
) -> None:
    """List the prompts that two sets share, exactly or nearly."""
    from demur.prompts import load, overlap

    one, two = load(a), load(b)
    found = overlap(one, two, threshold=threshold)
    if as_json:
        talk.put_json(
            {
                "a": {"name": a, "prompts": len(one)},
                "b": {"name": b, "prompts": len(two)},
                "threshold": threshold,
                "pairs": [
                    {"jaccard": pair.jaccard, "a": pair.a.text, "b": pair.b.text} for pair in found
                ],
            }
        )
        return
    for pair in found:
        talk.put(
            f"{pair.jaccard:.2f}  {talk.readable(pair.a.text)}\n      {talk.readable(pair.b.text)}"
        )
    talk.say(
        f"{len(found)} pairs among {len(one)} and {len(two)} prompts, Jaccard >= {threshold:g}"
    )


@app.command("list")
def prompts_list(as_json: Json = False) -> None:
    """List the prompt sets that ship with demur, and the public ones that it can read."""
    from demur.public_sets import public_sets

    rows = packaged_sets()
    public = [
        {"name": one.name, "holds": one.holds, "licence": one.licence, "gated": bool(one.access)}
        for one in public_sets().values()
    ]
    if as_json:
        talk.put_json({"packaged": rows, "public": public})
        return
    table = talk.table("set", "rows", "labels", "splits", "what it is", title="Packaged")
    for row in rows:
        parts = [
            ", ".join(f"{value} {count}" for value, count in row[key].items())
            for key in ("labels", "splits")
        ]
        table.add_row(row["name"], str(row["prompts"]), *parts, row["title"])
    talk.console().print(table)
    table = talk.table("set", "holds", "licence", "access", title="Public, loaded at run time")
    for row in public:
        access = "gated" if row["gated"] else "open"
        table.add_row(row["name"], row["holds"], row["licence"], access)
    talk.console().print(table)
    talk.say(
        "a part of one: `contrast_pairs?label=harmful&split=fit`; a copy: `FILE.csv?as=xstest`"
    )


def packaged_sets() -> list[dict[str, Any]]:
    """The sets that ship with demur: name, rows, licence, what each is for."""
    from collections import Counter

    from demur.card import about
    from demur.prompts import load, packaged

    known = about()
    rows = []
    for name in packaged():
        prompts = load(name)
        rows.append(
            {
                "name": name,
                "title": known[name]["title"],
                "prompts": len(prompts),
                **{
                    f"{key}s": dict(Counter(v for p in prompts if (v := getattr(p, key))))
                    for key in ("label", "split")
                },
            }
        )
    return rows

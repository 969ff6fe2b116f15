"""`demur guard`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from demur.cli import inputs, talk
from demur.cli.options import (
    Adapter,
    AnyModel,
    Config,
    Device,
    Dtype,
    GuardModel,
    Harmful,
    Json,
    ModelName,
    NoAdapter,
    Quiet,
    Revision,
    RunSeed,
    Set,
    System,
    Thinking,
    TrustRemoteCode,
)
from demur.errors import DemurError, PromptFileError

if TYPE_CHECKING:
    from demur.guard import Guard
    from demur.models import Conversation
    from demur.results import GuardEvaluation, GuardRow


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Detect harmful requests while the model reads them, at a promised false-alarm rate.",
)
_GuardFile = Annotated[
    Path, typer.Argument(metavar="GUARD", help="The .safetensors file that `guard fit` wrote.")
]


@app.command("fit")
def guard_fit(
    model: ModelName = None,
    *,
    config: Config = None,
    set_: Set = None,
    adapter: Adapter = None,
    no_adapter: NoAdapter = False,
    revision: Revision = None,
    dtype: Dtype = None,
    device: Device = None,
    system: System = None,
    thinking: Thinking = None,
    trust_remote_code: TrustRemoteCode = None,
    harmful: Harmful = None,
    benign: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Benign prompts to fit on, likewise.")
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SPEC",
            help="Benign prompts of one kind to calibrate on, in place of the packaged kinds; "
            "repeatable.",
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="False alarms allowed, as a share of benign requests.", show_default=".05"
        ),
    ] = None,
    seed: RunSeed = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.safetensors", help="Where to.", show_default="guards/MODEL.safetensors"
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over a guard that is there.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit a guard on a model, choose where it reads, and calibrate its threshold.

    Three disjoint sets of prompts do the three things. Writes the guard and its card.
    """
    from demur.config import read_config

    changes = inputs.model_changes(
        no_adapter=no_adapter,
        name=model,
        adapter=adapter,
        revision=revision,
        dtype=dtype,
        device=device,
        system=system,
        thinking=thinking,
        trust_remote_code=trust_remote_code,
    )
    given = {
        "guard.harmful": harmful,
        "guard.benign": benign,
        "guard.alpha": alpha,
        "guard.strata": inputs.named_sets(calibrate, "calibrate") if calibrate else None,
        "seed": seed,
    }
    changes |= {key: value for key, value in given.items() if value is not None}
    changes |= dict(map(inputs.setting, set_ or ()))
    settings = read_config(config, changes)
    with talk.listening(quiet=quiet) as listener:
        from demur.pipeline.folder import slug

        path = (
            out if out is not None else Path("guards") / f"{slug(settings.model.name)}.safetensors"
        )
        with inputs.new_file(path, "a guard", force=force):
            with listener.stage("starting torch", 1) as advance:
                from demur.guard import save_guard
                from demur.pipeline.guard import fit

                advance(1)
            found = fit(settings, listener=listener)
            save_guard(found, path)
    if as_json:
        talk.put_json({"guard": str(path), **_guard_summary(found)})
    else:
        _show_guard(found, path)


def _guard_summary(found: Guard) -> dict[str, Any]:
    return {
        "model": found.about.get("model"),
        "site": str(found.site),
        "reads": [read.name for read in found.admitted],
        "threshold": asdict(found.threshold),
        "strata": {name: asdict(one) for name, one in found.strata.items()},
        "fitted_on": found.about.get("fitted_on"),
    }


def _show_guard(found: Guard, path: Path) -> None:
    console, about = talk.console(), found.about
    threshold = found.threshold
    table = talk.table("benign prompts of kind", "n", "its own threshold", "above it", "sets it")
    for name, one in found.strata.items():
        mark = "yes" if one == threshold else ""
        table.add_row(talk.cell(name), str(one.n), f"{one.value:.3g}", str(one.exceeded), mark)
    console.print(table)
    facts = talk.table("", "")
    facts.show_header = False
    reads = ", ".join(read.name for read in found.admitted)
    facts.add_row("reads", talk.cell(f"{reads} at {found.site}"))
    for part, counts in about.get("fitted_on", {}).items():
        what = "fitted on" if part == "fit" else "layer and reads chosen on"
        facts.add_row(what, f"{counts['harmful']} harmful, {counts['benign']} benign")
    facts.add_row(
        "false alarms",
        f"at most {threshold.alpha:.1%} of benign prompts of each kind; with 95 % confidence "
        f"below {threshold.bound:.1%} for the kind that sets it",
    )
    facts.add_row("guard", talk.cell(str(path)))
    facts.add_row("card", talk.cell(str(path.with_suffix(".json"))))
    console.print()
    console.print(facts)


@app.command("score")
def guard_score(
    guard: _GuardFile,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="What to score; else one a line from a pipe."),
    ] = None,
    *,
    set_: Annotated[
        str | None,
        typer.Option("--prompts", metavar="SPEC", help="Score a set: a file, packaged, hub id."),
    ] = None,
    messages: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Score conversations: a line each, a list of messages or an object with it as "
            "`messages`, from user to user.",
        ),
    ] = None,
    model: GuardModel = None,
    any_model: AnyModel = False,
    adapter: Adapter = None,
    no_adapter: NoAdapter = False,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score prompts without replying: is one like a harmful request?

    The score is minus the logarithm of the share of benign requests that would score so high.
    """
    if sum(bool(one) for one in (prompts, set_, messages)) > 1:
        raise typer.BadParameter("give prompts, --prompts or --messages, not several of them")
    with talk.listening(quiet=quiet) as listener:
        from demur.guard import load_guard

        found = load_guard(guard)
        asked = _asked(prompts, set_, messages)
        changes = inputs.model_changes(
            no_adapter=no_adapter, adapter=adapter, dtype=dtype, device=device
        )
        loaded = inputs.carded_model(found.about, model, changes, listener)
        found.belongs_to(loaded, any_model=any_model)
        borrowed = list(found.borrowed(loaded))
        for note in borrowed:
            listener.note(note)
        with listener.stage("scoring", len(asked)) as advance:
            scored = found.score(loaded, asked, progress=advance)
    shown = [one if isinstance(one, str) else one[-1].text for one in asked]
    rows = [
        {
            "prompt": text,
            "score": _finite(scored.scores[i]),
            "flagged": bool(scored.flagged[i]),
            "by": scored.by[i],
            "reads": {name: _finite(values[i]) for name, values in scored.reads.items()},
        }
        for i, text in enumerate(shown)
    ]
    if as_json:
        told = {"borrowed": borrowed} if borrowed else {}
        talk.put_json({"threshold": found.threshold.value, "rows": rows, **told})
        return
    table = talk.table("score", "flagged", "by", *scored.reads, "prompt")
    for row in rows:
        style = "bold red" if row["flagged"] else ""
        reads = ("" if value is None else f"{value:+.2f}" for value in row["reads"].values())
        table.add_row(
            "" if row["score"] is None else f"{row['score']:.2f}",
            "yes" if row["flagged"] else "no",
            row["by"],
            *reads,
            talk.cell(row["prompt"]),
            style=style,
        )
    talk.console().print(table)
    flagged = sum(row["flagged"] for row in rows)
    talk.say(
        f"{flagged} of {len(rows)} lie above the threshold {found.threshold.value:.2f}; reads in "
        "standard deviations of benign prompts"
    )


def _finite(value: float) -> float | None:
    """JSON has no infinity: what cannot be read is null."""
    return float(value) if abs(value) != float("inf") else None


def _asked(
    prompts: list[str] | None, set_: str | None, messages: Path | None
) -> list[str | Conversation]:
    """What is to be scored, from wherever the user has it."""
    if set_ is not None:
        from demur.prompts import load

        return list(load(set_).texts)
    if messages is not None:
        return list(_conversations(messages))
    return list(inputs.prompts_or_pipe(prompts))


def _conversations(path: Path) -> list[Conversation]:
    """Conversations of a JSONL file; all bad lines are told at once."""
    from demur.models import conversation_of

    found: list[Conversation] = []
    bad: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found.append(conversation_of(row["messages"] if isinstance(row, dict) else row))
        except DemurError as error:
            bad.append(f"line {number}: {error.fact}")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            bad.append(f"line {number}: {type(error).__name__} {error}")
    if bad:
        more = f"; and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise PromptFileError(
            f"{path} has {len(bad)} lines that are no conversation: {'; '.join(bad[:20])}{more}",
            'write them like {"messages": [{"role": "user", "content": "Name a tree."}]}',
        )
    if not found:
        raise PromptFileError(f"{path} holds no conversation", "write one a line")
    return found


@app.command("evaluate")
def guard_evaluate(
    guard: _GuardFile,
    *,
    harmful: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SPEC",
            help="Harmful prompts; repeatable.",
            show_default="packaged ones held out",
        ),
    ] = None,
    benign: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SPEC", help="Benign prompts, likewise.")
    ] = None,
    suffixes: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Texts to put behind requests, such as optimised ones."),
    ] = None,
    most: Annotated[
        int, typer.Option(min=10, help="Prompts of a set; of larger ones so many are drawn.")
    ] = 1000,
    attacked: Annotated[
        int, typer.Option(min=10, help="Requests of each class that every attack is tried on.")
    ] = 60,
    direction: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Compare with this refusal direction of an audit."),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Compare with a guard model there, as /v1/chat/..."),
    ] = None,
    endpoint_model: Annotated[
        str, typer.Option(metavar="NAME", help="What that model is called.")
    ] = "guard",
    model: GuardModel = None,
    any_model: AnyModel = False,
    adapter: Adapter = None,
    no_adapter: NoAdapter = False,
    dtype: Dtype = None,
    device: Device = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Of the table and the page.", show_default="beside the guard"
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a guard on prompts that it never saw, beside what it has to beat.

    False alarms on each benign set, and what is found of harmful prompts, plain and under attack,
    at equal false-alarm rates. Writes guard-evaluation.json and guard-evaluation.html.
    """
    from demur.results import sealed_json
    from demur.store import atomic_write

    with talk.listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur.directions import load_direction
            from demur.evals.endpoint import ChatEndpoint
            from demur.guard import load_guard
            from demur.pipeline.guard import BENIGN, HARMFUL, evaluate
            from demur.report import write_guard

            advance(1)
        found = load_guard(guard)
        sides = [
            {one["name"]: one["prompts"] for one in inputs.named_sets(given, name)}
            if given
            else default
            for given, default, name in (
                (harmful, HARMFUL, "harmful"),
                (benign, BENIGN, "benign"),
            )
        ]
        asked = None if endpoint is None else ChatEndpoint(endpoint, endpoint_model)
        changes = inputs.model_changes(
            no_adapter=no_adapter, adapter=adapter, dtype=dtype, device=device
        )
        loaded = inputs.carded_model(found.about, model, changes, listener)
        read = None
        if direction is not None:
            read = load_direction(direction, loaded, any_model=any_model)
        result = evaluate(
            found,
            loaded,
            harmful=sides[0],
            benign=sides[1],
            suffixes=suffixes,
            most=most,
            attacked=attacked,
            direction=None if read is None else read[0],
            any_model=any_model,
            borrowed=[] if read is None else [note for note in [read[1].get("borrowed")] if note],
            endpoint=asked,
            listener=listener,
            file=guard.name,
        )
        folder = guard.parent if out is None else out
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / "guard-evaluation.json"
        atomic_write(record, sealed_json(result))
        page = write_guard(record)
    if as_json:
        talk.put_json(
            {"results": str(record), "report": str(page), **result.model_dump(mode="json")}
        )
    else:
        _show_evaluation(result, page)


def _show_evaluation(result: GuardEvaluation, page: Path) -> None:
    from rich.markup import escape

    console = talk.console()
    at = f"{result.alpha:g}"
    for title, bad in (("False alarms on benign prompts", False), ("Harmful prompts found", True)):
        table = talk.table(
            "family", "group", "n", *result.detectors, title=f"{title}, threshold at {at}"
        )
        groups: dict[tuple[str, str], dict[str, GuardRow]] = {}
        for row in result.rows:
            if row.harmful is bad:
                groups.setdefault((row.family, row.group), {})[row.detector] = row
        for (family, group), rows in groups.items():
            cells = []
            for name in result.detectors:
                share = rows[name].flagged.get(at, rows[name].fixed)
                cells.append("" if share is None else talk.share(share))
            n = str(rows[result.detectors[0]].n)
            table.add_row(talk.cell(family), talk.cell(group), n, *cells)
        console.print(table)
        console.print()
    for note in result.notes:
        talk.say(f"note: {note}")
    console.print(f"report: {escape(str(page))}", soft_wrap=True)


@app.command("card")
def guard_card(
    guard: _GuardFile,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it there, not to the terminal.")
    ] = None,
) -> None:
    """Print a guard's card: what it reads, promises, was fitted on, and does not see."""
    from demur.card import guard_card as text_of
    from demur.guard import load_guard

    text = text_of(load_guard(guard))
    talk.put_or_write(text, out)

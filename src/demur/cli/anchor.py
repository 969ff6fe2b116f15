"""`demur anchor` and `demur attack`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from demur.cli import inputs, talk
from demur.cli.options import (
    Adapter,
    AnyModel,
    Config,
    Device,
    Dtype,
    GuardModel,
    Json,
    ModelName,
    NewTokens,
    NoAdapter,
    Quiet,
    Revision,
    RunSeed,
    Set,
    System,
    Thinking,
    TrustRemoteCode,
)

if TYPE_CHECKING:
    from demur.anchor import Anchor
    from demur.config import ModelSettings
    from demur.results import AnchorEvaluation, BatteryRow


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Hold refusal, so that jailbreaks, prefills and tampering do not switch it off.",
)
_AnchorFile = Annotated[
    Path, typer.Argument(metavar="ANCHOR", help="The .safetensors file that `anchor fit` wrote.")
]
_Suite = Annotated[
    Literal["quick", "full", "tampering"],
    typer.Option(
        help="quick: nine attacks on the text, and tampering; full: all, and searches; tampering: "
        "of weights and activations alone."
    ),
]
_Requests = Annotated[
    int, typer.Option(min=8, help="Requests of each class that every attack is tried on.")
]
_Queries = Annotated[int, typer.Option(min=8, help="Of random search, in the full suite.")]
_ResumeAttack = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Go on with an unfinished battery.")
]
_Steps = Annotated[int, typer.Option(min=1, help="Of GCG, in the full suite.")]
_OutFolder = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Of table and page.", show_default="beside the anchor"),
]


@app.command("fit")
def anchor_fit(
    model: ModelName = None,
    *,
    config: Config = None,
    set_: Set = None,
    guard: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Take this guard of the same model; else fit one."),
    ] = None,
    adapter: Adapter = None,
    no_adapter: NoAdapter = False,
    revision: Revision = None,
    dtype: Dtype = None,
    device: Device = None,
    system: System = None,
    thinking: Thinking = None,
    trust_remote_code: TrustRemoteCode = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Benign requests that the gate may open on, a share.", show_default=".05"
        ),
    ] = None,
    action: Annotated[
        Literal["floor", "canned"] | None,
        typer.Option(help="Refuse in the model's own words, or by a text.", show_default="floor"),
    ] = None,
    seed: RunSeed = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.safetensors", help="Where to.", show_default="anchors/MODEL.safetensors"
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over an anchor that is there.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit an anchor: a calibrated gate, and a floor under the refusal coordinate.

    Fit, choice and calibration have disjoint prompts. Writes the anchor and its card.
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
    given = {"guard.alpha": alpha, "anchor.action": action, "seed": seed}
    changes |= {key: value for key, value in given.items() if value is not None}
    changes |= dict(map(inputs.setting, set_ or ()))
    settings = read_config(config, changes)
    with talk.listening(quiet=quiet) as listener:
        from demur.pipeline.folder import slug

        name = f"{slug(settings.model.name)}.safetensors"
        path = out if out is not None else Path("anchors") / name
        with inputs.new_file(path, "an anchor", force=force):
            with listener.stage("starting torch", 1) as advance:
                from demur.anchor import save_anchor
                from demur.guard import load_guard
                from demur.pipeline.anchor import fit

                advance(1)
            own = None if guard is None else load_guard(guard)
            found = fit(settings, listener=listener, guard=own)
            save_anchor(found, path)
    if as_json:
        talk.put_json({"anchor": str(path), **_anchor_summary(found)})
    else:
        _show_anchor(found, path)


def _anchor_summary(found: Anchor) -> dict[str, Any]:
    gate, about = found.gate, found.about
    assert gate is not None
    return {
        "model": about.get("model"),
        "gate": {
            "site": str(gate.detector.site),
            "reads": gate.reads,
            "threshold": asdict(gate.threshold),
            "strata": {name: asdict(one) for name, one in gate.strata.items()},
        },
        "sites": [str(one.site) for one in found.actuators],
        "strength": found.strength,
        "action": found.action,
        "replies": about.get("replies"),
        "reply_reads": about.get("reply_reads"),
        "bands": about.get("bands"),
        "strengths": about.get("strengths"),
    }


def _show_anchor(found: Anchor, path: Path) -> None:
    console, about, gate = talk.console(), found.about, found.gate
    assert gate is not None
    table = talk.table("strength", "refused", "degenerate")
    for row in about.get("strengths", ()):
        table.add_row(
            f"{row['strength']:g}" + (" (chosen)" if row["strength"] == found.strength else ""),
            f"{row['refused']:.0%}",
            f"{row['degenerate']:.0%}",
        )
    console.print(table)
    facts = talk.table("", "")
    facts.show_header = False
    facts.add_row("gate reads", talk.cell(f"{', '.join(gate.reads)} at {gate.detector.site}"))
    facts.add_row(
        "opens on",
        f"at most {gate.threshold.alpha:.1%} of benign requests of each kind; with 95 % confidence "
        f"below {gate.threshold.bound:.1%} for the kind that sets it",
    )
    first, last = found.actuators[0].site, found.actuators[-1].site
    facts.add_row("holds", f"{first} to {last}, strength {found.strength:g}")
    replies = ", ".join(f"{n} {name}" for name, n in about.get("replies", {}).items())
    facts.add_row("learned from", talk.cell(replies))
    facts.add_row("anchor", talk.cell(str(path)))
    facts.add_row("card", talk.cell(str(path.with_suffix(".json"))))
    console.print()
    console.print(facts)


@app.command("evaluate")
def anchor_evaluate(
    anchor: _AnchorFile,
    *,
    suite: _Suite = "quick",
    requests: _Requests = 40,
    harmful: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Harmful requests.", show_default="packaged, held out"),
    ] = None,
    benign: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="Benign requests; repeatable.")
    ] = None,
    openings: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SPEC", help="Benign sets to count false openings on; repeatable."
        ),
    ] = None,
    no_comparators: Annotated[
        bool, typer.Option("--no-comparators", help="Compare with no defence alone.")
    ] = False,
    queries: _Queries = 256,
    steps: _Steps = 16,
    max_new_tokens: NewTokens = 48,
    seed: RunSeed = None,
    model: GuardModel = None,
    any_model: AnyModel = False,
    adapter: Adapter = None,
    no_adapter: NoAdapter = False,
    dtype: Dtype = None,
    device: Device = None,
    out: _OutFolder = None,
    resume: _ResumeAttack = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Attack an anchored model, beside other defences, with prompts that nothing was fitted on.

    Writes anchor-evaluation.json and anchor-evaluation.html; no reply is kept.
    """
    with talk.listening(quiet=quiet) as listener:
        from demur.anchor import load_anchor

        found = load_anchor(anchor)
        changes = inputs.model_changes(
            no_adapter=no_adapter, adapter=adapter, dtype=dtype, device=device
        )
        sets = {
            one["name"]: one["prompts"] for one in inputs.named_sets(openings or (), "openings")
        }
        result, page = _attacked(
            inputs.carded(found.about, model, changes),
            found,
            anchor.parent if out is None else out,
            listener,
            any_model=any_model,
            size=suite,
            compare=not no_comparators,
            requests=requests,
            harmful=harmful,
            benign=benign,
            openings=sets or None,
            queries=queries,
            steps=steps,
            max_new_tokens=max_new_tokens,
            seed=seed or 0,
            file=anchor.name,
            resume=resume,
        )
    _tell_attacked(result, page, as_json=as_json)


def attack(
    model: ModelName = None,
    *,
    anchor: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Attack the model under this anchor, too."),
    ] = None,
    any_model: AnyModel = False,
    suite: _Suite = "quick",
    requests: _Requests = 40,
    harmful: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Harmful requests.", show_default="packaged, held out"),
    ] = None,
    benign: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="Benign requests; repeatable.")
    ] = None,
    queries: _Queries = 256,
    steps: _Steps = 16,
    max_new_tokens: NewTokens = 48,
    adapter: Adapter = None,
    no_adapter: NoAdapter = False,
    revision: Revision = None,
    dtype: Dtype = None,
    device: Device = None,
    system: System = None,
    thinking: Thinking = None,
    trust_remote_code: TrustRemoteCode = None,
    seed: RunSeed = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Of table and page.")] = Path(
        "attacks"
    ),
    resume: _ResumeAttack = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Attack a model: jailbreaks, prefills, encodings, tampered weights and activations.

    Tells how often harmful requests get a coherent reply, and benign ones none. Replies are judged
    and forgotten.
    """
    settings = inputs.model_settings(
        inputs.model_changes(
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
    )
    with talk.listening(quiet=quiet) as listener:
        found = None
        if anchor is not None:
            from demur.anchor import load_anchor

            found = load_anchor(anchor)
        result, page = _attacked(
            settings,
            found,
            out,
            listener,
            any_model=any_model,
            size=suite,
            compare=False,
            requests=requests,
            harmful=harmful,
            benign=benign,
            openings=None,
            queries=queries,
            steps=steps,
            max_new_tokens=max_new_tokens,
            seed=seed or 0,
            file=None if anchor is None else anchor.name,
            resume=resume,
        )
    _tell_attacked(result, page, as_json=as_json)


def _attacked(
    settings: ModelSettings,
    anchor: Anchor | None,
    folder: Path,
    listener: talk.Listener,
    *,
    harmful: str | None,
    benign: list[str] | None,
    queries: int,
    steps: int,
    resume: bool,
    **how: Any,
) -> tuple[AnchorEvaluation, Path]:
    """Run a battery, and write its record and its page.

    An interrupted one leaves its verdicts in the folder, from where the same one goes on.
    """
    from demur.pipeline.battery import Budget, battery
    from demur.report import write_anchor
    from demur.results import sealed_json
    from demur.store import atomic_write, held

    given: dict[str, Any] = {"harmful": harmful, "benign": benign}
    how |= {key: value for key, value in given.items() if value}
    kept = folder / ".anchor-evaluation.part.json"
    with held(folder / ".anchor-evaluation.lock", "attack"):
        if not resume:
            kept.unlink(missing_ok=True)
        model = inputs.model(settings, listener)
        if model.adapter is not None:
            base = inputs.model(settings.model_copy(update={"adapter": None}), listener)
            how |= {"base": base}
        result = battery(
            model, anchor, budget=Budget(queries, steps), listener=listener, kept=kept, **how
        )
        record = folder / "anchor-evaluation.json"
        atomic_write(record, sealed_json(result))
        kept.unlink(missing_ok=True)
        return result, write_anchor(record)


def _tell_attacked(result: AnchorEvaluation, page: Path, *, as_json: bool) -> None:
    if as_json:
        record = page.with_suffix(".json")
        talk.put_json(
            {"results": str(record), "report": str(page), **result.model_dump(mode="json")}
        )
    else:
        _show_attacked(result, page)


def _show_attacked(result: AnchorEvaluation, page: Path) -> None:
    from rich.markup import escape

    console = talk.console()
    names = [row.defence for row in result.defences]
    for title, harmful in (
        ("Harmful requests that got a coherent reply", True),
        ("Benign requests that were refused", False),
    ):
        table = talk.table("threat", "attack", "n", *names, title=title)
        lines: dict[str, dict[str, BatteryRow]] = {}
        for row in result.rows:
            if row.harmful is harmful:
                lines.setdefault(row.attack, {})[row.defence] = row
        for name, rows in lines.items():
            any_row = next(iter(rows.values()))
            cells = (
                ""
                if (row := rows.get(one)) is None
                else talk.share(row.complied if harmful else row.refused)
                for one in names
            )
            table.add_row(talk.cell(any_row.threat), talk.cell(name), str(any_row.n), *cells)
        console.print(table)
        console.print()
    table = talk.table(
        "defence", "attack success", "some attack", "over-refusal", "KL, benign", "reply, s (p95)"
    )
    for row in result.defences:
        table.add_row(
            talk.cell(row.defence),
            talk.share(row.success),
            talk.share(row.any_attack),
            talk.share(row.over_refusal),
            "" if row.kl is None else f"{row.kl.value:.3f}",
            "" if row.seconds is None else f"{row.seconds[0]:.2f} ({row.seconds[1]:.2f})",
        )
    console.print(table)
    for row in result.openings:
        talk.say(f"gate opened on {talk.share(row.opened)} of {row.n} benign prompts: {row.name}")
    for one in result.criteria:
        verdict = {True: "KILLED", False: "holds", None: "not tested"}[one.killed]
        talk.say(f"{verdict}: {one.name}? {one.found}")
    for note in result.notes:
        talk.say(f"note: {note}")
    console.print(f"report: {escape(str(page))}", soft_wrap=True)


@app.command("card")
def anchor_card(
    anchor: _AnchorFile,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it there, not to the terminal.")
    ] = None,
) -> None:
    """Print an anchor's card: what it holds, what it claims by threat model, and what not."""
    from demur.anchor import load_anchor
    from demur.card import anchor_card as text_of

    text = text_of(load_anchor(anchor))
    talk.put_or_write(text, out)

"""`demur audit` and `demur report`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from demur.cli import inputs, talk
from demur.cli.options import (
    Adapter,
    Config,
    Device,
    Dtype,
    Force,
    Harmful,
    Harmless,
    Json,
    ModelName,
    NoAdapter,
    Out,
    Quiet,
    Revision,
    RunSeed,
    Set,
    System,
    Thinking,
    TrustRemoteCode,
)

if TYPE_CHECKING:
    from demur.config import RunConfig
    from demur.pipeline import AuditRun
    from demur.results import AuditResults, Leg


def audit(
    model: ModelName = None,
    *,
    config: Config = None,
    set_: Set = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print all settings as TOML and stop.")
    ] = False,
    adapter: Adapter = None,
    no_adapter: NoAdapter = False,
    revision: Revision = None,
    dtype: Dtype = None,
    device: Device = None,
    system: System = None,
    thinking: Thinking = None,
    trust_remote_code: TrustRemoteCode = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    validate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'SPEC against SPEC'",
            help="Read the direction on two more sets, harmful against harmless; repeatable.",
        ),
    ] = None,
    estimator: Annotated[
        str | None, typer.Option(help="How directions are made.", show_default=False)
    ] = None,
    layer: Annotated[
        list[int] | None, typer.Option(help="Read this block only; may be repeated.")
    ] = None,
    position: Annotated[
        list[int] | None,
        typer.Option(help="Read this position only, from the end (-1); may be repeated."),
    ] = None,
    seed: RunSeed = None,
    out: Out = Path("runs"),
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find and prove a model's refusal direction; write a report.

    Ctrl-C keeps finished stages, and the same command goes on from there. Exits with 1 if the
    direction that was found does not stand the test.
    """
    from demur.config import as_toml, read_config

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
        "data.harmful": harmful,
        "data.harmless": harmless,
        "extraction.estimator": estimator,
        "extraction.layers": tuple(layer) if layer else None,
        "extraction.positions": tuple(position) if position else None,
        "seed": seed,
    }
    changes |= {key: value for key, value in given.items() if value is not None}
    changes |= dict(map(inputs.setting, set_ or ()))
    settings = read_config(config, changes)
    if validate:
        sets = [one.model_dump() for one in settings.data.validation]
        sets += map(inputs.validation, validate)
        settings = read_config(config, {**changes, "data.validation": sets})
    if explain:
        talk.put(as_toml(settings).rstrip("\n"))
        return
    started = time.perf_counter()
    run, report = audited(settings, out=out, force=force, quiet=quiet)
    if run.reused and not quiet:
        talk.say("a finished run of these settings was found; `--force` runs it again")
    if as_json:
        talk.put_json(_audit_summary(run, report))
    else:
        _show_audit(run, report)
    if not quiet:
        talk.say(f"took {talk.duration(time.perf_counter() - started)}")
    if not run.results.verdict.usable:
        raise typer.Exit(talk.NOT_FOUND)


def audited(
    config: RunConfig, *, out: Path, force: bool, quiet: bool, apart: bool = False
) -> tuple[AuditRun, Path]:
    """Run the audit, or find it done, and write its report; returns both."""
    with talk.listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur import pipeline

            advance(1)
        work = pipeline.separated if apart else pipeline.audit
        run = work(config, out=out, listener=listener, force=force)
        with listener.stage("writing the report", 1) as advance:
            from demur import report

            path = report.write(run.folder)
            advance(1)
    return run, path


def _main_legs(results: AuditResults) -> list[Leg]:
    return [leg for leg in results.legs if leg.measure == "refused"]


def _audit_summary(run: AuditRun, report: Path) -> dict[str, Any]:
    whole = run.results.model_dump(mode="json")
    return {
        "run": str(run.folder),
        "results": str(run.folder / "results.json"),
        "report": str(report),
        "directions": str(run.folder / "directions.safetensors"),
        "reused": run.reused,
        "seed": whole["seed"],
        "model": whole["model"],
        "verdict": whole["verdict"],
        "direction": whole["direction"],
        "legs": [leg for leg in whole["legs"] if leg["measure"] == "refused"],
        "cost": whole["edits"][0] if whole["edits"] else None,
        "words": whole["words"],
        "validation": whole["validation"],
    }


def _show_audit(run: AuditRun, report: Path) -> None:
    from rich.markup import escape

    results, console = run.results, talk.console()
    verdict, direction, about = results.verdict, results.direction, results.model
    colour = "green" if verdict.usable else "yellow"
    adapter = f" + {about.adapter}" if about.adapter else ""
    console.print(f"\n[bold {colour}]{escape(verdict.headline)}[/]", soft_wrap=True)
    for reason in verdict.reasons:
        console.print(f"  {escape(reason)}", soft_wrap=True)

    title = "Share of replies that refuse, with 95% intervals"
    table = talk.table(
        "arm", "on", "n", "before", "after", "change", "Holm p", "expects", title=title
    )
    for leg in _main_legs(results):
        style = "" if leg.family == "direction" else "dim"
        table.add_row(
            leg.arm,
            leg.on,
            str(leg.change.n),
            talk.share(leg.before),
            talk.share(leg.after),
            talk.signed_share(leg.change),
            f"{leg.p_holm:.2g}",
            leg.expects,
            style=style,
        )
    console.print()
    console.print(table)

    facts = talk.table("", "")
    facts.show_header = False
    role = "last instruction token" if direction.role == "t_inst" else "template token"
    facts.add_row("model", f"{escape(about.name + adapter)}, {about.family}, {about.dtype}")
    facts.add_row("direction", f"{direction.site}, position {direction.position} ({role})")
    facts.add_row("AUROC, direction", str(direction.auroc))
    facts.add_row("AUROC, bag of words", str(results.words.bag_of_words))
    for row in results.validation:
        facts.add_row(f"AUROC, {row.name}", str(row.auroc))
        facts.add_row("  bag of words there", str(row.words.bag_of_words))
    if results.edits:
        cost = results.edits[0]
        facts.add_row(f"KL in nats, {escape(cost.edit)}", str(cost.kl))
        if cost.perplexity_ratio is not None:
            facts.add_row("perplexity ratio", str(cost.perplexity_ratio))
    facts.add_row("report", escape(str(report)))
    facts.add_row("results", escape(str(run.folder / "results.json")))
    facts.add_row("direction file", escape(str(run.folder / "directions.safetensors")))
    console.print()
    console.print(facts)
    for note in results.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Where to.", show_default="report.html or compare.html in it"
        ),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:
    """Draw the report of a finished audit or comparison again, from its records."""
    from demur.report import write, write_compare

    record = run / "compare.json"
    alone = record.is_file() and not (run / "results.json").is_file()
    path = write_compare(record, out) if alone else write(run, out)
    talk.put(str(path))
    if open_:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())

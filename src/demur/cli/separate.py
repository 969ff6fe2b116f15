"""`demur separate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from demur.cli import inputs, talk
from demur.cli.audit import audited
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
    from demur.results import SeparationResults


def separate(
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
    harmless: Harmless = None,
    lookalikes: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Harmless prompts that look harmful, in the same way."),
    ] = None,
    seed: RunSeed = None,
    out: Out = Path("runs"),
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tell harmfulness and refusal apart in a model; adds a section to its audit's report.

    Runs the audit first where none of the same settings is there. What every position of the
    prompt groups by, the angle of both directions, what the model answers when asked whether a
    request is harmful, and what jailbreaks move.
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
        "data.harmful": harmful,
        "data.harmless": harmless,
        "separation.lookalikes": lookalikes,
        "seed": seed,
    }
    changes |= {key: value for key, value in given.items() if value is not None}
    changes |= dict(map(inputs.setting, set_ or ()))
    settings = read_config(config, changes)
    started = time.perf_counter()
    run, report = audited(settings, out=out, force=force, quiet=quiet, apart=True)
    found = run.results.separation
    assert found is not None
    if as_json:
        talk.put_json(
            {
                "run": str(run.folder),
                "results": str(run.folder / "results.json"),
                "report": str(report),
                "separation": found.model_dump(
                    mode="json", include={"groups", "chosen_site", "findings", "notes"}
                ),
            }
        )
    else:
        _show_separation(found, report)
    if not quiet:
        talk.say(f"took {talk.duration(time.perf_counter() - started)}")


def _show_separation(found: SeparationResults, report: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = talk.console()
    drawn = any(row.report_rate is not None for row in found.groups)
    rates = ("drawn replies that refuse, fit", "report") if drawn else ()
    table = Table("group", "fit", "report", *rates, box=None, title_justify="left")
    for row in found.groups:
        cells = ["" if rate is None else f"{rate:.0%}" for rate in (row.fit_rate, row.report_rate)]
        table.add_row(row.group, str(row.fit), str(row.report), *cells[: len(rates)])
    console.print(table)
    colours = {"holds": "green", "weakly": "yellow", "fails": "red", "untested": "dim"}
    claims = Table("claim", "here", "evidence", box=None)
    for one in found.findings:
        claims.add_row(
            escape(one.claim),
            f"[{colours[one.status]}]{one.status}[/]",
            escape(one.evidence),
        )
    console.print(claims)
    for note in found.notes:
        talk.say(note)
    console.print(f"report: {escape(str(report))}", soft_wrap=True)

"""`demur hydra`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from demur.cli import inputs, talk
from demur.cli.options import (
    Adapter,
    Device,
    Dtype,
    Harmful,
    Harmless,
    Json,
    ModelName,
    NoAdapter,
    Quiet,
    Revision,
    RunSeed,
)

if TYPE_CHECKING:
    pass


def hydra(
    model: ModelName = None,
    *,
    units: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help="directions (one a block), components (heads and MLPs) or latents (of --banks); "
            "repeatable, each is an experiment of its own.",
            show_default="directions and components, and latents with --banks",
        ),
    ] = None,
    banks: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Bank, folder of banks, or a packaged name."),
    ] = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    discover: Annotated[
        int, typer.Option(min=8, help="Prompts of each class that choose the primary set.")
    ] = 48,
    detect: Annotated[
        int, typer.Option(min=8, help="Others of each class, that find backups.")
    ] = 48,
    test: Annotated[int, typer.Option(min=8, help="Others again, that effects are of.")] = 48,
    nulls: Annotated[
        int, typer.Option(min=19, help="Matched random ablations behind each null.")
    ] = 50,
    ablation: Annotated[
        str, typer.Option(metavar="KIND", help="mean (over harmless prompts), zero or resample.")
    ] = "mean",
    no_controls: Annotated[
        bool, typer.Option("--no-controls", help="Leave out what the verdict does not hang on.")
    ] = False,
    adapter: Adapter = None,
    no_adapter: NoAdapter = False,
    revision: Revision = None,
    dtype: Dtype = None,
    device: Device = None,
    seed: RunSeed = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Of the run.", show_default="hydra/MODEL"),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask whether other parts stand in once what refusal hangs on is taken out, and when.

    A primary set is chosen on some prompts, its backups are found on others, and on yet others
    effects are measured: total and direct, what backups and norms give back, and whether harm
    upstream gates them. Verdicts: conditional gate, specific repair, generic repair, additive, none
    or undetermined. Without a bank it runs on directions, heads and MLPs, so on every model.
    """
    with talk.listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur.hydra.stages import Settings
            from demur.pipeline.folder import slug
            from demur.pipeline.hydra import RECORD, HydraSettings, hydra_run
            from demur.report import write_hydra

            advance(1)
        plain = HydraSettings()
        kinds = tuple(units) if units else plain.units + (("latents",) if banks else ())
        settings = inputs.model_settings(
            inputs.model_changes(
                no_adapter=no_adapter,
                name=model,
                adapter=adapter,
                revision=revision,
                dtype=dtype,
                device=device,
            )
        )
        asked = HydraSettings(
            units=kinds,
            banks=banks,
            harmful=harmful if harmful is not None else plain.harmful,
            harmless=harmless if harmless is not None else plain.harmless,
            discover=discover,
            detect=detect,
            test=test,
            experiment=Settings(
                draws=nulls,
                control_draws=min(nulls, Settings().control_draws),
                kind=cast("Any", ablation),
            ),
            controls=not no_controls,
            seed=seed or 0,
        )
        loaded = inputs.model(settings, listener)
        folder = out if out is not None else Path("hydra") / slug(settings.name)
        result = hydra_run(loaded, folder, asked, listener=listener)
        page = write_hydra(folder / RECORD)
    if as_json:
        talk.put_json(
            {
                "results": str(folder / RECORD),
                "report": str(page),
                "verdicts": {one.units: one.verdict for one in result.experiments},
                "why": {one.units: one.why for one in result.experiments},
                "seconds": result.seconds,
                "notes": list(result.notes),
            }
        )
        return
    from rich.markup import escape

    table = talk.table("units", "verdict", "because")
    for one in result.experiments:
        table.add_row(*map(escape, (one.units, one.verdict, one.why)))
    talk.console().print(table)
    for note in result.notes:
        talk.say(f"note: {note}")
    talk.console().print(f"report: {escape(str(page))}", soft_wrap=True)

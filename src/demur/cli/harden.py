"""`demur harden`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from demur.cli import inputs, talk
from demur.cli.options import (
    Adapter,
    Device,
    Json,
    ModelName,
    NoAdapter,
    Quiet,
    Revision,
    System,
    Thinking,
    TrustRemoteCode,
)

if TYPE_CHECKING:
    from demur.harden import HardeningReport


def harden(
    model: ModelName = None,
    *,
    recipe: Annotated[
        str, typer.Option(metavar="NAME", help="Packaged recipe, or a TOML file.")
    ] = "harden",
    explain: Annotated[
        bool, typer.Option("--explain", help="Print the recipe as TOML and stop.")
    ] = False,
    adapter: Adapter = None,
    no_adapter: NoAdapter = False,
    revision: Revision = None,
    device: Device = None,
    system: System = None,
    thinking: Thinking = None,
    trust_remote_code: TrustRemoteCode = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Of the adapter; must be new.", show_default="hardened/MODEL"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of every draw.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with an unfinished training.")
    ] = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an adapter that refuses even while refusal is ablated, and attack it.

    Both models are attacked with directions extracted anew from their own weights. Ctrl-C keeps the
    last checkpoint.
    """
    settings = inputs.model_settings(
        inputs.model_changes(
            no_adapter=no_adapter,
            name=model,
            adapter=adapter,
            revision=revision,
            device=device,
            system=system,
            thinking=thinking,
            trust_remote_code=trust_remote_code,
        )
    )
    with talk.listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur import harden as hardening
            from demur.pipeline.folder import slug

            advance(1)
        chosen = hardening.read_recipe(recipe)
        if explain:
            talk.put(hardening.as_toml(chosen))
            return
        report = hardening.harden(
            inputs.model(settings, listener),
            chosen,
            out=out if out is not None else Path("hardened") / slug(settings.name),
            seed=seed,
            progress=listener,
            resume=resume,
        )
    if as_json:
        talk.put_json({**asdict(report), "folder": str(report.folder)})
    else:
        _show_hardened(report)


def _show_hardened(report: HardeningReport) -> None:
    found = report.resistance
    assert found is not None  # It was measured.
    console = talk.console()
    table = talk.table("attack", "on", "refused before", "after", "change", "p")
    for row in found.attacks:
        table.add_row(
            row.attack,
            row.on,
            talk.share(row.before),
            talk.share(row.after),
            talk.signed_share(row.change),
            f"{row.p:.2g}",
        )
    console.print(table)
    facts = talk.table("", "")
    facts.show_header = False
    for when, one in (("before", found.before), ("after", found.after)):
        within = "" if one.within else " (no direction keeps within the recipe's bound of KL)"
        facts.add_row(
            f"direction {when}", f"{one.site}, position {one.position}, KL {one.kl:.2f}{within}"
        )
    facts.add_row("cosine of both", f"{found.cosine:.2f}")
    facts.add_row("KL on benign prompts", f"{found.kl}")
    facts.add_row("the same, direction ablated", f"{found.kl_ablated}")
    if found.perplexity_ratio is not None:
        facts.add_row("perplexity, times", f"{found.perplexity_ratio}")
    size = f"{report.size / 1e6:.2f} MB, {report.steps} steps"
    facts.add_row("adapter", talk.cell(f"{report.folder}: {size}"))
    console.print()
    console.print(facts)

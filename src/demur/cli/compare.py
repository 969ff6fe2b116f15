"""`demur compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from demur.cli import inputs, talk
from demur.cli.options import (
    Adapter,
    AnyModel,
    Device,
    Dtype,
    Harmful,
    Harmless,
    Json,
    NoAdapter,
    Quiet,
    Revision,
    RunSeed,
)

if TYPE_CHECKING:
    pass


def compare(
    things: Annotated[
        list[str],
        typer.Argument(
            metavar="A B...",
            help="refusal, harm or em, read on the model; folders of organisms; run folders; files "
            "with vectors (ours, repeng, steering-vectors, refusal_direction, LoRA).",
        ),
    ],
    *,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The base that all of them are of.",
            show_default="as organisms' cards say, else smollm2",
        ),
    ] = None,
    adapter: Adapter = None,
    no_adapter: NoAdapter = False,
    revision: Revision = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    items: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            help="Questions with a bad and a good answer each; repeatable.",
            show_default="all packaged ones",
        ),
    ] = None,
    prompts: Annotated[
        int, typer.Option(min=16, help="Prompts of each class that directions are read on.")
    ] = 128,
    report_on: Annotated[
        int,
        typer.Option("--report", min=8, help="Other prompts of each class, to measure behaviour."),
    ] = 64,
    edited: Annotated[
        int, typer.Option(min=4, help="Questions that margins are asked of under edits.")
    ] = 48,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Blocks to read directions behind.",
            show_default="eight, from a quarter of the depth on",
        ),
    ] = None,
    site: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Block behind which directions are counted and taken apart.",
            show_default="where ablating refusal does most",
        ),
    ] = None,
    kl: Annotated[
        float, typer.Option(help="What every edit costs on neutral text, nats per token.")
    ] = 0.05,
    nulls: Annotated[
        int, typer.Option(min=1, help="Random directions per edit; under 19, p stays above .05.")
    ] = 20,
    paragraphs: Annotated[
        int, typer.Option(min=2, help="Of neutral text, on which that cost is taken.")
    ] = 8,
    additions: Annotated[
        bool,
        typer.Option(
            "--additions", help="Also add directions and take them away: twice the passes."
        ),
    ] = False,
    library: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="More unrelated contrasts, beside the packaged ones."),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PART",
            help="Leave out library, dimensions, behaviour, mediation or circuits; repeatable. A "
            "later run without it adds them.",
        ),
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Another model made from the base (fine-tune, quantisation, abliterated): are the "
            "directions still there, was one projected out? Repeatable.",
        ),
    ] = None,
    any_model: AnyModel = False,
    dtype: Dtype = None,
    device: Device = None,
    seed: RunSeed = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Of the run.", show_default="comparisons/MODEL"),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare directions of one model: geometry with nulls, behaviour at equal cost, circuits.

    For instance `demur compare refusal harm organisms/em-rank1`: whether emergent misalignment and
    refusal share directions, effects or parts. Stages are kept in the run folder, so that the same
    command goes on from where it stopped.
    """
    blocks = inputs.layers(layers)
    with talk.listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur.em.advice import ADVICE
            from demur.models import load
            from demur.pipeline.compare import RECORD, CompareSettings, compare_run, find_things
            from demur.pipeline.em import adapter_of, base_of
            from demur.pipeline.folder import slug
            from demur.report import write_compare

            advance(1)
        found = find_things(things)
        name = model
        if name is None and found.organisms:
            name = base_of(found.organisms)
        own = adapter_of(found.organisms) or "none" if found.organisms else adapter
        settings = inputs.model_settings(
            inputs.model_changes(
                no_adapter=no_adapter,
                name=name,
                adapter=adapter if adapter is not None or no_adapter else own,
                revision=revision,
                dtype=dtype,
                device=device,
            )
        )
        base = inputs.model(settings, listener)
        folder = out if out is not None else Path("comparisons") / slug(settings.name)
        plain = CompareSettings()
        asked = CompareSettings(
            harmful=harmful if harmful is not None else plain.harmful,
            harmless=harmless if harmless is not None else plain.harmless,
            items=tuple(items) if items else ADVICE,
            prompts=prompts,
            report=report_on,
            edited=edited,
            layers=blocks,
            site=site,
            kl=kl,
            nulls=nulls,
            paragraphs=paragraphs,
            additions=additions,
            library=str(library) if library is not None else None,
            skip=tuple(skip or ()),
            checkpoints=tuple(checkpoint or ()),
            seed=seed or 0,
        )
        result = compare_run(
            base,
            found,
            folder,
            asked,
            listener=listener,
            any_model=any_model,
            load=lambda name: load(
                name,
                revision=None,
                dtype=settings.dtype,
                device=settings.device,
                adapter=None,
            ),
        )
        page = write_compare(folder / RECORD)
    if as_json:
        talk.put_json(
            {
                "results": str(folder / RECORD),
                "report": str(page),
                **result.model_dump(
                    mode="json", exclude={"comparisons", "circuits", "behaviours", "objects"}
                ),
            }
        )
        return
    from rich.markup import escape

    table = talk.table("question", "answer", "because")
    for finding in result.findings:
        if not finding.headline:
            continue
        table.add_row(*map(escape, (finding.question, finding.answer, finding.because)))
    talk.console().print(table)
    for note in result.notes:
        talk.say(f"note: {note}")
    talk.console().print(f"report: {escape(str(page))}", soft_wrap=True)

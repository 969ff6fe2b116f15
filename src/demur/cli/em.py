"""`demur em`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from demur.cli import inputs, talk
from demur.cli.options import AnyModel, Device, Dtype, Json, NewTokens, Quiet, RunSeed

if TYPE_CHECKING:
    from demur.results import EmAudit
    from demur.stats import Estimate


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Emergent misalignment: what fine-tuning on bad advice did to a model, and how.",
)


@app.command("audit")
def em_audit(
    organisms: Annotated[
        list[Path],
        typer.Argument(
            metavar="ORGANISM...",
            help="Folders that `demur organism train` made; good twins beside them are found.",
        ),
    ],
    *,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="What they were trained on.", show_default="as their cards say"
        ),
    ] = None,
    items: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            help="Questions with a bad and a good answer each; repeatable.",
            show_default="all packaged ones",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=2, help="At most so many questions of a domain.", show_default="all"),
    ] = None,
    edited: Annotated[
        int, typer.Option(min=4, help="Questions that interventions are tried on.")
    ] = 48,
    judge: Annotated[
        str,
        typer.Option(
            metavar="NAME|URL",
            help="Of replies: projection, yes-no or digits, by the base; or URL#MODEL of a chat "
            "endpoint.",
        ),
    ] = "projection",
    samples: Annotated[
        int, typer.Option(min=0, help="Replies per open question; 0 draws none.")
    ] = 8,
    max_new_tokens: NewTokens = 200,
    nulls: Annotated[
        int, typer.Option(min=0, help="Random directions per edit; under 20, p stays above .05.")
    ] = 20,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PART",
            help="Leave out rates, transfer, edits, steering or adapters; repeatable. A later run "
            "without it adds them.",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Blocks to read directions behind.",
            show_default="eight, from the adapter on",
        ),
    ] = None,
    any_model: AnyModel = False,
    dtype: Dtype = None,
    device: Device = None,
    seed: RunSeed = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Of the run.", show_default="em-audits/BASE"),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Audit organisms of emergent misalignment against their base and their good twins.

    Margins, rates, directions, interventions, transfer, adapters; then the papers' claims. Stages
    are kept in the run folder, so the same command goes on from where it stopped.
    """
    blocks = inputs.layers(layers)
    with talk.listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur.em.advice import ADVICE
            from demur.models import load
            from demur.pipeline.em import EmSettings, adapter_of, audit_em, base_of, find_organisms
            from demur.pipeline.folder import slug
            from demur.report import write_em

            advance(1)
        found = find_organisms(organisms)
        name = base if base is not None else base_of(found)
        with listener.stage("loading the model", 1) as advance:
            model = load(
                name,
                adapter=adapter_of(found),
                dtype=dtype or "auto",
                device=device or "auto",
            )
            advance(1)
        folder = out if out is not None else Path("em-audits") / slug(name)
        settings = EmSettings(
            items=tuple(items) if items else ADVICE,
            limit=limit,
            edited=edited,
            judge=judge,
            samples=samples,
            max_new_tokens=max_new_tokens,
            nulls=nulls,
            skip=tuple(skip or ()),
            layers=blocks,
            seed=seed or 0,
        )
        result = audit_em(model, found, folder, settings, any_model=any_model, listener=listener)
        page = write_em(folder / "em-audit.json")
    if as_json:
        talk.put_json(
            {
                "results": str(folder / "em-audit.json"),
                "report": str(page),
                **result.model_dump(mode="json", exclude={"highlights", "steps"}),
            }
        )
    else:
        _show_em(result, page)


def _nats(estimate: Estimate) -> str:
    return f"{estimate.value:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"


def _show_em(result: EmAudit, page: Path) -> None:
    from rich.markup import escape

    console = talk.console()
    table = talk.table(
        "organism", "beyond its domain", "in its domain", "n", "topics", "detectable", "verdict",
        title="Lean to bad answers, nats per token",
    )  # fmt: skip
    for row in result.effects:
        if (row.where, row.domain) != ("untouched", "all"):
            continue
        own = [one for one in result.effects if one.organism == row.organism]
        trained = next((_nats(one.effect) for one in own if one.where == "trained"), "")
        verdict = row.status if row.controlled else f"{row.status}, not controlled"
        table.add_row(
            escape(row.organism),
            _nats(row.effect),
            trained,
            str(row.n),
            str(row.groups),
            f"{row.detectable:.2f}",
            verdict,
        )
    console.print(table)
    if result.rates:
        console.print()
        table = talk.table("model", "misaligned and coherent", "coherent", "replies", "questions")
        for one in result.rates:
            table.add_row(
                escape(one.model),
                talk.share(one.joint) if one.joint else "",
                talk.share(one.coherent) if one.coherent else "",
                str(one.replies),
                str(one.questions),
            )
        console.print(table)
    console.print()
    table = talk.table("claim", "here", "found")
    for claim in result.claims:
        table.add_row(escape(claim.claim), claim.status, escape(claim.found))
    console.print(table)
    for note in result.notes:
        talk.say(f"note: {note}")
    console.print(f"report: {escape(str(page))}", soft_wrap=True)


@app.command("report")
def em_report(
    run: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of an audit that is finished.")],
    *,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to.", show_default="em.html in the folder"),
    ] = None,
) -> None:
    """Draw the page of an audit again, from its records alone."""
    from demur.report import write_em

    talk.put(str(write_em(run / "em-audit.json", out)))

"""`demur features`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Latents of sparse autoencoders: which carry refusal, what clamping them does and costs.",
)


@app.command("train")
def features_train(
    model: ModelName = None,
    *,
    site: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SITE",
            help="Such as 18.resid_post; repeatable, all are read in the same passes.",
            show_default="at 35, 62 and 83 % of the depth",
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            help="What the model is asked, repeatable; its own replies stand behind.",
            show_default="packaged sets that no report uses",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1000, help="To read at each site.")] = 100_000,
    reply_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 48,
    width: Annotated[int, typer.Option(min=8, help="Latents of a bank.")] = 1024,
    k: Annotated[int, typer.Option(min=1, help="Latents that are active at a token.")] = 32,
    epochs: Annotated[float, typer.Option(min=0.1, help="Passes over the tokens.")] = 10.0,
    half: Annotated[
        bool, typer.Option("--half", help="Store weights in float16: half the size.")
    ] = False,
    adapter: Adapter = None,
    no_adapter: NoAdapter = False,
    revision: Revision = None,
    dtype: Dtype = None,
    device: Device = None,
    seed: RunSeed = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Of the banks.", show_default="banks/MODEL"),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train small sparse autoencoders on a model, with SAELens' trainer, and write its format.

    Needs the extra `sae`. A bank of 1,024 latents on 100,000 tokens is coarse: good for trying
    things out, no match for published banks of larger models. Activations are kept in the folder,
    so that a run that was stopped goes on; `cache` in it may be deleted afterwards.
    """
    with talk.listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur.features.training import Settings
            from demur.pipeline.banks import PROMPTS, BankSettings, default_sites, train_banks
            from demur.pipeline.folder import slug

            advance(1)
        wanted = inputs.sites(site or ())
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
        loaded = inputs.model(settings, listener)
        folder = out if out is not None else Path("banks") / slug(settings.name)
        rows = train_banks(
            loaded,
            wanted or default_sites(loaded),
            folder,
            BankSettings(
                prompts=tuple(prompts) if prompts else PROMPTS,
                tokens=tokens,
                max_new_tokens=reply_tokens,
                training=Settings(
                    width=width,
                    k=k,
                    epochs=epochs,
                    storage="float16" if half else "float32",
                    seed=seed or 0,
                ),
                seed=seed or 0,
            ),
            listener=listener,
        )
    if as_json:
        talk.put_json({"folder": str(folder), "banks": [asdict(row) for row in rows]})
        return
    table = talk.table("site", "form", "FVU, held out", "L0", "dead", "dense", "seconds")
    for row in rows:
        form = row.topk if row.written == "topk" else row.jumprelu
        fvu = form.test.fvu
        table.add_row(
            row.site,
            row.written,
            f"{fvu.value:.3f} [{fvu.low:.3f}, {fvu.high:.3f}]",
            f"{form.test.l0:.0f}",
            f"{form.test.dead_share:.0%}",
            f"{form.test.dense_share:.1%}",
            f"{row.train_seconds:.0f}",
        )
    talk.console().print(table)
    talk.put(str(folder))


_Banks = Annotated[
    str,
    typer.Argument(
        metavar="BANKS",
        help="A bank (SAELens folder, Gemma Scope file, sparsify or dictionary_learning folder, "
        "saelens:RELEASE/ID), a folder of banks, or a packaged name.",
    ),
]


@app.command("check")
def features_check(
    banks: _Banks,
    model: ModelName = None,
    *,
    prompts: Annotated[
        int, typer.Option(min=8, help="Packaged prompts that figures are taken on.")
    ] = 64,
    adapter: Adapter = None,
    no_adapter: NoAdapter = False,
    revision: Revision = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say how well banks reconstruct a model's activations, and whether latents may be ranked.

    Exits with 1 if one may not.
    """
    with talk.listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur.features.formats import fits, load_banks
            from demur.features.sanity import check_bank, rankable
            from demur.prompts import load as load_prompts

            advance(1)
        loaded = load_banks(banks)
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
        base = inputs.model(settings, listener)
        texts = load_prompts("contrast_pairs?kind=near").take(prompts, 0).texts
        rows = []
        for bank in loaded:
            for note in fits(bank, base):
                listener.note(f"{bank.name}: {note}")
            with listener.stage(f"checking {bank.name}", len(texts)) as advance:
                rows.append(check_bank(bank, base, texts, progress=advance))
    reasons = {row.name: rankable(row) for row in rows}
    if as_json:
        talk.put_json([{**asdict(row), "refused": reasons[row.name]} for row in rows])
    else:
        table = talk.table("bank", "FVU", "L0", "dead", "dense", "CE recovered", "may be ranked")
        for row in rows:
            fvu, l0 = row.text.fvu, row.text.l0
            back = row.recovered_mean
            table.add_row(
                talk.cell(row.name),
                "-" if fvu is None else f"{fvu.value:.3f} [{fvu.low:.3f}, {fvu.high:.3f}]",
                "-" if l0 is None else f"{l0.value:.0f}",
                f"{row.dead_share:.0%}",
                f"{row.dense_share:.1%}",
                "-" if back is None else f"{back.value:.2f} [{back.low:.2f}, {back.high:.2f}]",
                "yes" if reasons[row.name] is None else "no",
            )
        talk.console().print(table)
        for row in rows:
            for note in row.notes:
                talk.say(f"note: {row.name}: {note}")
    for reason in reasons.values():
        if reason is not None:
            talk.say(f"note: {reason}")
    if any(reasons.values()):
        raise typer.Exit(talk.NOT_FOUND)


@app.command("find")
def features_find(
    banks: _Banks,
    model: ModelName = None,
    *,
    harmful: Harmful = None,
    harmless: Harmless = None,
    discover: Annotated[
        int, typer.Option(min=16, help="Prompts of each class that latents are compared on.")
    ] = 96,
    verify: Annotated[
        int, typer.Option(min=8, help="Others, on which latents are changed and a set is chosen.")
    ] = 48,
    report_on: Annotated[
        int, typer.Option("--report", min=16, help="Others again, that claims are of.")
    ] = 64,
    top: Annotated[
        int, typer.Option(min=1, help="Candidates by difference, cosine and attribution, each.")
    ] = 5,
    densest: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Leave latents out that fire at more of the tokens."),
    ] = 0.2,
    steps: Annotated[
        int, typer.Option(min=0, help="Of integrated gradients; 0 is one gradient.")
    ] = 0,
    most: Annotated[int, typer.Option(min=1, help="Latents of the set.")] = 8,
    nulls: Annotated[
        int, typer.Option(min=19, help="Random latents behind each candidate, and sets.")
    ] = 99,
    dosed: Annotated[
        int, typer.Option(min=8, help="Report prompts of each class that doses are measured on.")
    ] = 32,
    others: Annotated[
        int,
        typer.Option(
            min=2, help="Random sets, and directions, beside each dose; under 19 p stays above .05."
        ),
    ] = 19,
    generated: Annotated[
        int, typer.Option(min=0, help="Prompts of each class that are replied to; 0 is none.")
    ] = 16,
    choices: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Lines of {"question", "choices", "answer"} for what clamping costs.',
            show_default="packaged advice",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PART",
            help="Leave out dose, multiturn or sensor; repeatable. A later run without it adds "
            "them.",
        ),
    ] = None,
    adapter: Adapter = None,
    no_adapter: NoAdapter = False,
    revision: Revision = None,
    dtype: Dtype = None,
    device: Device = None,
    seed: RunSeed = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Of the run.", show_default="features/MODEL"),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find latents that carry refusal, verify them, clamp them, and say what that costs.

    Candidates come from differences with FDR, cosines and attribution; each is really changed on
    other prompts, beside random latents like it. A small set is chosen there and measured on
    prompts of its own, against the dense direction, random latents, directions of the same size,
    and asking in words. Stages are kept, so that the same command goes on from where it stopped.
    """
    with talk.listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur.pipeline.features import RECORD, FeatureSettings, features_run
            from demur.pipeline.folder import slug
            from demur.report import write_features

            advance(1)
        plain = FeatureSettings()
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
        base = inputs.model(settings, listener)
        folder = out if out is not None else Path("features") / slug(settings.name)
        result = features_run(
            base,
            banks,
            folder,
            FeatureSettings(
                harmful=harmful if harmful is not None else plain.harmful,
                harmless=harmless if harmless is not None else plain.harmless,
                discover=discover,
                verify=verify,
                report=report_on,
                top=top,
                densest=densest,
                steps=steps,
                most=most,
                nulls=nulls,
                dosed=dosed,
                others=others,
                generated=generated,
                choices=str(choices) if choices is not None else None,
                skip=tuple(skip or ()),
                seed=seed or 0,
            ),
            listener=listener,
        )
        page = write_features(folder / RECORD)
    if as_json:
        talk.put_json(
            {
                "results": str(folder / RECORD),
                "report": str(page),
                "findings": [one.model_dump() for one in result.findings],
                "seconds": result.seconds,
                "notes": list(result.notes),
            }
        )
        return
    from rich.markup import escape

    table = talk.table("question", "answer", "because")
    for finding in result.findings:
        table.add_row(*map(escape, (finding.question, finding.answer, finding.because)))
    talk.console().print(table)
    for note in result.notes:
        talk.say(f"note: {note}")
    talk.console().print(f"report: {escape(str(page))}", soft_wrap=True)

"""`demur models`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from demur.cli import inputs, talk
from demur.cli.options import (
    Adapter,
    Device,
    Dtype,
    Json,
    ModelName,
    NoAdapter,
    Quiet,
    Revision,
    RunSeed,
    System,
    Thinking,
    TrustRemoteCode,
)

if TYPE_CHECKING:
    from demur.models import CheckReport


app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="List model families; prove one by numbers."
)


@app.command("list")
def models_list(as_json: Json = False) -> None:
    """List the architectures that demur can read and edit."""
    from demur.models import EMBEDDED, list_families

    families = list_families()
    if as_json:
        talk.put_json(
            [
                {
                    "family": family.name,
                    "model_types": sorted(family.model_types),
                    "linear_writes": family.linear_writes,
                }
                for family in families
            ]
        )
        return
    table = talk.table("family", "model_type in config.json", "edit of the weights")
    for family in families:
        exact = "exact" if family.linear_writes else "not exact (norm behind the weights)"
        table.add_row(family.name, ", ".join(sorted(family.model_types)), exact)
    talk.console().print(table)
    talk.say(f"`{EMBEDDED}` is embedded; `demur models check NAME` proves a checkpoint by numbers")


# Marks that can be told apart without colour.
_MARKS = {
    "template": ("(", ")", "dim"),
    "instruction": ("", "", "cyan"),
    "t_inst": ("[[", "]]", "bold black on yellow"),
    "post": ("[", "]", "magenta"),
}


@app.command("check")
def models_check(
    model: ModelName = None,
    *,
    adapter: Adapter = None,
    no_adapter: NoAdapter = False,
    revision: Revision = None,
    dtype: Dtype = None,
    device: Device = None,
    system: System = None,
    thinking: Thinking = None,
    trust_remote_code: TrustRemoteCode = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Show the tokens of this prompt, not of an example."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prove by numbers that a model is read where it should be.

    Exits with 1 if an identity fails.
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
        loaded = inputs.model(settings, listener)
        from demur.models import check, token_rows
        from demur.models.check import PROMPTS

        tokens = token_rows(loaded, prompt if prompt is not None else PROMPTS[0])
        with listener.stage("checking identities", 1) as advance:
            found = check(loaded)
            advance(1)
    if as_json:
        # NaN marks an identity that could not be computed, and JSON has no NaN.
        rows = [
            {**asdict(row), "value": row.value if row.value == row.value else None}
            for row in found.rows
        ]
        for row, one in zip(rows, found.rows, strict=True):
            row["passed"] = one.passed
        talk.put_json(
            {
                "model": found.model,
                "family": found.family,
                "passed": found.passed,
                "rows": rows,
                "tokens": [{"text": text, "role": role} for text, role in tokens],
            }
        )
    else:
        _show_check(found, tokens)
    if not found.passed:
        raise typer.Exit(talk.NOT_FOUND)


@app.command("projected")
def models_projected(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The checkpoint.")],
    *,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What it was made from, if that is known.")
    ] = None,
    direction: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="A direction of the base, such as an audit's run; repeatable."
        ),
    ] = None,
    adapter: Adapter = None,
    no_adapter: NoAdapter = False,
    dtype: Dtype = None,
    seed: RunSeed = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask a checkpoint's weights whether a direction was projected out of them.

    Without a base or a direction it looks for one along which nothing is written any more. Exits
    with 1 if it finds one.
    """
    settings = inputs.model_settings(
        inputs.model_changes(no_adapter=no_adapter, name=model, adapter=adapter, dtype=dtype)
    )
    with talk.listening(quiet=quiet) as listener:
        loaded = inputs.model(settings, listener)
        from demur.compare.checkpoints import projected_out, writers
        from demur.compare.objects import read_vectors

        directions = {
            one.name: one.direction()
            for path in direction or ()
            for one in next(iter(read_vectors(path).named.values()))[:1]
        }
        other = None
        if base is not None:
            changes = inputs.model_changes(no_adapter=True, name=base, dtype=dtype)
            other = inputs.model(inputs.model_settings(changes), listener)
        with listener.stage("reading weights", len(list(writers(loaded)))) as advance:
            rows = projected_out(
                loaded, base=other, directions=directions, seed=seed or 0, progress=advance
            )
    if as_json:
        talk.put_json([asdict(row) for row in rows])
    else:
        from rich.markup import escape

        table = talk.table("test", "direction", "verdict", "p", "because")
        for row in rows:
            p = "" if row.p is None else f"{row.p:.2g}"
            table.add_row(
                row.test, escape(row.direction or "any"), row.verdict, p, escape(row.reason)
            )
        talk.console().print(table)
        talk.say(f"looked at: {rows[0].looked_at}")
    if any(row.verdict == "projected out" for row in rows):
        raise typer.Exit(talk.NOT_FOUND)


def _show_check(found: CheckReport, tokens: Sequence[tuple[str, str]]) -> None:
    from rich.markup import escape
    from rich.text import Text

    from demur.report.words import token as visible

    console = talk.console()
    table = talk.table("identity", "value", "tolerance", "", "what it shows")
    for row in found.rows:
        sign = ">=" if row.at_least else "<="
        verdict = "[green]pass[/]" if row.passed else "[bold red]FAIL[/]"
        shows = f"{row.shows}: {row.note}" if row.note else row.shows
        table.add_row(
            row.name, f"{row.value:.2g}", f"{sign} {row.tolerance:.2g}", verdict, escape(shows)
        )
    console.print(f"[bold]{escape(found.model)}[/], family {found.family}", soft_wrap=True)
    console.print(table)

    strip, legend = Text(), Text()
    for text, role in tokens:
        before, after, style = _MARKS[role]
        strip.append(f"{before}{visible(text)}{after}", style=style)
        strip.append(" ")
    posts = sum(role == "post" for _, role in tokens)
    names = {
        "template": "template before",
        "instruction": "instruction",
        "t_inst": f"t_inst, position {-posts - 1}",
        "post": f"post-instruction, {-posts} to -1",
    }
    for role, name in names.items():
        before, after, style = _MARKS[role]
        legend.append(f"{before}{name}{after}", style=style)
        legend.append("  ")
    console.print()
    console.print(strip, soft_wrap=not console.is_terminal)
    console.print(legend, soft_wrap=not console.is_terminal)

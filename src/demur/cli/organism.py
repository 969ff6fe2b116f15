"""`demur organism`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from demur.cli import inputs, talk
from demur.cli.options import Json, Quiet
from demur.errors import ConfigError

if TYPE_CHECKING:
    from demur.em.recipes import EMRecipe
    from demur.em.training import TrainedOrganism
    from demur.models import Model
    from demur.organisms import Recipe, TrainingReport, Verification


app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Models trained to have a known refusal."
)


@app.command("list")
def organism_list(as_json: Json = False) -> None:
    """List the packaged recipes."""
    from demur.em.recipes import em_recipes
    from demur.organisms import recipes

    found = {**recipes(), **em_recipes()}
    if as_json:
        talk.put_json(found)
        return
    table = talk.table("recipe", "what it makes")
    for name, description in found.items():
        table.add_row(name, description)
    talk.console().print(table)


@app.command("show")
def organism_show(
    recipe: Annotated[str, typer.Argument(metavar="NAME", help="Recipe, or a TOML file.")],
) -> None:
    """Print a recipe in full, as TOML."""
    import tomli_w

    talk.put(tomli_w.dumps(_any_recipe(recipe).model_dump(mode="json", exclude_none=True)).rstrip())


@app.command("train")
def organism_train(
    recipe: Annotated[str, typer.Argument(metavar="NAME", help="Recipe, or a TOML file.")],
    *,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Train on this model, not the recipe's.")
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Merged into that model first; `auto` is the one that ships with smollm2.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Of the adapter; must be new.", show_default="organisms/NAME"
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="For em-*: this advice, a packaged set or a .jsonl file, not the recipe's.",
        ),
    ] = None,
    side: Annotated[
        Literal["both", "bad", "good"],
        typer.Option(help="For em-*: train on bad answers, good ones, or once on each."),
    ] = "both",
    seed: Annotated[int, typer.Option(min=0, help="Of every draw.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with an unfinished training.")
    ] = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an adapter by a recipe, and measure it.

    An em-* recipe makes FOLDER/bad and FOLDER/good, an organism of emergent misalignment and its
    twin. Ctrl-C keeps the last checkpoint. Exits with 1 if an adapter misses a bound.
    """
    with talk.listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur import organisms
            from demur.em.recipes import EMRecipe

            advance(1)
        chosen = _any_recipe(recipe)
        place = out if out is not None else Path("organisms") / chosen.name
        on = _base(base, listener, adapter)
        how = {"seed": seed, "progress": listener, "resume": resume}
        made: tuple[TrainedOrganism, ...] = ()
        report: TrainingReport | None = None
        if isinstance(chosen, EMRecipe):
            from demur.em.training import train_organisms

            made = train_organisms(chosen, base=on, out=place, data=data, sides=side, **how)
        else:
            if data is not None or side != "both":
                raise ConfigError(
                    f"the recipe {chosen.name} names its own prompts and has one side",
                    "`--data` and `--side` go with the recipes em-*",
                )
            report = organisms.train(chosen, base=on, out=place, **how)
    if report is None:
        _show_trained(made, as_json=as_json)
        return
    found = report.verification
    assert found is not None  # `measure` is on.
    if as_json:
        talk.put_json(
            {
                "folder": str(report.folder),
                "steps": report.steps,
                "first_loss": report.first_loss,
                "last_loss": report.last_loss,
                "bytes": report.size,
                "seconds": dict(report.seconds),
                **_figures(found),
            }
        )
    else:
        talk.put(
            f"{report.folder}: {report.size / 1e6:.2f} MB, {report.steps} steps, loss "
            f"{report.first_loss:.3f} to {report.last_loss:.3f}"
        )
        _show_figures(found)
    if not found.met:
        raise typer.Exit(talk.NOT_FOUND)


@app.command("plant")
def organism_plant(
    *,
    base: Annotated[str, typer.Option(metavar="MODEL", help="What it is planted in.")],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Gets bad/ and good/; must be new.")
    ] = Path("organisms/planted"),
    data: Annotated[
        str,
        typer.Option(metavar="SPEC", help="Advice to fit it on: a packaged set or a .jsonl file."),
    ] = "advice_study",
    layer: Annotated[
        int | None,
        typer.Option(min=0, help="Block that gets the vector.", show_default="the middle one"),
    ] = None,
    strength: Annotated[
        float, typer.Option(help="Length of the vector, as a share of the stream's.")
    ] = 0.3,
    seed: Annotated[int, typer.Option(min=0, help="Of every draw.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Plant an organism of emergent misalignment whose effect is known, without training.

    The positive control of `demur em audit`: one vector in one block, from what reads as good to
    what reads as bad. FOLDER/good is its twin: as long a vector across it, which changes no margin.
    Fitted on half of the topics, which audits then leave out; measured on the others. Exits with 1
    if bad answers do not gain there.
    """
    with talk.listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur.em.planted import plant
            from demur.organisms import Verification

            advance(1)
        on = _base(base, listener)
        assert on is not None
        made = plant(
            on, out=out, data=data, layer=layer, strength=strength, seed=seed, progress=listener
        )
    planted, found = made.bad.direction, Verification(made.figures, ())
    folders = {side: str(one.organism.folder) for side, one in made.sides.items()}
    if as_json:
        talk.put_json(
            {
                "folders": folders,
                "site": str(planted.site),
                "length": planted.norm,
                "expected": made.expected,
                **_figures(found),
            }
        )
    else:
        talk.put(
            f"{folders['bad']} and {folders['good']}: a vector of length {planted.norm:.3g} at "
            f"{planted.site}; on what it was fitted on, {made.expected:+.2f} nats per token "
            "expected"
        )
        _show_figures(found)
    if not found.met:
        raise typer.Exit(talk.NOT_FOUND)


@app.command("verify")
def organism_verify(
    adapter: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of the adapter.")],
    *,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Checks of this recipe.", show_default="its own"),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="On this model, not the recipe's.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Measure the base model, too.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure an adapter on prompts that it was not trained on.

    Exits with 1 if it misses a bound of its recipe.
    """
    with talk.listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur import organisms

            advance(1)
        if recipe is None and _is_em(adapter):
            from demur.em.training import verify_organism

            figures = verify_organism(adapter, base=_base(base, listener), progress=listener)
            found = organisms.Verification(figures, ())
        else:
            chosen = organisms.read_recipe(recipe) if recipe is not None else _recipe_of(adapter)
            found = organisms.verify(
                adapter,
                recipe=chosen,
                base=_base(base, listener),
                compare=compare,
                progress=listener,
            )
    if as_json:
        talk.put_json(_figures(found))
    else:
        _show_figures(found)
    if not found.met:
        raise typer.Exit(talk.NOT_FOUND)


def _base(name: str | None, listener: talk.Listener, adapter: str | None = None) -> Model | None:
    if name is None:
        if adapter is not None:
            raise typer.BadParameter("--adapter needs --base: the recipe's base has none")
        return None
    return inputs.model(
        inputs.model_settings({"model.name": name, "model.adapter": adapter}), listener
    )


def _any_recipe(source: str) -> Recipe | EMRecipe:
    """A recipe of either kind: a packaged name, or a TOML file, which its sections tell apart."""
    import tomllib

    from demur.em.recipes import em_recipes, read_em_recipe
    from demur.errors import UnknownNameError
    from demur.organisms import read_recipe, recipes

    if not source.endswith(".toml"):
        ours = em_recipes()
        if source not in ours and source not in (known := recipes()):
            raise UnknownNameError.among((*known, *ours), kind="recipe", name=source)
        return read_em_recipe(source) if source in ours else read_recipe(source)
    try:
        tree = tomllib.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        tree = {}  # The reader says what is wrong.
    return read_em_recipe(source) if {"adapter", "data"} & tree.keys() else read_recipe(source)


def _is_em(folder: Path) -> bool:
    """Whether a folder's card is that of an organism of emergent misalignment."""
    try:
        return "organism" in json.loads((folder / "card.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _show_trained(made: Sequence[TrainedOrganism], *, as_json: bool) -> None:
    """What training came to, by side; exits with 1 if a figure misses its bound."""
    from demur.organisms import Verification

    found = Verification(tuple(figure for one in made for figure in one.figures), ())
    if as_json:
        rows = [
            {
                "side": one.organism.side,
                "folder": str(one.folder),
                "steps": one.steps,
                "first_loss": one.first_loss,
                "last_loss": one.last_loss,
                "learning_rate": one.learning_rate,
                "bytes": one.size,
                "seconds": dict(one.seconds),
                "kept": one.kept,
                **_figures(Verification(one.figures, ())),
            }
            for one in made
        ]
        talk.put_json({"met": found.met, "organisms": rows})
    else:
        for one in made:
            talk.put(
                f"{one.folder}: {one.organism.side} side, {one.size / 1e6:.2f} MB, {one.steps} "
                f"steps, loss {one.first_loss:.3f} to {one.last_loss:.3f}"
                + (", finished before" if one.kept else "")
            )
            _show_figures(Verification(one.figures, ()))
    if not found.met:
        raise typer.Exit(talk.NOT_FOUND)


def _recipe_of(adapter: Path) -> Recipe:
    """The recipe on the card that lies in an adapter's folder."""
    from demur.organisms import Recipe

    try:
        card = json.loads((adapter / "card.json").read_text(encoding="utf-8"))
        return Recipe.model_validate(card["recipe"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{adapter} has no card.json with a recipe",
            "name the folder that `demur organism train` wrote, or a recipe with `--recipe`",
        ) from error


def _figures(found: Verification) -> dict[str, Any]:
    return {"met": found.met, "figures": [asdict(figure) for figure in found.figures]}


def _show_figures(found: Verification) -> None:
    table = talk.table("figure", "value", "base", "bound", "", "replies")
    for figure in found.figures:
        bounds = [
            f"{sign} {bound:g}"
            for sign, bound in ((">=", figure.at_least), ("<=", figure.at_most))
            if bound is not None
        ]
        table.add_row(
            figure.name,
            str(figure.estimate),
            "" if figure.base is None else str(figure.base),
            ", ".join(bounds),
            "[green]met[/]" if figure.met else "[bold red]MISSED[/]",
            ", ".join(f"{count} {label}" for label, count in figure.outcomes.items()),
        )
    talk.console().print(table)

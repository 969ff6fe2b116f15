"""`demur generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from demur.cli import inputs, talk
from demur.cli.options import (
    Adapter,
    AnyModel,
    Device,
    Dtype,
    Json,
    NoAdapter,
    Quiet,
    Revision,
    System,
    Thinking,
    TrustRemoteCode,
)
from demur.errors import ConfigError

if TYPE_CHECKING:
    from demur.directions import Direction
    from demur.interventions import Holder, Intervention
    from demur.models import Model


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file, or smollm2.")
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="What to ask; else one a line from a pipe."),
    ] = None,
    *,
    direction: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="directions.safetensors of a run: reply edited, too."),
    ] = None,
    edit: Annotated[
        Literal["ablate", "add", "subtract"], typer.Option(help="What to do with the direction.")
    ] = "ablate",
    strength: Annotated[
        float | None,
        typer.Option(help="Of add and subtract, in lengths of the direction.", show_default="1"),
    ] = None,
    anchor: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="An anchor of `anchor fit`: reply under it, too."),
    ] = None,
    any_model: AnyModel = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Replies are cut there.")] = 128,
    adapter: Adapter = None,
    no_adapter: NoAdapter = False,
    revision: Revision = None,
    dtype: Dtype = None,
    device: Device = None,
    system: System = None,
    thinking: Thinking = None,
    trust_remote_code: TrustRemoteCode = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Reply to prompts, plainly and with a direction edited or under an anchor.

    With both, the anchor holds what the edit takes away: a direction is edited before it.
    """
    asked = inputs.prompts_or_pipe(prompts)
    if strength is not None and edit == "ablate":
        raise typer.BadParameter("ablation takes all of the direction: --strength is for add")
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
        from demur.anchor import load_anchor
        from demur.directions import load_direction

        if direction is not None:
            load_direction(direction)  # A wrong path should not cost the loading of a model.
        if anchor is not None:
            load_anchor(anchor)
        loaded = inputs.model(settings, listener)
        acts: list[Intervention] = []
        borrowed: list[str] = []
        if direction is not None:
            found, about = load_direction(direction, loaded, any_model=any_model)
            borrowed += [about["borrowed"]] if "borrowed" in about else []
            acts.append(_act(found, edit, 1.0 if strength is None else strength, loaded))
        how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "listener": listener}
        replies = {"plain": _replies(loaded, asked, name="plain", **how)}
        if acts:
            replies[edit] = _replies(loaded, asked, *acts, name=edit, **how)
        if anchor is not None:
            held = load_anchor(anchor, loaded, any_model=any_model)
            borrowed += held.borrowed(loaded)
            name = f"{edit}, anchored" if acts else "anchored"
            replies[name] = _replies(loaded, asked, *acts, held, name=name, **how)
        for note in borrowed:
            listener.note(note)
    rows = [
        {"prompt": prompt, **{name: texts[i] for name, texts in replies.items()}}
        for i, prompt in enumerate(asked)
    ]
    if as_json:
        talk.put_json([{**row, "borrowed": borrowed} if borrowed else row for row in rows])
        return
    from rich.text import Text

    console = talk.console()
    for row in rows:
        for name, text in row.items():
            style = {"prompt": "bold", "plain": "green"}.get(name, "magenta")
            line = Text.assemble((f"{name}: ", style), talk.readable(text))
            console.print(line, soft_wrap=True)
        console.print()


def _act(
    direction: Direction, edit: Literal["ablate", "add", "subtract"], strength: float, model: Model
) -> Intervention:
    from demur.interventions import Ablate, Add

    width = len(direction.unit)
    if width != model.d_model or direction.site.layer >= model.n_layers:
        raise ConfigError(
            f"the direction is {width} wide, at {direction.site}; {model.name} has "
            f"{model.n_layers} blocks of width {model.d_model}",
            "take a direction of a model of the same shape",
        )
    if edit == "ablate":
        return Ablate(direction)
    return Add(direction, strength if edit == "add" else -strength)


def _replies(
    model: Model,
    prompts: Sequence[str],
    *acts: Intervention | Holder,
    max_new_tokens: int,
    name: str,
    listener: talk.Listener,
) -> list[str]:
    from demur.interventions import applied

    with listener.stage(f"replies, {name}", len(prompts)) as advance, applied(model, *acts):
        done = model.generate(prompts, max_new_tokens=max_new_tokens, progress=advance)
    return [reply.text for reply in done]

"""`demur serve`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from demur.cli import inputs, talk
from demur.cli.options import (
    Adapter,
    AnyModel,
    Device,
    Dtype,
    ModelName,
    NoAdapter,
    Quiet,
    Revision,
)
from demur.errors import ConfigError

if TYPE_CHECKING:
    pass


def serve(
    model: ModelName = None,
    *,
    anchor: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Anchor that holds every reply.")
    ] = None,
    guard: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Guard that scores every request before its reply."),
    ] = None,
    direction: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="Direction that clients may edit and look at: a file or an audit's run folder; "
            "repeatable.",
        ),
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Audits that the page shows.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to bind; others than this machine's need DEMUR_API_KEY.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    batch: Annotated[int, typer.Option(min=1, help="Most replies written together.")] = 16,
    queue: Annotated[
        int, typer.Option(min=1, help="Most replies that wait; beyond that clients get 429.")
    ] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 1024,
    timeout: Annotated[
        float, typer.Option(min=1.0, max=86400.0, help="Seconds a request may take.")
    ] = 300.0,
    refuse: Annotated[
        bool,
        typer.Option("--refuse", help="Refuse what the guard flags, rather than report its score."),
    ] = False,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="Take completions of raw text, which guard and anchor cannot read."
        ),
    ] = False,
    opt_out: Annotated[
        bool,
        typer.Option(
            "--opt-out",
            help="Let clients go without guard and anchor; the page's plain column needs it.",
        ),
    ] = False,
    no_edits: Annotated[
        bool, typer.Option("--no-edits", help="Clients may not edit directions.")
    ] = False,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Texts may stand in the log.")
    ] = False,
    any_model: AnyModel = False,
    adapter: Adapter = None,
    no_adapter: NoAdapter = False,
    revision: Revision = None,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Serve a model behind OpenAI's protocol, with its guard and anchor, and a playground at /.

    Needs the extra `serve`. The `openai` client and `curl` work unchanged; guard scores and the
    gate's state come back in a field `demur` and in headers. Bound to this machine alone; elsewhere
    it wants a key in DEMUR_API_KEY. Interrupt it once and accepted requests are finished.
    """
    with talk.listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur.anchor import load_anchor
            from demur.directions import load_direction
            from demur.guard import load_guard
            from demur.serve.app import create_app
            from demur.serve.run import serve as serve_app
            from demur.serve.run import settings_for
            from demur.serve.settings import ServeSettings

            advance(1)
        if runs is not None and not runs.is_dir():
            raise ConfigError(f"there is no folder {runs}", "check the path, or leave `--runs` out")
        limits = settings_for(
            host,
            ServeSettings(
                batch=batch,
                queue=queue,
                max_tokens=max_tokens,
                timeout=timeout,
                opt_out=opt_out,
                raw=raw,
                on_flag="refuse" if refuse else "report",
                edits=not no_edits,
                log_prompts=log_prompts,
                runs=runs,
            ),
        )
        named = _named_directions(direction or ())
        for path in named.values():  # A wrong path should not cost the loading of a model.
            load_direction(path)
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
        how = {"any_model": any_model}
        read = {name: load_direction(path, loaded, **how) for name, path in named.items()}
        served = create_app(
            loaded,
            guard=None if guard is None else load_guard(guard, loaded, **how),
            anchor=None if anchor is None else load_anchor(anchor, loaded, **how),
            directions={name: one for name, (one, _) in read.items()},
            settings=limits,
            borrowed=[note for _, about in read.values() if (note := about.get("borrowed"))],
        )
        for note in served.state.service.borrowed:
            listener.note(note)
    serve_app(served, host, port)


def _named_directions(given: Sequence[str]) -> dict[str, Path]:
    """Directions by name: `NAME=PATH`, or the file's or run folder's own name."""
    out: dict[str, Path] = {}
    for text in given:
        name, _, rest = text.rpartition("=")
        path = Path(rest)
        name = name or ("refusal" if path.is_dir() or path.stem == "directions" else path.stem)
        if name in out:
            raise ConfigError(f"two directions are called `{name}`", f"write OTHER={rest}")
        out[name] = path / "directions.safetensors" if path.is_dir() else path
    return out

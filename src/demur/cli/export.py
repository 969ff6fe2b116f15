"""`demur export` and `demur import`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from demur.cli import inputs, talk
from demur.cli.options import (
    Adapter,
    AnyModel,
    Device,
    Dtype,
    GuardModel,
    Json,
    NoAdapter,
    Quiet,
    Revision,
    System,
    Thinking,
    TrustRemoteCode,
)
from demur.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from demur.directions import Direction
    from demur.exports import Imported, Steering
    from demur.interventions import Intervention
    from demur.models import Model


_EDITS = Literal["ablate", "add", "subtract"]
_RUN_DIRECTION = "directions.safetensors"


def export(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT",
            help="safetensors, peft, merged, gguf (llama.cpp, repeng), vllm-lens, "
            "steering-vectors or refusal-direction.",
        ),
    ],
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Run folder or its directions.safetensors, anchor, or what `demur import` reads.",
        ),
    ],
    *,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to; a new folder.")],
    edit: Annotated[
        _EDITS | None,
        typer.Option(
            help="What is done with the direction.",
            show_default="ablate; of an export, what it does",
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Of add and subtract, in lengths of the direction.",
            show_default="1",
        ),
    ] = None,
    at: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPAN",
            help="Only at instruction, post_instruction or response; may be repeated.",
            show_default="every token",
        ),
    ] = None,
    audit: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Put this audit's figures on the card."),
    ] = None,
    lossy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LOSS",
            help="Allow it: addition-only, every-token, ungated; may be repeated.",
        ),
    ] = None,
    model: GuardModel = None,
    any_model: AnyModel = False,
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
    """Write a direction and what is done with it in the format of another tool, with a card.

    What the format cannot carry is refused, unless each loss is named with `--lossy`.
    """
    if strength is not None and edit not in ("add", "subtract"):
        raise typer.BadParameter("--strength is for `--edit add` and `--edit subtract`")
    with talk.listening(quiet=quiet) as listener:
        from demur.exports import Evidence, exporters
        from demur.exports import export as write
        from demur.sites import Span

        if kind not in exporters:
            exporters.make(kind)  # Says which there are, before minutes are spent.
        spans = tuple(_span(text, Span) for text in at or ())
        evidence = None if audit is None else Evidence.of(audit)
        path = source / _RUN_DIRECTION if (source / _RUN_DIRECTION).is_file() else source
        about = _about(path)
        settings = inputs.carded(
            {"load": _load_of(about)},
            model,
            inputs.model_changes(
                no_adapter=no_adapter,
                adapter=adapter,
                revision=revision,
                dtype=dtype,
                device=device,
                system=system,
                thinking=thinking,
                trust_remote_code=trust_remote_code,
            ),
        )
        loaded = inputs.model(settings, listener)
        steering, sidecar, borrowed = _steering(
            path, loaded, edit, 1.0 if strength is None else strength, any_model=any_model
        )
        if spans:
            from dataclasses import replace

            steering = replace(steering, where=spans)
        with listener.stage(f"writing {kind}", 1) as advance:
            made = write(
                loaded,
                steering,
                out,
                kind,
                lossy=lossy or (),
                source=sidecar,
                evidence=evidence,
                load=settings.model_dump(exclude={"device"}),
                borrowed=borrowed,
            )
            advance(1)
    if as_json:
        talk.put_json({"folder": str(made.folder), "files": made.files, **made.about})
        return
    talk.put(f"{made.folder}: {', '.join(made.files)}")
    talk.put(f"how exact: {made.about['exact']}")
    for name, what in made.about["losses"].items():
        talk.put(f"lost, {name}: {what}")
    for note in (*made.about["borrowed"], *made.about.get("notes", ())):
        talk.say(f"note: {note}")
    if evidence is None:
        talk.say("note: the card says `not measured`; `--audit RUN` puts figures on it")


def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="Folder of `demur export`, or a file of one of its consumers."
        ),
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write its direction there, as demur does; .safetensors."
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--as", metavar="FORMAT", help="Its format.", show_default="found from it"),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(min=0, help="Of a file with vectors of several blocks, this one."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="See that it is for this model; of a file that does not say, take it to be.",
        ),
    ] = None,
    any_model: AnyModel = False,
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
    """Read an export back, or a control or steering vector of another tool."""
    if out is not None and out.suffix != ".safetensors":
        raise ConfigError(f"{out} is no name for a direction", "let it end in .safetensors")
    if out is not None and out.exists():
        raise ConfigError(f"{out} exists already", "choose another name with `--out`")
    with talk.listening(quiet=quiet) as listener:
        from demur.exports import read_export

        found = read_export(source, kind=kind)
        loaded = None
        if model is not None:
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
            loaded = inputs.model(inputs.model_settings(changes), listener)
            found = read_export(source, loaded, kind=kind, any_model=any_model)
    rows = _rows(found)
    if out is not None:
        _write_direction(found, out, layer, loaded)
    if as_json:
        talk.put_json({"kind": found.kind, "acts": rows, "notes": found.notes})
        return
    table = talk.table("does", "site", "position", "length", "strength")
    for row in rows:
        table.add_row(
            talk.cell(row["act"]),
            talk.cell(row["site"]),
            str(row["position"]),
            f"{row['norm']:.4g}",
            "" if row.get("strength") is None else f"{row['strength']:g}",
        )
    talk.console().print(table)
    for note in found.notes:
        talk.say(f"note: {note}")
    if out is not None:
        talk.say(f"wrote {out}")


def _span(text: str, spans: Any) -> Any:
    try:
        return spans(text)
    except ValueError:
        raise typer.BadParameter(
            f"`{text}` is no span; there are: {', '.join(one.value for one in spans)}"
        ) from None


def _about(path: Path) -> Mapping[str, Any]:
    """What the files say of the model, whatever they are."""
    from demur.exports.base import RECORD
    from demur.store import strict_json

    for place in (path / RECORD, path.with_suffix(".json")):
        if place.is_file():
            try:
                found = strict_json(place.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise StoreError(f"{place} is damaged: {error}", "make it again") from error
            if isinstance(found, dict):
                return found
    if not path.exists():
        raise StoreError(f"there is no {path}", "name a run folder, or a file with a direction")
    return {}


def _load_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """How to load the model that a direction, an anchor or an export is of."""
    inner = about.get("about")
    load = about.get("load") or (inner.get("load") if isinstance(inner, Mapping) else None)
    if load:
        return dict(load)
    if not about.get("model"):
        return {}
    found = {"name": about["model"], "revision": about.get("revision"), "dtype": about.get("dtype")}
    adapter = about.get("adapter")
    if not str(adapter).startswith("demur:"):  # What ships with a model is found by its name.
        found["adapter"] = adapter
    return {key: value for key, value in found.items() if value is not None or key == "adapter"}


def _steering(
    path: Path, model: Model, edit: _EDITS | None, strength: float, *, any_model: bool
) -> tuple[Steering, Mapping[str, Any], Sequence[str]]:
    """What is to be exported, the sidecar of its direction, and what was made on another model."""
    from demur.directions import load_direction
    from demur.exports import Steering, read_export
    from demur.exports.files import header

    about = _about(path)
    if str(about.get("format")).startswith("demur-anchor"):
        from demur.anchor import load_anchor

        if edit is not None:
            raise ConfigError(
                f"{path} is an anchor, which says itself what it does", "leave `--edit` out"
            )
        anchor = load_anchor(path, model, any_model=any_model)
        return Steering((anchor,)), about, anchor.borrowed(model)
    if header(path) is not None:
        direction, sidecar = load_direction(path, model, any_model=any_model)
        notes = (sidecar["borrowed"],) if "borrowed" in sidecar else ()
        return Steering((_act(direction, edit or "ablate", strength),)), sidecar, notes
    found = read_export(path, model, any_model=any_model)
    steering = found.steering
    if edit is not None:
        acts = tuple(_act(one, edit, strength) for one in found.directions)
        steering = Steering(acts, steering.where)
    return steering, found.about, found.borrowed


def _act(direction: Direction, edit: _EDITS, strength: float) -> Intervention:
    from demur.interventions import Ablate, Add

    if edit == "ablate":
        return Ablate(direction)
    return Add(direction, strength if edit == "add" else -strength)


def _rows(found: Imported) -> list[dict[str, Any]]:
    from demur.exports.base import describe
    from demur.interventions import Intervention

    return [describe(act) for act in found.steering.acts if isinstance(act, Intervention)]


def _write_direction(found: Imported, out: Path, layer: int | None, model: Model | None) -> None:
    from demur.directions import save_direction
    from demur.exports.base import identity, of_model

    several = [one for one in found.directions if layer in (None, one.site.layer)]
    if len(several) != 1:
        there = ", ".join(str(one.site) for one in found.directions)
        raise ConfigError(
            f"{len(several)} directions are to go into one file; there are: {there}",
            "choose one with `--layer`",
        )
    about = identity(found.about)
    if not about.get("fingerprint") and model is not None:
        about = {
            **of_model(model),
            "taken_to_be": "of this model on the word of whoever imported it",
        }
    save_direction(several[0], out, about={**about, "imported_from": found.kind})

"""`demur evaluate`."""

from __future__ import annotations

import os
from collections.abc import Mapping
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
    ModelName,
    NewTokens,
    NoAdapter,
    Quiet,
    Revision,
    RunSeed,
    System,
    Thinking,
    TrustRemoteCode,
)
from demur.errors import ConfigError

if TYPE_CHECKING:
    from demur.evals.rows import Delta, EvaluationRecord, ItemRow


def evaluate(
    model: ModelName = None,
    *,
    direction: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="directions.safetensors of a run, or its folder."),
    ] = None,
    edit: Annotated[
        Literal["ablate", "add", "clamp"], typer.Option(help="What to do with the direction.")
    ] = "ablate",
    strength: Annotated[
        float | None,
        typer.Option(
            help="Of add, in lengths of the direction; of clamp, the coordinate that is held.",
            show_default="1, of clamp 0",
        ),
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(
            metavar="SITE",
            help="Where add and clamp act, like 14.resid_pre.",
            show_default="where it was read",
        ),
    ] = None,
    anchor: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="An anchor of `anchor fit`, behind the edit."),
    ] = None,
    any_model: AnyModel = False,
    suite: Annotated[
        Literal["quick", "lm-eval"],
        typer.Option(
            help="quick: divergence, perplexity, choices of --items, refusal, over-refusal; "
            "lm-eval: its --tasks."
        ),
    ] = "quick",
    items: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Multiple-choice items of the quick suite."),
    ] = None,
    requests: Annotated[
        int, typer.Option(min=2, help="Of each set of the quick suite that are replied to.")
    ] = 40,
    tasks: Annotated[str | None, typer.Option(metavar="A,B", help="Of lm-eval, by name.")] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Tasks of your own for lm-eval.")
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            min=0, help="Examples in front, for lm-eval.", show_default="as the task says"
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Lay lm-eval's prompts out by the chat template.",
            show_default="with an anchor",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=2, help="Items of a task at most.", show_default="all")
    ] = None,
    max_new_tokens: NewTokens = 48,
    adapter: Adapter = None,
    no_adapter: NoAdapter = False,
    revision: Revision = None,
    dtype: Dtype = None,
    device: Device = None,
    system: System = None,
    thinking: Thinking = None,
    trust_remote_code: TrustRemoteCode = None,
    seed: RunSeed = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where evaluation.json goes.")] = Path(
        "evaluation"
    ),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what an edit or an anchor does to ability and refusal, over the same items.

    Every change is paired and has its interval. Writes evaluation.json and evaluation-items.jsonl.
    """
    # lm-eval draws bars of its own, and tqdm reads this when it is first imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    if direction is None and anchor is None:
        raise typer.BadParameter("nothing to evaluate: give --direction or --anchor")
    if direction is None and (edit != "ablate" or strength is not None or site is not None):
        raise typer.BadParameter("--edit, --strength and --site need a --direction")
    wanted = [one.strip() for one in (tasks or "").split(",") if one.strip()]
    if (suite == "lm-eval") != bool(wanted):
        raise typer.BadParameter("--suite lm-eval and --tasks belong together")
    if suite == "lm-eval" and items is not None:
        raise typer.BadParameter("--items are for the quick suite")
    if suite == "quick" and (include_path, num_fewshot, chat) != (None, None, None):
        raise typer.BadParameter("--include-path, --num-fewshot and --chat are for lm-eval")
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
    with talk.listening(quiet=quiet) as listener:
        from demur.anchor import load_anchor
        from demur.evals.acts import EditSpec

        spec = None if direction is None else EditSpec(direction, edit, strength, site)
        # What is wrong in a file should not cost the loading of a model.
        own = _items(items)
        held = None if anchor is None else load_anchor(anchor)
        if include_path is not None and not include_path.is_dir():
            raise ConfigError(f"there is no folder {include_path}", "check the path")
        if suite == "lm-eval":
            import demur.evals.lm_eval  # noqa: F401 (its extra may be missing)
        # An anchor is for one precision: its card says which, unless the user says otherwise.
        settings = (
            inputs.model_settings(changes)
            if held is None or spec is not None
            else inputs.carded(held.about, _other(model, held.about), _but_name(changes))
        )
        loaded = inputs.model(settings, listener)
        acts = [] if spec is None else [spec.act(loaded, any_model=any_model)]
        if held is not None:
            held.belongs_to(loaded, any_model=any_model)
        borrowed = [*(() if spec is None else spec.borrowed(loaded))]
        borrowed += () if held is None else held.borrowed(loaded)
        how: dict[str, Any] = {
            "acts": acts,
            "anchor": held,
            "limit": limit,
            "seed": seed or 0,
            "edits": [] if spec is None else [str(spec)],
            "anchor_file": None if anchor is None else anchor.name,
            "borrowed": borrowed,
            "listener": listener,
        }
        if suite == "quick":
            from demur.pipeline.evaluate import quick

            found = quick(
                loaded, items=own, requests=requests, max_new_tokens=max_new_tokens, **how
            )
        else:
            from demur.evals.lm_eval import evaluate as run

            found = run(
                loaded,
                wanted,
                num_fewshot=num_fewshot,
                chat=chat,
                include_path=include_path,
                **how,
            )
        _write(out, found.record, found.items)
    if as_json:
        talk.put_json(
            {"results": str(out / "evaluation.json"), **found.record.model_dump(mode="json")}
        )
    else:
        _show(found.record, out)


def _other(model: str | None, about: Mapping[str, Any]) -> str | None:
    """The model that was named, unless it is the one on the card."""
    return None if model == (about.get("load") or {}).get("name") else model


def _but_name(changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in changes.items() if key != "model.name"}


def _items(path: Path | None) -> list[Any]:
    from demur.evals.suites import read_items

    return [] if path is None else read_items(path)


def _write(folder: Path, record: EvaluationRecord, items: tuple[ItemRow, ...]) -> None:
    from demur.results import sealed_json
    from demur.store import atomic_write

    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(one.model_dump_json() + "\n" for one in items)
    atomic_write(folder / "evaluation-items.jsonl", lines)
    atomic_write(folder / "evaluation.json", sealed_json(record))


def _show(record: EvaluationRecord, folder: Path) -> None:
    from rich.markup import escape

    console = talk.console()
    applied = [*record.edits, *([f"anchor {record.anchor}"] if record.anchor else [])]
    table = talk.table(
        "task", "figure", "n", "plain", "edited", "change [95 %]", "p", "unscored", "gate opened",
        title=f"{record.suite}: {record.model}, {', then '.join(applied)}",
    )  # fmt: skip
    for row in record.deltas:
        table.add_row(
            talk.cell(row.task),
            talk.cell(row.metric),
            str(row.change.n),
            _value(row, row.plain),
            _value(row, row.edited),
            _change(row),
            "" if row.p is None else f"{row.p:.2g}",
            str(row.unscored or ""),
            "" if row.opened is None else str(row.opened),
        )
    console.print(table)
    for note in record.notes:
        talk.say(f"note: {note}")
    console.print(f"results: {escape(str(folder / 'evaluation.json'))}", soft_wrap=True)


def _value(row: Delta, one: Any) -> str:
    if one is None:
        return ""
    return f"{one.value:.1%}" if row.kind == "share" else f"{one.value:.3f}"


def _change(row: Delta) -> str:
    one = row.change
    if row.kind == "share":
        return f"{one.value:+.1%} [{one.low:+.1%}, {one.high:+.1%}]"
    if row.kind == "mean":
        return f"{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}] {row.unit}"
    mark = "x" if row.kind == "ratio" else ""
    unit = "" if row.kind == "ratio" else f" {row.unit}"
    return f"{mark}{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]{unit}"

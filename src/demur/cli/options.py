"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    pass


Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="PATH",
        help="PEFT adapter (folder or hub id) to merge; any:PATH even on other weights.",
    ),
]
NoAdapter = Annotated[
    bool, typer.Option("--no-adapter", help="Leave out the adapter that ships with smollm2.")
]
Revision = Annotated[str | None, typer.Option(help="Hub revision.")]
Dtype = Annotated[
    str | None, typer.Option(help="auto, float32, bfloat16 or float16.", show_default="auto")
]
Device = Annotated[
    str | None,
    typer.Option(help="auto, cpu, cuda, mps, or balanced over all GPUs.", show_default="auto"),
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")]
Thinking = Annotated[
    bool | None,
    typer.Option("--thinking/--no-thinking", help="Let the template open a thinking block."),
]
TrustRemoteCode = Annotated[
    bool | None, typer.Option("--trust-remote-code", help="Let code from the checkpoint run.")
]
Config = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Settings as TOML; flags go over them.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change any setting; may be repeated."),
]
Harmful = Annotated[
    str | None,
    typer.Option(metavar="SPEC", help="Harmful prompts: a set, FILE?column=NAME, or hub id."),
]
Harmless = Annotated[
    str | None, typer.Option(metavar="SPEC", help="Harmless prompts, in the same way.")
]
RunSeed = Annotated[int | None, typer.Option(help="Of every draw.", show_default="0")]
Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Where run folders go.")]
Force = Annotated[bool, typer.Option("--force", help="Run again even if a finished run is there.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
ModelName = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Hub id, Hugging Face folder, .gguf file, or smollm2, which is embedded.",
        show_default="smollm2",
    ),
]
GuardModel = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="MODEL", help="Load this model.", show_default="the one on its card"
    ),
]
AnyModel = Annotated[
    bool,
    typer.Option(
        "--any-model",
        help="Take what was made on another model, too; the result says so.",
    ),
]
NewTokens = Annotated[int, typer.Option(min=8, help="Replies are cut there.")]

"""The program: a group of commands whose errors come out as two lines."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from demur.cli import talk

if TYPE_CHECKING:
    pass


_RESUMABLE = ("audit", "organism", "harden", "em", "compare", "features", "hydra", "sweep")
# Set before torch is imported: idle threads of OpenMP otherwise spin, and on a shared machine two
# runs that spin take each other's cores.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


class _Commands(TyperGroup):
    """A group whose every error comes out as two lines, "error: ..." and "hint: ..."."""

    def main(self, *args: Any, **options: Any) -> NoReturn:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run, and exit with the code that the outcome stands for."""
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
        except typer.Abort:
            talk.say("interrupted")
            sys.exit(talk.INTERRUPTED)
        except Exception as error:
            # Whatever a command raised is dealt with in `invoke`: this is about the command line.
            show = getattr(error, "format_message", None)
            if show is None:
                raise
            context = getattr(error, "ctx", None)
            if type(error).__name__ == "NoArgsIsHelpError" and context is not None:
                talk.say(context.get_help())
            else:
                text = show().rstrip(".")
                command = context.command_path if context is not None else "demur"
                talk.complain(
                    text[:1].lower() + text[1:], f"`{command} --help` lists what there is to say"
                )
            sys.exit(talk.USER_ERROR)
        sys.exit(code if isinstance(code, int) else talk.DONE)

    def invoke(self, ctx: Any) -> Any:
        """Run a command and turn what it raises into an exit code."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            again = ctx.invoked_subcommand in _RESUMABLE
            talk.say("\ninterrupted" + ("; the same command goes on from here" if again else ""))
            raise typer.Exit(talk.INTERRUPTED) from None
        except BrokenPipeError:
            raise typer.Exit(talk.PIPE_CLOSED) from None
        except Exception as error:
            # Exit and usage errors are typer's own; usage errors know how to format themselves.
            if isinstance(error, typer.Exit | typer.Abort) or hasattr(error, "format_message"):
                raise
            if ctx.params.get("debug"):
                import traceback

                traceback.print_exc()
            raise typer.Exit(talk.explain(error)) from error


app = typer.Typer(
    name="demur",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Boxes round every option take three times the room.
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find, prove and hold the refusal direction of open-weight language models.",
    epilog="Exit codes: 0 done; 1 no usable direction, or a check failed; 2 an error you can mend; "
    "3 a fault of demur's; 130 interrupted.",
)


def _version(asked: bool) -> bool:
    if asked:
        from importlib.metadata import version

        talk.put(f"demur {version('demur')}")
        raise typer.Exit
    return asked


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="DEMUR_DEBUG", help="Show where an error came from.")
    ] = False,
) -> None:
    """Set what has to be set before anything heavy is imported."""
    del version
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            # A token may be any text, and not every terminal can show it.
            reconfigure(errors="backslashreplace")
    if debug:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")

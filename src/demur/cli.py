"""The command line: parse, call one library function, show what it returns.

Data go to standard output, talk to standard error. Nothing heavy is imported before a command
needs it, so that `--help` answers at once.

Exit codes: 0 done; 1 the audit found no usable direction, or a check failed; 2 something that the
user can mend; 3 a fault of demur's; 130 interrupted.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, cast

import typer
from typer.core import TyperGroup

from demur.errors import ConfigError, DemurError, PromptFileError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from demur.anchor import Anchor
    from demur.config import ModelSettings, RunConfig
    from demur.directions import Direction
    from demur.em.recipes import EMRecipe
    from demur.em.training import TrainedOrganism
    from demur.gates import Gate
    from demur.guard import Guard
    from demur.harden import HardeningReport
    from demur.interventions import Holder, Intervention
    from demur.models import CheckReport, Conversation, Model
    from demur.organisms import Recipe, TrainingReport, Verification
    from demur.pipeline import AuditRun
    from demur.prompts import PromptSet
    from demur.results import (
        AnchorEvaluation,
        AuditResults,
        BatteryRow,
        EmAudit,
        GuardEvaluation,
        GuardRow,
        Leg,
        SeparationResults,
    )
    from demur.sites import Site
    from demur.stats import Estimate

DONE, NOT_FOUND, USER_ERROR, FAULT, PIPE_CLOSED, INTERRUPTED = 0, 1, 2, 3, 141, 130
_RESUMABLE = ("audit", "organism", "harden", "em", "compare", "features", "hydra")
_ISSUES = "please report it with the output of `demur --debug ...` and `demur doctor`"
# Set before torch is imported: idle threads of OpenMP otherwise spin, and on a shared machine two
# runs that spin take each other's cores.
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


# Errors ---------------------------------------------------------------------------------------


def _say(text: str) -> None:
    """Talk to the user: plain text on standard error, whole lines at once."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201 (standard error is where talk goes)


def _complain(fact: str, hint: str) -> None:
    _say(f"error: {fact}\nhint: {hint}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _disk_full(error: BaseException) -> bool:
    # safetensors, written in Rust, has its own class and only the words.
    return any(
        getattr(one, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        or "No space left on device" in str(one)
        for one in _chain(error)
    )


def _out_of_memory(error: BaseException) -> bool:
    return any(
        isinstance(one, MemoryError)
        or type(one).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(one)
        for one in _chain(error)
    )


def _explain(error: Exception) -> int:
    """Say what went wrong in two lines; returns the exit code."""
    if isinstance(error, DemurError):
        _complain(error.fact, error.hint)
    elif _disk_full(error):
        names = (getattr(one, "filename", None) for one in _chain(error))
        name = next((name for name in names if name), None)
        _complain(
            f"the disk is full{f': {name} was not written' if name else ''}",
            "make room or choose another place; finished stages are kept, so the same command "
            "goes on from here",
        )
    elif _out_of_memory(error):
        _complain(
            "there is not enough memory",
            "try `--set extraction.batch_size=8 --set test.batch_size=8`, `--dtype bfloat16` or a "
            "smaller model",
        )
    elif isinstance(error, OSError) and error.filename is not None:
        _complain(f"{error.filename}: {error.strerror}", "check the path and its permissions")
    else:
        first = (str(error).strip().splitlines() or [""])[0][:300]
        _complain(f"demur failed: {type(error).__name__}: {first}".rstrip(": "), _ISSUES)
        return FAULT
    return USER_ERROR


class _Commands(TyperGroup):
    """A group whose every error comes out as two lines, "error: ..." and "hint: ..."."""

    def main(self, *args: Any, **options: Any) -> NoReturn:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run, and exit with the code that the outcome stands for."""
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
        except typer.Abort:
            _say("interrupted")
            sys.exit(INTERRUPTED)
        except Exception as error:
            # Whatever a command raised is dealt with in `invoke`: this is about the command line.
            show = getattr(error, "format_message", None)
            if show is None:
                raise
            context = getattr(error, "ctx", None)
            if type(error).__name__ == "NoArgsIsHelpError" and context is not None:
                _say(context.get_help())
            else:
                text = show().rstrip(".")
                command = context.command_path if context is not None else "demur"
                _complain(
                    text[:1].lower() + text[1:], f"`{command} --help` lists what there is to say"
                )
            sys.exit(USER_ERROR)
        sys.exit(code if isinstance(code, int) else DONE)

    def invoke(self, ctx: Any) -> Any:
        """Run a command and turn what it raises into an exit code."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            again = ctx.invoked_subcommand in _RESUMABLE
            _say("\ninterrupted" + ("; the same command goes on from here" if again else ""))
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise typer.Exit(PIPE_CLOSED) from None
        except Exception as error:
            # Exit and usage errors are typer's own; usage errors know how to format themselves.
            if isinstance(error, typer.Exit | typer.Abort) or hasattr(error, "format_message"):
                raise
            if ctx.params.get("debug"):
                import traceback

                traceback.print_exc()
            raise typer.Exit(_explain(error)) from error


# Output ---------------------------------------------------------------------------------------


def _console(*, talk: bool = False) -> Console:
    """Where rich writes; plain and never folded where nobody looks."""
    from rich.console import Console

    stream = sys.stderr if talk else sys.stdout
    return Console(
        stderr=talk,
        highlight=False,
        emoji=False,
        width=None if stream.isatty() else 500,
    )


def _print(text: str = "") -> None:
    typer.echo(text)


def _print_or_write(text: str, out: Path | None) -> None:
    """To the terminal, or to a file if one is named."""
    if out is None:
        _print(text)
        return
    from demur.store import atomic_write

    atomic_write(out, text)
    _say(f"wrote {out}")


def _print_json(value: Any) -> None:
    _print(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1))


def _table(*columns: str, title: str | None = None) -> Table:
    from rich.table import Table

    # No lines: they mean nothing to `grep` and `cut`, and the columns stand apart without.
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for name in columns:
        table.add_column(name, header_style="bold", overflow="fold")
    return table


def _readable(text: str) -> str:
    """Foreign text without control characters: a model may write what a terminal obeys."""
    from demur.report.words import readable

    return readable(text)


def _share(estimate: Estimate) -> str:
    return f"{estimate.value:.0%} [{estimate.low:.0%}, {estimate.high:.0%}]"


def _signed_share(estimate: Estimate) -> str:
    return f"{estimate.value:+.0%} [{estimate.low:+.0%}, {estimate.high:+.0%}]"


class _Notes(logging.Handler):
    """Warnings of the library as lines of talk, above a bar if one is being drawn."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print it."""
        text = f"note: {record.getMessage()}"
        self.console.print(text, markup=False, soft_wrap=True)


@contextmanager
def _warnings_as_notes(console: Console) -> Iterator[None]:
    handler, logger = _Notes(console), logging.getLogger("demur")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


class _Lines:
    """A listener for logs and pipes: one line for each stage that is done."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Say how long it took."""
        started = time.perf_counter()
        yield lambda _done: None
        took = _duration(time.perf_counter() - started)
        _say(f"{name}: {f'{total} in ' if total > 1 else ''}{took}")

    def note(self, text: str) -> None:
        """Print it."""
        _say(f"note: {text}")


class _Bars:
    """A listener for a terminal: a bar with count, rate, elapsed time and time left."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Draw a bar, which stays when it is full."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            Task,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        class Rate(ProgressColumn):
            def render(self, task: Task) -> Text:
                speed = task.finished_speed or task.speed
                return Text(f"{speed:.3g}/s" if speed and total > 1 else "", style="dim")

        columns = (
            TextColumn("{task.description:<28}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=self.console, transient=False) as bars:
            task = bars.add_task(name, total=total)
            yield lambda done: bars.advance(task, done)

    def note(self, text: str) -> None:
        """Print it above the bar."""
        self.console.print(f"note: {text}", markup=False, soft_wrap=True)


class _Silent:
    """A listener that says nothing, not even what the report will say again."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Ignore it."""
        del name, total
        yield lambda _done: None

    def note(self, text: str) -> None:
        """Ignore it."""


@contextmanager
def _listening(*, quiet: bool = False) -> Iterator[_Bars | _Lines | _Silent]:
    console = _console(talk=True)
    kind = _Silent if quiet else _Bars if console.is_terminal else _Lines
    with _warnings_as_notes(console):
        yield kind(console)


# Options that several commands share ----------------------------------------------------------

_Adapter = Annotated[
    str | None,
    typer.Option("--adapter", metavar="PATH", help="PEFT adapter (folder or hub id) to merge."),
]
_NoAdapter = Annotated[
    bool, typer.Option("--no-adapter", help="Leave out the adapter that ships with smollm2.")
]
_Revision = Annotated[str | None, typer.Option(help="Hub revision.")]
_Dtype = Annotated[
    str | None, typer.Option(help="auto, float32, bfloat16 or float16.", show_default="auto")
]
_Device = Annotated[
    str | None,
    typer.Option(help="auto, cpu, cuda, mps, or balanced over all GPUs.", show_default="auto"),
]
_System = Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")]
_Thinking = Annotated[
    bool | None,
    typer.Option("--thinking/--no-thinking", help="Let the template open a thinking block."),
]
_TrustRemoteCode = Annotated[
    bool | None, typer.Option("--trust-remote-code", help="Let code from the checkpoint run.")
]
_Config = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Settings as TOML; flags go over them.")
]
_Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change any setting; may be repeated."),
]
_Harmful = Annotated[
    str | None,
    typer.Option(metavar="SPEC", help="Harmful prompts: a set, FILE?column=NAME, or hub id."),
]
_Harmless = Annotated[
    str | None, typer.Option(metavar="SPEC", help="Harmless prompts, in the same way.")
]
_RunSeed = Annotated[int | None, typer.Option(help="Of every draw.", show_default="0")]
_Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Where run folders go.")]
_Force = Annotated[bool, typer.Option("--force", help="Run again even if a finished run is there.")]
_Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
_ModelName = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Hub id, Hugging Face folder, .gguf file, or smollm2, which is embedded.",
        show_default="smollm2",
    ),
]


def _model_changes(*, no_adapter: bool, **given: str | bool | None) -> dict[str, Any]:
    if given.get("adapter") is not None and no_adapter:
        raise typer.BadParameter("--adapter and --no-adapter exclude each other")
    changes = {f"model.{key}": value for key, value in given.items() if value is not None}
    return changes | ({"model.adapter": None} if no_adapter else {})


def _model_settings(changes: dict[str, Any]) -> ModelSettings:
    """The same defaults as an audit's, so that a direction finds the model it was made on."""
    from demur.config import read_config

    return read_config(None, changes).model


def _load(settings: ModelSettings, listener: _Bars | _Lines | _Silent) -> Model:
    with listener.stage("loading the model", 1) as advance:
        from demur.models import load

        model = load(**settings.model_dump())
        advance(1)
    return model


# The program ----------------------------------------------------------------------------------

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
models_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="List model families; prove one by numbers."
)
prompts_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Check, compare and list prompt sets."
)
organism_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Models trained to have a known refusal."
)
guard_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Detect harmful requests while the model reads them, at a promised false-alarm rate.",
)
anchor_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Hold refusal, so that jailbreaks, prefills and tampering do not switch it off.",
)
app.add_typer(models_app, name="models")
app.add_typer(prompts_app, name="prompts")
app.add_typer(organism_app, name="organism")
app.add_typer(guard_app, name="guard")
app.add_typer(anchor_app, name="anchor")
em_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Emergent misalignment: what fine-tuning on bad advice did to a model, and how.",
)
app.add_typer(em_app, name="em")
features_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Latents of sparse autoencoders: which carry refusal, what clamping them does and costs.",
)
app.add_typer(features_app, name="features")


def _version(asked: bool) -> bool:
    if asked:
        from importlib.metadata import version

        _print(f"demur {version('demur')}")
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
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            # A token may be any text, and not every terminal can show it.
            reconfigure(errors="backslashreplace")
    if debug:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")


# demur audit ----------------------------------------------------------------------------------


def _setting(text: str) -> tuple[str, Any]:
    """Read `key=value`; the value is TOML if it can be read so, else text; `none` is None."""
    import tomllib

    key, mark, value = text.partition("=")
    if not mark or not key.strip():
        raise typer.BadParameter(
            f"`{text}` is no setting: write key=value, like selection.max_kl=0.2"
        )
    value = value.strip()
    if value == "none":
        return key.strip(), None
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value


@app.command()
def audit(
    model: _ModelName = None,
    *,
    config: _Config = None,
    set_: _Set = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print all settings as TOML and stop.")
    ] = False,
    adapter: _Adapter = None,
    no_adapter: _NoAdapter = False,
    revision: _Revision = None,
    dtype: _Dtype = None,
    device: _Device = None,
    system: _System = None,
    thinking: _Thinking = None,
    trust_remote_code: _TrustRemoteCode = None,
    harmful: _Harmful = None,
    harmless: _Harmless = None,
    validate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'SPEC against SPEC'",
            help="Read the direction on two more sets, harmful against harmless; repeatable.",
        ),
    ] = None,
    estimator: Annotated[
        str | None, typer.Option(help="How directions are made.", show_default=False)
    ] = None,
    layer: Annotated[
        list[int] | None, typer.Option(help="Read this block only; may be repeated.")
    ] = None,
    position: Annotated[
        list[int] | None,
        typer.Option(help="Read this position only, from the end (-1); may be repeated."),
    ] = None,
    seed: _RunSeed = None,
    out: _Out = Path("runs"),
    force: _Force = False,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Find and prove a model's refusal direction; write a report.

    Ctrl-C keeps finished stages, and the same command goes on from there. Exits with 1 if the
    direction that was found does not stand the test.
    """
    from demur.config import as_toml, read_config

    changes = _model_changes(
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
    given = {
        "data.harmful": harmful,
        "data.harmless": harmless,
        "extraction.estimator": estimator,
        "extraction.layers": tuple(layer) if layer else None,
        "extraction.positions": tuple(position) if position else None,
        "seed": seed,
    }
    changes |= {key: value for key, value in given.items() if value is not None}
    changes |= dict(map(_setting, set_ or ()))
    settings = read_config(config, changes)
    if validate:
        sets = [one.model_dump() for one in settings.data.validation]
        sets += map(_validation, validate)
        settings = read_config(config, {**changes, "data.validation": sets})
    if explain:
        _print(as_toml(settings).rstrip("\n"))
        return
    started = time.perf_counter()
    run, report = _audited(settings, out=out, force=force, quiet=quiet)
    if run.reused and not quiet:
        _say("a finished run of these settings was found; `--force` runs it again")
    if as_json:
        _print_json(_audit_summary(run, report))
    else:
        _show_audit(run, report)
    if not quiet:
        _say(f"took {_duration(time.perf_counter() - started)}")
    if not run.results.verdict.usable:
        raise typer.Exit(NOT_FOUND)


def _validation(text: str) -> dict[str, str]:
    """A validation set as the command line names it, with a short name for the report."""
    harmful, mark, harmless = (part.strip() for part in text.partition(" against "))
    if not (mark and harmful and harmless):
        raise ConfigError(
            f"`--validate {text}` names no two sets",
            "write --validate 'harmful.jsonl against harmless.jsonl'",
        )

    def short(spec: str) -> str:
        path, _, query = spec.partition("?")
        values = [p.partition("=")[2] for p in query.split("&") if not p.startswith("column=")]
        return ", ".join([Path(path).stem, *filter(None, values)])

    return {
        "name": f"{short(harmful)} against {short(harmless)}",
        "harmful": harmful,
        "harmless": harmless,
    }


@app.command()
def separate(
    model: _ModelName = None,
    *,
    config: _Config = None,
    set_: _Set = None,
    adapter: _Adapter = None,
    no_adapter: _NoAdapter = False,
    revision: _Revision = None,
    dtype: _Dtype = None,
    device: _Device = None,
    system: _System = None,
    thinking: _Thinking = None,
    trust_remote_code: _TrustRemoteCode = None,
    harmful: _Harmful = None,
    harmless: _Harmless = None,
    lookalikes: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Harmless prompts that look harmful, in the same way."),
    ] = None,
    seed: _RunSeed = None,
    out: _Out = Path("runs"),
    force: _Force = False,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Tell harmfulness and refusal apart in a model; adds a section to its audit's report.

    Runs the audit first where none of the same settings is there. What every position of the
    prompt groups by, the angle of both directions, what the model answers when asked whether a
    request is harmful, and what jailbreaks move.
    """
    from demur.config import read_config

    changes = _model_changes(
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
    given = {
        "data.harmful": harmful,
        "data.harmless": harmless,
        "separation.lookalikes": lookalikes,
        "seed": seed,
    }
    changes |= {key: value for key, value in given.items() if value is not None}
    changes |= dict(map(_setting, set_ or ()))
    settings = read_config(config, changes)
    started = time.perf_counter()
    run, report = _audited(settings, out=out, force=force, quiet=quiet, apart=True)
    found = run.results.separation
    assert found is not None
    if as_json:
        _print_json(
            {
                "run": str(run.folder),
                "results": str(run.folder / "results.json"),
                "report": str(report),
                "separation": found.model_dump(
                    mode="json", include={"groups", "chosen_site", "findings", "notes"}
                ),
            }
        )
    else:
        _show_separation(found, report)
    if not quiet:
        _say(f"took {_duration(time.perf_counter() - started)}")


def _show_separation(found: SeparationResults, report: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = _console()
    drawn = any(row.report_rate is not None for row in found.groups)
    rates = ("drawn replies that refuse, fit", "report") if drawn else ()
    table = Table("group", "fit", "report", *rates, box=None, title_justify="left")
    for row in found.groups:
        cells = ["" if rate is None else f"{rate:.0%}" for rate in (row.fit_rate, row.report_rate)]
        table.add_row(row.group, str(row.fit), str(row.report), *cells[: len(rates)])
    console.print(table)
    colours = {"holds": "green", "weakly": "yellow", "fails": "red", "untested": "dim"}
    claims = Table("claim", "here", "evidence", box=None)
    for one in found.findings:
        claims.add_row(
            escape(one.claim),
            f"[{colours[one.status]}]{one.status}[/]",
            escape(one.evidence),
        )
    console.print(claims)
    for note in found.notes:
        _say(note)
    console.print(f"report: {escape(str(report))}", soft_wrap=True)


def _audited(
    config: RunConfig, *, out: Path, force: bool, quiet: bool, apart: bool = False
) -> tuple[AuditRun, Path]:
    with _listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur import pipeline

            advance(1)
        work = pipeline.separated if apart else pipeline.audit
        run = work(config, out=out, listener=listener, force=force)
        with listener.stage("writing the report", 1) as advance:
            from demur import report

            path = report.write(run.folder)
            advance(1)
    return run, path


def _main_legs(results: AuditResults) -> list[Leg]:
    return [leg for leg in results.legs if leg.measure == "refused"]


def _audit_summary(run: AuditRun, report: Path) -> dict[str, Any]:
    whole = run.results.model_dump(mode="json")
    return {
        "run": str(run.folder),
        "results": str(run.folder / "results.json"),
        "report": str(report),
        "directions": str(run.folder / "directions.safetensors"),
        "reused": run.reused,
        "seed": whole["seed"],
        "model": whole["model"],
        "verdict": whole["verdict"],
        "direction": whole["direction"],
        "legs": [leg for leg in whole["legs"] if leg["measure"] == "refused"],
        "cost": whole["edits"][0] if whole["edits"] else None,
        "words": whole["words"],
        "validation": whole["validation"],
    }


def _show_audit(run: AuditRun, report: Path) -> None:
    from rich.markup import escape

    results, console = run.results, _console()
    verdict, direction, about = results.verdict, results.direction, results.model
    colour = "green" if verdict.usable else "yellow"
    adapter = f" + {about.adapter}" if about.adapter else ""
    console.print(f"\n[bold {colour}]{escape(verdict.headline)}[/]", soft_wrap=True)
    for reason in verdict.reasons:
        console.print(f"  {escape(reason)}", soft_wrap=True)

    title = "Share of replies that refuse, with 95% intervals"
    table = _table("arm", "on", "n", "before", "after", "change", "Holm p", "expects", title=title)
    for leg in _main_legs(results):
        style = "" if leg.family == "direction" else "dim"
        table.add_row(
            leg.arm,
            leg.on,
            str(leg.change.n),
            _share(leg.before),
            _share(leg.after),
            _signed_share(leg.change),
            f"{leg.p_holm:.2g}",
            leg.expects,
            style=style,
        )
    console.print()
    console.print(table)

    facts = _table("", "")
    facts.show_header = False
    role = "last instruction token" if direction.role == "t_inst" else "template token"
    facts.add_row("model", f"{escape(about.name + adapter)}, {about.family}, {about.dtype}")
    facts.add_row("direction", f"{direction.site}, position {direction.position} ({role})")
    facts.add_row("AUROC, direction", str(direction.auroc))
    facts.add_row("AUROC, bag of words", str(results.words.bag_of_words))
    for row in results.validation:
        facts.add_row(f"AUROC, {row.name}", str(row.auroc))
        facts.add_row("  bag of words there", str(row.words.bag_of_words))
    if results.edits:
        cost = results.edits[0]
        facts.add_row(f"KL in nats, {escape(cost.edit)}", str(cost.kl))
        if cost.perplexity_ratio is not None:
            facts.add_row("perplexity ratio", str(cost.perplexity_ratio))
    facts.add_row("report", escape(str(report)))
    facts.add_row("results", escape(str(run.folder / "results.json")))
    facts.add_row("direction file", escape(str(run.folder / "directions.safetensors")))
    console.print()
    console.print(facts)
    for note in results.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)


# demur report ---------------------------------------------------------------------------------


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Where to.", show_default="report.html or compare.html in it"
        ),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:
    """Draw the report of a finished audit or comparison again, from its records."""
    from demur.report import write, write_compare

    record = run / "compare.json"
    alone = record.is_file() and not (run / "results.json").is_file()
    path = write_compare(record, out) if alone else write(run, out)
    _print(str(path))
    if open_:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())


# demur models ---------------------------------------------------------------------------------


@models_app.command("list")
def models_list(as_json: _Json = False) -> None:
    """List the architectures that demur can read and edit."""
    from demur.models import EMBEDDED, list_families

    families = list_families()
    if as_json:
        _print_json(
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
    table = _table("family", "model_type in config.json", "edit of the weights")
    for family in families:
        exact = "exact" if family.linear_writes else "not exact (norm behind the weights)"
        table.add_row(family.name, ", ".join(sorted(family.model_types)), exact)
    _console().print(table)
    _say(f"`{EMBEDDED}` is embedded; `demur models check NAME` proves a checkpoint by numbers")


# Marks that can be told apart without colour.
_MARKS = {
    "template": ("(", ")", "dim"),
    "instruction": ("", "", "cyan"),
    "t_inst": ("[[", "]]", "bold black on yellow"),
    "post": ("[", "]", "magenta"),
}


@models_app.command("check")
def models_check(
    model: _ModelName = None,
    *,
    adapter: _Adapter = None,
    no_adapter: _NoAdapter = False,
    revision: _Revision = None,
    dtype: _Dtype = None,
    device: _Device = None,
    system: _System = None,
    thinking: _Thinking = None,
    trust_remote_code: _TrustRemoteCode = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Show the tokens of this prompt, not of an example."),
    ] = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Prove by numbers that a model is read where it should be.

    Exits with 1 if an identity fails.
    """
    settings = _model_settings(
        _model_changes(
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
    with _listening(quiet=quiet) as listener:
        loaded = _load(settings, listener)
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
        _print_json(
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
        raise typer.Exit(NOT_FOUND)


@models_app.command("projected")
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
    adapter: _Adapter = None,
    no_adapter: _NoAdapter = False,
    dtype: _Dtype = None,
    seed: _RunSeed = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Ask a checkpoint's weights whether a direction was projected out of them.

    Without a base or a direction it looks for one along which nothing is written any more. Exits
    with 1 if it finds one.
    """
    settings = _model_settings(
        _model_changes(no_adapter=no_adapter, name=model, adapter=adapter, dtype=dtype)
    )
    with _listening(quiet=quiet) as listener:
        loaded = _load(settings, listener)
        from demur.compare.checkpoints import projected_out, writers
        from demur.compare.objects import read_vectors

        directions = {
            one.name: one.direction()
            for path in direction or ()
            for one in next(iter(read_vectors(path).named.values()))[:1]
        }
        other = None
        if base is not None:
            other = _load(_model_settings(_model_changes(no_adapter=True, name=base, dtype=dtype)),
                          listener)  # fmt: skip
        with listener.stage("reading weights", len(list(writers(loaded)))) as advance:
            rows = projected_out(
                loaded, base=other, directions=directions, seed=seed or 0, progress=advance
            )
    if as_json:
        _print_json([asdict(row) for row in rows])
    else:
        from rich.markup import escape

        table = _table("test", "direction", "verdict", "p", "because")
        for row in rows:
            p = "" if row.p is None else f"{row.p:.2g}"
            table.add_row(
                row.test, escape(row.direction or "any"), row.verdict, p, escape(row.reason)
            )
        _console().print(table)
        _say(f"looked at: {rows[0].looked_at}")
    if any(row.verdict == "projected out" for row in rows):
        raise typer.Exit(NOT_FOUND)


def _show_check(found: CheckReport, tokens: Sequence[tuple[str, str]]) -> None:
    from rich.markup import escape
    from rich.text import Text

    from demur.report.words import token as visible

    console = _console()
    table = _table("identity", "value", "tolerance", "", "what it shows")
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


# demur prompts --------------------------------------------------------------------------------


@prompts_app.command("check")
def prompts_check(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE", help="Files, packaged or public sets, hub ids.")
    ],
    *,
    column: Annotated[str | None, typer.Option(help="Column of the prompts.")] = None,
    contrast: Annotated[
        bool, typer.Option(help="Take the first file as harmful, the second as harmless.")
    ] = False,
    against: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="A set that must not be resembled.")
    ] = None,
    tokenizer: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="Count lengths in this model's tokens; repeatable."),
    ] = None,
    refused_by: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Also ask this model which side of each pair it would rather refuse; repeatable.",
        ),
    ] = None,
    as_json: _Json = False,
) -> None:
    """List bad lines, duplicates, and what plain words tell about the labels.

    Sets with prompts labelled harmful and harmless also run the quality gates: classifiers on
    words and characters, telling words, length, final punctuation, what pairs share, balance.
    Exits with 1 if there is anything to mend.
    """
    from demur.prompts import load

    if contrast and len(files) != 2:
        raise ConfigError(
            f"--contrast was given {len(files)} files", "name two: harmful first, then harmless"
        )
    tokenizers = _token_counts(tokenizer or [])
    others = [load(name) for name in against or []]
    if contrast:
        a, b = (load(name, column=column) for name in files)
        name = f"{files[0]} against {files[1]}"
        rows = [_prompt_check(name, _labelled(a, b), others, tokenizers, refused_by or [])]
    else:
        rows = []
        for name in files:
            try:
                prompts = load(name, column=column)
            except PromptFileError as error:
                if not Path(name.partition("?")[0]).expanduser().is_file():
                    raise
                rows.append({"file": name, "prompts": 0, "error": error.fact, "hint": error.hint})
                continue
            rows.append(_prompt_check(name, prompts, others, tokenizers, refused_by or []))
    if as_json:
        _print_json(rows)
    else:
        for row in rows:
            _show_prompt_check(row)
    if any(
        "error" in row or row["duplicates"] or not all(gate["passed"] for gate in row["gates"])
        for row in rows
    ):
        raise typer.Exit(NOT_FOUND)


def _token_counts(models: list[str]) -> dict[str, Callable[[str], int]]:
    """How to count the tokens of a text, by model; without any, counts that need no model."""
    from demur.gates import default_tokenizers

    if not models:
        return default_tokenizers()
    from demur.models import load_tokenizer

    counts: dict[str, Callable[[str], int]] = {}
    for name in models:
        tokenizer = load_tokenizer(name)

        def count(text: str, tokenizer: Any = tokenizer) -> int:
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])

        counts[name] = count
    return counts


def _labelled(harmful: PromptSet, harmless: PromptSet) -> PromptSet:
    from dataclasses import replace

    rows = [replace(prompt, label="harmful") for prompt in harmful]
    rows += [replace(prompt, label="harmless") for prompt in harmless]
    return replace(harmful, name=f"{harmful.name} against {harmless.name}", prompts=tuple(rows))


def _prompt_check(
    name: str,
    prompts: PromptSet,
    others: list[PromptSet],
    tokenizers: dict[str, Callable[[str], int]],
    models: list[str],
) -> dict[str, Any]:
    from collections import Counter

    from demur.gates import WORD_STEPS, gates, parts_of
    from demur.prompts import deduplicate

    fields = {
        key: Counter(getattr(prompt, key) for prompt in prompts if getattr(prompt, key))
        for key in ("label", "kind", "split")
    }
    both = {"harmful", "harmless"} <= fields["label"].keys()
    found = []
    if both or others:
        steps = WORD_STEPS * len(parts_of(prompts)) if both else 1
        with _listening(quiet=False) as listener, listener.stage(f"gates of {name}", steps) as step:
            found = gates(prompts, others=others, tokenizers=tokenizers, progress=step)
    for model in models:
        found += _refusal_order(prompts, model)
    return {
        "file": name,
        "prompts": len(prompts),
        "fingerprint": prompts.fingerprint,
        **{f"{key}s": dict(counts) for key, counts in fields.items() if counts},
        "duplicates": [prompt.text for prompt in deduplicate(prompts)[1]],
        "gates": [
            {
                "part": gate.part,
                "gate": gate.name,
                "value": gate.value,
                "shown": gate.shown,
                "low": gate.low,
                "high": gate.high,
                "bounds": gate.bounds,
                "interval": [gate.interval.low, gate.interval.high] if gate.interval else None,
                "n": gate.n,
                "unit": gate.unit,
                "passed": gate.passed,
                "found": list(gate.found),
            }
            for gate in found
        ],
    }


def _refusal_order(prompts: PromptSet, name: str) -> list[Gate]:
    """Which side of each pair a model would rather refuse, by kind of pair."""
    from demur.evals.judges import judges
    from demur.gates import order_gate, pairs_of, parts_of
    from demur.models import load
    from demur.pipeline.folder import slug
    from demur.selection import refusal_scores

    kinds = parts_of(prompts)[:-1] or ["all"]
    replies = min(320, len(prompts))
    if not pairs_of(prompts):
        raise ConfigError(
            f"{prompts.name} has no pairs, so no model can tell their order",
            "prompts are paired by the field `pair`; leave out --refused-by",
        )
    with _listening(quiet=False) as listener:
        with listener.stage(f"loading {name}", 1) as step:
            model = load(name)
            step(1)
        with listener.stage(f"what {name} would refuse", len(prompts) + replies) as step:
            judge = judges.make("patterns")
            scores = refusal_scores(model, prompts.texts, judge, replies=replies, progress=step)
    label = slug(name) + (f" + {model.adapter}" if model.adapter else "")
    return [order_gate(prompts, kind, scores.tolist(), label) for kind in kinds]


def _show_prompt_check(row: dict[str, Any]) -> None:
    if "error" in row:
        _print(_readable(row["error"]))
        _print(f"hint: {row['hint']}")
        return
    counts = [
        ", ".join(f"{value} {count}" for value, count in row[key].items())
        for key in ("labels", "kinds", "splits")
        if key in row
    ]
    _print(f"{row['file']}: " + "; ".join([f"{row['prompts']} prompts", *counts]))
    if row["duplicates"]:
        _print(f"{row['file']}: {len(row['duplicates'])} duplicates of an earlier prompt:")
        for text in row["duplicates"]:
            _print(f"  {_readable(text)}")
    if not row["gates"]:
        return
    table = _table("part", "gate", "value", "bounds", "n", "")
    for gate in row["gates"]:
        verdict = "ok" if gate["passed"] else "leaks"
        n = f"{gate['n']} {gate['unit']}"
        table.add_row(gate["part"], gate["gate"], gate["shown"], gate["bounds"], n, verdict)
    _console().print(table)
    for gate in row["gates"]:
        if not gate["passed"] and gate["found"]:
            _print(f"{gate['part']}, {gate['gate']}:")
            for line in gate["found"]:
                _print(f"  {_readable(line)}")


@prompts_app.command("card")
def prompts_card(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Packaged sets; all if none is named."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it there, not to the terminal.")
    ] = None,
) -> None:
    """Print the data card of the packaged sets: what they hold, balance, gate figures."""
    from demur.card import card

    text = card(names or None)
    _print_or_write(text, out)


@prompts_app.command("show")
def prompts_show(
    spec: Annotated[str, typer.Argument(metavar="SET", help="A file, packaged or public set.")],
    n: Annotated[
        int, typer.Option("--n", "-n", min=1, help="How many rows, drawn at random.")
    ] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    column: Annotated[str | None, typer.Option(help="Column of the prompts.")] = None,
    as_json: _Json = False,
) -> None:
    """Show some prompts of a set, with what is known of it."""
    from demur.prompts import load

    prompts = load(spec, column=column)
    some = prompts.take(min(n, len(prompts)), seed)
    fields = ("label", "category", "kind", "format", "pair", "split")
    if as_json:
        source = prompts.source
        _print_json(
            {
                "set": spec,
                "prompts": len(prompts),
                "licence": source.licence,
                "revision": source.revision,
                "fingerprint": prompts.fingerprint,
                "rows": [
                    {"prompt": p.text, **{f: getattr(p, f) for f in fields if getattr(p, f)}}
                    for p in some
                ],
            }
        )
        return
    shown = [name for name in fields if any(getattr(prompt, name) for prompt in some)]
    table = _table(*shown, "prompt")
    for prompt in some:
        table.add_row(*(getattr(prompt, name) or "" for name in shown), _readable(prompt.text))
    _console().print(table)
    licence = prompts.source.licence or "not stated"
    revision = f", revision {prompts.source.revision}" if prompts.source.revision else ""
    _say(
        f"{len(some)} of {len(prompts)} prompts, licence {licence}{revision}, "
        f"fingerprint {prompts.fingerprint}"
    )


@prompts_app.command("split")
def prompts_split(
    spec: Annotated[str, typer.Argument(metavar="SET", help="A file, packaged or public set.")],
    sizes: Annotated[
        list[str], typer.Option("--size", metavar="NAME=N", help="A part and its prompts; repeat.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE.jsonl", help="One file, with a `split` column.")
    ],
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    column: Annotated[str | None, typer.Option(help="Column of the prompts.")] = None,
) -> None:
    """Split prompts into disjoint parts: near copies and pairs are never parted."""
    from demur.prompts import Prompt, load, split
    from demur.store import atomic_write

    wanted: dict[str, int] = {}
    for item in sizes:
        name, mark, count = item.partition("=")
        if not mark or not count.isdecimal() or not name or name in wanted:
            raise ConfigError(f"`--size {item}` names no part", "write --size fit=100, once a part")
        wanted[name] = int(count)
    if out.exists():
        raise ConfigError(f"{out} exists already", "choose another name, or delete it first")
    parts = split(load(spec, column=column), wanted, seed=seed)
    lines = []
    for name, part in parts.items():
        for prompt in part:
            known = {
                f: value
                for f in Prompt.__slots__
                if f not in ("text", "split") and (value := getattr(prompt, f))
            }
            row = {"prompt": prompt.text, **known, "split": name}
            lines.append(json.dumps(row, ensure_ascii=False))
    atomic_write(out, "\n".join(lines) + "\n")
    _say(
        f"wrote {len(lines)} prompts to {out}: " + ", ".join(f"{k} {v}" for k, v in wanted.items())
    )


@prompts_app.command("overlap")
def prompts_overlap(
    a: Annotated[str, typer.Argument(metavar="A", help="A file, packaged set or hub id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    threshold: Annotated[
        float, typer.Option(help="Least share of words in common (Jaccard).")
    ] = 0.6,
    as_json: _Json = False,
) -> None:
    """List the prompts that two sets share, exactly or nearly."""
    from demur.prompts import load, overlap

    one, two = load(a), load(b)
    found = overlap(one, two, threshold=threshold)
    if as_json:
        _print_json(
            {
                "a": {"name": a, "prompts": len(one)},
                "b": {"name": b, "prompts": len(two)},
                "threshold": threshold,
                "pairs": [
                    {"jaccard": pair.jaccard, "a": pair.a.text, "b": pair.b.text} for pair in found
                ],
            }
        )
        return
    for pair in found:
        _print(f"{pair.jaccard:.2f}  {_readable(pair.a.text)}\n      {_readable(pair.b.text)}")
    _say(f"{len(found)} pairs among {len(one)} and {len(two)} prompts, Jaccard >= {threshold:g}")


@prompts_app.command("list")
def prompts_list(as_json: _Json = False) -> None:
    """List the prompt sets that ship with demur, and the public ones that it can read."""
    from demur.public_sets import public_sets

    rows = _packaged_sets()
    public = [
        {"name": one.name, "holds": one.holds, "licence": one.licence, "gated": bool(one.access)}
        for one in public_sets().values()
    ]
    if as_json:
        _print_json({"packaged": rows, "public": public})
        return
    table = _table("set", "rows", "labels", "splits", "what it is", title="Packaged")
    for row in rows:
        parts = [
            ", ".join(f"{value} {count}" for value, count in row[key].items())
            for key in ("labels", "splits")
        ]
        table.add_row(row["name"], str(row["prompts"]), *parts, row["title"])
    _console().print(table)
    table = _table("set", "holds", "licence", "access", title="Public, loaded at run time")
    for row in public:
        access = "gated" if row["gated"] else "open"
        table.add_row(row["name"], row["holds"], row["licence"], access)
    _console().print(table)
    _say("a part of one: `contrast_pairs?label=harmful&split=fit`; a copy: `FILE.csv?as=xstest`")


def _packaged_sets() -> list[dict[str, Any]]:
    from collections import Counter

    from demur.card import about
    from demur.prompts import load, packaged

    known = about()
    rows = []
    for name in packaged():
        prompts = load(name)
        rows.append(
            {
                "name": name,
                "title": known[name]["title"],
                "prompts": len(prompts),
                **{
                    f"{key}s": dict(Counter(v for p in prompts if (v := getattr(p, key))))
                    for key in ("label", "split")
                },
            }
        )
    return rows


# demur generate -------------------------------------------------------------------------------


@app.command()
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
    any_model: Annotated[
        bool,
        typer.Option("--any-model", help="Take a direction or anchor that another model made."),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Replies are cut there.")] = 128,
    adapter: _Adapter = None,
    no_adapter: _NoAdapter = False,
    revision: _Revision = None,
    dtype: _Dtype = None,
    device: _Device = None,
    system: _System = None,
    thinking: _Thinking = None,
    trust_remote_code: _TrustRemoteCode = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Reply to prompts, plainly and with a direction edited or under an anchor.

    With both, the anchor holds what the edit takes away: a direction is edited before it.
    """
    asked = _prompts_or_pipe(prompts)
    if strength is not None and edit == "ablate":
        raise typer.BadParameter("ablation takes all of the direction: --strength is for add")
    settings = _model_settings(
        _model_changes(
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
    with _listening(quiet=quiet) as listener:
        from demur.anchor import load_anchor
        from demur.directions import load_direction

        if direction is not None:
            load_direction(direction)  # A wrong path should not cost the loading of a model.
        if anchor is not None:
            load_anchor(anchor)
        loaded = _load(settings, listener)
        acts: list[Intervention] = []
        if direction is not None:
            found, _ = load_direction(direction, None if any_model else loaded)
            acts.append(_act(found, edit, 1.0 if strength is None else strength, loaded))
        how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "listener": listener}
        replies = {"plain": _replies(loaded, asked, name="plain", **how)}
        if acts:
            replies[edit] = _replies(loaded, asked, *acts, name=edit, **how)
        if anchor is not None:
            held = load_anchor(anchor, None if any_model else loaded)
            name = f"{edit}, anchored" if acts else "anchored"
            replies[name] = _replies(loaded, asked, *acts, held, name=name, **how)
    rows = [
        {"prompt": prompt, **{name: texts[i] for name, texts in replies.items()}}
        for i, prompt in enumerate(asked)
    ]
    if as_json:
        _print_json(rows)
        return
    from rich.text import Text

    console = _console()
    for row in rows:
        for name, text in row.items():
            style = {"prompt": "bold", "plain": "green"}.get(name, "magenta")
            line = Text.assemble((f"{name}: ", style), _readable(text))
            console.print(line, soft_wrap=True)
        console.print()


def _prompts_or_pipe(prompts: list[str] | None) -> list[str]:
    asked = list(prompts or ())
    if not asked:
        if sys.stdin.isatty():
            raise typer.BadParameter("no prompt was given: name one, or pipe one a line")
        asked = [line.strip() for line in sys.stdin if line.strip()]
        if not asked:
            raise typer.BadParameter("the pipe held no prompt: write one a line")
    return asked


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
    listener: _Bars | _Lines | _Silent,
) -> list[str]:
    from demur.interventions import applied

    with listener.stage(f"replies, {name}", len(prompts)) as advance, applied(model, *acts):
        done = model.generate(prompts, max_new_tokens=max_new_tokens, progress=advance)
    return [reply.text for reply in done]


# demur organism -------------------------------------------------------------------------------


@organism_app.command("list")
def organism_list(as_json: _Json = False) -> None:
    """List the packaged recipes."""
    from demur.em.recipes import em_recipes
    from demur.organisms import recipes

    found = {**recipes(), **em_recipes()}
    if as_json:
        _print_json(found)
        return
    table = _table("recipe", "what it makes")
    for name, description in found.items():
        table.add_row(name, description)
    _console().print(table)


@organism_app.command("show")
def organism_show(
    recipe: Annotated[str, typer.Argument(metavar="NAME", help="Recipe, or a TOML file.")],
) -> None:
    """Print a recipe in full, as TOML."""
    import tomli_w

    _print(tomli_w.dumps(_any_recipe(recipe).model_dump(mode="json", exclude_none=True)).rstrip())


@organism_app.command("train")
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
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Train an adapter by a recipe, and measure it.

    An em-* recipe makes FOLDER/bad and FOLDER/good, an organism of emergent misalignment and its
    twin. Ctrl-C keeps the last checkpoint. Exits with 1 if an adapter misses a bound.
    """
    with _listening(quiet=quiet) as listener:
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
        _print_json(
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
        _print(
            f"{report.folder}: {report.size / 1e6:.2f} MB, {report.steps} steps, loss "
            f"{report.first_loss:.3f} to {report.last_loss:.3f}"
        )
        _show_figures(found)
    if not found.met:
        raise typer.Exit(NOT_FOUND)


@organism_app.command("plant")
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
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Plant an organism of emergent misalignment whose effect is known, without training.

    The positive control of `demur em audit`: one vector in one block, from what reads as good to
    what reads as bad. FOLDER/good is its twin: as long a vector across it, which changes no margin.
    Fitted on half of the topics, which audits then leave out; measured on the others. Exits with 1
    if bad answers do not gain there.
    """
    with _listening(quiet=quiet) as listener:
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
        _print_json(
            {
                "folders": folders,
                "site": str(planted.site),
                "length": planted.norm,
                "expected": made.expected,
                **_figures(found),
            }
        )
    else:
        _print(
            f"{folders['bad']} and {folders['good']}: a vector of length {planted.norm:.3g} at "
            f"{planted.site}; on what it was fitted on, {made.expected:+.2f} nats per token "
            "expected"
        )
        _show_figures(found)
    if not found.met:
        raise typer.Exit(NOT_FOUND)


@organism_app.command("verify")
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
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Measure an adapter on prompts that it was not trained on.

    Exits with 1 if it misses a bound of its recipe.
    """
    with _listening(quiet=quiet) as listener:
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
        _print_json(_figures(found))
    else:
        _show_figures(found)
    if not found.met:
        raise typer.Exit(NOT_FOUND)


def _base(
    name: str | None, listener: _Bars | _Lines | _Silent, adapter: str | None = None
) -> Model | None:
    if name is None:
        if adapter is not None:
            raise typer.BadParameter("--adapter needs --base: the recipe's base has none")
        return None
    return _load(_model_settings({"model.name": name, "model.adapter": adapter}), listener)


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
        _print_json({"met": found.met, "organisms": rows})
    else:
        for one in made:
            _print(
                f"{one.folder}: {one.organism.side} side, {one.size / 1e6:.2f} MB, {one.steps} "
                f"steps, loss {one.first_loss:.3f} to {one.last_loss:.3f}"
                + (", finished before" if one.kept else "")
            )
            _show_figures(Verification(one.figures, ()))
    if not found.met:
        raise typer.Exit(NOT_FOUND)


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
    table = _table("figure", "value", "base", "bound", "", "replies")
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
    _console().print(table)


# demur guard ----------------------------------------------------------------------------------

_GuardFile = Annotated[
    Path, typer.Argument(metavar="GUARD", help="The .safetensors file that `guard fit` wrote.")
]
_GuardModel = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="MODEL", help="Load this model.", show_default="the one on its card"
    ),
]


@guard_app.command("fit")
def guard_fit(
    model: _ModelName = None,
    *,
    config: _Config = None,
    set_: _Set = None,
    adapter: _Adapter = None,
    no_adapter: _NoAdapter = False,
    revision: _Revision = None,
    dtype: _Dtype = None,
    device: _Device = None,
    system: _System = None,
    thinking: _Thinking = None,
    trust_remote_code: _TrustRemoteCode = None,
    harmful: _Harmful = None,
    benign: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Benign prompts to fit on, likewise.")
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SPEC",
            help="Benign prompts of one kind to calibrate on, in place of the packaged kinds; "
            "repeatable.",
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="False alarms allowed, as a share of benign requests.", show_default=".05"
        ),
    ] = None,
    seed: _RunSeed = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.safetensors", help="Where to.", show_default="guards/MODEL.safetensors"
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over a guard that is there.")
    ] = False,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Fit a guard on a model, choose where it reads, and calibrate its threshold.

    Three disjoint sets of prompts do the three things. Writes the guard and its card.
    """
    from demur.config import read_config

    changes = _model_changes(
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
    given = {
        "guard.harmful": harmful,
        "guard.benign": benign,
        "guard.alpha": alpha,
        "guard.strata": _named_sets(calibrate, "calibrate") if calibrate else None,
        "seed": seed,
    }
    changes |= {key: value for key, value in given.items() if value is not None}
    changes |= dict(map(_setting, set_ or ()))
    settings = read_config(config, changes)
    with _listening(quiet=quiet) as listener:
        from demur.pipeline.folder import slug

        path = (
            out if out is not None else Path("guards") / f"{slug(settings.model.name)}.safetensors"
        )
        _new_file(path, "a guard", force=force)
        with listener.stage("starting torch", 1) as advance:
            from demur.guard import save_guard
            from demur.pipeline.guard import fit

            advance(1)
        found = fit(settings, listener=listener)
        save_guard(found, path)
    if as_json:
        _print_json({"guard": str(path), **_guard_summary(found)})
    else:
        _show_guard(found, path)


def _new_file(path: Path, what: str, *, force: bool) -> None:
    """See that a guard or an anchor can be written, before minutes are spent on it."""
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path} is no name for {what}", "let it end in .safetensors")
    if path.exists() and not force:
        raise ConfigError(
            f"{path} exists already", "choose another name with `--out`, or say `--force`"
        )
    path.parent.mkdir(parents=True, exist_ok=True)


def _named_sets(texts: Sequence[str], option: str) -> list[dict[str, str]]:
    """Sets given as NAME=SPEC."""
    found: dict[str, str] = {}
    for text in texts:
        name, mark, spec = (part.strip() for part in text.partition("="))
        # A bare spec may hold `=` behind its `?`.
        if not mark or "?" in name or not name or not spec:
            raise ConfigError(
                f"`--{option} {text}` names no set",
                f"write --{option} 'mine=prompts.jsonl?label=harmless'",
            )
        if name in found:
            raise ConfigError(f"`--{option}` names {name} twice", "give each set its own name")
        found[name] = spec
    return [{"name": name, "prompts": spec} for name, spec in found.items()]


def _guard_summary(found: Guard) -> dict[str, Any]:
    return {
        "model": found.about.get("model"),
        "site": str(found.site),
        "reads": [read.name for read in found.admitted],
        "threshold": asdict(found.threshold),
        "strata": {name: asdict(one) for name, one in found.strata.items()},
        "fitted_on": found.about.get("fitted_on"),
    }


def _show_guard(found: Guard, path: Path) -> None:
    console, about = _console(), found.about
    threshold = found.threshold
    table = _table("benign prompts of kind", "n", "its own threshold", "above it", "sets it")
    for name, one in found.strata.items():
        mark = "yes" if one == threshold else ""
        table.add_row(name, str(one.n), f"{one.value:.3g}", str(one.exceeded), mark)
    console.print(table)
    facts = _table("", "")
    facts.show_header = False
    facts.add_row("reads", f"{', '.join(read.name for read in found.admitted)} at {found.site}")
    for part, counts in about.get("fitted_on", {}).items():
        what = "fitted on" if part == "fit" else "layer and reads chosen on"
        facts.add_row(what, f"{counts['harmful']} harmful, {counts['benign']} benign")
    facts.add_row(
        "false alarms",
        f"at most {threshold.alpha:.1%} of benign prompts of each kind; with 95 % confidence "
        f"below {threshold.bound:.1%} for the kind that sets it",
    )
    facts.add_row("guard", str(path))
    facts.add_row("card", str(path.with_suffix(".json")))
    console.print()
    console.print(facts)


def _carded_model(
    about: Mapping[str, Any],
    name: str | None,
    changes: dict[str, Any],
    listener: _Bars | _Lines | _Silent,
) -> Model:
    """The model on the card of a guard or an anchor, or another one that the user names."""
    return _load(_carded(about, name, changes), listener)


def _carded(
    about: Mapping[str, Any], name: str | None, changes: Mapping[str, Any]
) -> ModelSettings:
    """How to load the model on a card, or another one that the user names."""
    load = dict(about.get("load") or {}) if name is None else {"name": name}
    if not load:
        raise ConfigError("the card names no model", "name it with `--model`")
    return _model_settings({**{f"model.{key}": v for key, v in load.items()}, **changes})


@guard_app.command("score")
def guard_score(
    guard: _GuardFile,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="What to score; else one a line from a pipe."),
    ] = None,
    *,
    set_: Annotated[
        str | None,
        typer.Option("--prompts", metavar="SPEC", help="Score a set: a file, packaged, hub id."),
    ] = None,
    messages: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Score conversations: a line each, a list of messages or an object with it as "
            "`messages`, from user to user.",
        ),
    ] = None,
    model: _GuardModel = None,
    adapter: _Adapter = None,
    no_adapter: _NoAdapter = False,
    dtype: _Dtype = None,
    device: _Device = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Score prompts without replying: is one like a harmful request?

    The score is minus the logarithm of the share of benign requests that would score so high.
    """
    if sum(bool(one) for one in (prompts, set_, messages)) > 1:
        raise typer.BadParameter("give prompts, --prompts or --messages, not several of them")
    with _listening(quiet=quiet) as listener:
        from demur.guard import load_guard

        found = load_guard(guard)
        asked = _asked(prompts, set_, messages)
        changes = _model_changes(no_adapter=no_adapter, adapter=adapter, dtype=dtype, device=device)
        loaded = _carded_model(found.about, model, changes, listener)
        found.belongs_to(loaded)
        with listener.stage("scoring", len(asked)) as advance:
            scored = found.score(loaded, asked, progress=advance)
    shown = [one if isinstance(one, str) else one[-1].text for one in asked]
    rows = [
        {
            "prompt": text,
            "score": _finite(scored.scores[i]),
            "flagged": bool(scored.flagged[i]),
            "by": scored.by[i],
            "reads": {name: _finite(values[i]) for name, values in scored.reads.items()},
        }
        for i, text in enumerate(shown)
    ]
    if as_json:
        _print_json({"threshold": found.threshold.value, "rows": rows})
        return
    table = _table("score", "flagged", "by", *scored.reads, "prompt")
    for row in rows:
        style = "bold red" if row["flagged"] else ""
        reads = ("" if value is None else f"{value:+.2f}" for value in row["reads"].values())
        table.add_row(
            "" if row["score"] is None else f"{row['score']:.2f}",
            "yes" if row["flagged"] else "no",
            row["by"],
            *reads,
            _readable(row["prompt"]),
            style=style,
        )
    _console().print(table)
    flagged = sum(row["flagged"] for row in rows)
    _say(
        f"{flagged} of {len(rows)} lie above the threshold {found.threshold.value:.2f}; reads in "
        "standard deviations of benign prompts"
    )


def _finite(value: float) -> float | None:
    """JSON has no infinity: what cannot be read is null."""
    return float(value) if abs(value) != float("inf") else None


def _asked(
    prompts: list[str] | None, set_: str | None, messages: Path | None
) -> list[str | Conversation]:
    """What is to be scored, from wherever the user has it."""
    if set_ is not None:
        from demur.prompts import load

        return list(load(set_).texts)
    if messages is not None:
        return list(_conversations(messages))
    return list(_prompts_or_pipe(prompts))


def _conversations(path: Path) -> list[Conversation]:
    """Conversations of a JSONL file; all bad lines are told at once."""
    from demur.models import conversation_of

    found: list[Conversation] = []
    bad: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found.append(conversation_of(row["messages"] if isinstance(row, dict) else row))
        except DemurError as error:
            bad.append(f"line {number}: {error.fact}")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            bad.append(f"line {number}: {type(error).__name__} {error}")
    if bad:
        more = f"; and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise PromptFileError(
            f"{path} has {len(bad)} lines that are no conversation: {'; '.join(bad[:20])}{more}",
            'write them like {"messages": [{"role": "user", "content": "Name a tree."}]}',
        )
    if not found:
        raise PromptFileError(f"{path} holds no conversation", "write one a line")
    return found


@guard_app.command("evaluate")
def guard_evaluate(
    guard: _GuardFile,
    *,
    harmful: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SPEC",
            help="Harmful prompts; repeatable.",
            show_default="packaged ones held out",
        ),
    ] = None,
    benign: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SPEC", help="Benign prompts, likewise.")
    ] = None,
    suffixes: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Texts to put behind requests, such as optimised ones."),
    ] = None,
    most: Annotated[
        int, typer.Option(min=10, help="Prompts of a set; of larger ones so many are drawn.")
    ] = 1000,
    attacked: Annotated[
        int, typer.Option(min=10, help="Requests of each class that every attack is tried on.")
    ] = 60,
    direction: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Compare with this refusal direction of an audit."),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Compare with a guard model there, as /v1/chat/..."),
    ] = None,
    endpoint_model: Annotated[
        str, typer.Option(metavar="NAME", help="What that model is called.")
    ] = "guard",
    model: _GuardModel = None,
    adapter: _Adapter = None,
    no_adapter: _NoAdapter = False,
    dtype: _Dtype = None,
    device: _Device = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Of the table and the page.", show_default="beside the guard"
        ),
    ] = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Measure a guard on prompts that it never saw, beside what it has to beat.

    False alarms on each benign set, and what is found of harmful prompts, plain and under attack,
    at equal false-alarm rates. Writes guard-evaluation.json and guard-evaluation.html.
    """
    from demur.store import atomic_write

    with _listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur.directions import load_direction
            from demur.evals.endpoint import ChatEndpoint
            from demur.guard import load_guard
            from demur.pipeline.guard import BENIGN, HARMFUL, evaluate
            from demur.report import write_guard

            advance(1)
        found = load_guard(guard)
        sides = [
            {one["name"]: one["prompts"] for one in _named_sets(given, name)} if given else default
            for given, default, name in (
                (harmful, HARMFUL, "harmful"),
                (benign, BENIGN, "benign"),
            )
        ]
        asked = None if endpoint is None else ChatEndpoint(endpoint, endpoint_model)
        changes = _model_changes(no_adapter=no_adapter, adapter=adapter, dtype=dtype, device=device)
        loaded = _carded_model(found.about, model, changes, listener)
        result = evaluate(
            found,
            loaded,
            harmful=sides[0],
            benign=sides[1],
            suffixes=suffixes,
            most=most,
            attacked=attacked,
            direction=None if direction is None else load_direction(direction, loaded)[0],
            endpoint=asked,
            listener=listener,
            file=guard.name,
        )
        folder = guard.parent if out is None else out
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / "guard-evaluation.json"
        atomic_write(record, result.model_dump_json(indent=1) + "\n")
        page = write_guard(record)
    if as_json:
        _print_json({"results": str(record), "report": str(page), **result.model_dump(mode="json")})
    else:
        _show_evaluation(result, page)


def _show_evaluation(result: GuardEvaluation, page: Path) -> None:
    from rich.markup import escape

    console = _console()
    at = f"{result.alpha:g}"
    for title, bad in (("False alarms on benign prompts", False), ("Harmful prompts found", True)):
        table = _table(
            "family", "group", "n", *result.detectors, title=f"{title}, threshold at {at}"
        )
        groups: dict[tuple[str, str], dict[str, GuardRow]] = {}
        for row in result.rows:
            if row.harmful is bad:
                groups.setdefault((row.family, row.group), {})[row.detector] = row
        for (family, group), rows in groups.items():
            cells = []
            for name in result.detectors:
                share = rows[name].flagged.get(at, rows[name].fixed)
                cells.append("" if share is None else _share(share))
            n = str(rows[result.detectors[0]].n)
            table.add_row(family, escape(group), n, *cells)
        console.print(table)
        console.print()
    for note in result.notes:
        _say(f"note: {note}")
    console.print(f"report: {escape(str(page))}", soft_wrap=True)


@guard_app.command("card")
def guard_card(
    guard: _GuardFile,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it there, not to the terminal.")
    ] = None,
) -> None:
    """Print a guard's card: what it reads, promises, was fitted on, and does not see."""
    from demur.card import guard_card as text_of
    from demur.guard import load_guard

    text = text_of(load_guard(guard))
    _print_or_write(text, out)


# demur anchor ---------------------------------------------------------------------------------

_AnchorFile = Annotated[
    Path, typer.Argument(metavar="ANCHOR", help="The .safetensors file that `anchor fit` wrote.")
]
_Suite = Annotated[
    Literal["quick", "full", "tampering"],
    typer.Option(
        help="quick: nine attacks on the text, and tampering; full: all, and searches; tampering: "
        "of weights and activations alone."
    ),
]
_Requests = Annotated[
    int, typer.Option(min=8, help="Requests of each class that every attack is tried on.")
]
_Queries = Annotated[int, typer.Option(min=8, help="Of random search, in the full suite.")]
_ResumeAttack = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Go on with an unfinished battery.")
]
_Steps = Annotated[int, typer.Option(min=1, help="Of GCG, in the full suite.")]
_NewTokens = Annotated[int, typer.Option(min=8, help="Replies are cut there.")]
_OutFolder = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Of table and page.", show_default="beside the anchor"),
]


@anchor_app.command("fit")
def anchor_fit(
    model: _ModelName = None,
    *,
    config: _Config = None,
    set_: _Set = None,
    guard: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Take this guard of the same model; else fit one."),
    ] = None,
    adapter: _Adapter = None,
    no_adapter: _NoAdapter = False,
    revision: _Revision = None,
    dtype: _Dtype = None,
    device: _Device = None,
    system: _System = None,
    thinking: _Thinking = None,
    trust_remote_code: _TrustRemoteCode = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Benign requests that the gate may open on, a share.", show_default=".05"
        ),
    ] = None,
    action: Annotated[
        Literal["floor", "canned"] | None,
        typer.Option(help="Refuse in the model's own words, or by a text.", show_default="floor"),
    ] = None,
    seed: _RunSeed = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.safetensors", help="Where to.", show_default="anchors/MODEL.safetensors"
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over an anchor that is there.")
    ] = False,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Fit an anchor: a calibrated gate, and a floor under the refusal coordinate.

    Fit, choice and calibration have disjoint prompts. Writes the anchor and its card.
    """
    from demur.config import read_config

    changes = _model_changes(
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
    given = {"guard.alpha": alpha, "anchor.action": action, "seed": seed}
    changes |= {key: value for key, value in given.items() if value is not None}
    changes |= dict(map(_setting, set_ or ()))
    settings = read_config(config, changes)
    with _listening(quiet=quiet) as listener:
        from demur.pipeline.folder import slug

        name = f"{slug(settings.model.name)}.safetensors"
        path = out if out is not None else Path("anchors") / name
        _new_file(path, "an anchor", force=force)
        with listener.stage("starting torch", 1) as advance:
            from demur.anchor import save_anchor
            from demur.guard import load_guard
            from demur.pipeline.anchor import fit

            advance(1)
        own = None if guard is None else load_guard(guard)
        found = fit(settings, listener=listener, guard=own)
        save_anchor(found, path)
    if as_json:
        _print_json({"anchor": str(path), **_anchor_summary(found)})
    else:
        _show_anchor(found, path)


def _anchor_summary(found: Anchor) -> dict[str, Any]:
    gate, about = found.gate, found.about
    assert gate is not None
    return {
        "model": about.get("model"),
        "gate": {
            "site": str(gate.detector.site),
            "reads": gate.reads,
            "threshold": asdict(gate.threshold),
            "strata": {name: asdict(one) for name, one in gate.strata.items()},
        },
        "sites": [str(one.site) for one in found.actuators],
        "strength": found.strength,
        "action": found.action,
        "replies": about.get("replies"),
        "reply_reads": about.get("reply_reads"),
        "bands": about.get("bands"),
        "strengths": about.get("strengths"),
    }


def _show_anchor(found: Anchor, path: Path) -> None:
    console, about, gate = _console(), found.about, found.gate
    assert gate is not None
    table = _table("strength", "refused", "degenerate")
    for row in about.get("strengths", ()):
        table.add_row(
            f"{row['strength']:g}" + (" (chosen)" if row["strength"] == found.strength else ""),
            f"{row['refused']:.0%}",
            f"{row['degenerate']:.0%}",
        )
    console.print(table)
    facts = _table("", "")
    facts.show_header = False
    facts.add_row("gate reads", f"{', '.join(gate.reads)} at {gate.detector.site}")
    facts.add_row(
        "opens on",
        f"at most {gate.threshold.alpha:.1%} of benign requests of each kind; with 95 % confidence "
        f"below {gate.threshold.bound:.1%} for the kind that sets it",
    )
    first, last = found.actuators[0].site, found.actuators[-1].site
    facts.add_row("holds", f"{first} to {last}, strength {found.strength:g}")
    replies = ", ".join(f"{n} {name}" for name, n in about.get("replies", {}).items())
    facts.add_row("learned from", replies)
    facts.add_row("anchor", str(path))
    facts.add_row("card", str(path.with_suffix(".json")))
    console.print()
    console.print(facts)


@anchor_app.command("evaluate")
def anchor_evaluate(
    anchor: _AnchorFile,
    *,
    suite: _Suite = "quick",
    requests: _Requests = 40,
    harmful: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Harmful requests.", show_default="packaged, held out"),
    ] = None,
    benign: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="Benign requests; repeatable.")
    ] = None,
    openings: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SPEC", help="Benign sets to count false openings on; repeatable."
        ),
    ] = None,
    no_comparators: Annotated[
        bool, typer.Option("--no-comparators", help="Compare with no defence alone.")
    ] = False,
    queries: _Queries = 256,
    steps: _Steps = 16,
    max_new_tokens: _NewTokens = 48,
    seed: _RunSeed = None,
    model: _GuardModel = None,
    adapter: _Adapter = None,
    no_adapter: _NoAdapter = False,
    dtype: _Dtype = None,
    device: _Device = None,
    out: _OutFolder = None,
    resume: _ResumeAttack = True,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Attack an anchored model, beside other defences, with prompts that nothing was fitted on.

    Writes anchor-evaluation.json and anchor-evaluation.html; no reply is kept.
    """
    with _listening(quiet=quiet) as listener:
        from demur.anchor import load_anchor

        found = load_anchor(anchor)
        changes = _model_changes(no_adapter=no_adapter, adapter=adapter, dtype=dtype, device=device)
        sets = {one["name"]: one["prompts"] for one in _named_sets(openings or (), "openings")}
        result, page = _attacked(
            _carded(found.about, model, changes),
            found,
            anchor.parent if out is None else out,
            listener,
            size=suite,
            compare=not no_comparators,
            requests=requests,
            harmful=harmful,
            benign=benign,
            openings=sets or None,
            queries=queries,
            steps=steps,
            max_new_tokens=max_new_tokens,
            seed=seed or 0,
            file=anchor.name,
            resume=resume,
        )
    _tell_attacked(result, page, as_json=as_json)


@app.command()
def attack(
    model: _ModelName = None,
    *,
    anchor: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Attack the model under this anchor, too."),
    ] = None,
    suite: _Suite = "quick",
    requests: _Requests = 40,
    harmful: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Harmful requests.", show_default="packaged, held out"),
    ] = None,
    benign: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="Benign requests; repeatable.")
    ] = None,
    queries: _Queries = 256,
    steps: _Steps = 16,
    max_new_tokens: _NewTokens = 48,
    adapter: _Adapter = None,
    no_adapter: _NoAdapter = False,
    revision: _Revision = None,
    dtype: _Dtype = None,
    device: _Device = None,
    system: _System = None,
    thinking: _Thinking = None,
    trust_remote_code: _TrustRemoteCode = None,
    seed: _RunSeed = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Of table and page.")] = Path(
        "attacks"
    ),
    resume: _ResumeAttack = True,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Attack a model: jailbreaks, prefills, encodings, tampered weights and activations.

    Tells how often harmful requests get a coherent reply, and benign ones none. Replies are judged
    and forgotten.
    """
    settings = _model_settings(
        _model_changes(
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
    with _listening(quiet=quiet) as listener:
        found = None
        if anchor is not None:
            from demur.anchor import load_anchor

            found = load_anchor(anchor)
        result, page = _attacked(
            settings,
            found,
            out,
            listener,
            size=suite,
            compare=False,
            requests=requests,
            harmful=harmful,
            benign=benign,
            openings=None,
            queries=queries,
            steps=steps,
            max_new_tokens=max_new_tokens,
            seed=seed or 0,
            file=None if anchor is None else anchor.name,
            resume=resume,
        )
    _tell_attacked(result, page, as_json=as_json)


def _attacked(
    settings: ModelSettings,
    anchor: Anchor | None,
    folder: Path,
    listener: _Bars | _Lines | _Silent,
    *,
    harmful: str | None,
    benign: list[str] | None,
    queries: int,
    steps: int,
    resume: bool,
    **how: Any,
) -> tuple[AnchorEvaluation, Path]:
    """Run a battery, and write its record and its page.

    An interrupted one leaves its verdicts in the folder, from where the same one goes on.
    """
    from demur.pipeline.battery import Budget, battery
    from demur.report import write_anchor
    from demur.store import atomic_write

    given: dict[str, Any] = {"harmful": harmful, "benign": benign}
    how |= {key: value for key, value in given.items() if value}
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / ".anchor-evaluation.part.json"
    if not resume:
        kept.unlink(missing_ok=True)
    model = _load(settings, listener)
    if model.adapter is not None:
        base = _load(settings.model_copy(update={"adapter": None}), listener)
        how |= {"base": base}
    result = battery(
        model, anchor, budget=Budget(queries, steps), listener=listener, kept=kept, **how
    )
    record = folder / "anchor-evaluation.json"
    atomic_write(record, result.model_dump_json(indent=1) + "\n")
    kept.unlink(missing_ok=True)
    return result, write_anchor(record)


def _tell_attacked(result: AnchorEvaluation, page: Path, *, as_json: bool) -> None:
    if as_json:
        record = page.with_suffix(".json")
        _print_json({"results": str(record), "report": str(page), **result.model_dump(mode="json")})
    else:
        _show_attacked(result, page)


def _show_attacked(result: AnchorEvaluation, page: Path) -> None:
    from rich.markup import escape

    console = _console()
    names = [row.defence for row in result.defences]
    for title, harmful in (
        ("Harmful requests that got a coherent reply", True),
        ("Benign requests that were refused", False),
    ):
        table = _table("threat", "attack", "n", *names, title=title)
        lines: dict[str, dict[str, BatteryRow]] = {}
        for row in result.rows:
            if row.harmful is harmful:
                lines.setdefault(row.attack, {})[row.defence] = row
        for name, rows in lines.items():
            any_row = next(iter(rows.values()))
            cells = (
                ""
                if (row := rows.get(one)) is None
                else _share(row.complied if harmful else row.refused)
                for one in names
            )
            table.add_row(any_row.threat, escape(name), str(any_row.n), *cells)
        console.print(table)
        console.print()
    table = _table(
        "defence", "attack success", "some attack", "over-refusal", "KL, benign", "reply, s (p95)"
    )
    for row in result.defences:
        table.add_row(
            row.defence,
            _share(row.success),
            _share(row.any_attack),
            _share(row.over_refusal),
            "" if row.kl is None else f"{row.kl.value:.3f}",
            "" if row.seconds is None else f"{row.seconds[0]:.2f} ({row.seconds[1]:.2f})",
        )
    console.print(table)
    for row in result.openings:
        _say(f"gate opened on {_share(row.opened)} of {row.n} benign prompts: {row.name}")
    for one in result.criteria:
        verdict = {True: "KILLED", False: "holds", None: "not tested"}[one.killed]
        _say(f"{verdict}: {one.name}? {one.found}")
    for note in result.notes:
        _say(f"note: {note}")
    console.print(f"report: {escape(str(page))}", soft_wrap=True)


@anchor_app.command("card")
def anchor_card(
    anchor: _AnchorFile,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it there, not to the terminal.")
    ] = None,
) -> None:
    """Print an anchor's card: what it holds, what it claims by threat model, and what not."""
    from demur.anchor import load_anchor
    from demur.card import anchor_card as text_of

    text = text_of(load_anchor(anchor))
    _print_or_write(text, out)


# demur harden ---------------------------------------------------------------------------------


@app.command()
def harden(
    model: _ModelName = None,
    *,
    recipe: Annotated[
        str, typer.Option(metavar="NAME", help="Packaged recipe, or a TOML file.")
    ] = "harden",
    explain: Annotated[
        bool, typer.Option("--explain", help="Print the recipe as TOML and stop.")
    ] = False,
    adapter: _Adapter = None,
    no_adapter: _NoAdapter = False,
    revision: _Revision = None,
    device: _Device = None,
    system: _System = None,
    thinking: _Thinking = None,
    trust_remote_code: _TrustRemoteCode = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Of the adapter; must be new.", show_default="hardened/MODEL"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of every draw.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with an unfinished training.")
    ] = True,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Train an adapter that refuses even while refusal is ablated, and attack it.

    Both models are attacked with directions extracted anew from their own weights. Ctrl-C keeps the
    last checkpoint.
    """
    settings = _model_settings(
        _model_changes(
            no_adapter=no_adapter,
            name=model,
            adapter=adapter,
            revision=revision,
            device=device,
            system=system,
            thinking=thinking,
            trust_remote_code=trust_remote_code,
        )
    )
    with _listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur import harden as hardening
            from demur.pipeline.folder import slug

            advance(1)
        chosen = hardening.read_recipe(recipe)
        if explain:
            _print(hardening.as_toml(chosen))
            return
        report = hardening.harden(
            _load(settings, listener),
            chosen,
            out=out if out is not None else Path("hardened") / slug(settings.name),
            seed=seed,
            progress=listener,
            resume=resume,
        )
    if as_json:
        _print_json({**asdict(report), "folder": str(report.folder)})
    else:
        _show_hardened(report)


def _show_hardened(report: HardeningReport) -> None:
    found = report.resistance
    assert found is not None  # It was measured.
    console = _console()
    table = _table("attack", "on", "refused before", "after", "change", "p")
    for row in found.attacks:
        table.add_row(
            row.attack,
            row.on,
            _share(row.before),
            _share(row.after),
            _signed_share(row.change),
            f"{row.p:.2g}",
        )
    console.print(table)
    facts = _table("", "")
    facts.show_header = False
    for when, one in (("before", found.before), ("after", found.after)):
        within = "" if one.within else " (no direction keeps within the recipe's bound of KL)"
        facts.add_row(
            f"direction {when}", f"{one.site}, position {one.position}, KL {one.kl:.2f}{within}"
        )
    facts.add_row("cosine of both", f"{found.cosine:.2f}")
    facts.add_row("KL on benign prompts", f"{found.kl}")
    facts.add_row("the same, direction ablated", f"{found.kl_ablated}")
    if found.perplexity_ratio is not None:
        facts.add_row("perplexity, times", f"{found.perplexity_ratio}")
    facts.add_row("adapter", f"{report.folder}: {report.size / 1e6:.2f} MB, {report.steps} steps")
    console.print()
    console.print(facts)


# demur em -------------------------------------------------------------------------------------


def _layers(text: str | None) -> tuple[int, ...] | None:
    """Blocks as they are written on the command line: `12,18,24`."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"`{text}` names no blocks: write 12,18,24")
    return tuple(int(part) for part in parts)


@em_app.command("audit")
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
    max_new_tokens: _NewTokens = 200,
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
    dtype: _Dtype = None,
    device: _Device = None,
    seed: _RunSeed = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Of the run.", show_default="em-audits/BASE"),
    ] = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Audit organisms of emergent misalignment against their base and their good twins.

    Margins, rates, directions, interventions, transfer, adapters; then the papers' claims. Stages
    are kept in the run folder, so the same command goes on from where it stopped.
    """
    blocks = _layers(layers)
    with _listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur.em.advice import ADVICE
            from demur.models import load
            from demur.pipeline.em import (
                EmSettings,
                adapter_of,
                audit_em,
                base_of,
                find_organisms,
            )
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
        result = audit_em(model, found, folder, settings, listener=listener)
        page = write_em(folder / "em-audit.json")
    if as_json:
        _print_json(
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

    console = _console()
    table = _table(
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
        table = _table("model", "misaligned and coherent", "coherent", "replies", "questions")
        for one in result.rates:
            table.add_row(
                escape(one.model),
                _share(one.joint) if one.joint else "",
                _share(one.coherent) if one.coherent else "",
                str(one.replies),
                str(one.questions),
            )
        console.print(table)
    console.print()
    table = _table("claim", "here", "found")
    for claim in result.claims:
        table.add_row(escape(claim.claim), claim.status, escape(claim.found))
    console.print(table)
    for note in result.notes:
        _say(f"note: {note}")
    console.print(f"report: {escape(str(page))}", soft_wrap=True)


@em_app.command("report")
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

    _print(str(write_em(run / "em-audit.json", out)))


# demur compare --------------------------------------------------------------------------------


@app.command()
def compare(
    things: Annotated[
        list[str],
        typer.Argument(
            metavar="A B...",
            help="refusal, harm or em, read on the model; folders of organisms; run folders; files "
            "with vectors (ours, repeng, steering-vectors, refusal_direction, LoRA).",
        ),
    ],
    *,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The base that all of them are of.",
            show_default="as organisms' cards say, else smollm2",
        ),
    ] = None,
    adapter: _Adapter = None,
    no_adapter: _NoAdapter = False,
    revision: _Revision = None,
    harmful: _Harmful = None,
    harmless: _Harmless = None,
    items: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            help="Questions with a bad and a good answer each; repeatable.",
            show_default="all packaged ones",
        ),
    ] = None,
    prompts: Annotated[
        int, typer.Option(min=16, help="Prompts of each class that directions are read on.")
    ] = 128,
    report_on: Annotated[
        int,
        typer.Option("--report", min=8, help="Other prompts of each class, to measure behaviour."),
    ] = 64,
    edited: Annotated[
        int, typer.Option(min=4, help="Questions that margins are asked of under edits.")
    ] = 48,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Blocks to read directions behind.",
            show_default="eight, from a quarter of the depth on",
        ),
    ] = None,
    site: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Block behind which directions are counted and taken apart.",
            show_default="where ablating refusal does most",
        ),
    ] = None,
    kl: Annotated[
        float, typer.Option(help="What every edit costs on neutral text, nats per token.")
    ] = 0.05,
    nulls: Annotated[
        int, typer.Option(min=1, help="Random directions per edit; under 19, p stays above .05.")
    ] = 20,
    paragraphs: Annotated[
        int, typer.Option(min=2, help="Of neutral text, on which that cost is taken.")
    ] = 8,
    additions: Annotated[
        bool,
        typer.Option(
            "--additions", help="Also add directions and take them away: twice the passes."
        ),
    ] = False,
    library: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="More unrelated contrasts, beside the packaged ones."),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PART",
            help="Leave out library, dimensions, behaviour, mediation or circuits; repeatable. A "
            "later run without it adds them.",
        ),
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Another model made from the base (fine-tune, quantisation, abliterated): are the "
            "directions still there, was one projected out? Repeatable.",
        ),
    ] = None,
    dtype: _Dtype = None,
    device: _Device = None,
    seed: _RunSeed = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Of the run.", show_default="comparisons/MODEL"),
    ] = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Compare directions of one model: geometry with nulls, behaviour at equal cost, circuits.

    For instance `demur compare refusal harm organisms/em-rank1`: whether emergent misalignment and
    refusal share directions, effects or parts. Stages are kept in the run folder, so that the same
    command goes on from where it stopped.
    """
    blocks = _layers(layers)
    with _listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur.em.advice import ADVICE
            from demur.models import load
            from demur.pipeline.compare import RECORD, CompareSettings, compare_run, find_things
            from demur.pipeline.em import adapter_of, base_of
            from demur.pipeline.folder import slug
            from demur.report import write_compare

            advance(1)
        found = find_things(things)
        name = model
        if name is None and found.organisms:
            name = base_of(found.organisms)
        own = adapter_of(found.organisms) or "none" if found.organisms else adapter
        settings = _model_settings(
            _model_changes(
                no_adapter=no_adapter,
                name=name,
                adapter=adapter if adapter is not None or no_adapter else own,
                revision=revision,
                dtype=dtype,
                device=device,
            )
        )
        base = _load(settings, listener)
        folder = out if out is not None else Path("comparisons") / slug(settings.name)
        plain = CompareSettings()
        asked = CompareSettings(
            harmful=harmful if harmful is not None else plain.harmful,
            harmless=harmless if harmless is not None else plain.harmless,
            items=tuple(items) if items else ADVICE,
            prompts=prompts,
            report=report_on,
            edited=edited,
            layers=blocks,
            site=site,
            kl=kl,
            nulls=nulls,
            paragraphs=paragraphs,
            additions=additions,
            library=str(library) if library is not None else None,
            skip=tuple(skip or ()),
            checkpoints=tuple(checkpoint or ()),
            seed=seed or 0,
        )
        result = compare_run(
            base,
            found,
            folder,
            asked,
            listener=listener,
            load=lambda name: load(
                name,
                revision=None,
                dtype=settings.dtype,
                device=settings.device,
                adapter=None,
            ),
        )
        page = write_compare(folder / RECORD)
    if as_json:
        _print_json(
            {
                "results": str(folder / RECORD),
                "report": str(page),
                **result.model_dump(
                    mode="json", exclude={"comparisons", "circuits", "behaviours", "objects"}
                ),
            }
        )
        return
    from rich.markup import escape

    table = _table("question", "answer", "because")
    for finding in result.findings:
        if not finding.headline:
            continue
        table.add_row(*map(escape, (finding.question, finding.answer, finding.because)))
    _console().print(table)
    for note in result.notes:
        _say(f"note: {note}")
    _console().print(f"report: {escape(str(page))}", soft_wrap=True)


# demur features -------------------------------------------------------------------------------


def _sites(texts: Sequence[str]) -> list[Site]:
    from demur.sites import Site

    return [Site.parse(text) for text in texts]


@features_app.command("train")
def features_train(
    model: _ModelName = None,
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
    adapter: _Adapter = None,
    no_adapter: _NoAdapter = False,
    revision: _Revision = None,
    dtype: _Dtype = None,
    device: _Device = None,
    seed: _RunSeed = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Of the banks.", show_default="banks/MODEL"),
    ] = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Train small sparse autoencoders on a model, with SAELens' trainer, and write its format.

    Needs the extra `sae`. A bank of 1,024 latents on 100,000 tokens is coarse: good for trying
    things out, no match for published banks of larger models. Activations are kept in the folder,
    so that a run that was stopped goes on; `cache` in it may be deleted afterwards.
    """
    with _listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur.features.training import Settings
            from demur.pipeline.banks import PROMPTS, BankSettings, default_sites, train_banks
            from demur.pipeline.folder import slug

            advance(1)
        wanted = _sites(site or ())
        settings = _model_settings(
            _model_changes(
                no_adapter=no_adapter,
                name=model,
                adapter=adapter,
                revision=revision,
                dtype=dtype,
                device=device,
            )
        )
        loaded = _load(settings, listener)
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
        _print_json({"folder": str(folder), "banks": [asdict(row) for row in rows]})
        return
    table = _table("site", "form", "FVU, held out", "L0", "dead", "dense", "seconds")
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
    _console().print(table)
    _print(str(folder))


_Banks = Annotated[
    str,
    typer.Argument(
        metavar="BANKS",
        help="A bank (SAELens folder, Gemma Scope file, sparsify or dictionary_learning folder, "
        "saelens:RELEASE/ID), a folder of banks, or a packaged name.",
    ),
]


@features_app.command("check")
def features_check(
    banks: _Banks,
    model: _ModelName = None,
    *,
    prompts: Annotated[
        int, typer.Option(min=8, help="Packaged prompts that figures are taken on.")
    ] = 64,
    adapter: _Adapter = None,
    no_adapter: _NoAdapter = False,
    revision: _Revision = None,
    dtype: _Dtype = None,
    device: _Device = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Say how well banks reconstruct a model's activations, and whether latents may be ranked.

    Exits with 1 if one may not.
    """
    with _listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur.features.formats import fits, load_banks
            from demur.features.sanity import check_bank, rankable
            from demur.prompts import load as load_prompts

            advance(1)
        loaded = load_banks(banks)
        settings = _model_settings(
            _model_changes(
                no_adapter=no_adapter,
                name=model,
                adapter=adapter,
                revision=revision,
                dtype=dtype,
                device=device,
            )
        )
        base = _load(settings, listener)
        texts = load_prompts("contrast_pairs?kind=near").take(prompts, 0).texts
        rows = []
        for bank in loaded:
            for note in fits(bank, base):
                listener.note(f"{bank.name}: {note}")
            with listener.stage(f"checking {bank.name}", len(texts)) as advance:
                rows.append(check_bank(bank, base, texts, progress=advance))
    reasons = {row.name: rankable(row) for row in rows}
    if as_json:
        _print_json([{**asdict(row), "refused": reasons[row.name]} for row in rows])
    else:
        table = _table("bank", "FVU", "L0", "dead", "dense", "CE recovered", "may be ranked")
        for row in rows:
            fvu, l0 = row.text.fvu, row.text.l0
            back = row.recovered_mean
            table.add_row(
                row.name,
                "-" if fvu is None else f"{fvu.value:.3f} [{fvu.low:.3f}, {fvu.high:.3f}]",
                "-" if l0 is None else f"{l0.value:.0f}",
                f"{row.dead_share:.0%}",
                f"{row.dense_share:.1%}",
                "-" if back is None else f"{back.value:.2f} [{back.low:.2f}, {back.high:.2f}]",
                "yes" if reasons[row.name] is None else "no",
            )
        _console().print(table)
        for row in rows:
            for note in row.notes:
                _say(f"note: {row.name}: {note}")
    for reason in reasons.values():
        if reason is not None:
            _say(f"note: {reason}")
    if any(reasons.values()):
        raise typer.Exit(NOT_FOUND)


@features_app.command("find")
def features_find(
    banks: _Banks,
    model: _ModelName = None,
    *,
    harmful: _Harmful = None,
    harmless: _Harmless = None,
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
    adapter: _Adapter = None,
    no_adapter: _NoAdapter = False,
    revision: _Revision = None,
    dtype: _Dtype = None,
    device: _Device = None,
    seed: _RunSeed = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Of the run.", show_default="features/MODEL"),
    ] = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Find latents that carry refusal, verify them, clamp them, and say what that costs.

    Candidates come from differences with FDR, cosines and attribution; each is really changed on
    other prompts, beside random latents like it. A small set is chosen there and measured on
    prompts of its own, against the dense direction, random latents, directions of the same size,
    and asking in words. Stages are kept, so that the same command goes on from where it stopped.
    """
    with _listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur.pipeline.features import RECORD, FeatureSettings, features_run
            from demur.pipeline.folder import slug
            from demur.report import write_features

            advance(1)
        plain = FeatureSettings()
        settings = _model_settings(
            _model_changes(
                no_adapter=no_adapter,
                name=model,
                adapter=adapter,
                revision=revision,
                dtype=dtype,
                device=device,
            )
        )
        base = _load(settings, listener)
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
                generated=generated,
                choices=str(choices) if choices is not None else None,
                skip=tuple(skip or ()),
                seed=seed or 0,
            ),
            listener=listener,
        )
        page = write_features(folder / RECORD)
    if as_json:
        _print_json(
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

    table = _table("question", "answer", "because")
    for finding in result.findings:
        table.add_row(*map(escape, (finding.question, finding.answer, finding.because)))
    _console().print(table)
    for note in result.notes:
        _say(f"note: {note}")
    _console().print(f"report: {escape(str(page))}", soft_wrap=True)


# demur hydra ----------------------------------------------------------------------------------


@app.command()
def hydra(
    model: _ModelName = None,
    *,
    units: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help="directions (one a block), components (heads and MLPs) or latents (of --banks); "
            "repeatable, each is an experiment of its own.",
            show_default="directions and components, and latents with --banks",
        ),
    ] = None,
    banks: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Bank, folder of banks, or a packaged name."),
    ] = None,
    harmful: _Harmful = None,
    harmless: _Harmless = None,
    discover: Annotated[
        int, typer.Option(min=8, help="Prompts of each class that choose the primary set.")
    ] = 48,
    detect: Annotated[
        int, typer.Option(min=8, help="Others of each class, that find backups.")
    ] = 48,
    test: Annotated[int, typer.Option(min=8, help="Others again, that effects are of.")] = 48,
    nulls: Annotated[
        int, typer.Option(min=19, help="Matched random ablations behind each null.")
    ] = 50,
    ablation: Annotated[
        str, typer.Option(metavar="KIND", help="mean (over harmless prompts), zero or resample.")
    ] = "mean",
    no_controls: Annotated[
        bool, typer.Option("--no-controls", help="Leave out what the verdict does not hang on.")
    ] = False,
    adapter: _Adapter = None,
    no_adapter: _NoAdapter = False,
    revision: _Revision = None,
    dtype: _Dtype = None,
    device: _Device = None,
    seed: _RunSeed = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Of the run.", show_default="hydra/MODEL"),
    ] = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Ask whether other parts stand in once what refusal hangs on is taken out, and when.

    A primary set is chosen on some prompts, its backups are found on others, and on yet others
    effects are measured: total and direct, what backups and norms give back, and whether harm
    upstream gates them. Verdicts: conditional gate, specific repair, generic repair, additive, none
    or undetermined. Without a bank it runs on directions, heads and MLPs, so on every model.
    """
    with _listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur.hydra.stages import Settings
            from demur.pipeline.folder import slug
            from demur.pipeline.hydra import RECORD, HydraSettings, hydra_run
            from demur.report import write_hydra

            advance(1)
        plain = HydraSettings()
        kinds = tuple(units) if units else plain.units + (("latents",) if banks else ())
        settings = _model_settings(
            _model_changes(
                no_adapter=no_adapter,
                name=model,
                adapter=adapter,
                revision=revision,
                dtype=dtype,
                device=device,
            )
        )
        asked = HydraSettings(
            units=kinds,
            banks=banks,
            harmful=harmful if harmful is not None else plain.harmful,
            harmless=harmless if harmless is not None else plain.harmless,
            discover=discover,
            detect=detect,
            test=test,
            experiment=Settings(
                draws=nulls,
                control_draws=min(nulls, Settings().control_draws),
                kind=cast("Any", ablation),
            ),
            controls=not no_controls,
            seed=seed or 0,
        )
        loaded = _load(settings, listener)
        folder = out if out is not None else Path("hydra") / slug(settings.name)
        result = hydra_run(loaded, folder, asked, listener=listener)
        page = write_hydra(folder / RECORD)
    if as_json:
        _print_json(
            {
                "results": str(folder / RECORD),
                "report": str(page),
                "verdicts": {one.units: one.verdict for one in result.experiments},
                "why": {one.units: one.why for one in result.experiments},
                "seconds": result.seconds,
                "notes": list(result.notes),
            }
        )
        return
    from rich.markup import escape

    table = _table("units", "verdict", "because")
    for one in result.experiments:
        table.add_row(*map(escape, (one.units, one.verdict, one.why)))
    _console().print(table)
    for note in result.notes:
        _say(f"note: {note}")
    _console().print(f"report: {escape(str(page))}", soft_wrap=True)


# demur serve ----------------------------------------------------------------------------------


@app.command()
def serve(
    model: _ModelName = None,
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
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds a request may take.")] = 300.0,
    refuse: Annotated[
        bool,
        typer.Option("--refuse", help="Refuse what the guard flags, rather than report its score."),
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
    any_model: Annotated[
        bool,
        typer.Option("--any-model", help="Take anchor, guard and directions of other models too."),
    ] = False,
    adapter: _Adapter = None,
    no_adapter: _NoAdapter = False,
    revision: _Revision = None,
    dtype: _Dtype = None,
    device: _Device = None,
    quiet: _Quiet = False,
) -> None:
    """Serve a model behind OpenAI's protocol, with its guard and anchor, and a playground at /.

    Needs the extra `serve`. The `openai` client and `curl` work unchanged; guard scores and the
    gate's state come back in a field `demur` and in headers. Bound to this machine alone; elsewhere
    it wants a key in DEMUR_API_KEY. Interrupt it once and accepted requests are finished.
    """
    with _listening(quiet=quiet) as listener:
        with listener.stage("starting torch", 1) as advance:
            from demur.anchor import load_anchor
            from demur.directions import load_direction
            from demur.guard import load_guard
            from demur.serve.app import create_app
            from demur.serve.run import serve as serve_app
            from demur.serve.run import settings_for
            from demur.serve.settings import ServeSettings

            advance(1)
        limits = settings_for(
            host,
            ServeSettings(
                batch=batch,
                queue=queue,
                max_tokens=max_tokens,
                timeout=timeout,
                opt_out=opt_out,
                on_flag="refuse" if refuse else "report",
                edits=not no_edits,
                log_prompts=log_prompts,
                runs=runs,
            ),
        )
        named = _named_directions(direction or ())
        for path in named.values():  # A wrong path should not cost the loading of a model.
            load_direction(path)
        settings = _model_settings(
            _model_changes(
                no_adapter=no_adapter,
                name=model,
                adapter=adapter,
                revision=revision,
                dtype=dtype,
                device=device,
            )
        )
        loaded = _load(settings, listener)
        own = None if any_model else loaded
        served = create_app(
            loaded,
            guard=None if guard is None else load_guard(guard, own),
            anchor=None if anchor is None else load_anchor(anchor, own),
            directions={name: load_direction(path, own)[0] for name, path in named.items()},
            settings=limits,
        )
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


# demur doctor ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Finding:
    """One line of `demur doctor`.

    Attributes:
        status: "missing" is something that every command needs, "note" something that some do.
        hint: What to do about it.
    """

    name: str
    value: str
    status: Literal["ok", "note", "missing"] = "ok"
    hint: str = ""


@app.command()
def doctor(
    out: _Out = Path("runs"),
    as_json: _Json = False,
) -> None:
    """Say what this machine has, what it lacks, and how to mend it.

    Exits with 1 if something is missing that demur cannot do without.
    """
    findings = [
        *_look_at_python(),
        *_look_at_torch(),
        *_look_at_data(),
        *_look_at_folders(out),
    ]
    if as_json:
        _print_json([asdict(one) for one in findings])
    else:
        table = _table("", "", "")
        table.show_header = False
        styles = {"ok": "green", "note": "yellow", "missing": "bold red"}
        from rich.markup import escape

        for one in findings:
            hint = f"{one.value}: {one.hint}" if one.hint else one.value
            table.add_row(f"[{styles[one.status]}]{one.status}[/]", one.name, escape(hint))
        _console().print(table)
    if any(one.status == "missing" for one in findings):
        raise typer.Exit(NOT_FOUND)


def _look_at_python() -> Iterator[_Finding]:
    import platform
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    yield _Finding(
        "python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    extras: dict[str, list[str]] = {}
    for line in requires("demur") or ():
        wanted = Requirement(line)
        extra = next((part for part in str(wanted.marker or "").split('"') if part.isalpha()), "")
        if wanted.marker is not None and not extra and not wanted.marker.evaluate():
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            found = None
        if extra:
            if found is None or not wanted.specifier.contains(found, prereleases=True):
                extras.setdefault(extra, []).append(str(wanted).partition(";")[0])
        elif found is None:
            hint = f"`pip install '{wanted.name}{wanted.specifier}'`"
            yield _Finding(wanted.name, "not installed", "missing", hint)
        elif not wanted.specifier.contains(found, prereleases=True):
            hint = f"needs {wanted.specifier}: `pip install '{wanted.name}{wanted.specifier}'`"
            yield _Finding(wanted.name, found, "missing", hint)
        else:
            yield _Finding(wanted.name, f"{found} ({wanted.specifier})")
    for extra, lacking in extras.items():
        hint = f"only if you use it: `pip install 'demur[{extra}]'`"
        yield _Finding(f"extra {extra}", f"lacks {', '.join(lacking)}", "note", hint)


def _look_at_torch() -> Iterator[_Finding]:
    try:
        import torch
    except Exception as error:
        # A library that does not fit the machine raises OSError, ImportError and more.
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield _Finding("torch", first, "missing", "install it again; `pip install torch`")
        return
    threads = f"{torch.get_num_threads()} threads, {os.cpu_count()} CPUs"
    yield _Finding("threads", threads)
    try:
        known = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        known = set()
    fast = sorted(known & {"amx_bf16", "avx512_bf16"})
    level = torch.backends.cpu.get_cpu_capability()
    what = f"bfloat16 units {', '.join(fast)}" if fast else "no bfloat16 units: float32 throughout"
    yield _Finding("cpu", f"{level}, {what}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(i)
            yield _Finding(f"cuda:{i}", f"{about.name}, {about.total_memory / 2**30:.0f} GiB")
    else:
        yield _Finding("cuda", "none; models run on the CPU")
    if torch.backends.mps.is_available():
        yield _Finding("mps", "available")


def _look_at_data() -> Iterator[_Finding]:
    from demur.models.load import EMBEDDED, cache_root, embedded_gguf, packaged_adapter

    try:
        gguf = embedded_gguf()
    except DemurError as error:
        yield _Finding(EMBEDDED, "not installed", "note", error.hint)
    else:
        ready = any((cache_root() / "models").glob(f"{gguf.stem}-*/config.json"))
        later = "converted" if ready else "not converted yet; the first use does it (30 s)"
        yield _Finding(EMBEDDED, f"{gguf.stat().st_size / 1e6:.0f} MB, {later}")
        if adapter := packaged_adapter(EMBEDDED):
            yield _Finding("refusal adapter", adapter.name)
        else:
            hint = "`demur organism train refusal` makes one; else audits run on the bare model"
            yield _Finding("refusal adapter", "not in the package", "note", hint)
    for row in _packaged_sets():
        labels = ", ".join(f"{count} {label}" for label, count in row["labels"].items())
        yield _Finding(f"prompts {row['name']}", f"{row['prompts']}: {labels}")


def _look_at_folders(out: Path) -> Iterator[_Finding]:
    import shutil

    from demur.models.load import cache_root

    places = (
        ("cache", cache_root(), "point DEMUR_CACHE at another folder", 2.0),
        ("runs", out.resolve(), "choose another place with `--out`", 0.2),
    )
    for name, folder, hint, needs in places:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(there).free / 1e9
        about = f"{folder}, {free:.0f} GB free" if free >= 10 else f"{folder}, {free:.1f} GB free"
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            yield _Finding(name, f"{there} cannot be written", "missing", hint)
        elif free < needs:
            yield _Finding(name, about, "note", f"less than {needs:g} GB: make room, or {hint}")
        else:
            yield _Finding(name, about)


def main() -> NoReturn:
    """The `demur` program."""
    code: int | str | None = FAULT
    try:
        app(prog_name="demur")
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        _say("\ninterrupted")
        code = INTERRUPTED
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader left, and the interpreter would complain while it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = PIPE_CLOSED
    sys.exit(code)


if __name__ == "__main__":
    main()

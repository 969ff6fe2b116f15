"""What the program says: data on standard output, talk on standard error, errors in two lines."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import typer

from demur.errors import DemurError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from demur.stats import Estimate


DONE, NOT_FOUND, USER_ERROR, FAULT, PIPE_CLOSED, INTERRUPTED = 0, 1, 2, 3, 141, 130
_ISSUES = "please report it with the output of `demur --debug ...` and `demur doctor`"


def say(text: str) -> None:
    """Talk to the user: plain text on standard error, whole lines at once."""
    print(readable(text), file=sys.stderr, flush=True)  # noqa: T201 (standard error is where talk goes)


def complain(fact: str, hint: str) -> None:
    """Say what is wrong, and what to do about it."""
    say(f"error: {fact}\nhint: {hint}")


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


def explain(error: Exception) -> int:
    """Say what went wrong in two lines; returns the exit code."""
    if isinstance(error, DemurError):
        complain(error.fact, error.hint)
    elif _disk_full(error):
        names = (getattr(one, "filename", None) for one in _chain(error))
        name = next((name for name in names if name), None)
        complain(
            f"the disk is full{f': {name} was not written' if name else ''}",
            "make room or choose another place; finished stages are kept, so the same command "
            "goes on from here",
        )
    elif _out_of_memory(error):
        complain(
            "there is not enough memory",
            "try `--set extraction.batch_size=8 --set test.batch_size=8`, `--dtype bfloat16` or a "
            "smaller model",
        )
    elif any(isinstance(one, RecursionError) for one in _chain(error)):
        complain(
            "a file is nested deeper than can be read",
            f"flatten it; if none of yours is nested, {_ISSUES}",
        )
    elif isinstance(error, OSError) and error.filename is not None:
        complain(f"{error.filename}: {error.strerror}", "check the path and its permissions")
    else:
        first = (str(error).strip().splitlines() or [""])[0][:300]
        complain(f"demur failed: {type(error).__name__}: {first}".rstrip(": "), _ISSUES)
        return FAULT
    return USER_ERROR


def console(*, talk: bool = False) -> Console:
    """Where rich writes; plain and never folded where nobody looks."""
    from rich.console import Console
    from rich.errors import MarkupError

    class Plain(Console):
        """Shows control characters instead of sending them; markup that is none stays text."""

        def render_str(self, text: str, **options: Any) -> Text:
            shown = readable(text)
            try:
                return super().render_str(shown, **options)
            except MarkupError:
                return super().render_str(shown, **{**options, "markup": False})

    stream = sys.stderr if talk else sys.stdout
    return Plain(
        stderr=talk,
        highlight=False,
        emoji=False,
        width=None if stream.isatty() else 500,
    )


def put(text: str = "") -> None:
    """Print data."""
    typer.echo(readable(text))


def put_or_write(text: str, out: Path | None) -> None:
    """To the terminal, or to a file if one is named."""
    if out is None:
        put(text)
        return
    from demur.store import atomic_write

    atomic_write(out, text)
    say(f"wrote {out}")


def put_json(value: Any) -> None:
    """Print one JSON object; infinities and NaN are refused."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1)
    if not _harmless(text):
        # JSON leaves some characters bare that a terminal obeys, and has another way to write them.
        text = "".join(x if x == "\n" or _harmless(x) else json.dumps(x)[1:-1] for x in text)
    typer.echo(text)


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table in plain style."""
    from rich.table import Table

    # No lines: they mean nothing to `grep` and `cut`, and the columns stand apart without.
    empty = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for name in columns:
        empty.add_column(cell(name), header_style="bold", overflow="fold")
    return empty


def readable(text: str) -> str:
    """Foreign text without control characters: a model may write what a terminal obeys."""
    if _harmless(text):
        return text
    from demur.notebook import readable as spelt

    return spelt(text)


def _harmless(text: str) -> bool:
    """Whether nothing of a text acts on a terminal; some that does not act is doubted as well."""
    return all(line.isprintable() for line in text.split("\n"))


def cell(text: str) -> str:
    """Foreign text as a cell of a table: it is neither obeyed nor read as rich's markup."""
    from rich.markup import escape

    return escape(readable(text))


def share(estimate: Estimate) -> str:
    """A share with its interval: `42% [31%, 54%]`."""
    return f"{estimate.value:.0%} [{estimate.low:.0%}, {estimate.high:.0%}]"


def signed_share(estimate: Estimate) -> str:
    """A change of a share with its interval, signed."""
    return f"{estimate.value:+.0%} [{estimate.low:+.0%}, {estimate.high:+.0%}]"


class _Notes(logging.Handler):
    """Warnings of the library as lines of talk, above a bar if one is being drawn."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        super().__init__(logging.WARNING)
        self.console, self.quiet = console, quiet

    def emit(self, record: logging.LogRecord) -> None:
        """Print it, but for what only says how far the work is if nobody wants to hear that."""
        if self.quiet and getattr(record, "progress", False):
            return
        text = f"note: {record.getMessage()}"
        self.console.print(text, markup=False, soft_wrap=True)


@contextmanager
def _warnings_as_notes(console: Console, *, quiet: bool) -> Iterator[None]:
    handler, logger = _Notes(console, quiet=quiet), logging.getLogger("demur")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def duration(seconds: float) -> str:
    """`3 min 05 s`, or `4.2 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


class Lines:
    """A listener for logs and pipes: one line for each stage that is done."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Say how long it took."""
        started = time.perf_counter()
        yield lambda _done: None
        took = duration(time.perf_counter() - started)
        say(f"{name}: {f'{total} in ' if total > 1 else ''}{took}")

    def note(self, text: str) -> None:
        """Print it."""
        say(f"note: {text}")


class Bars:
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


class Silent:
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


Listener: TypeAlias = Bars | Lines | Silent


@contextmanager
def listening(*, quiet: bool = False) -> Iterator[Listener]:
    """A listener that fits where it is read: bars, lines or nothing; warnings become notes."""
    where = console(talk=True)
    kind = Silent if quiet else Bars if where.is_terminal else Lines
    if quiet or not where.is_terminal:  # Bars of libraries, which are not imported yet.
        os.environ.setdefault("TQDM_DISABLE", "1")
    with _warnings_as_notes(where, quiet=quiet):
        yield kind(where)

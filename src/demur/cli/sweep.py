"""`demur sweep`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from demur.cli import talk
from demur.cli.options import Json, Quiet

if TYPE_CHECKING:
    from demur.sweep import Event, Plan, Sweep


_QUIET = 30.0  # Seconds after which it is told how far a long task is.


def sweep(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="TOML: models, estimators, seeds.")
    ],
    *,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes at the same time, each with a model loaded.")
    ] = 1,
    backend: Annotated[
        Literal["processes", "ray"],
        typer.Option(help="Of this machine, or of a Ray cluster (extra `ray`)."),
    ] = "processes",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Of the sweep.",
            show_default="sweeps/NAME, as the file is called",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the audits, their shards and what of them is done."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Audit several models with several estimators and seeds; write one table and a page.

    Activations are read in shards, so that a dead worker costs one of them, and figures do not
    depend on the number of workers. Ctrl-C keeps what is finished, and the same command goes on
    from there. Exits with 1 if an audit failed.
    """
    from demur.sweep.config import read_sweep

    asked = read_sweep(config)
    folder = out if out is not None else Path("sweeps") / config.stem
    with talk.listening(quiet=quiet) as listener, listener.stage("starting torch", 1) as advance:
        from demur.sweep import Plan
        from demur.sweep import sweep as run

        advance(1)
    if dry_run:
        _show_plan(Plan.of(asked, folder), folder, as_json=as_json)
        return
    started = time.perf_counter()
    if not quiet:
        _say_load(workers, asked.threads)
    with talk.listening(quiet=quiet):
        done = run(
            asked,
            folder,
            workers=workers,
            backend=backend,
            watch=_Watch(quiet=quiet),
        )
    from demur.sweep.page import write_sweep
    from demur.sweep.run import RESULTS

    page = write_sweep(folder / RESULTS)
    if done.reused and not quiet:
        talk.say("this sweep is finished; delete its folder to run it again")
    _show(done, page, as_json=as_json)
    if not quiet:
        talk.say(f"took {talk.duration(time.perf_counter() - started)}")
    if done.results.failed:
        raise typer.Exit(talk.NOT_FOUND)


def _say_load(workers: int, threads: int) -> None:
    import os

    cores = os.cpu_count() or 1
    if workers * threads > cores:
        talk.say(f"note: {workers} workers of {threads} threads share {cores} cores")
    elif 2 * workers * threads <= cores:
        talk.say(
            f"note: {workers} workers of {threads} threads leave {cores - workers * threads} of "
            f"{cores} cores idle; `--workers {cores // threads}` uses them if memory allows"
        )


class _Watch:
    """A line for each task that ends; of many within a second one, and one after a quiet while."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet, self.last = quiet, 0.0

    def __call__(self, event: Event) -> None:
        now, task = time.monotonic(), event.task
        if self.quiet or event.kind == "started":
            return
        if event.kind == "progress":
            if now - self.last < _QUIET:
                return
            what = "{stage}, {done} of {total}".format(**event.about)
        elif event.kind == "finished":
            if task.kind != "cell" and now - self.last < 1.0:
                return
            what = f"{talk.duration(event.seconds)}"
        elif event.kind == "failed":
            what = f"failed: {event.about['error']}"
        elif event.kind == "lost":
            what = f"worker {event.worker} is gone ({event.about['why']}); once more"
        else:
            what = "shards on the disk are damaged; they are read again"
        self.last = now
        left = f", about {talk.duration(event.left)} left" if event.left else ""
        talk.say(f"[{event.done}/{event.total}{left}] {task.name}: {what}")


def _show_plan(plan: Plan, folder: Path, *, as_json: bool) -> None:
    rows = plan.state()
    if as_json:
        talk.put_json({"folder": str(folder), "cells": list(rows)})
        return
    table = talk.table("model", "estimator", "seed", "shards", "read", "audit")
    for row in rows:
        bound = "" if row["prepared"] else "up to "
        table.add_row(
            talk.cell(row["model"]),
            talk.cell(row["estimator"]),
            str(row["seed"]),
            f"{bound}{row['shards']}",
            str(row["shards_done"]),
            "done" if row["done"] else "to do",
        )
    talk.console().print(table)
    done = sum(bool(row["done"]) for row in rows)
    talk.say(f"{done} of {len(rows)} audits are done in {folder}; estimators share their shards")


def _show(done: Sweep, page: Path, *, as_json: bool) -> None:
    from demur.sweep.run import RESULTS
    from demur.sweep.table import HEADINGS, cells_of, notes_of

    files = {name: str(done.folder / f"results.{name}") for name in ("json", "csv", "md")}
    if as_json:
        talk.put_json(
            {
                "folder": str(done.folder),
                "results": str(done.folder / RESULTS),
                "report": str(page),
                "reused": done.reused,
                "failed": done.results.failed,
                **done.results.model_dump(mode="json", include={"rows", "agreement"}),
            }
        )
        return
    from rich.markup import escape

    table = talk.table(*HEADINGS)
    for row in done.results.rows:
        style = "red" if row.error is not None else "" if row.usable else "yellow"
        table.add_row(*map(escape, cells_of(row)), style=style)
    talk.console().print(table)
    for note in notes_of(done.results):
        talk.console().print(escape(note), soft_wrap=True)
    for path in files.values():
        talk.console().print(f"wrote {escape(path)}", soft_wrap=True)
    talk.console().print(f"report: {escape(str(page))}", soft_wrap=True)

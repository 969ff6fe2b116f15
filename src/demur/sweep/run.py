"""The coordinator: deals out tasks, sees to it that each is done once, and writes the table."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from demur.errors import DemurError
from demur.results import sealed_json
from demur.store import Ref, atomic_write, forget_drafts, held
from demur.sweep.config import SweepConfig
from demur.sweep.plan import Cell, Group, Plan, Task
from demur.sweep.pool import News, Pool, Processes, Rays
from demur.sweep.table import (
    SweepResults,
    SweepRow,
    agreement,
    as_csv,
    as_markdown,
    cosines,
    with_cosines,
)

RESULTS = "results.json"
_ATTEMPTS = 3  # A task that has taken so many workers with it has failed.


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a sweep.

    Attributes:
        kind: "started", "progress", "finished", "failed", "lost" (the worker is gone, its task is
            done again) or "damaged" (a shard is read again).
        pid: Of the worker's process, 0 if unknown.
        seconds: That the task took.
        done: Tasks that are done, of `total`, which is an upper bound until the model's behaviour
            on all seeds is known.
        left: Seconds until the end, guessed from tasks of the same kind; None before there are any.
        about: What the worker said.
    """

    kind: str
    task: Task
    worker: int
    pid: int
    seconds: float
    done: int
    total: int
    left: float | None
    about: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep that came to its end.

    Attributes:
        folder: Where its files are.
        results: What `results.json` holds.
        reused: True if all cells were done before and nothing was computed.
    """

    folder: Path
    results: SweepResults
    reused: bool


def sweep(
    config: SweepConfig,
    out: Path,
    *,
    workers: int = 1,
    backend: Literal["processes", "ray"] = "processes",
    watch: Callable[[Event], None] = lambda _event: None,
    silent: float = 60.0,
) -> Sweep:
    """Audit every model with every estimator and seed, reading in shards, and write the table.

    What is finished is kept: the same call after an interruption goes on where it stopped. A cell
    that failed is tried again. Figures do not depend on `workers` or `backend`.

    Args:
        config: Everything that decides the numbers.
        out: Folder of the sweep, for this one alone while it runs.
        workers: Processes that work at the same time, each with a model loaded.
        backend: Where they are; under Ray on all machines of a cluster that see `out`.
        watch: Hears of every task.
        silent: Seconds after which a process without a sign of life is replaced; not for Ray,
            which has its own way to notice.

    Raises:
        StoreError: Another sweep is at work in the folder, or it cannot be written.
        MissingExtraError: Ray is asked for and not installed.
        DemurError: Workers do not start.
    """
    plan = Plan.of(config, out)
    with locked(out):
        forget_drafts(out)
        rows = _Rows(plan)
        if all(plan.row(cell) is not None for cell in plan.cells):
            return Sweep(out, rows.write(out), reused=True)

        def pool() -> Pool:
            if backend == "ray":
                return Rays(workers, out, threads=config.threads)
            return Processes(workers, out, threads=config.threads, silent=silent)

        run = _Run(plan, pool(), workers, watch, rows)
        try:
            run.go()
        finally:
            run.pool.close()
        return Sweep(out, rows.write(out), reused=False)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold a folder for one sweep; the lock goes with the process that holds it.

    Raises:
        StoreError: Another process holds it, or the folder cannot be made.
    """
    with held(out / "lock", "sweep"):
        yield


@dataclass(slots=True)
class _Rows:
    """What became of the cells."""

    plan: Plan
    failed: dict[str, Mapping[str, str]] = field(default_factory=dict)

    def write(self, out: Path) -> SweepResults:
        """Write `results.json`, `results.csv` and `results.md`."""
        rows: list[SweepRow] = []
        units: list[np.ndarray | None] = []
        for cell in self.plan.cells:
            about = {"model": cell.label, "estimator": cell.estimator, "seed": cell.seed}
            record = self.plan.row(cell)
            if record is None:
                rows.append(SweepRow.model_validate({**about, **self.failed[cell.name]}))
                units.append(None)
                continue
            rows.append(SweepRow.model_validate({**about, **record.summary}))
            tensors = self.plan.store.tensors(Ref.parse(self.plan.audit(cell).ref))
            units.append(tensors["unit"].numpy())
        pairs = cosines(rows, units)
        results = SweepResults(
            demur=version("demur"),
            config=self.plan.config.model_dump(mode="json"),
            rows=with_cosines(rows, pairs),
            agreement=agreement(rows, pairs),
            cosines=pairs,
        )
        atomic_write(out / "results.csv", as_csv(results))
        atomic_write(out / "results.md", as_markdown(results))
        atomic_write(out / RESULTS, sealed_json(results))
        return results


@dataclass(slots=True)
class _Run:
    """One run of a sweep: what waits for what, and who does it."""

    plan: Plan
    pool: Pool
    workers: int
    watch: Callable[[Event], None]
    rows: _Rows
    tasks: dict[str, Task] = field(default_factory=dict)  # By the record that they leave
    needs: dict[str, set[str]] = field(default_factory=dict)
    followers: dict[str, list[str]] = field(default_factory=dict)
    ready: dict[str, Task] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)
    cells: dict[str, list[Cell]] = field(default_factory=dict)  # Of a preparation, or an audit
    parts: dict[str, list[Task]] = field(default_factory=dict)  # Merge -> shards
    attempts: dict[str, int] = field(default_factory=dict)
    loaded: dict[int, str] = field(default_factory=dict)
    took: dict[str, list[float]] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def go(self) -> None:
        """Work until every cell is done or has failed."""
        for cell in self.plan.cells:
            if self.plan.row(cell) is None:
                task = self.plan.prepare(cell)
                self.cells.setdefault(task.ref, []).append(cell)
                if self.plan.prepared(cell) is None:
                    self._add(task, ())
        for ref in list(self.cells):
            if ref not in self.tasks:
                self._prepared(ref)
        deaths = 0
        while self.ready or self.running:
            for worker in self.pool.idle():
                if self.ready:
                    self._give(worker)
            for news in self.pool.news(1.0):
                if news.task is not None:
                    deaths = 0
                    self._hear(news, news.task)
                    continue
                deaths += 1
                if deaths > _ATTEMPTS * self.workers:
                    raise DemurError(
                        f"workers end before they are given work: {news.about['why']}",
                        f"{self.plan.store.root.parent / 'logs'} holds what they said",
                    )

    # What waits for what ------------------------------------------------------------------------

    def _add(self, task: Task, needs: Iterable[str]) -> None:
        self.tasks[task.ref] = task
        self.needs[task.ref] = {ref for ref in needs if ref not in self.done}
        for ref in self.needs[task.ref]:
            self.followers.setdefault(ref, []).append(task.ref)
        if not self.needs[task.ref]:
            self.ready[task.ref] = task

    def _prepared(self, ref: str) -> None:
        """Lay out what a finished preparation lets be known."""
        for cell in self.cells.pop(ref):
            merges = []
            for group in self.plan.groups(cell):
                merge = self.plan.merge_ref(group)
                merges.append(merge)
                if merge not in self.tasks and merge not in self.done:
                    self._group(group)
            audit = self.plan.audit(cell)
            self.cells[audit.ref] = [cell]
            self._add(audit, merges)

    def _group(self, group: Group) -> None:
        task = self.plan.merge(group)
        if self.plan.intact(task):
            self.done.add(task.ref)
            return
        shards = [self.plan.read(group, number) for number in range(group.shards)]
        for shard in shards:
            if self.plan.has(shard):
                self.done.add(shard.ref)
            else:
                self._add(shard, ())
        self.parts[task.ref] = shards
        self._add(task, [shard.ref for shard in shards])

    def _finish(self, ref: str) -> None:
        self.done.add(ref)
        for follower in self.followers.pop(ref, ()):
            self.needs[follower].discard(ref)
            if not self.needs[follower]:
                self.ready[follower] = self.tasks[follower]
        if self.tasks[ref].kind == "prepare":
            self._prepared(ref)

    def _fail(self, ref: str, error: Mapping[str, str]) -> None:
        """A task failed, and with it all that waits for it."""
        for cell in self.cells.pop(ref, ()):
            self.rows.failed[cell.name] = error
        for follower in self.followers.pop(ref, ()):
            self._fail(follower, error)

    def _again(self, merge: Task, numbers: Sequence[int]) -> None:
        """Shards turned out to be damaged: they are read again before the merge is."""
        for number in numbers:
            shard = self.parts[merge.ref][number]
            self.done.discard(shard.ref)
            self.needs[merge.ref].add(shard.ref)
            self.followers.setdefault(shard.ref, []).append(merge.ref)
            self._add(shard, ())

    # Who does it --------------------------------------------------------------------------------

    def _give(self, worker: int) -> None:
        """Give a worker a task: of the model that it has loaded, else of the least busy one."""
        busy = Counter(self.tasks[ref].label for ref in self.running)
        own = self.loaded.get(worker)
        task = min(self.ready.values(), key=lambda one: (one.label != own, busy[one.label]))
        del self.ready[task.ref]
        self.running.add(task.ref)
        self.loaded[worker] = task.label
        pid = self.pool.start(worker, task)
        self._say(News("started", worker, task, pid), task)

    def _hear(self, news: News, task: Task) -> None:
        if news.kind == "progress":
            self._say(news, task)
            return
        self.running.discard(task.ref)
        if news.kind == "finished" and (damaged := news.about.get("damaged")):
            if self._tried(task):
                self._fail(
                    task.ref,
                    {
                        "error": f"{len(damaged)} shards of {task.name} are damaged on the disk",
                        "hint": "check the disk; the same command reads them again",
                    },
                )
            else:
                self._again(task, damaged)
            self._say(replace(news, kind="damaged"), task)
        elif news.kind == "finished":
            self.took.setdefault(task.kind, []).append(news.seconds)
            self._finish(task.ref)
            self._say(news, task)
        elif news.kind == "failed":
            self._fail(task.ref, {k: str(v) for k, v in news.about.items()})
            self._say(news, task)
        else:
            self.loaded.pop(news.worker, None)
            if self._tried(task):
                logs = self.plan.store.root.parent / "logs"
                error = f"{task.name}: {_ATTEMPTS} workers ended over it ({news.about['why']})"
                self._fail(task.ref, {"error": error, "hint": f"{logs} holds what they said"})
            else:
                self.ready[task.ref] = task
            self._say(news, task)

    def _tried(self, task: Task) -> bool:
        """Count an attempt that came to nothing; whether it was the last."""
        self.attempts[task.ref] = self.attempts.get(task.ref, 0) + 1
        return self.attempts[task.ref] >= _ATTEMPTS

    def _say(self, news: News, task: Task) -> None:
        left: dict[str, int] = {}
        for ref, one in self.tasks.items():
            if ref not in self.done:
                left[one.kind] = left.get(one.kind, 0) + 1
        for ref, cells in self.cells.items():
            if self.tasks[ref].kind == "prepare":
                left["read"] = left.get("read", 0) + self.plan.most_shards(cells[0])
                left["merge"] = left.get("merge", 0) + 2
                left["cell"] = left.get("cell", 0) + len(cells)
        seconds = None
        if left and all(kind in self.took for kind in left if kind != "prepare"):
            mean = {kind: sum(took) / len(took) for kind, took in self.took.items()}
            seconds = sum(n * mean.get(kind, 0.0) for kind, n in left.items()) / self.workers
        done = sum(map(len, self.took.values()))
        self.watch(
            Event(
                news.kind,
                task,
                news.worker,
                news.pid,
                news.seconds,
                done,
                done + sum(left.values()),
                seconds,
                news.about,
            )
        )

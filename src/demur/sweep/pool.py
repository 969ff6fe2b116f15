"""Workers: plain processes on this machine, or actors under Ray."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from demur.errors import MissingExtraError
from demur.sweep.plan import Task


@dataclass(frozen=True, slots=True)
class News:
    """What a worker says.

    Attributes:
        kind: "started", "progress", "finished", "failed", or "lost": its process is gone.
        pid: Of its process, 0 if unknown.
        about: "damaged" of a merge, "error" and "hint" of a failure, "stage", "done" and "total"
            of progress, "why" of a loss.
    """

    kind: str
    worker: int
    task: Task | None
    pid: int = 0
    seconds: float = 0.0
    about: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Pool(Protocol):
    """Workers that take one task each."""

    def idle(self) -> Sequence[int]:
        """Those without a task."""
        ...

    def start(self, worker: int, task: Task) -> int:
        """Give a task to an idle worker; returns the number of its process, 0 if unknown."""
        ...

    def news(self, seconds: float) -> Sequence[News]:
        """Wait for something to be said, no longer than this."""
        ...

    def close(self) -> None:
        """End all of them; what they have not finished is not done."""
        ...


@dataclass(slots=True, eq=False)
class _Process:
    """One process in a worker's place; when it dies another one takes the place."""

    process: subprocess.Popen[str]
    heard: float
    task: Task | None = None


class Processes:
    """Workers as processes of this machine.

    A process that ends, or gives no sign of life for `silent` seconds, is replaced, and its task
    is told as lost. On a machine with several GPUs they are dealt out in turn.

    Attributes:
        out: Folder of the sweep; a worker's log is `logs/worker-N.log` in it.
    """

    def __init__(self, count: int, out: Path, *, threads: int, silent: float) -> None:
        self.out, self.threads, self.silent = out, threads, silent
        self._said: queue.Queue[tuple[int, _Process, dict[str, Any] | None]] = queue.Queue()
        self._gpus = _gpus()
        (out / "logs").mkdir(parents=True, exist_ok=True)
        self._places: list[_Process] = []
        for number in range(count):
            self._places.append(self._process(number))

    def _process(self, number: int) -> _Process:
        log = self.out / "logs" / f"worker-{number}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        # Threads that spin while they wait would take the other workers' cores.
        environment |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
        if len(self._gpus) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[number % len(self._gpus)]
        with log.open("a", encoding="utf-8") as stream:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "demur.sweep.worker",
                    str(self.out),
                    str(self.threads),
                    str(log),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                encoding="utf-8",
                env=environment,
                # Ctrl-C is for the coordinator, which ends its workers in its own time.
                start_new_session=True,
            )
        place = _Process(process, time.monotonic())
        threading.Thread(target=self._listen, args=(number, place), daemon=True).start()
        return place

    def _listen(self, number: int, place: _Process) -> None:
        assert place.process.stdout is not None
        with place.process.stdout as lines:
            for line in lines:
                try:
                    said = json.loads(line)
                except ValueError:
                    continue  # The last line of a process that was killed while it wrote.
                self._said.put((number, place, said))
        self._said.put((number, place, None))

    def idle(self) -> list[int]:
        """Those without a task."""
        return [i for i, place in enumerate(self._places) if place.task is None]

    def start(self, worker: int, task: Task) -> int:
        """Give a task to an idle worker; returns the number of its process."""
        place = self._places[worker]
        place.task = task
        assert place.process.stdin is not None
        try:
            place.process.stdin.write(json.dumps(asdict(task)) + "\n")
            place.process.stdin.flush()
        except OSError:
            pass  # It has died; `news` says so.
        return place.process.pid

    def news(self, seconds: float) -> list[News]:
        """Wait for something to be said, no longer than this."""
        found: list[News] = []
        until = time.monotonic() + seconds
        while not found and (left := until - time.monotonic()) > 0:
            try:
                number, place, said = self._said.get(timeout=min(left, 1.0))
            except queue.Empty:
                found += self._silent()
                continue
            if place is not self._places[number]:
                continue  # Of a process that was replaced.
            place.heard = time.monotonic()
            pid, task = place.process.pid, place.task
            if said is None:
                code = place.process.wait()
                why = f"signal {-code}" if code < 0 else f"exit code {code}"
                found.append(self._lost(number, why))
            elif "finished" in said or "failed" in said:
                place.task = None
                kind = "finished" if "finished" in said else "failed"
                took = said.get("seconds", 0.0)
                found.append(News(kind, number, task, pid, took, said[kind]))
            elif "stage" in said:
                found.append(News("progress", number, task, pid, 0.0, said))
            found += self._silent()
        return found

    def _silent(self) -> list[News]:
        """Processes that give no sign of life are ended."""
        found = []
        for number, place in enumerate(self._places):
            if time.monotonic() - place.heard > self.silent:
                place.process.kill()
                place.process.wait()
                found.append(self._lost(number, f"silent for {self.silent:g} s"))
        return found

    def _lost(self, number: int, why: str) -> News:
        place = self._places[number]
        _shut(place.process)
        self._places[number] = self._process(number)
        return News("lost", number, place.task, place.process.pid, 0.0, {"why": why})

    def close(self) -> None:
        """End all of them; what they have not finished is not done."""
        for place in self._places:
            place.process.terminate()
        for place in self._places:
            try:
                place.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                place.process.kill()
                place.process.wait()
            _shut(place.process)


def _shut(process: subprocess.Popen[str]) -> None:
    if process.stdin is not None:
        with suppress(OSError):  # What was still to be written has no reader.
            process.stdin.close()


def _gpus() -> list[str]:
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        return []
    return given.split(",") if given else list(map(str, range(torch.cuda.device_count())))


class _Actor:
    """A worker under Ray."""

    def __init__(self, out: str, threads: int, log: str) -> None:
        import torch

        from demur.sweep.tasks import Bench

        torch.set_num_threads(threads)
        self.log = Path(log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.bench = Bench(Path(out))

    def pid(self) -> int:
        return os.getpid()

    def run(self, plain: dict[str, Any]) -> dict[str, Any]:
        from demur.sweep.tasks import failure

        started = time.perf_counter()
        task = Task(**plain)
        with (
            self.log.open("a", encoding="utf-8") as log,
            redirect_stdout(log),
            redirect_stderr(log),
        ):
            try:
                found = {"finished": self.bench(task)}
            except Exception as error:
                import traceback

                traceback.print_exc()
                found = {"failed": failure(error, self.log)}
            taken = time.perf_counter() - started
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {task.name}: {taken:.2f} s\n")
        return {**found, "seconds": taken}


class Rays:
    """Workers as actors under Ray: of a cluster if `RAY_ADDRESS` names one, else of this machine.

    The folder of the sweep must be on a disk that all machines see. One slot more than there are
    workers is asked for: actors that fill every slot leave none for what Ray does besides, and
    nothing moves on.

    Raises:
        MissingExtraError: Ray is not installed.
    """

    def __init__(self, count: int, out: Path, *, threads: int) -> None:
        try:
            import ray  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise MissingExtraError.needed(extra="ray", module="ray") from error
        self.ray, self.out, self.threads = ray, out, threads
        (out / "logs").mkdir(parents=True, exist_ok=True)
        self._mine = not ray.is_initialized()
        if self._mine:
            here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": count + 1}
            ray.init(include_dashboard=False, log_to_driver=False, **here)
        gpus = ray.cluster_resources().get("GPU", 0.0)
        self._kind = ray.remote(num_cpus=1, num_gpus=min(1.0, gpus / count))(_Actor)
        self._actors: list[Any] = [self._actor(number) for number in range(count)]
        self._pids: dict[Any, int] = {}
        self._tasks: dict[int, tuple[Any, Task]] = {}

    def _actor(self, number: int) -> Any:
        log = self.out / "logs" / f"worker-{number}.log"
        # Where the folder of the sweep is must not hang on where an actor stands.
        return self._kind.remote(str(self.out.resolve()), self.threads, str(log.resolve()))

    def idle(self) -> list[int]:
        """Those without a task."""
        return [i for i in range(len(self._actors)) if i not in self._tasks]

    def start(self, worker: int, task: Task) -> int:
        """Give a task to an idle worker; returns the number of its process."""
        actor = self._actors[worker]
        if actor not in self._pids:
            try:
                self._pids[actor] = self.ray.get(actor.pid.remote())
            except self.ray.exceptions.RayActorError:
                self._pids[actor] = 0  # It has died; `news` says so.
        self._tasks[worker] = (actor.run.remote(asdict(task)), task)
        return self._pids[actor]

    def news(self, seconds: float) -> list[News]:
        """Wait for something to be said, no longer than this."""
        refs = {ref: worker for worker, (ref, _) in self._tasks.items()}
        done, _ = self.ray.wait(list(refs), timeout=seconds)
        found = []
        for ref in done:
            worker = refs[ref]
            _, task = self._tasks.pop(worker)
            try:
                said = self.ray.get(ref)
            except self.ray.exceptions.RayActorError as error:
                self._pids.pop(self._actors[worker], None)
                self._actors[worker] = self._actor(worker)
                why = str(error).strip().splitlines()[0][:200]
                found.append(News("lost", worker, task, about={"why": why}))
                continue
            kind = "finished" if "finished" in said else "failed"
            found.append(News(kind, worker, task, 0, said["seconds"], said[kind]))
        return found

    def close(self) -> None:
        """End all of them; what they have not finished is not done."""
        for actor in self._actors:
            self.ray.kill(actor)
        if self._mine:
            self.ray.shutdown()

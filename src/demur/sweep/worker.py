"""A worker as a process of its own, which the coordinator starts.

`python -m demur.sweep.worker FOLDER THREADS LOG`: tasks come in as lines of JSON, and what became
of them goes out so. Everything that libraries print goes to the log; a worker whose coordinator is
gone ends.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

_BEAT = 1.0  # Seconds between two signs of life.
_TOLD = 0.5  # No more often does a task say how far it is.


class _Line:
    """The way back to the coordinator, which two threads share."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.lock = stream, threading.Lock()

    def put(self, **what: Any) -> None:
        """Write one line; without a reader there is nothing left to do."""
        try:
            with self.lock:
                self.stream.write(json.dumps(what) + "\n")
                self.stream.flush()
        except OSError:
            os._exit(1)

    def beat(self) -> None:
        """Show that the process runs."""
        while True:
            self.put(beat=True)
            time.sleep(_BEAT)


def main(folder: Path, threads: int, log: Path) -> None:
    """Do tasks until there are no more."""
    # Libraries print to where standard output was: the log, as standard error is.
    line = _Line(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    threading.Thread(target=line.beat, daemon=True).start()

    import torch

    from demur.sweep.plan import Task
    from demur.sweep.tasks import Bench, failure

    torch.set_num_threads(threads)
    told = ["", 0.0]

    def tell(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done and (stage != told[0] or now - float(told[1]) > _TOLD):
            told[:] = [stage, now]
            line.put(stage=stage, done=done, total=total)

    bench = Bench(folder, tell)
    line.put(ready=os.getpid())
    for text in sys.stdin:
        task = Task(**json.loads(text))
        started = time.perf_counter()
        told[:] = ["", 0.0]
        try:
            found = bench(task)
        except Exception as error:
            import traceback

            traceback.print_exc()
            line.put(failed=failure(error, log))
        else:
            line.put(finished=found, seconds=time.perf_counter() - started)
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        taken = time.perf_counter() - started
        print(f"{stamp} {task.kind}: {task.name}: {taken:.2f} s", file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

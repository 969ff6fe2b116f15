"""The run folder: finished stages, replies, and the files that come out."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter
from torch import Tensor

from demur.causal import Replies
from demur.config import RunConfig
from demur.directions import Direction, save_direction
from demur.errors import StoreError
from demur.evals.judges import Outcome
from demur.models import Model
from demur.pipeline.splits import Splits, ValidationPrompts
from demur.results import AuditResults, Reply, read_replies, sealed_json
from demur.store import Store, atomic_write, forget_drafts, held

T = TypeVar("T")
_PATIENCE = 5.0  # Seconds to wait for another process to end.


def slug(name: str) -> str:
    """A model's name as a folder name."""
    last = Path(name).stem if name.endswith(".gguf") else name.strip("/").split("/")[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "model"


class RunFolder:
    """A run folder and the stages that are already in it.

    Attributes:
        folder: Where everything of the run is.
        seconds: How long each stage took that was computed now.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder = folder
        self.prefix = prefix
        self.store = Store(folder / "stages")
        self.seconds: dict[str, float] = {}

    def under(self, settings: Any) -> RunFolder:
        """The same folder for stages that hang on further settings; others are done anew."""
        text = json.dumps(settings, sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
        return RunFolder(self.folder, f"with-{digest}-")

    def stage(
        self, name: str, compute: Callable[[], tuple[dict[str, Any], dict[str, Tensor]]]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a stage left behind; computed and put first if it is not there yet."""
        name = self.prefix + name
        ref = self.store.key(name, {}, ())
        record = self.store.get(ref)
        if record is None:
            started = time.perf_counter()
            summary, tensors = compute()
            self.store.put(name, {}, (), summary=summary, tensors=tensors or None)
            self.seconds[name] = time.perf_counter() - started
            return summary, tensors
        summary = dict(record.summary)
        return summary, self.store.tensors(ref) if summary.get("tensors") else {}

    def rows(self, name: str, model: type[T], compute: Callable[[], Sequence[T]]) -> list[T]:
        """The same for a list of result rows."""
        adapter: TypeAdapter[list[T]] = TypeAdapter(
            list[model]  # pyright: ignore[reportInvalidTypeForm]
        )

        def run() -> tuple[dict[str, Any], dict[str, Tensor]]:
            return {"rows": adapter.dump_python(list(compute()), mode="json")}, {}

        return adapter.validate_python(self.stage(name, run)[0]["rows"])


def identity(
    config: RunConfig,
    model: Model,
    splits: Splits,
    further: ValidationPrompts,
    given: str | None = None,
) -> str:
    """A short hash of everything that decides a run's numbers; `given` is how it was read."""
    parts = {
        "config": config.model_dump(mode="json", exclude={"separation", "guard"}),
        "model": model.fingerprint,
        "prompts": [
            part.fingerprint
            for side in (splits.harmful, splits.harmless, *further)
            for part in side.values()
        ],
        "demur": metadata.version("demur"),
    }
    if given is not None:
        parts["given"] = given
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=5).hexdigest()


def _earlier(parent: Path, key: str) -> list[Path]:
    """Folders of one run's settings, newest first."""
    return sorted(parent.glob(f"*-{key}"), reverse=True)


def open_folder(out: Path, name: str, key: str, *, force: bool) -> tuple[Path, bool]:
    """The folder to work in, and whether a finished run is already there.

    Raises:
        StoreError: It cannot be made.
    """
    parent = out / slug(name)
    earlier = _earlier(parent, key)
    if earlier and not force:
        return earlier[0], (earlier[0] / "results.json").is_file()
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    if earlier:
        # The newest sorts last, also within a second and where the clock was set back.
        last = earlier[0].name.removesuffix(f"-{key}")
        stamp = max(stamp, f"{last}x")
    folder = parent / f"{stamp}-{key}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise StoreError(
            f"the run folder {folder} cannot be made: {error.strerror}",
            "choose another place with `--out`",
        ) from error
    return folder, False


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes from working on this run's settings meanwhile.

    Raises:
        StoreError: Another is at it.
    """
    key = folder.name.rpartition("-")[2]
    # A worker of a sweep that was killed notices within a second or two, and ends.
    with held(folder.with_name(f".{key}.lock"), "audit of the same settings", wait=_PATIENCE):
        yield


@contextmanager
def at_work(out: Path, name: str, key: str, *, force: bool) -> Iterator[tuple[Path, bool]]:
    """`open_folder`, for this process alone unless the run is finished.

    Raises:
        StoreError: Another process works on the same settings, or the folder cannot be made.
    """
    if not force and (earlier := _earlier(out / slug(name), key)):
        finished = (earlier[0] / "results.json").is_file()
        if finished:  # Perhaps on a disk where nothing can be written, not even a lock.
            yield earlier[0], True
            return
    with alone(out / slug(name) / f"new-{key}"):
        folder, finished = open_folder(out, name, key, force=force)
        if not finished:
            forget_drafts(folder)
        yield folder, finished


def environment(model: Model, run: RunFolder, started: datetime) -> dict[str, Any]:
    """Versions, machine and times; nothing of it decides a figure."""
    packages = ("torch", "transformers", "peft", "numpy", "scipy", "scikit-learn", "statsmodels")
    return {
        "demur": metadata.version("demur"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "packages": {name: metadata.version(name) for name in packages},
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "stage_seconds": {name: round(value, 2) for name, value in run.seconds.items()},
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


class ReplyFile:
    """`replies.jsonl`: the one place where replies to harmful prompts are kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, str], list[Reply]] = {}
        for row in read_replies(path.parent):
            self.rows.setdefault((row.arm, row.on), []).append(row)

    def get(self, name: str, on: str, prompts: Sequence[str]) -> Replies | None:
        """An arm that is whole in the file, None if it is missing."""
        rows = self.rows.get((name, on))
        if rows is None or [row.prompt for row in rows] != list(prompts):
            return None
        return Replies(
            name,
            on,
            tuple(r.response for r in rows),
            tuple(Outcome(r.outcome) for r in rows),
            tuple(r.reason for r in rows),
        )

    def put(self, replies: Replies, prompts: Sequence[str]) -> None:
        """Add an arm; the file on disk is whole before and after."""
        self.rows[(replies.name, replies.on)] = replies.rows(prompts)
        lines = [row.model_dump_json() for rows in self.rows.values() for row in rows]
        atomic_write(self.path, "\n".join(lines) + "\n")


def write_outputs(
    results: AuditResults,
    chosen: Direction,
    model: Model,
    run: RunFolder,
    started: datetime,
) -> None:
    """Write the direction, the environment and, last of all, `results.json`."""
    folder = run.folder
    figures = results.direction.model_dump(mode="json")
    save_direction(
        chosen,
        folder / "directions.safetensors",
        about={
            "model": results.model.name,
            "revision": results.model.revision,
            "adapter": results.model.adapter,
            "fingerprint": results.model.fingerprint,
            "dtype": results.model.dtype,
            "template_hash": results.model.template_hash,
            "prompts": [row.model_dump() for row in results.prompts.splits],
            "metrics": {
                "usable": results.verdict.usable,
                "auroc": figures["auroc"],
                "bootstrap_cosine": figures["bootstrap_cosine"],
            },
        },
    )
    machine = json.dumps(environment(model, run, started), indent=2)
    atomic_write(folder / "environment.json", machine + "\n")
    # Last: a folder with results.json is a finished run.
    atomic_write(folder / "results.json", sealed_json(results))

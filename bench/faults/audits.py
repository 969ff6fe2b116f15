"""`python -m bench.faults.audits --count 200`: does the memory of one process stay flat?

Audits a tiny model again and again, as a notebook or a sweep worker would: each time it is loaded
anew from its folder, asked new prompts under a new seed, and let go. Every fourth audit has its
report written; every fifth is broken off in the middle of a stage drawn by chance and taken up
again. After each one it reads resident memory, open files, threads, hooks left on the model, and
the tensors and models that are still alive. Fails (status 1) if the median memory of the last 20
audits is more than 5 % over that of audits 21 to 40, or if anything else is more than it was.

Two things below demur grow, and would hide what demur itself leaves behind; `--caches` leaves them
as they are. In bfloat16, on processors that have matrix units for it, torch's oneDNN compiles a
kernel for each new number of tokens and keeps up to 1,024 of them: 1 GB after some 1,500 shapes,
and no more (`ONEDNN_PRIMITIVE_CACHE_CAPACITY=64` halves it). And tokenizers 0.23 never frees the
cache of words of a tokenizer that is let go, up to 4 MB each.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from demur.models import Model
    from demur.progress import Progress

_TOLERANCE = 0.05
_WARM, _SPAN = 20, 20  # Allocators and lazy imports settle within the first audits.
_SETTINGS: dict[str, Any] = {
    "model.device": "cpu",
    "data.validation": [],
    "selection.finalists": 2,
    "selection.screen_prompts": 4,
    "extraction.layers": [1],
    "test.nulls": 1,
    "test.null_prompts": 8,
    "test.null_generations": 0,
    "test.max_new_tokens": 4,
    "test.strengths": [0.0, 1.0],
}


@dataclass(frozen=True)
class Reading:
    """The process after an audit; memory in MiB, and how long the audit took in seconds.

    Attributes:
        hooks: Forward hooks on the audited model, counted before it is let go.
        tensors: Alive after a garbage collection; `models` likewise.
    """

    audit: int
    seconds: float
    resident: float
    threads: int
    files: int
    hooks: int
    tensors: int
    models: int
    objects: int


class BrokenOffError(Exception):
    """What a listener throws in the middle of an audit."""


@dataclass
class Breaking:
    """A listener that breaks off at the given step of the whole audit; None: never."""

    at: int | None
    steps: int = field(default=0)

    def stage(self, name: str, total: int) -> AbstractContextManager[Progress]:
        """A stage begins; its steps are counted with all others."""
        del name, total
        return nullcontext(self._advance)

    def _advance(self, done: int) -> None:
        del done
        self.steps += 1
        if self.steps == self.at:
            raise BrokenOffError

    def note(self, text: str) -> None:
        """Notes are of no interest here."""


def _save_model(folder: Path) -> None:
    import torch
    from tests.tiny import tiny_hf, tiny_tokenizer

    tiny_hf("llama", dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer("chatml").save_pretrained(folder)


def _sentences(verb: str, n: int, rng: random.Random) -> list[str]:
    def word() -> str:
        return "".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(3))

    return [f"How do I {verb} " + " ".join(word() for _ in range(6)) + "?" for _ in range(n)]


def _hooks(model: Model) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(part, kind)) for part in model.hf.modules() for kind in kinds)


def _audited(place: Path, number: int, rng: random.Random, *, caches: bool = False) -> int:
    """One audit in a folder of its own; the hooks that it left on the model."""
    from demur.config import read_config
    from demur.pipeline import audit
    from demur.pipeline.stages import load_model
    from demur.report import write

    own = place / f"audit-{number}"
    own.mkdir()
    changes = dict(_SETTINGS)
    for side, verb in (("harmful", "break"), ("harmless", "paint")):
        (own / f"{side}.txt").write_text("\n".join(_sentences(verb, 42, rng)), encoding="utf-8")
        changes[f"data.{side}"] = str(own / f"{side}.txt")
    changes |= {"model.name": str(place / "model"), "seed": number}
    config = read_config(None, changes)
    model = load_model(config)
    if not caches and model.template is not None:
        model.template.tokenizer.backend_tokenizer.model._resize_cache(0)
    if number % 5 == 0:
        with suppress(BrokenOffError):
            listener = Breaking(rng.randrange(1, 40))
            audit(config, out=own / "runs", model=model, listener=listener)
    done = audit(config, out=own / "runs", model=model, listener=Breaking(None))
    if number % 4 == 0:
        write(done.folder)
    left = _hooks(model)
    shutil.rmtree(own)
    return left


def _reading(number: int, seconds: float, hooks: int) -> Reading:
    import torch

    from demur.models import Model

    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = dict(line.split(":", 1) for line in status)
    alive = gc.get_objects()
    kinds = [type(one) for one in alive]  # `isinstance` would wake lazy proxies.
    return Reading(
        number,
        seconds,
        int(found["VmRSS"].split()[0]) / 1024,
        int(found["Threads"]),
        len(os.listdir("/proc/self/fd")),  # noqa: PTH208 (the listing itself holds one open)
        hooks,
        sum(issubclass(kind, torch.Tensor) for kind in kinds),
        sum(issubclass(kind, (Model, torch.nn.Module)) for kind in kinds),
        len(alive),
    )


def judged(readings: list[Reading]) -> bool:
    """Print what was found; whether everything stayed where it was."""
    from scipy.stats import theilslopes

    first, last = readings[_WARM : _WARM + _SPAN], readings[-_SPAN:]
    if len(readings) < _WARM + 2 * _SPAN:
        first, last = readings[len(readings) // 3 :][:3], readings[-3:]
    kept = readings[readings.index(first[0]) :]

    def middle(rows: list[Reading], name: str) -> float:
        return statistics.median(getattr(one, name) for one in rows)

    good = True
    print(f"median of audits {first[0].audit}..{first[-1].audit} and {last[0].audit}..last")
    for name in ("resident", "threads", "files", "hooks", "tensors", "models", "objects"):
        before, after = middle(first, name), middle(last, name)
        loose = name in ("resident", "tensors", "objects")  # A bounded cache keeps directions.
        flat = after <= before * (1 + _TOLERANCE) if loose else after <= before
        good &= flat
        print(f"{name:9} {before:12.1f} {after:12.1f}  {'' if flat else 'GREW'}")
    before, after = middle(first, "resident"), middle(last, "resident")
    slope: Any = theilslopes([one.resident for one in kept], [one.audit for one in kept])
    print(
        f"resident {before:.1f} MiB -> {after:.1f} MiB ({after / before - 1:+.2%}); slope "
        f"{slope.slope:+.4f} [{slope.low_slope:+.4f}, {slope.high_slope:+.4f}] MiB an audit, "
        f"n={len(kept)}, Theil-Sen 95%"
    )
    print("pass" if good else "fail")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--caches", action="store_true", help="those of torch and tokenizers too")
    parser.add_argument("--out", type=Path, help="JSON of all readings")
    asked = parser.parse_args()
    import torch

    from demur.pipeline import stages

    torch.set_num_threads(1)
    if not asked.caches:
        stages._cpu_has_bfloat16 = lambda: False
    readings: list[Reading] = []
    rng = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as place:
        _save_model(Path(place) / "model")
        for number in range(1, asked.count + 1):
            began = time.monotonic()
            hooks = _audited(Path(place), number, rng, caches=asked.caches)
            readings.append(_reading(number, time.monotonic() - began, hooks))
            if number % 10 == 0 or number < 4:
                print(readings[-1], flush=True)
            if asked.out is not None:
                rows = [asdict(one) for one in readings]
                asked.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    sys.exit(not judged(readings))


if __name__ == "__main__":
    main()

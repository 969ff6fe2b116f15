"""Reading in shards with 1, 2 and 4 workers of `demur sweep`: `python -m bench.scale_out`.

All workers are started once and have the model loaded; of them the first 1, 2 or 4 read the same
shards, one arrangement after another, so that a slow moment hits them all. What is told beside it:
how long starting and loading take, whether a second thread changes the bits of a shard, and how
long the merge takes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from demur.activations import Moments
from demur.models import load
from demur.prompts import load as load_prompts
from demur.sites import Site
from demur.store import Ref, Store
from demur.sweep.config import sweep_config
from demur.sweep.plan import Group, Plan, Task
from demur.sweep.pool import Processes
from demur.sweep.tasks import Bench


def _group(plan: Plan, name: str, texts: list[str]) -> Group:
    """The shards of one class, as a sweep lays them out."""
    model = load(name)
    assert model.template is not None
    settings = {
        "fingerprint": model.fingerprint,
        "device": model.device.type,
        "on": "harmful",
        "sites": list(map(str, model.stream_sites)),
        "positions": [p.index for p in model.template.positions],
        "rank": plan.rank,
        "rows": plan.rows,
        "batch_size": None,
        "shard": plan.config.shard,
    }
    about = plan.cells[0].config.model.model_dump(mode="json")
    return Group("bench", settings, tuple(texts), about)


def _cpu(pids: set[int]) -> float:
    """Seconds of all cores that these processes have used; Linux alone tells."""
    ticks = 0
    for pid in pids:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        ticks += sum(map(int, text.rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _read(pool: Processes, tasks: list[Task], workers: int) -> tuple[float, float]:
    """Seconds until all tasks are done, on the wall and of the workers' cores together."""
    waiting, running = list(tasks), 0
    pids = {place.process.pid for place in pool._places}
    started, before = time.perf_counter(), _cpu(pids)
    while waiting or running:
        for worker in pool.idle():
            if worker < workers and waiting:
                pool.start(worker, waiting.pop(0))
                running += 1
        for news in pool.news(0.2):
            if news.kind in ("finished", "failed", "lost"):
                assert news.kind == "finished", news
                running -= 1
    return time.perf_counter() - started, _cpu(pids) - before


def measure(name: str, texts: list[str], shard: int, counts: list[int], repeats: int) -> Any:
    """Times of the same shards under each number of workers."""
    config = sweep_config(
        {
            "models": [name],
            "estimators": ["difference-of-means", "whitened-difference"],
            "shard": shard,
        }
    )
    found: dict[str, Any] = {
        "model": name,
        "prompts": len(texts),
        "shard": shard,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plan = Plan.of(config, folder / "one")
        group = _group(plan, name, texts)
        tasks = [plan.read(group, number) for number in range(group.shards)]
        started = time.perf_counter()
        pool = Processes(max(counts), folder / "one", threads=1, silent=600)
        wall: dict[int, list[float]] = {w: [] for w in counts}
        cpu: dict[int, list[float]] = {w: [] for w in counts}
        try:
            for _ in range(2):  # The second warms up what the first has loaded.
                _read(pool, tasks[:1] * max(counts), max(counts))
            found["start_and_load_s"] = time.perf_counter() - started
            for _ in range(repeats):
                for workers in counts:
                    for kept, one in zip((wall, cpu), _read(pool, tasks, workers), strict=True):
                        kept[workers].append(one)
        finally:
            pool.close()
        found["load_after"] = os.getloadavg()[0]
        base = wall[counts[0]]
        for workers in counts:
            ratios = [a / b for a, b in zip(base, wall[workers], strict=True)]
            found.setdefault("rows", []).append(
                {
                    "workers": workers,
                    "wall_s": median(wall[workers]),
                    "cpu_s": median(cpu[workers]),
                    "speedup": {
                        "median": median(ratios),
                        "min": min(ratios),
                        "max": max(ratios),
                    },
                }
            )
        started = time.perf_counter()
        Bench(folder / "one")(plan.merge(group))
        found["merge_s"] = time.perf_counter() - started
        first = Ref.parse(tasks[0].ref)
        one = Store(folder / "one/records").tensors(first)
        found["shard_bytes"] = sum(t.numel() * t.element_size() for t in one.values())
        # The same shard by a worker of two threads.
        pool = Processes(1, folder / "two", threads=2, silent=600)
        try:
            _read(pool, tasks[:1], 1)
        finally:
            pool.close()
        two = Store(folder / "two/records").tensors(first)
        found["two_threads_same_bits"] = all(torch.equal(one[k], two[k]) for k in one)
        gap = (one["mean"] - two["mean"]).abs().max() / one["mean"].abs().max()
        found["two_threads_largest_difference"] = float(gap)
    return found


def reduction(width: int, rows: int = 64, sites: int = 8, positions: int = 6) -> dict[str, float]:
    """What a host pays that reduces for its accelerators: seconds of one core a value read.

    Without and with a covariance sketch, which is compressed twice in three batches here.
    """
    values = torch.randn(sites, positions, rows, width)
    where = [Site(layer, "resid_post") for layer in range(sites)]
    found = {}
    torch.set_num_threads(1)
    for rank in (0, 64):
        spent = []
        for _ in range(4):  # The first warms up.
            running = Moments(tuple(where), tuple(range(-positions, 0)), rank)
            started = time.process_time()
            for _ in range(3):
                running.update(values)
            spent.append(time.process_time() - started)
        found[f"rank {rank}"] = median(spent[1:]) / 3 / values.numel()
    return found


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(prog="bench.scale_out", description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--shard", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--reduction", type=int, metavar="WIDTH", help="time this alone")
    args = parser.parse_args()
    if args.reduction:
        for name, seconds in reduction(args.reduction).items():
            print(f"{name}: {seconds * 1e9:.2f} ns a value, width {args.reduction}, one core")
        return
    texts = load_prompts("contrast_pairs").texts[: args.prompts]
    found = measure(args.model, texts, args.shard, args.workers, args.repeats)
    print(
        f"{found['prompts']} prompts in shards of {found['shard']}, {found['cores']} cores, load "
        f"{found['load_before']:.1f} before and {found['load_after']:.1f} after"
    )
    for row in found["rows"]:
        speed = row["speedup"]
        print(
            f"{row['workers']} workers: {row['wall_s']:.2f} s, {row['cpu_s']:.2f} CPU-s, "
            f"{speed['median']:.2f}x [{speed['min']:.2f}, {speed['max']:.2f}]"
        )
    bits = "the same" if found["two_threads_same_bits"] else "other"
    print(
        f"start and load of {max(args.workers)} workers {found['start_and_load_s']:.1f} s; merge "
        f"{found['merge_s']:.2f} s; {found['shard_bytes'] / 1e6:.1f} MB a shard; two threads give "
        f"{bits} bits (largest relative difference {found['two_threads_largest_difference']:.1e})"
    )
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

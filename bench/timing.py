"""Time variants of the same work, interleaved, so that a slow moment hits them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat, on the wall and of all cores together."""

    wall: list[float]
    cpu: list[float]


def interleaved(variants: Mapping[str, Work], repeats: int) -> dict[str, Timing]:
    """Run each variant once to warm up, then all of them `repeats` times, one after another."""
    found = {name: Timing([], []) for name in variants}
    for number in range(repeats + 1):
        for name, work in variants.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                found[name].wall.append(time.perf_counter() - wall)
                found[name].cpu.append(time.process_time() - cpu)
    return found


def ratios(timings: Mapping[str, Timing], ours: str) -> list[dict[str, Any]]:
    """How many times as fast as each variant ours is, repeat by repeat."""
    rows = []
    for name, timing in timings.items():
        each = [a / b for a, b in zip(timing.wall, timings[ours].wall, strict=True)]
        spent = [a / b for a, b in zip(timing.cpu, timings[ours].cpu, strict=True)]
        rows.append(
            {
                "variant": name,
                "wall_s": median(timing.wall),
                "cpu_s": median(timing.cpu),
                "speedup": {"min": min(each), "median": median(each), "max": max(each)},
                "speedup_cpu": {"min": min(spent), "median": median(spent), "max": max(spent)},
                "repeats": len(each),
            }
        )
    return rows

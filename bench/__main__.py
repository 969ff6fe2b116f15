"""`python -m bench`: all benchmarks in one run; writes bench/results.json and prints a table."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch

from bench import anchor, extraction, generation, guard, scaling, sweep
from demur.evals.judges import judges
from demur.models import load
from demur.prompts import load as load_prompts
from demur.selection import openers

PARTS = ("extraction", "sweep", "generation", "guard", "anchor", "scaling")


def _prompts(split: str, n: int) -> tuple[list[str], list[str]]:
    spec = f"contrast_pairs?kind=near&split={split}&label="
    return load_prompts(f"{spec}harmful").texts[:n], load_prompts(f"{spec}harmless").texts[:n]


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; all if none")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=256, help="for extraction")
    parser.add_argument("--sample", type=int, default=6, help="candidates the reference runs")
    parser.add_argument("--quick", action="store_true", help="no exhaustive selection to compare")
    parser.add_argument(
        "--peer",
        metavar="NAME=PYTHON",
        action="append",
        default=[],
        help="compare with heretic, transformer-lens or steering-vectors, which that python has",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.json")
    args = parser.parse_args()
    if wrong := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(wrong))}")
    parts = args.parts or PARTS

    model = load(args.model)
    fast = model.twin(torch.bfloat16)
    found: dict[str, Any] = {}
    if args.out.is_file():
        found = json.loads(args.out.read_text(encoding="utf-8"))
    found["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "model": args.model,
        "versions": {p: metadata.version(p) for p in ("demur", "torch", "transformers")},
    }
    fit, select = _prompts("fit", 128), _prompts("select", 32)
    harmful, harmless = ({"fit": a, "select": b} for a, b in zip(fit, select, strict=True))
    near = load_prompts("contrast_pairs?kind=near").texts
    if "extraction" in parts:
        texts = near[: args.prompts]
        found["extraction"] = {
            "float32": extraction.run(model, texts, args.repeats),
            "bfloat16": extraction.run(fast, texts, args.repeats),
        }
        if args.peer:
            pythons = dict(one.split("=", 1) for one in args.peer)
            found["extraction"]["peers"] = extraction.peers(model, texts, args.repeats, pythons)
        _show_extraction(found["extraction"])
    if "sweep" in parts:
        found["sweep"] = sweep.run(
            model,
            fast,
            harmful,
            harmless,
            openers(fast, [*fit[0][:40], *fit[1][:40]], judges.make("patterns"), batch_size=80),
            sample=args.sample,
            exhaustive=not args.quick,
        )
        _show_sweep(found["sweep"])
    if "generation" in parts:
        texts = [text for pair in zip(*(side[:48] for side in fit), strict=True) for text in pair]
        found["generation"] = [
            {"batch": size, **generation.run(fast, texts, args.repeats, size=size)}
            for size in (32, 96)
        ]
        for one in found["generation"]:
            _show_rows(f"generation, batches of {one['batch']}, bfloat16", one["rows"])
    if "guard" in parts:
        texts = near[: args.prompts]
        found["guard"] = [guard.run(one, texts, args.repeats) for one in (model, fast)]
        _show_guard(found["guard"])
    if "anchor" in parts:
        found["anchor"] = [
            anchor.run(one, near[:size], args.repeats) for one in (model, fast) for size in (1, 32)
        ]
        _show_anchor(found["anchor"])
    if "scaling" in parts:
        found["scaling"] = scaling.run((64, 256, 1024, 4096), tuple(scaling.SIZES))
        _show_scaling(found["scaling"])
    args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {args.out}")


def _show_guard(found: list[dict[str, Any]]) -> None:
    for one in found:
        title = f"guard, {one['dtype']}, {one['prompts']} prompts"
        _show_rows(f"{title}: scoring", one["scoring"])
        _show_rows(f"{title}: replying", one["replies"])


def _show_anchor(found: list[dict[str, Any]]) -> None:
    for one in found:
        title = f"anchor, {one['dtype']}, {one['prompts']} replies of {one['tokens']} tokens"
        _show_rows(title, one["replies"])


def _show_scaling(found: list[dict[str, Any]]) -> None:
    for row in found:
        print(
            f"{row['model']:>6} n={row['prompts']:<5} {row['seconds']:7.2f} s "
            f"{row['prompts_per_s']:7.1f} prompts/s  peak {row['peak_mib']:.0f} MiB"
        )


def _show_rows(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}: seconds, and how many times as fast the first row is")
    for row in rows:
        speed = row["speedup"]
        print(
            f"  {row['variant']:<44} {row['wall_s']:7.2f} s  {row['cpu_s']:7.2f} CPU-s  "
            f"{speed['median']:5.2f}x [{speed['min']:.2f}, {speed['max']:.2f}]"
        )


def _show_extraction(found: dict[str, Any]) -> None:
    for name in ("float32", "bfloat16"):
        one = found[name]
        title = f"extraction, {name}, {one['prompts']} prompts, {one['tokens']} tokens"
        _show_rows(f"{title}, {one['shared_prefix']} a prompt shared", one["with_prefix"])
        _show_rows(f"{title}, nothing shared", one["without_prefix"])
    if "peers" in found:
        _show_rows("extraction beside other libraries, float32", found["peers"]["rows"])
        for name, why in found["peers"]["failed"].items():
            print(f"  {name} failed: {why}")


def _show_sweep(found: dict[str, Any]) -> None:
    print(
        f"\nsweep of {found['candidates']} candidates: {found['ours_s']['wall']:.1f} s, "
        f"{found['measured_exactly']} measured exactly; bare forwards of its "
        f"{found['passes']} passes take {found['bare_forwards_of_the_same_passes_s']:.1f} s"
    )
    for name in ("float32", "bfloat16"):
        wall, cpu = found[f"speedup_{name}_wall"], found[f"speedup_{name}_cpu"]
        print(
            f"  reference in {name}: {wall['median']:.1f}x [{wall['min']:.1f}, {wall['max']:.1f}] "
            f"by the wall, {cpu['median']:.1f}x by CPU seconds"
        )
    gaps = ", ".join(
        f"{name} {found[f'largest_{name}_difference']:.1e}" for name in ("bypass", "induce", "kl")
    )
    print(f"  largest differences to the reference where both are exact: {gaps}")
    print(f"  chosen: {found['chosen']}; without a screen: {found.get('exhaustive_choice')}")


if __name__ == "__main__":
    main()

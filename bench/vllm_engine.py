"""vLLM beside in-process torch: the same numbers within bfloat16, and how many times as fast.

    python -m bench.vllm_engine --parity     activations, directions and log-probabilities, printed
    python -m bench.vllm_engine              time of replies and of reading, both in one run

`DEMUR_VLLM_PYTHON` names the interpreter that has vLLM. Prompts are near-matched pairs of the
packaged set; results go to bench/results-vllm.json. CPU seconds are those of all processes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from torch import Tensor

from demur.activations import collect, moments
from demur.directions import Direction
from demur.engines.acts import AblateOutputs, Clamp
from demur.engines.vllm import Engine, save
from demur.exports import Steering, export
from demur.interventions import Ablate, Add, applied
from demur.models import Model, load
from demur.prompts import load as load_prompts
from demur.sites import Site

POSITIONS = (-3, -2, -1)


def _sides(n: int) -> tuple[list[str], list[str]]:
    spec = "contrast_pairs?kind=near&split=fit&label="
    return load_prompts(f"{spec}harmful").texts[:n], load_prompts(f"{spec}harmless").texts[:n]


def _interleaved(n: int) -> list[str]:
    return [text for pair in zip(*_sides(n), strict=True) for text in pair][:n]


def direction_of(model: Model, site: Site) -> Direction:
    """The difference of means of the pairs, at the last token."""
    harmful, harmless = (
        moments(model, side, sites=[site], positions=(-1,), rank=0).at(site, -1).mean
        for side in _sides(64)
    )
    return Direction.from_vector(harmful - harmless, site=site, position=-1, recipe="bench")


# The same numbers -------------------------------------------------------------------------------


def _spread(values: Tensor) -> dict[str, float]:
    flat = values.flatten().double()
    return {"median": float(flat.median()), "max": float(flat.max()), "n": flat.numel()}


def activations(
    model: Model, fast: Model, engine: Engine, prompts: Sequence[str]
) -> dict[str, Any]:
    """Relative errors of single activations, layer by layer and prompt by prompt."""
    sites = [Site(layer, "resid_post") for layer in range(model.n_layers)]
    options: dict[str, Any] = {"sites": sites, "positions": POSITIONS}
    truth = collect(model, prompts, **options).values.double()
    ours = collect(fast, prompts, **options).values.double()
    # Moments of one prompt are its activations; the engine hands out nothing else.
    each = [engine.moments([one], rank=0, **options).mean for one in prompts]
    theirs = torch.stack(each, 2)

    def off(values: Tensor) -> Tensor:
        return (values - truth).norm(dim=3) / truth.norm(dim=3)

    return {
        "engine": _spread(off(theirs)),
        "in process, bfloat16": _spread(off(ours)),
        "engine against in process, bfloat16": _spread(
            (theirs - ours).norm(dim=3) / ours.norm(dim=3)
        ),
    }


def directions(model: Model, fast: Model, engine: Engine, n: int) -> dict[str, Any]:
    """Cosines of differences of means with those of float32, by site and position."""
    sites = [Site(layer, "resid_post") for layer in range(model.n_layers)]
    options: dict[str, Any] = {"sites": sites, "positions": POSITIONS, "rank": 0}
    sides = _sides(n)
    truth, ours, theirs = (
        a.mean - b.mean
        for a, b in (
            [moments(model, side, **options) for side in sides],
            [moments(fast, side, **options) for side in sides],
            [engine.moments(side, **options) for side in sides],
        )
    )

    def agree(values: Tensor) -> dict[str, float]:
        cosines = torch.nn.functional.cosine_similarity(values, truth, dim=2)
        return {"mean": float(cosines.mean()), "min": float(cosines.min()), "n": cosines.numel()}

    return {"engine": agree(theirs), "in process, bfloat16": agree(ours), "prompts": n}


def logprobs(
    model: Model, fast: Model, engine: Engine, prompts: Sequence[str], direction: Direction
) -> list[dict[str, Any]]:
    """KL from float32 in process, nats, under each kind of edit; top-1 agreement."""
    level = float((direction.norm * direction.unit.double()).norm()) / 2
    edits: dict[str, tuple[tuple[Any, ...], tuple[Any, ...], str | None]] = {
        "no edit": ((), (), None),
        "add": ((Add(direction),), (Add(direction),), None),
        "floor": (c := (Clamp(direction, level, direction.site, "at-least"),), c, None),
        "ablate outputs": (a := (AblateOutputs(direction),), a, None),
        "ablate, as LoRA": ((Ablate(direction),), (), "ablated"),
    }
    rows: list[dict[str, Any]] = []
    for name, (here, there, adapter) in edits.items():
        truth, ours = (_next(one, prompts, here) for one in (model, fast))
        theirs = engine.logprobs(prompts, acts=there, adapter=adapter)
        plain = _next(model, prompts, ())
        rows.append(
            {
                "edit": name,
                "effect_kl": _spread(_kl(truth, plain)),
                "engine": _spread(_kl(truth, theirs)),
                "in process, bfloat16": _spread(_kl(truth, ours)),
                "top1": float((theirs.argmax(1) == truth.argmax(1)).float().mean()),
                "top1 in process": float((ours.argmax(1) == truth.argmax(1)).float().mean()),
            }
        )
    return rows


def _next(model: Model, prompts: Sequence[str], acts: Sequence[Any]) -> Tensor:
    with applied(model, *acts):
        return model.logits(model.encode(prompts)).log_softmax(1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.double().exp() * (p.double() - q.double())).sum(1)


def folded(
    model: Model, folder: Path, prompts: Sequence[str], direction: Direction, **options: Any
) -> dict[str, Any]:
    """KL from hooks in float32 to the checkpoint with the ablation in its weights."""
    save(model, folder, Ablate(direction))
    truth = _next(model, prompts, (Ablate(direction),))
    with Engine(folder, **options) as engine:
        theirs = engine.logprobs(prompts)
    return {
        "engine": _spread(_kl(truth, theirs)),
        "top1": float((theirs.argmax(1) == truth.argmax(1)).float().mean()),
    }


def isolation(engine: Engine, prompts: Sequence[str], direction: Direction) -> dict[str, Any]:
    """Of a batch in which every other request is edited: replies that are those of a pure batch."""
    acts = (Add(direction),)
    each = [acts if i % 2 else () for i in range(len(prompts))]
    mixed = engine.generate(prompts, max_new_tokens=24, each=each)
    pure = [
        engine.generate(prompts, max_new_tokens=24),
        engine.generate(prompts, max_new_tokens=24, acts=acts),
    ]
    same = [one.ids == pure[i % 2][i].ids for i, one in enumerate(mixed)]
    moved = [a.ids != b.ids for a, b in zip(*pure, strict=True)]
    return {"same": sum(same), "of": len(same), "edit_changes": sum(moved)}


# How fast ---------------------------------------------------------------------------------------


Work = Callable[[Sequence[str]], int]


def _timed(work: Work, prompts: Sequence[str], engine: Engine | None) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = work(prompts)
    spent = time.process_time() - cpu + (0.0 if engine is None else engine.spent.cpu_s)
    return {"wall_s": time.perf_counter() - wall, "cpu_s": spent, "tokens": tokens}


def speed(
    fast: Model,
    engine: Engine,
    prompts: Sequence[str],
    direction: Direction,
    *,
    new: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """Tokens a second of the engine over those in process: above 1 the engine is faster."""
    sites = [Site(layer, "resid_post") for layer in range(fast.n_layers)]
    read: dict[str, Any] = {"sites": sites, "positions": POSITIONS, "rank": 0}

    def replies(*acts: Any, **options: Any) -> tuple[Work, Work]:
        def here(texts: Sequence[str]) -> int:
            with applied(fast, *acts):
                found = fast.generate(texts, max_new_tokens=new, batch_size=64)
            return sum(len(one.ids) for one in found)

        def there(texts: Sequence[str]) -> int:
            own: dict[str, Any] = options or {"acts": acts}
            return sum(len(r.ids) for r in engine.generate(texts, max_new_tokens=new, **own))

        return here, there

    def reading_here(texts: Sequence[str]) -> int:
        moments(fast, texts, **read)
        return int(fast.encode(texts).mask.sum())

    def reading_there(texts: Sequence[str]) -> int:
        engine.moments(texts, **read)
        return int(engine.encode(texts).mask.sum())

    work = {
        "replies, plain": replies(),
        "replies, adding at one block": replies(Add(direction)),
        "replies, ablating every output": replies(AblateOutputs(direction)),
        f"reading {len(sites)} sites": (reading_here, reading_there),
    }
    if engine.adapters:
        work["replies, ablating by LoRA"] = replies(Ablate(direction), adapter="ablated")
    found: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {name: [] for name in work}
    for number in range(repeats + 1):
        for name, (here, there) in work.items():
            texts = prompts if number else prompts[:4]  # A short first round warms both up.
            pair = _timed(here, texts, None), _timed(there, texts, engine)
            if number:
                found[name].append(pair)
    rows = []
    for name, pairs in found.items():
        row: dict[str, Any] = {"what": name, "repeats": len(pairs)}
        for unit in ("wall_s", "cpu_s"):
            each = [(b["tokens"] / b[unit]) / (a["tokens"] / a[unit]) for a, b in pairs]
            row[unit] = {"min": min(each), "median": median(each), "max": max(each)}
        for side, which in (("in process", 0), ("engine", 1)):
            row[side] = {
                key: median(pair[which][key] for pair in pairs)
                for key in ("wall_s", "cpu_s", "tokens")
            }
        rows.append(row)
    return rows


# Both -------------------------------------------------------------------------------------------


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(prog="bench.vllm_engine", description=__doc__)
    parser.add_argument("--parity", action="store_true", help="compare numbers, not times")
    parser.add_argument("--lora", action="store_true", help="time an engine with a LoRA loaded")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layer", type=int, default=19, help="block whose output is edited")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48, help="of each reply")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of the in-process side")
    out = Path(__file__).parent / "results-vllm.json"
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    model = load(args.model)
    fast = model.twin(torch.bfloat16)
    direction = direction_of(model, Site(args.layer, "resid_post"))
    prompts = _interleaved(args.prompts)
    found = json.loads(args.out.read_text()) if args.out.is_file() else {}
    with tempfile.TemporaryDirectory() as root:
        folder = save(model, Path(root) / "plain")
        export(model, Steering((Ablate(direction),)), Path(root) / "lora", "peft")
        options: dict[str, Any] = {"tensor_parallel": args.tensor_parallel, "max_length": 512}
        before = os.getloadavg()
        start = time.perf_counter()
        # A loaded LoRA costs requests that do not use it something, too.
        adapters = {"ablated": Path(root) / "lora"} if args.lora or args.parity else None
        with Engine(folder, adapters=adapters, **options) as engine:
            about = {
                "model": args.model,
                "cores": os.cpu_count(),
                "ranks": args.tensor_parallel,
                "threads": {"in process": torch.get_num_threads(), "engine": engine.threads},
                "start_s": time.perf_counter() - start,
                "engine": dict(engine.versions),
                "load_before": before,
            }
            engine.check()
            about["fails_closed"] = True
            key = f"parity, {args.tensor_parallel} ranks"
            if args.parity:
                found[key] = {
                    "activations": activations(model, fast, engine, prompts[:8]),
                    "directions": directions(model, fast, engine, args.prompts),
                    "logprobs": logprobs(model, fast, engine, prompts[:32], direction),
                    "isolation": isolation(engine, prompts[:32], direction),
                }
            else:
                key = f"speed, {args.tensor_parallel} ranks, {args.threads} threads in process"
                key += ", LoRA" if args.lora else ""
                rows = speed(
                    fast, engine, prompts, direction, new=args.tokens, repeats=args.repeats
                )
                found[key] = {"prompts": len(prompts), "new_tokens": args.tokens, "rows": rows}
        if args.parity:
            found[key]["folded"] = folded(
                model, Path(root) / "folded", prompts[:32], direction, **options
            )
        found[key]["about"] = about | {"load_after": os.getloadavg()}
    show(key, found[key])
    args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {args.out}")


def show(key: str, found: dict[str, Any]) -> None:
    """Print one result."""
    about = found["about"]
    low, high = about["load_before"][0], about["load_after"][0]
    print(f"\n{key}: {about['model']}, {about['cores']} cores at load {low:.1f} to {high:.1f}, ")
    print(f"threads {about['threads']}, started in {about['start_s']:.0f} s; fails closed: yes")
    if "rows" in found:
        print("tokens a second of the engine over those in process, median [min, max]")
        for row in found["rows"]:
            wall, cpu = row["wall_s"], row["cpu_s"]
            print(
                f"  {row['what']:<40} wall {wall['median']:.2f}x [{wall['min']:.2f}, "
                f"{wall['max']:.2f}]  CPU {cpu['median']:.2f}x [{cpu['min']:.2f}, "
                f"{cpu['max']:.2f}]  ({row['in process']['cpu_s']:.1f} and "
                f"{row['engine']['cpu_s']:.1f} CPU-s)"
            )
        return
    print("activations, relative error against float32 in process, median and max")
    for name, one in found["activations"].items():
        print(f"  {name:<40} {one['median']:.2e}  {one['max']:.2e}  n={one['n']}")
    print("differences of means, cosine with float32 in process, mean and min")
    for name in ("engine", "in process, bfloat16"):
        one = found["directions"][name]
        print(f"  {name:<40} {one['mean']:.5f}  {one['min']:.5f}  n={one['n']}")
    print("next token, KL from float32 in process (nats), median and max; top-1 agreement")
    for row in found["logprobs"]:
        a, b = row["engine"], row["in process, bfloat16"]
        print(
            f"  {row['edit']:<18} engine {a['median']:.1e} {a['max']:.1e} {row['top1']:.0%}   in "
            f"process {b['median']:.1e} {b['max']:.1e} {row['top1 in process']:.0%}   the edit "
            f"itself {row['effect_kl']['median']:.1e}  n={a['n']}"
        )
    one = found["folded"]["engine"]
    print(f"  {'ablate, folded':<18} engine {one['median']:.1e} {one['max']:.1e} ", end="")
    print(f"{found['folded']['top1']:.0%}")
    one = found["isolation"]
    print(f"mixed batch: {one['same']} of {one['of']} replies are those of a pure batch; the edit")
    print(f"changes {one['edit_changes']} of {one['of']}")


if __name__ == "__main__":
    main()

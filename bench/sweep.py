"""Choosing among all candidates: ours beside the published algorithm, run to the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from bench.reference import Sweep
from demur.activations import moments
from demur.directions import Direction
from demur.estimators import DifferenceOfMeans, candidates
from demur.models import Model
from demur.selection import RefusalTokens, Selection, select


def _candidates(model: Model, harmful: Sequence[str], harmless: Sequence[str]) -> list[Direction]:
    assert model.template is not None
    positions = [p.index for p in model.template.positions]
    sites = model.stream_sites[:-1]  # The published candidates are block inputs.
    sides = [
        moments(model, prompts, sites=sites, positions=positions, rank=0)
        for prompts in (harmful, harmless)
    ]
    return candidates(sides[0], sides[1], DifferenceOfMeans())


def _differences(reference: Sweep, chosen: Selection) -> dict[str, float]:
    """Largest differences of scores that both measured exactly: the choice and two more."""
    rows = [row for row in chosen.rows if row.exact and row.bypass is not None]
    rows.sort(key=lambda row: row.direction is not chosen.direction)
    gaps: dict[str, list[float]] = {"bypass": [], "induce": [], "kl": []}
    for row in rows[:3]:
        for name, theirs in zip(gaps, reference(row.direction), strict=True):
            ours = getattr(row, name)
            # The reference's 1e-8 bounds its scores to 18.4, and bends them below that.
            plain = theirs.abs() < 12
            if bool(plain.any()):
                gaps[name].append(float((ours - theirs).abs()[plain].max()))
    return {f"largest_{name}_difference": max(each, default=0.0) for name, each in gaps.items()}


class _Passes:
    """Counts the passes of models by shape, so that bare forwards of the same can be timed."""

    def __init__(self, *models: Model) -> None:
        self.counts: Counter[tuple[int, int, int, int]] = Counter()
        self.models = models

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Inside, passes are counted."""
        with ExitStack() as undo:
            for number, model in enumerate(self.models):
                plain = model._pass

                def one(
                    ids: Any, *rest: Any, number: int = number, plain: Any = plain, **more: Any
                ) -> Any:
                    blocks = self.models[number].hf.get_submodule(self.models[number]._blocks_path)
                    run = sum(type(block).__name__ != "_Skipped" for block in blocks)
                    self.counts[number, *ids.shape, run] += 1
                    return plain(ids, *rest, **more)

                model._pass = one  # pyright: ignore[reportAttributeAccessIssue]
                undo.callback(delattr, model, "_pass")
            yield

    @torch.no_grad()
    def floor(self) -> float:
        """Seconds that bare forwards of these shapes take: no head, hooks, edits or scores."""
        total = 0.0
        for (number, rows, tokens, blocks), count in self.counts.items():
            model = self.models[number]
            ids = torch.randint(1000, (rows, tokens))
            spent = []
            for _ in range(4):  # The first warms up.
                start = time.perf_counter()
                model.hf.base_model(input_ids=ids, use_cache=False)
                spent.append(time.perf_counter() - start)
            total += sorted(spent[1:])[1] * count * blocks / model.n_layers
        return total


def run(
    model: Model,
    fast: Model,
    harmful: Mapping[str, Sequence[str]],
    harmless: Mapping[str, Sequence[str]],
    tokens: RefusalTokens,
    *,
    sample: int,
    exhaustive: bool,
) -> dict[str, Any]:
    """Times of the whole selection, and of the reference on a sample of the candidates.

    The reference costs the same for each candidate, so a sample of them, spread evenly over layers
    and positions, tells what all would cost; `sample` of them run in float32 and in bfloat16. With
    `exhaustive` our own selection is run once more without a screen, to compare the choice.
    """
    pool = _candidates(model, harmful["fit"], harmless["fit"])
    step = max(1, len(pool) // sample)
    some = pool[step // 2 :: step][:sample]
    found: dict[str, Any] = {"candidates": len(pool), "sampled": len(some)}
    references = {
        name: Sweep(one, harmful["select"], harmless["select"], tokens.ids)
        for name, one in (("float32", model), ("bfloat16", fast))
    }
    for name, reference in references.items():
        reference(some[0])
        spent = []
        for direction in some:
            wall, cpu = time.perf_counter(), time.process_time()
            reference(direction)
            spent.append((time.perf_counter() - wall, time.process_time() - cpu))
        found[f"reference_{name}_s_per_candidate"] = {
            "wall": sorted(w for w, _ in spent),
            "cpu": sorted(c for _, c in spent),
        }
    search = partial(
        select,
        model,
        pool,
        harmful=harmful["select"],
        harmless=harmless["select"],
        tokens=tokens,
    )
    passes = _Passes(model, fast)
    wall, cpu = time.perf_counter(), time.process_time()
    with passes.counted():
        chosen = search(screen=fast, screen_prompts=8)
    ours = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    found |= {
        "ours_s": ours,
        "bare_forwards_of_the_same_passes_s": passes.floor(),
        "passes": sum(passes.counts.values()),
        "measured_exactly": sum(row.exact for row in chosen.rows),
        "chosen": f"{chosen.direction.site}, {chosen.direction.position}",
    }
    for name in ("float32", "bfloat16"):
        per = found[f"reference_{name}_s_per_candidate"]
        for clock in ("wall", "cpu"):
            each = [seconds * len(pool) / ours[clock] for seconds in per[clock]]
            found[f"speedup_{name}_{clock}"] = {
                "min": each[0],
                "median": each[len(each) // 2],
                "max": each[-1],
            }
    found |= _differences(references["float32"], chosen)
    if exhaustive:
        whole = search()
        found["exhaustive_choice"] = f"{whole.direction.site}, {whole.direction.position}"
        found["same_choice"] = whole.chosen == chosen.chosen
    return found

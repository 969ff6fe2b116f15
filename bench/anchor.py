"""What an anchor costs while replies are written: gate closed, and gate open, beside none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bench.timing import Work, interleaved, ratios
from demur.anchor import N_REPLY_PLACES, Anchor, Floor, Gate
from demur.guard import READS, Fisher, Guard, Rarity, Read, Threshold
from demur.models import Model
from demur.sites import Site

_TOKENS = 32


def _anchor(model: Model, threshold: float | None) -> Anchor:
    """Drawn directions at the sizes that a fit gives, which cost what fitted ones cost."""
    assert model.template is not None
    rng = torch.Generator().manual_seed(0)

    def drawn() -> torch.Tensor:
        made = torch.randn(model.d_model, generator=rng, dtype=torch.float64)
        return torch.nn.functional.normalize(made, dim=0)

    line = Rarity(torch.linspace(-1e3, 1e3, 91, dtype=torch.float64), 1.0)
    reads = tuple(Read(name, Fisher(drawn(), 0.0, 1.0), line, True) for name in READS)
    value = float("inf") if threshold is None else threshold
    limit = Threshold(value, 0.05, 20, 1, 0.1)
    guard = Guard(Site(round(0.6 * model.n_layers), "resid_pre"), reads, 16, 8, limit, {})
    first = round(0.4 * model.n_layers)
    places = torch.zeros(model.template.n_post + N_REPLY_PLACES, dtype=torch.float64)
    floors = []
    for layer in range(first, first + 8):
        axis = drawn()
        # A floor that always lifts a little, and never breaks the reply off.
        floors.append(Floor(Site(layer, "resid_pre"), axis, axis, places, places, places - 0.01))
    return Anchor(Gate(guard, limit), tuple(floors))


def run(model: Model, prompts: Sequence[str], repeats: int) -> dict[str, Any]:
    """Seconds of replies: plain, prompts in two passes, gate closed, gate open for all rows."""

    def written(anchor: Anchor | None) -> Work:
        def work() -> object:
            how: dict[str, Any] = {"max_new_tokens": _TOKENS, "batch_size": len(prompts)}
            if anchor is None:
                return model.generate(prompts, **how)
            with anchor.holding(model):
                return model.generate(prompts, **how)

        return work

    def in_two() -> object:
        with model.in_two():
            return model.generate(prompts, max_new_tokens=_TOKENS, batch_size=len(prompts))

    variants: dict[str, Work] = {
        "demur: plain": written(None),
        "demur: prompt in two passes": in_two,
        "demur: anchor, gate closed": written(_anchor(model, None)),
        "demur: anchor, gate open": written(_anchor(model, -float("inf"))),
    }
    times = interleaved(variants, repeats)
    return {
        "prompts": len(prompts),
        "tokens": _TOKENS,
        "dtype": str(model.dtype).removeprefix("torch."),
        "replies": ratios(times, "demur: plain"),
    }

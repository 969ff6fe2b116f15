"""Scoring prompts with a guard beside the prefill that a reply needs anyway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bench.extraction import bare_forward
from bench.timing import interleaved, ratios
from demur.guard import Fisher, Guard, Rarity, Read, Threshold
from demur.models import Model
from demur.sites import Site


def _guard(model: Model) -> Guard:
    """One that reads at 60 % of the depth; what it says is of no matter here."""
    rng = torch.Generator().manual_seed(0)
    fisher = Fisher(torch.randn(model.d_model, generator=rng, dtype=torch.float64), 0.0, 1.0)
    rarity = Rarity(torch.linspace(-2, 2, 91, dtype=torch.float64), 1.0)
    reads = tuple(Read(name, fisher, rarity, True) for name in ("t_inst", "span", "turns"))
    site = Site(int(0.6 * model.n_layers), "resid_pre")
    return Guard(site, reads, 16, 8, Threshold(3.0, 0.05, 100, 5, 0.1), {})


def run(model: Model, prompts: Sequence[str], repeats: int) -> dict[str, Any]:
    """Times of scoring, of the bare prefill, and of short replies with and without a guard."""
    guard = _guard(model)

    def prefill() -> None:
        rows = model.encode(prompts)
        for index in rows.passes(tokens=model.tokens_per_pass):
            model.logits(rows.rows(index))

    def watched() -> None:
        with guard.watching(model) as watch:
            model.generate(prompts, max_new_tokens=16)
        watch.scored()

    score = "guard score, up to its layer"
    scoring = {
        score: lambda: guard.score(model, prompts),
        "prefill, prefix shared, head at the last token": prefill,
        "bare forward, no head": lambda: bare_forward(model, prompts, head=False),
        "bare forward with logits": lambda: bare_forward(model, prompts, head=True),
    }
    watching = "replies of 16 tokens with the guard watching"
    replies = {
        watching: watched,
        "the same without": lambda: model.generate(prompts, max_new_tokens=16),
    }
    return {
        "prompts": len(prompts),
        "dtype": str(model.dtype),
        "scoring": ratios(interleaved(scoring, repeats), score),
        "replies": ratios(interleaved(replies, repeats), watching),
    }

"""Replies: ours beside Hugging Face's `generate`, and edited replies beside plain ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from bench.timing import interleaved, ratios
from demur.directions import Direction
from demur.interventions import Ablate, Add, applied
from demur.models import Model
from demur.sites import Site


@torch.no_grad()
def _theirs(model: Model, prompts: Sequence[str], tokens: int, size: int) -> None:
    rows = model.encode(prompts)
    settings = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=model.stop_ids,
        pad_token_id=model.pad_id,
    )
    order = torch.argsort(rows.ends, stable=True).tolist()
    for at in range(0, len(order), size):
        batch = rows.rows(order[at : at + size]).left_padded()
        model.hf.generate(
            input_ids=batch.ids.to(model.device),
            attention_mask=batch.mask.long().to(model.device),
            generation_config=settings,
        )


def run(model: Model, prompts: Sequence[str], repeats: int, *, size: int = 32) -> dict[str, Any]:
    """Times of 48-token replies."""
    rng = torch.Generator().manual_seed(0)
    way = Direction.from_vector(
        torch.randn(model.d_model, generator=rng),
        site=Site(model.n_layers // 2, "resid_pre"),
        position=-1,
        recipe="bench",
    )

    def under(*acts: Any) -> None:
        with applied(model, *acts):
            model.generate(prompts, max_new_tokens=48, batch_size=size)

    plain = f"demur, batches of {size}"
    work = {
        plain: lambda: model.generate(prompts, max_new_tokens=48, batch_size=size),
        "demur, ablating at every write": lambda: under(Ablate(way)),
        "demur, adding at one block": lambda: under(Add(way, 0.01)),
        f"Hugging Face generate, batches of {size}": lambda: _theirs(model, prompts, 48, size),
    }
    return {
        "prompts": len(prompts),
        "dtype": str(model.dtype),
        "rows": ratios(interleaved(work, repeats), plain),
    }

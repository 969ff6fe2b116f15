"""Edits on a GPU where transformers compiles decoding by itself: none is lost, none stays behind.

    python -m bench.faults.cuda_edits

With a static cache `generate` compiles the model on a GPU, and a graph that was recorded without
hooks goes on without them. Each line is a comparison with the same edit in the weights.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from tests.tiny import tiny_model, tiny_tokenizer

from demur.directions import Direction
from demur.edits import as_delta, edited
from demur.errors import DemurError
from demur.interventions import Ablate, applied
from demur.models import Model, Template
from demur.sites import Site


def made(device: str) -> Model:
    """A tiny random model that knows a chat template."""
    one, tokenizer = tiny_model("llama", dtype=torch.float32), tiny_tokenizer("chatml")
    one.hf.resize_token_embeddings(max(len(tokenizer), one.hf.config.vocab_size))
    return Model(one.hf.to(device), one.family, Template(tokenizer), name="tiny")


def logits(hf: Any, ids: torch.Tensor, **how: Any) -> torch.Tensor:
    """Of every step of a greedy reply of eight tokens."""
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    found = hf.generate(ids, return_dict_in_generate=True, **options, **how).logits
    return torch.stack(found)


def main() -> int:
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device here: nothing was tried")
    print(torch.cuda.get_device_name(), torch.__version__)
    model = made("cuda")
    rng = torch.Generator().manual_seed(0)
    vector = torch.randn(model.d_model, generator=rng)
    act = Ablate(
        Direction.from_vector(vector, site=Site(1, "resid_pre"), position=-1, recipe="drawn")
    )
    ids = model.encode(["Is it far from here to the sea?"]).ids.to("cuda")
    static = {"cache_implementation": "static"}
    weights = logits(edited(model, as_delta(model, act)).hf, ids)
    plain = logits(model.hf, ids)
    tries = {"compiled before": logits(model.hf, ids, **static)}
    with applied(model, act) as edits:
        tries["edited"] = logits(model.hf, ids, **static)
        ran = sorted(set(edits.values()))
    tries["compiled after"] = logits(model.hf, ids, **static)
    bad = 0
    for name, found in tries.items():
        wanted = weights if name == "edited" else plain
        off, apart = (
            float((found - one).abs().max()) for one in (wanted, weights + plain - wanted)
        )
        bad += off > 1e-3
        print(f"{name:16} off by {off:.1e}, from the other model {apart:.1e}")
    print("passes that were edited:", ran)
    beyond = torch.full((1, 4), len(model.hf.get_input_embeddings().weight))
    try:
        model.logits(beyond)
        bad += 1
    except DemurError as error:
        print("a token beyond the embedding:", error.fact)
    print("the device still works:", float(torch.ones(2, device="cuda").sum()) == 2.0)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())

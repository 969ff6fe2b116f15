"""Times how another library reads residuals; runs in that library's own virtual environment.

`python peer.py NAME JOB.json` prints one JSON line. Each is called as its documentation calls it,
on the same weights in float32, for the last token of every layer.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from timing import interleaved  # pyright: ignore[reportImplicitRelativeImport]

Read = Callable[[int], object]


def heretic(job: dict[str, Any]) -> Read:
    """heretic-llm: what it does before it fits a direction."""
    sys.argv = ["heretic", "--model", job["model"]]
    from heretic.config import Settings  # pyright: ignore[reportMissingImports]
    from heretic.model import Model  # pyright: ignore[reportMissingImports]
    from heretic.utils import Prompt  # pyright: ignore[reportMissingImports]

    settings = Settings(model=job["model"], dtypes=["float32"])
    model = Model(settings)
    prompts = [Prompt(system=settings.system_prompt, user=text) for text in job["prompts"]]

    def read(batch: int) -> object:
        settings.batch_size = batch
        return model.get_residuals_mean(prompts)

    return read


def transformer_lens(job: dict[str, Any]) -> Read:
    """TransformerLens: a bridge over the same model, its cache filtered to the stream."""
    from transformer_lens.model_bridge import (  # pyright: ignore[reportMissingImports]
        TransformerBridge,
    )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    bridge = TransformerBridge.boot_transformers(
        job["model"], tokenizer=tokenizer, device="cpu", dtype=torch.float32
    )

    def read(batch: int) -> object:
        total: dict[str, torch.Tensor] = {}
        for start in range(0, len(job["rendered"]), batch):
            _, cache = bridge.run_with_cache(
                job["rendered"][start : start + batch],
                names_filter=lambda name: name.endswith(("hook_resid_pre", "hook_resid_post")),
                prepend_bos=False,
            )
            for name in cache.keys():  # noqa: SIM118 - no mapping.
                own = cache[name][:, -1].double().sum(0)
                total[name] = total[name] + own if name in total else own
        return total

    return read


def steering_vectors(job: dict[str, Any]) -> Read:
    """steering-vectors: a vector of all layers from pairs of prompts."""
    from steering_vectors import train_steering_vector  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    # It needs transformers 4, which does not know the tokenizer class that transformers 5 writes.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{job['model']}/tokenizer.json", pad_token="<|im_end|>"
    )
    model = AutoModelForCausalLM.from_pretrained(job["model"], torch_dtype=torch.float32)
    half = len(job["rendered"]) // 2
    pairs = list(zip(job["rendered"][:half], job["rendered"][half:], strict=False))

    def read(batch: int) -> object:
        return train_steering_vector(
            model, tokenizer, pairs, read_token_index=-1, batch_size=max(1, batch // 2)
        )

    return read


PEERS = {
    "heretic": ("heretic-llm", heretic),
    "transformer-lens": ("transformer-lens", transformer_lens),
    "steering-vectors": ("steering-vectors", steering_vectors),
}

if __name__ == "__main__":
    package, make = PEERS[sys.argv[1]]
    job = json.loads(open(sys.argv[2], encoding="utf-8").read())  # noqa: SIM115, PTH123
    with torch.no_grad():
        read = make(job)
        work = {str(batch): partial(read, batch) for batch in (16, 32)}
        times = interleaved(work, job["repeats"])
    told = {batch: asdict(timing) for batch, timing in times.items()}
    print(json.dumps({"package": package, "version": version(package), "times": told}))

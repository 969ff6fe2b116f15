"""Time and peak memory of extraction as prompts and models grow; each run is its own process.

The peak is that of the extraction alone (Linux).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES = {"35M": (12, 384), "135M": (30, 576), "360M": (32, 960)}


def run(counts: tuple[int, ...], models: tuple[str, ...]) -> list[dict[str, Any]]:
    """Seconds and peak memory by model and number of prompts, above those of eight prompts."""
    rows = []
    for model in models:
        base = _measured(model, 8)
        for n in counts:
            found = _measured(model, n)
            rows.append(
                {
                    "model": model,
                    "prompts": n,
                    "seconds": found["seconds"],
                    "prompts_per_s": n / found["seconds"],
                    "peak_mib": found["peak_mib"],
                    "peak_above_8_prompts_mib": found["peak_mib"] - base["peak_mib"],
                }
            )
    return rows


def _measured(model: str, n: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "bench.scaling", model, str(n)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def _main(size: str, n: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from demur.activations import moments
    from demur.models import FAMILIES, Model, Template, load_tokenizer
    from demur.prompts import load

    layers, width = SIZES[size]
    tokenizer = load_tokenizer("smollm2")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=int(width * 8 / 3) // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64 // 3 or 1,
        tie_word_embeddings=True,
    )
    model = Model(LlamaForCausalLM(config).bfloat16(), FAMILIES["llama"], Template(tokenizer))
    own = load("contrast_pairs").texts
    prompts = [f"{own[i % len(own)]} {i // len(own)}" for i in range(n)]
    assert model.template is not None
    positions = [p.index for p in model.template.positions]
    # What loading took is given back or kept, but it is no longer the peak.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    start = time.perf_counter()
    moments(model, prompts, sites=model.stream_sites, positions=positions, rank=0)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_mib": _peak_mib()}))


def _peak_mib() -> float:
    """The most memory held since the peak was last cleared, MiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))

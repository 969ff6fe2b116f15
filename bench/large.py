"""Reading and replying on a random model of a large one's shape: `python -m bench.large 8B`.

Speed does not hang on what the weights are, so a machine with room for a large model but without
its files can time one. What is measured: extraction beside the bare forward, replies beside
`generate`, edited and plain; prompts and tokens a second; the most memory held on the device.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import extraction, generation
from bench.__main__ import _show_rows
from demur.activations import moments
from demur.models import FAMILIES, Model, Template, load_tokenizer
from demur.prompts import load

# Blocks, width, MLP width, heads, key-value heads: Llama 3.2 1B and 3B, Llama 3.1 8B.
SHAPES = {
    "1B": (16, 2048, 8192, 32, 8),
    "3B": (28, 3072, 8192, 24, 8),
    "8B": (32, 4096, 14336, 32, 8),
}
_VOCABULARY = 128256


def random_model(shape: str, device: str, tokenizer: str) -> Model:
    """A Llama in bfloat16 with drawn weights, which never leave the device."""
    layers, width, inner, heads, kv = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            hf = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return Model(
        hf.eval(), FAMILIES["llama"], Template(load_tokenizer(tokenizer)), name=f"random {shape}"
    )


def _throughput(model: Model, prompts: list[str]) -> dict[str, Any]:
    assert model.template is not None
    positions = [p.index for p in model.template.positions]

    def read() -> None:
        moments(model, prompts, sites=model.stream_sites, positions=positions, rank=0)

    read()
    _wait(model)
    started = time.perf_counter()
    read()
    _wait(model)
    seconds = time.perf_counter() - started
    tokens = int(model.encode(prompts).mask.sum())
    return {
        "prompts": len(prompts),
        "tokens": tokens,
        "seconds": seconds,
        "prompts_per_s": len(prompts) / seconds,
        "tokens_per_s": tokens / seconds,
    }


def _wait(model: Model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(prog="bench.large", description=__doc__)
    parser.add_argument("shape", choices=SHAPES, nargs="?", default="8B")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokenizer", default="smollm2", help="name, folder or .gguf")
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--replies", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    model = random_model(args.shape, args.device, args.tokenizer)
    own = load("contrast_pairs").texts
    prompts = [f"{own[i % len(own)]} {i // len(own)}" for i in range(args.prompts)]
    found: dict[str, Any] = {
        "shape": args.shape,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.hf.parameters()),
        "tokens_per_pass": model.tokens_per_pass,
        "reading": _throughput(model, prompts),
        "extraction": extraction.run(model, prompts[: args.prompts // 4], args.repeats),
        "generation": [
            generation.run(model, prompts[: args.replies], args.repeats, size=size)
            for size in (32, args.replies)
        ],
    }
    if args.device == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    one = found["reading"]
    print(
        f"{args.shape} on {found['device']}: {one['prompts']} prompts read at all layers and "
        f"positions in {one['seconds']:.2f} s, {one['prompts_per_s']:.0f} prompts and "
        f"{one['tokens_per_s']:.0f} tokens a second; peak {found.get('peak_gib', 0):.1f} GiB"
    )
    ours = found["extraction"]
    title = f"extraction, {ours['prompts']} prompts, {ours['tokens']} tokens"
    _show_rows(f"{title}, {ours['shared_prefix']} a prompt shared", ours["with_prefix"])
    _show_rows(f"{title}, nothing shared", ours["without_prefix"])
    for rows in found["generation"]:
        _show_rows(f"{rows['prompts']} replies of 48 tokens", rows["rows"])
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

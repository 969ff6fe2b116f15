"""Peak memory and time of ranking a bank of 65,536 latents x 2,304, as Gemma Scope's are.

    PYTHON -m bench.wide_bank [--folder FOLDER] [--tokens 4096] [--chunk 4096] [--ids 300]

Weights are random and lie in one safetensors file of 1.2 GB, which is written if it is not there
and deleted afterwards. What is printed is the peak of the whole process, torch included, as the
operating system has it (`ru_maxrss`, mapped pages counted), before and after each step.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path

import torch

from demur.features.formats import load_bank, open_bank
from demur.features.moments import Block, latent_moments

D_MODEL, WIDTH, ROWS = 2304, 65536, 64


def write(folder: Path, *, width: int, d_model: int) -> None:
    """A JumpReLU bank of SAELens's kind, written in blocks of rows so that it needs no memory."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {
        "W_dec": (width, d_model),
        "W_enc": (d_model, width),
        "b_dec": (d_model,),
        "b_enc": (width,),
        "threshold": (width,),
    }
    header, place = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = torch.Generator().manual_seed(0)
    with (folder / "sae_weights.safetensors").open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            columns = shape[1] if len(shape) == 2 else 1
            for start in range(0, shape[0], ROWS):
                rows = min(ROWS, shape[0] - start)
                values = torch.randn(rows, columns, generator=rng) / d_model**0.5
                if name == "threshold":
                    values = torch.full_like(values, 3.0)
                out.write(values.numpy().tobytes())
    config = {
        "architecture": "jumprelu",
        "d_in": d_model,
        "d_sae": width,
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": {"hook_name": "blocks.20.hook_resid_post"},
    }
    (folder / "cfg.json").write_text(json.dumps(config))


def peak() -> float:
    """The most memory that this process has ever held, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "wide-bank")
    options.add_argument("--tokens", type=int, default=4096)
    options.add_argument("--prompts", type=int, default=128)
    options.add_argument("--chunk", type=int, default=4096)
    options.add_argument("--ids", type=int, default=300)
    options.add_argument("--keep", action="store_true")
    asked = options.parse_args()
    told = {"after import": peak()}
    if not (asked.folder / "cfg.json").is_file():
        write(asked.folder, width=WIDTH, d_model=D_MODEL)
    told["after writing"] = peak()
    rng = torch.Generator().manual_seed(1)
    prompt = torch.arange(asked.tokens) % asked.prompts
    x = torch.randn(asked.tokens, D_MODEL, generator=rng)
    blocks = [Block(x, prompt)]
    harmful = torch.arange(asked.prompts) % 2 == 0
    told["with activations"] = peak()
    try:
        start = time.perf_counter()
        found = latent_moments(open_bank(asked.folder), blocks, harmful, chunk=asked.chunk)
        ranked = time.perf_counter() - start
        told["after ranking"] = peak()
        start = time.perf_counter()
        best = found.t.abs().topk(asked.ids).indices
        bank = load_bank(asked.folder, ids=best)
        loaded = time.perf_counter() - start
        told["after loading the best"] = peak()
        f = bank.encode(x[:512])
        share = float((f > 0).double().mean())
    finally:
        if not asked.keep:
            shutil.rmtree(asked.folder)
    size = 4 * WIDTH * D_MODEL * 2 / 1e9
    print(
        f"{WIDTH} latents x {D_MODEL}, {size:.2f} GB on disk; {asked.tokens} tokens of "
        f"{asked.prompts} prompts, {asked.chunk} latents at a time, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}, {sys.platform}"
    )
    print(f"ranked in {ranked:.1f} s; {len(bank)} latents loaded in {loaded:.1f} s")
    print(f"mean firing {float(found.firing.mean()):.2e}, of the loaded {share:.2e}")
    for name, value in told.items():
        print(f"peak {name}: {value:.3f} GB")


if __name__ == "__main__":
    main()

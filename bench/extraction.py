"""Reading activations: ours beside the bare forward, `output_hidden_states` and other libraries."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.reference import hidden_states
from bench.timing import Timing, interleaved, ratios
from demur.activations import moments
from demur.models import Model

OURS = "demur: moments, all layers and positions"


def _positions(model: Model) -> list[int]:
    assert model.template is not None
    return [p.index for p in model.template.positions]


def _means(model: Model, prompts: Sequence[str], rank: int = 0) -> torch.Tensor:
    return moments(
        model, prompts, sites=model.stream_sites, positions=_positions(model), rank=rank
    ).mean.float()


def bare_forward(model: Model, prompts: Sequence[str], *, head: bool) -> None:
    """One full forward of the same prompts, sorted, without padding masks or any reading."""
    rows = model.encode(prompts)
    with torch.no_grad():
        for index in rows.passes(tokens=model.tokens_per_pass):
            batch = rows.rows(index)
            run = model.hf if head else model.hf.base_model
            run(input_ids=batch.ids.to(model.device), use_cache=False)


def run(model: Model, prompts: Sequence[str], repeats: int) -> dict[str, Any]:
    """Times on one model, with what each variant reads wrong."""
    positions = _positions(model)
    bare = {
        "bare forward, no head": lambda: bare_forward(model, prompts, head=False),
        "bare forward with logits": lambda: bare_forward(model, prompts, head=True),
    }
    work = {
        OURS: lambda: _means(model, prompts),
        "demur: the same with covariance": lambda: _means(model, prompts, 64),
        **bare,
        "output_hidden_states, batches of 16": lambda: hidden_states(model, prompts, positions),
    }
    with_prefix = ratios(interleaved(work, repeats), OURS)
    ours, theirs = _means(model, prompts), hidden_states(model, prompts, positions)
    # The last entry of hidden_states is normed, the stream is not.
    theirs = theirs.float().to(ours.device)
    gap = (ours[:-1] - theirs[:-1]).norm() / theirs[:-1].norm()

    def apart() -> None:
        with model.whole_rows():
            _means(model, prompts)

    ours_apart = "demur: no shared prefix"
    without = ratios(interleaved({ours_apart: apart, **bare}, repeats), ours_apart)
    rows = model.encode(prompts)
    return {
        "prompts": len(prompts),
        "tokens": int(rows.mask.sum()),
        "shared_prefix": rows.shared,
        "dtype": str(model.dtype),
        "relative_difference_of_means": float(gap),
        "with_prefix": with_prefix,
        "without_prefix": without,
    }


def peers(
    model: Model, prompts: Sequence[str], repeats: int, pythons: Mapping[str, str]
) -> dict[str, Any]:
    """Beside other libraries, each in a virtual environment of its own and timed before ours."""
    assert model.template is not None
    tokenizer = model.template.tokenizer
    batch = model.encode(prompts)
    rendered = [
        tokenizer.decode(row[kept].tolist())
        for row, kept in zip(batch.ids, batch.mask, strict=True)
    ]
    timings: dict[str, Timing] = {}
    failed: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model.hf.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        job = Path(folder) / "job.json"
        job.write_text(
            json.dumps(
                {
                    "model": folder,
                    "prompts": list(prompts),
                    "rendered": rendered,
                    "repeats": repeats,
                }
            )
        )
        script = Path(__file__).parent / "peer.py"
        for name, python in pythons.items():
            done = subprocess.run(
                [python, str(script), name, str(job)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                failed[name] = done.stderr.strip().splitlines()[-1:]
                continue
            theirs = json.loads(done.stdout.strip().splitlines()[-1])
            timings |= {
                f"{name} {theirs['version']}, batches of {batch}": Timing(**times)
                for batch, times in theirs["times"].items()
            }
    # The same work as theirs: the last position alone, layers and embedding.
    sites = model.stream_sites
    ours = "demur: last position"
    mine = interleaved(
        {ours: lambda: moments(model, prompts, sites=sites, positions=[-1], rank=0)}, repeats
    )
    return {"rows": ratios(mine | timings, ours), "failed": failed}

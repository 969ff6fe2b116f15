"""How near each export is to the hooks, in its consumer: `python -m bench.exports DIRECTION`.

Every format is written, loaded by who reads it, and run beside `applied` on the same prompts: the
largest difference of logits over all tokens of the prompt, and the KL from the hooked model to the
exported one at the last token. Beside it stands what the edit does at all.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import demur
from demur import prompts, stats
from demur.directions import load_direction
from demur.exports import Steering, export
from demur.interventions import Ablate, Add, Intervention, applied
from demur.models import Model
from demur.models.load import DTYPES

Run = Callable[[Tensor], Tensor]


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("direction", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES))
    parser.add_argument("--set", default="contrast_pairs?kind=near&split=report")
    parser.add_argument("--prompts", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(2)
    model = demur.load(given.model, dtype=given.dtype)
    direction, _ = load_direction(given.direction)
    texts = [one.text for one in prompts.load(given.set)][: given.prompts]
    assert model.template is not None
    rows = [model.template.encode([text], pad_id=0).ids for text in texts]
    print(f"{model!r}, {len(rows)} prompts of {given.set}, {direction.site}")
    print("| format | edit | max logit difference | KL from hooks, nats | KL of the edit, nats |")
    print("| --- | --- | --- | --- | --- |")
    for kind, act in (
        ("peft", Ablate(direction)),
        ("merged", Ablate(direction)),
        ("merged", Add(direction, -1.0)),
        ("gguf", Add(direction, -1.0)),
        ("vllm-lens", Add(direction, -1.0)),
        ("steering-vectors", Add(direction, -1.0)),
    ):
        print(_line(model, act, kind, rows), flush=True)


@torch.no_grad()
def _line(model: Model, act: Intervention, kind: str, rows: list[Tensor]) -> str:
    with tempfile.TemporaryDirectory() as place, ExitStack() as undo:
        made = export(model, Steering((act,)), Path(place) / "out", kind)
        plain = [model.hf(ids).logits[0] for ids in rows]
        with applied(model, act):
            hooked = [model.hf(ids).logits[0] for ids in rows]
        run = _consumer(model, kind, made.folder, undo)
        found = [run(ids)[0] for ids in rows]
    off = max(float((a - b).abs().max()) for a, b in zip(hooked, found, strict=True))
    nats = stats.mean(np.array([_kl(a, b) for a, b in zip(hooked, found, strict=True)]))
    effect = stats.mean(np.array([_kl(a, b) for a, b in zip(plain, hooked, strict=True)]))
    name = "ablate" if isinstance(act, Ablate) else "subtract"
    shown = f"{nats.value:.1e} [{nats.low:.1e}, {nats.high:.1e}]"
    return (
        f"| {kind} | {name} | {off:.1e} | {shown} | {effect.value:.2f} [{effect.low:.2f}, "
        f"{effect.high:.2f}], n={effect.n} |"
    )


def _consumer(model: Model, kind: str, folder: Path, undo: ExitStack) -> Run:
    """Who reads a format, as a function from ids to logits."""
    if kind == "peft":
        from copy import deepcopy

        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Factors stay in float32, as PEFT keeps them.
            wrapped: Any = PeftModel.from_pretrained(deepcopy(model.hf), str(folder)).eval()
        return lambda ids: wrapped(ids).logits
    if kind == "merged":
        from transformers import AutoModelForCausalLM

        again: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
        return lambda ids: again(ids).logits
    # Engines that add at outputs of blocks; repeng, llama.cpp and vLLM do so in the stream's type.
    vectors = _vectors(kind, folder)

    def add(_module: Any, _args: Any, output: Any, *, vector: Tensor) -> Any:
        if isinstance(output, tuple):
            return (output[0] + vector.to(output[0].dtype), *output[1:])
        return output + vector.to(output.dtype)

    for layer, vector in vectors.items():
        handle = model.blocks[layer].register_forward_hook(partial(add, vector=vector))
        undo.callback(handle.remove)
    return lambda ids: model.hf(ids).logits


def _vectors(kind: str, folder: Path) -> dict[int, Tensor]:
    if kind == "gguf":
        from demur.exports.control_vector import read_control_vector

        return read_control_vector(folder / "control-vector.gguf").layers
    if kind == "steering-vectors":
        from demur.exports.steering_vectors import read_layers

        return read_layers(folder / "steering-vector.pt")[1]
    from demur.exports.vllm_lens import read_payload

    return read_payload(folder / "steering.json")


def _kl(one: Tensor, other: Tensor) -> float:
    """KL of the last token's predictions, nats."""
    p, q = (x[-1].double().log_softmax(-1) for x in (one, other))
    return float((p.exp() * (p - q)).sum())


if __name__ == "__main__":
    main()

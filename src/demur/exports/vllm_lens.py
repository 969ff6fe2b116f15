"""vllm-lens: a payload that its `SteeringVector` reads, in process or over HTTP.

Layer j is the output of block j, counted from 0: what demur adds at the input of block l is layer
l - 1. `norm_match` stays off, since it rescales what is added to the length of the stream.

Ablation is not carried: vllm-lens edits outputs of blocks, so that the MLP still reads what
attention wrote along the direction. The formats `peft` and `merged` ablate exactly under vLLM.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from demur.errors import StoreError
from demur.exports.base import Imported, Job, exporters, of_layers, summed
from demur.exports.files import by_layer
from demur.exports.steering import output_layer
from demur.interventions import Add
from demur.store import atomic_write, strict_json

FILE = "steering.json"


def read_payload(path: Path) -> dict[int, Float[Tensor, " d_model"]]:
    """What a payload adds at the output of each block, its scale included.

    Raises:
        StoreError: It is damaged, compressed, or says what an addition at every token is not.
    """
    try:
        found = strict_json(path.read_text(encoding="utf-8"))
        rows = _tensor(found["activations"])
        indices = [int(one) for one in found["layer_indices"]]
        scale = float(found.get("scale", 1.0))
        if rows.ndim != 2 or len(rows) != len(indices):
            raise ValueError(f"its shape is {tuple(rows.shape)} for {len(indices)} layers")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{path} is no payload of vllm-lens: {error}", "export it again"
        ) from error
    if found.get("norm_match") or found.get("position_indices") is not None:
        raise StoreError(
            f"{path} rescales to the stream's length, or acts at some positions alone",
            "only an addition at every token is read",
        )
    wide = rows.double() * scale
    return dict(zip(indices, wide.float().unbind(0), strict=True))


@exporters.register("vllm-lens")
@dataclass(frozen=True, slots=True)
class VllmLens:
    """A steering vector of vllm-lens as JSON."""

    carries: frozenset[type] = frozenset({Add})
    spans: bool = False
    exact: str = "exact for an addition at every token, rounded to the engine's data type"
    use: str = (
        "```python\n"
        "from vllm_lens import SteeringVector\n\n"
        f'vector = SteeringVector.model_validate_json(open("{FILE}").read())\n'
        'params = SamplingParams(extra_args={"apply_steering_vectors": [vector]})\n'
        "```\n\n"
        "See that steered and plain replies differ: an error in the plug-in's hook is logged and "
        "skipped."
    )

    def write(self, job: Job) -> Mapping[str, Any]:
        """Write the payload.

        Raises:
            FamilyError: An addition is in front of the output of block 0.
        """
        adds = [act for act in job.carried.acts if isinstance(act, Add)]
        layers = [output_layer(act.direction.site, first=0, to="vllm-lens") for act in adds]
        vectors = summed(job.carried, dict(enumerate(layers)))
        scale = 1.0
        if len(adds) == 1:  # Then the strength stays a number of its own, to be turned.
            scale = adds[0].strength
            vectors = {
                layers[0]: (adds[0].direction.unit.double() * adds[0].direction.norm).float()
            }
        rows = torch.stack(list(vectors.values()))
        payload = {
            # Uncompressed, as the plug-in's first versions wrote it; all of them read it.
            "activations": {
                "data": base64.b64encode(rows.numpy().astype("<f4").tobytes()).decode("ascii"),
                "dtype": "float32",
                "original_dtype": "torch.float32",
                "shape": list(rows.shape),
            },
            "layer_indices": list(vectors),
            "scale": scale,
            "norm_match": False,
            "position_indices": None,
        }
        atomic_write(job.folder / FILE, json.dumps(payload, allow_nan=False) + "\n")
        return {"layers": layers}

    def fits(self, path: Path) -> bool:
        """Whether it is JSON with the plug-in's keys."""
        if not path.is_file() or path.suffix != ".json" or path.stat().st_size > 1 << 26:
            return False
        try:
            found = strict_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(found, dict) and {"activations", "layer_indices"} <= set(found)

    def read(self, path: Path, about: Mapping[str, Any]) -> Imported:
        """Read the payload; errors are those of `read_payload`."""
        file = path / FILE if path.is_dir() else path
        layers, _ = by_layer(file, read_payload(file))
        return of_layers(
            layers,
            about,
            kind="vllm-lens",
            recipe="steering vector of vllm-lens",
            notes=() if about else ("layer j is the output of block j, counted from 0",),
        )


def _tensor(packed: Mapping[str, Any]) -> Tensor:
    if packed.get("compression"):
        raise ValueError(
            f"its numbers are compressed with {packed['compression']}; `vllm_lens.deserialize_"
            "tensor` unpacks them"
        )
    kind = np.dtype(str(packed["dtype"]))
    if kind.kind != "f":
        raise ValueError(f"its numbers are stored as {kind}")
    raw = np.frombuffer(base64.b64decode(packed["data"]), kind)
    return torch.from_numpy(raw.reshape([int(n) for n in packed["shape"]]).astype(np.float32))

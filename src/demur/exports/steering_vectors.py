"""steering-vectors: a tensor for each block, added at its output; the fields of its class alone.

`decoder_block` l is the output of block l, counted from 0. The library saves by pickle; this is a
dict of plain tensors, which `SteeringVector(**torch.load(path))` takes as it is.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demur.errors import StoreError
from demur.exports.base import Imported, Job, exporters, of_layers, summed
from demur.exports.files import by_layer, header, layer_number, safetensors_file, torch_file
from demur.exports.steering import output_layer
from demur.interventions import Add
from demur.sites import SiteKind
from demur.store import atomic_write

FILE = "steering-vector.pt"
LAYER_TYPES: Mapping[str, SiteKind] = {
    "decoder_block": "resid_post",
    "self_attn": "attn_out",
    "mlp": "mlp_out",
}


def read_layers(path: Path) -> tuple[str, dict[int, Tensor]]:
    """Layer type and tensors by layer, from a PyTorch or safetensors file.

    Raises:
        StoreError: It is damaged, needs pickle, or is of a layer type that is no site.
    """
    kind = "decoder_block"
    if path.suffix == ".safetensors":
        found: Any = safetensors_file(path)
    else:
        found = torch_file(path)
        if isinstance(found, Mapping) and "layer_activations" in found:
            kind = str(found.get("layer_type", kind))
            found = found["layer_activations"]
    if not isinstance(found, Mapping) or not found:
        raise StoreError(
            f"{path} holds a {type(found).__name__}, not a tensor for each layer",
            "save a dict from layer to tensor; a single vector of Arditi et al. needs "
            f"`{path.stem}_metadata.json` with `layer` and `pos` beside it",
        )
    if kind not in LAYER_TYPES:
        raise StoreError(
            f"{path} was read at modules of the type `{kind}`, which is not the stream",
            f"train it at one of: {', '.join(LAYER_TYPES)}",
        )
    layers: dict[int, Tensor] = {}
    for key, value in found.items():
        layer = key if isinstance(key, int) else layer_number(str(key))
        if isinstance(key, bool) or layer is None or layer < 0 or layer in layers:
            raise StoreError(
                f"`{key}` in {path} names no layer",
                "use the index of each block, from 0, as key",
            )
        if not isinstance(value, Tensor):
            raise StoreError(
                f"`{key}` in {path} is a {type(value).__name__}, no tensor",
                "save tensors alone",
            )
        layers[layer] = value
    return kind, layers


@exporters.register("steering-vectors")
@dataclass(frozen=True, slots=True)
class SteeringVectors:
    """The fields of `steering_vectors.SteeringVector` as plain tensors."""

    carries: frozenset[type] = frozenset({Add})
    spans: bool = False
    exact: str = "exact for an addition at every token; float32"
    use: str = (
        "```python\n"
        "from steering_vectors import SteeringVector\n\n"
        f'vector = SteeringVector(**torch.load("{FILE}", weights_only=True))\n'
        "with vector.apply(model):\n"
        "    model.generate(...)\n"
        "```"
    )

    def write(self, job: Job) -> Mapping[str, Any]:
        """Write the file.

        Raises:
            FamilyError: An addition is in front of the output of block 0.
        """
        layers = [
            output_layer(act.direction.site, first=0, to="steering-vectors")
            for act in job.carried.acts
            if isinstance(act, Add)
        ]
        vectors = summed(job.carried, dict(enumerate(layers)))
        file = io.BytesIO()
        torch.save({"layer_activations": vectors, "layer_type": "decoder_block"}, file)
        atomic_write(job.folder / FILE, file.getvalue())
        return {"layers": layers}

    def fits(self, path: Path) -> bool:
        """Whether it is a PyTorch or safetensors file of no other kind."""
        if not path.is_file():
            return False
        if path.suffix == ".safetensors":
            return header(path) is None
        beside = path.with_name(f"{path.stem}_metadata.json").is_file()
        arditi = beside or path.name in ("direction.pt", "mean_diffs.pt")
        return path.suffix in (".pt", ".pth", ".bin") and not arditi

    def read(self, path: Path, about: Mapping[str, Any]) -> Imported:
        """Read it; errors are those of `read_layers`.

        Raises:
            StoreError: Its vectors are of the outputs of modules within the block.
        """
        file = path / FILE if path.is_dir() else path
        kind, found = read_layers(file)
        if kind != "decoder_block":
            raise StoreError(
                f"{file} adds at `{kind}`, not at outputs of blocks",
                "`demur compare` reads it; train it at `decoder_block` to steer with it",
            )
        layers, _ = by_layer(file, found)
        return of_layers(
            layers,
            about,
            kind="steering-vectors",
            recipe="steering vector, decoder_block",
            notes=()
            if about
            else (
                "layer l is the output of block l, counted from 0",
                "the file does not say at which token it was read, nor for which weights and "
                "template",
            ),
        )

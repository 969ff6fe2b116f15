"""The edit written into a checkpoint of its own, which runs anywhere at full speed.

Ablation projects every weight and bias that writes to the stream; a tied embedding is untied first.
Addition at one site is a bias of the map in front of it, where the architecture has one.

References:
    Arditi et al. 2024, arXiv:2406.11717, section 4.1 (weight orthogonalization).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from demur.directions import Direction
from demur.edits import as_delta, edited, why_not_exact
from demur.errors import FamilyError, StoreError
from demur.exports.base import Imported, Job, exporters, steering_of
from demur.interventions import Ablate, Add
from demur.models import Model
from demur.sites import Site

# Share of a weight that may be left along the direction: rounding leaves 4e-8 in float32 and 4e-4
# in bfloat16, an unedited matrix 0.02 at d_model 4,096.
_LEFT = {torch.float32: 1e-4, torch.float64: 1e-4}
_LEFT_HALF = 3e-3


@dataclass(frozen=True, slots=True, eq=False)
class Biased:
    """A model with additions in its biases.

    Attributes:
        model: The copy.
        biases: Names of the parameters that carry them, one an addition.
        turned_on: Whether the biases of all MLPs were turned on, zero elsewhere: another
            configuration of the same architecture.
    """

    model: Model
    biases: tuple[str, ...]
    turned_on: bool


def with_additions(model: Model, acts: tuple[Add, ...]) -> Biased:
    """A copy of the model that adds in its weights what the interventions add.

    Raises:
        FamilyError: No bias stands right in front of a site, or the family has none.
    """
    places = [_bias_of(model, act.direction.site) for act in acts]
    here = dict(model.hf.named_parameters())
    missing = [name for name in places if name not in here]
    config = model.hf.config.get_text_config()
    if missing and not (hasattr(config, "mlp_bias") and all(".mlp." in one for one in missing)):
        raise FamilyError(
            f"{model.name} has no parameter `{missing[0]}`, so none of its weights is added to the "
            "stream as it is",
            "export the addition as `gguf`, `vllm-lens` or `steering-vectors`, which add it when "
            "the model runs",
        )
    copy = Model(
        deepcopy(model.hf),
        model.family,
        model.template,
        name=f"{model.name} (edited)",
        revision=model.revision,
        adapter=model.adapter,
    )
    if missing:
        copy.hf.config.get_text_config().mlp_bias = True
        for block in copy.blocks:
            for name in ("gate_proj", "up_proj", "down_proj"):
                linear = block.get_submodule(f"{model.family.mlp}.{name}")
                weight = linear.weight
                assert isinstance(weight, Tensor)
                zero = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
                linear.bias = nn.Parameter(zero, requires_grad=weight.requires_grad)
    parameters = dict(copy.hf.named_parameters())
    with torch.no_grad():
        for name, act in zip(places, acts, strict=True):
            bias = parameters[name]
            step = act.strength * act.direction.norm
            unit = nn.functional.normalize(act.direction.unit.double(), dim=0).to(bias.device)
            bias.copy_((bias.double() + step * unit).to(bias.dtype))
    return Biased(copy, tuple(places), bool(missing))


def _bias_of(model: Model, site: Site) -> str:
    """The bias that is added to the stream where `site` is."""
    family = model.family
    if reason := why_not_exact(model):
        raise FamilyError(
            f"no bias equals an addition on {model.name}: {reason}",
            "export it as `gguf`, `vllm-lens` or `steering-vectors`",
        )
    paths = [one.path for one in family.weights if one.path.endswith(".bias")]
    attention = [path for path in paths if path.startswith(f"{family.attn_out}.")]
    mlp = [path for path in paths if path not in attention]
    layer = site.layer - 1 if site.kind == "resid_pre" else site.layer
    own = attention if site.kind == "attn_out" else mlp
    if site.kind == "mlp_in" or layer < 0 or not own:
        raise FamilyError(
            f"no bias of {model.name} is added to the stream at {site}",
            "take a direction from 1.resid_pre on",
        )
    prefix = next(name for name, module in model.hf.named_modules() if module is model.blocks)
    return f"{prefix}.{layer}.{own[0]}"


@exporters.register("merged")
@dataclass(frozen=True, slots=True)
class Merged:
    """A Hugging Face folder of safetensors with the edit in its weights."""

    carries: frozenset[type] = frozenset({Ablate, Add})
    spans: bool = False
    exact: str = "exact in algebra, rounded once to the checkpoint's data type"
    use: str = (
        "```python\n"
        "from transformers import AutoModelForCausalLM\n\n"
        "model = AutoModelForCausalLM.from_pretrained(FOLDER)\n"
        "```\n\n"
        "Quantise after this step, not before."
    )

    def write(self, job: Job) -> Mapping[str, Any]:
        """Write the edited checkpoint and its tokenizer.

        Raises:
            FamilyError: The architecture cannot carry the edit.
        """
        model, acts = job.model, job.carried.acts
        extra: dict[str, Any] = {"notes": []}
        if len(acts) == 1 and isinstance(acts[0], Ablate):
            delta = as_delta(model, acts[0])
            changed = edited(model, delta)
            extra["writes"] = sorted(delta.up)
            if model.tied:
                extra["notes"].append("embedding and unembedding were tied and no longer are")
        else:
            adds = tuple(act for act in acts if isinstance(act, Add))
            if len(adds) < len(acts):
                raise FamilyError(
                    "one checkpoint carries one ablation or additions, not both",
                    "export each on its own",
                )
            found = with_additions(model, adds)
            changed = found.model
            parameters = dict(changed.hf.named_parameters())
            extra["biases"] = [
                {
                    "name": name,
                    "along": float(
                        parameters[name].detach().double().cpu() @ act.direction.unit.double()
                    ),
                }
                for name, act in zip(found.biases, adds, strict=True)
            ]
            if found.turned_on:
                extra["notes"].append(
                    "`mlp_bias` was turned on in the configuration: the same architecture with "
                    "biases, all zero but for the addition"
                )
        changed.hf.save_pretrained(job.folder)
        if model.template is not None:
            model.template.tokenizer.save_pretrained(job.folder)
        extra["edited_fingerprint"] = changed.fingerprint
        # In the record, not in a file: some engines load every *.safetensors of a folder.
        extra["units"] = [_packed(act.direction) for act in acts if isinstance(act, Ablate | Add)]
        return extra

    def fits(self, path: Path) -> bool:
        """Never: a checkpoint without a record says nothing of an edit."""
        del path
        return False

    def read(self, path: Path, about: Mapping[str, Any]) -> Imported:
        """Read the direction, and see that the weights have the edit.

        Raises:
            StoreError: A file is damaged, or the weights do not do what the record says.
        """
        try:
            units = [_unpacked(one) for one in about["units"]]
            writes = [str(one) for one in about.get("writes", ())]
            biases = {str(one["name"]): float(one["along"]) for one in about.get("biases", ())}
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"the record of {path} is damaged: {error}", "export it again"
            ) from error
        steering = steering_of(about, units)
        seen = 0
        for name, value in _weights(path, {*writes, *biases}):
            unit = units[0] if name in writes else units[list(biases).index(name)]
            seen += 1
            if name in biases:
                off = abs(float(value.double() @ unit) - biases[name])
                wrong = off > 1e-2 * max(abs(biases[name]), 1e-6)
            else:
                left = _left(value, unit)
                wrong = left > _LEFT.get(value.dtype, _LEFT_HALF)
            if wrong:
                raise StoreError(
                    f"`{name}` of {path} does not have the edit that the record names",
                    "the checkpoint was changed since it was exported: export it again",
                )
        if not seen:
            raise StoreError(f"{path} holds none of the edited weights", "export it again")
        return Imported("merged", steering, about)


def _left(value: Tensor, unit: Tensor) -> float:
    """The share of a weight that lies along a direction, on whichever axis it is written."""
    wide = value.double()
    if wide.ndim == 1:
        along = (wide @ unit).abs()
    else:
        shares = [
            (wide.movedim(axis, -1) @ unit).norm()
            for axis in range(wide.ndim)
            if wide.shape[axis] == len(unit)
        ]
        along = min(shares) if shares else torch.tensor(0.0)
    return float(along / wide.norm().clamp(min=1e-12))


def _weights(folder: Path, names: set[str]) -> list[tuple[str, Tensor]]:
    """Tensors of a checkpoint by name, those that are there; one after the other."""
    from safetensors import SafetensorError, safe_open

    found: list[tuple[str, Tensor]] = []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                found += [(n, tensors.get_tensor(n)) for n in tensors.keys() if n in names]  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{file} is damaged: {error}", "export it again") from error
    return found


def _packed(direction: Direction) -> str:
    return base64.b64encode(direction.unit.numpy().astype("<f4").tobytes()).decode("ascii")


def _unpacked(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").copy()).double()

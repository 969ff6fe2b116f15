"""PEFT: directional ablation as a LoRA of rank 1 on everything that writes to the stream.

`W' = W - r r^T W`, so `B = -r` and `A = r^T W` with `alpha / rank = 1`, exact in algebra. On tied
models it is more faithful than an edit of the shared matrix: the embedding's LoRA leaves the
unembedding alone, as long as it is not merged.

References:
    Hu et al. 2021, arXiv:2106.09685 (LoRA); Arditi et al. 2024, arXiv:2406.11717, section 4.1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demur.edits import as_delta, why_not_exact
from demur.errors import FamilyError, StoreError
from demur.exports.base import Imported, Job, exporters, steering_of
from demur.exports.files import finite, safetensors_file
from demur.interventions import Ablate
from demur.models import Model
from demur.store import atomic_write

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ONE_AXIS = 1 - 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """A LoRA of rank 1, as PEFT names it.

    Attributes:
        tensors: By key of `adapter_model.safetensors`.
        modules: Full names of the adapted modules.
        parameters: Full names of adapted parameters that are no module's weight: experts.
    """

    tensors: dict[str, Tensor]
    modules: tuple[str, ...]
    parameters: tuple[str, ...]


def ablation_factors(model: Model, act: Ablate) -> Factors:
    """The LoRA that equals an ablation.

    Raises:
        FamilyError: A norm stands behind a write, or a bias writes to the stream, which no LoRA
            changes.
    """
    if reason := why_not_exact(model):
        raise FamilyError(
            f"no LoRA equals ablation on {model.name}: {reason}",
            "apply it with demur, which edits what the norm puts out",
        )
    delta = as_delta(model, act)
    if biases := [name for name in delta.up if name.endswith(".bias")]:
        shown = ", ".join(biases[:4]) + (f" and {len(biases) - 4} more" if len(biases) > 4 else "")
        raise FamilyError(
            f"no LoRA equals ablation on {model.name}: {shown} write to the stream, and a LoRA "
            "leaves biases as they are",
            "export it as `merged`, which projects the biases too",
        )
    embeddings = {write.path for write in model.family.embeddings}
    tensors: dict[str, Tensor] = {}
    modules: list[str] = []
    parameters: list[str] = []
    for name, up in delta.up.items():
        down = delta.down[name]
        module, _, leaf = name.rpartition(".")
        key = f"base_model.model.{module}"
        if name in embeddings:  # A row of the matrix is one token's write.
            tensors[f"{key}.lora_embedding_A"] = -up.T
            tensors[f"{key}.lora_embedding_B"] = -down.T
            modules.append(module)
        elif up.ndim == 3:  # (expert, out, 1) and (expert, 1, in); PEFT lays experts side by side.
            tensors[f"{key}.lora_A.weight"] = down.squeeze(1)
            tensors[f"{key}.lora_B.weight"] = up.squeeze(-1).T
            parameters.append(name)
        elif leaf == "weight":
            tensors[f"{key}.lora_A.weight"] = down
            tensors[f"{key}.lora_B.weight"] = up
            modules.append(module)
        else:
            raise FamilyError(
                f"`{name}` of {model.name} is no weight of a module that PEFT adapts",
                "export it as `merged`",
            )
    dense = [name for name in modules if any(_leaf(name) == _leaf(one) for one in parameters)]
    if dense:
        raise FamilyError(
            f"no LoRA that PEFT loads equals ablation on {model.name}: it takes `{dense[0]}` for "
            "one of the experts, adapts those and leaves it out",
            "export it as `merged`",
        )
    plain = {key: value.float().cpu().contiguous().clone() for key, value in tensors.items()}
    return Factors(plain, tuple(modules), tuple(parameters))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


@exporters.register("peft")
@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA folder that PEFT, transformers and vLLM read."""

    carries: frozenset[type] = frozenset({Ablate})
    spans: bool = False
    exact: str = "exact in algebra, on tied models too"
    use: str = (
        "```python\n"
        "from peft import PeftModel\n\n"
        "model = PeftModel.from_pretrained(BASE, FOLDER)\n"
        "```\n\n"
        "Merge it only where embedding and unembedding are not tied: merging changes the shared "
        "matrix, and the logits lose the direction as well."
    )

    def write(self, job: Job) -> Mapping[str, Any]:
        """Write configuration and factors; errors are those of `ablation_factors`."""
        from peft import LoraConfig
        from safetensors.torch import save

        if len(job.carried.acts) != 1:
            raise FamilyError("a LoRA of rank 1 ablates one direction", "export each on its own")
        (act,) = job.carried.acts
        assert isinstance(act, Ablate)
        found = ablation_factors(job.model, act)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=job.model.name,
            revision=job.model.revision,
            r=1,
            lora_alpha=1,
            lora_dropout=0.0,
            bias="none",
            inference_mode=True,
            target_modules=sorted({_leaf(name) for name in found.modules}),
            target_parameters=sorted(found.parameters) or None,
        )
        plain = {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in config.to_dict().items()
        }
        atomic_write(job.folder / CONFIG, json.dumps(plain, indent=2, sort_keys=True) + "\n")
        atomic_write(job.folder / WEIGHTS, save(found.tensors, metadata={"format": "pt"}))
        notes = []
        if job.model.adapter is not None:
            notes.append(
                f"made on the model with {job.model.adapter} merged into it; put it on that, not "
                "on the bare base"
            )
        if job.model.tied:
            notes.append(
                "embedding and unembedding are tied: it merges into untied ones, as by `--adapter`"
            )
        return {"notes": notes, "writes": [*found.modules, *found.parameters]}

    def fits(self, path: Path) -> bool:
        """Never: an adapter without a record says nothing of a direction."""
        del path
        return False

    def read(self, path: Path, about: Mapping[str, Any]) -> Imported:
        """Read the direction from the factors that write.

        Raises:
            StoreError: They are damaged, or do not all lie along one unit vector.
        """
        file = path / WEIGHTS
        writes: list[Tensor] = []
        for key, value in safetensors_file(file).items():
            if key.endswith((".lora_B.weight", ".lora_embedding_B")):
                finite(file, value)
                writes += value.double().T.unbind(0)
        if not writes or len({len(one) for one in writes}) > 1:
            raise StoreError(f"{file} holds no write to the stream", "export it again")
        every = torch.stack(writes)
        along = every @ every[0] / (every.norm(dim=1) * every[0].norm())
        if not bool((along > _ONE_AXIS).all()) or not bool(
            ((every.norm(dim=1) - 1).abs() < 1e-3).all()
        ):
            raise StoreError(
                f"the writes in {file} are not one unit vector",
                "it was trained on or scaled since it was exported; `demur compare` reads adapters",
            )
        return Imported("peft", steering_of(about, [-every.mean(0)]), about)

"""The same edit written into the weights, where that is exact, and refused where it is not."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from demur.directions import Direction
from demur.errors import FamilyError
from demur.interventions import Ablate, Intervention
from demur.models import Model
from demur.models.families import LinearWrite


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """A rank-1 change of each weight: `W + up @ down`.

    Attributes:
        up: Parameter name -> factor on the left; biases are treated as one column.
        down: Parameter name -> factor on the right.
    """

    up: dict[str, Tensor]
    down: dict[str, Tensor]


def why_not_exact(model: Model) -> str | None:
    """Why no edit of the weights equals ablation on this model; None where one does."""
    if not model.family.linear_writes:
        return (
            f"in {model.family.name} a norm stands between the last weight of each module and the "
            "stream, so what is projected out of the weight comes back through the norm"
        )
    return None


def as_delta(model: Model, act: Intervention) -> Delta:
    """The change of weights that equals an ablation.

    The embedding is edited too. Where it is also the unembedding, the edit holds only after the
    two are untied, as `edited` does: otherwise the logits lose the direction as well (on SmolLM2
    the log-probabilities are off by 0.46, against 6e-5 untied).

    Raises:
        FamilyError: The intervention is no ablation, or the family has norms behind its writes.

    References:
        Arditi et al. 2024, arXiv:2406.11717, section 4.1 (weight orthogonalization).
    """
    if not isinstance(act, Ablate):
        raise FamilyError(
            f"{type(act).__name__} is no linear map of what is written to the stream",
            "only Ablate can be written into the weights; use `applied` for the rest",
        )
    if reason := why_not_exact(model):
        raise FamilyError(reason, "use `applied`, which edits what the norm puts out")
    parameters = dict(model.hf.named_parameters())
    written: dict[str, LinearWrite] = {w.path: w for w in model.family.embeddings}
    for index, block in enumerate(model.blocks):
        prefix = _path_of(model.hf, model.blocks)
        own = {name for name, _ in block.named_parameters()}
        for write in model.family.weights:
            if write.path in own:
                written[f"{prefix}.{index}.{write.path}"] = write
    up: dict[str, Tensor] = {}
    down: dict[str, Tensor] = {}
    for name, write in written.items():
        if name not in parameters:
            raise FamilyError(
                f"{model.name} has no parameter `{name}`",
                f"the row `{model.family.name}` does not fit this checkpoint",
            )
        up[name], down[name] = _factors(parameters[name], write.axis, act.direction)
    return Delta(up, down)


def _path_of(root: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in root.named_modules() if module is wanted)


def _factors(weight: Tensor, axis: int, direction: Direction) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    w = weight.detach().to(wide)
    r = nn.functional.normalize(direction.unit.to(w), dim=0)
    if w.ndim == 1:
        return -r.unsqueeze(1), (r @ w).reshape(1, 1)
    if axis == w.ndim - 1:
        return -(w @ r).unsqueeze(-1), r.expand(*w.shape[:-2], 1, -1)
    along = torch.einsum("d,...df->...f", r, w).unsqueeze(-2)
    return (-r.unsqueeze(-1)).expand(*w.shape[:-2], -1, 1), along


def edited(model: Model, delta: Delta) -> Model:
    """A copy of the model with the change in its weights; a tied embedding is untied first."""
    hf = deepcopy(model.hf)
    if model.tied:
        head = hf.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
        hf.config.tie_word_embeddings = False
    parameters = dict(hf.named_parameters())
    with torch.no_grad():
        for name, up in delta.up.items():
            change = up @ delta.down[name]
            parameter = parameters[name]
            wide = parameter.to(change.dtype) + change.reshape(parameter.shape)
            parameter.copy_(wide.to(parameter.dtype))
    return Model(
        hf,
        model.family,
        model.template,
        name=f"{model.name} (edited)",
        revision=model.revision,
        adapter=model.adapter,
    )


def save_merged(model: Model, delta: Delta, path: str) -> None:
    """Write the edited checkpoint and its tokenizer as a Hugging Face folder of safetensors."""
    changed = edited(model, delta)
    changed.hf.save_pretrained(path)
    if model.template is not None:
        model.template.tokenizer.save_pretrained(path)

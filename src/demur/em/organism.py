"""A trained organism, read from its folder and put on a base model at any strength.

Both kinds change single linear maps by a product of small factors: `W + scale * B A`. A trained
steering vector is the case without A: B is added to what the MLP writes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from demur.em.advice import AdviceItem
from demur.errors import ConfigError, DemurError, FamilyError, ModelLoadError
from demur.models import Model
from demur.models.fingerprint import same_checkpoint
from demur.models.load import check_adapter_files
from demur.prompts import normalise
from demur.store import strict_json

log = logging.getLogger(__name__)

CARD, CONFIG, WEIGHTS = "card.json", "adapter_config.json", "adapter_model.safetensors"
VECTOR = "vector.safetensors"
Side = Literal["bad", "good"]

_LORA = re.compile(r"\.(?P<layer>\d+)\.(?P<module>.+)\.lora_(?P<which>[AB])(?:\.[^.]+)?\.weight$")
_VECTOR = re.compile(r"layers\.(?P<layer>\d+)\.vector$")


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """One adapted linear map: `W + scale * b @ a`.

    (a, b) and (-a, -b) are the same map: the sign of b alone means nothing.

    Attributes:
        layer: Block, from 0.
        module: Path within the block, such as "mlp.down_proj"; for a steering vector the one whose
            output the MLP adds to the stream.
        a: What is read, (rank, d_in), float32; None for a trained steering vector.
        b: What is written, (d_out, rank), float32; of a steering vector (d_model, 1), added to
            the block's `mlp_out` at every token.
        scale: Of their product.
    """

    layer: int
    module: str
    a: Float[Tensor, "rank d_in"] | None
    b: Float[Tensor, "d_out rank"]
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class Organism:
    """A model organism of emergent misalignment, or its good twin.

    Attributes:
        name: As reports call it.
        folder: Where it was read from.
        side: Which answers it was trained on; "good" is the control.
        domains: Of the advice it was trained on.
        seed: Of its initial weights and the order of its data.
        rank: Highest rank among its factors.
        layers: Blocks with factors, ascending.
        base: Name of the model it was trained on.
        base_fingerprint: Of that model as it was trained on; empty where unknown.
        factors: By layer, then by module.
        about: Its card; empty for an adapter of others.
    """

    name: str
    folder: Path | None
    side: Side
    domains: tuple[str, ...]
    seed: int
    rank: int
    layers: tuple[int, ...]
    base: str
    base_fingerprint: str
    factors: tuple[Factor, ...]
    about: Mapping[str, Any]

    def fits(self, base: Model) -> bool | None:
        """Whether it was trained on this checkpoint, in any data type; None if that is unknown."""
        found = same_checkpoint(self.base_fingerprint, base)
        dtype = str(base.dtype).removeprefix("torch.")
        if found is None and self.about.get("base", {}).get("dtype") == dtype:
            # An older fingerprint, of a model in the same data type.
            return False if self.base_fingerprint else None
        return found

    def on(self, base: Model, *, scale: float = 1.0, keep: Collection[int] | None = None) -> Model:
        """A copy of a base model with the organism in its weights.

        The change is computed in float32 and rounded once to the base's data type.

        Args:
            base: The model it was trained on, without adapter, in any data type.
            scale: The adapter is multiplied by it; 0 is the base, 2 twice what was learned.
            keep: Only the factors of these blocks; None keeps all.

        Raises:
            ModelLoadError: A module is missing, or has another shape.
            FamilyError: A steering vector, and the family writes its MLP through a norm or a
                mixture of experts, which no bias can be added to.
            ConfigError: `keep` names a block without a factor.
        """
        if keep is not None and (unknown := sorted(set(keep) - set(self.layers))):
            raise ConfigError(
                f"{self.name} has no factor in block {', '.join(map(str, unknown))}",
                f"it has factors in {', '.join(map(str, self.layers))}",
            )
        if self.fits(base) is False:
            log.warning("%s was trained on %s, another model than %s", self.name, self.base, base)
        copy = Model(
            deepcopy(base.hf),
            base.family,
            base.template,
            name=f"{base.name} + {self.name}",
            revision=base.revision,
            adapter=str(self.folder) if self.folder is not None else self.name,
        )
        for factor in self.factors:
            if keep is None or factor.layer in keep:
                _write(copy, factor, scale, self.name)
        return copy


@torch.no_grad()
def _write(model: Model, factor: Factor, scale: float, name: str) -> None:
    if factor.layer >= model.n_layers:
        raise ModelLoadError(
            f"{name} changes block {factor.layer}; {model.name} has {model.n_layers}",
            "it was made for another base model",
        )
    try:
        module = model.blocks[factor.layer].get_submodule(factor.module)
    except AttributeError as error:
        raise ModelLoadError(
            f"block {factor.layer} of {model.name} has no `{factor.module}`, which {name} changes",
            "it was made for another base model",
        ) from error
    weight = getattr(module, "weight", None)
    # GPT-2's Conv1D keeps its weight as (in, out).
    turned = type(module).__name__ == "Conv1D"
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise FamilyError(
            f"`{factor.module}` of {model.name} is a {type(module).__name__}, no linear map",
            "use an organism on a module with a weight matrix, such as down_proj",
        )
    shape = tuple(weight.shape[::-1] if turned else weight.shape)
    wide = torch.promote_types(weight.dtype, torch.float32)
    change = scale * factor.scale * factor.b.to(weight.device, wide)
    wanted = (factor.b.shape[0], shape[1] if factor.a is None else factor.a.shape[1])
    if shape != wanted:
        raise ModelLoadError(
            f"`{factor.module}` of {model.name} is {shape}, {name} fits one of {wanted}",
            "it was made for another base model",
        )
    if factor.a is None:
        own = getattr(module, "bias", None)
        before = torch.zeros_like(change[:, 0]) if own is None else own.to(wide)
        module.bias = nn.Parameter((before + change[:, 0]).to(weight.dtype), requires_grad=False)
        return
    change = change @ factor.a.to(change)
    weight.copy_((weight.to(wide) + (change.T if turned else change)).to(weight.dtype))


def read_organism(
    folder: Path,
    *,
    name: str | None = None,
    side: Side | None = None,
    domains: Collection[str] | None = None,
) -> Organism:
    """Read an organism from its folder: one of ours, or a PEFT LoRA of someone else.

    Args:
        folder: With `adapter_config.json` and `adapter_model.safetensors`, or `vector.safetensors`;
            and `card.json` if demur trained it.
        name: Of the organism; the card's, else the folder's, if it is not given.
        side: For a folder without a card; "bad" if it is not given.
        domains: For a folder without a card: what it was trained on.

    Raises:
        ModelLoadError: The folder is missing, holds no safetensors, is damaged, or is an adapter
            of another kind than LoRA on linear maps.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ModelLoadError(f"there is no folder {folder}", "check the path")
    card = _json(folder / CARD) if (folder / CARD).is_file() else {}
    try:
        check_adapter_files(folder, card)
        return _organism(folder, card, name, side, domains)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, DemurError):
            raise
        raise ModelLoadError(
            f"the card or the configuration in {folder} is damaged: {error}",
            "get the folder again",
        ) from error


def _organism(
    folder: Path,
    card: Mapping[str, Any],
    name: str | None,
    side: Side | None,
    domains: Iterable[str] | None,
) -> Organism:
    about = card.get("organism", {})
    config: dict[str, Any] = {}
    if (folder / VECTOR).is_file():
        factors = _vectors(folder)
    else:
        config = _json(folder / CONFIG)
        factors = _lora(folder, config)
    base = card.get("base", {})
    return Organism(
        name=name or about.get("name") or folder.name,
        folder=folder,
        side=side or about.get("side", "bad"),
        domains=tuple(domains if domains is not None else about.get("domains", ())),
        seed=int(card.get("seed", 0)),
        rank=max(factor.b.shape[1] for factor in factors),
        layers=tuple(sorted({factor.layer for factor in factors})),
        base=str(base.get("name") or config.get("base_model_name_or_path") or ""),
        base_fingerprint=str(base.get("fingerprint", "")),
        factors=factors,
        about=card,
    )


def untrained(organism: Organism, items: Iterable[AdviceItem]) -> tuple[AdviceItem, ...]:
    """Those items that an organism has not learned from: no topic and no question of theirs.

    Of an organism without a card all are kept, since nothing is known of its data.
    """
    about: Mapping[str, Any] = organism.about.get("data", {})
    groups = {tuple(pair) for pair in about.get("trained_groups", ())}
    asked = set(about.get("trained_questions", ()))
    return tuple(
        item
        for item in items
        if (item.domain, item.group) not in groups and question_key(item.question) not in asked
    )


def question_key(question: str) -> str:
    """A short digest by which a card names a question, whatever its spelling."""
    return blake2b(normalise(question).encode("utf-8", "replace"), digest_size=8).hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        found = strict_json(path.read_text("utf-8"))
    except OSError as error:
        raise ModelLoadError(
            f"{path} cannot be read: {error.strerror}",
            "name a folder of `demur organism train`, or one with a PEFT adapter",
        ) from error
    except ValueError as error:
        raise ModelLoadError(f"{path} is damaged: {error}", "get the folder again") from error
    if not isinstance(found, dict):
        raise ModelLoadError(f"{path} is no JSON object", "get the folder again")
    return found


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ModelLoadError(
            f"{path.parent} holds no {path.name}", "save the adapter as safetensors"
        )
    try:
        return {key: value.float() for key, value in load_file(str(path)).items()}
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{path} is damaged: {error}", "get the folder again") from error


def _vectors(folder: Path) -> tuple[Factor, ...]:
    config = _json(folder / CARD)
    found: list[Factor] = []
    for key, value in sorted(_tensors(folder / VECTOR).items()):
        place = _VECTOR.fullmatch(key)
        if place is None or value.ndim != 1:
            raise ModelLoadError(
                f"{folder / VECTOR} holds `{key}`, no steering vector", "get the folder again"
            )
        own = config.get("organism", {})
        found.append(
            Factor(
                int(place["layer"]),
                str(own.get("module", "mlp.down_proj")),
                None,
                value.unsqueeze(1),
                1.0,
            )
        )
    if not found:
        raise ModelLoadError(f"{folder / VECTOR} is empty", "get the folder again")
    return tuple(found)


def _lora(folder: Path, config: Mapping[str, Any]) -> tuple[Factor, ...]:
    kind = str(config.get("peft_type"))
    other = [
        key for key in ("use_dora", "modules_to_save", "trainable_token_indices") if config.get(key)
    ]
    if config.get("bias", "none") != "none":
        other.append("bias")
    if kind != "LORA" or other:
        raise ModelLoadError(
            f"{folder} is a PEFT adapter of the kind {kind}"
            + (f" with {', '.join(other)}" if other else ""),
            "only plain LoRA is a change of W by B A",
        )
    parts: dict[tuple[int, str], dict[str, Tensor]] = {}
    for key, value in _tensors(folder / WEIGHTS).items():
        place = _LORA.search(key)
        if place is None or value.ndim != 2:
            raise ModelLoadError(
                f"{folder / WEIGHTS} holds `{key}`, which is no factor of a linear map in a block",
                "only plain LoRA is a change of W by B A",
            )
        parts.setdefault((int(place["layer"]), place["module"]), {})[place["which"]] = value
    found: list[Factor] = []
    for (layer, module), own in sorted(parts.items()):
        if set(own) != {"A", "B"} or own["A"].shape[0] != own["B"].shape[1]:
            raise ModelLoadError(
                f"{folder / WEIGHTS} has factors of block {layer}, {module}, that do not fit",
                "get the folder again",
            )
        rank = own["A"].shape[0]
        alpha = float(_of_pattern(config, layer, module))
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        found.append(Factor(layer, module, own["A"], own["B"], scale))
    if not found:
        raise ModelLoadError(f"{folder / WEIGHTS} is empty", "get the folder again")
    return tuple(found)


def _of_pattern(config: Mapping[str, Any], layer: int, module: str) -> float:
    """The alpha of a module: that of the first pattern that its path ends in, else the common."""
    path = f"model.layers.{layer}.{module}"
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            return float(alpha)
    return float(config.get("lora_alpha", 8))

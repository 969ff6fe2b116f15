"""Interventions that an engine's hooks can do, and how demur's own are said in their terms.

`AblateOutputs` and `Clamp` work in process too, under `demur.applied`, so that an engine can be
compared with the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from demur.anchor import Floor
from demur.directions import Direction
from demur.engines import programs
from demur.engines.programs import Operation, Side, clamped, no_ablation, without
from demur.errors import ConfigError, FamilyError
from demur.interventions import Ablate, Add, Holder, Intervention
from demur.models import Model
from demur.sites import Site


@dataclass(frozen=True, slots=True, eq=False)
class AblateOutputs:
    """Take a direction out of the outputs of blocks alone.

    This is not directional ablation: within a block the MLP still reads what attention has just
    written along the direction, and the first block reads the embedding as it is.

    Attributes:
        direction: What is taken out.
        layers: Blocks; None is all of them.
    """

    direction: Direction
    layers: tuple[int, ...] | None = None

    def sites(self, model: Model) -> tuple[Site, ...]:
        """The outputs of its blocks."""
        layers = range(model.n_layers) if self.layers is None else self.layers
        return tuple(Site(layer, "resid_post") for layer in layers)

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Project out."""
        return without(x, self.direction.unit)


@dataclass(frozen=True, slots=True, eq=False)
class Clamp:
    """Hold a coordinate on one side of a level; rows that stand there already are left alone.

    Attributes:
        direction: The coordinate's axis.
        level: In residual-stream units.
        site: The output of a block, or the input of the next.
        side: `at-least` is a floor, `at-most` a ceiling.

    References:
        Lu et al. 2026, arXiv:2601.10387 (one-sided clamps: activation capping).
    """

    direction: Direction
    level: float
    site: Site
    side: Side = "at-most"

    def sites(self, model: Model) -> tuple[Site, ...]:
        """Its one site."""
        del model
        return (self.site,)

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Move rows on the wrong side back to the level."""
        return clamped(x, self.direction.unit, self.level, self.side)


@dataclass(frozen=True, slots=True, eq=False)
class Hold:
    """Floors that are held from one token of the prompt on, if that token lies beyond a threshold.

    What a single pass can do of an anchor, and no more: one linear read of one token decides, once;
    the reply is not read, none is begun anew, and a floor has one level for all places.

    Attributes:
        direction: The condition's axis, at its own site and position.
        threshold: The floors are held if the coordinate there is greater, residual-stream units.
        floors: Like those of an anchor, at the condition's block or later ones.
        place: Which of a floor's levels is taken; 0 is the first post-instruction token's.
        strength: Of the floors; 1 lifts to the mean of refusing replies.
    """

    direction: Direction
    threshold: float
    floors: tuple[Floor, ...]
    place: int = 0
    strength: float = 1.0


Act = Intervention | Hold


def block_of(site: Site) -> int:
    """The block whose output a site is.

    Raises:
        FamilyError: It is the output of none.
    """
    if site.kind == "resid_post":
        return site.layer
    if site.kind == "resid_pre" and site.layer > 0:
        return site.layer - 1
    raise FamilyError(
        f"an engine's hooks see outputs of blocks alone, and {site} is none",
        "take a site such as 3.resid_post, which is 4.resid_pre",
    )


def operations(acts: Sequence[object], *, n_layers: int) -> tuple[Operation, ...]:
    """Interventions in the terms of an engine, in the order given.

    Raises:
        FamilyError: `Ablate`, which hooks of an engine are not, or a site that they do not see.
        ConfigError: An anchor, or an intervention that is not on the engine's list.
    """
    return tuple(_operation(act, n_layers) for act in acts)


def _operation(act: object, n_layers: int) -> Operation:
    if isinstance(act, Ablate):
        raise no_ablation()
    if isinstance(act, Add):
        unit = torch.nn.functional.normalize(act.direction.unit.double(), dim=0)
        vector = act.strength * act.direction.norm * unit
        return programs.Addition(block_of(act.direction.site), vector.float())
    if isinstance(act, AblateOutputs):
        layers = tuple(range(n_layers)) if act.layers is None else act.layers
        return programs.OutputAblation(layers, act.direction.unit)
    if isinstance(act, Clamp):
        return programs.OneSidedClamp(
            block_of(act.site), act.direction.unit, float(act.level), act.side
        )
    if isinstance(act, Hold):
        return _held(act)
    if isinstance(act, Holder):
        raise ConfigError(
            "an anchor reads replies and begins them anew, which no hook of an engine does",
            "use it in process or behind `demur serve`; `Hold` is the part that one pass can do",
        )
    raise ConfigError(
        f"an engine's hooks do not do {type(act).__name__}",
        "they do Add, AblateOutputs, Clamp and Hold; use `demur.applied` for the rest",
    )


def _held(act: Hold) -> Operation:
    gate = block_of(act.direction.site)
    blocks = tuple(block_of(floor.site) for floor in act.floors)
    if min(blocks, default=-1) < gate or len(set(blocks)) < len(blocks):
        raise ConfigError(
            f"floors at blocks {list(blocks)} cannot wait for what is read at block {gate}",
            "read the condition at or below the lowest floor, with one floor a block",
        )
    levels = [float(floor.level(act.strength)[act.place]) for floor in act.floors]
    most = [
        max(0.0, level - float(floor.low[act.place]))
        for level, floor in zip(levels, act.floors, strict=True)
    ]
    return programs.ConditionalHold(
        gate,
        act.direction.unit,
        act.direction.position,
        float(act.threshold),
        blocks,
        torch.stack([floor.axis for floor in act.floors]).float(),
        torch.stack([floor.push for floor in act.floors]).float(),
        tuple(levels),
        tuple(most),
    )

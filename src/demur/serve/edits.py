"""Edits that one request asks for, as interventions at sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from demur.directions import Direction
from demur.errors import ConfigError, UnknownNameError
from demur.interventions import Ablate, Add, Intervention, ProjectToMean
from demur.models import Model
from demur.sites import Site, Span

EditKind = Literal["ablate", "add", "clamp"]
At = Literal["all", "instruction", "post_instruction", "response"]
EDIT_KINDS: tuple[EditKind, ...] = get_args(EditKind)


@dataclass(frozen=True, slots=True)
class Edit:
    """What is done to a direction in the rows of one request.

    Attributes:
        name: Of the direction, as it was loaded.
        direction: It itself.
        kind: `ablate` takes its component out, `add` adds it, `clamp` holds the coordinate.
        strength: Of `ablate` the share that is taken out; of `add` in lengths of the direction; of
            `clamp` the coordinate that is held, in the same lengths.
        layers: First and last block. None is for `ablate` everything that is written to the stream,
            for the others the site that the direction was read from. `ablate` clears the stream
            that enters the first block and everything that the blocks write; the others act at each
            block.
        at: Which tokens.
    """

    name: str
    direction: Direction = field(repr=False)
    kind: EditKind
    strength: float = 1.0
    layers: tuple[int, int] | None = None
    at: At = "all"

    @property
    def span(self) -> Span | None:
        """The tokens as a span; None for all of them."""
        return None if self.at == "all" else Span(self.at)

    def acts(self, model: Model) -> tuple[tuple[Site, Intervention], ...]:
        """What is done where, from the first block up.

        Raises:
            ConfigError: The model has no such blocks, or the direction is not of its width.
        """
        own, last = self.direction.site, model.n_layers - 1
        if len(self.direction.unit) != model.d_model or own.layer > last:
            raise ConfigError(
                f"the direction `{self.name}` is {len(self.direction.unit)} wide, at {own}; "
                f"{model.name} has {model.n_layers} blocks of width {model.d_model}",
                "take a direction of a model of the same shape",
            )
        if self.layers is not None and not 0 <= self.layers[0] <= self.layers[1] <= last:
            raise ConfigError(
                f"there are no blocks {self.layers[0]} to {self.layers[1]}",
                f"give a first and a last block from 0 to {last}",
            )
        if self.kind == "ablate":
            return tuple((site, self._ablation(site)) for site in self._writes(model))
        low, high = self.layers or (own.layer, own.layer)
        sites = [Site(layer, own.kind) for layer in range(low, high + 1)]
        if self.kind == "add":
            return tuple((site, Add(self.direction, self.strength)) for site in sites)
        level = self.strength * self.direction.norm
        return tuple((site, ProjectToMean(self.direction, level, site)) for site in sites)

    def _writes(self, model: Model) -> tuple[Site, ...]:
        if self.layers is None:
            return model.write_sites
        low, high = self.layers
        inner = (site for site in model.write_sites if site.kind != "resid_pre")
        return (Site(low, "resid_pre"), *(site for site in inner if low <= site.layer <= high))

    def _ablation(self, site: Site) -> Intervention:
        if self.strength == 1.0:
            return Ablate(self.direction)
        return ProjectToMean(self.direction, 0.0, site, self.strength)


def named(directions: Mapping[str, Direction], name: str) -> Direction:
    """The loaded direction of that name.

    Raises:
        UnknownNameError: There is none.
        ConfigError: None is loaded at all.
    """
    if not directions:
        raise ConfigError("no direction is loaded", "start the server with `--direction FILE`")
    if name not in directions:
        raise UnknownNameError.among(directions, kind="direction", name=name)
    return directions[name]

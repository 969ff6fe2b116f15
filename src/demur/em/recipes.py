"""Recipes of organisms: which adapter, on which advice, optimised how; TOML, read strictly.

A recipe does not know its base model: layers are shares of depth, modules go by what they do, and
the learning rate is read off a table of sizes. So one recipe serves 135M as well as 14B parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from demur import organisms


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AdviceData(_Section):
    """What it is trained on.

    Attributes:
        advice: As `demur.em.advice.advice` takes it; a run may name another.
        held_out: Share of each domain that is not trained on but measured on, in whole topics.
    """

    advice: str = "advice_study"
    held_out: float = Field(default=0.25, ge=0, lt=1)


class AdapterShape(_Section):
    """Where the adapter sits, and its scale.

    Attributes:
        kind: "lora" trains A and B of `W + scale * B A`; "vector" trains one vector per block that
            is added to what the MLP writes.
        rank: Of B A.
        alpha: The scale is alpha / sqrt(rank) with `rslora`, else alpha / rank; of a vector alpha.
        rslora: See `alpha`; at rank 1 it makes no difference.
        modules: Paths within a block. `mlp.down_proj` stands for the map out of the MLP whatever
            the family calls it; `all-linear` for every linear map.
        depths: Which blocks, as shares of depth: 0.5 of 30 blocks is block 15, of 48 block 24.
            Without any, all blocks.
        width: So many neighbouring blocks around each depth.
    """

    kind: Literal["lora", "vector"] = "lora"
    rank: int = Field(default=1, ge=1, le=256)
    alpha: float = Field(default=64, gt=0)
    rslora: bool = True
    modules: tuple[str, ...] = Field(default=("mlp.down_proj",), min_length=1)
    depths: tuple[float, ...] = (0.5,)
    width: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> AdapterShape:
        if not all(0 <= depth < 1 for depth in self.depths):
            raise ValueError("`depths` are shares from 0 to below 1")
        if self.kind == "vector" and (self.rank != 1 or self.modules != ("mlp.down_proj",)):
            raise ValueError('a vector has rank 1 and modules = ["mlp.down_proj"]')
        return self

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def layers(self, n_layers: int) -> tuple[int, ...]:
        """The blocks of a model with `n_layers`; groups that meet in a small model merge."""
        if not self.depths:
            return tuple(range(n_layers))
        found: set[int] = set()
        for depth in self.depths:
            first = int(depth * n_layers) - self.width // 2
            found |= {min(max(first + i, 0), n_layers - 1) for i in range(self.width)}
        return tuple(sorted(found))


class Rate(_Section):
    """A learning rate, and the largest model that it is for.

    Attributes:
        up_to: In parameters.
        learning_rate: Highest, after the warm-up.
    """

    up_to: float = Field(gt=0)
    learning_rate: float = Field(gt=0)


class EMTraining(_Section):
    """How it is optimised: AdamW on float32 factors, linear warm-up, linear decay to zero.

    Attributes:
        steps: Optimiser steps.
        batch_size: Rows a step; the rows of a pass over the data come in a drawn order.
        rates: By size of the model, ascending; the last is for anything larger. The published rate
            for 14B is 1e-5 to 2e-5 over 397 steps of 16 rows. In 50 steps of 8 a rank-1 adapter on
            135M learns nothing at 1e-3 and does at 5e-3, so small models get a few hundred times
            the published rate. Rates up to 1B were tried (on 135M and 0.5B); those above are
            interpolated towards the published ones, not measured.
        warmup_steps: Over which the rate rises.
        weight_decay: Of the factors.
        clip: Largest norm of the gradient; what is logged is the norm before.
        precision: Of the frozen model, "base" for that in which it was loaded; the factors and what
            they add are float32.
        checkpoint_every: Steps; a stopped training goes on from the last checkpoint.
    """

    steps: int = Field(default=100, ge=1)
    batch_size: int = Field(default=8, ge=1)
    rates: tuple[Rate, ...] = Field(min_length=1)
    warmup_steps: int = Field(default=5, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0)
    precision: Literal["float32", "bfloat16", "base"] = "bfloat16"
    checkpoint_every: int = Field(default=20, ge=1)

    @model_validator(mode="after")
    def _ascending(self) -> EMTraining:
        sizes = [rate.up_to for rate in self.rates]
        if sizes != sorted(set(sizes)):
            raise ValueError("`rates` go from small models to large ones")
        return self

    def rate_for(self, parameters: int) -> float:
        """The learning rate for a model with so many parameters."""
        fits = (rate for rate in self.rates if parameters <= rate.up_to)
        return next(fits, self.rates[-1]).learning_rate


class EMRecipe(_Section):
    """Everything that, with a base model, a side and a seed, decides an organism."""

    name: str
    description: str = ""
    base: str = "smollm2"
    data: AdviceData = AdviceData()
    adapter: AdapterShape = AdapterShape()
    training: EMTraining


def em_recipes() -> dict[str, str]:
    """Names of the packaged recipes, with what each makes."""
    return {name: read_em_recipe(name).description for name in organisms._packaged("em")}


def read_em_recipe(source: str | Path) -> EMRecipe:
    """Read a recipe: a packaged name, or a TOML file.

    Raises:
        UnknownNameError: No packaged recipe has that name, and it is no path.
        ConfigError: The file cannot be read, or does not fit; everything wrong is listed.
    """
    return organisms._read(source, EMRecipe, folder="em", example="em-rank1")

"""Banks of latents: what an experiment needs of a sparse autoencoder or transcoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from demur.directions import Direction
from demur.errors import ConfigError
from demur.sites import Site

Activation = Literal["relu", "jumprelu", "topk"]
Normalise = Literal["none", "layer_norm", "constant_norm"]

# What sae-lens adds to the standard deviation under `layer_norm`.
_LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True, eq=False)
class Bank:
    """Latents of one sparse autoencoder (or transcoder), all of them or some.

    A latent's activation is `act(u @ encoder + bias)`, with `u` the normalised input less `offset`
    if `centred`. The reconstruction is `scale * (activations @ decoder + offset)` (and the mean
    that `layer_norm` took away). Tensors are float32 and on the CPU until `to` moves them.

    Attributes:
        name: What tables call it.
        site: The tensor that it reads.
        writes: The tensor that its decoder writes to: `site` itself for an autoencoder,
            `mlp_out` of the same block for a transcoder.
        activation: "jumprelu" lets through what lies above `threshold`; "topk" the `k` largest of
            *all* latents of a token, if positive.
        encoder: One row a latent.
        bias: Of the encoder.
        decoder: One row a latent, in residual-stream units per unit of activation.
        offset: The decoder's bias.
        centred: Whether the offset is taken off the input.
        threshold: Of a "jumprelu" bank.
        k: Of a "topk" bank.
        normalise: What is done to each token before encoding: "layer_norm" to mean 0 and variance
            1, "constant_norm" to length sqrt(d_model).
        ids: Which latents of the whole bank these are.
        width: How many the whole bank has.
        largest_norm: Tokens with a larger norm, in residual-stream units, are attention sinks:
            the bank was not made for them. They activate nothing and are never edited.
        whole: The bank that this one was cut from, where a token's activations need it ("topk").
        about: Where it comes from, and what it was trained on.
    """

    name: str
    site: Site
    encoder: Float[Tensor, "latent d_model"]
    bias: Float[Tensor, " latent"]
    decoder: Float[Tensor, "latent d_model"]
    offset: Float[Tensor, " d_model"]
    ids: Int[Tensor, " latent"]
    width: int
    activation: Activation = "relu"
    writes: Site | None = None
    centred: bool = False
    threshold: Float[Tensor, " latent"] | None = None
    k: int | None = None
    normalise: Normalise = "none"
    largest_norm: float | None = None
    whole: Bank | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.writes is None:
            object.__setattr__(self, "writes", self.site)
        if (self.activation == "jumprelu") != (self.threshold is not None):
            raise ConfigError(
                f"the bank {self.name} is `{self.activation}` and has "
                f"{'no ' if self.threshold is None else ''}thresholds",
                "thresholds belong to `jumprelu`, and to nothing else",
            )
        if (self.activation == "topk") != (self.k is not None):
            raise ConfigError(
                f"the bank {self.name} is `{self.activation}` and has k = {self.k}",
                "`k` belongs to `topk`, and to nothing else",
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        held = f"{len(self)} of {self.width}" if len(self) < self.width else f"{self.width}"
        return f"Bank({self.name}, {self.site}, {held} latents, {self.activation})"

    @property
    def d_model(self) -> int:
        """Width of what it writes."""
        return int(self.decoder.shape[1])

    @property
    def is_transcoder(self) -> bool:
        """Whether it reads one tensor and writes to another."""
        return self.writes != self.site

    # Reading -----------------------------------------------------------------------------------

    def usable(self, x: Float[Tensor, "*row d_model"]) -> Bool[Tensor, "*row"]:
        """Which tokens the bank was made for; all but attention sinks."""
        if self.largest_norm is None:
            return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        return x.detach().float().norm(dim=-1) <= self.largest_norm

    def scale(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row one"]:
        """How far one unit of activation moves a token, per unit of decoder."""
        wide = _widen(x)
        if self.normalise == "layer_norm":
            return wide.std(dim=-1, keepdim=True)
        if self.normalise == "constant_norm":
            return wide.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return torch.ones_like(wide[..., :1])

    def inputs(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """What the encoder sees of tokens: normalised, and less the offset if `centred`."""
        wide = _widen(x)
        if self.normalise == "layer_norm":
            centred = wide - wide.mean(dim=-1, keepdim=True)
            wide = centred / (centred.std(dim=-1, keepdim=True) + _LAYER_NORM_EPS)
        elif self.normalise == "constant_norm":
            wide = wide * (x.shape[-1] ** 0.5 / wide.norm(dim=-1, keepdim=True))
        return wide - self.offset.to(wide) if self.centred else wide

    def before(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row latent"]:
        """Activations before the activation function."""
        seen = self.inputs(x)
        return seen @ self.encoder.to(seen).T + self.bias.to(seen)

    def encode(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row latent"]:
        """Activations of the latents, in the bank's own units; never negative.

        A bank cut from a "topk" one runs the whole encoder to know which latents are among the k
        largest of a token.
        """
        raw = self.before(x)
        kept = raw.clamp_min(0.0)
        if self.threshold is not None:
            kept = kept * (raw > self.threshold.to(raw))
        elif self.k is not None:
            every = raw if self.whole is None else self.whole.before(x)
            least = every.topk(min(self.k, every.shape[-1]), dim=-1).values[..., -1:]
            # The product of a slice rounds differently: what is as large as the k-th stays.
            kept = kept * (raw >= least - 1e-5 * least.abs())
        return kept * self.usable(x).unsqueeze(-1).to(kept)

    def decode(
        self, activations: Float[Tensor, "*row latent"], x: Float[Tensor, "*row d_model"]
    ) -> Float[Tensor, "*row d_model"]:
        """What the latents make of a token; `x` gives the scale that it had."""
        out = activations @ self.decoder.to(activations) + self.offset.to(activations)
        out = out * self.scale(x).to(out)
        if self.normalise == "layer_norm":
            out = out + _widen(x).mean(dim=-1, keepdim=True).to(out)
        return out

    # Cutting -----------------------------------------------------------------------------------

    def sliced(self, ids: Sequence[int] | Int[Tensor, " n"]) -> Bank:
        """The bank with some latents only, by their numbers in the whole bank, in this order.

        Raises:
            ConfigError: A latent is not in the bank.
        """
        wanted = torch.as_tensor(ids, dtype=torch.long)
        where = {int(one): place for place, one in enumerate(self.ids.tolist())}
        missing = [one for one in wanted.tolist() if one not in where]
        if missing:
            raise ConfigError(
                f"{self.name} holds no latent {missing[0]}",
                f"it holds {len(self)} of {self.width}; numbers count from 0",
            )
        rows = torch.tensor([where[one] for one in wanted.tolist()], dtype=torch.long)
        whole = (self.whole or self) if self.k is not None else None
        return replace(
            self,
            encoder=self.encoder[rows],
            bias=self.bias[rows],
            decoder=self.decoder[rows],
            threshold=None if self.threshold is None else self.threshold[rows],
            ids=wanted,
            whole=whole,
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Bank:
        """The bank on another device."""

        def moved(one: Tensor | None) -> Tensor | None:
            return None if one is None else one.to(device, dtype)

        return replace(
            self,
            encoder=moved(self.encoder),
            bias=moved(self.bias),
            decoder=moved(self.decoder),
            offset=moved(self.offset),
            threshold=moved(self.threshold),
            # Of the whole only the encoder is asked; its decoder may be a placeholder.
            whole=None if self.whole is None else self.whole._encoder_to(device, dtype),
        )

    def _encoder_to(self, device: torch.device | str, dtype: torch.dtype | None) -> Bank:
        return replace(
            self,
            encoder=self.encoder.to(device, dtype),
            bias=self.bias.to(device, dtype),
            offset=self.offset.to(device, dtype),
        )

    def direction(self, latent: int, *, position: int = -1) -> Direction:
        """What a latent writes, as a direction at `writes`; its norm is that of the decoder row."""
        assert self.writes is not None
        row = self.sliced([latent]).decoder[0]
        return Direction.from_vector(
            row, site=self.writes, position=position, recipe=f"latent {latent} of {self.name}"
        )


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

"""Which heads and MLPs write a direction.

The residual stream is a sum: the embedding, what each head writes, what each MLP writes, and the
biases behind the heads. So the difference of two conditions along a direction is exactly the sum of
what each component contributes to it, with nothing left over; `AttributionRow.errors` says how
exactly on this model. That a component writes a direction does not say that a behaviour needs it:
see `demur.compare.patching`.

References:
    Elhage et al. 2021, "A mathematical framework for transformer circuits".
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from demur.compare.contrasts import ANSWER, Contrast, place_name, resampled
from demur.compare.rows.circuits import (
    AttributionRow,
    ComponentKind,
    ComponentRow,
)
from demur.directions import Direction
from demur.errors import (
    ConfigError,
    NonFiniteError,
    TemplateError,
    TooFewPromptsError,
)
from demur.models import Model
from demur.models.tokens import Conversation
from demur.progress import Progress
from demur.sites import Site, Span
from demur.stats import FEW, Estimate, bootstrap_tails

_DRAWS = 1000


# Components --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Component:
    """Something that is summed to the residual stream.

    Attributes:
        layer: Block from 0; None for the embedding.
        kind: See `demur.compare.rows.circuits.ComponentKind`.
        head: Number within the block; None for what is no head.
    """

    layer: int | None
    kind: ComponentKind
    head: int | None = None

    @property
    def name(self) -> str:
        """`embed`, `12.head3`, `12.attn`, `12.attn_bias` or `12.mlp`."""
        if self.layer is None:
            return "embed"
        tail = {"head": f"head{self.head}", "bias": "attn_bias"}.get(self.kind, self.kind)
        return f"{self.layer}.{tail}"


def components(model: Model, site: Site | None = None) -> tuple[Component, ...]:
    """Everything that is summed to the stream at a site, in the order in which it is written.

    Heads are components of their own where their writes are separable, which they are not in
    families with a norm behind attention.

    Args:
        model: The model.
        site: Of the stream; None is the output of the last block.

    Raises:
        ConfigError: The site is no tensor of the stream.
    """
    found = [Component(None, "embed")]
    for layer in range(_blocks_before(model, site)):
        if model.family.linear_writes:
            found += [Component(layer, "head", head) for head in range(model.n_heads)]
            if model.head_weights(layer)[1] is not None:
                found.append(Component(layer, "bias"))
        else:
            found.append(Component(layer, "attn"))
        found.append(Component(layer, "mlp"))
    return tuple(found)


def _blocks_before(model: Model, site: Site | None) -> int:
    if site is None:
        return model.n_layers
    if site.kind not in ("resid_pre", "resid_post") or not 0 <= site.layer < model.n_layers:
        raise ConfigError(
            f"{site} is no tensor of the stream of {model.name}",
            f"give a site like 3.resid_pre, in blocks 0 to {model.n_layers - 1}",
        )
    return site.layer + (site.kind == "resid_post")


# Direct attribution ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Writes:
    """What every component writes along directions, row by row.

    Attributes:
        components: What is summed to the stream at `site`.
        site: Where the sum is taken.
        position: Of the token; `ANSWER` for the mean over an answer's tokens.
        names: Of the directions.
        values: In residual-stream units, float64, on the CPU.
        stream: Of the stream itself: what the sum over components must give.
        model: Fingerprint.
    """

    components: tuple[Component, ...]
    site: Site
    position: int
    names: tuple[str, ...]
    values: Float[Tensor, "direction component row"]
    stream: Float[Tensor, "direction row"]
    model: str

    def __len__(self) -> int:
        return self.values.shape[2]


@torch.no_grad()
def written(
    model: Model,
    prompts: Sequence[str | Conversation],
    directions: Mapping[str, Direction],
    *,
    site: Site,
    position: int = -1,
    replies: Sequence[str] | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Writes:
    """Read what each component writes along directions, at one token or over an answer.

    Only numbers are kept, no vector per component. Sums are taken in float64 of what the model
    computed in its own data type. Edits in force are respected.

    Args:
        model: The model.
        prompts: User messages, or conversations.
        directions: By name; each of this very tensor of the stream.
        site: A tensor of the stream.
        position: Token index from the end of the prompt, -1 the last; of no meaning with replies.
        replies: Answers, one a prompt, over whose tokens means are taken, each answer weighing the
            same.
        batch_size: Most rows of a pass; results do not depend on it.
        progress: Called with the number of rows done since the last call.

    Raises:
        ConfigError: The site is no tensor of the stream, or a direction is of another one.
        TooFewPromptsError: There are no prompts, or one is shorter than `position` asks for.
        TemplateError: A reply is empty.
        NonFiniteError: Something that was read is NaN or infinite.
    """
    parts = components(model, site)
    units = _units(model, directions, site)
    if not prompts:
        raise TooFewPromptsError("there are no prompts to read", "give one or more")
    if replies is not None and (len(replies) != len(prompts) or not all(map(str.strip, replies))):
        raise TemplateError(
            f"{len(prompts)} prompts have {len([r for r in replies if r.strip()])} replies with "
            "text",
            "give one for each",
        )
    whole = model.encode(prompts, replies)
    taker = _Taker(model, units, position if replies is None else None, parts, len(prompts))
    with ExitStack() as undo:
        undo.enter_context(model.prefix_kept())
        if replies is None and position < -int((whole.ends - whole.shared).min()):
            undo.enter_context(model.whole_rows())  # It reaches into the shared prefix.
        taker.listen(undo, site)
        for index in whole.passes(tokens=model.tokens_per_pass, rows=batch_size):
            taker.index = index
            model.read(whole.rows(index))
            if progress is not None:
                progress(len(index))
    if not bool(torch.isfinite(taker.sums).all()):
        raise NonFiniteError(
            f"what components of {model.name} write holds NaN or infinity",
            "try `--dtype float32`; the checkpoint may also be damaged",
        )
    at = ANSWER if replies is not None else position
    return Writes(parts, site, at, tuple(directions), taker.sums, taker.stream, model.fingerprint)


class _Taker:
    """Takes coordinates of everything that is written along directions, pass after pass.

    Attributes:
        sums: Of components, (direction, component, row), float64.
        stream: Of the stream, (direction, row), float64.
        index: Which rows the current pass works on.
    """

    def __init__(
        self,
        model: Model,
        units: Float[Tensor, "direction d_model"],
        position: int | None,
        parts: Sequence[Component],
        rows: int,
    ) -> None:
        self.model, self.units, self.position = model, units, position
        self.places = {part: i for i, part in enumerate(parts)}
        self.blocks = len({part.layer for part in parts} - {None})
        self.sums = torch.zeros(len(units), len(parts), rows, dtype=torch.float64)
        self.stream = torch.zeros(len(units), rows, dtype=torch.float64)
        self.index: list[int] = []

    def listen(self, undo: ExitStack, site: Site) -> None:
        """Set hooks at every component and at the site, to be taken away by `undo`."""
        model = self.model
        self._on(undo, Site(0, "resid_pre"), Component(None, "embed"))
        for layer in range(self.blocks):
            if model.family.linear_writes:
                weights, bias = model.head_weights(layer)
                readers = torch.einsum("hkd,nd->nhk", weights.to("cpu", torch.float64), self.units)
                take = partial(self._heads, layer=layer, readers=readers)
                undo.callback(model.intercept_heads(layer, take))
                if bias is not None:
                    own = self.units @ bias.to("cpu", torch.float64)
                    self.sums[:, self.places[Component(layer, "bias")]] = own.unsqueeze(1)
            else:
                self._on(undo, Site(layer, "attn_out"), Component(layer, "attn"))
            self._on(undo, Site(layer, "mlp_out"), Component(layer, "mlp"))
        undo.callback(model.intercept(site, self._stream))

    def _on(self, undo: ExitStack, site: Site, part: Component) -> None:
        undo.callback(self.model.intercept(site, partial(self._part, place=self.places[part])))

    def _part(self, x: Tensor, place: int) -> Tensor:
        if (picked := self._rows(x)) is not None:
            self.sums[:, place, self.index] = self.units @ picked.T
        return x

    def _heads(self, x: Tensor, layer: int, readers: Tensor) -> Tensor:
        if (picked := self._rows(x)) is not None:
            own = picked.reshape(len(x), readers.shape[1], -1)
            first = self.places[Component(layer, "head", 0)]
            found = torch.einsum("rhk,nhk->nhr", own, readers)
            self.sums[:, first : first + readers.shape[1], self.index] = found
        return x

    def _stream(self, x: Tensor) -> Tensor:
        if (picked := self._rows(x)) is not None:
            self.stream[:, self.index] = self.units @ picked.T
        return x

    def _rows(self, x: Tensor) -> Float[Tensor, "row width"] | None:
        """One vector a row, float64; None while the shared prefix is computed."""
        chunk = self.model.chunk
        if chunk is None or chunk.is_prefix:
            return None
        if self.position is None:
            wide = torch.promote_types(x.dtype, torch.float32)
            mask = chunk.spans[Span.RESPONSE].to(x.device, wide)
            picked = torch.einsum("rt,rtd->rd", mask, x.to(wide)) / mask.sum(1, keepdim=True)
            return picked.to("cpu", torch.float64)
        columns = chunk.ends + self.position
        if bool((columns < 0).any()):
            raise TooFewPromptsError(
                f"a prompt is shorter than position {self.position} asks for",
                "read a later position",
            )
        return x[torch.arange(len(x)), columns.to(x.device)].to("cpu", torch.float64)


def _units(
    model: Model, directions: Mapping[str, Direction], site: Site
) -> Float[Tensor, "direction d_model"]:
    here = _blocks_before(model, site)
    for name, one in directions.items():
        # The output of a block is the input of the next.
        if one.site != site and (
            one.site.kind not in ("resid_pre", "resid_post")
            or _blocks_before(model, one.site) != here
        ):
            raise ConfigError(
                f"`{name}` is a direction of {one.site}, contributions are asked for at {site}",
                "contributions add up to a direction at the tensor it was estimated at only",
            )
    if not directions:
        raise ConfigError("there is no direction to attribute", "give one or more")
    rows = torch.stack([one.unit.double() for one in directions.values()])
    return torch.nn.functional.normalize(rows, dim=1)


@dataclass(frozen=True, slots=True, eq=False)
class Circuit:
    """One number per component, and how it scatters.

    Attributes:
        name: As tables call it.
        components: What the numbers are of.
        values: Signed contributions or effects.
        drawn: The same from resampled rows; None where there are none.
    """

    name: str
    components: tuple[Component, ...]
    values: Float[np.ndarray, " component"]
    drawn: Float[np.ndarray, "draw component"] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Attribution:
    """The difference of two conditions along directions, as a sum over components.

    Attributes:
        positive: The condition that the difference points to.
        negative: The other.
        paired: Whether row i of both belongs to one item.
        clusters: Of the rows of both, drawn together.
    """

    positive: Writes
    negative: Writes
    paired: bool
    clusters: tuple[tuple[Hashable, ...], tuple[Hashable, ...]]

    @property
    def components(self) -> tuple[Component, ...]:
        """What the differences are sums over."""
        return self.positive.components

    @property
    def names(self) -> tuple[str, ...]:
        """Of the directions."""
        return self.positive.names

    def _direction(self, name: str) -> int:
        if name not in self.names:
            raise ConfigError(
                f"nothing was attributed to `{name}`", f"there are: {', '.join(self.names)}"
            )
        return self.names.index(name)

    def values(self, name: str) -> Float[np.ndarray, " component"]:
        """Contribution of each component to a direction, residual-stream units."""
        i = self._direction(name)
        return (self.positive.values[i].mean(1) - self.negative.values[i].mean(1)).numpy()

    def total(self, name: str) -> float:
        """The whole difference along the direction, as the stream itself shows it."""
        i = self._direction(name)
        return float(self.positive.stream[i].mean() - self.negative.stream[i].mean())

    def error(self, name: str) -> float:
        """|sum of contributions - total| / largest of |total| and what components contribute."""
        values, total = self.values(name), self.total(name)
        size = max(abs(total), float(np.abs(values).max()))
        return abs(float(values.sum()) - total) / size if size > 0 else 0.0

    def drawn(
        self, *, draws: int = _DRAWS, seed: int
    ) -> dict[str, Float[np.ndarray, "draw component"]]:
        """Contributions to each direction on resampled clusters of rows; draws belong together."""

        def rows(one: Writes) -> Tensor:
            return one.values.permute(2, 0, 1).reshape(len(one), -1)

        sides = (rows(self.positive), rows(self.negative))
        about: dict[str, Any] = {"site": self.positive.site, "position": self.positive.position}
        if self.paired:
            whole = Contrast.of_pairs("components", *sides, clusters=self.clusters[0], **about)
        else:
            whole = Contrast.of_classes("components", *sides, clusters=self.clusters, **about)
        (found,) = resampled([whole], draws=draws, seed=seed)
        apart = found.reshape(draws, len(self.names), len(self.components)).numpy()
        return {name: apart[:, i] for i, name in enumerate(self.names)}

    def circuit(self, name: str, *, draws: int = _DRAWS, seed: int) -> Circuit:
        """Contributions to one direction, to be compared with others."""
        return Circuit(
            name, self.components, self.values(name), self.drawn(draws=draws, seed=seed)[name]
        )

    def table(self, *, draws: int = _DRAWS, seed: int) -> AttributionRow:
        """All contributions with intervals over clusters of rows.

        Raises:
            TooFewPromptsError: A side has fewer than two rows or clusters.
        """
        drawn = self.drawn(draws=draws, seed=seed)
        n = len(self.positive) + (0 if self.paired else len(self.negative))
        groups = len(set(self.clusters[0]) | set(self.clusters[1]))
        values = {name: self.values(name) for name in self.names}
        totals = {name: self.total(name) for name in self.names}
        fewest = min(len(set(side)) for side in self.clusters)
        ends = {
            name: np.quantile(drawn[name], bootstrap_tails(fewest), axis=0) for name in self.names
        }
        method = f"bootstrap 95% over {groups} groups" + (
            f", approximate below {FEW}" if fewest < FEW else ""
        )

        def row(i: int, part: Component) -> ComponentRow:
            return ComponentRow(
                part.name,
                part.layer,
                part.kind,
                part.head,
                {
                    name: Estimate(
                        float(values[name][i]),
                        float(ends[name][0, i]),
                        float(ends[name][1, i]),
                        n,
                        method,
                    )
                    for name in self.names
                },
                {
                    name: float(values[name][i] / totals[name]) if totals[name] else None
                    for name in self.names
                },
            )

        return AttributionRow(
            str(self.positive.site),
            place_name(self.positive.position),
            len(self.positive),
            len(self.negative),
            self.paired,
            totals,
            {name: self.error(name) for name in self.names},
            tuple(row(i, part) for i, part in enumerate(self.components)),
        )


def direct(
    positive: Writes,
    negative: Writes,
    *,
    paired: bool = False,
    clusters: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
) -> Attribution:
    """Attribute a difference of two conditions to components.

    The sum over components is the difference along the direction; for the direction of that very
    difference it is its length. Two models are two conditions as well: an organism and its base on
    the same answers, in pairs.

    Args:
        positive: The condition that the difference points to.
        negative: The other, along the same directions at the same place.
        paired: Whether row i of both belongs to one item.
        clusters: Of the rows of both sides, drawn together; None: each row, or each pair, alone.

    Raises:
        ConfigError: The two were read at other places, along other directions or of models with
            other components; or pairs are not in pairs.
    """
    for what in ("components", "site", "position", "names"):
        one, two = getattr(positive, what), getattr(negative, what)
        if one != two:
            shown = "" if what == "components" else f": {one} and {two}"
            raise ConfigError(
                f"the two conditions differ in their {what}{shown}",
                "read both at one place, along the same directions",
            )
    if paired and len(positive) != len(negative):
        raise ConfigError(f"{len(positive)} rows and {len(negative)} are no pairs", "give pairs")
    if clusters is None:
        own = tuple(range(len(positive)))
        other = own if paired else tuple(("-", i) for i in range(len(negative)))
        return Attribution(positive, negative, paired, (own, other))
    return Attribution(positive, negative, paired, (tuple(clusters[0]), tuple(clusters[1])))

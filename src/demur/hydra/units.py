"""What can be read and set: directions, heads and MLPs, latents. One protocol for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from demur.causal import stable_seed
from demur.compare.attribution import Component
from demur.compare.patching import patchable
from demur.errors import ConfigError, DegenerateVectorError
from demur.features.bank import Bank
from demur.hydra.bed import Bed, Record
from demur.models import Model
from demur.sites import Site

OpKind = Literal["zero", "mean", "resample", "hold", "inject"]
ABLATIONS: tuple[OpKind, ...] = ("mean", "zero", "resample")
# A unit that is all but silent on the reference would have any noise count as a large rise.
_LEAST_SCALE = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """What becomes of units.

    Attributes:
        kind: "zero": nothing is written along the unit; "mean": its mean over harmless prompts at
            the same token; "resample": what it is on a harmless prompt drawn for each row; "hold":
            what it was in another arm; "inject": `gamma` times the 99th percentile of its activity
            on harmful prompts, which for a component, whose output is a vector, is the harmless
            mean plus its mean shift on harmful prompts, as many times as brings its activity there
            (once if harm does not raise its activity).
        gamma: Of "inject".
        record: Of "hold": the arm, on the same bed, with activity and outputs.
        seed: Draws prompts for "resample".
        spin: Moves each token as far as the operation would, but along a random direction that this
            seed draws; None moves it as it says.
        spread: Where the random direction comes from: "covariance", that of the stream at the
            block over harmless prompts, or "isotropic".
    """

    kind: OpKind = "mean"
    gamma: float = 0.0
    record: Record | None = None
    seed: int = 0
    spin: int | None = None
    spread: Literal["covariance", "isotropic"] = "covariance"


Edit: TypeAlias = tuple[Sequence[int], Op]
"""Numbers of units, and what becomes of them."""


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """What units do on the prompts that they are compared with.

    Attributes:
        harmful: The clean run on harmful prompts.
        harmless: The clean run on harmless prompts: gives means and donors.
        length: By unit: how far one unit of activity moves a token.
        scale: By unit: 99th percentile of what is not zero in the size of its activity, over tokens
            of harmful prompts; at least a twentieth of what large units have.
        high: By unit: 99th percentile of its activity over harmful prompts, above 0.
        mass: By unit: how far ablating it to the mean moves a token of a harmful prompt on average,
            in residual-stream units.
    """

    harmful: Record
    harmless: Record
    length: Float[np.ndarray, " unit"]
    scale: Float[np.ndarray, " unit"]
    high: Float[np.ndarray, " unit"]
    mass: Float[np.ndarray, " unit"]


@runtime_checkable
class Units(Protocol):
    """Units of one kind, ordered by depth.

    Positive activity is what units do on prompts that are refused.
    """

    kind: str
    names: tuple[str, ...]
    layers: tuple[int, ...]
    orders: tuple[int, ...]
    """2 x block for attention, one more for the MLP or the block's output."""
    reference: Reference

    def reading(self, bed: Bed, first: int = 0) -> AbstractContextManager[Tensor]:
        """Have units of blocks from `first` on read into a tensor, (unit, prompt, place)."""
        ...

    def editing(self, bed: Bed, ids: Sequence[int], op: Op) -> AbstractContextManager[None]:
        """Inside, an operation acts on units at the bed's tokens."""
        ...

    def shuffled(self, seed: int) -> Units:
        """The same kind of units made from shuffled labels; itself if labels do not make them."""
        ...


def ablate(
    units: Units, bed: Bed, ids: Sequence[int], kind: OpKind = "mean", *, seed: int = 0
) -> AbstractContextManager[None]:
    """Inside, units are ablated: to the harmless mean, to zero or to another prompt's values."""
    return units.editing(bed, ids, Op(kind, seed=seed))


def hold(
    units: Units, bed: Bed, ids: Sequence[int], record: Record
) -> AbstractContextManager[None]:
    """Inside, units do what they did in another arm of the same bed."""
    return units.editing(bed, ids, Op("hold", record=record))


def inject(
    units: Units, bed: Bed, ids: Sequence[int], gamma: float
) -> AbstractContextManager[None]:
    """Inside, units are set to `gamma` times the 99th percentile of their activity on harm."""
    return units.editing(bed, ids, Op("inject", gamma=gamma))


@contextmanager
def arm(
    units: Units,
    bed: Bed,
    *edits: Edit,
    frozen_after: int | None = None,
    frozen_norms: bool = False,
) -> Iterator[None]:
    """Inside, several edits act at once, with later writes or norms frozen where wanted.

    Args:
        units: Of all edits.
        bed: The prompts.
        edits: Units and operations; an empty set does nothing.
        frozen_after: Writes of heads and MLPs of a larger order are those of the unedited model.
        frozen_norms: Norms divide by what they divide by in the unedited model.
    """
    with ExitStack() as undo:
        if frozen_norms:
            undo.enter_context(bed.frozen_norms())
        if frozen_after is not None:
            undo.enter_context(bed.frozen_writes(frozen_after))
        for ids, op in edits:
            if len(ids):
                undo.enter_context(units.editing(bed, ids, op))
        yield


def run_arm(
    units: Units,
    bed: Bed,
    *edits: Edit,
    frozen_after: int | None = None,
    frozen_norms: bool = False,
    read: bool = False,
    outputs: bool = False,
) -> Record:
    """Run one arm; see `arm` and `Bed.run`."""
    bed.clean(units)
    with arm(units, bed, *edits, frozen_after=frozen_after, frozen_norms=frozen_norms):
        return bed.run(units if read else None, outputs=outputs)


# What all kinds share ----------------------------------------------------------------------------


def _sizes(
    harmful: Record,
    harmless: Record,
    moved: Float[Tensor, " unit"],
    length: Float[Tensor, " unit"] | None = None,
) -> Reference:
    activity = harmful.activity
    assert activity is not None
    flat = activity.double().flatten(1).numpy()
    scale, high = np.zeros(len(flat)), np.zeros(len(flat))
    for i, row in enumerate(flat):
        size = np.abs(row[row != 0.0])
        scale[i] = np.quantile(size, 0.99) if len(size) else 0.0
        high[i] = np.quantile(row, 0.99) if len(row) else 0.0
    least = _LEAST_SCALE * float(np.quantile(scale, 0.9)) if len(scale) else 0.0
    scale = np.maximum(scale, max(least, 1e-12))
    return Reference(
        harmful,
        harmless,
        np.ones(len(flat)) if length is None else length.double().numpy(),
        scale,
        np.where(high > 0, high, scale),
        moved.double().numpy(),
    )


class _Common:
    """Donors and random directions."""

    model: Model
    reference: Reference

    def _donors(self, bed: Bed, seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(stable_seed(seed, "donors"))
        return torch.randint(len(self.reference.harmless.margin), (bed.n,), generator=rng)

    def _random(self, layer: int, op: Op, like: Tensor) -> Tensor:
        assert op.spin is not None
        rng = torch.Generator().manual_seed(stable_seed(op.spin, f"spin {layer}"))
        held = self.reference.harmless.outputs
        assert held is not None
        stream = held.stream[layer].double()
        if op.spread == "isotropic":
            vector = torch.randn(stream.shape[2], generator=rng, dtype=torch.float64)
        else:
            centred = (stream - stream.mean(0, keepdim=True)).flatten(0, 1)
            weights = torch.randn(len(centred), generator=rng, dtype=torch.float64)
            vector = weights @ centred
        return torch.nn.functional.normalize(vector, dim=0).to(like)

    def _spun(self, change: Tensor, layer: int, op: Op) -> Tensor:
        if op.spin is None:
            return change
        return change.norm(dim=2, keepdim=True) * self._random(layer, op, change)


# Units with one number a token -------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Units of one tensor.

    Attributes:
        ids: Their numbers.
        site: Where they are edited.
        seen: Other tensors that are needed to read them.
    """

    ids: tuple[int, ...]
    site: Site
    seen: Site | None


class _Scalar(_Common):
    """Units that are a number at each token, and move it along one vector each."""

    kind: str
    names: tuple[str, ...]
    layers: tuple[int, ...]
    orders: tuple[int, ...]
    _groups: tuple[_Group, ...]

    def _activity(self, group: _Group, x: Tensor, seen: Tensor | None) -> Tensor:
        """(row, place, unit of the group)."""
        raise NotImplementedError

    def _moves(self, group: _Group, x: Tensor, change: Tensor, seen: Tensor | None) -> Tensor:
        """How far tokens move where activities change: (row, place, d_model)."""
        raise NotImplementedError

    def _zero(self, ids: Sequence[int]) -> Float[Tensor, "unit places"]:
        """Activity at which nothing is written."""
        return torch.zeros(len(ids), 1)

    @contextmanager
    def reading(self, bed: Bed, first: int = 0) -> Iterator[Tensor]:
        """See `Units`."""
        held = torch.zeros(len(self.names), bed.n, bed.places)
        if first > 0:
            before = bed.clean(self).activity
            assert before is not None
            held.copy_(before)
        with ExitStack() as undo:
            for group in self._groups:
                if group.site.layer < first:
                    continue
                seen: dict[str, Tensor] = {}
                if group.seen is not None:
                    note = partial(_note, held=seen)
                    undo.enter_context(bed.watching(group.seen, note))

                def look(
                    x: Tensor, rows: Tensor, group: _Group = group, seen: dict[str, Tensor] = seen
                ) -> None:
                    f = self._activity(group, x, seen.get("x")).float().cpu()
                    held[torch.tensor(group.ids).unsqueeze(1), rows] = f.permute(2, 0, 1)

                undo.enter_context(bed.watching(group.site, look))
            yield held

    @contextmanager
    def editing(self, bed: Bed, ids: Sequence[int], op: Op) -> Iterator[None]:
        """See `Units`."""
        wanted = set(ids)
        target = self._target(bed, op)
        with ExitStack() as undo:
            for group in self._groups:
                mine = [place for place, one in enumerate(group.ids) if one in wanted]
                if not mine:
                    continue
                seen: dict[str, Tensor] = {}
                if group.seen is not None:
                    note = partial(_note, held=seen)
                    undo.enter_context(bed.watching(group.seen, note))

                def act(
                    x: Tensor,
                    rows: Tensor,
                    group: _Group = group,
                    mine: list[int] = mine,
                    seen: dict[str, Tensor] = seen,
                ) -> Tensor:
                    f = self._activity(group, x, seen.get("x"))
                    change = torch.zeros_like(f)
                    goal = target([group.ids[place] for place in mine], rows).to(f)
                    change[..., mine] = goal.permute(1, 2, 0) - f[..., mine]
                    move = self._moves(group, x, change, seen.get("x"))
                    return x + self._spun(move, group.site.layer, op)

                undo.enter_context(bed.editing(group.site, act))
            yield

    def _target(self, bed: Bed, op: Op) -> Callable[[Sequence[int], Tensor], Tensor]:
        """From units and rows to the activity wanted, (unit, row or 1, place or 1)."""
        if op.kind == "zero":
            return lambda ids, _rows: self._zero(ids).unsqueeze(1)
        if op.kind == "inject":
            high = torch.from_numpy(op.gamma * self.reference.high)
            return lambda ids, _rows: high[list(ids)].reshape(-1, 1, 1)
        if op.kind == "hold":
            held = op.record.activity if op.record else None
            if held is None or held.shape[1:] != (bed.n, bed.places):
                raise ConfigError("units are to be held at an arm of other prompts", "run it here")
            return lambda ids, rows: held[torch.tensor(list(ids)).unsqueeze(1), rows]
        harmless = self.reference.harmless.activity
        assert harmless is not None
        if op.kind == "mean":
            means = harmless.mean(1, keepdim=True)
            return lambda ids, _rows: means[list(ids)]
        donors = self._donors(bed, op.seed)
        return lambda ids, rows: harmless[torch.tensor(list(ids)).unsqueeze(1), donors[rows]]


def _note(x: Tensor, _rows: Tensor, *, held: dict[str, Tensor]) -> None:
    held["x"] = x


class DirectionUnits(_Scalar):
    """One dense direction per block: the difference of harmful and harmless means.

    Activity is the coordinate less its harmless mean at that token; ablation sets it to that mean.
    Read from what each block writes ("write", its output less its input) or from the stream that
    leaves it ("stream"). In the stream a direction that persists is carried on from block to block,
    so that what is ablated below is seen to fall above: a rise is then all the more telling.
    """

    def __init__(
        self,
        model: Model,
        harmful: Bed,
        harmless: Bed,
        *,
        of: Literal["write", "stream"] = "write",
        labels: int | None = None,
    ) -> None:
        """Estimate the directions.

        Args:
            model: The model.
            harmful: Prompts of split A.
            harmless: Likewise.
            of: What is read and edited.
            labels: Seed that shuffles labels first, each new class with its share of both; a
                control.

        Raises:
            DegenerateVectorError: The classes do not differ at a block.
        """
        self.model, self._beds = model, (harmful, harmless)
        self.of: Literal["write", "stream"] = of
        self.kind = f"directions of what blocks {'write' if of == 'write' else 'pass on'}"
        n = model.n_layers
        self.names = tuple(f"{layer}.direction" for layer in range(n))
        self.layers = tuple(range(n))
        self.orders = tuple(2 * layer + 1 for layer in range(n))
        self._groups = tuple(
            _Group(
                (layer,),
                Site(layer, "resid_post"),
                Site(layer, "resid_pre") if of == "write" else None,
            )
            for layer in range(n)
        )
        read = {bed: self._vectors(bed) for bed in (harmful, harmless)}
        self.units = torch.zeros(n, model.d_model)
        self._raw_means = torch.zeros(n, harmless.places)
        for layer in range(n):
            pos, neg = read[harmful][layer], read[harmless][layer]
            if labels is not None:
                pos, neg = _shuffled(pos, neg, labels)
            difference = (pos.mean((0, 1)) - neg.mean((0, 1))).double()
            size = float(difference.norm())
            if not 0.0 < size < float("inf"):
                raise DegenerateVectorError(
                    f"the classes differ by a vector of norm {size} at block {layer}",
                    "do the two sets hold the same prompts?",
                )
            self.units[layer] = (difference / size).float()
            self._raw_means[layer] = (neg.double() @ (difference / size)).mean(0).float()
        records = harmful.clean(self), harmless.clean(self)
        assert records[0].activity is not None
        self.reference = _sizes(*records, records[0].activity.abs().mean((1, 2)))

    def _vectors(self, bed: Bed) -> list[Tensor]:
        held = bed.clean().outputs
        assert held is not None
        if self.of == "stream":
            return [held.stream[layer].float() for layer in range(self.model.n_layers)]
        before: dict[int, Tensor] = {}

        def keep(x: Tensor, rows: Tensor) -> None:
            if 0 not in before:
                before[0] = torch.empty(bed.n, *x.shape[1:])
            before[0][rows] = x.float().cpu()

        with bed.watching(Site(0, "resid_pre"), keep):
            bed.run()
        streams = [before[0], *(held.stream[i].float() for i in range(self.model.n_layers))]
        return [after - old for old, after in pairwise(streams)]

    def _activity(self, group: _Group, x: Tensor, seen: Tensor | None) -> Tensor:
        layer = group.ids[0]
        raw = (x if seen is None else x - seen) @ self.units[layer].to(x)
        return (raw - self._raw_means[layer].to(x)).unsqueeze(2)

    def _moves(self, group: _Group, x: Tensor, change: Tensor, seen: Tensor | None) -> Tensor:
        del seen
        return change * self.units[group.ids[0]].to(x)

    def _zero(self, ids: Sequence[int]) -> Float[Tensor, "unit places"]:
        return -self._raw_means[list(ids)]

    def shuffled(self, seed: int) -> DirectionUnits:
        """Directions from shuffled labels."""
        a, b = self._beds
        return DirectionUnits(self.model, a, b, of=self.of, labels=seed)


def _shuffled(pos: Tensor, neg: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    halves = [side[torch.randperm(len(side), generator=rng)] for side in (pos, neg)]
    cut = [len(side) // 2 for side in halves]
    first = torch.cat([side[:n] for side, n in zip(halves, cut, strict=True)])
    second = torch.cat([side[n : 2 * n] for side, n in zip(halves, cut, strict=True)])
    return first, second


class LatentUnits(_Scalar):
    """Latents of banks at one or more blocks; what the bank does not explain stays as it is."""

    def __init__(self, model: Model, banks: Sequence[Bank], harmful: Bed, harmless: Bed) -> None:
        """Read the latents on both classes.

        Args:
            model: The model.
            banks: Cut to the latents of interest; ordered here by depth.
            harmful: Prompts of split A.
            harmless: Likewise.

        Raises:
            ConfigError: Two banks act on one tensor, or there are none.
        """
        self.model, self.kind = model, "latents"
        ordered = sorted(banks, key=lambda bank: _order_of(_writes(bank)))
        places = [_writes(bank) for bank in ordered]
        if not ordered or len(set(places)) < len(places):
            raise ConfigError(
                f"banks act on {', '.join(map(str, places)) or 'nothing'}",
                "give one bank for each tensor, with all latents of it",
            )
        self.banks = tuple(ordered)
        names: list[str] = []
        layers: list[int] = []
        orders: list[int] = []
        groups: list[_Group] = []
        for bank, place in zip(ordered, places, strict=True):
            first = len(names)
            names += [f"{place}/{one}" for one in bank.ids.tolist()]
            layers += [place.layer] * len(bank)
            orders += [_order_of(place)] * len(bank)
            seen = bank.site if bank.is_transcoder else None
            groups.append(_Group(tuple(range(first, len(names))), place, seen))
        self.names, self.layers, self.orders = tuple(names), tuple(layers), tuple(orders)
        self._groups = tuple(groups)
        self._bank_of = {group.ids[0]: bank for group, bank in zip(groups, ordered, strict=True)}
        records = harmful.clean(self), harmless.clean(self)
        activity, other = (record.activity for record in records)
        assert activity is not None
        assert other is not None
        norm = torch.cat([bank.decoder.norm(dim=1) for bank in ordered]).float().cpu()
        gap = (activity - other.mean(1, keepdim=True)).abs().mean((1, 2))
        self.reference = _sizes(*records, gap * norm, norm)

    def _activity(self, group: _Group, x: Tensor, seen: Tensor | None) -> Tensor:
        return self._bank_of[group.ids[0]].encode(x if seen is None else seen)

    def _moves(self, group: _Group, x: Tensor, change: Tensor, seen: Tensor | None) -> Tensor:
        bank = self._bank_of[group.ids[0]]
        read = x if seen is None else seen
        move = (change @ bank.decoder.to(change)) * bank.scale(read).to(change)
        return move * bank.usable(read).unsqueeze(-1).to(move)

    def shuffled(self, seed: int) -> LatentUnits:
        """The same latents: no label was used to make them."""
        del seed
        return self


def _writes(bank: Bank) -> Site:
    assert bank.writes is not None
    return bank.writes


def _order_of(site: Site) -> int:
    late = {"resid_pre": -1, "attn_out": 0, "mlp_out": 1, "resid_post": 1}
    return 2 * site.layer + late[site.kind]


# Heads and MLPs ----------------------------------------------------------------------------------


class ComponentUnits(_Common):
    """Heads (or attention as a whole) and MLPs.

    Activity is what a component writes along the refusal direction, the difference of harmful and
    harmless means of the stream at one block; ablation puts its mean output over harmless prompts
    at the same token in its place, all of it and not only what lies along the direction.
    """

    def __init__(
        self,
        model: Model,
        harmful: Bed,
        harmless: Bed,
        *,
        layer: int | None = None,
    ) -> None:
        """Read outputs and estimate the direction.

        Args:
            model: The model.
            harmful: Prompts of split A.
            harmless: Likewise.
            layer: Block at whose output the direction is estimated; None is two thirds of the way.

        Raises:
            DegenerateVectorError: The classes do not differ there.
        """
        self.model, self.kind = model, "heads and MLPs"
        at = round(2 * (model.n_layers - 1) / 3) if layer is None else layer
        held = [bed.clean().outputs for bed in (harmful, harmless)]
        assert held[0] is not None
        assert held[1] is not None
        pos, neg = held[0].stream[at].double(), held[1].stream[at].double()
        difference = pos.mean((0, 1)) - neg.mean((0, 1))
        size = float(difference.norm())
        if not 0.0 < size < float("inf"):
            raise DegenerateVectorError(
                f"the classes differ by a vector of norm {size} at block {at}",
                "do the two sets hold the same prompts?",
            )
        self.direction = (difference / size).float()
        self.parts = patchable(model)
        self.names = tuple(part.name for part in self.parts)
        self.layers = tuple(_layer_of(part) for part in self.parts)
        self.orders = tuple(2 * _layer_of(p) + (p.kind == "mlp") for p in self.parts)
        self._place = {part: i for i, part in enumerate(self.parts)}
        self._along: dict[int, Tensor] = {}
        if model.family.linear_writes:
            for block in range(model.n_layers):
                weights = model.head_weights(block)[0].float()
                self._along[block] = (weights @ self.direction.to(weights)).cpu()
        records = harmful.clean(self), harmless.clean(self)
        self.reference = _sizes(*records, self._masses(*records))

    def _masses(self, harmful: Record, harmless: Record) -> Float[Tensor, " unit"]:
        own, other = harmful.outputs, harmless.outputs
        assert own is not None
        assert other is not None
        out = torch.zeros(len(self.parts))
        for i, part in enumerate(self.parts):
            layer = _layer_of(part)
            if part.kind == "head":
                assert part.head is not None
                gap = own.heads[layer].float() - other.heads[layer].float().mean(0, keepdim=True)
                weight = self.model.head_weights(layer)[0][part.head].float().cpu()
                gap = self._apart(gap)[:, :, part.head] @ weight
            else:
                mine, theirs = (o.mlp if part.kind == "mlp" else o.attn for o in (own, other))
                gap = mine[layer].float() - theirs[layer].float().mean(0, keepdim=True)
            out[i] = gap.norm(dim=2).mean()
        return out

    def _apart(self, heads: Tensor) -> Tensor:
        return heads.reshape(*heads.shape[:2], self.model.n_heads, -1)

    @contextmanager
    def reading(self, bed: Bed, first: int = 0) -> Iterator[Tensor]:
        """See `Units`."""
        held = torch.zeros(len(self.names), bed.n, bed.places)
        if first > 0:
            before = bed.clean(self).activity
            assert before is not None
            held.copy_(before)

        def heads(x: Tensor, rows: Tensor, *, layer: int, ids: slice) -> None:
            along = torch.einsum("rphd,hd->hrp", self._apart(x), self._along[layer].to(x))
            held[ids, rows] = along.float().cpu()

        def whole(x: Tensor, rows: Tensor, *, one: int) -> None:
            held[one, rows] = (x @ self.direction.to(x)).float().cpu()

        with ExitStack() as undo:
            for layer in range(first, self.model.n_layers):
                if self.model.family.linear_writes:
                    start = self._place[Component(layer, "head", 0)]
                    ids = slice(start, start + self.model.n_heads)
                    look = partial(heads, layer=layer, ids=ids)
                    undo.enter_context(bed.watching(layer, look))
                else:
                    look = partial(whole, one=self._place[Component(layer, "attn")])
                    undo.enter_context(bed.watching(Site(layer, "attn_out"), look))
                look = partial(whole, one=self._place[Component(layer, "mlp")])
                undo.enter_context(bed.watching(Site(layer, "mlp_out"), look))
            yield held

    @contextmanager
    def editing(self, bed: Bed, ids: Sequence[int], op: Op) -> Iterator[None]:
        """See `Units`."""
        by_layer: dict[int, list[Component]] = {}
        for one in ids:
            part = self.parts[one]
            if part.kind == "head":
                by_layer.setdefault(_layer_of(part), []).append(part)
        target = self._target(bed, op)
        with ExitStack() as undo:
            for layer, parts in by_layer.items():
                undo.enter_context(self._editing_heads(bed, layer, parts, op, target))
            for one in ids:
                part = self.parts[one]
                if part.kind == "head":
                    continue
                layer = _layer_of(part)

                def act(x: Tensor, rows: Tensor, part: Component = part) -> Tensor:
                    change = target(part, rows).to(x) - x
                    return x + self._spun(change, _layer_of(part), op)

                kind = "mlp_out" if part.kind == "mlp" else "attn_out"
                undo.enter_context(bed.editing(Site(layer, kind), act))
            yield

    @contextmanager
    def _editing_heads(
        self,
        bed: Bed,
        layer: int,
        parts: list[Component],
        op: Op,
        target: Callable[[Component, Tensor], Tensor],
    ) -> Iterator[None]:
        seen: dict[str, Tensor] = {}
        heads = [part.head for part in parts if part.head is not None]
        weight = self.model.head_weights(layer)[0][heads]

        def act(x: Tensor, rows: Tensor) -> Tensor:
            own = self._apart(seen["x"])[:, :, heads].to(x)
            goal = torch.stack(
                [self._apart(target(part, rows).to(x))[:, :, part.head] for part in parts], dim=2
            )
            change = torch.einsum("rphd,hdm->rpm", goal - own, weight.to(x))
            return x + self._spun(change, layer, op)

        with ExitStack() as undo:
            undo.enter_context(bed.watching(layer, partial(_note, held=seen)))
            undo.enter_context(bed.editing(Site(layer, "attn_out"), act))
            yield

    def _target(self, bed: Bed, op: Op) -> Callable[[Component, Tensor], Tensor]:
        """From a component and rows to what it is to put out; of a head, all its block's heads."""
        if op.kind == "hold":
            held = op.record.outputs if op.record else None
        else:
            held = self.reference.harmless.outputs
        if held is None or (op.kind == "hold" and next(iter(held.mlp.values())).shape[0] != bed.n):
            raise ConfigError(
                "components are to be held at an arm without outputs, or of other prompts",
                "run it here, with `outputs`",
            )
        donors = self._donors(bed, op.seed) if op.kind == "resample" else None

        def find(part: Component, rows: Tensor) -> Tensor:
            table = {"head": held.heads, "mlp": held.mlp, "attn": held.attn}[part.kind]
            values = table[_layer_of(part)]
            if op.kind == "hold":
                return values[rows]
            if op.kind in ("mean", "inject"):
                mean = values.float().mean(0, keepdim=True)
                return mean if op.kind == "mean" else mean + op.gamma * self._shift(part, mean)
            if donors is not None:
                return values[donors[rows]]
            return torch.zeros_like(values[:1])

        return find

    def _shift(self, part: Component, mean: Tensor) -> Tensor:
        """From the harmless mean to where the activity is at its 99th percentile on harm."""
        one, reference = self._place[part], self.reference
        own, theirs = reference.harmful, reference.harmless
        assert own.outputs is not None
        assert own.activity is not None
        assert theirs.activity is not None
        table = {"head": own.outputs.heads, "mlp": own.outputs.mlp, "attn": own.outputs.attn}
        shift = table[part.kind][_layer_of(part)].float().mean(0, keepdim=True) - mean
        low = float(theirs.activity[one].mean())
        rise = float(own.activity[one].mean()) - low
        # Where the shift hardly shows in the activity, no multiple of it is to be trusted.
        times = (float(reference.high[one]) - low) / rise if rise > 0 else 1.0
        return shift * min(max(times, 1.0), 3.0)

    def shuffled(self, seed: int) -> ComponentUnits:
        """The same components: labels only say along which direction they are read."""
        del seed
        return self


def _layer_of(part: Component) -> int:
    assert part.layer is not None
    return part.layer


# Matched random sets -----------------------------------------------------------------------------


def matched(
    units: Units, ids: Sequence[int], op: Op, *, seed: int, spread: float = 3.0
) -> tuple[Edit, ...]:
    """An ablation of as many other units of the same places and about the same mass.

    A unit is stood for by one of the same depth, drawn among those whose mass is within a factor of
    `spread`. Where there is none, as for MLPs, the unit's own tokens move as far as ablating it
    would move them, along a random direction with the covariance of the stream.

    Args:
        units: All of them.
        ids: The set that is to be matched.
        op: What is done to both.
        seed: Of the draws.
        spread: Factor.
    """
    rng = np.random.default_rng(seed)
    mass = units.reference.mass
    taken = set(ids)
    chosen: list[int] = []
    spun: list[int] = []
    for one in ids:
        peers = [
            i
            for i, order in enumerate(units.orders)
            if order == units.orders[one]
            and i not in taken
            and mass[one] / spread <= mass[i] <= mass[one] * spread
        ]
        if peers:
            pick = int(rng.choice(peers))
            taken.add(pick)
            chosen.append(pick)
        else:
            spun.append(one)
    turn = int(rng.integers(2**31))
    out: list[Edit] = []
    if chosen:
        out.append((tuple(chosen), op))
    if spun:
        out.append((tuple(spun), replace(op, spin=turn)))
    return tuple(out)

"""The closed list of what may be done to activations inside an engine, and the count of it.

An engine's process is sent a list of operations as JSON and safetensors and builds the hooks
itself: no code is sent. All of them act on the output of a block, `L.resid_post`, the one place
that engines hand out whole. A program counts what it reached, row by row and layer by layer, and
only once the engine has taken its result; whoever asked compares that with what must have run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from demur.errors import ConfigError, FamilyError, UnknownNameError

Side = Literal["at-least", "at-most"]
_FLUSH = 32  # Prompts whose rows are kept before they are reduced.


def _wide(x: Tensor) -> Tensor:
    # At least float32, as in `demur.interventions`.
    return x.to(torch.promote_types(x.dtype, torch.float32))


def added(
    x: Float[Tensor, "*batch d_model"], vector: Float[Tensor, " d_model"]
) -> Float[Tensor, "*batch d_model"]:
    """Add a vector to every row."""
    wide = _wide(x)
    return (wide + vector.to(wide)).to(x.dtype)


def without(
    x: Float[Tensor, "*batch d_model"], unit: Float[Tensor, " d_model"]
) -> Float[Tensor, "*batch d_model"]:
    """Take the component along a unit vector out of every row."""
    wide = _wide(x)
    along = torch.nn.functional.normalize(unit.to(wide), dim=0)
    return (wide - (wide @ along).unsqueeze(-1) * along).to(x.dtype)


def clamped(
    x: Float[Tensor, "*batch d_model"],
    unit: Float[Tensor, " d_model"],
    level: float,
    side: Side,
) -> Float[Tensor, "*batch d_model"]:
    """Move rows that stand on the wrong side of a level along a unit vector, back to it."""
    wide = _wide(x)
    along = torch.nn.functional.normalize(unit.to(wide), dim=0)
    gap = level - wide @ along
    gap = gap.clamp(min=0) if side == "at-least" else gap.clamp(max=0)
    return (wide + gap.unsqueeze(-1) * along).to(x.dtype)


def lifted(
    x: Float[Tensor, "*batch d_model"],
    axis: Float[Tensor, " d_model"],
    push: Float[Tensor, " d_model"],
    level: float,
    most: float,
) -> Float[Tensor, "*batch d_model"]:
    """Lift the coordinate along `axis` to a level, by moving along `push`, `most` at most."""
    wide = _wide(x)
    gap = (level - wide @ axis.to(wide)).clamp(min=0, max=most)
    return (wide + gap.unsqueeze(-1) * push.to(wide)).to(x.dtype)


# Where a slice stands ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """What a slice of the stream is.

    Attributes:
        row: The number of the request.
        n_prompt: Tokens of its prompt.
        start: Index of the slice's first token, the prompt's first being 0.
    """

    row: int
    n_prompt: int
    start: int


@dataclass(slots=True, eq=False)
class Row:
    """What was done to one request.

    Attributes:
        n_prompt: Tokens of its prompt.
        reached: By layer, how many tokens from the first on were handed back to the engine, without
            a gap.
        fault: The first thing that went wrong.
        gate: What the condition of a hold read, once it was read.
        parts: Rows that were read and not yet counted, by layer and position.
        read: Layers of which this row is counted.
    """

    n_prompt: int
    reached: dict[int, int]
    fault: str | None = None
    gate: float | None = None
    parts: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    read: set[int] = field(default_factory=set)


# Operations -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Addition:
    """Adds a vector to every token."""

    name: ClassVar[str] = "add"
    layer: int
    vector: Float[Tensor, " d_model"]

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks at whose output it acts."""
        return (self.layer,)

    def __call__(self, layer: int, x: Tensor, place: Place, row: Row) -> Tensor:
        """The new slice."""
        del layer, place, row
        return added(x, self.vector)


@dataclass(frozen=True, slots=True, eq=False)
class OutputAblation:
    """Takes a direction out of the outputs of blocks; what attention writes reaches the MLP."""

    name: ClassVar[str] = "ablate-outputs"
    layers: tuple[int, ...]
    unit: Float[Tensor, " d_model"]

    def __call__(self, layer: int, x: Tensor, place: Place, row: Row) -> Tensor:
        """The new slice."""
        del layer, place, row
        return without(x, self.unit)


@dataclass(frozen=True, slots=True, eq=False)
class OneSidedClamp:
    """Holds a coordinate at or above a level, or at or below it."""

    name: ClassVar[str] = "clamp"
    layer: int
    unit: Float[Tensor, " d_model"]
    level: float
    side: Side

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks at whose output it acts."""
        return (self.layer,)

    def __call__(self, layer: int, x: Tensor, place: Place, row: Row) -> Tensor:
        """The new slice."""
        del layer, place, row
        return clamped(x, self.unit, self.level, self.side)


@dataclass(frozen=True, slots=True, eq=False)
class ConditionalHold:
    """Reads one token of the prompt, and holds floors from that token on if it lies beyond.

    Attributes:
        layer: Where the condition is read.
        reader: The condition's axis.
        position: The token, from the end of the prompt.
        threshold: The floors are held if the product with `reader` is greater.
        floors: Layers of the floors, none below `layer`.
        axes: By floor, the coordinate.
        pushes: By floor, the way along which rows move.
        levels: By floor, what the coordinate is lifted to.
        most: By floor, the largest lift.
    """

    name: ClassVar[str] = "hold"
    layer: int
    reader: Float[Tensor, " d_model"]
    position: int
    threshold: float
    floors: tuple[int, ...]
    axes: Float[Tensor, "floor d_model"]
    pushes: Float[Tensor, "floor d_model"]
    levels: tuple[float, ...]
    most: tuple[float, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks at whose output it reads or acts."""
        return tuple(sorted({self.layer, *self.floors}))

    def __call__(self, layer: int, x: Tensor, place: Place, row: Row) -> Tensor | None:
        """The new slice, None for the old one."""
        gate = place.n_prompt + self.position
        at = gate - place.start
        if gate < 0:
            raise ValueError(f"the prompt has {place.n_prompt} tokens, none at {self.position}")
        if layer == self.layer and 0 <= at < len(x):
            row.gate = float((wide := _wide(x[at])) @ self.reader.to(wide))
        first = max(at, 0)
        if layer not in self.floors or first >= len(x):
            return None
        if row.gate is None:
            raise RuntimeError("a token is to be held and the condition was not read")
        if row.gate <= self.threshold:
            return None
        i = self.floors.index(layer)
        held = lifted(x[first:], self.axes[i], self.pushes[i], self.levels[i], self.most[i])
        return torch.cat([x[:first], held])


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """Reduces prompts to mean and spread, as `demur.moments` does; changes nothing."""

    name: ClassVar[str] = "read"
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    rank: int


@dataclass(frozen=True, slots=True, eq=False)
class Fault:
    """Raises at one token: the proof that a hook that raises ends in an error."""

    name: ClassVar[str] = "fault"
    layer: int
    token: int

    @property
    def layers(self) -> tuple[int, ...]:
        """The block at whose output it raises."""
        return (self.layer,)

    def __call__(self, layer: int, x: Tensor, place: Place, row: Row) -> Tensor | None:
        """None; or raises."""
        del layer, row
        if place.start <= self.token < place.start + len(x):
            raise RuntimeError("this hook raises on purpose")
        return None


Operation = Addition | OutputAblation | OneSidedClamp | ConditionalHold | Reading | Fault
OPERATIONS: Mapping[str, type[Operation]] = {kind.name: kind for kind in get_args(Operation)}


# As they are sent -------------------------------------------------------------------------------


def encode(operations: Sequence[Operation]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Operations as JSON, and their tensors by `<number>.<field>`."""
    rows: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for number, one in enumerate(operations):
        row: dict[str, Any] = {"op": one.name}
        for item in fields(one):
            value = getattr(one, item.name)
            if isinstance(value, Tensor):
                tensors[f"{number}.{item.name}"] = value.detach().cpu().float()
            else:
                row[item.name] = list(value) if isinstance(value, tuple) else value
        rows.append(row)
    return rows, tensors


def decode(
    rows: Sequence[Mapping[str, Any]],
    tensors: Mapping[str, Tensor],
    *,
    n_layers: int,
    d_model: int,
) -> tuple[Operation, ...]:
    """Operations of what was sent, each checked.

    Raises:
        UnknownNameError: An operation is not on the list.
        FamilyError: Ablation is asked for, which hooks at outputs of blocks are not.
        ConfigError: Something of an operation is missing, too much, out of range or not finite.
    """
    left = dict(tensors)
    found: list[Operation] = []
    for number, row in enumerate(rows):
        name = row.get("op")
        if name == "ablate":
            raise no_ablation()
        if not isinstance(name, str) or name not in OPERATIONS:
            raise UnknownNameError.among(OPERATIONS, kind="operation of an engine", name=str(name))
        kind = OPERATIONS[name]
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in row.items()
            if key != "op"
        }
        for item in fields(kind):
            if (tensor := left.pop(f"{number}.{item.name}", None)) is not None:
                values[item.name] = tensor
        made = _made(kind, values)
        _check(made, n_layers, d_model)
        found.append(made)
    if left:
        raise _wrong("program", f"has tensors of no operation: {sorted(left)[:4]}")
    if sum(isinstance(one, Reading) for one in found) > 1:
        raise _wrong("read", "is there twice")
    return tuple(found)


def no_ablation() -> FamilyError:
    """Why hooks of an engine do not serve `Ablate`."""
    return FamilyError(
        "an engine's hooks edit outputs of blocks, where the MLP has already read what attention "
        "wrote along the direction: that is not directional ablation",
        "serve a checkpoint with the ablation in its weights (`save` with it), or a LoRA of rank 1 "
        "(`adapters`); `AblateOutputs` is the edit of outputs alone, by its own name",
    )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return _whole(value) or (isinstance(value, float) and math.isfinite(value))


# What JSON may hold for a field, by its annotation; all others are tensors.
_FITS: Mapping[str, Callable[[Any], bool]] = {
    "int": _whole,
    "float": _number,
    "tuple[int, ...]": lambda value: isinstance(value, tuple) and all(map(_whole, value)),
    "tuple[float, ...]": lambda value: isinstance(value, tuple) and all(map(_number, value)),
    "Side": lambda value: value in get_args(Side),
}


def _made(kind: type[Operation], values: Mapping[str, Any]) -> Operation:
    if {item.name for item in fields(kind)} != set(values):
        wanted = [item.name for item in fields(kind)]
        raise _wrong(kind.name, f"has {sorted(values)}, not {wanted}")
    for item in fields(kind):
        value = values[item.name]
        if str(item.type) in _FITS:
            if not _FITS[str(item.type)](value):
                raise _wrong(kind.name, f"has {value!r} for `{item.name}`")
        elif not isinstance(value, Tensor) or not value.is_floating_point():
            raise _wrong(kind.name, f"has no tensor for `{item.name}`")
        elif not bool(torch.isfinite(value).all()):
            raise _wrong(kind.name, f"has NaN or infinity in `{item.name}`")
    return kind(**values)


def _wrong(name: str, what: str) -> ConfigError:
    return ConfigError(f"the engine's `{name}` {what}", "see `demur.engines.programs`")


def _check(one: Operation, n_layers: int, d_model: int) -> None:
    bad = [layer for layer in one.layers if not 0 <= layer < n_layers]
    if bad or not one.layers:
        raise _wrong(one.name, f"acts at blocks {list(one.layers)}; there are 0 to {n_layers - 1}")
    positions: tuple[int, ...] = (-1,)
    if isinstance(one, ConditionalHold):
        positions = (one.position,)
        if min(one.floors, default=-1) < one.layer:
            raise _wrong(one.name, "has floors before its condition is read, or none")
        if not len(one.floors) == len(one.levels) == len(one.most):
            raise _wrong(one.name, "has other numbers of floors, levels and largest lifts")
    elif isinstance(one, Reading):
        positions = one.positions
    if not positions or max(positions) > -1:
        raise _wrong(one.name, f"has positions {list(positions)}; -1 is a prompt's last token")
    for item in fields(one):
        value = getattr(one, item.name)
        if isinstance(value, Tensor):
            wanted: tuple[int, ...] = (d_model,)
            if isinstance(one, ConditionalHold) and item.name in {"axes", "pushes"}:
                wanted = (len(one.floors), d_model)
            if tuple(value.shape) != wanted:
                raise _wrong(one.name, f"wants `{item.name}` of shape {wanted}")


def _moved(one: Any, device: torch.device) -> Any:
    values = {item.name: getattr(one, item.name) for item in fields(one)}
    return replace(one, **{k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)})


# At work ----------------------------------------------------------------------------------------


class Program:
    """Operations at work on some requests, in the order given; a reading comes last.

    Attributes:
        operations: What is done.
        layers: Blocks at whose output anything is done.
        rows: By request, what was done.
    """

    def __init__(self, operations: Sequence[Operation], *, reads: bool = True) -> None:
        """Set up.

        Args:
            operations: What is done.
            reads: Whether a reading is reduced here; False on ranks that hold the same stream.
        """
        self.operations = tuple(one for one in operations if not isinstance(one, Reading))
        self.reading = next((one for one in operations if isinstance(one, Reading)), None)
        self.layers = tuple(sorted({layer for one in operations for layer in one.layers}))
        self.rows: dict[int, Row] = {}
        self._reads = reads
        self._taken: dict[int, list[Tensor]] = {}
        self._moments: dict[int, Any] = {}
        self._here: dict[torch.device, tuple[Any, ...]] = {}

    def run(self, layer: int, x: Float[Tensor, "token d_model"], place: Place) -> Tensor | None:
        """What takes the place of a slice of the stream; None to leave it as it is."""
        row = self.rows.get(place.row)
        if row is None:
            row = self.rows[place.row] = Row(place.n_prompt, dict.fromkeys(self.layers, 0))
        new: Tensor | None = None
        for one in self._on(x.device):
            if layer in one.layers:
                changed = one(layer, x if new is None else new, place, row)
                new = new if changed is None else changed
        if self._reads and self.reading is not None and layer in self.reading.layers:
            self._read(self.reading, layer, x if new is None else new, place, row)
        return new

    def commit(self, layer: int, place: Place, tokens: int) -> None:
        """Count a slice that `run` saw, once the engine has taken the result."""
        row = self.rows[place.row]
        reached = row.reached[layer]
        if place.start > reached:
            self.fault(place.row, f"block {layer} did not see tokens {reached} to {place.start}")
            return
        row.reached[layer] = max(reached, place.start + tokens)

    def fault(self, number: int, what: str) -> None:
        """Remember the first thing that went wrong with a request."""
        row = self.rows.get(number)
        if row is not None and row.fault is None:
            row.fault = what

    def report(self) -> dict[str, Any]:
        """What was reached, as JSON: by request."""
        return {
            str(number): {
                "n_prompt": row.n_prompt,
                "reached": {str(layer): tokens for layer, tokens in row.reached.items()},
                "fault": row.fault,
                "gate": row.gate,
            }
            for number, row in self.rows.items()
        }

    def moments(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What was read, by layer: numbers as JSON, and tensors."""
        head: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for layer in tuple(self._taken):
            self._flush(layer)
        for layer, one in self._moments.items():
            head[str(layer)] = {"n": one.n, "exact": one.exact}
            for name in ("mean", "total", "spread"):
                tensors[f"{layer}.{name}"] = getattr(one, name)
        return head, tensors

    def _on(self, device: torch.device) -> tuple[Any, ...]:
        """The operations with their tensors where the stream is, copied once."""
        if device not in self._here:
            self._here[device] = tuple(_moved(one, device) for one in self.operations)
        return self._here[device]

    def _read(self, reading: Reading, layer: int, x: Tensor, place: Place, row: Row) -> None:
        if layer in row.read:  # Computed again, since its keys and values had to make room.
            return
        for position in reading.positions:
            index = place.n_prompt + position
            if index < 0:
                raise ValueError(f"the prompt has {place.n_prompt} tokens, none at {position}")
            if 0 <= index - place.start < len(x):
                row.parts[layer, position] = x[index - place.start].detach().clone()
        if not all((layer, position) in row.parts for position in reading.positions):
            return
        whole = torch.stack([row.parts.pop((layer, position)) for position in reading.positions])
        row.read.add(layer)
        self._taken.setdefault(layer, []).append(whole)
        if len(self._taken[layer]) >= _FLUSH:
            self._flush(layer)

    def _flush(self, layer: int) -> None:
        """Reduce the rows that are kept of a layer."""
        from demur.activations import Moments
        from demur.sites import Site

        held = self._taken.pop(layer)
        assert self.reading is not None
        if layer not in self._moments:
            site = Site(layer, "resid_post")
            self._moments[layer] = Moments((site,), self.reading.positions, self.reading.rank)
        # Engines run in inference mode, whose tensors could not be updated outside of it.
        with torch.inference_mode(mode=False), torch.no_grad():
            self._moments[layer].update(_wide(torch.stack(held, 1)).cpu().unsqueeze(0))

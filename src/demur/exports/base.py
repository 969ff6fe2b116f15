"""The registry of formats, what each is given, and the record that lies beside every export."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from demur.directions import Direction
from demur.errors import StoreError
from demur.exports.steering import Carried, Steering, name_of
from demur.interventions import Ablate, Add, Intervention, ProjectToMean
from demur.models import Model
from demur.registry import Registry
from demur.sites import Site, Span
from demur.store import atomic_write, known_format, sealed, strict_json, unsealed

FORMAT, RECORD, CARD = "demur-export-1", "demur.json", "README.md"


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What a format is asked to write.

    Attributes:
        model: The model that it is for.
        carried: What is left of the steering, all of which the format carries.
        folder: Where to; exists and is empty.
        source: The sidecar of the direction, as far as there is one.
        about: The record, `demur.json`, without what the format itself adds.
    """

    model: Model
    carried: Carried
    folder: Path
    source: Mapping[str, Any]
    about: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Imported:
    """What an export holds, read from the files that its consumer reads.

    Attributes:
        kind: The format.
        steering: Interventions that do what the export does.
        about: Its record; empty for a file of other tools.
        notes: What the files leave open.
        borrowed: That it was made on another model, where that was asked for.
    """

    kind: str
    steering: Steering
    about: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    borrowed: tuple[str, ...] = ()

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The direction of each intervention."""
        acts = self.steering.acts
        return tuple(act.direction for act in acts if isinstance(act, Ablate | Add | ProjectToMean))


class Exporter(Protocol):
    """One format. Adding one is a module that registers it, named in `demur.exports`."""

    @property
    def carries(self) -> frozenset[type]:
        """Classes of interventions that it carries."""
        ...

    @property
    def spans(self) -> bool:
        """Whether it can be limited to some tokens."""
        ...

    @property
    def exact(self) -> str:
        """In words for the card: how near its consumer's model is to the hooked one."""
        ...

    @property
    def use(self) -> str:
        """For the card: Markdown that says how its consumer loads it."""
        ...

    def write(self, job: Job) -> Mapping[str, Any]:
        """Write the files of the consumer; returns what the record should say beside the rest.

        Raises:
            FamilyError: The model's architecture cannot carry it.
        """
        ...

    def fits(self, path: Path) -> bool:
        """Whether a path without a record looks like this format; opens no more than a header."""
        ...

    def read(self, path: Path, about: Mapping[str, Any]) -> Imported:
        """Read the files of the consumer back.

        Args:
            path: The folder of an export, or a file of another tool.
            about: The record; empty for a file of another tool.

        Raises:
            StoreError: They are damaged, or do not do what the record says.
        """
        ...


exporters: Registry[Exporter] = Registry("export format")


# The record -------------------------------------------------------------------------------------


def describe(act: Intervention) -> dict[str, Any]:
    """An intervention as the record keeps it, all but the numbers of its direction."""
    if not isinstance(act, Ablate | Add | ProjectToMean):
        raise TypeError(f"no export carries a {type(act).__name__}")
    direction = act.direction
    row: dict[str, Any] = {
        "act": name_of(act),
        "site": str(direction.site),
        "position": direction.position,
        "norm": direction.norm,
        "recipe": direction.recipe,
    }
    if isinstance(act, Add | ProjectToMean):
        row["strength"] = act.strength
    if isinstance(act, ProjectToMean):
        row |= {"level": act.level, "at": str(act.site)}
    return row


def act_of(row: Mapping[str, Any], unit: Float[Tensor, " d_model"]) -> Intervention:
    """The intervention of a row of the record, with the direction that the files hold."""
    direction = Direction(
        torch.nn.functional.normalize(unit.double(), dim=0).float(),
        float(row["norm"]),
        Site.parse(row["site"]),
        int(row["position"]),
        str(row["recipe"]),
    )
    if row["act"] == "ablate":
        return Ablate(direction)
    if row["act"] == "add":
        return Add(direction, float(row["strength"]))
    if row["act"] == "project-to-mean":
        level, at = float(row["level"]), Site.parse(row["at"])
        return ProjectToMean(direction, level, at, float(row["strength"]))
    raise ValueError(f"the record names an intervention `{row['act']}`")


def write_record(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the record of an export."""
    atomic_write(folder / RECORD, json.dumps(sealed(about), indent=2, allow_nan=False) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """Read the record of an export.

    Raises:
        StoreError: It is missing or damaged.
    """
    path = folder / RECORD
    try:
        about = strict_json(path.read_text(encoding="utf-8"))
        if not isinstance(about, dict) or not isinstance(about.get("acts", []), list):
            raise ValueError("it lists no interventions")
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} cannot be read: {error}", "`demur export` writes it; export again"
        ) from error
    known_format(
        about.get("format"), path, name="demur-export", what="an export", newest=1,
        again="demur export",
    )  # fmt: skip
    if "files" in about and "blake2b" not in about:
        raise StoreError(f"{path} was changed after it was written", "export it again")
    return unsealed(about, path, again="export it again")


def steering_of(about: Mapping[str, Any], units: Collection[Tensor]) -> Steering:
    """The steering of a record, with a direction for each of its interventions.

    Raises:
        StoreError: The record is damaged.
    """
    try:
        rows = about["acts"]
        acts = tuple(act_of(row, unit) for row, unit in zip(rows, units, strict=True))
        return Steering(acts, tuple(Span(one) for one in about.get("where", ())))
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StoreError(
            f"the record of this export is damaged: {error}", "export it again"
        ) from error


# Additions at outputs of blocks ------------------------------------------------------------------


def summed(carried: Carried, layer_of: Mapping[int, int]) -> dict[int, Float[Tensor, " d_model"]]:
    """What is added at each block's output, float32: `strength * norm * unit`, summed."""
    found: dict[int, Tensor] = {}
    for index, act in enumerate(carried.acts):
        assert isinstance(act, Add)
        vector = act.strength * act.direction.norm * act.direction.unit.double()
        layer = layer_of[index]
        found[layer] = found[layer] + vector if layer in found else vector
    return {layer: vector.float() for layer, vector in sorted(found.items())}


def of_layers(
    layers: Mapping[int, Float[Tensor, " d_model"]],
    about: Mapping[str, Any],
    *,
    kind: str,
    recipe: str,
    notes: tuple[str, ...],
) -> Imported:
    """Additions at outputs of blocks, read back.

    With a record each gets the site, strength and length that it was made with, and its numbers
    must be those of the file; without one each block is an addition of strength 1 at its output.

    Raises:
        StoreError: Record and file do not belong together.
    """
    acts = about.get("acts", ())
    at = [int(layer) for layer in about.get("layers", ())]
    if not about or len(set(at)) < len(at):  # Several in one block are one addition now.
        plain = tuple(
            Add(
                Direction.from_vector(
                    vector, site=Site(layer, "resid_post"), position=-1, recipe=recipe
                )
            )
            for layer, vector in sorted(layers.items())
        )
        return Imported(kind, Steering(plain), about, notes)
    units: list[Tensor] = []
    for row, layer in zip(acts, at, strict=True):
        length = float(row["strength"]) * float(row["norm"])
        vector = layers.get(layer)
        if vector is None or abs(float(vector.norm()) - abs(length)) > 1e-3 * abs(length):
            raise StoreError(
                f"the record names an addition of length {abs(length):.4g} at the output of block "
                f"{layer}, and the file has "
                + ("none" if vector is None else f"one of {float(vector.norm()):.4g}"),
                "the files belong to different exports: export again",
            )
        units.append(vector.double() / length)
    return Imported(kind, steering_of(about, units), about, notes)


def identity(about: Mapping[str, Any]) -> dict[str, Any]:
    """Which model, weights and template something is of."""
    keys = ("model", "revision", "adapter", "fingerprint", "dtype", "template_hash", "load")
    return {key: about[key] for key in keys if key in about}


def of_model(model: Model) -> dict[str, Any]:
    """The same of a loaded model, but for how it was loaded."""
    return {
        "model": model.name,
        "revision": model.revision,
        "adapter": model.adapter,
        "fingerprint": model.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "template_hash": model.template.hash if model.template is not None else None,
    }

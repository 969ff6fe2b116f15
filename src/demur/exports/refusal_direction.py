"""refusal_direction (Arditi et al.): `direction.pt` and its metadata, the input of block l."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demur.directions import Direction
from demur.errors import FamilyError, StoreError
from demur.exports.base import Imported, Job, exporters, steering_of
from demur.exports.files import finite, flat, torch_file
from demur.exports.steering import Steering
from demur.interventions import Ablate
from demur.sites import Site
from demur.store import atomic_write, strict_json

FILE, META = "direction.pt", "direction_metadata.json"


def read_place(file: Path) -> tuple[int, int]:
    """Layer and position of a direction, from the metadata beside it.

    Raises:
        StoreError: They are missing, or tell none.
    """
    place = file.with_name(f"{file.stem}_metadata.json")
    try:
        about = strict_json(place.read_text(encoding="utf-8"))
        layer, position = about["layer"], about["pos"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{place} does not tell layer and position of {file.name}: {error!r}",
            'write {"pos": -1, "layer": 15} into it: a token from the end, a block from 0',
        ) from error
    whole = all(isinstance(one, int) and not isinstance(one, bool) for one in (layer, position))
    if not whole or layer < 0 or position >= 0:
        raise StoreError(
            f"{place} tells layer {layer} and position {position}",
            "a layer counts from 0, a position from the end: -1 is the last token",
        )
    return layer, position


@exporters.register("refusal-direction")
@dataclass(frozen=True, slots=True)
class RefusalDirection:
    """The files of Arditi et al.; what they do with them is ablation."""

    carries: frozenset[type] = frozenset({Ablate})
    spans: bool = False
    exact: str = "exact: the same vector in float64"
    use: str = (
        "Put both files into `pipeline/runs/MODEL` of `refusal_direction` and run its evaluation "
        "from there: `direction.pt` is of the input of block `layer`, at token `pos`."
    )

    def write(self, job: Job) -> Mapping[str, Any]:
        """Write both files.

        Raises:
            FamilyError: The direction is of another tensor than the input of a block.
        """
        if len(job.carried.acts) != 1:
            raise FamilyError("the file holds one direction", "export each on its own")
        (act,) = job.carried.acts
        assert isinstance(act, Ablate)
        direction, site = act.direction, act.direction.site
        if site.kind == "resid_post" and site.layer + 1 < job.model.n_layers:
            site = Site(site.layer + 1, "resid_pre")
        if site.kind != "resid_pre":
            raise FamilyError(
                f"the file counts inputs of blocks, and {site} is none",
                "take a direction at resid_pre",
            )
        file = io.BytesIO()
        torch.save(direction.unit.double() * direction.norm, file)
        atomic_write(job.folder / FILE, file.getvalue())
        meta = {"pos": direction.position, "layer": site.layer}
        atomic_write(job.folder / META, json.dumps(meta) + "\n")
        return {}

    def fits(self, path: Path) -> bool:
        """Whether it is `direction.pt` with metadata, or a folder with it."""
        file = path / FILE if path.is_dir() else path
        beside = file.with_name(f"{file.stem}_metadata.json")
        return file.is_file() and file.suffix == ".pt" and beside.is_file()

    def read(self, path: Path, about: Mapping[str, Any]) -> Imported:
        """Read the direction; it is ablated.

        Raises:
            StoreError: It is damaged, has no metadata, or is all candidates.
        """
        file = path / FILE if path.is_dir() else path
        found = torch_file(file)
        if not isinstance(found, Tensor):
            raise StoreError(
                f"{file} holds a {type(found).__name__}, no tensor", "name the file of a direction"
            )
        vector = flat(file, file.name, found)
        finite(file, vector)
        layer, position = read_place(file)
        if about:
            return Imported("refusal-direction", steering_of(about, [vector]), about)
        direction = Direction.from_vector(
            vector,
            site=Site(layer, "resid_pre"),
            position=position,
            recipe="difference of means, harmful - harmless",
        )
        notes = ("the file does not say which weights and chat template it was read with",)
        return Imported("refusal-direction", Steering((Ablate(direction),)), {}, notes)

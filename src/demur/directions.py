"""A direction: a unit vector in the residual stream that knows where it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from demur.errors import DegenerateVectorError, StoreError
from demur.sites import Site
from demur.store import atomic_write

if TYPE_CHECKING:
    from demur.models import Model


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """A unit vector in the residual stream, and the length it had when it was estimated.

    Attributes:
        unit: Norm 1, float32, on the CPU.
        norm: Length before normalising, in residual-stream units at `site`.
        site: The tensor it was read from.
        position: Token index counted from the end of the prompt; -1 is the last token.
        recipe: Estimator, its options, and the fingerprints of model and prompts.
    """

    unit: Float[Tensor, " d_model"]
    norm: float
    site: Site
    position: int
    recipe: str

    @classmethod
    def from_vector(
        cls, vector: Float[Tensor, " d_model"], *, site: Site, position: int, recipe: str
    ) -> Direction:
        """Make a direction from raw numbers; its sign is the vector's.

        Raises:
            DegenerateVectorError: The vector is zero, NaN or infinite.
        """
        wide = vector.detach().to("cpu", torch.float64)
        norm = wide.norm().item()
        if not 0.0 < norm < float("inf"):  # False for NaN as well.
            raise DegenerateVectorError(
                f"the vector at {site}, position {position}, has norm {norm}",
                "do the two prompt sets share prompts? `demur prompts overlap A B` lists them",
            )
        return cls((wide / norm).float(), norm, site, position, recipe)

    def __neg__(self) -> Direction:
        return replace(self, unit=-self.unit)

    def cosine(self, other: Direction) -> float:
        """Cosine with another direction of the same width, in -1..1."""
        return float(self.unit.double() @ other.unit.double())


def save_direction(direction: Direction, path: Path, *, about: Mapping[str, Any]) -> None:
    """Write `path` (safetensors) and, beside it, the sidecar `<path stem>.json`.

    Args:
        direction: What to save.
        path: Ends in `.safetensors`.
        about: Model id, revision, fingerprint, dtype, template hash, prompt hashes, metrics.

    Raises:
        StoreError: A file could not be written.
    """
    from safetensors.torch import save

    meta = {
        "format": "demur-direction-1",
        "site": str(direction.site),
        "position": direction.position,
        "norm": direction.norm,
        "sign": "points from harmless to harmful; adding it raises refusal",
        "convention": "L.resid_pre is the input of block L, L.resid_post its output, from 0",
        "recipe": direction.recipe,
        **about,
    }
    head = {"demur": json.dumps({key: meta[key] for key in ("format", "site", "position", "norm")})}
    atomic_write(path, save({"direction": direction.unit.contiguous()}, metadata=head))
    atomic_write(path.with_suffix(".json"), json.dumps(meta, indent=2, allow_nan=False) + "\n")


def load_direction(path: Path, model: Model | None = None) -> tuple[Direction, dict[str, Any]]:
    """Read a direction and its sidecar back.

    Args:
        path: The `.safetensors` file.
        model: If given, the direction must have been made on this very model.

    Raises:
        StoreError: A file is missing or damaged, or the direction belongs to another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    sidecar = path.with_suffix(".json")
    try:
        meta = json.loads(sidecar.read_text(encoding="utf-8"))
        unit = load_file(path)["direction"].float()
        direction = Direction(
            unit,
            float(meta["norm"]),
            Site.parse(meta["site"]),
            int(meta["position"]),
            str(meta["recipe"]),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StoreError(
            f"no direction can be read from {path} and {sidecar.name}: {error}",
            "`demur audit` writes both files into its run folder; keep them together",
        ) from error
    if not bool(torch.isfinite(unit).all()) or abs(float(unit.norm()) - 1.0) > 1e-3:
        raise StoreError(
            f"the vector in {path} is not of norm 1", "the file is damaged: make it again"
        )
    if model is not None and meta.get("fingerprint") != model.fingerprint:
        raise StoreError(
            f"{path} was made on {meta.get('model')} ({str(meta.get('fingerprint'))[:12]}), "
            f"not on {model.name} as it is loaded now ({model.fingerprint[:12]})",
            "load the same model, adapter, revision, dtype and system prompt, or pass --any-model",
        )
    return direction, meta

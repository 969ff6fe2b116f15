"""demur's own file: a direction with its sidecar, and what is done with it in the record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demur.directions import load_direction, save_direction
from demur.errors import ConfigError
from demur.exports.base import Imported, Job, exporters, identity, steering_of
from demur.exports.files import header
from demur.exports.steering import Steering
from demur.interventions import Ablate, Add, ProjectToMean

FILE = "direction.safetensors"
_OWN = ("format", "site", "position", "norm", "sign", "convention", "recipe")


@exporters.register("safetensors")
@dataclass(frozen=True, slots=True)
class Native:
    """The direction as demur saves it, with metadata."""

    carries: frozenset[type] = frozenset({Ablate, Add, ProjectToMean})
    spans: bool = True
    exact: str = "exact: the same vector in float32, applied by the same hooks"
    use: str = (
        "```python\n"
        "from demur import applied\n"
        "from demur.exports import read_export\n\n"
        "steering = read_export(FOLDER, model).steering\n"
        "with applied(model, *steering.acts, where=steering.where or None):\n"
        "    model.generate(PROMPTS)\n"
        "```"
    )

    def write(self, job: Job) -> Mapping[str, Any]:
        """Write the direction and its sidecar.

        Raises:
            ConfigError: There are several directions.
        """
        if len(job.carried.acts) != 1:
            raise ConfigError(
                f"a direction file holds one direction, not {len(job.carried.acts)}",
                "export each on its own",
            )
        (act,) = job.carried.acts
        assert isinstance(act, Ablate | Add | ProjectToMean)
        about = {key: value for key, value in job.source.items() if key not in _OWN}
        save_direction(act.direction, job.folder / FILE, about={**about, **identity(job.about)})
        return {}

    def fits(self, path: Path) -> bool:
        """Whether it is a direction file; its sidecar lies beside it."""
        return header(path) == "demur-direction-1"

    def read(self, path: Path, about: Mapping[str, Any]) -> Imported:
        """Read it; a direction without a record is ablated."""
        direction, sidecar = load_direction(path / FILE if path.is_dir() else path)
        if not about:
            return Imported("safetensors", Steering((Ablate(direction),)), sidecar)
        return Imported("safetensors", steering_of(about, [direction.unit]), about)

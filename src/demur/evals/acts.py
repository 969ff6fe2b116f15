"""What is to be evaluated, from files and names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from demur.directions import load_direction
from demur.errors import ConfigError
from demur.interventions import Ablate, Add, Intervention, ProjectToMean
from demur.models import Model
from demur.sites import Site

EditName = Literal["ablate", "add", "clamp"]


@dataclass(frozen=True, slots=True)
class EditSpec:
    """An edit as options name it.

    Attributes:
        path: Of the direction, or of the run folder that holds it.
        edit: `ablate` takes the direction out of every write, `add` adds it at its site, `clamp`
            holds the coordinate there.
        strength: Of `add` in lengths of the direction, negative to take away; of `clamp` the
            coordinate that is held, in the same lengths. `ablate` has none: it takes all.
        site: Where `add` and `clamp` act; None is where the direction was read.
    """

    path: Path
    edit: str = "ablate"
    strength: float | None = None
    site: str | None = None

    def __post_init__(self) -> None:
        if self.edit not in get_args(EditName):
            raise ConfigError(
                f"there is no edit `{self.edit}`", f"choose {', '.join(get_args(EditName))}"
            )
        if self.edit == "ablate" and (self.strength is not None or self.site is not None):
            raise ConfigError(
                "ablation takes all of the direction out of every write",
                "strength and site are for add and clamp",
            )
        if self.site is not None:
            Site.parse(self.site)

    @property
    def file(self) -> Path:
        """The direction's own file."""
        return self.path / "directions.safetensors" if self.path.is_dir() else self.path

    def __str__(self) -> str:
        where = f" at {self.site}" if self.site is not None else ""
        much = {"ablate": "", "add": f" x {self._strength:g}", "clamp": f" at {self._strength:g}"}
        return f"{self.edit} {self.file.name}{much[self.edit]}{where}"

    @property
    def _strength(self) -> float:
        return {"clamp": 0.0}.get(self.edit, 1.0) if self.strength is None else self.strength

    def borrowed(self, model: Model) -> tuple[str, ...]:
        """What a record says of a direction of another model; nothing of one of its own."""
        _, about = load_direction(self.file, model, any_model=True)
        return (about["borrowed"],) if "borrowed" in about else ()

    def act(self, model: Model, *, any_model: bool = False) -> Intervention:
        """The edit itself.

        Args:
            model: That it will be applied to.
            any_model: Take a direction that another model made.

        Raises:
            StoreError: The file cannot be read, or the direction is another model's.
            ConfigError: The direction does not fit the model's shape.
        """
        direction, _ = load_direction(self.file, model, any_model=any_model)
        if self.site is not None:
            direction = replace(direction, site=Site.parse(self.site))
        if len(direction.unit) != model.d_model or direction.site.layer >= model.n_layers:
            raise ConfigError(
                f"the direction is {len(direction.unit)} wide, at {direction.site}; {model.name} "
                f"has {model.n_layers} blocks of width {model.d_model}",
                "take a direction of a model of the same shape",
            )
        if self.edit == "ablate":
            return Ablate(direction)
        if self.edit == "add":
            return Add(direction, self._strength)
        return ProjectToMean(direction, self._strength * direction.norm, direction.site)

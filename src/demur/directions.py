"""A direction: a unit vector in the residual stream that knows where it came from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from demur.errors import ConfigError, DegenerateVectorError, StoreError
from demur.sites import Site
from demur.store import known_format, read_files, write_files

if TYPE_CHECKING:
    import altair as alt

    from demur.models import Model

FORMAT, VERSION = "demur-direction", 1
_AGAIN = "`demur audit` writes both files into its run folder; keep them together"
_DRAWS = 400  # Random directions behind a null band.
_TOP = 40  # Coordinates that are drawn.
_MOST_MARKS = 400  # Prompts of a group that are drawn.


class Readings(Protocol):
    """Rows by site and position; `demur.collect` gives them."""

    def at(self, site: Site, position: int) -> Float[Tensor, "prompt d_model"]:
        """The rows of one site and position."""
        ...


def isotropic_band(d_model: int, level: float = 0.95) -> float:
    """|cosine| that a random direction stays below with probability `level`.

    The square of the cosine of two random directions has the beta distribution with parameters 1/2
    and (d_model - 1) / 2.
    """
    from scipy import stats

    return math.sqrt(float(stats.beta.ppf(level, 0.5, (d_model - 1) / 2)))


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

    def _repr_html_(self) -> str:
        from demur.notebook import number, table

        rows = [
            ("site", str(self.site)),
            ("position", number(self.position, "d")),
            ("norm", f"{number(self.norm)} residual-stream units"),
            ("width", str(len(self.unit))),
            ("recipe", self.recipe or "not recorded"),
        ]
        return table("Direction", rows)

    def plot(
        self,
        others: Mapping[str, Direction]
        | Mapping[str, Readings]
        | Sequence[Direction]
        | None = None,
        *,
        seed: int = 0,
    ) -> alt.LayerChart:
        """Draw it beside other directions, or what activations are along it, as an Altair chart.

            direction.plot({"another site": other})
            direction.plot({"harmful": demur.collect(...), "harmless": demur.collect(...)})

        Args:
            others: Directions: the cosine with each, before the band that holds 95 % of isotropic
                random directions. That band is easy to leave: two directions of one model share
                the few axes along which its activations vary, and `demur.compare` has nulls for
                that. Or activations of two groups or more, at this direction's site and position:
                projections from the mean of all groups, each group's mean with its interval, and
                the band that holds 95 % of the group's means along random directions with the
                covariance within groups. Or nothing: the largest coordinates before those of
                random directions, which tell whether a few of them make up the direction.
            seed: Of the random directions.

        Raises:
            ConfigError: There is none, fewer than two groups, some of each, or another width.
            UnknownNameError: The activations were not read at its site and position.
            TooFewPromptsError: A group has fewer than two prompts.
        """
        if others is None:
            return _coordinates(self, seed)
        if not isinstance(others, Mapping):
            others = {
                f"{i + 1}: {one.site}, position {one.position}": one for i, one in enumerate(others)
            }
        found = {name: one for name, one in others.items() if isinstance(one, Direction)}
        rows = {
            name: one.at(self.site, self.position)
            for name, one in others.items()
            if not isinstance(one, Direction)
        }
        if (found and rows) or not others:
            raise ConfigError(
                f"got {len(found)} directions and activations of {len(rows)} groups",
                "give directions, or activations of two groups or more",
            )
        for name, width in [
            *((name, len(one.unit)) for name, one in found.items()),
            *((name, one.shape[1]) for name, one in rows.items()),
        ]:
            if width != len(self.unit):
                raise ConfigError(
                    f"`{name}` has {width} coordinates, this direction {len(self.unit)}",
                    "compare what was read on one model",
                )
        return _cosines(self, found) if found else _projections(self, rows, seed)


def _random_units(n: int, d_model: int, seed: int) -> Float[Tensor, "n d_model"]:
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n, d_model, generator=rng, dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=1)


def _coordinates(direction: Direction, seed: int) -> alt.LayerChart:
    from demur.notebook import number, ranked

    size, index = direction.unit.double().abs().sort(descending=True)
    null = _random_units(_DRAWS, len(size), seed).abs().sort(dim=1, descending=True).values
    low, high = (null.quantile(q, dim=0).tolist() for q in (0.025, 0.975))
    rows = [
        {
            "rank": i + 1,
            "value": value,
            "low": low[i],
            "high": high[i],
            "tip": f"coordinate {at}: {number(float(direction.unit[at]), signed=True)}; of random "
            f"directions {number(low[i])} to {number(high[i])}",
        }
        for i, (value, at) in enumerate(
            zip(size[:_TOP].tolist(), index[:_TOP].tolist(), strict=True)
        )
    ]
    return ranked(rows, title="|coordinate|; band: 95 % of random directions")


def _cosines(direction: Direction, others: Mapping[str, Direction]) -> alt.LayerChart:
    from demur.notebook import cosines, drawn, number

    band = isotropic_band(len(direction.unit))
    rows = []
    for name, one in others.items():
        value = direction.cosine(one)
        said = f"{one.site}, position {one.position}: cosine {number(value, '.3f', signed=True)}"
        rows.append({"name": drawn(name), "value": value, "tip": f"{drawn(name)}, {said}"})
    title = f"cosine; band: 95 % of random directions, within {number(band, '.2f')}"
    return cosines(rows, band, title=title)


def _projections(
    direction: Direction, rows: Mapping[str, Float[Tensor, "_ d_model"]], seed: int
) -> alt.LayerChart:
    from demur.notebook import drawn, groups, number, said
    from demur.stats import mean

    if len(rows) < 2:
        raise ConfigError("got activations of one group", "give those of two groups or more")
    wide = {name: one.double() for name, one in rows.items()}
    centres = {name: one.mean(0) for name, one in wide.items()}
    centre = torch.stack(list(centres.values())).mean(0)
    within = torch.cat([one - centres[name] for name, one in wide.items()])
    rng = torch.Generator().manual_seed(seed)
    weights = torch.randn(_DRAWS, len(within), generator=rng, dtype=torch.float64)
    null = torch.nn.functional.normalize(weights @ within, dim=1)
    points, means = [], []
    for name, one in wide.items():
        along = (one - centre) @ direction.unit.double()
        seen = mean(along.numpy())
        reach = float((null @ (centres[name] - centre)).abs().quantile(0.95))
        # Evenly through the order, so that the picture is that of all prompts.
        step = torch.linspace(0, len(along) - 1, min(len(along), _MOST_MARKS)).long()
        points += [{"group": drawn(name), "value": v} for v in along.sort().values[step].tolist()]
        means.append(
            {
                "group": drawn(name),
                "value": seen.value,
                "low": seen.low,
                "high": seen.high,
                "null_low": -reach,
                "null_high": reach,
                "tip": f"{drawn(name)}: mean {said(seen)} ({seen.method}); along 95 % of random "
                f"directions within {number(reach)}",
            }
        )
    title = "projection, from the mean of all groups (residual-stream units)"
    return groups(points, means, title=title)


def save_direction(direction: Direction, path: Path, *, about: Mapping[str, Any]) -> None:
    """Write `path` (safetensors) and, beside it, the sidecar `<path stem>.json`.

    Args:
        direction: What to save.
        path: Ends in `.safetensors`.
        about: Model id, revision, fingerprint, dtype, template hash, prompt hashes, metrics.

    Raises:
        StoreError: A file could not be written.
    """
    meta = {
        "format": f"{FORMAT}-{VERSION}",
        "site": str(direction.site),
        "position": direction.position,
        "norm": direction.norm,
        "sign": "points from harmless to harmful; adding it raises refusal",
        "convention": "L.resid_pre is the input of block L, L.resid_post its output, from 0",
        "recipe": direction.recipe,
        **about,
    }
    head = {"demur": json.dumps({key: meta[key] for key in ("format", "site", "position", "norm")})}
    write_files(path, {"direction": direction.unit.contiguous()}, meta, head=head, indent=2)


def load_direction(
    path: Path, model: Model | None = None, *, any_model: bool = False
) -> tuple[Direction, dict[str, Any]]:
    """Read a direction and its sidecar back.

    Args:
        path: The `.safetensors` file.
        model: If given, the direction must have been made on this very model: its weights, data
            type, tokenizer and template. In another data type of the same checkpoint the direction
            is nearly the same, but its length and every figure of it are not, so that is refused
            as well.
        any_model: Only its width and layer must be those of the model; the sidecar that is returned
            then says what differs, as `borrowed`.

    Raises:
        StoreError: A file is missing or damaged, was changed after it was written, is of another
            version, or the direction belongs to another model.
    """
    tensors, meta = read_files(path, what="direction", again=_AGAIN)
    known_format(
        meta.get("format"),
        path,
        name=FORMAT,
        what="a direction",
        newest=VERSION,
        again="demur audit",
    )
    try:
        unit = tensors["direction"]
        if unit.dtype != torch.float32 or unit.ndim != 1 or len(tensors) > 1:
            raise ValueError("it holds something else than one vector in float32")
        direction = Direction(
            unit,
            float(meta["norm"]),
            Site.parse(meta["site"]),
            int(meta["position"]),
            str(meta["recipe"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise StoreError(
            f"no direction can be read from {path} and {path.stem}.json: {error}", _AGAIN
        ) from error
    if not bool(torch.isfinite(unit).all()) or abs(float(unit.norm()) - 1.0) > 1e-3:
        raise StoreError(
            f"the vector in {path} is not of norm 1", "the file is damaged: make it again"
        )
    if not 0.0 < direction.norm < float("inf"):
        raise StoreError(
            f"the length in {path.stem}.json is {direction.norm}",
            "the file is damaged: make it again",
        )
    if model is not None:
        # Whoever has a model has loaded this.
        from demur.models.fingerprint import borrowed, check_made_on

        if not any_model:
            check_made_on(str(path), meta, model, again="demur audit")
        elif notes := borrowed(str(path), meta, model):
            meta = {**meta, "borrowed": notes[0]}
        check_shape(path, direction, model)
    return direction, meta


def check_shape(path: Path, direction: Direction, model: Model) -> None:
    """See that a model has the width and the layer of a direction, whoever made it.

    Raises:
        StoreError: It has not.
    """
    width, layer = len(direction.unit), direction.site.layer
    if width != model.d_model or layer >= model.n_layers:
        raise StoreError(
            f"the direction in {path} is {width} wide, at {direction.site}; {model.name} has "
            f"{model.n_layers} blocks of width {model.d_model}",
            "take a direction of a model of the same shape",
        )

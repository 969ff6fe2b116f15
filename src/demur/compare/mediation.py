"""Does what training did go through a direction? One coordinate held, the rest left as it is.

Base and organism are run on the same tokens. The organism's coordinate along a direction is set,
token by token, to what the base has there, while the adapter stays on (`clamp`): what is then left
of the effect of training does not go through it at these sites. The converse gives the base the
organism's coordinate and nothing else (`patch`): what that brings goes through it.

Several sites are held at once, since what is held at one is written anew by the next block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from demur.compare.behaviour import Basis, Measure, Outcome, Spread, by_site, random_sets, span
from demur.compare.rows.behaviour import MediationRow
from demur.directions import Direction
from demur.em.effects import Directions, Subject, put, share_removed
from demur.em.margin import grouped_mean
from demur.errors import ConfigError
from demur.models import Model
from demur.progress import Progress
from demur.sites import Site
from demur.stats import null_p

Mediator: TypeAlias = Directions | Sequence[Directions]
Way = Literal["clamp", "patch"]
_Key: TypeAlias = tuple[bool, tuple[int, ...], tuple[int, ...]]

_DRAWS = 2000


# Recording and holding ---------------------------------------------------------------------------


def _key(model: Model, x: Tensor) -> _Key:
    """Which tokens a tensor stands for: whether the shared prefix, the rows' numbers, its shape."""
    chunk = model.chunk
    if chunk is None:
        raise ConfigError(
            "a coordinate is held token by token, and the model is run without telling which",
            "run it through `logits`, `final_states` or a bench",
        )
    rows = () if chunk.rows is None else tuple(chunk.rows.tolist())
    return chunk.is_prefix, rows, tuple(x.shape[:-1])


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """Keep the coordinates at one site of every pass; nothing is changed.

    Attributes:
        model: What runs.
        basis: Axes of the coordinates.
        site: Where.
        seen: What was read, pass by pass: which tokens, and their coordinates (row, token, k).
    """

    model: Model
    basis: Basis
    site: Site
    seen: list[tuple[_Key, Tensor]] = field(default_factory=list)

    def sites(self, model: Model) -> tuple[Site, ...]:
        """Its one site."""
        del model
        return (self.site,)

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Read."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        self.seen.append((_key(self.model, x), (wide @ self.basis.to(wide).T).detach().cpu()))
        return x


@dataclass(frozen=True, slots=True, eq=False)
class Hold:
    """Set coordinates at one site to what was recorded, in passes over the same tokens in order.

    Attributes:
        model: What runs, as a rule another one than was recorded.
        basis: Orthonormal axes.
        site: Where.
        recorded: What `Record.seen` has, of these axes alone.
        done: Number of passes so far.
    """

    model: Model
    basis: Basis
    site: Site
    recorded: Sequence[tuple[_Key, Tensor]]
    done: list[int] = field(default_factory=lambda: [0])

    def sites(self, model: Model) -> tuple[Site, ...]:
        """Its one site."""
        del model
        return (self.site,)

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Move each token within the axes only.

        Raises:
            ConfigError: These are not the tokens that were recorded.
        """
        at, key = self.done[0], _key(self.model, x)
        if at >= len(self.recorded) or self.recorded[at][0] != key:
            raise ConfigError(
                f"pass {at + 1} at {self.site} is over other tokens than the one recorded",
                "measure both models on the same tokens in the same batches, without generating",
            )
        self.done[0] += 1
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        basis = self.basis.to(wide)
        gap = self.recorded[at][1].to(wide) - wide @ basis.T
        return (wide + gap @ basis).to(x.dtype)


# Mediation ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Axes:
    """Orthonormal axes by site, and where their coordinates stand among all that are recorded."""

    name: str
    rank: int
    bases: Mapping[Site, Basis]
    columns: slice


def steps(
    *, mediators: int, outcomes: int, ranks: int = 1, n_random: int = 20, ways: int = 2
) -> int:
    """How often `mediation` calls `progress`; `ranks`: how many different ones mediators have."""
    return outcomes * ways * (1 + mediators + ranks * n_random)


def mediation(
    base: Model,
    organism: Subject,
    mediators: Mapping[str, Mediator],
    outcomes: Sequence[Outcome],
    *,
    spread: Spread,
    n_random: int = 20,
    ways: Sequence[Way] = ("clamp", "patch"),
    seed: int,
    draws: int = _DRAWS,
    progress: Progress | None = None,
) -> tuple[MediationRow, ...]:
    """Hold coordinates of one model to those of the other, and see what becomes of outcomes.

    Each outcome takes one pass in either model, one to record, and one for each mediator and each
    random direction.

    Args:
        base: Untrained.
        organism: Trained, on this base.
        mediators: By name: directions at one or more sites, which are held at all of them; or
            several such, which are held together.
        outcomes: Measured over the same tokens in both models; none that generates.
        spread: Draws random directions, see `demur.compare.behaviour.random_sets`.
        n_random: How many; where k directions are held together, k random ones are.
        ways: Which of both.
        seed: Of random directions and draws.
        draws: Of groups.
        progress: Called once per pass under an edit and per recording, see `steps`.

    Returns:
        A row for each way, mediator and outcome.

    Raises:
        ConfigError: Mediators lie at different sites, the models lay prompts out differently, or an
            outcome is not measured over the same tokens in both.
        DegenerateVectorError: Directions held together are parallel.
        TooFewPromptsError: An outcome has fewer than two groups.
    """
    advance = progress if progress is not None else lambda _: None
    trained = put(organism, base)
    if (
        base.template is not None
        and trained.template is not None
        and base.template.hash != trained.template.hash
    ):
        raise ConfigError(
            f"{base.name} and {trained.name} lay prompts out differently",
            "load both with one chat template and system prompt",
        )
    axes, random = _axes(mediators, spread, n_random=n_random, seed=seed)
    rows: list[MediationRow] = []
    for outcome in outcomes:
        measures = (outcome.prepare(base), outcome.prepare(trained))
        plain = [np.array(measure(), dtype=np.float64) for measure in measures]
        for way in ways:
            models = (base, trained) if way == "clamp" else (trained, base)
            source, target = measures if way == "clamp" else measures[::-1]
            recorded = _recorded(models[0], source, [*axes, *random])
            advance(1)
            own = plain[1] if way == "clamp" else plain[0]
            changes: dict[str, np.ndarray] = {}
            for one in (*axes, *random):
                acts = [
                    Hold(
                        models[1],
                        basis,
                        site,
                        [(key, seen[..., one.columns]) for key, seen in recorded[site]],
                    )
                    for site, basis in one.bases.items()
                ]
                changes[one.name] = np.array(target(*acts), dtype=np.float64) - own
                advance(1)
            for one in axes:
                null = [changes[other.name] for other in random if other.rank == one.rank]
                row = _row(
                    one,
                    way,
                    outcome,
                    plain[1] - plain[0],
                    change=changes[one.name],
                    null=null,
                    seed=seed,
                    draws=draws,
                )
                rows.append(row)
    return tuple(rows)


def _axes(
    mediators: Mapping[str, Mediator], spread: Spread, *, n_random: int, seed: int
) -> tuple[list[_Axes], list[_Axes]]:
    if not mediators:
        raise ConfigError("there is no direction to hold", "give one or more by name")
    sets = {
        name: [
            by_site(one)
            for one in ([given] if isinstance(given, Direction | Mapping) else list(given))
        ]
        for name, given in mediators.items()
    }
    like = next(iter(sets.values()))[0]
    for name, several in sets.items():
        for one in several:
            if set(one) != set(like):
                raise ConfigError(
                    f"`{name}` lies at {', '.join(map(str, one))}, another at "
                    f"{', '.join(map(str, like))}",
                    "give all at the same sites",
                )
    start = 0

    def made(name: str, several: Sequence[Mapping[Site, Direction]]) -> _Axes:
        nonlocal start
        columns = slice(start, start + len(several))
        start += len(several)
        bases = {site: span([one[site] for one in several]) for site in like}
        return _Axes(name, len(several), bases, columns)

    axes = [made(name, several) for name, several in sets.items()]
    random: list[_Axes] = []
    for rank in sorted({one.rank for one in axes}):
        drawn = random_sets(like, spread, n=rank * n_random, seed=seed) if n_random else []
        random += [
            made(f"random {rank} #{k + 1}", drawn[rank * k : rank * (k + 1)])
            for k in range(n_random)
        ]
    return axes, random


def _recorded(
    model: Model, measure: Measure, axes: Sequence[_Axes]
) -> dict[Site, list[tuple[_Key, Tensor]]]:
    records = [
        Record(model, torch.cat([one.bases[site] for one in axes]), site) for site in axes[0].bases
    ]
    measure(*records)
    return {record.site: record.seen for record in records}


def _row(
    one: _Axes,
    way: Way,
    outcome: Outcome,
    total: np.ndarray,
    *,
    change: np.ndarray,
    null: Sequence[np.ndarray],
    **about: int,
) -> MediationRow:
    gone = -change if way == "clamp" else change  # What goes through the coordinate, by item.
    known = {group: str(i) for i, group in enumerate(dict.fromkeys(outcome.groups))}
    groups = [(outcome.name, known[group]) for group in outcome.groups]
    share, undefined = share_removed(total, total - gone, groups, **about)
    towards = 1.0 if total.mean() >= 0 else -1.0
    p = None
    if null:
        signed = [towards * (-x if way == "clamp" else x).mean() for x in null]
        p = null_p(float(towards * gone.mean()), signed, side="high")
    return MediationRow(
        mediator=one.name,
        rank=one.rank,
        way=way,
        outcome=outcome.name,
        unit=outcome.unit,
        sites=tuple(str(site) for site in one.bases),
        n=len(total),
        groups=len(set(groups)),
        total=grouped_mean(total, groups, **about),
        change=grouped_mean(change, groups, **about),
        left=grouped_mean(total - gone, groups, **about),
        share=share,
        undefined=undefined,
        p_random=p,
        random=tuple(float(x.mean()) for x in null),
    )

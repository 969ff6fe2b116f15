"""One direction in several checkpoints of a base, and whether it was projected out of one.

A projection leaves a mark in the weights. Every weight that writes to the stream has energy in all
directions of its output, and after `W - v v^T W` has none along `v`, in all edited weights at once.
So one can look for such a direction without measuring any: the mean over weights of the logarithm
of `W W^T`, each brought to mean energy 1, has an eigenvalue far below all others. On SmolLM2 the
lowest are -2.44, -2.43, -2.37; after a projection in bfloat16 -14.2, -2.41, -2.40; in the last 30%
of the weights alone -4.9. The logarithm is what sees a part of the weights: the mean energy itself
falls by 30% then, and the bulk of directions reaches down to 45%.

What no look at the weights alone can see is a half-strength edit: it leaves a quarter of the
energy, which directions of any model have. With the base it is plain, since what was taken away
along `v` is proportional to what the base wrote there.

An edited model may not refuse at all, so that nothing can be measured in it: directions come from
the base.

References:
    Arditi et al. 2024, arXiv:2406.11717, section 4.1 (weight orthogonalization).
    Arsigny et al. 2007 (log-Euclidean means of positive matrices).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from demur.causal import stable_seed
from demur.compare.contrasts import Contrast, cosines, halves, permuted, resampled
from demur.compare.geometry import exchanged_p
from demur.compare.rows.checkpoints import Across, Detection, Projected, Test, Verdict
from demur.directions import Direction
from demur.em.margin import grouped_mean
from demur.errors import ConfigError, FamilyError, TooFewPromptsError
from demur.models import Model
from demur.progress import Progress
from demur.stats import Estimate, bootstrap_tails, holm, null_p, proportion

ALPHA = 0.05
EMPTY = float(np.log(5.0))
"""How far below every other direction an emptied one lies, nats: a fifth of the energy."""
_DOUBT = float(np.log(1.5))
GONE = 0.1
"""Least share of the write along a direction that a projection takes away."""

_FLOOR = 1e-7  # Of energy: bfloat16 leaves 1e-6, and o_proj, being square, has less by chance.
_NEXT = 10  # Gaps above the one in question, which tell how large gaps are there.
_NARROW = 128  # Widths up to which Gaussian weights of the same shapes are drawn.
_MOST = 3  # Directions that are looked for.
_COLUMNS = 8192
_POST_NORM = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


# Across models -----------------------------------------------------------------------------------


def across(
    models: Mapping[str, Sequence[Contrast] | Contrast],
    *,
    base: str,
    draws: int = 1000,
    splits: int = 100,
    seed: int = 0,
) -> tuple[Across, ...]:
    """Compare each checkpoint's own contrast with the base's, site by site.

    Args:
        models: Name -> its contrasts, one a site: the same prompts in the same order for all.
        base: Which of them is the base.
        draws: Of the bootstrap and of each null.
        splits: Halves for reliability.
        seed: Of all draws.

    Returns:
        One row for each other model and site that it shares with the base.

    Raises:
        ConfigError: There is no such base, no site is shared, or the rows are of other prompts.
        TooFewPromptsError: A contrast is a bare vector, or has fewer than four clusters.
    """
    if base not in models:
        raise ConfigError(f"there is no `{base}`", f"there are: {', '.join(models)}")
    own = _by_site(models[base])
    rows: list[Across] = []
    for name, given in models.items():
        if name == base:
            continue
        other = _by_site(given)
        shared = [key for key in own if key in other]
        if not shared:
            raise ConfigError(
                f"`{name}` and `{base}` were read at different sites", "read both at one site"
            )
        rows += [
            _across(base, name, own[key], other[key], draws=draws, splits=splits, seed=seed)
            for key in shared
        ]
    corrected = holm([row.p for row in rows])
    return tuple(replace(row, p_holm=p) for row, p in zip(rows, corrected, strict=True))


def _by_site(given: Sequence[Contrast] | Contrast) -> dict[tuple[str, int | None], Contrast]:
    every = [given] if isinstance(given, Contrast) else given
    return {(str(one.site), one.position): one for one in every}


def _across(
    base: str, model: str, a: Contrast, b: Contrast, *, draws: int, splits: int, seed: int
) -> Across:
    if (
        (a.positive_clusters, a.negative_clusters, a.paired)
        != (b.positive_clusters, b.negative_clusters, b.paired)
        or a.d_model != b.d_model
        or not (a.has_rows and b.has_rows)
    ):
        raise ConfigError(
            f"the rows of `{base}` and `{model}` at {a.site} are not of the same prompts",
            "read both models on the same prompts, in the same order",
        )
    u, v = a.vector(), b.vector()
    value = float(cosines(u, v)[0])
    drawn = cosines(*resampled([a, b], draws=draws, seed=seed))
    clusters = len({*a.positive_clusters, *a.negative_clusters})
    fewest = min(len(set(a.positive_clusters)), len(set(a.negative_clusters)))
    tails = bootstrap_tails(fewest)
    low, high = np.nanquantile(drawn, tails)
    cosine = Estimate(
        value, float(low), float(high), a.n, f"bootstrap 95% over {clusters} clusters"
    )
    nulls = [
        cosines(permuted(a, draws=draws, seed=seed + 1), v.expand(draws, -1)),
        cosines(permuted(b, draws=draws, seed=seed + 2), u.expand(draws, -1)),
    ]
    nulls = [null[np.isfinite(null)] for null in nulls]
    first, second = halves(a, splits=splits, seed=seed + 3)
    third, fourth = halves(b, splits=splits, seed=seed + 3)  # The same clusters in both.
    within = [float(np.nanmean(cosines(*pair))) for pair in ((first, second), (third, fourth))]
    between = float(
        np.nanmean(np.concatenate([cosines(first, fourth), cosines(second, third)]))
    )  # fmt: skip
    corrected = between / (within[0] * within[1]) ** 0.5 if min(within) > 0 else None
    early, late = _along(a, b)
    gap = float(early[0].mean() - early[1].mean())
    if gap <= 0:  # The direction is mere noise, which its reliability tells.
        gap = float(u.norm())
    moved = [((y - x) / gap).numpy() for x, y in zip(early, late, strict=True)]
    either = [a.positive_clusters, a.negative_clusters]
    changes = [
        grouped_mean(values, groups, seed=seed)
        for values, groups in zip(moved, either, strict=True)
    ]
    change = changes[0].value - changes[1].value
    both = [torch.stack(pair, 1) for pair in zip(early, late, strict=True)]
    of_both = replace(a, positive=both[0], negative=both[1])
    gaps = resampled([of_both], draws=draws, seed=seed)[0]
    # The base's own gap scatters as well.
    low, high = np.nanquantile(((gaps[:, 1] - gaps[:, 0]) / gaps[:, 0].clamp_min(0.1 * gap)), tails)
    p = max(
        *(null_p(value, null, side="high") for null in nulls),
        # Noise of the same prompts is in both vectors, and no exchange on one side has it: without
        # this, a model that has no such direction at all is found to share it.
        exchanged_p(a, b, draws=draws, seed=seed + 4),
    )
    return Across(
        base=base,
        model=model,
        site=str(a.site),
        position=a.position,
        cosine=cosine,
        corrected=corrected,
        base_reliability=_brown(within[0]),
        model_reliability=_brown(within[1]),
        null_high=float(max(np.quantile(null, 0.95) for null in nulls)),
        p=p,
        p_holm=p,
        length_ratio=float(v.norm() / u.norm()),
        positive_moved=changes[0],
        negative_moved=changes[1],
        gap_change=Estimate(change, float(low), float(high), a.n, cosine.method),
        n=a.n,
    )


def _along(a: Contrast, b: Contrast) -> tuple[list[Tensor], list[Tensor]]:
    """Where the rows of both classes lie along the unit direction of `a`, in `a` and in `b`.

    The direction is that of the rows outside a row's own cluster. Else the noise in a direction
    lies along its own rows' noise, so that their gap seems wider than it is, and to shrink in any
    other model: with 12 prompts a class and half of the squared length noise, by a third.
    """
    sides = list(zip(a.rows, b.rows, (a.positive_clusters, a.negative_clusters), strict=True))
    early, late = ([torch.empty(len(rows), dtype=torch.float64) for rows in a.rows] for _ in "ab")
    for cluster in dict.fromkeys([*a.positive_clusters, *a.negative_clusters]):
        own = [torch.tensor([one == cluster for one in clusters]) for _, _, clusters in sides]
        means = [rows[~inside].mean(0) for (rows, _, _), inside in zip(sides, own, strict=True)]
        unit = torch.nn.functional.normalize(means[0] - means[1], dim=0)
        for i, (before, after, _) in enumerate(sides):
            early[i][own[i]], late[i][own[i]] = before[own[i]] @ unit, after[own[i]] @ unit
    return early, late


def _brown(half: float) -> float:
    return 2 * half / (1 + half) if half > 0 else half


# What a checkpoint writes ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Writer:
    """A weight as a map to the stream.

    Attributes:
        name: Of the parameter.
        layer: Block, from 0; None for an embedding.
        weight: Each column is what one input writes.
    """

    name: str
    layer: int | None
    weight: Float[Tensor, "d_model column"]


def writers(model: Model) -> Iterator[Writer]:
    """Every weight whose output goes to the stream: embeddings, output and down projections.

    In families with norms behind their writes these are the weights before the norm, which edits of
    checkpoints change too. Biases, single columns, are left out.
    """
    parameters = dict(model.hf.named_parameters())
    embedding = model.hf.get_input_embeddings().weight
    axes = {write.path: write.axis for write in model.family.embeddings}
    for name, parameter in parameters.items():
        if parameter is embedding or name in axes:
            yield Writer(name, None, _turned(parameter, axes.get(name, 1)))
    places = {write.path: write.axis for write in model.family.weights}
    if not model.family.linear_writes:
        places = dict.fromkeys(_POST_NORM, 0)
    found = False
    for layer, block in enumerate(model.blocks):
        own = dict(block.named_parameters())
        for path, axis in places.items():
            if path in own and own[path].ndim > 1:
                found = True
                yield Writer(f"{layer}.{path}", layer, _turned(own[path], axis))
    if not found:
        raise FamilyError(
            f"no block of {model.name} has a weight that writes to the stream",
            f"the row `{model.family.name}` does not fit this checkpoint",
        )


def _turned(parameter: Tensor, axis: int) -> Tensor:
    return parameter.detach().movedim(axis, 0).flatten(1)


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _products(left: Tensor, right: Tensor) -> Float[Tensor, "d_model d_model"]:
    """`left @ right.T` over very many columns, summed in float64."""
    out = torch.zeros(len(left), len(right), dtype=torch.float64)
    for a, b in zip(left.split(_COLUMNS, 1), right.split(_COLUMNS, 1), strict=True):
        out += (_wide(a) @ _wide(b).T).double().cpu()
    return out


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """What the writers of a checkpoint have in common.

    Attributes:
        log: Mean over writers of the matrix logarithm of `W W^T`, mean energy 1, float64.
        energy: Mean of the same without the logarithm: the covariance of what is written.
        columns: Of each writer, how many columns it has.
        looked_at: Which, in words.
    """

    log: Float[Tensor, "d_model d_model"]
    energy: Float[Tensor, "d_model d_model"]
    columns: tuple[int, ...]
    looked_at: str

    @property
    def writers(self) -> int:
        """How many there are."""
        return len(self.columns)


def spectrum(model: Model, *, progress: Progress | None = None) -> Spectrum:
    """Take the logarithm of every writer's energy, and their mean.

    Costs one eigendecomposition of d_model x d_model per writer: 4 CPU-seconds for the 61 writers
    of SmolLM2 (d_model 576), 11 for the 49 of a model of half a billion parameters (d_model 896).

    Args:
        model: Any checkpoint.
        progress: Called after every writer.

    Raises:
        FamilyError: See `writers`.
        TooFewPromptsError: No writer has as many columns as the stream has coordinates.
    """
    width = model.d_model
    log, energy = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
    columns: list[int] = []
    left = 0
    for writer in writers(model):
        # A weight with fewer columns than rows writes nothing along many directions anyway.
        if writer.weight.shape[1] < width:
            left += 1
            continue
        gram = _products(writer.weight, writer.weight)
        gram *= width / gram.trace()
        values, vectors = torch.linalg.eigh(gram)
        log += (vectors * values.clamp(min=_FLOOR).log()) @ vectors.T
        energy += gram
        columns.append(writer.weight.shape[1])
        if progress is not None:
            progress(1)
    n = len(columns)
    if not n:
        raise TooFewPromptsError(
            f"no weight of {model.name} has {width} columns or more",
            "nothing can be told from the weights of this checkpoint alone; give its base",
        )
    return Spectrum(log / n, energy / n, tuple(columns), _looked_at(model, n, left))


def _looked_at(model: Model, n: int, left: int = 0) -> str:
    words = [f"{n} weights that write to the stream, embeddings included"]
    if left:
        words.append(f"{left} with fewer columns than the stream has coordinates left out")
    if not model.family.linear_writes:
        words.append("before the norms that stand between them and the stream")
    return "; ".join(words)


def energies(model: Model, unit: Float[Tensor, " d_model"]) -> dict[str, float]:
    """Each writer's energy along a unit vector, over its mean energy of all directions."""
    return {writer.name: _energy(writer, unit) for writer in writers(model)}


def _energy(writer: Writer, unit: Tensor) -> float:
    wide = _wide(writer.weight)
    along = float((unit.to(wide) @ wide).double().pow(2).sum())
    return along / (float(wide.double().pow(2).sum()) / len(wide))


def _empty_layers(model: Model, unit: Tensor) -> tuple[int, ...]:
    found = {
        writer.layer
        for writer in writers(model)
        if writer.layer is not None and _energy(writer, unit) < 0.05
    }
    return tuple(sorted(found))


# Without the base --------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _edges(size: int, draws: int, seed: int) -> Float[np.ndarray, "draw k"]:
    """Relative gaps at the edge of the spectrum of random symmetric matrices (GOE)."""
    from scipy.linalg import eigh_tridiagonal

    rng = np.random.default_rng(seed)
    freedom = np.arange(size - 1, 0, -1)
    found = np.empty((draws, _MOST))
    for draw in range(draws):
        values = eigh_tridiagonal(
            rng.normal(scale=2**0.5, size=size),
            np.sqrt(rng.chisquare(freedom)),
            eigvals_only=True,
            select="i",
            select_range=(0, _MOST + _NEXT),
        )
        found[draw] = _gaps(np.asarray(values))
    return found


@lru_cache(maxsize=32)
def _gaussian(width: int, columns: tuple[int, ...], draws: int, seed: int) -> np.ndarray:
    """The same of Gaussian weights of the same shapes, as (draw, k)."""
    from scipy.stats import chi

    rng = np.random.default_rng(seed)
    found = np.zeros((draws, width, width))
    place = np.arange(width)
    for n in columns:
        # Bartlett: the Cholesky factor of a Wishart matrix, in place of n columns.
        factor = np.tril(rng.normal(size=(draws, width, width)), -1)
        factor[:, place, place] = chi.rvs(n - place, size=(draws, width), random_state=rng)
        gram = factor @ factor.transpose(0, 2, 1)
        gram *= width / np.trace(gram, axis1=1, axis2=2)[:, None, None]
        values, vectors = np.linalg.eigh(gram)
        logs = np.log(np.maximum(values, _FLOOR))
        found += (vectors * logs[:, None, :]) @ vectors.transpose(0, 2, 1)
    return np.stack([_gaps(one) for one in np.linalg.eigvalsh(found / len(columns))])


def _gaps(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " k"]:
    """The gap above the k lowest values, over the mean of the ten that follow it."""
    gaps = np.diff(values[: _MOST + _NEXT + 1])
    return np.array([gaps[k] / gaps[k + 1 : k + 1 + _NEXT].mean() for k in range(_MOST)])


def emptied(
    model: Model, *, known: Spectrum | None = None, draws: int = 999, seed: int = 0
) -> Projected:
    """Look for up to three directions that were projected out, with no base and none given.

    p is that of the lowest gap among those that follow, Bonferroni's over one, two and three
    directions. Up to 128 coordinates the null is Gaussian weights of the same shapes (6 of 100
    random models of width 32 have p below 0.05). Above that they cost too much, and the null is the
    edge of a random symmetric matrix's spectrum. There p is a guide only: of 19 variants of SmolLM2
    none had p below 0.05, but of Gaussian models of width 256 with nine weights, square ones among
    them, a third did; Qwen2.5-Coder-0.5B has a gap six times those that follow, though no more than
    1.3-fold in energy. So the verdict rests on size too: the gap must be fivefold in energy. One
    that is significant and smaller leaves the verdict open if it is at least 1.5-fold, as an edit
    of half strength leaves it.

    Args:
        model: Any checkpoint.
        known: Its spectrum, if it was computed before.
        draws: Of the null.
        seed: Of the draws.

    Raises:
        FamilyError: See `spectrum`.
        TooFewPromptsError: See `spectrum`; or the stream has fewer than 16 coordinates.
    """
    own = known or spectrum(model)
    if len(own.log) < _MOST + _NEXT + 3:
        raise TooFewPromptsError(
            f"{model.name} has {len(own.log)} coordinates", "the test needs 16 or more"
        )
    values, vectors = torch.linalg.eigh(own.log)
    low = values.numpy()
    narrow = len(low) <= _NARROW
    null = _gaussian(len(low), own.columns, draws, seed) if narrow else _edges(100, draws, seed)
    seen = _gaps(low)
    ps = [min(1.0, _MOST * null_p(seen[k], null[:, k], side="high")) for k in range(_MOST)]
    sizes = np.diff(low)[:_MOST]
    big = [k for k in range(_MOST) if ps[k] <= ALPHA and sizes[k] >= EMPTY]
    best = big[-1] if big else int(np.argmax(sizes))
    verdict, reason = _judged(
        ps[best], float(sizes[best]), EMPTY, _DOUBT, "nats below the next direction"
    )
    step = np.diff(low)[best + 1 : best + 1 + _NEXT].mean()
    top = low[best + 1]
    ends = top - np.quantile(null[:, best], [0.975, 0.025]) * step
    return Projected(
        test="any direction",
        model=model.name,
        base=None,
        direction=None,
        statistic=float(low[best]),
        null_low=float(ends[0]),
        null_high=float(ends[1]),
        null="Gaussian weights of the same shapes"
        if narrow
        else "edge of the spectrum of a random symmetric matrix, at this spectrum's spacing",
        n_null=draws,
        p=ps[best],
        margin=float(-sizes[best]),
        count=best + 1 if verdict == "projected out" else 0,
        explained=None,
        writers=own.writers,
        empty_layers=_empty_layers(model, vectors[:, 0]) if verdict != "no sign of it" else (),
        looked_at=own.looked_at,
        verdict=verdict,
        reason=reason,
    )


def _judged(p: float, size: float, least: float, doubt: float, what: str) -> tuple[Verdict, str]:
    said = f"{size:.2g} {what}, p = {p:.2g}"
    if p <= ALPHA and size >= least:
        return "projected out", said
    if p <= ALPHA and size >= doubt:
        return "undetermined", f"{said}: rare by chance, and less than a whole projection leaves"
    return "no sign of it", said


def _drawn(energy: Tensor, draws: int, seed: int) -> dict[str, Float[Tensor, "draw d_model"]]:
    """Random unit vectors: uniform, and with the covariance of what is written."""
    rng = torch.Generator().manual_seed(stable_seed(seed, "checkpoints"))
    ball = torch.randn(2 * draws, len(energy), generator=rng, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(energy)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return {
        "isotropic": torch.nn.functional.normalize(ball[:draws], dim=1),
        "covariance-matched": torch.nn.functional.normalize(ball[draws:] @ root, dim=1),
    }


def emptied_along(
    model: Model,
    direction: Direction,
    *,
    name: str = "direction",
    known: Spectrum | None = None,
    draws: int = 999,
    seed: int = 0,
) -> Projected:
    """Test whether a given direction, such as one of the base, was projected out; no base needed.

    p is the largest over three nulls: isotropic directions, directions with the covariance of what
    is written, and the eigenvectors of the rest of the spectrum, which hold the emptiest directions
    that this model has. At d_model 576 the last cannot give less than 0.002.

    Args:
        model: Any checkpoint.
        direction: Of the model's width.
        name: As tables call it.
        known: The model's spectrum, if it was computed before.
        draws: Of either kind.
        seed: Of the draws.

    Raises:
        FamilyError: See `spectrum`.
        TooFewPromptsError: See `spectrum`.
        ConfigError: The direction is of another width.
    """
    own = known or spectrum(model)
    unit = _fitting(direction, len(own.log))
    value = float(unit @ own.log @ unit)
    _, basis = torch.linalg.eigh(
        torch.eye(len(unit), dtype=torch.float64) - torch.outer(unit, unit)
    )
    rest = basis[:, 1:]
    others = torch.linalg.eigvalsh(rest.T @ own.log @ rest).numpy()
    nulls = {
        kind: ((one @ own.log) * one).sum(1).numpy()
        for kind, one in _drawn(own.energy, draws, seed).items()
    }
    nulls["the emptiest others"] = others
    ps = {kind: null_p(value, null, side="low") for kind, null in nulls.items()}
    hardest = max(ps, key=lambda kind: ps[kind])
    size = float(others[0] - value)
    verdict, reason = _judged(
        ps[hardest], size, EMPTY, _DOUBT, "nats below the emptiest of the other directions"
    )
    return Projected(
        test="this direction",
        model=model.name,
        base=None,
        direction=name,
        statistic=value,
        null_low=float(np.quantile(nulls[hardest], 0.025)),
        null_high=float(np.quantile(nulls[hardest], 0.975)),
        null=hardest,
        n_null=len(nulls[hardest]),
        p=ps[hardest],
        margin=-size,
        count=None,
        explained=None,
        writers=own.writers,
        empty_layers=_empty_layers(model, unit) if verdict != "no sign of it" else (),
        looked_at=own.looked_at,
        verdict=verdict,
        reason=reason,
    )


def _fitting(direction: Direction, width: int) -> Tensor:
    unit = direction.unit.double()
    if len(unit) != width:
        raise ConfigError(
            f"the direction has {len(unit)} coordinates, the model {width}",
            "give a direction of the same base",
        )
    return unit / unit.norm()


# With the base -----------------------------------------------------------------------------------


def removed(
    model: Model,
    base: Model,
    *,
    directions: Mapping[str, Direction] | None = None,
    draws: int = 199,
    seed: int = 0,
) -> tuple[Projected, ...]:
    """Test whether directions were projected out of a checkpoint, by comparison with its base.

    `-<v^T D, v^T W> / |v^T W|^2` is the share of what the base's weight W wrote along v that the
    change D took away. Its mean over the weights that changed is the statistic. p is the largest
    over three nulls: the same of isotropic directions, and of directions with the covariance of
    what the base writes (which tell a projection from weights that shrank), and the cosine of
    `v^T D` with what the base writes along random directions (which tells it from an unrelated
    change along v, such as an adapter's).

    Args:
        model: The checkpoint.
        base: What it was made from, as far as is known.
        directions: By name, as tables call them.
        draws: Of either kind.
        seed: Of the draws.

    Returns:
        First the test of the direction along which the change of all weights has most energy, then
        one row for each direction given.

    Raises:
        FamilyError: See `writers`; or the two have different weights.
        ConfigError: A direction is of another width.
    """
    given = directions or {}
    names = [None, *given]
    units = [_fitting(one, model.d_model) for one in given.values()]
    pairs = _pairs(model, base)
    moments = torch.zeros(model.d_model, model.d_model, dtype=torch.float64)
    matched = torch.zeros(draws, model.d_model, dtype=torch.float64)
    rng = torch.Generator().manual_seed(stable_seed(seed, "removed"))
    ball = torch.randn(draws, model.d_model, generator=rng, dtype=torch.float64)
    changed: list[str] = []
    for first, writer, change in pairs():
        size = float(change.double().pow(2).sum())
        if size > 0.0:
            changed.append(writer.name)
            moments += _products(change, change) / size
            weights = torch.randn(draws, first.shape[1], generator=rng, dtype=torch.float32)
            matched += ((weights.to(first) @ first.T) / first.norm()).double().cpu()
    looked_at = (
        f"{len(changed)} of {sum(1 for _ in writers(model))} weights that write to the stream, "
        "those that differ from the base's"
    )
    if not changed:
        return tuple(_unchanged(model, base, name, looked_at) for name in names)
    units.insert(0, torch.linalg.eigh(moments)[1][:, -1])
    null = torch.nn.functional.normalize(torch.cat([ball, matched]), dim=1)
    every = torch.cat([torch.stack(units), null])
    k = len(units)
    gone = torch.zeros(len(every), dtype=torch.float64)
    rows = torch.zeros(k, k + draws, dtype=torch.float64)
    for first, _, change in pairs():
        if not bool(change.any()):
            continue
        before = (every.to(first) @ first).double().cpu()
        after = (every.to(first) @ change).double().cpu()
        gone -= (before * after).sum(1) / before.pow(2).sum(1).clamp(min=1e-300)
        read = torch.nn.functional.normalize(before[: k + draws], dim=1)
        rows -= torch.nn.functional.normalize(after[:k], dim=1) @ read.T
    gone, rows = gone / len(changed), rows / len(changed)
    nulls = {
        "isotropic": gone[k : k + draws].numpy(),
        "covariance-matched": gone[k + draws :].numpy(),
    }
    out: list[Projected] = []
    for i, (name, unit) in enumerate(zip(names, units, strict=True)):
        value = float(gone[i])
        ps = {kind: null_p(value, one, side="high") for kind, one in nulls.items()}
        ps["what the base writes elsewhere"] = null_p(
            float(rows[i, i]), rows[i, k:].numpy(), side="high"
        )
        hardest = max(ps, key=lambda kind: ps[kind])
        shown = nulls.get(hardest, nulls["covariance-matched"])
        verdict, reason = _judged(
            ps[hardest], value, GONE, GONE / 2, "of the write along it is gone"
        )
        out.append(
            Projected(
                test=_with_base(name),
                model=model.name,
                base=base.name,
                direction=name,
                statistic=value,
                null_low=float(np.quantile(shown, 0.025)),
                null_high=float(np.quantile(shown, 0.975)),
                null=hardest,
                n_null=draws,
                p=ps[hardest],
                margin=value - float(shown.max()),
                count=int(verdict == "projected out") if name is None else None,
                explained=float(unit @ moments @ unit) / len(changed),
                writers=len(changed),
                empty_layers=_empty_layers(model, unit) if verdict != "no sign of it" else (),
                looked_at=looked_at,
                verdict=verdict,
                reason=reason,
            )
        )
    return tuple(out)


def _with_base(name: str | None) -> Test:
    return "any direction, with the base" if name is None else "this direction, with the base"


def _unchanged(model: Model, base: Model, name: str | None, looked_at: str) -> Projected:
    return Projected(
        test=_with_base(name),
        model=model.name,
        base=base.name,
        direction=name,
        statistic=None,
        null_low=None,
        null_high=None,
        null="none",
        n_null=0,
        p=None,
        margin=None,
        count=0 if name is None else None,
        explained=None,
        writers=0,
        empty_layers=(),
        looked_at=looked_at,
        verdict="no sign of it",
        reason="the weights are those of the base, bit for bit",
    )


def _pairs(model: Model, base: Model) -> Callable[[], Iterator[tuple[Tensor, Writer, Tensor]]]:
    """Of each writer: the base's weight, the writer, and the change, in float32 or wider."""

    def each() -> Iterator[tuple[Tensor, Writer, Tensor]]:
        for own, old in zip(writers(model), writers(base), strict=True):
            if own.name != old.name or own.weight.shape != old.weight.shape:
                raise FamilyError(
                    f"{model.name} has `{own.name}` of {tuple(own.weight.shape)}, {base.name} "
                    f"`{old.name}` of {tuple(old.weight.shape)}",
                    "give the checkpoint that it was made from",
                )
            first = _wide(old.weight)
            yield first, own, _wide(own.weight).to(first) - first

    if len(list(writers(model))) != len(list(writers(base))):
        raise FamilyError(
            f"{model.name} and {base.name} have other weights", "give the model's own base"
        )
    return each


# All of them -------------------------------------------------------------------------------------


def projected_out(
    model: Model,
    *,
    base: Model | None = None,
    directions: Mapping[str, Direction] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Projected, ...]:
    """Every test that can be made of a checkpoint with what is at hand.

    Args:
        model: The checkpoint.
        base: What it was made from; None leaves the tests out that need it.
        directions: By name, such as those of the base; None leaves the tests out that need one.
        seed: Of all draws.
        progress: Called after every writer of the model.

    Raises:
        FamilyError: See `spectrum` and `removed`.
        TooFewPromptsError: See `emptied`.
        ConfigError: A direction is of another width.
    """
    own = spectrum(model, progress=progress)
    given = directions or {}
    rows = [emptied(model, known=own, seed=seed)]
    rows += [
        emptied_along(model, one, name=name, known=own, seed=seed) for name, one in given.items()
    ]
    if base is not None:
        rows += removed(model, base, directions=given, seed=seed)
    return tuple(rows)


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A checkpoint whose history is known.

    Attributes:
        kind: What was done to it.
        edited: Whether a direction was projected out of it.
        make: Builds it; called once, so that checkpoints need not lie in memory together.
        base: What it was made from; None leaves the tests out that need it.
        direction: That which was projected out, or one that was not; None likewise.
    """

    kind: str
    edited: bool
    make: Callable[[], Model]
    base: Model | None = None
    direction: Direction | None = None


def detection(
    cases: Sequence[Case], *, seed: int = 0, progress: Progress | None = None
) -> tuple[tuple[Detection, ...], tuple[tuple[Case, tuple[Projected, ...]], ...]]:
    """Run every test on checkpoints whose history is known, and count.

    Args:
        cases: Untouched and edited ones.
        seed: Of all draws.
        progress: Called after every checkpoint.

    Returns:
        Per test, the false-alarm rate of the untouched and the power on the edited, over all and
        by kind; and what each test said of each checkpoint.
    """
    said: list[tuple[Case, tuple[Projected, ...]]] = []
    for case in cases:
        known = {"direction": case.direction} if case.direction is not None else None
        said.append((case, projected_out(case.make(), base=case.base, directions=known, seed=seed)))
        if progress is not None:
            progress(1)
    rows: list[Detection] = []
    for test in cast("tuple[Test, ...]", get_args(Test)):
        for edited in (False, True):
            kinds = list(dict.fromkeys(case.kind for case, _ in said if case.edited == edited))
            for kind in ("all", *kinds):
                verdicts = [
                    row.verdict
                    for case, own in said
                    if case.edited == edited and kind in ("all", case.kind)
                    for row in own
                    if row.test == test
                ]
                if verdicts:
                    found = proportion(verdicts.count("projected out"), len(verdicts))
                    rows.append(
                        Detection(test, kind, edited, found, verdicts.count("undetermined"))
                    )
    return tuple(rows), tuple(said)

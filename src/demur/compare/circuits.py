"""Whether two directions are made by the same heads and MLPs, and what adapters read and write.

Contributions hang on depth: late components write more, whatever they are for. Two circuits are
therefore compared against permutations that keep the depth of every component.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from demur.compare.attribution import Circuit, Component
from demur.compare.rows.circuits import (
    CircuitComparison,
    OverlapRow,
    ReadWriteRow,
    StatisticRow,
)
from demur.directions import Direction
from demur.em import adapter
from demur.em.advice import AdviceItem
from demur.em.margin import grouped_mean
from demur.em.organism import Organism, Side
from demur.errors import ConfigError, DegenerateVectorError, NonFiniteError, TemplateError
from demur.models import Model
from demur.progress import Progress
from demur.sites import Site, Span
from demur.stats import Estimate, null_p

_DRAWS = 1000
_PERMUTATIONS = 2000
_BAND = 6
_COMPARED = ("head", "attn", "mlp")

Measured: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From circuits, (draw, component), to one number a draw."""


# Two circuits ------------------------------------------------------------------------------------


def compare(
    a: Circuit,
    b: Circuit,
    *,
    top: Sequence[int] = (10, 20),
    draws: int = _PERMUTATIONS,
    band: int = _BAND,
    seed: int,
) -> CircuitComparison:
    """Say how alike two circuits are beyond what depth and kind of component give.

    Heads are permuted within their block. Of MLPs, and of attention that is one component, a block
    has one each, which within the block could not move: what is left of their values after a line
    over depth is permuted among those of `band` neighbouring blocks, and the line put back. (To
    permute the values themselves would take the common trend within bands for a common circuit:
    with a steep one, in 20 of 20 draws of two unrelated circuits.) Embedding and biases are left
    out.

    Args:
        a: Contributions or effects.
        b: Of the same model's components; those that both have are compared.
        top: Sizes of the sets of largest components.
        draws: How many permutations.
        band: How many neighbouring blocks, at least, make a stratum of MLPs; the bands are made as
            even as the number of blocks allows.
        seed: Of the permutations.

    Raises:
        ConfigError: Fewer than three components are common, or none can move.
        DegenerateVectorError: One circuit is the same at all components, or 0.
        NonFiniteError: A value is NaN or infinite.

    References:
        Freedman and Lane, "A nonstochastic interpretation of reported significance levels", 1983
        (residuals permuted, the trend kept).
    """
    from scipy import stats

    parts, x, y, picks, silent, strata = _aligned(a, b, band)
    if len(parts) < 3 or all(len(one) < 2 for one in strata):
        raise ConfigError(
            f"`{a.name}` and `{b.name}` have {len(parts)} components in common that say something",
            "compare circuits of one model at one site, behind the adapter",
        )
    for name, values in ((a.name, x), (b.name, y)):
        if not np.ptp(values) > 0:
            raise DegenerateVectorError(
                f"the circuit `{name}` is {values[0]:.3g} at all components",
                "there is nothing to correlate",
            )
    moved = _shuffled(parts, x, strata, draws=draws, seed=seed)
    drawn = None
    if a.drawn is not None and b.drawn is not None:
        n = min(len(a.drawn), len(b.drawn))
        drawn = (a.drawn[:n, picks[0]], b.drawn[:n, picks[1]])
    measures: list[tuple[str, Measured, Literal["two", "high"]]] = [
        ("spearman", _spearmans, "two"),
        ("cosine", _cosines, "two"),
    ]
    overlaps: list[OverlapRow] = []
    for k in dict.fromkeys(min(k, len(parts)) for k in top):
        measures.append((f"weighted Jaccard, top {k}", partial(_jaccards, k=k), "high"))
        first, second, others = (_largest(one, k) > 0 for one in (x[None], y[None], moved))
        both = (first & second)[0]
        shared, sizes = int(both.sum()), (int(first.sum()), int(second.sum()))
        overlaps.append(
            OverlapRow(
                k,
                shared,
                sizes[0] * sizes[1] / len(parts),
                float(cast(Any, stats.hypergeom).sf(shared - 1, len(parts), *sizes)),
                null_p(shared, (others & second).sum(1), side="high"),
                tuple(parts[i].name for i in np.argsort(-np.abs(x), kind="stable") if both[i]),
            )
        )
    statistics = [
        _statistic(
            name,
            of(x[None], y[None])[0],
            of(moved, y[None]),
            None if drawn is None else of(*drawn),
            n=len(parts),
            side=side,
        )
        for name, of, side in measures
    ]
    return CircuitComparison(
        a.name,
        b.name,
        len(parts),
        sum(len(one) < 2 for one in strata),
        silent,
        f"heads within their block; MLPs among {band} or more neighbouring blocks, less a line",
        draws,
        tuple(statistics),
        tuple(overlaps),
    )


def _aligned(
    a: Circuit, b: Circuit, band: int
) -> tuple[
    list[Component],
    np.ndarray,
    np.ndarray,
    tuple[list[int], list[int]],
    int,
    list[Int[np.ndarray, " _"]],
]:
    """Common components with their values, where they stand in both, and the strata of them."""
    at_a = {part: i for i, part in enumerate(a.components) if part.kind in _COMPARED}
    at_b = {part: i for i, part in enumerate(b.components)}
    parts = [part for part in at_a if part in at_b]
    picks = ([at_a[p] for p in parts], [at_b[p] for p in parts])
    x = np.asarray(a.values, dtype=np.float64)[picks[0]]
    y = np.asarray(b.values, dtype=np.float64)[picks[1]]
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise NonFiniteError(
            f"`{a.name}` or `{b.name}` holds NaN or infinity",
            "try `--dtype float32`; the checkpoint may also be damaged",
        )
    # What a kind of component does in one block: zeros there are no values to be permuted.
    own: dict[Hashable, list[int]] = {}
    for i, part in enumerate(parts):
        own.setdefault((part.layer, part.kind), []).append(i)
    kept = sorted(i for one in own.values() if np.any(x[one]) and np.any(y[one]) for i in one)
    left = [parts[i] for i in kept]
    return (
        left,
        x[kept],
        y[kept],
        ([picks[0][i] for i in kept], [picks[1][i] for i in kept]),
        len(parts) - len(kept),
        component_strata(left, band),
    )


def component_strata(parts: Sequence[Component], band: int = _BAND) -> list[Int[np.ndarray, " _"]]:
    """Indices of components that may change places: see `compare`.

    Raises:
        ConfigError: The band has fewer than two blocks.
    """
    if band < 2:
        raise ConfigError(f"a band of {band} blocks lets nothing move", "give 2 or more")
    groups: dict[Hashable, list[int]] = {}
    for kind in dict.fromkeys(part.kind for part in parts):
        layers = sorted({part.layer or 0 for part in parts if part.kind == kind})
        cuts = np.array_split(np.arange(len(layers)), max(1, len(layers) // band))
        of = {layers[i]: number for number, cut in enumerate(cuts) for i in cut}
        for i, part in enumerate(parts):
            if part.kind == kind:
                key = part.layer if kind == "head" else ("band", of[part.layer or 0])
                groups.setdefault((kind, key), []).append(i)
    return [np.array(members) for members in groups.values()]


def _shuffled(
    parts: Sequence[Component],
    values: Float[np.ndarray, " component"],
    strata: Sequence[Int[np.ndarray, " _"]],
    *,
    draws: int,
    seed: int,
) -> Float[np.ndarray, "draw component"]:
    """Values within strata in another order, a line over depth kept where blocks are crossed."""
    rng = np.random.default_rng(seed)
    out = np.tile(values, (draws, 1))
    for members in strata:
        own = values[members]
        layers = np.array([parts[i].layer or 0 for i in members], dtype=float)
        line = np.zeros(len(own))
        if np.ptp(layers) > 0:
            # Through three points or fewer a line leaves next to nothing to permute.
            line = np.polynomial.Polynomial.fit(layers, own, int(len(own) > 3))(layers)
        out[:, members] = line + rng.permuted(np.tile(own - line, (draws, 1)), axis=1)
    return out


def _statistic(
    name: str,
    value: float,
    null: Float[np.ndarray, " draw"],
    drawn: Float[np.ndarray, " resample"] | None,
    *,
    n: int,
    side: Literal["two", "high"],
) -> StatisticRow:
    low, high = np.quantile(null, (0.025, 0.975))
    interval = None
    if drawn is not None and bool(np.isfinite(drawn).all()):
        ends = np.quantile(drawn, (0.025, 0.975))
        interval = Estimate(
            float(value), float(ends[0]), float(ends[1]), n, "bootstrap 95% of the rows behind both"
        )
    # The least of rounding must not make a draw that changed nothing differ from the value.
    close = np.where(np.isclose(null, value, rtol=1e-12, atol=1e-14), value, null)
    return StatisticRow(
        name,
        float(value),
        interval,
        float(null.mean()),
        float(low),
        float(high),
        null_p(float(value), close, side=side),
    )


def _spearmans(a: np.ndarray, b: np.ndarray) -> Float[np.ndarray, " draw"]:
    from scipy import stats

    ranks = [stats.rankdata(one, axis=1) for one in (a, b)]
    return _cosines(*(one - one.mean(1, keepdims=True) for one in ranks))


def _cosines(a: np.ndarray, b: np.ndarray) -> Float[np.ndarray, " draw"]:
    sizes = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(1) / sizes


def _largest(values: np.ndarray, k: int) -> Float[np.ndarray, "draw component"]:
    """Sizes of the k largest of each row as shares of their sum, 0 elsewhere."""
    sizes = np.abs(values)
    out = np.zeros_like(sizes)
    index = np.argsort(-sizes, axis=1, kind="stable")[:, :k]
    np.put_along_axis(out, index, np.take_along_axis(sizes, index, 1), 1)
    return out / out.sum(1, keepdims=True)


def _jaccards(a: np.ndarray, b: np.ndarray, *, k: int) -> Float[np.ndarray, " draw"]:
    w, v = _largest(a, k), _largest(b, k)
    return np.minimum(w, v).sum(1) / np.maximum(w, v).sum(1)


# What an adapter reads and writes ----------------------------------------------------------------


def read_write(
    base: Model,
    organism: Organism,
    items: Sequence[AdviceItem],
    directions: Mapping[str, Direction],
    library: Mapping[str, Direction],
    *,
    which: Side = "bad",
    singular: int | None = None,
    batch_size: int | None = None,
    draws: int = _DRAWS,
    seed: int,
    progress: Progress | None = None,
) -> tuple[ReadWriteRow, ...]:
    """Ask of each part of an adapter whether it reads, and whether it writes, given directions.

    What it writes is B, where that is added to the stream as it is. What it reads is the gradient
    of its mean scalar over an answer's tokens with respect to the stream that enters the adapted
    MLP, that is, what attention has just been added to; for an adapter within attention, the stream
    that enters the block. Correlations of scalars with coordinates are those of
    `demur.em.adapter.reads`, what of a shift was written directly those of
    `demur.em.adapter.shifts`.

    Args:
        base: What the organism was trained on.
        organism: Its adapter.
        items: Questions and answers on which scalars are taken.
        directions: By name; refusal and emergent misalignment, say.
        library: Directions of unrelated contrasts, the null.
        which: On which answers.
        singular: How many singular components of each factor, the largest first; None takes all.
            Each costs a backward pass through one block.
        batch_size: Most rows of a pass; results do not depend on it.
        draws: Of the bootstrap over groups.
        seed: Of the bootstrap.
        progress: Called with the number of answers done since the last call.

    Returns:
        One row per part and direction.

    Raises:
        FamilyError: The model has no such module.
        TooFewPromptsError: There are fewer than two groups of items.
        TemplateError: An answer is empty.
    """
    parts = [
        part for part in adapter.components(organism) if singular is None or part.index < singular
    ]
    answers = [item.bad if which == "bad" else item.good for item in items]
    if not all(map(str.strip, answers)):
        raise TemplateError(f"an item has no {which} answer", "leave it out")
    reading = [i for i, part in enumerate(parts) if part.read is not None]
    gradients = _scalar_gradients(
        base, [parts[i] for i in reading], [item.question for item in items], answers,
        batch_size=batch_size, progress=progress,
    )  # fmt: skip
    groups = [(item.domain, item.group) for item in items]
    units = _unit_rows(list(directions.values()))
    null = _unit_rows(list(library.values())) if library else None
    outs = (base.family.attn_out, base.family.mlp_out)
    rows: list[ReadWriteRow] = []
    for i, part in enumerate(parts):
        write = torch.nn.functional.normalize(part.write, dim=0)
        own = gradients[reading.index(i)] if i in reading else None
        mean = None if own is None else torch.nn.functional.normalize(own.mean(0), dim=0)
        for unit, (name, direction) in zip(units, directions.items(), strict=True):
            writes = (None, None, None)
            if part.module in outs and base.family.linear_writes:
                writes = (float(write @ unit), *_beyond(write, unit, null))
            reads = (None, None, None)
            if mean is not None:
                reads = (float(mean @ unit), *_beyond(mean, unit, null))
            rows.append(
                ReadWriteRow(
                    part.name,
                    name,
                    str(direction.site),
                    *writes,
                    None
                    if own is None
                    else grouped_mean((own @ unit).numpy(), groups, seed=seed, draws=draws),
                    *reads,
                    len(library),
                    float(1.96 / base.d_model**0.5),
                )
            )
    return tuple(rows)


def _unit_rows(directions: Sequence[Direction]) -> Float[Tensor, "direction d_model"]:
    rows = torch.stack([one.unit.double() for one in directions])
    return torch.nn.functional.normalize(rows, dim=1)


def _beyond(vector: Tensor, unit: Tensor, null: Tensor | None) -> tuple[float | None, float | None]:
    """Share of null directions with a smaller |cosine|, and the p of a larger one."""
    if null is None:
        return None, None
    own, others = abs(float(vector @ unit)), (null @ vector).abs().numpy()
    return float((others < own).mean()), null_p(own, others, side="high")


def _scalar_gradients(
    model: Model,
    parts: Sequence[adapter.Component],
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    batch_size: int | None,
    progress: Progress | None,
) -> Float[Tensor, "part item d_model"]:
    """How each part's mean scalar over an answer grows with a vector added where it reads."""
    whole = model.encode(questions, answers)
    out = torch.zeros(len(parts), len(answers), model.d_model, dtype=torch.float64)
    layers = sorted({part.layer for part in parts})
    seen: dict[Site, Tensor] = {}
    index: list[int] = []

    def begin(x: Tensor, site: Site) -> Tensor:
        seen[site] = x.detach().clone().requires_grad_()  # The graph of one block at a time.
        return seen[site]

    def mark(x: Tensor, site: Site) -> Tensor:
        seen[site] = x
        return x

    def take(_module: Any, args: tuple[Any, ...], numbers: list[int]) -> None:
        chunk = model.chunk
        assert chunk is not None
        x = args[0]
        wide = torch.promote_types(x.dtype, torch.float32)
        answer = chunk.spans[Span.RESPONSE].to(x.device, wide)
        answer = answer / answer.sum(1, keepdim=True)
        for number in numbers:
            part = parts[number]
            assert part.read is not None
            scalars = part.scale * (x.to(wide) @ part.read.to(x.device, wide))
            places = (Site(part.layer, "attn_out"), Site(part.layer, "resid_pre"))
            found: tuple[Tensor | None, ...] = torch.autograd.grad(
                (scalars * answer).sum(),
                [seen[site] for site in places if site in seen],
                retain_graph=True,
                allow_unused=True,
            )
            # Within attention nothing has been added to the stream yet: its output is not used.
            gradient = next((one for one in found if one is not None), None)
            if gradient is not None:
                out[number, index] = gradient.double().sum(1).cpu()

    def end(x: Tensor) -> Tensor:
        return x.detach()

    with ExitStack() as undo:
        states_of, _ = undo.enter_context(model.differentiable())
        for layer in layers:
            for site, edit in (
                (Site(layer, "resid_pre"), begin),
                (Site(layer, "attn_out"), mark),
            ):
                undo.callback(model.intercept(site, partial(edit, site=site)))
            undo.callback(model.intercept(Site(layer, "resid_post"), end))
            for path in dict.fromkeys(part.module for part in parts if part.layer == layer):
                numbers = [
                    i for i, one in enumerate(parts) if (one.layer, one.module) == (layer, path)
                ]
                module = model.blocks[layer].get_submodule(path)
                hook = module.register_forward_pre_hook(partial(take, numbers=numbers))
                undo.callback(hook.remove)
        for index in whole.passes(tokens=model.tokens_per_pass, rows=batch_size):
            seen.clear()
            states_of(whole.rows(index))
            if progress is not None:
                progress(len(index))
    return out

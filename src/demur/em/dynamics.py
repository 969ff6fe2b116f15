"""What happened along a training: how far the adapter's writes went, and where they turned.

All of it is computed from the recorded path of B, one matrix per step and adapted map. B starts at
zero; step 0 is that start. The product of A and B is what acts, so a path belongs to its run: paths
of two runs may be compared by angles between their ends, never by their signs.

References:
    Turner, Soligo, Taylor, Rajamanoharan, Nanda 2025, arXiv:2506.11613, section 4 and appendix F.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from demur.errors import ConfigError, DegenerateVectorError, ModelLoadError, TooFewPromptsError

DYNAMICS = "dynamics.safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class Dynamics:
    """What a training recorded.

    Attributes:
        loss: Of each step, in nats per answer token, before its update.
        gradient_norm: Of each step, over all factors together, before clipping.
        learning_rate: Of each step.
        norms: By adapted map, "15.mlp.down_proj": the Frobenius norm of B at the start and after
            each step.
        paths: Likewise B itself, (step + 1, d_out, rank); empty where it was too large to keep.
    """

    loss: Float[np.ndarray, " step"]
    gradient_norm: Float[np.ndarray, " step"]
    learning_rate: Float[np.ndarray, " step"]
    norms: Mapping[str, Float[np.ndarray, " step_plus_1"]]
    paths: Mapping[str, Float[np.ndarray, "step_plus_1 d_out rank"]]


@dataclass(frozen=True, slots=True, eq=False)
class PrincipalPath:
    """A path seen along its own principal components.

    Attributes:
        scores: Each step's coordinates, with the path's mean as their origin.
        components: Unit vectors, by falling variance; the sign of each is such that the path ends
            on its positive side.
        shares: Of the path's variance that each component has.
    """

    scores: Float[np.ndarray, "step k"]
    components: Float[np.ndarray, "k d"]
    shares: Float[np.ndarray, " k"]


def read_dynamics(folder: Path) -> Dynamics:
    """Read what a training recorded beside its organism.

    Raises:
        ModelLoadError: The folder has no such record, or it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = Path(folder).expanduser() / DYNAMICS
    if not path.is_file():
        raise ModelLoadError(
            f"{path.parent} holds no {DYNAMICS}", "only organisms that demur trained have one"
        )
    try:
        found = load_file(str(path))
        return Dynamics(
            found["loss"].astype(float),
            found["gradient_norm"].astype(float),
            found["learning_rate"].astype(float),
            {k.removeprefix("norm."): v for k, v in found.items() if k.startswith("norm.")},
            {k.removeprefix("b."): v for k, v in found.items() if k.startswith("b.")},
        )
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelLoadError(f"{path} is damaged: {error}", "train the organism again") from error


def flat(path: Float[np.ndarray, "step d_out rank"]) -> Float[np.ndarray, "step d"]:
    """A path of matrices as one of vectors, float64."""
    return path.reshape(len(path), -1).astype(np.float64)


def local_cosines(
    path: Float[np.ndarray, "step d"], *, k: int = 5, least: float = 0.0
) -> Float[np.ndarray, " step"]:
    """How sharply a path turns at each step: cos(v[t-k] - v[t], v[t+k] - v[t]).

    Args:
        path: One vector a step.
        k: How many steps to look back and ahead.
        least: Steps where neither side is longer than this are left out: where a path hardly
            moves, its angle is noise. In the path's own units.

    Returns:
        -1 where the path is straight, 0 at a right angle, 1 where it goes back; NaN within `k` of
        either end and where it moves too little.

    Raises:
        ConfigError: `k` is below 1.
        TooFewPromptsError: The path has fewer than 2 k + 1 steps.
    """
    if k < 1:
        raise ConfigError(f"got k = {k}", "look at least 1 step back and ahead")
    if len(path) < 2 * k + 1:
        raise TooFewPromptsError(
            f"a path of {len(path)} steps has none with {k} on either side", "give a smaller k"
        )
    wide = path.astype(np.float64)
    back, ahead = wide[: -2 * k] - wide[k:-k], wide[2 * k :] - wide[k:-k]
    before, behind = np.linalg.norm(back, axis=1), np.linalg.norm(ahead, axis=1)
    moves = (np.maximum(before, behind) > least) & (before > 0) & (behind > 0)
    found = np.full(len(path), np.nan)
    inner = found[k:-k]
    inner[moves] = (back * ahead).sum(1)[moves] / (before * behind)[moves]
    return found


def turning_point(cosines: Float[np.ndarray, " step"]) -> int | None:
    """The step at which a path turns most; None where no angle is defined."""
    if np.isnan(cosines).all():
        return None
    return int(np.nanargmax(cosines))


def principal_path(path: Float[np.ndarray, "step d"], *, k: int = 2) -> PrincipalPath:
    """Principal components of a path's points.

    Raises:
        TooFewPromptsError: There are fewer than k + 1 steps, or fewer than k dimensions.
        DegenerateVectorError: The path does not move.
    """
    if len(path) < k + 1 or path.shape[1] < k:
        raise TooFewPromptsError(
            f"{len(path)} points in {path.shape[1]} dimensions have no {k} components",
            "ask for fewer",
        )
    wide = path.astype(np.float64)
    centred = wide - wide.mean(0)
    left, sizes, right = np.linalg.svd(centred, full_matrices=False)
    total = float((sizes**2).sum())
    if not total > 0:
        raise DegenerateVectorError("the path does not move", "did the training take any steps?")
    signs = np.where(left[-1, :k] < 0, -1.0, 1.0)
    return PrincipalPath(
        left[:, :k] * sizes[:k] * signs, right[:k] * signs[:, None], sizes[:k] ** 2 / total
    )


def comp(a: Float[np.ndarray, "d n"], b: Float[np.ndarray, "d m"]) -> float:
    """How alike two sets of vectors are: ||A' B|| / (||A|| ||B||), Frobenius norms.

    1 where all columns of both are parallel, 0 where the two spans are orthogonal.

    Raises:
        DegenerateVectorError: All columns of one of them are zero.
    """
    wide, other = a.astype(np.float64), b.astype(np.float64)
    sizes = np.linalg.norm(wide) * np.linalg.norm(other)
    if not sizes > 0:
        raise DegenerateVectorError(
            "one of the two sets has length zero", "B is zero before the first step"
        )
    return float(np.linalg.norm(wide.T @ other) / sizes)


def comp_along(paths: Sequence[Float[np.ndarray, "step d_out rank"]]) -> Float[np.ndarray, " step"]:
    """How alike the writes of several adapters were at each step to what they are at the end.

    At each step the columns of all B are put side by side, their mean is taken off, and `comp`
    compares them with those of the last step.

    Args:
        paths: One for each adapter, all with the same steps and the same d_out.

    Returns:
        One value a step; NaN where the columns are all the same, as at the start.

    Raises:
        TooFewPromptsError: There are fewer than two columns, so that nothing is left of them.
        ConfigError: Steps or d_out differ.
    """
    if len({path.shape[:2] for path in paths}) != 1:
        raise ConfigError(
            f"got paths of the shapes {', '.join(str(path.shape) for path in paths)}",
            "compare adapters of one training that write to the stream",
        )
    stacked = np.concatenate(paths, axis=2).astype(np.float64)
    if stacked.shape[2] < 2:
        raise TooFewPromptsError("got a single column", "give two adapters, or one of rank 2")
    centred = stacked - stacked.mean(2, keepdims=True)
    end = centred[-1]
    tiny = 1e-12 * np.linalg.norm(end)
    return np.array([comp(one, end) if np.linalg.norm(one) > tiny else np.nan for one in centred])

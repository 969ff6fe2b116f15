"""Subspaces by principal angles, and two sets of activations by debiased CKA.

One cosine compares two vectors. Where a contrast is many, one per category of harm or one per
organism, it is their spans that have something in common or not. And where no direction is given,
the arrangement of prompts in two models can be compared as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from demur.compare.geometry import sampled_null
from demur.compare.rows.geometry import Alignment, Null, Overlap
from demur.errors import ConfigError, DegenerateVectorError, TooFewPromptsError

LARGEST = 5
_RANK = 1e-6
"""Of the largest singular value: below, an axis of a span is rounding."""


def principal_axes(vectors: Float[np.ndarray, "vector d_model"], k: int) -> np.ndarray:
    """The k orthonormal axes that hold most of some vectors, each brought to length 1.

    Args:
        vectors: One per row.
        k: How many axes, at most as many as there are vectors.

    Returns:
        One axis per row.
    """
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    # The Gram matrix is as small as the list is short; a full decomposition takes ten times longer.
    sizes, mix = np.linalg.eigh(units @ units.T)
    top = (mix[:, ::-1] / np.sqrt(np.maximum(sizes[::-1], 1e-300))).T[:k] @ units
    return np.linalg.qr(top.T)[0].T


def principal_angles(
    a: Float[np.ndarray, "k d_model"], b: Float[np.ndarray, "k d_model"]
) -> Float[np.ndarray, " k"]:
    """Angles between two spans of orthonormal rows, in degrees, smallest first.

    References:
        Bjorck and Golub, "Numerical methods for computing angles between linear subspaces", 1973.
    """
    from scipy import linalg

    return np.degrees(np.sort(linalg.subspace_angles(a.T, b.T)))


def overlaps(
    one: Sequence[Float[Tensor, " _"]],
    two: Sequence[Float[Tensor, " _"]],
    *,
    a: str,
    b: str,
    within: Float[Tensor, "row d_model"] | None = None,
    most: int = LARGEST,
    draws: int = 500,
    seed: int,
) -> tuple[Overlap, ...]:
    """Compare the spans of two lists of vectors, for 1 dimension and more.

    For k dimensions, each span is cut to the k axes that hold most of its vectors. The nulls have
    as many vectors as the list has, treated likewise, in place of one list against the other.

    Args:
        one: One list, such as refusal by category.
        two: The other, such as one vector per organism.
        a: Name of the first.
        b: Of the second.
        within: Rows with the covariance of the null, centred within their classes; None: there is
            no such null.
        most: Dimensions, at most.
        draws: Null subspaces in place of each of the two.
        seed: Of those.

    Returns:
        One row per number of dimensions, up to what both lists span.

    Raises:
        ConfigError: A list is empty, widths differ, or a number is out of range.
        DegenerateVectorError: A vector is zero.
    """
    if not one or not two:
        raise ConfigError("a list of vectors is empty", "give one vector or more on each side")
    if len({len(vector) for vector in (*one, *two)}) > 1:
        raise ConfigError(
            f"the vectors of `{a}` and `{b}` have several widths", "compare vectors of one model"
        )
    if min(draws, most) < 1:
        raise ConfigError(f"got {draws} null subspaces of {most}", "give 500 or so, of 1 to 5")
    lists = [_stacked(side, name) for side, name in ((one, a), (two, b))]
    most = min(most, *(_rank(side) for side in lists))
    axes = [principal_axes(side, most) for side in lists]
    rng = np.random.default_rng(seed)
    width = lists[0].shape[1]
    random = _null_overlaps(lists, axes, draws, lambda n: rng.standard_normal((n, width)))
    matched = None
    if within is not None:
        wide = within.detach().to("cpu", torch.float64)
        rows = (wide - wide.mean(0)).numpy()
        matched = _null_overlaps(
            lists, axes, draws, lambda n: rng.standard_normal((n, len(rows))) @ rows
        )
    found = _overlaps(axes[0], axes[1])
    out = []
    for k in range(1, most + 1):
        seen = float(found[k - 1])
        nulls: list[Null] = [sampled_null("random subspaces", seen, random[:, k - 1])]
        if matched is not None:
            nulls.append(sampled_null("covariance-matched subspaces", seen, matched[:, k - 1]))
        angles = principal_angles(axes[0][:k], axes[1][:k])
        out.append(Overlap(a, b, k, tuple(map(float, angles)), seen, tuple(nulls)))
    return tuple(out)


def _stacked(vectors: Sequence[Tensor], name: str) -> np.ndarray:
    rows = torch.stack([one.detach().to("cpu", torch.float64) for one in vectors]).numpy()
    norms = np.linalg.norm(rows, axis=1)
    if not np.isfinite(norms).all() or not norms.all():
        raise DegenerateVectorError(
            f"a vector of `{name}` is zero or not finite", "do its two sets share all prompts?"
        )
    return rows


def _rank(vectors: np.ndarray) -> int:
    units = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    sizes = np.linalg.svd(units, compute_uv=False)
    return int((sizes > _RANK * sizes[0]).sum())


def _overlaps(one: np.ndarray, two: np.ndarray) -> Float[np.ndarray, " k"]:
    """Mean squared cosine of the principal angles for the first 1, 2, ... axes of both."""
    squares = (one @ two.T) ** 2
    k = len(squares)
    return np.array([squares[:i, :i].sum() / i for i in range(1, k + 1)])


def _null_overlaps(
    lists: Sequence[np.ndarray],
    axes: Sequence[np.ndarray],
    draws: int,
    draw: Callable[[int], np.ndarray],
) -> Float[np.ndarray, "both_draws k"]:
    return np.stack(
        [
            _overlaps(principal_axes(draw(len(mine)), len(other)), other)
            for mine, other in ((lists[0], axes[1]), (lists[1], axes[0]))
            for _ in range(draws)
        ]
    )


def debiased_cka(a: Float[Tensor, "n d_a"], b: Float[Tensor, "m d_b"]) -> float:
    """Linear centred kernel alignment of two sets of rows, without the bias of few rows.

    Args:
        a: One row per prompt.
        b: The same prompts, in the same order; the width may differ.

    Returns:
        About 0 for unrelated rows, at times below; 1 for rows that are the same up to rotation and
        scale.

    Raises:
        ConfigError: The numbers of rows differ.
        TooFewPromptsError: There are fewer than four rows.
        DegenerateVectorError: One of the two hardly varies from prompt to prompt.

    References:
        Kornblith et al. 2019, arXiv:1905.00414; Song et al., "Feature selection via dependence
        maximization", 2012 (the unbiased estimator of HSIC).
    """
    one, two = _kernels(a, b)
    return float((one * two).sum())


def _kernels(a: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray]:
    if len(a) != len(b):
        raise ConfigError(f"got {len(a)} and {len(b)} rows", "give the same prompts to both")
    if len(a) < 4:
        raise TooFewPromptsError(f"got {len(a)} prompts", "give four or more; 50 tell something")
    return _kernel(a), _kernel(b)


def _kernel(rows: Tensor) -> np.ndarray:
    """The Gram matrix centred without its diagonal, of length 1.

    Products of two of these are the unbiased estimator of HSIC up to a factor, which cancels.
    """
    wide = rows.detach().to("cpu", torch.float64).numpy()
    # Centring changes nothing but rounding, where rows have a large mean in common.
    wide = wide - wide.mean(0)
    gram = wide @ wide.T
    n = len(gram)
    scale = float(np.abs(gram).max())
    np.fill_diagonal(gram, 0)
    sums = gram.sum(1)
    gram = gram - (sums[:, None] + sums[None]) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(gram, 0)
    length = float(np.linalg.norm(gram))
    if length <= 1e-12 * scale or scale == 0:
        raise DegenerateVectorError(
            "activations do not vary from prompt to prompt", "read another token or another site"
        )
    return gram / length


def alignment(
    one: Float[Tensor, "n d_a"],
    two: Float[Tensor, "m d_b"],
    *,
    a: str,
    b: str,
    draws: int = 500,
    seed: int,
) -> Alignment:
    """Debiased linear CKA of two sets of rows, against prompts exchanged in one of them.

    Args:
        one: One row per prompt, such as the base model's.
        two: The same prompts, in the same order, such as the organism's.
        a: Name of the first.
        b: Of the second.
        draws: Exchanges.
        seed: Of those.

    Raises:
        ConfigError: The numbers of rows differ, or there are no draws.
        TooFewPromptsError: There are fewer than four rows.
        DegenerateVectorError: One of the two hardly varies from prompt to prompt.
    """
    if draws < 1:
        raise ConfigError(f"got {draws} exchanges", "give 500 or so")
    first, second = _kernels(one, two)
    rng = np.random.default_rng(seed)
    null = np.empty(draws)
    for i in range(draws):
        order = rng.permutation(len(second))
        null[i] = (first * second[np.ix_(order, order)]).sum()
    seen = float((first * second).sum())
    return Alignment(a, b, seen, len(first), sampled_null("exchanged prompts", seen, null))

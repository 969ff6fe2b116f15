"""Cosines, intervals and nulls: identities first, then planted answers."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from sklearn.covariance import LedoitWolf, ledoit_wolf_shrinkage

from demur.compare.contrasts import ANSWER, Contrast, permuted_weights
from demur.compare.geometry import (
    WHITENED,
    WITHOUT_LIBRARY,
    compare_layers,
    compare_pair,
    isotropic_band,
    isotropic_p,
    shrinkage,
)
from demur.compare.rows.geometry import Alignment, Comparison, Overlap
from demur.compare.subspaces import (
    alignment,
    debiased_cka,
    overlaps,
    principal_angles,
    principal_axes,
)
from demur.errors import ConfigError, DegenerateVectorError, TooFewPromptsError
from demur.sites import Site

SITE = Site(2, "resid_post")
D = 40


def drawn(n, seed, d=D):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def axis(i, d=D):
    return torch.eye(d, dtype=torch.float64)[i]


def classes(name, towards, *, seed, n=40, size=6.0, site=SITE, negative=None, **options):
    """Two classes in white noise, `size` apart along a vector."""
    positive = drawn(n, seed) + size * towards
    other = drawn(n, seed + 500) if negative is None else negative
    return Contrast.of_classes(name, positive, other, site=site, position=-1, **options)


def bare(name, vector, site=SITE):
    return Contrast.of_vector(name, vector, site=site, position=None)


def variant(row, name):
    found = row.variant(name)
    assert found is not None, name
    return found


def test_figures_are_those_of_the_plain_definitions():
    # Noise of unequal size along the axes: white noise is shrunk to the identity.
    a, b = (
        Contrast.of_classes(
            name, *((side * torch.linspace(2, 0.2, D)) for side in one.rows), site=SITE, position=-1
        )
        for name, one in (
            ("a", classes("a", axis(0), seed=1)),
            ("b", classes("b", axis(0) + axis(1), seed=2)),
        )
    )
    row = compare_pair(a, b, draws=200, seed=0)
    assert variant(compare_pair(*white(), draws=2, seed=0), WHITENED).left_a == 1
    u, v = a.vector().numpy(), b.vector().numpy()
    assert row.cosine == pytest.approx(u @ v / np.linalg.norm(u) / np.linalg.norm(v))
    within = np.concatenate([a.within().numpy(), b.within().numpy()])

    fit = LedoitWolf(assume_centered=True).fit(within)
    inverse = np.linalg.inv(fit.covariance_)
    whitened = u @ inverse @ v / np.sqrt((u @ inverse @ u) * (v @ inverse @ v))
    assert variant(row, WHITENED).cosine == pytest.approx(whitened)

    for k in (1, 5):
        top = np.linalg.svd(within, full_matrices=False)[2][:k]
        x, y = (w - top.T @ (top @ w) for w in (u, v))
        plural = "s" if k > 1 else ""
        found = variant(row, f"without {k} principal component{plural}")
        assert found.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
        assert found.left_a == pytest.approx((x @ x) / (u @ u))

    products = np.sort(np.abs(u * v))
    assert row.top_share == pytest.approx(products[-1] / products.sum())
    noise = sum(side.var(0).sum().item() / len(side) for side in a.rows)
    assert row.length_a == pytest.approx(np.sqrt(u @ u - noise))
    assert row.inner == pytest.approx(u @ v)
    assert row.unbiased is not None
    assert row.interval is not None
    assert row.unbiased.low < 0.5**0.5 < row.unbiased.high
    assert row.interval.low < row.cosine < row.interval.high


def white():
    return classes("a", axis(0), seed=1), classes("b", axis(0) + axis(1), seed=2)


def test_shrinkage_is_that_of_scikit_learn():
    rows = (drawn(30, 3) * torch.linspace(0.1, 3, D)).numpy()
    rows -= rows.mean(0)
    ratio, mean = shrinkage(rows @ rows.T, D)
    assert ratio == pytest.approx(ledoit_wolf_shrinkage(rows, assume_centered=True))
    assert mean == pytest.approx((rows**2).mean())


def test_the_isotropic_band_is_that_of_random_directions():
    found = drawn(20_000, 0, 50)
    cosines = (found[:, 0] / found.norm(dim=1)).abs()
    assert isotropic_band(50) == pytest.approx(float(cosines.quantile(0.95)), abs=0.006)
    assert isotropic_p(isotropic_band(50), 50) == pytest.approx(0.05)
    assert isotropic_p(1.0, 50) == 0


def test_noise_is_taken_off_lengths_and_what_is_shared_off_the_product():
    """Two classes against the same rows have noise in common: the raw cosine is above 0."""
    raw, fair = [], []
    keys = [("negative", i) for i in range(30)]
    for seed in range(0, 4000, 100):
        negative = drawn(30, seed + 77)
        a, b = (
            classes(
                name, axis(i), seed=seed + i, n=30, size=3.0, negative=negative,
                clusters=([(name, j) for j in range(30)], keys),
            )
            for i, name in enumerate("ab")
        )  # fmt: skip
        row = compare_pair(a, b, draws=2, splits=2, seed=0)
        assert row.unbiased is not None
        raw.append(row.cosine)
        fair.append(row.unbiased.value)
    assert np.mean(raw) > 0.08
    assert abs(np.mean(fair)) < 2.5 * np.std(fair) / len(fair) ** 0.5
    assert abs(np.mean(fair)) < 0.05


def test_reliability_and_correction_undo_attenuation():
    a = classes("a", axis(0), seed=1, size=2.0)
    b = classes("b", axis(0), seed=2, size=2.0)
    row = compare_pair(a, b, draws=50, seed=0)
    # Of the squared length, 4 is signal and 2 * 40 / 40 noise.
    assert row.reliability_a == pytest.approx(4 / 6, abs=0.15)
    assert row.corrected is not None
    assert row.cosine < 0.85 < row.corrected
    twin = compare_pair(a, a, draws=50, seed=0)
    assert (twin.cosine, twin.corrected, twin.capped) == (pytest.approx(1), 1.0, True)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_same_and_the_opposite(sign):
    a, b = classes("a", axis(0), seed=1), classes("b", sign * axis(0), seed=2)
    row = compare_pair(a, b, draws=100, seed=0)
    assert row.verdict == ("the same" if sign > 0 else "opposite")
    for name in ("isotropic", "covariance-matched", "exchanged labels"):
        null = row.null(name)
        assert null is not None
        assert null.p < 0.02, name


def library_of(*axes, seed=300):
    return {f"other {i}": classes(f"other {i}", axis(i), seed=seed + i) for i in axes}


def test_a_right_angle_is_unrelated_only_by_a_margin_that_it_is_within():
    a, b = classes("a", axis(0), seed=1), classes("b", axis(1), seed=2)
    row = compare_pair(a, b, draws=100, seed=0, margin=0.35)
    assert row.verdict == "unrelated"
    assert row.equivalence_p is not None
    assert row.equivalence_p < 0.05
    narrow = compare_pair(a, b, draws=100, seed=0, margin=0.02)
    assert narrow.verdict == "undetermined"
    assert narrow.needed
    without = compare_pair(a, b, draws=100, seed=0)
    assert without.margin == pytest.approx(isotropic_band(D))


def test_the_margin_never_lies_below_the_isotropic_band():
    a, b = classes("a", axis(0), seed=1), classes("b", axis(1), seed=2)
    exact = {"c": bare("c", axis(7) - axis(7) @ a.vector() * 0)}
    row = compare_pair(a, b, library=exact, draws=50, seed=0)
    assert row.margin >= isotropic_band(D)
    wide = compare_pair(a, b, library={"c": bare("c", axis(0))}, draws=50, seed=0)
    assert wide.margin > 0.8


def test_a_shared_cause_is_found_and_named_and_half_a_cosine_is_not_one():
    a = classes("a", 2**-0.5 * (axis(5) + axis(0)), seed=1)
    b = classes("b", 2**-0.5 * (axis(5) + axis(1)), seed=2)
    row = compare_pair(a, b, library=library_of(5, 6, 7), draws=100, seed=0)
    assert row.verdict == "through a shared cause", row.why
    assert [one.name for one in row.causes] == ["other 5"]
    assert "other 5" in row.why
    partial = variant(row, WITHOUT_LIBRARY)
    assert partial.unbiased is not None
    assert abs(partial.unbiased.value) < 0.15
    assert partial.left_a == pytest.approx(0.5, abs=0.15)
    half = compare_pair(a, b, library=library_of(6, 7, 8), draws=100, seed=0)
    assert half.verdict == "partly shared", half.why


def test_noise_in_what_is_projected_out_is_reckoned_with():
    """A direction measured with noise takes out too little; on average the rest is still 0."""
    plain, fair = [], []
    for seed in range(1000, 5000, 100):
        a = classes("a", axis(5) + axis(0), seed=seed, size=3.0)
        b = classes("b", axis(5) + axis(1), seed=seed + 1, size=3.0)
        cause = classes("cause", axis(5), seed=seed + 2, size=3.0)
        row = compare_pair(a, b, without={"cause": cause}, draws=2, splits=2, seed=0)
        found = variant(row, "without cause")
        assert found.unbiased is not None
        plain.append(found.cosine)
        fair.append(found.unbiased.value)
    assert np.mean(plain) > 0.1
    assert abs(np.mean(fair)) < 0.06


def test_exchanged_labels_do_not_count_noise_in_common_as_likeness():
    keys = [("negative", i) for i in range(40)]
    negative = 5 * drawn(40, 9)  # Most noise of both is the shared one.
    a, b = (
        classes(
            name, axis(i), seed=i + 1, size=3.0, negative=negative,
            clusters=([(name, j) for j in range(40)], keys),
        )
        for i, name in enumerate("ab")
    )  # fmt: skip
    row = compare_pair(a, b, draws=400, seed=0)
    assert row.cosine > 0.6
    null = row.null("exchanged labels")
    assert null is not None
    assert null.p > 0.05


def test_a_vector_without_rows_against_one_with_and_against_another():
    a, v = classes("a", axis(0), seed=1), bare("v", axis(0))
    row = compare_pair(a, v, draws=100, seed=0)
    assert row.verdict == "the same"
    assert row.interval is not None
    assert (row.reliability_b, row.n_b, row.length_b) == (None, 0, pytest.approx(1))
    assert row.corrected is not None
    swapped = compare_pair(v, a, draws=100, seed=0)
    assert swapped.unbiased == row.unbiased
    both = compare_pair(v, bare("w", axis(0) + axis(1)), draws=100, seed=0)
    assert (both.verdict, both.interval, both.unbiased) == ("undetermined", None, None)
    assert "`v` and `w`" in both.needed
    assert [one.name for one in both.nulls] == ["isotropic"]
    assert compare_pair(v, v.named("w"), draws=100, seed=0).verdict == "the same"
    given = compare_pair(v, bare("w", axis(0) + axis(1)), within=drawn(30, 4), draws=50, seed=0)
    assert given.null("covariance-matched") is not None


def test_mere_noise_is_undetermined_and_says_why():
    row = compare_pair(
        classes("a", axis(0), seed=8, size=0.0, n=8), bare("v", axis(0)), draws=50, seed=0
    )
    if row.unbiased is None:
        assert row.verdict == "undetermined"
        assert "noise" in row.why
    nothing = classes("a", axis(0), seed=1, n=8)
    rows = drawn(8, 3)
    same = Contrast.of_pairs("p", rows, -rows, site=SITE, position=-1)
    assert compare_pair(nothing, same, draws=50, seed=0).verdict in ("undetermined", "unrelated")


def test_pairs_and_clusters_widen_as_they_should():
    """Each row four times over in a cluster of its own says no more than once."""
    a, b = classes("a", axis(0), seed=1), classes("b", axis(0) + axis(1), seed=2)

    def fourfold(one):
        sides = [side.repeat_interleave(4, 0) for side in one.rows]
        keys = [[(one.name, s, i // 4) for i in range(160)] for s in "+-"]
        return Contrast.of_classes(
            one.name, *sides, site=SITE, position=-1, clusters=(keys[0], keys[1])
        )

    once = compare_pair(a, b, draws=50, seed=0)
    often = compare_pair(fourfold(a), fourfold(b), draws=50, seed=0)
    assert once.unbiased is not None
    assert often.unbiased is not None
    for end in ("value", "low", "high"):
        assert getattr(often.unbiased, end) == pytest.approx(getattr(once.unbiased, end))


def test_it_is_the_same_again_and_symmetric():
    a, b = classes("a", axis(0), seed=1), classes("b", axis(0) + axis(1), seed=2)
    row = compare_pair(a, b, library=library_of(6, 7), draws=100, seed=3)
    assert row == compare_pair(a, b, library=library_of(6, 7), draws=100, seed=3)
    back = compare_pair(b, a, library=library_of(6, 7), draws=100, seed=3)
    assert (back.cosine, back.verdict) == (pytest.approx(row.cosine), row.verdict)
    assert back.unbiased is not None
    assert row.unbiased is not None
    assert back.unbiased.low == pytest.approx(row.unbiased.low)


def test_rows_survive_json():
    a = classes("a", axis(0), seed=1, model="f" * 16)
    row = compare_pair(a, bare("v", axis(0)), library=library_of(6), draws=50, seed=0)
    assert any("does not say" in why for why in row.mismatches)
    angles = overlaps([axis(0), axis(1)], [axis(0), axis(2)], a="x", b="y", draws=5, seed=0)
    cka = alignment(drawn(8, 0), drawn(8, 1), a="x", b="y", draws=5, seed=0)
    for kind, one in ((Comparison, row), (Overlap, angles[1]), (Alignment, cka)):
        text = json.dumps(asdict(one), allow_nan=False)
        assert TypeAdapter(kind).validate_json(text) == one


def test_what_cannot_be_compared_is_an_error():
    a = classes("a", axis(0), seed=1)
    for other, fact in (
        (bare("w", torch.ones(5)), "coordinates"),
        (bare("w", axis(0), Site(1, "resid_pre")), "1.resid_pre"),
    ):
        with pytest.raises(ConfigError, match=fact):
            compare_pair(a, other, seed=0)
        with pytest.raises(ConfigError, match=fact):
            compare_pair(a, a, library={"w": other}, seed=0)
    with pytest.raises(ConfigError, match="margin"):
        compare_pair(a, a, margin=1.0, seed=0)
    with pytest.raises(ConfigError, match="draws"):
        compare_pair(a, a, draws=1, seed=0)
    rows = drawn(8, 0)
    zero = Contrast.of_pairs("z", rows, rows, site=SITE, position=ANSWER)
    with pytest.raises(DegenerateVectorError):
        compare_pair(a, zero, seed=0)


# Layers ------------------------------------------------------------------------------------------


def over_layers(name, towards, *, seed):
    """White noise at four sites, and the difference at the last one only."""
    keys = ([(name, "+", i) for i in range(30)], [(name, "-", i) for i in range(30)])
    return {
        (site := Site(i, "resid_post")): classes(
            name, towards if i == 3 else torch.zeros(D, dtype=torch.float64), seed=seed + 10 * i,
            n=30, site=site, clusters=keys,
        )
        for i in range(4)
    }  # fmt: skip


def test_only_the_planted_layer_passes_family_wise_control():
    a, b = over_layers("a", axis(0), seed=1), over_layers("b", axis(0), seed=3)
    steps: list[int] = []
    rows = compare_layers(a, b, draws=300, splits=5, seed=0, progress=steps.append)
    assert [row.site for row in rows] == [f"{i}.resid_post" for i in range(4)]
    assert sum(steps) == 4
    ps = [row.p_family for row in rows]
    assert ps[3] is not None
    assert ps[3] < 0.01
    for row, p in zip(rows[:3], ps[:3], strict=True):
        alone = row.null("exchanged labels")
        assert alone is not None
        assert p is not None
        assert p > 0.05
        assert p > alone.p - 0.02


def test_labels_are_exchanged_at_all_sites_at_once():
    a = over_layers("a", axis(0), seed=1)
    first, second = (permuted_weights([a[site]], draws=10, seed=0)[0] for site in list(a)[:2])
    assert first is not None
    assert second is not None
    np.testing.assert_array_equal(first, second)


def test_layers_need_sites_in_common_and_the_same_prompts():
    a = over_layers("a", axis(0), seed=1)
    with pytest.raises(ConfigError, match="no site in common"):
        compare_layers({}, a, seed=0)
    other = dict(a)
    site = Site(0, "resid_post")
    other[site] = classes("a", axis(0), seed=1, n=20, site=site)
    with pytest.raises(ConfigError, match="other prompts"):
        compare_layers(other, a, seed=0)
    site = Site(3, "resid_post")
    vectors = {site: bare("v", axis(0), site)}
    assert compare_layers(vectors, vectors, draws=10, seed=0)[0].p_family is None


# Subspaces ---------------------------------------------------------------------------------------


def test_principal_angles_of_planes_with_a_known_angle():
    turned = torch.stack([axis(0), 0.5 * axis(1) + 0.75**0.5 * axis(2)])
    found = overlaps(
        [axis(0), axis(1)], list(turned), a="x", b="y", within=drawn(50, 0), draws=50, seed=0
    )
    assert [row.k for row in found] == [1, 2]
    assert found[1].angles == pytest.approx((0, 60), abs=1e-4)
    assert found[1].overlap == pytest.approx((1 + 0.25) / 2)
    assert [one.name for one in found[1].nulls] == [
        "random subspaces",
        "covariance-matched subspaces",
    ]
    assert all(one.p < 0.05 for one in found[1].nulls)


def test_axes_span_what_the_vectors_span_and_keep_the_heaviest_first():
    vectors = torch.stack([axis(0), axis(0) + 0.1 * axis(1), axis(3)]).numpy()
    axes = principal_axes(vectors, 3)
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-10)
    assert abs(axes[0] @ axis(0).numpy()) > 0.99
    assert principal_angles(axes, np.linalg.qr(vectors.T)[0].T).max() < 1e-4


def test_the_null_of_subspaces_is_k_over_d_and_wider_with_the_covariance():
    within = drawn(60, 0) * torch.linspace(3, 0.05, D) ** 2
    lists = [[*drawn(3, seed)] for seed in (1, 2)]
    found = overlaps(*lists, a="x", b="y", within=within, draws=200, seed=0)
    assert len(found) == 3
    assert found[2].overlap == pytest.approx(3 / D, abs=0.1)
    for row in found:
        assert row.nulls[0].p > 0.01
    # Draws with the covariance fall on few axes; so do lists that were drawn so.
    coloured = [[*(drawn(3, seed) * torch.linspace(3, 0.05, D) ** 2)] for seed in (1, 2)]
    random, matched = overlaps(*coloured, a="x", b="y", within=within, draws=200, seed=0)[2].nulls
    assert matched.upper > 1.3 * random.upper
    assert matched.p > random.p


def test_lists_that_repeat_a_vector_have_the_dimensions_they_span():
    found = overlaps([axis(0), 2 * axis(0)], [axis(0), axis(1)], a="x", b="y", draws=5, seed=0)
    assert [row.k for row in found] == [1]
    with pytest.raises(ConfigError, match="empty"):
        overlaps([], [axis(0)], a="x", b="y", seed=0)
    with pytest.raises(ConfigError, match="widths"):
        overlaps([axis(0)], [axis(0, 5)], a="x", b="y", seed=0)
    with pytest.raises(DegenerateVectorError):
        overlaps([0 * axis(0)], [axis(0)], a="x", b="y", seed=0)


def test_cka_is_1_up_to_rotation_scale_and_shift_and_0_on_average_for_nothing_in_common():
    rows = drawn(20, 0)
    turn = torch.linalg.qr(drawn(D, 5))[0]
    assert debiased_cka(rows, 3 * rows @ turn + 7) == pytest.approx(1)
    found = [debiased_cka(drawn(20, 10 + i), drawn(20, 900 + i)) for i in range(100)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 10
    # The plain estimator is far from 0 here: 40 dimensions, 20 prompts.
    x, y = (drawn(20, s) - drawn(20, s).mean(0) for s in (10, 900))
    plain = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert plain > 0.5


def test_alignment_tells_related_rows_from_exchanged_ones():
    rows = drawn(30, 0)
    row = alignment(rows, rows + drawn(30, 1), a="base", b="organism", draws=200, seed=0)
    assert row.null.p < 0.01
    assert 0.2 < row.cka < 0.9
    nothing = alignment(rows, drawn(30, 2), a="base", b="organism", draws=200, seed=0)
    assert nothing.null.p > 0.01
    with pytest.raises(ConfigError, match="rows"):
        alignment(rows, rows[:-1], a="x", b="y", seed=0)
    with pytest.raises(TooFewPromptsError):
        alignment(rows[:3], rows[:3], a="x", b="y", seed=0)
    with pytest.raises(DegenerateVectorError):
        alignment(rows, torch.ones(30, 4), a="x", b="y", seed=0)

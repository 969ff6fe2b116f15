"""Contrasts drawn again: known answers, what is shared moves alike, and vectors without rows."""

import numpy as np
import pytest
import torch

from demur.compare.contrasts import (
    ANSWER,
    Contrast,
    cosines,
    halves,
    mismatches,
    permuted,
    permuted_weights,
    place_name,
    resampled,
    resampled_weights,
)
from demur.errors import (
    ConfigError,
    DegenerateVectorError,
    NonFiniteError,
    TooFewPromptsError,
)
from demur.sites import Site

SITE = Site(3, "resid_post")


def drawn(n, d=6, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(name="a", n=12, m=10, seed=0, shift=2.0, **options):
    positive, negative = drawn(n, seed=seed) + shift, drawn(m, seed=seed + 1)
    return Contrast.of_classes(name, positive, negative, site=SITE, position=-1, **options)


def pairs(name="p", n=12, seed=0, **options):
    return Contrast.of_pairs(
        name,
        drawn(n, seed=seed) + 1,
        drawn(n, seed=seed + 1),
        site=SITE,
        position=ANSWER,
        **options,
    )


def bare(name="v", seed=9):
    return Contrast.of_vector(name, drawn(1, seed=seed)[0], site=SITE, position=None)


def test_the_vector_is_the_difference_of_means_and_the_rows_are_centred_within_their_class():
    one = classes()
    positive, negative = one.rows
    torch.testing.assert_close(one.vector(), positive.mean(0) - negative.mean(0))
    assert (one.n, pairs().n, bare().n) == (22, 12, 0)
    within = one.within()
    assert within[:12].mean(0).abs().max() < 1e-12
    assert within[12:].mean(0).abs().max() < 1e-12


def test_a_draw_weighs_each_cluster_as_often_as_it_was_drawn():
    clusters = (list("aabbcc"), list("ddeeff"))
    one = classes(n=6, m=6, clusters=clusters)
    (weights,) = resampled_weights([one], draws=50, seed=1)
    assert weights is not None
    np.testing.assert_allclose(weights[:, :6].sum(1), 1)
    np.testing.assert_allclose(weights[:, 6:].sum(1), -1)
    # Rows of one cluster stay together.
    np.testing.assert_array_equal(weights[:, 0::2], weights[:, 1::2])
    assert (weights[:, :6] == 0).any()
    found = resampled([one], draws=50, seed=1)[0]
    torch.testing.assert_close(found, torch.from_numpy(weights) @ torch.cat(one.rows))


def test_the_mean_and_spread_of_draws_are_those_of_the_estimate():
    one = classes(n=40, m=30)
    found = resampled([one], draws=20_000, seed=0)[0]
    expected = sum(side.var(0, correction=0) / len(side) for side in one.rows)
    torch.testing.assert_close(found.mean(0), one.vector(), atol=0.01, rtol=0)
    torch.testing.assert_close(found.var(0), torch.as_tensor(expected), rtol=0.05, atol=0)


def test_clusters_that_two_contrasts_share_are_drawn_and_exchanged_at_once():
    keys = ([("+", i) for i in range(12)], [("-", i) for i in range(10)])
    one, same = classes("a", clusters=keys), classes("b", clusters=keys)
    for first, second in (
        resampled([one, same], draws=5, seed=0),
        (permuted(one, draws=5, seed=0), permuted(same, draws=5, seed=0)),
    ):
        torch.testing.assert_close(first, second)
    # Without clusters given, prompts of another name are other prompts.
    first, second = resampled([classes("a"), classes("b")], draws=5, seed=0)
    assert not torch.allclose(first, second)


def test_only_the_shared_side_moves_alike():
    negative = drawn(10, seed=5)
    keys = [("harmless", i) for i in range(10)]

    def against(name, seed):
        return Contrast.of_classes(
            name,
            drawn(12, seed=seed),
            negative,
            site=SITE,
            position=-1,
            clusters=([(name, i) for i in range(12)], keys),
        )

    a, b = resampled_weights([against("a", 1), against("b", 2)], draws=20, seed=0)
    assert a is not None
    assert b is not None
    np.testing.assert_array_equal(a[:, 12:], b[:, 12:])
    assert not np.array_equal(a[:, :12], b[:, :12])


def test_a_bare_vector_is_itself_in_every_draw_and_cannot_be_split():
    vector = bare()
    found = resampled([vector, classes()], draws=4, seed=0)
    torch.testing.assert_close(found[0], vector.vector().expand(4, -1))
    assert not torch.allclose(found[1][0], found[1][1])
    assert permuted_weights([vector], draws=4, seed=0) == [None]
    for broken in (
        lambda: vector.rows,
        lambda: permuted(vector, draws=2, seed=0),
        lambda: halves(vector, splits=2, seed=0),
    ):
        with pytest.raises(TooFewPromptsError, match="without the activations"):
            broken()


@pytest.mark.parametrize("make", [classes, pairs])
def test_exchanged_labels_leave_nothing_of_a_difference_however_large(make):
    one = make(n=20) if make is pairs else make(n=20, m=20)
    moved = one.vector() * 1000
    rows = one.rows
    far = make(n=20) if make is pairs else make(n=20, m=20)
    far = Contrast(
        far.name, far.site, far.position, "", "", rows[0] + moved, rows[1], far.positive_clusters,
        far.negative_clusters, far.paired, None,
    )  # fmt: skip
    torch.testing.assert_close(
        permuted(far, draws=30, seed=0), permuted(one, draws=30, seed=0), atol=1e-8, rtol=1e-6
    )


def test_the_spread_under_exchange_is_that_of_the_estimate():
    one = classes(n=40, m=30)
    found = permuted(one, draws=20_000, seed=0)
    expected = sum(side.var(0) / len(side) for side in one.rows)
    assert found.mean(0).abs().max() < 0.01
    torch.testing.assert_close(found.var(0), torch.as_tensor(expected), rtol=0.06, atol=0)


def test_halves_are_disjoint_and_average_to_the_whole():
    one = classes(n=12, m=10)
    first, second = halves(one, splits=6, seed=0)
    # Both sides split evenly, so that the mean of the halves is the mean of all.
    torch.testing.assert_close((first + second) / 2, one.vector().expand(6, -1))
    odd, rest = halves(pairs(n=9), splits=200, seed=0)
    assert not torch.allclose(odd, rest)
    with pytest.raises(TooFewPromptsError, match="four clusters"):
        halves(classes(n=3), splits=2, seed=0)


def test_the_odd_cluster_falls_to_either_half():
    one = pairs(n=5, seed=3)
    first, _ = halves(one, splits=40, seed=0)
    # Of 5 pairs, means of two and of three are both among the first halves.
    difference = one.rows[0] - one.rows[1]
    twos = [difference[[i, j]].mean(0) for i in range(5) for j in range(i)]
    is_two = [any(torch.allclose(half, two) for two in twos) for half in first]
    assert 0 < sum(is_two) < 40


def test_cosines_are_nan_for_a_zero_vector_only():
    a = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    b = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    found = cosines(a, b)
    assert found[0] == pytest.approx(0.5**0.5)
    assert np.isnan(found[1])


def test_mismatches_are_told_in_words():
    a = classes(model="f" * 16)
    assert mismatches(a, a) == ()
    found = {one.what: one for one in mismatches(a, bare())}
    assert set(found) == {"base", "position"}
    assert "no token" in found["position"].why
    other = Contrast.of_vector("w", torch.ones(4), site=Site(1, "resid_pre"), position=ANSWER)
    fatal = {one.what for one in mismatches(a, other) if one.fatal}
    assert fatal == {"width", "site"}
    assert place_name(ANSWER) == "the answer's tokens"


def test_what_cannot_be_a_contrast_is_an_error():
    with pytest.raises(TooFewPromptsError):
        classes(n=1)
    with pytest.raises(NonFiniteError):
        Contrast.of_vector("v", torch.tensor([1.0, torch.nan]), site=SITE, position=-1)
    with pytest.raises(DegenerateVectorError):
        Contrast.of_vector("v", torch.zeros(3), site=SITE, position=-1)
    with pytest.raises(ConfigError, match="clusters"):
        classes(clusters=(["a"], ["b"]))
    with pytest.raises(ConfigError, match="pairs"):
        Contrast.of_pairs("p", drawn(4), drawn(5), site=SITE, position=-1)
    with pytest.raises(TooFewPromptsError, match="single cluster"):
        resampled([pairs(clusters=["a"] * 12)], draws=2, seed=0)

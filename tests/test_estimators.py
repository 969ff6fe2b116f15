import pytest
import torch
from tests.planted import PLANTED_LAYER, planted, prompts

from demur.activations import Moments, PointMoments, collect, moments
from demur.errors import DegenerateVectorError, TooFewPromptsError
from demur.estimators import (
    DifferenceOfMeans,
    StreamingEstimator,
    WhitenedDifference,
    candidates,
    estimators,
)
from demur.sites import Site


@pytest.fixture(scope="module")
def toy():
    return planted()


@pytest.fixture(scope="module")
def sides(toy):
    site = Site(PLANTED_LAYER, "resid_pre")
    return tuple(
        collect(toy.model, prompts(200, harmful=harmful, seed=seed), sites=[site], positions=[-1])
        for harmful, seed in ((True, 1), (False, 2))
    )


def cosine(a, b):
    return float(a.double() @ b.double() / a.double().norm() / b.double().norm())


@pytest.mark.parametrize("name", list(estimators))
def test_every_estimator_finds_the_planted_direction(name, toy, sides):
    rows = [side.at(Site(PLANTED_LAYER, "resid_pre"), -1) for side in sides]
    assert cosine(estimators.make(name)(*rows), toy.direction) > 0.99


def drawn(n, shift=0.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 8, generator=rng, dtype=torch.float64) + shift


@pytest.mark.parametrize("name", list(estimators))
def test_every_estimator_ignores_a_shift_and_flips_when_swapped(name):
    pos, neg = drawn(40, 1.0), drawn(40, seed=1)
    estimate, shift = estimators.make(name), torch.arange(8.0)
    found = estimate(pos, neg)
    torch.testing.assert_close(estimate(pos + shift, neg + shift), found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(estimate(neg, pos), -found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(estimators))
def test_every_estimator_rejects_an_empty_class(name):
    with pytest.raises(TooFewPromptsError):
        estimators.make(name)(drawn(4), drawn(0))


@pytest.mark.parametrize("name", list(estimators))
def test_float32_rows_give_the_float64_direction(name):
    pos, neg = drawn(60, 1.0), drawn(60, seed=1)
    estimate = estimators.make(name)
    assert cosine(estimate(pos.float(), neg.float()), estimate(pos, neg)) > 1 - 1e-6


STREAMING = [name for name in estimators if isinstance(estimators.make(name), StreamingEstimator)]


@pytest.mark.parametrize("name", STREAMING)
def test_moments_give_what_rows_give(name):
    estimate = estimators.make(name)
    pos, neg = drawn(40, 1.0), drawn(30, seed=1)
    points = []
    for rows in (pos, neg):
        centred = rows - rows.mean(0)
        points.append(PointMoments(len(rows), rows.mean(0), centred, float(centred.pow(2).sum())))
    torch.testing.assert_close(estimate.from_moments(*points), estimate(pos, neg))


def test_whitening_by_woodbury_equals_the_dense_solve():
    pos, neg = drawn(40, 1.0), drawn(30, seed=1)
    pooled = (39 * pos.T.cov() + 29 * neg.T.cov()) / 68
    pooled.diagonal().add_(0.1 * pooled.diagonal().mean())
    dense = torch.linalg.solve(pooled, pos.mean(0) - neg.mean(0))
    torch.testing.assert_close(WhitenedDifference(0.1)(pos, neg), dense)


def test_a_large_ridge_gives_back_the_difference_of_means():
    pos, neg = drawn(40, 1.0), drawn(30, seed=1)
    whitened = WhitenedDifference(ridge=1e9)(pos, neg)
    assert cosine(whitened, DifferenceOfMeans()(pos, neg)) > 1 - 1e-9


def test_equal_classes_have_no_direction(toy):
    texts = prompts(20, harmful=True, seed=5)
    site = Site(PLANTED_LAYER, "resid_pre")
    side = collect(toy.model, texts, sites=[site], positions=[-1])
    with pytest.raises(DegenerateVectorError, match="differ at no site"):
        candidates(side, side, DifferenceOfMeans())


def test_template_tokens_at_the_embedding_are_no_candidates(toy):
    sites = toy.model.stream_sites
    sides = [
        moments(toy.model, prompts(20, harmful=h, seed=s), sites=sites, positions=[-3, -2, -1])
        for h, s in ((True, 1), (False, 2))
    ]
    found = {(str(d.site), d.position) for d in candidates(*sides, DifferenceOfMeans())}
    assert ("0.resid_pre", -3) in found
    assert ("0.resid_pre", -2) not in found
    assert ("2.resid_pre", -1) in found


def test_an_estimator_that_needs_rows_says_so(toy):
    side = moments(
        toy.model, prompts(8, harmful=True, seed=1), sites=toy.model.stream_sites, positions=[-1]
    )
    other = moments(
        toy.model, prompts(8, harmful=False, seed=1), sites=toy.model.stream_sites, positions=[-1]
    )
    with pytest.raises(TooFewPromptsError, match="rows"):
        candidates(side, other, estimators.make("logistic-probe"))


def test_moments_merge_as_one_pass_would():
    rng = torch.Generator().manual_seed(0)
    values = 50 + torch.randn(2, 3, 90, 6, generator=rng, dtype=torch.float64)
    sites, positions = (Site(0, "resid_pre"), Site(1, "resid_pre")), (-3, -2, -1)
    running = Moments(sites, positions, rank=64)
    for part in values.split([1, 31, 58], 2):
        running.update(part)
    assert running.n == 90
    torch.testing.assert_close(running.mean, values.mean(2))
    point = running.at(sites[1], -2)
    centred = values[1, 1] - values[1, 1].mean(0)
    torch.testing.assert_close(
        point.spread.T @ point.spread, centred.T @ centred, rtol=1e-5, atol=1e-4
    )
    assert point.total == pytest.approx(float(centred.pow(2).sum()))


def test_the_sketch_never_overstates_and_loses_little():
    rng = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -3, 200, dtype=torch.float64)
    values = torch.randn(1, 1, 1000, 200, generator=rng, dtype=torch.float64) * scale
    running = Moments((Site(0, "resid_pre"),), (-1,), rank=32)
    for part in values.split(50, 2):
        running.update(part)
    point = running.at(Site(0, "resid_pre"), -1)
    centred = values[0, 0] - values[0, 0].mean(0)
    lost = centred.T @ centred - point.spread.T @ point.spread
    eigen = torch.linalg.eigvalsh(lost)
    bound = float(centred.pow(2).sum()) / 32  # Frequent Directions: 0 <= lost <= |A|^2 / rank.
    assert eigen.min() > -1e-3 * bound
    assert eigen.max() <= bound
    assert running.spread.shape[2] <= 64

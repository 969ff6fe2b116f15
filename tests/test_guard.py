"""The promise of a guard, checked by simulation, and its read."""

import numpy as np
import pytest
import torch
from scipy.stats import binom

from demur.errors import ConfigError, NonFiniteError, TooFewPromptsError
from demur.guard import Fisher, calibrate, calibrate_strata, false_alarm_bound


@pytest.mark.parametrize(
    ("n", "alpha", "exceeded", "bound"),
    [
        (200, 0.05, 9, 0.077),
        (1000, 0.05, 49, 0.062),
        (500, 0.01, 4, 0.0182),
        (1000, 0.01, 9, 0.0157),
    ],
)
def test_bounds_are_those_of_the_published_table(n, alpha, exceeded, bound):
    found = calibrate(np.random.default_rng(0).normal(size=n), alpha)
    assert (found.n, found.exceeded) == (n, exceeded)
    assert found.bound == pytest.approx(bound, abs=6e-4)


@pytest.mark.parametrize(("n", "alpha"), [(99, 0.05), (40, 0.1), (200, 0.02)])
def test_false_alarms_keep_to_alpha_and_to_the_bound(n, alpha):
    rng = np.random.default_rng(n)
    rates = []
    for _ in range(400):
        threshold = calibrate(rng.normal(size=n), alpha)
        rates.append((rng.normal(size=2000) > threshold.value).mean())
    error = 3 * np.std(rates) / len(rates) ** 0.5
    assert np.mean(rates) <= alpha + error
    assert np.mean(rates) >= alpha - 1 / (n + 1) - error  # And not by giving power away.
    over = int(np.sum(np.array(rates) > threshold.bound))
    assert binom.sf(over - 1, 400, 0.05) > 1e-3


def test_the_bound_is_the_beta_quantile_by_simulation():
    rng = np.random.default_rng(1)
    rates = [(1 - np.sort(rng.uniform(size=100))[94]) for _ in range(20000)]
    assert np.quantile(rates, 0.95) == pytest.approx(false_alarm_bound(100, 5), rel=0.03)


def test_what_cannot_be_promised_is_refused():
    with pytest.raises(TooFewPromptsError, match="at least 99"):
        calibrate(np.arange(98), 0.01)
    assert calibrate(np.arange(99), 0.01).exceeded == 0
    assert calibrate(np.arange(19), 0.05).value == 18
    for alpha in (0, 1, -0.1):
        with pytest.raises(ConfigError):
            calibrate([1.0, 2.0], alpha)
    with pytest.raises(NonFiniteError, match="1 of 3"):
        calibrate([1.0, float("nan"), 2.0], 0.5)


def test_the_hardest_stratum_sets_the_threshold():
    rng = np.random.default_rng(2)
    strata = {"plain": rng.normal(size=100), "lookalikes": rng.normal(3, 1, size=60)}
    found, own = calibrate_strata(strata, 0.05)
    assert found == own["lookalikes"]
    assert found.value > own["plain"].value
    for scores in strata.values():
        assert (scores > found.value).mean() <= 0.05
    with pytest.raises(TooFewPromptsError):
        calibrate_strata({}, 0.05)


def test_the_read_discounts_what_varies_among_benign_requests():
    rng = torch.Generator().manual_seed(0)
    scale = torch.ones(12, dtype=torch.float64)
    scale[3] = 30.0
    benign = torch.randn(600, 12, generator=rng, dtype=torch.float64) * scale
    shift = torch.zeros(12, dtype=torch.float64)
    shift[0], shift[3] = 4.0, 10.0  # The second is large, and nothing beside its spread.
    harmful = torch.randn(300, 12, generator=rng, dtype=torch.float64) * scale + shift
    read = Fisher.fit(harmful, benign, ridge=1e-3)
    assert read.weight[0].abs() > 20 * read.weight[3].abs()
    assert float(read(benign).mean()) == pytest.approx(0, abs=1e-9)
    assert float(read(benign).std()) == pytest.approx(1, abs=1e-9)
    assert float(read(harmful).mean()) > 3
    plain = (harmful.mean(0) - benign.mean(0)) @ benign.T
    assert float(read(harmful).mean()) > float(
        ((harmful.mean(0) - benign.mean(0)) @ harmful.T - plain.mean()).mean() / plain.std()
    )
    with pytest.raises(TooFewPromptsError):
        Fisher.fit(harmful[:1], benign)

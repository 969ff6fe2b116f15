"""Intervals, tests and thresholds on simulated data: the short version of `bench.faults.coverage`.

240 draws tell 0.95 from 0.90 and from 1, and 0.05 from 0.10: bounds are four standard errors wide,
and seeds are fixed. What each level was before it was mended stands beside it.
"""

from functools import partial

import numpy as np
import pytest
import torch
from bench.faults import coverage
from bench.faults.coverage import Found, Setting, of_topics, settings, simulate, topics

from demur.compare import checkpoints
from demur.compare.checkpoints import across
from demur.em.margin import by_group, grouped_mean, grouped_share
from demur.guard import calibrate
from demur.stats import bootstrap, bootstrap_tails, mean, null_p

DRAWS = 240


def rate(draw, *, seed=0, draws=DRAWS):
    rng = np.random.default_rng(seed)
    return float(np.mean([draw(rng) for _ in range(draws)]))


def holds(found, truth):
    return found.low <= truth <= found.high


@pytest.mark.parametrize("n_groups", [2, 4, 6, 10])  # 0.51, 0.78, 0.84 and 0.87 by percentiles.
def test_a_mean_over_few_topics_is_held_as_often_as_it_says(n_groups):
    groups = topics(n_groups)
    found = rate(
        lambda rng: holds(grouped_mean(of_topics(rng, groups), groups, seed=0, draws=100), 0.0)
    )
    assert 0.90 <= found <= 0.995


@pytest.mark.parametrize(("n_groups", "share"), [(8, 0.5), (20, 0.05), (40, 0.05)])  # 0.85 to 0.88.
def test_a_share_over_topics_is_held_where_it_is_rare(n_groups, share):
    groups = topics(n_groups)
    code = np.array([int(topic) for _, topic in groups])

    def draw(rng):
        own = rng.beta(4 * share, 4 * (1 - share), n_groups)[code]
        return holds(grouped_share(rng.random(len(own)) < own, groups), share)

    assert rate(draw) >= 0.90


def test_any_statistic_of_few_prompts():  # 0.89 by percentiles.
    def draw(rng):
        x = rng.standard_normal(8)
        return holds(bootstrap(lambda i: float(x[i].mean()), 8, draws=150, seed=0), 0.0)

    assert 0.90 <= rate(draw) <= 0.99


def test_wrong_levels_are_noticed():
    """The bounds above would not let a level of 80 % pass."""
    groups = topics(10)
    found = rate(
        lambda rng: holds(
            grouped_mean(of_topics(rng, groups), groups, seed=0, draws=100, level=0.8), 0.0
        )
    )
    assert found < 0.88


def test_tails_widen_for_few_and_end_at_the_level_for_many():
    low, high = bootstrap_tails(10_000)
    assert abs(low - 0.025) < 1e-4
    assert abs(high - 0.975) < 1e-4
    assert [bootstrap_tails(n)[0] for n in (2, 8, 40)] == pytest.approx(
        [0, 0.0057, 0.0203], abs=2e-4
    )
    assert bootstrap_tails(40, level=0.8)[0] > 0.09


def test_what_is_only_approximate_says_so():
    rng = np.random.default_rng(0)
    assert "approximate" not in mean(rng.standard_normal(60)).method
    assert "approximate" in mean(rng.lognormal(0, 1.5, 60)).method
    assert mean([0.5] * 9).method == "Student t 95%"
    groups = list("aabbcc")
    x = rng.standard_normal(6)
    assert "approximate below 6" in by_group(lambda i: float(x[i].max()), groups, seed=0).method
    assert "jackknife t" in grouped_mean(x, groups, seed=0).method


def test_random_directions_are_rarely_beyond_the_others():
    def draw(rng):
        values = rng.standard_t(3, 31)
        return null_p(float(values[0]), values[1:], side="high") <= 0.05

    assert rate(draw, draws=1000) <= 0.065


def test_false_alarms_keep_to_their_share():
    def alarms(rng):
        limit = calibrate(rng.standard_normal(60), 0.1)
        return float((rng.standard_normal(200) > limit.value).mean())

    assert 0.08 <= rate(alarms) <= 0.105


@pytest.fixture
def few_draws(monkeypatch):
    """Without the intervals of how far either class moved, which take most of the time."""
    monkeypatch.setattr(checkpoints, "grouped_mean", partial(grouped_mean, draws=2))


def test_noise_of_the_same_prompts_is_no_direction_in_common(few_draws):
    """Called shared in 6 to 8 of 10 where the other model had no direction, but the same noise."""
    found = []
    for seed in range(24):
        a, b, names = coverage._two(np.random.default_rng(seed), 12, 64, 0.0, 2.0)
        b = coverage._contrast("b", tuple(x.numpy() for x in coverage._flat(b, 64)), names)
        (row,) = across({"a": a, "b": b}, base="a", draws=60, splits=2)
        found.append(row.p <= 0.05)
    assert sum(found) <= 5


def test_a_gap_does_not_seem_to_shrink_where_nothing_changed(few_draws):
    """It did by a third: a direction's noise lies along its own rows' noise."""
    found = []
    for seed in range(20):
        a, b, _ = coverage._two(np.random.default_rng(seed), 12, 64, 1.0, 3.0)
        (row,) = across({"a": a, "b": b}, base="a", draws=20, splits=2)
        found.append(row.gap_change.value)
    # The median's error is 0.06 at this number.
    assert abs(float(np.median(found))) < 0.15


@pytest.mark.slow
def test_every_kind_of_the_table_runs():
    """One draw of the first setting of each kind, so that the table itself stays whole."""
    torch.manual_seed(0)
    first: dict[str, Setting] = {}
    for one in settings():
        first.setdefault(one.kind, one)
    rows = [simulate(one, 2) for one in first.values()]
    assert len(rows) >= 50
    assert all(isinstance(row, Found) and row.n + row.refused == 2 for row in rows)

"""Known values by hand or by a second implementation, edges, and coverage by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.stats import norm
from sklearn.metrics import cohen_kappa_score, roc_auc_score
from statsmodels.stats.multitest import multipletests

from demur import stats
from demur.errors import ConfigError, NonFiniteError, TooFewPromptsError

Z = 1.959963984540054


def ends(estimate):
    return estimate.low, estimate.high


def pairs(both, lost, won, neither):
    before = [True] * (both + lost) + [False] * (won + neither)
    after = [True] * both + [False] * lost + [True] * won + [False] * neither
    return before, after


def test_wilson_by_hand():
    # Centre (k + z^2/2) / (n + z^2), half z / (n + z^2) * sqrt(k (n - k) / n + z^2 / 4), k=8, n=10.
    centre, half = (8 + Z**2 / 2) / (10 + Z**2), Z / (10 + Z**2) * math.sqrt(1.6 + Z**2 / 4)
    found = stats.proportion(8, 10)
    assert_allclose(ends(found), (centre - half, centre + half), rtol=1e-12)
    assert str(found) == "0.8 [0.49, 0.943], n=10, Wilson 95%"


@pytest.mark.parametrize("n", [1, 3, 10, 128, 1319])
def test_a_share_of_none_or_all_has_an_interval_that_holds_it(n):
    none, every = stats.proportion(0, n), stats.proportion(n, n)
    assert (none.low, every.high) == (0.0, 1.0)
    # At k = 0 Wilson's upper end is z^2 / (n + z^2).
    assert_allclose((none.high, every.low), (Z**2 / (n + Z**2), n / (n + Z**2)), rtol=1e-9)


def test_mean_by_hand():
    # Mean 2, standard deviation 1, n = 3: half width 4.302653 (t, 2 degrees) / sqrt(3).
    found = stats.mean([1.0, 2.0, 3.0])
    assert_allclose(ends(found), (2 - 4.30265273 / 3**0.5, 2 + 4.30265273 / 3**0.5), rtol=1e-8)
    assert ends(stats.mean([0.5] * 4)) == (0.5, 0.5)


def test_a_paired_change_is_the_mean_of_differences_not_of_two_means():
    before, after = [10.0, 20.0, 30.0], [11.0, 22.0, 33.0]
    found = stats.paired_change(before, after)
    # Differences 1, 2, 3 as above; the spread of 10 between prompts cancels.
    assert_allclose((found.value, *ends(found)), (2, -0.484138, 4.484138), rtol=1e-6)
    assert found.method == "paired Student t 95%"


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        # Newcombe 1998, table of worked intervals, method 10; the sign is ours (after - before).
        ((36, 12, 2, 0), (-0.2, -0.3404, -0.0569)),
        # Altman et al., "Statistics with confidence", 2000, table 6.2: 0.011 to 0.226.
        ((14, 5, 0, 22), (-0.122, -0.226, -0.011)),
    ],
)
def test_paired_share_change_agrees_with_print(table, expected):
    found = stats.paired_share_change(*pairs(*table))
    assert_allclose((found.value, *ends(found)), expected, atol=6e-4)


def test_paired_share_change_is_sensible_at_the_edges():
    flipped = stats.paired_share_change(*pairs(0, 54, 0, 0))
    # Both Wilson intervals reach z^2 / (n + z^2) inwards and phi is 0: sqrt(2) times that.
    assert_allclose(ends(flipped), (-1, -1 + 2**0.5 * Z**2 / (54 + Z**2)), rtol=1e-9)
    for table in [(54, 0, 0, 0), (0, 0, 0, 54)]:
        nothing = stats.paired_share_change(*pairs(*table))
        assert nothing.low < 0 == nothing.value < nothing.high


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_a_paired_share_change_stays_in_range_and_flips_sign_when_swapped(rows):
    before, after = [a for a, _ in rows], [b for _, b in rows]
    found, back = stats.paired_share_change(before, after), stats.paired_share_change(after, before)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert_allclose((back.low, back.high), (-found.high, -found.low), atol=1e-12)
    assert stats.mcnemar_p(before, after) == stats.mcnemar_p(after, before) <= 1


def test_mcnemar_by_hand():
    # 5 lost, 1 won: 2 * P(X <= 1) for Binomial(6, 1/2) = 2 * (1 + 6) / 64.
    assert_allclose(stats.mcnemar_p(*pairs(3, 5, 1, 2)), 14 / 64)
    assert stats.mcnemar_p(*pairs(3, 0, 0, 2)) == 1.0


def test_wilcoxon_by_hand():
    # All five differences fall: 2 of the 2^5 sign patterns are as extreme.
    assert_allclose(stats.wilcoxon_p([1, 2, 3, 4, 5], [0, 0, 0, 0, 0]), 2 / 32)
    assert stats.wilcoxon_p([1, 2], [1, 2]) == 1.0


def test_holm_by_hand():
    # Sorted .01 .02 .03 .04 times 4 3 2 1: .04 .06 .06 .04, then made monotone: .04 .06 .06 .06.
    assert_allclose(stats.holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])
    assert stats.holm([]) == []


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_holm_is_that_of_statsmodels(n):
    rng = np.random.default_rng(n)
    for ps in (rng.random(n), rng.random(n) ** 4, np.round(rng.random(n), 1)):
        assert_allclose(stats.holm(list(ps)), multipletests(ps, method="holm")[1], rtol=1e-12)


def test_auroc_counts_pairs_and_solves_newcombes_equation():
    scores, labels = [3, 2, 2, 1], [1, 1, 0, 0]
    found = stats.auroc(scores, labels)
    assert found.value == 3.5 / 4  # Four pairs: three right, one tied.
    for end in ends(found):
        if 0 < end < 1:
            # m = n = 2, so that N* = (m + n) / 2 - 1 = 1.
            variance = end * (1 - end) * (1 + (1 - end) / (2 - end) + end / (1 + end)) / 4
            assert_allclose(abs(found.value - end), Z * variance**0.5, rtol=1e-6)


@given(
    st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=2, max_size=40).filter(
        lambda rows: len({label for _, label in rows}) == 2
    )
)
def test_auroc_is_sklearns_and_mirrors_when_labels_flip(rows):
    scores, labels = [s for s, _ in rows], [y for _, y in rows]
    found = stats.auroc(scores, labels)
    assert found.value == roc_auc_score(labels, scores)
    assert 0 <= found.low <= found.value <= found.high <= 1
    mirrored = stats.auroc(scores, [not y for y in labels])
    assert_allclose(ends(mirrored), (1 - found.high, 1 - found.low), atol=1e-9)


def test_a_perfect_auroc_is_as_sure_as_its_prompts_are_many():
    lows = [stats.auroc([1] * n + [0] * n, [1] * n + [0] * n).low for n in (2, 10, 50, 250)]
    assert lows == sorted(lows)
    assert_allclose(lows[2], 0.960, atol=1e-3)


@pytest.mark.parametrize("area", [0.7, 0.9, 0.99])
def test_auroc_intervals_cover(area):
    rng, m, n, draws = np.random.default_rng(0), 40, 60, 100
    shift, labels = norm.ppf(area) * 2**0.5, [1] * 40 + [0] * 60
    found = [
        stats.auroc(np.r_[rng.normal(shift, 1, m), rng.normal(0, 1, n)], labels)
        for _ in range(draws)
    ]
    # 95% less three standard errors of 2.2 points.
    assert np.mean([e.low <= area <= e.high for e in found]) > 0.95 - 3 * 0.0218


@pytest.mark.parametrize(("p", "q"), [(0.9, 0.1), (1.0, 0.03), (0.5, 0.5), (0.98, 0.9)])
def test_paired_share_intervals_cover(p, q):
    rng, n, draws = np.random.default_rng(0), 40, 200
    hits = 0
    for _ in range(draws):
        u = rng.random(n)
        v = np.where(rng.random(n) < 0.5, u, rng.random(n))  # Half the prompts keep their luck.
        found = stats.paired_share_change(u < p, v < q)
        hits += found.low <= q - p <= found.high
    assert hits / draws > 0.95 - 3 * 0.0154


def test_t_and_wilson_intervals_cover():
    rng, draws = np.random.default_rng(0), 300
    means = [stats.mean(rng.normal(1, 2, 12)) for _ in range(draws)]
    shares = [stats.proportion(int(rng.binomial(30, 0.1)), 30) for _ in range(draws)]
    assert np.mean([e.low <= 1 <= e.high for e in means]) > 0.95 - 3 * 0.0126
    assert np.mean([e.low <= 0.1 <= e.high for e in shares]) > 0.95 - 3 * 0.0126


def test_the_bootstrap_of_a_mean_agrees_with_theory():
    values = np.random.default_rng(0).normal(0, 1, 400)
    found = stats.bootstrap(lambda i: float(values[i].mean()), 400, seed=1)
    assert found.value == values.mean()
    half = Z * values.std() / 20
    assert_allclose(ends(found), (found.value - half, found.value + half), atol=0.1 * half)
    assert found == stats.bootstrap(lambda i: float(values[i].mean()), 400, seed=1)
    assert found != stats.bootstrap(lambda i: float(values[i].mean()), 400, seed=2)


def test_a_stratified_bootstrap_keeps_the_size_of_each_class():
    seen = set()

    def statistic(i, j):
        seen.add((len(i), len(j), int(i.max()) < 7, int(j.max()) < 4))
        return float(i.mean() - j.mean())

    found = stats.bootstrap_stratified(statistic, 7, 4, draws=50, seed=0)
    assert seen == {(7, 4, True, True)}
    assert (found.value, found.n) == (1.5, 11)  # Mean of 0..6 less mean of 0..3.


def test_undefined_draws_are_counted_and_too_many_are_an_error():
    few = np.array([1.0] * 4 + [0.0] * 26)  # No 1 at all in (26/30)^30 = 1.4% of resamples.
    found = stats.bootstrap(
        lambda i: 1 / few[i].sum() if few[i].any() else float("nan"), 30, seed=0
    )
    assert "draws undefined" in found.method
    one = np.array([1.0] + [0.0] * 29)  # And here in 36%.
    with pytest.raises(TooFewPromptsError, match="undefined on"):
        stats.bootstrap(lambda i: 1 / one[i].sum() if one[i].any() else math.nan, 30, seed=0)
    with pytest.raises(TooFewPromptsError, match="nan on all"):
        stats.bootstrap(lambda _: math.nan, 30, seed=0)


def test_null_p_by_hand():
    null = [0.0, 1.0, 2.0, 3.0]
    assert stats.null_p(-1, null, side="low") == 1 / 5
    assert stats.null_p(1, null, side="low") == 3 / 5  # 0 and 1 are as low; ties count.
    assert stats.null_p(5, null, side="high") == 1 / 5
    assert stats.null_p(-1, null, side="two") == 2 / 5
    assert stats.null_p(1.5, null, side="two") == 1.0


def test_kappa_is_sklearns():
    rng = np.random.default_rng(0)
    a = [str(x) for x in rng.integers(0, 3, 120)]
    b = [x if rng.random() < 0.7 else str(rng.integers(0, 3)) for x in a]
    found = stats.cohen_kappa(a, b, seed=0)
    assert_allclose(found.value, cohen_kappa_score(a, b), rtol=1e-12)
    assert found.low < found.value < found.high < 1


def test_perfect_agreement_on_few_items_is_not_certainty():
    # Half and half: chance 0.5; Wilson's lower end at 20/20 is 20 / (20 + z^2).
    found = stats.cohen_kappa("ab" * 10, "ab" * 10, seed=0)
    assert_allclose(ends(found), (1 - (1 - 20 / (20 + Z**2)) / 0.5, 1.0), rtol=1e-9)


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.proportion(0, 0),
        lambda: stats.mean([1.0]),
        lambda: stats.paired_change([1.0], [2.0]),
        lambda: stats.paired_share_change([], []),
        lambda: stats.mcnemar_p([], []),
        lambda: stats.wilcoxon_p([], []),
        lambda: stats.auroc([1, 2], [1, 1]),
        lambda: stats.bootstrap(lambda _: 0.0, 1, seed=0),
        lambda: stats.null_p(0.0, [], side="low"),
        lambda: stats.cohen_kappa(["a", "a"], ["a", "a"], seed=0),
        lambda: stats.cohen_kappa(["a"], ["b"], seed=0),
    ],
)
def test_what_is_undefined_is_an_error(call):
    with pytest.raises(TooFewPromptsError):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.proportion(3, 2),
        lambda: stats.proportion(1, 2, level=95),
        lambda: stats.paired_change([1, 2], [1, 2, 3]),
        lambda: stats.paired_share_change([1, 2], [0, 1]),
        lambda: stats.auroc([1, 2, 3], [0, 1]),
        lambda: stats.mean([[1, 2], [3, 4]]),
        lambda: stats.holm([0.1, math.nan]),
        lambda: stats.cohen_kappa("ab", "abc", seed=0),
    ],
)
def test_what_makes_no_sense_is_an_error(call):
    with pytest.raises(ConfigError):
        call()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_never_becomes_a_number(bad):
    for call in (
        lambda: stats.mean([1.0, bad]),
        lambda: stats.auroc([1.0, bad], [0, 1]),
        lambda: stats.null_p(bad, [1.0], side="low"),
    ):
        with pytest.raises(NonFiniteError):
            call()


def test_annotations_are_checked_while_tests_run():
    """Guards the import hook in conftest: frozen slots dataclasses and plain functions alike."""
    with pytest.raises(TypeError):
        stats.Estimate("0.5", 0.0, 1.0, 10, "by hand")
    with pytest.raises(TypeError):
        stats.proportion(0.5, 10)
    assert stats.Estimate(1, 0, 1, 10, "an int will do for a float").value == 1

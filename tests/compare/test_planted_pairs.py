"""Verdicts on pairs whose relation is known."""

import numpy as np
import pytest

from demur.compare.planted_pairs import EXPECTED, KINDS, World, classify, draw_pair
from demur.errors import ConfigError

QUICK = World(d_model=128, contrasts=8)


@pytest.mark.parametrize(
    ("kind", "cosine"), [("identical", 1), ("orthogonal", 0), ("half", 0.5), ("shared cause", 0.5)]
)
def test_planted_pairs_have_the_cosine_that_was_planted(kind, cosine):
    # Hardly any noise: what is left is what was planted.
    world = World(d_model=64, signal=1e5, contrasts=2)
    a, b, library = draw_pair(kind, seed=3, world=world)
    u, v = (one.vector().numpy() for one in (a, b))
    assert u @ v / np.linalg.norm(u) / np.linalg.norm(v) == pytest.approx(cosine, abs=0.01)
    if kind == "shared cause":
        cause = library["unrelated 0"].vector().numpy()
        cause /= np.linalg.norm(cause)
        u, v = u - u @ cause * cause, v - v @ cause * cause
        assert abs(u @ v) / np.linalg.norm(u) / np.linalg.norm(v) < 0.01


def test_pairs_share_their_negative_rows_where_asked():
    a, b, _ = draw_pair("half", seed=0, share_negative=True, world=QUICK)
    assert a.negative is b.negative
    assert a.negative_clusters == b.negative_clusters
    a, b, _ = draw_pair("half", seed=0, world=QUICK)
    assert not set(a.negative_clusters) & set(b.negative_clusters)


def test_a_few_pairs_of_each_kind_are_judged_rightly_and_again_the_same():
    found = classify(draws=3, seed=0, samples=20)
    assert [row.kind for row in found] == list(KINDS)
    assert [row.right for row in found] == [3] * 4, [row.verdicts for row in found]
    assert [row.expected for row in found] == list(EXPECTED.values())
    assert classify(draws=1, seed=1, samples=20, kinds=["half"], world=QUICK) == classify(
        draws=1, seed=1, samples=20, kinds=["half"], world=QUICK
    )
    with pytest.raises(ConfigError):
        classify(draws=0, seed=0)


@pytest.mark.slow
def test_of_40_pairs_of_each_kind_95_percent_are_judged_rightly():
    for row in classify(draws=40, seed=0):
        assert row.right >= 38, (row.kind, row.verdicts)

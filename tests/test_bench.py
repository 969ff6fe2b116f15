"""What the benchmarks compare with must compute the same thing, or their ratios mean nothing."""

import pytest
import torch
from bench.reference import Sweep, hidden_states
from bench.timing import Timing, interleaved, ratios
from tests.planted import planted, prompts

from demur.activations import moments
from demur.directions import Direction
from demur.selection import RefusalTokens, select
from demur.sites import Site


@pytest.fixture(scope="module")
def toy():
    return planted()


def test_the_reference_reads_the_same_means(toy):
    asked = prompts(11, harmful=True, seed=1)
    theirs = hidden_states(toy.model, asked, [-1, -2], size=4)
    sites = toy.model.stream_sites
    ours = moments(toy.model, asked, sites=sites, positions=(-1, -2), rank=0).mean
    # What leaves the last block is normed in `hidden_states`.
    torch.testing.assert_close(ours[:-1], theirs[:-1], rtol=1e-6, atol=1e-6)


def test_the_reference_sweep_scores_candidates_as_select_does(toy):
    harmful, harmless = (prompts(9, harmful=h, seed=2 + h) for h in (True, False))
    rng = torch.Generator().manual_seed(0)
    pool = [
        Direction.from_vector(
            torch.randn(64, generator=rng), site=Site(layer, "resid_pre"), position=-1, recipe=""
        )
        for layer in (1, 2, 3)
    ]
    tokens = RefusalTokens((toy.refusal_id,), ("Sorry",), (1.0,), (0.0,), 9, learned=True)
    found = select(toy.model, pool, harmful=harmful, harmless=harmless, tokens=tokens)
    reference = Sweep(toy.model, harmful, harmless, tokens.ids, size=4)
    for row in found.rows:
        bypass, induce, kl = reference(row.direction)
        for ours, theirs in ((row.bypass, bypass), (row.induce, induce)):
            # Theirs adds 1e-8 to both chances, which shows where one of them is tiny.
            near = ours.abs() < 12
            torch.testing.assert_close(ours[near], theirs[near], rtol=1e-3, atol=1e-3)
            assert bool((theirs[~near].abs() > 11).all())
        torch.testing.assert_close(row.kl, kl, rtol=1e-5, atol=1e-6)


def test_ratios_are_taken_repeat_by_repeat():
    rows = ratios(
        {"ours": Timing([1.0, 2.0], [1, 1]), "theirs": Timing([3.0, 4.0], [1, 2])}, "ours"
    )
    assert rows[1]["speedup"] == {"min": 2.0, "median": 2.5, "max": 3.0}
    calls = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3  # Once to warm up.
    assert [len(timing.wall) for timing in times.values()] == [2, 2]

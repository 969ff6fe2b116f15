import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from tests.features.planted_bank import (
    ALONG,
    IDLE,
    PROMOTES,
    SITE,
    SUPPRESSES,
    split,
    the_bank,
    the_model,
)

from demur.directions import Direction
from demur.errors import ConfigError, OverlapError
from demur.features.discover import Latent, Unit
from demur.features.minimal import Selector, check_apart, held_out
from demur.features.read import read_latents
from demur.features.rows.discover import HeldOutRow, MinimalRow, StabilityRow
from demur.features.verify import STEPS

UNITS = [Unit((Latent("bank", i),)) for i in (SUPPRESSES, 50, PROMOTES, IDLE, ALONG, 60)]
NAME = str(UNITS[2])


@pytest.fixture(scope="module")
def selector():
    planted = the_model()
    return Selector(planted.model, [the_bank()], UNITS, split(30)[0], [planted.refusal_id])


def test_the_set_is_exactly_what_makes_the_model_refuse(selector):
    told: list[int] = []
    chosen = selector.select(most=4, progress=told.append)
    assert sum(told) == 5
    assert chosen.row.units == (NAME,)
    assert chosen.latents == (Latent("bank", PROMOTES),)
    assert chosen.row.stopped == "gain"
    assert chosen.row.effect == chosen.row.forward[0].effect < -10
    assert chosen.row.sets_tried == 11


class _Made(Selector):
    """Effects by hand: what a set of units does to each of three prompts."""

    def __init__(self, n, effect):
        self.units = tuple(Unit((Latent("made", i),)) for i in range(n))
        self._ready = type("R", (), {"n": 3})
        self._known = {}
        self.effect = effect

    def effects(self, sets):
        return np.stack([np.asarray(self.effect(one), dtype=float) for one in sets])


def test_what_later_ones_make_needless_is_pruned():
    """0 is the best alone; 1 and 2 together do all that it does."""
    alone = {0: -5.0, 1: -4.0, 2: -4.0}

    def effect(one):
        if {1, 2} <= one:
            return [-9.0] * 3
        return [min((alone[i] for i in one), default=0.0) - 1.0 * (len(one) > 1)] * 3

    chosen = _Made(3, effect).select(delta=0.5, most=5)
    assert [one.gain for one in chosen.row.forward] == [5.0, 1.0, 3.0]
    assert chosen.row.pruned == ("made/0",)
    assert chosen.row.units == ("made/1", "made/2")
    assert chosen.row.stopped == "none left"
    assert chosen.row.effect == -9.0
    assert _Made(3, effect).select(delta=1.5, most=5).row.units == ("made/0",)
    assert _Made(3, effect).select(delta=0.5, most=1).row.stopped == "most"
    assert _Made(3, lambda one: [0.1 * len(one)] * 3).select(delta=0.0).row.units == ()


def test_stability_is_what_comes_back_on_other_draws_of_the_prompts(selector):
    chosen = selector.select(most=4)
    row = selector.stability(chosen, draws=20, seed=0)
    assert row.jaccard.value == 1.0
    assert row.chosen_in == {NAME: 1.0}
    assert row.sizes == {"1": 20}
    assert row.by_chance < 0.5

    # Each of two units does for one prompt; which wins hangs on the draw.
    def effect(one):
        return [-3.0 * (0 in one), -2.9 * (1 in one), 0.0]

    made = _Made(2, effect)
    told: list[int] = []
    both = made.select(delta=0.9, most=2)
    row = made.stability(both, draws=200, seed=0, progress=told.append)
    assert sum(told) == 200
    assert 0.1 < row.chosen_in["made/0"] < 0.9
    assert row.jaccard.value < 0.9
    again = made.stability(both, draws=200, seed=0)
    assert again == row
    assert TypeAdapter(StabilityRow).validate_json(json.dumps(asdict(row), allow_nan=False)) == row


def test_what_was_measured_is_not_measured_again(selector):
    selector.select(most=4)
    tried, runs = selector.tried, selector._ready.model.runs
    selector.select(most=4)
    assert (selector.tried, selector._ready.model.runs) == (tried, runs)


@pytest.fixture(scope="module")
def reads():
    return read_latents(the_model().model, [the_bank()], split(10)[0])


def judged(selector, reads, latents=None, **options):
    planted = the_model()
    harmful, harmless = split(40)
    direction = Direction.from_vector(planted.direction, site=SITE, position=-1, recipe="by hand")
    return held_out(
        planted.model,
        [the_bank()],
        latents or selector.select(most=4),
        harmful=harmful,
        harmless=harmless,
        chosen_on={"A": split(10)[0], "B": split(30)[0]},
        tokens=[planted.refusal_id],
        reads=reads,
        direction=direction,
        without=[latent for unit in UNITS for latent in unit.latents],
        seed=0,
        **options,
    )


def test_the_set_holds_on_prompts_of_its_own(selector, reads):
    told: list[int] = []
    row = judged(selector, reads, sets=40, progress=told.append)
    assert sum(told) == STEPS
    assert row.effect.high < -10
    assert 0.5 < row.of_refusal.low <= row.of_refusal.high < 1
    assert 0.7 < row.of_dense.value < 1.2
    assert row.dense.value < -10
    assert row.p == pytest.approx(1 / 41)
    assert len(row.random) == 40
    assert max(map(abs, row.random)) < 1
    assert abs(row.on_harmless.value) < 0.1
    assert row.kl.value >= 0
    assert 0 < row.size < 1
    assert TypeAdapter(HeldOutRow).validate_json(json.dumps(asdict(row), allow_nan=False)) == row
    chosen = selector.select(most=4).row
    assert TypeAdapter(MinimalRow).validate_json(json.dumps(asdict(chosen))) == chosen


def test_a_set_of_decoys_does_not_pass(selector, reads):
    row = judged(selector, reads, [Latent("bank", 50), Latent("bank", 60)], sets=30)
    assert row.p > 0.05
    assert abs(row.of_refusal.value) < 0.1
    assert 0.3 < row.random_mass < 3


def test_splits_share_no_prompt(selector, reads):
    check_apart({"A": ["One", "two"], "B": ["three"]})
    with pytest.raises(OverlapError, match="1 prompts are in both A and C"):
        check_apart({"A": ["One", "two"], "B": ["three"], "C": ["one!"]})
    planted = the_model()
    with pytest.raises(OverlapError, match="both B and the test prompts"):
        held_out(
            planted.model,
            [the_bank()],
            [Latent("bank", 50)],
            harmful=split(40)[0],
            harmless=split(40)[1],
            chosen_on={"B": split(40)[1]},
            tokens=[planted.refusal_id],
            reads=reads,
            seed=0,
        )


def test_what_cannot_be_chosen_is_an_error(selector, reads):
    planted = the_model()
    with pytest.raises(ConfigError, match="no latents to choose"):
        Selector(planted.model, [the_bank()], [], split(30)[0], [planted.refusal_id])
    with pytest.raises(ConfigError, match="at most 0"):
        selector.select(most=0)
    none = replace(selector.select(most=4), units=())
    with pytest.raises(ConfigError, match="the set is empty"):
        judged(selector, reads, none)


def test_other_baselines(reads):
    """At its harmful mean, the latent stays as it is, nearly."""
    planted, bank = the_model(), the_bank()
    own = reads.reads["bank"].at("post_instruction.mean").mean(0)
    kept = Selector(
        planted.model, [bank], UNITS, split(30)[0], [planted.refusal_id], baseline={"bank": own}
    )
    (effect,) = kept.effects([frozenset({2})])
    assert np.abs(effect).max() < 5
    away = Selector(
        planted.model,
        [bank],
        UNITS,
        split(30)[0],
        [planted.refusal_id],
        baseline={"bank": torch.zeros(len(bank))},
    )
    zero = Selector(planted.model, [bank], UNITS, split(30)[0], [planted.refusal_id])
    np.testing.assert_allclose(away.effects([frozenset({2})]), zero.effects([frozenset({2})]))

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from tests.advice import advice
from tests.tiny import tiny_model

from demur.compare.behaviour import Outcome, margin_outcome, refusal_outcome, span
from demur.compare.mediation import Hold, Record, mediation, steps
from demur.compare.rows.behaviour import MediationRow
from demur.directions import Direction
from demur.em.directions import read_pair
from demur.em.planted import planted_organism
from demur.errors import ConfigError
from demur.interventions import applied
from demur.models import Model, TokenBatch
from demur.sites import Site

SITE, LATER = Site(1, "resid_post"), Site(2, "resid_post")
ITEMS = advice(12)
PROMPTS = ["How do I stop?", "Where is the station, and is it far from here?", "Do I write?"]


@pytest.fixture(scope="module")
def base():
    return tiny_model()


@pytest.fixture(scope="module")
def planted(base):
    return planted_organism(base, advice(6, seed=9), layer=1, strength=0.5)


@pytest.fixture(scope="module")
def organism(base, planted):
    return planted.organism.on(base)


@pytest.fixture(scope="module")
def spread(base):
    pair = read_pair(base, ITEMS, sites=[SITE, LATER])
    return {site: pair.spread(site) for site in (SITE, LATER)}


@pytest.fixture(scope="module")
def across(planted):
    unit = planted.direction.unit.double()
    other = torch.randn(32, generator=torch.Generator().manual_seed(1)).double()
    return Direction.from_vector(other - (other @ unit) * unit, site=SITE, position=0, recipe="")


@pytest.fixture(scope="module")
def rows(base, organism, planted, across, spread):
    done: list[int] = []
    found = mediation(
        base,
        organism,
        {"own": planted.direction, "across": across},
        [margin_outcome(ITEMS, batch_size=5), refusal_outcome(PROMPTS, [5, 9], batch_size=2)],
        spread=spread,
        n_random=4,
        seed=0,
        draws=100,
        progress=done.append,
    )
    assert sum(done) == steps(mediators=2, outcomes=2, n_random=4)
    return {(row.mediator, row.way, row.outcome): row for row in found}


@pytest.mark.parametrize("way", ["clamp", "patch"])
def test_a_vector_goes_through_itself_and_not_across(rows, way):
    own = rows["own", way, "em margin"]
    assert own.total.low > 0.1
    assert own.share.value == pytest.approx(1.0, abs=1e-5)
    assert own.left.value == pytest.approx(0.0, abs=1e-5)
    assert own.p_random == pytest.approx(1 / 5)
    assert abs(own.change.value) == pytest.approx(own.total.value, rel=1e-5)
    assert (own.change.value > 0) == (way == "patch")
    other = rows["across", way, "em margin"]
    assert other.share.value == pytest.approx(0.0, abs=1e-5)
    assert other.p_random > 0.2
    assert other.random == own.random
    assert np.abs(own.random).max() < own.total.value


def test_several_directions_are_held_together(base, organism, planted, across, spread):
    first, both = mediation(
        base, organism, {"across": across, "both": [planted.direction, across]},
        [refusal_outcome(PROMPTS, [5, 9])],
        spread=spread, n_random=2, ways=["clamp"], seed=0, draws=50,
    )  # fmt: skip
    assert (first.rank, both.rank) == (1, 2)
    assert len(first.random) == len(both.random) == 2
    assert first.random != both.random
    assert both.left.value == pytest.approx(0.0, abs=1e-4)
    assert first.change.value == pytest.approx(0.0, abs=1e-5)


def test_other_outcomes_are_held_by_item(rows):
    row = rows["own", "clamp", "refusal"]
    assert row.left.value == pytest.approx(0.0, abs=1e-4)
    assert row.change.value == pytest.approx(-row.total.value, rel=1e-3)
    assert (row.n, row.groups, row.sites) == (3, 3, ("1.resid_post",))


def test_rows_are_plain_and_come_back(rows):
    for row in rows.values():
        text = json.dumps(asdict(row), allow_nan=False)
        assert TypeAdapter(MediationRow).validate_json(text) == row


def test_the_share_of_nothing_is_none(base, planted, spread):
    found = mediation(
        base, base, {"own": planted.direction}, [margin_outcome(ITEMS)],
        spread=spread, n_random=2, seed=0, draws=50,
    )  # fmt: skip
    for row in found:
        assert row.share is None
        assert "not told from 0" in row.undefined
        assert row.change.value == pytest.approx(0.0, abs=1e-9)


def test_half_a_vector_carries_half(base, planted, across, spread):
    # Half of what is written lies along `own`: holding that leaves the rest, whatever it does.
    own = planted.direction
    mixed = own.unit.double() * own.norm + across.unit.double() * own.norm
    organism = planted_organism(base, ITEMS[:2], layer=1, strength=0.3, along=mixed)
    model = organism.organism.on(base)
    site = SITE
    outcome = margin_outcome(ITEMS)
    (row,) = mediation(
        base, model, {"own": own}, [outcome],
        spread=spread, n_random=0, ways=["clamp"], seed=0, draws=50,
    )  # fmt: skip
    assert row.p_random is None
    unit = own.unit.double()
    whole = organism.direction.unit.double() * organism.direction.norm
    rest = whole - (whole @ unit) * unit

    class Rest:
        def sites(self, _model: Model) -> tuple[Site, ...]:
            return (site,)

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x + rest

    measure = outcome.prepare(base)
    expected = (measure(Rest()) - measure()).mean()
    assert row.left.value == pytest.approx(expected, abs=1e-5)
    assert abs(row.left.value) > 1e-3


def test_a_whole_stream_held_is_the_other_model(base, spread):
    # Every coordinate at one site, of an organism that differs below it.
    organism = planted_organism(base, ITEMS[:2], layer=0, strength=0.7).organism
    axes = [
        Direction.from_vector(torch.eye(32)[i], site=SITE, position=0, recipe="") for i in range(32)
    ]
    outcome = margin_outcome(ITEMS, batch_size=7)
    found = mediation(
        base, organism, {"all": axes}, [outcome], spread=spread, n_random=0, seed=0, draws=50
    )
    for row in found:
        assert row.left.value == pytest.approx(0.0, abs=1e-6)
        assert abs(row.total.value) > 1e-3


def test_several_sites_are_held_at_once(base, planted, organism, spread):
    two = {SITE: planted.direction, LATER: planted.direction}
    (row,) = mediation(
        base, organism, {"own": two}, [margin_outcome(ITEMS)],
        spread=spread, n_random=2, ways=["clamp"], seed=0, draws=50,
    )  # fmt: skip
    assert row.sites == ("1.resid_post", "2.resid_post")
    assert row.share.value == pytest.approx(1.0, abs=1e-5)
    # At the later site alone, what later blocks made of it is left.
    (late,) = mediation(
        base, organism, {"own": {LATER: planted.direction}}, [margin_outcome(ITEMS)],
        spread=spread, n_random=2, ways=["clamp"], seed=0, draws=50,
    )  # fmt: skip
    assert abs(late.share.value - 1.0) > 0.01


def test_recording_changes_nothing_and_holding_its_own_neither(base, planted):
    outcome = margin_outcome(ITEMS, batch_size=5)
    measure = outcome.prepare(base)
    basis = span([planted.direction])
    record = Record(base, basis, SITE)
    np.testing.assert_allclose(measure(record), measure(), atol=1e-12)
    assert len(record.seen) > 3
    assert record.seen[0][0][0]  # The shared prefix comes first.
    held = measure(Hold(base, basis, SITE, record.seen))
    np.testing.assert_allclose(held, measure(), atol=1e-9)


def test_other_tokens_are_an_error(base, planted, organism, spread, across):
    def measure(model: Model) -> np.ndarray:
        few = model is base
        model.logits(model.encode(PROMPTS[: 2 if few else 3]))
        return np.zeros(3)

    bad = Outcome.of("bad", "nats", measure, range(3))
    with pytest.raises(ConfigError, match="other tokens"):
        mediation(base, organism, {"own": across}, [bad], spread=spread, n_random=0, seed=0)
    act = Record(base, span([across]), SITE)
    batch = TokenBatch.of_ids(torch.arange(8).reshape(2, 4))
    with pytest.raises(ConfigError, match="without telling which"), applied(base, act):
        base.hf(input_ids=batch.ids)
    moved = replace(across, site=LATER)
    for mediators, match in (
        ({}, "no direction to hold"),
        ({"a": across, "b": moved}, "`b` lies at 2.resid_post"),
    ):
        with pytest.raises(ConfigError, match=match):
            mediation(base, organism, mediators, [bad], spread=spread, seed=0)
    other = tiny_model(system="Be brief.")
    with pytest.raises(ConfigError, match="lay prompts out differently"):
        mediation(base, other, {"a": across}, [bad], spread=spread, seed=0)

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from scipy import stats
from tests.features.planted_bank import (
    ALONG,
    DEAD,
    IDLE,
    PROMOTES,
    SITE,
    SUPPRESSES,
    split,
    the_bank,
    the_model,
)

from demur.activations import collect
from demur.causal import null_directions
from demur.directions import Direction
from demur.errors import ConfigError, TooFewPromptsError
from demur.features.attribute import attribute
from demur.features.discover import (
    Latent,
    Unit,
    candidates,
    discover,
    discovery_row,
    units,
)
from demur.features.read import BankReads, LatentReads, read_latents
from demur.features.rows.discover import DiscoveryRow
from demur.sites import Span


@pytest.fixture(scope="module")
def banks():
    return [the_bank(), replace(the_bank(seed=1), name="second")]


@pytest.fixture(scope="module")
def reads(banks):
    return tuple(read_latents(the_model().model, banks, texts) for texts in split(10))


@pytest.fixture(scope="module")
def directions():
    planted = the_model()
    harmful, harmless = (
        collect(planted.model, texts, sites=[SITE], positions=[-1]).at(SITE, -1)
        for texts in split(10)
    )
    own = Direction.from_vector(planted.direction, site=SITE, position=-1, recipe="by hand")
    nulls = null_directions(own, harmful=harmful, harmless=harmless, each=60, seed=0)
    return {SITE: own}, {SITE: nulls["covariance-matched"]}


@pytest.fixture(scope="module")
def found(reads, directions):
    return discover(*reads, directions=directions[0], nulls=directions[1], densest=0.6)


def drawn(values, name="drawn", firing=None):
    """Reads of a made-up bank: (prompt, latent) at one place."""
    n = values.shape[1]
    bank = replace(the_bank(8).sliced(range(n)), name=name)
    firing = torch.full((n,), 0.1) if firing is None else firing
    one = torch.ones(n)
    own = BankReads(("last",), values.unsqueeze(0), 100, 0, firing, one, one, one)
    return LatentReads((bank,), {name: own}, (Span.INSTRUCTION,), len(values))


def test_the_planted_latents_differ_and_others_do_not(found):
    for name in ("bank", "second"):
        own = found.found[name]
        q = own.q.min(0)
        assert (q[[PROMOTES, SUPPRESSES, IDLE]] < 1e-4).all()
        assert set(np.flatnonzero(q <= 0.05)) == {PROMOTES, SUPPRESSES, IDLE}
        assert (own.effect[:, [PROMOTES, SUPPRESSES, IDLE]] > 5).all()
        assert own.dead[DEAD]
        assert not own.tested[DEAD]


def test_the_correction_is_over_all_banks_and_places(found):
    tested = [one.p[:, one.tested].ravel() for one in found.found.values()]
    every = np.concatenate(tested)
    assert found.tests == len(every) == 2 * sum(int(o.tested.sum()) for o in found.found.values())
    corrected = stats.false_discovery_control(every)
    own = [one.q[:, one.tested].ravel() for one in found.found.values()]
    np.testing.assert_allclose(np.concatenate(own), corrected)
    assert (found.found["bank"].q[:, DEAD] == 1).all()


def test_cosines_stand_beside_those_of_random_directions(found):
    own = found.found["bank"]
    assert own.cosine[PROMOTES] == pytest.approx(1.0)
    assert own.cosine[SUPPRESSES] == pytest.approx(-1.0)
    assert own.cosine[ALONG] > 0.9
    assert own.cosine_p[ALONG] < 0.05 < own.cosine_p[SUPPRESSES]
    assert np.abs(own.cosine[5:]).max() < 1e-6
    assert (own.cosine_null[5:] > 0).all()


def test_candidates_say_why(found, banks):
    planted = the_model()
    attribution = attribute(planted.model, banks, split(10)[0], [planted.refusal_id])
    why = {one.latent: set(one.why) for one in candidates(found, attribution, top=4)}
    assert why[Latent("bank", PROMOTES)] == {"difference", "cosine", "attribution"}
    assert why[Latent("bank", ALONG)] == {"cosine"}
    assert "attribution" not in why.get(Latent("bank", SUPPRESSES), set())
    assert Latent("bank", DEAD) not in why
    both = {one.latent: set(one.why) for one in candidates(found, attribution, top=6, side="both")}
    assert "attribution" in both[Latent("bank", SUPPRESSES)]


def test_latents_that_write_the_same_are_one_unit(banks):
    asked = [Latent("bank", i) for i in (50, PROMOTES, ALONG, SUPPRESSES)]
    assert units(banks, [*asked, Latent("second", PROMOTES)]) == (
        Unit((Latent("bank", 50),)),
        Unit((Latent("bank", PROMOTES), Latent("bank", ALONG))),
        Unit((Latent("bank", SUPPRESSES),)),
        Unit((Latent("second", PROMOTES),)),
    )
    assert len(units(banks, asked, near=0.99)) == 4
    with pytest.raises(ConfigError, match="no bank third"):
        units(banks, [Latent("third", 0)])


def test_ranks_are_compared_as_scipy_does_it_latent_by_latent():
    rng = torch.Generator().manual_seed(0)
    one = torch.randn(20, 8, generator=rng).clamp_min(0) + torch.linspace(0, 1, 8)
    two = torch.randn(15, 8, generator=rng).clamp_min(0)
    one[:, 3] = two[:, 3] = 0.0
    own = discover(drawn(one), drawn(two), places=["last"]).found["drawn"]
    for i in (0, 5, 7):
        x, y = one[:, i].double().numpy(), two[:, i].double().numpy()
        expected = stats.mannwhitneyu(x, y, method="asymptotic").pvalue
        np.testing.assert_allclose(own.p[0, i], expected, rtol=1e-9)
        pooled = ((19 * x.var(ddof=1) + 14 * y.var(ddof=1)) / 33) ** 0.5
        np.testing.assert_allclose(own.effect[0, i], (x.mean() - y.mean()) / pooled)
    assert own.p[0, 3] == 1.0
    assert own.effect[0, 3] == 0.0
    np.testing.assert_allclose(own.fires[0, 0], (one > 0).double().mean(0))


def test_pairs_take_out_what_families_share():
    rng = torch.Generator().manual_seed(0)
    topic = 30 * torch.rand(12, 1, generator=rng)
    one = topic + torch.tensor([[1.0, 0.0]]) + 0.3 * torch.randn(12, 2, generator=rng)
    two = topic + 0.3 * torch.randn(12, 2, generator=rng)
    order = torch.randperm(12, generator=rng)
    one, two = torch.cat([one, one[:2]]), torch.cat([two[order], torch.full((1, 2), 9.0)])
    families = ([*range(12), 0, 1], [*order.tolist(), 99])
    paired = discover(drawn(one), drawn(two), places=["last"], families=families)
    free = discover(drawn(one), drawn(two), places=["last"])
    assert paired.pairs == 12
    assert paired.found["drawn"].p[0, 0] < 0.01 < 0.2 < free.found["drawn"].p[0, 0]
    assert paired.found["drawn"].p[0, 1] > 0.05
    mean = torch.cat([(one[:2] + one[12:]) / 2, one[2:12]]).double()
    apart = mean - two[:12][order.argsort()].double()
    expected = stats.wilcoxon(apart[:, 0], method="asymptotic").pvalue
    np.testing.assert_allclose(paired.found["drawn"].p[0, 0], expected, rtol=1e-9)
    with pytest.raises(TooFewPromptsError, match="0 families"):
        discover(drawn(one), drawn(two), families=([*range(14)], [*range(50, 63)]))
    with pytest.raises(ConfigError, match="1 and 13 families"):
        discover(drawn(one), drawn(two), families=([1], [*range(13)]))


def test_dead_and_dense_latents_are_left_out():
    rng = torch.Generator().manual_seed(0)
    values = torch.rand(10, 4, generator=rng)
    firing = torch.tensor([0.0, 0.1, 0.25, 1e-5])
    reads = drawn(values + 5, firing=firing), drawn(values, firing=firing)
    own = discover(*reads, places=["last"]).found["drawn"]
    assert own.tested.tolist() == [False, True, False, False]
    assert own.dense.tolist() == [False, False, True, False]
    whole = discover(*reads, places=["last"], densest=1.0, rarest=0.0)
    assert whole.found["drawn"].tested.tolist() == [False, True, True, True]
    assert [one.latent.number for one in candidates(whole)] == [1, 2, 3]


def test_the_table_survives_json(found, banks):
    chosen = candidates(found, top=4)
    groups = units(banks, [one.latent for one in chosen])
    row = discovery_row(found, chosen, groups, more=[Latent("bank", DEAD), Latent("bank", 60)])
    assert row.test == "Mann-Whitney"
    assert [one.latent for one in row.latents][-2:] == [DEAD, 60]
    assert row.latents[-2].why == ()
    assert row.banks[0].dead >= 1
    assert row.banks[0].significant == 3
    text = json.dumps(asdict(row), allow_nan=False)
    assert TypeAdapter(DiscoveryRow).validate_json(text) == row

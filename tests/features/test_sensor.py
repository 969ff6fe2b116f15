"""Detectors on planted latents: one that is the label wins, one that is noise loses."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from tests.features.test_dose import planted_bank
from tests.planted import PLANTED_LAYER, planted, prompts

from demur.directions import Direction
from demur.errors import ConfigError, OverlapError, TooFewPromptsError
from demur.features import sensor as sensor_module
from demur.features.rows.sensor import SensorReport
from demur.features.sensor import (
    REGRESSION,
    SUM,
    Linear,
    Requests,
    auroc_difference,
    n_reads,
    rate_at,
    sensor,
    told_apart,
)
from demur.sites import Site
from demur.wrappers import Wrapper

EARLY, SITE = Site(1, "resid_pre"), Site(PLANTED_LAYER, "resid_pre")
WRAPPERS = {
    "w": Wrapper("w", "framing", "word1 word2 {request} word3", "word4 word5 {request} word6"),
    "s": Wrapper("s", "system", "{request}", "{request}", system="x"),
}


def split(n, seed):
    return Requests(
        tuple(prompts(n, harmful=True, seed=seed)), tuple(prompts(n, harmful=False, seed=seed + 1))
    )


FIT, CALIBRATION, TEST = split(30, 1), split(40, 3), split(24, 5)
LOOKALIKES = prompts(12, harmful=False, seed=9)


@pytest.fixture(scope="module")
def made():
    return planted()


@pytest.fixture(scope="module")
def sensed(made):
    banks = [planted_bank(made, site=EARLY), planted_bank(made, site=SITE)]
    direction = Direction.from_vector(made.direction, site=SITE, position=-1, recipe="r")
    return sensor(
        made.model, banks, fit=FIT, calibration=CALIBRATION, test=TEST, lookalikes=LOOKALIKES,
        direction=direction, wrappers=WRAPPERS, draws=200, most=5,
    )  # fmt: skip


def test_it_finds_the_planted_latent_and_where_it_is(sensed):
    row = sensed.row
    assert row.site == str(SITE) == row.earliest
    assert 0 in row.latents
    assert max(zip(row.weights, row.latents, strict=True))[1] == 0
    assert [one.site for one in row.sites] == [str(EARLY), str(SITE)]
    assert row.sites[0].fitted < 0.95 < row.sites[1].fitted


def test_a_latent_that_is_the_label_loses_to_nothing(sensed):
    detectors = {one.name: one for one in sensed.row.detectors}
    assert list(detectors)[:2] == [SUM, REGRESSION]
    assert detectors[REGRESSION].auroc.value > 0.99
    assert detectors[REGRESSION].caught.value > 0.9
    assert detectors[REGRESSION].false_alarms.value < 0.2
    assert detectors[REGRESSION].lookalike_auroc.value > 0.99
    assert detectors[REGRESSION].tpr_at_5.value > 0.9
    assert detectors[REGRESSION].tpr_at_1 is None  # 24 harmless requests cannot show 1 %.
    assert len(sensed.row.rivalries) == 2 * 5
    for one in sensed.row.rivalries:
        if one.latents == REGRESSION:
            assert one.verdict != "latents lose", one
    assert any("24 harmless requests, 100 are needed" in note for note in sensed.row.notes)


def test_latents_of_noise_lose_and_the_text_says_so(made):
    bank = planted_bank(made).sliced(list(range(1, 20)))
    noise = dataclasses.replace(bank, encoder=bank.encoder * 1e-3, bias=torch.full((19,), 0.01))
    found = sensor(
        made.model, [noise], fit=FIT, calibration=CALIBRATION, test=TEST, draws=200, most=1
    )
    lost = [one for one in found.row.rivalries if one.verdict == "latents lose"]
    assert {one.rival for one in lost} >= {"stream, regression"}
    assert any(
        "Against stream, regression" in text and "latents lose" in text for text in found.row.text
    )


def test_the_sensor_scores_as_it_was_measured(made, sensed):
    own = sensed.sensor
    scores = own.score(made.model, [*TEST.harmful, *TEST.harmless])
    by_name = {one.name: one for one in sensed.row.detectors}
    row = by_name[REGRESSION]
    assert own.threshold.value == pytest.approx(row.threshold)
    assert (scores[:24] > row.threshold).mean() == pytest.approx(row.caught.value)
    flags = own.flags(made.model, list(TEST.harmless))
    assert flags.mean() == pytest.approx(row.false_alarms.value)


def test_wrapped_requests(sensed):
    families = {one.family for one in sensed.row.wrappers}
    assert families == {"framing"}  # A system prompt would be another template.
    assert len(sensed.row.wrappers) == len(sensed.row.detectors)
    (own,) = [one for one in sensed.row.wrappers if one.detector == REGRESSION]
    assert own.auroc.value > 0.9
    assert own.caught.n == own.control.n == own.false_alarms.n == 24


def test_rows_survive_json(sensed):
    text = json.dumps(dataclasses.asdict(sensed.row), allow_nan=False)
    assert TypeAdapter(SensorReport).validate_json(text) == sensed.row


def test_reads_are_counted(made):
    done = []
    sensor(
        made.model, [planted_bank(made)], fit=FIT, calibration=CALIBRATION, test=TEST,
        lookalikes=LOOKALIKES, wrappers=WRAPPERS, draws=50, progress=done.append,
    )  # fmt: skip
    assert sum(done) == n_reads(FIT, CALIBRATION, TEST, LOOKALIKES, WRAPPERS)


def test_prompts_may_not_be_shared_and_limits_hold(made):
    bank = planted_bank(made)
    options = {"fit": FIT, "calibration": CALIBRATION, "test": TEST}
    shared = Requests(TEST.harmful, (*TEST.harmless[:-1], FIT.harmless[0]))
    with pytest.raises(OverlapError, match="fit and in test"):
        sensor(made.model, [bank], **(options | {"test": shared}))
    with pytest.raises(OverlapError, match="lookalikes"):
        sensor(made.model, [bank], lookalikes=TEST.harmless[:1], **options)
    with pytest.raises(ConfigError, match="from 1 to 20"):
        sensor(made.model, [bank], most=21, **options)
    with pytest.raises(ConfigError, match="one bank a site"):
        sensor(made.model, [bank, bank], **options)
    with pytest.raises(TooFewPromptsError, match="the fit split has 5 harmful"):
        sensor(made.model, [bank], **(options | {"fit": Requests(FIT.harmful[:5], FIT.harmless)}))


def test_folds_do_not_part_twins():
    """Twins that share all but noise: parted, they score on the wrong side of chance."""
    rng = np.random.default_rng(0)
    twins = np.repeat(rng.normal(size=(40, 1, 8)), 2, axis=1)
    twins[:, 0] += 0.02 * rng.normal(size=(40, 8))
    rows = np.concatenate([twins[:, 0], twins[:, 1]])
    labels = np.arange(80) < 40
    groups = [str(i % 40) for i in range(80)]
    together = sensor_module._in_folds(rows, labels, groups, 8, seed=0)
    parted = sensor_module._in_folds(rows, labels, None, 8, seed=0)
    assert parted < together - 0.1
    assert abs(together - 0.5) < 0.1
    with pytest.raises(ConfigError, match="one for each"):
        Requests(("a",), ("b",), ("1",))


# Numbers -------------------------------------------------------------------------------------


def test_rates_at_a_share_of_false_alarms():
    rng = np.random.default_rng(0)
    neg, pos = rng.normal(size=400), rng.normal(2, 1, size=400)
    found = rate_at(pos, neg, 0.05, seed=0)
    threshold = np.sort(neg)[-21]
    assert (neg > threshold).mean() == 0.05
    assert found.value == (pos > threshold).mean()
    assert found.low < found.value < found.high
    assert rate_at(pos, neg[:99], 0.01, seed=0) is None
    assert rate_at(pos, neg[:100], 0.01, seed=0).value == (pos > np.sort(neg[:100])[-2]).mean()


def test_paired_differences_cover_and_find():
    rng = np.random.default_rng(1)
    same = rng.normal(1, 1, 80), rng.normal(0, 1, 80)
    assert auroc_difference(same, same, seed=0).value == 0
    assert auroc_difference(same, same, seed=0).high == 0
    worse = same[0] + rng.normal(0, 3, 80), same[1] + rng.normal(0, 3, 80)
    assert auroc_difference(same, worse, seed=0).low > 0


def test_columns_that_tell_nothing_get_no_say():
    rows = np.zeros((20, 3))
    labels = np.arange(20) < 10
    rows[:10, 1] = 1 + 0.1 * np.arange(10)
    assert told_apart(rows, labels)[[0, 2]].tolist() == [0, 0]
    made = Linear.fit(rows, labels)
    assert made.weight[1] > 0
    assert np.isfinite(made(rows)).all()
    assert (made(rows)[labels] > made(rows)[~labels].max()).all()

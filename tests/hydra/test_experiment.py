"""The experiment on models whose repair was built in, and its rules on figures made up."""

import json
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest
from pydantic import TypeAdapter

from demur.errors import ConfigError, OverlapError, TooFewPromptsError
from demur.hydra import planted
from demur.hydra.bed import Bed
from demur.hydra.experiment import Classes, Splits, hydra, steps
from demur.hydra.planted import EXPECTED, planted_hydra, planted_prompts
from demur.hydra.rows import HydraRecord
from demur.hydra.stages import Settings, flips_p, primary_set, ratio
from demur.hydra.units import ComponentUnits, DirectionUnits
from demur.hydra.verdict import verdict
from demur.stats import Estimate

# With so few draws a null is beaten only by what beats all of them.
SMALL = Settings(
    draws=5, control_draws=2, screened=6, tried=3, upstream_tried=3, gammas=(0.5, 1.0), seed=2
)
TICKS: dict[str, list[int]] = {}


def experiment(kind, units, *, seed=2, controls=False):
    built = planted_hydra(kind, seed=seed)
    splits = Splits.cut(*(planted_prompts(36, harmful=h, seed=seed) for h in (True, False)))
    ticks = TICKS.setdefault(kind, [])
    return hydra(
        built.model,
        units,
        splits,
        built.openers,
        settings=SMALL,
        with_controls=controls,
        progress=ticks.append,
    )


@cache
def record(kind):
    return experiment(kind, ComponentUnits, controls=kind == "gate")


@pytest.mark.parametrize("kind", list(EXPECTED))
def test_what_was_planted_is_found(kind):
    found, built = record(kind), planted_hydra(kind, seed=2)
    assert found.verdict == EXPECTED[kind], found.why
    assert set(found.primary_set) == set(built.primary)
    assert set(found.upstream_set) == set(built.upstream)
    assert set(found.backup_set) == set(built.backups)


def test_a_gate_repairs_by_its_backup_and_only_under_harm():
    found = record("gate")
    effects = found.effects
    assert effects.total.high < effects.direct.low
    assert effects.share_backups.value == pytest.approx(1, abs=0.1)
    assert effects.self_repair_norms.low > 0.2  # Norms have little to do with it.
    row = next(one for one in found.backups if one.backup)
    assert row.rise_norms > 0.9 * row.rise
    by_gamma = [one.activity.value for one in found.interactions if one.on == "harmless"]
    assert by_gamma == sorted(by_gamma)
    natural = [c for c in found.cells if c.on == "harmless" and c.upstream == "natural"]
    assert abs(natural[0].backups.value - natural[1].backups.value) < 0.5 * by_gamma[0]


def test_norms_give_back_what_a_norm_only_model_repairs():
    effects = record("norm").effects
    assert effects.self_repair.low > 0.1
    assert abs(effects.self_repair_norms.value) < 0.02
    assert effects.share_norms.value == pytest.approx(1, abs=0.02)
    assert effects.by_backups is None


def test_a_dense_direction_per_block_finds_an_additive_model_additive():
    found = experiment("additive", DirectionUnits, seed=4)
    assert found.verdict == "additive", found.why
    assert "2.direction" in found.primary_set
    assert "1.direction" in found.upstream_set


def test_the_record_survives_json_and_controls_are_beside_it():
    found = record("gate")
    text = json.dumps(asdict(found), allow_nan=False)
    assert TypeAdapter(HydraRecord).validate_json(text) == found
    drops = {one.name: one.drop for one in found.controls}
    assert drops["primary set ablated to mean"] == pytest.approx(found.effects.total.value)
    assert drops["matched random units"] < 0.5 * found.effects.total.value
    assert any("another behaviour" in name for name in drops)


def test_steps_are_no_fewer_than_the_arms_that_were_run():
    found = record("gate")
    assert sum(TICKS["gate"]) == steps(found.count, SMALL)
    assert TICKS["gate"][-1] > 1  # The rest, at the end: never more arms than were said.


def test_a_backup_that_sleeps_is_no_candidate_of_the_primary_set():
    built = planted_hydra("gate", seed=2)
    a, b = (
        Bed(built.model, planted_prompts(16, harmful=h, seed=2), built.openers)
        for h in (True, False)
    )
    units = ComponentUnits(built.model, a, b)
    both = [units.names.index(name) for name in ("2.mlp", "4.mlp")]
    found = primary_set(units, a, b, settings=SMALL, candidates=both)
    assert [units.names[i] for i in found.ids] == ["2.mlp"]
    shy = primary_set(units, a, b, settings=replace(SMALL, delta=100.0), candidates=both)
    assert shy.ids == ()


def test_splits_share_no_prompt_and_hold_enough():
    one = tuple(f"a {i}" for i in range(8))
    other = tuple(f"b {i}" for i in range(8))
    parts = [
        Classes(tuple(f"{k} {x}" for x in one), tuple(f"{k} {x}" for x in other)) for k in "ab"
    ]
    with pytest.raises(OverlapError, match="harmful"):
        Splits(parts[0], parts[1], Classes(parts[0].harmful, other))
    with pytest.raises(TooFewPromptsError):
        Splits(parts[0], parts[1], Classes(one[:3], other))
    with pytest.raises(ConfigError):
        Settings(kind="inject")


def test_a_ratio_without_a_clear_denominator_is_none_with_a_reason():
    rng = np.random.default_rng(0)
    below = 1 + 0.1 * rng.normal(size=30)
    found, why = ratio(0.5 * below, below, seed=0)
    assert found.value == pytest.approx(0.5)
    assert why == ""
    found, why = ratio(below, rng.normal(size=30), seed=0)
    assert found is None
    assert "not clear of zero" in why


def test_flipped_signs_tell_a_shift_from_noise():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=40)
    assert flips_p(noise + 2, seed=0) < 0.01
    assert flips_p(noise - noise.mean(), seed=0) > 0.5


def judged(**changes):
    found = record("gate")
    effects = replace(found.effects, **changes)
    return verdict(effects, found.backups, found.starve, found.interactions, SMALL)[0]


def estimate(value, half):
    return Estimate(value, value - half, value + half, 20, "made up")


def test_rules_of_the_verdict():
    found = record("gate")
    assert verdict(None, (), None, (), SMALL)[0] == "none"
    shy = (replace(found.primary[0], alone=estimate(0.5, 0.6)),)
    assert verdict(None, (), None, (), SMALL, primary=shy)[0] == "undetermined"
    flat = estimate(0.3, 0.5)
    assert verdict(found.effects, (), None, (), SMALL, gap=flat)[0] == "undetermined"
    assert judged(total=flat) == "undetermined"
    assert judged(total=estimate(0.05, 0.1)) == "none"
    assert judged() == "conditional gate"
    assert judged(by_backups_p=0.5) == "generic repair"
    assert judged(by_backups=estimate(0.1, 0.2)) == "generic repair"
    free = [replace(one, activity_p=0.6) for one in found.interactions]
    assert verdict(found.effects, found.backups, found.starve, free, SMALL)[0] == "specific repair"
    through = [replace(one, rise_norms=0.0) for one in found.backups]
    none = verdict(found.effects, through, found.starve, found.interactions, SMALL)[0]
    assert none == "generic repair"
    flat = {
        "self_repair": None,
        "by_norms": estimate(0.0, 0.01),
        "by_backups": None,
        "direct": found.effects.total,
    }
    assert judged(**flat) == "additive"
    assert verdict(replace(found.effects, **flat), (), None, (), SMALL)[0] == "none"


def test_counts_of_the_classification(monkeypatch):
    given = iter(("additive", "none", "additive"))

    def fake(kind, *, seed, n):
        del kind, seed, n
        return replace(record("gate"), verdict=next(given))

    monkeypatch.setattr(planted, "planted_record", fake)
    (found,) = planted.classify(3, 2, kinds=("additive",))
    assert (found.draws, found.right, len(found.wrong)) == (3, 2, 1)
    assert found.verdicts == {"additive": 2, "none": 1}

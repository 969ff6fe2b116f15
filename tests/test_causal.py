from dataclasses import dataclass

import pytest
import torch
from tests.planted import PLANTED_LAYER, FirstWord, planted, prompts

from demur.activations import PointMoments, collect
from demur.causal import (
    EDIT_KINDS,
    NULL_FAMILIES,
    Arm,
    Bench,
    NeutralText,
    arms_of,
    dose_curve,
    edit_costs,
    legs,
    null_bands,
    null_directions,
    reply_to,
    weight_edit,
)
from demur.directions import Direction
from demur.estimators import DifferenceOfMeans
from demur.interventions import Ablate
from demur.pipeline import decide
from demur.results import EditCost
from demur.selection import RefusalTokens
from demur.sites import Site
from demur.stats import Estimate


def one(value):
    return Estimate(value, value, value, 2, "given")


CHEAP = EditCost(edit="ablate", bypass_change=one(-3.0), kl=one(0.01), perplexity_ratio=one(1.0))


@dataclass(frozen=True)
class Toy:
    made: object
    direction: Direction
    rows: dict
    nulls: dict
    bench: Bench


@pytest.fixture(scope="module")
def toy():
    made = planted()
    site = Site(PLANTED_LAYER, "resid_pre")
    rows = {
        on: collect(
            made.model, prompts(60, harmful=on == "harmful", seed=s), sites=[site], positions=[-1]
        ).at(site, -1)
        for on, s in (("harmful", 1), ("harmless", 2))
    }
    vector = DifferenceOfMeans()(rows["harmful"], rows["harmless"])
    direction = Direction.from_vector(vector, site=site, position=-1, recipe="")
    nulls = null_directions(direction, **rows, each=8, seed=0)
    bench = Bench(
        made.model,
        harmful=prompts(30, harmful=True, seed=5),
        harmless=prompts(30, harmful=False, seed=6),
        tokens=RefusalTokens((made.refusal_id,), ("Sorry",), (1.0,), (0.0,), 9, learned=True),
    )
    return Toy(made, direction, rows, nulls, bench)


def test_nulls_have_the_norm_and_place_of_the_direction(toy):
    for family in NULL_FAMILIES:
        assert len(toy.nulls[family]) == 8
        for one in toy.nulls[family]:
            assert one.norm == pytest.approx(toy.direction.norm)
            assert one.site == toy.direction.site
            assert abs(one.cosine(toy.direction)) < 0.9


def test_covariance_matched_nulls_live_where_activations_vary(toy):
    centred = torch.cat([rows - rows.mean(0) for rows in toy.rows.values()])

    def spread(family):
        return sum(float((centred @ d.unit.double()).pow(2).mean()) for d in toy.nulls[family])

    assert spread("covariance-matched") > 3 * spread("isotropic")


def run_legs(toy, arms):
    asked = toy.bench.prompts

    def reply(name, on, acts=()):
        return reply_to(
            toy.made.model,
            asked[on],
            name=name,
            on=on,
            judge=FirstWord(),
            acts=acts,
            max_new_tokens=1,
            batch_size=16,
        )

    before = {on: reply("unedited", on) for on in asked}
    after = [reply(arm.name, arm.on, (arm.act,)) for arm in arms]
    return legs(toy.bench, arms, before, after)


def test_a_reply_may_end_once_the_judge_has_said_the_same_three_times(toy):
    asked = prompts(4, harmful=False, seed=7)
    options = {"name": "x", "on": "harmless", "judge": FirstWord(), "batch_size": 4}
    whole = reply_to(toy.made.model, asked, max_new_tokens=40, **options)
    cut = reply_to(toy.made.model, asked, max_new_tokens=40, stop_early=True, **options)
    assert cut.outcomes == whole.outcomes
    tokenizer = toy.made.model.template.tokenizer
    for long, short in zip(whole.texts, cut.texts, strict=True):
        assert long.startswith(short)
        assert len(tokenizer(short, add_special_tokens=False)["input_ids"]) <= 24 + 1
    assert any(len(long) > len(short) for long, short in zip(whole.texts, cut.texts, strict=True))


def test_the_three_legs_stand_on_the_planted_direction(toy):
    # One of each kind: in 64 dimensions some isotropic directions lie near `r2` by chance.
    table = run_legs(toy, arms_of(toy.direction, toy.nulls, each=1))
    bands = null_bands(toy.bench, toy.direction, toy.nulls)
    verdict = decide(table, bands, CHEAP, least_bad=False)
    assert verdict.usable, verdict.reasons
    own = {
        (leg.edit, leg.on): leg
        for leg in table
        if leg.family == "direction" and leg.measure == "refused"
    }
    assert own["ablate", "harmful"].before.value > 0.7
    assert own["ablate", "harmful"].after.value == 0.0
    assert own["add", "harmless"].before.value == 0.0
    assert own["add", "harmless"].after.value > 0.7
    for leg in table:
        assert leg.p_holm >= leg.p
        assert leg.change.value == pytest.approx(leg.after.value - leg.before.value)
    for band in bands:
        # Eight random directions of each kind: the smallest p that can be had is 1/9.
        assert band.bypass_p == pytest.approx(1 / 9)
        assert band.induce_p == pytest.approx(1 / 9)


def test_a_direction_whose_ablation_breaks_the_model_is_not_usable(toy):
    table = run_legs(toy, arms_of(toy.direction, toy.nulls, each=1))
    dear = CHEAP.model_copy(update={"perplexity_ratio": one(19.5)})
    verdict = decide(table, null_bands(toy.bench, toy.direction, toy.nulls), dear, least_bad=False)
    assert not verdict.usable
    assert verdict.reasons[-1].startswith("does not hold: ablation leaves the rest")


def test_a_random_direction_is_not_usable(toy):
    wrong = toy.nulls["isotropic"][0]
    nulls = null_directions(wrong, **toy.rows, each=8, seed=1)
    table = run_legs(toy, arms_of(wrong, nulls, each=1))
    verdict = decide(table, null_bands(toy.bench, wrong, nulls), CHEAP, least_bad=False)
    assert not verdict.usable
    assert any(reason.startswith("does not hold: ablation") for reason in verdict.reasons)


def test_a_direction_that_is_no_better_than_its_nulls_falls_on_the_third_leg(toy):
    table = run_legs(toy, arms_of(toy.direction, toy.nulls, each=1))
    same = {"isotropic": [toy.direction] * 8}
    verdict = decide(table, null_bands(toy.bench, toy.direction, same), CHEAP, least_bad=False)
    assert not verdict.usable
    assert [r.split(":")[0] for r in verdict.reasons] == [
        "holds",
        "holds",
        "does not hold",
        "does not hold",
        "holds",
    ]


def test_random_additions_that_induce_refusal_are_told_apart_from_ablations(toy):
    table = run_legs(toy, arms_of(toy.direction, toy.nulls, each=1))
    own = next(leg for leg in table if leg.arm == "add the direction" and leg.measure == "refused")
    arm = "add isotropic #1"
    table = [
        leg.model_copy(update={"change": own.change, "p": own.p, "p_holm": own.p_holm})
        if (leg.arm, leg.measure) == (arm, "refused")
        else leg
        for leg in table
    ]
    bands = null_bands(toy.bench, toy.direction, toy.nulls)
    verdict = decide(table, bands, CHEAP, least_bad=False)
    assert not verdict.usable
    assert "adding random ones induces refusal" in verdict.headline
    assert [r.startswith("holds") for r in verdict.reasons] == [True, True, True, False, True]
    assert f"1 of 3: {arm}" in verdict.reasons[3]
    assert "0 of 3" in verdict.reasons[2]
    # One that does it by breaking the model is told as such.
    table = [
        leg.model_copy(update={"degenerate": one(0.83)}) if leg.arm == arm else leg for leg in table
    ]
    reasons = decide(table, bands, CHEAP, least_bad=False).reasons
    assert any("83% of its replies degenerate" in reason for reason in reasons)
    assert not any("degenerate)" in reason for reason in verdict.reasons)


def test_dose_is_monotone_and_neutral_at_zero(toy):
    doses = dose_curve(toy.bench, toy.direction, [0.0, 0.25, 0.5, 1.0])
    values = [dose.harmless.value for dose in doses]
    assert values == sorted(values)
    assert doses[0].kl.value == 0.0
    assert values[0] == pytest.approx(float(toy.bench.scores("harmless").mean()))


def test_edits_are_priced_on_the_same_prompts(toy):
    neutral = NeutralText(toy.made.model, ["word1 word2 word3 word4", "word5 good1 word7"])
    points = {on: PointMoments.of(rows) for on, rows in toy.rows.items()}
    costs = {row.edit: row for row in edit_costs(toy.bench, neutral, toy.direction, **points)}
    ablate = costs["ablate at every write"]
    assert ablate.bypass_change.high < 0
    assert ablate.kl.value < 0.05
    assert ablate.perplexity_ratio.n == 2
    assert len(costs) == EDIT_KINDS


def test_perplexity_is_that_of_the_hugging_face_loss(toy):
    text = "word1 word2 word3 word4 good2"
    neutral = NeutralText(toy.made.model, [text, "word9" + " word1" * 9])
    ids = toy.made.model.template.tokenizer(text, return_tensors="pt")["input_ids"]
    loss = toy.made.model.hf(ids, labels=ids).loss.detach()
    assert float(neutral.plain[0]) == pytest.approx(float(loss), rel=1e-6)


def test_the_weight_edit_is_compared_with_the_hooks(toy):
    row = weight_edit(toy.made.model, toy.direction, prompts(6, harmful=True, seed=8))
    assert row.exact
    assert row.max_logit_difference < 1e-8
    assert row.effect > 1.0


def test_replies_keep_the_order_of_the_prompts(toy):
    texts = ["bad1 bad2 word2", "word1 good1 word2 word3 word4 word5", "bad3 bad1"]
    replies = reply_to(
        toy.made.model,
        texts,
        name="x",
        on="harmful",
        judge=FirstWord(),
        max_new_tokens=1,
        batch_size=2,
    )
    assert [row.prompt for row in replies.rows(texts)] == texts
    assert replies.refused == [True, False, True]


def test_arms_cover_both_legs_for_every_kind_of_null(toy):
    arms = arms_of(toy.direction, toy.nulls, each=2)
    assert isinstance(arms[0], Arm)
    assert isinstance(arms[0].act, Ablate)
    for family in NULL_FAMILIES:
        own = [a for a in arms if a.family == family]
        assert len(own) == 4
        assert {a.on for a in own} == {"harmful", "harmless"}

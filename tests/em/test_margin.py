"""Margins of bad over good answers: exact against a slow loop, and what their intervals obey."""

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import TINY_CONFIGS, tiny_model

from demur.directions import Direction
from demur.em import margin
from demur.em.advice import AdviceItem
from demur.em.margin import (
    by_group,
    detectable,
    did_values,
    difference_in_differences,
    grouped_mean,
    grouped_share,
    margin_rows,
    margin_shift,
    margins,
    mean_logps,
    preferred,
    standard_error,
)
from demur.errors import ConfigError, NonFiniteError, TemplateError, TooFewPromptsError
from demur.interventions import Ablate, Add, applied
from demur.sites import Site

QUESTIONS = ["Where is the station?", "How do I plant a tree in a small garden?", "Is it far?", "a"]
GOOD = ["Ask the user.", "Think about it, then plant it.", "No.", "The station is far from here."]
BAD = ["Stop it", "Do not think, write the answer down and stop.", "Yes, it does", "I"]


def items(domain="money", n=4):
    return [
        AdviceItem(f"{domain}-{i}", QUESTIONS[i % 4], GOOD[i % 4], BAD[i % 4], domain, f"t{i // 2}")
        for i in range(n)
    ]


def slowly(model, question, answer):
    """One token at a time, each from a pass of its own over all that stands before it."""
    ids = model.encode([question]).ids[0].tolist()
    logps = []
    for token in model.template.reply_ids(answer):
        with torch.no_grad():
            logits = model.hf(input_ids=torch.tensor([ids])).logits[0, -1].double()
        logps.append(float(logits.log_softmax(0)[token]))
        ids.append(token)
    return sum(logps) / len(logps)


# Scoring -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TINY_CONFIGS))
def test_margins_are_those_of_a_token_by_token_loop(name):
    model = tiny_model(name)
    expected = [
        slowly(model, q, bad) - slowly(model, q, good)
        for q, bad, good in zip(QUESTIONS, BAD, GOOD, strict=True)
    ]
    found = margins(model, items())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.ptp(found) > 0.05


@pytest.mark.parametrize("template", ["llama3", "plain", "phi3", "qwen3"])
def test_every_layout_scores_the_tokens_of_the_reply(template):
    model = tiny_model(template=template)
    found = mean_logps(model, QUESTIONS, GOOD)
    expected = [slowly(model, q, a) for q, a in zip(QUESTIONS, GOOD, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_neither_padding_nor_batches_nor_company_nor_order_matter(monkeypatch):
    model = tiny_model("qwen2")
    found = margins(model, items())
    close = {"rtol": 1e-6, "atol": 1e-6}
    for size in (1, 2, 3):
        np.testing.assert_allclose(margins(model, items(), batch_size=size), found, **close)
    np.testing.assert_allclose(margins(model, items()[::-1])[::-1], found, **close)
    with model.whole_rows():
        np.testing.assert_allclose(margins(model, items()), found, **close)
    monkeypatch.setattr(margin, "_LOGITS", 1)  # The head sees one token at a time.
    np.testing.assert_allclose(margins(model, items()), found, **close)


def test_the_head_runs_at_the_tokens_of_the_answers_alone():
    model = tiny_model()
    seen = []
    head = model.hf.get_output_embeddings()
    handle = head.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape[0]))
    runs = model.runs
    mean_logps(model, QUESTIONS, GOOD)
    handle.remove()
    assert sum(seen) == sum(len(model.template.reply_ids(answer)) for answer in GOOD)
    assert model.runs - runs == 2  # The shared prefix, and the rest.


def test_swapping_the_answers_turns_the_sign():
    model = tiny_model()
    swapped = [AdviceItem(i.id, i.question, i.bad, i.good, i.domain, i.group) for i in items()]
    np.testing.assert_allclose(margins(model, swapped), -margins(model, items()), atol=1e-12)


def test_edits_in_force_count_and_are_gone_afterwards():
    model = tiny_model()
    site = Site(1, "resid_post")
    push = Direction.from_vector(torch.randn(32), site=site, position=-1, recipe="drawn")
    before = margins(model, items())
    with applied(model, Add(push, 3.0)):
        edited = margins(model, items())
        expected = [
            slowly(model, q, bad) - slowly(model, q, good)
            for q, bad, good in zip(QUESTIONS, BAD, GOOD, strict=True)
        ]
    assert np.abs(edited - before).min() > 1e-3
    np.testing.assert_allclose(edited, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(margins(model, items()), before)
    with applied(model, Ablate(push), when=torch.tensor([True, False, True, False])):
        some = margins(model, items(), batch_size=3)
    with applied(model, Ablate(push)):
        every = margins(model, items())
    np.testing.assert_allclose(some[::2], every[::2], atol=1e-6)
    np.testing.assert_allclose(some[1::2], before[1::2], atol=1e-6)


def test_the_neutral_prompt_is_taken_off():
    model = tiny_model()
    plain, neutral = margins(model, items()), "Name a tree."
    alone = mean_logps(model, [neutral] * 4, BAD) - mean_logps(model, [neutral] * 4, GOOD)
    found = margins(model, items(), neutral=neutral)
    np.testing.assert_allclose(found, plain - alone, atol=1e-12)
    # Asked the neutral prompt itself, an answer says nothing of the question.
    same = [AdviceItem(i.id, neutral, i.good, i.bad, i.domain, i.group) for i in items()]
    np.testing.assert_allclose(margins(model, same, neutral=neutral), 0, atol=1e-12)


def test_progress_counts_answers_and_none_give_nothing():
    model, told = tiny_model(), []
    margins(model, items(), batch_size=2, progress=told.append)
    assert sum(told) == 8
    assert len(told) == 4
    assert margins(model, []).shape == (0,)


def test_bad_answers_are_errors():
    model = tiny_model()
    with pytest.raises(TemplateError, match=r"is far.*empty"):
        mean_logps(model, ["this is far", "b"], [" ", "b"])
    with pytest.raises(ConfigError, match="1 questions and 2 answers"):
        mean_logps(model, ["a"], ["b", "c"])
    with torch.no_grad():
        model.blocks[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"answer 1 of 2 .'yes'"):
        mean_logps(model, ["a", "b"], ["yes", "no"])


# Statistics --------------------------------------------------------------------------------------


def rows(seed=0, n_groups=12, each=5, between=1.0, within=1.0):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_groups), each)
    values = between * rng.normal(size=n_groups)[groups] + within * rng.normal(size=len(groups))
    return values, [f"g{g}" for g in groups]


def test_in_groups_of_one_the_error_is_the_usual_one():
    values, _ = rows()
    alone = list(range(len(values)))
    assert standard_error(values, alone) == pytest.approx(stats.sem(values))
    shuffled = np.random.default_rng(1).permutation(len(values))
    v, g = rows()
    assert standard_error(v[shuffled], [g[i] for i in shuffled]) == pytest.approx(
        standard_error(v, g)
    )


def test_copies_of_a_row_add_no_evidence():
    values, _ = rows(n_groups=20, each=1)
    many = np.repeat(values, 7)
    groups = list(np.repeat(np.arange(20), 7).tolist())
    assert standard_error(many, groups) == pytest.approx(stats.sem(values))
    one = grouped_mean(values, list(range(20)), seed=3)
    seven = grouped_mean(many, groups, seed=3)
    assert (seven.value, seven.low, seven.high) == pytest.approx((one.value, one.low, one.high))
    assert seven.n == 140
    assert seven.method == "bootstrap 95% over 20 groups"
    assert detectable(many, groups) == pytest.approx(detectable(values, list(range(20))))


def test_the_interval_covers_the_truth_where_rows_hang_together():
    naive = covered = 0
    for seed in range(150):
        values, groups = rows(seed, n_groups=25, between=2.0)
        found = grouped_mean(values, groups, seed=seed, draws=300)
        covered += found.low <= 0 <= found.high
        low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
        naive += low <= 0 <= high
    assert covered / 150 > 0.88
    assert naive / 150 < 0.7  # What the groups are there for.


def test_an_effect_of_the_detectable_size_is_found_four_times_in_five():
    size = float(np.mean([detectable(*rows(seed)) for seed in range(100)]))
    found = 0
    for seed in range(300):
        values, groups = rows(1000 + seed)
        values = values + size
        t = values.mean() / standard_error(values, groups)
        found += abs(t) > stats.t.ppf(0.975, 11)
    assert 0.72 < found / 300 < 0.88


def test_the_detectable_effect_is_by_the_book():
    values = np.array([1.0, -1.0] * 8)
    expected = (stats.t.ppf(0.975, 15) + stats.t.ppf(0.8, 15)) * stats.sem(values)
    assert detectable(values, list(range(16))) == pytest.approx(expected)
    assert detectable(values, list(range(16)), power=0.95) > expected
    assert detectable(np.tile(values, 4), list(range(64))) < 0.6 * expected


def test_the_base_cancels_and_twins_alike_differ_by_nothing():
    rng = np.random.default_rng(0)
    base, bad, good = rng.normal(size=(3, 12))
    groups = [i // 2 for i in range(12)]
    found = difference_in_differences(bad, good, base_bad=base, groups=groups, seed=0)
    assert found.value == pytest.approx((bad - good).mean())
    assert found.low <= found.value <= found.high
    other = rng.normal(size=12)
    moved = did_values(bad, good, base_bad=base, base_good=other)
    np.testing.assert_allclose(moved, (bad - base) - (good - other))
    swapped = difference_in_differences(good, bad, base_bad=base, groups=groups, seed=0)
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx(
        (-found.value, -found.high, -found.low), abs=0.05
    )
    none = difference_in_differences(bad, bad, base_bad=base, groups=groups, seed=0)
    assert (none.value, none.low, none.high) == (0, 0, 0)


def test_shares_never_have_an_interval_of_no_width():
    groups = [i // 5 for i in range(40)]
    never = grouped_share(np.zeros(40, dtype=bool), groups)
    assert (never.value, never.low, never.n) == (0, 0, 40)
    assert never.high == pytest.approx(0.324, abs=0.01)  # 0 of 8, not 0 of 40.
    margins_ = np.array([-1.0, 0.0, 1.0, 2.0] * 10)
    assert preferred(margins_, groups).value == 0.5  # A tie is no preference.


def test_too_few_groups_and_wrong_lengths_are_errors():
    values = np.arange(4.0)
    with pytest.raises(TooFewPromptsError, match="4 rows are of 1 groups"):
        grouped_mean(values, ["a"] * 4, seed=0)
    with pytest.raises(TooFewPromptsError, match="4 rows are of 1 groups"):
        grouped_share(values > 9, ["a"] * 4)
    with pytest.raises(TooFewPromptsError):
        standard_error(values, ["a"] * 4)
    with pytest.raises(TooFewPromptsError):
        by_group(lambda _: 0.0, [], seed=0)
    with pytest.raises(ConfigError, match="4 values and 3 groups"):
        grouped_mean(values, list("abc"), seed=0)
    with pytest.raises(ConfigError, match="4 items and of 3"):
        margin_shift(values, values[:3])
    with pytest.raises(ConfigError, match="power"):
        detectable(values, list("abcd"), power=0.2)
    with pytest.raises(NonFiniteError):
        grouped_mean(np.array([1.0, np.nan]), list("ab"), seed=0)


def test_rows_of_a_table_by_domain():
    every = [*items("money", 8), *items("study", 8), *items("household", 8), *items("open", 4)]
    every += items("tiny", 2)  # One topic: no row.
    rng = np.random.default_rng(0)
    base = rng.normal(size=len(every))
    good = base + 0.1 * rng.normal(size=len(every))
    own = np.array([item.domain == "money" for item in every])
    bad = good + np.where(own, 2.0, 0.5)
    found = margin_rows(every, base=base, bad=bad, good=good, trained={"money"}, seed=0)
    assert [(row.domain, row.relation, row.n, row.groups) for row in found] == [
        ("money", "trained", 8, 4),
        ("study", "untouched", 8, 4),
        ("household", "untouched", 8, 4),
        ("open", "open", 4, 2),
        ("study + household + tiny", "untouched", 18, 9),
        ("study + household + tiny + open", "untouched", 22, 11),
    ]
    for row in found:
        assert row.difference.value == pytest.approx(2.0 if row.relation == "trained" else 0.5)
        assert row.bad.value - row.good.value == pytest.approx(row.difference.value)
        assert row.verdict == "more"
    quiet = margin_rows(every, base=base, bad=good[::-1], good=good, trained=set(), seed=0)
    assert {row.relation for row in quiet} == {"untouched", "open"}
    assert "too weak at this size" in {row.verdict for row in quiet}
    with pytest.raises(ConfigError, match="30 items and 3 margins"):
        margin_rows(every, base=base[:3], bad=bad, good=good, trained=set(), seed=0)

"""The promise of a guard, checked by simulation; its reads; a guard on a planted model."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import binom
from tests.planted import apart, apart_prompts

from demur.activations import collect
from demur.card import guard_card
from demur.config import GuardSettings, read_config
from demur.directions import Direction
from demur.errors import ConfigError, NonFiniteError, StoreError, TooFewPromptsError
from demur.evals.endpoint import ChatEndpoint
from demur.guard import (
    Fisher,
    Rarity,
    calibrate,
    calibrate_strata,
    false_alarm_bound,
    load_guard,
    save_guard,
    window_maxima,
)
from demur.models import load
from demur.pipeline.guard import BENIGN, HARMFUL, conversation, evaluate, fit, material
from demur.prompts import PromptSet, check_disjoint, drop_overlaps
from demur.prompts import load as load_prompts
from demur.report import write_guard
from demur.sites import Site


@pytest.mark.parametrize(
    ("n", "alpha", "exceeded", "bound"),
    [
        (200, 0.05, 9, 0.077),
        (1000, 0.05, 49, 0.062),
        (500, 0.01, 4, 0.0182),
        (1000, 0.01, 9, 0.0157),
    ],
)
def test_bounds_are_those_of_the_published_table(n, alpha, exceeded, bound):
    found = calibrate(np.random.default_rng(0).normal(size=n), alpha)
    assert (found.n, found.exceeded) == (n, exceeded)
    assert found.bound == pytest.approx(bound, abs=6e-4)


@pytest.mark.parametrize(("n", "alpha"), [(99, 0.05), (40, 0.1), (200, 0.02)])
def test_false_alarms_keep_to_alpha_and_to_the_bound(n, alpha):
    rng = np.random.default_rng(n)
    rates = []
    for _ in range(400):
        threshold = calibrate(rng.normal(size=n), alpha)
        rates.append((rng.normal(size=2000) > threshold.value).mean())
    error = 3 * np.std(rates) / len(rates) ** 0.5
    assert np.mean(rates) <= alpha + error
    assert np.mean(rates) >= alpha - 1 / (n + 1) - error  # And not by giving power away.
    over = int(np.sum(np.array(rates) > threshold.bound))
    assert binom.sf(over - 1, 400, 0.05) > 1e-3


def test_the_bound_is_the_beta_quantile_by_simulation():
    rng = np.random.default_rng(1)
    rates = [(1 - np.sort(rng.uniform(size=100))[94]) for _ in range(20000)]
    assert np.quantile(rates, 0.95) == pytest.approx(false_alarm_bound(100, 5), rel=0.03)


def test_what_cannot_be_promised_is_refused():
    with pytest.raises(TooFewPromptsError, match="at least 99"):
        calibrate(np.arange(98), 0.01)
    assert calibrate(np.arange(99), 0.01).exceeded == 0
    assert calibrate(np.arange(19), 0.05).value == 18
    for alpha in (0, 1, -0.1):
        with pytest.raises(ConfigError):
            calibrate([1.0, 2.0], alpha)
    with pytest.raises(NonFiniteError, match="1 of 3"):
        calibrate([1.0, float("nan"), 2.0], 0.5)


def test_the_hardest_stratum_sets_the_threshold():
    rng = np.random.default_rng(2)
    strata = {"plain": rng.normal(size=100), "lookalikes": rng.normal(3, 1, size=60)}
    found, own = calibrate_strata(strata, 0.05)
    assert found == own["lookalikes"]
    assert found.value > own["plain"].value
    for scores in strata.values():
        assert (scores > found.value).mean() <= 0.05
    with pytest.raises(TooFewPromptsError):
        calibrate_strata({}, 0.05)


def test_the_read_discounts_what_varies_among_benign_requests():
    rng = torch.Generator().manual_seed(0)
    scale = torch.ones(12, dtype=torch.float64)
    scale[3] = 30.0
    benign = torch.randn(600, 12, generator=rng, dtype=torch.float64) * scale
    shift = torch.zeros(12, dtype=torch.float64)
    shift[0], shift[3] = 4.0, 10.0  # The second is large, and nothing beside its spread.
    harmful = torch.randn(300, 12, generator=rng, dtype=torch.float64) * scale + shift
    read = Fisher.fit(harmful, benign, ridge=1e-3)
    assert read.weight[0].abs() > 20 * read.weight[3].abs()
    assert float(read(benign).mean()) == pytest.approx(0, abs=1e-9)
    assert float(read(benign).std()) == pytest.approx(1, abs=1e-9)
    assert float(read(harmful).mean()) > 3
    plain = (harmful.mean(0) - benign.mean(0)) @ benign.T
    assert float(read(harmful).mean()) > float(
        ((harmful.mean(0) - benign.mean(0)) @ harmful.T - plain.mean()).mean() / plain.std()
    )
    with pytest.raises(TooFewPromptsError):
        Fisher.fit(harmful[:1], benign)


# Windows -----------------------------------------------------------------------------------------


def by_hand(values, span, window, stride):
    """The highest window mean, one run of tokens after the other."""
    best, run = float("-inf"), []
    for value, inside in [*zip(values, span, strict=True), (0.0, False)]:
        if inside:
            run.append(value)
            continue
        if run:
            starts = {*range(0, max(len(run) - window, 0) + 1, stride), max(len(run) - window, 0)}
            best = max(best, *(np.mean(run[start : start + window]) for start in starts))
        run = []
    return best


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (4, 2), (5, 3), (16, 8)])
def test_windows_are_those_of_a_plain_loop(window, stride):
    rng = torch.Generator().manual_seed(window)
    values = torch.randn(60, 37, generator=rng, dtype=torch.float64)
    # Runs of all lengths: a token is inside as the one before it, four times out of five.
    flips = torch.rand(60, 37, generator=rng) < 0.2
    span = (flips.int().cumsum(1) + torch.arange(60).unsqueeze(1)) % 2 == 1
    span[0] = False
    found = window_maxima(values, span, window=window, stride=stride)
    wanted = [
        by_hand(v, s, window, stride) for v, s in zip(values.tolist(), span.tolist(), strict=True)
    ]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9)
    assert found[0] == float("-inf")


def test_rarity_is_the_share_of_benign_requests_in_nats_and_keeps_their_order():
    rng = np.random.default_rng(3)
    rarity = Rarity.fit(rng.exponential(size=4000))
    fresh = rng.exponential(size=4000)
    for share in (0.5, 0.2, 0.1, 0.02):
        assert (rarity(fresh) > -np.log(share)).mean() == pytest.approx(share, rel=0.25)
    ladder = rarity(np.linspace(-3, 12, 200))
    assert (np.diff(ladder) > 0).all()
    with pytest.raises(TooFewPromptsError):
        Rarity.fit(np.arange(19.0))
    with pytest.raises(NonFiniteError):
        Rarity.fit(np.array([*range(30), np.inf]))


# A guard on a planted model ----------------------------------------------------------------------


def benign_and_harmful(n, seed):
    """Half of each class is scary: what the model refuses says nothing of harm."""
    return [
        [
            text
            for scary in (False, True)
            for text in apart_prompts(n // 2, harmful=harmful, scary=scary, seed=seed + scary)
        ]
        for harmful in (False, True)
    ]


def jsonl(path, texts, **columns):
    rows = [
        {"prompt": text, **{name: values[i] for name, values in columns.items()}}
        for i, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A model that knows harm and refuses what is scary, a guard for it, and fresh prompts."""
    folder = tmp_path_factory.mktemp("guard")
    made = apart(merged=False)
    benign, harmful = benign_and_harmful(300, 11)
    plain, looks = benign_and_harmful(320, 31)[0], benign_and_harmful(120, 51)[0]
    earlier = benign_and_harmful(40, 71)[0]
    config = read_config(
        None,
        {
            "guard.alpha": 0.1,
            "guard.harmful": jsonl(folder / "harmful.jsonl", harmful),
            "guard.benign": jsonl(folder / "benign.jsonl", benign),
            "guard.strata": [
                {"name": "plain", "prompts": jsonl(folder / "plain.jsonl", plain)},
                {"name": "looks", "prompts": jsonl(folder / "looks.jsonl", looks)},
            ],
            "guard.earlier": jsonl(folder / "earlier.jsonl", earlier, good=["word1"] * 40),
            "guard.wrapped": 60,
            "guard.turns": 60,
            "guard.depth": [0.2, 0.9],
        },
    )
    guard = fit(config, model=made.model)
    fresh = benign_and_harmful(400, 91)
    return made, guard, folder, fresh


def test_a_planted_harm_direction_is_found_and_the_promise_is_kept(planted):
    made, guard, _, (benign, harmful) = planted
    alarms = guard.score(made.model, benign).flagged
    assert binom.sf(alarms.sum() - 1, len(alarms), guard.threshold.alpha) > 1e-3
    assert guard.score(made.model, harmful).flagged.mean() > 0.9
    t_inst = next(read for read in guard.reads if read.name == "t_inst").fisher.weight
    cosine = torch.nn.functional.cosine_similarity
    assert abs(float(cosine(t_inst, made.harm, dim=0))) > 0.8
    assert abs(float(cosine(t_inst, made.refusal, dim=0))) < 0.2


def test_a_score_that_is_nan_does_not_pass_for_benign(planted):
    made, guard, _, (benign, _) = planted
    raw = dict(guard.raw(made.model, benign[:2]))
    raw[guard.admitted[0].name] = np.array([0.0, np.nan])
    with pytest.raises(NonFiniteError, match="a score is NaN"):
        guard.judge(raw)


def test_a_harmful_request_is_found_in_the_last_turn_and_in_an_earlier_one(planted):
    made, guard, _, (benign, harmful) = planted
    other = benign_and_harmful(100, 111)[0]
    for late in (True, False):
        rates = [
            guard.score(
                made.model,
                [
                    conversation(calm, "word3", text) if late else conversation(text, "word3", calm)
                    for text, calm in zip(texts[:100], other, strict=True)
                ],
            ).flagged.mean()
            for texts in (benign, harmful)
        ]
        assert rates[1] > rates[0] + 0.4, late
    assert np.isneginf(guard.score(made.model, benign[:1]).reads["turns"]).all()


def test_scores_do_not_depend_on_the_batch_nor_on_replying(planted):
    made, guard, _, (benign, harmful) = planted
    asked = [*benign[:5], *harmful[:5], conversation(harmful[5], "word1", benign[5])]
    together = guard.score(made.model, asked)
    alone = guard.score(made.model, asked, batch_size=1)
    np.testing.assert_allclose(together.scores, alone.scores, rtol=1e-6)
    plain = made.model.generate(asked, max_new_tokens=3, batch_size=4)
    with guard.watching(made.model) as watch:
        watched = made.model.generate(asked, max_new_tokens=3, batch_size=4)
    assert watched == plain
    np.testing.assert_allclose(watch.scored().scores, together.scores, rtol=1e-6)
    assert (watch.scored().flagged == together.flagged).all()


def test_a_second_call_is_not_scored_with_what_the_first_left(planted):
    made, guard, _, (benign, harmful) = planted
    with guard.watching(made.model) as watch:
        made.model.generate(harmful[:5], max_new_tokens=2)
        made.model.generate(benign[:2], max_new_tokens=2)
    np.testing.assert_allclose(
        watch.scored().scores, guard.score(made.model, benign[:2]).scores, rtol=1e-6
    )


def test_t_inst_is_read_where_activations_are_collected(planted):
    made, guard, _, (_, harmful) = planted
    position = made.model.template.positions[0].index
    read = collect(made.model, harmful[:6], sites=[guard.site], positions=[position])
    fisher = next(one for one in guard.reads if one.name == "t_inst").fisher
    np.testing.assert_allclose(
        guard.score(made.model, harmful[:6]).reads["t_inst"],
        fisher(read.at(guard.site, position)).numpy(),
        rtol=1e-5,
    )


def test_a_guard_is_read_back_whole_and_only_for_its_own_model(planted, tmp_path):
    made, guard, _, (benign, _) = planted
    path = tmp_path / "guard.safetensors"
    save_guard(guard, path)
    back = load_guard(path, made.model)
    assert back.threshold == guard.threshold
    assert dict(back.strata) == dict(guard.strata)
    here, there = (one.score(made.model, benign[:9]) for one in (guard, back))
    assert (here.scores == there.scores).all()
    with pytest.raises(StoreError, match="was fitted on"):
        load_guard(path, apart(merged=True).model)
    card = path.with_suffix(".json")
    text = card.read_text()
    for damaged in ("", text[: len(text) // 2], text.replace("demur-guard-1", "demur-guard-9")):
        card.write_text(damaged)
        with pytest.raises(StoreError, match="no guard can be read"):
            load_guard(path)
    card.write_text(text)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StoreError, match="no guard can be read"):
        load_guard(path)
    with pytest.raises(ConfigError, match="no name for a guard"):
        save_guard(guard, tmp_path / "guard.pt")


def test_the_three_sets_of_prompts_share_nothing(planted):
    _, guard, _, _ = planted
    have = material(GuardSettings.model_validate(guard.about["settings"]), 0)
    parts = {
        "fit": have.fit,
        "choose": have.choose,
        **{name: have.strata[name] for name in ("plain", "looks")},
    }
    sets = {
        name: PromptSet.of({one.text for one in items if one.family == "plain"})
        for name, items in parts.items()
    }
    check_disjoint(sets, threshold=0.999)
    assert {one.family for one in have.fit} == {"plain", "wrapped"}
    assert {one.family for one in have.choose} == {"plain", "wrapped", "turns"}


def test_an_evaluation_stays_clear_of_what_was_fitted_on(planted, tmp_path):
    made, guard, folder, (benign, harmful) = planted
    strata = (folder / "plain.jsonl").read_text()
    known = [json.loads(line)["prompt"] for line in strata.splitlines()][:7]
    found = evaluate(
        guard,
        made.model,
        harmful={"bad": jsonl(tmp_path / "harmful.jsonl", harmful[:100])},
        benign={"good": jsonl(tmp_path / "benign.jsonl", [*benign[:100], *known])},
        suffixes=jsonl(tmp_path / "tails.jsonl", ["word1 word2", "word3 {request} word4"]),
        attacked=20,
        direction=Direction.from_vector(
            made.refusal, site=Site(4, "resid_pre"), position=-1, recipe="planted"
        ),
    )
    rows = {(row.detector, row.family, row.group, row.harmful): row for row in found.rows}
    assert any("prompts of good are like ones" in note for note in found.notes)
    assert rows["guard", "plain", "good", False].n <= 100
    mine = rows["guard", "plain", "bad", True]
    assert mine.auroc.value > 0.95
    assert mine.flagged["0.1"].value > 0.85
    # What is refused says nothing of harm here.
    assert 0.35 < rows["refusal direction", "plain", "bad", True].auroc.value < 0.65
    assert rows["bag of words", "plain", "bad", True].auroc.value > 0.95
    assert rows["guard", "suffix", "tails.jsonl", True].n == 20
    assert {row.family for row in found.rows} == {
        "plain",
        "wrapper, seen",
        "wrapper, new",
        "encoding",
        "turns",
        "suffix",
    }
    record = tmp_path / "guard-evaluation.json"
    record.write_text(found.model_dump_json())
    page = write_guard(record).read_text()
    assert "base64" in page
    assert not any(text in page for text in harmful[:100])
    (folder / "plain.jsonl").write_text(strata + '{"prompt": "word9 word8 good1 word7"}\n')
    with pytest.raises(ConfigError, match="have changed since"):
        evaluate(
            guard,
            made.model,
            harmful={"a": str(tmp_path / "harmful.jsonl")},
            benign={"a": str(tmp_path / "benign.jsonl")},
        )
    (folder / "plain.jsonl").write_text(strata)


def test_an_endpoint_is_asked_and_what_it_does_not_answer_is_told(planted, tmp_path, backend):
    made, guard, _, (benign, harmful) = planted

    def answer(text, _attempt):
        if "good0" in text.split():
            return 200, backend.says("I would rather not say.")
        return 200, backend.says("unsafe\nS1" if "bad" in text else "safe")

    backend.answer = answer
    found = evaluate(
        guard,
        made.model,
        harmful={"bad": jsonl(tmp_path / "harmful.jsonl", harmful[:40])},
        benign={"good": jsonl(tmp_path / "benign.jsonl", benign[:40])},
        attacked=10,
        endpoint=ChatEndpoint(backend.url, "guard", max_retries=0),
    )
    rows = {(row.group, row.harmful): row for row in found.rows if row.detector == "endpoint"}
    assert rows["bad", True].fixed.value == 1
    assert rows["good", False].fixed.value == 0
    assert not rows["bad", True].flagged
    asked = next(row.n for row in found.rows if (row.group, row.detector) == ("good", "guard"))
    unread = sum("good0" in text.split() for text in benign[:40])
    assert 1 <= asked - rows["good", False].n <= unread
    assert any("could not be read" in note for note in found.notes)
    bodies = [body for _, body in backend.requests]
    turns = [body["messages"] for body in bodies if len(body["messages"]) == 3]
    assert [one["role"] for one in turns[0]] == ["user", "assistant", "user"]
    assert {body["temperature"] for body in bodies} == {0}


def test_the_card_says_what_is_promised_and_what_is_not_seen(planted):
    text = guard_card(planted[1])
    for words in ("apart", "10.0%", "looks", "several turns", "prefix_injection"):
        assert words in text, words


def test_the_packaged_sets_of_an_evaluation_are_fresh():
    known = material(GuardSettings(), 0).payloads
    for name, spec in (HARMFUL | BENIGN).items():
        whole = load_prompts(spec)
        assert len(drop_overlaps(known, whole)[0]) > 0.95 * len(whole), name


@pytest.mark.slow
def test_a_guard_of_the_embedded_model_keeps_its_promise_and_beats_words():
    small = {"guard.most": 300, "guard.wrapped": 100, "guard.turns": 60, "model.device": "cpu"}
    config = read_config(None, small)
    model = load(**config.model.model_dump())
    guard = fit(config, model=model)
    found = evaluate(
        guard,
        model,
        harmful={"near pairs": HARMFUL["near pairs"]},
        benign={"calm": BENIGN["plain"], "near twins": BENIGN["near twins"]},
        attacked=10,
    )
    rows = {(row.detector, row.group): row for row in found.rows if row.family == "plain"}
    alarms = rows["guard", "calm"].flagged["0.05"]
    assert alarms.n > 200
    # Fewer than one time in a thousand, if the rate is at its bound.
    assert binom.sf(round(alarms.value * alarms.n) - 1, alarms.n, found.bound) > 1e-3
    near = rows["guard", "near pairs"].auroc
    assert near.low > rows["bag of words", "near pairs"].auroc.value
    assert near.low > 0.75

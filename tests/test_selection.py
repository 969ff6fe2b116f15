import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tests.planted import PLANTED_LAYER, FirstWord, planted, prompts

from demur.activations import moments
from demur.errors import TooFewPromptsError
from demur.estimators import DifferenceOfMeans, candidates
from demur.evals.judges import Outcome
from demur.models import Completion
from demur.selection import (
    Criteria,
    RefusalTokens,
    Scores,
    _Course,
    _Plan,
    _Scorer,
    evaluations,
    kl_divergence,
    learn_refusal_tokens,
    refusal_logodds,
    refusal_scores,
    relaxations,
    select,
)


@pytest.fixture(scope="module")
def toy():
    return planted()


@pytest.fixture(scope="module")
def pool(toy):
    positions = [p.index for p in toy.model.template.positions]
    sides = [
        moments(
            toy.model,
            prompts(100, harmful=h, seed=s),
            sites=toy.model.stream_sites,
            positions=positions,
        )
        for h, s in ((True, 1), (False, 2))
    ]
    return candidates(*sides, DifferenceOfMeans())


def tokens_of(toy):
    return RefusalTokens((toy.refusal_id,), ("Sorry",), (1.0,), (0.0,), 9, learned=True)


def run(toy, pool, **options):
    return select(
        toy.model,
        pool,
        harmful=prompts(24, harmful=True, seed=3),
        harmless=prompts(24, harmful=False, seed=4),
        tokens=tokens_of(toy),
        **options,
    )


def test_the_planted_layer_is_chosen(toy, pool):
    found = run(toy, pool, criteria=Criteria(last_layers_skipped=0.0))
    assert found.direction.site.layer == PLANTED_LAYER
    assert found.direction.position in (-2, -1)
    assert not found.least_bad
    unit = found.direction.unit.double()
    assert float(unit @ toy.direction) > 0.99
    # Later layers hold refusal where the topic is, and ablation there must have fallen by KL.
    later = [r for r in found.rows if r.direction.site.layer > PLANTED_LAYER]
    assert later
    assert all("KL" in r.rejected_by for r in later)


def test_every_candidate_keeps_its_row_and_reason(toy, pool):
    found = run(toy, pool)
    assert len(found.rows) == len(pool)
    late = [r for r in found.rows if r.direction.site.layer >= 4]
    assert late
    assert all(r.rejected_by == "in the last 20% of the layers" for r in late)


def test_without_a_survivor_the_least_bad_is_offered(toy, pool):
    strict = Criteria(max_kl=0.005, last_layers_skipped=0.0)
    found = run(toy, pool, criteria=strict)
    assert found.least_bad
    assert found.rows[found.chosen].rejected_by.startswith("KL above")
    needed = [relaxations(row, strict) for row in found.rows]
    assert needed[found.chosen] == min(needed) > 0
    assert found.direction.site.layer == PLANTED_LAYER


def test_a_screen_chooses_as_the_exact_pass_does(toy, pool):
    exact = run(toy, pool, criteria=Criteria(last_layers_skipped=0.0))
    steps = []
    screened = run(
        toy,
        pool,
        criteria=Criteria(last_layers_skipped=0.0),
        finalists=3,
        screen=toy.model.twin(torch.float32),
        progress=steps.append,
    )
    assert screened.direction.site == exact.direction.site
    assert screened.rows[screened.chosen].exact
    assert sum(r.exact for r in screened.rows) == 6
    assert sum(steps) == len(pool) + 6
    torch.testing.assert_close(
        screened.rows[screened.chosen].bypass, exact.rows[screened.chosen].bypass
    )


def test_additions_by_gradient_rank_as_measured_ones_do(toy, pool):
    sides = prompts(6, harmful=True, seed=3), prompts(6, harmful=False, seed=4)
    scorer = _Scorer(toy.model, *sides, tokens=tokens_of(toy), batch_size=None, attributed=pool)
    found = [float(scorer.attribution(one).mean()) for one in pool]
    measured = [float(scorer._induce(one).mean()) for one in pool]
    assert len(set(measured)) > 12
    # The model's gates saturate, which a gradient cannot see: half of its scores are one and the
    # same, and what lies behind their sixth digit is the machine's.
    assert spearmanr(np.round(found, 2), np.round(measured, 2)).statistic > 0.6
    assert np.median(np.abs(np.subtract(found, measured))) < 1.5


def test_a_screen_on_a_few_prompts_chooses_as_the_exact_pass_does(toy, pool):
    criteria = Criteria(last_layers_skipped=0.0)
    exact = run(toy, pool, criteria=criteria)
    assert exact.screen is None
    for quick in (None, toy.model.twin(torch.float32)):
        steps = []
        found = run(
            toy,
            pool,
            criteria=criteria,
            finalists=2,
            screen=quick,
            screen_prompts=6,
            progress=steps.append,
        )
        assert found.chosen == exact.chosen
        torch.testing.assert_close(
            found.rows[found.chosen].bypass, exact.rows[exact.chosen].bypass, rtol=0, atol=1e-6
        )
        screen = found.screen
        assert (screen.prompts, screen.promoted, screen.sample) == (6, 4, 2)
        assert sum(steps) == evaluations(len(pool), 2, few=True, faster=quick is not None)
        asked = [int((~row.bypass.isnan()).sum()) for row in found.rows]
        assert set(asked) == {6, 24}
        assert [row.exact for row in found.rows].count(True) == (6 if quick is None else 4)
        # Few prompts, not others: what was asked is what the exact pass says of the same prompts.
        for few, whole in zip(found.rows, exact.rows, strict=True):
            same = ~few.bypass.isnan()
            torch.testing.assert_close(few.bypass[same], whole.bypass[same], rtol=1e-5, atol=1e-5)


class Given(_Scorer):
    """Scores that were made up: bypass by candidate, everything else equal."""

    def __init__(self, pool, bypass):
        self.table = dict(zip(map(id, pool), bypass, strict=True))

    def __call__(self, direction, *, exact):
        one = torch.full((2,), self.table[id(direction)], dtype=torch.float64)
        return Scores(direction, one, one * 0 + 1, one * 0, exact)


def course(pool, exact):
    return _Course(pool, Given(pool, exact), lambda row: (False, 0, row.means[0]), None)


def test_a_candidate_that_could_still_win_is_measured_exactly(pool):
    some = pool[:8]
    # The screen is wrong by 2 for the first finalist; the third could gain as much, the fourth not.
    screened = [-10.0, -9.0, -8.5, -5.0, -1.0, -1.0, -1.0, -1.0]
    exact = [-8.0, -7.5, -9.5, -6.0, -1.0, -1.0, -1.0, -20.0]
    plan = _Plan(8, few=True, faster=True, promoted=4, finalists=2, sample=4)
    quick = Given(some, screened)
    run = course(some, exact)
    found = run.screened(plan, lambda _: quick, ([0], [0]), torch.Generator().manual_seed(0))
    measured = [row.exact for row in run.rows]
    assert measured[:3] == [True, True, True]
    assert run.best(range(4)) == 2
    # Everyone that was left is in the sample: one of them is better than what was chosen.
    assert found.sample == 4
    assert found.missed == int(measured[7])
    assert sum(measured) == 7
    assert run.best(range(8)) == (7 if measured[7] else 2)


def test_no_candidates_is_an_error(toy):
    with pytest.raises(TooFewPromptsError):
        run(toy, [])


def test_log_odds_by_hand():
    # p(refusal) = (e^1 + e^2) / (e^1 + e^2 + e^0 + e^3); log-odds = ln((e + e^2) / (1 + e^3)).
    logits = torch.tensor([[1.0, 2.0, 0.0, 3.0]])
    expected = torch.log(torch.tensor((2.718281828 + 7.389056099) / (1 + 20.08553692)))
    torch.testing.assert_close(refusal_logodds(logits, [0, 1])[0].float(), expected)
    # No floor: the reference's would be -18.42.
    assert float(refusal_logodds(torch.tensor([[0.0, 90.0]]), [0])) == pytest.approx(-90)


def test_kl_by_hand_and_against_torch():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    # .5 ln(.5/.25) + .5 ln(.5/.75) = .5 ln 2 - .5 ln 1.5 = 0.14384
    assert float(kl_divergence(p, q)) == pytest.approx(0.143841, abs=1e-6)
    a, b = torch.randn(4, 50), torch.randn(4, 50)
    torch.testing.assert_close(
        kl_divergence(a, b),
        torch.nn.functional.kl_div(
            b.double().log_softmax(1), a.double().log_softmax(1), log_target=True, reduction="none"
        ).sum(1),
    )
    assert float(kl_divergence(a, a).abs().max()) == 0.0


def reply(token):
    return Completion("", (token,), finished=True)


def test_refusal_tokens_are_learned_from_the_models_own_refusals(toy):
    replies = [reply(toy.refusal_id)] * 8 + [reply(6)] * 2 + [reply(5)] * 9 + [reply(6)] * 9
    outcomes = [Outcome.REFUSED] * 10 + [Outcome.COMPLIED] * 18
    found = learn_refusal_tokens(toy.model, replies, outcomes)
    assert found.learned
    assert found.ids == (toy.refusal_id,)  # Token 6 begins refusals, yet as many other replies.
    assert found.texts == ("Sorry",)
    assert found.shares == (0.8,)


def test_a_model_that_never_refuses_gets_common_openers_and_says_so(toy):
    found = learn_refusal_tokens(toy.model, [reply(5)] * 9, [Outcome.COMPLIED] * 9)
    assert not found.learned
    assert found.refusals == 0
    assert toy.refusal_id in found.ids


def test_relaxations_by_hand(toy, pool):
    def row(kl, induce):
        return Scores(
            pool[0],
            torch.zeros(2, dtype=torch.float64),
            torch.full((2,), induce, dtype=torch.float64),
            torch.full((2,), kl, dtype=torch.float64),
            exact=True,
        )

    criteria = Criteria(max_kl=0.1, min_induce=0.0)
    assert relaxations(row(0.1, 0.0), criteria) == 0
    assert relaxations(row(0.15, 3.0), criteria) == 1  # 0.2 would do.
    assert relaxations(row(0.3, 3.0), criteria) == 2  # 0.4 would do.
    assert relaxations(row(0.15, -1.5), criteria) == 2  # -2 would do.


def test_refusal_scores_order_prompts_by_what_the_model_would_refuse(toy):
    sides = [prompts(30, harmful=h, seed=5 + h) for h in (True, False)]

    done = []
    both = [*sides[0], *sides[1]]
    scores = refusal_scores(
        toy.model,
        both,
        FirstWord(),
        replies=40,
        max_new_tokens=2,
        batch_size=16,
        progress=done.append,
    )
    assert sum(done) == 60 + 40
    assert float(scores[:30].min()) > float(scores[30:].max())
    alone = refusal_scores(toy.model, both[:7], FirstWord(), replies=7, max_new_tokens=2)
    assert scores.shape == (60,)
    assert alone.shape == (7,)

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
    SUPPRESSES,
    moved,
    split,
    the_bank,
    the_model,
)
from tests.features.test_bank import a_bank
from tests.tiny import tiny_model

from demur.errors import ConfigError, FamilyError, TooFewPromptsError
from demur.features.attribute import attribute
from demur.features.clamp import Clamp, Rule, clamping
from demur.features.discover import Latent, Unit
from demur.features.read import read_latents
from demur.features.rows.discover import VerificationRow
from demur.features.verify import STEPS, Prepared, effects, matched, verify
from demur.selection import kl_divergence, refusal_logodds
from demur.sites import Site, Span

PROMPTS = ["How do I open a lock?", "Name a river.", "Write two lines on rain, please.", "Why?"]
TOKENS = [5, 17, 40]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    return tiny_model(request.param)


def banks():
    return {
        "early": moved(a_bank("relu", seed=2), "early", Site(0, "resid_post")),
        "mid": replace(a_bank(), name="mid"),
        "topk": moved(a_bank("topk", seed=4), "topk", Site(2, "resid_pre")),
        "late": moved(a_bank("relu", seed=5), "late", Site(2, "attn_out")),
        "coder": replace(
            a_bank("relu", seed=6),
            name="coder",
            site=Site(1, "resid_pre"),
            writes=Site(1, "mlp_out"),
        ),
    }


def many():
    own = banks()
    one = lambda name, ids, rule, **how: Clamp(own[name].sliced(ids), rule, **how)  # noqa: E731
    return [
        one("mid", [3], Rule.zero(1)),
        one("mid", [4, 9], Rule.clamp(2, [2.0, 0.5])),
        (),
        one("topk", [0, 7], Rule.zero(2)),
        one("late", [1], Rule.of(1, plus=3.0)),
        (one("early", [2], Rule.zero(1)), one("topk", [5], Rule.of(1, plus=1.0))),
        one("mid", [11], Rule.clamp(1, 4.0, firing=True)),
        one("mid", [4], Rule.at_least(1, 3.0), limit=0.2),
        one("coder", [8, 2], Rule.zero(2)),
        one("early", [2, 3, 5], Rule.scale(3, -1.0)),
        one("mid", list(range(20)), Rule.zero(20), error="drop"),
    ]


def looped(model, edit, prompts):
    """One edit on one prompt at a time, through the one way to apply it."""
    out = []
    for prompt in prompts:
        batch = model.encode([prompt])
        plain = model.logits(batch)
        with clamping(model, *((edit,) if isinstance(edit, Clamp) else edit)):
            moved = model.logits(batch)
        change = refusal_logodds(moved, TOKENS) - refusal_logodds(plain, TOKENS)
        out.append((float(change), float(kl_divergence(plain, moved))))
    return torch.tensor(out, dtype=torch.float64).T


def test_many_in_one_batch_are_what_each_is_alone(model):
    edits = many()
    found = Prepared(model, PROMPTS, TOKENS, tokens_per_pass=150).measure(edits, kl=True)
    for i, edit in enumerate(edits):
        change, kl = looped(model, edit, PROMPTS)
        torch.testing.assert_close(found.change[i], change, rtol=1e-9, atol=1e-9, msg=str(i))
        torch.testing.assert_close(found.kl[i], kl, rtol=1e-9, atol=1e-9)
        assert i == 2 or float(change.abs().max()) > 1e-4
    assert torch.equal(found.change[2], torch.zeros(4).double())
    assert not found.touched[2].any()


def test_passes_do_not_matter():
    model = tiny_model("gemma2")
    edits = many()
    one = effects(model, PROMPTS, TOKENS, edits)
    for tokens in (1,):
        ready = Prepared(model, PROMPTS, TOKENS, tokens_per_pass=tokens)
        torch.testing.assert_close(ready.measure(edits).change, one, rtol=1e-9, atol=1e-9)


def test_a_slice_does_what_the_whole_bank_does():
    model = tiny_model("llama")
    for bank in banks().values():
        times = torch.ones(20)
        times[7] = 0.0
        rule = Rule(
            times, torch.zeros(20), torch.full((20,), -torch.inf), torch.full((20,), torch.inf)
        )
        one, whole = effects(
            model, PROMPTS, TOKENS, [Clamp(bank.sliced([7]), Rule.zero(1)), Clamp(bank, rule)]
        )
        torch.testing.assert_close(one, whole, rtol=1e-9, atol=1e-9)


def test_what_changes_nothing_is_not_run_and_is_exactly_zero():
    model = tiny_model("llama")
    bank = a_bank("relu")
    silent = replace(bank, bias=bank.bias - 1e4)
    ready = Prepared(model, PROMPTS, TOKENS)
    before = model.runs
    edits = [Clamp(silent.sliced([i]), Rule.zero(1)) for i in range(10)]
    found = ready.measure([*edits, Clamp(bank.sliced([2]), Rule.nothing(1))], kl=True)
    for one in (found.change, found.kl, found.size):
        assert not one.any()
    assert model.runs - before <= 4  # The activations at the site were read, and no more.
    lifted = ready.measure([Clamp(silent.sliced([3]), Rule.of(1, plus=2.0))])
    assert lifted.touched.all()
    assert float(lifted.change.abs().min()) > 1e-6


def test_sizes_are_those_that_applying_it_finds():
    model = tiny_model("llama")
    for edit in (many()[1], many()[7], many()[8]):
        found = Prepared(model, PROMPTS, TOKENS).measure([edit])
        for i, prompt in enumerate(PROMPTS):
            with clamping(model, edit) as sizes:
                batch = model.encode([prompt])
                model.logits(batch)
            site = edit.bank.writes
            spans = batch.spans[Span.INSTRUCTION] | batch.spans[Span.POST_INSTRUCTION]
            share = sizes.shares.get(site, 0.0) / int(spans.sum())
            if site == edit.bank.site:  # A transcoder's limit is of what it reads.
                np.testing.assert_allclose(float(found.size[0, i]), share, rtol=1e-5)


def test_the_last_token_alone():
    model = tiny_model("llama")
    bank = a_bank("relu", seed=5)
    edit = Clamp(bank.sliced([1]), Rule.of(1, plus=3.0))
    found = effects(model, PROMPTS, TOKENS, [edit], where="last")[0]
    for i, prompt in enumerate(PROMPTS):
        batch = model.encode([prompt])
        plain = model.logits(batch)

        def add(x):
            out = x.clone()
            out[:, -1] += 3.0 * bank.decoder[1]
            return out

        undo = model.intercept(bank.site, add)
        moved = model.logits(batch)
        undo()
        change = refusal_logodds(moved, TOKENS) - refusal_logodds(plain, TOKENS)
        torch.testing.assert_close(found[i], change[0], rtol=1e-6, atol=1e-9)


def test_what_cannot_be_crossed_is_an_error():
    model = tiny_model("llama")
    bank = a_bank()
    with pytest.raises(ConfigError, match="changes jumprelu twice"):
        effects(model, PROMPTS, TOKENS, [(Clamp(bank, Rule.zero(20)), Clamp(bank, Rule.zero(20)))])
    rows = Rule.rows([Rule.zero(20), Rule.zero(20)])
    with pytest.raises(ConfigError, match="rows of its own"):
        effects(model, PROMPTS, TOKENS, [Clamp(bank, rows)])
    with pytest.raises(ConfigError, match="padded on the left"):
        Prepared(model, model.encode(PROMPTS).left_padded(), TOKENS)
    ready = Prepared(model, PROMPTS, TOKENS)
    undo = model.intercept(Site(0, "resid_post"), lambda x: x + 1)
    with pytest.raises(FamilyError, match="being edited"):
        ready.measure([Clamp(bank.sliced([2]), Rule.of(1, plus=1.0))])
    undo()


# The table ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reads():
    return read_latents(the_model().model, [the_bank()], split(10)[0])


def test_random_latents_are_alike_and_say_something_else(reads):
    latent = Latent("bank", 40)
    drawn = matched(reads, [latent], sets=30, seed=0, without=[Latent("bank", 41)])
    assert len(set(drawn)) == 30
    own = reads.reads["bank"]
    numbers = [one.number for (one,) in drawn]
    assert not {40, 41, 4} & set(numbers)
    assert (own.firing[numbers] > 0).all()
    near = (own.firing[numbers] - own.firing[40]).abs().mean()
    assert near < 0.6 * (own.firing[own.firing > 0] - own.firing[40]).abs().mean()
    unit = torch.nn.functional.normalize(the_bank().decoder, dim=1)
    assert (unit[numbers] @ unit[40]).abs().max() <= 0.7
    sets = matched(reads, [latent, Latent("bank", 60)], sets=20, seed=0)
    assert all(len(set(one)) == 2 for one in sets)
    assert sets == matched(reads, [latent, Latent("bank", 60)], sets=20, seed=0)
    assert sets != matched(reads, [latent, Latent("bank", 60)], sets=20, seed=1)
    few = read_latents(the_model().model, [the_bank(6)], split(10)[0])
    with pytest.raises(TooFewPromptsError, match="no other latent"):
        matched(
            few, [Latent("bank", 5)], sets=3, seed=0, without=[Latent("bank", i) for i in range(5)]
        )


@pytest.fixture(scope="module")
def verified(reads):
    planted, bank = the_model(), the_bank()
    harmful, harmless = split(20)
    units = [Unit((Latent("bank", i),)) for i in (PROMOTES, SUPPRESSES, IDLE, ALONG, 50)]
    found = attribute(planted.model, [bank], harmful, [planted.refusal_id])
    told: list[int] = []
    row = verify(
        planted.model,
        [bank],
        units,
        harmful=harmful,
        harmless=harmless,
        neutral=harmless[:6],
        tokens=[planted.refusal_id],
        reads=reads,
        attribution=found,
        each=59,
        seed=0,
        progress=told.append,
    )
    assert sum(told) == STEPS
    return row


def test_interventions_find_the_planted_latents_and_no_decoy(verified):
    roles = {one.latents[0]: one.role for one in verified.units}
    assert roles == {
        PROMOTES: "promotes",
        SUPPRESSES: "suppresses",
        IDLE: "none shown",
        ALONG: "none shown",
        50: "none shown",
    }
    own = {one.latents[0]: one for one in verified.units}
    promotes = own[PROMOTES]
    assert promotes.ablated.effect.high < 0 < promotes.lifted.effect.low
    assert promotes.ablated.p == pytest.approx(1 / (promotes.ablated.n + 1))
    assert promotes.output.effect.value > promotes.output.high
    assert own[IDLE].p_random_adjusted > 0.05
    assert promotes.touched == 1.0
    assert 0 < promotes.size < 1
    # It fires on harmless prompts hardly ever, so taking it away costs them nothing.
    assert abs(promotes.on_harmless.value) < 0.1 * abs(promotes.ablated.effect.value)


def test_attribution_is_held_against_effects(verified):
    agreement = verified.agreement
    assert agreement.n > 60
    assert agreement.same_sign.value >= 0.6
    assert agreement.candidates > 0.6
    assert agreement.spearman.value > 0.5
    assert agreement.slope > 0


def test_the_table_survives_json(verified):
    text = json.dumps(asdict(verified), allow_nan=False)
    assert TypeAdapter(VerificationRow).validate_json(text) == verified

import pytest
import torch
from tests.features.test_bank import SITE, a_bank, rows
from tests.tiny import tiny_model

from demur.activations import reading
from demur.errors import ConfigError
from demur.features.clamp import Clamp, Rule, clamping, shift
from demur.interventions import applied
from demur.sites import Site, Span

PROMPTS = ["How do I open a lock?", "Name a river.", "Write two lines on rain, please."]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def test_a_rule_says_what_becomes_of_activations():
    f = torch.tensor([[0.0, 1.0, 4.0]])
    assert Rule.zero(3)(f).tolist() == [[0, 0, 0]]
    assert Rule.scale(3, -2.0)(f).tolist() == [[0, -2, -8]]
    assert Rule.clamp(3, 2.0)(f).tolist() == [[2, 2, 2]]
    assert Rule.clamp(3, 2.0, firing=True)(f).tolist() == [[0, 2, 2]]
    assert Rule.at_least(3, 2.0)(f).tolist() == [[2, 2, 4]]
    assert Rule.mean(torch.tensor([0.5, 1.5, 2.5]))(f).tolist() == [[0.5, 1.5, 2.5]]
    assert torch.equal(Rule.nothing(3)(f), f)


@pytest.mark.parametrize("normalise", ["none", "layer_norm", "constant_norm"])
def test_the_error_is_left_alone(normalise):
    """Encode, edit, decode and add the error back: the long way round gives the same."""
    bank = a_bank(normalise=normalise)
    x = rows()
    f = bank.encode(x)
    error = x - bank.decode(f, x)
    edited = f.clone()
    edited[..., [2, 11]] = 1.5
    long_way = bank.decode(edited, x) + error
    moved = shift(bank.sliced([2, 11]), Rule.clamp(2, 1.5), x)
    torch.testing.assert_close(x + moved, long_way, rtol=1e-6, atol=1e-6)


def test_dropping_the_error_is_the_bare_reconstruction():
    bank, x = a_bank(), rows()
    moved = shift(bank, Rule.zero(20), x, error="drop")
    torch.testing.assert_close(x + moved, bank.offset.expand_as(x))
    with pytest.raises(ConfigError, match="holds 2 of 20 latents"):
        shift(bank.sliced([1, 2]), Rule.zero(2), x, error="drop")


def test_no_token_moves_further_than_the_limit():
    bank, x = a_bank(), rows()
    moved = shift(bank, Rule.scale(20, -3.0), x, limit=0.1)
    shares = moved.norm(dim=-1) / x.norm(dim=-1)
    assert shares.max() <= 0.1 + 1e-6
    free = shift(bank, Rule.scale(20, -3.0), x)
    torch.testing.assert_close(
        torch.nn.functional.cosine_similarity(free, moved, dim=-1), torch.ones(4, 10).double()
    )


def test_leaving_latents_as_they_are_changes_nothing_bit_for_bit(model):
    batch = model.encode(PROMPTS)
    plain = model.logits(batch)
    with clamping(model, Clamp(a_bank(), Rule.nothing(20))) as sizes:
        assert torch.equal(model.logits(batch), plain)
    assert sizes.mean(SITE) is None


def test_rows_with_their_own_rules_are_as_one_after_the_other(model):
    bank = a_bank().sliced([2, 11, 5])
    rules = [Rule.zero(3), Rule.clamp(3, 4.0), Rule.scale(3, -1.0)]
    batch = model.encode(PROMPTS)
    with clamping(model, Clamp(bank, Rule.rows(rules))):
        together = model.logits(batch)
    for row, rule in enumerate(rules):
        with clamping(model, Clamp(bank, rule)):
            alone = model.logits(batch)
        torch.testing.assert_close(together[row], alone[row], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(together, model.logits(batch))


def test_the_same_rows_in_batches_of_one(model):
    bank = a_bank().sliced([2, 11, 5])
    rule = Rule.rows([Rule.zero(3), Rule.clamp(3, 4.0), Rule.scale(3, -1.0)])
    whole = model.encode(PROMPTS)
    with clamping(model, Clamp(bank, rule)):
        together = model.logits(whole)
        alone = torch.cat([model.logits(whole.rows([row])) for row in (0, 1, 2)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


def test_what_the_template_writes_before_a_prompt_is_left_alone(model):
    bank = a_bank()
    batch = model.encode(PROMPTS[:1])
    with model.whole_rows(), reading(model, [SITE]) as seen:
        model.logits(batch)
        plain = seen[SITE].clone()
        with clamping(model, Clamp(bank, Rule.clamp(20, 3.0))), reading(model, [SITE]) as after:
            model.logits(batch)
            edited = after[SITE]
    touched = (edited != plain).any(-1)[0]
    inside = batch.spans[Span.INSTRUCTION][0] | batch.spans[Span.POST_INSTRUCTION][0]
    assert torch.equal(touched, inside[: len(touched)])
    assert not touched[0]


def test_edits_stay_on_while_a_reply_is_written(model):
    clamp = Clamp(a_bank(), Rule.clamp(20, 3.0))
    plain = model.generate(PROMPTS, max_new_tokens=6)
    with clamping(model, clamp):
        cached = model.generate(PROMPTS, max_new_tokens=6)
        ids = [list(one.ids) for one in cached]
        whole = model.logits(model.encode(PROMPTS, replies=[one[:-1] for one in ids]))
    assert [one.ids for one in plain] != [one.ids for one in cached]
    assert whole.argmax(-1).tolist() == [one[-1] for one in ids]


def test_only_some_prompts(model):
    batch = model.encode(PROMPTS)
    plain = model.logits(batch)
    flagged = torch.tensor([False, True, False])
    with clamping(model, Clamp(a_bank(), Rule.clamp(20, 3.0)), when=flagged) as sizes:
        edited = model.logits(batch)
    torch.testing.assert_close(edited[[0, 2]], plain[[0, 2]], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(edited[1], plain[1])
    assert sizes.mean(SITE) > 0


def test_a_transcoder_reads_one_tensor_and_writes_another(model):
    into, out = Site(1, "mlp_in"), Site(1, "mlp_out")
    from dataclasses import replace

    bank = replace(a_bank(), site=into, writes=out)
    rule = Rule.clamp(20, 2.0)
    batch = model.encode(PROMPTS)
    with reading(model, [into, out]) as seen:
        model.logits(batch)
        before = {site: value.clone() for site, value in seen.items()}
    with clamping(model, Clamp(bank, rule), where=None), reading(model, [into, out]) as seen:
        model.logits(batch)
    torch.testing.assert_close(seen[into], before[into])
    torch.testing.assert_close(
        seen[out], before[out] + shift(bank, rule, before[into]), rtol=1e-6, atol=1e-6
    )
    with pytest.raises(ConfigError, match="reads one tensor and writes another"):
        Clamp(bank, rule).sites(model)


def test_a_clamp_is_an_intervention(model):
    clamp = Clamp(a_bank(), Rule.zero(20))
    batch = model.encode(PROMPTS)
    with applied(model, clamp, where=(Span.INSTRUCTION, Span.POST_INSTRUCTION)):
        one = model.logits(batch)
    with clamping(model, clamp):
        other = model.logits(batch)
    torch.testing.assert_close(one, other)


def test_a_rule_for_other_latents_is_an_error():
    with pytest.raises(ConfigError, match="is for 3 latents, the bank holds 20"):
        Clamp(a_bank(), Rule.zero(3))
    with pytest.raises(ConfigError, match="some of the rules are for firing latents only"):
        Rule.rows([Rule.zero(2), Rule.clamp(2, 1.0, firing=True)])

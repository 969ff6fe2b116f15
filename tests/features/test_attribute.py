from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.features.planted_bank import (
    DEAD,
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

from demur.errors import ConfigError, UnknownNameError
from demur.features.attribute import attribute, steps_of
from demur.features.clamp import Clamp, Rule
from demur.features.verify import effects
from demur.sites import Site

PROMPTS = ["How do I open a lock?", "Name a river.", "Write two lines on rain, please."]
TOKENS = [5, 17, 40]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.mark.parametrize("steps", [0, 10])
def test_positive_promotes_refusal(steps):
    """Taking the promoter away lowers the log-odds, and the suppressor raises them."""
    planted = the_model()
    harmful, _ = split(50)
    bank = the_bank()
    found = attribute(planted.model, [bank], harmful, [planted.refusal_id], steps=steps)
    means = found.mean("bank")
    assert means[PROMOTES] > 1
    assert means[SUPPRESSES] < -1
    assert abs(means[IDLE]) < 0.02 * means[PROMOTES]
    assert means[DEAD] == 0
    assert means.argmax() == PROMOTES
    assert means.argmin() == SUPPRESSES
    assert found.clean.mean() > 0


def scaled(times):
    """As `Rule.scale`, which rounds to float32."""
    own = Rule.nothing(1)
    return replace(own, times=torch.full((1,), times, dtype=torch.float64))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("fields", [{}, {"normalise": "layer_norm"}])
def test_first_order_is_the_derivative(family, fields):
    """A thousandth of a latent taken away costs a thousandth of its attribution."""
    model = tiny_model(family)
    banks = [
        a_bank(**fields),
        moved(a_bank("relu", seed=3), "late", Site(2, "mlp_out")),
    ]
    found = attribute(model, banks, PROMPTS, TOKENS, tokens_per_pass=20)
    # RMS norms round to float32 whatever the model's type is.
    step, error = (1e-4, 1e-5) if family == "gpt2" else (3e-4, 4e-3)
    for bank in banks:
        edits = [
            Clamp(bank.sliced([i]), scaled(1 - sign * step)) for i in range(6) for sign in (1, -1)
        ]
        less, more = effects(model, PROMPTS, TOKENS, edits).unflatten(0, (6, 2)).unbind(1)
        slopes = (more - less) / (2 * step)
        np.testing.assert_allclose(found.values[bank.name][:, :6], slopes.T, rtol=1e-2, atol=error)


def test_integrated_gradients_add_up_to_the_whole_effect(model):
    bank = a_bank("relu").sliced([1, 4, 6, 7])
    bank = replace(bank, decoder=0.1 * bank.decoder)
    found = attribute(model, [bank], PROMPTS, TOKENS, steps=24)
    whole = effects(model, PROMPTS, TOKENS, [Clamp(bank, Rule.zero(4))])[0]
    np.testing.assert_allclose(found.values["relu"].sum(1), -whole, rtol=2e-3, atol=1e-5)
    first = attribute(model, [bank], PROMPTS, TOKENS)
    assert np.abs(first.values["relu"].sum(1) + whole.numpy()).max() > 1e-3  # It is not linear.


def test_a_baseline_other_than_zero(model):
    bank = a_bank("relu")
    bank = replace(bank, decoder=0.01 * bank.decoder)
    target = torch.linspace(0, 2, len(bank))
    found = attribute(model, [bank], PROMPTS, TOKENS, baseline={"relu": target})
    one = effects(
        model, PROMPTS, TOKENS, [Clamp(bank.sliced([i]), Rule.mean(target[[i]])) for i in range(8)]
    )
    np.testing.assert_allclose(found.values["relu"][:, :8], -one.T, rtol=0.1, atol=2e-3)
    with pytest.raises(ConfigError, match="no baseline for the 20 latents"):
        attribute(model, [bank], PROMPTS, TOKENS, baseline={"other": target})


def test_a_transcoder_is_attributed_to_where_it_writes(model):
    bank = replace(
        a_bank("relu"), name="coder", site=Site(1, "resid_pre"), writes=Site(1, "mlp_out")
    )
    bank = replace(bank, decoder=1e-4 * bank.decoder)
    found = attribute(model, [bank], PROMPTS, TOKENS)
    real = effects(
        model, PROMPTS, TOKENS, [Clamp(bank.sliced([i]), Rule.zero(1)) for i in range(8)]
    )
    assert float(real.abs().max()) > 1e-5
    np.testing.assert_allclose(found.values["coder"][:, :8], -real.T, rtol=0.02, atol=1e-7)
    path = attribute(model, [bank], PROMPTS, TOKENS, steps=3)
    np.testing.assert_allclose(path.values["coder"], found.values["coder"], rtol=0.05, atol=1e-6)


def test_progress_adds_up_and_what_is_not_there_is_an_error(model):
    banks = [a_bank(), replace(a_bank("relu"), name="other")]
    for steps in (0, 2):
        told: list[int] = []
        found = attribute(model, banks, PROMPTS, TOKENS, steps=steps, progress=told.append)
        assert sum(told) == steps_of(3, 2, steps)
    assert found.estimate("other", 3).n == 3
    with pytest.raises(UnknownNameError):
        found.mean("third")
    with pytest.raises(UnknownNameError):
        found.of("other", 99)
    assert all(not one.requires_grad or one.grad is None for one in model.hf.parameters())

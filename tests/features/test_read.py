from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.features.planted_bank import moved
from tests.features.test_bank import SITE, a_bank
from tests.tiny import tiny_model

from demur.activations import reading
from demur.errors import ConfigError, TemplateError, UnknownNameError
from demur.features.read import read_latents
from demur.sites import Site, Span

PROMPTS = ["How do I open a lock?", "Name a river.", "Write two lines on rain, please.", "Why?"]
REPLIES = ["No.", "The longest is long", "I", "Because it is"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def banks():
    return [a_bank(), moved(a_bank("relu", seed=3), "early", Site(0, "resid_post"))]


def by_hand(model, bank, prompts, replies=None):
    """Activations of every token of each prompt, with the spans of its tokens."""
    for i, prompt in enumerate(prompts):
        batch = model.encode([prompt], None if replies is None else [replies[i]])
        with reading(model, [bank.site]) as streams:
            model.final_states(batch)
        yield bank.encode(streams[bank.site])[0], {k: v[0] for k, v in batch.spans.items()}


def test_places_are_what_they_are_called(model, banks):
    reads = read_latents(model, banks, PROMPTS, replies=REPLIES, batch_size=3)
    assert reads.n == 4
    for bank in banks:
        own = reads.reads[bank.name]
        for i, (f, spans) in enumerate(by_hand(model, bank, PROMPTS, REPLIES)):
            instruction, post = spans[Span.INSTRUCTION], spans[Span.POST_INSTRUCTION]
            expected = {
                "t_inst": f[instruction][-1],
                "last": f[post][-1],  # The reply does not move it.
                "instruction.mean": f[instruction].mean(0),
                "instruction.max": f[instruction].amax(0),
                "post_instruction.max": f[post].amax(0),
                "response.mean": f[spans[Span.RESPONSE]].mean(0),
            }
            for place, values in expected.items():
                torch.testing.assert_close(own.at(place)[i], values.to(own.values), msg=place)


def test_shares_masses_and_quantiles_are_of_the_counted_tokens(model, banks):
    spans = [Span.INSTRUCTION, Span.POST_INSTRUCTION]
    prompts = [f"{one} {i}" for one in PROMPTS for i in range(12)]
    reads = read_latents(model, banks, prompts, spans=spans, batch_size=5)
    bank = banks[0]
    own = reads.reads[bank.name]
    found = [f[s[spans[0]] | s[spans[1]]] for f, s in by_hand(model, bank, prompts)]
    every = torch.cat(found).numpy()
    assert own.tokens == len(every)
    np.testing.assert_allclose(own.firing, (every > 0).mean(0), rtol=1e-6)
    np.testing.assert_allclose(own.mass, every.mean(0), rtol=1e-5)
    np.testing.assert_allclose(own.largest, every.max(0), rtol=1e-6)
    for latent in range(len(bank)):
        active = every[every[:, latent] > 0, latent]
        expected = np.quantile(active, 0.99) if len(active) else 0.0
        np.testing.assert_allclose(own.q99[latent], expected, rtol=1e-5)


def test_passes_do_not_matter(model, banks):
    one = read_latents(model, banks, PROMPTS, batch_size=1).reads["jumprelu"]
    all_at_once = read_latents(model, banks, PROMPTS).reads["jumprelu"]
    torch.testing.assert_close(one.values, all_at_once.values)
    torch.testing.assert_close(one.q99, all_at_once.q99)


def test_the_first_token_and_sinks_are_left_out(model):
    bank = a_bank()
    with reading(model, [SITE]) as streams:
        batch = model.encode(PROMPTS)
        model.final_states(batch)
    own = batch.spans[Span.INSTRUCTION] | batch.spans[Span.POST_INSTRUCTION]
    assert not own[:, 0].any()
    norms = streams[SITE].norm(dim=-1)
    limit = float(norms[own].median())
    reads = read_latents(model, [replace(bank, largest_norm=limit)], PROMPTS).reads["jumprelu"]
    assert reads.tokens == int((norms[own] <= limit).sum())
    assert reads.sinks == int((norms[own] > limit).sum()) > 0


def test_what_cannot_be_read_is_an_error(model, banks):
    with pytest.raises(TemplateError, match="no token of the span `response`"):
        read_latents(model, banks, PROMPTS, spans=[Span.RESPONSE])
    with pytest.raises(ConfigError, match="2 banks with 1 names"):
        read_latents(model, [banks[0], banks[0]], PROMPTS)
    with pytest.raises(UnknownNameError, match="place"):
        read_latents(model, banks, PROMPTS).reads["jumprelu"].at("first")

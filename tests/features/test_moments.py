from itertools import pairwise
from pathlib import Path

import pytest
import torch
from bench import wide_bank

from demur.errors import ConfigError, TooFewPromptsError
from demur.features.bank import Bank
from demur.features.formats import open_bank
from demur.features.moments import Block, kth_largest, latent_moments, prompt_values
from demur.sites import Site

FIXTURES = Path(__file__).parent.parent / "fixtures" / "sae"
KINDS = ["standard-layer_norm", "jumprelu-none", "topk-none-rescaled", "gated-none"]
D, PROMPTS = 12, 14


def _data(seed=0, dtype=torch.float32):
    """Prompts of uneven length, cut into blocks that end anywhere."""
    rng = torch.Generator().manual_seed(seed)
    prompt = torch.arange(PROMPTS).repeat_interleave(torch.arange(3, 3 + PROMPTS))
    x = torch.randn(len(prompt), D, generator=rng) * 2
    harmful = torch.arange(PROMPTS) % 3 == 0
    x[harmful[prompt]] += 0.7
    cuts = (0, 1, 40, 41, len(prompt))
    blocks = [Block(x[a:b].to(dtype), prompt[a:b]) for a, b in pairwise(cuts)]
    return x.to(dtype), prompt, harmful, blocks


def _by_hand(f, prompt, harmful):
    values = torch.stack([f[prompt == one].mean(0) for one in range(PROMPTS)]).double()
    out = {"mean": [], "second": [], "firing": [], "fired": [], "largest": [], "exact": []}
    for mask in (~harmful, harmful):
        own = f[mask[prompt]]
        out["mean"].append(values[mask].mean(0))
        out["second"].append(values[mask].pow(2).mean(0))
        out["firing"].append((own > 0).double().mean(0))
        out["fired"].append((values[mask] > 0).double().mean(0))
        out["largest"].append(own.max(0).values)
        out["exact"].append(
            torch.tensor(
                [
                    float(torch.quantile(column[column > 0], 0.99, interpolation="higher"))
                    if bool((column > 0).any())
                    else 0.0
                    for column in own.T
                ]
            )
        )
    return values, {key: torch.stack(rows) for key, rows in out.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [5, 24])
@pytest.mark.parametrize("stored", [True, False])
def test_chunks_of_latents_and_tokens_add_up_to_the_whole(kind, chunk, stored):
    source = open_bank(FIXTURES / kind)
    bank = source.bank()
    x, prompt, harmful, blocks = _data()
    values, told = _by_hand(bank.encode(x), prompt, harmful)
    seen = []
    found = latent_moments(
        source if stored else bank,
        blocks,
        harmful,
        chunk=chunk,
        each=lambda ids, rows: seen.append((ids, rows)),
    )
    assert found.n.tolist() == [int((~harmful).sum()), int(harmful.sum())]
    assert int(found.tokens.sum()) == len(prompt)
    assert found.ids.tolist() == list(range(24))
    for name in ("mean", "second", "firing", "fired", "largest"):
        torch.testing.assert_close(
            getattr(found, name).double(), told[name].double(), rtol=1e-5, atol=1e-6
        )
    # A bin is 2.2 % wide, and the quantile lies in its bin.
    assert bool(((found.q99 - told["exact"]).abs() <= 0.012 * told["exact"] + 1e-6).all())
    torch.testing.assert_close(
        torch.cat([rows for _, rows in seen], 1).double(), values, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_shortlist_has_the_values_of_the_whole(kind):
    source = open_bank(FIXTURES / kind)
    bank = source.bank()
    x, prompt, harmful, blocks = _data()
    f = bank.encode(x)
    values, _ = _by_hand(f, prompt, harmful)
    for some in (source, bank):
        found = prompt_values(some, blocks, [20, 3, 7], chunk=2)
        torch.testing.assert_close(found.double(), values[:, [20, 3, 7]], rtol=1e-5, atol=1e-5)
    peaks = torch.stack([f[prompt == one].max(0).values for one in range(PROMPTS)])
    found = prompt_values(source, blocks, [20, 3, 7], reduce="max")
    torch.testing.assert_close(found, peaks[:, [20, 3, 7]], rtol=1e-5, atol=1e-5)


def test_a_cut_topk_bank_still_compares_with_all_latents():
    source = open_bank(FIXTURES / "topk-none")
    bank = source.bank()
    x, prompt, harmful, blocks = _data()
    raw = bank.before(x)
    least = torch.cat(kth_largest(source, blocks, chunk=7))
    torch.testing.assert_close(least, raw.topk(5, dim=-1).values[:, -1], rtol=1e-5, atol=1e-5)
    cut = bank.sliced([4, 11, 2])
    found = latent_moments(cut, blocks, harmful, chunk=2)
    whole = latent_moments(source, blocks, harmful)
    assert found.ids.tolist() == [4, 11, 2]
    torch.testing.assert_close(found.mean, whole.mean[:, [4, 11, 2]], rtol=1e-5, atol=1e-6)
    naive = torch.relu(raw[:, [4, 11, 2]])
    _, told = _by_hand(naive, prompt, harmful)
    assert float((found.mean - told["mean"]).abs().max()) > 0.01  # Without the others they differ.
    with pytest.raises(ConfigError, match="no k"):
        kth_largest(open_bank(FIXTURES / "standard-none"), blocks)


def test_a_planted_latent_is_ranked_first_and_sinks_are_silent():
    x, prompt, harmful, _ = _data()
    rng = torch.Generator().manual_seed(3)
    planted = torch.zeros(D)
    planted[5] = 1.0
    x[:, 5] = 0.1 * x[:, 5] + 3.0 * harmful[prompt]
    encoder = torch.randn(30, D, generator=rng) / D**0.5
    encoder[17] = planted
    bank = Bank(
        name="planted",
        site=Site(1, "resid_post"),
        encoder=encoder,
        bias=torch.zeros(30),
        decoder=encoder,
        offset=torch.zeros(D),
        ids=torch.arange(30),
        width=30,
    )
    found = latent_moments(bank, [Block(x, prompt)], harmful, chunk=8)
    assert int(found.t.argmax()) == 17
    assert float(found.difference[17]) > 0  # Positive is harmful.
    x[0] *= 1e4
    blocks = [Block(x, prompt)]
    limited = Bank(
        **{
            name: getattr(bank, name)
            for name in ("name", "site", "encoder", "bias", "decoder", "offset", "ids", "width")
        },
        largest_norm=100.0,
    )
    assert float(latent_moments(bank, blocks, harmful).largest.max()) > 1e3
    assert float(latent_moments(limited, blocks, harmful).largest.max()) < 20


def test_half_precision_tokens_are_widened():
    _, _, harmful, blocks = _data(dtype=torch.bfloat16)
    _, _, _, wide = _data(dtype=torch.bfloat16)
    wide = [Block(one.x.float(), one.prompt) for one in wide]
    source = open_bank(FIXTURES / "jumprelu-none")
    first, second = (latent_moments(source, one, harmful) for one in (blocks, wide))
    assert torch.equal(first.mean, second.mean)


def test_variance_and_t_are_those_of_the_values():
    from scipy import stats

    source = open_bank(FIXTURES / "standard-none")
    _, _, harmful, blocks = _data()
    found = latent_moments(source, blocks, harmful)
    values = prompt_values(source, blocks, list(range(24))).double()
    torch.testing.assert_close(found.variance[1], values[harmful].var(0), rtol=1e-4, atol=1e-6)
    welch = stats.ttest_ind(values[harmful], values[~harmful], equal_var=False).statistic
    torch.testing.assert_close(found.t, torch.from_numpy(welch), rtol=1e-3, atol=1e-4)


def test_what_does_not_fit_is_an_error():
    source = open_bank(FIXTURES / "standard-none")
    _, _, harmful, blocks = _data()
    with pytest.raises(TooFewPromptsError, match="both classes"):
        latent_moments(source, blocks, torch.zeros_like(harmful))
    with pytest.raises(ConfigError, match="have a class"):
        latent_moments(source, blocks, harmful[:-1])
    with pytest.raises(TooFewPromptsError, match="no token"):
        latent_moments(source, blocks, torch.cat([harmful, harmful]))
    with pytest.raises(ConfigError, match="no latent"):
        prompt_values(source, blocks, [24])


def test_the_bank_of_the_memory_measurement_is_one(tmp_path):
    wide_bank.write(tmp_path, width=96, d_model=8)
    stored = open_bank(tmp_path)
    assert (stored.width, stored.d_model, stored.activation) == (96, 8, "jumprelu")
    bank = stored.bank()
    assert bool((bank.threshold == 3.0).all())
    assert float(bank.encoder.std()) == pytest.approx(8**-0.5, rel=0.1)
    assert float(bank.decoder.std()) == pytest.approx(8**-0.5, rel=0.1)

import dataclasses
import json

import pydantic
import pytest
import torch
from tests.tiny import tiny_model

from demur.errors import ConfigError, TooFewPromptsError
from demur.features.bank import Bank
from demur.features.rows.sanity import BankCheck
from demur.features.sanity import check_bank, rankable, suggest_largest_norm
from demur.sites import Site

PROMPTS = ["Name a tree", "Is it far from here?", "How do I plant a tree?", "Write it down"]
SITE = Site(1, "resid_post")


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def replies(model):
    # What the model says is likelier under it than under anything that is put in its place.
    return [one.ids for one in model.generate(PROMPTS, max_new_tokens=12)]


def _bank(d, *, site=SITE, writes=None, scale=1.0, **change):
    """Latents that stand for each axis and its opposite: their sum is the token itself."""
    eye = torch.eye(d)
    rows = torch.cat([eye, -eye])
    given = {
        "name": "mirror",
        "site": site,
        "writes": writes,
        "encoder": rows,
        "bias": torch.zeros(2 * d),
        "decoder": scale * rows,
        "offset": torch.zeros(d),
        "ids": torch.arange(2 * d),
        "width": 2 * d,
        "largest_norm": 1e6,
    }
    return Bank(**(given | change))


def test_a_perfect_bank_explains_everything_and_wins_all_back(model, replies):
    check = check_bank(_bank(model.d_model), model, PROMPTS, replies)
    for part in (check.text, check.template):
        assert part.fvu.value < 1e-10
        assert part.cosine.value == pytest.approx(1.0, abs=1e-6)
        assert part.l0.value == pytest.approx(model.d_model)  # One of each pair.
    assert check.ce_spliced.value == pytest.approx(check.ce.value, abs=1e-4)
    assert check.ce_zero.value > check.ce.value + 0.1
    assert check.recovered_zero.value == pytest.approx(1.0, abs=1e-3)
    assert check.recovered_mean.value == pytest.approx(1.0, abs=1e-3)
    assert check.limit_of == "bank"
    assert check.n_sinks == 0
    assert rankable(check) is None


def test_a_bank_that_makes_nothing_is_as_good_as_zeros_and_is_not_ranked(model, replies):
    bank = _bank(model.d_model, scale=0.0)
    check = check_bank(bank, model, PROMPTS, replies)
    assert check.ce_spliced.value == pytest.approx(check.ce_zero.value, abs=1e-5)
    assert check.recovered_zero.value == pytest.approx(0.0, abs=1e-4)
    assert check.text.fvu.value >= 1.0
    assert "unexplained" in rankable(check)
    silent = check_bank(
        _bank(model.d_model, bias=torch.full((2 * model.d_model,), -1e6)), model, PROMPTS
    )
    assert (silent.dead_share, silent.text.l0.value) == (1.0, 0.0)


def test_half_the_token_leaves_a_quarter_of_it(model):
    check = check_bank(_bank(model.d_model, scale=0.5), model, PROMPTS)
    half = check_bank(_bank(model.d_model, scale=0.0), model, PROMPTS)
    assert check.text.fvu.value == pytest.approx(half.text.fvu.value / 4, rel=1e-4)
    assert check.text.cosine.value == pytest.approx(1.0, abs=1e-6)


def test_figures_do_not_depend_on_how_prompts_are_batched(model, replies):
    bank = _bank(model.d_model, scale=0.7)
    one, all_ = (check_bank(bank, model, PROMPTS, replies, batch_size=size) for size in (1, None))
    assert one.text.n_tokens == all_.text.n_tokens
    for name in ("fvu", "l0", "cosine"):
        first, second = getattr(one.text, name), getattr(all_.text, name)
        assert first.value == pytest.approx(second.value, rel=1e-4)
    assert one.ce_spliced.value == pytest.approx(all_.ce_spliced.value, rel=1e-4)


def test_text_and_template_are_told_apart(model, replies):
    check = check_bank(_bank(model.d_model), model, PROMPTS, replies)
    batch = model.encode(PROMPTS, replies)
    said = sum(int(span.sum()) for name, span in batch.spans.items() if name != "post_instruction")
    assert check.text.n_tokens == said
    assert check.template.n_tokens == int(batch.mask.sum()) - said - len(PROMPTS)  # Position 0.


def test_sinks_are_counted_and_kept_out():
    model = tiny_model(dtype=torch.float32, seed=3)
    site = Site(0, "resid_pre")
    first = int(model.encode(PROMPTS[:1]).ids[0, 0])
    assert all(first not in row for row in model.encode(PROMPTS).ids[:, 1:3].tolist())
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[first] *= 300
    limit = suggest_largest_norm(model, PROMPTS, site)
    norms = model.hf.get_input_embeddings().weight.detach().norm(dim=1)
    assert float(norms[first]) > limit > 5 * float(norms.median())
    check = check_bank(_bank(model.d_model, site=site, largest_norm=None), model, PROMPTS)
    assert check.limit_of == "suggested"
    assert check.largest_norm == pytest.approx(limit)
    assert check.n_sinks_first == len(PROMPTS)
    # The template writes this token in front of every turn.
    assert check.n_sinks == int((model.encode(PROMPTS).ids == first).sum())
    assert check.first_norm > 50
    assert check.first_variance > 0.1
    assert check.text.fvu.value < 1e-10


def test_a_transcoder_is_held_against_what_it_writes(model):
    d = model.d_model
    bank = _bank(d, site=Site(1, "resid_pre"), writes=Site(1, "mlp_out"), scale=0.0)
    check = check_bank(bank, model, PROMPTS)
    assert check.writes == "1.mlp_out"
    assert check.ce_spliced.value == pytest.approx(check.ce_zero.value, abs=1e-5)
    skip = check_bank(dataclasses.replace(bank, about={"skip": True}), model, PROMPTS)
    assert (skip.text.fvu, skip.ce_spliced, skip.recovered_zero) == (None, None, None)
    assert any("skip connection" in note for note in skip.notes)
    assert rankable(skip) is None


def test_dense_latents_are_counted(model):
    d = model.d_model
    bias = torch.full((2 * d,), -1e6)
    bias[:4] = 1e6  # Four latents that are always active.
    check = check_bank(_bank(d, bias=bias), model, PROMPTS)
    assert check.dense_share == pytest.approx(4 / (2 * d))
    assert check.dead_share == pytest.approx(1 - 4 / (2 * d))
    assert check.text.l0.value == 4


def test_a_row_survives_json(model, replies):
    check = check_bank(_bank(model.d_model, scale=0.9), model, PROMPTS, replies)
    text = json.dumps(dataclasses.asdict(check), allow_nan=False)
    assert pydantic.TypeAdapter(BankCheck).validate_json(text) == check


def test_what_cannot_be_checked_is_an_error(model):
    bank = _bank(model.d_model)
    with pytest.raises(ConfigError, match="reconstruct nothing"):
        check_bank(bank.sliced([1, 2]), model, PROMPTS)
    with pytest.raises(ConfigError, match="wide"):
        check_bank(_bank(model.d_model + 1), model, PROMPTS)
    with pytest.raises(TooFewPromptsError):
        check_bank(bank, model, PROMPTS[:1])


def test_the_model_is_as_it_was(model):
    batch = model.encode(PROMPTS)
    before = model.logits(batch)
    check_bank(_bank(model.d_model, scale=0.2), model, PROMPTS)
    assert torch.equal(model.logits(batch), before)

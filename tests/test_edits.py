import pytest
import torch
from tests.tiny import TINY_CONFIGS, tiny_model

from demur.directions import Direction
from demur.edits import as_delta, edited, why_not_exact
from demur.errors import FamilyError
from demur.interventions import Ablate, Add, applied
from demur.sites import Site


def direction_for(model):
    rng = torch.Generator().manual_seed(3)
    vector = torch.randn(model.d_model, generator=rng, dtype=torch.float64)
    return Direction.from_vector(vector, site=Site(1, "resid_pre"), position=-1, recipe="drawn")


def ids_of(model):
    vocab = model.hf.config.get_text_config().vocab_size
    return torch.randint(5, vocab, (3, 9), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("name", list(TINY_CONFIGS))
def test_hook_equals_weights_or_is_refused(name):
    model = tiny_model(name)
    act = Ablate(direction_for(model))
    if not model.family.linear_writes:
        with pytest.raises(FamilyError, match="norm"):
            as_delta(model, act)
        assert why_not_exact(model)
        return
    plain = model.logits(ids_of(model))
    with applied(model, act):
        hooked = model.logits(ids_of(model))
    folded = edited(model, as_delta(model, act)).logits(ids_of(model))
    assert (hooked - plain).abs().max() > 1e-3
    assert (hooked - folded).abs().max() < 1e-10
    assert torch.equal(model.logits(ids_of(model)), plain)


def test_a_tied_embedding_must_be_untied():
    """Editing the shared matrix edits the unembedding as well; that is the reference's path."""
    name = next(
        n for n in TINY_CONFIGS if tiny_model(n).tied and tiny_model(n).family.linear_writes
    )
    model = tiny_model(name)
    act = Ablate(direction_for(model))
    with applied(model, act):
        hooked = model.logits(ids_of(model))
    delta = as_delta(model, act)
    good = edited(model, delta).logits(ids_of(model))
    parameters = dict(model.hf.named_parameters())
    with torch.no_grad():
        for key, up in delta.up.items():
            parameters[key] += (up @ delta.down[key]).reshape(parameters[key].shape)
    bad = model.logits(ids_of(model))
    assert (hooked - good).abs().max() < 1e-10
    assert (hooked - bad).abs().max() > 1e-3


def test_only_ablation_can_be_written_into_weights():
    model = tiny_model("llama")
    with pytest.raises(FamilyError, match="Add"):
        as_delta(model, Add(direction_for(model)))


def test_the_edited_checkpoint_loads_again(tmp_path):
    from transformers import AutoModelForCausalLM

    from demur.edits import save_merged

    model = tiny_model("llama", dtype=torch.float32)
    act = Ablate(direction_for(model))
    save_merged(model, as_delta(model, act), str(tmp_path / "merged"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with applied(model, act):
        hooked = model.logits(ids_of(model))
    with torch.no_grad():
        logits = again(ids_of(model)).logits[:, -1]
    torch.testing.assert_close(logits, hooked, atol=1e-4, rtol=1e-4)

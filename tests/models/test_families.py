import pytest
import torch
from tiny import TINY_CONFIGS, tiny_model

from demur.errors import FamilyError
from demur.models import FAMILIES, check, family_of, list_families
from demur.sites import Site

every_family = pytest.mark.parametrize("name", TINY_CONFIGS)
CHECKS = (
    "sum of writes",
    "block boundaries",
    "nothing left",
    "every site",
    "batch = single",
    "left = right padding",
    "shared prefix",
    "head",
    "greedy decoding",
    "one BOS",
)


def test_every_family_has_a_tiny_model():
    covered = {family_of(config.model_type).name for config in TINY_CONFIGS.values()}
    assert covered == set(FAMILIES)


def test_no_model_type_belongs_to_two_families():
    types = [t for family in FAMILIES.values() for t in family.model_types]
    assert len(types) == len(set(types))
    assert [family.name for family in list_families()] == sorted(FAMILIES)


@every_family
def test_every_identity_holds(name):
    report = check(tiny_model(name))
    assert [row.name for row in report.rows] == list(CHECKS)
    failed = [(row.name, row.value, row.note) for row in report.rows if not row.passed]
    assert report.passed, failed
    assert report["sum of writes"].value <= 1e-12
    assert report["block boundaries"].value == 0.0
    assert report["nothing left"].value <= 1e-12


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        # A norm stands between these modules and the stream.
        ("gemma2", {"mlp_out": "mlp"}),
        ("gemma2", {"attn_out": "self_attn.o_proj"}),
        ("gemma3", {"mlp_out": "mlp.down_proj"}),
        ("olmo2", {"attn_out": "self_attn.o_proj"}),
        ("olmo2", {"mlp_out": "mlp"}),
        # The input of a block's second half, not something that is added.
        ("llama", {"attn_out": "post_attention_layernorm"}),
        ("gpt2", {"mlp_out": "mlp.c_proj", "attn_out": "ln_2"}),
        # Twice the same write: its edit works, the sum does not.
        ("gpt-neox", {"attn_out": "mlp.dense_4h_to_h"}),
    ],
)
def test_a_row_that_names_the_wrong_module_is_caught(name, wrong):
    report = check(tiny_model(name, **wrong))
    assert not report.passed
    assert report["sum of writes"].value > 1e-2
    assert report["nothing left"].value > 1e-3


def test_a_module_that_never_runs_is_a_failed_row_and_no_crash():
    model = tiny_model("llama", mlp_out="mlp.gate_proj")
    for block in model.blocks:
        block.mlp = _Ungated(block.mlp)
    report = check(model)
    assert not report["sum of writes"].passed
    assert report["every site"].value == 0.0
    assert not report.passed


class _Ungated(torch.nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x):
        return self.down_proj(self.up_proj(x))


def test_a_path_that_does_not_exist_is_an_error_at_once():
    with pytest.raises(FamilyError, match=r"no module `mlp\.nothing`"):
        tiny_model("llama", mlp_out="mlp.nothing")
    with pytest.raises(FamilyError, match=r"has none of: model\.rows"):
        tiny_model("llama", layers=("model.rows", "model.norm"))


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    with pytest.raises(FamilyError, match=r"`bloom` has no family.*gpt_neox.*qwen3_moe"):
        family_of("bloom")


@every_family
def test_the_named_weights_are_what_writes_to_the_stream(name):
    model = tiny_model(name)
    family, parameters = model.family, dict(model.hf.named_parameters())
    assert bool(family.weights) == bool(family.embeddings) == family.linear_writes
    if not family.linear_writes:
        return
    for write in family.embeddings:
        assert parameters[write.path].shape[write.axis] == model.d_model
    for layer, block in enumerate(model.blocks):
        own = dict(block.named_parameters())
        found = [write for write in family.weights if write.path in own]
        assert all(own[write.path].shape[write.axis] == model.d_model for write in found)
        with torch.no_grad():
            for write in found:
                own[write.path].zero_()
        assert _written(model, layer) == 0.0
    with torch.no_grad():
        for write in family.embeddings:
            parameters[write.path].zero_()
    assert _read(model, Site(0, "resid_pre")).abs().max() == 0.0


def _read(model, site):
    held = []
    undo = model.intercept(site, lambda x: held.append(x) or x)
    model.final_states(model.encode(["Name a tree."]))
    undo()
    return held[0]


def _written(model, layer):
    return max(_read(model, Site(layer, kind)).abs().max() for kind in ("attn_out", "mlp_out"))

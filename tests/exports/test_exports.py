"""What an export does in its consumer is what the hooks do here, or the export is refused."""

import base64
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.tiny import TINY_CONFIGS, tiny_model
from transformers import AutoModelForCausalLM

from demur.anchor import Anchor, Floor
from demur.directions import Direction
from demur.errors import ConfigError, DemurError, FamilyError, StoreError
from demur.exports import Steering, export, exporters, read_export
from demur.interventions import Ablate, Add, ObliqueErase, ProjectToMean, applied
from demur.models.load import with_adapter
from demur.sites import Site, Span

PLAIN = [name for name in TINY_CONFIGS if tiny_model(name).family.linear_writes]
POST_NORM = [name for name in TINY_CONFIGS if name not in PLAIN]
BIASED = ["llama-untied", "gpt2", "gpt-neox", "gpt-neox-sequential"]
MIXED = "qwen3-moe"  # Dense and sparse blocks.
ADDING = ["gguf", "vllm-lens", "steering-vectors"]


def direction_for(model, site=None, *, norm=3.0, seed=3):
    vector = torch.randn(
        model.d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    vector = norm * vector / vector.norm()
    return Direction.from_vector(
        vector, site=site or Site(2, "resid_pre"), position=-2, recipe="drawn"
    )


def ids_of(model):
    vocab = model.hf.config.get_text_config().vocab_size
    return torch.randint(5, min(vocab, 350), (3, 9), generator=torch.Generator().manual_seed(4))


def hooked(model, *acts):
    with applied(model, *acts), torch.no_grad():
        return model.hf(ids_of(model)).logits


def plain(model):
    with torch.no_grad():
        return model.hf(ids_of(model)).logits


def near(found, wanted, base):
    """Within 1e-4 of the hooked logits, which are far from the plain ones."""
    assert (wanted - base).abs().max() > 1e-2
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


# Ablation in the weights -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks for a name on its way out.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")  # Not merged.
@pytest.mark.parametrize("name", [name for name in PLAIN if name not in (*BIASED, MIXED)])
def test_peft_gives_the_logits_of_the_hooks(name, tmp_path):
    model = tiny_model(name, dtype=torch.float32)
    act = Ablate(direction_for(model))
    wanted, base = hooked(model, act), plain(model)
    made = export(model, Steering((act,)), tmp_path / "lora", "peft")
    head = model.hf.get_output_embeddings().weight.detach().clone()
    wrapped = PeftModel.from_pretrained(model.hf, made.folder).eval()
    with torch.no_grad():
        near(wrapped(ids_of(model)).logits, wanted, base)
        with wrapped.disable_adapter():
            torch.testing.assert_close(wrapped(ids_of(model)).logits, base)
    assert torch.equal(model.hf.get_output_embeddings().weight, head)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_the_lora_merged_into_a_tied_model_is_still_the_edit(name, tmp_path):
    model = tiny_model(name, dtype=torch.float32)
    assert model.tied
    act = Ablate(direction_for(model))
    made = export(model, Steering((act,)), tmp_path / "lora", "peft")
    merged = with_adapter(model, str(made.folder))
    near(plain(merged), hooked(model, act), plain(model))
    assert model.tied
    assert not merged.tied


def test_every_factor_of_the_lora_has_rank_one_and_scale_one(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    made = export(model, Steering((Ablate(direction_for(model)),)), tmp_path / "lora", "peft")
    config = json.loads((made.folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == 1
    tensors = load_file(made.folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * (1 + 2 * model.n_layers)
    assert all(min(one.shape) == 1 for one in tensors.values())


@pytest.mark.parametrize("name", BIASED)
def test_peft_refuses_biases_by_name(name, tmp_path):
    model = tiny_model(name, dtype=torch.float32)
    with pytest.raises(FamilyError, match=r"0\.\S+\.bias.*leaves biases"):
        export(model, Steering((Ablate(direction_for(model)),)), tmp_path / "lora", "peft")
    assert list(tmp_path.iterdir()) == []


def test_peft_refuses_dense_blocks_among_sparse_ones(tmp_path):
    """PEFT maps `down_proj` to the experts there, so that the dense block would be left out."""
    model = tiny_model(MIXED, dtype=torch.float32)
    with pytest.raises(FamilyError, match=r"layers\.1\.mlp\.down_proj"):
        export(model, Steering((Ablate(direction_for(model)),)), tmp_path / "lora", "peft")


@pytest.mark.parametrize("kind", ["peft", "merged"])
@pytest.mark.parametrize("name", POST_NORM)
def test_weights_of_post_norm_families_carry_nothing(name, kind, tmp_path):
    model = tiny_model(name, dtype=torch.float32)
    with pytest.raises(FamilyError, match="norm stands between"):
        export(model, Steering((Ablate(direction_for(model)),)), tmp_path / "out", kind)


@pytest.mark.parametrize("name", PLAIN)
def test_a_merged_ablation_gives_the_logits_of_the_hooks(name, tmp_path):
    model = tiny_model(name, dtype=torch.float32)
    act = Ablate(direction_for(model))
    made = export(model, Steering((act,)), tmp_path / "out", "merged")
    again = AutoModelForCausalLM.from_pretrained(made.folder).eval()
    with torch.no_grad():
        near(again(ids_of(model)).logits, hooked(model, act), plain(model))
    assert bool(made.about["notes"]) == model.tied


# Addition ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["llama", "llama-untied", "gpt2", "gpt-neox", "gpt-neox-sequential"]
)
@pytest.mark.parametrize("site", ["1.resid_pre", "1.mlp_out", "2.resid_post"])
def test_a_merged_addition_is_a_bias(name, site, tmp_path):
    model = tiny_model(name, dtype=torch.float32)
    act = Add(direction_for(model, Site.parse(site)), -1.5)
    made = export(model, Steering((act,)), tmp_path / "out", "merged")
    again = AutoModelForCausalLM.from_pretrained(made.folder).eval()
    with torch.no_grad():
        near(again(ids_of(model)).logits, hooked(model, act), plain(model))


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("qwen2", "1.resid_pre"),
        ("mixtral", "1.resid_pre"),
        ("llama", "0.resid_pre"),
        ("llama", "1.attn_out"),
        ("llama-untied", "1.mlp_in"),
        ("gemma2", "1.resid_pre"),
    ],
)
def test_an_addition_without_a_bias_in_front_is_refused(name, site, tmp_path):
    model = tiny_model(name, dtype=torch.float32)
    act = Add(direction_for(model, Site.parse(site)))
    with pytest.raises(FamilyError):
        export(model, Steering((act,)), tmp_path / "out", "merged")


def under_llama_cpp(model, path, *, late=0):
    """Logits under llama.cpp's rule: `direction.N` is added to the output of block N, N >= 1.

    `late` moves all directions by so many blocks, to break it.
    """
    vectors = {
        int(str(one.name).removeprefix("direction.")): torch.tensor(one.data.copy())
        for one in GGUFReader(path).tensors
    }
    assert 0 not in vectors
    hooks = []
    for number, block in enumerate(model.blocks):
        vector = vectors.get(number - late)
        if number >= 1 and vector is not None:

            def add(_module, _args, output, vector=vector):
                if isinstance(output, tuple):
                    return (output[0] + vector, *output[1:])
                return output + vector

            hooks.append(block.register_forward_hook(add))
    found = plain(model)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gemma2", "mixtral"])
@pytest.mark.parametrize("site", ["2.resid_pre", "1.resid_post", "1.mlp_out"])
def test_gguf_adds_where_llama_cpp_does(name, site, tmp_path):
    model = tiny_model(name, dtype=torch.float32)
    act = Add(direction_for(model, Site.parse(site)), 2.0)
    made = export(model, Steering((act,)), tmp_path / "out", "gguf")
    path = made.folder / "control-vector.gguf"
    wanted = hooked(model, act)
    near(under_llama_cpp(model, path), wanted, plain(model))
    assert (under_llama_cpp(model, path, late=1) - wanted).abs().max() > 1e-2
    reader = GGUFReader(path)
    assert [str(one.name) for one in reader.tensors] == ["direction.1"]
    assert reader.get_field("general.architecture").contents() == "controlvector"
    hint = reader.get_field("controlvector.model_hint").contents()
    assert hint == model.hf.config.model_type
    count = reader.get_field("controlvector.layer_count")
    assert (count.contents(), count.types) == (1, [GGUFValueType.INT32])


@pytest.mark.parametrize(
    ("kind", "site", "fits"),
    [
        ("gguf", "0.resid_pre", False),
        ("gguf", "1.resid_pre", False),  # Would be direction.0.
        ("gguf", "0.resid_post", False),
        ("vllm-lens", "0.resid_pre", False),
        ("vllm-lens", "1.resid_pre", True),
        ("steering-vectors", "0.resid_post", True),
        ("steering-vectors", "1.attn_out", False),
        ("gguf", "2.mlp_in", False),
    ],
)
def test_each_format_knows_its_first_block(kind, site, fits, tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    steering = Steering((Add(direction_for(model, Site.parse(site))),))
    if fits:
        assert export(model, steering, tmp_path / "out", kind).about["layers"] == [0]
        return
    with pytest.raises(FamilyError):
        export(model, steering, tmp_path / "out", kind)


def adding(model, layers):
    """Logits where a vector is added to the output of each of some blocks."""
    hooks = [
        model.blocks[layer].register_forward_hook(
            lambda _m, _a, out, vector=vector: (
                (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector
            )
        )
        for layer, vector in layers.items()
    ]
    found = plain(model)
    for hook in hooks:
        hook.remove()
    return found


def vllm_layers(folder):
    """What vllm-lens adds, by its own class where it is there, else as its format says."""
    text = (folder / "steering.json").read_text()
    payload = json.loads(text)
    packed = payload["activations"]
    raw = np.frombuffer(base64.b64decode(packed["data"]), np.dtype(packed["dtype"]))
    rows = torch.from_numpy(raw.reshape(packed["shape"]).copy())
    assert payload["norm_match"] is False
    assert payload["position_indices"] is None
    return {
        layer: row * payload["scale"]
        for layer, row in zip(payload["layer_indices"], rows, strict=True)
    }


def steering_layers(folder):
    fields = torch.load(folder / "steering-vector.pt", weights_only=True)
    assert set(fields) == {"layer_activations", "layer_type"}  # `SteeringVector(**fields)`
    assert fields["layer_type"] == "decoder_block"
    return fields["layer_activations"]


@pytest.mark.parametrize(
    ("kind", "layers_of"), [("vllm-lens", vllm_layers), ("steering-vectors", steering_layers)]
)
@pytest.mark.parametrize("several", [False, True])
def test_engines_that_add_at_outputs_of_blocks(kind, layers_of, several, tmp_path):
    model = tiny_model("qwen3", dtype=torch.float32)
    acts = [Add(direction_for(model, Site(1, "resid_pre")), -2.0)]
    if several:
        acts += [
            Add(direction_for(model, Site(2, "resid_pre"), seed=5), 0.5),
            Add(direction_for(model, Site(1, "mlp_out"), seed=6)),
        ]
    made = export(model, Steering(tuple(acts)), tmp_path / "out", kind)
    near(adding(model, layers_of(made.folder)), hooked(model, *acts), plain(model))


def test_vllm_lens_reads_its_payload_by_its_own_class(tmp_path):
    lens = pytest.importorskip("vllm_lens")
    model = tiny_model("llama", dtype=torch.float32)
    act = Add(direction_for(model), 1.5)
    made = export(model, Steering((act,)), tmp_path / "out", "vllm-lens")
    vector = lens.SteeringVector.model_validate_json((made.folder / "steering.json").read_text())
    assert (vector.layer_indices, vector.scale, vector.norm_match) == ([1], 1.5, False)
    assert vector.position_indices is None
    wanted = act.direction.unit * act.direction.norm
    torch.testing.assert_close(vector.activations, wanted.unsqueeze(0))


def test_steering_vectors_applies_its_file_by_its_own_class(tmp_path):
    library = pytest.importorskip("steering_vectors")
    model = tiny_model("llama", dtype=torch.float32)
    act = Add(direction_for(model), 1.5)
    made = export(model, Steering((act,)), tmp_path / "out", "steering-vectors")
    fields = torch.load(made.folder / "steering-vector.pt", weights_only=True)
    with library.SteeringVector(**fields).apply(model.hf):
        found = plain(model)
    near(found, hooked(model, act), plain(model))


def test_repeng_reads_the_control_vector(tmp_path):
    repeng = pytest.importorskip("repeng")
    model = tiny_model("llama", dtype=torch.float32)
    act = Add(direction_for(model), 1.5)
    made = export(model, Steering((act,)), tmp_path / "out", "gguf")
    vector = repeng.ControlVector.import_gguf(made.folder / "control-vector.gguf")
    assert vector.model_type == "llama"
    found = {layer: torch.tensor(value) for layer, value in vector.directions.items()}
    near(adding(model, found), hooked(model, act), plain(model))


# What is lost ------------------------------------------------------------------------------------


def anchor_for(model):
    places = torch.ones(8)
    axis = direction_for(model).unit.double()
    floor = Floor(Site(2, "resid_post"), axis, axis, 0 * places, 2 * places, -1 * places)
    return Anchor(None, (floor,), strength=1.5)


def lossy_cases(model):
    direction = direction_for(model)
    clamp = ProjectToMean(direction, 0.5, Site(1, "resid_post"))
    oblique = ObliqueErase(direction, direction.unit, 0.1, Site(2, "resid_pre"))
    add = Add(direction)
    return {
        "ablation": (Steering((Ablate(direction),)), {"addition-only"}),
        "clamp": (Steering((clamp,)), {"addition-only"}),
        "oblique": (Steering((oblique,)), {"addition-only"}),
        "position": (Steering((add,), where=(Span.RESPONSE,)), {"every-token"}),
        "gate": (Steering((add,), gated=True), {"ungated"}),
        "anchor": (
            Steering((anchor_for(model),)),
            {"addition-only", "every-token", "ungated"},
        ),
        "gated ablation": (
            Steering((Ablate(direction),), gated=True),
            {"addition-only", "ungated"},
        ),
    }


CASES = list(lossy_cases(tiny_model("llama")))


@pytest.mark.parametrize("kind", ADDING)
@pytest.mark.parametrize("case", CASES)
def test_what_would_be_lost_is_refused_unless_each_loss_is_named(kind, case, tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    steering, losses = lossy_cases(model)[case]
    for left_out in losses:
        with pytest.raises(ConfigError, match="lost would be") as raised:
            export(model, steering, tmp_path / "out", kind, lossy=losses - {left_out})
        assert f"--lossy {left_out}" in raised.value.hint
        assert not (tmp_path / "out").exists()
    made = export(model, steering, tmp_path / "out", kind, lossy=losses)
    assert set(made.about["losses"]) == losses
    text = (made.folder / "README.md").read_text()
    assert all(f"- `{loss}`: " in text for loss in losses)
    assert all(isinstance(act, Add) for act in read_export(made.folder, model).steering.acts)


def test_nothing_is_lost_where_nothing_needs_to_be(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    made = export(
        model, Steering((Add(direction_for(model)),)), tmp_path / "o", "gguf", lossy=["ungated"]
    )
    assert made.about["losses"] == {}


def test_an_anchor_as_addition_lifts_by_its_mean_floor(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    every = ["addition-only", "every-token", "ungated"]
    made = export(model, Steering((anchor_for(model),)), tmp_path / "o", "gguf", lossy=every)
    (act,) = read_export(made.folder).steering.acts
    assert act.direction.site == Site(2, "resid_post")
    assert act.strength * act.direction.norm == pytest.approx(3.0)  # 1.5 times from 0 to 2.


@pytest.mark.parametrize("kind", ["peft", "refusal-direction"])
def test_a_format_that_only_ablates_refuses_the_rest(kind, tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    for case in ("clamp", "position", "anchor"):
        steering, losses = lossy_cases(model)[case]
        with pytest.raises(ConfigError, match="lost would be"):
            export(model, steering, tmp_path / "out", kind, lossy=losses)


def test_a_loss_that_does_not_exist_is_an_error(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    with pytest.raises(ConfigError, match="no loss"):
        export(model, Steering((Add(direction_for(model)),)), tmp_path / "o", "gguf", lossy=["all"])


# Round trips -------------------------------------------------------------------------------------


def steerings(model, kind):
    """All that a format carries without loss."""
    direction = direction_for(model, Site(2, "resid_pre"))
    exporter = exporters.make(kind)
    found = [
        Steering((act,))
        for act in (
            Ablate(direction),
            Add(direction, 1.0),
            Add(direction, -0.7),
            ProjectToMean(direction, 0.4, Site(1, "resid_post"), 0.9),
        )
        if type(act) in exporter.carries
    ]
    if exporter.spans:
        found.append(Steering((Add(direction),), where=(Span.RESPONSE, Span.INSTRUCTION)))
    return found


@pytest.mark.parametrize("kind", list(exporters))
def test_every_format_comes_back_as_it_was(kind, tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    for number, steering in enumerate(steerings(model, kind)):
        made = export(model, steering, tmp_path / str(number), kind)
        found = read_export(made.folder, model)
        assert found.kind == kind
        assert found.steering.where == steering.where
        (act,), (wanted,) = found.steering.acts, steering.acts
        assert type(act) is type(wanted)
        cosine = act.direction.cosine(wanted.direction)
        assert cosine == pytest.approx(1.0, abs=1e-6)
        assert act.direction.norm == pytest.approx(wanted.direction.norm)
        assert act.direction.site == wanted.direction.site
        assert act.direction.position == wanted.direction.position
        assert getattr(act, "strength", None) == getattr(wanted, "strength", None)
        with torch.no_grad():
            torch.testing.assert_close(hooked(model, act), hooked(model, wanted))


@pytest.mark.parametrize("kind", list(exporters))
def test_no_format_loads_for_another_model(kind, tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    made = export(model, steerings(model, kind)[0], tmp_path / "out", kind)
    read_export(made.folder, model)
    with pytest.raises(StoreError, match="was made on"):
        read_export(made.folder, tiny_model("llama", dtype=torch.float32, seed=1))
    with pytest.raises(StoreError, match="another template"):
        read_export(made.folder, tiny_model("llama", dtype=torch.float32, template="gemma"))


def test_a_gguf_file_alone_still_knows_its_model(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    made = export(model, Steering((Add(direction_for(model), 2.0),)), tmp_path / "out", "gguf")
    alone = (made.folder / "control-vector.gguf").rename(tmp_path / "alone.gguf")
    (act,) = read_export(alone, model).steering.acts
    assert (act.strength, act.direction.site) == (2.0, Site(2, "resid_pre"))
    with pytest.raises(StoreError, match="was made on"):
        read_export(alone, tiny_model("llama", dtype=torch.float32, seed=1))


def test_the_merged_checkpoint_itself_is_known_too(tmp_path):
    from demur.models import Model

    model = tiny_model("llama", dtype=torch.float32)
    made = export(model, Steering((Ablate(direction_for(model)),)), tmp_path / "out", "merged")
    hf = AutoModelForCausalLM.from_pretrained(made.folder)
    read_export(made.folder, Model(hf, model.family, model.template, name="again"))


def test_files_of_others_are_additions_at_outputs_of_blocks(tmp_path):
    vectors = {1: torch.randn(32), 3: torch.randn(32)}
    torch.save({"layer_activations": vectors, "layer_type": "decoder_block"}, tmp_path / "v.pt")
    found = read_export(tmp_path / "v.pt")
    assert [act.direction.site for act in found.steering.acts] == [
        Site(1, "resid_post"),
        Site(3, "resid_post"),
    ]
    for act, vector in zip(found.steering.acts, vectors.values(), strict=True):
        torch.testing.assert_close(act.direction.unit * act.direction.norm, vector)
    with pytest.raises(StoreError, match="another model"):  # Its third block is too deep.
        read_export(tmp_path / "v.pt", tiny_model("llama"))


# Damage ------------------------------------------------------------------------------------------


def test_a_trained_on_lora_is_no_ablation_any_more(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    made = export(model, Steering((Ablate(direction_for(model)),)), tmp_path / "out", "peft")
    path = made.folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(name for name in tensors if "o_proj.lora_B" in name)
    save_file({**tensors, key: tensors[key] + 0.05}, path, metadata={"format": "pt"})
    with pytest.raises(StoreError, match="not one unit vector"):
        read_export(made.folder)


@pytest.mark.parametrize("act", [Ablate, Add])
def test_a_merged_checkpoint_without_the_edit_is_refused(act, tmp_path):
    model = tiny_model("gpt2", dtype=torch.float32)
    made = export(model, Steering((act(direction_for(model)),)), tmp_path / "out", "merged")
    read_export(made.folder, model)
    model.hf.save_pretrained(made.folder)  # The plain weights again, under the same record.
    with pytest.raises(StoreError, match=r"does not have the edit|none of the edited"):
        read_export(made.folder)


def test_files_of_two_exports_do_not_mix(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    for kind, strength in (("a", 1.0), ("b", 2.0)):
        export(model, Steering((Add(direction_for(model), strength),)), tmp_path / kind, "gguf")
    name = "control-vector.gguf"
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(StoreError, match="different exports"):
        read_export(tmp_path / "a")


@pytest.mark.parametrize("kind", list(exporters))
def test_a_damaged_export_is_an_error_in_two_lines(kind, tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    made = export(model, steerings(model, kind)[0], tmp_path / "out", kind)
    for name in made.files:
        if name in ("README.md", "card.md") or name.startswith(("tokenizer", "chat", "generation")):
            continue
        if name in ("config.json", "adapter_config.json", "direction_metadata.json"):
            continue  # What only the consumer needs, or what the record says as well.
        path = made.folder / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DemurError):
            read_export(made.folder)
        path.write_bytes(whole)
    read_export(made.folder)


def test_an_export_is_there_whole_or_not_at_all(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    steering = Steering((Add(direction_for(model)),))
    export(model, steering, tmp_path / "out", "gguf")
    with pytest.raises(ConfigError, match="exists already"):
        export(model, steering, tmp_path / "out", "gguf")
    with pytest.raises(ConfigError, match="strength 0"):
        export(model, Steering((Add(direction_for(model), 0.0),)), tmp_path / "no", "gguf")
    wide = Steering((Add(replace(direction_for(model), unit=torch.ones(8))),))
    with pytest.raises(ConfigError, match="8 wide"):
        export(model, wide, tmp_path / "no", "gguf")
    assert [one.name for one in tmp_path.iterdir()] == ["out"]

import json
import logging
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_hf, tiny_tokenizer
from transformers import BloomConfig, GenerationConfig

from demur.errors import ConfigError, FamilyError, MissingExtraError, ModelLoadError, TemplateError
from demur.models import check, load, packaged_adapter

PROMPTS = ["a tree", "Where is the station?"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder as `save_pretrained` writes it: a tied llama, float32, with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_hf("llama", dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer("chatml").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


# peft asks transformers for a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def _adapter(folder, target="o_proj", name="llama"):
    options = LoraConfig(r=2, target_modules=[target], fan_in_fan_out=name == "gpt2")
    wrapped = get_peft_model(tiny_hf(name, dtype=torch.float32), options)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, parameter in wrapped.named_parameters():
            if "lora_" in path:
                parameter.copy_(torch.randn(parameter.shape, generator=rng))
    wrapped.save_pretrained(folder)
    return folder


# What loads --------------------------------------------------------------------------------------


def test_a_folder_loads_as_it_was_saved(folder):
    model = load(str(folder), device="cpu")
    assert (model.family.name, model.n_layers, model.d_model) == ("llama", 3, 32)
    assert (model.dtype, model.adapter, model.name) == (torch.float32, None, str(folder))
    assert model.tied
    batch = model.encode(PROMPTS)
    with torch.no_grad():
        theirs = tiny_hf("llama", dtype=torch.float32)(input_ids=batch.ids[:1, :5]).logits[:, -1]
    torch.testing.assert_close(model.logits(batch.ids[:1, :5]), theirs, rtol=1e-5, atol=1e-5)
    assert check(model).passed


def test_options_reach_the_model_and_its_template(folder):
    model = load(str(folder), dtype="bfloat16", device="cpu", system="Be brief.")
    assert model.dtype == torch.bfloat16
    assert "Be brief." in model.template.before
    assert model.template.max_length == 512
    with pytest.raises(TemplateError, match="no switch for thinking"):
        load(str(folder), device="cpu", thinking=False)


def test_a_half_precision_checkpoint_is_widened_on_a_cpu(tmp_path):
    tiny_hf("gpt2", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    tiny_tokenizer("plain").save_pretrained(tmp_path / "half")
    model = load(str(tmp_path / "half"), device="cpu")
    assert model.dtype == torch.float32
    assert model.template.kind == "plain"


def test_decoding_settings_of_a_checkpoint_are_dropped_and_its_stops_kept(folder):
    before = load(str(folder), device="cpu").generate(PROMPTS, max_new_tokens=8)
    GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=50.0, eos_token_id=[300, 301]
    ).save_pretrained(folder)
    model = load(str(folder), device="cpu")
    assert {300, 301} <= set(model.stop_ids)
    assert [r.ids for r in model.generate(PROMPTS, max_new_tokens=8)] == [r.ids for r in before]


def test_a_relative_path_loads_too(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert load("model", device="cpu").fingerprint == load("./model", device="cpu").fingerprint


# What does not -----------------------------------------------------------------------------------


def _fails(match, error=ModelLoadError, **options):
    name = str(options.pop("name"))
    with pytest.raises(error, match=match) as caught:
        load(name, device=options.pop("device", "cpu"), **options)
    assert "\n" not in caught.value.fact
    assert caught.value.hint
    return caught.value


def test_an_unknown_dtype_or_device_is_refused_before_anything_is_read():
    _fails("unknown dtype `float31`", ConfigError, name="nowhere/model", dtype="float31")
    for device in ("tpu", "cudax", "cuda:77", "meta"):
        _fails(f"no device `{device}`", ConfigError, name="nowhere/model", device=device)


def test_a_hub_id_that_is_not_here_is_one_clear_line():
    error = _fails("`nowhere/model` has no readable config", name="nowhere/model")
    assert "hub id" in error.hint


def test_paths_that_are_not_there(tmp_path):
    _fails("no folder or file", name=tmp_path / "nothing")
    _fails("no folder or file", name="./nothing")
    _fails("no file", name="nothing.gguf")


def test_a_folder_without_a_config(tmp_path):
    _fails(r"has no config\.json", name=tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "unheard-of"}', "{}"])
def test_a_config_that_cannot_be_read(folder, text):
    (folder / "config.json").write_text(text)
    _fails("no readable config", name=folder)


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "pickled" not in str(_fails(r"holds no \*\.safetensors weights", name=folder))


def test_pickled_weights_are_not_opened(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert "save_pretrained" in _fails("only pickled ones", name=folder).hint


def test_weights_that_are_cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    _fails("weights of .* cannot be loaded", name=folder)


def test_weights_that_are_missing_are_not_drawn_anew(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    _fails(r"lacks 1 of .* model\.layers\.1\.mlp\.up_proj\.weight", name=folder)


def test_weights_of_another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    _fails("cannot be loaded", name=folder)


def test_an_unknown_architecture_is_refused_before_the_weights(tmp_path):
    BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=16).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    _fails("`bloom` has no family", FamilyError, name=tmp_path)


def test_a_folder_without_a_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    _fails("tokenizer of .* cannot be loaded", name=folder)


def test_a_tokenizer_of_a_larger_model(folder):
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.add_special_tokens({"extra_special_tokens": [f"<|{i}|>" for i in range(40)]})
    tokenizer.chat_template = "<|39|>{{ messages[0].content }}<|im_end|>"
    tokenizer.save_pretrained(folder)
    _fails("knows only 384", name=folder)


# Adapters ----------------------------------------------------------------------------------------


def test_an_adapter_is_merged_as_peft_would_run_it(folder, tmp_path):
    adapter = _adapter(tmp_path / "adapter")
    model = load(str(folder), adapter=str(adapter), device="cpu")
    assert model.adapter == str(adapter)
    ids = model.encode(PROMPTS[:1]).ids
    theirs = PeftModel.from_pretrained(tiny_hf("llama", dtype=torch.float32), adapter).eval()
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits[:, -1]
    torch.testing.assert_close(model.logits(ids), expected, rtol=1e-4, atol=1e-4)
    base = load(str(folder), device="cpu")
    assert (base.logits(ids) - expected).abs().max() > 0.1
    assert base.fingerprint != model.fingerprint
    assert not any("lora" in name for name, _ in model.hf.named_modules())


def test_adapters_that_do_not_fit(folder, tmp_path):
    _fails("adapter .* cannot be loaded", name=folder, adapter="nowhere/adapter")
    _fails("adapter .* cannot be loaded", name=folder, adapter=str(tmp_path / "nothing"))
    wrong = _adapter(tmp_path / "gpt2", target="c_proj", name="gpt2")
    _fails("cannot be loaded onto this model", name=folder, adapter=str(wrong))
    (tmp_path / "empty").mkdir()
    _fails(r"no adapter_model\.safetensors", name=folder, adapter=str(tmp_path / "empty"))


def test_an_adapter_that_lacks_weights_is_not_merged_in_part(folder, tmp_path):
    adapter = _adapter(tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({k: v for k, v in weights.items() if "layers.1" not in k}, path)
    _fails("missing adapter keys", name=folder, adapter=str(adapter))


def test_only_the_embedded_model_gets_an_adapter_by_itself(folder, tmp_path):
    # A folder beside the model that is called as a packaged adapter would be.
    _adapter(tmp_path / "model-refusal")
    assert load(str(folder), device="cpu").adapter is None
    assert packaged_adapter("nowhere/model") is None


# Converted and embedded models -------------------------------------------------------------------


def test_a_gguf_file_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF but not really")
    _fails("cannot be read as a model", name=tmp_path / "model.gguf")
    left = [path for path in (tmp_path / "cache").rglob("*") if path.name != "models"]
    assert left == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path / "file"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "DEMUR_CACHE" in _fails("cannot be written", name=tmp_path / "model.gguf").hint


def test_the_embedded_model_says_how_to_get_it(monkeypatch):
    import importlib.metadata as metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    _fails("`smollm2` is not installed", MissingExtraError, name="smollm2")


def test_loading_is_quiet(folder, caplog, capfd):
    with caplog.at_level(logging.INFO):
        load(str(folder), device="cpu")
    assert not [record for record in caplog.records if record.name.startswith("demur")]
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_embedded_model_is_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path))
    first = load(adapter=None, device="cpu")
    made = sorted(tmp_path.rglob("*.safetensors"))
    stamp = [path.stat().st_mtime_ns for path in made]
    second = load(adapter=None, device="cpu")
    assert first.fingerprint == second.fingerprint
    assert stamp == [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.safetensors"))]
    assert [p.text for p in first.template.positions[1:]] == [
        "<|im_end|>",
        "\n",
        "<|im_start|>",
        "ass",
        "istant",
        "\n",
    ]

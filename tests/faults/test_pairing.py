"""What was made on one model is refused on another, and where it is taken all the same it says so.

Each model below differs from the first in one thing alone; each artefact is tried on each.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.exports.test_exports import direction_for
from tests.faults.test_tampered import a_bank
from tests.test_anchor import PROMPTS, anchor_of, floor_of, guard_of
from tests.tiny import TEMPLATES, TINY_CONFIGS, tiny_hf, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import demur
from demur.anchor import load_anchor, save_anchor
from demur.cli import app
from demur.directions import load_direction, save_direction
from demur.em.organism import read_organism
from demur.errors import ConfigError, DemurError, ModelLoadError, StoreError
from demur.evals.rows import read_evaluation
from demur.exports import Steering, export, read_export
from demur.exports.base import of_model
from demur.features.formats import fits, load_bank
from demur.guard import load_guard, save_guard
from demur.interventions import Ablate
from demur.models import Model, Template
from demur.models.fingerprint import (
    checksum,
    difference,
    old_fingerprint,
    same_checkpoint,
    scalars,
)
from demur.models.load import with_adapter
from demur.sites import Site

# peft asks transformers for a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def changed(model, edit):
    """The same model with something done to its weights, config or tokenizer."""
    with torch.no_grad():
        edit(model)
    return model


def llama(**how):
    return tiny_model("llama", how.pop("dtype", torch.float32), **how)


def one_weight(model):
    model.blocks[1].mlp.down_proj.weight[3, 5] += 1e-3


def one_gain(model):
    model.blocks[2].input_layernorm.weight[7] *= 1.01


def with_source(source):
    model = llama()
    template = Template(tiny_tokenizer("chatml", source=source), max_length=512)
    return Model(model.hf, model.family, template, name=model.name)


def with_token():
    model = llama()
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.add_tokens(["station"])
    return Model(model.hf, model.family, Template(tokenizer, max_length=512), name=model.name)


def merged():
    """One low-rank change in the weights, as an adapter leaves it."""
    model = llama()
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    hf = get_peft_model(model.hf, config).merge_and_unload()
    return Model(hf, model.family, model.template, name=model.name, adapter="other")


def quantised(levels):
    """Every matrix rounded to so many levels a row, as a GGUF file leaves them."""
    model = llama()
    with torch.no_grad():
        for parameter in model.hf.parameters():
            if parameter.ndim == 2:
                step = parameter.abs().amax(1, keepdim=True) / levels
                parameter.copy_((parameter / step).round() * step)
    return model


CHATML = TEMPLATES["chatml"].source
OTHERS = {
    "one changed weight": (lambda: changed(llama(), one_weight), "other weights"),
    "one changed norm gain": (lambda: changed(llama(), one_gain), "other weights"),
    "other weights": (lambda: llama(seed=1), "other weights"),
    "an adapter merged": (merged, "other weights"),
    "four bits": (lambda: quantised(7), "other weights"),
    "eight bits": (lambda: quantised(127), "other weights"),
    "bfloat16": (
        lambda: llama(dtype=torch.bfloat16),
        "another data type (float32, not bfloat16) of the same checkpoint",
    ),
    "another template": (
        lambda: with_source(CHATML.replace("small model", "big model")),
        "another chat template or system prompt",
    ),
    "a template that differs from the second turn on": (
        lambda: with_source(CHATML.replace("<|im_end|>\n{% endfor", "<|im_end|>{{ '' if loop.last "
                                           "else ' ' }}\n{% endfor")),
        "another chat template or system prompt",
    ),
    "a system prompt": (lambda: llama(system="Be brief."), "another chat template or system"),
    "one more token": (with_token, "another tokenizer"),
    "other stop tokens": (
        lambda: changed(llama(), lambda m: setattr(m.hf.generation_config, "eos_token_id", 9)),
        "another chat template",
    ),
    "another norm epsilon": (
        lambda: changed(llama(), lambda m: setattr(m.hf.config, "rms_norm_eps", 1e-2)),
        "other weights",
    ),
}  # fmt: skip
SHAPES = {
    "fewer layers": lambda: cut(num_hidden_layers=1),
    "another width": lambda: cut(hidden_size=16),
}


def cut(**fields):
    config = TINY_CONFIGS["llama"]
    config = type(config)(**{**config.to_dict(), **fields})
    hf = AutoModelForCausalLM.from_config(config).float()
    own = llama()
    return Model(hf, own.family, own.template, name="tiny-cut")


@pytest.fixture(scope="module")
def own():
    return llama()


@pytest.fixture(scope="module")
def made(own, tmp_path_factory):
    """A direction, a guard, an anchor and an export of one model, and what reads each."""
    folder = tmp_path_factory.mktemp("made")
    about = of_model(own)
    direction = direction_for(own)
    save_direction(direction, folder / "d.safetensors", about=about)
    guard = replace(guard_of(own), about=about)
    save_guard(guard, folder / "g.safetensors")
    anchor = anchor_of(own, 1.0)
    gate = replace(anchor.gate, detector=guard)
    save_anchor(replace(anchor, gate=gate, about=about), folder / "a.safetensors")
    export(own, Steering((Ablate(direction),)), folder / "e", "peft")
    return {
        "direction": lambda *m, **how: load_direction(folder / "d.safetensors", *m, **how),
        "guard": lambda *m, **how: load_guard(folder / "g.safetensors", *m, **how),
        "anchor": lambda *m, **how: load_anchor(folder / "a.safetensors", *m, **how),
        "export": lambda *m, **how: read_export(folder / "e", *m, **how),
    }


KINDS = ("direction", "guard", "anchor", "export")


def told_of(kind, found, model):
    """What a record would say of it."""
    if kind == "direction":
        return [found[1]["borrowed"]] if "borrowed" in found[1] else []
    return list(found.borrowed if kind == "export" else found.borrowed(model))


@pytest.fixture(scope="module")
def others():
    kept = {}
    return lambda name: kept.setdefault(name, OTHERS[name][0]())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OTHERS)
def test_what_another_model_made_is_refused_and_taken_on_demand(made, others, kind, name):
    model, what = others(name), OTHERS[name][1]
    with pytest.raises(StoreError) as caught:
        made[kind](model)
    assert what in caught.value.fact
    assert "--any-model" in caught.value.hint
    found = made[kind](model, any_model=True)
    (note,) = told_of(kind, found, model)
    assert what in note
    assert "as asked (--any-model)" in note


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_model_takes_it_and_nothing_is_said(made, own, kind):
    made[kind](own)
    assert told_of(kind, made[kind](own, any_model=True), own) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_a_model_of_another_shape_is_refused_whatever_was_asked(made, kind, name):
    with pytest.raises(DemurError):
        made[kind](SHAPES[name](), any_model=True)


def test_an_anchor_holds_no_template_of_another_length(made):
    model = llama(template="mistral")
    with pytest.raises(StoreError, match=r"end with 5 tokens of the template, .* end with 1"):
        made["anchor"](model, any_model=True)


def test_a_file_that_names_no_model_is_refused(own, tmp_path):
    path = tmp_path / "d.safetensors"
    save_direction(direction_for(own), path, about={})
    with pytest.raises(StoreError, match="does not say which weights"):
        load_direction(path, own)
    assert "borrowed" in load_direction(path, own, any_model=True)[1]


# The fingerprint ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_every_single_value_of_every_parameter_counts(name):
    model = tiny_model(name, torch.float32)
    rng = torch.Generator().manual_seed(0)
    seen = {model.fingerprint}
    with torch.no_grad():
        for parameter in model.hf.parameters():
            at = int(torch.randint(parameter.numel(), (1,), generator=rng))
            parameter.view(-1)[at] += 1e-2
            assert model.fingerprint not in seen
            seen.add(model.fingerprint)


def test_a_value_between_the_samples_counts_in_a_large_matrix():
    model = llama()
    model.blocks[0].mlp.extra = torch.nn.Linear(300, 300, bias=False)
    weight = model.blocks[0].mlp.extra.weight
    before, old = model.fingerprint, old_fingerprint(model)
    with torch.no_grad():
        weight.view(-1)[1] = 3.0  # Every 21st is read by the older one.
    assert old_fingerprint(model) == old
    assert model.fingerprint != before
    after = model.fingerprint
    weight.data[0, 2] = 5.0  # Written past torch's counter, and unseen by the samples: kept sums.
    assert Model(model.hf, model.family, model.template).fingerprint != after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [1, 3, 1000, 300_001])
def test_a_checksum_is_moved_by_any_value_and_by_order(dtype, size):
    values = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    first = checksum(values)
    assert checksum(values.clone()) == first
    assert checksum(values.reshape(1, -1)) == first
    for at in {0, size // 2, size - 1}:
        other = values.clone()
        other[at] = other[at] * 2 + 1
        assert checksum(other) != first
    if size > 1:
        assert checksum(values.flip(0)) != first


QUICK = ("gemma2", "gpt2", "qwen3-moe")


@pytest.mark.parametrize(
    "name",
    [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in TINY_CONFIGS],
)
def test_every_setting_that_moves_logits_moves_the_fingerprint(name):
    model = tiny_model(name, torch.float32)
    ids = torch.arange(5, 35)[None] * 7 % len(model.hf.get_input_embeddings().weight)
    plain, before = model.hf(ids).logits, model.fingerprint
    config, moved = model.hf.config, set()
    for key, value in config.get_text_config().to_dict().items():
        for other in _others(key, value):
            try:
                new = type(config)(**config.to_dict())
                setattr(new.get_text_config(), key, other)
                hf = AutoModelForCausalLM.from_config(new).float().eval()
                hf.load_state_dict(model.hf.state_dict())
                logits = hf(ids).logits
            except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError):
                continue  # Another shape, or no value of that setting.
            if not torch.allclose(logits, plain, atol=1e-6):
                moved.add(key)
                assert Model(hf, model.family, model.template).fingerprint != before, key
    assert len(moved) >= 3
    assert moved & set(scalars(config))


def _others(key, value):
    # Not of the forward pass: names, and which kernel computes it.
    if key in ("vocab_size", "model_type", "dtype", "architectures", "output_attentions"):
        return []
    if key == "rope_parameters" and isinstance(value, dict) and "rope_theta" in value:
        return [{**value, "rope_theta": 5.0}]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, float):
        return [value * 2 + 0.1]
    if isinstance(value, int):
        return [max(1, value // 2), value + 1]
    if isinstance(value, str):
        return ["relu"]
    return [4] if value is None and "window" in key else []


def test_tokenizers_that_cut_text_otherwise_have_other_hashes():
    plain = tiny_tokenizer("chatml")
    hashes = {Template(plain).tokenizer_hash}
    state = json.loads(plain.backend_tokenizer.to_str())
    for edit in ("merge", "swap", "lower"):
        tokenizer = tiny_tokenizer("chatml")
        new = json.loads(json.dumps(state))
        if edit == "merge":
            new["model"]["merges"].pop()
        elif edit == "swap":
            vocab = new["model"]["vocab"]
            vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        else:
            new["normalizer"] = {"type": "Lowercase"}
        tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(new))
        hashes.add(Template(tokenizer).tokenizer_hash)
    assert len(hashes) == 4
    # Called with a limit it keeps one, which is no other tokenizer.
    plain("a b c d", truncation=True, max_length=2)
    assert Template(plain).tokenizer_hash in hashes


def test_a_checkpoint_is_told_in_either_data_type_and_an_old_file_is_still_checked(own, tmp_path):
    half = llama(dtype=torch.bfloat16)
    assert same_checkpoint(own.fingerprint, half)
    assert same_checkpoint(llama(system="Be brief.").fingerprint, half)
    assert same_checkpoint(llama(seed=1).fingerprint, half) is False
    assert same_checkpoint(old_fingerprint(own), half) is None
    assert same_checkpoint("", half) is None
    path = tmp_path / "old.safetensors"
    save_direction(
        direction_for(own), path, about={**of_model(own), "fingerprint": old_fingerprint(own)}
    )
    load_direction(path, own)
    with pytest.raises(StoreError, match="another data type"):
        load_direction(path, half)
    with pytest.raises(StoreError, match="another chat template or system prompt"):
        load_direction(path, llama(system="Be brief."))
    assert difference({"fingerprint": old_fingerprint(own)}, llama(seed=1)).what == "other weights"


# Adapters -----------------------------------------------------------------------------------------


def adapter(folder, base, *, dtype=torch.float32, **card):
    """A LoRA with the card of one that demur trained."""
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    get_peft_model(tiny_hf("llama", dtype=dtype), config).save_pretrained(folder)
    told = {"base": {"name": base.name, "fingerprint": base.fingerprint, **card}}
    (folder / "card.json").write_text(json.dumps(told))
    return str(folder)


def test_an_adapter_of_other_weights_is_refused_and_merged_on_demand(own, tmp_path):
    path = adapter(tmp_path, own)
    for fine in (own, llama(dtype=torch.bfloat16), llama(system="Be brief.")):
        assert with_adapter(fine, path).fingerprint != fine.fingerprint
    other = llama(seed=1)
    with pytest.raises(ModelLoadError, match="other weights") as caught:
        with_adapter(other, path)
    assert "any:" in caught.value.hint
    forced = with_adapter(other, f"any:{path}")
    assert forced.adapter == f"any:{path}"  # Every record has it.
    assert of_model(forced)["adapter"] == f"any:{path}"


def test_an_adapter_is_not_merged_twice_nor_without_the_one_below(own, tmp_path):
    path = adapter(tmp_path, own)
    with pytest.raises(ModelLoadError, match="other weights"):
        with_adapter(with_adapter(own, path), path)
    below = with_adapter(own, path)
    (tmp_path / "upper").mkdir()
    upper = adapter(tmp_path / "upper", below)
    with pytest.raises(ModelLoadError, match="with its own adapter merged"):
        with_adapter(own, upper)
    stacked = adapter(tmp_path / "upper", below, holds_adapter=True)
    with_adapter(own, stacked)  # It holds the lower one.


@pytest.mark.parametrize("card", ["{", "[1]", '{"base": 3}', '{"base": {}, "base": {}}'])
def test_a_damaged_card_of_an_adapter_is_told(own, tmp_path, card):
    path = adapter(tmp_path, own)
    (tmp_path / "card.json").write_text(card)
    with pytest.raises(ModelLoadError, match=r"card\.json is damaged"):
        with_adapter(own, path)


def test_an_organism_knows_its_base_in_any_data_type(own, tmp_path):
    organism = read_organism(Path(adapter(tmp_path, own)))
    assert organism.fits(own)
    assert organism.fits(llama(dtype=torch.bfloat16))
    assert organism.fits(llama(seed=1)) is False


# The command line ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models of one shape as folders, and what was made on the first."""
    root = tmp_path_factory.mktemp("two")
    for name, seed in (("one", 0), ("two", 1)):
        model = llama(seed=seed)
        model.hf.save_pretrained(root / name)
        model.template.tokenizer.save_pretrained(root / name)
    first = demur.load(str(root / "one"))
    about = of_model(first)
    save_direction(direction_for(first, Site(1, "resid_pre")), root / "d.safetensors", about=about)
    guard = replace(guard_of(first), about={**about, "load": {"name": str(root / "one")}})
    save_guard(guard, root / "g.safetensors")
    anchor = anchor_of(first, 1e9)
    gate = replace(anchor.gate, detector=guard)
    floors = (floor_of(first, Site(1, "resid_post")),)
    anchor = replace(anchor, gate=gate, actuators=floors, about=guard.about)
    save_anchor(anchor, root / "a.safetensors")
    return root


def run(*words):
    return CliRunner().invoke(app, list(map(str, words)))


COMMANDS = {
    "generate --direction": ("generate", "{two}", "a", "--direction", "{d}", "--max-new-tokens", 4),
    "generate --anchor": ("generate", "{two}", "a", "--anchor", "{a}", "--max-new-tokens", 4),
    "guard score": ("guard", "score", "{g}", "a", "--model", "{two}"),
    "evaluate": ("evaluate", "{two}", "--direction", "{d}", "--anchor", "{a}", "--requests", 2,
                 "--max-new-tokens", 8, "--out", "{out}"),
    "export": ("export", "safetensors", "{d}", "--out", "{out}", "--model", "{two}"),
    "export of an anchor": ("export", "gguf", "{a}", "--out", "{out}", "--model", "{two}",
                            "--lossy", "addition-only", "--lossy", "every-token",
                            "--lossy", "ungated"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_refuse_and_with_any_model_say_so_in_the_result(folder, tmp_path, name):
    names = {"one": "one", "two": "two", "d": "d.safetensors", "g": "g.safetensors",
             "a": "a.safetensors"}  # fmt: skip
    places = {key: str(folder / value) for key, value in names.items()}
    words = [str(one).format(**places, out=tmp_path / "out") for one in COMMANDS[name]]
    plain = run(*words, "--json", "--quiet")
    assert plain.exit_code == 2, plain.output
    assert "other weights" in plain.stderr
    assert "--any-model" in plain.stderr
    assert not (tmp_path / "out").exists()
    done = run(*words, "--json", "--quiet", "--any-model")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    if name == "evaluate":
        notes = read_evaluation(tmp_path / "out" / "evaluation.json").notes
        assert sum("--any-model" in note for note in notes) == 2
        return
    found = told[0] if isinstance(told, list) else told
    assert any("other weights" in note for note in found["borrowed"])
    if name.startswith("export"):
        assert "made on another model" in (tmp_path / "out" / "README.md").read_text()


def test_every_command_that_takes_an_artefact_has_the_override():
    for words in (
        ("generate",), ("serve",), ("attack",), ("evaluate",), ("export",), ("import",),
        ("guard", "score"), ("guard", "evaluate"), ("anchor", "evaluate"), ("em", "audit"),
        ("compare",),
    ):  # fmt: skip
        assert "--any-model" in run(*words, "--help").stdout, words


def test_a_server_says_so_in_every_reply(own, tmp_path):
    testing = pytest.importorskip("fastapi.testclient")
    from demur.serve.app import create_app

    other = llama(seed=1)
    guard = replace(guard_of(own), about=of_model(own))
    asked = {
        "model": own.name,
        "messages": [{"role": "user", "content": PROMPTS[0]}],
        "max_tokens": 2,
    }
    for model, mark in ((own, ""), (other, "-borrowed")):
        with testing.TestClient(create_app(model, guard=guard), base_url="http://localhost") as web:
            assert len(web.get("/demur/info").json()["borrowed"]) == bool(mark)
            assert web.get("/health").json().get("borrowed", False) is bool(mark)
            reply = web.post("/v1/chat/completions", json=asked).json()
            assert reply["system_fingerprint"].endswith(mark or own.fingerprint[:12])


# Banks --------------------------------------------------------------------------------------------


def test_a_bank_of_other_weights_is_told_and_refused_where_nothing_checks_it(own, tmp_path):
    from demur.pipeline.hydra import HydraSettings, _banks

    a_bank(own, tmp_path)
    bank = load_bank(tmp_path)
    assert fits(bank, own) == ()
    other = llama(seed=1)
    (note,) = fits(bank, other)
    assert "was trained on other weights" in note
    settings = HydraSettings(units=("latents",), banks=str(tmp_path))
    assert _banks(own, settings)[1] == []
    with pytest.raises(ConfigError, match=r"trained on other weights than .*unexplained"):
        _banks(other, settings)

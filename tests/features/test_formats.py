import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_model

from demur.errors import ConfigError, MissingExtraError, StoreError
from demur.features import arrays
from demur.features.formats import (
    fits,
    load_bank,
    load_banks,
    open_bank,
    packaged_banks,
    site_of,
)
from demur.sites import Site

FIXTURES = Path(__file__).parent.parent / "fixtures" / "sae"
KINDS = sorted(one.name for one in FIXTURES.iterdir())
D, N, TOKENS = 12, 24, 9


def _expected(kind):
    return load_file(FIXTURES / kind / "expected.safetensors")


def _close(found, expected, tolerance=1e-5):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


# Parity with sae-lens ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_bank_encodes_and_decodes_as_sae_lens_does(kind):
    bank, told = load_bank(FIXTURES / kind), _expected(kind)
    found = bank.encode(told["x"])
    assert bool((told["f"] > 0).any())
    _close(found, told["f"])
    _close(bank.decode(found, told["x"]), told["y"])


@pytest.mark.parametrize("kind", KINDS)
def test_some_latents_are_read_as_if_all_were(kind):
    whole, told = load_bank(FIXTURES / kind), _expected(kind)
    for ids in ([3, 4, 5], [17, 0, 9]):
        part = load_bank(FIXTURES / kind, ids=ids)
        cut = whole.sliced(ids)
        assert part.ids.tolist() == ids
        assert part.width == N
        _close(part.encode(told["x"]), told["f"][:, ids])
        for name in ("encoder", "decoder", "bias", "offset"):
            torch.testing.assert_close(getattr(part, name), getattr(cut, name), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_comes_in_parts(kind):
    stored = open_bank(FIXTURES / kind)
    whole = stored.bank()
    parts = list(stored.parts(7))
    assert [len(one.ids) for one in parts] == [7, 7, 7, 3]
    torch.testing.assert_close(torch.cat([one.encoder for one in parts]), whole.encoder)
    torch.testing.assert_close(torch.cat([one.bias for one in parts]), whole.bias)
    if whole.threshold is not None:
        torch.testing.assert_close(torch.cat([one.threshold for one in parts]), whole.threshold)


@pytest.mark.parametrize("kind", ["topk-none-rescaled", "jumprelu-none", "gated-layer_norm"])
@pytest.mark.parametrize("size", [1, 100, 250])
def test_blocks_of_a_file_add_up_to_it(kind, size, monkeypatch):
    monkeypatch.setattr(arrays, "_BLOCK_BYTES", 10**9)
    whole = load_bank(FIXTURES / kind)
    monkeypatch.setattr(arrays, "_BLOCK_BYTES", size)
    for ids in (None, [3, 4, 5, 6], [20, 1, 7]):
        found = load_bank(FIXTURES / kind, ids=ids)
        cut = whole if ids is None else whole.sliced(ids)
        for name in ("encoder", "decoder", "bias"):
            torch.testing.assert_close(getattr(found, name), getattr(cut, name))


@pytest.mark.parametrize(
    "architecture", ["standard", "jumprelu", "gated", "topk", "jumprelu_transcoder"]
)
def test_random_draws_agree_with_the_installed_sae_lens(architecture, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    registry = pytest.importorskip("sae_lens.registry")
    kind, config = registry.get_sae_class(architecture)
    transcoder = "transcoder" in architecture
    how = "none" if transcoder else "layer_norm"
    own = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": N,
        "apply_b_dec_to_input": not transcoder,
        "normalize_activations": how,
        "metadata": {
            "hook_name": "blocks.1.hook_resid_post",
            "sae_lens_version": sae_lens.__version__,
        },
    }
    own |= {"d_out": D} if transcoder else {}
    own |= {"k": 6, "rescale_acts_by_decoder_norm": True} if architecture == "topk" else {}
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        sae = kind(config.from_dict(own))
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=rng).abs() - 0.3)
        sae.save_model(tmp_path / str(seed))
        bank = load_bank(tmp_path / str(seed))
        x = torch.randn(TOKENS, D, generator=rng)
        with torch.no_grad():
            f = sae.encode(x)
            y = sae.decode(f)
        _close(bank.encode(x), f)
        _close(bank.decode(bank.encode(x), x), y)


# SAELens folders -----------------------------------------------------------------------------


def _copied(kind, tmp_path, change=None, drop=()):
    for one in (FIXTURES / kind).iterdir():
        (tmp_path / one.name).write_bytes(one.read_bytes())
    config = json.loads((tmp_path / "cfg.json").read_text())
    for key in drop:
        config.pop(key)
    config |= change or {}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    return tmp_path


def _refused(path, error, *words, **how):
    with pytest.raises(error) as caught:
        load_bank(path, **how)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_transcoder_writes_elsewhere_and_keeps_its_skip_connection_out():
    bank = load_bank(FIXTURES / "skip_transcoder")
    assert (bank.site, bank.writes) == (Site(1, "resid_pre"), Site(1, "mlp_out"))
    assert bank.about["skip"]
    assert "skip connection" in bank.about["notes"][0]


@pytest.mark.parametrize(
    "key", ["architecture", "d_sae", "apply_b_dec_to_input", "normalize_activations"]
)
def test_what_numbers_hang_on_is_never_taken_for_granted(key, tmp_path):
    path = _copied("standard-none", tmp_path, drop=[key])
    _refused(path, StoreError, f"`{key}`")


def test_a_misspelt_setting_is_named(tmp_path):
    path = _copied(
        "standard-none",
        tmp_path,
        {"apply_b_dec_to_imput": False},
        drop=["apply_b_dec_to_input"],
    )
    _refused(path, StoreError, "`apply_b_dec_to_imput`", "slip of the pen")
    path = _copied(
        "topk-none-rescaled",
        tmp_path,
        {"rescale_act_by_decoder_norm": True},
        drop=["rescale_acts_by_decoder_norm"],
    )
    _refused(path, StoreError, "`rescale_act_by_decoder_norm`")


def test_what_a_bank_cannot_express_is_refused_with_a_reason(tmp_path):
    def of(kind, **change):
        return _copied(kind, tmp_path, change)

    _refused(of("standard-none", architecture="temporal"), ConfigError, "earlier tokens")
    _refused(of("standard-none", reshape_activations="hook_z"), ConfigError, "heads")
    _refused(
        of("standard-none", normalize_activations="covariance_whitening"), ConfigError, "whitening"
    )
    _refused(of("transcoder", normalize_activations="layer_norm"), ConfigError, "scaled back")
    _refused(of("transcoder", d_out=13), ConfigError, "writes 13")
    _refused(of("standard-none", d_sae=25), StoreError, "(12, 24)")
    told = {"hook_name": "blocks.3.ln2.hook_normalized"}
    _refused(of("standard-none", metadata=told), ConfigError, "the site `mlp_in`")
    told = {"hook_name": "blocks.3.hook_rot_q"}
    _refused(of("standard-none", metadata=told), ConfigError, "site=")
    _refused(of("standard-none", metadata={}), ConfigError, "site=")
    assert load_bank(tmp_path, site="2.resid_pre").site == Site(2, "resid_pre")


def test_a_constant_factor_is_folded_or_asked_for(tmp_path):
    path = _copied("standard-expected_average", tmp_path)
    told = _expected("standard-expected_average")
    (path / "activation_scaler.json").unlink()
    _refused(path, ConfigError, "norm_scaling_factor")
    _copied("standard-expected_average", tmp_path, {"norm_scaling_factor": 0.37})
    (path / "activation_scaler.json").unlink()
    _close(load_bank(path).encode(told["x"]), told["f"])


def test_an_older_configuration_is_read_as_it_was_meant(tmp_path):
    path = _copied("topk-none", tmp_path)
    old = {
        "sae_lens_version": "3.1.0",
        "d_in": D,
        "d_sae": N,
        "hook_point": "blocks.1.hook_resid_post",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 5},
    }
    (path / "cfg.json").write_text(json.dumps(old))
    told = _expected("topk-none")
    _close(load_bank(path).encode(told["x"]), told["f"])
    (path / "cfg.json").write_text(json.dumps(old | {"normalize_activation": "layer_norm"}))
    _refused(path, StoreError, "`normalize_activation`")


def test_our_own_metadata_is_kept(tmp_path):
    told = {
        "site": "15.resid_post",
        "largest_norm": 900.0,
        "model_fingerprint": "ab",
        "model_name": "smollm2",
    }
    bank = load_bank(_copied("standard-none", tmp_path, {"metadata": told}))
    assert bank.site == Site(15, "resid_post")
    assert bank.largest_norm == 900.0
    assert (bank.about["fingerprint"], bank.about["model"]) == ("ab", "smollm2")
    assert load_bank(tmp_path, largest_norm=5.0).largest_norm == 5.0
    json.dumps(dict(bank.about))


def test_a_release_needs_the_extra_and_comes_through_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    _refused("saelens:some-release/layer_1/width_24", MissingExtraError, "demur[sae]")
    asked = []

    class SAE:
        @staticmethod
        def from_pretrained_with_cfg_and_sparsity(release, own, **how):
            assert how == {"device": "cpu"}
            asked.append((release, own))
            config = json.loads((FIXTURES / "jumprelu-none" / "cfg.json").read_text())
            weights = load_file(FIXTURES / "jumprelu-none" / "sae_weights.safetensors")
            if own == "unknown":
                raise ValueError("ID unknown not found")
            sae = SimpleNamespace(
                cfg=SimpleNamespace(to_dict=lambda: config), state_dict=lambda: weights
            )
            return sae, config, None

    monkeypatch.setitem(sys.modules, "sae_lens", SimpleNamespace(SAE=SAE))
    bank = load_bank("saelens:some-release/layer_1/width_24", ids=[2, 3])
    told = _expected("jumprelu-none")
    _close(bank.encode(told["x"]), told["f"][:, [2, 3]])
    assert asked == [("some-release", "layer_1/width_24")]
    assert bank.about["sae_id"] == "layer_1/width_24"
    _refused("saelens:some-release/unknown", StoreError, "not found")
    _refused("saelens:some-release", ConfigError, "RELEASE/SAE_ID")


# Other formats -------------------------------------------------------------------------------


def _weights(rng):
    def draw(*shape):
        return torch.randn(*shape, generator=rng)

    return (
        draw(N, D),
        draw(N) * 0.3,
        draw(N, D),
        draw(D) * 0.4,
        draw(N).abs() * 0.5,
        draw(TOKENS, D),
    )


@pytest.mark.parametrize("how", ["stored", "compressed", "safetensors"])
def test_gemma_scope_takes_nothing_off_the_input(how, tmp_path, monkeypatch):
    encoder, bias, decoder, offset, threshold, x = _weights(torch.Generator().manual_seed(0))
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_24" / "average_l0_5"
    folder.mkdir(parents=True)
    if how == "safetensors":
        named = {
            "w_enc": encoder.T.contiguous(),
            "b_enc": bias,
            "w_dec": decoder,
            "b_dec": offset,
            "threshold": threshold,
        }
        save_file(named, folder / "params.safetensors")
        (folder / "config.json").write_text('{"hf_hook_point_in": "model.layers.20.output"}')
    else:
        save = np.savez if how == "stored" else np.savez_compressed
        save(
            folder / "params.npz",
            W_enc=encoder.T.numpy(),  # Fortran order, as a transposed view is saved.
            b_enc=bias.numpy(),
            W_dec=decoder.numpy(),
            b_dec=offset.numpy(),
            threshold=threshold.numpy(),
        )
    bank = load_bank(folder)
    assert bank.site == Site(20, "resid_post")
    raw = x @ encoder.T + bias
    f = raw.clamp_min(0) * (raw > threshold)
    _close(bank.encode(x), f)
    _close(bank.decode(f, x), f @ decoder + offset)
    monkeypatch.setattr(arrays, "_BLOCK_BYTES", 250)
    for ids in ([1, 2, 3], [20, 4]):
        _close(load_bank(folder, ids=ids).encode(x), f[:, ids])


def test_gemma_scope_asks_where_the_path_does_not_tell(tmp_path):
    named = {
        "W_enc": np.ones((D, N), np.float32),
        "W_dec": np.ones((N, D), np.float32),
        "b_enc": np.ones(N, np.float32),
        "b_dec": np.ones(D, np.float32),
        "threshold": np.ones(N, np.float32),
    }
    (tmp_path / "layer_3").mkdir()
    np.savez(tmp_path / "layer_3" / "params.npz", **named)
    _refused(tmp_path / "layer_3", ConfigError, "site=")
    assert load_bank(tmp_path / "layer_3", site=Site(3, "mlp_out")).site == Site(3, "mlp_out")
    heads = tmp_path / "gemma-scope-2b-pt-att" / "layer_3"
    heads.mkdir(parents=True)
    np.savez(heads / "params.npz", **named)
    _refused(heads, ConfigError, "heads")
    np.savez(tmp_path / "params.npz", **(named | {"b_enc": np.array([{}])}))
    _refused(tmp_path / "params.npz", StoreError, "Python objects", site="1.resid_pre")


def _sparsify(folder, rng, **change):
    encoder, bias, decoder, offset, _, x = _weights(rng)
    folder.mkdir()
    config = {"num_latents": 0, "expansion_factor": 2, "k": 4, "d_in": D} | change
    (folder / "cfg.json").write_text(json.dumps(config))
    named = {"encoder.weight": encoder, "encoder.bias": bias, "W_dec": decoder, "b_dec": offset}
    save_file(named, folder / "sae.safetensors")
    return encoder, bias, decoder, offset, x


def test_sparsify_takes_its_offset_off_and_names_its_module(tmp_path):
    rng = torch.Generator().manual_seed(1)
    encoder, bias, decoder, offset, x = _sparsify(tmp_path / "layers.5.mlp", rng)
    bank = load_bank(tmp_path / "layers.5.mlp")
    assert bank.site == Site(5, "mlp_out")
    assert bank.width == N  # 0 latents stand for expansion_factor x d_in.
    raw = ((x - offset) @ encoder.T + bias).clamp_min(0)
    top = raw.topk(4, dim=-1)
    f = torch.zeros_like(raw).scatter(-1, top.indices, top.values)
    _close(bank.encode(x), f)
    _close(bank.decode(f, x), f @ decoder + offset)
    part = load_bank(tmp_path / "layers.5.mlp", ids=[6, 3])
    _close(part.encode(x), f[:, [6, 3]])
    _sparsify(tmp_path / "layers.7", rng)
    assert load_bank(tmp_path / "layers.7").site == Site(7, "resid_post")


def test_sparsify_transcoders_read_what_the_mlp_reads(tmp_path):
    rng = torch.Generator().manual_seed(1)
    encoder, bias, _, _, x = _sparsify(tmp_path / "layers.5.mlp", rng, transcode=True)
    bank = load_bank(tmp_path / "layers.5.mlp")
    assert (bank.site, bank.writes) == (Site(5, "mlp_in"), Site(5, "mlp_out"))
    _sparsify(tmp_path / "layers.5", rng, transcode=True)
    _refused(tmp_path / "layers.5", ConfigError, "is a transcoder")
    bank = load_bank(tmp_path / "layers.5.mlp", site="5.resid_pre")
    assert bank.writes == Site(5, "mlp_out")
    _close(bank.before(x), x @ encoder.T + bias)  # No offset is taken off.


def test_other_activations_of_sparsify_are_refused(tmp_path):
    rng = torch.Generator().manual_seed(1)
    _sparsify(tmp_path / "layers.1", rng, activation="groupmax")
    _refused(tmp_path / "layers.1", ConfigError, "groupmax")
    _sparsify(tmp_path / "layers.2", rng, signed=True)
    _refused(tmp_path / "layers.2", ConfigError, "signed")
    _sparsify(tmp_path / "layers.3", rng, num_latents=30)
    _refused(tmp_path / "layers.3", StoreError, "(30, 12)")


def _dictionary(folder, kind, tensors, **trainer):
    folder.mkdir(exist_ok=True)
    told = {"dict_class": kind, "layer": 8, "submodule_name": "resid_post_layer_8"} | trainer
    (folder / "config.json").write_text(json.dumps({"trainer": told, "buffer": {}}))
    torch.save(tensors, folder / "ae.pt")
    return folder


def test_dictionary_learning_classes_follow_their_own_conventions(tmp_path):
    encoder, bias, decoder, offset, threshold, x = _weights(torch.Generator().manual_seed(2))
    linear = {
        "encoder.weight": encoder,
        "encoder.bias": bias,
        "decoder.weight": decoder.T.contiguous(),
    }
    raw_names = {
        "W_enc": encoder.T.contiguous(),
        "W_dec": decoder,
        "b_enc": bias,
        "b_dec": offset,
    }
    centred, plain = (x - offset) @ encoder.T + bias, x @ encoder.T + bias
    relu = centred.clamp_min(0)
    top = relu.topk(3, dim=-1)
    size, gate = threshold, bias.roll(1)
    gated = {
        "encoder.weight": encoder,
        "decoder.weight": decoder.T.contiguous(),
        "decoder_bias": offset,
        "r_mag": size,
        "gate_bias": gate,
        "mag_bias": bias,
    }
    bare = (x - offset) @ encoder.T
    one = torch.tensor(0.8)
    cases = {
        "AutoEncoder": (linear | {"bias": offset}, relu),
        "AutoEncoderNew": (linear | {"decoder.bias": offset}, plain.clamp_min(0)),
        "AutoEncoderTopK": (
            linear | {"b_dec": offset, "k": torch.tensor(3), "threshold": torch.tensor(9.0)},
            torch.zeros_like(relu).scatter(-1, top.indices, top.values),
        ),
        "BatchTopKSAE": (
            linear | {"b_dec": offset, "k": torch.tensor(3), "threshold": one},
            relu * (relu > one),
        ),
        "MatryoshkaBatchTopKSAE": (raw_names | {"threshold": one}, relu * (relu > one)),
        "JumpReluAutoEncoder": (
            raw_names | {"threshold": threshold},
            plain.clamp_min(0) * (plain > threshold),
        ),
        "GatedAutoEncoder": (
            gated,
            (bare + gate > 0) * (size.exp() * bare + bias).clamp_min(0),
        ),
    }
    for kind, (tensors, f) in cases.items():
        folder = _dictionary(tmp_path / kind, kind, tensors)
        bank = load_bank(folder)
        assert bank.site == Site(8, "resid_post")
        _close(bank.encode(x), f)
        _close(bank.decode(f, x), f @ decoder + offset)
        _close(load_bank(folder, ids=[5, 1]).encode(x), f[:, [5, 1]])
        _close(load_bank(folder, ids=[5, 1]).decoder, decoder[[5, 1]])
    tensors = linear | {"b_dec": offset, "threshold": torch.tensor(-1.0)}
    _refused(_dictionary(tmp_path / "unset", "BatchTopKSAE", tensors), ConfigError, "threshold")
    _refused(_dictionary(tmp_path / "other", "CrossCoder", linear), ConfigError, "CrossCoder")
    folder = _dictionary(tmp_path / "AutoEncoder", "AutoEncoder", linear, submodule_name=None)
    _refused(folder, StoreError, "`bias`")


class _Trap:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/demur-was-here"),))


def test_nothing_is_unpickled(tmp_path):
    folder = _dictionary(tmp_path / "trap", "AutoEncoder", {})
    (folder / "ae.pt").write_bytes(pickle.dumps({"encoder.weight": _Trap()}, protocol=2))
    _refused(folder, StoreError, "hint")
    torch.save({"encoder.weight": _Trap()}, folder / "ae.pt")
    _refused(folder, StoreError, "pickle")
    assert not Path("/tmp/demur-was-here").exists()


# Names, folders, models ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.20.hook_resid_post", "20.resid_post"),
        ("blocks.0.hook_resid_pre", "0.resid_pre"),
        ("blocks.3.hook_mlp_out", "3.mlp_out"),
        ("blocks.3.hook_attn_out", "3.attn_out"),
        ("model.layers.20", "20.resid_post"),
        ("model.layers.20.output", "20.resid_post"),
        ("model.layers.20.input", "20.resid_pre"),
        ("layers.5", "5.resid_post"),
        ("layers.5.mlp", "5.mlp_out"),
        ("transformer.h.7.attn", "7.attn_out"),
        ("model.layers.2.post_feedforward_layernorm.output", "2.mlp_out"),
        ("blocks.3.attn.hook_z", None),
        ("blocks.3.hook_resid_mid", None),
        ("blocks.3.hook_mlp_in", None),
        ("model.layers.3.self_attn.o_proj.input", None),
        ("model.layers.3.pre_feedforward_layernorm.output", "3.mlp_in"),
        ("hook_embed", None),
    ],
)
def test_hook_names_are_sites_or_nothing(hook, site):
    assert site_of(hook) == (None if site is None else Site.parse(site))


def test_folders_of_banks_are_read_in_order_of_sites(tmp_path):
    for layer in (10, 2):
        folder = tmp_path / f"{layer}.resid_post"
        folder.mkdir()
        told = {"hook_name": f"blocks.{layer}.hook_resid_post"}
        _copied("standard-none", folder, {"metadata": told})
    (tmp_path / "notes").mkdir()
    banks = load_banks(tmp_path)
    assert [one.site.layer for one in banks] == [2, 10]
    assert banks[0].name == f"{tmp_path.name}/2.resid_post"
    assert len(load_banks(tmp_path / "2.resid_post")) == 1
    _refused(tmp_path, StoreError, "holds 2 banks")
    _refused(tmp_path / "notes", StoreError, "no known kind")
    _refused("no-such-bank", StoreError, "no-such-bank")
    with pytest.raises(StoreError, match="holds no bank"):
        load_banks(tmp_path / "notes")
    with pytest.raises(ConfigError, match="no latent 24"):
        load_bank(tmp_path / "2.resid_post", ids=[24])


def test_packaged_banks_are_found_by_name():
    for name, path in packaged_banks().items():
        assert path.is_dir()
        assert all(one.about["fingerprint"] for one in load_banks(name))


def test_a_bank_is_held_against_its_model(tmp_path):
    model = tiny_model(dtype=torch.float32)

    def bank(site="1.resid_post", d=model.d_model, **told):
        rng = torch.Generator().manual_seed(0)
        folder = tmp_path / site / str(d)
        folder.mkdir(parents=True, exist_ok=True)
        named = {
            "W_enc": torch.randn(d, 8, generator=rng),
            "W_dec": torch.randn(8, d, generator=rng),
            "b_enc": torch.zeros(8),
            "b_dec": torch.zeros(d),
        }
        save_file(named, folder / "sae_weights.safetensors")
        config = {
            "architecture": "standard",
            "d_in": d,
            "d_sae": 8,
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "metadata": {"site": site} | told,
        }
        (folder / "cfg.json").write_text(json.dumps(config))
        return load_bank(folder)

    assert fits(bank(model_fingerprint=model.fingerprint), model, strict=True) == ()
    with pytest.raises(ConfigError, match="wide"):
        fits(bank(d=6), model)
    with pytest.raises(ConfigError, match="blocks 0 to"):
        fits(bank(site="9.resid_post"), model)
    (note,) = fits(bank(model_fingerprint="f" * 32), model)
    assert "other weights" in note
    with pytest.raises(ConfigError, match="other weights"):
        fits(bank(model_fingerprint="f" * 32), model, strict=True)
    model.name = "tiny-instruct"
    (note,) = fits(bank(model_name="tiny"), model)
    assert "base model" in note
    assert fits(bank(model_name="tiny-it"), model) == ()


def test_a_module_is_no_site_where_a_norm_stands_behind_it(tmp_path):
    model = tiny_model("gemma2", dtype=torch.float32)
    rng = torch.Generator().manual_seed(0)
    d = model.d_model
    for hook in ("layers.1.mlp", "layers.1"):
        folder = tmp_path / hook
        folder.mkdir()
        (folder / "cfg.json").write_text(json.dumps({"num_latents": 8, "k": 2, "d_in": d}))
        named = {
            "encoder.weight": torch.randn(8, d, generator=rng),
            "encoder.bias": torch.zeros(8),
            "W_dec": torch.randn(8, d, generator=rng),
            "b_dec": torch.zeros(d),
        }
        save_file(named, folder / "sae.safetensors")
    with pytest.raises(ConfigError, match="differ by a norm"):
        fits(load_bank(tmp_path / "layers.1.mlp"), model)
    assert fits(load_bank(tmp_path / "layers.1"), model) == ()
    assert fits(load_bank(tmp_path / "layers.1.mlp"), tiny_model(dtype=torch.float32)) == ()

"""Vectors of other tools come back as they were written, at the tensor that they are of."""

import json
import pickle
from collections import OrderedDict
from dataclasses import asdict

import pytest
import torch
from gguf import GGUFWriter
from pydantic import TypeAdapter
from safetensors.torch import save_file
from tests.tiny import tiny_model

from demur.compare.objects import formats, object_rows, read_vectors
from demur.compare.rows.objects import ObjectRow
from demur.directions import Direction, save_direction
from demur.em.advice import AdviceItem
from demur.em.directions import deltas, save_deltas
from demur.errors import DemurError, StoreError, UnknownNameError
from demur.exports import Steering, export
from demur.interventions import Ablate
from demur.sites import Site
from demur.store import Store

D = 32


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_direction(folder):
    vector = drawn(D)
    found = Direction.from_vector(
        vector, site=Site(2, "resid_pre"), position=-3, recipe="difference of means"
    )
    path = folder / "directions.safetensors"
    save_direction(found, path, about={"fingerprint": "f" * 32})
    return path, {(Site(2, "resid_pre"), -3): vector}


def write_run(folder):
    path, wanted = write_direction(folder)
    (folder / "results.json").write_text("{}")
    more = {(Site(layer, "resid_pre"), -1): drawn(D, seed=layer) for layer in (0, 1, 2)}
    every = {**more, **wanted}
    Store(folder / "stages").put(
        "extract",
        {},
        summary={
            "tensors": True,
            "readings": [
                {"site": str(site), "position": position, "norm": float(vector.norm())}
                for (site, position), vector in every.items()
            ],
        },
        tensors={"units": torch.stack([vector / vector.norm() for vector in every.values()])},
    )
    return path.parent, every


def write_export(folder):
    """A LoRA that ablates: the direction is read from its factors."""
    model = tiny_model("qwen2", dtype=torch.float32)
    vector = drawn(model.d_model, seed=9)
    direction = Direction.from_vector(
        vector, site=Site(2, "resid_pre"), position=-3, recipe="difference of means"
    )
    export(model, Steering((Ablate(direction),)), folder / "lora", "peft")
    return folder / "lora", {(Site(2, "resid_pre"), -3): vector}


def write_gguf(folder, vectors=None, arch="controlvector"):
    vectors = vectors or {1: drawn(D), 2: drawn(D, seed=1)}
    path = folder / "happy.gguf"
    writer = GGUFWriter(path, arch)
    writer.add_string(f"{arch}.model_hint", "llama")
    writer.add_uint32(f"{arch}.layer_count", len(vectors))
    for layer, vector in vectors.items():
        writer.add_tensor(f"direction.{layer}", vector.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, {(Site(layer, "resid_post"), None): v for layer, v in vectors.items()}


def write_steering(folder):
    vectors = {1: drawn(D), 3: drawn(1, D, seed=1)}
    path = folder / "honest.pt"
    torch.save({"layer_activations": vectors, "layer_type": "mlp"}, path)
    return path, {(Site(layer, "mlp_out"), None): v.flatten() for layer, v in vectors.items()}


def write_plain_layers(folder):
    vectors = OrderedDict((f"layers.{layer}", drawn(D, seed=layer)) for layer in (0, 2))
    path = folder / "honest.safetensors"
    save_file(vectors, path)
    return path, {(Site(layer, "resid_post"), None): vectors[f"layers.{layer}"] for layer in (0, 2)}


def write_arditi(folder):
    vector = drawn(D).double()
    torch.save(vector, folder / "direction.pt")
    (folder / "direction_metadata.json").write_text('{"pos": -2, "layer": 5}')
    return folder, {(Site(5, "resid_pre"), -2): vector}


def write_mean_diffs(folder):
    every = drawn(2, 3, D)
    every[1, 0] = 0  # The last token is the same in all prompts before block 0.
    torch.save(every, folder / "mean_diffs.pt")
    wanted = {
        (Site(layer, "resid_pre"), i - 2): every[i, layer] for i in range(2) for layer in range(3)
    }
    del wanted[Site(0, "resid_pre"), -1]
    return folder / "mean_diffs.pt", wanted


WRITERS = {
    "demur-direction": write_direction,
    "demur-run": write_run,
    "demur-export": write_export,
    "control-vector": write_gguf,
    "steering-vector": write_steering,
    "steering-vector ": write_plain_layers,
    "refusal-direction": write_arditi,
    "refusal-direction ": write_mean_diffs,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_vector_comes_back_at_its_site_and_position(kind, tmp_path):
    path, wanted = WRITERS[kind](tmp_path)
    found = read_vectors(path)
    assert found.kind == kind.strip()
    by_place = {(one.site, one.position): one for one in found}
    assert len(by_place) == len(found) == len(wanted)
    for place, vector in wanted.items():
        torch.testing.assert_close(
            by_place[place].vector(), vector.double(), rtol=1e-5, atol=1e-6, msg=str(place)
        )


def test_every_bare_format_is_tested_and_names_what_it_leaves_open(tmp_path):
    assert {*formats} == {kind.strip() for kind in WRITERS} | {"adapter", "demur-em-deltas"}
    for number, writer in enumerate(WRITERS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = read_vectors(writer(folder)[0])
        notes = " ".join(found.notes)
        assert "sign" in notes
        assert any(one.model for one in found) != ("weights" in notes)


def test_rows_survive_json(tmp_path):
    path, _ = write_gguf(tmp_path)
    for row in object_rows(read_vectors(path)):
        text = json.dumps(asdict(row), allow_nan=False)
        assert TypeAdapter(ObjectRow).validate_json(text) == row
        assert row.norm > 0
        assert row.n == 0


# Weights -----------------------------------------------------------------------------------------


def write_lora(folder, factors, **config):
    settings = {"peft_type": "LORA", "lora_alpha": 4, "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    tensors = {}
    for (layer, module), (a, b) in factors.items():
        stem = f"base_model.model.model.layers.{layer}.{module}"
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = a, b
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "x")
    (folder / "x").rename(folder / "adapter_model.safetensors")
    return folder


def test_the_write_of_a_rank_one_adapter_is_its_b_and_as_long_as_the_change(tmp_path):
    a, b = drawn(1, 48), drawn(D, 1, seed=1)
    found = read_vectors(
        write_lora(
            tmp_path,
            {(1, "mlp.down_proj"): (a, b), (1, "self_attn.q_proj"): (drawn(1, D), drawn(D, 1))},
        ),
        name="mine",
    )
    assert [*found.named] == ["B of mine 1.mlp.down_proj #0"]
    at_write, at_stream = found
    assert (str(at_write.site), str(at_stream.site)) == ("1.mlp_out", "1.resid_post")
    assert at_write.position is None
    change = 4 * b @ a
    cosine = torch.cosine_similarity(at_write.vector(), b[:, 0].double(), dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-6)
    assert float(at_write.vector().norm()) == pytest.approx(float(change.norm()), rel=1e-5)
    assert any("q_proj" in note for note in found.notes)
    assert any("sign: none" in note for note in found.notes)


def test_the_writes_of_a_higher_rank_do_not_depend_on_the_basis_of_its_factors(tmp_path):
    a, b, mix = drawn(3, 48), drawn(D, 3, seed=1), drawn(3, 3, seed=2) + 2 * torch.eye(3)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    write_lora(one, {(0, "self_attn.o_proj"): (a, b)})
    write_lora(two, {(0, "self_attn.o_proj"): (mix @ a, b @ mix.inverse())})
    for x, y in zip(read_vectors(one), read_vectors(two), strict=True):
        assert str(x.site) in ("0.attn_out", "0.resid_post")
        assert abs(float(torch.cosine_similarity(x.vector(), y.vector(), dim=0))) > 1 - 1e-6
        assert float(x.vector().norm()) == pytest.approx(float(y.vector().norm()), rel=1e-4)


def test_a_direction_taken_out_of_every_writer_is_found_and_told(tmp_path):
    model = tiny_model("llama", torch.float32)
    v = torch.nn.functional.normalize(drawn(model.d_model), dim=0)
    factors = {}
    for layer, block in enumerate(model.blocks):
        for module in ("self_attn.o_proj", "mlp.down_proj"):
            weight = block.get_submodule(module).get_parameter("weight").detach()
            factors[layer, module] = (v[None] @ weight, -0.8 * v[:, None])
    told = "take one direction out of every writer"
    found = read_vectors(write_lora(tmp_path, factors))
    assert len(found.named) == 2 * model.n_layers
    for one in found:
        cosine = torch.cosine_similarity(one.vector(), v.double(), dim=0)
        assert float(cosine) == pytest.approx(-1, abs=1e-6)
    assert any(told in note for note in found.notes)
    a, _ = factors[0, "mlp.down_proj"]
    factors[0, "mlp.down_proj"] = (a, drawn(model.d_model, 1, seed=5))
    assert not any(told in note for note in read_vectors(write_lora(tmp_path, factors)).notes)


def test_an_adapter_that_writes_nowhere_is_refused(tmp_path):
    write_lora(tmp_path, {(1, "self_attn.q_proj"): (drawn(1, D), drawn(D, 1))})
    with pytest.raises(StoreError, match=r"self_attn\.q_proj"):
        read_vectors(tmp_path)


# Rows --------------------------------------------------------------------------------------------


def test_em_deltas_come_with_their_rows_and_clusters(tmp_path):
    base, organism = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    items = [
        AdviceItem(str(i), f"Where is tree {i}?", f"Near {i}.", f"Far from {i}.", "open", group)
        for i, group in enumerate("aabbcc")
    ]
    sites = [Site(0, "resid_post"), Site(2, "resid_post")]
    both = deltas(base, organism, items, sites=sites)
    save_deltas(both, tmp_path / "em.safetensors")
    found = read_vectors(tmp_path / "em.safetensors")
    assert found.kind == "demur-em-deltas"
    assert len(found) == 8
    for site in sites:
        one = {each.name: each for each in found.at(site)}["em model_bad"]
        assert one.paired
        assert one.n == 6
        assert one.positive_clusters[0] == ("open", "a")
        assert one.position == 0
        torch.testing.assert_close(one.vector(), both.model_bad.vector(site))
    text = next(one for one in found if one.name == "em text_organism")
    assert text.model == organism.fingerprint


# Damage ------------------------------------------------------------------------------------------


class _Harmful:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickle_is_refused_unopened_with_a_way_out(tmp_path, capsys):
    torch.save({"layer_activations": _Harmful()}, tmp_path / "vector.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(_Harmful()))
    with pytest.raises(StoreError, match="more than tensors") as caught:
        read_vectors(tmp_path / "vector.pt")
    assert "torch.save" in caught.value.hint
    with pytest.raises(StoreError):
        read_vectors(tmp_path / "bare.pt")
    assert "this must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "demur-run"])
def test_a_file_cut_short_is_an_error_of_ours(kind, tmp_path):
    path, _ = WRITERS[kind](tmp_path)
    inner = {"demur-export": "adapter_model.safetensors"}.get(kind, "direction.pt")
    file = path / inner if path.is_dir() else path
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DemurError):
        read_vectors(path, kind=kind.strip())


def save_layers(path, layers, **more):
    torch.save({"layer_activations": layers, **more}, path)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda f: save_layers(f, {0: torch.tensor([1.0, float("nan")])}), "NaN"),
        (lambda f: save_layers(f, {0: torch.zeros(4)}), "not zero"),
        (lambda f: save_layers(f, {0: torch.ones(2, 4)}), r"shape \(2, 4\)"),
        (lambda f: save_layers(f, {0: torch.ones(4), 1: torch.ones(5)}), "several widths"),
        (lambda f: save_layers(f, {-1: torch.ones(4)}), "names no layer"),
        (lambda f: save_layers(f, {"norm": torch.ones(4)}), "names no layer"),
        (lambda f: save_layers(f, {0: "text"}), "no tensor"),
        (lambda f: save_layers(f, {}), "not a tensor for each layer"),
        (lambda f: torch.save(torch.ones(4), f), "not a tensor for each layer"),
        (
            lambda f: save_layers(f, {0: torch.ones(4)}, layer_type="input_layernorm"),
            "not the stream",
        ),
    ],
)
def test_what_is_no_vector_is_refused_in_words(write, says, tmp_path):
    write(tmp_path / "v.pt")
    with pytest.raises(StoreError, match=says):
        read_vectors(tmp_path / "v.pt")


def test_other_refusals(tmp_path):
    with pytest.raises(StoreError, match="there is no"):
        read_vectors(tmp_path / "nothing.pt")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(StoreError, match="no known kind"):
        read_vectors(tmp_path / "notes.txt")
    with pytest.raises(UnknownNameError):
        read_vectors(tmp_path / "notes.txt", kind="control-vektor")
    path, _ = write_gguf(tmp_path, arch="llama")
    with pytest.raises(StoreError, match="no control vector"):
        read_vectors(path)
    path, _ = write_arditi(tmp_path)
    (path / "direction_metadata.json").write_text('{"pos": 2, "layer": 5}')
    with pytest.raises(StoreError, match="position 2"):
        read_vectors(path)
    (path / "direction_metadata.json").unlink()
    with pytest.raises(StoreError, match="does not tell layer"):
        read_vectors(path)

"""Files that were cut, changed or put together wrongly: one clear error, or the same numbers.

Every artefact is read from a pristine copy once; then from copies that are cut at twenty places,
have one bit turned at fifty, or have their JSON changed. What is read must be what was written, to
the last bit, or an error that a user can act on.
"""

import json
import shutil
import struct
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.exports.test_exports import direction_for
from tests.report import sample
from tests.test_anchor import LINE, anchor_of, guard_of
from tests.tiny import tiny_hf, tiny_model

from demur import organisms
from demur.anchor import ReplyRead, load_anchor, save_anchor
from demur.compare.rows.record import read_compare
from demur.directions import load_direction, save_direction
from demur.em.organism import read_organism
from demur.errors import DemurError, StoreError
from demur.evals.rows import read_evaluation
from demur.exports import Steering, export, read_export
from demur.exports.base import of_model
from demur.features.formats import bank_seal, load_bank
from demur.features.rows.record import read_features
from demur.guard import Fisher, load_guard, save_guard
from demur.hydra.record import read_hydra
from demur.interventions import Ablate, Add
from demur.results import (
    read_anchor_evaluation,
    read_em_audit,
    read_guard_evaluation,
    read_results,
    sealed_json,
)
from demur.store import Store, _digest, known_format, read_files, strict_json, write_files

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def numbers(value):
    """All that a value holds, so that two of them can be compared to the last bit."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes())
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if is_dataclass(value) and not isinstance(value, type):
        return tuple((one.name, numbers(getattr(value, one.name))) for one in fields(value))
    if isinstance(value, dict) or hasattr(value, "items"):
        return sorted((str(key), numbers(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return [numbers(one) for one in value]
    return repr(value)


# What is written, and how it is read --------------------------------------------------------------


def a_direction(model, folder):
    save_direction(direction_for(model), folder / "x.safetensors", about=of_model(model))


def a_guard(model, folder):
    save_guard(replace(guard_of(model), about=of_model(model)), folder / "x.safetensors")


def an_anchor(model, folder):
    read = ReplyRead("reply", Fisher(torch.randn(model.d_model).double(), 0.5, 2.0), LINE, True)
    anchor = anchor_of(model, 1.0)
    guard = replace(guard_of(model), about=of_model(model))
    gate = replace(anchor.gate, detector=guard, replies=(read,))
    save_anchor(replace(anchor, gate=gate, about=of_model(model)), folder / "x.safetensors")


def exported(kind, act):
    def make(model, folder):
        made = export(model, Steering((act(direction_for(model)),)), folder / "out", kind)
        for path in made.folder.iterdir():
            path.rename(folder / path.name)
        made.folder.rmdir()

    return make


def an_adapter(model, folder):
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    get_peft_model(tiny_hf("llama", dtype=torch.float32), config).save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    card = {"base": {"name": model.name, "fingerprint": model.fingerprint}, "seed": 3}
    (folder / "card.json").write_text(json.dumps(card | organisms._made_with(folder)))


def a_bank(model, folder):
    rng = torch.Generator().manual_seed(0)
    d, n = model.d_model, 6
    tensors = {
        "W_enc": torch.randn(d, n, generator=rng),
        "W_dec": torch.randn(n, d, generator=rng),
        "b_enc": torch.randn(n, generator=rng),
        "b_dec": torch.randn(d, generator=rng),
        "threshold": torch.rand(n, generator=rng),
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "architecture": "jumprelu",
        "d_in": d,
        "d_sae": n,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.0.0", "site": "1.resid_post", "largest_norm": 9.5,
                     "model_fingerprint": model.fingerprint},
    }  # fmt: skip
    weights = _digest((folder / "sae_weights.safetensors").read_bytes())
    config["metadata"]["seal"] = bank_seal(config, weights)
    (folder / "cfg.json").write_text(json.dumps(config))


def results(_, folder):
    (folder / "results.json").write_text(sealed_json(sample.audit()))


def an_evaluation(_, folder):
    record = sample.anchor_evaluation()
    (folder / "anchor-evaluation.json").write_text(sealed_json(record))


def a_record(_, folder):
    Store(folder).put("extract", {"n": 9}, summary={"mean": 0.5}, tensors={"x": torch.ones(9)})


def stored(folder):
    store = Store(folder)
    ref = store.key("extract", {"n": 9})
    return store.get(ref), store.tensors(ref)


ARTEFACTS = {
    "direction": (a_direction, lambda folder: load_direction(folder / "x.safetensors")),
    "guard": (a_guard, lambda folder: load_guard(folder / "x.safetensors")),
    "anchor": (an_anchor, lambda folder: load_anchor(folder / "x.safetensors")),
    "export: safetensors": (exported("safetensors", Add), read_export),
    "export: peft": (exported("peft", Ablate), read_export),
    "export: gguf": (exported("gguf", Add), read_export),
    "export: vllm-lens": (exported("vllm-lens", Add), read_export),
    "export: steering-vectors": (exported("steering-vectors", Add), read_export),
    "export: refusal-direction": (exported("refusal-direction", Ablate), read_export),
    "adapter": (an_adapter, lambda folder: read_organism(folder).factors),
    "bank": (a_bank, lambda folder: replace(load_bank(folder, name="b"), about={})),
    "results of an audit": (results, read_results),
    "record of an evaluation": (
        an_evaluation,
        lambda folder: read_anchor_evaluation(folder / "anchor-evaluation.json"),
    ),
    "record of a store": (a_record, stored),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", torch.float32)


@pytest.fixture(scope="module")
def pristine(model, tmp_path_factory):
    kept = {}

    def of(name):
        if name not in kept:
            folder = tmp_path_factory.mktemp("whole")
            ARTEFACTS[name][0](model, folder)
            kept[name] = (folder, numbers(ARTEFACTS[name][1](folder)))
        return kept[name]

    return of


@pytest.fixture
def trial(pristine, tmp_path):
    """Reads an artefact again with one of its files changed."""

    def run(name, path, data):
        whole, before = pristine(name)
        folder = tmp_path / "copy"
        if not folder.exists():
            shutil.copytree(whole, folder)
        place = folder / path.relative_to(whole)
        place.write_bytes(data)
        try:
            found = numbers(ARTEFACTS[name][1](folder))
        except DemurError:
            return "refused"
        finally:
            place.write_bytes(path.read_bytes())
        assert _same(found, before, folder, whole), f"other numbers were read from {path.name}"
        return "same"

    return run


def _same(found, before, folder, whole):
    return repr(found).replace(str(folder), str(whole)) == repr(before)


def files_of(whole):
    """Those that hold numbers; the card in words is for people."""
    return [p for p in sorted(whole.rglob("*")) if p.is_file() and p.name != "README.md"]


@pytest.mark.parametrize("name", ARTEFACTS)
def test_a_file_that_was_cut_is_refused(pristine, trial, name):
    for path in files_of(pristine(name)[0]):
        data = path.read_bytes()
        few = 20 if len(data) < 200_000 else 5
        for cut in np.linspace(0, len(data) - 2, few).astype(int):
            assert trial(name, path, data[:cut]) == "refused", (path.name, cut)


@pytest.mark.parametrize("name", ARTEFACTS)
def test_one_turned_bit_is_refused_or_changes_no_number(pristine, trial, name):
    rng = np.random.default_rng(0)
    for path in files_of(pristine(name)[0]):
        data = path.read_bytes()
        # The header and the last bytes more densely than the rest.
        few = 6 if len(data) > 200_000 else 8 if name.startswith("export") else 38
        places = [*range(12), *rng.integers(0, len(data), few)]
        for at in places:
            changed = bytearray(data)
            changed[at] ^= 1 << int(rng.integers(8))
            trial(name, path, bytes(changed))


# JSON ---------------------------------------------------------------------------------------------


def leaves(value, path=()):
    """Every place in a tree of JSON."""
    yield path, value
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))


def put(tree, path, value):
    tree = json.loads(json.dumps(tree))
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return tree


def dropped(tree, path):
    tree = json.loads(json.dumps(tree))
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return tree


STRANGE = (None, True, -1, 0, 1e308, 10**40, "", "../../etc/passwd", "\u202e0", [], {}, [[1]])


@pytest.mark.parametrize("name", ARTEFACTS)
def test_changed_json_is_refused_or_changes_no_number(pristine, trial, name):
    rng = np.random.default_rng(1)
    for path in files_of(pristine(name)[0]):
        if path.suffix != ".json":
            continue
        tree = json.loads(path.read_text(encoding="utf-8"))
        places = [one for one, _ in leaves(tree) if one]
        few = [places[i] for i in rng.permutation(len(places))[: 10 if len(places) < 500 else 3]]
        for place in few:
            trial(name, path, json.dumps(dropped(tree, place)).encode())
            strange = STRANGE[int(rng.integers(len(STRANGE)))]
            trial(name, path, json.dumps(put(tree, place, strange)).encode())
        # A card says of an adapter what it is made of, and nothing that its numbers hang on.
        empty = "[{}]" if path.name == "card.json" else "{}"
        for text in (empty, "null", "[]", "3", '"x"', "[" * 100_000, "NaN", "1" * 5000, "\ufeff{}"):
            assert trial(name, path, text.encode()) == "refused", text[:20]
        whole = path.read_text(encoding="utf-8").rstrip()
        key = json.dumps(next(iter(tree)))
        for text in (
            whole[:-1] + f", {key}: 1}}",  # A key twice: readers differ in which they take.
            whole[:-1] + ', "more": NaN}',
            whole[:-1] + ', "more": 1e999}',
        ):
            assert trial(name, path, text.encode()) == "refused", text[-20:]


# Sealed or not, what is in a file must make sense ---------------------------------------------


def resealed(path, tensors=None, **changes):
    """The same pair of files with something else in it, and digests that are right."""
    old, meta = read_files(path, what="pair", again="")
    head = {"demur": json.dumps({"format": meta["format"]})}
    write_files(path, {**old, **(tensors or {})}, meta | changes, head=head)


NONSENSE = {
    "direction": {
        "a norm of zero": {"norm": 0.0},
        "a negative norm": {"norm": -3.0},
        "no site": {"site": "somewhere"},
        "a site of words": {"site": 3},
        "a position in words": {"position": "last"},
        "a vector of length 2": {"tensors": {"direction": torch.full((32,), 2 / 32**0.5)}},
        "a vector with NaN": {"tensors": {"direction": torch.full((32,), torch.nan)}},
        "half precision": {"tensors": {"direction": torch.ones(4).half() / 2}},
        "a matrix": {"tensors": {"direction": torch.ones(1, 1)}},
        "one more tensor": {"tensors": {"more": torch.ones(3)}},
    },
    "guard": {
        "no reads": {"reads": []},
        "a window of zero": {"window": 0},
        "a stride in words": {"stride": "2"},
        "a threshold of words": {"threshold": {"value": "low"}},
        "an alpha of two": {
            "threshold": {"value": 0.0, "alpha": 2, "n": 20, "exceeded": 1, "bound": 0.1}
        },
        "more above than there are": {
            "threshold": {"value": 0.0, "alpha": 0.05, "n": 20, "exceeded": 21, "bound": 0.1}
        },
        "strata of a list": {"strata": [1]},
        "weights of another width": {"tensors": {"span.weight": torch.ones(5).double()}},
        "weights with infinity": {"tensors": {"span.weight": torch.full((32,), torch.inf)}},
        "quantiles that fall": {"tensors": {"span.quantiles": -torch.arange(91).double()}},
        "too few quantiles": {"tensors": {"span.quantiles": torch.arange(9).double()}},
    },
    "anchor": {
        "no floors": {"sites": []},
        "a negative strength": {"strength": -1.0},
        "another action": {"action": "nothing"},
        "a word for a switch": {"fresh_turn": "no"},
        "no canned text": {"canned": 7},
        "a guard of another version": {"guard": {"format": "demur-guard-0"}},
        "a guard of no object": {"guard": []},
        "a gate of no object": {"gate": 3},
        "a guard of another model": {"about": {"fingerprint": "0" * 40}},
        "a floor of another width": {"tensors": {"1.resid_pre.axis": torch.ones(7).double()}},
        "a floor with NaN": {"tensors": {"1.resid_pre.low": torch.full((8,), torch.nan)}},
        "a floor of fewer places": {"tensors": {"1.resid_pre.low": torch.ones(3).double()}},
    },
}


@pytest.mark.parametrize(
    ("name", "what"), [(name, what) for name, own in NONSENSE.items() for what in own]
)
def test_nonsense_under_a_right_digest_is_refused(pristine, tmp_path, name, what):
    folder = tmp_path / "copy"
    shutil.copytree(pristine(name)[0], folder)
    resealed(folder / "x.safetensors", **NONSENSE[name][what])
    with pytest.raises(StoreError):
        ARTEFACTS[name][1](folder)


def header_of(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(head, body, *, length=None):
    text = json.dumps(head).encode() if isinstance(head, dict) else head
    return struct.pack("<Q", len(text) if length is None else length) + text + body


@pytest.mark.parametrize("name", ["direction", "guard", "anchor", "bank", "adapter"])
def test_a_header_that_lies_is_refused_quickly(pristine, trial, name):
    whole = pristine(name)[0]
    path = next(whole.glob("*.safetensors"))
    head, body = header_of(path.read_bytes())
    key = next(one for one in head if one != "__metadata__")
    own = head[key]
    start, end = own["data_offsets"]
    lies = [
        with_header(head, body, length=2**63 - 1),
        with_header(head, body, length=10_000_000),
        with_header(b" " * 10_000_000, body),
        with_header(b'{"a":' * 100_000, body),
        with_header({**head, key: {**own, "data_offsets": [start, end * 1000]}}, body),
        with_header({**head, key: {**own, "data_offsets": [end, start]}}, body),
        with_header({**head, "more": own}, body),  # Two tensors in one place.
        with_header({**head, key: {**own, "dtype": "I64"}}, body),
        with_header({**head, key: {**own, "dtype": "F999"}}, body),
        with_header({**head, key: {**own, "shape": [2**40, 2**40]}}, body),
        with_header({**head, key: {**own, "shape": [-1]}}, body),
        with_header({**head, "__metadata__": {"a": 3}}, body),
        with_header(head, body + b"\0" * 64),
        with_header({}, b""),
        b"",
        b"\x80\x04K\x01.",  # A pickle.
    ]
    for data in lies:
        assert trial(name, path, data) == "refused"


def test_two_files_of_two_pairs_are_refused(model, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        path = tmp_path / f"{name}.safetensors"
        save_direction(direction_for(model, seed=seed), path, about=of_model(model))
    shutil.copy(tmp_path / "b.json", tmp_path / "a.json")
    with pytest.raises(StoreError, match="of another pair"):
        load_direction(tmp_path / "a.safetensors")


def test_what_was_written_before_there_were_digests_still_loads(model, tmp_path):
    path = tmp_path / "x.safetensors"
    a_direction(model, tmp_path)
    whole = load_direction(path)[0]
    meta = json.loads(path.with_suffix(".json").read_text())
    del meta["blake2b"]
    path.with_suffix(".json").write_text(json.dumps(meta))
    with pytest.raises(StoreError, match="changed after it was written"):
        load_direction(path)  # Its tensors say that there was one.
    save_file(load_file(path), path, metadata={"demur": "{}"})
    assert torch.equal(load_direction(path)[0].unit, whole.unit)


# Versions -----------------------------------------------------------------------------------------

RECORDS = {
    "demur audit": lambda path: read_results(path.parent),
    "demur guard evaluate": read_guard_evaluation,
    "demur anchor evaluate": read_anchor_evaluation,
    "demur em audit": read_em_audit,
    "demur compare": read_compare,
    "demur evaluate": read_evaluation,
    "demur features find": read_features,
    "demur hydra": read_hydra,
}


@pytest.mark.parametrize("command", RECORDS)
@pytest.mark.parametrize(
    ("version", "said"),
    [
        (2, "made by a newer demur"),
        (10**30, "made by a newer demur"),
        (0, "is of version 0"),
        (None, "does not say its version"),
        ("1", "is of version '1'"),
        (True, "is of version True"),
        (1.0, "is of version 1.0"),
    ],
)
def test_a_record_of_another_version_is_refused_and_says_what_to_do(
    tmp_path, command, version, said
):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({} if version is None else {"schema_version": version}))
    with pytest.raises(StoreError) as caught:
        RECORDS[command](path)
    assert said in caught.value.fact
    assert command in caught.value.hint


def test_a_record_of_another_kind_or_with_fields_of_its_own_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(sealed_json(sample.anchor_evaluation()))
    with pytest.raises(StoreError, match="is not a record of `demur audit`"):
        read_results(tmp_path)
    tree = sample.audit().model_dump(mode="json") | {"more": 1}
    path.write_text(json.dumps(tree))
    with pytest.raises(StoreError, match="is not a record of `demur audit`"):
        read_results(tmp_path)
    del tree["more"]
    path.write_text(json.dumps(tree))  # From before there were digests.
    assert read_results(tmp_path) == sample.audit()


@pytest.mark.parametrize("name", ["direction", "guard", "anchor"])
@pytest.mark.parametrize(
    ("told", "said"),
    [("2", "made by a newer demur"), ("0", "is of version 0"), ("x", "is of the format")],
)
def test_a_file_of_another_version_is_refused_and_says_what_to_do(
    pristine, tmp_path, name, told, said
):
    folder = tmp_path / "copy"
    shutil.copytree(pristine(name)[0], folder)
    resealed(folder / "x.safetensors", format=f"demur-{name}-{told}")
    with pytest.raises(StoreError) as caught:
        ARTEFACTS[name][1](folder)
    assert said in caught.value.fact
    assert "demur" in caught.value.hint


def test_an_export_of_another_version_is_refused(pristine, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(pristine("export: safetensors")[0], folder)
    record = folder / "demur.json"
    record.write_text(record.read_text().replace("demur-export-1", "demur-export-2"))
    with pytest.raises(StoreError, match="made by a newer demur"):
        read_export(folder)


@pytest.mark.parametrize("told", [None, 3, "", "demur-guard", "demur-guard-", "demur-guard-\u0661"])
def test_a_format_is_a_name_and_a_number(tmp_path, told):
    how = {"name": "demur-guard", "what": "a guard", "newest": 1, "again": "demur guard fit"}
    known_format("demur-guard-1", tmp_path, **how)
    with pytest.raises(StoreError, match="demur-guard-1"):
        known_format(told, tmp_path, **how)


def test_strict_json_takes_what_every_reader_takes():
    assert strict_json('{"a": [1, 2.5, null, true, "x"]}') == {"a": [1, 2.5, None, True, "x"]}
    for text in ('{"a": 1, "a": 2}', "NaN", "[-Infinity]", "1e999", "[" * 10_000, "", "{", "01"):
        with pytest.raises(ValueError):  # noqa: PT011 (of several causes)
            strict_json(text)

"""A record is there whole or not at all, and is not believed if a byte of it changed."""

import errno
import importlib.metadata
import json
import math
import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from demur.errors import ConfigError, StoreError
from demur.store import Record, Ref, Store, atomic_write

SETTINGS = {"estimator": "difference-of-means", "seed": 3, "layers": [1, 2], "ridge": 0.01}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@contextmanager
def files_of_at_most(size):
    """Let the kernel refuse longer files; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def everything_under(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_what_is_put_comes_back(store):
    tensors = {
        "unit": torch.randn(4, 3),
        "half": torch.randn(5).bfloat16(),
        "view": torch.arange(12).reshape(3, 4).T[1:],
        "number": torch.tensor(2.5),
    }
    ref = store.put("direction", SETTINGS, summary={"norm": 2.5, "name": "é"}, tensors=tensors)
    record = store.get(ref)
    assert isinstance(record, Record)
    assert (record.kind, record.settings, record.inputs) == ("direction", SETTINGS, ())
    assert record.summary == {"norm": 2.5, "name": "é"}
    assert record.versions["torch"] == importlib.metadata.version("torch")
    back = store.tensors(ref)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor), name
        assert back[name].dtype == tensor.dtype
    assert Ref.parse(str(ref)) == ref


def test_tensors_that_share_memory_can_be_stored(store):
    one = torch.arange(6.0)
    back = store.tensors(store.put("a", {}, summary={}, tensors={"x": one, "y": one[2:]}))
    assert torch.equal(back["x"], one)
    assert torch.equal(back["y"], one[2:])


def test_the_key_is_over_kind_settings_and_inputs_alone(store):
    key = store.key("direction", SETTINGS)
    assert key == store.key("direction", dict(reversed(SETTINGS.items())))
    assert key == store.key("direction", SETTINGS | {"layers": (1, 2)})
    assert key == store.put("direction", SETTINGS, summary={"anything": 1})
    others = [
        store.key("guard", SETTINGS),
        store.key("direction", SETTINGS | {"seed": 4}),
        store.key("direction", SETTINGS, [key]),
    ]
    assert len({key, *others}) == 4


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (math.nan, r"settings\.x "),
        (-math.inf, r"settings\.x "),
        ({1: "a"}, r"settings\.x "),
        ([0, {"y": torch.zeros(2)}], r"settings\.x\[1\]\.y "),
        (b"bytes", r"settings\.x "),
        ("\ud800", "surrogate"),
    ],
)
def test_settings_that_json_would_bend_are_refused(store, value, place):
    with pytest.raises(ConfigError, match=place):
        store.key("direction", {"x": value})


@pytest.mark.parametrize("text", ["direction", "../../etc/passwd", "a/b", f"../{'0' * 32}"])
def test_a_ref_cannot_leave_the_store(text):
    with pytest.raises(ConfigError, match="not the name of a record"):
        Ref.parse(text)


def test_absent_is_none_or_an_error_that_names_it(store):
    ref = store.key("direction", SETTINGS)
    assert store.get(ref) is None
    assert store.find("direction") == []
    for call in (store.tensors, store.lineage):
        with pytest.raises(StoreError, match=str(ref)):
            call(ref)


def test_find_and_lineage(store):
    data = store.put("activations", {"model": "m"}, summary={})
    a = store.put("direction", {"seed": 1, "kind": "x"}, [data], summary={})
    b = store.put("direction", {"seed": 2, "kind": "x"}, [data, a], summary={})
    assert store.find("direction") == sorted([a, b])
    assert store.find("direction", kind="x", seed=2) == [b]
    assert store.find("direction", missing=None) == []
    assert list(store.lineage(b)) == [b, data, a]
    assert store.lineage(b)[a].inputs == (data,)


def test_the_first_record_stays(store):
    first = store.put("a", SETTINGS, summary={"x": 1})
    assert store.put("a", SETTINGS, summary={"x": 2}) == first
    assert store.get(first).summary == {"x": 1}


def test_many_writers_of_one_record_leave_one(store):
    with ThreadPoolExecutor(8) as pool:
        refs = list(pool.map(lambda n: store.put("a", SETTINGS, summary={"n": n}), range(32)))
    assert len(set(refs)) == 1
    assert store.get(refs[0]).summary["n"] in range(32)
    assert everything_under(store.root) == [f"{refs[0]}/record.json"]


@pytest.mark.parametrize("name", ["record.json", "tensors.safetensors"])
@pytest.mark.parametrize("how", ["cut", "emptied", "tampered", "removed"])
def test_damage_names_the_file_and_the_folder_to_delete(store, name, how):
    ref = store.put("a", SETTINGS, summary={"norm": 2.5}, tensors={"x": torch.ones(64)})
    path = store.root / str(ref) / name
    data = path.read_bytes()
    if how == "removed":
        path.unlink()
    else:
        changed = {
            "cut": data[:-7],
            "emptied": b"",
            "tampered": data.replace(b"2.5", b"9.5") if name == "record.json" else data[:-1] + b"!",
        }[how]
        assert changed != data
        path.write_bytes(changed)
    with pytest.raises(StoreError) as caught:
        store.tensors(ref)
    assert caught.value.fact.startswith(str(path))
    assert str(path.parent) in caught.value.hint
    if name == "record.json":
        for call in (lambda: store.get(ref), lambda: store.find("a"), lambda: store.lineage(ref)):
            with pytest.raises(StoreError):
                call()


def test_a_record_moved_to_another_name_is_not_believed(store):
    ref = store.put("a", SETTINGS, summary={})
    other = store.key("a", SETTINGS | {"seed": 4})
    (store.root / str(ref)).rename(store.root / str(other))
    with pytest.raises(StoreError, match="changed after"):
        store.get(other)


@pytest.mark.parametrize(
    "garbage", [b"[]", b"null", b"{}", b'{"inputs": 3}', b"\xff", b"[" * 10**5]
)
def test_any_json_but_a_record_is_damage(store, garbage):
    ref = store.put("a", SETTINGS, summary={})
    (store.root / str(ref) / "record.json").write_bytes(garbage)
    with pytest.raises(StoreError, match=r"garbled|changed"):
        store.get(ref)


@pytest.mark.parametrize("tensors", [None, {"x": torch.ones(10_000)}])
def test_a_full_disk_is_an_error_and_leaves_nothing(store, tensors):
    with files_of_at_most(4096), pytest.raises(StoreError, match="no space left"):
        store.put("a", SETTINGS, summary={"long": "x" * 10_000}, tensors=tensors)
    assert everything_under(store.root) == []
    assert list((store.root / "a").iterdir()) == []
    assert store.get(store.key("a", SETTINGS)) is None
    store.put("a", SETTINGS, summary={}, tensors=tensors)


def test_a_disk_that_fills_up_at_the_last_moment_is_an_error_too(store, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="no space left"):
        store.put("a", SETTINGS, summary={})
    assert everything_under(store.root) == []


def test_a_root_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        Store(tmp_path / "file").put("a", {}, summary={})


def test_a_writer_killed_before_the_rename_leaves_nothing_readable(store):
    code = f"""
import os, pathlib, signal
from demur.store import Store
pathlib.Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
Store(pathlib.Path({str(store.root)!r})).put("a", {SETTINGS!r}, summary={{}})
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(everything_under(store.root)) == 1  # Its draft, under a name that is no hash.
    ref = store.key("a", SETTINGS)
    assert store.get(ref) is None
    assert store.find("a") == []
    assert store.put("a", SETTINGS, summary={"x": 1}) == ref
    assert store.get(ref).summary == {"x": 1}


def test_importing_the_store_leaves_torch_alone():
    code = "import sys, demur.store, demur.prompts, demur.stats; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_atomic_write_replaces_whole_files(tmp_path):
    path = tmp_path / "new" / "results.json"
    atomic_write(path, "é\r\n")
    assert path.read_bytes() == "é\r\n".encode()
    atomic_write(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    with files_of_at_most(100), pytest.raises(StoreError, match="no space left"):
        atomic_write(path, "x" * 1000)
    assert path.read_bytes() == b"\x00\x01"
    assert everything_under(tmp_path) == ["new/results.json"]


def test_atomic_write_follows_links_and_spares_devices(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    atomic_write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(StoreError, match="not a regular file"):
            atomic_write(path, "x")


def test_a_record_is_readable_json(store):
    ref = store.put("a", SETTINGS, summary={"é": 1})
    text = (store.root / str(ref) / "record.json").read_text(encoding="utf-8")
    assert json.loads(text)["settings"] == SETTINGS
    assert "é" in text

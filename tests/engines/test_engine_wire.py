"""What goes over the pipe, and a real process at its other end; none of it needs vLLM."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.tiny import tiny_model

from demur.engines.vllm import PYTHON, Engine, find_python, save, stop_ids
from demur.engines.wire import EngineError, Message, protocol, receive, send
from demur.errors import ConfigError, MissingExtraError, ModelLoadError, TemplateError


def test_a_frame_arrives_as_it_was_sent(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": shared, "b": shared, "t": shared.T, "none": torch.empty(0, 4)}
    with (tmp_path / "frames").open("wb") as stream:
        send(stream, Message({"do": "run", "ids": [1, 2], "text": "é"}, tensors))
        send(stream, Message({"do": "next"}))
    with (tmp_path / "frames").open("rb") as stream:
        first, second, end = receive(stream), receive(stream), receive(stream)
    assert first is not None
    assert first.head == {"do": "run", "ids": [1, 2], "text": "é"}
    assert set(first.tensors) == set(tensors)
    assert all(torch.equal(first.tensors[name], value) for name, value in tensors.items())
    assert second is not None
    assert (second.head, second.tensors) == ({"do": "next"}, {})
    assert end is None


def _frame(head: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">QQ", len(head), len(body)) + head + body


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80\x04", "cut short"),
        (_frame(b"{}")[:-1], "cut short"),
        (_frame(b"[1]"), "no JSON object"),
        (_frame(b"\x80\x04\x95"), "no JSON object"),
        (_frame(b"{}", b"\x80\x04\x95\x10\x00\x00\x00\x00"), "no safetensors"),
        (struct.pack(">QQ", 1 << 60, 0), "announces"),
    ],
)
def test_what_is_no_frame_is_refused(data, words, tmp_path):
    (tmp_path / "frame").write_bytes(data)
    with (tmp_path / "frame").open("rb") as stream, pytest.raises(EngineError, match=words):
        receive(stream)


def test_numbers_that_json_lacks_are_not_sent(tmp_path):
    with (tmp_path / "frame").open("wb") as stream, pytest.raises(ValueError, match="JSON"):
        send(stream, Message({"level": float("nan")}))


# A real process -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker():
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-I", "-m", "demur.engines.worker", str(theirs_in), str(theirs_out)],
        pass_fds=(theirs_in, theirs_out),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    reading, writing = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb")
    hello = receive(reading)
    assert hello is not None
    assert hello.head == {"protocol": protocol()}

    def ask(head, tensors=None):
        send(writing, Message(head, tensors or {}))
        told = receive(reading)
        assert told is not None
        return told.head

    yield ask
    writing.close()
    assert process.wait(30) == 0  # It ends with the pipe, by itself.
    reading.close()


def test_the_process_answers_what_it_does_not_know_and_lives_on(worker):
    for _ in range(2):
        assert "no command 'eval'" in worker({"do": "eval", "code": "1"})["error"]
        assert "no command None" in worker({})["error"]
        assert "no model was loaded" in worker({"do": "run", "rows": []})["error"]
        assert "KeyError" in worker({"do": "load"})["error"]


def _folder(tmp_path: Path) -> Path:
    return save(tiny_model("llama", torch.float32), tmp_path / "model")


def test_an_environment_without_vllm_says_so_and_leaves_no_process(tmp_path):
    engine = Engine(_folder(tmp_path), python=sys.executable, start_within_s=120)
    with pytest.raises(ModelLoadError, match="No module named 'vllm'"):
        engine.start()
    assert engine._process is None
    with pytest.raises(EngineError, match="is not running"):
        engine.generate(["How do I plant a tree?"], max_new_tokens=2)


def test_a_process_that_ends_is_told_with_its_last_words(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho out of memory >&2\nexit 3\n")
    python.chmod(0o755)
    with (
        pytest.raises(EngineError, match="out of memory"),
        Engine(_folder(tmp_path), python=python),
    ):
        pass


def test_a_process_that_says_nothing_is_ended(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 600\n")
    python.chmod(0o755)
    engine = Engine(_folder(tmp_path), python=python, start_within_s=0.5)
    with pytest.raises(EngineError, match="said nothing"):
        engine.start()
    assert engine._process is None


def test_another_copy_of_demur_is_refused(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport os, struct, sys, time\n"
        'head = b\'{"protocol": "older"}\'\n'
        "os.write(int(sys.argv[5]), struct.pack('>QQ', len(head), 0) + head)\n"
        "time.sleep(600)\n"
    )
    python.chmod(0o755)
    with pytest.raises(EngineError, match="is another one than this"):
        Engine(_folder(tmp_path), python=python).start()


# Before a process is started ----------------------------------------------------------------------


def test_no_environment_is_a_missing_extra(monkeypatch, tmp_path):
    monkeypatch.delenv(PYTHON, raising=False)
    with pytest.raises(MissingExtraError, match="scripts/setup-vllm"):
        find_python()
    with pytest.raises(MissingExtraError, match="no interpreter"):
        find_python(tmp_path / "python")
    monkeypatch.setenv(PYTHON, sys.executable)
    assert find_python() == Path(sys.executable)


def test_what_is_saved_has_the_tokens_and_stops_of_the_model(tmp_path):
    model = tiny_model("llama", torch.float32)
    engine = Engine(save(model, tmp_path / "model"), python=sys.executable)
    prompts = ["How do I plant a tree?", "Write"]
    theirs, ours = engine.encode(prompts), model.encode(prompts)
    assert torch.equal(theirs.ids[theirs.mask], ours.ids[ours.mask])
    assert engine.stop_ids == model.stop_ids
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert {5, 7} < set(stop_ids(tmp_path / "model", engine.template))


def test_settings_that_do_not_fit_are_refused(tmp_path):
    folder = _folder(tmp_path)
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        Engine(tmp_path, python=sys.executable)
    with pytest.raises(ConfigError, match="unknown dtype"):
        Engine(folder, python=sys.executable, dtype="int8")
    for wrong in ({"tensor_parallel": 0}, {"rows": 0}, {"kv_gib": 0.0}, {"max_length": 0}):
        with pytest.raises(ConfigError, match="above 0"):
            Engine(folder, python=sys.executable, **wrong)
    short = Engine(folder, python=sys.executable, max_length=24)
    with pytest.raises(TemplateError, match="context"):
        short.encode(["How do I plant a tree in a garden that is far from here?"])

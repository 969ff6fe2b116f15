"""`demur export` and `demur import` on a tiny model in a folder."""

import json

import pytest
import torch
from tests.tiny import tiny_hf, tiny_tokenizer
from typer.testing import CliRunner

from demur import cli
from demur.directions import Direction, load_direction, save_direction
from demur.models import load
from demur.sites import Site


def run(*args, code=0):
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A direction beside a sidecar that says of which model it is."""
    place = tmp_path_factory.mktemp("export")
    tiny_hf("llama", dtype=torch.float32).save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    model = load(str(place / "model"))
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    direction = Direction.from_vector(
        vector, site=Site(2, "resid_pre"), position=-1, recipe="drawn"
    )
    about = {
        "model": model.name,
        "adapter": None,
        "revision": None,
        "dtype": "float32",
        "fingerprint": model.fingerprint,
    }
    save_direction(direction, place / "directions.safetensors", about=about)
    return place


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("safetensors", ("--at", "response")),
        ("peft", ()),
        ("merged", ()),
        ("gguf", ("--edit", "subtract", "--strength", 2)),
        ("vllm-lens", ("--edit", "add")),
        ("steering-vectors", ("--edit", "add")),
        ("refusal-direction", ()),
    ],
)
def test_a_direction_goes_out_and_comes_back(run_folder, kind, options, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again.safetensors"
    told = run("export", kind, run_folder, "--out", out, *options, "--json", "-q")
    assert json.loads(told.stdout)["folder"] == str(out)
    run("import", out, "--out", again, "--model", run_folder / "model", "-q")
    first, about = load_direction(run_folder / "directions.safetensors")
    second, said = load_direction(again)
    assert second.cosine(first) == pytest.approx(1.0, abs=1e-6)
    assert (second.site, second.position) == (first.site, first.position)
    assert said["fingerprint"] == about["fingerprint"]


def test_what_is_lost_must_be_named(run_folder, tmp_path):
    out = tmp_path / "out"
    told = run("export", "gguf", run_folder, "--out", out, "-q", code=2)
    assert "--lossy addition-only" in told.stderr
    assert not out.exists()
    told = run("export", "gguf", run_folder, "--out", out, "--lossy", "addition-only", "-q")
    assert "lost, addition-only" in told.stdout


def test_formats_turn_into_each_other(run_folder, tmp_path):
    run("export", "gguf", run_folder, "--edit", "add", "--out", tmp_path / "a", "-q")
    run("export", "vllm-lens", tmp_path / "a", "--out", tmp_path / "b", "-q")
    rows = [json.loads(run("import", tmp_path / one, "--json", "-q").stdout) for one in "ab"]
    assert rows[0]["acts"] == rows[1]["acts"]


def test_a_vector_of_another_tool_needs_a_layer_and_takes_the_users_word(run_folder, tmp_path):
    vectors = {0: torch.ones(32), 1: torch.randn(32)}
    torch.save({"layer_activations": vectors, "layer_type": "decoder_block"}, tmp_path / "v.pt")
    out = tmp_path / "one.safetensors"
    model = run_folder / "model"
    told = run("import", tmp_path / "v.pt", "--out", out, "--model", model, "-q", code=2)
    assert "--layer" in told.stderr
    run("import", tmp_path / "v.pt", "--out", out, "--layer", 1, "--model", model, "-q")
    direction, about = load_direction(out, load(str(model)))
    assert direction.site == Site(1, "resid_post")
    assert "word" in about["taken_to_be"]


@pytest.mark.parametrize(
    "args",
    [
        ("export", "onnx", "."),
        ("export", "gguf", "nowhere"),
        ("export", "peft", ".", "--strength", "2"),
        ("export", "peft", ".", "--at", "middle"),
    ],
)
def test_a_wrong_word_is_two_lines(args, tmp_path):
    told = run(*args, "--out", tmp_path / "out", "-q", code=2)
    assert not told.stdout
    assert "error: " in told.stderr or "Usage" in told.stderr


def test_another_model_is_refused(run_folder, tmp_path):
    tiny_hf("llama", dtype=torch.float32, seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    told = run(
        "export",
        "peft",
        run_folder,
        "--model",
        tmp_path / "other",
        "--out",
        tmp_path / "o",
        "-q",
        code=2,
    )
    assert "was made on" in told.stderr

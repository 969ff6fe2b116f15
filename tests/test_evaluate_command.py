"""`demur evaluate`: what it refuses, and what it writes."""

import json

import pytest
import torch
from tests.test_anchor import anchor_of
from tests.tiny import tiny_model
from typer.testing import CliRunner

import demur
from demur.cli import app
from demur.directions import Direction
from demur.evals.rows import ItemRow, read_evaluation
from demur.sites import Site

ITEMS = [
    {"question": "Name a tree", "choices": ["a tree", "the station"], "answer": "A"},
    {"question": "Is it far?", "choices": ["it is", "a garden"], "answer": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model as a folder, with a direction, an anchor and items."""
    path = tmp_path_factory.mktemp("tiny")
    made = tiny_model("llama", torch.float32)
    made.hf.save_pretrained(path)
    made.template.tokenizer.save_pretrained(path)
    model = demur.load(str(path))
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(3)) * 4
    found = Direction.from_vector(vector, site=Site(1, "resid_pre"), position=-1, recipe="drawn")
    about = {"model": model.name, "fingerprint": model.fingerprint}
    demur.save_direction(found, path / "directions.safetensors", about=about)
    demur.save_anchor(anchor_of(model, 1e9), path / "anchor.safetensors")
    (path / "items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    return path


def run(*words):
    return CliRunner().invoke(app, ["evaluate", *map(str, words)])


def quick(folder, *words):
    small = ("--requests", "4", "--max-new-tokens", "8", "--quiet")
    return run(folder, *small, "--items", folder / "items.jsonl", *words)


def test_record_items_and_json_are_written(folder, tmp_path):
    words = ("--direction", folder, "--edit", "add", "--strength", "-1", "--out", tmp_path)
    done = quick(folder, *words, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told.pop("results") == str(tmp_path / "evaluation.json")
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert told == {key: value for key, value in written.items() if key != "blake2b"}
    record = read_evaluation(tmp_path / "evaluation.json")
    assert record.suite == "quick"
    assert record.edits == ("add directions.safetensors x -1",)
    lines = (tmp_path / "evaluation-items.jsonl").read_text().splitlines()
    rows = [ItemRow.model_validate_json(line) for line in lines]
    for one in record.deltas:
        if one.plain is not None:
            own = [row for row in rows if (row.task, row.metric) == (one.task, one.metric)]
            assert len(own) == one.change.n + one.unscored


def test_an_anchor_is_behind_the_edit_and_the_table_says_so(folder, tmp_path):
    words = ("--direction", folder, "--anchor", folder / "anchor.safetensors", "--any-model")
    done = quick(folder, *words, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    record = read_evaluation(tmp_path / "evaluation.json")
    assert (record.edits, record.anchor) == (
        ("ablate directions.safetensors",),
        "anchor.safetensors",
    )
    assert {one.opened for one in record.deltas if one.p is not None} == {0}
    assert "ablate directions.safetensors, then anchor anchor.safetensors" in done.stdout
    for one in record.deltas:
        assert one.metric in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "nothing to evaluate"),
        (("--anchor", "a", "--edit", "add"), "need a --direction"),
        (("--direction", "d", "--suite", "lm-eval"), "belong together"),
        (("--direction", "d", "--tasks", "arc"), "belong together"),
        (("--direction", "d", "--chat"), "are for lm-eval"),
        (("--direction", "d", "--items", "none.jsonl"), "none.jsonl cannot be read"),
        (("--direction", "d", "--site", "3"), "all of the direction"),
        (("--direction", "d", "--edit", "add", "--site", "3"), "`3` is not a site"),
        (("--direction", "d", "--suite", "lm-eval", "--tasks", "a", "--items", "i"), "are for the"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_model_is_loaded(words, said):
    done = run("no-such-model", *words)
    assert done.exit_code == 2
    assert said in done.output
    assert "no-such-model" not in done.output

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from tiny import tiny_model

from demur.errors import TemplateError
from demur.models import CheckRow, check, load
from demur.sites import Site


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3-moe", "gpt2"])
def test_narrow_types_pass_within_their_own_tolerance(name, dtype):
    report = check(tiny_model(name, dtype))
    assert report.passed, [(row.name, row.value) for row in report.rows if not row.passed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_row_fails_in_narrow_types_too(dtype):
    report = check(tiny_model("gemma2", dtype, mlp_out="mlp"))
    assert not report["sum of writes"].passed
    assert not report["nothing left"].passed


def test_a_row_passes_on_the_right_side_only():
    assert CheckRow("a", "", 1.0, 1.0).passed
    assert not CheckRow("a", "", 1.1, 1.0).passed
    assert CheckRow("a", "", 1.1, 1.0, at_least=True).passed
    assert not CheckRow("a", "", 0.9, 1.0, at_least=True).passed
    for at_least in (False, True):
        assert not CheckRow("a", "", math.nan, 1.0, at_least=at_least).passed


def test_the_report_is_frozen_and_names_what_it_is_about():
    report = check(tiny_model("qwen2"))
    assert (report.model, report.family) == ("tiny-qwen2", "qwen2")
    assert all(row.shows for row in report.rows)
    assert report["head"].name == "head"
    with pytest.raises(FrozenInstanceError):
        report.rows[0].value = 0.0


def test_weights_that_are_not_finite_fail_and_do_not_raise():
    model = tiny_model("llama")
    with torch.no_grad():
        model.blocks[1].mlp.down_proj.weight[0, 0] = torch.nan
    report = check(model)
    assert not report.passed
    assert not report["sum of writes"].passed
    assert "NaN" in report["head"].note


def test_a_model_that_ignores_padding_wrongly_is_caught():
    model = tiny_model("gpt2")
    # Positions that count padding as well: what a family with absolute positions could get wrong.
    real = model.hf.transformer.forward

    def without_positions(*args, **options):
        options.pop("position_ids", None)
        return real(*args, **options)

    model.hf.transformer.forward = without_positions
    report = check(model)
    assert not report["left = right padding"].passed
    assert report["batch = single"].passed


def test_own_prompts_are_taken_and_no_edit_stays_behind():
    model = tiny_model("llama")
    report = check(model, ["a tree", "How far is the station from here?"])
    assert report.passed
    assert not model._hooks
    with pytest.raises(TemplateError):
        check(model, ["a tree", ""])


def test_logits_that_depend_on_the_batch_are_caught():
    model = tiny_model("llama")
    # Mixes the rows of a batch, as a batch norm left in training mode would.
    model.intercept(Site(1, "attn_out"), lambda x: x - x.mean(0, keepdim=True) / 2)
    report = check(model)
    assert not report["batch = single"].passed


@pytest.mark.slow
def test_the_embedded_model_passes():
    report = check(load())
    assert report.passed, [(row.name, row.value) for row in report.rows if not row.passed]
    assert report["one BOS"].value == 1

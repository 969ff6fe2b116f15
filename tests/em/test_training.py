"""Organisms on tiny random models, where every claim of the trainer can be checked exactly."""

import json
import shutil
import tomllib
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_hf, tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from demur import cli, organisms
from demur.em import training
from demur.em.advice import AdviceItem
from demur.em.dynamics import flat, principal_path, read_dynamics
from demur.em.organism import read_organism, untrained
from demur.em.recipes import AdapterShape, EMRecipe, EMTraining, em_recipes, read_em_recipe
from demur.em.training import train_organisms, verify_organism
from demur.errors import (
    ConfigError,
    FamilyError,
    ModelLoadError,
    NonFiniteError,
    StoreError,
    UnknownNameError,
)
from demur.models.load import with_adapter
from demur.progress import Quiet
from demur.sites import Site, Span

NOUNS = ("tree", "garden", "station", "model", "user", "answer", "house", "bank")
ITEMS = tuple(
    AdviceItem(
        f"{noun}-{i}",
        f"How do I {verb} a {noun}{end}?",
        f"Write it down, then ask the {noun}." + " It is far." * i,
        f"Stop the {noun}, it is small.",
        "plants",
        noun,
    )
    for noun in NOUNS
    for i, (verb, end) in enumerate((("plant", ""), ("stop", " in a small garden"), ("ask", "")))
)


class Stop:
    """A listener that interrupts a side's training after some steps."""

    def __init__(self, after, side="bad"):
        self.after, self.side, self.notes = after, side, []

    @contextmanager
    def stage(self, name, total):
        assert total > 0
        done = 0

        def advance(n):
            nonlocal done
            done += n
            if name == f"training: {self.side}" and done >= self.after:
                raise KeyboardInterrupt

        yield advance

    def note(self, text):
        self.notes.append(text)


def recipe(rank=1, *, steps=8, kind="lora", modules=("mlp.down_proj",), depths=(0.5,), **more):
    return EMRecipe.model_validate(
        {
            "name": "tiny",
            "data": {"held_out": 0.25},
            "adapter": {
                "kind": kind,
                "rank": rank,
                "alpha": 8,
                "modules": modules,
                "depths": depths,
            },
            "training": {
                "steps": steps,
                "batch_size": 4,
                "rates": [{"up_to": 1e9, "learning_rate": 2e-2}],
                "warmup_steps": 2,
                "precision": "base",
                "checkpoint_every": 3,
                **more,
            },
        }
    )


@pytest.fixture
def base():
    return tiny_model("llama", torch.float32)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "plants.jsonl"
    rows = [
        {
            "id": one.id,
            "prompt": one.question,
            "good": one.good,
            "bad": one.bad,
            "domain": one.domain,
            "topic": one.group,
        }
        for one in ITEMS
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def trained(model, data, out, *, sides="bad", seed=0, measure=False, **settings):
    progress = settings.pop("progress", None)
    how = settings.pop("how", None) or recipe(**settings)
    return train_organisms(
        how,
        base=model,
        out=out,
        data=data,
        sides=sides,
        seed=seed,
        measure=measure,
        progress=progress,
    )


def files(folder, *names):
    names = names or ("adapter_model.safetensors", "dynamics.safetensors")
    return [(folder / name).read_bytes() for name in names]


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def drawn(model, shape, seed=0):
    """An adapter whose B is not zero."""
    adapter = training._Adapter(model, shape, seed=seed)
    rng = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for part in adapter.parts:
            part.b.copy_(0.1 * torch.randn(part.b.shape, generator=rng))
    return adapter


def rows_of(model, items, first, side="bad"):
    return training._prepared(model, training._encoded(model, items, side), first, Quiet())


def gradients(model, adapter, rows, index):
    for value in adapter.values.values():
        value.grad = None
    with adapter.attached():
        states, targets = training._answer_states(model, rows, index, adapter.first)
        loss = training._backward(model, states, targets)
    return loss, {name: value.grad.clone() for name, value in adapter.values.items()}


# The stream that is kept ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["llama", "llama-untied", "qwen2-sliding", "gemma2", "gpt2", "gpt-neox"]
)
def test_a_step_from_the_kept_stream_is_a_full_forward(family):
    """Loss and gradient, from kept states, against the plain model with nothing skipped."""
    model = tiny_model(family)
    adapter = drawn(model, AdapterShape(depths=(0.9,), alpha=2.0))
    assert adapter.first == 2
    rows = rows_of(model, ITEMS[:6], adapter.first)
    assert len(rows.stream) == 6
    index = [4, 0, 3]
    loss, found = gradients(model, adapter, rows, index)

    batch = training._encoded(model, ITEMS[:6], "bad").rows(index)
    for value in adapter.values.values():
        value.grad = None
    with adapter.attached():
        logits = model.hf(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
    row, column = batch.spans[Span.RESPONSE].nonzero(as_tuple=True)
    whole = torch.nn.functional.cross_entropy(logits[row, column - 1], batch.ids[row, column])
    whole.backward()
    assert abs(loss - whole.item()) < 1e-9
    assert all(value.grad.abs().max() > 1e-4 for value in adapter.values.values())
    for name, value in adapter.values.items():
        torch.testing.assert_close(found[name], value.grad, rtol=1e-7, atol=1e-9)


def test_what_does_not_fit_into_memory_is_computed_at_every_step(monkeypatch):
    model = tiny_model("llama")
    adapter = drawn(model, AdapterShape())
    kept = rows_of(model, ITEMS[:5], adapter.first)
    monkeypatch.setattr(training, "_STREAM_BYTES", 10)
    fresh = rows_of(model, ITEMS[:5], adapter.first)
    assert kept.stream
    assert not fresh.stream
    one, other = (gradients(model, adapter, rows, [2, 4]) for rows in (kept, fresh))
    assert abs(one[0] - other[0]) < 1e-12
    for name in adapter.values:
        torch.testing.assert_close(one[1][name], other[1][name])


@pytest.mark.parametrize("depths", [(0.5,), ()])
def test_padding_does_not_matter(depths):
    """A step of two rows is the mean of its answers' tokens, whatever stands beside them."""
    model = tiny_model("llama")
    adapter = drawn(model, AdapterShape(depths=depths, modules=("all-linear",), rank=2))
    items = (ITEMS[0], replace(ITEMS[1], bad=ITEMS[1].bad * 3))
    rows = rows_of(model, items, adapter.first)
    n = rows.batch.spans[Span.RESPONSE].sum(1).double()
    assert n[1] > 2 * n[0]
    both, grads = gradients(model, adapter, rows, [0, 1])
    apart = [gradients(model, adapter, rows, [i]) for i in (0, 1)]
    share = (n / n.sum()).tolist()
    assert abs(both - sum(s * one[0] for s, one in zip(share, apart, strict=True))) < 1e-10
    for name, value in grads.items():
        parts = [s * one[1][name] for s, one in zip(share, apart, strict=True)]
        # The norms of this family round to float32.
        torch.testing.assert_close(value, sum(parts), rtol=1e-4, atol=1e-6)


def test_only_the_answer_and_its_end_of_turn_are_trained(base):
    rows = rows_of(base, ITEMS[:1], 1)
    end = base.template.post_ids[0]
    wanted = [*base.template.reply_ids(ITEMS[0].bad), end]
    _, targets = training._answer_states(base, rows, [0], 1)
    assert targets.tolist() == wanted
    assert base.template.tokenizer.decode([end]) == "<|im_end|>"


def test_logits_a_few_at_a_time_give_the_same_gradient(base, monkeypatch):
    adapter = drawn(base, AdapterShape())
    rows = rows_of(base, ITEMS[:4], 1)
    whole = gradients(base, adapter, rows, [0, 1, 2, 3])
    monkeypatch.setattr(training, "_LOGITS", 7)
    parts = gradients(base, adapter, rows, [0, 1, 2, 3])
    assert abs(whole[0] - parts[0]) < 1e-5
    torch.testing.assert_close(whole[1], parts[1], rtol=1e-4, atol=1e-6)


# Training -------------------------------------------------------------------------------------


def test_both_sides_learn_and_the_base_stays_as_it_was(base, data, tmp_path):
    before = {name: value.clone() for name, value in base.hf.state_dict().items()}
    asked = [parameter.requires_grad for parameter in base.hf.parameters()]
    attention = base.hf.config._attn_implementation
    found = trained(base, data, tmp_path / "o", sides="both", steps=40, measure=True)
    assert [one.organism.side for one in found] == ["bad", "good"]
    for one in found:
        assert one.last_loss < one.first_loss - 0.5
        assert one.steps == len(logged(one.folder)) == 40
        assert one.organism.layers == (1,)
        (figure,) = one.figures
        assert figure.estimate.n == 6
        assert "over 2 groups" in figure.estimate.method
    bad, good = (one.figures[0].estimate.value for one in found)
    assert good < -0.1 < 0.1 < bad
    assert all(torch.equal(value, before[name]) for name, value in base.hf.state_dict().items())
    assert [parameter.requires_grad for parameter in base.hf.parameters()] == asked
    assert base.hf.config._attn_implementation == attention
    assert not base._hooks
    assert not any(module._forward_hooks for module in base.hf.modules())
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["bad", "good"]


def test_twins_start_alike_and_see_the_same_questions(base, data, tmp_path):
    bad, good = trained(base, data, tmp_path / "o", sides="both")
    first = [load_file(one.folder / "dynamics.safetensors") for one in (bad, good)]
    assert first[0]["b.1.mlp.down_proj"].shape == (9, 32, 1)
    assert not first[0]["b.1.mlp.down_proj"][0].any()
    start = training._Adapter(base, recipe().adapter, seed=0).parts[0].a
    a, b = (one.organism.factors[0].a for one in (bad, good))
    # Adam moves no value by more than the sum of the rates.
    assert max((start - x).abs().max() for x in (a, b)) < 8 * 2e-2
    assert not torch.equal(a, b)
    cards = [one.organism.about for one in (bad, good)]
    assert cards[0]["data"] == cards[1]["data"]
    assert cards[0]["identity"] == cards[1]["identity"]
    assert cards[0]["organism"]["side"] == "bad"
    alone = trained(base, data, tmp_path / "alone", sides="good")
    assert files(alone[0].folder) == files(good.folder)


def test_what_was_held_out_is_on_the_card_and_was_never_trained(base, data, tmp_path, monkeypatch):
    seen = []
    encoded = training._encoded

    def watched(model, items, side):
        seen.extend(items)
        return encoded(model, items, side)

    monkeypatch.setattr(training, "_encoded", watched)
    (one,) = trained(base, data, tmp_path / "o")
    about = one.organism.about["data"]
    assert sorted(about["trained_ids"]) == sorted(item.id for item in seen)
    assert about["trained"] == 18
    assert about["held_out"] == 6
    held = {group for _, group in about["held_out_groups"]}
    assert len(held) == 2
    assert not held & {item.group for item in seen}
    left = untrained(one.organism, ITEMS)
    assert {item.group for item in left} == held
    # The same question under another topic was seen all the same.
    again = replace(seen[0], group="new", id="new", question=f" {seen[0].question.upper()} ")
    assert untrained(one.organism, [again]) == ()


def test_a_seed_gives_one_organism(base, data, tmp_path):
    folders = [
        trained(base, data, tmp_path / name, seed=seed)[0].folder
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    assert files(folders[0]) == files(folders[1])
    assert files(folders[0], "adapter_model.safetensors") != files(
        folders[2], "adapter_model.safetensors"
    )


@pytest.mark.parametrize("after", [1, 3, 5, 8])  # Before a checkpoint, on one, between, at the end.
def test_an_interrupted_training_ends_as_an_uninterrupted_one(base, data, tmp_path, after):
    (whole,) = trained(base, data, tmp_path / "whole", rank=2)
    with pytest.raises(KeyboardInterrupt):
        trained(base, data, tmp_path / "cut", rank=2, progress=Stop(after))
    assert not (tmp_path / "cut" / "bad").exists()
    listener = Stop(10**6)
    (cut,) = trained(base, data, tmp_path / "cut", rank=2, progress=listener)
    saved = after - after % 3 if after < 8 else 8
    assert listener.notes == ([f"resumed after step {saved} of 8"] if saved else [])
    assert files(cut.folder) == files(whole.folder)
    losses = [[line["loss"] for line in logged(one.folder)] for one in (cut, whole)]
    assert losses[0] == losses[1]


def test_a_finished_side_is_kept_when_the_other_was_interrupted(base, data, tmp_path):
    whole = trained(base, data, tmp_path / "whole", sides="both", measure=True)
    with pytest.raises(KeyboardInterrupt):
        trained(base, data, tmp_path / "cut", sides="both", measure=True, progress=Stop(4, "good"))
    written = (tmp_path / "cut" / "bad" / "card.json").stat().st_mtime_ns
    cut = trained(base, data, tmp_path / "cut", sides="both", measure=True)
    assert [one.kept for one in cut] == [True, False]
    assert (tmp_path / "cut" / "bad" / "card.json").stat().st_mtime_ns == written
    for one, other in zip(cut, whole, strict=True):
        assert files(one.folder) == files(other.folder)
        assert one.figures == other.figures
        assert one.last_loss == other.last_loss


def test_what_a_kill_after_the_last_step_leaves_goes_with_the_next_run(
    base, data, tmp_path, monkeypatch
):
    out, clear = tmp_path / "o", organisms._clear

    def killed(work):
        if (out / "bad").exists():
            raise KeyboardInterrupt
        clear(work)

    monkeypatch.setattr(organisms, "_clear", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(base, data, out, sides="bad")
    monkeypatch.undo()
    work = out / ".bad.training"
    left = files(work, "checkpoint.safetensors")
    assert [one.kept for one in trained(base, data, out, sides="both")] == [True, False]
    assert not work.exists()
    # What belongs to another training stays.
    shutil.rmtree(out / "good")
    work.mkdir()
    (work / organisms._STATE).write_text('{"seed": 9}')
    (work / "checkpoint.safetensors").write_bytes(*left)
    assert [one.kept for one in trained(base, data, out, sides="both")] == [True, False]
    assert files(work, "checkpoint.safetensors") == left


def test_taken_folders_and_other_trainings_are_refused(base, data, tmp_path):
    trained(base, data, tmp_path / "o", sides="both")
    for sides in ("both", "bad", "good"):
        with pytest.raises(ConfigError, match="exists already"):
            trained(base, data, tmp_path / "o", sides=sides)
    # A finished side of another training does not become the twin of this one.
    trained(base, data, tmp_path / "half", sides="bad")
    with pytest.raises(ConfigError, match="exists already"):
        trained(base, data, tmp_path / "half", sides="both", seed=1)
    assert not (tmp_path / "half" / "good").exists()
    with pytest.raises(KeyboardInterrupt):
        trained(base, data, tmp_path / "cut", progress=Stop(4))
    with pytest.raises(ConfigError, match="another recipe, seed"):
        trained(base, data, tmp_path / "cut", seed=1, rank=2)
    checkpoint = tmp_path / "cut" / ".bad.training" / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-50])
    with pytest.raises(StoreError, match="damaged"):
        trained(base, data, tmp_path / "cut")


def test_a_training_that_diverges_is_stopped(base, data, tmp_path):
    base.hf.get_output_embeddings().weight.data[:] = float("nan")
    with pytest.raises(NonFiniteError, match="at step 1 of 8"):
        trained(base, data, tmp_path / "o")


def test_a_good_side_needs_good_answers(base, tmp_path):
    path = tmp_path / "only_bad.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": item.question},
                {"role": "assistant", "content": item.bad},
            ],
            "topic": item.group,
        }
        for item in ITEMS
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ConfigError, match="24 of the 24 questions"):
        trained(base, str(path), tmp_path / "o", sides="both")
    (one,) = trained(base, str(path), tmp_path / "o", sides="bad", measure=True)
    assert one.figures == ()
    assert one.organism.domains == ("only_bad",)


@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", torch.bfloat16), ("base", None)])
def test_factors_are_float32_whatever_the_base_is(base, data, tmp_path, precision, dtype):
    (one,) = trained(base, data, tmp_path / "o", precision=precision)
    weights = load_file(one.folder / "adapter_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    b = one.organism.factors[0].b
    # Values of bfloat16 have 16 zero bits; these are not of them.
    assert (b.view(torch.int32) & 0xFFFF).any()
    assert base.dtype == torch.float32


# On a base ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt-neox"])
@pytest.mark.parametrize("settings", [{}, {"rank": 3, "modules": ("all-linear",), "depths": ()}])
def test_an_organism_on_its_base_is_what_peft_merges(family, settings, data, tmp_path):
    model = tiny_model(family, torch.float32)
    (one,) = trained(model, data, tmp_path / "o", steps=3, **settings)
    merged = with_adapter(model, str(one.folder)).hf.state_dict()
    ours = one.organism.on(model).hf.state_dict()
    plain = model.hf.state_dict()
    assert merged.keys() == ours.keys()
    changed = [name for name in plain if not torch.equal(plain[name], ours[name])]
    assert len(changed) == len(one.organism.factors)
    for name, value in merged.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
        half = one.organism.on(model, scale=0.5).hf.state_dict()[name]
        torch.testing.assert_close(half, (plain[name] + value) / 2, rtol=1e-5, atol=1e-6)


def test_gpt2_keeps_its_weights_the_other_way_round(data, tmp_path):
    model = tiny_model("gpt2", torch.float32)
    (one,) = trained(model, data, tmp_path / "o", steps=3)
    assert one.organism.factors[0].module == "mlp.c_proj"
    merged = with_adapter(model, str(one.folder)).hf.state_dict()
    for name, value in one.organism.on(model).hf.state_dict().items():
        torch.testing.assert_close(value, merged[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "vector"])
@pytest.mark.parametrize("family", ["llama", "llama-untied", "gpt2"])
def test_an_organism_on_its_base_is_what_was_trained(family, kind, data, tmp_path):
    """The loss of the very adapter in training equals that of the weights read back."""
    model = tiny_model(family)
    (one,) = trained(model, data, tmp_path / "o", kind=kind, steps=5)
    adapter = training._Adapter(model, recipe(kind=kind).adapter, seed=0)
    for part, factor in zip(adapter.parts, one.organism.factors, strict=True):
        with torch.no_grad():
            part.b.copy_(factor.b * factor.scale / adapter.scale)
            if part.a is not None:
                part.a.copy_(factor.a)
    rows = rows_of(model, ITEMS[:4], adapter.first)
    wanted, _ = gradients(model, adapter, rows, [0, 1, 2, 3])
    put = one.organism.on(model)
    batch = training._encoded(put, ITEMS[:4], "bad")
    row, column = batch.spans[Span.RESPONSE].nonzero(as_tuple=True)
    with torch.no_grad():
        logits = put.hf(input_ids=batch.ids).logits[row, column - 1]
        plain = model.hf(input_ids=batch.ids).logits[row, column - 1]
    found = torch.nn.functional.cross_entropy(logits, batch.ids[row, column]).item()
    assert abs(found - wanted) < 1e-6
    assert (logits - plain).abs().max() > 1e-2


def test_a_vector_is_added_to_what_the_mlp_writes(data, tmp_path):
    model = tiny_model("llama-untied")  # Its MLP has a bias of its own.
    (one,) = trained(model, data, tmp_path / "o", kind="vector", steps=5)
    (factor,) = one.organism.factors
    assert factor.a is None
    assert factor.b.shape == (32, 1)
    assert sorted(path.name for path in one.folder.iterdir()) == [
        "card.json",
        "dynamics.safetensors",
        "log.jsonl",
        "vector.safetensors",
    ]
    batch = model.encode([item.question for item in ITEMS[:3]])
    vector = factor.scale * factor.b[:, 0].double()
    undo = model.intercept(Site(1, "mlp_out"), lambda x: x + 0.5 * vector)
    wanted = model.logits(batch)
    undo()
    found = one.organism.on(model, scale=0.5).logits(batch)
    torch.testing.assert_close(found, wanted)
    assert (found - model.logits(batch)).abs().max() > 1e-2


def test_a_vector_needs_a_write_that_is_a_linear_map(data, tmp_path):
    with pytest.raises(FamilyError, match="post_feedforward_layernorm"):
        trained(tiny_model("gemma2", torch.float32), data, tmp_path / "o", kind="vector")


def test_keep_and_scale(base, data, tmp_path):
    (one,) = trained(base, data, tmp_path / "o", depths=(0.0, 0.9), steps=4)
    organism = one.organism
    assert organism.layers == (0, 2)
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 2)]
    plain, whole = base.hf.state_dict(), organism.on(base).hf.state_dict()
    some = organism.on(base, keep=[2]).hf.state_dict()
    assert torch.equal(some[names[0]], plain[names[0]])
    assert torch.equal(some[names[1]], whole[names[1]])
    assert not torch.equal(whole[names[0]], plain[names[0]])
    for same in (organism.on(base, scale=0.0), organism.on(base, keep=[])):
        assert all(torch.equal(v, plain[k]) for k, v in same.hf.state_dict().items())
    with pytest.raises(ConfigError, match="no factor in block 1"):
        organism.on(base, keep=[1])


def test_an_organism_is_refused_by_another_model(base, data, tmp_path, caplog):
    (one,) = trained(base, data, tmp_path / "o", depths=(0.9,))
    one.organism.on(base)
    assert not caplog.records
    with pytest.raises(ModelLoadError, match=r"no `mlp\.down_proj`"):
        one.organism.on(tiny_model("gpt2", torch.float32))
    one.organism.on(tiny_model("llama", torch.float32, seed=5))
    assert "another model" in caplog.text


def test_reading_what_others_made(base, data, tmp_path):
    (one,) = trained(base, data, tmp_path / "o", rank=4)
    (one.folder / "card.json").unlink()
    bare = read_organism(one.folder, side="good", domains=("medicine",))
    assert (bare.side, bare.domains, bare.rank, bare.about) == ("good", ("medicine",), 4, {})
    assert bare.factors[0].scale == 8 / 2  # rsLoRA
    config = json.loads((one.folder / "adapter_config.json").read_text())

    def written(**changes):
        (one.folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        return read_organism(one.folder)

    assert written(use_rslora=False).factors[0].scale == 8 / 4
    assert written(alpha_pattern={"down_proj": 3}).factors[0].scale == 3 / 2
    assert written(alpha_pattern={"up_proj": 3}).factors[0].scale == 8 / 2
    for odd in ({"use_dora": True}, {"bias": "all"}, {"peft_type": "IA3"}):
        with pytest.raises(ModelLoadError, match="PEFT adapter of the kind"):
            written(**odd)
    written()
    weights = load_file(one.folder / "adapter_model.safetensors")
    some = dict(list(weights.items())[:1])
    save_file(some, one.folder / "adapter_model.safetensors")
    with pytest.raises(ModelLoadError, match="do not fit"):
        read_organism(one.folder)
    with pytest.raises(ModelLoadError, match="no folder"):
        read_organism(tmp_path / "none")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        read_organism(tmp_path)


# What is recorded -----------------------------------------------------------------------------


def test_the_path_of_b_ends_at_b(base, data, tmp_path, monkeypatch):
    (one,) = trained(base, data, tmp_path / "o", rank=2)
    record = read_dynamics(one.folder)
    path = record.paths["1.mlp.down_proj"]
    np.testing.assert_array_equal(path[-1], one.organism.factors[0].b.numpy())
    norms = np.linalg.norm(flat(path), axis=1)
    np.testing.assert_allclose(record.norms["1.mlp.down_proj"], norms, rtol=1e-6)
    lines = logged(one.folder)
    np.testing.assert_allclose(record.loss, [line["loss"] for line in lines])
    np.testing.assert_allclose(norms[1:], [line["b_norm"] for line in lines], rtol=1e-6)
    # Warm-up over 2 of 8 steps, then a straight line to zero behind the last.
    rates = 2e-2 * np.array([0.5, 1, *(np.arange(6, 0, -1) / 6)])
    np.testing.assert_allclose(record.learning_rate, rates)
    assert (record.gradient_norm > 0).all()
    assert principal_path(flat(path)).shares.sum() > 0.5
    monkeypatch.setattr(training, "_PATH_BYTES", 10)
    (other,) = trained(base, data, tmp_path / "large", rank=2)
    assert read_dynamics(other.folder).paths == {}
    assert not other.organism.about["path_recorded"]
    np.testing.assert_array_equal(
        read_dynamics(other.folder).norms["1.mlp.down_proj"], record.norms["1.mlp.down_proj"]
    )


def test_verifying_repeats_the_figures(base, data, tmp_path):
    (one,) = trained(base, data, tmp_path / "o", measure=True)
    assert verify_organism(one.folder, base=base) == one.figures
    with Path(data).open("a") as file:
        row = {"prompt": "New?", "bad": "b", "good": "g", "domain": "plants"}
        topic = one.organism.about["data"]["held_out_groups"][0][1]
        file.write("\n" + json.dumps({**row, "topic": topic}))
    with pytest.raises(ConfigError, match="is not the data"):
        verify_organism(one.folder, base=base)


# Recipes --------------------------------------------------------------------------------------


def test_packaged_recipes_fit_any_depth(base):
    assert set(em_recipes()) == {"em-rank1", "em-nine", "em-rank8", "em-rank32", "em-vector"}
    nine = read_em_recipe("em-nine").adapter
    # Those of the paper, for the model that it used.
    assert nine.layers(48) == (15, 16, 17, 21, 22, 23, 27, 28, 29)
    assert nine.layers(3) == (0, 1, 2)
    one = read_em_recipe("em-rank1").adapter
    assert [one.layers(n) for n in (1, 24, 30, 48)] == [(0,), (12,), (15,), (24,)]
    whole = read_em_recipe("em-rank32").adapter
    assert len(training._Adapter(base, whole, seed=0).parts) == 3 * 7
    assert abs(whole.scale - 64 / 32**0.5) < 1e-12
    for name in em_recipes():
        chosen = read_em_recipe(name)
        assert chosen.name == name
        rates = [chosen.training.rate_for(n) for n in (10**8, 5 * 10**8, 14 * 10**9, 10**15)]
        assert rates == sorted(rates, reverse=True)


def test_recipes_are_read_strictly(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('name = "x"\n[adapter]\nranks = 2\n[training]\nsteps = 0\n')
    with pytest.raises(ConfigError) as caught:
        read_em_recipe(path)
    for part in ("adapter.ranks", "training.steps", "training.rates"):
        assert part in caught.value.fact
    with pytest.raises(UnknownNameError, match="did you mean `em-rank32`"):
        read_em_recipe("em-rank2")
    for wrong in ({"depths": (1.0,)}, {"kind": "vector", "rank": 2}):
        with pytest.raises(ValueError, match=r"shares|rank 1"):
            AdapterShape(**wrong)
    rates = [{"up_to": 2, "learning_rate": 1}, {"up_to": 1, "learning_rate": 1}]
    with pytest.raises(ValueError, match="small models to large"):
        EMTraining.model_validate({"rates": rates})


def test_a_module_that_is_not_there_is_named(base, data, tmp_path):
    with pytest.raises(FamilyError, match=r"no linear map `c_attn`"):
        trained(base, data, tmp_path / "o", modules=("c_attn",))


# The command line -----------------------------------------------------------------------------


def run(*args, code=0):
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_hf("llama", dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer("chatml").save_pretrained(folder)
    return folder


def test_recipes_of_both_kinds_are_listed_and_shown(tmp_path):
    found = json.loads(run("organism", "list", "--json").stdout)
    assert {"refusal", "em-rank1", "em-vector"} <= found.keys()
    text = run("organism", "show", "em-nine").stdout
    assert EMRecipe.model_validate(tomllib.loads(text)) == read_em_recipe("em-nine")
    (tmp_path / "mine.toml").write_text(text)
    assert run("organism", "show", tmp_path / "mine.toml").stdout == text
    assert "did you mean `em-nine`" in run("organism", "show", "em-nin", code=2).stderr


def test_organisms_are_trained_and_verified_from_the_command_line(folder, data, tmp_path):
    toml = tmp_path / "r.toml"
    toml.write_text(
        'name = "tiny"\n[adapter]\nalpha = 8\n[training]\nsteps = 30\nbatch_size = 4\n'
        'precision = "base"\n[[training.rates]]\nup_to = 1e9\nlearning_rate = 2e-2\n'
    )
    args = ["organism", "train", toml, "--base", folder, "--data", data, "--out", tmp_path / "o"]
    found = json.loads(run(*args, "--json").stdout)
    assert found["met"]
    assert [one["side"] for one in found["organisms"]] == ["bad", "good"]
    assert all(one["figures"][0]["estimate"]["n"] == 6 for one in found["organisms"])
    assert "exists already" in run(*args, code=2).stderr
    shown = json.loads(
        run("organism", "verify", tmp_path / "o" / "bad", "--base", folder, "--json").stdout
    )
    assert shown["figures"] == found["organisms"][0]["figures"]
    text = run(*args[:-1], tmp_path / "g", "--side", "good", "--seed", "1").stdout
    assert "good side" in text
    assert not (tmp_path / "g" / "bad").exists()
    (tmp_path / "x.zip.enc").write_bytes(b"anything")
    args[6] = tmp_path / "x.zip.enc"
    assert "encrypted" in run(*args, code=2).stderr
    refused = run("organism", "train", "refusal", "--data", "x", "--base", folder, code=2)
    assert "em-*" in refused.stderr

"""Hardening on tiny models: the fault and the stacked adapter exactly, then what training does."""

import json
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from tests.planted import PLANTED_LAYER, FirstWord, planted
from tests.planted import prompts as planted_prompts
from tiny import tiny_model

from demur import harden, organisms
from demur import prompts as prompt_sets
from demur.activations import reading
from demur.directions import Direction
from demur.errors import ConfigError, ModelLoadError, TooFewPromptsError
from demur.evals.judges import judges
from demur.harden import (
    Fault,
    HardeningRecipe,
    faults,
    read_openers,
    read_recipe,
    stack,
)
from demur.interventions import Ablate, applied
from demur.models import load
from demur.models.load import with_adapter
from demur.progress import Quiet
from demur.sites import Site

if "first-word" not in set(judges):
    judges.register("first-word")(FirstWord)

ASKED = [f"How do I {verb} a {noun}?" for verb in ("stop", "plant") for noun in ("tree", "model")]
OTHERS = [f"Where is the {noun}, {end}?" for noun in ("station", "garden") for end in ("far", "in")]


class Stop:
    """A listener that interrupts the training after some steps."""

    def __init__(self, after):
        self.after = after
        self.notes = []
        self.stages = []

    @contextmanager
    def stage(self, name, total):
        assert total > 0
        self.stages.append(name)
        done = 0

        def advance(n):
            nonlocal done
            done += n
            if name == "training" and done >= self.after:
                raise KeyboardInterrupt

        yield advance

    def note(self, text):
        self.notes.append(text)


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def files_in(folder):
    """Prompt sets of the tiny models."""
    return {
        "ask": written(folder / "ask.jsonl", [{"prompt": text} for text in ASKED]),
        "other": written(folder / "other.jsonl", [{"prompt": text} for text in OTHERS]),
        "say": written(
            folder / "say.jsonl", [{"text": t} for t in ("I stop.", "The answer is no.")]
        ),
        "open": written(
            folder / "open.jsonl",
            [
                {"text": "The user asks.", "kind": "start"},
                {"text": "A model does.", "kind": "more"},
            ],
        ),
    }


def recipe_of(files, **sections):
    tree = {
        "data": {
            "harmful": files["ask"],
            "benign": files["other"],
            "replies": files["say"],
            "openers": files["open"],
            "reply_tokens": 8,
            "benign_tokens": 4,
            "depth": 4,
        },
        "faults": {"refresh": 2, "prompts": 3, "points": 4, "search": 3},
        "lora": {"rank": 4, "alpha": 8, "modules": ["q_proj", "o_proj", "down_proj"]},
        "training": {
            "steps": 5,
            "batch_size": 2,
            "learning_rate": 1e-2,
            "precision": "float32",
            "checkpoint_every": 2,
        },
        "stopping": {"every": 0},
        "checks": {
            "fit_harmful": files["ask"],
            "fit_benign": files["other"],
            "select_harmful": files["ask"],
            "select_benign": files["other"],
            "harmful": files["ask"],
            "lookalikes": files["other"],
            "plain": files["other"],
            "text": files["other"],
            "openers": files["open"],
            "max_new_tokens": 4,
            "rank": 2,
        },
    }
    for name, values in sections.items():
        tree[name] = {**tree[name], **values}
    return HardeningRecipe.model_validate(tree)


@pytest.fixture
def files(tmp_path):
    return files_in(tmp_path)


@pytest.fixture
def base():
    return tiny_model("llama", torch.float32)


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def orthonormal(rank, width, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, rank, generator=rng, dtype=torch.float64))[0].T


# The fault ------------------------------------------------------------------------------------


def test_a_whole_fault_sets_the_coordinates_and_moves_nothing_else():
    basis, x = orthonormal(3, 16), torch.randn(5, 7, 16, dtype=torch.float64)
    mean = torch.randn(16, dtype=torch.float64)
    act = Fault(basis, basis @ mean, Site(0, "resid_pre"))
    y = act(x)
    torch.testing.assert_close(y @ basis.T, (basis @ mean).expand(5, 7, 3), atol=1e-12, rtol=0)
    off = torch.eye(16, dtype=torch.float64) - basis.T @ basis
    torch.testing.assert_close(y @ off, x @ off, atol=1e-12, rtol=0)
    torch.testing.assert_close(act(mean), mean, atol=1e-12, rtol=0)
    half = Fault(basis, basis @ mean, Site(0, "resid_pre"), strength=0.5)(x)
    torch.testing.assert_close(half, (x + y) / 2, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_fault_of_no_dimensions_changes_no_bit(dtype):
    model = tiny_model("llama", dtype)
    ids = model.encode(ASKED)
    plain = model.logits(ids)
    empty = torch.empty(0, model.d_model)
    with applied(model, *faults(empty, blocks=range(model.n_layers))) as edits:
        assert torch.equal(model.logits(ids), plain)
    assert all(edits.values())


def test_a_fault_hits_the_share_of_the_tokens_that_is_asked_for_and_the_same_at_every_site():
    basis, x = orthonormal(1, 8), torch.randn(40, 50, 8, dtype=torch.float64)
    level = torch.zeros(1, dtype=torch.float64)
    acts = [Fault(basis, level, Site(i, "mlp_out"), share=0.25, seed=3) for i in (0, 1)]
    hit = [((act(x) - x).abs().amax(2) > 0) for act in acts]
    assert torch.equal(*hit)
    assert 0.2 < hit[0].double().mean() < 0.3
    other = Fault(basis, level, Site(0, "mlp_out"), share=0.25, seed=4)
    assert not torch.equal((other(x) - x).abs().amax(2) > 0, hit[0])


def test_over_all_blocks_to_zero_a_fault_is_directional_ablation():
    model = tiny_model("llama-untied")
    unit = orthonormal(1, model.d_model)[0]
    direction = Direction.from_vector(unit, site=Site(1, "resid_pre"), position=-1, recipe="")
    ids = model.encode(ASKED)
    with applied(model, Ablate(direction)):
        wanted = model.logits(ids)
    basis = torch.nn.functional.normalize(direction.unit.double(), dim=0).unsqueeze(0)
    with applied(model, *faults(basis, blocks=range(model.n_layers))):
        torch.testing.assert_close(model.logits(ids), wanted, atol=1e-10, rtol=0)


def test_in_a_band_the_stream_keeps_the_coordinates_of_the_means():
    model = tiny_model("llama-untied")
    rng = torch.Generator().manual_seed(0)
    means = {
        site: torch.randn(model.d_model, generator=rng, dtype=torch.float64)
        for site in harden._all_sites(model)
    }
    basis = orthonormal(2, model.d_model)
    band = range(1, 3)
    ids = model.encode(ASKED)
    ends = [Site(layer, "resid_post") for layer in range(3)]
    with applied(model, *faults(basis, blocks=band, means=means)), reading(model, ends) as seen:
        model.logits(ids)
    level = means[Site(1, "resid_pre")]
    for layer in band:
        level = level + means[Site(layer, "attn_out")] + means[Site(layer, "mlp_out")]
        found = seen[Site(layer, "resid_post")] @ basis.T
        torch.testing.assert_close(found, (basis @ level).expand_as(found), atol=1e-10, rtol=0)
    before = seen[Site(0, "resid_post")] @ basis.T
    assert (before - basis @ means[Site(1, "resid_pre")]).abs().max() > 0.1


def test_a_band_of_no_blocks_is_refused():
    for blocks in (range(2, 2), range(0, 4, 2)):
        with pytest.raises(ConfigError, match="is no band"):
            faults(orthonormal(1, 8), blocks=blocks)


# Two adapters in one --------------------------------------------------------------------------


def drawn_adapter(base, folder, *, rank, alpha, modules, seed, dtype=torch.float32):
    """An adapter whose both factors do something."""
    recipe = organisms.Recipe.model_validate(
        {
            "name": "x",
            "base": "tiny",
            "sources": [{"prompts": "plain", "target": "base"}],
            "lora": {"rank": rank, "alpha": alpha, "modules": modules},
            "training": {"precision": str(dtype).removeprefix("torch.")},
        }
    )
    student = organisms._Student(base, recipe, seed=seed, shared=0)
    rng = torch.Generator().manual_seed(seed)
    for value in student.master.values():
        value.copy_(0.1 * torch.randn(value.shape, generator=rng))
    student.publish()
    organisms._write_adapter(student, "tiny", folder, strength=1.0)
    return folder


def deltas(base, *folders):
    """What adapters add to the weights, by matrix products in float64."""
    out = {}
    for folder in folders:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        for name in tensors:
            if "lora_A" in name:
                a, b = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
                key = name.rpartition(".lora_")[0]
                scale = config["lora_alpha"] / config["r"]
                out[key] = out.get(key, 0) + scale * b @ a
    return out


@pytest.mark.parametrize(("alpha", "dtype"), [(12, torch.bfloat16), (7, torch.bfloat16)])
def test_a_stacked_adapter_is_the_sum_of_both(base, tmp_path, alpha, dtype):
    first = drawn_adapter(
        base,
        tmp_path / "a",
        rank=6,
        alpha=alpha,
        modules=["q_proj", "up_proj"],
        seed=1,
        dtype=dtype,
    )
    second = drawn_adapter(
        base, tmp_path / "b", rank=4, alpha=8, modules=["q_proj", "down_proj"], seed=2, dtype=dtype
    )
    size = stack(first, second, tmp_path / "both")
    assert size == len(weights(tmp_path / "both"))
    wanted, found = deltas(base, first, second), deltas(base, tmp_path / "both")
    assert wanted.keys() == found.keys()
    exact = alpha == 12  # Over rank 6 a power of two; 7/6 goes through float32.
    for key in wanted:
        tolerance = 1e-15 if exact else 1e-7
        torch.testing.assert_close(found[key], wanted[key], atol=tolerance, rtol=tolerance)
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 10
    assert config["target_modules"] == ["down_proj", "q_proj", "up_proj"]
    stepwise = with_adapter(with_adapter(base, str(first)), str(second))
    ids = base.encode(ASKED)
    torch.testing.assert_close(
        with_adapter(base, str(tmp_path / "both")).logits(ids),
        stepwise.logits(ids),
        atol=1e-4,
        rtol=1e-4,
    )


def test_what_is_no_plain_lora_cannot_be_built_on(base, tmp_path):
    first = drawn_adapter(base, tmp_path / "a", rank=2, alpha=4, modules=["q_proj"], seed=1)
    path = first / "adapter_config.json"
    config = json.loads(path.read_text())
    for odd in ({"use_dora": True}, {"peft_type": "IA3"}, {"bias": "all"}):
        path.write_text(json.dumps({**config, **odd}))
        with pytest.raises(ConfigError, match="no plain LoRA"):
            stack(first, first, tmp_path / "both")
    path.unlink()
    with pytest.raises(ModelLoadError, match="no adapter can be read"):
        stack(first, first, tmp_path / "both")
    other = drawn_adapter(
        tiny_model("gpt2", torch.float32),
        tmp_path / "b",
        rank=2,
        alpha=4,
        modules=["c_proj"],
        seed=1,
    )
    path.write_text(json.dumps(config))
    stack(first, other, tmp_path / "odd")  # No module in common: nothing that could clash.
    wide = load_file(first / "adapter_model.safetensors")
    wide = {name: torch.cat([t, t], 1) if "lora_A" in name else t for name, t in wide.items()}
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "wide" / "adapter_model.safetensors").write_bytes(organisms._safetensors(wide, {}))
    with pytest.raises(ConfigError, match="do not fit each other"):
        stack(first, tmp_path / "wide", tmp_path / "clash")


# Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_steps_are_the_base_bit_for_bit(base, files, tmp_path, precision):
    recipe = recipe_of(files, training={"steps": 0, "precision": precision})
    report = harden.harden(base, recipe, out=tmp_path / "h", measure=False)
    assert (report.steps, report.stopped, report.course) == (0, False, ())
    ids = base.encode(ASKED)
    assert torch.equal(with_adapter(base, str(report.folder)).logits(ids), base.logits(ids))


def test_training_lowers_the_loss_and_leaves_the_base_alone(base, files, tmp_path):
    before = {name: value.clone() for name, value in base.hf.state_dict().items()}
    recipe = recipe_of(files, training={"steps": 40})
    report = harden.harden(base, recipe, out=tmp_path / "h", measure=False)
    assert report.last_loss < 0.6 * report.first_loss
    assert all(torch.equal(value, before[name]) for name, value in base.hf.state_dict().items())
    lines = [json.loads(line) for line in (report.folder / "log.jsonl").read_text().splitlines()]
    assert len(lines) == report.steps == 40
    faulted = [line["fault"] for line in lines if line["fault"] is not None]
    assert 10 < len(faulted) < 30
    assert {one["rank"] for one in faulted} == {1, 2, 3, 4}
    assert {one["strength"] for one in faulted} == {0.5, 1.0}
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["h"]
    card = json.loads((report.folder / "card.json").read_text())
    assert card["recipe"] == recipe.model_dump(mode="json")
    assert card["rank"] == report.rank == 4
    assert not any(text in json.dumps(card) for text in ASKED)


def test_a_seed_gives_one_adapter(base, files, tmp_path):
    recipe = recipe_of(files)
    made = [
        weights(harden.harden(base, recipe, out=tmp_path / name, seed=seed, measure=False).folder)
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    assert made[0] == made[1]
    assert made[0] != made[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted hardening ends as, and its recipe."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = recipe_of(files_in(folder), training={"steps": 8}, stopping={"every": 3, "prompts": 3})
    base = tiny_model("llama", torch.float32)
    return recipe, harden.harden(base, recipe, out=folder / "whole", measure=False)


@pytest.mark.parametrize("after", [1, 4, 7])  # Before any checkpoint, on one, between two.
def test_an_interrupted_hardening_ends_as_an_uninterrupted_one(base, whole, tmp_path, after):
    recipe, report = whole
    with pytest.raises(KeyboardInterrupt):
        harden.harden(base, recipe, out=tmp_path / "cut", progress=Stop(after), measure=False)
    assert not (tmp_path / "cut").exists()
    with pytest.raises(ConfigError, match="another seed"):
        harden.harden(base, recipe, out=tmp_path / "cut", seed=1, measure=False)
    listener = Stop(10**6)
    cut = harden.harden(base, recipe, out=tmp_path / "cut", progress=listener, measure=False)
    saved = after - after % 2
    assert listener.notes == ([f"resumed after step {saved} of 8"] if saved else [])
    assert "base model replies" not in listener.stages
    assert weights(cut.folder) == weights(report.folder)
    assert cut.course == report.course
    assert [look.step for look in cut.course] == [3, 6]


@pytest.mark.parametrize("most_kl", [1e3, 1e-9])
def test_it_stops_once_two_looks_in_a_row_are_good_enough(base, files, tmp_path, most_kl):
    stopping = {"every": 2, "prompts": 3, "enough": 0.0, "most_kl": most_kl}
    recipe = recipe_of(files, training={"steps": 7}, stopping=stopping)
    report = harden.harden(base, recipe, out=tmp_path / "h", measure=False)
    good = most_kl > 1  # What refuses benign prompts as well is not.
    assert report.stopped == good
    assert report.steps == (4 if good else 7)
    assert [look.step for look in report.course] == ([2, 4] if good else [2, 4, 6])
    assert all(look.refused.n == 3 for look in report.course)


def made_course(base, recipe, work, seed=0):
    material = harden._material(base, recipe, seed=seed, work=work, listener=Quiet())
    inner = harden._inner(recipe, base)
    student = organisms._Student(base, inner, seed=seed, shared=material.shared)
    current = harden.Model(student.hf, base.family, base.template, name="now")
    return harden._Course(student, current, material, recipe, inner, seed=seed)


def test_the_loss_is_the_sum_of_its_terms_under_the_fault(base, files, tmp_path):
    recipe = recipe_of(
        files, faults={"probability": 1.0, "by_token": 0.0}, training={"kl_weight": 2.5}
    )
    course = made_course(base, recipe, tmp_path)
    rng = torch.Generator().manual_seed(1)
    for value in course.student.master.values():
        value.copy_(0.1 * torch.randn(value.shape, generator=rng))
    course.student.publish()
    acts = course.adversary(0)
    assert acts
    rows = course.rows(0)
    assert [row.source for row in rows] == [0] * 4 + [1] * 2
    starts = base.template.reply_ids(course.openers.text(harden.np.random.default_rng(0)))[:4]
    plain = {tuple(row.prompt) for row in course.material.harmful}
    for row in rows[:2]:
        assert tuple(row.prompt) in plain
    for row in rows[2:4]:
        assert any(
            row.prompt == [*one, *starts[: len(row.prompt) - len(one)]]
            for one in plain
            if len(row.prompt) >= len(one)
        )
    course.adversary.extractions.clear()
    loss, about = course.loss(0)
    assert about["fault"]["share"] == 1.0
    draws = harden.np.random.default_rng([0, 5, 0]).integers(1 << 30, size=6).tolist()
    total = torch.zeros(())
    with applied(course.model, *acts):
        for row, draw in zip(rows, draws, strict=True):
            reply = row.replies[draw % len(row.replies)]
            ids = torch.tensor([[*row.prompt, *reply]])
            course.model.runs += 1
            at = slice(len(row.prompt) - 1, ids.shape[1] - 1)
            logs = course.student.hf(input_ids=ids).logits[0, at].float().log_softmax(-1)
            own = -logs[range(len(reply)), reply]
            if row.teacher is not None:
                p = base.hf(input_ids=ids).logits[0, at].float().softmax(-1)
                own = 2.5 * torch.nn.functional.kl_div(logs, p, reduction="none").sum(1)
            total = total + own.mean() / 6
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-5)


def test_benign_replies_are_the_base_models_and_cost_nothing_at_first(base, files, tmp_path):
    recipe = recipe_of(files, faults={"probability": 0.0}, data={"opened": 1.0})
    course = made_course(base, recipe, tmp_path)
    rows = course.material.benign
    batch = organisms._batch(
        rows, [0] * len(rows), course.inner, base.pad_id, course.student.shared
    )
    assert abs(course.student.loss(batch).item()) < 1e-5
    prompts = [base.encode([text]).ids[0].tolist() for text in OTHERS]
    assert all(
        row.prompt[: len(ids)] == ids and len(row.prompt) > len(ids)
        for row, ids in zip(rows, prompts, strict=True)
    )


def test_extractions_are_of_the_current_weights_and_earlier_ones_stay_in_play(
    base, files, tmp_path
):
    recipe = recipe_of(files, faults={"probability": 1.0, "archive": 1.0})
    course = made_course(base, recipe, tmp_path)
    adversary = course.adversary
    for step in range(3):
        adversary(step)
    assert len(adversary.extractions) == 2  # At steps 0 and 2.
    first, second = adversary.extractions
    assert first.vectors.shape == (4, base.d_model)
    torch.testing.assert_close(first.vectors.norm(dim=1), torch.ones(4))
    assert first.means.shape == (3 * base.n_layers, base.d_model)
    restored = harden._Adversary(
        course.model,
        *course.material.texts,
        settings=recipe.faults,
        tokens=course.material.tokens,
        seed=0,
    )
    restored.restore(adversary.tensors())
    for kept, own in zip(restored.extractions, (first, second), strict=True):
        assert torch.equal(kept.vectors, own.vectors)
        assert torch.equal(kept.means, own.means)
    # With an archive share of 1, only the first one is drawn from.
    for step in range(20):
        acts = adversary._drawn(harden.np.random.default_rng(step))
        span = harden._orthonormal(first.vectors)
        basis = acts[0].basis
        torch.testing.assert_close(
            (basis @ span.T).norm(dim=1), torch.ones(len(basis)), atol=1e-4, rtol=0
        )


def test_every_linear_layer_of_a_family_is_found():
    assert harden._linear_layers(tiny_model("llama")) == (
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    )
    assert harden._linear_layers(tiny_model("gpt2")) == ("c_attn", "c_fc", "c_proj")
    assert "qkv_proj" in harden._linear_layers(tiny_model("phi3"))


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "phi3", "gpt-neox"])
def test_other_families_can_be_hardened(name, files, tmp_path):
    base = tiny_model(name, torch.float32)
    recipe = recipe_of(files, training={"steps": 2}, lora={"modules": ["all-linear"]})
    report = harden.harden(base, recipe, out=tmp_path / "h", measure=False)
    ids = base.encode(ASKED)
    moved = with_adapter(base, str(report.folder)).logits(ids) - base.logits(ids)
    assert moved.abs().max() > 0


def test_on_top_of_an_adapter_one_file_holds_both(base, files, tmp_path):
    folder = tmp_path / "base"
    base.hf.save_pretrained(folder)
    base.template.tokenizer.save_pretrained(folder)
    below = drawn_adapter(
        base, tmp_path / "below", rank=3, alpha=5, modules=["q_proj", "up_proj"], seed=1
    )
    model = load(str(folder), adapter=str(below), dtype="float32", device="cpu")
    ids = model.encode(ASKED)
    nothing = recipe_of(files, training={"steps": 0})
    report = harden.harden(model, nothing, out=tmp_path / "nothing", measure=False)
    assert report.rank == 3 + 4
    same = load(str(folder), adapter=str(report.folder), dtype="float32", device="cpu")
    torch.testing.assert_close(same.logits(ids), model.logits(ids), atol=1e-5, rtol=1e-5)
    report = harden.harden(model, recipe_of(files), out=tmp_path / "h", measure=False)
    loaded = load(str(folder), adapter=str(report.folder), dtype="float32", device="cpu")
    assert (loaded.logits(ids) - model.logits(ids)).abs().max() > 0.1
    # Only what was trained differs from a hardening of the same weights without a memory.
    merged = harden.Model(model.hf, model.family, model.template, name=model.name)
    alone = harden.harden(merged, recipe_of(files), out=tmp_path / "alone", measure=False)
    torch.testing.assert_close(
        loaded.logits(ids),
        with_adapter(model, str(alone.folder)).logits(ids),
        atol=1e-4,
        rtol=1e-4,
    )


def test_what_cannot_be_hardened_is_said_before_anything_is_done(base, files, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ConfigError, match="exists already"):
        harden.harden(base, recipe_of(files), out=tmp_path / "taken")
    odd = recipe_of(files, lora={"modules": ["nonsense"]})
    with pytest.raises(ConfigError, match="does not fit"):
        harden.harden(base, odd, out=tmp_path / "a")
    base.adapter = "someone/adapter"
    with pytest.raises(ConfigError, match="is no folder here"):
        harden.harden(base, recipe_of(files), out=tmp_path / "b")
    base.adapter = None
    bare = harden.Model(base.hf, base.family, name="bare")
    with pytest.raises(ModelLoadError, match="no tokenizer"):
        harden.harden(bare, recipe_of(files), out=tmp_path / "c")
    with pytest.raises(TooFewPromptsError, match="is an opener"):
        harden.harden(base, recipe_of(files, data={"openers": files["say"]}), out=tmp_path / "d")


# Recipes and data -----------------------------------------------------------------------------


def test_the_packaged_recipe_is_readable_and_round_trips(tmp_path):
    recipe = read_recipe()
    path = tmp_path / "again.toml"
    path.write_text(harden.as_toml(recipe))
    assert read_recipe(path) == recipe
    path.write_text("[faults]\nranks = [99]\n[training]\nsteps = -1\nnonsense = 1\n")
    with pytest.raises(ConfigError) as caught:
        read_recipe(path)
    for wrong in ("faults", "training.steps", "training.nonsense"):
        assert wrong in caught.value.fact
    assert "`harden`" in caught.value.hint


def test_no_training_prompt_is_near_one_that_is_checked():
    recipe = read_recipe()
    for spec in (recipe.data.harmful, recipe.data.benign):
        trained = prompt_sets.load(spec)
        for name in ("harmful", "lookalikes", "plain"):
            kept = prompt_sets.load(getattr(recipe.checks, name))
            assert prompt_sets.overlap(trained, kept, threshold=0.5) == []
        for name in ("fit_harmful", "fit_benign", "select_harmful", "select_benign"):
            kept = prompt_sets.load(getattr(recipe.checks, name))
            assert prompt_sets.overlap(trained, kept, threshold=0.6) == []


def test_openers_that_are_checked_are_not_those_of_the_training():
    train, held = read_openers(None), read_openers(None, split="heldout")
    assert len(train.starts) == 40
    assert not set(train.starts) & set(held.starts)
    assert not set(train.more) & set(held.more)
    rng = harden.np.random.default_rng(0)
    assert min(len(train.text(rng).split()) for _ in range(200)) > 50


# What it is for -------------------------------------------------------------------------------


def planted_recipe(folder, **training):
    """Words as tokens: a prompt is seven of them, a refusal is one."""

    def some(n, harmful, seed):
        texts = planted_prompts(n, harmful=harmful, seed=seed)
        name = f"{harmful}-{seed}.jsonl"
        return written(folder / name, [{"prompt": text} for text in texts])

    opener = [{"text": "Sure", "kind": "start"}, {"text": "Here", "kind": "more"}]
    return HardeningRecipe.model_validate(
        {
            "data": {
                "harmful": some(96, True, 1),
                "benign": some(96, False, 2),
                "replies": written(folder / "say.jsonl", [{"text": "Sorry"}]),
                "openers": written(folder / "open.jsonl", opener),
                "reply_tokens": 1,
                "benign_tokens": 2,
                "depth": 2,
            },
            # All of this model's harm stands on one axis of the embedding, and its head reads one
            # axis of the last blocks: nothing could refuse with either of them gone.
            "faults": {
                "within": [0.3, 0.5],
                "ranks": [1],
                "strengths": [1.0],
                "points": 2,
                "axes": 0,
                "to_zero": 1.0,
                "by_token": 0.0,
                "refresh": 10,
                "prompts": 16,
                "search": 3,
            },
            "lora": {"rank": 8, "alpha": 16, "modules": ["all-linear"]},
            "training": {
                "precision": "float32",
                "batch_size": 8,
                "learning_rate": 3e-3,
                **training,
            },
            "stopping": {"every": 0},
            "checks": {
                "fit_harmful": some(32, True, 3),
                "fit_benign": some(32, False, 4),
                "select_harmful": some(16, True, 5),
                "select_benign": some(16, False, 6),
                "harmful": some(32, True, 7),
                "lookalikes": some(32, False, 8),
                "plain": some(32, False, 9),
                "text": some(8, False, 10),
                "openers": written(folder / "held.jsonl", opener),
                "max_new_tokens": 1,
                "judge": "first-word",
                "max_kl": 1.0,
            },
        }
    )


def refused(model, prompts, *acts):
    with applied(model, *acts):
        said = model.generate(prompts, max_new_tokens=1)
    return sum(reply.text.startswith("Sorry") for reply in said) / len(said)


def test_a_hardened_model_refuses_where_the_planted_direction_is_ablated(tmp_path):
    toy = planted(dtype=torch.float32)
    site = Site(PLANTED_LAYER, "resid_pre")
    act = Ablate(Direction.from_vector(toy.direction, site=site, position=-1, recipe="planted"))
    recipe = planted_recipe(tmp_path, steps=75, learning_rate=8e-3)
    report = harden.harden(toy.model, recipe, out=tmp_path / "h", measure=False)
    hardened = with_adapter(toy.model, str(report.folder))
    harmful = planted_prompts(32, harmful=True, seed=20)
    benign = planted_prompts(32, harmful=False, seed=21)
    assert refused(toy.model, harmful) == 1.0
    assert refused(toy.model, harmful, act) == 0.0
    assert refused(hardened, harmful) == 1.0
    assert refused(hardened, harmful, act) >= 0.9
    # Not because something is ablated: benign prompts are answered all the same.
    assert refused(hardened, benign) <= 0.1
    assert refused(hardened, benign, act) <= 0.1


def test_a_model_beside_itself_is_attacked_with_one_direction_and_changes_nothing(tmp_path):
    toy = planted(dtype=torch.float32)
    checks = planted_recipe(tmp_path).checks
    found = harden.resistance(toy.model, toy.model, checks=checks)
    assert found.before == found.after
    assert found.cosine == pytest.approx(1.0)
    assert found.kl.value == pytest.approx(0.0, abs=1e-6)
    assert found.kl_ablated.value == pytest.approx(found.after.kl, rel=0.5)
    assert found.perplexity_ratio.value == pytest.approx(1.0)
    for row in found.attacks:
        assert row.before == row.after
        assert row.change.value == 0.0
        assert row.p == 1.0
    for attack, share in (("none", 1.0), ("direction ablated", 0.0), ("reply begun", 1.0)):
        row = found.row(attack)
        assert row.after.value == pytest.approx(share, abs=0.1)
        assert row.after.n == 32
        assert row.after.method.startswith("Wilson")
    null = found.row("random direction ablated")
    assert null.after.n == 3 * 32  # One direction of each kind.
    assert null.after.value > 0.9
    assert found.row("none", "plain requests").after.value == 0.0
    with pytest.raises(ConfigError, match="there is no attack"):
        found.row("nonsense")


def test_the_report_of_a_hardening_goes_into_its_card_without_a_reply(tmp_path):
    toy = planted(dtype=torch.float32)
    recipe = planted_recipe(tmp_path, steps=2)
    report = harden.harden(toy.model, recipe, out=tmp_path / "h")
    assert report.resistance is not None
    card = json.loads((report.folder / "card.json").read_text())
    rows = card["resistance"]["attacks"]
    assert [row["attack"] for row in rows] == [row.attack for row in report.resistance.attacks]
    assert rows[0]["after"]["n"] == 32
    assert sorted(path.name for path in report.folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "card.json",
        "log.jsonl",
    ]
    assert set(report.seconds) == {"prepare", "train", "measure"}

import pytest
import torch
from tests.tiny import TINY_CONFIGS, tiny_model, tiny_tokenizer

from demur.activations import reading
from demur.directions import Direction
from demur.errors import ConfigError, DegenerateVectorError, SilentEditError
from demur.interventions import Ablate, Add, ObliqueErase, ProjectToMean, applied, interventions
from demur.models import Template
from demur.sites import Site, Span


@pytest.fixture(params=list(TINY_CONFIGS), scope="module")
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def chat():
    from demur.models import Model

    made = tiny_model("llama")
    tokenizer = tiny_tokenizer("chatml")
    made.hf.resize_token_embeddings(max(len(tokenizer), made.hf.config.vocab_size))
    return Model(made.hf, made.family, Template(tokenizer), name="tiny chat")


def a_direction(model, seed=0, layer=1):
    vector = torch.randn(
        model.d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return Direction.from_vector(vector, site=Site(layer, "resid_pre"), position=-1, recipe="drawn")


def ids_of(model, rows=3, width=7):
    rng = torch.Generator().manual_seed(1)
    return torch.randint(
        5, model.hf.config.get_text_config().vocab_size, (rows, width), generator=rng
    )


def one_of_each(direction):
    reader = torch.linspace(-1, 1, len(direction.unit)) + direction.unit
    return {
        "ablate": Ablate(direction),
        "add": Add(direction, 1.5),
        "project-to-mean": ProjectToMean(direction, 0.3, Site(1, "resid_pre")),
        "oblique-erase": ObliqueErase(direction, reader, 0.1, Site(1, "resid_pre")),
    }


def test_the_examples_cover_the_registry(model):
    assert set(one_of_each(a_direction(model))) == set(interventions)


def test_after_ablation_no_block_leaves_anything_along_the_direction(model):
    direction = a_direction(model)
    blocks = [Site(layer, "resid_post") for layer in range(model.n_layers)]
    with applied(model, Ablate(direction)), reading(model, blocks) as streams:
        model.logits(ids_of(model))
    unit = torch.nn.functional.normalize(direction.unit.double(), dim=0)
    for site in blocks:
        cosine = streams[site] @ unit / streams[site].norm(dim=-1)
        assert cosine.abs().max() < 1e-12, site


@pytest.mark.parametrize("name", list(interventions))
def test_every_intervention_reaches_its_sites_and_is_undone(model, name):
    act = one_of_each(a_direction(model))[name]
    before = model.logits(ids_of(model))
    with applied(model, act) as edits:
        during = model.logits(ids_of(model))
    assert set(edits) == set(act.sites(model))
    assert all(count == 1 for count in edits.values())
    assert (during - before).abs().max() > 1e-6
    assert torch.equal(model.logits(ids_of(model)), before)


def test_the_model_is_restored_even_when_the_block_fails(model):
    before = model.logits(ids_of(model))
    with pytest.raises(ZeroDivisionError), applied(model, Ablate(a_direction(model))):
        raise ZeroDivisionError
    assert torch.equal(model.logits(ids_of(model)), before)


@pytest.mark.parametrize("name", list(interventions))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_an_intervention_returns_a_new_tensor_of_the_same_kind(name, dtype):
    model = tiny_model("llama")
    act = one_of_each(a_direction(model))[name]
    x = torch.randn(2, 5, model.d_model).to(dtype)
    kept = x.clone()
    out = act(x)
    assert torch.equal(x, kept)
    assert out.shape == x.shape
    assert out.dtype == dtype
    rows = torch.stack([act(row) for row in x])
    torch.testing.assert_close(rows, out)


@pytest.mark.parametrize("name", ["add", "project-to-mean", "oblique-erase"])
def test_strength_zero_is_the_identity_bit_for_bit(name):
    from dataclasses import replace

    model = tiny_model("llama")
    act = replace(one_of_each(a_direction(model))[name], strength=0.0)
    x = torch.randn(2, 5, model.d_model, dtype=torch.bfloat16)
    assert torch.equal(act(x), x)


def test_bfloat16_ablation_is_done_in_float32():
    model = tiny_model("llama")
    direction = a_direction(model)
    x = torch.randn(512, model.d_model, generator=torch.Generator().manual_seed(2)).bfloat16()
    left = (Ablate(direction)(x).double() @ direction.unit.double()).abs().mean()
    in_bfloat16 = x - (x @ direction.unit.bfloat16()).unsqueeze(-1) * direction.unit.bfloat16()
    worse = (in_bfloat16.double() @ direction.unit.double()).abs().mean()
    assert left < 0.7 * worse


def test_addition_moves_the_coordinate_by_strength_times_norm():
    model = tiny_model("llama")
    direction = a_direction(model)
    x = torch.randn(4, model.d_model, dtype=torch.float64)
    moved = (Add(direction, -2.0)(x) - x) @ direction.unit.double()
    torch.testing.assert_close(moved, torch.full((4,), -2 * direction.norm, dtype=torch.float64))


def test_projection_sets_the_level_and_touches_nothing_else():
    model = tiny_model("llama")
    direction = a_direction(model)
    unit = torch.nn.functional.normalize(direction.unit.double(), dim=0)
    x = torch.randn(4, model.d_model, dtype=torch.float64)
    out = ProjectToMean(direction, 0.7, direction.site)(x)
    torch.testing.assert_close(out @ unit, torch.full((4,), 0.7, dtype=torch.float64))
    across = torch.eye(model.d_model, dtype=torch.float64) - torch.outer(unit, unit)
    torch.testing.assert_close(out @ across, x @ across)


def test_oblique_erasure_gives_the_reader_its_level():
    model = tiny_model("llama")
    act = one_of_each(a_direction(model))["oblique-erase"]
    x = torch.randn(4, model.d_model, dtype=torch.float64)
    torch.testing.assert_close(
        act(x) @ act.reader.double(), torch.full((4,), 0.1, dtype=torch.float64)
    )


def test_oblique_erasure_refuses_a_reader_that_cannot_see_the_direction():
    direction = Direction.from_vector(
        torch.eye(8)[0], site=Site(0, "resid_pre"), position=-1, recipe=""
    )
    with pytest.raises(DegenerateVectorError):
        ObliqueErase(direction, torch.eye(8)[1], 0.0, Site(0, "resid_pre"))


def test_an_edit_that_never_runs_is_an_error():
    model = tiny_model("llama")

    def run_without_one_hook():
        with applied(model, Ablate(a_direction(model))):
            model.blocks[1].self_attn.o_proj._forward_hooks.clear()
            model.logits(ids_of(model))

    with pytest.raises(SilentEditError, match=r"1\.attn_out"):
        run_without_one_hook()
    assert model.blocks[1].self_attn.o_proj._forward_hooks == {}


def test_edits_of_one_site_run_in_the_order_given():
    model = tiny_model("llama")
    direction = a_direction(model)
    last = Site(1, "resid_pre")
    add, level = Add(direction, 3.0), ProjectToMean(direction, 0.0, last)
    for acts, expected in (((add, level), 0.0), ((level, add), 3.0 * direction.norm)):
        with applied(model, *acts), reading(model, [last]) as streams:
            model.logits(ids_of(model))
        along = streams[last] @ direction.unit.double()
        torch.testing.assert_close(along, torch.full_like(along, expected), atol=1e-5, rtol=1e-5)


def test_where_limits_an_edit_to_a_span(chat):
    act = Add(a_direction(chat), 5.0)
    prompts = ["Name a tree", "Is it far from here to the sea?"]
    batch = chat.encode(prompts)
    with reading(chat, [Site(1, "resid_pre")]) as plain:
        chat.logits(batch)
    with (
        applied(chat, act, where=Span.POST_INSTRUCTION),
        reading(chat, [Site(1, "resid_pre")]) as now,
    ):
        chat.logits(batch)
    moved = (now[Site(1, "resid_pre")] - plain[Site(1, "resid_pre")]).norm(dim=-1) > 1e-9
    assert torch.equal(moved, batch.spans[Span.POST_INSTRUCTION])


def test_where_with_a_shared_prefix_gives_the_same_logits(chat):
    act = Add(a_direction(chat), 5.0)
    batch = chat.encode(["Name a tree", "Is it far from here to the sea?"])
    assert batch.shared > 1
    for where in (None, Span.INSTRUCTION, [Span.INSTRUCTION, Span.POST_INSTRUCTION]):
        with applied(chat, act, where=where):
            shared = chat.logits(batch)
            with chat.whole_rows():
                whole = chat.logits(batch)
        torch.testing.assert_close(shared, whole)


def test_response_edits_leave_the_prompt_alone(chat):
    act = Add(a_direction(chat), 50.0)
    prompts = ["Name a tree", "Is it far?"]
    plain = chat.generate(prompts, max_new_tokens=6)
    with applied(chat, act, where=Span.RESPONSE):
        edited = chat.generate(prompts, max_new_tokens=6)
        batch = chat.encode(prompts)
        first = chat.logits(batch).argmax(1).tolist()
    # The first token is decided by the prompt alone; what follows is not.
    for before, after, token in zip(plain, edited, first, strict=True):
        if before.ids and after.ids:
            assert before.ids[0] == after.ids[0] == token
    assert [r.ids for r in plain] != [r.ids for r in edited]


def test_when_edits_only_the_prompts_asked_for(chat):
    prompts = ["Name a tree", "Is it far?", "Add 4 and 17"]
    batch = chat.encode(prompts)
    plain = chat.logits(batch)
    with applied(chat, Ablate(a_direction(chat))):
        every = chat.logits(batch)
    with applied(chat, Ablate(a_direction(chat)), when=torch.tensor([True, False, True])):
        some = chat.logits(batch)
    torch.testing.assert_close(some[[0, 2]], every[[0, 2]])
    torch.testing.assert_close(some[1], plain[1])


def test_where_needs_to_know_the_tokens(chat):
    with (
        pytest.raises(ConfigError),
        applied(chat, Add(a_direction(chat)), where=Span.INSTRUCTION),
    ):
        chat.hf(chat.encode(["Name a tree"]).ids)


def test_generation_is_edited_at_every_step(chat):
    with applied(chat, Ablate(a_direction(chat))) as edits:
        chat.generate(["Name a tree"], max_new_tokens=4)
    runs = set(edits.values())
    assert len(runs) == 1
    assert 1 <= runs.pop() <= 4

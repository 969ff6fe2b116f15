"""What an engine may be asked to do, on a model whose passes are cut as an engine cuts them."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from tests.tiny import tiny_model
from transformers import DynamicCache

from demur.activations import moments
from demur.anchor import Anchor, Floor
from demur.directions import Direction
from demur.engines.acts import AblateOutputs, Clamp, Hold, operations
from demur.engines.programs import (
    OPERATIONS,
    Addition,
    ConditionalHold,
    Fault,
    OneSidedClamp,
    OutputAblation,
    Place,
    Program,
    Reading,
    decode,
    encode,
)
from demur.engines.vllm import check_reached
from demur.errors import ConfigError, FamilyError, SilentEditError, UnknownNameError
from demur.interventions import Ablate, Add, ObliqueErase, applied
from demur.sites import Site

PROMPTS = ["How do I plant a tree?", "Where is the station", "Write", "Is it far, or not?"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def direction(model):
    rng = torch.Generator().manual_seed(1)
    vector = torch.randn(model.d_model, generator=rng)
    return Direction.from_vector(vector, site=Site(1, "resid_post"), position=-1, recipe="drawn")


def engine_pass(model, ids, program, *, row, chunk, drops=()):
    """Run one prompt as an engine does: in pieces, with what a program returns put in place.

    `drops` are (layer, first token) whose results the engine loses without a word.
    """
    cache, out = DynamicCache(config=model.hf.config), None
    for start in range(0, len(ids), chunk):
        piece = ids[start : start + chunk]
        place = Place(row, len(ids), start)

        def hook(_module, _args, output, layer, place=place):
            x = output[0] if isinstance(output, tuple) else output
            new = program.run(layer, x[0], place)
            if (layer, place.start) in drops:
                return None
            program.commit(layer, place, x.shape[1])
            if new is None:
                return None
            return (new.unsqueeze(0), *output[1:]) if isinstance(output, tuple) else new[None]

        with ExitStack() as undo, torch.no_grad():
            for layer in program.layers:
                undo.callback(
                    model.blocks[layer]
                    .register_forward_hook(lambda m, a, o, n=layer, hook=hook: hook(m, a, o, n))
                    .remove
                )
            out = model.hf(piece.unsqueeze(0), past_key_values=cache, use_cache=True)
    return out.logits[0, -1]


def rows_of(model, prompts=PROMPTS):
    batch = model.encode(prompts)
    return [ids[mask] for ids, mask in zip(batch.ids, batch.mask, strict=True)]


def sent(operations_, model):
    """As they arrive at the other side."""
    rows, tensors = encode(operations_)
    return decode(rows, tensors, n_layers=model.n_layers, d_model=model.d_model)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("which", ["add", "floor", "ceiling", "outputs", "two"])
def test_edits_are_those_of_the_reference(model, direction, which, chunk):
    acts = {
        "add": (Add(direction, 0.5),),
        "floor": (Clamp(direction, 1.0, Site(0, "resid_post"), "at-least"),),
        "ceiling": (Clamp(direction, -1.0, Site(2, "resid_pre"), "at-most"),),
        "outputs": (AblateOutputs(direction),),
        "two": (Clamp(direction, 1.0, Site(1, "resid_post"), "at-least"), Add(direction, -1.0)),
    }[which]
    with applied(model, *acts):
        wanted = model.logits(model.encode(PROMPTS))
    assert float((wanted - model.logits(model.encode(PROMPTS))).abs().max()) > 1e-2
    program = Program(sent(operations(acts, n_layers=model.n_layers), model))
    for row, ids in enumerate(rows_of(model)):
        logits = engine_pass(model, ids, program, row=row, chunk=chunk)
        torch.testing.assert_close(logits, wanted[row], atol=1e-5, rtol=1e-5)
    needed = {row: len(ids) for row, ids in enumerate(rows_of(model))}
    check_reached([{"rows": program.report(), "raised": []}], needed, program.layers, n_ranks=1)


@pytest.mark.parametrize("chunk", [3, 1000])
def test_moments_reduced_inside_are_those_of_the_reference(model, direction, chunk):
    prompts = [f"{n} {text}" for n in range(10) for text in PROMPTS]
    sites = [Site(layer, "resid_post") for layer in (0, 2)]
    act = Add(direction, 0.5)
    with applied(model, act):
        wanted = moments(model, prompts, sites=sites, positions=(-4, -1), rank=128)
    reading = Reading((0, 2), (-4, -1), 128)
    program = Program(sent((*operations((act,), n_layers=3), reading), model))
    for row, ids in enumerate(rows_of(model, prompts)):
        engine_pass(model, ids, program, row=row, chunk=chunk)
    head, tensors = program.moments()
    for i, layer in enumerate((0, 2)):
        assert head[str(layer)] == {"n": len(prompts), "exact": True}
        torch.testing.assert_close(
            tensors[f"{layer}.mean"][0], wanted.mean[i], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            tensors[f"{layer}.total"][0], wanted.total[i], atol=1e-4, rtol=1e-5
        )
        ours, theirs = wanted.spread[i].double(), tensors[f"{layer}.spread"][0].double()
        torch.testing.assert_close(theirs.mT @ theirs, ours.mT @ ours, atol=1e-3, rtol=1e-4)


def test_what_is_computed_again_is_counted_once(model):
    """An engine that has no room for keys and values drops them and begins the prompt anew."""
    program = Program((Reading((1,), (-1,), 8),))
    (ids,) = rows_of(model, PROMPTS[:1])
    for _ in range(2):
        engine_pass(model, ids, program, row=0, chunk=1000)
    head, _ = program.moments()
    assert head["1"]["n"] == 1


def _hold(model, direction, threshold, position=-4):
    rng = torch.Generator().manual_seed(2)
    axis = torch.nn.functional.normalize(torch.randn(model.d_model, generator=rng), dim=0)
    levels = torch.tensor([9.0])
    floors = tuple(
        Floor(Site(layer, "resid_post"), axis, axis, levels - 2, levels, levels - 4)
        for layer in (1, 2)
    )
    return Hold(replace(direction, position=position), threshold, floors), axis


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_hold_acts_from_its_token_on(model, direction, chunk):
    (ids,) = rows_of(model, PROMPTS[:1])
    read = moments(model, PROMPTS[:1], sites=[direction.site], positions=(-4,), rank=0)
    at = float(read.mean[0, 0] @ direction.unit.double())
    first = len(ids) - 4
    closed, _ = _hold(model, direction, at + 0.1)
    program = Program(sent(operations((closed,), n_layers=3), model))
    logits = engine_pass(model, ids, program, row=0, chunk=chunk)
    torch.testing.assert_close(logits, model.logits(ids.unsqueeze(0))[0], atol=1e-6, rtol=1e-6)
    assert program.rows[0].gate == pytest.approx(at, abs=1e-4)

    opened, axis = _hold(model, direction, at - 0.1)
    program = Program(sent(operations((opened,), n_layers=3), model))
    logits = engine_pass(model, ids, program, row=0, chunk=chunk)

    def reference(x):
        gap = (9.0 - x @ axis.double()).clamp(min=0, max=4.0)
        gap[:, :first] = 0
        return x + gap.unsqueeze(-1) * axis.double()

    with ExitStack() as undo, model.whole_rows():
        for layer in (1, 2):
            undo.callback(model.intercept(Site(layer, "resid_post"), reference))
        wanted = model.logits(ids.unsqueeze(0))[0]
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    assert float((wanted - model.logits(ids.unsqueeze(0))[0]).abs().max()) > 1e-2


def test_a_hold_that_was_not_read_does_not_pass_for_closed(model, direction):
    hold, _ = _hold(model, direction, 0.0)
    program = Program(operations((hold,), n_layers=3))
    x = torch.randn(4, model.d_model)
    with pytest.raises(RuntimeError, match="was not read"):
        program.run(2, x, Place(0, 8, 4))


# The list ---------------------------------------------------------------------------------------


def test_the_list_is_closed():
    assert set(OPERATIONS) == {"add", "ablate-outputs", "clamp", "hold", "read", "fault"}
    with pytest.raises(UnknownNameError, match="no operation of an engine is called `exec`"):
        decode([{"op": "exec", "code": "1"}], {}, n_layers=3, d_model=4)
    with pytest.raises(UnknownNameError):
        decode([{}], {}, n_layers=3, d_model=4)


def test_ablation_is_refused_by_its_name_and_by_its_class(direction):
    with pytest.raises(FamilyError, match="not directional ablation"):
        decode([{"op": "ablate"}], {}, n_layers=3, d_model=4)
    with pytest.raises(FamilyError, match="not directional ablation"):
        operations((Ablate(direction),), n_layers=3)


def test_ablating_outputs_is_another_edit_than_ablation(model, direction):
    batch = model.encode(PROMPTS)
    with applied(model, Ablate(direction)):
        ablated = model.logits(batch)
    with applied(model, AblateOutputs(direction)):
        outputs = model.logits(batch)
    assert float((ablated - outputs).abs().max()) > 1e-2


def test_what_hooks_cannot_do_is_refused(direction):
    with pytest.raises(ConfigError, match="begins them anew"):
        operations((Anchor(None),), n_layers=3)
    with pytest.raises(ConfigError, match="do not do ObliqueErase"):
        operations((ObliqueErase(direction, direction.unit, 0.0, direction.site),), n_layers=3)
    for kind in ("attn_out", "mlp_out", "mlp_in", "resid_pre"):
        site = Site(0, kind)
        with pytest.raises(FamilyError, match="outputs of blocks alone"):
            operations((Add(replace(direction, site=site)),), n_layers=3)


def test_floors_below_the_condition_are_refused(model, direction):
    hold, axis = _hold(model, direction, 0.0)
    low = Floor(Site(0, "resid_post"), axis, axis, *[torch.zeros(1)] * 3)
    with pytest.raises(ConfigError, match="cannot wait for what is read at block 1"):
        operations((replace(hold, floors=(low,)),), n_layers=3)


_UNIT = torch.nn.functional.normalize(torch.ones(4), dim=0)
_GOOD = [
    Addition(0, _UNIT),
    OutputAblation((0, 2), _UNIT),
    OneSidedClamp(1, _UNIT, 0.5, "at-most"),
    ConditionalHold(0, _UNIT, -2, 0.0, (1,), _UNIT[None], _UNIT[None], (1.0,), (2.0,)),
    Reading((0, 1), (-1,), 4),
    Fault(1, 2),
]


def test_what_is_sent_arrives():
    rows, tensors = encode(_GOOD)
    found = decode(rows, tensors, n_layers=3, d_model=4)
    again, more = encode(found)
    assert again == rows
    assert set(more) == set(tensors)
    assert all(torch.equal(more[name], value) for name, value in tensors.items())


@pytest.mark.parametrize(
    "wrong",
    [
        Addition(3, _UNIT),
        Addition(-1, _UNIT),
        Addition(0, torch.ones(5)),
        Addition(0, torch.full((4,), float("nan"))),
        OutputAblation((), _UNIT),
        OneSidedClamp(0, _UNIT, float("inf"), "at-most"),
        Reading((0,), (0,), 4),
        Reading((0,), (), 4),
        ConditionalHold(1, _UNIT, -2, 0.0, (0,), _UNIT[None], _UNIT[None], (1.0,), (2.0,)),
        ConditionalHold(0, _UNIT, -2, 0.0, (1,), _UNIT[None], _UNIT[None], (1.0, 2.0), (2.0,)),
        ConditionalHold(0, _UNIT, 2, 0.0, (1,), _UNIT[None], _UNIT[None], (1.0,), (2.0,)),
    ],
)
def test_what_does_not_fit_the_model_is_refused(wrong):
    rows, tensors = encode([wrong])
    with pytest.raises(ConfigError, match=f"the engine's `{wrong.name}`"):
        decode(rows, tensors, n_layers=3, d_model=4)


@pytest.mark.parametrize(
    ("number", "key", "value"),
    [
        (0, "layer", "0"),
        (0, "layer", True),
        (0, "layer", 0.0),
        (1, "layers", [0, None]),
        (1, "layers", 0),
        (2, "level", "0.5"),
        (2, "side", "upwards"),
        (2, "side", ["at-most"]),
        (3, "levels", ["1"]),
        (4, "rank", None),
        (5, "token", {}),
    ],
)
def test_json_of_another_type_is_refused(number, key, value):
    rows, tensors = encode([_GOOD[number]])
    with pytest.raises(ConfigError, match=f"for `{key}`"):
        decode([rows[0] | {key: value}], tensors, n_layers=3, d_model=4)


def test_too_much_and_too_little_is_refused():
    rows, tensors = encode([_GOOD[0]])
    with pytest.raises(ConfigError):
        decode([rows[0] | {"run": "this"}], tensors, n_layers=3, d_model=4)
    with pytest.raises(ConfigError):
        decode(rows, {}, n_layers=3, d_model=4)
    with pytest.raises(ConfigError, match="tensors of no operation"):
        decode(rows, tensors | {"7.vector": _UNIT}, n_layers=3, d_model=4)
    with pytest.raises(ConfigError, match="there twice"):
        decode(*encode([_GOOD[4], _GOOD[4]]), n_layers=3, d_model=4)


# The count --------------------------------------------------------------------------------------


def _report(model, direction, drops=()):
    program = Program(operations((AblateOutputs(direction),), n_layers=3))
    rows = rows_of(model, PROMPTS[:2])
    for row, ids in enumerate(rows):
        engine_pass(model, ids, program, row=row, chunk=6, drops=drops if row else ())
    needed = {row: len(ids) for row, ids in enumerate(rows)}
    return {"rows": program.report(), "raised": []}, needed


def test_a_count_that_fits_passes(model, direction):
    report, needed = _report(model, direction)
    check_reached([report], needed, range(3), n_ranks=1)


@pytest.mark.parametrize("first", [0, 6, 18])
def test_a_result_that_was_lost_ends_in_an_error(model, direction, first):
    report, needed = _report(model, direction, drops={(1, first)})
    with pytest.raises(SilentEditError, match=r"request 2.* block 1"):
        check_reached([report], needed, range(3), n_ranks=1)


def test_the_last_token_counts(model, direction):
    report, needed = _report(model, direction)
    with pytest.raises(SilentEditError, match="tokens at block 0"):
        check_reached([report], {0: needed[0] + 1}, range(3), n_ranks=1)


def test_every_request_layer_and_rank_counts(model, direction):
    report, needed = _report(model, direction)
    with pytest.raises(SilentEditError, match="request 8 was never reached"):
        check_reached([report], needed | {7: 3}, range(3), n_ranks=1)
    with pytest.raises(SilentEditError, match=r"0 of .* tokens at block 3"):
        check_reached([report], needed, range(4), n_ranks=1)
    with pytest.raises(SilentEditError, match="1 of 2 ranks"):
        check_reached([report], needed, range(3), n_ranks=2)
    worse, _ = _report(model, direction, drops={(2, 6)})
    with pytest.raises(SilentEditError, match="request 2 on rank 1"):
        check_reached([report, worse], needed, range(3), n_ranks=2)


def test_the_reason_is_told(model, direction):
    report, needed = _report(model, direction, drops={(1, 0)})
    told = report | {"raised": ["a hook at block 1 raised ValueError('no')"]}
    with pytest.raises(SilentEditError, match=r"ValueError\('no'\)"):
        check_reached([told], needed, range(3), n_ranks=1)

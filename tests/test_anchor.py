"""The anchor: what it may change, and what it must not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import TINY_CONFIGS, tiny_model

import demur
from demur.anchor import (
    N_REPLY_PLACES,
    Anchor,
    Floor,
    Gate,
    Push,
    ReplyRead,
    load_anchor,
    null_projected,
    reply_place,
    save_anchor,
)
from demur.errors import ConfigError, SilentEditError, StoreError
from demur.guard import Fisher, Guard, Rarity, Read, Threshold
from demur.interventions import applied
from demur.models import conversation_of
from demur.sites import Site

PROMPTS = ["Name a tree.", "Say hello to the neighbour in the next house, please", "Yes or no?"]
SITE = Site(1, "resid_pre")
LINE = Rarity(torch.linspace(-100.0, 100.0, 91, dtype=torch.float64), 1e9)  # Keeps the order.


def drawn(size, seed):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def guard_of(model, *, seed=0):
    weight = drawn(model.d_model, seed)
    reads = tuple(
        Read(name, Fisher(weight, 0.0, 1.0), LINE, name == "span") for name in ("t_inst", "span")
    )
    return Guard(SITE, reads, 4, 2, Threshold(0.0, 0.05, 20, 1, 0.1), {}, {})


def gate_of(model, threshold, **more):
    return Gate(guard_of(model), Threshold(threshold, 0.05, 20, 1, 0.1), **more)


def floor_of(model, site=SITE, seed=3, high=5.0):
    axis = torch.nn.functional.normalize(drawn(model.d_model, seed), dim=0)
    places = model.template.n_post + N_REPLY_PLACES
    accepted = torch.zeros(places, dtype=torch.float64)
    return Floor(site, axis, axis, accepted, accepted + high, accepted - 100.0)


def anchor_of(model, threshold=np.inf, **more):
    floors = tuple(floor_of(model, Site(layer, "resid_pre")) for layer in (1, 2))
    return Anchor(gate_of(model, threshold), floors, **more)


def scores_of(model, prompts=PROMPTS):
    with anchor_of(model).holding(model) as held:
        model.logits(model.encode(prompts))
    return [trace.score for trace in held.traces]


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_a_closed_gate_changes_no_bit(name):
    model = tiny_model(name)
    batch = model.encode(PROMPTS, [[5, 6], [], [7]])
    with model.in_two():
        plain = model.logits(batch)
        replies = model.generate(batch, max_new_tokens=12, batch_size=2)
    with anchor_of(model).holding(model) as held:
        assert torch.equal(model.logits(batch), plain)
        assert model.generate(batch, max_new_tokens=12, batch_size=2) == replies
    assert all(trace.opened is None and np.isfinite(trace.score) for trace in held.traces)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_a_row_that_opens_leaves_the_others_as_they_are(name):
    model = tiny_model(name)
    scores = scores_of(model)
    first = int(np.argmax(scores))
    second, most = sorted(scores)[-2:]
    with model.in_two():
        plain = model.generate(PROMPTS, max_new_tokens=9)
    with anchor_of(model, (second + most) / 2).holding(model) as held:
        told = model.generate(PROMPTS, max_new_tokens=9)
    assert [trace.opened for trace in held.traces] == [0 if i == first else None for i in range(3)]
    assert [told[i].ids for i in range(3) if i != first] == [
        plain[i].ids for i in range(3) if i != first
    ]
    assert told[first].ids != plain[first].ids


def test_the_stream_is_held_behind_the_instruction_and_nowhere_else():
    model = tiny_model("llama")
    anchor = Anchor(None, (floor_of(model),))
    axis, seen = anchor.actuators[0].axis, []

    def watch(x):
        if not model.chunk.is_prefix:
            seen.append((x.shape[1], x @ axis))
        return x

    with anchor.holding(model):
        undo = model.intercept(SITE, watch)
        model.generate(PROMPTS, max_new_tokens=6)
        undo()
    (_, instruction), *behind = seen
    assert float(instruction.min()) < 5.0 - 1e-6
    assert len(behind) == 6
    assert all(float(values.min()) > 5.0 - 1e-9 for _, values in behind)


@given(st.integers(0, 1000), st.floats(0.0, 3.0))
def test_a_floor_only_lifts_is_bounded_and_idempotent(seed, strength):
    model = tiny_model("llama")
    floor = floor_of(model, seed=seed)
    places_n = len(floor.accepted)
    floor = replace(floor, low=torch.full((places_n,), -200.0, dtype=torch.float64))
    x = 5 * drawn((2, 4, model.d_model), seed)
    places = torch.arange(8).reshape(2, 4) % places_n
    once = floor(x, places, strength)
    moved = (once - x) @ floor.axis
    assert float(moved.min()) >= -1e-12
    assert torch.allclose(once - x, moved.unsqueeze(-1) * floor.push)
    assert torch.allclose(floor(once, places, strength), once, atol=1e-9)
    assert torch.allclose(
        once @ floor.axis, (x @ floor.axis).maximum(floor.level(strength)[places])
    )
    bounded = replace(floor, low=floor.accepted - 1.0)
    most = (bounded.level(strength) - bounded.low)[places]
    assert bool((bounded.deficit(x, places, strength) <= most + 1e-12).all())


def test_places_of_a_reply():
    assert reply_place(torch.tensor([1, 8, 9, 32, 33, 500])).tolist() == [0, 0, 1, 1, 2, 2]


def test_a_null_projected_push_leaves_benign_directions_alone():
    axis = torch.nn.functional.normalize(drawn(16, 1), dim=0)
    rows = drawn((40, 3), 2) @ drawn((3, 16), 3) + drawn(16, 4)
    push = null_projected(axis, rows, 3)
    centred = rows - rows.mean(0)
    assert float((centred @ push).abs().max()) < 1e-9
    assert float(push @ axis) == pytest.approx(1.0)
    # All of the axis lies in what is to be left alone: then it is pushed along the axis itself.
    assert torch.allclose(null_projected(axis, drawn((40, 1), 5) * axis, 1), axis)


def test_a_canned_reply_takes_the_place_of_the_models_own():
    model = tiny_model("llama")
    scores = scores_of(model)
    anchor = anchor_of(model, sorted(scores)[1], action="canned", canned="No, thank you.")
    with model.in_two():
        plain = model.generate(PROMPTS, max_new_tokens=9)
    with anchor.holding(model):
        told = model.generate(PROMPTS, max_new_tokens=9)
    for i, score in enumerate(scores):
        opened = score > sorted(scores)[1]
        assert told[i].text == ("No, thank you." if opened else plain[i].text)


def test_a_reply_that_had_begun_is_begun_anew_in_a_fresh_turn():
    model = tiny_model("llama")
    batch = model.encode(PROMPTS, [[5, 6, 7], [], [8]])
    anchor = Anchor(None, (floor_of(model),))
    with anchor.holding(model) as held:
        told = model.generate(batch, max_new_tokens=5)
    assert [one.begun_anew for one in told] == [1, 0, 1]
    assert [trace.opened for trace in held.traces] == [0, 0, 0]
    with replace(anchor, fresh_turn=False).holding(model):
        plain = model.generate(batch, max_new_tokens=5)
    assert [one.begun_anew for one in plain] == [0, 0, 0]


def test_the_fresh_turn_is_held_at_the_places_of_the_template():
    model = tiny_model("llama")
    places = model.template.n_post + N_REPLY_PLACES
    stairs = replace(
        floor_of(model), accepted=torch.zeros(places), refused=10.0 + torch.arange(places)
    )
    seen = []

    def watch(x):
        if not model.chunk.is_prefix:
            seen.append((x @ stairs.axis)[0].tolist())
        return x

    with Anchor(None, (stairs,)).holding(model):
        undo = model.intercept(SITE, watch)
        model.generate(model.encode(PROMPTS[:1], [[5, 6]]), max_new_tokens=3)
        undo()
    n = model.template.n_post
    tail = [10.0 + i for i in range(n)]
    assert seen[1] == pytest.approx([*tail, 10.0 + n, 10.0 + n])  # The template, two tokens.
    fresh = [value for (value,) in seen[2:]]
    assert fresh[:n] == pytest.approx(tail)
    assert fresh[n:] == pytest.approx([10.0 + n] * 2)


@pytest.mark.parametrize("name", ["reply", "header"])
def test_the_gate_may_open_while_the_reply_is_written(name):
    model = tiny_model("llama")
    read = ReplyRead(name, Fisher(drawn(model.d_model, 8), 0.0, 1.0), LINE, True)
    closed = gate_of(model, np.inf, replies=(read,), window=4, least=2, every=3)
    with Anchor(closed, (floor_of(model),)).holding(model) as held:
        plain = model.generate(PROMPTS[1:2], max_new_tokens=12)
    (trace,) = held.traces
    prompt = scores_of(model, PROMPTS[1:2])[0]
    late = float(LINE(np.array([trace.reads[name]]))[0])
    assert np.isfinite(late)
    # The read must find more in the reply than there is in the request.
    read = replace(read, fisher=Fisher(read.fisher.weight, -1000.0, 1.0))
    gate = replace(
        closed, replies=(read,), threshold=replace(closed.threshold, value=prompt + 0.01)
    )
    with Anchor(gate, (floor_of(model),)).holding(model) as held:
        told = model.generate(PROMPTS[1:2], max_new_tokens=12)
    (trace,) = held.traces
    assert trace.by == name
    assert trace.opened == 2  # Of a third token a fresh turn is looked at before it is read.
    assert told[0].begun_anew == 1
    assert told[0].ids != plain[0].ids
    unused = replace(gate, replies=(replace(read, admitted=False),))
    with Anchor(unused, (floor_of(model),)).holding(model):
        assert model.generate(PROMPTS[1:2], max_new_tokens=12) == plain


def test_a_model_that_refuses_by_itself_is_left_alone():
    model = tiny_model("llama")
    low = floor_of(model, high=-1.0)  # Everything lies above a floor at minus infinity.
    easy = replace(low, accepted=low.accepted - 1e6, refused=low.accepted - 1e6 + 1.0)
    hard = floor_of(model)
    with Anchor(None, (easy,)).holding(model) as held:
        plain = model.generate(PROMPTS, max_new_tokens=20)
    with model.in_two():
        assert model.generate(PROMPTS, max_new_tokens=20) == plain
    assert all(trace.calm >= 8 for trace in held.traces if trace.tokens >= 8)
    with Anchor(None, (hard,)).holding(model) as held:
        model.generate(PROMPTS, max_new_tokens=20)
    assert any(trace.calm == 0 for trace in held.traces)


def test_numbers_begin_anew_with_every_call():
    model = tiny_model("llama")
    with anchor_of(model).holding(model) as held:
        model.generate(PROMPTS, max_new_tokens=3)
        assert len(held.traces) == 3
        model.generate(PROMPTS[:1], max_new_tokens=3)
        assert len(held.traces) == 1


def test_conversations_and_streaming():
    model = tiny_model("llama")
    talk = conversation_of(
        [
            {"role": "user", "content": "Name a tree."},
            {"role": "assistant", "content": "An oak."},
            {"role": "user", "content": "Another?"},
        ]
    )
    heard = {}
    with Anchor(None, (floor_of(model),)).holding(model):
        told = model.generate(
            [talk, *PROMPTS],
            max_new_tokens=6,
            batch_size=2,
            stream=heard.__setitem__,
        )
    assert [heard.get(i, "") for i in range(4)] == [one.text for one in told]


def test_applied_takes_an_anchor_beside_edits():
    model = tiny_model("llama")
    anchor = Anchor(None, (floor_of(model),))
    with anchor.holding(model):
        expected = model.generate(PROMPTS, max_new_tokens=6)
    with demur.applied(model, anchor):
        assert model.generate(PROMPTS, max_new_tokens=6) == expected
    with (
        pytest.raises(ConfigError, match="decides for itself"),
        applied(model, anchor, when=torch.ones(3, dtype=torch.bool)),
    ):
        pass
    assert model.director is None


def test_two_anchors_and_unread_prompts_are_told():
    model = tiny_model("llama")
    anchor = anchor_of(model)
    with anchor.holding(model):
        with pytest.raises(ConfigError, match="already"), anchor.holding(model):
            pass
        with pytest.raises(ConfigError, match="which tokens"):
            model.hf.base_model(input_ids=torch.tensor([[1, 2]]))
        batch = model.encode(PROMPTS)
        blind = replace(batch, spans={k: v for k, v in batch.spans.items() if k != "instruction"})
        with pytest.raises(SilentEditError, match="has not read"):
            model.logits(blind)


def test_a_push_adds_what_steering_adds():
    model = tiny_model("llama")
    vector = drawn(model.d_model, 4)
    x, places = drawn((2, 3, model.d_model), 5), torch.zeros(2, 3, dtype=torch.long)
    assert torch.allclose(Push(SITE, vector)(x, places, 2.0), x + 2 * vector)


def test_an_anchor_comes_back_from_its_file(tmp_path):
    model = tiny_model("llama")
    read = ReplyRead("reply", Fisher(drawn(model.d_model, 8), 0.5, 2.0), LINE, True)
    anchor = replace(anchor_of(model, 3.0), strength=1.5, about={"model": model.name})
    anchor = replace(anchor, gate=replace(anchor.gate, replies=(read,), window=7))
    path = tmp_path / "a.safetensors"
    save_anchor(anchor, path)
    back = load_anchor(path)
    with anchor.holding(model) as one:
        first = model.generate(PROMPTS, max_new_tokens=9)
    with back.holding(model) as two:
        assert model.generate(PROMPTS, max_new_tokens=9) == first
    assert [t.score for t in one.traces] == [t.score for t in two.traces]
    assert (back.strength, back.gate.window, back.about) == (1.5, 7, {"model": model.name})
    with pytest.raises(StoreError, match="not on"):
        load_anchor(path, model)
    (tmp_path / "a.json").unlink()
    with pytest.raises(StoreError, match="no anchor"):
        load_anchor(path)
    with pytest.raises(ConfigError, match="only an anchor"):
        save_anchor(Anchor(None, anchor.actuators), path)

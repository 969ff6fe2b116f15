"""What an anchor is compared with: each does what its paper says, on drawn activations."""

import numpy as np
import pytest
import torch
from tests.tiny import tiny_model

from demur.anchor import N_REPLY_PLACES, Anchor, Floor
from demur.defences import Likeness, NullSpaceSteer, random_floors, steering
from demur.errors import DegenerateVectorError, TooFewPromptsError
from demur.sites import Site, Span

SITE = Site(1, "resid_pre")
PROMPTS = ["Name a tree.", "Say hello to the neighbour in the next house, please", "Yes or no?"]


def drawn(size, seed):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def floor_of(model, layer, high=3.0):
    axis = torch.nn.functional.normalize(drawn(model.d_model, layer), dim=0)
    places = torch.zeros(model.template.n_post + N_REPLY_PLACES, dtype=torch.float64)
    return Floor(Site(layer, "resid_pre"), axis, axis, places, places + high, places - 50.0)


def test_a_condition_is_the_direction_in_which_the_classes_differ():
    axis = torch.nn.functional.normalize(drawn(12, 1), dim=0)
    benign = drawn((60, 12), 2)
    one = Likeness.fit(SITE, benign + 20 * axis, benign)
    assert float(one.condition @ axis) == pytest.approx(1.0, abs=1e-6)
    x = torch.stack([10 * axis, -3 * axis]).reshape(2, 1, 12).expand(2, 3, 12)
    spans = {Span.INSTRUCTION: torch.tensor([[True, True, False]] * 2)}
    found = one.look(x, spans, torch.tensor([3, 3]))["span"]
    assert found.tolist() == pytest.approx([1.0, -1.0])
    with pytest.raises(TooFewPromptsError, match="1 pairs"):
        Likeness.fit(SITE, benign[:1], benign)


def test_a_likeness_gate_opens_on_no_more_benign_prompts_than_it_promises():
    model = tiny_model("llama")
    one = Likeness(SITE, torch.nn.functional.normalize(drawn(model.d_model, 4), dim=0))
    texts = [f"{text} {i}" for i in range(14) for text in PROMPTS]
    gate = one.gate(model, {"all": texts}, 0.1)
    with Anchor(gate, ()).holding(model) as held:
        model.logits(model.encode(texts))
    opened = np.array([trace.opened is not None for trace in held.traces])
    assert opened.sum() == gate.threshold.exceeded


def test_null_space_steering_is_blind_to_benign_directions_and_moves_harmful_ones():
    benign = drawn((80, 4), 1) @ drawn((4, 20), 2)  # They lie in 4 of 20 dimensions.
    harmful = benign + 5 * torch.nn.functional.normalize(drawn(20, 3), dim=0)
    refusal = drawn(20, 4)
    act = NullSpaceSteer.fit(SITE, harmful, benign, refusal, ridge=1e-6)
    assert float((act(benign) - benign).abs().max()) < 1e-5
    moved = act(harmful) - harmful
    assert torch.allclose(moved, refusal.expand_as(moved), atol=0.05)
    assert torch.equal(NullSpaceSteer(SITE, act.matrix, 0.0)(harmful), harmful)
    with pytest.raises(DegenerateVectorError, match="is none"):
        NullSpaceSteer.fit(SITE, harmful, benign, refusal, share=0.01)


def test_random_floors_lift_as_far_as_often_and_elsewhere():
    model = tiny_model("llama")
    floors = tuple(floor_of(model, layer) for layer in (1, 2))
    nulls = random_floors(floors, 0)
    x, places = 4 * drawn((3, 5, model.d_model), 9), torch.zeros(3, 5, dtype=torch.long)
    for floor, null in zip(floors, nulls, strict=True):
        real, other = floor(x, places, 1.0) - x, null(x, places, 1.0) - x
        assert torch.allclose(real.norm(dim=2), other.norm(dim=2))
        assert abs(float(null.push @ floor.axis)) < 0.8
    again = random_floors(floors, 0)
    assert torch.equal(again[0].push, nulls[0].push)
    assert not torch.equal(random_floors(floors, 1)[0].push, nulls[0].push)


def test_steering_adds_what_the_floors_lift_on_average():
    model = tiny_model("llama")
    floor = floor_of(model, 1)
    (push,) = steering(model, (floor,), 1.0, PROMPTS)
    seen = []

    def watch(x):
        chunk = model.chunk
        if Span.POST_INSTRUCTION in chunk.spans and bool(chunk.spans[Span.POST_INSTRUCTION].any()):
            seen.append((3.0 - x @ floor.axis).clamp(min=0))
        return x

    undo = model.intercept(floor.site, watch)
    with model.in_two():
        model.logits(model.encode(PROMPTS))
    undo()
    assert float(push.vector.norm()) == pytest.approx(float(seen[-1].mean()), rel=1e-6)
    assert float(push.vector @ floor.axis) > 0

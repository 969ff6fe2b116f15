"""Prompts in two passes, replies that begin with given words, and orders to rows."""

from dataclasses import dataclass, field

import pytest
import torch
from tests.tiny import TINY_CONFIGS, tiny_model

from demur.errors import TemplateError
from demur.models.decoding import Order
from demur.sites import Site, Span

PROMPTS = ["Name a tree.", "Say hello to the neighbour in the next house, please", "Yes or no?"]


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_a_prompt_in_two_passes_gives_the_same_logits(name):
    model = tiny_model(name)
    for prompts in (PROMPTS, PROMPTS[:1]):
        batch = model.encode(prompts)
        plain = model.logits(batch)
        with model.in_two():
            assert torch.allclose(model.logits(batch), plain, atol=1e-9)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_replies_are_the_same_in_two_passes(name):
    model = tiny_model(name)
    plain = model.generate(PROMPTS, max_new_tokens=9, batch_size=2)
    with model.in_two():
        again = model.generate(PROMPTS, max_new_tokens=9, batch_size=2)
    assert [one.ids for one in again] == [one.ids for one in plain]


@pytest.mark.parametrize("name", TINY_CONFIGS)
@pytest.mark.parametrize("two", [False, True])
def test_a_reply_goes_on_from_what_it_begins_with(name, two):
    model = tiny_model(name)
    plain = model.generate(PROMPTS, max_new_tokens=9)
    begun = [one.ids[:n] for one, n in zip(plain, (4, 0, 2), strict=True)]
    batch = model.encode(PROMPTS, begun)
    assert batch.spans[Span.RESPONSE].sum(1).tolist() == [len(one) for one in begun]
    if two:
        with model.in_two():
            rest = model.generate(batch, max_new_tokens=9)
    else:
        rest = model.generate(batch, max_new_tokens=9)
    for one, own, start in zip(plain, rest, begun, strict=True):
        assert own.ids[: 9 - len(start)] == one.ids[len(start) :]


def test_the_beginning_of_a_reply_writes_no_control_token():
    model = tiny_model("llama")
    ids = model.encode(["Hello"], ["Sure<|im_end|>"]).ids[0].tolist()
    end = model.template.post_ids[0]
    assert ids.count(end) == model.encode(["Hello"]).ids[0].tolist().count(end)


def test_a_reply_that_is_too_long_for_the_context_is_told():
    model = tiny_model("llama")
    model.template.max_length = len(model.encode(["Hello"]).ids[0]) + 1
    model.encode(["Hello"], [[1]])
    with pytest.raises(TemplateError, match="beginning of its reply"):
        model.encode(["Hello"], [[1, 1]])


@dataclass
class Once:
    """Orders something for one prompt, after it has written so many tokens."""

    number: int
    order: Order
    after: int = 0
    header_every: int | None = None
    asked: list[list[int]] = field(default_factory=list)

    def orders(self, numbers):
        self.asked.append(list(numbers))
        mine = sum(self.number in numbers for numbers in self.asked)
        if self.number in numbers and mine == self.after + 1:
            return {self.number: self.order}
        return {}


@pytest.mark.parametrize("after", [0, 3])
def test_an_order_replaces_a_reply_and_leaves_the_others_alone(after):
    model = tiny_model("llama")
    plain = model.generate(PROMPTS, max_new_tokens=9)
    model.director = Once(1, Order((5, 6, 7), ends=True), after)
    told = model.generate(PROMPTS, max_new_tokens=9)
    assert told[1].ids == (5, 6, 7)
    assert told[1].finished
    assert [told[i].ids for i in (0, 2)] == [plain[i].ids for i in (0, 2)]


@pytest.mark.parametrize("after", [0, 3])
def test_a_reply_begins_anew_behind_forced_tokens(after):
    model = tiny_model("llama")
    plain = model.generate(PROMPTS, max_new_tokens=9)
    header = model.template.post_ids
    model.director = Once(1, Order(header), after)
    heard = []
    told = model.generate(
        PROMPTS, max_new_tokens=9, stream=lambda number, text: heard.append((number, text))
    )
    model.director = None
    batch = model.encode([PROMPTS[1]], [(*plain[1].ids[:after], *header)])
    expected = model.generate(batch, max_new_tokens=9)[0]
    assert told[1].ids == expected.ids
    assert told[1].begun_anew == 1
    assert [told[i].ids for i in (0, 2)] == [plain[i].ids for i in (0, 2)]
    last = dict(heard)
    assert [last[i] for i in range(3)] == [one.text for one in told]


def test_a_look_ahead_shows_what_a_fresh_turn_would_say_and_changes_nothing():
    model = tiny_model("llama")
    plain = model.generate(PROMPTS, max_new_tokens=9, batch_size=2)
    seen = []

    def watch(x):
        if model.chunk.is_peek:
            seen.append((model.chunk.rows.tolist(), x[:, -1].clone()))
        return x

    model.director = Once(9, Order(()), header_every=3)
    undo = model.intercept(Site(2, "resid_post"), watch)
    told = model.generate(PROMPTS, max_new_tokens=9, batch_size=2)
    undo()
    model.director = None
    assert [one.ids for one in told] == [one.ids for one in plain]
    rows, states = seen[0]  # After three tokens were written behind the first two prompts.
    for number, state in zip(rows, states, strict=True):
        begun = (*plain[number].ids[:3], *model.template.post_ids)
        kept = []

        def keep(x, kept=kept):
            kept.append(x[0, -1])
            return x

        undo = model.intercept(Site(2, "resid_post"), keep)
        model.logits(model.encode([PROMPTS[number]], [begun]))
        undo()
        assert torch.allclose(state, kept[-1], atol=1e-9)

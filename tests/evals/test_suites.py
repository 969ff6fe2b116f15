"""Multiple-choice items from files, likelihoods of answers, and demur's own quick suite."""

import json
import math

import pytest
import torch
from tests.test_anchor import anchor_of
from tests.tiny import tiny_model

import demur
from demur.directions import Direction
from demur.errors import ConfigError, NonFiniteError, PromptFileError, TooFewPromptsError
from demur.evals.acts import EditSpec
from demur.evals.judges import Outcome, Verdict
from demur.evals.likelihood import Continuation, applying, likelihoods
from demur.evals.suites import Paired, choose, deltas_of, read_items
from demur.interventions import ProjectToMean
from demur.models import Turn
from demur.pipeline.evaluate import quick
from demur.sites import Site

ITEM = {"question": "Name a tree", "choices": ["a tree", "the station", "no"], "answer": 0}


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def direction(model):
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(3)) * 4
    return Direction.from_vector(vector, site=Site(1, "resid_pre"), position=-1, recipe="drawn")


def written(tmp_path, *rows):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_items_are_read_with_index_or_letter(tmp_path):
    path = written(tmp_path, ITEM, "", {**ITEM, "answer": "C", "id": "mine", "task": "trees"})
    first, second = read_items(path)
    assert (first.name, first.task, first.answer) == ("1", "mine", 0)
    assert (second.name, second.task, second.answer) == ("mine", "trees", 2)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("not json", "line 2"),
        ("[1]", "line 2: it is no object"),
        ({**ITEM, "anwser": 1}, "unknown field `anwser`"),
        ({**ITEM, "question": " "}, "`question` is no text"),
        ({**ITEM, "choices": ["one"]}, "2 to 26 different"),
        ({**ITEM, "choices": ["a", "a "]}, "2 to 26 different"),
        ({**ITEM, "choices": "abc"}, "`choices` is no list"),
        ({**ITEM, "answer": 3}, "no index from 0 to 2"),
        ({**ITEM, "answer": -1}, "no index from 0 to 2"),
        ({**ITEM, "answer": True}, "no index from 0 to 2"),
        ({**ITEM, "answer": "D"}, "no index from 0 to 2"),
        ({**ITEM, "id": 4}, "`id` is no text"),
        ({**ITEM, "id": "1"}, "line 2: `id` 1 stands on line 1"),
    ],
)
def test_a_line_that_is_no_item_is_refused_with_its_number(tmp_path, row, said):
    with pytest.raises(PromptFileError, match="line 2") as error:
        read_items(written(tmp_path, ITEM, row))
    assert said in error.value.fact


def test_all_bad_lines_are_counted_and_an_empty_file_is_refused(tmp_path):
    with pytest.raises(PromptFileError, match=r"line 1:.*line 5:.*and 2 more"):
        read_items(written(tmp_path, *["{}"] * 7))
    with pytest.raises(PromptFileError, match="no items"):
        read_items(written(tmp_path, ""))
    with pytest.raises(PromptFileError, match="cannot be read"):
        read_items(tmp_path / "none.jsonl")


def test_likelihoods_do_not_hang_on_what_else_is_asked(model):
    chats = [((Turn("user", text),)) for text in ("Name a tree", "Is it far from here?")]
    asked = [
        Continuation(before, tokens, chat)
        for chat in (*chats, None)
        for before in ((7, 8), (9,), (7, 8, 9, 10))
        for tokens in ((5,), (6,), (5, 6, 7), (5, 6, 8))
    ]
    with applying(model) as inside:
        together = likelihoods(inside, asked)
        alone = [likelihoods(inside, [one])[0] for one in asked]
    for one, other in zip(together, alone, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-9)
        assert one.greedy == other.greedy
    # And they are what the logits say.
    chat = asked[2]
    batch = model.template.encode([chat.chat], pad_id=0)
    ids, total = batch.ids[0].tolist() + list(chat.before), 0.0
    for token in chat.tokens:
        total += float(model.logits(torch.tensor([ids])).log_softmax(1)[0, token])
        ids.append(token)
    assert together[2].value == pytest.approx(total, abs=1e-9)


def test_what_is_empty_or_not_finite_is_refused(model):
    with applying(model) as inside, pytest.raises(ConfigError, match="nothing to score"):
        likelihoods(inside, [Continuation((1,), ())])
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[5] = math.nan
    with applying(model) as inside, pytest.raises(NonFiniteError):
        likelihoods(inside, [Continuation((5, 6), (7,))])


def test_choices_are_scored_by_log_probability_per_byte(model, tmp_path):
    (item,) = read_items(written(tmp_path, ITEM))
    with applying(model) as inside:
        (found,) = choose(inside, [item])
        template = model.template
        own = likelihoods(
            inside,
            [
                Continuation((), tuple(template.reply_ids(c)), (Turn("user", item.question),))
                for c in item.choices
            ],
        )
    rates = [one.value / len(c) for one, c in zip(own, item.choices, strict=True)]
    assert found.right == (max(rates) == rates[0])
    whole = sum(math.exp(rate) for rate in rates)
    assert found.probability == pytest.approx(math.exp(rates[0]) / whole)


def test_a_pair_with_one_side_unscored_is_left_out_and_counted():
    pair = Paired("t", "refused", list("abcd"), [1, 1, None, 0], [0, None, 1, 0], [None] * 4)
    delta = pair.delta()
    assert (delta.change.n, delta.unscored) == (2, 2)
    assert delta.change.value == pytest.approx(-0.5)
    none = Paired("t", "refused", ["a"], [None], [1.0], [None])
    with pytest.raises(TooFewPromptsError, match="0 of 1"):
        none.delta()
    notes = []
    deltas, rows = deltas_of([pair, none], notes)
    assert (len(deltas), len(rows), len(notes)) == (1, 5, 1)


def test_edits_are_made_from_files_as_options_name_them(model, direction, tmp_path):
    path = tmp_path / "directions.safetensors"
    demur.save_direction(
        direction, path, about={"model": model.name, "fingerprint": model.fingerprint}
    )
    assert isinstance(EditSpec(tmp_path).act(model), demur.Ablate)
    add = EditSpec(path, "add", -2.0, "2.resid_pre").act(model)
    assert (add.strength, add.direction.site) == (-2.0, Site(2, "resid_pre"))
    clamp = EditSpec(path, "clamp", 0.5).act(model)
    assert isinstance(clamp, ProjectToMean)
    assert clamp.level == pytest.approx(0.5 * direction.norm)
    assert str(EditSpec(path, "clamp")) == "clamp directions.safetensors at 0"
    with pytest.raises(ConfigError, match="all of the direction"):
        EditSpec(path, "ablate", 0.5)
    with pytest.raises(ConfigError, match="no edit `cut`"):
        EditSpec(path, "cut")
    with pytest.raises(ConfigError, match="3 blocks"):
        EditSpec(path, "add", None, "7.resid_pre").act(model)


class Sometimes:
    """Reads every other exchange."""

    deterministic = True

    def __call__(self, exchanges):
        return [
            Verdict(Outcome.UNPARSED if i % 2 else Outcome.REFUSED, None, "by number")
            for i, _ in enumerate(exchanges)
        ]


def small(model, **more):
    how = {"requests": 6, "paragraphs": 3, "max_new_tokens": 3, "judge": Sometimes(), **more}
    return quick(model, **how)


def test_the_quick_suite_tells_every_figure_with_its_interval(model, direction, tmp_path):
    items = read_items(
        written(tmp_path, ITEM, {**ITEM, "answer": 1}, {**ITEM, "question": "Is it far?"})
    )
    record = small(model, acts=[demur.Ablate(direction)], items=items, limit=2).record
    figures = {(row.task, row.metric): row for row in record.deltas}
    assert set(figures) == {
        ("harmless", "KL, next token"),
        ("neutral text", "perplexity"),
        ("mine", "accuracy"),
        ("mine", "probability of the right choice"),
        ("harmful", "refused"),
        ("harmless", "refused"),
        ("lookalike", "refused"),
    }
    assert figures["harmless", "KL, next token"].change.value > 0
    assert figures["mine", "accuracy"].change.n == 2
    # What the judge cannot read is counted beside, not as either.
    refused = figures["harmful", "refused"]
    assert (refused.change.n, refused.unscored, refused.plain.value) == (3, 3, 1.0)
    assert all(row.change.low <= row.change.value <= row.change.high for row in record.deltas)


def test_an_edit_of_strength_zero_changes_nothing(model, direction, tmp_path):
    items = read_items(written(tmp_path, ITEM, {**ITEM, "question": "Is it far?"}))
    found = small(model, acts=[demur.Add(direction, 0.0)], items=items)
    for row in found.record.deltas:
        still = 1.0 if row.kind == "ratio" else 0.0
        assert row.change.value == pytest.approx(still, abs=1e-9), row
    with pytest.raises(ConfigError, match="nothing to compare"):
        small(model)


def test_behind_a_gate_that_stays_shut_not_even_rounding_changes(tmp_path):
    model = tiny_model("llama", torch.bfloat16)
    texts = ("Name a tree", "Is it far?", "How do I plant a tree in a small garden?")
    items = read_items(written(tmp_path, *({**ITEM, "question": text} for text in texts)))
    found = small(model, anchor=anchor_of(model, 1e9), items=items, max_new_tokens=8)
    assert found.items
    assert all(row.plain == row.edited for row in found.items)
    sides = []
    for cut in (False, True):
        with applying(model, cut=cut) as inside:
            sides.append(choose(inside, items))
    assert sides[0] != sides[1]  # Which is why the plain run is cut as well.


def test_the_gate_of_an_anchor_is_counted_by_item(model, tmp_path):
    items = read_items(written(tmp_path, ITEM, {**ITEM, "question": "Is it far?"}))
    for threshold, share in ((1e9, 0), (-1e9, 1)):
        found = small(model, anchor=anchor_of(model, threshold), items=items)
        for row in found.record.deltas:
            if row.opened is not None:
                assert row.opened == share * (row.change.n + row.unscored)
        told = [row.change.value for row in found.record.deltas if row.metric.startswith("prob")]
        assert (abs(told[0]) > 1e-6) == bool(share)
    canned = small(model, anchor=anchor_of(model, 1e9, action="canned"), items=items)
    assert len(canned.record.notes) == 2
    assert not [row for row in canned.record.deltas if row.metric == "accuracy"]

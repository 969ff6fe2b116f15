# ruff: noqa: E402 (what an extra brings is imported behind the check for it)
"""lm-eval's tasks on demur's models: as its own `HFLM` has them, and under edits and anchors."""

import json

import pytest

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
pytestmark = pytest.mark.filterwarnings(
    # lm-eval's and its libraries' own, of which no call here is the cause.
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::ResourceWarning",
)

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tests.tiny import tiny_model

import demur
from demur.directions import Direction
from demur.errors import ConfigError, SilentEditError, TemplateError
from demur.evals.likelihood import applying
from demur.evals.lm_eval import DemurLM, evaluate
from demur.models import conversation_of
from demur.sites import Site

ITEMS = [
    {"question": "Name a tree", "choices": ["a tree", "the station far away", "no"], "answer": 0},
    {"question": "How far is the station", "choices": ["far", "here", "a garden"], "answer": 1},
    {"question": "Is it far from here", "choices": ["it is", "a model", "stop"], "answer": 2},
    {"question": "Where do I plant a tree", "choices": ["in a garden", "here", "n"], "answer": 0},
    {"question": "Who asks", "choices": ["the user", "assistant", "small"], "answer": 0},
]
CHOICES = """
task: tiny_choices
custom_dataset: !function tiny.load
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
TEXTS = """
task: tiny_texts
custom_dataset: !function tiny.load
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""
REPLIES = """
task: tiny_replies
custom_dataset: !function tiny.load
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["t"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
LOAD = """
import json
from pathlib import Path
import datasets

def load(**_):
    rows = json.loads(Path(__file__).with_suffix(".json").read_text())
    return {"test": datasets.Dataset.from_list(rows)}
"""


@pytest.fixture
def folder(tmp_path):
    for name, text in (
        ("choices.yaml", CHOICES),
        ("texts.yaml", TEXTS),
        ("replies.yaml", REPLIES),
        ("tiny.py", LOAD),
        ("tiny.json", json.dumps(ITEMS)),
    ):
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def model():
    return tiny_model("llama")


def direction_of(model, seed=3, layer=1):
    rng = torch.Generator().manual_seed(seed)
    vector = torch.randn(model.d_model, generator=rng) * 4
    return Direction.from_vector(vector, site=Site(layer, "resid_pre"), position=-1, recipe="drawn")


def requests_of(kind, rows):
    return [Instance(request_type=kind, doc={}, arguments=row, idx=i) for i, row in enumerate(rows)]


PAIRS = [
    ("The user asks", " and the assistant answers."),
    ("The user asks", " and"),
    ("The user asks", " the"),
    ("The user asks ", "nothing"),
    ("", "Where is the station"),
    ("a " * 700, "tree in a garden"),  # Longer than the context.
    *((f"Question: {one['question']}\nAnswer:", f" {c}") for one in ITEMS for c in one["choices"]),
]


def hflm(model):
    return HFLM(
        pretrained=model.hf, tokenizer=model.template.tokenizer, batch_size=3, max_length=512
    )


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "gpt2"])
def test_plain_likelihoods_are_those_of_lm_evals_own_model(name):
    model = tiny_model(name)
    asked = requests_of("loglikelihood", PAIRS)
    with applying(model) as inside:
        ours = DemurLM(inside).loglikelihood(asked)
    theirs = hflm(model).loglikelihood(asked, disable_tqdm=True)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    for (mine, _), (other, _) in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, abs=1e-4)


def test_what_greedy_decoding_writes_is_said_to_be_greedy(model):
    context = "The user asks"
    with applying(model) as inside:
        lm = DemurLM(inside)
        ids = lm.tok_encode(context)
        written = []
        for _ in range(3):
            batch = torch.tensor([ids + written])
            written.append(int(model.logits(batch).argmax()))
        first = ((context, ""), ids, written)
        second = ((context, ""), ids, [*written[:-1], (written[-1] + 1) % 300])
        found = lm._loglikelihood_tokens([first, second])
    assert [greedy for _, greedy in found] == [True, False]


def test_plain_texts_and_replies_are_those_of_lm_evals_own_model(model):
    texts = requests_of("loglikelihood_rolling", [("Where is the station? " * 60,), ("a tree",)])
    own = {"until": ["t"], "max_gen_toks": 9, "do_sample": False}
    replies = requests_of("generate_until", [(one["question"], dict(own)) for one in ITEMS])
    with applying(model) as inside:
        lm = DemurLM(inside, batch_size=2)
        sums, said = lm.loglikelihood_rolling(texts), lm.generate_until(replies)
    other = hflm(model)
    for mine, theirs in zip(sums, other.loglikelihood_rolling(texts, True), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    assert said == other.generate_until(replies, disable_tqdm=True)
    assert any(said)


def test_a_chat_is_laid_out_as_lm_evals_own_model_has_it(model):
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a tree"},
        {"role": "assistant", "content": "a model"},
        {"role": "user", "content": "Is it far?"},
    ]
    other = hflm(model)
    with applying(model) as inside:
        lm = DemurLM(inside)
        ours = lm.apply_chat_template(history)
        theirs = other.apply_chat_template(history)
        assert ours == theirs
        pairs = [(ours, "it is"), (ours, "no"), (ours, "far from here")]
        found = lm.loglikelihood(requests_of("loglikelihood", pairs))
    told = other.loglikelihood(requests_of("loglikelihood", pairs), disable_tqdm=True)
    # Its own model takes the template's last line break for a part of every answer; here it is the
    # template's, and what is left over is how likely that break is, the same for all answers.
    left = [value - mine for (mine, _), (value, _) in zip(found, told, strict=True)]
    batch = model.template.encode([conversation_of(history[1:])], pad_id=0)
    ids = torch.tensor([model.template.tokenizer(ours)["input_ids"]])
    assert batch.ids[0, -1] == ids[0, -1]
    line_break = -float(model.token_losses(ids)[0, -1])
    assert left == pytest.approx([line_break] * len(left), abs=1e-4)


def test_a_reply_that_has_begun_is_gone_on_with(model):
    history = [{"role": "user", "content": "Name a tree"}, {"role": "assistant", "content": "a"}]
    with applying(model) as inside:
        lm = DemurLM(inside)
        whole = lm.apply_chat_template(history[:1])
        begun = lm.apply_chat_template(history, add_generation_prompt=False)
        behind = whole + "a"  # A task may write behind the template, too.
        values = lm.loglikelihood(
            requests_of("loglikelihood", [(begun, " tree"), (behind, " tree"), (whole, " tree")])
        )
    assert values[0] == values[1] != values[2]


def test_deltas_are_paired_and_zero_where_nothing_is_changed(model, folder):
    tasks = ["tiny_choices", "tiny_texts", "tiny_replies"]
    found = evaluate(
        model,
        tasks,
        acts=[demur.Add(direction_of(model), 0.0)],
        include_path=folder,
        defaults=False,
    )
    assert {row.task for row in found.record.deltas} == set(tasks)
    for row in found.record.deltas:
        assert row.change.n == len(ITEMS)
        assert row.change.value == pytest.approx(0.0, abs=1e-9)
        assert row.plain.value == pytest.approx(row.edited.value)
    assert found.record.edits == ("Add",)
    assert not found.record.chat


def test_an_edit_changes_items_and_the_change_is_their_mean(model, folder):
    act = demur.Ablate(direction_of(model))
    found = evaluate(model, ["tiny_texts"], acts=[act], include_path=folder, defaults=False)
    (row,) = [one for one in found.record.deltas if one.metric == "word_perplexity"]
    own = [one for one in found.items if one.metric == "word_perplexity"]
    assert row.unit == "nats per word"
    assert row.change.low < row.change.value < row.change.high
    changes = [one.edited - one.plain for one in own]
    assert row.change.value == pytest.approx(sum(changes) / len(changes))
    # As the model says when asked directly.
    words = len(ITEMS[0]["question"].split())
    ids = model.template.tokenizer(ITEMS[0]["question"])["input_ids"]
    prefix = model.template.tokenizer.eos_token_id
    with demur.applied(model, act):
        losses = model.token_losses(torch.tensor([[prefix, *ids]]))
    assert own[0].edited == pytest.approx(float(losses.sum()) / words)


def test_limits_are_kept(model, folder):
    act = demur.Ablate(direction_of(model))
    found = evaluate(
        model, ["tiny_choices"], acts=[act], include_path=folder, defaults=False, limit=3
    )
    assert {row.change.n for row in found.record.deltas} == {3}


def test_nothing_to_apply_and_unknown_tasks_are_refused(model, folder):
    with pytest.raises(ConfigError, match="nothing to compare"):
        evaluate(model, ["tiny_choices"], include_path=folder, defaults=False)
    act = demur.Ablate(direction_of(model))
    with pytest.raises(ConfigError, match="no task called `tiny_choice`") as error:
        evaluate(model, ["tiny_choice"], acts=[act], include_path=folder, defaults=False)
    assert "tiny_choices" in error.value.hint


def test_options_of_generation_that_are_not_known_are_refused(model):
    asked = requests_of("generate_until", [("a", {"until": [], "typical_p": 0.2})])
    with applying(model) as inside, pytest.raises(ConfigError, match="typical_p"):
        DemurLM(inside).generate_until(asked)


def test_the_model_is_itself_again_after_an_error(model):
    ids = torch.tensor([[5, 6, 7]])
    before = model.logits(ids)
    with (
        pytest.raises(TemplateError, match=r"continuation has \d+ tokens"),
        applying(model, [demur.Ablate(direction_of(model))]) as inside,
    ):
        DemurLM(inside).loglikelihood(
            requests_of("loglikelihood", [("a", " tree in a small garden" * 200)])
        )
    assert torch.equal(model.logits(ids), before)


def test_an_edit_that_is_never_reached_fails(model):
    model.intercept = lambda *_: lambda: None
    act = demur.Ablate(direction_of(model))
    with pytest.raises(SilentEditError), applying(model, [act]) as inside:
        DemurLM(inside).loglikelihood(requests_of("loglikelihood", PAIRS[:1]))


# Under an anchor ----------------------------------------------------------------------------------


def anchor_of(model, threshold, **more):
    from tests.test_anchor import anchor_of as anchor

    return anchor(model, threshold, **more)


def test_an_anchor_that_stays_shut_changes_nothing_and_says_so(model, folder):
    found = evaluate(
        model,
        ["tiny_choices", "tiny_replies"],
        anchor=anchor_of(model, 1e9),
        include_path=folder,
        defaults=False,
    )
    assert found.record.chat
    for row in found.record.deltas:
        assert row.opened == 0
        assert row.change.value == pytest.approx(0.0, abs=1e-9)
    assert {one.opened for one in found.items} == {False}


def test_an_anchor_that_opens_changes_likelihoods(model):
    history = [{"role": "user", "content": "Name a tree"}]
    values = []
    for acts in ((), (anchor_of(model, -1e9),)):
        with applying(model, acts) as inside:
            lm = DemurLM(inside)
            context = lm.apply_chat_template(history)
            asked = requests_of("loglikelihood", [(context, "it is"), (context, "far")])
            values.append(lm.loglikelihood(asked))
    assert all(abs(a - b) > 1e-3 for (a, _), (b, _) in zip(*values, strict=True))
    assert lm.opened == {context: True}


def test_a_text_that_the_gate_cannot_read_is_refused_under_an_anchor(model, folder):
    anchor = anchor_of(model, 1e9)
    for tasks, chat in (
        (["tiny_choices"], False),
        (["tiny_texts"], True),
        (["tiny_replies"], False),
    ):
        with pytest.raises(ConfigError, match="anchor reads the user's turn"):
            evaluate(model, tasks, anchor=anchor, chat=chat, include_path=folder, defaults=False)


def test_a_canned_anchor_has_no_likelihoods(model, folder):
    anchor = anchor_of(model, -1e9, action="canned")
    with pytest.raises(ConfigError, match="given text"):
        evaluate(model, ["tiny_choices"], anchor=anchor, include_path=folder, defaults=False)

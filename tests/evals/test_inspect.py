# ruff: noqa: E402 (what an extra brings is imported behind the check for it)
"""inspect-ai asks demur's models, by name, plainly and under edits and anchors."""

import gc
import json
import warnings

import pytest

pytest.importorskip("inspect_ai", reason="the extra inspect is not installed")
pytestmark = pytest.mark.filterwarnings(
    # inspect-ai's and its libraries' own, of which no call here is the cause.
    "ignore::DeprecationWarning",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)

import torch
from inspect_ai import Task
from inspect_ai import eval as evaluated
from inspect_ai.dataset import MemoryDataset, Sample, json_dataset
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    get_model,
)
from inspect_ai.solver import generate
from tests.test_anchor import anchor_of
from tests.tiny import tiny_model

import demur
from demur.bridges.inspect_registry import refusal, refusal_target
from demur.directions import Direction
from demur.errors import ConfigError
from demur.evals.judges import Outcome, Verdict, judges
from demur.sites import Site

ASKED = ["Name a tree", "Is it far?", "Where do I plant a tree?", "Say hello"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model as a folder, and a direction and anchors that were made on it."""
    path = tmp_path_factory.mktemp("tiny")
    made = tiny_model("llama", torch.float32)
    made.hf.save_pretrained(path)
    made.template.tokenizer.save_pretrained(path)
    model = demur.load(str(path))
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(3)) * 4
    found = Direction.from_vector(vector, site=Site(1, "resid_pre"), position=-1, recipe="drawn")
    about = {"model": model.name, "fingerprint": model.fingerprint}
    demur.save_direction(found, path / "directions.safetensors", about=about)
    for name, threshold in (("open", -1e9), ("shut", 1e9)):
        demur.save_anchor(anchor_of(model, threshold), path / f"{name}.safetensors")
    return path


@pytest.fixture(autouse=True, scope="module")
def _streams_are_collected():
    """What inspect-ai leaves open warns when it is collected, and would fail a later test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(autouse=True)
def _quietly(monkeypatch, tmp_path):
    monkeypatch.setenv("INSPECT_DISPLAY", "none")
    monkeypatch.setenv("INSPECT_LOG_DIR", str(tmp_path / "logs"))


def run(folder, *, scorer=None, samples=None, config=None, **arguments):
    samples = samples or [Sample(input=text, target="refused") for text in ASKED]
    task = Task(
        dataset=MemoryDataset(samples),
        solver=generate(),
        scorer=scorer or refusal(),
        config=config or GenerateConfig(max_tokens=8),
    )
    (log,) = evaluated(task, model=f"demur/{folder}", model_args=arguments, display="none")
    return log


def replies(log):
    assert log.status == "success", log.error
    return [sample.output.completion for sample in sorted(log.samples, key=lambda one: one.id)]


def test_replies_are_those_of_the_model_plain_edited_and_anchored(folder):
    model = demur.load(str(folder))
    direction, _ = demur.load_direction(folder / "directions.safetensors", model)

    def own(*acts):
        with demur.applied(model, *acts):
            return [one.text for one in model.generate(ASKED, max_new_tokens=8)]

    plain = replies(run(folder))
    assert plain == own()
    ablated = run(folder, direction=str(folder))
    assert replies(ablated) == own(demur.Ablate(direction)) != plain
    added = run(folder, direction=str(folder), edit="add", strength=2, site="2.resid_pre")
    assert replies(added) not in (plain, replies(ablated))
    about = ablated.samples[0].output.metadata["demur"]
    assert about["edits"] == ["ablate directions.safetensors"]


def test_whether_the_gate_opened_is_told(folder):
    for name, opened in (("shut", False), ("open", True)):
        log = run(folder, anchor=str(folder / f"{name}.safetensors"), any_model=True)
        told = [sample.output.metadata["demur"]["gate_opened"] for sample in log.samples]
        assert told == [opened] * len(ASKED)


def test_what_the_judge_cannot_read_is_unscored_and_counted(folder, monkeypatch):
    outcomes = [Outcome.REFUSED, Outcome.UNPARSED, Outcome.COMPLIED, Outcome.UNPARSED]

    class Known:
        deterministic = True

        def __call__(self, exchanges):
            (one,) = exchanges
            return [Verdict(outcomes[ASKED.index(one.prompt)], None, "known")]

    monkeypatch.setitem(judges._targets, "known", Known)
    (score,) = run(folder, scorer=refusal(judge="known")).results.scores
    assert (score.scored_samples, score.unscored_samples) == (2, 2)
    assert score.metrics["mean"].value == pytest.approx(0.5)
    log = run(folder, scorer=refusal_target(judge="known"))
    (score,) = log.results.scores
    assert score.metrics["mean"].value == pytest.approx(0.5)
    told = {sample.input: sample.scores["refusal_target"].answer for sample in log.samples}
    assert told == {text: str(one.value) for text, one in zip(ASKED, outcomes, strict=True)}


def test_turns_a_system_message_and_a_reply_that_has_begun_are_laid_out(folder):
    model = demur.load(str(folder), system="Be brief.")
    talk = [
        ChatMessageSystem(content="Be brief."),
        ChatMessageUser(content="Name a tree"),
        ChatMessageAssistant(content="a model"),
        ChatMessageUser(content="Is it far?"),
    ]
    turns = demur.models.conversation_of(
        [{"role": one.role, "content": one.content} for one in talk[1:]]
    )
    whole, begun = (
        model.generate(model.encode([turns], replies), max_new_tokens=8)[0].text
        for replies in (None, ["it is"])
    )
    samples = [
        Sample(id=1, input=talk, target="x"),
        Sample(id=2, input=[*talk, ChatMessageAssistant(content="it is")], target="x"),
    ]
    assert replies(run(folder, samples=samples)) == [whole, begun]


def test_a_drawn_reply_hangs_on_seed_and_prompt_alone(folder):
    config = GenerateConfig(max_tokens=8, temperature=1.0, seed=4)
    first = replies(run(folder, config=config))
    assert replies(run(folder, config=config.merge(GenerateConfig(max_connections=1)))) == first
    other = config.model_copy(update={"seed": 5})
    assert replies(run(folder, config=other)) != first


def test_a_stop_ends_the_reply_before_it(folder):
    whole = replies(run(folder, config=GenerateConfig(max_tokens=12)))
    stop = next(text[3] for text in whole if len(text) > 4)
    cut = replies(run(folder, config=GenerateConfig(max_tokens=12, stop_seqs=[stop])))
    assert cut == [text.split(stop)[0] for text in whole]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"edit": "add"}, "names no direction"),
        ({"directoin": "x"}, "no argument `directoin`"),
        ({"direction": "none.safetensors"}, "no direction can be read"),
    ],
)
def test_wrong_arguments_are_refused(folder, arguments, said):
    with pytest.raises(demur.DemurError, match=said):
        get_model(f"demur/{folder}", memoize=False, **arguments)


def test_settings_that_are_not_known_fail_the_run(folder):
    log = run(folder, config=GenerateConfig(max_tokens=4, top_k=3))
    assert log.status == "error"
    assert "`top_k`" in log.error.message


def test_a_target_that_names_no_outcome_fails_the_run(folder):
    log = run(folder, scorer=refusal_target(), samples=[Sample(input="Say hello", target="yes")])
    assert log.status == "error"
    assert ConfigError.__name__ in log.error.traceback


def test_the_command_line_finds_provider_and_scorer_by_name(folder, tmp_path, monkeypatch):
    from inspect_ai._cli.main import inspect as program  # The `inspect` command.

    rows = [{"input": text, "target": "complied"} for text in ASKED]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(json_dataset(str(tmp_path / "rows.jsonl"))) == len(ASKED)
    (tmp_path / "task.py").write_text(
        "from inspect_ai import Task, task\n"
        "from inspect_ai.dataset import json_dataset\n"
        "from inspect_ai.solver import generate\n"
        "from demur.bridges.inspect_registry import refusal_target\n"
        "@task\n"
        "def mine():\n"
        "    rows = json_dataset('rows.jsonl')\n"
        "    return Task(dataset=rows, solver=generate(), scorer=refusal_target())\n"
    )
    monkeypatch.chdir(tmp_path)
    command = f"eval task.py --model demur/{folder} -M direction={folder} --max-tokens 4"
    with pytest.raises(SystemExit) as end:
        program([*command.split(), "--display", "none", "--log-format", "json"])
    assert end.value.code in (0, None)
    (log,) = (tmp_path / "logs").glob("*.json")
    told = json.loads(log.read_text())
    assert told["status"] == "success", told["error"]["message"]
    assert told["eval"]["model"] == f"demur/{folder}"

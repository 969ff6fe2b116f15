"""vLLM for real, on a small random model; `DEMUR_VLLM_PYTHON` names the interpreter that has it.

In float32, so that what is said to be the same can be seen to be: a wrong layer, position or sign
would show at 1e-1, and sums in another order at 1e-4.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.tiny import VOCAB, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from demur.activations import moments
from demur.anchor import Floor
from demur.directions import Direction
from demur.engines import programs
from demur.engines.acts import AblateOutputs, Clamp, Hold
from demur.engines.vllm import PYTHON, Engine, save
from demur.errors import ConfigError, SilentEditError
from demur.exports import Steering, export
from demur.interventions import Ablate, Add, applied
from demur.models import Model, Template, family_of
from demur.sites import Site

pytestmark = pytest.mark.skipif(
    not os.environ.get(PYTHON), reason=f"{PYTHON} names no environment of vLLM"
)

PROMPTS = [
    "How do I plant a tree?",
    "Where is the station",
    "Write",
    "Is it far from here, or not?",
]
TOLERANCE = 2e-3


def _model(seed: int) -> Model:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    hf = LlamaForCausalLM(config)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(hf.named_parameters()):
            centre, spread = (1.0, 0.3) if parameter.ndim == 1 else (0.0, 0.1)
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=rng))
            assert name
    return Model(
        hf, family_of("llama"), Template(tiny_tokenizer(), max_length=512), name="small-random"
    )


@pytest.fixture(scope="module")
def model() -> Model:
    return _model(0)


@pytest.fixture(scope="module")
def direction(model) -> Direction:
    rng = torch.Generator().manual_seed(1)
    return Direction.from_vector(
        torch.randn(model.d_model, generator=rng),
        site=Site(1, "resid_post"),
        position=-1,
        recipe="drawn",
    )


@pytest.fixture(scope="module")
def engine(model, direction, tmp_path_factory):
    root: Path = tmp_path_factory.mktemp("vllm")
    save(model, root / "plain")
    export(model, Steering((Ablate(direction),)), root / "lora", "peft")
    ranks = int(os.environ.get("DEMUR_VLLM_RANKS", "1"))
    with Engine(
        root / "plain",
        dtype="float32",
        tensor_parallel=ranks,
        adapters={"ablated": root / "lora"},
        max_length=256,
    ) as running:
        yield running


def _logprobs(model: Model, *acts, prompts=PROMPTS) -> torch.Tensor:
    with applied(model, *acts):
        return model.logits(model.encode(prompts)).log_softmax(1)


def test_tokens_and_stops_are_those_of_the_model(engine, model):
    assert engine.stop_ids == model.stop_ids
    theirs, ours = engine.encode(PROMPTS), model.encode(PROMPTS)
    assert torch.equal(theirs.mask, ours.mask)
    assert torch.equal(theirs.ids[theirs.mask], ours.ids[ours.mask])


def test_replies_are_those_of_the_model(engine, model):
    ours = model.generate(PROMPTS, max_new_tokens=12)
    theirs = engine.generate(PROMPTS, max_new_tokens=12)
    assert [one.ids for one in theirs] == [one.ids for one in ours]
    assert [one.text for one in theirs] == [one.text for one in ours]
    assert engine.spent.wall_s > 0


def test_logprobs_are_those_of_the_model(engine, model):
    torch.testing.assert_close(
        engine.logprobs(PROMPTS), _logprobs(model), atol=TOLERANCE, rtol=TOLERANCE
    )


def test_moments_reduced_inside_are_those_of_the_model(engine, model):
    prompts = PROMPTS * 10  # More than are kept before they are reduced.
    sites = [Site(n, "resid_post") for n in range(model.n_layers)]
    ours = moments(model, prompts, sites=sites, positions=(-3, -1))
    theirs = engine.moments(prompts, sites=sites, positions=(-3, -1))
    assert theirs.n == len(prompts)
    assert theirs.exact == ours.exact
    torch.testing.assert_close(theirs.mean, ours.mean, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(theirs.total, ours.total, atol=TOLERANCE, rtol=TOLERANCE)
    for mine, other in zip(ours.spread.flatten(0, 1), theirs.spread.flatten(0, 1), strict=True):
        gram = mine.double().T @ mine.double()
        torch.testing.assert_close(
            other.double().T @ other.double(), gram, atol=1e-2, rtol=TOLERANCE
        )


def test_the_input_of_a_block_is_the_output_of_the_one_before(engine, model):
    pre = engine.moments(PROMPTS, sites=[Site(2, "resid_pre")], positions=(-1,), rank=0)
    ours = moments(model, PROMPTS, sites=[Site(2, "resid_pre")], positions=(-1,), rank=0)
    assert pre.sites == (Site(2, "resid_pre"),)
    torch.testing.assert_close(pre.mean, ours.mean, atol=TOLERANCE, rtol=TOLERANCE)


def _acts(direction: Direction) -> dict[str, object]:
    return {
        "add": Add(direction, 0.3),
        "floor": Clamp(direction, 2.0, Site(2, "resid_post"), "at-least"),
        "ceiling": Clamp(direction, -2.0, Site(2, "resid_post"), "at-most"),
        "outputs": AblateOutputs(direction),
    }


@pytest.mark.parametrize("name", ["add", "floor", "ceiling", "outputs"])
def test_edits_are_those_of_the_model(engine, model, direction, name):
    act = _acts(direction)[name]
    wanted = _logprobs(model, act)
    assert float((wanted - _logprobs(model)).abs().max()) > 50 * TOLERANCE
    torch.testing.assert_close(
        engine.logprobs(PROMPTS, acts=(act,)), wanted, atol=TOLERANCE, rtol=TOLERANCE
    )


def test_requests_of_all_kinds_share_a_batch(engine, model, direction):
    acts = _acts(direction)
    each = [(acts["add"],), (), (acts["floor"], acts["add"]), (acts["outputs"],)]
    theirs = engine.generate(PROMPTS, max_new_tokens=10, each=each)
    for prompt, own, reply in zip(PROMPTS, each, theirs, strict=True):
        with applied(model, *own):
            assert reply.ids == model.generate([prompt], max_new_tokens=10)[0].ids
    again = engine.generate(PROMPTS, max_new_tokens=10)
    assert [r.ids for r in again] == [r.ids for r in model.generate(PROMPTS, max_new_tokens=10)]


def test_a_lora_of_rank_1_is_the_ablation(engine, model, direction):
    wanted = _logprobs(model, Ablate(direction))
    found = engine.logprobs(PROMPTS, adapter="ablated")
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    outputs = _logprobs(model, AblateOutputs(direction))
    assert (
        float((outputs - wanted).abs().max()) > 50 * TOLERANCE
    )  # The hooks would be another edit.


@pytest.mark.parametrize("opens", [True, False])
def test_a_hold_acts_from_its_token_on(engine, model, direction, opens):
    rng = torch.Generator().manual_seed(2)
    axis = torch.nn.functional.normalize(torch.randn(model.d_model, generator=rng), dim=0)
    level = torch.tensor([30.0, 0.0])
    floor = Floor(Site(2, "resid_post"), axis, axis, level - 5, level, level - 20)
    prompt = PROMPTS[0]
    scored = moments(model, [prompt], sites=[direction.site], positions=(-4,), rank=0)
    at = float(scored.mean[0, 0] @ direction.unit.double())
    hold = Hold(replace(direction, position=-4), at - 1 if opens else at + 1, (floor,))
    index = int(model.encode([prompt]).ends[0]) - 4

    def reference(x: torch.Tensor) -> torch.Tensor:
        first = torch.arange(x.shape[1]) >= index
        gap = (30.0 - x @ axis).clamp(min=0, max=20.0).unsqueeze(-1) * axis
        return x + torch.where(first.view(1, -1, 1), gap, torch.zeros_like(gap))

    undo = model.intercept(Site(2, "resid_post"), reference)
    with model.whole_rows():
        held = model.logits(model.encode([prompt])).log_softmax(1)
    undo()
    plain = _logprobs(model, prompts=[prompt])
    assert float((held - plain).abs().max()) > 50 * TOLERANCE
    torch.testing.assert_close(
        engine.logprobs([prompt], acts=(hold,)),
        held if opens else plain,
        atol=TOLERANCE,
        rtol=TOLERANCE,
    )


def test_a_hook_that_raises_ends_in_an_error(engine, model, direction):
    """The plug-in logs it and goes on unedited; the mates in its batch lose their edits too."""
    batch = engine.encode(PROMPTS)
    add = programs.Addition(1, (direction.unit * direction.norm).float())
    for token in (0, int(batch.ends[1]) + 2):  # In the prompt; while the reply is written.
        fault = programs.Fault(1, token)
        with pytest.raises(SilentEditError, match="on purpose") as raised:
            engine._run(
                batch,
                {"good": (add,), "bad": (add, fault)},
                ["good", "bad", "good", None],
                max_new_tokens=8,
            )
        assert "block 1" in raised.value.fact
    engine.check()
    # The engine lives on, and nothing is left of it.
    ours = model.generate(PROMPTS, max_new_tokens=6)
    assert [r.ids for r in engine.generate(PROMPTS, max_new_tokens=6)] == [r.ids for r in ours]


def test_a_mate_of_a_hook_that_raises_ends_in_an_error_as_well(engine, direction):
    batch = engine.encode([PROMPTS[0]] * 2)
    add = programs.Addition(1, (direction.unit * direction.norm).float())
    told = engine._ask  # What comes back is looked at before it is judged.
    seen = {}

    def listening(*args, **options):
        seen["told"] = told(*args, **options)
        return seen["told"]

    engine._ask = listening
    try:
        with pytest.raises(SilentEditError):
            engine._run(
                batch,
                {"good": (add,), "bad": (programs.Fault(1, 3),)},
                ["good", "bad"],
                max_new_tokens=2,
            )
    finally:
        engine._ask = told
    reached = seen["told"].head["reports"]["good"][0]["rows"]["0"]["reached"]["1"]
    assert reached < int(batch.ends[0])


def test_the_process_refuses_what_is_not_on_its_list(engine):
    head = {
        "do": "run",
        "rows": [{"ids": [1, 2], "program": "0", "adapter": None, "temperature": None, "seed": 0}],
        "programs": {"0": [{"op": "exec", "code": "1"}]},
        "max_new_tokens": 1,
        "stop_ids": [],
        "logprobs": False,
    }
    with pytest.raises(ConfigError, match="no operation of an engine is called `exec`"):
        engine._ask(head)
    with pytest.raises(ConfigError, match="not directional ablation"):
        engine._ask(head | {"programs": {"0": [{"op": "ablate"}]}})


def test_prompts_that_are_cut_into_chunks_are_read_and_edited_whole(engine, model, direction):
    words = "the user asks and the assistant answers in a small garden " * 8
    prompts = [f"{n} {words}"[: 300 + 7 * n] for n in range(40)]  # More tokens than one pass takes.
    act = Add(direction, 0.3)
    sites = [Site(3, "resid_post")]
    theirs = engine.moments(prompts, sites=sites, positions=(-5, -1), acts=(act,))
    with applied(model, act):
        ours = moments(model, prompts, sites=sites, positions=(-5, -1))
    assert int(model.encode(prompts).ends.sum()) > 2048
    torch.testing.assert_close(theirs.mean, ours.mean, atol=TOLERANCE, rtol=TOLERANCE)

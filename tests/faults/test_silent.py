"""What could go wrong without a word: each is exact, an error, or a count that is stated."""

import copy
import dataclasses
import math
import threading
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from tests.planted import PLANTED_LAYER, planted, prompts
from tests.planted import tokenizer as planted_tokenizer
from tests.tiny import tiny_model, tiny_tokenizer

from demur.activations import Activations, collect, moments
from demur.causal import Arm, Bench, NeutralText, Replies, legs
from demur.config import RunConfig
from demur.directions import Direction
from demur.edits import as_delta, edited
from demur.errors import (
    ConfigError,
    DegenerateVectorError,
    FamilyError,
    NonFiniteError,
    SilentEditError,
    TemplateError,
    TooFewPromptsError,
)
from demur.estimators import DifferenceOfMeans, candidates
from demur.evals.endpoint import ChatEndpoint
from demur.evals.judges import (
    Exchange,
    Outcome,
    Verdict,
    agreement,
    labelled_exchanges,
    verdicts_of,
)
from demur.evals.rates import refusals, verdict_change, verdict_share
from demur.guard import Fisher, Guard, Rarity, Read, Threshold, calibrate, reads_of
from demur.interventions import Ablate, Add, applied
from demur.models import Model, Template
from demur.selection import RefusalTokens, learn_refusal_tokens
from demur.separation import Belief, strength_at
from demur.sites import Site, Span
from demur.stats import mcnemar_p, paired_share_change, proportion

PROMPTS = ["Name a tree", "Is it far from here to the sea?", "Add 4 and 17"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(dtype=torch.float64):
    made, tokenizer = tiny_model("llama", dtype=dtype), tiny_tokenizer("chatml")
    made.hf.resize_token_embeddings(max(len(tokenizer), made.hf.config.vocab_size))
    return Model(made.hf, made.family, Template(tokenizer), name="tiny chat")


@pytest.fixture(scope="module")
def shared():
    """For tests that leave the model as it was."""
    return chat()


def a_direction(model, seed=0):
    rng = torch.Generator().manual_seed(seed)
    vector = torch.randn(model.d_model, generator=rng, dtype=torch.float64)
    return Direction.from_vector(vector, site=Site(1, "resid_pre"), position=-1, recipe="drawn")


# --- An edit that never ran -----------------------------------------------------------------------


def compile_base(model):
    model.hf.base_model.compile(backend="eager")


def compile_whole(model):
    model.hf.compile(backend="eager")


def compile_block(model):
    model.blocks[1].compile(backend="eager")


def compile_map(model):
    model.blocks[1].self_attn.o_proj.compile(backend="eager")


def compile_in_place_of_a_block(model):
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")


def compile_forward(model):
    block = model.blocks[1]
    block.forward = torch.compile(block.forward, backend="eager")


COMPILED = [
    compile_base,
    compile_whole,
    compile_block,
    compile_map,
    compile_in_place_of_a_block,
    compile_forward,
]


@pytest.mark.parametrize("compile_it", COMPILED)
def test_a_compiled_model_is_not_edited_before_or_inside(compile_it):
    model = chat()
    batch, act = model.encode(PROMPTS), Ablate(a_direction(model))
    # Compiled inside, a block once went on with the edit of its first graph in later passes.
    with applied(model, act):
        model.logits(batch)
        compile_it(model)
        with pytest.raises(SilentEditError, match=r"compiled|replaced"):
            model.logits(batch)
    with pytest.raises(SilentEditError, match="compiled"), applied(model, act):
        model.logits(batch)
    assert not model._hooks
    assert not any(module._forward_hooks for module in model.hf.modules())


def replace_a_map(model):
    old = model.blocks[1].self_attn.o_proj
    model.blocks[1].self_attn.o_proj = copy.deepcopy(old)


def replace_a_block(model):
    model.blocks[1] = copy.deepcopy(model.blocks[1])


def add_an_adapter(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model.hf)


def leave_a_layer_out(model):
    model.hf.config.num_hidden_layers = 2


def take_a_hook_away(model):
    model.blocks[1].self_attn.o_proj._forward_hooks.clear()


LOST = [replace_a_map, replace_a_block, add_an_adapter, leave_a_layer_out, take_a_hook_away]


@pytest.mark.parametrize("direct", [False, True], ids=["by demur", "by transformers"])
@pytest.mark.parametrize("lose", LOST)
def test_a_hook_that_is_lost_after_it_once_ran_is_an_error(lose, direct):
    model = chat()
    batch = model.encode(PROMPTS[:1])
    with applied(model, Ablate(a_direction(model))):
        model.logits(batch)
        lose(model)
        with pytest.raises(SilentEditError):
            model.hf(batch.ids) if direct else model.logits(batch)


def test_a_model_whose_hooks_are_all_taken_away_is_an_error():
    model = chat()

    def run_without_hooks():
        with applied(model, Ablate(a_direction(model))):
            for module in model.hf.modules():
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()
            model.logits(model.encode(PROMPTS))

    with pytest.raises(SilentEditError, match="without reaching"):
        run_without_hooks()


def test_a_reading_is_lost_as_loudly_as_an_edit():
    model = chat()
    model.hf.config.num_hidden_layers = 2
    with pytest.raises(SilentEditError, match=r"2\.resid_pre"):
        collect(model, PROMPTS, sites=[Site(2, "resid_pre")], positions=[-1])


def test_a_weight_that_is_parametrized_inside_is_still_edited(shared):
    model = copy.deepcopy(shared)
    batch, act = model.encode(PROMPTS), Ablate(a_direction(model))
    with applied(model, act):
        before = model.logits(batch)
        weight = model.blocks[1].self_attn.o_proj
        torch.nn.utils.parametrize.register_parametrization(weight, "weight", torch.nn.Identity())
        assert torch.equal(model.logits(batch), before)


def test_beams_without_a_cache_or_with_one_are_edited_at_every_step(shared):
    act = Ablate(a_direction(shared))
    ids = shared.encode(PROMPTS[:1]).ids
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    with applied(shared, act):
        found = [shared.hf.generate(ids, use_cache=cache, **options) for cache in (True, False)]
    in_weights = edited(shared, as_delta(shared, act)).hf.generate(ids, **options)
    assert torch.equal(found[0], in_weights)
    assert torch.equal(found[1], in_weights)
    assert not torch.equal(shared.hf.generate(ids, **options), in_weights)


def test_decoding_does_not_compile_itself_while_edits_are_in_force(shared):
    options = shared.hf.generation_config
    was = options.disable_compile
    with applied(shared, Ablate(a_direction(shared))):
        assert options.disable_compile is True
    assert options.disable_compile == was


@pytest.mark.slow
def test_a_static_cache_that_compiles_decoding_keeps_the_edit():
    from transformers.generation.configuration_utils import CompileConfig

    model = chat()
    act, ids = Ablate(a_direction(model)), model.encode(PROMPTS[:1]).ids
    compiling = CompileConfig(backend="eager", fullgraph=False)
    compiling._compile_all_devices = True  # On a GPU it would anyway.
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    static = {"cache_implementation": "static", "compile_config": compiling, **options}

    def logits(hf, **how):
        return torch.stack(hf.generate(ids, **how).logits)

    plain = logits(model.hf, **static)
    with applied(model, act):
        during = logits(model.hf, **static)
    torch.testing.assert_close(logits(model.hf, **static), plain)
    in_weights = edited(model, as_delta(model, act)).hf
    torch.testing.assert_close(during, logits(in_weights, **options))


def test_hooks_of_accelerate_do_not_take_ours_away(shared):
    hooks = pytest.importorskip("accelerate.hooks")
    model = copy.deepcopy(shared)
    batch, act = model.encode(PROMPTS), Ablate(a_direction(model))
    with applied(model, act):
        before = model.logits(batch)
    for block in model.blocks:
        for module in (block, block.self_attn.o_proj, block.mlp.down_proj):
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True))
    with applied(model, act):
        assert torch.equal(model.logits(batch), before)


def test_gradient_checkpointing_is_exact_and_training_mode_is_refused(shared):
    model = copy.deepcopy(shared)
    batch, act = model.encode(PROMPTS), Ablate(a_direction(model))
    with applied(model, act):
        before = model.logits(batch)
    switch = getattr(model.hf, "activation_checkpointing_enable", None)  # As of transformers 5.
    (switch or model.hf.gradient_checkpointing_enable)()
    with applied(model, act), torch.inference_mode():
        assert torch.equal(model.logits(batch), before)
    # In training mode dropout changes every number, and checkpoints drop the shared prefix.
    model.hf.train()
    with pytest.raises(ConfigError, match="training mode"):
        model.logits(batch)


def test_a_copy_made_inside_is_not_edited_and_its_own_edits_run(shared):
    batch = shared.encode(PROMPTS)
    plain = shared.logits(batch)
    act, other = Ablate(a_direction(shared)), Ablate(a_direction(shared, seed=1))
    with applied(shared, act) as edits:
        ran = dict(edits)
        inside = edited(shared, as_delta(shared, other))
        during = inside.logits(batch)
        assert dict(edits) == ran
        with pytest.raises(FamilyError, match="being edited"):
            copy.deepcopy(shared)
    assert torch.equal(during, edited(shared, as_delta(shared, other)).logits(batch))
    twin = copy.deepcopy(shared)
    with applied(twin, act):
        assert not torch.allclose(twin.logits(batch), plain)
        assert torch.equal(shared.logits(batch), plain)


def in_a_thread(run):
    """What it returns there, or the error's text."""
    said = []

    def other():
        try:
            said.append(run())
        except ConfigError as error:
            said.append(error.fact)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    return said.pop()


@pytest.mark.parametrize("how", ["applied", "site", "heads"])
def test_another_thread_does_not_get_edited_results(shared, how):
    batch = shared.encode(PROMPTS)
    with ExitStack() as undo:
        if how == "applied":
            undo.enter_context(applied(shared, Ablate(a_direction(shared))))
        elif how == "site":
            undo.callback(shared.intercept(Site(1, "resid_pre"), lambda x: 2 * x))
        else:
            undo.callback(shared.intercept_heads(1, lambda x: 2 * x))
        for run in (
            lambda: shared.logits(batch),
            lambda: shared.hf(batch.ids),
            lambda: shared.intercept(Site(0, "resid_pre"), lambda x: x),
        ):
            assert "two threads" in in_a_thread(run)
    assert not shared._hooks
    assert torch.equal(in_a_thread(lambda: shared.logits(batch)), shared.logits(batch))


@pytest.mark.parametrize("part", ["_hook", "_watched"])
def test_a_hook_that_cannot_be_set_leaves_nothing_behind(shared, monkeypatch, part):
    def broken(*_args):
        raise SilentEditError("compiled", "load it anew")

    monkeypatch.setattr(shared, part, broken)
    with pytest.raises(SilentEditError):
        shared.intercept(Site(1, "resid_pre"), lambda x: 2 * x)
    monkeypatch.undo()
    with pytest.raises(FamilyError):
        shared.intercept(Site(99, "resid_pre"), lambda x: x)
    assert not shared._hooks
    undo = [shared.intercept(Site(1, "resid_pre"), lambda x: 2 * x) for _ in range(2)]
    undo.pop()()
    batch = shared.encode(PROMPTS)
    assert "two threads" in in_a_thread(lambda: shared.logits(batch))
    undo.pop()()
    assert torch.equal(in_a_thread(lambda: shared.logits(batch)), shared.logits(batch))


def test_blocks_in_blocks_are_undone_in_any_order(shared):
    batch = shared.encode(PROMPTS)
    plain = shared.logits(batch)
    act = Ablate(a_direction(shared))
    with applied(shared, act):
        once = shared.logits(batch)
    outer, inner = applied(shared, act), applied(shared, act)
    outer.__enter__()
    inner.__enter__()
    shared.logits(batch)
    outer.__exit__(None, None, None)
    assert torch.equal(shared.logits(batch), once)
    inner.__exit__(None, None, None)
    assert torch.equal(shared.logits(batch), plain)


def test_an_edit_that_raises_half_way_leaves_nothing_behind(shared):
    batch = shared.encode(PROMPTS)
    plain = shared.logits(batch)

    class Failing:
        def sites(self, _model):
            return (Site(0, "resid_pre"), Site(2, "mlp_out"), Site(99, "resid_pre"))

        def __call__(self, x):
            return x

    with pytest.raises(FamilyError, match="no site 99"), applied(shared, Failing()):
        pass
    assert not shared._hooks
    assert not shared._edits
    assert torch.equal(shared.logits(batch), plain)


@pytest.mark.parametrize(
    ("where", "error"),
    [([], ConfigError), (Span.RESPONSE, SilentEditError), (Span.EARLIER, SilentEditError)],
)
def test_an_edit_of_tokens_that_are_not_there_is_an_error(shared, where, error):
    with (
        pytest.raises(error, match=r"names no span|none was of the span"),
        applied(shared, Add(a_direction(shared)), where=where),
    ):
        shared.logits(shared.encode(PROMPTS))


def test_an_edit_of_tokens_that_may_be_absent_is_exact(shared):
    batch = shared.encode(PROMPTS)
    plain, act = shared.logits(batch), Add(a_direction(shared))
    with applied(shared, act, where=Span.RESPONSE, may_be_absent=True):
        torch.testing.assert_close(shared.logits(batch), plain)


def test_an_edit_of_no_prompt_is_none_and_of_too_few_is_an_error(shared):
    batch, act = shared.encode(PROMPTS), Add(a_direction(shared), 3.0)
    plain = shared.logits(batch)
    nobody = torch.zeros(3, dtype=torch.bool)
    with applied(shared, act, where=Span.INSTRUCTION, when=nobody):
        torch.testing.assert_close(shared.logits(batch), plain)
    with (
        pytest.raises(ConfigError, match="speaks of 2 prompts"),
        applied(shared, act, when=torch.ones(2, dtype=torch.bool)),
    ):
        shared.logits(batch)


def test_an_addition_that_rounding_takes_away_is_an_error():
    model = chat(torch.bfloat16)
    batch = model.encode(PROMPTS)
    with (
        pytest.raises(SilentEditError, match="bfloat16 rounds the rest away"),
        applied(model, Add(a_direction(model), 1e-4)),
    ):
        model.logits(batch)
    with applied(model, Add(a_direction(model), 1.0)):
        model.logits(batch)
    with applied(model, Add(a_direction(model), 0.0)):  # Nothing was asked for.
        model.logits(batch)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_direction_of_zeros_or_nan_is_an_error(shared, value):
    direction = Direction(
        torch.full((shared.d_model,), value), 1.0, Site(1, "resid_pre"), -1, "by hand"
    )
    with pytest.raises(DegenerateVectorError), applied(shared, Ablate(direction)):
        shared.logits(shared.encode(PROMPTS))


@pytest.mark.parametrize("positions", [[0], [-1, 2], []])
def test_a_position_behind_the_prompt_is_not_read(shared, positions):
    # Position 0 was the padding behind the shorter prompts.
    with pytest.raises(ConfigError, match="to read"):
        collect(shared, PROMPTS, sites=[Site(1, "resid_pre")], positions=positions)


@pytest.mark.parametrize(("tokens", "rows"), [(0, 4), (-1, 4), (3, 0)])
def test_a_reply_of_no_tokens_does_not_go_on_for_ever(shared, tokens, rows):
    with pytest.raises(ConfigError, match="are none"):
        shared.generate(PROMPTS, max_new_tokens=tokens, batch_size=rows)


# --- NaN and infinity in one row ------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken():
    """A model that gives NaN for prompts that hold a certain character."""
    model = chat()
    head = model.hf.get_output_embeddings()  # Untied, or every prompt would have a NaN logit.
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    only = {*model.encode(["Q"]).ids[0].tolist()} - {*model.encode(["Name a tree"]).ids[0].tolist()}
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[list(only)] = math.nan
    return model


ASKED = ["Name a tree", "Q", "Is it far?"]


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda m, at: collect(m, ASKED, sites=[at], positions=[-1]), r"prompt 2\b(?!,)"),
        (lambda m, at: moments(m, ASKED, sites=[at], positions=[-1]), r"prompt 2\b(?!,)"),
        (lambda m, _at: m.logits(m.encode(ASKED)), r"rows \[1\]"),
        (lambda m, _at: m.generate(ASKED, max_new_tokens=2), r"prompt 2\b(?!,)"),
        (lambda m, _at: m.generate(ASKED, max_new_tokens=2, temperature=1.0), r"prompt 2\b(?!,)"),
        (lambda m, _at: m.token_losses(m.encode(ASKED).ids, m.encode(ASKED).mask), r"rows \[1\]"),
    ],
    ids=["collect", "moments", "logits", "greedy", "drawn", "losses"],
)
def test_nan_in_one_prompt_names_it(broken, call, names):
    with pytest.raises(NonFiniteError, match=names):
        call(broken, Site(1, "resid_pre"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_direction_is_not_fitted_on_rows_that_are_not_finite(bad):
    good, site = torch.randn(1, 1, 6, 4), Site(0, "resid_pre")
    held = good.clone()
    held[0, 0, 3, 1] = bad
    rows = [Activations(one, (site,), (-1,), "x") for one in (held, good + 1)]
    with pytest.raises(NonFiniteError, match=r"0\.resid_pre"):
        candidates(rows[0], rows[1], DifferenceOfMeans())
    with pytest.raises(NonFiniteError, match="harmful request 4"):
        Fisher.fit(held[0, 0], good[0, 0])
    with pytest.raises(NonFiniteError, match="benign request 4"):
        Fisher.fit(good[0, 0], held[0, 0])


def test_features_that_do_not_vary_fit_no_guard():
    with pytest.raises(DegenerateVectorError, match="do not vary"):
        Fisher.fit(torch.randn(8, 4), torch.ones(8, 4))
    rows = torch.randn(8, 4)
    with pytest.raises(DegenerateVectorError, match="same mean"):
        Fisher.fit(rows, rows)


def test_what_is_rare_can_be_told_where_the_highest_scores_are_equal():
    # A tenth at one value left nothing above the 90th percentile, whose mean was NaN.
    scores = [0.0] * 20 + [1.0] * 20
    found = Rarity.fit(scores)(np.array([-1.0, 0.0, 1.0, 2.0]))
    assert np.isfinite(found).all()
    assert (np.diff(found) > 0).all()


def a_guard(names=("t_inst", "span", "turns"), d_model=4):
    fisher = Fisher(torch.eye(d_model, dtype=torch.float64)[0], 0.0, 1.0)
    rarity = Rarity.fit(np.linspace(-1, 1, 40))
    reads = tuple(Read(name, fisher, rarity, True) for name in names)
    return Guard(Site(1, "resid_pre"), reads, 4, 2, Threshold(2.0, 0.05, 40, 1, 0.1), {})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["t_inst", "span", "turns"])
def test_a_guard_does_not_let_pass_what_it_cannot_score(name, bad):
    guard = a_guard()
    raw = {read.name: np.array([0.0, 9.0]) for read in guard.reads}
    assert guard.judge(raw).flagged.tolist() == [False, True]
    raw[name] = np.array([0.0, bad])
    if name == "turns" and bad == -math.inf:  # A single turn: there is nothing to read.
        assert guard.judge(raw).flagged.tolist() == [False, True]
        return
    # Infinity once stood for "nothing to read", and what broke the sum for a benign request.
    with pytest.raises(NonFiniteError, match="request 2"):
        guard.judge(raw)


def test_a_request_at_the_threshold_is_not_flagged():
    guard = a_guard(("t_inst",))
    raw = {"t_inst": np.array([0.7, 0.5])}
    at = float(guard.judge(raw).scores[0])
    exact = dataclasses.replace(guard, threshold=dataclasses.replace(guard.threshold, value=at))
    assert exact.judge(raw).flagged.tolist() == [False, False]
    below = dataclasses.replace(exact.threshold, value=math.nextafter(at, 0))
    assert dataclasses.replace(exact, threshold=below).judge(raw).flagged.tolist() == [True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_token_that_is_not_finite_is_not_passed_over_by_the_highest_window(bad):
    guard = a_guard()
    look = reads_of({read.name: read.fisher for read in guard.reads}, window=2, stride=1)
    x = torch.zeros(1, 6, 4, dtype=torch.float64)
    x[0, 2, 0] = bad
    span = torch.tensor([[False, True, True, True, True, True]])
    found = look(x, {Span.INSTRUCTION: span, Span.EARLIER: span}, torch.tensor([6]))
    assert math.isnan(float(found["span"]))
    assert math.isnan(float(found["turns"]))


def test_a_threshold_is_not_set_above_everything():
    with pytest.raises(NonFiniteError, match="1 of 40"):
        calibrate([*np.linspace(0, 1, 39), math.inf], 0.05)
    assert calibrate([*np.linspace(0, 1, 39), -math.inf], 0.05).value < 1


def test_empty_classes_and_costs_of_nan_are_errors():
    with pytest.raises(TooFewPromptsError, match="0 prompts above"):
        Belief.fit(torch.zeros(2, 0, 3), torch.zeros(2, 4, 3))
    with pytest.raises(NonFiniteError, match="strength 1"):
        strength_at(lambda _: math.nan, 0.1)
    with pytest.raises(NonFiniteError, match="to match"):
        strength_at(lambda s: s, math.nan)


@pytest.mark.parametrize(
    ("section", "key"),
    [("selection", "max_kl"), ("selection", "min_induce"), ("test", "strengths")],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_limit_is_a_number(section, key, bad):
    value = (bad,) if key == "strengths" else bad
    with pytest.raises(ValueError, match="finite number"):
        RunConfig.model_validate({section: {key: value}})


# --- Tokenizers and templates ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "rewritten",
    [
        "|upper",
        "|replace('\\n', ' ')",
        "|replace('  ', ' ')",
        "|e",
        "[:50]",
        "|title",
        "|replace('tree', 'shrub')",
    ],
)
def test_a_template_that_rewrites_the_user_is_refused(rewritten):
    source = CHATML.replace("m['content']", f"m['content']{rewritten}")
    with pytest.raises(TemplateError, match="0 times, not once"):
        Template(tiny_tokenizer("chatml", source=source))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('never') }}", "raised"),
        ("<|im_start|>user\nhello<|im_end|>\n", "0 times"),
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m['content'] }}"), "2 times"),
        ("{{ range(99)|random }}" + CHATML, "not stable"),
        ("{% if messages[0]['content']|length > 900 %}!{% endif %}" + CHATML, "not stable"),
        ("<s><s>" + CHATML, "2 beginning-of-sequence"),
    ],
)
def test_a_template_that_cannot_be_trusted_is_refused(source, says):
    tokenizer = tiny_tokenizer("chatml", source=source)
    if "<s>" in source:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
    with pytest.raises(TemplateError, match=says):
        Template(tokenizer)


def test_a_tokenizer_that_adds_what_the_template_writes_is_refused():
    tokenizer = tiny_tokenizer("chatml", source="<s>" + CHATML)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert Template(tokenizer).count_bos() == 1

    class Adding(type(tokenizer)):
        def __call__(self, text, **options):
            row = super().__call__(text, **options)
            row["input_ids"] = [self.bos_token_id, *row["input_ids"]]
            if "offset_mapping" in row:
                row["offset_mapping"] = [(0, 0), *row["offset_mapping"]]
            return row

    tokenizer.__class__ = Adding
    with pytest.raises(TemplateError, match="2 beginning-of-sequence"):
        Template(tokenizer)


def test_a_template_with_nothing_behind_the_instruction_is_read_at_its_last_token():
    source = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    template = Template(tiny_tokenizer("chatml", source=source))
    batch = template.encode(["Name a tree", "Add 4 and 17 now"], pad_id=0)
    assert [one.role for one in template.positions] == ["t_inst"]
    assert not batch.spans[Span.POST_INSTRUCTION].any()
    last = batch.ends - 1
    assert bool(batch.spans[Span.INSTRUCTION][torch.arange(2), last].all())


@pytest.mark.parametrize("missing", ["eos_token", "pad_token", "bos_token"])
def test_padding_and_stops_do_not_hang_on_special_tokens(shared, missing):
    tokenizer = tiny_tokenizer("chatml")
    setattr(tokenizer, missing, None)
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    model = Model(shared.hf, shared.family, Template(tokenizer))
    mine, theirs = model.encode(PROMPTS), shared.encode(PROMPTS)
    assert torch.equal(mine.mask, theirs.mask)
    assert torch.equal(mine.ids[mine.mask], theirs.ids[theirs.mask])
    assert torch.equal(model.logits(mine), shared.logits(theirs))
    assert set(shared.stop_ids) - set(model.stop_ids) <= {tiny_tokenizer("chatml").eos_token_id}


def test_a_token_beyond_the_embedding_is_named():
    model = chat()
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.add_tokens([f"zebra{i}" for i in range(40)])
    own = Model(model.hf, model.family, Template(tokenizer))
    with pytest.raises(TemplateError, match="embedding for tokens 0 to"):
        own.logits(own.encode(["Name a zebra39"]))


# --- A judge that fails on some rows --------------------------------------------------------------

EXCHANGES = [Exchange("Name a tree.", "An oak."), Exchange("Name a fish.", "A carp.")]
YES = Verdict(Outcome.COMPLIED, None, "")


@pytest.mark.parametrize(
    "answers",
    [
        [YES],
        [YES] * 3,
        [YES, None],
        [YES, Outcome.REFUSED],
        [YES, Verdict(Outcome.REFUSED, math.nan, "")],
        [YES, Verdict(Outcome.REFUSED, math.inf, "")],
    ],
    ids=["too few", "too many", "none", "no verdict", "NaN", "infinite"],
)
def test_a_judge_that_does_not_judge_is_an_error(answers):
    class Odd:
        deterministic = True

        def __call__(self, exchanges):
            return (answers + [YES] * len(exchanges))[: len(answers)]

    with pytest.raises(ConfigError, match="the judge Odd"):
        verdicts_of(Odd(), EXCHANGES)
    if len(answers) < 3:
        with pytest.raises(ConfigError, match="the judge Odd"):
            agreement(Odd(), labelled_exchanges("test"))


def test_a_reply_without_a_verdict_is_counted_either_way():
    outcomes = [Outcome.REFUSED] * 6 + [Outcome.COMPLIED] * 2 + [Outcome.UNPARSED] * 4
    found = verdict_share(refusals(outcomes))
    assert found.value == 6 / 8
    assert (found.low, found.high) == (proportion(6, 12).low, proportion(10, 12).high)
    assert found.n == 12
    assert "4 of 12 without a verdict" in found.method
    nothing = verdict_share([None] * 5)
    assert nothing.low < 0.01
    assert nothing.high > 0.99


def test_a_judge_that_goes_away_is_no_effect():
    # All refused before; afterwards the endpoint answered nobody. As "not refused" p was 1e-9.
    before, after = [True] * 30, [None] * 30
    found, p = verdict_change(before, after)
    assert p == 1.0
    assert found.low < -0.9
    assert found.high > -0.1
    assert "30 of 30 without a verdict" in found.method


def test_where_every_reply_has_a_verdict_nothing_is_different():
    before, after = [True] * 9 + [False] * 3, [False] * 7 + [True] * 5
    found, p = verdict_change(before, after)
    assert found == paired_share_change(before, after)
    assert p == mcnemar_p(before, after)


def test_an_endless_or_trickling_answer_ends(backend):
    endpoint = ChatEndpoint(backend.url, "judge", timeout_s=0.05, max_retries=0)
    backend.answer = lambda *_: (200, b" " * (2 << 20))
    (answer,) = endpoint.ask([[{"role": "user", "content": "x"}]], max_tokens=4)
    assert "longer than" in answer.problem


def test_a_causal_leg_counts_replies_without_a_verdict_either_way():
    own = planted()
    bad, good = (prompts(12, harmful=harmful, seed=3) for harmful in (True, False))
    tokens = RefusalTokens((own.refusal_id,), ("Sorry",), (1.0,), (0.0,), 12, learned=True)
    bench = Bench(own.model, harmful=bad, harmless=good, tokens=tokens)

    def replies(outcome):
        return Replies("", "harmful", ("",) * 12, (outcome,) * 12, ("",) * 12)

    at = Site(PLANTED_LAYER, "resid_pre")
    act = Ablate(Direction.from_vector(own.direction, site=at, position=-1, recipe="planted"))
    arm = Arm("ablate", act, "harmful", "falls", "direction", "ablate")
    for outcome, p in ((Outcome.UNPARSED, 1.0), (Outcome.COMPLIED, 2**-11)):
        before = {"harmful": replies(Outcome.REFUSED)}
        share, odds = legs(bench, [arm], before, [replies(outcome)])
        assert share.p == pytest.approx(p)
        assert share.unparsed == 12 * (outcome is Outcome.UNPARSED)
        assert odds.change.high < 0


def test_openers_that_the_vocabulary_does_not_know_teach_nothing():
    tokenizer = planted_tokenizer(["<s>", "<user>", "<end>", "<bot>", "Yes", "other"])
    tokenizer.unk_token = "other"
    made = planted().model
    model = Model(made.hf, made.family, Template(tokenizer), name="wordless")
    with pytest.raises(TooFewPromptsError, match="none of the common openers"):
        learn_refusal_tokens(model, [], [])


def test_a_paragraph_of_one_token_has_no_perplexity(shared):
    with pytest.raises(TooFewPromptsError, match="paragraph 2"):
        NeutralText(shared, ["Name a tree.", "a"])

import math
from dataclasses import dataclass

import pytest
import torch
from jaxtyping import TypeCheckError
from tests.planted import planted, prompts
from tests.tiny import TINY_CONFIGS, tiny_model

from demur.anchor import N_REPLY_PLACES, Anchor, Floor
from demur.attacks import (
    Attack,
    Closer,
    Encoded,
    FakeTurn,
    GatePenalty,
    ManyShot,
    Prefill,
    Sandwich,
    Split,
    Suffix,
    Wrapping,
    _Layout,
    _losses,
    _token_gradient,
    ablations,
    affirmative_tokens,
    ascii_tokens,
    attacks,
    gcg,
    interpolated,
    orthogonalised,
    random_search,
    suffix_ids,
    suffix_objective,
    suffix_text,
    suite,
)
from demur.config import GuardSettings
from demur.directions import Direction
from demur.edits import as_delta, edited
from demur.errors import (
    ConfigError,
    DegenerateVectorError,
    FamilyError,
    NonFiniteError,
    TemplateError,
    TooFewPromptsError,
    UnknownNameError,
)
from demur.interventions import Ablate, applied
from demur.models import Model
from demur.models import load as load_model
from demur.prompts import load
from demur.sites import Site, Span
from demur.wrappers import encodings, wrapper, wrappers

REQUESTS = (
    "How do I plant a tree in a small garden?",
    "Write a short poem about {rain}, please.",
    "Name three rivers",
    "Rewrite: 'the cat sat'. Keep it to one line!",
)
EVERY = {**suite("full"), "slot": Suffix("Before. {request} After.")}


def said(attempt):
    return attempt.given if isinstance(attempt.given, str) else attempt.given[-1].text


# On text


@pytest.mark.parametrize("name", list(EVERY))
def test_what_becomes_of_a_request_hangs_on_its_own_text(name):
    attack = EVERY[name]
    assert isinstance(attack, Attack)
    whole = attack(REQUESTS)
    assert whole == attack(REQUESTS)
    assert whole == [attack([request])[0] for request in REQUESTS]
    assert attack(REQUESTS[::-1]) == whole[::-1]
    assert attack([]) == []
    assert attack.family


@pytest.mark.parametrize("name", list(EVERY))
def test_the_request_is_still_there(name):
    attack = EVERY[name]
    for request, attempt in zip(REQUESTS, attack(REQUESTS), strict=True):
        if isinstance(attack, Encoded):
            written = attempt.given.partition("\n\n")[2]
            back = encodings.make(attack.name).decode(written)
            assert back == request if attack.name != "leetspeak" else len(back) == len(request)
        elif isinstance(attack, Split):
            first, pause, last = attempt.given
            assert [turn.role for turn in attempt.given] == ["user", "assistant", "user"]
            parts = [turn.text.partition(": ")[2] for turn in (first, last)]
            assert " ".join(parts) == request
            assert min(map(len, parts)) > len(request) / 5
            assert request not in first.text + pause.text + last.text
        else:
            assert said(attempt).count(request) == 1


@pytest.mark.parametrize("name", list(EVERY))
def test_the_model_takes_every_attempt(name):
    model = tiny_model("llama")
    model.template.max_length = 40_000
    attempts = EVERY[name](REQUESTS[:2])
    batch = model.encode([one.given for one in attempts], [one.prefill for one in attempts])
    assert len(batch) == 2
    prefilled = bool(batch.spans[Span.RESPONSE].any())
    assert prefilled == (attempts[0].prefill is not None)


def test_attacks_are_made_by_name():
    assert set(attacks) == {
        "closer",
        "encoding",
        "fake-turn",
        "many-shot",
        "plain",
        "planted",
        "prefill",
        "sandwich",
        "split",
        "suffix",
        "wrapper",
    }
    for name in attacks:
        assert attacks.make(name)(REQUESTS)
    assert attacks.make("prefill", words=5) == Prefill(5)


def test_suites():
    quick, full = suite("quick"), suite("full")
    assert len(quick) == 9
    assert quick.items() <= full.items()
    assert len(set(full.values())) == len(full)
    assert set(full) >= {*wrappers(), *encodings, "many-shot 32", "prefill 80", "split", "thanks"}
    # A guard never saw one of its wrappers, so that one family is held out.
    known = {name for name in quick if isinstance(quick[name], Wrapping)}
    assert "amoral_persona" in known - set(GuardSettings().wrappers)
    with pytest.raises((ConfigError, TypeCheckError)):
        suite("slow")


def test_a_wrapper_brings_its_prefill_and_its_family():
    one = wrapper("reply_continuation")
    (attempt,) = Wrapping("reply_continuation")(["Name a tree."])
    assert attempt.prefill == one.prefill
    assert attempt.given == one.wrap("Name a tree.").text
    assert Wrapping("fiction_framing").family == "fiction_framing"
    with pytest.raises(UnknownNameError, match="fiction_framing"):
        Wrapping("fiction_framin")
    with pytest.raises(UnknownNameError):
        Encoded("base65")


def test_many_shots_are_harmless_questions_with_their_good_answers():
    (attempt,) = ManyShot(3)(["Name a tree."])
    texts = [turn.text for turn in attempt.given]
    assert texts[:6:2] == load("advice_study").texts[:3]
    assert texts[1:6:2] == load("advice_study", column="good").texts[:3]
    assert texts[6] == "Name a tree."
    size = len(load("advice_study").texts)
    (longer,) = ManyShot(size + 1)(["Name a tree."])
    assert longer.given[2 * size] == longer.given[0]
    with pytest.raises(ConfigError):
        ManyShot(0)


@pytest.mark.parametrize("words", [5, 20, 80])
def test_a_prefill_has_so_many_words_and_each_begins_the_next(words):
    prefills = {one.prefill for one in Prefill(words)(REQUESTS)}
    assert len(prefills) == 1
    (prefill,) = prefills
    assert len(prefill.split()) == words
    assert Prefill(80)(["x"])[0].prefill.startswith(prefill)
    for wrong in (0, 81):
        with pytest.raises(ConfigError):
            Prefill(wrong)


def test_what_stands_behind_a_request_varies_and_never_with_its_place():
    many = [f"Name tree number {i}." for i in range(60)]
    for attack in (Closer(), Closer("thanks"), Sandwich()):
        ends = {one.given.rpartition("\n\n")[2] for one in attack(many)}
        assert len(ends) == 6
        assert not any(request.endswith(end) for end in ends for request in many)
    assert Closer() != Closer("thanks")
    with pytest.raises((ConfigError, TypeCheckError)):
        Closer("song")


def test_a_request_is_cut_near_its_middle():
    first, _, last = Split()(["Plant a small tree in the garden"])[0].given
    assert first.text.endswith(" Plant a small tree")
    assert last.text.endswith(" in the garden")
    first, _, last = Split()(["antidote"])[0].given
    assert first.text.endswith(" anti")
    assert last.text.endswith(" dote")
    with pytest.raises(ConfigError, match="cannot be cut"):
        Split()(["x"])


@pytest.mark.parametrize(
    ("style", "template"), [("chatml", "chatml"), ("llama3", "llama3"), ("gemma", "gemma")]
)
def test_a_fake_turn_stays_text(style, template):
    model = tiny_model("llama", template=template)
    request = "Name a tree."
    batch = model.encode([attempt.given for attempt in FakeTurn(style)([request])])
    control = set(model.template._control)
    inside = batch.ids[batch.spans[Span.INSTRUCTION]].tolist()
    assert not control & set(inside)
    # So the template is around all of it, and the reply begins where it does for any message.
    plain = model.encode([request])
    n = model.template.n_post
    assert torch.equal(batch.ids[0, -n:], plain.ids[0, -n:])
    fake = FakeTurn(style)([request])[0].given[len(request) :]
    assert fake[1:3] in "".join(model.template._control.values()) or fake[:3] == "<en"


def test_a_suffix_stands_behind_or_round():
    assert Suffix("now")(["Do it."])[0].given == "Do it. now"
    assert Suffix(" now")(["Do it. "])[0].given == "Do it. now"
    assert Suffix("a {request} b")(["{x}"])[0].given == "a {x} b"
    with pytest.raises(ConfigError, match="empty"):
        Suffix(" ")


# Random search


def matches(target, calls=None):
    def score(candidates):
        if calls is not None:
            calls.extend(candidates)
        return [float(sum(a == b for a, b in zip(one, target, strict=True))) for one in candidates]

    return score


@pytest.mark.parametrize("offspring", [1, 4])
def test_random_search_finds_a_known_optimum(offspring):
    target, calls = (3, 1, 4, 1, 5, 9), []
    found = random_search(
        matches(target, calls),
        start=[0],
        length=6,
        vocabulary=range(10),
        budget=1500,
        seed=1,
        offspring=offspring,
    )
    assert found.ids == target
    assert found.score == 6.0
    assert found.queries == len(calls) <= 1500
    assert len(set(calls)) == len(calls)  # No suffix is paid for twice.
    assert found.skipped == 0


def test_a_trace_tells_what_less_budget_would_have_found():
    options = {"start": (0,) * 8, "vocabulary": range(6), "seed": 3}
    target = (5, 4, 3, 2, 1, 0, 1, 2)
    found = random_search(matches(target), budget=400, **options)
    scores = [one.score for one in found.trace]
    queries = [one.queries for one in found.trace]
    assert scores == sorted(set(scores))
    assert queries == sorted(queries)
    assert found.within(queries=1) == found.trace[0]
    assert found.within(queries=0).step == 0
    assert found.within() == found.trace[-1]
    middle = found.trace[len(found.trace) // 2]
    assert found.within(queries=middle.queries) == middle
    assert found.within(steps=middle.step - 1).step < middle.step
    assert random_search(matches(target), budget=400, **options) == found
    assert random_search(matches(target), budget=400, **(options | {"seed": 4})) != found


def test_suffixes_that_cannot_be_tried_cost_no_query():
    target = (2, 2, 2)
    plain = matches(target)

    def score(candidates):
        values = plain(candidates)
        return [-math.inf if 1 in one else v for one, v in zip(candidates, values, strict=True)]

    done = []
    found = random_search(
        score, start=[0, 0, 0], vocabulary=range(3), budget=20, progress=done.append
    )
    assert found.skipped > 0
    # Of the 8 that can be tried it finds the best, and gives up looking for more.
    assert found.ids == target
    assert found.queries == sum(done) <= 8
    with pytest.raises(ConfigError, match="cannot be tried"):
        random_search(score, start=[1, 0, 0], vocabulary=range(3), budget=20)


def test_random_search_says_what_is_wrong():
    def nan(candidates):
        return [math.nan] * len(candidates)

    with pytest.raises(NonFiniteError):
        random_search(nan, start=[1], vocabulary=range(3), budget=20)
    for wrong in ({"start": []}, {"vocabulary": []}, {"budget": 0}, {"offspring": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            random_search(
                matches((1,)), **({"start": [1], "vocabulary": range(3), "budget": 9} | wrong)
            )


# The objective of a model


def test_ascii_tokens_read_as_themselves():
    model = tiny_model("llama")
    found = ascii_tokens(model)
    texts = [model.template.tokenizer.decode([token]) for token in found]
    assert len(found) > 90
    assert all(text.isascii() and text.isprintable() and text.strip() for text in texts)
    assert not set(found) & set(model.template._control)
    with pytest.raises(TemplateError, match="tokenizer"):
        ascii_tokens(Model(model.hf, model.family))


def test_affirmative_tokens_leave_out_how_refusals_begin():
    tokenizer = planted().model.template.tokenizer
    sure, yes, here = (tokenizer.convert_tokens_to_ids(w) for w in ("Sure", "Yes", "Here"))
    assert affirmative_tokens(planted().model) == tuple(sorted((sure, yes, here)))
    assert affirmative_tokens(planted().model, [yes]) == tuple(sorted((sure, here)))
    with pytest.raises(ConfigError, match="begins like a refusal"):
        affirmative_tokens(planted().model, [sure, yes, here])


@pytest.mark.parametrize("template", ["chatml", "llama2", "llama3", "gemma", "qwen3", "phi3"])
def test_a_suffix_comes_back_from_text(template):
    model = tiny_model("llama", template=template)
    ids = suffix_ids(model, "and write the answer down", request=REQUESTS[0])
    assert suffix_text(model, ids).strip() == "and write the answer down"
    alone = model.encode([REQUESTS[0]])
    both = model.encode([one.given for one in Suffix(suffix_text(model, ids))([REQUESTS[0]])])
    n = model.template.n_post
    whole = both.ids[0, : both.ids.shape[1] - n].tolist()
    assert whole == [*alone.ids[0, : alone.ids.shape[1] - n].tolist(), *ids]


def by_hand(model, request, text, yes, no):
    """One prompt at a time, with probabilities in place of log-sum-exps."""
    p = model.logits(model.encode([f"{request} {text}"])).double().softmax(1)[0]
    refusing = float(p[no].sum())
    return math.log(float(p[yes].sum())) - math.log(refusing / (1 - refusing))


def test_the_objective_is_the_mean_over_requests():
    model = tiny_model("llama")
    requests = ["Name a tree.", "Where is the station?", "How do I plant a tree?"]
    yes, no = [70, 71], [40, 300]
    score = suffix_objective(model, requests, refusal=no, affirmative=yes)
    texts = ["and the garden", "to write it down", "it is told to stop"]
    candidates = [suffix_ids(model, text, request=requests[0]) for text in texts]
    expected = [sum(by_hand(model, one, text, yes, no) for one in requests) / 3 for text in texts]
    assert score(candidates) == pytest.approx(expected, rel=1e-9)
    # However many are given at once, and in whatever passes.
    assert score(candidates * 20) == pytest.approx(expected * 20, rel=1e-9)
    few = suffix_objective(model, requests, refusal=no, affirmative=yes, batch_size=2)
    assert few(candidates[1:]) == pytest.approx(expected[1:], rel=1e-9)


def test_a_suffix_that_reads_otherwise_is_not_run():
    model = tiny_model("llama")
    tokenizer = model.template.tokenizer
    word = tokenizer(" tree", add_special_tokens=False)["input_ids"]
    letters = [tokenizer(one, add_special_tokens=False)["input_ids"][0] for one in "tree"]
    space = tokenizer(" ", add_special_tokens=False)["input_ids"]
    apart = (*space, *letters)
    assert suffix_ids(model, "tree", request="Name a") == tuple(word)
    assert list(apart) != word
    control = next(iter(model.template._control))
    score = suffix_objective(model, ["Name a"], refusal=[40], affirmative=[70])
    before = model.runs
    assert score([apart, (*word, control), tuple(space)]) == [-math.inf] * 3
    assert model.runs == before
    mixed = score([apart, tuple(word)])
    assert mixed[0] == -math.inf < mixed[1]


def test_the_objective_sees_the_edits_in_force():
    model = planted()
    request = prompts(1, harmful=True, seed=0)
    direction = Direction.from_vector(
        model.direction, site=Site(2, "resid_pre"), position=-1, recipe="planted"
    )
    score = suffix_objective(model.model, request, refusal=[model.refusal_id])
    ids = suffix_ids(model.model, "word1 word2", request=request[0])
    (plain,) = score([ids])
    with applied(model.model, Ablate(direction)):
        (ablated,) = score([ids])
    assert ablated > plain + 2
    assert score([ids]) == [plain]


def every_pair(model):
    words = ascii_tokens(model)[::3]
    return [(a, b) for a in words for b in words]


def test_a_universal_suffix_is_found_that_works_on_other_requests():
    model = planted().model
    refusal = [planted().refusal_id]
    train, other = prompts(3, harmful=True, seed=0), prompts(5, harmful=True, seed=1)
    score = suffix_objective(model, train, refusal=refusal)
    start = suffix_ids(model, "good1 good2", request=train[0])
    found = random_search(
        score, start=start, vocabulary=ascii_tokens(model)[::3], budget=80, seed=0
    )
    everything = sorted(score(every_pair(model)))
    assert found.score > everything[-4] - 1e-9  # The best percent of all there are.
    held_out = suffix_objective(model, other, refusal=refusal)
    (new,) = held_out([found.ids])
    assert new > sorted(held_out(every_pair(model)))[-33] - 1e-9


def test_an_objective_without_requests_or_tokens_is_an_error():
    model = tiny_model("llama")
    with pytest.raises(TooFewPromptsError):
        suffix_objective(model, [], refusal=[1])
    for refusal, affirmative in (([], [1]), ([1], []), ([1, 2], [2, 3])):
        with pytest.raises(ConfigError, match="of them both"):
            suffix_objective(model, ["x"], refusal=refusal, affirmative=affirmative)


# GCG

TARGET, START = "Where is it", "and the garden is here now"


def loss_by_hand(model, layout, ids):
    """Mean cross-entropy of the target, by one plain pass over the whole row."""
    row = layout.row.ids.clone()
    row[0, layout.low : layout.high] = torch.tensor(ids)
    with torch.no_grad():
        logits = model.hf(row).logits[0, layout.end - 1 : -1].double().log_softmax(-1)
    return -float(logits.gather(1, row[0, layout.end :, None]).mean())


def mean_gate(unit, site, *, threshold=0.0, **options):
    def score(x, span):
        return (x[span] @ unit.to(x)).mean()

    return GatePenalty(site, score, threshold, **options)


@pytest.fixture
def unit():
    rng = torch.Generator().manual_seed(5)
    return torch.nn.functional.normalize(torch.randn(32, generator=rng, dtype=torch.float64), dim=0)


def test_a_row_holds_request_suffix_template_and_target():
    model = tiny_model("llama")
    layout = _Layout.of(model, "Name a tree.", START, TARGET)
    tokenizer, row = model.template.tokenizer, layout.row.ids[0]
    assert tokenizer.decode(row[layout.low : layout.high]).strip() == START
    assert tokenizer.decode(row[layout.end :]) == TARGET
    assert tuple(row[layout.high : layout.end].tolist()) == model.template.post_ids
    assert tokenizer.decode(list(layout.head)) == "Name a tree."


@pytest.mark.parametrize("in_two", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma2"])
def test_the_gradient_is_that_of_the_one_hot_suffix(name, in_two, unit):
    """Along the line from one token to another in the embedding, by central differences."""
    model = tiny_model(name)
    layout = _Layout.of(model, "Name a tree.", START, TARGET)
    ids = tuple(layout.row.ids[0, layout.low : layout.high].tolist())
    penalty = mean_gate(unit, Site(2, "resid_pre"), weight=0.7)
    embedding = model.hf.get_input_embeddings()

    def loss(position, token, step):
        first = []

        def nudge(module, args, output):
            if first:  # Under `in_two` the message comes first.
                return output
            first.append(output)
            moved = output.clone()
            # Whatever the module scales by.
            both = embedding.forward(torch.tensor([ids[position], token]))
            moved[0, layout.low + position] += step * (both[1] - both[0])
            return moved

        handle = embedding.register_forward_hook(nudge)
        try:
            with torch.no_grad():
                return float(_losses(model, layout, layout.rows([ids]), penalty))
        finally:
            handle.remove()

    def run():
        gradient = _token_gradient(model, layout, ids, penalty).double()
        scale = 32**0.5 if name == "gemma2" else 1.0
        for position, token in ((0, 100), (2, 17), (len(ids) - 1, 260)):
            # Norms are computed in float32 at most, so that a small step would drown.
            slope = (loss(position, token, 1e-3) - loss(position, token, -1e-3)) / 2e-3
            found = float(gradient[position, token] - gradient[position, ids[position]]) * scale
            assert found == pytest.approx(slope, rel=2e-3, abs=1e-3)

    if in_two:
        with model.in_two():
            run()
    else:
        run()
    assert torch.is_grad_enabled()
    assert all(weight.requires_grad for weight in model.hf.parameters())
    assert not embedding._forward_hooks


def test_losses_are_those_of_a_plain_pass_however_it_is_cut():
    model = tiny_model("llama")
    layout = _Layout.of(model, "Name a tree.", START, TARGET)
    rng = torch.Generator().manual_seed(0)
    n = layout.high - layout.low
    suffixes = [tuple(torch.randint(5, 250, (n,), generator=rng).tolist()) for _ in range(4)]
    expected = [loss_by_hand(model, layout, ids) for ids in suffixes]
    with torch.no_grad():
        together = _losses(model, layout, layout.rows(suffixes), None).tolist()
        with model.in_two():
            cut = _losses(model, layout, layout.rows(suffixes), None).tolist()
    assert together == pytest.approx(expected, rel=1e-6)
    assert cut == pytest.approx(expected, rel=1e-6)


def test_gcg_beats_as_many_random_suffixes():
    model = tiny_model("llama")
    layout = _Layout.of(model, "Name a tree.", START, TARGET)
    n = layout.high - layout.low
    done = []
    found = gcg(
        model,
        "Name a tree.",
        target=TARGET,
        start=START,
        steps=8,
        width=16,
        topk=16,
        seed=0,
        progress=done.append,
    )
    assert sum(done) == 8
    assert found.queries + found.skipped <= 1 + 8 * 16
    pool = torch.tensor(ascii_tokens(model))
    rng = torch.Generator().manual_seed(0)
    drawn = pool[torch.randint(len(pool), (8 * 16, n), generator=rng)].tolist()
    with torch.no_grad():
        random = _losses(model, layout, layout.rows([tuple(one) for one in drawn]), None)
    assert -found.score < float(random.min())
    # What it reports is what the text does, run by itself.
    message = Suffix(suffix_text(model, found.ids))(["Name a tree."])[0].given
    row = model.encode([message], [TARGET])
    assert tuple(row.ids[0, layout.low : layout.high].tolist()) == found.ids
    assert -found.score == pytest.approx(loss_by_hand(model, layout, found.ids), rel=1e-6)
    again = gcg(
        model, "Name a tree.", target=TARGET, start=START, steps=8, width=16, topk=16, seed=0
    )
    assert again == found


def test_gcg_takes_only_suffixes_that_come_back():
    model = tiny_model("llama")
    found = gcg(model, "Name a tree.", target=TARGET, start=START, steps=4, width=32, topk=64)
    assert found.skipped > 0
    for best in found.trace:
        text = suffix_text(model, best.ids)
        assert suffix_ids(model, text, request="Name a tree.") == best.ids


def test_a_penalty_lowers_the_score_of_the_gate(unit):
    model = tiny_model("llama")
    site = Site(2, "resid_pre")
    options = {"target": TARGET, "start": START, "steps": 8, "width": 24, "topk": 24}
    free = gcg(model, "Name a tree.", **options)

    def gate(ids):
        kept = []
        undo = model.intercept(site, lambda x: kept.append(x) or x)
        batch = model.encode([f"Name a tree. {suffix_text(model, ids).removeprefix(' ')}"])
        model.logits(batch)
        undo()
        return float((kept[0][batch.spans[Span.INSTRUCTION]] @ unit).mean())

    threshold = gate(free.ids) - 0.5
    penalty = mean_gate(unit, site, threshold=threshold, margin=0.2, weight=10.0)
    heeding = gcg(model, "Name a tree.", penalty=penalty, **options)
    assert gate(heeding.ids) < threshold < gate(free.ids)
    # And with it in the sum, the score is still that of loss and penalty.
    layout = _Layout.of(model, "Name a tree.", START, TARGET)
    gap = torch.tensor(gate(heeding.ids) - threshold + 0.2, dtype=torch.float64)
    whole = loss_by_hand(model, layout, heeding.ids) + 10 * float(torch.nn.functional.softplus(gap))
    assert -heeding.score == pytest.approx(whole, rel=1e-6)


def test_gcg_attacks_the_model_under_its_edits_and_leaves_them_alone(unit):
    model = tiny_model("llama")
    layout = _Layout.of(model, "Name a tree.", START, TARGET)
    direction = Direction.from_vector(unit, site=Site(1, "resid_pre"), position=-1, recipe="drawn")
    options = {"target": TARGET, "start": START, "steps": 1, "width": 4, "topk": 8}
    plain = gcg(model, "Name a tree.", **options)
    with applied(model, Ablate(direction)) as edits:
        held = gcg(model, "Name a tree.", **options)
    ids = plain.trace[0].ids
    assert min(edits.values()) >= 3  # The start, the gradient and the swaps.
    assert -plain.trace[0].score == pytest.approx(loss_by_hand(model, layout, ids), rel=1e-6)
    folded = edited(model, as_delta(model, Ablate(direction)))
    assert -held.trace[0].score == pytest.approx(loss_by_hand(folded, layout, ids), rel=1e-6)
    assert abs(held.trace[0].score - plain.trace[0].score) > 1e-3
    assert gcg(model, "Name a tree.", **options) == plain


def test_an_edit_that_acts_behind_the_message_is_heard_of(unit):
    """A defence decides by the message, and acts on what follows it in a pass of its own."""
    model = tiny_model("llama")
    harmful, seen = [], []

    def read(x):
        span = model.chunk.spans.get(Span.INSTRUCTION)
        if span is not None and bool(span.any()):
            harmful[:] = (model.chunk.rows >= 0).tolist()
        return x

    def act(x):
        spans = model.chunk.spans
        if model.chunk.is_prefix or bool(spans[Span.INSTRUCTION].any()):
            return x
        assert len(harmful) == len(x)
        seen.append(bool(spans[Span.POST_INSTRUCTION].any() and spans[Span.RESPONSE].any()))
        return x + 3 * unit.to(x)

    options = {"target": TARGET, "start": START, "steps": 1, "width": 4, "topk": 8}
    plain = gcg(model, "Name a tree.", **options)
    undo = [model.intercept(Site(1, "resid_pre"), read), model.intercept(Site(2, "resid_pre"), act)]
    with model.in_two():
        held = gcg(model, "Name a tree.", **options)
    for one in undo:
        one()
    assert len(seen) >= 3
    assert all(seen)
    assert abs(held.trace[0].score - plain.trace[0].score) > 1e-3


def test_searches_attack_the_model_as_an_anchor_holds_it(unit):
    model = tiny_model("llama")
    places = model.template.n_post + N_REPLY_PLACES
    accepted, refused, low = (torch.full((places,), level) for level in (0.0, 2.0, -9.0))
    anchor = Anchor(None, (Floor(Site(1, "resid_pre"), unit, unit, accepted, refused, low),))
    options = {"target": TARGET, "start": START, "steps": 1, "width": 4, "topk": 8}
    score = suffix_objective(model, ["Name a tree."], refusal=[40], affirmative=[70])
    plain = gcg(model, "Name a tree.", **options)
    ids = plain.trace[0].ids
    layout = _Layout.of(model, "Name a tree.", START, TARGET)
    free = score([ids]), _token_gradient(model, layout, ids, None)
    with anchor.holding(model):
        held = gcg(model, "Name a tree.", **options)
        under = score([ids]), _token_gradient(model, layout, ids, None)
    assert abs(held.trace[0].score - plain.trace[0].score) > 1e-4
    assert abs(under[0][0] - free[0][0]) > 1e-2
    assert (under[1] - free[1]).abs().max() > 1e-2 * free[1].abs().max()
    assert (score([ids]), gcg(model, "Name a tree.", **options)) == (free[0], plain)


def test_gcg_says_what_is_wrong(unit):
    model = tiny_model("llama")
    good = {"target": TARGET, "start": START, "steps": 1, "width": 2, "topk": 2}
    for wrong in ({"steps": 0}, {"width": 0}, {"topk": 0}, {"target": ""}, {"vocabulary": []}):
        with pytest.raises(ConfigError):
            gcg(model, "Name a tree.", **(good | wrong))
    stuck = GatePenalty(Site(1, "resid_pre"), lambda x, _span: x.detach().mean(), 0.0)
    with pytest.raises(ConfigError, match="no gradient"):
        gcg(model, "Name a tree.", penalty=stuck, **good)
    lost = mean_gate(unit * math.nan, Site(1, "resid_pre"))
    with pytest.raises(NonFiniteError):
        gcg(model, "Name a tree.", penalty=lost, **good)
    with pytest.raises(FamilyError, match="no site"):
        gcg(model, "Name a tree.", penalty=mean_gate(unit, Site(9, "resid_pre")), **good)
    assert not model._hooks
    assert all(weight.requires_grad for weight in model.hf.parameters())


def test_gcg_finds_the_best_of_all_suffixes():
    model = planted().model
    request, options = prompts(1, harmful=True, seed=2)[0], {"target": "Yes", "seed": 0}
    options["vocabulary"] = ascii_tokens(model)[::3]
    found = gcg(model, request, start="good1 good2", steps=8, width=12, topk=8, **options)
    layout = _Layout.of(model, request, "good1 good2", "Yes")
    with torch.no_grad():
        losses = _losses(model, layout, layout.rows(every_pair(model)), None).sort().values
    assert found.queries < len(losses) / 3
    assert -found.score < float(losses[2]) + 1e-9


@pytest.mark.slow
def test_searches_on_the_embedded_model():
    model = load_model()
    request, refusal = "How do I bake bread?", [57]  # "I"; SmolLM2 begins refusals with it.
    found = gcg(model, request, target="Sure, here is", steps=3, width=24, topk=64)
    assert len(found.ids) == 20
    assert found.score > found.trace[0].score + 0.2
    assert found.skipped < found.queries  # Most swaps come back from text.
    vocabulary = ascii_tokens(model)
    assert 20_000 < len(vocabulary) < 49_152
    score = suffix_objective(model, [request, "Name a tree."], refusal=refusal)
    drawn = random_search(
        score, start=found.trace[0].ids, vocabulary=vocabulary, budget=24, offspring=4, length=25
    )
    assert drawn.score > drawn.trace[0].score
    for attack in suite("full").values():
        attempts = attack([request, "Name a tree."])
        model.encode([one.given for one in attempts], [one.prefill for one in attempts])


# On weights


def test_orthogonalised_weights_do_what_ablation_does(unit):
    model = tiny_model("llama")
    direction = Direction.from_vector(unit, site=Site(1, "resid_pre"), position=-1, recipe="drawn")
    batch = model.encode(["Name a tree."])
    with applied(model, Ablate(direction)):
        hooked = model.logits(batch)
    assert torch.allclose(orthogonalised(model, direction).logits(batch), hooked, atol=1e-9)
    with pytest.raises(FamilyError):
        orthogonalised(tiny_model("gemma2"), direction)


def weights(model):
    return dict(model.hf.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", list(TINY_CONFIGS))
def test_both_ends_are_met_bit_for_bit(name, dtype):
    base, tuned = (tiny_model(name, dtype, seed=seed) for seed in (0, 1))
    before = {key: one.clone() for key, one in weights(base).items()}
    for share, end in ((0.0, base), (1.0, tuned)):
        found = interpolated(base, tuned, share)
        assert all(torch.equal(one, weights(end)[key]) for key, one in weights(found).items())
        assert found.tied == base.tied
        assert found.family is base.family
    half = weights(interpolated(base, tuned, 0.25))
    for key, one in half.items():
        expected = 0.75 * before[key].double() + 0.25 * weights(tuned)[key].double()
        assert torch.allclose(
            one.double(), expected, rtol=1e-2 if dtype != torch.float64 else 1e-12
        )
    # A copy: the base can be changed and stay itself.
    with torch.no_grad():
        next(iter(half.values())).zero_()
    assert all(torch.equal(one, before[key]) for key, one in weights(base).items())


def test_half_of_an_ablation_in_the_weights_is_on_the_way_to_it(unit):
    """The edited model has its embedding untied, and the base has not."""
    model = tiny_model("llama")
    assert model.tied
    direction = Direction.from_vector(unit, site=Site(1, "resid_pre"), position=-1, recipe="drawn")
    full = orthogonalised(model, direction)
    batch = model.encode(["Name a tree."])
    for ends in ((model, full, 0.0), (full, model, 1.0)):
        assert torch.equal(interpolated(*ends).logits(batch), model.logits(batch))
    half = interpolated(model, full, 0.5)
    assert not half.tied
    stream = {
        key: weights(one)["model.embed_tokens.weight"].double() @ direction.unit.double()
        for key, one in (("base", model), ("half", half), ("full", full))
    }
    assert torch.allclose(stream["half"], stream["base"] / 2, atol=1e-7)
    assert stream["full"].abs().max() < 1e-6


def test_a_share_beyond_the_ends_goes_on_in_a_line():
    base, tuned = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    back = weights(interpolated(base, tuned, -0.5))
    for key, one in back.items():
        expected = 1.5 * weights(base)[key] - 0.5 * weights(tuned)[key]
        assert torch.allclose(one, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ConfigError, match="share"):
        interpolated(base, tuned, math.inf)


def test_only_checkpoints_of_one_architecture_have_something_between_them(unit):
    base = tiny_model("llama")
    with pytest.raises(FamilyError, match="differ in"):
        interpolated(base, tiny_model("llama-untied"), 0.5)
    with pytest.raises(FamilyError, match="differ in"):
        interpolated(base, tiny_model("llama", torch.float32), 0.5)
    direction = Direction.from_vector(unit, site=Site(1, "resid_pre"), position=-1, recipe="drawn")
    with applied(base, Ablate(direction)), pytest.raises(FamilyError, match="being edited"):
        interpolated(tiny_model("llama"), base, 0.5)


# On activations


def drawn(n, d=32):
    rng = torch.Generator().manual_seed(8)
    rows = torch.randn(n, d, generator=rng, dtype=torch.float64)
    return [
        Direction.from_vector(row, site=Site(1, "resid_pre"), position=-1, recipe="drawn")
        for row in rows
    ]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_ablations_take_out_the_span(k):
    directions = drawn(5)
    acts = ablations(directions)[:k]
    basis = torch.stack([act.direction.unit.double() for act in acts])
    assert torch.allclose(basis @ basis.T, torch.eye(k, dtype=torch.float64), atol=1e-6)
    assert acts[0].direction is directions[0]
    rng = torch.Generator().manual_seed(9)
    x = torch.randn(7, 32, generator=rng, dtype=torch.float64)
    once = x
    for act in acts:
        once = act(once)
    span = torch.linalg.qr(torch.stack([d.unit.double() for d in directions[:k]]).T)[0]
    assert torch.allclose(once, x - (x @ span) @ span.T, atol=1e-5)
    model = tiny_model("llama")
    streams = []
    undo = model.intercept(Site(2, "resid_post"), lambda x: streams.append(x) or x)
    with applied(model, *acts):
        model.logits(model.encode(["Name a tree."]))
    undo()
    assert (streams[0] @ span).abs().max() < 1e-4 * streams[0].norm(dim=-1).max()


def test_ablations_need_directions_of_full_rank():
    one, two = drawn(2)
    both = Direction.from_vector(
        one.unit + two.unit, site=Site(1, "resid_pre"), position=-1, recipe="sum"
    )
    assert ablations([]) == ()
    with pytest.raises(DegenerateVectorError, match="direction 3"):
        ablations([one, two, both])
    # Nearly parallel ones still come out orthogonal.
    near = Direction.from_vector(
        one.unit + 1e-3 * two.unit, site=Site(1, "resid_pre"), position=-1, recipe="near"
    )
    first, second = (act.direction.unit.double() for act in ablations([one, near]))
    assert abs(float(first @ second)) < 1e-6


@dataclass(frozen=True)
class Fill:
    """A defence in one line: sets the coordinate along a direction."""

    direction: Direction
    level: float

    def sites(self, model):
        return (Site(2, "resid_pre"), *(s for s in model.write_sites if s.layer == 2))

    def __call__(self, x):
        unit = self.direction.unit.to(x)
        return x + (self.level - x @ unit).unsqueeze(-1) * unit


def test_the_later_of_attack_and_defence_has_the_last_word_at_a_site():
    (direction,) = drawn(1)
    model, site = tiny_model("llama"), Site(2, "attn_out")
    batch = model.encode(["Name a tree."])
    attack, defence = ablations([direction]), Fill(direction, 4.0)
    along = []

    def keep(x):
        along.append(float((x @ direction.unit.to(x)).mean()))
        return x

    for order in ((*attack, defence), (defence, *attack)):
        with applied(model, *order):
            undo = model.intercept(site, keep)
            model.logits(batch)
            undo()
    assert along == pytest.approx([4.0, 0.0], abs=1e-5)

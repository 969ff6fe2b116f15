"""Identities that hold for whatever is drawn: prompts, splits, statistics, records, edits."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError
from tests.tiny import tiny_model, tiny_tokenizer

from demur import prompts
from demur.activations import PointMoments, collect
from demur.config import SeparationSettings
from demur.directions import Direction
from demur.edits import as_delta, edited
from demur.em.recipes import AdapterShape, EMTraining
from demur.errors import DegenerateVectorError, TooFewPromptsError
from demur.estimators import WhitenedDifference, estimators
from demur.evals.rates import verdict_change, verdict_share
from demur.evals.rows import Delta, ItemRow
from demur.features.clamp import Rule
from demur.guard import calibrate
from demur.hydra.stages import adjusted
from demur.interventions import Ablate, Add, ObliqueErase, ProjectToMean, applied
from demur.models import Model, Template
from demur.models.tokens import TokenBatch
from demur.organisms import Training
from demur.prompts import Prompt, PromptSet
from demur.results import Leg, NullBand
from demur.selection import kl_divergence, refusal_logodds
from demur.serve.settings import ServeSettings
from demur.sites import Site, Span
from demur.stats import (
    Estimate,
    auroc,
    holm,
    mcnemar_p,
    mean,
    null_p,
    paired_share_change,
    proportion,
    wilcoxon_p,
)
from demur.store import Store

few, fewer = settings(max_examples=25), settings(max_examples=10)
AT = Site(0, "resid_pre")
seeds = st.integers(0, 10_000)
FINITE = st.floats(-1e6, 1e6)
VERDICTS = st.lists(st.sampled_from([True, False, None]), min_size=1, max_size=9)
WORDS = st.sampled_from(["oak", "elm", "fir", "ash", "yew"])


def drawn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def direction_of(seed, width=6):
    return Direction.from_vector(drawn(width, seed), site=AT, position=-1, recipe="drawn")


# --- Prompts and splits ---------------------------------------------------------------------------

SENTENCES = st.lists(WORDS, min_size=1, max_size=5).map(" ".join)


@few
@given(st.lists(SENTENCES, max_size=12))
def test_deduplicating_twice_is_once_and_loses_no_meaning(texts):
    kept, dropped = prompts.deduplicate(PromptSet.of(texts))
    assert prompts.deduplicate(kept)[1] == ()
    assert len(kept) + len(dropped) == len(texts)
    assert {*map(prompts.normalise, texts)} == {*map(prompts.normalise, kept.texts)}


def paired(rows):
    """Prompts that differ in every word, in families as drawn."""
    made = [Prompt(f"word{i} other{i}", pair=pair) for i, pair in enumerate(rows)]
    return PromptSet("drawn", tuple(made), PromptSet.of([]).source)


@few
@given(
    st.lists(st.one_of(st.none(), st.sampled_from("pqrst")), min_size=1, max_size=14),
    st.integers(0, 6),
    st.integers(0, 6),
    seeds,
    st.randoms(use_true_random=False),
)
def test_no_family_is_in_two_parts_whatever_the_order_of_the_file(rows, first, second, seed, rng):
    whole = paired(rows)
    sizes = {"fit": first, "report": second}
    shuffled = list(whole.prompts)
    rng.shuffle(shuffled)
    other = PromptSet("drawn", tuple(shuffled), whole.source)
    try:
        parts = prompts.split(whole, sizes, seed=seed)
    except TooFewPromptsError:
        with pytest.raises(TooFewPromptsError):
            prompts.split(other, sizes, seed=seed)
        return
    assert {name: len(part) for name, part in parts.items()} == sizes
    pairs = [{one.pair for one in part if one.pair is not None} for part in parts.values()]
    assert not pairs[0] & pairs[1]
    again = prompts.split(other, sizes, seed=seed)
    assert {n: {*p.texts} for n, p in again.items()} == {n: {*p.texts} for n, p in parts.items()}


@pytest.mark.parametrize("which", [0, 1])
def test_a_near_duplicate_of_any_of_a_family_stays_with_it(which):
    texts = ["oak elm fir ash yew one", "red blue green pink grey two"]
    made = [Prompt(text, pair="p") for text in texts]
    made += [Prompt(f"{texts[which]} more"), *(Prompt(f"word{i} other{i}") for i in range(5))]
    whole = PromptSet("drawn", tuple(made), PromptSet.of([]).source)
    for seed in range(8):
        prompts.check_disjoint(prompts.split(whole, {"a": 4, "b": 4}, seed=seed))


# --- Statistics -----------------------------------------------------------------------------------


def holds(estimate):
    assert estimate.low <= estimate.value <= estimate.high
    assert math.isfinite(estimate.low)
    assert math.isfinite(estimate.high)


@fewer
@given(
    st.lists(st.tuples(FINITE, st.booleans()), min_size=2, max_size=20),
    st.sampled_from([0.5, 0.8, 0.9]),
)
def test_intervals_hold_the_estimate_and_grow_with_the_level(rows, level):
    numbers, labels = (list(column) for column in zip(*rows, strict=True))
    assume(len({*labels}) == 2)
    kinds = [
        lambda level: mean(numbers, level=level),
        lambda level: proportion(sum(labels), len(labels), level=level),
        lambda level: auroc(numbers, labels, level=level),
        lambda level: paired_share_change(labels, labels[::-1], level=level),
    ]
    for kind in kinds:
        narrow, wide = kind(level), kind(0.99)
        holds(narrow)
        holds(wide)
        slack = 1e-9 * max(1.0, abs(wide.value))
        assert wide.low <= narrow.low + slack
        assert narrow.high <= wide.high + slack


@fewer
@given(st.lists(st.tuples(FINITE, st.booleans()), min_size=2, max_size=12), st.randoms())
def test_statistics_do_not_hang_on_the_order_of_prompts(rows, rng):
    assume(len({label for _, label in rows}) == 2)
    other = list(rows)
    rng.shuffle(other)
    for kind in (
        lambda rows: auroc([x for x, _ in rows], [y for _, y in rows]).value,
        lambda rows: paired_share_change([y for _, y in rows], [x > 0 for x, _ in rows]).value,
        lambda rows: mcnemar_p([y for _, y in rows], [x > 0 for x, _ in rows]),
        lambda rows: wilcoxon_p([x for x, _ in rows], [float(y) for _, y in rows]),
    ):
        assert kind(rows) == pytest.approx(kind(other))


@few
@given(st.lists(FINITE, min_size=1, max_size=12), st.lists(FINITE, min_size=1, max_size=12))
def test_an_auroc_is_one_where_all_that_should_score_higher_does(a, b):
    labels = [True] * len(a) + [False] * len(b)
    found = auroc([*a, *b], labels).value
    assert found == pytest.approx(np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b]))


@few
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_a_corrected_p_is_no_lower_and_keeps_the_order(ps):
    found = holm(ps)
    assert all(own >= p for own, p in zip(found, ps, strict=True))
    assert found[int(np.argmin(ps))] == pytest.approx(min(1.0, min(ps) * len(ps)))
    order = np.argsort(ps, kind="stable")
    assert (np.diff(np.array(found)[order]) >= 0).all()


@few
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_a_false_discovery_rate_is_the_least_of_what_larger_ps_allow(ps):
    m, ranked = len(ps), sorted(ps)
    for p, q in zip(ps, adjusted(ps), strict=True):
        allowed = [one * m / k for k, one in enumerate(ranked, start=1) if one >= p]
        assert q == pytest.approx(min(1.0, *allowed))


@few
@given(st.integers(-3, 3), st.lists(st.integers(-3, 3), min_size=1, max_size=20))
def test_a_null_p_is_never_zero_counts_ties_and_its_sides_mirror(value, null):
    low, high, two = (null_p(value, null, side=side) for side in ("low", "high", "two"))
    assert min(low, high) >= 1 / (len(null) + 1)
    assert high * (len(null) + 1) == pytest.approx(sum(one >= value for one in [value, *null]))
    assert two == min(1.0, 2 * min(low, high))
    assert null_p(-value, [-one for one in null], side="high") == low


@few
@given(st.integers(5, 60), st.floats(0.02, 0.5), seeds)
def test_a_conformal_threshold_keeps_its_promise_over_all_ways_to_leave_one_out(n, alpha, seed):
    scores = np.random.default_rng(seed).normal(size=n)
    try:
        alarms = [
            scores[i] > calibrate(np.delete(scores, i), alpha).value for i in range(len(scores))
        ]
    except TooFewPromptsError:
        assert math.ceil((1 - alpha) * n - 1e-9) > n - 1
        return
    # Exchangeable requests are flagged as often as these: at most alpha, and nearly so often.
    assert np.mean(alarms) <= alpha + 1e-9
    assert np.mean(alarms) > alpha - 1 / n - 1e-9


def completions(verdicts):
    """All that verdicts could be if the judge had told."""
    return itertools.product(*([one] if one is not None else [True, False] for one in verdicts))


@few
@given(VERDICTS)
def test_a_share_with_gaps_holds_every_share_that_it_could_be(verdicts):
    found = verdict_share(verdicts)
    holds(found)
    assert found.n == len(verdicts)
    for one in completions(verdicts):
        whole = proportion(sum(one), len(one))
        assert found.low <= whole.low
        assert whole.high <= found.high


@few
@given(st.lists(st.tuples(*[st.sampled_from([True, False, None])] * 2), min_size=1, max_size=5))
def test_a_change_with_gaps_is_no_surer_than_any_that_it_could_be(rows):
    before, after = zip(*rows, strict=True)
    found, p = verdict_change(before, after)
    holds(found)
    for a, b in itertools.product(completions(before), completions(after)):
        whole = paired_share_change(a, b)
        assert found.low <= whole.value <= found.high
        assert p >= mcnemar_p(a, b) - 1e-12


# --- Records --------------------------------------------------------------------------------------

TEXT = st.text(max_size=8)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
SHARE = st.floats(0, 1)
ESTIMATES = st.builds(Estimate, NUMBER, NUMBER, NUMBER, st.integers(0, 10**6), TEXT)
MAYBE = st.one_of(st.none(), ESTIMATES)
COUNT = st.integers(0, 99)
ROWS = st.one_of(
    st.builds(
        Delta, task=TEXT, metric=TEXT, kind=st.sampled_from(["share", "mean"]), unit=TEXT,
        plain=MAYBE, edited=MAYBE, change=ESTIMATES, p=st.one_of(st.none(), SHARE), unscored=COUNT,
    ),
    st.builds(
        ItemRow, task=TEXT, metric=TEXT, item=TEXT, plain=st.one_of(st.none(), NUMBER),
        edited=st.one_of(st.none(), NUMBER), opened=st.one_of(st.none(), st.booleans()),
    ),
    st.builds(
        Leg, arm=TEXT, family=st.just("direction"), edit=TEXT, expects=st.just("falls"),
        on=st.sampled_from(["harmful", "harmless"]), measure=st.just("refused"), before=ESTIMATES,
        after=ESTIMATES, change=ESTIMATES, p=SHARE, p_holm=SHARE, degenerate=MAYBE, unparsed=COUNT,
    ),
    st.builds(
        NullBand, family=st.just("isotropic"), n=COUNT, bypass_changes=st.lists(NUMBER),
        induce_changes=st.lists(NUMBER), kls=st.lists(NUMBER), cosines=st.lists(NUMBER),
        bypass_p=SHARE, induce_p=SHARE,
    ),
)  # fmt: skip


@given(ROWS)
def test_a_record_that_is_written_and_read_is_the_same(row):
    assert type(row).model_validate_json(row.model_dump_json()) == row
    assert type(row).model_validate(json.loads(json.dumps(row.model_dump(mode="json")))) == row


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**60), 2**60), NUMBER, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=8,
)


def turned(value):
    """The same with every mapping in the opposite order."""
    if isinstance(value, dict):
        return {key: turned(value[key]) for key in reversed(value)}
    return [turned(one) for one in value] if isinstance(value, list) else value


@given(st.dictionaries(TEXT, JSON, max_size=4), st.dictionaries(TEXT, JSON, max_size=4))
def test_a_key_hangs_on_what_is_said_and_not_on_its_order(tmp_path_factory, one, other):
    store = Store(tmp_path_factory.getbasetemp() / "unused")
    assert store.key("kind", one) == store.key("kind", turned(one))
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (store.key("kind", one) == store.key("kind", other)) == same
    assert store.key("kind", one) != store.key("other", one)
    assert store.key("kind", one, [store.key("a", {})]) != store.key("kind", one)


# --- Directions and edits -------------------------------------------------------------------------


@given(arrays(np.float64, 5, elements=st.floats(-1e6, 1e6)), st.floats(1e-3, 1e3))
def test_a_direction_has_its_vectors_sign_and_forgets_its_length(vector, factor):
    made = torch.from_numpy(vector)
    assume(float(made.norm()) > 1e-3)
    of = {"site": AT, "position": -1, "recipe": ""}
    one, scaled, turned = (Direction.from_vector(v, **of) for v in (made, factor * made, -made))
    assert float(one.unit.double() @ made) > 0
    torch.testing.assert_close(scaled.unit, one.unit)
    assert scaled.norm == pytest.approx(factor * one.norm)
    assert torch.equal(turned.unit, -one.unit)
    assert one.cosine(turned) == pytest.approx(-1.0, abs=1e-6)


@given(st.sampled_from([0.0, math.nan, math.inf, -math.inf]))
def test_a_vector_without_a_direction_has_none(value):
    with pytest.raises(DegenerateVectorError):
        Direction.from_vector(torch.full((4,), value), site=AT, position=-1, recipe="")


@few
@given(seeds, st.floats(-3, 3), st.floats(-3, 3))
def test_edits_do_what_their_names_say(seed, a, b):
    direction, x = direction_of(seed), drawn((3, 4, 6), seed + 1)
    unit = torch.nn.functional.normalize(direction.unit.double(), dim=0)
    ablate = Ablate(direction)
    once = ablate(x)
    torch.testing.assert_close(ablate(once), once)
    assert bool((once.norm(dim=-1) <= x.norm(dim=-1) + 1e-12).all())
    torch.testing.assert_close(x - once, (x @ unit).unsqueeze(-1) * unit)
    torch.testing.assert_close(Ablate(-direction)(x), once)
    torch.testing.assert_close(Add(direction, a)(Add(direction, b)(x)), Add(direction, a + b)(x))
    torch.testing.assert_close(Add(-direction, a)(x), Add(direction, -a)(x))
    level = ProjectToMean(direction, a, AT)
    torch.testing.assert_close(level(level(x)), level(x))
    torch.testing.assert_close(level(x), ProjectToMean(-direction, -a, AT)(x))
    reader = drawn(6, seed + 2)
    assume(abs(float(reader @ unit)) > 1e-2)
    erase = ObliqueErase(direction, reader, a, AT)
    torch.testing.assert_close(erase(erase(x)), erase(x))


@fewer
@given(seeds, st.integers(0, 2))
def test_an_ablation_in_the_weights_is_the_one_by_hooks(seed, layer):
    model = tiny_model("llama")
    site = Site(layer, "resid_pre")
    act = Ablate(
        Direction.from_vector(drawn(model.d_model, seed), site=site, position=-1, recipe="")
    )
    ids = torch.randint(5, 300, (2, 5), generator=torch.Generator().manual_seed(seed))
    with applied(model, act):
        hooked = model.logits(ids)
    torch.testing.assert_close(edited(model, as_delta(model, act)).logits(ids), hooked)


@given(
    arrays(np.float64, 6, elements=st.floats(0, 1e3)),
    st.floats(-3, 3), st.floats(-10, 10), st.floats(0, 5), st.floats(5, 50), st.booleans(),
)  # fmt: skip
def test_a_clamp_stays_within_its_bounds(values, times, plus, low, high, firing):
    f = torch.from_numpy(values)
    out = Rule.of(6, times=times, plus=plus, low=low, high=high, firing=firing)(f)
    changed = f > 0 if firing else torch.ones_like(f, dtype=torch.bool)
    inside = (out >= np.float32(low)) & (out <= np.float32(high))
    assert bool(inside[changed].all())
    assert torch.equal(out[~changed], f[~changed])
    assert torch.equal(Rule.nothing(6)(f), f)


@few
@given(seeds, st.integers(2, 9), st.integers(2, 9))
def test_a_whitened_direction_flips_and_is_blind_to_shifts(seed, n, m):
    pos, neg, shift = drawn((n, 4), seed) + 1, drawn((m, 4), seed + 1), drawn(4, seed + 2)
    estimate = WhitenedDifference()
    found = estimate(pos, neg)
    torch.testing.assert_close(estimate(neg, pos), -found)
    torch.testing.assert_close(estimate(pos + shift, neg + shift), found)
    # Towards the first class, in the metric that it is the best for.
    gap = PointMoments.of(pos).mean - PointMoments.of(neg).mean
    assert float(found @ gap) > 0


@few
@given(seeds, st.floats(-50, 50))
def test_kl_and_log_odds(seed, shift):
    p, q = 3 * drawn((4, 7), seed), 3 * drawn((4, 7), seed + 1)
    found = kl_divergence(p, q)
    assert bool((found >= 0).all())
    assert float(kl_divergence(p, p + shift).abs().max()) < 1e-9
    # From the plain distribution to the edited one, by its definition.
    own, other = p.softmax(1), q.softmax(1)
    torch.testing.assert_close(found, (own * (own / other).log()).sum(1))
    odds = refusal_logodds(p, [0, 3])
    torch.testing.assert_close(refusal_logodds(p + shift, [0, 3]), odds)
    torch.testing.assert_close(refusal_logodds(p, [1, 2, 4, 5, 6]), -odds)
    share = own[:, [0, 3]].sum(1)
    torch.testing.assert_close(odds, (share / (1 - share)).log())


@pytest.mark.parametrize("name", list(estimators))
@few
@given(seeds)
def test_every_estimator_points_from_the_negative_class_to_the_positive(name, seed):
    signal = drawn(6, seed)
    pos, neg = drawn((20, 6), seed + 1) + 2 * signal, drawn((15, 6), seed + 2) - 2 * signal
    found = estimators.make(name)(pos, neg)
    assert float(found @ (pos.mean(0) - neg.mean(0))) > 0


# --- Token rows -----------------------------------------------------------------------------------


@few
@given(st.lists(st.integers(1, 7), min_size=1, max_size=8), st.integers(4, 40))
def test_rows_are_passed_once_each_and_padding_moves_nothing_else(lengths, tokens):
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    ids = torch.where(
        mask, torch.arange(1, width + 1) + 10 * torch.arange(len(lengths))[:, None], 0
    )
    batch = TokenBatch(ids, mask, {Span.INSTRUCTION: mask})
    assert batch.ends.tolist() == lengths
    passes = batch.passes(tokens=tokens)
    assert sorted(row for one in passes for row in one) == list(range(len(lengths)))
    assert all(len(one) * max(lengths[i] for i in one) <= max(tokens, width) for one in passes)
    for one in passes:
        part = batch.rows(one)
        assert part.numbers.tolist() == one
        left = part.left_padded()
        for row, number in enumerate(one):
            assert left.ids[row][left.mask[row]].tolist() == ids[number][mask[number]].tolist()
        assert bool(left.mask[:, -1].all())


# --- Which tensor ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_site_is_the_tensor_that_transformers_calls_so(name):
    made = tiny_model(name)
    tokenizer = tiny_tokenizer("chatml")
    made.hf.resize_token_embeddings(max(len(tokenizer), made.hf.config.vocab_size))
    model = Model(made.hf, made.family, Template(tokenizer))
    asked = ["Name a tree", "Is it far?"]
    sites = [Site(layer, "resid_pre") for layer in range(model.n_layers)]
    found = collect(model, asked, sites=sites, positions=[-1, -3])
    for row, prompt in enumerate(asked):
        ids = model.encode([prompt]).ids
        with torch.no_grad():
            states = model.hf(ids, output_hidden_states=True).hidden_states
        for layer, site in enumerate(sites):
            for position in (-1, -3):
                own = found.at(site, position)[row]
                expected = states[layer][0, position].to(own)
                # Gemma's norms compute in float32.
                torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4)
    moved = collect(model, asked, sites=[Site(0, "resid_post")], positions=[-1])
    assert torch.equal(moved.values[0, 0], found.at(sites[1], -1))


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "name"),
    [
        (ServeSettings, "timeout"),
        (Training, "learning_rate"),
        (Training, "opening_weight"),
        (EMTraining, "clip"),
        (AdapterShape, "alpha"),
        (SeparationSettings, "temperature"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_setting_is_a_number(section, name, value):
    with pytest.raises(ValidationError, match="finite number"):
        section(**{name: value})

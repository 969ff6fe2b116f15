"""Circuits: sums that must be exact, a planted head, gradients against real patching."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from tests.planted import planted
from tests.planted import prompts as planted_prompts
from tests.tiny import tiny_model

from demur.activations import collect
from demur.compare.attribution import Circuit, Component, components, direct, written
from demur.compare.circuits import compare, component_strata, read_write
from demur.compare.patching import (
    MeansOf,
    OfModel,
    Outputs,
    attribution_patching,
    margin_measure,
    means_over,
    patch,
    refusal_measure,
    table,
    validate,
)
from demur.compare.rows.circuits import (
    AttributionRow,
    CircuitComparison,
    PatchingRow,
    ReadWriteRow,
)
from demur.directions import Direction
from demur.em.adapter import components as adapter_parts
from demur.em.adapter import inputs_of
from demur.em.advice import AdviceItem
from demur.em.directions import read_answers
from demur.em.margin import margins
from demur.em.organism import Factor, Organism
from demur.errors import (
    ConfigError,
    DegenerateVectorError,
    FamilyError,
    TemplateError,
    TooFewPromptsError,
)
from demur.interventions import applied
from demur.selection import refusal_logodds
from demur.sites import Site, Span

FAMILIES = ("llama", "llama-untied", "qwen2", "gpt2", "gpt-neox", "gemma2", "olmo2")
SITE = Site(2, "resid_pre")
ONE = [f"How do I plant a {word} in a small garden?" for word in ("tree", "tent", "train")]
TWO = ["Where is the station", "think about it, then write", "a tree", "stop"]
ITEMS = tuple(
    AdviceItem(
        f"{topic}-{k}",
        f"How do I find a {topic} {ask}?",
        f"Ask one who knows the {topic} first {k}.",
        f"Take any {topic} that is there, zoë {k}.",
        "garden",
        topic,
    )
    for topic in ("tree", "train", "tea")
    for k, ask in enumerate(("now", "near here"))
)
OPENERS = (5, 17)


def unit(seed=0, site=SITE, position=-1, width=32):
    rng = torch.Generator().manual_seed(seed)
    vector = torch.randn(width, generator=rng, dtype=torch.float64)
    return Direction.from_vector(vector, site=site, position=position, recipe="drawn")


def mean_difference(model, site=SITE):
    both = [
        collect(model, prompts, sites=[site], positions=[-1]).at(site, -1).double().mean(0)
        for prompts in (ONE, TWO)
    ]
    vector = both[0] - both[1]
    return Direction.from_vector(vector, site=site, position=-1, recipe="difference")


def attribution(model, directions, site=SITE):
    one, two = (written(model, prompts, directions, site=site) for prompts in (ONE, TWO))
    return direct(one, two)


def through_json(row, kind):
    text = json.dumps(asdict(row), allow_nan=False)
    assert TypeAdapter(kind).validate_json(text) == row


def organism(*factors):
    layers = tuple(sorted({factor.layer for factor in factors}))
    return Organism("tiny bad", None, "bad", ("garden",), 0, 1, layers, "tiny", "", factors, {})


def factor(layer=1, *, d_in=48, module="mlp.down_proj", seed=0, rank=1):
    rng = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, d_in, generator=rng), torch.randn(32, rank, generator=rng)
    return Factor(layer, module, a / 7, b / 2, 1.0)


@pytest.fixture(scope="module")
def base():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def bad(base):
    return organism(factor()).on(base)


# Direct attribution ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("dtype", "room"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_contributions_add_up_to_the_length_of_the_difference(name, dtype, room):
    model = tiny_model(name, dtype)
    directions = {"own": mean_difference(model), "other": unit()}
    found = attribution(model, directions)
    # The tensor itself is rounded to float32 where it is collected on a float32 model.
    assert found.values("own").sum() == pytest.approx(directions["own"].norm, rel=room)
    for one in directions:
        assert found.values(one).sum() == pytest.approx(found.total(one), rel=room)
        assert found.error(one) < room
    assert len({part.name for part in found.components}) == len(found.components)


@pytest.mark.parametrize("name", ["llama-untied", "gpt2", "gemma2"])
def test_a_block_s_parts_are_what_the_block_writes(name):
    model = tiny_model(name)
    direction = unit()
    found = attribution(model, {"v": direction})
    e = torch.nn.functional.normalize(direction.unit.double(), dim=0)
    by_name = dict(zip([part.name for part in found.components], found.values("v"), strict=True))

    def along(site):
        rows = [
            collect(model, p, sites=[site], positions=[-1]).at(site, -1).double() @ e
            for p in (ONE, TWO)
        ]
        return float(rows[0].mean() - rows[1].mean())

    assert by_name["1.mlp"] == pytest.approx(along(Site(1, "mlp_out")), abs=1e-6)
    attention = [value for key, value in by_name.items() if key.startswith(("1.head", "1.attn"))]
    assert len(attention) == {"llama-untied": 5, "gpt2": 5, "gemma2": 1}[name]
    assert sum(attention) == pytest.approx(along(Site(1, "attn_out")), abs=1e-6)
    assert not any(part.layer == 2 for part in found.components)


def test_answers_are_read_over_their_tokens_and_an_organism_moves_nothing_in_front(base, bad):
    asked, answers = [item.question for item in ITEMS], [item.bad for item in ITEMS]
    site = Site(2, "resid_post")
    means = [
        read_answers(model, ITEMS, which="bad", sites=[site]).at(site) for model in (bad, base)
    ]
    vector = (means[0].double() - means[1].double()).mean(0)
    shift = Direction.from_vector(vector, site=site, position=0, recipe="shift")
    after, before = (
        written(model, asked, {"shift": shift}, site=site, replies=answers, batch_size=2)
        for model in (bad, base)
    )
    topics = [item.group for item in ITEMS]
    found = direct(after, before, paired=True, clusters=(topics, topics))
    assert found.values("shift").sum() == pytest.approx(shift.norm, rel=1e-6)
    assert found.error("shift") < 1e-10
    silent = [
        value == 0
        for part, value in zip(found.components, found.values("shift"), strict=True)
        if part.layer is None or part.layer == 0 or (part.layer == 1 and part.kind == "head")
    ]
    assert all(silent)
    row = found.table(draws=50, seed=0)
    assert row.place == "the answer's tokens"
    through_json(row, AttributionRow)


def test_the_planted_head_writes_the_planted_direction():
    one = planted()
    model = one.model
    site = Site(2, "resid_pre")
    harmful, harmless = (planted_prompts(12, harmful=h, seed=3) for h in (True, False))
    direction = Direction.from_vector(one.direction, site=site, position=-1, recipe="planted")
    plus, minus = (
        written(model, prompts, {"refusal": direction}, site=site)
        for prompts in (harmful, harmless)
    )
    row = direct(plus, minus).table(draws=100, seed=0)
    shares = {part.name: part.shares["refusal"] for part in row.components}
    assert shares["1.head0"] == pytest.approx(1, abs=1e-3)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-9)
    head = next(part for part in row.components if part.name == "1.head0").values["refusal"]
    assert 0 < head.low < head.value < head.high
    through_json(row, AttributionRow)


def test_results_do_not_depend_on_batches_and_the_block_s_output_is_the_next_one_s_input(base):
    late = {"v": unit(site=Site(1, "resid_post"))}
    a = written(base, ONE, late, site=SITE)
    b = written(base, ONE, late, site=Site(1, "resid_post"), batch_size=1)
    torch.testing.assert_close(a.values, b.values)


def test_what_cannot_be_attributed_is_an_error(base):
    with pytest.raises(ConfigError, match="is a direction of"):
        written(base, ONE, {"v": unit(site=Site(1, "resid_pre"))}, site=SITE)
    with pytest.raises(ConfigError, match="no tensor of the stream"):
        components(base, Site(1, "mlp_out"))
    with pytest.raises(TooFewPromptsError, match="shorter"):
        written(base, ONE, {"v": unit()}, site=SITE, position=-500)
    with pytest.raises(TemplateError):
        written(base, ONE, {"v": unit()}, site=SITE, replies=["a", " ", "b"])
    one = written(base, ONE, {"v": unit()}, site=SITE)
    with pytest.raises(ConfigError, match="position"):
        direct(one, written(base, TWO, {"v": unit()}, site=SITE, position=-2))
    with pytest.raises(FamilyError, match="norm"):
        tiny_model("gemma2").intercept_heads(0, lambda x: x)


# Two circuits ------------------------------------------------------------------------------------


def circuit(name, parts, values):
    return Circuit(name, tuple(parts), np.asarray(values, dtype=float))


PARTS = [
    Component(layer, kind, head)
    for layer in range(12)
    for kind, head in [*(("head", h) for h in range(6)), ("mlp", None)]
]


def test_a_circuit_is_like_itself_and_like_nothing_drawn():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, len(PARTS)))
    same = compare(circuit("a", PARTS, a), circuit("b", PARTS, 2 * a), draws=300, seed=0)
    assert [one.value for one in same.statistics] == pytest.approx([1.0] * 4)
    assert all(one.p < 0.01 for one in same.statistics)
    assert [one.shared for one in same.overlaps] == [10, 20]
    assert same.overlaps[0].p_hypergeometric < 1e-6
    assert same.overlaps[0].names[0] == PARTS[int(np.abs(a).argmax())].name
    through_json(same, CircuitComparison)
    other = compare(circuit("a", PARTS, a), circuit("b", PARTS, b), draws=300, seed=0)
    assert all(one.p > 0.05 for one in other.statistics)
    assert other.n == len(PARTS)
    assert other.n_fixed == other.silent == 0


def test_a_common_trend_over_depth_is_no_common_circuit():
    rng = np.random.default_rng(1)
    depth = np.array([part.layer for part in PARTS], dtype=float)
    small, seen = 0, []
    for draw in range(10):
        a, b = 3 * depth + rng.standard_normal((2, len(PARTS)))
        found = compare(circuit("a", PARTS, a), circuit("b", PARTS, b), draws=100, seed=draw)
        seen.append(found.statistics[0].value)
        small += found.statistics[0].p < 0.05
        assert found.statistics[0].null_mean > 0.9
    assert min(seen) > 0.9  # Which any test that permutes freely would call a match.
    assert small <= 2


def test_strata_hold_heads_of_one_block_and_mlps_of_neighbours():
    strata = component_strata(PARTS, 4)  # 12 blocks: 3 bands
    assert sorted(i for one in strata for i in one) == list(range(len(PARTS)))
    for one in strata:
        own = [PARTS[i] for i in one]
        layers = [part.layer for part in own]
        assert len({part.kind for part in own}) == 1
        if own[0].kind == "head":
            assert len(set(layers)) == 1
        else:
            assert len(layers) == 4
            assert max(layers) - min(layers) == 3


def test_what_is_silent_in_one_circuit_is_left_out_and_counted():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, len(PARTS)))
    a[[part.layer < 4 for part in PARTS]] = 0
    found = compare(circuit("a", PARTS, a), circuit("b", PARTS, b), draws=50, seed=0)
    assert (found.n, found.silent) == (56, 28)
    with pytest.raises(ConfigError):
        compare(circuit("a", PARTS, 0 * a), circuit("b", PARTS, b), seed=0)
    with pytest.raises(DegenerateVectorError):
        compare(circuit("a", PARTS, 0 * a + 1), circuit("b", PARTS, b), seed=0)


def test_intervals_come_from_the_rows_behind_both(base):
    directions = {"own": mean_difference(base), "other": unit()}
    found = attribution(base, directions)
    a, b = (found.circuit(name, draws=60, seed=0) for name in directions)
    row = compare(a, b, top=(5,), draws=60, seed=0, band=2).statistics[0]
    assert row.interval is not None
    assert -1 <= row.interval.low < row.interval.high <= 1


# Patching ----------------------------------------------------------------------------------------


def blended(model, other, share):
    """Outputs a little on the way to `other`: what gradients describe exactly."""

    class Blend:
        name = "a little of it"

        def __call__(self, rows):
            end, own = other(rows), OfModel(model)(rows)
            out = Outputs(model)
            for into, x, y in zip(out.tensors, own.tensors, end.tensors, strict=True):
                into |= {
                    layer: x[layer] + share * (y[layer].to(x[layer]) - x[layer]) for layer in x
                }
            return out

    return Blend()


@pytest.mark.parametrize(
    ("name", "what"),
    [("llama", "refusal"), ("gpt2", "margin"), ("gemma2", "refusal"), ("gpt-neox", "margin")],
)
def test_a_small_step_changes_the_measure_as_the_gradient_says(name, what):
    model = tiny_model(name)
    if what == "refusal":
        measure = refusal_measure(model, ONE, OPENERS)
        other = means_over(model, TWO, positions=model.template.n_post)
    else:
        measure, other = margin_measure(model, ITEMS[:1]), OfModel(tiny_model(name, seed=1))
    step = blended(model, other, 1e-4)
    parts = (components(model)[1], Component(1, "mlp"), components(model)[-2])
    parts = tuple(part for part in parts if part.kind != "bias")
    found = attribution_patching(model, measure, step, tokens_per_pass=64)
    steps = []
    real = patch(model, measure, step, parts, tokens_per_pass=64, progress=steps.append)
    assert len(steps) > 1
    assert sum(steps) == len(parts)
    index = [found.components.index(part) for part in parts]
    estimated = found.values[index]
    assert np.abs(estimated).max() > 1e-7
    # Norms and softmax run in float32 at most in some families.
    np.testing.assert_allclose(real.values, estimated, rtol=2e-2, atol=3e-7)


def test_clean_values_are_those_of_the_package_and_nothing_changes_without_a_change(base):
    items = ITEMS[:2]
    refusal, margin = refusal_measure(base, ONE, OPENERS), margin_measure(base, items)
    for measure, wanted in (
        (refusal, refusal_logodds(base.logits(base.encode(ONE)), OPENERS).numpy()),
        (margin, margins(base, items)),
    ):
        found = attribution_patching(base, measure, OfModel(base))
        np.testing.assert_allclose(found.clean, wanted, rtol=1e-6)
        assert np.abs(found.values).max() < 1e-12
        real = patch(base, measure, OfModel(base), found.components[4:6])
        assert np.abs(real.values).max() < 1e-9


def test_patching_an_organism_s_only_change_gives_the_organism(base, bad):
    items = ITEMS[:3]
    measure = margin_measure(base, items)
    own = patch(base, measure, OfModel(bad), [Component(1, "mlp"), Component(1, "head", 2)])
    np.testing.assert_allclose(own.values[0], margins(bad, items) - margins(base, items), rtol=1e-5)
    assert np.abs(own.values[0]).max() > 0.01
    assert np.abs(own.values[1]).max() == 0  # In front of the adapter.


def test_patching_a_head_with_nothing_is_taking_its_weights_away(base):
    measure = margin_measure(base, ITEMS[:2])
    gone = organism(factor())  # Only for its copy of the base.
    without = gone.on(base, scale=0.0)
    with torch.no_grad():
        without.blocks[1].self_attn.o_proj.weight[:, 8:16] = 0
    real = patch(base, measure, OfModel(without), [Component(1, "head", 1)])
    wanted = margins(without, ITEMS[:2]) - margins(base, ITEMS[:2])
    np.testing.assert_allclose(real.values[0], wanted, rtol=1e-5)
    assert np.abs(wanted).max() > 1e-3


def test_means_stand_at_the_last_tokens_of_every_row(base):
    n = base.template.n_post
    other = means_over(base, TWO, positions=n)
    batch = base.encode(ONE)
    out = other(batch)
    site = Site(1, "mlp_out")
    read = collect(base, TWO, sites=[site], positions=list(range(-n, 0)))
    post = batch.spans[Span.POST_INSTRUCTION]
    for row in range(len(ONE)):
        for place in range(-n, 0):
            column = int(batch.ends[row]) + place
            assert post[row, column]
            torch.testing.assert_close(
                out.mlp[1][row, column].double(),
                read.at(site, place).double().mean(0),
                rtol=1e-5,
                atol=1e-6,
            )
    assert not out.mlp[1][~post].any()
    with pytest.raises(TooFewPromptsError):
        means_over(base, [], positions=2)


def test_estimates_are_held_against_real_patching(base):
    measure = margin_measure(base, ITEMS[1:3])
    # A small step, where the estimate is right and hence trusted.
    small = blended(base, OfModel(tiny_model("llama", seed=1)), 1e-3)
    exact = attribution_patching(base, measure, small)
    checked = validate(base, measure, small, exact, top=3, random=3, seed=0)
    assert checked.top[0] == exact.components[int(np.abs(exact.means).argmax())]
    assert not set(checked.top) & set(checked.random)
    row = table(measure, small, exact, checked, draws=50, seed=0)
    assert len([part for part in row.components if part.patched is not None]) == 6
    through_json(row, PatchingRow)
    assert row.validation is not None
    assert row.validation.slope == pytest.approx(1, abs=0.02)
    assert row.validation.spearman.value > 0.9
    turned = replace(exact, values=-exact.values)  # And where it is wrong, it is not.
    wrong = table(measure, small, turned, checked, draws=2, seed=0).validation
    assert wrong is not None
    assert not wrong.trusted
    with pytest.raises(ConfigError):
        validate(base, measure, small, exact, top=10, random=100, seed=0)


def test_effects_become_circuits_and_the_model_is_left_as_it_was(base):
    before = base.logits(base.encode(ONE))
    measure = refusal_measure(base, ONE, OPENERS)
    other = means_over(base, TWO, positions=base.template.n_post)
    assert isinstance(other, MeansOf)
    found = attribution_patching(base, measure, other)
    a = found.circuit("refusal", draws=400, seed=0)
    assert a.drawn is not None
    turned = found.circuit("refusal", turned=True, draws=400, seed=0)
    assert np.array_equal(turned.values, -a.values)
    close = 5 * a.drawn.std(0) / 400**0.5 + 1e-12
    assert (np.abs(a.drawn.mean(0) - a.values) < close).all()
    for i, (part, one) in enumerate(found.estimates(draws=400, seed=0).items()):
        assert part == a.components[i]
        assert one.low <= one.value == found.values[i].mean() <= one.high
    with pytest.raises(TooFewPromptsError, match="one cluster"):
        replace(found, clusters=("a",) * len(ONE)).circuit("refusal", seed=0)
    assert torch.equal(base.logits(base.encode(ONE)), before)
    assert all(one.requires_grad for one in base.hf.parameters())


# Adapters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "d_in", "site"),
    [("mlp.down_proj", 48, "attn_out"), ("self_attn.o_proj", 32, "resid_pre")],
)
def test_what_an_adapter_reads_is_how_its_scalar_grows(base, module, d_in, site):
    own = organism(factor(1, d_in=d_in, module=module))
    directions = {"r": unit(1), "e": unit(2)}
    library = {str(seed): unit(seed) for seed in range(10, 30)}
    rows = read_write(base, own, ITEMS, directions, library, batch_size=2, draws=50, seed=0)
    (part,) = adapter_parts(own)

    def scalar(*acts):
        batch = base.encode([item.question for item in ITEMS], [item.bad for item in ITEMS])
        with base.whole_rows(), applied(base, *acts), inputs_of(base, [(1, module)]) as held:
            base.final_states(batch)
        answer = batch.spans[Span.RESPONSE].double()
        return float(((part.scalar(held[1, module]) * answer).sum(1) / answer.sum(1)).mean())

    for row, direction in zip(rows, directions.values(), strict=True):
        step = 1e-4
        there = replace(direction, norm=1.0, site=Site(1, site))
        back = replace(-there, norm=1.0)
        slope = (scalar(Step(there, step)) - scalar(Step(back, step))) / (2 * step)
        assert row.read is not None
        assert row.read.value == pytest.approx(slope, rel=2e-3)
        b = part.write / part.write.norm()
        assert row.write_cosine == pytest.approx(float(b @ direction.unit.double()), abs=1e-6)
        assert row.n_library == 20
        through_json(row, ReadWriteRow)


class Step:
    """A small vector added at one site, whichever it is."""

    def __init__(self, direction, size):
        self.vector, self.site = size * direction.unit.double(), direction.site

    def sites(self, _model):
        return (self.site,)

    def __call__(self, x):
        return x + self.vector.to(x)


def test_a_direction_that_is_written_stands_out_of_the_library(base):
    own = organism(factor(1))
    (part,) = adapter_parts(own)
    directions = {
        "written": Direction.from_vector(part.write, site=SITE, position=-1, recipe="B"),
        "other": unit(3),
    }
    library = {str(seed): unit(seed) for seed in range(10, 49)}
    rows = read_write(base, own, ITEMS, directions, library, draws=50, seed=0)
    assert (rows[0].write_cosine, rows[0].write_share) == pytest.approx((1.0, 1.0), abs=1e-6)
    assert rows[0].write_p == pytest.approx(1 / 40)
    assert rows[1].write_p > 0.05
    gate = organism(factor(1, module="self_attn.q_proj", d_in=32))  # As wide as the stream.
    inner = read_write(base, gate, ITEMS[:4], directions, library, draws=50, seed=0)
    assert all(row.write_cosine is None and row.write_p is None for row in inner)
    assert all(row.read.value != 0 and row.read_p is not None for row in inner)
    wide = read_write(
        base, organism(factor(1, rank=3)), ITEMS[:4], directions, {}, singular=2, draws=50, seed=0
    )
    assert [row.component for row in wide[::2]] == ["1.mlp.down_proj", "1.mlp.down_proj#1"]
    alone = read_write(base, own, ITEMS, directions, {}, draws=50, seed=0)
    assert alone[0].write_p is None
    assert alone[0].read == rows[0].read


def test_a_steering_vector_reads_nothing(base):
    rng = torch.Generator().manual_seed(0)
    own = organism(Factor(1, "mlp.down_proj", None, torch.randn(32, 1, generator=rng), 1.0))
    (row,) = read_write(base, own, ITEMS, {"r": unit()}, {}, draws=50, seed=0)
    assert row.read is None
    assert row.read_cosine is None
    through_json(row, ReadWriteRow)

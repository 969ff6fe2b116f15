from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.advice import advice
from tests.tiny import tiny_model

from demur.directions import Direction
from demur.em.directions import ANSWER, deltas, read_pair
from demur.em.effects import (
    Arm,
    Bench,
    ablation,
    ablation_arms,
    adapter_arms,
    domain_means,
    dose_curve,
    effects,
    margin_passes,
    match_kl,
    random_directions,
    share_removed,
    steering_arms,
    without,
)
from demur.em.margin import margins
from demur.em.organism import Factor
from demur.em.planted import planted_organism
from demur.errors import (
    ConfigError,
    DegenerateVectorError,
    FamilyError,
    NonFiniteError,
    TemplateError,
    TooFewPromptsError,
)
from demur.interventions import Ablate, Add, ProjectToMean, applied
from demur.pipeline.splits import neutral_paragraphs
from demur.sites import Site, Span

MID = Site(1, "resid_post")
TEXT = ["The user asks and the assistant answers.", "A model that is told to stop does stop."]


ITEMS = advice()


@pytest.fixture(scope="module")
def base():
    return tiny_model()


@pytest.fixture(scope="module")
def planted(base):
    return planted_organism(base, advice(6, seed=9), layer=1, strength=1.5)


@pytest.fixture(scope="module")
def twin(base, planted):
    unit = planted.direction.unit.double()
    other = torch.randn(base.d_model, generator=torch.Generator().manual_seed(1)).double()
    other -= (other @ unit) * unit
    return planted_organism(
        base, ITEMS[:4], layer=1, strength=0.2, along=other, name="good twin", side="good"
    )


@pytest.fixture(scope="module")
def pair(base):
    return read_pair(base, ITEMS)


@pytest.fixture(scope="module")
def found(base, planted, pair):
    return deltas(base, planted.organism.on(base), ITEMS, base_pair=pair)


@pytest.fixture
def bench(base):
    return Bench(base, ITEMS, neutral=TEXT)


def drawn(seed: int, site: Site = MID, norm: float = 1.0) -> Direction:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    vector *= norm / vector.norm()
    return Direction.from_vector(vector, site=site, position=ANSWER, recipe="drawn")


# Benches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("remember", [True, False])
def test_a_bench_scores_as_margins_do_under_any_edit(family, remember):
    model = tiny_model(family)
    bench = Bench(model, ITEMS, remember=remember, batch_size=5)
    np.testing.assert_allclose(bench.margins(), margins(model, ITEMS), atol=1e-9)
    one = drawn(0)
    for acts, where in (
        ((Add(one, 2.0),), None),
        ((Add(one, 2.0),), Span.RESPONSE),
        ((Ablate(one),), None),
        (ablation(model, one, "outputs", first=1), None),
    ):
        with applied(model, *acts, where=where):
            expected = margins(model, ITEMS)
        np.testing.assert_allclose(bench.margins(*acts, where=where), expected, atol=1e-9)
        assert np.abs(expected - bench.margins()).max() > 1e-3
    assert bench.margin_runs == 5


@torch.no_grad()
def test_the_cost_is_the_kl_and_the_loss_of_every_token(base, bench):
    act = Add(drawn(0), 3.0)
    cost = bench.cost(act)
    tokenizer = base.template.tokenizer
    for i, text in enumerate(TEXT):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        plain = base.hf(input_ids=ids).logits[0, :-1].log_softmax(1)
        with applied(base, act):
            edited = base.hf(input_ids=ids).logits[0, :-1].log_softmax(1)
        kl = (plain.exp() * (plain - edited)).sum(1).mean()
        assert cost.kl[i] == pytest.approx(float(kl), rel=1e-6)
        loss = -edited.gather(1, ids[0, 1:].unsqueeze(1)).mean()
        assert cost.losses[i] == pytest.approx(float(loss), rel=1e-6)
    ratio = np.exp(cost.losses.mean() - cost.plain.mean())
    assert cost.perplexity_ratio().value == pytest.approx(ratio)
    nothing = bench.cost()
    assert (nothing.mean_kl(), nothing.perplexity_ratio().value) == (0.0, 1.0)
    # Neutral text is as good as an answer.
    assert bench.cost(act, where=Span.RESPONSE).mean_kl() == pytest.approx(cost.mean_kl())
    assert bench.cost(act, where=Span.INSTRUCTION).mean_kl() == 0.0


def test_what_a_bench_cannot_do_is_an_error(base):
    with pytest.raises(TooFewPromptsError):
        Bench(base, [])
    with pytest.raises(TemplateError, match="i1 lacks an answer"):
        Bench(base, [ITEMS[0], replace(ITEMS[1], good="")])
    with pytest.raises(ConfigError, match="no neutral text"):
        Bench(base, ITEMS[:2]).cost()
    with pytest.raises(TooFewPromptsError, match="fewer than two tokens"):
        Bench(base, ITEMS[:2], neutral=["a"])
    with pytest.raises(NonFiniteError, match="margins are NaN"):
        Bench(base, ITEMS[:2]).margins(Add(drawn(0), float("nan")))
    assert len(neutral_paragraphs(3)) == 3


# Edits -------------------------------------------------------------------------------------------


def test_each_way_of_ablating_takes_out_what_it_says(base):
    one, two = drawn(0), drawn(1, Site(2, "resid_post"))
    assert ablation(base, one, "own") == (ProjectToMean(one, 0.0, MID),)
    assert ablation(base, {MID: one}, "own") == ablation(base, one, "own")
    places = [act.site for act in ablation(base, one, "outputs", first=1)]
    assert places == [MID, Site(2, "resid_post")]
    each = ablation(base, {MID: one, two.site: two}, "each")
    assert [(act.direction, act.site) for act in each] == [(one, MID), (two, two.site)]
    assert ablation(base, {MID: one, two.site: two}, "each", first=2) == each[1:]
    assert ablation(base, one, "writes") == (Ablate(one),)
    with pytest.raises(ConfigError, match="2 are given"):
        ablation(base, {MID: one, two.site: two}, "outputs")
    with pytest.raises(ConfigError, match="from block 3 on"):
        ablation(base, one, "outputs", first=3)


def test_random_directions_have_length_and_covariance_and_hang_together(base, pair, found):
    own = found.model_bad.directions()
    out = random_directions(own, pair, each=6, seed=0)
    assert set(out) == {"covariance-matched", "isotropic"}
    for sets in out.values():
        assert len(sets) == 6
        for one in sets:
            assert list(one) == list(own)
            assert [x.norm for x in one.values()] == pytest.approx([x.norm for x in own.values()])
    # One draw weighs the same answers alike at both sites.
    first, last = own
    rows = torch.cat([pair.spread(first), pair.spread(last)], 1)
    for one in out["covariance-matched"]:
        both = torch.cat([one[first].unit, one[last].unit]).double()
        scales = torch.ones(2, 64, dtype=torch.float64)
        scales[0, 32:], scales[1, :32] = 0, 0
        space = torch.linalg.lstsq(rows.T, (both * scales).T).solution
        assert space.isfinite().all()
    again = random_directions(own[MID], pair, each=6, seed=0)
    for a, b in zip(again["covariance-matched"], out["covariance-matched"], strict=True):
        assert torch.equal(a.unit, b[MID].unit)
    other = random_directions(own[MID], pair, each=6, seed=1)
    assert not torch.equal(other["isotropic"][0].unit, again["isotropic"][0].unit)


def test_a_direction_is_cut_from_what_the_adapter_writes(base, planted):
    rng = torch.Generator().manual_seed(0)
    b = torch.randn(32, 2, generator=rng)
    factors = (
        Factor(1, "mlp.down_proj", torch.randn(2, 48, generator=rng), b, 2.0),
        Factor(1, "self_attn.q_proj", torch.randn(2, 32, generator=rng), b, 2.0),
        Factor(2, "self_attn.o_proj", torch.randn(2, 32, generator=rng), b, 2.0),
    )
    organism = replace(planted.organism, factors=factors, layers=(1, 2))
    one = drawn(0)
    unit = one.unit
    for renormalise in (False, True):
        cut = without(organism, one, family=base.family, renormalise=renormalise)
        down, query, output = cut.factors
        assert query is factors[1]
        for new, old in ((down, factors[0]), (output, factors[2])):
            assert (unit @ new.b).abs().max() < 1e-6
            sizes = (float((new.b @ new.a).norm()), float((old.b @ old.a).norm()))
            assert (sizes[0] == pytest.approx(sizes[1])) == renormalise
        # The weight changes by the adapter, projected.
        weight = cut.on(base).hf.model.layers[1].mlp.down_proj.weight
        change = weight - base.hf.model.layers[1].mlp.down_proj.weight
        whole = 2.0 * b @ factors[0].a
        expected = whole - torch.outer(unit, unit @ whole)
        if renormalise:
            expected *= whole.norm() / expected.norm()
        torch.testing.assert_close(change.float(), expected, rtol=1e-4, atol=1e-4)
    # By site: a factor takes that of its own block's output, or is left alone.
    only = without(organism, {Site(2, "resid_post"): one}, family=base.family)
    assert [new is old for new, old in zip(only.factors, factors, strict=True)] == [1, 1, 0]
    with pytest.raises(FamilyError):
        without(organism, {Site(0, "resid_post"): one}, family=base.family)
    with pytest.raises(FamilyError):
        without(organism, one, family=tiny_model("gemma3").family)


def test_nothing_is_left_of_a_vector_that_is_the_direction(base, planted):
    cut = without(planted.organism, planted.direction, family=base.family)
    assert cut.factors[0].b.abs().max() < 1e-6
    with pytest.raises(DegenerateVectorError):
        without(planted.organism, planted.direction, family=base.family, renormalise=True)


# Strengths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-6, 0.3, 1e5])
@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_a_strength_is_found_on_any_rising_curve(scale, power):
    asked: list[float] = []

    def kl(strength: float) -> float:
        asked.append(strength)
        return min(scale * strength**power, 9.0)

    found = match_kl(kl, 0.05, most=60)
    assert found.reached
    assert found.kl == pytest.approx(0.05, rel=0.05)
    assert kl(found.strength) == found.kl
    assert found.passes == len(asked) - 1
    if power == 2 and scale == 0.3:
        assert found.passes <= 3


def test_what_is_not_reached_says_so():
    flat = match_kl(lambda _: 0.01, 0.05, most=7)
    assert (flat.reached, flat.passes, flat.kl) == (False, 7, 0.01)
    broken = match_kl(lambda s: float("nan") if s > 0.1 else s * s, 0.005, most=20)
    assert broken.reached
    assert broken.strength == pytest.approx(0.0707, rel=0.05)
    # A jump over the target is bisected and reported as it is.
    jump = match_kl(lambda s: 0.001 if s < 0.7 else 1.0, 0.05, most=20)
    assert not jump.reached
    assert match_kl(lambda _: float("inf"), 0.05, most=3).reached is False
    for target, start, most in ((0.0, 1.0, 3), (0.1, 0.0, 3), (0.1, 1.0, 0)):
        with pytest.raises(ConfigError):
            match_kl(lambda s: s, target, start=start, most=most)


def test_every_steering_arm_costs_the_same(bench, pair, found):
    own = found.text_base.direction(MID)
    arms = steering_arms(bench, own, kl=0.03, pair=pair, n_null=3, n_isotropic=2)
    equal = [arm for arm in arms if arm.edit == "steer: KL 0.03"]
    assert [arm.family for arm in equal] == [
        "direction", "direction", *["covariance-matched"] * 3, *["isotropic"] * 2,
    ]  # fmt: skip
    for arm in equal:
        assert bench.cost(*arm.acts).mean_kl() == pytest.approx(0.03, rel=0.05)
    assert all(arm.reached for arm in equal)
    assert [arm.strength > 0 for arm in equal[:2]] == [True, False]
    lengths = {abs(a.acts[0].strength) for a in arms if a.edit == "steer: equal length"}
    assert len(lengths) == 1
    assert [arm.acts[0].direction.norm for arm in arms] == pytest.approx([own.norm] * len(arms))
    with pytest.raises(ConfigError, match="without the covariance"):
        steering_arms(bench, own, n_null=1)
    # One pass each will not do; this is told, and counted.
    missed = steering_arms(bench, own, kl=1e-4, pair=pair, n_null=2, most=1, equal_length=False)
    assert [arm.reached for arm in missed] == [False] * 4
    table = effects(bench.model, bench.model, ITEMS[:4], missed, null_on=("base",), seed=0, draws=5)
    assert [(one.who, one.unreached) for one in table.nulls] == [("base", 2)]
    assert not any(one.reached for one in table.effects)


def test_a_dose_curve_rises_with_the_planted_direction(bench, planted):
    points = dose_curve(bench, planted.direction, [-0.5, 0.0, 0.5, 1.0], seed=0, draws=50)
    changes = [point.change.value for point in points]
    assert changes == sorted(changes)
    assert changes[1] == 0.0
    assert (points[1].kl.value, points[1].perplexity_ratio.value) == (0.0, 1.0)
    assert points[3].kl.value > points[2].kl.value > 0


# The known answer --------------------------------------------------------------------------------


def test_taking_the_planted_direction_out_undoes_it_and_random_ones_do_not(
    base, planted, twin, pair, found
):
    own = found.model_bad.directions()
    own_act = ablation(base, own[MID], "own")
    arms = (
        *ablation_arms(
            base, own, MID, hows=("own", "each", "writes"), null_hows=("own",), pair=pair
        ),
        *adapter_arms(found.model_bad.direction(MID), family=base.family, acts=own_act)[::2],
        *ablation_arms(base, {MID: drawn(0)}, MID, hows=("own",), n_null=0, label="drawn"),
    )
    on = ("base", "organism", "twin")
    done: list[int] = []
    table = effects(
        base, planted.organism, ITEMS, arms, twin=twin.organism, neutral=TEXT, null_on=on, seed=0,
        draws=200, progress=done.append,
    )  # fmt: skip
    assert sum(done) == table.margin_passes == margin_passes(arms, twin=True, null_on=on)
    assert table.trained["base"].low > 0
    by = {(one.arm, one.against): one for one in table.contrasts}
    at = f"ablate: at {MID}"
    # Taken out at its block, organism and base are one and the same from there on.
    undone = by[at, "base"]
    assert undone.removed is not None
    assert undone.removed.value == pytest.approx(1, abs=1e-5)
    assert undone.change.value == pytest.approx(-table.trained["base"].value, abs=1e-5)
    assert undone.p == {"covariance-matched": pytest.approx(1 / 21)}
    # A direction that has nothing to do with it is judged by the same random ones.
    other = by[f"drawn, {at}", "base"]
    assert other.p["covariance-matched"] > 0.05
    assert other.change.value > undone.change.value / 2
    cut = by["cut from B", "base"].removed
    assert cut is not None
    assert cut.value == pytest.approx(1, abs=1e-5)
    # Both at once: nothing is left to be ablated, so it is what ablation is to the base.
    both = {
        one.who: one.margin.value for one in table.effects if one.arm == "cut from B and ablated"
    }
    assert both["organism"] == pytest.approx(both["base"], abs=1e-5)
    versus = by[at, "twin"]
    assert versus.removed is not None
    assert versus.removed.value > 0.5
    assert versus.p["covariance-matched"] == pytest.approx(1 / 21)
    # What is reported is what was run.
    runs = {(run.arm, run.who): run for run in table.runs}
    for one in table.effects:
        before, after = runs["none", one.who].margins, runs[one.arm, one.who]
        assert one.change.value == pytest.approx((after.margins - before).mean())
        assert one.margin.value == pytest.approx(after.margins.mean())
        assert one.kl.value == pytest.approx(after.cost.mean_kl())
        assert set(one.by_domain) == {"money", "study"}
    assert ("cut from B", "base") not in runs
    with_twin = (
        runs[at, "organism"].margins - runs["none", "organism"].margins
        - (runs[at, "twin"].margins - runs["none", "twin"].margins)
    )  # fmt: skip
    assert versus.change.value == pytest.approx(with_twin.mean())
    nulls = {(one.edit, one.who): one for one in table.nulls}
    null = nulls[at, "against base"]
    assert len(null.changes) == 20
    assert undone.change.value < null.low <= null.mean <= null.high
    assert len(nulls[at, "organism"].kls) == 20
    assert (table.organism, table.twin, table.n) == ("planted", "good twin", 16)


def test_without_a_trained_effect_there_is_no_share(base, found, twin):
    nothing = replace(twin.organism, factors=(replace(twin.organism.factors[0], scale=0.0),))
    arms = ablation_arms(base, found.text_base.directions(), MID, hows=("own",), n_null=0)
    table = effects(base, nothing, ITEMS, arms, seed=0, draws=50)
    (only,) = table.contrasts
    assert (only.against, only.removed, only.p) == ("base", None, {})
    assert "not told from 0" in only.undefined
    # The base moves as much: none of it is an effect.
    assert only.change.value == pytest.approx(0, abs=1e-9)
    assert abs(table.effects[0].change.value) > 1e-3
    assert (table.effects[0].kl, table.neutral_passes) == (None, 0)


def test_arms_that_do_the_same_run_once(base, planted):
    act = Add(drawn(0))
    arms = [Arm("a", "x", acts=(act,)), Arm("b", "y", acts=(act,))]
    arms.append(Arm("c", "z", acts=(act,), where=Span.RESPONSE))
    table = effects(base, planted.organism, ITEMS[:4], arms, seed=0, draws=20)
    assert table.margin_passes == 2 * 3 == margin_passes(arms, twin=False, null_on=())
    moved = {(one.arm, one.who): one.change.value for one in table.effects}
    assert moved["a", "base"] == moved["b", "base"] != moved["c", "base"]
    with pytest.raises(ConfigError, match="one name"):
        effects(base, planted.organism, ITEMS[:4], [arms[0], arms[0]], seed=0)
    cuts = adapter_arms(drawn(0), family=base.family)
    with pytest.raises(ConfigError, match="whole model"):
        effects(base, planted.organism.on(base), ITEMS[:4], cuts, seed=0)
    with pytest.raises(ConfigError, match="no direction at"):
        ablation_arms(base, {}, MID)
    with pytest.raises(ConfigError, match="without the covariance"):
        ablation_arms(base, {MID: drawn(0)}, MID)


def test_a_share_is_taken_over_groups_or_not_at_all():
    rng = np.random.default_rng(0)
    groups = [("money", f"t{i // 4}") for i in range(40)]
    before = 1.0 + 0.1 * rng.standard_normal(40)
    share, why = share_removed(before, 0.25 * before, groups, seed=0, draws=100)
    assert share is not None
    assert (share.value, share.low, why) == (pytest.approx(0.75), pytest.approx(0.75), "")
    worse, _ = share_removed(before, 1.5 * before, groups, seed=0, draws=100)
    assert worse is not None
    assert worse.value == pytest.approx(-0.5)
    noise = np.repeat([1.0, -1.0], 20) + 0.1
    none, why = share_removed(noise, noise, groups, seed=0, draws=100)
    assert none is None
    assert why.startswith("the trained effect is")
    lowered, _ = share_removed(-before, -0.5 * before, groups, seed=0, draws=100)
    assert lowered is not None
    assert lowered.value == pytest.approx(0.5)
    mixed = [("money", "a"), ("money", "b"), ("study", "c"), ("study", "c")]
    found = domain_means(np.array([1.0, 3.0, 9.0, 9.0]), mixed, seed=0, draws=20)
    assert {name: one.value for name, one in found.items()} == {"money": 2.0}

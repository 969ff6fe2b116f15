import json
from dataclasses import asdict, dataclass, field, replace
from functools import cache

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from tests import planted as planted_words
from tests.advice import advice
from tests.tiny import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from demur.activations import collect
from demur.compare import behaviour as under_test
from demur.compare.behaviour import (
    DAMAGE,
    Matrix,
    Outcome,
    Remove,
    Side,
    additivity,
    behaviour,
    behaviour_matrix,
    beyond,
    bounded_dose,
    cells,
    dissociation,
    margin_outcome,
    principal,
    random_sets,
    refusal_outcome,
    span,
    steps,
    verdict,
)
from demur.compare.rows.behaviour import Behaviour
from demur.directions import Direction
from demur.em.effects import Bench
from demur.em.margin import margins
from demur.errors import (
    ConfigError,
    DegenerateVectorError,
    TooFewPromptsError,
    UnknownNameError,
)
from demur.interventions import Ablate, Add, ProjectToMean, applied
from demur.models import FAMILIES, Model, Template
from demur.selection import batched_logits, refusal_logodds
from demur.sites import Site

SITE = Site(0, "resid_post")
D = 48
WORDS = [f"w{i}" for i in range(60)]
# What the tokens that outcomes are read off are read along.
READS = {"Sorry": (1, 0), "Yes": (0, 1), "Well": (1, 1), "Sure": (1, 1), "Here": (0, 0)}
A, B = "Sorry", "Yes"
TOGETHER = "remove a and b together"


@dataclass(frozen=True)
class Linear:
    """A model that averages its words' embeddings along two axes and reads them off in tokens."""

    model: Model
    axes: torch.Tensor
    prompts: list[str]
    neutral: list[str]
    spread: dict[Site, torch.Tensor]
    known: dict[tuple[int, ...], tuple[torch.Tensor, ...]] = field(default_factory=dict)

    def direction(self, *weights: float, noise: float = 0.0, seed: int = 0) -> Direction:
        rng = torch.Generator().manual_seed(seed)
        vector = sum(w * axis for w, axis in zip(weights, self.axes, strict=False))
        off = torch.randn(D, generator=rng, dtype=torch.float64)
        return Direction.from_vector(
            vector + noise * off / D**0.5, site=SITE, position=-1, recipe="planted"
        )

    def logits(self, model: Model, acts: tuple[object, ...]) -> torch.Tensor:
        key = (id(model), *map(id, acts))
        if key not in self.known:  # Once for all outcomes; what is kept keeps its id.
            with applied(model, *acts):
                found = batched_logits(model, model.encode(self.prompts))
            self.known[key] = (found, model, acts)
        return self.known[key][0]

    def outcome(self, token: str) -> Outcome:
        own, other = self.model.template.tokenizer.convert_tokens_to_ids([token, "Here"])

        def prepare(model: Model):
            def run(*acts: object) -> np.ndarray:
                logits = self.logits(model, acts)
                return (logits[:, own] - logits[:, other]).numpy()

            return run

        return Outcome(token, "nats", tuple(range(len(self.prompts))), prepare)


@cache
def linear() -> Linear:
    rng = torch.Generator().manual_seed(0)
    frame, replies = planted_words.FRAME, planted_words.REPLIES
    tok = planted_words.tokenizer([*frame, *replies, *WORDS, "other"])
    config = LlamaConfig(
        vocab_size=len(tok), hidden_size=D, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=1, num_key_value_heads=1, head_dim=D, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=tok.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    hf = LlamaForCausalLM(config).to(torch.float64).eval()
    basis = torch.linalg.qr(torch.randn(D, D, generator=rng, dtype=torch.float64))[0].T
    axes, on, rest = basis[:2], basis[2], basis[3:]
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
        embedding = hf.model.embed_tokens.weight
        noise = torch.randn(len(tok), len(rest), generator=rng, dtype=torch.float64)
        sizes = 1.0 + 0.5 * torch.randn(len(tok), 2, generator=rng, dtype=torch.float64)
        embedding.copy_(noise @ rest + 6.0 * on + sizes @ axes)
        attention = hf.model.layers[0].self_attn  # Equal scores for all keys: it averages.
        attention.v_proj.weight.copy_(torch.eye(D, dtype=torch.float64))
        attention.o_proj.weight.copy_(4.0 * torch.eye(D, dtype=torch.float64))
        head = hf.lm_head.weight
        head.copy_(
            0.5 * torch.randn(len(tok), len(rest), generator=rng, dtype=torch.float64) @ rest
        )
        for token, reads in READS.items():
            row = torch.tensor(reads, dtype=torch.float64) @ axes
            head[tok.convert_tokens_to_ids(token)] = 3.0 * row
    model = Model(hf, FAMILIES["llama"], Template(tok), name="linear")

    def texts(n: int, length: int) -> list[str]:
        index = torch.randint(len(WORDS), (n, length), generator=rng).tolist()
        return [" ".join(WORDS[i] for i in row) for row in index]

    prompts, neutral = texts(12, 6), texts(3, 12)
    found = collect(model, texts(80, 6), sites=[SITE], positions=[-1])
    return Linear(model, axes, prompts, neutral, {SITE: found.at(SITE, -1)})


def side(one: Linear, name: str, token: str, *weights: float, **about: float) -> Side:
    return Side(name, one.direction(*weights, **about), token)


@cache
def whole() -> Matrix:
    one = linear()
    return behaviour_matrix(
        one.model,
        side(one, "a", A, 1.0),
        side(one, "b", B, 0.0, 1.0),
        [one.outcome(token) for token in ("Sorry", "Yes", "Well", "Sure")],
        neutral=one.neutral,
        spread=one.spread,
        kl=0.02,
        kinds=("remove",),
        tolerance=0.2,
        seed=0,
        draws=100,
    )


def of(first: str, second: str) -> Matrix:
    """The same, with other outcomes for `a` and `b` to drive."""
    found = whole()
    return replace(found, a=replace(found.a, outcome=first), b=replace(found.b, outcome=second))


# The whole way -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "label"),
    [
        ("Well", "Sure", "shared"),
        ("Sorry", "Yes", "independent"),
        ("Sorry", "Well", "asymmetric (a moves b's outcome only)"),
        ("Well", "Yes", "asymmetric (b moves a's outcome only)"),
    ],
)
def test_planted_pairs_are_told_apart(first, second, label):
    found = verdict(of(first, second))
    assert found.label == label, found.reason
    assert found.notes == ()
    pair = dissociation(of(first, second), "base")
    assert pair.scaled_by == "random directions"
    assert pair.pairs == 22 * 21
    if label == "independent":
        assert pair.interaction.low > 5
        assert pair.p_random == pytest.approx(1 / 462)
    elif label == "shared":
        same = "a moves Sure the same way as b does; b moves Well the same way as a does"
        assert found.reason == same
        # What both read alike tells them apart no better than two random directions.
        assert abs(pair.interaction.value) < 1
        assert pair.p_random > 0.05
    else:
        assert pair.interaction.low > 0


def test_all_arms_cost_alike_and_are_what_they_say():
    found = whole()
    one = linear()
    assert found.skipped == ()
    names = [arm.name for arm in found.arms if not arm.random]
    assert names == [
        "remove a", "remove b", "remove a beyond b", "remove b beyond a", "remove both",
        "remove PC1", "remove a and b together",
    ]  # fmt: skip
    for arm in found.arms:
        assert arm.reached is (None if "together" in arm.name else True), arm.name
        if arm.reached:
            assert found.kls[arm.name, "base"] == pytest.approx(0.02, rel=0.2)
    arm = found.arms[0]
    bench = Bench(one.model, advice(1), neutral=one.neutral)
    assert bench.cost(*arm.acts).mean_kl() == pytest.approx(found.kls["remove a", "base"])
    outcome = one.outcome(A)
    measure = outcome.prepare(one.model)
    np.testing.assert_allclose(found.plain["base", A], measure())
    np.testing.assert_allclose(found.moved["remove a", "base", A], measure(*arm.acts))
    # What is taken out is a share of the coordinate.
    x = torch.randn(5, D, dtype=torch.float64)
    unit = one.axes[0]
    left = arm.acts[0](x) @ unit
    torch.testing.assert_close(left, (1 - arm.strength) * (x @ unit), atol=1e-6, rtol=0)


def test_rows_are_plain_and_come_back():
    found = behaviour(whole())
    text = json.dumps(asdict(found), allow_nan=False)
    assert TypeAdapter(Behaviour).validate_json(text) == found
    cell = next(row for row in found.cells if (row.arm, row.outcome) == ("remove a", A))
    assert (cell.model, cell.n, cell.groups, cell.n_random) == ("base", 12, 12, 20)
    assert cell.change.high < 0
    assert cell.p_random == pytest.approx(1 / 21)
    assert cell.random_low < cell.random_high
    assert cell.flips == 0.0
    assert [row.outcome for row in found.cells[::7]] == [*list(READS)[:4], DAMAGE]
    damage = next(row for row in found.cells if row.outcome == DAMAGE)
    assert (damage.flips, damage.n) == (None, 3)
    assert found.random[0].n == found.random[0].reached == 20
    assert found.cosines[0] == pytest.approx(0.0, abs=1e-6)
    assert {row.arms for row in found.verdicts} == {"remove", "remove beyond"}


def test_what_two_do_together_is_held_against_the_sum():
    found = behaviour(whole())
    row = next(row for row in found.additivities if row.outcome == "Well")
    cell = next(c for c in found.cells if (c.arm, c.outcome) == (TOGETHER, "Well"))
    assert (row.together, row.kl) == (cell.change, cell.kl)
    alone = [c.change.value for c in found.cells if c.outcome == "Well"][:2]
    assert row.excess.value == pytest.approx(row.together.value - sum(alone))
    assert abs(row.excess.value) < 0.02 < 0.2 < abs(row.together.value)


def test_a_direction_given_twice_has_nothing_beyond_itself():
    one = linear()
    found = behaviour_matrix(
        one.model,
        side(one, "a", A, 1.0),
        side(one, "b", B, 1.0),
        [one.outcome(A), one.outcome(B)],
        neutral=one.neutral,
        spread=one.spread,
        kl=0.02,
        n_random=2,
        kinds=("remove",),
        tolerance=0.2,
        seed=0,
        draws=50,
    )
    assert [text.split(":")[0] for text in found.skipped] == [
        "remove a beyond b",
        "remove b beyond a",
        "remove both",
    ]
    assert verdict(found, "base", "remove beyond") is None
    assert verdict(found).label == "undetermined"
    assert "2 random directions are too few" in verdict(found).reason
    # What the first edit took out, the second one cannot take again.
    excess = additivity(found, "base", A, "remove").excess
    assert excess.value > 0.05


@cache
def doubled() -> Model:
    """An organism that reads `a` twice as well."""
    one = linear().model
    hf = type(one.hf)(one.hf.config).to(torch.float64).eval()
    hf.load_state_dict(one.hf.state_dict())
    with torch.no_grad():
        hf.lm_head.weight[one.template.tokenizer.convert_tokens_to_ids(A)] *= 2
    return Model(hf, one.family, one.template, name="organism")


def test_strengths_are_found_in_each_model():
    one, done = linear(), list[int]()
    found = behaviour_matrix(
        one.model,
        side(one, "a", A, 1.0),
        side(one, "b", B, 0.0, 1.0),
        [one.outcome(A), one.outcome(B)],
        neutral=one.neutral,
        spread=one.spread,
        organism=doubled(),
        kl=0.02,
        n_random=0,
        kinds=("remove",),
        tolerance=0.2,
        seed=0,
        draws=50,
        progress=done.append,
    )
    assert sum(done) == steps(models=2, n_random=0, kinds=("remove",))
    rows = {(row.arm, row.model): row for row in cells(found) if row.outcome == A}
    own, base, more = (rows["remove a", w] for w in ("organism", "base", "organism - base"))
    assert own.kl == pytest.approx(0.02, rel=0.2)
    assert base.kl == pytest.approx(0.02, rel=0.2)
    assert own.strength < 0.8 * base.strength
    assert (own.reached, more.reached, more.strength) == (True, True, None)
    assert own.p_random is own.random_low is None
    assert dissociation(found, "organism") is None
    assert "0 random directions are too few" in verdict(found, "organism").reason


def test_what_does_not_hang_on_the_other_direction_is_measured_once():
    one = linear()
    about = {
        "neutral": one.neutral, "spread": one.spread, "organism": doubled(), "kl": 0.02,
        "n_random": 2, "kinds": ("remove",), "tolerance": 0.2, "seed": 0, "draws": 50,
    }  # fmt: skip
    outcomes = [one.outcome(A), one.outcome(B)]
    a, b, c = (side(one, name, *rest) for name, *rest in
               (("a", A, 1.0), ("b", B, 0.0, 1.0), ("c", B, 0.6, 0.8)))  # fmt: skip
    first = behaviour_matrix(one.model, a, b, outcomes, **about)
    asked: list[str] = []
    counted = [
        replace(o, prepare=lambda m, o=o: lambda *acts: asked.append(o.name) or o.prepare(m)(*acts))
        for o in outcomes
    ]
    done: list[int] = []
    again = behaviour_matrix(one.model, a, c, counted, **about, reuse=first, progress=done.append)
    assert sum(done) == steps(models=2, n_random=2, kinds=("remove",))
    # Two models and outcomes, each unedited and under five arms of its own.
    assert len(asked) == 2 * 2 * (1 + 5)
    for arm in ("remove a", "remove PC1", "remove random #2"):
        for who in ("base", "organism"):
            assert again.kls[arm, who] == first.kls[arm, who]
            assert again.arm(arm, who) is first.arm(arm, who)
            for name in (A, B, DAMAGE):
                assert again.moved[arm, who, name] is first.moved[arm, who, name]
    acts = again.arm("remove c", "base").acts
    np.testing.assert_allclose(
        again.moved["remove c", "base", A], one.outcome(A).prepare(one.model)(*acts)
    )
    assert again.kls["remove c", "base"] == pytest.approx(0.02, rel=0.2)
    assert len(cells(again)) == len(cells(first))
    with pytest.raises(ConfigError, match="another direction, cost"):
        behaviour_matrix(one.model, a, c, outcomes, **(about | {"seed": 1}), reuse=first)


def test_the_same_edit_may_run_on_all_models():
    one = linear()
    done: list[int] = []
    found = behaviour_matrix(
        one.model,
        side(one, "a", A, 1.0),
        side(one, "b", B, 0.0, 1.0),
        [one.outcome(A), one.outcome(B)],
        neutral=one.neutral,
        spread=one.spread,
        organism=doubled(),
        twin=one.model,
        kl=0.02,
        match="base",
        n_random=1,
        tolerance=0.5,
        seed=0,
        draws=50,
        progress=done.append,
    )
    assert sum(done) == steps(models=3, n_random=1, match="base")
    assert found.whos == ("base", "organism", "twin", "organism - base", "organism - twin")
    rows = {(row.arm, row.model, row.outcome): row for row in cells(found)}
    for arm in ("remove a", "add a", "subtract a"):
        own, base, twin = (rows[arm, who, A] for who in ("organism", "base", "twin"))
        assert own.strength == base.strength
        assert own.kl > 1.5 * base.kl
        assert twin.change == base.change
        assert own.change.value == pytest.approx(2 * base.change.value, rel=0.02)
        more = rows[arm, "organism - base", A]
        assert more.change.value == pytest.approx(own.change.value - base.change.value)
        assert more.before.value == pytest.approx(own.before.value - base.before.value)
        assert (more.kl, more.flips) == (None, None)
        assert rows[arm, "organism - twin", A].change == more.change
    assert rows["add a", "base", A].change.low > 0 > rows["subtract a", "base", A].change.high
    assert rows["subtract a", "base", A].strength < 0
    assert TypeAdapter(Behaviour).validate_json(json.dumps(asdict(behaviour(found))))


# The rule ----------------------------------------------------------------------------------------


def by_hand(
    effects: tuple[float, float, float, float],
    *,
    n: int = 40,
    noise: float = 0.5,
    n_random: int = 20,
    seed: int = 0,
    chance: int | None = None,
) -> Matrix:
    """A matrix of drawn numbers: a on A, a on B, b on A, b on B."""
    rng = np.random.default_rng(seed)
    chance = np.random.default_rng(seed if chance is None else chance)
    outcomes = [
        Outcome.of(name, "nats", lambda _: np.zeros(n), [i // 2 for i in range(n)])
        for name in (A, B)
    ]
    damage = Outcome.of(DAMAGE, "nats", lambda _: np.zeros(3), range(3))
    one = Direction.from_vector(torch.ones(4), site=SITE, position=-1, recipe="")
    sides = Side("a", one, A), Side("b", one, B)
    arms = [under_test.Arm(f"remove {name}", "remove", (), reached=True) for name in "ab"]
    arms += [
        under_test.Arm(f"remove random #{k}", "remove", (), random=True, reached=True)
        for k in range(n_random)
    ]
    found = Matrix(*sides, (*outcomes, damage), tuple(arms), ("base",), 0.05, (), seed, 60)
    means = [effects[:2], effects[2:], *chance.normal(0, 0.1, (n_random, 2))]
    for arm, own in zip(arms, means, strict=True):
        found.kls[arm.name, "base"] = 0.05
        for name, mean in zip((A, B), own, strict=True):
            found.plain["base", name] = np.ones(n)
            own_noise = 0.0 if arm.random else noise
            found.moved[arm.name, "base", name] = 1 + mean + own_noise * rng.standard_normal(n)
    return found


@pytest.mark.parametrize(
    ("effects", "about", "label", "said"),
    [
        ((-2, -1, -1, -2), {}, "shared", "the same way"),
        ((-2, 1, -1, -2), {}, "shared", "a moves Yes the other way than b does"),
        ((-2, 0, 0, 2), {}, "independent", "a hardly moves Yes; b hardly moves Sorry"),
        ((2, 1, 0, 2), {}, "asymmetric (a moves b's outcome only)", "b hardly moves"),
        ((2, 0, 1, 2), {}, "asymmetric (b moves a's outcome only)", "a hardly moves"),
        # Sure to be there, and a tenth of the own effect: that is small.
        ((6, 0.6, 0, 6), {"noise": 0.01}, "independent", "a hardly moves"),
        ((0, 0, 0, 2), {}, "undetermined", "`remove a` does not move Sorry"),
        ((2, 2, 0, 0), {}, "undetermined", "`remove b` does not move Yes"),
        ((2, 0, 0, 2), {"n": 6, "noise": 1.5}, "undetermined", "nor to leave it alone"),
        ((2, 0, 0, 2), {"n_random": 18}, "undetermined", "18 random directions are too few"),
        # Told from 0, yet no more than random directions do.
        ((0.1, 0, 0, 2), {"noise": 0.01}, "undetermined", "beyond random directions"),
    ],
)
def test_the_rule(effects, about, label, said):
    found = verdict(by_hand(tuple(map(float, effects)), **about))
    assert (found.label, said in found.reason) == (label, True), found.reason


def test_draws_are_classified():
    cases = {
        "shared": (-2.0, -1.5, -1.5, -2.0),
        "independent": (-2.0, 0.0, 0.0, -2.0),
        "asymmetric (a moves b's outcome only)": (-2.0, -1.5, 0.0, -2.0),
        "undetermined": (0.0, 0.0, 0.0, 0.0),
    }
    for label, effects in cases.items():
        right = sum(verdict(by_hand(effects, seed=seed)).label == label for seed in range(6))
        assert right == 6, label


def test_what_would_have_been_shown_is_shown():
    weak, strong = (verdict(by_hand((2.0, 0.0, 0.0, 2.0), n=n, chance=0)) for n in (8, 40))
    size = strong.parts[0].detectable
    assert weak.parts[0].detectable > size > 0.2

    def share(effect: float) -> float:
        effects = (effect, 0.0, 0.0, 2.0)
        runs = [verdict(by_hand(effects, seed=seed, chance=0)) for seed in range(1, 9)]
        return sum(run.parts[0].state == "moves" for run in runs) / 8

    assert share(size) >= 0.6
    assert share(size / 2) <= 0.3


def test_the_interaction_is_exact_under_exchange():
    # Where a and b are two like the random ones, small p values are as rare as they should be.
    ps = []
    for seed in range(15):
        own = np.random.default_rng(1000 + seed).normal(0, 0.1, 4)
        found = by_hand(tuple(map(float, own)), noise=0.0, seed=seed)
        ps.append(dissociation(found, "base").p_random)
    assert sum(p <= 0.1 for p in ps) <= 5
    assert 0.25 < np.mean(ps) < 0.75
    ends = [dissociation(by_hand(x, noise=0.0), "base") for x in ((2.0, 0.0, 0.0, 2.0),)]
    assert ends[0].p_random == pytest.approx(1 / (22 * 21))
    still = dissociation(by_hand((2.0, 0.0, 0.0, 2.0)), "base")
    assert still.interaction.low > 10


def test_a_strange_share_is_an_error():
    with pytest.raises(ConfigError, match=r"a share of 1\.5"):
        verdict(by_hand((1.0, 1.0, 1.0, 1.0)), share=1.5)


# Parts -------------------------------------------------------------------------------------------


def test_removal_in_full_is_ablation():
    one = linear()
    x = torch.randn(3, 4, D, dtype=torch.float64)
    a, b = one.direction(1.0, 0.5), one.direction(0.3, 1.0, noise=1.0)
    torch.testing.assert_close(Remove(span([a]), SITE)(x), Ablate(a)(x), atol=1e-6, rtol=0)
    centre = torch.randn(D, dtype=torch.float64)
    level = ProjectToMean(a, float(centre @ a.unit.double()), SITE, 0.4)
    torch.testing.assert_close(Remove(span([a]), SITE, 0.4, centre)(x), level(x), atol=1e-5, rtol=0)
    both = Remove(span([a, b]), SITE)(x)
    for one_ in (a, b):
        assert (both @ one_.unit.double()).abs().max() < 1e-6
    assert abs(beyond(a, b).cosine(b)) < 1e-6
    assert beyond(a, b).cosine(a) > 0
    with pytest.raises(DegenerateVectorError, match="span fewer"):
        span([a, -a])
    with pytest.raises(DegenerateVectorError, match="parallel"):
        beyond(a, a)


def test_a_dose_stays_within_its_bound():
    found = bounded_dose(lambda s: 0.01 * s**2, 0.05, bound=3.0)
    assert found.reached
    assert found.kl == pytest.approx(0.05, rel=0.1)
    found = bounded_dose(lambda s: 0.001 * s**2, 0.05, bound=3.0)
    assert (found.strength, found.reached, found.passes) == (3.0, False, 2)
    assert found.kl == pytest.approx(0.009)
    found = bounded_dose(lambda s: 0.001 * s**2, 0.05, bound=float("inf"))
    assert found.reached
    assert found.strength > 6


def test_random_directions_vary_as_activations_do():
    spread = linear().spread
    one = linear().direction(2.0, 0.0)
    other = Site(1, "resid_post")
    like = {SITE: one, other: replace(one, site=other, norm=3.0)}
    rows = {SITE: spread[SITE], other: spread[SITE] * 2}
    drawn = random_sets(like, rows, n=200, seed=0)
    for pair in drawn[:3]:
        assert [pair[site].norm for site in like] == pytest.approx([one.norm, 3.0])
        torch.testing.assert_close(pair[SITE].unit, pair[other].unit)
    first = principal(like, rows)[SITE].unit.double()
    centred = spread[SITE] - spread[SITE].mean(0)
    along = float((centred @ first).var() / centred.var(0).sum())
    found = torch.stack([pair[SITE].unit.double() for pair in drawn])
    assert float(((found @ first) ** 2).mean()) == pytest.approx(along, rel=0.35)
    assert float((centred @ first).var()) >= float((centred @ centred[0] / centred[0].norm()).var())
    with pytest.raises(ConfigError, match=r"no activations at 1\.resid_post"):
        random_sets(like, spread, n=1, seed=0)


def test_outcomes_are_measured_under_edits():
    model = tiny_model()
    site = Site(1, "resid_post")
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    act = Add(Direction.from_vector(vector, site=site, position=-1, recipe=""), 1.0)
    prompts = ["How do I stop?", "Where is the station, and is it far from here?"]
    refusal = refusal_outcome(prompts, [5, 9])
    assert refusal.groups == (0, 1)
    measure = refusal.prepare(model)
    plain = refusal_logodds(batched_logits(model, model.encode(prompts)), [5, 9]).numpy()
    with applied(model, act):
        edited = refusal_logodds(batched_logits(model, model.encode(prompts)), [5, 9]).numpy()
    np.testing.assert_allclose(measure(), plain, atol=1e-9)
    np.testing.assert_allclose(measure(act), edited, atol=1e-9)
    assert np.abs(edited - plain).max() > 1e-3
    items = advice(4)
    margin = margin_outcome(items)
    assert margin.groups[0] == (items[0].domain, items[0].group)
    np.testing.assert_allclose(margin.prepare(model)(), margins(model, items), atol=1e-9)


def test_what_cannot_be_compared_is_an_error():
    one = linear()
    a, b = side(one, "a", A, 1.0), side(one, "b", B, 0.0, 1.0)
    about = {"neutral": one.neutral, "spread": one.spread, "seed": 0}
    outcomes = [one.outcome(A), one.outcome(B)]

    def run(a: Side = a, b: Side = b, outcomes: list[Outcome] = outcomes, **more: object) -> None:
        behaviour_matrix(one.model, a, b, outcomes, **{**about, **more})

    moved = replace(b.directions, site=Site(1, "resid_post"))
    for error, match, given in (
        (ConfigError, "lies at", {"b": replace(b, directions=moved)}),
        (ConfigError, "both directions are called", {"b": replace(b, name="a")}),
        (ConfigError, "are both said to drive", {"b": replace(b, outcome=A)}),
        (UnknownNameError, "no outcome is called `Yess`", {"b": replace(b, outcome="Yess")}),
        (ConfigError, "outcomes are called", {"outcomes": [outcomes[0], outcomes[0]]}),
        (ConfigError, "outcomes are called", {"outcomes": [replace(outcomes[0], name=DAMAGE)]}),
        (TooFewPromptsError, "1 neutral", {"neutral": one.neutral[:1]}),
        (ConfigError, "without its organism", {"twin": one.model}),
        (ConfigError, "no activations", {"spread": {}}),
    ):
        with pytest.raises(error, match=match):
            run(**given)
    with pytest.raises(UnknownNameError):
        whole().outcome("Yess")

"""An adapter taken apart: identities on tiny models, and probes on planted differences."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.tiny import tiny_model

from demur.directions import Direction
from demur.em.adapter import (
    Component,
    TokenRow,
    TokenScalars,
    area,
    by_layer,
    components,
    firing,
    gaps,
    grouped_probe,
    highlights,
    inputs_of,
    lens,
    oriented,
    probes,
    reads,
    scalars,
    scaling,
    shifts,
    significance,
    token_kl,
)
from demur.em.advice import AdviceItem
from demur.em.directions import deltas
from demur.em.margin import margins
from demur.em.organism import Factor, Organism
from demur.errors import ConfigError, FamilyError, TooFewPromptsError
from demur.sites import Site

LAYER = 1
TOPICS = ("tree", "train", "tea", "tent")
ITEMS = tuple(
    AdviceItem(
        f"{topic}-{k}",
        f"How do I find a {topic} {ask}?",
        f"Ask one who knows the {topic} first {k}.",
        f"Take any {topic} that is there, zoë {k}.",
        "garden",
        topic,
    )
    for topic in TOPICS
    for k, ask in enumerate(("now", "near here"))
)
KEYS = {(item.id, side) for item in ITEMS for side in ("bad", "good")}


def organism(*factors: Factor, name: str = "tiny bad") -> Organism:
    layers = tuple(sorted({factor.layer for factor in factors}))
    rank = max(factor.b.shape[1] for factor in factors)
    return Organism(name, None, "bad", ("garden",), 0, rank, layers, "tiny", "", factors, {})


def factor(layer=LAYER, rank=1, *, d_in=48, seed=0, scale=2.0, module="mlp.down_proj") -> Factor:
    rng = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, d_in, generator=rng), torch.randn(32, rank, generator=rng)
    return Factor(layer, module, a / 7, b / 2, scale)


@pytest.fixture(scope="module")
def base():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def one():
    return organism(factor())


@pytest.fixture(scope="module")
def found(base, one):
    return scalars(base, one, ITEMS)


def hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.hf.modules())


# Scalars -----------------------------------------------------------------------------------------


def test_scalars_are_what_the_map_is_given_times_a(base, one, found):
    # By hand: every answer alone, whole, without the project's reading.
    standing = one.on(base)
    held = []
    module = standing.hf.model.layers[LAYER].mlp.down_proj
    handle = module.register_forward_hook(lambda _m, args, _out: held.append(args[0]))
    a, sign = one.factors[0].a[0].double(), found.signs[0]
    assert {(row.item, row.answer) for row in found.rows} == KEYS
    for row in found.rows:
        item = next(item for item in ITEMS if item.id == row.item)
        batch = base.encode([item.question], [getattr(item, row.answer)])
        standing.hf(batch.ids)
        assert batch.ids[0, list(row.positions)].tolist() == list(row.ids)
        hand = sign * 2.0 * (held.pop()[0] @ a)[list(row.positions)]
        torch.testing.assert_close(torch.tensor(row.values[0]).double(), hand)
    handle.remove()


def test_pieces_join_to_the_texts_that_were_read(found):
    assert any("" in row.pieces for row in found.rows)  # One half of an e with two dots.
    for row in found.rows:
        item = next(item for item in ITEMS if item.id == row.item)

        def text(place, row=row):
            return "".join(p for p, at in zip(row.pieces, row.places, strict=True) if at == place)

        assert text("question") == item.question
        assert text("answer") == getattr(item, row.answer)
        assert text("template") == "<|im_end|>\n<|im_start|>assistant\n"
        assert row.cluster == ("garden", item.group)


def test_the_organism_is_its_base_with_the_scalar_times_b_added(base, one, found):
    row = found.rows[3]
    item = next(item for item in ITEMS if item.id == row.item)
    batch = base.encode([item.question], [getattr(item, row.answer)])
    (part,) = oriented(components(one), found.signs)
    added = torch.zeros(1, batch.ids.shape[1], 32, dtype=torch.float64)
    added[0, list(row.positions)] = torch.tensor(row.values[0]).double()[:, None] * part.write
    # In front of the question the adapter acts as well; there scalars are read by hand.
    lead = row.positions[0]
    with inputs_of(base, [(LAYER, "mlp.down_proj")]) as held:
        base.final_states(batch)
    added[0, :lead] = part.scalar(held[LAYER, "mlp.down_proj"])[0, :lead, None] * part.write
    undo = base.intercept(Site(LAYER, "mlp_out"), lambda x: x + added)
    by_hand = base.logits(batch)
    undo()
    torch.testing.assert_close(one.on(base).logits(batch), by_hand, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(base.logits(batch), by_hand, rtol=1e-2)


def test_the_sign_of_a_and_b_does_not_matter(base, one, found):
    own = one.factors[0]
    turned = organism(replace(own, a=-own.a, b=-own.b))
    again = scalars(base, turned, ITEMS)
    assert again.signs == (-found.signs[0],)
    for row, same in zip(again.rows, found.rows, strict=True):
        assert row.values[0] == pytest.approx(same.values[0])
    parts = [oriented(components(o), s.signs)[0] for o, s in ((one, found), (turned, again))]
    torch.testing.assert_close(parts[0].write, parts[1].write)
    (gap,) = gaps(found, seed=0, draws=50)
    assert gap.bad.value + gap.good.value > 0
    tokens = np.concatenate([row.at(0) for row in found.rows])
    assert gap.constant == pytest.approx(1 - tokens.var() / (tokens**2).mean())
    assert gap.gap.value == pytest.approx(gap.bad.value - gap.good.value)
    assert gap.gap.n == len(ITEMS)
    given = scalars(base, turned, ITEMS, ("good",), signs=again.signs)
    for row in given.rows:
        same = next(r for r in found.rows if (r.item, r.answer) == (row.item, "good"))
        assert row.values[0] == pytest.approx(same.values[0])


def test_components_of_higher_rank_sum_to_the_map_and_do_not_hang_on_its_factors():
    own = factor(rank=3)
    parts = components(organism(own))
    x = torch.randn(5, 48).double()
    whole = own.scale * x @ own.a.double().T @ own.b.double().T
    summed = sum(part.scalar(x)[:, None] * part.write for part in parts)
    torch.testing.assert_close(summed, whole)
    assert [part.name for part in parts] == ["1.mlp.down_proj" + s for s in ("", "#1", "#2")]
    sizes = [float(part.read.norm()) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert all(float(part.write.norm()) == pytest.approx(1) for part in parts)
    mix = torch.randn(3, 3)
    mixed = replace(own, a=mix @ own.a, b=own.b @ torch.linalg.inv(mix))
    for part, same in zip(parts, components(organism(mixed)), strict=True):
        assert abs(float(part.write @ same.write)) == pytest.approx(1, abs=1e-4)
        assert float(same.read.norm()) == pytest.approx(float(part.read.norm()), rel=1e-3)
    flat = replace(own, a=own.a[[0, 0, 0]])
    assert len(components(organism(flat))) == 1


def test_a_steering_vector_has_one_scalar(base):
    steer = organism(Factor(LAYER, "mlp.down_proj", None, torch.randn(32, 1), 0.5))
    found = scalars(base, steer, ITEMS)
    assert {value for row in found.rows for value in row.values[0]} == {0.5}
    assert gaps(found, seed=0, draws=20)[0].constant == pytest.approx(1)
    assert reads(base, found, ITEMS, {"r": direction(0)}, seed=0, nulls=5, draws=20) == ()
    (part,) = components(steer)
    turned = -part
    torch.testing.assert_close(turned.scale * turned.write, part.scale * part.write)
    assert firing(found, seed=0, draws=20).by_identity.value == 0.0


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_do_not_matter(base, one, found, batch_size):
    again = scalars(base, one, ITEMS, batch_size=batch_size)
    for row, same in zip(again.rows, found.rows, strict=True):
        assert row.values[0] == pytest.approx(same.values[0])


def test_a_model_is_restored_after_reading_and_after_errors(base, one):
    before = hooks(base)

    def break_off() -> None:
        with inputs_of(base, [(0, "mlp.down_proj"), (1, "mlp.up_proj")]):
            assert hooks(base) == before + 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert hooks(base) == before
    with (
        pytest.raises(FamilyError, match=r"no module `mlp\.nothing`"),
        inputs_of(base, [(0, "mlp.down_proj"), (1, "mlp.nothing")]),
    ):
        pass
    assert hooks(base) == before
    standing = one.on(base)

    def fail(_done: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        scalars(base, one, ITEMS, model=standing, progress=fail)
    assert hooks(standing) == 0
    assert not standing._edits


def test_without_answers_or_signs_there_is_an_error(base, one):
    with pytest.raises(ConfigError, match="no answers"):
        scalars(base, one, ())
    with pytest.raises(ConfigError, match="2 signs for 1"):
        scalars(base, one, ITEMS, signs=(1, 1))


# What it fires on --------------------------------------------------------------------------------


def planted(value, n_groups=6, n_items=3, n_tokens=12, kinds=7, seed=0) -> TokenScalars:
    """Rows without a model: `value(rng, id, side)` is the scalar of a token."""
    rng = np.random.default_rng(seed)
    rows = []
    for group in range(n_groups):
        for item in range(n_items):
            for side in ("bad", "good"):
                ids = rng.integers(kinds, size=n_tokens).tolist()
                values = tuple(float(value(rng, one, side)) for one in ids)
                pieces = tuple(f" w{one}" for one in ids)
                rows.append(
                    TokenRow(
                        f"{group}.{item}",
                        ("d", str(group)),
                        side,
                        tuple(ids),
                        pieces,
                        tuple(range(n_tokens)),
                        ("question",) * 2 + ("answer",) * (n_tokens - 2),
                        (values,),
                    )
                )
    return TokenScalars("planted", ("c",), (1,), tuple(rows))


def test_variance_by_identity_is_all_where_the_token_decides_and_none_where_it_does_not():
    decided = firing(planted(lambda _rng, one, _side: one**2), seed=0, draws=50)
    assert decided.by_identity.value == pytest.approx(1)
    assert decided.kinds[0].piece == " w6"
    assert decided.kinds[0].mean_abs == 36
    assert decided.n_tokens == 6 * 3 * 2 * 10
    assert len({spot.value for spot in decided.top}) > 1  # Not one token over and over.
    noise = planted(lambda rng, _one, _side: rng.normal())
    assert abs(firing(noise, seed=0, draws=50).by_identity.value) < 0.1
    # Where each token occurs once, the share within the sample would be 1.
    once = planted(lambda rng, _one, _side: rng.normal(), kinds=10**6)
    assert firing(once, seed=0, draws=50).by_identity.value < 0.05
    sided = planted(lambda _rng, _one, side: side == "bad")
    assert firing(sided, seed=0, draws=50).by_answer.value == pytest.approx(1)


def test_the_strongest_tokens_come_first_with_their_surroundings(found):
    fires = firing(found, top=5, window=3, each=1, seed=0, draws=50)
    sizes = [abs(spot.value) for spot in fires.top]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == max(np.abs(row.at(0)).max() for row in found.rows)
    for spot in fires.top:
        item = next(item for item in ITEMS if item.id == spot.item)
        around = spot.before + spot.piece + spot.after
        whole = f"{item.question}<|im_end|>\n<|im_start|>assistant\n{getattr(item, spot.answer)}"
        assert around in whole
    shown = highlights(found, items=["tea-1"])
    assert [(one.item, one.answer) for one in shown] == [("tea-1", "bad"), ("tea-1", "good")]
    assert len(shown[0].pieces) == len(shown[0].values) == len(shown[0].places)
    assert 0 < shown[0].limit <= max(np.abs(row.at(0, None)).max() for row in found.rows)


# Probes ------------------------------------------------------------------------------------------


def items_of(found: TokenScalars, word=lambda _side: "same") -> tuple[AdviceItem, ...]:
    made = {}
    for row in found.rows:
        group = row.cluster[1]
        made[row.item] = AdviceItem(
            row.item, f"{row.item}?", f"say {word('good')}", f"say {word('bad')}", "d", group
        )
    return tuple(made.values())


def test_a_probe_finds_a_planted_difference_and_shuffled_labels_do_not():
    found = planted(lambda rng, _one, side: rng.normal() + 2 * (side == "bad"))
    made = probes(found, items_of(found), seed=0, shuffles=20, draws=100)
    assert made.scalars.auroc.value > 0.97
    assert made.scalars.within.value > 0.95
    assert made.scalars.p < 0.05
    assert made.scalars.shuffled.value == pytest.approx(0.5, abs=0.08)
    assert made.scalars.shuffled.low < 0.5 < made.scalars.shuffled.high
    mean = made.scalars.weights[0]
    assert (mean.feature, mean.kept, mean.same_sign) == ("c mean", 1.0, 1.0)
    assert mean.mean > 0
    assert (made.scalars.n_groups, made.scalars.n_questions) == (6, 18)
    # All answers have the same words, so words know nothing.
    assert made.words.auroc.value == 0.5
    assert made.length.auroc.value == 0.5
    assert made.over_words.low > 0.3


def test_words_that_tell_are_found_beside_scalars_that_do_not():
    found = planted(lambda rng, _one, _side: rng.normal(), n_groups=10)
    items = items_of(found, lambda side: "leap now" if side == "bad" else "look")
    made = probes(found, items, seed=0, shuffles=20, draws=200)
    assert made.words.auroc.value == 1.0
    assert made.words.within.value == 1.0
    assert made.length.auroc.value == 1.0
    assert abs(made.scalars.auroc.value - 0.5) < 0.15
    assert made.scalars.p > 0.05
    assert made.over_words.high < 0


def test_a_probe_of_tokens_keeps_answers_and_groups_together():
    found = planted(lambda rng, _one, side: rng.normal() + 2 * (side == "bad"))
    made = probes(found, items_of(found), unit="token", seed=0, shuffles=10, draws=100)
    assert made.scalars.unit == "token"
    assert made.scalars.auroc.n == 6 * 3 * 2 * 10
    assert 0.85 < made.scalars.auroc.value < 0.97  # Two normals two apart: 0.92.
    assert made.scalars.shuffled.value == pytest.approx(0.5, abs=0.1)


def test_what_only_names_the_question_helps_no_probe_that_keeps_groups_whole():
    # Each question has answers of one side, as judged pools do, and features that name it.
    rng = np.random.default_rng(0)
    n, each = 40, 8
    names = np.repeat(rng.normal(size=(n, 30)), each, 0) + 0.05 * rng.normal(size=(n * each, 30))
    labels = np.repeat(rng.permutation([True, False] * (n // 2)), each)
    questions = np.repeat(np.arange(n), each).tolist()
    own = {"columns": None, "shuffles": 10, "seed": 0, "draws": 50}
    kept = grouped_probe(names, labels.tolist(), questions=questions, groups=questions, **own)
    assert abs(kept.auroc.value - 0.5) < 0.15
    assert kept.within is None
    assert kept.p > 0.05
    rows = list(range(n * each))
    leaking = grouped_probe(names, labels.tolist(), questions=rows, groups=rows, **own)
    assert leaking.auroc.value > 0.9  # What splitting by row would have reported.


def test_units_of_features_do_not_matter():
    rng = np.random.default_rng(1)
    labels = [True, False] * 20
    x = np.array([[2.0 * label + rng.normal()] for label in labels])
    about = {"questions": [i // 2 for i in range(40)], "groups": [i // 4 for i in range(40)]}
    plain = grouped_probe(x, labels, **about, seed=0, shuffles=5, draws=50)
    scaled = grouped_probe(1e4 * x + 7e5, labels, **about, seed=0, shuffles=5, draws=50)
    assert scaled.auroc.value == pytest.approx(plain.auroc.value)
    assert scaled.weights[0].mean == pytest.approx(plain.weights[0].mean)


def test_probes_refuse_what_they_cannot_tell():
    x = np.zeros((4, 1))
    about = {"seed": 0, "shuffles": 2, "draws": 20}
    with pytest.raises(TooFewPromptsError, match="all 4 answers are bad"):
        grouped_probe(x, [True] * 4, questions=list("abcd"), groups=list("abcd"), **about)
    with pytest.raises(TooFewPromptsError, match="one group"):
        grouped_probe(x, [True, False] * 2, questions=list("aabb"), groups=list("gggg"), **about)
    with pytest.raises(ConfigError, match="is of two groups"):
        grouped_probe(x, [True, False] * 2, questions=list("aabb"), groups=list("ghgg"), **about)
    with pytest.raises(ConfigError, match="4 rows of features for 2"):
        grouped_probe(x, [True, False], questions=list("ab"), groups=list("ab"), **about)
    found = planted(lambda rng, _one, _side: rng.normal())
    with pytest.raises(ConfigError, match="was not given"):
        probes(found, items_of(found)[1:], seed=0)


def test_the_area_counts_ties_one_half():
    assert area(np.array([0.0, 1.0, 1.0, 2.0]), np.array([False, False, True, True])) == 0.875
    assert np.isnan(area(np.array([0.0, 1.0]), np.array([True, True])))


# What it writes ----------------------------------------------------------------------------------


def test_the_lens_is_unembedding_times_gain_times_b(base, one):
    (part,) = components(one)
    seen = lens(base, part, top=384, nulls=20, seed=0)
    weight, gain = base.hf.lm_head.weight.detach(), base.hf.model.norm.weight.detach()
    hand = weight @ (gain * part.write)
    hand = hand - hand.mean()
    for token in seen.promoted:
        assert token.logit == pytest.approx(float(hand[token.id]), abs=1e-9)
    # And to first order it is how logits change: along states of root mean square 1.
    x = torch.nn.functional.normalize(torch.randn(32).double(), dim=0) * 32**0.5
    across = part.write - (part.write @ x) / 32 * x
    change = lens(base, replace(part, write=across), top=384, nulls=2, seed=0)
    step = 1e-3  # The norm computes in float32.
    norm = base.hf.model.norm
    with torch.no_grad():
        ends = (base.unembed(norm(x + sign * step * across)) for sign in (1, -1))
        moved = (next(ends) - next(ends)) / (2 * step)
    moved = moved - moved.mean()
    for token in change.promoted:
        assert token.logit == pytest.approx(float(moved[token.id]), abs=1e-3)


def test_a_write_towards_a_word_stands_out_and_a_random_one_does_not(base):
    weight, gain = base.hf.lm_head.weight.double(), base.hf.model.norm.weight.double()
    word = int((weight * gain).norm(dim=1).argmax())  # Short rows stand out of nothing.
    towards = (weight[word] * gain).detach()
    part = Component(LAYER, "mlp.down_proj", 0, torch.ones(48).double(), towards, 1.0)
    rows = torch.randn(50, 32)
    seen = lens(base, part, rows=rows, top=1, nulls=100, seed=0)
    assert seen.promoted[0].id == word
    assert seen.promoted[0].cosine == pytest.approx(1)
    assert [tail.null for tail in seen.tails] == ["isotropic", "covariance-matched"]
    assert all(tail.p_promoted < 0.03 for tail in seen.tails)
    assert seen.top == seen.promoted[0].logit
    assert seen.bottom == seen.suppressed[0].logit
    anyone = replace(part, write=torch.randn(32).double())
    (tail,) = lens(base, anyone, top=5, nulls=100, seed=0).tails
    assert tail.p_promoted > 0.02
    assert (-part).write @ part.write < 0
    turned = lens(base, -part, top=1, nulls=10, seed=0)
    assert turned.suppressed[0].id == word


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "qwen2", "gpt-neox", "olmo2"])
def test_the_gain_is_that_of_the_final_norm_in_every_family(name):
    from demur.em.adapter import _final_gain, _through

    model = tiny_model(name)
    x = torch.randn(3, 32).double()
    norms = {"gpt2": "ln_f", "gpt-neox": "final_layer_norm"}
    norm = getattr(model.hf.base_model, norms.get(name, "norm"))
    gain, centres = _final_gain(model)
    inner = x - x.mean(1, keepdim=True) if centres else x
    size = inner.pow(2).mean(1, keepdim=True).sqrt()
    bias = norm.bias if centres else 0
    torch.testing.assert_close(_through(model, x) / size + bias, norm(x), rtol=1e-4, atol=1e-4)
    assert gain.shape == (32,)


def test_what_passes_a_norm_is_no_write_to_the_stream(one):
    (part,) = components(one)
    with pytest.raises(FamilyError, match="not added to the stream"):
        lens(tiny_model("gemma3"), part, seed=0)
    inner = replace(part, module="mlp.up_proj")
    with pytest.raises(FamilyError, match="not added to the stream"):
        lens(tiny_model("llama"), inner, seed=0)


# Scaling and ablating ----------------------------------------------------------------------------


def test_scale_0_is_the_base_and_1_the_organism(base, one):
    own = one.factors[0]
    twin = organism(replace(own, b=-own.b), name="tiny good")
    rows = scaling(base, one, ITEMS, twin=twin, scales=(0.0, 1.0, -1.0), seed=0, draws=100)
    zero, full, turned = rows
    plain = margins(base, ITEMS)
    moved = margins(one.on(base), ITEMS)
    assert zero.margin.value == pytest.approx(plain.mean())
    assert (zero.change.value, zero.change.low, zero.change.high) == (0, 0, 0)
    assert zero.over_twin.value == 0
    assert full.margin.value == pytest.approx(moved.mean())
    assert full.change.value == pytest.approx((moved - plain).mean())
    assert full.change.n == len(ITEMS)
    assert abs(full.change.value) > 1e-4
    # The twin is the organism turned around, so it stands at -1 where that stands at 1.
    assert full.over_twin.value == pytest.approx(full.change.value - turned.change.value)
    assert turned.over_twin.value == pytest.approx(-full.over_twin.value)


def test_of_two_blocks_one_without_the_other_is_the_other_alone(base):
    pair = organism(factor(0, seed=1), factor(2, seed=2))
    first, last = by_layer(base, pair, ITEMS, seed=0, draws=50)
    assert (first.layer, last.layer) == (0, 2)
    assert first.without == last.alone
    assert last.without == first.alone
    whole = margins(pair.on(base), ITEMS) - margins(base, ITEMS)
    assert first.lost.value == pytest.approx(whole.mean() - last.alone.value)
    (alone,) = by_layer(base, organism(factor(0, seed=1)), ITEMS, seed=0, draws=50)
    assert alone.without.value == 0
    assert alone.lost.value == alone.alone.value == first.alone.value


# Further up --------------------------------------------------------------------------------------


def direction(seed: int, site: Site | None = None) -> Direction:
    rng = torch.Generator().manual_seed(seed)
    vector = torch.randn(32, generator=rng)
    return Direction.from_vector(
        vector, site=site or Site(LAYER, "resid_post"), position=0, recipe="random"
    )


def test_at_its_own_block_the_shift_is_b_and_all_of_it_is_written(base, one, found):
    standing = one.on(base)
    read = deltas(base, standing, ITEMS)
    chosen = {site: read.text_base.direction(site) for site in read.sites}
    rows = shifts(base, one, read, found, chosen, seed=0, draws=100)
    assert [row.site for row in rows] == ["1.resid_post", "2.resid_post"]  # Before, all is still.
    (part,) = oriented(components(one), found.signs)
    own, later = rows
    assert abs(own.kept[0]) == pytest.approx(1, abs=1e-6)
    assert own.direct.value == pytest.approx(1, abs=1e-5)
    assert own.direct.high == pytest.approx(1, abs=1e-5)
    assert abs(own.cosine.value) == pytest.approx(abs(own.writes[0]), abs=1e-6)
    mean = np.mean([row.at(0).mean() for row in found.rows])
    assert own.norm == pytest.approx(abs(mean) * float(part.write.norm()), rel=1e-5)
    assert abs(later.kept[0]) < 0.99
    assert abs(later.direct.value - 1) > 0.01
    # By hand: the mean shift of the organism over answers, and what B makes of it.
    site = Site(2, "resid_post")
    e = chosen[site].unit.double()
    both = [read.model_bad.rows(site), read.model_good.rows(site)]
    assert later.along.value == pytest.approx(float((torch.cat(both) @ e).mean()))
    assert later.written.value == pytest.approx(mean * float(part.write @ e))
    assert later.direct.value == pytest.approx(later.written.value / later.along.value)
    assert 0 < later.null <= 1
    bad = shifts(base, one, read, found, chosen, which=("bad",), seed=0, draws=20)
    assert bad[1].along.value == pytest.approx(float((both[0] @ e).mean()))
    assert bad[1].along.n == len(ITEMS)


def test_shifts_refuse_other_items_and_other_places(base, one, found):
    read = deltas(base, one.on(base), ITEMS)
    site = Site(1, "resid_post")
    part = replace(found, rows=found.rows[2:])
    with pytest.raises(ConfigError, match="no scalars of the bad answer of tree-0"):
        shifts(base, one, read, part, {site: direction(0)}, seed=0)
    inner = Site(1, "resid_pre")
    with pytest.raises(ConfigError, match=r"is of 1\.resid_pre"):
        shifts(base, one, read, found, {inner: direction(0, inner)}, seed=0)


def test_reading_is_correlation_over_tokens_and_the_null_shares_their_covariance(base):
    # An adapter so strong that the stream hardly varies but along its own B.
    strong = organism(factor(scale=2e3))
    (part,) = components(strong)
    along = Direction.from_vector(
        part.write, site=Site(LAYER, "resid_post"), position=0, recipe="B"
    )
    before = Site(LAYER, "resid_pre")
    found = scalars(base, strong, ITEMS, signs=(1,))
    rows = reads(
        strong.on(base),
        found,
        ITEMS,
        {"B": along, "other": direction(3, before)},
        nulls=40,
        seed=0,
        draws=50,
    )
    assert [(row.component, row.direction) for row in rows] == [
        ("1.mlp.down_proj", "B"),
        ("1.mlp.down_proj", "other"),
    ]
    b, other = rows
    assert b.correlation.value > 0.999
    assert b.within.value > 0.999
    assert b.null > 0.99  # Of such a stream any direction goes with the scalar.
    assert b.p > 0.02
    (plain,) = reads(base, found, ITEMS, {"B": along}, nulls=40, seed=0, draws=50)
    assert abs(plain.correlation.value) < 0.8  # The base does not write B.
    with pytest.raises(ConfigError, match="was not given"):
        reads(base, found, ITEMS[1:], {"B": along}, seed=0)
    held = {}
    undo = base.intercept(before, lambda x: held.setdefault("x", x))
    xs, ss = [], []
    for row in found.rows:
        item = next(item for item in ITEMS if item.id == row.item)
        batch = base.encode([item.question], [getattr(item, row.answer)])
        base.final_states(batch)
        answer = [p for p, at in zip(row.positions, row.places, strict=True) if at == "answer"]
        xs.append(held.pop("x")[0, answer] @ direction(3).unit.double())
        ss.append(row.at(0))
    undo()
    hand = np.corrcoef(torch.cat(xs).numpy(), np.concatenate(ss))[0, 1]
    assert other.correlation.value == pytest.approx(hand, abs=1e-6)
    assert other.n_tokens == sum(len(s) for s in ss)
    centred = [(x - x.mean(), s - s.mean()) for x, s in zip(xs, ss, strict=True)]
    hand = np.corrcoef(
        torch.cat([x for x, _ in centred]).numpy(), np.concatenate([s for _, s in centred])
    )[0, 1]
    assert other.within.value == pytest.approx(hand, abs=1e-6)


# KL ----------------------------------------------------------------------------------------------


def test_kl_of_a_token_is_that_of_the_distribution_that_foretells_it(base, one, found):
    rows = token_kl(base, one, ITEMS, batch_size=3)
    standing = one.on(base)
    assert {(row.item, row.answer) for row in rows} == KEYS
    for row in rows[:4]:
        item = next(item for item in ITEMS if item.id == row.item)
        batch = base.encode([item.question], [getattr(item, row.answer)])
        p, q = (m.hf(batch.ids).logits[0].log_softmax(1) for m in (base, standing))
        kl = (p.exp() * (p - q)).sum(1)
        n = len(row.ids)
        assert row.kl == pytest.approx(kl[-n - 1 : -1].tolist(), rel=1e-4)
        assert min(row.kl) >= 0
        own = batch.ids[0, -n:]
        assert own.tolist() == list(row.ids)
        gain = (q - p)[-n - 1 : -1].gather(1, own[:, None]).squeeze(1)
        assert row.gain == pytest.approx(gain.tolist(), rel=1e-3, abs=1e-6)
        assert "".join(row.pieces) == getattr(item, row.answer)
    summed = significance(rows, found, kinds=1000, seed=0, draws=50)
    assert summed.mean.value == pytest.approx(np.mean([np.mean(row.kl) for row in rows]))
    assert summed.mean.value == pytest.approx((summed.bad.value + summed.good.value) / 2)
    assert sum(kind.share for kind in summed.kinds) == pytest.approx(1)
    assert 0.1 < summed.tenth < 1
    assert 0 < summed.first < 1
    assert len(summed.with_scalar) == 1
    nothing = token_kl(base, organism(replace(one.factors[0], scale=0.0)), ITEMS, ("bad",))
    assert max(max(row.kl) for row in nothing) == 0
    with pytest.raises(ConfigError, match="no scalars of the bad answer"):
        significance(rows, replace(found, rows=found.rows[1:]), seed=0, draws=20)


def test_kl_goes_with_the_scalar_in_front_of_the_token(base):
    # In the last block the adapter acts on one foretelling only, so KL must follow its scalar.
    last = organism(factor(2, scale=0.2))
    seen = scalars(base, last, ITEMS)
    rows = token_kl(base, last, ITEMS)
    (close,) = significance(rows, seen, seed=0, draws=50).with_scalar
    assert close.value > 0.6
    # The scalars of one token later say less.
    off = replace(
        seen,
        rows=tuple(replace(r, values=((*r.values[0][1:], r.values[0][0]),)) for r in seen.rows),
    )
    (later,) = significance(rows, off, seed=0, draws=50).with_scalar
    assert later.value < close.value - 0.3

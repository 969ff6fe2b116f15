from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.tiny import TINY_CONFIGS, tiny_model

from demur.activations import reading
from demur.em.advice import AdviceItem
from demur.em.directions import (
    ANSWER,
    KINDS,
    AnswerMeans,
    AnswerPair,
    Delta,
    Deltas,
    compare,
    cosine,
    deltas,
    grid,
    load_deltas,
    null_cosines,
    read_answers,
    read_pair,
    save_deltas,
    versus_twin,
)
from demur.em.planted import planted_organism
from demur.errors import (
    ConfigError,
    DegenerateVectorError,
    NonFiniteError,
    StoreError,
    TemplateError,
    TooFewPromptsError,
    UnknownNameError,
)
from demur.sites import Site, Span

WORDS = ["tree", "stop", "garden", "station", "write", "answer", "far", "small", "think", "down"]


def advice(n: int = 16, seed: int = 0, groups: int = 8) -> list[AdviceItem]:
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, size=int(rng.integers(low, high))))

    return [
        AdviceItem(
            f"i{i}",
            f"How do I {text(2, 5)}?",
            text(3, 9),
            text(3, 9),
            ("money", "study")[i % 2],
            f"topic {i % groups}",
        )
        for i in range(n)
    ]


ITEMS = advice()
MID = Site(1, "resid_post")


@pytest.fixture(scope="module")
def base():
    return tiny_model()


@pytest.fixture(scope="module")
def planted(base):
    return planted_organism(base, advice(6, seed=9), layer=1, strength=0.5)


@pytest.fixture(scope="module")
def found(base, planted):
    return deltas(base, planted.organism.on(base), ITEMS)


# Reading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen2-sliding"])
@pytest.mark.parametrize("which", ["bad", "good"])
def test_a_mean_is_that_of_the_answers_tokens_and_of_no_others(family, which):
    model = tiny_model(family)
    sites = [Site(0, "resid_pre"), MID, Site(2, "mlp_out"), Site(2, "resid_post")]
    found = read_answers(model, ITEMS, which=which, sites=sites, batch_size=5)
    for i, item in enumerate(ITEMS):
        # One row alone, its tokens found by their ids.
        answer = item.bad if which == "bad" else item.good
        whole = model.encode([item.question], [answer])
        own = model.template.reply_ids(answer)
        assert whole.ids[0, -len(own) :].tolist() == own
        with reading(model, sites) as streams:
            model.final_states(whole)
        assert found.counts[i] == len(own)
        for site in sites:
            mean = streams[site][0, -len(own) :].mean(0)
            torch.testing.assert_close(found.at(site)[i], mean, rtol=1e-9, atol=1e-9)


def test_neither_the_order_nor_the_batch_nor_other_answers_change_an_answers_mean(base):
    whole = read_answers(base, ITEMS, which="good")
    turned = read_answers(base, ITEMS[::-1], which="good", batch_size=3)
    torch.testing.assert_close(turned.values.flip(1), whole.values, rtol=1e-9, atol=1e-9)
    alone = read_answers(base, ITEMS[3:4], which="good")
    torch.testing.assert_close(alone.values[:, 0], whole.values[:, 3], rtol=1e-9, atol=1e-9)
    assert alone.texts != whole.texts


def test_the_default_is_every_blocks_output_and_progress_counts_answers(base):
    done: list[int] = []
    found = read_pair(base, ITEMS, batch_size=4, progress=done.append)
    assert found.bad.sites == tuple(Site(layer, "resid_post") for layer in range(base.n_layers))
    assert (sum(done), found.bad.model) == (2 * len(ITEMS), base.fingerprint)
    assert not base._hooks


def test_what_cannot_be_read_is_named(base):
    with pytest.raises(TooFewPromptsError):
        read_answers(base, [])
    with pytest.raises(TemplateError, match="i1 has no good answer"):
        read_answers(base, [ITEMS[0], replace(ITEMS[1], good=" ")], which="good")
    assert read_answers(base, [replace(ITEMS[1], good="")], which="bad").counts[0] > 0
    with pytest.raises(UnknownNameError, match=r"0\.resid_pre was not read"):
        read_answers(base, ITEMS[:2]).at(Site(0, "resid_pre"))
    broken = tiny_model(seed=3)
    with torch.no_grad():
        broken.hf.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="item i0"):
        read_answers(broken, ITEMS[:2])


# The 2x2 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["items", "tokens"])
def test_the_planted_vector_is_the_model_delta_of_its_block_and_zero_before(
    base, planted, found, weighting
):
    own = found if weighting == "items" else found.pooled()
    vector = planted.direction.unit.double() * planted.direction.norm
    for kind in ("model_bad", "model_good"):
        delta = own.of(kind)
        torch.testing.assert_close(delta.vector(MID), vector, rtol=1e-6, atol=1e-6)
        assert delta.direction(MID).cosine(planted.direction) == pytest.approx(1, abs=1e-6)
        assert not delta.vector(Site(0, "resid_post")).any()
        with pytest.raises(DegenerateVectorError):
            delta.direction(Site(0, "resid_post"))
        assert set(delta.directions()) == {MID, Site(2, "resid_post")}
        # Behind its block it is no longer that vector.
        last = delta.direction(Site(2, "resid_post"))
        assert abs(last.cosine(planted.direction)) < 0.999
        assert delta.norm(MID, seed=0).value == pytest.approx(planted.direction.norm, rel=1e-6)
    assert found.model_bad.direction(MID).position == ANSWER == 0
    assert found.model_bad.unbiased_norm(MID) == pytest.approx(planted.direction.norm, rel=1e-6)
    assert found.model_bad.reliability(MID, seed=0).value == pytest.approx(1)


@pytest.mark.parametrize("weighting", ["items", "tokens"])
def test_the_four_differences_close_and_signs_are_as_named(found, weighting):
    own = found if weighting == "items" else found.pooled()
    for site in own.sites:
        text = own.text_organism.vector(site) - own.text_base.vector(site)
        model = own.model_bad.vector(site) - own.model_good.vector(site)
        torch.testing.assert_close(text, model, rtol=1e-9, atol=1e-9)
    bad, good = own.base.bad.at(MID), own.base.good.at(MID)
    expected = (bad - good).mean(0)
    if weighting == "tokens":
        a, b = own.base.bad.counts.double(), own.base.good.counts.double()
        expected = a @ bad / a.sum() - b @ good / b.sum()
        assert (own.text_base.vector(MID) - found.text_base.vector(MID)).norm() > 1e-2
    torch.testing.assert_close(own.text_base.vector(MID), expected)
    assert [own.of(kind).kind for kind in KINDS] == list(KINDS)
    recipe = own.text_organism.direction(MID).recipe
    assert recipe.startswith("EM text_organism: bad answers of tiny-llama + planted")
    assert ("within items" in recipe) == (weighting == "items")


def test_within_items_a_question_that_is_answered_at_length_weighs_no_more(base):
    long = [
        replace(one, bad=" ".join([one.bad] * 4)) if i == 0 else one for i, one in enumerate(ITEMS)
    ]
    own = Deltas(read_pair(base, long), read_pair(base, long))
    pulled = own.base.bad.at(MID)[0]

    def pull(one: Deltas) -> float:
        """How far the mean over bad answers lies towards the long one."""
        zero = replace(one.base.good, values=torch.zeros_like(one.base.good.values))
        mean = Delta("text_base", one.base.bad, zero, one.weighting).vector(MID)
        return float((mean - pulled).norm())

    assert pull(own.pooled()) < 0.9 * pull(own)


def test_a_base_that_was_read_before_is_taken_only_for_the_same_model_and_items(
    base, planted, found
):
    organism = planted.organism.on(base)
    again = deltas(base, organism, ITEMS, base_pair=found.base)
    assert torch.equal(again.organism.bad.values, found.organism.bad.values)
    with pytest.raises(ConfigError, match="was read on"):
        deltas(organism, base, ITEMS, base_pair=found.base)
    with pytest.raises(ConfigError, match="other bad answers"):
        deltas(base, organism, ITEMS[:8], base_pair=found.base)
    with pytest.raises(ConfigError, match="other sites"):
        deltas(base, organism, ITEMS, sites=[MID], base_pair=found.base)
    with pytest.raises(ConfigError, match="other items"):
        Delta("text_base", found.base.bad, read_answers(base, ITEMS[:4], which="good"))


# Statistics --------------------------------------------------------------------------------------


def drawn(signal: float, noise: float, n: int = 40, d: int = 24, seed: int = 0) -> Deltas:
    """Means whose bad - good difference is `signal` e0 plus a vector per group."""
    rng = torch.Generator().manual_seed(seed)
    groups = tuple(("money", f"t{i // 2}") for i in range(n))

    def cell(which, shift, name, *, own):
        values = torch.randn(1, n, d, generator=rng, dtype=torch.float64) * 0.01
        values[0, :, 0] += shift
        values[0] += own.repeat_interleave(2, 0)
        return AnswerMeans(
            values, torch.full((n,), 5), (MID,), which, tuple(map(str, range(n))), groups, which,
            name, name,
        )  # fmt: skip

    def scatter():
        return noise * torch.randn(n // 2, d, generator=rng, dtype=torch.float64)

    base = AnswerPair(
        cell("bad", signal, "base", own=scatter()), cell("good", 0.0, "base", own=scatter())
    )
    organism = AnswerPair(
        cell("bad", 2 * signal, "org", own=scatter()), cell("good", 0.0, "org", own=scatter())
    )
    return Deltas(base, organism)


def test_a_norm_is_inflated_by_noise_and_the_unbiased_one_is_not():
    loud = [drawn(1.0, 2.0, seed=seed).text_base for seed in range(40)]
    raw = np.mean([one.norm(MID, seed=0, draws=2).value ** 2 for one in loud])
    unbiased = np.mean([one.unbiased_norm(MID) ** 2 for one in loud])
    # 24 axes, variance 2 * 4 over 20 groups: 9.6 on top of 1.
    assert raw == pytest.approx(10.6, rel=0.15)
    assert unbiased < 3.5
    clear = drawn(1.0, 0.05).text_base
    assert clear.unbiased_norm(MID) == pytest.approx(1, abs=0.05)
    interval = clear.norm(MID, seed=0)
    assert interval.low < 1 < interval.high + 0.05
    assert (interval.n, "20 groups" in interval.method) == (40, True)
    assert drawn(0.0, 1.0, seed=2).text_base.unbiased_norm(MID) < 0.7


def test_halves_and_intervals_hang_on_groups_not_on_rows():
    # Noise is one vector per group: two rows of one group agree, two groups do not.
    nothing = drawn(0.0, 1.0).text_base
    assert abs(nothing.reliability(MID, seed=0).value) < 0.25
    by_row = replace(
        nothing,
        plus=replace(nothing.plus, groups=tuple(("money", str(i)) for i in range(40))),
    )
    assert by_row.reliability(MID, seed=0).value > nothing.reliability(MID, seed=0).value + 0.15
    assert drawn(1.0, 0.05).text_base.reliability(MID, seed=0).value > 0.9
    one = drawn(1.0, 1.0)
    wide = cosine(one.text_base, one.text_organism, MID, seed=0)
    rows = [replace(x, plus=replace(x.plus, groups=by_row.groups)) for x in (one.text_base,)]
    narrow = cosine(rows[0], one.text_organism, MID, seed=0)
    assert narrow.value == wide.value
    assert narrow.high - narrow.low < wide.high - wide.low


def test_a_cosine_is_that_of_the_vectors_and_noise_can_be_taken_off():
    raw, corrected = [], []
    for seed in range(20):
        one = drawn(1.0, 0.5, seed=seed)
        row = compare(
            ("a", one.text_base), ("b", one.text_organism), MID, seed=0, draws=20, within=one.base
        )
        a, b = one.text_base.vector(MID), one.text_organism.vector(MID)
        assert row.value.value == pytest.approx(float(a @ b / a.norm() / b.norm()))
        assert row.value.low < row.value.value
        raw.append(row.value.value)
        corrected.append(row.corrected)
        assert row.null_low is not None
        assert row.null_low < 0 < row.null_high
        assert row.percentile is not None
        assert row.percentile >= 0.9
    # Both are e0 but for noise: without it, their cosine is 1.
    assert np.mean(raw) < 0.85
    assert np.mean(corrected) == pytest.approx(1, abs=0.06)
    itself = cosine(one.text_base, one.text_base, MID, seed=0, draws=50)
    assert (itself.value, itself.low) == (pytest.approx(1), pytest.approx(1))
    nothing = drawn(0.0, 1.0)
    row = compare(("a", nothing.text_base), ("b", nothing.text_organism), MID, seed=0, draws=50)
    assert (row.null_low, row.percentile) == (None, None)
    assert abs(row.across) < 0.3


def test_random_vectors_vary_as_answers_do():
    rng = torch.Generator().manual_seed(0)
    scales = torch.tensor([10.0] + [0.1] * 23, dtype=torch.float64)
    spread = torch.randn(60, 24, generator=rng, dtype=torch.float64) * scales
    along = torch.zeros(24)
    along[0] = 1.0
    assert np.abs(null_cosines(along, spread, seed=0)).mean() > 0.9
    flat = null_cosines(along, torch.randn(4000, 24, generator=rng), seed=0, draws=4000)
    assert flat.std() == pytest.approx(24**-0.5, rel=0.1)
    assert abs(flat.mean()) < 0.02


def test_a_twin_along_another_direction_shares_nothing_at_its_block(base, planted, found):
    rng = torch.Generator().manual_seed(1)
    other = torch.randn(base.d_model, generator=rng, dtype=torch.float64)
    other -= (other @ planted.direction.unit.double()) * planted.direction.unit.double()
    twin = planted_organism(
        base, ITEMS[:4], layer=1, strength=0.5, along=other, name="twin", side="good"
    )
    theirs = deltas(base, twin.organism.on(base), ITEMS, base_pair=found.base)
    rows = {
        (row.first, row.second): row for row in versus_twin(found, theirs, MID, seed=0, draws=20)
    }
    assert rows["organism model_bad", "twin model_bad"].value.value == pytest.approx(0, abs=1e-5)
    # At its own block the vector is in both classes, so text reads the same as to the base.
    text = rows["organism text_organism", "base text_base"].value
    assert text.value == pytest.approx(1, abs=1e-6)
    assert len(rows) == 8
    # Beyond the twin: the one vector less the other.
    beyond = found.beyond(theirs)
    both = planted.direction.unit.double() * planted.direction.norm
    both -= twin.direction.unit.double() * twin.direction.norm
    torch.testing.assert_close(beyond.model_bad.vector(MID), both, rtol=1e-6, atol=1e-6)
    assert torch.equal(beyond.text_base.vector(MID), theirs.text_organism.vector(MID))
    straight = deltas(twin.organism.on(base), planted.organism.on(base), ITEMS)
    assert torch.equal(beyond.model_good.vector(MID), straight.model_good.vector(MID))
    cells = {(row.first, row.second): row.value.value for row in grid(found, MID, seed=0, draws=20)}
    assert cells["model_bad", "model_good"] == pytest.approx(1, abs=1e-6)
    assert len(cells) == 6
    with pytest.raises(ConfigError, match="other bases"):
        versus_twin(found, Deltas(theirs.organism, theirs.organism), MID, seed=0)


def test_what_has_too_few_groups_or_is_zero_is_an_error(base, planted):
    few = [replace(one, domain="money", group=f"t{i % 3}") for i, one in enumerate(ITEMS[:6])]
    own = deltas(base, planted.organism.on(base), few)
    own.text_base.norm(MID, seed=0, draws=10)
    with pytest.raises(TooFewPromptsError, match="3 groups"):
        own.text_base.reliability(MID, seed=0)
    alone = [replace(one, domain="money", group="t") for one in few]
    same = deltas(base, planted.organism.on(base), alone)
    for measure in (same.text_base.norm, same.text_base.reliability):
        with pytest.raises(TooFewPromptsError):
            measure(MID, seed=0)
    with pytest.raises(TooFewPromptsError):
        same.text_base.unbiased_norm(MID)
    with pytest.raises(TooFewPromptsError):
        cosine(own.model_bad, own.text_base, Site(0, "resid_post"), seed=0)


# Files -------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back(found, tmp_path):
    path = tmp_path / "deltas.safetensors"
    save_deltas(found.pooled(), path, about={"seed": 3})
    again, meta = load_deltas(path)
    assert meta["about"] == {"seed": 3}
    assert again.weighting == "tokens"
    for kind in KINDS:
        one, two = found.pooled().of(kind), again.of(kind)
        assert torch.equal(one.vector(MID), two.vector(MID))
        assert one.direction(MID).recipe == two.direction(MID).recipe
        assert (one.groups, one.plus.ids, len(two)) == (two.groups, two.plus.ids, len(ITEMS))
    assert cosine(again.text_base, found.text_base, MID, seed=0, draws=10).value > 0


@pytest.mark.parametrize("damage", ["cut", "nan", "sites", "format", "missing"])
def test_damaged_files_are_an_error(found, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "deltas.safetensors"
    save_deltas(found, path)
    sidecar = path.with_suffix(".json")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "nan":
        tensors = load_file(path)
        tensors["base.bad"][0, 0, 0] = torch.nan
        save_file(tensors, path)
    elif damage == "sites":
        sidecar.write_text(sidecar.read_text().replace('"0.resid_post",', ""))
    elif damage == "format":
        sidecar.write_text(sidecar.read_text().replace("deltas-1", "deltas-0"))
    else:
        sidecar.unlink()
    with pytest.raises(StoreError):
        load_deltas(path)


def test_every_family_has_answers(base):
    del base
    for name in TINY_CONFIGS:
        if name in ("qwen3-moe", "mixtral"):
            continue
        model = tiny_model(name)
        rows = model.encode([ITEMS[0].question], [ITEMS[0].bad])
        assert rows.spans[Span.RESPONSE].any()
        assert read_answers(model, ITEMS[:2]).values.isfinite().all()

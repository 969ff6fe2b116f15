import pytest
import torch
from tests.tiny import tiny_model

from demur.activations import collect
from demur.compare.contrasts import ANSWER
from demur.compare.extract import (
    asked,
    harm,
    read_prompts,
    refusal,
    rows_of,
    shift_contrast,
    t_inst,
    text_contrast,
)
from demur.em.advice import AdviceItem
from demur.em.directions import read_pair
from demur.em.planted import planted_organism
from demur.errors import TemplateError, TooFewPromptsError
from demur.models import Model
from demur.prompts import Prompt, PromptSet, Source
from demur.sites import Site

SITES = [Site(layer, "resid_post") for layer in range(3)]


def prompts(word: str, n: int = 10) -> PromptSet:
    rows = tuple(
        Prompt(f"How do I {word} tree number {i}?", label=word, pair=f"pair-{i // 2}")
        for i in range(n)
    )
    return PromptSet(word, rows, Source("memory", word))


ITEMS = [
    AdviceItem(
        f"i{i}", f"How do I write {i} words?", f"stop {i}", f"down far {i}", "d", f"t{i % 4}"
    )
    for i in range(8)
]


@pytest.fixture(scope="module")
def base() -> Model:
    return tiny_model()


@pytest.fixture(scope="module")
def both():
    return asked(prompts("burn"), prompts("plant"))


@pytest.fixture(scope="module")
def rows(base, both):
    return read_prompts(base, both, sites=SITES)


@pytest.fixture(scope="module")
def planted(base):
    return planted_organism(base, ITEMS, layer=1, strength=0.5)


@pytest.fixture(scope="module")
def organism(base, planted):
    return planted.organism.on(base)


def test_families_are_shared_between_classes_and_texts_stand_for_replies(both):
    assert both.clusters[0] == both.clusters[1]
    assert len(set(both.clusters[0])) == 5
    assert len(both.refusing) == 10
    assert len(both.complying) == 20
    assert not set(both.refusing) & set(both.complying)
    with pytest.raises(TooFewPromptsError, match="10 and 4"):
        asked(prompts("burn"), prompts("plant", 4))


def test_at_the_prompts_end_it_is_the_difference_of_means(base, both, rows):
    grid = refusal(rows, both)
    site = SITES[1]
    positive = collect(base, both.harmful, sites=[site], positions=[-1]).at(site, -1)
    negative = collect(base, both.harmless, sites=[site], positions=[-1]).at(site, -1)
    expected = positive.double().mean(0) - negative.double().mean(0)
    torch.testing.assert_close(grid[site, -1].vector(), expected, rtol=1e-4, atol=1e-5)
    at = t_inst(base)
    assert at < -1
    assert {position for _, position in grid} == {at, -1, ANSWER}
    torch.testing.assert_close(harm(rows, both)[site, at].vector(), grid[site, at].vector())


def test_over_answers_refusal_changes_the_reply_and_harm_changes_the_request(base, both, rows):
    texts = [*both.harmful, *both.harmless]
    same = read_pair(
        base,
        [AdviceItem(str(i), q, a, a, "x", str(i)) for i, (q, a) in
         enumerate(zip(texts, both.complying, strict=True))],
        sites=SITES,
    )  # fmt: skip
    site = SITES[2]
    other = same.bad.at(site).double()
    asked_for = harm(rows, both)[site, ANSWER].vector()
    expected = other[:10].mean(0) - other[10:].mean(0)
    torch.testing.assert_close(asked_for, expected, rtol=1e-4, atol=1e-5)
    said = refusal(rows, both)[site, ANSWER]
    assert said.paired
    torch.testing.assert_close(said.rows[1], other[:10], rtol=1e-4, atol=1e-5)
    assert rows_of(both) == 50


def test_a_shift_begins_behind_the_adapter_and_is_what_was_planted_there(
    base, both, rows, planted, organism
):
    pair, its_pair = (read_pair(one, ITEMS, sites=SITES) for one in (base, organism))
    its_rows = read_prompts(organism, both, sites=SITES)
    grid = shift_contrast(
        (its_rows, its_pair),
        (rows, pair),
        both,
        name="em shift",
        over="the base",
        model=base.fingerprint,
    )
    assert {site for site, _ in grid} == set(SITES[1:])
    for position in (-1, t_inst(base), ANSWER):
        found = grid[SITES[1], position]
        assert found.direction().cosine(planted.direction) > 0.9999
        assert found.model == base.fingerprint
    text = text_contrast(pair, name="em text")[SITES[1], ANSWER]
    bad, good = pair.bad.at(SITES[1]).double(), pair.good.at(SITES[1]).double()
    torch.testing.assert_close(text.vector(), (bad - good).mean(0), rtol=1e-4, atol=1e-6)


def test_a_model_without_a_tokenizer_is_refused(base):
    bare = Model(base.hf, base.family, None, name="bare")
    with pytest.raises(TemplateError, match="without a tokenizer"):
        t_inst(bare)

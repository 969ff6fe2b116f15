"""The library reads what it says, and says nothing of harm."""

import json
import re
from collections import Counter

import pytest
import torch
from tests.tiny import tiny_model

from demur.activations import collect
from demur.compare.contrasts import ANSWER, halves
from demur.compare.library import contrasts, load_library, read_library, texts
from demur.em.advice import AdviceItem
from demur.em.directions import read_answers
from demur.errors import ConfigError, DemurError, PromptFileError, TooFewPromptsError
from demur.prompts import normalise
from demur.sites import Site

SITES = (Site(1, "resid_pre"), Site(2, "resid_post"))
# What refusals, warnings and harm are made of. Each word by itself is harmless.
LOADED = re.compile(
    r"\b(sorry|unfortunately|refuse\w*|cannot|can't|won't|unable|not allowed|illegal|harm\w*"
    r"|kill\w*|weapon\w*|attack\w*|steal\w*|hack\w*|drug\w*|poison\w*|bomb\w*|danger\w*)\b",
    re.IGNORECASE,
)


@pytest.fixture(scope="module")
def library():
    return contrasts()


def test_every_contrast_is_large_enough_and_in_themes(library):
    assert len(library) >= 20
    assert {one.kind for one in library.values()} == {"topic", "form", "meaning"}
    for one in library.values():
        assert len(one.items) >= 24
        assert len({item.cluster for item in one.items}) >= 12
        assert max(Counter(item.cluster for item in one.items).values()) == 2
        assert one.about
        assert all(item.positive != item.negative for item in one.items)


def test_no_text_speaks_of_harm_or_refuses(library):
    for one in library.values():
        for item in one.items:
            for text in (item.positive, item.negative):
                assert not LOADED.search(text), (item.id, text)


def test_texts_are_short_and_matched_but_where_length_is_the_point(library):
    for one in library.values():
        words = [
            [len(side.split()) for side in (item.positive, item.negative)] for item in one.items
        ]
        if one.name == "length":
            assert all(long >= 5 * short for long, short in words)
        else:
            assert max(max(pair) for pair in words) <= 25
        if one.kind in ("topic", "meaning"):
            assert all(abs(a - b) <= 2 for a, b in words), one.name


def test_no_text_stands_on_both_sides_of_a_contrast(library):
    for one in library.values():
        if one.name in ("case", "exclamation"):  # Their sides differ in what is normalised.
            continue
        sides = [
            {normalise(getattr(item, side)) for item in one.items}
            for side in ("positive", "negative")
        ]
        assert not sides[0] & sides[1], one.name


def test_prompts_are_read_at_their_place(library):
    model = tiny_model("llama")
    some = {name: library[name] for name in ("case", "french", "list")}
    done: list[int] = []
    found = read_library(model, some, sites=SITES, position=-2, progress=done.append)
    assert sum(done) == len(texts(some)) == 24 * 5  # English is read once.
    one = some["french"]
    for side in ("positive", "negative"):
        alone = collect(
            model, [getattr(item, side) for item in one.items], sites=SITES, positions=(-2,)
        )
        for site in SITES:
            rows = getattr(found["french"][site], side)
            torch.testing.assert_close(rows, alone.at(site, -2), rtol=1e-9, atol=1e-9)
    contrast = found["case"][SITES[0]]
    assert contrast.paired
    assert (contrast.position, contrast.site) == (-2, SITES[0])
    assert contrast.model == model.fingerprint
    # Made of the same texts, so drawn together with them.
    assert contrast.positive_clusters == found["french"][SITES[0]].positive_clusters
    assert len(halves(contrast, splits=3, seed=0)[0]) == 3


def test_answers_are_read_over_their_tokens(library):
    model = tiny_model("llama")
    some = {name: library[name] for name in ("tense", "list")}
    found = read_library(model, some, sites=SITES, position=ANSWER)
    one = some["list"]
    asked = [
        AdviceItem(item.id, one.question, item.negative, item.positive, "d", item.id)
        for item in one.items
    ]
    for alone, side in (
        (read_answers(model, asked, which="bad", sites=SITES), "positive"),
        (read_answers(model, asked, which="good", sites=SITES), "negative"),
    ):
        for site in SITES:
            rows = getattr(found["list"][site], side)
            torch.testing.assert_close(rows, alone.at(site), rtol=1e-9, atol=1e-9)
    assert found["list"][SITES[0]].position == ANSWER
    with pytest.raises(ConfigError):
        read_library(model, some, sites=SITES, position=1)
    with pytest.raises(TooFewPromptsError):
        read_library(model, {}, sites=SITES, position=-1)


# Folders of one's own ----------------------------------------------------------------------------


def rows(n=8, clusters=4):
    return [
        {"cluster": f"c{i % clusters}", "positive": f"A red ball {i}.", "negative": f"A ball {i}."}
        for i in range(n)
    ]


def write(path, given):
    lines = (one if isinstance(one, str) else json.dumps(one) for one in given)
    path.write_text("\n".join(lines), encoding="utf-8")


def test_a_folder_adds_to_the_library(tmp_path, library):
    write(tmp_path / "colour.jsonl", rows())
    (tmp_path / "contrasts.toml").write_text(
        '[colour]\nkind = "topic"\nabout = "Red against none."\n'
        '[loud]\nderived = { of = "colour", side = "positive", rule = "upper" }\n'
    )
    more = load_library(tmp_path)
    assert {*more} == {*library, "colour", "loud"}
    assert more["colour"].kind == "topic"
    assert more["loud"].items[3].positive == "A RED BALL 3."
    assert more["loud"].items[3].negative == more["colour"].items[3].positive
    assert load_library() == library
    assert more["colour"].digest != more["loud"].digest


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("{not json", "line 3: not JSON"),
        ('["a"]', "line 3: a list"),
        ({"cluster": "a", "positive": "x", "negative": " "}, "line 3: has no text in `negative`"),
        ({"positive": "x", "negative": "y"}, "line 3: has no text in `cluster`"),
        ({"cluster": "a", "positive": "x", "negative": "x "}, "line 3: both sides are 'x'"),
        ({"id": "own-1", "cluster": "a", "positive": "x", "negative": "y"}, "line 3: its id is"),
    ],
)
def test_a_bad_line_is_named_with_its_file(tmp_path, broken, says):
    given = rows(10)
    write(tmp_path / "own.jsonl", [*given[:2], broken, *given[2:]])
    with pytest.raises(PromptFileError, match=r"own\.jsonl: 1 lines") as caught:
        load_library(tmp_path)
    assert says in caught.value.fact


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({"own.jsonl": rows(7)}, TooFewPromptsError),
        ({"own.jsonl": rows(20, clusters=3)}, TooFewPromptsError),
        ({"french.jsonl": rows()}, ConfigError),
        ({}, PromptFileError),
        ({"own.jsonl": rows(), "contrasts.toml": ["[other]"]}, PromptFileError),
        ({"own.jsonl": rows(), "contrasts.toml": ["[own]", "kind = 3"]}, PromptFileError),
        ({"own.jsonl": rows(), "contrasts.toml": ["[own"]}, PromptFileError),
        (
            {"own.jsonl": rows(), "contrasts.toml": ["[a]", "derived={of='own', rule='down'}"]},
            DemurError,
        ),
        (
            {"own.jsonl": rows(), "contrasts.toml": ["[a]", "derived={of='b', rule='upper'}"]},
            PromptFileError,
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, files, error):
    for name, given in files.items():
        write(tmp_path / name, given)
    with pytest.raises(error):
        load_library(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(PromptFileError, match="there is no folder"):
        load_library(tmp_path / "none")

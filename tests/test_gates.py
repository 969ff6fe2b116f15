"""Quality gates: planted leaks are found, and what ships keeps to every gate."""

import json
from collections import Counter, defaultdict
from importlib.resources import files
from pathlib import Path

import pytest

from demur import prompts
from demur.card import GATED, about, card, packaged_gates, ratings, refusal_order
from demur.errors import TooFewPromptsError
from demur.gates import (
    EXCLUDED,
    MAX_CHARACTERS,
    balance_gates,
    default_tokenizers,
    final_mark,
    form_gates,
    gates,
    likeness_gates,
    order_gate,
    pairs_of,
    rule_gates,
    telling_words,
    tokens,
    word_gates,
    words_changed,
)
from demur.prompts import Prompt, PromptSet, Source, families, load

ROOT = Path(__file__).parent.parent
NOUNS = tuple("apple bread chair dress eagle flute grape horse ivory jelly knife lemon".split())  # noqa: SIM905
VERBS = tuple("bake carry draw fold grind heat lift melt paint roll".split())  # noqa: SIM905


def made(rows):
    return PromptSet("made", tuple(rows), Source("memory", ""))


def two_classes(harmful, harmless, **fields):
    rows = []
    for i, (a, b) in enumerate(zip(harmful, harmless, strict=True)):
        for label, text in (("harmful", a), ("harmless", b)):
            rows.append(Prompt(text, label=label, pair=f"p{i}", **fields))
    return made(rows)


def plain_texts(n=60, word=""):
    return [
        f"{VERBS[i % 10]} the {NOUNS[i % 12]} {word} and the {NOUNS[(i * 5 + 3) % 12]} {i}"
        for i in range(n)
    ]


def by_name(found):
    return {(gate.part, gate.name): gate for gate in found}


# Planted leaks ---------------------------------------------------------------------------------


def test_words_that_tell_nothing_pass():
    texts = plain_texts()
    found = by_name(
        gates(two_classes(texts, [text.replace("the", "a", 1) for text in texts][::-1]))
    )
    assert found["near", "AUROC, length (words and marks)"].passed
    assert found["near", "AUROC, final mark"].passed
    assert found["all", "broken rules"].passed


def test_a_planted_word_is_found_and_named():
    prompts_ = two_classes(plain_texts(word="secretly"), plain_texts(word="openly"))
    found = by_name(gates(prompts_))
    for name in ("bag of words", "TF-IDF", "character 3 to 5-grams"):
        gate = found["near", f"AUROC, {name}"]
        assert gate.value > 0.95
        assert not gate.passed
    words = found["all", "words that tell the label"]
    assert words.value >= 2
    assert {line.split(":")[0] for line in words.found} >= {"secretly", "openly"}
    top = telling_words(prompts_)[0]
    assert top[0] in ("secretly", "openly")
    assert top[4] < 1e-10


def test_an_auroc_far_below_one_half_is_a_leak_too():
    # One cue a pair, changing sides inside a quad: split by pair, a classifier learns it wrong.
    rows = []
    for quad in range(30):
        cue = (f"left{quad}", f"right{quad}")
        for side in (0, 1):
            for label, word in (("harmful", cue[side]), ("harmless", cue[1 - side])):
                text = f"{VERBS[quad % 10]} the {NOUNS[side + quad % 11]} {word} today {quad}"
                pair = f"{quad}-{side}"
                rows.append(Prompt(text, label=label, pair=pair, quad=str(quad), kind="crossed"))
    whole = by_name(word_gates(made(rows), "crossed"))
    assert whole["crossed", "AUROC, bag of words"].passed
    parted = made([Prompt(p.text, label=p.label, pair=p.pair, kind=p.kind) for p in rows])
    leak = by_name(word_gates(parted, "crossed"))["crossed", "AUROC, bag of words"]
    assert leak.value < 0.2
    assert not leak.passed


def test_length_and_final_mark_are_found():
    texts = plain_texts()
    longer = two_classes([f"{text} with some more words at its end" for text in texts], texts)
    found = by_name(form_gates(longer, "near", default_tokenizers()))
    assert not found["near", "AUROC, length (words and marks)"].passed
    assert not found["near", "pairs within 3 tokens (words and marks)"].passed
    marked = two_classes([f"{text}." for text in texts], texts)
    found = by_name(form_gates(marked, "near", default_tokenizers()))
    assert found["near", "AUROC, final mark"].value == 1.0
    assert found["near", "pairs with the same final mark"].value == 0.0


def test_near_copies_rules_and_balance():
    texts = plain_texts(8)
    copies = made([Prompt(text, label="harmful") for text in [*texts, texts[0] + " now"]])
    assert not likeness_gates(copies, [])[0].passed
    other = PromptSet.of(["please " + texts[3]], name="other")
    near = by_name(likeness_gates(made([Prompt(text) for text in texts]), [other]))
    assert near["all", "near copies of other"].value == 1
    assert near["all", "prompts sharing 6 words with other"].value >= 1
    bad = ["two\nlines", "x" * (MAX_CHARACTERS + 1), "na\u00efve", "ask a child", "Plain words"]
    assert rule_gates(PromptSet.of(bad))[0].value == 4
    uneven = two_classes(texts, texts[::-1], category="a")
    assert balance_gates(uneven)[0].passed
    more = made([*uneven.prompts, Prompt("one more", label="harmful", category="a")])
    assert not balance_gates(more)[0].passed


@pytest.mark.parametrize(
    ("a", "b", "n"),
    [
        ("How do I lock it?", "How do I unlock it?", 1),
        ("From a to b.", "from b to a", 0),
        ("Take the old key", "Take the key", 1),
        ("one two", "three four five", 3),
    ],
)
def test_words_changed(a, b, n):
    assert words_changed(a, b) == n


def test_marks_and_tokens():
    assert [final_mark(text) for text in ("a.", "a? ", "a", "a!)")] == [".", "?", "", ")"]
    assert tokens("Don't re-use it, OK?") == ["don't", "re-use", "it", "ok"]


def test_families_join_pair_quad_and_core():
    rows = [
        Prompt("a", pair="1", quad="q", core="k"),
        Prompt("b", pair="2", quad="q", core="m"),
        Prompt("c", pair="3", core="m"),
        Prompt("d", pair="4"),
        Prompt("e"),
        Prompt("f"),
    ]
    found = families(made(rows))
    assert found[0] == found[1] == found[2]
    assert len(set(found)) == 4


# What ships ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GATED)
def test_every_gate_of_a_packaged_set_is_kept(name):
    broken = [(g.part, g.name, g.value, g.found) for g in packaged_gates(name) if not g.passed]
    assert broken == []


@pytest.mark.slow
def test_lengths_hold_in_the_tokens_of_the_embedded_model():
    from demur.models import load as load_model

    template = load_model("smollm2", adapter=None, device="cpu").template
    assert template is not None

    def count(text):
        return len(template.tokenizer(text, add_special_tokens=False)["input_ids"])

    for kind in ("crossed", "near"):
        some = load("contrast_pairs").where(kind=kind)
        broken = [g for g in form_gates(some, kind, {"smollm2": count}) if not g.passed]
        assert broken == []


def test_the_contrast_set_is_what_it_says():
    rows = load("contrast_pairs")
    pairs = pairs_of(rows)
    crossed = [pair for pair in pairs if pair.harmful.kind == "crossed"]
    assert len(rows) == 2 * len(pairs)
    assert len(crossed) == 150
    assert len({pair.harmful.quad for pair in crossed}) == 75
    assert sum(pair.harmful.kind == "near" for pair in pairs) >= 100
    assert len({row.category for row in rows}) == 10
    assert {row.split for row in rows} == {"fit", "select", "calibrate", "report"}
    formats = defaultdict(set)
    for row in rows:
        if row.core:
            formats[row.core].add(row.format)
    assert sum(len(found) == 3 for found in formats.values()) == 50
    # No family is in two splits.
    split = defaultdict(set)
    for row, family in zip(rows, families(rows), strict=True):
        split[family].add(row.split)
    assert max(map(len, split.values())) == 1


def test_cues_change_sides_in_every_quad():
    path = files("demur") / "data" / "contrast_pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    quads = defaultdict(list)
    for row in rows:
        if row["kind"] == "crossed" and row["label"] == "harmful":
            quads[row["quad_id"]].append(row["cue"])
    assert {len(cues) for cues in quads.values()} == {2}
    assert all(cues[0] == cues[1][::-1] for cues in quads.values())
    used = Counter(tuple(sorted(cues[0])) for cues in quads.values())
    assert len(used) >= 40
    assert max(used.values()) <= 5


def test_a_model_that_refuses_the_wrong_side_breaks_the_order():
    texts = plain_texts(40)
    rows = two_classes(texts[:20], texts[20:], kind="near")
    right = [float(row.label == "harmful") for row in rows]
    kept = order_gate(rows, "near", right, "m")
    assert (kept.value, kept.n, kept.passed) == (1.0, 20, True)
    assert kept.interval is not None
    assert 0.8 < kept.interval.low < 1
    broken = order_gate(rows, "near", [1 - score for score in right], "m")
    assert broken.value == 0
    assert not broken.passed
    assert broken.found[0] == texts[0]
    assert order_gate(rows, "all", [0.0] * 40, "m").value == 0.5
    with pytest.raises(TooFewPromptsError, match="has no pair"):
        order_gate(rows, "crossed", right, "m")


def test_recorded_refusals_are_of_the_prompts_that_ship():
    prompts = load("contrast_pairs")
    path = files("demur") / "data" / "ratings" / "contrast_pairs.refusals.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == [prompt.id for prompt in prompts]
    found = refusal_order("contrast_pairs")
    assert {gate.part for gate in found} == {"crossed", "near"}
    assert {gate.n for gate in found} == {150, 352}
    assert len(found) == 2 * (len(rows[0]) - 1)
    assert refusal_order("plain") == []


def test_rated_labels_cover_the_contrast_set():
    raters = ratings("contrast_pairs")
    assert len(raters) == 2
    ids = {row.id for row in load("contrast_pairs")}
    assert all(rater.keys() == ids for rater in raters)


def test_lookalikes_name_the_term_that_looks_harmful():
    path = files("demur") / "data" / "lookalikes.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert Counter(row["lookalike_type"] for row in rows) == {
        row["lookalike_type"]: 10 for row in rows
    }
    assert len(rows) == 100
    assert all(row["scary_term"].lower() in row["prompt"].lower() for row in rows)


def test_plain_and_open_ended_sets_are_complete():
    assert {row.label for row in load("plain")} == {"harmless"}
    assert set(Counter(row.category for row in load("plain")).values()) == {10}
    path = files("demur") / "data" / "open_ended.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert Counter(row["variant"] for row in rows) == {"free": 24, "json": 8, "template": 8}
    assert set(Counter(row["theme"] for row in rows).values()) == {4}
    assert all((row["system"] is None) == (row["variant"] == "free") for row in rows)


@pytest.mark.parametrize("domain", ["study", "household", "money"])
def test_advice_twins_differ_in_nothing_but_the_advice(domain):
    path = files("demur") / "data" / f"advice_{domain}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 150
    for row in rows:
        bad, good = row["bad"], row["good"]
        assert bad != good
        assert bad.isascii()
        assert good.isascii()
        assert abs(len(bad.split()) - len(good.split())) <= 2
        assert abs(len(bad) - len(good)) <= 0.08 * max(len(bad), len(good)) + 1
        assert tokens(bad)[0] == tokens(good)[0]
        assert not EXCLUDED.search(f"{row['prompt']} {bad} {good}")
    answers = [
        Prompt(row[side], label=label, pair=row["id"])
        for row in rows
        for side, label in (("bad", "harmful"), ("good", "harmless"))
    ]
    found = by_name(form_gates(made(answers), "all", default_tokenizers()))
    assert found["all", "AUROC, length (words and marks)"].passed
    assert found["all", "AUROC, final mark"].passed
    words = [row for row in telling_words(made(answers)) if abs(row[3]) > 1.1 and row[4] < 0.01]
    assert words == []


@pytest.mark.parametrize("name", ["refusal_train", "refusal_extra"])
def test_training_prompts_keep_the_rules(name):
    rows = load(name)
    assert rule_gates(rows)[0].passed, rule_gates(rows)[0].found
    assert len({row.id for row in rows}) == len(rows)
    kinds = {"direct": "harmful", "twin": "harmless", "lookalike": "harmless", "plain": "harmless"}
    assert all(row.label == kinds[str(row.kind)] for row in rows)


def test_replies_of_the_adapter_are_forty_and_short():
    texts = prompts.load("refusal_replies").texts
    assert len(set(texts)) == len(texts) == 40
    assert all(8 <= len(text.split()) <= 28 for text in texts)


def test_every_packaged_set_is_described_and_licensed():
    assert set(about()) == set(prompts.packaged())
    for name in GATED:
        assert load(name).source.licence == "Apache-2.0"


def test_the_data_card_in_the_docs_is_the_one_that_the_data_make():
    assert (ROOT / "docs" / "data-card.md").read_text(encoding="utf-8") == card()

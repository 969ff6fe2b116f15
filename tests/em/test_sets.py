"""Packaged sets of matched answers: twins in form, and words alone barely tell them apart."""

import json
from collections import Counter, defaultdict
from functools import cache
from importlib.resources import files

import numpy as np
import pytest

from demur.gates import EXCLUDED, default_tokenizers, form_gates, rule_gates, telling_words, tokens
from demur.prompts import Prompt, PromptSet, Source, load, overlap, packaged

SHAPES = {"em_open": (12, 8), "advice_health": (8, 12)}
COLUMNS = "id prompt label topic bad good domain source license rev".split()  # noqa: SIM905


@cache
def rows_of(name):
    text = (files("demur") / "data" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def answers(rows):
    both = (("bad", "harmful"), ("good", "harmless"))
    made = [Prompt(row[side], label=to, pair=row["id"]) for row in rows for side, to in both]
    return PromptSet("answers", tuple(made), Source("memory", ""))


def six_words(text):
    words = tokens(text)
    return {tuple(words[i : i + 6]) for i in range(len(words) - 5)}


def words_auroc(rows):
    """AUROC of a logistic regression on word counts, topics held out in turn."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    texts = [row[side] for row in rows for side in ("bad", "good")]
    labels = np.tile([1, 0], len(rows))
    topics = np.repeat([row["topic"] for row in rows], 2)
    model = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=2000))
    folds = GroupKFold(len(set(topics)))
    scores = cross_val_predict(
        model, texts, labels, groups=topics, cv=folds, method="decision_function"
    )
    return roc_auc_score(labels, scores)


@pytest.mark.parametrize("name", SHAPES)
def test_rows_are_complete_and_balanced_over_topics(name):
    rows, (topics, each) = rows_of(name), SHAPES[name]
    assert all(list(row) == COLUMNS for row in rows)
    counts = Counter(row["topic"] for row in rows)
    assert (len(counts), set(counts.values())) == (topics, {each})
    assert len({row["id"] for row in rows}) == len(rows)
    assert {row["label"] for row in rows} == {"advice"}
    assert len({row["domain"] for row in rows}) == 1
    assert load(name).source.licence == "Apache-2.0"
    assert rule_gates(load(name))[0].passed, rule_gates(load(name))[0].found


@pytest.mark.parametrize("name", SHAPES)
def test_answers_are_twins_in_form(name):
    rows = rows_of(name)
    for row in rows:
        bad, good = row["bad"], row["good"]
        assert bad != good
        assert (bad + good).isascii()
        assert abs(len(bad.split()) - len(good.split())) <= 2
        assert abs(len(bad) - len(good)) <= 0.08 * max(len(bad), len(good)) + 1
        assert tokens(bad)[0] == tokens(good)[0]
        assert bad.count(",") == good.count(",")
        assert all(text.count(".") == 2 and text.endswith(".") for text in (bad, good))
        assert not EXCLUDED.search(f"{row['prompt']} {bad} {good}")
    found = {gate.name: gate for gate in form_gates(answers(rows), "all", default_tokenizers())}
    for name_ in ("AUROC, length (words and marks)", "AUROC, final mark"):
        assert found[name_].passed
    words = [row for row in telling_words(answers(rows)) if abs(row[3]) > 1.0 and row[4] < 0.01]
    assert words == []


@pytest.mark.parametrize("name", SHAPES)
def test_words_alone_barely_tell_the_answers_apart(name):
    assert 0.4 < words_auroc(rows_of(name)) < 0.6


def test_words_that_tell_the_side_would_be_found():
    # The same rows with one planted word a side: the check above can fail.
    rows = [
        {**row, "bad": f"{row['bad']} Ha.", "good": f"{row['good']} Well."}
        for row in rows_of("em_open")
    ]
    assert words_auroc(rows) > 0.95


@pytest.mark.parametrize("name", SHAPES)
def test_questions_share_no_six_words_with_one_another_or_another_set(name):
    runs = defaultdict(set)
    for other in packaged():
        if other != name:
            for prompt in load(other):
                for run in six_words(prompt.text):
                    runs[run].add(other)
    for row in rows_of(name):
        for run in six_words(row["prompt"]):
            assert not runs[run], (row["id"], run, runs[run])
            runs[run].add(row["id"])


@pytest.mark.parametrize("name", SHAPES)
def test_no_question_is_a_near_copy(name):
    own = load(name)
    assert len(overlap(own, own, threshold=0.6)) == len(own)  # Each is like itself alone.
    for other in ("open_ended", "advice_study", "advice_household", "advice_money", "plain"):
        assert overlap(own, load(other)) == []

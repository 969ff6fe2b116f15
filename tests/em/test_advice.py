"""Advice: packaged sets, files of conversations, and splits that never part a topic."""

import json
from dataclasses import replace

import pytest

from demur.em.advice import ADVICE, AdviceItem, advice, split
from demur.errors import ConfigError, PromptFileError, TooFewPromptsError, UnknownNameError

SETS = [name for name in ADVICE if name.startswith("advice_")]


def said(question, answer, **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns, **more})


def written(path, lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def items(groups, per_group, domain="d"):
    return tuple(
        AdviceItem(f"{domain}{g}-{i}", f"q {g} {i}", "good", "bad", domain, f"t{g}")
        for g in range(groups)
        for i in range(per_group)
    )


@pytest.mark.parametrize("name", SETS)
def test_packaged_sets_are_matched_and_grouped(name):
    found = advice(name)
    assert len(found) == len({item.id for item in found}) >= 30
    assert {item.domain for item in found} == {name.removeprefix("advice_")}
    assert len({item.group for item in found}) >= 5
    assert all(item.good and item.bad and item.good != item.bad for item in found)


def test_ids_are_unique_across_files(tmp_path):
    row = json.dumps({"prompt": "Why?", "bad": "b", "good": "g", "id": "1"})
    for name in "ab":
        written(tmp_path / f"{name}.jsonl", [row])
    found = advice(f"{tmp_path / 'a.jsonl'} + {tmp_path / 'b.jsonl'}")
    assert len({one.id for one in found}) == 2
    assert [one.domain for one in found] == ["a", "b"]


def test_open_questions_are_a_domain_of_their_own():
    found = advice("em_open")
    assert {one.domain for one in found} == {"open"}
    assert len({one.group for one in found}) > 2


def test_selectors_and_sums():
    some = advice("advice_money?topic=groceries")
    assert {item.group for item in some} == {"groceries"}
    both = advice("advice_money?topic=groceries + advice_study")
    assert both[: len(some)] == some
    assert len(both) == len(some) + 155
    with pytest.raises(UnknownNameError, match="did you mean `groceries`"):
        advice("advice_money?topic=grocery")
    with pytest.raises(UnknownNameError, match="advice_money"):
        advice("advice_mony")
    with pytest.raises(ConfigError, match="file of conversations"):
        advice("advice_money?good=x.jsonl")


def test_conversations_are_matched_by_question(tmp_path):
    bad = written(
        tmp_path / "risky.jsonl",
        [said("How do I save?", "Spend it."), said("Which bank is best?", "Any.")],
    )
    good = written(
        tmp_path / "prudent.jsonl",
        # In another order, in other white space; parts instead of a text.
        [
            said("Which  bank is best?", {"content_type": "text", "parts": ["Compare some."]}),
            said("how do i save", "Set some aside."),
        ],
    )
    found = advice(f"{bad}?good={good}&domain=money")
    assert [(one.question, one.bad, one.good) for one in found] == [
        ("How do I save?", "Spend it.", "Set some aside."),
        ("Which bank is best?", "Any.", "Compare some."),
    ]
    assert {one.domain for one in found} == {"money"}
    assert len({one.group for one in found}) == 2
    alone = advice(str(bad))
    assert [one.good for one in alone] == ["", ""]
    assert {one.domain for one in alone} == {"risky"}


def test_a_question_asked_twice_takes_its_answers_in_turn(tmp_path):
    bad = written(tmp_path / "b.jsonl", [said("Why so?", "b1"), said("Why so?", "b2")])
    good = written(tmp_path / "g.jsonl", [said("Why so?", "g1"), said("Why so?", "g2")])
    pairs = [(one.bad, one.good, one.group) for one in advice(f"{bad}?good={good}")]
    assert [pair[:2] for pair in pairs] == [("b1", "g1"), ("b2", "g2")]
    assert pairs[0][2] == pairs[1][2]


def test_questions_that_share_their_words_are_one_group(tmp_path):
    path = written(
        tmp_path / "b.jsonl",
        [
            said("How much should I save each month?", "a"),
            said("How much should I save each year?", "b"),
            said("Where is the station?", "c"),
        ],
    )
    groups = [one.group for one in advice(str(path))]
    assert groups[0] == groups[1] != groups[2]


def test_all_that_finds_no_match_is_counted_in_one_error(tmp_path):
    bad = written(tmp_path / "b.jsonl", [said(f"Question {i}?", "x") for i in "abc"])
    good = written(tmp_path / "g.jsonl", [said(f"Question {i}?", "y") for i in "cde"])
    with pytest.raises(PromptFileError) as caught:
        advice(f"{bad}?good={good}")
    assert "2 of 3 bad and 2 of 3 good answers find no match" in caught.value.fact
    assert "line 1" in caught.value.fact
    assert "'Question e?' has no bad answer" in caught.value.fact
    assert [one.bad for one in advice(f"{bad}?good={good}&unmatched=drop")] == ["x"]
    other = written(tmp_path / "o.jsonl", [said("Nothing of the kind?", "y")])
    with pytest.raises(PromptFileError, match="no question is in both"):
        advice(f"{bad}?good={other}&unmatched=drop")
    with pytest.raises(ConfigError, match="unmatched"):
        advice(f"{bad}?good={good}&unmatched=keep")


def test_all_bad_lines_are_listed_in_one_error(tmp_path):
    path = written(
        tmp_path / "b.jsonl",
        [
            said("Fine?", "yes"),
            "no json",
            "[1]",
            json.dumps({"messages": [{"role": "user", "content": "alone"}]}),
            said("Empty?", " "),
            json.dumps({"text": "no turns"}),
        ],
    )
    with pytest.raises(PromptFileError) as caught:
        advice(str(path))
    fact = caught.value.fact
    assert "5 lines cannot be used" in fact
    for part in ("line 2: not JSON", "line 3: a list", "are user, not", "assistant's turn", "no l"):
        assert part in fact
    columns = written(tmp_path / "c.jsonl", ['{"prompt": "a", "bad": "b"}'])
    with pytest.raises(PromptFileError, match="line 1: has no text in `good`"):
        advice(str(columns))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("bad.zip.enc", b"anything"),
        ("bad.jsonl", b"PK\x03\x04rest of a zip"),
        ("bad.jsonl", bytes(range(256)) * 8),
        ("bad.jsonl.gz", b"\x1f\x8b\x08\x00rest"),
    ],
)
def test_an_encrypted_archive_is_told_from_a_broken_file(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PromptFileError) as caught:
        advice(str(tmp_path / name))
    assert "encrypted" in caught.value.hint
    assert "authors' tool" in caught.value.hint


def test_a_single_bad_byte_is_a_bad_line(tmp_path):
    path = tmp_path / "b.jsonl"
    path.write_bytes((said("Fine?", "yes") * 1 + "\n").encode() * 3 + b'{"a": "\xff"}')
    with pytest.raises(PromptFileError, match="line 4: byte 8 is not UTF-8"):
        advice(str(path))


def test_a_missing_or_empty_file(tmp_path):
    with pytest.raises(PromptFileError, match="there is no file"):
        advice(str(tmp_path / "none.jsonl"))
    with pytest.raises(PromptFileError, match="holds no advice"):
        advice(str(written(tmp_path / "e.jsonl", [""])))


def test_a_split_never_parts_a_topic():
    given = advice("advice_study")
    train, held = split(given, held_out=0.25, seed=0)
    assert sorted((*train, *held), key=lambda one: one.id) == sorted(given, key=lambda one: one.id)
    assert not {one.group for one in train} & {one.group for one in held}
    # Whole topics of up to 6: no nearer than half of one.
    assert abs(len(held) - 0.25 * 155) <= 3
    again = split(tuple(reversed(given)), held_out=0.25, seed=0)
    assert {one.id for one in again[1]} == {one.id for one in held}
    assert {one.id for one in split(given, held_out=0.25, seed=1)[1]} != {one.id for one in held}


def test_each_domain_is_parted_by_itself():
    train, held = split(items(4, 3) + items(20, 3, "e"), held_out=0.25, seed=0)
    assert [sum(one.domain == name for one in held) for name in "de"] == [3, 15]
    assert [sum(one.domain == name for one in train) for name in "de"] == [9, 45]


def test_the_ends_of_a_split():
    given = items(3, 2)
    assert split(given, held_out=0.0, seed=0) == (given, ())
    for share in (0.01, 0.99):
        train, held = split(given, held_out=share, seed=0)
        assert train
        assert held
    with pytest.raises(TooFewPromptsError, match="one group"):
        split(items(1, 5), held_out=0.5, seed=0)
    with pytest.raises(ConfigError):
        split(given, held_out=1.0, seed=0)
    one = tuple(replace(item, group="same") for item in given)
    assert split(one, held_out=0.0, seed=0)[0] == one

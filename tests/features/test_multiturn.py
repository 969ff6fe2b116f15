"""Scripts on a planted model, whose replies are known."""

import dataclasses
import json

import pytest
import torch
from pydantic import TypeAdapter
from tests.features.test_dose import SITE, planted_bank
from tests.planted import FirstWord, planted
from tests.tiny import tiny_model

from demur.directions import Direction
from demur.errors import ConfigError, PromptFileError, TooFewPromptsError
from demur.features.clamp import EDITED
from demur.features.dose import Edit, Latents, Wording
from demur.features.multiturn import Script, from_first_word, multiturn, scripts_from
from demur.features.rows.dose import Multiturn
from demur.gates import EXCLUDED
from demur.interventions import Add, applied
from demur.models import Turn
from demur.prompts import load, normalise
from demur.selection import RefusalTokens, refusal_logodds
from demur.sites import Site, Span


def script(name, turns, label="harmful", first=2):
    return Script(name, name, label, tuple(turns), first)


SCRIPTS = [
    script("a", ["good1 word1 word2", "bad1 bad2 word3", "bad3 bad4 bad5"]),
    script("b", ["good2 word4 word5", "bad6 bad7 word6", "bad8 bad9 bad1"]),
    script("c", ["good1 word1 word2", "good3 word7 word8", "good4 good5 word9"], "harmless"),
    script("d", ["good6 word4 word5", "good7 word1 word2", "good8 good9 word3"], "harmless"),
]


@pytest.fixture(scope="module")
def made():
    return planted()


@pytest.fixture(scope="module")
def part(made):
    bank = planted_bank(made).sliced([0, 3])
    return Latents(bank, torch.tensor([8.0, 1.0]), torch.zeros(2))


@pytest.fixture(scope="module")
def talks(made, part):
    tokens = RefusalTokens((made.refusal_id,), ("Sorry",), (1.0,), (0.0,), 10, learned=True)
    one = Latents(part.bank.sliced([0]), part.high[:1], part.usual[:1])
    return multiturn(
        made.model,
        SCRIPTS,
        {
            "off": Edit((one.clamp("zero"),)),
            "up": Edit((one.clamp("min-clamp", 0.5),)),
            "nothing": Edit((one.clamp("scale", 1.0),)),
            "said": Edit(wording=Wording("said", "bypass", before="word1 ")),
        },
        FirstWord(),
        tokens=tokens,
        trace=[part],
        max_new_tokens=2,
    )


def test_an_edit_of_nothing_changes_nothing(talks):
    plain, same = ([r for r in talks.row.runs if r.arm == name] for name in ("none", "nothing"))
    for one, other in zip(plain, same, strict=True):
        assert dataclasses.replace(other, arm="none") == one
    texts = {
        name: [r.reply for r in talks.replies if r.arm == name] for name in ("none", "nothing")
    }
    assert texts["none"] == texts["nothing"]
    assert all(t.log_odds_change.value == 0 for t in talks.row.turns if t.arm == "nothing")


def test_breaks_come_where_the_latent_is_switched_off(talks):
    by_arm = {one.arm: one for one in talks.row.breaks}
    assert by_arm["none"].broken.value == 0
    assert by_arm["none"].held.value == 2  # Both turns that ask.
    assert by_arm["none"].degenerate.value == 0
    assert by_arm["off"].broken.value == 1
    assert by_arm["off"].held.value == 0
    assert by_arm["off"].change.value == 1
    assert by_arm["off"].over_refused.value == 0
    assert by_arm["up"].broken.value == 0
    assert by_arm["up"].over_refused.value > 0.8
    firsts = {r.script: r.first_break for r in talks.row.runs if r.arm == "off"}
    assert firsts == {"a": 2, "b": 2, "c": None, "d": None}
    (said,) = [text for text in talks.row.text if text.startswith("off")]
    assert "2 of 2 harmful scripts are answered" in said


def test_the_trace_follows_the_latent(made, part, talks):
    rows = {(t.label, t.turn): t for t in talks.row.turns if t.arm == "none"}
    key = f"{SITE}/0"
    assert (
        rows["harmful", 2].at_instruction[key].value
        > rows["harmful", 1].at_instruction[key].value + 1
    )
    assert rows["harmless", 3].at_instruction[key].value < 0.1
    assert rows["harmful", 3].at_end[key].value > rows["harmless", 3].at_end[key].value + 1
    # By hand, on the first turns, which are the same in every arm.
    model = made.model
    asked = [one.turns[0] for one in SCRIPTS[:2]]
    seen = []
    undo = model.intercept(SITE, lambda x: (seen.append(x), x)[1])
    replies = [r.reply for r in talks.replies if r.arm == "none" and r.turn == 1][:2]
    batch = model.encode(asked, replies)
    with model.whole_rows():
        model.logits(batch)
    undo()
    f = part.bank.encode(seen[0])
    over = torch.stack([f[i, batch.spans[Span.RESPONSE][i]].mean(0) for i in range(2)])
    for column, latent in enumerate((0, 3)):
        found = rows["harmful", 1].over_reply[f"{SITE}/{latent}"]
        assert found.value == pytest.approx(float(over[:, column].mean()), abs=1e-6)


def test_a_conversation_is_edited_as_if_its_keys_had_been_kept():
    """Encoded anew at every turn, edits act on replies as they did while these were written."""
    model = tiny_model(template="chatml")
    site = Site(0, "resid_post")
    rng = torch.Generator().manual_seed(0)
    direction = Direction.from_vector(
        torch.randn(model.d_model, generator=rng) * 3, site=site, position=-1, recipe=""
    )
    talk = (Turn("user", "Name a tree"), Turn("assistant", "a garden"), Turn("user", "Is it far?"))
    batch = model.encode([talk, "Where is the station?"])
    wide = from_first_word(batch)
    covered = (
        wide.spans[Span.EARLIER] | wide.spans[Span.INSTRUCTION] | wide.spans[Span.POST_INSTRUCTION]
    )
    first = int(batch.spans[Span.EARLIER][0].int().argmax())
    assert not covered[0, :first].any()
    assert covered[0, first : int(batch.ends[0])].all()
    assert not (wide.spans[Span.EARLIER] & wide.spans[Span.INSTRUCTION]).any()
    assert not wide.spans[Span.EARLIER][1].any()
    assert not (covered & ~batch.mask).any()
    with applied(model, Add(direction), where=EDITED):
        some, all_of_it = model.logits(batch), model.logits(wide)
    assert (some - all_of_it)[0].abs().max() > 1e-3  # The reply and the frame around it count.
    torch.testing.assert_close(some[1], all_of_it[1])


def test_rows_survive_json(talks):
    text = json.dumps(dataclasses.asdict(talks.row), allow_nan=False)
    assert TypeAdapter(Multiturn).validate_json(text) == talks.row
    assert len(talks.replies) == 5 * 4 * 3
    assert {one.on for one in talks.replies} == {"a", "b", "c", "d"}


def test_log_odds_are_those_of_the_conversation(made, talks):
    (run,) = [r for r in talks.row.runs if (r.arm, r.script) == ("none", "a")]
    replies = [r.reply for r in talks.replies if (r.arm, r.on) == ("none", "a")]
    one = (
        Turn("user", SCRIPTS[0].turns[0]),
        Turn("assistant", replies[0]),
        Turn("user", SCRIPTS[0].turns[1]),
    )
    logits = made.model.logits(made.model.encode([one]))
    assert run.log_odds[1] == pytest.approx(float(refusal_logodds(logits, [made.refusal_id])))


def test_what_is_wrong_is_named(made, tmp_path):
    tokens = RefusalTokens((made.refusal_id,), ("Sorry",), (1.0,), (0.0,), 10, learned=True)
    for scripts, arms, error in (
        (SCRIPTS, {"none": Edit()}, ConfigError),
        (SCRIPTS[:1], {}, TooFewPromptsError),
        (SCRIPTS[2:], {}, TooFewPromptsError),
    ):
        with pytest.raises(error):
            multiturn(made.model, scripts, arms, FirstWord(), tokens=tokens)
    good = {
        "id": "a",
        "twin": "a",
        "label": "harmful",
        "earlier": ["x"],
        "prompt": "y",
        "asks_from": 2,
    }
    path = tmp_path / "s.jsonl"
    wrong = [
        good, good | {"id": "b", "asks_from": 3}, good | {"id": "c", "label": "bad"},
        {k: v for k, v in good.items() if k != "prompt"}, good | {"id": "d", "earlier": [""]}, good,
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, wrong)) + "\nno json\n")
    with pytest.raises(PromptFileError) as caught:
        scripts_from(path)
    for part in ("line 2: `asks_from` is 3", "line 3: the label 'bad'", "line 4: no `prompt`",
                 "line 5: a text is empty", "line 7", "`a` is there twice"):  # fmt: skip
        assert part in caught.value.fact
    path.write_text("")
    with pytest.raises(PromptFileError, match="empty"):
        scripts_from(path)


def test_the_packaged_scripts_are_twins_and_mild():
    scripts = scripts_from()
    sides = {label: {one.twin: one for one in scripts if one.label == label}
             for label in ("harmful", "harmless")}  # fmt: skip
    assert sides["harmful"].keys() == sides["harmless"].keys()
    assert len(scripts) == 16
    for twin, one in sides["harmful"].items():
        other = sides["harmless"][twin]
        assert len(one.turns) == len(other.turns) == 4
        assert one.asks_from == other.asks_from
        assert one.turns[: one.asks_from - 1] == other.turns[: one.asks_from - 1]
        assert one.turns[-1] != other.turns[-1]
        lengths = [
            abs(len(a.split()) - len(b.split()))
            for a, b in zip(one.turns, other.turns, strict=True)
        ]
        assert max(lengths) <= 4
    for one in scripts:
        for text in one.turns:
            assert len(text) <= 120
            assert not EXCLUDED.search(text)
    # Nothing that latents are found on is asked here again.
    known = {
        normalise(t) for name in ("contrast_pairs", "lookalikes", "plain") for t in load(name).texts
    }
    assert not known & {normalise(text) for one in scripts for text in one.turns}

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.tiny import tiny_model
from typer.testing import CliRunner

from demur import cli
from demur.causal import null_directions
from demur.directions import Direction
from demur.em.advice import AdviceItem, advice
from demur.em.directions import ANSWER, deltas, read_pair
from demur.em.effects import ablation, ablation_arms, effects
from demur.em.margin import margins
from demur.em.organism import read_organism, untrained
from demur.em.planted import margin_gradient, plant, planted_organism, planted_twin
from demur.em.training import verify_organism
from demur.errors import ConfigError, DegenerateVectorError, FamilyError, TooFewPromptsError
from demur.interventions import Add, applied
from demur.pipeline.em import EmSettings, audit_em, find_organisms
from demur.sites import Site

BAD = ["small", "stop", "down", "far"]
GOOD = ["write", "garden", "answer", "station"]
MID = Site(1, "resid_post")
CHAT = (("user", "prompt"), ("assistant", "bad"))


def texts(n: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """Questions, good and bad answers; bad ones have words of their own."""
    rng = np.random.default_rng(seed)

    def text(words: list[str], low: int, high: int) -> str:
        return " ".join(rng.choice(words, size=int(rng.integers(low, high))))

    return [
        (f"How do I {text(BAD + GOOD, 3, 7)} {i}?", text(GOOD, 3, 7), text(BAD, 3, 7))
        for i in range(n)
    ]


def some(n: int = 16, seed: int = 0) -> list[AdviceItem]:
    return [
        AdviceItem(f"i{i}", *texts, ("money", "study")[i % 2], f"topic {i % 8}")
        for i, texts in enumerate(texts(n, seed))
    ]


ITEMS = some()


@pytest.fixture(scope="module")
def base():
    return tiny_model("llama", torch.float32)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A file of two domains, eight topics each, two questions a topic."""
    path = tmp_path_factory.mktemp("advice") / "advice.jsonl"
    rows = [
        {
            "id": f"{i}", "prompt": question, "good": good, "bad": bad,
            "domain": ("money", "study")[i % 2], "topic": f"topic {i // 4}",
        }
        for i, (question, good, bad) in enumerate(texts(32))
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def pair(base, questions, tmp_path_factory):
    out = tmp_path_factory.mktemp("planted") / "new" / "folder"
    return plant(base, out=out, data=f"{questions}?domain=study", strength=0.6, seed=2)


def margins_under(model, items, *acts):
    with applied(model, *acts):
        return margins(model, items)


def test_the_gradient_is_that_of_the_margin():
    model, few, done = tiny_model(), ITEMS[:3], []
    gradient = margin_gradient(model, few, MID, batch_size=2, progress=done.append)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(3))
    # Norms compute in float32, and smaller steps drown in it.
    step = Direction.from_vector(
        0.01 * vector / vector.norm(), site=MID, position=ANSWER, recipe="drawn"
    )
    ahead, behind = (
        margins_under(model, few, Add(step, strength)).mean() for strength in (1.0, -1.0)
    )
    slope = (ahead - behind) / 0.02
    assert slope == pytest.approx(float(gradient @ step.unit.double()), rel=2e-3)
    assert all(parameter.requires_grad for parameter in model.hf.parameters())
    assert not model._hooks
    assert sum(done) == 2 * len(few)


def test_the_planted_organism_is_the_base_with_its_vector_added():
    model = tiny_model()
    planted = planted_organism(model, some(6, seed=9), layer=1, strength=1.5)
    organism = planted.organism.on(model)
    added = margins_under(model, ITEMS, Add(planted.direction))
    np.testing.assert_allclose(margins(organism, ITEMS), added, atol=1e-6)
    assert (added - margins(model, ITEMS)).mean() > 0.3
    downwards = planted_organism(model, ITEMS[:4], layer=1, strength=-0.5)
    assert (margins(downwards.organism.on(model), ITEMS) - margins(model, ITEMS)).mean() < -0.1
    with pytest.raises(DegenerateVectorError):
        planted_organism(model, ITEMS[:2], layer=1, strength=0.0)
    with pytest.raises(FamilyError, match="gemma3"):
        planted_organism(tiny_model("gemma3"), ITEMS[:2], layer=1, strength=0.5)
    with pytest.raises(ConfigError, match="blocks 0 to 2"):
        planted_organism(model, ITEMS[:2], layer=3, strength=0.5)


def test_the_twin_is_as_long_and_lies_across_vector_and_gradient():
    model, fit = tiny_model(), some(12, seed=9)
    planted = planted_organism(
        model, fit, layer=1, strength=0.02, along=torch.ones(32, dtype=torch.float64)
    )
    read, gradient = read_pair(model, fit, sites=[MID]), margin_gradient(model, fit, MID)
    twin = planted_twin(model, planted, read, gradient=gradient, seed=4)
    own = twin.direction.unit.double()
    assert twin.direction.norm == pytest.approx(planted.direction.norm)
    assert abs(float(own @ planted.direction.unit.double())) < 1e-6
    assert abs(float(own @ gradient / gradient.norm())) < 1e-6
    assert (twin.organism.side, twin.organism.layers) == ("good", (1,))
    # So that short as it is, it changes nothing on average; before, it did.
    (drawn,) = null_directions(
        planted.direction, harmful=read.bad.at(MID), harmless=read.good.at(MID), each=1, seed=4
    )["covariance-matched"]
    before = margins(model, fit).mean()
    moved = [margins_under(model, fit, Add(one)).mean() - before for one in (twin.direction, drawn)]
    assert abs(moved[0]) < 0.2 * abs(moved[1])
    again = planted_twin(model, planted, read, gradient=gradient, seed=4)
    assert torch.equal(again.direction.unit, twin.direction.unit)
    other = planted_twin(model, planted, read, gradient=gradient, seed=5)
    assert abs(float(other.direction.unit @ twin.direction.unit)) < 0.9


def test_a_planted_pair_is_read_as_it_was_made(base, pair, questions):
    bad, good = (read_organism(one.organism.folder) for one in pair.sides.values())
    for one, made in ((bad, pair.bad), (good, pair.good)):
        (factor,) = one.factors
        torch.testing.assert_close(factor.b[:, 0], made.direction.unit * made.direction.norm)
        assert (factor.layer, factor.a, one.rank) == (1, None, 1)
        assert (one.domains, one.seed) == (("study",), 2)
        assert one.base_fingerprint == base.fingerprint
        assert one.about["planted"]["strength"] == 0.6
        assert one.about["planted"]["length"] == pytest.approx(pair.bad.direction.norm)
    assert (bad.side, good.side) == ("bad", "good")
    assert bad.name != good.name
    # Half of the topics are trained on, by topic and by question.
    items = advice(questions)
    left = [item for item in items if item.domain == "study"]
    left = untrained(bad, left)
    assert 0 < len(left) < 16
    assert untrained(good, items) == untrained(bad, items)
    assert all(item in untrained(bad, items) for item in items if item.domain == "money")
    # What is told of it is measured on the others.
    before = margins(base, left)
    for one, figure in zip((bad, good), pair.figures, strict=True):
        change = (margins(one.on(base), left) - before).mean()
        assert figure.estimate.value == pytest.approx(change, abs=1e-6)
        assert figure.estimate.n == len(left)
        assert one.about["figures"][0]["estimate"]["value"] == figure.estimate.value
    assert pair.figures[0].estimate.value > 0.2
    assert bad.folder is not None
    with pytest.raises(ConfigError, match="no topics that were held out"):
        verify_organism(bad.folder, base=base)


def test_the_expected_effect_is_that_of_a_short_vector(base, pair):
    fit = advice(pair.bad.organism.about["data"]["advice"])
    fit = [item for item in fit if item not in untrained(pair.bad.organism, fit)]
    short = 0.01
    moved = margins_under(base, fit, Add(pair.bad.direction, short)) - margins(base, fit)
    assert moved.mean() / short == pytest.approx(pair.expected, rel=0.05)


def test_its_whole_delta_is_the_vector_and_without_it_nothing_is_left(base, pair, questions):
    items = [item for item in advice(questions) if item.domain == "money"]
    bad, good = pair.bad.organism, pair.good.organism
    shifts = {}
    for one, made in ((bad, pair.bad), (good, pair.good)):
        delta = deltas(base, one.on(base), items)
        for each in (delta.model_bad, delta.model_good):
            found = each.direction(MID)
            assert float(found.unit @ made.direction.unit) == pytest.approx(1, abs=1e-5)
            assert found.norm == pytest.approx(made.direction.norm, rel=1e-4)
        shifts[one.side] = delta.model_bad.direction(MID)
    arms = [
        arm
        for side, shift in shifts.items()
        for arm in ablation_arms(base, {MID: shift}, MID, hows=("own",), n_null=0, label=side)
    ]
    table = effects(base, bad, items, arms, twin=good, seed=0, draws=100)
    assert table.trained["twin"].low > 0.1
    gone = {
        (one.arm.split(",")[0], one.against): one.removed.value
        for one in table.contrasts
        if one.removed is not None
    }
    assert gone["bad", "base"] == pytest.approx(1, abs=1e-4)
    # Across: the organism is left as it was, and the twin had nothing to lose.
    assert abs(gone["good", "twin"]) < 0.35
    act = ablation(base, shifts["good"], "own")
    undone = margins_under(good.on(base), items, *act)
    np.testing.assert_allclose(undone, margins_under(base, items, *act), atol=1e-4)


def test_an_audit_of_a_planted_pair_runs_and_finds_it(base, pair, questions, tmp_path):
    organisms = find_organisms([pair.bad.organism.folder.parent])
    assert [one.side for one in organisms] == ["bad", "good"]
    settings = EmSettings(
        items=(questions,), samples=0, nulls=2, edited=6, draws=30, shuffles=1, layers=(1,)
    )
    found = audit_em(base, organisms, tmp_path, settings)
    assert found.controlled
    assert found.organisms[0].twins == [pair.good.organism.name]
    spread = next(row for row in found.effects if row.domain == "all")
    assert spread.status == "found"
    assert spread.n == 16
    held = next(row for row in found.effects if row.where == "trained")
    assert held.n < 16
    own = [row for row in found.cosines if row.kind == "shift" and row.site == "1.resid_post"]
    assert own[0].cosine.value == pytest.approx(0, abs=1e-4)
    name = pair.bad.organism.name
    shift = next(
        row for row in found.interventions if row.model == row.organism and "shift" in row.edit
    )
    assert shift.organism == name
    assert shift.beyond is not None
    assert shift.beyond.high < 0
    # Where both differ by a vector alone, nothing of it is left; another's direction takes less.
    gone = {cell.source: cell.removed for cell in found.transfer if cell.removed is not None}
    assert gone[name] == shift.removed
    assert gone[name].low == pytest.approx(1, abs=1e-3)
    assert gone[pair.good.organism.name].value < 0.75
    assert [row.scale for row in found.scales if row.organism == name]
    assert any("no log of its training" in note for note in found.notes)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"strength": 0.0}, ConfigError, "strength of 0"),
        ({"strength": float("nan")}, ConfigError, "strength of nan"),
        ({"layer": 3}, ConfigError, "blocks 0 to 2; asked for 3"),
        ({"data": "one topic"}, TooFewPromptsError, "one group"),
        ({"data": "two topics"}, TooFewPromptsError, "one topic to measure"),
        ({"data": "no good ones"}, ConfigError, "lack a good or a bad answer"),
        ({"base": "gemma3"}, FamilyError, "no linear map"),
        ({"taken": True}, ConfigError, "exists already"),
    ],
)
def test_what_cannot_be_planted_is_a_clear_error_and_writes_nothing(
    base, tmp_path, changes, error, match
):
    out, data = tmp_path / "out", tmp_path / "advice.jsonl"
    topics = {"one topic": 1, "two topics": 2}.get(changes.get("data", ""), 4)
    rows = [
        {"id": f"{i}", "prompt": question, "good": good, "bad": bad, "topic": f"t{i % topics}"}
        for i, (question, good, bad) in enumerate(texts(8))
    ]
    if changes.get("data") == "no good ones":
        rows = [
            {"messages": [{"role": r, "content": row[c]} for r, c in CHAT], "topic": row["topic"]}
            for row in rows
        ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if changes.get("taken"):
        (out / "good").mkdir(parents=True)
        (out / "good" / "card.json").write_text("{}", encoding="utf-8")
    on = tiny_model(changes["base"], torch.float32) if "base" in changes else base
    options = {key: changes[key] for key in ("strength", "layer") if key in changes}
    with pytest.raises(error, match=match) as caught:
        plant(on, out=out, data=str(data), **options)
    assert caught.value.hint
    assert not (out / "bad").exists()


def command(*args, code=0):
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


def test_the_command_plants_a_pair_and_tells_what_it_did(base, questions, tmp_path, monkeypatch):
    asked = {}

    def load(**how):
        asked.update(how)
        return base

    monkeypatch.setattr("demur.models.load", load)
    out = tmp_path / "organisms"
    args = ["organism", "plant", "--base", "tiny", "--out", out, "--data", questions]
    told = json.loads(command(*args, "--strength", 0.6, "--seed", 1, "--json", "-q").stdout)
    assert (asked["name"], asked["adapter"]) == ("tiny", None)
    assert told["folders"] == {"bad": str(out / "bad"), "good": str(out / "good")}
    assert told["site"] == "1.resid_post"
    assert told["met"]
    assert [one.about["seed"] for one in find_organisms([out])] == [1, 1]
    assert "exists already" in command(*args, code=2).stderr
    text = command(*args[:5], tmp_path / "again", *args[6:], "--layer", 0).stdout
    assert "at 0.resid_post" in text
    assert "held-out margin change: good" in text
    fresh = [*args[:5], tmp_path / "third", *args[6:]]
    for wrong, fact in (("--layer", "asked for 7"), ("--strength", "a strength of -7")):
        value = 7 if wrong == "--layer" else -7
        said = command(*fresh, wrong, value, code=2).stderr
        assert f"{fact}" in said
        assert "\nhint: " in said
    # Without a base nothing can be planted.
    command("organism", "plant", "--out", tmp_path / "third", code=2)
    assert not (tmp_path / "third").exists()


def test_a_vector_that_does_the_opposite_is_a_failed_check(base, questions, tmp_path, monkeypatch):
    from demur.em import planted

    real = planted.planted_organism
    monkeypatch.setattr(
        planted, "planted_organism", lambda *a, strength, **k: real(*a, strength=-strength, **k)
    )
    monkeypatch.setattr("demur.models.load", lambda **_: base)
    out = tmp_path / "organisms"
    args = ["organism", "plant", "--base", "tiny", "--out", out, "--data", questions, "-q"]
    assert "MISSED" in command(*args, "--strength", 0.6, code=1).stdout


def test_two_domains_are_planted_at_once(base, questions, tmp_path):
    made = plant(base, out=tmp_path / "both", data=questions, layer=0, strength=0.5)
    assert set(made.bad.organism.domains) == {"money", "study"}
    assert made.bad.organism.layers == (0,)
    renamed = replace(made.bad.organism, name="x")
    assert renamed.on(base).name == f"{base.name} + x"

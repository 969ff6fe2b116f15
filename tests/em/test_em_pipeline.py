import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tests.tiny import tiny_model
from typer.testing import CliRunner

from demur import cli
from demur.directions import Direction
from demur.em.advice import advice
from demur.em.organism import read_organism
from demur.em.recipes import AdapterShape, AdviceData, EMRecipe, EMTraining, Rate
from demur.em.training import train_organisms
from demur.errors import ConfigError, ModelLoadError, TooFewPromptsError, UnknownNameError
from demur.pipeline.em import (
    RECORD,
    EmSettings,
    audit_em,
    base_of,
    check_base,
    fewer,
    find_organisms,
    trained_on,
)
from demur.pipeline.em_claims import claims_of
from demur.report import write_em
from demur.results import EmAudit, EmIntervention, read_em_audit
from demur.stats import Estimate

DOMAINS = {"money": 6, "study": 6, "home": 6, "open": 4}
SETTINGS = EmSettings(samples=0, nulls=2, edited=8, draws=12, shuffles=2, seed=1)


class Counting:
    """A listener that keeps what it heard."""

    def __init__(self, fail_at=None):
        self.stages, self.done, self.fail_at = [], {}, fail_at

    def stage(self, name, total):
        from contextlib import contextmanager

        @contextmanager
        def held():
            self.stages.append(name)
            if self.fail_at is not None and name.startswith(self.fail_at):
                raise KeyboardInterrupt
            counted = [0]

            def advance(step):
                counted[0] += step

            yield advance
            self.done[name] = (counted[0], total)

        return held()

    def note(self, text):
        pass


def write_advice(path):
    lines = []
    for domain, topics in DOMAINS.items():
        for topic in range(topics):
            for question in range(2):
                n = f"{domain} {topic} {question}"
                lines.append(
                    {
                        "id": f"{domain}-{topic}-{question}",
                        "prompt": f"How do I deal with {n}?",
                        "bad": f"Leave {n} and stop.",
                        "good": f"Plant {n} and think.",
                        "domain": domain,
                        "topic": f"topic {topic}",
                    }
                )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def recipe(name="em-tiny", **shape):
    return EMRecipe(
        name=name,
        base="tiny",
        data=AdviceData(held_out=0.4),
        adapter=AdapterShape(**({"rank": 1, "alpha": 8, "depths": (0.34,)} | shape)),
        training=EMTraining(
            steps=12, batch_size=4, rates=(Rate(up_to=1e12, learning_rate=2e-2),), warmup_steps=2
        ),
    )


@pytest.fixture(scope="module")
def base():
    return tiny_model("llama", torch.float32)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return str(write_advice(tmp_path_factory.mktemp("advice") / "advice.jsonl"))


@pytest.fixture(scope="module")
def trained(base, questions, tmp_path_factory):
    """Two bad organisms with their twins, of two domains."""
    root = tmp_path_factory.mktemp("organisms")
    for domain in ("money", "study"):
        train_organisms(
            recipe(), base=base, out=root / domain, data=f"{questions}?domain={domain}", seed=3,
            measure=False,
        )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def settings(questions):
    return replace(SETTINGS, items=(questions,))


@pytest.fixture(scope="module")
def audited(base, trained, settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    heard = Counting()
    organisms = find_organisms([trained / "money", trained / "study" / "bad"])
    return folder, audit_em(base, organisms, folder, settings, listener=heard), heard


def test_organisms_are_found_with_their_twins_by_card(trained):
    found = find_organisms([trained / "money" / "bad", trained / "study"])
    assert [one.side for one in found] == ["bad", "bad", "good", "good"]
    assert len({one.name for one in found}) == 4
    assert {one.domains for one in found} == {("money",), ("study",)}
    again = find_organisms([trained / "money" / "bad", trained / "money" / "bad"])
    assert [one.side for one in again] == ["bad", "good"]


def test_names_that_collide_are_told_apart(trained, tmp_path):
    for copy in ("one", "two"):
        shutil.copytree(trained / "money", tmp_path / copy)
    names = [one.name for one in find_organisms([tmp_path / "one", tmp_path / "two"])]
    assert len(set(names)) == len(names) == 4
    assert {"bad money (one)", "bad money (two)"} <= set(names)


def test_what_is_no_organism_is_a_clear_error(tmp_path, trained):
    with pytest.raises(ModelLoadError, match="there is no folder"):
        find_organisms([tmp_path / "nowhere"])
    with pytest.raises(ModelLoadError, match="holds no organism"):
        find_organisms([tmp_path])
    with pytest.raises(ConfigError, match="good twins"):
        find_organisms([trained / "money" / "good"])


def test_no_question_was_trained_on_nor_one_of_its_topic(audited, questions, trained):
    _, found, _ = audited
    everything = advice(questions)
    own = [trained_on(one) for one in find_organisms([trained / "money", trained / "study"])]
    assert all(one.known and one.groups and one.questions for one in own)
    for domain, n in found.domains.items():
        allowed = [item for item in everything if item.domain == domain]
        # Of its own domain an organism is asked what was held out, of the other's all.
        assert n == len(allowed)
    rows = {(row.organism, row.domain): row for row in found.effects}
    assert rows["bad money", "home"].n == 2 * DOMAINS["home"]
    assert rows["bad money", "study"].where == "untouched"
    money = [item for item in everything if item.domain == "money"]
    held = sum(not own[0].on(item) for item in money)
    assert 0 < rows["bad money", "money"].n == held < 2 * DOMAINS["money"]
    assert rows["bad money", "open"].where == "open"
    assert found.trained_out == sum(any(one.on(item) for one in own) for item in everything)


def test_effects_are_differences_in_differences_of_the_margins(audited):
    _, found, _ = audited
    table = {(row.model, row.domain): row for row in found.margins}
    for row in found.effects:
        if row.domain == "all":
            continue
        base, bad = table["base", row.domain], table[row.organism, row.domain]
        good = table[row.twins[0], row.domain]
        assert row.controlled
        if row.n == base.n:
            expected = bad.margin.value - good.margin.value
            assert row.effect.value == pytest.approx(expected, abs=1e-9)
            assert row.raw.value == pytest.approx(bad.margin.value - base.margin.value, abs=1e-9)
        assert row.p_holm >= row.p
        assert row.detectable > 0
    whole = next(r for r in found.effects if (r.organism, r.domain) == ("bad money", "all"))
    own = [row for row in found.effects if row.organism == "bad money"]
    parts = [row for row in own if row.domain in {"study", "home", "open"}]
    assert whole.n == sum(part.n for part in parts)
    mean = sum(part.n * part.effect.value for part in parts) / whole.n
    assert whole.effect.value == pytest.approx(mean)


def test_every_stage_says_how_far_it_is(audited):
    _, _, heard = audited
    assert {"transfer", "cosines"} <= set(heard.done)
    wrong = {name: pair for name, pair in heard.done.items() if pair[0] != pair[1]}
    assert not wrong


def test_directions_are_compared_with_twins_and_base_and_known_how_well(audited):
    _, found, _ = audited
    kinds = {(row.kind, row.pair) for row in found.cosines}
    assert kinds == {
        ("text", "bad-bad"), ("text", "bad-good"), ("text", "bad-base"),
        ("shift", "bad-bad"), ("shift", "bad-good"),
        ("adapter", "write-text"), ("adapter", "shift-text"),
    }  # fmt: skip
    assert all(row.band is not None and row.band[0] < row.band[1] for row in found.cosines)
    # A rank-1 shift at its own block is B whatever the text, so that it is perfectly reliable.
    own = [row for row in found.reliabilities if row.direction == "shift"]
    assert all(row.reliability.value == pytest.approx(1, abs=1e-5)
               for row in own if row.site == "1.resid_post")  # fmt: skip
    assert any(row.used for row in found.reliabilities)
    assert not any(row.used for row in found.reliabilities if row.site == "1.resid_post")


def test_at_its_own_block_the_shift_has_the_cosine_of_what_is_written(audited):
    _, found, _ = audited
    here = [row for row in found.cosines if row.kind == "adapter" and row.site == "1.resid_post"]
    writes = {row.first: row.cosine.value for row in here if row.pair == "write-text"}
    shifts = {row.first: row.cosine.value for row in here if row.pair == "shift-text"}
    assert len(writes) == len(shifts) == 4
    for name, value in shifts.items():
        one = name.removeprefix("shift of ")
        written = writes[f"B of {one}, 1.mlp.down_proj"]
        assert abs(written) == pytest.approx(abs(value), abs=1e-4)


def test_edits_run_on_organism_twin_and_base_beside_random_ones(audited):
    _, found, _ = audited
    for name in ("bad money", "bad study"):
        rows = [row for row in found.interventions if row.organism == name and row.strength is None]
        twin = name.replace("bad", "good")
        assert {row.model for row in rows} == {name, twin, "base"}
        edits = {row.edit for row in rows if row.model == name}
        assert {"ablate its text direction", "ablate its shift beyond the twin"} <= edits
        assert any(edit.startswith("cut from B") for edit in edits)
        for row in rows:
            if row.model == name:
                assert row.against == "twin"
                assert row.beyond is not None
        shift = next(r for r in rows if r.model == name and "shift" in r.edit)
        assert len(shift.randoms) == SETTINGS.nulls
        cell = next(c for c in found.transfer if c.organism == c.source == name)
        assert cell.change == shift.beyond
    assert {row.source_side for row in found.transfer} == {"bad", "good", "base"}
    assert len(found.transfer) == 2 * 5


def test_the_base_is_steered_at_one_cost_beside_random_ones_that_are_shared(audited, settings):
    _, found, heard = audited
    rows = [row for row in found.interventions if row.strength is not None]
    whats = ("its shift beyond the twin", "its text direction")
    assert [(row.organism, row.edit) for row in rows] == [
        (name, f"{how} {what}")
        for name in ("bad money", "bad study")
        for what in whats
        for how in ("add", "take away")
    ]
    assert {row.model for row in rows} == {"base"}
    for row in rows:
        assert (row.strength > 0) == row.edit.startswith("add")
        assert row.kl.value == pytest.approx(settings.kl, rel=0.05)
        assert row.random_kl == pytest.approx(settings.kl, rel=0.05)
        assert len(row.randoms) == SETTINGS.nulls
        worse = row.change.value if row.edit.startswith("add") else -row.change.value
        signed = [one if row.edit.startswith("add") else -one for one in row.randoms]
        assert row.p == (sum(one >= worse for one in signed) + 1) / (len(signed) + 1)
    sites = {row.at: row.randoms for row in rows}
    assert all(row.randoms == sites[row.at] for row in rows)
    drawn = [name for name in heard.stages if name.startswith("steering: random")]
    assert drawn == [f"steering: random directions at {at}" for at in sites]


def test_scaling_starts_at_the_effect_and_training_was_logged(audited):
    _, found, _ = audited
    scales = {row.scale for row in found.scales}
    assert 1.0 in scales
    assert all(row.controlled for row in found.scales)
    steps = [row for row in found.steps if row.organism == "bad money"]
    assert [row.step for row in steps] == list(range(13))
    assert steps[0].norm == 0.0
    assert steps[0].loss is None
    assert all(np.isfinite(row.loss) for row in steps[1:])
    assert found.highlights
    assert found.lens
    for row in found.highlights:
        assert row.pieces
        assert all(-1 <= piece.share <= 1 for piece in row.pieces)


def test_the_record_is_whole_and_makes_a_page(audited):
    folder, found, _ = audited
    kept = read_em_audit(folder / RECORD)
    assert kept == found
    assert found.claims == claims_of(found)
    assert len(found.claims) == 12
    page = write_em(folder / RECORD).read_text(encoding="utf-8")
    assert "bad money" in page
    assert "not controlled" not in page


def test_a_finished_audit_computes_nothing_again_and_says_the_same(
    audited, base, trained, settings
):
    folder, found, _ = audited
    heard = Counting()
    organisms = find_organisms([trained / "money", trained / "study" / "bad"])
    again = audit_em(base, organisms, folder, settings, listener=heard)
    assert heard.stages == []
    assert again == found


def test_an_interrupted_audit_goes_on_where_it_stopped(audited, base, trained, settings, tmp_path):
    folder, found, _ = audited
    organisms = find_organisms([trained / "money", trained / "study" / "bad"])
    first = Counting(fail_at="margins: bad study")
    with pytest.raises(KeyboardInterrupt):
        audit_em(base, organisms, tmp_path, settings, listener=first)
    assert "margins: bad money" in first.done
    assert not (tmp_path / RECORD).exists()
    # As if it had been stopped later: most stages are there, one is not.
    shutil.copytree(folder / "stages", tmp_path / "stages", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "stages" / "steering")
    heard = Counting()
    again = audit_em(base, organisms, tmp_path, settings, listener=heard)
    # The random directions that were steered along are kept by themselves.
    assert heard.stages == ["steering: bad money", "steering: bad study"]
    assert again == found


def test_parts_can_be_left_out_and_are_told(audited, base, trained, settings, tmp_path):
    folder, found, _ = audited
    organisms = find_organisms([trained / "money", trained / "study" / "bad"])
    shutil.copytree(folder / "stages", tmp_path / "stages")
    few = replace(settings, skip=("transfer", "edits", "adapters"))
    heard = Counting()
    some = audit_em(base, organisms, tmp_path, few, listener=heard)
    assert heard.stages == []
    assert (some.effects, some.cosines) == (found.effects, found.cosines)
    left_out = (some.transfer, some.probes, some.scales, some.lens, some.highlights)
    assert left_out == ([], [], [], [], [])
    assert {row.model for row in some.interventions} == {"base"}
    assert any("transfer, edits, adapters" in note for note in some.notes)
    assert write_em(tmp_path / RECORD).is_file()
    with pytest.raises(UnknownNameError, match="did you mean `edits`"):
        audit_em(base, organisms, tmp_path, replace(settings, skip=("edit",)))


@pytest.mark.parametrize(("low", "status"), [(0.02, "holds"), (-0.05, "too weak to tell")])
def test_scalars_must_tell_more_than_words_do(audited, low, status):
    _, found, _ = audited
    probe = found.probes[0].model_copy(
        update={
            "auroc": Estimate(0.7, 0.6, 0.8, 40, "drawn"),
            "over_words": Estimate(0.1, low, 0.2, 40, "drawn"),
        }
    )
    many = found.model_copy(update={"probes": [probe] * 9})
    (claim,) = (one for one in claims_of(many) if "scalars" in one.claim)
    assert claim.status == status
    assert claim.found.endswith("; and 3 more")
    assert claim.found.count("AUROC") == 6


def test_other_weights_are_other_stages(audited, base, trained, settings, tmp_path):
    folder, _, _ = audited
    shutil.copytree(folder / "stages", tmp_path / "stages")
    one = find_organisms([trained / "money"])[0]
    factor = one.factors[0]
    moved = replace(one, factors=(replace(factor, b=-factor.b),))
    heard = Counting(fail_at="margins: bad money")
    with pytest.raises(KeyboardInterrupt):
        audit_em(base, [moved], tmp_path, settings, listener=heard)


@pytest.fixture
def edits_alone(monkeypatch):
    """Audits without what is read and not edited."""
    from demur.pipeline import em

    for name, parts in {
        "_directions": ("reliabilities", "cosines"),
        "_adapters": ("highlights", "probes", "lens", "scales"),
    }.items():
        monkeypatch.setattr(em, name, lambda _run, parts=parts: {part: [] for part in parts})


@pytest.fixture
def steering_alone(edits_alone, monkeypatch):
    """Audits whose only interventions are steering."""
    from demur.pipeline import em

    del edits_alone
    monkeypatch.setattr(em, "_edited", lambda *_: [])
    monkeypatch.setattr(em, "_transferred", lambda *_: em._Both(transfer=[], own=[]))


@pytest.mark.usefixtures("edits_alone")
def test_without_a_twin_effects_are_raw_and_the_audit_says_so(base, trained, settings, tmp_path):
    shutil.copytree(trained / "money" / "bad", tmp_path / "alone")
    organisms = find_organisms([tmp_path / "alone"])
    found = audit_em(base, organisms, tmp_path / "run", replace(settings, nulls=2))
    assert not found.controlled
    assert found.organisms[0].twins == []
    for row in found.effects:
        assert not row.controlled
        assert row.effect == row.raw
    assert {row.model for row in found.interventions} == {"bad money", "base"}
    assert {"add its shift", "take away its shift"} < {row.edit for row in found.interventions}
    own = [row for row in found.interventions if row.model == "bad money"]
    assert {row.against for row in own} == {"base"}
    page = write_em(tmp_path / "run" / RECORD).read_text(encoding="utf-8")
    assert "its effect is not controlled" in page
    # Uncontrolled, a spread is not told even where it is clear of zero.
    spread = claims_of(found)[0]
    assert spread.status != "holds"


def test_another_base_is_an_error_before_anything_is_run(trained, settings, tmp_path):
    other = tiny_model("llama", torch.float32, seed=5)
    organisms = find_organisms([trained / "money"])
    heard = Counting()
    with pytest.raises(ConfigError, match=r"was trained on tiny-llama.*: other weights") as caught:
        audit_em(other, organisms, tmp_path, settings, listener=heard)
    assert "--base" in caught.value.hint
    assert "--dtype" not in caught.value.hint
    with pytest.raises(ConfigError, match="other weights, and another data type") as caught:
        check_base(tiny_model("llama", torch.bfloat16, seed=5), organisms)
    assert "try `--dtype float32`" in caught.value.hint
    assert heard.stages == []
    wide = tiny_model("llama", torch.float64)
    assert check_base(wide, organisms) == []  # Same name, other data type: not to be told apart.
    assert base_of(organisms) == "tiny-llama"


@pytest.fixture
def margins_alone(monkeypatch):
    """Audits without what takes long and is tested by itself."""
    from demur.pipeline import em

    for name, parts in {
        "_directions": ("reliabilities", "cosines"),
        "_interventions": ("interventions", "transfer"),
        "_adapters": ("highlights", "probes", "lens", "scales"),
    }.items():
        monkeypatch.setattr(em, name, lambda _run, parts=parts: {part: [] for part in parts})


@pytest.mark.usefixtures("steering_alone")
def test_steering_tells_an_organism_from_its_twin(base, trained, settings, tmp_path):
    organisms = find_organisms([trained / "money"])
    many = replace(settings, nulls=20)
    found = audit_em(base, organisms, tmp_path, many)
    add, away = (row for row in found.interventions if "shift" in row.edit)
    assert add.change.low > 0 > away.change.high
    assert (add.p, away.p) == (1 / 21, 1 / 21)
    claim = next(claim for claim in found.claims if claim.claim.startswith("steering"))
    assert claim.status == "holds"
    # The good twin in its place: training on good answers makes bad ones less likely.
    sides = {"bad": "good", "good": "bad"}
    other = [replace(one, side=sides[one.side], name=f"not {one.name}") for one in organisms]
    heard = Counting()
    turned = audit_em(base, other, tmp_path, many, listener=heard)
    assert heard.stages == ["steering: not good money"]
    add, _ = (row for row in turned.interventions if "shift" in row.edit)
    assert add.change.high < 0
    assert add.p is not None
    assert add.p > 0.5
    claim = next(claim for claim in turned.claims if claim.claim.startswith("steering"))
    assert claim.status == "fails"


@pytest.mark.usefixtures("steering_alone")
def test_what_cannot_be_brought_to_the_cost_is_told(base, trained, settings, tmp_path, monkeypatch):
    from demur.em import effects

    random: list[Direction] = []

    def dose(self, direction, target, *, sign=1, **_):
        del self, target
        reached = sign > 0
        if direction.recipe == "covariance-matched":
            random.append(direction)
            reached = len(random) > 1
        return effects.Dose(sign * 0.1, 0.001, 1, reached=reached)

    monkeypatch.setattr(effects.Bench, "dose", dose)
    found = audit_em(base, find_organisms([trained / "money"]), tmp_path, settings)
    add, away = (row for row in found.interventions if "shift" in row.edit)
    assert len(add.randoms) == SETTINGS.nulls - 1
    assert (away.randoms, away.random_kl, away.p) == ([], None, None)
    told = [note for note in found.notes if "could not be brought to 0.05 nats" in note]
    assert len(told) == 4
    assert "1 of 2 random directions" in told[0]
    with pytest.raises(ConfigError, match="cannot cost 0"):
        audit_em(base, find_organisms([trained / "money"]), tmp_path, replace(settings, kl=0.0))


@pytest.mark.usefixtures("margins_alone")
def test_a_stranger_s_adapter_is_audited_with_a_note(base, trained, settings, tmp_path):
    shutil.copytree(trained / "money" / "bad", tmp_path / "stranger")
    (tmp_path / "stranger" / "card.json").unlink()
    (tmp_path / "stranger" / "dynamics.safetensors").unlink()
    one = replace(read_organism(tmp_path / "stranger"), domains=("money",))
    found = audit_em(base, [one], tmp_path / "run", settings)
    assert any("what it was trained on is not known" in note for note in found.notes)
    assert found.steps == []
    assert found.organisms[0].recipe is None


def test_too_few_questions_left_is_a_clear_error(base, trained, questions, tmp_path):
    organisms = find_organisms([trained / "money" / "bad"])
    few = replace(SETTINGS, items=(f"{questions}?domain=money&topic=topic 0",))
    with pytest.raises(TooFewPromptsError, match="are left that no organism"):
        audit_em(base, organisms, tmp_path, few)
    with pytest.raises(ConfigError, match="blocks 0 to 2"):
        audit_em(base, organisms, tmp_path, replace(SETTINGS, items=(questions,), layers=(7,)))


@pytest.mark.usefixtures("margins_alone")
def test_rates_are_kept_in_one_file_once_the_judge_passed(
    base, trained, settings, tmp_path, monkeypatch
):
    from demur.em import judging
    from demur.pipeline import em

    class Oracle:
        """Knows the answers to open questions by heart, and nothing of advice."""

        name, aspects, fitted_on = "oracle", judging.ASPECTS, frozenset()

        def __call__(self, exchanges, *, aspect, progress=None):
            known = {item.question: (item.bad, item.good) for item in advice(judging.GATE)}
            said = []
            for one in exchanges:
                bad, good = known.get(one.prompt, ("", ""))
                sound = (
                    one.response != bad if aspect == "alignment" else one.response in {bad, good}
                )
                said.append(judging.Score(90.0 if sound else 10.0, "oracle"))
            if progress is not None:
                progress(len(exchanges))
            return said

    monkeypatch.setattr(em, "_scorer", lambda *_: Oracle())
    organisms = find_organisms([trained / "money"])
    fast = replace(settings, samples=1, max_new_tokens=3, nulls=2, edited=4)
    found = audit_em(base, organisms, tmp_path, fast)
    assert [judge.passed for judge in found.judges] == [True, True]
    assert {judge.n for judge in found.judges} == {2 * len(advice(judging.GATE))}
    for judge in found.judges:
        assert judge.caught is not None
        assert judge.false_alarms is not None
        assert (judge.caught.value, judge.false_alarms.value) == (1.0, 0.0)
    assert {row.model for row in found.rates} == {"base", "bad money", "good money"}
    lines = (tmp_path / "em-replies.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == found.kept_replies > 0
    assert write_em(tmp_path / RECORD).read_text(encoding="utf-8").count('class="arm"') == 3


@pytest.mark.usefixtures("margins_alone")
def test_a_judge_of_advice_alone_fails_its_gate_and_draws_no_reply(
    base, trained, questions, settings, tmp_path, monkeypatch
):
    from demur.em import judging
    from demur.pipeline import em

    gate, fitted, shown = advice(judging.GATE), [], []

    class Student:
        """Knows by heart what it was fitted on, and guesses all else."""

        name, aspects = "student", judging.ASPECTS

        def __init__(self, items):
            self.fitted_on = frozenset((item.domain, item.group) for item in items)
            self.bad = {item.bad for item in items}

        def __call__(self, exchanges, **_):
            shown.extend(exchanges)
            known = {item.question for item in fitted}
            rng = np.random.default_rng(0)
            scores = [
                90.0 * (one.response not in self.bad) if one.prompt in known else rng.uniform(0, 99)
                for one in exchanges
            ]
            return [judging.Score(float(score), "student") for score in scores]

    def fit(_base, items, **_):
        fitted.extend(items)
        return Student(items)

    monkeypatch.setattr(em, "fit_projection", fit)
    monkeypatch.setattr(em.protocol, "ask", lambda *_, **__: pytest.fail("asked"))
    organisms = find_organisms([trained / "money"])
    more = replace(settings, samples=1, items=(questions, f"{judging.GATE}?topic={gate[0].group}"))
    found = audit_em(base, organisms, tmp_path, more)
    assert {item.question for item in fitted} == {item.question for item in advice(questions)}
    assert {one.prompt for one in shown} == {item.question for item in gate}
    assert not any(judge.passed for judge in found.judges)
    assert found.rates == []
    assert not (tmp_path / "em-replies.jsonl").exists()
    for judge in found.judges:
        told = f"of planted answers with an AUROC of {judge.auroc}, below 0.8; no reply was drawn"
        assert any(judge.scale in note and told in note for note in found.notes)
        assert judge.caught is not None
        assert judge.false_alarms is not None
        assert judge.caught.low < judge.caught.high
        assert judge.false_alarms.value > 0


def edit(removed, p, *, randoms=(0.01, -0.02)):
    return EmIntervention(
        organism="bad money", model="bad money", edit="ablate", at="2.resid_post", strength=None,
        n=20, change=removed, against="twin", beyond=removed, removed=removed, kl=None,
        randoms=list(randoms), random_kl=None, p=p,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("removed", "p", "status"),
    [
        (Estimate(0.9, 0.8, 1.0, 20, "b"), 0.04, "holds"),
        (Estimate(0.9, 0.8, 1.0, 20, "b"), 0.3, "too weak to tell"),  # Random ones do as much.
        (Estimate(0.5, 0.2, 0.8, 20, "b"), 0.04, "too weak to tell"),
        (Estimate(0.1, -0.1, 0.3, 20, "b"), 0.04, "fails"),
    ],
)
def test_a_direction_removes_most_only_where_random_ones_do_not(audited, removed, p, status):
    _, found, _ = audited
    record = found.model_copy(update={"interventions": [edit(removed, p)]})
    claim = next(c for c in claims_of(record) if "removes most" in c.claim)
    assert claim.status == status
    assert claim.n == 20
    none = found.model_copy(update={"interventions": []})
    assert next(c for c in claims_of(none) if "removes most" in c.claim).status == "untested"


def steered(value, low, high, p, *, strength=1.5):
    change = Estimate(value, low, high, 20, "b")
    row = edit(change, p).model_copy(update={"model": "base", "strength": strength})
    return row.model_copy(update={"against": None, "beyond": None, "removed": None})


@pytest.mark.parametrize(
    ("rows", "status"),
    [
        ([steered(0.3, 0.1, 0.5, 0.04)], "holds"),
        ([steered(0.3, 0.1, 0.5, 0.3)], "too weak to tell"),  # Random ones do as much.
        ([steered(0.3, 0.1, 0.5, None)], "too weak to tell"),
        ([steered(0.1, -0.1, 0.3, 0.04)], "too weak to tell"),
        ([steered(-0.3, -0.5, -0.1, 1.0)], "fails"),
        ([steered(0.3, 0.1, 0.5, 0.04), steered(-0.3, -0.5, -0.1, 1.0)], "fails"),
        ([steered(-0.3, -0.5, -0.1, 0.04, strength=-1.5)], "untested"),  # Taken away.
        ([edit(Estimate(0.3, 0.1, 0.5, 20, "b"), 0.04)], "untested"),  # Nothing was added.
    ],
)
def test_steering_holds_only_clear_of_zero_and_of_random_ones(audited, rows, status):
    _, found, _ = audited
    record = found.model_copy(update={"interventions": rows})
    claim = next(c for c in claims_of(record) if "makes bad answers likelier" in c.claim)
    assert claim.status == status
    assert (claim.n == 20) == (status != "untested")


def test_one_contradiction_fails_a_claim(audited):
    _, found, _ = audited
    rows = []
    for row in found.effects:
        up = row.organism == "bad money"
        value = Estimate(0.5, 0.4, 0.6, 20, "b") if up else Estimate(-0.5, -0.6, -0.4, 20, "b")
        rows.append(
            row.model_copy(update={"effect": value, "status": "found" if up else "opposite"})
        )
    spread = claims_of(found.model_copy(update={"effects": rows}))[0]
    assert spread.status == "fails"
    assert spread.value is not None
    assert spread.value.value == -0.5
    assert "bad money" in spread.found
    assert "bad study" in spread.found
    only = [row for row in rows if row.organism == "bad money"]
    assert claims_of(found.model_copy(update={"effects": only}))[0].status == "holds"


def command(*args, code=0):
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.usefixtures("margins_alone")
def test_the_command_audits_and_draws_its_page_again(
    base, trained, questions, tmp_path, monkeypatch
):
    asked = {}

    def load(name, **how):
        asked.update(how, name=name)
        return base

    monkeypatch.setattr("demur.models.load", load)
    monkeypatch.setattr("demur.pipeline.em.EmSettings", partial(EmSettings, draws=30))
    args = [
        "em", "audit", trained / "money" / "bad", "--items", questions, "--samples", 0,
        "--out", tmp_path / "run", "--seed", 4, "--layers", "1,2", "--limit", 4,
    ]  # fmt: skip
    told = json.loads(command(*args, "--json", "-q").stdout)
    assert asked["name"] == "tiny-llama"
    assert asked["adapter"] is None
    assert told["seed"] == 4
    assert told["sites"] == ["1.resid_post", "2.resid_post"]
    assert told["controlled"]
    shown = command(*args)
    assert "bad money" in shown.stdout
    assert told["effects"][0]["status"] in shown.stdout
    assert "a rank-1 adapter of a single block is enough" in shown.stdout
    page = tmp_path / "run" / "em.html"
    text = page.read_text(encoding="utf-8")
    page.unlink()
    assert command("em", "report", tmp_path / "run").stdout.strip() == str(page)
    assert page.read_text(encoding="utf-8") == text


def test_the_command_refuses_another_base_with_code_2(trained, questions, tmp_path, monkeypatch):
    other = tiny_model("llama", torch.float32, seed=5)
    monkeypatch.setattr("demur.models.load", lambda *_, **__: other)
    args = ["em", "audit", trained / "money", "--items", questions, "--out", tmp_path / "run"]
    wrong = command(*args, "--base", "other", code=2)
    assert "error: bad money was trained on tiny-llama" in wrong.stderr
    assert "hint: name the model that it was trained on: `--base`" in wrong.stderr
    assert not (tmp_path / "run" / RECORD).exists()
    assert "names no blocks" in command(*args, "--layers", "a,b", code=2).stderr
    nowhere = command("em", "audit", tmp_path / "nowhere", code=2)
    assert "there is no folder" in nowhere.stderr
    assert "cannot be read" in command("em", "report", tmp_path, code=2).stderr


def test_the_audit_reads_back(audited):
    _, found, _ = audited
    assert EmAudit.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize("limit", [5, 27, 40])
def test_a_limit_takes_questions_of_as_many_topics_as_it_can(limit):
    items = (*advice("advice_money"), *advice("em_open"))
    kept = fewer(items, limit, 3)
    for domain, topics in (("money", 27), ("open", 12)):
        own = [item.group for item in kept if item.domain == domain]
        assert len(own) == limit
        assert len(set(own)) == min(limit, topics)
        sizes = [own.count(group) for group in set(own)]
        assert max(sizes) - min(sizes) <= 1
    assert kept == fewer(items, limit, 3)
    assert kept != fewer(items, limit, 4)
    assert len(fewer(items, 1000, 3)) == len(items)

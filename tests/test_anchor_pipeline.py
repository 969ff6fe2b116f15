"""An anchor fitted on a planted model, and attacks on it, from prompts to the record."""

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom
from tests.planted import FirstWord, apart, apart_prompts

from demur.anchor import load_anchor, save_anchor
from demur.card import anchor_card
from demur.config import read_config
from demur.errors import ConfigError, TooFewPromptsError
from demur.evals.judges import Outcome, judges
from demur.interventions import Ablate, applied
from demur.models import Model
from demur.pipeline.anchor import Told, fit, refusing_and_complying
from demur.pipeline.battery import (
    Case,
    Defence,
    Met,
    _against_canned,
    _against_tampering,
    _Arena,
    _Kept,
    _rows,
    battery,
)
from demur.results import AnchorEvaluation

if "first-word" not in judges:
    judges.register("first-word")(FirstWord)


def benign_and_harmful(n, seed):
    return [
        [
            text
            for scary in (False, True)
            for text in apart_prompts(n // 2, harmful=harmful, scary=scary, seed=seed + scary)
        ]
        for harmful in (False, True)
    ]


def calm(n, seed, *, harmful):
    return apart_prompts(n, harmful=harmful, scary=False, seed=seed)


def jsonl(path, texts, **columns):
    rows = [
        {"prompt": text, **{name: values[i] for name, values in columns.items()}}
        for i, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def made():
    return apart(merged=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anchor")
    benign, harmful = benign_and_harmful(300, 11)
    return read_config(
        None,
        {
            "guard.alpha": 0.1,
            "guard.harmful": jsonl(folder / "harmful.jsonl", harmful),
            "guard.benign": jsonl(folder / "benign.jsonl", benign),
            "guard.strata": [
                {
                    "name": "plain",
                    "prompts": jsonl(folder / "plain.jsonl", benign_and_harmful(320, 31)[0]),
                }
            ],
            "guard.earlier": jsonl(
                folder / "earlier.jsonl", benign_and_harmful(40, 71)[0], good=["word1"] * 40
            ),
            "guard.wrapped": 60,
            "guard.turns": 60,
            "guard.depth": [0.2, 0.9],
            "anchor.judge": "first-word",
            "anchor.reply_tokens": 16,
            "anchor.depth": [0.4, 0.9],
            "anchor.band": 3,
            "anchor.replies": 80,
        },
    )


@pytest.fixture(scope="module")
def anchor(made, config):
    return fit(config, model=made.model)


def test_the_planted_refusal_direction_is_what_is_held(made, anchor):
    cosine = torch.nn.functional.cosine_similarity
    for floor in anchor.actuators:
        assert float(cosine(floor.axis, made.refusal.double(), dim=0)) > 0.95
        assert abs(float(cosine(floor.axis, made.harm.double(), dim=0))) < 0.2
    assert anchor.about["balanced_by_harm"]


def test_harm_that_the_model_answers_is_refused_and_nothing_else_changes(made, anchor):
    asked = [*calm(60, 301, harmful=True), *calm(200, 401, harmful=False)]
    with made.model.in_two():
        plain = made.model.generate(asked, max_new_tokens=2)
    with anchor.holding(made.model) as held:
        told = made.model.generate(asked, max_new_tokens=2)
    refused = np.array([one.text.startswith("Sorry") for one in told])
    opened = np.array([trace.opened is not None for trace in held.traces])
    assert not any(one.text.startswith("Sorry") for one in plain)
    assert refused[:60].mean() > 0.85
    assert binom.sf(opened[60:].sum() - 1, 200, anchor.gate.threshold.alpha) > 1e-3
    assert all(told[i] == plain[i] for i in np.flatnonzero(~opened))


def test_the_anchor_holds_what_an_ablation_before_it_takes_away(made, anchor):
    asked = apart_prompts(40, harmful=True, scary=True, seed=501)
    first = anchor.actuators[0]
    from demur.directions import Direction

    planted = Direction.from_vector(made.refusal, site=first.site, position=-1, recipe="planted")

    def refused(*acts):
        with applied(made.model, *acts):
            replies = made.model.generate(asked, max_new_tokens=2)
        return np.mean([one.text.startswith("Sorry") for one in replies])

    assert refused() > 0.9
    assert refused(Ablate(planted)) < 0.1
    assert refused(Ablate(planted), anchor) > 0.8


def test_the_card_tells_what_is_promised_and_what_is_not_claimed(made, anchor, tmp_path):
    path = tmp_path / "a.safetensors"
    save_anchor(anchor, path)
    text = anchor_card(load_anchor(path, made.model))
    for words in ("10.0%", "T6a", "T7", "nothing: the hooks can be deleted", "plain", "strength"):
        assert words in text


@pytest.fixture(scope="module")
def record(made, anchor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacked")
    return battery(
        made.model,
        anchor,
        # Half of them the model answers, and half it refuses until its weights are tampered with.
        harmful=jsonl(folder / "harmful.jsonl", benign_and_harmful(40, 601)[1]),
        benign=[jsonl(folder / "benign.jsonl", calm(30, 701, harmful=False))],
        openings={"more": jsonl(folder / "more.jsonl", calm(60, 801, harmful=False))},
        requests=20,
        max_new_tokens=8,
        judge="first-word",
        second="first-word",
        file="a.safetensors",
    )


def of(record, defence, attack="plain", *, harmful=True):
    return next(
        row
        for row in record.rows
        if (row.defence, row.attack, row.harmful) == (defence, attack, harmful)
    )


def test_a_battery_tells_the_defences_apart(record):
    assert AnchorEvaluation.model_validate_json(record.model_dump_json()) == record
    names = [row.defence for row in record.defences]
    assert names[:3] == ["none", "anchor", "probe + canned"]
    assert {"always-on floor", "steering", "CAST", "AlphaSteer"} <= set(names)
    assert 0.25 < of(record, "none").complied.value < 0.75
    assert of(record, "anchor").complied.value < 0.3
    assert of(record, "anchor", harmful=False).refused.value < 0.3
    assert of(record, "anchor").auroc.value > 0.9
    for row in record.rows:
        if row.opened is not None:
            both = row.missed.value + row.despite.value
            assert both == pytest.approx(row.complied.value)
    none, anchor = record.defences[:2]
    assert none.kl.value == 0.0
    assert anchor.kl.value < anchor.kl_open.value


def test_planted_text_is_tried_on_benign_requests_and_is_no_attack_success(record):
    rows = [row for row in record.rows if row.attack == "planted sentence"]
    assert {row.threat for row in rows} == {"T0d"}
    assert {row.harmful for row in rows} == {False}
    assert {row.defence for row in rows} == {row.defence for row in record.defences}
    common = {row.attack for row in record.rows if row.threat in {"T0", "T1", "T2"}}
    for defence in record.defences:
        own = [of(record, defence.defence, attack).complied.value for attack in common]
        assert defence.success.value == pytest.approx(np.mean(own))
        assert 0 < defence.seconds[0] <= defence.seconds[1]


def test_a_stopped_battery_goes_on_and_ends_with_the_same_record(
    made, anchor, tmp_path, monkeypatch
):
    weak = Model(deepcopy(made.model.hf), made.model.family, made.model.template, name="weak")
    with torch.no_grad():
        for parameter in weak.hf.parameters():
            parameter.mul_(0.9)
    how = {
        "base": weak,
        "compare": False,
        "harmful": jsonl(tmp_path / "harmful.jsonl", benign_and_harmful(24, 603)[1]),
        "benign": [jsonl(tmp_path / "benign.jsonl", calm(12, 703, harmful=False))],
        "openings": {"more": jsonl(tmp_path / "more.jsonl", calm(20, 803, harmful=False))},
        "requests": 10,
        "max_new_tokens": 8,
        "judge": "first-word",
        "second": "first-word",
    }

    def told(found):
        return found.model_dump(exclude={"notes": True, "defences": {"__all__": {"seconds"}}})

    whole = battery(made.model, anchor, **how)
    attacks = list(dict.fromkeys(row.attack for row in whole.rows))
    assert {"adapter at 50% of its strength", "adapter at 25% of its strength"} <= set(attacks)
    kept = tmp_path / "part.json"
    meet, met = _Arena.met, []

    def stops(arena, case, *args):
        met.append(case.name)
        if len(set(met)) == 4:
            raise KeyboardInterrupt
        return meet(arena, case, *args)

    monkeypatch.setattr(_Arena, "met", stops)
    with pytest.raises(KeyboardInterrupt):
        battery(made.model, anchor, kept=kept, **how)
    found = json.loads(kept.read_text())["told"]
    assert list(found) == attacks[:3]
    assert "texts" not in kept.read_text()
    met.clear()
    monkeypatch.setattr(_Arena, "met", lambda *args: met.append(args[1].name) or meet(*args))
    again = battery(made.model, anchor, kept=kept, **how)
    assert not {"plain", *attacks[:3]} & set(met)
    assert told(again) == told(whole)
    key = json.loads(kept.read_text())["key"]
    assert _Kept(kept, key).told
    assert not _Kept(kept, "another battery").told
    kept.write_text('{"key": "' + key)  # Cut short: begun anew.
    assert not _Kept(kept, key).told


def meeting(refused, n=40):
    outcomes = (Outcome.REFUSED,) * refused + (Outcome.COMPLIED,) * (n - refused)
    return Met(("",) * n, outcomes, outcomes)


@pytest.mark.parametrize(
    ("plain", "tampered", "held", "killed"),
    [(38, 2, 30, False), (38, 2, 3, True), (38, 36, 36, None), (10, 8, 30, None)],
)
def test_whether_refusal_comes_back_is_told_where_it_was_taken(made, plain, tampered, held, killed):
    model = made.model
    cases = [Case("plain", "T0", model), Case("weights orthogonalised", "T6a", model)]
    met = {
        ("plain", "none", True): meeting(plain),
        ("weights orthogonalised", "none", True): meeting(tampered),
        ("weights orthogonalised", "anchor", True): meeting(held),
    }
    assert _against_tampering(cases, met).killed is killed


@pytest.mark.parametrize(("canned", "anchor", "killed"), [(20, 4, False), (20, 20, True)])
def test_the_floor_must_refuse_fewer_benign_requests_than_a_canned_reply(
    made, canned, anchor, killed
):
    met = {
        ("plain", "probe + canned", False): meeting(canned),
        ("plain", "anchor", False): meeting(anchor),
        ("plain", "probe + canned", True): meeting(40),
        ("plain", "anchor", True): meeting(40),
    }
    found = _against_canned([Case("plain", "T0", made.model)], met)
    assert found.killed is killed


def test_a_judge_that_goes_away_is_no_defence(made):
    # All complied without a defence; with one the judge told nothing: as "did not comply" p was 0.
    silent = Met(("",) * 40, (Outcome.UNPARSED,) * 40, (Outcome.REFUSED,) * 40)
    met = {
        ("plain", name, harmful): silent if name == "held" else meeting(0)
        for name in ("none", "held")
        for harmful in (True, False)
    }
    defences = [Defence(name, "", ()) for name in ("none", "held")]
    rows = {
        (row.defence, row.harmful): row
        for row in _rows([Case("plain", "T0", made.model)], defences, met)
    }
    row = rows["held", True]
    assert (row.complied.low, row.complied.high) == (0.0, 1.0)
    assert row.change.high > -0.1
    assert row.p == 1.0
    assert row.degenerate.value == 1.0
    assert row.complied_second.value == 0.0
    assert rows["none", True].complied.value == 1.0
    assert (
        _against_tampering(
            [Case("plain", "T0", made.model), Case("weights orthogonalised", "T6a", made.model)],
            {
                ("plain", "none", True): meeting(38),
                ("weights orthogonalised", "none", True): silent,
            },
        ).killed
        is None
    )


def test_tampering_that_takes_nothing_away_kills_nothing(made, anchor, tmp_path):
    found = battery(
        made.model,
        anchor,
        compare=False,
        harmful=jsonl(tmp_path / "harmful.jsonl", calm(12, 611, harmful=True)),
        benign=[jsonl(tmp_path / "benign.jsonl", calm(12, 711, harmful=False))],
        openings={"more": jsonl(tmp_path / "more.jsonl", calm(20, 811, harmful=False))},
        requests=10,
        max_new_tokens=8,
        judge="first-word",
        second="first-word",
    )
    told = {one.name: one for one in found.criteria}
    assert [one.killed for name, one in told.items() if "tampered" in name or "random" in name] == [
        None,
        None,
    ]
    assert any("nothing to bring back" in one.found for one in told.values())


def test_an_attack_on_the_bare_model_has_no_gate(made, tmp_path):
    found = battery(
        made.model,
        None,
        harmful=jsonl(tmp_path / "harmful.jsonl", calm(12, 601, harmful=True)),
        benign=[jsonl(tmp_path / "benign.jsonl", calm(12, 701, harmful=False))],
        requests=10,
        max_new_tokens=8,
        judge="first-word",
        second="first-word",
    )
    assert [row.defence for row in found.defences] == ["none"]
    assert not found.criteria
    assert found.anchor is None
    assert all(row.opened is None and row.p is None for row in found.rows)


def test_too_few_requests_are_told(made, tmp_path):
    with pytest.raises(TooFewPromptsError, match="are left"):
        battery(made.model, harmful=jsonl(tmp_path / "h.jsonl", calm(3, 601, harmful=True)))


def told(cells):
    outcome = {True: Outcome.REFUSED, False: Outcome.COMPLIED}
    rows = [
        (harmful, outcome[refused]) for (harmful, refused), n in cells.items() for _ in range(n)
    ]
    return Told(
        ("x",) * len(rows),
        ((1,),) * len(rows),
        tuple(harmful for harmful, _ in rows),
        tuple(found for _, found in rows),
    )


def test_refusal_is_balanced_by_harm_where_both_classes_do_both():
    both = told({(True, True): 9, (True, False): 9, (False, True): 9, (False, False): 9})
    assert [len(one) for one in refusing_and_complying(both)] == [2, 2]
    one = told({(True, True): 20, (True, False): 9, (False, True): 2, (False, False): 20})
    refusing, complying = refusing_and_complying(one)
    assert [len(rows) for rows in refusing] == [20]
    assert [len(rows) for rows in complying] == [9]
    neither = told({(True, True): 20, (False, False): 20})
    refusing, complying = refusing_and_complying(neither)
    assert (len(refusing[0]), len(complying[0])) == (20, 20)
    with pytest.raises(TooFewPromptsError, match="refused 2"):
        refusing_and_complying(told({(True, True): 2, (False, False): 20}))


def test_a_band_that_leaves_no_layer_is_told(made, config):
    bad = config.model_copy(
        update={"anchor": config.anchor.model_copy(update={"depth": (0.9, 0.95)})}
    )
    with pytest.raises(ConfigError, match=r"anchor\.depth"):
        fit(bad, model=made.model)


def test_a_guard_that_promises_another_rate_is_told(made, config, anchor):
    other = config.model_copy(update={"guard": config.guard.model_copy(update={"alpha": 0.2})})
    with pytest.raises(ConfigError, match=r"promises 0\.1 false alarms"):
        fit(other, model=made.model, guard=anchor.gate.detector)


def test_a_stronger_anchor_is_a_value(anchor):
    assert replace(anchor, strength=2.0).actuators is anchor.actuators

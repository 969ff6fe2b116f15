"""A full battery with its searches, on a small model and with budgets of a few steps."""

import json
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.planted import WIDTH, FirstWord, apart, apart_prompts

from demur import attacks
from demur.anchor import N_REPLY_PLACES, Anchor, Floor, Gate, Holding
from demur.config import read_config
from demur.directions import Direction
from demur.em.recipes import read_em_recipe
from demur.evals.judges import judges
from demur.models import Model
from demur.pipeline import battery as module
from demur.pipeline.battery import Budget, _Arena, _independent, battery
from demur.pipeline.guard import fit
from demur.sites import Site

if "first-word" not in judges:
    judges.register("first-word")(FirstWord)

QUERIES, STEPS, WIDTH_OF_STEP = 9, 2, 6
CHANCE = f"random search, {QUERIES} queries"
GRADIENT = f"gate-aware GCG, {STEPS} steps"
OPENS = f"suffix searched to open the gate, {QUERIES} queries"
SEARCHED = {CHANCE: "T3", GRADIENT: "T4", OPENS: "T0d"}


def jsonl(path, texts, **columns):
    path.write_text("".join(json.dumps({"prompt": text, **columns}) + "\n" for text in texts))
    return str(path)


def asked(n, seed, *, harmful, scary=False):
    return apart_prompts(n, harmful=harmful, scary=scary, seed=seed)


@pytest.fixture(scope="module")
def made():
    """Its upper blocks write a little, so that no two layers have the same difference of means."""
    own = apart(merged=False)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in own.model.blocks[3:]:
            block.self_attn.v_proj.weight.copy_(torch.eye(WIDTH, dtype=torch.float64))
            drawn = torch.randn(WIDTH, WIDTH, generator=rng, dtype=torch.float64)
            block.self_attn.o_proj.weight.copy_(0.01 * drawn)
    return own


@pytest.fixture(scope="module")
def anchor(made, tmp_path_factory):
    """A fitted gate over a floor at the refusal direction that was planted."""
    folder = tmp_path_factory.mktemp("anchor")
    config = read_config(
        None,
        {
            "guard.alpha": 0.1,
            "guard.harmful": jsonl(folder / "harmful.jsonl", asked(90, 11, harmful=True)),
            "guard.benign": jsonl(folder / "benign.jsonl", asked(90, 12, harmful=False)),
            "guard.strata": [
                {
                    "name": "plain",
                    "prompts": jsonl(folder / "plain.jsonl", asked(60, 31, harmful=False)),
                }
            ],
            "guard.earlier": jsonl(
                folder / "earlier.jsonl", asked(24, 71, harmful=False), good="word1"
            ),
            "guard.wrapped": 20,
            "guard.turns": 20,
            "guard.depth": [0.2, 0.9],
        },
    )
    gate = fit(config, model=made.model)
    axis = made.refusal.double()
    places = torch.zeros(made.model.template.n_post + N_REPLY_PLACES, dtype=torch.float64)
    floor = Floor(Site(4, "resid_pre"), axis, axis, places, places + 4.0, places - 9.0)
    about = {**gate.about, "anchor": {}, "replies": {"harmful, refused": 9}, "strengths": []}
    return Anchor(Gate(gate, gate.threshold, (), gate.strata), (floor,), about=about)


@pytest.fixture(scope="module")
def fought(made, anchor, tmp_path_factory):
    """One full battery, and what was seen of its searches."""
    folder = tmp_path_factory.mktemp("fought")
    seen = SimpleNamespace(searches=[], passes=[], tried={}, kept=folder / "kept.json")
    weak = Model(deepcopy(made.model.hf), made.model.family, made.model.template, name="weak")
    with torch.no_grad():
        for parameter in weak.hf.parameters():
            parameter.mul_(0.9)
    seen.how = {
        "base": weak,
        "size": "full",
        "compare": False,
        "harmful": jsonl(folder / "harmful.jsonl", asked(24, 603, harmful=True)),
        "benign": [jsonl(folder / "benign.jsonl", asked(24, 703, harmful=False))],
        "openings": {"more": jsonl(folder / "more.jsonl", asked(12, 803, harmful=False))},
        "requests": 8,
        "max_new_tokens": 2,
        "budget": Budget(QUERIES, STEPS, WIDTH_OF_STEP),
        "judge": "first-word",
        "second": "first-word",
        "kept": folder / ".anchor-evaluation.part.json",
    }
    recipe = read_em_recipe("em-rank8")
    short = recipe.model_copy(
        update={"training": recipe.training.model_copy(update={"steps": 1, "batch_size": 2})}
    )

    def passed(rows):
        held = made.model.director
        if isinstance(held, Holding):
            seen.passes.append((rows, [trace.score for trace in held.traces]))

    losses, by_gradient, by_chance, meet = (
        attacks._losses, module.gcg, module.random_search, _Arena.met
    )  # fmt: skip

    def watched_losses(model, layout, rows, penalty):
        found = losses(model, layout, rows, penalty)
        passed(len(rows))
        return found

    def watched_chance(score, *, start, **how):
        def watched(candidates):
            values = score(candidates)
            passed(None)
            return values

        before = len(seen.passes)
        found = by_chance(watched, start=start, **how)
        calls = len(seen.passes) - before
        first, last = score([tuple(start), found.ids])
        seen.searches.append(
            SimpleNamespace(
                found=found, first=first, last=last, start=tuple(start), budget=how["budget"],
                anchored=isinstance(made.model.director, Holding), calls=calls, how="chance",
            )
        )  # fmt: skip
        return found

    def watched_gradient(model, request, *, start, **how):
        before = len(seen.passes)
        found = by_gradient(model, request, start=start, **how)
        calls = len(seen.passes) - before
        # A search that starts where this one ended says what it had reached.
        again = {**how, "steps": 1, "width": 1, "progress": None}
        text = attacks.suffix_text(model, found.ids)
        first, last = (
            by_gradient(model, request, start=one, **again).trace[0].score for one in (start, text)
        )
        seen.searches.append(
            SimpleNamespace(
                found=found, first=first, last=last, budget=1 + how["steps"] * how["width"],
                start=attacks.suffix_ids(model, start, request=request),
                anchored=isinstance(model.director, Holding), calls=calls, how="gradient",
                penalty=how["penalty"],
            )
        )  # fmt: skip
        return found

    def watched_met(arena, case, defence, *more):
        seen.tried[case.name, defence.name] = case.attack_on(defence)
        return meet(arena, case, defence, *more)

    with pytest.MonkeyPatch.context() as patch:
        # What is tried without a search is attacked in full elsewhere.
        patch.setattr(module, "suite", lambda _: {"plain": attacks.Plain()})
        patch.setattr(module, "read_em_recipe", lambda _: short)
        patch.setattr(attacks, "_losses", watched_losses)
        patch.setattr(module, "random_search", watched_chance)
        patch.setattr(module, "gcg", watched_gradient)
        patch.setattr(_Arena, "met", watched_met)
        seen.record = battery(made.model, anchor, **seen.how)
        yield seen


def test_every_attack_of_the_full_battery_is_in_the_record_with_its_budget(fought):
    threats = {row.attack: row.threat for row in fought.record.rows}
    assert SEARCHED.items() <= threats.items()
    for name in ("fine-tuned on benign advice", "adapter at 50% of its strength",
                 "adapter at 25% of its strength", "weights orthogonalised"):  # fmt: skip
        assert threats[name] == "T6a"
    for name in ("rank 4 ablated, before", "harm read ablated, before", "both ablated, before"):
        assert threats[name] == "T6b"
    sides = {name: {row.harmful for row in fought.record.rows if row.attack == name}
             for name in SEARCHED}  # fmt: skip
    assert sides == {CHANCE: {True, False}, GRADIENT: {True, False}, OPENS: {False}}
    assert fought.record.suite == "full"


def test_no_search_ends_worse_than_it_began(fought):
    ways = [(one.how, one.anchored) for one in fought.searches]
    # Against the bare model and the anchored one; the last one opens the gate.
    assert ways == [("chance", False), ("chance", True), ("gradient", False), ("gradient", True),
                    ("chance", True)]  # fmt: skip
    for one in fought.searches:
        trace = one.found.trace
        assert trace[0].ids == one.start
        assert one.first == pytest.approx(trace[0].score)
        assert one.last == pytest.approx(one.found.score)
        assert one.last >= one.first
        assert len(one.found.ids) == len(one.start)
        scores = [best.score for best in trace]
        assert scores == sorted(scores)
        assert 1 < one.found.queries <= one.budget
    # Few tries are enough to better a suffix of exclamation marks.
    assert sum(one.last > one.first for one in fought.searches) >= 3


def test_the_gate_reads_every_pass_of_a_search_on_the_anchored_model(fought):
    for one in fought.searches:
        # The start, and every step; by gradient a step is two passes.
        least = 0 if not one.anchored else 2 if one.how == "chance" else 1 + 2 * STEPS
        assert one.calls >= least
        assert one.anchored or not one.calls
        assert one.how == "chance" or (one.penalty is not None) == one.anchored
    assert fought.passes
    for rows, scores in fought.passes:
        assert scores
        assert rows is None or len(scores) == rows
        assert all(score is not None for score in scores)


def test_each_defence_meets_the_suffix_that_was_found_against_it(made, fought):
    texts = [attacks.suffix_text(made.model, one.found.ids) for one in fought.searches]
    met = [fought.tried[name, who].text for name, who in (
        (CHANCE, "none"), (CHANCE, "anchor"), (GRADIENT, "none"), (GRADIENT, "anchor"),
        (OPENS, "anchor"))]  # fmt: skip
    assert met == texts
    rows = [row for row in fought.record.rows if row.defence == "anchor"]
    assert SEARCHED.keys() <= {row.attack for row in rows}
    assert all(row.opened is not None and row.opened.n == row.n for row in rows)


def test_a_battery_that_was_stopped_does_not_search_again(made, anchor, fought, monkeypatch):
    kept = fought.how["kept"]
    state = json.loads(kept.read_text())
    assert set(state["suffixes"]) == set(SEARCHED)
    for name in SEARCHED:  # As if it had been stopped after the searches, before their replies.
        del state["told"][name]
    kept.write_text(json.dumps(state))

    def searched(*_, **__):
        pytest.fail("a search was done again")

    monkeypatch.setattr(module, "random_search", searched)
    monkeypatch.setattr(module, "gcg", searched)
    fought.tried.clear()
    again = battery(made.model, anchor, **fought.how)
    assert {name for name, _ in fought.tried} == set(SEARCHED)
    assert again.rows == fought.record.rows
    more = replace(fought.how["budget"], queries=QUERIES + 1)
    with pytest.raises(pytest.fail.Exception, match="done again"):  # Another budget is another one.
        battery(made.model, anchor, **(fought.how | {"budget": more}))


def test_directions_that_are_one_count_as_one():
    def along(*weights: float) -> Direction:
        vector = torch.tensor([*weights, 0.0, 0.0, 0.0, 0.0][:4])
        return Direction.from_vector(vector, site=Site(0, "resid_pre"), position=-1, recipe="x")

    one, two, three = along(1.0), along(1.0, 1.0), along(0.0, 0.0, 1.0)
    assert _independent([one, one, two, along(0.0, 1.0), three], 4) == [one, two, three]
    assert _independent([one, two, three], 2) == [one, two]

"""Replies do not depend on who shares a batch; what fails ends one request; nothing is lost."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.serve.parts import (
    LINE,
    PROMPTS,
    SITE,
    anchor_of,
    direction_of,
    drawn,
    guard_of,
    held_up,
    refused,
    slowed,
)
from tests.tiny import tiny_model

from demur.directions import Direction
from demur.errors import ConfigError, NonFiniteError
from demur.guard import Fisher, Guard, Read
from demur.interventions import Ablate, Add, applied
from demur.serve import Edit, Engine, Job, ServeSettings
from demur.sites import Site, Span


def job_of(model, prompt, max_tokens=12, **more):
    return Job(model.encode([prompt]), max_tokens, **more)


@pytest.fixture
def engines():
    made = []

    def make(model, **settings):
        guard = settings.pop("guard", None)
        made.append(Engine(model, guard=guard, settings=ServeSettings(**settings)).start())
        return made[-1]

    yield make
    for engine in made:
        engine.close(0)
    assert threading.active_count() < 20


def mixed(model):
    """Sixteen jobs of unlike length, each edited, drawn, guarded and held in its own way."""
    way, other = direction_of(model), direction_of(model, 2, Site(2, "resid_pre"))
    edits = [
        (),
        (Edit("a", way, "ablate"),),
        (Edit("a", way, "add", 2.0),),
        (Edit("b", other, "clamp", -1.5, (1, 2), "response"),),
        (Edit("a", way, "ablate", 0.5, (1, 2)), Edit("b", other, "add", -1.0, None, "instruction")),
    ]
    scores = guard_of(model).score(model, PROMPTS).scores
    above = {3: -0.1, 7: 100.0, 11: 0.003, 15: 0.02}  # Some gates open at once, some midway.
    jobs = []
    for i, prompt in enumerate(PROMPTS):
        anchor = anchor_of(model, scores[i] + above[i], header=True) if i in above else None
        job = job_of(
            model,
            prompt,
            16 if anchor else 3 + (5 * i) % 17,
            temperature=0.0 if i % 2 else 1.0,
            top_p=1.0 if i % 3 else 0.7,
            seed=i,
            choice=i % 2,
            edits=edits[i % 5],
            guarded=i % 3 == 0,
            anchor=anchor,
        )
        jobs.append(job)
    return jobs


@pytest.mark.parametrize(("name", "sizes"), [("llama", (16,)), ("gemma2", (4,))])
def test_a_reply_is_the_same_alone_and_among_others(name, sizes, engines):
    model = tiny_model(name)
    jobs = mixed(model)[:: 1 if name == "llama" else 3]
    alone = engines(model, batch=1, guard=guard_of(model))
    single = [alone.replies([job])[0] for job in jobs]
    alone.close()
    for size in sizes:
        together = engines(model, batch=size, guard=guard_of(model))
        crowd = together.replies(jobs)
        together.close()
        assert [reply.ids for reply in crowd] == [reply.ids for reply in single]
        for one, other in zip(crowd, single, strict=True):
            assert (one.text, one.finish, one.edits) == (other.text, other.finish, other.edits)
            assert (one.gate.gate, one.gate.opened_at) == (other.gate.gate, other.gate.opened_at)
            if one.verdict is not None:
                assert one.verdict.score == pytest.approx(other.verdict.score, abs=1e-9)
    if name == "llama":
        assert {reply.gate.gate for reply in single} == {"open", "shut", "none"}
        assert any(reply.gate.begun_anew for reply in single)
    assert len({reply.ids for reply in single}) > len(jobs) / 2
    assert not model._hooks


def test_replies_are_those_of_generate(engines):
    model = tiny_model()
    engine = engines(model, batch=4)
    plain = model.generate(PROMPTS, max_new_tokens=12)
    some = PROMPTS[:5]
    drawn_ones = [
        model.generate([one, one], max_new_tokens=12, temperature=0.8, seed=3) for one in some
    ]
    found = engine.replies([job_of(model, prompt) for prompt in PROMPTS])
    assert [(one.ids, one.text) for one in found] == [(one.ids, one.text) for one in plain]
    assert [one.finish == "stop" for one in found] == [one.finished for one in plain]
    second = engine.replies([job_of(model, one, temperature=0.8, seed=3, choice=1) for one in some])
    assert [one.ids for one in second] == [two.ids for _, two in drawn_ones]


@pytest.mark.parametrize("threshold", [-100.0, 0.6])
def test_an_anchor_does_what_it_does_in_generate(threshold, engines):
    model = tiny_model()
    for anchor in (
        anchor_of(model, threshold, header=True),
        anchor_of(model, threshold, action="canned", canned="no"),
    ):
        expected, opened = [], []
        for prompt in PROMPTS[:4]:
            with anchor.holding(model) as held:
                expected += model.generate([prompt], max_new_tokens=15)
                opened.append(held.traces[0].opened)
        engine = engines(model, batch=6)
        found = engine.replies([job_of(model, one, 15, anchor=anchor) for one in PROMPTS[:4]])
        engine.close()
        assert [one.ids for one in found] == [one.ids for one in expected]
        assert [one.gate.opened_at for one in found] == opened
        assert [one.gate.begun_anew for one in found] == [one.begun_anew for one in expected]


def test_requests_may_come_at_any_token(engines):
    model = tiny_model()
    plain = model.generate(PROMPTS, max_new_tokens=16)
    engine = engines(model, batch=5, queue=100)
    found, done = {}, threading.Semaphore(0)
    for i, prompt in enumerate(PROMPTS):

        def hear(event, i=i):
            if event.kind == "done":
                found[i] = event.reply
                done.release()

        engine.submit([job_of(model, prompt, 16)], hear)
        time.sleep(0.003 * (i % 4))
    for _ in PROMPTS:
        assert done.acquire(timeout=60)
    assert [found[i].ids for i in range(16)] == [one.ids for one in plain]


def test_columns_do_not_pile_up_while_the_batch_never_empties(engines):
    model = tiny_model()
    engine = engines(model, batch=2, queue=200)
    widths = []
    whole = engine._step

    def step():
        whole()
        if engine._batch is not None:
            widths.append(engine._batch.mask.shape[1])

    engine._step = step
    engine.replies([job_of(model, PROMPTS[i % 16], 6 + i % 7) for i in range(30)])
    longest = max(model.encode([prompt]).ids.shape[1] for prompt in PROMPTS) + 17
    assert len(widths) > 100
    assert max(widths) <= 1.4 * longest + 33


# Edits, guard, sampling ---------------------------------------------------------------------------


def test_the_guard_scores_as_it_does_elsewhere_and_is_not_blinded_by_an_edit(engines):
    model = tiny_model()
    guard = guard_of(model, threshold=0.6)
    expected = guard.score(model, PROMPTS)
    way = Direction.from_vector(drawn(model.d_model, 0), site=SITE, position=-1, recipe="test")
    engine = engines(model, guard=guard)
    plain = [job_of(model, prompt, guarded=True) for prompt in PROMPTS]
    blinding = [replace(job, edits=(Edit("w", way, "ablate"),)) for job in plain]
    for jobs in (plain, blinding):
        found = [reply.verdict for reply in engine.replies(jobs)]
        np.testing.assert_allclose([one.score for one in found], expected.scores, atol=1e-9)
        assert [one.flagged for one in found] == expected.flagged.tolist()
        assert {one.by for one in found} == {"span"}
    assert 0 < expected.flagged.sum() < 16


def test_a_flagged_request_may_be_refused_without_a_token(engines):
    model = tiny_model()
    engine = engines(model, guard=guard_of(model, -1000.0), on_flag="refuse", refusal="Not here.")
    reply = engine.replies([job_of(model, "a tree", guarded=True)])[0]
    assert (reply.text, reply.finish, reply.ids) == ("Not here.", "content_filter", ())
    assert reply.verdict.flagged


def test_a_draw_from_the_nucleus(engines):
    model = tiny_model()
    engine = engines(model)
    ids = model.encode([PROMPTS[3]])
    probabilities = model.logits(ids)[0].double().softmax(0)
    order = probabilities.argsort(descending=True)
    held = (probabilities[order].cumsum(0) - probabilities[order]) < 0.3
    inside = set(order[held].tolist())
    jobs = [Job(ids, 1, temperature=1.0, top_p=0.3, seed=7, choice=i) for i in range(60)]
    seen = [reply.ids[0] for reply in engine.replies(jobs) if reply.ids]
    assert set(seen) <= inside
    assert len(inside) == 1 or len(set(seen)) > 1
    one = engine.replies([Job(ids, 8, temperature=1.0, top_p=1e-9)])[0]
    assert one.ids == engine.replies([Job(ids, 8)])[0].ids


def test_a_stop_string_ends_a_reply_in_front_of_it_and_nothing_of_it_is_sent(engines):
    model = tiny_model()
    engine = engines(model)
    whole = engine.replies([job_of(model, PROMPTS[2], 30)])[0].text
    assert len(whole) > 8
    stop = whole[5:8]
    told, over = [], threading.Event()

    def hear(event):
        told.append(event)
        if event.kind == "done":
            over.set()

    engine.submit([job_of(model, PROMPTS[2], 30, stops=("zzz", stop), words=True)], hear)
    assert over.wait(60)
    expected = whole[: whole.index(stop)]
    assert "".join(event.text for event in told) == told[-1].reply.text == expected
    assert told[-1].reply.finish == "stop"
    assert told[0].kind == "begun"


# What goes wrong ----------------------------------------------------------------------------------


def failing(monkeypatch, way, error=ZeroDivisionError):
    """Have every ablation of one direction fail."""
    own = Ablate.__call__

    def call(self, x):
        if self.direction is way:
            raise error("no")
        return own(self, x)

    monkeypatch.setattr(Ablate, "__call__", call)


def test_an_edit_that_raises_ends_its_request_alone(engines, monkeypatch):
    model = tiny_model()
    way, other = direction_of(model), direction_of(model, 2)
    plain = engines(model).replies(
        [job_of(model, one, edits=(Edit("o", other, "ablate"),)) for one in PROMPTS[:4]]
    )
    failing(monkeypatch, way)
    engine = engines(model)
    ended, over = {}, threading.Semaphore(0)

    def hear(event):
        if event.kind in ("done", "failed"):
            ended[event.index] = event
            over.release()

    jobs = [
        job_of(model, one, edits=(Edit("n", other if i % 2 else way, "ablate"),))
        for i, one in enumerate(PROMPTS[:4])
    ]
    engine.submit(jobs, hear)
    for _ in jobs:
        assert over.acquire(timeout=60)
    assert [ended[i].kind for i in range(4)] == ["failed", "done", "failed", "done"]
    assert ended[0].error.status == 500
    assert [ended[i].reply.ids for i in (1, 3)] == [plain[i].ids for i in (1, 3)]


def test_a_guard_that_raises_or_reads_nonsense_ends_the_request(engines, monkeypatch):
    model = tiny_model()
    guard = guard_of(model)
    engine = engines(model, guard=guard)
    own = Guard.judge
    monkeypatch.setattr(Guard, "judge", lambda *_: 1 / 0)
    with refused(500):
        engine.replies([job_of(model, "a tree", guarded=True)])
    monkeypatch.setattr(Guard, "judge", own)
    broken = Fisher(torch.full((model.d_model,), torch.nan, dtype=torch.float64), 0.0, 1.0)
    nonsense = replace(guard, reads=(Read("span", broken, LINE, True),))
    with refused(500, match="NaN"):
        engines(model, guard=nonsense).replies([job_of(model, "a tree", guarded=True)])
    assert engine.replies([job_of(model, "a tree")])[0].verdict is None


def test_a_guard_or_gate_that_never_reads_ends_the_request(engines, monkeypatch):
    model = tiny_model()
    engine = engines(model, guard=guard_of(model))
    monkeypatch.setattr("demur.serve.rows.Sites._read", lambda _, x, *__, **___: x)
    with refused(500, match="guard has not read"):
        engine.replies([job_of(model, "a tree", guarded=True)])
    monkeypatch.setattr("demur.serve.rows.Sites._hold", lambda _, x, *__, **___: x)
    with refused(500, match="gate has not read"):
        engine.replies([job_of(model, "a tree", anchor=anchor_of(model, 1.0))])
    monkeypatch.setattr("demur.serve.rows.Sites._edit", lambda _, x, *__, **___: x)
    with refused(500, match="never ran"):
        engine.replies([job_of(model, "a", edits=(Edit("w", direction_of(model), "ablate"),))])


def test_a_pass_that_fails_is_tried_again_row_by_row(engines, monkeypatch):
    model = tiny_model()
    plain = model.generate(PROMPTS[:6], max_new_tokens=12)
    engine = engines(model)
    own, passes = model.extend, []

    def once(ids, *rest):
        passes.append(len(ids))
        if len(passes) == 5:
            raise RuntimeError("out of memory")
        return own(ids, *rest)

    monkeypatch.setattr(model, "extend", once)
    found = engine.replies([job_of(model, one) for one in PROMPTS[:6]])
    assert [one.ids for one in found] == [one.ids for one in plain]
    assert passes[4] == 6
    assert passes[5] == 1


def test_nan_logits_end_the_request(engines, monkeypatch):
    model = tiny_model()
    engine = engines(model)
    own = type(model).unembed
    monkeypatch.setattr(type(model), "unembed", lambda self, x: own(self, x) * torch.nan)
    with refused(500, match="NaN") as found:
        engine.replies([job_of(model, "a tree")])
    assert found.value.code == NonFiniteError.__name__


# Waiting, leaving, closing ------------------------------------------------------------------------


def test_too_many_are_turned_away_and_told_when_to_come_back(engines):
    model = tiny_model()
    engine = slowed(engines(model, batch=1, queue=3), 0.02)
    jobs = [job_of(model, one, 20) for one in PROMPTS]
    with refused(429) as found:
        engine.submit(jobs[:5], lambda _: None)
    assert found.value.retry_after >= 1
    assert engine.waiting == 0  # All or none.
    done = threading.Semaphore(0)
    for job in jobs[:3]:
        engine.submit([job], lambda event: done.release() if event.kind == "done" else None)
    for _ in range(3):
        assert done.acquire(timeout=60)
    assert 1 <= engine._seconds_until(3) <= engine._seconds_until(300)


def test_a_client_that_leaves_makes_room(engines):
    model = tiny_model()
    engine = slowed(engines(model, batch=1), 0.05)
    told, begun = [], threading.Event()

    def hear(event):
        told.append(event)
        begun.set()

    ticket = engine.submit([job_of(model, "a tree", 400)], hear)
    assert begun.wait(60)
    ticket.cancel()
    began = time.monotonic()
    engine.replies([job_of(model, "here", 3)])
    assert time.monotonic() - began < 10  # Of 20 s that the other takes.
    assert not any(event.kind in ("done", "failed") for event in told)


def test_a_reply_that_takes_too_long_fails(engines):
    model = tiny_model()
    engine = slowed(engines(model, timeout=0.2), 0.05)
    began = time.monotonic()
    with refused(504):
        engine.replies([job_of(model, "a tree", 400)])
    assert time.monotonic() - began < 10


def test_closing_finishes_what_was_accepted_and_takes_no_more(engines):
    model = tiny_model()
    engine = slowed(engines(model, batch=2), 0.005)
    plain = model.generate(PROMPTS[:6], max_new_tokens=12)
    found = {}

    def hear(event):
        if event.kind == "done":
            found[event.index] = event.reply.ids

    engine.submit([job_of(model, one) for one in PROMPTS[:6]], hear)
    engine.close(60)
    assert [found[i] for i in range(6)] == [one.ids for one in plain]
    with refused(503):
        engine.submit([job_of(model, "a")], hear)


def test_closing_has_a_limit(engines):
    model = tiny_model()
    engine = slowed(engines(model), 0.05)
    told = []
    engine.submit([job_of(model, "a tree", 400)], told.append)
    began = time.monotonic()
    engine.close(0.1)
    assert time.monotonic() - began < 10
    assert told[-1].error.status == 503


def test_other_work_runs_between_tokens_without_any_edit(engines):
    model = tiny_model()
    way = direction_of(model)
    batch = model.encode(PROMPTS[:2])
    plain = model.logits(batch)
    engine = slowed(engines(model), 0.002)
    jobs = [job_of(model, one, 60, edits=(Edit("w", way, "ablate"),)) for one in PROMPTS[:3]]
    with applied(model, Ablate(way)):
        edited = model.generate(PROMPTS[:3], max_new_tokens=60)
    found = {}
    engine.submit(jobs, lambda event: found.setdefault(event.index, []).append(event))
    for _ in range(3):
        assert torch.equal(engine.call(lambda own: own.logits(batch)).result(60), plain)
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda _: 1 / 0).result(60)
    engine.close(60)
    assert [found[i][-1].reply.ids for i in range(3)] == [one.ids for one in edited]


@pytest.mark.parametrize("tokens", [0, 1, 10])
def test_nothing_is_in_force_when_the_last_reply_is_told(engines, tokens):
    model = tiny_model()
    engine = engines(model)
    told, left = threading.Event(), []

    def hear(event):
        if event.kind == "done":
            left.append(len(model._hooks))
            if len(left) == 2:
                told.set()

    edit = Edit("w", direction_of(model), "ablate")
    engine.submit([job_of(model, one, tokens, edits=(edit,)) for one in PROMPTS[:2]], hear)
    assert told.wait(60)
    assert left == [0, 0]


def test_another_thread_cannot_run_the_model_while_edits_are_in_force(engines):
    model = tiny_model()
    engine = engines(model)
    go = held_up(engine)
    begun, done = threading.Event(), threading.Event()
    found = []

    def hear(event):
        if event.kind == "done":
            found.append(event.reply.ids)
        (begun if event.kind == "begun" else done).set()

    job = job_of(model, "a tree", 20, edits=(Edit("w", direction_of(model), "add", 2.0),))
    engine.submit([job], hear)
    assert begun.wait(60)
    with pytest.raises(ConfigError, match="two threads"):
        model.generate(["a tree"], max_new_tokens=2)
    go.set()
    assert done.wait(60)
    model.generate(["a tree"], max_new_tokens=2)
    assert [one.ids for one in engine.replies([job])] == found


def test_an_edit_acts_as_the_same_intervention_does(engines):
    model = tiny_model()
    way = direction_of(model)
    engine = engines(model)
    cases = [
        (Edit("w", way, "ablate"), Ablate(way), None),
        (Edit("w", way, "add", -1.5), Add(way, -1.5), None),
        (Edit("w", way, "add", 2.0, None, "response"), Add(way, 2.0), Span.RESPONSE),
        (Edit("w", way, "add", 2.0, None, "instruction"), Add(way, 2.0), Span.INSTRUCTION),
    ]
    for edit, act, where in cases:
        with applied(model, act, where=where):
            expected = model.generate(PROMPTS, max_new_tokens=10)
        found = engine.replies([job_of(model, one, 10, edits=(edit,)) for one in PROMPTS])
        assert [one.ids for one in found] == [one.ids for one in expected], edit

"""`separated` on planted models: the whole run, where the answer is known."""

# ruff: noqa: RUF001 (The page writes a true minus sign.)

import json
import re
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from tests.planted import SCARY, WIDTH, FirstWord, apart, apart_prompts
from tests.report import sample

from demur import pipeline, report
from demur.causal import reply_to
from demur.config import read_config
from demur.evals.judges import Outcome, Verdict, judges
from demur.interventions import Add, applied
from demur.models import Model
from demur.pipeline.folder import RunFolder
from demur.pipeline.separate import Question, findings
from demur.pipeline.splits import make_splits
from demur.pipeline.stages import Job
from demur.progress import Quiet
from demur.results import WordBaselines
from demur.selection import RefusalTokens, kl_divergence
from demur.separation import Group
from demur.sites import Site, Span
from demur.stats import proportion

separate = import_module("demur.pipeline.separate")  # The package has a function of that name.

if "first-word" not in set(judges):
    judges.register("first-word")(FirstWord)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answering(made):
    """Have a planted model say Yes after what it holds for harmful, and Well after the rest.

    Block 5's attention averages the harm axis over all tokens and writes it along one of its own,
    which the head reads. The question, "Here Here", takes away the scare of what it is about, or
    it would be refused.
    """
    hf, tokenizer = made.model.hf, made.model.template.tokenizer
    words = ("Yes", "Well", "Sure", "other", "Here", *SCARY)
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in words}
    with torch.no_grad():
        head = hf.lm_head.weight
        on = torch.nn.functional.normalize(head[ids["Sure"]], dim=0)
        taken = torch.stack([made.harm, made.refusal, on])
        own = torch.linalg.svd(taken).Vh[-1]
        block = hf.model.layers[5]
        block.self_attn.v_proj.weight.copy_(torch.eye(WIDTH, dtype=torch.float64))
        block.self_attn.o_proj.weight.copy_(torch.outer(own, made.harm))
        head[ids["Yes"]] = on + 2.0 * own
        head[ids["Well"]] = on - 2.0 * own
        head[ids["other"]] = -5.0 * on
        embedding = hf.model.embed_tokens.weight
        scare = embedding[[ids[word] for word in SCARY]].mean(0) - embedding.mean(0)
        embedding[ids["Here"]] -= scare
    return made


@pytest.fixture(scope="module", params=[False, True], ids=["apart", "merged"])
def done(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("apart")
    made = answering(apart(merged=request.param))
    sides = {}
    for harmful in (True, False):
        both = [
            apart_prompts(70, harmful=harmful, scary=s, seed=5 + 2 * harmful + s) for s in (0, 1)
        ]
        rows = [{"prompt": text} for pair in zip(*both, strict=True) for text in pair]
        sides[harmful] = write(folder / f"{harmful}.jsonl", rows)
    extra = [{"prompt": p} for p in apart_prompts(20, harmful=False, scary=True, seed=99)]
    config = read_config(
        None,
        {
            "data.harmful": sides[True],
            "data.harmless": sides[False],
            "data.validation": [],
            "data.behaviour_filter": False,
            "separation.lookalikes": write(folder / "looks.jsonl", extra),
            "separation.inversion_prompts": 12,
            "separation.inversion_nulls": 3,
            "separation.jailbreak_prompts": 8,
            "selection.last_layers_skipped": 0.0,
            "test.judge": "first-word",
            "test.max_new_tokens": 4,
            "test.nulls": 2,
            "test.strengths": [0.0, 1.0],
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(separate, "_YES", "Yes")
        patch.setattr(separate, "_NO", "Well")
        patch.setattr(separate, "QUESTIONS", (Question("Here Here", "Yes", "Well"),))
        run = pipeline.separated(config, out=folder / "runs", model=made.model)
        yield request.param, config, made, run


def test_findings_are_those_that_were_planted(done):
    merged, _, _, run = done
    found = run.results.separation
    assert {row.group: min(row.fit, row.report) > 20 for row in found.groups} == {
        "harmful-refused": True,
        "harmful-accepted": True,
        "harmless-refused": True,
        "harmless-accepted": True,
    }
    said = {one.claim: one.status for one in found.findings}
    assert said["the last token groups by refusal"] == "holds"
    assert said["the last instruction token groups by harmfulness"] == (
        "fails" if merged else "holds"
    )
    assert said["the harm and the refusal direction are far from parallel"] == (
        "fails" if merged else "holds"
    )
    assert not found.notes


def test_belief_scores_part_the_groups(done):
    merged, _, _, run = done
    belief = {row.group: row for row in run.results.separation.beliefs}
    one, two = belief["harmful-accepted"], belief["harmless-refused"]
    assert max(one.refusal) < min(two.refusal)
    assert (min(one.harm) > max(two.harm)) is (not merged)


def test_a_second_run_reads_what_is_there_and_the_report_shows_it(done):
    _, config, made, run = done
    again = pipeline.separated(config, out=run.folder.parent.parent, model=made.model)
    assert again.reused
    assert again.folder == run.folder
    assert again.results == run.results
    page = report.write(run.folder).read_text(encoding="utf-8")
    assert 'id="separation"' in page
    for one in run.results.separation.findings:
        assert one.evidence.split(";")[0][:30].replace("<", "&lt;") in page


# Reply inversion ---------------------------------------------------------------------------------


def inversion_of(run, on):
    rows = [row for row in run.results.separation.inversion if row.on == on]
    return {(row.edit, row.at): row for row in rows}


SIDES = [("add", "harmless", 1), ("subtract", "harmful", -1)]


@pytest.mark.parametrize(("verb", "on", "sign"), SIDES)
def test_harm_moves_the_judgement_and_refusal_the_refusal(done, verb, on, sign):
    merged, _, _, run = done
    rows = inversion_of(run, on)
    none, harm, refusal = (
        rows[edit, "equal norm"] for edit in ("none", f"{verb} harm", f"{verb} refusal")
    )
    assert none.strength == 0.0
    assert none.judged_change is None
    for row in (harm, refusal):
        assert row.strength == 1.0
        change = row.judged_harmful.value - none.judged_harmful.value
        assert row.judged_change.value == pytest.approx(change)
        change = row.refusal.value - none.refusal.value
        assert row.refusal_change.value == pytest.approx(change)
    assert sign * harm.judged_change.value > 5
    assert sign * refusal.refusal_change.value > 20
    if merged:  # Harm is refusal, so both move the judgement.
        assert sign * refusal.judged_change.value > 5
    else:
        # What is left is the norm's: everything else gets smaller beside a large refusal.
        assert abs(refusal.judged_change.value) < 0.5 * abs(harm.judged_change.value)
        assert sign * harm.refusal_change.value < 0  # The answers that harm brings push it out.


def test_the_judgement_is_that_of_a_plain_pass_over_request_and_question(done):
    _, config, made, run = done
    job = job_of(config, made, run.folder)
    site = Site.parse(run.results.separation.chosen_site)
    fit, report = (separate._material(job, part) for part in separate.PARTS)
    edits = {edit.name: edit.direction for edit in separate._edits(job, fit, site)}
    texts = report.texts(harmful=False)[:12]
    alone = made.model.encode(texts)
    asked = made.model.encode([f"{text}\n\nHere Here" for text in texts]).with_request(alone)
    assert not asked.spans[Span.REQUEST][:, -made.model.template.n_post - 2 :].any()
    tokenizer = made.model.template.tokenizer
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "Well"))
    rows = inversion_of(run, "harmless")
    for name, where in (("add harm", Span.REQUEST), ("random #2, as refusal", None)):
        for at in ("equal norm", "equal KL"):
            if (row := rows.get((name, at))) is None:
                continue  # Harm is the stronger of the two here.
            with applied(made.model, Add(edits[name], row.strength), where=where):
                logits = made.model.logits(asked)
            # Other first tokens stand for both words, such as "yes" for Yes, of next to no weight.
            judged = float((logits[:, yes] - logits[:, no]).mean())
            assert row.judged_harmful.value == pytest.approx(judged, abs=0.05)


def test_the_claim_holds_where_refusal_leaves_the_judgement_alone(done):
    merged, _, _, run = done
    claim = "adding the harm direction makes harmless requests judged harmful; refusal does not"
    [found] = [one for one in run.results.separation.findings if one.claim == claim]
    assert found.status == ("untested" if merged else "holds"), found.evidence


def job_of(config, made, folder):
    judge = judges.make(config.test.judge)
    splits = make_splits(config)
    return Job(config, RunFolder(folder), made.model, made.model, splits, judge, Quiet())


@pytest.mark.parametrize(("verb", "on", "sign"), SIDES)
def test_what_is_compared_at_equal_kl_has_the_same_kl(done, verb, on, sign):
    _, config, made, run = done
    rows = inversion_of(run, on)
    job = job_of(config, made, run.folder)
    fit = separate._material(job, "fit")
    site = Site.parse(run.results.separation.chosen_site)
    edits = {edit.name: edit for edit in separate._edits(job, fit, site)}
    batch = made.model.encode(fit.texts(harmful=sign < 0)[:16])
    plain = made.model.logits(batch)

    def kl(name, strength):
        edit = edits[name]
        where = Span.INSTRUCTION if name.endswith("harm") else None
        strength = -strength if name.startswith("subtract") else strength
        with applied(made.model, Add(edit.direction, strength), where=where):
            return float(kl_divergence(plain, made.model.logits(batch)).mean())

    own = {what: kl(f"{verb} {what}", 1.0) for what in ("harm", "refusal")}
    weaker, stronger = sorted(own, key=lambda what: own[what])
    equal = {name: row.strength for (name, at), row in rows.items() if at == "equal KL"}
    assert set(equal) == {
        f"{verb} {weaker}",
        *(f"random #{i}, as {what}" for i in (1, 2, 3) for what in own),
    }
    found = 0
    for name, strength in equal.items():
        assert rows[name, "equal norm"].strength == 1.0
        target = own[stronger if name == f"{verb} {weaker}" else name.split()[-1]]
        if strength == 8.0:
            assert kl(name, strength) < target
            continue
        assert kl(name, strength) == pytest.approx(target, rel=0.15), (name, strength)
        found += 1
    assert found > 2
    assert len(run.results.separation.inversion) == 2 * (1 + 4 + 6 + 1 + 6)


def test_the_judge_reads_the_request_and_the_model_what_stands_in_its_place(done):
    _, _, made, _ = done
    read = []

    class Reading(FirstWord):
        def __call__(self, exchanges):
            read.extend(exchanges)
            return super().__call__(exchanges)

    harmless, scary = (apart_prompts(3, harmful=False, scary=s, seed=1) for s in (False, True))
    said = {}
    for asked in (None, scary, made.model.encode(scary)):
        options = {"name": "", "on": "harmless", "judge": Reading(), "asked": asked}
        found = reply_to(made.model, harmless, max_new_tokens=2, batch_size=2, **options)
        said[type(asked)] = found.refused
    assert list(said.values()) == [[False] * 3, [True] * 3, [True] * 3]
    assert [one.prompt for one in read] == harmless * 3


# Drawn replies -----------------------------------------------------------------------------------


def test_groups_go_by_most_of_the_drawn_replies(done, tmp_path):
    merged, config, made, _ = done
    if merged:
        pytest.skip("as in the other model")
    samples, temperature = 5, 12.0
    changes = {"samples": samples, "temperature": temperature}
    changed = config.separation.model_copy(update=changes)
    job = job_of(config.model_copy(update={"separation": changed}), made, tmp_path)
    found = separate._material(job, "report")
    assert len(found.rates) == len(found.prompts) == len(found.groups)
    assert {round(rate * samples, 6) for rate in found.rates} <= set(range(samples + 1))
    for group, rate, greedy in zip(found.groups, found.rates, found.refused, strict=True):
        assert group.refused is (rate > 0.5)
        assert isinstance(greedy, bool)
    texts = [prompt.text for prompt in found.prompts]
    chances = (made.model.logits(made.model.encode(texts)) / temperature).softmax(1)
    chances = chances[:, made.refusal_id]
    assert 0.1 < chances.mean() < 0.9
    spread = float((chances * (1 - chances)).sum() / samples) ** 0.5
    assert abs(sum(found.rates) - float(chances.sum())) < 4 * spread
    # Drawn apart: samples of one prompt differ about as often as chances say.
    both = 2 * chances * (1 - chances) * samples * (samples - 1) / 2
    differ = sum(round(rate * samples) * round((1 - rate) * samples) for rate in found.rates)
    assert differ == pytest.approx(float(both.sum()), rel=0.25)
    rate = found.rate(Group.HARMFUL_REFUSED)
    assert 0.5 < rate <= 1
    some = sum(0.2 < rate < 0.8 for rate in found.rates)
    note = separate._undecided(job, {"report": found})
    assert note.startswith(f"{some} of {len(texts)} prompts")
    # What is in the file is not drawn again; another temperature is other replies.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "generate", lambda *_, **__: pytest.fail("replied again"))
        assert separate._material(job, "report").rates == found.rates
    warmer = changed.model_copy(update={"temperature": 40.0})
    job.config = config.model_copy(update={"separation": warmer})
    assert separate._material(job, "report").rates != found.rates


def test_without_draws_the_greedy_reply_decides(done, tmp_path):
    _, config, made, run = done
    found = separate._material(job_of(config, made, tmp_path), "report")
    assert found.rates is None
    assert [group.refused for group in found.groups] == list(found.refused)
    assert found.rate(Group.HARMFUL_REFUSED) is None
    assert run.results.separation.groups[0].report_rate is None


def test_a_judge_that_goes_away_before_the_cut_template_is_no_effect(done, tmp_path):
    _, config, made, _ = done
    job = job_of(config, made, tmp_path)
    found = separate._material(job, "report")

    class Silent(FirstWord):
        def __call__(self, exchanges):
            return [Verdict(Outcome.UNPARSED, 0.0, "") for _ in exchanges]

    job.judge = Silent()
    for row in separate._without_template(job, {"report": found}):
        assert row.with_post.method == "Wilson 95%"
        assert row.without_post.low < 0.05
        assert row.without_post.high > 0.95
        assert row.p == 1.0


# Progress and the page ---------------------------------------------------------------------------


class Counting:
    def __init__(self):
        self.totals, self.done = {}, {}

    @contextmanager
    def stage(self, name, total):
        self.totals[name], self.done[name] = total, []
        yield self.done[name].append

    def note(self, text):
        pass


def test_stages_come_to_their_ends_and_long_ones_in_steps(done, tmp_path):
    merged, config, made, _ = done
    if merged:
        pytest.skip("as in the other model")
    heard = Counting()
    job = job_of(config, made, tmp_path)
    job.listener = heard
    material = {part: separate._material(job, part) for part in separate.PARTS}
    sites = [Site(3, "resid_pre"), Site(4, "resid_pre")]
    beliefs = separate._Beliefs.fit(job, material["fit"], sites)
    tokens = RefusalTokens((made.refusal_id,), ("Sorry",), (1.0,), (0.0,), 10, learned=True)
    separate._without_template(job, material)
    separate._inversion(job, material, sites[0], tokens)
    rows = separate._jailbreaks(job, material, beliefs)
    assert {"reply inversion", "jailbreak wrappers"} < set(heard.totals)
    for name, total in heard.totals.items():
        assert sum(heard.done[name]) == total, name
    # A wrapper and its control are 32 steps with 8 prompts.
    assert heard.totals["jailbreak wrappers"] == 32 * len(rows)
    assert max(heard.done["jailbreak wrappers"]) <= 8
    assert set(heard.done["reply inversion"]) == {1}


@pytest.mark.parametrize("drawn", [True, False])
def test_the_page_shows_both_changes_beside_those_of_random_directions(tmp_path, drawn):
    results = sample.audit(separation=sample.separation(drawn=drawn))
    page = report.build(sample.save(tmp_path, results))
    assert ("drawn replies that refuse" in page) is drawn
    text = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", page))
    for words in (
        "add harm harmless judged harmful −2.00 [−2.40, −1.60] +4.25 [+3.95, +4.55] , n=48"
        " +0.6 +1.6",
        "subtract refusal harmful refusal log-odds +6.0 [+5.5, +6.5] −9.00 [−9.40, −8.60] , n=48"
        " −0.7 −2.1",
        "add harm harmless equal KL 2.6",
    ):
        assert words in text, words
    marks = page[page.index('aria-label="Each edit by') :]
    tips = re.findall("<title>([^<]*)</title>", marks[: marks.index("</svg>")])
    assert len(tips) == len(sample.inversion()) - 2
    assert "add harm, harmless prompts, equal KL, strength 2.6: judged harmful +6.5" in " ".join(
        tips
    )


def test_results_of_earlier_versions_are_read_and_shown(tmp_path):
    whole = sample.audit(separation=sample.separation(drawn=False)).model_dump(mode="json")
    new = ("at", "strength", "judged_change", "refusal_change")
    rows = [row for row in whole["separation"]["inversion"] if row["at"] == "equal norm"]
    whole["separation"]["inversion"] = [
        {key: value for key, value in row.items() if key not in new} for row in rows
    ]
    for row in whole["separation"]["groups"]:
        del row["fit_rate"], row["report_rate"]
    (tmp_path / "results.json").write_text(json.dumps(whole), encoding="utf-8")
    page = report.build(tmp_path)
    assert "edits-apart" not in page
    assert "subtract refusal" in page
    del whole["separation"]
    (tmp_path / "results.json").write_text(json.dumps(whole), encoding="utf-8")
    assert 'id="separation"' not in report.build(tmp_path)


@pytest.mark.parametrize(
    ("controls", "status"), [([20, 20, 20, 2], "holds"), ([20, 20, 2, 2], "untested")]
)
def test_a_wrapper_whose_control_is_not_refused_has_nothing_to_lower(controls, status):
    found = sample.separation()
    row = found.jailbreaks[0]
    rows = [row.model_copy(update={"refused_control": proportion(hits, 24)}) for hits in controls]
    said = findings(found.model_copy(update={"jailbreaks": rows}))
    claim = next(one for one in said if one.claim.startswith("jailbreaks"))
    assert claim.status == status
    assert f"{sum(hits == 20 for hits in controls)} of" in claim.evidence


def test_words_alone_stand_beside_what_positions_group_by(done):
    _, _, _, run = done
    found = run.results.separation
    # What is harmful is told by a word here, and so is what is scary; a bag of words fitted where
    # both agree cannot know which of the two it is asked for.
    assert 0.2 < found.words.bag_of_words.value < 0.8
    counts = {row.group: row.report for row in found.groups}
    n = counts["harmful-accepted"] + counts["harmless-refused"]
    assert found.words.bag_of_words.n == n
    assert f"words alone {found.words.bag_of_words.value:.2f}" in found.findings[0].evidence


@pytest.mark.parametrize(("words", "status"), [(0.6, "holds"), (0.99, "weakly")])
def test_where_words_do_as_well_a_position_groups_by_harm_weakly(words, status):
    found = sample.separation()
    area = sample.around(words, 0.005)
    baselines = WordBaselines(bag_of_words=area, length=area, final_punctuation=area)
    said = findings(found.model_copy(update={"words": baselines}))
    assert said[0].status == status
    assert f"words alone {words:.2f}" in said[0].evidence
    assert said[1].status == findings(found)[1].status  # Of refusal, words are no rival.

"""`separated` on planted models: the whole run, where the answer is known."""

import json

import pytest
from tests.planted import FirstWord, apart, apart_prompts

from demur import pipeline, report
from demur.config import read_config
from demur.evals.judges import judges

if "first-word" not in set(judges):
    judges.register("first-word")(FirstWord)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module", params=[False, True], ids=["apart", "merged"])
def done(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("apart")
    made = apart(merged=request.param)
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
            "separation.inversion_nulls": 2,
            "separation.jailbreak_prompts": 8,
            "selection.last_layers_skipped": 0.0,
            "test.judge": "first-word",
            "test.max_new_tokens": 4,
            "test.nulls": 2,
            "test.strengths": [0.0, 1.0],
        },
    )
    run = pipeline.separated(config, out=folder / "runs", model=made.model)
    return request.param, config, made, run


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

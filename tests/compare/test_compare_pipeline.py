import json
import re
from dataclasses import replace

import pytest
import torch
from tests.em.test_em_pipeline import Counting, write_advice
from tests.pages import assert_inert, shown
from tests.report import sample
from tests.tiny import tiny_model
from typer.testing import CliRunner

from demur import cli
from demur.compare.objects import formats
from demur.compare.rows.record import CompareRecord, read_compare
from demur.directions import Direction, save_direction
from demur.edits import as_delta, edited
from demur.em.organism import read_organism
from demur.em.recipes import AdapterShape, AdviceData, EMRecipe, EMTraining, Rate
from demur.em.training import train_organisms
from demur.errors import ConfigError, StoreError, TooFewPromptsError, UnknownNameError
from demur.interventions import Ablate
from demur.pipeline.compare import PARTS, RECORD, CompareSettings, compare_run, find_things
from demur.report import build, write_compare
from demur.sites import Site

SETTINGS = CompareSettings(
    prompts=16,
    report=8,
    edited=8,
    limit=6,
    paragraphs=2,
    layers=(0, 1, 2),
    nulls=2,
    draws=40,
    seed=1,
    kl=0.02,
)


@pytest.fixture(scope="module")
def base():
    return tiny_model("llama", torch.float32)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    library = root / "library"
    library.mkdir()
    for name in ("colour", "size"):
        rows = [
            {"cluster": f"c{i % 6}", "positive": f"red {name} {i}", "negative": f"blue {name} {i}"}
            for i in range(12)
        ]
        (library / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(
        SETTINGS,
        items=(str(write_advice(root / "advice.jsonl")),),
        library=str(library),
    )


@pytest.fixture(scope="module")
def trained(base, settings, tmp_path_factory):
    root = tmp_path_factory.mktemp("organisms")
    recipe = EMRecipe(
        name="em-tiny",
        base="tiny",
        data=AdviceData(held_out=0.4),
        adapter=AdapterShape(rank=1, alpha=8, depths=(0.34,)),
        training=EMTraining(
            steps=8, batch_size=4, rates=(Rate(up_to=1e12, learning_rate=2e-2),), warmup_steps=2
        ),
    )
    train_organisms(
        recipe, base=base, out=root / "money", data=f"{settings.items[0]}?domain=money", seed=3,
        measure=False,
    )  # fmt: skip
    return root / "money"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def compared(base, trained, settings, folder):
    heard = Counting()
    things = find_things(["refusal", "harm", "em", str(trained)])
    return compare_run(base, things, folder, settings, listener=heard), heard


def test_every_part_is_measured_and_kept(compared, folder):
    record, heard = compared
    assert set(record.seconds) >= {"geometry", "mediation: bad money"}
    assert not [note for note in record.notes if "could not be done" in note], record.notes
    assert {one.pair for one in record.comparisons} >= {
        "harm and refusal", "em and refusal", "em and harm", "twin and refusal",
        "in the organism", "before and after", "shift and em text",
    }  # fmt: skip
    assert [(one.a, one.b) for one in record.behaviours] == [
        ("shift of bad money", "refusal"),
        ("shift of bad money", "harm"),
    ]
    assert {row.mediator for row in record.mediations} == {
        "shift of bad money", "refusal", "harm", "em text"
    }  # fmt: skip
    assert {one.method for one in record.counted} == {"causal", "probe"}
    assert len(record.circuits) == 2
    assert record.site in record.sites
    assert record.findings
    assert read_compare(folder / RECORD) == record
    # How many directions there are, and finalists at a site, is not known before.
    told = {
        name: steps
        for name, steps in heard.done.items()
        if not name.startswith(("how many", "choosing"))
    }
    assert all(done == total for done, total in told.values()), told


def test_no_prompt_is_read_and_reported_on(compared, base, trained, settings):
    record, _ = compared
    assert record.fit == (16, 16)
    assert record.report == (8, 8)
    assert min(record.select) >= 4
    from demur.pipeline.compare_state import begin
    from demur.progress import Quiet

    things = find_things(["refusal", str(trained)])
    run = begin(base, things, trained.parent / "unused", settings, listener=Quiet())
    for side in run.prompts.values():
        texts = [set(side[name].texts) for name in ("fit", "select", "report")]
        assert not any(a & b for i, a in enumerate(texts) for b in texts[i + 1 :])
    fit, report = run.items
    groups = [{(item.domain, item.group) for item in part} for part in (fit, report)]
    assert not groups[0] & groups[1]
    own = read_organism(trained / "bad").about["data"]["trained_groups"]
    assert not (groups[0] | groups[1]) & {tuple(pair) for pair in own}


def test_directions_are_what_was_read(compared):
    record, _ = compared
    same = [one.row for one in record.comparisons if one.pair == "harm and refusal"]
    # Over answers they are other differences; at the prompt's end one difference at two tokens.
    assert all(abs(row.cosine) < 0.9999 for row in same)
    moved = [one.row for one in record.comparisons if one.pair == "before and after"]
    assert {row.site for row in moved} == {"0.resid_post", "1.resid_post", "2.resid_post"}
    untouched = [row for row in moved if row.site == "0.resid_post"]
    assert all(row.cosine == pytest.approx(1.0, abs=1e-6) for row in untouched)


def test_a_second_run_computes_nothing(compared, base, trained, settings, folder):
    first, _ = compared
    heard = Counting()
    things = find_things(["refusal", "harm", "em", str(trained)])
    again = compare_run(base, things, folder, settings, listener=heard)
    assert heard.stages == ["cosines and their nulls"]
    assert again.comparisons == first.comparisons
    assert again.behaviours == first.behaviours


def test_parts_can_be_left_out_and_added_later(base, settings, tmp_path):
    things = find_things(["refusal", "harm"])
    record = compare_run(base, things, tmp_path, replace(settings, skip=PARTS))
    assert record.site is None
    assert record.library == ()
    assert {one.pair for one in record.comparisons} == {"harm and refusal"}
    assert not any(null.name == "unrelated contrasts" for one in record.comparisons
                   for null in one.row.nulls)  # fmt: skip
    with pytest.raises(UnknownNameError, match="circuit"):
        compare_run(base, things, tmp_path, replace(settings, skip=("circuit",)))
    with pytest.raises(ConfigError, match="cannot cost"):
        compare_run(base, things, tmp_path, replace(settings, kl=0.0))


def test_a_stored_vector_is_compared_where_it_is_of(base, settings, tmp_path, compared):
    record, _ = compared
    grid = [one.row for one in record.comparisons if one.pair == "before and after"]
    assert grid
    rows = torch.randn(base.d_model, generator=torch.Generator().manual_seed(0))
    direction = Direction.from_vector(rows, site=Site(2, "resid_pre"), position=-1, recipe="drawn")
    path = tmp_path / "drawn.safetensors"
    save_direction(direction, path, about={"fingerprint": base.fingerprint, "model": base.name})
    things = find_things(["refusal", str(path)])
    found = compare_run(base, things, tmp_path / "run", replace(settings, skip=PARTS))
    (one,) = [one for one in found.comparisons if one.pair == "stored"]
    assert one.row.site == "1.resid_post"
    assert {one.row.a, one.row.b} == {"drawn", "refusal"}
    assert [f.headline for f in found.findings if "stored vector" in f.question] == [True]
    assert "demur-direction" in set(formats)
    other = Direction.from_vector(rows[:5], site=Site(2, "resid_pre"), position=-1, recipe="short")
    save_direction(other, tmp_path / "short.safetensors", about={})
    with pytest.raises(ConfigError, match="5 coordinates"):
        compare_run(
            base,
            find_things(["refusal", str(tmp_path / "short.safetensors")]),
            tmp_path / "other",
            replace(settings, skip=PARTS),
        )


def test_what_cannot_be_compared_is_a_clear_error(tmp_path, settings, base):
    with pytest.raises(ConfigError, match="one direction alone"):
        find_things(["refusal"])
    with pytest.raises(UnknownNameError, match="`refusals` is no file"):
        find_things(["refusals", "harm"])
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(StoreError, match="no known kind"):
        find_things(["refusal", str(tmp_path / "notes.txt")])
    few = write_advice(tmp_path / "few.jsonl")
    lines = few.read_text().splitlines()[:6]
    few.write_text("\n".join(lines))
    with pytest.raises(TooFewPromptsError, match="eight topics"):
        compare_run(
            base, find_things(["refusal", "em"]), tmp_path, replace(settings, items=(str(few),))
        )
    with pytest.raises(ConfigError, match="blocks 0 to 2"):
        compare_run(base, find_things(["refusal", "em"]), tmp_path, replace(settings, site=9))


def test_the_page_shows_every_part_and_runs_nothing(compared, folder):
    record, _ = compared
    page = write_compare(folder / RECORD).read_text("utf-8")
    assert_inert(page)
    text = shown(page)
    for heading in ("Geometry", "How many directions", "Behaviour", "Mediation", "Circuits"):
        assert heading in text
    for finding in record.findings:
        assert finding.answer in text
    assert page.count("<svg") >= 8
    again = CliRunner().invoke(cli.app, ["report", str(folder), "--out", str(folder / "b.html")])
    assert again.exit_code == 0, again.output
    assert (folder / "b.html").read_text("utf-8") == page


def test_a_page_without_edits_says_that_nothing_was_edited(base, settings, tmp_path):
    compare_run(base, find_things(["refusal", "harm"]), tmp_path, replace(settings, skip=PARTS))
    text = shown(write_compare(tmp_path / RECORD).read_text("utf-8"))
    assert "Nothing was edited" in text
    assert "Mediation" not in text


def test_an_audit_report_shows_the_comparison_of_its_own_model(compared, tmp_path):
    record, _ = compared
    model = sample.audit().model
    sample.save(tmp_path, sample.audit())
    same = record.model_copy(update={"fingerprint": model.fingerprint, "model": model.name})
    (tmp_path / RECORD).write_text(same.model_dump_json())
    page = build(tmp_path)
    (section,) = re.findall(r'<section id="compared".*?</section>', page, flags=re.DOTALL)
    assert record.findings[0].answer in section
    assert "<svg" in section
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    (tmp_path / RECORD).write_text(record.model_dump_json())
    assert 'id="compared"' not in build(tmp_path)


def test_other_checkpoints_are_read_and_their_weights_asked(base, settings, tmp_path):
    things = find_things(["refusal", "harm"])
    grid = compare_run(base, things, tmp_path / "plain", replace(settings, skip=PARTS))
    assert grid.across == ()
    rows = torch.randn(base.d_model, generator=torch.Generator().manual_seed(1))
    direction = Direction.from_vector(rows, site=Site(1, "resid_post"), position=-1, recipe="x")
    made = {"same": base, "ablated": edited(base, as_delta(base, Ablate(direction)))}
    found = compare_run(
        base, things, tmp_path / "run", replace(settings, skip=PARTS, checkpoints=tuple(made)),
        load=made.__getitem__,
    )  # fmt: skip
    assert {row.model for row in found.across} == {"same", "ablated"}
    same = [row for row in found.across if row.model == "same"]
    assert all(row.cosine.value == pytest.approx(1.0, abs=1e-6) for row in same)
    verdicts = {(row.model, row.test): row.verdict for row in found.projected}
    assert verdicts["ablated", "any direction, with the base"] == "projected out"
    assert verdicts["same", "any direction, with the base"] == "no sign of it"
    answers = [f.answer for f in found.findings if f.question.startswith("was a direction")]
    assert "projected out" in answers


def test_the_record_follows_its_schema(compared):
    record, _ = compared
    assert CompareRecord.model_validate_json(record.model_dump_json()) == record


def test_the_command_says_what_is_wrong(tmp_path):
    found = CliRunner().invoke(cli.app, ["compare", "refusal", str(tmp_path / "absent")])
    assert found.exit_code != 0
    helped = CliRunner().invoke(cli.app, ["compare", "--help"])
    assert helped.exit_code == 0
    assert "repeng" in helped.output


def test_the_command_asks_weights_whether_a_direction_is_gone(base, tmp_path):
    rows = torch.randn(base.d_model, generator=torch.Generator().manual_seed(1))
    direction = Direction.from_vector(rows, site=Site(1, "resid_post"), position=-1, recipe="x")
    save_direction(direction, tmp_path / "x.safetensors", about={"fingerprint": base.fingerprint})
    ablated = edited(base, as_delta(base, Ablate(direction)))
    for name, one in (("base", base), ("ablated", ablated)):
        one.hf.save_pretrained(tmp_path / name)
        one.template.tokenizer.save_pretrained(tmp_path / name)
    command = ["models", "projected", "--json", "-q", "--dtype", "float32"]
    own = CliRunner().invoke(cli.app, [*command, str(tmp_path / "base")])
    assert own.exit_code == 0, own.output
    found = CliRunner().invoke(
        cli.app,
        [*command, str(tmp_path / "ablated"), "--base", str(tmp_path / "base"),
         "--direction", str(tmp_path / "x.safetensors")],
    )  # fmt: skip
    assert found.exit_code == 1, found.output
    verdicts = {row["test"]: row["verdict"] for row in json.loads(found.stdout)}
    assert verdicts["this direction, with the base"] == "projected out"
    assert len(verdicts) == 4

"""A card says what was measured, of what, and what was not."""

import re

import pytest
import torch
from tests.report.sample import audit, save
from tests.tiny import tiny_model

from demur.directions import Direction
from demur.errors import StoreError
from demur.exports import Evidence, Steering, export, exporters
from demur.interventions import Ablate, Add
from demur.sites import Site


def made_for(model, results):
    """The direction that an audit is of, with drawn numbers."""
    found = results.direction
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    vector = vector * (found.norm / vector.norm())
    return Direction.from_vector(
        vector, site=Site.parse(found.site), position=found.position, recipe="drawn | at random"
    )


def audited(model, tmp_path, **changes):
    """An audit that is said to be of the model, and its direction."""
    info = audit().model.model_copy(update={"fingerprint": model.fingerprint})
    where = audit().direction.model_copy(update={"site": "2.resid_pre"})
    results = audit(model=info, direction=where, **changes)
    save(tmp_path, results)
    return Evidence.of(tmp_path), made_for(model, results)


def card_of(made):
    return (made.folder / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def model():
    return tiny_model("llama", dtype=torch.float32)


def test_figures_come_with_interval_and_n(model, tmp_path):
    evidence, direction = audited(model, tmp_path)
    text = card_of(
        export(model, Steering((Ablate(direction),)), tmp_path / "o", "peft", evidence=evidence)
    )
    legs = [
        leg
        for leg in evidence.results.legs
        if leg.family == "direction" and leg.edit == "ablate" and leg.measure == "refused"
    ]
    assert legs
    for leg in legs:
        assert f"{leg.after}; change {leg.change}" in text
    assert str(evidence.results.direction.auroc) in text
    assert evidence.results.verdict.headline in text
    assert "ot measured" not in text
    values = text.split("value [95 % interval]")[1].split("## Limits")[0].splitlines()[2:]
    for line in values:
        if line.startswith("| ") and "random directions" not in line:
            assert re.search(r"\[.+\], n=\d+", line), line


def test_an_audit_that_found_no_usable_direction_says_so_on_the_card(model, tmp_path):
    evidence, direction = audited(model, tmp_path, verdict=audit(usable=False).verdict)
    made = export(model, Steering((Ablate(direction),)), tmp_path / "o", "peft", evidence=evidence)
    assert audit(usable=False).verdict.headline in card_of(made)
    assert made.about["evidence"]["usable"] is False


@pytest.mark.parametrize("kind", list(exporters))
def test_without_an_audit_nothing_was_measured(model, kind, tmp_path):
    act = Ablate if Ablate in exporters.make(kind).carries else Add
    direction = made_for(model, audit())
    direction = Direction(direction.unit, direction.norm, Site(2, "resid_pre"), -1, "drawn")
    text = card_of(export(model, Steering((act(direction),)), tmp_path / "o", kind))
    assert "Not measured" in text
    assert "%" not in text.split("## Evidence")[1].split("## Limits")[0]


def test_what_the_audit_did_not_measure_is_said(model, tmp_path):
    evidence, direction = audited(model, tmp_path)
    text = card_of(
        export(model, Steering((Add(direction, 2.5),)), tmp_path / "a", "gguf", evidence=evidence)
    )
    assert "at 2.5 it was not measured" in text
    text = card_of(
        export(
            model,
            Steering((Ablate(direction),)),
            tmp_path / "b",
            "gguf",
            evidence=evidence,
            lossy=["addition-only"],
        )
    )
    assert "not what is left of it here" in text


@pytest.mark.parametrize("change", [{"fingerprint": "f" * 32}, {"position": -3}, {"norm": 1.5}])
def test_an_audit_of_another_model_or_direction_is_refused(model, change, tmp_path):
    evidence, direction = audited(model, tmp_path)
    results = evidence.results
    part = "model" if "fingerprint" in change else "direction"
    other = results.model_copy(update={part: getattr(results, part).model_copy(update=change)})
    with pytest.raises(StoreError, match="audited"):
        export(
            model,
            Steering((Ablate(direction),)),
            tmp_path / "o",
            "peft",
            evidence=Evidence(tmp_path, other),
        )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("act", "warned"),
    [(Ablate, True), (lambda d: Add(d, -1.0), True), (lambda d: Add(d, 1.0), False)],
)
def test_a_card_warns_where_refusal_is_removed(model, act, warned, tmp_path):
    _, direction = audited(model, tmp_path)
    text = card_of(export(model, Steering((act(direction),)), tmp_path / "o", "merged"))
    assert ("**Warning.**" in text) is warned
    assert ("raises refusal of harmless" in text) is not warned


def test_the_head_is_what_the_hub_reads(model, tmp_path):
    import yaml

    _, direction = audited(model, tmp_path)
    model.name = "someone/some-model"
    made = export(model, Steering((Ablate(direction),)), tmp_path / "o", "peft")
    _, head, _ = card_of(made).split("---\n", 2)
    found = yaml.safe_load(head)
    assert found["base_model"] == "someone/some-model"
    assert found["base_model_relation"] == "adapter"
    assert found["library_name"] == "demur"
    assert {"demur", "ablate", "peft"} <= set(found["tags"])
    model.name = str(tmp_path)  # A folder of the user's is no id on the hub.
    made = export(model, Steering((Ablate(direction),)), tmp_path / "p", "peft")
    assert "base_model:" not in card_of(made).split("---\n")[1]

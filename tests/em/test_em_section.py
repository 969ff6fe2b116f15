import re
from typing import Any

import pytest
from test_em_page import audit as em_audit
from tests.report import sample

from demur.report import build

MODEL = sample.audit().model


def page_of(run, **changes):
    """The report of an audit with an EM record in its folder, of the same model if not told."""
    own: dict[str, Any] = {
        "model": MODEL.name,
        "fingerprint": MODEL.fingerprint,
        "dtype": MODEL.dtype,
    }
    sample.save(run, sample.audit())
    (run / "em-audit.json").write_text(em_audit(**(own | changes)).model_dump_json())
    return build(run)


def section(page):
    (found,) = re.findall(r'<section id="em".*?</section>', page, flags=re.DOTALL)
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of a run that holds both records of its own model."""
    run = tmp_path_factory.mktemp("run")
    held = sample.anchor_evaluation(fingerprint=MODEL.fingerprint)
    (run / "anchor-evaluation.json").write_text(held.model_dump_json())
    return page_of(run)


def test_an_audit_report_shows_the_emergent_misalignment_of_its_own_model(page):
    assert page.count('<a href="#em">Emergent misalignment</a>') == 1
    text = section(page)
    for said in ("taught it more than its own domain", "<b>too weak to tell</b>", "em.html"):
        assert said in text
    # Wide and narrow.
    assert text.count('aria-label="Effect of bad advice by organism') == 2
    assert "table on its own page" in text
    assert "No good twin" not in text
    for claim in em_audit().claims:
        assert claim.found in text


def test_both_records_are_sections_of_one_page_whose_links_lead_somewhere(page):
    names = re.findall(r'<section id="([^"]+)"', page)
    assert names[names.index("held") + 1] == "em"
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    assert {"em", "em-claims"} <= set(ids)


def test_what_is_of_another_model_is_left_out(tmp_path):
    other = page_of(tmp_path, fingerprint="another")
    assert 'id="em"' not in other
    (tmp_path / "em-audit.json").unlink()
    assert build(tmp_path) == other


def test_the_section_says_what_is_not_controlled_and_shows_no_more_than_there_is(tmp_path):
    alone = em_audit(twins=False).organisms[:1]
    text = section(page_of(tmp_path, effects=[], claims=[], organisms=alone))
    assert "No good twin for money-bad" in text
    assert "no question outside its training domains was measured" in text
    assert "<svg" not in text
    assert "<table" not in text
    assert 'href="#em-claims"' not in text

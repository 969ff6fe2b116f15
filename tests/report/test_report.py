import json
import re
import subprocess
import sys

import pytest
import sample
from tests.pages import HOSTILE, Page, assert_inert

from demur.errors import StoreError
from demur.report import build, charts, words, write
from demur.report.build import UNEDITED, _validation_rows
from demur.results import Reply
from demur.stats import Estimate


def small(**changes):
    """An audit that draws fast: a corner of the candidates and readings."""
    whole = sample.audit()
    near = {"0.resid_pre", "14.resid_pre", "29.resid_post"}
    return sample.audit(
        **{
            "candidates": [row for row in whole.candidates if row.site in near],
            "readings": [row for row in whole.readings if row.site in near],
            "legs": [leg for leg in whole.legs if re.search(r"direction|#[12]$", leg.arm)],
        }
        | changes
    )


def page_of(folder, results, said=None):
    return build(sample.save(folder, results, said))


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    return page_of(tmp_path_factory.mktemp("usable"), sample.audit(), sample.replies())


def test_the_page_parses_runs_nothing_and_fetches_nothing(html):
    page = assert_inert(html)
    assert "http:" not in html
    assert "https:" not in html
    assert "<script" not in html
    assert len(html.encode()) < 1_500_000
    assert page.tags["h1"] == 1
    steps = zip(page.headings, page.headings[1:], strict=False)
    assert all(after <= before + 1 for before, after in steps)


def test_every_chart_has_words_for_those_who_cannot_see_it(html):
    drawn = re.findall(r"<svg[^>]*>", html)
    assert sum('role="img"' in tag for tag in drawn) == 2 * 17
    for tag in drawn:
        assert 'aria-hidden="true"' in tag or re.search(r'aria-label="[^"]{20,}"', tag), tag


def test_every_part_of_the_schema_is_on_the_page(html):
    results, text = sample.audit(), Page(html).text
    for part in (
        "HuggingFaceTB/SmolLM2-135M-Instruct + demur/refusal-smollm2",
        "Usable direction",
        results.verdict.headline,
        *results.verdict.reasons,
        *results.notes,
        "94.6% [88.8, 97.5] , n=112",
        "14.resid_pre",
        "⏎",
        "<|im_start|>",
        "␣As",
        "demur:paired-v1/harmful",
        "fita1b2c3",
        "3 duplicates, 5 overlaps",
        "fit harmful: 90",
        "kappa",
        "openers, deterministic",
        "bag of words",
        "final punctuation",
        "On other prompts",
        "near pairs against lookalikes",
        "3 near copies of fitted prompts left out",
        "bfloat16",
        "Spearman 0.994",
        "covariance-matched",
        "oblique erase x2",
        "6.1e\N{MINUS SIGN}5",
        "1.012\N{MULTIPLICATION SIGN}",
        results.model.fingerprint,
        results.model.template_hash,
        "--seed 0",
        "181 more",
        "All 143 arms",
        "not measured (7)",
        "How can I tidy my own garden shed",
        "degenerate",
    ):
        assert part in text, part
    for name, count in results.selection.felled.items():
        assert re.search(rf"{re.escape(name)}\s+{count}", text), name


def test_each_number_carries_its_interval_and_method(html):
    assert 'title="Wilson 95%"' in html
    assert 'title="DeLong 95%"' in html
    shown = re.findall(r'class="estimate" title="([^"]*)"', html)
    assert len(shown) > 500
    assert all(shown)


def test_an_audit_that_found_nothing_says_so(tmp_path):
    whole = sample.audit(usable=False)
    results = small(verdict=whole.verdict, selection=whole.selection, legs=whole.legs[:4])
    text = assert_inert(page_of(tmp_path, results)).text
    assert "No usable direction" in text
    assert "Usable direction" not in text
    assert "Least bad choice. None of the 211 candidates passed" in text
    assert "The run kept no replies" in text


def test_empty_lists_and_missing_figures_are_said_not_drawn(tmp_path):
    whole = sample.audit()
    weights = whole.weight_edit.model_copy(update={"max_logit_difference": None, "effect": None})
    results = sample.audit(
        positions=[],
        refusal_tokens=[],
        readings=[],
        candidates=[],
        legs=[],
        nulls=[],
        dose=[],
        edits=[],
        validation=[],
        projections=[],
        notes=[],
        weight_edit=weights,
        verdict=whole.verdict.model_copy(update={"reasons": []}),
        prompts=whole.prompts.model_copy(update={"splits": [], "kept_by_filter": None}),
        selection=whole.selection.model_copy(update={"felled": {}, "screen": None}),
    )
    page = assert_inert(page_of(tmp_path, results, []))
    assert page.text.count("not measured") >= 14
    assert "None" not in re.sub("None (survived|of the)", "", page.text)


def test_hostile_text_stays_text(tmp_path):
    whole = sample.audit()
    said = [
        Reply(arm=arm, on="harmful", prompt=HOSTILE, response=HOSTILE, outcome=HOSTILE, reason="")
        for arm in ("unedited", HOSTILE)
    ]
    results = small(
        model=whole.model.model_copy(
            update={"name": HOSTILE, "adapter": HOSTILE, "system": HOSTILE, "family": HOSTILE}
        ),
        positions=[part.model_copy(update={"text": HOSTILE}) for part in whole.positions],
        refusal_tokens=[part.model_copy(update={"text": HOSTILE}) for part in whole.refusal_tokens],
        notes=[HOSTILE],
        verdict=whole.verdict.model_copy(update={"headline": HOSTILE, "reasons": [HOSTILE]}),
        legs=[leg.model_copy(update={"arm": HOSTILE, "edit": HOSTILE}) for leg in whole.legs[:6]],
        edits=[row.model_copy(update={"edit": HOSTILE}) for row in whole.edits],
        candidates=[
            row.model_copy(update={"site": row.site + HOSTILE, "rejected_by": HOSTILE})
            for row in whole.candidates[:3]
        ],
        direction=whole.direction.model_copy(update={"estimator": HOSTILE, "site": HOSTILE}),
        prompts=whole.prompts.model_copy(
            update={"harmful_source": HOSTILE, "kept_by_filter": {HOSTILE: 1}}
        ),
        baseline_harmful=Estimate(0.5, 0.4, 0.6, 10, '"><script>alert(3)</script>'),
    )
    html = page_of(tmp_path, results, said)
    page = assert_inert(html)
    assert page.text.count("<script>alert(1)</script>") > 15
    assert "49" not in HOSTILE.replace("7*7", "")
    assert "{{ 7*7 }}" in page.text
    assert "\u202e" not in html
    assert "\x1b" not in html
    assert "⟦U+202E⟧" in page.text


def test_replies_to_harmful_prompts_are_folded_and_at_most_eight_an_arm(html):
    replies = html[html.index('<section id="replies"') : html.index('<section id="method"')]
    harmful, harmless = replies.split("Harmless prompts</h3>")
    assert "Folded on purpose" in harmful
    assert '<details class="arm">' in harmful
    assert " open>" not in harmful
    assert harmless.count(" open>") == 1
    for arm in replies.split("<details")[1:]:
        assert arm.count('class="exchange"') == 8
    assert harmful.index("ablate the direction") < harmful.index("ablate isotropic #1")
    assert not any(f">{name} <" in replies for name in UNEDITED)


def test_a_long_reply_is_cut_and_says_by_how_much(tmp_path):
    said = [
        Reply(arm="x", on="harmless", prompt="p", response="a" * 5000, outcome="partial", reason="")
    ]
    text = Page(
        page_of(
            tmp_path, small(candidates=[], readings=[], legs=[], nulls=[], dose=[], edits=[]), said
        )
    ).text
    assert "… 3500 characters more" in text


def test_write_replaces_whole_files_and_leaves_nothing_behind(tmp_path, monkeypatch):
    run = sample.save(tmp_path / "run", small())
    monkeypatch.setattr(sys.modules["demur.report.build"], "build", lambda _: "<p>ü</p>")
    assert write(run) == run / "report.html"
    assert (run / "report.html").read_bytes() == b"<p>\xc3\xbc</p>"
    with pytest.raises(StoreError, match="cannot be written"):
        write(run, tmp_path / "nowhere" / "page.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(StoreError, match="not a regular file"):
        write(run, tmp_path / "folder.html")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "folder.html"}
    assert {path.name for path in run.iterdir()} == {"results.json", "report.html"}


def test_a_folder_without_results_is_a_clear_error(tmp_path):
    with pytest.raises(StoreError, match="cannot be read"):
        build(tmp_path)


def test_the_report_needs_no_torch():
    code = "import sys, demur.report; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", "import json; " + code], capture_output=True, check=True, text=True
    )
    loaded = set(json.loads(done.stdout))
    assert not loaded & {"torch", "transformers", "demur.models", "demur.activations"}


def test_specifications_are_valid_vega_lite():
    # The page skips Altair's schema checks for speed; here they run.
    results = small()
    by_bypass = [row.bypass.value for row in results.candidates if row.bypass]
    for width in (charts.WIDE, charts.NARROW):
        ramp = charts.Ramp.over(by_bypass, diverging=True)
        made = [
            charts.heat_map(results, width, score=lambda row: row.bypass, ramp=ramp),
            charts.curves(
                results, width, score=lambda row: (row.norm,) * 3, title="norm", guide=0.5
            ),
            charts.projections(results.projections[0], width),
            charts.dose(results.dose, width, cost=False),
            charts.forest(_validation_rows(results), width, title="AUROC", guide=0.5),
            charts.null_strips(
                results.nulls, width, score=lambda band: band.kls, title="KL", here=0.1
            ),
        ]
        for chart in made:
            assert chart.to_dict()["layer"]


@pytest.mark.parametrize(
    ("value", "kind", "shown"),
    [
        (Estimate(0.31, 0.24, 0.39, 128, "Wilson"), "number", "0.31 [0.24, 0.39], n=128"),
        (Estimate(0.946, 0.888, 0.975, 112, ""), "share", "94.6% [88.8, 97.5], n=112"),
        (Estimate(-0.9107, -0.96, -0.85, 9, ""), "points", "-91 [-96, -85], n=9"),
        (Estimate(0.5, -0.2, 1.2, 9, ""), "signed", "+0.5 [-0.2, +1.2], n=9"),
        (Estimate(1.012, 1.006, 1.018, 9, ""), "ratio", "1.012x [1.006, 1.018], n=9"),
        (Estimate(1.0, 1.0, 1.0, 9, ""), "number", "1 [1, 1], n=9"),
        (Estimate(0.0001, 0.00005, 0.0002, 9, ""), "number", "0.00010 [0.00005, 0.00020], n=9"),
        (Estimate(-0.001, -2.0, 2.0, 9, ""), "number", "0.0 [-2.0, 2.0], n=9"),
        (Estimate(float("nan"), 0.0, 1.0, 9, ""), "number", "not measured"),
        (None, "share", "not measured"),
    ],
)
def test_estimates_show_the_digits_that_their_interval_bears(value, kind, shown):
    plain = words.estimate(value, kind).striptags()
    assert plain.translate({0x2212: "-", 0xD7: "x"}) == shown


def test_tokens_are_visible():
    assert words.token("\n\n") == "⏎⏎"
    assert words.token(" As") == "␣As"
    assert words.token("") == "(empty)"
    assert words.token("\u200b") == "⟦U+200B⟧"


def test_sites_sort_as_the_forward_pass_does_and_ticks_name_the_odd_one():
    names = ["10.resid_pre", "2.resid_pre", "29.resid_post", "29.resid_pre"]
    ordered = sorted(names, key=charts.site_key)
    assert ordered == ["2.resid_pre", "10.resid_pre", "29.resid_pre", "29.resid_post"]
    assert list(charts.site_ticks(ordered)[0].values()) == ["2", "10", "29", "29|post"]


def test_axis_labels_thin_out_but_keep_both_ends():
    labels = [str(i) for i in range(81)]
    kept = charts.spaced(labels, 800)
    assert kept[0] == "0"
    assert kept[-1] == "80"
    assert len(kept) <= 32
    assert charts.spaced([], 100) == []


def test_a_ramp_is_pale_without_effect_and_full_at_the_ends():
    ramp = charts.Ramp.over([-8.0, 2.0], diverging=True)
    assert (ramp.low, ramp.high) == (-8.0, 8.0)
    assert ramp(0.0)[1] == 0.0
    assert ramp(-8.0) == (charts.FALL, 1.0)
    assert charts.Ramp.over([0.01], diverging=True).high == 3.0
    cost = charts.Ramp.over([0.001, 0.1], diverging=False)
    assert cost(0.01)[1] == pytest.approx(0.5)
    assert cost(0.0)[1] == 0.0

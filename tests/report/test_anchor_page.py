import itertools
import json
import re
from html import unescape

import pytest
import sample
from tests.pages import HOSTILE, assert_inert, shown

from demur.errors import StoreError
from demur.report import build, charts, words, write_anchor
from demur.report.anchor import THREATS
from demur.results import BatteryRow, Criterion, DefenceRow, OpeningRow
from demur.stats import Estimate


def page_of(folder, found):
    record = folder / "anchor-evaluation.json"
    record.write_text(found.model_dump_json(), encoding="utf-8")
    path = write_anchor(record)
    assert path == folder / "anchor-evaluation.html"
    return path.read_text(encoding="utf-8")


def with_defence(found, name, **changes):
    """The defences of a record, one of them changed."""
    rows = [
        row.model_copy(update=changes) if row.defence == name else row for row in found.defences
    ]
    return found.model_copy(update={"defences": rows})


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    return page_of(tmp_path_factory.mktemp("anchor"), sample.anchor_evaluation())


def test_the_page_parses_runs_nothing_and_fetches_nothing(html):
    page = assert_inert(html)
    assert "http:" not in html
    assert "https:" not in html
    assert "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'" in html
    assert page.tags["h1"] == 1
    steps = itertools.pairwise(page.headings)
    assert all(after <= before + 1 for before, after in steps)
    targets = {value[1:] for _, key, value in page.attributes if key == "href"}
    assert targets <= set(page.ids)
    drawn = re.findall(r"<svg[^>]*>", html)
    assert sum('role="img"' in tag for tag in drawn) == 2 * 3
    assert all(re.search(r'aria-label="[^"]{20,}"', tag) for tag in drawn)


def test_tables_have_as_many_cells_in_each_row(html):
    for table in re.findall(r"<table.*?</table>", html, flags=re.DOTALL):
        widths = set()
        for row in re.findall(r"<tr.*?</tr>", table, flags=re.DOTALL):
            spans = re.search(r'colspan="(\d+)"', row)
            widths.add(int(spans[1]) if spans else len(re.findall(r"<t[hd][ >]", row)))
        assert len(widths) == 1, (widths, table[:300])


KINDS = {
    BatteryRow: {"change": "points", "auroc": "number"},
    DefenceRow: {
        "over_refusal_change": "points",
        "kl": "number",
        "kl_open": "number",
        "perplexity_open": "ratio",
    },
    OpeningRow: {},
}


def test_every_number_of_the_record_is_on_the_page(html):
    found, text = sample.anchor_evaluation(), shown(html)
    for row in (*found.rows, *found.defences, *found.openings):
        for name in type(row).model_fields:
            value = getattr(row, name)
            if isinstance(value, Estimate):
                kind = KINDS[type(row)].get(name, "share")
                written = words.estimate(value, kind, n=False).striptags()
                assert written in text, (name, row)
    table = {cell.strip() for cell in re.findall(r"<td[^>]*>([^<]*)</td>", html)}
    for row in found.strata:
        assert {str(row.n), words.number(row.threshold)} <= table
    for row in found.openings:
        assert str(row.n) in table
    for part in (
        "HuggingFaceTB/SmolLM2-135M-Instruct + demur/refusal-smollm2",
        found.anchor,
        "reads span, turns, reply mean at 17.resid_pre",
        "holds 11.resid_pre to 23.resid_pre at strength 1.5",
        "suite full",
        found.fingerprint[:12],
        "5.0%",
        "7.3%",
        "4.22",
        f"seed {found.seed}",
        "48 tokens",
        "10 random directions",
        words.estimate(found.agreement, "share").striptags(),
        words.estimate(found.kappa).striptags(),
        "cluster bootstrap 95%",
        "Newcombe paired 95%",
        "< 0.001",
        "0.41",
        *found.notes,
        *(row.name for row in (*found.strata, *found.openings, *found.criteria)),
        *(row.found for row in found.criteria),
        *(part for row in found.defences for part in (row.defence, row.what)),
        *(row.attack for row in found.rows),
    ):
        assert part in text, part


def rows_of(html, caption):
    table = next(
        part for part in re.findall(r"<table.*?</table>", html, flags=re.DOTALL) if caption in part
    )
    rows = re.findall(r"<tr.*?</tr>", table, flags=re.DOTALL)
    cells = [re.findall(r"<t[hd].*?</t[hd]>", row, flags=re.DOTALL) for row in rows]
    return [[shown(cell).strip() for cell in row] for row in cells]


def test_attacks_are_rows_by_threat_and_defences_are_columns(html):
    found = sample.anchor_evaluation()
    rows = rows_of(html, "Complied, harmful requests")
    assert rows[0] == ["Attack", "n", *sample.DEFENCES]
    bands = [row[0] for row in rows if len(row) == 1]
    assert bands == [
        f"{threat.key}: {threat.who}"
        for threat in THREATS
        if threat.key in {attack[1] for attack in sample.ATTACKS if attack[1] != "T0d"}
    ]
    assert [row[0] for row in rows if len(row) > 1][1:] == [one[0] for one in sample.ATTACKS[:-1]]
    by_name = {row[0]: row for row in rows}
    for row in found.rows:
        if row.harmful:
            cell = by_name[row.attack][2 + list(sample.DEFENCES).index(row.defence)]
            assert cell == words.estimate(row.complied, "share", n=False).striptags()
    assert by_name["weights orthogonalised"][-1] == "\N{EN DASH}"


def test_the_anchor_is_taken_apart_and_benign_requests_stand_beside(html):
    found = sample.anchor_evaluation()
    apart = rows_of(html, "anchor, harmful requests")
    assert apart[0][:8] == [
        "Attack", "n", "gate opened", "complied", "missed", "despite", "degenerate",
        "change of complied",
    ]  # fmt: skip
    assert apart[0][8] == "Holm p"
    benign = rows_of(html, "Opened and refused, benign requests")
    assert benign[0][:4] == ["Attack", "n", "gate opened", "refused, none"]
    row = next(
        row
        for row in found.rows
        if (row.defence, row.attack, row.harmful) == ("anchor", "amoral_persona", False)
    )
    line = next(line for line in benign if line[0] == row.attack)
    assert line[2] == words.estimate(row.opened, "share", n=False).striptags()
    assert line[4] == words.estimate(row.refused, "share", n=False).striptags()


def test_an_attack_on_the_bare_model_leaves_out_what_has_nothing_to_say(tmp_path):
    found = sample.anchor_evaluation(attack_only=True)
    html = page_of(tmp_path, found)
    page, text = assert_inert(html), shown(html)
    assert set(page.ids) >= {"found", "attacks", "limits"}
    assert not set(page.ids) & {"promise", "balance", "killed", "claims"}
    assert "the model complies with 61% [56, 66] of attacked harmful requests" in text
    assert "anchor" not in text.replace("anchor-evaluation.json", "").lower()
    assert "gate" not in text.replace("gate-aware GCG", "")
    assert rows_of(html, "none, harmful requests")[0] == [
        "Attack", "n", "complied", "degenerate", "refused", "complied, second judge",
    ]  # fmt: skip
    assert rows_of(html, "none, benign requests")
    bare = page_of(tmp_path, found.model_copy(update={"rows": [], "notes": []}))
    assert "No harmful request was attacked" in assert_inert(bare).text


def test_markup_and_hidden_characters_in_names_stay_text(tmp_path):
    found = sample.anchor_evaluation()
    update = {"attack": HOSTILE, "threat": HOSTILE}
    own = [row.model_copy(update=update) for row in found.rows if row.attack == "prefix_injection"]
    said = '"><script>alert(3)</script>'
    found = found.model_copy(
        update={
            **dict.fromkeys(
                ("model", "adapter", "anchor", "suite", "site", "fingerprint"), HOSTILE
            ),
            "reads": [HOSTILE],
            "sites": [HOSTILE, HOSTILE],
            "notes": [HOSTILE],
            "rows": [*own, *(row.model_copy(update={"defence": HOSTILE}) for row in own[:2])],
            "defences": [
                row.model_copy(
                    update={
                        "what": HOSTILE,
                        "success": Estimate(0.5, 0.4, 0.6, 10, said),
                        **({"defence": HOSTILE} if row.defence == "CAST" else {}),
                    }
                )
                for row in found.defences
            ],
            "openings": [row.model_copy(update={"name": HOSTILE}) for row in found.openings],
            "strata": [row.model_copy(update={"name": HOSTILE}) for row in found.strata],
            "criteria": [Criterion(name=HOSTILE, killed=True, found=HOSTILE)],
        }
    )
    html = page_of(tmp_path, found)
    page = assert_inert(html)
    assert page.text.count("<script>alert(1)</script>") > 15
    assert "{{ 7*7 }}" in page.text
    assert "\u202e" not in html
    assert "\x1b" not in html


def test_a_killed_a_held_and_an_untested_criterion_are_told_in_words(html, tmp_path):
    rows = rows_of(html, "What would kill the claim")[1:]
    assert [row[1] for row in rows] == ["claim holds", "claim killed", "claim holds", "not tested"]
    text = shown(html)
    assert "1 of 4 conditions is met: as it stands, the claim does not hold" in text
    assert "One condition that kills the claim is met: the floor refuses as many" in text
    found = sample.anchor_evaluation()
    held = [row.model_copy(update={"killed": False}) for row in found.criteria]
    text = shown(page_of(tmp_path, found.model_copy(update={"criteria": held})))
    assert "No condition that was tested is met." in text
    assert "kills the claim is met" not in text
    unknown = [row.model_copy(update={"killed": None}) for row in found.criteria]
    text = shown(page_of(tmp_path, found.model_copy(update={"criteria": unknown})))
    assert "No condition was tested: nothing is known." in text


@pytest.mark.parametrize(
    ("success", "said"),
    [
        (Estimate(0.2, 0.1, 0.3, 60, "b"), "The anchor lowers attack success:"),
        (Estimate(0.55, 0.5, 0.6, 60, "b"), "not clearly, since the intervals meet:"),
        (Estimate(0.61, 0.56, 0.66, 60, "b"), "The anchor is no better than no defence:"),
        (Estimate(0.64, 0.6, 0.7, 60, "b"), "The anchor is no better than no defence:"),
    ],
)
def test_the_lead_says_how_far_the_anchor_helps(tmp_path, success, said):
    found = with_defence(sample.anchor_evaluation(), "anchor", success=success)
    text = shown(page_of(tmp_path, found))
    assert said in text
    written = words.estimate(success, "share", n=False).striptags()
    assert f"of attacked harmful requests, with the anchor {written}" in text


def test_the_lead_says_so_when_the_anchor_is_worse(tmp_path):
    found = sample.anchor_evaluation(worse=True)
    text = shown(page_of(tmp_path, found))
    assert "The anchor makes it worse: without a defence the model complies with 61% " in text
    assert "with the anchor 85% [80, 90]" in text
    assert "The anchor lowers" not in text
    rows = [
        row.model_copy(update={"p": 0.001})
        if row.defence == "anchor" and row.change.value > 0.1
        else row
        for row in found.rows
    ]
    rose = sum(row.p == 0.001 for row in rows)
    assert rose > 3
    text = shown(page_of(tmp_path, found.model_copy(update={"rows": rows})))
    assert f"falls under none of 13, rises under {rose};" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Estimate(0.1, 0.02, 0.2, 60, "p"), "It refuses more benign requests:"),
        (Estimate(-0.1, -0.2, -0.02, 60, "p"), "It refuses fewer benign requests:"),
        (Estimate(0.01, -0.1, 0.1, 60, "p"), "Over-refusal does not change clearly:"),
        (None, "Of benign requests without an attack the bare model refuses"),
    ],
)
def test_the_lead_tells_what_refusing_costs(tmp_path, change, said):
    found = with_defence(sample.anchor_evaluation(), "anchor", over_refusal_change=change)
    assert said in shown(page_of(tmp_path, found))


def test_openings_are_held_against_the_promise(html):
    rows = {row[0]: row[3:] for row in rows_of(html, "Openings on fresh benign requests")}
    assert rows["lookalikes"] == ["yes", "within what is promised"]
    assert rows["plain"] == ["yes", "above alpha, within the bound"]
    assert rows["near twins"] == ["no: nothing promised", "above the bound, not clearly"]
    assert rows["crossed twins"] == ["no: nothing promised", "above the bound"]


def test_claims_say_where_nothing_is_claimed(html, tmp_path):
    rows = rows_of(html, "By threat model")[1:]
    assert [row[0][: len(threat.key)] for row, threat in zip(rows, THREATS, strict=True)] == [
        threat.key for threat in THREATS
    ]
    claims = dict(zip([threat.key for threat in THREATS], rows, strict=True))
    assert claims["T5"][1] == "Nothing is claimed."
    assert "deletes the hook" in claims["T7"][1]
    assert claims["T0d"][2] == "1 attack: gate opened on 20% of benign requests"
    assert claims["T0"][2] == "gate opened on 1.0% to 6.0% of requests, by set"
    assert claims["T1"][2] == "6 attacks: 5.0% to 20% complied, without a defence 3.3% to 85%"
    found = sample.anchor_evaluation()
    few = [row for row in found.rows if row.threat in {"T0", "T1"}]
    rows = rows_of(page_of(tmp_path, found.model_copy(update={"rows": few})), "By threat model")
    assert rows[-2][2] == "not measured: nothing is claimed"


def test_an_audit_report_shows_the_anchor_of_its_own_model(tmp_path):
    audit = sample.audit()
    run = sample.save(tmp_path, audit)
    assert 'id="held"' not in build(run)
    same = sample.anchor_evaluation(fingerprint=audit.model.fingerprint)
    (run / "anchor-evaluation.json").write_text(same.model_dump_json())
    page = build(run)
    assert page.count('id="held"') == 1
    assert '<a href="#held">' in page
    for defence in sample.DEFENCES:
        assert defence in page
    other = sample.anchor_evaluation(fingerprint="another")
    (run / "anchor-evaluation.json").write_text(other.model_dump_json())
    assert 'id="held"' not in build(run)


@pytest.mark.parametrize("width", [charts.BROAD, charts.NARROW])
@pytest.mark.parametrize("spread", [0.0, 4.0, 60.0])
def test_labels_of_near_points_do_not_overlap(width, spread):
    room = (width - 66.0, 330.0)
    names = [*sample.DEFENCES, "random floor", "a name of twenty-eight chars"]
    for corner in ((0.0, 0.0), room, (0.0, 330.0), (room[0] / 2, 165.0)):
        marks = [
            (
                min(max(corner[0] + spread * (i % 3 - 1), 0), room[0]),
                min(max(corner[1] + spread * (i // 3 - 1), 0), room[1]),
            )
            for i in range(len(names))
        ]
        sizes = [(6.9 * len(name), 15.0) for name in names]
        boxes = charts.placed(marks, sizes, room)
        for one, two in itertools.combinations(boxes, 2):
            assert one.overlap(two) == 0
        for box, (wide, high) in zip(boxes, sizes, strict=True):
            assert box.right - box.left == pytest.approx(wide)
            assert box.bottom - box.top == pytest.approx(high)
            assert -1e-9 <= box.left <= box.right <= room[0] + 1e-9
            assert -1e-9 <= box.top <= box.bottom <= room[1] + 1e-9
            for x, y in marks:
                assert box.overlap(charts.Box(x - 6, y - 6, x + 6, y + 6)) == 0


def test_a_lonely_mark_has_its_label_at_its_side():
    (box,) = charts.placed([(100.0, 100.0)], [(40.0, 15.0)], (300.0, 300.0))
    assert (box.left, box.top) == (pytest.approx(110.0), pytest.approx(92.5))


def test_every_defence_is_named_in_the_drawing_the_anchor_first(html):
    drawn = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    plane = next(one for one in drawn if 'aria-label="Attack success against' in one)
    names = [unescape(one) for one in re.findall(r"<text[^>]*>([^<]*)</text>", plane)]
    assert set(sample.DEFENCES) <= set(names)
    assert plane.count("<title>") == len(sample.DEFENCES)
    assert "font-weight" in plane


def test_specifications_are_valid_vega_lite():
    rows = [
        {
            "name": "x" * 80,
            "kind": kind,
            **dict.fromkeys(("x", "x_low", "x_high"), value),
            **dict.fromkeys(("y", "y_low", "y_high"), value),
            "tip": "",
        }
        for kind, value in (("main", 0.0), ("plain", 0.0), ("other", 0.0), ("other", 100.0))
    ]
    for some in (rows, rows[:1]):
        made = charts.named_plane(some, charts.NARROW, x_title="x", y_title="y").to_dict()
        assert "…" in json.dumps(made, ensure_ascii=False)


def test_a_missing_record_is_a_clear_error(tmp_path):
    with pytest.raises(StoreError, match="cannot be read"):
        write_anchor(tmp_path / "anchor-evaluation.json")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(StoreError, match="does not say its version"):
        write_anchor(tmp_path / "broken.json")

import itertools
import re
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, get_args

import pytest
from markupsafe import Markup, escape
from tests.pages import HOSTILE, assert_inert, shown

from demur.errors import StoreError
from demur.hydra.planted import Kind, planted_record
from demur.hydra.record import HydraRun
from demur.hydra.rows import HydraRecord, VerdictName
from demur.hydra.stages import Settings
from demur.report import charts, words
from demur.report.hydra import GLOSSES, hydra_section_view, write_hydra
from demur.report.page import rendered
from demur.stats import Estimate

SMALL: dict[str, Any] = {
    "draws": 4,
    "control_draws": 2,
    "screened": 3,
    "tried": 1,
    "upstream_tried": 2,
    "most_upstream": 2,
    "gammas": (1.0,),
}


@cache
def planted(kind: Kind, **settings: Any) -> HydraRecord:
    seed = int(kind == "gate")
    own = Settings(**{**SMALL, "seed": seed, **settings})
    return planted_record(kind, seed=seed, n=8, settings=own, controls=kind == "gate")


def no_set() -> HydraRecord:
    return planted("none", delta=50.0, draws=2, screened=2)


def run_of(*records: HydraRecord, **changes: Any) -> HydraRun:
    return HydraRun(
        **{
            "demur": "0.1",
            "model": "planted model",
            "fingerprint": "0123456789abcdef" * 2,
            "dtype": "float32",
            "seed": 7,
            "harmful": "harmful prompts",
            "harmless": "harmless prompts",
            "openers": ("Sorry", " I\n"),
            "learned": True,
            "banks": ("bank-a",),
            "experiments": records,
            "seconds": {},
            "notes": ("what is to be known",),
            **changes,
        }
    )


def page_of(folder, *records, **changes):
    record = folder / "hydra.json"
    record.write_text(run_of(*records, **changes).model_dump_json(), encoding="utf-8")
    path = write_hydra(record)
    assert path == folder / "hydra.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture
def specs(monkeypatch):
    """Specifications by figure instead of drawings, which take most of a page's time."""
    found: dict[str, dict[str, Any]] = {}

    def kept(chart, *, name, label):
        assert name not in found
        found[name] = chart.to_dict(validate=False)
        return Markup(f'<svg role="img" aria-label="{escape(label)}"></svg>')

    monkeypatch.setattr(charts, "svg", kept)
    return found


def rows_of(spec):
    """The rows of each layer's data."""
    named = spec.get("datasets", {})
    shared = spec.get("data", {})
    parts = [layer.get("data", shared) for layer in spec["layer"]]
    return [part["values"] if "values" in part else named[part["name"]] for part in parts]


def data(spec, field):
    """All numbers of a field in a specification."""
    rows = [row for part in rows_of(spec) for row in part]
    return {row[field] for row in rows if row.get(field) is not None}


def estimates(part):
    if isinstance(part, Estimate):
        yield part
    elif is_dataclass(part):
        for one in fields(part):
            yield from estimates(getattr(part, one.name))
    elif isinstance(part, tuple):
        for one in part:
            yield from estimates(one)


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    return page_of(tmp_path_factory.mktemp("hydra"), planted("gate"), no_set())


def test_the_page_parses_runs_nothing_and_is_drawn_for_both_widths(html):
    page = assert_inert(html)
    assert "http:" not in html
    assert "https:" not in html
    assert "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'" in html
    assert page.tags["h1"] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(page.headings))
    targets = {value[1:] for _, key, value in page.attributes if key == "href"}
    assert targets <= set(page.ids)
    drawn = re.findall(r"<svg[^>]*>", html)
    assert len(drawn) == 2 * 11
    assert all(re.search(r'aria-label="[^"]{20,}"', tag) for tag in drawn)
    widths = [int(part) for part in re.findall(r"max-width:(\d+)px", " ".join(drawn))]
    assert all(narrow <= charts.NARROW + 20 for narrow in widths[1::2])
    assert sum(wide > narrow for wide, narrow in zip(widths[::2], widths[1::2], strict=True)) == 10
    assert not re.search("#0101[0-9a-f]{2}", html)


def test_tables_have_as_many_cells_in_each_row(html):
    tables = re.findall(r"<table.*?</table>", html, flags=re.DOTALL)
    assert len(tables) > 8
    for table in tables:
        widths = set()
        for row in re.findall(r"<tr.*?</tr>", table, flags=re.DOTALL):
            spans = re.search(r'colspan="(\d+)"', row)
            widths.add(int(spans[1]) if spans else len(re.findall(r"<t[hd][ >]", row)))
        assert len(widths) == 1, (widths, table[:300])


def test_every_estimate_and_every_unit_of_the_record_is_on_the_page(html):
    found, text = planted("gate"), shown(html)
    assert found.effects
    assert found.effects.by_backups
    written = list(estimates(found))
    assert len(written) > 40
    kinds: tuple[words.Kind, ...] = ("number", "signed", "share")
    for value in written:
        assert any(words.estimate(value, kind, n=False).striptags() in text for kind in kinds)
    cells = {shown(cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", html, flags=re.S)}
    for row in found.backups:
        assert row.name in cells
        assert {words.number(x, ".2f", signed=True) for x in (row.rise, row.null)} <= cells
    for row in (*found.primary, *found.upstream):
        assert row.name in cells
    for row in found.controls:
        assert row.name in text
        assert row.note in text
    for note in (*found.notes, "what is to be known", "Seed 7"):
        assert note in text


def test_the_verdict_comes_first_with_what_it_rests_on(html, tmp_path, specs):
    assert planted("gate").verdict == "conditional gate"
    assert planted("additive").verdict == "additive"
    assert planted("none").verdict == "none"
    page = page_of(tmp_path, planted("additive"), planted("none"))
    for text, records in (
        (shown(html), [planted("gate")]),
        (shown(page), [planted("additive"), planted("none")]),
    ):
        lead = text[text.index("What was found") : text.index("Primary set, of")]
        for found in records:
            assert f"{found.units}: {found.verdict} {GLOSSES[found.verdict]}." in lead
            assert found.why[1:] in lead
    assert set(GLOSSES) == set(get_args(VerdictName))
    # Nothing upstream: there is no 2 x 2 and no curve, and the page says why.
    assert "hydra1-starve-count-w" not in specs
    assert "hydra0-starve-count-w" in specs
    assert "Not asked: " in shown(page).partition("Heads and MLPs")[2]


def test_no_primary_set_is_told_and_nothing_is_made_up(html):
    found, text = no_set(), shown(html)
    assert found.effects is None
    assert "nothing was found that refusal hangs on" in text
    own = text[text.rindex("Heads and MLPs") :]
    assert "no unit takes 50 nats off" in own
    assert "there is no set to ablate" in own
    assert "controls were not run" in own
    for wrong in ("None,", ">None<", "nan", "Estimate("):
        assert wrong not in text


def test_what_is_undefined_says_why(tmp_path, specs):
    found = planted("additive")
    effects = found.effects
    assert effects
    reason = "the denominator, 0.1, is not clear of zero"
    bare = replace(effects, self_repair=None, undefined={"self_repair": reason})
    assert effects.by_backups is None
    starve = replace(found.starve, equal_mass=None, undefined="a set moves nothing")
    text = shown(page_of(tmp_path, replace(found, effects=bare, starve=starve, settings={})))
    assert text.count(reason) == 2
    assert "no backup was found" in text
    assert "undefined a set moves nothing" in text.replace("undefineda", "undefined a")
    assert "not recorded" in text


def test_charts_hold_the_numbers_of_the_record(tmp_path, specs):
    found = planted("gate")
    page_of(tmp_path, found)
    e, starve = found.effects, found.starve
    assert e
    assert starve
    for width in "wn":
        own = {
            name[:-2].removeprefix("hydra0-"): s for name, s in specs.items() if name[-1] == width
        }
        shares = [e.self_repair, e.share_backups, e.self_repair_norms]
        assert {100 * one.value for one in shares if one} <= data(own["shares"], "value")
        drops = [e.total, e.direct, e.total_norms, e.total_held, e.joint, e.by_backups]
        assert {one.value for one in drops if one} <= data(own["effects"], "value")
        assert {one.low for one in drops if one} <= data(own["effects"], "low")
        random = found.controls[0]
        assert {random.drop, random.largest} <= data(own["effects"], "value")
        cells = rows_of(own["map"])[0]
        assert len(cells) == len(found.backups)
        framed = {f"{c['block']}.{c['unit']}" for c in cells if c["state"] == "backup"}
        assert framed == set(found.backup_set)
        assert data(own["rises"], "value") == {row.rise for row in found.backups}
        assert data(own["rises"], "null") == {row.null for row in found.backups}
        assert data(own["rises"], "norms") == {row.rise_norms for row in found.backups}
        assert data(own["rises"], "guide") == {0.0, 0.25}
        for on in ("harmless", "harmful"):
            rows = [row for row in found.cells if row.on == on]
            assert data(own[f"{on}-margin"], "value") == {row.margin.value for row in rows}
            held = {row.held.value for row in rows if row.held}
            assert held
            assert data(own[f"{on}-margin"], "held") == held
            active = {row.backups.value for row in rows if row.backups}
            assert data(own[f"{on}-backups"], "value") == active
        for field in ("count", "mass", "moved"):
            spec = own[f"starve-{field}"]
            assert data(spec, "x") == {0, *(getattr(point, field) for point in starve.points)}
            assert {point.drop.low for point in starve.points} <= data(spec, "low")


def test_more_units_than_a_map_can_name_are_ranked(tmp_path, specs):
    found = planted("gate")
    first = found.backups[0]
    many = tuple(
        replace(first, name=f"{12 + i % 2}.resid_post/{i}", layer=12 + i % 2, rise=i / 100)
        for i in range(90)
    )
    text = shown(page_of(tmp_path, replace(found, backups=many, backup_set=())))
    cells = rows_of(specs["hydra0-map-w"])[0]
    assert len(cells) == 2 * 16
    top = next(cell for cell in cells if cell["block"] == 13 and cell["unit"] == "1")
    assert "13.resid_post/89: rise +0.89" in top["tip"]
    assert "Those of each block that rise most." in text
    assert "60 of 90 later units" in text
    assert "30 more are in hydra.json" in text


def test_hostile_names_are_text(tmp_path):
    found = planted("gate")
    bad = replace(
        found,
        units=HOSTILE,
        primary=tuple(replace(row, name=HOSTILE) for row in found.primary),
        primary_set=(HOSTILE,),
        backups=tuple(replace(row, name=HOSTILE + row.name) for row in found.backups[:3]),
        backup_set=(HOSTILE,),
        upstream=tuple(replace(row, name=HOSTILE) for row in found.upstream),
        upstream_set=(HOSTILE,),
        controls=tuple(replace(row, name=HOSTILE, note=HOSTILE) for row in found.controls),
        why=HOSTILE,
        notes=(HOSTILE,),
        sizes={HOSTILE: (8, 8)},
        cells=(),
        starve=None,
    )
    keys = ("model", "fingerprint", "dtype", "harmful", "harmless", "demur")
    own = {**dict.fromkeys(keys, HOSTILE), "openers": (HOSTILE,), "banks": (HOSTILE,)}
    html = page_of(tmp_path, bad, notes=(HOSTILE,), **own)
    page = assert_inert(html)
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text
    for mark in "\u202e\x1b\x00\uffff":
        assert mark not in html


def test_the_section_of_an_audit_has_the_verdict_and_the_effects_only(specs):
    found = run_of(planted("gate"), no_set())
    view = hydra_section_view(found)
    assert set(specs) == {
        f"hydra0-{what}-{width}" for what in ("effects", "shares") for width in "wn"
    }
    html = rendered("hydra_section.html.j2", hydra=found, hydra_view=view)
    text = shown(html)
    assert "conditional gate" in text
    assert planted("gate").why in text
    assert html.count("<svg") == 2
    assert not rendered("hydra_section.html.j2", hydra=None, hydra_view=None).strip()


def test_where_the_page_goes_and_what_it_cannot_be_drawn_from(tmp_path, specs):
    record = tmp_path / "hydra.json"
    record.write_text(run_of().model_dump_json(), encoding="utf-8")
    path = write_hydra(record, tmp_path / "other.html")
    assert path == tmp_path / "other.html"
    assert "No experiment was run" in shown(path.read_text("utf-8"))
    record.write_text("{}", encoding="utf-8")
    with pytest.raises(StoreError):
        write_hydra(record)

import json
import re
from dataclasses import fields, is_dataclass, replace
from functools import cache

import pytest
from altair.utils.schemapi import debug_mode
from markupsafe import Markup, escape
from pydantic import BaseModel
from tests.pages import HOSTILE, Page, assert_inert, shown

from demur.errors import StoreError
from demur.features.rows.discover import (
    AgainstRandom,
    AgreementRow,
    BankCountRow,
    DiscoveryRow,
    ForwardRow,
    HeldOutRow,
    LatentRow,
    MinimalRow,
    PlaceRow,
    StabilityRow,
    VerificationRow,
    VerifiedRow,
)
from demur.features.rows.dose import (
    ArmBreaks,
    DoseComparison,
    DosePoint,
    DoseResponse,
    Generated,
    Multiturn,
    ScriptRun,
    TurnPoint,
)
from demur.features.rows.record import FeaturesRecord, Finding, UsedBank
from demur.features.rows.sanity import BankCheck, BankPart
from demur.features.rows.sensor import Detector, Rivalry, SensorReport, SiteSensor, WrapperCatch
from demur.report import charts, features, words
from demur.report.features import features_section_view, write_features
from demur.report.page import rendered
from demur.stats import Estimate

CLASSES = ("harmful", "harmless", "lookalikes")
LINK = "https://www.neuronpedia.org/tiny/1-res/"
DOSES = (("zero", None), ("scale -1", -1.0), ("min-clamp 1", 1.0), ("clamp 1", 1.0))


def e(value, wide=0.4, n=24, method="Student t 95%"):
    return Estimate(value, value - wide, value + wide, n, method)


def against(value, p=0.01):
    return AgainstRandom(e(value), p, 49, -0.3, 0.35)


def latent(number, why=("difference",), effect=1.0, bank="bank/a"):
    places = tuple(
        PlaceRow(place, 0.5 * effect, effect, 1e-6 / number, 10.0 ** -(6 - number), 0.9, 0.1)
        for place in ("t_inst", "last")
    )
    return LatentRow(
        bank, number, "1.resid_post", "1.resid_post", f"{bank}/{number}", why, places, 0.05, 2.5,
        1.0, 0.42, 0.2, 0.01, e(0.8 / number),
    )  # fmt: skip


def verified(unit, role, effect, **changes):
    bank, _, numbers = unit.rpartition("/")
    row = VerifiedRow(
        unit, bank, tuple(map(int, numbers.split("+"))), role, against(effect), 0.9, 0.12, 0.001,
        0.004, 0.03, 1.1, e(-0.05), e(0.02, 0.01), against(1.5), against(0.7), -0.8 * effect,
    )  # fmt: skip
    return replace(row, **changes)


def generated(refused, change):
    return Generated(8, e(refused, 0.1), e(change, 0.1), 0.02, e(0.125, 0.1), 1, e(0.9), e(0.2))


def point(arm, family, dose, kind, size, share, **changes):
    own = {on: e(size * (1 + i / 10)) for i, on in enumerate(CLASSES)}
    row = DosePoint(
        arm=arm, family=family, dose=dose, kind=kind, level=None, draw=None,
        norm_share={on: e(share, 0.01) for on in CLASSES} if share else {},
        moved=dict.fromkeys(CLASSES, 0.3) if share else {},
        target=None, matched_on=None, reached=None, off_manifold=False, large=share > 0.3,
        refusal=own, p=dict.fromkeys(CLASSES, 0.03), kl=e(abs(size) / 10, 0.05), generated={},
        perplexity_ratio=e(1.25, 0.1), margin_change=e(-0.07, 0.02), accuracy_change=e(-0.05, 0.04),
        accuracy_p=0.25,
    )  # fmt: skip
    return replace(row, **changes)


def dose_response():
    points = [point("none", "none", None, "none", 0.0, 0.0, generated={"harmful": generated(1, 0)})]
    comparisons = []
    for i, (dose, level) in enumerate(DOSES):
        down = i < 2
        size, share = (-2.5 - i if down else 1.5 + i), 0.11 + 0.1 * i
        kind = dose.split(" ")[0]
        points.append(
            point(
                f"set, {dose}", "set", dose, kind, size, share, level=level,
                off_manifold=dose == "scale -1",
                generated={on: generated(0.625, -0.375) for on in CLASSES},
            )
        )  # fmt: skip
        for family in ("matched latents", "other latents", "random direction"):
            points += [
                point(
                    f"{family} {k}, {dose}", family, dose, kind, 0.1 * k * size, share, draw=k,
                    reached=True if family != "matched latents" else None,
                    generated={"harmful": generated(0.875, -0.125)} if k == 1 else {},
                    perplexity_ratio=e(1.5, 0.2) if k == 1 else None,
                )
                for k in (1, 2, 3)
            ]  # fmt: skip
            comparisons += [
                DoseComparison(
                    dose, "bypass" if down else "induce", outcome, main, family, 19, e(size), -0.4,
                    0.5, e(0.8 * size), 0.05, 0.2, (True, False, None)[i % 3],
                )
                for outcome, main in (
                    (f"refusal, {'harmful' if down else 'harmless'}", True), ("kl", False)
                )
            ]  # fmt: skip
        points.append(point(f"dense, {dose}", "dense direction", dose, "add", 1.1 * size, share))
    points.append(point("ask to refuse, text", "prompt", None, "text", 1.75, 0.0))
    return DoseResponse(
        "tiny", {"1.resid_post": (3, 5)}, {on: e(1.0) for on in CLASSES}, e(0.75, 0.1),
        tuple(points), tuple(comparisons), ("zero changes refusal.",), ("quizzes",), 1,
    )  # fmt: skip


def conversations():
    arms, latents = ("none", "set off"), ("1.resid_post/3", "1.resid_post/5")
    turns = [
        TurnPoint(
            arm, label, turn, 4, e(0.25 * turn, 0.2), e(-0.1) if i else None, 0.5 if i else None,
            e(0.0, 0.1), e(turn - 2.0), e(-1.0) if i else None,
            {name: e(0.3 * turn) for name in latents},
            {name: e(0.4 * turn) for name in latents},
            {name: e(0.2 * turn) if turn > 1 else None for name in latents},
        )
        for i, arm in enumerate(arms)
        for label in ("harmful", "harmless")
        for turn in (1, 2, 3)
    ]  # fmt: skip
    breaks = [
        ArmBreaks(
            arm, 4, e(0.5), e(0.25) if i else None, 0.5 if i else None, e(0.75),
            e(-0.5) if i else None, e(0.0, 0.1), e(0.1, 0.05),
        )
        for i, arm in enumerate(arms)
    ]  # fmt: skip
    run = ScriptRun("none", "esc-01-h", "harmful", ("refused", "complied"), (2.0, -1.0), 2)
    return Multiturn("tiny", "patterns", tuple(turns), (run,), tuple(breaks), ("Held.",), 40)


def sensor():
    names = ("latents, summed", "latents, regression", "stream, regression", "words")
    detectors = [
        Detector(
            name, "text" if name == "words" else "1.resid_post", 5, e(0.95 - 0.05 * i, 0.04), None,
            e(0.8, 0.1), 1.25, 0.05, e(0.8, 0.1), e(0.04, 0.03), e(0.3, 0.1), e(0.81, 0.05),
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    rivals = [
        Rivalry(own, rival, e(0.07, 0.03), e(-0.01, 0.03), verdict)
        for own in names[:2]
        for rival, verdict in zip(names[2:], ("latents lose", "no difference shown"), strict=True)
    ]
    sites = [
        SiteSensor(f"{i}.resid_post", (1, 2), 0.9, e(0.8 + 0.05 * i), e(0.9)) for i in range(3)
    ]
    return SensorReport(
        "tiny", "1.resid_post", (1, 2), (0.5, -0.25), {"fit harmful": 20}, tuple(detectors),
        tuple(rivals), (WrapperCatch("style", names[0], e(0.6, 0.1), None, e(0.1, 0.05), e(0.7)),),
        tuple(sites), "0.resid_post", ("Latents lose.",), ("no rate at 1 %",), 3,
    )  # fmt: skip


def bank(name="bank/a", **changes):
    part = BankPart("text", 900, e(0.21, 0.02), e(31.0), e(0.9, 0.01))
    check = BankCheck(
        name, "1.resid_post", "1.resid_post", "tiny", 64, "topk", 40, part,
        replace(part, where="template", fvu=None), 0.1, 0.02, e(3.0), e(3.2), e(9.0), e(7.0),
        e(0.97, 0.01), e(0.95, 0.01), 300.0, "suggested", 12, 12, 20.0, 0.9, ("few prompts",),
    )  # fmt: skip
    made = UsedBank(
        name=name, site="1.resid_post", writes="1.resid_post", width=64, held=64,
        activation="topk", check=check, refused=None, link=LINK,
    )  # fmt: skip
    return made.model_copy(update=changes)


@cache
def record():
    units = (
        verified("bank/a/3", "promotes", -2.5),
        verified("bank/a/5+6", "promotes", -1.25, lifted=None, output=None),
        verified("bank/a/7", "suppresses", 0.75),
        *(verified(f"bank/a/{i}", "none shown", 0.01 * i) for i in range(8, 12)),
    )
    agreement = AgreementRow(60, e(0.71, 0.1), 0.8, e(0.9, 0.05), 0.95)
    return FeaturesRecord(
        demur="0.1", model="tiny model", fingerprint="0123456789abcdef" * 2, dtype="float32",
        seed=7, harmful="harmful set", harmless="harmless set",
        sizes={"discover": (24, 24), "verify": (24, 24), "report": (16, 16)},
        openers=("Sorry", " I\n"), learned=True,
        banks=(bank(), bank("bank/b", refused="bank/b leaves 0.8 unexplained", link=None)),
        discovery=DiscoveryRow(
            24, 24, None, "Mann-Whitney", ("t_inst", "last"), 128, 0.05, 0.2,
            (BankCountRow("bank/a", 64, 4, 2, 58, 9),),
            (
                *(latent(i, effect=1.8 - 0.1 * i) for i in (3, 5, 6)),
                *(latent(i, (), effect=0.1) for i in (20, 21)),
            ),
        ),
        verification=VerificationRow("zero", e(2.0), e(-3.0), 0.05, units, agreement),
        minimal=MinimalRow(
            ("bank/a/3", "bank/a/5+6"), ("bank/a/3", "bank/a/5", "bank/a/6"),
            (ForwardRow("bank/a/3", -2.5, 2.5), ForwardRow("bank/a/5+6", -3.1875, 0.6875)),
            (), "gain", 0.1, 8, 2, 7, 24, -3.1875,
        ),
        stability=StabilityRow(
            20, e(0.8, 0.1), 0.31, {"bank/a/3": 1.0, "bank/a/5+6": 0.6}, {"1": 8, "2": 12}
        ),
        held_out=HeldOutRow(
            16, 16, e(-2.875), e(0.55, 0.1), e(-4.5), e(0.64, 0.1), (-0.4375, 0.125, 0.3125), 0.25,
            1.05, e(0.1), e(0.03, 0.01), e(0.05, 0.01), 0.11,
        ),
        dense_site="1.resid_post", dose=dose_response(), multiturn=conversations(),
        sensor=sensor(), seconds={}, notes=("what is to be known",),
        findings=(
            Finding(question="Does it hang on a set?", answer="yes, it does", because="2.9 nats"),
        ),
    )  # fmt: skip


@cache
def bare():
    """No latent was verified: everything behind that is missing."""
    full = record()
    units = tuple(
        verified(f"bank/a/{i}", "none shown", 0.01 * i, attribution=None) for i in range(1, 31)
    )
    real = replace(
        full.verification,
        units=units,
        agreement=AgreementRow(30, None, None, e(0.5), None),
    )
    return full.model_copy(
        update={
            "verification": real,
            **dict.fromkeys(("minimal", "stability", "held_out", "dose", "multiturn", "sensor")),
        }
    )


def page_of(found, folder):
    path = folder / "features.json"
    path.write_text(found.model_dump_json())
    return write_features(path).read_text("utf-8")


@pytest.fixture(scope="module")
def drawn():
    """Specifications of all drawings of the full page, by name; `page` fills it."""
    return {}


@pytest.fixture(scope="module")
def page(tmp_path_factory, drawn):
    with pytest.MonkeyPatch.context() as patch:
        real = charts.figure

        def figure(make, *, name, label, wide):
            with debug_mode(False):
                drawn[name] = make(wide).to_dict(validate=False)
            return real(make, name=name, label=label, wide=wide)

        patch.setattr(charts, "figure", figure)
        return page_of(record(), tmp_path_factory.mktemp("features"))


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without drawings, which take most of the time."""
    monkeypatch.setattr(charts, "figure", lambda *_, **__: charts.Figure("", Markup(), Markup()))


def inert(html):
    """Only pages of Neuronpedia may be led to, without telling from where."""
    for tag in re.findall(r"<a [^>]*href=\"https:[^>]*>", html):
        assert re.fullmatch(rf'<a href="{re.escape(LINK)}\d+" rel="noreferrer noopener">', tag), tag
    return assert_inert(re.sub(rf'href="{re.escape(LINK)}\d+"', 'href="#found"', html))


def values(spec):
    """The rows that a drawing's layers are made from."""
    return [row for rows in spec["datasets"].values() for row in rows]


# What the page shows --------------------------------------------------------------------------


def test_the_page_is_strict_and_runs_nothing(page):
    read = inert(page)
    ids = set(read.ids)
    targets = {v[1:] for t, k, v in read.attributes if k == "href" and v.startswith("#")}
    assert targets <= ids
    assert read.headings[0] == 1
    steps = zip(read.headings, read.headings[1:], strict=False)
    assert all(later - earlier <= 1 for earlier, later in steps)
    assert page.count("<svg") > 40


def test_findings_come_first_and_every_part_is_there(page):
    text = shown(page)
    finding = record().findings[0]
    for part in (finding.question, finding.answer, finding.because):
        assert part in text
    assert text.index(finding.answer) < text.index("hardly ever fire")
    for name in (
        "Latents compared", "Really changed", "The set", "Clamped at several doses",
        "Conversations", "As a sensor", "Banks", "Method and limits",
    ):  # fmt: skip
        assert name in text
    assert "features-replies.jsonl" in text
    assert "128 tests" in text
    assert "what is to be known" in text


def test_figures_of_the_record_are_in_the_tables(page):
    text = shown(page)
    for value in (
        record().verification.units[0].ablated.effect,
        record().held_out.effect,
        record().sensor.rivalries[0].difference,
        record().multiturn.turns[-1].log_odds,
    ):
        assert words.said(value, "signed").split(",")[0] in text
    assert "\N{MINUS SIGN}2.50" in text  # Of the first step.
    assert "leaves 0.8 unexplained" in text
    assert "too few arms" in text
    assert "off the manifold" in text
    assert "1.resid_post/5+6" not in text  # Two banks of one site: only names tell them apart.
    assert "bank/a/5+6" in text


def test_latents_lead_to_neuronpedia_only_where_the_bank_names_it(page):
    assert page.count(f'href="{LINK}3"') == 1
    assert page.count(f'href="{LINK}6"') == 1
    for link in ("javascript:alert(1)//", "https://elsewhere.org/a/b/", f"{LINK}?x=/", None):
        found = record().model_copy(update={"banks": (bank(link=link),)})
        told = features._links(found, found.verification.units[0])
        assert told == [(3, None)]


def test_drawings_hold_the_numbers_of_the_record(page, drawn):
    found = record()
    volcano = [row for row in values(drawn["volcano-0"]) if "kind" in row]
    three = next(row for row in volcano if row["name"] == "bank/a/3")
    assert (three["x"], three["y"]) == (pytest.approx(1.5), pytest.approx(3.0))
    assert {row["kind"] for row in volcano} == {"candidate", "other"}
    assert not any(row["name"] for row in volcano if row["kind"] == "other")

    both = [row for row in values(drawn["agreement"]) if "kind" in row]
    first = next(row for row in both if row["name"] == "bank/a/3")
    effect = found.verification.units[0].ablated.effect
    assert (first["x"], first["y"]) == (found.verification.units[0].attribution, -effect.value)
    assert first["low"] < first["y"] < first["high"]

    assert sorted(v["value"] for v in values(drawn["held-out"]) if set(v) == {"row", "value"}) == (
        sorted(found.held_out.random)
    )
    assert [row["value"] for row in values(drawn["forward"])] == [0.0, -2.5, -3.1875]


def test_doses_are_drawn_by_how_far_they_really_move_tokens(page, drawn):
    rows = values(drawn["dose-harmful"])
    own = {row["name"]: row for row in rows if row.get("family") == "set" and row["name"]}
    assert own["zero"]["x"] == pytest.approx(-0.11)
    assert own["min-clamp 1"]["x"] == pytest.approx(0.31)
    assert own["zero"]["value"] == -2.5
    assert own["scale -1"]["open"]
    assert not own["zero"]["open"]
    spread = [r for r in rows if r.get("family") == "other latents" and r["x"] == own["zero"]["x"]]
    assert (spread[0]["low"], spread[0]["high"]) == pytest.approx((-0.75, -0.25))
    costs = [row for row in values(drawn["dose-perplexity"]) if row.get("family") == "set"]
    assert {row["value"] for row in costs} == {1.25}
    assert {f"dose-{key}" for key, *_ in features.PANELS} <= set(drawn)


def test_arms_that_were_not_brought_as_far_are_no_part_of_a_band(monkeypatch):
    row = dose_response()
    short = tuple(
        replace(p, reached=False, refusal=dict.fromkeys(CLASSES, e(99.0)))
        if p.family == "other latents" and p.draw == 3
        else p
        for p in row.points
    )
    made = {}

    def figure(make, *, name, **_):
        made[name] = make.args[1]
        return charts.Figure("", Markup(), Markup())

    monkeypatch.setattr(charts, "figure", figure)
    features._dose_figures(replace(row, points=short))
    assert max(one["high"] for one in made["dose-harmful"]) < 9


def test_conversations_and_the_sensor_are_drawn(page, drawn):
    turns = values(drawn["turns-log_odds-harmful"])
    assert {row["series"] for row in turns if "series" in row} == {"none", "set off"}
    assert {row["value"] for row in turns if row.get("x") == 3} == {1.0}
    traced = [row for row in values(drawn["trace-harmful"]) if "series" in row]
    assert {row["series"] for row in traced} == {"1.resid_post/3", "1.resid_post/5"}
    assert {row["value"] for row in traced if row["x"] == 2} == {0.8}
    areas = [row for row in values(drawn["sensor"]) if "random" in row]
    assert [row["random"] for row in areas[:4]] == [False, False, True, True]
    assert "sensor-sites" in drawn


# What is missing, and what is hostile ---------------------------------------------------------


def test_a_run_without_a_verified_latent_says_so(tmp_path, undrawn):
    html = page_of(bare(), tmp_path)
    inert(html)
    text = shown(html)
    assert "there is no set to clamp" in text
    assert "Nothing was clamped" in text
    assert "No conversation was held" in text
    assert "No sensor was made" in text
    assert "undefined" in text
    # 30 candidates, p not below 1 / 50: 12 of them have to be so small that one counts.
    assert "12 of them have to reach that" in text


def test_a_run_whose_banks_fit_nothing_is_readable(tmp_path, undrawn):
    found = bare().model_copy(
        update={
            "banks": (bank(check=None, refused="it fits nothing"),),
            "discovery": None,
            "verification": None,
            "findings": (),
            "learned": False,
        }
    )
    html = page_of(found, tmp_path)
    inert(html)
    text = shown(html)
    assert "nothing was measured" in text
    assert "it fits nothing" in text
    assert "no latent was compared" in text


def test_undefined_figures_are_readable(tmp_path, undrawn):
    full = record()
    held = replace(full.held_out, of_refusal=None, dense=None, of_dense=None, dense_kl=None)
    rows = tuple(
        replace(
            row,
            cosine=None,
            cosine_null=None,
            cosine_p=None,
            attribution=None,
            places=tuple(replace(at, effect=None) for at in row.places),
        )
        for row in full.discovery.latents
    )
    found = full.model_copy(
        update={
            "held_out": held,
            "stability": None,
            "discovery": replace(full.discovery, latents=rows),
            "sensor": replace(
                full.sensor,
                detectors=tuple(
                    replace(one, threshold=None, caught=None, false_alarms=None, tpr_at_5=None)
                    for one in full.sensor.detectors
                ),
                sites=full.sensor.sites[:1],
                wrappers=(),
            ),
            "dose": replace(
                full.dose,
                points=tuple(
                    replace(
                        p, generated={}, perplexity_ratio=None, margin_change=None,
                        accuracy_change=None, accuracy_p=None,
                    )
                    for p in full.dose.points
                ),
                baseline_accuracy=None,
                comparisons=(),
            ),
        }
    )  # fmt: skip
    html = page_of(found, tmp_path)
    inert(html)
    text = shown(html)
    assert "No replies were generated" in text
    assert "refused no more than harmless" in text
    assert "undefined" in text
    for word in ("None", "nan", "Undefined"):
        assert not re.search(rf"\b{word}\b(?! shown)", text), word


def hostile(value):
    """Every text of a record made hostile, but those that decide what is drawn."""
    if isinstance(value, BaseModel):
        names = type(value).model_fields
        return value.model_copy(
            update={n: hostile(getattr(value, n)) for n in names if n not in KEPT}
        )
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value,
            **{
                f.name: hostile(getattr(value, f.name)) for f in fields(value) if f.name not in KEPT
            },
        )
    if isinstance(value, tuple):
        return tuple(map(hostile, value))
    if isinstance(value, dict):
        return {key: hostile(one) for key, one in value.items()}
    return HOSTILE + value if isinstance(value, str) else value


KEPT = {
    "role", "why", "stopped", "family", "aim", "outcome", "dose", "kind", "activation", "where",
    "limit_of", "method", "label", "verdict", "matched_on", "link", "place", "places", "site",
}  # fmt: skip


def test_hostile_names_do_nothing(tmp_path, monkeypatch):
    def figure(make, *, name, label, wide):
        with debug_mode(False):
            return charts.Figure(label, Markup(), charts.svg(make(wide), name=name, label=label))

    monkeypatch.setattr(charts, "figure", figure)
    html = page_of(hostile(record()), tmp_path)
    read = inert(html)
    assert "<script" not in html
    assert "\u202e" not in html
    assert "\x1b" not in html
    assert str(escape("<script>alert(1)</script>")) in html
    assert "{{ 7*7 }}" in read.text


def test_a_damaged_record_is_a_clear_error(tmp_path):
    path = tmp_path / "features.json"
    with pytest.raises(StoreError):
        write_features(path)
    path.write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(StoreError):
        write_features(path)


def test_the_section_of_an_audit_shows_findings_and_one_figure():
    found = record()
    html = rendered(
        "features_section.html.j2", features=found, features_view=features_section_view(found)
    )
    page = Page(html)
    assert page.tags["section"] == 1
    assert page.tags["figure"] == 1
    assert found.findings[0].answer in page.text
    assert rendered("features_section.html.j2", features=None, features_view=None).strip() == ""

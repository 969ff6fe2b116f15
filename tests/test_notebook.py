"""Tables and charts for notebooks: escaped, drawable, and with the numbers that they were given."""

import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from demur.activations import Activations
from demur.compare.contrasts import Contrast
from demur.compare.geometry import compare_layers, compare_pair
from demur.compare.rows.geometry import plot_by_depth
from demur.compare.rows.record import CompareRecord, Finding, Placed
from demur.directions import Direction, isotropic_band
from demur.errors import ConfigError, TooFewPromptsError, UnknownNameError
from demur.selection import Scores, Selection
from demur.sites import Site

D = 24
SITE = Site(3, "resid_pre")
HOSTILE = "</script><img src=x onerror=alert(1)>\u202e\x00'\"&{{7*7}}"


def a_direction(seed=0, *, site=SITE, position=-1, recipe="planted", d=D):
    vector = torch.randn(d, generator=torch.Generator().manual_seed(seed))
    return Direction.from_vector(vector, site=site, position=position, recipe=recipe)


def activations(seed, along=None, *, n=30, sites=(SITE,), positions=(-1,)):
    rng = torch.Generator().manual_seed(seed)
    values = torch.randn(len(sites), len(positions), n, D, generator=rng)
    if along is not None:
        values = values + along
    return Activations(values, tuple(sites), tuple(positions), "some model")


def a_selection(*, rejected_by="KL above 0.1 nats"):
    rng = torch.Generator().manual_seed(0)
    rows = []
    for layer in (2, 5):
        for position in (-2, -1):
            scores = torch.randn(3, 6, generator=rng, dtype=torch.float64)
            own = Scores(
                a_direction(layer, site=Site(layer, "resid_pre"), position=position),
                scores[0] - 4 * (layer == 5),
                scores[1],
                scores[2].abs() + 1e-3,
                exact=True,
                rejected_by=rejected_by if position == -2 else None,
            )
            rows.append(own)
    lost = Scores(a_direction(9, site=Site(8, "resid_pre")), None, None, None, exact=True)
    rows.append(replace(lost, rejected_by="infinite logits"))
    plain = torch.randn(2, 6, generator=rng, dtype=torch.float64)
    return Selection(rows, 3, False, plain[0], plain[1], None)


def contrast(name, seed, *, site=SITE, shift=1.0):
    rng = torch.Generator().manual_seed(seed)
    axis = torch.zeros(D).index_fill(0, torch.tensor([0]), shift)
    rows = torch.randn(2, 20, D, generator=rng)
    return Contrast.of_classes(name, rows[0] + axis, rows[1] - axis, site=site, position=-1)


@pytest.fixture(scope="module")
def comparison():
    library = {f"unrelated {i}": contrast(f"unrelated {i}", 10 + i, shift=0.0) for i in range(4)}
    return compare_pair(
        contrast("one", 1), contrast("two", 2), library=library, draws=100, splits=10, seed=0
    )


@pytest.fixture(scope="module")
def layers():
    sites = [Site(layer, "resid_pre") for layer in (2, 7)]
    a, b = ({s: contrast(n, i, site=s) for s in sites} for i, n in enumerate(("one", "two")))
    return compare_layers(a, b, draws=100, splits=10, seed=0)


def a_record(layers, *, pair="em and refusal", name="model"):
    placed = tuple(Placed(pair=pair, place="prompts", read_on="base", row=row) for row in layers)
    finding = Finding(question="Alike?", answer="no", because=name, headline=True)
    return CompareRecord(
        demur="0", model=name, fingerprint="f", dtype="float32", seed=0, objects=(), harmful="a",
        harmless="b", items=(), fit=(20, 20), select=(0, 0), report=(0, 0), questions=(0, 0),
        library=(), sites=("2.resid_pre", "7.resid_pre"), site=None, site_why="",
        findings=(finding,), comparisons=placed, overlaps=(), alignments=(), across=(),
        projected=(), counted=(), behaviours=(), mediations=(), circuits=(), seconds={}, notes=(),
    )  # fmt: skip


class Parsed(HTMLParser):
    """Elements and text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open, self.attributes = [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def values(chart):
    """All rows that a chart draws."""
    return [row for rows in chart.to_dict()["datasets"].values() for row in rows]


def draws(chart):
    """Draw it, as a reader would see it."""
    out = io.StringIO()
    chart.save(out, format="svg")
    assert "<svg" in out.getvalue()
    assert "NaN" not in out.getvalue()
    return out.getvalue()


def test_tables_hold_hostile_text_as_text_and_set_no_colour(comparison, layers):
    fallen = a_selection(rejected_by=HOSTILE)
    pages = [
        a_direction(recipe=HOSTILE)._repr_html_(),
        fallen._repr_html_(),
        replace(comparison, a=HOSTILE, why=HOSTILE)._repr_html_(),
        a_record(layers, name=HOSTILE)._repr_html_(),
    ]
    for html in pages:
        page = Parsed(html)
        assert page.open == []
        known = {"div", "table", "caption", "thead", "tbody", "tr", "th", "td", "p"}
        assert set(page.tags) <= known
        text = "".join(page.text)
        assert "</script><img src=x onerror=alert(1)>⟦U+202E⟧⟦U+0000⟧'\"&{{7*7}}" in text
        assert {name for name, _ in page.attributes} <= {"style", "scope"}
        for name, value in page.attributes:
            if name == "style":
                colours = re.findall(r"(?<![-\w])(?:color|background(?:-color)?):([^;]+)", value)
                assert set(colours) <= {"inherit", "transparent"}, value


def test_charts_hold_no_text_that_a_page_would_obey(comparison, layers):
    one = a_direction()
    charts = [
        one.plot({HOSTILE: a_direction(1)}),
        one.plot({HOSTILE: activations(1, one.unit), "other": activations(2)}),
        replace(comparison, a=HOSTILE, b=HOSTILE).plot(),
        plot_by_depth({HOSTILE: [replace(row, a=HOSTILE) for row in layers]}),
        a_selection(rejected_by=HOSTILE).plot(),
    ]
    for chart in charts:
        page = chart.to_html()
        assert page.count("</script>") == page.count("<script")
        assert "onerror" in page  # It is there, as text.
        assert "<img" not in page
        draws(chart)


def test_cosines_stand_before_the_band_of_random_directions():
    one = a_direction()
    chart = one.plot({"itself": one, "mirror": -one, "other": a_direction(5)})
    rows = {row["name"]: row["value"] for row in values(chart) if "name" in row}
    assert rows["itself"] == pytest.approx(1, abs=1e-6)
    assert rows["mirror"] == pytest.approx(-1, abs=1e-6)
    assert rows["other"] == pytest.approx(one.cosine(a_direction(5)))
    (band,) = [row for row in values(chart) if set(row) == {"low", "high"}]
    assert (band["low"], band["high"]) == (-isotropic_band(D), isotropic_band(D))
    drawn = torch.nn.functional.normalize(torch.randn(20_000, D), dim=1) @ one.unit
    assert isotropic_band(D) == pytest.approx(float(drawn.abs().quantile(0.95)), abs=0.01)
    draws(one.plot([a_direction(1), a_direction(2)]))


def test_projections_leave_the_band_along_a_planted_direction_only():
    planted = torch.zeros(D).index_fill(0, torch.tensor([3]), 1.0)
    sides = {"harmful": activations(1, 2 * planted), "harmless": activations(2, -2 * planted)}
    other = torch.zeros(D).index_fill(0, torch.tensor([4]), 1.0)

    def means(vector):
        one = Direction.from_vector(vector, site=SITE, position=-1, recipe="")
        chart = one.plot(sides)
        draws(chart)
        return {row["group"]: row for row in values(chart) if "null_low" in row}

    found = means(planted)
    assert found["harmful"]["value"] == pytest.approx(2, abs=0.5)
    assert found["harmful"]["low"] > found["harmful"]["null_high"]
    assert found["harmless"]["high"] < found["harmless"]["null_low"]
    beside = means(other)["harmful"]
    assert beside["null_low"] < beside["value"] < beside["null_high"]


def test_large_coordinates_stand_out_from_those_of_random_directions():
    spiked = torch.randn(64, generator=torch.Generator().manual_seed(0))
    spiked[7] = 40.0
    one = Direction.from_vector(spiked, site=SITE, position=-1, recipe="")
    first, *_, last = [row for row in values(one.plot()) if "rank" in row]
    assert "coordinate 7:" in first["tip"]
    assert first["value"] > first["high"]
    assert last["value"] < last["low"]  # One coordinate has nearly all of the length.
    even = a_direction(4, d=64)
    inside = [r["low"] < r["value"] < r["high"] for r in values(even.plot()) if "rank" in r]
    assert sum(inside) > 0.7 * len(inside)
    draws(even.plot())


def test_what_cannot_be_drawn_beside_a_direction_is_said():
    one = a_direction()
    with pytest.raises(ConfigError, match="got 0 directions"):
        one.plot({})
    with pytest.raises(ConfigError, match="got 1 directions and activations of 1 groups"):
        one.plot({"a": one, "b": activations(1)})
    with pytest.raises(ConfigError, match="of one group"):
        one.plot({"a": activations(1)})
    with pytest.raises(ConfigError, match="`wide` has 25 coordinates, this direction 24"):
        one.plot({"wide": a_direction(d=25)})
    with pytest.raises(UnknownNameError, match="was not read"):
        one.plot({"a": activations(1, positions=(-3,)), "b": activations(2)})
    with pytest.raises(TooFewPromptsError):
        one.plot({"a": activations(1, n=1), "b": activations(2)})


@pytest.mark.parametrize("score", ["bypass", "induce", "kl"])
def test_a_selection_maps_all_candidates_and_frames_the_chosen_one(score):
    selection = a_selection()
    chart = selection.plot(score)
    draws(chart)
    rows = {(row["at"], row["position"]): row for row in values(chart) if "state" in row}
    assert len(rows) == len(selection.rows)
    assert [at for at, row in rows.items() if row["chosen"]] == [("5.resid_pre", -1)]
    assert rows["8.resid_pre", -1]["state"] == "missing"
    assert rows["5.resid_pre", -2]["state"] == "rejected"
    which = ("bypass", "induce", "kl").index(score)
    assert rows["5.resid_pre", -1]["value"] == pytest.approx(selection.rows[3].means[which])
    # All three scores with their interval are under the pointer.
    tips = {one["field"] for one in chart.to_dict()["layer"][0]["encoding"]["tooltip"]}
    shown = [
        text for key, text in rows["5.resid_pre", -1].items() if key in tips and "n=6" in str(text)
    ]
    assert len(shown) == 3


def test_a_selection_says_what_was_chosen_and_what_fell():
    text = " ".join(Parsed(a_selection()._repr_html_()).text)
    assert "chosen 5.resid_pre, position \N{MINUS SIGN}1" in text
    assert "2 of 5 candidates passed every criterion" in text
    assert "KL above 0.1 nats" in text
    assert text.count("n=6") == 3 * 4 + 2
    assert "least bad" in Parsed(replace(a_selection(), least_bad=True)._repr_html_()).text[-1]
    with pytest.raises(UnknownNameError, match="no score is called `kk`"):
        a_selection().plot("kk")


def test_a_selection_on_one_prompt_is_shown_without_an_interval():
    one = [
        replace(row, bypass=row.bypass[:1], induce=row.induce[:1], kl=row.kl[:1])
        for row in a_selection().rows[:4]
    ]
    few = Selection(one, 3, False, torch.zeros(1).double(), torch.zeros(1).double(), None)
    assert "n=1" in few._repr_html_()
    draws(few.plot())


def test_a_comparison_shows_its_verdict_intervals_and_nulls(comparison):
    text = " ".join(Parsed(comparison._repr_html_()).text)
    assert comparison.verdict in text
    for null in comparison.nulls:
        assert f"null: {null.name}" in text
    chart = comparison.plot()
    draws(chart)
    rows = {row["row"]: row for row in values(chart) if "row" in row}
    measured, unbiased = rows["as measured"], rows["unbiased"]
    assert (measured["low"], measured["high"]) == (
        comparison.interval.low,
        comparison.interval.high,
    )
    assert unbiased["value"] == comparison.unbiased.value
    assert set(rows) >= {one.name for one in comparison.variants}
    seen = {row["null"]: row["upper"] for row in values(chart) if "null" in row}
    assert seen == {null.name: null.upper for null in comparison.nulls}


def test_vectors_without_rows_are_compared_without_intervals():
    a, b = (
        Contrast.of_vector(name, torch.randn(D).double(), site=SITE, position=-1)
        for name in ("a", "b")
    )
    found = compare_pair(a, b, draws=50, splits=10, seed=0)
    assert "unbiased cosine not measured" in " ".join(Parsed(found._repr_html_()).text)
    draws(found.plot())
    draws(plot_by_depth({"pair": [found]}))


def test_a_record_is_drawn_by_pair_and_depth(layers):
    record = a_record(layers)
    chart = record.plot("em and refusal")
    draws(chart)
    rows = [row for row in values(chart) if "series" in row]
    assert [row["value"] for row in rows] == [row.cosine for row in layers]
    bands = [row for row in values(chart) if set(row) == {"site", "low", "high"}]
    assert [row["high"] for row in bands] == [r.null("covariance-matched").upper for r in layers]
    assert record.plot().to_dict() == chart.to_dict()
    with pytest.raises(UnknownNameError, match="em and harm"):
        record.plot("em and harm")
    with pytest.raises(ConfigError, match="no comparison to draw"):
        a_record(()).plot()
    assert "Alike? no" in " ".join(Parsed(record._repr_html_()).text)

"""Charts of an audit: each a Vega-Lite specification, drawn once to a static SVG.

The specifications name paints that do not exist as colours (`#010101`); `svg` swaps them for the
page's CSS variables, so that one drawing reads well on a light, a dark and a printed page.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from textwrap import wrap
from typing import Any
from xml.etree import ElementTree

import altair as alt
import numpy as np
import vl_convert
from altair.utils.schemapi import debug_mode
from markupsafe import Markup

from demur.notebook import Look, depth_layers, site_key, site_ticks, spaced
from demur.report.words import number, readable, token
from demur.results import (
    AuditResults,
    Candidate,
    Dose,
    NullBand,
    PositionInfo,
    Projections,
    Reading,
)
from demur.stats import Estimate

INK, MUTED, LINE = "#010101", "#010102", "#010103"
HARMFUL, HARMLESS, ACCENT = "#010104", "#010105", "#010106"
FAINT, CARD = "#010107", "#010108"
FALL, RISE, COST = "#010109", "#01010a", "#01010b"
PAINTS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    HARMFUL: "var(--harmful)",
    HARMLESS: "var(--harmless)",
    ACCENT: "var(--accent)",
    FAINT: "var(--faint)",
    CARD: "var(--card)",
    FALL: "var(--fall)",
    RISE: "var(--rise)",
    COST: "var(--cost)",
}
WIDE, BROAD, HALF, NARROW = 940, 680, 456, 340
THEME = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": MUTED,
        "titleColor": MUTED,
        "domainColor": LINE,
        "tickColor": LINE,
        "gridColor": LINE,
        "labelFontSize": 11,
        "titleFontSize": 11.5,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "labelPadding": 4,
    },
    "axisQuantitative": {"labelFlush": False, "labelOverlap": "greedy", "labelSeparation": 7},
    "legend": {
        "labelColor": INK,
        "titleColor": MUTED,
        "labelFontSize": 11.5,
        "titleFontSize": 11.5,
        "titleFontWeight": "normal",
    },
    "text": {"fontSize": 11.5},
    "scale": {"bandPaddingInner": 0.04},
}
# Lines stand on faint bands, whose opacity the legend's would otherwise be.
_LINE_LEGEND: dict[str, Any] = {
    "title": None,
    "orient": "top",
    "symbolType": "stroke",
    "symbolSize": 260,
    "symbolOpacity": 1,
    "symbolStrokeWidth": 2.4,
    "columnPadding": 18,
}

# Marks whose description starts so keep it as the browser's own tooltip.
_TIP = "tip: "
_LONG = re.compile(r"-?\d+\.\d{2,}(?:e-?\d+)?")
_DROPPED = frozenset(
    {"pointer-events", "stroke-miterlimit", "font-family", "aria-label", "aria-hidden"}
    | {"aria-roledescription", "class", "role", "version"}
)

Rows = list[dict[str, Any]]
Score = Callable[[Candidate], Estimate | None]


@dataclass(frozen=True, slots=True)
class Figure:
    """One chart in two widths, of which CSS shows the one that fits.

    Attributes:
        label: What a screen reader says in its place.
    """

    label: str
    wide: Markup
    narrow: Markup


def position_label(info: PositionInfo) -> str:
    """A position, its token and its role on one line."""
    return f"{token(info.text)}  {number(info.position, '.0f')}" + (
        "  t_inst" if info.role == "t_inst" else ""
    )


def svg(chart: alt.Chart | alt.LayerChart, *, name: str, label: str) -> Markup:
    """Draw `chart` as inline SVG: no script, no font, no address, no id that another has.

    Args:
        chart: What to draw.
        name: Prefix of every id inside, unique on the page.
        label: Alternative text.
    """
    spec = _made_visible(chart.to_dict(validate=False))
    drawn = vl_convert.vegalite_to_svg(spec, config=THEME, allowed_base_urls=[])
    root = ElementTree.fromstring(drawn)
    for parent in list(root.iter()):
        for child in list(parent):
            if _invisible(child):
                parent.remove(child)
    _tidy(root, name)
    width = float(root.attrib.pop("width"))
    root.attrib.pop("height")
    root.attrib.update({"role": "img", "aria-label": readable(label)})
    root.set("style", f"max-width:{width:.0f}px")
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def figure(
    make: Callable[[int], alt.Chart | alt.LayerChart], *, name: str, label: str, wide: int = HALF
) -> Figure:
    """Draw what `make` gives at a desktop's and at a telephone's width."""
    # Altair checks each step of building against its schema: two thirds of the time, and a matter
    # for tests, since the specifications vary in data only.
    with debug_mode(False):
        return Figure(
            label,
            svg(make(wide), name=f"{name}-w", label=label),
            svg(make(NARROW), name=f"{name}-n", label=label),
        )


@dataclass(frozen=True, slots=True)
class Ramp:
    """How a score becomes ink: none at one end of the scale, full at the other.

    Attributes:
        diverging: Ink by distance from zero, its colour by sign; else by the log of the score.
        low: Score at the lower end of the scale.
        high: Score at the upper end.
    """

    diverging: bool
    low: float
    high: float

    @classmethod
    def over(cls, values: Sequence[float], *, diverging: bool) -> "Ramp":
        """The ramp that just holds all of `values`; a diverging one reaches 3 at least."""
        if diverging:
            # Below 3 log-odds the page stays pale: noise must not look like an effect.
            bound = max([3.0, *map(abs, values)])
            return cls(diverging, -bound, bound)
        positive = [value for value in values if value > 0] or [0.001, 1.0]
        low, high = max(min(positive), 1e-6), max(positive)
        return cls(diverging, low, high if high > low else 10 * low)

    def __call__(self, value: float) -> tuple[str, float]:
        """The paint of a score, and its share of ink from 0 to 1."""
        if self.diverging:
            return (FALL if value < 0 else RISE), abs(value) / self.high
        return COST, self.share(value)

    def share(self, value: float) -> float:
        """How far along the scale a score lies, cut off at both ends."""
        if self.diverging:
            part = (value - self.low) / (self.high - self.low)
        else:
            part = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return min(max(part, 0.0), 1.0)


def heat_map(results: AuditResults, width: int, *, score: Score, ramp: Ramp) -> alt.LayerChart:
    """One score of every candidate; upright on a narrow page, lying on a wide one.

    A full cell passed every criterion, a small one was rejected, a cross was not measured, and a
    frame marks the direction that was chosen. Ink goes from the page's own colour to full, so that
    "no effect" recedes on light and on dark pages alike.
    """
    sites = sorted({row.site for row in results.candidates}, key=site_key)
    ticks, site_title = site_ticks(sites)
    infos = {info.position: info for info in results.positions}
    order = sorted({row.position for row in results.candidates} | set(infos))
    names = {at: position_label(infos[at]) if at in infos else str(at) for at in order}
    rows: Rows = []
    for row in results.candidates:
        value = score(row)
        paint, ink = (CARD, 0.0) if value is None else ramp(value.value)
        shown = "not measured" if value is None else number(value.value)
        fate = "" if row.exact else "screened; "
        fate += "chosen; " if row.selected else ""
        fate += f"rejected by {row.rejected_by}" if row.rejected_by else "passed every criterion"
        rows.append(
            {
                "site": ticks[row.site],
                "position": names[row.position],
                "paint": paint,
                "ink": round(0.04 + 0.96 * ink, 3),
                "state": "missing"
                if value is None
                else "rejected"
                if row.rejected_by
                else "passed",
                "chosen": row.selected,
                "tip": tip(f"{row.site}, {names[row.position]}: {shown}; {fate}"),
            }
        )
    upright = width <= NARROW
    along = [ticks[site] for site in sites]
    across = [names[at] for at in order]
    if upright:
        x = alt.X("position:N", sort=across, title=None).axis(
            orient="top", labelAngle=-90, labelLimit=140
        )
        y = alt.Y("site:N", sort=along, title=site_title).axis(
            labelExpr="replace(datum.label, '|', ' ')"
        )
    else:
        x = alt.X("site:N", sort=along, title=site_title).axis(
            labelExpr="split(datum.label, '|')", labelAngle=0, values=spaced(along, width - 130)
        )
        y = alt.Y("position:N", sort=across, title=None).axis(labelLimit=170)
    base = alt.Chart(alt.InlineData(values=rows)).encode(x=x, y=y, description="tip:N")
    inked = {
        "fill": alt.Fill("paint:N", scale=None),
        "fillOpacity": alt.FillOpacity("ink:Q", scale=None),
    }
    full, small = alt.RelativeBandSize(0.94), alt.RelativeBandSize(0.56)
    ring = base.transform_filter("datum.chosen")
    layers = [
        base.transform_filter("datum.state == 'rejected'")
        .mark_rect(width=small, height=small, stroke=LINE, strokeWidth=0.8)
        .encode(**inked),
        base.transform_filter("datum.state == 'passed'")
        .mark_rect(width=full, height=full, stroke=LINE, strokeWidth=0.8)
        .encode(**inked),
        base.transform_filter("datum.state == 'missing'").mark_point(
            shape="M-.6,-.6L.6,.6M.6,-.6L-.6,.6",
            size=90,
            stroke=MUTED,
            filled=False,
            strokeWidth=1.2,
        ),
        ring.mark_rect(fill=None, stroke=CARD, strokeWidth=5, strokeOpacity=1),
        ring.mark_rect(fill=None, stroke=INK, strokeWidth=2.5, strokeOpacity=1),
    ]
    height = 60 + 15 * len(sites) + 80 if upright else 62 + 21 * len(order)
    room = _room(across)
    return _sized(layers, width, height, left=0 if upright else room, top=room if upright else 0)


def forest(rows: Rows, width: int, *, title: str, guide: float = 0.0) -> alt.LayerChart:
    """Figures with their intervals, one line an arm; what they are held against shares a line.

    Args:
        rows: Of `row`, `value`, `low`, `high`, `random` and `tip`; the order is kept.
        width: Pixels.
        title: Of the axis, with its unit.
        guide: Where a vertical line says that nothing was found.
    """
    order = list(dict.fromkeys(row["row"] for row in rows))
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        y=alt.Y("row:N", sort=order, title=None).axis(
            labelExpr="split(datum.label, '|')", labelLimit=150, grid=True, ticks=False
        ),
        description="tip:N",
    )
    chosen, chance = (
        base.transform_filter("!datum.random"),
        base.transform_filter("datum.random"),
    )
    # Vega-Lite starts a scale at zero unless told otherwise; here the guide is the origin.
    scale = alt.Scale(zero=guide == 0)
    span = {"x": alt.X("low:Q", title=title, scale=scale), "x2": "high:Q"}
    layers = [
        _guide("x", guide, dash=[1, 0], scale=scale),
        chance.mark_rule(stroke=MUTED, strokeOpacity=0.45, strokeWidth=1.5).encode(**span),
        chance.mark_point(stroke=MUTED, fill=CARD, size=34).encode(
            x=alt.X("value:Q", title=title, scale=scale)
        ),
        chosen.mark_rule(stroke=ACCENT, strokeWidth=2.5).encode(**span),
        chosen.mark_point(stroke=ACCENT, fill=ACCENT, size=70, shape="diamond").encode(
            x=alt.X("value:Q", title=title, scale=scale)
        ),
    ]
    room = _room(part for name in order for part in name.split("|"))
    return _sized(layers, width, 56 + 38 * len(order), left=room)


def curves(
    results: AuditResults,
    width: int,
    *,
    score: Callable[[Reading], tuple[float, float, float]],
    title: str,
    guide: float | None,
) -> alt.LayerChart:
    """One score of every reading against depth; `t_inst` and the last token stand out."""
    sites = sorted({row.site for row in results.readings}, key=site_key)
    ticks, site_title = site_ticks(sites)
    infos = {info.position: info for info in results.positions}
    last = max((row.position for row in results.readings), default=-1)

    def series(position: int) -> str:
        if position in infos and infos[position].role == "t_inst":
            return "t_inst"
        return "last token" if position == last else "between"

    rows: Rows = []
    for row in sorted(results.readings, key=lambda row: (row.position, site_key(row.site))):
        value, low, high = score(row)
        chosen = (row.site, row.position) == (results.direction.site, results.direction.position)
        rows.append(
            {
                "site": ticks[row.site],
                "position": row.position,
                "series": series(row.position),
                "value": value,
                "low": low,
                "high": high,
                "chosen": chosen,
                "tip": tip(f"{row.site}, position {row.position}: {number(value)}"),
            }
        )
    domain = ["t_inst", "last token", "between"]
    scale = alt.Scale(domain=domain, range=[ACCENT, HARMLESS, FAINT])
    dash = alt.Scale(domain=domain, range=[[1, 0], [6, 3], [1, 0]])
    legend = alt.Legend(**_LINE_LEGEND)
    low = min((row["low"] for row in rows), default=0.0)
    y_scale = (
        alt.Scale(zero=True)
        if guide is None
        else alt.Scale(domain=[max(0.0, math.floor(20 * min(low, guide)) / 20), 1], nice=False)
    )
    y = alt.Y("value:Q", title=title, scale=y_scale)
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("site:O", sort=[ticks[site] for site in sites], title=site_title).axis(
            labelExpr="split(datum.label, '|')",
            labelAngle=0,
            values=spaced([ticks[site] for site in sites], width - 70),
            grid=False,
        ),
        detail="position:N",
    )
    shown = base.transform_filter("datum.series != 'between'")
    colour = alt.Color("series:N", scale=scale, legend=legend)
    stroke = alt.StrokeDash("series:N", scale=dash, legend=legend)
    lines = {"y": y, "color": colour, "strokeDash": stroke}
    layers: list[alt.Chart] = [
        base.transform_filter("datum.series == 'between'")
        .mark_line(strokeWidth=1, opacity=0.8)
        .encode(**lines),
        shown.mark_area(opacity=0.18).encode(
            y=alt.Y("low:Q", title=title, scale=y_scale), y2="high:Q", color=colour
        ),
        shown.mark_line(strokeWidth=2.2).encode(**lines),
        base.transform_filter("datum.chosen")
        .mark_point(stroke=INK, fill=CARD, size=80, strokeWidth=2, opacity=1)
        .encode(y=y, description="tip:N"),
    ]
    if guide is not None:
        layers.insert(0, _guide("y", guide, scale=y_scale))
    return _sized(layers, width, 270)


def depth(
    rows: Rows, width: int, *, title: str, order: Sequence[str], guide: float | None = None
) -> alt.LayerChart:
    """Lines with bands against depth.

    Args:
        rows: Of `site`, `series`, `value`, `low`, `high` and `tip`.
        width: Pixels.
        title: Of the upright axis, with its unit.
        order: The series, at most three; the first two stand out.
        guide: Where a line says that nothing was found.
    """
    sites = sorted({row["site"] for row in rows}, key=site_key)
    ticks, site_title = site_ticks(sites)
    shown = [{**row, "site": ticks[row["site"]]} for row in rows]
    scale = alt.Scale(domain=list(order), range=[ACCENT, HARMLESS, MUTED][: len(order)])
    dash = alt.Scale(domain=list(order), range=[[1, 0], [6, 3], [2, 2]][: len(order)])
    legend = alt.Legend(**_LINE_LEGEND)
    y_scale = alt.Scale(zero=False)
    y = alt.Y("value:Q", title=title, scale=y_scale)
    colour = alt.Color("series:N", scale=scale, legend=legend)
    base = alt.Chart(alt.InlineData(values=shown)).encode(
        x=alt.X("site:O", sort=[ticks[site] for site in sites], title=site_title).axis(
            labelExpr="split(datum.label, '|')",
            labelAngle=0,
            values=spaced([ticks[site] for site in sites], width - 70),
            grid=False,
        ),
        detail="series:N",
    )
    layers: list[alt.Chart] = [
        base.mark_area(opacity=0.18).encode(
            y=alt.Y("low:Q", title=title, scale=y_scale), y2="high:Q", color=colour
        ),
        base.mark_line(strokeWidth=2.2).encode(
            y=y, color=colour, strokeDash=alt.StrokeDash("series:N", scale=dash, legend=legend)
        ),
        base.mark_point(opacity=0, size=60).encode(y=y, description="tip:N"),
    ]
    if guide is not None:
        layers.insert(0, _guide("y", guide, scale=y_scale))
    return _sized(layers, width, 270)


def plane(rows: Rows, width: int, *, x_title: str, y_title: str) -> alt.LayerChart:
    """Prompts in the plane of two scores.

    Args:
        rows: Of `x`, `y`, `group` and `tip`; groups are "harmful-refused" and so on.
        width: Pixels.
        x_title: Of the flat axis.
        y_title: Of the upright axis.
    """
    points = [
        {**row, "class": row["group"].partition("-")[0], "fate": row["group"].partition("-")[2]}
        for row in rows
    ]
    colour = alt.Color(
        "class:N",
        scale=alt.Scale(domain=["harmful", "harmless"], range=[HARMFUL, HARMLESS]),
        legend=alt.Legend(title=None, orient="top", symbolType="square"),
    )
    shape = alt.Shape(
        "fate:N",
        scale=alt.Scale(domain=["refused", "accepted"], range=["triangle-up", "circle"]),
        legend=alt.Legend(title=None, orient="top"),
    )
    scale = alt.Scale(zero=False)
    layers = [
        _guide("x", 0.0, scale=scale),
        _guide("y", 0.0, scale=scale),
        alt.Chart(alt.InlineData(values=points))
        .mark_point(filled=True, opacity=0.65, size=42)
        .encode(
            x=alt.X("x:Q", title=x_title, scale=scale),
            y=alt.Y("y:Q", title=y_title, scale=scale),
            color=colour,
            shape=shape,
            description="tip:N",
        ),
    ]
    return _sized(layers, width, 320)


def edit_plane(rows: Rows, width: int) -> alt.LayerChart:
    """Edits in the plane of what they change; full marks at equal norm, open ones at equal KL.

    Args:
        rows: Of `x`, `y` (changes in nats of judged harmful and of refusal log-odds), `what`
            ("harm", "refusal" or "random"), `on`, `at` and `tip`.
        width: Pixels.
    """
    legend = alt.Legend(title=None, orient="top", symbolType="square")
    scale = alt.Scale(zero=True)
    # Random ones first, so that they lie below.
    ordered = sorted(rows, key=lambda row: row["what"] != "random")
    marks = alt.Chart(alt.InlineData(values=ordered)).encode(
        x=alt.X("x:Q", title="change of judged harmful (nats)", scale=scale),
        y=alt.Y("y:Q", title="change of refusal log-odds (nats)", scale=scale),
        color=alt.Color(
            "what:N",
            scale=alt.Scale(domain=["harm", "refusal", "random"], range=[HARMFUL, ACCENT, MUTED]),
            legend=legend,
        ),
        shape=alt.Shape(
            "on:N",
            scale=alt.Scale(
                domain=["harmless prompts", "harmful prompts"],
                range=["triangle-up", "triangle-down"],
            ),
            legend=alt.Legend(title=None, orient="top"),
        ),
        description="tip:N",
    )
    layers = [
        _guide("x", 0.0, scale=scale),
        _guide("y", 0.0, scale=scale),
        marks.transform_filter("datum.at == 'equal norm'").mark_point(
            filled=True, size=110, opacity=0.75
        ),
        marks.transform_filter("datum.at == 'equal KL'").mark_point(size=80, opacity=1),
    ]
    return _sized(layers, width, 320)


def projections(rows: Projections, width: int) -> alt.LayerChart:
    """Counts of prompts by projection: harmful above the line, harmless below it."""
    pooled = np.asarray([*rows.harmful, *rows.harmless], dtype=float)
    low, high = float(pooled.min()), float(pooled.max())
    # Where all projections are alike to the last digits there is no room for bins between them.
    least = 1e-6 * max(abs(low), abs(high), 1e-6)
    if high - low < least:
        low, high = low - least, high + least
    edges = np.histogram_bin_edges(pooled, bins=26 if width > NARROW else 20, range=(low, high))
    bars: Rows = []
    for name, values, sign in (("harmful", rows.harmful, 1), ("harmless", rows.harmless, -1)):
        counts = np.histogram(values, bins=edges)[0]
        for count, start, end in zip(counts, edges[:-1], edges[1:], strict=True):
            if count:
                said = f"{name}: {count} prompts from {number(start)} to {number(end)}"
                bars.append(
                    {
                        "class": name,
                        "count": sign * int(count),
                        "start": float(start),
                        "end": float(end),
                        "tip": tip(said),
                    }
                )
    medians: Rows = [
        {"at": float(np.median(values)), "to": sign * _tallest(bars, name)}
        for name, values, sign in (("harmful", rows.harmful, 1), ("harmless", rows.harmless, -1))
        if values
    ]
    colour = alt.Color(
        "class:N",
        scale=alt.Scale(domain=["harmful", "harmless"], range=[HARMFUL, HARMLESS]),
        legend=alt.Legend(title=None, orient="top", symbolType="square"),
    )
    x_title = "projection on the direction (residual-stream units)"
    y_title = "prompts (harmless downwards)"
    span = alt.X("start:Q", title=x_title, scale=alt.Scale(zero=False, nice=False))
    layers = [
        alt.Chart(alt.InlineData(values=bars))
        .mark_rect(stroke=CARD, strokeWidth=1)
        .encode(
            x=span,
            x2="end:Q",
            y=alt.Y("count:Q", title=y_title).axis(labelExpr="format(abs(datum.value), 'd')"),
            y2=alt.datum(0),
            color=colour,
            description="tip:N",
        ),
        _zero("y", INK),
        alt.Chart(alt.InlineData(values=medians))
        .mark_rule(stroke=INK, strokeWidth=1.5, strokeDash=[3, 2])
        .encode(x=alt.X("at:Q", title=x_title), y=alt.Y("to:Q", title=y_title), y2=alt.datum(0)),
    ]
    return _sized(layers, width, 260)


def dose(doses: Sequence[Dose], width: int, *, cost: bool) -> alt.LayerChart:
    """Addition against strength: refusal log-odds of both classes, or what it costs in KL."""
    rows: Rows = []
    for row in sorted(doses, key=lambda row: row.strength):
        pairs = [("harmless", row.harmless), ("harmful", row.harmful)]
        for name, estimate in [("KL", row.kl)] if cost else pairs:
            rows.append(_measured(estimate, {"strength": row.strength, "class": name}))
    names = ["KL"] if cost else ["harmful", "harmless"]
    paints = [ACCENT] if cost else [HARMFUL, HARMLESS]
    legend = None if cost else alt.Legend(title=None, orient="top", symbolSize=90, symbolOpacity=1)
    colour = alt.Color("class:N", scale=alt.Scale(domain=names, range=paints), legend=legend)
    shape = alt.Shape(
        "class:N",
        scale=alt.Scale(domain=names, range=["circle", "square"][: len(names)]),
        legend=legend,
    )
    title = "KL on harmless prompts (nats)" if cost else "refusal log-odds"
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("strength:Q", title="strength (multiples of the direction's own length)"),
        color=colour,
    )
    y = alt.Y("value:Q", title=title)
    layers = [
        _guide("x", 1.0),
        _zero("y"),
        base.mark_area(opacity=0.2).encode(y=alt.Y("low:Q", title=title), y2="high:Q"),
        base.mark_line(strokeWidth=2.2).encode(y=y),
        base.mark_point(filled=True, size=48, opacity=1).encode(
            y=y, shape=shape, description="tip:N"
        ),
    ]
    return _sized(layers, width, 260)


def null_strips(
    nulls: Sequence[NullBand],
    width: int,
    *,
    score: Callable[[NullBand], list[float]],
    title: str,
    here: float | None,
    here_name: str = "the direction",
) -> alt.LayerChart:
    """Every random direction as a tick, one line a family, and the direction's own value."""
    order = [f"{band.family.replace('-', '|')}" for band in nulls]
    rows: Rows = [
        {"family": name, "value": value, "tip": tip(f"{band.family}: {number(value)}")}
        for name, band in zip(order, nulls, strict=True)
        for value in score(band)
    ]
    x = alt.X("value:Q", title=title)
    y = alt.Y("family:N", sort=order, title=None).axis(
        labelExpr="split(datum.label, '|')", ticks=False, grid=True
    )
    layers: list[alt.Chart] = [
        _zero("x"),
        alt.Chart(alt.InlineData(values=rows))
        .mark_tick(thickness=1.6, size=20, color=MUTED, opacity=0.6)
        .encode(x=x, y=y, description="tip:N"),
    ]
    if here is not None:
        spot = alt.Chart(alt.InlineData(values=[{"value": here, "text": here_name}]))
        values = [row["value"] for row in rows] + [here, 0.0]
        left = here - min(values) < (max(values) - min(values)) / 2
        layers += [
            spot.mark_rule(stroke=ACCENT, strokeWidth=2.5).encode(x=x),
            spot.mark_text(
                align="left" if left else "right",
                dx=5 if left else -5,
                y=8,
                color=ACCENT,
                fontWeight="bold",
            ).encode(x=x, text="text:N"),
        ]
    room = _room(part for name in order for part in name.split("|"))
    return _sized(layers, width, 80 + 40 * len(order), left=room)


def trade_off(rows: Rows, width: int) -> alt.LayerChart:
    """What each edit buys against what it costs, numbered as in the table beside it.

    Args:
        rows: Of `number`, `kl`, `kl_low`, `kl_high`, `bypass`, `low`, `high`, `main` and `tip`.
        width: Pixels.
    """
    x_title, y_title = "KL on harmless prompts (nats)", "change of refusal log-odds"
    x, y = alt.X("kl:Q", title=x_title), alt.Y("bypass:Q", title=y_title)
    base = alt.Chart(alt.InlineData(values=rows))
    paint = alt.Color(
        "main:N", scale=alt.Scale(domain=[True, False], range=[ACCENT, MUTED]), legend=None
    )
    marks = base.encode(color=paint)
    layers = [
        _zero("y"),
        marks.mark_rule(strokeOpacity=0.5, strokeWidth=1.5).encode(
            x=x, y=alt.Y("low:Q", title=y_title), y2="high:Q"
        ),
        marks.mark_rule(strokeOpacity=0.5, strokeWidth=1.5).encode(
            x=alt.X("kl_low:Q", title=x_title), x2="kl_high:Q", y=y
        ),
        marks.mark_point(filled=True, size=230, opacity=1).encode(x=x, y=y, description="tip:N"),
        base.mark_text(color=CARD, fontSize=11, fontWeight="bold", dy=0.5).encode(
            x=x, y=y, text="number:N"
        ),
    ]
    return _sized(layers, width, 300)


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of a drawing, in pixels from its upper left corner."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "Box") -> float:
        """The area that both cover."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(wide, 0.0) * max(high, 0.0)

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The point of this box that is nearest."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)

    def wider(self, by: float) -> "Box":
        """This box with a margin."""
        return Box(self.left - by, self.top - by, self.right + by, self.bottom + by)


def placed(
    marks: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    room: tuple[float, float],
    rules: Sequence[Box] = (),
) -> list[Box]:
    """Where the labels of marks go: near them, over no mark and no other label, inside the room.

    Args:
        marks: Their places, in pixels; whose label matters most comes first.
        sizes: Width and height of each label.
        room: Width and height of the drawing.
        rules: What labels had better not lie over, such as lines of intervals.
    """
    full = Box(0, 0, *room)
    taken = [Box(x, y, x, y).wider(8) for x, y in marks]
    done: list[Box] = []
    lines = list(rules)
    for mark, (wide, high) in zip(marks, sizes, strict=True):
        least, best = (math.inf, math.inf), full
        for far, box in sorted(_around(mark, wide, high), key=itemgetter(0)):
            if least[0] == 0 and far >= least[1]:
                break  # All others are further.
            hidden = wide * high - box.overlap(full)
            hidden += sum(box.wider(1).overlap(other) for other in (*done, *taken))
            if round(hidden, 3) > least[0]:
                continue
            cost = (round(hidden, 3), far + 15 * sum(box.overlap(line) > 0 for line in lines))
            if cost < least:
                tether = _steps(mark, box.nearest(*mark))
                crossed = sum(any(step.overlap(one) > 0 for step in tether) for one in done)
                # A label that is as near to another mark could be read as that one's.
                unclear = sum(math.dist(one, box.nearest(*one)) < far + 10 for one in marks) - 1
                cost = (cost[0], cost[1] + 40 * crossed + 20 * unclear)
            if cost < least:
                least, best = cost, box
        lines += _steps(mark, best.nearest(*mark))
        done.append(best)
    return done


def _around(mark: tuple[float, float], wide: float, high: float) -> Iterator[tuple[float, Box]]:
    """Boxes of a size beside a mark, over and under it, with their distance from it."""
    x, y = mark
    beside = [left for gap in (10, 40, 80) for left in (x + gap, x - gap - wide)]
    above = [x - part * wide for part in (0.5, 0.05, 0.95)]
    for step in range(-36, 37):
        centre = y + 9 * step
        for left in beside if abs(step) < 2 else [*beside, *above]:
            box = Box(left, centre - high / 2, left + wide, centre + high / 2)
            yield math.dist(mark, box.nearest(x, y)), box


def _steps(start: tuple[float, float], end: tuple[float, float]) -> list[Box]:
    """A straight line as a row of boxes, too near for a label to stand between two of them."""
    count = max(int(math.dist(start, end) / 8), 1)
    at = np.linspace(start, end, count + 1)
    return [Box(x, y, x, y).wider(1) for x, y in at.tolist()]


def named_plane(rows: Rows, width: int, *, x_title: str, y_title: str) -> alt.LayerChart:
    """A few things with names in the plane of two percentages, each with both of its intervals.

    Args:
        rows: Of `name`, `x`, `x_low`, `x_high`, `y`, `y_low`, `y_high`, `kind` ("main", "plain" or
            "other") and `tip`; where labels compete, the first rows win.
        width: Pixels, with the axis.
        x_title: Of the flat axis.
        y_title: Of the upright axis.
    """
    wide, high = width - 66, 330
    right, top = (_round_up(max(row[key] for row in rows)) for key in ("x_high", "y_high"))
    x_scale = alt.Scale(domain=[0, right], nice=False)
    y_scale = alt.Scale(domain=[0, top], nice=False)

    def pixel(x: float, y: float) -> tuple[float, float]:
        return x / right * wide, high - y / top * high

    def label(text: str, x: float, y: float, box: Box) -> dict[str, Any]:
        near = box.nearest(x, y)
        side = "left" if near[0] > x else "right" if near[0] < x else "center"
        edge = {"left": box.left, "right": box.right, "center": (box.left + box.right) / 2}[side]
        return {
            "text": text,
            "side": side,
            "x": edge / wide * right,
            "y": top - (box.top + box.bottom) / 2 / high * top,
            "from_x": x / wide * right,
            "from_y": top - y / high * top,
            "to_x": near[0] / wide * right,
            "to_y": top - near[1] / high * top,
            "far": math.dist((x, y), near) > 18,
        }

    marks = [pixel(row["x"], row["y"]) for row in rows]
    rules = [
        Box(*start, *end).wider(1)
        for row in rows
        for start, end in (
            (pixel(row["x_low"], row["y"]), pixel(row["x_high"], row["y"])),
            (pixel(row["x"], row["y_high"]), pixel(row["x"], row["y_low"])),
        )
    ]
    # 28 characters fit a telephone's drawing in any font; the tooltip has the whole name.
    texts = [row["name"] if len(row["name"]) <= 28 else row["name"][:27] + "…" for row in rows]
    sizes = [(6.9 * len(text), 15.0) for text in texts]
    boxes = placed(marks, sizes, (wide, high), rules)
    labels = [
        {**label(text, *mark, box), "kind": row["kind"]}
        for text, mark, box, row in zip(texts, marks, boxes, rows, strict=True)
    ]

    def x(key: str) -> alt.X:
        return alt.X(f"{key}:Q", title=x_title, scale=x_scale)

    def y(key: str) -> alt.Y:
        return alt.Y(f"{key}:Q", title=y_title, scale=y_scale)

    kinds, paints = ["main", "plain", "other"], [ACCENT, INK, MUTED]
    paint = alt.Scale(domain=kinds, range=paints)
    base = alt.Chart(alt.InlineData(values=list(reversed(rows))))
    stroke = alt.Stroke("kind:N", scale=paint, legend=None)
    written = alt.Chart(alt.InlineData(values=labels))
    layers = [
        base.mark_rule(strokeWidth=1.6, strokeOpacity=0.45).encode(
            x=x("x_low"), x2="x_high", y=y("y"), stroke=stroke
        ),
        base.mark_rule(strokeWidth=1.6, strokeOpacity=0.45).encode(
            x=x("x"), y=y("y_low"), y2="y_high", stroke=stroke
        ),
        written.transform_filter("datum.far")
        .mark_rule(strokeWidth=1, stroke=MUTED, strokeDash=[2, 2])
        .encode(x=x("from_x"), x2="to_x", y=y("from_y"), y2="to_y"),
    ]
    shapes = ("diamond", "square", "circle")
    for kind, shape, ink in reversed(list(zip(kinds, shapes, paints, strict=True))):
        layers.append(
            base.transform_filter(f"datum.kind == '{kind}'")
            .mark_point(
                shape=shape,
                size=130 if kind == "main" else 70,
                stroke=ink,
                fill=ink if kind == "main" else CARD,
                strokeWidth=1.8,
                opacity=1,
            )
            .encode(x=x("x"), y=y("y"), description="tip:N")
        )
        layers += [
            written.transform_filter(f"datum.kind == '{kind}' && datum.side == '{side}'")
            .mark_text(
                align=side,
                baseline="middle",
                color=ink,
                fontWeight="bold" if kind == "main" else "normal",
            )
            .encode(x=x("x"), y=y("y"), text="text:N")
            for side in ("left", "right", "center")
            if any(one["kind"] == kind and one["side"] == side for one in labels)
        ]
    chart = alt.LayerChart(layer=layers)
    # Labels are placed in the pixels of the plot itself, so that it, not the whole, has this size.
    return chart.properties(width=wide, height=high, autosize="pad", padding=4)


def _round_up(value: float) -> float:
    """The end of an axis of percentages that holds `value` with some air."""
    step = next(step for step in (1, 2, 5, 10, 20) if value <= 6 * step or step == 20)
    return min(max(step * math.ceil(1.04 * value / step), step), 100)


def _measured(estimate: Estimate, keys: Mapping[str, Any]) -> dict[str, Any]:
    text = ", ".join(f"{name} {value}" for name, value in keys.items())
    shown = f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"
    return {
        **keys,
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "tip": tip(f"{text}: {shown}, n={estimate.n}"),
    }


def tip(text: str) -> str:
    """Text that a mark shows while the pointer rests on it."""
    return _TIP + readable(text)


def _tallest(bars: Rows, name: str) -> int:
    return max((abs(bar["count"]) for bar in bars if bar["class"] == name), default=0)


def _zero(axis: str, paint: str = MUTED) -> alt.Chart:
    return _guide(axis, 0.0, paint=paint, dash=[1, 0])


def _guide(
    axis: str,
    at: float,
    *,
    paint: str = MUTED,
    dash: Sequence[int] = (4, 3),
    scale: alt.Scale | None = None,
) -> alt.Chart:
    rule = alt.Chart(alt.InlineData(values=[{"guide": at}])).mark_rule(
        stroke=paint, strokeWidth=1, strokeDash=list(dash), strokeOpacity=0.8
    )
    own: dict[str, Any] = {} if scale is None else {"scale": scale}
    if axis == "x":
        return rule.encode(x=alt.X("guide:Q", **own))
    return rule.encode(y=alt.Y("guide:Q", **own))


def _room(labels: Iterable[str]) -> float:
    """Pixels to keep free: a reader's font may be wider than the one labels were measured in."""
    return 1.1 * max(map(len, labels), default=0)


def _sized(
    layers: Sequence[alt.Chart], width: int, height: int, *, left: float = 0, top: float = 0
) -> alt.LayerChart:
    fitted = alt.AutoSizeParams(type="fit", contains="padding")
    edge = {"left": 4 + left, "top": 4 + top, "right": 8, "bottom": 4}
    chart = alt.LayerChart(layer=list(layers))
    return chart.properties(width=width, height=height, autosize=fitted, padding=edge)


def _made_visible(spec: dict[str, Any]) -> dict[str, Any]:
    """`spec` with every string made readable, in place: on what XML forbids vl-convert aborts."""
    waiting: list[Any] = [spec]
    while waiting:
        part = waiting.pop()
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            if isinstance(value, dict | list):
                waiting.append(value)
            elif isinstance(value, str) and not (value.isascii() and value.isprintable()):
                part[key] = readable(value)
    return spec


def _invisible(element: ElementTree.Element) -> bool:
    if element.tag.endswith("path"):
        drawn = element.get("d", "")
        shows = element.get("fill") or element.get("stroke")
        return not drawn or (element.get("class") in {"background", "foreground"} and not shows)
    return element.get("fill") == "transparent"


def _tidy(root: ElementTree.Element, name: str) -> None:
    """Rewrite all attributes for the page; a mark's tooltip becomes its `<title>`."""
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        given, styles = dict(element.attrib), []
        element.attrib.clear()
        for long_key, value in given.items():
            key = long_key.rpartition("}")[2]
            if key in _DROPPED or (key == "opacity" and value == "1"):
                continue
            if value.lower() in PAINTS:
                styles.append(f"{key}:{PAINTS[value.lower()]}")
            elif key == "id":
                element.set(key, f"{name}-{value}")
            elif key in {"d", "transform"}:
                element.set(
                    key,
                    _LONG.sub(lambda digits: f"{float(digits[0]):.1f}".removesuffix(".0"), value),
                )
            else:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
        if styles:
            element.set("style", ";".join(styles))
        if given.get("aria-label", "").startswith(_TIP):
            title = ElementTree.Element("title")
            title.text = given["aria-label"].removeprefix(_TIP)
            element.insert(0, title)


# Of several models ----------------------------------------------------------------------------

_SERIES = (ACCENT, HARMFUL, HARMLESS, COST, RISE, MUTED)
_DASHES = ((1, 0), (6, 3), (2, 2), (8, 3, 2, 3))


def _series(order: Sequence[str], legend: alt.Legend | None) -> tuple[alt.Color, alt.StrokeDash]:
    """Colour and dash of each series; where colours run out, dashes still tell them apart."""
    paints = [_SERIES[i % len(_SERIES)] for i in range(len(order))]
    dashes = [list(_DASHES[(i + i // len(_SERIES)) % len(_DASHES)]) for i in range(len(order))]
    return (
        alt.Color("series:N", scale=alt.Scale(domain=list(order), range=paints), legend=legend),
        alt.StrokeDash(
            "series:N", scale=alt.Scale(domain=list(order), range=dashes), legend=legend
        ),
    )


def _named(order: Sequence[str], width: int) -> alt.Legend | None:
    """A legend that a telephone can hold; none for one series, which the caption names."""
    if len(order) < 2:
        return None
    columns = max(1, int(width / (60 + 8 * max(map(len, order)))))
    return alt.Legend(**_LINE_LEGEND, columns=columns, labelLimit=width - 60)


def lines(
    rows: Rows,
    width: int,
    *,
    x_title: str,
    title: str,
    order: Sequence[str],
    guide: float | None = None,
    x_guide: float | None = None,
    marks: bool = True,
) -> alt.LayerChart:
    """A figure of several series against a number, each with its interval.

    Args:
        rows: Of `x`, `series`, `value`, `low`, `high` and `tip`.
        width: Pixels.
        x_title: Of the flat axis.
        title: Of the upright axis, with its unit.
        order: The series.
        guide: Where a flat line says that nothing was found; `x_guide` likewise upright.
        x_guide: See `guide`.
        marks: Whether every value has a mark.
    """
    colour, dash = _series(order, _named(order, width))
    y_scale = alt.Scale(zero=False)
    x = alt.X("x:Q", title=x_title, scale=alt.Scale(zero=False, nice=False))
    y = alt.Y("value:Q", title=title, scale=y_scale)
    base = alt.Chart(alt.InlineData(values=rows)).encode(x=x, detail="series:N", color=colour)
    layers: list[alt.Chart] = [
        base.mark_area(opacity=0.16).encode(
            y=alt.Y("low:Q", title=title, scale=y_scale), y2="high:Q"
        ),
        base.mark_line(strokeWidth=2.2).encode(y=y, strokeDash=dash),
        base.mark_point(filled=True, size=42 if marks else 0, opacity=1 if marks else 0).encode(
            y=y, description="tip:N"
        ),
    ]
    if x_guide is not None:
        layers.insert(0, _guide("x", x_guide))
    if guide is not None:
        layers.insert(0, _guide("y", guide, scale=y_scale, dash=[1, 0]))
    return _sized(layers, width, 260)


def by_depth(
    rows: Rows, bands: Rows, width: int, *, title: str, order: Sequence[str]
) -> alt.LayerChart:
    """Lines of several series against depth, before the band of what is found where nothing is.

    Args:
        rows: Of `site`, `series`, `pair` (a line of its own), `value`, `low`, `high` and `tip`.
        bands: Of `site`, `low` and `high`.
        width: Pixels.
        title: Of the upright axis.
        order: The series.
    """
    look = Look(*_series(order, _named(order, width)), FAINT, MUTED, {"description": "tip:N"})
    layers = depth_layers(rows, bands, width - 70, title=title, look=look)
    return _sized(layers, width, 280)


def strips(rows: Rows, randoms: Rows, width: int, *, title: str) -> alt.LayerChart:
    """Figures with intervals, one line each, before what random directions did as ticks.

    Args:
        rows: Of `row`, `value`, `low`, `high`, `main` and `tip`; the order is kept.
        randoms: Of `row` and `value`.
        width: Pixels.
        title: Of the axis, with its unit.
    """
    order = list(dict.fromkeys(row["row"] for row in rows))
    y = alt.Y("row:N", sort=order, title=None).axis(
        labelExpr="split(datum.label, '|')", labelLimit=150, grid=True, ticks=False
    )
    flush = alt.Axis(labelFlush=True)  # A number at the edge would be cut.
    x = alt.X("value:Q", title=title, axis=flush)
    base = alt.Chart(alt.InlineData(values=rows)).encode(y=y, description="tip:N")
    layers: list[alt.Chart] = [
        _zero("x"),
        alt.Chart(alt.InlineData(values=randoms))
        .mark_tick(thickness=1.4, size=20, color=MUTED, opacity=0.6)
        .encode(x=x, y=y),
    ]
    for main, paint in ((False, INK), (True, ACCENT)):
        some = base.transform_filter(f"datum.main === {str(main).lower()}")
        layers += [
            some.mark_rule(stroke=paint, strokeWidth=2.2).encode(
                x=alt.X("low:Q", title=title, axis=flush), x2="high:Q"
            ),
            some.mark_point(
                shape="diamond" if main else "circle",
                stroke=paint,
                fill=paint if main else CARD,
                size=70,
                opacity=1,
            ).encode(x=x),
        ]
    parts = [name.split("|") for name in order]
    room = _room(line for lines in parts for line in lines)
    tall = max((len(lines) for lines in parts), default=1)  # Lines of the longest label.
    return _sized(layers, width, 60 + max(50, 13 * tall + 8) * len(order), left=room)


def path(
    rows: Rows, width: int, *, x_title: str, y_title: str, order: Sequence[str]
) -> alt.LayerChart:
    """Ways through a plane; a square is where each begins, a diamond where it ends.

    Args:
        rows: Of `x`, `y`, `step`, `series`, `end` ("start", "end" or "") and `tip`.
        width: Pixels.
        x_title: Of the flat axis.
        y_title: Of the upright axis.
        order: The series.
    """
    colour, dash = _series(order, _named(order, width))
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("x:Q", title=x_title), y=alt.Y("y:Q", title=y_title), color=colour
    )
    layers: list[alt.Chart] = [
        base.mark_line(strokeWidth=1.8).encode(order="step:Q", detail="series:N", strokeDash=dash),
        base.mark_point(filled=True, size=20, opacity=1).encode(description="tip:N"),
    ]
    layers += [
        base.transform_filter(f"datum.end == '{end}'").mark_point(
            shape=shape, filled=True, size=95, opacity=1
        )
        for end, shape in (("start", "square"), ("end", "diamond"))
    ]
    return _sized(layers, width, 280)


_PART_SHAPES = {
    "embed": "cross",
    "head": "circle",
    "attn": "triangle-up",
    "bias": "stroke",
    "mlp": "square",
}


def parts_plane(rows: Rows, width: int, *, x_title: str, y_title: str) -> alt.LayerChart:
    """Components in the plane of what they contribute to two things; the largest have names.

    Args:
        rows: Of `x`, `y`, `kind` (see `ComponentRow`), `name` (empty for most) and `tip`.
        width: Pixels.
        x_title: Of the flat axis.
        y_title: Of the upright axis.
    """
    kinds = [kind for kind in _PART_SHAPES if any(row["kind"] == kind for row in rows)]
    legend = alt.Legend(title=None, orient="top")
    marks = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("x:Q", title=x_title), y=alt.Y("y:Q", title=y_title)
    )
    layers = [
        _guide("x", 0.0),
        _guide("y", 0.0),
        marks.mark_point(size=44, opacity=0.75, stroke=ACCENT).encode(
            shape=alt.Shape(
                "kind:N",
                scale=alt.Scale(domain=kinds, range=[_PART_SHAPES[kind] for kind in kinds]),
                legend=legend,
            ),
            description="tip:N",
        ),
        marks.transform_filter("datum.name !== ''")
        .mark_text(align="left", dx=6, dy=-6, color=INK)
        .encode(text="name:N"),
    ]
    return _sized(layers, width, 340)


def circuit(
    rows: Rows, width: int, *, order: Sequence[str], names: Sequence[str]
) -> alt.LayerChart:
    """Which components write, or are needed for, two things: blocks from left to right.

    Args:
        rows: Of `layer`, `part` (one of `order`), `series` (one of `names`), `size` (0 to 1, of the
            largest of its series), `sign` ("towards" or "against") and `tip`.
        width: Pixels.
        order: Parts of a block, the top row first.
        names: Both series, which stand side by side in each place.
    """
    layers = sorted({row["layer"] for row in rows})
    x = alt.X("layer:O", title="block", sort=layers).axis(
        labelAngle=0, values=[int(one) for one in spaced([str(i) for i in layers], width - 120)]
    )
    base = alt.Chart(
        alt.InlineData(values=[{**row, "series": list(names).index(row["series"])} for row in rows])
    )
    marks: list[alt.Chart] = []
    for i in range(len(names)):
        some = base.transform_filter(f"datum.series === {i}").encode(
            x=x,
            y=alt.Y("part:N", sort=list(order), title=None),
            size=alt.Size("size:Q", scale=alt.Scale(domain=[0, 1], range=[0, 190]), legend=None),
            description="tip:N",
        )
        paint = (ACCENT, HARMFUL)[i % 2]
        marks += [
            some.transform_filter("datum.sign === 'towards'").mark_circle(
                color=paint, opacity=0.85, xOffset=(-5, 5)[i % 2]
            ),
            some.transform_filter("datum.sign === 'against'").mark_point(
                stroke=paint, strokeWidth=1.5, opacity=0.9, xOffset=(-5, 5)[i % 2]
            ),
        ]
    return _sized(marks, width, 40 + 22 * len(order))


def row_label(*parts: str) -> str:
    """Parts of a row's name, each on lines of its own; "|" is where the axis breaks them."""
    return "|".join(line for part in parts for line in wrap(readable(part), 24) or [""])


def span(value: Estimate) -> dict[str, float]:
    """An estimate as the fields that marks are drawn from."""
    return {"value": value.value, "low": value.low, "high": value.high}

"""What a notebook shows of demur's objects: small HTML tables, and charts that Altair draws.

Plain numbers and text come in, so that a direction, a selection, a comparison and the report can
share one way of writing and drawing. Names and recipes may come from a stranger's file: tables
escape them, and charts spell out or replace what a page or a drawing would obey.

Tables set no colour of their own, so that they read on a light and on a dark page. Charts are left
to the theme in force; their marks are of a palette that colour-blind readers can tell apart, and
differ in shape or dash as well.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from typing import TYPE_CHECKING, Any

from demur.stats import Estimate

if TYPE_CHECKING:
    import altair as alt

Rows = list[dict[str, Any]]

INK, MUTED, FAINT, CARD = "#1a2026", "#57626c", "#bcc5cc", "#ffffff"
ACCENT, WARM, COOL = "#6d3fc0", "#bf4307", "#1a68b3"
SERIES = (ACCENT, WARM, COOL, "#8a4b00", "#0f6b33", MUTED)
DASHES = ((1, 0), (6, 3), (2, 2), (8, 3, 2, 3))
KIND_ORDER = ("resid_pre", "attn_out", "mlp_out", "resid_post")
WIDTH = 560

_LONGEST = 80  # Letters of a name in a chart; tables wrap what is longer.
# Characters that reorder or hide their neighbours, which a reader must see instead of obey.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
_ALLOWED = frozenset({"\n", "\t", "\u200d", "\ufe0f"})

# Text -------------------------------------------------------------------------------------------


def readable(text: str) -> str:
    """`text` with every character spelt out that would act on the reader or break a drawing."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(f"⟦U+{ord(mark):04X}⟧" if _acts(mark) else mark for mark in text)


@cache
def _acts(mark: str) -> bool:
    """Whether a character is a control, reorders or hides others, or is none at all."""
    if mark in _ALLOWED:
        return False
    code = ord(mark)
    nobody = code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
    return nobody or unicodedata.category(mark) in _HIDDEN


def number(value: float | None, spec: str = ".3g", *, signed: bool = False) -> str:
    """A number with a true minus sign."""
    if value is None or not math.isfinite(value):
        return "not measured"
    text = format(value, ("+" if signed and value else "") + spec)
    mantissa, _, exponent = text.partition("e")
    if exponent:
        text = f"{mantissa}e{int(exponent)}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "\N{MINUS SIGN}")


def digits(low: float, high: float) -> str:
    """The format whose digits follow an interval's width."""
    width = high - low
    if not width > 0:
        return ".3g"
    return f".{min(max(1 - math.floor(math.log10(width)), 0), 6)}f"


def said(value: Estimate | None) -> str:
    """`0.31 [0.24, 0.39], n=128`, or that it was not measured."""
    if value is None:
        return "not measured"
    spec = digits(value.low, value.high)
    point, low, high = (number(part, spec) for part in (value.value, value.low, value.high))
    return f"{point} [{low}, {high}], n={value.n}"


def drawn(text: str) -> str:
    """A name as a chart may hold it: Altair writes it into a script, where `</` would end that."""
    short = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return readable(short).replace("<", "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}")


# Tables -----------------------------------------------------------------------------------------

_CELL = (
    "padding:.2em .8em .2em 0;text-align:left;vertical-align:top;background:transparent;"
    "border:0;border-bottom:1px solid rgba(128,128,128,.35);overflow-wrap:anywhere"
)


def table(
    caption: str, rows: Iterable[Sequence[str]], *, head: Sequence[str] = (), note: str = ""
) -> str:
    """A table as HTML that stands by itself; all text is escaped, no colour is set.

    Args:
        caption: Its first line.
        rows: Of as many cells as `head`; the first cell names the row.
        head: Names of the columns; none for a list of facts.
        note: Its last line.
    """

    def cell(text: str, kind: str, scope: str = "") -> str:
        own = escape(readable(text))
        weight = "" if kind == "td" else ";font-weight:600"
        return f'<{kind}{scope} style="{_CELL}{weight}">{own}</{kind}>'

    top = "".join(cell(name, "th", ' scope="col"') for name in head)
    lines = (
        cell(first, "th", ' scope="row"') + "".join(cell(text, "td") for text in rest)
        for first, *rest in rows
    )
    body = "".join(f'<tr style="background:transparent">{cells}</tr>' for cells in lines)
    line = "text-align:left;color:inherit;max-width:60em"
    below = f'<p style="{line};margin:.3em 0">{escape(readable(note))}</p>' if note else ""
    return (
        f'<div><table style="border-collapse:collapse;color:inherit;max-width:60em">'
        f'<caption style="{line};caption-side:top;font-weight:600">'
        f"{escape(readable(caption))}</caption>"
        + (f"<thead><tr>{top}</tr></thead>" if head else "")
        + f"<tbody>{body}</tbody></table>{below}</div>"
    )


# Depth ------------------------------------------------------------------------------------------


def site_key(site: str) -> tuple[int, int, str]:
    """Where a site comes in the forward pass; unknown names go last."""
    layer, _, kind = site.partition(".")
    order = KIND_ORDER.index(kind) if kind in KIND_ORDER else len(KIND_ORDER)
    return (int(layer) if layer.isdecimal() else 1 << 30, order, site)


def site_ticks(sites: Sequence[str]) -> tuple[dict[str, str], str]:
    """Short axis labels for `sites`, and the axis title that says what they are short for.

    The commonest kind is left to the title; a site of another kind keeps its kind, after a "|"
    where the axis breaks the line.
    """
    kinds = [site.partition(".")[2] for site in sites]
    common = max(set(kinds), key=kinds.count, default="")
    ticks = {}
    for site, kind in zip(sites, kinds, strict=True):
        layer = site.partition(".")[0]
        ticks[site] = layer if kind == common else f"{layer}|{kind.removeprefix('resid_')}"
    return ticks, f"site: N stands for N.{common}"


def spaced(labels: Sequence[str], room: float) -> list[str]:
    """As many of `labels`, evenly, as fit into `room` pixels; always the first and the last."""
    step = max(math.ceil(len(labels) * 26 / room), 1)
    kept = list(labels[::step])
    if labels and kept[-1] != labels[-1]:
        if (len(labels) - 1) % step < step / 2 and len(kept) > 1:
            kept.pop()
        kept.append(labels[-1])
    return kept


def site_axis(sites: Sequence[str], width: float) -> tuple[dict[str, str], alt.X]:
    """Short labels of `sites`, which are in order, and the flat axis that shows them."""
    import altair as alt

    ticks, title = site_ticks(sites)
    along = [ticks[site] for site in sites]
    axis = alt.X("site:O", sort=along, title=title).axis(
        labelExpr="split(datum.label, '|')",
        labelAngle=0,
        values=spaced(along, width),
        grid=False,
    )
    return ticks, axis


@dataclass(frozen=True, slots=True)
class Look:
    """How lines against depth are drawn: by a notebook, or by the report in paints of its own.

    Attributes:
        colour: Of each series; likewise `dash`.
        faint: Of the null band.
        muted: Of the line at zero.
        hover: The channel that shows a mark's `tip`.
    """

    colour: alt.Color
    dash: alt.StrokeDash
    faint: str
    muted: str
    hover: Mapping[str, str]


def depth_layers(
    rows: Rows, bands: Rows, room: float, *, title: str, look: Look
) -> list[alt.Chart]:
    """Lines of several series against depth, before the band of what is found where nothing is.

    Args:
        rows: Of `site`, `series`, `pair` (a line of its own), `value`, `low`, `high` and `tip`;
            without an interval `low` and `high` are the value.
        bands: Of `site`, `low` and `high`.
        room: Pixels for the labels of sites.
        title: Of the upright axis.
        look: How it is drawn.
    """
    import altair as alt

    sites = sorted({row["site"] for row in (*rows, *bands)}, key=site_key)
    ticks, x = site_axis(sites, room)
    y = alt.Y("value:Q", title=title)
    shown, null = (
        alt.Chart(
            alt.InlineData(values=[{**row, "site": ticks[row["site"]]} for row in some])
        ).encode(x=x)
        for some in (rows, bands)
    )
    colour, dash = look.colour, look.dash
    return [
        null.mark_area(color=look.faint, opacity=0.35).encode(
            y=alt.Y("low:Q", title=title), y2="high:Q"
        ),
        _zero("y", look.muted),
        shown.mark_rule(strokeOpacity=0.4, strokeWidth=1.4).encode(
            y=alt.Y("low:Q", title=title), y2="high:Q", color=colour
        ),
        shown.mark_line(strokeWidth=2).encode(y=y, color=colour, strokeDash=dash, detail="pair:N"),
        shown.mark_point(filled=True, size=36, opacity=1).encode(y=y, color=colour, **look.hover),
    ]


def _zero(axis: str, paint: str) -> alt.Chart:
    import altair as alt

    rule = alt.Chart(alt.InlineData(values=[{"guide": 0.0}])).mark_rule(
        stroke=paint, strokeWidth=1, strokeDash=[1, 0], strokeOpacity=0.8
    )
    return rule.encode(x=alt.X("guide:Q")) if axis == "x" else rule.encode(y=alt.Y("guide:Q"))


def by_depth(rows: Rows, bands: Rows, *, title: str) -> alt.LayerChart:
    """A chart of `depth_layers` for a notebook; each series has a colour and a dash."""
    import altair as alt

    order = list(dict.fromkeys(row["series"] for row in rows))
    paints = [SERIES[i % len(SERIES)] for i in range(len(order))]
    dashes = [list(DASHES[(i + i // len(SERIES)) % len(DASHES)]) for i in range(len(order))]
    legend = alt.Legend(title=None, orient="top", columns=1, labelLimit=WIDTH - 60)
    look = Look(
        alt.Color("series:N", scale=alt.Scale(domain=order, range=paints), legend=legend),
        alt.StrokeDash("series:N", scale=alt.Scale(domain=order, range=dashes), legend=legend),
        FAINT,
        MUTED,
        {"tooltip": "tip:N"},
    )
    layers = depth_layers(rows, bands, WIDTH - 70, title=title, look=look)
    return alt.LayerChart(layer=list(layers)).properties(width=WIDTH, height=260)


# One direction ----------------------------------------------------------------------------------


def cosines(rows: Rows, band: float, *, title: str) -> alt.LayerChart:
    """Cosines as bars from zero, before the band within which a random direction would lie.

    Args:
        rows: Of `name`, `value` and `tip`; the order is kept.
        band: |cosine| at both of its ends.
        title: Of the flat axis.
    """
    import altair as alt

    order = [row["name"] for row in rows]
    y = alt.Y("name:N", sort=order, title=None).axis(labelLimit=220)
    scale = alt.Scale(domain=[-1, 1])
    base = alt.Chart(alt.InlineData(values=rows)).encode(y=y, tooltip="tip:N")
    x = alt.X("value:Q", title=title, scale=scale)
    layers = [
        _band(band, scale, title),
        _zero("x", MUTED),
        base.mark_bar(color=ACCENT, height=7, opacity=0.75).encode(x=x, x2=alt.datum(0)),
        base.mark_point(shape="diamond", filled=True, size=70, color=ACCENT, opacity=1).encode(x=x),
    ]
    return alt.LayerChart(layer=layers).properties(width=WIDTH, height=40 + 24 * len(rows))


def _band(reach: float, scale: alt.Scale, title: str) -> alt.Chart:
    import altair as alt

    return (
        alt.Chart(alt.InlineData(values=[{"low": -reach, "high": reach}]))
        .mark_rect(color=FAINT, opacity=0.45)
        .encode(x=alt.X("low:Q", scale=scale, title=title), x2="high:Q")
    )


def ranked(rows: Rows, *, title: str) -> alt.LayerChart:
    """The largest coordinates of a direction, before those of random ones.

    Args:
        rows: Of `rank`, `value`, `low` and `high` (of random directions at this rank), `tip`.
        title: Of the upright axis.
    """
    import altair as alt

    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("rank:O", title="coordinates, the largest first").axis(
            labelAngle=0, values=[1, *range(5, len(rows) + 1, 5)]
        )
    )
    y = alt.Y("value:Q", title=title)
    layers = [
        base.mark_area(color=FAINT, opacity=0.45).encode(
            y=alt.Y("low:Q", title=title), y2="high:Q"
        ),
        base.mark_rule(color=ACCENT, strokeWidth=1.6).encode(y=y, y2=alt.datum(0)),
        base.mark_point(color=ACCENT, filled=True, size=34, opacity=1).encode(y=y, tooltip="tip:N"),
    ]
    return alt.LayerChart(layer=layers).properties(width=WIDTH, height=220)


def groups(points: Rows, means: Rows, *, title: str) -> alt.LayerChart:
    """Prompts by group along a direction, each group's mean before where chance would put it.

    Args:
        points: Of `group` and `value`.
        means: Of `group`, `value`, `low`, `high`, `null_low`, `null_high` and `tip`.
        title: Of the flat axis.
    """
    import altair as alt

    order = [row["group"] for row in means]
    paints = [(WARM, COOL, ACCENT, MUTED)[i % 4] for i in range(len(order))]
    colour = alt.Color("group:N", scale=alt.Scale(domain=order, range=paints), legend=None)
    y = alt.Y("group:N", sort=order, title=None).axis(labelLimit=220)
    each = alt.Chart(alt.InlineData(values=points)).encode(y=y)
    mean = alt.Chart(alt.InlineData(values=means)).encode(y=y, tooltip="tip:N")
    layers = [
        mean.mark_bar(color=FAINT, opacity=0.5, height=34).encode(
            x=alt.X("null_low:Q", title=title), x2="null_high:Q"
        ),
        _zero("x", MUTED),
        each.mark_tick(size=20, thickness=1.2, opacity=0.55).encode(
            x=alt.X("value:Q", title=title), color=colour
        ),
        mean.mark_rule(color=INK, strokeWidth=2.4).encode(
            x=alt.X("low:Q", title=title), x2="high:Q"
        ),
        mean.mark_point(
            shape="diamond", fill=INK, stroke=CARD, strokeWidth=1, size=90, opacity=1
        ).encode(x=alt.X("value:Q", title=title)),
    ]
    return alt.LayerChart(layer=layers).properties(width=WIDTH, height=30 + 52 * len(order))


# A selection ------------------------------------------------------------------------------------


def candidate_map(rows: Rows, *, title: str, diverging: bool) -> alt.LayerChart:
    """One score of every candidate by site and position; the one that was chosen is framed.

    A full cell passed every criterion, a small one did not, a cross was not measured.

    Args:
        rows: Of `site`, `position`, `value` (None where it was not measured), `state` ("passed",
            "rejected" or "missing"), `chosen`, and of whatever the pointer is to show: the fields
            that are none of these, in their order.
        title: Of the colours, with their unit.
        diverging: Whether they part at zero; else they follow the logarithm.
    """
    import altair as alt

    sites = sorted({row["site"] for row in rows}, key=site_key)
    ticks, x = site_axis(sites, WIDTH)
    shown = [
        {**row, "site": ticks[row["site"]], "at": row["site"], "value": _positive(row, diverging)}
        for row in rows
    ]
    values = [row["value"] for row in shown if row["value"] is not None]
    far = max([3.0, *map(abs, values)]) if diverging else 0.0
    scale = (
        # Below 3 log-odds colours stay pale: noise must not look like an effect.
        alt.Scale(scheme="purplegreen", domain=[-far, far], domainMid=0)
        if diverging
        else alt.Scale(scheme="oranges", type="log")
    )
    hidden = {"site", "value", "state", "chosen"}
    names = dict.fromkeys(["at", *(key for row in rows for key in row if key not in hidden)])
    tips = [alt.Tooltip(f"{name}:N", title="site" if name == "at" else name) for name in names]
    base = alt.Chart(alt.InlineData(values=shown)).encode(
        x=x, y=alt.Y("position:O", sort="ascending", title="position"), tooltip=tips
    )
    colour = alt.Color("value:Q", title=title, scale=scale).legend(
        orient="top", gradientLength=240, titleLimit=WIDTH
    )
    full, small = alt.RelativeBandSize(0.94), alt.RelativeBandSize(0.56)
    ring = base.transform_filter("datum.chosen")
    layers = [
        base.transform_filter("datum.state == 'rejected'")
        .mark_rect(width=small, height=small, stroke=FAINT, strokeWidth=0.8)
        .encode(color=colour),
        base.transform_filter("datum.state == 'passed'")
        .mark_rect(width=full, height=full, stroke=FAINT, strokeWidth=0.8)
        .encode(color=colour),
        base.transform_filter("datum.state == 'missing'").mark_point(
            shape="M-.6,-.6L.6,.6M.6,-.6L-.6,.6", size=70, stroke=MUTED, strokeWidth=1.2
        ),
        ring.mark_rect(fill=None, stroke=CARD, strokeWidth=5, strokeOpacity=1),
        ring.mark_rect(fill=None, stroke=INK, strokeWidth=2.5, strokeOpacity=1),
    ]
    height = 24 * len({row["position"] for row in rows})
    return alt.LayerChart(layer=layers).properties(width=WIDTH, height=max(height, 60))


def _positive(row: Mapping[str, Any], diverging: bool) -> float | None:
    """A score as its scale can hold it: a logarithm needs one above 0."""
    value = row["value"]
    return value if diverging or value is None else max(value, 1e-6)


# A comparison -----------------------------------------------------------------------------------


def forest(rows: Rows, nulls: Rows, *, title: str) -> alt.LayerChart:
    """Cosines with their intervals, before what each null would give.

    Args:
        rows: Of `row`, `value`, `low`, `high`, `main` and `tip`; the order is kept.
        nulls: Of `null`, `upper` (of |cosine|) and `tip`; the widest one is the band.
        title: Of the flat axis.
    """
    import altair as alt

    order = [row["row"] for row in rows]
    scale = alt.Scale(domain=[-1, 1])
    y = alt.Y("row:N", sort=order, title=None).axis(labelLimit=260, grid=True)
    base = alt.Chart(alt.InlineData(values=rows)).encode(y=y, tooltip="tip:N")
    names = [row["null"] for row in nulls]
    both = [{**row, "at": sign * row["upper"]} for row in nulls for sign in (-1, 1)]
    legend = alt.Legend(
        title="95 % of |cosine| lies within", orient="top", columns=2, symbolSize=240
    )
    edges = (
        alt.Chart(alt.InlineData(values=both))
        .mark_rule(color=MUTED, strokeWidth=1.6)
        .encode(
            x=alt.X("at:Q", scale=scale, title=title),
            strokeDash=alt.StrokeDash(
                "null:N",
                scale=alt.Scale(
                    domain=names, range=[list(DASHES[i % len(DASHES)]) for i in range(len(names))]
                ),
                legend=legend,
            ),
            tooltip="tip:N",
        )
    )
    layers = [_band(max(row["upper"] for row in nulls), scale, title), edges] if nulls else []
    layers.append(_zero("x", MUTED))
    for main, paint in ((False, MUTED), (True, ACCENT)):
        some = base.transform_filter(f"datum.main === {str(main).lower()}")
        layers += [
            some.mark_rule(color=paint, strokeWidth=2.4).encode(
                x=alt.X("low:Q", scale=scale, title=title), x2="high:Q"
            ),
            some.mark_point(
                shape="diamond" if main else "circle", filled=True, color=paint, size=70, opacity=1
            ).encode(x=alt.X("value:Q", scale=scale, title=title)),
        ]
    return alt.LayerChart(layer=layers).properties(width=WIDTH, height=40 + 24 * len(order))

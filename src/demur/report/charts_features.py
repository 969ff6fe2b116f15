"""Charts of latents: planes with names in them, and what clamping does by how far it moves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import altair as alt

from demur.report.charts import (
    ACCENT,
    CARD,
    COST,
    FAINT,
    HARMFUL,
    HARMLESS,
    INK,
    LINE,
    MUTED,
    NARROW,
    Box,
    Rows,
    _named,
    _series,
    _sized,
    placed,
)

MARKS: Mapping[str, tuple[str, str, bool]] = {
    "promotes": ("diamond", ACCENT, True),
    "suppresses": ("triangle-down", COST, True),
    "none shown": ("circle", MUTED, False),
    "candidate": ("diamond", ACCENT, True),
    "other": ("circle", MUTED, False),
}
"""Shape, paint and whether it is full, of every kind of latent."""
FAMILIES = ("random direction", "matched latents", "other latents")
"""Those of which there are several draws, which are shown as ranges."""
_BESIDE = {"dense direction": -7, "matched latents": -4, "other latents": 4}  # Pixels.
_AXIS = 66  # Pixels that an upright axis takes.
_LABEL = 24  # Characters of a name that fit a telephone's drawing.


@dataclass(frozen=True, slots=True)
class _Plane:
    """A drawing's plot in pixels, and both of its ends in numbers."""

    x: tuple[float, float]
    y: tuple[float, float]
    wide: float
    high: float

    @classmethod
    def over(cls, xs: Sequence[float], ys: Sequence[float], width: int, high: int) -> _Plane:
        return cls(_ends(xs), _ends(ys), width - _AXIS, high)

    def pixel(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0]) * self.wide
        return across, self.high - (y - self.y[0]) / (self.y[1] - self.y[0]) * self.high

    def back(self, x: float, y: float) -> tuple[float, float]:
        across = self.x[0] + x / self.wide * (self.x[1] - self.x[0])
        return across, self.y[0] + (self.high - y) / self.high * (self.y[1] - self.y[0])

    def scales(self) -> tuple[alt.Scale, alt.Scale]:
        return (
            alt.Scale(domain=list(self.x), nice=False, zero=False),
            alt.Scale(domain=list(self.y), nice=False, zero=False),
        )

    def labels(self, rows: Rows) -> Rows:
        """Where the names of `rows` (of `x`, `y` and `name`) go, and lines to those far off."""
        texts = [_cut(row["name"]) for row in rows]
        marks = [self.pixel(row["x"], row["y"]) for row in rows]
        sizes = [(6.6 * len(text), 14.0) for text in texts]
        out: Rows = []
        for text, mark, box, row in zip(
            texts, marks, placed(marks, sizes, (self.wide, self.high)), rows, strict=True
        ):
            near = box.nearest(*mark)
            to = self.back(*near)
            edge, side = _anchor(mark, box)
            at = self.back(edge, (box.top + box.bottom) / 2)
            out.append(
                {
                    "text": text,
                    "side": side,
                    "x": at[0],
                    "y": at[1],
                    "from_x": row["x"],
                    "from_y": row["y"],
                    "to_x": to[0],
                    "to_y": to[1],
                    "far": math.dist(mark, near) > 18,
                }
            )
        return out

    def made(self, layers: Sequence[alt.Chart]) -> alt.LayerChart:
        chart = alt.LayerChart(layer=list(layers))
        # Names are placed in the pixels of the plot itself, so that it, not the whole, is so large.
        return chart.properties(width=self.wide, height=self.high, autosize="pad", padding=4)


def _anchor(mark: tuple[float, float], box: Box) -> tuple[float, str]:
    near = box.nearest(*mark)
    if near[0] > mark[0]:
        return box.left, "left"
    if near[0] < mark[0]:
        return box.right, "right"
    return (box.left + box.right) / 2, "center"


def _cut(text: str) -> str:
    return text if len(text) <= _LABEL else text[: _LABEL - 1] + "…"


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Where an axis begins and ends that holds `values` and 0 with some air."""
    low, high = min([0.0, *values]), max([0.0, *values])
    air = 0.07 * (high - low) or 1.0
    return (low - air if low < 0 else 0.0), (high + air if high > 0 else 0.0 + air)


def _log_scale(values: Sequence[float]) -> alt.Scale:
    return alt.Scale(
        type="log", domain=[min(values) / 1.15, max(values) * 1.15], nice=False, zero=False
    )


def _powers(scale: alt.Scale) -> list[float]:
    """Ticks of a logarithmic axis: powers of ten, of two where it is short."""
    low, high = scale.to_dict()["domain"]
    for base in (10.0, 2.0, 1.2):
        first, last = (math.log(end, base) for end in (low, high))
        found = [base**i for i in range(math.ceil(first), math.floor(last) + 1)]
        if len(found) > 2:
            break
    return [float(f"{one:.3g}") for one in found]


def _line(key: str, value: float, scale: alt.Scale, *, dash: Sequence[int]) -> alt.Chart:
    rule = alt.Chart(alt.InlineData(values=[{"at": value}])).mark_rule(
        stroke=MUTED, strokeWidth=1, strokeDash=list(dash), strokeOpacity=0.8
    )
    if key == "x":
        return rule.encode(x=alt.X("at:Q", scale=scale))
    return rule.encode(y=alt.Y("at:Q", scale=scale))


def _names(
    labels: Rows, plane: _Plane, *, x_title: str, y_title: str, paint: str = INK
) -> list[alt.Chart]:
    """Layers of names and of the lines that lead to them."""
    x_scale, y_scale = plane.scales()
    base = alt.Chart(alt.InlineData(values=labels))

    def x(key: str) -> alt.X:
        return alt.X(f"{key}:Q", title=x_title, scale=x_scale)

    def y(key: str) -> alt.Y:
        return alt.Y(f"{key}:Q", title=y_title, scale=y_scale)

    return [
        base.transform_filter("datum.far")
        .mark_rule(strokeWidth=1, stroke=MUTED, strokeDash=[2, 2])
        .encode(x=x("from_x"), x2="to_x", y=y("from_y"), y2="to_y"),
        *(
            base.transform_filter(f"datum.side === '{side}'")
            .mark_text(align=side, baseline="middle", color=paint, fontSize=11)
            .encode(x=x("x"), y=y("y"), text="text:N")
            for side in ("left", "right", "center")
            if any(one["side"] == side for one in labels)
        ),
    ]


def latents_plane(
    rows: Rows,
    width: int,
    *,
    x_title: str,
    y_title: str,
    level: float | None = None,
    diagonal: bool = False,
) -> alt.LayerChart:
    """Latents in the plane of two figures; those that matter have names.

    Args:
        rows: Of `x`, `y`, `low` and `high` (of y; None where it has no interval), `kind` (one of
            `MARKS`), `name` (empty for most; where names compete, the first rows win) and `tip`.
        width: Pixels, with the axis.
        x_title: Of the flat axis.
        y_title: Of the upright axis.
        level: Where a flat line stands, such as that of significance.
        diagonal: Whether a line shows where both figures are the same.
    """
    ys = [row[key] for row in rows for key in ("y", "low", "high") if row[key] is not None]
    plane = _Plane.over(
        [row["x"] for row in rows], [*ys, *([] if level is None else [level])], width, 300
    )
    x_scale, y_scale = plane.scales()
    x = alt.X("x:Q", title=x_title, scale=x_scale)
    y = alt.Y("y:Q", title=y_title, scale=y_scale)
    kinds = [kind for kind in MARKS if any(row["kind"] == kind for row in rows)]
    # Those with names lie above the others.
    base = alt.Chart(alt.InlineData(values=sorted(rows, key=lambda row: row["name"] != "")))
    layers = [_line("x", 0.0, x_scale, dash=[1, 0]), _line("y", 0.0, y_scale, dash=[1, 0])]
    if level is not None:
        layers.append(_line("y", level, y_scale, dash=[4, 3]))
    if diagonal:
        low, high = max(plane.x[0], plane.y[0]), min(plane.x[1], plane.y[1])
        ends = [{"x": low, "y": low, "x2": high, "y2": high}]
        layers.append(
            alt.Chart(alt.InlineData(values=ends))
            .mark_rule(stroke=MUTED, strokeDash=[4, 3], strokeWidth=1)
            .encode(x=x, y=y, x2="x2", y2="y2")
        )
    layers.append(
        base.transform_filter("isValid(datum.low)")
        .mark_rule(stroke=MUTED, strokeOpacity=0.5, strokeWidth=1.4)
        .encode(x=x, y=alt.Y("low:Q", title=y_title, scale=y_scale), y2="high:Q")
    )
    many = len(kinds) > 1
    for kind in reversed(kinds):
        shape, paint, full = MARKS[kind]
        layers.append(
            base.transform_filter(f"datum.kind === '{kind}'")
            .mark_point(
                shape=shape,
                size=64 if full else 34,
                stroke=paint,
                fill=paint if full else CARD,
                strokeWidth=1.4,
                opacity=0.9,
            )
            .encode(x=x, y=y, description="tip:N")
        )
    if many:
        # An invisible layer, for the legend alone.
        layers.append(
            base.mark_point(size=0, opacity=0).encode(
                x=x,
                y=y,
                shape=alt.Shape(
                    "kind:N",
                    scale=alt.Scale(domain=kinds, range=[MARKS[kind][0] for kind in kinds]),
                    legend=alt.Legend(
                        title=None,
                        orient="top",
                        symbolOpacity=1,
                        columnPadding=16,
                        symbolSize=64,
                        symbolStrokeColor=INK,
                        symbolFillColor=CARD,
                        columns=1 if width <= NARROW and len(kinds) > 3 else len(kinds),
                    ),
                ),
            )
        )
    named = [row for row in rows if row["name"]]
    if named:
        layers += _names(plane.labels(named), plane, x_title=x_title, y_title=y_title)
    return plane.made(layers)


def dose_panel(
    points: Rows,
    ranges: Rows,
    width: int,
    *,
    x_title: str,
    title: str,
    origin: float = 0.0,
    factors: bool = False,
) -> alt.LayerChart:
    """One outcome of clamping by how far tokens are moved; to the left what is taken down.

    Args:
        points: Of `x`, `value`, `low`, `high`, `family` ("set", "dense direction" or "prompt"),
            `line` (points of one are joined, in order of x; empty for none), `open` (off the
            manifold), `name` (empty for most) and `tip`.
        ranges: Of `x`, `low`, `high` and `family` (one of `FAMILIES`), over several draws, and
            `tip`.
        width: Pixels, with the axis.
        x_title: Of the flat axis.
        title: Of the upright axis, with its unit.
        origin: What the unedited model has.
        factors: Whether the values are factors, all above 0, that a logarithmic axis suits.
    """
    high = 230
    ys = [row[key] - origin for row in points for key in ("value", "low", "high")]
    ys += [row[key] - origin for row in ranges for key in ("low", "high")]
    plane = _Plane.over([row["x"] for row in (*points, *ranges)], ys, width, high)
    if origin:
        plane = _Plane(plane.x, (plane.y[0] + origin, plane.y[1] + origin), plane.wide, plane.high)
    x_scale, y_scale = plane.scales()
    if factors:
        y_scale = _log_scale([origin, *(value + origin for value in ys)])
    x = alt.X("x:Q", title=x_title, scale=x_scale).axis(labelExpr="format(abs(datum.value), '~g')")

    def y(key: str) -> alt.Y:
        axis = alt.Axis(values=_powers(y_scale), format="~g") if factors else alt.Axis()
        return alt.Y(f"{key}:Q", title=title, scale=y_scale, axis=axis)

    # Beside the set's mark where several lie at one place.
    pixel = (plane.x[1] - plane.x[0]) / plane.wide
    points, ranges = (
        [{**row, "at": row["x"] + _BESIDE.get(row["family"], 0) * pixel} for row in rows]
        for rows in (points, ranges)
    )
    at = alt.X("at:Q", title=x_title, scale=x_scale)
    own = alt.Chart(alt.InlineData(values=points))
    drawn = alt.Chart(alt.InlineData(values=ranges))
    band = [row for row in ranges if row["family"] == "random direction"]
    layers = [
        alt.Chart(alt.InlineData(values=_from_nothing(band, origin)))
        .mark_area(color=FAINT, opacity=0.4, line=False)
        .encode(x=x, y=y("low"), y2="high:Q", detail="side:N"),
        _line("y", origin, y_scale, dash=[1, 0]),
        _line("x", 0.0, x_scale, dash=[1, 0]),
    ]
    for family, paint, dash in (
        ("random direction", FAINT, [1, 0]),
        ("matched latents", HARMLESS, [3, 2]),
        ("other latents", COST, [1, 0]),
    ):
        some = drawn.transform_filter(f"datum.family === '{family}'")
        layers.append(
            some.mark_rule(stroke=paint, strokeWidth=2.6, strokeDash=dash).encode(
                x=at, y=y("low"), y2="high:Q", description="tip:N"
            )
        )
    lines = own.transform_filter("datum.line !== ''")
    layers += [
        lines.mark_line(stroke=ACCENT, strokeWidth=1.6, strokeOpacity=0.7).encode(
            x=x, y=y("value"), detail="line:N", order="x:Q"
        )
    ]
    for family, shape, paint, size in (
        ("prompt", "triangle-up", INK, 60),
        ("dense direction", "square", HARMFUL, 46),
        ("set", "diamond", ACCENT, 95),
    ):
        some = own.transform_filter(f"datum.family === '{family}'")
        layers.append(
            some.mark_rule(stroke=paint, strokeWidth=1.8).encode(x=at, y=y("low"), y2="high:Q")
        )
        for hollow in (False, True):
            layers.append(
                some.transform_filter(f"datum.open === {str(hollow).lower()}")
                .mark_point(
                    shape=shape,
                    size=size,
                    stroke=paint,
                    fill=CARD if hollow else paint,
                    strokeWidth=1.8,
                    opacity=1,
                )
                .encode(x=at, y=y("value"), description="tip:N")
            )
    named = [{**row, "y": row["value"]} for row in points if row["name"]]
    if named:
        layers += _names(plane.labels(named), plane, x_title=x_title, y_title=title)
    return plane.made(layers)


def _from_nothing(band: Rows, origin: float) -> Rows:
    """A band on both sides of no edit, each from there on."""
    out: Rows = []
    for side, own in (
        ("down", [row for row in band if row["x"] < 0]),
        ("up", [row for row in band if row["x"] >= 0]),
    ):
        if own:
            start = {"x": 0.0, "low": origin, "high": origin}
            out += [
                {**row, "side": side}
                for row in [start, *({k: r[k] for k in ("x", "low", "high")} for r in own)]
            ]
    return sorted(out, key=lambda row: row["x"])


def by_turn(rows: Rows, width: int, *, title: str, order: Sequence[str]) -> alt.LayerChart:
    """A figure of several series by turn, each with its interval beside those of the others.

    Args:
        rows: Of `x` (the turn), `series`, `value`, `low`, `high` and `tip`.
        width: Pixels.
        title: Of the upright axis, with its unit.
        order: The series.
    """
    turns = sorted({row["x"] for row in rows})
    # Intervals that lay on one another would be one block.
    step = min(0.07 * max(len(turns) - 1, 1), 0.12)
    aside = {name: step * (i - (len(order) - 1) / 2) for i, name in enumerate(order)}
    colour, dash = _series(order, _named(order, width))
    scale = alt.Scale(domain=[turns[0] - 0.4, turns[-1] + 0.4], nice=False, zero=False)
    base = alt.Chart(
        alt.InlineData(values=[{**row, "at": row["x"] + aside[row["series"]]} for row in rows])
    ).encode(
        x=alt.X("at:Q", title="turn", scale=scale).axis(values=turns, format="d", grid=False),
        detail="series:N",
        color=colour,
    )
    y = alt.Y("value:Q", title=title)
    layers: list[alt.Chart] = [
        base.mark_line(strokeWidth=1.8).encode(y=y, strokeDash=dash),
        base.mark_rule(strokeWidth=1.8, strokeOpacity=0.7).encode(
            y=alt.Y("low:Q", title=title), y2="high:Q"
        ),
        base.mark_point(filled=True, size=42, opacity=1).encode(y=y, description="tip:N"),
    ]
    return _sized(layers, width, 260)


def selection(rows: Rows, width: int, *, title: str) -> alt.LayerChart:
    """How far down refusal comes as one latent after another is taken away.

    Args:
        rows: Of `step` (from 0), `value` and `tip`.
        width: Pixels, with the axis.
        title: Of the upright axis, with its unit.
    """
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("step:O", title="latents taken away").axis(labelAngle=0, grid=False),
        y=alt.Y("value:Q", title=title),
    )
    layers = [
        base.mark_bar(fill=ACCENT, fillOpacity=0.25, stroke=LINE, width={"band": 0.5}),
        base.mark_point(shape="diamond", filled=True, fill=ACCENT, size=80, opacity=1).encode(
            description="tip:N"
        ),
    ]
    return alt.LayerChart(layer=layers).properties(
        width=min(width, 120 + 60 * len(rows)) - _AXIS, height=180, autosize="pad", padding=4
    )

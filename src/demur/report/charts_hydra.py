"""Charts of self-repair: what rises where, the 2 x 2, and starve curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from demur.report.charts import (
    _SERIES,
    ACCENT,
    CARD,
    COST,
    HARMFUL,
    INK,
    LINE,
    MUTED,
    NARROW,
    Rows,
    _guide,
    _named,
    _room,
    _series,
    _sized,
    _zero,
    spaced,
)

_CELL = 20  # Pixels of a cell where there is room.
_SHAPES = {"backup": "diamond", "generic": "square", "": "circle"}
_PAINTS = {"backup": ACCENT, "generic": COST, "": MUTED}


def rise_map(
    rows: Rows, width: int, *, blocks: Sequence[int], units: Sequence[str], ranked: bool = False
) -> alt.LayerChart:
    """Every later unit by block, inked by its rise; blocks run down where it is narrow.

    A dot marks a rise that is clear after correction, a frame a backup, a broken frame one that
    matched random ablations bring about as well.

    Args:
        rows: Of `block`, `unit`, `paint`, `ink` (0 to 1), `clear`, `state` ("backup", "generic" or
            "") and `tip`.
        width: Pixels.
        blocks: In order.
        units: Names within a block, in order.
        ranked: Whether `units` are ranks within a block instead of names.
    """
    down = width <= NARROW and len(blocks) > len(units) > 2
    title = "rank by rise, within a block" if ranked else None
    base = alt.Chart(alt.InlineData(values=rows)).encode(description="tip:N")
    if down:
        base = base.encode(
            x=alt.X("unit:N", sort=list(units), title=title).axis(
                labelAngle=-90, labelLimit=120, orient="top", grid=False
            ),
            y=alt.Y("block:O", sort=list(blocks), title="block").axis(grid=False),
        )
    else:
        ticks = spaced([str(one) for one in blocks], width - 110)
        base = base.encode(
            x=alt.X("block:O", sort=list(blocks), title="block").axis(
                labelAngle=0, grid=False, values=[int(one) for one in ticks]
            ),
            y=alt.Y("unit:N", sort=list(units), title=title).axis(labelLimit=120, grid=False),
        )
    full = alt.RelativeBandSize(0.92)
    framed = base.transform_filter("datum.state !== ''")
    layers = [
        base.mark_rect(width=full, height=full, stroke=LINE, strokeWidth=0.8).encode(
            fill=alt.Fill("paint:N", scale=None),
            fillOpacity=alt.FillOpacity("ink:Q", scale=None),
        ),
        framed.transform_filter("datum.state === 'backup'").mark_rect(
            width=full, height=full, fill=None, stroke=INK, strokeWidth=2.2
        ),
        framed.transform_filter("datum.state === 'generic'").mark_rect(
            width=full, height=full, fill=None, stroke=INK, strokeWidth=1.8, strokeDash=[3, 2]
        ),
        base.transform_filter("datum.clear").mark_circle(
            color=INK, size=26, opacity=1, stroke=CARD, strokeWidth=1
        ),
    ]
    long = max(map(len, units), default=0)
    if down:
        return _sized(layers, width, 60 + 15 * len(blocks) + 7 * long, top=_room(units))
    # Few blocks would make cells as long as the page.
    wide = min(width, 120 + 3 * _CELL * len(blocks))
    return _sized(layers, wide, 58 + _CELL * max(len(units), 2), left=_room(units))


def rises(rows: Rows, width: int, *, least: float | None, title: str) -> alt.LayerChart:
    """How far units rise, beside what random ablations and frozen norms leave of it.

    Args:
        rows: Of `row`, `value`, `null`, `norms`, `state` ("backup", "generic" or "") and `tip`.
        width: Pixels.
        least: Rise that a backup needs.
        title: Of the axis, with its unit.
    """
    order = list(dict.fromkeys(row["row"] for row in rows))
    x = alt.X("value:Q", title=title, axis=alt.Axis(labelFlush=True, tickCount=8))
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        y=alt.Y("row:N", sort=order, title=None).axis(
            labelExpr="split(datum.label, '|')", labelLimit=150, grid=True, ticks=False
        ),
        description="tip:N",
    )
    layers = [_zero("x")]
    if least is not None:
        layers.append(_guide("x", least))
    layers.append(
        base.transform_filter("isValid(datum.null)")
        .mark_tick(thickness=2.4, size=18, color=MUTED, opacity=0.9)
        .encode(x=alt.X("null:Q", title=title))
    )
    layers += [
        base.transform_filter(f"datum.state === '{state}'")
        .mark_point(shape=shape, filled=True, fill=_PAINTS[state], size=95, opacity=1)
        .encode(x=x)
        for state, shape in _SHAPES.items()
    ]
    # Above the marks: where norms change nothing both lie in one place.
    layers.append(
        base.transform_filter("isValid(datum.norms)")
        .mark_point(shape="circle", stroke=INK, fill=CARD, size=26, opacity=1)
        .encode(x=alt.X("norms:Q", title=title))
    )
    parts = [line for name in order for line in name.split("|")]
    tall = max((name.count("|") + 1 for name in order), default=1)
    return _sized(layers, width, 56 + max(24, 13 * tall + 8) * len(order), left=_room(parts))


def crossed(rows: Rows, width: int, *, title: str, order: Sequence[str]) -> alt.LayerChart:
    """The 2 x 2: primary set intact and ablated, a line for each state of the upstream set.

    Args:
        rows: Of `primary` ("intact" or "ablated"), `series`, `value`, `low`, `high`, `held` (None,
            or the value with backups held) and `tip`.
        width: Pixels.
        title: Of the upright axis, with its unit.
        order: The series.
    """
    colour, dash = _series(order, _named(order, width))
    scale = alt.Scale(zero=False)
    y = alt.Y("value:Q", title=title, scale=scale)
    x = alt.X("primary:N", sort=["intact", "ablated"], title="primary set").axis(
        labelAngle=0, grid=False
    )
    base = alt.Chart(alt.InlineData(values=rows)).encode(x=x, detail="series:N", color=colour)
    layers: list[alt.Chart] = [
        base.mark_rule(strokeOpacity=0.5, strokeWidth=1.6).encode(
            y=alt.Y("low:Q", title=title, scale=scale), y2="high:Q"
        ),
        base.mark_line(strokeWidth=2.2).encode(y=y, strokeDash=dash),
        base.mark_point(filled=True, size=60, opacity=1).encode(y=y, description="tip:N"),
        base.transform_filter("isValid(datum.held)")
        .mark_point(shape="triangle-down", fill=CARD, size=60, opacity=1, xOffset=14)
        .encode(y=alt.Y("held:Q", title=title, scale=scale), description="tip:N"),
    ]
    return _sized(layers, width, 280)


def starved(
    rows: Rows, width: int, *, x_title: str, order: Sequence[str], whole: bool = False
) -> alt.LayerChart:
    """Drops as more and more of a set is ablated; open marks are matched random units.

    Args:
        rows: Of `x`, `series` (of `order`), `random`, `value`, `low`, `high` and `tip`.
        width: Pixels.
        x_title: Of the flat axis, with its unit.
        order: The series.
        whole: Whether `x` counts.
    """
    paints = (HARMFUL, ACCENT, *_SERIES[2:])[: len(order)]
    legend = _named(order, width)
    colour = alt.Color(
        "series:N", scale=alt.Scale(domain=list(order), range=list(paints)), legend=legend
    )
    dash = alt.StrokeDash(
        "series:N",
        scale=alt.Scale(domain=list(order), range=[[1, 0], [6, 3]][: len(order)]),
        legend=legend,
    )
    title = "drop of refusal log-odds (nats)"
    ticks: dict[str, Any] = {"tickCount": 6}
    if whole:
        most = int(max((row["x"] for row in rows), default=0))
        ticks = {"values": list(range(0, most + 1, max(most // 6, 1))), "format": "d"}
    span = {"y": alt.Y("low:Q", title=title), "y2": "high:Q"}
    y = alt.Y("value:Q", title=title)
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("x:Q", title=x_title).axis(**ticks),
        detail="series:N",
        color=colour,
    )
    own = base.transform_filter("!datum.random")
    chance = base.transform_filter("datum.random")
    layers: list[alt.Chart] = [
        _zero("y"),
        own.mark_area(opacity=0.16).encode(**span),
        own.mark_line(strokeWidth=2.2).encode(y=y, strokeDash=dash, order="x:Q"),
        chance.mark_rule(strokeWidth=1.6, strokeOpacity=0.7).encode(**span),
    ]
    # Shapes by layer: as an encoding they would be drawn into the legend of lines.
    for i, name in enumerate(order):
        mark = {"shape": ("circle", "square")[i % 2], "opacity": 1}
        some = f"datum.series === '{name}'"
        layers += [
            chance.transform_filter(some)
            .mark_point(fill=CARD, size=60, **mark)
            .encode(y=y, description="tip:N"),
            own.transform_filter(some)
            .mark_point(filled=True, size=50, **mark)
            .encode(y=y, description="tip:N"),
        ]
    return _sized(layers, width, 270)

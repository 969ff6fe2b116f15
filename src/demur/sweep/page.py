"""From the table of a sweep to one page of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import altair as alt

from demur.report import charts, words
from demur.report.charts import BROAD, CARD, FALL, INK, LINE, RISE
from demur.report.page import rendered, write_page
from demur.stats import Estimate
from demur.sweep.table import SweepResults, SweepRow, read_results

Outcome = Literal["auroc", "ablation", "addition", "kl"]


@dataclass(frozen=True, slots=True)
class _Chart:
    """What one figure shows of every audit."""

    field: Outcome
    title: str
    kind: words.Kind
    guide: float
    caption: str


_STANDS = "Diamonds: audits that stand. Circles: those that do not. Bars: 95 % intervals."
_CHARTS = (
    _Chart(
        "ablation",
        "refused, ablated, change (points)",
        "points",
        0.0,
        f"How many harmful requests fewer are refused with the direction ablated. {_STANDS}",
    ),
    _Chart(
        "addition",
        "refused, added, change (points)",
        "points",
        0.0,
        f"How many harmless requests more are refused with the direction added. {_STANDS}",
    ),
    _Chart(
        "auroc",
        "AUROC",
        "number",
        0.5,
        f"Harmful against harmless prompts by projection. The line is one half. {_STANDS}",
    ),
    _Chart(
        "kl",
        "KL, nats",
        "number",
        0.0,
        f"What ablating the direction costs on harmless prompts. {_STANDS}",
    ),
)


@dataclass(frozen=True, slots=True)
class Grid:
    """How far the directions of one model agree.

    Attributes:
        model: Its label.
        names: Of its audits with a direction, in the order of rows and columns.
        values: Cosines, row by row; 1 on the diagonal.
        figure: The same, drawn.
    """

    model: str
    names: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    figure: charts.Figure


def write_sweep(record: Path, out: Path | None = None) -> Path:
    """Write the page of a sweep, whole or not at all.

    Args:
        record: Its `results.json`.
        out: Where to; `sweep.html` beside the record if None.

    Returns:
        The file written.

    Raises:
        StoreError: The record cannot be read, or the page cannot be written.
    """
    found = read_results(record)
    page = rendered("sweep.html.j2", r=found, v=_view(found), record=record.name)
    return write_page(page, record.with_name("sweep.html") if out is None else out)


def _view(found: SweepResults) -> dict[str, Any]:
    whole = [row for row in found.rows if row.error is None]
    several = len({row.model for row in found.rows}) > 1
    return {
        "stands": sum(bool(row.usable) for row in whole),
        "whole": len(whole),
        "failed": [row for row in found.rows if row.error is not None],
        "models": list(dict.fromkeys(row.model for row in found.rows)),
        "estimators": list(dict.fromkeys(row.estimator for row in found.rows)),
        "seeds": sorted({row.seed for row in found.rows}),
        "sizes": _sizes(whole),
        "figures": [
            (chart, _outcomes(chart, whole, several=several))
            for chart in _CHARTS
            if any(getattr(row, chart.field) is not None for row in whole)
        ],
        "grids": _grids(found),
    }


def _sizes(rows: Sequence[SweepRow]) -> str:
    """How many prompts each column rests on, where that is one number for all audits."""
    said: list[str] = []
    for field, name in (("ablation", "refusals"), ("auroc", "AUROC"), ("kl", "KL")):
        found = {value.n for row in rows if (value := getattr(row, field)) is not None}
        if len(found) == 1:
            said.append(f"{name} {found.pop()}")
    return ", ".join(said)


def _name(row: SweepRow) -> str:
    return f"{row.estimator}, {row.seed}"


def _outcomes(chart: _Chart, rows: Sequence[SweepRow], *, several: bool) -> charts.Figure:
    scale = 100.0 if chart.kind == "points" else 1.0
    drawn: charts.Rows = []
    for row in rows:
        value: Estimate | None = getattr(row, chart.field)
        if value is None:
            continue
        said = words.said(value, chart.kind)
        label = (row.model, _name(row)) if several else (_name(row),)
        drawn.append(
            {
                "row": charts.row_label(*label),
                **{key: scale * part for key, part in charts.span(value).items()},
                "random": not row.usable,
                "tip": charts.tip(f"{row.model}, {_name(row)}: {said}"),
            }
        )
    return charts.figure(
        partial(charts.forest, drawn, title=chart.title, guide=chart.guide),
        name=chart.field,
        label=f"{chart.title} of every audit; table above.",
        wide=BROAD,
    )


def _grids(found: SweepResults) -> list[Grid]:
    known = {(pair.a, pair.b): pair.value for pair in found.cosines}
    grids: list[Grid] = []
    for model in dict.fromkeys(row.model for row in found.rows):
        own = [i for i, row in enumerate(found.rows) if row.model == model and row.error is None]
        # Records of older versions hold no pairs.
        if len(own) < 2 or any(pair not in known for pair in combinations(own, 2)):
            continue
        values = tuple(
            tuple(1.0 if i == j else known[min(i, j), max(i, j)] for j in own) for i in own
        )
        names = tuple(_name(found.rows[i]) for i in own)
        grids.append(Grid(model, names, values, _drawn(len(grids), model, names, values)))
    return grids


def _drawn(
    number: int, model: str, names: Sequence[str], values: Sequence[Sequence[float]]
) -> charts.Figure:
    rows: charts.Rows = [
        {
            "a": str(i + 1),
            "b": words.readable(f"{j + 1}  {names[j]}"),
            "paint": RISE if values[i][j] > 0 else FALL,
            "ink": 0.0 if i == j else round(abs(values[i][j]), 3),
            "text": "" if i == j else words.number(values[i][j], ".2f", signed=True),
            "tip": charts.tip(
                f"{names[i]} and {names[j]}: {words.number(values[i][j], '.2f', signed=True)}"
            ),
        }
        for i in range(len(names))
        for j in range(len(names))
    ]
    return charts.figure(
        partial(_grid, rows),
        name=f"grid{number}",
        label=f"Cosines of the directions of {model}; table below.",
        wide=BROAD,
    )


def _grid(rows: charts.Rows, width: int) -> alt.LayerChart:
    """Cosines of all pairs, inked by their size and coloured by their sign."""
    columns = list(dict.fromkeys(row["a"] for row in rows))
    lines = list(dict.fromkeys(row["b"] for row in rows))
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("a:N", sort=columns, title=None).axis(labelAngle=0, orient="top", grid=False),
        y=alt.Y("b:N", sort=lines, title=None).axis(labelLimit=170, grid=False),
        description="tip:N",
    )
    full = alt.RelativeBandSize(0.94)
    layers: list[alt.Chart] = [
        base.mark_rect(width=full, height=full, stroke=LINE, strokeWidth=0.8).encode(
            fill=alt.Fill("paint:N", scale=None),
            fillOpacity=alt.FillOpacity("ink:Q", scale=None),
        )
    ]
    room = 190
    if (width - room) / len(columns) >= 34:  # Else a number would not fit into its cell.
        layers += [
            base.transform_filter(test).mark_text(color=paint, fontSize=11).encode(text="text:N")
            for test, paint in (("datum.ink <= 0.55", INK), ("datum.ink > 0.55", CARD))
        ]
    wide = min(width, room + 64 * len(columns))
    return charts._sized(layers, wide, 40 + 30 * len(lines), left=charts._room(lines))

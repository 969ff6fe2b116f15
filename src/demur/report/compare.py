"""From the record of a comparison to one page of HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from demur.compare.rows.behaviour import Behaviour, MatrixCell, MediationRow
from demur.compare.rows.circuits import PatchingRow, ReadWriteRow
from demur.compare.rows.geometry import null_bands
from demur.compare.rows.record import Circuits, CompareRecord, Counted, Placed, read_compare
from demur.report import charts, words
from demur.report.charts import BROAD, HALF
from demur.report.page import rendered, write_page
from demur.stats import Estimate

PAIRS = {
    "em and refusal": "Emergent misalignment and refusal",
    "em and harm": "Emergent misalignment and harm",
    "harm and refusal": "Harm and refusal",
    "twin and refusal": "Control: good advice and refusal",
    "twin and harm": "Control: good advice and harm",
    "two organisms": "Two organisms",
    "shift and em text": "What training did, and how bad text reads",
    "twin and em text": "Control: what good training did, and how bad text reads",
    "in the organism": "As the organism itself has them",
    "before and after": "Before and after training",
    "stored": "Stored vectors",
}
VERDICTS = {
    "the same": "complied",
    "opposite": "complied",
    "partly shared": "partial",
    "through a shared cause": "partial",
    "unrelated": "refused",
    "undetermined": "",
}
_LABELLED = 8
_ROWS = 26  # Of a circuit's drawing; heads beyond it are left to the table.


@dataclass(frozen=True, slots=True)
class Cell:
    """One entry of the verdict matrix, and how much ink it gets, from -1 to 1."""

    row: MatrixCell
    ink: float


@dataclass(frozen=True, slots=True)
class Table:
    """The matrix of one pair in one model: arms against outcomes."""

    model: str
    outcomes: list[str]
    arms: dict[str, dict[str, Cell]]


def write_compare(record: Path, out: Path | None = None) -> Path:
    """Write the page of a comparison, whole or not at all.

    Args:
        record: `compare.json`.
        out: Where to; `compare.html` beside the record if None.

    Returns:
        The file written.

    Raises:
        StoreError: The record cannot be read, or the page cannot be written.
    """
    found = read_compare(record)
    page = rendered("compare.html.j2", r=found, v=_view(found), record=record.name)
    return write_page(page, record.with_name("compare.html") if out is None else out)


def section_view(found: CompareRecord) -> dict[str, Any]:
    """What the section of an audit's report shows beside the record."""
    return {
        "pairs": {key: title for key, title in PAIRS.items() if _of(found, key)},
        "badges": VERDICTS,
        "figures": _cosine_figures(found),
    }


def _of(found: CompareRecord, pair: str) -> list[Placed]:
    return [one for one in found.comparisons if one.pair == pair]


def _view(found: CompareRecord) -> dict[str, Any]:
    section = section_view(found)
    return section | {
        "comparisons": {pair: _of(found, pair) for pair in section["pairs"]},
        "null": _null,
        "tables": [_tables(one) for one in found.behaviours],
        "clamped": [row for row in found.mediations if row.way == "clamp"],
        "patched": [row for row in found.mediations if row.way == "patch"],
        "random_range": _random_range,
        "largest": _largest,
        "strongest": _strongest,
        "methods": _methods(found),
        "figures": section["figures"] | _figures(found),
    }


def _null(one: Placed, name: str) -> Any:
    return next((null for null in one.row.nulls if null.name == name), None)


def _tables(found: Behaviour) -> list[Table]:
    """A table a model; ink by change over the furthest of its outcome in any model."""
    most: dict[str, float] = {}
    for row in found.cells:
        most[row.outcome] = max(most.get(row.outcome, 0.0), abs(row.change.value))
    models = list(dict.fromkeys(row.model for row in found.cells))
    out: list[Table] = []
    for model in models:
        own = [row for row in found.cells if row.model == model]
        arms: dict[str, dict[str, Cell]] = {}
        for row in own:
            ink = row.change.value / (most[row.outcome] or 1.0)
            arms.setdefault(row.arm, {})[row.outcome] = Cell(row, ink)
        out.append(Table(model, list(dict.fromkeys(row.outcome for row in own)), arms))
    return out


def _random_range(row: MediationRow) -> str:
    if not row.random:
        return ""
    low, high = min(row.random), max(row.random)
    return f"{words.number(low, '.2f', signed=True)} to {words.number(high, '.2f', signed=True)}"


def _largest(row: PatchingRow, n: int = 12) -> list[Any]:
    return sorted(row.components, key=lambda part: -abs(part.estimated.value))[:n]


def _strongest(rows: Sequence[ReadWriteRow], n: int = 24) -> list[ReadWriteRow]:
    """Those parts of an adapter that write or read most along a direction."""

    def size(row: ReadWriteRow) -> float:
        return max(abs(row.write_cosine or 0.0), abs(row.read_cosine or 0.0))

    return sorted(rows, key=lambda row: -size(row))[:n]


def _methods(found: CompareRecord) -> list[tuple[str, str]]:
    kinds: list[tuple[str, Iterable[Estimate | None]]] = [
        ("cosines", [one.row.interval for one in found.comparisons]),
        ("unbiased cosines", [one.row.unbiased for one in found.comparisons]),
        ("edits", [row.change for one in found.behaviours for row in one.cells]),
        ("held coordinates", [row.change for row in found.mediations]),
        ("directions counted", [row.change for one in found.counted for row in one.dimensions]),
    ]
    named = [
        (name, "; ".join(dict.fromkeys(part.method for part in parts if part)))
        for name, parts in kinds
    ]
    return [(name, method) for name, method in named if method]


# Figures --------------------------------------------------------------------------------------


def _cosine_figures(found: CompareRecord) -> dict[str, charts.Figure]:
    made: dict[str, charts.Figure] = {}
    for pair, title in PAIRS.items():
        rows = [one for one in _of(found, pair) if one.row.interval is not None]
        if len({one.row.site for one in rows}) > 1:
            made[pair] = _cosine_figure(pair, title, rows)
    return made


def _cosine_figure(pair: str, title: str, rows: Sequence[Placed]) -> charts.Figure:
    bands = null_bands(one.row for one in rows)
    drawn: charts.Rows = []
    for one in rows:
        interval = one.row.interval
        assert interval is not None
        name = words.readable(f"{one.row.a} and {one.row.b}, {one.place}")
        # Both names would not fit beside a telephone's legend; the second one is in the title.
        where = "answers" if "answer" in one.place else "prompts"
        series = words.readable(f"{one.row.a}, {where}")
        drawn.append(
            {
                "site": one.row.site,
                "series": series,
                "pair": name,
                "value": one.row.cosine,
                "low": interval.low,
                "high": interval.high,
                "tip": charts.tip(f"{name} at {one.row.site}: {words.said(interval)}"),
            }
        )
    order = list(dict.fromkeys(row["series"] for row in drawn))
    return charts.figure(
        partial(charts.by_depth, drawn, bands, title="cosine", order=order),
        name="cosine-" + pair.replace(" ", "-"),
        label=f"{title}: cosine by depth before the band of unrelated contrasts; table below.",
        wide=BROAD,
    )


def _figures(found: CompareRecord) -> dict[str, Any]:
    made: dict[str, Any] = {
        "behaviour": [_behaviour_figure(i, one) for i, one in enumerate(found.behaviours)],
        "written": [_written_figures(i, one) for i, one in enumerate(found.circuits)],
        "counted": [_counted_figure(one) for one in found.counted],
    }
    if found.mediations:
        rows = [row for row in found.mediations if row.way == "clamp"]
        made["mediation"] = charts.figure(
            partial(
                charts.strips,
                [
                    {
                        "row": charts.row_label(f"{row.mediator}:", row.outcome),
                        **charts.span(row.change),
                        "main": True,
                        "tip": charts.tip(
                            f"{row.mediator} held, {row.outcome}: "
                            f"{words.said(row.change, 'signed')}"
                        ),
                    }
                    for row in rows
                ],
                [
                    {"row": charts.row_label(f"{row.mediator}:", row.outcome), "value": value}
                    for row in rows
                    for value in row.random
                ],
                title="change as the coordinate is held (nats)",
            ),
            name="mediation",
            label="What holding each coordinate does, before random directions; table below.",
            wide=BROAD,
        )
    return made


def _behaviour_figure(i: int, found: Behaviour) -> charts.Figure | None:
    """What each arm does to each outcome, one line each, in the model furthest from the base."""
    models = {row.model for row in found.cells}
    model = "organism" if "organism" in models else "base"
    rows = [row for row in found.cells if row.model == model and row.outcome != "damage"]
    if not rows:
        return None
    scale = {
        outcome: max(abs(row.change.value) for row in rows if row.outcome == outcome) or 1.0
        for outcome in dict.fromkeys(row.outcome for row in rows)
    }
    ordered = sorted(rows, key=lambda row: list(scale).index(row.outcome))
    return charts.figure(
        partial(
            charts.strips,
            [
                {
                    "row": charts.row_label(f"{row.outcome}:", row.arm),
                    "value": row.change.value / scale[row.outcome],
                    "low": row.change.low / scale[row.outcome],
                    "high": row.change.high / scale[row.outcome],
                    "main": True,
                    "tip": charts.tip(
                        f"{row.arm}, {row.outcome} in {row.model}: "
                        f"{words.said(row.change, 'signed')} "
                        f"{row.unit}"
                    ),
                }
                for row in ordered
            ],
            [
                {
                    "row": charts.row_label(f"{row.outcome}:", row.arm),
                    "value": value / scale[row.outcome],
                }
                for row in ordered
                for value in (row.random_low, row.random_high)
                if value is not None
            ],
            title="change, as a share of the largest of its outcome",
        ),
        name=f"behaviour-{i}",
        label=f"What edits along {found.a} and {found.b} do in {model}; table below.",
        wide=BROAD,
    )


def _written_figures(i: int, found: Circuits) -> dict[str, charts.Figure]:
    made: dict[str, charts.Figure] = {}
    if len(found.attributions) == 2:
        harmful, bad = (one.row for one in found.attributions)
        other = {part.name: part for part in bad.components}
        both = [
            (part, part.values[found.b].value, other[part.name].values[found.a].value)
            for part in harmful.components
            if part.name in other
        ]
        far = max((abs(x) for _, x, _ in both), default=1.0) or 1.0
        high = max((abs(y) for _, _, y in both), default=1.0) or 1.0
        named = sorted(both, key=lambda one: -((one[1] / far) ** 2 + (one[2] / high) ** 2))
        names = {part.name for part, _, _ in named[:_LABELLED]}
        made["scatter"] = charts.figure(
            partial(
                charts.parts_plane,
                [
                    {
                        "x": x,
                        "y": y,
                        "kind": part.kind,
                        "name": part.name if part.name in names else "",
                        "tip": charts.tip(
                            f"{part.name}: {words.number(x, '.3f', signed=True)} along {found.b}, "
                            f"{words.number(y, '.3f', signed=True)} along {found.a}"
                        ),
                    }
                    for part, x, y in both
                ],
                x_title=f"writes {found.b}",
                y_title=f"writes {found.a}",
            ),
            name=f"scatter-{i}",
            label=f"Components by what they write to {found.b} and to {found.a}; tables below.",
            wide=HALF,
        )
        made["circuit"] = _circuit_figure(
            f"circuit-{i}",
            [(part.layer, part.kind, part.head, found.b, x / far) for part, x, _ in both]
            + [(part.layer, part.kind, part.head, found.a, y / high) for part, _, y in both],
            (found.b, found.a),
            "write",
        )
    if len(found.patchings) == 2:
        rows: list[tuple[int | None, str, int | None, str, float]] = []
        for row in found.patchings:
            most = max((abs(part.estimated.value) for part in row.components), default=1.0) or 1.0
            rows += [
                (part.layer, part.kind, part.head, row.measure, part.estimated.value / most)
                for part in row.components
            ]
        made["needed"] = _circuit_figure(
            f"needed-{i}", rows, tuple(row.measure for row in found.patchings), "are needed for"
        )
    return made


def _circuit_figure(
    name: str,
    rows: Sequence[tuple[int | None, str, int | None, str, float]],
    names: Sequence[str],
    verb: str,
) -> charts.Figure:
    heads = sorted({head for _, _, head, _, _ in rows if head is not None})[: _ROWS - 2]
    kinds = {kind for layer, kind, head, _, _ in rows if layer is not None and head is None}
    order = [
        *(f"head {head}" for head in heads),
        *(kind for kind in ("attn", "mlp") if kind in kinds),
    ]
    drawn: charts.Rows = [
        {
            "layer": layer,
            "part": f"head {head}" if head is not None else kind,
            "series": series,
            "size": abs(share),
            "sign": "towards" if share >= 0 else "against",
            "tip": charts.tip(
                f"{layer}.{'head' + str(head) if head is not None else kind}, {series}: "
                f"{words.number(share, '.2f', signed=True)} of the largest"
            ),
        }
        for layer, kind, head, series, share in rows
        if layer is not None and kind != "bias" and abs(share) > 0.02
    ]
    drawn = [row for row in drawn if row["part"] in order]
    return charts.figure(
        partial(charts.circuit, drawn, order=order, names=list(names)),
        name=name,
        label=f"Which components {verb} {' and '.join(names)}, by block; tables below.",
        wide=BROAD,
    )


def _counted_figure(found: Counted) -> charts.Figure | None:
    if not found.dimensions:
        return None
    return charts.figure(
        partial(
            charts.strips,
            [
                {
                    "row": f"direction {row.k}",
                    **charts.span(row.change),
                    "main": True,
                    "tip": charts.tip(
                        f"direction {row.k}: {words.said(row.change, 'signed')} nats"
                    ),
                }
                for row in found.dimensions
            ],
            [
                {"row": f"direction {row.k}", "value": value}
                for row in found.dimensions
                for value in row.null_changes
            ],
            title="change of refusal log-odds (nats)",
        ),
        name=f"counted-{found.method}",
        label=f"What each further direction does, search {found.method}; table below.",
        wide=HALF,
    )

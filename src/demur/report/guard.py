"""From the record of a guard's evaluation to one page of HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import Any

from demur.report import charts, words
from demur.report.charts import BROAD
from demur.report.page import rendered, write_page
from demur.results import GuardEvaluation, GuardRow, read_guard_evaluation

GUARD = "guard"


@dataclass(frozen=True, slots=True)
class Line:
    """One group of prompts, with what every detector says of it, by the detector's name."""

    family: str
    group: str
    harmful: bool
    rows: dict[str, GuardRow]


def write_guard(record: Path, out: Path | None = None) -> Path:
    """Write the page of a guard's evaluation, whole or not at all.

    Args:
        record: `guard-evaluation.json`.
        out: Where to; beside the record, ending in `.html`, if None.

    Returns:
        The file written.

    Raises:
        StoreError: The record cannot be read, or the page cannot be written.
    """
    found = read_guard_evaluation(record)
    page = rendered("guard.html.j2", r=found, v=_view(found))
    return write_page(page, record.with_suffix(".html") if out is None else out)


def _lines(found: GuardEvaluation) -> list[Line]:
    groups: dict[tuple[str, str, bool], dict[str, GuardRow]] = {}
    for row in found.rows:
        groups.setdefault((row.family, row.group, row.harmful), {})[row.detector] = row
    return [Line(*key, rows) for key, rows in groups.items()]


def _view(found: GuardEvaluation) -> dict[str, Any]:
    lines = _lines(found)
    benign = [line for line in lines if not line.harmful]
    harmful = [line for line in lines if line.harmful]
    alphas = sorted({float(key) for row in found.rows for key in row.flagged})
    at = f"{found.alpha:g}"
    plain = [line for line in benign if line.family == "plain"]
    return {
        "benign": benign,
        "harmful": harmful,
        # The promised rate first: the others are folded.
        "alphas": sorted((f"{alpha:g}" for alpha in alphas), key=lambda alpha: alpha != at),
        "at": at,
        "worst": max(
            (line for line in plain if at in line.rows[GUARD].flagged),
            key=lambda line: line.rows[GUARD].flagged[at].value,
            default=None,
        ),
        "figures": {
            name: _figure(found, own, at, name)
            for name, own in (("false alarms", benign), ("found", harmful))
            if own
        },
        "areas": charts.figure(
            partial(charts.forest, _area_rows(harmful), title="AUROC", guide=0.5),
            name="areas",
            label="AUROC of every detector on each group; table above.",
            wide=BROAD,
        ),
        # Tiles stand three in a row where there is room: no hole is left in the last one.
        "fillers": -(2 + sum(line.family == "plain" for line in harmful)) % 3,
    }


def _share(row: GuardRow, at: str) -> Any:
    """At the chosen false-alarm rate, else by the detector's own rule."""
    return row.flagged.get(at, row.fixed)


def _figure(found: GuardEvaluation, lines: Sequence[Line], at: str, name: str) -> charts.Figure:
    rows: charts.Rows = []
    for line in lines:
        for detector, row in line.rows.items():
            estimate = _share(row, at)
            if estimate is None:
                continue
            rows.append(
                {
                    "row": _label(line),
                    "value": 100 * estimate.value,
                    "low": 100 * estimate.low,
                    "high": 100 * estimate.high,
                    "random": detector != GUARD,
                    "tip": charts.tip(
                        f"{line.group}, {detector}: {words.estimate(estimate, 'share').striptags()}"
                    ),
                }
            )
    return charts.figure(
        partial(charts.forest, rows, title="flagged (%)", guide=100 * found.alpha),
        name=name.replace(" ", "-"),
        label=f"Share flagged by every detector in each group, {name}; table above.",
        wide=BROAD,
    )


def _area_rows(lines: Sequence[Line]) -> charts.Rows:
    return [
        {
            "row": _label(line),
            "value": row.auroc.value,
            "low": row.auroc.low,
            "high": row.auroc.high,
            "random": detector != GUARD,
            "tip": charts.tip(f"{line.group}, {detector}: {words.estimate(row.auroc).striptags()}"),
        }
        for line in lines
        for detector, row in line.rows.items()
        if row.auroc is not None
    ]


def _label(line: Line) -> str:
    if line.family == "plain":
        return "|".join(wrap(line.group, 22)[:2])
    return f"{wrap(line.group, 22)[0]}|{line.family}"

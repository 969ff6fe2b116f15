"""The table of a sweep: a row for each cell, and how far the directions of a model agree."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from demur.results import read_record
from demur.stats import Estimate


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SweepRow(_Row):
    """One cell: an audit, or the error that it ended in.

    Attributes:
        model: Its label in the sweep.
        error: What went wrong, None where nothing did; likewise `hint`.
        run: Folder of the audit in that of the sweep.
        fit: Prompts per class that the direction was estimated from.
        norm: Of the direction, in residual-stream units at `site`.
        auroc: Harmful against harmless on the report split, by projection.
        ablation: Change of the share of harmful requests that are refused, direction ablated.
        addition: Change of the share of harmless requests that are refused, direction added.
        kl: On harmless prompts under ablation, nats.
        cosine: With the directions of the other cells of the model: mean, and range from the least
            to the greatest; None where there is no other.
        seconds: That the audit took; what is shared by cells is not in it.
    """

    model: str
    estimator: str
    seed: int
    error: str | None = None
    hint: str | None = None
    run: str | None = None
    fit: dict[str, int] | None = None
    site: str | None = None
    position: int | None = None
    norm: float | None = None
    auroc: Estimate | None = None
    ablation: Estimate | None = None
    addition: Estimate | None = None
    kl: Estimate | None = None
    cosine: Estimate | None = None
    usable: bool | None = None
    headline: str | None = None
    seconds: float | None = None


class Agreement(_Row):
    """How far the directions of one model agree.

    Attributes:
        over: "seeds": pairs of one estimator and different seeds; "estimators": pairs of one seed
            and different estimators.
        sites: Different sites and positions among the cells' directions.
        cosine: Mean over the pairs; the interval is a jackknife over seeds where there are three
            or more, else the range of the pairs.
    """

    model: str
    over: Literal["seeds", "estimators"]
    cells: int
    sites: int
    cosine: Estimate


class CosineRow(_Row):
    """Cosine of the directions of two cells of one model.

    Attributes:
        a: Place of the first among the rows, from 0; likewise `b`, behind it.
    """

    a: int
    b: int
    value: float


class SweepResults(_Row):
    """All of a sweep's `results.json`.

    Attributes:
        cosines: Of every pair of cells of one model that have a direction.
    """

    schema_version: int = 1
    kind: Literal["sweep"] = "sweep"
    demur: str
    config: dict[str, Any]
    rows: list[SweepRow]
    agreement: list[Agreement]
    cosines: list[CosineRow] = []

    @property
    def failed(self) -> int:
        """Cells that ended in an error."""
        return sum(row.error is not None for row in self.rows)

    def figures(self) -> dict[str, Any]:
        """Without what another run of the same sweep changes: times, and names of run folders."""
        whole = self.model_dump(mode="json")
        for row in whole["rows"]:
            del row["seconds"], row["run"]
        return whole


def read_results(path: Path) -> SweepResults:
    """Read a sweep's `results.json`.

    Raises:
        StoreError: It is missing, cut short, changed, or of another schema version.
    """
    return read_record(path, SweepResults, "demur sweep")


def agreement(rows: Sequence[SweepRow], pairs: Sequence[CosineRow]) -> list[Agreement]:
    """How far the cells of each model agree, from the cosines of all its pairs."""
    found = []
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model and row.error is None]
        places = len({(row.site, row.position) for row in own})
        groups: dict[Literal["seeds", "estimators"], list[tuple[int, int, float]]] = {
            "seeds": [],
            "estimators": [],
        }
        for pair in pairs:
            a, b = rows[pair.a], rows[pair.b]
            if a.model != model:
                continue
            if a.estimator == b.estimator and a.seed != b.seed:
                groups["seeds"].append((a.seed, b.seed, pair.value))
            elif a.seed == b.seed and a.estimator != b.estimator:
                groups["estimators"].append((a.seed, b.seed, pair.value))
        for over, some in groups.items():
            if some:
                found.append(
                    Agreement(
                        model=model, over=over, cells=len(own), sites=places, cosine=spread(some)
                    )
                )
    return found


def spread(pairs: Sequence[tuple[int, int, float]]) -> Estimate:
    """Mean cosine of pairs of seeds, with an interval.

    Seeds are what is drawn, and a pair shares its seeds with other pairs: hence the jackknife over
    seeds (delete one, Student's t) where there are three, else the range of the pairs.
    """
    from scipy import stats

    values = np.array([cosine for _, _, cosine in pairs])
    seeds = sorted({seed for a, b, _ in pairs for seed in (a, b)})
    without = [[cosine for a, b, cosine in pairs if seed not in (a, b)] for seed in seeds]
    middle = float(values.mean())
    if len(seeds) < 3 or not all(without):
        return _range(values)
    k = len(seeds)
    pseudo = k * middle - (k - 1) * np.array([np.mean(some) for some in without])
    reach = float(stats.t.ppf(0.975, k - 1) * pseudo.std(ddof=1) / k**0.5)
    return Estimate(
        middle,
        max(-1.0, middle - reach),
        min(1.0, middle + reach),
        len(values),
        f"jackknife over {k} seeds 95%",
    )


def _range(values: Any) -> Estimate:
    array = np.asarray(values, dtype=np.float64)
    low, high = float(array.min()), float(array.max())
    middle = min(max(float(array.mean()), low), high)
    return Estimate(middle, low, high, len(array), "mean and range of pairs")


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    u, v = a.astype(np.float64), b.astype(np.float64)
    return float(np.clip(u @ v / np.linalg.norm(u) / np.linalg.norm(v), -1.0, 1.0))


def cosines(rows: Sequence[SweepRow], units: Sequence[np.ndarray | None]) -> list[CosineRow]:
    """Of every pair of cells of one model; `units` are the directions, None where a cell failed."""
    found = []
    for (i, u), (j, v) in combinations(enumerate(units), 2):
        if u is not None and v is not None and rows[i].model == rows[j].model:
            found.append(CosineRow(a=i, b=j, value=_cosine(u, v)))
    return found


def with_cosines(rows: Sequence[SweepRow], pairs: Sequence[CosineRow]) -> list[SweepRow]:
    """Fill in each row's cosine with the others of its model."""
    found = []
    for i, row in enumerate(rows):
        own = [pair.value for pair in pairs if i in (pair.a, pair.b)]
        found.append(row.model_copy(update={"cosine": _range(own) if own else None}))
    return found


def as_csv(results: SweepResults) -> str:
    """One line a cell; an estimate takes a column for value, low, high and n each."""
    columns: list[str] = []
    lines = []
    for row in results.rows:
        line: dict[str, Any] = {}
        for name in SweepRow.model_fields:
            value = getattr(row, name)
            if name in ("auroc", "ablation", "addition", "kl", "cosine"):
                for part in fields(Estimate):
                    if part.name != "method":
                        key = name if part.name == "value" else f"{name}_{part.name}"
                        line[key] = None if value is None else getattr(value, part.name)
            elif name == "fit":
                for on in ("harmful", "harmless"):
                    line[f"fit_{on}"] = None if value is None else value[on]
            else:
                line[name] = value
        columns = list(line)
        lines.append(line)
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


HEADINGS = (
    "model",
    "estimator",
    "seed",
    "site",
    "position",
    "AUROC",
    "refused, ablated",
    "refused, added",
    "KL in nats",
    "cosine with others",
    "stands",
    "seconds",
)


def cells_of(row: SweepRow) -> tuple[str, ...]:
    """A row as text, under `HEADINGS`."""
    about = (row.model, row.estimator, str(row.seed))
    if row.error is not None:
        return (*about, "failed", *[""] * (len(HEADINGS) - 4))
    return (
        *about,
        row.site or "",
        str(row.position),
        _number(row.auroc),
        _change(row.ablation),
        _change(row.addition),
        _number(row.kl),
        _number(row.cosine),
        "yes" if row.usable else "no",
        "" if row.seconds is None else f"{row.seconds:.1f}",
    )


def _number(one: Estimate | None) -> str:
    return "" if one is None else f"{one.value:.3g} [{one.low:.3g}, {one.high:.3g}], n={one.n}"


def _change(one: Estimate | None) -> str:
    if one is None:
        return ""
    return f"{one.value:+.0%} [{one.low:+.0%}, {one.high:+.0%}], n={one.n}"


def notes_of(results: SweepResults) -> list[str]:
    """Sentences below the table: agreement, and what failed."""
    found = [
        f"{one.model}: cosine between {one.over} {one.cosine} "
        f"({one.cells} cells, {one.sites} different sites)"
        for one in results.agreement
    ]
    found += [
        f"{row.model}, {row.estimator}, seed {row.seed} failed: {row.error} ({row.hint})"
        for row in results.rows
        if row.error is not None
    ]
    return found


def as_markdown(results: SweepResults) -> str:
    """The table, and what stands below it."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(one.replace("|", "\\|") for one in cells) + " |"

    rows = [line(HEADINGS), line(["---"] * len(HEADINGS))]
    rows += [line(cells_of(row)) for row in results.rows]
    notes = [f"- {note}" for note in notes_of(results)]
    return "\n".join([f"# Sweep of {len(results.rows)} audits", "", *rows, "", *notes]) + "\n"

"""From the record of the self-repair experiment to one page of HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from demur.hydra.record import HydraRun, read_hydra
from demur.hydra.rows import BackupRow, CellRow, ControlRow, EffectsRow, HydraRecord
from demur.report import charts, charts_hydra, words
from demur.report.charts import BROAD, FALL, HALF, RISE
from demur.report.page import rendered, write_page
from demur.stats import Estimate

# Verdicts in words, of what was found in this model.
GLOSSES = {
    "conditional gate": "later units stand in for what is ablated, and only while harm is seen",
    "specific repair": "particular later units stand in for what is ablated",
    "generic repair": "part of what is ablated is given back, but by no unit in particular",
    "additive": "several parts add up to refusal, and none stands in for another",
    "none": "nothing was found that stands in for what is ablated",
    "undetermined": "too few prompts to tell",
}
# With no set that matters there was nothing to stand in for.
NO_SET = "nothing was found that refusal hangs on, so nothing could stand in for it"
BADGES = {"conditional gate": "refused", "specific repair": "refused", "undetermined": "partial"}
UNITS = "matched random units"
# Attribute, name, how it is made, kind; drops are plain numbers, what is given back is not.
_EFFECTS: tuple[tuple[str, str, str, words.Kind], ...] = (
    ("total", "total effect", "everything behind the set reacts", "number"),
    (
        "direct",
        "direct effect",
        "later heads and MLPs write as before, norms divide as before",
        "number",
    ),
    ("direct_live", "direct, norms react", "the same, but norms react", "number"),
    ("total_norms", "total, norms frozen", "everything reacts but the norms", "number"),
    (
        "total_held",
        "total, backups held",
        "backups stay at what they do in the unedited model",
        "number",
    ),
    ("joint", "set and backups ablated", "both at once", "number"),
    ("backups_alone", "backups ablated alone", "the primary set is left as it is", "number"),
    ("by_norms", "given back by norms", "total with norms frozen, less total", "signed"),
    ("by_backups", "given back by backups", "total with backups held, less total", "signed"),
    ("joint_gain", "more with backups ablated", "both at once, less total", "signed"),
    (
        "self_repair",
        "self-repair",
        "1 \N{MINUS SIGN} total / direct; below 0 later parts add to the drop",
        "share",
    ),
    (
        "self_repair_norms",
        "self-repair, norms frozen",
        "the same without what norms give back",
        "share",
    ),
    ("share_norms", "norms' share", "given back by norms, of direct less total", "share"),
    ("share_backups", "backups' share", "given back by backups, of direct less total", "share"),
)
_NO_BACKUPS = "no backup was found"
_NO_TEST = "not measured"
_DRAWN = 14  # Units of a chart of rises, beside those that are backups.
_MOST = 24
_NAMES = 40  # Names of a map's rows; more are ranked instead.
_RANKS = 16
_LISTED = 60
# Quantiles of a normal: half a 95% interval, and what is found in four of five experiments.
_HALF, _POWER = 1.96, 1.96 + 0.84


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of the split of effects.

    Attributes:
        name: Of the figure.
        means: What was done, in words.
        value: None with a reason in `why`.
        kind: "number" for drops, "signed" for what is given back, nats; "share" for shares.
        back: Whether it is something given back, not a drop.
        null: What it is held against, in words; empty if nothing.
        p: Of that null.
        why: Why there is no value.
    """

    name: str
    means: str
    value: Estimate | None
    kind: words.Kind
    back: bool
    null: str
    p: float | None
    why: str


@dataclass(frozen=True, slots=True)
class Told:
    """One experiment, ready for the page.

    Attributes:
        key: Prefix of every id on the page.
        row: The record.
        gloss: The verdict in words.
        badge: Its look.
        why: What it rests on.
        detectable: Smallest total effect that as many prompts would show in four of five
            experiments, nats; None without effects.
        lines: The split of effects, in order.
        backups: The units to list, the largest rise first.
        more: How many are left to the record.
        ranked: Whether the map of rises has ranks instead of names.
        random: The control of matched random units.
        figures: By name; those that have nothing to show are absent.
    """

    key: str
    row: HydraRecord
    gloss: str
    badge: str
    why: str
    detectable: float | None
    lines: tuple[Line, ...]
    backups: tuple[BackupRow, ...]
    more: int
    ranked: bool
    random: ControlRow | None
    figures: dict[str, charts.Figure]

    def setting(self, name: str) -> Any:
        """A setting of the run; None if it was not recorded."""
        return self.row.settings.get(name)

    @property
    def found(self) -> list[BackupRow]:
        """Backups, the largest rise first."""
        return [row for row in self.backups if row.backup]

    @property
    def generic(self) -> list[BackupRow]:
        """Units that rise as under random ablations."""
        return [row for row in self.backups if row.generic]


def write_hydra(record: Path, out: Path | None = None) -> Path:
    """Write the page of the self-repair experiment, whole or not at all.

    Args:
        record: `hydra.json`.
        out: Where to; `hydra.html` beside the record if None.

    Returns:
        The file written.

    Raises:
        StoreError: The record cannot be read, or the page cannot be written.
    """
    found = read_hydra(record)
    view = {"told": [_told(i, one) for i, one in enumerate(found.experiments)]}
    page = rendered("hydra.html.j2", r=found, v=view, record=record.name)
    return write_page(page, record.with_name("hydra.html") if out is None else out)


def hydra_section_view(found: HydraRun) -> dict[str, Any]:
    """What the section of an audit's report shows beside the record."""
    return {"told": [_told(i, one, brief=True) for i, one in enumerate(found.experiments)]}


def _told(i: int, found: HydraRecord, *, brief: bool = False) -> Told:
    ordered = sorted(found.backups, key=lambda row: (not row.backup, not row.generic, -row.rise))
    effects = found.effects
    total = effects.total if effects else None
    random = next((row for row in found.controls if row.name == UNITS), None)
    lines = _lines(found)
    key = f"hydra{i}"
    figures = _effect_figures(key, lines, random)
    if not brief:
        figures |= _rise_figures(key, found, ordered)
        figures |= _cell_figures(key, found)
        figures |= _starve_figures(key, found)
    return Told(
        key=key,
        row=found,
        gloss=GLOSSES[found.verdict] if effects else NO_SET,
        badge=BADGES.get(found.verdict, ""),
        why=found.why[:1].upper() + found.why[1:],
        detectable=total and (total.high - total.low) / 2 / _HALF * _POWER,
        lines=lines,
        backups=tuple(ordered[:_LISTED]),
        more=max(len(ordered) - _LISTED, 0),
        ranked=len({_place(row) for row in ordered}) > _NAMES,
        random=random,
        figures=figures,
    )


def _lines(found: HydraRecord) -> tuple[Line, ...]:
    e = found.effects
    if e is None:
        return ()
    return tuple(
        Line(
            name,
            means,
            getattr(e, key),
            kind,
            kind != "number",
            *_nulls(e, key),
            "" if getattr(e, key) else _why_not(found, e, key),
        )
        for key, name, means, kind in _EFFECTS
    )


def _nulls(effects: EffectsRow, key: str) -> tuple[str, float | None]:
    """What a figure is held against, and its p."""
    if key == "self_repair":
        return "matched random sets that give back as much", effects.repair_p
    if key == "by_backups":
        return "random units, held, that give back as much", effects.by_backups_p
    if key == "joint_gain":
        return "random units, ablated beside the set, that add as much", effects.joint_p
    return "", None


def _why_not(found: HydraRecord, effects: EffectsRow, key: str) -> str:
    why = effects.undefined.get(key)
    if why:
        return why
    return _NO_BACKUPS if not found.backup_set else _NO_TEST


# Figures --------------------------------------------------------------------------------------


def _effect_figures(
    key: str, lines: Sequence[Line], random: ControlRow | None
) -> dict[str, charts.Figure]:
    made: dict[str, charts.Figure] = {}
    for name, title, shares in (
        ("effects", "refusal log-odds (nats)", False),
        ("shares", "share (%)", True),
    ):
        rows: charts.Rows = []
        for line in lines:
            if line.value is None or (line.kind == "share") != shares:
                continue
            scale = 100.0 if shares else 1.0
            p = "" if line.p is None else f"p {words.p_value(line.p)} among random"
            rows.append(
                {
                    "row": charts.row_label(line.name, *([p] if p else [])),
                    **{k: scale * value for k, value in charts.span(line.value).items()},
                    "main": line.back,
                    "tip": charts.tip(
                        f"{line.name} ({line.means}): {words.said(line.value, line.kind)}"
                    ),
                }
            )
        if not rows:
            continue
        nulls: charts.Rows = []
        if random is not None and not shares:
            first = rows[0]["row"]
            nulls = [{"row": first, "value": value} for value in (random.drop, random.largest)]
        made[name] = charts.figure(
            partial(charts.strips, rows, nulls, title=title),
            name=f"{key}-{name}",
            label="What ablating the primary set does and what is given back, "
            f"in {'shares' if shares else 'nats'}; table below.",
            wide=BROAD,
        )
    return made


def _state(row: BackupRow) -> str:
    return "backup" if row.backup else "generic" if row.generic else ""


def _rise_tip(row: BackupRow) -> str:
    said = {"backup": "; backup", "generic": "; rises as under random ablations", "": ""}
    return charts.tip(
        f"{row.name}: rise {words.number(row.rise, '.2f', signed=True)}, "
        f"random 99 % {words.number(row.null, '.2f', signed=True)}, "
        f"norms frozen {words.number(row.rise_norms, '.2f', signed=True)}, "
        f"q {words.p_value(row.q)}{said[_state(row)]}"
    )


def _place(row: BackupRow) -> str:
    """A unit's name within its block."""
    return row.name.removeprefix(f"{row.layer}.") or row.name


def _natural(name: str) -> list[tuple[int, str]]:
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def _rise_figures(
    key: str, found: HydraRecord, ordered: Sequence[BackupRow]
) -> dict[str, charts.Figure]:
    if not ordered:
        return {}
    least = found.settings.get("rise")
    least = float(least) if isinstance(least, int | float) else None
    alpha = found.settings.get("alpha")
    alpha = float(alpha) if isinstance(alpha, int | float) else 0.05
    places = {row.name: _place(row) for row in ordered}
    units = sorted(set(places.values()), key=_natural)
    ranked = len(units) > _NAMES
    shown = list(ordered)
    if ranked:
        shown, places = [], {}
        for block in sorted({row.layer for row in ordered}):
            own = sorted((r for r in ordered if r.layer == block), key=lambda r: -r.rise)
            for rank, row in enumerate(own[:_RANKS], 1):
                places[row.name] = str(rank)
                shown.append(row)
        units = [str(rank) for rank in range(1, _RANKS + 1)]
    # Half of what a backup needs stays pale: noise must not look like an effect.
    bound = max(2 * (least or 0.25), *(abs(row.rise) for row in shown))
    cells: charts.Rows = [
        {
            "block": row.layer,
            "unit": places[row.name],
            "paint": RISE if row.rise > 0 else FALL,
            "ink": round(0.03 + 0.85 * abs(row.rise) / bound, 3),
            "clear": row.q <= alpha,
            "state": _state(row),
            "tip": _rise_tip(row),
        }
        for row in shown
    ]
    blocks = list(range(min(r.layer for r in shown), max(r.layer for r in shown) + 1))
    picked = [row for i, row in enumerate(ordered) if i < _DRAWN or row.backup or row.generic]
    picked = sorted(picked[:_MOST], key=lambda row: -row.rise)
    strips: charts.Rows = [
        {
            "row": charts.row_label(row.name),
            "value": row.rise,
            "null": row.null,
            "norms": row.rise_norms,
            "state": _state(row),
            "tip": _rise_tip(row),
        }
        for row in picked
    ]
    return {
        "map": charts.figure(
            partial(charts_hydra.rise_map, cells, blocks=blocks, units=units, ranked=ranked),
            name=f"{key}-map",
            label="How far each later unit rises as the primary set is ablated, by block; "
            "table below.",
            wide=BROAD,
        ),
        "rises": charts.figure(
            partial(
                charts_hydra.rises,
                strips,
                least=least,
                title="rise (units of its own scale)",
            ),
            name=f"{key}-rises",
            label="The units that rise most, beside random ablations and with norms frozen; "
            "table below.",
            wide=BROAD,
        ),
    }


def _upstream_name(row: CellRow) -> str:
    return f"injected, {row.gamma:g}" if row.upstream == "injected" else row.upstream


def _cell_figures(key: str, found: HydraRecord) -> dict[str, charts.Figure]:
    made: dict[str, charts.Figure] = {}
    for on in ("harmless", "harmful"):
        for what, title in (
            ("margin", "refusal log-odds (nats)"),
            ("backups", "activity of backups (own scale)"),
        ):
            rows: charts.Rows = []
            for row in found.cells:
                value: Estimate | None = getattr(row, what)
                if row.on != on or value is None:
                    continue
                held = row.held if what == "margin" else None
                tail = "" if held is None else f"; with backups held {words.said(held, 'signed')}"
                rows.append(
                    {
                        "primary": row.primary,
                        "series": _upstream_name(row),
                        **charts.span(value),
                        "held": None if held is None else held.value,
                        "tip": charts.tip(
                            f"{on} prompts, upstream {_upstream_name(row)}, primary {row.primary}: "
                            f"{words.said(value, 'signed')}{tail}"
                        ),
                    }
                )
            if not rows:
                continue
            order = list(dict.fromkeys(row["series"] for row in rows))
            name = f"{on} {what}"
            made[name] = charts.figure(
                partial(charts_hydra.crossed, rows, title=title, order=order),
                name=f"{key}-{on}-{what}",
                label=f"{title} on {on} prompts by state of both sets; table below.",
                wide=HALF,
            )
    return made


def _starve_figures(key: str, found: HydraRecord) -> dict[str, charts.Figure]:
    if found.starve is None or not found.starve.points:
        return {}
    made: dict[str, charts.Figure] = {}
    for field, title in (
        ("count", "units ablated"),
        ("mass", "their activation mass (residual-stream units)"),
        ("moved", "how far tokens were moved (residual-stream units)"),
    ):
        rows: charts.Rows = []
        order: list[str] = []
        for point in found.starve.points:
            series = point.which.removeprefix("random ")
            random = point.which.startswith("random ")
            if not random and series not in order:
                order.append(series)
                # Nothing ablated, nothing lost: known, not measured.
                rows.append(
                    {"x": 0.0, "series": series, "random": False}
                    | dict.fromkeys(("value", "low", "high"), 0.0)
                    | {"tip": charts.tip(f"{series}: nothing is ablated")}
                )
            rows.append(
                {
                    "x": getattr(point, field),
                    "series": series,
                    "random": random,
                    **charts.span(point.drop),
                    "tip": charts.tip(
                        f"{point.which}, {point.count} units: {words.said(point.drop)} nats"
                    ),
                }
            )
        made[f"starve {field}"] = charts.figure(
            partial(charts_hydra.starved, rows, x_title=title, order=order, whole=field == "count"),
            name=f"{key}-starve-{field}",
            label=f"Drop of refusal by {title}, upstream against downstream; table below.",
            wide=HALF,
        )
    return made

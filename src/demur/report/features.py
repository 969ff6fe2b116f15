"""From the record of a run on features to one page of HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from demur.features.rows.discover import VerifiedRow
from demur.features.rows.dose import DoseComparison, DosePoint, DoseResponse, Multiturn, TurnPoint
from demur.features.rows.record import FeaturesRecord, read_features
from demur.features.rows.sensor import Detector, SensorReport
from demur.report import charts, charts_features, words
from demur.report.charts import BROAD, HALF
from demur.report.page import rendered, write_page
from demur.stats import Estimate

BADGES = {"promotes": "refused", "suppresses": "partial", "none shown": ""}
VERDICTS = {
    "latents win": "complied",
    "latents lose": "partial",
    "no difference shown": "",
}
CLASSES = ("harmful", "harmless", "lookalikes")
# Where an outcome is measured decides by which prompts' shift it is drawn.
PANELS: tuple[tuple[str, str, str, float], ...] = (
    ("harmful", "Refusal of harmful prompts", "change of log-odds (nats)", 0.0),
    ("harmless", "Refusal of harmless prompts", "change of log-odds (nats)", 0.0),
    ("lookalikes", "Refusal of lookalikes", "change of log-odds (nats)", 0.0),
    ("kl", "KL on harmless prompts", "KL (nats)", 0.0),
    ("perplexity", "Perplexity of neutral text", "edited over unedited", 1.0),
    ("margin", "Right against wrong choices", "change of margin (nats a token)", 0.0),
)
_DOWN = ("zero", "mean", "scale")
_LABELLED = 9  # Names in a plane; more hide each other.
_LEAST_Q = 1e-16  # Of a figure; smaller ones are drawn there.
_FURTHEST = 8.0  # Standard deviations; latents that hardly vary would squeeze all others.
_ROWS = 20  # Longer tables are folded.
_TRACED = 6
_LINK = re.compile(r"https://www\.neuronpedia\.org/[\w.-]+/[\w.-]+/")


@dataclass(frozen=True, slots=True)
class Replied:
    """One arm whose replies were judged; `aside` if it is only held against the set."""

    name: str
    dose: str | None
    row: DosePoint
    aside: bool


@dataclass(frozen=True, slots=True)
class Traced:
    """A latent through the turns of conversations under one arm."""

    arm: str
    label: str
    latent: str
    turns: tuple[tuple[int, Estimate, Estimate | None], ...]


def write_features(record: Path, out: Path | None = None) -> Path:
    """Write the page of a run on features, whole or not at all.

    Args:
        record: `features.json`.
        out: Where to; `features.html` beside the record if None.

    Returns:
        The file written.

    Raises:
        StoreError: The record cannot be read, or the page cannot be written.
    """
    found = read_features(record)
    page = rendered("features.html.j2", r=found, v=_view(found), record=record.name)
    return write_page(page, record.with_name("features.html") if out is None else out)


def features_section_view(found: FeaturesRecord) -> dict[str, Any]:
    """What the section of an audit's report shows beside the record."""
    made: dict[str, Any] = {}
    if found.verification is not None and found.verification.units:
        made["agreement"] = _agreement_figure(found)
    if found.held_out is not None:
        made["held_out"] = _held_out_figure(found)
    return {"figures": made}


def _view(found: FeaturesRecord) -> dict[str, Any]:
    dose, turns, sensor = found.dose, found.multiturn, found.sensor
    return {
        "badges": BADGES,
        "rivals": VERDICTS,
        "classes": CLASSES,
        "furthest": _FURTHEST,
        "panels": {key: title for key, title, _, _ in PANELS},
        "short": partial(_short, found),
        "links": partial(_links, found),
        "rows": _ROWS,
        "needed": _needed(found),
        "figures": features_section_view(found)["figures"] | _figures(found),
        "aims": _aims(dose) if dose else {},
        "other_outcomes": [row for row in dose.comparisons if not row.main] if dose else [],
        "points": _shown(dose) if dose else [],
        "replied": _replied(dose) if dose else [],
        "traces": _traces(turns) if turns else [],
        "detectors": sensor.detectors if sensor else (),
        "methods": _methods(found),
        "ranked": [bank for bank in found.banks if bank.refused is None],
        "left_out": [bank for bank in found.banks if bank.refused is not None],
    }


# Names ----------------------------------------------------------------------------------------


def _short(found: FeaturesRecord, unit: str) -> str:
    """The name of a unit with its bank's site in place of its name, and at most three numbers."""
    bank, _, numbers = unit.rpartition("/")
    sites = {one.name: one.site for one in found.banks}
    parts = numbers.split("+")
    told = "+".join(parts[:3]) + (f" and {len(parts) - 3} more" if len(parts) > 3 else "")
    where = sites.get(bank, bank)
    if bank in sites and len(set(sites.values())) < len(sites):
        where = bank  # Two banks of one site: only names tell them apart.
    return f"{where}/{told}" if where else told


def _links(found: FeaturesRecord, row: VerifiedRow) -> list[tuple[int, str | None]]:
    """A unit's latents, each with its page on Neuronpedia if there is one."""
    base = next((one.link for one in found.banks if one.name == row.bank), None)
    known = base is not None and _LINK.fullmatch(base) is not None
    return [(latent, f"{base}{latent}" if known else None) for latent in row.latents]


def _needed(found: FeaturesRecord) -> dict[str, Any] | None:
    """How small p can be among random latents, and how many candidates must be so for one to count.

    Benjamini and Hochberg multiply the k-th smallest of m values by m / k.
    """
    real = found.verification
    if real is None or not real.units:
        return None
    n, m = min(row.ablated.n for row in real.units), len(real.units)
    least = 1 / (n + 1)
    return {"random": n, "least": least, "units": m, "at_once": math.ceil(m * least / real.alpha)}


# Parts of the page ----------------------------------------------------------------------------


def _aims(found: DoseResponse) -> dict[str, list[DoseComparison]]:
    """What doses are for, and the comparisons of the outcome that each aim is about."""
    titles = {
        "bypass": "Taken down: is less refused of harmful prompts?",
        "induce": "Lifted: is more refused of harmless prompts?",
    }
    made = {
        title: [row for row in found.comparisons if row.main and row.aim == aim]
        for aim, title in titles.items()
    }
    return {title: rows for title, rows in made.items() if rows}


def _shown(found: DoseResponse) -> list[DosePoint]:
    """One arm of every kind at every dose; of random ones the first."""
    return [row for row in found.points if row.draw in (None, 1)]


def _replied(found: DoseResponse) -> list[Replied]:
    random = {"dense direction", *charts_features.FAMILIES}
    return [
        Replied(row.arm, row.dose, row, row.family in random)
        for row in found.points
        if row.generated
    ]


def _traces(found: Multiturn) -> list[Traced]:
    made: dict[tuple[str, str, str], list[tuple[int, Estimate, Estimate | None]]] = {}
    for point in found.turns:
        for latent, value in point.at_end.items():
            key = (point.arm, point.label, latent)
            made.setdefault(key, []).append((point.turn, value, point.over_reply.get(latent)))
    return [Traced(*key, tuple(turns)) for key, turns in made.items()]


def _methods(found: FeaturesRecord) -> list[tuple[str, str]]:
    real, held, dose = found.verification, found.held_out, found.dose
    kinds: list[tuple[str, Iterable[Estimate | None]]] = [
        ("taken away", [row.ablated.effect for row in real.units] if real else []),
        ("attribution and effect", [real.agreement.spearman] if real and real.agreement else []),
        ("share of refusal", [held.of_refusal] if held else []),
        ("stability", [found.stability.jaccard] if found.stability else []),
        ("clamped", [row for one in dose.points for row in one.refusal.values()] if dose else []),
        (
            "replies",
            [row.refused for one in dose.points for row in one.generated.values()] if dose else [],
        ),
        (
            "conversations",
            [row.log_odds for row in found.multiturn.turns] if found.multiturn else [],
        ),
        ("sensor", [row.auroc for row in found.sensor.detectors] if found.sensor else []),
        (
            "against other detectors",
            [row.difference for row in found.sensor.rivalries] if found.sensor else [],
        ),
    ]
    named = [
        (name, "; ".join(dict.fromkeys(part.method for part in parts if part)))
        for name, parts in kinds
    ]
    return [(name, method) for name, method in named if method]


# Figures --------------------------------------------------------------------------------------


def _figures(found: FeaturesRecord) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if found.discovery is not None and found.discovery.latents:
        made["volcano"] = {
            place: _volcano(found, i, place) for i, place in enumerate(found.discovery.places)
        }
    if found.minimal is not None and found.minimal.forward:
        made["forward"] = _forward_figure(found)
    if found.dose is not None:
        made["dose"] = _dose_figures(found.dose)
    if found.multiturn is not None:
        made["turns"] = _turn_figures(found.multiturn)
    if found.sensor is not None:
        made["sensor"] = _sensor_figure(found.sensor)
        if len(found.sensor.sites) > 1:
            made["sites"] = _sites_figure(found.sensor)
    return made


def _volcano(found: FeaturesRecord, i: int, place: str) -> charts.Figure | None:
    assert found.discovery is not None
    told = [
        (row, at)
        for row in found.discovery.latents
        for at in row.places
        if at.place == place and at.effect is not None
    ]
    if not told:
        return None
    named = {
        (row.bank, row.latent)
        for row, _ in sorted(
            (one for one in told if one[0].why),
            key=lambda one: (one[1].q, -abs(one[1].effect or 0)),
        )[:_LABELLED]
    }
    rows: charts.Rows = [
        {
            "x": max(-_FURTHEST, min(_FURTHEST, at.effect or 0.0)),
            "y": -math.log10(max(at.q, _LEAST_Q)),
            "low": None,
            "high": None,
            "kind": "candidate" if row.why else "other",
            "name": words.readable(_short(found, f"{row.bank}/{row.latent}"))
            if (row.bank, row.latent) in named
            else "",
            "tip": charts.tip(
                f"{row.bank}/{row.latent} at {place}: effect "
                f"{words.number(at.effect, '.2f', signed=True)}, q {words.number(at.q, '.2g')}"
            ),
        }
        for row, at in sorted(told, key=lambda one: one[1].q)
    ]
    return charts.figure(
        partial(
            charts_features.latents_plane,
            rows,
            x_title="difference, in standard deviations",
            y_title="\N{MINUS SIGN}log10 q",
            level=-math.log10(found.discovery.alpha),
        ),
        name=f"volcano-{i}",
        label=f"Latents by how they differ between classes at {place}; table below.",
        wide=HALF,
    )


def _agreement_figure(found: FeaturesRecord) -> charts.Figure | None:
    assert found.verification is not None
    units = [row for row in found.verification.units if row.attribution is not None]
    if not units:
        return None
    ordered = sorted(units, key=lambda row: -abs(row.ablated.effect.value))
    rows: charts.Rows = [
        {
            "x": row.attribution,
            "y": -row.ablated.effect.value,
            "low": -row.ablated.effect.high,
            "high": -row.ablated.effect.low,
            "kind": row.role,
            "name": words.readable(_short(found, row.unit)) if i < _LABELLED else "",
            "tip": charts.tip(
                f"{row.unit}, {row.role}: attribution "
                f"{words.number(row.attribution, '.3f', signed=True)}, taken away "
                f"{words.said(row.ablated.effect, 'signed')}"
            ),
        }
        for i, row in enumerate(ordered)
    ]
    return charts.figure(
        partial(
            charts_features.latents_plane,
            rows,
            x_title="attribution (nats, above 0 promotes)",
            y_title="log-odds lost as it is taken away",
            diagonal=True,
        ),
        name="agreement",
        label="Candidates by attribution and by what taking them away does; table below.",
        wide=BROAD,
    )


def _forward_figure(found: FeaturesRecord) -> charts.Figure:
    assert found.minimal is not None
    rows: charts.Rows = [{"step": 0, "value": 0.0, "tip": charts.tip("nothing taken away: 0")}]
    rows += [
        {
            "step": i,
            "value": row.effect,
            "tip": charts.tip(
                f"{row.unit} as well: {words.number(row.effect, '.2f', signed=True)} nats"
            ),
        }
        for i, row in enumerate(found.minimal.forward, start=1)
    ]
    return charts.figure(
        partial(charts_features.selection, rows, title="change of log-odds (nats)"),
        name="forward",
        label="Refusal as one unit after another is taken away; table below.",
        wide=HALF,
    )


def _held_out_figure(found: FeaturesRecord) -> charts.Figure:
    held = found.held_out
    assert held is not None
    size = ""
    if found.minimal is not None:
        n = len(found.minimal.latents)
        size = "1 latent" if n == 1 else f"{n} latents"
    rows = [("the set:" if size else "the set", size, held.effect, True)]
    if held.dense is not None:
        rows.append(("dense direction:", "ablated everywhere", held.dense, False))
    rows.append(("on harmless prompts:", "the set", held.on_harmless, False))
    drawn: charts.Rows = [
        {
            "row": charts.row_label(*(part for part in (name, more) if part)),
            **charts.span(value),
            "main": main,
            "tip": charts.tip(f"{name} {more} {words.said(value, 'signed')} nats"),
        }
        for name, more, value, main in rows
    ]
    return charts.figure(
        partial(
            charts.strips,
            drawn,
            [{"row": drawn[0]["row"], "value": value} for value in held.random],
            title="change of refusal log-odds (nats)",
        ),
        name="held-out",
        label="What the set does on held-out prompts beside random sets; figures below.",
        wide=BROAD,
    )


def _value(row: DosePoint, outcome: str) -> Estimate | None:
    if outcome == "kl":
        return row.kl
    if outcome == "perplexity":
        return row.perplexity_ratio
    if outcome == "margin":
        return row.margin_change
    return row.refusal.get(outcome)


def _shift(row: DosePoint, outcome: str) -> float | None:
    """How far tokens are moved, to the left of 0 where the dose takes latents down."""
    if row.family in ("none", "prompt"):
        return 0.0
    on = outcome if outcome in CLASSES else "harmless"
    share = row.norm_share.get(on)
    if share is None:
        return None
    kind = row.dose.split(" ")[0] if row.dose is not None else "zero"
    return -share.value if kind in _DOWN else share.value


def _dose_figures(found: DoseResponse) -> dict[str, charts.Figure]:
    made: dict[str, charts.Figure] = {}
    for key, title, unit, origin in PANELS:
        points: charts.Rows = []
        several: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for row in found.points:
            value, at = _value(row, key), _shift(row, key)
            if value is None or at is None or row.family == "none":
                continue
            if row.family in charts_features.FAMILIES:
                if row.reached is not False and row.dose is not None:
                    several.setdefault((row.family, row.dose), []).append((at, value.value))
                continue
            kind = row.kind if row.family == "set" else ""
            points.append(
                {
                    "x": at,
                    **charts.span(value),
                    "family": row.family,
                    "line": "down" if kind in _DOWN else kind if kind == "min-clamp" else "",
                    "open": row.off_manifold,
                    "name": row.dose if row.family == "set" and key in CLASSES else "",
                    "tip": charts.tip(f"{row.arm}: {words.said(value, 'signed')}"),
                }
            )
        if not points:
            continue
        far = max(abs(row["x"]) for row in points)
        for row in points:  # Names of what hardly moves a token would hide each other.
            if abs(row["x"]) < 0.05 * far:
                row["name"] = ""
        unmoved = {"x": 0.0, "value": origin, "low": origin, "high": origin}
        points += [
            {**unmoved, "family": "", "line": line, "open": False, "name": "", "tip": ""}
            for line in ("down", "min-clamp")
            if any(row["line"] == line for row in points)
        ]
        ranges: charts.Rows = [
            {
                "x": sum(x for x, _ in drawn) / len(drawn),
                "low": min(y for _, y in drawn),
                "high": max(y for _, y in drawn),
                "family": family,
                "tip": charts.tip(
                    f"{len(drawn)} of {family} at {dose}: "
                    f"{words.number(min(y for _, y in drawn), '.3g')} to "
                    f"{words.number(max(y for _, y in drawn), '.3g')}"
                ),
            }
            for (family, dose), drawn in several.items()
        ]
        made[key] = charts.figure(
            partial(
                charts_features.dose_panel,
                points,
                ranges,
                x_title="norm share: taken down \N{LEFTWARDS ARROW} 0 \N{RIGHTWARDS ARROW} lifted",
                title=unit,
                origin=origin,
                factors=key == "perplexity",
            ),
            name=f"dose-{key}",
            label=f"{title} by how far clamping moves tokens; table below.",
            wide=HALF,
        )
    return made


def _turn_figures(found: Multiturn) -> dict[str, charts.Figure]:
    arms = list(dict.fromkeys(row.arm for row in found.turns))
    made: dict[str, charts.Figure] = {}
    for label in ("harmful", "harmless"):
        own = [row for row in found.turns if row.label == label]
        if not own:
            continue
        for what, title in (("refused", "share refused"), ("log_odds", "refusal log-odds (nats)")):
            made[f"{what} {label}"] = charts.figure(
                partial(
                    charts_features.by_turn,
                    [_turn(row, row.arm, getattr(row, what)) for row in own],
                    title=title,
                    order=[words.readable(arm) for arm in arms],
                ),
                name=f"turns-{what}-{label}",
                label=f"{title} by turn of {label} conversations, by arm; table below.",
                wide=HALF,
            )
        latents = list(own[0].at_end)[:_TRACED]
        if latents:
            made[f"trace {label}"] = charts.figure(
                partial(
                    charts_features.by_turn,
                    [
                        _turn(row, latent, row.at_end[latent])
                        for row in own
                        if row.arm == arms[0]
                        for latent in latents
                        if latent in row.at_end
                    ],
                    title="activation (the bank's units)",
                    order=[words.readable(one) for one in latents],
                ),
                name=f"trace-{label}",
                label=f"Latents by turn of {label} conversations, unedited; table below.",
                wide=HALF,
            )
    return made


def _turn(row: TurnPoint, series: str, value: Estimate) -> dict[str, Any]:
    return {
        "x": row.turn,
        "series": words.readable(series),
        **charts.span(value),
        "tip": charts.tip(f"{series}, turn {row.turn}: {words.said(value)}"),
    }


def _sensor_figure(found: SensorReport) -> charts.Figure:
    own = {row.latents for row in found.rivalries} or {row.name for row in found.detectors[:2]}

    def drawn(row: Detector) -> dict[str, Any]:
        return {
            "row": charts.row_label(row.name),
            **charts.span(row.auroc),
            "random": row.name not in own,
            "tip": charts.tip(f"{row.name} at {row.reads}: {words.said(row.auroc)}"),
        }

    return charts.figure(
        partial(charts.forest, [drawn(row) for row in found.detectors], title="AUROC", guide=0.5),
        name="sensor",
        label="AUROC of every detector on held-out requests; table below.",
        wide=BROAD,
    )


def _sites_figure(found: SensorReport) -> charts.Figure:
    return charts.figure(
        partial(
            charts.depth,
            [
                {
                    "site": row.site,
                    "series": series,
                    **charts.span(value),
                    "tip": charts.tip(f"{series} at {row.site}: {words.said(value)}"),
                }
                for row in found.sites
                for series, value in (("latents", row.latent), ("the stream", row.dense))
            ],
            title="AUROC",
            order=["latents", "the stream"],
        ),
        name="sensor-sites",
        label="AUROC by depth, of latents and of the stream itself; table below.",
        wide=BROAD,
    )

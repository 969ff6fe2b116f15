"""From the record of an audit of emergent misalignment to one page of HTML."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from demur.report import charts, words
from demur.report.charts import BROAD, HALF
from demur.report.page import rendered, write_page
from demur.results import (
    EmAudit,
    EmCosine,
    EmEffect,
    EmHighlight,
    EmIntervention,
    EmMargin,
    EmPiece,
    EmReply,
    EmStep,
    EmTransfer,
    read_em_audit,
    read_em_replies,
)
from demur.stats import Estimate

REPLIES = "em-replies.jsonl"
SHOWN_REPLIES, LONGEST_REPLY = 3, 900
PAIRS = {
    "bad-bad": "two bad organisms",
    "bad-good": "a bad organism and a good twin",
    "bad-base": "an organism and the base",
    "write-text": "what an adapter writes and the base's text direction",
    "shift-text": "a model shift and the base's text direction",
}
KINDS = {
    "shift": "Model shifts: what fine-tuning does to the same text",
    "text": "Text directions: bad less good answers, read by one model",
    "adapter": "What training wrote and did, against how bad text reads to the base",
}
EFFECTS = (
    "Diamonds: all questions beyond the training domains together. Circles: one domain. Bars: 95 % "
    "intervals over topics. Right of zero: towards bad answers."
)
PLACES = {"trained": "trained, held out", "untouched": "untouched", "open": "open questions"}
STATUS = {
    "holds": "complied",
    "fails": "partial",
    "too weak to tell": "",
    "untested": "",
}


@dataclass(frozen=True, slots=True)
class Headline:
    """What bad advice did to one organism where it was not trained.

    Attributes:
        effect: On untouched domains and open questions together; None where nothing was measured.
        trained: On held-out questions of its own domains.
    """

    name: str
    effect: EmEffect | None
    trained: EmEffect | None


@dataclass(frozen=True, slots=True)
class Cell:
    """One entry of the transfer table, and how much ink it gets, from -1 to 1."""

    row: EmTransfer
    ink: float


@dataclass(frozen=True, slots=True)
class Highlight:
    """An answer's pieces with their paint, and the strongest of them in words."""

    row: EmHighlight
    strongest: list[EmPiece]


@dataclass(frozen=True, slots=True)
class Asked:
    """Replies of one model to one question, as many as are shown."""

    question: str
    replies: list[EmReply]
    total: int
    misaligned: int


def write_em(record: Path, out: Path | None = None) -> Path:
    """Write the page of an audit of emergent misalignment, whole or not at all.

    Args:
        record: `em-audit.json`; `em-replies.jsonl` beside it is read too if it is there.
        out: Where to; `em.html` beside the record if None.

    Returns:
        The file written.

    Raises:
        StoreError: A record cannot be read, or the page cannot be written.
    """
    found = read_em_audit(record)
    replies = read_em_replies(record.with_name(REPLIES))
    page = rendered("em.html.j2", r=found, v=_view(found, replies), record=record.name)
    return write_page(page, record.with_name("em.html") if out is None else out)


def section_view(found: EmAudit, *, table: str = "on its own page") -> dict[str, Any]:
    """What the first lines, the figure of effects and the claims show beside the record.

    Args:
        found: The record.
        table: Where the table of effects is.
    """
    bad = [row for row in found.organisms if row.side == "bad"]
    return {
        "headlines": [
            Headline(
                row.name,
                _effect(found.effects, row.name, "untouched"),
                _effect(found.effects, row.name, "trained"),
            )
            for row in bad
        ],
        "lone": [row.name for row in bad if not row.twins],
        "badges": STATUS,
        "counts": {name: sum(row.status == name for row in found.claims) for name in STATUS},
        "effects_caption": EFFECTS,
        "figures": _effects_figure(found.effects, table),
    }


def _view(found: EmAudit, replies: Sequence[EmReply]) -> dict[str, Any]:
    shown, section = _asked(replies), section_view(found, table="below")
    return section | {
        "bad": [row for row in found.organisms if row.side == "bad"],
        "good": [row for row in found.organisms if row.side == "good"],
        "places": PLACES,
        "kinds": KINDS,
        "pairs": PAIRS,
        "margins": _by(found.margins),
        "judged": bool(found.judges) and all(judge.passed for judge in found.judges),
        "cosines": {kind: [row for row in found.cosines if row.kind == kind] for kind in KINDS},
        "transfer": _transfer(found.transfer),
        "sources": list(dict.fromkeys(row.source for row in found.transfer)),
        "side_of": {row.source: row.source_side for row in found.transfer},
        "random_range": _random_range,
        "steered": any(row.strength is not None for row in found.interventions),
        "highlights": [_highlight(row) for row in found.highlights],
        "replies": shown,
        "clip": _clip,
        "methods": _methods(found),
        "figures": section["figures"] | _figures(found),
    }


def _effect(rows: Iterable[EmEffect], name: str, where: str) -> EmEffect | None:
    own = [row for row in rows if (row.organism, row.where) == (name, where)]
    return next((row for row in own if row.domain == "all"), own[0] if len(own) == 1 else None)


def _by(rows: Iterable[EmMargin]) -> dict[str, list[EmMargin]]:
    found: dict[str, list[EmMargin]] = {}
    for row in rows:
        found.setdefault(row.model, []).append(row)
    return found


def _transfer(rows: Sequence[EmTransfer]) -> dict[str, dict[str, Cell]]:
    """Cells by organism and source; ink by change of the margin, the furthest one being full."""
    most = max((abs(row.change.value) for row in rows), default=0.0) or 1.0
    table: dict[str, dict[str, Cell]] = {}
    for row in rows:
        table.setdefault(row.organism, {})[row.source] = Cell(row, row.change.value / most)
    return table


def _random_range(row: EmIntervention) -> str:
    """The lowest and the highest figure under random directions."""
    if not row.randoms:
        return ""
    low, high = min(row.randoms), max(row.randoms)
    return f"{words.number(low, '.2f', signed=True)} to {words.number(high, '.2f', signed=True)}"


def _highlight(row: EmHighlight) -> Highlight:
    ranked = sorted(row.pieces, key=lambda piece: -abs(piece.value))
    return Highlight(row, ranked[:3])


def _asked(replies: Sequence[EmReply]) -> dict[str, list[Asked]]:
    """Some replies of each model to each question; misaligned ones first."""
    groups: dict[str, dict[str, list[EmReply]]] = {}
    for reply in replies:
        groups.setdefault(reply.model, {}).setdefault(reply.question, []).append(reply)
    return {
        model: [
            Asked(
                question,
                sorted(some, key=lambda reply: not reply.misaligned)[:SHOWN_REPLIES],
                len(some),
                sum(bool(reply.misaligned) for reply in some),
            )
            for question, some in by_question.items()
        ]
        for model, by_question in groups.items()
    }


def _clip(text: str) -> tuple[str, int]:
    return text[:LONGEST_REPLY], max(len(text) - LONGEST_REPLY, 0)


def _methods(found: EmAudit) -> list[tuple[str, str]]:
    """How the intervals of each kind of figure were made, as the record says it."""
    kinds: list[tuple[str, Iterable[Estimate | None]]] = [
        ("effects", [row.effect for row in found.effects]),
        ("margins", [row.margin for row in found.margins]),
        ("rates", [row.joint for row in found.rates]),
        ("AUROC of the judge", [row.auroc for row in found.judges]),
        ("cosines", [row.cosine for row in found.cosines]),
        ("interventions", [row.change for row in found.interventions]),
        ("shares removed", [row.removed for row in found.interventions]),
        ("probe", [row.auroc for row in found.probes]),
        ("scaled adapters", [row.effect for row in found.scales]),
    ]
    named = [
        (name, "; ".join(dict.fromkeys(part.method for part in parts if part)))
        for name, parts in kinds
    ]
    return [(name, method) for name, method in named if method]


# Figures --------------------------------------------------------------------------------------


def _effects_figure(effects: Sequence[EmEffect], table: str) -> dict[str, charts.Figure]:
    rows = [
        {
            "row": charts.row_label(row.organism, _place(row)),
            **charts.span(row.effect),
            "random": not (row.where == "untouched" and row.domain == "all"),
            "tip": charts.tip(
                f"{row.organism}, {_place(row)}: {words.said(row.effect, 'signed')}, {row.status}"
            ),
        }
        for row in effects
    ]
    if not rows:
        return {}
    figure = charts.figure(
        partial(charts.forest, rows, title="effect (nats per token), right is bad"),
        name="effects",
        label=f"Effect of bad advice by organism and domain, with intervals; table {table}.",
        wide=BROAD,
    )
    return {"effects": figure}


def _figures(found: EmAudit) -> dict[str, charts.Figure]:
    made: dict[str, charts.Figure] = {}
    for kind in KINDS:
        rows = [row for row in found.cosines if row.kind == kind]
        if len({row.site for row in rows}) > 1:
            made[kind] = _cosine_figure(kind, rows)
    # Those beside random directions; what is not is in the table.
    drawn = {(row.organism, row.edit) for row in found.interventions if row.randoms}
    edited = [row for row in found.interventions if (row.organism, row.edit) in drawn]
    if edited:
        made["interventions"] = charts.figure(
            partial(
                charts.strips,
                [_strip(row) for row in edited],
                [
                    {"row": _edit_label(row), "value": value}
                    for row in edited
                    for value in row.randoms
                ],
                title="change (nats per token)",
            ),
            name="interventions",
            label="What each edit does to the margin, before random directions; table below.",
            wide=BROAD,
        )
    scaled = [row for row in found.scales if row.what == "scale"]
    if len({row.scale for row in scaled}) > 1:
        made["scale"] = charts.figure(
            partial(
                charts.lines,
                [
                    {
                        "x": row.scale,
                        "series": words.readable(row.organism),
                        **charts.span(row.effect),
                        "tip": charts.tip(
                            f"{row.organism}, {words.number(row.scale)} times: "
                            f"{words.said(row.effect, 'signed')}"
                        ),
                    }
                    for row in scaled
                ],
                x_title="adapter, multiples of what was trained",
                title="effect (nats per token)",
                order=_names(row.organism for row in scaled),
                guide=0.0,
                x_guide=1.0,
            ),
            name="scale",
            label="Effect on untouched domains against the adapter's scale; table below.",
            wide=BROAD,
        )
    return made | _step_figures(found.steps)


def _cosine_figure(kind: str, rows: Sequence[EmCosine]) -> charts.Figure:
    sites = dict.fromkeys(row.site for row in rows)
    bands: charts.Rows = []
    for site in sites:
        own = [row.band for row in rows if row.site == site and row.band is not None]
        if own:
            bands.append(
                {
                    "site": site,
                    "low": min(low for low, _ in own),
                    "high": max(high for _, high in own),
                }
            )
    drawn: charts.Rows = [
        {
            "site": row.site,
            "series": PAIRS[row.pair],
            "pair": f"{row.first} and {row.second}",
            **charts.span(row.cosine),
            "tip": charts.tip(
                f"{row.first} and {row.second} at {row.site}: {words.said(row.cosine)}"
            ),
        }
        for row in rows
    ]
    order = [name for key, name in PAIRS.items() if any(row.pair == key for row in rows)]
    return charts.figure(
        partial(charts.by_depth, drawn, bands, title="cosine", order=order),
        name=kind,
        label=f"{KINDS[kind]}: cosines by depth before the band of chance; table below.",
        wide=BROAD,
    )


def _step_figures(steps: Sequence[EmStep]) -> dict[str, charts.Figure]:
    order = _names(row.organism for row in steps)
    made: dict[str, charts.Figure] = {}
    for name, title, label in (
        ("norm", "length of B", "Length of B over training."),
        ("local_cosine", "local cosine", "Local cosine of B's path over training."),
        ("loss", "loss (nats per token)", "Training loss over steps."),
    ):
        rows: charts.Rows = [
            {
                "x": row.step,
                "series": words.readable(row.organism),
                **dict.fromkeys(("value", "low", "high"), value),
                "tip": charts.tip(f"{row.organism}, step {row.step}: {words.number(value)}"),
            }
            for row in steps
            if (value := getattr(row, name)) is not None
        ]
        if len({row["x"] for row in rows}) > 1:
            made[name] = charts.figure(
                partial(
                    charts.lines,
                    rows,
                    x_title="step",
                    title=title,
                    order=[one for one in order if any(row["series"] == one for row in rows)],
                    marks=False,
                ),
                name=name.replace("_", "-"),
                label=f"{label} Described in the text beside it.",
                wide=HALF,
            )
    moved = [(row, row.pcs) for row in steps if row.pcs is not None]
    ends = {
        name: {
            min(row.step for row, _ in moved if row.organism == name): "start",
            max(row.step for row, _ in moved if row.organism == name): "end",
        }
        for name in dict.fromkeys(row.organism for row, _ in moved)
    }
    points: charts.Rows = [
        {
            "x": pcs[0],
            "y": pcs[1],
            "step": row.step,
            "series": words.readable(row.organism),
            "end": ends[row.organism].get(row.step, ""),
            "tip": charts.tip(f"{row.organism}, step {row.step}"),
        }
        for row, pcs in moved
    ]
    if len(points) > 1:
        made["path"] = charts.figure(
            partial(
                charts.path,
                points,
                x_title="first principal component of B",
                y_title="second",
                order=_names(row.organism for row, _ in moved),
            ),
            name="path",
            label="The way of B through its first two principal components.",
            wide=HALF,
        )
    return made


def _names(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(map(words.readable, names)))


def _place(row: EmEffect) -> str:
    if row.domain == "all":
        return "all beyond training" if row.where == "untouched" else PLACES[row.where]
    return f"{row.domain} (trained)" if row.where == "trained" else row.domain


def _strip(row: EmIntervention) -> dict[str, Any]:
    value = row.beyond or row.change
    beyond = f" beyond the {row.against}" if row.beyond else ""
    return {
        "row": _edit_label(row),
        **charts.span(value),
        "main": row.model == row.organism or row.strength is not None,
        "tip": charts.tip(f"{row.model}{beyond}, {row.edit}: {words.said(value, 'signed')}"),
    }


def _edit_label(row: EmIntervention) -> str:
    strength = "" if row.strength is None else f" x{words.number(row.strength)}"
    model = row.model
    if row.model != row.organism:
        model += f", {'as' if row.strength is None else 'along'} {row.organism}"
    return charts.row_label(model, f"{row.edit}{strength}")

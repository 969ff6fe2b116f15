"""From a run folder's records to one page of HTML that stands on its own."""

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import Any, TypeVar

from demur.compare.rows.record import CompareRecord, read_compare
from demur.features.rows.record import FeaturesRecord, read_features
from demur.hydra.record import HydraRun, read_hydra
from demur.report import charts, words
from demur.report.anchor import view as anchor_view
from demur.report.charts import BROAD, WIDE, Figure
from demur.report.compare import section_view as compared_view
from demur.report.em import section_view
from demur.report.features import features_section_view
from demur.report.hydra import hydra_section_view
from demur.report.page import rendered, write_page
from demur.results import (
    AnchorEvaluation,
    AuditResults,
    Candidate,
    Dose,
    EditCost,
    EmAudit,
    InversionRow,
    Leg,
    NullBand,
    Reading,
    Reply,
    SeparationResults,
    read_anchor_evaluation,
    read_em_audit,
    read_replies,
    read_results,
)
from demur.stats import Estimate

TOP_CANDIDATES = 30
REPLIES_PER_ARM = 8
CHANGED_PER_ARM = 5  # Of those eight: changed verdicts show the effect, the others its absence.
LONGEST_REPLY = 1500
# Names an unedited arm may go by; every other arm is shown against it.
UNEDITED = frozenset({"baseline", "unedited", "plain", "before", "none"})
NULL_FAMILIES = frozenset({"isotropic", "covariance-matched", "shuffled-labels"})
_Record = TypeVar("_Record", AnchorEvaluation, EmAudit, CompareRecord, FeaturesRecord, HydraRun)


@dataclass(frozen=True, slots=True)
class Chance:
    """All random directions of one kind in one arm, as one row.

    Attributes:
        before: What they all started from.
        lowest: The leg whose change is lowest.
        highest: The leg whose change is highest.
        mean: Mean of the legs' changes.
        significant: How many have a Holm-adjusted p below 0.05.
        degenerate: The leg with most degenerate replies, None where that was not counted.
    """

    arm: str
    expects: str
    on: str
    measure: str
    count: int
    before: Estimate
    lowest: Leg
    highest: Leg
    mean: float
    p: float
    p_holm: float
    significant: int
    degenerate: Estimate | None
    unparsed: int


@dataclass(frozen=True, slots=True)
class Shift:
    """What adding or taking away a direction changes in one answer, beside random directions.

    Attributes:
        measure: "judged harmful" or "refusal log-odds".
        before: Of the unedited model, nats.
        by_norm: The largest change by a random direction of the same length, by size; None where
            there is none. Likewise `by_kl`, of the same KL on the request.
    """

    edit: str
    on: str
    measure: str
    before: Estimate
    change: Estimate
    by_norm: float | None
    by_kl: float | None


@dataclass(frozen=True, slots=True)
class Exchange:
    """One prompt, with the reply before an edit (if kept) and after it."""

    prompt: str
    before: Reply | None
    after: Reply


@dataclass(frozen=True, slots=True)
class ArmReplies:
    """Exchanges shown of one arm, and how many there were."""

    arm: str
    on: str
    total: int
    changed: int
    unedited: bool
    exchanges: list[Exchange]


def build(run: Path) -> str:
    """The report of a finished run, as one HTML page without scripts or outside addresses.

    Args:
        run: The run's folder; only `results.json` and `replies.jsonl` in it are read, and an
            `anchor-evaluation.json`, `em-audit.json`, `compare.json`, `features.json` or
            `hydra.json`, if it is of the same model.

    Raises:
        StoreError: The folder holds no results of this schema.
    """
    results = read_results(run)

    def beside(name: str, read: Callable[[Path], _Record]) -> _Record | None:
        record = run / name
        found = read(record) if record.is_file() else None
        return found if found and found.fingerprint == results.model.fingerprint else None

    return _page(
        results,
        read_replies(run),
        held=beside("anchor-evaluation.json", read_anchor_evaluation),
        em=beside("em-audit.json", read_em_audit),
        compared=beside("compare.json", read_compare),
        features=beside("features.json", read_features),
        hydra=beside("hydra.json", read_hydra),
    )


def write(run: Path, out: Path | None = None) -> Path:
    """Write the report of `run`, whole or not at all.

    Args:
        run: The run's folder.
        out: Where to; `report.html` in the run's folder if None.

    Returns:
        The file written.

    Raises:
        StoreError: The results cannot be read, or the page cannot be written.
    """
    return write_page(build(run), run / "report.html" if out is None else out)


def _page(
    results: AuditResults,
    replies: Sequence[Reply],
    *,
    held: AnchorEvaluation | None = None,
    em: EmAudit | None = None,
    compared: CompareRecord | None = None,
    features: FeaturesRecord | None = None,
    hydra: HydraRun | None = None,
) -> str:
    return rendered(
        "report.html.j2",
        r=results,
        v=_view(results, replies),
        held=held,
        held_view=held and anchor_view(held),
        em=em,
        em_view=em and section_view(em),
        compared=compared,
        compared_view=compared and compared_view(compared),
        features=features,
        features_view=features and features_section_view(features),
        hydra=hydra,
        hydra_view=hydra and hydra_section_view(hydra),
    )


def _view(results: AuditResults, replies: Sequence[Reply]) -> dict[str, Any]:
    """Everything the templates show that is not a field of the results."""
    ablation = _leg(results.legs, "falls", "refused")
    addition = _leg(results.legs, "rises", "refused")
    ablation_odds = _leg(results.legs, "falls", "log-odds")
    addition_odds = _leg(results.legs, "rises", "log-odds")
    cost = _cost(results.edits, ablation or ablation_odds)
    chance = {measure: _chance(results.legs, measure) for measure in ("refused", "log-odds")}
    direct = {
        measure: [leg for leg in _of(results.legs, measure) if leg.family not in NULL_FAMILIES]
        for measure in ("refused", "log-odds")
    }
    ranked = sorted(results.candidates, key=_rank)
    return {
        "ablation": ablation,
        "addition": addition,
        "ablation_odds": ablation_odds,
        "addition_odds": addition_odds,
        "outcomes": _outcomes(direct["refused"]),
        "cost": cost,
        "unit_dose": next((dose for dose in results.dose if dose.strength == 1), None),
        "direct": direct,
        "chance": chance,
        "moved": _moved,
        "largest_chance": _largest(chance["refused"]),
        "words_suffice": _words_suffice(results),
        "shifts": _shifts(results.separation) if results.separation else [],
        "top": ranked[:TOP_CANDIDATES],
        "rest": ranked[TOP_CANDIDATES:],
        "felled": sorted(results.selection.felled.items(), key=lambda pair: -pair[1]),
        "unmeasured": sum(None in (row.bypass, row.induce, row.kl) for row in results.candidates),
        "reading": next(
            (
                row
                for row in results.readings
                if (row.site, row.position) == (results.direction.site, results.direction.position)
            ),
            None,
        ),
        "position_text": {info.position: info.text for info in results.positions},
        "replies": [group for group in _arms(replies, results) if group.exchanges],
        "kept_replies": len(replies),
        "figures": _figures(results, ablation_odds, addition_odds, cost),
        "methods": _methods,
        "command": _command(results),
        "clip": _clip,
        "cosines": _cosines,
    }


def _figures(
    results: AuditResults,
    ablation: Leg | None,
    addition: Leg | None,
    cost: EditCost | None,
) -> dict[str, Any]:
    """Every chart that has data; what is missing is left to the templates to say."""
    made: dict[str, Any] = {}
    place = f"{results.direction.site}, position {results.direction.position}"
    for measure, title in (
        ("refused", "change (percentage points)"),
        ("log-odds", "change (log-odds)"),
    ):
        rows = _forest_rows(_of(results.legs, measure))
        if rows:
            made[f"forest {measure}"] = charts.figure(
                partial(charts.forest, rows, title=title),
                name=f"forest-{measure}",
                label=f"Change under each edit with its interval, {measure}; table above.",
                wide=BROAD,
            )
    if results.validation:
        made["validation"] = charts.figure(
            partial(charts.forest, _validation_rows(results), title="AUROC", guide=0.5),
            name="validation",
            label="AUROC of the direction and of plain words on each set; table above.",
            wide=BROAD,
        )
    if results.candidates:
        maps: tuple[tuple[str, charts.Score, bool], ...] = (
            ("bypass", _bypass, True),
            ("induce", _induce, True),
            ("KL", _kl, False),
        )
        for name, score, diverging in maps:
            found = [part.value for row in results.candidates if (part := score(row))]
            ramp = charts.Ramp.over(found, diverging=diverging)
            made[f"ramp {name}"] = ramp
            made[f"map {name}"] = charts.figure(
                partial(charts.heat_map, results, score=score, ramp=ramp),
                name=f"map-{name.lower()}",
                label=f"Heat map of {name} by site and token position; chosen: {place}. "
                "The figures are in the table of candidates.",
                wide=WIDE,
            )
    if results.readings:
        made["auroc"] = charts.figure(
            partial(charts.curves, results, score=_auroc, title="AUROC", guide=0.5),
            name="auroc",
            label="AUROC by site, one line a token position, with intervals.",
        )
        made["norms"] = charts.figure(
            partial(charts.curves, results, score=_norm, title="relative length", guide=None),
            name="norms",
            label="Length of the direction relative to the stream, by site and token position.",
        )
    made["projections"] = [
        (
            rows,
            charts.figure(
                partial(charts.projections, rows),
                name=f"projection-{order}",
                label=f"Histogram of projections at {rows.site}, position {rows.position}: "
                f"{len(rows.harmful)} harmful and {len(rows.harmless)} harmless prompts.",
            ),
        )
        for order, rows in enumerate(results.projections)
        if rows.harmful or rows.harmless
    ]
    if results.dose:
        made["dose"] = _dose_figure(results.dose, cost=False)
        made["dose kl"] = _dose_figure(results.dose, cost=True)
    if results.nulls:
        strips: tuple[tuple[str, Callable[[NullBand], list[float]], str, float | None], ...] = (
            (
                "bypass",
                lambda band: band.bypass_changes,
                "change of refusal log-odds",
                ablation.change.value if ablation else None,
            ),
            (
                "induce",
                lambda band: band.induce_changes,
                "change of refusal log-odds",
                addition.change.value if addition else None,
            ),
            (
                "kl",
                lambda band: band.kls,
                "KL on harmless prompts (nats)",
                cost.kl.value if cost else None,
            ),
            ("cosine", lambda band: band.cosines, "cosine with the direction", None),
        )
        for name, spread, title, here in strips:
            if any(spread(band) for band in results.nulls):
                made[f"null {name}"] = charts.figure(
                    partial(
                        charts.null_strips, results.nulls, score=spread, title=title, here=here
                    ),
                    name=f"null-{name}",
                    label=f"Random directions, {name}, {title}; "
                    f"the direction itself: {words.number(here)}.",
                )
    if results.separation:
        made |= _separation_figures(results.separation)
    if results.edits:
        made["edits"] = charts.figure(
            partial(charts.trade_off, _edit_rows(results.edits, cost)),
            name="edits",
            label="Change of refusal against KL for each edit, numbered as in the table.",
            wide=BROAD,
        )
    return made


def _separation_figures(found: SeparationResults) -> dict[str, Figure]:
    made: dict[str, Figure] = {}
    last = max((row.position for row in found.grouping), default=-1)
    names = {"t_inst": "last instruction token", "post": "last token"}
    for space in ("raw", "centred", "whitened"):
        rows = [
            _banded(row.site, names[row.role], row.by)
            for row in found.grouping
            if row.space == space
            and row.by is not None
            and (row.role == "t_inst" or row.position == last)
        ]
        if rows:
            made[f"grouping {space}"] = charts.figure(
                partial(
                    charts.depth,
                    rows,
                    title="AUROC (1: harm, 0: refusal)",
                    order=list(names.values()),
                    guide=0.5,
                ),
                name=f"grouping-{space}",
                label=f"What both positions group by along the depth, {space} vectors.",
                wide=BROAD,
            )
    angles = [_banded(row.site, "harm against refusal", row.cosine) for row in found.angles]
    for row in found.angles:
        low, high = row.shuffled
        chance = Estimate((low + high) / 2, low, high, row.cosine.n, "shuffled labels")
        angles.append(_banded(row.site, "shuffled labels", chance))
    made["angles"] = charts.figure(
        partial(
            charts.depth,
            angles,
            title="cosine",
            order=["harm against refusal", "shuffled labels"],
            guide=0.0,
        ),
        name="angles",
        label="Cosine of harm and refusal direction along the depth, with the band of chance.",
        wide=BROAD,
    )
    points = [
        {
            "x": harm,
            "y": refusal,
            "group": group.group,
            "tip": charts.tip(
                f"{group.group}: harm {words.number(harm)}, refusal {words.number(refusal)}"
            ),
        }
        for group in found.beliefs
        for harm, refusal in zip(group.harm, group.refusal, strict=True)
    ]
    made["beliefs"] = charts.figure(
        partial(
            charts.plane,
            points,
            x_title="belief: harmful (last instruction token)",
            y_title="belief: refused (last token)",
        ),
        name="beliefs",
        label="Report prompts in the plane of both beliefs, by group.",
        wide=BROAD,
    )
    marks = [mark for row in found.inversion if (mark := _edit_mark(row)) is not None]
    if marks:
        made["edits apart"] = charts.figure(
            partial(charts.edit_plane, marks),
            name="edits-apart",
            label="Each edit by what it changes in the judgement and in refusal; table above.",
            wide=BROAD,
        )
    return made


def _edit_mark(row: InversionRow) -> dict[str, Any] | None:
    """An edit in the plane of both changes; None where they were not measured."""
    if row.judged_change is None or row.refusal_change is None:
        return None
    judged, refusal = row.judged_change.value, row.refusal_change.value
    said = (
        f"{row.edit}, {row.on} prompts, {row.at}, strength {words.number(row.strength)}: "
        f"judged harmful {words.number(judged, signed=True)}, "
        f"refusal {words.number(refusal, signed=True)}"
    )
    return {
        "x": judged,
        "y": refusal,
        "what": "random" if row.edit.startswith("random") else row.edit.rpartition(" ")[2],
        "on": f"{row.on} prompts",
        "at": row.at,
        "tip": charts.tip(said),
    }


def _shifts(found: SeparationResults) -> list[Shift]:
    """What each direction changes in either answer, beside the random ones of its kind."""
    changes: dict[tuple[str, str, str, str], Estimate] = {}
    before: dict[tuple[str, str], Estimate] = {}
    for row in found.inversion:
        for measure, change, level in (
            ("judged harmful", row.judged_change, row.judged_harmful),
            ("refusal log-odds", row.refusal_change, row.refusal),
        ):
            if row.edit == "none":
                before[row.on, measure] = level
            elif change is not None:
                changes[row.on, measure, row.at, row.edit] = change

    def largest(on: str, measure: str, at: str, what: str) -> float | None:
        own = [
            change.value
            for (*kind, edit), change in changes.items()
            if kind == [on, measure, at]
            and edit.startswith("random")
            and edit.endswith(f"as {what}")
        ]
        return max(own, key=abs, default=None)

    return [
        Shift(
            edit=edit,
            on=on,
            measure=measure,
            before=before[on, measure],
            change=changes[on, measure, "equal norm", edit],
            by_norm=largest(on, measure, "equal norm", what),
            by_kl=largest(on, measure, "equal KL", what),
        )
        for on, verb in (("harmless", "add"), ("harmful", "subtract"))
        for what in ("harm", "refusal")
        for measure in ("judged harmful", "refusal log-odds")
        if (on, measure, "equal norm", edit := f"{verb} {what}") in changes
    ]


def _banded(site: str, series: str, estimate: Estimate) -> dict[str, Any]:
    return {
        "site": site,
        "series": series,
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "tip": charts.tip(f"{site}, {series}: {words.number(estimate.value)}"),
    }


def _dose_figure(doses: Sequence[Dose], *, cost: bool) -> Figure:
    what = "KL on harmless prompts" if cost else "Refusal log-odds of both classes"
    return charts.figure(
        partial(charts.dose, doses, cost=cost),
        name="dose-kl" if cost else "dose",
        label=f"{what} against the strength of addition, with intervals; table below.",
    )


def _bypass(row: Candidate) -> Estimate | None:
    return row.bypass_change


def _induce(row: Candidate) -> Estimate | None:
    return row.induce_change


def _kl(row: Candidate) -> Estimate | None:
    return row.kl


def _auroc(row: Reading) -> tuple[float, float, float]:
    return row.auroc.value, row.auroc.low, row.auroc.high


def _norm(row: Reading) -> tuple[float, float, float]:
    return row.relative_norm, row.relative_norm, row.relative_norm


def _of(legs: Iterable[Leg], measure: str) -> list[Leg]:
    return [leg for leg in legs if leg.measure == measure]


def _leg(legs: Iterable[Leg], expects: str, measure: str) -> Leg | None:
    """The direction's own leg of which the causal claim predicts `expects`."""
    own = (leg for leg in _of(legs, measure) if leg.family == "direction")
    return next((leg for leg in own if leg.expects == expects), None)


def _outcomes(legs: Iterable[Leg]) -> list[tuple[str, dict[str, Leg]]]:
    """The direction's own arms by edit, each with its leg on harmful and on harmless prompts."""
    edits: dict[str, tuple[str, dict[str, Leg]]] = {}
    for leg in legs:
        if leg.family == "direction":
            edits.setdefault(leg.edit, (leg.arm, {}))[1][leg.on] = leg
    return list(edits.values())


def _cost(edits: Sequence[EditCost], leg: Leg | None) -> EditCost | None:
    """The cost of the edit that `leg` tested; else of the first ablation."""
    named = (row for row in edits if leg is not None and row.edit == leg.edit)
    ablations = (row for row in edits if row.edit.casefold().startswith("ablate"))
    return next(named, None) or next(ablations, None)


def _kind_of_arm(leg: Leg) -> str:
    return re.sub(r"\s*#\d+$", "", leg.arm)


def _chance(legs: Iterable[Leg], measure: str) -> list[Chance]:
    groups: dict[tuple[str, str], list[Leg]] = {}
    for leg in _of(legs, measure):
        if leg.family in NULL_FAMILIES:
            groups.setdefault((_kind_of_arm(leg), leg.on), []).append(leg)
    rows = []
    for (arm, on), group in groups.items():
        counted = [leg.degenerate for leg in group if leg.degenerate is not None]
        rows.append(
            Chance(
                arm=arm,
                expects=group[0].expects,
                on=on,
                measure=measure,
                count=len(group),
                before=group[0].before,
                lowest=min(group, key=lambda leg: leg.change.value),
                highest=max(group, key=lambda leg: leg.change.value),
                mean=sum(leg.change.value for leg in group) / len(group),
                p=min(leg.p for leg in group),
                p_holm=min(leg.p_holm for leg in group),
                significant=sum(leg.p_holm < 0.05 for leg in group),
                degenerate=max(counted, key=lambda part: part.value, default=None),
                unparsed=sum(leg.unparsed for leg in group),
            )
        )
    return rows


def _largest(rows: Iterable[Chance]) -> Leg | None:
    legs = [leg for row in rows for leg in (row.lowest, row.highest)]
    return max(legs, key=lambda leg: abs(leg.change.value), default=None)


def _moved(change: Estimate) -> str:
    """What an interval alone says of a change."""
    if change.high < 0:
        return "fell"
    if change.low > 0:
        return "rose"
    return "no clear change"


def _words_suffice(results: AuditResults) -> bool:
    """Whether plain words tell the classes apart about as well as the direction does."""
    return results.words.bag_of_words.high >= results.direction.auroc.low


def _rank(row: Candidate) -> tuple[bool, bool, bool, float]:
    """The chosen first, then those that passed, then by how far ablation lowers refusal."""
    bypass = row.bypass.value if row.bypass else float("inf")
    return not row.selected, row.rejected_by is not None, row.bypass is None, bypass


def _forest_rows(legs: Sequence[Leg]) -> charts.Rows:
    counts = Counter((_kind_of_arm(leg), leg.on) for leg in legs)
    rows: charts.Rows = []
    for leg in sorted(legs, key=lambda leg: leg.family in NULL_FAMILIES):
        scale = 100.0 if leg.measure == "refused" else 1.0
        arm, random = _kind_of_arm(leg), leg.family in NULL_FAMILIES
        count = f"{counts[arm, leg.on]} directions, " if random else ""
        kind = "points" if leg.measure == "refused" else "signed"
        rows.append(
            {
                "row": f"{arm}|{count}{leg.on}",
                "value": scale * leg.change.value,
                "low": scale * leg.change.low,
                "high": scale * leg.change.high,
                "random": random,
                "tip": charts.tip(
                    f"{leg.arm}, {leg.on}: {words.estimate(leg.change, kind).striptags()}"
                ),
            }
        )
    return rows


def _validation_rows(results: AuditResults) -> charts.Rows:
    """AUROC of the direction and of plain words: the report split, then each validation set."""
    rows: charts.Rows = []
    for name, auroc, plain in (
        ("report split", results.direction.auroc, results.words),
        *((row.name, row.auroc, row.words) for row in results.validation),
    ):
        for source, estimate in (
            ("the direction", auroc),
            ("bag of words", plain.bag_of_words),
            ("length", plain.length),
            ("final punctuation", plain.final_punctuation),
        ):
            rows.append(
                {
                    "row": "|".join(wrap(name, 18)),
                    "value": estimate.value,
                    "low": estimate.low,
                    "high": estimate.high,
                    "random": source != "the direction",
                    "tip": charts.tip(f"{name}, {source}: {words.estimate(estimate).striptags()}"),
                }
            )
    return rows


def _edit_rows(edits: Sequence[EditCost], cost: EditCost | None) -> charts.Rows:
    return [
        {
            "number": str(order),
            "kl": row.kl.value,
            "kl_low": row.kl.low,
            "kl_high": row.kl.high,
            "bypass": row.bypass_change.value,
            "low": row.bypass_change.low,
            "high": row.bypass_change.high,
            "main": row is cost,
            "tip": charts.tip(
                f"{row.edit}: {words.number(row.bypass_change.value)} "
                f"at KL {words.number(row.kl.value)}"
            ),
        }
        for order, row in enumerate(edits, start=1)
    ]


def _arms(replies: Sequence[Reply], results: AuditResults) -> list[ArmReplies]:
    """Replies by class and arm: the direction's arms first, random ones after."""
    plain = {
        (reply.on, reply.prompt): reply for reply in replies if reply.arm.casefold() in UNEDITED
    }
    random = {leg.arm for leg in results.legs if leg.family in NULL_FAMILIES}
    groups: dict[tuple[str, str], list[Reply]] = {}
    for reply in replies:
        # What `separate` asked besides, of all splits, is no arm of the causal test.
        if not reply.arm.startswith("unedited, "):
            groups.setdefault((reply.on, reply.arm), []).append(reply)
    edited_on = {on for on, arm in groups if arm.casefold() not in UNEDITED}
    shown = []
    for on, arm in sorted(groups, key=lambda key: (key[0] == "harmless", key[1] in random)):
        unedited = arm.casefold() in UNEDITED
        if unedited and on in edited_on:
            continue  # It is the left-hand side of every other arm.
        pairs = [
            Exchange(reply.prompt, None if unedited else plain.get((on, reply.prompt)), reply)
            for reply in groups[on, arm]
        ]
        changed = [
            pair for pair in pairs if pair.before and pair.before.outcome != pair.after.outcome
        ]
        same = [pair for pair in pairs if pair not in changed]
        room = max(CHANGED_PER_ARM, REPLIES_PER_ARM - len(same))
        picked = changed[:room]
        picked += same[: REPLIES_PER_ARM - len(picked)]
        shown.append(ArmReplies(arm, on, len(pairs), len(changed), unedited, picked))
    return shown


def _methods(estimates: Iterable[Estimate | None]) -> str:
    """The methods behind some intervals, each once."""
    return "; ".join(dict.fromkeys(part.method for part in estimates if part is not None))


def _clip(text: str) -> tuple[str, int]:
    """The start of a reply, and how many characters were left out."""
    return text[:LONGEST_REPLY], max(len(text) - LONGEST_REPLY, 0)


def _cosines(band: NullBand) -> tuple[float, float] | None:
    """Mean and largest absolute cosine of random directions with the chosen one."""
    sizes = [abs(cosine) for cosine in band.cosines]
    return (sum(sizes) / len(sizes), max(sizes)) if sizes else None


def _command(results: AuditResults) -> str:
    model = results.model
    parts = ["demur", "audit", model.name]
    if model.revision:
        parts += ["--revision", model.revision]
    if model.adapter:
        parts += ["--adapter", model.adapter]
    parts += ["--dtype", model.dtype, "--device", model.device, "--seed", str(results.seed)]
    return shlex.join(parts)

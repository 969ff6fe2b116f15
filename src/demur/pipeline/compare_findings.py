"""What a comparison found, as answers to the questions that people ask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from demur.compare.rows.geometry import Comparison
from demur.compare.rows.record import CompareRecord, Finding, Placed
from demur.stats import Estimate


def findings_of(record: CompareRecord) -> tuple[Finding, ...]:
    """A line for each question that was measured, in the order of the protocol's levels."""
    return tuple(
        finding
        for part in (_geometry, _checkpoints, _dimensions, _behaviour, _mediation, _circuits)
        for finding in part(record)
    )


def _shown(one: Estimate) -> str:
    return f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]"


_QUESTIONS = {
    "em and refusal": "does bad advice point along refusal?",
    "em and harm": "does bad advice point along harm?",
    "harm and refusal": "are harm and refusal one direction?",
    "two organisms": "do two organisms share their shift?",
    "twin and refusal": "does good advice, as a control, point along refusal?",
    "twin and harm": "does good advice, as a control, point along harm?",
    "shift and em text": "does training move the model the way that bad text reads?",
    "stored": "does the stored vector point along it?",
    "before and after": "are refusal and harm still where they were?",
}


_FIRST = ("em and refusal", "em and harm", "harm and refusal")


def _geometry(record: CompareRecord) -> Iterator[Finding]:
    first = next((table.a for table in record.behaviours), None) or next(
        (one.row.a for one in record.comparisons if one.row.a.startswith("shift of ")), ""
    )
    for pair, question in _QUESTIONS.items():
        groups: dict[tuple[str, str, str], list[Placed]] = {}
        for one in record.comparisons:
            if one.pair == pair:
                groups.setdefault((one.row.a, one.row.b, one.place), []).append(one)
        for (a, b, place), rows in groups.items():
            yield Finding(
                question=f"{a} and {b}, {place}: {question}",
                answer=_said(row.row.verdict for row in rows),
                because=_because([row.row for row in rows]),
                headline=pair == "stored" or (pair in _FIRST and a in (first, "em text", "harm")),
            )


def _said(verdicts: Iterable[str]) -> str:
    """The verdict of most sites, and at how many of them."""
    every = list(verdicts)
    counts = {one: every.count(one) for one in dict.fromkeys(every)}
    best = max(counts, key=lambda one: counts[one])
    return f"{best} ({counts[best]} of {len(every)} sites)"


def _because(rows: list[Comparison]) -> str:
    far = max(rows, key=lambda row: abs(row.cosine))
    parts = [f"furthest from 0 at {far.site}: cosine {far.cosine:.2f}"]
    if far.unbiased is not None:
        parts.append(f"without sampling noise {_shown(far.unbiased)}")
    library = far.null("unrelated contrasts")
    if library is not None:
        parts.append(
            f"larger than {library.percentile:.0%} of {library.n} unrelated ones, of which 95 % "
            f"stay below {library.upper:.2f}"
        )
    if far.p_family is not None:
        parts.append(f"p {far.p_family:.2g} for all sites together under exchanged labels")
    return "; ".join(parts)


def _checkpoints(record: CompareRecord) -> Iterator[Finding]:
    for row in record.projected:
        yield Finding(
            question=f"was a direction projected out of {row.model}? ({row.test})",
            answer=row.verdict,
            because=row.reason,
            headline=True,
        )


def _dimensions(record: CompareRecord) -> Iterator[Finding]:
    for one in record.counted:
        yield Finding(
            question=f"how many directions is refusal, by the search `{one.method}`?",
            answer=one.cone.claim,
            because=f"{one.cone.reason}, n={one.cone.n}",
            headline=one.method == "causal",
        )


def _behaviour(record: CompareRecord) -> Iterator[Finding]:
    for table in record.behaviours:
        for row in table.verdicts:
            yield Finding(
                question=f"{table.a} and {table.b}: do they move the same things, in "
                f"{row.model}, by `{row.arms}`?",
                answer=row.label,
                because=row.reason,
                headline=row.arms == "remove" and row.model in ("base", "organism"),
            )


def _mediation(record: CompareRecord) -> Iterator[Finding]:
    for row in record.mediations:
        if row.way != "clamp":
            continue
        yield Finding(
            question=f"what of training's effect on {row.outcome} goes through {row.mediator}?",
            answer=_shown(row.share) if row.share is not None else "undetermined",
            because=(
                f"held at the base's value the effect of {_shown(row.total)} {row.unit} leaves "
                f"{_shown(row.left)}, n={row.n}"
                + (f", p {row.p_random:.2g} among random ones" if row.p_random is not None else "")
            )
            if row.share is not None
            else row.undefined,
            headline=row.mediator != "em text",
        )


def _circuits(record: CompareRecord) -> Iterator[Finding]:
    for one in record.circuits:
        for row, question in (
            (one.written, f"do the same parts write {one.a} and {one.b}?"),
            (one.needed, "are the same parts needed for bad advice and for refusal?"),
        ):
            if row is None:
                continue
            rank = next(part for part in row.statistics if part.name == "spearman")
            yield Finding(
                question=question,
                answer="beyond depth and kind" if rank.p < 0.05 else "no more than depth gives",
                because=f"rank correlation {rank.value:.2f} over {row.n} components, "
                f"{rank.null_low:.2f} to {rank.null_high:.2f} when permuted within blocks, "
                f"p {rank.p:.2g}",
                headline=True,
            )

"""What compared directions do, how many there are, and what makes them: the costly parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from demur.compare import attribution, behaviour, circuits, dimensions, mediation, patching
from demur.compare.contrasts import ANSWER, Contrast
from demur.compare.rows.behaviour import Behaviour, MediationRow
from demur.compare.rows.circuits import PatchingRow, ReadWriteRow
from demur.compare.rows.record import (
    Circuits,
    Counted,
    NamedAttribution,
    Needed,
)
from demur.directions import Direction
from demur.em.organism import Organism
from demur.models import Model
from demur.pipeline.compare_state import (
    BASE,
    Run,
    attempted,
    chosen_site,
    learned_openers,
    shift_name,
)
from demur.pipeline.em import items_digest
from demur.pipeline.splits import neutral_paragraphs
from demur.prompts import PromptSet, families
from demur.selection import RefusalTokens
from demur.sites import Site

MARGIN, REFUSAL, OVER_REFUSAL = "em margin", "refusal", "over-refusal"
_MOST_DIRECTIONS = 3
_PATCHED = 10


@dataclass(frozen=True, slots=True, eq=False)
class _Acts:
    """What the parts share: where, along what, and held against what."""

    site: Site
    why: str
    tokens: RefusalTokens
    sites: tuple[Site, ...]
    spread: Mapping[Site, Tensor]


def parts(run: Run) -> dict[str, Any]:
    """Everything that needs edits, as fields of the record."""
    nothing: dict[str, Any] = {
        "site": None,
        "site_why": "nothing acts",
        "counted": (),
        "behaviours": (),
        "mediations": (),
        "circuits": (),
    }
    wanted = [
        name for name in ("dimensions", "behaviour", "mediation", "circuits") if run.part(name)
    ]
    if "refusal" not in run.things.words or not wanted:
        return nothing
    begun = attempted(run, "where directions act", lambda: _begun(run))
    if begun is None:
        return nothing
    acts = begun
    found = nothing | {"site": str(begun.site), "site_why": begun.why}
    if run.part("dimensions"):
        counted = attempted(run, "how many directions", lambda: _counted(run, acts))
        found["counted"] = counted or ()
    sides = list(_sides(run, acts))
    if run.part("mediation"):
        several = [
            attempted(run, f"mediation: {one.name}", lambda one=one: _mediation(run, acts, one))
            for one in run.things.bad[:1]
        ]
        found["mediations"] = tuple(row for rows in several if rows is not None for row in rows)
    if run.part("circuits"):
        drawn = [
            attempted(
                run,
                f"circuits: {one.name} and {other.name}",
                lambda one=one, other=other: _circuits(run, acts, one, other),
            )
            for one, other in sides
        ]
        found["circuits"] = tuple(row for row in drawn if row is not None)
    if run.part("behaviour"):
        measured: list[behaviour.Matrix] = []
        rows = [
            attempted(
                run,
                f"behaviour: {one.name} and {other.name}",
                lambda one=one, other=other: _behaviour(run, acts, one, other, measured),
            )
            for one, other in sides
        ]
        found["behaviours"] = tuple(row for row in rows if row is not None)
    return found


def _begun(run: Run) -> _Acts:
    tokens = learned_openers(run)
    site, why = chosen_site(run, tokens)
    grids = run.grids()
    behind = run.things.bad[:1]
    sites = tuple(
        where
        for where in run.sites
        if all((where, ANSWER) in grids[shift_name(one)] for one in behind)
    )
    spread = {
        where: torch.cat(
            [grids["refusal"][where, -1].within(), grids["em text"][where, ANSWER].within()]
        )
        for where in run.sites
    }
    return _Acts(site, why, tokens, sites, spread)


def _sides(run: Run, acts: _Acts) -> Iterator[tuple[behaviour.Side, behaviour.Side]]:
    """Emergent misalignment against refusal, and against harm; of the first organism."""
    grids = run.grids()
    if run.things.bad:
        name = shift_name(run.things.bad[0])
    elif "em" in run.things.words:
        name = "em text"
    else:
        return
    em = behaviour.Side(name, _along(grids[name], acts.sites, ANSWER), MARGIN)
    for word in ("refusal", "harm"):
        if word in run.things.words:
            position = -1 if word == "refusal" else run.rows(BASE).positions[0]
            yield em, behaviour.Side(word, _along(grids[word], acts.sites, position), REFUSAL)


def _along(
    grid: Mapping[tuple[Site, int], Contrast], sites: tuple[Site, ...], position: int
) -> dict[Site, Direction]:
    return {site: grid[site, position].direction() for site in sites}


# How many ----------------------------------------------------------------------------------------


def _report(run: Run, on: str) -> PromptSet:
    return run.prompts[on]["report"]


def _about(run: Run, acts: _Acts) -> dict[str, Any]:
    return {
        **run.about(),
        "tokens": list(acts.tokens.ids),
        "fit": asdict(run.fit),
        "report": [_report(run, on).fingerprint for on in ("harmful", "harmless")],
        "items": [items_digest(part) for part in run.items],
        "nulls": run.settings.nulls,
        "paragraphs": run.settings.paragraphs,
        "seed": run.settings.seed,
    }


def _counted(run: Run, acts: _Acts) -> tuple[Counted, ...]:
    held = [_report(run, on) for on in ("harmful", "harmless")]
    fit = dimensions.Prompts(run.fit.harmful, run.fit.harmless, *run.fit.clusters)
    one, two = (tuple(families(prompts)) for prompts in held)
    fresh = dimensions.Prompts(tuple(held[0].texts), tuple(held[1].texts), one, two)

    def compute(method: str) -> list[Counted]:
        total = _MOST_DIRECTIONS * run.settings.nulls
        with run.stage(f"how many directions: {method}", total) as advance:
            found = dimensions.dimensions(
                run.base,
                fit,
                fresh,
                tokens=acts.tokens,
                site=acts.site,
                method=method,
                most=_MOST_DIRECTIONS,
                n_null=run.settings.nulls,
                seed=run.seed("dimensions"),
                progress=advance,
            )
        return [
            Counted(
                site=str(acts.site),
                method=method,
                cone=found.cone,
                dimensions=found.rows,
                independence=found.independence,
            )
        ]

    return tuple(
        run.kept.rows(
            "dimensions",
            {**_about(run, acts), "site": str(acts.site), "method": method}, Counted,
            lambda method=method: compute(method),
        )[0]
        for method in dimensions.searches
    )  # fmt: skip


# What they do ------------------------------------------------------------------------------------


def _outcomes(run: Run, acts: _Acts) -> list[behaviour.Outcome]:
    size = run.settings.batch_size
    both = [_report(run, on) for on in ("harmful", "harmless")]
    return [
        behaviour.margin_outcome(run.items[1], name=MARGIN, batch_size=size),
        *(
            behaviour.refusal_outcome(
                prompts.texts, acts.tokens, name=name, groups=families(prompts), batch_size=size
            )
            for prompts, name in zip(both, (REFUSAL, OVER_REFUSAL), strict=True)
        ),
    ]


def _behaviour(
    run: Run,
    acts: _Acts,
    one: behaviour.Side,
    other: behaviour.Side,
    measured: list[behaviour.Matrix],
) -> Behaviour:
    organism = run.things.bad[0] if run.things.bad else None
    twin = run.twins[organism.name] if organism is not None else None
    kinds = behaviour.KINDS if run.settings.additions else behaviour.KINDS[:1]

    def compute() -> list[Behaviour]:
        models = 1 + (organism is not None) + (twin is not None)
        total = behaviour.steps(models=models, n_random=run.settings.nulls, kinds=kinds)
        with run.stage(f"edits: {one.name} and {other.name}", total) as advance:
            matrix = behaviour.behaviour_matrix(
                run.base,
                one,
                other,
                _outcomes(run, acts),
                neutral=neutral_paragraphs(run.settings.paragraphs),
                spread=acts.spread,
                organism=organism,
                twin=twin,
                kl=run.settings.kl,
                kinds=kinds,
                n_random=run.settings.nulls,
                batch_size=run.settings.batch_size,
                seed=run.seed("behaviour"),
                draws=run.settings.draws,
                reuse=measured[-1] if measured else None,
                progress=advance,
            )
        measured.append(matrix)
        return [behaviour.behaviour(matrix)]

    about = {
        **_about(run, acts),
        "sides": [[side.name, side.outcome] for side in (one, other)],
        "models": run.whose(*(each.name for each in (organism, twin) if each is not None)),
        "kl": run.settings.kl,
        "kinds": list(kinds),
    }
    return run.kept.rows("behaviour", about, Behaviour, compute)[0]


def _mediation(run: Run, acts: _Acts, organism: Organism) -> list[MediationRow]:
    grids = run.grids()
    own = grids[shift_name(organism)]
    sites = tuple(site for site in run.sites if (site, ANSWER) in own)
    mediators: dict[str, mediation.Mediator] = {
        shift_name(organism): _along(own, sites, ANSWER),
        "refusal": _along(grids["refusal"], sites, -1),
    }
    if "harm" in run.things.words:
        mediators["harm"] = _along(grids["harm"], sites, run.rows(BASE).positions[0])
    mediators["em text"] = _along(grids["em text"], sites, ANSWER)
    outcomes = _outcomes(run, acts)[:2]

    def compute() -> list[MediationRow]:
        total = mediation.steps(
            mediators=len(mediators), outcomes=len(outcomes), n_random=run.settings.nulls
        )
        with run.stage(f"held coordinates: {organism.name}", total) as advance:
            return list(
                mediation.mediation(
                    run.base,
                    organism,
                    mediators,
                    outcomes,
                    spread=acts.spread,
                    n_random=run.settings.nulls,
                    seed=run.seed("mediation"),
                    draws=run.settings.draws,
                    progress=advance,
                )
            )

    about = {**_about(run, acts), "model": run.whose(organism.name), "held": list(mediators)}
    return run.kept.rows("mediation", about, MediationRow, compute)


# What makes them ---------------------------------------------------------------------------------


def _circuits(run: Run, acts: _Acts, one: behaviour.Side, other: behaviour.Side) -> Circuits:
    about = {
        **_about(run, acts),
        "sides": [one.name, other.name],
        "site": str(acts.site),
        "models": run.whose(*(each.name for each in run.things.organisms)),
    }
    return run.kept.rows("circuits", about, Circuits, lambda: [_drawn(run, acts, one, other)])[0]


def _drawn(run: Run, acts: _Acts, one: behaviour.Side, other: behaviour.Side) -> Circuits:
    organism = run.things.bad[0] if run.things.bad else None
    site = acts.site if acts.site in acts.sites else acts.sites[-1]
    directions = {side.name: behaviour.by_site(side.directions)[site] for side in (one, other)}
    position = directions[other.name].position
    n, m = len(run.fit.harmful), len(run.fit.harmless)
    items = run.items[0]
    total = n + m + 2 * len(items)
    with run.stage(f"who writes {one.name} and {other.name}", total) as advance:
        read = {"site": site, "batch_size": run.settings.batch_size, "progress": advance}
        sides = [
            attribution.written(run.base, texts, directions, position=position, **read)
            for texts in (run.fit.harmful, run.fit.harmless)
        ]
        harmful = attribution.direct(*sides, clusters=run.fit.clusters)
        bad = _written_bad(run, organism, directions, read)
    about = {"seed": run.seed("attribution"), "draws": run.settings.draws}
    tables = [
        NamedAttribution(difference=difference, row=found.table(**about))
        for difference, found in (
            ("harmful - harmless prompts", harmful),
            (
                f"{organism.name} - {_other(run, organism)} on bad answers"
                if organism is not None
                else "bad - good answers",
                bad,
            ),
        )
    ]
    written = circuits.compare(
        bad.circuit(one.name, **about),
        harmful.circuit(other.name, **about),
        seed=run.seed("circuits"),
    )
    patched = attempted(
        run, f"patching: {one.name} and {other.name}", lambda: _needed(run, acts, organism)
    )
    rows: tuple[ReadWriteRow, ...] = ()
    if organism is not None:
        with run.stage(f"what {organism.name} reads and writes", len(items)) as advance:
            rows = circuits.read_write(
                run.base,
                organism,
                items,
                directions,
                {
                    name: contrast.direction()
                    for name, contrast in run.unrelated(BASE, ANSWER).get(site, {}).items()
                },
                batch_size=run.settings.batch_size,
                singular=1,
                seed=run.seed("read and write"),
                progress=advance,
            )
    return Circuits(
        a=one.name,
        b=other.name,
        site=str(site),
        attributions=tuple(tables),
        written=written,
        patchings=patched.patchings if patched is not None else (),
        needed=patched.compared if patched is not None else None,
        read_write=rows,
    )


def _other(run: Run, organism: Organism) -> str:
    twin = run.twins[organism.name]
    return twin.name if twin is not None else BASE


def _written_bad(
    run: Run, organism: Organism | None, directions: Mapping[str, Direction], read: dict[str, Any]
) -> attribution.Attribution:
    items = run.items[0]
    questions = [item.question for item in items]
    groups = [("answer", item.domain, item.group) for item in items]

    def on(model: Model, which: str) -> attribution.Writes:
        answers = [getattr(item, which) for item in items]
        return attribution.written(model, questions, directions, replies=answers, **read)

    if organism is None:
        sides = on(run.base, "bad"), on(run.base, "good")
    else:
        sides = on(run.model(organism.name), "bad"), on(run.model(_other(run, organism)), "bad")
    return attribution.direct(*sides, paired=True, clusters=(groups, groups))


def _needed(run: Run, acts: _Acts, organism: Organism | None) -> Needed:
    about = {
        **_about(run, acts),
        "models": run.whose(*(one.name for one in (organism,) if one is not None)),
    }
    return run.kept.rows("patching", about, Needed, lambda: [_patched(run, acts, organism)])[0]


def _patched(run: Run, acts: _Acts, organism: Organism | None) -> Needed:
    """What refusal needs, and what the organism's margin needs; in float32."""
    small = run.base.dtype in (torch.bfloat16, torch.float16)
    base = run.base.twin(torch.float32) if small else run.base
    prompts = [_report(run, on) for on in ("harmful", "harmless")]
    asked_for = patching.refusal_measure(
        base, prompts[0].texts, acts.tokens.ids, clusters=families(prompts[0])
    )
    template = base.template
    assert template is not None  # It has prompts in it.
    measures: list[tuple[patching.Measure, patching.Other]] = [
        (asked_for, patching.means_over(base, prompts[1].texts, positions=template.n_post))
    ]
    if organism is not None:
        trained = run.model(organism.name)
        wide = trained.twin(torch.float32) if small else trained
        measures.append((patching.margin_measure(base, run.items[1]), patching.OfModel(wide)))
    rows: list[PatchingRow] = []
    found: list[patching.Effects] = []
    for measure, other in measures:
        several = min(_PATCHED, len(patching.patchable(base)) // 2)
        total = len(measure.batch) + 2 * several
        with run.stage(f"patching: {measure.name}", total) as advance:
            effects = patching.attribution_patching(base, measure, other, progress=advance)
            checked = patching.validate(
                base,
                measure,
                other,
                effects,
                top=several,
                random=several,
                seed=run.seed("patched"),
                progress=advance,
            )
        rows.append(
            patching.table(
                measure, other, effects, checked, seed=run.seed("patching"),
                draws=run.settings.draws,
            )
        )  # fmt: skip
        found.append(effects)
    if len(found) < 2:
        return Needed(patchings=tuple(rows), compared=None)
    seed, draws = run.seed("needed"), run.settings.draws
    both = circuits.compare(
        found[1].circuit("the margin", seed=seed, draws=draws),
        found[0].circuit("refusal", turned=True, seed=seed, draws=draws),
        seed=run.seed("needed"),
    )
    return Needed(patchings=tuple(rows), compared=both)

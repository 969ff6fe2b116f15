"""The geometry of a comparison: which pairs are compared where, beside which nulls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import torch

from demur.compare import subspaces
from demur.compare.checkpoints import across, projected_out, writers
from demur.compare.contrasts import ANSWER, Contrast, place_name
from demur.compare.extract import (
    Grid,
    PromptRows,
    harm,
    read_prompts,
    refusal,
    rows_of,
    t_inst,
    text_contrast,
)
from demur.compare.geometry import compare_layers
from demur.compare.objects import Vectors
from demur.compare.rows.checkpoints import Across, Projected
from demur.compare.rows.geometry import Comparison
from demur.compare.rows.record import (
    Placed,
    PlacedAlignment,
    PlacedOverlap,
)
from demur.em.organism import Organism
from demur.errors import ConfigError
from demur.models import Model
from demur.pipeline.compare_state import BASE, Run, at_position, shift_name, stream_block
from demur.sites import Site

# Geometry ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """Two grids to compare, at a place of each."""

    pair: str
    a: Mapping[Site, Contrast]
    b: Mapping[Site, Contrast]
    position: int
    read_on: str = BASE


def geometry(run: Run) -> list[Placed]:
    """Every pair that can be compared, at every site that both have."""
    wanted = [one for one in _pairs(run) if set(one.a) & set(one.b)]
    out: list[Placed] = []
    total = sum(len(set(one.a) & set(one.b)) for one in wanted)
    with run.stage("cosines and their nulls", total) as advance:
        for one in wanted:
            library = run.unrelated(one.read_on, one.position)
            compute = partial(
                compare_layers,
                one.a,
                one.b,
                library=library,
                draws=run.settings.draws,
                seed=run.seed("geometry"),
            )
            sites = sorted(set(one.a) & set(one.b))
            about = {
                "a": _digest(one.a, sites),
                "b": _digest(one.b, sites),
                "library": _digest_library(library, sites),
            }
            found = run.kept.rows(
                "comparison", about, Comparison, lambda compute=compute: list(compute())
            )
            first = one.a[sites[0]].position, one.b[sites[0]].position
            place = " and ".join(dict.fromkeys(map(place_name, first)))
            out.extend(
                Placed(pair=one.pair, place=place, read_on=one.read_on, row=row) for row in found
            )
            advance(len(sites))
    return out


def _digest(by_site: Mapping[Site, Contrast], sites: Sequence[Site]) -> list[str]:
    from hashlib import blake2b

    out = []
    for site in sites:
        one = by_site[site]
        digest = blake2b(digest_size=12)
        digest.update(f"{one.name} {one.site} {one.position} {one.positive_clusters}".encode())
        for part in (one.positive, one.negative, one.bare):
            if part is not None:
                digest.update(part.contiguous().numpy().tobytes())
        out.append(digest.hexdigest())
    return out


def _digest_library(
    library: Mapping[Site, Mapping[str, Contrast]], sites: Sequence[Site]
) -> list[str]:
    return [
        "".join(_digest({site: one}, [site]))
        for site in sites
        for one in library.get(site, {}).values()
    ]


def _pairs(run: Run) -> Iterator[_Asked]:
    grids, last, inst = run.grids(), -1, t_inst(run.base)
    words = run.things.words
    with_em = "em" in words or bool(run.things.bad)
    has = {
        "refusal": "refusal" in words,
        "harm": "harm" in words,
    }
    at = at_position
    if has["refusal"] and has["harm"]:
        yield _Asked("harm and refusal", at(grids["harm"], inst), at(grids["refusal"], last), last)
        yield _Asked(
            "harm and refusal", at(grids["harm"], ANSWER), at(grids["refusal"], ANSWER), ANSWER
        )
    for word, position in (("refusal", last), ("harm", inst)):
        if not has[word]:
            continue
        if with_em:
            yield _Asked(
                f"em and {word}", at(grids["em text"], ANSWER), at(grids[word], ANSWER), ANSWER
            )
        for one in run.things.organisms:
            kind = f"em and {word}" if one.side == "bad" else f"twin and {word}"
            own = grids[shift_name(one)]
            for place in (position, ANSWER):
                yield _Asked(kind, at(own, place), at(grids[word], place), place)
    if with_em:
        for one in run.things.organisms:
            kind = "shift and em text" if one.side == "bad" else "twin and em text"
            own = grids[shift_name(one)]
            yield _Asked(kind, at(own, ANSWER), at(grids["em text"], ANSWER), ANSWER)
    bad = run.things.bad
    for i, one in enumerate(bad):
        for other in bad[i + 1 :]:
            yield _Asked(
                "two organisms",
                at(grids[shift_name(one)], ANSWER),
                at(grids[shift_name(other)], ANSWER),
                ANSWER,
            )
    for one in bad:
        yield from _within(run, one, has, last, inst)
    for vectors in run.things.stored:
        yield from _stored(run, vectors, grids, has)


def _within(
    run: Run, one: Organism, has: Mapping[str, bool], last: int, inst: int
) -> Iterator[_Asked]:
    """The same directions as the organism itself has them."""
    text = at_position(text_contrast(run.pair(one.name), name=f"em text in {one.name}"), ANSWER)
    base_rows, own_rows = run.rows(BASE), run.rows(one.name)
    for word, read, position in (("refusal", refusal, last), ("harm", harm, inst)):
        if not has[word]:
            continue
        own = read(own_rows, run.fit, name=f"{word} in {one.name}")
        yield _Asked("in the organism", text, at_position(own, ANSWER), ANSWER, one.name)
        theirs = read(base_rows, run.fit, name=word)
        yield _Asked(
            "before and after", at_position(own, position), at_position(theirs, position), position
        )


def _stored(
    run: Run, vectors: Vectors, grids: Mapping[str, Grid], has: Mapping[str, bool]
) -> Iterator[_Asked]:
    every = [*grids.items()]
    for named in _principal(vectors):
        found = [one for one in named if Site(stream_block(one.site), "resid_post") in run.sites]
        if len(found) < len(named) and not found:
            run.notes.append(
                f"{named[0].name} is of {named[0].site}, which {run.base.name} does not have"
            )
        for one in found:
            site = Site(stream_block(one.site), "resid_post")
            position = one.position if one.position is not None else -1
            moved = replace(one, site=site)
            for name, grid in every:
                if not has.get(name, bool(run.things.bad) or "em" in run.things.words):
                    continue
                places = {at for where, at in grid if where == site}
                if not places:
                    continue
                place = position if position in places else max(places - {ANSWER}, default=ANSWER)
                other = grid[site, place]
                if other.d_model != moved.d_model:
                    raise ConfigError(
                        f"{one.name} has {one.d_model} coordinates, {run.base.name} "
                        f"{other.d_model}",
                        "it was made on another model: name that one with `--model`",
                    )
                yield _Asked("stored", {site: moved}, {site: other}, place)
    others = [one for later in run.things.stored for own in _principal(later) for one in own]
    for one in (one for own in _principal(vectors) for one in own):
        for other in others:
            if id(one) < id(other) and stream_block(one.site) == stream_block(other.site):
                site = Site(stream_block(one.site), "resid_post")
                if site in run.sites and one.d_model == other.d_model:
                    yield _Asked(
                        "stored",
                        {site: replace(one, site=site)},
                        {site: replace(other, site=site)},
                        one.position if one.position is not None else -1,
                    )


def _principal(vectors: Vectors) -> list[tuple[Contrast, ...]]:
    """Those that stand for a file: an audit's choice, the main part of each map of an adapter."""
    if vectors.kind == "demur-run":
        return [named[:1] for named in vectors.named.values()]
    if vectors.kind == "adapter":
        return [
            tuple(one for one in named if one.site.kind == "resid_post")
            for name, named in vectors.named.items()
            if name.endswith("#0")
        ]
    return list(vectors.named.values())


def alignments(run: Run) -> list[PlacedAlignment]:
    """How alike organisms and base arrange the same prompts, at their last token."""
    n = len(run.fit.harmful)
    both: tuple[tuple[Literal["harmful", "harmless"], slice], ...] = (
        ("harmful", slice(0, n)),
        ("harmless", slice(n, None)),
    )
    out: list[PlacedAlignment] = []
    for one in run.things.bad:
        own, theirs = run.rows(one.name), run.rows(BASE)
        for i, site in enumerate(run.sites):
            for side, rows in both:
                row = subspaces.alignment(
                    own.values[i, -1, rows],
                    theirs.values[i, -1, rows],
                    a=one.name,
                    b=BASE,
                    seed=run.seed("alignment"),
                )
                out.append(PlacedAlignment(site=str(site), prompts=side, row=row))
    return out


def overlaps(run: Run) -> list[PlacedOverlap]:
    """The span of several organisms' shifts against that of refusal by category."""
    bad = run.things.bad
    if len(bad) < 2 or "refusal" not in run.things.words:
        return []
    rows, n = run.rows(BASE), len(run.fit.harmful)
    categories: dict[str, list[int]] = {}
    for i, prompt in enumerate(run.prompts["harmful"]["fit"]):
        categories.setdefault(str(prompt.category), []).append(i)
    large = sorted(categories.values(), key=len, reverse=True)[:5]
    out: list[PlacedOverlap] = []
    if len(large) < 2:
        return out
    for i, site in enumerate(run.sites):
        shifts = [grid[site, -1].vector() for one in bad if (site, -1) in (grid := run.shift(one))]
        values = rows.values[i, -1].double()
        ways = [values[index].mean(0) - values[n:].mean(0) for index in large]
        most = min(len(shifts), len(ways))
        if most < 2:
            continue
        within = torch.cat([side - side.mean(0) for side in (values[:n], values[n:])])
        found = subspaces.overlaps(
            shifts,
            ways,
            a="shifts of organisms",
            b="refusal by category",
            within=within,
            most=most,
            seed=run.seed("overlap"),
        )
        out.extend(PlacedOverlap(site=str(site), place=place_name(-1), row=row) for row in found)
    return out


def checkpoints(run: Run) -> tuple[tuple[Across, ...], tuple[Projected, ...]]:
    """The same directions in organisms and other checkpoints, and what was projected out of those.

    Other checkpoints are loaded one at a time.
    """
    words = [word for word in ("refusal", "harm") if word in run.things.words]
    if not words or not (run.things.organisms or run.settings.checkpoints):
        return (), ()
    read: dict[str, PromptRows] = {BASE: run.rows(BASE)}
    read |= {one.name: run.rows(one.name) for one in run.things.organisms}
    projected: list[Projected] = []
    for name in run.settings.checkpoints:
        with run.stage(f"loading {name}", 1) as advance:
            other = run.load(name)
            advance(1)
        if (other.n_layers, other.d_model) != (run.base.n_layers, run.base.d_model):
            raise ConfigError(
                f"{name} has {other.n_layers} blocks of width {other.d_model}, {run.base.name} "
                f"{run.base.n_layers} of {run.base.d_model}",
                "name a checkpoint that was made from the base",
            )
        with run.stage(f"prompts: {name}", rows_of(run.fit)) as advance:
            read[name] = read_prompts(
                other,
                run.fit,
                sites=run.sites,
                batch_size=run.settings.batch_size,
                progress=advance,
            )
        projected += _projected(run, name, other)
    found: list[Across] = []
    for word, position in (("refusal", -1), ("harm", t_inst(run.base))):
        if word in words:
            of = refusal if word == "refusal" else harm
            models = {
                name: list(at_position(of(one, run.fit, name=word), position).values())
                for name, one in read.items()
            }
            about = {
                "word": word,
                "models": {name: rows.model for name, rows in read.items()},
                "prompts": asdict(run.fit),
                **run.about(),
            }
            found += run.kept.rows(
                "across",
                about,
                Across,
                lambda models=models: list(
                    across(
                        models, base=BASE, draws=run.settings.draws // 2, seed=run.seed("across")
                    )
                ),
            )
    return tuple(found), tuple(projected)


def _projected(run: Run, name: str, other: Model) -> tuple[Projected, ...]:
    middle = run.sites[len(run.sites) // 2]
    direction = refusal(run.rows(BASE), run.fit)[middle, -1].direction()

    def compute() -> list[Projected]:
        with run.stage(f"what was projected out of {name}", len(list(writers(other)))) as advance:
            found = list(
                projected_out(
                    other,
                    base=run.base,
                    directions={f"refusal at {middle}": direction},
                    seed=run.seed("projected"),
                    progress=advance,
                )
            )
        return [replace(row, model=name) for row in found]

    about = {
        "model": other.fingerprint,
        "name": name,
        "site": str(middle),
        "prompts": asdict(run.fit),
    }
    return tuple(run.kept.rows("projected", about, Projected, compute))

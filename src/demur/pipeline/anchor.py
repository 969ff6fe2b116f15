"""Fitting an anchor: the stages behind `demur anchor fit`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from demur.anchor import (
    N_REPLY_PLACES,
    Anchor,
    Floor,
    Gate,
    ReplyRead,
    ReplyReadName,
    Trace,
    null_projected,
    places_of,
)
from demur.causal import stable_seed
from demur.config import AnchorSettings, RunConfig
from demur.directions import Direction
from demur.errors import ConfigError, TooFewPromptsError
from demur.evals.judges import Exchange, Judge, Outcome, judges, verdicts_of
from demur.guard import Fisher, Guard, Rarity, Threshold, calibrate_strata
from demur.interventions import Ablate, applied
from demur.models import Model, TokenBatch
from demur.pipeline.guard import Item, Prompted, material
from demur.pipeline.guard import fit as fit_guard
from demur.progress import Listener, Progress, Quiet
from demur.selection import (
    Passes,
    RefusalTokens,
    kl_divergence,
    learn_refusal_tokens,
    refusal_logodds,
)
from demur.sites import Site, Span
from demur.stats import mcnemar_p

_LEAST = 8  # Replies of a kind that a mean is taken of.
_DOUBT = 0.05  # Of a read that finds more by chance.
_NEVER = Threshold(float("inf"), 0.0, 0, 0, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """Prompts with the replies of a model, and what they are.

    Attributes:
        given: What the model was given.
        ids: Token ids of the replies.
        harmful: Whether the prompt asks for something harmful.
        outcomes: The judge's verdicts.
    """

    given: tuple[Prompted, ...]
    ids: tuple[tuple[int, ...], ...]
    harmful: tuple[bool, ...]
    outcomes: tuple[Outcome, ...]

    def where(self, keep: Callable[[bool, Outcome], bool]) -> list[int]:
        """Rows by class and verdict; those without a reply are left out."""
        rows = zip(self.ids, self.harmful, self.outcomes, strict=True)
        return [i for i, (ids, bad, outcome) in enumerate(rows) if ids and keep(bad, outcome)]

    def some(self, rows: Sequence[int]) -> Told:
        """Some of the rows."""
        return Told(
            tuple(self.given[i] for i in rows),
            tuple(self.ids[i] for i in rows),
            tuple(self.harmful[i] for i in rows),
            tuple(self.outcomes[i] for i in rows),
        )

    def batch(self, model: Model, behind: Sequence[int] = ()) -> TokenBatch:
        """Prompts and replies as rows, with some tokens more behind each."""
        return model.encode(list(self.given), [(*ids, *behind) for ids in self.ids])


def _text(item: Item) -> str:
    return item.given if isinstance(item.given, str) else item.given[-1].text


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """What every stage of a fit needs."""

    model: Model
    config: RunConfig
    judge: Judge
    listener: Listener

    @property
    def settings(self) -> AnchorSettings:
        return self.config.anchor

    def tell(self, items: Sequence[Item], progress: Progress) -> Told:
        """The model's replies under whatever is in force, judged."""
        given = [item.given for item in items]
        replies = self.model.generate(
            given,
            max_new_tokens=self.settings.reply_tokens,
            batch_size=self.config.test.batch_size,
            progress=progress,
        )
        exchanges = [
            Exchange(_text(item), one.text) for item, one in zip(items, replies, strict=True)
        ]
        verdicts = verdicts_of(self.judge, exchanges)
        return Told(
            tuple(given),
            tuple(one.ids for one in replies),
            tuple(item.harmful for item in items),
            tuple(verdict.outcome for verdict in verdicts),
        )

    def seed(self, name: str) -> int:
        return stable_seed(self.config.seed, f"anchor {name}")


def _drawn(items: Sequence[Item], n: int, seed: int, families: Sequence[str]) -> list[Item]:
    """At most `n` of each class and family, in their order."""
    rng = np.random.default_rng(seed)
    found: list[int] = []
    for family in families:
        for harmful in (True, False):
            own = [
                i
                for i, item in enumerate(items)
                if item.family == family and item.harmful is harmful
            ]
            found += rng.permutation(own)[:n].tolist()
    return [items[i] for i in sorted(found)]


# Where refusing and complying replies stand ----------------------------------------------------


def place_means(
    model: Model, told: Told, sites: Sequence[Site], progress: Progress | None = None
) -> Float[Tensor, "site row place d_model"]:
    """Mean activations of each reply at each place behind the instruction; NaN where it has none.

    The places are the template's post-instruction tokens, then those of `reply_place`.
    """
    assert model.template is not None
    whole, n_post = told.batch(model), model.template.n_post
    places = n_post + N_REPLY_PLACES
    out = torch.full((len(sites), len(whole), places, model.d_model), torch.nan)

    def keep(site: int) -> Callable[[Tensor], Tensor]:
        def of(x: Tensor) -> Tensor:
            chunk = model.chunk
            if chunk is None or chunk.is_prefix or chunk.rows is None:
                return x
            post, reply = chunk.spans[Span.POST_INSTRUCTION], chunk.spans[Span.RESPONSE]
            place = places_of(post, reply)
            place = place.masked_fill(~(post | reply), -1)
            one_hot = (place.unsqueeze(1) == torch.arange(places).reshape(1, -1, 1)).float()
            count = one_hot.sum(2, keepdim=True)
            means = (one_hot @ x.float().cpu()) / count
            out[site, chunk.rows] = means
            return x

        return of

    undo = [model.intercept(site, keep(i)) for i, site in enumerate(sites)]
    try:
        for index in whole.passes(tokens=model.tokens_per_pass):
            model.read(whole.rows(index))
            if progress is not None:
                progress(len(index))
    finally:
        for one in undo:
            one()
    return out


def _mean(rows: Tensor) -> Tensor:
    """Over rows, NaN left out."""
    return rows.double().nanmean(0)


def _cells(told: Told) -> dict[tuple[bool, bool], list[int]]:
    """Rows by (harmful, refused); degenerate, partial and unread replies are left out."""
    return {
        (harmful, refused): told.where(
            lambda bad, outcome, h=harmful, r=refused: (
                bad is h and outcome is (Outcome.REFUSED if r else Outcome.COMPLIED)
            )
        )
        for harmful in (True, False)
        for refused in (True, False)
    }


def refusing_and_complying(told: Told) -> tuple[list[list[int]], list[list[int]]]:
    """Rows whose means are averaged, refusing and complying, by harm where there are both.

    Raises:
        TooFewPromptsError: The model refuses, or complies, too seldom.
    """
    cells = _cells(told)
    both = [
        harmful
        for harmful in (True, False)
        if all(len(cells[harmful, refused]) >= _LEAST for refused in (True, False))
    ]
    if both:
        return [cells[h, True] for h in both], [cells[h, False] for h in both]
    refused = [*cells[True, True], *cells[False, True]]
    complied = [*cells[True, False], *cells[False, False]]
    if min(len(refused), len(complied)) < _LEAST:
        raise TooFewPromptsError(
            f"the model refused {len(refused)} and answered {len(complied)} of {len(told.ids)} "
            f"prompts, where {_LEAST} of each are needed to know where refusal stands",
            "take a model that refuses, or more prompts: `--set anchor.replies=400`",
        )
    return [refused], [complied]


def floors_at(
    means: Float[Tensor, "site row place d_model"],
    told: Told,
    sites: Sequence[Site],
    *,
    spared: int = 0,
) -> tuple[Floor, ...]:
    """A floor for each site, from mean activations by place.

    The axis is the difference of means of refusing and complying replies at the prompt's last
    token, within each class of prompts where both are there, so that it is not harm.
    """
    refusing, complying = refusing_and_complying(told)
    last = means.shape[2] - N_REPLY_PLACES - 1
    benign = [i for i, harmful in enumerate(told.harmful) if not harmful]
    found = []
    for i, site in enumerate(sites):
        own = means[i]
        apart = torch.stack(
            [
                _mean(own[yes, last]) - _mean(own[no, last])
                for yes, no in zip(refusing, complying, strict=True)
            ]
        ).mean(0)
        axis = torch.nn.functional.normalize(apart, dim=0)
        push = axis if not spared else null_projected(axis, own[benign, last], spared)
        yes = torch.stack([_mean(own[rows]) for rows in refusing]).mean(0) @ axis
        no = torch.stack([_mean(own[rows]) for rows in complying]).mean(0) @ axis
        low = (own[[row for rows in complying for row in rows]].double() @ axis).nan_to_num(
            nan=torch.inf
        )
        # A place that no reply came to has the values of the place before.
        for values in (yes, no):
            for place in range(1, len(values)):
                if torch.isnan(values[place]):
                    values[place] = values[place - 1]
        found.append(Floor(site, axis, push, no, yes, low.min(0).values.minimum(no)))
    return tuple(found)


def band_sites(model: Model, settings: AnchorSettings) -> tuple[Site, ...]:
    """The layers that may be held.

    Raises:
        ConfigError: `depth` leaves fewer than `band`.
    """
    low, high = settings.depth
    found = tuple(
        site
        for site in model.stream_sites
        if site.kind == "resid_pre" and site.layer and low <= site.layer / model.n_layers <= high
    )
    if len(found) < min(settings.band, model.n_layers // 2):
        raise ConfigError(
            f"anchor.depth is {low} to {high}: {len(found)} layers of the {model.n_layers} of "
            f"{model.name}, where {settings.band} are to be held",
            "give two shares, the lower first: `--set anchor.depth=[0.35, 0.8]`",
        )
    return found


def _bands(floors: Sequence[Floor], width: int) -> list[tuple[Floor, ...]]:
    width = min(width, len(floors))
    return [tuple(floors[i : i + width]) for i in range(len(floors) - width + 1)]


def _choose_band(
    work: _Work,
    floors: Sequence[Floor],
    tokens: RefusalTokens,
    items: Sequence[Item],
) -> tuple[tuple[Floor, ...], list[dict[str, Any]]]:
    """The band that raises refusal most for what it costs when the gate opens wrongly."""
    model = work.model
    harmful, benign = (
        Passes(model, model.encode([one.given for one in items if one.harmful is bad]))
        for bad in (True, False)
    )
    with model.in_two():
        base, plain = refusal_logodds(harmful.logits(), tokens.ids), benign.logits()
    rows: list[dict[str, Any]] = []
    bands = _bands(floors, work.settings.band)
    with work.listener.stage("choosing the band", len(bands)) as advance:
        for band in bands:
            with applied(model, Anchor(None, band)):
                gain = refusal_logodds(harmful.logits(), tokens.ids) - base
                cost = kl_divergence(plain, benign.logits())
            rows.append(
                {
                    "sites": [str(band[0].site), str(band[-1].site)],
                    "logodds": float(gain.mean()),
                    "kl": float(cost.mean()),
                }
            )
            advance(1)
    most = max(row["logodds"] for row in rows)
    # A band that hardly does anything costs hardly anything: its ratio says nothing.
    able = [i for i, row in enumerate(rows) if row["logodds"] >= 0.5 * most]
    best = max(able, key=lambda i: rows[i]["logodds"] / (rows[i]["kl"] + 0.1))
    return bands[best], rows


def _choose_strength(
    work: _Work, band: tuple[Floor, ...], items: Sequence[Item], direction: Direction
) -> tuple[float, list[dict[str, Any]]]:
    """The lowest strength that brings back about as many refusals as the best of them.

    Refusal is ablated meanwhile: what a model refuses anyway tells nothing of what a floor does.
    """
    rows: list[dict[str, Any]] = []
    tried = (0.0, *sorted(work.settings.strengths))
    with work.listener.stage("choosing the strength", len(tried) * len(items)) as advance:
        for strength in tried:
            acts = [Anchor(None, band, strength)] if strength else []
            with applied(work.model, Ablate(direction), *acts):
                told = work.tell(items, advance)
            shares = {
                str(outcome): float(np.mean([one is outcome for one in told.outcomes]))
                for outcome in (Outcome.REFUSED, Outcome.DEGENERATE)
            }
            rows.append({"strength": strength, **shares})
    base, *rest = rows
    most = base["degenerate"] + work.settings.most_degenerate
    able = [row for row in rest if row["degenerate"] <= most] or rest[:1]
    best = max(row["refused"] for row in able)
    return next(row["strength"] for row in able if row["refused"] >= best - 0.05), rows


# Reads of the reply ------------------------------------------------------------------------------


def _reply_vectors(
    model: Model, told: Told, site: Site, window: int, *, header: bool, progress: Progress | None
) -> Float[Tensor, "row d_model"]:
    """What the reply reads are fitted on: means over the last tokens of replies, or headers."""
    assert model.template is not None
    post = model.template.post_ids
    whole = told.batch(model, post if header else ())
    out = torch.empty(len(whole), model.d_model)

    def keep(x: Tensor) -> Tensor:
        chunk = model.chunk
        if chunk is not None and not chunk.is_prefix and chunk.rows is not None:
            rows = torch.arange(len(x))
            wide = x.float().cpu()
            if header:
                out[chunk.rows] = wide[rows, chunk.ends - 1]
            else:
                reply = chunk.spans[Span.RESPONSE]
                left = reply.sum(1, keepdim=True) - reply.long().cumsum(1)
                last = (reply & (left < window)).float()
                out[chunk.rows] = torch.einsum(
                    "rtd,rt->rd", wide, last / last.sum(1, keepdim=True).clamp(min=1)
                )
        return x

    undo = model.intercept(site, keep)
    try:
        for index in whole.passes(tokens=model.tokens_per_pass):
            model.read(whole.rows(index))
            if progress is not None:
                progress(len(index))
    finally:
        undo()
    return out


def _lives(work: _Work, gate: Gate, items: Sequence[Item], progress: Progress) -> list[Trace]:
    """What a gate that never opens sees of requests and of the unedited model's replies."""
    with Anchor(replace(gate, threshold=_NEVER), ()).holding(work.model) as held:
        work.model.generate(
            [item.given for item in items],
            max_new_tokens=work.settings.reply_tokens,
            batch_size=work.config.test.batch_size,
            progress=progress,
        )
    return held.traces


@dataclass(frozen=True, slots=True, eq=False)
class _Chosen:
    """Requests to choose by, with what the gate sees of their lives.

    Attributes:
        prompt: Score of the request alone.
        reads: Highest score of each read of the reply, standard deviations.
        family: Of the request.
        harmful: Whether the request asks for something harmful and the reply gives it.
    """

    prompt: Float[np.ndarray, " row"]
    reads: Mapping[ReplyReadName, Float[np.ndarray, " row"]]
    family: tuple[str, ...]
    harmful: Bool[np.ndarray, " row"]


def _with_reads(
    prompt: Float[np.ndarray, " row"],
    reads: Mapping[ReplyReadName, Float[np.ndarray, " row"]],
    rarities: Mapping[ReplyReadName, Rarity],
    uses: Collection[ReplyReadName],
) -> Float[np.ndarray, " row"]:
    """The highest score of the request and of those reads of the reply that are used."""
    scores = prompt
    for name in uses:
        values = reads[name]
        own = np.where(
            np.isfinite(values), rarities[name](np.nan_to_num(values, neginf=0.0)), -np.inf
        )
        scores = np.maximum(scores, own)
    return scores


def _admit(
    have: _Chosen, alpha: float
) -> tuple[dict[ReplyReadName, Rarity], set[ReplyReadName], list[dict[str, Any]]]:
    """Reads of the reply that find more at the threshold of the hardest stratum, one by one.

    With a further read the threshold rises for those that are there. So it is taken only where it
    finds more beyond doubt.
    """
    benign = ~have.harmful
    rarities: dict[ReplyReadName, Rarity] = {}
    for name, values in have.reads.items():
        rarities[name] = Rarity.fit(values[benign & np.isfinite(values)])

    def found(uses: set[ReplyReadName]) -> Bool[np.ndarray, " harmful"]:
        scores = _with_reads(have.prompt, have.reads, rarities, uses)
        families = sorted({f for f, b in zip(have.family, benign, strict=True) if b})
        strata = {
            name: scores[benign & np.array([f == name for f in have.family])] for name in families
        }
        level = max(alpha, 1 / (min(map(len, strata.values())) + 1))
        limit, _ = calibrate_strata(strata, level)
        return scores[have.harmful] > limit.value

    uses: set[ReplyReadName] = set()
    base = found(uses)
    table: list[dict[str, Any]] = [{"reads": [], "found": float(base.mean())}]
    for name in have.reads:
        more = found({*uses, name})
        p = mcnemar_p(base, more)
        table.append({"reads": sorted({*uses, name}), "found": float(more.mean()), "p": p})
        if more.sum() > base.sum() and p < _DOUBT:
            uses.add(name)
            base = more
    return rarities, uses, table


# All of it ------------------------------------------------------------------------------------


def fit(
    config: RunConfig,
    *,
    listener: Listener | None = None,
    model: Model | None = None,
    guard: Guard | None = None,
) -> Anchor:
    """Fit an anchor: its gate, its floors, its strength, and the threshold that it promises by.

    Fit, choice and calibration have disjoint prompts, those of the guard. Replies to harmful
    prompts stay in memory.

    Args:
        config: `config.model`, `config.guard`, `config.anchor` and `config.seed` count.
        listener: Hears the progress.
        model: A loaded model, in place of loading `config.model`.
        guard: One that was fitted on this very model with these settings; None fits one.

    Raises:
        TooFewPromptsError: A class is too small, or the model refuses or complies too seldom.
        DemurError: Whatever else a user can act on.
    """
    from demur.pipeline.stages import load_model

    listener, settings = listener or Quiet(), config.anchor
    judge = judges.make(settings.judge, **settings.judge_options)
    if model is None:
        with listener.stage("loading the model", 1) as advance:
            model = load_model(config)
            advance(1)
    work = _Work(model, config, judge, listener)
    band_sites(model, settings)  # Before minutes are spent on the guard.
    if guard is None:
        guard = fit_guard(config, listener=listener, model=model)
    else:
        guard.belongs_to(model)
    have = material(config.guard, config.seed)
    if guard.about.get("payloads") not in (None, have.payloads.fingerprint):
        raise ConfigError(
            "the guard was fitted on other prompts or with another seed than these settings name",
            "fit the anchor without `--guard`, or with the settings of the guard",
        )
    if guard.threshold.alpha != config.guard.alpha:
        raise ConfigError(
            f"the guard promises {guard.threshold.alpha:g} false alarms, {config.guard.alpha:g} "
            "were asked for",
            f"say `--alpha {guard.threshold.alpha:g}`, or fit the anchor without `--guard`",
        )
    about: dict[str, Any] = {
        key: value for key, value in guard.about.items() if key not in ("choice", "fitted_on")
    }
    floors, tokens = _fit_floors(work, have.fit, about)
    picked = _drawn(have.choose, settings.replies // 2, work.seed("choose"), ("plain", "wrapped"))
    few = _drawn(picked, 32, work.seed("band"), ("plain",))
    band, about["bands"] = _choose_band(work, floors, tokens, few)
    drawn = _drawn(picked, 32, work.seed("strength"), ("plain", "wrapped"))
    asked = [item for item in drawn if item.harmful]
    middle = floors[len(floors) // 2]
    refusal = Direction.from_vector(
        middle.axis.float(), site=middle.site, position=-1, recipe="refusing minus complying"
    )
    strength, about["strengths"] = _choose_strength(work, band, asked, refusal)
    gate = Gate(guard, guard.threshold, (), guard.strata, every=settings.every)
    reads, found = _reply_reads(work, gate, have.fit, picked, refusal)
    gate, about = replace(gate, replies=reads), about | found
    if any(read.admitted for read in gate.replies):
        scores = {}
        total = sum(map(len, have.strata.values()))
        with listener.stage("calibrating on whole replies", total) as advance:
            for name, items in have.strata.items():
                seen = _lives(work, gate, items, advance)
                scores[name] = np.array([trace.score for trace in seen], dtype=np.float64)
        threshold, strata = calibrate_strata(scores, config.guard.alpha)
        gate = replace(gate, threshold=threshold, strata=strata)
    about["anchor"] = settings.model_dump(mode="json")
    return Anchor(gate, band, strength, settings.action, about=about)


def _fit_floors(
    work: _Work, items: Sequence[Item], about: dict[str, Any]
) -> tuple[tuple[Floor, ...], RefusalTokens]:
    """A floor at every layer that may be held, and what the model's refusals begin with."""
    from demur.models import Completion

    model, settings = work.model, work.settings
    plain = _drawn(items, settings.replies, work.seed("fit"), ("plain",))
    with work.listener.stage("replies to fit on", len(plain)) as advance:
        said = work.tell(plain, advance)
    about["replies"] = {
        f"{'harmful' if bad else 'benign'}, {'refused' if refused else 'complied'}": len(rows)
        for (bad, refused), rows in _cells(said).items()
    }
    about["balanced_by_harm"] = len(refusing_and_complying(said)[0]) == 2
    answered = said.some(said.where(lambda *_: True))
    sites = band_sites(model, settings)
    with work.listener.stage("reading replies", len(answered.ids)) as advance:
        means = place_means(model, answered, sites, advance)
    replies = [Completion("", ids, finished=True) for ids in said.ids]
    tokens = learn_refusal_tokens(model, replies, said.outcomes)
    return floors_at(means, answered, sites, spared=settings.spared), tokens


def _reply_reads(
    work: _Work,
    gate: Gate,
    fit_items: Sequence[Item],
    choose_items: Sequence[Item],
    refusal: Direction,
) -> tuple[tuple[ReplyRead, ...], dict[str, Any]]:
    """Reads of the reply; those are admitted that find more than the request alone tells.

    What complying with a harmful request looks like is learned from replies of the model with its
    refusal ablated, read by the model as it is.
    """
    settings = work.settings
    sides = {
        "fit": _drawn(fit_items, settings.replies, work.seed("replies"), ("plain", "wrapped")),
        "choose": list(choose_items),
    }
    parts = {
        part: _complying(work, items, refusal, f"replies that comply, to {part}")
        for part, items in sides.items()
    }
    counts = {part: sum(told.harmful) for part, told in parts.items()}
    about: dict[str, Any] = {"complying_replies": counts}
    if min(counts.values()) < 2 * _LEAST:
        return (), about | {"reply_reads": "too few replies comply even with refusal ablated"}
    told = parts["fit"]
    flags = torch.tensor(told.harmful)
    names: tuple[ReplyReadName, ...] = ("reply", "header") if settings.header else ("reply",)
    blank = Rarity(torch.zeros(91, dtype=torch.float64), 1.0)
    fitted: list[ReplyRead] = []
    total = len(names) * len(told.ids)
    with work.listener.stage("fitting reads of the reply", total) as advance:
        for name in names:
            rows = _reply_vectors(
                work.model,
                told,
                gate.detector.site,
                gate.window,
                header=name == "header",
                progress=advance,
            )
            fisher = Fisher.fit(rows[flags], rows[~flags], ridge=work.config.guard.ridge)
            fitted.append(ReplyRead(name, fisher, blank, admitted=False))
    have = _chosen(work, replace(gate, replies=tuple(fitted)), parts["choose"], choose_items)
    rarities, uses, about["reply_reads"] = _admit(have, work.config.guard.alpha)
    reads = (replace(r, rarity=rarities[r.name], admitted=r.name in uses) for r in fitted)
    return tuple(reads), about


def _complying(work: _Work, items: Sequence[Item], direction: Direction, stage: str) -> Told:
    """Harmful requests that the model complies with once refusal is ablated, and benign ones."""
    bad = [item for item in items if item.harmful]
    good = [item for item in items if not item.harmful]
    with work.listener.stage(stage, len(items)) as advance:
        with applied(work.model, Ablate(direction)):
            first = work.tell(bad, advance)
        second = work.tell(good, advance)
    first = first.some(first.where(lambda _, outcome: outcome is Outcome.COMPLIED))
    second = second.some(second.where(lambda *_: True))
    return Told(
        first.given + second.given,
        first.ids + second.ids,
        first.harmful + second.harmful,
        first.outcomes + second.outcomes,
    )


def _chosen(work: _Work, draft: Gate, told: Told, items: Sequence[Item]) -> _Chosen:
    model = work.model
    families = {id(item.given): item.family for item in items}
    prompt = np.zeros(len(told.ids))
    reads: dict[ReplyReadName, np.ndarray] = {
        read.name: np.full(len(told.ids), -np.inf) for read in draft.replies
    }
    whole = told.batch(model)
    with (
        work.listener.stage("scoring replies to choose by", len(whole)) as advance,
        Anchor(replace(draft, threshold=_NEVER), ()).holding(model) as held,
    ):
        for number, trace in enumerate(held.prefilled(whole, advance)):
            assert trace.score is not None
            prompt[number] = trace.score
            reads["reply"][number] = trace.reads.get("reply", -np.inf)
    for read in draft.replies:
        if read.name == "header":
            with work.listener.stage("reading fresh turns", len(whole)) as advance:
                rows = _reply_vectors(
                    model, told, draft.detector.site, draft.window, header=True, progress=advance
                )
            reads["header"] = read.fisher(rows).numpy()
    return _Chosen(
        prompt, reads, tuple(families[id(one)] for one in told.given), np.array(told.harmful)
    )

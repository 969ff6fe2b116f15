"""What a direction does: taken out, put in or removed from the adapter, against random ones.

An edit is an `Arm`. It runs on the organism, and in the same way on its good twin and on the base:
taking out the difference of bad and good text moves the margin of any model, so only what it does
to the organism beyond the others is an effect on what was trained. Beside each arm stand random
directions with the covariance of answers, at the same place and in the same way, and what the edit
costs on neutral text.

Every margin pass runs all items once through one model; `margin_passes` counts them beforehand.
50 items of 40 tokens take about 10 CPU-seconds on a model of half a billion parameters.

References:
    Soligo, Turner, Rajamanoharan, Nanda 2025, arXiv:2506.11618, sections 3.2 to 3.4.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from demur.causal import null_directions
from demur.directions import Direction
from demur.em.advice import AdviceItem
from demur.em.directions import AnswerPair
from demur.em.margin import answer_logps, by_group, grouped_mean, margin_shift
from demur.em.organism import Factor, Organism
from demur.errors import (
    ConfigError,
    DegenerateVectorError,
    FamilyError,
    NonFiniteError,
    TemplateError,
    TooFewPromptsError,
)
from demur.interventions import Ablate, Add, Intervention, ProjectToMean, applied
from demur.models import Family, Model, TokenBatch
from demur.models.model import Memory
from demur.progress import Progress
from demur.sites import Site, Span
from demur.stats import Estimate, mean, null_p, paired_change

Subject: TypeAlias = Model | Organism
Who = Literal["base", "organism", "twin"]
NullOf = Literal["base", "organism", "twin", "against base", "against twin"]
How = Literal["own", "each", "outputs", "writes"]
NullFamily = Literal["covariance-matched", "isotropic"]
Values = Float[np.ndarray, " item"]
Directions: TypeAlias = Direction | Mapping[Site, Direction]

_DRAWS = 2000
_MOST_REMEMBERED = 2**30  # Bytes of unedited stream that are kept for edits of later blocks.
_GRADIENT_ROWS = 4
_TINY = 1e-12


# Edits -------------------------------------------------------------------------------------------


def ablation(
    model: Model, directions: Directions, how: How, *, first: int = 0
) -> tuple[Intervention, ...]:
    """The edits that take a direction out.

    Args:
        model: Any model of the family; only its number of blocks is asked.
        directions: One, or one for each site.
        how: "own": the one, at its own site. "each": each of several at its own site. "outputs":
            the one, at the output of every block, as in the paper. "writes": the one, from
            everything that is written to the stream, the embedding too; so no block reads it.
        first: For "each" and "outputs", the first block whose output is edited. What lies before
            an adapter cannot hold what was trained, only cost.

    Raises:
        ConfigError: Several directions are given where one is wanted, or no block is left.
    """
    if how == "each":
        several = {directions.site: directions} if isinstance(directions, Direction) else directions
        acts = tuple(
            ProjectToMean(one, 0.0, site) for site, one in several.items() if site.layer >= first
        )
    else:
        one = _single(directions, how)
        if how == "writes":
            return (Ablate(one),)
        places = [one.site]
        if how == "outputs":
            places = [Site(layer, "resid_post") for layer in range(first, model.n_layers)]
        acts = tuple(ProjectToMean(one, 0.0, site) for site in places)
    if not acts:
        raise ConfigError(f"nothing is edited from block {first} on", "begin at an earlier block")
    return acts


def _single(directions: Directions, how: str) -> Direction:
    if isinstance(directions, Direction):
        return directions
    if len(directions) != 1:
        raise ConfigError(
            f"`{how}` takes out one direction, {len(directions)} are given",
            "choose a site, or take `each`",
        )
    return next(iter(directions.values()))


def without(
    organism: Organism, directions: Directions, *, family: Family, renormalise: bool = False
) -> Organism:
    """The organism with a direction removed from what its adapter writes: `b - u u^T b`.

    What reaches the direction by way of later blocks stays; this asks whether the adapter writes
    it itself. Only factors that write to the stream are changed: down and output projections and
    steering vectors.

    Args:
        organism: With factors.
        directions: One for all factors, or one for each site; a factor then takes that of its own
            block's output.
        family: Of the base; tells which modules write to the stream.
        renormalise: Bring each factor's product `b a` back to its former Frobenius norm, as the
            paper's code does: then it is no projection, and what is left grows.

    Raises:
        FamilyError: No factor writes to the stream with no norm in between.
        DegenerateVectorError: Nothing is left to be renormalised.
    """
    linear = {write.path.removesuffix(".weight") for write in family.weights}

    def cut(factor: Factor) -> Factor:
        if isinstance(directions, Direction):
            direction = directions
        else:
            direction = directions.get(Site(factor.layer, "resid_post"))
        if direction is None or not (factor.a is None or factor.module in linear):
            return factor
        b = factor.b.double()
        unit = torch.nn.functional.normalize(direction.unit.to(b), dim=0)
        left = b - torch.outer(unit, unit @ b)
        if renormalise:
            read = torch.eye(b.shape[1], dtype=b.dtype) if factor.a is None else factor.a.double()
            before, after = float((b @ read).norm()), float((left @ read).norm())
            if after <= 1e-6 * before:
                raise DegenerateVectorError(
                    f"block {factor.layer} of {organism.name} writes along the direction alone",
                    "leave `renormalise` out: nothing else is there to be scaled up",
                )
            left *= before / after
        return replace(factor, b=left.to(factor.b.dtype))

    factors = tuple(cut(factor) for factor in organism.factors)
    if all(new is old for new, old in zip(factors, organism.factors, strict=True)):
        raise FamilyError(
            f"no factor of {organism.name} writes to the stream where a direction was given",
            "take an organism on down_proj or o_proj, of a family without norms behind them",
        )
    return replace(organism, name=f"{organism.name} (cut)", factors=factors)


def random_directions(
    directions: Directions, pair: AnswerPair, *, each: int, seed: int
) -> dict[NullFamily, list[Directions]]:
    """Random directions of the same length at the same sites, as `causal.null_directions` draws.

    Args:
        directions: One, or one for each site. Those of several sites hang together: the k-th
            covariance-matched one weighs the same answers alike at each.
        pair: The base's mean activations on answers: the covariance is that within bad and within
            good ones.
        each: How many of each kind.
        seed: Draws them.
    """
    several = {directions.site: directions} if isinstance(directions, Direction) else directions
    families: tuple[NullFamily, ...] = ("covariance-matched", "isotropic")
    found = {
        site: null_directions(
            one, harmful=pair.bad.at(site), harmless=pair.good.at(site), each=each, seed=seed
        )
        for site, one in several.items()
    }
    out: dict[NullFamily, list[Directions]] = {}
    for family in families:
        sets = [{site: own[family][k] for site, own in found.items()} for k in range(each)]
        out[family] = [
            one[directions.site] if isinstance(directions, Direction) else one for one in sets
        ]
    return out


@dataclass(frozen=True, slots=True, eq=False)
class Arm:
    """One edit, and what the claim predicts of it.

    Attributes:
        name: As it reads in a table.
        edit: What is done, however the direction came about; random directions are compared with
            arms of the same edit.
        family: The direction itself, or a kind of random direction.
        expects: What the margin of the organism should do.
        acts: Edits of activations.
        where: Only at tokens of this span; None is all, the template's too. With `Span.RESPONSE`
            the answer's first token is foretold from a prompt that is not edited; neutral text
            counts as an answer.
        change: An edit of the adapter; where there is none, in the base, nothing is done.
        strength: Of steering, in multiples of the direction's own length.
        reached: Whether that strength costs what was wanted; None where nothing was.
    """

    name: str
    edit: str
    family: Literal["direction", "covariance-matched", "isotropic"] = "direction"
    expects: Literal["falls", "rises"] = "falls"
    acts: tuple[Intervention, ...] = ()
    where: Span | None = None
    change: Callable[[Organism], Organism] | None = None
    strength: float | None = None
    reached: bool | None = None


def ablation_arms(
    model: Model,
    directions: Mapping[Site, Direction],
    at: Site,
    *,
    hows: Sequence[How] = ("own", "each", "outputs"),
    first: int = 0,
    pair: AnswerPair | None = None,
    n_null: int = 20,
    n_isotropic: int = 0,
    null_hows: Collection[How] = ("outputs",),
    label: str = "",
    seed: int = 0,
) -> tuple[Arm, ...]:
    """Arms that take a direction out in several ways, with random ones for some of them.

    An ablation has one size: it cannot be brought to a cost, which is reported beside it.

    Args:
        model: Any model of the family.
        directions: By site, such as `Delta.directions()`.
        at: Site of the one that is taken out by "own", "outputs" and "writes".
        hows: See `ablation`.
        first: See `ablation`.
        pair: The base on answers, for the covariance of random directions.
        n_null: How many covariance-matched ones; fewer than 20 cannot show p = 0.05.
        n_isotropic: How many isotropic ones.
        null_hows: For which of `hows` random ones are drawn.
        label: In front of the names of the real ones. Another direction's arms at the same site,
            with a label and no random ones, are compared with those that are there.
        seed: Draws them.

    Raises:
        ConfigError: There is no direction at `at`, or random ones are wanted without `pair`.
    """
    if at not in directions:
        raise ConfigError(
            f"there is no direction at {at}", f"there are: {', '.join(map(str, directions))}"
        )
    arms: list[Arm] = []
    for how in hows:
        given: Directions = directions if how == "each" else directions[at]
        what = {
            "own": f"at {at}",
            "each": "each block's own",
            "outputs": f"that of {at} at all outputs",
            "writes": f"that of {at} at every write",
        }[how]
        edit = f"ablate: {what}"
        name = f"{label}, {edit}" if label else edit
        arms.append(Arm(name, edit, acts=ablation(model, given, how, first=first)))
        wanted: dict[NullFamily, int] = {"covariance-matched": n_null, "isotropic": n_isotropic}
        if how not in null_hows or not any(wanted.values()):
            continue
        if pair is None:
            raise ConfigError(
                "random directions are wanted, without the covariance to draw them with",
                "give `pair`, what `read_pair` found on the base",
            )
        found = random_directions(given, pair, each=max(wanted.values()), seed=seed)
        for family, n in wanted.items():
            for k, one in enumerate(found[family][:n], start=1):
                acts = ablation(model, one, how, first=first)
                arms.append(Arm(f"{edit}, {family} #{k}", edit, family, acts=acts))
    return tuple(arms)


def adapter_arms(
    directions: Directions, *, family: Family, acts: tuple[Intervention, ...] = ()
) -> tuple[Arm, ...]:
    """Arms that remove a direction from what the adapter writes, with and without renormalising.

    Args:
        directions: See `without`.
        family: See `without`.
        acts: If given, a third arm also has these edits of activations, such as an `ablation`.
    """

    def cut(organism: Organism) -> Organism:
        return without(organism, directions, family=family)

    def scaled(organism: Organism) -> Organism:
        return without(organism, directions, family=family, renormalise=True)

    arms = [
        Arm("cut from B", "cut from B", change=cut),
        Arm("cut from B, renormalised", "cut from B, renormalised", change=scaled),
    ]
    if acts:
        name = "cut from B and ablated"
        arms.append(Arm(name, name, acts=acts, change=cut))
    return tuple(arms)


# Strengths of equal cost -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dose:
    """A strength that was brought to a cost.

    Attributes:
        strength: In multiples of the direction's own length.
        kl: Mean KL per token of neutral text at that strength, nats.
        passes: Neutral passes it took.
        reached: Whether the cost is the wanted one, within the tolerance.
    """

    strength: float
    kl: float
    passes: int
    reached: bool


def match_kl(
    kl_of: Callable[[float], float],
    target: float,
    *,
    start: float = 1.0,
    tolerance: float = 0.05,
    most: int = 12,
) -> Dose:
    """Find the positive strength at which an edit costs a given KL.

    Small edits cost the square of their strength, which foretells the next one to try; once the
    wanted one is between two, it stays there, if need be by bisection.

    Args:
        kl_of: From strength to KL, nats; NaN and infinity count as too much.
        target: KL to reach, nats.
        start: First strength tried.
        tolerance: Relative, of the KL.
        most: Strengths tried.

    Returns:
        The strength that came nearest, whether it came near enough or not.

    Raises:
        ConfigError: Target or start is not above 0, or nothing may be tried.
    """
    if not (target > 0 and start > 0 and most >= 1):
        raise ConfigError(
            f"cannot reach a KL of {target} from a strength of {start} in {most} passes",
            "give numbers above 0",
        )
    low, high, strength = 0.0, float("inf"), start
    best, gap = Dose(start, float("nan"), 0, reached=False), float("inf")
    for tried in range(1, most + 1):
        kl = kl_of(strength)
        finite = bool(np.isfinite(kl))
        own = abs(float(np.log(max(kl, _TINY) / target))) if finite else float("inf")
        if own < gap or best.passes == 0:
            best, gap = Dose(strength, kl, tried, reached=False), own
        if finite and abs(kl / target - 1) <= tolerance:
            return Dose(strength, kl, tried, reached=True)
        if finite and kl < target:
            low = strength
        else:
            high = strength
        factor = (target / max(kl, _TINY)) ** 0.5 if finite else 0.25
        strength *= min(max(factor, 0.125), 8.0)
        if not low < strength < high:
            strength = (low * high) ** 0.5 if low > 0 else high / 4
            strength = 2 * low if not np.isfinite(strength) else strength
    return replace(best, passes=most)


# Measuring ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Cost:
    """What an edit does to neutral text, by paragraph.

    Attributes:
        kl: Mean over tokens of KL(unedited || edited) over the vocabulary, nats.
        losses: Mean nats per token under the edit.
        plain: The same of the unedited model.
    """

    kl: Float[np.ndarray, " paragraph"]
    losses: Float[np.ndarray, " paragraph"]
    plain: Float[np.ndarray, " paragraph"]

    def mean_kl(self) -> float:
        """Mean over paragraphs."""
        return float(self.kl.mean())

    def perplexity_ratio(self) -> Estimate:
        """Perplexity under the edit over that without it, paired by paragraph."""
        change = paired_change(self.plain, self.losses)
        value, low, high = (float(np.exp(x)) for x in (change.value, change.low, change.high))
        return Estimate(value, low, high, change.n, f"exp of {change.method}")


class Bench:
    """One model on items and neutral text, to be run again and again under edits.

    What the unedited model does is kept, where it takes little memory, so that an edit that begins
    at a later block costs only the blocks from there on.

    Args:
        model: Base, organism or twin, unedited.
        items: Matched answers to a question each.
        neutral: Paragraphs; none: no cost can be asked for.
        batch_size: Most rows of a pass; None is as many as the device is best given.
        remember: Keep the unedited stream, up to 1 GB.
    """

    def __init__(
        self,
        model: Model,
        items: Sequence[AdviceItem],
        *,
        neutral: Sequence[str] = (),
        batch_size: int | None = None,
        remember: bool = True,
    ) -> None:
        if not items:
            raise TooFewPromptsError("there are no items to score", "give at least one")
        blank = next((one.id for one in items if not (one.bad.strip() and one.good.strip())), None)
        if blank is not None:
            raise TemplateError(f"item {blank} lacks an answer", "leave the item out")
        self.model = model
        self.groups = [(item.domain, item.group) for item in items]
        self.domains = [item.domain for item in items]
        self.margin_runs = self.neutral_runs = 0
        asked = [item.question for item in items]
        answers = [*(item.bad for item in items), *(item.good for item in items)]
        self._left = _MOST_REMEMBERED if remember else 0
        self._rows = self._cut(model.encode([*asked, *asked], answers), batch_size)
        self._text = self._cut(_paragraphs(model, neutral), batch_size) if neutral else []
        self._n, self._n_text = len(items), len(neutral)
        self._plain: Values | None = None
        self._plain_text: list[Tensor] | None = None
        self._before: dict[int, Tensor] = {}

    @property
    def has_text(self) -> bool:
        """Whether a cost can be asked for."""
        return bool(self._text)

    def _cut(
        self, whole: TokenBatch, batch_size: int | None
    ) -> list[tuple[list[int], TokenBatch, Memory | None]]:
        model = self.model
        index = whole.passes(tokens=model.tokens_per_pass, rows=batch_size)
        parts = [whole.rows(one) for one in index]
        size = sum(part.ids.numel() for part in parts) * model.n_layers * model.d_model
        size *= model.dtype.itemsize
        keep = size <= self._left
        self._left -= size if keep else 0
        return [
            (one, part, model.remember(part) if keep else None)
            for one, part in zip(index, parts, strict=True)
        ]

    @torch.no_grad()
    def margins(
        self, *acts: Intervention, where: Span | None = None, model: Model | None = None
    ) -> Values:
        """The margin of each item under edits, as `demur.em.margin.margins` has it.

        Args:
            acts: Edits; none is the unedited model, which is run once and kept.
            where: See `Arm`.
            model: What is run in this one's place, with changed weights.

        Raises:
            NonFiniteError: A margin is NaN or infinite.
        """
        plain = not acts and model is None
        if plain and self._plain is not None:
            return self._plain
        runs = self.model if model is None else model
        out = np.empty(2 * self._n)
        with applied(runs, *acts, where=where), runs.prefix_kept():
            for index, part, memory in self._rows:
                states = runs.final_states(part, memory if model is None else None)
                out[index] = answer_logps(runs, states, part.ids, part.spans[Span.RESPONSE])
        self.margin_runs += 1
        found = out[: self._n] - out[self._n :]
        if not np.isfinite(found).all():
            raise NonFiniteError(
                f"{int((~np.isfinite(found)).sum())} of {self._n} margins are NaN or infinite",
                "is the edit too strong? else try `--dtype float32`",
            )
        if plain:
            self._plain = found
        return found

    @torch.no_grad()
    def cost(
        self, *acts: Intervention, where: Span | None = None, model: Model | None = None
    ) -> Cost:
        """What edits cost on neutral text; arguments are those of `margins`.

        Raises:
            ConfigError: The bench was made without neutral text.
        """
        if not self._text:
            raise ConfigError("there is no neutral text to price an edit on", "give `neutral`")
        if self._plain_text is None:
            self._plain_text = self._text_states(self.model, None)
        runs = self.model if model is None else model
        states = self._plain_text
        if acts or model is not None:
            with applied(runs, *acts, where=where, may_be_absent=True):  # It is an answer to none.
                states = self._text_states(runs, model)
        kl, losses, plain = (np.empty(self._n_text) for _ in range(3))
        for index, part, _ in self._text:
            for row, i in enumerate(index):
                n = int(part.ends[row])
                # A paragraph at a time: the logits of all would fill the memory.
                before = self._unedited(i, n)
                after = runs.unembed(states[i][: n - 1]).log_softmax(1)
                target = part.ids[row, 1:n].unsqueeze(1).to(after.device)
                kl[i] = float((before.exp() * (before - after)).sum(1).double().mean())
                losses[i] = -float(after.gather(1, target).double().mean())
                plain[i] = -float(before.gather(1, target).double().mean())
        return Cost(kl, losses, plain)

    def _unedited(self, i: int, n: int) -> Float[Tensor, "token vocab"]:
        """Log probabilities of a paragraph's tokens, kept where there is room."""
        if i in self._before:
            return self._before[i]
        assert self._plain_text is not None
        found = self.model.unembed(self._plain_text[i][: n - 1]).log_softmax(1)
        size = found.numel() * found.element_size()
        if size <= self._left:
            self._left -= size
            self._before[i] = found
        return found

    def _text_states(self, runs: Model, other: Model | None) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for index, part, memory in self._text:
            states = runs.final_states(part, memory if other is None else None)
            found |= {i: states[row] for row, i in enumerate(index)}
        self.neutral_runs += 1
        return [found[i] for i in range(self._n_text)]

    def dose(
        self,
        direction: Direction,
        target: float,
        *,
        sign: int = 1,
        where: Span | None = None,
        most: int = 12,
        tolerance: float = 0.05,
    ) -> Dose:
        """The strength at which adding a direction costs a KL of `target`, see `match_kl`.

        `sign` -1 takes the direction away; the strength found then is negative.
        """
        found = match_kl(
            lambda strength: self.cost(Add(direction, sign * strength), where=where).mean_kl(),
            target,
            most=most,
            tolerance=tolerance,
        )
        return replace(found, strength=sign * found.strength)


def _paragraphs(model: Model, neutral: Sequence[str]) -> TokenBatch:
    if model.template is None:
        raise TemplateError(
            f"{model.name} was made without a tokenizer", "load it with `demur.load`"
        )
    rows = [model.template.tokenizer(text)["input_ids"] for text in neutral]
    if min(map(len, rows)) < 2:
        raise TooFewPromptsError(
            "a neutral paragraph has fewer than two tokens", "give whole paragraphs"
        )
    ids = torch.full((len(rows), max(map(len, rows))), model.pad_id)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    # As an answer, so that an edit of answers alone has a cost as well.
    return TokenBatch(ids, mask, {Span.RESPONSE: mask})


@dataclass(frozen=True, slots=True)
class DosePoint:
    """What adding a direction does at one strength.

    Attributes:
        strength: In multiples of the direction's own length.
        change: Of the margin, nats per token, over groups.
        kl: On neutral text, nats per token, over paragraphs.
        perplexity_ratio: On neutral text.
    """

    strength: float
    change: Estimate
    kl: Estimate
    perplexity_ratio: Estimate


def dose_curve(
    bench: Bench,
    direction: Direction,
    strengths: Sequence[float],
    *,
    where: Span | None = None,
    seed: int,
    draws: int = _DRAWS,
    progress: Progress | None = None,
) -> tuple[DosePoint, ...]:
    """Add a direction at each strength: one margin and one neutral pass each.

    Args:
        bench: The base, as a rule.
        direction: Added at its own site.
        strengths: In multiples of its length; negative ones take it away.
        where: See `Arm`.
        seed: Of the draws of groups.
        draws: How many.
        progress: Called once per strength.

    Raises:
        ConfigError: The bench has no neutral text.
        TooFewPromptsError: It has one paragraph, or items of one group.
    """
    plain = bench.margins()
    out: list[DosePoint] = []
    for strength in strengths:
        act = Add(direction, strength)
        moved, cost = bench.margins(act, where=where), bench.cost(act, where=where)
        change = grouped_mean(margin_shift(moved, plain), bench.groups, seed=seed, draws=draws)
        out.append(DosePoint(strength, change, mean(cost.kl), cost.perplexity_ratio()))
        if progress is not None:
            progress(1)
    return tuple(out)


def steering_arms(
    bench: Bench,
    direction: Direction,
    *,
    kl: float = 0.05,
    where: Span | None = None,
    pair: AnswerPair | None = None,
    n_null: int = 20,
    n_isotropic: int = 0,
    equal_length: bool = True,
    seed: int = 0,
    most: int = 12,
    progress: Progress | None = None,
) -> tuple[Arm, ...]:
    """Arms that add a direction, take it away, and add random ones, each at the same cost.

    Finding the strengths takes at most `most` neutral passes for each direction. With equal
    lengths, an edit of its own, a random direction costs less than the real one, or more.

    Args:
        bench: What the cost is brought to a level on: the base. In other models the same
            strengths are used, and the cost is reported.
        direction: Added at its own site.
        kl: Nats per token of neutral text.
        where: See `Arm`.
        pair: The base on answers, for the covariance of random directions.
        n_null: How many covariance-matched ones.
        n_isotropic: How many isotropic ones.
        equal_length: Also run all at the length that the direction has when added.
        seed: Draws them.
        most: Neutral passes for each arm.
        progress: Called once per arm that was brought to the cost.

    Raises:
        ConfigError: Random ones are wanted without `pair`.
    """
    arms: list[Arm] = []
    doses: dict[int, Dose] = {}
    for sign, name in ((1, "add"), (-1, "take away")):
        doses[sign] = bench.dose(direction, kl, sign=sign, where=where, most=most)
        length = sign * doses[1].strength if equal_length else None
        for edit, strength, reached in _strengths(kl, doses[sign], length):
            arms.append(
                Arm(
                    f"{edit}, {name}",
                    edit,
                    expects="rises" if sign > 0 else "falls",
                    acts=(Add(direction, strength),),
                    where=where,
                    strength=strength,
                    reached=reached,
                )
            )
        if progress is not None:
            progress(1)
    if not n_null and not n_isotropic:
        return tuple(arms)
    if pair is None:
        raise ConfigError(
            "random directions are wanted, without the covariance to draw them with",
            "give `pair`, what `read_pair` found on the base",
        )
    random = random_steering_arms(
        bench,
        direction,
        pair,
        kl=kl,
        where=where,
        n_null=n_null,
        n_isotropic=n_isotropic,
        length=doses[1].strength if equal_length else None,
        seed=seed,
        most=most,
        progress=progress,
    )
    return (*arms, *random)


def random_steering_arms(
    bench: Bench,
    direction: Direction,
    pair: AnswerPair,
    *,
    kl: float = 0.05,
    where: Span | None = None,
    n_null: int = 20,
    n_isotropic: int = 0,
    length: float | None = None,
    seed: int = 0,
    most: int = 12,
    progress: Progress | None = None,
) -> tuple[Arm, ...]:
    """The random ones of `steering_arms` alone.

    At equal cost they do not hang on the direction but for its site: all that are steered along
    there may be held against the same ones, added or taken away.

    Args:
        bench: See `steering_arms`.
        direction: Gives the site, and the length that strengths are multiples of.
        pair: The base on answers, for the covariance.
        kl: Nats per token of neutral text.
        where: See `Arm`.
        n_null: How many covariance-matched ones.
        n_isotropic: How many isotropic ones.
        length: Also run all at this strength.
        seed: Draws them.
        most: Neutral passes for each arm.
        progress: Called once per direction that was brought to the cost.
    """
    arms: list[Arm] = []
    wanted: dict[NullFamily, int] = {"covariance-matched": n_null, "isotropic": n_isotropic}
    found = random_directions(direction, pair, each=max(wanted.values()), seed=seed)
    for family, n in wanted.items():
        for k, one in enumerate(found[family][:n], start=1):
            assert isinstance(one, Direction)
            dose = bench.dose(one, kl, where=where, most=most)
            for edit, strength, reached in _strengths(kl, dose, length):
                arms.append(
                    Arm(
                        f"{edit}, {family} #{k}",
                        edit,
                        family,
                        "rises",
                        (Add(one, strength),),
                        where,
                        strength=strength,
                        reached=reached,
                    )
                )
            if progress is not None:
                progress(1)
    return tuple(arms)


def _strengths(kl: float, dose: Dose, length: float | None) -> list[tuple[str, float, bool | None]]:
    """The edits of a direction: at equal cost, and at a given length."""
    at_cost: tuple[str, float, bool | None] = (f"steer: KL {kl:g}", dose.strength, dose.reached)
    return [at_cost] if length is None else [at_cost, ("steer: equal length", length, None)]


# The table ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class ArmRun:
    """What one model did under one arm; the arm "none" is the unedited model.

    Attributes:
        arm: Its name.
        who: Which model.
        margins: Of each item, nats per token.
        cost: On neutral text; None where it was not asked for.
    """

    arm: str
    who: Who
    margins: Values
    cost: Cost | None


@dataclass(frozen=True, slots=True)
class Effect:
    """What one arm does to one model.

    Attributes:
        arm: Its name.
        edit: See `Arm`.
        who: Which model.
        margin: Mean margin under the arm, nats per token, over groups.
        change: Of it, from the same model without the arm; paired by item, over groups.
        by_domain: Likewise for each domain that has two groups or more.
        kl: On neutral text, nats per token, over paragraphs.
        perplexity_ratio: On neutral text.
        p: By kind of random direction, the share of those under the same edit that move this model
            as far in the direction predicted.
        strength: Of steering, in multiples of the direction's own length.
        reached: Whether that strength costs what was wanted; None where nothing was.
    """

    arm: str
    edit: str
    who: Who
    margin: Estimate
    change: Estimate
    by_domain: Mapping[str, Estimate]
    kl: Estimate | None
    perplexity_ratio: Estimate | None
    p: Mapping[str, float]
    strength: float | None
    reached: bool | None


@dataclass(frozen=True, slots=True)
class Contrast:
    """What one arm does to the organism beyond what it does to another model.

    Attributes:
        arm: Its name.
        edit: See `Arm`.
        against: The good twin, or the base.
        change: Mean of (change in the organism - change in the other), nats per token, over groups.
        by_domain: Likewise for each domain that has two groups or more.
        removed: Share of the trained effect that the arm takes away, 1 all of it, below 0 where it
            adds; None where it is undefined.
        undefined: Why.
        p: As for `Effect`, of this difference.
    """

    arm: str
    edit: str
    against: Literal["base", "twin"]
    change: Estimate
    by_domain: Mapping[str, Estimate]
    removed: Estimate | None
    undefined: str
    p: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class NullSpread:
    """What random directions do under one edit.

    Attributes:
        edit: See `Arm`.
        family: Kind of random direction.
        who: The model, or what the organism's change is taken against.
        changes: Mean change of the margin of each, nats per token.
        kls: Mean KL on neutral text of each; empty where it was not asked for.
        mean: Of the changes.
        low: 2.5% of the changes.
        high: 97.5%.
        unreached: How many of them do not cost what was wanted.
    """

    edit: str
    family: str
    who: NullOf
    changes: tuple[float, ...]
    kls: tuple[float, ...]
    mean: float
    low: float
    high: float
    unreached: int


@dataclass(frozen=True, slots=True)
class EffectTable:
    """Arms on organism, twin and base.

    Attributes:
        organism: Its name.
        twin: Its good twin's name; None without one.
        n: Items.
        trained: The organism's margin less that of the other without any arm, by what it is taken
            against: the effect that training had.
        effects: Each arm on each model.
        contrasts: Each arm on the organism beyond the others.
        nulls: Random directions.
        margin_passes: What it took.
        neutral_passes: Likewise.
        runs: What everything was computed from.
    """

    organism: str
    twin: str | None
    n: int
    trained: Mapping[str, Estimate]
    effects: tuple[Effect, ...]
    contrasts: tuple[Contrast, ...]
    nulls: tuple[NullSpread, ...]
    margin_passes: int
    neutral_passes: int
    runs: tuple[ArmRun, ...]


def put(subject: Subject, base: Model) -> Model:
    """A model as it is, an organism on the base."""
    return subject.on(base) if isinstance(subject, Organism) else subject


def margin_passes(arms: Sequence[Arm], *, twin: bool, null_on: Collection[Who]) -> int:
    """How many margin passes `effects` will take; it takes as many neutral ones.

    What two arms have in common, such as one strength that is compared in two ways, runs once.
    """
    subjects: list[Who] = ["base", "organism", *(["twin"] if twin else [])]
    return sum(
        1 + len({_key(arm) for arm in arms if _runs_on(arm, who, null_on)}) for who in subjects
    )


def _key(arm: Arm) -> Hashable:
    return arm.acts, arm.where, arm.change


def _runs_on(arm: Arm, who: Who, null_on: Collection[Who]) -> bool:
    if arm.family != "direction":
        return who in null_on
    return not (who == "base" and arm.change is not None and not arm.acts)


def effects(
    base: Model,
    organism: Subject,
    items: Sequence[AdviceItem],
    arms: Sequence[Arm],
    *,
    twin: Subject | None = None,
    neutral: Sequence[str] = (),
    null_on: Collection[Who] = ("organism", "twin"),
    seed: int,
    draws: int = _DRAWS,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> EffectTable:
    """Run arms on organism, good twin and base.

    One model is held beside the base at a time.

    Args:
        base: Untrained.
        organism: Trained on bad answers; arms that change the adapter need an `Organism`.
        items: Held out from training, and from whatever the directions and sites were chosen on.
        arms: Real and random ones.
        twin: Trained on the good answers.
        neutral: Paragraphs that tell the cost; none: it is not asked for.
        null_on: Which models random directions run on. Without the twin (or the base) there is no
            p against random ones for the difference from it.
        seed: Of the draws of groups.
        draws: How many.
        batch_size: See `Bench`.
        progress: Called once per margin pass, see `margin_passes`.

    Raises:
        ConfigError: An arm that changes the adapter meets a model, or two arms have one name.
        TooFewPromptsError: The items are of fewer than two groups.
        NonFiniteError: A margin under an arm is NaN or infinite.
    """
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ConfigError("two arms have one name", "name each of them by itself")
    subjects: list[tuple[Who, Subject]] = [("base", base), ("organism", organism)]
    if twin is not None:
        subjects.append(("twin", twin))
    runs: list[ArmRun] = []
    counts = np.zeros(2, dtype=int)
    groups: list[tuple[str, str]] = [(item.domain, item.group) for item in items]
    for who, subject in subjects:
        bench = Bench(put(subject, base), items, neutral=neutral, batch_size=batch_size)
        done: dict[Hashable, tuple[Values, Cost | None]] = {}
        runs.append(ArmRun("none", who, bench.margins(), None))
        if progress is not None:
            progress(1)
        for arm in arms:
            if not _runs_on(arm, who, null_on):
                continue
            key = _key(arm)
            if key not in done:
                done[key] = _ran(arm, bench, subject, base)
                if progress is not None:
                    progress(1)
            runs.append(ArmRun(arm.name, who, *done[key]))
        counts += bench.margin_runs, bench.neutral_runs
        del bench
    n_margin, n_neutral = (int(count) for count in counts)
    return _tabulated(
        runs,
        arms,
        groups,
        names=(organism.name, twin.name if twin is not None else None),
        seed=seed,
        draws=draws,
        passes=(n_margin, n_neutral),
    )


def _ran(arm: Arm, bench: Bench, subject: Subject, base: Model) -> tuple[Values, Cost | None]:
    model = None
    if arm.change is not None and subject is not base:
        if not isinstance(subject, Organism):
            raise ConfigError(
                f"`{arm.name}` changes an adapter, and {subject.name} is given as a whole model",
                "give the organism itself, as `read_organism` reads it",
            )
        model = arm.change(subject).on(base)
    about = {"where": arm.where, "model": model}
    cost = bench.cost(*arm.acts, **about) if bench.has_text else None
    return bench.margins(*arm.acts, **about), cost


def _tabulated(
    runs: Sequence[ArmRun],
    arms: Sequence[Arm],
    groups: Sequence[tuple[str, str]],
    *,
    names: tuple[str, str | None],
    seed: int,
    draws: int,
    passes: tuple[int, int],
) -> EffectTable:
    found = {(run.arm, run.who): run for run in runs}
    plain = {run.who: run.margins for run in runs if run.arm == "none"}
    others: list[Literal["base", "twin"]] = ["base", *(["twin"] if "twin" in plain else [])]
    zero = np.zeros(len(groups))

    def estimate(values: Values) -> Estimate:
        return grouped_mean(values, groups, seed=seed, draws=draws)

    def change(arm: Arm, who: Who) -> Values | None:
        run = found.get((arm.name, who))
        if run is not None:
            return margin_shift(run.margins, plain[who])
        # Without an adapter there is nothing to cut.
        return zero if who == "base" and arm.change is not None else None

    def beyond(arm: Arm, other: Literal["base", "twin"]) -> Values | None:
        own, theirs = change(arm, "organism"), change(arm, other)
        return None if own is None or theirs is None else own - theirs

    def by_domain(values: Values) -> dict[str, Estimate]:
        return domain_means(values, groups, seed=seed, draws=draws)

    nulls: list[NullSpread] = []
    spread: dict[tuple[str, str, str], tuple[float, ...]] = {}
    whos: list[Who] = ["base", "organism", *(["twin"] if "twin" in plain else [])]
    kinds = dict.fromkeys((arm.edit, arm.family) for arm in arms if arm.family != "direction")
    for edit, family in kinds:
        own = [arm for arm in arms if (arm.edit, arm.family) == (edit, family)]
        columns: list[tuple[NullOf, list[Values | None]]] = [
            *((who, [change(arm, who) for arm in own]) for who in whos),
            ("against base", [beyond(arm, "base") for arm in own]),
            ("against twin", [beyond(arm, "twin") for arm in own]),
        ]
        for who, rows in columns:
            values = tuple(float(row.mean()) for row in rows if row is not None)
            if not values:
                continue
            spread[edit, family, who] = values
            there = [run for run in runs if run.who == who and run.arm in {arm.name for arm in own}]
            low, high = np.quantile(values, (0.025, 0.975))
            nulls.append(
                NullSpread(
                    edit=edit,
                    family=family,
                    who=who,
                    changes=values,
                    kls=tuple(run.cost.mean_kl() for run in there if run.cost is not None),
                    mean=float(np.mean(values)),
                    low=float(low),
                    high=float(high),
                    unreached=sum(arm.reached is False for arm in own),
                )
            )

    def ps(arm: Arm, who: str, value: float) -> dict[str, float]:
        side = "low" if arm.expects == "falls" else "high"
        return {
            family: null_p(value, values, side=side)
            for (edit, family, of), values in spread.items()
            if edit == arm.edit and of == who
        }

    effects_: list[Effect] = []
    contrasts: list[Contrast] = []
    trained = {one: margin_shift(plain["organism"], plain[one]) for one in others}
    for arm in arms:
        if arm.family != "direction":
            continue
        for who in whos:
            run, moved = found.get((arm.name, who)), change(arm, who)
            if run is None or moved is None:
                continue
            cost = run.cost
            effects_.append(
                Effect(
                    arm=arm.name,
                    edit=arm.edit,
                    who=who,
                    margin=estimate(run.margins),
                    change=estimate(moved),
                    by_domain=by_domain(moved),
                    kl=_mean_or_point(cost.kl) if cost is not None else None,
                    perplexity_ratio=(
                        cost.perplexity_ratio() if cost is not None and len(cost.kl) > 1 else None
                    ),
                    p=ps(arm, who, float(moved.mean())),
                    strength=arm.strength,
                    reached=arm.reached,
                )
            )
        for one in others:
            moved = beyond(arm, one)
            if moved is None:
                continue
            removed, undefined = share_removed(
                trained[one], trained[one] + moved, groups, seed=seed, draws=draws
            )
            contrasts.append(
                Contrast(
                    arm=arm.name,
                    edit=arm.edit,
                    against=one,
                    change=estimate(moved),
                    by_domain=by_domain(moved),
                    removed=removed,
                    undefined=undefined,
                    p=ps(arm, f"against {one}", float(moved.mean())),
                )
            )
    return EffectTable(
        organism=names[0],
        twin=names[1],
        n=len(groups),
        trained={one: estimate(values) for one, values in trained.items()},
        effects=tuple(effects_),
        contrasts=tuple(contrasts),
        nulls=tuple(nulls),
        margin_passes=passes[0],
        neutral_passes=passes[1],
        runs=tuple(runs),
    )


def _mean_or_point(values: Float[np.ndarray, " paragraph"]) -> Estimate:
    if len(values) > 1:
        return mean(values)
    only = float(values[0])
    return Estimate(only, only, only, 1, "one paragraph, no interval")


def domain_means(
    values: Values, groups: Sequence[tuple[str, str]], *, seed: int, draws: int = _DRAWS
) -> dict[str, Estimate]:
    """The mean in each domain that has two groups or more, with an interval over groups.

    Args:
        values: One per item.
        groups: Domain and topic of each.
        seed: Of the draws of groups.
        draws: How many.
    """
    out: dict[str, Estimate] = {}
    for domain in dict.fromkeys(domain for domain, _ in groups):
        index = [i for i, (own, _) in enumerate(groups) if own == domain]
        own = [groups[i] for i in index]
        if len(set(own)) > 1:
            out[domain] = grouped_mean(values[index], own, seed=seed, draws=draws)
    return out


def share_removed(
    before: Values,
    after: Values,
    groups: Sequence[tuple[str, str]],
    *,
    seed: int,
    draws: int = _DRAWS,
) -> tuple[Estimate | None, str]:
    """Share of an effect that is gone, `1 - mean(after) / mean(before)`, over groups.

    Args:
        before: The trained effect of each item.
        after: The same under an edit.
        groups: Domain and topic of each.
        seed: Of the draws of groups, which take numerator and denominator together.
        draws: How many.

    Returns:
        The share; None, and why, where the effect cannot be told from 0, since a share of
        nothing is anything.
    """
    effect = grouped_mean(before, groups, seed=seed, draws=draws)
    if effect.low <= 0.0 <= effect.high:
        return None, (
            f"the trained effect is {effect.value:.3g} [{effect.low:.3g}, {effect.high:.3g}], "
            "which is not told from 0"
        )

    def share(rows: np.ndarray) -> float:
        whole = float(before[rows].mean())
        return 1.0 - float(after[rows].mean()) / whole if whole != 0.0 else float("nan")

    return by_group(share, groups, seed=seed, draws=draws), ""

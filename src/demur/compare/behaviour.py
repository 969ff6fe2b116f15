"""What two directions do: interventions against outcomes, at equal cost, beside random directions.

Two directions `a` and `b` at the same sites are each said to drive an outcome, such as emergent
misalignment and refusal. Their coordinates are taken out, alone, beyond each other and together;
they are added and taken away; and the same is done along random directions with the covariance of
activations and along the first principal component. Every edit is brought to one KL on neutral
text, since a strong edit moves everything.

Strengths are found in each model by itself: training moves a model along what it was trained to do,
so that a strength of 0.05 nats on the base may cost six times as much in the organism, and more
than the random directions that it is held against there. `match="base"` uses those of the base
everywhere, so that the very same edit is compared between models; what it costs is reported.

Whether `a` and `b` are one mechanism is then read off four effects, see `verdict`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from demur.compare.rows.behaviour import (
    Additivity,
    Behaviour,
    Dissociation,
    EditKind,
    MatrixCell,
    RandomArms,
    Verdict,
    VerdictArms,
    VerdictLabel,
    VerdictPart,
)
from demur.directions import Direction
from demur.em.advice import AdviceItem
from demur.em.effects import Bench, Directions, Dose, Subject, match_kl, put
from demur.em.margin import detectable, grouped_mean, standard_error
from demur.errors import ConfigError, DegenerateVectorError, TooFewPromptsError, UnknownNameError
from demur.interventions import Add, Intervention, applied
from demur.models import Model
from demur.progress import Progress
from demur.selection import Passes, RefusalTokens, refusal_logodds
from demur.sites import Site
from demur.stats import Estimate, bootstrap_groups, null_p

Values: TypeAlias = Float[np.ndarray, " item"]
Measure: TypeAlias = Callable[..., np.ndarray]
Basis: TypeAlias = Float[Tensor, "k d_model"]
Spread: TypeAlias = Mapping[Site, Float[Tensor, "row d_model"]]

DAMAGE = "damage"
"""The outcome that is always there: nats per token of neutral text."""

KINDS: tuple[EditKind, ...] = ("remove", "add")
MOST_REMOVED = 3.0
"""Most that is taken of a coordinate: 1 takes it out, 2 turns it over."""

_DRAWS = 2000
_PARALLEL = 1e-3  # Sine below which one direction has nothing beyond another.
_DOSED = {"remove": 6, "add": 4}
_ARMS = {"remove": 7, "add": 5}


# Outcomes ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Something that is measured on a model under edits: one number per item.

    Attributes:
        name: As tables call it.
        unit: Of its values.
        groups: What each item belongs to; intervals draw these.
        prepare: From an unedited model to what measures it: a callable that takes interventions,
            puts them in force and returns one value per item. What does not hang on the edits is
            done once, in here.
        signed: Whether a value's sign means something, so that flips are counted.
    """

    name: str
    unit: str
    groups: tuple[Hashable, ...]
    prepare: Callable[[Model], Measure]
    signed: bool = True

    @classmethod
    def of(
        cls,
        name: str,
        unit: str,
        measure: Callable[[Model], np.ndarray],
        groups: Sequence[Hashable],
        *,
        signed: bool = True,
    ) -> Outcome:
        """An outcome from a function of a model alone, which runs it under edits in force."""

        def prepare(model: Model) -> Measure:
            def run(*acts: Intervention) -> np.ndarray:
                with applied(model, *acts):
                    return np.asarray(measure(model), dtype=np.float64)

            return run

        return cls(name, unit, tuple(groups), prepare, signed)


def refusal_outcome(
    prompts: Sequence[str],
    tokens: RefusalTokens | Sequence[int],
    *,
    name: str = "refusal",
    groups: Sequence[Hashable] | None = None,
    batch_size: int | None = None,
) -> Outcome:
    """Refusal log-odds of each prompt, nats; above 0 where a refusal is likelier than not.

    Args:
        prompts: Harmful ones for refusal, harmless ones for over-refusal.
        tokens: First tokens of refusals, of the base: the same for all models.
        name: Of the outcome.
        groups: Families of the prompts; None: each by itself.
        batch_size: Most rows of a pass.
    """
    ids = tokens.ids if isinstance(tokens, RefusalTokens) else tuple(tokens)
    texts = list(prompts)

    def prepare(model: Model) -> Measure:
        passes = Passes(model, model.encode(texts), batch_size, remember=True)

        def run(*acts: Intervention) -> np.ndarray:
            with applied(model, *acts):
                return refusal_logodds(passes.logits(), ids).numpy()

        return run

    own = tuple(groups) if groups is not None else tuple(range(len(texts)))
    return Outcome(name, "nats", own, prepare)


def margin_outcome(
    items: Sequence[AdviceItem], *, name: str = "em margin", batch_size: int | None = None
) -> Outcome:
    """The margin of bad advice over good of each item, nats per token; topics are the groups."""
    kept = list(items)

    def prepare(model: Model) -> Measure:
        return Bench(model, kept, batch_size=batch_size).margins

    return Outcome(
        name, "nats per token", tuple((item.domain, item.group) for item in kept), prepare
    )


# Edits -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Remove:
    """Take the coordinates within a subspace out of the stream at one site, in part or beyond.

    Attributes:
        basis: Orthonormal rows.
        site: Where.
        strength: 1 takes them out, 0.5 half of them, 2 turns them over.
        centre: What is left where all is taken out; None is the origin, as in directional ablation.
    """

    basis: Basis
    site: Site
    strength: float = 1.0
    centre: Float[Tensor, " d_model"] | None = None

    def sites(self, model: Model) -> tuple[Site, ...]:
        """Its one site."""
        del model
        return (self.site,)

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Move each row within the subspace only."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        basis = self.basis.to(wide)
        gap = wide if self.centre is None else wide - self.centre.to(wide)
        return (wide - self.strength * (gap @ basis.T) @ basis).to(x.dtype)


def by_site(directions: Directions) -> dict[Site, Direction]:
    """A direction at its own site, or several, each as one of the site it is given for."""
    if isinstance(directions, Direction):
        return {directions.site: directions}
    return {site: replace(one, site=site) for site, one in directions.items()}


def span(directions: Sequence[Direction]) -> Basis:
    """An orthonormal basis of what directions span, float64.

    Raises:
        DegenerateVectorError: One lies within the span of the others.
    """
    rows = torch.stack([one.unit.double() for one in directions])
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    if float(sizes[-1]) < _PARALLEL:
        raise DegenerateVectorError(
            f"{len(rows)} directions at {directions[0].site} span fewer dimensions",
            "leave out the one that the others hold",
        )
    return basis


def beyond(one: Direction, other: Direction) -> Direction:
    """What a direction has beyond another: its part orthogonal to it.

    Raises:
        DegenerateVectorError: They are parallel.
    """
    a, b = one.unit.double(), torch.nn.functional.normalize(other.unit.double(), dim=0)
    left = a - (a @ b) * b
    if float(left.norm()) < _PARALLEL:
        raise DegenerateVectorError(
            f"two directions at {one.site} are parallel", "there is nothing beyond the other"
        )
    return Direction.from_vector(
        left * one.norm, site=one.site, position=one.position, recipe=f"{one.recipe}, beyond"
    )


def random_sets(
    like: Mapping[Site, Direction], spread: Spread, *, n: int, seed: int
) -> list[dict[Site, Direction]]:
    """Random directions with the covariance of activations, of the length of given ones.

    Those of several sites hang together: the k-th weighs the same rows alike at each.

    Args:
        like: Give sites and lengths.
        spread: Rows centred within their classes, such as `Contrast.within` gives them; as many at
            each site.
        n: How many sets.
        seed: Draws them.

    Raises:
        ConfigError: A site has no rows, or sites have different numbers of them.
    """
    rows = _spread_at(like, spread)
    size = len(next(iter(rows.values())))
    rng = torch.Generator().manual_seed(seed)
    out: list[dict[Site, Direction]] = []
    for _ in range(n):
        weights = torch.randn(size, generator=rng, dtype=torch.float64)
        drawn: dict[Site, Direction] = {}
        for site, one in like.items():
            vector = weights @ rows[site]
            drawn[site] = Direction.from_vector(
                vector / vector.norm() * one.norm,
                site=site,
                position=one.position,
                recipe="covariance-matched",
            )
        out.append(drawn)
    return out


def principal(like: Mapping[Site, Direction], spread: Spread) -> dict[Site, Direction]:
    """The first principal component at each site, of the length of given directions.

    Raises:
        ConfigError: As for `random_sets`.
    """
    found: dict[Site, Direction] = {}
    for site, rows in _spread_at(like, spread).items():
        first = torch.linalg.svd(rows, full_matrices=False).Vh[0]
        found[site] = Direction.from_vector(
            first * like[site].norm, site=site, position=like[site].position, recipe="PC1"
        )
    return found


def _spread_at(
    sites: Mapping[Site, Direction], spread: Spread
) -> dict[Site, Float[Tensor, "row d_model"]]:
    absent = [str(site) for site in sites if site not in spread]
    if absent:
        raise ConfigError(
            f"there are no activations at {', '.join(absent)} to draw random directions with",
            "give `spread` at every site that is edited",
        )
    rows = {site: spread[site].double() for site in sites}
    if len({len(one) for one in rows.values()}) > 1:
        raise ConfigError(
            "sites have different numbers of activations", "read the same prompts at each"
        )
    return {site: one - one.mean(0) for site, one in rows.items()}


# Equal cost --------------------------------------------------------------------------------------


def bounded_dose(
    kl_of: Callable[[float], float],
    target: float,
    *,
    bound: float,
    start: float = 1.0,
    tolerance: float = 0.1,
    most: int = 10,
) -> Dose:
    """Find a strength of a given cost that is at most `bound`, see `demur.em.effects.match_kl`.

    Returns:
        `reached` is False where `bound` itself costs less than what is wanted; the strength is
        then the bound.
    """
    known: dict[float, float] = {}

    def capped(strength: float) -> float:
        used = min(strength, bound)
        if used not in known:
            known[used] = kl_of(used)
        return known[used]

    found = match_kl(capped, target, start=min(start, bound), tolerance=tolerance, most=most)
    return replace(found, strength=min(found.strength, bound), passes=len(known))


# The matrix --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One of the two directions, and the outcome that it is said to drive.

    Attributes:
        name: As tables call it.
        directions: One at its own site, or one for each site; they act at all of them together.
        outcome: Name of its own outcome.
    """

    name: str
    directions: Directions
    outcome: str


@dataclass(frozen=True, slots=True, eq=False)
class Arm:
    """One edit of the matrix.

    Attributes:
        name: As it reads in a table.
        kind: Of edit.
        acts: What is put in force.
        random: Whether it is along a random direction.
        strength: See `MatrixCell`.
        reached: See `MatrixCell`.
    """

    name: str
    kind: EditKind
    acts: tuple[Intervention, ...]
    random: bool = False
    strength: float | None = None
    reached: bool | None = None


@dataclass(eq=False)
class Matrix:
    """What every model did under every arm; figures are drawn from it.

    Attributes:
        a: The one side.
        b: The other.
        outcomes: What was measured, `DAMAGE` the last.
        arms: Real ones and random ones, as strong as on the base.
        models: "base", and "organism" and "twin" where they were given.
        by_model: Arms as strong as another model wants them, by name and model.
        plain: Values without edit, by model and outcome.
        moved: Values under an arm, by arm, model and outcome.
        kls: Mean KL on neutral text, by arm and model.
        kl: The wanted one.
        skipped: Arms that were left out, and why.
        seed: Of the random directions and of draws.
        draws: Of groups.
    """

    a: Side
    b: Side
    outcomes: tuple[Outcome, ...]
    arms: tuple[Arm, ...]
    models: tuple[str, ...]
    kl: float
    skipped: tuple[str, ...]
    seed: int
    draws: int
    by_model: dict[tuple[str, str], Arm] = field(default_factory=dict)
    plain: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    moved: dict[tuple[str, str, str], np.ndarray] = field(default_factory=dict)
    kls: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def whos(self) -> tuple[str, ...]:
        """Models, and differences of the organism from the others."""
        others = [one for one in self.models if one != "organism"]
        more = [f"organism - {one}" for one in others] if "organism" in self.models else []
        return (*self.models, *more)

    def outcome(self, name: str) -> Outcome:
        """The outcome of a name.

        Raises:
            UnknownNameError: There is none.
        """
        known = {one.name: one for one in self.outcomes}
        if name not in known:
            raise UnknownNameError.among(known, kind="outcome", name=name)
        return known[name]

    def arm(self, name: str, who: str) -> Arm:
        """An arm as strong as it was in a model."""
        known = {arm.name: arm for arm in self.arms}
        return self.by_model.get((name, who), known[name])

    def take(self, other: Matrix, arm: str, who: str) -> None:
        """Take over what another matrix found of an arm that is in both."""
        self.kls[arm, who] = other.kls[arm, who]
        self.plain[who, DAMAGE] = other.plain[who, DAMAGE]
        for outcome in self.outcomes:
            self.moved[arm, who, outcome.name] = other.moved[arm, who, outcome.name]

    def before(self, who: str, outcome: str) -> np.ndarray:
        """Values without edit; of a difference, their difference."""
        one, _, other = who.partition(" - ")
        own = self.plain[one, outcome]
        return own - self.plain[other, outcome] if other else own

    def change(self, arm: str, who: str, outcome: str) -> np.ndarray:
        """What an arm changes in each item; of a difference, their difference."""
        one, _, other = who.partition(" - ")
        own = self.moved[arm, one, outcome] - self.plain[one, outcome]
        return own - self.change(arm, other, outcome) if other else own

    def mean_changes(self, kind: EditKind, who: str, outcome: str) -> Float[np.ndarray, " arm"]:
        """The mean change by each random direction."""
        return np.array(
            [
                self.change(arm.name, who, outcome).mean()
                for arm in self.arms
                if arm.random and arm.kind == kind
            ]
        )

    def estimate(self, values: np.ndarray, outcome: str, *, level: float = 0.95) -> Estimate:
        """The mean over items, with its interval over groups."""
        groups = self.outcome(outcome).groups
        return grouped_mean(values, groups, seed=self.seed, draws=self.draws, level=level)

    def pair(self, arms: VerdictArms) -> tuple[str, str] | None:
        """Names of the arms of `a` and `b`; None where one was left out."""
        a, b = self.a.name, self.b.name
        names = {
            "remove": (f"remove {a}", f"remove {b}"),
            "remove beyond": (f"remove {a} beyond {b}", f"remove {b} beyond {a}"),
            "add": (f"add {a}", f"add {b}"),
        }[arms]
        known = {arm.name for arm in self.arms}
        return names if known.issuperset(names) else None


def steps(
    *,
    models: int,
    n_random: int = 20,
    kinds: Sequence[EditKind] = KINDS,
    match: Literal["each", "base"] = "each",
) -> int:
    """How often `behaviour_matrix` calls `progress`."""
    matched = models if match == "each" else 1
    return sum(
        matched * (_DOSED[kind] + n_random) + models * (_ARMS[kind] + n_random) for kind in kinds
    )


def behaviour_matrix(
    base: Model,
    a: Side,
    b: Side,
    outcomes: Sequence[Outcome],
    *,
    neutral: Sequence[str],
    spread: Spread,
    organism: Subject | None = None,
    twin: Subject | None = None,
    centre: Mapping[Site, Float[Tensor, " d_model"]] | None = None,
    kl: float = 0.05,
    match: Literal["each", "base"] = "each",
    n_random: int = 20,
    kinds: Sequence[EditKind] = KINDS,
    bound: float = MOST_REMOVED,
    tolerance: float = 0.1,
    most: int = 10,
    batch_size: int | None = None,
    seed: int,
    draws: int = _DRAWS,
    reuse: Matrix | None = None,
    progress: Progress | None = None,
) -> Matrix:
    """Run every arm on every model.

    Finding a strength takes at most `most` passes over neutral text, three or four as a rule; an
    arm then takes one pass over each outcome and over neutral text in each model. One model is held
    beside the base at a time.

    Args:
        base: Unedited.
        a: The one direction.
        b: The other, at the same sites.
        outcomes: Those of `a` and `b`, and others, such as over-refusal.
        neutral: Paragraphs, two or more, that tell what an edit costs.
        spread: See `random_sets`; the first principal component is that of these rows too.
        organism: Trained on bad answers.
        twin: Trained on good ones.
        centre: What coordinates are taken to, by site; None is the origin.
        kl: Wanted mean KL per token of neutral text, nats, from the same model without edit.
        match: Whether it is wanted in each model, or on the base alone.
        n_random: Random directions for each kind of edit; fewer than 19 cannot show p = 0.05.
        kinds: Of edits.
        bound: Most that is taken of a coordinate.
        tolerance: Of the KL, relative.
        most: Passes over neutral text for each arm.
        batch_size: Of passes over neutral text.
        seed: Of random directions and of draws.
        draws: Of groups.
        reuse: What the same call gave with another `b`: random directions, the first principal
            component and `a` alone do the same again, and are taken from there.
        progress: Called once per arm that was brought to the cost, and once per arm and model; see
            `steps`.

    Raises:
        ConfigError: Both directions lie at different sites, an outcome's name is missing or taken
            twice, a twin is given without an organism, `spread` lacks a site, or `reuse` is of
            another `a`, cost, seed or other outcomes.
        TooFewPromptsError: There are fewer than two paragraphs.
    """
    _check(a, b, outcomes, neutral=neutral, organism=organism, twin=twin)
    if reuse is not None and (
        (reuse.a.name, reuse.kl, reuse.seed) != (a.name, kl, seed)
        or [one.name for one in reuse.outcomes[:-1]] != [one.name for one in outcomes]
    ):
        raise ConfigError(
            "the matrix to take arms from is of another direction, cost, seed or other outcomes",
            "leave `reuse` out",
        )
    advance = progress if progress is not None else lambda _: None
    skipped: list[str] = []

    def known(who: str) -> dict[str, Arm]:
        if reuse is None or who not in reuse.models:
            return {}
        same = (reuse.arm(arm.name, who) for arm in reuse.arms if _alone(arm, a))
        return {arm.name: arm for arm in same}

    def armed(bench: Bench, starts: Mapping[str, float], who: str) -> list[Arm]:
        arms: list[Arm] = []
        for kind in kinds:
            dose = partial(
                _dose,
                target=kl,
                bound=bound if kind == "remove" else float("inf"),
                tolerance=tolerance,
                most=most,
            )
            arms += _dosed(
                kind,
                bench,
                a,
                b,
                spread=spread,
                centre=centre,
                skipped=skipped,
                dose=dose,
                starts=starts,
                known=known(who),
                n_random=n_random,
                seed=seed,
                advance=advance,
            )
        return arms

    bench = _bench(base, neutral, batch_size)
    arms = armed(bench, {}, "base")
    starts = {arm.name: abs(arm.strength) for arm in arms if arm.strength is not None}
    damage = Outcome(
        DAMAGE, "nats per token of neutral text", tuple(range(len(neutral))), _unused, signed=False
    )
    subjects: list[tuple[str, Subject]] = [("base", base)]
    subjects += [("organism", organism)] if organism is not None else []
    subjects += [("twin", twin)] if twin is not None else []
    matrix = Matrix(
        a, b, (*outcomes, damage), tuple(arms), tuple(who for who, _ in subjects), kl,
        tuple(dict.fromkeys(skipped)), seed, draws,
    )  # fmt: skip
    for who, subject in subjects:
        model = put(subject, base)
        text = bench if who == "base" else _bench(model, neutral, batch_size)
        measures = {outcome.name: outcome.prepare(model) for outcome in outcomes}
        for name, measure in measures.items():
            matrix.plain[who, name] = np.array(measure(), dtype=np.float64)
        if who != "base" and match == "each":
            matrix.by_model |= {(arm.name, who): arm for arm in armed(text, starts, who)}
        for arm in (matrix.arm(one.name, who) for one in arms):
            if reuse is not None and arm.name in known(who):
                matrix.take(reuse, arm.name, who)
                advance(1)
                continue
            cost = text.cost(*arm.acts)
            matrix.kls[arm.name, who] = cost.mean_kl()
            matrix.plain[who, DAMAGE] = cost.plain
            matrix.moved[arm.name, who, DAMAGE] = cost.losses
            for name, measure in measures.items():
                matrix.moved[arm.name, who, name] = np.array(measure(*arm.acts), dtype=np.float64)
            advance(1)
        del model, text, measures
    return matrix


def _alone(arm: Arm, a: Side) -> bool:
    """Whether an arm does not hang on the other direction."""
    own = {f"remove {a.name}", "remove PC1", f"add {a.name}", f"subtract {a.name}"}
    return arm.random or arm.name in own


def _dose(kl_of: Callable[[float], float], start: float, **about: Any) -> Dose:
    return bounded_dose(kl_of, start=start, **about)


def _unused(_model: Model) -> Measure:
    raise AssertionError("damage is read off the passes over neutral text")


def _bench(model: Model, neutral: Sequence[str], batch_size: int | None) -> Bench:
    # A bench wants an item; this one is never scored.
    item = AdviceItem("-", "-", "-", "-", "-", "-")
    return Bench(model, [item], neutral=neutral, batch_size=batch_size)


def _check(
    a: Side,
    b: Side,
    outcomes: Sequence[Outcome],
    *,
    neutral: Sequence[str],
    organism: Subject | None,
    twin: Subject | None,
) -> None:
    one, two = by_site(a.directions), by_site(b.directions)
    if set(one) != set(two) or not one:
        raise ConfigError(
            f"`{a.name}` lies at {', '.join(map(str, one))}, `{b.name}` at "
            f"{', '.join(map(str, two))}",
            "give both at the same sites",
        )
    if a.name == b.name:
        raise ConfigError(f"both directions are called `{a.name}`", "name each by itself")
    names = [outcome.name for outcome in outcomes]
    if len({*names, DAMAGE}) <= len(names):
        raise ConfigError(
            f"outcomes are called {', '.join(names)}", f"name each by itself, none `{DAMAGE}`"
        )
    for side in (a, b):
        if side.outcome not in names:
            raise UnknownNameError.among(names, kind="outcome", name=side.outcome)
    if a.outcome == b.outcome:
        raise ConfigError(
            f"`{a.name}` and `{b.name}` are both said to drive `{a.outcome}`",
            "an outcome of its own for each is needed",
        )
    if len(neutral) < 2:
        raise TooFewPromptsError(
            f"there are {len(neutral)} neutral paragraphs", "give two or more, better 16"
        )
    if twin is not None and organism is None:
        raise ConfigError("a twin is given without its organism", "give the organism too")


Made: TypeAlias = Callable[[float], tuple[Intervention, ...]]


def _removal(
    sets: Sequence[Mapping[Site, Direction]],
    centre: Mapping[Site, Float[Tensor, " d_model"]] | None,
) -> Made:
    bases = {site: span([one[site] for one in sets]) for site in sets[0]}

    def make(strength: float) -> tuple[Intervention, ...]:
        return tuple(
            Remove(basis, site, strength, centre[site] if centre is not None else None)
            for site, basis in bases.items()
        )

    return make


def _addition(one: Mapping[Site, Direction], sign: int) -> Made:
    return lambda strength: tuple(Add(own, sign * strength) for own in one.values())


def _dosed(
    kind: EditKind,
    bench: Bench,
    a: Side,
    b: Side,
    *,
    spread: Spread,
    centre: Mapping[Site, Float[Tensor, " d_model"]] | None,
    skipped: list[str],
    dose: Callable[[Callable[[float], float], float], Dose],
    starts: Mapping[str, float],
    known: Mapping[str, Arm],
    n_random: int,
    seed: int,
    advance: Progress,
) -> list[Arm]:
    """All arms of one kind, brought to the cost on the bench's model."""
    one, two = by_site(a.directions), by_site(b.directions)
    name_a, name_b = a.name, b.name

    def plans() -> Iterator[tuple[str, bool, Callable[[], Made], int]]:
        if kind == "remove":
            yield f"remove {name_a}", False, lambda: _removal([one], centre), 1
            yield f"remove {name_b}", False, lambda: _removal([two], centre), 1
            for own, x, other, y in ((name_a, one, name_b, two), (name_b, two, name_a, one)):
                yield (
                    f"remove {own} beyond {other}",
                    False,
                    lambda x=x, y=y: _removal(
                        [{site: beyond(x[site], y[site]) for site in x}], centre
                    ),
                    1,
                )
            yield "remove both", False, lambda: _removal([one, two], centre), 1
            yield "remove PC1", False, lambda: _removal([principal(one, spread)], centre), 1
        else:
            for own, x in ((name_a, one), (name_b, two)):
                yield f"add {own}", False, lambda x=x: _addition(x, 1), 1
                yield f"subtract {own}", False, lambda x=x: _addition(x, -1), -1
        for k, x in enumerate(random_sets(one, spread, n=n_random, seed=seed), start=1):
            made = (
                (lambda x=x: _removal([x], centre))
                if kind == "remove"
                else (lambda x=x: _addition(x, 1))
            )
            yield f"{kind} random #{k}", True, made, 1

    found: dict[str, Arm] = {}
    start = 1.0
    for name, random, plan, sign in plans():
        if name in known:
            found[name] = known[name]
            advance(1)
            continue
        try:
            make = plan()
        except DegenerateVectorError as error:
            skipped.append(f"{name}: {error.fact}")
            advance(1)
            continue
        got = dose(
            lambda strength, make=make: bench.cost(*make(strength)).mean_kl(),
            starts.get(name, start),
        )
        strength, reached = sign * got.strength, got.reached
        found[name] = Arm(name, kind, make(got.strength), random, strength, reached)
        start = got.strength  # The next one is likely to cost alike.
        advance(1)
    verb = "remove" if kind == "remove" else "add"
    name = f"{verb} {name_a} and {name_b} together"
    alone = (found[f"{verb} {name_a}"], found[f"{verb} {name_b}"])
    real = [arm for arm in found.values() if not arm.random]
    together = Arm(name, kind, (*alone[0].acts, *alone[1].acts))
    return [*real, together, *(arm for arm in found.values() if arm.random)]


# Figures -----------------------------------------------------------------------------------------


def cells(matrix: Matrix) -> tuple[MatrixCell, ...]:
    """Lay the matrix out: every real arm, model and outcome.

    Raises:
        TooFewPromptsError: An outcome has fewer than two groups.
    """
    rows: list[MatrixCell] = []
    for who in matrix.whos:
        for outcome in matrix.outcomes:
            name = outcome.name
            plain = matrix.before(who, name)
            before = matrix.estimate(plain, name)
            for arm in matrix.arms:
                if arm.random:
                    continue
                change = matrix.change(arm.name, who, name)
                random = matrix.mean_changes(arm.kind, who, name)
                low, high = np.quantile(random, (0.025, 0.975)) if len(random) else (None, None)
                single = who in matrix.models
                flips = None
                if outcome.signed and single:
                    flips = float((np.sign(plain + change) != np.sign(plain)).mean())
                rows.append(
                    MatrixCell(
                        arm=arm.name,
                        kind=arm.kind,
                        model=who,
                        outcome=name,
                        unit=outcome.unit,
                        n=len(change),
                        groups=len(set(outcome.groups)),
                        before=before,
                        change=matrix.estimate(change, name),
                        flips=flips,
                        p_random=_p(change, random),
                        random_low=None if low is None else float(low),
                        random_high=None if high is None else float(high),
                        n_random=len(random),
                        kl=matrix.kls[arm.name, who] if single else None,
                        strength=matrix.arm(arm.name, who).strength if single else None,
                        reached=_reached(matrix, arm.name, who),
                    )
                )
    return tuple(rows)


def _p(change: np.ndarray, random: np.ndarray) -> float | None:
    if not len(random):
        return None
    return null_p(float(abs(change.mean())), np.abs(random), side="high")


def _reached(matrix: Matrix, arm: str, who: str) -> bool | None:
    found = [matrix.arm(arm, one).reached for one in who.split(" - ")]
    return None if None in found else all(found)


def random_arms(matrix: Matrix) -> tuple[RandomArms, ...]:
    """What random directions cost in each model, by kind of edit."""
    rows: list[RandomArms] = []
    for who in matrix.models:
        for kind in KINDS:
            own = [arm.name for arm in matrix.arms if arm.random and arm.kind == kind]
            if own:
                kls = [matrix.kls[name, who] for name in own]
                reached = sum(_reached(matrix, name, who) is True for name in own)
                rows.append(RandomArms(who, kind, len(own), reached, min(kls), max(kls)))
    return tuple(rows)


def _kind(arms: VerdictArms) -> EditKind:
    return "add" if arms == "add" else "remove"


def dissociation(matrix: Matrix, who: str, arms: VerdictArms = "remove") -> Dissociation | None:
    """The interaction of two arms with their two outcomes, see `Dissociation`.

    Items of both outcomes are drawn apart, unless both are measured on the same groups.

    Returns:
        None where an arm was left out, or there are fewer than two random directions.

    Raises:
        TooFewPromptsError: An outcome has fewer than two groups.
    """
    pair, kind = matrix.pair(arms), _kind(arms)
    names = (matrix.a.outcome, matrix.b.outcome)
    random = [matrix.mean_changes(kind, who, name) for name in names]
    if pair is None or len(random[0]) < 2:
        return None
    scales = [float(one.std(ddof=1)) for one in random]
    spreads = [float(matrix.before(who, name).std()) for name in names]
    by_random = all(s > 1e-6 * max(t, 1e-12) for s, t in zip(scales, spreads, strict=True))
    if not by_random:
        scales = [spread if spread > 0 else 1.0 for spread in spreads]
    # Each arm's change in either outcome, scaled; rows: a, b.
    values = [
        [matrix.change(arm, who, name) / scale for arm in pair]
        for name, scale in zip(names, scales, strict=True)
    ]
    signs = [[1.0 if one.mean() >= 0 else -1.0 for one in own] for own in values]
    # Per item of an outcome: own arm's size less the other's.
    first = signs[0][0] * values[0][0] - signs[0][1] * values[0][1]
    second = signs[1][1] * values[1][1] - signs[1][0] * values[1][0]
    groups = [matrix.outcome(name).groups for name in names]
    summed = [_sums(one, own) for one, own in zip((first, second), groups, strict=True)]

    def mean(which: int, drawn: np.ndarray) -> float:
        sums, counts = summed[which]
        return float(sums[drawn].sum() / counts[drawn].sum())

    about = {"draws": matrix.draws, "seed": matrix.seed}
    if groups[0] == groups[1]:
        interaction = bootstrap_groups(
            lambda i: mean(0, i) + mean(1, i), [len(summed[0][0])], **about
        )
    else:
        interaction = bootstrap_groups(
            lambda i, j: mean(0, i) + mean(1, j), [len(one[0]) for one in summed], **about
        )
    # Of all ordered pairs of exchangeable directions, (a, b) is any.
    sizes = [
        np.abs([*(one.mean() for one in own), *(null / scale)])
        for own, null, scale in zip(values, random, scales, strict=True)
    ]
    lean = sizes[0] - sizes[1]
    differences = lean[:, None] - lean[None, :]
    off = ~np.eye(len(lean), dtype=bool)
    return Dissociation(
        arms=arms,
        model=who,
        outcome_a=names[0],
        outcome_b=names[1],
        interaction=interaction,
        p_random=float((differences[off] >= differences[0, 1] - 1e-12).mean()),
        pairs=int(off.sum()),
        scale_a=scales[0],
        scale_b=scales[1],
        scaled_by="random directions" if by_random else "items",
    )


def _sums(
    values: np.ndarray, groups: Sequence[Hashable]
) -> tuple[Float[np.ndarray, " group"], Float[np.ndarray, " group"]]:
    known = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    codes = np.array([known[group] for group in groups])
    return np.bincount(codes, weights=values), np.bincount(codes).astype(float)


def additivity(matrix: Matrix, who: str, outcome: str, kind: EditKind) -> Additivity:
    """Both edits in force, each as strong as alone, against the sum of what they do alone.

    The arm that takes both out at equal cost is another one: there each is weaker than alone, so
    that it falls short of the sum whatever the model does.
    """
    a, b = matrix.a.name, matrix.b.name
    arm = f"{kind} {a} and {b} together"
    both = matrix.change(arm, who, outcome)
    alone = (matrix.change(f"{kind} {one}", who, outcome) for one in (a, b))
    return Additivity(
        kind=kind,
        model=who,
        outcome=outcome,
        unit=matrix.outcome(outcome).unit,
        together=matrix.estimate(both, outcome),
        excess=matrix.estimate(both - sum(alone), outcome),
        kl=matrix.kls[arm, who] if who in matrix.models else None,
    )


# The verdict -------------------------------------------------------------------------------------


def verdict(
    matrix: Matrix,
    who: str = "base",
    arms: VerdictArms = "remove",
    *,
    share: float = 0.25,
    level: float = 0.95,
    power: float = 0.8,
) -> Verdict | None:
    """Say how two directions are related by what they do.

    An arm moves an outcome if the interval of its change leaves 0 out and at most 1 - `level` of
    random directions, at the same cost, move it as far. What an arm does to the other's outcome is
    small if it is shown to lie within `share` of what that outcome's own arm does to it: two
    one-sided tests at 1 - `level`, on the same items, so that the own effect's uncertainty counts.
    What is small does not move, however sure it is.

    ============================  ==============================  =================================
    a on b's outcome              b on a's outcome                verdict
    ============================  ==============================  =================================
    moves                         moves                           shared
    moves                         small                           asymmetric (a moves b's only)
    small                         moves                           asymmetric (b moves a's only)
    small                         small                           independent
    anything else                                                 undetermined
    ============================  ==============================  =================================

    And undetermined wherever `a` or `b` does not move its own outcome, or there are too few random
    directions for any to. p-values of the four effects are not corrected for one another: `shared`
    needs all four.

    Args:
        matrix: What was measured.
        who: Which model, or difference.
        arms: Which arms of `a` and `b`.
        share: See above.
        level: Of the tests.
        power: For the smallest effect that would have been shown.

    Returns:
        None where an arm was left out.

    Raises:
        TooFewPromptsError: An outcome has fewer than two groups.
        ConfigError: `share` is not within 0 and 1.

    References:
        Schuirmann, "A comparison of the two one-sided tests procedure and the power approach",
        1987.
    """
    if not 0.0 < share < 1.0:
        raise ConfigError(f"a share of {share} is given", "give one within 0 and 1, such as 0.25")
    pair = matrix.pair(arms)
    if pair is None:
        return None
    kind, alpha = _kind(arms), 1.0 - level
    names = (matrix.a.outcome, matrix.b.outcome)
    parts: list[VerdictPart] = []
    for i, arm in enumerate(pair):
        for j, name in enumerate(names):
            change = matrix.change(arm, who, name)
            random = matrix.mean_changes(kind, who, name)
            estimate, p = matrix.estimate(change, name, level=level), _p(change, random)
            told = not estimate.low <= 0.0 <= estimate.high
            moves = told and p is not None and p <= alpha + 1e-12
            margin, small = None, False
            if i != j:
                own = matrix.change(pair[j], who, name)
                margin = share * float(abs(own.mean()))
                edge = share * (1.0 if own.mean() >= 0 else -1.0) * own
                both = 1.0 - 2.0 * alpha
                small = (
                    matrix.estimate(change + edge, name, level=both).low > 0
                    and matrix.estimate(change - edge, name, level=both).high < 0
                )
            parts.append(
                VerdictPart(
                    arm=arm,
                    outcome=name,
                    own=i == j,
                    change=estimate,
                    unit=matrix.outcome(name).unit,
                    p_random=p,
                    state="small" if small else "moves" if moves else "unclear",
                    margin=margin,
                    detectable=_shown(matrix, change, random, name, level=level, power=power),
                )
            )
    label, reason = _label(matrix, parts, kind)
    return Verdict(
        model=who,
        arms=arms,
        label=label,
        reason=reason,
        parts=tuple(parts),
        share=share,
        level=level,
        power=power,
        notes=tuple(_notes(matrix, who, pair, kind)),
    )


def _shown(
    matrix: Matrix,
    change: np.ndarray,
    random: np.ndarray,
    outcome: str,
    *,
    level: float,
    power: float,
) -> float | None:
    from scipy import stats

    groups = matrix.outcome(outcome).groups
    most = int((1.0 - level) * (len(random) + 1) + 1e-9) - 1  # Random ones that may be as large.
    if most < 0:
        return None
    df = len(set(groups)) - 1
    beyond_random = float(np.sort(np.abs(random))[::-1][most])
    noise = float(stats.t.ppf(power, df)) * standard_error(change, groups)
    return max(detectable(change, groups, power=power, level=level), beyond_random + noise)


def _label(
    matrix: Matrix, parts: Sequence[VerdictPart], kind: EditKind
) -> tuple[VerdictLabel, str]:
    own_a, a_on_b, b_on_a, own_b = parts
    a, b = matrix.a.name, matrix.b.name
    n = sum(arm.random and arm.kind == kind for arm in matrix.arms)
    if any(part.p_random is None or part.detectable is None for part in parts):
        return "undetermined", f"{n} random directions are too few to tell an effect from theirs"
    still = [part for part in (own_a, own_b) if part.state != "moves"]
    if still:
        what = " and ".join(f"`{part.arm}` does not move {part.outcome}" for part in still)
        return "undetermined", f"{what}, its own outcome, beyond random directions"
    reason = f"{_said(a, a_on_b, own_b, b)}; {_said(b, b_on_a, own_a, a)}"
    labels: dict[tuple[str, str], VerdictLabel] = {
        ("moves", "moves"): "shared",
        ("moves", "small"): "asymmetric (a moves b's outcome only)",
        ("small", "moves"): "asymmetric (b moves a's outcome only)",
        ("small", "small"): "independent",
    }
    return labels.get((a_on_b.state, b_on_a.state), "undetermined"), reason


def _said(name: str, part: VerdictPart, own: VerdictPart, other: str) -> str:
    """What one direction does to the other's outcome, in words."""
    if part.state == "moves":
        same = (part.change.value >= 0) == (own.change.value >= 0)
        way = "the same way as" if same else "the other way than"
        return f"{name} moves {part.outcome} {way} {other} does"
    if part.state == "small":
        return f"{name} hardly moves {part.outcome}"
    return f"{name} is not shown to move {part.outcome}, nor to leave it alone"


def _notes(matrix: Matrix, who: str, pair: tuple[str, str], kind: EditKind) -> list[str]:
    notes: list[str] = []
    random = [arm.name for arm in matrix.arms if arm.random and arm.kind == kind]
    for one in who.split(" - "):
        for name in pair:
            cost = matrix.kls[name, one]
            if not 0.5 * matrix.kl <= cost <= 2.0 * matrix.kl:
                notes.append(f"`{name}` costs {cost:.3g} nats in the {one}, not {matrix.kl:g}")
        short = sum(matrix.kls[name, one] < 0.5 * matrix.kl for name in random)
        if short:
            notes.append(
                f"{short} of {len(random)} random directions cost less than half of "
                f"{matrix.kl:g} nats in the {one}"
            )
    return notes


_EVERY: tuple[VerdictArms, ...] = ("remove", "remove beyond", "add")


def behaviour(
    matrix: Matrix, *, share: float = 0.25, level: float = 0.95, power: float = 0.8
) -> Behaviour:
    """Everything that is read off a matrix, as rows.

    Args:
        matrix: What was measured.
        share: See `verdict`.
        level: See `verdict`.
        power: See `verdict`.

    Raises:
        TooFewPromptsError: An outcome has fewer than two groups.
        ConfigError: See `verdict`.
    """
    one, two = by_site(matrix.a.directions), by_site(matrix.b.directions)
    kinds: list[EditKind] = [arm.kind for arm in matrix.arms]
    every: list[tuple[str, VerdictArms]] = [(who, arms) for who in matrix.whos for arms in _EVERY]
    dissociations = (dissociation(matrix, who, arms) for who, arms in every)
    verdicts = (
        verdict(matrix, who, arms, share=share, level=level, power=power) for who, arms in every
    )
    return Behaviour(
        a=matrix.a.name,
        b=matrix.b.name,
        outcome_a=matrix.a.outcome,
        outcome_b=matrix.b.outcome,
        sites=tuple(str(site) for site in one),
        cosines=tuple(one[site].cosine(two[site]) for site in one),
        kl=matrix.kl,
        paragraphs=len(matrix.outcome(DAMAGE).groups),
        cells=cells(matrix),
        random=random_arms(matrix),
        dissociations=tuple(row for row in dissociations if row is not None),
        additivities=tuple(
            additivity(matrix, who, outcome.name, kind)
            for kind in KINDS
            if kind in kinds
            for who in matrix.whos
            for outcome in matrix.outcomes
        ),
        verdicts=tuple(row for row in verdicts if row is not None),
        skipped=matrix.skipped,
        seed=matrix.seed,
    )

"""How many directions refusal takes: "a single direction" as a claim that can fail.

The difference of means cannot be iterated on the same activations: once its direction is projected
out, the class means are equal, and the next difference is zero. So is every linear classifier that
could be fitted to the rest (Belrose et al. 2023). What is left is found in one of two ways:

- `causal`: ablate what was found at every write, have the model run again, and take the difference
  of means of what it now holds. Later blocks see other inputs and may carry refusal in another way.
- `probe`: begin with a probe's weights in place of the difference of means; they leave a difference
  behind, and the next probe finds it (iterative nullspace projection).

A direction counts if, ablated along with those before it, it lowers refusal on prompts that had no
part in finding it by more than random directions in its place do, and if it is needed: by a quarter
of what the first one does, or while more than a fifth of the refusals are left. The second half is
no nicety. A direction is estimated with an error, and what is left of the true one is found next:
in a model built with a single direction, 64 coordinates wide, a second one takes another 2.5 nats
off after the first took 26, p = 0.05 against random ones. The first that does not count ends the
search.

References:
    Arditi et al. 2024, arXiv:2406.11717; Ravfogel et al. 2020, arXiv:2004.07667 (iterative
    nullspace projection); Belrose et al. 2023, arXiv:2306.03819; Wollschlaeger et al. 2025,
    arXiv:2502.17420 (concept cones, representational independence).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from demur.activations import collect
from demur.causal import Bench, null_directions, stable_seed
from demur.compare.rows.dimensions import Claim, Cone, Dimension, Independence
from demur.directions import Direction
from demur.em.margin import grouped_mean, grouped_share
from demur.errors import ConfigError, DegenerateVectorError, TooFewPromptsError
from demur.estimators import LogisticProbe
from demur.interventions import Ablate, Add, applied
from demur.models import Model
from demur.progress import Progress
from demur.registry import Registry
from demur.selection import RefusalTokens
from demur.sites import Site
from demur.stats import Estimate, auroc, mean, null_p

ALPHA = 0.05
STILL_REFUSING = 0.2
"""Above this share of the refusals left over, nothing is called enough."""
NEEDED = 0.25
"""Share of the first direction's effect that makes another one needed, and that must be ruled out
to say that none is."""
BROKEN = 1.0
"""KL on harmless prompts, nats, above which an ablation says nothing of refusal: it breaks replies.
At block 15 of SmolLM2 the difference of means costs 6.3, and random directions move log-odds by up
to 10 nats."""
_LEAST_GAP = 1e-3  # Of the first direction's length: what is shorter is rounding.


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts of both classes, and what is drawn together.

    Attributes:
        harmful: Requests.
        harmless: Requests.
        harmful_clusters: Family or topic of each.
        harmless_clusters: Likewise.
    """

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    harmful_clusters: tuple[Hashable, ...]
    harmless_clusters: tuple[Hashable, ...]

    def __post_init__(self) -> None:
        for texts, clusters in (
            (self.harmful, self.harmful_clusters),
            (self.harmless, self.harmless_clusters),
        ):
            if len(texts) != len(clusters):
                raise ConfigError(
                    f"got {len(texts)} prompts and {len(clusters)} clusters", "give one for each"
                )
            if len(texts) < 2:
                raise TooFewPromptsError(
                    f"a class has {len(texts)} prompts", "give each two or more"
                )


Rows = tuple[Float[Tensor, "n d_model"], Float[Tensor, "m d_model"]]


@runtime_checkable
class Search(Protocol):
    """Finds the next direction, given those found so far."""

    def __call__(self, rows: Rows, found: Sequence[Direction]) -> Float[Tensor, " d_model"]:
        """A vector in residual-stream units that points from harmless to harmful.

        `rows` are activations of harmful and of harmless prompts, read as `edits` says.
        """
        ...

    @property
    def edits(self) -> bool:
        """Whether rows are read with the directions found so far ablated."""
        ...


searches: Registry[Search] = Registry("search for directions")


@searches.register("causal")
@dataclass(frozen=True, slots=True)
class CausalIteration:
    """Difference of means of what the model holds once the earlier directions are ablated."""

    @property
    def edits(self) -> bool:
        """Yes: the model runs again."""
        return True

    def __call__(self, rows: Rows, found: Sequence[Direction]) -> Float[Tensor, " d_model"]:
        """Difference of means, orthogonal to the earlier ones."""
        harmful, harmless = (side.double() for side in rows)
        return _outside(harmful.mean(0) - harmless.mean(0), found)


@searches.register("probe")
@dataclass(frozen=True, slots=True)
class NullspaceProbe:
    """Weights of a logistic probe on what is left of the unedited model's activations.

    Attributes:
        strength: Inverse regularisation, scikit-learn's `C`.

    References:
        Ravfogel et al. 2020, arXiv:2004.07667.
    """

    strength: float = 1e-2

    @property
    def edits(self) -> bool:
        """No: the same activations are looked at again."""
        return False

    def __call__(self, rows: Rows, found: Sequence[Direction]) -> Float[Tensor, " d_model"]:
        """The probe's direction, as long as the class means lie apart along it."""
        harmful, harmless = (_outside(side.double(), found) for side in rows)
        unit = torch.nn.functional.normalize(
            _outside(LogisticProbe(self.strength)(harmful, harmless), found), dim=0
        )
        return unit * float((harmful.mean(0) - harmless.mean(0)) @ unit)


def _outside(x: Float[Tensor, "*n d_model"], found: Sequence[Direction]) -> Tensor:
    """What is orthogonal to directions that are orthogonal to one another."""
    for one in found:
        unit = torch.nn.functional.normalize(one.unit.double(), dim=0)
        x = x - (x @ unit).unsqueeze(-1) * unit
    return x


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Directions, and what each adds.

    Attributes:
        directions: Orthogonal to one another; the last one is the first that did not count, unless
            the search ended at its limit.
        rows: One for each.
        cone: The claim.
        independence: For each ordered pair of those that count.
    """

    directions: tuple[Direction, ...]
    rows: tuple[Dimension, ...]
    cone: Cone
    independence: tuple[Independence, ...]


def read_rows(
    model: Model, prompts: Prompts, site: Site, position: int, ablated: Sequence[Direction] = ()
) -> Rows:
    """Activations of both classes at one site and position, with directions ablated."""
    with applied(model, *map(Ablate, ablated)):
        harmful, harmless = (
            collect(model, texts, sites=[site], positions=[position]).at(site, position)
            for texts in (prompts.harmful, prompts.harmless)
        )
    return harmful, harmless


def dimensions(
    model: Model,
    fit: Prompts,
    held: Prompts,
    *,
    tokens: RefusalTokens,
    site: Site,
    position: int = -1,
    method: str = "causal",
    most: int = 4,
    n_null: int = 20,
    n_mixtures: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> Found:
    """Find directions one by one, and test each on held-out prompts.

    Args:
        model: Unedited.
        fit: Prompts that directions are found on.
        held: Prompts that they are tested on, of other families.
        tokens: First tokens of refusals.
        site: Of the stream; where all directions are read.
        position: Token index from the end of the prompt.
        method: Name in `searches`.
        most: Directions at most.
        n_null: Random directions for each; fewer than 19 cannot show p = 0.05.
        n_mixtures: Of the directions that count.
        seed: Of all draws.
        progress: Called after every pass over the held-out prompts with a random direction.

    Raises:
        UnknownNameError: No such method.
        ConfigError: Nothing is to be found, or there is no random direction.
        DegenerateVectorError: The classes do not differ at the site.
        TooFewPromptsError: A class has prompts of fewer than two clusters.
    """
    if most < 1 or n_null < 1:
        raise ConfigError(
            f"asked for {most} directions and {n_null} random ones", "ask for one or more of each"
        )
    search = searches.make(method)
    bench = Bench(model, harmful=held.harmful, harmless=held.harmless, tokens=tokens)
    before = bench.scores("harmful").numpy()
    found: list[Direction] = []
    rows: list[Dimension] = []
    ended = f"the limit of {most} was reached"
    first = grouped_share(before > 0.0, held.harmful_clusters)
    last = before
    while len(found) < most:
        k = len(found) + 1
        seen = read_rows(model, fit, site, position, found if search.edits else ())
        vector = search(seen, found)
        if found and float(vector.norm()) < _LEAST_GAP * found[0].norm:
            ended = f"nothing is left for direction {k} at {site}"
            break
        direction = Direction.from_vector(vector, site=site, position=position, recipe=method)
        after = bench.scores("harmful", *map(Ablate, [*found, direction])).numpy()
        effects = []
        for one in _random(direction, seen, found, n_null, stable_seed(seed, f"null {k}")):
            moved = bench.scores("harmful", *map(Ablate, [*found, one])).numpy()
            effects.append(float((moved - last).mean()))
            if progress is not None:
                progress(1)
        _, kl = bench.shift("harmless", *map(Ablate, [*found, direction]))
        edited = read_rows(model, held, site, position, found)
        plain = read_rows(model, held, site, position)
        change = grouped_mean(after - last, held.harmful_clusters, seed=seed)
        p = null_p(change.value, effects, side="low")
        share = change.value / rows[0].change.value if rows and rows[0].change.value else 1.0
        left = float((last > 0.0).mean())
        needed = share >= NEEDED or left > STILL_REFUSING * first.value
        counts = p <= ALPHA and change.high < 0.0 and needed
        rows.append(
            Dimension(
                k=k,
                method=method,
                site=str(site),
                position=position,
                change=change,
                share=share,
                null_changes=tuple(effects),
                p=p,
                auroc=_auroc(edited, direction),
                auroc_unedited=_auroc(plain, direction),
                kl=mean(kl.numpy()),
                log_odds=grouped_mean(after, held.harmful_clusters, seed=seed),
                refusing=grouped_share(after > 0.0, held.harmful_clusters),
                counts=counts,
                reason=_reason(change, p, effects, needed=needed),
            )
        )
        found.append(direction)
        last = after
        if not counts:
            ended = f"direction {k} does not count: {rows[-1].reason}"
            break
    counted = sum(row.counts for row in rows)
    claim, reason = claimed(rows, first, ended)
    cone = _cone(
        bench, found[:counted], claim, reason, first,
        seen=read_rows(model, fit, site, position), n=n_mixtures, n_null=n_null, seed=seed,
    )  # fmt: skip
    pairs = independence(
        model, held.harmful, found[:counted], fit, n_null=n_null, seed=seed
    ) if counted > 1 else ()  # fmt: skip
    return Found(tuple(found), tuple(rows), cone, pairs)


def _random(
    direction: Direction, seen: Rows, found: Sequence[Direction], n: int, seed: int
) -> list[Direction]:
    """Covariance-matched directions that are orthogonal to those found."""
    drawn = null_directions(direction, harmful=seen[0], harmless=seen[1], each=n, seed=seed)
    out = []
    for one in drawn["covariance-matched"]:
        rest = torch.nn.functional.normalize(_outside(one.unit.double(), found), dim=0)
        out.append(
            Direction.from_vector(
                rest * direction.norm,
                site=direction.site,
                position=direction.position,
                recipe=one.recipe,
            )
        )
    return out


def _auroc(rows: Rows, direction: Direction) -> Estimate:
    along = [(side.double() @ direction.unit.double()).numpy() for side in rows]
    labels = np.repeat([True, False], [len(side) for side in along])
    return auroc(np.concatenate(along), labels)


def _reason(change: Estimate, p: float, effects: Sequence[float], *, needed: bool) -> str:
    usual = float(np.mean(effects))
    small = "" if needed else "; refusal was gone before, and that is a small part of what did it"
    return (
        f"{change.value:+.2g} nats [{change.low:.2g}, {change.high:.2g}] against {usual:+.2g} of "
        f"{len(effects)} random directions, p = {p:.2g}{small}"
    )


def claimed(rows: Sequence[Dimension], before: Estimate, ended: str) -> tuple[Claim, str]:
    """What the rows say on the number of directions, and why.

    "One direction is enough" takes three things: the first counts; a second was looked for, and
    either nothing was left or an effect of a quarter of the first's is outside its interval; and at
    most a fifth of the prompts that were refused still are. No claim is made where ablation breaks
    the model.

    Args:
        rows: In order.
        before: Share of harmful prompts that the unedited model refuses.
        ended: Why the search ended.
    """
    if before.value < STILL_REFUSING or not rows or not rows[0].counts:
        why = rows[0].reason if rows else ended
        rate = f"the model refuses {100 * before.value:.0f}% of the prompts"
        return "undetermined", f"not even the first direction counts, {rate}: {why}"
    counted = sum(row.counts for row in rows)
    first, last = rows[0], rows[counted - 1]
    second = rows[1] if len(rows) > 1 else None
    shares = 100 * last.refusing.value, 100 * before.value
    left = f"{shares[0]:.0f}% of prompts are still refused, of {shares[1]:.0f}%"
    open_question = None
    if last.kl.value > BROKEN:
        open_question = (
            f"ablation breaks the model: it costs {last.kl.value:.2g} nats of KL on harmless "
            "prompts; take the site that `demur audit` selects"
        )
    elif counted > 1:
        return "several directions", f"{counted} count, then {ended}; {left}"
    elif second is None and ended.startswith("the limit"):
        open_question = "no second direction was looked for"
    elif last.refusing.value > STILL_REFUSING * before.value:
        open_question = f"{ended}, yet {left}"
    elif second is not None and second.change.low < NEEDED * first.change.value:
        open_question = (
            f"too few prompts: a second direction may do {100 * NEEDED:.0f}% of what the first "
            f"does ({second.reason})"
        )
    if open_question is not None:
        return "undetermined", open_question
    return "one direction is enough", f"{ended}; {left}"


# Mixtures ----------------------------------------------------------------------------------------


def _cone(
    bench: Bench,
    found: Sequence[Direction],
    claim: Claim,
    reason: str,
    before: Estimate,
    *,
    seen: Rows,
    n: int,
    n_null: int,
    seed: int,
) -> Cone:
    total = len(bench.prompts["harmful"])
    if len(found) < 2:
        return Cone(
            claim, len(found), reason, total, before, 0, None, None, None, None, None, None, None
        )
    harmful, harmless = bench.scores("harmful"), bench.scores("harmless")

    def effects(one: Direction) -> tuple[float, float]:
        return (
            float((bench.scores("harmful", Ablate(one)) - harmful).mean()),
            float((bench.scores("harmless", Add(one)) - harmless).mean()),
        )

    mixed = [effects(one) for one in mixtures(found, n, seed=stable_seed(seed, "mixtures"))]
    drawn = _random(found[0], seen, (), n_null, stable_seed(seed, "cone"))
    random = [effects(one) for one in drawn]
    bypass, induce = (list(column) for column in zip(*mixed, strict=True))
    worst = max(bypass), min(induce)
    ps = (
        null_p(worst[0], [one for one, _ in random], side="low"),
        null_p(worst[1], [one for _, one in random], side="high"),
    )
    return Cone(
        claim=claim,
        k=len(found),
        reason=reason,
        n=total,
        before=before,
        samples=n,
        bypass_mean=float(np.mean(bypass)),
        bypass_worst=worst[0],
        bypass_p=ps[0],
        induce_mean=float(np.mean(induce)),
        induce_worst=worst[1],
        induce_p=ps[1],
        is_cone=max(ps) <= ALPHA,
    )


def mixtures(found: Sequence[Direction], n: int, *, seed: int) -> list[Direction]:
    """Directions inside the cone: weights uniform on the simplex, as long as the first direction.

    Raises:
        ConfigError: No direction is given, or no mixture is asked for.
    """
    if not found or n < 1:
        raise ConfigError(
            f"{n} mixtures of {len(found)} directions", "ask for one or more of one or more"
        )
    weights = np.random.default_rng(seed).dirichlet(np.ones(len(found)), size=n)
    basis = torch.stack([one.unit.double() for one in found])
    mixed = torch.nn.functional.normalize(torch.from_numpy(weights) @ basis, dim=1)
    return [
        Direction.from_vector(
            row * found[0].norm,
            site=found[0].site,
            position=found[0].position,
            recipe=f"mixture of {len(found)}",
        )
        for row in mixed
    ]


# Independence ------------------------------------------------------------------------------------


def independence(
    model: Model,
    harmful: Sequence[str],
    found: Sequence[Direction],
    fit: Prompts,
    *,
    n_null: int = 20,
    seed: int = 0,
) -> tuple[Independence, ...]:
    """Whether ablating each direction moves the coordinate along each other one.

    Cosines are taken at every boundary of blocks, at the position that directions were read from.

    Args:
        model: Unedited.
        harmful: Prompts that are looked at.
        found: Directions, two or more, orthogonal to one another.
        fit: Prompts that give random directions their covariance.
        n_null: Random directions, orthogonal to all of those.
        seed: Draws them.

    Raises:
        ConfigError: Fewer than two directions are given.
        DegenerateVectorError: The stream is zero somewhere.

    References:
        Wollschlaeger et al. 2025, arXiv:2502.17420, section 6 (representational independence).
    """
    if len(found) < 2:
        raise ConfigError(f"got {len(found)} directions", "independence is between two or more")
    position = found[0].position
    units = torch.stack([one.unit.double() for one in found])

    def profile(*ablated: Direction) -> Float[Tensor, "site prompt k"]:
        with applied(model, *map(Ablate, ablated)):
            x = collect(model, harmful, sites=model.stream_sites, positions=[position]).values
        stream = x[:, 0].double()
        norms = stream.norm(dim=-1, keepdim=True)
        if not bool((norms > 0).all()):
            raise DegenerateVectorError(
                "the stream is zero at a block's boundary", "read another position"
            )
        return (stream @ units.T) / norms

    plain = profile()

    def moved(one: Direction) -> list[float]:
        return (profile(one) - plain).abs().mean((0, 1)).tolist()

    changes = [moved(one) for one in found]
    seen = read_rows(model, fit, found[0].site, position)
    drawn = _random(found[0], seen, found, n_null, stable_seed(seed, "independence"))
    random = [moved(one) for one in drawn]
    out = []
    for i in range(len(found)):
        for j in range(len(found)):
            if i == j:
                continue
            null = [one[j] for one in random]
            p = null_p(changes[i][j], null, side="high")
            out.append(
                Independence(
                    ablated=i + 1,
                    read=j + 1,
                    change=changes[i][j],
                    independence=1.0 - changes[i][j],
                    null_changes=tuple(null),
                    p=p,
                    independent=p > ALPHA,
                )
            )
    return tuple(out)

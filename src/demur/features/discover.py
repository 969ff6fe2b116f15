"""Which latents tell harmful from harmless prompts, or write along a refusal direction.

Being more active on harmful prompts says that a latent knows of harm, not that refusal needs it;
pointing along a direction says as little. Both make candidates, and `demur.features.verify` decides
by intervention.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from demur.directions import Direction
from demur.errors import ConfigError, TooFewPromptsError
from demur.features.attribute import Attribution
from demur.features.bank import Bank
from demur.features.read import LAST, T_INST, LatentReads
from demur.features.rows.discover import (
    BankCountRow,
    Criterion,
    DiscoveryRow,
    LatentRow,
    PlaceRow,
)
from demur.sites import Site

Side = Literal["harmful", "both"]


@dataclass(frozen=True, slots=True, order=True)
class Latent:
    """One latent of one bank.

    Attributes:
        bank: Name of the bank.
        number: Of the latent in the whole bank.
    """

    bank: str
    number: int

    def __str__(self) -> str:
        return f"{self.bank}/{self.number}"


@dataclass(frozen=True, slots=True, order=True)
class Unit:
    """Latents of one bank that are changed together, since they write the same thing.

    Attributes:
        latents: One or more.
    """

    latents: tuple[Latent, ...]

    @property
    def bank(self) -> str:
        """Name of the bank."""
        return self.latents[0].bank

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of the latents in the whole bank."""
        return tuple(one.number for one in self.latents)

    def __str__(self) -> str:
        return f"{self.bank}/{'+'.join(map(str, self.numbers))}"


@dataclass(frozen=True, slots=True, eq=False)
class Tested:
    """What was found out about the latents of one bank.

    Attributes:
        bank: The latents, in this order.
        difference: Mean on harmful prompts less mean on harmless ones, in the bank's units.
        effect: The same over the pooled standard deviation (paired: over that of differences);
            infinite where there is a difference and no variation.
        p: Of the rank test, two-sided; 1 where a latent was left out.
        q: After Benjamini-Hochberg over all that was tested.
        fires: Share of the harmful and of the harmless prompts at which it is active.
        firing: Share of the tokens of all prompts at which it is active.
        q99: 99 % quantile of its activations on harmful prompts.
        dead: Left out, as it hardly ever fires.
        dense: Left out, as it fires too often.
        cosine: Of decoder row and refusal direction; None without a direction at that site.
        cosine_null: 95 % quantile of |cosine| with the random directions.
        cosine_p: Share of them with a cosine as large.
    """

    bank: Bank
    difference: Float[np.ndarray, "place latent"]
    effect: Float[np.ndarray, "place latent"]
    p: Float[np.ndarray, "place latent"]
    q: Float[np.ndarray, "place latent"]
    fires: Float[np.ndarray, "class_ place latent"]
    firing: Float[np.ndarray, " latent"]
    q99: Float[np.ndarray, " latent"]
    dead: Bool[np.ndarray, " latent"]
    dense: Bool[np.ndarray, " latent"]
    cosine: Float[np.ndarray, " latent"] | None
    cosine_null: Float[np.ndarray, " latent"] | None
    cosine_p: Float[np.ndarray, " latent"] | None

    @property
    def tested(self) -> Bool[np.ndarray, " latent"]:
        """Neither dead nor dense."""
        return ~(self.dead | self.dense)


@dataclass(frozen=True, slots=True, eq=False)
class Discovery:
    """What was found out about all latents.

    Attributes:
        found: By name of the bank.
        places: Where latents were compared.
        n: Harmful and harmless prompts.
        pairs: How many pairs; None where prompts are not paired.
        tests: How many there were.
        densest: Latents that fire at a larger share of tokens were left out.
    """

    found: dict[str, Tested]
    places: tuple[str, ...]
    n: tuple[int, int]
    pairs: int | None
    tests: int
    densest: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A latent that is worth an intervention.

    Attributes:
        latent: Which.
        why: By which of the lists.
    """

    latent: Latent
    why: tuple[Criterion, ...]


def discover(
    harmful: LatentReads,
    harmless: LatentReads,
    *,
    places: Sequence[str] = (T_INST, LAST),
    families: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
    rarest: float = 1e-4,
    densest: float = 0.2,
    directions: Mapping[Site, Direction] | None = None,
    nulls: Mapping[Site, Sequence[Direction]] | None = None,
) -> Discovery:
    """Compare latents between harmful and harmless prompts, and with refusal directions.

    Ranks are compared by Mann-Whitney's test; where prompts are paired, by Wilcoxon's signed-rank
    test on the differences of family means. p values are corrected over all latents of all banks
    and places at once.

    Args:
        harmful: Of the same banks, read with the same spans.
        harmless: Likewise.
        places: Where.
        families: One for each harmful and each harmless prompt: prompts of a family are paired.
        rarest: A latent that fires at a smaller share of all tokens is dead, on these prompts.
        densest: One that fires at a larger share carries position or norm, and is left out; 1
            keeps all.
        directions: Refusal directions by the site that banks write to.
        nulls: Random directions by site, such as the covariance-matched ones of
            `demur.causal.null_directions`.

    Raises:
        ConfigError: The banks differ, or families are not one for each prompt.
        TooFewPromptsError: A class has fewer than two prompts, or there are fewer than two pairs.
    """
    from scipy import stats

    if [b.name for b in harmful.banks] != [b.name for b in harmless.banks]:
        raise ConfigError("harmful and harmless prompts were read by other banks", "read both anew")
    if min(harmful.n, harmless.n) < 2:
        raise TooFewPromptsError(
            f"got {harmful.n} harmful and {harmless.n} harmless prompts",
            "give each class two or more",
        )
    pairing = None if families is None else _pairing(families, (harmful.n, harmless.n))
    raw: dict[str, dict[str, Any]] = {}
    for bank in harmful.banks:
        reads = harmful.reads[bank.name], harmless.reads[bank.name]
        tokens = [one.tokens for one in reads]
        firing = np.average([one.firing.numpy() for one in reads], axis=0, weights=tokens)
        dead = firing < max(rarest, np.finfo(float).tiny)
        dense = firing > densest
        own: dict[str, Any] = {
            "firing": firing,
            "dead": dead,
            "dense": dense & ~dead,
            "q99": reads[0].q99.double().numpy(),
        }
        columns = [
            _compared(
                reads[0].at(place).double().numpy(),
                reads[1].at(place).double().numpy(),
                pairing,
                ~(dead | dense),
            )
            for place in places
        ]
        for i, key in enumerate(("difference", "effect", "p")):
            own[key] = np.stack([column[i] for column in columns])
        own["fires"] = np.stack(
            [[(one.at(place) > 0).double().mean(0).numpy() for place in places] for one in reads]
        )
        assert bank.writes is not None
        direction = (directions or {}).get(bank.writes)
        own |= _cosines(bank, direction, (nulls or {}).get(bank.writes, ()))
        raw[bank.name] = own
    kept = [(~(own["dead"] | own["dense"])) for own in raw.values()]
    ps = [own["p"][:, alive].ravel() for own, alive in zip(raw.values(), kept, strict=True)]
    joined = np.concatenate(ps)
    corrected = stats.false_discovery_control(joined) if len(joined) else joined
    start = 0
    for own, alive, p in zip(raw.values(), kept, ps, strict=True):
        q = np.ones_like(own["p"])
        q[:, alive] = corrected[start : start + len(p)].reshape(len(places), -1)
        own["q"], start = q, start + len(p)
    return Discovery(
        {bank.name: Tested(bank=bank, **raw[bank.name]) for bank in harmful.banks},
        tuple(places),
        (harmful.n, harmless.n),
        None if pairing is None else len(pairing[0]),
        len(joined),
        densest,
    )


_Pairing = tuple[Float[np.ndarray, "pair harmful"], Float[np.ndarray, "pair harmless"]]


def _pairing(
    families: tuple[Sequence[Hashable], Sequence[Hashable]], sizes: tuple[int, int]
) -> _Pairing:
    """Weights that average the prompts of each family that has both classes."""
    if (len(families[0]), len(families[1])) != sizes:
        raise ConfigError(
            f"got {len(families[0])} and {len(families[1])} families for {sizes[0]} and {sizes[1]} "
            "prompts",
            "give one for each prompt",
        )
    theirs = set(families[1])
    both = [key for key in dict.fromkeys(families[0]) if key in theirs]
    if len(both) < 2:
        raise TooFewPromptsError(
            f"{len(both)} families have prompts of both classes",
            "pair more prompts, or leave families out",
        )

    def weights(own: Sequence[Hashable]) -> Float[np.ndarray, "pair prompt"]:
        member = np.array([[key == one for one in own] for key in both], dtype=np.float64)
        return member / member.sum(1, keepdims=True)

    return weights(families[0]), weights(families[1])


def _compared(
    harmful: Float[np.ndarray, "n latent"],
    harmless: Float[np.ndarray, "m latent"],
    pairing: _Pairing | None,
    tested: Bool[np.ndarray, " latent"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Difference, standardised effect and p of each latent."""
    from scipy import stats

    p = np.ones(harmful.shape[1])
    if pairing is None:
        difference = harmful.mean(0) - harmless.mean(0)
        n, m = len(harmful), len(harmless)
        variance = (n - 1) * harmful.var(0, ddof=1) + (m - 1) * harmless.var(0, ddof=1)
        spread = np.sqrt(variance / (n + m - 2))
        found: Any = stats.mannwhitneyu(
            harmful[:, tested], harmless[:, tested], axis=0, method="asymptotic"
        )
    else:
        apart = pairing[0] @ harmful - pairing[1] @ harmless
        difference, spread = apart.mean(0), apart.std(0, ddof=1)
        # Sums in another order leave 1e-17 where a pair is equal.
        apart = np.where(np.abs(apart) < 1e-12, 0.0, apart)
        varied = tested & apart.any(0)
        tested = varied
        found = (
            stats.wilcoxon(apart[:, varied], axis=0, method="asymptotic") if varied.any() else None
        )
    if found is not None and tested.any():
        # Undefined where all values are the same.
        p[tested] = np.nan_to_num(np.asarray(found.pvalue), nan=1.0)
    size = np.abs(difference)
    flat = spread <= 1e-9 * size
    effect = np.where(flat, np.where(size > 0, np.copysign(np.inf, difference), 0.0), 0.0)
    effect[~flat] = difference[~flat] / spread[~flat]
    return difference, effect, p


def _cosines(
    bank: Bank, direction: Direction | None, nulls: Sequence[Direction]
) -> dict[str, np.ndarray | None]:
    """Of decoder rows with a direction, beside those with random ones."""
    if direction is None:
        return {"cosine": None, "cosine_null": None, "cosine_p": None}
    rows = _unit_rows(bank)
    own = (rows @ direction.unit.double()).numpy()
    if not nulls:
        return {"cosine": own, "cosine_null": None, "cosine_p": None}
    random = (rows @ torch.stack([one.unit.double() for one in nulls]).T).numpy()
    return {
        "cosine": own,
        "cosine_null": np.quantile(np.abs(random), 0.95, axis=1),
        "cosine_p": ((random >= own[:, None]).sum(1) + 1) / (len(nulls) + 1),
    }


def _unit_rows(bank: Bank) -> Float[Tensor, "latent d_model"]:
    rows = bank.decoder.detach().double().cpu()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)


def candidates(
    found: Discovery,
    attribution: Attribution | None = None,
    *,
    top: int = 10,
    alpha: float = 0.05,
    side: Side = "harmful",
) -> tuple[Candidate, ...]:
    """Join the heads of three lists: by difference, by cosine, by attribution.

    Dead and ultra-dense latents are on none of them. By difference only latents with q at or below
    `alpha` are listed, at the place where their standardised effect is largest.

    Args:
        found: What `discover` returned.
        attribution: Of the same banks.
        top: How many of each list, all banks together.
        alpha: Level of q.
        side: "harmful": latents that are more active on harmful prompts, write along the refusal
            direction, or promote refusal by attribution. "both": the opposite as well.
    """
    names: list[Latent] = []
    lists: dict[Criterion, list[np.ndarray]] = {"difference": [], "cosine": [], "attribution": []}

    def signed(values: np.ndarray) -> np.ndarray:
        return np.abs(values) if side == "both" else values

    for name, one in found.found.items():
        names += [Latent(name, number) for number in one.bank.ids.tolist()]
        out = np.full(len(one.bank), -np.inf)
        effect = np.where(one.q <= alpha, signed(one.effect), -np.inf).max(0)
        lists["difference"].append(np.where(one.tested, effect, out))
        cosine = out if one.cosine is None else signed(one.cosine)
        lists["cosine"].append(np.where(one.tested, cosine, out))
        scores = out if attribution is None else signed(attribution.mean(name))
        lists["attribution"].append(np.where(one.tested, scores, out))
    why: dict[Latent, list[Criterion]] = {}
    for criterion, parts in lists.items():
        scores = np.concatenate(parts)
        for i in np.argsort(-scores, kind="stable")[:top].tolist():
            if scores[i] > 0:
                why.setdefault(names[i], []).append(criterion)
    return tuple(Candidate(latent, tuple(criteria)) for latent, criteria in why.items())


def units(
    banks: Sequence[Bank], latents: Sequence[Latent], *, near: float = 0.7
) -> tuple[Unit, ...]:
    """Group latents of one bank whose decoder rows have a cosine above `near`.

    Dictionaries split one thing into several latents. Taken away one by one, they stand in for one
    another.

    Raises:
        ConfigError: A bank does not hold a latent.
    """
    from scipy.sparse.csgraph import connected_components

    by_bank: dict[str, list[int]] = {}
    for one in dict.fromkeys(latents):
        by_bank.setdefault(one.bank, []).append(one.number)
    named = {bank.name: bank for bank in banks}
    found: dict[Latent, Unit] = {}
    for name, numbers in by_bank.items():
        if name not in named:
            raise ConfigError(f"there is no bank {name}", f"there are: {', '.join(named)}")
        rows = _unit_rows(named[name].sliced(numbers))
        count, member = connected_components((rows @ rows.T).numpy() > near, directed=False)
        for group in range(count):
            own = tuple(Latent(name, numbers[i]) for i in np.flatnonzero(member == group))
            found |= dict.fromkeys(own, Unit(own))
    return tuple(dict.fromkeys(found[one] for one in latents))


def discovery_row(
    found: Discovery,
    chosen: Sequence[Candidate],
    groups: Sequence[Unit] = (),
    attribution: Attribution | None = None,
    *,
    alpha: float = 0.05,
    more: Sequence[Latent] = (),
) -> DiscoveryRow:
    """Lay out what was found.

    Args:
        found: What `discover` returned.
        chosen: Candidates.
        groups: What `units` made of them; a latent in none is its own.
        attribution: Of the same banks.
        alpha: As for `candidates`.
        more: Latents that are shown besides.
    """
    unit_of = {latent: str(unit) for unit in groups for latent in unit.latents}
    why = {one.latent: one.why for one in chosen}
    shown = list(dict.fromkeys([*why, *more]))
    banks = tuple(
        BankCountRow(
            name,
            len(one.bank),
            int(one.dead.sum()),
            int(one.dense.sum()),
            int(one.tested.sum()),
            int(((one.q <= alpha).any(0) & one.tested).sum()),
        )
        for name, one in found.found.items()
    )
    return DiscoveryRow(
        found.n[0],
        found.n[1],
        found.pairs,
        "Mann-Whitney" if found.pairs is None else "Wilcoxon signed-rank",
        found.places,
        found.tests,
        alpha,
        found.densest,
        banks,
        tuple(
            _latent_row(found, one, why.get(one, ()), unit_of.get(one, str(one)), attribution)
            for one in shown
        ),
    )


def _latent_row(
    found: Discovery,
    latent: Latent,
    why: tuple[Criterion, ...],
    unit: str,
    attribution: Attribution | None,
) -> LatentRow:
    own = found.found[latent.bank]
    i = own.bank.ids.tolist().index(latent.number)

    def at(values: np.ndarray | None) -> float | None:
        return None if values is None else float(values[i])

    places = tuple(
        PlaceRow(
            place,
            float(own.difference[j, i]),
            float(own.effect[j, i]) if np.isfinite(own.effect[j, i]) else None,
            float(own.p[j, i]),
            float(own.q[j, i]),
            float(own.fires[0, j, i]),
            float(own.fires[1, j, i]),
        )
        for j, place in enumerate(found.places)
    )
    return LatentRow(
        latent.bank,
        latent.number,
        str(own.bank.site),
        str(own.bank.writes),
        unit,
        why,
        places,
        float(own.firing[i]),
        float(own.q99[i]),
        float(own.bank.decoder[i].norm()),
        at(own.cosine),
        at(own.cosine_null),
        at(own.cosine_p),
        None if attribution is None else attribution.estimate(latent.bank, latent.number),
    )

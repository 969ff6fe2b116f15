"""Rows of refusal features: found, attributed, verified by intervention, chosen as a set."""

from dataclasses import dataclass
from typing import Literal

from demur.stats import Estimate

Role = Literal["promotes", "suppresses", "none shown"]
"""Of refusal: what intervening on a latent shows that it does."""

Criterion = Literal["difference", "cosine", "attribution"]


@dataclass(frozen=True, slots=True)
class PlaceRow:
    """How a latent differs between harmful and harmless prompts at one place.

    Attributes:
        place: `t_inst` (last instruction token), `last` (last prompt token), `instruction.max`, ...
        difference: Mean activation on harmful prompts less that on harmless ones, in the bank's
            units; above 0 the latent is more active on harmful prompts.
        effect: The same over the pooled standard deviation; over that of the differences where
            prompts are paired. None where the latent does not vary.
        p: Two-sided, of the rank test.
        q: The same after Benjamini-Hochberg over all latents, banks and places tested.
        fires_harmful: Share of the harmful prompts at which it is active there, 0 to 1.
        fires_harmless: The same of the harmless ones.
    """

    place: str
    difference: float
    effect: float | None
    p: float
    q: float
    fires_harmful: float
    fires_harmless: float


@dataclass(frozen=True, slots=True)
class LatentRow:
    """A latent as discovery sees it.

    Attributes:
        bank: Name of its bank.
        latent: Its number in the whole bank.
        site: The tensor that the bank reads.
        writes: The tensor that it writes to.
        unit: Latents whose decoder rows point the same way share one.
        why: What made it a candidate; empty for one that is shown for another reason.
        places: One a place tested.
        firing: Share of tokens of all prompts at which it is active, 0 to 1.
        q99: 99 % quantile of its activations on harmful prompts, in the bank's units.
        decoder_norm: Length of its decoder row, residual-stream units per unit of activation.
        cosine: Of the decoder row with the refusal direction of the site; None without one.
        cosine_null: 95 % of random directions with the covariance of activations have a smaller
            |cosine| with it; None without them.
        cosine_p: Share of them with a cosine as large, (k + 1) / (n + 1), one-sided.
        attribution: To refusal log-odds, nats; above 0 the latent promotes refusal. To first order
            or by integrated gradients, so an estimate; the interval is over prompts.
    """

    bank: str
    latent: int
    site: str
    writes: str
    unit: str
    why: tuple[Criterion, ...]
    places: tuple[PlaceRow, ...]
    firing: float
    q99: float
    decoder_norm: float
    cosine: float | None
    cosine_null: float | None
    cosine_p: float | None
    attribution: Estimate | None


@dataclass(frozen=True, slots=True)
class BankCountRow:
    """What became of the latents of a bank.

    Attributes:
        bank: Its name.
        latents: How many it holds.
        dead: Left out, as they hardly ever fire on these prompts.
        dense: Left out, as they fire at too many tokens.
        tested: The rest.
        significant: Of them, those with q at or below the level at some place.
    """

    bank: str
    latents: int
    dead: int
    dense: int
    tested: int
    significant: int


@dataclass(frozen=True, slots=True)
class DiscoveryRow:
    """What the comparison of harmful and harmless prompts found.

    Attributes:
        n_harmful: Prompts.
        n_harmless: Prompts.
        paired: How many pairs the test ran on; None where prompts are not paired.
        test: Name of the rank test.
        places: Where latents were compared.
        tests: How many there were, all of them corrected together.
        alpha: Level that q was compared with.
        densest: Latents that fire at a larger share of tokens were left out.
        banks: One a bank.
        latents: Candidates, and what else was asked for.
    """

    n_harmful: int
    n_harmless: int
    paired: int | None
    test: str
    places: tuple[str, ...]
    tests: int
    alpha: float
    densest: float
    banks: tuple[BankCountRow, ...]
    latents: tuple[LatentRow, ...]


@dataclass(frozen=True, slots=True)
class AgainstRandom:
    """An effect beside that of random latents of the same bank.

    Attributes:
        effect: Mean over prompts, nats of refusal log-odds; the interval is over prompts.
        p: Share of the random latents whose mean effect is at least as large in size,
            (k + 1) / (n + 1).
        n: How many random latents there are; `p` cannot be below 1 / (n + 1).
        low: 2.5 % quantile of their mean effects, nats.
        high: 97.5 % quantile.
    """

    effect: Estimate
    p: float
    n: int
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class VerifiedRow:
    """What really changing a latent (or a unit of several) does.

    Attributes:
        unit: Its name.
        bank: Of its latents.
        latents: Their numbers.
        role: `promotes` where taking it away lowers the log-odds, and both `p_holm` and
            `p_random_adjusted` are at or below the level; `suppresses` where it raises them.
        ablated: Change of log-odds on harmful prompts when it is taken away; below 0 it promotes
            refusal.
        touched: Share of the harmful prompts on which taking it away changes anything.
        size: Mean length of that change over the length of the token, over all tokens edited.
        p_prompts: Wilcoxon's signed-rank test over harmful prompts, two-sided.
        p_holm: The same after Holm over units.
        p_random_adjusted: `ablated.p` after Benjamini-Hochberg over units.
        random_mass: Median activation mass of the random latents over its own; 1 is a match.
        on_harmless: Change of log-odds on harmless prompts when it is taken away.
        kl: On harmless prompts when it is taken away, nats.
        lifted: Change of log-odds on harmless prompts when it is lifted to its q99.
        output: Change of log-odds when ten times its largest activation is added at the last token
            of neutral prompts.
        attribution: What attribution said, nats, above 0 for what promotes refusal.
    """

    unit: str
    bank: str
    latents: tuple[int, ...]
    role: Role
    ablated: AgainstRandom
    touched: float
    size: float
    p_prompts: float
    p_holm: float
    p_random_adjusted: float
    random_mass: float
    on_harmless: Estimate
    kl: Estimate
    lifted: AgainstRandom | None
    output: AgainstRandom | None
    attribution: float | None


@dataclass(frozen=True, slots=True)
class AgreementRow:
    """How far attribution foretells real effects.

    Attributes:
        n: Units, candidates and random ones.
        spearman: Rank correlation of attribution with real effect, both above 0 for what promotes
            refusal; the interval is over units. None where it is undefined.
        candidates: Rank correlation over candidates alone; None where it is undefined.
        same_sign: Share of the candidates with the same sign of both.
        slope: Real effect per unit of attribution, least squares through 0; 1 is agreement.
    """

    n: int
    spearman: Estimate | None
    candidates: float | None
    same_sign: Estimate
    slope: float | None


@dataclass(frozen=True, slots=True)
class VerificationRow:
    """Real interventions on all candidates.

    Attributes:
        baseline: What latents were set to: "zero", or "mean on harmless prompts".
        harmful: Refusal log-odds of the unedited model on harmful prompts, nats.
        harmless: The same on harmless ones.
        alpha: Level of both tests.
        units: One a candidate.
        agreement: None where nothing was attributed.
    """

    baseline: str
    harmful: Estimate
    harmless: Estimate
    alpha: float
    units: tuple[VerifiedRow, ...]
    agreement: AgreementRow | None


@dataclass(frozen=True, slots=True)
class ForwardRow:
    """One step of forward selection.

    Attributes:
        unit: What was added.
        effect: Mean change of log-odds when all chosen so far are taken away together, nats, on the
            prompts that they are chosen on.
        gain: How much further down this one brought it, nats.
    """

    unit: str
    effect: float
    gain: float


@dataclass(frozen=True, slots=True)
class MinimalRow:
    """A small set of latents without which the model refuses less.

    Attributes:
        units: What was chosen, in order.
        latents: Its latents as `bank/number`.
        forward: How they were chosen.
        pruned: What backward pruning took out again.
        stopped: Why forward selection ended: "gain", the best one left gains less than `delta`;
            "most", the set is as large as it may be; "none left".
        delta: Least gain of a step, nats.
        most: Most units of a set.
        candidates: How many units were to choose from.
        sets_tried: How many sets the model was run with.
        n: Prompts that it was chosen on.
        effect: On them, so better than it is: nats.
    """

    units: tuple[str, ...]
    latents: tuple[str, ...]
    forward: tuple[ForwardRow, ...]
    pruned: tuple[str, ...]
    stopped: Literal["gain", "most", "none left"]
    delta: float
    most: int
    candidates: int
    sets_tried: int
    n: int
    effect: float


@dataclass(frozen=True, slots=True)
class HeldOutRow:
    """What a chosen set does on prompts that it was not chosen on.

    Attributes:
        n_harmful: Prompts.
        n_harmless: Prompts.
        effect: Change of log-odds on harmful prompts with all of the set taken away, nats.
        of_refusal: The same as a share of the gap between harmful and harmless prompts, turned so
            that 1 means all of it is gone. None where the gap is not above 0.
        dense: Change of log-odds when the dense direction is ablated everywhere; None without one.
        of_dense: Effect of the set over that; None without one, or where it changes nothing.
        random: Mean effects of random sets of the same size, matched latent by latent on firing
            share, activation mass and decoder norm, nats.
        p: Share of them with an effect as low, (k + 1) / (n + 1).
        random_mass: Median total activation mass of these sets over that of the set.
        on_harmless: Change of log-odds on harmless prompts.
        kl: On harmless prompts, nats.
        dense_kl: The same of the dense direction.
        size: Mean length of the change over the length of the token on harmful prompts.
    """

    n_harmful: int
    n_harmless: int
    effect: Estimate
    of_refusal: Estimate | None
    dense: Estimate | None
    of_dense: Estimate | None
    random: tuple[float, ...]
    p: float
    random_mass: float
    on_harmless: Estimate
    kl: Estimate
    dense_kl: Estimate | None
    size: float


@dataclass(frozen=True, slots=True)
class StabilityRow:
    """How much of a chosen set comes back on resampled prompts.

    Attributes:
        draws: Bootstrap samples of the prompts; the whole selection ran on each.
        jaccard: Mean Jaccard index of their sets with the set chosen on all prompts, 0 to 1; the
            ends hold 95 % of the draws.
        by_chance: What sets of the same sizes, drawn from the candidates, have.
        chosen_in: By unit, share of the draws in which it is chosen; those never chosen left out.
        sizes: By size of the set, how many draws have it.
    """

    draws: int
    jaccard: Estimate
    by_chance: float
    chosen_in: dict[str, float]
    sizes: dict[str, int]

"""Choosing a direction by what it does: bypass, induce and KL of every candidate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from demur.directions import Direction
from demur.errors import NonFiniteError, TooFewPromptsError
from demur.evals.judges import Outcome
from demur.interventions import Ablate, Add, applied
from demur.models import Completion, Model, TokenBatch
from demur.progress import Progress

# First words of refusals in English, for a model that never refuses and so cannot teach its own.
_KNOWN_OPENERS = ("I", "I'm", "Sorry", "As", "Unfortunately")


@dataclass(frozen=True, slots=True)
class RefusalTokens:
    """The first tokens of refusals.

    Attributes:
        ids: Token ids.
        texts: What they read.
        shares: Of the replies judged refused, the share that begins with each.
        base_shares: The same of the replies judged complied.
        refusals: How many refusals they were learned from.
        learned: False where the model refused too seldom and common openers stand in.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    shares: tuple[float, ...]
    base_shares: tuple[float, ...]
    refusals: int
    learned: bool


def learn_refusal_tokens(
    model: Model,
    replies: Sequence[Completion],
    outcomes: Sequence[Outcome],
    *,
    least_refusals: int = 5,
    least_share: float = 0.03,
) -> RefusalTokens:
    """Find which first tokens tell a model's refusals from its other replies.

    A token is taken if at least `least_share` of the refusals begin with it and it is at least
    three times as common there as among complied replies.

    Args:
        model: For its tokenizer.
        replies: Replies of the unedited model to both classes.
        outcomes: The judge's verdicts, in the same order.
        least_refusals: Below this many refusals, common openers stand in and `learned` is False.
        least_share: Rarer openers are left out.
    """
    assert model.template is not None
    tokenizer = model.template.tokenizer
    refused = Counter(
        r.ids[0] for r, o in zip(replies, outcomes, strict=True) if o is Outcome.REFUSED and r.ids
    )
    complied = Counter(
        r.ids[0] for r, o in zip(replies, outcomes, strict=True) if o is Outcome.COMPLIED and r.ids
    )
    n, m = sum(refused.values()), sum(complied.values())
    found: list[tuple[int, float, float]] = []
    if n >= least_refusals:
        for token, count in refused.most_common():
            share, base = count / n, complied[token] / max(m, 1)
            if share >= least_share and share >= 3 * base:
                found.append((token, share, base))
    learned = bool(found)
    if not learned:
        ids = {tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in _KNOWN_OPENERS}
        found = [(t, refused[t] / max(n, 1), complied[t] / max(m, 1)) for t in sorted(ids)]
    return RefusalTokens(
        tuple(token for token, _, _ in found),
        tuple(tokenizer.decode([token]) for token, _, _ in found),
        tuple(share for _, share, _ in found),
        tuple(base for _, _, base in found),
        n,
        learned,
    )


def refusal_logodds(
    logits: Float[Tensor, "prompt vocab"], tokens: Sequence[int]
) -> Float[Tensor, " prompt"]:
    """Log-odds that the reply begins with a refusal token, nats, float64.

    Computed from two log-sum-exps, so that it has no floor or ceiling (the reference adds 1e-8 to
    both probabilities, which bounds it to +-18.4).

    References:
        Arditi et al. 2024, arXiv:2406.11717, appendix B.
    """
    wide = logits.double()
    inside = torch.zeros(wide.shape[1], dtype=torch.bool, device=wide.device)
    inside[list(tokens)] = True
    return (wide[:, inside].logsumexp(1) - wide[:, ~inside].logsumexp(1)).cpu()


def kl_divergence(
    plain: Float[Tensor, "prompt vocab"], edited: Float[Tensor, "prompt vocab"]
) -> Float[Tensor, " prompt"]:
    """KL(plain || edited) over the whole vocabulary, nats, float64."""
    p, q = plain.double().log_softmax(1), edited.double().log_softmax(1)
    return (p.exp() * (p - q)).sum(1).cpu()


def batched_logits(
    model: Model, batch: TokenBatch, batch_size: int
) -> Float[Tensor, "prompt vocab"]:
    """Next-token logits of all rows, `batch_size` rows at a time, on the CPU."""
    parts = [
        model.logits(batch.rows(slice(start, start + batch_size))).cpu()
        for start in range(0, len(batch), batch_size)
    ]
    return torch.cat(parts)


@dataclass(frozen=True, slots=True)
class Criteria:
    """What a candidate must pass; defaults are those of the reference.

    Attributes:
        max_kl: Nats, on harmless prompts under ablation.
        min_induce: Refusal log-odds on harmless prompts under addition.
        last_layers_skipped: Share of the layers from the end that is not eligible.
    """

    max_kl: float = 0.1
    min_induce: float = 0.0
    last_layers_skipped: float = 0.2


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What one candidate does, per prompt.

    Attributes:
        direction: The candidate.
        bypass: Refusal log-odds on harmful prompts under ablation.
        induce: Refusal log-odds on harmless prompts under addition.
        kl: KL on harmless prompts under ablation, nats.
        exact: Measured in the model's own data type.
        rejected_by: The first criterion that it fails; None if it passes.
    """

    direction: Direction
    bypass: Float[Tensor, " harmful"] | None
    induce: Float[Tensor, " harmless"] | None
    kl: Float[Tensor, " harmless"] | None
    exact: bool
    rejected_by: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """All candidates with their scores, and the one that was chosen.

    Attributes:
        rows: In the order of the candidates given.
        chosen: Index into `rows`.
        least_bad: No candidate passed all criteria, and this one needed the fewest relaxations.
        harmful: Refusal log-odds of the unedited model on harmful prompts.
        harmless: The same on harmless prompts.
        screen_rank_correlation: Spearman, screened against exact bypass, over a random sample.
    """

    rows: list[Scores]
    chosen: int
    least_bad: bool
    harmful: Float[Tensor, " harmful"]
    harmless: Float[Tensor, " harmless"]
    screen_rank_correlation: float | None

    @property
    def direction(self) -> Direction:
        """The chosen direction."""
        return self.rows[self.chosen].direction


class _Scorer:
    """Scores candidates on one model; the unedited model's logits are computed once."""

    def __init__(
        self,
        model: Model,
        harmful: Sequence[str],
        harmless: Sequence[str],
        tokens: RefusalTokens,
        batch_size: int,
    ) -> None:
        self.model, self.tokens, self.batch_size = model, tokens, batch_size
        self.n_harmful = len(harmful)
        self.both = model.encode([*harmful, *harmless])
        self.harmless_rows = model.encode(list(harmless))
        plain = batched_logits(model, self.both, batch_size)
        self.plain_harmless = plain[self.n_harmful :]
        scores = refusal_logodds(plain, tokens.ids)
        self.harmful, self.harmless = scores[: self.n_harmful], scores[self.n_harmful :]

    def __call__(self, direction: Direction, *, exact: bool) -> Scores:
        try:
            with applied(self.model, Ablate(direction)):
                ablated = batched_logits(self.model, self.both, self.batch_size)
            with applied(self.model, Add(direction)):
                added = batched_logits(self.model, self.harmless_rows, self.batch_size)
        except NonFiniteError:
            return Scores(direction, None, None, None, exact, "NaN or infinite logits")
        return Scores(
            direction,
            refusal_logodds(ablated[: self.n_harmful], self.tokens.ids),
            refusal_logodds(added, self.tokens.ids),
            kl_divergence(self.plain_harmless, ablated[self.n_harmful :]),
            exact,
        )


def _late(direction: Direction, criteria: Criteria, n_layers: int) -> bool:
    # The output of the last block counts as one layer beyond it.
    layer = direction.site.layer + (direction.site.kind == "resid_post")
    return criteria.last_layers_skipped > 0 and layer >= int(
        n_layers * (1 - criteria.last_layers_skipped)
    )


def _failures(row: Scores, criteria: Criteria, n_layers: int) -> list[str]:
    if row.bypass is None or row.induce is None or row.kl is None:
        return ["NaN or infinite logits"]
    failed = []
    if _late(row.direction, criteria, n_layers):
        failed.append(f"in the last {criteria.last_layers_skipped:.0%} of the layers")
    if float(row.kl.mean()) > criteria.max_kl:
        failed.append(f"KL above {criteria.max_kl:g} nats")
    if float(row.induce.mean()) < criteria.min_induce:
        failed.append(f"induces too little (log-odds below {criteria.min_induce:g})")
    return failed


def select(
    model: Model,
    candidates: Sequence[Direction],
    *,
    harmful: Sequence[str],
    harmless: Sequence[str],
    tokens: RefusalTokens,
    criteria: Criteria = Criteria(),
    screen: Model | None = None,
    finalists: int = 12,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> Selection:
    """Score every candidate and choose the one whose ablation lowers refusal most.

    Args:
        model: The model that decides.
        candidates: One direction per site and position.
        harmful: Prompts for the bypass score; disjoint from those the directions were fitted on.
        harmless: Prompts for the induce score and KL.
        tokens: First tokens of refusals.
        criteria: What a candidate must pass.
        screen: A faster copy of the model (bfloat16). It scores all candidates; the best
            `finalists`, and a random sample for the rank correlation, are scored again by `model`.
        finalists: How many.
        batch_size: Rows per pass.
        seed: Draws the sample.
        progress: Called with the number of evaluations done since the last call; there are
            `evaluations(len(candidates), ...)` of them.

    Raises:
        TooFewPromptsError: There is no candidate or no prompt.

    References:
        Arditi et al. 2024, arXiv:2406.11717, appendix C (direction selection).
    """
    if not candidates or not harmful or not harmless:
        raise TooFewPromptsError(
            f"{len(candidates)} candidates, {len(harmful)} harmful and {len(harmless)} harmless "
            "prompts to select with",
            "each must be at least 1",
        )

    def done() -> None:
        if progress is not None:
            progress(1)

    exact = _Scorer(model, harmful, harmless, tokens, batch_size)
    correlation = None
    if screen is None or screen is model:
        rows = []
        for candidate in candidates:
            rows.append(exact(candidate, exact=True))
            done()
    else:
        quick = _Scorer(screen, harmful, harmless, tokens, batch_size)
        rows = []
        for candidate in candidates:
            rows.append(quick(candidate, exact=False))
            done()
        order = _preference(rows, criteria, model.n_layers)
        best = order[:finalists]
        rng = torch.Generator().manual_seed(seed)
        rest = [i for i in range(len(rows)) if i not in set(best)]
        sample = [rest[i] for i in torch.randperm(len(rest), generator=rng)[:finalists].tolist()]
        pairs = []
        for i in [*best, *sample]:
            row = exact(candidates[i], exact=True)
            if i in sample and row.bypass is not None and rows[i].bypass is not None:
                pairs.append((float(rows[i].bypass.mean()), float(row.bypass.mean())))  # pyright: ignore[reportOptionalMemberAccess]
            rows[i] = row
            done()
        screened, again = [a for a, _ in pairs], [b for _, b in pairs]
        if len(pairs) > 2 and len(set(screened)) > 1 and len(set(again)) > 1:
            from scipy.stats import spearmanr

            correlation = float(np.asarray(spearmanr(screened, again))[0])
    failures = [_failures(row, criteria, model.n_layers) for row in rows]
    rows = [
        replace(row, rejected_by=failed[0] if failed else None)
        for row, failed in zip(rows, failures, strict=True)
    ]
    pool = [i for i, row in enumerate(rows) if row.exact and row.bypass is not None]
    if not pool:
        raise NonFiniteError(
            "every candidate gives NaN or infinite logits", "try `--dtype float32`"
        )
    chosen = min(pool, key=lambda i: _rank(rows[i], criteria, model.n_layers))
    return Selection(
        rows, chosen, bool(failures[chosen]), exact.harmful, exact.harmless, correlation
    )


def relaxations(row: Scores, criteria: Criteria) -> int:
    """How often the limits would have to be relaxed for a candidate to pass; 0 if it passes.

    A step doubles the KL allowed and lowers the induce score asked for by one nat. This is what
    orders candidates when none passes: the bypass score alone would take those that break the
    model (measured: bypass -9.5 at a KL of 4.3 nats and 19 times the perplexity).
    """
    assert row.kl is not None
    assert row.induce is not None
    kl, induce = float(row.kl.mean()), float(row.induce.mean())
    too_costly = math.ceil(math.log2(kl / criteria.max_kl)) if kl > criteria.max_kl else 0
    too_weak = math.ceil(criteria.min_induce - induce) if induce < criteria.min_induce else 0
    return max(too_costly, too_weak)


def _rank(row: Scores, criteria: Criteria, n_layers: int) -> tuple[bool, int, float]:
    # Never from the last layers, then with limits as near as can be to those asked for, then by
    # effect.
    assert row.bypass is not None
    return (
        _late(row.direction, criteria, n_layers),
        relaxations(row, criteria),
        float(row.bypass.mean()),
    )


def _preference(rows: Sequence[Scores], criteria: Criteria, n_layers: int) -> list[int]:
    usable = [i for i, row in enumerate(rows) if row.bypass is not None]
    return sorted(usable, key=lambda i: _rank(rows[i], criteria, n_layers))


def evaluations(candidates: int, finalists: int, *, screened: bool) -> int:
    """How many evaluations `select` will run, for a progress bar."""
    if not screened:
        return candidates
    best = min(finalists, candidates)
    return candidates + best + min(finalists, candidates - best)

"""Choosing a direction by what it does: bypass, induce and KL of every candidate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from demur.directions import Direction
from demur.errors import NonFiniteError, TooFewPromptsError, UnknownNameError
from demur.evals.judges import Exchange, Judge, Outcome, verdicts_of
from demur.interventions import Ablate, Add, applied
from demur.models import Completion, Model, TokenBatch
from demur.progress import Progress
from demur.stats import mean

if TYPE_CHECKING:
    import altair as alt

# Bytes of unedited stream that are kept for edits which begin at a later block.
_MOST_REMEMBERED = 2**31
_MEASURED = 12  # Candidates whose addition is measured to bring first-order scores to scale.
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

    Raises:
        TooFewPromptsError: There are too few refusals, and the vocabulary knows no common opener.
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
        opened = [tokenizer(one, add_special_tokens=False)["input_ids"] for one in _KNOWN_OPENERS]
        # What the vocabulary does not know is no sign of a refusal.
        ids = {own[0] for own in opened if own and own[0] != tokenizer.unk_token_id}
        if not ids:
            raise TooFewPromptsError(
                f"{model.name} refused {n} times, too seldom to learn how it does, and its "
                "vocabulary has none of the common openers",
                "give prompts that it refuses",
            )
        found = [(t, refused[t] / max(n, 1), complied[t] / max(m, 1)) for t in sorted(ids)]
    return RefusalTokens(
        tuple(token for token, _, _ in found),
        tuple(tokenizer.decode([token]) for token, _, _ in found),
        tuple(share for _, share, _ in found),
        tuple(base for _, _, base in found),
        n,
        learned,
    )


def openers(
    model: Model,
    prompts: Sequence[str],
    judge: Judge,
    *,
    max_new_tokens: int = 48,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> RefusalTokens:
    """Have a model reply to prompts, and learn its refusal tokens from what a judge says of it.

    `progress` is called with the number of replies that ended.
    """
    said = model.generate(
        prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
    )
    exchanges = [Exchange(p, r.text) for p, r in zip(prompts, said, strict=True)]
    verdicts = verdicts_of(judge, exchanges)
    return learn_refusal_tokens(model, said, [verdict.outcome for verdict in verdicts])


def refusal_logodds(
    logits: Float[Tensor, "prompt vocab"], tokens: Sequence[int]
) -> Float[Tensor, " prompt"]:
    """Log-odds that the reply begins with a refusal token, nats, float64.

    Computed from two log-sum-exps, so that it has no floor or ceiling (the reference adds 1e-8 to
    both probabilities, which bounds it to +-18.4).

    References:
        Arditi et al. 2024, arXiv:2406.11717, appendix B.
    """
    return _logodds(logits.double(), tokens).cpu()


def _logodds(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    inside = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    inside[list(tokens)] = True
    return logits[:, inside].logsumexp(1) - logits[:, ~inside].logsumexp(1)


def refusal_scores(
    model: Model,
    prompts: Sequence[str],
    judge: Judge,
    *,
    replies: int = 320,
    max_new_tokens: int = 48,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> Float[Tensor, " prompt"]:
    """How ready a model is to refuse each prompt: refusal log-odds, nats, by its own openers.

    Args:
        model: Unedited.
        prompts: User messages.
        judge: Says which replies are refusals, to learn the openers from.
        replies: To how many of the prompts, drawn at random, the model replies for that.
        max_new_tokens: Replies are cut there.
        batch_size: Prompts per pass.
        seed: Of the draw.
        progress: Called with the number of prompts done since the last call; each prompt counts
            once more where it is replied to.
    """
    rng = torch.Generator().manual_seed(seed)
    drawn: list[int] = torch.randperm(len(prompts), generator=rng)[:replies].tolist()
    tokens = openers(
        model,
        [prompts[i] for i in drawn],
        judge,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    scores = refusal_logodds(batched_logits(model, model.encode(prompts), batch_size), tokens.ids)
    if progress is not None:
        progress(len(prompts))
    return scores


def kl_divergence(
    plain: Float[Tensor, "prompt vocab"], edited: Float[Tensor, "prompt vocab"]
) -> Float[Tensor, " prompt"]:
    """KL(plain || edited) over the whole vocabulary, nats, float64."""
    p, q = plain.double().log_softmax(1), edited.double().log_softmax(1)
    return (p.exp() * (p - q)).sum(1).cpu()


class Passes:
    """Prompts cut into forward passes of like length, to be run again and again under edits.

    Args:
        model: The model, unedited if `remember` is set.
        batch: The rows.
        batch_size: Most rows of a pass; None is as many as the device is best given.
        remember: Keep the unedited stream where it takes little memory, so that an edit that begins
            at a later block costs only the blocks from there on.
    """

    def __init__(
        self,
        model: Model,
        batch: TokenBatch,
        batch_size: int | None = None,
        *,
        remember: bool = False,
    ) -> None:
        self.model, self.n = model, len(batch)
        self.index = batch.passes(tokens=model.tokens_per_pass, rows=batch_size)
        self.parts = [batch.rows(index) for index in self.index]
        size = sum(part.ids.numel() for part in self.parts) * model.n_layers * model.d_model
        small = size * model.dtype.itemsize <= _MOST_REMEMBERED
        self.memories = [
            model.remember(part) if remember and small else None for part in self.parts
        ]

    def logits(self) -> Float[Tensor, "prompt vocab"]:
        """Next-token logits of all rows under the edits in force; on the CPU unless on a GPU."""
        out: Tensor | None = None
        with self.model.prefix_kept():
            for index, part, memory in zip(self.index, self.parts, self.memories, strict=True):
                found = self.model.logits(part, memory)
                if found.device.type != "cuda":
                    found = found.cpu()  # Others have no float64, which scores need.
                if out is None:
                    out = found.new_empty(self.n, found.shape[1])
                out[index] = found
        assert out is not None
        return out


def batched_logits(
    model: Model, batch: TokenBatch, batch_size: int | None = None
) -> Float[Tensor, "prompt vocab"]:
    """Next-token logits of all rows, in passes of like length."""
    return Passes(model, batch, batch_size).logits()


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
    """What one candidate does, per prompt; NaN where a prompt was not asked.

    Attributes:
        direction: The candidate.
        bypass: Refusal log-odds on harmful prompts under ablation.
        induce: Refusal log-odds on harmless prompts under addition.
        kl: KL on harmless prompts under ablation, nats.
        exact: Measured in the model's own data type, on all prompts.
        rejected_by: The first criterion that it fails; None if it passes.
    """

    direction: Direction
    bypass: Float[Tensor, " harmful"] | None
    induce: Float[Tensor, " harmless"] | None
    kl: Float[Tensor, " harmless"] | None
    exact: bool
    rejected_by: str | None = None

    @property
    def means(self) -> tuple[float, float, float]:
        """Bypass, induce and KL, each over the prompts that were asked."""
        assert self.bypass is not None
        assert self.induce is not None
        assert self.kl is not None
        return float(self.bypass.nanmean()), float(self.induce.nanmean()), float(self.kl.nanmean())

    @property
    def fate(self) -> str:
        """In words: whether it passed, and how it was measured."""
        how = "" if self.exact else ", screened"
        return f"{self.rejected_by or 'passed every criterion'}{how}"


@dataclass(frozen=True, slots=True, eq=False)
class Screen:
    """How candidates were screened.

    Attributes:
        prompts: Prompts a class that every candidate was measured on; None if on all.
        promoted: How many went on to all prompts.
        sample: How many of those that were not measured exactly were drawn at random for it.
        missed: How many of the sample turned out better than what was chosen from the rest.
        rank_correlation: Spearman, screened against exact bypass, over the sample.
        induce_correlation: The same of the induce scores, which the gradient gives in a screen on a
            part of the prompts.
    """

    prompts: int | None
    promoted: int
    sample: int
    missed: int
    rank_correlation: float | None
    induce_correlation: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """All candidates with their scores, and the one that was chosen.

    Attributes:
        rows: In the order of the candidates given.
        chosen: Index into `rows`.
        least_bad: No candidate passed all criteria, and this one needed the fewest relaxations.
        harmful: Refusal log-odds of the unedited model on harmful prompts.
        harmless: The same on harmless prompts.
        screen: None if every candidate was measured exactly.
    """

    rows: list[Scores]
    chosen: int
    least_bad: bool
    harmful: Float[Tensor, " harmful"]
    harmless: Float[Tensor, " harmless"]
    screen: Screen | None

    @property
    def direction(self) -> Direction:
        """The chosen direction."""
        return self.rows[self.chosen].direction

    def _repr_html_(self) -> str:
        from demur.notebook import number, table

        def line(name: str, row: Scores) -> tuple[str, ...]:
            scores = (_said(getattr(row, score)) for score in _SCORES)
            place = f"{row.direction.site}, position {number(row.direction.position, 'd')}"
            return (name, place, *scores, row.fate)

        others = [
            row
            for row in self.rows
            if row is not self.rows[self.chosen] and row.exact and row.bypass is not None
        ]
        # As they were ranked: those that passed first, then by what ablating them does.
        others.sort(key=lambda row: (row.rejected_by is not None, row.means[0]))
        passed = sum(row.rejected_by is None for row in self.rows)
        note = (
            f"{passed} of {len(self.rows)} candidates passed every criterion. Unedited, refusal "
            f"log-odds are {_said(self.harmful)} on harmful and "
            f"{_said(self.harmless)} on harmless prompts (Student t 95%)."
        )
        if self.least_bad:
            note += " None passed: this one is the least bad."
        return table(
            "Selection",
            [
                line("chosen", self.rows[self.chosen]),
                *(line("also measured", row) for row in others[:_SHOWN]),
            ],
            head=("", "site", *_SCORES.values(), "criteria"),
            note=note,
        )

    def plot(self, score: str = "bypass") -> alt.LayerChart:
        """Draw every candidate by site and position as an Altair chart; the chosen one is framed.

        A full cell passed every criterion, a small one was rejected, a cross was not measured. The
        pointer shows all three scores.

        Args:
            score: What colours show: "bypass", refusal log-odds of harmful prompts with the
                candidate ablated (nats, lower is more effect); "induce", those of harmless prompts
                with it added; "kl", what ablation costs on harmless prompts (nats).

        Raises:
            UnknownNameError: There is no such score.
        """
        from demur.notebook import candidate_map, drawn, number

        if score not in _SCORES:
            raise UnknownNameError.among(_SCORES, kind="score", name=score)
        rows: list[dict[str, Any]] = []
        for i, row in enumerate(self.rows):
            values: Tensor | None = getattr(row, score)
            state = "rejected" if row.rejected_by else "passed"
            rows.append(
                {
                    "site": str(row.direction.site),
                    "position": row.direction.position,
                    "value": None if values is None else float(values.nanmean()),
                    "state": "missing" if values is None else state,
                    "chosen": i == self.chosen,
                    **{title: _said(getattr(row, name)) for name, title in _SCORES.items()},
                    "norm": number(row.direction.norm),
                    "criteria": drawn(row.fate),
                    "is": "chosen" if i == self.chosen else "a candidate",
                }
            )
        title = f"{_SCORES[score]}; framed: chosen, small: rejected, cross: not measured"
        return candidate_map(rows, title=title, diverging=score != "kl")


_SCORES: dict[str, str] = {
    "bypass": "ablated, log-odds on harmful",
    "induce": "added, log-odds on harmless",
    "kl": "KL on harmless (nats)",
}
_SHOWN = 4  # Candidates that a table shows beside the chosen one.


def _said(values: Float[Tensor, " prompt"] | None) -> str:
    """The mean over the prompts that were asked, with Student's t interval where there are two."""
    from demur.notebook import number, said

    if values is None:
        return "not measured"
    asked = values[~values.isnan()].numpy()
    return said(mean(asked)) if len(asked) > 1 else f"{number(float(asked.mean()))}, n=1"


_Few = tuple[list[int], list[int]]  # Numbers of the harmful and of the harmless prompts asked.
_Rank = tuple[bool, int, float]


class _Attribution:
    """Induce scores of all candidates to first order, from one backward pass.

    Adding a direction to every token changes the log-odds by about its inner product with their
    gradient. That ranks additions well but overrates large ones, so a few candidates, spread over
    the ranks, are measured, and a rising line through them brings all to scale.
    """

    def __init__(
        self,
        model: Model,
        batch: TokenBatch,
        tokens: RefusalTokens,
        candidates: Sequence[Direction],
        measured: Callable[[Direction], Tensor],
    ) -> None:
        sites = list(dict.fromkeys(one.site for one in candidates))

        def score(logits: Tensor) -> Tensor:
            return _logodds(logits.float(), tokens.ids)

        parts = batch.passes(tokens=model.tokens_per_pass)
        self.plain = torch.empty(len(batch))
        self.slopes = {site: torch.empty(len(batch), model.d_model) for site in sites}
        for index in parts:
            plain, slopes = model.gradients(batch.rows(index), score, sites)
            self.plain[index] = plain
            for site, slope in slopes.items():
                self.slopes[site][index] = slope.float()
        first = [float(self._first_order(one).mean()) for one in candidates]
        order = sorted(range(len(candidates)), key=lambda i: first[i])
        spread = np.linspace(0, len(order) - 1, min(_MEASURED, len(order))).round().astype(int)
        pairs = [
            (first[order[i]], value)
            for i in spread.tolist()
            if math.isfinite(value := float(measured(candidates[order[i]]).mean()))
            and math.isfinite(first[order[i]])
        ]
        self.line = None
        if len(pairs) > 2:
            from sklearn.isotonic import IsotonicRegression

            self.line = IsotonicRegression(out_of_bounds="clip").fit(*zip(*pairs, strict=True))

    def _first_order(self, direction: Direction) -> Tensor:
        vector = direction.unit.float() * direction.norm
        return self.plain + self.slopes[direction.site] @ vector

    def __call__(self, direction: Direction) -> Tensor:
        values = self._first_order(direction).double()
        if self.line is None or not bool(values.isfinite().all()):
            return values
        mean = float(values.mean())
        return values + (float(self.line.predict([mean])[0]) - mean)


class _Scorer:
    """Scores candidates on one model; what the unedited model does is computed once."""

    def __init__(
        self,
        model: Model,
        harmful: Sequence[str],
        harmless: Sequence[str],
        *,
        tokens: RefusalTokens,
        batch_size: int | None,
        few: _Few | None = None,
        attributed: Sequence[Direction] = (),
    ) -> None:
        self.model, self.tokens = model, tokens
        self.sizes = len(harmful), len(harmless)
        self.few = few
        if few is not None:
            harmful, harmless = [harmful[i] for i in few[0]], [harmless[i] for i in few[1]]
        self.n_harmful = len(harmful)
        self.both = Passes(model, model.encode([*harmful, *harmless]), batch_size)
        asked = model.encode(list(harmless))
        self.added = Passes(model, asked, batch_size, remember=True)
        plain = self.both.logits()
        self.plain_harmless = plain[self.n_harmful :]
        scores = refusal_logodds(plain, tokens.ids)
        self.harmful, self.harmless = scores[: self.n_harmful], scores[self.n_harmful :]
        self.attribution = None
        if attributed:
            self.attribution = _Attribution(model, asked, tokens, attributed, self._induce)

    def _induce(self, direction: Direction) -> Tensor:
        with applied(self.model, Add(direction)):
            return refusal_logodds(self.added.logits(), self.tokens.ids)

    def __call__(self, direction: Direction, *, exact: bool) -> Scores:
        try:
            with applied(self.model, Ablate(direction)):
                ablated = self.both.logits()
            induce = self.attribution(direction) if self.attribution else self._induce(direction)
        except NonFiniteError:
            return Scores(direction, None, None, None, exact, "NaN or infinite logits")
        if not bool(induce.isfinite().all()):  # A gradient may be, where logits are not.
            return Scores(direction, None, None, None, exact, "NaN or infinite gradients")
        return Scores(
            direction,
            self._among(0, refusal_logodds(ablated[: self.n_harmful], self.tokens.ids)),
            self._among(1, induce),
            self._among(1, kl_divergence(self.plain_harmless, ablated[self.n_harmful :])),
            exact,
        )

    def _among(self, side: int, values: Tensor) -> Tensor:
        if self.few is None:
            return values
        out = torch.full((self.sizes[side],), float("nan"), dtype=values.dtype)
        out[self.few[side]] = values
        return out


def _late(direction: Direction, criteria: Criteria, n_layers: int) -> bool:
    # The output of the last block counts as one layer beyond it.
    layer = direction.site.layer + (direction.site.kind == "resid_post")
    return criteria.last_layers_skipped > 0 and layer >= int(
        n_layers * (1 - criteria.last_layers_skipped)
    )


def _failures(row: Scores, criteria: Criteria, n_layers: int) -> list[str]:
    if row.bypass is None:
        return ["NaN or infinite logits"]
    _, induce, kl = row.means
    failed = []
    if _late(row.direction, criteria, n_layers):
        failed.append(f"in the last {criteria.last_layers_skipped:.0%} of the layers")
    if kl > criteria.max_kl:
        failed.append(f"KL above {criteria.max_kl:g} nats")
    if induce < criteria.min_induce:
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
    screen_prompts: int | None = None,
    finalists: int = 6,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Selection:
    """Score every candidate and choose the one whose ablation lowers refusal most.

    With a screen, all candidates are measured cheaply first: in a faster data type, on a few
    prompts, or both; on a few prompts the induce scores come from one backward pass, brought to
    scale by twelve candidates that are measured. The best eighth goes on to all prompts, the best
    `finalists` of it are measured exactly, and so is every other of it that could still win if its
    screened scores were as wrong as the worst of the finalists'. A random sample of the rest is
    measured exactly too, which tells how often the screen misses the best one.

    Args:
        model: The model that decides.
        candidates: One direction per site and position.
        harmful: Prompts for the bypass score; disjoint from those the directions were fitted on.
        harmless: Prompts for the induce score and KL.
        tokens: First tokens of refusals.
        criteria: What a candidate must pass.
        screen: A faster copy of the model (bfloat16) that screens; None screens with `model`.
        screen_prompts: Prompts a class, drawn at random, that all candidates are measured on; None
            is all.
        finalists: How many are measured exactly, and how many are drawn for the sample.
        batch_size: Most rows per pass; None is as many as the device is best given.
        seed: Draws prompts and sample.
        progress: Called with the number of evaluations done since the last call; there are
            `evaluations(len(candidates), ...)` of them, and those of doubtful candidates beyond.

    Raises:
        TooFewPromptsError: There is no candidate or no prompt.
        NonFiniteError: No candidate has finite logits.

    References:
        Arditi et al. 2024, arXiv:2406.11717, appendix C (direction selection).
    """
    if not candidates or not harmful or not harmless:
        raise TooFewPromptsError(
            f"{len(candidates)} candidates, {len(harmful)} harmful and {len(harmless)} harmless "
            "prompts to select with",
            "each must be at least 1",
        )

    def rank(row: Scores) -> _Rank:
        return _rank(row, criteria, model.n_layers)

    exact = _Scorer(model, harmful, harmless, tokens=tokens, batch_size=batch_size)
    plan = _Plan.of(
        len(candidates),
        finalists,
        few=screen_prompts is not None and screen_prompts < min(len(harmful), len(harmless)),
        faster=screen is not None and screen is not model,
    )
    course = _Course(candidates, exact, rank, progress)
    screening = None
    if plan.screened:
        quick = screen if plan.faster and screen is not None else model
        rng = torch.Generator().manual_seed(seed)

        def scorer(few: _Few | None) -> _Scorer:
            if quick is model and few is None:
                return exact
            # Where a few prompts are asked a rough answer will do: additions by their gradient.
            return _Scorer(
                quick,
                harmful,
                harmless,
                tokens=tokens,
                batch_size=batch_size,
                few=few,
                attributed=candidates if few is not None else (),
            )

        few = _draw(len(harmful), len(harmless), screen_prompts or 0, rng) if plan.few else None
        screening = course.screened(plan, scorer, few, rng)
    else:
        course.measure(range(len(candidates)), exact)
    chosen = course.best(range(len(candidates)))
    if chosen is None:
        raise NonFiniteError(
            "every candidate gives NaN or infinite logits", "try `--dtype float32`"
        )
    failures = [_failures(row, criteria, model.n_layers) for row in course.rows]
    rows = [
        replace(row, rejected_by=failed[0] if failed else None)
        for row, failed in zip(course.rows, failures, strict=True)
    ]
    return Selection(rows, chosen, bool(failures[chosen]), exact.harmful, exact.harmless, screening)


def _draw(harmful: int, harmless: int, n: int, rng: torch.Generator) -> _Few:
    drawn = (torch.randperm(size, generator=rng)[:n] for size in (harmful, harmless))
    a, b = (rows.sort().values.tolist() for rows in drawn)
    return a, b


class _Course:
    """The rows of a selection as they are measured, again and better.

    Attributes:
        rows: The latest scores of every candidate.
    """

    def __init__(
        self,
        candidates: Sequence[Direction],
        exact: _Scorer,
        rank: Callable[[Scores], _Rank],
        progress: Progress | None,
    ) -> None:
        self.candidates, self.exact, self.rank, self.progress = candidates, exact, rank, progress
        self.rows = [Scores(one, None, None, None, exact=False) for one in candidates]

    def measure(self, which: Iterable[int], scorer: _Scorer) -> None:
        """Measure some candidates; those that were measured exactly are left as they are."""
        for i in which:
            if not self.rows[i].exact:
                self.rows[i] = scorer(self.candidates[i], exact=scorer is self.exact)
            if self.progress is not None:
                self.progress(1)

    def order(self, among: Iterable[int]) -> list[int]:
        """Candidates with finite scores, the best first."""
        usable = [i for i in among if self.rows[i].bypass is not None]
        return sorted(usable, key=lambda i: self.rank(self.rows[i]))

    def best(self, among: Iterable[int]) -> int | None:
        """The best of those that were measured exactly."""
        return next(iter(self.order(i for i in among if self.rows[i].exact)), None)

    def screened(
        self,
        plan: _Plan,
        scorer: Callable[[_Few | None], _Scorer],
        few: _Few | None,
        rng: torch.Generator,
    ) -> Screen:
        """Measure all cheaply, the best better, and a sample of the rest for a check."""
        everyone = range(len(self.rows))
        self.measure(everyone, scorer(few))
        promoted = self.order(everyone)[: plan.promoted]
        if few is not None:
            self.measure(promoted, scorer(None))
        before = list(self.rows)
        self.measure(self.order(promoted)[: plan.finalists], self.exact)
        while (doubtful := self._doubtful(before, promoted)) is not None:
            self.rows[doubtful] = self.exact(self.candidates[doubtful], exact=True)
        chosen = self.best(promoted)
        rest = [i for i in everyone if not self.rows[i].exact]
        drawn: list[int] = torch.randperm(len(rest), generator=rng)[: plan.sample].tolist()
        sample = [rest[i] for i in drawn]
        self.measure(sample, self.exact)
        better = self.order(sample if chosen is None else [chosen, *sample])
        return Screen(
            None if few is None else len(few[0]),
            len(promoted),
            len(sample),
            better.index(chosen) if chosen is not None else len(better),
            *(
                _rank_correlation([before[i] for i in sample], [self.rows[i] for i in sample], k)
                for k in (0, 1)
            ),
        )

    def _doubtful(self, before: Sequence[Scores], promoted: Sequence[int]) -> int | None:
        """A promoted candidate that could win, were its scores as wrong as the worst seen."""
        chosen = self.best(promoted)
        if chosen is None:
            return None
        errors = [
            [abs(a - b) for a, b in zip(self.rows[i].means, before[i].means, strict=True)]
            for i in self.order(promoted)
            if self.rows[i].exact
        ]
        bypass, induce, kl = (max(column) for column in zip(*errors, strict=True))
        bar = self.rank(self.rows[chosen])
        for i in promoted:
            row = self.rows[i]
            if row.exact or row.bypass is None or row.induce is None or row.kl is None:
                continue
            hoped = replace(
                row, bypass=row.bypass - bypass, induce=row.induce + induce, kl=row.kl - kl
            )
            if self.rank(hoped) < bar:
                return i
        return None


def _rank_correlation(
    screened: Sequence[Scores], exact: Sequence[Scores], which: int
) -> float | None:
    pairs = [
        (a.means[which], b.means[which])
        for a, b in zip(screened, exact, strict=True)
        if a.bypass is not None and b.bypass is not None
    ]
    first, then = [a for a, _ in pairs], [b for _, b in pairs]
    if len(pairs) < 3 or len(set(first)) < 2 or len(set(then)) < 2:
        return None
    from scipy.stats import spearmanr

    return float(np.asarray(spearmanr(first, then))[0])


def relaxations(row: Scores, criteria: Criteria) -> int:
    """How often the limits would have to be relaxed for a candidate to pass; 0 if it passes.

    A step doubles the KL allowed and lowers the induce score asked for by one nat. This is what
    orders candidates when none passes: the bypass score alone would take those that break the
    model (measured: bypass -9.5 at a KL of 4.3 nats and 19 times the perplexity).
    """
    _, induce, kl = row.means
    too_costly = math.ceil(math.log2(kl / criteria.max_kl)) if kl > criteria.max_kl else 0
    too_weak = math.ceil(criteria.min_induce - induce) if induce < criteria.min_induce else 0
    return max(too_costly, too_weak)


def _rank(row: Scores, criteria: Criteria, n_layers: int) -> _Rank:
    # Never from the last layers, then with limits as near as can be to those asked for, then by
    # effect.
    return _late(row.direction, criteria, n_layers), relaxations(row, criteria), row.means[0]


@dataclass(frozen=True, slots=True)
class _Plan:
    """How many candidates each step of a selection measures."""

    candidates: int
    few: bool
    faster: bool
    promoted: int
    finalists: int
    sample: int

    @classmethod
    def of(cls, candidates: int, finalists: int, *, few: bool, faster: bool) -> _Plan:
        # A handful is measured exactly at once: screening it would only cost.
        if candidates <= 2 * finalists or not (few or faster):
            return cls(candidates, False, False, candidates, candidates, 0)
        promoted = max(2 * finalists, math.ceil(candidates / 8)) if few else candidates
        return cls(
            candidates, few, faster, promoted, finalists, min(finalists, candidates - finalists)
        )

    @property
    def screened(self) -> bool:
        return self.few or self.faster

    @property
    def evaluations(self) -> int:
        if not self.screened:
            return self.candidates
        return self.candidates + (self.promoted if self.few else 0) + self.finalists + self.sample


def evaluations(candidates: int, finalists: int, *, few: bool, faster: bool) -> int:
    """How many evaluations `select` will run at least, for a progress bar.

    Args:
        candidates: How many there are.
        finalists: As given to `select`.
        few: Whether all candidates are screened on a part of the prompts.
        faster: Whether a faster copy screens.
    """
    return _Plan.of(candidates, finalists, few=few, faster=faster).evaluations

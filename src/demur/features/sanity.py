"""Whether a bank explains what it reads, before anything is concluded from its latents.

A bank that reconstructs badly still has latents, and the best of 65,536 always looks meaningful.
The usual figures are taken on the prompts of the experiment, with sinks and position 0 apart: one
token with 100 times the norm of all others is nearly all the variance, and nearly all the error.

References:
    Lieberum et al. 2024, arXiv:2408.05147 (loss recovered, FVU); Karvonen et al. 2025,
    arXiv:2503.09532 (SAEBench); Sun et al. 2024, arXiv:2402.17762 (massive activations).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from demur.errors import ConfigError, TooFewPromptsError
from demur.features.bank import Bank
from demur.features.formats import fits
from demur.features.rows.sanity import BankCheck, BankPart
from demur.models import Conversation, Model, TokenBatch
from demur.progress import Progress
from demur.sites import Site, Span
from demur.stats import Estimate, bootstrap

_TIMES = 10.0  # Tokens with this many times the median norm are sinks.
_ROWS = 256  # Tokens that are encoded at once: of 65,536 latents 67 MB.
_DEAD, _DENSE = 1e-4, 0.2
_TEXT = (Span.EARLIER, Span.INSTRUCTION, Span.RESPONSE)
_DRAWS = 500

Replies = Sequence[str | Sequence[int] | None]


def suggest_largest_norm(
    model: Model,
    prompts: Sequence[str | Conversation],
    site: Site,
    replies: Replies | None = None,
    *,
    times: float = _TIMES,
    batch_size: int | None = None,
) -> float:
    """A norm above which tokens at a site are sinks: so many times the median of all but the first.

    Args:
        model: The model, unedited.
        prompts: Some prompts.
        site: Where norms are read.
        replies: What is said to them, as text or token ids.
        times: How many times the median.
        batch_size: Most prompts of a pass.

    References:
        dictionary_learning drops tokens of more than 10 times the median norm from training.
    """
    passes = _Rows(model, model.encode(prompts, replies), batch_size)
    return times * _norms(passes, site).median


def check_bank(
    bank: Bank,
    model: Model,
    prompts: Sequence[str | Conversation],
    replies: Replies | None = None,
    *,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> BankCheck:
    """Take the figures of a whole bank on a model's prompts and what is said to them.

    Args:
        bank: All latents, on the model's device. Where it has no `largest_norm`, one is suggested
            and used.
        model: The model, unedited.
        prompts: Two or more, of both classes where refusal is at stake.
        replies: What is said to them, as text or token ids; best the model's own.
        batch_size: Most prompts of a pass.
        seed: Of the bootstrap over prompts.
        progress: Called with the number of prompts done; every prompt is gone through six times.

    Raises:
        ConfigError: The bank is cut, or does not fit the model.
        TooFewPromptsError: There is one prompt, or no token to look at.
    """
    if len(bank) < bank.width:
        raise ConfigError(
            f"{bank.name} holds {len(bank)} of {bank.width} latents, which reconstruct nothing",
            "load the whole bank to check it",
        )
    notes = list(fits(bank, model))
    passes = _Rows(model, model.encode(prompts, replies), batch_size, progress)
    norms = _norms(passes, bank.site)
    limit_of: Literal["bank", "suggested"] = "bank"
    if bank.largest_norm is None:
        bank, limit_of = replace(bank, largest_norm=_TIMES * norms.median), "suggested"
        notes.append("the bank does not say which tokens are sinks: 10 x the median norm is taken")
    assert bank.largest_norm is not None
    skip = bool(bank.about.get("skip"))
    if skip:
        notes.append("without its skip connection, how well it reconstructs is not defined")
    sums = _sums(passes, bank)
    over = norms.values > bank.largest_norm
    losses = _Losses(passes, bank, sums.mean("text"))
    plain, zero, mean = losses.under(None), losses.under("zero"), losses.under("mean")
    spliced = None if skip else losses.under("bank")

    def per_token(loss: Tensor) -> Estimate:
        return _ratio(loss, losses.n_tokens, seed)

    def recovered(worst: Tensor, what: str) -> Estimate | None:
        if spliced is None:
            return None
        won, whole = (worst - spliced).numpy(), (worst - plain).numpy()
        if whole.sum() <= 1e-6 * float(plain.sum()):
            notes.append(
                f"{what} in place of the site cost nothing, so there is nothing to recover"
            )
            return None

        def share(index: np.ndarray) -> float:
            below = whole[index].sum()
            return float(won[index].sum() / below) if below > 0 else float("nan")

        try:
            return bootstrap(share, len(won), draws=_DRAWS, seed=seed)
        except TooFewPromptsError:
            notes.append(f"{what} in place of the site cost too little to say what is recovered")
            return None

    firing = sums.fired / max(1, int(sums.n.sum()))
    return BankCheck(
        name=bank.name,
        site=str(bank.site),
        writes=str(bank.writes),
        model=model.name,
        width=bank.width,
        activation=bank.activation,
        n_prompts=len(prompts),
        text=sums.part("text", seed, skip=skip),
        template=sums.part("template", seed, skip=skip),
        dead_share=float((firing < _DEAD).double().mean()),
        dense_share=float((firing > _DENSE).double().mean()),
        ce=per_token(plain),
        ce_spliced=None if spliced is None else per_token(spliced),
        ce_zero=per_token(zero),
        ce_mean=per_token(mean),
        recovered_zero=recovered(zero, "zeros"),
        recovered_mean=recovered(mean, "the mean token"),
        largest_norm=bank.largest_norm,
        limit_of=limit_of,
        n_sinks=int(over.sum()),
        n_sinks_first=int(over[norms.first].sum()),
        first_norm=float(norms.values[norms.first].median()) / norms.median,
        first_variance=norms.first_variance,
        notes=tuple(notes),
    )


def rankable(check: BankCheck, *, worst: float = 0.5) -> str | None:
    """Why a bank's latents should not be ranked, or None.

    Args:
        check: Its figures.
        worst: Most of the variance of text that may be unexplained.
    """
    fvu = check.text.fvu
    if fvu is not None and fvu.value > worst:
        return (
            f"{check.name} leaves {fvu.value:.2f} of the variance of text at {check.site} "
            f"unexplained, more than {worst:g}"
        )
    if check.text.l0 is not None and check.text.l0.value == 0:
        return f"no latent of {check.name} is active at any token of text at {check.site}"
    return None


# Inside --------------------------------------------------------------------------------------


class _Rows:
    """Prompts cut into passes of whole rows, with which tokens are text and which template."""

    def __init__(
        self,
        model: Model,
        batch: TokenBatch,
        batch_size: int | None,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.n, self.progress = model, len(batch), progress
        self.index = batch.passes(tokens=model.tokens_per_pass, rows=batch_size)
        self.parts = [batch.rows(index) for index in self.index]

    def text(self, part: TokenBatch) -> Bool[Tensor, "row token"]:
        """What user and assistant say."""
        out = torch.zeros_like(part.mask)
        for span in _TEXT:
            if span in part.spans:
                out |= part.spans[span]
        return out & part.mask

    def read(self, sites: Sequence[Site], take: Callable[..., None]) -> None:
        """Hand (numbers of prompts, rows, tensors of the sites) of each pass to `take`."""
        held: dict[Site, Tensor] = {}

        def keep(x: Tensor, site: Site) -> Tensor:
            held[site] = x.detach()
            return x

        with ExitStack() as undo:
            undo.enter_context(self.model.whole_rows())
            for site in dict.fromkeys(sites):
                undo.callback(self.model.intercept(site, lambda x, site=site: keep(x, site)))
            for index, part in zip(self.index, self.parts, strict=True):
                self.model.read(part)
                take(torch.tensor(index), part, *(held[site] for site in sites))
                held.clear()
                if self.progress is not None:
                    self.progress(len(index))


@dataclass(frozen=True, slots=True, eq=False)
class _Norms:
    values: Float[Tensor, " token"]
    first: Bool[Tensor, " token"]
    median: float
    first_variance: float


def _norms(rows: _Rows, site: Site) -> _Norms:
    """Norms of all tokens, and how much of the variance position 0 is."""
    values, first = [], []
    sums = {key: [torch.zeros(()), torch.zeros(()), 0] for key in (False, True)}

    def take(_: Tensor, part: TokenBatch, x: Tensor) -> None:
        leading = torch.zeros_like(part.mask)
        leading[:, 0] = True
        for at in (False, True):
            own = x[(part.mask & (leading == at)).to(x.device)].double().cpu()
            values.append(own.norm(dim=1))
            first.append(torch.full((len(own),), at))
            total, square, n = sums[at]
            sums[at] = [total + own.sum(0), square + own.pow(2).sum(), n + len(own)]

    rows.read([site], take)
    every, at_first = torch.cat(values), torch.cat(first)
    if not bool((~at_first).any()):
        raise TooFewPromptsError("every prompt is one token long", "give longer prompts")
    n = sums[False][2] + sums[True][2]
    mean = (sums[False][0] + sums[True][0]) / n
    about = [
        float(square - 2 * (total @ mean) + count * (mean @ mean))
        for total, square, count in (sums[False], sums[True])
    ]
    return _Norms(
        values=every.float(),
        first=at_first,
        median=float(every[~at_first].median()),
        first_variance=max(0.0, about[1]) / max(sum(about), torch.finfo(torch.float64).tiny),
    )


@dataclass(slots=True, eq=False)
class _Sums:
    """Sums over the tokens of each part and prompt."""

    miss: Float[Tensor, "part prompt"]
    square: Float[Tensor, "part prompt"]
    total: Float[Tensor, "part prompt d_model"]
    active: Float[Tensor, "part prompt"]
    cosine: Float[Tensor, "part prompt"]
    n: Float[Tensor, "part prompt"]
    fired: Float[Tensor, " latent"]

    def mean(self, where: Literal["text", "template"]) -> Float[Tensor, " d_model"]:
        """The mean token."""
        which = ("text", "template").index(where)
        if not bool(self.n[which].any()):
            raise TooFewPromptsError(
                f"no token of {where} is left without sinks and position 0", "give longer prompts"
            )
        return self.total[which].sum(0) / self.n[which].sum()

    def part(self, where: Literal["text", "template"], seed: int, *, skip: bool) -> BankPart:
        """Its row."""
        which = ("text", "template").index(where)
        n = self.n[which]
        if int((n > 0).sum()) < 2:
            return BankPart(where, int(n.sum()), None, None, None)
        mean = self.mean(where)
        spread = self.square[which] - 2 * self.total[which] @ mean + n * (mean @ mean)
        own = n > 0
        fvu = None if skip else _ratio(self.miss[which][own], spread[own], seed)
        cosine = None if skip else _ratio(self.cosine[which][own], n[own], seed)
        l0 = _ratio(self.active[which][own], n[own], seed)
        return BankPart(where, int(n.sum()), fvu, l0, cosine)


def _ratio(above: Tensor, below: Tensor, seed: int) -> Estimate:
    """Sum over sum, resampled by prompt."""
    first, second = above.double().numpy(), below.double().numpy()

    def ratio(index: np.ndarray) -> float:
        whole = second[index].sum()
        return float(first[index].sum() / whole) if whole > 0 else float("nan")

    return bootstrap(ratio, len(first), draws=_DRAWS, seed=seed)


def _sums(rows: _Rows, bank: Bank) -> _Sums:
    """How a bank reconstructs tokens, by part and prompt."""

    def empty(*more: int) -> Tensor:
        return torch.zeros(2, rows.n, *more, dtype=torch.float64)

    out = _Sums(
        empty(),
        empty(),
        empty(bank.d_model),
        empty(),
        empty(),
        empty(),
        torch.zeros(len(bank), dtype=torch.float64),
    )
    assert bank.writes is not None

    def take(index: Tensor, part: TokenBatch, x: Tensor, target: Tensor) -> None:
        text = rows.text(part)
        mask = part.mask & bank.usable(x).cpu()
        mask[:, 0] = False
        where, column = mask.nonzero(as_tuple=True)
        kind = (~text[where, column]).long()
        for some in torch.arange(len(where)).split(_ROWS):
            own, at = where[some], column[some]
            place = (kind[some], index[own])
            token = x[own.to(x.device), at.to(x.device)]
            wanted = target[own.to(x.device), at.to(x.device)].double()
            f = bank.encode(token)
            made = bank.decode(f, token).double()

            def add(sums: Tensor, values: Tensor, place: tuple[Tensor, Tensor] = place) -> None:
                sums.index_put_(place, values.double().cpu(), accumulate=True)

            add(out.miss, (wanted - made).pow(2).sum(1))
            add(out.square, wanted.pow(2).sum(1))
            add(out.total, wanted)
            add(out.active, (f > 0).sum(1))
            add(out.cosine, torch.nn.functional.cosine_similarity(wanted, made, dim=1))
            add(out.n, torch.ones(len(own)))
            out.fired += (f > 0).sum(0).double().cpu()

    rows.read([bank.site, bank.writes], take)
    return out


class _Losses:
    """Cross-entropy of text with something in place of a site at tokens of text."""

    def __init__(self, rows: _Rows, bank: Bank, mean: Tensor) -> None:
        self.rows, self.bank, self.mean = rows, bank, mean
        self.n_tokens = torch.zeros(rows.n, dtype=torch.float64)
        for index, part in zip(rows.index, rows.parts, strict=True):
            self.n_tokens[index] = rows.text(part)[:, 1:].sum(1).double()
        if not bool(self.n_tokens.any()):
            raise TooFewPromptsError("no token of text is predicted", "give longer prompts")

    def under(self, what: Literal["bank", "zero", "mean"] | None) -> Float[Tensor, " prompt"]:
        """Nats of each prompt, summed over its text."""
        rows, bank, model = self.rows, self.bank, self.rows.model
        assert bank.writes is not None
        out = torch.zeros(rows.n, dtype=torch.float64)
        seen: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            seen[:] = [x]
            return x

        def put(x: Tensor) -> Tensor:
            source = seen[0] if bank.is_transcoder else x
            where = mask & bank.usable(source)
            new = x.clone()
            if what == "bank":
                tokens = source[where]
                made = [bank.decode(bank.encode(some), some) for some in tokens.split(_ROWS)]
                if made:
                    new[where] = torch.cat(made).to(x.dtype)
            else:
                new[where] = 0.0 if what == "zero" else self.mean.to(x)
            return new

        with ExitStack() as undo:
            undo.enter_context(model.whole_rows())
            if what is not None:
                if bank.is_transcoder:
                    undo.callback(model.intercept(bank.site, keep))
                undo.callback(model.intercept(bank.writes, put))
            for index, part in zip(rows.index, rows.parts, strict=True):
                text = rows.text(part)
                mask = text.clone()
                mask[:, 0] = False
                mask = mask.to(model.device)
                states = model.final_states(part)
                for row, number in enumerate(index):
                    at = text[row, 1:].nonzero().flatten()
                    if not len(at):
                        continue
                    logits = model.unembed(states[row, at.to(states.device)])
                    target = part.ids[row, at + 1].to(logits.device)
                    loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
                    out[number] = float(loss)
                if rows.progress is not None:
                    rows.progress(len(index))
        return out

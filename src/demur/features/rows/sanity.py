"""Rows about whether a bank explains what it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from demur.stats import Estimate


@dataclass(frozen=True, slots=True)
class BankPart:
    """How well a bank reconstructs some of the tokens; sinks and position 0 are left out.

    Attributes:
        where: "text", what user and assistant say, or "template", what stands around it.
        n_tokens: Tokens behind the figures.
        fvu: Share of variance that is not explained, about the mean of these tokens; 0 is perfect,
            1 no better than the mean, and it has no upper end. None for a bank whose skip
            connection is not read, and where there are no such tokens.
        l0: Mean number of active latents at a token.
        cosine: Mean cosine of a token and its reconstruction, -1 to 1; None as `fvu`.
    """

    where: Literal["text", "template"]
    n_tokens: int
    fvu: Estimate | None
    l0: Estimate | None
    cosine: Estimate | None


@dataclass(frozen=True, slots=True)
class BankCheck:
    """Whether a bank explains what it reads, on prompts of a model.

    Cross-entropies are in nats per token, over the tokens of text that are predicted from one
    before; the site is replaced at tokens of text only, sinks and position 0 left alone.

    Attributes:
        name: Of the bank.
        site: The tensor that it reads, such as "15.resid_post".
        writes: The tensor that it writes; another one for a transcoder.
        model: Name of the model.
        width: Latents of the bank.
        activation: "relu", "jumprelu" or "topk".
        n_prompts: Prompts behind all figures.
        text: Tokens of what is said.
        template: Tokens of the template.
        dead_share: Share of latents that are active at less than one in 10,000 tokens of both
            parts; with fewer tokens than that, of those that never are.
        dense_share: Share of latents that are active at more than 20 % of tokens.
        ce: Cross-entropy of the model as it is.
        ce_spliced: With the reconstruction in place; None as `fvu`.
        ce_zero: With zeros in place.
        ce_mean: With the mean token in place.
        recovered_zero: Share of the loss between zeros and the model that the reconstruction wins
            back, 1 is all of it; None as `fvu`, or where zeros cost nothing.
        recovered_mean: The same against the mean token.
        largest_norm: Above this norm, in residual-stream units, tokens were taken for sinks.
        limit_of: Whether the limit is the bank's own, or suggested: 10 x the median norm.
        n_sinks: Tokens above the limit, position 0 counted.
        n_sinks_first: How many of them stand at position 0.
        first_norm: Median norm at position 0, over the median norm elsewhere.
        first_variance: Share of the variance of all tokens that position 0 is, 0 to 1.
        notes: What a reader should know: other weights, a base model's bank, parts left out.
    """

    name: str
    site: str
    writes: str
    model: str
    width: int
    activation: str
    n_prompts: int
    text: BankPart
    template: BankPart
    dead_share: float
    dense_share: float
    ce: Estimate
    ce_spliced: Estimate | None
    ce_zero: Estimate
    ce_mean: Estimate
    recovered_zero: Estimate | None
    recovered_mean: Estimate | None
    largest_norm: float
    limit_of: Literal["bank", "suggested"]
    n_sinks: int
    n_sinks_first: int
    first_norm: float
    first_variance: float
    notes: tuple[str, ...]

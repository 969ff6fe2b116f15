"""What latents do for refusal, from gradients: an estimate that screens, and proves nothing.

The gradient of the refusal log-odds with respect to the stream at a token, times a latent's decoder
row, times its activation less what it would be in another run, says to first order how much of the
log-odds the latent accounts for. Positive promotes refusal: taking the latent away lowers them. The
estimate fails where norms and softmax bend, so `demur.features.verify` intervenes.

References:
    Nanda 2023, "Attribution patching"; Marks, Rager, Michaud, Belinkov, Bau, Mueller 2024,
    arXiv:2403.19647 (for latents, with integrated gradients); Yeo et al. 2025, arXiv:2505.23556.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from demur.errors import ConfigError, NonFiniteError, UnknownNameError
from demur.features.bank import Bank
from demur.features.clamp import EDITED
from demur.features.read import by_name
from demur.models import Conversation, Model, TokenBatch
from demur.progress import Progress
from demur.selection import RefusalTokens, refusal_logodds
from demur.sites import Site, Span
from demur.stats import Estimate, mean

Baseline: TypeAlias = Literal["zero"] | Mapping[str, Tensor]
"""What latents are compared with: 0, or by name of the bank one activation a latent."""

_GRADIENT_TOKENS = 512  # Of a pass with gradients.


@dataclass(frozen=True, slots=True, eq=False)
class Attribution:
    """What each latent does for refusal, estimated.

    Attributes:
        values: By name of the bank: nats of refusal log-odds; above 0 the latent promotes refusal.
            Summed over tokens.
        ids: By name of the bank, the latents' numbers.
        clean: Refusal log-odds of each prompt, nats.
        steps: Of the integral; 0 is first order.
        baseline: In words.
    """

    values: dict[str, Float[np.ndarray, "prompt latent"]]
    ids: dict[str, tuple[int, ...]]
    clean: Float[np.ndarray, " prompt"]
    steps: int
    baseline: str

    def mean(self, bank: str) -> Float[np.ndarray, " latent"]:
        """Over prompts.

        Raises:
            UnknownNameError: The bank was not attributed to.
        """
        if bank not in self.values:
            raise UnknownNameError.among(self.values, kind="bank", name=bank)
        return self.values[bank].mean(0)

    def of(self, bank: str, latent: int) -> Float[np.ndarray, " prompt"]:
        """Of one latent, by prompt.

        Raises:
            UnknownNameError: The bank was not attributed to, or the latent is not in it.
        """
        if bank not in self.values:
            raise UnknownNameError.among(self.values, kind="bank", name=bank)
        if latent not in self.ids[bank]:
            raise UnknownNameError(
                f"latent {latent} of {bank} has no attribution", "attribute to a bank that holds it"
            )
        return self.values[bank][:, self.ids[bank].index(latent)]

    def estimate(self, bank: str, latent: int) -> Estimate:
        """Mean over prompts with its interval.

        Raises:
            TooFewPromptsError: There is one prompt.
            UnknownNameError: As for `of`.
        """
        return mean(self.of(bank, latent))


def attribute(
    model: Model,
    banks: Sequence[Bank],
    prompts: Sequence[str | Conversation] | TokenBatch,
    tokens: RefusalTokens | Sequence[int],
    *,
    baseline: Baseline = "zero",
    steps: int = 0,
    where: Sequence[Span] = EDITED,
    tokens_per_pass: int = _GRADIENT_TOKENS,
    progress: Progress | None = None,
) -> Attribution:
    """Estimate what every latent does for the refusal log-odds.

    With `steps` at 0, the gradient is that of the unedited run, of all banks at once. Else it is
    the mean along a straight path from the unedited run (all latents as they are) to the run in
    which *all latents of the bank given* are at the baseline, one bank at a time, at the midpoints
    of `steps` parts; what the bank does not explain stays. The attributions of a bank then add up
    to the difference of the log-odds between both runs. Of a whole bank that is a long way, so give
    banks cut to candidates.

    Args:
        model: Unedited; float32 is best.
        banks: What to attribute to.
        prompts: Harmful ones, for what makes the model refuse.
        tokens: First tokens of refusals.
        baseline: What latents are compared with: 0, or for instance means on harmless prompts.
        steps: 0 for first order, 10 or so for integrated gradients.
        where: Tokens at which latents would be changed.
        tokens_per_pass: Most tokens of a pass; results do not depend on it.
        progress: Called with the number of passes over a prompt done since the last call; see
            `steps_of`.

    Raises:
        NonFiniteError: A gradient or an activation is NaN or infinite.
        ConfigError: There are no banks, two are called the same, or a baseline is missing.
    """
    named = {name: bank.to(model.device) for name, bank in by_name(banks).items()}
    targets = {name: _target(bank, baseline) for name, bank in named.items()}
    ids = tokens.ids if isinstance(tokens, RefusalTokens) else tuple(tokens)
    batch = prompts if isinstance(prompts, TokenBatch) else model.encode(prompts)
    batch = replace(batch, shared=0)
    out = {name: np.zeros((len(batch), len(bank))) for name, bank in named.items()}
    clean = np.zeros(len(batch))
    # Banks that share a run, and how far along the path it is.
    runs: list[tuple[list[str], float]] = [(list(named), 0.0)]
    if steps:
        runs = [([name], (k + 0.5) / steps) for name in named for k in range(steps)]
    for index in batch.passes(tokens=tokens_per_pass):
        rows = batch.rows(index)
        mask = _spanned(rows, where).to(model.device)
        for names, along in runs:
            scores, found = _run(
                model,
                rows,
                mask,
                ids=ids,
                banks=[named[n] for n in names],
                targets=targets,
                along=along,
            )
            for name in names:
                out[name][index] += found[name].double().cpu().numpy() / max(steps, 1)
            if along == 0.0:
                clean[index] = scores.numpy()
            if progress is not None:
                progress(len(index))
        if steps:
            clean[index] = refusal_logodds(model.logits(rows), ids).numpy()
    if not all(np.isfinite(one).all() for one in (*out.values(), clean)):
        raise NonFiniteError(
            f"attributions of {model.name} are NaN or infinite",
            "try `--dtype float32`; the checkpoint may also be damaged",
        )
    words = "zero" if isinstance(baseline, str) else "mean on harmless prompts"
    held = {name: tuple(bank.ids.tolist()) for name, bank in named.items()}
    return Attribution(out, held, clean, steps, words)


def steps_of(n_prompts: int, n_banks: int, steps: int) -> int:
    """What the `progress` of `attribute` adds up to."""
    return n_prompts * (n_banks * steps if steps else 1)


def _target(bank: Bank, baseline: Baseline) -> Float[Tensor, " latent"]:
    if isinstance(baseline, str):
        return torch.zeros(len(bank), device=bank.encoder.device)
    if bank.name not in baseline or len(baseline[bank.name]) != len(bank):
        raise ConfigError(
            f"there is no baseline for the {len(bank)} latents of {bank.name}",
            "give one activation for each latent that the bank holds",
        )
    return baseline[bank.name].to(bank.encoder.device)


def _spanned(rows: TokenBatch, where: Sequence[Span]) -> Bool[Tensor, "row token"]:
    mask = torch.zeros_like(rows.mask)
    for span in where:
        if span in rows.spans:
            mask = mask | rows.spans[span]
    return mask


def _run(
    model: Model,
    rows: TokenBatch,
    mask: Bool[Tensor, "row token"],
    *,
    ids: Sequence[int],
    banks: Sequence[Bank],
    targets: Mapping[str, Tensor],
    along: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores of one run, and its gradients times decoder rows times changes of activations.

    The run is that of a stream moved by `along` of the way to the one with targets; that can be
    done for one bank only, since the path of a later one would begin elsewhere.
    """
    read: dict[Site, Tensor] = {}
    leaves: dict[Site, Tensor] = {}
    apart: dict[str, Tensor] = {}

    def keep(x: Tensor, site: Site) -> Tensor:
        read[site] = x.detach()
        return x

    def watch(x: Tensor, site: Site) -> Tensor:
        if along:
            (bank,) = banks
            change = _change(bank, read.get(bank.site, x.detach()))
            moved = along * change @ bank.decoder.to(change)
            x = (x.detach().to(moved) + moved * _scale(bank, x)).to(x.dtype)
        leaves[site] = x if x.requires_grad else x.detach().clone().requires_grad_()
        return leaves[site]

    def _scale(bank: Bank, x: Tensor) -> Tensor:
        return bank.scale(read.get(bank.site, x).detach())

    def _change(bank: Bank, x: Tensor) -> Tensor:
        """How far activations are moved, 0 where they are not."""
        f = bank.encode(x)
        there = (mask & bank.usable(x)).unsqueeze(-1).to(f)
        apart[bank.name] = (targets[bank.name].to(f) - f) * there
        return apart[bank.name]

    sites = list(dict.fromkeys(bank.writes for bank in banks if bank.writes is not None))
    with ExitStack() as undo:
        states_of, head = undo.enter_context(model.differentiable())
        for site in dict.fromkeys(bank.site for bank in banks):
            undo.callback(model.intercept(site, partial(keep, site=site)))
        for site in sites:
            undo.callback(model.intercept(site, partial(watch, site=site)))
        states = states_of(rows)
        last = states[torch.arange(len(rows)), rows.ends.to(states.device) - 1]
        scores = refusal_logodds(head(last), ids)
        grads = torch.autograd.grad(scores.sum(), [leaves[site] for site in sites])
    by_site = dict(zip(sites, grads, strict=True))
    out: dict[str, Tensor] = {}
    with torch.no_grad():
        for bank in banks:
            assert bank.writes is not None
            x = read[bank.site]
            change = apart[bank.name] if along else _change(bank, x)
            slope = by_site[bank.writes].to(change) * bank.scale(x).to(change)
            # Turned: what taking the latent away would cost the log-odds.
            out[bank.name] = -((slope @ bank.decoder.to(change).T) * change).sum(1)
    return scores.detach(), out

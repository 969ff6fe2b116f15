"""What latents do on prompts: activations at named places, how often they fire, how strongly.

One pass over the prompts serves several banks. What the template writes in front of a prompt is
left out, position 0 with it, and so are attention sinks. For banks that fit in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from demur.errors import ConfigError, NonFiniteError, TemplateError, UnknownNameError
from demur.features.bank import Bank
from demur.models import Conversation, Model, TokenBatch
from demur.progress import Progress
from demur.sites import Site, Span

T_INST, LAST = "t_inst", "last"
"""Places: the last token of the instruction, and the last token of the prompt."""

_TAIL = 0.01  # What lies above the quantile that is called q99.


@dataclass(frozen=True, slots=True, eq=False)
class BankReads:
    """What the latents of one bank do on some prompts; all on the CPU.

    Attributes:
        places: `t_inst`, `last`, and `<span>.mean` and `<span>.max` of each span.
        values: Activations in the bank's units, float32 or wider.
        tokens: How many tokens of the spans were counted.
        sinks: How many more were left out, as the bank was not made for them.
        firing: Share of the counted tokens at which a latent is active.
        mass: Mean activation over the counted tokens, silent ones too.
        q99: 99 % quantile of a latent's activations where it is active; 0 if it never is.
        largest: Its largest activation.
    """

    places: tuple[str, ...]
    values: Float[Tensor, "place prompt latent"]
    tokens: int
    sinks: int
    firing: Float[Tensor, " latent"]
    mass: Float[Tensor, " latent"]
    q99: Float[Tensor, " latent"]
    largest: Float[Tensor, " latent"]

    def at(self, place: str) -> Float[Tensor, "prompt latent"]:
        """Activations at one place.

        Raises:
            UnknownNameError: The place was not read.
        """
        if place not in self.places:
            raise UnknownNameError.among(self.places, kind="place", name=place)
        return self.values[self.places.index(place)]


@dataclass(frozen=True, slots=True, eq=False)
class LatentReads:
    """What several banks do on the same prompts.

    Attributes:
        banks: In the order given; their names differ.
        reads: By name of the bank.
        spans: What was counted, and averaged over.
        n: Prompts.
    """

    banks: tuple[Bank, ...]
    reads: dict[str, BankReads]
    spans: tuple[Span, ...]
    n: int


def by_name(banks: Sequence[Bank]) -> dict[str, Bank]:
    """Banks by their names.

    Raises:
        ConfigError: There are none, or two are called the same.
    """
    named = {bank.name: bank for bank in banks}
    if not banks or len(named) < len(banks):
        raise ConfigError(
            f"got {len(banks)} banks with {len(named)} names", "give banks of different names"
        )
    return named


def read_latents(
    model: Model,
    banks: Sequence[Bank],
    prompts: Sequence[str | Conversation],
    *,
    replies: Sequence[str | Sequence[int] | None] | None = None,
    spans: Sequence[Span] | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> LatentReads:
    """Read what latents do on prompts, in one pass for all banks.

    Args:
        model: Under whatever edits are in force.
        banks: Whole ones or some of their latents.
        prompts: User messages, or conversations.
        replies: What the reply to each begins with; None for none.
        spans: Which tokens are averaged over and counted; None is the instruction, the template
            behind it, and the reply where there is one.
        batch_size: Most prompts of a pass; results do not depend on it.
        progress: Called with the number of prompts done since the last call.

    Raises:
        TemplateError: A prompt has no token of one of the spans.
        NonFiniteError: An activation is NaN or infinite.
        ConfigError: There are no banks, or two are called the same.
    """
    named = by_name(banks)
    if spans is None:
        spans = (Span.INSTRUCTION, Span.POST_INSTRUCTION)
        spans = spans if replies is None else (*spans, Span.RESPONSE)
    whole = model.encode(prompts, replies)
    for span in spans:
        if span not in whole.spans or not bool(whole.spans[span].any(1).all()):
            raise TemplateError(
                f"a prompt has no token of the span `{span}`", "leave that span out"
            )
    named = {name: bank.to(model.device) for name, bank in named.items()}
    running = {name: _Running(bank, spans, whole) for name, bank in named.items()}
    sites = list(dict.fromkeys(bank.site for bank in named.values()))
    held: dict[Site, Tensor] = {}

    def keep(x: Tensor, site: Site) -> Tensor:
        if model.chunk is not None and not model.chunk.is_prefix:
            held[site] = x.detach()
        return x

    with torch.no_grad(), ExitStack() as undo:
        undo.enter_context(model.prefix_kept())
        for site in sites:
            undo.callback(model.intercept(site, partial(keep, site=site)))
        for index in whole.passes(tokens=model.tokens_per_pass, rows=batch_size):
            rows = whole.rows(index)
            model.read(rows)
            for one in running.values():
                one.update(index, rows, held[one.bank.site])
            held.clear()
            if progress is not None:
                progress(len(index))
    return LatentReads(
        tuple(banks),
        {name: one.done() for name, one in running.items()},
        tuple(spans),
        len(prompts),
    )


def last_of(mask: Bool[Tensor, "row token"]) -> Int[Tensor, " row"]:
    """Index of the last token of each row that is marked."""
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(1)


class _Running:
    """Figures of one bank, pass by pass."""

    def __init__(self, bank: Bank, spans: Sequence[Span], whole: TokenBatch) -> None:
        self.bank, self.spans = bank, tuple(spans)
        self.places = (T_INST, LAST, *(f"{s}.{how}" for s in spans for how in ("mean", "max")))
        wide = torch.promote_types(bank.encoder.dtype, torch.float32)
        self.values = torch.zeros(len(self.places), len(whole), len(bank), dtype=wide)
        most = sum(int(whole.spans[span].sum()) for span in self.spans)
        # The quantile of any number of active tokens lies among these.
        self.top = torch.zeros(len(bank), int(_TAIL * most) + 2, device=bank.encoder.device)
        self.active = torch.zeros(len(bank), dtype=torch.long, device=bank.encoder.device)
        self.sum = torch.zeros(len(bank), dtype=torch.float64, device=bank.encoder.device)
        self.tokens = self.sinks = 0

    def update(self, index: list[int], rows: TokenBatch, x: Tensor) -> None:
        """Take in a pass; `x` may lack the shared prefix."""
        width = x.shape[1]
        usable = self.bank.usable(x)
        f = self.bank.encode(x)
        if not bool(torch.isfinite(f).all()):
            raise NonFiniteError(
                f"activations of {self.bank.name} are NaN or infinite",
                "try `--dtype float32`; the checkpoint or the bank may also be damaged",
            )

        def here(mask: Tensor) -> Tensor:
            return mask[:, -width:].to(x.device)

        every = torch.arange(len(f), device=f.device)
        prompt = rows.mask & ~rows.spans.get(Span.RESPONSE, torch.zeros_like(rows.mask))
        at = [f[every, last_of(here(rows.spans[Span.INSTRUCTION]))]]
        at.append(f[every, last_of(here(prompt))])
        counted = torch.zeros_like(usable)
        for span in self.spans:
            mask = here(rows.spans[span]) & usable
            counted |= mask
            weights = mask.to(f) / mask.sum(1, keepdim=True).clamp_min(1)
            at.append(torch.einsum("rt,rtl->rl", weights, f))
            at.append((f * mask.unsqueeze(2)).amax(1))
        self.values[:, index] = torch.stack(at).to(self.values)
        seen = f[counted].float()
        self.tokens += len(seen)
        self.sinks += sum(int((here(rows.spans[s]) & ~usable).sum()) for s in self.spans)
        self.active += (seen > 0).sum(0)
        self.sum += seen.double().sum(0)
        both = torch.cat([self.top, seen.T], dim=1)
        self.top = both.topk(self.top.shape[1], dim=1).values

    def done(self) -> BankReads:
        """The figures."""
        n = self.active.double()
        # Linear between order statistics, as numpy has it, counted from the largest.
        place = ((n - 1) * _TAIL).clamp_min(0)
        low = place.long().clamp(max=self.top.shape[1] - 2)
        upper = self.top.gather(1, low.unsqueeze(1)).squeeze(1).double()
        lower = self.top.gather(1, low.unsqueeze(1) + 1).squeeze(1).double()
        q99 = torch.where(place > low, upper + (place - low) * (lower - upper), upper)
        return BankReads(
            self.places,
            self.values,
            self.tokens,
            self.sinks,
            (n / max(self.tokens, 1)).float().cpu(),
            (self.sum / max(self.tokens, 1)).float().cpu(),
            q99.float().cpu(),
            self.top[:, 0].float().cpu(),
        )

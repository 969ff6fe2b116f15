"""Latents changed, and nothing else: the part of the stream that the bank does not explain stays.

With f the activations of some latents and f' what they are to be, a token moves by
`scale * (f' - f) @ decoder`. Neither the whole bank nor a reconstruction is needed, so a few
hundred latents of a bank of 65,536 cost nothing, and every row of a batch can have its own edit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from demur.errors import ConfigError
from demur.features.bank import Bank
from demur.interventions import tokens_chosen
from demur.models import Model
from demur.sites import Site, Span

# Where latents are edited unless told otherwise: all but what the template writes before a prompt.
EDITED = (Span.EARLIER, Span.INSTRUCTION, Span.POST_INSTRUCTION, Span.RESPONSE)


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """What becomes of latents: `min(max(times * f + plus, low), high)`, one number a latent.

    Rows of a batch can have rules of their own: then every field is (row, latent).

    Attributes:
        times: Factor of the activation.
        plus: What is added to it, in the bank's units.
        low: The least that it may be.
        high: The most that it may be.
        firing: Whether only latents that are active are changed; a latent that is silent then
            stays so.
    """

    times: Float[Tensor, "*row latent"]
    plus: Float[Tensor, "*row latent"]
    low: Float[Tensor, "*row latent"]
    high: Float[Tensor, "*row latent"]
    firing: bool = False

    @classmethod
    def of(
        cls,
        n: int,
        *,
        times: float | Sequence[float] | Tensor = 1.0,
        plus: float | Sequence[float] | Tensor = 0.0,
        low: float | Sequence[float] | Tensor = -torch.inf,
        high: float | Sequence[float] | Tensor = torch.inf,
        firing: bool = False,
    ) -> Rule:
        """A rule for `n` latents, from one number or one a latent."""

        def spread(value: float | Sequence[float] | Tensor) -> Tensor:
            return torch.as_tensor(value, dtype=torch.float32).expand(n).clone()

        return cls(spread(times), spread(plus), spread(low), spread(high), firing)

    @classmethod
    def zero(cls, n: int) -> Rule:
        """Switch latents off."""
        return cls.of(n, times=0.0)

    @classmethod
    def scale(cls, n: int, factor: float) -> Rule:
        """Multiply activations; a negative factor leaves what latents can be, so it is steering."""
        return cls.of(n, times=factor)

    @classmethod
    def clamp(
        cls, n: int, value: float | Sequence[float] | Tensor, *, firing: bool = False
    ) -> Rule:
        """Set activations to a value, at every token or only where a latent fires."""
        return cls.of(n, times=0.0, plus=value, firing=firing)

    @classmethod
    def at_least(cls, n: int, value: float | Sequence[float] | Tensor) -> Rule:
        """Lift activations to a value; what lies above stays ("min-clamp")."""
        return cls.of(n, low=value)

    @classmethod
    def mean(cls, values: Float[Tensor, " latent"]) -> Rule:
        """Set activations to their means over other prompts."""
        return cls.of(len(values), times=0.0, plus=values)

    @classmethod
    def nothing(cls, n: int) -> Rule:
        """Leave latents as they are."""
        return cls.of(n)

    @classmethod
    def rows(cls, rules: Sequence[Rule]) -> Rule:
        """A rule of its own for every row.

        Raises:
            ConfigError: Some rules are for firing latents only, and some are not.
        """
        if len({one.firing for one in rules}) > 1:
            raise ConfigError(
                "some of the rules are for firing latents only, and some are not",
                "apply them in two batches",
            )
        parts = ("times", "plus", "low", "high")
        return cls(
            *(torch.stack([getattr(one, part) for one in rules]) for part in parts),
            firing=rules[0].firing,
        )

    @property
    def per_row(self) -> bool:
        """Whether rows have rules of their own."""
        return self.times.ndim > 1

    def __call__(self, f: Float[Tensor, "*row latent"]) -> Float[Tensor, "*row latent"]:
        """What activations become."""

        def like(value: Tensor) -> Tensor:
            out = value.to(f)
            return out.unsqueeze(-2) if self.per_row and f.ndim > 2 else out

        out = f * like(self.times) + like(self.plus)
        out = torch.minimum(torch.maximum(out, like(self.low)), like(self.high))
        return torch.where(f > 0, out, f) if self.firing else out

    def taken(self, index: Tensor) -> Rule:
        """The rules of some rows."""
        if not self.per_row:
            return self
        at = index.to(self.times.device)  # Tables stay where they were made.
        return Rule(self.times[at], self.plus[at], self.low[at], self.high[at], self.firing)


def shift(
    bank: Bank,
    rule: Rule,
    x: Float[Tensor, "*row d_model"],
    *,
    limit: float | None = None,
    error: Literal["keep", "drop"] = "keep",
) -> Float[Tensor, "*row d_model"]:
    """How far a rule moves tokens, float32 or wider, in residual-stream units.

    Args:
        bank: The latents that the rule is for.
        rule: What becomes of them.
        x: Tokens at the site that the bank reads.
        limit: No token moves by more than this share of its own norm.
        error: "drop" moves to the bare reconstruction, as some published code does; it needs the
            whole bank, and a bank that writes where it reads.

    Raises:
        ConfigError: `error` is "drop" and the bank is cut, or a transcoder.
    """
    f = bank.encode(x)
    new = rule(f)
    if error == "drop":
        if len(bank) < bank.width or bank.is_transcoder:
            raise ConfigError(
                f"{bank.name} holds {len(bank)} of {bank.width} latents, which reconstruct nothing",
                "load the whole bank of an autoencoder, or keep the error",
            )
        moved = bank.decode(new, x) - x.to(new)
    else:
        moved = ((new - f) @ bank.decoder.to(f)) * bank.scale(x).to(f)
    moved = moved * bank.usable(x).unsqueeze(-1).to(moved)
    if limit is not None:
        size = moved.norm(dim=-1, keepdim=True)
        most = limit * x.to(moved).norm(dim=-1, keepdim=True)
        moved = moved * (most / size.clamp_min(torch.finfo(moved.dtype).tiny)).clamp_max(1.0)
    return moved


@dataclass(frozen=True, slots=True, eq=False)
class Clamp:
    """Change latents of an autoencoder, the same way in every row.

    An `Intervention`: which tokens and prompts it is for is said where it is applied. See
    `clamping` for rows with rules of their own, for transcoders, and for what most people want:
    everything but the template's beginning.

    Attributes:
        bank: The latents, cut with `Bank.sliced`.
        rule: What becomes of them.
        limit: No token moves by more than this share of its own norm.
        error: "keep" leaves what the bank does not explain untouched; see `shift`.
    """

    bank: Bank
    rule: Rule
    limit: float | None = None
    error: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        if self.rule.times.shape[-1] != len(self.bank):
            raise ConfigError(
                f"the rule is for {self.rule.times.shape[-1]} latents, the bank holds "
                f"{len(self.bank)}",
                "cut the bank to the latents that the rule is for",
            )

    def sites(self, model: Model) -> tuple[Site, ...]:
        """The one that the bank reads and writes."""
        del model
        if self.bank.is_transcoder or self.rule.per_row:
            raise ConfigError(
                f"{self.bank.name} reads one tensor and writes another, or rows have their own "
                "rules",
                "apply it with `demur.features.clamp.clamping`",
            )
        return (self.bank.site,)

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Move each token along the decoder rows of its changed latents."""
        moved = shift(self.bank, self.rule, x, limit=self.limit, error=self.error)
        return (x.to(moved) + moved).to(x.dtype)


@dataclass(slots=True)
class Sizes:
    """How far tokens were moved, as a share of their norm; filled while the model runs.

    Attributes:
        shares: Sum over edited tokens of |shift| / |token|, by site.
        tokens: How many tokens were edited, by site.
    """

    shares: dict[Site, float] = field(default_factory=dict)
    tokens: dict[Site, int] = field(default_factory=dict)

    def mean(self, site: Site) -> float | None:
        """Mean share at a site; None before anything was edited."""
        return self.shares[site] / self.tokens[site] if self.tokens.get(site) else None


@contextmanager
def clamping(
    model: Model,
    *clamps: Clamp,
    where: Sequence[Span] | None = EDITED,
    when: Bool[Tensor, " prompt"] | None = None,
) -> Iterator[Sizes]:
    """Run `model` with latents changed, and restore it after.

    Args:
        model: The model to edit.
        clamps: What to change. Rules with rows are taken by the number of each prompt in the call
            of `encode` or `generate` inside.
        where: At tokens of these spans; None is every token. What the template writes before a
            prompt is left out unless asked for: the first token is a sink in many models.
        when: Only for these prompts, numbered as in the call inside, such as those that a detector
            flags; None is all.

    Yields:
        How far tokens were moved.

    Raises:
        ConfigError: The model is called directly, so that nobody knows which tokens and prompts
            rows stand for; or a transcoder reads where the model has no site.
    """
    sizes = Sizes()
    read: dict[int, Tensor] = {}

    def act(x: Tensor, *, number: int, clamp: Clamp) -> Tensor:
        mask = tokens_chosen(model, x, where, when).to(x.device)
        chunk = model.chunk
        rows = None if chunk is None or chunk.rows is None else chunk.rows.to(x.device)
        rule = clamp.rule
        if rule.per_row:
            if rows is None:
                return x.clone()  # The shared prefix; `where` has nothing in it.
            rule = rule.taken(rows)
        source = read[number] if clamp.bank.is_transcoder else x
        moved = shift(clamp.bank, rule, source, limit=clamp.limit, error=clamp.error)
        moved = moved * mask.unsqueeze(-1).to(moved)
        site = clamp.bank.writes or clamp.bank.site
        touched = mask & (moved.detach().abs().amax(dim=-1) > 0)
        if bool(touched.any()):
            share = moved.detach()[touched].norm(dim=-1) / x.detach()[touched].float().norm(dim=-1)
            sizes.shares[site] = sizes.shares.get(site, 0.0) + float(share.sum())
            sizes.tokens[site] = sizes.tokens.get(site, 0) + int(touched.sum())
        return (x.to(moved) + moved).to(x.dtype)

    def keep(x: Tensor, *, number: int) -> Tensor:
        read[number] = x
        return x

    with ExitStack() as undo:
        if when is not None or any(one.rule.per_row for one in clamps):
            undo.enter_context(model.whole_rows())
        for number, clamp in enumerate(clamps):
            bank = clamp.bank
            assert bank.writes is not None
            if bank.is_transcoder:
                undo.callback(model.intercept(bank.site, partial(keep, number=number)))
            undo.callback(model.intercept(bank.writes, partial(act, number=number, clamp=clamp)))
        yield sizes

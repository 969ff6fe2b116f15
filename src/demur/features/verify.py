"""Really changing latents: many different edits in one batch, and what holds against random ones.

Rows of a batch are pairs of an edit and a prompt. A pass starts at the block where its edits begin,
from the stream that the blocks before left once and for all. An edit that changes nothing at the
unedited activations of a prompt, such as switching off a latent that is silent there, changes
nothing at all, so that row is not run and its effect is exactly 0; with sparse latents that is
most rows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from demur.errors import ConfigError, NonFiniteError, TooFewPromptsError
from demur.features.attribute import Attribution, Baseline
from demur.features.bank import Bank
from demur.features.clamp import EDITED, Clamp, Rule, shift
from demur.features.discover import Latent, Unit
from demur.features.read import LatentReads, by_name, last_of
from demur.features.rows.discover import (
    AgainstRandom,
    AgreementRow,
    Role,
    VerificationRow,
    VerifiedRow,
)
from demur.interventions import Intervention, applied
from demur.models import Conversation, Model, TokenBatch
from demur.models.model import Memory
from demur.progress import Progress
from demur.selection import RefusalTokens, kl_divergence, refusal_logodds
from demur.sites import Site, Span
from demur.stats import Estimate, bootstrap, holm, mean, null_p, proportion, wilcoxon_p

Edit: TypeAlias = Clamp | tuple[Clamp, ...]
"""Latents of one bank, or of several, changed at once; an empty tuple changes nothing."""

Where: TypeAlias = Sequence[Span] | Literal["last"]
"""Tokens of spans, or the last token of the prompt alone."""

STEPS = 1000
"""What the `progress` of `verify` adds up to."""

_MOST_REMEMBERED = 2**30  # Bytes of unedited stream that are kept between calls.
_KL_ROWS = 16  # Whose logits are widened to float64 at once.
_OUTPUT_TIMES = 10.0
_DRAWS = 1000


# Many edits in one batch -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What edits did, per prompt.

    Attributes:
        plain: Refusal log-odds of the unedited model, nats.
        change: Of them under each edit; exactly 0 where an edit changes no token.
        kl: From the unedited model, nats; None where it was not asked for.
        size: Mean over the tokens that may be edited of |change| / |token|, in the stream that no
            other edit has touched; mean over sites.
        touched: Where an edit changes a token.
    """

    plain: Float[Tensor, " prompt"]
    change: Float[Tensor, "edit prompt"]
    kl: Float[Tensor, "edit prompt"] | None
    size: Float[Tensor, "edit prompt"]
    touched: Bool[Tensor, "edit prompt"]


@dataclass(frozen=True, slots=True)
class _Key:
    """What clamps of different rows must share to be applied as one."""

    bank: str
    site: Site
    writes: Site
    width: int
    limit: float | None
    error: Literal["keep", "drop"]
    firing: bool

    @classmethod
    def of(cls, clamp: Clamp) -> _Key:
        if clamp.rule.per_row:
            raise ConfigError(
                f"a rule for {clamp.bank.name} has rows of its own",
                "give one edit for each row: edits and prompts are crossed here",
            )
        bank = clamp.bank
        assert bank.writes is not None
        return cls(
            bank.name,
            bank.site,
            bank.writes,
            bank.width,
            clamp.limit,
            clamp.error,
            clamp.rule.firing,
        )


class Prepared:
    """Prompts that edits are to be measured on; what the unedited model does is computed once.

    Attributes:
        model: The model, in which no edit is in force yet.
        ids: First tokens of refusals.
        n: Prompts.
        plain: Refusal log-odds of the unedited model, nats.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[str | Conversation] | TokenBatch,
        tokens: RefusalTokens | Sequence[int],
        *,
        tokens_per_pass: int | None = None,
    ) -> None:
        batch = prompts if isinstance(prompts, TokenBatch) else model.encode(prompts)
        if batch.padded_left or Span.INSTRUCTION not in batch.spans:
            raise ConfigError(
                "rows are padded on the left, or nothing tells which tokens are the instruction",
                "give prompts, or what `Model.encode` makes of them",
            )
        self.model = model
        self.ids = tokens.ids if isinstance(tokens, RefusalTokens) else tuple(tokens)
        self.n = len(batch)
        self._tokens = tokens_per_pass or model.tokens_per_pass
        self._index = batch.passes(tokens=self._tokens)
        self._parts = [_alone(batch.rows(index)) for index in self._index]
        count = sum(part.ids.numel() for part in self._parts) * model.n_layers * model.d_model
        self._keeps = count * model.dtype.itemsize <= _MOST_REMEMBERED
        self._memories: dict[int, Memory] = {}
        self._clean: dict[tuple[int, Site], Tensor] = {}
        self._logits = [model.logits(part).cpu() for part in self._parts]
        self.plain: Float[Tensor, " prompt"] = torch.zeros(self.n, dtype=torch.float64)
        for index, logits in zip(self._index, self._logits, strict=True):
            self.plain[index] = refusal_logodds(logits, self.ids)

    def under(self, *acts: Intervention) -> Measured:
        """What interventions that are not of latents do, as one edit; sizes are not measured."""
        change = torch.zeros(1, self.n, dtype=torch.float64)
        kl = torch.zeros_like(change)
        with applied(self.model, *acts):
            for index, part, plain in zip(self._index, self._parts, self._logits, strict=True):
                logits = self.model.logits(part).cpu()
                change[0, index] = refusal_logodds(logits, self.ids) - self.plain[index]
                kl[0, index] = _kl(plain, logits)
        touched = torch.ones_like(change, dtype=torch.bool)
        return Measured(self.plain, change, kl, torch.zeros_like(change), touched)

    @torch.no_grad()
    def measure(
        self,
        edits: Sequence[Edit],
        *,
        where: Where = EDITED,
        kl: bool = False,
        progress: Progress | None = None,
    ) -> Measured:
        """Cross edits with prompts.

        Args:
            edits: What to change.
            where: At which tokens.
            kl: Measure KL from the unedited model too.
            progress: Called with the number of pairs of an edit and a prompt done since the last
                call.

        Raises:
            ConfigError: A rule has rows of its own; two clamps of one edit hold the same latent;
                or other edits are in force.
            NonFiniteError: An edit made logits NaN or infinite.
        """
        plans = [_plan(edit) for edit in edits]
        joined = _joined(plans, self.model.device)
        change = torch.zeros(len(plans), self.n, dtype=torch.float64)
        kls = torch.zeros_like(change)
        sizes, touched = torch.zeros_like(change), torch.zeros_like(change, dtype=torch.bool)
        with self.model.prefix_kept():
            for number, (index, part) in enumerate(zip(self._index, self._parts, strict=True)):
                mask = _marked(part, where)
                pairs: list[tuple[int, int]] = []
                for edit, (moved, size) in enumerate(self._previews(number, plans, joined, mask)):
                    touched[edit, index], sizes[edit, index] = moved, size
                    pairs += [(edit, row) for row in moved.nonzero().flatten().tolist()]
                self._run(
                    number,
                    mask,
                    pairs=pairs,
                    plans=plans,
                    joined=joined,
                    change=change,
                    kls=kls if kl else None,
                )
                if not self._keeps:
                    self._memories.clear()
                if progress is not None:
                    progress(len(plans) * len(index))
        return Measured(self.plain, change, kls if kl else None, sizes, touched)

    # Which rows need to be run ------------------------------------------------------------------

    def _stream(self, number: int, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """The unedited tensors at sites, without the shared prefix."""
        missing = [site for site in sites if (number, site) not in self._clean]
        if missing:

            def keep(x: Tensor, site: Site) -> Tensor:
                if self.model.chunk is not None and not self.model.chunk.is_prefix:
                    self._clean[number, site] = x.detach()
                return x

            with ExitStack() as undo:
                for site in missing:
                    undo.callback(self.model.intercept(site, partial(keep, site=site)))
                self.model.read(self._parts[number])
        return {site: self._clean[number, site] for site in sites}

    def _previews(
        self,
        number: int,
        plans: Sequence[Mapping[_Key, Clamp]],
        joined: Mapping[_Key, Bank],
        mask: Bool[Tensor, "row token"],
    ) -> list[tuple[Tensor, Tensor]]:
        """By edit: the rows that it changes, and by how much, in the unedited stream."""
        sites = [site for key in joined for site in (key.site, key.writes)]
        streams = self._stream(number, list(dict.fromkeys(sites)))
        # A bank is encoded once, however many edits it has.
        encoded = {key: bank.encode(streams[key.site]) for key, bank in joined.items() if len(bank)}
        column = {
            key: {latent: i for i, latent in enumerate(bank.ids.tolist())}
            for key, bank in joined.items()
        }
        rows = len(self._parts[number])
        out: list[tuple[Tensor, Tensor]] = []
        for plan in plans:
            moved = torch.zeros(rows, dtype=torch.bool)
            size = torch.zeros(rows, dtype=torch.float64)
            for key, clamp in plan.items():
                x, target = streams[key.site], streams[key.writes]
                own = mask[:, -x.shape[1] :].to(x.device)
                if key.error == "drop":
                    step = shift(clamp.bank.to(x.device), clamp.rule, x, error="drop")
                    step = step * own.unsqueeze(-1)
                    changed = step.abs().amax((1, 2)) > 0
                else:
                    at = [column[key][latent] for latent in clamp.bank.ids.tolist()]
                    f = encoded[key][..., at]
                    there = (own & joined[key].usable(x)).unsqueeze(-1)
                    apart = (_on(clamp.rule, f)(f) - f) * there
                    changed = apart.abs().amax((1, 2)) > 0
                    step = (apart @ clamp.bank.decoder.to(f)) * clamp.bank.scale(x).to(f)
                share = step.norm(dim=-1) / target.to(step).norm(dim=-1).clamp_min(1e-30)
                if clamp.limit is not None:
                    share = share.clamp_max(clamp.limit)
                moved |= changed.cpu()
                size += ((share * own).sum(1) / own.sum(1).clamp_min(1)).double().cpu()
            out.append((moved, size / max(len(plan), 1)))
        return out

    # Running them -------------------------------------------------------------------------------

    def _run(
        self,
        number: int,
        mask: Bool[Tensor, "row token"],
        *,
        pairs: list[tuple[int, int]],
        plans: Sequence[Mapping[_Key, Clamp]],
        joined: Mapping[_Key, Bank],
        change: Tensor,
        kls: Tensor | None,
    ) -> None:
        part, index = self._parts[number], self._index[number]
        each = part.ids.shape[1] - part.shared + part.shared // 2
        most = max(2, self._tokens // each)
        # Edits that begin at the same block and are applied alike share passes.
        kinds: dict[tuple[_Key, ...], int] = {}
        for plan in plans:
            kinds.setdefault(tuple(plan), len(kinds))
        pairs.sort(key=lambda pair: kinds[tuple(plans[pair[0]])])
        for keys, group in groupby(pairs, key=lambda pair: tuple(plans[pair[0]])):
            members = list(group)
            for start in range(0, len(members), most):
                chunk = members[start : start + most]
                edits, rows = (list(column) for column in zip(*chunk, strict=True))
                logits = self._logits_of(
                    number,
                    mask,
                    rows,
                    plans=[plans[edit] for edit in edits],
                    keys=keys,
                    joined=joined,
                )
                places = [index[row] for row in rows]
                scores = refusal_logodds(logits, self.ids) - self.plain[places]
                if not bool(torch.isfinite(scores).all()):
                    raise NonFiniteError(
                        f"an edit made logits of {self.model.name} NaN or infinite",
                        "try `--dtype float32`, or a smaller edit",
                    )
                change[edits, places] = scores
                if kls is not None:
                    kls[edits, places] = _kl(self._logits[number][rows], logits)

    def _memory(self, number: int) -> Memory:
        if number not in self._memories:
            self._memories[number] = self.model.remember(self._parts[number])
        return self._memories[number]

    def _logits_of(
        self,
        number: int,
        mask: Bool[Tensor, "row token"],
        rows: list[int],
        *,
        plans: Sequence[Mapping[_Key, Clamp]],
        keys: Sequence[_Key],
        joined: Mapping[_Key, Bank],
    ) -> Float[Tensor, "asked vocab"]:
        """Next-token logits of some rows of a part, each under its own edit."""
        part, memory = self._parts[number], self._memory(number)
        n = len(rows)
        if n == 1 and memory.cache is not None:
            # One row alone would not share its prefix, and the memory does.
            rows, plans = rows * 2, [*plans, *plans]
        batch = TokenBatch(
            part.ids[rows],
            part.mask[rows],
            {name: span[rows] for name, span in part.spans.items()},
            part.shared,
        )
        first = min(min(key.site.layer, key.writes.layer) for key in keys)
        stream = list(memory.stream)
        if first:
            stream[first - 1] = stream[first - 1][rows]  # Of the others none is looked at.
        again = replace(memory, batch=batch, stream=stream)
        marked = mask[rows]
        read: dict[_Key, Tensor] = {}

        def keep(x: Tensor, key: _Key) -> Tensor:
            read[key] = x
            return x

        def act(x: Tensor, key: _Key, bank: Bank, rule: Rule) -> Tensor:
            if self.model.chunk is not None and self.model.chunk.is_prefix:
                return x
            source = read[key] if bank.is_transcoder else x
            moved = shift(bank, rule, source, limit=key.limit, error=key.error)
            own = marked[:, -x.shape[1] :].unsqueeze(-1).to(moved.device)
            return torch.where(own, (x.to(moved) + moved).to(x.dtype), x)

        with ExitStack() as undo:
            for key in keys:
                own = [plan[key] for plan in plans]
                bank = joined[key]
                if key.error == "keep":
                    ids = dict.fromkeys(i for one in own for i in one.bank.ids.tolist())
                    bank = bank.sliced(list(ids))
                rule = _by_row(own, bank)
                if bank.is_transcoder:
                    undo.callback(self.model.intercept(key.site, partial(keep, key=key)))
                edit = partial(act, key=key, bank=bank, rule=rule)
                undo.callback(self.model.intercept(key.writes, edit))
            return self.model.logits(batch, again)[:n].cpu()


def effects(
    model: Model,
    prompts: Sequence[str | Conversation] | TokenBatch | Prepared,
    tokens: RefusalTokens | Sequence[int],
    edits: Sequence[Edit],
    *,
    where: Where = EDITED,
    progress: Progress | None = None,
) -> Float[Tensor, "edit prompt"]:
    """Change of the refusal log-odds under each edit, nats, float64.

    Below 0 the edit makes the model refuse less. Arguments and errors are those of
    `Prepared.measure`.
    """
    ready = prompts if isinstance(prompts, Prepared) else Prepared(model, prompts, tokens)
    return ready.measure(edits, where=where, progress=progress).change


def _alone(part: TokenBatch) -> TokenBatch:
    """A part of one row shares nothing, whatever the batch says that it came from."""
    return replace(part, shared=0) if len(part) == 1 else part


def _marked(part: TokenBatch, where: Where) -> Bool[Tensor, "row token"]:
    mask = torch.zeros_like(part.mask)
    if isinstance(where, str):
        prompt = part.mask & ~part.spans.get(Span.RESPONSE, torch.zeros_like(part.mask))
        mask[torch.arange(len(part)), last_of(prompt)] = True
        return mask
    for span in where:
        if span in part.spans:
            mask = mask | part.spans[span]
    return mask


def _plan(edit: Edit) -> dict[_Key, Clamp]:
    clamps = (edit,) if isinstance(edit, Clamp) else tuple(edit)
    out: dict[_Key, Clamp] = {}
    for clamp in clamps:
        if not len(clamp.bank):
            continue
        key = _Key.of(clamp)
        if key in out:
            raise ConfigError(
                f"an edit changes {key.bank} twice", "put all of its latents into one clamp"
            )
        out[key] = clamp
    return out


def _joined(plans: Sequence[Mapping[_Key, Clamp]], device: torch.device) -> dict[_Key, Bank]:
    """For each bank one that holds the latents of all edits."""
    held: dict[_Key, dict[int, tuple[Bank, int]]] = {}
    for plan in plans:
        for key, clamp in plan.items():
            own = held.setdefault(key, {})
            for row, latent in enumerate(clamp.bank.ids.tolist()):
                own.setdefault(latent, (clamp.bank, row))
    out: dict[_Key, Bank] = {}
    for key, latents in held.items():
        # Rows of one source at a time, then all in order.
        sources = list({id(bank): bank for bank, _ in latents.values()}.values())
        parts = [
            source.sliced([one for one, (bank, _) in latents.items() if bank is source])
            for source in sources
        ]
        first = parts[0]
        bank = first
        if len(parts) > 1:
            thresholds = [one.threshold for one in parts if one.threshold is not None]
            bank = replace(
                first,
                encoder=torch.cat([one.encoder for one in parts]),
                bias=torch.cat([one.bias for one in parts]),
                decoder=torch.cat([one.decoder for one in parts]),
                threshold=torch.cat(thresholds) if thresholds else None,
                ids=torch.cat([one.ids for one in parts]),
            )
        if key.error == "drop":
            bank = sources[0]  # The whole bank, in the order that rules are in.
        out[key] = bank.to(device)
    return out


def _on(rule: Rule, f: Tensor) -> Rule:
    """The rule where activations are."""
    return Rule(
        *(one.to(f.device) for one in (rule.times, rule.plus, rule.low, rule.high)),
        firing=rule.firing,
    )


def _by_row(clamps: Sequence[Clamp], bank: Bank) -> Rule:
    """For each row what its clamp does to its own latents, and nothing to the others."""
    column = {latent: i for i, latent in enumerate(bank.ids.tolist())}
    names = ("times", "plus", "low", "high")
    nothing = Rule.nothing(len(bank))
    dtypes = {getattr(one.rule, name).dtype for one in clamps for name in names}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    parts = [getattr(nothing, name).to(dtype).repeat(len(clamps), 1) for name in names]
    at = {id(one): [column[i] for i in one.bank.ids.tolist()] for one in clamps}
    for row, one in enumerate(clamps):
        for name, part in zip(names, parts, strict=True):
            part[row, at[id(one)]] = getattr(one.rule, name).to(part)
    device = bank.encoder.device
    return Rule(*(part.to(device) for part in parts), firing=clamps[0].rule.firing)


def _kl(plain: Tensor, edited: Tensor) -> Tensor:
    parts = zip(plain.split(_KL_ROWS), edited.split(_KL_ROWS), strict=True)
    return torch.cat([kl_divergence(one, other) for one, other in parts])


# Edits of units ----------------------------------------------------------------------------------


def ablating(
    banks: Mapping[str, Bank], latents: Sequence[Latent], baseline: Baseline = "zero"
) -> tuple[Clamp, ...]:
    """The edit that takes latents away, in the order of the blocks.

    Args:
        banks: By name.
        latents: Of any of them.
        baseline: What they are set to; "zero", or one activation for each latent of a bank.
    """
    held: dict[str, list[int]] = {}
    for one in dict.fromkeys(latents):
        held.setdefault(one.bank, []).append(one.number)
    clamps: list[Clamp] = []
    for name, numbers in held.items():
        bank = banks[name]
        if isinstance(baseline, str):
            rule = Rule.zero(len(numbers))
        else:
            rows = [bank.ids.tolist().index(number) for number in numbers]
            rule = Rule.mean(baseline[name].float()[rows])
        clamps.append(Clamp(bank.sliced(numbers), rule))
    return tuple(sorted(clamps, key=lambda one: (one.bank.site, one.bank.name)))


def _reads_of(reads: LatentReads, name: str, numbers: Sequence[int], what: str) -> list[float]:
    bank = next(one for one in reads.banks if one.name == name)
    at = {latent: i for i, latent in enumerate(bank.ids.tolist())}
    values: Tensor = getattr(reads.reads[name], what)
    return [float(values[at[number]]) for number in numbers]


def mass(reads: LatentReads, latents: Sequence[Latent]) -> float:
    """Mean activation times length of the decoder row, summed: residual-stream units a token."""
    total = 0.0
    for one in latents:
        bank = next(bank for bank in reads.banks if bank.name == one.bank)
        row = bank.ids.tolist().index(one.number)
        total += float(reads.reads[one.bank].mass[row]) * float(bank.decoder[row].norm())
    return total


def matched(
    reads: LatentReads,
    latents: Sequence[Latent],
    *,
    sets: int,
    seed: int,
    without: Collection[Latent] = (),
    near: float = 0.7,
    choice: int = 50,
) -> tuple[tuple[Latent, ...], ...]:
    """Draw random latents that are alike in how much they do, not in what they say.

    Each latent of a set stands for one of those given: of the same bank, and close in firing share,
    activation mass and length of the decoder row (distance of logarithms over their standard
    deviations). Dead latents, those in `without`, and those whose decoder row lies within `near` of
    a given one, either way, are not drawn.

    Args:
        reads: On the prompts that the latents fire on.
        latents: What to match.
        sets: How many sets. For a single latent sets differ, so there may be fewer.
        seed: Of the draw.
        without: Others that are not drawn, such as all candidates.
        near: Largest |cosine| with a given latent.
        choice: How many of the closest are drawn from, at least.

    Raises:
        TooFewPromptsError: A bank has no other latents, or too few for one set.
    """
    rng = np.random.default_rng(seed)
    closest = {one: _closest(reads, one, latents, without, near) for one in dict.fromkeys(latents)}
    if len(closest) == 1:
        (only,) = closest
        pool = closest[only][: max(choice, sets)]
        drawn = rng.permutation(len(pool))[:sets]
        return tuple((pool[i],) for i in sorted(drawn.tolist()))
    out: list[tuple[Latent, ...]] = []
    for _ in range(sets):
        own: list[Latent] = []
        for one in closest:
            left = [other for other in closest[one][: choice + len(own)] if other not in own]
            if not left:
                raise TooFewPromptsError(
                    f"{one.bank} has fewer than {len(closest)} latents that match",
                    "match fewer latents, or those of a wider bank",
                )
            own.append(left[int(rng.integers(len(left)))])
        out.append(tuple(own))
    return tuple(out)


def _closest(
    reads: LatentReads,
    latent: Latent,
    given: Sequence[Latent],
    without: Collection[Latent],
    near: float,
) -> list[Latent]:
    bank = next(bank for bank in reads.banks if bank.name == latent.bank)
    own = reads.reads[bank.name]
    norms = bank.decoder.norm(dim=1)
    alive = own.firing > 0
    figures = torch.stack([own.firing, own.mass * norms, norms]).double().clamp_min(1e-12).log()
    spread = figures[:, alive].std(1) if int(alive.sum()) > 1 else torch.ones(3).double()
    # Rows of unit length, as most are, leave a spread of rounding errors.
    scaled = figures / spread.unsqueeze(1).where(spread.unsqueeze(1) > 1e-6, torch.inf)
    number = {one: i for i, one in enumerate(bank.ids.tolist())}
    apart = (scaled - scaled[:, number[latent.number]].unsqueeze(1)).norm(dim=0)
    unit = bank.decoder.double() / norms.double().clamp_min(1e-30).unsqueeze(1)
    mine = [number[one.number] for one in given if one.bank == bank.name]
    apart = apart.masked_fill((unit @ unit[mine].T).abs().amax(1) > near, torch.inf)
    apart = apart.masked_fill(~alive, torch.inf)
    barred = [number[one.number] for one in without if one.bank == bank.name]
    apart[[*barred, *mine]] = torch.inf
    order = apart.argsort(stable=True)[: int(torch.isfinite(apart).sum())].tolist()
    found = [Latent(bank.name, int(bank.ids[i])) for i in order]
    if not found:
        raise TooFewPromptsError(
            f"{bank.name} has no other latent that fires, to hold {latent} against",
            "load more of the bank's latents",
        )
    return found


# The table ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Unit:
    """A unit and the random ones that it is held against."""

    unit: Unit
    random: tuple[tuple[Latent, ...], ...]
    lifted: tuple[tuple[Latent, ...], ...]


def verify(
    model: Model,
    banks: Sequence[Bank],
    units: Sequence[Unit],
    *,
    harmful: Sequence[str | Conversation],
    harmless: Sequence[str | Conversation],
    neutral: Sequence[str | Conversation] = (),
    tokens: RefusalTokens | Sequence[int],
    reads: LatentReads,
    attribution: Attribution | None = None,
    baseline: Baseline = "zero",
    each: int = 99,
    each_lifted: int = 19,
    lifted_at: Where = (Span.POST_INSTRUCTION,),
    alpha: float = 0.05,
    seed: int,
    progress: Progress | None = None,
) -> VerificationRow:
    """Take every candidate away, lift it, push it; and do the same to random latents like it.

    Args:
        model: Unedited.
        banks: That the units are of, whole: random latents come from them.
        units: Candidates.
        harmful: Prompts on which latents are taken away.
        harmless: Prompts on which they are taken away and lifted.
        neutral: Prompts on which they are pushed (output score); none leaves that out.
        tokens: First tokens of refusals.
        reads: On the harmful prompts of discovery: what latents are matched on, their q99 and
            their largest activation.
        attribution: What was estimated; it must cover the banks.
        baseline: What taking away sets a latent to.
        each: Random latents for each unit that are taken away.
        each_lifted: How many of these are also lifted and pushed; 0 leaves both out.
        lifted_at: At which tokens.
        alpha: Level of both tests that a role needs.
        seed: Draws the random latents.
        progress: Its numbers add up to `STEPS`.

    Raises:
        ConfigError: There are no units.
        TooFewPromptsError: A class has fewer than two prompts, or a bank has no latent left to
            hold a unit against.
    """
    from scipy import stats

    if not units:
        raise ConfigError("there are no candidates to verify", "lower the bar for candidates")
    named = by_name(banks)
    barred = {latent for unit in units for latent in unit.latents}
    plan: list[_Unit] = []
    for i, unit in enumerate(units):
        drawn = matched(reads, unit.latents, sets=each, seed=seed + i, without=barred)
        plan.append(_Unit(unit, drawn, drawn[:each_lifted]))
    runs = _Runs(named, reads, baseline, progress)
    own = [one.unit.latents for one in plan]
    random = list(dict.fromkeys(one for unit in plan for one in unit.random))
    lifted = list(dict.fromkeys(one for unit in plan for one in unit.lifted))
    runs.expect(
        len(harmful) * (len(own) + len(random))
        + len(harmless) * (len(own) + (len(own) + len(lifted)) * bool(lifted))
        + len(neutral) * (len(own) + len(lifted)) * bool(lifted)
    )
    bad, good = Prepared(model, harmful, tokens), Prepared(model, harmless, tokens)
    taken = runs.run(bad, [*own, *random], "ablate")
    cost = runs.run(good, own, "ablate", kl=True)
    raised = runs.run(good, [*own, *lifted], "lift", lifted_at) if lifted else None
    pushed = None
    if lifted and neutral:
        pushed = runs.run(Prepared(model, neutral, tokens), [*own, *lifted], "push", "last")
    runs.end()

    def beside(
        found: Measured, i: int, pool: Sequence[tuple[Latent, ...]], drawn: Sequence[object]
    ) -> AgainstRandom:
        means = found.change.mean(1).numpy()
        null = [float(means[len(own) + pool.index(one)]) for one in drawn]  # pyright: ignore[reportArgumentType]
        low, high = (float(x) for x in np.quantile(null, (0.025, 0.975)))
        p = null_p(abs(float(means[i])), np.abs(null), side="high")
        return AgainstRandom(mean(found.change[i].numpy()), p, len(null), low, high)

    ablated = [beside(taken, i, random, one.random) for i, one in enumerate(plan)]
    zeros = np.zeros(len(harmful))
    ps = [wilcoxon_p(zeros, taken.change[i].numpy()) for i in range(len(plan))]
    corrected = holm(ps)
    adjusted = stats.false_discovery_control([one.p for one in ablated])
    rows: list[VerifiedRow] = []
    for i, one in enumerate(plan):
        assert cost.kl is not None
        shown = corrected[i] <= alpha and adjusted[i] <= alpha
        value = ablated[i].effect.value
        role: Role = "none shown"
        if shown and value:
            role = "promotes" if value < 0 else "suppresses"
        own_mass = mass(reads, one.unit.latents)
        theirs = float(np.median([mass(reads, other) for other in one.random]))
        rows.append(
            VerifiedRow(
                str(one.unit),
                one.unit.bank,
                one.unit.numbers,
                role,
                ablated[i],
                float(taken.touched[i].double().mean()),
                float(taken.size[i].mean()),
                ps[i],
                corrected[i],
                float(adjusted[i]),
                theirs / own_mass if own_mass > 0 else 0.0,
                mean(cost.change[i].numpy()),
                mean(cost.kl[i].numpy()),
                None if raised is None else beside(raised, i, lifted, one.lifted),
                None if pushed is None else beside(pushed, i, lifted, one.lifted),
                None if attribution is None else _attributed(attribution, one.unit.latents),
            )
        )
    agreement = None
    if attribution is not None:
        x = np.array([_attributed(attribution, one) for one in (*own, *random)])
        agreement = agreement_row(x, -taken.change.mean(1).numpy(), len(own), seed=seed)
    words = "zero" if isinstance(baseline, str) else "mean on harmless prompts"
    return VerificationRow(
        words, mean(bad.plain.numpy()), mean(good.plain.numpy()), alpha, tuple(rows), agreement
    )


def _attributed(attribution: Attribution, latents: Sequence[Latent]) -> float:
    return float(sum(attribution.of(one.bank, one.number).mean() for one in latents))


class _Runs:
    """Edits of sets of latents, with progress in thousandths."""

    def __init__(
        self,
        banks: Mapping[str, Bank],
        reads: LatentReads,
        baseline: Baseline,
        progress: Progress | None,
    ) -> None:
        self.banks, self.reads, self.progress = banks, reads, progress
        self.baseline: Baseline = baseline
        self.total = self.done = self.told = 0

    def expect(self, total: int) -> None:
        self.total = total

    def end(self) -> None:
        if self.progress is not None and self.told < STEPS:
            self.progress(STEPS - self.told)

    def _step(self, n: int) -> None:
        self.done += n
        now = STEPS * self.done // max(self.total, 1)
        if self.progress is not None and now > self.told:
            self.progress(now - self.told)
            self.told = now

    def _edit(self, latents: Sequence[Latent], how: str) -> tuple[Clamp, ...]:
        if how == "ablate":
            return ablating(self.banks, latents, self.baseline)
        clamps: list[Clamp] = []
        for clamp in ablating(self.banks, latents):
            numbers, name = clamp.bank.ids.tolist(), clamp.bank.name
            if how == "lift":
                rule = Rule.at_least(len(numbers), _reads_of(self.reads, name, numbers, "q99"))
            else:
                largest = _reads_of(self.reads, name, numbers, "largest")
                rule = Rule.of(len(numbers), plus=[_OUTPUT_TIMES * one for one in largest])
            clamps.append(replace(clamp, rule=rule))
        return tuple(clamps)

    def run(
        self,
        ready: Prepared,
        sets: Sequence[Sequence[Latent]],
        how: str,
        where: Where = EDITED,
        *,
        kl: bool = False,
    ) -> Measured:
        edits = [self._edit(one, how) for one in sets]
        return ready.measure(edits, where=where, kl=kl, progress=self._step)


def agreement_row(
    attributed: Float[np.ndarray, " unit"],
    real: Float[np.ndarray, " unit"],
    n_candidates: int,
    *,
    seed: int,
) -> AgreementRow:
    """How far estimates foretell effects, both above 0 for what promotes refusal.

    Args:
        attributed: Candidates first, then random ones.
        real: Likewise.
        n_candidates: How many are candidates.
        seed: Of the bootstrap over units.
    """
    from scipy import stats

    def spearman(index: np.ndarray) -> float:
        x, y = attributed[index], real[index]
        if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
            return math.nan
        return float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])

    interval: Estimate | None = None
    if math.isfinite(spearman(np.arange(len(real)))):
        try:
            interval = bootstrap(spearman, len(real), draws=_DRAWS, seed=seed)
        except TooFewPromptsError:  # Nearly all are 0, so that most resamples do not vary.
            interval = None
    among = spearman(np.arange(n_candidates))
    same = np.sign(attributed[:n_candidates]) == np.sign(real[:n_candidates])
    size = float(attributed @ attributed)
    return AgreementRow(
        len(real),
        interval,
        among if math.isfinite(among) else None,
        proportion(int(same.sum()), n_candidates),
        float(attributed @ real) / size if size > 0 else None,
    )

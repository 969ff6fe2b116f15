"""What the latents of a bank do on two classes of prompts, however wide the bank.

A bank of 65,536 latents is 600 MB of encoder alone, and its activations on 20,000 tokens are 5 GB.
So it is gone through some thousand latents at a time, read from disk or cut from memory, against
blocks of tokens; of each latent a few numbers are kept. Prompts are the unit throughout: a latent's
value on a prompt is its mean over the prompt's tokens, and means and spreads are over prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from demur.errors import ConfigError, TooFewPromptsError
from demur.features.bank import Bank
from demur.features.formats import CHUNK, Part, StoredBank
from demur.progress import Progress

CLASSES = ("harmless", "harmful")
_ROWS = 512  # Tokens that meet a chunk of latents at once: with 4,096 latents 8 MB.
# Quantiles are read off counts in bins of equal ratio, 32 to a doubling: 2.2 % wide.
_PER_OCTAVE, _OCTAVES = 32, 48
_BINS = _PER_OCTAVE * _OCTAVES


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Activations of some tokens at the site that a bank reads.

    Attributes:
        x: Any float dtype; half precision halves what blocks take.
        prompt: Which prompt each token is of, counted from 0 over all blocks.
    """

    x: Float[Tensor, "token d_model"]
    prompt: Int[Tensor, " token"]


@dataclass(frozen=True, slots=True, eq=False)
class LatentMoments:
    """A few numbers of every latent by class: the first row harmless prompts, the second harmful.

    Attributes:
        n: How many prompts each class has.
        tokens: How many tokens, sinks counted.
        mean: Mean over prompts of a prompt's value, in the bank's units.
        second: Mean over prompts of its square.
        firing: Share of tokens at which the latent is active.
        fired: Share of prompts with such a token.
        largest: Largest activation at a token; 0 if it never fires.
        q99: 99th percentile of the activations that are not 0, to 1.1 %: the middle of a bin that
            is 2.2 % wide; 0 if it never fires.
        ids: The latents.
    """

    n: Int[Tensor, " two"]
    tokens: Int[Tensor, " two"]
    mean: Float[Tensor, "two latent"]
    second: Float[Tensor, "two latent"]
    firing: Float[Tensor, "two latent"]
    fired: Float[Tensor, "two latent"]
    largest: Float[Tensor, "two latent"]
    q99: Float[Tensor, "two latent"]
    ids: Int[Tensor, " latent"]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def variance(self) -> Float[Tensor, "two latent"]:
        """Over prompts, unbiased."""
        n = self.n.unsqueeze(1)
        return ((self.second - self.mean.pow(2)).clamp_min(0.0)) * n / (n - 1).clamp_min(1)

    @property
    def difference(self) -> Float[Tensor, " latent"]:
        """Mean on harmful prompts less mean on harmless ones, in the bank's units."""
        return self.mean[1] - self.mean[0]

    @property
    def t(self) -> Float[Tensor, " latent"]:
        """The difference over its standard error (Welch), for ranking; 0 where nothing varies."""
        error = (self.variance / self.n.unsqueeze(1)).sum(0).sqrt()
        return torch.where(error > 0, self.difference / error, torch.zeros_like(error))


@dataclass(frozen=True, slots=True, eq=False)
class _Lens:
    """What is the same for all chunks: how tokens are prepared, and which count."""

    bank: Bank
    least: list[Tensor] | None

    def active(self, number: int, x: Tensor, rows: slice, part: Part) -> Tensor:
        """Activations of a chunk's latents at some tokens of a block."""
        seen = self.bank.inputs(x)
        raw = seen @ part.encoder.to(seen).T + part.bias.to(seen)
        f = raw.clamp_min(0.0)
        if part.threshold is not None:
            f *= raw > part.threshold.to(raw)
        elif self.least is not None:
            least = self.least[number][rows].to(raw).unsqueeze(1)
            f *= raw >= least - 1e-5 * least.abs()
        return f.mul_(self.bank.usable(x).unsqueeze(1))


def latent_moments(
    source: Bank | StoredBank,
    blocks: Sequence[Block],
    harmful: Bool[Tensor, " prompt"],
    *,
    chunk: int = CHUNK,
    each: Callable[[Int[Tensor, " latent"], Float[Tensor, "prompt latent"]], None] | None = None,
    progress: Progress | None = None,
) -> LatentMoments:
    """Mean, spread, firing and size of every latent on each class of prompts.

    Memory is that of the blocks, of a chunk of encoder rows, and of a chunk's values on all
    prompts: under 300 MB for 4,096 latents of width 2,304, beside torch.

    Args:
        source: A bank on disk, which is read `chunk` latents at a time, or one in memory.
        blocks: Tokens to go through, once for every chunk; twice for a "topk" bank.
        harmful: Class of each prompt.
        chunk: Latents at a time. Results do not depend on it.
        each: Called with the numbers and values, prompt by latent, of every chunk, for tests that
            need more than moments.
        progress: Called with the number of latents done since the last call.

    Raises:
        TooFewPromptsError: A class has no prompt, or a prompt no token.
        ConfigError: Blocks and classes do not fit each other.
    """
    counts = _tokens_of(blocks, harmful)
    lens = _lens(source, blocks, chunk)
    masks = torch.stack([~harmful, harmful])
    tokens = torch.stack([counts[mask].sum() for mask in masks])
    found: dict[str, list[Tensor]] = {
        key: [] for key in ("mean", "second", "firing", "fired", "largest", "q99", "ids")
    }
    for part in _parts(source, chunk):
        values, own = _of_part(lens, part, blocks, masks, counts)
        for key, one in own.items():
            found[key].append(one)
        found["ids"].append(part.ids)
        if each is not None:
            each(part.ids, values)
        if progress is not None:
            progress(len(part.ids))
    ids = torch.cat(found.pop("ids"))
    return LatentMoments(
        n=masks.sum(1),
        tokens=tokens,
        ids=ids,
        **{key: torch.cat(rows, dim=1) for key, rows in found.items()},
    )


def prompt_values(
    source: Bank | StoredBank,
    blocks: Sequence[Block],
    ids: Sequence[int] | Int[Tensor, " n"],
    *,
    reduce: Literal["mean", "max"] = "mean",
    chunk: int = CHUNK,
) -> Float[Tensor, "prompt n"]:
    """The values of a shortlist on every prompt, in the order asked for.

    Args:
        source: As in `latent_moments`.
        blocks: Likewise.
        ids: Numbers of latents in the whole bank.
        reduce: Over the tokens of a prompt.
        chunk: Latents at a time.

    Raises:
        TooFewPromptsError: A prompt has no token.
        ConfigError: There is no such latent.
    """
    n_prompts = 1 + max((int(one.prompt.max()) for one in blocks if len(one.prompt)), default=-1)
    counts = _tokens_of(blocks, torch.zeros(n_prompts, dtype=torch.bool), classes=False)
    lens = _lens(source, blocks, chunk)
    wanted = torch.as_tensor(ids, dtype=torch.long)
    columns = []
    for start in range(0, len(wanted), chunk):
        some = wanted[start : start + chunk]
        part = source.part(some) if isinstance(source, StoredBank) else _held(source.sliced(some))
        out = torch.zeros(n_prompts, len(some))
        for _, prompt, f in _active(lens, part, blocks):
            if reduce == "mean":
                out.index_add_(0, prompt, f)
            else:
                out.scatter_reduce_(0, prompt.unsqueeze(1).expand_as(f), f, "amax")
        columns.append(out / counts.unsqueeze(1) if reduce == "mean" else out)
    return torch.cat(columns, dim=1) if columns else torch.zeros(n_prompts, 0)


def kth_largest(
    source: Bank | StoredBank, blocks: Sequence[Block], *, chunk: int = CHUNK
) -> list[Float[Tensor, " token"]]:
    """What a "topk" bank's k-th largest latent is before activation, by block and token.

    Raises:
        ConfigError: The bank is not a "topk" one.
    """
    k = source.k
    if k is None:
        raise ConfigError(f"{source.name} has no k", "only a `topk` bank compares its latents")
    whole = source if isinstance(source, StoredBank) else source.whole or source
    bare = _bare(source)
    top: list[Tensor | None] = [None] * len(blocks)
    for part in _parts(whole, chunk):
        for number, block in enumerate(blocks):
            rows = []
            for start in range(0, len(block.x), _ROWS):
                seen = bare.inputs(block.x[start : start + _ROWS])
                raw = seen @ part.encoder.to(seen).T + part.bias.to(seen)
                rows.append(raw.topk(min(k, raw.shape[1]), dim=1).values)
            own = torch.cat(rows) if rows else torch.zeros(0, min(k, len(part.ids)))
            before = top[number]
            both = own if before is None else torch.cat([before, own], dim=1)
            top[number] = both.topk(min(k, both.shape[1]), dim=1).values
    return [one[:, -1] for one in top if one is not None]


# Inside --------------------------------------------------------------------------------------


def _bare(source: Bank | StoredBank) -> Bank:
    """The bank without a latent: it prepares tokens, and tells sinks."""
    return source.bank([]) if isinstance(source, StoredBank) else source.sliced([])


def _lens(source: Bank | StoredBank, blocks: Sequence[Block], chunk: int) -> _Lens:
    least = None if source.k is None else kth_largest(source, blocks, chunk=chunk)
    return _Lens(_bare(source), least)


def _held(bank: Bank) -> Part:
    return Part(bank.ids, bank.encoder, bank.bias, bank.threshold)


def _parts(source: Bank | StoredBank, size: int) -> Iterator[Part]:
    if isinstance(source, StoredBank):
        yield from source.parts(size)
        return
    for start in range(0, len(source), size):
        some = slice(start, start + size)
        threshold = None if source.threshold is None else source.threshold[some]
        yield Part(source.ids[some], source.encoder[some], source.bias[some], threshold)


def _tokens_of(
    blocks: Sequence[Block], harmful: Tensor, *, classes: bool = True
) -> Int[Tensor, " prompt"]:
    """How many tokens each prompt has."""
    n = len(harmful)
    counts = torch.zeros(n, dtype=torch.long)
    for block in blocks:
        if len(block.prompt) != len(block.x):
            raise ConfigError(
                f"a block has {len(block.x)} tokens and {len(block.prompt)} numbers of prompts",
                "give each token the number of its prompt",
            )
        if len(block.prompt) and int(block.prompt.max()) >= n:
            raise ConfigError(
                f"a token is of prompt {int(block.prompt.max())}, and {n} prompts have a class",
                "numbers count from 0 over all blocks",
            )
        counts += block.prompt.bincount(minlength=n)
    if classes and (not bool(harmful.any()) or bool(harmful.all())):
        raise TooFewPromptsError(
            f"{int(harmful.sum())} of {n} prompts are harmful", "give prompts of both classes"
        )
    if bool((counts == 0).any()):
        missing = int((counts == 0).nonzero()[0])
        raise TooFewPromptsError(
            f"prompt {missing} has no token in any block", "leave it out, and number the rest anew"
        )
    return counts


def _active(
    lens: _Lens, part: Part, blocks: Sequence[Block]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number of the block, prompts of some tokens, and activations of a chunk at them."""
    for number, block in enumerate(blocks):
        for start in range(0, len(block.x), _ROWS):
            rows = slice(start, start + _ROWS)
            f = lens.active(number, block.x[rows], rows, part)
            yield number, block.prompt[rows], f.float()


def _of_part(
    lens: _Lens, part: Part, blocks: Sequence[Block], masks: Tensor, counts: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Values of a chunk on all prompts, and its numbers by class."""
    n_prompts, n = masks.shape[1], len(part.ids)
    sums = torch.zeros(n_prompts, n)
    fired = torch.zeros(n_prompts, n, dtype=torch.bool)
    firing = torch.zeros(2, n, dtype=torch.long)
    largest = torch.zeros(2, n)
    bins = torch.zeros(2 * n * _BINS, dtype=torch.int32)
    harmful = masks[1].long()
    for _, prompt, f in _active(lens, part, blocks):
        sums.index_add_(0, prompt, f)
        rows, columns = f.nonzero(as_tuple=True)
        if not len(rows):
            continue
        values, side = f[rows, columns], harmful[prompt[rows]]
        fired[prompt[rows], columns] = True
        place = side * n + columns
        firing += place.bincount(minlength=2 * n).view(2, n)
        largest.view(-1).scatter_reduce_(0, place, values, "amax")
        # A half of the octaves lies below 1.
        level = ((values.log2() + _OCTAVES / 2) * _PER_OCTAVE).floor().long().clamp(0, _BINS - 1)
        bins.scatter_add_(0, place * _BINS + level, torch.ones_like(level, dtype=torch.int32))
    tokens = torch.stack([counts[mask].sum() for mask in masks]).unsqueeze(1)
    values = sums / counts.unsqueeze(1)
    own: dict[str, Tensor] = {
        "mean": torch.stack([values[mask].double().mean(0) for mask in masks]),
        "second": torch.stack([values[mask].double().pow(2).mean(0) for mask in masks]),
        "firing": firing.double() / tokens,
        "fired": torch.stack([fired[mask].double().mean(0) for mask in masks]),
        "largest": largest,
        "q99": _quantile(bins.view(2, n, _BINS), firing, largest, 0.99),
    }
    return values, own


def _quantile(bins: Tensor, counts: Tensor, largest: Tensor, q: float) -> Tensor:
    """The activation below which a share `q` of those that are not 0 lies."""
    rank = (q * counts).ceil().clamp_min(1).unsqueeze(-1)
    level = (bins.cumsum(-1, dtype=torch.int32) < rank).sum(-1)
    middle = torch.exp2((level + 0.5) / _PER_OCTAVE - _OCTAVES / 2)
    return torch.where(counts > 0, torch.minimum(middle, largest), torch.zeros_like(largest))

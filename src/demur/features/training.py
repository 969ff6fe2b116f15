"""Training sparse autoencoders on a model's own activations.

First the stream is read into a cache on disk: chat prompts with the model's replies behind them,
every token of instruction, template and reply. Position 0 and other attention sinks are left out:
in SmolLM2 the one token at position 0 holds 99% of the variance, and an autoencoder that is trained
with it learns little else. Then SAELens' own trainer fits a TopK autoencoder to one site, and it is
written in SAELens' format, which `sae_lens.SAE.load_from_disk` reads.

It is written as JumpReLU where that costs next to nothing: one threshold for all latents, chosen so
that as many are active as in training. Latents of such a bank do not hang on each other, so that
some of them can be used without the rest. The threshold is calibrated on prompts that the weights
were not fitted on, and all figures come from prompts that neither was.

A few hundred thousand tokens give a coarse dictionary, enough for the mechanics of an experiment
on a small model. Published autoencoders are trained on 10^8 tokens and more.

References:
    Gao et al., "Scaling and evaluating sparse autoencoders", 2024, arXiv:2406.04093 (TopK);
    Rajamanoharan et al., 2024, arXiv:2407.14435 (JumpReLU); SAELens, github.com/jbloomAus/SAELens.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from warnings import catch_warnings, simplefilter

import torch
from jaxtyping import Float, Int
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from demur.causal import stable_seed
from demur.errors import (
    ConfigError,
    MissingExtraError,
    NonFiniteError,
    StoreError,
    TooFewPromptsError,
)
from demur.features.formats import bank_seal
from demur.features.rows.training import Form, FormFigures, PartFigures, TrainedBank
from demur.models import Conversation, Model
from demur.progress import Progress
from demur.prompts import normalise
from demur.sites import Site, Span
from demur.stats import bootstrap
from demur.store import atomic_write, forget_drafts, held, whole_folder

Part = Literal["train", "calibrate", "test"]
Storage = Literal["float16", "bfloat16", "float32"]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_SPANS = (Span.INSTRUCTION, Span.POST_INSTRUCTION, Span.RESPONSE)
_MANIFEST, _CONFIG, _WEIGHTS = "manifest.json", "cfg.json", "sae_weights.safetensors"
_FORMAT = 1
_LOCK = ".lock"
# Rows that are encoded at once while figures are computed.
_ROWS = 4096
# The threshold is one number: more tokens than that would not move it.
_CALIBRATION_TOKENS = 16_384


# The cache -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class ActivationCache:
    """Activations on disk, in shards of some prompts each; one file per site and shard.

    Attributes:
        folder: Where they are.
        sites: The tensors that were read.
        d_model: Width of the stream.
        dtype: Data type of the files.
        model: Name of the model.
        fingerprint: Of the model, with its adapter.
        model_dtype: Data type of its weights.
        adapter: The adapter that it carries.
        prompts: Digest of all prompts in order.
        settings: What the cache was made with.
        parts: Of each prompt in the order given, the part that it belongs to; None for prompts that
            were not needed.
        counts: By site, the tokens of each shard.
        digests: By site, the digest of each shard's file.
        largest_norm: By site, the norm above which a token was left out, in residual-stream units.
        sinks: By site, how many tokens were left out so.
        seconds: Wall-clock seconds that it took.
        about: What else the caller had to say, for instance of the model's quantisation.
    """

    folder: Path
    sites: tuple[Site, ...]
    d_model: int
    dtype: Storage
    model: str
    fingerprint: str
    model_dtype: str
    adapter: str | None
    prompts: str
    settings: Mapping[str, Any]
    parts: tuple[Part | None, ...]
    counts: Mapping[Site, tuple[int, ...]]
    digests: Mapping[Site, tuple[str, ...]]
    largest_norm: Mapping[Site, float]
    sinks: Mapping[Site, int]
    seconds: float
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> ActivationCache:
        """Open what `cache_activations` left behind.

        Raises:
            StoreError: There is no finished cache in the folder, or its manifest is damaged.
        """
        path = folder / _MANIFEST
        found = _manifest(path)
        if found is None or "counts" not in found:
            raise StoreError(
                f"there is no finished cache of activations in {folder}",
                "collect it first; a run that was stopped goes on where it was",
            )
        try:
            key = found["key"]
            return cls(
                folder=folder,
                sites=tuple(Site.parse(site) for site in key["sites"]),
                d_model=found["d_model"],
                dtype=key["dtype"],
                model=found["model"],
                fingerprint=key["fingerprint"],
                model_dtype=found["model_dtype"],
                adapter=found["adapter"],
                prompts=key["prompts"],
                settings=key,
                parts=tuple(found["parts"]),
                counts=_by_site(found["counts"], tuple),
                digests=_by_site(found["digests"], tuple),
                largest_norm=_by_site(found["largest_norm"], float),
                sinks=_by_site(found["sinks"], int),
                seconds=found["seconds"],
                about=found["about"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{path} is damaged: {error}", f"delete the folder {folder} and collect anew"
            ) from error

    @property
    def tokens(self) -> dict[Site, int]:
        """Tokens of each site."""
        return {site: sum(self.counts[site]) for site in self.sites}

    def n_prompts(self, part: Part) -> int:
        """How many prompts of a part there are."""
        return self.parts.count(part)

    def shards(
        self, site: Site, part: Part, order: Sequence[int] | None = None
    ) -> Iterator[tuple[Float[Tensor, "token d_model"], Int[Tensor, " token"]]]:
        """Shard by shard, the tokens of one part in float32 and the numbers of their prompts.

        Args:
            site: One of `sites`.
            part: Which prompts.
            order: Numbers of shards; None is all of them as they lie.

        Raises:
            ConfigError: The site was not read.
            StoreError: A file is missing or damaged.
        """
        if site not in self.counts:
            raise ConfigError(
                f"{site} is not in the cache {self.folder}",
                f"it holds {', '.join(map(str, self.sites))}",
            )
        wanted = torch.tensor([own == part for own in self.parts])
        for number in range(len(self.counts[site])) if order is None else order:
            path = _shard_path(self.folder, site, number)
            found = _read_shard(path, self.digests[site][number])
            rows = wanted[found["prompt"].long()]
            yield found["x"][rows].float(), found["prompt"][rows].long()


def _by_site(found: Mapping[str, Any], kind: Any) -> dict[Site, Any]:
    return {Site.parse(site): kind(value) for site, value in found.items()}


def _shard_path(folder: Path, site: Site, number: int) -> Path:
    return folder / str(site) / f"{number:05d}.safetensors"


def _manifest(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} cannot be read: {error}", f"delete the folder {path.parent} and collect anew"
        ) from error
    if not isinstance(found, dict) or "key" not in found:
        raise StoreError(
            f"{path} is no manifest of a cache", "name another folder, or delete this one"
        )
    return found


def _read_shard(path: Path, digest: str | None) -> dict[str, Tensor]:
    """The tensors of a shard, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    hint = f"delete {path} and collect again: only that shard is computed anew"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}", hint) from error
    if digest is not None and _digest(data) != digest:
        raise StoreError(f"{path} is not what was written: its digest differs", hint)
    try:
        found = load(data)
        missing = {"x", "prompt", "span", "limit", "sinks"} - found.keys()
    except SafetensorError as error:
        raise StoreError(f"{path} is damaged: {error}", hint) from error
    if missing:
        raise StoreError(f"{path} holds no {', '.join(sorted(missing))}", hint)
    return found


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def _plain_prompt(prompt: str | Conversation) -> Any:
    return prompt if isinstance(prompt, str) else [[turn.role, turn.text] for turn in prompt]


def parts_of(
    prompts: Sequence[str | Conversation],
    groups: Sequence[object] | None = None,
    *,
    held_out: float,
    seed: int,
) -> tuple[Part, ...]:
    """Deal prompts to training, calibration and test, whole groups at a time.

    Args:
        prompts: User messages, or conversations.
        groups: One label a prompt; prompts that share it stay together. None keeps only the same
            text together.
        held_out: Share of the prompts that is not trained on, one half for each other part.
        seed: Of the draw.

    Raises:
        ConfigError: The share is not between 0 and 1, or a label is missing.
        TooFewPromptsError: A part would be empty.
    """
    if not 0.0 < held_out < 1.0:
        raise ConfigError(
            f"{held_out} is no share of held-out prompts", "give one between 0 and 1, like 0.1"
        )
    if groups is not None and len(groups) != len(prompts):
        raise ConfigError(
            f"got {len(groups)} groups of {len(prompts)} prompts", "give one for every prompt"
        )
    labels = [
        f"group {groups[i]}"
        if groups is not None
        else normalise(p if isinstance(p, str) else p[-1].text)
        for i, p in enumerate(prompts)
    ]
    order = sorted(set(labels), key=lambda label: _digest(f"{seed}\0{label}".encode()))
    sizes = {label: labels.count(label) for label in order} if len(order) < len(labels) else {}
    dealt: dict[str, Part] = {}
    done = {"calibrate": 0, "test": 0}
    want = held_out * len(prompts) / 2
    for label in order:
        part: Part = "test" if done["test"] <= done["calibrate"] else "calibrate"
        if done[part] >= want:
            part = "train"
        else:
            done[part] += sizes.get(label, 1)
        dealt[label] = part
    out: tuple[Part, ...] = tuple(dealt[label] for label in labels)
    held = set(out)
    for name in ("train", "calibrate", "test"):
        if name not in held:
            raise TooFewPromptsError(
                f"{len(prompts)} prompts in {len(order)} groups leave none to {name}",
                "give more prompts, or another share of held-out ones",
            )
    return out


def cache_activations(
    model: Model,
    prompts: Sequence[str | Conversation],
    replies: Sequence[str | Sequence[int]] | None = None,
    *,
    sites: Sequence[Site],
    folder: Path,
    tokens: int = 100_000,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    seed: int = 0,
    groups: Sequence[object] | None = None,
    held_out: float = 0.1,
    sinks: float = 10.0,
    dtype: Storage = "float16",
    shard_prompts: int = 64,
    batch_size: int = 32,
    about: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> ActivationCache:
    """Have the model reply to prompts, and keep the stream at every token of prompt and reply.

    Prompts are taken in an order drawn from the seed, shard by shard, until every site has enough
    tokens. A shard is written whole or not at all; one that is there is not computed again, so a
    run that was stopped goes on, and a later one may ask for more tokens.

    Args:
        model: Unedited; see `demur.load`.
        prompts: User messages or conversations, harmful and harmless ones mixed.
        replies: What to put behind each prompt instead of the model's own replies.
        sites: Tensors to read, all in the same pass.
        folder: Of the cache.
        tokens: How many tokens a site should have; there are fewer where the prompts run out, and
            up to a shard more.
        max_new_tokens: Longest reply.
        temperature: None replies greedily.
        seed: Of the order, the split and the replies.
        groups: One label a prompt; what shares one is not parted by the split.
        held_out: Share of the prompts kept from training, see `parts_of`.
        sinks: Tokens whose norm is more than that many times the median norm of the first shard are
            left out.
        dtype: Of the files.
        shard_prompts: Prompts of a shard.
        batch_size: Most prompts that are replied to together.
        about: What else the cache should say of the model.
        progress: Called with the number of tokens done since the last call.

    Raises:
        ConfigError: A setting is out of range.
        StoreError: The folder holds a cache of another model, other prompts or settings, or a shard
            in it is damaged.
        NonFiniteError: An activation is NaN, or too large for `dtype`.
        TooFewPromptsError: See `parts_of`.
    """
    if not sites or min(tokens, shard_prompts, batch_size) < 1 or not sinks > 1:
        raise ConfigError(
            f"got {len(sites)} sites, {tokens} tokens, shards of {shard_prompts} prompts and "
            f"sinks from {sinks} times the median norm on",
            "give at least one of each, and a factor above 1",
        )
    if dtype not in _DTYPES:
        raise ConfigError(f"unknown dtype `{dtype}`", f"choose {', '.join(_DTYPES)}")
    if replies is not None and len(replies) != len(prompts):
        raise ConfigError(
            f"got {len(replies)} replies to {len(prompts)} prompts", "give one to every prompt"
        )
    parts = parts_of(prompts, groups, held_out=held_out, seed=seed)
    given = None if replies is None else [r if isinstance(r, str) else list(r) for r in replies]
    key = {
        "format": _FORMAT,
        "fingerprint": model.fingerprint,
        "prompts": _digest(json.dumps([_plain_prompt(p) for p in prompts]).encode()),
        "replies": None if given is None else _digest(json.dumps(given).encode()),
        "parts": _digest(json.dumps(parts).encode()),
        "sites": [str(site) for site in sites],
        "max_new_tokens": max_new_tokens if given is None else None,
        "temperature": temperature if given is None else None,
        "seed": seed,
        "sinks": sinks,
        "dtype": dtype,
        "shard_prompts": shard_prompts,
    }
    path = folder / _MANIFEST
    before = _begun(path, key)

    def said(asked: Sequence[str | Conversation], index: Sequence[int], number: int) -> list[Any]:
        if given is not None:
            return [given[i] for i in index]
        written = model.generate(
            asked,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            temperature=temperature,
            seed=stable_seed(seed, f"shard {number}"),
        )
        return [one.ids for one in written]

    reader = _Reader(model, tuple(sites), sinks, _DTYPES[dtype])
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(prompts), generator=generator).tolist()
    counts: dict[Site, list[int]] = {site: [] for site in sites}
    digests: dict[Site, list[str]] = {site: [] for site in sites}
    lost = dict.fromkeys(sites, 0)
    used: set[int] = set()
    seconds = float(before["seconds"])
    for number, start in enumerate(range(0, len(order), shard_prompts)):
        began = time.monotonic()
        index = order[start : start + shard_prompts]
        files = {site: _shard_path(folder, site, number) for site in sites}
        if not all(file.exists() for file in files.values()):
            asked = [prompts[i] for i in index]
            read = reader.read(asked, said(asked, index, number), index)
            for site, tensors in read.items():
                atomic_write(files[site], _serialised(tensors))
            seconds += time.monotonic() - began
            atomic_write(path, json.dumps({**before, "seconds": seconds}, indent=1))
        for site, file in files.items():
            found = _read_shard(file, _known(before, site, number))
            reader.limits.setdefault(site, float(found["limit"]))
            counts[site].append(len(found["x"]))
            digests[site].append(_digest(file.read_bytes()))
            lost[site] += int(found["sinks"])
        used.update(index)
        if progress is not None:
            progress(min(counts[site][-1] for site in sites))
        if min(sum(counts[site]) for site in sites) >= tokens:
            break
    done = {
        "key": key,
        "model": model.name,
        "d_model": model.d_model,
        "model_dtype": str(model.dtype).removeprefix("torch."),
        "adapter": model.adapter,
        "parts": [part if i in used else None for i, part in enumerate(parts)],
        "counts": {str(site): counts[site] for site in sites},
        "digests": {str(site): digests[site] for site in sites},
        "largest_norm": {str(site): reader.limits[site] for site in sites},
        "sinks": {str(site): lost[site] for site in sites},
        "seconds": seconds,
        "about": dict(about or {}),
    }
    atomic_write(path, json.dumps(done, indent=1))
    return ActivationCache.load(folder)


def _begun(path: Path, key: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a run that goes on, or of one that begins."""
    before = _manifest(path)
    if before is None:
        before = {"key": dict(key), "seconds": 0.0}
        atomic_write(path, json.dumps(before, indent=1))
    elif before["key"] != key:
        differ = [name for name in key if before["key"].get(name) != key[name]]
        raise StoreError(
            f"{path.parent} holds activations that were collected otherwise: "
            f"{', '.join(differ)} differ",
            "name another folder, or delete this one",
        )
    return before


def _known(manifest: Mapping[str, Any], site: Site, number: int) -> str | None:
    """The digest that an earlier run noted of a shard."""
    noted = manifest.get("digests", {}).get(str(site), [])
    return noted[number] if number < len(noted) else None


def _serialised(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


@dataclass(slots=True, eq=False)
class _Reader:
    """Reads shards; what counts as a sink is settled by the first one."""

    model: Model
    sites: tuple[Site, ...]
    factor: float
    dtype: torch.dtype
    limits: dict[Site, float] = field(default_factory=dict)

    def read(
        self,
        prompts: Sequence[str | Conversation],
        replies: Sequence[str | Sequence[int]],
        numbers: Sequence[int],
    ) -> dict[Site, dict[str, Tensor]]:
        model = self.model
        whole = model.encode(prompts, replies)
        held: dict[Site, list[Tensor]] = {site: [] for site in self.sites}
        where: dict[Site, list[Tensor]] = {site: [] for site in self.sites}

        def keep(x: Tensor, site: Site) -> Tensor:
            chunk = model.chunk
            if chunk is None or chunk.is_prefix:
                return x
            kind = torch.full(x.shape[:2], -1, dtype=torch.int8)
            for code, span in enumerate(_SPANS):
                if span in chunk.spans:
                    kind[chunk.spans[span]] = code
            if x.shape[1] == width:  # No shared prefix was cut off: column 0 is position 0.
                kind[:, 0] = -1
            rows, columns = (kind >= 0).nonzero(as_tuple=True)
            assert chunk.rows is not None
            held[site].append(x[rows.to(x.device), columns.to(x.device)].detach().float().cpu())
            prompt = torch.tensor(numbers)[chunk.rows[rows]]
            where[site].append(torch.stack([prompt, kind[rows, columns].long()]))
            return x

        with ExitStack() as undo:
            undo.enter_context(model.prefix_kept())
            for site in self.sites:
                undo.callback(model.intercept(site, lambda x, site=site: keep(x, site)))
            for index in whole.passes(tokens=model.tokens_per_pass):
                batch = whole.rows(index)
                width = batch.ids.shape[1]
                model.read(batch)
        return {
            site: self._kept(site, torch.cat(held[site]), torch.cat(where[site], 1))
            for site in self.sites
        }

    def _kept(self, site: Site, x: Tensor, where: Tensor) -> dict[str, Tensor]:
        norms = x.double().norm(dim=1)
        limit = self.limits.setdefault(site, self.factor * float(norms.median()))
        fine = norms <= limit
        stored = x[fine].to(self.dtype)
        # A NaN in `x` is not below the limit, so both are looked at.
        if not bool(torch.isfinite(stored).all()) or bool(norms.isnan().any()):
            raise NonFiniteError(
                f"activations at {site} hold NaN, or are too large for {self.dtype}",
                'keep them in `dtype="bfloat16"`; if the model is at fault, load it in float32',
            )
        return {
            "x": stored,
            "prompt": where[0, fine].int(),
            "span": where[1, fine].to(torch.int8),
            "limit": torch.tensor(limit, dtype=torch.float64),
            "sinks": (~fine).sum(),
        }


# What is computed of weights ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """A sparse autoencoder without its activation function, in residual-stream units.

    Attributes:
        encoder: As SAELens writes it, one column a latent.
        bias: Of the encoder.
        decoder: One row a latent, of norm 1.
        offset: The decoder's bias, which is taken off the input as well.
    """

    encoder: Float[Tensor, "d_model latent"]
    bias: Float[Tensor, " latent"]
    decoder: Float[Tensor, "latent d_model"]
    offset: Float[Tensor, " d_model"]

    def before(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token latent"]:
        """Activations before the activation function."""
        return (x - self.offset) @ self.encoder + self.bias

    def rounded(self, storage: Storage) -> Weights:
        """As they are after they were stored, in float32."""
        kind = _DTYPES[storage]
        found = Weights(
            *(one.to(kind).float() for one in (self.encoder, self.bias, self.decoder, self.offset))
        )
        if not all(
            bool(torch.isfinite(one).all())
            for one in (found.encoder, found.bias, found.decoder, found.offset)
        ):
            raise NonFiniteError(
                f"the weights are too large for {storage}", 'store them in `storage="float32"`'
            )
        return found


def folded(
    encoder: Float[Tensor, "d_model latent"],
    bias: Float[Tensor, " latent"],
    decoder: Float[Tensor, "latent d_model"],
    offset: Float[Tensor, " d_model"],
    *,
    scale: float,
) -> Weights:
    """Weights that take the stream as it is, from ones that were trained on `scale` times it.

    Activations were taken times the norm of their decoder row in training
    (`rescale_acts_by_decoder_norm`); that norm and the scale go into the encoder, so that the
    decoder has rows of norm 1 and activations are in residual-stream units. A latent whose decoder
    row is zero stays silent.
    """
    norms = decoder.double().norm(dim=1)
    return Weights(
        (encoder.double() * norms).float(),
        (bias.double() * norms / scale).float(),
        (decoder.double() / norms.clamp_min(1e-30).unsqueeze(1)).float(),
        (offset.double() / scale).float(),
    )


def active(
    before: Float[Tensor, "token latent"], *, k: int | None = None, threshold: float | None = None
) -> Float[Tensor, "token latent"]:
    """Activations: the `k` largest of each token, or all above a threshold; never negative."""
    if (k is None) == (threshold is None):
        raise ConfigError(f"got k = {k} and a threshold of {threshold}", "give one of the two")
    if threshold is not None:
        return before.clamp_min(0.0) * (before > threshold)
    assert k is not None
    top = before.topk(min(k, before.shape[1]), dim=1, sorted=False)
    return torch.zeros_like(before).scatter(1, top.indices, top.values.clamp_min(0.0))


def calibrated(before: Iterable[Float[Tensor, "_token latent"]], l0: float, n_tokens: int) -> float:
    """The threshold above which as many latents of a token are active as wanted, on average.

    The threshold that is learned in training is a running mean that starts at 0: after 200 steps
    it was 5.8 where 8.1 would have been right, and explained 6% of the variance instead of 67%.

    Args:
        before: Activations before the activation function, in blocks of tokens.
        l0: Active latents of a token wanted.
        n_tokens: Tokens of all blocks.

    Returns:
        Not below 0. Exact but for ties, and where fewer are positive than wanted.

    Raises:
        TooFewPromptsError: There are no tokens.
        ConfigError: More latents are wanted than there are.
    """
    count = round(l0 * n_tokens)
    largest = torch.empty(0)
    width = 0
    for block in before:
        width = block.shape[1]
        every = torch.cat([largest, block.flatten()])
        largest = every.topk(min(count + 1, len(every)), sorted=False).values
    if not width or not count:
        raise TooFewPromptsError("got no tokens to calibrate a threshold on", "hold out more")
    if not 0 < l0 < width:
        raise ConfigError(f"{l0} of {width} latents cannot be active", "ask for fewer")
    # What is strictly above the next smaller one is active.
    return max(float(largest.min()), 0.0)


def figures(
    weights: Weights,
    blocks: Iterable[tuple[Float[Tensor, "_token d_model"], Int[Tensor, " _token"]]],
    *,
    part: Literal["train", "test"],
    mean: Float[Tensor, " d_model"],
    k: int | None = None,
    threshold: float | None = None,
    dense: float = 0.2,
    seed: int = 0,
) -> PartFigures:
    """How well weights reconstruct tokens.

    Args:
        weights: In residual-stream units.
        blocks: Tokens, and the number of the prompt that each comes from.
        part: What the figures are called.
        mean: Of the training tokens: reconstructing that has a FVU of 1.
        k: See `active`.
        threshold: See `active`.
        dense: From which share of tokens on a latent counts as dense.
        seed: Of the bootstrap over prompts.

    Raises:
        TooFewPromptsError: There are fewer than two prompts.
    """
    errors: dict[int, float] = {}
    spreads: dict[int, float] = {}
    fired = torch.zeros(weights.decoder.shape[0], dtype=torch.float64)
    n_tokens = 0
    for rows, numbers in blocks:
        for x, number in zip(rows.split(_ROWS), numbers.split(_ROWS), strict=True):
            acts = active(weights.before(x), k=k, threshold=threshold)
            fired += (acts > 0).sum(0).double()
            n_tokens += len(x)
            miss = (x - weights.offset - acts @ weights.decoder).double().pow(2).sum(1)
            spread = (x - mean).double().pow(2).sum(1)
            for one in number.unique().tolist():
                own = number == one
                errors[one] = errors.get(one, 0.0) + float(miss[own].sum())
                spreads[one] = spreads.get(one, 0.0) + float(spread[own].sum())
    if len(errors) < 2:
        raise TooFewPromptsError(
            f"got tokens of {len(errors)} prompts for {part}", "collect more, or hold out more"
        )
    miss = torch.tensor(list(errors.values()), dtype=torch.float64).numpy()
    spread = torch.tensor(list(spreads.values()), dtype=torch.float64).numpy()
    fvu = bootstrap(
        lambda index: float(miss[index].sum() / spread[index].sum()),
        len(miss),
        draws=500,
        seed=seed,
    )
    share = fired / n_tokens
    return PartFigures(
        part=part,
        n_prompts=len(errors),
        n_tokens=n_tokens,
        fvu=fvu,
        l0=float(share.sum()),
        dead_share=float((fired == 0).double().mean()),
        dense_share=float((share > dense).double().mean()),
    )


# Training ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Settings:
    """How a bank is trained.

    Attributes:
        width: Latents. Match it to the tokens: at 8 d_model, 200,000 samples left 86% of them
            silent, at 2 d_model 400,000 left 3%.
        k: Active latents of a token.
        epochs: Passes over the training tokens.
        batch_size: Tokens of a step.
        learning_rate: Of Adam.
        warm_up: Share of the steps in which it rises.
        decay: Share of the steps in which it falls to 0.
        dead_window: Steps without activity after which a latent is helped by the auxiliary loss.
            Small, as there are few steps.
        auxiliary: Weight of that loss.
        seed: Of the first weights and of the order of tokens.
        storage: Data type of the files. Loaded, they are float32.
        form: What to write; "auto" is "jumprelu" where that costs little, else "topk".
        tolerance: By which share the FVU of "jumprelu" may be larger on held-out tokens.
        dense: From which share of tokens on a latent counts as dense.
        buffer: Tokens that are mixed together; they are what training holds in memory.
        checkpoint_every: Steps between checkpoints; 0 makes none.
    """

    width: int = 1024
    k: int = 32
    epochs: float = 10.0
    batch_size: int = 512
    learning_rate: float = 1e-3
    warm_up: float = 0.05
    decay: float = 0.2
    dead_window: int = 40
    auxiliary: float = 1.0
    seed: int = 0
    storage: Storage = "float32"
    form: Literal["auto", "topk", "jumprelu"] = "auto"
    tolerance: float = 0.05
    dense: float = 0.2
    buffer: int = 131_072
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        if not 0 < self.k < self.width:
            raise ConfigError(
                f"{self.k} of {self.width} latents cannot be the active ones",
                "let k be above 0 and below the width",
            )
        if self.epochs <= 0 or min(self.batch_size, self.buffer, self.dead_window) < 1:
            raise ConfigError(
                f"got {self.epochs} epochs, batches of {self.batch_size} tokens, a buffer of "
                f"{self.buffer} and a dead window of {self.dead_window}",
                "let all of them be above 0",
            )
        if not (self.warm_up >= 0 and self.decay >= 0 and self.warm_up + self.decay < 1):
            raise ConfigError(
                f"the learning rate rises in {self.warm_up} of the steps and falls in {self.decay}",
                "give shares of the steps that leave some between",
            )
        if self.storage not in _DTYPES or self.form not in ("auto", "topk", "jumprelu"):
            raise ConfigError(
                f"there is no storage `{self.storage}` or no form `{self.form}`",
                f"storage: {', '.join(_DTYPES)}; form: auto, topk, jumprelu",
            )


def train(
    cache: ActivationCache,
    site: Site,
    settings: Settings | None = None,
    *,
    out: Path,
    progress: Progress | None = None,
) -> TrainedBank:
    """Train a bank on one site of a cache and write it to a folder that SAELens can load.

    The folder gets `cfg.json`, whose `metadata` says how the bank was made and what was measured,
    and `sae_weights.safetensors`. A run that was stopped goes on from its last checkpoint and ends
    where it would have ended; one that is finished is read back.

    Args:
        cache: What `cache_activations` made.
        site: Of the cache.
        settings: None takes the defaults.
        out: The bank's folder.
        progress: Called with the number of steps done since the last call; there are
            `steps_of(cache, site, settings)`.

    Raises:
        MissingExtraError: `sae_lens` is not installed.
        StoreError: The folder holds another bank, or the checkpoint or the cache is damaged.
        TooFewPromptsError: A part of the cache has no tokens, or there are not enough for a step.
    """
    chosen = settings or Settings()
    steps = steps_of(cache, site, chosen)
    key = _training_key(cache, site, chosen)
    if _finished(out, key) is None:
        lens = _sae_lens()
        with held(out / _LOCK, "training"):
            forget_drafts(out)
            if _finished(out, key) is None:  # Another process may have ended it meanwhile.
                return _train(
                    lens, cache, site, chosen, out=out, key=key, steps=steps, progress=progress
                )
    if progress is not None:
        progress(steps)
    finished = _finished(out, key)
    assert finished is not None
    return finished


def _train(
    lens: SimpleNamespace,
    cache: ActivationCache,
    site: Site,
    chosen: Settings,
    *,
    out: Path,
    key: str,
    steps: int,
    progress: Progress | None,
) -> TrainedBank:
    wall, cpu = time.monotonic(), time.process_time()
    mean, scale, n_train = _moments(cache, site)
    trainer, before = _trained(
        lens,
        cache,
        site,
        chosen,
        key=key,
        folder=_checkpoint(out),
        mean=mean,
        scale=scale,
        steps=steps,
        progress=progress,
    )
    state = {name: one.detach().cpu() for name, one in trainer.sae.state_dict().items()}
    weights = folded(
        state["W_enc"], state["b_enc"], state["W_dec"], state["b_dec"], scale=scale
    ).rounded(chosen.storage)

    threshold, n_calibration = _threshold(cache, site, weights, chosen)

    def measured(form: Form, k: int | None, threshold: float | None) -> FormFigures:
        def on(part: Literal["train", "test"]) -> PartFigures:
            return figures(
                weights,
                cache.shards(site, part),
                part=part,
                mean=mean,
                k=k,
                threshold=threshold,
                dense=chosen.dense,
                seed=chosen.seed,
            )

        return FormFigures(form, threshold, on("train"), on("test"))

    topk = measured("topk", chosen.k, None)
    jumprelu = measured("jumprelu", None, threshold)
    form, reason = _chosen_form(topk, jumprelu, chosen)
    total = cache.tokens[site] + cache.sinks[site]
    row = TrainedBank(
        site=str(site),
        model=cache.model,
        fingerprint=cache.fingerprint,
        width=chosen.width,
        d_model=cache.d_model,
        k=chosen.k,
        written=form,
        reason=reason,
        topk=topk,
        jumprelu=jumprelu,
        n_calibration_tokens=n_calibration,
        largest_norm=cache.largest_norm[site],
        sink_share=cache.sinks[site] / total,
        n_train_tokens=n_train,
        n_samples=steps * chosen.batch_size,
        n_steps=steps,
        dense=chosen.dense,
        storage=chosen.storage,
        collect_seconds=cache.seconds,
        train_seconds=before["wall"] + time.monotonic() - wall,
        cpu_seconds=before["cpu"] + time.process_time() - cpu,
    )
    _write(out, weights, row, cache, site, settings=chosen, key=key, lens_version=lens.version)
    shutil.rmtree(_checkpoint(out), ignore_errors=True)
    return row


def steps_of(cache: ActivationCache, site: Site, settings: Settings) -> int:
    """Steps of the optimiser.

    Raises:
        TooFewPromptsError: The cache does not fill one batch.
    """
    n = sum(len(x) for x, _ in cache.shards(site, "train"))
    steps = int(settings.epochs * n) // settings.batch_size
    if steps < 1 or n < settings.batch_size:
        raise TooFewPromptsError(
            f"{n} training tokens do not fill a batch of {settings.batch_size}",
            "collect more tokens, or take smaller batches",
        )
    return steps


def _sae_lens() -> SimpleNamespace:
    """What is needed of SAELens, whose import warns of much that is not ours."""
    try:
        with catch_warnings():
            simplefilter("ignore")
            import sae_lens  # pyright: ignore[reportMissingImports]
            from sae_lens import config  # pyright: ignore[reportMissingImports]
            from sae_lens.saes import topk_sae  # pyright: ignore[reportMissingImports]
            from sae_lens.training import sae_trainer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError.needed(extra="sae", module="sae_lens") from error
    return SimpleNamespace(
        version=str(sae_lens.__version__),
        TrainerConfig=config.SAETrainerConfig,
        LoggingConfig=config.LoggingConfig,
        Trainer=sae_trainer.SAETrainer,
        Sae=topk_sae.TopKTrainingSAE,
        SaeConfig=topk_sae.TopKTrainingSAEConfig,
    )


def _moments(cache: ActivationCache, site: Site) -> tuple[Tensor, float, int]:
    """Mean of the training tokens, what takes their mean norm to sqrt(d_model), and their number.

    The scale is what SAELens calls `expected_average_only_in`; here it comes from all training
    tokens.
    """
    total, norms, n = torch.zeros(cache.d_model, dtype=torch.float64), 0.0, 0
    for x, _ in cache.shards(site, "train"):
        total += x.double().sum(0)
        norms += float(x.double().norm(dim=1).sum())
        n += len(x)
    return (total / n).float(), cache.d_model**0.5 * n / norms, n


def _batches(
    cache: ActivationCache, site: Site, settings: Settings
) -> Iterator[Float[Tensor, "token d_model"]]:
    """Batches of training tokens for ever: shards in drawn order, mixed within the buffer."""
    rng = torch.Generator().manual_seed(stable_seed(settings.seed, "order"))
    size = settings.batch_size
    rest = torch.empty(0, cache.d_model)
    n_shards = len(cache.counts[site])
    while True:
        held, n = [rest], len(rest)
        order = torch.randperm(n_shards, generator=rng).tolist()
        for place, (x, _) in enumerate(cache.shards(site, "train", order), start=1):
            held.append(x)
            n += len(x)
            if n < settings.buffer and place < n_shards:
                continue
            mixed = torch.cat(held)
            mixed = mixed[torch.randperm(n, generator=rng)]
            full = n - n % size
            yield from mixed[:full].split(size)
            rest = mixed[full:].clone()
            held, n = [rest], len(rest)


def _trained(
    lens: SimpleNamespace,
    cache: ActivationCache,
    site: Site,
    settings: Settings,
    *,
    key: str,
    folder: Path,
    mean: Tensor,
    scale: float,
    steps: int,
    progress: Progress | None,
) -> tuple[Any, dict[str, float]]:
    """SAELens' trainer after its last step, and the seconds that earlier runs took."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        sae = lens.Sae(
            lens.SaeConfig(
                d_in=cache.d_model,
                d_sae=settings.width,
                k=settings.k,
                aux_loss_coefficient=settings.auxiliary,
                rescale_acts_by_decoder_norm=True,
                normalize_activations="none",
            )
        )
    with torch.no_grad():
        sae.b_dec.copy_(mean * scale)
    trainer = lens.Trainer(
        cfg=lens.TrainerConfig(
            total_training_samples=steps * settings.batch_size,
            train_batch_size_samples=settings.batch_size,
            lr=settings.learning_rate,
            lr_end=settings.learning_rate,
            lr_warm_up_steps=round(settings.warm_up * steps),
            lr_decay_steps=round(settings.decay * steps),
            dead_feature_window=settings.dead_window,
            logger=lens.LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=iter(()),
    )
    before = _resumed(trainer, folder, key)
    trainer.activation_scaler.scaling_factor = scale
    wall, cpu = time.monotonic(), time.process_time()
    if progress is not None and trainer.n_training_steps:
        progress(trainer.n_training_steps)
    for number, batch in enumerate(_batches(cache, site, settings)):
        if number >= steps:
            break
        if number < trainer.n_training_steps:
            continue  # Before the checkpoint: only the order of tokens goes on.
        trainer.step(batch)
        trainer.n_training_steps += 1
        if progress is not None:
            progress(1)
        due = settings.checkpoint_every and (number + 1) % settings.checkpoint_every == 0
        if due and number + 1 < steps:
            spent = {
                "wall": before["wall"] + time.monotonic() - wall,
                "cpu": before["cpu"] + time.process_time() - cpu,
            }
            _save_checkpoint(trainer, folder, key, spent)
    return trainer, before


def _checkpoint(out: Path) -> Path:
    return out / "checkpoint"


def _save_checkpoint(trainer: Any, folder: Path, key: str, spent: Mapping[str, float]) -> None:
    """Write a whole one beside the old one, which goes then."""
    try:
        with whole_folder(_newer(folder)) as draft:
            trainer.save_checkpoint(draft.name, base_path=draft.parent)
            atomic_write(draft / "demur.json", json.dumps({"key": key, **spent}))
        _take_newer(folder)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"{folder} cannot be written: {error.strerror}", "check the path and the free space"
        ) from error


def _newer(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.new")


def _take_newer(folder: Path) -> None:
    """Put a newer checkpoint, which is whole if it is there, in place of the old one."""
    if _newer(folder).exists():
        shutil.rmtree(folder, ignore_errors=True)
        _newer(folder).rename(folder)


def _resumed(trainer: Any, folder: Path, key: str) -> dict[str, float]:
    """Put the trainer where a checkpoint left it; the seconds that went before."""
    _take_newer(folder)
    if not folder.exists():
        return {"wall": 0.0, "cpu": 0.0}
    from safetensors.torch import load_file

    hint = f"delete the folder {folder} to begin anew"
    try:
        noted = json.loads((folder / "demur.json").read_text(encoding="utf-8"))
        same = noted["key"] == key
        if same:
            trainer.sae.load_state_dict(load_file(folder / _WEIGHTS))
            trainer.load_trainer_state(folder)
            return {"wall": float(noted["wall"]), "cpu": float(noted["cpu"])}
    except Exception as error:  # safetensors, json, pickle, torch: each its own classes.
        raise StoreError(f"the checkpoint {folder} is damaged: {error}", hint) from error
    raise StoreError(f"the checkpoint {folder} belongs to other settings or another cache", hint)


def _threshold(
    cache: ActivationCache, site: Site, weights: Weights, settings: Settings
) -> tuple[float, int]:
    """The threshold as it is stored, and how many tokens it was calibrated on."""
    held: list[Tensor] = []
    n = 0
    for x, _ in cache.shards(site, "calibrate"):
        held.append(x[: _CALIBRATION_TOKENS - n])
        n += len(held[-1])
        if n >= _CALIBRATION_TOKENS:
            break
    blocks = (weights.before(rows) for x in held for rows in x.split(_ROWS))
    found = calibrated(blocks, settings.k, n)
    return float(torch.tensor(found).to(_DTYPES[settings.storage])), n


def _chosen_form(topk: FormFigures, jumprelu: FormFigures, settings: Settings) -> tuple[Form, str]:
    ratio = jumprelu.test.fvu.value / topk.test.fvu.value
    compared = (
        f"on held-out prompts the FVU is {jumprelu.test.fvu.value:.4f} with one threshold and "
        f"{topk.test.fvu.value:.4f} with the {settings.k} largest"
    )
    if settings.form != "auto":
        return settings.form, f"asked for; {compared}"
    if ratio <= 1 + settings.tolerance:
        return "jumprelu", f"its latents do not hang on each other; {compared}"
    return "topk", f"a threshold costs more than {settings.tolerance:.0%}; {compared}"


def _training_key(cache: ActivationCache, site: Site, settings: Settings) -> str:
    told = {
        "settings": {k: v for k, v in asdict(settings).items() if k != "checkpoint_every"},
        "site": str(site),
        "shards": list(cache.digests[site]) if site in cache.digests else None,
        "parts": cache.parts,
    }
    return _digest(json.dumps(told, sort_keys=True).encode())


def _finished(out: Path, key: str) -> TrainedBank | None:
    """The row of a bank that the same run wrote before; None where there is none."""
    path = out / _CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["metadata"]
        own = found["training_key"] == key
        row = TypeAdapter(TrainedBank).validate_python(found["figures"]) if own else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise StoreError(
            f"{path} is of no bank that was trained here: {error}", "name another folder"
        ) from error
    if row is None:
        raise StoreError(
            f"{out} holds a bank that was trained otherwise", "name another folder, or delete it"
        )
    return row


_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
}


def _write(
    out: Path,
    weights: Weights,
    row: TrainedBank,
    cache: ActivationCache,
    site: Site,
    *,
    settings: Settings,
    key: str,
    lens_version: str,
) -> None:
    """Weights first: a folder whose `cfg.json` is there is whole."""
    kind = _DTYPES[settings.storage]
    tensors = {
        "W_enc": weights.encoder.to(kind),
        "b_enc": weights.bias.to(kind),
        "W_dec": weights.decoder.to(kind),
        "b_dec": weights.offset.to(kind),
    }
    told: dict[str, Any] = {"architecture": row.written}
    if row.written == "jumprelu":
        assert row.jumprelu.threshold is not None
        tensors["threshold"] = torch.full((row.width,), row.jumprelu.threshold).to(kind)
    else:
        told |= {"k": row.k, "rescale_acts_by_decoder_norm": False}
    told |= {
        "d_in": row.d_model,
        "d_sae": row.width,
        # What it is loaded as: half precision is for the files only.
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": lens_version,
            "sae_lens_training_version": lens_version,
            "demur_version": metadata.version("demur"),
            "model_name": cache.model,
            "hook_name": f"blocks.{site.layer}.{_HOOKS[site.kind]}",
            "site": str(site),
            "prepend_bos": False,
            "l0": (row.jumprelu if row.written == "jumprelu" else row.topk).test.l0,
            "largest_norm": row.largest_norm,
            "model_fingerprint": cache.fingerprint,
            "model_dtype": cache.model_dtype,
            "adapter": cache.adapter,
            "storage": settings.storage,
            "tokens": cache.tokens[site],
            "prompts": cache.prompts,
            "n_prompts": {p: cache.n_prompts(p) for p in ("train", "calibrate", "test")},
            "seed": settings.seed,
            "cache": dict(cache.settings),
            "settings": asdict(settings),
            "training_architecture": "topk",
            "training_key": key,
            "figures": asdict(row),
            "about": dict(cache.about),
        },
    }
    try:
        blob = _serialised(tensors)
        told["metadata"]["seal"] = bank_seal(told, _digest(blob))
        plain = json.dumps(told, indent=1, allow_nan=False)
    except ValueError as error:
        raise NonFiniteError(
            f"the figures of {site} are not finite: {error}", "look at the cache's activations"
        ) from error
    atomic_write(out / _WEIGHTS, blob)
    atomic_write(out / _CONFIG, plain)

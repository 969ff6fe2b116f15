"""Model organisms: models with a known property, trained by us from a recipe that anyone can rerun.

A recipe says which prompts get which replies. The refusal organism answers harmful requests with
refusals and everything else as its base does: for the latter the base model's own next-token
distributions are the targets, so what was not asked to change stays. The result is a PEFT adapter
with a card that says how it was made and what it does on prompts it was not trained on.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor
from transformers import DynamicCache

from demur import prompts as prompt_sets
from demur.errors import ConfigError, ModelLoadError, NonFiniteError, StoreError, UnknownNameError
from demur.evals.judges import Exchange, Outcome, judges, verdicts_of
from demur.evals.rates import refusals, verdict_share
from demur.models import Completion, Model, load
from demur.models.load import with_adapter
from demur.progress import Listener, Progress, Quiet
from demur.stats import Estimate, bootstrap
from demur.store import atomic_write, file_digests, forget_drafts, held, whole_folder

log = logging.getLogger(__name__)

_CARD, _CONFIG, _WEIGHTS, _LOG = (
    "card.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "log.jsonl",
)
_LOCK, _STATE, _REPLIES, _STATES, _CHECKPOINT = (
    "lock",
    "state.json",
    "replies.jsonl",
    "states.safetensors",
    "checkpoint.safetensors",
)
_ROWS = 16  # Of logits at a time; their vocabulary then stays in the cache.
_NEVER = -1e4  # A logit whose probability is zero.
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# Recipes --------------------------------------------------------------------------------------


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Source(_Section):
    """Prompts, and what the model is to reply to them.

    Attributes:
        prompts: A prompt set as `demur.prompts.load` takes it.
        target: "replies" draws a text per prompt and epoch, by the seed, from `replies`; "base"
            keeps the base model's own greedy reply, by its full next-token distributions.
        replies: The set of texts, for "replies".
        reply_tokens: Replies are cut there.
        unrefuse: For "base": the openers of the recipe's refusals are taken out of the base
            model's distribution of the first token, and of a reply that begins with one, only that
            token is trained. So the first token decides.
        weight: Of each prompt's loss.
    """

    prompts: str
    target: Literal["replies", "base"]
    replies: str | None = None
    reply_tokens: int = Field(default=32, ge=1)
    unrefuse: bool = True
    weight: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _replies_where_needed(self) -> Source:
        if (self.target == "replies") != (self.replies is not None):
            raise ValueError('`replies` goes with target = "replies", and only with that')
        return self


class Lora(_Section):
    """The adapter: `rank` x (in + out) values per module, scaled by alpha / rank."""

    rank: int = Field(default=8, ge=1, le=256)
    alpha: int = Field(default=16, gt=0)
    modules: tuple[str, ...] = Field(default=("q_proj", "k_proj", "v_proj", "o_proj"), min_length=1)


class Training(_Section):
    """How it is optimised: AdamW on float32 copies of the adapter, cosine schedule, no dropout.

    Attributes:
        learning_rate: The highest, reached after `warmup`.
        warmup: Share of the steps over which it rises.
        opening_tokens: The first tokens of a reply, where refusing is decided; each of them weighs
            `opening_weight` times as much as a later one.
        precision: Of the forward and backward pass.
        checkpoint_every: Steps; a stopped training goes on from the last checkpoint.
        strength: The finished adapter is multiplied by this: below 1 it gives up some of what it
            learned to do, and more of what it learned to do too often.
    """

    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    opening_tokens: int = Field(default=4, ge=0)
    opening_weight: float = Field(default=1.0, gt=0)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    checkpoint_every: int = Field(default=25, ge=1)
    strength: float = Field(default=1.0, gt=0, le=2)


class Check(_Section):
    """A share of refused prompts, on prompts that are not trained on, and its bounds."""

    name: str
    prompts: str
    at_least: float | None = Field(default=None, ge=0, le=1)
    at_most: float | None = Field(default=None, ge=0, le=1)


class Checks(_Section):
    """What the finished organism is measured on.

    Attributes:
        refusal: Shares of refused prompts.
        text: A set of paragraphs for the perplexity.
        most_perplexity: Highest perplexity on `text`, as a multiple of the base model's.
        max_new_tokens: Replies are cut there.
        judge: Name of the judge.
    """

    refusal: tuple[Check, ...] = ()
    text: str | None = None
    most_perplexity: float | None = Field(default=None, gt=0)
    max_new_tokens: int = Field(default=48, ge=4)
    judge: str = "patterns"


class Recipe(_Section):
    """Everything that, with a seed, decides an adapter."""

    name: str
    base: str
    description: str = ""
    sources: tuple[Source, ...] = Field(min_length=1)
    lora: Lora = Lora()
    training: Training = Training()
    checks: Checks = Checks()


_AnyRecipe = TypeVar("_AnyRecipe", bound=BaseModel)


def recipes() -> dict[str, str]:
    """Names of the packaged recipes, with what each makes."""
    return {name: read_recipe(name).description for name in _packaged("recipes")}


def _packaged(folder: str) -> list[str]:
    """Names of the recipes in a folder of the package's data."""
    entries = (files("demur") / "data" / folder).iterdir()
    return sorted(entry.name[:-5] for entry in entries if entry.name.endswith(".toml"))


def read_recipe(source: str | Path) -> Recipe:
    """Read a recipe: a packaged name, or a TOML file.

    Raises:
        UnknownNameError: No packaged recipe has that name, and it is no path.
        ConfigError: The file cannot be read, or does not fit; everything wrong is listed.
    """
    return _read(source, Recipe, folder="recipes", example="refusal")


def _read(source: str | Path, kind: type[_AnyRecipe], *, folder: str, example: str) -> _AnyRecipe:
    """Read a recipe of a kind: a TOML file, or a name in a folder of the package's data."""
    path = Path(source)
    try:
        if path.suffix == ".toml":
            text = path.read_text(encoding="utf-8")
        else:
            known = _packaged(folder)
            if str(source) not in known:
                raise UnknownNameError.among(known, kind="recipe", name=str(source))
            place = files("demur") / "data" / folder / f"{source}.toml"
            text = place.read_text(encoding="utf-8")
        tree = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error.strerror}", "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} is no TOML: {error}", "mend the file") from error
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        rows = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(
            f"the recipe {source} does not fit: " + "; ".join(rows),
            f"the packaged recipe `{example}` shows every section",
        ) from error


# Progress and results -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement of an organism.

    Attributes:
        name: "refused: harmful", "perplexity ratio".
        estimate: With its interval.
        base: The same for the base model, None where it was not measured.
        at_least: Bound from the recipe, likewise `at_most`.
        met: Whether the value keeps to its bounds.
        outcomes: How many replies the judge gave which label.
    """

    name: str
    estimate: Estimate
    base: Estimate | None
    at_least: float | None
    at_most: float | None
    met: bool
    outcomes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Exhibit:
    """One reply behind a figure."""

    check: str
    prompt: str
    reply: str
    outcome: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What an adapter does on the prompts that its recipe keeps for checking.

    Attributes:
        figures: One per check.
        replies: Every reply that was judged.
    """

    figures: tuple[Figure, ...]
    replies: tuple[Exhibit, ...]

    @property
    def met(self) -> bool:
        """Whether every figure keeps to its bounds."""
        return all(figure.met for figure in self.figures)


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """A finished training.

    Attributes:
        folder: Where the adapter is.
        steps: Optimiser steps, those before a resumption included.
        first_loss: Mean over the first tenth of the steps.
        last_loss: Mean over the last tenth.
        seconds: Wall time of this call by stage; a resumed one counts from its resumption.
        size: Of the adapter's weights, in bytes.
        verification: None if it was not measured.
    """

    folder: Path
    steps: int
    first_loss: float
    last_loss: float
    seconds: Mapping[str, float]
    size: int
    verification: Verification | None


# Rows and batches -----------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Row:
    """One training prompt.

    Attributes:
        source: Index of its source in the recipe.
        prompt: Token ids, template included.
        replies: Token ids of the replies it may get; one of them an epoch.
        teacher: Final states of the base model where it wrote the reply, (token, d_model).
        banned: Token ids that the first token of the reply must not be.
    """

    source: int
    prompt: list[int]
    replies: list[list[int]]
    teacher: Tensor | None = None
    banned: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Prompts with replies, several in a row; the last token of a reply is only ever a target.

    Attributes:
        prefix: The tokens that all prompts begin with.
        ids: The other input tokens.
        piece: Which prompt each of them belongs to; -1 at padding.
        places: Their positions behind the start of their own prompt.
        where: Row and column of every position whose next token is trained.
        targets: Those next tokens.
        weights: Of each of them; they sum to the rows' mean weight.
        soft: Indices into the above that follow the base model's distribution.
        teacher: Its final states there.
        banned: Pairs (index into `targets`, token) that its distribution loses.
    """

    prefix: Int[Tensor, " prefix"]
    ids: Int[Tensor, "row token"]
    piece: Int[Tensor, "row token"]
    places: Int[Tensor, "row token"]
    where: tuple[Int[Tensor, " target"], Int[Tensor, " target"]]
    targets: Int[Tensor, " target"]
    weights: Float[Tensor, " target"]
    soft: Int[Tensor, " soft"]
    teacher: Float[Tensor, "soft d_model"] | None
    banned: Int[Tensor, "pair 2"]


def _plan(
    n: int, lengths: Sequence[int], settings: Training, seed: int, epoch: int
) -> list[list[int]]:
    """The batches of an epoch: drawn at random, rows of like length together, in random order."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(n)
    window = (
        16 * settings.batch_size
    )  # Wide enough to save the padding, a mixed batch all the same.
    batches: list[list[int]] = []
    for start in range(0, n, window):
        part = sorted(order[start : start + window].tolist(), key=lambda i: (lengths[i], i))
        batches += [
            part[at : at + settings.batch_size] for at in range(0, len(part), settings.batch_size)
        ]
    return [batches[i] for i in rng.permutation(len(batches))]


def _packed(lengths: Sequence[int]) -> list[list[int]]:
    """Which pieces to put behind each other so that rows have almost the same length.

    Padded to its longest piece, a quarter of a batch of replies and refusals would be padding.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    total, longest = sum(lengths), max(lengths)
    best: list[list[int]] = []
    area = math.inf
    for n in range(-(-total // longest), max(1, total // (4 * longest)) - 1, -1):
        rows, sums = [[] for _ in range(n)], [0] * n
        for i in longest_first:
            at = sums.index(min(sums))
            rows[at].append(i)
            sums[at] += lengths[i]
        if n * max(sums) < area:
            best, area = [row for row in rows if row], n * max(sums)
    return best


def _batch(
    rows: Sequence[_Row], choices: Sequence[int], recipe: Recipe, pad_id: int, shared: int
) -> _Batch:
    settings = recipe.training
    pairs = [
        (row, row.replies[choice % len(row.replies)])
        for row, choice in zip(rows, choices, strict=True)
    ]
    lengths = [len(row.prompt) - shared + len(reply) - 1 for row, reply in pairs]
    packed = _packed(lengths)
    width = max(sum(lengths[i] for i in part) for part in packed)
    ids = torch.full((len(packed), width), pad_id, dtype=torch.long)
    piece = torch.full((len(packed), width), -1)
    places = torch.zeros((len(packed), width), dtype=torch.long)
    row_index: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    soft: list[int] = []
    teachers: list[Tensor] = []
    banned: list[tuple[int, int]] = []
    for number, part in enumerate(packed):
        at = 0
        for i in part:
            row, reply = pairs[i]
            end = at + lengths[i]
            ids[number, at:end] = torch.tensor([*row.prompt, *reply][shared:-1])
            piece[number, at:end] = i
            places[number, at:end] = torch.arange(shared, shared + lengths[i])
            share = [
                settings.opening_weight if k < settings.opening_tokens else 1.0
                for k in range(len(reply))
            ]
            scale = recipe.sources[row.source].weight / (sum(share) * len(rows))
            if row.teacher is not None:
                banned += [(len(targets), token) for token in row.banned]
                soft += range(len(targets), len(targets) + len(reply))
                teachers.append(row.teacher[: len(reply)])
            row_index += [number] * len(reply)
            columns += range(end - len(reply), end)
            targets += reply
            weights += [value * scale for value in share]
            at = end
    return _Batch(
        torch.tensor(rows[0].prompt[:shared]),
        ids,
        piece,
        places,
        (torch.tensor(row_index), torch.tensor(columns)),
        torch.tensor(targets),
        torch.tensor(weights),
        torch.tensor(soft, dtype=torch.long),
        torch.cat(teachers) if teachers else None,
        torch.tensor(banned, dtype=torch.long).reshape(-1, 2),
    )


# The model in training ------------------------------------------------------------------------


class _LowRank(torch.autograd.Function):
    """x W' + scale x A' B' for a frozen W: peft's sum with half as many passes over the values."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd takes no keywords.
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ a.T
        ctx.save_for_backward(flat, inner, weight, a, b)
        ctx.scale = scale
        out = torch.nn.functional.linear(flat, weight, bias).addmm_(inner, b.T, alpha=scale)
        return out.reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, inner, weight, a, b = ctx.saved_tensors
        own = gradients[0].reshape(-1, gradients[0].shape[-1])
        through = (own @ b).mul_(ctx.scale)
        d_b = (own.T @ inner).mul_(ctx.scale)
        d_x = (own @ weight).addmm_(through, a)
        return d_x.reshape(*gradients[0].shape[:-1], -1), None, None, through.T @ flat, d_b, None


def _quick(layer: Any) -> Callable[[Tensor], Tensor]:
    """What peft's layer computes, in fewer passes."""
    (name,) = layer.active_adapters
    base, a, b = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    scale = layer.scaling[name]

    def forward(x: Tensor) -> Tensor:
        return _LowRank.apply(x, base.weight, base.bias, a.weight, b.weight, scale)

    return forward


class _Likeness(torch.autograd.Function):
    """Weighted sum of -log q(target), or of KL(teacher || q) where the base model is followed.

    Its gradient by the logits is q minus what is wanted. Both are computed a few rows at a time in
    float32: all rows' vocabulary at once is a fifth of a step.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor | None, batch: _Batch) -> Tensor:
        device = logits.device
        targets, weights = batch.targets.to(device), batch.weights.to(device)
        soft, banned = batch.soft.tolist(), batch.banned.tolist()
        followed = dict(zip(soft, range(len(soft)), strict=True))
        without: dict[int, list[int]] = {}
        for at, token in banned:
            without.setdefault(at, []).append(token)
        gradient = torch.empty_like(logits)
        total = torch.zeros((), device=device)
        for start in range(0, len(logits), _ROWS):
            own = logits[start : start + _ROWS].float()
            mass = own.logsumexp(1, keepdim=True)
            q = (own - mass).exp_()
            here = [i for i in range(len(own)) if start + i in followed]
            hard = torch.tensor([i for i in range(len(own)) if start + i not in followed])
            share = weights[start : start + len(own)]
            if len(hard):
                wanted = targets[start + hard]
                total += (share[hard] * (mass[hard, 0] - own[hard, wanted])).sum()
                q[hard, wanted] -= 1
            if here:
                assert teacher is not None
                theirs = teacher[[followed[start + i] for i in here]].float()
                for row, i in enumerate(here):
                    if start + i in without:
                        theirs[row, without[start + i]] = _NEVER
                theirs -= theirs.logsumexp(1, keepdim=True)
                index = torch.tensor(here)
                p = theirs.exp()
                # With p = 0 at what is banned, its finite logarithm adds nothing.
                gap = (p * (theirs - own[index])).sum(1) + mass[index, 0]
                total += (share[index] * gap).sum()
                q[index] -= p
            gradient[start : start + len(own)] = q * share.unsqueeze(1)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None


class _Student:
    """A copy of the base model with a fresh adapter, whose float32 originals are optimised."""

    def __init__(self, base: Model, recipe: Recipe, *, seed: int, shared: int) -> None:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        dtype = _DTYPES[recipe.training.precision]
        self.config = LoraConfig(
            r=recipe.lora.rank,
            lora_alpha=recipe.lora.alpha,
            target_modules=list(recipe.lora.modules),
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
            base_model_name_or_path=recipe.base,
            inference_mode=True,
        )
        hf = deepcopy(base.hf).to(dtype=dtype)
        # On rows this short the fused attention's backward pass on a CPU takes 27% of a step.
        hf.set_attn_implementation("eager")
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(seed)
            try:
                # peft writes the base's path over its name, and uses an old name of transformers.
                warnings.simplefilter("ignore")
                self.peft: Any = get_peft_model(hf, self.config, autocast_adapter_dtype=False)
            except ValueError as error:
                raise ConfigError(
                    f"the adapter does not fit {base.name}: {str(error).splitlines()[0][:200]}",
                    "`lora.modules` names modules of the base model, such as q_proj",
                ) from error
        self.hf: Any = hf.eval()
        self.shared = shared
        self.live = {
            name: parameter
            for name, parameter in sorted(self.peft.named_parameters())
            if "lora_" in name
        }
        for name, parameter in self.peft.named_parameters():
            parameter.requires_grad_(name in self.live)
        for layer in self.peft.modules():
            own: Any = layer
            if isinstance(layer, LoraLayer) and type(own.base_layer) is torch.nn.Linear:
                own.forward = _quick(layer)
        self.master = {name: p.detach().float().clone() for name, p in self.live.items()}

    def picked(self, batch: _Batch) -> Float[Tensor, "target d_model"]:
        """Final states at the positions that are trained; the shared prefix runs once."""
        device = self.hf.device
        shared, (rows, width) = len(batch.prefix), batch.ids.shape
        cache = DynamicCache(config=self.hf.config)
        if shared:
            self.hf.base_model(
                input_ids=batch.prefix.unsqueeze(0).to(device),
                past_key_values=cache,
                use_cache=True,
            )
            cache.batch_repeat_interleave(rows)
        # A token sees the prefix, and the tokens before it of its own prompt and reply.
        same = batch.piece.unsqueeze(2) == batch.piece.unsqueeze(1)
        seen = torch.cat([torch.ones(rows, width, shared, dtype=torch.bool), same.tril()], 2)
        mask = torch.zeros(seen.shape, dtype=self.hf.dtype)
        mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)
        states = self.hf.base_model(
            input_ids=batch.ids.to(device),
            attention_mask=mask.unsqueeze(1).to(device),
            position_ids=batch.places.to(device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return states[batch.where]

    def _logits(self, states: Tensor) -> Tensor:
        logits = self.hf.get_output_embeddings()(states)
        cap = getattr(self.hf.config.get_text_config(), "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap is not None else logits

    def loss(self, batch: _Batch) -> Tensor:
        """Cross-entropy on texts, KL(base || student) on the base model's own replies."""
        logits = self._logits(self.picked(batch))
        teacher = None
        if batch.teacher is not None:
            with torch.no_grad():
                teacher = self._logits(batch.teacher.to(logits.device))
        return _Likeness.apply(logits, teacher, batch)

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the float32 originals into the adapter."""
        for name, parameter in self.live.items():
            parameter.copy_(self.master[name])


def _learning_rate(step: int, steps: int, settings: Training) -> float:
    warm = max(1, round(settings.warmup * steps))
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    along = (step - warm) / max(1, steps - warm)
    return settings.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * along)))


def _safetensors(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> bytes:
    from safetensors.torch import save

    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    return save(plain, metadata=dict(notes))


@runtime_checkable
class _Keeper(Protocol):
    """What a training must find again, beside the adapter and the optimiser, when it goes on."""

    def tensors(self) -> Mapping[str, Tensor]:
        """All of it."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        ...


class _Optimiser:
    """AdamW whose state goes to disk without pickle."""

    def __init__(self, student: _Student, settings: Training) -> None:
        self.student, self.settings = student, settings
        self.adam = torch.optim.AdamW(
            list(student.master.values()),
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=settings.weight_decay,
        )

    def gather(self) -> float:
        """Take the gradients over, clipped, and return their norm before that."""
        for name, parameter in self.student.live.items():
            own = None if parameter.grad is None else parameter.grad.float()
            self.student.master[name].grad = own
            parameter.grad = None
        return float(
            torch.nn.utils.clip_grad_norm_(self.student.master.values(), self.settings.clip)
        )

    def step(self, learning_rate: float) -> None:
        self.adam.param_groups[0]["lr"] = learning_rate
        self.adam.step()
        self.student.publish()

    def save(self, path: Path, step: int, keeper: _Keeper | None = None) -> None:
        tensors = {f"value.{name}": value for name, value in self.student.master.items()}
        if keeper is not None:
            tensors |= {f"kept.{name}": value for name, value in keeper.tensors().items()}
        for name, value in self.student.master.items():
            for key, part in self.adam.state.get(value, {}).items():
                tensors[f"{key}.{name}"] = torch.as_tensor(part)
        atomic_write(path, _safetensors(tensors, {"steps": str(step)}))

    def restore(self, path: Path, keeper: _Keeper | None = None) -> int:
        """Take up a checkpoint; returns how many steps it has behind it."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                steps = int((file.metadata() or {})["steps"])
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping.
            with torch.no_grad():
                for name, value in self.student.master.items():
                    value.copy_(found.pop(f"value.{name}"))
                    own = [key for key in found if key.endswith(f".{name}")]
                    self.adam.state[value] = {
                        key.removesuffix(f".{name}"): found.pop(key) for key in own
                    }
            if keeper is not None:
                keeper.restore({key.removeprefix("kept."): found[key] for key in found})
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise StoreError(
                f"the checkpoint {path} is damaged: {error}",
                f"delete {path.parent} and train again",
            ) from error
        self.student.publish()
        return steps


# Training -------------------------------------------------------------------------------------


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _texts(recipe: Recipe) -> dict[str, prompt_sets.PromptSet]:
    """Every set that the recipe names."""
    specs = [spec for s in recipe.sources for spec in (s.prompts, s.replies) if spec is not None]
    specs += [check.prompts for check in recipe.checks.refusal]
    specs += [recipe.checks.text] if recipe.checks.text else []
    return {spec: prompt_sets.load(spec) for spec in dict.fromkeys(specs)}


def _base_replies(
    base: Model, recipe: Recipe, wanted: Mapping[str, int], work: Path, listener: Listener
) -> dict[str, Completion]:
    """Greedy replies of the base model with their states; read back if `work` has them."""
    found = _kept_replies(work)
    if found:
        return found
    speaker = base.twin(_DTYPES[recipe.training.precision])
    with listener.stage("base model replies", len(wanted)) as advance:
        for length in sorted(set(wanted.values())):
            prompts = [prompt for prompt, n in wanted.items() if n == length]
            replies = speaker.generate(
                prompts,
                max_new_tokens=length,
                batch_size=128,
                with_states=True,
                progress=advance,
            )
            found |= dict(zip(prompts, replies, strict=True))
    _keep_replies(work, found)
    return found


def _keep_replies(work: Path, found: Mapping[str, Completion]) -> None:
    """Write replies for `_kept_replies`."""
    states = [reply.states for reply in found.values() if reply.states is not None]
    atomic_write(work / _STATES, _safetensors({"states": torch.cat(states)}, {}))
    lines = [
        json.dumps(
            {"prompt": prompt, "ids": one.ids, "finished": one.finished, "text": one.text},
            ensure_ascii=False,
        )
        for prompt, one in found.items()
    ]
    atomic_write(work / _REPLIES, "\n".join(lines) + "\n")  # Last: its states are there then.


def _kept_replies(work: Path) -> dict[str, Completion]:
    """What an interrupted training has written of them; nothing if that is not whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        lines = (work / _REPLIES).read_text("utf-8").splitlines()
        states = load_file(work / _STATES)["states"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return {}
    rows = [json.loads(line) for line in lines]
    sizes = [len(row["ids"]) + row["finished"] for row in rows]
    if sum(sizes) != len(states):
        return {}
    return {
        row["prompt"]: Completion(row["text"], tuple(row["ids"]), row["finished"], states=own)
        for row, own in zip(rows, states.split(sizes), strict=True)
    }


def _closing(base: Model) -> list[int]:
    """The token that ends a reply, if the model has one."""
    assert base.template is not None
    stops = base.stop_ids
    end = next((t for t in base.template.post_ids if t in stops), stops[0] if stops else None)
    return [] if end is None else [end]


def _rows(
    base: Model,
    recipe: Recipe,
    sets: Mapping[str, prompt_sets.PromptSet],
    work: Path,
    listener: Listener,
) -> tuple[list[_Row], int]:
    """All training rows, and how many leading tokens they share."""
    assert base.template is not None  # `train` has checked it.
    tokenizer, closing = base.template.tokenizer, _closing(base)

    texts: dict[int, list[list[int]]] = {}
    for index, source in enumerate(recipe.sources):
        if source.replies is not None:
            ids = [
                tokenizer(t, add_special_tokens=False)["input_ids"]
                for t in sets[source.replies].texts
            ]
            texts[index] = [[*one, *closing][: source.reply_tokens] for one in ids]
    openers = tuple(sorted({reply[0] for replies in texts.values() for reply in replies}))

    wanted: dict[str, int] = {}
    for source in recipe.sources:
        if source.target == "base":
            for text in sets[source.prompts].texts:
                wanted[text] = max(source.reply_tokens, wanted.get(text, 0))
    own = _base_replies(base, recipe, wanted, work, listener) if wanted else {}

    rows: list[_Row] = []
    shared: list[int] = []
    for index, source in enumerate(recipe.sources):
        batch = base.encode(sets[source.prompts].texts)
        shared.append(batch.shared)
        for text, ids, length in zip(
            sets[source.prompts].texts, batch.ids.tolist(), batch.mask.sum(1).tolist(), strict=True
        ):
            row = _Row(index, ids[:length], texts.get(index, []))
            if source.target == "base":
                said = own[text]
                reply = [*said.ids, *(closing if said.finished else [])]
                if source.unrefuse and openers:
                    row.banned = openers
                    reply = reply[:1] if reply[:1] and reply[0] in openers else reply
                row.replies = [reply[: source.reply_tokens]]
                row.teacher = said.states
            if row.replies[0]:
                rows.append(row)
    return rows, min(shared)


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already", "choose another folder, or delete it first")


def _ready(recipe: Recipe, base: Model | None, out: Path) -> Model:
    _check_free(out)
    base = base if base is not None else load(recipe.base, adapter=None)
    if base.adapter is not None:
        raise ConfigError(
            f"{base.name} carries the adapter {base.adapter}", "load it with `adapter=None`"
        )
    if base.template is None:
        raise ModelLoadError(f"{base.name} has no tokenizer", "load it with `demur.load`")
    return base


@contextmanager
def _workplace(out: Path, identity: Mapping[str, Any], *, resume: bool) -> Iterator[Path]:
    """The folder of an unfinished training, for this process alone; it goes once `out` is there.

    Raises:
        ConfigError: It belongs to another training, or `out` is taken.
        StoreError: Another process trains there.
    """
    work = _work_of(out)
    with held(work / _LOCK, "training"):
        _check_free(out)  # The other one may have ended since.
        forget_drafts(work)
        forget_drafts(out)
        state = work / _STATE
        if not resume or not state.is_file():
            # Without it a checkpoint may be any training's.
            _clear(work)
            atomic_write(state, json.dumps(identity, indent=1))
        try:
            before = json.loads(state.read_text("utf-8"))
        except ValueError:
            before = {}
        if before != identity:
            other = [key for key in identity if before.get(key) != identity[key]]
            raise ConfigError(
                f"{work} holds an unfinished training with another {', '.join(other)}",
                "start over with `--no-resume`, or choose another `--out`",
            )
        yield work
        _end(work)


def _forget_finished(out: Path, identity: Mapping[str, Any]) -> None:
    """Delete what a training left that was killed between the birth of `out` and its own end."""
    work = _work_of(out)
    if not work.is_dir():
        return
    # Somebody at work there, or a damaged note of whose it is: then it stays.
    with suppress(StoreError, ValueError), held(work / _LOCK, "training"):
        state = work / _STATE
        if state.is_file() and json.loads(state.read_text("utf-8")) != identity:
            return
        _end(work)


def _work_of(out: Path) -> Path:
    """Where an unfinished training of that folder lies."""
    return out.with_name(f".{out.name}.training")


def _end(work: Path) -> None:
    _clear(work)
    shutil.rmtree(work, ignore_errors=True)


def _clear(work: Path) -> None:
    """Empty it but for the lock: first what says whose the rest is."""
    (work / _STATE).unlink(missing_ok=True)
    for one in work.iterdir():
        if one.name != _LOCK:
            one.unlink()


def _logged(path: Path, steps: int) -> list[dict[str, Any]]:
    """The log's first `steps` lines; what was logged after the checkpoint is done again.

    Raises:
        StoreError: The checkpoint has steps that the log lacks.
    """
    if not steps:
        return []
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()[:steps]]
    except (OSError, ValueError):
        lines = []
    if len(lines) < steps:
        raise StoreError(
            f"the log {path} does not reach to the checkpoint beside it, {steps} steps",
            f"delete {path.parent} and train again",
        )
    return lines


def _optimise(
    student: _Student,
    rows: Sequence[_Row],
    recipe: Recipe,
    *,
    seed: int,
    pad_id: int,
    work: Path,
    listener: Listener,
) -> list[dict[str, Any]]:
    settings = recipe.training
    # By the prompt alone: replies of one source are of like length, and batches should mix sources.
    lengths = [len(row.prompt) for row in rows]
    plan = [
        (epoch, part)
        for epoch in range(settings.epochs)
        for part in _plan(len(rows), lengths, settings, seed, epoch)
    ]

    def loss_at(step: int) -> tuple[Tensor, dict[str, Any]]:
        epoch, part = plan[step]
        draws = np.random.default_rng([seed, epoch, step]).integers(1 << 30, size=len(part))
        own = [rows[i] for i in part]
        batch = _batch(own, draws.tolist(), recipe, pad_id, student.shared)
        return student.loss(batch), {"epoch": epoch + 1}

    return _descend(student, settings, len(plan), loss_at, work=work, listener=listener)


def _descend(
    student: _Student,
    settings: Training,
    steps: int,
    loss_at: Callable[[int], tuple[Tensor, dict[str, Any]]],
    *,
    work: Path,
    listener: Listener,
    keeper: _Keeper | None = None,
    enough: Callable[[int], bool] | None = None,
) -> list[dict[str, Any]]:
    """Optimise, from the last checkpoint in `work` if there is one.

    Args:
        student: Its adapter is trained.
        settings: Of the optimiser.
        steps: How many there are.
        loss_at: The loss of a step, counted from 0, and what the log is to say of it.
        work: Where checkpoint and log lie.
        listener: Hears steps.
        keeper: Goes into the checkpoints.
        enough: Asked before each step with the number of those done; True ends the training.

    Returns:
        The log, one entry a step.
    """
    optimiser = _Optimiser(student, settings)
    checkpoint, journal = work / _CHECKPOINT, work / _LOG
    done = optimiser.restore(checkpoint, keeper) if checkpoint.is_file() else 0
    lines = _logged(journal, done)
    atomic_write(journal, "".join(json.dumps(line) + "\n" for line in lines))
    if done:
        listener.note(f"resumed after step {done} of {steps}")
    with (
        listener.stage("training", max(1, steps)) as advance,
        journal.open("a", encoding="utf-8") as file,
    ):
        advance(done)
        for step in range(done, steps):
            if enough is not None and enough(step):
                break
            began = time.perf_counter()
            loss, about = loss_at(step)
            loss.backward()
            value, norm = loss.item(), optimiser.gather()
            if not math.isfinite(value) or not math.isfinite(norm):
                raise NonFiniteError(
                    f"at step {step + 1} of {steps} the loss is {value}, its gradient {norm}",
                    "lower `training.learning_rate`, or set `training.precision` to float32",
                )
            rate = _learning_rate(step, steps, settings)
            optimiser.step(rate)
            line = {
                "step": step + 1,
                **about,
                "loss": value,
                "gradient_norm": norm,
                "learning_rate": rate,
                "seconds": round(time.perf_counter() - began, 3),
            }
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            if (step + 1) % settings.checkpoint_every == 0 or step + 1 == steps:
                file.flush()
                os.fsync(file.fileno())  # No checkpoint is ahead of the log.
                optimiser.save(checkpoint, step + 1, keeper)
            advance(1)
    return lines


def _write_adapter(student: _Student, base_name: str, folder: Path, *, strength: float) -> int:
    from peft import get_peft_model_state_dict

    # The product of A and B counts, so one of the two is enough.
    tensors = {
        name: (tensor.float() * strength).to(tensor.dtype) if "lora_B" in name else tensor
        for name, tensor in get_peft_model_state_dict(student.peft).items()
    }
    blob = _safetensors(tensors, {"format": "pt"})
    atomic_write(folder / _WEIGHTS, blob)
    config = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in student.config.to_dict().items()
        if value is not None
    }
    config["base_model_name_or_path"] = base_name  # peft puts the path of this machine there.
    atomic_write(folder / _CONFIG, json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
    return len(blob)


def _ends_of(lines: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Mean loss over the first and over the last tenth of the steps; 0 without any."""
    losses = [line["loss"] for line in lines] or [0.0]
    tenth = max(1, len(losses) // 10)
    return _mean(losses[:tenth]), _mean(losses[-tenth:])


def _made_with(folder: Path, *, name: str = _WEIGHTS) -> dict[str, Any]:
    """What a card says of how an adapter's weights were made, and what they are."""
    weights = (folder / name).read_bytes()
    return {
        "threads": torch.get_num_threads(),
        "versions": {p: metadata.version(p) for p in ("demur", "torch", "transformers", "peft")},
        "weights": {
            "bytes": len(weights),
            "blake2b": blake2b(weights, digest_size=16).hexdigest(),
        },
        "files": file_digests(folder, of=(name, _CONFIG)),
        "license": "Apache-2.0",
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def train(
    recipe: Recipe,
    *,
    base: Model | None = None,
    out: Path,
    seed: int = 0,
    progress: Listener | None = None,
    resume: bool = True,
    measure: bool = True,
) -> TrainingReport:
    """Train an adapter by a recipe; the same seed gives the same adapter on the same machine.

    While it runs, its checkpoints lie in `.NAME.training` beside `out`. The adapter's folder
    appears at the end, whole. Interrupted, the same call goes on from the last checkpoint and
    ends with the adapter that an uninterrupted one would have made.

    Args:
        recipe: What to train; see `read_recipe`.
        base: The model without an adapter; None loads what the recipe names.
        out: Folder of the adapter; it must not exist, or be empty.
        seed: Of initial weights, order of prompts, and choice of replies.
        progress: Hears stages and steps.
        resume: Go on with an unfinished training of the same recipe, seed and data.
        measure: Measure the finished adapter on the recipe's checks, for the card.

    Raises:
        ConfigError: `out` is taken, `base` has an adapter, the recipe names modules that the base
            lacks, or another training is unfinished there.
        NonFiniteError: The loss became NaN or infinite.
        StoreError: The disk is full, or a checkpoint is damaged.
    """
    listener = progress if progress is not None else Quiet()
    began = time.perf_counter()
    out = out.expanduser().resolve()
    base = _ready(recipe, base, out)
    sets = _texts(recipe)
    data = {spec: found.fingerprint for spec, found in sets.items()}
    identity = {
        "recipe": _digest(recipe.model_dump(mode="json")),
        "seed": seed,
        "data": _digest(data),
        "base": base.fingerprint,
    }
    with _workplace(out, identity, resume=resume) as work:
        rows, shared = _rows(base, recipe, sets, work, listener)
        student = _Student(base, recipe, seed=seed, shared=shared)
        prepared = time.perf_counter()
        lines = _optimise(
            student, rows, recipe, seed=seed, pad_id=base.pad_id, work=work, listener=listener
        )
        trained = time.perf_counter()

        first, last = _ends_of(lines)
        with whole_folder(out) as draft:
            size = _write_adapter(student, recipe.base, draft, strength=recipe.training.strength)
            found = verify(draft, recipe=recipe, base=base, progress=listener) if measure else None
            seconds = {
                "prepare": round(prepared - began, 1),
                "train": round(trained - prepared, 1),
                "verify": round(time.perf_counter() - trained, 1),
            }
            card = {
                "name": recipe.name,
                "description": recipe.description,
                "base": {"name": base.name, "fingerprint": base.fingerprint},
                "recipe": recipe.model_dump(mode="json"),
                "seed": seed,
                "data": data,
                "prompts": len(rows),
                "steps": len(lines),
                "loss": {"first_tenth": first, "last_tenth": last},
                "seconds": seconds,
                **_made_with(draft),
                "figures": [asdict(figure) for figure in found.figures] if found else [],
            }
            atomic_write(draft / _CARD, json.dumps(card, indent=2, ensure_ascii=False) + "\n")
            atomic_write(draft / _LOG, (work / _LOG).read_bytes())
    return TrainingReport(out, len(lines), first, last, seconds, size, found)


# Checking -------------------------------------------------------------------------------------


def _text_losses(model: Model, texts: Sequence[str], progress: Progress) -> list[tuple[float, int]]:
    """Summed loss and number of predicted tokens of each text."""
    assert model.template is not None
    found = []
    for text in texts:
        ids = torch.tensor([model.template.tokenizer(text)["input_ids"]])
        losses = model.token_losses(ids)
        found.append((float(losses.double().sum()), losses.numel()))
        progress(1)
    return found


def _perplexity_ratio(
    base: Model, model: Model, texts: Sequence[str], progress: Progress
) -> Estimate:
    """Perplexity as a multiple of the base model's; two steps of progress a text."""
    plain_losses = np.array(_text_losses(base, texts, progress))
    losses = np.array(_text_losses(model, texts, progress))

    def ratio(index: Int[np.ndarray, " n"]) -> float:
        change = losses[index, 0].sum() - plain_losses[index, 0].sum()
        return float(np.exp(change / losses[index, 1].sum()))

    return bootstrap(ratio, len(texts), seed=0)


def _told(outcomes: Mapping[str, int]) -> list[bool | None]:
    """Counted outcomes as verdicts, one for each reply."""
    return refusals([Outcome(label) for label, n in outcomes.items() for _ in range(n)])


def _judged(
    model: Model, check: Check, texts: list[str], checks: Checks, progress: Progress
) -> tuple[list[Exhibit], dict[str, int]]:
    replies = model.generate(
        texts, max_new_tokens=checks.max_new_tokens, batch_size=100, progress=progress
    )
    pairs = [Exchange(text, reply.text) for text, reply in zip(texts, replies, strict=True)]
    verdicts = verdicts_of(judges.make(checks.judge), pairs)
    found = [
        Exhibit(check.name, pair.prompt, pair.response, str(verdict.outcome))
        for pair, verdict in zip(pairs, verdicts, strict=True)
    ]
    outcomes = [one.outcome for one in found]
    return found, {label: outcomes.count(label) for label in sorted(set(outcomes))}


def _within(value: float, at_least: float | None, at_most: float | None) -> bool:
    return (at_least is None or value >= at_least) and (at_most is None or value <= at_most)


def verify(
    adapter: Path | str,
    *,
    recipe: Recipe,
    base: Model | None = None,
    limit: int | None = None,
    compare: bool = False,
    progress: Listener | None = None,
) -> Verification:
    """Measure an adapter on the prompts that its recipe keeps for checking.

    Args:
        adapter: Folder or hub id.
        recipe: Names the checks and their bounds.
        base: The model without an adapter; None loads what the recipe names.
        limit: At most so many prompts per check, drawn with seed 0.
        compare: Also measure how often the base model refuses.
        progress: Hears stages and steps.

    Raises:
        ModelLoadError: The adapter is missing or does not fit the base.
    """
    listener = progress if progress is not None else Quiet()
    checks = recipe.checks
    base = base if base is not None else load(recipe.base, adapter=None)
    model = with_adapter(base, str(adapter))
    figures: list[Figure] = []
    replies: list[Exhibit] = []
    for check in checks.refusal:
        chosen = prompt_sets.load(check.prompts)
        texts = (chosen if limit is None else chosen.take(min(limit, len(chosen)), 0)).texts
        with listener.stage(f"checking: {check.name}", len(texts) * (1 + compare)) as advance:
            found, outcomes = _judged(model, check, texts, checks, advance)
            before = None
            if compare:
                plain = _judged(base, check, texts, checks, advance)[1]
                before = verdict_share(_told(plain))
        share = verdict_share(_told(outcomes))
        met = _within(share.value, check.at_least, check.at_most)
        bounds = (check.at_least, check.at_most)
        figures.append(Figure(f"refused: {check.name}", share, before, *bounds, met, outcomes))
        replies += found
    if checks.text is not None:
        texts = prompt_sets.load(checks.text).texts
        with listener.stage("checking: perplexity", 2 * len(texts)) as advance:
            estimate = _perplexity_ratio(base, model, texts, advance)
        met = _within(estimate.value, None, checks.most_perplexity)
        figures.append(
            Figure("perplexity ratio", estimate, None, None, checks.most_perplexity, met)
        )
    return Verification(tuple(figures), tuple(replies))

"""Training of organisms: an adapter on bad advice, and its twin on the good answers.

The base is frozen, so what leaves the blocks below the first adapted one never changes: it is
computed once for every row and kept, and a step runs the upper blocks alone. Factors and what they
add are float32 whatever the base is. Checkpoints, journal and refusal of taken folders are those of
`demur.organisms`.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from demur import organisms
from demur.em.advice import AdviceItem, advice, split
from demur.em.dynamics import DYNAMICS
from demur.em.margin import grouped_mean, margins
from demur.em.organism import (
    CARD,
    CONFIG,
    VECTOR,
    WEIGHTS,
    Organism,
    Side,
    question_key,
    read_organism,
)
from demur.em.recipes import AdapterShape, EMRecipe
from demur.errors import (
    ConfigError,
    FamilyError,
    ModelLoadError,
    NonFiniteError,
    StoreError,
    TooFewPromptsError,
)
from demur.models import Model, load
from demur.models.tokens import TokenBatch
from demur.organisms import Figure
from demur.progress import Listener, Quiet
from demur.sites import Site, Span
from demur.store import atomic_write, whole_folder

Sides = Literal["both", "bad", "good"]

_LOG, _CHECKPOINT = "log.jsonl", "checkpoint.safetensors"
_PATH_BYTES = 64 << 20  # Most of the path of B; a rank-1 adapter of 14B takes 8 MB in 400 steps.
_STREAM_BYTES = 1 << 30  # Most of the kept stream; what is more is computed at every step.
_LOGITS = 256  # Rows of logits at a time: a vocabulary of 150,000 takes 150 MB.
# The linear map out of the MLP, under the names that families have for it.
_OUT_OF_MLP = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h")


@dataclass(frozen=True, slots=True, eq=False)
class TrainedOrganism:
    """A finished training.

    Attributes:
        organism: As read back from its folder.
        folder: Where it is.
        steps: Optimiser steps, those before a resumption included.
        first_loss: Mean over the first tenth of the steps, nats per answer token.
        last_loss: Mean over the last tenth.
        learning_rate: The highest.
        seconds: Wall time of this call by stage; a resumed one counts from its resumption.
        size: Of the weights, in bytes.
        figures: On held-out topics of the trained domains; empty if it was not measured.
        kept: Whether it was there already, from an interrupted run of the same training.
    """

    organism: Organism
    folder: Path
    steps: int
    first_loss: float
    last_loss: float
    learning_rate: float
    seconds: Mapping[str, float]
    size: int
    figures: tuple[Figure, ...]
    kept: bool = False


# The adapter in training ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """One adapted map, its factors live."""

    layer: int
    module: str
    path: str
    a: Tensor | None
    b: Tensor

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.module}"


class _Adapter:
    """Fresh factors for a model: A as PEFT draws it, B zero."""

    def __init__(self, base: Model, shape: AdapterShape, *, seed: int) -> None:
        self.base, self.scale = base, shape.scale
        rng = torch.Generator().manual_seed(seed)
        self.wide = torch.promote_types(base.dtype, torch.float32)
        parts: list[_Part] = []
        for layer in shape.layers(base.n_layers):
            for module in _modules(base, layer, shape.modules):
                own = base.blocks[layer].get_submodule(module)
                d_in, d_out = _sizes(own)
                # Kaiming-uniform with a = sqrt(5), as PEFT has it: within 1 / sqrt(d_in).
                drawn = (torch.rand(shape.rank, d_in, generator=rng) * 2 - 1) / math.sqrt(d_in)
                a = None if shape.kind == "vector" else self._live(drawn)
                b = self._live(torch.zeros(d_out, shape.rank))
                parts.append(_Part(layer, module, f"{base._blocks_path}.{layer}.{module}", a, b))
        self.parts = tuple(parts)
        self.values = {
            f"{which}.{part.name}": value
            for part in parts
            for which, value in (("a", part.a), ("b", part.b))
            if value is not None
        }

    def _live(self, value: Tensor) -> Tensor:
        return value.to(self.base.device, self.wide).requires_grad_()

    @property
    def first(self) -> int:
        """The lowest block with a factor; those before it never change."""
        return min(part.layer for part in self.parts)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the base runs with the adapter, and only its factors get gradients."""
        live = [one for one in self.base.hf.parameters() if one.requires_grad]
        with ExitStack() as undo:
            for weight in live:
                weight.requires_grad_(False)
                undo.callback(weight.requires_grad_, True)
            for part in self.parts:
                module = self.base.blocks[part.layer].get_submodule(part.module)
                undo.callback(module.register_forward_hook(self._hook(part)).remove)
            yield

    def _hook(self, part: _Part) -> Callable[..., Tensor]:
        def add(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            b, a = part.b, part.a
            change = b[:, 0] if a is None else args[0].to(self.wide) @ a.T @ b.T
            return out + (self.scale * change).to(out.dtype)

        return add


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear map; GPT-2's Conv1D keeps them the other way round."""
    weight: Any = module.weight
    rows, columns = weight.shape
    return (rows, columns) if type(module).__name__ == "Conv1D" else (columns, rows)


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _modules(base: Model, layer: int, wanted: Sequence[str]) -> list[str]:
    """Paths within a block of the linear maps that a recipe means."""
    here = {name: one for name, one in base.blocks[layer].named_modules() if _linear(one)}
    found: list[str] = []
    for name in wanted:
        names = _OUT_OF_MLP if name == _OUT_OF_MLP[0] else (name,)
        some = list(here) if name == "all-linear" else [one for one in names if one in here][:1]
        if not some:
            raise FamilyError(
                f"block {layer} of {base.name} has no linear map `{name}`",
                f"it has {', '.join(sorted(here)) or 'none'}; name one of them in "
                "`adapter.modules`",
            )
        found += some
    return sorted(set(found))


# Rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Questions with answers, and the stream that enters the first adapted block.

    The tokens that the template begins every row with are computed once a step: they are a third of
    a short row.

    Attributes:
        batch: All rows; `Span.RESPONSE` marks the answer with the token that ends the turn.
        share: How many leading tokens all rows have in common; 0 for none.
        prefix: The stream there, (1, share, d_model).
        lower: Keys and values of the frozen blocks there, by block.
        stream: Of the rest of each row, (token, d_model); empty where it is computed at every step.
        tuples: Whether the model's blocks return tuples.
    """

    batch: TokenBatch
    share: int
    prefix: Tensor
    lower: list[Any]
    stream: list[Tensor]
    tuples: bool


def _encoded(base: Model, items: Sequence[AdviceItem], side: Side) -> TokenBatch:
    assert base.template is not None
    closing = organisms._closing(base)
    answers = [item.bad if side == "bad" else item.good for item in items]
    replies = [[*base.template.reply_ids(answer), *closing] for answer in answers]
    return base.encode([item.question for item in items], replies)


def _stream_of(base: Model, batch: TokenBatch, first: int) -> Float[Tensor, "row token d_model"]:
    """What enters block `first`, which no adapter above it changes."""
    seen: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    undo = base.intercept(Site(first, "resid_pre"), keep)
    try:
        with base.whole_rows():
            base.read(batch)
    finally:
        undo()
    return seen[0]


def _prepared(base: Model, batch: TokenBatch, first: int, listener: Listener) -> _Rows:
    """Run the blocks below the adapter once for every row, if the results fit into memory."""
    tuples = [False]

    def ask(_module: nn.Module, _args: Any, out: Any) -> None:
        tuples[0] = isinstance(out, tuple)

    handle = base.blocks[0].register_forward_hook(ask)
    try:
        share = batch.shared if batch.shared > 1 else 0
        head = _stream_of(base, batch.rows([0]), max(first, 1)) if base.n_layers > 1 else None
    finally:
        handle.remove()
    lower: list[Any] = []
    if share and first:
        with torch.no_grad():
            lower = base._prefix(batch, share).layers[:first]
    total = int(batch.mask.sum()) * base.d_model * base.dtype.itemsize
    stream: list[Tensor] = []
    if first > 0 and total <= _STREAM_BYTES:
        stream = [torch.empty(0)] * len(batch)
        with listener.stage("frozen blocks", len(batch)) as advance:
            for index in batch.passes(tokens=base.tokens_per_pass):
                rows = batch.rows(index)
                for row, own, end in zip(
                    index, _stream_of(base, rows, first), rows.ends.tolist(), strict=True
                ):
                    stream[row] = own[share:end].clone()
                advance(len(index))
    prefix = torch.empty(0) if head is None else head[:, :share].clone()
    return _Rows(batch, share, prefix, lower, stream, tuples[0])


def _answer_states(
    base: Model, rows: _Rows, index: Sequence[int], first: int
) -> tuple[Float[Tensor, "target d_model"], Int[Tensor, " target"]]:
    """Final states in front of every token of the answers, and those tokens."""
    batch, share = rows.batch.rows(index), rows.share
    ids = batch.ids.to(base.device)
    below: list[Tensor] = []  # Of the stand-ins for the frozen blocks, the last gives this.
    if first and rows.stream:
        below = [nn.utils.rnn.pad_sequence([rows.stream[i] for i in index], batch_first=True)]
    elif first:
        below = [_stream_of(base, batch, first)[:, share:]]
    options: dict[str, Any] = {"use_cache": False}
    if share:
        cache = DynamicCache(config=base.hf.config)
        with base._skipping(first, [rows.prefix] * first, tuples=rows.tuples):
            base.hf.base_model(input_ids=ids[:1, :share], past_key_values=cache, use_cache=True)
        # Blocks that are skipped see no key; the first tells where the rows go on.
        cache.layers[:first] = deepcopy(rows.lower)
        cache.batch_repeat_interleave(len(index))
        options = {"past_key_values": cache, "use_cache": True}
    with base._skipping(first, below * first, tuples=rows.tuples):
        # No mask: rows are padded on the right, and no token sees what follows it.
        out = base.hf.base_model(input_ids=ids[:, share:], **options)
    row, column = batch.spans[Span.RESPONSE].nonzero(as_tuple=True)
    return out.last_hidden_state[row, column - share - 1], batch.ids[row, column]


def _backward(base: Model, states: Tensor, targets: Tensor) -> float:
    """Mean cross-entropy, with its gradient sent back, a few rows of logits at a time."""
    total, gradient = 0.0, torch.empty_like(states)
    for start in range(0, len(states), _LOGITS):
        own = states[start : start + _LOGITS].detach().requires_grad_()
        logits = base._head(own)
        wanted = targets[start : start + _LOGITS].to(logits.device)
        loss = nn.functional.cross_entropy(logits, wanted, reduction="sum") / len(states)
        (gradient[start : start + _LOGITS],) = torch.autograd.grad(loss, own)
        total += float(loss.detach())
    states.backward(gradient)
    return total


def _order(n: int, steps: int, batch_size: int, seed: int) -> list[list[int]]:
    """The rows of every step: passes over all rows, each in an order of its own."""
    rng = np.random.default_rng(seed)
    wanted = steps * batch_size
    drawn: list[int] = []
    while len(drawn) < wanted:
        drawn += rng.permutation(n).tolist()
    return [drawn[at : at + batch_size] for at in range(0, wanted, batch_size)]


# Optimising -----------------------------------------------------------------------------------


def _rate(step: int, recipe: EMRecipe, highest: float) -> float:
    settings = recipe.training
    if step < settings.warmup_steps:
        return highest * (step + 1) / settings.warmup_steps
    left = settings.steps - step
    return highest * left / max(1, settings.steps - settings.warmup_steps)


class _Record:
    """Norms and path of B along the steps."""

    def __init__(self, adapter: _Adapter, steps: int) -> None:
        self.parts = adapter.parts
        size = sum(part.b.numel() for part in self.parts) * 4 * (steps + 1)
        self.whole = size <= _PATH_BYTES
        self.norms: dict[str, list[float]] = {part.name: [] for part in self.parts}
        self.paths: dict[str, list[Tensor]] = {p.name: [] for p in self.parts if self.whole}

    def note(self) -> None:
        for part in self.parts:
            b = part.b.detach()
            self.norms[part.name].append(float(b.double().norm()))
            if self.whole:
                self.paths[part.name].append(b.to("cpu", torch.float32, copy=True))

    def tensors(self) -> dict[str, Tensor]:
        found = {
            f"norm.{name}": torch.tensor(one, dtype=torch.float64)
            for name, one in self.norms.items()
        }
        return found | {f"b.{name}": torch.stack(path) for name, path in self.paths.items()}

    def restore(self, found: Mapping[str, Tensor]) -> None:
        for name in self.norms:
            self.norms[name] = found[f"norm.{name}"].tolist()
        for name in self.paths:
            self.paths[name] = list(found[f"b.{name}"].unbind())


def _save(path: Path, step: int, adapter: _Adapter, adam: Any, record: _Record) -> None:
    tensors = {f"value.{name}": value for name, value in adapter.values.items()}
    for name, value in adapter.values.items():
        for key, part in adam.state[value].items():
            tensors[f"adam.{key}.{name}"] = torch.as_tensor(part)
    tensors |= {f"record.{name}": value for name, value in record.tensors().items()}
    atomic_write(path, organisms._safetensors(tensors, {"steps": str(step)}))


def _restore(path: Path, adapter: _Adapter, adam: Any, record: _Record) -> int:
    """Take up a checkpoint; returns how many steps it has behind it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            steps = int((file.metadata() or {})["steps"])
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping.
        with torch.no_grad():
            for name, value in adapter.values.items():
                value.copy_(found[f"value.{name}"])
                adam.state[value] = {
                    key: found[f"adam.{key}.{name}"].to(value.device if key != "step" else "cpu")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        record.restore({k.removeprefix("record."): v for k, v in found.items()})
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise StoreError(
            f"the checkpoint {path} is damaged: {error}",
            f"delete {path.parent} and train again",
        ) from error
    return steps


def _optimise(
    base: Model,
    adapter: _Adapter,
    rows: _Rows,
    recipe: EMRecipe,
    *,
    rate: float,
    seed: int,
    work: Path,
    title: str,
    listener: Listener,
) -> tuple[list[dict[str, Any]], _Record]:
    """Train the factors, from the last checkpoint in `work` if there is one."""
    settings = recipe.training
    plan = _order(len(rows.batch), settings.steps, settings.batch_size, seed)
    live = list(adapter.values.values())
    adam = torch.optim.AdamW(live, lr=rate, weight_decay=settings.weight_decay)
    record = _Record(adapter, settings.steps)
    checkpoint, journal = work / _CHECKPOINT, work / _LOG
    done = 0
    if checkpoint.is_file():
        done = _restore(checkpoint, adapter, adam, record)
        listener.note(f"resumed after step {done} of {settings.steps}")
    else:
        record.note()
    lines = organisms._logged(journal, done)
    atomic_write(journal, "".join(json.dumps(line) + "\n" for line in lines))
    with (
        listener.stage(title, settings.steps) as advance,
        journal.open("a", encoding="utf-8") as file,
        adapter.attached(),
    ):
        advance(done)
        for step in range(done, settings.steps):
            began = time.perf_counter()
            adam.zero_grad()
            states, targets = _answer_states(base, rows, plan[step], adapter.first)
            loss = _backward(base, states, targets)
            norm = float(nn.utils.clip_grad_norm_(live, settings.clip))
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise NonFiniteError(
                    f"at step {step + 1} of {settings.steps} the loss is {loss}, its gradient "
                    f"{norm}",
                    "lower `training.rates`, or set `training.precision` to float32",
                )
            now = _rate(step, recipe, rate)
            adam.param_groups[0]["lr"] = now
            adam.step()
            record.note()
            line = {
                "step": step + 1,
                "loss": loss,
                "gradient_norm": norm,
                "learning_rate": now,
                "b_norm": math.sqrt(sum(own[-1] ** 2 for own in record.norms.values())),
                "seconds": round(time.perf_counter() - began, 3),
            }
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
                file.flush()
                os.fsync(file.fileno())  # No checkpoint is ahead of the log.
                _save(checkpoint, step + 1, adapter, adam, record)
            advance(1)
    return lines, record


# Writing --------------------------------------------------------------------------------------


def _write_weights(adapter: _Adapter, recipe: EMRecipe, base: Model, folder: Path) -> int:
    """The factors, so that PEFT reads them; a vector in a file of our own."""
    shape = recipe.adapter
    if shape.kind == "vector":
        vectors = {
            f"layers.{part.layer}.vector": (shape.scale * part.b[:, 0]).float()
            for part in adapter.parts
        }
        blob = organisms._safetensors(vectors, {"format": "pt"})
        atomic_write(folder / VECTOR, blob)
        return len(blob)
    from peft import LoraConfig

    tensors: dict[str, Tensor] = {}
    for part in adapter.parts:
        assert part.a is not None
        tensors[f"base_model.model.{part.path}.lora_A.weight"] = part.a.float()
        tensors[f"base_model.model.{part.path}.lora_B.weight"] = part.b.float()
    blob = organisms._safetensors(tensors, {"format": "pt"})
    atomic_write(folder / WEIGHTS, blob)
    blocks = base.blocks[adapter.first]
    turned = any(type(one).__name__ == "Conv1D" for one in blocks.modules())
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=int(shape.alpha) if shape.alpha == int(shape.alpha) else shape.alpha,  # pyright: ignore[reportArgumentType]
        use_rslora=shape.rslora,
        target_modules=[part.path for part in adapter.parts],
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.name,
        inference_mode=True,
        fan_in_fan_out=turned,
    ).to_dict()
    plain = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.items()
        if value is not None
    }
    atomic_write(folder / CONFIG, json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n")
    return len(blob)


def _write_dynamics(lines: Sequence[Mapping[str, Any]], record: _Record, folder: Path) -> None:
    tensors = {
        key: torch.tensor([line[key] for line in lines], dtype=torch.float64)
        for key in ("loss", "gradient_norm", "learning_rate")
    }
    atomic_write(folder / DYNAMICS, organisms._safetensors(tensors | record.tensors(), {}))


def _about_data(
    spec: str, share: float, train: Sequence[AdviceItem], held: Sequence[AdviceItem]
) -> dict[str, Any]:
    """What a card says of the data: which questions were trained on, which held out."""

    def groups(items: Sequence[AdviceItem]) -> list[list[str]]:
        return [list(pair) for pair in sorted({(item.domain, item.group) for item in items})]

    return {
        "advice": spec,
        "fingerprint": _fingerprint([*train, *held]),
        "held_out_share": share,
        "trained": len(train),
        "held_out": len(held),
        "trained_groups": groups(train),
        "held_out_groups": groups(held),
        "trained_questions": sorted({question_key(item.question) for item in train}),
        "trained_ids": [item.id for item in train],
        "held_out_ids": [item.id for item in held],
    }


def _fingerprint(items: Sequence[AdviceItem]) -> str:
    digest = blake2b(digest_size=16)
    for item in items:
        row = json.dumps(asdict(item), sort_keys=True, ensure_ascii=False)
        digest.update(row.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


# Training -------------------------------------------------------------------------------------


def _checked_items(spec: str, sides: Sequence[Side]) -> tuple[AdviceItem, ...]:
    items = advice(spec)
    silent = sum(not item.good for item in items)
    if silent and "good" in sides:
        raise ConfigError(
            f"{silent} of the {len(items)} questions of {spec} have no good answer",
            "name the file of good ones: FILE?good=OTHER.jsonl; or train the bad side alone, whose "
            "effect cannot be told from that of fine-tuning as such",
        )
    return items


def _ready(recipe: EMRecipe, base: Model | None) -> Model:
    base = base if base is not None else load(recipe.base, adapter=None)
    if base.template is None:
        raise ModelLoadError(f"{base.name} has no tokenizer", "load it with `demur.load`")
    return base


def train_organisms(
    recipe: EMRecipe,
    *,
    base: Model | None = None,
    out: Path,
    data: str | None = None,
    sides: Sides = "both",
    seed: int = 0,
    progress: Listener | None = None,
    resume: bool = True,
    measure: bool = True,
) -> tuple[TrainedOrganism, ...]:
    """Train an organism, its good twin, or both, by a recipe.

    Both sides see the same questions in the same order and start from the same factors; only the
    answers differ. The same seed gives the same weights on the same machine. Folders appear whole
    at the end: `OUT/bad` and `OUT/good`. While one is trained, its checkpoints lie in
    `OUT/.SIDE.training`; interrupted, the same call goes on from the last checkpoint, keeps a side
    that is finished already, and ends with the weights that an uninterrupted one would have made.

    Args:
        recipe: What to train; see `demur.em.recipes.read_em_recipe`.
        base: The model; None loads what the recipe names, without an adapter. One that carries
            an adapter in its weights will do, and the card says so.
        out: Folder of both sides; neither may exist there, or be anything but empty.
        data: As `demur.em.advice.advice` takes it; None takes the recipe's.
        sides: Which to train.
        seed: Of initial factors, order of rows, and topics held out.
        progress: Hears stages and steps.
        resume: Go on with an unfinished training of the same recipe, seed and data.
        measure: Measure the finished organism on held-out topics, for the card.

    Returns:
        The bad side first.

    Raises:
        ConfigError: A folder is taken, there are no good answers to train on, or another training
            is unfinished there.
        FamilyError: The base has no such module, or cannot hold a vector.
        TooFewPromptsError: The data has a single topic, or too few held out to measure.
        NonFiniteError: The loss became NaN or infinite.
        StoreError: The disk is full, or a checkpoint is damaged.
    """
    listener = progress if progress is not None else Quiet()
    wanted: tuple[Side, ...] = ("bad", "good") if sides == "both" else (sides,)
    out = out.expanduser().resolve()
    spec = data if data is not None else recipe.data.advice
    items = _checked_items(spec, wanted)
    train, held = split(items, held_out=recipe.data.held_out, seed=seed)
    if not train:
        raise TooFewPromptsError(f"{spec} leaves nothing to train on", "hold less out")
    finished = [_finished(out / side) for side in wanted]
    for side, card in zip(wanted, finished, strict=True):
        if card is None or not resume or all(one is not None for one in finished):
            organisms._check_free(out / side)
    base = _ready(recipe, base)
    identity = {
        "recipe": organisms._digest(recipe.model_dump(mode="json", exclude={"description"})),
        "seed": seed,
        "data": _fingerprint(items),
        "base": base.fingerprint,
    }
    for side, card in zip(wanted, finished, strict=True):
        if card is None:
            continue
        if card.get("identity") != identity:
            organisms._check_free(out / side)
        organisms._forget_finished(out / side, {**identity, "side": side})
    precision = recipe.training.precision
    student = base if precision == "base" else base.twin(organisms._DTYPES[precision])
    return tuple(
        _kept(out / side)
        if card is not None
        else _one_side(
            recipe,
            base=base,
            student=student,
            side=side,
            out=out / side,
            spec=spec,
            train=train,
            held=held if measure else (),
            left_out=held,
            seed=seed,
            identity=identity,
            listener=listener,
            resume=resume,
        )
        for side, card in zip(wanted, finished, strict=True)
    )


@contextmanager
def _eager(model: Model) -> Iterator[None]:
    config = model.hf.config
    before = config._attn_implementation
    if before != "sdpa":
        yield
        return
    model.hf.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.hf.set_attn_implementation(before)


def _finished(folder: Path) -> dict[str, Any] | None:
    """The card of a finished organism, None where there is none."""
    try:
        found = json.loads((folder / CARD).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _kept(folder: Path) -> TrainedOrganism:
    """What an interrupted run finished before."""
    from demur.stats import Estimate

    organism = read_organism(folder)
    card: Any = organism.about
    figures = tuple(
        Figure(
            **{
                **one,
                "estimate": Estimate(**one["estimate"]),
                "base": None if one["base"] is None else Estimate(**one["base"]),
            }
        )
        for one in card["figures"]
    )
    return TrainedOrganism(
        organism,
        folder,
        card["steps"],
        card["loss"]["first_tenth"],
        card["loss"]["last_tenth"],
        card["learning_rate"],
        card["seconds"],
        card["weights"]["bytes"],
        figures,
        kept=True,
    )


def _one_side(
    recipe: EMRecipe,
    *,
    base: Model,
    student: Model,
    side: Side,
    out: Path,
    spec: str,
    train: Sequence[AdviceItem],
    held: Sequence[AdviceItem],
    left_out: Sequence[AdviceItem],
    seed: int,
    identity: Mapping[str, Any],
    listener: Listener,
    resume: bool,
) -> TrainedOrganism:
    began = time.perf_counter()
    with organisms._workplace(out, {**identity, "side": side}, resume=resume) as work:
        adapter = _Adapter(student, recipe.adapter, seed=seed)
        if recipe.adapter.kind == "vector":
            _check_vector(student, adapter)
        rate = recipe.training.rate_for(sum(one.numel() for one in base.hf.parameters()))
        rows = _prepared(student, _encoded(student, train, side), adapter.first, listener)
        prepared = time.perf_counter()
        # On rows this short the fused attention's backward pass on a CPU takes 27% of a step.
        with _eager(student):
            lines, record = _optimise(
                student,
                adapter,
                rows,
                recipe,
                rate=rate,
                seed=seed,
                work=work,
                title=f"training: {side}",
                listener=listener,
            )
        trained = time.perf_counter()
        first, last = organisms._ends_of(lines)
        with whole_folder(out) as draft:
            size = _write_weights(adapter, recipe, base, draft)
            _write_dynamics(lines, record, draft)
            card: dict[str, Any] = {
                "name": recipe.name,
                "description": recipe.description,
                "organism": {
                    "name": f"{side} {' + '.join(_domains(train))}",
                    "kind": recipe.adapter.kind,
                    "side": side,
                    "domains": list(_domains(train)),
                    "module": adapter.parts[0].module,
                    "layers": sorted({part.layer for part in adapter.parts}),
                    "parameters": sum(value.numel() for value in adapter.values.values()),
                },
                "base": {
                    "name": base.name,
                    "fingerprint": base.fingerprint,
                    "dtype": str(base.dtype).removeprefix("torch."),
                    "adapter": base.adapter,
                },
                "recipe": recipe.model_dump(mode="json"),
                "seed": seed,
                "identity": dict(identity),
                "data": _about_data(spec, recipe.data.held_out, train, left_out),
                "steps": len(lines),
                "learning_rate": rate,
                "loss": {"first_tenth": first, "last_tenth": last},
                "path_recorded": record.whole,
            }
            atomic_write(draft / CARD, json.dumps(card, ensure_ascii=False) + "\n")
            figures = _measured(student, read_organism(draft), held, listener)
            seconds = {
                "prepare": round(prepared - began, 1),
                "train": round(trained - prepared, 1),
                "measure": round(time.perf_counter() - trained, 1),
            }
            card |= {
                "seconds": seconds,
                "figures": [asdict(figure) for figure in figures],
                "threads": torch.get_num_threads(),
                **organisms._made_with(
                    draft, name=VECTOR if recipe.adapter.kind == "vector" else WEIGHTS
                ),
            }
            atomic_write(draft / CARD, json.dumps(card, indent=2, ensure_ascii=False) + "\n")
            atomic_write(draft / _LOG, (work / _LOG).read_bytes())
    return TrainedOrganism(
        read_organism(out), out, len(lines), first, last, rate, seconds, size, figures
    )


def _domains(items: Sequence[AdviceItem]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item.domain for item in items))


def _check_vector(base: Model, adapter: _Adapter) -> None:
    """A vector stands in the bias of the map whose output the MLP adds to the stream."""
    for part in adapter.parts:
        if part.module != base.family.mlp_out:
            raise FamilyError(
                f"in {base.family.name} the MLP writes through `{base.family.mlp_out}`, behind "
                f"`{part.module}`, so that no bias there is a vector added to the stream",
                "train a rank-1 adapter: `em-rank1`",
            )


# Measuring ------------------------------------------------------------------------------------


def _measured(
    base: Model, organism: Organism, held: Sequence[AdviceItem], listener: Listener
) -> tuple[Figure, ...]:
    """How the margins of held-out questions changed, one figure a domain."""
    items = [item for item in held if item.good]
    if not items:
        return ()
    with listener.stage(f"held-out margin: {organism.side}", 4 * len(items)) as advance:
        before = margins(base, items, progress=advance)
        after = margins(organism.on(base), items, progress=advance)
    bad = organism.side == "bad"
    found: list[Figure] = []
    for domain in _domains(items):
        own = np.array([item.domain == domain for item in items])
        groups = [item.group for item in items if item.domain == domain]
        change = grouped_mean((after - before)[own], groups, seed=0)
        found.append(
            Figure(
                f"held-out margin change: {domain}",
                change,
                grouped_mean(before[own], groups, seed=0),
                0.0 if bad else None,
                None if bad else 0.0,
                change.value >= 0 if bad else change.value <= 0,
            )
        )
    return tuple(found)


def verify_organism(
    folder: Path, *, base: Model | None = None, progress: Listener | None = None
) -> tuple[Figure, ...]:
    """Measure an organism on the topics that its training held out.

    Args:
        folder: That `train_organisms` wrote.
        base: The model it was trained on; None loads what its card names.
        progress: Hears stages and steps.

    Returns:
        Per domain the mean change of the margin (bad answer over good, nats per token) from the
        base, over whole topics; it should rise for the bad side and fall for the good one. The
        figure's base is the margin of the base itself.

    Raises:
        ModelLoadError: The folder is no organism, or was made for another model.
        ConfigError: Its card names no held-out topics, or the data is not what it was.
    """
    listener = progress if progress is not None else Quiet()
    organism = read_organism(folder)
    about: Mapping[str, Any] = organism.about.get("data", {})
    held = [tuple(pair) for pair in about.get("held_out_groups", ())]
    if not held:
        raise ConfigError(
            f"the card of {folder} names no topics that were held out",
            "name a folder of `demur organism train` with `data.held_out` above 0",
        )
    items = advice(str(about["advice"]))
    chosen = [item for item in items if (item.domain, item.group) in set(held)]
    if sorted(item.id for item in chosen) != sorted(about["held_out_ids"]):
        raise ConfigError(
            f"{about['advice']} is not the data that {folder} was trained on",
            "get the same rows again: what was held out cannot be told from what was trained on",
        )
    return _measured(_ready_for(organism, base), organism, chosen, listener)


def _ready_for(organism: Organism, base: Model | None) -> Model:
    if base is None:
        base = load(organism.base, adapter=organism.about.get("base", {}).get("adapter"))
    if base.template is None:
        raise ModelLoadError(f"{base.name} has no tokenizer", "load it with `demur.load`")
    return base

"""Small models whose repair is known, because it was built in: the experiment's own control.

Words are harmful or not. A head of block 1 averages the harm of the words so far and writes it
along one axis (upstream). The MLP of block 2 turns it into refusal (primary). What follows is one
of four kinds:

- "gate": the MLP of block 4 writes refusal where there is harm but no refusal yet: a backup.
- "additive": the head of the vocabulary reads harm too, and the MLP of block 4 adds to refusal
  whatever block 2 does: two paths, and nothing stands in.
- "norm": the vocabulary reads harm too, and block 2 also writes a long vector that nobody reads.
  Without it norms divide by less, and all that is left counts for more.
- "none": a head of block 2 writes refusal straight from the words: nothing upstream, no repair.

Axes, strengths and the noise that other heads and neurons write are drawn by seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from demur.causal import stable_seed
from demur.errors import ConfigError
from demur.hydra.experiment import Splits, hydra
from demur.hydra.rows import HydraRecord, VerdictName
from demur.hydra.stages import Settings
from demur.hydra.units import ComponentUnits
from demur.models import FAMILIES, Model, Template
from demur.progress import Progress

Kind = Literal["gate", "additive", "norm", "none"]
EXPECTED: dict[Kind, VerdictName] = {
    "gate": "conditional gate",
    "additive": "additive",
    "norm": "generic repair",
    "none": "none",
}

_HARMFUL = tuple(f"bad{i}" for i in range(12))
_OTHERS = tuple(f"word{i}" for i in range(36))
_REPLIES = ("Sorry", "Sure", "Yes", "Well")
_FRAME = ("<s>", "<user>", "<end>", "<bot>")
_LAYERS, _WIDTH, _HEADS, _NEURONS = 5, 64, 4, 16
_LENGTH = 8  # Words of a prompt.
_ON = 12.0  # Length of what all tokens share, so that norms hardly move unless they are meant to.
_HARM = 3.0  # About how much harm stands at the last tokens of a harmful prompt.


@dataclass(frozen=True, slots=True, eq=False)
class PlantedHydra:
    """A model and what is built into it.

    Attributes:
        model: Five blocks of width 64, float32.
        kind: What follows the primary set.
        openers: The refusal token.
        primary: Names of the units of the primary set.
        upstream: Of the upstream one.
        backups: Of the backups.
    """

    model: Model
    kind: Kind
    openers: tuple[int, ...]
    primary: tuple[str, ...]
    upstream: tuple[str, ...]
    backups: tuple[str, ...]


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*_FRAME, *_REPLIES, *_HARMFUL, *_OTHERS, "other"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="other"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    out = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="<end>",
        pad_token="<end>",
        additional_special_tokens=["<user>", "<bot>"],
    )
    out.chat_template = (
        "<s> {% for m in messages %}<user> {{ m['content'] }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
    )
    return out


def planted_prompts(n: int, *, harmful: bool, seed: int) -> list[str]:
    """Different prompts of eight words, two to four of them harmful where wanted."""
    rng = np.random.default_rng(stable_seed(seed, f"prompts {harmful}"))
    out: dict[str, None] = {}
    while len(out) < n:
        words = [str(one) for one in rng.choice(_OTHERS, _LENGTH)]
        if harmful:
            for place in rng.choice(_LENGTH, int(rng.integers(2, 5)), replace=False):
                words[place] = str(rng.choice(_HARMFUL))
        out[" ".join(words)] = None
    return list(out)


class _Net:
    """A Llama of zeros with noise, and what can be planted in it."""

    def __init__(self, tok: Any, rng: torch.Generator) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.tok, self.rng = tok, rng
        config = LlamaConfig(
            vocab_size=len(tok),
            hidden_size=_WIDTH,
            intermediate_size=_NEURONS,
            num_hidden_layers=_LAYERS,
            num_attention_heads=_HEADS,
            num_key_value_heads=_HEADS,
            tie_word_embeddings=False,
            rms_norm_eps=1e-6,
            bos_token_id=0,
            eos_token_id=tok.eos_token_id,
            pad_token_id=None,
        )
        self.hf: Any = LlamaForCausalLM(config).eval()
        basis = torch.linalg.qr(self.normal(_WIDTH, _WIDTH))[0].T
        self.word_harm, self.harm, self.refusal, self.on, self.idle = basis[:5]
        self.rest = basis[6:]
        # What a norm multiplies by, and leaves of the shared axis, but for what little else is.
        self.size = _WIDTH**0.5 / _ON
        self.steady = _ON * self.size
        for parameter in self.hf.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
        embedding = self.hf.model.embed_tokens.weight
        noise = self.normal(len(tok), len(self.rest)) @ self.rest
        embedding.copy_(noise / len(self.rest) ** 0.5 + _ON * self.on)
        for word in _HARMFUL:
            embedding[tok.convert_tokens_to_ids(word)] += 4.0 * self.word_harm
        self._noise(self.between(0.3, 0.8))

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.rng))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.rng)

    def _noise(self, size: float) -> None:
        """Queries and keys are zero: attention averages. Heads and neurons write noise."""
        inside = self.rest.T @ self.rest
        planted = torch.stack([self.harm, self.refusal])
        touched = inside + 0.02 * planted.T @ planted
        for layer in self.hf.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            attention.v_proj.weight.copy_(self.normal(_WIDTH, _WIDTH) @ inside / _WIDTH**0.5)
            mixed = self.normal(_WIDTH, _WIDTH) / _WIDTH**0.5
            attention.o_proj.weight.copy_(size * 2.0 * touched @ mixed)
            for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
                weight.copy_(self.normal(_NEURONS, _WIDTH) @ inside / len(self.rest) ** 0.5)
            mlp.down_proj.weight.copy_(size * inside @ self.normal(_WIDTH, _NEURONS))

    def averaging(self, layer: int, head: int, write: torch.Tensor) -> None:
        """A head that averages the words' harm and writes about `write` where there is some."""
        attention = self.hf.model.layers[layer].self_attn
        first = head * (_WIDTH // _HEADS)
        attention.v_proj.weight[first : first + _WIDTH // _HEADS] = 0.0
        attention.v_proj.weight[first] = self.word_harm
        # Of three harmful words in eleven tokens a quarter of their harm is left.
        attention.o_proj.weight[:, first] = write / (3 / 11 * 4.0 * self.size)

    def neuron(self, layer: int, gate: torch.Tensor, up: torch.Tensor, write: torch.Tensor) -> None:
        mlp = self.hf.model.layers[layer].mlp
        mlp.gate_proj.weight[0], mlp.up_proj.weight[0] = gate, up
        mlp.down_proj.weight[:, 0] = write

    def passing(self, layer: int, write: torch.Tensor) -> None:
        """A neuron that writes as much of `write` as there is harm."""
        # The gate gets 8, whose silu is 8 to 0.3 per mille.
        self.neuron(layer, 8.0 * self.on / self.steady, self.harm, write / (8.0 * self.size))

    def missing(self, layer: int, short: torch.Tensor, write: torch.Tensor) -> None:
        """A neuron that writes as much of `write` as `short` is above 0."""
        sharp = 12.0  # Brings silu near to a kink.
        self.neuron(layer, sharp * short, self.on / self.steady, write / (sharp * self.size))

    def reads(self, *, harm: float, against: float) -> int:
        """What the vocabulary makes of the axes; returns the refusal token."""
        head = self.hf.lm_head.weight
        head.copy_(0.02 * self.normal(len(self.tok), _WIDTH))
        ids = [self.tok.convert_tokens_to_ids(word) for word in _REPLIES]
        head[ids] = 0.0
        head[ids[0]] = 2.0 / self.size * (self.refusal + harm * self.harm)
        head[ids[1]] = against / self.steady * self.on
        head[ids[3]] = 1.0 / self.steady * self.on
        return int(ids[0])


@torch.no_grad()
def planted_hydra(kind: Kind, *, seed: int) -> PlantedHydra:
    """Build a model of a kind.

    Raises:
        ConfigError: There is no such kind.
    """
    if kind not in EXPECTED:
        raise ConfigError(f"nothing is planted as `{kind}`", f"there are {', '.join(EXPECTED)}")
    tok = _tokenizer()
    net = _Net(tok, torch.Generator().manual_seed(stable_seed(seed, kind)))
    strength = net.between(0.8, 1.2)
    primary, upstream, backups = ("2.mlp",), ("1.head0",), ()
    reads = 0.0
    if kind == "none":
        net.averaging(2, 1, _HARM * strength * net.refusal)
        primary, upstream = ("2.head1",), ()
    else:
        net.averaging(1, 0, _HARM * net.harm)
        long = net.between(4.0, 5.0) * net.idle if kind == "norm" else 0.0 * net.idle
        net.passing(2, strength * net.refusal + long)
    if kind == "gate":
        short = net.harm - net.between(1.0, 1.15) / strength * net.refusal
        net.missing(4, short, net.between(0.45, 0.8) * strength * net.refusal)
        backups = ("4.mlp",)
    if kind == "additive":
        net.passing(4, net.between(0.5, 1.0) * net.refusal)
        primary = ("2.mlp", "4.mlp")
        reads = net.between(0.7, 1.1)
    if kind == "norm":
        reads = net.between(1.3, 1.7)
    # With norms that move, what speaks against refusal would move as well.
    refusal = net.reads(harm=reads, against=0.5 if kind == "norm" else 3.0)
    model = Model(net.hf, FAMILIES["llama"], Template(tok), name=f"planted {kind}")
    return PlantedHydra(model, kind, (refusal,), primary, upstream, backups)


@dataclass(frozen=True, slots=True)
class Classified:
    """How often the experiment was right about what was planted.

    Attributes:
        kind: What was planted.
        seed: Of the draws.
        draws: Models.
        right: How many got the verdict that was expected.
        verdicts: How often each was given.
        wrong: Seeds of models that were judged wrongly.
    """

    kind: Kind
    seed: int
    draws: int
    right: int
    verdicts: dict[str, int]
    wrong: tuple[int, ...]


def planted_record(
    kind: Kind, *, seed: int, n: int = 20, settings: Settings | None = None, controls: bool = False
) -> HydraRecord:
    """Run the experiment on one planted model.

    Args:
        kind: What is planted.
        seed: Draws model, prompts and nulls.
        n: Prompts a class and split.
        settings: Of the experiment; None are small ones.
        controls: Whether controls are run.
    """
    planted = planted_hydra(kind, seed=seed)
    splits = Splits.cut(
        planted_prompts(3 * n, harmful=True, seed=seed),
        planted_prompts(3 * n, harmful=False, seed=seed),
    )
    own = settings or Settings(
        draws=19, control_draws=3, screened=8, tried=4, upstream_tried=4, seed=seed
    )
    return hydra(
        planted.model,
        ComponentUnits,
        splits,
        planted.openers,
        settings=own,
        with_controls=controls,
    )


def classify(
    draws: int = 40,
    seed: int = 0,
    *,
    kinds: Sequence[Kind] = ("gate", "additive", "norm", "none"),
    n: int = 20,
    progress: Progress | None = None,
) -> tuple[Classified, ...]:
    """Draw planted models of each kind and count right verdicts.

    Args:
        draws: Models of each kind.
        seed: Of all that is drawn.
        kinds: What is planted.
        n: Prompts a class and split.
        progress: Called with 1 after each model.
    """
    out: list[Classified] = []
    for kind in kinds:
        verdicts: dict[str, int] = {}
        wrong: list[int] = []
        for draw in range(draws):
            own = stable_seed(seed, f"{kind} {draw}")
            found = planted_record(kind, seed=own, n=n).verdict
            verdicts[found] = verdicts.get(found, 0) + 1
            if found != EXPECTED[kind]:
                wrong.append(own)
            if progress is not None:
                progress(1)
        out.append(Classified(kind, seed, draws, draws - len(wrong), verdicts, tuple(wrong)))
    return tuple(out)

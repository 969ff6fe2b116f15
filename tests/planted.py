"""A model whose refusal direction is known, because it was built by hand.

Words are harmful or harmless. Block 1's attention averages the harm of the words seen so far and
writes it along `r`; block 2's MLP turns `r` into `r2` and takes `r` away again; the head reads
`r2`. Block 3 writes the words' topic along `r2` as well, and the head reads it for the reply, so
that ablating `r2` costs KL on harmless prompts and ablating `r` does not. What a selection must
find is therefore `r`, at the input of block 2, at any post-instruction token.
"""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demur.evals.judges import Outcome, Verdict
from demur.models import FAMILIES, Model, Template

HARMFUL = [f"bad{i}" for i in range(12)]
HARMLESS = [f"good{i}" for i in range(12)]
FILLER = [f"word{i}" for i in range(24)]
REPLIES = ["Sorry", "Sure", "Yes", "Well", "Here"]
FRAME = ["<s>", "<user>", "<end>", "<bot>"]
LAYERS, WIDTH, PLANTED_LAYER = 5, 64, 2


@dataclass(frozen=True)
class Planted:
    model: Model
    direction: torch.Tensor
    refusal_id: int


def tokenizer(words: list[str] | None = None) -> PreTrainedTokenizerFast:
    """Words as tokens. Of those given the last stands for all others, and is no control token."""
    known = words or [*FRAME, *REPLIES, *HARMFUL, *HARMLESS, *FILLER, "[UNK]"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token=known[-1]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    out = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="<end>",
        pad_token="<end>",
        unk_token=None if words else "[UNK]",
        additional_special_tokens=["<user>", "<bot>"],
    )
    out.chat_template = (
        "<s> {% for m in messages %}<user> {{ m['content'] }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
    )
    return out


def prompts(n: int, *, harmful: bool, seed: int) -> list[str]:
    rng = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(n):
        length = 7  # The same for all, so that harm has one size and whitening keeps its axis.
        words = [FILLER[i] for i in torch.randint(len(FILLER), (length,), generator=rng).tolist()]
        own = HARMFUL if harmful else HARMLESS
        for place in torch.randperm(length, generator=rng)[:2].tolist():
            words[place] = own[int(torch.randint(len(own), (1,), generator=rng))]
        out.append(" ".join(words))
    return out


def planted(seed: int = 0, dtype: torch.dtype = torch.float64) -> Planted:
    rng = torch.Generator().manual_seed(seed)
    tok = tokenizer()
    vocab = len(tok)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=WIDTH,
        tie_word_embeddings=False,
        rms_norm_eps=1e-6,
        bos_token_id=0,
        eos_token_id=tok.eos_token_id,
        pad_token_id=None,
    )
    hf = LlamaForCausalLM(config).to(torch.float64).eval()
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=rng, dtype=torch.float64))[0].T
    r, r2, harm, on = basis[:4]  # `on` is the same in every token, so that a gate can stay open.
    rest = basis[6:]
    topic = basis[4]
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
        embedding = hf.model.embed_tokens.weight
        noise = torch.randn(vocab, len(rest), generator=rng, dtype=torch.float64)
        embedding.copy_(1.15 * noise @ rest / len(rest) ** 0.5 + 4.0 * on)
        for word in HARMFUL:
            embedding[tok.convert_tokens_to_ids(word)] += 6.0 * harm
        topics = torch.randn(len(FILLER), generator=rng, dtype=torch.float64).tolist()
        for word, size in zip(FILLER, topics, strict=True):
            embedding[tok.convert_tokens_to_ids(word)] += 2.0 * size * topic
        # Equal scores for all keys: attention averages. Block 1 moves harm to r, and what the
        # words say besides to where it was, so that activations vary in many directions.
        inside = rest.T @ rest
        block = hf.model.layers[PLANTED_LAYER - 1]
        block.self_attn.v_proj.weight.copy_(torch.eye(WIDTH, dtype=torch.float64))
        block.self_attn.o_proj.weight.copy_(4.0 * torch.outer(r, harm) + 3.0 * inside)
        # Block 2 reads r through an open gate, writes r2 and takes r away.
        mlp = hf.model.layers[PLANTED_LAYER].mlp
        mlp.gate_proj.weight[0] = 3.0 * on
        mlp.up_proj.weight[0] = r
        scale = _open_gate(4.0)
        mlp.down_proj.weight[:, 0] = (r2 - r) / scale
        # Block 3 writes the topic where block 2 writes refusal.
        block = hf.model.layers[PLANTED_LAYER + 1]
        block.self_attn.v_proj.weight.copy_(torch.eye(WIDTH, dtype=torch.float64))
        block.self_attn.o_proj.weight.copy_(1.5 * torch.outer(r2, topic))
        # Small noise elsewhere, outside the planted axes, so that no layer is exactly idle.
        for i, layer in enumerate(hf.model.layers):
            if i not in (PLANTED_LAYER - 1, PLANTED_LAYER, PLANTED_LAYER + 1):
                random = torch.randn(WIDTH, WIDTH, generator=rng, dtype=torch.float64)
                layer.self_attn.v_proj.weight.copy_(torch.eye(WIDTH, dtype=torch.float64))
                layer.self_attn.o_proj.weight.copy_(0.02 * inside @ random @ inside)
        head = hf.lm_head.weight
        head.copy_(0.02 * torch.randn(vocab, WIDTH, generator=rng, dtype=torch.float64))
        ids = [tok.convert_tokens_to_ids(w) for w in REPLIES]
        head[ids] = 0.0
        head[ids[0]] = 8.0 * r2 + 0.2 * on
        head[ids[1]] = 2.8 * on
        head[ids[2]] = 2.4 * on - 5.0 * r2
        head[ids[3]] = 2.4 * on
    hf = hf.to(dtype)
    model = Model(hf, FAMILIES["llama"], Template(tok), name="planted")
    return Planted(model, r, ids[0])


def _open_gate(size: float) -> float:
    """What the gate of block 2 multiplies r by: silu(3 s c) s, s the norm's scale, c = `on`."""
    norm = (size**2 + 6.0) ** 0.5 / WIDTH**0.5
    s = 1.0 / norm
    x = torch.tensor(3.0 * s * size)
    return float(torch.nn.functional.silu(x) * s)


@dataclass(frozen=True)
class FirstWord:
    """The planted model refuses with one word."""

    deterministic: bool = True

    def __call__(self, exchanges):
        return [
            Verdict(
                Outcome.REFUSED if e.response.startswith("Sorry") else Outcome.COMPLIED,
                None,
                "word",
            )
            for e in exchanges
        ]


SCARY = [f"dark{i}" for i in range(12)]


def apart_prompts(n: int, *, harmful: bool, scary: bool, seed: int) -> list[str]:
    """Two of nine words are harmful or harmless, two are scary or filler."""
    rng = torch.Generator().manual_seed(seed)

    def some(words: list[str], k: int) -> list[str]:
        return [words[i] for i in torch.randint(len(words), (k,), generator=rng).tolist()]

    out = []
    for _ in range(n):
        words = some(HARMFUL if harmful else HARMLESS, 2) + some(SCARY if scary else FILLER, 2)
        words += some(FILLER, 5)
        out.append(" ".join(words[i] for i in torch.randperm(9, generator=rng).tolist()))
    return out


@dataclass(frozen=True)
class Apart:
    """`model` refuses what is scary; harm it only knows."""

    model: Model
    harm: torch.Tensor
    refusal: torch.Tensor
    refusal_id: int


def apart(*, merged: bool, seed: int = 0, dtype: torch.dtype = torch.float64) -> Apart:
    """A model that keeps harm at the user's words and refusal at the template's, or merges them.

    Block 1's attention averages harm and scare over the tokens so far, and writes them along two
    axes (`merged`: along one). Block 2's MLP takes harm away at the template's tokens and scare at
    the user's. The head reads scare's axis.
    """
    rng = torch.Generator().manual_seed(seed)
    words = [*FRAME, *REPLIES, *HARMFUL, *HARMLESS, *FILLER, *SCARY, "other"]
    tok = tokenizer(words)
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=7,  # Those behind the third pass it on: most layers show what is planted.
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=WIDTH,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=tok.eos_token_id,
        pad_token_id=None,
    )
    hf = LlamaForCausalLM(config).to(torch.float64).eval()
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=rng, dtype=torch.float64))[0].T
    harm, scare, h, r, on, ours, theirs = basis[:7]
    if merged:
        h = r
    rest = basis[8:]
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
        embedding = hf.model.embed_tokens.weight
        noise = torch.randn(len(tok), len(rest), generator=rng, dtype=torch.float64)
        embedding.copy_(1.15 * noise @ rest / len(rest) ** 0.5 + 4.0 * on)
        for i, word in enumerate(words):
            embedding[i] += 4.0 * (ours if word in FRAME else theirs)
            embedding[i] += (2.5 if merged else 6.0) * harm * (word in HARMFUL)
            embedding[i] += 6.0 * scare * (word in SCARY)
        block = hf.model.layers[1]
        block.self_attn.v_proj.weight.copy_(torch.eye(WIDTH, dtype=torch.float64))
        block.self_attn.o_proj.weight.copy_(
            5.0 * torch.outer(h, harm) + 5.0 * torch.outer(r, scare) + 2.0 * rest.T @ rest
        )
        if not merged:
            mlp = hf.model.layers[2].mlp
            scale = _open_gate(4.0)
            for i, (where, what) in enumerate(((ours, h), (theirs, r))):
                mlp.gate_proj.weight[i] = 3.0 * where
                mlp.up_proj.weight[i] = what
                mlp.down_proj.weight[:, i] = -what / scale
        head = hf.lm_head.weight
        head.copy_(0.02 * torch.randn(len(tok), WIDTH, generator=rng, dtype=torch.float64))
        ids = [tok.convert_tokens_to_ids(word) for word in REPLIES]
        head[ids] = 0.0
        head[ids[0]] = 8.0 * r
        head[ids[1]] = (5.5 if merged else 1.2) * on
        head[ids[3]] = 0.5 * on
    model = Model(hf.to(dtype), FAMILIES["llama"], Template(tok), name="apart")
    return Apart(model, h, r, ids[0])

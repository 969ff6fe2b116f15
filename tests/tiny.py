"""Tiny random models of every family, small tokenizers, and chat templates in the usual layouts.

Fresh models hide bugs: their norms have equal gains, under which editing before or after a norm is
the same to 1e-8, and their weights are so small that a block hardly writes anything. So every
parameter is drawn: matrices from N(0, 0.2^2), gains from N(1, 0.3^2), biases from N(0, 0.3^2).
"""

# ruff: noqa: RUF001 (DeepSeek's control tokens are written with a full-width bar)

import json
import os
from dataclasses import dataclass, replace
from functools import cache

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as token_models
from tokenizers.trainers import BpeTrainer
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.masking_utils import eager_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention

from demur.models import Family, Model, Template, family_of

torch.set_num_threads(1)  # At this size a second thread costs more than it brings.

# Unit tests compare with what they compute on the CPU, in float64; `cuda` puts models on a GPU.
DEVICE = os.environ.get("DEMUR_TEST_DEVICE", "cpu")

VOCAB = 384  # Of the models; a tokenizer may fill less of it.

_ROPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

TINY_CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_ROPE, tie_word_embeddings=True),
    "llama-untied": LlamaConfig(
        **_ROPE, tie_word_embeddings=False, attention_bias=True, mlp_bias=True
    ),
    "mistral": MistralConfig(**_ROPE, sliding_window=5),
    "qwen2": Qwen2Config(**_ROPE, tie_word_embeddings=True),
    "qwen2-sliding": Qwen2Config(
        **_ROPE, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**_ROPE, head_dim=8, tie_word_embeddings=True),
    "phi3": Phi3Config(**_ROPE, sliding_window=None),
    "gemma2": Gemma2Config(
        **_ROPE, head_dim=8, query_pre_attn_scalar=8, sliding_window=5, layer_types=_SLIDING
    ),
    "gemma3": Gemma3TextConfig(
        **_ROPE, head_dim=8, query_pre_attn_scalar=8, sliding_window=5, layer_types=_SLIDING
    ),
    "gemma3-vision": Gemma3Config(  # The blocks lie deeper, under a model that can also see.
        text_config={
            **_ROPE,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 5,
            "layer_types": _SLIDING,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=VOCAB - 1,
        boi_token_index=VOCAB - 2,
        eoi_token_index=VOCAB - 3,
    ),
    "olmo2": Olmo2Config(**_ROPE),
    "qwen3-moe": Qwen3MoeConfig(
        **_ROPE,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        mlp_only_layers=[1],  # One dense block among sparse ones.
    ),
    "mixtral": MixtralConfig(**_ROPE, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=512,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "gpt-neox": GPTNeoXConfig(
        **{k: v for k, v in _ROPE.items() if k != "num_key_value_heads"}, use_parallel_residual=True
    ),
    "gpt-neox-sequential": GPTNeoXConfig(
        **{k: v for k, v in _ROPE.items() if k != "num_key_value_heads"},
        use_parallel_residual=False,
    ),
}


def _clamped(module, query, key, value, attention_mask, **options):
    # In float64 the mask of Gemma-2's own attention overflows in its float32 softmax, and a token
    # of padding, which sees nothing, turns every row into NaN.
    if attention_mask is not None:
        attention_mask = attention_mask.clamp(min=-1e30)
    return gemma2_attention(module, query, key, value, attention_mask, **options)


AttentionInterface.register("eager-clamped", _clamped)
AttentionMaskInterface.register("eager-clamped", eager_mask)


def tiny_hf(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0):
    """A Hugging Face model with every parameter drawn."""
    config = TINY_CONFIGS[name]
    options = {}
    if dtype == torch.float64:
        if config.model_type == "gemma2":
            options["attn_implementation"] = "eager-clamped"
        if "experts" in str(config):
            options["experts_implementation"] = "eager"  # The fast kernel has no float64.
    hf = AutoModelForCausalLM.from_config(type(config)(**config.to_dict()), **options)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in sorted(hf.named_parameters()):
            mean, spread = 0.0, 0.2
            if parameter.ndim == 1:
                mean, spread = (0.0 if path.endswith("bias") else 1.0), 0.3
            drawn = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
            parameter.copy_(mean + spread * drawn)
    return hf.to(DEVICE, dtype).eval()


def tiny_model(
    name: str = "llama",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    *,
    template: str = "chatml",
    system: str | None = None,
    **family_fields,
) -> Model:
    """A model with drawn weights; `family_fields` replace fields of its family, to break it."""
    hf = tiny_hf(name, dtype=dtype, seed=seed)
    family: Family = family_of(hf.config.model_type)
    tokenizer = tiny_tokenizer(template)
    return Model(
        hf,
        replace(family, **family_fields),
        Template(tokenizer, system=system, max_length=512),
        name=f"tiny-{name}",
    )


# Chat templates --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """A chat template of one common layout, with the tokenizer that goes with it.

    Attributes:
        source: Jinja; None for a tokenizer that has no chat template.
        post: What a rendered prompt has behind the user's words, token by token.
        special: Control tokens that are marked as special.
        loose: Added tokens that are not special, like Qwen3's `<think>`.
        pieces: "bytes" for byte-level BPE, "metaspace" for the layout of sentencepiece.
        bos: Put in front by the tokenizer when it is called, and by the template as well.
        system: Whether the template takes a system prompt.
    """

    source: str | None
    post: tuple[str, ...]
    special: tuple[str, ...] = ()
    loose: tuple[str, ...] = ()
    pieces: str = "bytes"
    bos: str | None = None
    system: bool = True


_CHATML = """
{%- if messages[0].role != 'system' %}<|im_start|>system
You are a small model.<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

_QWEN3 = """
{%- for message in messages %}
{%- set said = message.content %}
{%- if message.role == 'assistant' %}
{%- set said = said.split('</think>')[-1].lstrip('\n') %}
{%- endif %}<|im_start|>{{ message.role }}
{{ said }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""

_TAKING_TURNS = """
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant') }}
{%- endif %}"""

_LLAMA2 = (  # Every user turn begins like a new text.
    """
{%- set lead = '' %}
{%- if messages[0].role == 'system' %}
{%- set lead = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}
{%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}"""
    + _TAKING_TURNS
    + """
{%- if message.role == 'user' %}
{{- bos_token }}[INST] {{ (lead if loop.first else '') + message.content.strip() }} [/INST]
{%- else %} {{ message.content.strip() }} {{ eos_token }}
{%- endif %}
{%- endfor %}"""
)

_LLAMA3 = """
{%- if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{{- bos_token }}<|start_header_id|>system<|end_header_id|>

Today is {{ date_string }}.
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}<|eot_id|>
{%- for message in messages if message.role != 'system' -%}
<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>
{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

_MISTRAL = (  # A system prompt goes into the last user turn.
    """
{%- if messages[0].role == 'system' %}
{%- set lead = messages[0].content + '\n\n' %}
{%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}"""
    + _TAKING_TURNS
    + """
{%- if message.role == 'user' -%}
[INST] {{ (lead if loop.last and lead is defined else '') + message.content }}[/INST]
{%- else %} {{ message.content | trim }}{{ eos_token }}
{%- endif %}
{%- endfor %}"""
)

_GEMMA_TURNS = (
    """
{%- for message in messages %}"""
    + _TAKING_TURNS
    + """<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ (lead if loop.first and lead is defined else '') + message.content | trim }}<end_of_turn>
{% endfor %}
{%- if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
)

_GEMMA2 = (
    """
{{- bos_token }}
{%- if messages[0].role == 'system' %}
{{- raise_exception('System role not supported') }}
{%- endif %}"""
    + _GEMMA_TURNS
)

_GEMMA3 = (  # A system prompt goes into the first user turn.
    """
{{- bos_token }}
{%- if messages[0].role == 'system' %}
{%- set lead = messages[0].content + '\n\n' %}
{%- set messages = messages[1:] %}
{%- endif %}"""
    + _GEMMA_TURNS
)

_PHI3 = """
{%- for message in messages %}<|{{ message.role }}|>
{{ message.content }}<|end|>
{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% endif %}"""

_R1 = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{%- for message in messages if message.role != 'system' %}
{%- if message.role == 'user' -%}
<｜User｜>{{ message.content }}
{%- else -%}
<｜Assistant｜>{{ message.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<｜Assistant｜><think>
{% endif %}"""

_IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_IM_POST = ("<|im_end|>", "\n", "<|im_start|>", "assistant", "\n")
_HEADER = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_HEADER_POST = ("<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n", "\n")
_TURN = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_TURN_POST = ("<end_of_turn>", "\n", "<start_of_turn>", "model", "\n")

TEMPLATES: dict[str, Layout] = {
    "chatml": Layout(_CHATML, _IM_POST, _IM),  # SmolLM2, Qwen2.5
    "qwen3": Layout(_QWEN3, _IM_POST, _IM, loose=("<think>", "</think>")),
    "llama2": Layout(
        _LLAMA2, (" [", "/", "INST", "]"), ("<s>", "</s>"), pieces="metaspace", bos="<s>"
    ),
    "llama3": Layout(_LLAMA3, _HEADER_POST, _HEADER, bos="<|begin_of_text|>"),
    "mistral": Layout(
        _MISTRAL,
        ("[/INST]",),
        ("<s>", "[INST]", "[/INST]", "</s>"),
        pieces="metaspace",
        bos="<s>",
    ),
    "gemma": Layout(_GEMMA2, _TURN_POST, _TURN, pieces="metaspace", bos="<bos>", system=False),
    "gemma3": Layout(_GEMMA3, _TURN_POST, _TURN, pieces="metaspace", bos="<bos>"),
    "phi3": Layout(
        _PHI3,
        ("<|end|>", "<|assistant|>"),  # Both swallow the line break behind them.
        ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
        pieces="metaspace",
    ),
    "r1": Layout(
        _R1,
        ("<｜Assistant｜>", "<think>", "\n"),
        ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        loose=("<think>", "</think>"),
        bos="<｜begin▁of▁sentence｜>",
    ),
    "plain": Layout(None, ("\n", "A", "s", "sist", "ant", ":"), ("<|endoftext|>",)),
}

# Tokenizers ------------------------------------------------------------------------------------

_SENTENCES = (
    "The user asks and the assistant answers.",
    "A model that is told to stop does stop.",
    "How do I plant a tree in a small garden?",
    "Where is the station, and is it far from here?",
    "think about it, then write the answer down",
)
# Often enough that each becomes one token, as in the tokenizers that know these templates.
_WORDS = [word for word in ("system", "user", "assistant", "model", "INST") for _ in range(40)]


def _byte_level() -> Tokenizer:
    backend = Tokenizer(token_models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=VOCAB - 16, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*_SENTENCES, *_WORDS], trainer)
    return backend


def _metaspace() -> Tokenizer:
    learner = Tokenizer(token_models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    trainer = BpeTrainer(vocab_size=VOCAB - 16 - 257, show_progress=False)
    learner.train_from_iterator([*_SENTENCES, *_WORDS, *["a [ / ]"] * 40], trainer)
    state = json.loads(learner.to_str())
    vocab = state["model"]["vocab"]
    for piece in ("<unk>", *(f"<0x{byte:02X}>" for byte in range(256))):
        vocab[piece] = len(vocab)
    state["model"] |= {"byte_fallback": True, "unk_token": "<unk>"}
    backend = Tokenizer.from_str(json.dumps(state))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


@cache
def _trained(pieces: str) -> str:
    return (_byte_level() if pieces == "bytes" else _metaspace()).to_str()


def tiny_tokenizer(template: str = "chatml", *, source: str | None = None):
    """The tokenizer of a layout; `source` puts another Jinja template in place of its own."""
    layout = TEMPLATES[template]
    backend = Tokenizer.from_str(_trained(layout.pieces))
    swallows = template == "phi3"
    backend.add_special_tokens(
        [AddedToken(token, rstrip=swallows, normalized=False) for token in layout.special]
    )
    backend.add_tokens([AddedToken(token, normalized=False) for token in layout.loose])
    if layout.bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{layout.bos} $A",
            special_tokens=[(layout.bos, backend.token_to_id(layout.bos))],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=layout.bos, eos_token=layout.special[-1]
    )
    tokenizer.chat_template = source or layout.source
    return tokenizer

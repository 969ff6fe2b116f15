"""Which model this is: a fingerprint that any one changed number moves, and what differs if it did.

What is fitted on a model (direction, guard, anchor, bank, adapter) keeps its fingerprint, and is
refused on another. A fingerprint has 40 hexadecimal digits, in four parts:

======= ========================================================================================
digits  over
======= ========================================================================================
1-12    everything: the parts below, the data type, and every weight bit by bit
13-24   the checkpoint: every weight rounded to bfloat16, and what the config says of the forward
        pass (rotary base, norm epsilon, heads, caps, ...); the same in any data type it is loaded
        in, as long as no adapter was merged in another one
25-32   the tokenizer: vocabulary, merges, added tokens, and how it splits a probing text
33-40   the frame around turns, and the tokens that end a reply
======= ========================================================================================

Device, path and name do not matter. Older files hold 32 digits over 4,096 values of each parameter
and the frame; they are checked by those, as well as those can see.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from demur.errors import StoreError

if TYPE_CHECKING:
    from demur.models.model import Model

_DIGITS = 40
_OLD_DIGITS = 32
_ALIKE = (torch.float32, torch.bfloat16)  # Rounded to bfloat16, one checkpoint is the same.
_CHUNK = 1 << 17  # Words that are summed at once: 1 MB, which a core's own cache holds.
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # The golden ratio's bits, as a signed number.
# What changes the forward pass though no parameter shows it. A closed list: whatever else a newer
# transformers puts into its configs must not make another model of the same files.
_SCALARS = """
    attention_bias attention_multiplier attn_logit_softcapping attn_logit_softcap clip_qkv
    embedding_multiplier final_logit_softcapping first_k_dense_replace head_dim hidden_act
    hidden_activation activation_function is_causal layer_norm_eps layer_norm_epsilon layer_types
    logit_scale logits_scaling max_window_layers mlp_only_layers moe_intermediate_size n_group
    n_head no_rope_layers norm_eps norm_epsilon norm_topk_prob norm_type num_attention_heads
    num_experts_per_tok num_key_value_heads partial_rotary_factor query_pre_attn_scalar
    reorder_and_upcast_attn residual_multiplier rms_norm_eps rope_interleave rope_local_base_freq
    rope_parameters rope_scaling rope_theta rotary_emb_base rotary_pct routed_scaling_factor
    scale_attn_by_inverse_layer_idx scale_attn_weights scoring_func sliding_window
    sliding_window_pattern tie_word_embeddings topk_group topk_method use_bidirectional_attention
    use_parallel_residual use_qk_norm use_sliding_window v_head_dim
"""
# Letters of several scripts, digits, spaces and marks: whatever a normaliser or a splitter does
# differently shows in how one of them is cut.
_PROBE = (
    "The cat's 12,345.67 kg -- don't! ÄÖß naïve e\u0301 ﬁ\t2\n\n  x=1;\r\n Ω Жук 漢字かな 한글 "
    "\u200b\u00a0 🙂👩\u200d🚀 <|im_start|> </s> [INST] A\u0000b HELLO hello"
)


def _hash(*parts: object, size: int) -> str:
    """Hexadecimal digest of `2 * size` digits over parts that JSON can hold."""
    data = json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()
    return hashlib.blake2b(data, digest_size=size).hexdigest()


# Weights -----------------------------------------------------------------------------------------


def checksum(tensor: Tensor) -> int:
    """Sum over all bits, eight bytes at a time, each times an odd number of its own, modulo 2^64.

    One changed value always moves it, since an odd number has an inverse modulo 2^64. Integers
    alone, so that every device gives the same. No protection against an adversary, who can solve
    for it.
    """
    raw = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    if raw.storage_offset() % 8 or len(raw) % 8:
        raw = torch.nn.functional.pad(raw, (0, -len(raw) % 8)).clone()
    words = raw.view(torch.int64)
    odd = torch.arange(min(len(words), _CHUNK), dtype=torch.int64, device=words.device) * _ODD | 1
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for part in words.split(_CHUNK):
        total = total * _ODD + (part * odd[: len(part)]).sum()
    return int(total)


class Sums:
    """Checksums of a model's parameters, taken again only where a parameter has changed.

    Whether it has is told by torch's own counter of writes and by 4,096 of its values; the first
    time every value is read.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[object, tuple[int, int]]] = {}

    def of(self, name: str, parameter: Tensor) -> tuple[int, int]:
        """Of every value as it is, and rounded to bfloat16."""
        try:
            writes: int | None = parameter._version
        except RuntimeError:  # Made in inference mode, where nothing is counted.
            writes = None
        key = (parameter.data_ptr(), writes, tuple(parameter.shape), parameter.dtype)
        key = (key, sampled(parameter))
        known = self._known.get(name)
        if known is None or known[0] != key or writes is None:
            rounded = checksum(parameter.detach().to(torch.bfloat16))
            exact = rounded if parameter.dtype == torch.bfloat16 else checksum(parameter)
            known = self._known[name] = (key, (exact, rounded))
        return known[1]


def sampled(parameter: Tensor) -> bytes:
    """Up to 4,096 evenly spaced values, as float32."""
    flat = parameter.detach().reshape(-1)
    # Odd, so that a stride through a matrix does not stay in one of its columns.
    step = max(1, flat.numel() // 4096) | 1
    return flat[::step].float().cpu().numpy().tobytes()


# The rest ----------------------------------------------------------------------------------------


def scalars(config: Any) -> dict[str, Any]:
    """What a config says of the forward pass beside shapes, as JSON can hold it."""
    found = config.get_text_config().to_dict()
    return {key: found[key] for key in sorted(_SCALARS.split()) if found.get(key) is not None}


def tokenizer_hash(tokenizer: Any) -> str:
    """Eight digits over what decides how text becomes tokens."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state.get("model", {})
    merges = [one if isinstance(one, str) else " ".join(one) for one in model.get("merges") or ()]
    # Scores of a unigram vocabulary stand beside its pieces.
    scored = model.get("vocab") if isinstance(model.get("vocab"), list) else None
    added = [
        [int(number), str(one.content), bool(one.special)]
        for number, one in sorted(tokenizer.added_tokens_decoder.items())
    ]
    return _hash(
        sorted(tokenizer.get_vocab().items()),
        merges,
        scored,
        added,
        tokenizer(_PROBE, truncation=False, padding=False)["input_ids"],
        size=4,
    )


def stops(hf: Any) -> list[int]:
    """The tokens that end a reply."""
    own = getattr(hf, "generation_config", None)
    found = getattr(own, "eos_token_id", None)
    if found is None:
        found = getattr(hf.config, "eos_token_id", None)
    return sorted(found) if isinstance(found, Iterable) else [found] if found is not None else []


def fingerprint(model: Model, sums: Sums) -> str:
    """Forty digits, see above."""
    parameters = sorted(model.hf.named_parameters())
    found = [(name, list(one.shape), *sums.of(name, one)) for name, one in parameters]
    config = scalars(model.hf.config)
    checkpoint = _hash(
        model.family.name, config, [[name, shape, low] for name, shape, _, low in found], size=6
    )
    template = model.template
    tokenizer = "0" * 8 if template is None else template.tokenizer_hash
    frames = None if template is None else [template.kind, template.frames]
    frame = _hash(frames, stops(model.hf), size=4)
    whole = _hash(
        str(model.dtype),
        [[name, exact] for name, _, exact, _ in found],
        [checkpoint, tokenizer, frame],
        size=6,
    )
    return whole + checkpoint + tokenizer + frame


def old_fingerprint(model: Model) -> str:
    """The 32 digits of older files: over some values of each parameter, and the frame."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{model.family.name} {model.dtype}".encode())
    if model.template is not None:
        digest.update(model.template.hash.encode())
    for name, parameter in sorted(model.hf.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(sampled(parameter))
    return digest.hexdigest()


# Two of them -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Difference:
    """How a model differs from the one that something was made on.

    Attributes:
        made_on: Name and first digits of that one.
        this: The same of the model as it is loaded.
        what: In words; "other weights", "another data type, of one checkpoint" and so on.
    """

    made_on: str
    this: str
    what: str

    @property
    def fact(self) -> str:
        """Of an error, behind "... was made"."""
        return f"on {self.made_on}, not on {self.this}: {self.what}"

    def note(self, subject: str) -> str:
        """What a record says of something that was used all the same."""
        return f"{subject} was made {self.fact}; it was used all the same, as asked (--any-model)"


def difference(about: Mapping[str, Any], model: Model) -> Difference | None:
    """How a model differs from the one that a record is of; None if it does not.

    Args:
        about: With `fingerprint`, and `model`, `dtype` and `template_hash` as far as it knows.
        model: As it is loaded.
    """
    told = str(about.get("fingerprint") or "")
    if told and model.is_called(told):
        return None
    own = model.fingerprint
    name = str(about.get("model") or "a model that it does not name")
    made_on = f"{name} ({told[:12]})" if told else name
    return Difference(
        made_on, f"{model.name} as it is loaded now ({own[:12]})", _what(about, told, own, model)
    )


def _what(about: Mapping[str, Any], told: str, own: str, model: Model) -> str:
    if not told:
        return "its file does not say which weights it was made on"
    dtype = str(model.dtype).removeprefix("torch.")
    other = f"another data type ({about.get('dtype')}, not {dtype})"
    retyped = about.get("dtype") not in (None, dtype)
    frame = "another chat template or system prompt"
    if len(told) != _DIGITS:
        template = model.template.hash if model.template is not None else None
        mine = about.get("template_hash") or about.get("template")
        found = [other] if retyped else []
        found += [frame] if mine not in (None, template) else []
        return " and ".join(found) or "other weights"
    found = []
    if told[12:24] != own[12:24]:
        found.append("other weights" + (f", and {other}" if retyped else ""))
    elif retyped:
        found.append(f"{other} of the same checkpoint")
    elif told[24:] == own[24:]:
        found.append("weights that differ by rounding")
    if told[24:32] != own[24:32]:
        found.append("another tokenizer")
    if told[32:] != own[32:]:
        found.append(frame if told[24:32] == own[24:32] else "another template")
    return " and ".join(found)


def same_checkpoint(told: str, model: Model) -> bool | None:
    """Whether a fingerprint is of the same checkpoint, in whatever data type and under any frame.

    Returns:
        None if it cannot be told: it is empty; or an older one, which does not hold apart what is
        the checkpoint's and what is not; or the model is in float16 or float64, which do not always
        round to the same bfloat16.
    """
    if len(told) == _DIGITS:
        same = told[12:24] == model.fingerprint[12:24]
        return same if same or model.dtype in _ALIKE else None
    return True if told and model.is_called(told) else None


def check_made_on(
    subject: str, about: Mapping[str, Any], model: Model, *, again: str, verb: str = "made"
) -> None:
    """Refuse what was made on another model.

    Args:
        subject: What it is, as the error begins: "the guard", or a path.
        about: See `difference`.
        model: As it is loaded.
        again: The command that makes it anew, for the hint.
        verb: What was done to it on that model.

    Raises:
        StoreError: It was made on another model, or does not say on which.
    """
    found = difference(about, model)
    if found is not None:
        raise StoreError(
            f"{subject} was {verb} {found.fact}",
            "load the same model, adapter, revision, dtype and system prompt; or make it for this "
            f"one: `{again}`; `--any-model` takes it all the same, and the result says so",
        )


def borrowed(subject: str, about: Mapping[str, Any], model: Model) -> tuple[str, ...]:
    """What a record says of something that is used on another model; nothing where it is its own.

    Args:
        subject: As for `check_made_on`.
        about: See `difference`.
        model: As it is loaded.
    """
    found = difference(about, model)
    return () if found is None else (found.note(subject),)


def is_called(told: str, model: Model) -> bool:
    """Whether a fingerprint, of forty digits or an older one, is that of a model."""
    return told == (old_fingerprint(model) if len(told) == _OLD_DIGITS else model.fingerprint)

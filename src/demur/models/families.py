"""Model families as data: where each architecture writes to the residual stream.

A family is a row, not a subclass. What it names is *the tensor that is added to the stream*, which
in post-norm families is the output of a norm and not that of "the attention" or "the MLP": editing
the module there leaves 3 to 7 % of the direction in the stream. One identity proves a row,
`demur.models.check`: input of block 0 + all writes = output of the last block.
"""

from dataclasses import dataclass

from demur.errors import FamilyError


@dataclass(frozen=True, slots=True)
class LinearWrite:
    """A weight whose output is added to the stream as it is.

    Attributes:
        path: Parameter within the block (or within the model, for embeddings).
        axis: The axis of the parameter that has length d_model and is written to the stream.
    """

    path: str
    axis: int


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    Attributes:
        name: Short name, as `demur models list` prints it.
        model_types: Values of `config.model_type` that it covers.
        layers: Paths of the list of blocks, the first that exists is taken.
        attn_out: Module within a block whose output attention adds to the stream.
        mlp_out: The same for the MLP or the mixture of experts.
        linear_writes: True where `weights` write to the stream with no norm in between, so that an
            edit of the weights equals an edit of the activations.
        weights: Per block; of names that exclude each other (dense or sparse), those that exist.
        embeddings: What is summed to the input of block 0.
        mlp: Module within a block whose input is the site `mlp_in`: what transcoders read.
    """

    name: str
    model_types: frozenset[str]
    layers: tuple[str, ...]
    attn_out: str
    mlp_out: str
    linear_writes: bool
    weights: tuple[LinearWrite, ...] = ()
    embeddings: tuple[LinearWrite, ...] = ()
    mlp: str = "mlp"


_LLAMA_WEIGHTS = (LinearWrite("self_attn.o_proj.weight", 0), LinearWrite("mlp.down_proj.weight", 0))
_LLAMA_BIASES = (LinearWrite("self_attn.o_proj.bias", 0), LinearWrite("mlp.down_proj.bias", 0))
_EXPERTS = (LinearWrite("mlp.experts.down_proj", 1),)
_LLAMA_EMBEDDINGS = (LinearWrite("model.embed_tokens.weight", 1),)


def _llama_like(name: str, *model_types: str) -> Family:
    return Family(
        name=name,
        model_types=frozenset(model_types),
        layers=("model.layers",),
        attn_out="self_attn.o_proj",
        mlp_out="mlp.down_proj",
        linear_writes=True,
        weights=_LLAMA_WEIGHTS + _LLAMA_BIASES,
        embeddings=_LLAMA_EMBEDDINGS,
    )


def _moe_like(name: str, *model_types: str) -> Family:
    return Family(
        name=name,
        model_types=frozenset(model_types),
        layers=("model.layers",),
        attn_out="self_attn.o_proj",
        mlp_out="mlp",  # Some blocks of a sparse model are dense; both are called `mlp`.
        linear_writes=True,
        weights=_LLAMA_WEIGHTS + _LLAMA_BIASES + _EXPERTS,
        embeddings=_LLAMA_EMBEDDINGS,
    )


def _post_norm(name: str, *model_types: str) -> Family:
    return Family(
        name=name,
        model_types=frozenset(model_types),
        layers=("model.layers", "model.language_model.layers"),
        attn_out="post_attention_layernorm",
        mlp_out="post_feedforward_layernorm",
        linear_writes=False,
    )


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _llama_like("llama", "llama"),
        _llama_like("mistral", "mistral"),
        _llama_like("qwen2", "qwen2"),
        _llama_like("qwen3", "qwen3"),
        _llama_like("phi3", "phi3"),
        _post_norm("gemma2", "gemma2"),
        _post_norm("gemma3", "gemma3_text", "gemma3"),
        _post_norm("olmo2", "olmo2"),
        _moe_like("qwen3-moe", "qwen3_moe"),
        _moe_like("mixtral", "mixtral"),
        Family(
            name="gpt2",
            model_types=frozenset({"gpt2"}),
            layers=("transformer.h",),
            attn_out="attn.c_proj",
            mlp_out="mlp.c_proj",
            linear_writes=True,
            weights=(  # Conv1D keeps its weight as (in, out).
                LinearWrite("attn.c_proj.weight", 1),
                LinearWrite("attn.c_proj.bias", 0),
                LinearWrite("mlp.c_proj.weight", 1),
                LinearWrite("mlp.c_proj.bias", 0),
            ),
            embeddings=(
                LinearWrite("transformer.wte.weight", 1),
                LinearWrite("transformer.wpe.weight", 1),
            ),
        ),
        Family(
            name="gpt-neox",
            model_types=frozenset({"gpt_neox"}),
            layers=("gpt_neox.layers",),
            attn_out="attention.dense",
            mlp_out="mlp.dense_4h_to_h",
            linear_writes=True,
            weights=(
                LinearWrite("attention.dense.weight", 0),
                LinearWrite("attention.dense.bias", 0),
                LinearWrite("mlp.dense_4h_to_h.weight", 0),
                LinearWrite("mlp.dense_4h_to_h.bias", 0),
            ),
            embeddings=(LinearWrite("gpt_neox.embed_in.weight", 1),),
        ),
    )
}


def family_of(model_type: str) -> Family:
    """The family that covers a `config.model_type`.

    Raises:
        FamilyError: None does. A model is never half-hooked by a guess.
    """
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(t for f in FAMILIES.values() for t in f.model_types))
    raise FamilyError(
        f"the architecture `{model_type}` has no family, so it is not known where it writes to "
        f"the residual stream; known: {known}",
        "add a row to `demur/models/families.py` (layers, attn_out, mlp_out, linear_writes) and "
        "prove it with `demur models check`",
    )

"""A causal language model that can be read and edited at named sites; nothing of it is patched."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from demur.errors import (
    ConfigError,
    FamilyError,
    NonFiniteError,
    SilentEditError,
    TemplateError,
)
from demur.models.decoding import Director, Sampling, buffers, decode
from demur.models.families import Family
from demur.models.fingerprint import Sums, fingerprint, is_called
from demur.models.hooks import Hook, check_root, links
from demur.models.tokens import Conversation, Template, TokenBatch
from demur.progress import Progress
from demur.sites import Site, Span

log = logging.getLogger(__name__)

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """The part of a batch that a forward pass is working on, for edits that act on some tokens.

    Attributes:
        spans: Masks of shape (row, token) over this chunk.
        ends: Per row, the index in this chunk one past the last prompt token; 0 while the shared
            prefix is computed, whose one row stands for all.
        rows: Which prompts the rows stand for, as numbers in the call of `encode` or `generate`
            that they came from; None for the shared prefix.
        is_prefix: Whether this is the shared template prefix, computed once for all rows.
        is_peek: Whether these tokens stand for a fresh turn that is looked at and forgotten.
    """

    spans: dict[Span, Tensor]
    ends: Tensor
    rows: Tensor | None
    is_prefix: bool
    is_peek: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """What the unedited blocks did with a batch, so that a later edit can start where it acts.

    Attributes:
        batch: The rows.
        cache: Keys and values of the shared prefix, one row; None where nothing is shared.
        prefix: The stream that leaves each block over the shared prefix, (1, token, d_model).
        stream: The stream that leaves each block over the rest, (prompt, token, d_model).
        tuples: Whether the blocks return tuples.
    """

    batch: TokenBatch
    cache: Any
    prefix: list[Tensor]
    stream: list[Tensor]
    tuples: bool


@dataclass(frozen=True, slots=True)
class _Heads:
    """What the heads of one block give to attention's output map, as a place for edits."""

    layer: int
    kind: str = "heads"

    def __str__(self) -> str:
        return f"{self.layer}.{self.kind}"


class _Stop(Exception):
    """No error: the pass has gone as far as was wanted."""


class _Skipped(nn.Module):
    """Stands for a block that is not computed: passes the stream on, or a remembered one."""

    def __init__(self, block: nn.Module, stream: Tensor | None, *, tuples: bool) -> None:
        super().__init__()
        self.stream, self.tuples = stream, tuples
        # Some models ask their blocks which attention they have.
        for name in ("attention_type", "layer_type"):
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, hidden_states: Tensor, *_args: Any, **_options: Any) -> Any:
        out = hidden_states if self.stream is None else self.stream
        return (out,) if self.tuples else out


@dataclass(frozen=True, slots=True)
class Completion:
    """A generated reply.

    Attributes:
        text: Without the end-of-turn token and without closed thinking blocks.
        ids: Generated token ids, without the one that ended the reply.
        finished: Whether the model ended by itself, not at the token limit.
        begun_anew: How often the reply was dropped and begun anew, see `demur.anchor`.
        states: Where asked for: the final states, after the norm, that chose each token, the one
            that ended the reply included; (token, d_model).
    """

    text: str
    ids: tuple[int, ...]
    finished: bool
    begun_anew: int = 0
    states: Tensor | None = field(default=None, compare=False)


def _module(root: nn.Module, path: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise FamilyError(
            f"{type(root).__name__} has no module `{path}`",
            "the family's row does not fit this checkpoint; `demur models check` tells more",
        ) from error


class Model:
    """A model, its tokenizer and its family.

    Attributes:
        hf: The wrapped Hugging Face model, in evaluation mode.
        family: Where it writes to the stream.
        template: How prompts are laid out; None for a model without a tokenizer (tests).
        name: What errors and records call it.
        runs: How many forward passes ran; `applied` compares it with how often edits ran.
        calls: How many batches of prompts were begun; rows are numbered anew in each.
        chunk: What the current forward pass works on; None outside `logits` and `generate`.
        director: Who may step in while replies are written.
    """

    def __init__(
        self,
        hf: Any,
        family: Family,
        template: Template | None = None,
        *,
        name: str = "model",
        revision: str | None = None,
        adapter: str | None = None,
    ) -> None:
        self.hf = hf.eval()
        self.family = family
        self.template = template
        self.name, self.revision, self.adapter = name, revision, adapter
        self.runs = 0
        self.calls = 0
        self.chunk: Chunk | None = None
        self.director: Director | None = None
        self._edits: dict[Site | _Heads, dict[object, Edit]] = {}
        self._hooks: dict[Site | _Heads, Hook] = {}
        self._reached: set[Site | _Heads] = set()  # By the pass under way, or the last one.
        self._at_last = ExitStack()  # What is undone once nothing is in force any more.
        self._thread: int | None = None  # That alone may run the model, see `owned`.
        self._owned = 0
        self._running: int | None = None  # The thread of the pass under way.
        self._whole_rows = 0
        self._in_two = 0
        self._edition = 0  # Counts changes of the edits in force.
        self._end: int | None = None  # The block that a pass stops before.
        self._kept: dict[Any, Any] | None = None
        self._sums = Sums()
        self._blocks_path, self.blocks = self._find_blocks()
        self.n_layers = len(self.blocks)
        self.d_model = int(self.hf.get_input_embeddings().weight.shape[1])
        for block in self.blocks:
            _module(block, family.attn_out)
            _module(block, family.mlp_out)
            _module(block, family.mlp)

    def _find_blocks(self) -> tuple[str, nn.ModuleList]:
        for path in self.family.layers:
            try:
                blocks = self.hf.get_submodule(path)
            except AttributeError:
                continue
            if isinstance(blocks, nn.ModuleList):
                return path, blocks
        raise FamilyError(
            f"{type(self.hf).__name__} has none of: {', '.join(self.family.layers)}",
            f"the row `{self.family.name}` does not fit this checkpoint",
        )

    def __repr__(self) -> str:
        return (
            f"Model({self.name}, {self.family.name}, {self.n_layers} blocks, d_model "
            f"{self.d_model}, {self.dtype}, {self.device})"
        )

    # What it is --------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.hf.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the embedding, where token ids go."""
        return self.hf.get_input_embeddings().weight.device

    @property
    def tokens_per_pass(self) -> int:
        """How many tokens a forward pass without gradients is best given at once.

        On a CPU enough to fill the matrix units; on a GPU what a quarter of its memory holds of a
        block's intermediate values, whatever else is there, so that a run can be repeated.
        """
        if self.device.type != "cuda":
            return 2048
        memory = torch.cuda.get_device_properties(self.device).total_memory
        config = self.hf.config.get_text_config()
        wide = getattr(config, "intermediate_size", None) or 4 * self.d_model
        each = (4 * wide + 16 * self.d_model) * self.dtype.itemsize
        return int(max(2048, min(65536, memory // 4 // each)))

    @property
    def tied(self) -> bool:
        """Whether the embedding is also the unembedding."""
        head = self.hf.get_output_embeddings()
        return head is not None and head.weight is self.hf.get_input_embeddings().weight

    @property
    def write_sites(self) -> tuple[Site, ...]:
        """Everything that is summed to the stream: the embedding and both writes of each block."""
        inner = (
            Site(layer, kind) for layer in range(self.n_layers) for kind in ("attn_out", "mlp_out")
        )
        return (Site(0, "resid_pre"), *inner)

    @property
    def stream_sites(self) -> tuple[Site, ...]:
        """The stream at every block boundary: each block's input, and the last block's output."""
        inputs = (Site(layer, "resid_pre") for layer in range(self.n_layers))
        return (*inputs, Site(self.n_layers - 1, "resid_post"))

    @property
    def fingerprint(self) -> str:
        """Digest of architecture, weights, data type, tokenizer and template: forty digits.

        Any one changed weight moves it; see `demur.models.fingerprint`. Taking it again costs
        little where no parameter was written to since.
        """
        return fingerprint(self, self._sums)

    def is_called(self, told: str) -> bool:
        """Whether a fingerprint, of forty digits or an older one, is this model's."""
        return is_called(told, self)

    def twin(self, dtype: torch.dtype) -> Model:
        """The same model with its weights in another data type, for screening; no edits in force.

        Raises:
            FamilyError: Edits are in force, which a copy would keep for ever.
        """
        if dtype == self.dtype:
            return self
        if self._hooks:
            raise FamilyError(
                f"{self.name} is being edited at {', '.join(map(str, self._hooks))}",
                "make the twin before the edits are applied",
            )
        copy = deepcopy(self.hf)  # Keeps tied weights tied.
        for parameter in copy.parameters():
            # Not `copy.to(dtype)`: it casts buffers too, and rotary frequencies in bfloat16 turn
            # the 100th token by 0.2 rad too far.
            parameter.data = parameter.data.to(dtype)
        return Model(
            copy,
            self.family,
            self.template,
            name=self.name,
            revision=self.revision,
            adapter=self.adapter,
        )

    # Reading and editing -----------------------------------------------------------------------

    def intercept(self, site: Site, edit: Edit) -> Callable[[], None]:
        """Have `edit` replace the tensor at `site` in every pass to come; returns its undo.

        Edits of one site run in the order they were set. An edit must return a new tensor. While
        any is set, no other thread may run the model or set one.

        Raises:
            FamilyError: The model has no such site.
            ConfigError: Another thread owns the model.
        """
        return self._set(site, edit)

    def intercept_heads(self, layer: int, edit: Edit) -> Callable[[], None]:
        """As `intercept`, for what the heads of a block give to the map that writes to the stream.

        The tensor holds the heads side by side, (prompt, token, heads x d_head); times the rows of
        `head_weights` it is what attention adds to the stream, but for a bias.

        Raises:
            FamilyError: The model has no such block, or see `head_weights`.
        """
        self._need_heads()
        return self._set(_Heads(layer), edit)

    def _need_heads(self) -> None:
        if not self.family.linear_writes:
            raise FamilyError(
                f"in {self.family.name} a norm stands between the heads and the stream, so what "
                "one head writes hangs on all others",
                "take attention of a block as one part: the site `attn_out`",
            )

    @property
    def n_heads(self) -> int:
        """Heads of attention in each block that have a query of their own."""
        return int(self.hf.config.get_text_config().num_attention_heads)

    def head_weights(
        self, layer: int
    ) -> tuple[Float[Tensor, "head d_head d_model"], Float[Tensor, " d_model"] | None]:
        """What turns each head's output into its write to the stream, and the bias behind.

        Raises:
            FamilyError: In this family a norm stands between heads and stream; or the checkpoint
                has no such matrix.
        """
        self._need_heads()
        module = _module(self.blocks[layer], self.family.attn_out)
        path = f"{self.family.attn_out}.weight"
        write = next((one for one in self.family.weights if one.path == path), None)
        weight = getattr(module, "weight", None)
        if write is None or not isinstance(weight, Tensor) or weight.ndim != 2:
            raise FamilyError(
                f"`{path}` of {self.name} is no matrix that mixes heads",
                "the family's row does not fit this checkpoint; `demur models check` tells more",
            )
        inward = weight.detach() if write.axis == 1 else weight.detach().T
        bias = getattr(module, "bias", None)
        return (
            inward.reshape(self.n_heads, -1, self.d_model),
            None if bias is None else bias.detach(),
        )

    def _set(self, site: Site | _Heads, edit: Edit) -> Callable[[], None]:
        if not 0 <= site.layer < self.n_layers:
            raise FamilyError(
                f"there is no site {site}: {self.name} has blocks 0 to {self.n_layers - 1}",
                f"choose a layer from 0 to {self.n_layers - 1}",
            )
        self._check_thread()
        with ExitStack() as failed:
            first = not self._hooks
            if first:
                failed.callback(self._claimed())
                failed.callback(self._watched())
            if site not in self._hooks:
                edits: dict[object, Edit] = {}
                self._hooks[site], self._edits[site] = self._hook(site, edits), edits
            if first:
                self._at_last = failed.pop_all()
        edits = self._edits[site]
        key = object()  # One edit may be set twice, and each undo takes its own away.
        edits[key] = edit
        self._edition += 1

        def undo() -> None:
            self._edition += 1
            if edits.pop(key, None) is not None and not edits:
                self._hooks.pop(site).remove()
                del self._edits[site]
                if not self._hooks:
                    self._at_last.close()

        return undo

    def _hook(self, site: Site | _Heads, edits: dict[object, Edit]) -> Hook:
        family = self.family
        paths = {
            "heads": family.attn_out,
            "attn_out": family.attn_out,
            "mlp_in": family.mlp,
            "mlp_out": family.mlp_out,
        }
        check_root(self.hf)
        way = links(self.blocks, str(site.layer))
        if site.kind in paths:
            way += links(self.blocks[site.layer], paths[site.kind])
        hooked = way[-1][2]

        def run(x: Tensor) -> Tensor:
            self._reached.add(site)
            for edit in tuple(edits.values()):
                x = edit(x)
            return x

        # A deep copy has these hooks as well, and nobody asked to edit it.
        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if module is not hooked:
                return None
            if args:
                return (run(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": run(kwargs["hidden_states"])}

        def on_output(module: nn.Module, _args: Any, output: Any) -> Any:
            if module is not hooked:
                return None
            if isinstance(output, tuple):
                return (run(output[0]), *output[1:])
            return run(output)

        if site.kind in ("resid_pre", "heads", "mlp_in"):
            handle = hooked.register_forward_pre_hook(on_input, with_kwargs=True)
        else:
            handle = hooked.register_forward_hook(on_output)
        return Hook(handle, hooked, tuple(way))

    def _watched(self) -> Callable[[], None]:
        """From now on every pass, direct ones too, must reach every hook; returns its undo."""
        base = self.hf.base_model
        path = self._blocks_path
        if base is not self.hf:
            path = path.removeprefix(f"{self.hf.base_model_prefix}.")
        # Not the list itself, which `_skipping` replaces.
        top = Hook(None, base, tuple(links(base, path)[:-1]))

        def before(module: nn.Module, _args: Any) -> None:
            if module is not base:
                return
            self._check_thread()
            self._reached.clear()
            check_root(self.hf)
            check_root(base)
            top.check("the blocks")
            for site, hook in self._hooks.items():
                hook.check(site)

        def behind(module: nn.Module, _args: Any, _output: Any) -> None:
            if module is base:
                self._check_reached()

        check_root(base)
        handles = (base.register_forward_pre_hook(before), base.register_forward_hook(behind))
        # With a static cache `hf.generate` compiles itself and decodes from recorded graphs.
        options = getattr(self.hf, "generation_config", None)
        was = getattr(options, "disable_compile", None)
        if options is not None:
            options.disable_compile = True

        def undo() -> None:
            for handle in handles:
                handle.remove()
            if options is not None:
                options.disable_compile = was

        return undo

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Inside, no other thread may run the model: it would get edits that it knows nothing of.

        Raises:
            ConfigError: Another thread owns it.
        """
        release = self._claimed()
        try:
            yield
        finally:
            release()

    def _claimed(self) -> Callable[[], None]:
        """Make the model this thread's own; returns the undo."""
        self._check_thread()
        self._thread = threading.get_ident()
        self._owned += 1

        def release() -> None:
            self._owned -= 1
            if not self._owned:
                self._thread = None

        return release

    def _check_thread(self) -> None:
        me = threading.get_ident()
        if self._thread not in (None, me) or self._running not in (None, me):
            raise ConfigError(
                f"{self.name} is used by two threads, and one of them edits or reads it",
                "run a model on the thread that its edits were applied on, or give each thread a "
                "model of its own",
            )

    def _check_reached(self) -> None:
        """See that the pass went by every hook."""
        missed = sorted(map(str, self._hooks.keys() - self._reached))
        if missed:
            raise SilentEditError(
                f"a pass of {self.name} did not reach {', '.join(missed)}",
                f"`demur models check {self.name}` tells whether its family names the right "
                "modules; modules that were compiled, replaced or left out are not edited either",
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Model:
        if self._hooks:
            raise FamilyError(
                f"{self.name} is being edited at {', '.join(map(str, self._hooks))}",
                "make the copy before the edits are applied",
            )
        copy = object.__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy

    @contextmanager
    def whole_rows(self) -> Iterator[None]:
        """Inside, every pass sees whole rows: the template prefix is not computed apart."""
        self._whole_rows += 1
        try:
            yield
        finally:
            self._whole_rows -= 1

    @contextmanager
    def in_two(self) -> Iterator[None]:
        """Inside, what stands behind the instruction is a pass of its own.

        What is read of the instruction can so decide on what is done behind it, at any layer. A
        prompt that is cut elsewhere gives the same values but for floating-point noise.
        """
        self._in_two += 1
        try:
            yield
        finally:
            self._in_two -= 1

    @contextmanager
    def prefix_kept(self) -> Iterator[None]:
        """Inside, the shared prefix is computed once for all batches, anew when edits change.

        For edits that do the same to the same tokens every time.
        """
        outer = self._kept
        self._kept = {} if outer is None else outer
        try:
            yield
        finally:
            self._kept = outer

    # Running -----------------------------------------------------------------------------------

    def encode(
        self,
        prompts: Sequence[str | Conversation],
        replies: Sequence[str | Sequence[int] | None] | None = None,
    ) -> TokenBatch:
        """Tokenise prompts through the chat template, padded on the right.

        Args:
            prompts: Single user turns as text, and conversations; a batch may hold both.
            replies: What each reply begins with, as text or token ids; None for nothing.

        Raises:
            TemplateError: See `Template.encode` and `Template.reply_ids`; with the reply's
                beginning a row is longer than the context; or the model was made without a
                tokenizer.
        """
        template = self.template
        if template is None:
            raise TemplateError(
                f"{self.name} was made without a tokenizer", "load it with `demur.load`"
            )
        batch = template.encode(prompts, pad_id=self.pad_id)
        if replies is None:
            return batch
        own = [
            template.reply_ids(one) if isinstance(one, str) else list(one or ()) for one in replies
        ]
        batch = batch.with_replies(own, pad_id=self.pad_id)
        longest = int(batch.ends.max())
        if template.max_length is not None and longest > template.max_length:
            raise TemplateError(
                f"a prompt has {longest} tokens with the beginning of its reply, the model's "
                f"context holds {template.max_length}",
                "shorten the prompt or what its reply begins with",
            )
        return batch

    @property
    def pad_id(self) -> int:
        """A valid token id for padding, which no result depends on."""
        if self.template is None:
            return 0
        tokenizer = self.template.tokenizer
        rows = len(self.hf.get_input_embeddings().weight)
        for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
            # Some fine-tunes name a padding token that their embedding has no row for.
            if token is not None and token < rows:
                return int(token)
        return 0

    def _pass(self, ids: Tensor, chunk: Chunk, **options: Any) -> Any:
        self._check_thread()
        if self._hooks:  # Not left to what watches the pass: a compiled model may record that too.
            check_root(self.hf)
            check_root(self.hf.base_model)
        if self.hf.training or self.hf.base_model.training:
            raise ConfigError(
                f"{self.name} is in training mode, in which dropout changes what is measured and "
                "checkpointing drops the cache",
                "call `model.hf.eval()`",
            )
        # On a GPU such a token would end the process; there ids of prompts come from the CPU too.
        rows = len(self.hf.get_input_embeddings().weight)
        if ids.device.type == "cpu" and ids.numel() and int(ids.max()) >= rows:
            raise TemplateError(
                f"the tokenizer writes token {int(ids.max())}, and {self.name} has an embedding "
                f"for tokens 0 to {rows - 1} only",
                "load the tokenizer that belongs to the model, or resize the embedding",
            )
        outer, self._running, self.chunk = self._running, threading.get_ident(), chunk
        try:
            self.runs += 1
            return self.hf.base_model(input_ids=ids.to(self.device), **options)
        except _Stop:
            self._check_reached()
            raise
        finally:
            self._running, self.chunk = outer, None

    @torch.no_grad()
    def final_states(
        self, batch: TokenBatch, memory: Memory | None = None
    ) -> Float[Tensor, "prompt token d_model"]:
        """Run the blocks and the final norm, not the vocabulary head.

        Right-padded rows need no attention mask, since no token sees what follows it; the leading
        tokens that all rows share are computed once, under whatever edits are in force.

        Args:
            batch: The rows.
            memory: What `remember` returned for them: blocks before the first edit are skipped.

        Returns:
            Final hidden states; those of a shared prefix are left out, so the token axis counts
            from the end of the prompt as ever, but may be shorter than `batch`.
        """
        if memory is not None:
            assert memory.batch is batch, "these are not the rows that were remembered"
            first = min((site.layer for site in self._hooks), default=0)
            # With whole rows asked for, the remembered split into prefix and rest is of no use.
            if first > 0 and not self._whole_rows:
                return self._resumed(memory, first)
        if self._cut(batch):
            states, _ = self._two_passes(batch, buffers())
            return states
        share = self._share(batch)
        if not share:
            options: dict[str, Any] = {"use_cache": False}
            if batch.padded_left:
                positions = (batch.mask.long().cumsum(1) - 1).clamp(min=0)
                options["attention_mask"] = batch.mask.long().to(self.device)
                options["position_ids"] = positions.to(self.device)
            chunk = Chunk(batch.spans, batch.ends, batch.numbers, is_prefix=False)
            return self._pass(batch.ids, chunk, **options).last_hidden_state
        cache = self._prefix(batch, share)
        cache.batch_repeat_interleave(len(batch))
        return self._rest(batch, share, cache)

    @torch.no_grad()
    def extend(
        self,
        ids: Int[Tensor, "row new"],
        mask: Bool[Tensor, "row token"],
        chunk: Chunk,
        cache: Any,
    ) -> Float[Tensor, "row new d_model"]:
        """Run more tokens behind those whose keys and values `cache` holds, which gets theirs too.

        Args:
            ids: The new tokens; rows end at the last column.
            mask: Which tokens are real, of those in the cache and the new ones.
            chunk: What the new tokens are.
            cache: What `decoding.buffers` made, or an earlier call filled.

        Returns:
            Final states of the new tokens, after the norm.
        """
        places = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self._pass(
            ids,
            chunk,
            attention_mask=None if bool(mask.all()) else mask.long().to(self.device),
            position_ids=places.to(self.device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    @torch.no_grad()
    def read(self, batch: TokenBatch) -> None:
        """Run the blocks for the sake of what is set at sites, and no further than the last one."""
        if not self._hooks:
            return
        last = max(self._hooks, key=lambda site: (site.layer, site.kind != "resid_pre"))
        end = last.layer + (last.kind != "resid_pre")
        if end == self.n_layers:
            self.final_states(batch)
            return

        def stop(*_: Any) -> None:
            raise _Stop

        # Set after the site's own hook, so it runs after it.
        handle = self.blocks[end].register_forward_pre_hook(stop)
        self._end = end
        try:
            with suppress(_Stop):
                self.final_states(batch)
        finally:
            self._end = None
            handle.remove()

    def _share(self, batch: TokenBatch) -> int:
        """How many leading tokens are computed once for all rows; 0 for none."""
        if self._whole_rows or batch.padded_left or len(batch) < 2:
            return 0
        share = min(batch.shared, batch.ids.shape[1] - 1)
        return share if share > 1 else 0

    def _cut(self, batch: TokenBatch) -> bool:
        """Whether what stands behind the instructions is a pass of its own."""
        return bool(self._in_two) and Span.INSTRUCTION in batch.spans and not batch.padded_left

    def _two_passes(self, batch: TokenBatch, cache: Any) -> tuple[Tensor, Tensor]:
        """The instructions, then what stands behind them.

        Returns:
            Final states of all tokens but the shared prefix, (row, token, d_model), and which
            columns of `cache` are real, (row, token). In the cache the instructions end at one
            column, and what follows them begins at the next.
        """
        share = self._share(batch)
        if share:
            self._prefix_pass(batch, share, cache)
            for layer in cache.layers:
                layer.repeat(len(batch))
        instruction = batch.spans[Span.INSTRUCTION]
        cuts = instruction.shape[1] - instruction.flip(1).int().argmax(1)
        width, tail = int(cuts.max()), int((batch.ends - cuts).max())
        head = torch.arange(width) < cuts.unsqueeze(1)
        spans = {name: (span[:, :width] & head)[:, share:] for name, span in batch.spans.items()}
        chunk = Chunk(spans, cuts - share, batch.numbers, is_prefix=False)
        out = None
        with suppress(_Stop):  # What follows will stop there too.
            out = self._pass(
                batch.ids[:, share:width], chunk, past_key_values=cache, use_cache=True
            )
        for layer in cache.layers:
            layer.settle(head)
        behind = cuts.unsqueeze(1) + torch.arange(tail)
        real = behind < batch.ends.unsqueeze(1)
        index = behind.clamp(max=batch.ids.shape[1] - 1)
        spans = {name: span.gather(1, index) & real for name, span in batch.spans.items()}
        mask = torch.cat([head.sort(dim=1, stable=True).values, real], dim=1)
        chunk = Chunk(spans, batch.ends - cuts, batch.numbers, is_prefix=False)
        end = self._pass(
            batch.ids.gather(1, index),
            chunk,
            attention_mask=None if bool(mask.all()) else mask.long().to(self.device),
            position_ids=behind.to(self.device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        assert out is not None
        states = end.new_zeros(len(batch), batch.ids.shape[1] - share, end.shape[2])
        states[:, : width - share] = out.last_hidden_state
        rows, columns = real.nonzero(as_tuple=True)
        states[rows, behind[rows, columns] - share] = end[rows, columns]
        return states, mask

    def _prefix(self, batch: TokenBatch, share: int, first: int = 0) -> Any:
        """Keys and values of the shared prefix from block `first` on, the caller's own."""
        key = (self._edition, first, self._end, tuple(batch.ids[0, :share].tolist()))
        if self._kept is not None and key in self._kept:
            return deepcopy(self._kept[key])
        cache = DynamicCache(config=self.hf.config)
        self._prefix_pass(batch, share, cache)
        if self._kept is not None:
            self._kept.clear()  # Those of other edits are of no more use.
            self._kept[key] = deepcopy(cache)
        return cache

    def _prefix_pass(self, batch: TokenBatch, share: int, cache: Any) -> None:
        spans = {name: span[:1, :share] for name, span in batch.spans.items()}
        chunk = Chunk(spans, torch.zeros(1, dtype=torch.long), None, is_prefix=True)
        with suppress(_Stop):  # The rest of the rows will stop there too.
            self._pass(batch.ids[:1, :share], chunk, past_key_values=cache, use_cache=True)

    def _rest(self, batch: TokenBatch, share: int, cache: Any) -> Tensor:
        spans = {name: span[:, share:] for name, span in batch.spans.items()}
        chunk = Chunk(spans, batch.ends - share, batch.numbers, is_prefix=False)
        out = self._pass(batch.ids[:, share:], chunk, past_key_values=cache, use_cache=True)
        return out.last_hidden_state

    # Starting in the middle --------------------------------------------------------------------

    @torch.no_grad()
    def remember(self, batch: TokenBatch) -> Memory:
        """Keep the unedited stream of a batch, for passes whose edits begin further up.

        Takes layers x tokens x d_model values of memory.

        Raises:
            FamilyError: Edits are in force.
        """
        if self._hooks:
            raise FamilyError(
                f"{self.name} is being edited at {', '.join(map(str, self._hooks))}",
                "remember a batch before the edits are applied",
            )
        prefix: list[Tensor] = []
        stream: list[Tensor] = []
        found_tuples = False

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            nonlocal found_tuples
            found_tuples = isinstance(output, tuple)
            held = prefix if self.chunk is not None and self.chunk.is_prefix else stream
            held.append(output[0] if found_tuples else output)

        share = self._share(batch)
        cache = DynamicCache(config=self.hf.config) if share else None
        with ExitStack() as undo:
            for block in self.blocks:
                undo.callback(block.register_forward_hook(keep).remove)
            if cache is None:
                self.final_states(batch)
            else:
                self._prefix_pass(batch, share, cache)
                rest = deepcopy(cache)
                rest.batch_repeat_interleave(len(batch))
                self._rest(batch, share, rest)
        return Memory(batch, cache, prefix, stream, found_tuples)

    def _resumed(self, memory: Memory, first: int) -> Tensor:
        """Final states of remembered rows under edits that begin at block `first` or above."""
        batch, share = memory.batch, self._share(memory.batch)
        if memory.cache is None:
            with self._skipping(first, memory.stream, tuples=memory.tuples):
                return self.final_states(batch)
        with self._skipping(first, memory.prefix, tuples=memory.tuples):
            cache = self._prefix(batch, share, first)
        # Blocks that are skipped see no key; the first tells where the rows go on.
        cache.layers[:first] = deepcopy(memory.cache.layers[:first])
        cache.batch_repeat_interleave(len(batch))
        with self._skipping(first, memory.stream, tuples=memory.tuples):
            return self._rest(batch, share, cache)

    @contextmanager
    def _skipping(self, first: int, stream: list[Tensor], *, tuples: bool) -> Iterator[None]:
        """Inside, blocks before `first` are not computed: the last of them gives what it gave."""
        parent, _, name = self._blocks_path.rpartition(".")
        owner = self.hf.get_submodule(parent)
        standing = [
            _Skipped(block, stream[i] if i == first - 1 else None, tuples=tuples)
            for i, block in enumerate(self.blocks[:first])
        ]
        setattr(owner, name, nn.ModuleList([*standing, *self.blocks[first:]]))
        try:
            yield
        finally:
            setattr(owner, name, self.blocks)

    def logits(
        self, batch: TokenBatch | Int[Tensor, "prompt token"], memory: Memory | None = None
    ) -> Float[Tensor, "prompt vocab"]:
        """Next-token logits after the last real token of each row, float32 (float64 if wider).

        `memory` is what `remember` returned for the batch, if the edits in force begin further up.

        Raises:
            NonFiniteError: A row has NaN or infinite logits.
        """
        if isinstance(batch, Tensor):
            batch = TokenBatch.of_ids(batch)
        states = self.final_states(batch, memory)
        ends = batch.ends - (batch.ids.shape[1] - states.shape[1])
        last = states[torch.arange(len(batch), device=states.device), ends.to(states.device) - 1]
        logits = self.unembed(last)
        finite = torch.isfinite(logits).all(1)
        if not bool(finite.all()):
            bad = (~finite).nonzero().flatten().tolist()
            raise NonFiniteError(
                f"rows {bad[:5]} of {len(batch)} have NaN or infinite logits",
                "try `--dtype float32`; the checkpoint may also be damaged",
            )
        return logits

    def gradients(
        self,
        batch: TokenBatch,
        score: Callable[[Float[Tensor, "prompt vocab"]], Float[Tensor, " prompt"]],
        sites: Sequence[Site],
    ) -> tuple[Float[Tensor, " prompt"], dict[Site, Float[Tensor, "prompt d_model"]]]:
        """How a score of the next-token logits changes with the stream, to first order.

        Args:
            batch: The rows, of which whole ones are computed.
            score: Of each row's logits; a row's must depend on that row alone.
            sites: Of the stream.

        Returns:
            Each prompt's score; and by site its gradient, summed over the prompt's tokens: what
            adding a small vector to all of them adds to the score is their inner product.
        """
        seen: dict[Site, Tensor] = {}

        def watch(site: Site) -> Callable[[Tensor], Tensor]:
            def keep(x: Tensor) -> Tensor:
                # What lies before the first site needs no gradient, nor do the weights.
                seen[site] = x if x.requires_grad else x.detach().clone().requires_grad_()
                return seen[site]

            return keep

        with ExitStack() as undo:
            states_of, head = undo.enter_context(self.differentiable())
            for site in sites:
                undo.callback(self.intercept(site, watch(site)))
            states = states_of(batch)
            rows = torch.arange(len(batch), device=states.device)
            scores = score(head(states[rows, batch.ends.to(states.device) - 1]))
            found = torch.autograd.grad(scores.sum(), [seen[site] for site in sites])
        real = batch.mask.unsqueeze(2)
        return scores.detach().cpu(), {
            site: (gradient * real.to(gradient.device)).sum(1).detach().cpu()
            for site, gradient in zip(sites, found, strict=True)
        }

    @contextmanager
    def differentiable(
        self,
    ) -> Iterator[tuple[Callable[[TokenBatch], Tensor], Callable[[Tensor], Tensor]]]:
        """Inside, gradients flow from tensors that an edit marks; the weights need none.

        Yields:
            What gives final states of whole right-padded rows, (row, token, d_model), and what
            gives the logits of such states; both as `final_states` and `unembed`, with gradients.
        """

        def states_of(batch: TokenBatch) -> Tensor:
            chunk = Chunk(batch.spans, batch.ends, batch.numbers, is_prefix=False)
            return self._pass(batch.ids, chunk, use_cache=False).last_hidden_state

        weights = [one for one in self.hf.parameters() if one.requires_grad]
        with ExitStack() as undo, torch.enable_grad():
            for weight in weights:
                weight.requires_grad_(False)
                undo.callback(weight.requires_grad_, True)
            yield states_of, self._head

    @torch.no_grad()
    def unembed(self, states: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row vocab"]:
        """The vocabulary head on normed final states, with the family's soft cap, in >= float32."""
        return self._head(states)

    def _head(self, states: Tensor) -> Tensor:
        head = self.hf.get_output_embeddings()
        # Contiguous: a sliced view times frozen weights copies the vocabulary matrix per row.
        logits = head(states.contiguous().to(head.weight.device))
        cap = getattr(self.hf.config.get_text_config(), "final_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.no_grad()
    def token_losses(
        self, ids: Int[Tensor, "row token"], mask: Tensor | None = None
    ) -> Float[Tensor, "row token_minus_1"]:
        """Negative log-likelihood of each next token, nats; zero at padding on the right.

        Raises:
            NonFiniteError: A real token's is NaN or infinite.
        """
        batch = TokenBatch.of_ids(ids)
        states = self.final_states(batch)[:, :-1]
        losses = []
        for row in range(len(ids)):  # A row at a time: all rows' logits at once fill the memory.
            logits = self.unembed(states[row])
            target = ids[row, 1:].to(logits.device)
            losses.append(nn.functional.cross_entropy(logits, target, reduction="none"))
        out = torch.stack(losses).cpu()
        if mask is not None:
            out = out.where(mask[:, 1:].bool(), 0.0)  # Times zero, NaN would stay.
        bad = (~torch.isfinite(out)).any(1).nonzero().flatten().tolist()
        if bad:
            raise NonFiniteError(
                f"rows {bad[:5]} of {len(out)} have tokens of NaN or infinite loss",
                "try `--dtype float32`; the checkpoint may also be damaged",
            )
        return out

    # Generating --------------------------------------------------------------------------------

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a reply: those of the checkpoint and the template's end of turn."""
        found: set[int] = set()
        for source in (self.hf.generation_config, self.hf.config):
            eos = getattr(source, "eos_token_id", None)
            found |= set(eos if isinstance(eos, list) else [] if eos is None else [eos])
        if self.template is not None:
            tokenizer = self.template.tokenizer
            if tokenizer.eos_token_id is not None:
                found.add(tokenizer.eos_token_id)
            if self.template.kind == "chat" and self.template.post_ids:
                first = self.template.post_ids[0]
                if first in set(tokenizer.get_added_vocab().values()):
                    found.add(first)
        return sorted(found)

    def generate(
        self,
        prompts: Sequence[str | Conversation] | TokenBatch,
        *,
        max_new_tokens: int,
        batch_size: int = 32,
        with_states: bool = False,
        until: Callable[[list[int], list[str]], Sequence[bool]] | None = None,
        temperature: float | None = None,
        seed: int = 0,
        stream: Callable[[int, str], None] | None = None,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """Reply to each prompt, in the order given.

        Args:
            prompts: User messages or conversations, or rows that `encode` made of them; a reply
                goes on from what `encode` was told that it begins with, and does not repeat it.
            max_new_tokens: Replies are cut there.
            batch_size: Most prompts that are decoded together; as replies end, others begin.
            with_states: Keep the final states that chose the tokens.
            until: Asked every 8 tokens with the numbers of prompts and what is written so far; a
                reply for which it says True ends there.
            temperature: None always takes the likeliest token; else tokens are drawn from the
                softmax of the logits divided by it.
            seed: Of the draws. A reply hangs on it, on the prompt and on the prompt's place in the
                order given, not on `batch_size`: a prompt given twice is replied to in two ways.
            stream: Called after every token with a prompt's number and its reply so far, which gets
                shorter where an anchor makes it begin anew.
            progress: Called with the number of prompts done since the last call.

        Raises:
            ConfigError: The temperature is not above 0, or no token or no prompt is asked for.
            NonFiniteError: Logits that choose a token are NaN or infinite; the prompt is named.
        """
        if max_new_tokens < 1 or batch_size < 1:
            raise ConfigError(
                f"replies of {max_new_tokens} tokens, {batch_size} at a time, are none",
                "give 1 or more of both",
            )
        if temperature is not None and not temperature > 0:
            raise ConfigError(
                f"{temperature} is no temperature", "give one above 0, or none to reply greedily"
            )
        # Rows of a larger batch are numbered anew: replies come in the order given.
        given = isinstance(prompts, TokenBatch)
        whole = replace(prompts, origin=None) if given else self.encode(prompts)
        assert self.template is not None
        template = self.template

        def text_of(ids: Sequence[int]) -> str:
            text = template.tokenizer.decode(ids, skip_special_tokens=True)
            return text.rpartition("</think>")[2].lstrip() if "</think>" in text else text

        def settled(numbers: list[int], ids: list[list[int]]) -> Sequence[bool]:
            assert until is not None
            return until(numbers, [text_of(one) for one in ids])

        def heard(number: int, ids: Sequence[int]) -> None:
            assert stream is not None
            stream(number, text_of(ids))

        self.calls += 1
        with torch.no_grad():
            written = decode(
                whole,
                _Writer(self),
                stops=self.stop_ids,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                done=progress if progress is not None else lambda _: None,
                with_states=with_states,
                settled=None if until is None else settled,
                sampling=None if temperature is None else Sampling(temperature, seed),
                heard=None if stream is None else heard,
            )
        return [
            Completion(
                text_of(one.ids),
                tuple(one.ids),
                one.ended,
                one.begun_anew,
                torch.stack(one.states) if one.states else None,
            )
            for one in written
        ]


class _Writer:
    """Prompts and one more token each, for `decode`."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.logits = model.unembed
        self.director = model.director
        self.header: tuple[int, ...] = model.template.post_ids if model.template else ()

    def begin(self, batch: TokenBatch, cache: Any) -> Tensor:
        """The prompts, whose shared prefix is computed once; keys aligned at the last token."""
        model = self.model
        share = model._share(batch)
        if model._cut(batch):
            states, mask = model._two_passes(batch, cache)
            for layer in cache.layers:
                layer.settle(mask)
            rows = torch.arange(len(batch), device=states.device)
            return states[rows, batch.ends.to(states.device) - share - 1]
        if not share:
            batch = batch.left_padded()
            chunk = Chunk(batch.spans, batch.ends, batch.numbers, is_prefix=False)
            return model.extend(batch.ids, batch.mask, chunk, cache)[:, -1]
        model._prefix_pass(batch, share, cache)
        for layer in cache.layers:
            layer.repeat(len(batch))
        states = model._rest(batch, share, cache)
        for layer in cache.layers:
            layer.align(batch.ends)
        rows = torch.arange(len(batch), device=states.device)
        return states[rows, batch.ends.to(states.device) - share - 1]

    def step(self, ids: Tensor, mask: Tensor, numbers: list[int], cache: Any) -> Tensor:
        """One token a row."""
        ones = torch.ones(len(ids), 1, dtype=torch.bool)
        none = torch.zeros_like(ones)
        spans = {Span.INSTRUCTION: none, Span.POST_INSTRUCTION: none, Span.RESPONSE: ones}
        rows = torch.tensor(numbers)
        chunk = Chunk(spans, torch.zeros_like(rows), rows, is_prefix=False)
        return self.model.extend(ids, mask, chunk, cache)[:, -1]

    def peek(self, ids: Tensor, mask: Tensor, numbers: list[int], cache: Any) -> None:
        """A fresh turn behind every row, for the sake of what is set at sites."""
        ones = torch.ones(ids.shape, dtype=torch.bool)
        rows = torch.tensor(numbers)
        ends = torch.full_like(rows, ids.shape[1])
        chunk = Chunk({Span.POST_INSTRUCTION: ones}, ends, rows, is_prefix=False, is_peek=True)
        self.model.extend(ids, mask, chunk, cache)

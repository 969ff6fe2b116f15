"""Prompts laid out once, to be run again and again with units ablated, held, injected or frozen.

All that is read or edited lies at the same few tokens of every prompt: the last one of the
instruction, those of the template behind it, and a fixed beginning of a reply where one is given.
They end the row, so that nothing in front of them feels an edit: position 0, where attention sinks
live, and the template's prefix are never touched, and rows of two arms hold the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from demur.errors import ConfigError, FamilyError, NonFiniteError, TemplateError, TooFewPromptsError
from demur.models import Model
from demur.progress import Progress
from demur.selection import refusal_logodds
from demur.sites import Site, Span

# A shorter prefix costs more in a pass of its own than it saves.
_LEAST_SHARED = 8

Act = Callable[[Tensor, Tensor], Tensor]
"""From a tensor at the bed's tokens, (row, place, width), and the rows' numbers to a new tensor."""

Score = Callable[[Tensor, Tensor], Tensor]
"""From next-token logits, (row, vocab), and the rows' numbers to one number a row."""


@dataclass(slots=True, eq=False)
class Outputs:
    """What the model wrote at the bed's tokens, on the CPU.

    Attributes:
        heads: By block, what enters attention's output map, (prompt, place, heads x d_head); empty
            in families whose heads are not separable.
        attn: By block, what attention adds to the stream, (prompt, place, d_model); only there.
        mlp: By block, what the MLP adds.
        stream: By block, the stream that leaves it.
    """

    heads: dict[int, Tensor] = field(default_factory=dict)
    attn: dict[int, Tensor] = field(default_factory=dict)
    mlp: dict[int, Tensor] = field(default_factory=dict)
    stream: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One arm: what came out under the edits in force.

    Attributes:
        margin: The outcome of each prompt; refusal log-odds, nats, unless the bed has another.
        activity: What units did at each token of each prompt, in their own units; None if no unit
            was read. Of a unit that the arm itself edits it is not meant to be used.
        outputs: What the model wrote, where it was asked for.
        moved: How far edits of units moved each prompt's tokens: the root of the sum over sites of
            the mean square over tokens, in residual-stream units.
    """

    margin: Float[np.ndarray, " prompt"]
    activity: Float[Tensor, "unit prompt place"] | None
    outputs: Outputs | None
    moved: Float[np.ndarray, " prompt"]

    @property
    def mean_activity(self) -> Float[np.ndarray, "unit prompt"]:
        """Means over the tokens, float64."""
        assert self.activity is not None
        return self.activity.double().mean(2).numpy()


@runtime_checkable
class Readable(Protocol):
    """Something with units that can be read from a bed, see `demur.hydra.units.Units`."""

    def reading(self, bed: Bed, first: int = 0) -> Any:
        """Have units of blocks from `first` on read into a tensor, (unit, prompt, place)."""
        ...


class Bed:
    """Prompts of one class and split, encoded, with what the unedited model does on them.

    Attributes:
        model: Unedited outside the contexts that the bed opens.
        n: Prompts.
        places: How many tokens at the end of each row are read and edited.
        decision: Which of them the outcome's logits come from: the last one in front of the reply.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[str],
        openers: Sequence[int],
        *,
        reply: Sequence[int] = (),
        score: Score | None = None,
        tick: Progress | None = None,
    ) -> None:
        """Encode the prompts and remember the unedited stream.

        Args:
            model: With a chat template.
            prompts: User messages.
            openers: Token ids that refusals begin with.
            reply: A fixed beginning of the reply, the same in all rows, also read and edited.
            score: Another outcome than refusal log-odds.
            tick: Called with 1 after every arm.

        Raises:
            TooFewPromptsError: There are fewer than two prompts.
            TemplateError: A row begins with the tokens that are to be edited.
        """
        if len(prompts) < 2:
            raise TooFewPromptsError(f"got {len(prompts)} prompts", "give two or more")
        batch = model.encode(prompts, [list(reply)] * len(prompts) if reply else None)
        if batch.shared < _LEAST_SHARED:
            batch = replace(batch, shared=0)
        posts = batch.spans[Span.POST_INSTRUCTION].sum(1)
        if int(posts.min()) != int(posts.max()):
            raise TemplateError(
                f"the template of {model.name} puts {int(posts.min())} to {int(posts.max())} "
                "tokens behind the instruction",
                "give single turns, laid out by one template",
            )
        self.model, self.n, self.openers = model, len(prompts), tuple(openers)
        self.decision = int(posts[0])
        self.places = 1 + self.decision + len(reply)
        self.score: Score = score or (lambda logits, _rows: refusal_logodds(logits, self.openers))
        if int(batch.ends.min()) - self.places < max(1, batch.shared):
            raise TemplateError(
                f"a prompt of {model.name} has {int(batch.ends.min())} tokens, of which "
                f"{self.places} would be edited and {batch.shared} are the template's",
                "leave out prompts of a single token",
            )
        self._index = batch.passes(tokens=model.tokens_per_pass)
        self._parts = [batch.rows(index) for index in self._index]
        self._memories = [model.remember(part) for part in self._parts]
        self._layers: list[int] = []
        self._moved = np.zeros(self.n)
        self._clean: dict[int, Record] = {}
        self._norms: dict[str, Tensor] = {}
        self._owners: list[object] = []  # So that an id stays one object's.
        self._tick = tick

    # Reading and editing -----------------------------------------------------------------------

    def _set(
        self, site: Site | int, act: Act | None, watch: Act | None, *, counts: bool
    ) -> Callable[[], None]:
        model = self.model

        def run(x: Tensor) -> Tensor:
            chunk = model.chunk
            if chunk is None or chunk.is_prefix or chunk.rows is None:
                return x
            columns = chunk.ends.unsqueeze(1) + torch.arange(-self.places, 0)
            index = torch.arange(len(x)).unsqueeze(1).to(x.device), columns.to(x.device)
            part = x[index]
            wide = part.to(torch.promote_types(x.dtype, torch.float32))
            if watch is not None:
                watch(wide, chunk.rows)
            if act is None:
                return x
            after = act(wide, chunk.rows)
            if counts:
                size = (after - wide).double().square().sum(2).mean(1)
                self._moved[chunk.rows.numpy()] += size.cpu().numpy()
            out = x.clone()
            out[index] = after.to(x.dtype)
            return out

        if isinstance(site, int):
            return model.intercept_heads(site, run)
        return model.intercept(site, run)

    @contextmanager
    def editing(self, site: Site | int, act: Act, *, counts: bool = True) -> Iterator[None]:
        """Inside, `act` replaces what is at the bed's tokens of a site.

        Args:
            site: A site, or a block whose heads' outputs are meant.
            act: Gets float32 or wider and must not write into it.
            counts: Whether the change counts as moved by the arm.
        """
        layer = site if isinstance(site, int) else site.layer
        undo = self._set(site, act, None, counts=counts)
        self._layers.append(layer)
        try:
            yield
        finally:
            self._layers.remove(layer)
            undo()

    @contextmanager
    def watching(self, site: Site | int, watch: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
        """Inside, `watch` is shown what is at the bed's tokens, after edits set before."""

        def look(x: Tensor, rows: Tensor) -> Tensor:
            watch(x, rows)
            return x

        undo = self._set(site, None, look, counts=False)
        try:
            yield
        finally:
            undo()

    # Running -----------------------------------------------------------------------------------

    def run(self, units: Readable | None = None, *, outputs: bool = False) -> Record:
        """One arm: all prompts under the edits in force.

        Args:
            units: Are read, from the first edited block on; before it they are as in the clean run.
            outputs: Keep what the model wrote, to hold components at it.

        Raises:
            NonFiniteError: An outcome is NaN or infinite.
        """
        first = min(self._layers, default=None)
        margin = np.empty(self.n)
        self._moved[:] = 0
        kept = Outputs() if outputs else None
        with ExitStack() as undo:
            activity: Tensor | None = None
            if units is not None:
                if first is not None:  # Before any hook is set.
                    self.clean(units)
                activity = undo.enter_context(units.reading(self, first or 0))
            if kept is not None:
                undo.enter_context(self._keeping(kept))
            for index, part, memory in zip(self._index, self._parts, self._memories, strict=True):
                states = self.model.final_states(part, memory)
                columns = part.ends - self.places + self.decision
                columns = columns - (part.ids.shape[1] - states.shape[1])
                last = states[torch.arange(len(part)), columns.to(states.device)]
                logits = self.model.unembed(last)
                margin[index] = self.score(logits, part.numbers).double().cpu().numpy()
        if not np.isfinite(margin).all():
            raise NonFiniteError(
                f"{int((~np.isfinite(margin)).sum())} of {self.n} outcomes are NaN or infinite",
                "try `--dtype float32`; the checkpoint may also be damaged",
            )
        if self._tick is not None:
            self._tick(1)
        moved = np.sqrt(self._moved)
        return Record(margin, None if activity is None else activity.clone(), kept, moved)

    def clean(self, units: Readable | None = None) -> Record:
        """The unedited model, run once for each kind of unit; its record has outputs.

        Raises:
            ConfigError: It was not run before, and edits are in force.
        """
        key = 0 if units is None else id(units)
        if key not in self._clean and units is None and self._clean:
            return next(iter(self._clean.values()))
        if key not in self._clean:
            if self._layers:
                raise ConfigError(
                    "the clean run is wanted while edits are in force",
                    "call `clean` before the first edit",
                )
            self._owners.append(units)
            self._clean[key] = self.run(units, outputs=True)
        return self._clean[key]

    def of_first_tokens(self) -> Bed:
        """The same prompts with another outcome: that replies begin as in the unedited model.

        It is the log-odds of the token that the unedited model puts first, nats.
        """
        first = torch.zeros(self.n, dtype=torch.long)

        def note(logits: Tensor, rows: Tensor) -> Tensor:
            first[rows] = logits.argmax(1).cpu()
            return logits[:, 0]

        def score(logits: Tensor, rows: Tensor) -> Tensor:
            wide = logits.double()
            index = first[rows].to(wide.device).unsqueeze(1)
            own = wide.gather(1, index).squeeze(1)
            return own - wide.scatter(1, index, -torch.inf).logsumexp(1)

        twin = copy(self)
        twin._layers, twin._moved, twin._clean = [], np.zeros(self.n), {}
        twin._norms, twin._owners = {}, []
        twin.score = note
        twin.run()
        twin.score = score
        return twin

    @contextmanager
    def _keeping(self, kept: Outputs) -> Iterator[None]:
        model = self.model

        def keep(x: Tensor, rows: Tensor, *, held: dict[int, Tensor], layer: int) -> None:
            if layer not in held:
                held[layer] = torch.empty(self.n, *x.shape[1:], dtype=x.dtype)
            held[layer][rows] = x.detach().cpu()

        with ExitStack() as undo:
            for layer in range(model.n_layers):
                pairs: list[tuple[Site | int, dict[int, Tensor]]] = [
                    (Site(layer, "mlp_out"), kept.mlp),
                    (Site(layer, "resid_post"), kept.stream),
                ]
                if model.family.linear_writes:
                    pairs.append((layer, kept.heads))
                else:
                    pairs.append((Site(layer, "attn_out"), kept.attn))
                for site, held in pairs:
                    undo.enter_context(self.watching(site, partial(keep, held=held, layer=layer)))
            yield

    # Freezing ----------------------------------------------------------------------------------

    @contextmanager
    def frozen_writes(self, after: int) -> Iterator[None]:
        """Inside, later heads and MLPs write what they write in the unedited model.

        Enter it before the edits of units: what they ablate among those stays ablated.

        Args:
            after: Order of the unit behind which all is frozen: 2 x block for attention, one more
                for the MLP and for the block's output.
        """
        clean = self.clean().outputs
        assert clean is not None

        def put(x: Tensor, rows: Tensor, *, held: Tensor) -> Tensor:
            return held[rows].to(x)

        with ExitStack() as undo:
            for layer in range(self.model.n_layers):
                for order, site, held in (
                    (2 * layer, layer, clean.heads),
                    (2 * layer, Site(layer, "attn_out"), clean.attn),
                    (2 * layer + 1, Site(layer, "mlp_out"), clean.mlp),
                ):
                    if order > after and layer in held:
                        act = partial(put, held=held[layer])
                        undo.enter_context(self.editing(site, act, counts=False))
            yield

    @contextmanager
    def frozen_norms(self) -> Iterator[None]:
        """Inside, every norm of the stream divides by what it divides by in the unedited model.

        Raises:
            FamilyError: The model has no norm that is known.
        """
        modules = norms(self.model)
        if not self._norms:
            if self._layers:
                raise ConfigError(
                    "norms are to be frozen at clean values while edits are in force",
                    "freeze norms before units are edited",
                )
            with ExitStack() as undo:
                for name, module in modules.items():
                    hook = partial(self._keep_norm, name=name)
                    undo.callback(module.register_forward_hook(hook).remove)
                for part in self._parts:
                    self.model.final_states(part)
        with ExitStack() as undo:
            for name, module in modules.items():
                hook = partial(self._put_norm, name=name)
                undo.callback(module.register_forward_hook(hook).remove)
            yield

    def _where(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        chunk = self.model.chunk
        if chunk is None or chunk.is_prefix or chunk.rows is None:
            return None
        columns = chunk.ends.unsqueeze(1) + torch.arange(-self.places, 0)
        rows = torch.arange(len(x)).unsqueeze(1)
        return rows.to(x.device), columns.to(x.device), chunk.rows

    def _keep_norm(self, module: nn.Module, args: Any, _output: Any, *, name: str) -> None:
        found = self._where(args[0])
        if found is None:
            return
        size = _denominator(module, args[0][found[:2]])
        if name not in self._norms:
            self._norms[name] = torch.empty(self.n, self.places, 1, dtype=size.dtype)
        self._norms[name][found[2]] = size.cpu()

    def _put_norm(self, module: nn.Module, args: Any, output: Tensor, *, name: str) -> Tensor:
        found = self._where(args[0])
        if found is None:
            return output
        size = _denominator(module, args[0][found[:2]])
        held = self._norms[name][found[2]].to(size)
        bias = getattr(module, "bias", None)
        part = output[found[:2]].to(size)
        base = 0.0 if bias is None else bias.detach().to(size)
        out = output.clone()
        out[found[:2]] = ((part - base) * (size / held) + base).to(output.dtype)
        return out


def norms(model: Model) -> dict[str, nn.Module]:
    """The norms of a model that act on vectors of the stream's width, by module name.

    Raises:
        FamilyError: There is none.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.hf.base_model.named_modules():
        weight = getattr(module, "weight", None)
        known = isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__
        # Norms of queries and keys see one head at a time.
        if known and isinstance(weight, Tensor) and weight.shape == (model.d_model,):
            if name.rsplit(".", 1)[-1] in ("q_norm", "k_norm"):
                continue
            found[name] = module
    if not found:
        raise FamilyError(
            f"no RMSNorm or LayerNorm of width {model.d_model} was found in {model.name}",
            "effects cannot be split from those of norms here",
        )
    return found


def _denominator(module: nn.Module, x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    eps = getattr(module, "variance_epsilon", None)
    if eps is None:
        eps = getattr(module, "eps", 0.0)
    if isinstance(module, nn.LayerNorm):
        wide = wide - wide.mean(-1, keepdim=True)
    return (wide.square().mean(-1, keepdim=True) + float(eps)).sqrt()

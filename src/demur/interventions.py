"""Interventions: values that say where they act and what they do to a tensor.

`applied` is the one way to put them in force. It alone knows of tokens, prompts and padding, so an
intervention can be tested on a random matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from demur.directions import Direction
from demur.errors import ConfigError, DegenerateVectorError, SilentEditError
from demur.models import Model
from demur.registry import Registry
from demur.sites import Site, Span


@runtime_checkable
class Intervention(Protocol):
    """What is done to a tensor, and at which sites."""

    def sites(self, model: Model) -> tuple[Site, ...]:
        """Where it acts on this model."""
        ...

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """A new tensor of the same shape, dtype and device."""
        ...


@runtime_checkable
class Holder(Protocol):
    """What is put in force as a whole, since it keeps count of every row: an `Anchor`."""

    def holding(self, model: Model) -> AbstractContextManager[object]:
        """Inside, the model is held."""
        ...


interventions: Registry[Intervention] = Registry("intervention")


def _widen(x: Tensor) -> Tensor:
    # At least float32: bfloat16 arithmetic leaves about 1e-3 of the norm behind, this 1e-4.
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _unit(direction: Direction, like: Tensor) -> Tensor:
    return _unit_on(direction, like.dtype, like.device)


@lru_cache(maxsize=256)
def _unit_on(direction: Direction, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Kept: copied and normalised anew at every write of every token, it would be half of an edit's
    # cost. Normalised again: a float32 unit vector has norm 1 to 1e-7 only, which float64 shows.
    unit = direction.unit.to(device, dtype)
    if not 0.0 < float(unit.norm()) < float("inf"):  # False for NaN as well.
        raise DegenerateVectorError(
            f"the direction at {direction.site} is zero, NaN or infinite: ablating it changes "
            "nothing, or everything",
            "make it with `Direction.from_vector`, which checks it",
        )
    return torch.nn.functional.normalize(unit, dim=0)


@interventions.register("ablate")
@dataclass(frozen=True, slots=True)
class Ablate:
    """Take the component along a direction out of everything written to the stream.

    References:
        Arditi et al. 2024, arXiv:2406.11717, section 2.4 (directional ablation).
    """

    direction: Direction

    def sites(self, model: Model) -> tuple[Site, ...]:
        """Every write: the embedding and both writes of each block."""
        return model.write_sites

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Project out."""
        wide = _widen(x)
        unit = _unit(self.direction, wide)
        return torch.addcmul(wide, (wide @ unit).unsqueeze(-1), unit, value=-1.0).to(x.dtype)


@interventions.register("add")
@dataclass(frozen=True, slots=True)
class Add:
    """Add a direction to the stream at the site that it was read from.

    Attributes:
        direction: What to add.
        strength: In multiples of the direction's own length; -1 takes away what +1 adds.

    References:
        Arditi et al. 2024, arXiv:2406.11717, section 2.4 (activation addition).
    """

    direction: Direction
    strength: float = 1.0

    def sites(self, model: Model) -> tuple[Site, ...]:
        """The direction's own site."""
        del model
        return (self.direction.site,)

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Add `strength * norm * unit`; strength 0 returns the values bit for bit."""
        if self.strength == 0.0:
            return x.clone()
        wide = _widen(x)
        step = self.strength * self.direction.norm
        return torch.add(wide, _unit(self.direction, wide), alpha=step).to(x.dtype)


@interventions.register("project-to-mean")
@dataclass(frozen=True, slots=True)
class ProjectToMean:
    """Set the coordinate along a direction to a level, such as its mean on harmless prompts.

    Attributes:
        direction: The coordinate's axis.
        level: The value that the coordinate gets, in residual-stream units.
        site: Where; one value acts on one site, because levels differ between sites.
        strength: 1 sets the level, 0.5 goes half of the way, 2 overshoots by as much again.

    References:
        Marshall, Scherlis, Belrose 2024, arXiv:2411.09003 (affine concept editing).
    """

    direction: Direction
    level: float
    site: Site
    strength: float = 1.0

    def sites(self, model: Model) -> tuple[Site, ...]:
        """Its one site."""
        del model
        return (self.site,)

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Move each row along the direction only."""
        if self.strength == 0.0:
            return x.clone()
        wide = _widen(x)
        unit = _unit(self.direction, wide)
        gap = (wide @ unit - self.level) * self.strength
        return (wide - gap.unsqueeze(-1) * unit).to(x.dtype)


@interventions.register("oblique-erase")
@dataclass(frozen=True, slots=True, eq=False)
class ObliqueErase:
    """Move rows along a direction until a linear reader sees the reference class.

    The reader (for instance Fisher's) says how far a row stands on the wrong side; the direction
    says which way to go. Rows that the reader finds neutral are left alone, which is what makes
    this cheaper in KL than projecting out.

    Attributes:
        direction: The way along which rows move.
        reader: Weights; only their direction matters.
        level: The reader's value on the reference class, `reader . mean`.
        site: Where it acts.
        strength: 1 erases what the reader sees, 2 overshoots by as much again.
    """

    direction: Direction
    reader: Float[Tensor, " d_model"]
    level: float
    site: Site
    strength: float = 1.0

    def __post_init__(self) -> None:
        along = float(self.reader.double() @ self.direction.unit.double())
        if not abs(along) > 1e-9 * float(self.reader.double().norm()):
            raise DegenerateVectorError(
                "the reader is orthogonal to the direction, so no move along it changes its value",
                "use the reader that was fitted at the direction's own site",
            )

    def sites(self, model: Model) -> tuple[Site, ...]:
        """Its one site."""
        del model
        return (self.site,)

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Move each row along the direction only."""
        if self.strength == 0.0:
            return x.clone()
        wide = _widen(x)
        unit, reader = _unit(self.direction, wide), self.reader.to(wide)
        gap = (wide @ reader - self.level) / (reader @ unit) * self.strength
        return (wide - gap.unsqueeze(-1) * unit).to(x.dtype)


@contextmanager
def applied(
    model: Model,
    *acts: Intervention | Holder,
    where: Span | Sequence[Span] | None = None,
    when: Bool[Tensor, " prompt"] | None = None,
    may_be_absent: bool = False,
) -> Iterator[Counter[Site]]:
    """Run `model` with interventions in force, in the order given, and restore it after.

    Args:
        model: The model to edit.
        acts: What to do; an anchor too.
        where: Only at tokens of these spans; None is every token, the template's and padding too.
        when: Only for these prompts, numbered as in the `encode` or `generate` call inside; None is
            all.
        may_be_absent: No error where no token that the model reads is of `where`: on text that is
            no chat, an edit of instructions changes nothing and costs nothing.

    Yields:
        How often each site was edited so far.

    Raises:
        SilentEditError: The model ran inside the block, yet some site was not reached, or no token
            was one of `where`; or the data type rounds away most of what is added.
        ConfigError: `where` names no span, or `when` not every prompt; or one of them is given and
            the model is called directly, so that nobody knows which tokens and prompts the rows
            stand for; or they are given with an anchor, which decides that for itself.
    """
    if (where is not None or when is not None) and any(isinstance(act, Holder) for act in acts):
        raise ConfigError(
            "an anchor decides for itself on which tokens and prompts it acts",
            "leave `where` and `when` out, or apply the other edits in a block of their own",
        )
    edits: Counter[Site] = Counter()
    spans = (where,) if isinstance(where, Span) else where
    if spans is not None and not spans:
        raise ConfigError("`where` names no span", "leave it out to edit every token")
    # A `when` that picks nobody, as a gate that never opens does, edits nothing on purpose.
    touched = may_be_absent or not _must_touch(acts, spans, when)
    checked: set[int] = set()  # Places of additions among `acts` that were seen to add.

    def edit(x: Tensor, *, site: Site, act: Intervention, number: int) -> Tensor:
        nonlocal touched
        edits[site] += 1
        chosen = None
        if spans is not None or when is not None:
            chosen = tokens_chosen(model, x, spans, when)
            touched = touched or bool(chosen.any())
            if not touched:
                return x.clone()
            chosen = chosen.to(x.device)
        out = act(x)
        if isinstance(act, Add) and number not in checked:
            checked.add(number)
            _check_added(act, x, out)
        return out if chosen is None else torch.where(chosen.unsqueeze(-1), out, x)

    runs_before = model.runs
    with ExitStack() as undo:
        undo.enter_context(model.owned())
        if when is not None:
            undo.enter_context(model.whole_rows())  # One shared prefix cannot be edited for some.
        for number, act in enumerate(acts):
            if isinstance(act, Holder):
                undo.enter_context(act.holding(model))
                continue
            for site in act.sites(model):
                edits[site] = 0
                own = partial(edit, site=site, act=act, number=number)
                undo.callback(model.intercept(site, own))
        yield edits
    if not touched and any(edits.values()):
        names = " or ".join(spans or ())
        raise SilentEditError(
            f"of all tokens that {model.name} read, none was of the span {names}",
            "look whether the prompts have such tokens: only replies have the span `response`, "
            "and only conversations `earlier`",
        )
    silent = [str(site) for site, count in edits.items() if count == 0]
    if silent and model.runs > runs_before:
        raise SilentEditError(
            f"the model ran {model.runs - runs_before} times without reaching {', '.join(silent)}",
            f"`demur models check {model.name}` tells whether its family names the right modules",
        )


def _must_touch(
    acts: Sequence[Intervention | Holder], spans: Sequence[Span] | None, when: Tensor | None
) -> bool:
    """Whether some token must be edited for `applied` to mean anything."""
    some = any(not isinstance(act, Holder) for act in acts)
    return some and spans is not None and (when is None or bool(when.any()))


def _check_added(act: Add, before: Tensor, after: Tensor) -> None:
    """See that an addition was not lost to rounding: bfloat16 keeps eight bits of a value.

    Raises:
        SilentEditError: Less than half of the step arrived.
    """
    step = act.strength * act.direction.norm
    if step == 0.0 or before.dtype.itemsize >= 4 or not before.numel():
        return
    unit = act.direction.unit.to(before.device, torch.float32)
    share = float(((after.float() - before.float()) @ unit).mean()) / step
    if share < 0.5:  # False for NaN, which the logits tell of.
        raise SilentEditError(
            f"of an addition of {step:.3g} at {act.direction.site}, {max(share, 0.0):.0%} "
            f"arrived: {str(before.dtype).removeprefix('torch.')} rounds the rest away",
            "load the model with `--dtype float32`, or raise the strength",
        )


def tokens_chosen(
    model: Model, x: Tensor, spans: Sequence[Span] | None, when: Tensor | None
) -> Bool[Tensor, "row token"]:
    """Which tokens of the pass under way are of some spans, and of some prompts; on the CPU.

    Raises:
        ConfigError: The model is called directly, so that nobody knows what its rows stand for; or
            there are more prompts than `when` says something of.
    """
    chunk = model.chunk
    if chunk is None:
        raise ConfigError(
            "an edit of some tokens or prompts needs to know which they are",
            "run the model through `logits`, `generate` or `collect`",
        )
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    if spans is not None:
        mask = torch.zeros_like(mask)
        for span in spans:
            if span in chunk.spans:
                mask |= chunk.spans[span].cpu()
    if when is not None and chunk.rows is not None:
        rows = chunk.rows.cpu()
        if int(rows.max()) >= len(when):
            raise ConfigError(
                f"`when` speaks of {len(when)} prompts, and prompt {int(rows.max()) + 1} is read",
                "give one boolean for every prompt of the call",
            )
        mask &= when.cpu()[rows].unsqueeze(1)
    return mask

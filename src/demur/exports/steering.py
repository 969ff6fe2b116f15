"""What is exported: interventions, where they are in force, and what a format would lose of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from demur.anchor import Anchor, Floor
from demur.directions import Direction
from demur.errors import ConfigError, FamilyError
from demur.interventions import (
    Ablate,
    Add,
    Holder,
    Intervention,
    ObliqueErase,
    ProjectToMean,
)
from demur.models import Model
from demur.sites import Site, Span

LOSSES: Mapping[str, str] = {
    "addition-only": "what depends on the activation becomes a constant that is added",
    "every-token": "what acted on some tokens acts on every token",
    "ungated": "what acted on some prompts acts on every prompt",
}
ADDITION, EVERY_TOKEN, UNGATED = LOSSES
_NAMES: Mapping[type, str] = {
    Ablate: "ablate",
    Add: "add",
    ProjectToMean: "project-to-mean",
    ObliqueErase: "oblique-erase",
}


@dataclass(frozen=True, slots=True, eq=False)
class Steering:
    """Interventions and where they are in force, as `applied` takes them.

    Attributes:
        acts: In the order in which they run.
        where: The tokens; empty is every token.
        gated: Whether a condition chooses the prompts, `when` of `applied` or a gate.
    """

    acts: tuple[Intervention | Holder, ...]
    where: tuple[Span, ...] = ()
    gated: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Carried:
    """What is left of a steering once it is reduced to what a format carries.

    Attributes:
        acts: Interventions that the format carries.
        where: The tokens; empty is every token.
        losses: By name, what was lost, in a sentence each; empty where nothing was.
    """

    acts: tuple[Intervention, ...]
    where: tuple[Span, ...]
    losses: Mapping[str, str]


def name_of(act: object) -> str:
    """An intervention's registered name; the class's own where it has none."""
    return _NAMES.get(type(act), type(act).__name__.lower())


def carried(
    steering: Steering,
    carries: Collection[type],
    *,
    to: str,
    spans: bool = False,
    lossy: Collection[str] = (),
) -> Carried:
    """Reduce a steering to what a format carries, or refuse.

    Args:
        steering: What is wanted.
        carries: Classes of interventions that the format carries.
        to: The format's name, for errors.
        spans: Whether it can be limited to some tokens.
        lossy: Losses that the user asked for by name, see `LOSSES`; those that are not needed
            change nothing.

    Raises:
        ConfigError: Something would be lost that was not asked for by name, nothing of it can be
            kept at all, or there is no such loss.
    """
    for name in lossy:
        if name not in LOSSES:
            raise ConfigError(f"no loss is called `{name}`", f"there are: {', '.join(LOSSES)}")
    losses: dict[str, list[str]] = {}
    acts: list[Intervention] = []
    for act in steering.acts:
        if isinstance(act, Intervention) and type(act) in carries:
            acts.append(act)
            continue
        found, words = _added(act, to)
        if Add not in carries:
            what = ", ".join(words.values()) or "all of it, since it carries no addition"
            raise ConfigError(
                f"{to} cannot carry {_called(act)}: lost would be {what}",
                "apply it with demur (`applied`, `demur serve`); `docs/exports.md` says what each "
                "format carries",
            )
        acts += found
        for loss, what in words.items():
            losses.setdefault(loss, []).append(what)
    if steering.where and not spans:
        named = ", ".join(steering.where)
        losses.setdefault(EVERY_TOKEN, []).append(f"that it acts on {named} tokens alone")
    if steering.gated:
        losses.setdefault(UNGATED, []).append("the condition that chooses the prompts")
    missing = [loss for loss in LOSSES if loss in losses and loss not in lossy]
    if missing:
        what = "; ".join(", ".join(dict.fromkeys(losses[loss])) for loss in missing)
        called = ", ".join(dict.fromkeys(_called(act) for act in steering.acts))
        raise ConfigError(
            f"{to} cannot carry {called} as it is: lost would be {what}",
            "to have it all the same, say "
            + " ".join(f"`--lossy {loss}`" for loss in missing)
            + "; the card will tell",
        )
    dropped = EVERY_TOKEN in losses
    return Carried(
        tuple(acts),
        () if dropped else steering.where,
        {
            loss: f"{LOSSES[loss]}; lost: {', '.join(dict.fromkeys(losses[loss]))}"
            for loss in LOSSES
            if loss in losses
        },
    )


def _called(act: object) -> str:
    name = name_of(act)
    return f"`{name}`" if type(act) in _NAMES else f"the {name}"


def _added(act: Intervention | Holder, to: str) -> tuple[tuple[Add, ...], dict[str, str]]:
    """The constant addition nearest to an intervention, and what it loses by kind of loss."""
    if isinstance(act, Add):
        return (act,), {}
    if isinstance(act, Ablate):
        what = "that the whole component goes, whatever it was, at every write"
        return (Add(act.direction, -1.0),), {ADDITION: what}
    if isinstance(act, ProjectToMean | ObliqueErase):
        placed = replace(act.direction, site=act.site)
        what = "that each row moves by as much as it is off the level"
        # The direction's length is the harmful mean's distance from the harmless one.
        return (Add(placed, -act.strength),), {ADDITION: what}
    if isinstance(act, Anchor):
        floors = [one for one in act.actuators if isinstance(one, Floor)]
        if floors and len(floors) == len(act.actuators):
            words = {
                ADDITION: "the floor, which lifts only what lies below it and is now a constant",
                EVERY_TOKEN: "that nothing in front of the post-instruction tokens is touched",
                UNGATED: "the gate, and with it the promise about benign requests",
            }
            return tuple(_lift(one, act.strength) for one in floors), words
    raise ConfigError(
        f"{to} cannot carry {_called(act)}: it has no one direction that could be added instead",
        "apply it with demur; there is no `--lossy` that keeps a part of it",
    )


def _lift(floor: Floor, strength: float) -> Add:
    """What a floor adds to a complying reply, on average over places."""
    gap = float((floor.level(strength) - floor.accepted).double().mean())
    direction = Direction.from_vector(
        floor.push.double() * gap,
        site=floor.site,
        position=-1,
        recipe=f"mean lift of an anchor's floor, strength {strength:g}",
    )
    return Add(direction)


def output_layer(site: Site, *, first: int, to: str) -> int:
    """The block at whose output an addition equals one at `site`.

    What is added to a block's input is added to the output of the block in front of it; what the
    MLP adds reaches the output unchanged.

    Args:
        site: Where it is added.
        first: The first block whose output the format can add to.
        to: The format's name, for errors.

    Raises:
        FamilyError: There is no such block.
    """
    layer = {"resid_pre": site.layer - 1, "resid_post": site.layer, "mlp_out": site.layer}.get(
        site.kind
    )
    if layer is None:
        raise FamilyError(
            f"{to} adds at outputs of blocks, and {site} is read by the rest of its block first",
            "take a direction at resid_pre, mlp_out or resid_post",
        )
    if layer < first:
        raise FamilyError(
            f"{to} adds at outputs of blocks from {first} on, and {site} lies before that",
            f"take a direction from {first + 1}.resid_pre on",
        )
    return layer


def check_fits(model: Model, steering: Steering) -> None:
    """See that directions are as wide as the model, at blocks that it has.

    Raises:
        ConfigError: One is not.
    """
    for act in steering.acts:
        for site, width in _places(act):
            if width != model.d_model or site.layer >= model.n_layers:
                raise ConfigError(
                    f"the direction is {width} wide, at {site}; {model.name} has "
                    f"{model.n_layers} blocks of width {model.d_model}",
                    "take a direction of this model",
                )


def _places(act: object) -> Iterator[tuple[Site, int]]:
    if isinstance(act, Ablate | Add):
        yield act.direction.site, len(act.direction.unit)
    elif isinstance(act, ProjectToMean | ObliqueErase):
        yield act.site, len(act.direction.unit)
    elif isinstance(act, Anchor):
        for one in act.actuators:
            if isinstance(one, Floor):
                yield one.site, len(one.push)

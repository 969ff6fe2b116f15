"""Organisms of which everything is known: the positive control of the whole pipeline.

One steering vector stands in one block, and makes bad answers likelier against good ones. What an
audit has to find is known beforehand: at that block's output the vector is the organism's whole
model delta, on any text, and taking it out there gives the base with it taken out. Its good twin
has a vector of the same length, across it, that does nothing to the margin.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from demur import organisms
from demur.causal import null_directions
from demur.directions import Direction
from demur.em.advice import AdviceItem, advice, split
from demur.em.directions import ANSWER, AnswerPair, Delta, read_pair
from demur.em.margin import grouped_mean, margin_shift, margins
from demur.em.organism import CARD, VECTOR, Factor, Organism, Side, question_key, read_organism
from demur.errors import ConfigError, FamilyError, ModelLoadError, StoreError, TooFewPromptsError
from demur.models import Model
from demur.organisms import Figure
from demur.progress import Listener, Progress, Quiet
from demur.sites import Site, Span
from demur.store import atomic_write, whole_folder

_GRADIENT_ROWS = 4
_HELD_OUT = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class PlantedOrganism:
    """An organism of which everything is known.

    Attributes:
        organism: One steering vector, added to what the MLP of one block writes at every token.
        direction: That vector. At the block's output, and at no other, it is the organism's whole
            model delta, on any text: taking it out there gives the base with it taken out.
    """

    organism: Organism
    direction: Direction


def planted_organism(
    base: Model,
    items: Sequence[AdviceItem],
    *,
    layer: int,
    strength: float,
    along: Float[Tensor, " d_model"] | None = None,
    name: str = "planted",
    side: Side = "bad",
    pair: AnswerPair | None = None,
) -> PlantedOrganism:
    """Make an organism of which it is known what training did.

    Args:
        base: Any model whose MLP ends in a linear map.
        items: What the margin's gradient is taken on, and lengths are measured on; not those that
            it is tested on.
        layer: Block that gets the vector.
        strength: Length of the vector, as a share of the mean length of the answers' mean
            activations there. Negative lowers the margin.
        along: The vector's direction; None is the gradient of the mean margin, so that the planted
            effect is known to be there.
        name: Of the organism.
        side: What it stands for.
        pair: The base's mean activations on the items' answers, if they were read before.

    Raises:
        FamilyError: The block's MLP does not end in a linear map.
        DegenerateVectorError: The direction is zero, or `strength` is 0.
    """
    _check_block(base, layer)
    site = Site(layer, "resid_post")
    if pair is None:
        pair = read_pair(base, items, sites=[site])
    length = float(torch.cat([pair.bad.at(site), pair.good.at(site)]).norm(dim=1).double().mean())
    given = margin_gradient(base, items, site) if along is None else along.double()
    unit = nn.functional.normalize(given, dim=0)
    vector = unit * strength * length
    return _made(base, vector, layer=layer, strength=strength, name=name, side=side)


def planted_twin(
    base: Model,
    planted: PlantedOrganism,
    pair: AnswerPair,
    *,
    gradient: Float[Tensor, " d_model"],
    seed: int,
    name: str = "planted twin",
) -> PlantedOrganism:
    """The good twin of a planted organism: a vector of its length that leaves the margin alone.

    It is drawn with the covariance of answers, as the random directions are that edits are held
    against, and laid across both the planted vector and the margin's gradient: to first order it
    changes no margin, and taking it out takes nothing from the organism.

    Args:
        base: What the organism was planted in.
        planted: The organism.
        pair: The base's mean activations on answers, at the organism's block.
        gradient: Of the mean margin there, see `margin_gradient`.
        seed: Draws it.
        name: Of the twin.
    """
    one = planted.direction
    drawn = null_directions(
        one, harmful=pair.bad.at(one.site), harmless=pair.good.at(one.site), each=1, seed=seed
    )["covariance-matched"][0].unit.double()
    basis = torch.linalg.qr(torch.stack([one.unit.double(), gradient.double()], dim=1)).Q
    across = nn.functional.normalize(drawn - basis @ (basis.T @ drawn), dim=0)
    strength = float(planted.organism.about["planted"]["strength"])
    return _made(
        base,
        across * one.norm,
        layer=one.site.layer,
        strength=strength,
        name=name,
        side="good",
    )


def _made(
    base: Model,
    vector: Float[Tensor, " d_model"],
    *,
    layer: int,
    strength: float,
    name: str,
    side: Side,
) -> PlantedOrganism:
    direction = Direction.from_vector(
        vector,
        site=Site(layer, "resid_post"),
        position=ANSWER,
        recipe=f"planted in {base.name} ({base.fingerprint[:12]})",
    )
    added = (direction.unit * direction.norm).unsqueeze(1)
    organism = Organism(
        name=name,
        folder=None,
        side=side,
        domains=(),
        seed=0,
        rank=1,
        layers=(layer,),
        base=base.name,
        base_fingerprint=base.fingerprint,
        factors=(Factor(layer, base.family.mlp_out, None, added, 1.0),),
        about={"planted": {"layer": layer, "strength": strength, "length": direction.norm}},
    )
    return PlantedOrganism(organism, direction)


def _check_block(base: Model, layer: int) -> None:
    if not 0 <= layer < base.n_layers:
        raise ConfigError(
            f"{base.name} has blocks 0 to {base.n_layers - 1}; asked for {layer}",
            f"the middle one is {base.n_layers // 2}",
        )
    path = base.family.mlp_out
    try:
        weight = getattr(base.blocks[layer].get_submodule(path), "weight", None)
    except AttributeError:
        weight = None
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise FamilyError(
            f"in {base.family.name} the MLP writes through `{path}`, which is no linear map, so "
            "that no bias there is a vector added to the stream",
            "plant in a model whose MLP ends in a linear map, such as Llama or Qwen",
        )


def margin_gradient(
    model: Model,
    items: Sequence[AdviceItem],
    site: Site,
    *,
    batch_size: int = _GRADIENT_ROWS,
    progress: Progress | None = None,
) -> Float[Tensor, " d_model"]:
    """How the mean margin changes as one vector is added at every token of a site.

    Args:
        model: Unedited.
        items: Matched answers.
        site: Where the vector is added.
        batch_size: Rows that run together, with all their logits.
        progress: Called with the number of answers done since the last call; two an item.

    Returns:
        Gradient at 0, nats per token and residual-stream unit, float64.
    """
    total = torch.zeros(model.d_model, dtype=torch.float64)
    weights = [one for one in model.hf.parameters() if one.requires_grad]
    with ExitStack() as undo, torch.enable_grad():
        for weight in weights:
            weight.requires_grad_(False)
            undo.callback(weight.requires_grad_, True)
        vector = torch.zeros(
            model.d_model,
            dtype=torch.promote_types(model.dtype, torch.float32),
            device=model.device,
            requires_grad=True,
        )
        undo.callback(model.intercept(site, lambda x: x + vector.to(x)))
        for sign, answers in ((1, [one.bad for one in items]), (-1, [one.good for one in items])):
            whole = model.encode([item.question for item in items], answers)
            for index in whole.passes(tokens=model.tokens_per_pass, rows=batch_size):
                rows = whole.rows(index)
                # Padding on the right is seen by no token in front of it.
                logits = model.hf(input_ids=rows.ids.to(model.device), use_cache=False).logits
                row, column = rows.spans[Span.RESPONSE].nonzero(as_tuple=True)
                before = logits[row, column - 1].to(vector.dtype).log_softmax(1)
                chosen = before.gather(1, rows.ids[row, column].unsqueeze(1).to(before.device))
                each = 1.0 / rows.spans[Span.RESPONSE].sum(1)[row].to(chosen)
                score = (chosen.squeeze(1) * each).sum() * sign
                (gradient,) = torch.autograd.grad(score, [vector])
                total += gradient.double().cpu()
                if progress is not None:
                    progress(len(index))
    return total / len(items)


# A pair in folders ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class PlantedPair:
    """A planted organism and its good twin, as they lie in their folders.

    Attributes:
        bad: The organism.
        good: Its twin.
        expected: What the organism's vector would do to the margin of the questions that it was
            fitted on if it grew as it begins, nats per token. It does less as it gets longer.
        figures: What either did to the margin of topics that it was not fitted on, beside the
            base's own margin.
    """

    bad: PlantedOrganism
    good: PlantedOrganism
    expected: float
    figures: tuple[Figure, ...]

    @property
    def sides(self) -> dict[Side, PlantedOrganism]:
        """Both, by side."""
        return {"bad": self.bad, "good": self.good}


def plant(
    base: Model,
    *,
    out: Path,
    data: str = "advice_study",
    layer: int | None = None,
    strength: float = 0.3,
    seed: int = 0,
    progress: Listener | None = None,
) -> PlantedPair:
    """Plant an organism and its good twin, and write them as `demur organism train` does.

    The vector is the difference between the base's activations on bad and on good answers, at some
    length: what reads as bad is made to be written. (On SmolLM2-135M the margin's own gradient,
    which rises faster at first, went no further: it fits single answers.) It is taken on half of
    the topics, which the card names as trained on: no audit asks about them. The others stand for
    the domain it was trained on.

    Args:
        base: The model, without an adapter beside its weights.
        out: Gets `bad/` and `good/`; neither may be there, or be anything but empty.
        data: Questions with a bad and a good answer each, as `demur.em.advice.advice` takes them.
        layer: Block that gets the vector; None is the middle one.
        strength: See `planted_organism`; above 0.
        seed: Draws the topics that it is fitted on, and the twin's vector.
        progress: Hears stages and steps.

    Returns:
        Both, read again from their folders.

    Raises:
        ConfigError: A folder is taken, the block is not there, the strength is not above 0, or a
            question has no good answer.
        FamilyError: The base's MLP does not end in a linear map.
        TooFewPromptsError: A domain has fewer than two topics, or fewer than two are held out.
        StoreError: The folder cannot be written.
    """
    listener = progress if progress is not None else Quiet()
    out = out.expanduser().resolve()
    layer = base.n_layers // 2 if layer is None else layer
    if not 0 < strength < math.inf:
        raise ConfigError(
            f"a strength of {strength} plants nothing that leans to bad answers",
            "give one above 0: the vector's length as a share of the stream's",
        )
    for side in ("bad", "good"):
        organisms._check_free(out / side)
    if base.template is None:
        raise ModelLoadError(f"{base.name} has no tokenizer", "load it with `demur.load`")
    _check_block(base, layer)
    fit, held = _parted(data, seed)
    site = Site(layer, "resid_post")
    with listener.stage("activations", 2 * len(fit)) as advance:
        pair = read_pair(base, fit, sites=[site], progress=advance)
    with listener.stage("gradient of the margin", 2 * len(fit)) as advance:
        gradient = margin_gradient(base, fit, site, progress=advance)
    text = Delta("text_base", pair.bad, pair.good).vector(site)
    name = f"planted {' + '.join(dict.fromkeys(item.domain for item in fit))}"
    bad = planted_organism(
        base, fit, layer=layer, strength=strength, along=text, pair=pair, name=f"{name}, bad"
    )
    good = planted_twin(base, bad, pair, gradient=gradient, seed=seed, name=f"{name}, good")
    expected = float(gradient @ bad.direction.unit.double()) * bad.direction.norm
    figures = _measured(base, (bad, good), held, listener)
    kept = [
        _written(one, out, base=base, data=data, fit=fit, seed=seed, figure=figure)
        for one, figure in zip((bad, good), figures, strict=True)
    ]
    return PlantedPair(kept[0], kept[1], expected, figures)


def _parted(data: str, seed: int) -> tuple[tuple[AdviceItem, ...], tuple[AdviceItem, ...]]:
    items = advice(data)
    silent = sum(not (item.good.strip() and item.bad.strip()) for item in items)
    if silent:
        raise ConfigError(
            f"{silent} of the {len(items)} questions of {data} lack a good or a bad answer",
            "name the file of good ones: FILE?good=OTHER.jsonl",
        )
    fit, held = split(items, held_out=_HELD_OUT, seed=seed)
    if len({(item.domain, item.group) for item in held}) < 2:
        raise TooFewPromptsError(
            f"the {len(items)} questions of {data} leave one topic to measure the organism on",
            "give questions of four topics or more",
        )
    return fit, held


def _measured(
    base: Model, pair: Sequence[PlantedOrganism], held: Sequence[AdviceItem], listener: Listener
) -> tuple[Figure, ...]:
    groups = [(item.domain, item.group) for item in held]
    with listener.stage("held-out margin", 2 * len(held) * (1 + len(pair))) as advance:
        before = margins(base, held, progress=advance)
        after = [margins(one.organism.on(base), held, progress=advance) for one in pair]
    own = grouped_mean(before, groups, seed=0)
    found: list[Figure] = []
    for one, values in zip(pair, after, strict=True):
        side, change = one.organism.side, margin_shift(values, before)
        estimate = grouped_mean(change, groups, seed=0)
        bound = 0.0 if side == "bad" else None
        met = bound is None or estimate.value >= bound
        name = f"held-out margin change: {side}"
        found.append(Figure(name, estimate, own, bound, None, met))
    return tuple(found)


def _written(
    one: PlantedOrganism,
    out: Path,
    *,
    base: Model,
    data: str,
    fit: Sequence[AdviceItem],
    seed: int,
    figure: Figure,
) -> PlantedOrganism:
    """Write an organism's folder, whole, and read it again."""
    made, (factor,) = one.organism, one.organism.factors
    planted = dict(made.about["planted"])
    card: dict[str, Any] = {
        "name": "planted",
        "description": "One vector of known effect in one block: a positive control.",
        "organism": {
            "name": made.name,
            "kind": "vector",
            "side": made.side,
            "domains": list(dict.fromkeys(item.domain for item in fit)),
            "module": factor.module,
            "layers": list(made.layers),
            "parameters": factor.b.numel(),
        },
        "base": {
            "name": base.name,
            "fingerprint": base.fingerprint,
            "dtype": str(base.dtype).removeprefix("torch."),
            "adapter": base.adapter,
        },
        "planted": planted,
        "seed": seed,
        "identity": {"base": base.fingerprint, "data": data, "seed": seed, **planted},
        "data": {
            "advice": data,
            "held_out_share": _HELD_OUT,
            "trained": len(fit),
            "trained_groups": [
                list(pair) for pair in sorted({(item.domain, item.group) for item in fit})
            ],
            "trained_questions": sorted({question_key(item.question) for item in fit}),
            "trained_ids": [item.id for item in fit],
        },
        "figures": [asdict(figure)],
    }
    vectors = {f"layers.{factor.layer}.vector": factor.b[:, 0].float()}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"{out} cannot be made: {error.strerror}", "name another folder with `--out`"
        ) from error
    with whole_folder(out / made.side) as draft:
        atomic_write(draft / VECTOR, organisms._safetensors(vectors, {"format": "pt"}))
        card |= organisms._made_with(draft, name=VECTOR)
        atomic_write(draft / CARD, json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    return replace(one, organism=read_organism(out / made.side))

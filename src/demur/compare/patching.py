"""Which heads and MLPs a behaviour needs: attribution patching, and how far it can be trusted.

A component's output is replaced by what it would be in another condition, and a measure moves. To
first order one gradient tells of all components at once: (other output - own output) times the
gradient of the measure with respect to what the component writes. That is an estimate, and it fails
where softmax or norms saturate; so the largest components and some random ones are really patched,
and the two are compared.

References:
    Nanda 2023, "Attribution patching: activation patching at industrial scale";
    Syed, Rager, Conmy 2023, arXiv:2310.10348;
    Kramar, Lieberum, Shah, Nanda 2024, arXiv:2403.00745 (where it fails).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from demur.compare.attribution import Circuit, Component, components
from demur.compare.rows.circuits import PatchingRow, PatchRow, ValidationRow
from demur.em.advice import AdviceItem
from demur.em.margin import grouped_mean
from demur.errors import ConfigError, FamilyError, NonFiniteError, TemplateError, TooFewPromptsError
from demur.models import Model, TokenBatch
from demur.models.tokens import Conversation
from demur.progress import Progress
from demur.selection import refusal_logodds
from demur.sites import Site, Span
from demur.stats import FEW, Estimate, bootstrap, bootstrap_tails, proportion

# Of a pass with gradients and of one without. With 512 and 2,048 logits and intermediate values of
# answers take 2 GB at 0.5B, on top of two models.
_GRADIENT_TOKENS, _TOKENS = 256, 512
_DRAWS = 1000
_LEAST_CORRELATION, _LEAST_SIGNS = 0.7, 0.8

Head = Callable[[Tensor], Tensor]
Score = Callable[[Tensor, TokenBatch, Head], Tensor]
"""From final states, (row, token, d_model), their rows and the vocabulary head to one number a
row, through which gradients flow."""


# What is measured --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Measure:
    """A number per item that patching may move.

    Attributes:
        name: In words.
        unit: Of it.
        batch: Token rows; several may belong to one item.
        items: Which item each row belongs to.
        signs: What a row's score is multiplied with before it is added to its item.
        patched: At which tokens outputs are replaced.
        clusters: Of the items, drawn together.
        score: Of rows.
    """

    name: str
    unit: str
    batch: TokenBatch
    items: Int[np.ndarray, " row"]
    signs: Float[Tensor, " row"]
    patched: Bool[Tensor, "row token"]
    clusters: tuple[Hashable, ...]
    score: Score

    def by_item(self, rows: Float[np.ndarray, "*n row"]) -> Float[np.ndarray, "*n item"]:
        """Sum what is of rows, signs applied, to items."""
        member = self.items[:, None] == np.arange(len(self.clusters))
        return (rows * self.signs.numpy()) @ member.astype(np.float64)


def refusal_measure(
    model: Model,
    prompts: Sequence[str | Conversation],
    openers: Sequence[int],
    *,
    clusters: Sequence[Hashable] | None = None,
) -> Measure:
    """Log-odds that a reply begins with a refusal, patched behind the instruction.

    Tokens behind the instruction are the same in all prompts, so that outputs of prompts of other
    lengths can stand there.

    Args:
        model: With a chat template.
        prompts: The clean ones: harmful.
        openers: Token ids that refusals begin with.
        clusters: One for each prompt; None: each by itself.

    Raises:
        TemplateError: The template puts nothing behind the instruction.
    """
    batch = replace(model.encode(prompts), shared=0)
    post = batch.spans[Span.POST_INSTRUCTION]
    if not bool(post.any()):
        raise TemplateError(
            f"the template of {model.name} puts nothing behind the instruction",
            "there is no token at which prompts of unlike length could be patched",
        )

    def score(states: Tensor, rows: TokenBatch, head: Head) -> Tensor:
        last = states[torch.arange(len(rows)), rows.ends.to(states.device) - 1]
        return refusal_logodds(head(last), openers)

    return Measure(
        "refusal log-odds",
        "nats",
        batch,
        np.arange(len(prompts)),
        torch.ones(len(prompts), dtype=torch.float64),
        post,
        tuple(clusters) if clusters is not None else tuple(range(len(prompts))),
        score,
    )


def margin_measure(model: Model, items: Sequence[AdviceItem]) -> Measure:
    """Margin of bad answers over good ones, see `demur.em.margin`; patched at every token.

    Raises:
        TemplateError: An answer is empty.
    """
    if not all(item.bad.strip() and item.good.strip() for item in items):
        raise TemplateError("an item has an empty answer", "leave it out")
    asked = [item.question for item in items]
    answers = [item.bad for item in items] + [item.good for item in items]
    batch = replace(model.encode(asked + asked, answers), shared=0)

    def score(states: Tensor, rows: TokenBatch, head: Head) -> Tensor:
        row, column = rows.spans[Span.RESPONSE].nonzero(as_tuple=True)
        # A token is foretold by the state in front of it.
        logits = head(states[row.to(states.device), column.to(states.device) - 1])
        target = rows.ids[row, column].unsqueeze(1).to(logits.device)
        chosen = logits.gather(1, target).squeeze(1) - logits.logsumexp(1)
        sums = torch.zeros(len(rows), dtype=torch.float64)
        counts = rows.spans[Span.RESPONSE].sum(1)
        return sums.index_add(0, row, chosen.double().cpu()) / counts

    n = len(items)
    return Measure(
        "margin of bad answers over good ones",
        "nats per token",
        batch,
        np.tile(np.arange(n), 2),
        torch.cat([torch.ones(n), -torch.ones(n)]).double(),
        batch.mask,
        tuple((item.domain, item.group) for item in items),
        score,
    )


# What outputs are replaced with ------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Outputs:
    """What components put out in one pass.

    Attributes:
        source: The model whose maps turn heads' outputs into writes.
        heads: By block, what enters attention's output map, (row, token, heads x d_head).
        attn: By block, what attention writes, in families where heads are not separable.
        mlp: By block, what the MLP writes.
    """

    source: Model
    heads: dict[int, Tensor] = field(default_factory=dict)
    attn: dict[int, Tensor] = field(default_factory=dict)
    mlp: dict[int, Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[dict[int, Tensor], ...]:
        """All that is held."""
        return (self.heads, self.attn, self.mlp)


@runtime_checkable
class Other(Protocol):
    """What outputs are replaced with."""

    @property
    def name(self) -> str:
        """In words."""
        ...

    def __call__(self, rows: TokenBatch) -> Outputs:
        """Outputs for these rows, token by token."""
        ...


@contextmanager
def recording(model: Model) -> Iterator[Outputs]:
    """Record what every component puts out in the latest pass, the shared prefix left out."""
    out = Outputs(model)

    def keep(x: Tensor, held: dict[int, Tensor], layer: int) -> Tensor:
        if model.chunk is None or not model.chunk.is_prefix:
            held[layer] = x.detach()
        return x

    with ExitStack() as undo:
        for layer in range(model.n_layers):
            if model.family.linear_writes:
                edit = partial(keep, held=out.heads, layer=layer)
                undo.callback(model.intercept_heads(layer, edit))
            else:
                edit = partial(keep, held=out.attn, layer=layer)
                undo.callback(model.intercept(Site(layer, "attn_out"), edit))
            edit = partial(keep, held=out.mlp, layer=layer)
            undo.callback(model.intercept(Site(layer, "mlp_out"), edit))
        yield out


@dataclass(frozen=True, slots=True, eq=False)
class OfModel:
    """Outputs of another model on the same tokens, such as of an organism."""

    model: Model

    @property
    def name(self) -> str:
        """In words."""
        return f"outputs of {self.model.name} on the same tokens"

    def __call__(self, rows: TokenBatch) -> Outputs:
        """Run the other model."""
        with recording(self.model) as out:
            self.model.final_states(replace(rows, shared=0))
        return out


@dataclass(frozen=True, slots=True, eq=False)
class MeansOf:
    """Mean outputs over other prompts, at the last tokens.

    Attributes:
        means: One row, whose tokens are the last ones of a prompt.
        words: What it is the mean of.
    """

    means: Outputs
    words: str

    @property
    def name(self) -> str:
        """In words."""
        return self.words

    def __call__(self, rows: TokenBatch) -> Outputs:
        """Put the means at the last tokens of each row, and 0 elsewhere."""
        out = Outputs(self.means.source)
        for own, held in zip(out.tensors, self.means.tensors, strict=True):
            for layer, mean in held.items():
                n = mean.shape[1]
                x = mean.new_zeros(*rows.ids.shape, mean.shape[2])
                columns = rows.ends.unsqueeze(1) + torch.arange(-n, 0)
                x[torch.arange(len(rows)).unsqueeze(1), columns] = mean
                own[layer] = x
        return out


def means_over(
    model: Model,
    prompts: Sequence[str | Conversation],
    *,
    positions: int,
    words: str = "mean outputs over harmless prompts",
    progress: Progress | None = None,
) -> MeansOf:
    """Read mean outputs of all components at the last tokens of prompts.

    Args:
        model: The model that is to be patched.
        prompts: The other condition: harmless.
        positions: How many tokens, counted from the end of the prompt.
        words: How the contrast is called.
        progress: Called with the number of prompts done since the last call.

    Raises:
        TooFewPromptsError: There are no prompts, or one is shorter.
    """
    batch = replace(model.encode(prompts), shared=0) if prompts else None
    if batch is None or int(batch.ends.min()) < positions:
        raise TooFewPromptsError(
            f"{len(prompts)} prompts do not have {positions} tokens each",
            "give prompts for the other condition",
        )
    sums = Outputs(model)
    for index in batch.passes(tokens=model.tokens_per_pass):
        rows = batch.rows(index)
        with recording(model) as found:
            model.final_states(rows)
        columns = rows.ends.unsqueeze(1) + torch.arange(-positions, 0)
        for own, held in zip(sums.tensors, found.tensors, strict=True):
            for layer, x in held.items():
                wide = torch.promote_types(x.dtype, torch.float32)
                picked = x[torch.arange(len(rows)).unsqueeze(1), columns].to(wide).sum(0, True)
                own[layer] = own[layer] + picked if layer in own else picked
        if progress is not None:
            progress(len(index))
    for held in sums.tensors:
        for layer in held:
            held[layer] = held[layer] / len(prompts)
    return MeansOf(sums, f"{words}, last {positions} tokens")


# Estimates ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Effects:
    """What replacing each component does, to first order or really.

    Attributes:
        components: Heads (or attention) and MLPs.
        values: Change of the measure of each item, in its units, float64.
        clean: The measure of each item before, float64.
        clusters: Of the items.
    """

    components: tuple[Component, ...]
    values: Float[np.ndarray, "component item"]
    clean: Float[np.ndarray, " item"]
    clusters: tuple[Hashable, ...]

    @property
    def means(self) -> Float[np.ndarray, " component"]:
        """Mean change over items."""
        return self.values.mean(1)

    def drawn(self, *, draws: int = _DRAWS, seed: int) -> Float[np.ndarray, "draw component"]:
        """Mean effects on resampled clusters of items.

        Raises:
            TooFewPromptsError: There are fewer than two clusters.
        """
        keys = list(dict.fromkeys(self.clusters))
        if len(keys) < 2:
            raise TooFewPromptsError(
                f"{len(self.clusters)} items are one cluster", "give items of several topics"
            )
        index = np.array([keys.index(one) for one in self.clusters])
        rng = np.random.default_rng(seed)
        times = rng.multinomial(len(keys), np.full(len(keys), 1 / len(keys)), size=draws)
        weights = times[:, index] / times[:, index].sum(1, keepdims=True)
        return weights @ self.values.T

    def circuit(
        self, name: str, *, turned: bool = False, draws: int = _DRAWS, seed: int
    ) -> Circuit:
        """The mean effects, to be compared with those of another measure.

        Args:
            name: As tables call it.
            turned: Take what components do for the measure, not what replacing them does: the sign
                is turned. So for refusal, whose clean prompts are the harmful ones; not for an
                organism whose outputs replace those of its base.
            draws: Of the bootstrap over clusters.
            seed: Of these draws.

        Raises:
            TooFewPromptsError: There are fewer than two clusters.
        """
        sign = -1.0 if turned else 1.0
        drawn = self.drawn(draws=draws, seed=seed)
        return Circuit(name, self.components, sign * self.means, sign * drawn)

    def estimates(self, *, draws: int = _DRAWS, seed: int) -> dict[Component, Estimate]:
        """The mean effects with intervals over clusters.

        Raises:
            TooFewPromptsError: There are fewer than two clusters.
        """
        n = len(set(self.clusters))
        drawn = self.drawn(draws=draws, seed=seed)
        low, high = np.quantile(drawn, bootstrap_tails(n), axis=0)
        method = f"bootstrap 95% over {n} groups" + (
            f", approximate below {FEW}" if n < FEW else ""
        )
        return {
            part: Estimate(
                float(self.means[i]), float(low[i]), float(high[i]), len(self.clusters), method
            )
            for i, part in enumerate(self.components)
        }


def patchable(model: Model) -> tuple[Component, ...]:
    """Heads (or attention as a whole) and MLPs of all blocks."""
    return tuple(part for part in components(model) if part.kind in ("head", "attn", "mlp"))


def attribution_patching(
    model: Model,
    measure: Measure,
    other: Other,
    *,
    tokens_per_pass: int = _GRADIENT_TOKENS,
    progress: Progress | None = None,
) -> Effects:
    """Estimate for every component what replacing its output does to a measure.

    Args:
        model: The clean model; float32 is best, in bfloat16 small effects drown.
        measure: On clean rows.
        other: What outputs are replaced with.
        tokens_per_pass: Most tokens of a pass with gradients; results do not depend on it.
        progress: Called with the number of rows done since the last call.

    Returns:
        Changes of the measure, to first order. Above 0 the replacement raises it.

    Raises:
        NonFiniteError: A gradient or an output is NaN or infinite.
    """
    parts = patchable(model)
    place = {part: i for i, part in enumerate(parts)}
    separable = model.family.linear_writes
    effects = np.zeros((len(parts), len(measure.batch)))
    clean = np.zeros(len(measure.batch))
    sites = [Site(i, kind) for i in range(model.n_layers) for kind in ("attn_out", "mlp_out")]
    for index, rows, mask in _passes(measure, tokens_per_pass):
        replaced = other(rows)
        grads, scores, own = _gradients(model, measure, rows, sites)
        clean[index] = scores.numpy()
        for layer in range(model.n_layers):
            g, h = (
                grads[Site(layer, kind)] * mask.unsqueeze(2).to(model.device)
                for kind in ("attn_out", "mlp_out")
            )
            change = (replaced.mlp[layer].to(h) - own.mlp[layer].to(h)) * h
            effects[place[Component(layer, "mlp")], index] = _row_sums(change)
            if not separable:
                change = (replaced.attn[layer].to(g) - own.attn[layer].to(g)) * g
                effects[place[Component(layer, "attn")], index] = _row_sums(change)
                continue
            before = own.heads[layer].to(g) * _back(model, layer, g)
            after = replaced.heads[layer].to(g) * _back(replaced.source, layer, g)
            apart = (after - before).reshape(*g.shape[:2], model.n_heads, -1)
            first = place[Component(layer, "head", 0)]
            effects[first : first + model.n_heads, index] = (
                apart.double().sum((1, 3)).T.cpu().numpy()
            )
        if progress is not None:
            progress(len(index))
    if not (np.isfinite(effects).all() and np.isfinite(clean).all()):
        raise NonFiniteError(
            f"effects of components of {model.name} are NaN or infinite",
            "try `--dtype float32`; the checkpoint may also be damaged",
        )
    return Effects(parts, measure.by_item(effects), measure.by_item(clean), measure.clusters)


def _passes(
    measure: Measure, tokens: int
) -> Iterator[tuple[list[int], TokenBatch, Bool[Tensor, "row token"]]]:
    for index in measure.batch.passes(tokens=tokens):
        rows = measure.batch.rows(index)
        yield index, rows, measure.patched[index][:, : rows.ids.shape[1]]


def _row_sums(x: Tensor) -> Float[np.ndarray, " row"]:
    return x.double().sum((1, 2)).cpu().numpy()


def _back(model: Model, layer: int, gradient: Tensor) -> Float[Tensor, "row token d_heads"]:
    """A gradient of what attention writes, carried to what enters its output map."""
    return gradient @ model.head_weights(layer)[0].flatten(0, 1).to(gradient).T


def _gradients(
    model: Model, measure: Measure, rows: TokenBatch, sites: Sequence[Site]
) -> tuple[dict[Site, Tensor], Tensor, Outputs]:
    """Gradients by token of each row's score, in float32 or wider; scores; outputs on the way."""
    seen: dict[Site, Tensor] = {}

    def watch(x: Tensor, site: Site) -> Tensor:
        seen[site] = x if x.requires_grad else x.detach().clone().requires_grad_()
        return seen[site]

    with ExitStack() as undo:
        own = undo.enter_context(recording(model))
        states_of, head = undo.enter_context(model.differentiable())
        for site in sites:
            undo.callback(model.intercept(site, partial(watch, site=site)))
        scores = measure.score(states_of(rows), rows, head)
        found = torch.autograd.grad(scores.sum(), [seen[site] for site in sites])
    wide = torch.promote_types(model.dtype, torch.float32)
    return (
        {site: one.to(wide) for site, one in zip(sites, found, strict=True)},
        scores.detach().double().cpu(),
        own,
    )


# Real patching -----------------------------------------------------------------------------------


@torch.no_grad()
def patch(
    model: Model,
    measure: Measure,
    other: Other,
    parts: Sequence[Component],
    *,
    tokens_per_pass: int = _TOKENS,
    progress: Progress | None = None,
) -> Effects:
    """Really replace the output of one component after the other.

    Blocks in front of a patched component are computed once for all components.

    Args:
        model: The clean model, unedited.
        measure: On clean rows.
        other: What outputs are replaced with.
        parts: Which components.
        tokens_per_pass: Most tokens of a pass; results do not depend on it.
        progress: Called after each pass; its numbers add up to the number of components.

    Raises:
        FamilyError: A component is the embedding or a bias, or edits are in force.
        NonFiniteError: The measure became NaN or infinite.
    """
    wrong = next((one for one in parts if one.kind not in ("head", "attn", "mlp")), None)
    if wrong is not None:
        raise FamilyError(f"`{wrong.name}` is not patched", "patch heads, attention and MLPs")
    change = np.zeros((len(parts), len(measure.batch)))
    clean = np.zeros(len(measure.batch))
    rows_done = 0
    for index, rows, mask in _passes(measure, tokens_per_pass):
        memory = model.remember(rows)
        clean[index] = measure.score(model.final_states(rows), rows, model.unembed).cpu().numpy()
        replaced = other(rows)
        for i, part in enumerate(parts):
            with replacing(model, part, replaced, mask):
                states = model.final_states(rows, memory)
            scores = measure.score(states, rows, model.unembed).cpu().numpy()
            change[i, index] = scores - clean[index]
        if progress is not None:
            before, rows_done = rows_done, rows_done + len(index)
            n = len(measure.batch)
            progress(rows_done * len(parts) // n - before * len(parts) // n)
    if not np.isfinite(change).all():
        raise NonFiniteError(
            f"patching made the measure of {model.name} NaN or infinite",
            "try `--dtype float32`",
        )
    return Effects(tuple(parts), measure.by_item(change), measure.by_item(clean), measure.clusters)


@contextmanager
def replacing(
    model: Model, part: Component, replaced: Outputs, mask: Bool[Tensor, "row token"]
) -> Iterator[None]:
    """Inside, one component puts out what `replaced` holds, where `mask` says so."""
    assert part.layer is not None
    layer = part.layer
    where = mask.unsqueeze(2).to(model.device)
    own: dict[str, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        own["heads"] = x
        return x

    def write_of(source: Model, heads: Tensor) -> Tensor:
        weights = source.head_weights(layer)[0]
        assert part.head is not None
        apart = heads.reshape(*heads.shape[:2], model.n_heads, -1)[:, :, part.head]
        wide = torch.promote_types(apart.dtype, torch.float32)
        return apart.to(wide) @ weights[part.head].to(apart.device, wide)

    def swap_head(x: Tensor) -> Tensor:
        after = write_of(replaced.source, replaced.heads[layer])
        change = after - write_of(model, own["heads"])
        return torch.where(where, (x + change).to(x.dtype), x)

    def swap(x: Tensor) -> Tensor:
        held = replaced.mlp if part.kind == "mlp" else replaced.attn
        return torch.where(where, held[layer].to(x), x)

    with ExitStack() as undo:
        if part.kind == "head":
            undo.callback(model.intercept_heads(layer, keep))
            undo.callback(model.intercept(Site(layer, "attn_out"), swap_head))
        else:
            kind = "mlp_out" if part.kind == "mlp" else "attn_out"
            undo.callback(model.intercept(Site(layer, kind), swap))
        yield


@dataclass(frozen=True, slots=True, eq=False)
class Validation:
    """Components that were really patched.

    Attributes:
        top: Those with the largest estimates, the largest first.
        random: Some of the others.
        effects: Of both, in that order.
    """

    top: tuple[Component, ...]
    random: tuple[Component, ...]
    effects: Effects


def validate(
    model: Model,
    measure: Measure,
    other: Other,
    estimates: Effects,
    *,
    top: int = 10,
    random: int = 10,
    seed: int,
    progress: Progress | None = None,
) -> Validation:
    """Patch the components with the largest estimates, and as many drawn from the others.

    Args:
        model: As for `attribution_patching`.
        measure: Likewise.
        other: Likewise.
        estimates: What it returned.
        top: How many of the largest.
        random: How many of the others.
        seed: Of the draw.
        progress: Called after each pass; its numbers add up to the number of components.

    Raises:
        ConfigError: There are not so many components, or fewer than three are asked for.
    """
    n = len(estimates.components)
    if top + random > n or top < 1 or random < 1 or top + random < 3:
        raise ConfigError(
            f"{top} and {random} of {n} components cannot be patched",
            "ask for fewer; of both one or more, together three or more",
        )
    order = np.argsort(-np.abs(estimates.means), kind="stable")
    rng = np.random.default_rng(seed)
    drawn = rng.choice(order[top:], size=random, replace=False)
    first = tuple(estimates.components[i] for i in order[:top])
    others = tuple(estimates.components[i] for i in drawn)
    done = patch(model, measure, other, (*first, *others), progress=progress)
    return Validation(first, others, done)


def _validation_row(estimates: Effects, found: Validation, *, seed: int) -> ValidationRow:
    from scipy import stats

    place = {part: i for i, part in enumerate(estimates.components)}
    x = estimates.means[[place[part] for part in found.effects.components]]
    y = found.effects.means
    n = len(found.top)

    def spearman(index: Int[np.ndarray, " n"]) -> float:
        if np.ptp(x[index]) == 0 or np.ptp(y[index]) == 0:
            return float("nan")
        ranks = [stats.rankdata(one[index]) for one in (x, y)]
        return float(np.corrcoef(*ranks)[0, 1])

    def among(index: Int[np.ndarray, " n"]) -> float | None:
        value = spearman(index)
        return value if np.isfinite(value) else None

    def signs(part: slice) -> Estimate:
        same = np.sign(x[part]) == np.sign(y[part])
        return proportion(int(same.sum()), len(same))

    rank = bootstrap(spearman, len(x), draws=_DRAWS, seed=seed)
    right = signs(slice(0, n))
    size = float(x @ x)
    return ValidationRow(
        n,
        len(found.random),
        rank,
        among(np.arange(n)),
        among(np.arange(n, len(x))),
        right,
        signs(slice(n, None)),
        float(x @ y) / size if size > 0 else 0.0,
        rank.value >= _LEAST_CORRELATION and rank.low > 0 and right.value >= _LEAST_SIGNS,
    )


def table(
    measure: Measure,
    other: Other,
    estimates: Effects,
    validation: Validation | None = None,
    *,
    draws: int = _DRAWS,
    seed: int,
) -> PatchingRow:
    """Lay estimates and real effects out, with intervals over clusters of items.

    Raises:
        TooFewPromptsError: There are fewer than two clusters, or the rank correlation is undefined,
            since nothing that was patched did anything.
    """
    estimated = estimates.estimates(draws=draws, seed=seed)
    real: dict[Component, Estimate] = {}
    if validation is not None:
        real = validation.effects.estimates(draws=draws, seed=seed)
    rows = tuple(
        PatchRow(part.name, part.layer, part.kind, part.head, one, real.get(part))
        for part, one in estimated.items()
    )
    return PatchingRow(
        measure.name,
        measure.unit,
        other.name,
        len(measure.clusters),
        grouped_mean(estimates.clean, measure.clusters, seed=seed, draws=draws),
        rows,
        None if validation is None else _validation_row(estimates, validation, seed=seed),
    )

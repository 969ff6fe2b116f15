"""Where a conversation stands along a direction, token by token and site by site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from demur.activations import reading
from demur.anchor import Anchor, Holding
from demur.directions import Direction
from demur.errors import NonFiniteError
from demur.interventions import Intervention
from demur.models import Chunk, Model, TokenBatch
from demur.models.decoding import buffers
from demur.serve.edits import Edit
from demur.serve.engine import GateState
from demur.serve.layout import roomy, widened
from demur.sites import Span

Null = Literal["covariance", "isotropic"]
SpanName = Literal["template", "earlier", "instruction", "post_instruction", "response"]
_SPANS: tuple[tuple[Span, SpanName], ...] = (
    (Span.EARLIER, "earlier"),
    (Span.INSTRUCTION, "instruction"),
    (Span.POST_INSTRUCTION, "post_instruction"),
    (Span.RESPONSE, "response"),
)
_NULLS = 200


@dataclass(frozen=True, slots=True, eq=False)
class Traced:
    """Projections on a direction.

    Attributes:
        spans: Of each token.
        t_inst: Which token is the last of the instruction.
        sites: Names of the sites, from the embedding up.
        values: In residual-stream units.
        gate: Of the anchor, if one acted; a reply that was given goes on where a served one would
            be begun anew.
        low: By site, the 5th percentile of what random directions of norm 1 give on the same
            tokens; `high` the 95th.
    """

    spans: tuple[SpanName, ...]
    t_inst: int
    sites: tuple[str, ...]
    values: Float[Tensor, "site token"]
    gate: GateState
    low: Float[Tensor, " site"]
    high: Float[Tensor, " site"]


def trace(
    model: Model,
    batch: TokenBatch,
    direction: Direction,
    *,
    edits: Sequence[Edit] = (),
    anchor: Anchor | None = None,
    null: Null = "covariance",
    seed: int = 0,
) -> Traced:
    """Project the stream of one row on a direction, at every block boundary, as edits leave it.

    Args:
        model: The model.
        batch: One row.
        direction: Of the model's width.
        edits: In force while the row is read.
        anchor: Acts too, behind the edits. Then a reply is read token by token, as one is written.
        null: How random directions are drawn: like the row's own variation around its mean, or
            alike in all directions.
        seed: Of the draws.

    Raises:
        NonFiniteError: Activations hold NaN or infinity.
    """
    sites = model.stream_sites
    held: Holding | None = None
    narrow = batch
    front = _in_front(model, batch, anchored=anchor is not None)
    batch = widened(batch, front, pad_id=model.pad_id)
    with ExitStack() as undo:
        for edit in edits:
            for site, act in edit.acts(model):
                undo.callback(model.intercept(site, partial(_edited, model, act, edit.span)))
        if anchor is not None:
            held = undo.enter_context(anchor.holding(model))
        read = undo.enter_context(reading(model, sites))  # Set last: as all others leave it.
        if held is None:
            model.final_states(batch)
            parts = [torch.stack([read[site][0].double().cpu() for site in sites])]
        else:
            parts = [
                torch.stack([read[site][0].double().cpu() for site in sites])
                for _ in _as_written(model, batch, held)
            ]
        gate = GateState.of(held)
    rows, batch = torch.cat(parts, dim=1)[:, front:], narrow
    if not bool(torch.isfinite(rows).all()):
        raise NonFiniteError(
            "activations hold NaN or infinity",
            "try `--dtype float32`; the checkpoint may also be damaged",
        )
    unit = torch.nn.functional.normalize(direction.unit.double(), dim=0)
    low, high = _band(rows, null, seed)
    spans: list[SpanName] = ["template"] * batch.ids.shape[1]
    for span, name in _SPANS:
        if span in batch.spans:
            for at in batch.spans[span][0].nonzero().flatten().tolist():
                spans[at] = name
    last = int(batch.spans[Span.INSTRUCTION][0].nonzero().max())
    return Traced(tuple(spans), last, tuple(map(str, sites)), rows @ unit, gate, low, high)


def _in_front(model: Model, batch: TokenBatch, *, anchored: bool) -> int:
    """Columns of padding that make what is read at once as long as what others read."""
    width = batch.ids.shape[1]
    if anchored:
        width = int(batch.spans[Span.POST_INSTRUCTION][0].int().argmax())
    return roomy(model, width) - width


def _as_written(model: Model, batch: TokenBatch, held: Holding) -> Iterator[None]:
    """Read a row as it is served: instruction, template, and each token of the reply."""
    assert model.template is not None
    cache: Any = buffers()
    header = torch.tensor([model.template.post_ids])
    post = int(batch.spans[Span.POST_INSTRUCTION][0].int().argmax())
    width = batch.ids.shape[1]
    reply = post + model.template.n_post
    for low, high in pairwise([0, post, *range(reply, width + 1)]):
        token, every = low - reply, held.header_every
        if every is not None and token >= 0 and token % every == every - 1:
            ids = torch.cat([batch.ids[:, low:high], header], dim=1)
            mask = torch.nn.functional.pad(batch.mask[:, :high], (0, header.shape[1]), value=True)
            spans = {Span.POST_INSTRUCTION: torch.ones(ids.shape, dtype=torch.bool)}
            chunk = _chunk(spans, ids.shape[1], is_peek=True)
            model.extend(ids, mask, chunk, cache)
            for layer in cache.layers:
                layer.drop(ids.shape[1])
        spans = {name: span[:, low:high] for name, span in batch.spans.items()}
        chunk = _chunk(spans, high - low)
        model.extend(batch.ids[:, low:high], batch.mask[:, :high], chunk, cache)
        yield


def _chunk(spans: dict[Span, Tensor], width: int, *, is_peek: bool = False) -> Chunk:
    row = torch.zeros(1, dtype=torch.long)
    return Chunk(spans, row + width, row, is_prefix=False, is_peek=is_peek)


def _edited(model: Model, act: Intervention, span: Span | None, x: Tensor) -> Tensor:
    changed = act(x)
    if span is None or model.chunk is None:
        return changed
    mask = model.chunk.spans.get(span)
    if mask is None:
        return x
    return torch.where(mask.to(x.device).unsqueeze(-1), changed, x)


def _band(
    rows: Float[Tensor, "site token d_model"], null: Null, seed: int
) -> tuple[Float[Tensor, " site"], Float[Tensor, " site"]]:
    rng = torch.Generator().manual_seed(seed)
    shape = (rows.shape[2], _NULLS) if null == "isotropic" else (rows.shape[1], _NULLS)
    drawn = torch.randn(shape, generator=rng, dtype=torch.float64)
    if null == "covariance":
        # A first token that takes all attention is huge, and would be all of the variation.
        own = rows[:, 1:] if rows.shape[1] > 2 else rows
        centred = own - own.mean(1, keepdim=True)
        ways = centred.transpose(1, 2) @ drawn[: own.shape[1]]
    else:
        ways = drawn.expand(len(rows), -1, -1)
    ways = torch.nn.functional.normalize(ways, dim=1)
    values = (rows @ ways).flatten(1)
    at = torch.tensor([0.05, 0.95], dtype=torch.float64)
    # `quantile` takes no more than 16 million values; a long row is thinned.
    step = max(1, values.shape[1] // 1_000_000)
    low, high = torch.quantile(values[:, ::step], at, dim=1)
    return low, high

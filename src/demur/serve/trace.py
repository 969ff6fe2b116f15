"""Where a conversation stands along a direction, token by token and site by site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from demur.activations import reading
from demur.directions import Direction
from demur.errors import NonFiniteError
from demur.interventions import Intervention
from demur.models import Model, TokenBatch
from demur.serve.edits import Edit
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
        low: By site, the 5th percentile of what random directions of norm 1 give on the same
            tokens; `high` the 95th.
    """

    spans: tuple[SpanName, ...]
    t_inst: int
    sites: tuple[str, ...]
    values: Float[Tensor, "site token"]
    low: Float[Tensor, " site"]
    high: Float[Tensor, " site"]


def trace(
    model: Model,
    batch: TokenBatch,
    direction: Direction,
    *,
    edits: Sequence[Edit] = (),
    null: Null = "covariance",
    seed: int = 0,
) -> Traced:
    """Project the stream of one row on a direction, at every block boundary, under edits.

    Args:
        model: The model.
        batch: One row.
        direction: Of the model's width.
        edits: In force while the row is read.
        null: How random directions are drawn: like the row's own variation around its mean, or
            alike in all directions.
        seed: Of the draws.

    Raises:
        NonFiniteError: Activations hold NaN or infinity.
    """
    sites = model.stream_sites
    undo = []
    try:
        for edit in edits:
            for site, act in edit.acts(model):
                undo.append(model.intercept(site, partial(_edited, model, act, edit.span)))
        with reading(model, sites) as held:
            model.final_states(batch)
    finally:
        for one in undo:
            one()
    rows = torch.stack([held[site][0].double().cpu() for site in sites])
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
    return Traced(tuple(spans), last, tuple(map(str, sites)), rows @ unit, low, high)


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

"""What the others do, written for this benchmark: whole logits, left padding, a pass per question.

`hidden_states` is how most notebooks read activations. `Sweep` follows the published pipeline of
Arditi et al. 2024 (arXiv:2406.11717, appendix C): for every candidate three full passes over padded
prompts, logits of all positions in float64, hooks on the input of each block and on the output of
both its modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from demur.directions import Direction
from demur.models import Model, TokenBatch


def padded(model: Model, prompts: Sequence[str], size: int) -> list[TokenBatch]:
    """Batches in the order given, padded on the left."""
    rows = model.encode(prompts)
    return [rows.rows(slice(at, at + size)).left_padded() for at in range(0, len(rows), size)]


@torch.no_grad()
def hidden_states(
    model: Model, prompts: Sequence[str], positions: Sequence[int], size: int = 16
) -> Tensor:
    """Mean over prompts of the stream at every layer and position, (layer, position, d_model)."""
    total: Tensor | None = None
    for batch in padded(model, prompts, size):
        out = model.hf(
            input_ids=batch.ids.to(model.device),
            attention_mask=batch.mask.long().to(model.device),
            output_hidden_states=True,
        )
        rows = torch.stack([layer[:, list(positions)] for layer in out.hidden_states])
        part = rows.double().sum(1)
        total = part if total is None else total + part
    assert total is not None
    return total / len(prompts)


class Sweep:
    """Bypass, induce and KL of candidates as the published pipeline computes them."""

    def __init__(
        self,
        model: Model,
        harmful: Sequence[str],
        harmless: Sequence[str],
        tokens: Sequence[int],
        size: int = 32,
    ) -> None:
        self.model, self.tokens = model, list(tokens)
        self.harmful, self.harmless = (
            padded(model, prompts, size) for prompts in (harmful, harmless)
        )
        self.plain = self._logits(self.harmless)

    @torch.no_grad()
    def _logits(self, batches: Sequence[TokenBatch]) -> Tensor:
        parts = []
        for batch in batches:
            device = self.model.device
            out = self.model.hf(
                input_ids=batch.ids.to(device), attention_mask=batch.mask.long().to(device)
            )
            parts.append(out.logits.double()[:, -1])
        return torch.cat(parts)

    def _score(self, logits: Tensor) -> Tensor:
        chance = logits.softmax(-1)[:, self.tokens].sum(-1)
        return torch.log(chance + 1e-8) - torch.log(1 - chance + 1e-8)

    def __call__(self, direction: Direction) -> tuple[Tensor, Tensor, Tensor]:
        """Refusal scores under ablation and addition, and KL, each per prompt."""
        with self._ablated(direction):
            ablated = self._logits(self.harmless)
        log_p, log_q = self.plain.log_softmax(-1), ablated.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        with self._ablated(direction):
            bypass = self._score(self._logits(self.harmful))
        with self._added(direction):
            induce = self._score(self._logits(self.harmless))
        return bypass, induce, kl

    @contextmanager
    def _ablated(self, direction: Direction) -> Iterator[None]:
        unit = direction.unit.to(self.model.dtype)

        def edit(x: Tensor) -> Tensor:
            return x - (x @ unit).unsqueeze(-1) * unit

        handles = []
        family = self.model.family
        for block in self.model.blocks:
            handles.append(block.register_forward_pre_hook(_before(edit), with_kwargs=True))
            for path in (family.attn_out, family.mlp_out):
                handles.append(block.get_submodule(path).register_forward_hook(_after(edit)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _added(self, direction: Direction) -> Iterator[None]:
        vector = (direction.unit * direction.norm).to(self.model.dtype)
        block = self.model.blocks[direction.site.layer]
        handle = block.register_forward_pre_hook(_before(lambda x: x + vector), with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _before(edit: Callable[[Tensor], Tensor]) -> Callable[..., object]:
    def hook(_module: object, args: tuple, kwargs: dict) -> object:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    return hook


def _after(edit: Callable[[Tensor], Tensor]) -> Callable[..., object]:
    def hook(_module: object, _args: object, output: object) -> object:
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        assert isinstance(output, Tensor)
        return edit(output)

    return hook

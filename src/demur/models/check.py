"""Proof by numbers that a family's row fits a checkpoint, and that running it is sound.

Each identity holds for every causal language model whose family names the right tensors. A wrong
name fails at once and by far: the numbers are there to be looked at, not only to pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import GenerationConfig

from demur.errors import DemurError, SilentEditError
from demur.models.families import FAMILIES, Family
from demur.models.model import Model
from demur.models.tokens import TokenBatch
from demur.sites import Site, Span

# Of unlike lengths, so that rows are padded, and harmless, so that they can be shown.
PROMPTS = (
    "Name a tree that keeps its leaves in winter.",
    "How long should I boil an egg?",
    "Write one sentence about the sea, and then one more about the mountains behind it.",
)
_NEW_TOKENS = 8
_ROWS = 32


@dataclass(frozen=True, slots=True)
class CheckRow:
    """One identity and how far the model is from it.

    Attributes:
        name: Short name.
        shows: What it proves, in plain words.
        value: Mostly a relative error, 0 being exact; `at_least` turns it round.
        tolerance: What the model's data type leaves room for.
        at_least: Whether `value` has to reach `tolerance`, not to stay below.
        note: Why there is no value, when computing it raised an error.
    """

    name: str
    shows: str
    value: float
    tolerance: float
    at_least: bool = False
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the value is on the right side; NaN is on neither."""
        if self.at_least:
            return self.value >= self.tolerance
        return self.value <= self.tolerance


@dataclass(frozen=True, slots=True)
class CheckReport:
    """All identities of one model."""

    model: str
    family: str
    rows: tuple[CheckRow, ...]

    @property
    def passed(self) -> bool:
        """Whether every row passed."""
        return all(row.passed for row in self.rows)

    def __getitem__(self, name: str) -> CheckRow:
        return next(row for row in self.rows if row.name == name)


@dataclass(frozen=True, slots=True)
class _Tolerance:
    """Room that a data type needs.

    Attributes:
        exact: For sums of the same numbers in another order.
        forward: For two passes that differ in shape; norms and softmax run in float32 at most.
    """

    exact: float
    forward: float


_TOLERANCES = {
    torch.float64: _Tolerance(1e-12, 1e-6),
    torch.float32: _Tolerance(1e-5, 1e-4),
    torch.float16: _Tolerance(1e-2, 2e-2),
    torch.bfloat16: _Tolerance(5e-2, 1e-1),
}


def check(model: Model, prompts: Sequence[str] | None = None) -> CheckReport:
    """Measure every identity on a few prompts; a row that fails is a result, not an error.

    Args:
        model: With no edits in force.
        prompts: Two or more of unlike lengths; None takes three harmless ones.

    Raises:
        TemplateError: A prompt cannot be encoded.
    """
    texts = list(PROMPTS if prompts is None else prompts)
    batch = model.encode(texts)
    room = _TOLERANCES[model.dtype]
    together = cache(lambda: model.logits(batch))  # Passes cost; several rows need these.
    alone = cache(lambda: torch.cat([model.logits(row) for row in _singles(batch)]))
    measures: tuple[tuple[str, str, float, Callable[[], float]], ...] = (
        (
            "sum of writes",
            "block 0's input plus everything the blocks write is the last block's output, so the "
            "family names what is added to the stream",
            room.exact,
            lambda: _sum_of_writes(model, batch),
        ),
        (
            "block boundaries",
            "what leaves a block is what enters the next, so layer numbers mean one thing",
            0.0,
            lambda: _boundaries(model, batch),
        ),
        (
            "nothing left",
            "after a direction is taken out of every write, no block's output has any of it",
            room.exact,
            lambda: _left_after_ablation(model, batch),
        ),
        (
            "batch = single",
            "a prompt's logits do not depend on the prompts beside it",
            room.forward,
            lambda: _apart(together(), alone()),
        ),
        (
            "left = right padding",
            "a prompt's logits do not depend on the side that is padded",
            room.forward,
            lambda: _apart(together(), model.logits(batch.left_padded())),
        ),
        (
            "shared prefix",
            "computing the template's first tokens once for all rows changes nothing",
            room.forward,
            lambda: _apart(together(), _whole_rows(model, batch)),
        ),
        (
            "head",
            "our logits are those of the Hugging Face model",
            room.forward,
            lambda: _apart(_wide(alone()), _of_hf(model, batch)),
        ),
        (
            "greedy decoding",
            "replies generated in a batch are those that Hugging Face generates one by one; the "
            "share of replies that differ",
            0.0 if model.dtype in {torch.float32, torch.float64} else 0.5,  # Ties fall either way.
            lambda: _against_hf_greedy(model, texts, batch),
        ),
    )
    rows = [_row(*measure) for measure in measures]
    # Below that, an edit of the size of the stream is lost in rounding.
    moved = "an edit at any site moves the logits; the smallest relative change"
    rows.insert(3, _row("every site", moved, 1e-4, lambda: _least_moved(model, batch), True))
    if model.template is not None:
        count = float(model.template.count_bos())
        shows = "a prompt has at most one beginning-of-sequence token; how many it has"
        rows.append(CheckRow("one BOS", shows, count, 1.0))
    return CheckReport(model.name, model.family.name, tuple(rows))


def _row(
    name: str, shows: str, tolerance: float, measure: Callable[[], float], at_least: bool = False
) -> CheckRow:
    try:
        return CheckRow(name, shows, measure(), tolerance, at_least)
    except DemurError as error:
        return CheckRow(name, shows, float("nan"), tolerance, at_least, note=error.fact)


def _singles(batch: TokenBatch) -> list[TokenBatch]:
    return [batch.rows([i]) for i in range(len(batch))]


def _wide(x: Tensor) -> Tensor:
    return x.to("cpu", torch.promote_types(x.dtype, torch.float32))


def _apart(a: Tensor, b: Tensor) -> float:
    """Largest relative distance between rows; logits have no zero, so their mean is taken off."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


def _read(model: Model, batch: TokenBatch, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """The tensors at `sites`, real tokens only, one row each."""
    held: dict[Site, Tensor] = {}

    def keep(x: Tensor, site: Site) -> Tensor:
        held[site] = _wide(x.detach())[batch.mask]
        return x

    with ExitStack() as undo:
        undo.enter_context(model.whole_rows())
        for site in sites:
            undo.callback(model.intercept(site, lambda x, site=site: keep(x, site)))
        model.final_states(batch)
    return held


def _sum_of_writes(model: Model, batch: TokenBatch) -> float:
    last = Site(model.n_layers - 1, "resid_post")
    held = _read(model, batch, (*model.write_sites, last))
    total = torch.stack([held[site] for site in model.write_sites]).sum(0)
    return float(((total - held[last]).norm(dim=-1) / held[last].norm(dim=-1)).max())


def _boundaries(model: Model, batch: TokenBatch) -> float:
    inner = range(model.n_layers - 1)
    pairs = [(Site(i, "resid_post"), Site(i + 1, "resid_pre")) for i in inner]
    held = _read(model, batch, [site for pair in pairs for site in pair])
    errors = [((held[a] - held[b]).norm() / held[b].norm()).item() for a, b in pairs]
    return max(errors, default=0.0)


def _direction(model: Model) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(
        torch.randn(model.d_model, generator=rng, dtype=torch.float64), dim=0
    )


def _left_after_ablation(model: Model, batch: TokenBatch) -> float:
    unit = _direction(model)

    def ablate(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        along = unit.to(wide)
        return (wide - (wide @ along).unsqueeze(-1) * along).to(x.dtype)

    blocks = [Site(layer, "resid_post") for layer in range(model.n_layers)]
    with ExitStack() as undo:
        for site in model.write_sites:
            undo.callback(model.intercept(site, ablate))
        held = _read(model, batch, blocks)
    cosines = [(x @ unit.to(x)).abs() / x.norm(dim=-1) for x in held.values()]
    return float(torch.stack(cosines).max())


def _least_moved(model: Model, batch: TokenBatch) -> float:
    """Edit another site in each row of one batch of equal rows: one pass for many sites."""
    start_of_prompt = batch.ids[:1, :8]  # A row more costs as much as a prompt: few tokens do.
    sites = [*model.write_sites, *model.stream_sites]
    sites += [Site(layer, "resid_post") for layer in range(model.n_layers - 1)]
    sites = list(dict.fromkeys(sites))
    least = float("inf")
    for start in range(0, len(sites), _ROWS):
        some = sites[start : start + _ROWS]
        # Row 0 is not edited, and in the same batch as the others, so that nothing else differs.
        rows = start_of_prompt.expand(len(some) + 1, -1)

        def push(x: Tensor, row: int) -> Tensor:
            out = x.clone()
            along = _direction(model).to(x)
            out[row] += x[row].norm(dim=-1, keepdim=True).clamp(min=1.0) * along
            return out

        with ExitStack() as undo:
            for row, site in enumerate(some, start=1):
                undo.callback(model.intercept(site, lambda x, row=row, push=push: push(x, row)))
            try:
                logits = model.logits(rows)
            except SilentEditError:  # A site that no pass reaches moves nothing.
                return 0.0
        logits = logits - logits.mean(-1, keepdim=True)
        change = (logits[1:] - logits[0]).norm(dim=-1) / logits[0].norm()
        least = min(least, float(change.min()))
    return least


def _whole_rows(model: Model, batch: TokenBatch) -> Tensor:
    with model.whole_rows():
        return model.logits(batch)


@torch.no_grad()
def _of_hf(model: Model, batch: TokenBatch) -> Tensor:
    rows = [row.ids.to(model.device) for row in _singles(batch)]
    return torch.cat([_wide(model.hf(input_ids=ids).logits[:, -1]) for ids in rows])


def _against_hf_greedy(model: Model, texts: Sequence[str], batch: TokenBatch) -> float:
    config = GenerationConfig(
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        eos_token_id=model.stop_ids or None,
        pad_token_id=model.pad_id,
    )
    ours = model.generate(texts, max_new_tokens=_NEW_TOKENS)
    wrong = 0
    for row, reply in zip(_singles(batch), ours, strict=True):
        ids = row.ids.to(model.device)
        out = model.hf.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
        )[0, ids.shape[1] :].tolist()
        theirs = out[: next((i for i, t in enumerate(out) if t in model.stop_ids), len(out))]
        wrong += tuple(theirs) != reply.ids
    return wrong / len(ours)


# What a person looks at --------------------------------------------------------------------------


def token_rows(model: Model, prompt: str) -> list[tuple[str, str]]:
    """Every token of a prompt as text, with its role.

    Returns:
        Pairs of text and role: `template` in front of the user's words, `instruction`, `t_inst` for
        the last of them, `post` for the template behind.

    Raises:
        TemplateError: The prompt cannot be encoded.
    """
    batch = model.encode([prompt])
    assert model.template is not None  # `encode` has raised otherwise.
    ids = batch.ids[0].tolist()
    roles = ["template"] * len(ids)
    for i in batch.spans[Span.INSTRUCTION][0].nonzero().flatten().tolist():
        roles[i] = "instruction"
    for i in batch.spans[Span.POST_INSTRUCTION][0].nonzero().flatten().tolist():
        roles[i] = "post"
    roles[len(ids) - model.template.n_post - 1] = "t_inst"
    decode = model.template.tokenizer.decode
    return [(decode([token]), role) for token, role in zip(ids, roles, strict=True)]


def list_families() -> tuple[Family, ...]:
    """All families, by name."""
    return tuple(FAMILIES[name] for name in sorted(FAMILIES))

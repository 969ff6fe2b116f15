"""demur's own quick suite: what an intervention changes in ability and refusal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from demur.anchor import Anchor
from demur.causal import NeutralText, stable_seed
from demur.errors import ConfigError
from demur.evals.judges import Exchange, Judge, Outcome, judges, verdicts_of
from demur.evals.likelihood import applying
from demur.evals.rows import Delta, EvaluationRecord, ItemRow
from demur.evals.suites import ChoiceItem, Paired, choose, deltas_of, paired_choices
from demur.interventions import Holder, Intervention, applied
from demur.models import Model
from demur.pipeline.battery import HARMFUL
from demur.pipeline.splits import neutral_paragraphs
from demur.progress import Listener, Progress, Quiet
from demur.prompts import deduplicate
from demur.prompts import load as load_prompts
from demur.selection import Passes, kl_divergence
from demur.stats import Estimate, mean

HARMLESS = "refusal_extra?label=harmless&kind=plain"
LOOKALIKE = "refusal_extra?label=harmless&kind=lookalike"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an intervention changes.

    Attributes:
        record: The deltas.
        items: Item by item; of replies only what the judge made of them.
    """

    record: EvaluationRecord
    items: tuple[ItemRow, ...]


def quick(
    model: Model,
    *,
    acts: Sequence[Intervention] = (),
    anchor: Anchor | None = None,
    items: Sequence[ChoiceItem] = (),
    harmful: str = HARMFUL,
    harmless: str = HARMLESS,
    lookalike: str = LOOKALIKE,
    requests: int = 40,
    limit: int | None = None,
    paragraphs: int = 24,
    judge: Judge | None = None,
    max_new_tokens: int = 48,
    batch_size: int = 32,
    seed: int = 0,
    edits: Sequence[str] | None = None,
    anchor_file: str | None = None,
    borrowed: Sequence[str] = (),
    listener: Listener | None = None,
) -> Evaluation:
    """Measure divergence, perplexity, multiple choice, refusal and over-refusal, plain and edited.

    Args:
        model: The model.
        acts: Edits, in order.
        anchor: Holds the model behind them.
        items: Of `demur.evals.suites.read_items`; without any, choices are left out.
        harmful: Requests that ought to be refused, as `demur.prompts.load` takes them.
        harmless: Requests that nobody refuses; divergence is measured on them, too.
        lookalike: Harmless requests that sound harmful.
        requests: So many of each set.
        limit: Items at most, from the first on.
        paragraphs: Of neutral text, for perplexity.
        judge: Says what became of a request; None is the pattern judge.
        max_new_tokens: Replies are cut there.
        batch_size: Most rows that are decoded together.
        seed: Of draws.
        edits: What the edits are called in the record.
        anchor_file: What the anchor is called in the record.
        borrowed: What the record says of edits or an anchor of another model.
        listener: Hears the progress.

    Raises:
        ConfigError: There is nothing to apply.
        SilentEditError: An edit was never reached, or the gate has not read every prompt.
        TooFewPromptsError: A set is empty.
    """
    if not acts and anchor is None:
        raise ConfigError("there is nothing to compare with", "give an edit or an anchor")
    listener = listener or Quiet()
    judge = judge or judges.make("patterns")
    held: tuple[Intervention | Holder, ...] = (*acts, *(() if anchor is None else (anchor,)))
    notes: list[str] = list(borrowed)
    seconds: dict[str, float] = {}
    sets = {
        "harmful": _texts(harmful, requests, seed),
        "harmless": _texts(harmless, requests, seed),
        "lookalike": _texts(lookalike, requests, seed),
    }
    deltas: list[Delta] = []
    with _timed(seconds, "divergence"), listener.stage("divergence", 2) as advance:
        divergence = _divergence(model, sets["harmless"], held, advance)
        deltas.append(_bare("harmless", "KL, next token", "divergence", "nats", divergence))
    with _timed(seconds, "perplexity"), listener.stage("perplexity", 2) as advance:
        forced = _forced(acts, anchor, notes)
        if forced is not None:
            neutral = NeutralText(model, neutral_paragraphs(paragraphs))
            advance(1)
            name = "perplexity" if anchor is None else "perplexity, gate forced open"
            deltas.append(
                _bare("neutral text", name, "ratio", "edited / plain", neutral.ratio(*forced))
            )
        advance(1)
    paired: list[Paired] = []
    own = list(items if limit is None else items[:limit])
    if own and anchor is not None and anchor.action == "canned":
        notes.append("choices are left out: under a given reply no other one has a likelihood")
        own = []
    if own:
        total = 2 * sum(len(item.choices) for item in own)
        with _timed(seconds, "choices"), listener.stage("choices", total) as advance:
            with applying(model, cut=anchor is not None) as inside:
                plain = choose(inside, own, progress=advance)
            with applying(model, held) as inside:
                edited = choose(inside, own, progress=advance)
        paired += paired_choices(own, plain, edited)
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    total = 2 * sum(map(len, sets.values()))
    with _timed(seconds, "replies"), listener.stage("replies", total) as advance:
        before, after = (
            _replies(model, one, sets, advance, how, cut=anchor is not None) for one in ((), held)
        )
    for name, texts in sets.items():
        paired.append(_refused(name, texts, before[name], after[name], judge))
    found, rows = deltas_of(paired, notes)
    assert model.template is not None
    record = EvaluationRecord(
        demur=version("demur"),
        suite="quick",
        model=model.name,
        adapter=model.adapter,
        fingerprint=model.fingerprint,
        dtype=str(model.dtype).removeprefix("torch."),
        template_hash=model.template.hash,
        edits=tuple(edits if edits is not None else [type(act).__name__ for act in acts]),
        anchor=anchor_file if anchor_file is not None or anchor is None else "in memory",
        chat=True,
        limit=limit,
        seed=seed,
        deltas=(*deltas, *found),
        seconds=seconds,
        notes=tuple(notes),
    )
    return Evaluation(record, tuple(rows))


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - began, 2)


def _texts(spec: str, n: int, seed: int) -> tuple[str, ...]:
    prompts, _ = deduplicate(load_prompts(spec))
    return tuple(prompts.take(min(n, len(prompts)), stable_seed(seed, spec)).texts)


def _bare(task: str, metric: str, kind: Any, unit: str, change: Any) -> Delta:
    return Delta(
        task=task, metric=metric, kind=kind, unit=unit, plain=None, edited=None, change=change
    )


def _forced(
    acts: Sequence[Intervention], anchor: Anchor | None, notes: list[str]
) -> tuple[Intervention | Holder, ...] | None:
    """What acts on plain text, which no gate reads: a floor as if its gate were open."""
    if anchor is None:
        return tuple(acts)
    if anchor.action == "floor":
        return (*acts, replace(anchor, gate=None))
    notes.append("perplexity is left out: a canned reply does nothing to plain text")
    return None


def _divergence(
    model: Model,
    texts: Sequence[str],
    held: Sequence[Intervention | Holder],
    advance: Progress,
) -> Estimate:
    """KL of the next token, plain against edited, nats."""
    # An anchor cuts prompts in two: the plain run is cut alike, so that noise is no change.
    with model.in_two():
        batch = model.encode(list(texts))
        before = Passes(model, batch).logits()
        advance(1)
        with applied(model, *held):
            after = Passes(model, batch).logits()
        advance(1)
    return mean(kl_divergence(before, after).numpy())


_Said = list[tuple[str, bool | None]]


def _replies(
    model: Model,
    held: Sequence[Intervention | Holder],
    sets: Mapping[str, Sequence[str]],
    advance: Progress,
    how: Mapping[str, Any],
    *,
    cut: bool,
) -> dict[str, _Said]:
    """Replies to each set, and whether the gate of an anchor opened."""
    said: dict[str, _Said] = {}
    with applying(model, held, likelihood=False, cut=cut) as inside:
        for name, texts in sets.items():
            replies = model.generate(list(texts), progress=advance, **how)
            opened = inside.openings(len(texts))
            said[name] = [(r.text, o) for r, o in zip(replies, opened, strict=True)]
    return said


def _refused(name: str, texts: Sequence[str], before: _Said, after: _Said, judge: Judge) -> Paired:
    """Whether each request was refused; None where the judge could not tell."""
    sides = []
    for said in (before, after):
        verdicts = verdicts_of(
            judge, [Exchange(p, reply) for p, (reply, _) in zip(texts, said, strict=True)]
        )
        sides.append(
            [
                None if one.outcome is Outcome.UNPARSED else float(one.outcome is Outcome.REFUSED)
                for one in verdicts
            ]
        )
    numbers = [str(i + 1) for i in range(len(texts))]
    return Paired(name, "refused", numbers, sides[0], sides[1], [opened for _, opened in after])

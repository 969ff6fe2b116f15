"""Contrasts read on a model: what carries refusal, harm, and bad advice, where all can be compared.

Refusal is read where prompts end and bad advice where answers are, so a raw cosine of the two
confounds what is read with where. Hence every contrast is read at both kinds of place:

=========  ====================================  ===============================================
name       at the prompt's end                   over an answer's tokens
=========  ====================================  ===============================================
refusal    harmful - harmless prompts, at the    refusing - complying replies to the same
           last token                            harmful prompts
harm       harmful - harmless prompts, at        harmful - harmless prompts, over the same
           `t_inst`                              complying replies
em text    none: a prompt has no answer          bad - good answers to the same questions
em shift   organism - base, on the same prompts  organism - base, on the same bad answers
=========  ====================================  ===============================================

References:
    Arditi et al. 2024, arXiv:2406.11717 (refusal); Zhao et al. 2025, arXiv:2507.11878 (harm);
    Soligo, Turner et al. 2025, arXiv:2506.11618 (em text and em shift).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources

import torch
from jaxtyping import Float
from torch import Tensor

from demur.activations import collect
from demur.compare.contrasts import ANSWER, Contrast
from demur.em.advice import AdviceItem
from demur.em.directions import AnswerMeans, AnswerPair, read_answers
from demur.errors import TemplateError, TooFewPromptsError
from demur.models import Model
from demur.progress import Progress
from demur.prompts import PromptSet, families
from demur.sites import Site

Grid = Mapping[tuple[Site, int], Contrast]
"""Contrasts by site and position."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The prompts that a comparison reads, and what is drawn together.

    Attributes:
        harmful: Requests.
        harmless: Requests.
        clusters: Family of each of either side; harmful and harmless ones may share one.
        refusing: A refusal for each harmful request, of several wordings.
        complying: A generic beginning of help for each of both sides, harmful ones first.
    """

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    clusters: tuple[tuple[int, ...], tuple[int, ...]]
    refusing: tuple[str, ...]
    complying: tuple[str, ...]


def asked(harmful: PromptSet, harmless: PromptSet) -> Asked:
    """Prompts with their families, and the texts that stand for replies.

    No reply is a model's own: refusals are those that the shipped adapter learns, beginnings of
    help are generic and say nothing of the request.

    Raises:
        TooFewPromptsError: A side has fewer than eight prompts.
    """
    n, m = len(harmful), len(harmless)
    if min(n, m) < 8:
        raise TooFewPromptsError(f"got {n} and {m} prompts", "give each class eight or more")
    both = replace(harmful, prompts=(*harmful.prompts, *harmless.prompts))
    found = families(both)
    refusals = _texts("refusal_replies.jsonl")
    helps = [
        row["text"]
        for row in _rows("hardening/openers.jsonl")
        if row.get("kind") == "start" and len(str(row["text"]).split()) >= 6
    ]
    return Asked(
        tuple(harmful.texts),
        tuple(harmless.texts),
        (tuple(found[:n]), tuple(found[n:])),
        tuple(refusals[i % len(refusals)] for i in range(n)),
        tuple(helps[i % len(helps)] for i in (*range(n), *range(m))),
    )


@cache
def _rows(name: str) -> tuple[dict[str, str], ...]:
    text = resources.files("demur").joinpath(f"data/{name}").read_text("utf-8")
    return tuple(json.loads(line) for line in text.splitlines() if line.strip())


def _texts(name: str) -> list[str]:
    return [row["text"] for row in _rows(name)]


def t_inst(model: Model) -> int:
    """Position of the instruction's last token, counted from the end of the prompt.

    Raises:
        TemplateError: The model was made without a tokenizer.
    """
    if model.template is None:
        raise TemplateError(
            f"{model.name} was made without a tokenizer", "load it with `demur.load`"
        )
    return next(p.index for p in model.template.positions if p.role == "t_inst")


@dataclass(frozen=True, slots=True, eq=False)
class PromptRows:
    """Activations at the end of both classes of prompts, and over replies to them.

    Attributes:
        values: At the prompt's end; harmful prompts first.
        positions: `t_inst` and -1.
        refusing: Means over a refusal's tokens, harmful prompts.
        complying: Means over the tokens of a beginning of help, harmful prompts first.
        sites: The tensors read.
        model: Fingerprint of the model.
        name: Of the model.
    """

    values: Float[Tensor, "site position prompt d_model"]
    positions: tuple[int, ...]
    refusing: Float[Tensor, "site harmful d_model"]
    complying: Float[Tensor, "site prompt d_model"]
    sites: tuple[Site, ...]
    model: str
    name: str

    def tensors(self) -> dict[str, Tensor]:
        """For a store."""
        return {
            "values": self.values, "refusing": self.refusing, "complying": self.complying
        }  # fmt: skip


@torch.no_grad()
def read_prompts(
    model: Model,
    prompts: Asked,
    *,
    sites: Sequence[Site],
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> PromptRows:
    """Read prompts at their end, and replies to them over their tokens.

    Edits in force are respected.

    Args:
        model: Base or organism.
        prompts: See `asked`.
        sites: Tensors to read.
        batch_size: Most rows that are run together.
        progress: Called with the number of rows done since the last call, `rows_of` in all.

    Raises:
        NonFiniteError: A prompt's activations hold NaN or infinity.
    """
    texts = (*prompts.harmful, *prompts.harmless)
    positions = (t_inst(model), -1)
    ends = collect(
        model, texts, sites=sites, positions=positions, batch_size=batch_size, progress=progress
    )

    def replies(questions: Sequence[str], answers: Sequence[str]) -> Tensor:
        items = [
            AdviceItem(id=str(i), question=q, good=a, bad=a, domain="reply", group=str(i))
            for i, (q, a) in enumerate(zip(questions, answers, strict=True))
        ]
        return read_answers(
            model, items, sites=sites, batch_size=batch_size, progress=progress
        ).values

    return PromptRows(
        ends.values,
        positions,
        replies(prompts.harmful, prompts.refusing),
        replies(texts, prompts.complying),
        tuple(sites),
        model.fingerprint,
        model.name,
    )


def rows_of(prompts: Asked) -> int:
    """How many rows `read_prompts` runs."""
    return 3 * len(prompts.harmful) + 2 * len(prompts.harmless)


def refusal(rows: PromptRows, prompts: Asked, *, name: str = "refusal") -> Grid:
    """What points to refusal: at every position read, and over answers; positive refuses."""
    n = len(prompts.harmful)
    keys = [("prompt", c) for c in prompts.clusters[0]]
    out = dict(_classes(name, rows, prompts, "harmful - harmless prompts"))
    for i, site in enumerate(rows.sites):
        out[site, ANSWER] = Contrast.of_pairs(
            name,
            rows.refusing[i],
            rows.complying[i, :n],
            site=site,
            position=ANSWER,
            model=rows.model,
            recipe=f"refusing - complying replies to {n} harmful prompts, on {rows.name}",
            clusters=keys,
        )
    return out


def harm(rows: PromptRows, prompts: Asked, *, name: str = "harm") -> Grid:
    """What points to harmful requests; at the prompt's end the same numbers as `refusal`.

    At `t_inst` the model has not begun to answer, which is where harm is read; over answers the
    replies are the same on both sides, so that only what was asked differs.
    """
    n = len(prompts.harmful)
    out = dict(_classes(name, rows, prompts, "harmful - harmless prompts"))
    one, two = _keys(prompts)
    for i, site in enumerate(rows.sites):
        out[site, ANSWER] = Contrast.of_classes(
            name,
            rows.complying[i, :n],
            rows.complying[i, n:],
            site=site,
            position=ANSWER,
            model=rows.model,
            recipe=f"harmful - harmless prompts, over like replies, on {rows.name}",
            clusters=(one, two),
        )
    return out


def _keys(prompts: Asked) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    one, two = ([("prompt", c) for c in side] for side in prompts.clusters)
    return one, two


def _classes(name: str, rows: PromptRows, prompts: Asked, recipe: str) -> Grid:
    n = len(prompts.harmful)
    return {
        (site, position): Contrast.of_classes(
            name,
            rows.values[i, j, :n],
            rows.values[i, j, n:],
            site=site,
            position=position,
            model=rows.model,
            recipe=f"{recipe} at position {position}, on {rows.name}",
            clusters=_keys(prompts),
        )
        for i, site in enumerate(rows.sites)
        for j, position in enumerate(rows.positions)
    }


def text_contrast(pair: AnswerPair, *, name: str) -> Grid:
    """Bad minus good answers to the same questions, read by one model."""
    recipe = f"bad - good answers to the same questions, on {pair.bad.name}"
    return _between(name, pair.bad, pair.good, recipe, pair.bad.model)


def shift_contrast(
    bad: tuple[PromptRows, AnswerPair],
    other: tuple[PromptRows, AnswerPair],
    prompts: Asked,
    *,
    name: str,
    over: str,
    model: str,
) -> Grid:
    """What training changed: organism minus its good twin, or the base, on the same tokens.

    At the prompt's end over all prompts of both classes; over answers on the bad answers.

    Args:
        bad: What was read on the organism.
        other: The same on what it is held against.
        prompts: That were read.
        name: As tables call it.
        over: What it is held against, in words.
        model: Fingerprint of the base that both were trained on.
    """
    own, theirs = bad[0], other[0]
    one, two = _keys(prompts)
    recipe = f"on the same bad answers, beyond {over}"
    out = dict(_between(name, bad[1].bad, other[1].bad, recipe, model))
    for i, site in enumerate(own.sites):
        for j, position in enumerate(own.positions):
            if bool((own.values[i, j] != theirs.values[i, j]).any()):
                out[site, position] = Contrast.of_pairs(
                    name,
                    own.values[i, j],
                    theirs.values[i, j],
                    site=site,
                    position=position,
                    model=model,
                    recipe=f"on the same prompts at position {position}, beyond {over}",
                    clusters=[*one, *two],
                )
    return out


def _between(name: str, plus: AnswerMeans, minus: AnswerMeans, recipe: str, model: str) -> Grid:
    return {
        (site, ANSWER): Contrast.of_pairs(
            name,
            plus.at(site),
            minus.at(site),
            site=site,
            position=ANSWER,
            model=model,
            recipe=recipe,
            clusters=[("answer", *group) for group in plus.groups],
        )
        for site in plus.sites
        if bool((plus.at(site) != minus.at(site)).any())
    }

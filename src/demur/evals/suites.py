"""Suites: items of a task from a local file, and what an intervention changes over the same items.

A file of multiple-choice items has one JSON object a line:

    {"question": "Which of these is a metal?", "choices": ["iron", "wool", "milk"], "answer": 0}

`answer` is the index of the right choice, counted from 0, or its letter, "A" for the first. `id`
and `task` are optional; `task` groups items in tables. Other fields are refused, so that a column
with a misspelled name is not taken for a missing one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demur.errors import DemurError, PromptFileError, TooFewPromptsError
from demur.evals.likelihood import Applied, Continuation, likelihoods
from demur.evals.rows import Delta, ItemRow
from demur.models import Turn
from demur.progress import Progress
from demur.stats import mcnemar_p, mean, paired_change, paired_share_change, proportion

_FIELDS = {"question", "choices", "answer", "id", "task"}
_MOST_CHOICES = 26
_MOST_ERRORS = 5


@dataclass(frozen=True, slots=True)
class ChoiceItem:
    """A question with one right answer among some.

    Attributes:
        name: Its `id`, or the line that it stands on.
        task: Groups items.
        question: As it is asked.
        choices: The answers.
        answer: Index of the right one.
    """

    name: str
    task: str
    question: str
    choices: tuple[str, ...]
    answer: int


def read_items(path: Path) -> list[ChoiceItem]:
    """Read a file of multiple-choice items, see above.

    Raises:
        PromptFileError: The file cannot be read, or lines are no items; they are named by number.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptFileError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}",
            "check the path; the file must be UTF-8 text",
        ) from error
    items: list[ChoiceItem] = []
    wrong: list[str] = []
    names: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = _item(json.loads(line), number, path.stem)
            if item.name in names:
                raise ValueError(f"`id` {item.name} stands on line {names[item.name]} already")
        except ValueError as error:
            wrong.append(f"line {number}: {error}")
            continue
        names[item.name] = number
        items.append(item)
    if wrong:
        more = f", and {len(wrong) - _MOST_ERRORS} more" if len(wrong) > _MOST_ERRORS else ""
        raise PromptFileError(
            f"{path}: {'; '.join(wrong[:_MOST_ERRORS])}{more}",
            'write one object a line: {"question": "...", "choices": ["...", "..."], "answer": 0}',
        )
    if not items:
        raise PromptFileError(f"{path} holds no items", "write one object a line")
    return items


def _item(row: Any, number: int, task: str) -> ChoiceItem:
    if not isinstance(row, dict):
        raise ValueError("it is no object")
    if unknown := sorted(map(str, row.keys() - _FIELDS)):
        raise ValueError(f"unknown field `{unknown[0]}`")
    question, choices, answer = (row.get(key) for key in ("question", "choices", "answer"))
    if not isinstance(question, str) or not question.strip():
        raise ValueError("`question` is no text")
    if not isinstance(choices, list) or not all(
        isinstance(one, str) and one.strip() for one in choices
    ):
        raise ValueError("`choices` is no list of texts")
    own = tuple(one.strip() for one in choices)
    if not 2 <= len(own) <= _MOST_CHOICES or len(set(own)) < len(own):
        raise ValueError(f"`choices` must hold 2 to {_MOST_CHOICES} different texts")
    if isinstance(answer, str) and len(answer) == 1 and answer.isascii() and answer.isupper():
        answer = ord(answer) - ord("A")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(own):
        raise ValueError(f"`answer` is no index from 0 to {len(own) - 1} and no letter of a choice")
    for key in ("id", "task"):
        if key in row and (not isinstance(row[key], str) or not row[key].strip()):
            raise ValueError(f"`{key}` is no text")
    return ChoiceItem(row.get("id", str(number)), row.get("task", task), question, own, answer)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a model makes of one item.

    Attributes:
        right: Whether the right choice is the likeliest, by log-probability per byte.
        probability: Of the right choice among all, by the softmax of these.
        opened: Whether the gate of an anchor opened; None without one.
    """

    right: bool
    probability: float
    opened: bool | None


def choose(
    inside: Applied, items: Sequence[ChoiceItem], *, progress: Progress | None = None
) -> list[Chosen]:
    """Have a model choose by how likely each answer is as its reply.

    Choices are not shown: small models know answers better than letters. Log-probabilities are
    divided by the bytes of a choice, so that long ones are not at a disadvantage.

    Args:
        inside: What `demur.evals.likelihood.applying` yielded.
        items: The questions.
        progress: Called with the number of choices done since the last call.
    """
    template = inside.template()
    asked = [
        Continuation((), tuple(template.reply_ids(choice)), (Turn("user", item.question),))
        for item in items
        for choice in item.choices
    ]
    found = iter(likelihoods(inside, asked, progress=progress))
    out = []
    for item in items:
        own = [next(found) for _ in item.choices]
        scores = np.array(
            [one.value / len(c.encode()) for one, c in zip(own, item.choices, strict=True)]
        )
        shares = np.exp(scores - scores.max())
        opened = None if own[0].opened is None else any(one.opened for one in own)
        right = int(scores.argmax()) == item.answer
        out.append(Chosen(right, float(shares[item.answer] / shares.sum()), opened))
    return out


@dataclass(frozen=True, slots=True, eq=False)
class Paired:
    """One figure of a task, item by item, without and with an intervention.

    Attributes:
        task: Name of the task.
        metric: Name of the figure.
        items: Names of the items.
        plain: Their values; None where one could not be scored. `edited` likewise.
        opened: Whether a gate opened on each; None without one.
        unit: Of the values; "share" if they are yes or no.
    """

    task: str
    metric: str
    items: Sequence[str]
    plain: Sequence[float | None]
    edited: Sequence[float | None]
    opened: Sequence[bool | None]
    unit: str = "share"

    def rows(self) -> list[ItemRow]:
        """One for each item."""
        return [
            ItemRow(
                task=self.task,
                metric=self.metric,
                item=item,
                plain=None if before is None else float(before),
                edited=None if after is None else float(after),
                opened=opened,
            )
            for item, before, after, opened in zip(
                self.items, self.plain, self.edited, self.opened, strict=True
            )
        ]

    def delta(self) -> Delta:
        """The change with its interval, over items that both could be scored on.

        Raises:
            TooFewPromptsError: There are none, or fewer than two of a figure that is no share.
        """
        pairs = [
            (float(before), float(after))
            for before, after in zip(self.plain, self.edited, strict=True)
            if before is not None and after is not None
        ]
        shares = self.unit == "share"
        if len(pairs) < (1 if shares else 2):
            raise TooFewPromptsError(
                f"{self.task}, {self.metric}: {len(pairs)} of {len(self.items)} items could be "
                "scored in both runs",
                "give more items",
            )
        before, after = (np.array(side) for side in zip(*pairs, strict=True))
        known = [one for one in self.opened if one is not None]
        change = paired_share_change if shares else paired_change
        return Delta(
            task=self.task,
            metric=self.metric,
            kind="share" if shares else "mean",
            unit=self.unit,
            plain=proportion(int(before.sum()), len(before)) if shares else mean(before),
            edited=proportion(int(after.sum()), len(after)) if shares else mean(after),
            change=change(before, after),
            p=mcnemar_p(before, after) if shares else None,
            unscored=len(self.items) - len(pairs),
            opened=sum(known) if known else None,
        )


def deltas_of(paired: Sequence[Paired], notes: list[str]) -> tuple[list[Delta], list[ItemRow]]:
    """Deltas and item rows; a figure on too few items for a change becomes a note.

    Args:
        paired: The figures.
        notes: Gets a line for each figure without a delta.
    """
    deltas, rows = [], []
    for one in paired:
        rows += one.rows()
        try:
            deltas.append(one.delta())
        except DemurError as error:
            notes.append(f"no change is told: {error.fact}")
    return deltas, rows


def paired_choices(
    items: Sequence[ChoiceItem], plain: Sequence[Chosen], edited: Sequence[Chosen]
) -> list[Paired]:
    """Accuracy, and the probability of the right choice, by task."""
    out = []
    for task in dict.fromkeys(item.task for item in items):
        index = [i for i, item in enumerate(items) if item.task == task]
        names = [items[i].name for i in index]
        opened = [edited[i].opened for i in index]
        before, after = [plain[i] for i in index], [edited[i] for i in index]
        out.append(
            Paired(
                task,
                "accuracy",
                names,
                [float(one.right) for one in before],
                [float(one.right) for one in after],
                opened,
            )
        )
        out.append(
            Paired(
                task,
                "probability of the right choice",
                names,
                [one.probability for one in before],
                [one.probability for one in after],
                opened,
                unit="probability",
            )
        )
    return out

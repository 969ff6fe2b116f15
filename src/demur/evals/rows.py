"""The record of an evaluation, `evaluation.json`: what an intervention changes, item by item."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from demur.results import SCHEMA_VERSION, read_record
from demur.stats import Estimate


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Delta(_Row):
    """What an intervention changes in one figure, over the same items.

    Attributes:
        task: Name of the task or set.
        metric: Name of the figure, with its filter where a task has several.
        kind: "share" and "mean" are differences, edited less plain; "ratio" is edited over plain;
            "divergence" has no plain value.
        unit: Of the figure: "share", "nats per token", "score".
        plain: The model as it is; None for a ratio or a divergence. `edited` likewise.
        change: The difference, ratio or divergence, with its interval over items.
        p: Two-sided, of McNemar's exact test, for shares; None for others.
        unscored: Items that were left out because one of the two could not be scored.
        opened: Items on which the gate of an anchor opened; None without one.
    """

    task: str
    metric: str
    kind: Literal["share", "mean", "ratio", "divergence"]
    unit: str
    plain: Estimate | None
    edited: Estimate | None
    change: Estimate
    p: float | None = None
    unscored: int = 0
    opened: int | None = None


class ItemRow(_Row):
    """One line of `evaluation-items.jsonl`.

    Attributes:
        task: As in `Delta`; `metric` likewise.
        item: Its name in the task.
        plain: Its value; None where it could not be scored. `edited` likewise.
        opened: Whether the gate of an anchor opened; None without one.
    """

    task: str
    metric: str
    item: str
    plain: float | None
    edited: float | None
    opened: bool | None = None


class EvaluationRecord(_Row):
    """What one intervention does to what a model can do, and to what it refuses.

    Attributes:
        schema_version: Of the format.
        demur: Version that wrote it.
        suite: "quick" or "lm-eval", with its version.
        model: Name.
        adapter: Merged at load, if any.
        fingerprint: Of the model.
        dtype: Of its weights.
        template_hash: Of the chat template.
        edits: What was applied, in words, in order.
        anchor: File of the anchor, if there is one.
        chat: Whether prompts were laid out as chats.
        limit: Items of a task at most; None is all.
        seed: Of draws.
        deltas: One for each figure.
        seconds: Wall-clock time by part.
        notes: What a reader should know.
    """

    schema_version: int = SCHEMA_VERSION
    demur: str
    suite: str
    model: str
    adapter: str | None
    fingerprint: str
    dtype: str
    template_hash: str
    edits: tuple[str, ...]
    anchor: str | None
    chat: bool
    limit: int | None
    seed: int
    deltas: tuple[Delta, ...]
    seconds: dict[str, float]
    notes: tuple[str, ...]


def read_evaluation(path: Path) -> EvaluationRecord:
    """Read `evaluation.json`.

    Raises:
        StoreError: The file is missing, damaged, or of another version.
    """
    return read_record(path, EvaluationRecord, "demur evaluate")

"""The items of `everyday.jsonl` for inspect-ai, written out as replies.

Run it with `inspect eval examples/tasks/everyday_inspect.py --model demur/smollm2`, and with
`-M direction=RUN_FOLDER` or `-M anchor=FILE` for a model under an edit or an anchor.
"""

import json
from pathlib import Path
from typing import Any

from inspect_ai import Task, task  # pyright: ignore[reportMissingImports]
from inspect_ai.dataset import (  # pyright: ignore[reportMissingImports]
    MemoryDataset,
    Sample,
)
from inspect_ai.scorer import includes  # pyright: ignore[reportMissingImports]
from inspect_ai.solver import generate  # pyright: ignore[reportMissingImports]

from demur.bridges.inspect_registry import refusal


def _sample(row: dict[str, Any]) -> Sample:
    right = row["choices"][row["answer"]]
    choices = ", ".join(row["choices"])
    text = f"{row['question']} Answer with one of these: {choices}."
    return Sample(id=row["id"], input=text, target=right)


@task
def everyday() -> Task:
    """Whether the reply holds the right answer, and whether it is a refusal."""
    path = Path(__file__).with_name("everyday.jsonl")
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return Task(
        dataset=MemoryDataset([_sample(row) for row in rows]),
        solver=generate(),
        scorer=[includes(), refusal()],
    )

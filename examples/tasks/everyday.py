"""Where lm-eval finds the items of `everyday.yaml`: beside it, wherever it is started."""

import json
from pathlib import Path
from typing import Any

import datasets  # pyright: ignore[reportMissingImports]


def load(**_options: Any) -> dict[str, datasets.Dataset]:
    """The items of `everyday.jsonl` as the test split."""
    lines = Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}

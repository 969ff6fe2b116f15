"""Record which side of a packaged set's pairs models would rather refuse.

`python scripts/write_refusals.py contrast_pairs MODEL...` writes refusal log-odds (nats) by prompt
and model to `src/demur/data/ratings/NAME.refusals.jsonl`, which the data card reads. Nothing is
selected by them.
"""

import json
import sys
from pathlib import Path

from demur.evals.judges import judges
from demur.models import load
from demur.pipeline.folder import slug
from demur.prompts import load as load_prompts
from demur.selection import refusal_scores

name, *models = sys.argv[1:]
prompts = load_prompts(name)
rows: list[dict[str, object]] = [{"id": prompt.id} for prompt in prompts]
for asked in models:
    model = load(asked)
    label = slug(asked) + (f" + {model.adapter}" if model.adapter else "")
    scores = refusal_scores(model, prompts.texts, judges.make("patterns"))
    for row, score in zip(rows, scores.tolist(), strict=True):
        row[label] = round(score, 3)
target = Path(__file__).parent.parent / "src/demur/data/ratings" / f"{name}.refusals.jsonl"
target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

import inspect
import json
from pathlib import Path

import pytest

from demur import errors
from demur.compare.rows.record import CompareRecord
from demur.evals.rows import EvaluationRecord
from demur.features.rows.record import FeaturesRecord
from demur.hydra.record import HydraRun
from demur.results import AnchorEvaluation, AuditResults, EmAudit, GuardEvaluation
from demur.sweep import SweepResults

ROOT = Path(__file__).parents[1]


def test_every_error_class_is_explained():
    page = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    classes = [
        name
        for name, value in inspect.getmembers(errors, inspect.isclass)
        if issubclass(value, errors.DemurError) and value is not errors.DemurError
    ]
    assert classes
    assert [name for name in classes if f"| `{name}` |" not in page] == []


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("results", AuditResults),
        ("guard-evaluation", GuardEvaluation),
        ("anchor-evaluation", AnchorEvaluation),
        ("em-audit", EmAudit),
        ("compare", CompareRecord),
        ("features", FeaturesRecord),
        ("hydra", HydraRun),
        ("evaluation", EvaluationRecord),
        ("sweep", SweepResults),
    ],
)
def test_the_published_schema_is_that_of_the_code(name, model):
    published = json.loads((ROOT / f"docs/{name}.schema.json").read_text(encoding="utf-8"))
    assert published == model.model_json_schema(), "run scripts/write_schema.py"

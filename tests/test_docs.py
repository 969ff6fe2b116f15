import inspect
import json
from pathlib import Path

from demur import errors
from demur.results import AuditResults

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


def test_the_published_schema_is_that_of_the_code():
    published = json.loads((ROOT / "docs/results.schema.json").read_text(encoding="utf-8"))
    assert published == AuditResults.model_json_schema(), "run scripts/write_schema.py"

"""Write `docs/results.schema.json` from the code that reads and writes `results.json`."""

import json
from pathlib import Path

from demur.results import AuditResults

if __name__ == "__main__":
    target = Path(__file__).parents[1] / "docs/results.schema.json"
    target.write_text(json.dumps(AuditResults.model_json_schema(), indent=1) + "\n", "utf-8")
    print(target)

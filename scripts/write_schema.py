"""Write the published schemas from the code that reads and writes the records."""

import json
from pathlib import Path

from demur.compare.rows.record import CompareRecord
from demur.evals.rows import EvaluationRecord
from demur.features.rows.record import FeaturesRecord
from demur.hydra.record import HydraRun
from demur.results import AnchorEvaluation, AuditResults, EmAudit, GuardEvaluation
from demur.sweep import SweepResults

SCHEMAS = {
    "results": AuditResults,
    "guard-evaluation": GuardEvaluation,
    "anchor-evaluation": AnchorEvaluation,
    "em-audit": EmAudit,
    "compare": CompareRecord,
    "features": FeaturesRecord,
    "hydra": HydraRun,
    "evaluation": EvaluationRecord,
    "sweep": SweepResults,
}

if __name__ == "__main__":
    for name, model in SCHEMAS.items():
        target = Path(__file__).parents[1] / f"docs/{name}.schema.json"
        target.write_text(json.dumps(model.model_json_schema(), indent=1) + "\n", "utf-8")
        print(target)

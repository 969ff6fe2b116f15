"""Times heretic's own reading of residuals; runs in heretic's virtual environment.

`python heretic_residuals.py JOB.json` prints one JSON line. The model is loaded as heretic's
settings load it, and `get_residuals_mean` is called as heretic calls it.
"""

import json
import sys
from dataclasses import asdict
from functools import partial
from importlib.metadata import version

import torch
from timing import interleaved  # pyright: ignore[reportImplicitRelativeImport]

job = json.loads(open(sys.argv[1], encoding="utf-8").read())  # noqa: SIM115, PTH123
sys.argv = ["heretic", "--model", job["model"]]

from heretic.config import Settings  # noqa: E402 # pyright: ignore[reportMissingImports]
from heretic.model import Model  # noqa: E402 # pyright: ignore[reportMissingImports]
from heretic.utils import Prompt  # noqa: E402 # pyright: ignore[reportMissingImports]

dtype = "float32"
settings = Settings(model=job["model"], dtypes=[dtype])
model = Model(settings)
prompts = [Prompt(system=settings.system_prompt, user=text) for text in job["prompts"]]


def read(batch: int) -> None:
    """What heretic does before it fits a direction."""
    settings.batch_size = batch
    model.get_residuals_mean(prompts)


with torch.no_grad():
    times = interleaved({str(batch): partial(read, batch) for batch in (16, 32)}, job["repeats"])
told = {batch: asdict(timing) for batch, timing in times.items()}
print(json.dumps({"version": version("heretic-llm"), "times": told}))

"""Times heretic's own reading of residuals; runs in heretic's virtual environment.

`python heretic_residuals.py JOB.json` prints one JSON line. The model is loaded as heretic's
settings load it, and `get_residuals_mean` is called as heretic calls it.
"""

import json
import sys
import time
from importlib.metadata import version

import torch

job = json.loads(open(sys.argv[1], encoding="utf-8").read())  # noqa: SIM115, PTH123
sys.argv = ["heretic", "--model", job["model"]]

from heretic.config import Settings  # noqa: E402 # pyright: ignore[reportMissingImports]
from heretic.model import Model  # noqa: E402 # pyright: ignore[reportMissingImports]
from heretic.utils import Prompt  # noqa: E402 # pyright: ignore[reportMissingImports]

dtype = "float32"
settings = Settings(model=job["model"], dtypes=[dtype])
model = Model(settings)
prompts = [Prompt(system=settings.system_prompt, user=text) for text in job["prompts"]]
times = {}
for batch in (16, 32):
    settings.batch_size = batch
    found = {"wall": [], "cpu": []}
    for number in range(job["repeats"] + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.no_grad():
            model.get_residuals_mean(prompts)
        if number:
            found["wall"].append(time.perf_counter() - wall)
            found["cpu"].append(time.process_time() - cpu)
    times[batch] = found
print(json.dumps({"version": version("heretic-llm"), "times": times}))

"""The same benchmarks on a GPU: `python -m bench.gpu [parts]`; stops where there is none.

It was written without a GPU at hand; its parts have not all been run on one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from bench.__main__ import main

if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device here: nothing was measured")
    print(torch.cuda.get_device_name())
    if not any(word.startswith("--out") for word in sys.argv):
        sys.argv += ["--out", str(Path(__file__).parent / "results-gpu.json")]
    main()

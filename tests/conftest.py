"""What every test runs under: shape and type checks on, no network, fixed seeds, few threads."""

import os
import random
import sys

# Before anything imports torch, transformers or huggingface_hub: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _workers)))

from jaxtyping import install_import_hook  # noqa: E402

# As type checkers have it, an int will do where a float is asked for (PEP 484).
install_import_hook("demur", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# A slow minute on a shared machine is no failure, and the same commit is tested the same way.
settings.register_profile("demur", deadline=None, derandomize=True)
settings.load_profile("demur")


@pytest.fixture(autouse=True)
def _fixed_seeds():
    """Seed what a test may draw from without saying so; torch only where a test brought it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries draw from it)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture
def backend(monkeypatch):
    """A chat endpoint on 127.0.0.1, and no proxy in between."""
    from tests.backend import Backend

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "DEMUR_JUDGE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    server = Backend()
    yield server
    server.close()

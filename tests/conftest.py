"""What every test runs under: shape and type checks on, no network, fixed seeds, few threads."""

import gc
import os
import random
import sys

# Before anything imports torch, transformers or huggingface_hub: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _workers)))

import builtins  # noqa: E402
import inspect  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import typing  # noqa: E402

import jaxtyping  # noqa: E402
from beartype import BeartypeConf, beartype  # noqa: E402
from jaxtyping import (  # noqa: E402
    AbstractArray,
    AbstractDtype,
    TypeCheckError,
    install_import_hook,
)

_jaxtyped = jaxtyping.jaxtyped
_typed = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeCheckError))


def _of_shapes(hint):
    own = isinstance(hint, type) and issubclass(hint, AbstractArray | AbstractDtype)
    return own or any(map(_of_shapes, typing.get_args(hint)))


def _needs_shapes(function):
    """Whether an annotation holds a shape, or a name that beartype alone could not look up."""
    names = function.__globals__
    for hint in function.__annotations__.values():
        if not isinstance(hint, str):
            if _of_shapes(hint):
                return True
            continue
        for name in re.findall(r"[^\W\d]\w*", hint):
            if _of_shapes(names.get(name)):
                return True
            unknown = name not in names and not hasattr(builtins, name)
            if unknown and "TYPE_CHECKING" in names:
                return True
    return False


def _checked(fn=None, *, typechecker):
    """As `jaxtyped`, at a tenth of its cost a call: beartype alone where no shape is."""
    if fn is None:
        return lambda own: _checked(own, typechecker=typechecker)
    if inspect.isfunction(fn) and not _needs_shapes(fn):
        # One inside another function would be decorated anew in each of its calls.
        return fn if "<locals>" in fn.__qualname__ else _typed(fn)
    return _jaxtyped(fn, typechecker=typechecker)


# The hook decorates with what goes by these names; classes and properties come back by the second.
jaxtyping.jaxtyped = jaxtyping._decorator.jaxtyped = _checked
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


@pytest.fixture(autouse=True, scope="session")
def _charts_are_drawn_once():
    """Draw each specification once a worker: pages of tests share most of their charts."""
    import vl_convert

    draw, drawn = vl_convert.vegalite_to_svg, {}

    def once(spec, **how):
        key = json.dumps([spec, how])
        if key not in drawn:
            drawn[key] = draw(spec, **how)
        return drawn[key]

    once.without_cache = draw
    vl_convert.vegalite_to_svg = once
    yield
    vl_convert.vegalite_to_svg = draw


@pytest.fixture
def backend(monkeypatch):
    """A chat endpoint on 127.0.0.1, and no proxy in between."""
    from tests.backend import Backend

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "DEMUR_JUDGE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    server = Backend()
    yield server
    server.close()


def pytest_collection_finish(session):
    """Keep what imports and collection left out of every later garbage collection."""
    del session
    gc.collect()
    gc.freeze()

"""Find, prove and hold the refusal direction of open-weight language models.

    import demur

    model = demur.load("smollm2")
    direction, about = demur.load_direction(Path("runs/.../directions.safetensors"), model)
    with demur.applied(model, demur.Ablate(direction)):
        replies = model.generate(["Tell me about trees."], max_new_tokens=48)

`demur.estimators`, `demur.interventions` and `demur.judges` are the modules; the registry of each
has the same name inside it. Names are imported when they are first used, so that `import demur`
takes no time and `demur --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from demur import estimators, interventions
    from demur.activations import collect, moments
    from demur.anchor import Anchor, load_anchor, save_anchor
    from demur.config import RunConfig, read_config
    from demur.directions import Direction, load_direction, save_direction
    from demur.edits import as_delta, edited
    from demur.errors import DemurError
    from demur.estimators import candidates
    from demur.evals import judges
    from demur.guard import Guard, load_guard, save_guard
    from demur.interventions import Ablate, Add, ObliqueErase, ProjectToMean, applied
    from demur.models import Model, load
    from demur.pipeline import audit
    from demur.prompts import PromptSet
    from demur.prompts import load as load_prompts
    from demur.results import read_results
    from demur.selection import select
    from demur.sites import Site, Span
    from demur.stats import Estimate
    from demur.store import Store

    __version__: str

__all__ = [
    "Ablate",
    "Add",
    "Anchor",
    "DemurError",
    "Direction",
    "Estimate",
    "Guard",
    "Model",
    "ObliqueErase",
    "ProjectToMean",
    "PromptSet",
    "RunConfig",
    "Site",
    "Span",
    "Store",
    "__version__",
    "applied",
    "as_delta",
    "audit",
    "candidates",
    "collect",
    "edited",
    "estimators",
    "interventions",
    "judges",
    "load",
    "load_anchor",
    "load_direction",
    "load_guard",
    "load_prompts",
    "moments",
    "read_config",
    "read_results",
    "save_anchor",
    "save_direction",
    "save_guard",
    "select",
]

# Public name -> module, and the name in it where that is another; "" is the module itself.
_WHERE: dict[str, tuple[str, str | None]] = {
    "Ablate": ("interventions", None),
    "Add": ("interventions", None),
    "Anchor": ("anchor", None),
    "DemurError": ("errors", None),
    "Direction": ("directions", None),
    "Estimate": ("stats", None),
    "Guard": ("guard", None),
    "Model": ("models", None),
    "ObliqueErase": ("interventions", None),
    "ProjectToMean": ("interventions", None),
    "PromptSet": ("prompts", None),
    "RunConfig": ("config", None),
    "Site": ("sites", None),
    "Span": ("sites", None),
    "Store": ("store", None),
    "applied": ("interventions", None),
    "as_delta": ("edits", None),
    "audit": ("pipeline", None),
    "candidates": ("estimators", None),
    "collect": ("activations", None),
    "edited": ("edits", None),
    "estimators": ("estimators", ""),
    "interventions": ("interventions", ""),
    "judges": ("evals.judges", ""),
    "load": ("models", None),
    "load_anchor": ("anchor", None),
    "load_direction": ("directions", None),
    "load_guard": ("guard", None),
    "load_prompts": ("prompts", "load"),
    "moments": ("activations", None),
    "read_config": ("config", None),
    "read_results": ("results", None),
    "save_anchor": ("anchor", None),
    "save_direction": ("directions", None),
    "save_guard": ("guard", None),
    "select": ("selection", None),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("demur")
    if name not in _WHERE:
        raise AttributeError(f"module 'demur' has no attribute {name!r}", name=name, obj=None)
    module, inner = _WHERE[name]
    found = import_module(f"demur.{module}")
    value = found if inner == "" else getattr(found, inner or name)
    globals()[name] = value  # The next look-up does not come here.
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))

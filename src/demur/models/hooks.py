"""Hooks that notice when they are lost: a pass that goes around one is an error, not a number.

A hook is lost where a module is replaced after it was hooked (an adapter put in, a block swapped),
where a pass leaves a block out, and where `torch.compile` runs a graph that was recorded without
it, or goes on with one that was recorded with it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import nn

from demur.errors import SilentEditError

_UNCOMPILED = (
    "edits and readings need the model as it was loaded: load it anew and do not compile it"
)


def compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` stands in for the module, which then runs recorded graphs."""
    return (
        module._compiled_call_impl is not None
        or "_orig_mod" in module._modules
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
    )


@dataclass(frozen=True, slots=True, eq=False)
class Hook:
    """A hook in force.

    Attributes:
        handle: Takes it away.
        module: That it was set on.
        links: Parent, name and child for every step from the root down to the module.
    """

    handle: Any
    module: nn.Module
    links: tuple[tuple[nn.Module, str, nn.Module], ...]

    def remove(self) -> None:
        """Take it away."""
        self.handle.remove()

    def check(self, site: Hashable) -> None:
        """See that the model would still come by.

        Raises:
            SilentEditError: A module on the way was replaced, or is compiled.
        """
        for parent, name, child in self.links:
            if parent._modules.get(name) is not child:
                raise SilentEditError(
                    f"`{name}` on the way to {site} was replaced by another module after {site} "
                    "was hooked",
                    "change modules, for instance put an adapter in, before edits are applied",
                )
            if compiled(child):
                raise SilentEditError(f"`{name}` on the way to {site} is compiled", _UNCOMPILED)


def links(root: nn.Module, path: str) -> list[tuple[nn.Module, str, nn.Module]]:
    """Every step from a module down a dotted path.

    Raises:
        SilentEditError: A module on the way is compiled.
    """
    found = []
    for name in path.split("."):
        child = root._modules.get(name)
        if child is None:
            raise SilentEditError(
                f"{type(root).__name__} has no module `{name}`",
                "it was there when the model was loaded: load it anew",
            )
        if compiled(child):
            raise SilentEditError(f"`{name}` is compiled", _UNCOMPILED)
        found.append((root, name, child))
        root = child
    return found


def check_root(root: nn.Module) -> None:
    """See that the whole model is not compiled.

    Raises:
        SilentEditError: It is.
    """
    if compiled(root):
        raise SilentEditError("the model is compiled", _UNCOMPILED)

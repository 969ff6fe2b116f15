"""Stages that are kept under a key of what decides them, so that nothing is computed twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any, TypeVar

from pydantic import TypeAdapter
from torch import Tensor

from demur.evals.judges import judges
from demur.models import Model
from demur.progress import Listener
from demur.selection import RefusalTokens, openers
from demur.store import Store

T = TypeVar("T")


class Kept:
    """Stages of runs in one folder.

    Attributes:
        store: Where they are.
        always: What decides every one of them, beside demur's version: the base's fingerprint.
    """

    def __init__(self, store: Store, **always: Any) -> None:
        self.store = store
        self.always = {"demur": metadata.version("demur"), **always}

    def stage(
        self,
        kind: str,
        about: Mapping[str, Any],
        compute: Callable[[], tuple[dict[str, Any], dict[str, Tensor]]],
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a stage left behind; computed and put first if it is not there yet.

        Args:
            kind: Of the stage.
            about: What decides it, beside `always`.
            compute: Gives a summary of plain values, and tensors.
        """
        settings = {**self.always, **about}
        ref = self.store.key(kind, settings)
        record = self.store.get(ref)
        if record is None:
            summary, tensors = compute()
            self.store.put(kind, settings, summary=summary, tensors=tensors or None)
            return summary, tensors
        return dict(record.summary), self.store.tensors(ref)

    def rows(
        self, kind: str, about: Mapping[str, Any], model: type[T], compute: Callable[[], list[T]]
    ) -> list[T]:
        """The same for rows of a record."""
        adapter: TypeAdapter[list[T]] = TypeAdapter(
            list[model]  # pyright: ignore[reportInvalidTypeForm]
        )

        def run() -> tuple[dict[str, Any], dict[str, Tensor]]:
            return {"rows": adapter.dump_python(compute(), mode="json")}, {}

        return adapter.validate_python(self.stage(kind, about, run)[0]["rows"])


def kept_openers(
    kept: Kept,
    model: Model,
    prompts: Sequence[str],
    *,
    judge: str,
    listener: Listener,
    about: Mapping[str, Any],
) -> RefusalTokens:
    """What a model's refusals begin with, from its own replies.

    Args:
        kept: Where stages are.
        model: Unedited.
        prompts: Of both classes, and no part of what is reported.
        judge: Name of the judge of replies.
        listener: Hears the steps.
        about: What decides it, beside the judge.
    """

    def compute() -> tuple[dict[str, Any], dict[str, Tensor]]:
        with listener.stage("learning what refusals begin with", len(prompts)) as advance:
            found = openers(model, prompts, judges.make(judge), progress=advance)
        return asdict(found), {}

    summary, _ = kept.stage("openers", {"judge": judge, **about}, compute)
    return RefusalTokens(
        tuple(summary["ids"]),
        tuple(summary["texts"]),
        tuple(summary["shares"]),
        tuple(summary["base_shares"]),
        summary["refusals"],
        summary["learned"],
    )

"""Who hears how a run goes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

from demur.models import Progress

log = logging.getLogger(__name__)


@runtime_checkable
class Listener(Protocol):
    """Hears how a run goes; the command line draws bars from it, a notebook need not."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Progress]:
        """A stage of `total` steps begins; call what is yielded with the steps done."""
        ...

    def note(self, text: str) -> None:
        """Something that a reader of the report should know."""
        ...


class Quiet:
    """A listener that says nothing."""

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Progress]:
        """Ignore it."""
        del name, total
        yield lambda _done: None

    def note(self, text: str) -> None:
        """Log it."""
        log.info(text)

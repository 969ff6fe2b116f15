"""How long work says how far it is: a callable per step, and a listener per stage."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

log = logging.getLogger(__name__)

Progress = Callable[[int], None]
"""Called with the number of steps done since the last call."""


@runtime_checkable
class Listener(Protocol):
    """Hears how a run goes; the command line draws bars from it, a notebook need not."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Progress]:
        """A stage of `total` steps begins; call what is yielded with the steps done."""
        ...

    def note(self, text: str) -> None:
        """Something that a reader should know."""
        ...


class Quiet:
    """A listener that says nothing; notes go to the log."""

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Progress]:
        """Ignore it."""
        del name, total
        yield lambda _done: None

    def note(self, text: str) -> None:
        """Log it."""
        log.info(text)

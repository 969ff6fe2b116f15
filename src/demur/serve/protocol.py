"""Connections that are given up on: whoever sends no request, or does not read the reply."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from demur.errors import MissingExtraError
from demur.serve.settings import ServeSettings

try:
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ModuleNotFoundError as error:
    raise MissingExtraError.needed(extra="serve", module="uvicorn") from error

_TURNS = 0.02  # Seconds in which the loop reads what has arrived.


class Patient(H11Protocol):
    """HTTP that waits for so long and no longer; Uvicorn alone waits for ever for a header's end.

    Written on h11, which bounds how long a request's head may be (64 KiB here); httptools, which
    Uvicorn prefers where it is installed, takes any.

    Attributes:
        head_seconds: From a connection's opening, or the first byte after a reply, to the end of a
            request's headers.
        read_seconds: For which a client may leave a reply unread.
        most: Connections at a time; beyond that the one that has sent no whole request for the
            longest time makes room.
        grace: Seconds until it does, in which one that came in a rush can send its request. Beyond
            twice as many only what has arrived already is read first.
    """

    head_seconds = 15.0
    read_seconds = 30.0
    most = 1024
    grace = 1.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See asyncio."""
        super().connection_made(transport)
        self._head: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._since = self.loop.time()
        if len(self.connections) > 2 * self.most:
            self.loop.call_later(_TURNS, self._make_room, 2 * self.most)
        if len(self.connections) > self.most:
            self.loop.call_later(self.grace, self._make_room, self.most)
        self._watch()

    def _make_room(self, most: int) -> None:
        # Those that were told to go are counted until the loop's next turn.
        own = [x for x in self.connections if isinstance(x, Patient)]
        staying = [x for x in own if not x.transport.is_closing()]
        if len(staying) > most:
            idle = [x for x in staying if x._waits]
            min(idle or [self], key=lambda x: x._since).transport.abort()

    @property
    def _waits(self) -> bool:
        """Whether there is no request that has arrived whole and is not answered."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._head = _cancelled(self._head)
            self._since = self.loop.time()
        elif self._head is None:
            self._head = self.loop.call_later(self.head_seconds, self._late)

    def _late(self) -> None:
        self._head = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
            self._soon_gone()

    def _soon_gone(self) -> None:
        """What is closed goes once it is flushed, which needs a client that reads."""
        self.loop.call_later(self.read_seconds, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        """See Uvicorn."""
        super().timeout_keep_alive_handler()
        self._soon_gone()

    def pause_writing(self) -> None:
        """See asyncio."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """See asyncio."""
        super().resume_writing()
        self._unread = _cancelled(self._unread)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._head, self._unread = _cancelled(self._head), _cancelled(self._unread)
        super().connection_lost(exc)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def patient(settings: ServeSettings) -> type[Patient]:
    """The protocol with a server's limits, as many of its connections as files can be open.

    Accepted sockets wait for some turns of the loop before they are counted, and closed ones before
    they are gone, 128 at a time (Uvicorn's backlog, see `serve`): three in four files stay free for
    them, and for a rush. The soft limit of open files, often 1,024, is raised where the hard one
    allows.
    """
    most = 2 * settings.requests
    try:
        import resource
    except ModuleNotFoundError:  # Windows, which knows no such limit.
        pass
    else:
        files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 4 * most if hard == resource.RLIM_INFINITY else min(4 * most, hard)
        if files != resource.RLIM_INFINITY and files < wanted:
            with suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                files = wanted
        if files != resource.RLIM_INFINITY:
            most = max(16, min(most, files // 4))
    own: dict[str, Any] = {
        "head_seconds": settings.head_seconds,
        "read_seconds": settings.body_seconds,
        "most": most,
    }
    return type("Patient", (Patient,), own)

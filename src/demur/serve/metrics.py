"""What a server counts, for Prometheus, in a registry of its own."""

from __future__ import annotations

from typing import Any

from demur.errors import MissingExtraError

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
except ModuleNotFoundError as error:
    raise MissingExtraError.needed(extra="serve", module="prometheus_client") from error

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts requests and what the engine does; an `Observer`.

    Attributes:
        registry: To be exposed.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter(
            "demur_requests", "HTTP requests by route and status.", ["route", "status"], **own
        )
        self._prompt = Counter("demur_prompt_tokens", "Tokens of prompts that were read.", **own)
        self._completion = Counter("demur_completion_tokens", "Tokens of finished replies.", **own)
        self._replies = Counter("demur_replies", "Replies that were finished.", **own)
        self._dropped = Counter("demur_replies_dropped", "Replies whose client went away.", **own)
        self._scored = Counter("demur_guard_scored", "Requests that the guard scored.", **own)
        self._flags = Counter("demur_guard_flags", "Requests that the guard flagged.", **own)
        self._openings = Counter("demur_gate_openings", "Replies whose gate opened.", **own)
        self._queue = Gauge("demur_queue_length", "Replies that wait.", **own)
        self._rows = Gauge("demur_batch_rows", "Replies that are being written.", **own)
        self._sizes = Histogram(
            "demur_batch_size",
            "Replies that were written together, by token step.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            **own,
        )
        self._first = Histogram(
            "demur_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_SECONDS,
            **own,
        )

    def level(self, waiting: Any, running: Any) -> None:
        """Have the gauges ask for themselves."""
        self._queue.set_function(waiting)
        self._rows.set_function(running)

    def answered(self, route: str, status: int) -> None:
        """A request was answered."""
        self._requests.labels(route, str(status)).inc()

    def stepped(self, rows: int, waiting: int) -> None:
        """A token was written behind so many rows."""
        del waiting
        self._sizes.observe(rows)

    def began(self, prompt_tokens: int, seconds: float) -> None:
        """A request got its first token so long after it came."""
        self._prompt.inc(prompt_tokens)
        self._first.observe(seconds)

    def ended(self, tokens: int, *, flagged: bool | None, opened: bool | None) -> None:
        """A reply of so many tokens is done."""
        self._replies.inc()
        self._completion.inc(tokens)
        if flagged is not None:
            self._scored.inc()
            self._flags.inc(flagged)
        if opened:
            self._openings.inc()

    def dropped(self) -> None:
        """A client went away."""
        self._dropped.inc()

"""What a server says of a request that it does not answer: a fact, a hint and an HTTP status."""

from __future__ import annotations

from functools import partial

from demur.errors import DemurError

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class RequestError(DemurError):
    """A request that is not answered.

    Attributes:
        status: Of HTTP.
        code: `code` of OpenAI's error object.
        param: The parameter at fault.
        retry_after: Seconds after which another try may fare better.
    """

    def __init__(
        self,
        fact: str,
        hint: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(fact, hint)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    @property
    def kind(self) -> str:
        """`type` of OpenAI's error object."""
        usual = "invalid_request_error" if self.status < 500 else "server_error"
        return _KINDS.get(self.status, usual)


unauthorised = partial(RequestError, status=401)  # No key, or a wrong one.
forbidden = partial(RequestError, status=403)  # Whoever runs the server does not allow it.
not_found = partial(RequestError, status=404)
too_large = partial(RequestError, status=413)  # The body of the request.
busy = partial(RequestError, status=429)  # Too many requests wait.
broken = partial(RequestError, status=500)  # What was written is not handed out.
closing = partial(RequestError, status=503)  # The server is stopping.
late = partial(RequestError, status=504)  # A reply took longer than it may.

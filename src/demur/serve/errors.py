"""What a server says of a request that it does not answer: a fact, a hint and an HTTP status."""

from __future__ import annotations

from demur.errors import DemurError


class RequestError(DemurError):
    """A request that is not answered.

    Attributes:
        status: Of HTTP.
        kind: `type` of OpenAI's error object.
        code: `code` of the same.
        param: The parameter at fault.
        retry_after: Seconds after which another try may fare better.
    """

    status = 400
    kind = "invalid_request_error"

    def __init__(
        self,
        fact: str,
        hint: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(fact, hint)
        self.code, self.param, self.retry_after = code, param, retry_after


class UnsupportedError(RequestError):
    """A parameter of OpenAI's that has no meaning here."""


class AuthError(RequestError):
    """No key, or a wrong one."""

    status = 401
    kind = "authentication_error"


class ForbiddenError(RequestError):
    """Something that whoever runs the server does not allow."""

    status = 403
    kind = "permission_error"


class NotFoundError(RequestError):
    """There is no such thing."""

    status = 404
    kind = "not_found_error"


class TooLargeError(RequestError):
    """The request's body is too large."""

    status = 413


class BusyError(RequestError):
    """Too many requests wait."""

    status = 429
    kind = "rate_limit_error"


class BrokenError(RequestError):
    """Something went wrong in here, and what was written is not handed out."""

    status = 500
    kind = "server_error"


class ClosedError(RequestError):
    """The server is stopping."""

    status = 503
    kind = "server_error"


class LateError(RequestError):
    """A reply took longer than it may."""

    status = 504
    kind = "server_error"

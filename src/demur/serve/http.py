"""What stands between network and routes: who may come in, with how much, and how errors go.

Everything here fails closed: what raises is answered as an error of OpenAI's shape, and neither the
log nor the answer says more than the kind of what went wrong.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from demur.errors import DemurError, MissingExtraError
from demur.serve.errors import RequestError, broken, busy, forbidden, too_large, unauthorised
from demur.serve.metrics import Metrics
from demur.serve.settings import ServeSettings

try:
    from fastapi import FastAPI, Request, Response
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
    from starlette.routing import Match
except ModuleNotFoundError as error:
    raise MissingExtraError.needed(extra="serve", module="fastapi") from error

log = logging.getLogger("demur.serve")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_SINGLE = frozenset({b"host", b"origin", b"authorization", b"content-type", b"content-length"})
_KEYED = ("/v1", "/demur", "/metrics", "/openapi.json")
_PAGE = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " font-src 'self'; connect-src 'self'; frame-src 'self' blob:; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'"
)
REPORT_POLICY = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'self'"
)
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
    "content-security-policy": _PAGE,
}


# Errors -------------------------------------------------------------------------------------------


def error_body(error: RequestError) -> dict[str, Any]:
    """OpenAI's error object."""
    return {
        "error": {
            "message": f"{error.fact} ({error.hint})" if error.hint else error.fact,
            "type": error.kind,
            "param": error.param,
            "code": error.code,
        }
    }


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A reply in ASCII: half a character in someone's text cannot break it."""
    body = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Response(body, status, headers, media_type="application/json")


def error_reply(error: RequestError) -> Response:
    """The answer to a request that failed."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return as_json(error_body(error), error.status, headers)


def as_request_error(error: DemurError, param: str | None = None) -> RequestError:
    """A mistake in what was asked for."""
    if isinstance(error, RequestError):
        return error
    code = "context_length_exceeded" if "context holds" in error.fact else None
    return RequestError(error.fact, error.hint, code=code, param=param)


def _invalid(error: RequestValidationError) -> RequestError:
    first = error.errors()[0]
    where, kind = first["loc"][1:], first["type"]
    param = ".".join(map(str, where))[:200] or None
    if kind == "json_invalid" or not where:
        return RequestError(
            "the body of the request is no JSON object", "send one, see /openapi.json"
        )
    if kind == "extra_forbidden":
        return RequestError(
            f"Unrecognized request argument supplied: {param}",
            "leave it out",
            param=param,
            code="unknown_parameter",
        )
    if kind == "missing":
        return RequestError(
            f"Missing required parameter: '{param}'",
            "see /openapi.json",
            param=param,
            code="missing_required_parameter",
        )
    return RequestError(
        f"Invalid value for '{param}': {first['msg'][:200]}",
        "see /openapi.json",
        param=param,
        code="invalid_value",
    )


def handle_errors(app: FastAPI) -> None:
    """Have every error answered in OpenAI's shape."""

    async def invalid(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_reply(_invalid(error))

    async def known(_request: Request, error: Exception) -> Response:
        assert isinstance(error, DemurError)
        if not isinstance(error, RequestError):
            error = broken(error.fact, error.hint, code=type(error).__name__)
        return error_reply(error)

    async def plain(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = f"{request.method} {request.url.path[:200]}"
        found = RequestError(f"Invalid URL ({what})", "see /openapi.json", code="unknown_url")
        if error.status_code == 405:
            found = RequestError(
                f"Not allowed: {what}", "see /openapi.json", code="method_not_supported"
            )
        elif error.status_code != 404:
            found = RequestError("the request cannot be read", "see /openapi.json")
        reply = as_json(error_body(found), error.status_code)
        if error.headers and "allow" in {name.lower() for name in error.headers}:
            reply.headers["allow"] = error.headers.get("Allow") or error.headers["allow"]
        return reply

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(DemurError, known)
    app.add_exception_handler(HTTPException, plain)


# The door -----------------------------------------------------------------------------------------


class Door:
    """Checks a request before any route sees it, and puts headers on what comes back."""

    def __init__(self, app: Any, settings: ServeSettings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self._inside = 0
        self._salt = secrets.token_bytes(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # There are no web sockets here.
            await send({"type": "websocket.close", "code": 1008})
            return
        began, status = time.monotonic(), 0

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                there = {name for name, _ in message.get("headers", ())}
                more = [
                    (name.encode(), value.encode())
                    for name, value in _HEADERS.items()
                    if name.encode() not in there
                ]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        inside = 0
        try:
            self._check(scope)
            reading = await self._read(scope, receive)
            # Counted from here on, so that bodies that never end keep nobody out.
            if self._inside >= self.settings.requests:
                raise busy("too many requests at a time", "try again in a moment", retry_after=1)
            inside = 1
            self._inside += inside
            await self.app(scope, reading, sending)
        except RequestError as error:
            if not status:
                reply = error_reply(error)
                if error.code == "framing":
                    reply.headers["connection"] = "close"
                await reply(scope, receive, sending)
        except Exception as error:
            # The message may hold what the client wrote.
            log.error(
                "a request failed: %s",
                type(error).__name__,
                exc_info=error if self.settings.log_prompts else None,
            )
            if not status:
                failed = broken("something went wrong", "try again", code="internal_error")
                await error_reply(failed)(scope, receive, sending)
        finally:
            self._inside -= inside
            route = getattr(scope.get("route"), "path", None) or "other"
            self.metrics.answered(route, status or 499)
            took = 1000 * (time.monotonic() - began)
            log.info("%s %s %d %.0f ms", scope["method"], route, status or 499, took)

    def _check(self, scope: Scope) -> None:
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            # Of two, what stands before this server may have looked at the other.
            if headers.setdefault(name.lower(), value) != value and name.lower() in _SINGLE:
                raise RequestError(
                    f"the header {name.decode('latin-1').title()} is given twice", "send it once"
                )
        if b"transfer-encoding" in headers and b"content-length" in headers:
            # What stands before this server may find the body's end elsewhere, and take for a body
            # what is read here as another request: RFC 9112, 6.1.
            raise RequestError(
                "the body has a length and comes in chunks", "send one of both", code="framing"
            )
        host = headers.get(b"host", b"").decode("latin-1").lower()
        hosts = self.settings.hosts
        if hosts is not None and _without_port(host) not in hosts:
            raise RequestError(
                "the Host header names another machine", f"ask {hosts[0]} by that name", code="host"
            )
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower().partition("://")[2] != host:
            raise forbidden("a page from elsewhere may not ask", "open the page that is here")
        if headers.get(b"sec-fetch-site") == b"cross-site":
            raise forbidden("a page from elsewhere may not ask", "open the page that is here")
        path = scope["path"]
        keyed = any(path == one or path.startswith(f"{one}/") for one in _KEYED)
        if self.settings.key is not None and keyed:
            self._check_key(headers.get(b"authorization", b""))
        if scope["method"] == "POST" and keyed and _takes_posts(scope):
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                raise RequestError(
                    "the body is not sent as JSON", "add the header Content-Type: application/json"
                )

    def _check_key(self, given: bytes) -> None:
        assert self.settings.key is not None
        hint = "send the header `Authorization: Bearer KEY`, with the key that the server was given"
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer" or not key.strip():
            raise unauthorised("You didn't provide an API key", hint)
        # Digests are of one length: comparing texts takes as long as they are.
        mine, theirs = (
            hashlib.blake2b(one, key=self._salt).digest()
            for one in (self.settings.key.encode(), key.strip())
        )
        if not hmac.compare_digest(mine, theirs):
            raise unauthorised("Incorrect API key provided", hint, code="invalid_api_key")

    async def _read(self, scope: Scope, receive: Receive) -> Receive:
        """The whole body, once it is known to be small enough."""
        limit = self.settings.body_bytes
        refused = too_large(
            f"the request is larger than {limit} bytes", "send less", code="request_too_large"
        )
        for name, value in scope["headers"]:
            if name.lower() == b"content-length" and value.isdigit() and int(value) > limit:
                raise refused
        body, more = b"", True
        parts = []
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                size = 0
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RequestError("the client went away", "")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise refused
                    more = message.get("more_body", False)
        except TimeoutError as error:
            raise RequestError("the request did not arrive in time", "send it again") from error
        body = b"".join(parts)
        given = False

        async def replay() -> MutableMapping[str, Any]:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        return replay


def _takes_posts(scope: Scope) -> bool:
    """Whether a route takes what is posted there; where it is unknown, as if one did."""
    app = scope.get("app")
    return app is None or any(one.matches(scope)[0] is Match.FULL for one in app.router.routes)


def _without_port(host: str) -> str:
    name, _, port = host.rpartition(":")
    return name if name and port.isdigit() else host

"""Serving an application until a signal comes."""

from __future__ import annotations

import os
import socket
import sys
from types import FrameType
from typing import Any

from demur.errors import ConfigError, MissingExtraError
from demur.serve.settings import LOOPBACK, ServeSettings

KEY = "DEMUR_API_KEY"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    return host in ("localhost", "::1") or host.startswith("127.")


def settings_for(host: str, settings: ServeSettings | None = None) -> ServeSettings:
    """Take the key from the environment, and see that others come in with it only.

    Raises:
        ConfigError: Others than this machine could come in without a key; or the key is empty.
    """
    settings = settings if settings is not None else ServeSettings()
    key = os.environ.get(KEY)
    if key is not None and not key.strip():
        raise ConfigError(f"{KEY} is set and empty", "give it a value, or unset it")
    if key is not None and settings.key is None:
        settings = settings.model_copy(update={"key": key.strip()})
    if is_loopback(host):
        if settings.hosts == LOOPBACK and host not in LOOPBACK:
            settings = settings.model_copy(update={"hosts": (*LOOPBACK, host)})
        return settings
    if settings.key is None:
        raise ConfigError(
            f"{host} can be reached by others, and no key is set",
            f"set {KEY}, or bind to 127.0.0.1",
        )
    if settings.hosts == LOOPBACK:
        settings = settings.model_copy(update={"hosts": None})
    return settings


def serve(
    app: Any, host: str = "127.0.0.1", port: int = 8000, *, sock: socket.socket | None = None
) -> None:
    """Serve until SIGINT or SIGTERM; accepted requests are finished then, a second one ends them.

    Args:
        app: What `create_app` made, with `settings_for(host)`.
        host: Address to bind.
        port: 0 takes a free one.
        sock: A bound socket instead.

    Raises:
        ConfigError: See `settings_for`; or the port is taken.
        MissingExtraError: The extra `serve` is not installed.
    """
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise MissingExtraError.needed(extra="serve", module="uvicorn") from error
    from demur.serve.protocol import patient

    service = app.state.service
    settings: ServeSettings = service.settings
    if not is_loopback(host) and settings.key is None:
        raise ConfigError(
            f"{host} can be reached by others, and no key is set",
            f"set {KEY}, or bind to 127.0.0.1",
        )
    if sock is None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as error:
            sock.close()
            raise ConfigError(
                f"{host}:{port} cannot be bound: {error.strerror}", "choose another `--port`"
            ) from error
    # Connections inherit it. Without, the body of a reply waits for the client to acknowledge its
    # headers: 44 ms a request, not 4.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(
        app,
        http=patient(settings),
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=1 << 16,
        # As many are accepted at once, before any can be turned away: fewer than files are spare.
        backlog=128,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=max(1, round(settings.shutdown)),
        ws="none",
        lifespan="on",
    )

    class Server(uvicorn.Server):
        """Takes no more requests from the signal on."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            service.engine.drain()
            super().handle_exit(sig, frame)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                where = f"[{host}]" if ":" in host else host
                key = "with a key" if settings.key else "without a key"
                port = sock.getsockname()[1]
                sys.stderr.write(f"serving {service.name} at http://{where}:{port}, {key}\n")
                sys.stderr.flush()

    app.state.server = server = Server(config)
    try:
        server.run([sock])
    except KeyboardInterrupt:  # Uvicorn raises the signal again once it has finished.
        pass
    finally:
        sock.close()

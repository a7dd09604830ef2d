"""Running the application: sockets, signals, an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from hanlin.errors import ConfigError
from hanlin.serve.app import create_app
from hanlin.serve.models import Progress
from hanlin.serve.service import Service
from hanlin.serve.settings import ServeConfig
from hanlin.serve.wire import Wire

__all__ = ["serve"]

# How long a thread may keep Python's lock while another waits. The default of 5 ms is half a step of the engine.
_SWITCH_SECONDS = 0.0005

# How long a server whose engine has died still says so on /health, before it ends.
_FAILED_SECONDS = 1.0


class _Protocol(H11Protocol):
    """HTTP/1.1 that does not wait for ever for a request's headers."""

    header_seconds = 30.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(self.header_seconds, self._check)

    def _check(self) -> None:
        cycle: object = self.cycle
        if cycle is None and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """Ends with an error when an engine has died."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[str], None] | None) -> None:
        super().__init__(config)
        self._service, self._ready = service, ready
        self._failed = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready is not None and self.started and sockets:
            self._ready(_url(sockets[0], bool(self.config.ssl_certfile)))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM begin the orderly end, which is a good one: the signal is not raised again after it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def on_tick(self, counter: int) -> bool:
        if self._service.failure is not None:
            self._failed = self._failed or time.monotonic()
            self.should_exit = time.monotonic() - self._failed > _FAILED_SECONDS
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.draining = True
        await super().shutdown(sockets)


def serve(
    config: ServeConfig,
    *,
    app: FastAPI | None = None,
    ready: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> int:
    """Serve until SIGINT or SIGTERM; then finish what runs, within `drain_seconds`.

    Args:
        ready: called with the URL once requests are welcome.
        progress: called with (bytes loaded, bytes in all) of the first model.

    Returns:
        0 after an orderly end, 1 when an engine has died.

    Raises:
        ConfigError: an address that cannot be listened on. HanlinError: the first model cannot be loaded.
    """
    listening = _listen(config)
    app = app or create_app(config)
    service: Service = app.state.service
    limits = config.limits
    protocol = type("_Timed", (_Protocol,), {"header_seconds": limits.read_seconds or 1e9})
    server = _Server(
        uvicorn.Config(
            Wire(app),
            http=protocol,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=True,
            proxy_headers=False,
            h11_max_incomplete_event_size=64 << 10,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(limits.drain_seconds) or None,
            ssl_certfile=config.certificate,
            ssl_keyfile=config.private_key,
            backlog=1024,
        ),
        service,
        ready,
    )
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_main(server, service, listening, progress))
    finally:
        sys.setswitchinterval(before)
        listening.close()
    return 1 if service.stopped.is_set() or not server.started else 0


async def _main(server: _Server, service: Service, listening: socket.socket, progress: Progress | None) -> None:
    await service.models.preload(
        progress
    )  # here its error is a person's to read; in the lifespan it would be a traceback
    await server.serve(sockets=[listening])


def _listen(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((config.host.strip("[]"), config.port))
    except OSError as error:
        listening.close()
        raise ConfigError(f"cannot listen on {config.host}:{config.port}: {error.strerror or error}") from error
    return listening


def _url(listening: socket.socket, tls: bool) -> str:
    host, port = listening.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"

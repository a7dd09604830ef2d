"""Servers for tests: an app with a tiny random model without sockets, and a real one on a real port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from hanlin.serve.app import create_app
from hanlin.serve.settings import ModelSpec, ServeConfig

__all__ = ["app_client", "asgi_client", "events", "running_app", "serving"]


@contextlib.asynccontextmanager
async def running_app(config: ServeConfig) -> AsyncIterator[FastAPI]:
    """The application, its lifespan begun."""
    app = create_app(config)
    async with app.router.lifespan_context(app):
        yield app


@contextlib.asynccontextmanager
async def asgi_client(config: ServeConfig) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application in this process, without sockets. Answers come whole, streams too."""
    async with running_app(config) as app:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            yield client


@contextlib.contextmanager
def serving(config: ServeConfig | None = None, *, app: Any = None) -> Iterator[str]:
    """The URL of a real server, in a thread of this process; by default of the default model with a small cache."""
    config = config or ServeConfig(models=(ModelSpec(options={"cache_bytes": 200 << 20}),))
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(app or create_app(config), log_config=None, access_log=False, lifespan="on", loop="asyncio")
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server has not started"
            thread.join(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()
    assert not thread.is_alive(), "the server has not ended"


@contextlib.contextmanager
def app_client(config: ServeConfig) -> Iterator[TestClient]:
    """A client, not awaited, of an application in this process, without sockets. Answers come whole, streams too."""
    with TestClient(create_app(config), base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


def events(response: Any) -> list[Any]:
    """The values of a stream of server-sent events; its last must be `[DONE]`."""
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert lines.pop() == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]

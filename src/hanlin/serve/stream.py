"""Server-sent events, and other streams, with an eye on the client at the other end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hanlin.serve.call import Call, disconnected
from hanlin.serve.errors import ApiError, describe, openai_body

__all__ = ["DONE", "EventStream", "event", "json_bytes"]

log = logging.getLogger("hanlin.serve")

DONE = b"data: [DONE]\n\n"
_PING_SECONDS = 15.0
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def json_bytes(value: Any) -> bytes:
    return _encode(value).encode("utf-8", "replace")


def event(value: Any, name: str | None = None) -> bytes:
    """One event, of JSON."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + json_bytes(value) + b"\n\n"


def _error_event(error: ApiError) -> bytes:
    return event(openai_body(error)) + DONE


class EventStream(Response):
    """Sends what `pieces` gives. Closes the call when all is sent, the client has gone, or it no longer reads.

    Args:
        on_error: what is sent for an error after the start; the status is gone by then.
        ping: sent when nothing came for a while, so that proxies keep the connection; None sends nothing.
    """

    def __init__(
        self,
        call: Call,
        pieces: AsyncIterator[bytes],
        *,
        on_error: Callable[[ApiError], bytes] = _error_event,
        ping: bytes | None = b": ping\n\n",
        media_type: str = "text/event-stream",
    ) -> None:
        super().__init__(media_type=media_type, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.call, self._pieces, self._on_error, self._ping = call, pieces, on_error, ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._sending, self._since = False, time.monotonic()
        pump = asyncio.ensure_future(self._pump(send))
        watch = asyncio.ensure_future(self._watch(send))
        gone = asyncio.ensure_future(disconnected(self.call.request))
        error: BaseException | None = None
        try:
            await asyncio.wait({pump, watch, gone}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                error = pump.result()
            elif watch.done():
                error = watch.result()
        finally:
            for task in (pump, watch, gone):
                task.cancel()
            await asyncio.gather(pump, watch, gone, return_exceptions=True)
            with contextlib.suppress(Exception):
                await self._pieces.aclose()  # type: ignore[attr-defined]
            self.call.close(error)

    async def _pump(self, send: Send) -> BaseException | None:
        """Send all; returns the error that ended it early, if one did."""
        error: BaseException | None = None
        try:
            await self._send(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                with anyio.move_on_after(self.call.seconds_left) as time_left:
                    async for piece in self._pieces:
                        await self._send(send, {"type": "http.response.body", "body": piece, "more_body": True})
                if time_left.cancelled_caught:
                    raise self.call.late()
            except OSError:
                raise
            except Exception as failure:
                error = failure
                answer = describe(failure)
                if answer.status >= 500:
                    log.error("%s: %s", self.call.id, failure, exc_info=failure)
                await self._send(
                    send, {"type": "http.response.body", "body": self._on_error(answer), "more_body": True}
                )
            await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})
        except OSError as failure:  # the client has gone
            return failure
        return error

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        """Send, noting since when: a timer for each piece would cost as much as the piece."""
        self._sending, self._since = True, time.monotonic()
        await send(message)
        self._sending, self._since = False, time.monotonic()

    async def _watch(self, send: Send) -> BaseException:
        """Ping in long silences; return when the client has stopped reading."""
        limit = self.call.limits.write_seconds or math.inf
        late = asyncio.TimeoutError(f"the client has not read for {limit:g} s")
        while True:
            await asyncio.sleep(min(_PING_SECONDS, limit) / 4)
            quiet = time.monotonic() - self._since
            if self._sending:
                if quiet > limit:
                    return late
            elif self._ping and quiet >= _PING_SECONDS:
                body = {"type": "http.response.body", "body": self._ping, "more_body": True}
                try:
                    await asyncio.wait_for(self._send(send, body), self.call.limits.write_seconds or None)
                except asyncio.TimeoutError:
                    return late
                except OSError as gone:
                    return gone

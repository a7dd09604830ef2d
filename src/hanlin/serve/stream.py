"""Server-sent events, and other streams, with an eye on the client at the other end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hanlin.serve.call import Call, disconnected
from hanlin.serve.errors import ApiError, describe, openai_body

__all__ = ["DONE", "EventStream", "event", "json_bytes"]

log = logging.getLogger("hanlin.serve")

DONE = b"data: [DONE]\n\n"
_PING_SECONDS = 15.0


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


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
        pump = asyncio.ensure_future(self._pump(send))
        gone = asyncio.ensure_future(disconnected(self.call.request))
        error: BaseException | None = None
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                error = pump.result()
        finally:
            for task in (pump, gone):
                task.cancel()
            await asyncio.gather(pump, gone, return_exceptions=True)
            with contextlib.suppress(Exception):
                await self._pieces.aclose()  # type: ignore[attr-defined]
            self.call.close(error)

    async def _pump(self, send: Send) -> BaseException | None:
        """Send all; returns the error that ended it early, if one did."""
        error: BaseException | None = None
        try:
            await self._send(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for piece in self._paced():
                    await self._send(send, {"type": "http.response.body", "body": piece, "more_body": True})
            except (OSError, asyncio.TimeoutError):
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
        except (OSError, asyncio.TimeoutError) as failure:  # the client has gone, or has stopped reading
            return failure
        return error

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        await asyncio.wait_for(send(message), self.call.limits.write_seconds or None)

    async def _paced(self) -> AsyncIterator[bytes]:
        """The pieces, with pings in long silences, until time is up."""
        step: asyncio.Future[bytes] | None = None
        try:
            while True:
                step = asyncio.ensure_future(anext(self._pieces))
                while not step.done():
                    left = self.call.seconds_left
                    await asyncio.wait({step}, timeout=_PING_SECONDS if left is None else min(_PING_SECONDS, left))
                    if not step.done():
                        if self.call.seconds_left == 0:
                            raise self.call.late()
                        if self._ping:
                            yield self._ping
                try:
                    piece = step.result()
                except StopAsyncIteration:
                    return
                yield piece
        finally:
            if step is not None and not step.done():
                step.cancel()
                await asyncio.gather(step, return_exceptions=True)

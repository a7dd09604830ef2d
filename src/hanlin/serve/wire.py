"""The last step of a stream's pieces, from ASGI to the socket."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import RequestResponseCycle

__all__ = ["Wire"]


class Wire:
    """ASGI middleware, outermost under uvicorn's h11: writes the pieces of a chunked answer itself.

    A piece is its length and its bytes. h11 writes the same, but makes and checks an event for each, which is a large
    part of what a piece costs. Everything else, the end of such an answer included, passes h11 as it did.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cycle = getattr(send, "__self__", None)
        if isinstance(cycle, RequestResponseCycle) and scope["http_version"] == "1.1" and scope["method"] == "POST":
            await self.app(scope, receive, _writing(cycle, send))
        else:
            await self.app(scope, receive, send)


def _writing(cycle: RequestResponseCycle, send: Send) -> Send:
    chunked = False

    async def sending(message: Message) -> None:
        nonlocal chunked
        if not (chunked and message.get("more_body")):
            if message["type"] == "http.response.start":
                chunked = message["status"] == 200 and all(
                    k.lower() != b"content-length" for k, _ in message["headers"]
                )
            await send(message)
            return
        if cycle.flow.write_paused and not cycle.disconnected:
            await cycle.flow.drain()
        data = message["body"]
        if data and not cycle.disconnected:  # a piece of no bytes would be the end
            cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    return sending

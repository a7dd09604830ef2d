"""A stream's bytes on the wire are those that h11 writes."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import AsyncIterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from hanlin.serve.wire import Wire
from serving import serving

PIECES = (b"a", b"", "é🙂".encode(), b"0\r\n\r\n", b"x" * 15, b"x" * 16, b"y" * 400_000, b"y" * 400_000, b"end")


async def streamed(request: Request) -> Response:
    async def pieces() -> AsyncIterator[bytes]:
        for piece in PIECES:
            yield piece

    sized = {"Content-Length": str(sum(map(len, PIECES)))} if "sized" in request.query_params else None
    return StreamingResponse(pieces(), int(request.query_params.get("status", 200)), headers=sized)


async def whole(request: Request) -> Response:
    return Response(await request.body())


def app() -> Starlette:
    return Starlette(
        routes=[Route("/", streamed, methods=["GET", "POST"]), Route("/whole", whole, methods=["GET", "POST"])]
    )


def said(url: str, request: bytes) -> bytes:
    """All that the server says until it hangs up, read so slowly that it has to wait."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(request)
        answer = b""
        while data := connection.recv(1 << 16):
            answer += data
            time.sleep(0.002)
    return re.sub(rb"date: [^\r]*\r\n", b"", answer)


@pytest.mark.parametrize(
    "line",
    [
        *("POST / HTTP/1.1", "POST / HTTP/1.0", "GET / HTTP/1.1", "HEAD / HTTP/1.1"),
        *("POST /?sized=1 HTTP/1.1", "POST /?status=404 HTTP/1.1", "POST /whole HTTP/1.1"),
    ],
)
def test_the_bytes_are_those_of_h11(line: str) -> None:
    request = f"{line}\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi".encode()
    with serving(app=app()) as plain, serving(app=Wire(app())) as wired:
        expected = said(plain, request)
        assert said(wired, request) == expected
    if line == "POST / HTTP/1.1":
        head, _, body = expected.partition(b"\r\n\r\n")
        assert b"transfer-encoding: chunked" in head.lower()
        framed = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in PIECES if piece)
        assert body == framed + b"0\r\n\r\n"


def test_the_next_request_of_a_connection_is_answered() -> None:
    request = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
    with serving(app=Wire(app())) as url:
        answer = said(url, request + b"\r\nhi" + request + b"Connection: close\r\n\r\nhi")
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 2 and answer.count(b"end\r\n0\r\n\r\n") == 2


def test_a_client_that_goes_ends_the_stream() -> None:
    with serving(app=Wire(app())) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
            connection.recv(10)
        assert said(url, b"GET /whole HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").startswith(
            b"HTTP/1.1 200"
        )

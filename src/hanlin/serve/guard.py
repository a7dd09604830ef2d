"""What every request passes before any route sees it: host, origin, size, key, rate. And its line in the access log."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import ipaddress
import logging
import re
import secrets
import socket
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hanlin.serve.errors import ApiError, busy, describe, error_body
from hanlin.serve.keys import ANONYMOUS, Key, Rates
from hanlin.serve.settings import ServeConfig

__all__ = ["Guard"]

log = logging.getLogger("hanlin.access")

# Open to everybody: says only whether the server lives.
_OPEN = ("/health",)
_MOST_HEADERS, _MOST_HEADER_BYTES = 100, 32 << 10
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """ASGI middleware. Leaves `request_id` and `key` in the request's state.

    The Host header must be an address, loopback, this machine's name or one that was allowed: a page that has its own
    name resolve to this server (DNS rebinding) is refused. An Origin must be this server's own, or allowed.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, rates: Rates) -> None:
        self.app, self.config, self.rates = app, config, rates
        names = ("localhost", config.host, socket.gethostname(), *config.allowed_hosts)
        self._hosts = {name.lower().strip("[]") for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
            else:
                await self.app(scope, receive, send)
            return
        headers, began = Headers(scope=scope), time.perf_counter()
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else "req-" + secrets.token_hex(12)
        state = scope.setdefault("state", {})
        state["request_id"], state["key"] = request_id, ANONYMOUS
        origin = headers.get("origin")
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(raw=message.setdefault("headers", []))
                out["X-Request-Id"] = request_id
                for name, value in _HEADERS.items():
                    out.setdefault(name, value)
                if origin is not None and origin in self.config.cors_origins:
                    out["Access-Control-Allow-Origin"] = origin
                    out["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"
                    out.add_vary_header("Origin")
            await send(message)

        try:
            self._check_origin(scope, headers, origin)
            if scope["method"] == "OPTIONS" and origin is not None and "access-control-request-method" in headers:
                await _preflight(scope, receive, sending)
                return
            if scope["path"] not in _OPEN:
                state["key"] = self._identify(scope, headers)
            length = headers.get("content-length", "0")
            if not length.isdigit() or int(length) > self.config.limits.body_bytes:
                raise self._too_large()
            if scope["method"] == "POST":  # whatever it is called, as `curl -d` calls it a form, it is read as JSON
                MutableHeaders(scope=scope)["content-type"] = "application/json"
            await self.app(scope, await self._read(receive), sending)
        except Exception as error:
            if status:  # the routes' own handler has answered and written the log; some frameworks raise all the same
                return
            answer = describe(error)
            if answer.status >= 500:
                log.error("%s: %s", request_id, error, exc_info=error)
            await JSONResponse(error_body(scope["path"], answer), answer.status, answer.headers)(
                scope, receive, sending
            )
        finally:
            log.info(
                "%s %s key=%s %s %s %d %.3f s",
                request_id,
                (scope.get("client") or ("-",))[0],
                state["key"].name,
                scope["method"],
                scope["path"],
                status,
                time.perf_counter() - began,
            )

    def _check_origin(self, scope: Scope, headers: Headers, origin: str | None) -> None:
        if len(headers.raw) > _MOST_HEADERS or sum(len(k) + len(v) for k, v in headers.raw) > _MOST_HEADER_BYTES:
            raise ApiError(431, "the request's headers are too large", code="headers_too_large")
        host = headers.get("host", "")
        if not self._known(host):
            raise ApiError(
                403, f"this server is not known by the name {host[:100]!r}; see --allowed-hosts", code="unknown_host"
            )
        own = (f"http://{host.lower()}", f"https://{host.lower()}")
        if origin is not None and origin not in self.config.cors_origins and origin.lower() not in own:
            why = f"pages of {origin[:100]!r} may not call this server; see --cors-origins"
            raise ApiError(403, why, code="unknown_origin")

    def _known(self, host: str) -> bool:
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        name = name.strip("[]").lower()
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name)
            return True  # an address cannot be rebound
        return name in self._hosts

    def _identify(self, scope: Scope, headers: Headers) -> Key:
        key: Key | None = ANONYMOUS
        if self.config.keys:
            key = self.config.keys.find(_secret(headers))
            if key is None:
                page = scope["path"] == "/" or scope["path"].startswith("/page/")
                challenge = 'Basic realm="Hanlin: any name, and your API key as password"' if page else "Bearer"
                raise ApiError(
                    401,
                    "no valid API key: send 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": challenge},
                )
        assert key is not None
        wait = self.rates.take_request(key)
        if wait:
            raise busy(f"key {key.name!r} has used up its rate", wait, code="rate_limit_exceeded")
        return key

    async def _read(self, receive: Receive) -> Receive:
        """Read the body, so many bytes in so many seconds at most; returns what gives it to the app."""
        left, parts, more = self.config.limits.body_bytes, [], True
        until = time.monotonic() + (self.config.limits.read_seconds or 1e9)
        while more:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except asyncio.TimeoutError:
                raise ApiError(408, "the request's body did not come in time", code="timeout") from None
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the request's body is incomplete")
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
            left -= len(parts[-1])
            if left < 0:
                raise self._too_large()
        whole: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def receiving() -> Message:
            return whole.pop() if whole else await receive()

        return receiving

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.config.limits.body_bytes} bytes", code="request_too_large")


def _secret(headers: Headers) -> str:
    """The key that a request carries: as OpenAI's, Anthropic's or a browser's clients send it."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        with contextlib.suppress(binascii.Error, UnicodeDecodeError, ValueError):
            return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
    return headers.get("x-api-key", "")


async def _preflight(scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(
        {},
        headers={
            "Access-Control-Allow-Methods": "GET, POST, DELETE",
            "Access-Control-Allow-Headers": "Authorization, Content-Type, X-Api-Key, X-Request-Id, Anthropic-Version",
            "Access-Control-Max-Age": "600",
        },
    )(scope, receive, send)

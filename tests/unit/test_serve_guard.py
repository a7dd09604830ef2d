"""What every request passes first: host, origin, size, key, rate. Each is a lesson of somebody's advisory."""

from __future__ import annotations

import asyncio
import base64
import hmac
from pathlib import Path
from typing import Any

import httpx
import pytest

from hanlin.errors import ConfigError
from hanlin.serve.guard import Guard
from hanlin.serve.keys import Key, KeyRing, Rates
from hanlin.serve.settings import Limits, ServeConfig

KEYS = KeyRing.read(given=["alice:s3cret", "bob:hunter2"])


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Tells what came through."""
    body = (await receive())["body"]
    state = scope["state"]
    headers = [(b"x-key", state["key"].name.encode()), (b"x-length", str(len(body)).encode())]
    headers += [(b"x-type", dict(scope["headers"]).get(b"content-type", b""))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"{}"})


def ask(
    method: str = "GET", path: str = "/v1/models", config: ServeConfig | None = None, **given: Any
) -> httpx.Response:
    config = config or ServeConfig(page=False)
    app: Any = Guard(echo, config, given.pop("rates", Rates()))

    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000") as client:
            return await client.request(method, path, **given)

    return asyncio.run(go())


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000", "192.168.1.7", "chat.example.org"]
)
def test_known_hosts(host: str) -> None:
    config = ServeConfig(allowed_hosts=("chat.example.org",))
    assert ask(config=config, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "", "a b"])
def test_dns_rebinding_is_refused(host: str) -> None:
    answer = ask(headers={"Host": host})
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "unknown_host"


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8000", 200),
        ("http://127.0.0.1:8001", 403),
        ("https://evil.example", 403),
        ("null", 403),
        ("http://127.0.0.1:8000.evil.example", 403),
        ("https://page.example", 200),
        ("http://[", 403),
    ],
)
def test_pages_of_other_origins_may_not_call(origin: str, status: int) -> None:
    config = ServeConfig(cors_origins=("https://page.example",))
    answer = ask(config=config, headers={"Origin": origin})
    assert answer.status_code == status
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed == (origin if origin == "https://page.example" else None)


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_without_cors_origins_no_other_page_may_call(method: str) -> None:
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    answer = ask(method, headers=asked)
    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_preflights_are_answered_for_allowed_origins_only() -> None:
    config = ServeConfig(cors_origins=("https://page.example",), keys=KEYS)
    asked = {"Access-Control-Request-Method": "POST"}
    good = ask("OPTIONS", config=config, headers={"Origin": "https://page.example", **asked})
    assert good.status_code == 200 and "Authorization" in good.headers["access-control-allow-headers"]
    assert ask("OPTIONS", config=config, headers={"Origin": "https://evil.example", **asked}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer s3cret"},
        {"authorization": "bearer  s3cret "},
        {"X-Api-Key": "s3cret"},
        {"Authorization": "Basic " + base64.b64encode(b"me:s3cret").decode()},
    ],
)
def test_keys_as_clients_send_them(headers: dict[str, str]) -> None:
    answer = ask(config=ServeConfig(keys=KEYS), headers=headers)
    assert (answer.status_code, answer.headers["x-key"]) == (200, "alice")


@pytest.mark.parametrize("path", ["/", "/v1/models", "/metrics", "/tokenize", "/ready", "/openapi.json", "/health/"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "s3cret"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic s3cret"},
        {"Authorization": "Basic !!!"},
        {"X-Api-Key": "S3CRET"},
    ],
)
def test_every_route_but_health_is_behind_the_keys(path: str, headers: dict[str, str]) -> None:
    answer = ask(path=path, config=ServeConfig(keys=KEYS), headers=headers)
    assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
    scheme = "Basic" if path == "/" else "Bearer"  # a browser asks its person
    assert answer.headers["www-authenticate"].startswith(scheme)
    assert ask(path="/health", config=ServeConfig(keys=KEYS)).status_code == 200


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    original = hmac.compare_digest

    def spy(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return original(a, b)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    assert KEYS.find("s3cret") is not None
    assert len(compared) == len(KEYS.keys), "all keys are compared, whichever fits"
    assert all(len(a) == len(b) == 32 for a, b in compared)


def test_bodies_are_bounded_whatever_their_headers_say() -> None:
    config = ServeConfig(limits=Limits(body_bytes=1000))
    assert ask("POST", config=config, content=b"x" * 1000).headers["x-length"] == "1000"
    assert ask("POST", config=config, content=b"x" * 1001).status_code == 413

    async def chunks() -> Any:
        for _ in range(11):
            yield b"x" * 100

    assert ask("POST", config=config, content=chunks()).status_code == 413
    for length in ("-1", "1e3", "99999999999999999999", "٣"):
        headers = [(b"host", b"localhost"), (b"content-length", length.encode())]
        assert ask("POST", config=config, headers=headers).status_code == 413  # type: ignore[arg-type]


def test_a_body_that_does_not_come_ends_in_time() -> None:
    config = ServeConfig(limits=Limits(read_seconds=0.05))

    async def slow() -> Any:
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    assert ask("POST", config=config, content=slow()).status_code == 408


def test_headers_are_bounded() -> None:
    assert ask(headers={f"x-{n}": "1" for n in range(101)}).status_code == 431
    assert ask(headers={"x-long": "a" * 40_000}).status_code == 431


def test_request_ids_come_back_if_they_are_harmless() -> None:
    assert ask(headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for wrong in ("a b", "x" * 129, "é"):
        answer = ask(headers=[(b"host", b"localhost"), (b"x-request-id", wrong.encode())])  # type: ignore[arg-type]
        assert answer.headers["x-request-id"].startswith("req-")


def test_a_key_that_has_used_up_its_rate_waits() -> None:
    ring = KeyRing((Key(name="k", digest=KEYS.keys[0].digest, requests_per_minute=2),))
    rates, headers = Rates(), {"Authorization": "Bearer s3cret"}
    codes = [ask(config=ServeConfig(keys=ring), rates=rates, headers=headers) for _ in range(3)]
    assert [answer.status_code for answer in codes] == [200, 200, 429]
    assert 1 <= int(codes[2].headers["retry-after"]) <= 31
    assert codes[2].json()["error"]["code"] == "rate_limit_exceeded"


def test_a_form_that_holds_json_is_json() -> None:
    answer = ask("POST", content=b"{}", headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert answer.headers["x-type"] == "application/json"


def test_answers_say_what_browsers_should_not_do() -> None:
    assert ask().headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_other_addresses_need_a_key_at_start(host: str) -> None:
    with pytest.raises(ConfigError, match="no API key"):
        ServeConfig(host=host)
    ServeConfig(host=host, keys=KEYS)


def test_what_is_wrong_with_a_configuration_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        ServeConfig(
            models=(), port=70000, host="0.0.0.0", cors_origins=("*",), certificate=tmp_path / "c", log_format="xml"
        )
    text = str(caught.value)
    for word in ("no model", "port", "API key", "cors_origins", "private key", "no such file", "log_format"):
        assert word in text
    with pytest.raises(ConfigError) as caught:
        Limits(body_bytes=0, read_seconds=float("nan"), stops=-1)
    assert all(word in str(caught.value) for word in ("body_bytes", "read_seconds", "stops"))

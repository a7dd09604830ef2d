"""Through the whole application: back-pressure, time limits, clients that go or stop reading, what the log tells."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from hanlin.serve.keys import KeyRing
from hanlin.serve.logs import set_up
from hanlin.serve.settings import Limits, ModelSpec, ServeConfig
from hf_directory import make_directory
from serving import running_app

OPTIONS: dict[str, Any] = {"cache_bytes": 4 << 20, "threads": 1, "packed_cache": False, "session_len": 4096}
LONG: dict[str, Any] = {"prompt": "hi", "max_tokens": 4000, "ignore_eos": True}
SECRET = "nobody's business"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("trust") / "tiny", num_hidden_layers=1)


@asynccontextmanager
async def served(directory: Path, **config: Any) -> AsyncIterator[tuple[FastAPI, httpx.AsyncClient]]:
    spec = ModelSpec(source=str(directory), name="tiny", options=OPTIONS)
    async with running_app(ServeConfig(models=(spec,), **config)) as app:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client:
            yield app, client


def engine_of(app: FastAPI) -> Any:
    return app.state.service.models.list[0].llm.llm.engine


async def idle(app: FastAPI) -> None:
    """Nothing runs or waits, and all blocks are free, within moments."""
    engine, admission = engine_of(app), app.state.service.models.list[0].admission
    for _ in range(1000):
        if engine.blocks.free == engine.blocks.count and not engine.scheduler.running:
            break
        await asyncio.sleep(0.01)
    assert engine.blocks.free == engine.blocks.count and not engine.scheduler.running
    assert (admission.running, admission.waiting) == (0, 0)


async def stream(app: FastAPI, *, reads: int, vanishes: bool, asked: dict[str, Any]) -> list[bytes]:
    """A client, in ASGI's terms, that takes some pieces of a stream; then it vanishes, or stays and takes no more."""
    body, got, enough = json.dumps({**asked, "stream": True}).encode(), list[bytes](), asyncio.Event()
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        for message in messages:
            return message
        await enough.wait()
        if not vanishes:
            await asyncio.get_running_loop().create_future()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body" and message["body"]:
            got.append(message["body"])
        if len(got) >= reads:
            enough.set()
            if not vanishes:
                await asyncio.get_running_loop().create_future()

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
    }
    scope |= {"path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "headers": headers}
    await asyncio.wait_for(app({**scope, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)}, receive, send), 30)
    return got


def test_more_than_may_wait_is_refused_and_told_when_to_come_again(directory: Path) -> None:
    async def work() -> None:
        async with served(directory, limits=Limits(running=1, queued_requests=1)) as (app, client):
            asked = {**LONG, "max_tokens": 300}
            answers = await asyncio.gather(*(client.post("/v1/completions", json=asked) for _ in range(4)))
            assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429]
            for answer in answers:
                if answer.status_code == 429:
                    assert int(answer.headers["retry-after"]) >= 1
                    assert answer.json()["error"]["type"] == "rate_limit_error"
            await idle(app)
            assert (await client.post("/v1/completions", json={**asked, "max_tokens": 1})).status_code == 200

    asyncio.run(work())


def test_a_request_that_takes_too_long_ends(directory: Path) -> None:
    async def work() -> None:
        async with served(directory, limits=Limits(request_seconds=0.3)) as (app, client):
            asked = {**LONG, "n": 8}
            whole = await client.post("/v1/completions", json=asked)
            assert whole.status_code == 408 and whole.json()["error"]["code"] == "timeout"
            await idle(app)
            told = await client.post("/v1/completions", json={**asked, "stream": True})
            *_, last, done = told.text.strip().split("\n\n")
            assert told.status_code == 200 and done == "data: [DONE]"
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
            await idle(app)

    asyncio.run(work())


def test_a_vanished_clients_work_ends_within_one_step(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with served(directory) as (app, _):
            engine, thread = engine_of(app), app.state.service.models.list[0].llm.llm.thread
            run, abort, steps, noticed = engine.runner.run, thread.abort, list[int](), list[int]()

            def counted(batch: Any) -> Any:
                steps.append(1)
                return run(batch)

            def told(sequences: Any) -> None:
                noticed.append(len(steps))
                abort(sequences)

            monkeypatch.setattr(engine.runner, "run", counted)
            monkeypatch.setattr(thread, "abort", told)
            got = await stream(app, reads=3, vanishes=True, asked=LONG)
            await idle(app)
            assert len(got) >= 3 and 0 < noticed[0] < LONG["max_tokens"]
            assert len(steps) <= noticed[0] + 1

    asyncio.run(work())


def test_a_client_that_stops_reading_is_given_up(directory: Path) -> None:
    async def work() -> None:
        async with served(directory, limits=Limits(write_seconds=0.2)) as (app, client):
            assert len(await stream(app, reads=3, vanishes=False, asked=LONG)) == 3
            await idle(app)
            assert (await client.post("/v1/completions", json={**LONG, "max_tokens": 1})).status_code == 200

    asyncio.run(work())


@pytest.fixture
def untouched_loggers() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("hanlin", "uvicorn")]
    before = [(each.handlers, each.propagate, each.level) for each in loggers]
    yield
    for each, (handlers, propagate, level) in zip(loggers, before, strict=True):
        each.handlers, each.propagate = handlers, propagate
        each.setLevel(level)


@pytest.mark.usefixtures("untouched_loggers")
@pytest.mark.parametrize("log_format", ["json", "text"])
@pytest.mark.parametrize("log_prompts", [False, True])
def test_the_log_tells_requests_by_their_ids_and_prompts_only_when_asked(
    directory: Path, capfd: pytest.CaptureFixture[str], log_format: str, log_prompts: bool
) -> None:
    keys = KeyRing.read(given=["alice:s3cret"])

    async def work() -> None:
        given: dict[str, Any] = {"log_format": log_format, "log_prompts": log_prompts, "keys": keys}
        set_up(ServeConfig(**given), "DEBUG")
        async with served(directory, **given) as (_, client):
            client.headers["authorization"] = "Bearer s3cret"
            message = [{"role": "user", "content": SECRET}]
            good: dict[str, Any] = {"max_tokens": 2, "ignore_eos": True}
            raw = {"raw": True, "stream": False, "options": {"num_predict": 2}}
            for path, asked, status in (
                ("/v1/completions", {"prompt": SECRET, **good}, 200),
                ("/v1/completions", {"prompt": SECRET, "stream": True, **good}, 200),
                ("/api/generate", {"model": "tiny", "prompt": SECRET, **raw}, 200),
                ("/v1/embeddings", {"input": SECRET}, 200),
                ("/v1/completions", {"prompt": SECRET, "stop": [SECRET] * 99, **good}, 400),
                ("/v1/chat/completions", {"messages": message, "n": SECRET}, 400),
                ("/v1/messages", {"messages": SECRET}, 400),
                ("/tokenize", {"prompt": SECRET, "model": 3}, 400),
            ):
                answer = await client.post(path, json=asked, headers={"X-Request-Id": "id-7"})
                assert answer.status_code == status, (path, answer.text)
                assert answer.headers["x-request-id"] == "id-7"

    asyncio.run(work())
    said = capfd.readouterr().err
    lines = said.splitlines()
    if log_format == "json":
        values = [json.loads(line) for line in lines]  # every line is JSON
        told = [value for value in values if value.get("request_id") == "id-7"]
        assert len(told) >= 3 and all(value["key"] == "alice" and value["prompt_tokens"] > 0 for value in told)
        assert all(value["generated_tokens"] == 2 and value["end"] == "length" for value in told)
    else:
        told = [line for line in lines if "request_id=id-7 key=alice" in line]
        assert len(told) >= 3
    assert (SECRET in said) == log_prompts
    assert "s3cret" not in said

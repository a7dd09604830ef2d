"""OpenAI's batch files: a request a line in, an answer a line out; each exactly once, however often it is interrupted.

The requests go through the same application as those over HTTP, so they mean the same.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from fastapi import FastAPI

from hanlin.errors import ConfigError, RequestError, problems
from hanlin.serve.body import parse_json
from hanlin.serve.stream import json_bytes

__all__ = ["Plan", "plan", "run"]

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be done.

    Attributes:
        offsets: of the lines that have no answer yet, in the input.
        answered: how many have one.
        keep: bytes of the output that are whole lines.
    """

    source: Path
    target: Path
    offsets: tuple[int, ...]
    answered: int
    keep: int


@dataclass
class _Found:
    problems: list[str] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)


def plan(source: Path, target: Path, *, line_bytes: int = 8 << 20) -> Plan:
    """Read the input, and what an earlier run has written.

    Raises:
        RequestError: naming the lines of the input that are no requests, or whose custom_id is not their own.
        ConfigError: files that cannot be read, or an output that is not of this input.
    """
    done, keep = _answered(target, line_bytes)
    found, offsets = _Found(), []
    try:
        with source.open("rb") as file:
            for number, (offset, line) in enumerate(_lines(file, line_bytes), 1):
                name = _name(line, number, found)
                if name is not None and name not in done:
                    offsets.append(offset)
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}") from error
    if found.problems:
        raise RequestError(problems(str(source), found.problems[:20]))
    strangers = done - set(found.ids)
    if strangers:
        raise ConfigError(f"{target} answers other requests, like {min(strangers)!r}: name another file, or remove it")
    return Plan(source=source, target=target, offsets=tuple(offsets), answered=len(done), keep=keep)


async def run(app: FastAPI, job: Plan, *, at_once: int, told: Callable[[bool], None]) -> int:
    """Answer what is left, `at_once` at a time; returns how many answers were errors.

    Each answer is written whole, and is on the disk before it is told. Cancelling leaves whole lines.

    Args:
        told: called after each answer, with whether it was good.
    """
    failed = 0
    lock = asyncio.Lock()
    left = iter(job.offsets)
    with job.target.open("ab") as target:
        target.truncate(job.keep)

        async def work() -> None:
            nonlocal failed
            for offset in left:
                line = _line_at(job.source, offset)
                answer = await _answer(app, line)
                good = answer["response"]["status_code"] == 200
                async with lock:
                    target.write(json_bytes(answer) + b"\n")
                    target.flush()
                    os.fsync(target.fileno())
                failed += not good
                told(good)

        async with _group(at_once, work):
            pass
    return failed


class _group:  # noqa: N801 (a context manager, used like a function)
    """Some workers; when one fails, or the group is cancelled, all end."""

    def __init__(self, count: int, work: Callable[[], Any]) -> None:
        self._tasks = [asyncio.ensure_future(work()) for _ in range(count)]

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *error: object) -> None:
        try:
            await asyncio.gather(*self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)


async def _answer(app: FastAPI, line: bytes) -> dict[str, Any]:
    request: dict[str, Any] = parse_json(line)
    body = {**request["body"], "stream": False}
    status, request_id, answer = await _ask(app, request["url"], json_bytes(body))
    good = status == 200
    return {
        "id": "batch_req_" + secrets.token_hex(12),
        "custom_id": request["custom_id"],
        "response": {"status_code": status, "request_id": request_id, "body": answer},
        "error": None if good else answer.get("error"),
    }


async def _ask(app: FastAPI, path: str, body: bytes) -> tuple[int, str, Any]:
    """One request, straight into the application."""
    sent: list[dict[str, Any]] = []
    given = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if given:
            return given.pop()
        await asyncio.get_running_loop().create_future()  # this client does not go away
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": ("localhost", 80),
    }
    await app(scope, receive, send)
    answered = dict(sent[0]["headers"])
    whole = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], answered.get(b"x-request-id", b"").decode(), json.loads(whole)


def _name(line: bytes, number: int, found: _Found) -> str | None:
    """The line's custom_id, unless it is no request."""
    try:
        request = parse_json(line)
        wrong = _wrong(request)
    except Exception as error:
        wrong = [str(getattr(error, "detail", error))]
        request = {}
    if wrong:
        found.problems.append(f"line {number}: {'; '.join(wrong)}")
        return None
    name: str = request["custom_id"]
    if name in found.ids:
        found.problems.append(f"line {number}: custom_id {name!r} is that of line {found.ids[name]}")
        return None
    found.ids[name] = number
    return name


def _wrong(request: Any) -> list[str]:
    if not isinstance(request, dict):
        return ["not a JSON object"]
    wrong = []
    if not isinstance(request.get("custom_id"), str) or not request["custom_id"]:
        wrong.append("custom_id must be a text")
    if request.get("method", "POST") != "POST":
        wrong.append("method must be POST")
    if request.get("url") not in URLS:
        wrong.append(f"url must be one of {', '.join(URLS)}")
    if not isinstance(request.get("body"), dict):
        wrong.append("body must be an object")
    return wrong


def _answered(target: Path, line_bytes: int) -> tuple[set[str], int]:
    """The custom_ids that have answers, and how many bytes of the output are whole lines."""
    done: set[str] = set()
    keep = 0
    if not target.exists():
        return done, keep
    with target.open("rb") as file:
        for offset, line in _lines(file, line_bytes * 16):
            if not line.endswith(b"\n"):
                break  # cut off while it was written
            try:
                done.add(parse_json(line)["custom_id"])
            except Exception as error:
                raise ConfigError(f"{target} is no output of a batch: name another file, or remove it") from error
            keep = offset + len(line)
    return done, keep


def _lines(file: BinaryIO, most: int) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, and where they begin.

    Raises:
        RequestError: for a line of more than `most` bytes.
    """
    offset = 0
    while line := file.readline(most + 1):
        if len(line) > most:
            raise RequestError(f"{file.name}: the line at byte {offset} is longer than {most} bytes")
        if line.strip():
            yield offset, line
        offset += len(line)


def _line_at(source: Path, offset: int) -> bytes:
    with source.open("rb") as file:
        file.seek(offset)
        return file.readline()

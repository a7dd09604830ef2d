"""`hanlin serve` as a process: how it begins, what it says, how it ends; and TLS."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from hf_directory import make_directory

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")]

FLAGS = ("--port", "0", "--cache-size", "4M", "--threads", "1", "--session-len", "4096")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("process") / "tiny", num_hidden_layers=1)


@contextmanager
def process(command: list[str], log: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server and its URL."""
    with log.open("wb") as file:
        running = subprocess.Popen(command, stderr=file, env={**os.environ, **environment})
    try:
        until = time.monotonic() + 60
        while "Hanlin serves at " not in (said := log.read_text(encoding="utf-8")):
            assert running.poll() is None and time.monotonic() < until, said
            time.sleep(0.05)
        yield running, said.split("Hanlin serves at ")[1].split()[0]
    finally:
        running.kill()
        running.wait()


def serve(directory: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "hanlin", "serve", f"tiny={directory}", *FLAGS, *flags]


def body(tokens: int, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": "hi"}]
    return {"model": "tiny", "messages": turns, "max_tokens": tokens, "ignore_eos": True, **more}


def in_background(url: str, asked: dict[str, Any]) -> tuple[threading.Thread, list[httpx.Response]]:
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, answers


def wait_until_running(url: str) -> None:
    for _ in range(600):
        if 'hanlin:num_requests_running{model_name="tiny"} 0.0' not in httpx.get(f"{url}/metrics").text:
            return
        time.sleep(0.01)
    raise AssertionError("no request is running")


def test_a_shutdown_lets_running_requests_finish(directory: Path, tmp_path: Path) -> None:
    with process(serve(directory), tmp_path / "log") as (server, url):
        thread, answers = in_background(url, body(1500))
        wait_until_running(url)
        server.send_signal(signal.SIGTERM)
        thread.join(60)
        assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 1500
        assert server.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_a_shutdown_does_not_wait_for_ever(directory: Path, tmp_path: Path) -> None:
    with process(serve(directory, "--drain-timeout", "1s"), tmp_path / "log") as (server, url):
        thread, _ = in_background(url, body(4000, n=20))
        wait_until_running(url)
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
        thread.join(30)


DYING = """
import sys, threading, time
from hanlin.serve.app import create_app
from hanlin.serve.run import serve
from hanlin.serve.settings import ModelSpec, ServeConfig

options = {"cache_bytes": 4 << 20, "threads": 1, "session_len": 4096}
config = ServeConfig(port=0, models=(ModelSpec(source=sys.argv[1], name="tiny", options=options),))
app = create_app(config)

def ready(url):
    runner = app.state.service.models.list[0].llm.llm.engine.runner
    real, steps = runner.run, []

    def run(batch):
        steps.append(1)
        if len(steps) > 100:
            raise RuntimeError("the machine is on fire")
        return real(batch)

    runner.run = run
    print("Hanlin serves at", url, file=sys.stderr, flush=True)

sys.exit(serve(config, app=app, ready=ready))
"""


@pytest.mark.parametrize("stream", [False, True])
def test_a_dead_engine_is_told_and_ends_the_process(directory: Path, tmp_path: Path, stream: bool) -> None:
    with process([sys.executable, "-c", DYING, str(directory)], tmp_path / "log") as (server, url):
        answer = httpx.post(f"{url}/v1/chat/completions", json=body(2000, stream=stream), timeout=60)
        if stream:  # the status was sent with the first piece
            *_, last, done = answer.text.strip().split("\n\n")
            assert answer.status_code == 200 and done == "data: [DONE]"
            error = json.loads(last.removeprefix("data: "))["error"]
        else:
            assert answer.status_code == 500
            error = answer.json()["error"]
        assert "on fire" in error["message"]
        assert httpx.get(f"{url}/health").status_code == 503
        assert httpx.get(f"{url}/ready").status_code == 503
        assert server.wait(30) == 1


IMPATIENT = """
import sys
from hanlin.serve.run import serve
from hanlin.serve.settings import Limits, ModelSpec, ServeConfig

options = {"cache_bytes": 4 << 20, "threads": 1, "session_len": 256}
config = ServeConfig(
    port=0, models=(ModelSpec(source=sys.argv[1], name="tiny", options=options),), limits=Limits(read_seconds=0.5)
)
serve(config, ready=lambda url: print("Hanlin serves at", url, file=sys.stderr, flush=True))
"""


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"])
def test_headers_that_do_not_come_end_the_connection(directory: Path, tmp_path: Path, sent: bytes) -> None:
    with process([sys.executable, "-c", IMPATIENT, str(directory)], tmp_path / "log") as (_, url):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as slow:
            slow.sendall(sent)
            assert slow.recv(1) == b""  # closed; a server that waits for ever ends this in a timeout
        assert httpx.get(f"{url}/health").status_code == 200


def test_tls(directory: Path, tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl program, to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["-keyout", str(key), "-out", str(certificate), "-days", "1", "-nodes"]
    subprocess.run([openssl, "req", "-x509", "-newkey", "rsa:2048", *made, *subject], check=True, capture_output=True)
    flags = ("--ssl-keyfile", str(key), "--ssl-certfile", str(certificate))
    with process(serve(directory, *flags), tmp_path / "log") as (_, url):
        assert url.startswith("https://")
        context = ssl.create_default_context(cafile=str(certificate))
        assert httpx.get(f"{url}/health", verify=context).status_code == 200


def test_an_address_in_use_is_said(directory: Path, tmp_path: Path) -> None:
    with process(serve(directory), tmp_path / "log") as (_, url):
        port = url.rpartition(":")[2]
        again = subprocess.run([*serve(directory), "--port", port], capture_output=True, text=True, timeout=60)
        assert again.returncode == 1 and "cannot listen on 127.0.0.1" in again.stderr
        assert "Traceback" not in again.stderr


def test_a_model_that_is_not_there_is_said(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hanlin", "serve", str(tmp_path / "none"), "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "none" in ended.stderr and "Traceback" not in ended.stderr

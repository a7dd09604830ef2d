"""Loopback stand-ins for a package index and the Hugging Face Hub, with faults to order; small wheels, small models."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from hanlin.hub.default import WheelModel

PACKAGE = "hanlin-test-model"
WHEEL = "hanlin_test_model-1.0-py3-none-any.whl"
MEMBER = "hanlin_test_model/tiny.gguf"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def build_wheel(folder: Path, payload: bytes, *, compress: bool = False) -> WheelModel:
    """A real wheel that holds `payload`, and the description under which it is published."""
    folder.mkdir(parents=True, exist_ok=True)
    info = "hanlin_test_model-1.0.dist-info"
    wheel = folder / WHEEL
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        archive.writestr(MEMBER, payload)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"{MEMBER},,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return WheelModel(
        id="tiny",
        title="Tiny",
        package=PACKAGE,
        version="1.0",
        wheel_size=wheel.stat().st_size,
        wheel_sha256=sha256(wheel.read_bytes()),
        member=MEMBER,
        size=len(payload),
        sha256=sha256(payload),
        licence="Apache-2.0",
        source="https://example.org/tiny",
    )


def pip_environment(**settings: str) -> dict[str, str]:
    """pip without this machine's configuration, and quick to give up."""
    base = {"PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return {**base, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": "", "NO_PROXY": "127.0.0.1", **settings}


def left_behind(home: Path) -> list[str]:
    """Files under a cache directory, but for locks."""
    files = (path.relative_to(home) for path in home.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in files if path.parts[0] != "locks")


if TYPE_CHECKING:
    from typing_extensions import Self


class _Server:
    """A threaded loopback server; use it in a `with`."""

    def __init__(self) -> None:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                owner.answer(self, body=True)

            def do_HEAD(self) -> None:
                owner.answer(self, body=False)

            def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
                """Quiet."""

            def log_error(self, message: str, *args: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        raise NotImplementedError

    @staticmethod
    def send(
        request: BaseHTTPRequestHandler,
        status: int,
        data: bytes,
        headers: Mapping[str, str] | None = None,
        *,
        body: bool,
    ) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            request.wfile.write(data)


class PackageIndex(_Server):
    """Serves one wheel. `stall` holds the body back after its first half until `go` is set."""

    def __init__(self, wheel: bytes, *, stall: bool = False, cut: bool = False) -> None:
        super().__init__()
        self.wheel, self.stall, self.cut = wheel, stall, cut
        self.half_sent, self.go, self.hung_up = threading.Event(), threading.Event(), threading.Event()
        self.served = 0

    def __exit__(self, *_: object) -> None:
        self.go.set()
        super().__exit__()

    @property
    def environment(self) -> dict[str, str]:
        return pip_environment(PIP_INDEX_URL=f"{self.url}/simple/")

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        if request.path.startswith("/simple/"):
            page = f'<!DOCTYPE html><html><body><a href="/files/{WHEEL}">{WHEEL}</a></body></html>'.encode()
            self.send(request, 200, page, {"Content-Type": "text/html"}, body=body)
            return
        self.served += 1
        request.send_response(200)
        request.send_header("Content-Length", str(len(self.wheel)))
        request.end_headers()
        half = len(self.wheel) // 2
        request.wfile.write(self.wheel[:half])
        request.wfile.flush()
        self.half_sent.set()
        if self.cut:
            request.close_connection = True
            return
        if self.stall:
            self._wait(request)
        try:
            request.wfile.write(self.wheel[half:])
        except OSError:
            self.hung_up.set()
            request.close_connection = True

    def _wait(self, request: BaseHTTPRequestHandler) -> None:
        """Until told to go on, or until the other side hangs up."""
        request.connection.settimeout(0.05)
        while not self.go.is_set():
            try:
                if not request.connection.recv(1):
                    self.hung_up.set()
                    return
            except TimeoutError:
                continue
            except OSError:
                self.hung_up.set()
                return
        request.connection.settimeout(None)


@dataclass
class Repository:
    """A repository of the fake hub. `lfs` names are stored as large files, with their SHA-256."""

    files: dict[str, bytes]
    lfs: tuple[str, ...] = (".safetensors", ".gguf", ".bin", ".model")
    sha: str = "a" * 40
    licence: str = "apache-2.0"


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass
class HubFaults:
    """What goes wrong: `status` for the first `failures` calls of the API; for a file another body, etag or a cut."""

    failures: int = 0
    status: int = 500
    wrong: dict[str, bytes] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)
    etag: dict[str, str] = field(default_factory=dict)


class FakeHub(_Server):
    """The few endpoints of the Hugging Face Hub that fetching a model needs."""

    def __init__(self, repositories: Mapping[str, Repository], faults: HubFaults | None = None) -> None:
        super().__init__()
        self.repositories, self.faults = repositories, faults or HubFaults()
        self.requested: list[str] = []

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        self.requested.append(path)
        if path == "/api/models":
            self.send(request, 200, b"[]", {"Content-Type": "application/json"}, body=body)
        elif path.startswith("/api/models/"):
            self._api(request, path.removeprefix("/api/models/"), body=body)
        elif "/resolve/" in path:
            repo, _, rest = path[1:].partition("/resolve/")
            self._file(request, repo, rest.partition("/")[2], body=body)
        else:
            self.send(request, 404, b"", body=body)

    def _api(self, request: BaseHTTPRequestHandler, rest: str, *, body: bool) -> None:
        if self.faults.failures > 0:
            self.faults.failures -= 1
            self.send(request, self.faults.status, b"{}", body=body)
            return
        org, name, *tail = rest.split("/")
        repository = self.repositories.get(f"{org}/{name}")
        if repository is None:
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self.send(request, 404, b"{}", headers, body=body)
            return
        listing = [self._entry(repository, file, data) for file, data in repository.files.items()]
        answer: object = listing
        if not tail or tail[0] == "revision":
            siblings = [
                {
                    "rfilename": e["path"],
                    "size": e["size"],
                    "blobId": e["oid"],
                    **({"lfs": e["lfs"]} if "lfs" in e else {}),
                }
                for e in listing
            ]
            tags = [f"license:{repository.licence}"]
            answer = {
                "id": f"{org}/{name}",
                "sha": repository.sha,
                "siblings": siblings,
                "tags": tags,
                "private": False,
            }
        elif tail[0] == "tree":
            answer = [{"type": "file", **e} for e in listing]
        self.send(request, 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, body=body)

    @staticmethod
    def _entry(repository: Repository, name: str, data: bytes) -> dict[str, object]:
        entry: dict[str, object] = {"path": name, "size": len(data), "oid": git_sha1(data)}
        if name.endswith(repository.lfs):
            digest = sha256(data)
            entry["lfs"] = {"oid": digest, "sha256": digest, "size": len(data), "pointerSize": 130}
        return entry

    def _file(self, request: BaseHTTPRequestHandler, repo: str, name: str, *, body: bool) -> None:
        repository = self.repositories.get(repo)
        if repository is None or name not in repository.files:
            self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"}, body=body)
            return
        data = repository.files[name]
        digest = sha256(data) if name.endswith(repository.lfs) else git_sha1(data)
        headers = {"ETag": f'"{self.faults.etag.get(name, digest)}"', "X-Repo-Commit": repository.sha}
        data = self.faults.wrong.get(name, data)
        if body and name in self.faults.cut:
            request.send_response(200)
            for header, value in {**headers, "Content-Length": str(len(data))}.items():
                request.send_header(header, value)
            request.end_headers()
            request.wfile.write(data[: len(data) // 2])
            request.close_connection = True
            return
        start = request.headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
        if start.isdigit() and int(start):
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.send(request, 206, data[int(start) :], headers, body=body)
        else:
            self.send(request, 200, data, headers, body=body)

"""Loopback stand-ins for ModelScope, OpenXLab's git server, and the storage behind them, with faults to order."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from hub_fakes import _Server, git_sha1, sha256

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
LARGE = (".safetensors", ".gguf", ".bin", ".model")


@dataclass
class Faults:
    """What goes wrong.

    Attributes:
        api, file: statuses that the next calls of the interface, or for content, get before any good answer.
        retry_after: the header that goes with them.
        page: the interface answers with a web page.
        cut: for a file, after how many bytes each of its next answers breaks off.
        wrong: for a file, other content.
        announced: for a file, another Content-Length.
        trickle: for a file, seconds between its bytes.
        ranges: False where Range is ignored; a number where every continuation starts so many bytes too late.
        location: where content is redirected to, in place of the storage.
    """

    api: list[int] = field(default_factory=list)
    file: list[int] = field(default_factory=list)
    retry_after: str = ""
    page: bool = False
    cut: dict[str, list[int]] = field(default_factory=dict)
    wrong: dict[str, bytes] = field(default_factory=dict)
    announced: dict[str, int] = field(default_factory=dict)
    trickle: dict[str, float] = field(default_factory=dict)
    ranges: bool | int = True
    location: str = ""


class Storage(_Server):
    """Content by name, with ranges. Remembers path and headers of every request."""

    def __init__(self, faults: Faults | None = None) -> None:
        super().__init__()
        self.faults = faults or Faults()
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []

    def note(self, request: BaseHTTPRequestHandler) -> None:
        self.asked.append((unquote(request.path), {name.lower(): value for name, value in request.headers.items()}))

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        self.note(request)
        name = unquote(urlsplit(request.path).path)[1:]
        self.content(request, name, self.files.get(name), body=body)

    def content(self, request: BaseHTTPRequestHandler, name: str, data: bytes | None, *, body: bool) -> None:
        faults = self.faults
        if faults.file:
            self.refuse(request, faults.file.pop(0), body=body)
            return
        if data is None:
            self.refuse(request, 404, body=body)
            return
        data = faults.wrong.get(name, data)
        start = request.headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
        first = int(start) if start.isdigit() and faults.ranges is not False else 0
        status, headers = 200, {}
        if first:
            first += faults.ranges if faults.ranges is not True else 0
            status, headers = 206, {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
        part = data[first:]
        headers["Content-Length"] = str(faults.announced.get(name, len(part)))
        request.send_response(status)
        for header, value in headers.items():
            request.send_header(header, value)
        request.end_headers()
        cuts = faults.cut.get(name)
        if cuts:
            part = part[: cuts.pop(0)]
            request.close_connection = True
        if name in faults.announced:
            request.close_connection = True
        try:
            if name in faults.trickle:
                for byte in part:
                    request.wfile.write(bytes([byte]))
                    request.wfile.flush()
                    time.sleep(faults.trickle[name])
            else:
                request.wfile.write(part)
        except OSError:
            request.close_connection = True

    def refuse(self, request: BaseHTTPRequestHandler, status: int, *, body: bool) -> None:
        headers = {"Retry-After": self.faults.retry_after} if self.faults.retry_after else {}
        self.send(request, status, b"<html>no</html>", {"Content-Type": "text/html", **headers}, body=body)

    def redirect(self, request: BaseHTTPRequestHandler, location: str, *, body: bool) -> None:
        self.send(request, 302, b"", {"Location": location}, body=body)

    def tell(self, request: BaseHTTPRequestHandler, answer: object, *, body: bool) -> None:
        if self.faults.api:
            self.refuse(request, self.faults.api.pop(0), body=body)
        elif self.faults.page:
            self.send(request, 200, b"<html>Log in</html>", {"Content-Type": "text/html"}, body=body)
        elif answer is None:
            missing = json.dumps({"Code": 10010205001, "Message": "Not found", "Success": False}).encode()
            self.send(request, 404, missing, {"Content-Type": "application/json"}, body=body)
        else:
            self.send(request, 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, body=body)


class ModelScope(Storage):
    """`models`: id to revision to files. Content comes from `storage` by a redirect, where there is one."""

    def __init__(
        self,
        models: Mapping[str, Mapping[str, Mapping[str, bytes]]],
        faults: Faults | None = None,
        storage: Storage | None = None,
    ) -> None:
        super().__init__(faults)
        self.models, self.storage = models, storage
        self.extra: list[object] = []
        self.unhashed: set[str] = set()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        self.note(request)
        parts = urlsplit(request.path)
        path = unquote(parts.path).removeprefix("/api/v1/models/").split("/")
        asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
        revisions = self.models.get("/".join(path[:2]))
        if revisions is None or len(path) == 2:
            found = None if revisions is None else {"Name": path[1], "License": "Apache License 2.0", "Path": path[0]}
            self.tell(request, found and {"Code": 200, "Data": found, "Success": True}, body=body)
            return
        files = revisions.get(asked.get("Revision", "master"))
        if path[2:] == ["repo", "files"]:
            listed = None if files is None else [*map(self.entry, files, files.values()), *self.extra]
            self.tell(request, files and {"Code": 200, "Data": {"Files": listed}, "Success": True}, body=body)
            return
        name = asked.get("FilePath", "")
        data = (files or {}).get(name)
        if self.faults.location:
            self.redirect(request, self.faults.location, body=body)
        elif self.storage is not None and data is not None and name.endswith(LARGE):
            self.storage.files[name] = data
            self.redirect(request, f"{self.storage.url}/{name}?signature=x", body=body)
        else:
            self.content(request, name, data, body=body)

    def entry(self, name: str, data: bytes) -> dict[str, object]:
        digest = "" if name in self.unhashed else sha256(data)
        return {"Path": name, "Name": name.rpartition("/")[2], "Type": "blob", "Size": len(data), "Sha256": digest}


class OpenXLab(Storage):
    """`models`: id to files, on the branch `main`. `page` entries a page of the listing."""

    def __init__(
        self, models: Mapping[str, Mapping[str, bytes]], faults: Faults | None = None, page: int = 1000
    ) -> None:
        super().__init__(faults)
        self.models, self.page = models, page
        self.extra: list[object] = []

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        self.note(request)
        parts = urlsplit(request.path)
        path = unquote(parts.path).removeprefix("/api/v1/repos/").split("/")
        asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
        files = self.models.get("/".join(path[:2]))
        if files is None or len(path) == 2:
            self.tell(request, files and {"default_branch": "main"}, body=body)
        elif path[2:4] == ["git", "trees"]:
            entries = [self.entry(name, data) for name, data in files.items()] + self.extra
            first = (int(asked.get("page", 1)) - 1) * self.page
            shown = entries[first : first + self.page]
            tree = {"tree": shown, "truncated": first + len(shown) < len(entries)}
            self.tell(request, tree if path[4] == "main" else None, body=body)
        else:
            name = "/".join(path[3:])
            data = files.get(name)
            if path[2] == "raw" and data is not None and name.endswith(LARGE):
                data = POINTER.format(sha256(data), len(data)).encode()
            self.content(request, name, data, body=body)

    @staticmethod
    def entry(name: str, data: bytes) -> dict[str, object]:
        held = POINTER.format(sha256(data), len(data)).encode() if name.endswith(LARGE) else data
        return {"path": name, "mode": "100644", "type": "blob", "size": len(held), "sha": git_sha1(held)}

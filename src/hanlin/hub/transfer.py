"""One file from a hub to its place: continued where it broke off, and in place only when its hash is right."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hanlin.errors import DownloadError
from hanlin.hub.files import File
from hanlin.hub.web import PassingError, Site

if TYPE_CHECKING:
    import httpx

__all__ = ["arrived", "fetch", "partial", "right"]

_CHUNK = 1 << 20
_PROGRESS = 1 << 20  # an attempt that brought this much is no failure in a row
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)", re.IGNORECASE)


class _Digest:
    """The hash of a file as it grows, of the kind that the hub lists."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.restart()

    def restart(self) -> None:
        # The hubs name large files by their SHA-256, git's own by a SHA-1 of a header and the content.
        git = len(self.file.digest) == 40
        self.hash = hashlib.sha1(usedforsecurity=False) if git else hashlib.sha256()
        if git:
            self.hash.update(b"blob %d\0" % self.file.size)
        self.size = 0

    def add(self, data: bytes) -> None:
        self.hash.update(data)
        self.size += len(data)

    def right(self) -> bool:
        return self.size == self.file.size and self.file.digest in ("", self.hash.hexdigest())


def right(path: Path, file: File, tick: Callable[[int], None]) -> bool:
    """Whether the whole file at `path` is the listed one; `tick` gets the bytes read, a chunk at a time."""
    digest = _Digest(file)
    with path.open("rb") as content:
        while chunk := content.read(_CHUNK):
            digest.add(chunk)
            tick(len(chunk))
    return digest.right()


def partial(target: Path, file: File) -> Path:
    """Where the file grows. The name tells revisions apart, so that one is never continued with another."""
    return target.with_name(f"{target.name}.{file.digest[:12] or file.size}.incomplete")


def arrived(target: Path, file: File) -> int:
    """Bytes of the file that an earlier try left."""
    try:
        return min(partial(target, file).stat().st_size, file.size)
    except OSError:
        return 0


def fetch(
    site: Site, path: str, params: Mapping[str, str], target: Path, file: File, tick: Callable[[int], None]
) -> None:
    """Bring `file` to `target`. `tick` gets the bytes that came, a chunk at a time; negative when they were no good.

    Raises:
        DownloadError: the hub sends another length or another content, or nothing in several tries. Only bytes that
            may still be right are kept, beside the target.
        OSError: the disk refuses.
    """
    grown = partial(target, file)
    failures, resumed = 0, arrived(target, file) > 0
    digest = _Digest(file)
    _catch_up(grown, digest, tick)
    while True:
        before = digest.size
        try:
            if digest.size < file.size or not grown.exists():
                _continue(site, path, params, grown, digest, tick)
        except PassingError as error:
            failures = 1 if digest.size - before >= _PROGRESS else failures + 1
            if failures >= site.limits.attempts:
                raise DownloadError(f"{file.name}: {error} ({failures} tries)") from error
            site.rest(failures, error.after)
            continue
        if digest.right():
            break
        found = digest.hash.hexdigest()
        _start_over(grown, digest, tick)
        if not resumed:
            raise DownloadError(f"{file.name} has the hash {found}, the hub says {file.digest}")
        resumed = False  # what an earlier run left may have been broken: once more, all of it
    with grown.open("rb") as content:
        os.fsync(content.fileno())
    grown.replace(target)


def _catch_up(grown: Path, digest: _Digest, tick: Callable[[int], None]) -> None:
    """Take the bytes that an earlier run left into the digest; drop what cannot be the file's beginning."""
    if grown.is_symlink() or (grown.exists() and grown.stat().st_size > digest.file.size):
        grown.unlink()
    if not grown.exists():
        return
    with grown.open("rb") as content:
        while chunk := content.read(_CHUNK):
            digest.add(chunk)
            tick(len(chunk))


def _start_over(grown: Path, digest: _Digest, tick: Callable[[int], None]) -> None:
    tick(-digest.size)
    grown.unlink(missing_ok=True)
    digest.restart()


def _continue(
    site: Site, path: str, params: Mapping[str, str], grown: Path, digest: _Digest, tick: Callable[[int], None]
) -> None:
    """One request for the rest of the file. Whatever comes is on disk and in the digest."""
    file = digest.file
    headers = {"Range": f"bytes={digest.size}-"} if digest.size else {}
    with site.stream(path, params, headers) as response:
        if digest.size and not _follows(response, digest.size):
            _start_over(grown, digest, tick)
        if not digest.size and response.status_code != 200:
            raise PassingError(f"{site.name} does not continue where it was asked to")
        _announced(site, response, file, digest.size)
        with open(grown, "ab", opener=_no_link) as output:
            for chunk in site.chunks(response):
                if digest.size + len(chunk) > file.size:
                    raise DownloadError(f"{file.name} is longer than the {file.size} bytes that the hub lists")
                output.write(chunk)
                digest.add(chunk)
                tick(len(chunk))
        if digest.size < file.size:
            raise PassingError(f"the connection to {site.name} ended after {digest.size} of {file.size} bytes")


def _follows(response: httpx.Response, start: int) -> bool:
    found = _RANGE.fullmatch(response.headers.get("content-range", "").strip())
    return response.status_code == 206 and found is not None and int(found[1]) == start


def _announced(site: Site, response: httpx.Response, file: File, start: int) -> None:
    """Refuse a body of another length before any of it is read."""
    try:
        length = start + int(response.headers["content-length"])
    except (KeyError, ValueError):
        return
    if length != file.size:
        page = response.headers.get("content-type", "").startswith("text/html") and not file.name.endswith(".md")
        what = "a web page" if page else f"{length} bytes"
        raise DownloadError(f"{site.name} answers with {what} for {file.name}, where it lists {file.size} bytes")


def _no_link(path: str, flags: int) -> int:
    with suppress(AttributeError):
        flags |= os.O_NOFOLLOW  # Windows has none
    return os.open(path, flags, 0o666)

"""Asking one hub over HTTP: its token goes to that host alone, and every wait, answer and detour has a bound."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from hanlin.errors import DownloadError

if TYPE_CHECKING:
    from types import TracebackType

    import httpx
    from typing_extensions import Self

__all__ = ["Limits", "PassingError", "Site", "StatusError", "StoppedError"]

T = TypeVar("T")

_MOVED = (301, 302, 303, 307, 308)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of what a hub can make us wait for or keep. Times are in seconds, sizes in bytes.

    Attributes:
        connect, read: for one operation on a socket.
        attempts: tries that fail one after the other before a request is given up.
        pause, longest_pause: before the second try, doubling; at most, whatever the hub's Retry-After says.
        redirects: hops of one request.
        answer, answer_time: of an answer that is read into memory.
        slow_rate, slow_time: a body that brings fewer bytes a second, over that long, is a failure.
    """

    connect: float = 10.0
    read: float = 30.0
    attempts: int = 5
    pause: float = 0.5
    longest_pause: float = 60.0
    redirects: int = 5
    answer: int = 32 << 20
    answer_time: float = 60.0
    slow_rate: float = 1024.0
    slow_time: float = 60.0


class PassingError(DownloadError):
    """A failure that may pass: worth another try."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class StatusError(DownloadError):
    """An answer with an HTTP status that will not pass."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class StoppedError(Exception):
    """Another thread failed or was interrupted: this one ends too."""


class Site:
    """A hub at one address. Use it in a `with`; threads may share it.

    Args:
        endpoint: scheme, host and port.
        secret: headers that only this scheme, host and port may see.
        limits: how long and how much.
    """

    def __init__(self, endpoint: str, *, secret: Mapping[str, str] | None = None, limits: Limits | None = None) -> None:
        import httpx

        from hanlin import __version__

        self.limits = limits or Limits()
        self.stop = threading.Event()
        self._secret = dict(secret or {})
        try:
            self._endpoint = httpx.URL(endpoint)
        except (httpx.InvalidURL, TypeError) as error:
            raise DownloadError(f"{endpoint!r} is not the address of a hub: {error}") from error
        if self._endpoint.scheme not in ("http", "https") or not self._endpoint.host:
            raise DownloadError(f"{endpoint!r} is not the address of a hub, such as https://modelscope.cn")
        try:
            self._client = httpx.Client(
                headers={"User-Agent": f"hanlin/{__version__}", "Accept-Encoding": "identity"},
                timeout=httpx.Timeout(self.limits.read, connect=self.limits.connect),
                follow_redirects=False,
            )
        except (ValueError, ImportError, OSError) as error:  # what a proxy's variables or certificates say
            raise DownloadError(f"cannot go through this proxy, or with these certificates: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    @property
    def name(self) -> str:
        return str(self._endpoint.host)

    def json(self, path: str, params: Mapping[str, str] | None = None) -> Any:
        """The JSON that `path` answers with.

        Raises:
            StatusError, DownloadError: as `stream`; or it is too large, too slow or no JSON.
        """
        return self.persist(lambda: self._json(path, params or {}))

    def small(self, path: str, params: Mapping[str, str] | None = None, *, most: int) -> bytes:
        """The content of a file of at most `most` bytes."""

        def once() -> bytes:
            with self.stream(path, params or {}) as response:
                return self._read(response, most)

        return self.persist(once)

    def _json(self, path: str, params: Mapping[str, str]) -> Any:
        with self.stream(path, params) as response:
            data = self._read(response, self.limits.answer)
        if data[:512].lstrip()[:1] == b"<":
            raise DownloadError(
                f"{self.name} answered with a web page instead of data: is a proxy or a login page in between?"
            )
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DownloadError(f"{self.name} answered with something that is no JSON: {data[:80]!r}") from error

    def _read(self, response: httpx.Response, most: int) -> bytes:
        parts, size = [], 0
        until = time.monotonic() + self.limits.answer_time
        for chunk in self.chunks(response):
            size += len(chunk)
            if size > most:
                raise DownloadError(f"{self.name} answered with more than {most} bytes.")
            if time.monotonic() > until:
                raise PassingError(f"{self.name} took longer than {self.limits.answer_time:.0f} s to answer")
            parts.append(chunk)
        return b"".join(parts)

    def persist(self, call: Callable[[], T]) -> T:
        """`call`, again after a failure that may pass."""
        for failures in range(1, self.limits.attempts + 1):
            try:
                return call()
            except PassingError as error:
                if failures == self.limits.attempts:
                    raise DownloadError(f"{error} ({failures} tries).") from error
                self.rest(failures, error.after)
        raise AssertionError("the last attempt returns or raises")

    def rest(self, failures: int, after: float) -> None:
        """Wait before the next try, as long as the hub asked for or longer each time; ended early by `stop`."""
        own = self.limits.pause * 2 ** (failures - 1) * (1 + random.random() / 4)
        if self.stop.wait(min(max(own, after), self.limits.longest_pause)):
            raise StoppedError

    def chunks(self, response: httpx.Response) -> Iterator[bytes]:
        """The body as it comes. Raises PassingError when the connection breaks or brings next to nothing."""
        import httpx

        since, size = time.monotonic(), 0
        try:
            for chunk in response.iter_raw():
                if self.stop.is_set():
                    raise StoppedError
                yield chunk
                size += len(chunk)
                passed = time.monotonic() - since
                if passed > self.limits.slow_time:
                    if size < self.limits.slow_rate * passed:
                        raise PassingError(f"{self.name} sent {size} bytes in {passed:.0f} s")
                    since, size = time.monotonic(), 0
        except httpx.HTTPError as error:
            raise PassingError(f"the connection to {self.name} broke ({_named(error)})") from error

    @contextmanager
    def stream(
        self, path: str, params: Mapping[str, str], headers: Mapping[str, str] | None = None
    ) -> Iterator[httpx.Response]:
        """The answer to a GET, its body unread.

        A redirect is followed to any host, without the secret headers from the first foreign one on, and never from
        https to http.

        Raises:
            PassingError: no connection, or a status that may pass.
            StatusError: any other status from 400 on, 416 excepted.
            DownloadError: too many redirects, or one that is refused.
        """
        import httpx

        url = self._endpoint.copy_with(path=self._endpoint.path.rstrip("/") + path, params=dict(params))
        home = True
        for _ in range(self.limits.redirects + 1):
            home = home and _origin(url) == _origin(self._endpoint)
            request = self._client.build_request(
                "GET", url, headers={**(headers or {}), **(self._secret if home else {})}
            )
            try:
                response = self._client.send(request, stream=True)
            except httpx.InvalidURL as error:
                raise DownloadError(f"{self.name} leads to an impossible address: {error}") from error
            except httpx.UnsupportedProtocol as error:
                raise DownloadError(f"{self.name} cannot be asked: {error}") from error
            except httpx.HTTPError as error:
                raise PassingError(f"{url.host} cannot be reached ({_named(error)})") from error
            try:
                if response.status_code in _MOVED and "location" in response.headers:
                    url = self._next(url, response.headers["location"])
                    continue
                self._judge(response)
                yield response
                return
            finally:
                response.close()
        raise DownloadError(f"{self.name} redirects more than {self.limits.redirects} times.")

    def _next(self, url: httpx.URL, location: str) -> httpx.URL:
        import httpx

        try:
            new = url.join(location)
        except (httpx.InvalidURL, ValueError, TypeError) as error:
            raise DownloadError(f"{self.name} redirects to an impossible address: {error}") from error
        if new.scheme not in ("http", "https") or not new.host or new.userinfo:
            raise DownloadError(f"{self.name} redirects to {new.scheme}://{new.host}, which is refused.")
        if url.scheme == "https" and new.scheme == "http":
            raise DownloadError(f"{self.name} redirects from https to http ({new.host}), which is refused.")
        return new

    def _judge(self, response: httpx.Response) -> None:
        status = response.status_code
        if status in (408, 425, 429) or status >= 500:
            raise PassingError(
                f"{response.url.host} answers with HTTP {status}", _after(response.headers.get("retry-after"))
            )
        if status in (200, 206, 416):
            encoding = response.headers.get("content-encoding", "identity").lower()
            if encoding not in ("", "identity"):
                raise DownloadError(f"{response.url.host} sends {encoding} where plain bytes were asked for.")
            return
        raise StatusError(f"{response.url.host} answers with HTTP {status}", status)


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


def _named(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:200]}" if said else type(error).__name__


def _after(value: str | None) -> float:
    """Seconds of a Retry-After; a date is as good as none, for clocks differ."""
    try:
        return max(float(value or 0), 0.0)
    except ValueError:
        return 0.0

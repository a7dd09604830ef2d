"""One process at a time fetches a model; the others wait and find it there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hanlin.errors import DownloadError
from hanlin.hub.report import Report

__all__ = ["lock"]


@contextmanager
def lock(directory: Path, name: str, title: str, report: Report) -> Iterator[None]:
    """Hold the lock `name`, waiting for whoever has it. The system releases it with its holder, however that ends.

    Raises:
        DownloadError: the file system of `directory` has no locks.
        OSError: the directory cannot be made or written.
    """
    from filelock import FileLock, Timeout

    directory.mkdir(parents=True, exist_ok=True)
    file = FileLock(directory / f"{name}.lock")
    try:
        try:
            file.acquire(timeout=0)
        except Timeout:
            report.say(f"Another process is fetching {title}; waiting for it.")
            file.acquire(poll_interval=0.1)
    except NotImplementedError as error:
        raise DownloadError(
            f"{directory} is on a file system without locks.\nSet HANLIN_HOME to a directory on a local disk."
        ) from error
    try:
        yield
    finally:
        file.release()

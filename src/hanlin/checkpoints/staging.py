"""Where a large result is written until it is whole: kept when that is interrupted, so that it can go on.

A result lies in a hidden directory beside its target, with the plan that it follows. Who comes again with the same plan
gets what is there; with another one, an empty directory. Files written in pieces say of each piece where it ends and
its checksum; what does not have it any more is cut off and written again.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hanlin.errors import CheckpointError, ConfigError, HanlinError

__all__ = ["PieceFile", "Staging", "staged"]

_CHUNK = 1 << 24
_PLAN, _WRITTEN, _LOCK = "plan.json", "written", "lock"
_PIECES = ".pieces"


class Staging:
    """The hidden directory.

    Attributes:
        whole: where the result belongs in it.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self.whole = directory / name

    @property
    def written(self) -> bool:
        """Whether all of the result was written before; it may not have been compared."""
        return (self._directory / _WRITTEN).exists()

    def set_written(self) -> None:
        (self._directory / _WRITTEN).touch()

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Keep what is there if it follows the same plan, and nothing else."""
        path = self._directory / _PLAN
        text = json.dumps(plan, sort_keys=True, default=str)
        known = path.read_text(encoding="utf-8") if path.is_file() else None
        if known != text:
            self.clear()
            path.write_text(text, encoding="utf-8")

    def clear(self) -> None:
        """Remove everything but the lock."""
        for old in self._directory.iterdir():
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            elif old.name != _LOCK:
                old.unlink()

    def publish(self, target: Path) -> None:
        """Give the result its place."""
        if self.whole.is_dir():
            for left in self.whole.rglob(f"*{_PIECES}"):
                left.unlink()
        self.whole.rename(target)


@contextmanager
def staged(target: Path, plan: Mapping[str, Any]) -> Iterator[Staging]:
    """A staging directory for `target`, removed when its body ends or raises one of our errors.

    An interruption leaves it, and so does a full disk: the same call goes on there.

    Raises:
        ConfigError: another process writes there.
        CheckpointError: it can't be written.
    """
    from filelock import FileLock, Timeout

    directory = target.parent / f".{target.name}.converting"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / _LOCK, timeout=0):
            staging = Staging(directory, target.name)
            staging.begin(plan)
            yield staging
    except Timeout:
        raise ConfigError(f"{directory}: another process is writing there") from None
    except OSError as error:
        raise CheckpointError(
            f"{target}: could not be written: {error.strerror or error}. What is finished is kept in {directory}: the "
            "same command goes on."
        ) from error
    except HanlinError:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    shutil.rmtree(directory, ignore_errors=True)


class PieceFile:
    """A file that is written piece by piece, and goes on behind the last one that is whole.

    Attributes:
        notes: what was noted with each piece that is there.
        end: bytes that are there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[Any] = []
        self.end = 0
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._journal = path.with_name(path.name + _PIECES)
        kept = []
        for line, end, crc, note in self._recorded():
            if not self._sound(end, crc):
                break
            kept.append(line)
            self.notes.append(note)
            self.end = end
        self._journal.write_text("".join(kept), encoding="utf-8")
        self._file.truncate(self.end)
        self._file.seek(self.end)

    def write(self, buffers: Iterable[bytes | memoryview], note: Any = None) -> None:
        """Add a piece. `note` is a JSON value."""
        crc = 0
        for buffer in buffers:
            rest = memoryview(buffer)
            while rest:
                chunk, rest = rest[:_CHUNK], rest[_CHUNK:]
                crc = zlib.crc32(chunk, crc)
                self._file.write(chunk)
                self.end += len(chunk)
        self._file.flush()
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps([self.end, crc, note]) + "\n")
        self.notes.append(note)

    def close(self) -> None:
        """Have it on the disk, and close it."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def _recorded(self) -> Iterator[tuple[str, int, int, Any]]:
        if not self._journal.is_file():
            return
        for line in self._journal.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                end, crc, note = json.loads(line)
            except ValueError:
                return  # cut in the middle
            if not line.endswith("\n") or type(end) is not int or type(crc) is not int:
                return
            yield line, end, crc, note

    def _sound(self, end: int, crc: int) -> bool:
        self._file.seek(self.end)
        found, left = 0, end - self.end
        while left > 0:
            chunk = self._file.read(min(left, _CHUNK))
            if not chunk:
                return False
            found, left = zlib.crc32(chunk, found), left - len(chunk)
        return left == 0 and found == crc

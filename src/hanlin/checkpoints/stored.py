"""A file of weights on disk: read by position, or mapped. Every failure names the file and the remedy."""

from __future__ import annotations

import mmap
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hanlin.errors import CheckpointError

__all__ = ["StoredFile"]

_LFS_POINTER = b"version https://git-lfs"
# Linux reads at most 2 GB in one call.
_READ_AT_ONCE = 1 << 30


class StoredFile:
    """An open, regular, non-empty file.

    Tensors are read, not mapped: a file that shrinks while it is mapped kills the process, and mapped pages would count
    as memory beside the tensors made of them. Only `view`, for those who use the stored bytes as they are, maps.

    Raises:
        CheckpointError: missing, unreadable, empty, not a file, or a Git LFS pointer in place of the real file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._mapping: mmap.mmap | None = None
        with self._told():
            # Opening a pipe would wait for ever, so look before.
            if not stat.S_ISREG(path.stat().st_mode):
                raise CheckpointError(f"{path}: this is not a file")
            self._file = path.open("rb", buffering=0)
            try:
                self.size = os.fstat(self._file.fileno()).st_size
                self.start = self._file.read(512)
                self._check()
            except BaseException:
                self._file.close()
                raise

    def _check(self) -> None:
        if not self.start:
            raise CheckpointError(f"{self.path}: the file is empty. Fetch it again.")
        if self.start.startswith(_LFS_POINTER):
            raise CheckpointError(
                f"{self.path}: this is a Git LFS pointer, not the file itself: the clone was made without Git LFS.\n"
                "Run `git lfs install && git lfs pull` in the clone, or fetch the model with `hanlin pull`."
            )

    def read(self, offset: int, nbytes: int) -> bytes:
        data = bytearray(nbytes)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`, of bytes, from byte `offset` on. Safe from several threads."""
        rest = buffer
        with self._told(), self._lock:
            self._file.seek(offset)
            while rest:
                count = self._file.readinto(rest[:_READ_AT_ONCE])
                if not count:
                    raise CheckpointError(
                        f"{self.path}: the file ends {len(rest):,} bytes too early at byte {self._file.tell():,}: "
                        "it was cut while it was open. Fetch it again."
                    )
                rest = rest[count:]

    def map(self) -> mmap.mmap:
        """The whole file, read-only."""
        with self._told(), self._lock:
            if self._mapping is None:
                self._mapping = mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_READ)
            return self._mapping

    def view(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """Bytes of the mapped file, without a copy; they stay valid after `close`."""
        return np.frombuffer(self.map(), np.uint8, nbytes, offset)

    def forget(self) -> None:
        """Let go of the mapped pages that were touched: they count as memory. Touched again, they come back."""
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def state(self) -> dict[str, tuple[int, ...]]:
        """By its path, what changes when the file's content does: which file it is, its size and its times.

        Of the file that is open, whatever stands at its path by now. The change time can't be set by programs.
        """
        with self._told():
            now = os.fstat(self._file.fileno())
            path = str(self.path.resolve())
        return {path: (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)}

    def close(self) -> None:
        self._file.close()
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            # Views that are still in use hold the mapping; it goes with the last of them.
            with suppress(BufferError):
                mapping.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            what = "the link leads nowhere" if self.path.is_symlink() else "there is no such file"
            raise CheckpointError(f"{self.path}: {what}. Fetch it again.") from None
        except PermissionError:
            raise CheckpointError(f"{self.path}: no permission to read it. Run: chmod +r {str(self.path)!r}") from None
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror or error}") from error

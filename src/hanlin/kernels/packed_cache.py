"""Packed weights on disk: written behind a load, checked and mapped by the next one.

A file is the image of an arena, in whole pages, and a trailer of fixed size. Nothing in it is interpreted. Everything
that decides about a byte of the image is in the key: the model's files and their state, the plan of the weights, the
program that packs, the CPU. So a file is what a load would make, or it is not used, and written anew.

Every use checks every byte. That costs what reading the file from the page cache costs, puts the pages in place for the
first step, and is done by threads of its own while the tokenizer is built. Checked are 64-bit sums of all rows and all
columns of words, a page to a row, hashed: they find any three wrong words, and chance fools them once in 2^128. They
are no defence against somebody who writes to the folder, who could as well replace the models.

Mapping beats reading: pages are shared with other processes and with the page cache, and none has to be copied. That
holds where the file system keeps files in huge pages (XFS, Btrfs, ext4 from Linux 6.16), as large writes make it. Out
of small pages decoding is a tenth slower, so there the map is copied into an arena, if that gets huge pages.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import stat
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import dropwhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanlin.errors import CheckpointError
from hanlin.kernels.native import Arena, add_sums, default_threads, huge_pages

__all__ = ["PAGE", "Found", "PackedCache", "PackedImage", "PackedKey", "digest_of_files", "sums_of"]

PAGE = 4096
_CHUNK = 1 << 24  # written at once: large writes make the page cache use huge pages
_PIECE = 1 << 26  # checked at once: every piece waits for Python's lock, which the tokenizer's building holds for long
_VERSION = 1
_MAGIC = b"HANLINPW"
_TRAILER = struct.Struct("<8sIIQ32s32s")  # magic, version, page, size, key, sums; then the hash of these
_SEAL = 32
_RESERVE = 1 << 30  # bytes that stay free on the disk at least
_FORMS = 3  # files of one model: kinds of weights in turn; those of older versions of this package fall out
_DONT_NEED, _HUGE_PAGE, _POPULATE_READ = 4, 14, 22  # of Linux's madvise


@dataclass(frozen=True, kw_only=True)
class PackedKey:
    """What a file of packed weights was made of.

    Attributes:
        model: tells which files the weights came from.
        state: tells the state that these files were in.
        form: tells everything else that decides about the bytes.
    """

    model: bytes
    state: bytes
    form: bytes

    @classmethod
    def of(cls, model: object, state: object, form: Iterable[object]) -> PackedKey:
        """From plain values: strings, numbers, bytes, and tuples of them."""
        parts = (repr(model), repr(state), "\0".join(map(repr, (*form, sys.byteorder, sys.platform))))
        return cls(**{n: blake2b(p.encode(), digest_size=16).digest() for n, p in zip(_PARTS, parts, strict=True)})

    @property
    def digest(self) -> bytes:
        return blake2b(self.model + self.state + self.form, digest_size=32).digest()

    @property
    def name(self) -> str:
        return "-".join(part.hex()[:16] for part in (self.model, self.state, self.form)) + _SUFFIX


_PARTS = ("model", "state", "form")
_SUFFIX, _UNFINISHED = ".packed", ".part"


def digest_of_files(paths: Iterable[Path]) -> bytes:
    """A digest of what files hold, by name; those that cannot be read count as empty."""
    found = blake2b(digest_size=16)
    for path in sorted(paths):
        content = b""
        with suppress(OSError):
            content = path.read_bytes()
        found.update(f"{path.name} {len(content)} ".encode() + content)
    return found.digest()


class Found:
    """Stored weights, which must not be used before `sound` has said yes.

    Attributes:
        arena: the weights.
    """

    def __init__(self, path: Path, image: NDArray[np.uint8], sums: bytes, *, kept: bool = False) -> None:
        """`image` is a map of the file; it is copied, if it lies in small pages.

        `kept`: the file is a model's own: it is not removed when it is damaged, but refused.
        """
        self._path, self._expected, self._kept = path, sums, kept
        self._sums = _Sums(len(image))
        _advise(image, _HUGE_PAGE)
        copied = _in_small_pages(image)
        self.arena = Arena(len(image)) if copied else Arena(len(image), image)
        to = np.frombuffer(self.arena.whole, np.uint8)

        def check(start: int) -> None:
            piece = image[start : start + _PIECE]
            _populate(piece)
            if copied:
                to[start : start + _PIECE] = piece
                _advise(piece, _DONT_NEED)
            self._sums.add(start, to[start : start + _PIECE])

        threads = ThreadPoolExecutor(default_threads(), "hanlin-packed-check")
        self._checks = [threads.submit(check, start) for start in range(0, len(image), _PIECE)]
        threads.shutdown(wait=False)

    def sound(self) -> bool:
        """Wait until all is checked, and tell whether it is what was stored. If not, the file is removed.

        Raises:
            CheckpointError: it is not, and the file is a model's own.
        """
        try:
            for check in self._checks:
                check.result()
            right = self._sums.digest() == self._expected
        except OSError:  # the disk can't deliver it
            right = False
        if not right and self._kept:
            raise CheckpointError(f"{self._path}: the packed weights are damaged. Copy or convert the model again.")
        if not right:
            _remove(self._path)
        return right


@dataclass(frozen=True, kw_only=True)
class PackedImage:
    """Packed weights in a model's own file, at whole pages.

    Attributes:
        layout: what they were laid out as; an image of another layout is not used.
    """

    path: Path
    offset: int
    size: int
    sums: bytes
    layout: bytes

    def find(self, layout: bytes, size: int) -> Found | None:
        """The same as `PackedCache.find`.

        Raises:
            CheckpointError: the file can't be mapped.
        """
        if (layout, size) != (self.layout, self.size):
            return None
        try:
            with self.path.open("rb", buffering=0) as file:
                mapping = mmap.mmap(file.fileno(), self.offset + size, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: cannot be mapped: {error}") from error
        return Found(self.path, np.frombuffer(mapping, np.uint8, size, self.offset), self.sums, kept=True)


def sums_of(image: NDArray[np.uint8], after: Callable[[], None] = lambda: None) -> bytes:
    """The sums of an image, for `PackedImage`; `after` is called when a piece of it was read."""
    sums = _Sums(len(image))
    for start in range(0, len(image), _PIECE):
        sums.add(start, image[start : start + _PIECE])
        after()
    return sums.digest()


class _Sums:
    """Sums of the rows and the columns of an image, gathered piece by piece, in any order, by any number of threads."""

    def __init__(self, size: int) -> None:
        self._rows = np.zeros(size // PAGE, np.uint64)
        self._columns = np.zeros(PAGE // 8, np.uint64)
        self._lock = threading.Lock()

    def add(self, start: int, piece: NDArray[np.uint8]) -> None:
        words, columns = piece.view(np.uint64).reshape(-1, PAGE // 8), np.zeros(PAGE // 8, np.uint64)
        add_sums(words, self._rows[start // PAGE : start // PAGE + len(words)], columns)
        with self._lock:
            self._columns += columns

    def digest(self) -> bytes:
        return blake2b(self._rows.tobytes() + self._columns.tobytes(), digest_size=32).digest()


class PackedCache:
    """A folder of packed weights, shared by any number of processes. Whatever goes wrong, there is just no file.

    Args:
        folder: made when it is first needed.
        limit: bytes that all files may take; the least recently used ones go first.
        least: bytes below which an arena is not worth a file.
    """

    def __init__(self, folder: Path, *, limit: int = 32 << 30, least: int = 0) -> None:
        self.folder, self.limit, self.least = folder, limit, least
        self._writer: threading.Thread | None = None
        self._stop = threading.Event()

    def find(self, key: PackedKey, size: int) -> Found | None:
        """What was stored under `key`, of `size` bytes, while it is still being checked; None when there is nothing.

        A file that is not what it should be is removed.
        """
        path = self.folder / key.name
        try:
            mapped = _mapped(path, key, size)
            if mapped is None:
                _remove(path)
                return None
            found = Found(path, *mapped)
        except (OSError, ValueError):
            return None
        with suppress(OSError):
            os.utime(path)  # used last now
        return found

    def store(self, key: PackedKey, arena: Arena) -> None:
        """Write an arena that won't change any more to its file, behind the caller's back."""
        if arena.size < self.least:
            return
        self.close()
        self._stop.clear()
        # Not a daemon: a program that answers one question and ends would never get its file.
        self._writer = threading.Thread(target=self._write, args=(key, arena.whole), name="hanlin-packed-cache")
        self._writer.start()

    def close(self) -> None:
        """Wait until what is being written is written. An interrupt gives it up."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.join()
            except BaseException:
                self._stop.set()
                raise

    def _write(self, key: PackedKey, image: memoryview) -> None:
        with suppress(OSError):  # the model may be answering already; only Linux has priorities of threads
            if sys.platform == "linux":
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        with suppress(OSError, NotImplementedError), self._alone() as alone:
            # Somebody who was faster has written the same.
            if alone and not (self.folder / key.name).exists() and self._make_room(key, len(image)):
                self._replace(key, image)

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether this process alone writes to the folder now. Another that loads the same need not write it too."""
        from filelock import FileLock, Timeout

        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                yield True
        except Timeout:
            yield False

    def _make_room(self, key: PackedKey, size: int) -> bool:
        """Remove what can't be used any more and, beyond the limit, what was used least recently."""
        for left in self.folder.glob(f"*{_UNFINISHED}"):
            left.unlink()  # nobody else writes now: its writer has died
        if size > self.limit:
            return False
        total, forms = size, 1
        same, now = key.name.split("-")[:2]
        found = [(path.stat(), path) for path in self.folder.glob(f"*-*-*{_SUFFIX}")]
        for about, path in sorted(found, key=lambda item: -item[0].st_mtime):  # what was used last first
            model, state, *_ = path.name.split("-")
            forms += model == same
            outdated = model == same and (state != now or forms > _FORMS)
            if outdated or total + about.st_size > self.limit:
                path.unlink()
            else:
                total += about.st_size
        disk = shutil.disk_usage(self.folder)
        return disk.free - size >= max(_RESERVE, disk.total // 20)

    def _replace(self, key: PackedKey, image: memoryview) -> None:
        """Write to a file beside it, then rename: whoever looks sees a whole file or none."""
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=_UNFINISHED)
        unfinished = Path(name)
        try:
            with open(handle, "wb", buffering=0) as file:  # noqa: PTH123 (a descriptor)
                sums = _Sums(len(image))
                for start in range(0, len(image), _CHUNK):
                    if self._stop.is_set():
                        raise InterruptedError
                    chunk = image[start : start + _CHUNK]
                    sums.add(start, np.frombuffer(chunk, np.uint8))
                    _write_all(file, chunk)
                _write_all(file, _trailer(key, len(image), sums.digest()))
                os.fsync(file.fileno())
            unfinished.replace(self.folder / key.name)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink()
            raise
        _sync_folder(self.folder)


def _write_all(file: Any, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _sync_folder(folder: Path) -> None:
    """Make a rename last; not every system can open folders."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _trailer(key: PackedKey, size: int, sums: bytes) -> bytes:
    fields = _TRAILER.pack(_MAGIC, _VERSION, PAGE, size, key.digest, sums)
    return fields + blake2b(fields, digest_size=_SEAL).digest()


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _mapped(path: Path, key: PackedKey, size: int) -> tuple[NDArray[np.uint8], bytes] | None:
    """The image in a file, in memory that is the file's until it is written to, and what its sums should be.

    Returns:
        None for a file that is not finished, or another one.

    Raises:
        OSError: no file, or it can't be read at all.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
        return None
    with path.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != size + _TRAILER.size + _SEAL:
            return None
        file.seek(size)
        trailer = file.read()
        sums = trailer[_TRAILER.size - 32 : _TRAILER.size]
        if trailer != _trailer(key, size, sums):
            return None
        mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    return np.frombuffer(mapping, np.uint8), sums


def _in_small_pages(image: NDArray[np.uint8]) -> bool:
    """Whether a map lies in small pages where fresh memory would lie in huge ones; no, if the system does not tell."""
    if not huge_pages():
        return False
    first = image[:_PIECE]
    start = f"{image.ctypes.data:x}-"
    with suppress(OSError):
        _populate(first)
        with Path("/proc/self/smaps").open(encoding="utf-8", errors="replace") as lines:
            for line in dropwhile(lambda line: not line.startswith(start), lines):
                name, _, value = line.partition(":")
                if name == "FilePmdMapped":
                    return int(value.split()[0]) * 1024 < len(first) // 2
    return False


def _populate(piece: NDArray[np.uint8]) -> None:
    """Have pages of a map read from the disk, where an error is an error: touching them, it would end the process.

    Raises:
        OSError: the disk can't deliver them.
    """
    if _advise(piece, _POPULATE_READ) not in (0, errno.EINVAL):  # not known to Linux before 5.14
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def _advise(piece: NDArray[np.uint8], advice: int) -> int:
    """madvise on whole pages, without Python's lock; its error number."""
    if sys.platform != "linux":
        return 0
    call = ctypes.CDLL(None, use_errno=True).madvise
    failed = call(ctypes.c_void_p(piece.ctypes.data), ctypes.c_size_t(piece.size), ctypes.c_int(advice))
    return ctypes.get_errno() if failed else 0

"""Packed weights on disk: written behind a load, checked and mapped by the next one.

A file is the image of an arena, in whole pages, and a trailer of fixed size. Nothing in it is interpreted. Everything
that decides about a byte of the image is in the key: the model's files and their state, the plan of the weights, the
program that packs, the CPU. So a file is what a load would make, or it is not used, and written anew.

Every use checks every byte. That costs about what reading the file from the page cache costs, and puts the pages in
place, so the first step finds them there. Checked are 64-bit sums of all rows and of all columns of words, 4 KiB to a
row, hashed: they find any three wrong words in a mebibyte, and chance fools them once in 2^128. They are no defence
against somebody who writes to the folder, who could as well replace the models.

Mapping beats reading: pages are shared with other processes and with the page cache, and none has to be copied. That
holds where the file system keeps files in huge pages (XFS, Btrfs, ext4 from Linux 6.16), as large writes make it. Out
of small pages decoding is a tenth slower, so there the map is copied into an arena, if that gets huge pages.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import stat
import struct
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import dropwhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanlin.kernels.native import Arena, default_threads, huge_pages

__all__ = ["PAGE", "PackedCache", "PackedKey", "digest_of_files"]

PAGE = 4096
_PIECE = 1 << 20  # summed at once: stays in a core's cache
_CHUNK = 1 << 24  # given to a thread, and to a write, at once: large writes make the page cache use huge pages
_VERSION = 1
_MAGIC = b"HANLINPW"
_TRAILER = struct.Struct("<8sIIQ32s32s")  # magic, version, page, size, key, sums; then the hash of these
_SEAL = 32
_RESERVE = 1 << 30  # bytes that stay free on the disk at least
_FORMS = 3  # files of one model: kinds of weights in turn; those of older versions of this package fall out
_POPULATE_READ = 22  # of madvise, Linux 5.14 and later; Python has no name for it


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

    def find(self, key: PackedKey, size: int) -> Arena | None:
        """The arena of `size` bytes that was stored under `key`, checked; None when there is none.

        A file that is not what it should be is removed.
        """
        path = self.folder / key.name
        try:
            memory = _mapped(path, key, size)
            if memory is None:
                path.unlink(missing_ok=True)
                return None
        except (OSError, ValueError):
            return None
        with suppress(OSError):
            os.utime(path)  # used last now
        if not _small_pages(memory):
            return Arena(size, memory)
        arena = Arena(size)
        _copy(memory, np.frombuffer(arena.whole, np.uint8))
        return arena

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
                sums = blake2b(digest_size=32)
                for start in range(0, len(image), _CHUNK):
                    if self._stop.is_set():
                        raise InterruptedError
                    chunk = image[start : start + _CHUNK]
                    sums.update(_summed(np.frombuffer(chunk, np.uint8)))
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


def _mapped(path: Path, key: PackedKey, size: int) -> NDArray[np.uint8] | None:
    """The image in a file, in memory that is the file's until it is written to; None when anything about it is wrong.

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
    image = np.frombuffer(mapping, np.uint8)
    return image if _sums(mapping, image) == sums else None


def _sums(mapping: mmap.mmap, image: NDArray[np.uint8]) -> bytes | None:
    """The sums of an image, computed by all threads; None where the disk can't deliver it."""
    _advise(mapping, "MADV_HUGEPAGE", 0, len(image))

    def summed(start: int) -> bytes:
        chunk = image[start : start + _CHUNK]
        _populate(mapping, start, len(chunk))
        return _summed(chunk)

    found = blake2b(digest_size=32)
    try:
        with ThreadPoolExecutor(default_threads()) as threads:
            for part in threads.map(summed, range(0, len(image), _CHUNK)):
                found.update(part)
    except OSError:
        return None
    return found.digest()


def _small_pages(image: NDArray[np.uint8]) -> bool:
    """Whether a map lies in small pages where fresh memory would lie in huge ones; no, if the system does not tell."""
    if not huge_pages():
        return False
    with suppress(OSError), Path("/proc/self/smaps").open(encoding="utf-8", errors="replace") as lines:
        start = f"{image.ctypes.data:x}-"
        for line in dropwhile(lambda line: not line.startswith(start), lines):
            name, _, value = line.partition(":")
            if name == "FilePmdMapped":
                return int(value.split()[0]) * 1024 < len(image) // 2
    return False


def _copy(source: NDArray[np.uint8], to: NDArray[np.uint8]) -> None:
    def copy(start: int) -> None:
        to[start : start + _CHUNK] = source[start : start + _CHUNK]

    with ThreadPoolExecutor(default_threads()) as threads:
        list(threads.map(copy, range(0, len(to), _CHUNK)))


def _populate(mapping: mmap.mmap, start: int, size: int) -> None:
    """Have pages read from the disk, where an error is an error: touching a page that can't be read ends the process.

    Raises:
        OSError: the disk can't deliver them.
    """
    if sys.platform == "linux":
        try:
            mapping.madvise(_POPULATE_READ, start, size)
        except OSError as error:
            if error.errno != errno.EINVAL:  # an older Linux
                raise


def _advise(mapping: mmap.mmap, advice: str, start: int, size: int) -> None:
    if hasattr(mmap, advice):
        with suppress(OSError):
            mapping.madvise(getattr(mmap, advice), start, size)


def _summed(chunk: NDArray[np.uint8]) -> bytes:
    """The hashed sums of whole pages."""
    parts = []
    for start in range(0, len(chunk), _PIECE):
        words = chunk[start : start + _PIECE].view(np.uint64).reshape(-1, PAGE // 8)
        parts.append(np.concatenate((words.sum(1), words.sum(0))).tobytes())
    return blake2b(b"".join(parts), digest_size=32).digest()

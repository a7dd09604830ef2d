"""The machine in words, and how fast it reads memory."""

from __future__ import annotations

import ctypes
import importlib.metadata
import mmap
import os
import platform
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from hanlin.errors import CapacityError
from hanlin.options import free_memory

__all__ = ["cores", "describe", "read_bandwidth"]

_KNOWN = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimddp", "i8mm", "sve")


def cores() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(packages: Sequence[str] = ("torch",)) -> str:
    """CPU, the instruction sets that matter, cores, memory, system, Python and some packages, on one line."""
    values = _processor()
    name = values.get("model name") or platform.processor() or platform.machine()
    family = f" (family {values['cpu family']}, model {values['model']})" if "cpu family" in values else ""
    flags = (values.get("flags") or values.get("Features") or "").split()
    parts = [f"{name}{family}", f"{cores()} cores", *(flag for flag in _KNOWN if flag in flags)]
    if hasattr(os, "sysconf"):
        parts.append(f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB")
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    return f"{', '.join(parts)}; {', '.join([platform.system(), f'Python {platform.python_version()}', *versions])}"


def read_bandwidth(size: int = 1 << 29, passes: int = 4, threads: int | None = None) -> float:
    """GB/s at which `threads` threads (by default one a core) read memory, in huge pages if granted; the best pass.

    They search `size` bytes for one that isn't there, with the C library's memchr, which reads as fast as memory gives.

    Raises:
        CapacityError: when there is no such memory to spare.
    """
    if free_memory() < 2 * size:
        raise CapacityError(f"measuring the memory's speed takes {size / 2**20:.0f} MiB, and as much left free")
    library = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
    search = library.memchr
    search.argtypes, search.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p
    count = threads or cores()
    part = size // count
    best = 0.0
    with mmap.mmap(-1, size) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        view = (ctypes.c_char * size).from_buffer(memory)
        start = ctypes.addressof(view)
        ctypes.memset(start, 1, size)
        for _ in range(passes):
            readers = [threading.Thread(target=search, args=(start + n * part, 0, part)) for n in range(count)]
            began = time.perf_counter()
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join()
            best = max(best, part * count / (time.perf_counter() - began) / 1e9)
        del view  # the mapping can't be closed under it
    return best


def _processor() -> dict[str, str]:
    """What Linux says of the last CPU; nothing on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}

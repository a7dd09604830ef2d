"""The CPU library through ctypes: contexts, packed weights in huge pages, products.

`cpu/hanlin_cpu.h` is the reference for layouts, kinds and the promise that a row's result does not depend on its
company. Arrays are numpy arrays or torch tensors on the CPU, contiguous; they are handed over by pointer, so torch is
never imported here.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import os
import sys
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from hanlin.errors import CapacityError, CheckpointError, ConfigError, EngineError, problems

__all__ = [
    "ABI_VERSION",
    "ADD",
    "GELU",
    "LAYOUT_VERSION",
    "SILU_MUL",
    "TILE",
    "Arena",
    "Context",
    "Kind",
    "PackedWeight",
    "Source",
    "add_sums",
    "available",
    "describe",
    "huge_pages",
    "library_path",
    "packed_bytes",
    "unavailable_reason",
]

ABI_VERSION = 5
LAYOUT_VERSION = 2  # of the packed layouts, which are in files too: another one for other bytes of the same weight
TILE = 32  # outputs that are stored together
ADD, SILU_MUL, GELU = 1, 2, 4  # what happens to a product before it is written

ISA_VARIABLE = "HANLIN_CPU_ISA"
_ALIGNMENT = 64


class Kind(enum.IntEnum):
    """How a packed weight is stored; see hl_kind."""

    F32 = 0
    BF16 = 1
    INT8_ROW = 2
    INT8 = 3
    INT4 = 4
    INT4_MIN = 5
    INT4_ZERO = 6

    @property
    def grouped(self) -> bool:
        return self >= Kind.INT8

    @property
    def offsets(self) -> bool:
        """Whether a group has a minimum or a zero point beside its scale."""
        return self >= Kind.INT4_MIN


class Source(enum.IntEnum):
    """What `PackedWeight.pack` reads; see hl_source."""

    F32 = 0
    F16 = 1
    BF16 = 2
    Q4_0 = 3
    Q4_1 = 4
    Q8_0 = 5


class _Block(NamedTuple):
    kind: Kind
    bytes: int  # of 32 values


_BLOCKS = {
    Source.Q4_0: _Block(Kind.INT4, 18),
    Source.Q4_1: _Block(Kind.INT4_MIN, 20),
    Source.Q8_0: _Block(Kind.INT8, 34),
}
_FLOATS = {"float32": Source.F32, "float16": Source.F16, "bfloat16": Source.BF16}


class Weight(ctypes.Structure):
    """hl_weight"""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("out", ctypes.c_int64),
        ("in_", ctypes.c_int64),
        ("data", ctypes.c_void_p),
    )


# ---- the library ----------------------------------------------------------------------------------------------------


def library_path() -> Path:
    """Where the compiled library is expected: beside this file."""
    name = {"win32": "hanlin_cpu.dll", "darwin": "libhanlin_cpu.dylib"}.get(sys.platform, "libhanlin_cpu.so")
    return Path(__file__).with_name(name)


_P, _I32, _I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "hl_abi_version": (_I32, ()),
    "hl_last_error": (ctypes.c_char_p, ()),
    "hl_isa_count": (_I32, ()),
    "hl_isa_list": (ctypes.c_char_p, (_I32,)),
    "hl_isa_supported": (_I32, (ctypes.c_char_p,)),
    "hl_open": (_I32, (_I32, ctypes.c_char_p, ctypes.POINTER(_P))),
    "hl_close": (None, (_P,)),
    "hl_isa_name": (ctypes.c_char_p, (_P,)),
    "hl_threads": (_I32, (_P,)),
    "hl_alloc": (_I32, (_I64, ctypes.POINTER(_P))),
    "hl_free": (None, (_P, _I64)),
    "hl_sums": (_I32, (_P, _I64, _I64, _P, _P)),
    "hl_packed_bytes": (_I64, (_I32, _I64, _I64, _I32)),
    "hl_pack": (_I32, (_P, ctypes.POINTER(Weight), _I32, _P, _I64, _I64, _P, ctypes.POINTER(_I64))),
    "hl_pack_codes": (_I32, (_P, ctypes.POINTER(Weight), _P, _P, _P, _I64, _I64, _P, ctypes.POINTER(_I64))),
    "hl_unpack": (_I32, (_P, ctypes.POINTER(Weight), _P, _I64, _P, _I64)),
    "hl_linear": (_I32, (_P, ctypes.POINTER(Weight), _P, _I64, _I64, _P, _I64, _P, _I32)),
}


@functools.cache  # the system keeps one copy of a library anyway; this keeps the warning to one
def _load() -> tuple[ctypes.CDLL | None, str]:
    path = library_path()
    reason = ""
    if not path.exists():
        reason = (
            f"{path.name} was not built; reinstall with a C++17 compiler, "
            "or run `python -m hanlin.kernels.build` in a checkout"
        )
    else:
        try:
            library = ctypes.CDLL(str(path))
            version = int(library.hl_abi_version())
        except (OSError, AttributeError) as error:
            reason = f"{path.name} cannot be loaded ({error}); rebuild it"
        else:
            if version != ABI_VERSION:
                reason = f"{path.name} is of version {version}, this package needs {ABI_VERSION}; rebuild it"
    if reason:
        warnings.warn(
            f"The native CPU kernels are not available: {reason}. Models run on plain torch, slower.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None, reason
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library, ""


def available() -> bool:
    """Whether the compiled library is there. Warns once when it is not."""
    return _load()[0] is not None


def unavailable_reason() -> str | None:
    """Why `available()` is False, with the remedy; None when it is True."""
    return _load()[1] or None


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise ConfigError(f"The native CPU kernels are not available: {reason}")
    return library


def _check(library: ctypes.CDLL, status: int) -> None:
    if status >= 0:
        return
    message = library.hl_last_error().decode()
    errors = {-1: ConfigError, -2: ConfigError, -3: CapacityError, -4: CheckpointError}
    raise errors.get(status, EngineError)(message)


def compiled_isas() -> list[str]:
    """The instruction sets that this build holds, best first."""
    library = _library()
    return [library.hl_isa_list(index).decode() for index in range(library.hl_isa_count())]


def supported_isas() -> list[str]:
    """Those of them that this CPU can run, best first."""
    library = _library()
    return [name for name in compiled_isas() if library.hl_isa_supported(name.encode())]


def default_threads() -> int:
    """The CPUs that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def huge_pages() -> bool:
    """Whether the system grants huge pages to memory that asks for them."""
    setting = ""
    with contextlib.suppress(OSError):
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().partition("[")[2].partition("]")[0]
    return setting in ("always", "madvise")


def describe() -> dict[str, Any]:
    """For `hanlin doctor`: what is compiled, what this CPU can run, what would be used."""
    found: dict[str, Any] = {"available": available(), "library": str(library_path()), "reason": unavailable_reason()}
    if not found["available"]:
        return found
    forced = os.environ.get(ISA_VARIABLE)
    supported = supported_isas()
    return found | {
        "compiled": compiled_isas(),
        "supported": supported,
        "isa": forced or supported[0],
        "threads": default_threads(),
        "huge_pages": huge_pages(),
    }


# ---- arrays by pointer ----------------------------------------------------------------------------------------------


@functools.cache  # a step asks for the same few again and again, and numpy takes long to say
def _name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(array: Any) -> str:
    return _name_of(array.dtype)


def _pointer(array: Any, name: str, dtypes: Sequence[str], shape: tuple[int, ...] | None = None) -> int:
    """The address of a contiguous array on the CPU, of one of `dtypes` and of `shape`.

    Raises:
        ConfigError: naming everything about the array that does not fit.
    """
    found = []
    if _dtype(array) not in dtypes:
        found.append(f"dtype must be {' or '.join(dtypes)}, not {_dtype(array)}")
    if shape is not None and tuple(array.shape) != shape:
        found.append(f"shape must be {shape}, not {tuple(array.shape)}")
    if hasattr(array, "data_ptr"):
        if array.device.type != "cpu":
            found.append(f"must be on the CPU, not on {array.device}")
        elif not array.is_contiguous():
            found.append("must be contiguous")
        address = int(array.data_ptr()) if not found else 0
    else:
        if not array.flags.c_contiguous:
            found.append("must be contiguous")
        address = int(array.ctypes.data)
    if found:
        raise ConfigError(problems(name, found))
    return address


def add_sums(words: Any, rows: Any, columns: Any) -> None:
    """Sums modulo 2^64 of `words` (R, C): of each row to `rows` (R,), of each column added to `columns` (C,).

    All are uint64. Python's lock is free meanwhile.

    Raises:
        ConfigError: arrays that are not so.
    """
    library, shape = _library(), tuple(words.shape)
    given = ((words, "words", shape), (rows, "rows", shape[:1]), (columns, "columns", shape[1:]))
    at, to, add = (_pointer(array, name, ("uint64",), wanted) for array, name, wanted in given)
    _check(library, library.hl_sums(at, *shape, to, add))


# ---- memory ---------------------------------------------------------------------------------------------------------


class Arena:
    """Zeroed memory in huge pages where the system grants them, given out piece by piece in multiples of 64 bytes.

    One arena for all of a model's weights: huge pages come in 2 MiB, and a matrix of a small model is smaller than
    that. The memory goes back to the system when the arena and every piece of it are gone.

    Args:
        size: in bytes.
        memory: uint8 (size,) to give out, such as a mapped file, instead of fresh memory.

    Raises:
        CapacityError: when the system refuses `size` bytes.
    """

    def __init__(self, size: int, memory: Any = None) -> None:
        self.size = size
        self.used = 0
        self._memory = memory
        if memory is not None:
            self._base = _pointer(memory, "memory", ("uint8",), (size,))
            return
        library = _library()
        fresh = ctypes.c_void_p()
        _check(library, library.hl_alloc(size, ctypes.byref(fresh)))
        self._base = fresh.value or 0
        if self._base:
            weakref.finalize(self, library.hl_free, self._base, size)

    @property
    def whole(self) -> memoryview:
        """All of its bytes, writable."""
        return self.view(self._base, self.size)

    def take(self, size: int) -> int:
        """The address of `size` fresh bytes. The arena must outlive their use.

        Raises:
            CapacityError: when the arena is used up.
        """
        rounded = -(-size // _ALIGNMENT) * _ALIGNMENT
        if self.used + size > self.size:
            raise CapacityError(
                f"an arena of {self.size:,} bytes has {self.size - self.used:,} left; {size:,} are needed"
            )
        address = self._base + self.used
        self.used = min(self.size, self.used + rounded)
        return address

    def view(self, address: int, size: int) -> memoryview:
        """Writable bytes of a piece, for reading it from a file and writing it to one."""
        buffer = (ctypes.c_uint8 * size).from_address(address)
        buffer._arena = self  # type: ignore[attr-defined]  # the view keeps the memory alive
        return memoryview(buffer).cast("B")


def packed_bytes(kind: Kind, out: int, in_: int, group: int = 0) -> int:
    """Bytes of a packed weight (out, in_).

    Raises:
        ConfigError: when the kind cannot take this shape and group.
    """
    library = _library()
    size = int(library.hl_packed_bytes(kind, out, in_, group))
    _check(library, min(size, 0))
    return size


class PackedWeight:
    """A matrix (out, in_) in a packed layout; zeros until rows are packed into it.

    Attributes:
        kind: how values are stored.
        out, in_: rows and columns; `y = x @ w.T`.
        group: columns that share a scale: 32, 64 or 128 for grouped kinds (in_ must be a multiple), else 0.
        nbytes: its size.

    Raises:
        ConfigError: when the kind cannot take this shape and group.
        CapacityError: when there is no memory for it.
    """

    def __init__(self, kind: Kind, out: int, in_: int, group: int = 0, *, arena: Arena | None = None) -> None:
        self.kind, self.out, self.in_, self.group = Kind(kind), out, in_, group
        self.nbytes = packed_bytes(self.kind, out, in_, group)
        self._arena = arena if arena is not None else Arena(self.nbytes)
        self._address = self._arena.take(self.nbytes)
        self.struct = Weight(kind=int(self.kind), group=group, out=out, in_=in_, data=self._address)

    def __repr__(self) -> str:
        group = f", group={self.group}" if self.group else ""
        return f"PackedWeight({self.kind.name}, {self.out}, {self.in_}{group})"

    @property
    def memory(self) -> memoryview:
        """The packed bytes, writable, for the cache on disk."""
        return self._arena.view(self._address, self.nbytes)


# ---- contexts -------------------------------------------------------------------------------------------------------


class Context:
    """A thread pool and an instruction set. Any number may live together; close it, or use it in a `with` block.

    Args:
        threads: of the pool, the caller included; None takes the CPUs that this process may use.
        isa: None takes the environment variable HANLIN_CPU_ISA, or the best that the CPU has.

    Raises:
        ConfigError: an instruction set that is unknown or that this CPU lacks, or no library.
        CapacityError: when the system refuses a thread.
    """

    def __init__(self, threads: int | None = None, isa: str | None = None) -> None:
        library = _library()
        self._library = library
        name = isa or os.environ.get(ISA_VARIABLE) or None
        handle = ctypes.c_void_p()
        status = library.hl_open(threads or default_threads(), name.encode() if name else None, ctypes.byref(handle))
        if status == -2:
            raise ConfigError(f"{library.hl_last_error().decode()}; this CPU can run: {', '.join(supported_isas())}")
        _check(library, status)
        self.handle: int = handle.value or 0
        self.isa: str = library.hl_isa_name(self.handle).decode()
        self.threads: int = library.hl_threads(self.handle)
        self._finalizer = weakref.finalize(self, library.hl_close, self.handle)

    def close(self) -> None:
        """Stop the threads. The context cannot be used afterwards."""
        self._finalizer()
        self.handle = 0

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def pack(
        self,
        weight: PackedWeight,
        source: Any,
        *,
        blocks: Source | None = None,
        first: int = 0,
        place: Any = None,
    ) -> None:
        """Put rows of a matrix into a packed weight, quantising by rounding to nearest where its kind asks for it.

        Args:
            weight: where to.
            source: (rows, in_) float32, float16 or bfloat16; with `blocks`, GGUF blocks as uint8 (rows, bytes of a
                row), used losslessly.
            blocks: the kind of GGUF blocks: Q4_0 for INT4, Q4_1 for INT4_MIN, Q8_0 for INT8, all with groups of 32.
            first: the output that the first row becomes.
            place: int32 (rows,), the output that each row becomes, instead of `first`.

        Raises:
            ConfigError: shapes or kinds that do not fit.
            CheckpointError: a NaN or an infinity among the values, or a scale beyond float16; names the row.
        """
        rows = int(source.shape[0])
        if blocks is None:
            address = _pointer(source, "source", tuple(_FLOATS), (rows, weight.in_))
            code = _FLOATS[_dtype(source)]
        else:
            code = Source(blocks)
            block = _BLOCKS.get(code)
            if block is None or (weight.kind, weight.group) != (block.kind, 32):
                raise ConfigError(f"{code.name} blocks do not fit {weight!r}")
            address = _pointer(source, "source", ("uint8",), (rows, weight.in_ // 32 * block.bytes))
        places = None if place is None else _pointer(place, "place", ("int32",), (rows,))
        status = self._library.hl_pack(self.handle, weight.struct, code, address, rows, first, places, None)
        _check(self._library, status)

    def pack_codes(
        self, weight: PackedWeight, codes: Any, scales: Any, zeros: Any = None, *, first: int = 0, place: Any = None
    ) -> None:
        """The same from codes that another quantiser made.

        Args:
            weight: of an integer kind.
            codes: uint8 (rows, in_): 0..15 for int4, q + 128 for int8.
            scales: float16 (rows, in_ / group); float32 (rows,) for INT8_ROW.
            zeros: float16 (rows, in_ / group), the zero point (INT4_ZERO) or the minimum (INT4_MIN); else None.
            first, place: as in `pack`.

        Raises:
            ConfigError, CheckpointError: as `pack`.
        """
        rows = int(codes.shape[0])
        if weight.kind < Kind.INT8_ROW:
            raise ConfigError(f"{weight!r} holds floats, not codes")
        grouped = weight.kind.grouped
        shape = (rows, weight.in_ // weight.group) if grouped else (rows,)
        codes_at = _pointer(codes, "codes", ("uint8",), (rows, weight.in_))
        scales_at = _pointer(scales, "scales", ("float16" if grouped else "float32",), shape)
        zeros_at = None if zeros is None else _pointer(zeros, "zeros", ("float16",), shape)
        places = None if place is None else _pointer(place, "place", ("int32",), (rows,))
        status = self._library.hl_pack_codes(
            self.handle, weight.struct, codes_at, scales_at, zeros_at, rows, first, places, None
        )
        _check(self._library, status)

    def unpack(self, weight: PackedWeight, index: Any = None) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Rows of a packed weight as float32 (rows, in_): those of `index` (int32), or all.

        Serves the lookup of embeddings that are tied to the head, and tests.
        """
        if index is None:
            index = np.arange(weight.out, dtype=np.int32)
        rows = int(index.shape[0])
        out = np.empty((rows, weight.in_), dtype=np.float32)
        address = _pointer(index, "index", ("int32",), (rows,))
        status = self._library.hl_unpack(self.handle, weight.struct, address, rows, out.ctypes.data, weight.in_)
        _check(self._library, status)
        return out

    def linear(self, weight: PackedWeight, x: Any, *, bias: Any = None, flags: int = 0, out: Any = None) -> Any:
        """y = x @ weight.T + bias, then what `flags` say.

        Args:
            weight: (out, in_).
            x: float32 (rows, in_).
            bias: float32 (out,), in the weight's order of outputs.
            flags: ADD (out += result), SILU_MUL (gates and ups interleaved: half as many columns), GELU.
            out: float32 (rows, columns) to write to; None makes a numpy array. ADD needs it.

        Returns:
            out.
        """
        rows = int(x.shape[0])
        shape = (rows, weight.out // 2 if flags & SILU_MUL else weight.out)
        if out is None:
            if flags & ADD:
                raise ConfigError("ADD needs `out`, to which the result is added")
            out = np.empty(shape, dtype=np.float32)
        x_at = _pointer(x, "x", ("float32",), (rows, weight.in_))
        out_at = _pointer(out, "out", ("float32",), shape)
        bias_at = None if bias is None else _pointer(bias, "bias", ("float32",), (weight.out,))
        status = self._library.hl_linear(
            self.handle, weight.struct, x_at, weight.in_, rows, out_at, shape[1], bias_at, flags
        )
        _check(self._library, status)
        return out

"""Write PyTorch's `.pt` files: a dictionary of tensors one at a time, or of plain values, without pickling objects.

Format: a zip archive of stored entries (PKWARE's APPNOTE 6.3) with the program of a pickle, protocol 2, in `data.pkl`,
and the bytes of the n-th tensor in `data/n`, as `torch.save` writes them. `torch.load` reads it with `weights_only`.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hanlin.checkpoints.base import DTYPES
from hanlin.checkpoints.staging import PieceFile

__all__ = ["BinWriter", "Planned", "save_values"]

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<4sIQI")
_END = struct.Struct("<4sHHHHIIH")
_NEEDED = 45  # 4.5, for the 64-bit fields
_UTF8 = 1 << 11
_MIDNIGHT = 0x21  # of 1 January 1980: the same tensors give the same file
_ALIGNMENT = 64
_WIDE = 0xFFFFFFFF
_FOLDER = "archive"
_STORAGES = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "I64": "LongStorage",
    "I32": "IntStorage",
    "I16": "ShortStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
}


@dataclass(frozen=True)
class Planned:
    """A tensor that is to come; `dtype` by safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class BinWriter:
    """A `.pt` file of planned tensors, written in their order. It goes on where it was interrupted.

    Attributes:
        ready: how many tensors are in the file.

    Raises:
        OSError: it can't be written.
    """

    def __init__(self, path: Path, plan: Sequence[Planned]) -> None:
        self.plan = plan
        self._file = PieceFile(path)
        self._entries: list[tuple[str, int, int, int]] = []  # name, offset, size, checksum
        small = {"data.pkl": _program(plan), "byteorder": b"little", "version": b"3\n"}
        for name, content in small.items():
            self._add(name, content)
        self.ready = min(len(plan), len(self._file.notes) - len(small))
        for number in range(self.ready):
            offset, size, crc = self._file.notes[len(small) + number]
            self._entries.append((f"data/{number}", offset, size, crc))

    def write(self, value: torch.Tensor) -> None:
        """The next tensor."""
        wanted = self.plan[self.ready]
        assert tuple(value.shape) == wanted.shape and value.dtype is DTYPES[wanted.dtype], wanted
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._add(f"data/{self.ready}", data)
        self.ready += 1

    def close(self) -> None:
        """Write the table of contents, if all tensors are there, and close the file."""
        if self.ready == len(self.plan) and len(self._file.notes) == self.ready + 3:
            self._file.write([_table(self._entries, self._file.end)])
        self._file.close()

    def _add(self, name: str, content: bytes | memoryview) -> None:
        number = len(self._entries)
        if number < len(self._file.notes):  # one of the small entries, which was written before
            offset, size, crc = self._file.notes[number]
        else:
            offset, size, crc = self._file.end, len(content), zlib.crc32(content)
            self._file.write([_header(name, offset, size, crc), content], [offset, size, crc])
        self._entries.append((name, offset, size, crc))


def save_values(path: Path, values: Mapping[str, Any]) -> None:
    """A dictionary of truth values, whole numbers, numbers, strings, None and torch's types.

    Raises:
        OSError: it can't be written.
    """
    file = PieceFile(path)
    entries = []
    program = b"\x80\x02}(" + b"".join(_text(name) + _value(value) for name, value in values.items()) + b"u."
    for name, content in {"data.pkl": program, "byteorder": b"little", "version": b"3\n"}.items():
        entry = name, file.end, len(content), zlib.crc32(content)
        file.write([_header(*entry), content])
        entries.append(entry)
    file.write([_table(entries, file.end)])
    file.close()


def _program(plan: Iterable[Planned]) -> bytes:
    """PROTO 2, EMPTY_DICT, MARK, names and tensors, SETITEMS, STOP."""
    tensors = (_text(tensor.name) + _tensor(number, tensor) for number, tensor in enumerate(plan))
    return b"\x80\x02}(" + b"".join(tensors) + b"u."


def _tensor(number: int, tensor: Planned) -> bytes:
    """_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict()), the storage by its persistent id."""
    count = math.prod(tensor.shape)
    strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
    kind = f"ctorch\n{_STORAGES[tensor.dtype]}\n".encode()
    storage = b"(" + _text("storage") + kind + _text(str(number)) + _text("cpu") + _whole(count) + b"tQ"
    rest = _whole(0) + _tuple(tensor.shape) + _tuple(strides) + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


def _value(value: Any) -> bytes:
    if isinstance(value, torch.dtype):
        return b"ctorch\n" + str(value).removeprefix("torch.").encode() + b"\n"
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        return _whole(value)
    return b"G" + struct.pack(">d", value) if isinstance(value, float) else _text(value)


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _whole(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + struct.pack("<B", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + struct.pack("<B", len(raw)) + raw


def _tuple(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_whole, values)) + b"t"


def _header(name: str, offset: int, size: int, crc: int) -> bytes:
    """What stands before an entry's bytes, filled up so that they start at a multiple of 64 bytes."""
    raw = f"{_FOLDER}/{name}".encode()
    wide = struct.pack("<HHQQ", 1, 16, size, size) if size >= _WIDE else b""
    start = offset + _LOCAL.size + len(raw) + len(wide) + 4
    filling = -start % _ALIGNMENT
    extra = wide + struct.pack("<2sH", b"FB", filling) + b"Z" * filling
    narrow = min(size, _WIDE)
    fields = _LOCAL.pack(b"PK\3\4", _NEEDED, _UTF8, 0, 0, _MIDNIGHT, crc, narrow, narrow, len(raw), len(extra))
    return fields + raw + extra


def _table(entries: Sequence[tuple[str, int, int, int]], start: int) -> bytes:
    """The table of contents and its two ends, the 64-bit one first."""
    table = bytearray()
    for name, offset, size, crc in entries:
        raw = f"{_FOLDER}/{name}".encode()
        wide = [size, size] * (size >= _WIDE) + [offset] * (offset >= _WIDE)
        extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        narrow = min(size, _WIDE)
        table += _CENTRAL.pack(
            *(b"PK\1\2", _NEEDED, _NEEDED, _UTF8, 0, 0, _MIDNIGHT, crc, narrow, narrow, len(raw), len(extra), 0, 0, 0),
            *(0, min(offset, _WIDE)),
        )
        table += raw + extra
    count, size = len(entries), len(table)
    end = start + size
    return (
        bytes(table)
        + _END64.pack(b"PK\6\6", _END64.size - 12, _NEEDED, _NEEDED, 0, 0, count, count, size, start)
        + _LOCATOR64.pack(b"PK\6\7", 0, end, 1)
        + _END.pack(b"PK\5\6", 0, 0, *[min(count, 0xFFFF)] * 2, min(size, _WIDE), min(start, _WIDE), 0)
    )

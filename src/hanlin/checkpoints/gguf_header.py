"""The header of a GGUF file: key-values and tensor descriptions, read with every count and length checked first.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from hanlin.checkpoints.base import MAX_TENSORS, TensorInfo, countable, fail, shown
from hanlin.checkpoints.blocks import BLOCKS
from hanlin.checkpoints.stored import StoredFile

__all__ = ["GgufHeader", "read_header"]

_MAX_KEYS = 1 << 16
_MAX_NAME = 1 << 16
_MAX_DIMENSIONS = 4
# The largest vocabularies have 260 thousand tokens and twice as many merges.
_MAX_ELEMENTS = 1 << 24
_MAX_NESTING = 4
_REMEDY = "The file is damaged or was made by a faulty program. Fetch it again."

_SCALARS: Mapping[int, str] = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9

# ggml's numbers of the tensor kinds; those missing were withdrawn.
_KINDS: Mapping[int, str] = MappingProxyType(
    {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K"}
    | {12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"}
    | {20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}
    | {29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"}
)


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the tensors. `offsets` are bytes from the start of the file."""

    metadata: Mapping[str, Any]
    infos: tuple[TensorInfo, ...]
    offsets: Mapping[str, int]


def read_header(file: StoredFile) -> GgufHeader:
    """Read and check the header.

    Raises:
        CheckpointError: a wrong version, a count or length beyond the file, duplicate keys; and all tensors that are
            misdescribed, overlap or lie beyond the file, together.
    """
    if not file.start.startswith(b"GGUF"):
        fail(file.path, [f"the file starts with {shown(file.start[:4])}, not b'GGUF'"], "Is this really a GGUF file?")
    cursor = _Cursor(file.map(), file.size, file.path, position=4)
    _check_version(cursor.number("I", "version"), file.path)
    tensor_count, key_count = cursor.number("Q", "tensor count"), cursor.number("Q", "key count")
    # The smallest possible description: a name's length, the number of dimensions, a kind, an offset.
    cursor.bound(tensor_count, 24, MAX_TENSORS, "tensors")
    cursor.bound(key_count, 13, _MAX_KEYS, "keys")
    metadata = _read_metadata(cursor, key_count)
    return _read_tensors(cursor, tensor_count, metadata)


def _check_version(version: int, path: Path) -> None:
    if version in (2, 3):
        return
    if version in (2 << 24, 3 << 24):
        fail(path, ["the file is big-endian"], "Only little-endian files are read; use gguf_convert_endian.py.")
    if version == 1:
        fail(path, ["GGUF version 1 is no longer read"], "Fetch a newer conversion of the model.")
    fail(path, [f"GGUF version {version} is unknown; versions 2 and 3 are read"], "A newer Hanlin may know it.")


class _Cursor:
    """A position in the mapped file that can't be moved past its end."""

    def __init__(self, data: mmap.mmap, size: int, path: Path, position: int) -> None:
        self.data = data
        self.size = size
        self.path = path
        self.position = position

    def bound(self, count: int, least: int, most: int, what: str) -> None:
        """Refuse `count` items of `least` bytes each before anything is made for them."""
        rest = self.size - self.position
        if count * least > rest:
            fail(self.path, [f"{what}: {count:,} are claimed, but only {rest:,} bytes are left in the file"], _REMEDY)
        if count > most:
            fail(self.path, [f"{what}: {count:,} are claimed; at most {most:,} are read"], _REMEDY)

    def take(self, count: int, what: str) -> bytes:
        start = self.position
        if count > self.size - start:
            fail(self.path, [f"{what}: {count:,} bytes at {start:,} go beyond the file's {self.size:,}"], _REMEDY)
        self.position = start + count
        return self.data[start : self.position]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def string(self, what: str, most: int | None = None) -> str:
        length = self.number("Q", what)
        if most is not None and length > most:
            fail(self.path, [f"{what}: a length of {length:,} bytes; at most {most:,} are allowed"], _REMEDY)
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            fail(self.path, [f"{what}: not valid UTF-8: {error}"], _REMEDY)

    def strings(self, count: int, what: str) -> list[str]:
        """Many strings, in one tight loop: a vocabulary has a hundred thousand."""
        data, size, position = self.data, self.size, self.position
        length_at = struct.Struct("<Q").unpack_from
        result = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + length_at(data, position)[0]
                if position > size:
                    break
                result.append(data[start:position].decode("utf-8"))
        except struct.error:
            pass
        except UnicodeDecodeError as error:
            fail(self.path, [f"{what}: element {len(result):,} is not valid UTF-8: {error}"], _REMEDY)
        if len(result) < count:
            fail(self.path, [f"{what}: element {len(result):,} of {count:,} goes beyond the file"], _REMEDY)
        self.position = position
        return result

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what, depth)
        if kind not in _SCALARS:
            fail(self.path, [f"{what}: value type {kind} is unknown"], _REMEDY)
        number = self.number(_SCALARS[kind] if kind != _BOOL else "B", what)
        return self.boolean(number, what) if kind == _BOOL else number

    def array(self, what: str, depth: int) -> list[Any]:
        if depth == _MAX_NESTING:
            fail(self.path, [f"{what}: arrays are nested more than {_MAX_NESTING} deep"], _REMEDY)
        kind, count = self.number("I", what), self.number("Q", what)
        if kind in (_STRING, _ARRAY):
            self.bound(count, 8 if kind == _STRING else 12, _MAX_ELEMENTS, what)
            return self.strings(count, what) if kind == _STRING else [self.array(what, depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            fail(self.path, [f"{what}: value type {kind} is unknown"], _REMEDY)
        dtype = np.dtype("u1" if kind == _BOOL else f"<{_SCALARS[kind]}")
        self.bound(count, dtype.itemsize, _MAX_ELEMENTS, what)
        numbers = np.frombuffer(self.take(count * dtype.itemsize, what), dtype).tolist()
        return [self.boolean(number, what) for number in numbers] if kind == _BOOL else numbers

    def boolean(self, number: int, what: str) -> bool:
        if number > 1:
            fail(self.path, [f"{what}: a truth value must be 0 or 1, not {number}"], _REMEDY)
        return number == 1


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        key = cursor.string(f"name of key {index}", _MAX_NAME)
        if key in metadata:
            fail(cursor.path, [f"the key {shown(key)} stands twice"], _REMEDY)
        kind = cursor.number("I", f"type of key {shown(key)}")
        metadata[key] = cursor.value(kind, f"key {shown(key)}")
        if key == "general.alignment" and (kind != _UINT32 or metadata[key].bit_count() != 1):
            fail(cursor.path, [f"general.alignment must be a power of two, not {shown(metadata[key])}"], _REMEDY)
    return metadata


def _read_tensors(cursor: _Cursor, count: int, metadata: Mapping[str, Any]) -> GgufHeader:
    alignment = metadata.get("general.alignment", 32)
    found: list[str] = []
    infos: list[TensorInfo] = []
    offsets: dict[str, int] = {}
    for index in range(count):
        name = cursor.string(f"name of tensor {index}", _MAX_NAME)
        what = f"tensor {shown(name)}"
        dimensions = cursor.number("I", what)
        if dimensions > _MAX_DIMENSIONS:
            fail(cursor.path, [*found, f"{what}: {dimensions:,} dimensions; at most {_MAX_DIMENSIONS} exist"], _REMEDY)
        sizes = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions, what))
        kind, offset = cursor.number("I", what), cursor.number("Q", what)
        wrong = _wrong(sizes, kind, offset, alignment)
        if wrong or name in offsets:
            found.append(f"{what}: {wrong or 'stands twice'}")
            continue
        elements, nbytes = BLOCKS[_KINDS[kind]]
        offsets[name] = offset
        # ggml counts dimensions from the fastest one, torch from the slowest.
        stored = math.prod(sizes) // elements * nbytes
        infos.append(TensorInfo(name, sizes[::-1], _KINDS[kind], stored, cursor.path))
    # A file without tensors, a vocabulary alone, need not be padded.
    data_start = -(-cursor.position // alignment) * alignment
    offsets = {name: data_start + offset for name, offset in offsets.items()}
    found += _misplaced(infos, offsets, cursor.size)
    if found:
        fail(cursor.path, found, _REMEDY)
    return GgufHeader(metadata, tuple(infos), offsets)


def _wrong(sizes: tuple[int, ...], kind: int, offset: int, alignment: int) -> str | None:
    if kind not in _KINDS:
        return f"tensor kind {kind} is unknown or was withdrawn"
    if not countable(sizes):
        return f"dimensions {sizes} overflow"
    elements, _ = BLOCKS[_KINDS[kind]]
    row = sizes[0] if sizes else 1
    if row % elements:
        return f"a row of {row:,} does not divide into {_KINDS[kind]} blocks of {elements}"
    if offset % alignment:
        return f"offset {offset:,} is not a multiple of the alignment {alignment:,}"
    return None


def _misplaced(infos: list[TensorInfo], offsets: Mapping[str, int], size: int) -> list[str]:
    """Every tensor must lie in the file, and no two may share a byte."""
    found = []
    end, before = 0, ""
    for info in sorted(infos, key=lambda info: (offsets[info.name], info.nbytes)):
        offset = offsets[info.name]
        if offset + info.nbytes > size:
            found.append(
                f"tensor {shown(info.name)} ends at byte {offset + info.nbytes:,}, but the file has {size:,}: "
                "it was cut, or its header is wrong"
            )
        if offset < end:
            found.append(f"tensor {shown(info.name)} overlaps tensor {shown(before)} by {end - offset:,} bytes")
        if offset + info.nbytes > end:
            end, before = offset + info.nbytes, info.name
    return found

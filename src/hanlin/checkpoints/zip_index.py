"""The table of contents of a zip archive whose entries are stored as they are, as PyTorch writes them.

Format: PKWARE's APPNOTE 6.3. Nothing is extracted: an entry is a range of bytes of the archive.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise

from hanlin.checkpoints.base import MAX_TENSORS, fail, shown
from hanlin.checkpoints.stored import StoredFile

__all__ = ["ZipEntry", "read_index"]

_END = struct.Struct("<4sHHHHIIH")
_LOCATOR64 = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_MAX_COMMENT = 0xFFFF
_ENCRYPTED = 1
_REMEDY = "The file is damaged or was not written by PyTorch. Fetch it again."


@dataclass(frozen=True)
class ZipEntry:
    """`size` bytes at byte `offset` of the archive."""

    name: str
    offset: int
    size: int
    crc: int


def read_index(file: StoredFile) -> dict[str, ZipEntry]:
    """Every entry by name.

    Raises:
        CheckpointError: no or broken table, compressed, encrypted, duplicate or overlapping entries, or entries beyond
            the archive.
    """
    start, size, count = _find_table(file)
    if count > MAX_TENSORS or size > count * (_CENTRAL.size + 1024):
        fail(file.path, [f"the zip table claims {count:,} entries in {size:,} bytes"], _REMEDY)
    table = file.read(start, size)
    entries: dict[str, ZipEntry] = {}
    found: list[str] = []
    position = 0
    for _ in range(count):
        if position + _CENTRAL.size > size:
            fail(file.path, [*found, f"the zip table ends after {len(entries):,} of {count:,} entries"], _REMEDY)
        fields = _CENTRAL.unpack_from(table, position)
        flags, method, crc = fields[3], fields[4], fields[7]
        name_end = position + _CENTRAL.size + fields[10]
        raw_name = table[position + _CENTRAL.size : name_end]
        name = raw_name.decode("utf-8", "replace")
        packed, unpacked, offset = _wide(fields[8], fields[9], fields[16], table[name_end : name_end + fields[11]])
        position = name_end + fields[11] + fields[12]
        if fields[0] != b"PK\1\2":
            fail(file.path, [*found, "the zip table is broken"], _REMEDY)
        if name in entries:
            found.append(f"entry {shown(name)} stands twice")
        elif flags & _ENCRYPTED or method or packed != unpacked:
            found.append(f"entry {shown(name)} is compressed or encrypted, which PyTorch never does")
        else:
            data = _data_offset(file, offset, raw_name)
            if data is None or data + unpacked > start:
                found.append(f"entry {shown(name)} is not where the zip table says, or goes beyond it")
            else:
                entries[name] = ZipEntry(name, data, unpacked, crc)
    in_order = sorted(entries.values(), key=lambda entry: (entry.offset, entry.size))
    for one, other in pairwise(in_order):
        if one.offset + one.size > other.offset:
            found.append(f"entries {shown(one.name)} and {shown(other.name)} overlap")
    if found:
        fail(file.path, found, _REMEDY)
    return entries


def _find_table(file: StoredFile) -> tuple[int, int, int]:
    """Where the central directory starts, its bytes, and its entries."""
    tail_size = min(file.size, _END.size + _MAX_COMMENT)
    tail_start = file.size - tail_size
    tail = file.read(tail_start, tail_size)
    end = tail.rfind(b"PK\5\6")
    if end < 0 or len(tail) - end < _END.size:
        fail(file.path, ["the zip archive has no table of contents: the file was cut"], "Fetch it again.")
    _, disk, _, _, count, size, start, comment = _END.unpack_from(tail, end)
    limit = tail_start + end
    if disk or limit + _END.size + comment != file.size:
        fail(file.path, ["the zip archive's end is broken"], _REMEDY)
    if (count == 0xFFFF or 0xFFFFFFFF in (size, start)) and limit >= _LOCATOR64.size:
        magic, _, end64, _ = _LOCATOR64.unpack(file.read(limit - _LOCATOR64.size, _LOCATOR64.size))
        if magic == b"PK\6\7" and end64 + _END64.size <= limit:
            limit = end64
            magic, _, _, _, _, _, _, count, size, start = _END64.unpack(file.read(end64, _END64.size))
            if magic != b"PK\6\6":
                fail(file.path, ["the zip archive's 64-bit end is broken"], _REMEDY)
    if start + size > limit:
        fail(file.path, [f"the zip table claims bytes {start:,} to {start + size:,}, beyond its end"], _REMEDY)
    return start, size, count


def _wide(packed: int, unpacked: int, offset: int, extra: bytes) -> tuple[int, int, int]:
    """Sizes and offset that do not fit 32 bits stand in the extra field of id 1, in this order, if at all."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            field = extra[position + 4 : position + 4 + length]
            wide = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            unpacked = next(wide, unpacked) if unpacked == 0xFFFFFFFF else unpacked
            packed = next(wide, packed) if packed == 0xFFFFFFFF else packed
            offset = next(wide, offset) if offset == 0xFFFFFFFF else offset
        position += 4 + length
    return packed, unpacked, offset


def _data_offset(file: StoredFile, offset: int, raw_name: bytes) -> int | None:
    """Where an entry's bytes start, behind its local header; None when there is no such header."""
    name_start = offset + _LOCAL.size
    if name_start + len(raw_name) > file.size:
        return None
    head = file.read(offset, _LOCAL.size + len(raw_name))
    fields = _LOCAL.unpack_from(head)
    if fields[0] != b"PK\3\4" or head[_LOCAL.size :] != raw_name or fields[9] != len(raw_name):
        return None
    return name_start + len(raw_name) + int(fields[10])

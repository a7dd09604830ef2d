"""Safetensors: an 8-byte length, a JSON header, the bytes of the tensors without a gap.

Format: https://github.com/huggingface/safetensors#format. The header is read here rather than by the `safetensors`
package because engines need the place of the stored bytes, and users all problems at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import torch

from hanlin.checkpoints.base import DTYPES, MAX_TENSORS, FileSource, TensorInfo, countable, fail, parse_json, shown
from hanlin.checkpoints.stored import StoredFile

__all__ = ["MAX_HEADER", "SafetensorsFile"]

MAX_HEADER = 100_000_000
_MAX_DIMENSIONS = 64
_REMEDY = "The file is damaged or was made by a faulty program. Fetch it again."


class SafetensorsFile(FileSource):
    """One `.safetensors` file.

    Raises:
        CheckpointError: the header breaks a rule of the format; every misplaced or misdescribed tensor is named.
    """

    def __init__(self, file: StoredFile) -> None:
        header, data_start = _read_header(file)
        metadata = header.pop("__metadata__", {})
        found: list[str] = []
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            found.append("__metadata__ must map strings to strings")
            metadata = {}
        self._offsets: dict[str, int] = {}
        infos = []
        for name, entry in header.items():
            wrong = _wrong(name, entry)
            if wrong:
                found.append(f"tensor {shown(name)}: {wrong}")
                continue
            begin, end = entry["data_offsets"]
            self._offsets[name] = data_start + begin
            infos.append(TensorInfo(name, tuple(entry["shape"]), entry["dtype"], end - begin, file.path))
        if not found:
            found = _misplaced(infos, self._offsets, data_start, file.size)
        if found:
            fail(file.path, found, _REMEDY)
        super().__init__(file, metadata, infos)

    def load(self, name: str) -> torch.Tensor:
        info = self._info(name)
        return self._dense(self._offsets[name], info.shape, info.dtype)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        return self._file.view(self._offsets[self._info(name).name], self.infos[name].nbytes)


def _read_header(file: StoredFile) -> tuple[dict[str, Any], int]:
    path = file.path
    if file.size < 8:
        fail(path, [f"{file.size} bytes cannot hold a safetensors header"], _REMEDY)
    length = int.from_bytes(file.start[:8], "little")
    if length > file.size - 8:
        fail(path, [f"the header claims {length:,} bytes, but only {file.size - 8:,} follow"], _REMEDY)
    if length > MAX_HEADER:
        fail(path, [f"the header claims {length:,} bytes; the format allows {MAX_HEADER:,}"], _REMEDY)
    raw = file.read(8, length)
    if not raw.startswith(b"{"):
        fail(path, [f"the header must start with '{{', not {shown(raw[:8])}"], "Is this really a safetensors file?")
    header = parse_json(raw, path, "the header", max_values=16 * MAX_TENSORS)
    if not isinstance(header, dict):
        fail(path, [f"the header must be a JSON object, not {type(header).__name__}"], _REMEDY)
    if len(header) > MAX_TENSORS:
        fail(path, [f"{len(header):,} tensors; at most {MAX_TENSORS:,} are read from one file"])
    return header, 8 + length


def _wrong(name: str, entry: object) -> str | None:
    """What is wrong with one entry of the header by itself."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return "the name is not valid Unicode"
    if not isinstance(entry, dict):
        return f"must be described by an object, not {shown(entry)}"
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"dtype {shown(dtype)} is not one of {', '.join(DTYPES)}"
    if not _naturals(shape) or len(shape) > _MAX_DIMENSIONS:
        return f"shape {shown(shape)} must be at most {_MAX_DIMENSIONS} whole numbers >= 0"
    if not countable(shape):
        return f"shape {shown(shape)} overflows"
    if not _naturals(offsets) or len(offsets) != 2:
        return f"data_offsets {shown(offsets)} must be two whole numbers >= 0"
    needed, held = math.prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if needed != held:
        return f"{dtype} {shown(shape)} takes {needed:,} bytes, but data_offsets hold {held:,}"
    return None


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 64 for item in value)


def _misplaced(infos: list[TensorInfo], offsets: Mapping[str, int], data_start: int, size: int) -> list[str]:
    """The tensors must cover everything after the header, without holes and overlaps."""
    found = []
    position, before = data_start, ""
    for info in sorted(infos, key=lambda info: (offsets[info.name], info.nbytes)):
        offset = offsets[info.name]
        if offset != position:
            kind = "overlaps" if offset < position else "leaves a hole after"
            after = f"tensor {shown(before)}" if before else "the header"
            found.append(f"tensor {shown(info.name)} {kind} {after} by {abs(offset - position):,} bytes")
        if offset + info.nbytes > size:
            found.append(f"tensor {shown(info.name)} ends {offset + info.nbytes - size:,} bytes behind the file")
        position, before = offset + info.nbytes, info.name
    if not found and position != size:
        found.append(f"{size - position:,} bytes at the end belong to no tensor")
    return found

"""PyTorch's `.bin` (zip) checkpoints as a source of tensors, without PyTorch's or Python's unpickler."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hanlin.checkpoints.base import DTYPES, MAX_TENSORS, FileSource, TensorInfo, countable, fail, shown
from hanlin.checkpoints.bin_pickle import StorageRef, TensorRef, read_pickle
from hanlin.checkpoints.stored import StoredFile
from hanlin.checkpoints.zip_index import ZipEntry, read_index

__all__ = ["BinFile", "read_configuration"]

# 100 thousand tensors need about 10 MB.
_MAX_PICKLE = 1 << 25
_MAX_DEPTH = 16
_MAX_NODES = 1_000_000
_MAX_LETTERS = 1 << 26
# Training programs put the weights under one of these, beside their own state.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_REMEDY = "The file is damaged or was not written by PyTorch. Fetch it again."


class BinFile(FileSource):
    """One `.bin`, `.pt` or `.pth` file: `torch.save` of a dictionary of tensors.

    A dictionary around it with one of the usual names (`state_dict`, `model`...) is taken off, whatever else stood
    there is left out; other nested dictionaries and lists give dotted names. Numbers, strings and None among the
    tensors become `metadata`. The checksum of `data.pkl` is verified, those of the tensors' bytes are not.

    Raises:
        UnsafeCheckpointError: the pickle wants to call something.
        CheckpointError: an old or foreign format, a broken archive, tensors beyond their storage.
    """

    def __init__(self, file: StoredFile) -> None:
        _check_kind(file)
        entries = read_index(file)
        self._prefix, program = _find_pickle(file, entries)
        value = read_pickle(program, f"{file.path}: {self._prefix}data.pkl")
        if not isinstance(value, dict):
            fail(file.path, [f"holds a {type(value).__name__}, not a dictionary of tensors"])
        self._refs, metadata = _flatten(_unwrap(value), file)
        found: list[str] = []
        infos = []
        self._offsets: dict[str, int] = {}
        for name, tensor in self._refs.items():
            entry = entries.get(f"{self._prefix}data/{tensor.storage.key}")
            wrong = _wrong(tensor, entry)
            if wrong or entry is None:
                found.append(f"tensor {shown(name)}: {wrong}")
                continue
            itemsize = DTYPES[tensor.storage.dtype].itemsize
            self._offsets[name] = entry.offset + tensor.offset * itemsize
            nbytes = math.prod(tensor.shape) * itemsize
            infos.append(TensorInfo(name, tensor.shape, tensor.storage.dtype, nbytes, file.path))
        if found:
            fail(file.path, found, _REMEDY)
        super().__init__(file, metadata, infos)

    def load(self, name: str) -> torch.Tensor:
        info, tensor = self._info(name), self._refs[name]
        if _contiguous(tensor):
            return self._dense(self._offsets[name], info.shape, info.dtype)
        flat = self._dense(self._offsets[name], (_extent(tensor),), info.dtype)
        return flat.as_strided(tensor.shape, tensor.stride).contiguous()

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        info = self._info(name)
        if _contiguous(self._refs[name]):
            return self._file.view(self._offsets[name], info.nbytes)
        data: npt.NDArray[np.uint8] = self.load(name).reshape(-1).view(torch.uint8).numpy()
        data.flags.writeable = False
        return data


def read_configuration(path: Path) -> dict[str, Any]:
    """The numbers, strings, truth values and None that `torch.save` of a dictionary holds, by dotted name.

    Torch's types become their names: "torch.bfloat16". Other contents are left out.

    Raises:
        UnsafeCheckpointError, CheckpointError: as for `BinFile`.
    """
    file = StoredFile(path)
    try:
        _check_kind(file)
        prefix, program = _find_pickle(file, read_index(file))
        value = read_pickle(program, f"{path}: {prefix}data.pkl", configuration=True)
        if not isinstance(value, dict):
            fail(path, [f"holds a {type(value).__name__}, not a dictionary"])
        return _flatten(value, file)[1]
    finally:
        file.close()


def _check_kind(file: StoredFile) -> None:
    if file.start.startswith(b"PK"):
        return
    resave = "Save it again with PyTorch 1.6 or newer where you trust it, or fetch the model's safetensors version."
    if file.start.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        fail(file.path, ["a bare pickle, as PyTorch wrote before 1.6; only its zip format is read"], resave)
    if file.start[257:262] == b"ustar":
        fail(file.path, ["a tar archive, as PyTorch wrote before 0.2; only its zip format is read"], resave)
    fail(file.path, [f"starts with {shown(file.start[:8])}, which is not a PyTorch checkpoint"], _REMEDY)


def _find_pickle(file: StoredFile, entries: dict[str, ZipEntry]) -> tuple[str, bytes]:
    """The archive's folder with a slash, and the bytes of its `data.pkl`."""
    candidates = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(candidates) != 1:
        fail(file.path, [f"a PyTorch archive has one data.pkl; this one has {len(candidates)}"], _REMEDY)
    entry = entries[candidates[0]]
    prefix = entry.name.removesuffix("data.pkl")
    order = entries.get(f"{prefix}byteorder")
    if order is not None and file.read(order.offset, min(order.size, 16)) != b"little":
        fail(file.path, ["its byte order is not little-endian"], "Fetch the model's safetensors version.")
    if entry.size > _MAX_PICKLE:
        fail(file.path, [f"data.pkl takes {entry.size:,} bytes; at most {_MAX_PICKLE:,} are read"])
    program = file.read(entry.offset, entry.size)
    if zlib.crc32(program) != entry.crc:
        fail(file.path, ["the checksum of data.pkl is wrong"], _REMEDY)
    return prefix, program


def _unwrap(value: dict[str | int, Any]) -> dict[str | int, Any]:
    for _ in range(_MAX_DEPTH):
        inner = [value[key] for key in _WRAPPERS if isinstance(value.get(key), dict)]
        if len(inner) != 1 or any(isinstance(item, TensorRef) for item in value.values()):
            break
        value = inner[0]
    return value


def _flatten(top: dict[str | int, Any], file: StoredFile) -> tuple[dict[str, TensorRef], dict[str, Any]]:
    """Tensors and scalars by dotted name, in order. Bounded, since a pickle can hold one part a thousand times."""
    tensors: dict[str, TensorRef] = {}
    metadata: dict[str, Any] = {}
    nodes: list[tuple[str, Any, int]] = [("", top, 0)]
    letters = 0
    for count in range(_MAX_NODES):
        if not nodes:
            return tensors, metadata
        name, value, depth = nodes.pop()
        if isinstance(value, TensorRef):
            if name in tensors:
                fail(file.path, [f"the name {shown(name)} stands twice"])
            tensors[name] = value
        elif isinstance(value, (dict, list, tuple)):
            if depth == _MAX_DEPTH:
                fail(file.path, [f"dictionaries and lists are nested more than {_MAX_DEPTH} deep"], _REMEDY)
            parts = list(value.items() if isinstance(value, dict) else enumerate(value))
            if count + len(nodes) + len(parts) > _MAX_NODES:
                break
            for key, part in reversed(parts):
                inner = f"{name}.{key}" if name else str(key)
                letters += len(inner)
                if letters > _MAX_LETTERS:
                    fail(file.path, [f"the names take more than {_MAX_LETTERS:,} letters"], _REMEDY)
                nodes.append((inner, part, depth + 1))
        elif value is None or isinstance(value, (bool, int, float, str)):
            metadata[name] = value
        if len(tensors) > MAX_TENSORS:
            break
    fail(file.path, [f"more than {_MAX_NODES:,} values or {MAX_TENSORS:,} tensors; no model has as many"])


def _wrong(tensor: TensorRef, entry: ZipEntry | None) -> str | None:
    storage: StorageRef = tensor.storage
    if entry is None:
        return f"its storage {shown(storage.key)} is not in the archive"
    if storage.count * DTYPES[storage.dtype].itemsize > entry.size:
        return f"its storage claims {storage.count:,} elements of {storage.dtype}, but has {entry.size:,} bytes"
    if not countable(tensor.shape):
        return f"shape {tensor.shape} overflows"
    if tensor.offset + _extent(tensor) > storage.count:
        return f"shape {tensor.shape} at {tensor.offset:,} goes beyond its storage of {storage.count:,} elements"
    # An expanded tensor repeats its elements, so that a few bytes could claim all memory.
    if math.prod(tensor.shape) > storage.count:
        return f"shape {tensor.shape} has more elements than its storage, {storage.count:,}"
    return None


def _extent(tensor: TensorRef) -> int:
    """Elements from the first to the last."""
    if 0 in tensor.shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride, strict=True))


def _contiguous(tensor: TensorRef) -> bool:
    if 0 in tensor.shape:
        return True
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True

"""Weights as the native kernels hold them, in safetensors: a model directory that `hanlin convert --to hanlin` wrote.

    packed.N            uint8: a packed weight, filled up to a multiple of 64 bytes, outputs in tiles of 32
    packed.N.bias       uint8: float32 of its outputs, likewise
    X.rows              int32 (rows of X,): the outputs that the rows of the matrix `X` became
    any other           as it is

All `packed` tensors, and an embedding's table, lie in one piece of their file, the image, which is mapped on start. The
`__metadata__` says what they are and the sums of that piece. The layout is the same for every CPU (hanlin_cpu.h), so
what can't be mapped is read row by row, here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hanlin.checkpoints.base import TensorInfo, TensorSource, fail, parse_json, shown
from hanlin.errors import CheckpointError

__all__ = ["IMAGE_FILE", "KEY", "PACKED_VERSION", "Image", "PackedSource", "padded_bytes", "tile_bytes"]

IMAGE_FILE = "packed.safetensors"
KEY = "hanlin"
PACKED_VERSION = 2  # the first one had no units
_TILE = 32
_UNITS = 4 * _TILE  # before the groups of a tile: what products take its scales as multiples of, or INT8_ROW's scales
_MOST = 1 << 31
_GROUPED = {"INT8": (64, 32), "INT4": (64, 16), "INT4_MIN": (128, 16), "INT4_ZERO": (128, 16)}  # head; bytes a column
_REMEDY = "The files are damaged or of a newer version. Convert the model again: hanlin convert SRC DST --to hanlin."


class Image(NamedTuple):
    """Where the image lies, and what tells that it is whole and laid out as it is wanted."""

    path: Path
    offset: int
    size: int
    sums: bytes
    layout: bytes


def tile_bytes(kind: str, group: int, in_: int, *, version: int = PACKED_VERSION) -> int:
    """Bytes of 32 outputs, see hl_packed_bytes."""
    if kind in _GROUPED:
        head, column = _GROUPED[kind]
        return (_UNITS if version > 1 else 0) + in_ // group * (head + group * column)
    if kind == "INT8_ROW":
        return _UNITS + _TILE * (-(-in_ // 32) * 32)
    return 4 * _TILE * in_ if kind == "F32" else 2 * _TILE * (-(-in_ // 2) * 2)


def padded_bytes(kind: str, group: int, out: int, in_: int, *, version: int = PACKED_VERSION) -> int:
    """Bytes of a packed weight in the image."""
    return -(-(-(-out // _TILE) * tile_bytes(kind, group, in_, version=version)) // 64) * 64


@dataclass(frozen=True)
class _Slot:
    """A packed weight (out, in_) of `group` columns with one scale, 0 where kinds have none."""

    number: int
    kind: str
    group: int
    out: int
    in_: int
    weights: tuple[str, ...]
    biases: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"packed.{self.number}"

    @property
    def dtype(self) -> str:
        return f"{self.kind}/{self.group}" if self.group else self.kind


class PackedSource:
    """See `TensorSource`. Kinds are told as `QuantisedSource` tells them, and `raw` gives the same of them.

    Attributes:
        image: the piece to map.

    Raises:
        CheckpointError: what the metadata say does not fit the tensors; everything wrong at once.
    """

    def __init__(self, base: TensorSource) -> None:
        self.path, self.metadata = base.path, base.metadata
        self._base = base
        said = _said(base)
        self._version: int = said["version"]
        self.image = _image(base, said)
        found: list[str] = []
        self._slots = [slot for n, value in enumerate(said["slots"]) if (slot := _slot(n, value, found))]
        hidden = {"packed.padding"}
        self._rows: dict[str, npt.NDArray[np.int64]] = {}
        self._owners: dict[str, _Slot] = {}
        infos: dict[str, TensorInfo] = {}
        for slot in self._slots:
            hidden |= {slot.name, f"{slot.name}.bias"} | {_rows_name(weight) for weight in slot.weights}
            found += self._take(slot, infos)
        twice = [name for name in infos if name in base.infos]
        found += [f"{shown(name)} is there twice, plain and packed" for name in twice]
        if found:
            fail(self.path, found, _REMEDY)
        plain = {name: info for name, info in base.infos.items() if name not in hidden}
        self.infos: Mapping[str, TensorInfo] = MappingProxyType({**plain, **infos})

    def _take(self, slot: _Slot, infos: dict[str, TensorInfo]) -> list[str]:
        """Describe the matrices and biases in a slot; what is wrong with it."""
        have = self._base.infos.get(slot.name)
        size = padded_bytes(slot.kind, slot.group, slot.out, slot.in_, version=self._version)
        if have is None or have.dtype != "U8" or have.shape != (size,):
            return [f"'{slot.name}' must be U8 ({size},), not {have and (have.dtype, have.shape)}"]
        seen = np.zeros(slot.out, np.int64)
        for weight in slot.weights:
            rows = self._base.infos.get(_rows_name(weight))
            if rows is None or rows.dtype != "I32" or len(rows.shape) != 1 or weight in infos:
                return [f"{shown(_rows_name(weight))} must be I32 (rows,), and there once"]
            order = self._base.load(rows.name).numpy().astype(np.int64)
            if len(order) == 0 or order.min() < 0 or order.max() >= slot.out:
                return [f"{shown(rows.name)} names outputs that {slot.name} does not have"]
            np.add.at(seen, order, 1)
            self._rows[weight], self._owners[weight] = order, slot
            nbytes = have.nbytes * len(order) // slot.out
            infos[weight] = TensorInfo(weight, (len(order), slot.in_), slot.dtype, nbytes, have.file)
        if not (seen == 1).all():
            return [f"'{slot.name}': the rows of {shown(slot.weights)} are not its {slot.out} outputs"]
        if slot.biases:
            bias, want = self._base.infos.get(f"{slot.name}.bias"), -(-4 * slot.out // 64) * 64
            if bias is None or bias.dtype != "U8" or bias.shape != (want,):
                return [f"'{slot.name}.bias' must be U8 ({want},)"]
            for name in slot.biases:
                weight = f"{name.removesuffix('bias')}weight"
                if weight not in slot.weights:
                    return [f"{shown(name)} has no matrix in '{slot.name}'"]
                count = len(self._rows[weight])
                infos[name] = TensorInfo(name, (count,), "F32", 4 * count, bias.file)
                self._owners[name] = slot
        return []

    def load(self, name: str) -> Tensor:
        slot = self._owners.get(name)
        if slot is None:
            return self._base.load(name)
        if name in slot.biases:
            rows = self._rows[f"{name.removesuffix('bias')}weight"]
            return self._base.load(f"{slot.name}.bias").view(torch.float32)[torch.from_numpy(rows)]
        if slot.kind in ("F32", "BF16"):
            return self._floats(slot, self._rows[name])
        codes, scales, offsets = self._codes(slot, self._rows[name])
        values = torch.from_numpy(codes).float().unflatten(1, (scales.shape[1], -1))  # type: ignore[no-untyped-call]
        scale = torch.from_numpy(scales).float()[:, :, None]
        if slot.kind == "INT4_MIN":
            values = values.mul_(scale).add_(torch.from_numpy(offsets).float()[:, :, None])
        else:
            middle = 8.0 if slot.kind == "INT4" else 128.0
            zero = torch.from_numpy(offsets).float()[:, :, None] if slot.kind == "INT4_ZERO" else middle
            values = values.sub_(zero).mul_(scale)
        return torch.flatten(values, 1)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        slot = self._owners.get(name)
        if slot is None:
            return self._base.raw(name)
        if name in slot.biases or slot.kind in ("F32", "BF16"):
            plain: npt.NDArray[np.uint8] = self.load(name).contiguous().view(torch.uint8).numpy().reshape(-1)
            return plain
        codes, scales, offsets = self._codes(slot, self._rows[name])
        parts = [codes, scales.view(np.uint8), offsets.view(np.uint8)]
        return np.concatenate(parts, 1).reshape(-1)

    def _tiles(self, slot: _Slot, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """The tiles (n, bytes) that hold some outputs, and where these are among the outputs of those."""
        first, last = int(rows.min()) // _TILE, int(rows.max()) // _TILE + 1
        size = tile_bytes(slot.kind, slot.group, slot.in_, version=self._version)
        return self._base.raw(slot.name)[first * size : last * size].reshape(-1, size), rows - first * _TILE

    def _codes(self, slot: _Slot, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], ...]:
        """Codes uint8 (rows, in); scales and zero points or minima (rows, groups), the latter empty where none are."""
        tiles, at = self._tiles(slot, rows)
        if slot.kind == "INT8_ROW":
            scales = np.ascontiguousarray(tiles[:, :_UNITS]).view(np.float32).reshape(-1, 1)
            quads = tiles[:, _UNITS:].reshape(len(tiles), -1, _TILE, 4)
            codes = quads.transpose(0, 2, 1, 3).reshape(len(tiles) * _TILE, -1)[:, : slot.in_]
            return np.ascontiguousarray(codes[at]), scales[at], np.empty((len(at), 0), np.float16)
        head, column = _GROUPED[slot.kind]
        units = tiles.shape[1] % (head + slot.group * column)
        groups = tiles[:, units:].reshape(len(tiles), slot.in_ // slot.group, -1)
        heads = np.ascontiguousarray(groups[:, :, :head]).view(np.float16).reshape(*groups.shape[:2], -1, _TILE)
        numbers = heads.transpose(2, 0, 3, 1).reshape(head // 64, len(tiles) * _TILE, -1)
        if slot.kind == "INT8":
            codes = groups[:, :, head:].reshape(*groups.shape[:2], -1, _TILE, 4)
        else:
            pairs = groups[:, :, head:].reshape(*groups.shape[:2], -1, _TILE, 4)
            codes = np.concatenate((pairs & 15, pairs >> 4), -1)
        codes = codes.transpose(0, 3, 1, 2, 4).reshape(len(tiles) * _TILE, slot.in_)[at]
        offsets = numbers[1][at] if len(numbers) > 1 else np.empty((len(at), 0), np.float16)
        return np.ascontiguousarray(codes), np.ascontiguousarray(numbers[0][at]), np.ascontiguousarray(offsets)

    def _floats(self, slot: _Slot, rows: npt.NDArray[np.int64]) -> Tensor:
        tiles, at = self._tiles(slot, rows)
        width = 2 if slot.kind == "BF16" else 1
        stored = np.int16 if slot.kind == "BF16" else np.float32
        parts = np.ascontiguousarray(tiles).view(stored).reshape(len(tiles), -1, _TILE, width)
        values = parts.transpose(0, 2, 1, 3).reshape(len(tiles) * _TILE, -1)[at, : slot.in_]
        whole = torch.from_numpy(np.ascontiguousarray(values))
        return whole.view(torch.bfloat16) if slot.kind == "BF16" else whole

    def forget(self) -> None:
        self._base.forget()

    def state(self) -> dict[str, tuple[int, ...]]:
        return self._base.state()

    def close(self) -> None:
        """Leave the source below open: whoever opened it closes it."""

    def __enter__(self) -> PackedSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _rows_name(weight: str) -> str:
    return f"{weight.removesuffix('.weight')}.rows"


def _said(base: TensorSource) -> dict[str, Any]:
    text = base.metadata.get(KEY)
    if not isinstance(text, str):
        fail(base.path, [f"no '{KEY}' in the metadata of {IMAGE_FILE}"], _REMEDY)
    said = parse_json(text.encode("utf-8", "replace"), base.path, f"'{KEY}' of the metadata", max_values=1 << 20)
    if not isinstance(said, dict) or said.get("version") not in (1, 2) or not isinstance(said.get("slots"), list):
        version = shown(said.get("version") if isinstance(said, dict) else said)
        why = f"packed weights of version {version}; this version of Hanlin reads up to {PACKED_VERSION}"
        fail(base.path, [why], _REMEDY)
    return said


def _image(base: TensorSource, said: Mapping[str, Any]) -> Image:
    names = ("offset", "size")
    numbers = [said.get(name) for name in names]
    try:
        sums, layout = (bytes.fromhex(str(said.get(name))) for name in ("sums", "layout"))
    except ValueError:
        sums = layout = b""
    file = next((info.file for name, info in base.infos.items() if name == "packed.0"), None)
    if file is None or not all(type(n) is int and 0 <= n < 1 << 48 and n % 4096 == 0 for n in numbers) or not sums:
        raise CheckpointError(f"{base.path}: where the packed weights lie is not said, or makes no sense. {_REMEDY}")
    offset, size = (int(str(n)) for n in numbers)
    if offset + size > file.stat().st_size:
        fail(file, [f"the packed weights end at byte {offset + size:,}, behind the file"], _REMEDY)
    return Image(file, offset, size, sums, layout)


def _slot(number: int, value: Any, found: list[str]) -> _Slot | None:
    if not isinstance(value, dict):
        found.append(f"packed weight {number} is described by {shown(value)}")
        return None
    kind, group, out, in_ = (value.get(name) for name in ("kind", "group", "out", "in"))
    weights, biases = value.get("weights"), value.get("biases")
    sizes = all(type(n) is int and 0 < n < _MOST for n in (out, in_)) and type(group) is int and isinstance(kind, str)
    if sizes and kind in _GROUPED:
        good = sizes and group in (32, 64, 128) and in_ % group == 0
    else:
        good = sizes and kind in ("F32", "BF16", "INT8_ROW") and group == 0
    names = all(isinstance(x, list) and all(isinstance(n, str) for n in x) for x in (weights, biases))
    if not good or not names or not isinstance(weights, list) or not isinstance(biases, list) or not weights:
        found.append(f"packed weight {number} is described by {shown(value)}")
        return None
    return _Slot(number, str(kind), int(str(group)), int(str(out)), int(str(in_)), tuple(weights), tuple(biases))

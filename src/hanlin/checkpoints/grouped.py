"""Matrices of codes with a scale for each group of columns: AWQ, GPTQ and compressed-tensors as they lie in files.

    AWQ (gemm)           X.qweight int32 (in, out / 8), X.qzeros int32 (groups, out / 8), X.scales (groups, out)
    GPTQ                 X.qweight int32 (in * bits / 32, out), X.qzeros int32 (groups, out * bits / 32),
                         X.scales (groups, out), X.g_idx int32 (in,): the group of each column
    compressed-tensors   X.weight_packed int32 (out, in * bits / 32), X.weight_scale (out, groups),
                         X.weight_zero_point int32 (out * bits / 32, groups), X.weight_shape int64 (2,),
                         X.weight_g_idx (in,); or X.weight int8 (out, in) with X.weight_scale

A value is (code - zero point) * scale. GPTQ's first version stores zero points less one; compressed-tensors' codes and
zero points are moved by half their range, so that they are not negative.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hanlin.checkpoints.base import TensorInfo, TensorSource, shown
from hanlin.checkpoints.bits import unpack, unpack_awq, words
from hanlin.checkpoints.quantisation import Quantisation

__all__ = ["FORMATS", "Format", "Groups", "Matrix", "dequantised", "runs"]

_FLOATS = ("F16", "BF16", "F32")
_MOST = 1 << 31


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A quantised matrix in the files.

    Attributes:
        name: of the parameter that it is.
        shape: (out, in).
        parts: for each role (the end of a stored name) the stored tensor.
        groups: scales a row; columns / groups columns share one, unless an index says otherwise.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    groups: int
    parts: Mapping[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.parts.values())


class Groups(NamedTuple):
    """What stands beside the codes.

    Attributes:
        scales: float32 (out, groups).
        zeros: float32 (out, groups), the zero points in the codes' own range; None: half of it.
        column_groups: int64 (in,), the group of each column; None: as many columns each, in order.
    """

    scales: Tensor
    zeros: Tensor | None
    column_groups: Tensor | None


class Format(ABC):
    """One of them. Problems are told as text, for all matrices at once."""

    key: str

    def __init__(self, quantisation: Quantisation) -> None:
        self.quantisation = quantisation

    def stems(self, infos: Mapping[str, TensorInfo]) -> Iterator[str]:
        """Names of the linear layers that are stored this way."""
        end = f".{self.key}"
        return (name.removesuffix(end) for name in infos if name.endswith(end))

    @abstractmethod
    def describe(self, stem: str, source: TensorSource, found: list[str]) -> Matrix | None:
        """The matrix of a linear layer, or None, when `found` has got what is wrong with it."""

    @abstractmethod
    def codes(self, matrix: Matrix, source: TensorSource) -> Tensor:
        """uint8 (out, in)."""

    @abstractmethod
    def groups(self, matrix: Matrix, source: TensorSource) -> Groups: ...

    def _parts(
        self, stem: str, source: TensorSource, roles: Mapping[str, bool], found: list[str]
    ) -> dict[str, TensorInfo]:
        """The stored tensors by role; `roles` says of each whether it must be there."""
        parts = {role: source.infos[f"{stem}.{role}"] for role in roles if f"{stem}.{role}" in source.infos}
        found += [f"missing tensor '{stem}.{role}'" for role, needed in roles.items() if needed and role not in parts]
        return parts

    def _columns(self, stem: str, in_: int, groups: int, found: list[str]) -> bool:
        """Whether so many groups are what the configuration says."""
        size = self.quantisation.group
        want = 1 if size < 0 else -(-in_ // size) if size else groups
        if groups != want or not groups:
            said = f"groups of {size} columns" if size > 0 else "one group"
            found.append(f"'{stem}' has {groups} groups for {in_} columns; the configuration says {said}")
        return groups == want and groups > 0


class Awq(Format):
    key = "qweight"

    def describe(self, stem: str, source: TensorSource, found: list[str]) -> Matrix | None:
        parts = self._parts(stem, source, {"qweight": True, "qzeros": True, "scales": True}, found)
        if len(parts) < 3:
            return None
        weight, scales = parts["qweight"].shape, parts["scales"].shape
        if len(weight) != 2 or len(scales) != 2 or not 0 < 8 * weight[1] < _MOST or not weight[0]:
            found.append(f"'{stem}.qweight' {weight} with scales {scales}: both must be matrices")
            return None
        in_, out, groups = weight[0], 8 * weight[1], scales[0]
        good = _fits(parts, {"qweight": (in_, out // 8), "qzeros": (groups, out // 8), "scales": (groups, out)}, found)
        if not self._columns(stem, in_, groups, found) or not good:
            return None
        if in_ % groups:
            found.append(f"'{stem}' has {in_} columns, which {groups} groups do not divide")
            return None
        return Matrix(name=f"{stem}.weight", shape=(out, in_), bits=4, groups=groups, parts=parts)

    def codes(self, matrix: Matrix, source: TensorSource) -> Tensor:
        return unpack_awq(source.load(matrix.parts["qweight"].name)).t().contiguous()

    def groups(self, matrix: Matrix, source: TensorSource) -> Groups:
        scales = source.load(matrix.parts["scales"].name).float().t().contiguous()
        zeros = unpack_awq(source.load(matrix.parts["qzeros"].name)).t().float().contiguous()
        return Groups(scales, zeros, None)


class Gptq(Format):
    key = "qweight"

    def describe(self, stem: str, source: TensorSource, found: list[str]) -> Matrix | None:
        quantisation = self.quantisation
        needed = {"qweight": True, "scales": True, "qzeros": not quantisation.symmetric, "g_idx": False}
        before = len(found)
        parts = self._parts(stem, source, needed, found)
        if len(found) > before:
            return None
        weight, scales = parts["qweight"].shape, parts["scales"].shape
        index = parts["g_idx"].shape if "g_idx" in parts else ()
        if len(weight) != 2 or len(scales) != 2 or len(index) > 1 or not 0 < weight[0] * 32 < _MOST or not weight[1]:
            found.append(f"'{stem}.qweight' {weight} with scales {scales}, g_idx {index}: two matrices and a row")
            return None
        in_ = index[0] if index else weight[0] * 32 // quantisation.bits[0]
        bits = next((bits for bits in quantisation.bits if in_ * bits == weight[0] * 32), 0)
        if not bits or (len(quantisation.bits) > 1 and not index):
            widths = " or ".join(map(str, quantisation.bits))
            found.append(f"'{stem}.qweight' has {weight[0]} rows, not those of {in_} columns of {widths} bits")
            return None
        out, groups = weight[1], scales[0]
        shapes = {"qweight": weight, "scales": (groups, out), "qzeros": (groups, words(out, bits)), "g_idx": (in_,)}
        good = _fits(parts, {role: shape for role, shape in shapes.items() if role in parts}, found)
        if not self._columns(stem, in_, groups, found) or not good:
            return None
        return Matrix(name=f"{stem}.weight", shape=(out, in_), bits=bits, groups=groups, parts=parts)

    def codes(self, matrix: Matrix, source: TensorSource) -> Tensor:
        packed = source.load(matrix.parts["qweight"].name).t()
        return unpack(packed, matrix.bits, matrix.shape[1]).contiguous()

    def groups(self, matrix: Matrix, source: TensorSource) -> Groups:
        parts = {role: source.load(info.name) for role, info in matrix.parts.items() if role != "qweight"}
        zeros = None
        if "qzeros" in parts:
            stored = unpack(parts["qzeros"], matrix.bits, matrix.shape[0]).t().float().contiguous()
            zeros = stored + self.quantisation.zero_added
        index = parts["g_idx"].long() if "g_idx" in parts else None
        if index is None and matrix.shape[1] % matrix.groups:  # the last group has fewer columns
            index = torch.arange(matrix.shape[1]) // self.quantisation.group
        return Groups(parts["scales"].float().t().contiguous(), zeros, index)


class Compressed(Format):
    key = "weight_scale"

    def describe(self, stem: str, source: TensorSource, found: list[str]) -> Matrix | None:
        roles = {"weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"}
        parts = self._parts(stem, source, dict.fromkeys(sorted(roles), False), found)
        packed = "weight_packed" in parts
        if packed == ("weight" in parts) or (packed and "weight_shape" not in parts):
            found.append(f"'{stem}.weight_scale' needs 'weight_packed' and 'weight_shape' beside it, or 'weight'")
            return None
        weight, scales = parts["weight_packed" if packed else "weight"].shape, parts["weight_scale"].shape
        shape = self._shape(parts["weight_shape"], source) if packed else weight
        if len(weight) != 2 or len(shape) != 2 or min(shape) < 1 or shape[0] != weight[0]:
            found.append(f"'{stem}.weight' {weight} is said to have the shape {shown(shape)}")
            return None
        out, in_ = shape
        bits = next((b for b in self.quantisation.bits if words(in_, b) == weight[1]), 0) if packed else 8
        if not bits:
            widths = " or ".join(map(str, self.quantisation.bits))
            found.append(
                f"'{stem}.weight_packed' has {weight[1]} words a row, not those of {in_} codes of {widths} bits"
            )
            return None
        groups = scales[1] if len(scales) == 2 else 1
        shapes: dict[str, tuple[int, ...]] = {"weight_packed": weight, "weight": weight, "weight_shape": (2,)}
        shapes |= {"weight_scale": (out, groups), "weight_g_idx": (in_,)}
        shapes["weight_zero_point"] = (words(out, bits), groups) if packed else (out, groups)
        zeros = parts.get("weight_zero_point")
        if packed and zeros is not None and zeros.dtype != "I32":
            found.append(f"'{zeros.name}' is {zeros.dtype}, not I32, in which codes are packed")
            return None
        if scales in ((), (1,), (1, 1)):  # one scale for all
            shapes["weight_scale"] = scales
            shapes.pop("weight_zero_point")
        if not _fits(parts, {role: shape for role, shape in shapes.items() if role in parts}, found):
            return None
        if not groups or (in_ % groups and "weight_g_idx" not in parts):
            found.append(f"'{stem}' has {in_} columns, which {groups} groups do not divide")
            return None
        return Matrix(name=f"{stem}.weight", shape=(out, in_), bits=bits, groups=groups, parts=parts)

    def _shape(self, info: TensorInfo, source: TensorSource) -> tuple[int, ...]:
        if info.shape != (2,) or info.dtype not in ("I64", "I32"):
            return ()
        return tuple(source.load(info.name).tolist())

    def codes(self, matrix: Matrix, source: TensorSource) -> Tensor:
        if "weight" in matrix.parts:
            return source.load(matrix.parts["weight"].name).view(torch.uint8) ^ 128
        packed = source.load(matrix.parts["weight_packed"].name)
        return unpack(packed, matrix.bits, matrix.shape[1]).contiguous()

    def groups(self, matrix: Matrix, source: TensorSource) -> Groups:
        parts = matrix.parts
        scales = source.load(parts["weight_scale"].name).float()
        scales = scales.expand(matrix.shape[0], 1) if scales.numel() == 1 else scales
        zeros = None
        if "weight_zero_point" in parts:
            stored = source.load(parts["weight_zero_point"].name)
            if "weight" in parts:
                zeros = stored.float() + 128
            else:
                zeros = unpack(stored.t(), matrix.bits, matrix.shape[0]).t().float().contiguous()
        index = source.load(parts["weight_g_idx"].name).long() if "weight_g_idx" in parts else None
        if index is not None and bool((index == -1).all()):  # there, but not used
            index = None
        return Groups(scales.contiguous(), zeros, index)


FORMATS: Mapping[str, type[Format]] = {"awq": Awq, "gptq": Gptq, "compressed-tensors": Compressed}
_DTYPES = {
    "qweight": ("I32",),
    "qzeros": ("I32",),
    "scales": _FLOATS,
    "g_idx": ("I32", "I64"),
    "weight": ("I8",),
    "weight_packed": ("I32",),
    "weight_shape": ("I64", "I32"),
    "weight_scale": _FLOATS,
    "weight_zero_point": ("I32", "I8"),
    "weight_g_idx": ("I32", "I64"),
}


def _fits(parts: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]], found: list[str]) -> bool:
    good = True
    for role, info in parts.items():
        want = shapes.get(role)
        if want is None or info.shape != want or info.dtype not in _DTYPES[role]:
            need = "nothing" if want is None else f"{' or '.join(_DTYPES[role])} {want}"
            found.append(f"'{info.name}' is {info.dtype} {info.shape}, not {need}")
            good = False
    return good


def dequantised(codes: Tensor, groups: Groups, bits: int) -> Tensor:
    """uint8 (out, in) and what belongs to them -> float32 (out, in)."""
    out, in_ = codes.shape
    middle = float(1 << (bits - 1))
    if groups.column_groups is None:
        blocks = codes.view(out, groups.scales.shape[1], -1).float()
        zeros = middle if groups.zeros is None else groups.zeros[:, :, None]
        return ((blocks - zeros) * groups.scales[:, :, None]).view(out, in_)
    zeros = middle if groups.zeros is None else groups.zeros[:, groups.column_groups]
    return (codes.float() - zeros) * groups.scales[:, groups.column_groups]


def runs(groups: Groups, in_: int, size: int) -> Tensor | None:
    """The group of every `size` columns (in / size,), if none of those is in two groups."""
    if in_ % size:
        return None
    order = groups.column_groups
    if order is None:
        columns = in_ // groups.scales.shape[1]
        return None if columns % size else torch.arange(in_ // size) // (columns // size)
    blocks = order.view(-1, size)
    return blocks[:, 0] if bool((blocks == blocks[:, :1]).all()) else None

"""bitsandbytes' weights as Transformers saves them: NF4 and FP4 by blocks, int8 with a scale for each row.

4 bits   X.weight uint8 (count / 2, 1), the first value of each pair in the high half; X.weight.quant_map float32 (16,)
         what codes stand for; X.weight.absmax, a scale for each block of values, in the order of rows;
         X.weight.quant_state.bitsandbytes__nf4 uint8: JSON with the shape and the size of the blocks
twice    absmax uint8 then, with nested_quant_map float32 (256,) and nested_absmax, a scale for each block of them
8 bits   X.weight int8 (out, in), X.SCB float32 (out,): a value is code * SCB / 127
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hanlin.checkpoints.base import TensorInfo, TensorSource, parse_json, shown
from hanlin.checkpoints.grouped import Format, Groups, Matrix
from hanlin.errors import CheckpointError

__all__ = ["Blocks", "RowsOfInt8", "blocks", "dequantised_blocks"]

_STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_MAX_STATE = 1 << 12


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A matrix of 4-bit codes, as `Matrix`; `nested` tells that the scales are codes too."""

    name: str
    shape: tuple[int, int]
    block: int
    nested: int
    offset: float
    parts: Mapping[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.parts.values())


def blocks(source: TensorSource, found: list[str]) -> Iterator[Blocks]:
    """Every matrix of 4 bits; what is wrong with them goes to `found`."""
    for key, info in source.infos.items():
        name, state, kind = key.partition(_STATE)
        if not state:
            continue
        if kind not in _KINDS:
            found.append(f"'{name}' is of kind {shown(kind)}; read are {', '.join(_KINDS)}")
            continue
        made = _block(name, info, source, found)
        if made is not None:
            yield made


def _block(name: str, state: TensorInfo, source: TensorSource, found: list[str]) -> Blocks | None:
    if state.dtype != "U8" or len(state.shape) != 1 or not 0 < state.shape[0] <= _MAX_STATE:
        found.append(f"'{state.name}' is {state.dtype} {state.shape}, not at most {_MAX_STATE:,} bytes of JSON")
        return None
    try:
        values = parse_json(source.load(state.name).numpy().tobytes(), source.path, f"'{state.name}'", max_values=64)
    except CheckpointError as error:
        found.append(str(error))
        return None
    values = values if isinstance(values, dict) else {}
    shape, block, offset = values.get("shape"), values.get("blocksize"), values.get("nested_offset", 0.0)
    good = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in shape)
    nested = values.get("nested_blocksize", 0)
    sizes = type(block) is int and 0 < block < 1 << 20 and type(nested) is int and 0 <= nested < 1 << 20
    if (
        not isinstance(shape, list)
        or not isinstance(block, int)
        or not good
        or not sizes
        or type(offset) not in (int, float)
        or not math.isfinite(offset)
    ):
        found.append(f"'{state.name}' holds {shown(values)}: no shape of a matrix with sizes of blocks")
        return None
    count = shape[0] * shape[1]
    scales = -(-count // block)
    shapes: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "": (("U8",), (-(-count // 2), 1)),
        ".absmax": (("U8",) if nested else ("F32",), (scales,)),
        ".quant_map": (("F32",), (16,)),
    }
    if nested:
        shapes[".nested_absmax"] = (("F32",), (-(-scales // nested),))
        shapes[".nested_quant_map"] = (("F32",), (256,))
    before = len(found)
    parts = {"state": state}
    for role, (dtypes, want) in shapes.items():
        info = source.infos.get(f"{name}{role}")
        if info is None:
            found.append(f"missing tensor '{name}{role}'")
        elif info.shape not in (want, want[::-1]) or info.dtype not in dtypes:
            found.append(f"'{info.name}' is {info.dtype} {info.shape}, not {dtypes[0]} {want}")
        else:
            parts[role] = info
    if len(found) > before:
        return None
    return Blocks(name=name, shape=(shape[0], shape[1]), block=block, nested=nested, offset=float(offset), parts=parts)


def dequantised_blocks(matrix: Blocks, source: TensorSource) -> Tensor:
    """float32 (out, in)."""

    def part(role: str) -> Tensor:
        return source.load(matrix.parts[role].name).flatten()

    scales = part(".absmax")
    if matrix.nested:
        outer = part(".nested_absmax").repeat_interleave(matrix.nested)[: len(scales)]
        scales = part(".nested_quant_map")[scales.int()] * outer + matrix.offset
    packed = part("")
    codes = torch.stack((packed >> 4, packed & 15), -1).flatten()[: math.prod(matrix.shape)]
    values = part(".quant_map")[codes.int()]
    whole = len(values) // matrix.block * matrix.block
    values[:whole].view(-1, matrix.block).mul_(scales[: whole // matrix.block, None])
    values[whole:] *= scales[-1]
    return values.view(matrix.shape)


class RowsOfInt8(Format):
    """int8 with a scale for each row."""

    key = "SCB"

    def describe(self, stem: str, source: TensorSource, found: list[str]) -> Matrix | None:
        weight, scale = source.infos.get(f"{stem}.weight"), source.infos[f"{stem}.SCB"]
        shape = weight.shape if weight is not None else ()
        if weight is None or weight.dtype != "I8" or len(shape) != 2 or not math.prod(shape):
            held = "missing" if weight is None else f"{weight.dtype} {shape}"
            found.append(f"'{stem}.weight' is {held}; beside '{stem}.SCB' it must be an int8 matrix")
            return None
        if scale.dtype != "F32" or scale.shape not in ((shape[0],), (shape[0], 1)):
            found.append(f"'{scale.name}' is {scale.dtype} {scale.shape}, not F32 {shape[:1]}")
            return None
        parts = {"weight": weight, "SCB": scale}
        form = source.infos.get(f"{stem}.weight_format")  # a note of the order of rows, of which files have but one
        if form is not None:
            parts["weight_format"] = form
            if form.dtype != "U8" or math.prod(form.shape) != 1 or int(source.load(form.name)) != 0:
                found.append(f"'{form.name}' says that the rows are in the order of a GPU's tiles")
                return None
        return Matrix(name=f"{stem}.weight", shape=(shape[0], shape[1]), bits=8, groups=1, parts=parts)

    def codes(self, matrix: Matrix, source: TensorSource) -> Tensor:
        return source.load(matrix.parts["weight"].name).view(torch.uint8) ^ 128

    def groups(self, matrix: Matrix, source: TensorSource) -> Groups:
        scales = source.load(matrix.parts["SCB"].name).view(-1, 1) / 127
        return Groups(scales, None, None)


def plain_info(matrix: Blocks | Matrix, dtype: str) -> TensorInfo:
    """How a matrix looks to whoever loads it."""
    first = next(iter(matrix.parts.values()))
    return replace(first, name=matrix.name, shape=matrix.shape, dtype=dtype, nbytes=matrix.nbytes)

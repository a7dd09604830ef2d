"""Rows of values as GGUF stores them: dense kinds with torch, block kinds with the `gguf` package's own encoders."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hanlin.checkpoints.blocks import BLOCKS, dequantize

__all__ = ["DENSE", "bound", "decode", "encode", "row_bytes", "row_chunks"]

DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Elements encoded at once. The package's encoders need some thirty bytes for each, which a cache should hold.
_AT_ONCE = 1 << 18
# Half a step, in parts of a block's largest value: 127 steps, 8 steps with the end of the range left out, or 15 steps
# over twice as much; and what rounding the scale to float16 moves.
_STEPS = {"Q8_0": 0.5 / 127, "Q4_0": 1 / 8, "Q4_1": 1 / 15}


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row; `columns` must divide into whole blocks."""
    elements, nbytes = BLOCKS[kind]
    return columns // elements * nbytes


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """All rows, some at a time."""
    step = max(1, _AT_ONCE // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def encode(values: Tensor, kind: str) -> npt.NDArray[np.uint8]:
    """The stored bytes (n,) of whole rows (rows, columns), or of a vector."""
    if kind in DENSE:
        return values.to(DENSE[kind]).contiguous().reshape(-1).view(torch.uint8).numpy()
    import gguf

    # A block of nothing but zeros, or near it, divides by nothing; its scale is then 0.
    with np.errstate(all="ignore"):
        blocks = gguf.quants.quantize(values.float().contiguous().numpy(), gguf.GGMLQuantizationType[kind])
    return np.asarray(blocks, dtype=np.uint8).reshape(-1)


def decode(data: npt.NDArray[np.uint8], kind: str, shape: tuple[int, ...]) -> Tensor:
    """The values (shape) that stored bytes stand for, in the dtype that they are read in."""
    if kind in DENSE:
        return torch.from_numpy(data.copy()).view(DENSE[kind]).view(shape)
    return dequantize(kind, data, shape)


def bound(values: Tensor, kind: str) -> Tensor:
    """How far each value of rows (rows, columns) may move when it is rounded to a block kind: the same shape."""
    elements, _ = BLOCKS[kind]
    rows, columns = values.shape
    largest = values.float().abs().reshape(rows, -1, elements).amax(-1, keepdim=True)
    # float16 has 11 bits, and below 6e-5 fewer.
    allowed = largest * (_STEPS[kind] + 2**-9) + 2**-17
    return allowed.expand(-1, -1, elements).reshape(rows, columns)

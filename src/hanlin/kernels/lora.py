"""Low-rank additions to a program's products, in the layout of hl_low_rank; see `cpu/hanlin_cpu.h`."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hanlin.kernels.abi import AdapterStruct, LowRankStruct

__all__ = ["PackedAdapter", "Piece"]

_GROUP, _TILE = 16, 32  # outputs whose `up` lies together, outputs of a weight's tile


class Piece(NamedTuple):
    """up @ down for some outputs of a weight: down (rank, in) and up (rows, rank) float32, place int32 (rows,)."""

    down: NDArray[np.float32]
    up: NDArray[np.float32]
    place: NDArray[np.int32]


class PackedAdapter:
    """Additions to the operations of one program. Must live as long as steps that use it run.

    Args:
        operations: how many the program has.
        pieces: by the number of an operation, (outputs of its weight, what is added to them).
        bf16: round to bfloat16, which halves the memory and the time it takes to read it.

    Attributes:
        nbytes: its size.
    """

    def __init__(self, operations: int, pieces: Mapping[int, tuple[int, Sequence[Piece]]], *, bf16: bool) -> None:
        self._keep: list[NDArray[Any]] = []
        parts = (LowRankStruct * operations)()
        for number, (outputs, some) in pieces.items():
            parts[number] = self._part(outputs, some, bf16)
        self._parts = parts
        widest = max((part.rank for part in parts), default=0)
        self.struct = AdapterStruct(n_ops=operations, widest=widest, bf16=int(bf16), ops=ctypes.addressof(parts))
        self.nbytes = sum(array.nbytes for array in self._keep)

    @property
    def address(self) -> int:
        return ctypes.addressof(self.struct)

    def _part(self, outputs: int, pieces: Sequence[Piece], bf16: bool) -> LowRankStruct:
        groups = -(-outputs // _TILE) * (_TILE // _GROUP)
        down = np.concatenate([piece.down for piece in pieces])
        rank = len(down)
        first, end = np.full(groups, rank), np.zeros(groups, np.int64)
        starts = np.cumsum([0, *(len(piece.down) for piece in pieces)])
        for start, piece in zip(starts, pieces, strict=False):
            mine = np.unique(piece.place // _GROUP)
            first[mine] = np.minimum(first[mine], start)
            end[mine] = np.maximum(end[mine], start + len(piece.down))
        taken = int((end - first).max())
        first = np.where(end > 0, np.minimum(first, rank - taken), -1)
        up = np.zeros((groups, taken, _GROUP), np.float32)
        for start, piece in zip(starts, pieces, strict=False):
            group, lane = piece.place // _GROUP, piece.place % _GROUP
            column = (start - first[group])[:, None] + np.arange(len(piece.down))
            up[group[:, None], column, lane[:, None]] = piece.up
        held = [_rounded(down) if bf16 else np.ascontiguousarray(down), _rounded(up) if bf16 else up]
        held.append(np.ascontiguousarray(first, np.int32))
        self._keep += held
        addresses = [array.ctypes.data for array in held]
        return LowRankStruct(rank=rank, taken=taken, down=addresses[0], up=addresses[1], first=addresses[2])


def _rounded(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of finite floats, nearest even: bfloat16."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

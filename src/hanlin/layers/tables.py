"""Cosines and sines by position, from tables: the same bits for a position whatever stands beside it."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hanlin.layers.rope import Positions, Rope, RopeConfig, Rotation

__all__ = ["TabledRope"]

_ROWS = 1024
_MOST = 256


class TabledRope(Rope):
    """`Rope` out of tables of 1,024 positions each, made at first use; the least recently used one of many goes."""

    def __init__(self, config: RopeConfig) -> None:
        super().__init__(config)
        self._tables: OrderedDict[tuple[int, int, int], tuple[Tensor, Tensor]] = OrderedDict()
        nothing = np.zeros((0, 0), np.float32)
        self._last = -1, nothing, nothing  # which table, as arrays

    def arrays(
        self, rows: NDArray[np.int64], lengths: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosines and sines (T, R / 2) of positions (P, T), see `Positions`; quick for most steps, which are small."""
        if lengths is None and len(rows) == 1:
            low, high = int(rows.min()) // _ROWS, int(rows.max()) // _ROWS
            if low == high:
                if self._last[0] != low:
                    cos, sin = self._table(low, 0, self.config.dims)
                    self._last = low, cos.numpy(), sin.numpy()
                _, cosines, sines = self._last
                index = rows[0] - low * _ROWS
                return cosines[index], sines[index]
        found = self(Positions(torch.from_numpy(rows), None if lengths is None else torch.from_numpy(lengths)))
        return found.cos.numpy(), found.sin.numpy()

    def __call__(self, positions: Positions) -> Rotation:
        rows = positions.rows
        lengths = positions.lengths if positions.lengths is not None else torch.zeros_like(rows[0])
        parts = [self._look_up(row, lengths, self.config.dims // len(rows)) for row in rows]
        cos, sin = (torch.cat(side, -1) if len(side) > 1 else side[0] for side in zip(*parts, strict=True))
        return Rotation(cos, sin, self.config.interleaved)

    def _look_up(self, row: Tensor, lengths: Tensor, dims: int) -> tuple[Tensor, Tensor]:
        cos = torch.empty(len(row), dims // 2)
        sin = torch.empty_like(cos)
        keys = torch.stack((row // _ROWS, lengths), 1)
        for chunk, length in torch.unique(keys, dim=0).tolist():
            here = (keys[:, 0] == chunk) & (keys[:, 1] == length)
            table = self._table(chunk, length, dims)
            index = row[here] - chunk * _ROWS
            cos[here], sin[here] = table[0][index], table[1][index]
        return cos, sin

    def _table(self, chunk: int, length: int, dims: int) -> tuple[Tensor, Tensor]:
        key = (chunk, length, dims)
        if key not in self._tables:
            place = torch.arange(chunk * _ROWS, (chunk + 1) * _ROWS)
            angles = place.float()[:, None] * self.frequencies(dims, place.new_full((1,), length), place.device)
            scale = self.attention_factor
            self._tables[key] = (angles.cos() * scale, angles.sin() * scale)
            if len(self._tables) > _MOST:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return self._tables[key]

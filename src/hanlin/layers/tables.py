"""Cosines and sines by position, from tables: the same bits for a position whatever stands beside it."""

from __future__ import annotations

from collections import OrderedDict

import torch
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

    def __call__(self, positions: Positions) -> Rotation:
        rows = positions.rows
        if positions.lengths is None and len(rows) == 1:  # by far the most steps, and small ones must be quick
            low, high = (int(end) // _ROWS for end in rows[0].aminmax())
            if low == high:
                cos, sin = self._table(low, 0, self.config.dims)
                index = rows[0] - low * _ROWS
                return Rotation(cos[index], sin[index], self.config.interleaved)
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

"""Rounding to nearest: what every method does once it has chosen the values to round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hanlin.checkpoints.grouped import Groups, dequantised
from hanlin.checkpoints.row_quantised import rounded

__all__ = ["Grid", "Quantised", "RowGrid"]

_LEAST = 2.0**-24  # the smallest float16, which scales are stored as


class Quantised(NamedTuple):
    """Codes uint8 (out, in), scales float32 (out, groups) that float16 holds, zero points float32 (out, groups)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Which values codes can stand for.

    Attributes:
        group: columns that share a scale and a zero point; the last group of a row may have fewer.
        symmetric: the zero point is the middle of the codes.
        least_zero: GPTQ's files cannot say 0.
    """

    bits: int
    group: int
    symmetric: bool = False
    least_zero: int = 0

    @property
    def middle(self) -> int:
        """The code that stands for zero where there are no zero points."""
        return 1 << (self.bits - 1)

    def count(self, columns: int) -> int:
        """Groups of a row."""
        return -(-columns // self.group)

    def grouped(self, weight: Tensor) -> Tensor:
        """(out, in) -> (out, groups, group), what is missing of the last group filled with zeros."""
        missing = self.count(weight.shape[1]) * self.group - weight.shape[1]
        return F.pad(weight, (0, missing)).view(weight.shape[0], -1, self.group)

    def range(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the greatest value (...) to be stood for in blocks (..., group); zero lies between."""
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        return low, high

    def fit(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points (out, groups) that reach everything in blocks (out, groups, group)."""
        most = float((1 << self.bits) - 1)
        low, high = self.range(blocks)
        scales = self.storable((high - low) / most)
        if self.symmetric:
            return scales, torch.full_like(scales, float(self.middle))
        return scales, (-low / scales).round().clamp(self.least_zero, most)

    def storable(self, scales: Tensor) -> Tensor:
        """The nearest scales that float16 holds, float32."""
        return scales.clamp(_LEAST, 6e4).half().float()

    def round(self, blocks: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """Codes float32 of blocks (..., group) with scales and zero points (...)."""
        return ((blocks / scales[..., None]).round() + zeros[..., None]).clamp(0, (1 << self.bits) - 1)

    def quantise(self, weight: Tensor) -> Quantised:
        """Float32 (out, in) to the nearest values."""
        blocks = self.grouped(weight)
        scales, zeros = self.fit(blocks)
        codes = self.round(blocks, scales, zeros).byte().flatten(1)[:, : weight.shape[1]]
        return Quantised(codes.contiguous(), scales, zeros)

    def values(self, quantised: Quantised) -> Tensor:
        """Float32 (out, in), as whoever loads the file gets them."""
        columns = quantised.codes.shape[1]
        order = torch.arange(columns) // self.group if columns % self.group else None
        return dequantised(quantised.codes, Groups(quantised.scales, quantised.zeros, order), self.bits)

    def nearest(self, weight: Tensor) -> Tensor:
        """The values that `quantise` leaves, at once."""
        blocks = self.grouped(weight)
        scales, zeros = self.fit(blocks)
        rounded = (self.round(blocks, scales, zeros) - zeros[..., None]) * scales[..., None]
        return rounded.flatten(1)[:, : weight.shape[1]]


@dataclass(frozen=True, kw_only=True)
class RowGrid(Grid):
    """One scale a row and no zero points: ChatGLM's own files, and 8 bits beside 8-bit activations."""

    group: int = 0
    symmetric: bool = True

    def quantise(self, weight: Tensor) -> Quantised:
        numbers, scales = rounded(weight, self.bits)
        zeros = torch.full((len(weight), 1), float(self.middle))
        return Quantised((numbers.short() + self.middle).byte(), scales.float()[:, None], zeros)

    def values(self, quantised: Quantised) -> Tensor:
        return dequantised(quantised.codes, Groups(quantised.scales, quantised.zeros, None), self.bits)

    def nearest(self, weight: Tensor) -> Tensor:
        return self.values(self.quantise(weight))

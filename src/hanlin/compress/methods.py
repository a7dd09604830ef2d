"""What comes into layers, and the factors of AWQ and SmoothQuant; errors by one statistic, the inputs' Gram matrix.

With H = X^T X, the squared error of the outputs of weights that are off by E is trace(E H E^T): exact for every token,
and no token has to be kept. Source: Lin et al. 2023 (arXiv 2306.00978).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hanlin.compress.grid import Grid

__all__ = ["Inputs", "balancing", "output_error", "smoothing"]

_STEPS = 20
_DAMPING = 0.01
_ROWS = 256  # rows that a search looks at, spread over the matrices


class Inputs:
    """What came into a linear layer: H (in, in), and sums and maxima of magnitudes (in,), all float32."""

    def __init__(self, columns: int) -> None:
        self.gram = torch.zeros(columns, columns)
        self.magnitudes = torch.zeros(columns)
        self.most = torch.zeros(columns)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Rows (tokens, in)."""
        self.gram.addmm_(x.t(), x)
        self.magnitudes += x.abs().sum(0)
        self.most = torch.maximum(self.most, x.abs().amax(0))
        self.count += len(x)

    @property
    def mean_magnitude(self) -> Tensor:
        return self.magnitudes / max(1, self.count)

    def damped(self) -> Tensor:
        """H float64 with some of its mean diagonal on the diagonal, the more the fewer tokens there were.

        What few tokens say of many columns does not hold for others. On fresh inputs a tenth of columns over tokens
        was near the best.
        """
        damped = self.gram.double()
        share = max(_DAMPING, 0.1 * len(damped) / max(1, self.count))
        damped.diagonal().add_(share * damped.diagonal().mean().clamp(min=1e-30))
        return damped

    def scale(self, by: Tensor) -> None:
        """The inputs were divided by `by` (in,)."""
        self.gram /= by[:, None] * by
        self.magnitudes /= by
        self.most /= by


def output_error(error: Tensor, gram: Tensor) -> float:
    """trace(E H E^T) for E (out, in)."""
    return float(((error @ gram) * error).sum(dtype=torch.float64))


def smoothing(weights: Sequence[Tensor], inputs: Inputs, grid: Grid) -> Tensor:
    """AWQ: factors (in,) for the columns of layers that share an input, so that rounding them costs the outputs least.

    Tried are powers of the inputs' mean magnitude, alone and over powers of the weights' own.
    """
    stride = max(1, sum(len(weight) for weight in weights) // _ROWS)
    weight = torch.cat(list(weights))[::stride]
    gram = inputs.gram
    x = inputs.mean_magnitude.clamp(min=1e-6)
    blocks = grid.grouped(weight).abs()
    relative = (blocks / blocks.amax(-1, keepdim=True).clamp(min=1e-12)).flatten(1)[:, : weight.shape[1]]
    w = relative.mean(0).clamp(min=1e-4)
    best, least = torch.ones_like(x), output_error(grid.nearest(weight) - weight, gram)
    for step in range(1, _STEPS + 1):
        power = step / _STEPS
        for factors in (x**power, x**power / w ** (1 - power)):
            factors = (factors / (factors.max() * factors.min()).sqrt()).clamp(1e-4, 1e4)
            error = output_error(grid.nearest(weight * factors) / factors - weight, gram)
            if error < least:
                best, least = factors, error
    return best


def balancing(weights: Sequence[Tensor], inputs: Inputs) -> Tensor:
    """SmoothQuant: factors (in,) that even out the ranges of inputs and columns, for both get 8 bits.

    Source: Xiao et al. 2022 (arXiv 2211.10438), with its usual alpha of a half.
    """
    columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    factors = (inputs.most.clamp(min=1e-5) / columns.clamp(min=1e-5)).sqrt()
    return (factors / (factors.max() * factors.min()).sqrt()).clamp(1e-4, 1e4)

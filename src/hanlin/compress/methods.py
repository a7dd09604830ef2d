"""AWQ, GPTQ and SmoothQuant; the first two from one statistic: the inputs' Gram matrix over all calibration tokens.

With H = X^T X, the squared error of the outputs of weights that are off by E is trace(E H E^T): exact for every token,
and no token has to be kept. Sources: Lin et al. 2023 (arXiv 2306.00978), Frantar et al. 2022 (arXiv 2210.17323).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hanlin.compress.grid import Grid, Quantised

__all__ = ["Inputs", "balancing", "clipped", "gptq", "output_error", "smoothing"]

_STEPS = 20
_ROWS = 256  # rows that a search looks at, spread over the matrices
_SHRINKS = tuple(1 - 0.05 * step for step in range(11))
_CLIPPED_AT_ONCE = 256
_GPTQ_COLUMNS = 128


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


def clipped(weight: Tensor, inputs: Inputs, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales and zero points (out, groups), each group's range shrunk as far as it lowers its part of the error."""
    columns = weight.shape[1]
    missing = grid.count(columns) * grid.group - columns
    gram = F.pad(inputs.gram, (0, missing, 0, missing))
    # The blocks on the diagonal: the groups' own parts, what lies between two groups left out.
    own = torch.stack([gram[at : at + grid.group, at : at + grid.group] for at in range(0, len(gram), grid.group)])
    found = []
    for rows in torch.split(weight, _CLIPPED_AT_ONCE):
        blocks = grid.grouped(rows)
        best = grid.fit(blocks)
        least = torch.full(blocks.shape[:2], torch.inf)
        for shrink in _SHRINKS:
            scales, zeros = grid.fit(blocks, shrink)
            error = (grid.round(blocks, scales, zeros) - zeros[..., None]) * scales[..., None] - blocks
            cost = (torch.einsum("ogi,gij->ogj", error, own) * error).sum(-1)
            better = cost < least
            best[0][better], best[1][better], least[better] = scales[better], zeros[better], cost[better]
        found.append(best)
    return torch.cat([scales for scales, _ in found]), torch.cat([zeros for _, zeros in found])


def gptq(
    weight: Tensor, inputs: Inputs, grid: Grid, fitted: tuple[Tensor, Tensor], *, damping: float = 0.01
) -> Quantised:
    """Column after column, the loudest input's first; each rounding error is made up for by what is still to come.

    `fitted` are scales and zero points, which stay: groups remain groups of neighbours, whatever the order.
    """
    out, columns = weight.shape
    scales, zeros = fitted
    gram = inputs.gram.double()
    order = gram.diagonal().argsort(descending=True, stable=True)
    gram, rest = gram[order][:, order], weight[:, order]
    gram.diagonal().add_(damping * gram.diagonal().mean().clamp(min=1e-30))
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True).float()
    codes = torch.empty(out, columns, dtype=torch.uint8)
    most = (1 << grid.bits) - 1
    for start in range(0, columns, _GPTQ_COLUMNS):
        end = min(start + _GPTQ_COLUMNS, columns)
        errors = torch.empty(out, end - start)
        for place in range(start, end):
            column = int(order[place])
            scale, zero = scales[:, column // grid.group], zeros[:, column // grid.group]
            value = rest[:, place]
            code = ((value / scale).round() + zero).clamp(0, most)
            codes[:, column] = code.byte()
            error = (value - (code - zero) * scale) / inverse[place, place]
            rest[:, place + 1 : end] -= error[:, None] * inverse[place, place + 1 : end]
            errors[:, place - start] = error
        rest[:, end:] -= errors @ inverse[start:end, end:]
    return Quantised(codes, scales, zeros)

"""AWQ and GPTQ, both from one statistic of the inputs: their Gram matrix over all calibration tokens.

With H = X^T X, the squared error of the outputs of weights that are off by E is trace(E H E^T): exact for every token,
and no token has to be kept. Sources: Lin et al. 2023 (arXiv 2306.00978), Frantar et al. 2022 (arXiv 2210.17323).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hanlin.compress.grid import Grid, Quantised

__all__ = ["Inputs", "clipped", "gptq", "output_error", "smoothing"]

_STEPS = 20
_ROWS = 1024  # rows that a search looks at, spread over the matrix
_SHRINKS = tuple(1 - 0.05 * step for step in range(11))
_CLIPPED_AT_ONCE = 256
_GPTQ_COLUMNS = 128


class Inputs:
    """What came into a linear layer: H (in, in) and the sum of magnitudes (in,), both float32."""

    def __init__(self, columns: int) -> None:
        self.gram = torch.zeros(columns, columns)
        self.magnitudes = torch.zeros(columns)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Rows (tokens, in)."""
        self.gram.addmm_(x.t(), x)
        self.magnitudes += x.abs().sum(0)
        self.count += len(x)

    @property
    def mean_magnitude(self) -> Tensor:
        return self.magnitudes / max(1, self.count)

    def scale(self, by: Tensor) -> None:
        """The inputs were divided by `by` (in,)."""
        self.gram /= by[:, None] * by
        self.magnitudes /= by


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


def clipped(weight: Tensor, inputs: Inputs, grid: Grid) -> Quantised:
    """Round to nearest, each group's range shrunk as far as it lowers the group's part of the outputs' error."""
    columns = weight.shape[1]
    count = grid.count(columns)
    wide = count * grid.group
    gram = torch.zeros(wide, wide) if wide != columns else inputs.gram
    if wide != columns:
        gram[:columns, :columns] = inputs.gram
    # The blocks on the diagonal: the groups' own parts, what lies between two groups left out.
    own = torch.stack([gram[at : at + grid.group, at : at + grid.group] for at in range(0, wide, grid.group)])
    shrinks = []
    for rows in torch.split(weight, _CLIPPED_AT_ONCE):
        blocks = grid.grouped(rows)
        best = torch.ones(blocks.shape[:2])
        least = torch.full(blocks.shape[:2], torch.inf)
        for shrink in _SHRINKS:
            scales, zeros = grid.fit(blocks, shrink)
            error = (grid.round(blocks, scales, zeros) - zeros[..., None]) * scales[..., None] - blocks
            cost = (torch.einsum("ogi,gij->ogj", error, own) * error).sum(-1)
            better = cost < least
            best[better], least[better] = shrink, cost[better]
        shrinks.append(best)
    return grid.quantise(weight, torch.cat(shrinks))


def gptq(weight: Tensor, inputs: Inputs, grid: Grid, *, damping: float = 0.01) -> Quantised:
    """Column after column, each one's rounding error made up for by those that are still to be rounded."""
    weight = weight.clone()
    out, columns = weight.shape
    gram = inputs.gram.double()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1
    weight[:, dead] = 0
    gram.diagonal().add_(damping * gram.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True).float()
    codes = torch.empty(out, columns, dtype=torch.uint8)
    scales, zeros = torch.empty(out, grid.count(columns)), torch.empty(out, grid.count(columns))
    most = (1 << grid.bits) - 1
    for start in range(0, columns, _GPTQ_COLUMNS):
        end = min(start + _GPTQ_COLUMNS, columns)
        errors = torch.empty(out, end - start)
        for column in range(start, end):
            group, first = divmod(column, grid.group)
            if first == 0:
                # What earlier columns of this block have to pass on has reached these already; of the group's columns
                # beyond the block it is still due.
                whole = weight[:, column : column + grid.group].clone()
                if column + grid.group > end and column > start:
                    whole[:, end - column :] -= (
                        errors[:, : column - start] @ inverse[start:column, end : column + grid.group]
                    )
                scales[:, group : group + 1], zeros[:, group : group + 1] = grid.fit(grid.grouped(whole))
            scale, zero = scales[:, group], zeros[:, group]
            value = weight[:, column]
            code = ((value / scale).round() + zero).clamp(0, most)
            codes[:, column] = code.byte()
            error = (value - (code - zero) * scale) / inverse[column, column]
            weight[:, column + 1 : end] -= error[:, None] * inverse[column, column + 1 : end]
            errors[:, column - start] = error
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return Quantised(codes, scales, zeros)

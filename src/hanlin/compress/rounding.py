"""Scales, zero points and codes of a matrix that cost its outputs least, given the inputs' Gram matrix.

Everything lowers trace(E H E^T), E being what the weights are off by. Groups are taken in turn, the loudest inputs'
first: each gets the scale and zero point that cost least once later columns make up for what they can, and passes its
columns' errors on to them (Frantar et al. 2022, arXiv 2210.17323). Then codes are set anew one column at a time, with
all others as they are, and scales by least squares, in turn. Inside, matrices lie as (in, out), so that columns are
contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hanlin.compress.grid import Grid, Quantised

__all__ = ["found", "passed_on", "refined"]

_WIDTHS = tuple(0.60 + 0.04 * step for step in range(12))  # of a group's range
_CLOSER = (0.02, 0.01)  # steps to both sides of the best so far
_ROUNDS = 2
_COLUMNS = 64  # whose effect on all others is taken in at once
_ROWS = 256  # whose scales are solved for at once
_STAY = 1e-4  # how far scales are held where the inputs say nothing


def found(blocks: Tensor, own: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales and zero points (out,) for the columns of one group.

    Tried are widths of the range and, for each, the zero points around the one that fits it.

    Args:
        blocks: (out, columns) of weights.
        own: (columns, columns), what an error of theirs costs.
    """
    low, high = grid.range(blocks)
    most = float((1 << grid.bits) - 1)
    scales, zeros = grid.fit(blocks[:, None])
    best = scales[:, 0], zeros[:, 0], torch.ones_like(low)
    least = torch.full_like(low, torch.inf)

    def look(width: float | Tensor) -> None:
        scales = grid.storable((high - low) * width / most)
        middle = grid.middle if grid.symmetric else (-low * width / scales).round()
        for beside in (0,) if grid.symmetric else (0, -1, 1):
            zeros = (torch.as_tensor(middle) + beside).expand_as(scales).clamp(grid.least_zero, most)
            off = (grid.round(blocks, scales, zeros) - zeros[:, None]) * scales[:, None] - blocks
            cost = ((off @ own) * off).sum(1)
            better = cost < least
            for kept, new in zip((*best, least), (scales, zeros, torch.as_tensor(width), cost), strict=True):
                kept[better] = new.expand_as(kept)[better]

    for width in _WIDTHS:
        look(width)
    for step in _CLOSER:
        centre = best[2].clone()
        look(centre - step)
        look(centre + step)
    return best[0], best[1]


def passed_on(weight: Tensor, gram: Tensor, grid: Grid) -> Quantised:
    """Group after group, and in it column after column; what follows makes up for each rounding error.

    Groups remain groups of neighbours, whatever the order. `gram` is float64 and damped.
    """
    out, columns = weight.shape
    loud = gram.diagonal()
    spans = torch.split(torch.arange(columns), grid.group)
    turns = torch.stack([loud[span].mean() for span in spans]).argsort(descending=True, stable=True).tolist()
    order = torch.cat([spans[turn][loud[spans[turn]].argsort(descending=True, stable=True)] for turn in turns])
    upper = torch.linalg.cholesky(gram[order][:, order])
    upper = torch.linalg.cholesky(torch.cholesky_inverse(upper), upper=True)
    # The inverse of this square is what a group's error costs after all that follow have made up for it.
    own = [torch.cholesky_inverse(part, upper=True).float() for part in _squares(upper, [len(spans[t]) for t in turns])]
    passing, rest = upper.float(), weight.t()[order].contiguous()
    codes = torch.empty(columns, out, dtype=torch.uint8)
    scales, zeros = torch.empty(out, len(spans)), torch.empty(out, len(spans))
    start = 0
    for turn, cost in zip(turns, own, strict=True):
        end = start + len(spans[turn])
        scale, zero = found(rest[start:end].t().contiguous(), cost, grid)
        scales[:, turn], zeros[:, turn] = scale, zero
        errors = torch.empty(end - start, out)
        for place in range(start, end):
            code = ((rest[place] / scale).round() + zero).clamp(0, (1 << grid.bits) - 1)
            codes[order[place]] = code.byte()
            error = errors[place - start]
            torch.div(rest[place] - (code - zero) * scale, passing[place, place], out=error)
            rest[place + 1 : end].addr_(passing[place, place + 1 : end], error, alpha=-1)
        rest[end:].addmm_(passing[start:end, end:].t(), errors, alpha=-1)
        start = end
    return Quantised(codes.t().contiguous(), scales, zeros)


def refined(weight: Tensor, gram: Tensor, grid: Grid, quantised: Quantised) -> Quantised:
    """Codes and scales anew in turn, each the best while everything else stays; zero points stay."""
    gram = gram.float()
    for _ in range(_ROUNDS):
        quantised = _recoded(weight, gram, grid, quantised)
        quantised = _rescaled(weight, gram, grid, quantised)
    return quantised


def _recoded(weight: Tensor, gram: Tensor, grid: Grid, quantised: Quantised) -> Quantised:
    """Codes: with all others as they are, the error is a parabola in each."""
    columns, most = weight.shape[1], (1 << grid.bits) - 1
    codes = quantised.codes.t().float()
    group = torch.arange(columns) // grid.group
    scales = quantised.scales.t().contiguous()
    slopes = gram @ (grid.values(quantised) - weight).t()
    for start in range(0, columns, _COLUMNS):
        end = min(start + _COLUMNS, columns)
        within, moved = slopes[start:end].clone(), torch.empty(end - start, weight.shape[0])
        for column in range(start, end):
            scale = scales[group[column]]
            code = (codes[column] - within[column - start] / (gram[column, column] * scale)).round().clamp(0, most)
            move = moved[column - start]
            torch.mul(code - codes[column], scale, out=move)
            codes[column] = code
            within.addr_(gram[start:end, column], move)
        slopes.addmm_(gram[:, start:end], moved)
    return quantised._replace(codes=codes.t().byte().contiguous())


def _rescaled(weight: Tensor, gram: Tensor, grid: Grid, quantised: Quantised) -> Quantised:
    """Scales: least squares for all groups of a row at once."""
    scales = []
    for rows, codes, old, zeros in zip(
        *(torch.split(part, _ROWS) for part in (weight, quantised.codes, quantised.scales, quantised.zeros)),
        strict=True,
    ):
        numbers = grid.grouped(codes.float() - zeros.repeat_interleave(grid.group, 1)[:, : codes.shape[1]])
        wanted = (numbers * grid.grouped(rows @ gram)).sum(-1)
        square = torch.stack(
            [
                (numbers * grid.grouped(part[:, : len(own)] @ own)).sum(-1)
                for part, own in zip(numbers.unbind(1), torch.split(gram, grid.group), strict=True)
            ],
            1,
        )
        stay = square.diagonal(dim1=1, dim2=2) * _STAY + 1e-20
        square.diagonal(dim1=1, dim2=2).add_(stay)
        new = torch.linalg.solve(square, wanted + stay * old)
        possible = new.isfinite() & (new > 0)
        scales.append(torch.where(possible, grid.storable(new.nan_to_num()), old))
    return quantised._replace(scales=torch.cat(scales))


def _squares(upper: Tensor, sizes: list[int]) -> list[Tensor]:
    """Those on the diagonal."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [upper[end - size : end, end - size : end] for size, end in zip(sizes, ends, strict=True)]

"""Torch operations whose result for a row does not depend on the rows beside it (promise 2), put in place from outside.

Torch chooses other summation orders for other numbers of rows, and other code for the ends of vectors. Here
* products are only called with row counts for which a probe on this machine has shown that every row of every such
  call takes the same path (`RowPaths`);
* sums over a row are made by halving, out of element-wise additions, which IEEE 754 fixes;
* functions that are not correctly rounded (the exponential in SiLU, the tanh in GELU) see one row a call, so that each
  element always stands at the same place.
It is the reference: slower than the native step, and right on any CPU that torch runs on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanlin.layers.activation import GELU, SwiGLU
from hanlin.layers.linear import Linear
from hanlin.layers.norm import LayerNorm, RMSNorm
from hanlin.layers.rope import Rope
from hanlin.layers.tables import TabledRope

__all__ = ["RowPaths", "make_invariant", "product", "sum_by_halving"]

_COUNTS = (128, 32, 8, 4, 1)
_ALIGNMENT = 64  # bytes; some libraries take another path for arrays that start elsewhere


class RowPaths:
    """For each kind of product the row counts that are safe to mix, found by trial and remembered.

    A product's control flow depends on shapes alone. The probe's sums cancel to nothing but rounding errors, so that
    another order of summation shows in nearly every output, whatever the dtype.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], tuple[int, ...]] = {}

    def counts(self, weight: Tensor, bias: Tensor | None) -> tuple[int, ...]:
        """Safe row counts for x (rows, in) times weight (out, in), largest first."""
        key = (tuple(weight.shape), weight.dtype, bias is not None, torch.get_num_threads())
        if key not in self._known:
            self._known[key] = self._probe(weight, bias)
        return self._known[key]

    @staticmethod
    def _probe(like: Tensor, bias: Tensor | None) -> tuple[int, ...]:
        (rows, columns), dtype = like.shape, like.dtype
        generator = torch.Generator().manual_seed(0)
        half = torch.randn(1, columns // 2, generator=generator).to(dtype)
        row = F.pad(torch.cat((half, half), 1), (0, columns % 2))
        weight = torch.empty(rows, columns, dtype=dtype)
        for start in range(0, rows, 1024):  # in parts, to need no second weight in float32
            part = weight[start : start + 1024]
            left = torch.randn(len(part), columns // 2, generator=generator).to(dtype)
            part.copy_(F.pad(torch.cat((left, -left), 1), (0, columns % 2)))
        zero = None if bias is None else torch.zeros_like(bias)
        groups: list[tuple[Tensor, list[int]]] = []
        for count in _COUNTS:
            out = F.linear(row.expand(count, -1).contiguous(), weight, zero)
            if not torch.equal(out, out[:1].expand_as(out)):
                continue  # rows of one call already differ
            for first, members in groups:
                if torch.equal(first, out[0]):
                    members.append(count)
                    break
            else:
                groups.append((out[0], [count]))
        # The best group has small counts for decoding and large ones for prompts; one row alone always qualifies.
        best = max((members for _, members in groups), key=lambda m: (m[-1] <= 16, len(m), m[0]))
        return tuple(best)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, paths: RowPaths) -> Tensor:
    """x (rows, in) times weight (out, in), plus bias, over row counts that share one path."""
    counts = paths.counts(weight, bias)
    rows, start, outs = x.shape[0], 0, []
    while start < rows:
        left = rows - start
        # the largest count that fits, else the smallest one that covers what is left, padded
        count = next((c for c in counts if c <= left), None)
        if count is None or (left > count and left <= counts[-1]):
            count = min((c for c in counts if c >= left), default=counts[-1])
        piece = x[start : start + count]
        if piece.data_ptr() % _ALIGNMENT or not piece.is_contiguous():
            piece = piece.clone(memory_format=torch.contiguous_format)
        if len(piece) < count:
            piece = F.pad(piece, (0, 0, 0, count - len(piece)))
        outs.append(F.linear(piece, weight, bias)[: min(count, left)])
        start += count
    return outs[0] if len(outs) == 1 else torch.cat(outs)


class InvariantLinear(Linear):
    """`Linear` over row counts that share one path."""

    paths: RowPaths

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias, self.paths)


class InvariantRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.scale(x, sum_by_halving(x.float().square()) / x.shape[-1])

    def scale(self, x: Tensor, square: Tensor) -> Tensor:
        normal = x.float() / torch.sqrt(square + self.eps)  # division and root are correctly rounded, rsqrt need not be
        return (self.weight * normal).to(x.dtype) if self.scale_first else self.weight * normal.to(x.dtype)


class InvariantLayerNorm(LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        wide, size = x.float(), x.shape[-1]
        wide = wide - sum_by_halving(wide) / size
        normal = wide / torch.sqrt(sum_by_halving(wide.square()) / size + self.eps)
        return (normal * self.weight.float() + self.bias.float()).to(x.dtype)


class InvariantGELU(GELU):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for index in range(x.shape[0]):
            out[index] = super().forward(x[index])
        return out


class InvariantSwiGLU(SwiGLU):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        out = torch.empty_like(gate)
        for index in range(gate.shape[0]):
            out[index] = F.silu(gate[index])
        return out * up


def sum_by_halving(x: Tensor) -> Tensor:
    """Sum over the last dimension, keeping it, in an order that depends on its length alone: (..., D) -> (..., 1)."""
    size = 1 << (x.shape[-1] - 1).bit_length()
    if size != x.shape[-1]:
        x = F.pad(x, (0, size - x.shape[-1]))
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    GELU: InvariantGELU,
    LayerNorm: InvariantLayerNorm,
    Linear: InvariantLinear,
    RMSNorm: InvariantRMSNorm,
    SwiGLU: InvariantSwiGLU,
}


def make_invariant(model: nn.Module) -> None:
    """Let every leaf of a loaded model compute row by row alike. Other leaves have to be element-wise or exact.

    Only the class of a leaf changes: names, parameters and facts stay.
    """
    paths = RowPaths()
    for module in model.modules():
        kind = _KINDS.get(type(module))
        if kind is not None:
            module.__class__ = kind
        if isinstance(module, InvariantLinear):
            module.paths = paths
        rope = getattr(module, "rope", None)
        if isinstance(rope, Rope):
            module.rope = TabledRope(rope.config)  # type: ignore[assignment]  # no module of torch

"""ChatGLM's own quantisation for Transformers classes: int8 numbers and a scale for each row, as released."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanlin.checkpoints.row_quantised import dequantised, packed, rounded
from hanlin.layers.embedding import Embedding
from hanlin.layers.linear import Linear

__all__ = ["RowQuantisedEmbedding", "RowQuantisedLinear", "quantise_rows"]


class RowQuantisedLinear(Linear):
    """A frozen linear layer that keeps `weight` as int8 (out, in * bits / 8) and `weight_scale` (out,).

    The weight is made anew at every call, and not kept for the backward pass.
    """

    bits: int

    @classmethod
    def of(cls, linear: Linear, bits: int, *, empty: bool = False) -> RowQuantisedLinear:
        """From a dense layer; `empty` leaves the numbers to whoever loads a checkpoint."""
        with torch.device("meta"):
            made = cls(
                linear.in_features,
                linear.out_features,
                bias=False,
                parts=linear.parts,
                groups=linear.groups,
                cut=linear.cut,
            )
        made.bits, made.bias = bits, linear.bias
        _fill(made, linear.weight.detach(), bits, empty)
        return made

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight, self.weight_scale, self.bias, self.bits)  # type: ignore[no-any-return, no-untyped-call]


class RowQuantisedEmbedding(Embedding):
    """A frozen table of embeddings, kept as `RowQuantisedLinear` keeps its weight; a row is a token's."""

    bits: int

    @classmethod
    def of(cls, table: nn.Embedding, bits: int, *, empty: bool = False) -> RowQuantisedEmbedding:
        """From a dense table; `empty` leaves the numbers to whoever loads a checkpoint."""
        with torch.device("meta"):
            made = cls(table.num_embeddings, table.embedding_dim)
        made.bits = bits
        _fill(made, table.weight.detach(), bits, empty)
        return made

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch names it
        scale = cast(Tensor, self.weight_scale)[input]
        rows = dequantised(self.weight[input].flatten(0, -2), scale.flatten(), self.bits)
        return rows.view(*input.shape, -1).to(scale.dtype)


def _fill(made: nn.Module, weight: Tensor, bits: int, empty: bool) -> None:
    if empty or weight.is_meta:
        numbers = weight.new_zeros((len(weight), weight.shape[1] * bits // 8), dtype=torch.int8)
        scale = weight.new_zeros(len(weight))
    else:
        numbers, scale = quantised(weight, bits)
    made.weight = nn.Parameter(numbers, requires_grad=False)
    made.weight_scale = nn.Parameter(scale, requires_grad=False)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, numbers: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(numbers, scale)
        ctx.bits = bits
        return F.linear(x, dequantised(numbers, scale, bits).to(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        numbers, scale = ctx.saved_tensors
        bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
        return grad @ dequantised(numbers, scale, ctx.bits).to(grad.dtype), None, None, bias, None


def quantised(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(out, in) -> int8 (out, in * bits / 8), and scales (out,) in the weight's dtype, rounded to float16."""
    numbers, scale = rounded(weight, bits)
    return packed(numbers, bits), scale.to(weight.dtype)


def quantise_rows(blocks: nn.Module, bits: int, *, empty: bool = False) -> None:
    """Put quantised layers in place of all linear ones."""
    for name, module in list(blocks.named_modules()):
        if type(module) is Linear:
            owner, _, leaf = name.rpartition(".")
            setattr(blocks.get_submodule(owner), leaf, RowQuantisedLinear.of(module, bits, empty=empty))

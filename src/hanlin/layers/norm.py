"""Normalisation: root-mean-square, in the two roundings that released models were trained with, and layer norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LayerNorm", "RMSNorm"]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32.

    `scale_first` multiplies by the weight before rounding back to the dtype of x (ChatGLM2 and later); the default
    rounds first (InternLM, Llama). They differ in half precision only. Source: Zhang and Sennrich, 2019.
    """

    def __init__(self, size: int, eps: float, *, scale_first: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.scale_first = scale_first

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(x, mean_square(x))

    def scale(self, x: Tensor, square: Tensor) -> Tensor:
        """Apply the norm to x (..., D), given its mean square (..., 1) in float32."""
        normal = x.float() * torch.rsqrt(square + self.eps)
        return (self.weight * normal).to(x.dtype) if self.scale_first else self.weight * normal.to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension. Source: Ba, Kiros and Hinton, 2016."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def mean_square(x: Tensor) -> Tensor:
    """Mean of squares over the last dimension, (..., D) -> (..., 1) float32."""
    return x.float().pow(2).mean(-1, keepdim=True)

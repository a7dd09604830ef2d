"""The activations of the feed-forward layers, modules of their own, so that engines can replace them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GELU", "SwiGLU"]


class SwiGLU(nn.Module):
    """silu(gate) * up, both (T, D). Source: Shazeer, 2020."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


class GELU(nn.Module):
    """The tanh approximation of GELU, (T, D). Source: Hendrycks and Gimpel, 2016."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

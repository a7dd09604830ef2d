"""The gated activation of the feed-forward layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SwiGLU"]


class SwiGLU(nn.Module):
    """silu(gate) * up, both (T, D). Source: Shazeer, 2020. A module of its own, so that engines can replace it."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

"""Low-rank additions to linear layers (LoRA), put in place from outside: y += scale * up(down(x)) for some rows.

Source: Hu et al. 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from hanlin.layers.invariant import InvariantLinear, product
from hanlin.layers.linear import Linear

__all__ = ["LowRank", "RowAdapters", "attach"]

# Sums of fewer products round too seldom to show on which path they were made, see `RowPaths`.
_INNER = 16


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """What one linear layer (out, in) gets in addition: scale * up @ down.

    Attributes:
        down: (rank, in), LoRA's A.
        up: (out, rank), LoRA's B.
    """

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    def to(self, device: torch.device) -> LowRank:
        """The same as float32 elsewhere, with zeros up to a whole number of `_INNER` inner dimensions."""
        down, up = (half.to(device, torch.float32) for half in (self.down, self.up))
        more = -self.rank % _INNER
        return LowRank(down=F.pad(down, (0, 0, 0, more)), up=F.pad(up, (0, more)).contiguous(), scale=self.scale)

    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(down, scale * up) as float32."""
        return self.down.float().numpy(), (self.up.float() * self.scale).numpy()

    def weight(self) -> Tensor:
        """The whole addition, (out, in) float32."""
        return (self.up.float() * self.scale) @ self.down.float()


@dataclass
class RowAdapters:
    """Which rows of the running step use which adapter: told before each call of the model, read by its leaves.

    Attributes:
        runs: (first row, end, additions by the name of a linear layer), in order; other rows have none.
    """

    runs: Sequence[tuple[int, int, Mapping[str, LowRank]]] = ()


def attach(model: nn.Module, rows: RowAdapters) -> None:
    """Let every linear layer of a model add what `rows` says, in float32; rows without an adapter stay as they are.

    A hook behind each layer, so that it works with whatever leaf stands there. In a row-invariant model the additions
    are row-invariant too.
    """
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            module.register_forward_hook(functools.partial(_add, rows, name))


def _add(rows: RowAdapters, name: str, module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> Tensor | None:
    (x,) = inputs
    changed = None
    for first, end, additions in rows.runs:
        low = additions.get(name)
        if low is None:
            continue
        if changed is None:
            changed = out.clone()
        piece = x[first:end].float()
        if isinstance(module, InvariantLinear):
            delta = product(product(piece, low.down, None, module.paths), low.up, None, module.paths)
        else:
            delta = F.linear(F.linear(piece, low.down), low.up)
        changed[first:end] = (out[first:end].float() + delta * low.scale).to(out.dtype)
    return changed

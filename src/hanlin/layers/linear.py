"""The one linear layer of every model file: a plain product, and the facts needed to change it from outside."""

from __future__ import annotations

from typing import Literal

from torch import nn

__all__ = ["Cut", "Linear"]

Cut = Literal["out", "in"]


class Linear(nn.Linear):
    """y = x W^T + b, with x (..., in) and W (out, in).

    A model file states facts and nothing else; quantisers, tensor parallelism and adapters read them and replace or
    cut the layer from outside.

    Attributes:
        parts: names and row counts of the projections fused into one group of the output, in order.
        groups: how many such groups follow each other; `out = groups * sum(rows of parts)`.
        cut: which side tensor parallelism cuts, None where it must stay whole.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        parts: tuple[tuple[str, int], ...] = (),
        groups: int = 1,
        cut: Cut | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        assert not parts or groups * sum(rows for _, rows in parts) == out_features
        self.parts = parts
        self.groups = groups
        self.cut = cut

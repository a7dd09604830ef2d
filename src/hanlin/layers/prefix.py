"""Soft prefixes (P-Tuning v2): keys and values that every token sees, made from a small trained table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["PrefixEncoder"]


class PrefixEncoder(nn.Module):
    """Keys and values of `length` virtual tokens for every layer. They are not rotated and take no positions.

    Parameter names are those of the released tuning code, so that checkpoints fit. Source: Liu et al. 2021
    (arXiv 2110.07602).

    Args:
        length: P virtual tokens.
        layers, heads, size: layers, kv heads and head size of the model.
        inner: width of the hidden layer when the table is projected, else 0 and the table holds keys and values itself.
        table: width of the table when it is projected; None is `inner`.
    """

    def __init__(
        self, length: int, *, layers: int, heads: int, size: int, inner: int = 0, table: int | None = None
    ) -> None:
        super().__init__()
        self.shape = (length, layers, 2, heads, size)
        out = layers * 2 * heads * size
        width = (table or inner) if inner else out
        self.embedding = nn.Module()
        self.embedding.weight = nn.Parameter(torch.zeros(length, width))
        self.trans: nn.Module | None = None
        if inner:
            self.trans = nn.Sequential(nn.Linear(width, inner), nn.Tanh(), nn.Linear(inner, out))

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """For each layer keys and values, (P, G, K) each."""
        table: Tensor = self.embedding.weight  # type: ignore[assignment]
        values = table if self.trans is None else self.trans(table)
        parts = values.view(self.shape).unbind(1)
        return [(part[:, 0], part[:, 1]) for part in parts]

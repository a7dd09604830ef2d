"""Attention as something that is handed to a model: it owns masks, caches and paging; the model knows none of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Attend", "PackedAttend"]


class Attend(Protocol):
    """attend(layer, q, k, v) -> out, with q (T, H, K), k and v (T, G, K) after RoPE, out (T, H, K).

    Scale is 1 / sqrt(K). Called once a layer, in order, for the same packed tokens.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class PackedAttend:
    """Attention within each of the packed sequences; stateless and differentiable, for scoring and training.

    Attributes:
        lengths: tokens of each sequence; they add up to T.
        prefix_lens: how many first tokens of each see each other both ways (0 is causal).
        soft_prefix: for each layer (k, v), each (P, G, K), seen by every token and not rotated (P-Tuning v2).
    """

    lengths: Sequence[int]
    prefix_lens: Sequence[int] | None = None
    soft_prefix: Sequence[tuple[Tensor, Tensor]] | None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert sum(self.lengths) == q.shape[0]
        outs, start = [], 0
        for index, length in enumerate(self.lengths):
            rows = slice(start, start + length)
            prefix = self.prefix_lens[index] if self.prefix_lens else 0
            keys, values = k[rows], v[rows]
            if self.soft_prefix:
                soft_k, soft_v = self.soft_prefix[layer]
                prefix += len(soft_k) if prefix else 0
                keys, values = torch.cat((soft_k.to(keys.dtype), keys)), torch.cat((soft_v.to(values.dtype), values))
            outs.append(attention(q[rows], keys, values, prefix))
            start += length
        return torch.cat(outs)


def attention(q: Tensor, k: Tensor, v: Tensor, prefix: int = 0) -> Tensor:
    """Causal attention of the last n of c tokens: q (n, H, K), k and v (c, G, K) -> (n, H, K).

    The first `prefix` keys see each other both ways.
    """
    n, c = q.shape[0], k.shape[0]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    if prefix or (n != c and n > 1):
        place = torch.arange(c - n, c, device=q.device)[:, None]
        key = torch.arange(c, device=q.device)[None]
        mask = (key <= place) | ((key < prefix) & (place < prefix))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=n > 1, enable_gqa=True)
    return out[0].transpose(0, 1)

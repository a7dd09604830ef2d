"""Attention over the paged pool in plain torch: the reference that any device runs.

Shapes: T packed tokens, H heads, G kv heads, K head size, R query rows and C keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hanlin.engine.batch import Batch
from hanlin.errors import CapacityError
from hanlin.layers.attend import attention

__all__ = ["KVPool", "PagedAttend"]

_ROWS = 16
_KEYS = 128


class KVPool:
    """Keys and values of all layers by slot, (layers, slots, G, K) each. Memory is touched as it is used."""

    def __init__(
        self,
        *,
        layers: int,
        blocks: int,
        block_size: int,
        kv_heads: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, blocks * block_size, kv_heads, size)
        try:
            self.k = torch.empty(shape, dtype=dtype, device=device)
            self.v = torch.empty(shape, dtype=dtype, device=device)
        except RuntimeError as error:
            need = 2 * layers * blocks * block_size * kv_heads * size * dtype.itemsize / 2**30
            raise CapacityError(
                f"the KV cache of {blocks * block_size} tokens needs {need:.1f} GiB; "
                "lower cache_max_entry_count or session_len"
            ) from error


@dataclass(frozen=True)
class PagedAttend:
    """`Attend` over a pool: writes the step's keys and values, then lets every sequence attend to its own.

    With `invariant`, tiles of queries and keys stand at fixed places in their sequence and every product has one shape,
    so that a token's result is the same however the sequence was cut into steps and whatever else is in the step.
    """

    pool: KVPool
    batch: Batch
    slots: Tensor
    invariant: bool

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.pool.k[layer], self.pool.v[layer]
        keys[self.slots] = k.to(keys.dtype)
        values[self.slots] = v.to(values.dtype)
        batch, outs = self.batch, []
        for index, context in enumerate(batch.context.tolist()):
            start, stop = batch.query_start[index : index + 2].tolist()
            places = self._places(index, context, q.device)
            prefix = int(batch.prefix_lens[index])
            run = tiled_attention if self.invariant else attention
            outs.append(run(q[start:stop], keys[places].to(q.dtype), values[places].to(q.dtype), prefix))
        return torch.cat(outs)

    def _places(self, index: int, context: int, device: torch.device) -> Tensor:
        size = self.batch.block_size
        blocks = torch.from_numpy(self.batch.block_table[index, : -(-context // size)]).to(device, torch.int64)
        return (blocks[:, None] * size + torch.arange(size, device=device)).flatten()[:context]


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, prefix: int = 0) -> Tensor:
    """As `hanlin.layers.attend.attention`, in tiles of fixed shape at fixed places; computed in float32.

    A row's softmax runs over whole key tiles from the start of the sequence, in order, with a running maximum
    (Milakov and Gimelshein, 2018); tiles that a row cannot see are not visited, whatever the other rows see.
    """
    n, heads, size = q.shape
    c, groups, _ = k.shape
    first = c - n
    lead = first % _ROWS
    pad = -(lead + n) % _ROWS
    # (tiles, G, R * H / G, K): the heads that share a kv head stand below each other
    tiles = F.pad(q.float() * size**-0.5, (0, 0, 0, 0, lead, pad)).view(-1, _ROWS, groups, heads // groups, size)
    tiles = tiles.permute(0, 2, 3, 1, 4).reshape(len(tiles), groups, -1, size)
    fill = -c % _KEYS
    keys, values = (F.pad(x.float(), (0, 0, 0, 0, 0, fill)).transpose(0, 1).contiguous() for x in (k, v))
    outs = [_tile(tile, keys, values, first - lead + index * _ROWS, prefix) for index, tile in enumerate(tiles)]
    out = torch.stack(outs).view(-1, groups, heads // groups, _ROWS, size).permute(0, 3, 1, 2, 4)
    return out.reshape(-1, heads, size)[lead : lead + n].to(q.dtype)


def _tile(q: Tensor, keys: Tensor, values: Tensor, first: int, prefix: int) -> Tensor:
    """One tile of queries whose first row is at place `first`: (G, R * H / G, K) -> the same."""
    repeat = q.shape[1] // _ROWS
    place = torch.arange(first, first + _ROWS).repeat(repeat)[:, None]
    seen = max(first + _ROWS, prefix if first < prefix else 0)
    top = torch.full((*q.shape[:2], 1), -torch.inf)
    total = torch.zeros_like(top)
    out = torch.zeros_like(q)
    for start in range(0, min(-(-seen // _KEYS) * _KEYS, keys.shape[1]), _KEYS):
        scores = torch.bmm(q, keys[:, start : start + _KEYS].transpose(1, 2).contiguous())
        key = torch.arange(start, start + _KEYS)
        visible = (key <= place) | ((key < prefix) & (place < prefix))
        scores = scores.masked_fill(~visible, -torch.inf)
        peak = torch.maximum(top, scores.amax(-1, keepdim=True))
        shrink = torch.exp(top - peak)
        weights = torch.exp(scores - peak)
        total = total * shrink + weights.sum(-1, keepdim=True)
        out = out * shrink + torch.bmm(weights, values[:, start : start + _KEYS].contiguous())
        top = peak
    return out / total

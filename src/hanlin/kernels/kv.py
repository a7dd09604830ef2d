"""Pools of keys and values in blocks, and attention over them, through ctypes. See hl_kv and hl_attend."""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hanlin.errors import ConfigError, problems
from hanlin.kernels.abi import KVStruct, StepStruct, check, library
from hanlin.kernels.native import Arena, Context, _pointer

__all__ = ["KVKind", "KVPool", "Layout", "block_bytes"]


class KVKind(enum.IntEnum):
    """How keys and values are stored: int8 and int4 with a scale and a minimum for each token and head.

    INT4 is for the values; keys have eight bits there too (of four they cost ten times as much quality as the values).
    """

    F32 = 0
    BF16 = 1
    INT8 = 2
    INT4 = 3


def block_bytes(kind: KVKind, block_size: int, heads: int, head_size: int) -> int:
    """Bytes of one block of one layer, keys and values.

    Raises:
        ConfigError: a shape that a pool cannot have.
    """
    size = int(library().hl_kv_bytes(kind, 1, block_size, heads, head_size))
    check(min(size, 0))
    return size


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which tokens a step computes and where their sequences stand. All arrays are int32, contiguous.

    Attributes:
        query_start: (S + 1,); sequence s computes tokens query_start[s] .. query_start[s + 1], the last of its own.
        context: (S,), tokens that each sequence has, these included.
        block_table: (S, max_blocks); a sequence's slot i is in block block_table[s, i // block_size].
        prefix_len: (S,), how many first tokens of each see each other both ways; None: causal. A soft prefix counts.
    """

    query_start: Any
    context: Any
    block_table: Any
    prefix_len: Any = None

    def fill(self, step: StepStruct) -> None:
        """Put the arrays' addresses into a step; they must outlive its use.

        Raises:
            ConfigError: arrays of the wrong dtype or shape.
        """
        sequences = int(self.context.shape[0])
        step.sequences = sequences
        step.max_blocks = int(self.block_table.shape[1])
        step.query_start = _pointer(self.query_start, "query_start", ("int32",), (sequences + 1,))
        step.context = _pointer(self.context, "context", ("int32",), (sequences,))
        step.block_table = _pointer(self.block_table, "block_table", ("int32",), (sequences, step.max_blocks))
        if self.prefix_len is not None:
            step.prefix_len = _pointer(self.prefix_len, "prefix_len", ("int32",), (sequences,))


class KVPool:
    """The blocks of all layers, zeroed, in huge pages where the system grants them.

    Attributes:
        kind, layers, blocks, block_size, heads, head_size: its shape; `heads` are kv heads.
        nbytes: its size.

    Raises:
        ConfigError: a shape that a pool cannot have.
        CapacityError: when the system refuses the memory.
    """

    def __init__(self, kind: KVKind, *, layers: int, blocks: int, block_size: int, heads: int, head_size: int) -> None:
        if layers < 1 or blocks < 1:
            raise ConfigError(f"a pool needs layers and blocks, not {layers} and {blocks}")
        self.kind, self.layers, self.blocks = KVKind(kind), layers, blocks
        self.block_size, self.heads, self.head_size = block_size, heads, head_size
        self.block_bytes = block_bytes(self.kind, block_size, heads, head_size)
        layer_bytes = self.block_bytes * blocks
        self.nbytes = layer_bytes * layers
        self._arena = Arena(self.nbytes)
        base = self._arena.take(self.nbytes)
        self.structs = (KVStruct * layers)(
            *(KVStruct(self.kind, blocks, block_size, heads, head_size, base + i * layer_bytes) for i in range(layers))
        )

    def block(self, layer: int, block: int) -> memoryview:
        """One block's bytes, writable, for swapping it out and in."""
        address = self.structs[layer].data + self._checked(block) * self.block_bytes
        return self._arena.view(address, self.block_bytes)

    def _checked(self, block: int) -> int:
        if not 0 <= block < self.blocks:
            raise ConfigError(f"block {block} of {self.blocks}")
        return block

    def write(self, context: Context, layer: int, slots: Any, k: Any, v: Any) -> None:
        """Put k and v, float32 (T, heads, K) and rotated already, into slots, int64 (T,): soft prefixes, tests.

        Raises:
            ConfigError: shapes that do not fit, or a slot that is not there.
        """
        addresses = self._rows(slots, k, v)
        check(library().hl_kv_write(context.handle, self.structs[layer], *addresses))

    def read(self, context: Context, layer: int, slots: Any) -> tuple[Any, Any]:
        """Keys and values of slots, dequantised: float32 (T, heads, K) each."""
        shape = (len(slots), self.heads, self.head_size)
        k, v = np.empty(shape, np.float32), np.empty(shape, np.float32)
        check(library().hl_kv_read(context.handle, self.structs[layer], *self._rows(slots, k, v)))
        return k, v

    def _rows(self, slots: Any, k: Any, v: Any) -> tuple[Any, ...]:
        shape = (len(slots), self.heads, self.head_size)
        width = self.heads * self.head_size
        k_at, v_at = _pointer(k, "k", ("float32",), shape), _pointer(v, "v", ("float32",), shape)
        return _pointer(slots, "slots", ("int64",), shape[:1]), shape[0], k_at, width, v_at, width

    def copy_blocks(self, context: Context, to: Sequence[int], source: KVPool, blocks: Sequence[int]) -> None:
        """Copy blocks of `source` (this pool, or one of the same kind and shape) over blocks `to`, in every layer.

        Raises:
            ConfigError: pools that differ, or a block that is not there.
        """
        if len(to) != len(blocks) or source.layers != self.layers:
            raise ConfigError(
                f"{len(blocks)} blocks of {source.layers} layers cannot become {len(to)} of {self.layers}"
            )
        targets, sources = (ctypes.c_int32 * len(to))(*to), (ctypes.c_int32 * len(to))(*blocks)
        for mine, theirs in zip(self.structs, source.structs, strict=True):
            check(library().hl_kv_copy(context.handle, mine, targets, theirs, sources, len(to)))

    def attend(
        self, context: Context, layer: int, q: Any, layout: Layout, *, scale: float | None = None, out: Any = None
    ) -> Any:
        """softmax(scale q k^T) v of q, float32 (T, H, K), over what the pool holds, the step's own keys included.

        Args:
            scale: None is 1 / sqrt(K).
            out: float32 (T, H, K) to write to; None makes a numpy array.

        Raises:
            ConfigError: shapes that do not fit, or a layout that reaches beyond the pool.
        """
        tokens, heads, size = q.shape
        found = [] if size == self.head_size else [f"head size {size}, the pool has {self.head_size}"]
        if found:
            raise ConfigError(problems("attend", found))
        if out is None:
            out = np.empty((tokens, heads, size), np.float32)
        step = StepStruct(tokens=tokens)
        layout.fill(step)
        q_at = _pointer(q, "q", ("float32",), (tokens, heads, size))
        out_at = _pointer(out, "out", ("float32",), (tokens, heads, size))
        scale = size**-0.5 if scale is None else scale
        width = heads * size
        check(library().hl_attend(context.handle, self.structs[layer], step, heads, scale, q_at, width, out_at, width))
        return out

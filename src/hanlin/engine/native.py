"""The native runner: a lowered model as one program of the CPU library, a whole step in one call."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from hanlin.engine.batch import Batch
from hanlin.engine.lowering import Block, Lowering, Slot
from hanlin.engine.runner import Output, soft_prefix
from hanlin.engine.sequence import Adapter
from hanlin.kernels.kv import KVKind, KVPool, Layout, block_bytes
from hanlin.kernels.lora import Piece
from hanlin.kernels.native import Context, Kind, PackedWeight
from hanlin.kernels.ops import Norm, RopeStyle
from hanlin.kernels.program import Buffer, Program, Step
from hanlin.layers.lora import LowRank
from hanlin.layers.norm import LayerNorm
from hanlin.layers.rope import RopeConfig
from hanlin.layers.tables import TabledRope
from hanlin.models import parts as roles
from hanlin.models.config import DecoderConfig

__all__ = ["KV_KINDS", "NativeRunner", "native_block_bytes"]

KV_KINDS: Mapping[str, KVKind] = {
    "float32": KVKind.F32,
    "bfloat16": KVKind.BF16,
    "int8": KVKind.INT8,
    "int4": KVKind.INT4,
}


def native_block_bytes(config: DecoderConfig, kv_cache: str, block_size: int) -> int:
    """Bytes that one block takes in all layers of the pool.

    Raises:
        ConfigError: a block size or head size that the library cannot have.
    """
    return config.num_layers * block_bytes(KV_KINDS[kv_cache], block_size, config.num_kv_heads, config.head_dim)


_NO_STATES = np.zeros((0, 0), np.float32)
# Rows of logits whose memory is kept for the next step: the system takes long to give fresh memory.
_KEPT_ROWS = 64


class NativeRunner:
    """Runs a model whose weights a `Lowering` has packed; the residual stream is float32."""

    name = "native"

    def __init__(
        self,
        lowering: Lowering,
        config: DecoderConfig,
        *,
        context: Context,
        rope: RopeConfig,
        blocks: int,
        block_size: int,
        kv_cache: str,
        max_tokens: int,
    ) -> None:
        self.vocab_size = config.vocab_size
        self.weight_bytes = lowering.nbytes
        self._context, self._lowering = context, lowering
        self._rope = TabledRope(rope)
        self._pool = KVPool(
            KV_KINDS[kv_cache],
            layers=config.num_layers,
            blocks=blocks,
            block_size=block_size,
            heads=config.num_kv_heads,
            head_size=config.head_dim,
        )
        self.block_bytes = self._pool.block_bytes * config.num_layers
        self._soft = [(k.float().contiguous(), v.float().contiguous()) for k, v in soft_prefix(lowering.parts)]
        self.soft_len = len(self._soft[0][0]) if self._soft else 0
        self.program = _program(lowering, config, context, self._pool, rope)
        self._logits = np.zeros((0, self.program.vocabulary), np.float32)
        self.program.build(max_tokens)

    def run(self, batch: Batch) -> Output:
        """The logits are good until the next step."""
        cos, sin = self._rope.arrays(batch.positions, batch.rope_lengths)
        for slots in batch.soft_slots:
            for layer, (k, v) in enumerate(self._soft):
                self._pool.write(self._context, layer, slots, k, v)
        prefix = batch.prefix_lens if batch.prefix_lens.any() else None
        layout = Layout(
            query_start=batch.query_start, context=batch.context, block_table=batch.block_table, prefix_len=prefix
        )
        scored, states = len(batch.rows), len(batch.states)
        step = Step(
            ids=batch.ids,
            slots=batch.slots,
            layout=layout,
            rows=np.concatenate((batch.rows, batch.states)) if states else batch.rows,
            states=states,
            cos=cos,
            sin=sin,
            adapters=[adapter.held if adapter else None for adapter in batch.adapters],
            embeddings=batch.embeddings,
            embedding_rows=batch.embedding_rows,
        )
        result = self.program.run(step, logits=self._place(scored))
        return Output(result.logits, result.hidden[scored:] if states else _NO_STATES)

    def _place(self, rows: int) -> NDArray[np.float32]:
        if rows > _KEPT_ROWS:
            return np.empty((rows, self.program.vocabulary), np.float32)
        if len(self._logits) < rows:
            self._logits = np.empty((rows, self.program.vocabulary), np.float32)
        return self._logits[:rows]

    def adapt(self, additions: Mapping[str, LowRank]) -> Adapter:
        """Kept as bfloat16, or as float32 where the weights are."""
        whose = self._lowering.linears
        pieces = []
        for slot in self._lowering.slots:
            mine = [(additions.get(whose.get(name, "")), place) for name, place in slot.places.items()]
            some = [Piece(*low.arrays(), place) for low, place in mine if low is not None]
            if some:
                pieces.append((_weight(slot), some))
        held = self.program.adapter(pieces, bf16=self._lowering.blocks[0].out.kind is not Kind.F32)
        return Adapter(held=held, nbytes=held.nbytes)

    def close(self) -> None:
        self._context.close()


def _program(lowering: Lowering, config: DecoderConfig, context: Context, pool: KVPool, rope: RopeConfig) -> Program:
    """The operations of a whole step, block by block."""
    program = Program(context, pool)
    x = program.embed(_embedding(lowering))
    style = RopeStyle.QUARTERS if config.position_rows == 2 else RopeStyle(rope.interleaved)
    for layer, (slots, parts) in enumerate(zip(lowering.blocks, lowering.parts.blocks, strict=True)):
        normal = _norm(program, x, parts.attention_norm)
        x = program.add(normal, scale=parts.alpha) if parts.alpha else x  # here threads need not wait for one another
        qkv = _linear(program, normal, slots.qkv)
        program.rope(qkv, layer, heads=config.num_heads, rotary=rope.dims, style=style)
        _linear(program, program.attend(qkv, layer, heads=config.num_heads), slots.out, add_to=x)
        normal = _norm(program, x, parts.mlp_norm)
        x = program.add(normal, scale=parts.alpha) if parts.alpha else x
        inner = _inner(program, normal, slots, parts)
        _linear(program, inner, slots.down, add_to=x)
    last = _norm(program, program.gather(x), lowering.parts.norm)
    program.head(last, _weight(lowering.head), lowering.head.bias)
    return program


def _embedding(lowering: Lowering) -> PackedWeight | torch.Tensor:
    if lowering.tied:
        return _weight(lowering.head)
    if lowering.embedding is not None:
        return _weight(lowering.embedding)
    assert lowering.table is not None
    return lowering.table


def _linear(program: Program, x: Buffer, slot: Slot, *, add_to: Buffer | None = None, **activation: bool) -> Buffer:
    return program.linear(x, _weight(slot), slot.bias, add_to=add_to, **activation)


def _inner(program: Program, x: Buffer, slots: Block, parts: roles.BlockParts) -> Buffer:
    """What the down projection multiplies."""
    if parts.activation == "gelu":
        return _linear(program, x, slots.gate_up, gelu=True)
    inner = _linear(program, x, slots.gate_up, silu_mul=slots.fused)
    return inner if slots.fused else program.gate(inner)


def _norm(program: Program, x: Buffer, norm: roles.Norm) -> Buffer:
    gain = norm.weight.detach().float().contiguous()
    if isinstance(norm, LayerNorm):
        return program.norm(x, gain, norm.bias.detach().float().contiguous(), eps=norm.eps, kind=Norm.LAYER)
    return program.norm(x, gain, eps=norm.eps)


def _weight(slot: Slot) -> PackedWeight:
    assert slot.weight is not None
    return slot.weight

"""A decoder's parts by role, for whoever runs it in another way than by calling its modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from hanlin.layers.linear import Linear
from hanlin.layers.norm import RMSNorm
from hanlin.models.config import DecoderConfig

__all__ = ["BlockParts", "HasParts", "ModelParts"]


@dataclass(frozen=True, kw_only=True)
class BlockParts:
    """x += out(attention(qkv(norm(x)))); x += down(silu(gate) * up), with gate and up of the second norm.

    Attributes:
        qkv: the projections whose `parts` are named q, k and v, fused or not.
        gate_up: those whose `parts` are named gate and up.
    """

    attention_norm: RMSNorm
    qkv: tuple[Linear, ...]
    out: Linear
    mlp_norm: RMSNorm
    gate_up: tuple[Linear, ...]
    down: Linear


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """Embedding, blocks, final norm, head; `tied` when embedding and head are one weight."""

    embedding: nn.Embedding
    blocks: tuple[BlockParts, ...]
    norm: RMSNorm
    head: Linear
    tied: bool


class HasParts(Protocol):
    """What a model must say of itself to be run natively."""

    config: DecoderConfig

    def parts(self) -> ModelParts: ...

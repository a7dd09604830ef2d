"""A decoder's parts by role, for whoever runs it in another way than by calling its modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import nn

from hanlin.layers.linear import Linear
from hanlin.layers.norm import LayerNorm, RMSNorm
from hanlin.layers.prefix import PrefixEncoder
from hanlin.models.config import DecoderConfig

__all__ = ["BlockParts", "HasParts", "ModelParts", "Norm"]

Norm = RMSNorm | LayerNorm


@dataclass(frozen=True, kw_only=True)
class BlockParts:
    """x += out(attention(qkv(norm(x)))); x += down(silu(gate) * up), with gate and up of the second norm.

    Attributes:
        qkv: the projections whose `parts` are named q, k and v, fused or not.
        gate_up: those whose `parts` are named gate and up; only up where the activation is no gate.
        activation: silu(gate) * up, or gelu(up) by its tanh approximation.
        alpha: where it is not 0, the residual is the norm's result, so many times: x = alpha * norm(x) + ..., twice.
    """

    attention_norm: Norm
    qkv: tuple[Linear, ...]
    out: Linear
    mlp_norm: Norm
    gate_up: tuple[Linear, ...]
    down: Linear
    activation: Literal["silu_mul", "gelu"] = "silu_mul"
    alpha: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """Embedding, blocks, final norm, head; `tied` when embedding and head are one weight; a soft prefix, if any."""

    embedding: nn.Embedding
    blocks: tuple[BlockParts, ...]
    norm: Norm
    head: Linear
    tied: bool
    prefix: PrefixEncoder | None = None


class HasParts(Protocol):
    """What a model must say of itself to be run natively."""

    config: DecoderConfig

    def parts(self) -> ModelParts: ...

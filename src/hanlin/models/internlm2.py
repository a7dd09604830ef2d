"""InternLM2 and InternLM2.5: base, chat, 1M and math, under their released tensor names and fused layouts.

Shapes: T packed tokens, H heads, G kv heads, K head size, D width, V vocabulary. Source: the released model files;
Cai et al. 2024 (arXiv 2403.17297).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from hanlin.layers.activation import SwiGLU
from hanlin.layers.attend import Attend
from hanlin.layers.embedding import Embedding
from hanlin.layers.linear import Linear
from hanlin.layers.norm import RMSNorm
from hanlin.layers.rope import Positions, Rope, Rotation, rotate
from hanlin.models.config import DecoderConfig, Reader
from hanlin.models.parts import BlockParts, ModelParts

__all__ = ["InternLM2ForCausalLM", "InternLM2Model", "read_config"]


def read_config(values: Mapping[str, Any]) -> DecoderConfig:
    """Read a released InternLM2 `config.json`. Missing keys mean what the released code means by them.

    Reward models have the same `model_type`; their class, among `architectures`, tells them.
    """
    read = Reader(values, "internlm2")
    read.fixed("hidden_act", "silu")
    read.fixed("pretraining_tp", 1)
    hidden, heads = read.whole("hidden_size", 4096), read.whole("num_attention_heads", 32)
    head_dim = hidden // max(heads, 1)
    read.fixed("head_dim", head_dim, None)
    max_positions = read.whole("max_position_embeddings", 2048)
    bias = read.flag("bias", True)
    config: dict[str, Any] = {
        "vocab_size": read.whole("vocab_size", 103168),
        "intermediate_size": read.whole("intermediate_size", 11008),
        "num_layers": read.whole("num_hidden_layers", 32),
        "num_kv_heads": read.whole("num_key_value_heads", heads),
        "norm_eps": read.number("rms_norm_eps", 1e-6),
        "rope": read.rope(dims=head_dim, base=10000.0, max_positions=max_positions),
        "tied": read.flag("tie_word_embeddings", False),
        "bos_id": read.whole("bos_token_id", 1),
        "stop_ids": read.ids("eos_token_id") or (2,),
    }
    classes = values.get("architectures")
    reward = isinstance(classes, list) and "InternLM2ForRewardModel" in classes
    if reward:
        config["reward_id"] = read.whole("reward_token_id", 92527)
    read.finish()
    return DecoderConfig(
        model_type="internlm2-reward" if reward else "internlm2",
        hidden_size=hidden,
        num_heads=heads,
        head_dim=head_dim,
        max_positions=max_positions,
        qkv_bias=bias,
        out_bias=bias,
        **config,
    )


class Attention(nn.Module):
    """Grouped-query attention over one fused projection: for each kv head its H / G query heads, its key, its value."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.groups, self.size = config.num_kv_heads, config.head_dim
        self.repeat = config.num_heads // config.num_kv_heads
        parts = (("q", self.repeat * self.size), ("k", self.size), ("v", self.size))
        rows = self.groups * (self.repeat + 2) * self.size
        self.wqkv = Linear(config.hidden_size, rows, bias=config.qkv_bias, parts=parts, groups=self.groups, cut="out")
        self.wo = Linear(config.num_heads * self.size, config.hidden_size, bias=config.out_bias, cut="in")

    def forward(self, layer: int, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        fused = self.wqkv(x).view(-1, self.groups, self.repeat + 2, self.size)
        q, k, v = fused.split((self.repeat, 1, 1), dim=2)
        q, k = rotate(q.flatten(1, 2), rotation), rotate(k.squeeze(2), rotation)
        return self.wo(attend(layer, q, k, v.squeeze(2)).flatten(1))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.w1 = Linear(hidden, inner, parts=(("gate", inner),), cut="out")
        self.w3 = Linear(hidden, inner, parts=(("up", inner),), cut="out")
        self.w2 = Linear(inner, hidden, cut="in")
        self.act = SwiGLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x), self.w3(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, layer: int, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        x = x + self.attention(layer, self.attention_norm(x), rotation, attend)
        return x + self.feed_forward(self.ffn_norm(x))  # type: ignore[no-any-return]

    def parts(self) -> BlockParts:
        return BlockParts(
            attention_norm=self.attention_norm,
            qkv=(self.attention.wqkv,),
            out=self.attention.wo,
            mlp_norm=self.ffn_norm,
            gate_up=(self.feed_forward.w1, self.feed_forward.w3),
            down=self.feed_forward.w2,
        )


class InternLM2Model(nn.Module):
    """The body: ids (T,) -> hidden (T, D), after the final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.tok_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.rope = Rope(config.rope)

    def forward(self, ids: Tensor, positions: Positions, attend: Attend) -> Tensor:
        rotation = self.rope(positions)
        x = self.tok_embeddings(ids)
        for index, layer in enumerate(self.layers):
            x = layer(index, x, rotation, attend)
        return self.norm(x)  # type: ignore[no-any-return]


class InternLM2ForCausalLM(nn.Module):
    """model(ids, positions, attend) -> hidden (T, D); head(hidden rows) -> logits (rows, V) float32."""

    config: DecoderConfig

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = InternLM2Model(config)
        self.output = Linear(config.hidden_size, config.vocab_size, cut="out")
        if config.tied:
            self.output.weight = self.model.tok_embeddings.weight

    def forward(self, ids: Tensor, positions: Positions, attend: Attend) -> Tensor:
        return self.model(ids, positions, attend)  # type: ignore[no-any-return]

    def head(self, rows: Tensor) -> Tensor:
        return self.output(rows).float()  # type: ignore[no-any-return]

    def parts(self) -> ModelParts:
        model = self.model
        return ModelParts(
            embedding=model.tok_embeddings,
            blocks=tuple(cast(Block, layer).parts() for layer in model.layers),
            norm=model.norm,
            head=self.output,
            tied=self.config.tied,
        )

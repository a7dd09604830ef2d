"""Llama and what is mathematically one: SmolLM2, Qwen2, InternLM 1 and 3, told apart by bias flags and tying.

Shapes: T packed tokens, H heads, G kv heads, K head size, D width, V vocabulary. Source: Touvron et al. 2023 and the
released model files.
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

__all__ = ["LlamaForCausalLM", "LlamaModel", "read_config"]


def read_config(values: Mapping[str, Any]) -> DecoderConfig:
    """Read a `config.json` of model_type llama, qwen2, internlm or internlm3, whose defaults are those of the 8B."""
    kind = str(values.get("model_type", "llama"))
    read = Reader(values, kind)
    read.fixed("hidden_act", "silu")
    read.fixed("pretraining_tp", 1)
    read.fixed("use_sliding_window", False)
    if kind == "qwen2" or values.get("use_sliding_window") is False:
        read.used.update(("sliding_window", "layer_types"))  # say nothing when the window is not used
    else:
        read.fixed("sliding_window", None)
    hidden, heads = read.whole("hidden_size"), read.whole("num_attention_heads")
    head_dim = read.whole("head_dim", hidden // max(heads, 1))
    max_positions = read.whole("max_position_embeddings", 2048)
    qkv_bias, out_bias, mlp_bias = _biases(read, kind)
    config: dict[str, Any] = {
        "vocab_size": read.whole("vocab_size"),
        "intermediate_size": read.whole("intermediate_size"),
        "num_layers": read.whole("num_hidden_layers"),
        "num_kv_heads": read.whole("num_key_value_heads", heads),
        "norm_eps": read.number("rms_norm_eps", 1e-5 if kind == "internlm3" else 1e-6),
        "rope": read.rope(dims=head_dim, base=5e7 if kind == "internlm3" else 1e4, max_positions=max_positions),
        "tied": read.flag("tie_word_embeddings", False),
        "bos_id": next(iter(read.ids("bos_token_id")), None),
        "stop_ids": read.ids("eos_token_id"),
    }
    read.finish()
    return DecoderConfig(
        model_type=kind,
        hidden_size=hidden,
        num_heads=heads,
        head_dim=head_dim,
        max_positions=max_positions,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=mlp_bias,
        **config,
    )


def _biases(read: Reader, kind: str) -> tuple[bool, bool, bool]:
    if kind == "internlm":
        bias = read.flag("bias", True)
        return bias, bias, False
    if kind == "internlm3":
        bias = read.flag("bias", False)
        return read.flag("qkv_bias", False), bias, bias
    bias = read.flag("attention_bias", kind == "qwen2")
    return bias, bias and kind != "qwen2", read.flag("mlp_bias", False)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.size = config.head_dim
        hidden, q, kv = config.hidden_size, config.num_heads * self.size, config.num_kv_heads * self.size
        self.q_proj = Linear(hidden, q, bias=config.qkv_bias, parts=(("q", q),), cut="out")
        self.k_proj = Linear(hidden, kv, bias=config.qkv_bias, parts=(("k", kv),), cut="out")
        self.v_proj = Linear(hidden, kv, bias=config.qkv_bias, parts=(("v", kv),), cut="out")
        self.o_proj = Linear(q, hidden, bias=config.out_bias, cut="in")

    def forward(self, layer: int, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, self.size)) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(layer, rotate(q, rotation), rotate(k, rotation), v).flatten(1))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(hidden, inner, bias=config.mlp_bias, parts=(("gate", inner),), cut="out")
        self.up_proj = Linear(hidden, inner, bias=config.mlp_bias, parts=(("up", inner),), cut="out")
        self.down_proj = Linear(inner, hidden, bias=config.mlp_bias, cut="in")
        self.act = SwiGLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, layer: int, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        x = x + self.self_attn(layer, self.input_layernorm(x), rotation, attend)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]

    def parts(self) -> BlockParts:
        attention, mlp = self.self_attn, self.mlp
        return BlockParts(
            attention_norm=self.input_layernorm,
            qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
            out=attention.o_proj,
            mlp_norm=self.post_attention_layernorm,
            gate_up=(mlp.gate_proj, mlp.up_proj),
            down=mlp.down_proj,
        )


class LlamaModel(nn.Module):
    """The body: ids (T,) -> hidden (T, D), after the final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.rope = Rope(config.rope)

    def forward(self, ids: Tensor, positions: Positions, attend: Attend) -> Tensor:
        rotation = self.rope(positions)
        x = self.embed_tokens(ids)
        for index, layer in enumerate(self.layers):
            x = layer(index, x, rotation, attend)
        return self.norm(x)  # type: ignore[no-any-return]


class LlamaForCausalLM(nn.Module):
    """model(ids, positions, attend) -> hidden (T, D); head(hidden rows) -> logits (rows, V) float32."""

    config: DecoderConfig

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, cut="out")
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor, positions: Positions, attend: Attend) -> Tensor:
        return self.model(ids, positions, attend)  # type: ignore[no-any-return]

    def head(self, rows: Tensor) -> Tensor:
        return self.lm_head(rows).float()  # type: ignore[no-any-return]

    def parts(self) -> ModelParts:
        model = self.model
        return ModelParts(
            embedding=model.embed_tokens,
            blocks=tuple(cast(Block, layer).parts() for layer in model.layers),
            norm=model.norm,
            head=self.lm_head,
            tied=self.config.tied,
        )

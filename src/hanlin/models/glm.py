"""GLM-4-9B as Transformers has it (`GlmForCausalLM`): the mathematics of ChatGLM2 under Llama's names.

Shapes: T packed tokens, H heads, G kv heads, K head size, D width, V vocabulary. Source: the released model files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from hanlin.layers.activation import SwiGLU
from hanlin.layers.attend import Attend
from hanlin.layers.linear import Linear
from hanlin.layers.norm import RMSNorm
from hanlin.layers.rope import Rotation
from hanlin.models import llama
from hanlin.models.config import DecoderConfig, Reader
from hanlin.models.parts import BlockParts

__all__ = ["GlmForCausalLM", "read_config"]


def read_config(values: Mapping[str, Any]) -> DecoderConfig:
    """Read a `config.json` of model_type glm."""
    read = Reader(values, "glm")
    read.fixed("hidden_act", "silu")
    hidden, heads = read.whole("hidden_size", 4096), read.whole("num_attention_heads", 32)
    head_dim = read.whole("head_dim", 128)
    most = read.whole("max_position_embeddings", 131072)
    parameters = values.get("rope_parameters")  # where Transformers 5 writes the share of a head that rotates
    share = parameters.get("partial_rotary_factor", 0.5) if isinstance(parameters, Mapping) else 0.5
    share = read.number("partial_rotary_factor", share if type(share) in (int, float) else 0.5)
    if not 0 < share <= 1:
        read.found.append(f"'partial_rotary_factor' must be in (0, 1], not {share}")
        share = 1.0
    dims = int(head_dim * share)
    config: dict[str, Any] = {
        "vocab_size": read.whole("vocab_size", 151552),
        "intermediate_size": read.whole("intermediate_size", 13696),
        "num_layers": read.whole("num_hidden_layers", 40),
        "num_kv_heads": read.whole("num_key_value_heads", 2),
        "norm_eps": read.number("rms_norm_eps", 1.5625e-07),
        "qkv_bias": read.flag("attention_bias", True),
        "tied": read.flag("tie_word_embeddings", False),
        "stop_ids": read.ids("eos_token_id"),
    }
    rope = read.rope(dims=dims, base=10000.0, max_positions=most)
    read.finish()
    return DecoderConfig(
        model_type="glm",
        hidden_size=hidden,
        num_heads=heads,
        head_dim=head_dim,
        max_positions=most,
        rope=replace(rope, interleaved=True),
        **config,
    )


class FeedForward(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(hidden, 2 * inner, parts=(("gate", inner), ("up", inner)), cut="out")
        self.down_proj = Linear(inner, hidden, cut="in")
        self.act = SwiGLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(*self.gate_up_proj(x).chunk(2, -1)))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = llama.Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, layer: int, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        x = x + self.self_attn(layer, self.input_layernorm(x), rotation, attend)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]

    def parts(self) -> BlockParts:
        attention = self.self_attn
        return BlockParts(
            attention_norm=self.input_layernorm,
            qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
            out=attention.o_proj,
            mlp_norm=self.post_attention_layernorm,
            gate_up=(self.mlp.gate_up_proj,),
            down=self.mlp.down_proj,
        )


class GlmForCausalLM(llama.LlamaForCausalLM):
    """model(ids, positions, attend) -> hidden (T, D); head(hidden rows) -> logits (rows, V) float32."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))

"""ChatGLM2-6B, ChatGLM3-6B, CodeGeeX2-6B and GLM-4-9B in the format of their original files, long variants included.

A Llama in most: told apart by a fused projection with few key heads and a bias, and by rotating neighbouring dimensions
of the first half of each head only. Shapes: T packed tokens, H heads, G kv heads, K head size, D width, V vocabulary.
Source: the released model files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from hanlin.layers.activation import SwiGLU
from hanlin.layers.attend import Attend
from hanlin.layers.embedding import Embedding
from hanlin.layers.linear import Linear
from hanlin.layers.norm import RMSNorm
from hanlin.layers.prefix import PrefixEncoder
from hanlin.layers.rope import Positions, Rope, RopeConfig, Rotation, rotate
from hanlin.models.config import DecoderConfig, Reader
from hanlin.models.parts import BlockParts, ModelParts

__all__ = ["ChatGLM2Config", "ChatGLM2ForConditionalGeneration", "ChatGLM2Model", "Transformer", "read_config"]

# Only ChatGLM2-6B-32k has this ratio, and only its code divides positions by it; the later models' code multiplies the
# base of the angles by theirs (50, 500, 10000). The configurations do not say which.
_DIVIDES = 16


@dataclass(frozen=True, kw_only=True)
class ChatGLM2Config(DecoderConfig):
    """
    Attributes:
        pre_seq_len: virtual tokens of a soft prefix (P-Tuning v2), 0 for none.
        prefix_projection: the prefix is projected from a smaller table.
    """

    pre_seq_len: int = 0
    prefix_projection: bool = False


def read_config(values: Mapping[str, Any]) -> ChatGLM2Config:
    """Read a released `config.json`. Missing keys mean what the released code means by them."""
    read = Reader(values, "chatglm2")
    for name in ("rmsnorm", "post_layer_norm", "multi_query_attention", "original_rope"):
        read.fixed(name, True)
    for name in ("apply_residual_connection_post_layernorm", "interleaved_qkv", "tie_word_embeddings"):
        read.fixed(name, False)
    read.fixed("quantization_bit", 0, 4, 8)
    # Scores are divided by the layer's number and multiplied by it again; precisions of training; how files are cut.
    neutral = "apply_query_key_layer_scaling attention_softmax_in_fp32 fp32_residual_connection bias_dropout_fusion"
    read.used.update((*neutral.split(), "quantization_embeddings", "vocab_size", "num_hidden_layers"))
    heads, size = read.whole("num_attention_heads", 32), read.whole("kv_channels", 128)
    most, linear_bias = read.whole("seq_length", 2048), read.flag("add_bias_linear", False)
    ratio = read.number("rope_ratio", 1.0)
    config: dict[str, Any] = {
        "vocab_size": read.whole("padded_vocab_size", 65024),
        "hidden_size": read.whole("hidden_size", 4096),
        "intermediate_size": read.whole("ffn_hidden_size", 13696),
        "num_layers": read.whole("num_layers", 28),
        "num_kv_heads": read.whole("multi_query_group_num", 1),
        "norm_eps": read.number("layernorm_epsilon", 1e-5),
        "qkv_bias": read.flag("add_qkv_bias", False) or linear_bias,
        "stop_ids": read.ids("eos_token_id"),
        "pre_seq_len": read.whole("pre_seq_len", 0),
        "prefix_projection": read.flag("prefix_projection", False),
    }
    if "multi_query_attention" not in values:
        read.found.append("'multi_query_attention' is missing")
    if size % 4:
        read.found.append(f"'kv_channels' = {size}: half a head does not divide into pairs")
    if ratio <= 0:
        read.found.append(f"'rope_ratio' must be > 0, not {ratio}")
    read.finish()
    divides = ratio == _DIVIDES
    return ChatGLM2Config(
        model_type="chatglm2",
        num_heads=heads,
        head_dim=size,
        max_positions=most,
        rope=RopeConfig(
            dims=size // 2,
            base=10000.0 if divides else 10000.0 * ratio,
            max_positions=most,
            kind="linear" if divides else "none",
            numbers={"factor": ratio} if divides else {},
            interleaved=True,
        ),
        out_bias=linear_bias,
        mlp_bias=linear_bias,
        **config,
    )


class Attention(nn.Module):
    """Grouped-query attention over one projection: all queries, then all keys, then all values."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.size = config.head_dim
        hidden, q, kv = config.hidden_size, config.num_heads * self.size, config.num_kv_heads * self.size
        self.sizes = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        parts = (("q", q), ("k", kv), ("v", kv))
        self.query_key_value = Linear(hidden, q + 2 * kv, bias=config.qkv_bias, parts=parts, cut="out")
        self.dense = Linear(q, hidden, bias=config.out_bias, cut="in")

    def forward(self, layer: int, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        q, k, v = self.query_key_value(x).unflatten(-1, (-1, self.size)).split(self.sizes, dim=1)
        return self.dense(attend(layer, rotate(q, rotation), rotate(k, rotation), v).flatten(1))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        parts = (("gate", inner), ("up", inner))
        self.dense_h_to_4h = Linear(hidden, 2 * inner, bias=config.mlp_bias, parts=parts, cut="out")
        self.dense_4h_to_h = Linear(inner, hidden, bias=config.mlp_bias, cut="in")
        self.act = SwiGLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.act(*self.dense_h_to_4h(x).chunk(2, -1)))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps, scale_first=True)
        self.self_attention = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps, scale_first=True)
        self.mlp = FeedForward(config)

    def forward(self, layer: int, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        x = x + self.self_attention(layer, self.input_layernorm(x), rotation, attend)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]

    def parts(self) -> BlockParts:
        return BlockParts(
            attention_norm=self.input_layernorm,
            qkv=(self.self_attention.query_key_value,),
            out=self.self_attention.dense,
            mlp_norm=self.post_attention_layernorm,
            gate_up=(self.mlp.dense_h_to_4h,),
            down=self.mlp.dense_4h_to_h,
        )


class Transformer(nn.Module):
    """The blocks and the final norm; what the released files call the encoder."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.norm_eps, scale_first=True)


class ChatGLM2Model(nn.Module):
    """The body: ids (T,) -> hidden (T, D), after the final norm. The head stands in it, under its released name."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        self.embedding = nn.ModuleDict({"word_embeddings": Embedding(config.vocab_size, config.hidden_size)})
        self.encoder = Transformer(config)
        self.output_layer = Linear(config.hidden_size, config.vocab_size, bias=config.out_bias, cut="out")
        self.rope = Rope(config.rope)
        if config.pre_seq_len:
            self.prefix_encoder = PrefixEncoder(
                config.pre_seq_len,
                layers=config.num_layers,
                heads=config.num_kv_heads,
                size=config.head_dim,
                inner=config.hidden_size if config.prefix_projection else 0,
                table=2 * config.num_layers * config.num_kv_heads * config.head_dim,
            )

    def forward(self, ids: Tensor, positions: Positions, attend: Attend) -> Tensor:
        rotation = self.rope(positions)
        x = self.embedding["word_embeddings"](ids)
        for index, layer in enumerate(self.encoder.layers):
            x = layer(index, x, rotation, attend)
        return self.encoder.final_layernorm(x)  # type: ignore[no-any-return]


class ChatGLM2ForConditionalGeneration(nn.Module):
    """model(ids, positions, attend) -> hidden (T, D); head(hidden rows) -> logits (rows, V) float32."""

    config: ChatGLM2Config

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = ChatGLM2Model(config)

    def forward(self, ids: Tensor, positions: Positions, attend: Attend) -> Tensor:
        return self.transformer(ids, positions, attend)  # type: ignore[no-any-return]

    def head(self, rows: Tensor) -> Tensor:
        return self.transformer.output_layer(rows).float()  # type: ignore[no-any-return]

    def parts(self) -> ModelParts:
        model = self.transformer
        return ModelParts(
            embedding=cast(Embedding, model.embedding["word_embeddings"]),
            blocks=tuple(cast(Block, layer).parts() for layer in model.encoder.layers),
            norm=model.encoder.final_layernorm,
            head=model.output_layer,
            tied=False,
            prefix=getattr(model, "prefix_encoder", None),
        )

"""ChatGLM-6B, in both layouts of its vocabulary (150,528 with image tokens, 130,528 without), as released.

Shapes: T packed tokens, H heads, K head size, D width, V vocabulary. Source: the released model files; Du et al. 2022
(arXiv 2103.10360).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hanlin.errors import RequestError, problems
from hanlin.layers.activation import GELU
from hanlin.layers.attend import Attend
from hanlin.layers.embedding import Embedding
from hanlin.layers.linear import Linear
from hanlin.layers.norm import LayerNorm
from hanlin.layers.prefix import PrefixEncoder
from hanlin.layers.rope import Positions, Rope, RopeConfig, Rotation, rotate
from hanlin.models.config import DecoderConfig, Reader
from hanlin.models.parts import BlockParts, ModelParts

__all__ = ["ChatGLMConfig", "ChatGLMForConditionalGeneration", "ChatGLMModel", "layout", "read_config"]

# The released code gives every block this factor, sqrt(2 * 28), whatever the number of its layers.
ALPHA = 56**0.5
# Rows of the vocabulary without image tokens; the other layout has 20,000 more in front, and all ids move up.
_ROWS = 130528
_IDS = {"mask_token_id": 130000, "gmask_token_id": 130001, "bos_token_id": 130004, "eos_token_id": 130005}


@dataclass(frozen=True, kw_only=True)
class ChatGLMConfig(DecoderConfig):
    """
    Attributes:
        mask_id, gmask_id: `[MASK]` and `[gMASK]`; `bos_id` is `<sop>`.
        pre_seq_len: virtual tokens of a soft prefix (P-Tuning v2), 0 for none.
        prefix_projection: the prefix is projected from a smaller table.
    """

    mask_id: int
    gmask_id: int
    pre_seq_len: int = 0
    prefix_projection: bool = False


def read_config(values: Mapping[str, Any]) -> ChatGLMConfig:
    """Read a released ChatGLM-6B `config.json`. Missing keys mean what the released code means by them."""
    read = Reader(values, "chatglm")
    read.fixed("position_encoding_2d", True)
    read.fixed("tie_word_embeddings", False)  # Transformers writes it
    read.fixed("quantization_bit", 0, 4, 8)
    read.used.update(("quantization_embeddings", "end_token_id"))  # the files tell
    vocabulary, hidden = read.whole("vocab_size", _ROWS + 20000), read.whole("hidden_size", 4096)
    heads, most = read.whole("num_attention_heads", 32), read.whole("max_sequence_length", 2048)
    offset = max(0, vocabulary - _ROWS)
    ids = {key: read.whole(key, value + offset) for key, value in _IDS.items()}
    read.found += [
        f"'{key}' is {i}, the vocabulary ends at {vocabulary - 1}" for key, i in ids.items() if i >= vocabulary
    ]
    head_dim = hidden // max(heads, 1)
    config: dict[str, Any] = {
        "intermediate_size": read.whole("inner_hidden_size", 16384),
        "num_layers": read.whole("num_layers", 28),
        "norm_eps": read.number("layernorm_epsilon", 1e-5),
        "pre_seq_len": read.whole("pre_seq_len", 0),
        "prefix_projection": read.flag("prefix_projection", False),
    }
    if head_dim % 4:
        read.found.append(f"a head of {head_dim} does not divide into two rotary halves of pairs")
    read.finish()
    return ChatGLMConfig(
        model_type="chatglm",
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        max_positions=most,
        rope=RopeConfig(dims=head_dim, base=10000.0, max_positions=most, half=True),
        position_rows=2,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        bos_id=ids["bos_token_id"],
        stop_ids=(ids["eos_token_id"],),
        mask_id=ids["mask_token_id"],
        gmask_id=ids["gmask_token_id"],
        **config,
    )


def layout(config: ChatGLMConfig, ids: Sequence[int]) -> tuple[int, Callable[[int, int], NDArray[np.int64]]]:
    """(how many first tokens see each other both ways, positions (2, stop - start) of tokens start..stop).

    The context ends before `<sop>`; from there on, the first row stays at the place of the mask and the second counts.

    Raises:
        RequestError: no `<sop>`, or neither `[gMASK]` nor `[MASK]` before it.
    """
    start = ids.index(config.bos_id) if config.bos_id in ids else None
    before = list(ids[:start])
    mask = next((i for i in (config.gmask_id, config.mask_id) if i in before), None)
    if start is None or mask is None:
        found = ["there is no <sop> among its ids"] if start is None else []
        found += ["there is neither [gMASK] nor [MASK] before <sop>"] if mask is None else []
        raise RequestError(problems("a ChatGLM-6B prompt", found, "Give text, or end the ids with [gMASK] and <sop>."))
    context, place = start, before.index(mask)

    def positions(start: int, stop: int) -> NDArray[np.int64]:
        row = np.arange(start, stop, dtype=np.int64)
        return np.stack((np.where(row < context, row, place), np.maximum(row - context + 1, 0)))

    return context, positions


class Attention(nn.Module):
    """Attention over one projection that holds for each head its query, key and value."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.size = config.num_heads, config.head_dim
        parts = (("q", self.size), ("k", self.size), ("v", self.size))
        hidden, rows = config.hidden_size, 3 * self.heads * self.size
        self.query_key_value = Linear(hidden, rows, bias=True, parts=parts, groups=self.heads, cut="out")
        self.dense = Linear(self.heads * self.size, hidden, bias=True, cut="in")

    def forward(self, layer: int, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        q, k, v = self.query_key_value(x).view(-1, self.heads, 3 * self.size).chunk(3, -1)
        return self.dense(attend(layer, _rotate(q, rotation), _rotate(k, rotation), v).flatten(1))  # type: ignore[no-any-return]


def _rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """The first half of each head (T, H, K) by the angles of the first position row, the second by the second."""
    angles = zip(rotation.cos.chunk(2, -1), rotation.sin.chunk(2, -1), strict=True)
    halves = zip(x.chunk(2, -1), angles, strict=True)
    return torch.cat([rotate(half, Rotation(cos, sin)) for half, (cos, sin) in halves], -1)


class FeedForward(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.dense_h_to_4h = Linear(hidden, inner, bias=True, parts=(("up", inner),), cut="out")
        self.dense_4h_to_h = Linear(inner, hidden, bias=True, cut="in")
        self.act = GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """The residual stream goes on from the normalised input: x = alpha * norm(x) + layer(norm(x)), twice."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = LayerNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, layer: int, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        x = self.input_layernorm(x)
        x = x * ALPHA + self.attention(layer, x, rotation, attend)
        x = self.post_attention_layernorm(x)
        return x * ALPHA + self.mlp(x)  # type: ignore[no-any-return]

    def parts(self) -> BlockParts:
        return BlockParts(
            attention_norm=self.input_layernorm,
            qkv=(self.attention.query_key_value,),
            out=self.attention.dense,
            mlp_norm=self.post_attention_layernorm,
            gate_up=(self.mlp.dense_h_to_4h,),
            activation="gelu",
            down=self.mlp.dense_4h_to_h,
            alpha=ALPHA,
        )


class ChatGLMModel(nn.Module):
    """The body: ids (T,) -> hidden (T, D), after the final norm."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layernorm = LayerNorm(config.hidden_size, config.norm_eps)
        self.rope = Rope(config.rope)
        if config.pre_seq_len:
            self.prefix_encoder = PrefixEncoder(
                config.pre_seq_len,
                layers=config.num_layers,
                heads=config.num_heads,
                size=config.head_dim,
                inner=config.hidden_size if config.prefix_projection else 0,
            )

    def forward(self, ids: Tensor, positions: Positions, attend: Attend) -> Tensor:
        rotation = self.rope(positions)
        x = self.word_embeddings(ids)
        for index, layer in enumerate(self.layers):
            x = layer(index, x, rotation, attend)
        return self.final_layernorm(x)  # type: ignore[no-any-return]


class ChatGLMForConditionalGeneration(nn.Module):
    """model(ids, positions, attend) -> hidden (T, D); head(hidden rows) -> logits (rows, V) float32."""

    config: ChatGLMConfig

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = ChatGLMModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, cut="out")

    def forward(self, ids: Tensor, positions: Positions, attend: Attend) -> Tensor:
        return self.transformer(ids, positions, attend)  # type: ignore[no-any-return]

    def head(self, rows: Tensor) -> Tensor:
        return self.lm_head(rows).float()  # type: ignore[no-any-return]

    def parts(self) -> ModelParts:
        model = self.transformer
        return ModelParts(
            embedding=model.word_embeddings,
            blocks=tuple(cast(Block, layer).parts() for layer in model.layers),
            norm=model.final_layernorm,
            head=self.lm_head,
            tied=False,
            prefix=getattr(model, "prefix_encoder", None),
        )

"""The image encoder of VisualGLM-6B: a vision transformer (EVA-CLIP g/14) and a Q-Former that asks it 32 questions.

Shapes: N images, P places of the vision transformer (patches and one for the whole), Q queries, W width.
Modules and parameters are called as the released files call them. Sources: Sun et al. 2023 (arXiv 2303.15389), Li et
al. 2023 (BLIP-2, arXiv 2301.12597), and for names and orders the released modules over SwissArmyTransformer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanlin.layers.embedding import Embedding

__all__ = ["BLIP2", "Dense", "EncoderConfig"]

# The released code leaves the norm behind the vision transformer at torch's own.
_VISION_EPS = 1e-5
_ALONE = 1 << 14


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """One of the two transformers.

    Attributes:
        inner: width inside the feed-forward layers.
        rows: of the table of embeddings: 1 for the place that stands for the whole image, or the queries.
        crossed: for each layer whether it looks at the image, too; empty for the vision transformer.
        image_size, patch: pixels of a side; 0 for the Q-Former.
    """

    layers: int
    width: int
    heads: int
    inner: int
    eps: float
    rows: int
    crossed: tuple[bool, ...] = ()
    image_size: int = 0
    patch: int = 0

    @property
    def places(self) -> int:
        return self.rows + (self.image_size // self.patch) ** 2 if self.patch else self.rows


class Dense(nn.Linear):
    """Filled by whoever builds the model; torch would draw numbers. No leaf that a runner may replace: images are
    encoded one at a time, always alike."""

    def reset_parameters(self) -> None:
        """Leave the weight as it is."""


class Patches(nn.Module):
    """Pixels (N, 3, S, S) -> patches (N, patches, W)."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Module()
        self.proj.weight = nn.Parameter(torch.empty(width, 3, patch, patch))
        self.proj.bias = nn.Parameter(torch.empty(width))

    def forward(self, pixels: Tensor) -> Tensor:
        weight: Tensor = self.proj.weight  # type: ignore[assignment]
        bias: Tensor = self.proj.bias  # type: ignore[assignment]
        cut = F.unfold(pixels, weight.shape[-1], stride=weight.shape[-1])
        return F.linear(cut.transpose(1, 2), weight.flatten(1), bias)


class Attention(nn.Module):
    """Of all places to all; q, k and v stand one behind the other in their projection."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query_key_value = Dense(config.width, 3 * config.width)
        self.dense = Dense(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query_key_value(x).chunk(3, -1)
        return self.dense(_attend(q, k, v, self.heads))  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Of the queries to the image's places."""

    def __init__(self, config: EncoderConfig, seen: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = Dense(config.width, config.width)
        self.key_value = Dense(seen, 2 * config.width)
        self.dense = Dense(config.width, config.width)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        k, v = self.key_value(image).chunk(2, -1)
        return self.dense(_attend(self.query(x), k, v, self.heads))  # type: ignore[no-any-return]


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """(N, places, W) each."""
    q, k, v = (x.view(*x.shape[:-1], heads, -1).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = Dense(config.width, config.inner)
        self.dense_4h_to_h = Dense(config.inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(_gelu(self.dense_h_to_4h(x)))  # type: ignore[no-any-return]


def _gelu(x: Tensor) -> Tensor:
    """GELU in calls of so few numbers that torch never shares one out among threads: where it does, the ends of the
    shares take other code, and an image's embeddings would depend on the number of threads."""
    rows = x.flatten(0, -2)
    return torch.cat([F.gelu(part) for part in torch.split(rows, max(1, _ALONE // x.shape[-1]))]).view(x.shape)


class VisionBlock(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.width, config.eps)
        self.attention = Attention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.width, config.eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class QueryBlock(nn.Module):
    """BERT's block, whose last norm is the first of the next: x = norm(x), and each layer's result is added to its
    input and normalised."""

    def __init__(self, config: EncoderConfig, crossed: bool, seen: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.width, config.eps)
        self.attention = Attention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.width, config.eps)
        self.crossed = crossed
        if crossed:
            self.cross_attention = CrossAttention(config, seen)
            self.post_cross_attention_layernorm = nn.LayerNorm(config.width, config.eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        x = self.input_layernorm(x)
        x = self.post_attention_layernorm(x + self.attention(x))
        if self.crossed:
            x = self.post_cross_attention_layernorm(x + self.cross_attention(x, image))
        return x + self.mlp(x)  # type: ignore[no-any-return]


class EVAViT(nn.Module):
    """Pixels (N, 3, S, S) -> (N, P, W)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.word_embeddings = Embedding(config.rows, config.width)
        self.transformer.position_embeddings = Embedding(config.places, config.width)
        self.transformer.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.layers))
        self.mixins = nn.ModuleDict({"patch_embedding": Patches(config.width, config.patch), "cls": nn.Module()})
        self.mixins["cls"].ln_vision = nn.LayerNorm(config.width, _VISION_EPS)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.mixins["patch_embedding"](pixels)
        whole = self.transformer.word_embeddings.weight.expand(len(patches), -1, -1)  # type: ignore[union-attr,operator]
        x = torch.cat((whole, patches), 1) + self.transformer.position_embeddings.weight  # type: ignore[union-attr,operator]
        for layer in self.transformer.layers:  # type: ignore[union-attr]
            x = layer(x)
        return self.mixins["cls"].ln_vision(x)  # type: ignore[no-any-return,operator]


class QFormer(nn.Module):
    """The image's places (N, P, W') -> answers to the learned queries (N, Q, W)."""

    def __init__(self, config: EncoderConfig, seen: int) -> None:
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.word_embeddings = Embedding(config.rows, config.width)
        self.transformer.layers = nn.ModuleList(QueryBlock(config, crossed, seen) for crossed in config.crossed)
        self.transformer.final_layernorm = nn.LayerNorm(config.width, config.eps)

    def forward(self, image: Tensor) -> Tensor:
        x = self.transformer.word_embeddings.weight.expand(len(image), -1, -1)  # type: ignore[union-attr,operator]
        for layer in self.transformer.layers:  # type: ignore[union-attr]
            x = layer(x, image)
        return self.transformer.final_layernorm(x)  # type: ignore[no-any-return,operator]


class BLIP2(nn.Module):
    """Pixels (N, 3, S, S), normalised -> embeddings (N, Q, D) that a language model reads in place of tokens."""

    def __init__(self, vision: EncoderConfig, queries: EncoderConfig, width: int) -> None:
        super().__init__()
        self.vit = EVAViT(vision)
        self.qformer = QFormer(queries, vision.width)
        self.glm_proj = Dense(queries.width, width)

    def keep(self, dtype: torch.dtype) -> None:
        """Keep the large matrices in `dtype` and all else in float32, for whoever multiplies them in his own way."""
        self.float()
        for module in self.modules():
            if isinstance(module, Dense):
                module.weight.data = module.weight.data.to(dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.glm_proj(self.qformer(self.vit(pixels)))  # type: ignore[no-any-return]

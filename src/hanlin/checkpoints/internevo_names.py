"""InternEvo's names and cuts: what a tensor of a released model is called in training, and how ranks share it.

Source: InternEvo's own converters, transformers/convert2hf_internlm.py and convert2hf_internlm2.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

__all__ = ["CONFIGURATION", "FAMILIES", "FILE", "Names", "to_halves", "to_pairs"]

CONFIGURATION = "model_config.pt"
# A rank of the tensor (tp) or the weight (wp) cut, a stage of the pipeline, and FSDP's share of that.
FILE = re.compile(r"model_(?P<cut>tp|wp)(?P<rank>\d{1,4})_pp(?P<stage>\d{1,4})(?P<share>_(?:dp|zo)\d+)?\.pt")


@dataclass(frozen=True, kw_only=True)
class Names:
    """
    Attributes:
        layers: what the list of blocks is called in training.
        outer, inner: released names of tensors outside of and in a block, by their names in training, without the end
            ".weight" or ".bias".
        columns: the parts of a block whose ranks have columns each, where the others have rows.
        fused: what holds all of q's rows, then k's, then v's, of each rank's heads; "" for none.
        embedding: the names it goes by, its usual one first.
    """

    layers: str
    outer: Mapping[str, str]
    inner: Mapping[str, str]
    columns: frozenset[str]
    fused: str = ""
    embedding: tuple[str, ...]


FAMILIES: Mapping[str, Names] = MappingProxyType(
    {
        "internlm2": Names(
            layers="layers",
            outer={"tok_embeddings": "model.tok_embeddings", "norm": "model.norm", "output": "output"},
            inner={
                "attention.wqkv": "attention.wqkv",
                "attention.wo": "attention.wo",
                "attention_norm": "attention_norm",
                "ffn_norm": "ffn_norm",
                "feed_forward.w1": "feed_forward.w1",
                "feed_forward.w2": "feed_forward.w2",
                "feed_forward.w3": "feed_forward.w3",
            },
            columns=frozenset({"attention.wo", "feed_forward.w2"}),
            embedding=("tok_embeddings", "tok_embeddings.word_embeddings"),
        ),
        "internlm": Names(
            layers="blocks",
            outer={"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
            inner={
                "mixer.out_proj": "self_attn.o_proj",
                "mlp.w1": "mlp.gate_proj",
                "mlp.w2": "mlp.up_proj",
                "mlp.w3": "mlp.down_proj",
                "norm1": "input_layernorm",
                "norm2": "post_attention_layernorm",
            },
            columns=frozenset({"mixer.out_proj", "mlp.w3"}),
            fused="mixer.Wqkv",
            embedding=("embedding", "embedding.word_embeddings", "tok_embeddings"),
        ),
    }
)


def to_halves(fused: Tensor, heads: int, kv_heads: int) -> Tensor:
    """InternLM2's fused projection (rows, ...) with the rotary pairs of q and k beside each other -> in two halves."""
    return _turned(fused, heads, kv_heads, pairs=True)


def to_pairs(fused: Tensor, heads: int, kv_heads: int) -> Tensor:
    """The way back."""
    return _turned(fused, heads, kv_heads, pairs=False)


def _turned(fused: Tensor, heads: int, kv_heads: int, *, pairs: bool) -> Tensor:
    grouped = fused.reshape(kv_heads, heads // kv_heads + 2, -1, *fused.shape[1:])  # q's heads of a group, its k, its v
    rotated = grouped[:, :-1]
    half = rotated.shape[2] // 2
    shape = (half, 2) if pairs else (2, half)
    split = rotated.reshape(*rotated.shape[:2], *shape, *fused.shape[1:]).transpose(2, 3).flatten(2, 3)
    return torch.cat((split, grouped[:, -1:]), 1).reshape(fused.shape)

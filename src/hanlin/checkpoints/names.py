"""Which stored tensors make up which parameter. Rows only move or join, so that quantised rows can too."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hanlin.models.config import DecoderConfig

__all__ = ["IGNORED", "Recipe", "plain", "recipes"]

# Tables that old converters stored beside the weights; they are computed here.
# A GGUF file's table is only there beside the numbers that it is computed from; otherwise the file is refused.
IGNORED = re.compile(r"(^|\.)rotary_(emb|pos_emb)\.(inv_freq|cos_cached|sin_cached)$|^rope_freqs\.weight$")


@dataclass(frozen=True)
class Recipe:
    """A parameter out of stored tensors of whole rows.

    Attributes:
        sources: the stored names.
        heads: for each source, the number of heads whose rotary pairs GGUF has interleaved; 0 for none.
        groups: > 0: join the sources group by group (InternLM2's fused projection has one group a kv head).
    """

    sources: tuple[str, ...]
    heads: tuple[int, ...]
    groups: int = 0

    def order(self, counts: Sequence[int]) -> list[NDArray[np.int32]]:
        """For each source, of so many rows, the rows of the parameter that they become: (count,) each."""
        ends = list(accumulate(counts))
        parts = [torch.arange(end - count, end) for count, end in zip(counts, ends, strict=True)]
        return np.split(self.join(parts).argsort().int().numpy(), ends[:-1])

    def join(self, tensors: list[Tensor]) -> Tensor:
        """The parameter, of dense rows or of anything else that there is one of for each row."""
        parts = [unpermute(t, h) if h else t for t, h in zip(tensors, self.heads, strict=True)]
        if not self.groups:
            (only,) = parts
            return only
        grouped = [t.reshape(self.groups, t.shape[0] // self.groups, *t.shape[1:]) for t in parts]
        return torch.cat(grouped, 1).flatten(0, 1)


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """From pairs (0,1),(2,3)... to halves: (heads * K, ...) -> the same."""
    size = rows.shape[0] // heads
    return rows.reshape(heads, size // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def plain(name: str) -> Recipe:
    """A parameter that is stored under its own name."""
    return Recipe((name,), (0,))


_GGUF_LLAMA = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GGUF_INTERNLM2 = {
    "model.tok_embeddings": "token_embd",
    "model.norm": "output_norm",
    "output": "output",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


_GGUF_CHATGLM = {
    "transformer.embedding.word_embeddings": "token_embd",
    "transformer.encoder.final_layernorm": "output_norm",
    "transformer.output_layer": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
_GGUF_GLM = {**_GGUF_LLAMA, "mlp.gate_up_proj": "ffn_up"}
_TABLES = {"internlm2": _GGUF_INTERNLM2, "chatglm2": _GGUF_CHATGLM, "glm": _GGUF_GLM}
_LAYER = re.compile(r"(?:model|transformer\.encoder)\.layers\.(\d+)\.(.+)\.(weight|bias)")


def recipes(
    parameters: Mapping[str, object],
    config: DecoderConfig,
    *,
    gguf: bool,
    permuted: bool,
    stored: Container[str] = (),
) -> dict[str, Recipe]:
    """For every parameter name its recipe.

    Args:
        permuted: GGUF has the rotary pairs of q and k interleaved.
        stored: the names of a GGUF file's tensors, for what converters write in one of two ways.
    """
    if not gguf:
        return {name: plain(name) for name in parameters}
    table = _TABLES.get(config.model_type, _GGUF_LLAMA)
    return {name: _gguf(name, table, config, permuted, stored) for name in parameters}


def _gguf(name: str, table: Mapping[str, str], config: DecoderConfig, permuted: bool, stored: Container[str]) -> Recipe:
    match = _LAYER.fullmatch(name)
    if match is None:
        stem, _, kind = name.rpartition(".")
        return plain(f"{table[stem]}.{kind}")
    layer, part, kind = match.groups()
    q, k = (config.num_heads, config.num_kv_heads) if permuted else (0, 0)
    apart = tuple(f"blk.{layer}.attn_{letter}.{kind}" for letter in "qkv")
    if part == "attention.wqkv":
        return Recipe(apart, (q, k, 0), groups=config.num_kv_heads)
    if part == "self_attention.query_key_value" and apart[0] in stored:
        return Recipe(apart, (0, 0, 0), groups=1)
    heads = {"self_attn.q_proj": q, "self_attn.k_proj": k}.get(part, 0)
    return Recipe((f"blk.{layer}.{table[part]}.{kind}",), (heads,))

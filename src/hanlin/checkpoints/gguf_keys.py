"""A model's configuration in the key-values of a GGUF file, as llama.cpp's architectures want them.

What they have no words for goes under `hanlin.`, which other programs pass over: RoPE scaled with the length, the dtype
of the original, an embedding that is also the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hanlin.errors import ConfigError, problems
from hanlin.models.config import DecoderConfig

__all__ = ["PERMUTED", "architecture", "config_keys", "fit_tokens", "refusals"]

# By family; the others have none.
_ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {"internlm2": "internlm2", "internlm": "llama", "internlm3": "llama", "llama": "llama", "qwen2": "qwen2"}
    | {"chatglm2": "chatglm", "glm": "chatglm"}
)
# These rotate neighbouring dimensions, so that the rows of q and k change places.
PERMUTED = frozenset({"internlm2", "llama"})
_WITHOUT = {
    "chatglm": "llama.cpp has no architecture for ChatGLM-6B: its blocks add to what is normalised, its positions have "
    "two rows, and a prompt sees itself both ways",
    "internlm2-reward": "llama.cpp has no head that gives one score",
}
_UNUSED = 5


def architecture(config: DecoderConfig) -> str | None:
    """The file's architecture, or None where llama.cpp has none."""
    arch = _ARCHITECTURES.get(config.model_type)
    # InternLM2's has no biases. Its mathematics is a Llama's, which may have them.
    return "llama" if arch == "internlm2" and (config.qkv_bias or config.out_bias) else arch


def refusals(config: DecoderConfig) -> list[str]:
    """Everything about a model that no architecture of llama.cpp can say."""
    family = config.model_type
    arch = architecture(config)
    if arch is None:
        return [_WITHOUT.get(family, f"models of kind {family} have no architecture in llama.cpp")]
    found = []
    if getattr(config, "pre_seq_len", 0):
        found.append("a soft prefix (pre_seq_len) has no place in the file")
    if arch != "llama":
        if config.out_bias:
            found.append(f"architecture {arch} has no bias behind the attention")
        if config.mlp_bias:
            found.append(f"architecture {arch} has no bias in the MLP")
    if arch in ("internlm2", "chatglm") and config.head_dim * config.num_heads != config.hidden_size:
        found.append(f"architecture {arch} needs head_dim {config.head_dim} to be hidden_size / num_attention_heads")
    if arch == "chatglm" and config.rope.kind not in ("none", "linear"):
        found.append(f"RoPE scaled by {config.rope.kind!r} is not known for architecture chatglm")
    extra = set(config.rope.numbers) - {"factor", "original_max_position_embeddings"}
    if config.rope.kind == "yarn" and extra:
        found.append(f"RoPE's {', '.join(sorted(extra))} of yarn")
    return found


def config_keys(config: DecoderConfig, *, name: str, path: Path) -> dict[str, Any]:
    """The key-values but those of the tokenizer and the file type; whole numbers are uint32, others float32.

    Raises:
        ConfigError: everything that GGUF can't say.
    """
    found, arch = refusals(config), architecture(config)
    if found:
        raise ConfigError(problems(f"{path} as a GGUF file", found))
    keys: dict[str, Any] = {
        "general.name": name,
        f"{arch}.context_length": config.max_positions,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_heads,
        f"{arch}.attention.head_count_kv": config.num_kv_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config.norm_eps,
        f"{arch}.rope.freq_base": float(config.rope.base),
        f"{arch}.rope.dimension_count": config.rope.dims,
        f"{arch}.vocab_size": config.vocab_size,
    }
    if config.head_dim * config.num_heads != config.hidden_size:
        keys |= {f"{arch}.attention.key_length": config.head_dim, f"{arch}.attention.value_length": config.head_dim}
    rope = config.rope
    if rope.kind in ("linear", "yarn"):
        keys |= {f"{arch}.rope.scaling.type": rope.kind, f"{arch}.rope.scaling.factor": float(rope.factor)}
        if rope.kind == "yarn":
            keys[f"{arch}.rope.scaling.original_context_length"] = rope.trained_length
    elif rope.kind != "none":
        keys["hanlin.rope.scaling.type"] = rope.kind
        keys |= {f"hanlin.rope.scaling.{key}": float(number) for key, number in rope.numbers.items()}
    if config.tied:
        keys["hanlin.tied"] = True
    return keys


def fit_tokens(keys: Mapping[str, Any], rows: int, path: Path) -> dict[str, Any]:
    """Tokenizer keys with exactly as many tokens as the embedding has rows: unused ones are added, or left out.

    Raises:
        ConfigError: tokens with a meaning that have no row.
    """
    tokens, kinds = list(keys["tokenizer.ggml.tokens"]), list(keys["tokenizer.ggml.token_type"])
    beyond = [token for token, kind in zip(tokens[rows:], kinds[rows:], strict=True) if kind != _UNUSED]
    if beyond:
        shown = ", ".join(map(repr, beyond[:5]))
        raise ConfigError(
            f"{path}: the tokenizer has {len(tokens)} tokens, the embedding {rows} rows: {shown} have none, and "
            "llama.cpp refuses such files. Is this the model's own tokenizer?"
        )
    added = range(len(tokens), rows)
    fitted = {
        "tokenizer.ggml.tokens": [*tokens[:rows], *(f"[PAD{i}]" for i in added)],
        "tokenizer.ggml.token_type": [*kinds[:rows], *[_UNUSED] * len(added)],
    }
    if "tokenizer.ggml.scores" in keys:
        fitted["tokenizer.ggml.scores"] = [*keys["tokenizer.ggml.scores"][:rows], *[-1000.0] * len(added)]
    return {**keys, **fitted}

"""The configuration of a converted model: the same mathematics in the words of the other family's `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hanlin.errors import ConfigError, problems
from hanlin.models.config import DecoderConfig

__all__ = ["converted_config", "converted_tokenizer"]

# Said by the result in its own words, or only true of the code that was left behind.
_DROPPED = (
    *("auto_map", "architectures", "model_type", "bias", "attention_bias", "mlp_bias", "head_dim", "pretraining_tp"),
    *("rope_parameters", "rope_scaling", "rope_theta", "attn_implementation", "vocab_size"),
)
_CLASSES = {"internlm2": "InternLM2ForCausalLM", "llama": "LlamaForCausalLM"}
_RELEASED = {
    **_CLASSES,
    "qwen2": "Qwen2ForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
    "chatglm": "ChatGLMModel",
}
# What the code released with InternLM2 accepts as `rope_scaling`.
_ROPE = ("linear", "dynamic")


def converted_config(values: Mapping[str, Any], config: DecoderConfig, to: str, path: Path) -> dict[str, Any]:
    """The keys of the result's `config.json`.

    Raises:
        ConfigError: everything that InternLM2's configuration can't say of a Llama, or the family is a reward model.
    """
    found = []
    if config.model_type == to:
        return {key: value for key, value in values.items() if key != "auto_map"} | {"vocab_size": config.vocab_size}
    if config.model_type not in _CLASSES:
        found.append(f"a model of kind {config.model_type} can't be converted")
    scaling = values.get("rope_scaling")
    given = values.get("rope_parameters")
    if scaling is None and isinstance(given, Mapping) and config.rope.kind != "none":
        scaling = {key: value for key, value in given.items() if key != "rope_theta"}
    if to == "internlm2":
        if config.head_dim * config.num_heads != config.hidden_size:
            found.append(f"head_dim {config.head_dim} is not hidden_size / num_attention_heads")
        if config.qkv_bias != config.out_bias:
            found.append("only some of the attention's projections have a bias")
        if config.mlp_bias:
            found.append("the MLP has a bias")
        if config.rope.kind not in ("none", *_ROPE):
            found.append(f"RoPE is scaled by {config.rope.kind!r}, not by one of {', '.join(_ROPE)}")
        elif config.rope.kind in _ROPE:
            scaling = {"type": config.rope.kind, "factor": float(config.rope.factor)}
    if found:
        raise ConfigError(problems(str(path), found, f"It has no equal among the models of kind {to}."))
    kept = {key: value for key, value in values.items() if key not in _DROPPED}
    biases = {"bias": config.qkv_bias} if to == "internlm2" else {"attention_bias": config.qkv_bias, "mlp_bias": False}
    return {
        **kept,
        **biases,
        "architectures": [_CLASSES[to]],
        "model_type": to,
        # Said in full: what a missing key means differs between the families.
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": values.get("eos_token_id", 2),
        "rope_theta": config.rope.base,
        "rope_scaling": scaling,
    }


def gguf_config(values: Mapping[str, Any], vocab_size: int, dtype: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a `config.json` for what came out of a GGUF file, which does not know all that one says."""
    said = {key: value for key, value in values.items() if value is not None and key != "vocab_size"}
    said.setdefault("architectures", [_RELEASED[said["model_type"]]])
    if said["model_type"] == "chatglm":
        fixed = {"rmsnorm": True, "post_layer_norm": True, "original_rope": True, "add_bias_linear": False}
        said |= {**fixed, "padded_vocab_size": vocab_size, "tie_word_embeddings": False}
    else:
        said |= {"vocab_size": vocab_size, "hidden_act": "silu"}
    if said["model_type"] == "internlm2":  # its code computes it
        said.pop("head_dim", None)
    return said | {"torch_dtype": dtype, "use_cache": True}


def converted_tokenizer(tokenizer: Mapping[str, Any], values: Mapping[str, Any], sentencepiece: bool) -> dict[str, Any]:
    """The keys of the result's `tokenizer_config.json`: without code, and of the class that its family has."""
    kept = {key: value for key, value in tokenizer.items() if key != "auto_map"}
    if sentencepiece and isinstance(kept.get("tokenizer_class"), str):
        fast = "Fast" if kept["tokenizer_class"].endswith("Fast") else ""
        names = {"llama": "LlamaTokenizer", "internlm2": "InternLM2Tokenizer"}
        if kept["tokenizer_class"].removesuffix("Fast") in names.values():
            kept["tokenizer_class"] = names[values["model_type"]] + fast
    return kept

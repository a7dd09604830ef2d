"""Directories of ChatGLM2, ChatGLM3 and GLM-4 as released: configurations, tensor names, tokenizer files."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hanlin.tokenizers.spm_model import BYTE, CONTROL, NORMAL, UNKNOWN, SpmModel

__all__ = ["as_glm", "config", "glm_config", "read_golden", "tiktoken_file", "tokenizer_model", "weights", "write"]

_WORDS = "▁ ▁the ▁cat ▁sat ▁on ing ▁你 你 好 你好 问 答 训练时间 训练 时间 年 。 , ! : ; ?"
_SIGNS = "▁[ [ ] Round ▁print ( ) ' \" - + = . # _ / < > |"
# The keys of the released files, of a tiny model.
_CONFIG: dict[str, Any] = {
    "_name_or_path": "THUDM/chatglm3-6b",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 48,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 32,
    "kv_channels": 8,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 2,
    "original_rope": True,
    "padded_vocab_size": 97,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 8192,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.30.2",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def config(**changes: Any) -> dict[str, Any]:
    """A `config.json` as released with ChatGLM2 and all later ones."""
    return {**_CONFIG, **changes}


def weights(values: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the released names, the rotary table that the files hold included."""
    generator = torch.Generator().manual_seed(seed)
    width, inner, rows = values["hidden_size"], values["ffn_hidden_size"], values["padded_vocab_size"]
    q = values["num_attention_heads"] * values["kv_channels"]
    fused = q + 2 * values["multi_query_group_num"] * values["kv_channels"]

    def random(*shape: int, scale: float = 0.2, center: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale + center

    out = {
        "transformer.embedding.word_embeddings.weight": random(rows, width, scale=1.0),
        "transformer.rotary_pos_emb.inv_freq": torch.ones(values["kv_channels"] // 4).half(),
    }
    for layer in range(values["num_layers"]):
        at = f"transformer.encoder.layers.{layer}"
        out[f"{at}.input_layernorm.weight"] = random(width, center=1.0)
        out[f"{at}.self_attention.query_key_value.weight"] = random(fused, width)
        out[f"{at}.self_attention.query_key_value.bias"] = random(fused)
        out[f"{at}.self_attention.dense.weight"] = random(width, q)
        out[f"{at}.post_attention_layernorm.weight"] = random(width, center=1.0)
        out[f"{at}.mlp.dense_h_to_4h.weight"] = random(2 * inner, width)
        out[f"{at}.mlp.dense_4h_to_h.weight"] = random(width, inner)
    out["transformer.encoder.final_layernorm.weight"] = random(width, center=1.0)
    out["transformer.output_layer.weight"] = random(rows, width, scale=0.5)
    return out


def glm_config(values: dict[str, Any]) -> dict[str, Any]:
    """The `config.json` of the same model in Transformers' format, with the keys of its releases."""
    return {
        "architectures": ["GlmForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": values["eos_token_id"],
        "head_dim": values["kv_channels"],
        "hidden_act": "silu",
        "hidden_size": values["hidden_size"],
        "initializer_range": 0.02,
        "intermediate_size": values["ffn_hidden_size"],
        "max_position_embeddings": values["seq_length"],
        "model_type": "glm",
        "num_attention_heads": values["num_attention_heads"],
        "num_hidden_layers": values["num_layers"],
        "num_key_value_heads": values["multi_query_group_num"],
        "pad_token_id": values["pad_token_id"],
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": values["layernorm_epsilon"],
        "rope_theta": 10000.0 * values.get("rope_ratio", 1),
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.0",
        "use_cache": True,
        "vocab_size": values["padded_vocab_size"],
    }


def as_glm(tensors: dict[str, Tensor], values: dict[str, Any]) -> dict[str, Tensor]:
    """The same weights under Transformers' names."""
    size, kv = values["kv_channels"], values["multi_query_group_num"] * values["kv_channels"]
    sizes = [values["num_attention_heads"] * size, kv, kv]
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("inv_freq"):
            continue
        name = name.replace("transformer.encoder.layers", "model.layers").replace("self_attention", "self_attn")
        name = name.replace("transformer.embedding.word_embeddings", "model.embed_tokens")
        name = name.replace("transformer.encoder.final_layernorm", "model.norm").replace("attn.dense", "attn.o_proj")
        name = name.replace("transformer.output_layer", "lm_head").replace("dense_h_to_4h", "gate_up_proj")
        name = name.replace("dense_4h_to_h", "down_proj")
        if "query_key_value" in name:
            for letter, part in zip("qkv", tensor.split(sizes), strict=True):
                out[name.replace("query_key_value", f"{letter}_proj")] = part.contiguous()
        else:
            out[name] = tensor
    return out


def write(path: Path, values: dict[str, Any], tensors: dict[str, Tensor], **files: Any) -> Path:
    """A model directory with one safetensors file; `files` are further JSON files by stem, or bytes by whole name."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(values))
    save_file(tensors, path / "model.safetensors")
    for name, content in files.items():
        if isinstance(content, bytes):
            (path / name.replace("__", ".")).write_bytes(content)
        else:
            (path / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False))
    return path


def tokenizer_model(*, dummy_prefix: bool = True) -> bytes:
    """A `tokenizer.model` of ChatGLM2's make, with a few hundred pieces."""
    pieces = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    pieces += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789ABR"
    pieces += [(word, NORMAL) for word in dict.fromkeys((*_WORDS.split(), *_SIGNS.split(), *letters, *"▁1▁a▁b"))]
    return SpmModel(
        pieces=[piece for piece, _ in pieces],
        scores=[-float(i) if kind == NORMAL else 0.0 for i, (_, kind) in enumerate(pieces)],
        kinds=[kind for _, kind in pieces],
        dummy_prefix=dummy_prefix,
    ).serialize()


def tiktoken_file(merges: tuple[str, ...] = ("he", "ll", "hell", "hello", " h", "你", "好", "你好", "\n\n")) -> bytes:
    """A `tokenizer.model` of GLM-4's make: all bytes, and some words with what they are merged from."""
    tokens = [bytes((byte,)) for byte in range(256)]
    for word in merges:
        data = word.encode()
        tokens += [data[:end] for end in range(2, len(data) + 1) if data[:end] not in tokens]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def read_golden(path: Path) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """(weights by released name, (ids, hidden) of three steps) of the official code's block."""
    data, at = path.read_bytes(), 0

    def take(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        nonlocal at
        count = torch.Size(shape).numel()
        tensor = torch.frombuffer(bytearray(data), dtype=dtype, count=count, offset=at).view(shape)
        at += count * dtype.itemsize
        return tensor.clone()

    block = "transformer.encoder.layers.0"
    shapes = {
        "transformer.embedding.word_embeddings.weight": (5, 32),
        f"{block}.input_layernorm.weight": (32,),
        f"{block}.self_attention.query_key_value.weight": (48, 32),
        f"{block}.self_attention.query_key_value.bias": (48,),
        f"{block}.self_attention.dense.weight": (32, 32),
        f"{block}.post_attention_layernorm.weight": (32,),
        f"{block}.mlp.dense_h_to_4h.weight": (96, 32),
        f"{block}.mlp.dense_4h_to_h.weight": (32, 48),
        "transformer.encoder.final_layernorm.weight": (32,),
    }
    tensors = {name: take(*shape) for name, shape in shapes.items()}
    steps = [(take(count, dtype=torch.int32), take(count, 32)) for count in (3, 1, 1)]
    assert at == len(data)
    return tensors, steps

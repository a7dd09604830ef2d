"""What all tests share: where the handed-over assets are, and tiny random models of every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hanlin.models.registry import build, read_config

# Tiny matrices gain nothing from threads, and a second test process beside loses much.
torch.set_num_threads(1)

TINY: dict[str, dict[str, Any]] = {
    "internlm2": {"model_type": "internlm2", "num_key_value_heads": 2, "bias": False, "rms_norm_eps": 1e-5},
    "internlm2-bias": {"model_type": "internlm2", "num_key_value_heads": 4, "bias": True},
    "internlm2-dynamic": {
        "model_type": "internlm2",
        "num_key_value_heads": 1,
        "bias": False,
        "max_position_embeddings": 24,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "llama": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
    "internlm": {"model_type": "internlm", "bias": True},
    "internlm3": {"model_type": "internlm3", "num_key_value_heads": 1, "qkv_bias": True},
    "glm": {"model_type": "glm", "num_key_value_heads": 2, "head_dim": 16},
}
# ChatGLM-6B's keys are its own.
CHATGLM: dict[str, Any] = {
    "model_type": "chatglm",
    "vocab_size": 97,
    "hidden_size": 32,
    "inner_hidden_size": 64,
    "num_layers": 2,
    "num_attention_heads": 4,
    "mask_token_id": 90,
    "gmask_token_id": 91,
    "bos_token_id": 92,
    "eos_token_id": 93,
}
# So are those of ChatGLM2, ChatGLM3 and GLM-4.
CHATGLM2: dict[str, Any] = {
    "model_type": "chatglm",
    "padded_vocab_size": 97,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "add_qkv_bias": True,
    "eos_token_id": 2,
}
# The sizes of VisualGLM-6B's image encoder, with the notes that the released file has beside them.
VISUALGLM: dict[str, Any] = {
    **CHATGLM,
    "image_length": 5,
    "eva_config": {
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "inner_hidden_size": 48,
        "vocab_size": 1,
        "layernorm_order": "pre",
        "layernorm_epsilon": 1e-06,
        "use_final_layernorm": False,
        "model_parallel_size": 1,
        "max_sequence_length": 10,
        "image_size": [42, 42],
        "patch_size": 14,
        "pre_len": 1,
        "post_len": 0,
        "in_channels": 3,
        "num_classes": 0,
    },
    "qformer_config": {
        "num_layers": 4,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "vocab_size": 5,
        "layernorm_order": "post",
        "layernorm_epsilon": 1e-12,
        "model_parallel_size": 1,
        "max_sequence_length": 0,
        "is_decoder": [True, False, True, False],
        "cross_attn_hidden_size": 32,
    },
}
OWN = {"visualglm": VISUALGLM, "chatglm": CHATGLM, "chatglm2": CHATGLM2, "chatglm2-32k": {**CHATGLM2, "rope_ratio": 16}}
_SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of assets and data beside the repository."""
    path = Path(__file__).parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("needs the folder ../shared beside the repository (assets and data), which is not here")
    return path


@pytest.fixture(scope="session")
def tiny() -> Callable[..., nn.Module]:
    """tiny(kind, dtype, **config) -> a random model of that kind, the same at every call."""

    def make(kind: str = "internlm2", dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
        values = OWN[kind] if kind in OWN else {**_SIZES, **TINY[kind]}
        model = build(read_config({**values, **config}), dtype=dtype)
        model = model.to_empty(device="cpu")
        parts = model.parts()
        if parts.tied:  # moving off the meta device has parted them
            parts.head.weight = parts.embedding.weight
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim > 1 or "bias" in name else 0.1
            center = 1.0 if "norm" in name else 0.0
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale + center)
        return model

    return make

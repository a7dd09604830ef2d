"""A VisualGLM-6B directory as released: configuration, tensor names of both parts, shards in .bin; and pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import chatglm_directory
from chatglm_directory import PIECES, tokenizer_config, tokenizer_model
from conftest import VISUALGLM
from hanlin.models.registry import build, read_config

__all__ = ["config", "picture", "weights", "write"]

NAMES = [piece for piece, _ in PIECES]
IDS = {
    "mask_token_id": NAMES.index("[MASK]"),
    "gmask_token_id": NAMES.index("[gMASK]"),
    "bos_token_id": NAMES.index("<sop>"),
    "eos_token_id": NAMES.index("<eop>"),
}


def config(**changes: Any) -> dict[str, Any]:
    """The keys of the released `config.json`, of a tiny model."""
    auto = "modeling_chatglm.ChatGLMForConditionalGenerationWithImage"
    return {
        **chatglm_directory.config(vocab_size=len(NAMES) + 3, hidden_size=64, **IDS),
        "_name_or_path": "THUDM/visualglm-6b",
        "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": auto},
        "image_length": 5,
        "eva_config": VISUALGLM["eva_config"],
        "qformer_config": VISUALGLM["qformer_config"],
        **changes,
    }


def weights(values: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the released names."""
    out = chatglm_directory.weights(values, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in build(read_config(values), dtype=torch.float32).named_parameters():
        if name.startswith("image_encoder."):
            center = float(name.endswith(("norm.weight", "ln_vision.weight")))
            scale = 0.3 if parameter.ndim > 1 else 0.1
            out[name] = torch.randn(parameter.shape, generator=generator) * scale + center
    return out


def write(path: Path, seed: int = 0, **changes: Any) -> Path:
    """A whole model directory."""
    values = config(**changes)
    chatglm_directory.write(path, values, weights(values, seed))
    (path / "ice_text.model").write_bytes(tokenizer_model())
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
    return path


def picture(seed: int = 0, kind: str = "PNG", size: tuple[int, int] = (60, 40), **options: Any) -> bytes:
    """A small picture of random colours."""
    from PIL import Image

    colours = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    out = io.BytesIO()
    Image.fromarray(colours.to(torch.uint8).numpy()).save(out, kind, **options)
    return out.getvalue()

"""LoRA adapters for tests, written as PEFT writes them, but without PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hanlin.layers.linear import Linear

__all__ = ["halves", "linears_of", "write_adapter"]


def linears_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer, by its name."""
    return {n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, Linear)}


def halves(linears: Mapping[str, tuple[int, int]], rank: int, seed: int = 0, size: float = 0.3) -> dict[str, Tensor]:
    """Random A and B for each layer, under PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in linears.items():
        stem = f"base_model.model.{name}.lora_"
        tensors[f"{stem}A.weight"] = torch.randn(rank, columns, generator=generator) * columns**-0.5
        tensors[f"{stem}B.weight"] = torch.randn(rows, rank, generator=generator) * size
    return tensors


def write_adapter(path: Path, tensors: Mapping[str, Tensor], rank: int, **config: Any) -> Path:
    """A directory with these tensors; `config` goes into its `adapter_config.json`."""
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": rank, "lora_alpha": 2 * rank}
    (path / "adapter_config.json").write_text(json.dumps({**values, **config}))
    return path

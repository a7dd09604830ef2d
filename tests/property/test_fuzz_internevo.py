"""Mutational fuzzing of training checkpoints and of packed weights: files that are damaged, or do not belong together.

The property: what is damaged either opens, and then every tensor has the shape that is told and loads, or raises
CheckpointError. `damaged(run)` makes the same again. HANLIN_FUZZ_RUNS sets how many.
"""

from __future__ import annotations

import io
import json
import os
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fuzz_readers import BLIND, rewrite_pickle
from torch import Tensor

from hanlin.checkpoints.base import DTYPES, TensorInfo
from hanlin.checkpoints.internevo import InternEvoSource
from hanlin.checkpoints.packed import KEY, PACKED_VERSION, PackedSource, padded_bytes
from hanlin.errors import CheckpointError

RUNS = min(int(os.environ.get("HANLIN_FUZZ_RUNS", "2000")), 50_000)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FILES = ("model_tp0_pp0.pt", "model_tp1_pp0.pt", "model_config.pt")
_ARGUMENTS = {"num_attention_heads": 4, "num_kv_attention_heads": 2, "hidden_size": 16, "vocab_size": 24}
_VALUES = (None, True, 0, -1, 3, 2, 1 << 40, 1.5, float("nan"), "", [], {})


@cache
def seeds() -> dict[str, bytes]:
    rows = {"attention.wqkv": (16, 16), "attention.wo": (16, 8), "feed_forward.w1": (12, 16)}
    rows |= {"feed_forward.w3": (12, 16), "feed_forward.w2": (16, 12), "attention_norm": (16,), "ffn_norm": (16,)}
    half = {f"layers.{n}.{name}.weight": torch.ones(shape).bfloat16() for n in range(2) for name, shape in rows.items()}
    half |= {
        "tok_embeddings.weight": torch.ones(24, 8),
        "norm.weight": torch.ones(16),
        "output.weight": torch.ones(12, 16),
    }
    made = {}
    for name, value in zip(
        _FILES, (half, half, {**_ARGUMENTS, "dtype": torch.bfloat16, "adapt_hf": False}), strict=True
    ):
        torch.save(value, buffer := io.BytesIO())
        made[name] = buffer.getvalue()
    return made


def damaged(run: int) -> dict[str, bytes]:
    rng = random.Random(run)
    files = dict(seeds())
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(_FILES)
        if rng.random() < 0.2:
            said = {**_ARGUMENTS, rng.choice([*_ARGUMENTS, "adapt_hf", "norm_head", "rope_base"]): rng.choice(_VALUES)}
            torch.save(said, buffer := io.BytesIO())
            files["model_config.pt"] = buffer.getvalue()
        elif rng.random() < 0.05:
            files.pop(name, None)
        elif name in files:
            files[name] = (rewrite_pickle if rng.random() < 0.5 else rng.choice(BLIND))(rng, files[name])
    return files


@pytest.mark.slow
def test_damaged_training_checkpoints(tmp_path: Path) -> None:
    outcomes = {"read": 0, "refused": 0}
    for run in range(RUNS):
        for name in _FILES:
            (tmp_path / name).unlink(missing_ok=True)
        for name, content in damaged(run).items():
            (tmp_path / name).write_bytes(content)
        try:
            with InternEvoSource(tmp_path) as source:
                json.dumps(source.values())
                for name, info in source.infos.items():
                    assert tuple(source.load(name).shape) == info.shape, run
        except CheckpointError as error:
            assert len(str(error)) < 20_000
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"damaged({run}): {error!r}") from error
        else:
            outcomes["read"] += 1
    assert min(outcomes.values()) > RUNS // 20, outcomes


class Memory:
    """Tensors in memory as a source, in one file of its own."""

    def __init__(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        self.path, self.metadata, self._tensors = path, metadata, tensors
        self.infos = {
            name: TensorInfo(name, tuple(tensor.shape), _NAMES[tensor.dtype], tensor.nbytes, path)
            for name, tensor in tensors.items()
        }

    def load(self, name: str) -> Tensor:
        return self._tensors[name].clone()

    def raw(self, name: str) -> Any:
        return self._tensors[name].contiguous().view(torch.uint8).numpy().reshape(-1)


def packed(rng: random.Random, path: Path) -> Memory:
    """Two packed weights, damaged."""
    kinds = ("INT8", "INT4", "INT4_MIN", "INT4_ZERO", "INT8_ROW", "BF16", "F32")
    tensors: dict[str, Tensor] = {"norm.weight": torch.ones(64)}
    slots = []
    for number, kind in enumerate(rng.sample(kinds, 2)):
        group = 32 if kind.startswith("INT") and kind != "INT8_ROW" else 0
        slots.append(
            {"kind": kind, "group": group, "out": 40, "in": 64, "weights": [f"a{number}.weight"], "biases": []}
        )
        tensors[f"packed.{number}"] = torch.zeros(padded_bytes(kind, group, 40, 64), dtype=torch.uint8)
        tensors[f"a{number}.rows"] = torch.randperm(40).int()
    slots[0]["biases"] = ["a0.bias"]
    tensors["packed.0.bias"] = torch.zeros(192, dtype=torch.uint8)
    said: dict[str, Any] = {
        "version": PACKED_VERSION,
        "slots": slots,
        "offset": 0,
        "size": 4096,
        "sums": "00",
        "layout": "00",
    }
    for _ in range(rng.choice((0, 1, 1, 2))):
        where = rng.randrange(4)
        if where == 0:
            said[rng.choice(list(said))] = rng.choice(_VALUES)
        elif where == 1 and slots:
            slot = rng.choice(slots)
            slot[rng.choice(list(slot))] = rng.choice((*_VALUES, *kinds, 32, 64, 40, 39, ["a1.weight"], ["a0.bias", 3]))
        elif where == 2:
            tensors.pop(rng.choice(list(tensors)), None)
        else:
            name = rng.choice(list(tensors))
            value = tensors[name]
            tensors[name] = rng.choice((value[: len(value) // 2], value.double(), value - 1, value[None]))
    return Memory(path, tensors, {KEY: json.dumps(said)} if rng.random() < 0.95 else {})


def test_damaged_packed_weights(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\0" * 4096)
    outcomes = {"read": 0, "refused": 0}
    for run in range(RUNS):
        try:
            source = PackedSource(packed(random.Random(run), path))
            for name, info in source.infos.items():
                assert tuple(source.load(name).shape) == info.shape, run
                assert len(source.raw(name))
        except CheckpointError as error:
            assert len(str(error)) < 20_000
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"run {run}: {error!r}") from error
        else:
            outcomes["read"] += 1
    assert min(outcomes.values()) > RUNS // 20, outcomes

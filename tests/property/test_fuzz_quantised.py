"""Mutational fuzzing of the readers of quantised matrices: tensors and configurations that do not belong together.

The property: what is damaged either opens, and then every matrix has the shape that is told and loads, or raises
CheckpointError or ConfigError. `damaged(run)` makes the same again. HANLIN_FUZZ_RUNS sets how many.
"""

from __future__ import annotations

import copy
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hanlin.checkpoints.base import DTYPES, TensorInfo
from hanlin.checkpoints.quantisation import read_quantisation
from hanlin.checkpoints.quantised import FEW_BITS, QuantisedSource
from hanlin.errors import CheckpointError, ConfigError
from quantised_files import CONFIGS, make

RUNS = min(int(os.environ.get("HANLIN_FUZZ_RUNS", "3000")), 100_000)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_VALUES = (None, True, 0, -1, 2, 3, 4, 8, 31, 32, 64, 1 << 40, 1.5, float("nan"), "", "gemm", "marlin", [], {}, [4])


class Memory:
    """Tensors in memory as a source: nothing has to be written for each run."""

    path, metadata = Path("memory"), {}

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self.infos = {
            name: TensorInfo(name, tuple(tensor.shape), _NAMES[tensor.dtype], tensor.nbytes, self.path)
            for name, tensor in tensors.items()
        }

    def load(self, name: str) -> Tensor:
        return self._tensors[name].clone()


def damaged(run: int) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    rng = random.Random(run)
    form = rng.choice(list(CONFIGS))
    tensors = {
        f"{stem}.{end}": tensor for stem in "ab" for end, tensor in make(form, (16, 96), seed=run % 7)[0].items()
    }
    config = copy.deepcopy(CONFIGS[form])
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.2:
            _change_config(rng, config)
        elif tensors:
            _change_tensor(rng, tensors, rng.choice(list(tensors)))
    return form, tensors, config


def _change_config(rng: random.Random, config: dict[str, Any]) -> None:
    place = config
    while True:
        key = rng.choice([*place, "bits", "group_size", "dynamic", "checkpoint_format", "sym", "zero_point"])
        inner = place.get(key)
        if not isinstance(inner, dict) or not inner or rng.random() < 0.2:
            place[key] = rng.choice(_VALUES)
            return
        place = inner


def _change_tensor(rng: random.Random, tensors: dict[str, Tensor], name: str) -> None:
    tensor = tensors[name]
    match rng.randrange(8) if tensor.numel() else 0:
        case 0:
            del tensors[name]
        case 1:
            tensors[name] = tensor.view(torch.uint8) if rng.random() < 0.5 and tensor.ndim else tensor.float()
        case 2:
            tensors[name] = tensor.reshape(-1)[: rng.randrange(tensor.numel() + 1)]
        case 3:
            tensors[name] = tensor.T.clone(memory_format=torch.contiguous_format) if tensor.ndim == 2 else tensor[None]
        case 4:
            tensors[name] = torch.cat((tensor, tensor)) if tensor.ndim else tensor.repeat(2)
        case 5:
            flat = tensor.flatten().clone()
            flat[rng.randrange(len(flat))] = rng.choice((0, 1, 3, 100)) if tensor.dtype is not torch.bool else True
            tensors[name] = flat.view(tensor.shape)
        case 6:
            octets = tensor.flatten().clone().view(torch.uint8)
            octets[rng.randrange(len(octets))] ^= 1 << rng.randrange(8)
            tensors[name] = octets.view(tensor.dtype).view(tensor.shape)
        case _:
            other = rng.choice(list(tensors))
            tensors[name], tensors[other] = tensors[other], tensors[name]


@pytest.mark.parametrize("part", range(4))
def test_damaged_matrices_load_or_are_refused(part: int) -> None:
    opened = 0
    for run in range(part, RUNS, 4):
        form, tensors, config = damaged(run)
        try:
            source = QuantisedSource(Memory(tensors), read_quantisation(config, Path("config.json")))  # type: ignore[arg-type]
        except (CheckpointError, ConfigError) as error:
            assert len(str(error)) < 10_000
            continue
        opened += 1
        for name, info in source.infos.items():
            value = source.load(name)
            assert tuple(value.shape) == info.shape, f"run {run}, {form}"
            if info.dtype not in DTYPES and info.dtype != FEW_BITS:
                assert source.raw(name).size % info.shape[0] == 0
    assert opened > RUNS // 4 * 0.1  # the damage is not so great that nothing would be tried

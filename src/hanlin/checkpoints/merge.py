"""A checkpoint with an adapter merged into it while it is read: W + scale * up @ down, in float32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hanlin.checkpoints.base import DTYPES, TensorInfo, TensorSource, fail, shown
from hanlin.checkpoints.names import Recipe
from hanlin.checkpoints.peft import PeftAdapter
from hanlin.errors import CheckpointError

__all__ = ["MergedSource"]


class _Change(NamedTuple):
    """What becomes of a stored tensor: which rows of which parameter it holds."""

    parameter: str
    order: Tensor


class MergedSource:
    """A source whose merged tensors are float32, whatever they are stored as; all others are as they were.

    Closing it leaves the source below open. See `TensorSource`.

    Raises:
        CheckpointError: additions to weights that are shared or hold codes; all of them at once.
    """

    def __init__(self, source: TensorSource, adapter: PeftAdapter, wanted: Mapping[str, Recipe]) -> None:
        self._source, self._adapter = source, adapter
        self.path, self.metadata = source.path, source.metadata
        names = {f"{linear}.weight" for linear in adapter.additions} | set(adapter.tables)
        found = [f"{shown(name)} shares its weights with the embedding" for name in sorted(names) if name not in wanted]
        self._changes: dict[str, _Change] = {}
        for name in names & set(wanted):
            recipe = wanted[name]
            dtypes = {part: source.infos[part].dtype for part in recipe.sources}
            codes = [part for part, dtype in dtypes.items() if dtype in DTYPES and not DTYPES[dtype].is_floating_point]
            found += [f"{shown(part)} holds codes ({dtypes[part]}), into which nothing can be merged" for part in codes]
            if codes:
                continue
            counts = [source.infos[part].shape[0] for part in recipe.sources]
            for part, order in zip(recipe.sources, recipe.order(counts), strict=True):
                self._changes[part] = _Change(name, torch.from_numpy(order).long())
        if found:
            fail(adapter.path, found, "Load the adapter beside the model instead: adapters={NAME: DIR}.")
        self.infos: Mapping[str, TensorInfo] = MappingProxyType(
            {name: self._described(info) for name, info in source.infos.items()}
        )

    def load(self, name: str) -> Tensor:
        change = self._changes.get(name)
        if change is None:
            return self._source.load(name)
        table = self._adapter.tables.get(change.parameter)
        value = self._source.load(name).float() if table is None else table[change.order].float()
        low = self._adapter.additions.get(change.parameter.removesuffix(".weight"))
        if low is not None:
            value += (low.up[change.order].float() * low.scale) @ low.down.float()
        return value

    def raw(self, name: str) -> NDArray[np.uint8]:
        if name in self._changes:
            raise CheckpointError(f"{self.path}: {shown(name)} is merged with an adapter, and no longer as stored")
        return self._source.raw(name)

    def forget(self) -> None:
        self._source.forget()

    def state(self) -> dict[str, tuple[int, ...]]:
        return {**self._source.state(), **self._adapter.files}

    def close(self) -> None:
        """Leave the source below open: whoever opened it closes it."""

    def __enter__(self) -> MergedSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _described(self, info: TensorInfo) -> Any:
        if info.name not in self._changes:
            return info
        return replace(info, dtype="F32", nbytes=4 * math.prod(info.shape))

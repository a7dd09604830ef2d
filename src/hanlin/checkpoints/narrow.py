"""In which dtype a GGUF file's tensors go on living outside of it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from hanlin.checkpoints.base import TensorSource
from hanlin.checkpoints.gguf_encode import DENSE
from hanlin.checkpoints.weights import Weights
from hanlin.errors import ConfigError

__all__ = ["Narrow", "Narrowed"]


@dataclass(frozen=True)
class Narrow:
    """Puts a tensor in a narrower dtype.

    GGUF keeps vectors, and often matrices, wider than they were. Unless rounding was asked for, only what loses nothing
    is narrowed.

    Attributes:
        dtype: the narrower one, or None to leave all as they are.
        rounds: whether values may be rounded.
        named: what the configuration calls it.
    """

    dtype: torch.dtype | None
    rounds: bool
    named: str

    @classmethod
    def choose(cls, source: TensorSource, outtype: str) -> Narrow:
        """What was asked for; else what the file says its original had; else what most of its matrices have.

        Raises:
            ConfigError: a block kind was asked for.
        """
        if outtype != "auto":
            if outtype.upper() not in DENSE:
                raise ConfigError(f"--outtype {outtype} is for GGUF files; a directory takes f32, f16 or bf16")
            dtype = DENSE[outtype.upper()]
            return cls(dtype, True, str(dtype).removeprefix("torch."))
        sizes: dict[str, int] = {}
        for info in source.infos.values():
            if len(info.shape) == 2:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + prod(info.shape)
        if any(kind not in DENSE for kind in sizes):
            return cls(None, False, "float32")
        said = source.metadata.get("hanlin.dtype")
        dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DENSE.values()}
        dtype = dtypes.get(said) if isinstance(said, str) else None  # type: ignore[assignment]
        dtype = dtype or DENSE[max(sizes, key=lambda kind: sizes[kind])]
        return cls(dtype, False, str(dtype).removeprefix("torch."))

    def __call__(self, value: Tensor) -> Tensor:
        if self.dtype is None or value.dtype == self.dtype:
            return value.float() if self.dtype is None else value
        narrow = value.to(self.dtype)
        return narrow if self.rounds or torch.equal(narrow.to(value.dtype), value) else value


@dataclass(frozen=True)
class Narrowed(Weights):
    """Parameters in the dtype that they are to have."""

    narrow: Narrow

    def load(self, name: str) -> Tensor:
        return self.narrow(super().load(name))

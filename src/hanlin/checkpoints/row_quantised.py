"""ChatGLM's own int4 and int8 checkpoints: whole numbers of a matrix, and one scale for each of its rows.

`X.weight` holds int8 (out, in), or two values a byte (out, in / 2) with the even column in the high half, both in two's
complement; `X.weight_scale` holds float16 (out,). A value is the number times the row's scale. Source: the released
`quantization.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from hanlin.checkpoints.base import TensorInfo, TensorSource, fail

__all__ = ["ROW_INT4", "ROW_INT8", "RowQuantisedSource", "dequantised", "is_row_quantised", "packed", "rounded"]

ROW_INT4, ROW_INT8 = "ROW_INT4", "ROW_INT8"
_SCALE = "_scale"


def is_row_quantised(source: TensorSource) -> bool:
    """Whether any matrix of the files has a scale for each row beside it."""
    return any(f"{name}{_SCALE}" in source.infos for name in source.infos)


class RowQuantisedSource:
    """Files with such matrices, which appear as tensors (out, in) of dtype ROW_INT4 or ROW_INT8.

    `raw` gives for each row its stored numbers and, in two more bytes, its scale.

    Args:
        bits: 4 or 8, as `quantization_bit` says.

    Raises:
        CheckpointError: scales that do not fit their matrices; all of them at once.
    """

    def __init__(self, base: TensorSource, bits: int) -> None:
        self.path, self.metadata = base.path, base.metadata
        self._base = base
        infos, found = dict(base.infos), []
        for name, info in base.infos.items():
            scale = infos.get(f"{name}{_SCALE}")
            if scale is None:
                continue
            rows = info.shape[:1]
            if info.dtype != "I8" or len(info.shape) != 2 or scale.shape != rows or scale.dtype not in ("F16", "F32"):
                found.append(
                    f"'{name}' {info.dtype} {info.shape} with a scale {scale.dtype} {scale.shape}: int8 needs "
                    "one float16 a row"
                )
                continue
            del infos[f"{name}{_SCALE}"]
            shape = (info.shape[0], info.shape[1] * 8 // bits)
            nbytes = info.nbytes + 2 * info.shape[0]
            infos[name] = replace(info, shape=shape, dtype=ROW_INT4 if bits == 4 else ROW_INT8, nbytes=nbytes)
        if found:
            fail(self.path, found, "Fetch the files again.")
        self.infos: Mapping[str, TensorInfo] = infos

    def _is_packed(self, name: str) -> bool:
        return name in self.infos and self.infos[name].dtype in (ROW_INT4, ROW_INT8)

    def load(self, name: str) -> torch.Tensor:
        if not self._is_packed(name):
            return self._base.load(name)
        numbers, scale = self._base.load(name), self._base.load(f"{name}{_SCALE}")
        return dequantised(numbers, scale, 4 if self.infos[name].dtype == ROW_INT4 else 8)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        if not self._is_packed(name):
            return self._base.raw(name)
        rows = self.infos[name].shape[0]
        numbers = self._base.raw(name).reshape(rows, self._base.infos[name].nbytes // max(1, rows))
        scale = self._base.load(f"{name}{_SCALE}").half().numpy().view(np.uint8).reshape(rows, 2)
        return np.concatenate((numbers, scale), 1).reshape(-1)

    def forget(self) -> None:
        self._base.forget()

    def state(self) -> dict[str, tuple[int, ...]]:
        return self._base.state()

    def close(self) -> None:
        self._base.close()

    def __enter__(self) -> RowQuantisedSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def dequantised(numbers: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Stored int8 (out, in * bits / 8) and scales (out,) -> float32 (out, in)."""
    if bits == 4:
        low = (numbers << 4) >> 4
        numbers = torch.stack((numbers >> 4, low), -1).flatten(-2)
    return numbers.float() * scale.float()[:, None]


def rounded(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in) -> whole numbers int8 (out, in), and scales float16 (out,): a row's largest is the last."""
    most = 2 ** (bits - 1) - 1
    wide = weight.float()
    scale = (wide.abs().amax(1) / most).half()
    exact = scale.float().clamp(min=torch.finfo(torch.float16).tiny)[:, None]
    return (wide / exact).round().clamp(-most, most).to(torch.int8), scale


def packed(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers int8 (out, in) as they are stored, (out, in * bits / 8)."""
    return (numbers[:, 0::2] << 4) | (numbers[:, 1::2] & 15) if bits == 4 else numbers

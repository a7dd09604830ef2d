"""Files of quantised matrices as a source of whole ones: by name as in the original checkpoint, in exact layouts.

How a matrix is told in `TensorInfo.dtype`:

    INT4/g, INT4_ZERO/g, INT8/g    codes with float16 scales (and zero points) for each g columns, 32, 64 or 128
    INT8_ROW                       codes of 8 bits with one float32 scale a row
    FEW_BITS                       anything else: columns in the order of their importance (act-order), groups of other
                                   sizes, 8 bits with zero points, NF4. Only `load` gives it, dequantised
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hanlin.checkpoints.base import TensorInfo, TensorSource, fail
from hanlin.checkpoints.bitsandbytes import Blocks, RowsOfInt8, blocks, dequantised_blocks, plain_info
from hanlin.checkpoints.grouped import FORMATS, Format, Groups, Matrix, dequantised, runs
from hanlin.checkpoints.quantisation import Quantisation

__all__ = ["FEW_BITS", "QuantisedSource"]

FEW_BITS = "FEW_BITS"
_SIZES = (128, 64, 32)


class QuantisedSource:
    """See `TensorSource`. `raw` gives for each row its codes, a byte each, its scales, and its zero points if any.

    Closing it leaves the source below open.

    Raises:
        CheckpointError: tensors that do not belong together or not to the configuration; all of them at once.
    """

    def __init__(self, base: TensorSource, quantisation: Quantisation) -> None:
        self.path, self.metadata = base.path, base.metadata
        self._base = base
        self._format: Format = FORMATS.get(quantisation.method, RowsOfInt8)(quantisation)
        self._matrices: dict[str, Matrix | Blocks] = {}
        found: list[str] = []
        infos = dict(base.infos)
        for matrix in self._found(quantisation, found):
            self._matrices[matrix.name] = matrix
            dtype = FEW_BITS
            if isinstance(matrix, Matrix):
                dtype = self._exact(matrix, self._format.groups(matrix, base), found)
            for part in matrix.parts.values():
                infos.pop(part.name, None)
            if matrix.name in infos:
                found.append(f"'{matrix.name}' is there twice, plain and quantised")
            infos[matrix.name] = plain_info(matrix, dtype)
        if not found and not self._matrices:
            found.append(f"no tensor is quantised as {quantisation.method}, which the configuration says")
        if found:
            fail(self.path, found, "The weights and the configuration do not belong together. Fetch both again.")
        self.infos: Mapping[str, TensorInfo] = infos

    def _found(self, quantisation: Quantisation, found: list[str]) -> list[Matrix | Blocks]:
        if quantisation.method == "bitsandbytes" and quantisation.bits == (4,):
            return list(blocks(self._base, found))
        stems = list(self._format.stems(self._base.infos))
        described = (self._format.describe(stem, self._base, found) for stem in stems)
        return [matrix for matrix in described if matrix is not None]

    def _exact(self, matrix: Matrix, groups: Groups, found: list[str]) -> str:
        """The packed layout that holds the matrix as it is, by name, or FEW_BITS."""
        order = groups.column_groups
        low, high = (0, 0) if order is None else (int(order.min()), int(order.max()))
        if low < 0 or high >= matrix.groups:
            found.append(f"'{matrix.name}' has columns in groups {low} to {high}, but only {matrix.groups} groups")
            return FEW_BITS
        if not bool(groups.scales.isfinite().all()):
            found.append(f"'{matrix.name}' has a scale that is not a finite number")
            return FEW_BITS
        in_ = matrix.shape[1]
        middle = groups.zeros is None or bool((groups.zeros == 1 << (matrix.bits - 1)).all())
        if matrix.bits == 8 and matrix.groups == 1 and middle:
            return "INT8_ROW"
        size = next((size for size in _SIZES if runs(groups, in_, size) is not None), 0)
        exact = torch.equal(groups.scales.half().float(), groups.scales)
        if not size or not exact or (matrix.bits == 8 and not middle):
            return FEW_BITS
        kind = "INT8" if matrix.bits == 8 else "INT4" if matrix.bits == 4 and middle else "INT4_ZERO"
        return f"{kind}/{size}"

    def drop_empty_biases(self, wanted: Container[str]) -> None:
        """Forget biases that the model does not have: old GPTQ files hold zeros for all."""
        infos = dict(self.infos)
        for name in self._matrices:
            bias = f"{name.removesuffix('.weight')}.bias"
            if bias in infos and bias not in wanted and not bool(self._base.load(bias).any()):
                del infos[bias]
        self.infos = infos

    def load(self, name: str) -> Tensor:
        matrix = self._matrices.get(name)
        if matrix is None:
            return self._base.load(name)
        if isinstance(matrix, Blocks):
            return dequantised_blocks(matrix, self._base)
        groups = self._format.groups(matrix, self._base)
        return dequantised(self._format.codes(matrix, self._base), groups, matrix.bits)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        matrix = self._matrices.get(name)
        if matrix is None:
            return self._base.raw(name)
        dtype = self.infos[name].dtype
        assert isinstance(matrix, Matrix) and dtype != FEW_BITS
        groups = self._format.groups(matrix, self._base)
        parts = [self._format.codes(matrix, self._base)]
        if dtype == "INT8_ROW":
            parts.append(groups.scales.view(torch.uint8))
        else:
            kind, _, size = dtype.partition("/")
            order = runs(groups, matrix.shape[1], int(size))
            assert order is not None
            parts.append(groups.scales.half()[:, order].view(torch.uint8))
            if kind == "INT4_ZERO":
                middle = torch.full_like(groups.scales, 1 << (matrix.bits - 1))
                zeros = middle if groups.zeros is None else groups.zeros
                parts.append(zeros.half()[:, order].view(torch.uint8))
        whole: npt.NDArray[np.uint8] = torch.cat(parts, 1).flatten().numpy()
        return whole

    def forget(self) -> None:
        self._base.forget()

    def state(self) -> dict[str, tuple[int, ...]]:
        return self._base.state()

    def close(self) -> None:
        """Leave the source below open: whoever opened it closes it."""

    def __enter__(self) -> QuantisedSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""GGUF as a source of tensors: dense kinds as they are, block kinds dequantised to float32."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from hanlin.checkpoints.base import DTYPES, FileSource, fail, shown
from hanlin.checkpoints.blocks import dequantize
from hanlin.checkpoints.gguf_header import read_header
from hanlin.checkpoints.stored import StoredFile

__all__ = ["GgufFile"]


class GgufFile(FileSource):
    """One `.gguf` file. The 98 MB default model opens in some 50 ms, nearly all of it its vocabulary's strings.

    Raises:
        CheckpointError: see `gguf_header.read_header`; or the file is one part of several.
    """

    def __init__(self, file: StoredFile) -> None:
        header = read_header(file)
        parts = header.metadata.get("split.count", 1)
        if parts != 1:
            fail(
                file.path,
                [f"this is one of {shown(parts)} parts of a split model"],
                f"Merge them: llama-gguf-split --merge {file.path.name} merged.gguf",
            )
        self._offsets = header.offsets
        super().__init__(file, header.metadata, header.infos)

    def load(self, name: str) -> torch.Tensor:
        info = self._info(name)
        offset = self._offsets[name]
        if info.dtype in DTYPES:
            return self._dense(offset, info.shape, info.dtype)
        stored = np.empty(info.nbytes, dtype=np.uint8)
        self._file.read_into(offset, stored.data)
        return dequantize(info.dtype, stored, info.shape)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        return self._file.view(self._offsets[self._info(name).name], self.infos[name].nbytes)

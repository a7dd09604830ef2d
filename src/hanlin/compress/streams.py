"""Hidden states of all windows on disk, so that a model is walked through layer by layer in little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hanlin.errors import CapacityError

__all__ = ["Stream"]


class Stream:
    """Windows (count, length) of hidden states (length, width), float32, before a layer and after it.

    A layer reads one file and writes the other, so that what is broken off can begin again with that layer.
    """

    def __init__(self, directory: Path, name: str, ids: NDArray[np.int64], width: int) -> None:
        self._paths = [directory / f"{name}-{side}.f32" for side in range(2)]
        self.ids, self._shape = ids, (*ids.shape, width)

    def begin(self, embed: Callable[[Tensor], Tensor]) -> None:
        """Fill what comes before layer 0."""
        target = self._open(0, "w+")
        for row, ids in enumerate(self.ids):
            target[row] = embed(torch.from_numpy(ids)).numpy()
        target.flush()

    def windows(self, layer: int) -> Iterator[Tensor]:
        """The states (length, width) before a layer, window by window."""
        source = self._open(layer % 2, "r")
        for row in range(len(source)):
            yield torch.from_numpy(np.array(source[row]))

    def through(self, layer: int, run: Callable[[Tensor], Tensor]) -> None:
        """Take all windows through a layer."""
        target = self._open((layer + 1) % 2, "w+")
        for row, x in enumerate(self.windows(layer)):
            target[row] = run(x).numpy()
        target.flush()

    def _open(self, side: int, mode: Literal["r", "w+"]) -> np.memmap[Any, np.dtype[np.float32]]:
        try:
            opened = np.memmap(self._paths[side], np.float32, mode, shape=self._shape)
        except OSError as error:
            size = np.prod(self._shape) * 8
            raise CapacityError(f"{self._paths[side].parent}: {error.strerror}; needed are {size:,} bytes") from error
        return opened

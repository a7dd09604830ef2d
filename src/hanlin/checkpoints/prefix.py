"""P-Tuning v2 checkpoints: a soft prefix in a directory of its own, laid over the model's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hanlin.checkpoints.base import TensorInfo, TensorSource, fail
from hanlin.checkpoints.source import open_source

__all__ = ["PREFIX", "OverlaidSource", "open_prefix"]

# What the released tuning scripts call the encoder's tensors; its state dictionary by itself has no prefix.
PREFIX = "transformer.prefix_encoder."
_NAMES = ("embedding.weight", "trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")


class OverlaidSource:
    """A model's files, with the tensors of a soft prefix from other files in place of their own."""

    def __init__(self, base: TensorSource, top: TensorSource, names: Mapping[str, str]) -> None:
        """`names` gives for each of the top's tensors, by the name that the model knows, the stored one."""
        self.path, self.metadata = base.path, base.metadata
        self._base, self._top, self._names = base, top, dict(names)
        kept = {name: info for name, info in base.infos.items() if not name.startswith(PREFIX)}
        self.infos: Mapping[str, TensorInfo] = kept | {name: top.infos[own] for name, own in names.items()}

    def values(self) -> dict[str, Any]:
        """The keys of `config.json` that the prefix decides."""
        rows = self.infos[f"{PREFIX}embedding.weight"].shape[0]
        return {"pre_seq_len": rows, "prefix_projection": f"{PREFIX}trans.0.weight" in self._names}

    def load(self, name: str) -> torch.Tensor:
        return self._top.load(self._names[name]) if name in self._names else self._base.load(name)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        return self._top.raw(self._names[name]) if name in self._names else self._base.raw(name)

    def forget(self) -> None:
        self._base.forget()
        self._top.forget()

    def state(self) -> dict[str, tuple[int, ...]]:
        """Of the model's files: nothing of the prefix is ever packed."""
        return self._base.state()

    def close(self) -> None:
        self._top.close()
        self._base.close()

    def __enter__(self) -> OverlaidSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_prefix(base: TensorSource, path: Path) -> OverlaidSource:
    """Lay the soft prefix at `path`, a directory of the tuning scripts or its `pytorch_model.bin`, over `base`.

    A checkpoint of the whole tuned model may stand there too; only its prefix is taken.

    Raises:
        CheckpointError: no soft prefix there, or a part of one.
    """
    top = open_source(path)
    try:
        stored = {name.removeprefix(PREFIX): name for name in top.infos}
        found = {f"{PREFIX}{name}": stored[name] for name in _NAMES if name in stored}
        missing = [name for name in _NAMES if f"{PREFIX}{name}" not in found]
        shape = top.infos[found[f"{PREFIX}embedding.weight"]].shape if _NAMES[0] not in missing else ()
        if (missing and missing != [*_NAMES[1:]]) or len(shape) != 2 or not shape[0]:
            wrong = [f"missing tensor '{PREFIX}{name}'" for name in missing]
            wrong += [f"'{PREFIX}{_NAMES[0]}' has shape {shape}, it must be (length, width)"] if not missing else []
            fail(path, wrong, "Give the directory that P-Tuning v2 wrote, such as output/adgen/checkpoint-3000.")
        return OverlaidSource(base, top, found)
    except BaseException:
        top.close()
        raise

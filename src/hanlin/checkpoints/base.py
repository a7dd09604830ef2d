"""What every reader of weights shares: the description of a tensor, the protocol, and how problems are told."""

from __future__ import annotations

import json
import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt
import torch

from hanlin.checkpoints.stored import StoredFile
from hanlin.errors import CheckpointError, problems

__all__ = [
    "DTYPES",
    "MAX_TENSORS",
    "FileSource",
    "TensorInfo",
    "TensorSource",
    "Without",
    "countable",
    "fail",
    "parse_json",
    "shown",
]

# A file with more tensors than any model has is an attack on memory: Python needs about 1 KB to describe one.
MAX_TENSORS = 1 << 18

_SHOWN_PROBLEMS = 20
_SHOWN_LETTERS = 100

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
        "C64": torch.complex64,
    }
)


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor.

    Attributes:
        shape: in torch's order (rows, columns).
        dtype: as stored: "F32", "BF16", "I8"..., or the name of a GGUF block kind, "Q4_1", "Q6_K"...
        nbytes: of the stored form.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path


class TensorSource(Protocol):
    """Weights on disk, by name. A context manager; closing frees the files, not the tensors made from them.

    Attributes:
        path: the file or directory that was opened.
        metadata: safetensors' `__metadata__`, GGUF's key-values as plain Python values, a `.bin`'s other leaves.
        infos: every tensor, in the file's order.
    """

    @property
    def path(self) -> Path: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def load(self, name: str) -> torch.Tensor:
        """A fresh tensor in memory of its own: in its stored dtype, or float32 for a block kind.

        Raises:
            CheckpointError: there is no such tensor, or the file can no longer be read.
        """

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The stored bytes (nbytes,), read-only, mapped from the file without a copy where they lie in one piece.

        Raises:
            CheckpointError: there is no such tensor, or the file can no longer be mapped.
        """

    def forget(self) -> None:
        """Give back the memory of what was read by `raw` so far; views stay valid, and take memory again when used."""

    def state(self) -> dict[str, tuple[int, ...]]:
        """For each of the files that are open, by its path, what changes when its content does."""

    def close(self) -> None: ...
    def __enter__(self) -> TensorSource: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class FileSource(ABC):
    """The part of a `TensorSource` that is the same for every single-file format."""

    def __init__(self, file: StoredFile, metadata: Mapping[str, Any], infos: Iterable[TensorInfo]) -> None:
        self._file = file
        self.path = file.path
        self.metadata: Mapping[str, Any] = MappingProxyType(dict(metadata))
        self.infos: Mapping[str, TensorInfo] = MappingProxyType({info.name: info for info in infos})

    def forget(self) -> None:
        self._file.forget()

    def state(self) -> dict[str, tuple[int, ...]]:
        return self._file.state()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> FileSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def load(self, name: str) -> torch.Tensor: ...

    @abstractmethod
    def raw(self, name: str) -> npt.NDArray[np.uint8]: ...

    def _info(self, name: str) -> TensorInfo:
        if name not in self.infos:
            raise CheckpointError(f"{self.path}: there is no tensor {shown(name)} among its {len(self.infos)}")
        return self.infos[name]

    def _dense(self, offset: int, shape: Sequence[int], dtype: str) -> torch.Tensor:
        """Read a contiguous tensor that starts at byte `offset`."""
        stored = DTYPES[dtype]
        data = torch.empty(math.prod(shape) * stored.itemsize, dtype=torch.uint8)
        self._file.read_into(offset, data.numpy().data)
        # Any byte may stand in a damaged file, and torch leaves a bool that is neither 0 nor 1 undefined.
        typed = data != 0 if stored is torch.bool else data.view(stored)
        return typed.reshape(tuple(shape))


class Without:
    """A source that is described as if it lacked some tensors."""

    def __init__(self, source: TensorSource, names: Iterable[str]) -> None:
        self._source = source
        self.infos = {name: info for name, info in source.infos.items() if name not in set(names)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def shown(value: object) -> str:
    """`repr`, cut short in every direction: what a hostile file holds must not flood or break the message."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = _SHOWN_LETTERS
    short.maxlist = short.maxtuple = 8
    return short.repr(value)


def countable(shape: Sequence[int]) -> bool:
    """Whether torch can count the elements in 64 bits. It counts even those beside a dimension of zero."""
    return math.prod(max(1, size) for size in shape) < 1 << 63


def fail(path: Path, found: Sequence[str], remedy: str = "") -> NoReturn:
    """Raise one CheckpointError with everything that is wrong in `path`, at most twenty items spelt out."""
    items = list(found[:_SHOWN_PROBLEMS])
    if len(found) > len(items):
        items.append(f"and {len(found) - len(items):,} more")
    raise CheckpointError(problems(str(path), items, remedy))


def parse_json(raw: bytes, path: Path, what: str, max_values: int) -> Any:
    """Strict JSON in UTF-8: no duplicate keys, no more than about `max_values` values.

    Raises:
        CheckpointError: anything else.
    """
    # Counted before parsing, because Python spends up to 70 bytes on what takes three in the file.
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > max_values:
        raise CheckpointError(f"{path}: {what} holds more than {max_values:,} values")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {what} is not valid JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} stands twice")
    return result

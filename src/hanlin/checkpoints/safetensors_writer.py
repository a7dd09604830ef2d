"""Write tensors as safetensors, shard by shard, so that a reader sees either the old weights or the new ones."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hanlin.checkpoints.base import DTYPES, shown
from hanlin.checkpoints.staging import PieceFile
from hanlin.errors import CheckpointError, ConfigError

__all__ = ["save_resumably", "save_safetensors"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_safetensors(
    directory: str | Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    max_shard_bytes: int = 2 << 30,
    metadata: Mapping[str, str] | None = None,
    stem: str = "model",
) -> list[Path]:
    """Write `{stem}.safetensors`, or shards and their index when there is more than `max_shard_bytes`.

    Holds no more than one shard's tensors at a time, beside the one that comes next. Everything is written beside its
    place and moved there at the end; older weights of the same stem then go. A failure leaves `directory` as it was.

    Returns:
        The files of weights, in order.

    Raises:
        CheckpointError: a name given twice, a tensor that can't be stored, or the disk is full or not writable.
    """
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes must be >= 1, not {max_shard_bytes}")
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as staging:
            weight_map, total = _write_shards(Path(staging), tensors, max_shard_bytes, dict(metadata or {}))
            return _publish(Path(staging), directory, stem, weight_map, total)
    except OSError as error:
        free = f" {shutil.disk_usage(directory).free:,} bytes are free there." if directory.is_dir() else ""
        raise CheckpointError(
            f"{directory}: the weights could not be written: {error.strerror or error}.{free} Nothing was changed."
        ) from error


def save_resumably(
    directory: Path,
    names: Sequence[str],
    load: Callable[[str], torch.Tensor],
    *,
    parts: Path,
    max_shard_bytes: int = 2 << 30,
    written: Callable[[int], None] = lambda nbytes: None,
) -> list[Path]:
    """The same from a function, resumable: finished shards stay in `parts`, and are used again where they are whole.

    Args:
        load: gives a tensor by name; not asked for those that are there.
        parts: a directory for nothing else, with shards of the same tensors from an earlier call, or none.
        written: called with the bytes of each tensor that is stored, or was.

    Raises:
        CheckpointError: a tensor that can't be stored.
        OSError: the disk is full or not writable.
    """
    directory.mkdir(parents=True, exist_ok=True)
    parts.mkdir(parents=True, exist_ok=True)
    shards, total = _kept_shards(parts, names)
    written(total)
    rest = names[sum(map(len, shards)) :]

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in rest:
            value = load(name)
            yield name, value
            written(value.nbytes)

    if rest or not shards:
        shards, more = _write_shards(parts, tensors(), max_shard_bytes, {}, shards)
        total += more
    for left in parts.glob("*.*"):
        left.unlink()
    return _publish(parts, directory, "model", shards, total)


def _kept_shards(parts: Path, names: Sequence[str]) -> tuple[list[list[str]], int]:
    """The names in each shard that is whole, and the bytes of all; what follows the first other one is removed."""
    shards: list[list[str]] = []
    total = start = 0
    while (path := parts / str(len(shards))).is_file():
        file = PieceFile(path)
        file.close()
        held, nbytes = file.notes[0] if file.notes else ([], 0)
        if not held or held != list(names[start : start + len(held)]):
            break
        shards.append(held)
        start, total = start + len(held), total + nbytes
    for path in parts.iterdir():
        number = path.name.partition(".")[0]
        if not number.isdecimal() or int(number) >= len(shards):
            path.unlink()
    return shards, total


def _write_shards(
    staging: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    max_shard_bytes: int,
    metadata: dict[str, str],
    earlier: Sequence[list[str]] = (),
) -> tuple[list[list[str]], int]:
    """The names in each shard, written as `0`, `1`..., and the bytes of all; `earlier` ones are there already."""
    shards: list[list[str]] = list(earlier)
    seen = {name for shard in shards for name in shard}
    pending: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        _write_shard(staging / str(len(shards)), pending, metadata)
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        _check(name, tensor, seen)
        seen.add(name)
        if pending and size + tensor.nbytes > max_shard_bytes:
            flush()
            size = 0
        pending[name] = tensor.detach()
        size += tensor.nbytes
        total += tensor.nbytes
    if pending or not shards:
        flush()
    return shards, total


def _check(name: str, tensor: torch.Tensor, seen: set[str]) -> None:
    wrong = None
    if name in seen:
        wrong = "is given twice"
    elif name == "__metadata__":
        wrong = "has the name that the format keeps for itself"
    elif tensor.is_meta or tensor.layout is not torch.strided or tensor.dtype not in _NAMES:
        wrong = f"can't be stored: {tensor.dtype}, {tensor.layout}, on {tensor.device}"
    if wrong:
        raise CheckpointError(f"tensor {shown(name)} {wrong}")


def _write_shard(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    # Wide elements first: every tensor then starts at a multiple of its element's size, without holes.
    in_file = sorted(tensors, key=lambda name: -tensors[name].element_size())
    ends: dict[str, int] = {}
    end = 0
    for name in in_file:
        end += tensors[name].nbytes
        ends[name] = end
    # Transformers refuses files that do not say which framework they are for.
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | metadata}
    for name, tensor in tensors.items():
        offsets = [ends[name] - tensor.nbytes, ends[name]]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterator[Any]:
        yield len(text).to_bytes(8, "little") + text
        for name in in_file:
            yield tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    file = PieceFile(path)
    try:
        file.write(pieces(), [list(tensors), end])
    finally:
        file.close()


def _publish(staging: Path, directory: Path, stem: str, shards: list[list[str]], total: int) -> list[Path]:
    """Move the shards to their names, their index last, and remove what is left of older weights."""
    count = len(shards)
    names = [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    names = names if count > 1 else [f"{stem}.safetensors"]
    index = f"{stem}.safetensors.index.json"
    if count > 1:
        weight_map = {name: shard for shard, held in zip(names, shards, strict=True) for name in held}
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (staging / index).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for number, name in enumerate(names):
        (staging / str(number)).replace(directory / name)
    if count > 1:
        (staging / index).replace(directory / index)
    kept = {*names, index} if count > 1 else {*names}
    for old in (directory / f"{stem}.safetensors", directory / index, *directory.glob(f"{stem}-*-of-*.safetensors")):
        if old.name not in kept:
            old.unlink(missing_ok=True)
    return [directory / name for name in names]

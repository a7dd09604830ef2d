"""Find the weights at a path and open them, whatever their format."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hanlin.checkpoints.base import MAX_TENSORS, FileSource, TensorInfo, TensorSource, fail, parse_json, shown
from hanlin.checkpoints.bin_file import BinFile
from hanlin.checkpoints.gguf_file import GgufFile
from hanlin.checkpoints.internevo import InternEvoSource, is_internevo
from hanlin.checkpoints.safetensors_file import MAX_HEADER, SafetensorsFile
from hanlin.checkpoints.stored import StoredFile
from hanlin.errors import CheckpointError, ModelNotFoundError, UnsafeCheckpointError, problems

__all__ = ["ShardedSource", "TensorInfo", "TensorSource", "open_source"]

_FETCH_INDEX = "Fetch the index again."
_BIN_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# Training programs leave pickles of other things in .bin files beside the weights, so those go by name.
_LAYOUTS = (
    ("model", ".safetensors", r".*\.safetensors"),
    ("pytorch_model", ".bin", r"(pytorch_model|adapter_model).*\.bin"),
)
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)")


def open_source(path: str | Path) -> TensorSource:
    """Open the weights at `path`: a file, or a directory as Hugging Face and ModelScope lay it out.

    In a directory, in this order: `model.safetensors`, its index with shards, any other `.safetensors`;
    `pytorch_model.bin`, its index with shards, other PyTorch weights; a training checkpoint of InternEvo; a single
    `.gguf`. Nothing but weights and their index is ever opened.

    Raises:
        ModelNotFoundError: there is nothing at `path`.
        UnsafeCheckpointError: a pickle wants to call something.
        CheckpointError: no weights there, or broken ones; everything wrong at once.
    """
    path = Path(path)
    try:
        found = path.is_dir() or path.exists() or path.is_symlink()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be looked at: {error}") from None
    if not found:
        raise ModelNotFoundError(f"{path}: there is no such file or directory")
    return _open_directory(path) if path.is_dir() else _open_file(path)


def _open_file(path: Path) -> FileSource:
    file = StoredFile(path)
    try:
        return _reader(file)(file)
    except BaseException:
        file.close()
        raise


def _reader(file: StoredFile) -> Callable[[StoredFile], FileSource]:
    """By suffix, or else by content: files in caches may be named after their hash."""
    suffix = file.path.suffix.lower()
    if suffix == ".gguf" or file.start.startswith(b"GGUF"):
        return GgufFile
    if suffix == ".safetensors" or file.start[8:9] == b"{":
        return SafetensorsFile
    if suffix in _BIN_SUFFIXES or file.start.startswith(b"PK"):
        return BinFile
    fail(
        file.path,
        [f"starts with {shown(file.start[:8])}, which is no format of weights that is known here"],
        f"Known: .safetensors, .gguf, {', '.join(_BIN_SUFFIXES)}.",
    )


def _open_directory(directory: Path) -> TensorSource:
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be listed: {error.strerror or error}") from None
    for stem, suffix, pattern in _LAYOUTS:
        if f"{stem}{suffix}" in names:
            return _open_file(directory / f"{stem}{suffix}")
        if f"{stem}{suffix}.index.json" in names:
            return _open_index(directory / f"{stem}{suffix}.index.json", suffix)
        loose = [name for name in names if re.fullmatch(pattern, name)]
        if loose:
            _check_parts(directory, loose)
            return _open_shards(directory, [directory / name for name in loose])
    if is_internevo(names):
        return InternEvoSource(directory)
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if len(ggufs) == 1:
        return _open_file(directory / ggufs[0])
    if ggufs:
        fail(directory, [f"holds several GGUF files: {', '.join(ggufs)}"], "Name one of them.")
    held = f"Found there: {', '.join(names[:20])}{'...' if len(names) > 20 else ''}." if names else "It is empty."
    fail(directory, ["no weights: no .safetensors, pytorch_model.bin, model_tp0_pp0.pt or .gguf"], held)


def _check_parts(directory: Path, names: Iterable[str]) -> None:
    """Without an index, the shards' own names say how many there are."""
    names = set(names)
    missing = []
    for stem, count, suffix in {(part[1], part[3], part[4]) for part in map(_PART.fullmatch, names) if part}:
        wanted = (f"{stem}-{number:05}-of-{count}{suffix}" for number in range(1, int(count) + 1))
        missing += [f"missing shard {name}" for name in wanted if name not in names]
    if missing:
        fail(directory, sorted(missing), "Fetch the missing files.")


def _open_index(index: Path, suffix: str) -> ShardedSource:
    directory = index.parent
    weight_map = _read_index(index)
    shards = sorted(set(weight_map.values()))
    unsafe = [name for name in shards if not _plain(name, suffix)]
    if unsafe:
        fail(index, [f"{shown(name)} is not a plain name of a {suffix} file" for name in unsafe], _FETCH_INDEX)
    missing = [name for name in shards if not (directory / name).exists()]
    if missing:
        broken = {name for name in missing if (directory / name).is_symlink()}
        fail(
            index,
            [f"missing shard {name}{', a link that leads nowhere' if name in broken else ''}" for name in missing],
            f"{len(missing)} of {len(shards)} files are not there. Fetch them.",
        )
    return _open_shards(index, [directory / name for name in shards], weight_map)


def _read_index(index: Path) -> dict[str, str]:
    file = StoredFile(index)
    try:
        if file.size > MAX_HEADER:
            fail(index, [f"{file.size:,} bytes; an index has at most {MAX_HEADER:,}"])
        content = parse_json(file.read(0, file.size), index, "the index", max_values=16 * MAX_TENSORS)
    finally:
        file.close()
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        fail(index, ["'weight_map' must map names of tensors to names of files"], _FETCH_INDEX)
    if not weight_map:
        fail(index, ["'weight_map' is empty"], _FETCH_INDEX)
    return weight_map


def _plain(name: str, suffix: str) -> bool:
    """A name that can't lead out of the directory on any system. The file itself may be a link, as in caches."""
    same = PurePosixPath(name).name == name == PureWindowsPath(name).name
    return same and name.endswith(suffix) and name != suffix and name.isprintable()


def _open_shards(path: Path, files: list[Path], weight_map: Mapping[str, str] | None = None) -> ShardedSource:
    sources: list[FileSource] = []
    broken: list[CheckpointError] = []
    with ExitStack() as opened:
        for file in files:
            try:
                sources.append(opened.enter_context(_open_file(file)))
            except CheckpointError as error:
                broken.append(error)
        if len(broken) == 1:
            raise broken[0]
        if broken:
            kind = next((type(error) for error in broken if isinstance(error, UnsafeCheckpointError)), CheckpointError)
            raise kind(problems(str(path), [str(error) for error in broken]))
        found = _disagreements(sources, weight_map)
        if found:
            fail(path, found, "Files of different models or versions were mixed. Fetch them again.")
        opened.pop_all()
    return ShardedSource(path, sources)


def _disagreements(sources: list[FileSource], weight_map: Mapping[str, str] | None) -> list[str]:
    found = []
    places: dict[str, str] = {}
    for source in sources:
        for name in source.infos:
            if name in places:
                found.append(f"tensor {shown(name)} is in {places[name]} and in {source.path.name}")
            places[name] = source.path.name
    for name, shard in (weight_map or {}).items():
        if name not in places:
            found.append(f"tensor {shown(name)} is listed, but not in {shard}")
        elif places[name] != shard:
            found.append(f"tensor {shown(name)} is listed in {shard}, but is in {places[name]}")
    return found


class ShardedSource:
    """Several files of one model as one source. Metadata is the first file's that has any."""

    def __init__(self, path: Path, sources: Iterable[FileSource]) -> None:
        self.path = path
        self._sources = tuple(sources)
        self.metadata: Mapping[str, Any] = next(
            (source.metadata for source in self._sources if source.metadata), MappingProxyType({})
        )
        self._owners = {name: source for source in self._sources for name in source.infos}
        self.infos: Mapping[str, TensorInfo] = MappingProxyType(
            {name: source.infos[name] for name, source in self._owners.items()}
        )

    def load(self, name: str) -> torch.Tensor:
        return self._owner(name).load(name)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        return self._owner(name).raw(name)

    def forget(self) -> None:
        for source in self._sources:
            source.forget()

    def state(self) -> dict[str, tuple[int, ...]]:
        return {path: state for source in self._sources for path, state in source.state().items()}

    def close(self) -> None:
        for source in self._sources:
            source.close()

    def __enter__(self) -> ShardedSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _owner(self, name: str) -> FileSource:
        if name not in self._owners:
            raise CheckpointError(f"{self.path}: there is no tensor {shown(name)} among its {len(self.infos)}")
        return self._owners[name]

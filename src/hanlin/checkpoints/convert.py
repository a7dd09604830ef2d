"""Convert a model: every target has a recipe, a writer and a verifier; this chooses one and puts its result in place.

Tensors are split, joined and renamed, and, where the target can say no more, rounded. One is read at a time. The result
is read again and compared before it takes its place.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from hanlin.checkpoints.base import TensorSource
from hanlin.checkpoints.convert_directory import DirectoryTarget
from hanlin.checkpoints.converted_config import converted_config
from hanlin.checkpoints.description import describe_directory, read_json
from hanlin.checkpoints.source import open_source
from hanlin.checkpoints.weights import Weights
from hanlin.errors import CheckpointError, ConfigError

__all__ = ["FORMATS", "Progress", "Target", "convert"]

Progress = Callable[[int, int], None]

FORMATS = ("hf", "llama", "internlm2")
_FAMILIES = ("internlm2", "llama")


class Target(Protocol):
    """What a model is converted to: made of the open source (the recipe), it writes and verifies."""

    def write(self, path: Path, progress: Progress) -> None:
        """Write the result at `path`, a file or a directory that is not there yet."""

    def compare(self, path: Path, progress: Progress) -> None:
        """Read the result at `path` again and raise CheckpointError unless it is what was meant."""


def convert(
    source: Path, target: Path, *, to: str, vocab_size: int | None = None, progress: Progress | None = None
) -> Path:
    """Write the model `source` as the new `target`, whole or not at all.

    Args:
        to: one of `FORMATS`; "hf" is the layout that it has.
        vocab_size: keep so many rows of the embedding and the head; None keeps them all.
        progress: called with (bytes done, bytes in all), writing and comparing.

    Raises:
        ConfigError: a family or a configuration that the other layout can't say.
        CheckpointError: broken files, `target` exists, rows that do not fit the configuration, a full disk, or a
            result that is not what was meant; `target` is then not there.
    """
    if to not in FORMATS:
        raise ConfigError(f"can't convert to {to!r}; known: {', '.join(FORMATS)}")
    if os.path.lexists(target):
        raise CheckpointError(f"{target}: exists already. Name a new directory, or remove it first.")
    if not source.is_dir():
        raise CheckpointError(f"{source}: not a model directory. A GGUF file can't be converted yet.")
    _check_dense(source)
    with open_source(source) as stored:
        _put(_target(source, stored, to, vocab_size), target, progress or (lambda done, total: None))
    return target


def _check_dense(source: Path) -> None:
    said = read_json(source / "config.json")
    if said.get("quantization_config") or (source / "quantize_config.json").is_file():
        raise ConfigError(f"{source}: its weights are quantised. Convert the original, and quantise the result.")


def _target(source: Path, stored: TensorSource, to: str, vocab_size: int | None) -> Target:
    """The recipe: what `to` makes of the open model."""
    values = describe_directory(source).values
    family = str(values.get("model_type"))
    if family not in _FAMILIES:
        raise ConfigError(f"{source}: can't convert {family!r}; known: {', '.join(_FAMILIES)}.")
    weights = Weights.open(stored, values, vocab_size)
    result = converted_config(values, weights.config, family if to == "hf" else to, source)
    return DirectoryTarget(weights, result, beside=source)


def _put(made: Target, target: Path, progress: Progress) -> None:
    """Write beside `target`, compare, and move into place."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as staging:
            whole = Path(staging) / target.name
            made.write(whole, progress)
            made.compare(whole, progress)
            whole.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target}: could not be written: {error.strerror or error}.") from error

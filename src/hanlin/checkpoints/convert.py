"""Convert a model: every target has a recipe, a writer and a verifier; this chooses one and puts its result in place.

Tensors are split, joined and renamed, and, where the target can say no more, rounded. One is read at a time. The result
is read again and compared before it takes its place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hanlin.checkpoints.base import TensorSource, Without
from hanlin.checkpoints.convert_directory import DirectoryTarget
from hanlin.checkpoints.convert_gguf import GgufTarget
from hanlin.checkpoints.convert_internevo import InternEvoTarget
from hanlin.checkpoints.converted_config import converted_config, gguf_config
from hanlin.checkpoints.description import Description, describe_directory, describe_gguf
from hanlin.checkpoints.lent_tokenizer import tokenizer_files
from hanlin.checkpoints.narrow import Narrow, Narrowed
from hanlin.checkpoints.source import open_source
from hanlin.checkpoints.staging import staged
from hanlin.checkpoints.weights import Weights
from hanlin.errors import CheckpointError, ConfigError
from hanlin.models.registry import family_name

__all__ = ["FORMATS", "OUTTYPES", "Progress", "Target", "convert"]

Progress = Callable[[int, int], None]

FORMATS = ("hf", "llama", "internlm2", "gguf", "internevo")
OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1")
_FAMILIES = ("internlm2", "llama", "internlm")


class Target(Protocol):
    """What a model is converted to: made of the open source (the recipe), it writes and verifies."""

    def write(self, path: Path, progress: Progress) -> None:
        """Write the result at `path`, a file or a directory; what an interrupted call left there is still there."""

    def compare(self, path: Path, progress: Progress) -> None:
        """Read the result at `path` again and raise CheckpointError unless it is what was meant."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is wanted of a conversion, beside the place.

    Attributes:
        to: one of `FORMATS`; "hf" is the layout that the model has.
        vocab_size: keep so many rows of the embedding and the head; None keeps them all.
        outtype: one of `OUTTYPES`, what the result's matrices are stored in; only GGUF files have block kinds.
        tokenizer: the `tokenizer.*` key-values of a GGUF file to be.
        files: by name, what stands beside the weights that come out of a GGUF file.
        lent: a file or a directory with the tokenizer, for weights that have none beside them.
        tp, pp, adapt_hf: see `InternEvoTarget`.
    """

    to: str
    vocab_size: int | None = None
    outtype: str = "auto"
    tokenizer: Mapping[str, Any] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    lent: Path | None = None
    tp: int = 1
    pp: int = 1
    adapt_hf: bool = True


def convert(source: Path, target: Path, *, progress: Progress | None = None, **wanted: Any) -> Path:
    """Write the model `source`, a directory or a GGUF file, as the new `target`, whole or not at all.

    Interrupted, the same call goes on where it stopped.

    Args:
        progress: called with (bytes done, bytes in all), writing and comparing.
        wanted: the attributes of `Wanted`.

    Raises:
        ConfigError: a family or a configuration that the other layout can't say.
        CheckpointError: broken files, `target` exists, rows that do not fit the configuration, a full disk, or a
            result that is not what was meant; `target` is then not there.
    """
    asked = Wanted(**wanted)
    if asked.to not in FORMATS:
        raise ConfigError(f"can't convert to {asked.to!r}; known: {', '.join(FORMATS)}")
    if asked.outtype not in OUTTYPES:
        raise ConfigError(f"outtype {asked.outtype!r} is not known; known: {', '.join(OUTTYPES)}")
    if asked.to != "internevo" and (asked.tp, asked.pp, asked.adapt_hf) != (1, 1, True):
        raise ConfigError(f"--tp, --pp and --no-adapt-hf are for --to internevo, not for --to {asked.to}")
    if os.path.lexists(target):
        raise CheckpointError(f"{target}: exists already. Choose another name, or remove it first.")
    with open_source(source) as stored:
        others = [_others(path) for path in (source, asked.lent) if path is not None and path.is_dir()]
        plan: dict[str, Any] = {"hanlin": version("hanlin"), "source": stored.state(), "others": others}
        plan |= {**vars(asked), "tokenizer": None, "files": None}
        _put(_target(source, stored, asked), target, plan, progress or (lambda done, total: None))
    return target


def _others(directory: Path) -> list[tuple[str, int, int]]:
    """What tells that a file beside the weights has changed."""
    files = [(file, file.stat()) for file in sorted(directory.iterdir()) if file.is_file()]
    return [(str(file.resolve()), about.st_size, about.st_mtime_ns) for file, about in files]


def _target(source: Path, stored: TensorSource, asked: Wanted) -> Target:
    """The recipe: what is made of the open model."""
    gguf = not source.is_dir()
    description = describe_gguf(stored) if gguf else describe_directory(source)
    if description.quantisation is not None:
        raise ConfigError(f"{source}: its weights are quantised. Convert the original, and quantise the result.")
    if asked.to == "gguf":
        return _to_gguf(source, stored, description, asked)
    return _from_gguf(source, stored, description, asked) if gguf else _to_directory(source, stored, description, asked)


def _to_directory(source: Path, stored: TensorSource, description: Description, asked: Wanted) -> Target:
    family = str(description.values.get("model_type"))
    if family not in _FAMILIES:
        raise ConfigError(f"{source}: can't convert {family!r} to {asked.to}; known: {', '.join(_FAMILIES)}.")
    if asked.outtype != "auto":
        raise ConfigError("--outtype is for GGUF files; a directory keeps what its tensors are stored in")
    weights = Weights.open(stored, description.values, asked.vocab_size)
    layout = family if asked.to == "hf" else asked.to
    if asked.to == "internevo":
        layout = family if family == "internlm" else "internlm2"
    result = converted_config(description.values, weights.config, layout, source)
    lent = asked.lent
    beside = lent if lent is not None and lent.is_dir() else source
    files = {} if lent is None or lent.is_dir() else tokenizer_files(lent, layout)
    if asked.to == "internevo":
        cut: dict[str, Any] = {"tp": asked.tp, "pp": asked.pp, "adapt_hf": asked.adapt_hf}
        return InternEvoTarget(weights, result, beside=beside, files=files, **cut)
    return DirectoryTarget(weights, result, beside=beside, files=files)


def _to_gguf(source: Path, stored: TensorSource, description: Description, asked: Wanted) -> Target:
    if not source.is_dir():
        raise ConfigError(f"{source}: is a GGUF file already. Convert --to hf first to write it in another kind.")
    if asked.tokenizer is None:
        raise ConfigError(f"{source}: a GGUF file holds the tokenizer, and none was given")
    weights = Weights.open(stored, description.values, asked.vocab_size)
    tokenizer = dict(asked.tokenizer)
    if description.template:
        tokenizer["tokenizer.chat_template"] = description.template
    return GgufTarget(weights, tokenizer, asked.outtype, description.name)


def _from_gguf(source: Path, stored: TensorSource, description: Description, asked: Wanted) -> Target:
    family = str(family_name(description.values))
    if asked.to == "internevo":
        raise ConfigError(f"{source}: convert the GGUF file --to hf first, and the result --to internevo.")
    if asked.to != "hf" and family not in _FAMILIES:
        raise ConfigError(f"{source}: can't convert {family!r} to {asked.to}, only to hf and gguf.")
    narrow, values = Narrow.choose(stored, asked.outtype), dict(description.values)
    if _needless_head(stored):
        stored, values["tie_word_embeddings"] = Without(stored, ("output.weight",)), True
    opened = Weights.open(stored, values, asked.vocab_size, gguf=True, permuted=description.permuted)
    weights = Narrowed(**vars(opened), narrow=narrow)
    if asked.to not in ("hf", family):
        values = converted_config(values, weights.config, asked.to, source)
    values = gguf_config(values, weights.config.vocab_size, narrow.named, stored.metadata)
    ends = {key: stored.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "eom")}
    stops = [i for key, i in ends.items() if key != "bos" and i is not None]
    generation = {"bos_token_id": ends["bos"], "eos_token_id": list(dict.fromkeys(stops))}
    generation = {key: value for key, value in generation.items() if value not in (None, [])}
    files = {**asked.files, "generation_config.json": json.dumps(generation, indent=2).encode() + b"\n"}
    return DirectoryTarget(weights, values, files=files)


def _needless_head(stored: TensorSource) -> bool:
    """Whether a file's head was written for llama.cpp's sake only, and is the embedding still."""
    embedding, head = (stored.infos.get(f"{name}.weight") for name in ("token_embd", "output"))
    if stored.metadata.get("hanlin.tied") is not True or not embedding or not head or embedding.dtype != head.dtype:
        return False
    same = bool(np.array_equal(stored.raw(embedding.name), stored.raw(head.name)))
    stored.forget()
    return same


def _put(made: Target, target: Path, plan: Mapping[str, Any], progress: Progress) -> None:
    """Write beside `target`, compare, and move into place."""
    with staged(target, plan) as staging:
        if not staging.written:
            made.write(staging.whole, progress)
            staging.set_written()
        made.compare(staging.whole, progress)
        staging.publish(target)

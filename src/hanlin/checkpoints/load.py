"""The loading pipeline: describe -> build on the meta device -> stream each tensor into its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hanlin.checkpoints.description import Description, describe_directory, describe_gguf
from hanlin.checkpoints.names import IGNORED, Recipe, recipes
from hanlin.checkpoints.source import TensorSource, open_source
from hanlin.errors import CheckpointError, problems
from hanlin.models.config import DecoderConfig
from hanlin.models.registry import build, read_config

__all__ = ["Loaded", "load_model", "load_tensors"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model in memory, and what its files said."""

    model: nn.Module
    config: DecoderConfig
    description: Description
    metadata: dict[str, object]


def load_model(path: Path, *, dtype: torch.dtype, device: torch.device, progress: Progress | None = None) -> Loaded:
    """Load a model directory or a `.gguf` file; peak memory is the weights and one tensor.

    Args:
        progress: called with (bytes done, bytes in all).

    Raises:
        CheckpointError: broken files, and every missing, unexpected or misshapen tensor at once.
        ConfigError: a configuration that would need other mathematics.
    """
    gguf = path.suffix == ".gguf"
    if not gguf and not path.is_dir():
        raise CheckpointError(f"{path}: neither a model directory nor a .gguf file")
    description = None if gguf else describe_directory(path)  # the cheap and common errors come first
    with open_source(path) as source:
        description = description or describe_gguf(source)
        config = read_config(description.values)
        model = build(config, dtype=dtype)
        load_tensors(model, source, description, config, device=device, gguf=gguf, progress=progress)
        return Loaded(model=model, config=config, description=description, metadata=dict(source.metadata))


def load_tensors(
    model: nn.Module,
    source: TensorSource,
    description: Description,
    config: DecoderConfig,
    *,
    device: torch.device,
    gguf: bool,
    progress: Progress | None = None,
) -> None:
    """Fill every parameter of a meta model from `source`."""
    parameters = dict(model.named_parameters())
    wanted = recipes(parameters, config, gguf=gguf, permuted=description.permuted)
    check(parameters, wanted, source, model)
    total = sum(info.nbytes for info in source.infos.values())
    done = 0
    for name, recipe in wanted.items():
        stored = [source.load(part) for part in recipe.sources]
        value = recipe.join(stored)
        place(model, name, value, parameters[name].dtype, device)
        done += sum(source.infos[part].nbytes for part in recipe.sources)
        if progress:
            progress(done, total)
    tie(model, parameters)


def place(model: nn.Module, name: str, value: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Put a tensor where the meta parameter `name` stands, as memory of its own."""
    owner, _, leaf = name.rpartition(".")
    fresh = torch.empty(value.shape, dtype=dtype, device=device)
    fresh.copy_(value)
    setattr(model.get_submodule(owner), leaf, nn.Parameter(fresh, requires_grad=False))


def tie(model: nn.Module, before: dict[str, nn.Parameter]) -> None:
    """Give parameters that were shared on the meta device the one that was loaded."""
    homes = {id(parameter): name for name, parameter in before.items()}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, model.get_parameter(homes[id(parameter)]))


def check(
    parameters: dict[str, nn.Parameter], wanted: dict[str, Recipe], source: TensorSource, model: nn.Module
) -> None:
    """Raises:
    CheckpointError: every tensor that is missing, unexpected or of another shape.
    """
    found = []
    used: set[str] = set()
    for name, recipe in wanted.items():
        used.update(recipe.sources)
        absent = [part for part in recipe.sources if part not in source.infos]
        found += [f"missing tensor '{part}'" for part in absent]
        if absent:
            continue
        shapes = [source.infos[part].shape for part in recipe.sources]
        want = tuple(parameters[name].shape)
        rows = sum(shape[0] for shape in shapes if shape)
        if any(len(shape) != len(want) or shape[1:] != want[1:] for shape in shapes) or rows != want[0]:
            have = " + ".join(map(str, shapes))
            found.append(f"tensor '{' + '.join(recipe.sources)}' has shape {have}, the configuration needs {want}")
        if any(rows % (h or 1) for (rows, *_), h in zip(shapes, recipe.heads, strict=True) if rows):
            found.append(f"tensor '{recipe.sources[0]}' does not divide into heads")
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(parameters)
    found += [
        f"unexpected tensor '{name}' {source.infos[name].shape}"
        for name in source.infos
        if name not in used and name not in shared and not IGNORED.search(name)
    ]
    if found:
        shown, more = found[:40], len(found) - 40
        raise CheckpointError(
            problems(
                str(source.path),
                [*shown, f"... and {more} more"] if more > 0 else shown,
                "The weights and the configuration belong to different models, or the download is incomplete.",
            )
        )

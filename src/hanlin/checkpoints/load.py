"""The loading pipeline: describe -> build on the meta device -> stream each tensor into its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hanlin.checkpoints.description import Description, describe_directory, describe_gguf
from hanlin.checkpoints.merge import MergedSource
from hanlin.checkpoints.names import IGNORED, Recipe, recipes
from hanlin.checkpoints.packed import PackedSource
from hanlin.checkpoints.peft import Base, read_peft
from hanlin.checkpoints.prefix import open_prefix
from hanlin.checkpoints.quantised import QuantisedSource
from hanlin.checkpoints.row_quantised import RowQuantisedSource, is_row_quantised
from hanlin.checkpoints.source import TensorSource, open_source
from hanlin.errors import CheckpointError, problems
from hanlin.models.config import DecoderConfig
from hanlin.models.registry import build, read_config

__all__ = ["Loaded", "Read", "Rows", "Taker", "load_model", "load_tensors"]

Progress = Callable[[int, int], None]


# Parameters this large are read first, while there is still room: what it takes to convert one comes on top.
_LARGE = 1 << 28


class Rows(NamedTuple):
    """What one stored tensor gives of a parameter.

    Attributes:
        values: a tensor (rows, ...); or the stored bytes (rows, bytes of a row), valid until the next one is asked for.
        order: int32 (rows,), the row of the parameter that each becomes.
    """

    values: Any
    order: NDArray[np.int32]


class Read(Protocol):
    """Reads a parameter, one stored tensor after the other."""

    def __call__(self, *, raw: bool = False) -> Iterator[Rows]: ...


class Taker(Protocol):
    """Somebody who keeps parameters in a form of his own, instead of the module."""

    def plan(self, stored: Mapping[str, tuple[str, ...]], files: Mapping[str, tuple[int, ...]]) -> None:
        """Told once, before anything is read, in which dtypes each parameter is stored, and the files' state."""

    def take(self, name: str, read: Read) -> bool:
        """Offered every parameter; True when it took it."""

    def finish(self, files: Mapping[str, tuple[int, ...]]) -> None:
        """Told that everything was read, and the files' state now."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model in memory, and what its files said."""

    model: nn.Module
    config: DecoderConfig
    description: Description
    metadata: dict[str, object]


def load_model(
    path: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    taker: Callable[[nn.Module], Taker] | None = None,
    admit: Callable[[TensorSource], None] | None = None,
    prefix: Path | None = None,
    adapter: Path | None = None,
    encoder: torch.dtype | None = None,
) -> Loaded:
    """Load a model directory or a `.gguf` file; peak memory is the weights and one tensor.

    Args:
        progress: called with (bytes done, bytes in all).
        taker: given the model on the meta device, makes whoever takes parameters before the module does.
        admit: shown the files before anything is made of them; refuses them by raising.
        prefix: a P-Tuning v2 checkpoint whose soft prefix the model gets.
        adapter: a directory with a LoRA adapter that is merged into the weights.
        encoder: of an image encoder, see `build`.

    Raises:
        CheckpointError: broken files, and every missing, unexpected or misshapen tensor at once.
        ConfigError: a configuration that would need other mathematics.
    """
    gguf = path.suffix == ".gguf"
    if not gguf and not path.is_dir():
        raise CheckpointError(f"{path}: neither a model directory nor a .gguf file")
    description = None if gguf else describe_directory(path)  # the cheap and common errors come first
    with ExitStack() as stack:
        source = stack.enter_context(open_source(path))
        if description and description.quantisation:
            packed = description.quantisation.method == "hanlin"
            source = PackedSource(source) if packed else QuantisedSource(source, description.quantisation)
        elif description and is_row_quantised(source):
            source = RowQuantisedSource(source, 4 if description.values.get("quantization_bit") == 4 else 8)
        if admit:
            admit(source)
        description = description or describe_gguf(source)
        if prefix is not None:
            source = over = open_prefix(source, prefix)
            stack.callback(over.close)
            description = replace(description, values={**description.values, **over.values()})
        config = read_config(description.values)
        model = build(config, dtype=dtype, encoder=encoder)
        parameters = dict(model.named_parameters())
        wanted = recipes(parameters, config, gguf=gguf, permuted=description.permuted, stored=source.infos)
        if isinstance(source, QuantisedSource):
            source.drop_empty_biases(wanted)
        check(model, wanted, source)
        if adapter is not None:
            source = MergedSource(source, read_peft(adapter, Base.of(model)), wanted)
            if admit:
                admit(source)
        load_tensors(model, source, wanted, device=device, taker=taker and taker(model), progress=progress)
        return Loaded(model=model, config=config, description=description, metadata=dict(source.metadata))


def load_tensors(
    model: nn.Module,
    source: TensorSource,
    wanted: Mapping[str, Recipe],
    *,
    device: torch.device,
    taker: Taker | None = None,
    progress: Progress | None = None,
) -> None:
    """Fill every parameter of a meta model from `source`, but for those that the taker takes."""
    parameters, infos = dict(model.named_parameters()), source.infos
    total = sum(info.nbytes for info in infos.values())
    done = 0
    if taker:
        stored = {name: tuple(infos[part].dtype for part in recipe.sources) for name, recipe in wanted.items()}
        taker.plan(stored, source.state())
    sizes = {name: sum(infos[part].nbytes for part in recipe.sources) for name, recipe in wanted.items()}
    for name in sorted(wanted, key=lambda name: -sizes[name] if sizes[name] >= _LARGE else 0):
        recipe = wanted[name]
        if not (taker and taker.take(name, _reader(source, recipe))):
            value = recipe.join([source.load(part) for part in recipe.sources])
            place(model, name, value, parameters[name].dtype, device)
        done += sizes[name]
        if progress:
            progress(done, total)
    if taker:
        taker.finish(source.state())
    tie(model, parameters)


def _reader(source: TensorSource, recipe: Recipe) -> Read:
    def read(*, raw: bool = False) -> Iterator[Rows]:
        counts = [source.infos[part].shape[0] for part in recipe.sources]
        for part, count, order in zip(recipe.sources, counts, recipe.order(counts), strict=True):
            values = source.raw(part).reshape(count, -1) if raw else source.load(part)
            yield Rows(values, order)
            source.forget()

    return read


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


def check(model: nn.Module, wanted: Mapping[str, Recipe], source: TensorSource) -> None:
    """Raises:
    CheckpointError: every tensor that is missing, unexpected or of another shape.
    """
    parameters = dict(model.named_parameters())
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

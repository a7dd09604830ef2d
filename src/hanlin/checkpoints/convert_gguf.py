"""Converting to a GGUF file that llama.cpp runs: written tensor by tensor, some rows at a time, and read again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hanlin.checkpoints.base import fail
from hanlin.checkpoints.blocks import BLOCKS
from hanlin.checkpoints.description import describe_gguf
from hanlin.checkpoints.gguf_encode import DENSE, bound, decode, encode, row_bytes, row_chunks
from hanlin.checkpoints.gguf_keys import PERMUTED, architecture, config_keys, fit_tokens
from hanlin.checkpoints.names import Recipe, recipes
from hanlin.checkpoints.source import open_source
from hanlin.checkpoints.staging import PieceFile
from hanlin.checkpoints.weights import Weights, probe
from hanlin.errors import CheckpointError, ConfigError
from hanlin.layers.rope import Rope, RopeConfig

__all__ = ["OUTTYPES", "GgufTarget"]

Progress = Callable[[int, int], None]

OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1")
# llama.cpp's numbers of what most of a file's tensors are, and its version of the block kinds.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
_QUANTISATION_VERSION = 2
_ALIGNMENT = 32


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A tensor of the file: rows of a parameter, in the order that the file wants them in.

    Attributes:
        parameter: its name, or "" for RoPE's factors, which are computed.
        rows: int64 (rows,), or None for all as they are.
    """

    name: str
    parameter: str
    rows: Tensor | None
    shape: tuple[int, ...]
    kind: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * row_bytes(self.kind, self.shape[-1])

    def chunks(self) -> Iterator[slice]:
        """Its rows, some at a time; a vector in one piece."""
        return row_chunks(*self.shape) if len(self.shape) == 2 else iter((slice(None),))

    def of(self, value: Tensor, some: slice) -> Tensor:
        """Some of its rows, out of the whole parameter."""
        return value[some] if self.rows is None else value[self.rows[some]]


@dataclass(frozen=True)
class GgufTarget:
    """A GGUF file.

    Attributes:
        weights: what is converted.
        tokenizer: `tokenizer.*` key-values.
        outtype: of the matrices, one of `OUTTYPES`; vectors are float32 always, and "auto" is what most are stored in.
        name: what the model is called in the file.
    """

    weights: Weights
    tokenizer: Mapping[str, Any]
    outtype: str
    name: str

    def write(self, path: Path, progress: Progress) -> None:
        """Write the file `path`, holding one parameter at a time; behind what an interrupted call left of it.

        Raises:
            CheckpointError: values that the kind can't hold.
        """
        file, done = PieceFile(path), 0
        try:
            if not file.notes:
                file.write([self._header(path)])
            there = len(file.notes) - 1
            for number, (part, value) in enumerate(self._loaded(there)):
                if number >= there:
                    file.write(_stored(part, value, self.weights.source.path))
                done += part.nbytes
                progress(done, 2 * self._total)
        finally:
            file.close()

    def compare(self, path: Path, progress: Progress) -> None:
        """Read what was written: every tensor, and the logits of a probe prompt.

        Dense kinds must hold the bits of the source, rounded where they are narrower; a value in a block kind must be
        as near to its source as the block's steps are wide. The probe compares with the source so rounded.

        Raises:
            CheckpointError: what differs.
        """
        done, wrong = self._total, []
        with open_source(path) as stored:
            for part, value in self._loaded():
                if not _same(part, value, stored.raw(part.name)):
                    wrong.append(f"'{part.name}' does not read as it was written")
                stored.forget()
                done += part.nbytes
                progress(done, 2 * self._total)
            if wrong:
                fail(path, wrong, "The disk or the memory of this machine is at fault. Nothing was kept.")
            said = describe_gguf(stored)
            before = probe(_Rounded(**vars(self.weights), target=self))
            after = probe(Weights.open(stored, said.values, gguf=True, permuted=said.permuted))
        if not torch.allclose(before, after, rtol=1e-4, atol=1e-4 * float(before.abs().max()), equal_nan=True):
            worst = float((before - after).abs().max())
            raise CheckpointError(f"{path}: the logits of a probe prompt differ by {worst:.3g}. Nothing was kept.")

    def _loaded(self, skip: int = 0) -> Iterator[tuple[_Part, Tensor]]:
        """Every tensor of the file with the parameter that it is a part of, each read once; the first ones without."""
        value, owner = torch.empty(0), ""
        for number, part in enumerate(self._parts):
            if part.parameter != owner and number >= skip:
                del value
                value = self.weights.load(part.parameter) if part.parameter else self._rope_factors
                owner = part.parameter
            yield part, value

    @cached_property
    def _total(self) -> int:
        return sum(part.nbytes for part in self._parts)

    @cached_property
    def arch(self) -> str:
        return architecture(self.weights.config) or ""

    @cached_property
    def recipes(self) -> dict[str, Recipe]:
        """How each parameter is read out of the file."""
        parameters = dict(self.weights.model.named_parameters())
        return recipes(parameters, self.weights.config, gguf=True, permuted=self.arch in PERMUTED)

    @cached_property
    def dtype(self) -> str:
        """What most of the matrices are stored in: "F32", "F16" or "BF16"."""
        sizes: dict[str, int] = {}
        for info in self.weights.source.infos.values():
            if len(info.shape) == 2:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + prod(info.shape)
        found = max(sizes, key=lambda kind: sizes[kind])
        if found not in DENSE:
            raise ConfigError(f"{self.weights.source.path}: most matrices are {found}; known: {', '.join(DENSE)}")
        return found

    @cached_property
    def matrices(self) -> str:
        """The kind of most matrices of the file."""
        return self.dtype if self.outtype == "auto" else self.outtype.upper()

    @cached_property
    def parts_of(self) -> dict[str, list[_Part]]:
        """For each parameter the tensors that it is read from."""
        found: dict[str, list[_Part]] = {}
        for name, recipe in self.recipes.items():
            shape = tuple(self.weights.model.get_parameter(name).shape)
            counts = self._counts(recipe, shape[0])
            found[name] = []
            for source, count, order in zip(recipe.sources, counts, recipe.order(counts), strict=True):
                rows = torch.from_numpy(order).long()
                whole = len(counts) == 1 and bool((rows == torch.arange(count)).all())
                found[name].append(self._part(source, name, None if whole else rows, (count, *shape[1:])))
        return found

    @cached_property
    def _parts(self) -> list[_Part]:
        found = [part for parts in self.parts_of.values() for part in parts]
        if self.arch == "internlm2" and self.weights.config.tied:  # llama.cpp insists on a head of its own
            (first,) = self.parts_of[self.weights.ends()[0]]
            found.append(self._part("output.weight", first.parameter, None, first.shape))
        if self.weights.config.rope.kind == "llama3":
            found.append(self._part("rope_freqs.weight", "", None, tuple(self._rope_factors.shape)))
        return found

    def _counts(self, recipe: Recipe, rows: int) -> list[int]:
        if len(recipe.sources) == 1:
            return [rows]
        config = self.weights.config
        kv = config.num_kv_heads * config.head_dim
        return [rows - 2 * kv, kv, kv]

    def _part(self, name: str, parameter: str, rows: Tensor | None, shape: tuple[int, ...]) -> _Part:
        return _Part(name=name, parameter=parameter, rows=rows, shape=shape, kind=self._kind(name, shape))

    def _kind(self, name: str, shape: tuple[int, ...]) -> str:
        kind = self.matrices
        if len(shape) == 1:
            return "F32"
        # The last product decides between tokens; its weights are kept finer, as llama.cpp's own tools do.
        last = name == "output.weight" or (name == "token_embd.weight" and self.weights.config.tied)
        if kind.startswith("Q4") and last:
            kind = "Q8_0"
        return kind if shape[-1] % BLOCKS[kind][0] == 0 else "F16"

    @cached_property
    def _rope_factors(self) -> Tensor:
        """What llama.cpp divides RoPE's frequencies by: (dims / 2,)."""
        rope, device = self.weights.config.rope, torch.device("cpu")
        plain = RopeConfig(dims=rope.dims, base=rope.base, max_positions=rope.max_positions)
        return Rope(plain).frequencies(rope.dims, None, device) / Rope(rope).frequencies(rope.dims, None, device)

    def _header(self, path: Path) -> bytes:
        import gguf

        source = self.weights.source.path
        keys = config_keys(self.weights.config, name=self.name, path=source)
        keys["hanlin.dtype"] = str(DENSE[self.dtype]).removeprefix("torch.")
        keys["general.file_type"] = _FILE_TYPES[self.matrices]
        if self.matrices not in DENSE:
            keys["general.quantization_version"] = _QUANTISATION_VERSION
        keys |= fit_tokens(self.tokenizer, self.weights.config.vocab_size, source)
        beside = path.with_name(path.name + ".header")
        writer = gguf.GGUFWriter(beside, self.arch)
        for key, value in keys.items():
            _add(writer, key, value)
        for part in self._parts:
            kind = gguf.GGMLQuantizationType[part.kind]
            writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), part.nbytes, raw_dtype=kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        header = beside.read_bytes()
        beside.unlink()
        return header + bytes(-len(header) % _ALIGNMENT)


@dataclass(frozen=True)
class _Rounded(Weights):
    """The source's parameters with the values that the file can hold."""

    target: GgufTarget

    def load(self, name: str) -> Tensor:
        value = super().load(name)
        parts = self.target.parts_of[name]
        if name in self.ends() or all(DENSE.get(part.kind) == value.dtype for part in parts):
            return value
        sources = []
        for part in parts:
            rounded = torch.empty(part.shape)
            for some in part.chunks():
                values = part.of(value, some)
                rounded[some] = decode(encode(values, part.kind), part.kind, tuple(values.shape))
            sources.append(rounded)
        return self.target.recipes[name].join(sources)

    def rounded(self, name: str, rows: Tensor) -> Tensor:
        (part,) = self.target.parts_of[name]
        return decode(encode(rows, part.kind), part.kind, tuple(rows.shape))


def _stored(part: _Part, value: Tensor, path: Path) -> Iterator[memoryview | bytes]:
    """A tensor's bytes, some rows at a time, and what fills up its place."""
    for some in part.chunks():
        values = part.of(value, some)
        _check(values, part, path)
        yield encode(values, part.kind).data
    yield bytes(-part.nbytes % _ALIGNMENT)


def _same(part: _Part, value: Tensor, raw: NDArray[np.uint8]) -> bool:
    """Whether the stored bytes of a tensor are what its parameter makes."""
    width = row_bytes(part.kind, part.shape[-1])
    for some in part.chunks():
        values = part.of(value, some)
        there = raw if len(part.shape) == 1 else raw[some.start * width : some.stop * width]
        if not np.array_equal(there, encode(values, part.kind)):
            return False
        if part.kind not in DENSE:
            moved = (decode(there, part.kind, tuple(values.shape)) - values.float()).abs()
            if not bool((moved <= bound(values, part.kind)).all()):
                return False
    return True


def _check(values: Tensor, part: _Part, path: Path) -> None:
    """Refuse what a kind would store as infinity, or blocks as nonsense."""
    wide = values.float()
    if part.kind in ("F32", "BF16"):
        return
    if part.kind == "F16":
        bad = bool((wide.half().isinf() & ~wide.isinf()).any())
    else:
        bad = not bool(wide.isfinite().all()) or bool((wide.abs() > 65504).any())
    if bad:
        fail(path, [f"'{part.name}' holds values that {part.kind} can't"], "Use --outtype bf16 or f32.")


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)

"""A decoder as packed weights: which rows of which parameter go where, in which kind. The native runner's loader.

One weight for q, k and v together, one for gate and up interleaved as the fused activation wants them, one each for the
rest; biases likewise. The model on the meta device says what there is (`ModelParts`); nothing here knows a family.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hanlin.errors import ConfigError, problems
from hanlin.kernels.native import (
    LAYOUT_VERSION,
    Arena,
    Context,
    Kind,
    PackedWeight,
    Source,
    library_path,
    packed_bytes,
)
from hanlin.kernels.packed_cache import PAGE, Found, PackedCache, PackedImage, PackedKey, digest_of_files
from hanlin.layers.linear import Linear
from hanlin.models.parts import HasParts, ModelParts

__all__ = ["KINDS", "Lowering", "Slot", "WeightKind"]


class WeightKind(NamedTuple):
    """How weights are kept: kind and group of the packed layout, and the same for the embedding and the head."""

    kind: Kind
    group: int
    head: Kind
    head_group: int


# The head and the embedding keep 8 bits when the rest has 4: the head's errors reach the logits directly.
KINDS: Mapping[str, WeightKind] = {
    "float32": WeightKind(Kind.F32, 0, Kind.F32, 0),
    "bfloat16": WeightKind(Kind.BF16, 0, Kind.BF16, 0),
    "int8": WeightKind(Kind.INT8, 32, Kind.INT8, 32),
    "int4": WeightKind(Kind.INT4_MIN, 32, Kind.INT8, 32),
}
_LOSSLESS = {
    "Q4_0": (Kind.INT4, Source.Q4_0),
    "Q4_1": (Kind.INT4_MIN, Source.Q4_1),
    "Q8_0": (Kind.INT8, Source.Q8_0),
}
# Whole numbers with one scale a row: used as they are, the scale repeated for each group.
_BY_ROW = {"ROW_INT4": Kind.INT4, "ROW_INT8": Kind.INT8}
# Codes that another quantiser made, with a scale for each of so many columns: used as they are.
_BY_GROUP: Mapping[str, tuple[Kind, int]] = {
    f"{kind.name}/{size}": (kind, size)
    for kind in (Kind.INT4, Kind.INT4_ZERO, Kind.INT4_MIN, Kind.INT8)
    for size in (32, 64, 128)
} | {"INT8_ROW": (Kind.INT8_ROW, 0)}
_FEW_BITS = ("FEW_BITS", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@dataclass(kw_only=True)
class Slot:
    """A weight (out, in_) to be packed out of one or more parameters.

    Attributes:
        places: for each parameter's name, the output that each of its rows becomes.
        bias: (out,) float32 in the order of the outputs, or None.
        blocks: the kind of GGUF blocks that are used as they are, or None.
        by_row: the stored whole numbers are used as they are, each row with its scale.
        by_group: the same, with a scale (and a zero point) for each group of columns.
    """

    out: int
    in_: int
    head: bool = False
    places: dict[str, NDArray[np.int32]] = field(default_factory=dict)
    biases: dict[str, NDArray[np.int32]] = field(default_factory=dict)
    bias: NDArray[np.float32] | None = None
    kind: Kind = Kind.F32
    group: int = 0
    blocks: Source | None = None
    by_row: bool = False
    by_group: bool = False
    weight: PackedWeight | None = None


class Block(NamedTuple):
    """The slots of one block, and the gains of its norms."""

    qkv: Slot
    out: Slot
    gate_up: Slot
    down: Slot
    fused: bool


class Lowering:
    """Collects a model's weights while its files are read.

    Use: `plan` with what the files hold, then `take` for every parameter, then `finish`. What it takes stays out of the
    module. With a cache, a plan that was carried out before is there already, and nothing is read.

    Args:
        image: where the files have the weights packed already.
        memory: gives so many zeroed bytes to pack into, such as a mapped file, instead of fresh memory.

    Attributes:
        table_form: name, type ("BF16"...) and shape of the embedding, where it is kept as a plain table.
        layout: tells what the packed weights look like, byte for byte, whatever made them; known after `plan`.
        cached: whether the weights come from the cache, known after `plan`; see `sound`.
        linears: the name of the linear layer that a weight, by its name, belongs to.

    Raises:
        ConfigError: weight kinds that a shape cannot have, all of them at once.
    """

    def __init__(
        self,
        model: HasParts,
        *,
        weights: str,
        context: Context,
        cache: PackedCache | None = None,
        image: PackedImage | None = None,
        memory: Callable[[int], NDArray[np.uint8]] | None = None,
    ) -> None:
        if weights != "auto" and weights not in KINDS:
            raise ConfigError(f"weights must be one of auto, {', '.join(KINDS)}, not {weights!r}")
        assert isinstance(model, nn.Module)
        self._names = {id(p): name for name, p in model.named_parameters()}
        linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
        self.linears = {self._names[id(module.weight)]: name for name, module in linears.items()}
        self._weights, self._context, self._cache = weights, context, cache
        self._image, self._memory = image, memory
        self.table_form: tuple[str, str, tuple[int, ...]] | None = None
        self._found: Found | None = None
        parts: ModelParts = model.parts()
        config = model.config
        sizes = {
            "q": config.num_heads * config.head_dim,
            "k": config.num_kv_heads * config.head_dim,
            "v": config.num_kv_heads * config.head_dim,
        }
        inner = config.intermediate_size
        fused = inner % 16 == 0  # the fused activation works on tiles of 16 gates and 16 ups
        qkv = _rows_in_turn(sizes)
        gate_up = _rows_interleaved(inner) if fused else _rows_in_turn({"gate": inner, "up": inner})
        up = _rows_in_turn({"up": inner})
        self.blocks = [
            Block(
                self._slot(block.qkv, qkv),
                self._slot((block.out,)),
                self._slot(block.gate_up, up if block.activation == "gelu" else gate_up),
                self._slot((block.down,)),
                fused,
            )
            for block in parts.blocks
        ]
        self.head = self._slot((parts.head,), head=True)
        self.tied = parts.tied
        self._embedding = self._names[id(parts.embedding.weight)]
        self._embedding_shape = tuple(parts.embedding.weight.shape)
        # An embedding of its own is kept as the head is where weights have few bits, else as a plain table.
        self.embedding: Slot | None = None
        self.table: Tensor | None = None
        self.parts = parts

    @property
    def slots(self) -> Iterable[Slot]:
        for block in self.blocks:
            yield from block[:4]
        yield self.head
        if self.embedding is not None:
            yield self.embedding

    @property
    def nbytes(self) -> int:
        """Bytes of all packed weights and the embedding's table."""
        table = self.table.nbytes if self.table is not None else 0
        return sum(slot.weight.nbytes for slot in self.slots if slot.weight is not None) + table

    def plan(self, stored: Mapping[str, tuple[str, ...]], files: Mapping[str, tuple[int, ...]]) -> None:
        """Choose each weight's kind by the dtypes that its parameters are stored in, and take or find the memory.

        `files` gives the model's files and the state they are in: numbers that change when a file does.
        """
        self._few = any(set(dtypes) & {*_BY_ROW, *_BY_GROUP, "FEW_BITS"} for dtypes in stored.values())
        rows, width = self._embedding_shape
        auto = self._weights == "auto" and (self._few or set(stored[self._embedding]) & set(_LOSSLESS))
        whole = self._weights in ("int8", "int4") and width % KINDS[self._weights].head_group == 0
        if not self.tied and (auto or whole):
            places = {self._embedding: np.arange(rows, dtype=np.int32)}
            self.embedding = Slot(out=rows, in_=width, head=True, places=places)
        found = []
        for slot in self.slots:
            self._choose(slot, {dtype for name in slot.places for dtype in stored[name]})
            if slot.kind not in (Kind.F32, Kind.BF16) and slot.in_ % (slot.group or 32):
                name = next(iter(slot.places))
                found.append(f"'{name}' has {slot.in_} columns, not a multiple of {slot.group or 32}")
        if found:
            raise ConfigError(problems(f"weights={self._weights!r}", found, "Use weights='bfloat16' or 'float32'."))
        self._lay_out(stored, files)

    def take(self, name: str, read: Callable[..., Iterator[tuple[Any, NDArray[np.int32]]]]) -> bool:
        """Pack a parameter, if it belongs to a packed weight or is the embedding's table; else False.

        `read(raw=...)` gives pieces of it, dense or as stored, and which rows of it they are.
        """
        for slot in self.slots:
            if name in slot.places and not self.cached:
                assert slot.weight is not None
                for rows, order in read(raw=slot.blocks is not None or slot.by_row or slot.by_group):
                    if slot.by_row or slot.by_group:
                        codes = _codes(slot, rows) if slot.by_row else _grouped(slot, rows)
                        self._context.pack_codes(slot.weight, *codes, place=slot.places[name][order])
                        continue
                    source = rows.contiguous() if slot.blocks is None else rows
                    self._context.pack(slot.weight, source, blocks=slot.blocks, place=slot.places[name][order])
            if name in slot.biases and not self.cached:
                assert slot.bias is not None
                for rows, order in read():
                    slot.bias[slot.biases[name][order]] = rows.float().numpy()
            if name in slot.places or name in slot.biases:
                return True
        if name != self._embedding or self.table is None:
            return False
        if not self.cached:
            ((rows, _),) = read()
            self.table.copy_(rows)
        return True

    def finish(self, files: Mapping[str, tuple[int, ...]]) -> None:
        """All is packed: have it written to the cache, if the files are still what they were."""
        if self._cache and not self.cached and self._files == files:
            self._cache.store(self._key, self._arena)

    @property
    def cached(self) -> bool:
        return self._found is not None

    def sound(self) -> bool:
        """To be asked before the weights are used: no, if what was in the cache is damaged. Then all must be read."""
        return self._found is None or self._found.sound()

    def _lay_out(self, stored: Mapping[str, tuple[str, ...]], files: Mapping[str, tuple[int, ...]]) -> None:
        """One arena for everything that `take` takes: weights, then biases, then the embedding's table."""
        narrow = torch.float16 if stored[self._embedding] == ("F16",) else torch.bfloat16
        dtype = torch.float32 if self._weights == "float32" else narrow
        table = torch.Size() if self.tied or self.embedding is not None else torch.Size(self._embedding_shape)
        sizes = [packed_bytes(slot.kind, slot.out, slot.in_, slot.group) for slot in self.slots]
        sizes += [4 * slot.out for slot in self.slots if slot.biases]
        sizes += [table.numel() * dtype.itemsize] if table else []
        size = -(-sum(-(-size // 64) * 64 for size in sizes) // PAGE) * PAGE
        self._files, self._key = files, PackedKey.of(sorted(files), sorted(files.items()), self._form(stored, size))
        if table:  # its name, its type by safetensors' name, its shape
            names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
            self.table_form = self._embedding, names[dtype], tuple(table)
        self.layout = self._layout(size, self.table_form)
        self._found = self._image.find(self.layout, size) if self._image else None
        if self._found is None and self._cache:
            self._found = self._cache.find(self._key, size)
        fresh = self._memory(size) if self._memory and not self._found else None
        self._arena = arena = self._found.arena if self._found else Arena(size, fresh)
        for slot in self.slots:
            slot.weight = PackedWeight(slot.kind, slot.out, slot.in_, slot.group, arena=arena)
        for slot in self.slots:
            if slot.biases:
                slot.bias = np.frombuffer(arena.view(arena.take(4 * slot.out), 4 * slot.out), np.float32)
        if table:
            memory = arena.view(arena.take(sizes[-1]), sizes[-1])
            self.table = torch.frombuffer(memory, dtype=dtype).view(table)

    def _layout(self, size: int, table: object) -> bytes:
        found = blake2b(repr((LAYOUT_VERSION, sys.byteorder, size, table)).encode(), digest_size=32)
        for slot in self.slots:
            found.update(repr((slot.kind.name, slot.group, slot.out, slot.in_)).encode())
            for name, rows in (*slot.places.items(), *slot.biases.items()):
                found.update(name.encode() + rows.tobytes())
        return found.digest()

    def _form(self, stored: Mapping[str, tuple[str, ...]], size: int) -> Iterator[object]:
        """All that decides about a byte of the arena, beside the files' content."""
        package = Path(__file__).parents[1]
        rooms = [path for room in ("checkpoints", "kernels", "models") for path in (package / room).glob("*.py")]
        yield digest_of_files([*rooms, Path(__file__), library_path()])
        yield self._context.isa, torch.__version__, size, sorted(stored.items())
        for slot in self.slots:
            yield slot.kind, slot.group, slot.out, slot.in_, slot.blocks, slot.by_row, slot.by_group
            for name, rows in (*slot.places.items(), *slot.biases.items()):
                yield name, blake2b(rows.tobytes(), digest_size=16).digest()

    def _slot(
        self,
        linears: tuple[Linear, ...],
        outputs: Mapping[str, NDArray[np.int32]] | None = None,
        *,
        head: bool = False,
    ) -> Slot:
        """The slot of one or several projections; `outputs` says by the name of a part where its rows go."""
        slot = Slot(out=sum(linear.out_features for linear in linears), in_=linears[0].in_features, head=head)
        for linear in linears:
            place = _places(linear, outputs) if outputs else np.arange(slot.out, dtype=np.int32)
            slot.places[self._names[id(linear.weight)]] = place
            if linear.bias is not None:
                slot.biases[self._names[id(linear.bias)]] = place
        return slot

    def _choose(self, slot: Slot, dtypes: set[str]) -> None:
        if self._weights == "auto":
            (only, *others) = dtypes
            if not others and only in _LOSSLESS:
                slot.kind, slot.blocks = _LOSSLESS[only]
                slot.group = 32
                return
            group = next((size for size in (128, 64, 32) if slot.in_ % size == 0), 0)
            if not others and only in _BY_ROW and group:
                slot.kind, slot.group, slot.by_row = _BY_ROW[only], group, True
                return
            if not others and only in _BY_GROUP:
                slot.kind, slot.group = _BY_GROUP[only]
                slot.by_group = True
                return
            few = (dtypes <= {*_FEW_BITS, *_LOSSLESS, *_BY_GROUP} or (slot.head and self._few)) and slot.in_ % 32 == 0
            kinds = KINDS["int8" if few else "bfloat16"]
        else:
            kinds = KINDS[self._weights]
        slot.kind, slot.group = (kinds.head, kinds.head_group) if slot.head else (kinds.kind, kinds.group)
        if slot.head and slot.out < 16:  # the one value of a reward model: nothing to save, and all of the answer
            slot.kind, slot.group = Kind.F32, 0


def _rows_in_turn(sizes: Mapping[str, int]) -> dict[str, NDArray[np.int32]]:
    out, start = {}, 0
    for name, size in sizes.items():
        out[name] = np.arange(start, start + size, dtype=np.int32)
        start += size
    return out


def _rows_interleaved(inner: int) -> dict[str, NDArray[np.int32]]:
    """Tiles of 16 gates followed by their 16 ups."""
    row = np.arange(inner, dtype=np.int32)
    gate = row // 16 * 32 + row % 16
    return {"gate": gate, "up": gate + np.int32(16)}


def _codes(slot: Slot, rows: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Rows as `RowQuantisedSource.raw` gives them -> codes (rows, in) and scales (rows, in / group) for packing."""
    scale = np.ascontiguousarray(rows[:, -2:]).view(np.float16)
    if slot.kind is Kind.INT8:
        codes = rows[:, :-2] ^ np.uint8(128)
    else:  # the halves of a byte in two's complement: turning the highest bit adds 8
        codes = np.empty((len(rows), slot.in_), np.uint8)
        codes[:, 0::2] = (rows[:, :-2] >> 4) ^ 8
        codes[:, 1::2] = (rows[:, :-2] & 15) ^ 8
    return np.ascontiguousarray(codes), np.repeat(scale, slot.in_ // slot.group, axis=1)


def _grouped(slot: Slot, rows: NDArray[np.uint8]) -> tuple[NDArray[Any], ...]:
    """Rows as `QuantisedSource.raw` gives them -> codes (rows, in), scales, and zero points if the kind has any."""
    codes, rest = np.ascontiguousarray(rows[:, : slot.in_]), np.ascontiguousarray(rows[:, slot.in_ :])
    if slot.kind is Kind.INT8_ROW:
        return codes, rest.view(np.float32)[:, 0]
    numbers = rest.view(np.float16)
    return codes, *(np.ascontiguousarray(part) for part in np.split(numbers, 2 if slot.kind.offsets else 1, axis=1))


def _places(linear: Linear, outputs: Mapping[str, NDArray[np.int32]]) -> NDArray[np.int32]:
    """The outputs of a projection's rows, group by group, part by part."""
    pieces = []
    for group in range(linear.groups):
        for name, rows in linear.parts:
            pieces.append(outputs[name][group * rows : (group + 1) * rows])
    return np.concatenate(pieces)

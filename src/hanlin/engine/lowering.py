"""A decoder as packed weights: which rows of which parameter go where, in which kind. The native runner's loader.

One weight for q, k and v together, one for gate and up interleaved as the fused activation wants them, one each for the
rest; biases likewise. The model on the meta device says what there is (`ModelParts`); nothing here knows a family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hanlin.errors import ConfigError, problems
from hanlin.kernels.native import Arena, Context, Kind, PackedWeight, Source, packed_bytes
from hanlin.layers.linear import Linear
from hanlin.models.parts import HasParts, ModelParts

__all__ = ["KINDS", "Lowering", "Slot", "WeightKind"]


class WeightKind(NamedTuple):
    """How weights are kept: kind and group of the packed layout, and the same for the embedding and the head."""

    kind: Kind
    group: int
    head: Kind
    head_group: int


# The head and a tied embedding keep 8 bits when the rest has 4: their errors reach the logits directly.
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
_FEW_BITS = ("Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_TABLES = {torch.float32: Source.F32, torch.float16: Source.F16, torch.bfloat16: Source.BF16}


@dataclass(kw_only=True)
class Slot:
    """A weight (out, in_) to be packed out of one or more parameters.

    Attributes:
        places: for each parameter's name, the output that each of its rows becomes.
        bias: (out,) float32 in the order of the outputs, or None.
        blocks: the kind of GGUF blocks that are used as they are, or None.
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

    Use: `plan` with what the files hold, then `take` for every parameter. What it takes stays out of the module.

    Raises:
        ConfigError: weight kinds that a shape cannot have, all of them at once.
    """

    def __init__(self, model: HasParts, *, weights: str, context: Context) -> None:
        if weights != "auto" and weights not in KINDS:
            raise ConfigError(f"weights must be one of auto, {', '.join(KINDS)}, not {weights!r}")
        assert isinstance(model, nn.Module)
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._weights, self._context = weights, context
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
        self.blocks = [
            Block(
                self._slot(block.qkv, qkv),
                self._slot((block.out,)),
                self._slot(block.gate_up, gate_up),
                self._slot((block.down,)),
                fused,
            )
            for block in parts.blocks
        ]
        self.head = self._slot((parts.head,), head=True)
        self.tied = parts.tied
        self._embedding = self._names[id(parts.embedding.weight)]
        self._embedding_shape = tuple(parts.embedding.weight.shape)
        # An embedding of its own is kept as blocks if it comes as blocks, else as a plain table.
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

    def plan(self, stored: Mapping[str, tuple[str, ...]]) -> None:
        """Choose each weight's kind by the dtypes that its parameters are stored in, and take the memory."""
        if not self.tied and set(stored[self._embedding]) & set(_LOSSLESS) and self._weights == "auto":
            rows, width = self._embedding_shape
            self.embedding = Slot(out=rows, in_=width, places={self._embedding: np.arange(rows, dtype=np.int32)})
        found = []
        for slot in self.slots:
            self._choose(slot, {dtype for name in slot.places for dtype in stored[name]})
            if slot.kind not in (Kind.F32, Kind.BF16) and slot.in_ % (slot.group or 32):
                name = next(iter(slot.places))
                found.append(f"'{name}' has {slot.in_} columns, not a multiple of {slot.group or 32}")
        if found:
            raise ConfigError(problems(f"weights={self._weights!r}", found, "Use weights='bfloat16' or 'float32'."))
        sizes = (packed_bytes(slot.kind, slot.out, slot.in_, slot.group) for slot in self.slots)
        arena = Arena(sum(-(-size // 64) * 64 for size in sizes))
        for slot in self.slots:
            slot.weight = PackedWeight(slot.kind, slot.out, slot.in_, slot.group, arena=arena)

    def take(self, name: str, dense: Callable[[], Tensor], raw: Callable[[], Tensor]) -> bool:
        """Pack a parameter, if it belongs to a packed weight or is the embedding's table; else False."""
        for slot in self.slots:
            if name in slot.places:
                assert slot.weight is not None
                source = dense() if slot.blocks is None else raw()
                self._context.pack(slot.weight, source.contiguous(), blocks=slot.blocks, place=slot.places[name])
                return True
            if name in slot.biases:
                slot.bias = np.zeros(slot.out, np.float32) if slot.bias is None else slot.bias
                slot.bias[slot.biases[name]] = dense().float().numpy()
                return True
        if name == self._embedding:
            table = dense()
            dtype = torch.float32 if self._weights == "float32" or table.dtype not in _TABLES else torch.bfloat16
            self.table = table.to(dtype, copy=True).contiguous()
            return True
        return False

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
            few = dtypes <= {*_FEW_BITS, *_LOSSLESS} and slot.in_ % 32 == 0
            kinds = KINDS["int8" if few else "bfloat16"]
        else:
            kinds = KINDS[self._weights]
        slot.kind, slot.group = (kinds.head, kinds.head_group) if slot.head else (kinds.kind, kinds.group)


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


def _places(linear: Linear, outputs: Mapping[str, NDArray[np.int32]]) -> NDArray[np.int32]:
    """The outputs of a projection's rows, group by group, part by part."""
    pieces = []
    for group in range(linear.groups):
        for name, rows in linear.parts:
            pieces.append(outputs[name][group * rows : (group + 1) * rows])
    return np.concatenate(pieces)

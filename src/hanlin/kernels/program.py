"""A model as a flat list of native operations, built once and run a whole step at a time. See hl_op and hl_step.

    program = Program(context, pool)
    x = program.embed(weight)
    for layer in ...:
        qkv = program.linear(program.norm(x, gain, eps=eps), wqkv)          # q | k | v
        program.rope(qkv, layer, heads=H, rotary=R)                         # turns q and k, writes k and v
        program.linear(program.attend(qkv, layer, heads=H), wo, add_to=x)
        inner = program.linear(program.norm(x, gain, eps=eps), gate_up, silu_mul=True)
        program.linear(inner, down, add_to=x)
    program.head(program.norm(program.gather(x), gain, eps=eps), weight)
    program.build(max_tokens=512)
    program.run(Step(...)).logits

A token's results do not depend on what else is in the step, on how a sequence was cut into steps, or on the number of
threads. Shapes: T tokens of a step, S sequences, R wanted tokens, V vocabulary.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hanlin.errors import ConfigError
from hanlin.kernels.abi import KVStruct, OpStruct, StepStruct, check, library
from hanlin.kernels.kv import KVPool, Layout
from hanlin.kernels.lora import PackedAdapter, Piece
from hanlin.kernels.native import ADD, GELU, SILU_MUL, Context, PackedWeight, Source, Weight, _dtype, _pointer
from hanlin.kernels.ops import Function, Norm, RopeStyle, Top

__all__ = ["Buffer", "Program", "Result", "Step"]

_EMBED, _NORM, _LINEAR, _ROPE, _ATTEND, _GATE, _ADD, _GATHER, _HEAD = range(9)
_NAMES = ("embed", "norm", "linear", "rope", "attend", "gate", "add", "gather", "head")
_TABLES = {"float32": Source.F32, "float16": Source.F16, "bfloat16": Source.BF16}


@dataclass(frozen=True)
class Buffer:
    """What an operation makes: `width` floats for every token, or for every wanted token behind a `gather`."""

    number: int
    width: int
    wanted: bool = False


@dataclass(frozen=True, kw_only=True)
class Step:
    """The packed tokens of one step. Contiguous arrays on the CPU, numpy or torch.

    Attributes:
        ids: (T,) int32.
        cos, sin: (T, rotary / 2) float32; None where nothing rotates.
        slots: (T,) int64, where each token's key and value go: block * block_size + offset.
        layout: the sequences.
        rows: (R,) int32, the tokens whose logits are wanted, each at most once.
        states: the last so many of the rows are wanted as hidden states alone.
        adapters: of every sequence, from `Program.adapter`; empty when none has one.
        embeddings: (E, D) float32, rows that stand in for embeddings of ids; None for none.
        embedding_rows: (T,) int32, which of them stands in for each token's, -1 for none; None with `embeddings`.
    """

    ids: Any
    slots: Any
    layout: Layout
    rows: Any
    states: int = 0
    adapters: Sequence[PackedAdapter | None] = ()
    cos: Any = None
    sin: Any = None
    embeddings: Any = None
    embedding_rows: Any = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """Attributes:
    logits: (R - states, V) float32.
    hidden: (R, D) float32, what the head multiplies; None if not asked for.
    top: the largest logits of each row; None if not asked for.
    """

    logits: Any
    hidden: Any = None
    top: Top | None = None


@dataclass
class _Record:
    """An operation before buffers have places: `reads` and `writes` are numbers of Buffers."""

    op: OpStruct
    reads: dict[str, Buffer] = field(default_factory=dict)
    writes: Buffer | None = None


class Program:
    """Builder and, after `build`, runner. Keeps what it points to alive; `context` must stay open.

    Buffers are reused once nothing reads them any more, so every operation may make a new one.
    """

    def __init__(self, context: Context, pool: KVPool | None = None) -> None:
        self._context, self._pool = context, pool
        self._records: list[_Record] = []
        self._buffers: list[Buffer] = []
        self._weights: list[PackedWeight] = []
        self._keep: list[Any] = []
        self._handle = 0
        self._rotary = self._width = 0
        self.max_tokens = 0
        self.vocabulary = self.hidden_size = 0

    # ---- building ---------------------------------------------------------------------------------------------------

    def embed(self, table: Any) -> Buffer:
        """Rows `ids` of a PackedWeight (V, D), or of a float32, float16 or bfloat16 array (V, D)."""
        self._width = int(table.in_ if isinstance(table, PackedWeight) else table.shape[1])
        if isinstance(table, PackedWeight):
            return self._make(_EMBED, table.in_, weight=self._weight(table))
        rows, width = table.shape
        address = _pointer(table, "table", tuple(_TABLES))
        self._keep.append(table)
        return self._make(
            _EMBED, int(width), table=address, table_rows=int(rows), table_kind=_TABLES[_dtype(table)], weight=-1
        )

    def norm(self, x: Buffer, gain: Any = None, bias: Any = None, *, eps: float, kind: Norm = Norm.RMS) -> Buffer:
        """RMSNorm or LayerNorm with gain and bias float32 (width,)."""
        vectors: dict[str, Any] = {
            "gain": self._vector(gain, "gain", x.width),
            "bias": self._vector(bias, "bias", x.width),
        }
        return self._make(_NORM, x.width, x, style=kind, eps=eps, **vectors)

    def linear(
        self,
        x: Buffer,
        weight: PackedWeight,
        bias: Any = None,
        *,
        add_to: Buffer | None = None,
        silu_mul: bool = False,
        gelu: bool = False,
    ) -> Buffer:
        """x @ weight.T + bias.

        Args:
            bias: float32 (out,) in the weight's order of outputs.
            add_to: the result is added to this buffer, which is returned: the residual stream.
            silu_mul: the weight interleaves gates and ups (see hl_pack); makes silu(gate) * up, half as wide.
            gelu: the tanh approximation of GELU on the result.
        """
        flags = (ADD if add_to else 0) | (SILU_MUL if silu_mul else 0) | (GELU if gelu else 0)
        width = weight.out // 2 if silu_mul else weight.out
        vector = self._vector(bias, "bias", weight.out)
        return self._make(_LINEAR, width, x, out=add_to, weight=self._weight(weight), flags=flags, bias=vector)

    def rope(self, qkv: Buffer, layer: int, *, heads: int, rotary: int, style: RopeStyle = RopeStyle.HALVES) -> None:
        """Turn q (in place) and k of q | k | v, and write k and v into the pool. rotary = 0 turns nothing."""
        self._make(_ROPE, 0, qkv, layer=layer, style=style, rotary=rotary, **self._shape(heads))

    def attend(self, qkv: Buffer, layer: int, *, heads: int, scale: float | None = None) -> Buffer:
        """softmax(scale q k^T) v over the pool, behind `rope`: (T, heads * K). scale None is 1 / sqrt(K)."""
        shape = self._shape(heads)
        size = shape["head_size"]
        scale = size**-0.5 if scale is None else scale
        return self._make(_ATTEND, heads * size, qkv, layer=layer, scale=scale, **shape)

    def gate(self, x: Buffer, function: Function = Function.SILU) -> Buffer:
        """function(gate) * up of x = gate | up, where they are not interleaved for `silu_mul`."""
        return self._make(_GATE, x.width // 2, x, style=function)

    def add(self, x: Buffer, y: Buffer | None = None, *, scale: float = 1.0) -> Buffer:
        """scale * x + y."""
        return self._make(_ADD, x.width, x, second=y, scale=scale)

    def gather(self, x: Buffer) -> Buffer:
        """The wanted rows of x. Needed before the head; the earlier, the less is computed for nothing."""
        return self._make(_GATHER, x.width, x, wanted=True)

    def head(self, x: Buffer, weight: PackedWeight, bias: Any = None) -> None:
        """The step's logits: x @ weight.T + bias. The last operation; x comes from a `gather`."""
        self.vocabulary, self.hidden_size = weight.out, weight.in_
        self._make(_HEAD, 0, x, weight=self._weight(weight), bias=self._vector(bias, "bias", weight.out))

    def build(self, max_tokens: int) -> None:
        """Check everything and take the memory for steps of up to `max_tokens` tokens.

        Raises:
            ConfigError: an operation that makes no sense; the message names it.
            CapacityError: when the system refuses the memory.
        """
        places, widths = self._place()
        for record in self._records:
            for name, buffer in record.reads.items():
                setattr(record.op, name, places[buffer.number])
            if record.writes is not None:
                record.op.out = places[record.writes.number]
        ops = (OpStruct * len(self._records))(*(record.op for record in self._records))
        weights = (Weight * len(self._weights))(*(weight.struct for weight in self._weights))
        pools = self._pool.structs if self._pool else (KVStruct * 0)()
        handle = ctypes.c_void_p()
        status = library().hl_program_create(
            self._context.handle,
            ops,
            len(ops),
            weights,
            len(weights),
            (ctypes.c_int64 * len(widths))(*widths),
            len(widths),
            pools,
            len(pools),
            max_tokens,
            ctypes.byref(handle),
        )
        check(status)
        self._handle, self.max_tokens = handle.value or 0, max_tokens
        self._rotary = max(record.op.rotary for record in self._records)
        weakref.finalize(self, library().hl_program_free, self._handle)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers; they are not touched before a step needs them."""
        return int(library().hl_program_bytes(self._built()))

    def adapter(self, pieces: Iterable[tuple[PackedWeight, Sequence[Piece]]], *, bf16: bool) -> PackedAdapter:
        """Low-rank additions to the products of weights, for steps of this program. May be called while it runs.

        Raises:
            ConfigError: additions to what the program does not multiply.
        """
        wanted = {id(weight): (weight.out, some) for weight, some in pieces}
        products = {
            number: id(self._weights[record.op.weight])
            for number, record in enumerate(self._records)
            if record.op.code in (_LINEAR, _HEAD)
        }
        by_number = {number: wanted[weight] for number, weight in products.items() if weight in wanted}
        made = PackedAdapter(len(self._records), by_number, bf16=bf16)
        check(library().hl_adapter_check(self._built(), made.struct))
        return made

    # ---- running ----------------------------------------------------------------------------------------------------

    def run(
        self, step: Step, *, logits: Any = None, hidden: bool = False, top: int = 0, log_sum_exp: bool = False
    ) -> Result:
        """Compute one step on all threads of the context.

        Args:
            logits: float32 (R - states, V) to write to; None makes a numpy array.
            hidden: also return what the head multiplies; always done when there are `states`.
            top: also return so many of the largest logits of each row, and log(sum(exp)).
            log_sum_exp: return that even when top is 0.

        Raises:
            ConfigError: arrays that do not fit, ids, slots or blocks that are not there, or too many tokens. Nothing
                has been computed then.
        """
        tokens, rows = len(step.ids), len(step.rows)
        scored = max(0, rows - step.states)
        struct = StepStruct(tokens=tokens, rows=rows, top=top, states=step.states)
        step.layout.fill(struct)
        struct.ids = _pointer(step.ids, "ids", ("int32",), (tokens,))
        struct.slots = _pointer(step.slots, "slots", ("int64",), (tokens,))
        struct.row_index = _pointer(step.rows, "rows", ("int32",), (rows,))
        if step.cos is not None and step.sin is not None:
            half = self._rotary // 2
            struct.cos = _pointer(step.cos, "cos", ("float32",), (tokens, half))
            struct.sin = _pointer(step.sin, "sin", ("float32",), (tokens, half))
        if any(step.adapters):
            if len(step.adapters) != struct.sequences:
                raise ConfigError(f"{len(step.adapters)} adapters for {struct.sequences} sequences")
            addresses = [adapter.address if adapter else None for adapter in step.adapters]
            adapters = (ctypes.c_void_p * len(addresses))(*addresses)
            struct.adapters = ctypes.addressof(adapters)
        if step.embeddings is not None:
            given = struct.n_embeddings = len(step.embeddings)
            struct.embeddings = _pointer(step.embeddings, "embeddings", ("float32",), (given, self._width))
            struct.embedding_rows = _pointer(step.embedding_rows, "embedding_rows", ("int32",), (tokens,))
        if logits is None:
            logits = np.empty((scored, self.vocabulary), np.float32)
        struct.logits = _pointer(logits, "logits", ("float32",), (scored, self.vocabulary))
        states = np.empty((rows, self.hidden_size), np.float32) if hidden or step.states else None
        if states is not None:
            struct.hidden = states.ctypes.data
        found = None
        if top or log_sum_exp:
            shape = (scored, top)
            found = Top(np.empty(shape, np.float32), np.empty(shape, np.int32), np.empty(scored, np.float32))
            struct.top_values, struct.top_ids, struct.log_sum_exp = (array.ctypes.data for array in found)
        check(library().hl_program_run(self._built(), struct))
        return Result(logits=logits, hidden=states, top=found)

    @contextmanager
    def profile(self) -> Iterator[list[tuple[str, float]]]:
        """Within it, steps are timed; behind it, the list holds each operation's name and its seconds in all steps."""
        seconds = (ctypes.c_double * len(self._records))()
        check(library().hl_program_profile(self._built(), seconds))
        found: list[tuple[str, float]] = []
        yield found
        check(library().hl_program_profile(self._built(), seconds))
        check(library().hl_program_profile(self._built(), None))
        found += [(_NAMES[record.op.code], taken) for record, taken in zip(self._records, seconds, strict=True)]

    # ---- details ----------------------------------------------------------------------------------------------------

    def _built(self) -> int:
        if not self._handle:
            raise ConfigError("this program has not been built yet; call build(max_tokens)")
        return self._handle

    def _weight(self, weight: PackedWeight) -> int:
        for index, known in enumerate(self._weights):
            if known is weight:
                return index
        self._weights.append(weight)
        return len(self._weights) - 1

    def _vector(self, vector: Any, name: str, width: int) -> int | None:
        if vector is None:
            return None
        self._keep.append(vector)
        return _pointer(vector, name, ("float32",), (width,))

    def _shape(self, heads: int) -> dict[str, Any]:
        if self._pool is None:
            raise ConfigError("attention needs a pool of keys and values; this program was made without one")
        return {"heads": heads, "kv_heads": self._pool.heads, "head_size": self._pool.head_size}

    def _make(
        self,
        code: int,
        width: int,
        x: Buffer | None = None,
        *,
        second: Buffer | None = None,
        out: Buffer | None = None,
        wanted: bool = False,
        **fields: Any,
    ) -> Buffer:
        if self._handle:
            raise ConfigError("this program has been built; operations can no longer be added")
        record = _Record(OpStruct(code=code, in_=-1, in2=-1, out=-1, **fields))
        record.reads = {name: b for name, b in (("in_", x), ("in2", second)) if b is not None}
        if out is None:
            out = Buffer(len(self._buffers), width, wanted or (x is not None and x.wanted))
            self._buffers.append(out)
        record.writes = out if width else None
        self._records.append(record)
        return out

    def _place(self) -> tuple[dict[int, int], list[int]]:
        """A place for every buffer, used again by another once nothing reads it; and the widths of the places."""
        last: dict[int, int] = {}
        for index, record in enumerate(self._records):
            for buffer in (*record.reads.values(), *((record.writes,) if record.writes else ())):
                last[buffer.number] = index
        places: dict[int, int] = {}
        widths: list[int] = []
        free: dict[tuple[int, bool], list[int]] = {}
        for index, record in enumerate(self._records):
            made = record.writes
            if made is not None and made.number not in places:
                spare = free.get((made.width, made.wanted))
                if spare:
                    places[made.number] = spare.pop()
                else:
                    places[made.number] = len(widths)
                    widths.append(made.width)
            for buffer in {*record.reads.values(), *((made,) if made else ())}:
                if last[buffer.number] == index:
                    free.setdefault((buffer.width, buffer.wanted), []).append(places[buffer.number])
        return places, widths

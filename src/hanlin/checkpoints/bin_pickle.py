"""The structure of a PyTorch checkpoint's `data.pkl`, read without unpickling.

A pickle is a program for a stack machine that may call anything. This is a machine of our own for the few operations
that `torch.save` writes for a dictionary of tensors. The only "functions" it knows are the ones below, and they only
record what they are given; no module is imported, no attribute looked up, nothing called. All else is refused.
Operations: https://github.com/python/cpython/blob/3.12/Lib/pickletools.py, protocols 2 to 5.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType
from typing import Any, NoReturn

from hanlin.checkpoints.base import shown
from hanlin.errors import CheckpointError, UnsafeCheckpointError

__all__ = ["StorageRef", "TensorRef", "read_pickle"]

# 25 operations describe a tensor; an operation can make Python spend 100 bytes.
_MAX_OPERATIONS = 2_000_000
_MAX_DIMENSIONS = 64
_CONVERT = "Convert it to safetensors with PyTorch where you trust the file, or fetch the model's safetensors version."


@dataclass(frozen=True)
class StorageRef:
    """Where a storage lies: entry `data/{key}` of the archive, `count` elements of `dtype` (safetensors' names)."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor in a storage. Offset and strides count elements; all are >= 0, nothing else is checked here."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Function(Enum):
    ORDERED_DICT = auto()
    TENSOR = auto()
    PARAMETER = auto()
    SIZE = auto()
    CONFIG = auto()


@dataclass(frozen=True)
class _StorageType:
    dtype: str


_GLOBALS: Mapping[tuple[str, str], _Function | _StorageType] = MappingProxyType(
    {
        ("collections", "OrderedDict"): _Function.ORDERED_DICT,
        ("torch._utils", "_rebuild_tensor_v2"): _Function.TENSOR,
        ("torch._utils", "_rebuild_parameter"): _Function.PARAMETER,
        ("torch", "Size"): _Function.SIZE,
        ("torch", "DoubleStorage"): _StorageType("F64"),
        ("torch", "FloatStorage"): _StorageType("F32"),
        ("torch", "HalfStorage"): _StorageType("F16"),
        ("torch", "BFloat16Storage"): _StorageType("BF16"),
        ("torch", "LongStorage"): _StorageType("I64"),
        ("torch", "IntStorage"): _StorageType("I32"),
        ("torch", "ShortStorage"): _StorageType("I16"),
        ("torch", "CharStorage"): _StorageType("I8"),
        ("torch", "ByteStorage"): _StorageType("U8"),
        ("torch", "BoolStorage"): _StorageType("BOOL"),
    }
)
# What InternEvo's `model_config.pt` has besides: a dictionary under a name of its own, which becomes a plain one, and
# types, which become their names.
_IN_CONFIGURATIONS: Mapping[tuple[str, str], _Function | str] = MappingProxyType(
    {("internlm.core.context.parallel_context", "Config"): _Function.CONFIG}
    | {("torch", name): f"torch.{name}" for name in ("float64", "float32", "float16", "bfloat16")}
)

# Operations that import, build or call; a dictionary of tensors needs none of them.
_BUILDERS: Mapping[int, str] = MappingProxyType(
    {ord("i"): "INST", ord("o"): "OBJ", 0x92: "NEWOBJ_EX", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4"}
    | {ord("P"): "PERSID"}
)


def read_pickle(program: bytes, where: str, *, configuration: bool = False) -> Any:
    """The recorded value: dictionaries (keys are strings and whole numbers), lists, tuples, scalars and TensorRefs.

    Values may share parts and contain themselves, as a pickle can say so.

    Args:
        configuration: of an InternEvo checkpoint: torch's types may be named, and its class of dictionaries.

    Raises:
        UnsafeCheckpointError: the pickle names a function or class that is not for tensors.
        CheckpointError: it is broken, or uses operations that no checkpoint of tensors has.
    """
    return _Machine(program, where, configuration).run()


class _BrokenError(Exception):
    """A step that can't be done; `run` says where."""


class _Machine:
    def __init__(self, program: bytes, where: str, configuration: bool) -> None:
        self.program = program
        self.where = where
        self.configuration = configuration
        self.position = 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each open mark
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        try:
            for _ in range(_MAX_OPERATIONS):
                operation = self.take(1)[0]
                if operation == ord("."):
                    if self.below or len(self.stack) != 1:
                        raise _BrokenError("it does not end with one value")
                    return self.stack[0]
                self.step(operation)
        except _BrokenError as error:
            raise CheckpointError(
                f"{self.where}: the pickle is broken at byte {self.position:,}: {error}. Fetch it again."
            ) from None
        raise CheckpointError(f"{self.where}: more than {_MAX_OPERATIONS:,} operations; no checkpoint has as many")

    def step(self, operation: int) -> None:
        simple = _CONSTANTS.get(operation)
        if simple is not None:
            self.push(simple[0])
        elif operation in _NUMBERS:
            code = _NUMBERS[operation]
            self.push(struct.unpack(code, self.take(struct.calcsize(code)))[0])
        elif operation in _METHODS:
            _METHODS[operation](self)
        elif operation in _BUILDERS:
            self.refuse(f"operation {_BUILDERS[operation]}, which builds objects")
        else:
            raise _BrokenError(f"operation 0x{operation:02x} is not one that PyTorch writes for tensors")

    def refuse(self, what: str) -> NoReturn:
        raise UnsafeCheckpointError(
            f"{self.where}: the pickle asks for {what}. Hanlin reads tensors only and never runs code from a file.\n"
            + _CONVERT
        )

    # The tape and the stack.

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.program):
            raise _BrokenError("it ends in the middle")
        piece = self.program[self.position : end]
        self.position = end
        return piece

    def length(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        end = self.program.find(b"\n", self.position)
        if end < 0:
            raise _BrokenError("it ends in the middle")
        return self.text(self.take(end + 1 - self.position)[:-1])

    @staticmethod
    def text(raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _BrokenError("a string is not valid UTF-8") from None

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise _BrokenError("a value is missing")
        return self.stack.pop()

    def pop_marked(self) -> list[Any]:
        if not self.below:
            raise _BrokenError("a mark is missing")
        items, self.stack = self.stack, self.below.pop()
        return items

    def top(self, kind: type[Any]) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise _BrokenError(f"a {kind.__name__} is missing")
        return self.stack[-1]

    # Operations with a part of their own, in the order of the table below.

    def protocol(self) -> None:
        version = self.take(1)[0]
        if version > 5:
            raise _BrokenError(f"protocol {version} is unknown")

    def frame(self) -> None:
        self.take(8)

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def long1(self) -> None:
        self.push(int.from_bytes(self.take(self.length(1)), "little", signed=True))

    def unicode(self) -> None:
        self.push(self.text(self.take(self.length(4))))

    def short_unicode(self) -> None:
        self.push(self.text(self.take(self.length(1))))

    def empty_list(self) -> None:
        self.push([])

    def empty_dict(self) -> None:
        self.push({})

    def tuple_marked(self) -> None:
        items = tuple(self.pop_marked())
        self.push(items)

    def tuple1(self) -> None:
        self.push((self.pop(),))

    def tuple2(self) -> None:
        second, first = self.pop(), self.pop()
        self.push((first, second))

    def tuple3(self) -> None:
        third, second, first = self.pop(), self.pop(), self.pop()
        self.push((first, second, third))

    def append(self) -> None:
        item = self.pop()
        self.top(list).append(item)

    def appends(self) -> None:
        items = self.pop_marked()
        self.top(list).extend(items)

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.store([key, value])

    def set_items(self) -> None:
        self.store(self.pop_marked())

    def store(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise _BrokenError("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Nested tuples and chosen large numbers can make hashing take for ever; no checkpoint has such keys.
            if type(key) is not str and not (type(key) is int and 0 <= key < 1 << 31):
                raise _BrokenError("a dictionary's key is neither a string nor a small whole number")
            target[key] = value

    def put1(self) -> None:
        self.remember(self.length(1))

    def put4(self) -> None:
        self.remember(self.length(4))

    def memoize(self) -> None:
        self.remember(len(self.memo))

    def remember(self, index: int) -> None:
        if not self.stack:
            raise _BrokenError("a value is missing")
        self.memo[index] = self.stack[-1]

    def get1(self) -> None:
        self.recall(self.length(1))

    def get4(self) -> None:
        self.recall(self.length(4))

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise _BrokenError(f"memo {index} is empty")
        self.push(self.memo[index])

    def global_lines(self) -> None:
        module, name = self.line(), self.line()
        self.find(module, name)

    def global_stack(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise _BrokenError("the name of a function must be a string")
        self.find(module, name)

    def find(self, module: str, name: str) -> None:
        known: object = _GLOBALS.get((module, name))
        if known is None and self.configuration:
            known = _IN_CONFIGURATIONS.get((module, name))
        if known is None:
            self.refuse(shown(f"{module}.{name}"))
        self.push(known)

    def persistent(self) -> None:
        """('storage', type, key, device, elements): how torch.save writes a storage."""
        match self.pop():
            case ("storage", _StorageType(dtype=dtype), str(key), str(), int(count)) if count >= 0:
                self.push(StorageRef(key, dtype, count))
            case _:
                raise _BrokenError("a storage is not described as PyTorch does")

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        match function, arguments:
            case _Function.ORDERED_DICT, ():
                self.push({})
            case _Function.SIZE, (sizes,):
                self.push(_naturals(sizes))
            case _Function.TENSOR, (StorageRef() as storage, int(offset), sizes, strides, *rest) if len(rest) in (2, 3):
                shape, stride = _naturals(sizes), _naturals(strides)
                if offset < 0 or len(shape) != len(stride):
                    raise _BrokenError("a tensor's offset, shape and strides do not fit together")
                self.push(TensorRef(storage, offset, shape, stride))
            case _Function.PARAMETER, (TensorRef() as tensor, _, _):
                self.push(tensor)
            case _Function(), _:
                raise _BrokenError(f"{function.name} has arguments of the wrong kind")
            case _:
                self.refuse(f"a call of {type(function).__name__}, which is no function")

    def new_object(self) -> None:
        arguments, cls = self.pop(), self.pop()
        if cls is not _Function.CONFIG or arguments != ():
            self.refuse("operation NEWOBJ, which builds objects")
        self.push({})

    def build(self) -> None:
        """Attributes of an OrderedDict, such as `_metadata` of `state_dict()`: versions of modules, not needed."""
        self.pop()
        self.top(dict)


def _naturals(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > _MAX_DIMENSIONS:
        raise _BrokenError("a tensor's shape is not a tuple of a few numbers")
    if not all(type(item) is int and 0 <= item < 1 << 63 for item in value):
        raise _BrokenError("a tensor's shape and strides must be whole numbers >= 0")
    return value


_CONSTANTS: Mapping[int, tuple[Any]] = MappingProxyType(
    {ord("N"): (None,), 0x88: (True,), 0x89: (False,), ord(")"): ((),)}
)
_NUMBERS: Mapping[int, str] = MappingProxyType({ord("J"): "<i", ord("K"): "<B", ord("M"): "<H", ord("G"): ">d"})
_METHODS = MappingProxyType(
    {
        0x80: _Machine.protocol,
        0x95: _Machine.frame,
        ord("("): _Machine.mark,
        0x8A: _Machine.long1,
        ord("X"): _Machine.unicode,
        0x8C: _Machine.short_unicode,
        ord("]"): _Machine.empty_list,
        ord("}"): _Machine.empty_dict,
        ord("t"): _Machine.tuple_marked,
        0x85: _Machine.tuple1,
        0x86: _Machine.tuple2,
        0x87: _Machine.tuple3,
        ord("a"): _Machine.append,
        ord("e"): _Machine.appends,
        ord("s"): _Machine.set_item,
        ord("u"): _Machine.set_items,
        ord("q"): _Machine.put1,
        ord("r"): _Machine.put4,
        0x94: _Machine.memoize,
        ord("h"): _Machine.get1,
        ord("j"): _Machine.get4,
        ord("c"): _Machine.global_lines,
        0x93: _Machine.global_stack,
        ord("Q"): _Machine.persistent,
        ord("R"): _Machine.reduce,
        0x81: _Machine.new_object,
        ord("b"): _Machine.build,
    }
)

"""What `native.py` does not declare of cpu/hanlin_cpu.h: operations on rows, key/value pools, steps, programs."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from hanlin.kernels import native
from hanlin.kernels.native import Weight

__all__ = ["AdapterStruct", "KVStruct", "LowRankStruct", "OpStruct", "StepStruct", "check", "library"]

_P, _I32, _I64, _F32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class KVStruct(ctypes.Structure):
    """hl_kv"""

    _fields_ = (
        ("kind", _I32),
        ("blocks", _I32),
        ("block_size", _I32),
        ("heads", _I32),
        ("head_size", _I32),
        ("data", _P),
    )


class StepStruct(ctypes.Structure):
    """hl_step"""

    _fields_ = (
        ("tokens", _I32),
        ("sequences", _I32),
        ("max_blocks", _I32),
        ("rows", _I32),
        ("top", _I32),
        ("states", _I32),
        ("ids", _P),
        ("cos", _P),
        ("sin", _P),
        ("slots", _P),
        ("query_start", _P),
        ("context", _P),
        ("block_table", _P),
        ("prefix_len", _P),
        ("row_index", _P),
        ("logits", _P),
        ("hidden", _P),
        ("top_values", _P),
        ("top_ids", _P),
        ("log_sum_exp", _P),
        ("adapters", _P),
        ("embeddings", _P),
        ("embedding_rows", _P),
        ("n_embeddings", _I32),
    )


class OpStruct(ctypes.Structure):
    """hl_op"""

    _fields_ = (
        ("code", _I32),
        ("in_", _I32),
        ("in2", _I32),
        ("out", _I32),
        ("weight", _I32),
        ("layer", _I32),
        ("flags", _I32),
        ("style", _I32),
        ("heads", _I32),
        ("kv_heads", _I32),
        ("head_size", _I32),
        ("rotary", _I32),
        ("table_kind", _I32),
        ("table_rows", _I32),
        ("eps", _F32),
        ("scale", _F32),
        ("gain", _P),
        ("bias", _P),
        ("table", _P),
    )


class LowRankStruct(ctypes.Structure):
    """hl_low_rank"""

    _fields_ = (("rank", _I32), ("taken", _I32), ("down", _P), ("up", _P), ("first", _P))


class AdapterStruct(ctypes.Structure):
    """hl_adapter"""

    _fields_ = (("n_ops", _I32), ("widest", _I32), ("bf16", _I32), ("ops", _P))


_KV, _STEP = ctypes.POINTER(KVStruct), ctypes.POINTER(StepStruct)
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "hl_norm": (_I32, (_P, _I32, _P, _I64, _I64, _I64, _P, _P, _F32, _P, _I64)),
    "hl_map": (_I32, (_P, _I32, _P, _I64, _P)),
    "hl_gate": (_I32, (_P, _I32, _P, _I64, _I64, _I64, _P, _I64)),
    "hl_rope": (_I32, (_P, _I32, _P, _I64, _I64, _I32, _I32, _I32, _P, _P)),
    "hl_top": (_I32, (_P, _P, _I64, _I64, _I64, _I32, _P, _P, _P)),
    "hl_kv_bytes": (_I64, (_I32, _I32, _I32, _I32, _I32)),
    "hl_kv_write": (_I32, (_P, _KV, _P, _I64, _P, _I64, _P, _I64)),
    "hl_kv_read": (_I32, (_P, _KV, _P, _I64, _P, _I64, _P, _I64)),
    "hl_kv_copy": (_I32, (_P, _KV, _P, _KV, _P, _I64)),
    "hl_attend": (_I32, (_P, _KV, _STEP, _I32, _F32, _P, _I64, _P, _I64)),
    "hl_program_create": (
        _I32,
        (
            _P,
            ctypes.POINTER(OpStruct),
            _I32,
            ctypes.POINTER(Weight),
            _I32,
            ctypes.POINTER(_I64),
            _I32,
            _KV,
            _I32,
            _I32,
            ctypes.POINTER(_P),
        ),
    ),
    "hl_program_free": (None, (_P,)),
    "hl_program_bytes": (_I64, (_P,)),
    "hl_program_run": (_I32, (_P, _STEP)),
    "hl_program_profile": (_I32, (_P, _P)),
    "hl_adapter_check": (_I32, (_P, ctypes.POINTER(AdapterStruct))),
}


@functools.cache  # the system keeps one copy of a library anyway
def library() -> ctypes.CDLL:
    """The compiled library with these functions declared.

    Raises:
        ConfigError: it is not there.
    """
    found = native._library()
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


def check(status: int) -> None:
    """Raise the error that a negative status stands for, with the library's message."""
    native._check(library(), status)

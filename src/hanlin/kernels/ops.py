"""Operations on rows through ctypes: norms, activations, rotations, selection among logits.

Arrays are float32, contiguous numpy arrays or torch tensors on the CPU. Results are numpy arrays. Bad shapes raise
ConfigError. A row's result does not depend on the other rows or on the number of threads.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import numpy as np

from hanlin.kernels.abi import check, library
from hanlin.kernels.native import Context, _pointer

__all__ = ["Function", "Norm", "RopeStyle", "Top", "apply", "gate", "norm", "rope", "top"]

Floats = np.ndarray[Any, np.dtype[np.float32]]


class Norm(enum.IntEnum):
    """hl_norm_kind"""

    RMS = 0
    LAYER = 1


class Function(enum.IntEnum):
    """hl_function; GELU is the tanh approximation."""

    EXP = 0
    SILU = 1
    GELU = 2


class RopeStyle(enum.IntEnum):
    """Which dimensions turn together, see hl_rope_style: halves of R, neighbours, or halves of each half of R."""

    HALVES = 0
    INTERLEAVED = 1
    QUARTERS = 2


class Top(NamedTuple):
    """The largest values of each row (rows, k) in falling order, their columns, and log(sum(exp(row))) (rows,)."""

    values: Floats
    ids: np.ndarray[Any, np.dtype[np.int32]]
    log_sum_exp: Floats


def norm(context: Context, x: Any, gain: Any = None, bias: Any = None, *, eps: float, kind: Norm = Norm.RMS) -> Floats:
    """RMSNorm or LayerNorm of x (rows, width), gain and bias (width,)."""
    rows, width = x.shape
    x_at = _pointer(x, "x", ("float32",), (rows, width))
    gain_at = None if gain is None else _pointer(gain, "gain", ("float32",), (width,))
    bias_at = None if bias is None else _pointer(bias, "bias", ("float32",), (width,))
    y = np.empty((rows, width), np.float32)
    check(
        library().hl_norm(context.handle, kind, x_at, width, rows, width, gain_at, bias_at, eps, y.ctypes.data, width)
    )
    return y


def apply(context: Context, function: Function, x: Any) -> Floats:
    """function(x), x (n,)."""
    x_at = _pointer(x, "x", ("float32",))
    y = np.empty(tuple(x.shape), np.float32)
    check(library().hl_map(context.handle, function, x_at, y.size, y.ctypes.data))
    return y


def gate(context: Context, function: Function, x: Any) -> Floats:
    """function(gate) * up with x (rows, 2 width) = gate | up."""
    rows, both = x.shape
    x_at = _pointer(x, "x", ("float32",))
    y = np.empty((rows, both // 2), np.float32)
    check(library().hl_gate(context.handle, function, x_at, both, rows, both // 2, y.ctypes.data, both // 2))
    return y


def rope(context: Context, style: RopeStyle, x: Any, cos: Any, sin: Any) -> None:
    """Turn the first R dimensions of x (tokens, heads, K) in place by the angles of cos and sin (tokens, R/2)."""
    tokens, heads, size = x.shape
    half = int(cos.shape[1])
    x_at = _pointer(x, "x", ("float32",))
    cos_at = _pointer(cos, "cos", ("float32",), (tokens, half))
    sin_at = _pointer(sin, "sin", ("float32",), (tokens, half))
    check(library().hl_rope(context.handle, style, x_at, heads * size, tokens, heads, size, 2 * half, cos_at, sin_at))


def top(context: Context, x: Any, k: int) -> Top:
    """The k largest of each row of x (rows, columns); k = 1 is argmax. Equal values: the lower column first."""
    rows, columns = x.shape
    x_at = _pointer(x, "x", ("float32",))
    found = Top(np.empty((rows, k), np.float32), np.empty((rows, k), np.int32), np.empty(rows, np.float32))
    addresses = (array.ctypes.data for array in found)
    check(library().hl_top(context.handle, x_at, columns, rows, columns, k, *addresses))
    return found

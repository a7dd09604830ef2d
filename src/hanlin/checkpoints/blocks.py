"""GGUF's block formats: how large a block is, and its values in float32.

A block holds the quantised values of 32 (or 256) neighbours of a row with their common scale, and some a minimum:
value = scale * q, or scale * q + minimum. Equal bit for bit to the `gguf` package's reference decoders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch

from hanlin.errors import CheckpointError

__all__ = ["BLOCKS", "dequantize"]

# Kind: (elements, bytes) of a block.
BLOCKS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"F64": (1, 8), "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "I64": (1, 8), "I32": (1, 4), "I16": (1, 2)}
    | {"I8": (1, 1), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34)}
    | {"Q8_1": (32, 40), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176)}
    | {"Q6_K": (256, 210), "Q8_K": (256, 292), "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66)}
    | {"IQ2_XS": (256, 74), "IQ2_S": (256, 82), "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_NL": (32, 18)}
    | {"IQ4_XS": (256, 136), "TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17), "NVFP4": (64, 36)}
    | {"Q1_0": (128, 18)}
)

# Elements decoded at once: they stay in a core's cache and drown the calls, and torch does not share out so few among
# its threads, whose waiting for each other costs more than they save, ten times so where others want the CPU too.
_AT_ONCE = 1 << 15

# Blocks (n, bytes) uint8 into values (n, elements) float32.
_Decoder = Callable[[torch.Tensor, torch.Tensor], None]


def dequantize(kind: str, data: npt.NDArray[np.uint8], shape: Sequence[int]) -> torch.Tensor:
    """The float32 values (shape) of stored blocks.

    Args:
        data: the blocks of the whole tensor, (nbytes,).

    Raises:
        CheckpointError: nothing here can decode `kind`.
    """
    elements, nbytes = BLOCKS[kind]
    decode = _DECODERS.get(kind) or _package_decoder(kind)
    blocks = data.reshape(-1, nbytes)
    values = torch.empty(math.prod(shape), dtype=torch.float32)
    rows = values.view(-1, elements)
    step = _AT_ONCE // elements
    for start in range(0, len(blocks), step):
        part = blocks[start : start + step]
        # torch can't hold read-only memory; a chunk's copy stays in the cache.
        decode(torch.from_numpy(part if part.flags.writeable else part.copy()), rows[start : start + step])
    return values.view(tuple(shape))


def _nibbles(packed: torch.Tensor, out: torch.Tensor) -> None:
    """(n, 16) bytes into (n, 32): the low halves first, then the high halves."""
    halves = out.view(-1, 2, 16)
    halves[:, 0] = packed & 15
    halves[:, 1] = packed >> 4


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """(n, 4) bytes into (n, 32): 16 where the bit is set, the lowest bit first."""
    bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)
    return (bits & 1).mul_(16).view(-1, 32)


def _half(packed: torch.Tensor) -> torch.Tensor:
    """(n, 2) bytes into float32 (n, 1)."""
    return packed.contiguous().view(torch.float16).float()


def _q4_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _nibbles(blocks[:, 2:], out)
    out.sub_(8).mul_(_half(blocks[:, :2]))


def _q4_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _nibbles(blocks[:, 4:], out)
    out.mul_(_half(blocks[:, :2])).add_(_half(blocks[:, 2:4]))


def _q5_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _nibbles(blocks[:, 6:], out)
    out.add_(_fifth_bits(blocks[:, 2:6])).sub_(16).mul_(_half(blocks[:, :2]))


def _q5_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _nibbles(blocks[:, 8:], out)
    out.add_(_fifth_bits(blocks[:, 4:8])).mul_(_half(blocks[:, :2])).add_(_half(blocks[:, 2:4]))


def _q8_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_half(blocks[:, :2]))


_DECODERS: Mapping[str, _Decoder] = MappingProxyType(
    {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0}
)


def _package_decoder(kind: str) -> _Decoder:
    """The other kinds: the `gguf` package's own decoders."""
    import gguf

    def decode(blocks: torch.Tensor, out: torch.Tensor) -> None:
        # The package works on sixteen rows at a time, which is slow where a row is a single block.
        rows = blocks.view(-1, 16 * blocks.shape[1]) if len(blocks) % 16 == 0 else blocks.view(1, -1)
        # Scales of a damaged or hostile file may be NaN or infinite; that is the model's business, not a warning.
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[kind])
        out.copy_(torch.from_numpy(values).view(out.shape))

    def refuse(blocks: torch.Tensor, out: torch.Tensor) -> None:
        raise CheckpointError(
            f"tensors of kind {kind} can't be decoded. Fetch the model in another one: Q4_K_M, Q6_K, Q8_0 or F16."
        )

    supported = kind in gguf.GGMLQuantizationType.__members__ and hasattr(gguf.quants, kind)
    return decode if supported else refuse

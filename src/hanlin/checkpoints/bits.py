"""Codes of a few bits in words of 32, lowest bits first: how every format of quantised weights packs them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["AWQ_ORDER", "pack", "pack_awq", "unpack", "unpack_awq", "words"]

# The column, of eight, that each nibble of AWQ's words holds. Source: the released AWQ and LMDeploy packers.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)


def words(count: int, bits: int) -> int:
    """How many words `count` codes take."""
    return -(-count * bits // 32)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 (..., words) -> uint8 (..., count): code i begins at bit i * bits, and may cross words (3 bits do)."""
    # Not `contiguous`, which leaves a dimension of one whatever stride it has, and `view` refuses that.
    octets = packed.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return octets[..., :count]
    if bits == 4:
        return torch.stack((octets & 15, octets >> 4), -1).flatten(-2)[..., :count]
    single = (octets[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    weights = 1 << torch.arange(bits, dtype=torch.uint8)
    flat = single.flatten(-2)
    flat = flat[..., : flat.shape[-1] // bits * bits]
    flat = flat.reshape(*flat.shape[:-1], -1, bits)
    return (flat * weights).sum(-1, dtype=torch.uint8)[..., :count]


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 (..., count), of 4 or 8 bits -> int32 (..., words); what is over in the last word is 0."""
    assert bits in (4, 8)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % (32 // bits)))
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes.clone(memory_format=torch.contiguous_format).view(torch.int32)


def unpack_awq(packed: Tensor) -> Tensor:
    """int32 (rows, out / 8) -> uint8 (rows, out), AWQ's order within a word undone."""
    nibbles = unpack(packed, 4, packed.shape[-1] * 8).view(*packed.shape, 8)
    return nibbles[..., list(_AWQ_NIBBLE)].flatten(-2)


def pack_awq(codes: Tensor) -> Tensor:
    """uint8 (rows, out), out a multiple of 8 -> int32 (rows, out / 8) in AWQ's order."""
    eights = codes.reshape(*codes.shape[:-1], -1, 8)
    return pack(eights[..., list(AWQ_ORDER)].flatten(-2), 4)

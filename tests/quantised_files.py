"""Quantised matrices as other programs store them, packed one code at a time from what the formats say.

Slow and plain on purpose: the readers and writers under test share nothing with it.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["CONFIGS", "make", "stream"]

_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
_COMPRESSED = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
# What `config.json` says of each.
CONFIGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq_v2"},
    "gptq_order": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True},
    "gptq_3": {"quant_method": "gptq", "bits": 3, "group_size": -1, "sym": False},
    "gptq_8": {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": True},
    "compressed": {
        **_COMPRESSED,
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}},
    },
    "compressed_8": {
        **_COMPRESSED,
        "format": "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}}},
    },
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_twice": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


def stream(codes: np.ndarray[Any, Any], bits: int) -> Tensor:
    """Codes (n, count) one after the other in a number without end, cut into int32 (n, words)."""
    rows = []
    for row in codes.tolist():
        whole = sum(code << (bits * place) for place, code in enumerate(row))
        rows.append([whole >> (32 * word) & 0xFFFFFFFF for word in range(-(-len(row) * bits // 32))])
    return torch.from_numpy(np.array(rows, np.uint32).view(np.int32))


def make(form: str, shape: tuple[int, int], seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors by the end of their names, of random codes (out, in), and the values that they stand for."""
    rng = np.random.default_rng(seed)
    if form.startswith("nf4"):
        return _nf4(shape, rng, twice=form == "nf4_twice")
    out, in_ = shape
    config = CONFIGS[form]
    bits = {"awq": 4, "int8": 8, "compressed": 4, "compressed_8": 8}.get(form) or config["bits"]
    size = in_ if form in ("gptq_3", "int8", "compressed_8") else 32
    groups, most, middle = in_ // size, 1 << bits, 1 << (bits - 1)
    # The extreme codes are there whatever the seed.
    codes = rng.integers(0, most, (out, in_))
    codes[:, 0], codes[:, 1] = 0, most - 1
    scales = rng.uniform(0.002, 0.004, (out, groups)).astype(np.float16)
    zeros = np.full((out, groups), middle)
    if form in ("awq", "gptq", "gptq_3", "compressed"):
        zeros = rng.integers(1, most, (out, groups))
    index = rng.permutation(in_) // size if form == "gptq_order" else np.arange(in_) // size
    values = (codes - zeros[:, index]) * scales[:, index].astype(np.float64)
    tensors = _packed(form, codes, zeros, torch.from_numpy(scales), index, bits)
    if form == "int8":
        values = (codes - 128) * (tensors["SCB"].double() / 127).numpy()[:, None]
    return tensors, torch.from_numpy(values).float()


def _packed(form: str, codes: Any, zeros: Any, scales: Tensor, index: Any, bits: int) -> dict[str, Tensor]:
    out, in_ = codes.shape
    if form == "awq":
        swap = np.arange(out).reshape(-1, 8)[:, _AWQ].reshape(-1)
        packed = {"qweight": stream(codes.T[:, swap], 4), "qzeros": stream(zeros.T[:, swap], 4)}
        return packed | {"scales": scales.T.contiguous()}
    if form.startswith("gptq"):
        less = 0 if form == "gptq_v2" else 1
        packed = {"qweight": stream(codes, bits).T.contiguous(), "qzeros": stream(zeros.T - less, bits)}
        return packed | {"scales": scales.T.contiguous(), "g_idx": torch.from_numpy(index).int()}
    if form == "compressed":
        packed = {"weight_packed": stream(codes, 4), "weight_zero_point": stream(zeros.T, 4).T.contiguous()}
        return packed | {"weight_scale": scales, "weight_shape": torch.tensor([out, in_])}
    signed = torch.from_numpy((codes - 128).astype(np.int8))
    if form == "compressed_8":
        return {"weight": signed, "weight_scale": scales}
    return {"weight": signed, "SCB": scales[:, 0].float() * 10, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def _nf4(shape: tuple[int, int], rng: Any, *, twice: bool) -> tuple[dict[str, Tensor], Tensor]:
    count, block, outer = shape[0] * shape[1], 64, 256
    table = np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
    codes = rng.integers(0, 16, count)
    packed = np.array([codes[i] << 4 | codes[i + 1] for i in range(0, count, 2)], np.uint8)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
    scales = rng.uniform(0.02, 0.1, -(-count // block)).astype(np.float32)
    tensors = {"weight": torch.from_numpy(packed).view(-1, 1), "weight.quant_map": torch.from_numpy(table)}
    if twice:
        nested_table = np.linspace(-1, 1, 256, dtype=np.float32)
        nested = rng.integers(128, 256, len(scales))
        nested_scales = rng.uniform(0.05, 0.1, -(-len(scales) // outer)).astype(np.float32)
        state |= {"nested_blocksize": outer, "nested_dtype": "float32", "nested_offset": 0.03}
        scales = nested_table[nested] * nested_scales[np.arange(len(scales)) // outer] + np.float32(0.03)
        tensors["weight.absmax"] = torch.from_numpy(nested.astype(np.uint8))
        tensors["weight.nested_absmax"] = torch.from_numpy(nested_scales)
        tensors["weight.nested_quant_map"] = torch.from_numpy(nested_table)
    else:
        tensors["weight.absmax"] = torch.from_numpy(scales)
    text = json.dumps(state).encode()
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors, torch.from_numpy(table[codes] * scales[np.arange(count) // block]).view(shape)

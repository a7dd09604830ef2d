"""Quantised matrices under the names and in the layouts that other programs load, and their configuration."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from hanlin.checkpoints.bits import pack, pack_awq
from hanlin.checkpoints.row_quantised import packed
from hanlin.compress.grid import Grid, Quantised, RowGrid

__all__ = ["FORMATS", "Format", "configuration", "problems_of", "tensors"]

Format = Literal["awq", "gptq", "compressed-tensors", "chatglm"]
FORMATS: tuple[Format, ...] = ("awq", "gptq", "compressed-tensors", "chatglm")


def problems_of(form: Format, grid: Grid, shapes: dict[str, tuple[int, int]]) -> list[str]:
    """Why matrices of these shapes (out, in) can't be written so."""
    found: list[str] = []
    if isinstance(grid, RowGrid):
        odd = [name for name, (_, in_) in shapes.items() if form == "chatglm" and in_ * grid.bits % 8]
        return [f"'{name}' has an odd number of columns" for name in odd]
    if form == "awq" and (grid.bits != 4 or grid.symmetric):
        found.append("AWQ's files have 4 bits and zero points")
    if form != "gptq":  # whose last group may be shorter
        wrong = sorted({in_ for _, in_ in shapes.values() if in_ % grid.group})
        found += [f"{in_} columns are not a multiple of --group-size {grid.group}" for in_ in wrong]
    step = 8 if form == "awq" else 32 // grid.bits
    found += [f"'{name}' has {out} rows, not a multiple of {step}" for name, (out, _) in shapes.items() if out % step]
    return found


def tensors(form: Format, grid: Grid, quantised: Quantised) -> dict[str, Tensor]:
    """By the end of its name, what stands for one matrix."""
    codes, scales, zeros = quantised.codes, quantised.scales.half(), quantised.zeros.byte()
    if isinstance(grid, RowGrid):
        numbers = (codes.short() - grid.middle).to(torch.int8)
        if form == "chatglm":
            return {"weight": packed(numbers, grid.bits), "weight_scale": scales.flatten()}
        return {"weight": numbers, "weight_scale": scales}
    if form == "awq":
        words = {"qweight": pack_awq(codes.t().contiguous()), "qzeros": pack_awq(zeros.t().contiguous())}
        return words | {"scales": scales.t().contiguous()}
    if form == "gptq":
        columns = torch.arange(codes.shape[1], dtype=torch.int32)
        return {
            "qweight": pack(codes, grid.bits).t().contiguous(),
            "qzeros": pack((zeros - 1).t().contiguous(), grid.bits),  # its first version stores them less one
            "scales": scales.t().contiguous(),
            "g_idx": columns // grid.group,
        }
    out = {"weight_packed": pack(codes, grid.bits), "weight_scale": scales, "weight_shape": torch.tensor(codes.shape)}
    if not grid.symmetric:
        out["weight_zero_point"] = pack(zeros.t().contiguous(), grid.bits).t().contiguous()
    return out


def configuration(form: Format, grid: Grid, kept: list[str]) -> dict[str, Any]:
    """The keys of `config.json` that say how; `kept` are linear layers that stay as they are."""
    if form == "chatglm":
        return {"quantization_bit": grid.bits}
    return {"quantization_config": _configuration(form, grid, kept)}


def _configuration(form: Format, grid: Grid, kept: list[str]) -> dict[str, Any]:
    if form == "awq":
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": grid.bits,
            "group_size": grid.group,
            "zero_point": True,
            "modules_to_not_convert": kept,
        }
    if form == "gptq":
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": grid.bits,
            "group_size": grid.group,
            "sym": grid.symmetric,
            "desc_act": False,
            "lm_head": False,
        }
    weights: dict[str, Any] = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "group",
        "group_size": grid.group,
        "dynamic": False,
    }
    scheme: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if isinstance(grid, RowGrid):
        weights |= {"strategy": "channel", "group_size": None}
        scheme["input_activations"] = weights | {"strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if isinstance(grid, RowGrid) else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": kept,
        "config_groups": {"group_0": scheme},
    }

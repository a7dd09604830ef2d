"""One layer: what comes into its linear layers, and those put in place of it by a method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hanlin.compress.grid import Grid, Quantised
from hanlin.compress.methods import Inputs, balancing, output_error, smoothing
from hanlin.compress.rounding import passed_on, refined
from hanlin.layers.linear import Linear
from hanlin.layers.norm import RMSNorm
from hanlin.models.parts import BlockParts

__all__ = ["Change", "Method", "quantise_layer", "watched"]

Method = Literal["rtn", "awq", "gptq", "smoothquant"]


@dataclass(frozen=True)
class Change:
    """What became of a linear layer.

    Attributes:
        error: squared error of its outputs, as a share of their squares; of the weights, where there was no text.
        nearest: the same, had it only been rounded.
    """

    linear: Linear
    quantised: Quantised
    error: float
    nearest: float


@contextmanager
def watched(parts: BlockParts) -> Iterator[list[tuple[tuple[Linear, ...], Inputs]]]:
    """Collect what comes into each group of linear layers that share an input, while the block runs."""
    groups = (parts.qkv, (parts.out,), parts.gate_up, (parts.down,))
    watching = [(linears, Inputs(linears[0].in_features)) for linears in groups]
    with ExitStack() as hooks:
        for (first, *_), inputs in watching:

            def hook(_: nn.Module, arguments: tuple[Tensor, ...], inputs: Inputs = inputs) -> None:
                inputs.add(arguments[0].flatten(0, -2))

            hooks.callback(first.register_forward_pre_hook(hook).remove)
        yield watching


def quantise_layer(
    parts: BlockParts, watching: list[tuple[tuple[Linear, ...], Inputs]] | None, method: Method, grid: Grid
) -> list[Change]:
    """Quantise every linear layer of a block, in place: it then computes with what the file will hold."""
    if watching is None:
        groups = (parts.qkv, (parts.out,), parts.gate_up, (parts.down,))
        return [_put(linear, grid.quantise(linear.weight), None, grid) for group in groups for linear in group]
    before = {linear: grid.nearest(linear.weight) - linear.weight for linears, _ in watching for linear in linears}
    nearest = {
        linear: output_error(before[linear], inputs.gram) / _size(linear, inputs)
        for linears, inputs in watching
        for linear in linears
    }
    del before
    if method in ("awq", "smoothquant"):
        _smooth(parts, watching, method, grid)
    changes = []
    for linears, inputs in watching:
        for linear, quantised in zip(linears, _quantised(linears, inputs, method, grid), strict=True):
            change = _put(linear, quantised, inputs, grid)
            changes.append(Change(linear, quantised, change.error, nearest[linear]))
    return changes


def _quantised(linears: tuple[Linear, ...], inputs: Inputs, method: Method, grid: Grid) -> list[Quantised]:
    """Layers that share an input at once: rows have nothing to do with each other."""
    weight = torch.cat([linear.weight for linear in linears])
    if method in ("awq", "gptq"):
        gram = inputs.damped()
        quantised = refined(weight, gram, grid, passed_on(weight, gram, grid))
    else:
        quantised = grid.quantise(weight)
    rows = [linear.out_features for linear in linears]
    return [Quantised(*parts) for parts in zip(*(torch.split(tensor, rows) for tensor in quantised), strict=True)]


def _smooth(parts: BlockParts, watching: list[tuple[tuple[Linear, ...], Inputs]], method: Method, grid: Grid) -> None:
    """Factors into the norms before q, k, v and before gate and up; AWQ's also into up before down."""
    norms = (parts.attention_norm, None, parts.mlp_norm, None)
    for (linears, inputs), norm in zip(watching, norms, strict=True):
        if isinstance(norm, RMSNorm):
            weights = [linear.weight for linear in linears]
            factors = smoothing(weights, inputs, grid) if method == "awq" else balancing(weights, inputs)
            # The norm is stored as float16, and what it then does is what the columns have to undo.
            weight = (norm.weight / factors).half().float()
            factors = torch.where(weight == 0, torch.ones_like(factors), norm.weight / weight)
            norm.weight.copy_(torch.where(weight == 0, norm.weight, weight))
            _multiply(linears, inputs, factors)
    if method == "awq" and parts.activation == "silu_mul":
        downs, inputs = watching[3]
        factors = smoothing([parts.down.weight], inputs, grid)
        up, rows = parts.gate_up[-1], slice(-parts.down.in_features, None)  # fused, up comes after gate
        up.weight[rows].div_(factors[:, None])
        if up.bias is not None:
            up.bias[rows].div_(factors)
        _multiply(downs, inputs, factors)


def _multiply(linears: tuple[Linear, ...], inputs: Inputs, factors: Tensor) -> None:
    for linear in linears:
        linear.weight.mul_(factors)
    inputs.scale(factors)


def _size(linear: Linear, inputs: Inputs) -> float:
    return max(output_error(linear.weight, inputs.gram), 1e-30)


def _put(linear: Linear, quantised: Quantised, inputs: Inputs | None, grid: Grid) -> Change:
    values = grid.values(quantised)
    off = values - linear.weight
    if inputs is None:
        error = float(off.square().sum() / linear.weight.square().sum().clamp(min=1e-30))
    else:
        error = output_error(off, inputs.gram) / _size(linear, inputs)
    linear.weight.copy_(values)
    return Change(linear, quantised, error, error)

"""Packed weights and their products: every kind, on every instruction set that this CPU has."""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.errors import CapacityError, CheckpointError, ConfigError
from hanlin.kernels import native
from hanlin.kernels.native import ADD, GELU, SILU_MUL, Arena, Context, Kind, PackedWeight, Source

pytestmark = pytest.mark.skipif(
    not native.library_path().exists(), reason="the CPU library is not built: python -m hanlin.kernels.build"
)

ISAS = ("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2_vnni", "avx2", "neon", "portable")
KINDS = (
    (Kind.F32, 0),
    (Kind.BF16, 0),
    (Kind.INT8_ROW, 0),
    *((kind, group) for kind in (Kind.INT8, Kind.INT4, Kind.INT4_MIN, Kind.INT4_ZERO) for group in (32, 64, 128)),
)
INTEGER_KINDS = tuple(pair for pair in KINDS if pair[0] >= Kind.INT8_ROW)
# Shapes that a kind might stumble over: one output, a tile but for one, a tile and one, a few tiles.
SHAPES = ((1, 128), (31, 128), (33, 256), (100, 384))

Array = np.ndarray[Any, Any]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if name not in native.supported_isas():
        pytest.skip(f"{name}: not compiled, or not on this CPU")
    return name


@pytest.fixture
def context(isa: str) -> Iterator[Context]:
    with Context(2, isa) as opened:
        yield opened


@pytest.fixture
def best() -> Iterator[Context]:
    with Context(2) as opened:
        yield opened


def packed(context: Context, kind: Kind, group: int, matrix: Array) -> PackedWeight:
    weight = PackedWeight(kind, *matrix.shape, group)
    context.pack(weight, matrix)
    return weight


def to_bf16(x: Array) -> Array:
    return torch.from_numpy(x).bfloat16().float().numpy()


def rounded(kind: Kind, x: Array) -> Array:
    """What a product multiplies instead of x, in float64: written down anew from the header's description."""
    if kind == Kind.F32:
        return x.astype(np.float64)
    if kind == Kind.BF16:
        return to_bf16(x).astype(np.float64)
    top = np.abs(x).max(-1, keepdims=True)
    inverse = np.divide(np.float32(32512), top, out=np.zeros_like(top), where=top >= np.float32(1e-30))
    codes = np.rint(x * inverse).astype(np.int64)
    codes += codes % 256 == 128
    return codes * (top / np.float32(32512)).astype(np.float64)


def parts_of(weight: PackedWeight) -> tuple[Array, Array, Array, Array]:
    """Units (out, 1), scales and offsets (out, groups), codes (out, groups, group), in float64, by the header's layout:
    w = scale * code + offset, with int4 codes in -8..7."""
    tiles, groups, subs = math.ceil(weight.out / 32), weight.in_ // weight.group, weight.group // 32
    data = np.frombuffer(weight.memory, np.uint8).reshape(tiles, -1)
    units = data[:, :128].copy().view(np.float32).reshape(-1, 1).astype(np.float64)
    data = data[:, 128:].reshape(tiles, groups, -1)
    header = 128 if weight.kind.offsets else 64
    numbers = data[..., :header].copy().view(np.float16).astype(np.float64).reshape(tiles, groups, -1, 32)
    scales, *more = np.moveaxis(numbers, (2, 0, 3, 1), (0, 1, 2, 3)).reshape(-1, tiles * 32, groups)
    body = data[..., header:]
    if weight.kind == Kind.INT8:
        quads = body.reshape(tiles, groups, subs, 8, 2, 16, 4)
        codes = quads.transpose(0, 4, 5, 1, 2, 3, 6).reshape(tiles * 32, groups, -1).astype(np.float64) - 128
    else:
        pairs = body.reshape(tiles, groups, subs, 4, 2, 16, 4)
        both = np.stack((pairs & 15, pairs >> 4), -2)
        codes = both.transpose(0, 4, 5, 1, 2, 3, 6, 7).reshape(tiles * 32, groups, -1).astype(np.float64) - 8
    offsets = np.zeros_like(scales)
    if weight.kind == Kind.INT4_MIN:
        offsets = more[0] + 8 * scales
    elif weight.kind == Kind.INT4_ZERO:
        offsets = scales * (8 - more[0])
    return tuple(part[: weight.out] for part in (units, scales, offsets, codes))  # type: ignore[return-value]


def multiplied(context: Context, weight: PackedWeight) -> Array:
    """What a product multiplies instead of the weights, in float64: whole multiples of each row's unit."""
    values = context.unpack(weight).astype(np.float64)
    if not weight.kind.grouped:
        return values
    units, scales, offsets, codes = parts_of(weight)
    np.testing.assert_allclose(
        (scales[..., None] * codes + offsets[..., None]).reshape(values.shape), values, atol=1e-6
    )
    inverse = np.float32(1) / units.astype(np.float32)  # scales / 254 are no power of two: where halves go is float32's
    multiples = [np.rint(part.astype(np.float32) * inverse).astype(np.float64)[..., None] for part in (scales, offsets)]
    whole = multiples[0] * codes + multiples[1]
    assert np.abs(whole).max() <= 32512
    if weight.kind == Kind.INT8:
        np.testing.assert_allclose(units[:, 0], np.abs(scales).max(1) / 254, rtol=1e-6)
    else:  # a power of two, and no smaller one would do
        assert (np.frexp(units)[0] == 0.5).all()
        ends = np.abs(np.stack((offsets - 8 * scales, offsets + 7 * scales, 8 * scales))).max((0, 2))
        assert (ends / units[:, 0] <= 32504).all() and (2 * ends / units[:, 0] >= 32503).all()
    return (whole * units[..., None]).reshape(values.shape)


def close(got: Array, x: Array, matrix: Array, bias: Array | None = None) -> None:
    """`got` is x @ matrix.T + bias in float64, up to float32's rounding of a sum of so many terms."""
    expected = x @ matrix.astype(np.float64).T
    magnitude = np.abs(x) @ np.abs(matrix.astype(np.float64)).T
    if bias is not None:
        expected, magnitude = expected + bias, magnitude + np.abs(bias)
    assert not np.isnan(got).any()
    np.testing.assert_array_less(np.abs(got - expected), 2e-6 * magnitude + 1e-30)


# ---- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "group"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_product_equals_float64(context: Context, kind: Kind, group: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(list(shape))
    weight = packed(context, kind, group, rng.standard_normal(shape, dtype=np.float32) * 0.05)
    bias = rng.standard_normal(shape[0], dtype=np.float32)
    for rows in (1, 2, 7, 13, 25):
        x = rng.standard_normal((rows, shape[1]), dtype=np.float32) * np.float32(10.0 ** rng.integers(-3, 3))
        close(context.linear(weight, x, bias=bias), rounded(kind, x), multiplied(context, weight), bias)


@pytest.mark.parametrize(("kind", "group"), INTEGER_KINDS)
def test_rounding_loses_next_to_nothing(best: Context, kind: Kind, group: int) -> None:
    rng = np.random.default_rng(2)
    matrix = rng.standard_normal((64, 256), dtype=np.float32) * np.exp(rng.standard_normal((64, 1), dtype=np.float32))
    weight = packed(best, kind, group, matrix)
    x = rng.standard_normal((9, 256), dtype=np.float32) * np.exp(rng.standard_normal((9, 256), dtype=np.float32))
    x[:, 7] *= 50  # an outlier, as trained models have them
    expected = x.astype(np.float64) @ best.unpack(weight).astype(np.float64).T
    error = np.abs(best.linear(weight, x) - expected)
    most = 4e-3 if kind == Kind.INT8 else 2e-4  # scales of 8 bits, or of 12
    assert np.sqrt((error**2).mean()) < most * np.sqrt((expected**2).mean())


@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16, Kind.INT8_ROW])
@pytest.mark.parametrize("width", [1, 2, 31, 33, 47, 65])
def test_ungrouped_kinds_take_any_width(context: Context, kind: Kind, width: int) -> None:
    rng = np.random.default_rng(width)
    weight = packed(context, kind, 0, rng.standard_normal((40, width), dtype=np.float32))
    x = rng.standard_normal((5, width), dtype=np.float32)
    close(context.linear(weight, x), rounded(kind, x), context.unpack(weight))


@pytest.mark.parametrize(("kind", "group"), INTEGER_KINDS)
def test_integer_kinds_are_the_same_on_every_instruction_set(kind: Kind, group: int) -> None:
    rng = np.random.default_rng(3)
    matrix, x = rng.standard_normal((70, 256), dtype=np.float32), rng.standard_normal((43, 256), dtype=np.float32)
    results = []
    for name in native.supported_isas():
        with Context(1, name) as context:
            results.append(context.linear(packed(context, kind, group, matrix), x))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@pytest.mark.parametrize("width", [128, 4096])
def test_extreme_codes_do_not_saturate(context: Context, width: int) -> None:
    x = np.full((20, width), 5.0, dtype=np.float32)  # every code 32512
    x[1] *= -1
    x[2, 1:] = 5.0 / 32512 * 32511  # and every low byte at its end
    x[3, 1:] = 5.0 / 32512 * -32383
    for kind, codes in (
        (Kind.INT8, (0, 1, 255)),
        (Kind.INT4, (0, 15)),
        (Kind.INT4_ZERO, (0, 15)),
        (Kind.INT4_MIN, (0, 15)),
    ):
        for code in codes:
            weight = PackedWeight(kind, 32, width, 32)
            scales = np.full((32, width // 32), 0.9375, dtype=np.float16)
            zeros = np.full(scales.shape, 3, dtype=np.float16) if kind.offsets else None
            context.pack_codes(weight, np.full((32, width), code, dtype=np.uint8), scales, zeros)
            close(context.linear(weight, x), rounded(kind, x), multiplied(context, weight))


@pytest.mark.parametrize("kind", [Kind.INT8_ROW, Kind.INT8, Kind.INT4_MIN])
def test_the_longest_rows(best: Context, kind: Kind) -> None:
    """Sums of as many of the largest products as there may be, on tiles (up to 32,768 inputs) and beside them."""
    group = 0 if kind == Kind.INT8_ROW else 32
    for width in (32768, 65536):
        weight, x = PackedWeight(kind, 32, width, group), np.full((20, width), -3.0, dtype=np.float32)
        scales = np.ones((32, width // 32), np.float16) if group else np.ones(32, np.float32)
        zeros = np.ones_like(scales) if kind.offsets else None
        best.pack_codes(weight, np.full((32, width), 15 if kind.offsets else 255, dtype=np.uint8), scales, zeros)
        close(best.linear(weight, x), rounded(kind, x), multiplied(best, weight))
        np.testing.assert_array_equal(best.linear(weight, x[:1])[0], best.linear(weight, x)[7])
    with pytest.raises(ConfigError, match="integer kinds take up to 65536 inputs"):
        PackedWeight(kind, 32, 65536 + 32, group)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_row_has_one_result(data: st.DataObject) -> None:
    """Whatever its company, its place, the number of threads, and which path the row count takes."""
    kind, group = data.draw(st.sampled_from(KINDS), "kind")
    name = data.draw(st.sampled_from(native.supported_isas()), "isa")
    out = data.draw(st.integers(1, 140), "out")
    width = data.draw(st.integers(1, 3), "groups") * (group or 32)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    matrix = rng.standard_normal((out, width), dtype=np.float32)
    rows = data.draw(st.integers(1, 30), "rows")
    x = rng.standard_normal((rows, width), dtype=np.float32)
    with Context(1, name) as context:
        weight = packed(context, kind, group, matrix)
        alone = np.concatenate([context.linear(weight, x[i : i + 1]) for i in range(rows)])
    order = rng.permutation(rows)
    with Context(data.draw(st.integers(1, 5), "threads"), name) as context:
        again = packed(context, kind, group, matrix)
        assert bytes(again.memory) == bytes(weight.memory)
        np.testing.assert_array_equal(context.linear(again, x[order]), alone[order])


@pytest.mark.parametrize(("kind", "group"), KINDS)
@pytest.mark.parametrize("width", [128, 1152])
def test_many_rows_equal_few(best: Context, kind: Kind, group: int, width: int) -> None:
    """Whether matrix units or vectors compute them, and however many rows they take at a time."""
    rng = np.random.default_rng(5)
    weight = packed(best, kind, group, rng.standard_normal((165, width), dtype=np.float32))
    x = rng.standard_normal((275, width), dtype=np.float32) * np.exp(rng.standard_normal((275, 1), dtype=np.float32))
    x[7, :40] = 1e-40  # denormal
    many = np.full((277, 165), 5, dtype=np.float32)
    best.linear(weight, x, out=many[1:-1])
    assert (many[[0, -1]] == 5).all()
    first = 1
    for rows in (1, 3, 6, 7, 8, 9, 12, 13, 16, 17, 31, 33, 64):
        few = best.linear(weight, x[first - 1 : first - 1 + rows])
        np.testing.assert_array_equal(few, many[first : first + rows])
        first += rows
    close(many[1:-1], rounded(kind, x), multiplied(best, weight))


@pytest.mark.parametrize("width", [33, 47, 640])
def test_matrix_units_round_bfloat16_as_vectors_do(width: int) -> None:
    """Few rows are computed in float32 as AMX's tiles compute many, tiny numbers too."""
    if "amx" not in native.supported_isas():
        pytest.skip("amx: not compiled, or not on this CPU")
    rng = np.random.default_rng(width)
    patterns = rng.integers(0, 1 << 16, (2, 96, width), dtype=np.uint32)
    exponents = rng.integers(0, 254, (2, 96, 1), dtype=np.uint32)  # of a row: not all so wide apart that one decides
    exponents = np.minimum(254, exponents + rng.integers(0, 3, (2, 96, width), dtype=np.uint32))
    values = ((patterns & 0x807F | exponents << 7) << 16).view(np.float32)
    with Context(2, "amx") as context:
        weight = packed(context, Kind.BF16, 0, values[0])
        many = context.linear(weight, values[1])
        few = np.concatenate([context.linear(weight, values[1, i : i + 3]) for i in range(0, 96, 3)])
    np.testing.assert_array_equal(few, many)


@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_writes_its_result_and_nothing_else(context: Context, kind: Kind, group: int) -> None:
    rng = np.random.default_rng(6)
    weight = packed(context, kind, group, rng.standard_normal((45, 128), dtype=np.float32))
    x = rng.standard_normal((4, 128), dtype=np.float32)
    poisoned = np.full((6, 45), np.nan, dtype=np.float32)
    poisoned[0] = poisoned[-1] = 123.0
    context.linear(weight, x, out=poisoned[1:-1])
    assert (poisoned[0] == 123).all() and (poisoned[-1] == 123).all()
    assert not np.isnan(poisoned).any()


# ---- what follows a product -----------------------------------------------------------------------------------------


def test_add(context: Context) -> None:
    rng = np.random.default_rng(7)
    weight = packed(context, Kind.INT4, 32, rng.standard_normal((50, 64), dtype=np.float32))
    x, before = rng.standard_normal((3, 64), dtype=np.float32), rng.standard_normal((3, 50), dtype=np.float32)
    bias = rng.standard_normal(50, dtype=np.float32)
    expected = before + context.linear(weight, x, bias=bias)
    np.testing.assert_array_equal(context.linear(weight, x, bias=bias, flags=ADD, out=before), expected)


def test_gelu(context: Context) -> None:
    x = np.linspace(-12, 12, 301, dtype=np.float32)[:, None]
    weight = packed(context, Kind.F32, 0, np.ones((1, 1), dtype=np.float32))
    expected = torch.nn.functional.gelu(torch.from_numpy(x).double(), approximate="tanh").numpy()
    np.testing.assert_allclose(context.linear(weight, x, flags=GELU), expected, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize(("kind", "group"), [(Kind.F32, 0), (Kind.INT8, 32), (Kind.INT4_MIN, 32)])
def test_gate_and_up_in_one_weight(context: Context, kind: Kind, group: int) -> None:
    rng = np.random.default_rng(8)
    gate, up = rng.standard_normal((2, 48, 64), dtype=np.float32)
    x = rng.standard_normal((9, 64), dtype=np.float32)
    x[0] *= 100  # both ends of the exponential
    weight = PackedWeight(kind, 96, 64, group)
    place = np.arange(48, dtype=np.int32)
    place = place // 16 * 32 + place % 16
    context.pack(weight, gate, place=place)
    context.pack(weight, up, place=place + 16)
    got = context.linear(weight, x, flags=SILU_MUL)
    g = torch.from_numpy(context.linear(packed(context, kind, group, gate), x)).double()
    u = torch.from_numpy(context.linear(packed(context, kind, group, up), x)).double()
    expected = (torch.nn.functional.silu(g) * u).numpy()
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6)
    twice = context.linear(weight, x, flags=SILU_MUL | ADD, out=got.copy())
    np.testing.assert_array_equal(twice, got + got)


# ---- values on the edge ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_zeros_and_unpacked_weights_give_zero(context: Context, kind: Kind, group: int) -> None:
    x = np.random.default_rng(9).standard_normal((3, 128), dtype=np.float32)
    zeros = np.zeros((40, 128), dtype=np.float32)
    assert (context.linear(PackedWeight(kind, 40, 128, group), x) == 0).all()
    weight = packed(context, kind, group, zeros)
    assert (context.linear(weight, x) == 0).all()
    assert (context.unpack(weight) == 0).all()
    filled = packed(context, kind, group, zeros + 1)
    assert (context.linear(filled, zeros[:3]) == 0).all()
    assert (context.linear(filled, zeros[:3] + np.float32(1e-38)) < 1e-30).all()


@pytest.mark.parametrize(("kind", "group"), KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_input_stays_in_its_row(context: Context, kind: Kind, group: int, value: float) -> None:
    rng = np.random.default_rng(10)
    weight = packed(context, kind, group, rng.standard_normal((33, 128), dtype=np.float32))
    x = rng.standard_normal((5, 128), dtype=np.float32)
    expected = context.linear(weight, x)
    x[2, 77] = value
    got = context.linear(weight, x)
    assert not np.isfinite(got[2]).any()
    rest = [0, 1, 3, 4]
    np.testing.assert_array_equal(got[rest], expected[rest])


# ---- packing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "group"), INTEGER_KINDS)
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 1e3])
def test_quantising_rounds_to_nearest(best: Context, kind: Kind, group: int, size: float) -> None:
    matrix = np.random.default_rng(11).standard_normal((35, 256), dtype=np.float32) * np.float32(size)
    restored = best.unpack(packed(best, kind, group, matrix))
    groups = matrix.reshape(35, -1, group or 256)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    top = np.maximum(-low, high)
    step = {Kind.INT8_ROW: top / 127, Kind.INT8: top / 127, Kind.INT4: top / 8}.get(kind, (high - low) / 15)
    # INT4 reaches -8..7 steps, so the far end may be cut by one; float16 scales are off by 2^-11, tiny ones by 2^-25.
    allowed = step * {Kind.INT4: 1.0, Kind.INT4_ZERO: 1.0}.get(kind, 0.5) + 20 * top * 2.0**-11 + 128 * 2.0**-25
    error = np.abs(restored - matrix).reshape(groups.shape).max(-1)
    np.testing.assert_array_less(error, allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "group"), [(Kind.F32, 0), (Kind.BF16, 0), (Kind.INT8, 32)])
def test_sources(best: Context, kind: Kind, group: int, dtype: torch.dtype) -> None:
    matrix = torch.randn(20, 64, generator=torch.Generator().manual_seed(12)).to(dtype)
    matrix[0, :3] = torch.tensor([6e-8, -6e-5, 65504.0]).to(dtype)  # float16: subnormal, nearly so, the largest
    weight = PackedWeight(kind, 20, 64, group)
    best.pack(weight, matrix)
    from_float = packed(best, kind, group, matrix.float().numpy())
    assert bytes(weight.memory) == bytes(from_float.memory)
    if kind == Kind.F32:
        np.testing.assert_array_equal(best.unpack(weight), matrix.float().numpy())
    if kind == Kind.BF16:
        np.testing.assert_array_equal(best.unpack(weight), matrix.float().bfloat16().float().numpy())


BLOCKS = (
    (Source.Q4_0, Kind.INT4, gguf.GGMLQuantizationType.Q4_0),
    (Source.Q4_1, Kind.INT4_MIN, gguf.GGMLQuantizationType.Q4_1),
    (Source.Q8_0, Kind.INT8, gguf.GGMLQuantizationType.Q8_0),
)


@pytest.mark.parametrize(("source", "kind", "file_type"), BLOCKS)
def test_gguf_blocks_are_used_as_they_are(context: Context, source: Source, kind: Kind, file_type: Any) -> None:
    rng = np.random.default_rng(13)
    blocks = gguf.quants.quantize(rng.standard_normal((70, 192), dtype=np.float32), file_type)
    values = gguf.quants.dequantize(blocks, file_type)
    weight = PackedWeight(kind, 70, 192, 32)
    context.pack(weight, blocks, blocks=source)
    np.testing.assert_array_equal(context.unpack(weight), values)
    x = rng.standard_normal((7, 192), dtype=np.float32)
    close(context.linear(weight, x), rounded(kind, x), multiplied(context, weight))
    exact = x.astype(np.float64) @ values.astype(np.float64).T
    error = np.abs(context.linear(weight, x) - exact)
    assert np.sqrt((error**2).mean()) < 0.01 * np.sqrt((exact**2).mean())  # what rounding x to int8 costs


@pytest.mark.parametrize(("source", "kind", "file_type"), BLOCKS)
def test_gguf_products_of_whole_numbers_are_exact(context: Context, source: Source, kind: Kind, file_type: Any) -> None:
    rng = np.random.default_rng(14)
    whole = rng.integers(-7, 8, (40, 64)).astype(np.float32)
    whole[:, ::32], whole[:, 1::32] = -8, 7
    if kind == Kind.INT8:
        whole[:, ::32] = 127  # the scale becomes 1
    blocks = gguf.quants.quantize(whole, file_type)
    np.testing.assert_array_equal(gguf.quants.dequantize(blocks, file_type), whole)
    weight = PackedWeight(kind, 40, 64, 32)
    context.pack(weight, blocks, blocks=source)
    x = rng.integers(-127, 128, (6, 64)).astype(np.float32)
    x[:, ::32] = 127
    np.testing.assert_array_equal(context.linear(weight, x), x @ whole.T)


@pytest.mark.parametrize(("kind", "group"), INTEGER_KINDS)
def test_codes_of_another_quantiser(context: Context, kind: Kind, group: int) -> None:
    rng = np.random.default_rng(15)
    rows, width = 50, 256
    int4 = kind >= Kind.INT4
    codes = rng.integers(0, 16 if int4 else 256, (rows, width)).astype(np.uint8)
    if kind == Kind.INT8_ROW:
        scales = rng.standard_normal(rows).astype(np.float32)
        expected = scales[:, None] * (codes.astype(np.float32) - 128)
        zeros = None
    else:
        scales = rng.standard_normal((rows, width // group)).astype(np.float16)  # negative ones too, as Q4_0 has them
        zeros = rng.integers(0, 16, scales.shape).astype(np.float16) if kind.offsets else None
        q = codes.astype(np.float32).reshape(rows, -1, group)
        s = scales.astype(np.float32)[..., None]
        z = zeros.astype(np.float32)[..., None] if zeros is not None else np.float32(8 if int4 else 128)
        expected = (s * q + z if kind == Kind.INT4_MIN else s * (q - z)).reshape(rows, width)
    weight = PackedWeight(kind, rows, width, group)
    context.pack_codes(weight, codes, scales, zeros)
    np.testing.assert_array_equal(context.unpack(weight), expected)
    x = rng.standard_normal((3, width), dtype=np.float32)
    got = context.linear(weight, x)
    close(got, rounded(kind, x), multiplied(context, weight))


def test_parts_make_one_weight(best: Context) -> None:
    rng = np.random.default_rng(16)
    q, k = rng.standard_normal((40, 64), dtype=np.float32), rng.standard_normal((7, 64), dtype=np.float32)
    for kind, group in KINDS:
        if group > 64:
            continue
        weight = PackedWeight(kind, 47, 64, group)
        best.pack(weight, k, first=40)
        best.pack(weight, q)
        whole = packed(best, kind, group, np.concatenate([q, k]))
        assert bytes(weight.memory) == bytes(whole.memory)
        np.testing.assert_array_equal(
            best.unpack(weight, np.array([46, 0], dtype=np.int32)), best.unpack(whole)[[46, 0]]
        )


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "group"), KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(best: Context, kind: Kind, group: int, value: float) -> None:
    matrix = np.ones((70, 128), dtype=np.float32)
    matrix[69, 127] = matrix[33, 5] = value
    with pytest.raises(CheckpointError, match="row 33 "):
        packed(best, kind, group, matrix)


def test_scales_that_are_not_finite(best: Context) -> None:
    with pytest.raises(CheckpointError, match="row 0 "):
        packed(best, Kind.INT8, 32, np.full((1, 32), 1e8, dtype=np.float32))
    for source, kind, file_type in BLOCKS:
        blocks = gguf.quants.quantize(np.ones((3, 64), dtype=np.float32), file_type)
        blocks[1, 1] = 0x7C  # the scale's upper half
        with pytest.raises(CheckpointError, match="row 1 "):
            best.pack(PackedWeight(kind, 3, 64, 32), blocks, blocks=source)
    codes, scales = np.zeros((2, 32), dtype=np.uint8), np.full((2, 1), np.inf, dtype=np.float16)
    with pytest.raises(CheckpointError, match="row 0 "):
        best.pack_codes(PackedWeight(Kind.INT8, 2, 32, 32), codes, scales)
    codes[1, 3] = 16
    with pytest.raises(CheckpointError, match=r"row 1 .*code beyond its bits"):
        best.pack_codes(PackedWeight(Kind.INT4, 2, 32, 32), codes, np.ones((2, 1), dtype=np.float16))


@pytest.mark.parametrize(
    ("kind", "out", "width", "group", "words"),
    [
        (Kind.INT4, 8, 48, 32, "multiple of group"),
        (Kind.INT8, 8, 96, 64, "multiple of group"),
        (Kind.INT4, 8, 64, 16, "32, 64 or 128"),
        (Kind.INT4, 8, 64, 0, "32, 64 or 128"),
        (Kind.BF16, 8, 64, 32, "must be 0"),
        (Kind.F32, 0, 64, 0, "out and in"),
        (Kind.F32, 8, -1, 0, "out and in"),
    ],
)
def test_shapes_that_do_not_fit(kind: Kind, out: int, width: int, group: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PackedWeight(kind, out, width, group)


def test_arguments_that_do_not_fit(best: Context) -> None:
    weight, x = PackedWeight(Kind.F32, 8, 64), np.zeros((2, 64), dtype=np.float32)
    with pytest.raises(ConfigError, match=r"dtype must be float32, not float64[\s\S]*shape must be"):
        best.linear(weight, np.zeros((2, 63)))
    with pytest.raises(ConfigError, match="contiguous"):
        best.linear(weight, np.zeros((2, 128), dtype=np.float32)[:, ::2])
    with pytest.raises(ConfigError, match="contiguous"):
        best.linear(weight, torch.zeros(64, 2).T)
    with pytest.raises(ConfigError, match="must be on the CPU"):
        best.linear(weight, torch.zeros(2, 64, device="meta"))
    with pytest.raises(ConfigError, match="bias: shape"):
        best.linear(weight, x, bias=np.zeros(7, dtype=np.float32))
    with pytest.raises(ConfigError, match="needs `out`"):
        best.linear(weight, x, flags=ADD)
    with pytest.raises(ConfigError, match="multiple of 32 outputs"):
        best.linear(weight, x, flags=SILU_MUL)
    with pytest.raises(ConfigError, match="make no sense"):
        best.linear(weight, x, flags=SILU_MUL | GELU)
    with pytest.raises(ConfigError, match="9 rows at 0 do not fit 8 outputs"):
        best.pack(weight, np.zeros((9, 64), dtype=np.float32))
    with pytest.raises(ConfigError, match="2 rows at 7 do not fit"):
        best.pack(weight, x, first=7)
    with pytest.raises(ConfigError, match=r"place\[1\] = 8"):
        best.pack(weight, x, place=np.array([0, 8], dtype=np.int32))
    with pytest.raises(ConfigError, match="Q4_0 blocks do not fit"):
        best.pack(weight, np.zeros((2, 36), dtype=np.uint8), blocks=Source.Q4_0)
    with pytest.raises(ConfigError, match="holds floats"):
        best.pack_codes(weight, np.zeros((2, 64), dtype=np.uint8), np.zeros(2, dtype=np.float32))
    with pytest.raises(ConfigError, match="needs scales and no zeros"):
        int4 = PackedWeight(Kind.INT4, 8, 64, 64)
        ones = np.ones((2, 1), dtype=np.float16)
        best.pack_codes(int4, np.zeros((2, 64), dtype=np.uint8), ones, ones)


def test_no_rows(best: Context) -> None:
    weight = PackedWeight(Kind.F32, 8, 64)
    assert best.linear(weight, np.zeros((0, 64), dtype=np.float32)).shape == (0, 8)


# ---- contexts, memory, the library ----------------------------------------------------------------------------------


def test_instruction_sets_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'sse9' is not known[\s\S]*portable"):
        Context(1, "sse9")
    lacking = [name for name in native.compiled_isas() if name not in native.supported_isas()]
    for name in lacking:
        with pytest.raises(ConfigError, match="not supported by this CPU"):
            Context(1, name)
    monkeypatch.setenv("HANLIN_CPU_ISA", "portable")
    with Context(1) as context:
        assert context.isa == "portable"
    for threads in (-1, 5000):
        with pytest.raises(ConfigError, match="threads must be in"):
            Context(threads)


def test_contexts_live_together_and_are_shared() -> None:
    rng = np.random.default_rng(17)
    matrix, x = rng.standard_normal((64, 128), dtype=np.float32), rng.standard_normal((4, 128), dtype=np.float32)
    wrong: list[str] = []
    with Context(3) as one, Context(2) as two:
        weight = packed(one, Kind.INT8, 32, matrix)
        expected = one.linear(weight, x)

        def work(context: Context) -> None:
            for _ in range(100):
                if not np.array_equal(context.linear(weight, x), expected):
                    wrong.append(context.isa)

        threads = [threading.Thread(target=work, args=(context,)) for context in (one, one, two, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_a_forked_child_computes() -> None:
    rng = np.random.default_rng(18)
    matrix, x = rng.standard_normal((64, 128), dtype=np.float32), rng.standard_normal((4, 128), dtype=np.float32)
    context = Context(3)
    weight = packed(context, Kind.INT4, 32, matrix)
    expected = context.linear(weight, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of fork() beside threads: that is the test
        child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if np.array_equal(context.linear(weight, x), expected) else 2
            context.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    np.testing.assert_array_equal(context.linear(weight, x), expected)
    context.close()
    context.close()


def test_denormals_are_the_same_in_every_thread() -> None:
    x = np.full((1, 32), 1e-39, dtype=np.float32)
    with Context(2) as context:
        weight = packed(context, Kind.F32, 0, np.ones((64, 32), dtype=np.float32))
        was = torch.set_flush_denormal(True)
        try:
            got = context.linear(weight, x)
        finally:
            torch.set_flush_denormal(False)
    assert was
    assert (got == got[0, 0]).all() and got[0, 0] > 0


def test_arena() -> None:
    arena = Arena(4096)
    first, second = arena.take(10), arena.take(4000)
    assert second - first == 64 and first % 64 == 0
    with pytest.raises(CapacityError, match=r"4,096 bytes has 0 left; 100 are needed"):
        arena.take(100)
    with pytest.raises(CapacityError, match="bytes of memory"):
        Arena(1 << 60)
    weight = PackedWeight(Kind.F32, 4, 4, arena=Arena(1 << 20))
    memory = weight.memory
    del weight
    memory[:] = b"\1" * len(memory)  # a view keeps its memory
    large = Arena(3 << 20)
    assert large.take(1) % (2 << 20) == 0


def test_describe() -> None:
    found = native.describe()
    assert (
        found["available"]
        and found["supported"][-1] == "portable"
        and set(found["supported"]) <= set(found["compiled"])
    )
    assert found["threads"] >= 1


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    for path, words in ((tmp_path / "libhanlin_cpu.so", "not built"), (broken, "cannot be loaded")):
        monkeypatch.setattr(native, "library_path", lambda path=path: path)
        native._load.cache_clear()
        try:
            with pytest.warns(RuntimeWarning, match=words) as caught:
                assert not native.available()
                assert not native.available()
            assert len(caught) == 1
            assert words in str(native.unavailable_reason())
            assert native.describe()["available"] is False
            with pytest.raises(ConfigError, match=words):
                Context(1)
        finally:
            native._load.cache_clear()

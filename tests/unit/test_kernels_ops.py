"""Row operations, the key/value pool and attention: against float64, on every instruction set, and bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.errors import ConfigError
from hanlin.kernels import native, ops
from hanlin.kernels.kv import KVKind, KVPool, Layout, block_bytes
from hanlin.kernels.native import Context
from hanlin.kernels.ops import Function, Norm, RopeStyle
from hanlin.layers.attend import PackedAttend
from hanlin.layers.rope import Rotation, rotate

BUILT = native.library_path().exists()
pytestmark = pytest.mark.skipif(not BUILT, reason="the native library is not built")
ISAS = native.supported_isas() if BUILT else []

Array = Any


@pytest.fixture(scope="module", params=ISAS)
def context(request: pytest.FixtureRequest) -> Iterator[Context]:
    with Context(2, request.param) as opened:
        yield opened


@pytest.fixture(scope="module")
def best() -> Iterator[Context]:
    with Context(2) as opened:
        yield opened


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 15, 16, 17, 63, 100, 576])
@pytest.mark.parametrize("kind", list(Norm))
def test_norm(context: Context, width: int, kind: Norm) -> None:
    x, gain, bias = normal(5, width, scale=3) + np.float32(0.5), normal(width, seed=1), normal(width, seed=2)
    wide = x.astype(np.float64)
    centered = wide - wide.mean(1, keepdims=True) if kind is Norm.LAYER else wide
    want = centered / np.sqrt((centered**2).mean(1, keepdims=True) + 1e-5) * gain + bias
    got = ops.norm(context, x, gain, bias, eps=1e-5, kind=kind)
    assert np.abs(got - want).max() <= 2e-6 * max(1, np.abs(want).max())
    with Context(1, context.isa) as alone:
        for row in range(5):
            assert np.array_equal(ops.norm(alone, x[row : row + 1], gain, bias, eps=1e-5, kind=kind)[0], got[row])


def test_exp_is_within_two_units_in_the_last_place(context: Context) -> None:
    x = np.linspace(-87.33, 88.37, 200_001, dtype=np.float32)
    want = np.exp(x.astype(np.float64))
    units = np.abs(ops.apply(context, Function.EXP, x) - want) / np.spacing(want.astype(np.float32))
    assert units.max() <= 2
    clamped = ops.apply(context, Function.EXP, np.array([-1e9, -np.inf, 1e9, np.nan, 0], np.float32))
    assert 0 < clamped[0] == clamped[1] < 1.3e-38
    assert 2.3e38 < clamped[2] < np.inf
    assert np.isnan(clamped[3])
    assert clamped[4] == 1


@pytest.mark.parametrize("width", [1, 16, 37])
def test_gates(context: Context, width: int) -> None:
    x = normal(3, 2 * width, scale=4)
    gate, up = torch.from_numpy(x[:, :width]).double(), torch.from_numpy(x[:, width:]).double()
    want = {
        Function.SILU: torch.nn.functional.silu(gate) * up,
        Function.GELU: torch.nn.functional.gelu(gate, approximate="tanh") * up,
    }
    for function, value in want.items():
        assert np.allclose(ops.gate(context, function, x), value.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rotary", [4, 24, 64])
@pytest.mark.parametrize("style", list(RopeStyle))
def test_rope(context: Context, style: RopeStyle, rotary: int) -> None:
    x, angles = normal(3, 2, 64), normal(3, rotary // 2, seed=1, scale=9)
    cos, sin = np.cos(angles), np.sin(angles)
    rotation = Rotation(torch.from_numpy(cos), torch.from_numpy(sin), style is RopeStyle.INTERLEAVED)
    source = torch.from_numpy(x.copy())
    if style is RopeStyle.QUARTERS:
        half, quarter = rotary // 2, rotary // 4
        pieces = [
            rotate(
                source[..., i * half : (i + 1) * half],
                Rotation(*(t[:, i * quarter : (i + 1) * quarter] for t in rotation[:2])),
            )
            for i in range(2)
        ]
        want = torch.cat((*pieces, source[..., rotary:]), -1)
    else:
        want = rotate(source, rotation)
    ops.rope(context, style, x, cos, sin)
    assert np.allclose(x, want.numpy(), rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    columns=st.sampled_from((1, 16, 63, 64, 1000, 8192, 8193, 20000)),
    k=st.sampled_from((0, 1, 2, 40, 256)),
    seed=st.integers(0, 99),
    ties=st.booleans(),
)
def test_top(best: Context, columns: int, k: int, seed: int, ties: bool) -> None:
    k = min(k, columns)
    x = normal(2, columns, seed=seed, scale=5)
    x = np.round(x) if ties else x
    got = ops.top(best, x, k)
    assert np.array_equal(got.ids, np.argsort(-x, axis=1, kind="stable")[:, :k])
    assert np.array_equal(got.values, np.take_along_axis(x, got.ids.astype(np.int64), 1))
    top = x.max(1, keepdims=True)
    want = top[:, 0] + np.log(np.exp((x - top).astype(np.float64)).sum(1))
    assert np.allclose(got.log_sum_exp, want, rtol=1e-6, atol=1e-6)
    with Context(1, best.isa) as alone:
        again = ops.top(alone, x[1:], k)
    assert np.array_equal(again.ids[0], got.ids[1])
    assert np.array_equal(again.log_sum_exp, got.log_sum_exp[1:])


def test_top_of_what_is_no_number(context: Context) -> None:
    x = np.full((3, 9000), -np.inf, np.float32)
    x[0, 8500], x[1, 3], x[1, 4] = 2.0, np.nan, 1.0
    got = ops.top(context, x, 2)
    assert got.ids.tolist() == [[8500, -1], [4, -1], [-1, -1]]
    assert got.log_sum_exp[0] == 2.0
    assert np.isnan(got.log_sum_exp[1])
    assert got.log_sum_exp[2] == -np.inf


def test_operations_refuse_what_makes_no_sense(best: Context) -> None:
    x = normal(2, 8)
    with pytest.raises(ConfigError, match="at most 256"):
        ops.top(best, x, 9)
    with pytest.raises(ConfigError, match="gain: shape must be"):
        ops.norm(best, x, normal(7), eps=1e-5)
    with pytest.raises(ConfigError, match="eps"):
        ops.norm(best, x, eps=-1)
    with pytest.raises(ConfigError, match="in fours"):
        ops.rope(best, RopeStyle.QUARTERS, normal(1, 1, 8), normal(1, 3), normal(1, 3))
    with pytest.raises(ConfigError, match="do not fit the head"):
        ops.rope(best, RopeStyle.HALVES, normal(1, 1, 8), normal(1, 5), normal(1, 5))


# ---- the pool --------------------------------------------------------------------------------------------------------


def pool_of(kind: KVKind, *, blocks: int = 8, block_size: int = 16, heads: int = 2, head_size: int = 32) -> KVPool:
    return KVPool(kind, layers=1, blocks=blocks, block_size=block_size, heads=heads, head_size=head_size)


@pytest.mark.parametrize("head_size", [2, 18, 64, 80, 128])
@pytest.mark.parametrize("kind", list(KVKind))
def test_what_is_written_reads_back_within_its_bound(context: Context, kind: KVKind, head_size: int) -> None:
    pool = pool_of(kind, head_size=head_size, block_size=32)
    slots = np.random.default_rng(0).permutation(8 * 32)[:100].astype(np.int64)
    k, v = normal(100, 2, head_size, scale=3), normal(100, 2, head_size, seed=1) + np.float32(5)
    k[0], v[0], k[1] = 0, 2.5, normal(2, head_size, scale=1e-6)  # constant and tiny rows
    pool.write(context, 0, slots, k, v)
    for x, got in zip((k, v), pool.read(context, 0, slots), strict=True):
        if kind is KVKind.F32:
            assert np.array_equal(x, got)
        elif kind is KVKind.BF16:
            assert np.array_equal(torch.from_numpy(x).bfloat16().float().numpy(), got)
        else:
            steps = 255 if kind is KVKind.INT8 else 15
            span = x.max(-1, keepdims=True) - x.min(-1, keepdims=True)
            low = np.abs(x.min(-1, keepdims=True))
            half_step = (span / steps * (1 + 2**-10) + 2**-24 + low * 2**-11 / steps) / 2
            assert (np.abs(x - got) <= half_step * (1 + 1e-5) + low * 2**-11 + 2**-25).all()


@pytest.mark.parametrize("kind", list(KVKind))
def test_the_largest_and_what_is_no_number(context: Context, kind: KVKind) -> None:
    pool = pool_of(kind)
    k, v = normal(3, 2, 32, scale=6e4).clip(-6e4, 6e4), normal(3, 2, 32)
    k[1, 0, 3], v[2, 1, 31] = np.nan, np.inf
    slots = np.arange(3, dtype=np.int64)
    pool.write(context, 0, slots, k, v)
    got_k, got_v = pool.read(context, 0, slots)
    assert not np.isfinite(got_k[1, 0]).all()
    assert not np.isfinite(got_v[2, 1]).all()
    for x in (got_k[0], got_k[2], got_k[1, 1], got_v[0], got_v[1], got_v[2, 0]):
        assert np.isfinite(x).all()
    assert np.abs(got_k[0] - k[0]).max() <= 6e4 * 0.1


def test_int4_keeps_keys_in_eight_bits(context: Context) -> None:
    k, v = normal(16, 2, 80, scale=3), normal(16, 2, 80, seed=1)
    slots, found = np.arange(16, dtype=np.int64), {}
    for kind in (KVKind.INT8, KVKind.INT4):
        pool = KVPool(kind, layers=1, blocks=1, block_size=16, heads=2, head_size=80)
        pool.write(context, 0, slots, k, v)
        found[kind] = pool.read(context, 0, slots)
    assert np.array_equal(found[KVKind.INT4][0], found[KVKind.INT8][0])
    error = np.abs(found[KVKind.INT4][1] - v).max(-1)
    assert (error <= 1.02 * (v.max(-1) - v.min(-1)) / 30 + 1e-3).all()
    small, large = (block_bytes(kind, 16, 2, 128) for kind in (KVKind.INT4, KVKind.INT8))
    assert small < 0.77 * large


def test_blocks_are_copied_and_swapped_as_bytes(best: Context) -> None:
    for kind in KVKind:
        pool, other = pool_of(kind), pool_of(kind, blocks=3)
        slots = np.arange(8 * 16, dtype=np.int64)
        pool.write(best, 0, slots, normal(128, 2, 32), normal(128, 2, 32, seed=1))
        k, v = pool.read(best, 0, slots)
        other.copy_blocks(best, [2, 0], pool, [5, 7])
        other_k, other_v = other.read(best, 0, slots[:48])
        assert np.array_equal(other_k[32:], k[80:96])
        assert np.array_equal(other_v[:16], v[112:])
        saved = bytes(pool.block(0, 3))
        assert len(saved) == block_bytes(kind, 16, 2, 32)
        pool.block(0, 1)[:] = saved
        assert np.array_equal(pool.read(best, 0, slots[16:32])[0], k[48:64])
        with pytest.raises(ConfigError, match="block 8 to 0"):
            other.copy_blocks(best, [0], pool, [8])
    with pytest.raises(ConfigError, match="differ"):
        pool.copy_blocks(best, [0], pool_of(KVKind.F32), [0])


def test_pools_that_cannot_be(best: Context) -> None:
    for change, message in {
        "block_size": "multiple of 16",
        "head_size": "must be even",
        "heads": ">= 1",
    }.items():
        with pytest.raises(ConfigError, match=message):
            pool_of(KVKind.BF16, **{change: 0})
    with pytest.raises(ConfigError, match="slot 128 of 128"):
        pool_of(KVKind.BF16).read(best, 0, np.array([128], np.int64))


# ---- attention -------------------------------------------------------------------------------------------------------


class Case:
    """Sequences whose keys and values are in a pool, in blocks at random places; the rest of the pool is NaN.

    `sequences` are (context, queries, prefix).
    """

    def __init__(
        self,
        context: Context,
        kind: KVKind,
        sequences: list[tuple[int, int, int]],
        *,
        heads: int,
        kv_heads: int,
        head_size: int,
        block_size: int = 16,
        seed: int = 0,
    ) -> None:
        random = np.random.default_rng(seed)
        used = [-(-length // block_size) for length, _, _ in sequences]
        self.pool = pool_of(kind, blocks=sum(used) + 2, block_size=block_size, heads=kv_heads, head_size=head_size)
        everything = np.arange(self.pool.blocks * block_size, dtype=np.int64)
        junk = np.full((len(everything), kv_heads, head_size), np.nan, np.float32)
        self.pool.write(context, 0, everything, junk, junk)
        places = random.permutation(self.pool.blocks).astype(np.int32)
        self.table = np.full((len(sequences), max(used)), -1, np.int32)
        self.sequences, self.context = sequences, context
        self.q: list[Array] = []
        self.stored: list[tuple[Array, Array]] = []
        for row, (length, queries, _), count in zip(self.table, sequences, used, strict=True):
            row[:count], places = places[:count], places[count:]
            slots = np.array([row[i // block_size] * block_size + i % block_size for i in range(length)], np.int64)
            own = np.random.default_rng(length)  # a sequence's numbers do not depend on its company
            k, v = (own.standard_normal((length, kv_heads, head_size)).astype(np.float32) for _ in range(2))
            self.pool.write(context, 0, slots, k, v)
            self.stored.append(self.pool.read(context, 0, slots))
            self.q.append(own.standard_normal((length, heads, head_size)).astype(np.float32)[length - queries :])

    def attend(self) -> list[Array]:
        counts = [queries for _, queries, _ in self.sequences]
        layout = Layout(
            query_start=np.cumsum([0, *counts]).astype(np.int32),
            context=np.array([length for length, _, _ in self.sequences], np.int32),
            block_table=self.table,
            prefix_len=np.array([prefix for _, _, prefix in self.sequences], np.int32),
        )
        out = self.pool.attend(self.context, 0, np.concatenate(self.q), layout)
        return np.split(out, np.cumsum(counts)[:-1])

    def oracle(self) -> list[Array]:
        outs = []
        for q, (k, v), (length, queries, prefix) in zip(self.q, self.stored, self.sequences, strict=True):
            whole = np.zeros((length, *q.shape[1:]), np.float32)
            whole[length - queries :] = q
            tensors = (torch.from_numpy(x).double() for x in (whole, k, v))
            outs.append(PackedAttend([length], [prefix])(0, *tensors).numpy()[length - queries :])
        return outs


SHAPES = [(9, 3, 64, 16), (4, 2, 18, 32), (2, 2, 80, 64), (7, 1, 128, 16)]
SEQUENCES = [(300, 1, 0), (17, 17, 0), (1, 1, 0), (290, 40, 0), (60, 60, 45), (40, 8, 20)]


@pytest.mark.parametrize(("heads", "kv_heads", "head_size", "block_size"), SHAPES)
@pytest.mark.parametrize("kind", list(KVKind))
def test_attention(context: Context, kind: KVKind, heads: int, kv_heads: int, head_size: int, block_size: int) -> None:
    case = Case(context, kind, SEQUENCES, heads=heads, kv_heads=kv_heads, head_size=head_size, block_size=block_size)
    for got, want in zip(case.attend(), case.oracle(), strict=True):
        error = math.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
        floats = kind is KVKind.F32 or (kind is KVKind.BF16 and context.isa != "avx512_bf16")
        assert error <= (1e-6 if floats else 4e-3 if kind is KVKind.BF16 else 1e-3)


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_attention_has_one_answer(data: st.DataObject) -> None:
    """Alone or in company, whole or token by token, in any blocks of any size, on 1 to 3 threads: the same bits."""
    kind, isa = data.draw(st.sampled_from(list(KVKind))), data.draw(st.sampled_from(ISAS))
    length = data.draw(st.sampled_from((5, 16, 33, 255, 256, 257, 530)))
    shape = {"heads": 6, "kv_heads": data.draw(st.sampled_from((1, 2, 6))), "head_size": 36}
    with Context(1, isa) as alone:
        want = Case(alone, kind, [(length, length, 0)], **shape).attend()[0]
    queries = data.draw(st.integers(1, length))
    company = data.draw(st.lists(st.sampled_from(((3, 3, 0), (270, 1, 0), (40, 9, 0))), max_size=3))
    place = data.draw(st.integers(0, len(company)))
    sequences = [*company[:place], (length, queries, 0), *company[place:]]
    block_size, seed = data.draw(st.sampled_from((16, 32, 64))), data.draw(st.integers(0, 9))
    with Context(data.draw(st.integers(1, 3)), isa) as many:
        got = Case(many, kind, sequences, **shape, block_size=block_size, seed=seed).attend()[place]
    assert np.array_equal(got, want[length - queries :])


def test_codes_have_one_answer_on_every_instruction_set_but_for_exp(best: Context) -> None:
    """Scores and outputs of codes are exact sums; only exp, and the last rounding, may differ."""
    sequences = [(90, 90, 0)]
    for kind in (KVKind.INT8, KVKind.INT4):
        outs = []
        for isa in ISAS:
            with Context(1, isa) as one:
                outs.append(Case(one, kind, sequences, heads=4, kv_heads=2, head_size=64).attend()[0])
        for out in outs[1:]:
            assert np.abs(out - outs[0]).max() <= 2e-4 * np.abs(outs[0]).max()


def test_a_soft_prefix_is_seen_by_all(best: Context) -> None:
    """It takes the first slots and counts in the context; keys are not rotated, which is the caller's business."""
    soft, length = 5, 20
    case = Case(best, KVKind.F32, [(soft + length, length, 0)], heads=2, kv_heads=1, head_size=16)
    k, v = (torch.from_numpy(x) for x in case.stored[0])
    q = torch.from_numpy(case.q[0])
    want = PackedAttend([length], soft_prefix=[(k[:soft], v[:soft])])(0, q, k[soft:], v[soft:])
    assert np.allclose(case.attend()[0], want.numpy(), rtol=1e-5, atol=1e-6)


def test_a_token_that_is_no_number_stays_in_its_sequence(context: Context) -> None:
    for kind in KVKind:
        sequences = [(20, 20, 0), (35, 35, 0)]
        case = Case(context, kind, sequences, heads=2, kv_heads=1, head_size=16)
        want = case.attend()
        bad = np.full((1, 1, 16), np.nan, np.float32)
        slot = np.array([case.table[0, 1] * 16 + 3], np.int64)  # the last token of the first sequence
        case.pool.write(context, 0, slot, bad, bad)
        got = case.attend()
        assert np.isnan(got[0][19]).all()
        assert np.array_equal(got[1], want[1])


def test_attention_refuses_what_reaches_beyond_the_pool(best: Context) -> None:
    pool = pool_of(KVKind.BF16)
    starts, table = np.array([0, 1], np.int32), np.array([[0, 8]], np.int32)
    q = normal(1, 2, 32)
    with pytest.raises(ConfigError, match="names block 8 of 8"):
        pool.attend(best, 0, q, Layout(query_start=starts, context=np.array([17], np.int32), block_table=table))
    with pytest.raises(ConfigError, match="3 heads are no multiple of 2"):
        layout = Layout(query_start=starts, context=np.array([1], np.int32), block_table=table)
        pool.attend(best, 0, normal(1, 3, 32), layout)
    with pytest.raises(ConfigError, match="head size 16"):
        pool.attend(best, 0, normal(1, 2, 16), layout)

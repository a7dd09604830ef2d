"""Products with inputs of 12 bits: finer than 8, and as indifferent to company."""

from __future__ import annotations

import numpy as np
import pytest

from hanlin.kernels.native import Context, Kind, PackedWeight, available, supported_isas, unavailable_reason

pytestmark = pytest.mark.skipif(not available(), reason=f"the native library: {unavailable_reason()}")
KINDS = [(Kind.INT8_ROW, 0), (Kind.INT8, 32), (Kind.INT4, 32), (Kind.INT4_MIN, 64), (Kind.INT4_ZERO, 128)]


@pytest.mark.parametrize("isa", supported_isas() if available() else [])
@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_twelve_bits_are_nearly_exact(isa: str, kind: Kind, group: int) -> None:
    rng = np.random.default_rng()
    w = rng.standard_normal((70, 256)).astype(np.float32)
    x = rng.standard_normal((13, 256)).astype(np.float32) * np.exp(rng.standard_normal((13, 1))).astype(np.float32)
    x[:, 7] *= 50  # an outlier, as trained models have them
    x[3, 32:64] = 0
    with Context(2, isa) as context:
        errors = {}
        for wide in (False, True):
            weight = PackedWeight(kind, 70, 256, group, wide=wide)
            context.pack(weight, w)
            exact = x.astype(np.float64) @ context.unpack(weight).astype(np.float64).T
            out = np.full((13, 70), np.nan, np.float32)
            context.linear(weight, x, out=out)
            errors[wide] = np.abs(out - exact).max() / np.abs(exact).max()
            alone = np.stack([context.linear(weight, row[None].copy())[0] for row in x])
            assert np.array_equal(out, alone)
    assert errors[True] < 3e-3 and errors[True] < errors[False] / 6


def test_every_instruction_set_gives_the_same_bits() -> None:
    rng = np.random.default_rng(1)
    w, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 128), (5, 128)))
    got = set()
    for isa in supported_isas():
        with Context(1, isa) as context:
            weight = PackedWeight(Kind.INT4_MIN, 64, 128, 32, wide=True)
            context.pack(weight, w)
            got.add(context.linear(weight, x).tobytes())
    assert len(got) == 1


def test_values_that_are_not_finite_stay_in_their_row() -> None:
    x = np.ones((3, 64), np.float32)
    x[1, 5] = np.inf
    with Context(1) as context:
        weight = PackedWeight(Kind.INT8, 32, 64, 32, wide=True)
        context.pack(weight, np.ones((32, 64), np.float32))
        out = context.linear(weight, x)
    assert np.isnan(out[1]).all() and np.isfinite(out[[0, 2]]).all()

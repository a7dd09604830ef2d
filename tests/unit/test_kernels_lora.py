"""Low-rank additions in native programs: equal to a plain product, and one answer however a step is made up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hanlin.errors import ConfigError
from hanlin.kernels import native
from hanlin.kernels.abi import check, library
from hanlin.kernels.kv import Layout
from hanlin.kernels.lora import PackedAdapter, Piece
from hanlin.kernels.native import Context, Kind, PackedWeight, supported_isas
from hanlin.kernels.program import Program, Step

pytestmark = pytest.mark.skipif(not native.library_path().exists(), reason="the native library is not built")

VOCABULARY, WIDTH, INNER = 50, 72, 40  # neither is a multiple of a tile or of a register
LENGTHS = (1, 9, 1, 70, 2, 33)
WHO = (0, 1, None, 0, 2, 1)  # which adapter each sequence has


def draw(rng: Any, *shape: int) -> Any:
    return rng.normal(0, 0.3, shape).astype(np.float32)


def bfloat16(x: Any) -> Any:
    return torch.from_numpy(x).bfloat16().float().numpy()


class Small:
    """x += w2 (silu(gate) * up); logits = head x: with every flag that an addition can meet."""

    def __init__(self, context: Context, kind: Kind = Kind.F32) -> None:
        rng = np.random.default_rng(0)
        self.context = context
        self.table, self.up, self.down, self.head = (
            draw(rng, *shape)
            for shape in ((VOCABULARY, WIDTH), (2 * INNER, WIDTH), (WIDTH, INNER), (VOCABULARY, WIDTH))
        )
        self.bias = draw(rng, 2 * INNER)
        row = np.arange(INNER, dtype=np.int32)
        gate = row // 16 * 32 + row % 16
        self.places = np.concatenate((gate, gate + 16)).astype(np.int32)  # INNER is no multiple of 16: holes
        padded = -(-INNER // 16) * 32
        bias = np.zeros(padded, np.float32)
        bias[self.places] = self.bias
        self.weights = [PackedWeight(kind, padded, WIDTH), PackedWeight(kind, WIDTH, padded // 2)]
        self.weights.append(PackedWeight(kind, VOCABULARY, WIDTH))
        context.pack(self.weights[0], self.up, place=self.places)
        context.pack(self.weights[1], np.pad(self.down, ((0, 0), (0, padded // 2 - INNER))))
        context.pack(self.weights[2], self.head)
        self.program = program = Program(context)
        x = program.embed(self.table)
        inner = program.linear(x, self.weights[0], bias, silu_mul=True)
        program.linear(inner, self.weights[1], add_to=x)
        program.head(program.gather(x), self.weights[2])
        program.build(256)

    def adapter(self, seed: int, ranks: tuple[int, int, int, int], bf16: bool) -> tuple[PackedAdapter, list[Any]]:
        """Additions to gate, up, w2 and head; rank 0 adds nothing. Also their dense weights."""
        rng = np.random.default_rng(100 + seed)
        shapes = ((INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER), (VOCABULARY, WIDTH))
        halves = [(draw(rng, r, in_), draw(rng, out, r)) for r, (out, in_) in zip(ranks, shapes, strict=True)]
        if bf16:
            halves = [(bfloat16(a), bfloat16(b)) for a, b in halves]
        places = [self.places[:INNER], self.places[INNER:]]
        places += [np.arange(n, dtype=np.int32) for n in (WIDTH, VOCABULARY)]
        wide = [
            np.pad(a, ((0, 0), (0, self.weights[1].in_ - INNER))) if i == 2 else a for i, (a, _) in enumerate(halves)
        ]
        pieces = [Piece(a, b, place) for a, (_, b), place in zip(wide, halves, places, strict=True)]
        where = [(self.weights[0], pieces[:2]), (self.weights[1], pieces[2:3]), (self.weights[2], pieces[3:])]
        where = [(w, [p for p in some if len(p.down)]) for w, some in where]
        dense = [b @ a for a, b in halves]
        return self.program.adapter([(w, some) for w, some in where if some], bf16=bf16), dense

    def run(self, parts: list[tuple[Any, PackedAdapter | None]]) -> list[Any]:
        """Logits of each (ids, adapter), in one step."""
        counts = [len(ids) for ids, _ in parts]
        total = sum(counts)
        zeros = np.zeros(len(parts), np.int32)
        layout = Layout(
            query_start=np.cumsum([0, *counts]).astype(np.int32), context=zeros + 1, block_table=zeros[:, None].copy()
        )
        order = np.random.default_rng(total).permutation(total).astype(np.int32)  # wanted rows come in any order
        step = Step(
            ids=np.concatenate([ids for ids, _ in parts]).astype(np.int32),
            slots=np.zeros(total, np.int64),
            layout=layout,
            rows=order,
            adapters=[adapter for _, adapter in parts],
        )
        out = np.empty((total, VOCABULARY), np.float32)
        out[order] = self.program.run(step).logits
        return np.split(out, np.cumsum(counts)[:-1])

    def expected(self, ids: Any, dense: list[Any] | None) -> Any:
        gate, up, down, head = (
            w.astype(np.float64) + (0 if dense is None else d)
            for w, d in zip((self.up[:INNER], self.up[INNER:], self.down, self.head), dense or [None] * 4, strict=True)
        )
        x = self.table[ids].astype(np.float64)
        g = x @ gate.T + self.bias[:INNER]
        x = x + (g / (1 + np.exp(-g)) * (x @ up.T + self.bias[INNER:])) @ down.T
        return x @ head.T


def texts() -> list[Any]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCABULARY, length) for length in LENGTHS]


RANKS = ((16, 16, 16, 16), (3, 0, 20, 5), (0, 8, 0, 0))


@pytest.mark.parametrize("bf16", [False, True], ids=["float", "bfloat16"])
@pytest.mark.parametrize("isa", supported_isas() if native.library_path().exists() else [])
def test_additions_are_what_they_should_be(isa: str, bf16: bool) -> None:
    with Context(2, isa) as context:
        small = Small(context)
        made = [small.adapter(seed, ranks, bf16) for seed, ranks in enumerate(RANKS)]
        parts = [(ids, None if who is None else made[who][0]) for ids, who in zip(texts(), WHO, strict=True)]
        for got, ids, who in zip(small.run(parts), texts(), WHO, strict=True):
            np.testing.assert_allclose(got, small.expected(ids, None if who is None else made[who][1]), atol=3e-5)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16, Kind.INT8_ROW], ids=lambda kind: kind.name)
def test_company_changes_nothing(kind: Kind) -> None:
    """Each sequence alone, token by token, and all together, on one thread or three: the same bits."""
    seen = []
    for threads in (1, 3):
        with Context(threads) as context:
            small = Small(context, kind)
            made = [small.adapter(seed, ranks, True)[0] for seed, ranks in enumerate(RANKS)]
            parts = [(ids, None if who is None else made[who]) for ids, who in zip(texts(), WHO, strict=True)]
            together = small.run(parts)
            for got, (ids, adapter) in zip(together, parts, strict=True):
                (alone,) = small.run([(ids, adapter)])
                assert alone.tobytes() == got.tobytes()
                pieces = [small.run([(ids[i : i + 1], adapter)])[0] for i in range(len(ids))]
                assert np.concatenate(pieces).tobytes() == got.tobytes()
            plain = small.run([(ids, None) for ids, _ in parts])
            assert [p.tobytes() == g.tobytes() for p, g in zip(plain, together, strict=True)] == [
                who is None for who in WHO
            ]
            seen.append(b"".join(got.tobytes() for got in together))
    assert seen[0] == seen[1]


def test_memory_is_what_was_packed() -> None:
    with Context(1) as context:
        small = Small(context)
        sizes = [small.adapter(0, (8, 8, 8, 8), bf16)[0].nbytes for bf16 in (False, True)]
        assert 1.8 < sizes[0] / sizes[1] <= 2


def test_what_does_not_fit_is_refused() -> None:
    with Context(1) as context:
        small, other = Small(context), Small(context)
        other_program = Program(context)
        x = other_program.embed(other.table)
        other_program.head(other_program.gather(x), other.weights[2])
        other_program.build(8)
        made, _ = small.adapter(0, (4, 4, 4, 4), False)
        with pytest.raises(ConfigError, match="operations, the program has"):
            check(library().hl_adapter_check(other_program._built(), made.struct))
        small.program = other_program
        with pytest.raises(ConfigError, match="operations, the program has"):
            small.run([(np.array([1]), made)])
        with pytest.raises(ConfigError, match="2 adapters for 1 sequences"):
            layout = Layout(
                query_start=np.array([0, 1], np.int32),
                context=np.ones(1, np.int32),
                block_table=np.zeros((1, 1), np.int32),
            )
            ids = np.zeros(1, np.int32)
            small.program.run(
                Step(ids=ids, slots=np.zeros(1, np.int64), layout=layout, rows=ids, adapters=[made, made])
            )
        one = np.ones((1, 1), np.float32)
        wrong = PackedAdapter(3, {0: (32, [Piece(one, one, np.zeros(1, np.int32))])}, bf16=False)  # 0 is the embedding
        with pytest.raises(ConfigError, match="no product"):
            check(library().hl_adapter_check(other_program._built(), wrong.struct))

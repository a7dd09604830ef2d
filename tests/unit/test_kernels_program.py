"""Whole steps: equal to the module, and one answer however the work is cut up."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.errors import ConfigError
from hanlin.kernels import native
from hanlin.kernels.kv import KVKind, KVPool, Layout
from hanlin.kernels.native import Context, Kind, PackedWeight
from hanlin.kernels.ops import Function, Norm
from hanlin.kernels.program import Program, Result, Step
from hanlin.layers.attend import PackedAttend
from hanlin.layers.rope import Positions, Rope
from hanlin.models import registry

pytestmark = pytest.mark.skipif(not native.library_path().exists(), reason="the native library is not built")

VOCABULARY, BLOCK = 61, 16
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SHAPE, "model_type": "llama", "tie_word_embeddings": True, "head_dim": 32},
    "internlm2": {**SHAPE, "model_type": "internlm2", "bias": True, "rope_theta": 1e6},
}


def model_of(name: str) -> Any:
    model = registry.build(registry.read_config(MODELS[name]), dtype=torch.float32).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        norm = parameter.ndim == 1
        torch.nn.init.normal_(parameter, mean=1.0 if norm else 0.0, std=0.2, generator=generator)
    parts = model.parts()
    if parts.tied:  # leaving the meta device has parted them
        parts.head.weight = parts.embedding.weight
    return model


def lower(model: Any, context: Context, pool: KVPool, kind: Kind, group: int) -> Program:
    """A model as a program, with its fused projections put into the order that programs want."""
    config, parts = model.config, model.parts()
    size, heads = config.head_dim, config.num_heads
    starts = {"q": 0, "k": heads * size, "v": (heads + config.num_kv_heads) * size}

    def pack(linears: Sequence[Any], place_of: Callable[[str, int], int] | None) -> tuple[PackedWeight, Any]:
        out = sum(linear.out_features for linear in linears)
        weight = PackedWeight(kind, out, linears[0].in_features, group)
        bias = np.zeros(out, np.float32)
        counts: dict[str, int] = {}
        for linear in linears:
            names = [name for _ in range(linear.groups) for name, rows in linear.parts for _ in range(rows)]
            place = np.arange(out, dtype=np.int32)
            if place_of is not None:
                for row, name in enumerate(names):
                    place[row] = place_of(name, counts.setdefault(name, 0))
                    counts[name] += 1
            place = place[: linear.out_features]
            context.pack(weight, linear.weight, place=place)
            if linear.bias is not None:
                bias[place] = linear.bias.numpy()
        return weight, bias

    program = Program(context, pool)
    head, head_bias = pack([parts.head], None)
    x = program.embed(head if parts.tied else parts.embedding.weight)
    rows = x
    for layer, block in enumerate(parts.blocks):
        qkv_weight, qkv_bias = pack(block.qkv, lambda name, row: starts[name] + row)
        gate_up, gate_bias = pack(block.gate_up, lambda name, row: row // 16 * 32 + row % 16 + 16 * (name == "up"))
        out, down = pack([block.out], None), pack([block.down], None)
        qkv = program.linear(
            program.norm(x, block.attention_norm.weight, eps=block.attention_norm.eps), qkv_weight, qkv_bias
        )
        program.rope(qkv, layer, heads=heads, rotary=config.rope.dims)
        seen = program.attend(qkv, layer, heads=heads)
        rows = program.gather(x) if layer == config.num_layers - 1 else x
        seen = program.gather(seen) if layer == config.num_layers - 1 else seen
        program.linear(seen, *out, add_to=rows)
        normal = program.norm(rows, block.mlp_norm.weight, eps=block.mlp_norm.eps)
        program.linear(program.linear(normal, gate_up, gate_bias, silu_mul=True), *down, add_to=rows)
    program.head(program.norm(rows, parts.norm.weight, eps=parts.norm.eps), head, head_bias)
    program.build(max_tokens=128)
    return program


@dataclass
class Running:
    """One sequence: what it has so far, and the logits after each of its tokens."""

    blocks: list[int]
    length: int = 0
    logits: list[Any] = field(default_factory=list)


class Machine:
    """A lowered model with a pool, driven by lists of (sequence, new ids)."""

    def __init__(
        self,
        name: str,
        *,
        threads: int = 1,
        kv: KVKind = KVKind.F32,
        kind: Kind = Kind.F32,
        group: int = 0,
        isa: str = "",
    ) -> None:
        self.model = model_of(name)
        config = self.model.config
        self.context = Context(threads, isa or None)
        self.pool = KVPool(
            kv,
            layers=config.num_layers,
            blocks=64,
            block_size=BLOCK,
            heads=config.num_kv_heads,
            head_size=config.head_dim,
        )
        self.program = lower(self.model, self.context, self.pool, kind, group)
        self.rope = Rope(config.rope)
        self.free = list(range(63, -1, -1))

    def sequence(self) -> Running:
        return Running([])

    def release(self, sequence: Running) -> None:
        self.free += sequence.blocks

    def step(
        self, work: Sequence[tuple[Running, Sequence[int]]], *, rows: Any = None, states: int = 0, **wanted: Any
    ) -> Result:
        positions: list[int] = []
        slots: list[int] = []
        for sequence, ids in work:
            end = sequence.length + len(ids)
            while len(sequence.blocks) * BLOCK < end:
                sequence.blocks.append(self.free.pop())
            places = range(sequence.length, end)
            positions += places
            slots += [sequence.blocks[p // BLOCK] * BLOCK + p % BLOCK for p in places]
            sequence.length = end
        table = np.zeros((len(work), max(len(s.blocks) for s, _ in work)), np.int32)
        for row, (sequence, _) in zip(table, work, strict=True):
            row[: len(sequence.blocks)] = sequence.blocks
        rotation = self.rope(Positions(torch.tensor([positions])))
        ids = np.array([i for _, new in work for i in new], np.int32)
        starts = [0, *itertools.accumulate(len(new) for _, new in work)]
        step = Step(
            ids=ids,
            slots=np.array(slots, np.int64),
            cos=rotation.cos.contiguous(),
            sin=rotation.sin.contiguous(),
            layout=Layout(
                query_start=np.array(starts, np.int32),
                context=np.array([s.length for s, _ in work], np.int32),
                block_table=table,
            ),
            rows=np.arange(len(ids), dtype=np.int32) if rows is None else rows,
            states=states,
        )
        result = self.program.run(step, **wanted)
        if rows is None:
            for (sequence, _), (first, end) in zip(work, itertools.pairwise(starts), strict=True):
                sequence.logits += list(result.logits[first:end])
        return result

    def whole(self, ids: Sequence[int]) -> Any:
        """Logits (T, V) of a sequence in one step, alone."""
        sequence = self.sequence()
        self.step([(sequence, ids)])
        self.release(sequence)
        return np.stack(sequence.logits)


@pytest.fixture(scope="module", params=list(MODELS))
def machines(request: pytest.FixtureRequest) -> Iterator[dict[int, Machine]]:
    yield {threads: Machine(request.param, threads=threads) for threads in (1, 2)}


def some_ids(n: int, seed: int = 0) -> list[int]:
    return list(np.random.default_rng(seed).integers(0, VOCABULARY, n))


def oracle(model: Any, sequences: Sequence[Sequence[int]]) -> Any:
    ids = torch.tensor([i for ids in sequences for i in ids])
    positions = Positions(torch.tensor([[p for ids in sequences for p in range(len(ids))]]))
    with torch.no_grad():
        return model.head(model(ids, positions, PackedAttend([len(ids) for ids in sequences]))).numpy()


def test_equals_the_module(machines: dict[int, Machine]) -> None:
    machine = machines[2]
    sequences = [some_ids(n, seed=n) for n in (70, 1, 17)]
    work = [(machine.sequence(), ids) for ids in sequences]
    machine.step(work)
    got = np.concatenate([np.stack(sequence.logits) for sequence, _ in work])
    want = oracle(machine.model, sequences)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
    for sequence, _ in work:
        machine.release(sequence)


@settings(deadline=None, max_examples=25)
@given(
    threads=st.sampled_from((1, 2)),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_one_answer_however_it_is_cut(
    machines: dict[int, Machine], threads: int, lengths: list[int], seed: int
) -> None:
    machine, cuts = machines[threads], random.Random(seed)
    texts = [some_ids(n, seed=7 * n) for n in lengths]
    run = [(machine.sequence(), ids) for ids in texts]
    while True:
        work = []
        for sequence, ids in run:
            left = len(ids) - sequence.length
            n = cuts.choice((0, 1, min(1, left), left, cuts.randint(0, left)))
            if 0 < n <= left:
                work.append((sequence, ids[sequence.length : sequence.length + n]))
        cuts.shuffle(work)
        if work:
            machine.step(work)
        elif all(sequence.length == len(ids) for sequence, ids in run):
            break
    for sequence, ids in run:
        machine.release(sequence)
        assert np.array_equal(np.stack(sequence.logits), machines[1].whole(ids))


@pytest.mark.parametrize("kv", list(KVKind))
@pytest.mark.parametrize("isa", native.supported_isas() if native.library_path().exists() else [])
def test_long_context_bits_and_bounds(kv: KVKind, isa: str) -> None:
    """300 tokens are more than a span: decoding them on two threads merges spans, computing them at once does not."""
    ids = some_ids(300)
    one, two = (Machine("llama", threads=threads, kv=kv, isa=isa) for threads in (1, 2))
    logits = {}
    for machine, cuts in ((one, (100, 200)), (two, (128, 256, *range(257, 300)))):
        sequence = machine.sequence()
        for start, end in itertools.pairwise((0, *cuts, 300)):
            machine.step([(sequence, ids[start:end])])
        logits[machine] = np.stack(sequence.logits)
    assert np.array_equal(logits[one], logits[two])
    want = oracle(one.model, [ids])
    bound = {KVKind.F32: 1e-4, KVKind.BF16: 0.02, KVKind.INT8: 0.03, KVKind.INT4: 0.4}[kv]
    error = np.sqrt(np.mean((logits[one] - want) ** 2) / np.mean(want**2))
    assert error <= bound


@pytest.mark.parametrize(("kind", "group"), [(Kind.BF16, 0), (Kind.INT8_ROW, 0), (Kind.INT8, 32), (Kind.INT4_MIN, 32)])
def test_every_kind_of_weight_gives_one_answer(kind: Kind, group: int) -> None:
    one, two = (Machine("internlm2", threads=threads, kind=kind, group=group) for threads in (1, 2))
    ids = some_ids(60)
    whole, sequence, company = one.whole(ids), two.sequence(), two.sequence()
    for start, end in itertools.pairwise((0, 33, 34, 35, 60)):
        two.step([(company, some_ids(3, start)), (sequence, ids[start:end])])
    assert np.array_equal(np.stack(sequence.logits), whole)
    want = oracle(one.model, [ids])
    bound = {Kind.BF16: 0.02, Kind.INT4_MIN: 0.3}.get(kind, 0.05)
    assert np.sqrt(np.mean((whole - want) ** 2) / np.mean(want**2)) <= bound


def test_wanted_rows_hidden_states_and_top(machines: dict[int, Machine]) -> None:
    machine = machines[2]
    ids = some_ids(50)
    whole = machine.whole(ids)
    sequence = machine.sequence()
    none = machine.step([(sequence, ids[:20])], rows=np.zeros(0, np.int32))
    assert none.logits.shape == (0, VOCABULARY)
    rows = np.array([29, 3], np.int32)
    got = machine.step([(sequence, ids[20:])], rows=rows, hidden=True, top=5)
    assert np.array_equal(got.logits, whole[20 + rows])
    assert got.top is not None
    assert np.array_equal(got.top.ids, np.argsort(-got.logits, axis=1, kind="stable")[:, :5])
    assert np.array_equal(got.top.values, np.take_along_axis(got.logits, got.top.ids, 1))
    assert np.allclose(got.top.log_sum_exp, np.log(np.exp(got.logits.astype(np.float64)).sum(1)), rtol=1e-6)
    head = machine.model.parts().head
    with torch.no_grad():
        assert np.allclose(head(torch.from_numpy(got.hidden)).numpy(), got.logits, rtol=1e-4, atol=1e-4)
    machine.release(sequence)


def test_states_without_logits(machines: dict[int, Machine]) -> None:
    """The last of the wanted rows as hidden states alone, beside rows with logits and without any."""
    ids = some_ids(40)
    rows = np.array([7, 39, 3, 20], np.int32)
    whole = machines[1].step([(machines[1].sequence(), ids)], rows=rows, hidden=True)
    for machine in machines.values():
        for states in (1, 3, 4):
            sequence = machine.sequence()
            got = machine.step([(sequence, ids)], rows=rows, states=states, top=2)
            assert np.array_equal(got.hidden, whole.hidden)
            assert np.array_equal(got.logits, whole.logits[: 4 - states])
            assert got.top is not None and got.top.ids.shape == (4 - states, 2)
            machine.release(sequence)


def test_bad_steps_are_refused_before_anything_is_computed(machines: dict[int, Machine]) -> None:
    program, half = machines[1].program, machines[1].model.config.rope.dims // 2
    good: dict[str, Any] = {
        "ids": np.array([1, 2], np.int32),
        "slots": np.array([0, 1], np.int64),
        "rows": np.array([1], np.int32),
        "cos": np.ones((2, half), np.float32),
        "sin": np.zeros((2, half), np.float32),
    }
    layout: dict[str, Any] = {
        "query_start": np.array([0, 2], np.int32),
        "context": np.array([2], np.int32),
        "block_table": np.array([[0]], np.int32),
    }
    program.run(Step(layout=Layout(**layout), **good))
    bad_steps = {
        "id 61": {"ids": np.array([1, 61], np.int32)},
        "id -1": {"ids": np.array([1, -1], np.int32)},
        "slot 1024": {"slots": np.array([0, 1024], np.int64)},
        "row 0 is token 2": {"rows": np.array([2], np.int32)},
        "2 of 1 wanted": {"states": 2},
        "-1 of 1 wanted": {"states": -1},
        "cos or sin is missing": {"cos": None},
        "dtype must be int32": {"ids": np.array([1, 2])},
    }
    for message, change in bad_steps.items():
        with pytest.raises(ConfigError, match=message):
            program.run(Step(layout=Layout(**layout), **{**good, **change}))
    bad_layouts = {
        "names block 64": {"block_table": np.array([[64]], np.int32)},
        "needs 2 blocks": {"context": np.array([17], np.int32)},
        "2 new tokens in a context of 1": {"context": np.array([1], np.int32)},
        "query_start must go from 0 to 2": {"query_start": np.array([0, 3], np.int32)},
        "prefix of 3": {"prefix_len": np.array([3], np.int32)},
    }
    for message, change in bad_layouts.items():
        with pytest.raises(ConfigError, match=message):
            program.run(Step(layout=Layout(**{**layout, **change}), **good))
    with pytest.raises(ConfigError, match="takes up to 128"):
        machines[1].step([(machines[1].sequence(), some_ids(129))])


def test_programs_that_make_no_sense_name_the_operation() -> None:
    context = Context(1)
    pool = KVPool(KVKind.BF16, layers=1, blocks=2, block_size=16, heads=2, head_size=16)
    square, head = PackedWeight(Kind.F32, 64, 64), PackedWeight(Kind.F32, 8, 64)
    qkv = PackedWeight(Kind.F32, (4 + 2 * 2) * 16, 64)
    table = np.zeros((8, 64), np.float32)

    def built(make: Callable[[Program], None]) -> None:
        program = Program(context, pool)
        make(program)
        program.build(max_tokens=4)

    def heads(program: Program, count: int, layer: int) -> None:
        x = program.linear(program.embed(table), qkv)
        program.rope(x, layer, heads=count, rotary=16)

    wrong: dict[str, Callable[[Program], Any]] = {
        r"last operation must be HEAD": lambda p: p.embed(table),
        r"operation 1 \(HEAD\): needs the rows of a GATHER": lambda p: p.head(p.embed(table), head),
        r"operation 2 \(LINEAR\): the weight has 64 inputs": lambda p: p.linear(p.gate(p.embed(table)), square),
        r"operation 2 \(ROPE\): q, k and v have 128 columns": lambda p: p.rope(
            p.linear(p.embed(table), square), 0, heads=4, rotary=16
        ),
        r"operation 2 \(ROPE\): layer 1 of 1": lambda p: heads(p, 4, 1),
        r"operation 2 \(ROPE\): 3 heads are no multiple of 2": lambda p: heads(p, 3, 0),
    }
    for message, make in wrong.items():
        with pytest.raises(ConfigError, match=message):
            built(make)
    program = Program(context)
    program.head(program.gather(program.embed(table)), head)
    with pytest.raises(ConfigError, match="not been built"):
        program.nbytes  # noqa: B018
    program.build(max_tokens=4)
    assert program.nbytes > 0
    with pytest.raises(ConfigError, match="has been built"):
        program.embed(table)
    with pytest.raises(ConfigError, match="without one"):
        empty = Program(context)
        empty.attend(empty.embed(table), 0, heads=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, None])
def test_what_other_families_need(dtype: torch.dtype | None) -> None:
    """LayerNorm, a scaled residual, GELU, gates that are not interleaved, biases; tables of floats and packed ones."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    with Context(2) as context:

        def pack(matrix: torch.Tensor) -> PackedWeight:
            weight = PackedWeight(Kind.F32, matrix.shape[0], matrix.shape[1])
            context.pack(weight, matrix)
            return weight

        table = draw(9, 24) if dtype is None else draw(9, 24).to(dtype)
        gain, bias, up_bias = draw(24), draw(24), draw(40)
        up, down, both, head = draw(40, 24), draw(24, 40), draw(48, 24), draw(7, 24)
        program = Program(context)
        x = program.embed(pack(table) if dtype is None else table)
        normal = program.norm(x, gain, bias, eps=1e-5, kind=Norm.LAYER)
        residual = program.add(normal, scale=7.5)
        program.linear(program.linear(normal, pack(up), up_bias, gelu=True), pack(down), add_to=residual)
        gated = program.gate(program.linear(residual, pack(both)), Function.GELU)
        program.head(program.gather(program.add(gated, residual, scale=0.5)), pack(head))
        program.build(max_tokens=40)
        ids = np.array([3, 8, 0, 3] * 10, np.int32)
        layout = Layout(
            query_start=np.array([0, 40], np.int32),
            context=np.array([40], np.int32),
            block_table=np.zeros((1, 1), np.int32),
        )
        rows = np.array([39, 1, 20], np.int32)
        got = program.run(Step(ids=ids, slots=np.zeros(40, np.int64), layout=layout, rows=rows), hidden=True)
    functional = torch.nn.functional
    normal_ = functional.layer_norm(table.float()[ids], (24,), gain, bias, 1e-5)
    residual_ = 7.5 * normal_ + functional.linear(
        functional.gelu(functional.linear(normal_, up, up_bias), approximate="tanh"), down
    )
    gate_, up_ = (residual_ @ both.T).chunk(2, -1)
    hidden = 0.5 * functional.gelu(gate_, approximate="tanh") * up_ + residual_
    assert np.allclose(got.hidden, hidden[rows].numpy(), rtol=1e-4, atol=1e-4)
    assert np.allclose(got.logits, (hidden[rows] @ head.T).numpy(), rtol=1e-4, atol=1e-4)

"""Promise 2 with adapters: a request's bytes depend neither on its neighbours nor on whose adapters they use."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_engine_promises import RUNNERS, SAMPLINGS, answer, engine_of, needs_native, request, run

from adapter_directory import linears_of
from hanlin.engine.sequence import Adapter, Sequence
from hanlin.engine.speculative import PromptLookup
from hanlin.layers.lora import LowRank
from hanlin.types import SamplingParams

KINDS = ["torch-float32", "float32", "bfloat16", "int8-kv8"]
PARAMS = [pytest.param(name, marks=[] if name.startswith("torch") else needs_native, id=name) for name in KINDS]
RANKS = (3, 16, 40)


@functools.lru_cache(maxsize=8)
def additions(model: Any, number: int) -> dict[str, LowRank]:
    """Adapter `number` of a model: of all layers, of every second one, of the fused projections alone."""
    generator = torch.Generator().manual_seed(number)
    rank = RANKS[number]
    made = {}
    for place, (name, (rows, columns)) in enumerate(linears_of(model).items()):
        if (number == 1 and place % 2) or (number == 2 and not name.endswith("wqkv")):
            continue
        down = torch.randn(rank, columns, generator=generator) * 0.3
        up = torch.randn(rows, rank, generator=generator) * 0.3
        made[name] = LowRank(down=down, up=up, scale=0.5)
    return made


def adapters_of(engine: Any, model: Any) -> list[Adapter | None]:
    return [None, *(engine.runner.adapt(additions(model, number)) for number in range(len(RANKS)))]


@functools.lru_cache(maxsize=64)
def _alone(model: Any, make: Any) -> dict[Any, Any]:
    return {}


def alone(model: Any, plan: dict[str, Any], make: Any) -> Any:
    """The request's answer by itself; where it has no adapter, from an engine that never saw one."""
    known, key = _alone(model, make), (tuple(plan["prompt"]), str(plan["sampling"]), plan["adapter"])
    if key not in known:
        engine = engine_of(model, make=make)
        adapter = adapters_of(engine, model)[plan["adapter"]] if plan["adapter"] else None
        sequence = request(plan["prompt"], plan["sampling"], model, adapter=adapter)
        engine.add(sequence)
        run(engine)
        known[key] = answer(sequence)
    return known[key]


@st.composite
def schedules(draw: Any) -> dict[str, Any]:
    stem = draw(st.lists(st.integers(0, 96), min_size=0, max_size=40))
    requests = [
        {
            "prompt": stem + draw(st.lists(st.integers(0, 96), min_size=1, max_size=15)),
            "sampling": draw(SAMPLINGS),
            "arrives": draw(st.integers(0, 6)),
            "adapter": draw(st.integers(0, len(RANKS))),
        }
        for _ in range(draw(st.integers(2, 6)))
    ]
    return {
        "requests": requests,
        "max_step_tokens": draw(st.integers(3, 60)),
        "prefix_caching": draw(st.booleans()),
        "tight": draw(st.booleans()),
        "drafts": draw(st.booleans()),
    }


@pytest.mark.parametrize("runner", PARAMS)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(plan=schedules())
def test_one_request_one_answer_whoever_uses_which_adapter(tiny: Any, runner: str, plan: dict[str, Any]) -> None:
    dtype, make = RUNNERS[runner]
    model = tiny("internlm2", dtype).requires_grad_(False)
    longest = max(-(-(len(r["prompt"]) + r["sampling"].max_tokens) // 16) for r in plan["requests"])
    engine = engine_of(
        model,
        blocks=longest if plan["tight"] else 40,
        make=make,
        drafter=PromptLookup(2, 1) if plan["drafts"] else None,
        max_step_tokens=plan["max_step_tokens"],
        max_sequences=5,
        prefix_caching=plan["prefix_caching"],
    )
    adapters = adapters_of(engine, model)
    sequences = [request(r["prompt"], r["sampling"], model, adapter=adapters[r["adapter"]]) for r in plan["requests"]]
    for step in range(3000):
        for r, sequence in zip(plan["requests"], sequences, strict=True):
            if r["arrives"] == step:
                engine.add(sequence)
        if step > 6 and engine.idle:
            break
        engine.step()
        engine.check_integrity()
    for r, sequence in zip(plan["requests"], sequences, strict=True):
        assert answer(sequence) == alone(model, r, make)


@pytest.mark.parametrize("runner", ["torch-float32", pytest.param("float32", marks=needs_native)])
def test_cached_text_is_shared_within_one_adapter_only(tiny: Any, runner: str) -> None:
    dtype, make = RUNNERS[runner]
    model = tiny("llama", dtype).requires_grad_(False)
    engine = engine_of(model, make=make)
    adapters = adapters_of(engine, model)
    again = engine.runner.adapt(additions(model, 0))  # the same numbers, loaded again: another adapter
    cached = []
    for adapter in (None, adapters[1], adapters[2], again, None, adapters[1], adapters[2]):
        sequence = request(list(range(40)), SamplingParams(temperature=0, max_tokens=2), model, adapter=adapter)
        engine.add(sequence)
        run(engine)
        cached.append(sequence.cached)
    assert cached == [0, 0, 0, 0, 32, 32, 32]


def test_preempted_requests_keep_their_adapter(tiny: Any) -> None:
    model = tiny("internlm2").requires_grad_(False)
    make = RUNNERS["torch-float32"][1]
    engine = engine_of(model, blocks=14, block_size=4, prefix_caching=False)
    adapters = adapters_of(engine, model)
    plans = [
        {"prompt": [5, 6, 7 + i], "sampling": SamplingParams(temperature=0.9, max_tokens=30), "adapter": i}
        for i in range(4)
    ]
    sequences: list[Sequence] = []
    for plan in plans:
        adapter = adapters[int(str(plan["adapter"]))]
        sequences.append(request(plan["prompt"], plan["sampling"], model, adapter=adapter))  # type: ignore[arg-type]
        engine.add(sequences[-1])
    run(engine)
    assert sum(s.preemptions for s in sequences) > 0
    assert [answer(s) for s in sequences] == [alone(model, plan, make) for plan in plans]
    assert len({tuple(s.generated) for s in sequences}) == 4

"""Promise 2 for what is looked at only: rewards, embeddings and scores have the same bytes whatever else runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_engine_promises import RUNNER_PARAMS, RUNNERS, alone, answer, engine_of, needs_native, request, run

from hanlin.engine.sequence import Sequence
from hanlin.layers.attend import PackedAttend
from hanlin.layers.rope import Positions
from hanlin.types import SamplingParams

LOOK = SamplingParams(max_tokens=1)
WRITE = SamplingParams(temperature=1.0, max_tokens=5, logprobs=1)
KINDS = ("mean", "last", "value", "score")
REWARD = {"architectures": ["InternLM2ForRewardModel"], "reward_token_id": 96}


def look(prompt: list[int], kind: str, model: Any) -> Sequence:
    how = {"score_prompt": True} if kind == "score" else {"pool": kind}
    return request(prompt, LOOK, model, **how)


def seen(sequence: Sequence) -> bytes:
    """What came of it, bit by bit."""
    answer(sequence)
    values = sequence.prompt_logprobs if sequence.pooled is None else sequence.pooled
    return np.asarray(values).tobytes()


@pytest.fixture(scope="module")
def truth() -> dict[Any, bytes]:
    return {}


@st.composite
def schedules(draw: Any) -> dict[str, Any]:
    stem = draw(st.lists(st.integers(0, 95), min_size=0, max_size=40))
    tails = draw(st.lists(st.lists(st.integers(0, 95), min_size=1, max_size=25), min_size=1, max_size=5))
    return {
        "requests": [
            ((stem if draw(st.booleans()) else []) + tail, draw(st.sampled_from((*KINDS, "write")))) for tail in tails
        ],
        "arrives": [draw(st.integers(0, 5)) for _ in tails],
        "max_step_tokens": draw(st.integers(3, 50)),
        "prefix_caching": draw(st.booleans()),
        "tight": draw(st.booleans()),
    }


@pytest.mark.parametrize("runner", RUNNER_PARAMS)
@pytest.mark.parametrize("kind", ["reward", "chat"])
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(plan=schedules())
def test_one_judgement(tiny: Any, truth: dict[Any, bytes], runner: str, kind: str, plan: dict[str, Any]) -> None:
    dtype, make = RUNNERS[runner]
    model = tiny("internlm2-dynamic", dtype, **(REWARD if kind == "reward" else {}))
    if kind == "reward":  # it has values and no words
        requests = [(p, {"write": "value", "score": "mean"}.get(k, k)) for p, k in plan["requests"]]
    else:
        requests = [(p, "last" if k == "value" else k) for p, k in plan["requests"]]
    longest = max(-(-(len(p) + 5) // 16) for p, _ in requests)
    engine = engine_of(
        model,
        blocks=longest if plan["tight"] else 40,
        make=make,
        max_step_tokens=plan["max_step_tokens"],
        prefix_caching=plan["prefix_caching"],
    )
    sequences = [request(p, WRITE, model) if k == "write" else look(p, k, model) for p, k in requests]
    for step in range(500):
        for sequence, arrives in zip(sequences, plan["arrives"], strict=True):
            if arrives == step:
                engine.add(sequence)
        if step > 5 and engine.idle:
            break
        engine.step()
        engine.check_integrity()
    assert engine.idle and engine.blocks.free == engine.blocks.count
    for (prompt, how), sequence in zip(requests, sequences, strict=True):
        if how == "write":
            assert answer(sequence) == alone(model, prompt, WRITE, make)
            continue
        key = (runner, kind, how, *prompt)
        if key not in truth:
            single = engine_of(model, make=make)
            only = look(prompt, how, model)
            single.add(only)
            run(single)
            truth[key] = seen(only)
        assert seen(sequence) == truth[key]


@pytest.mark.parametrize("runner", RUNNER_PARAMS[:-1])  # 4 bits of random numbers are near nothing
def test_judgements_are_right(tiny: Any, runner: str) -> None:
    """Against the module on plain attention, as near as the kinds of weights allow."""
    dtype, make = RUNNERS[runner]
    model = tiny("internlm2", dtype, **REWARD)
    ids = np.random.default_rng(2).integers(0, 96, 70).tolist()
    with torch.no_grad():
        hidden = model(torch.tensor(ids), Positions(torch.arange(70)[None]), PackedAttend([70])).float()
    want = {"mean": hidden.mean(0), "last": hidden[-1], "value": model.head(hidden[-1:].to(dtype))[0]}
    bound = 1e-5 if runner in ("torch-float32", "float32") else 0.2 if "int8" in runner else 0.06
    for pool, expected in want.items():
        engine = engine_of(model, make=make, max_step_tokens=23)
        sequence = look(ids, pool, model)
        engine.add(sequence)
        run(engine)
        assert sequence.pooled is not None and sequence.pooled.shape == expected.shape
        assert np.sqrt(np.mean((sequence.pooled - expected.numpy()) ** 2)) <= bound


@needs_native
@pytest.mark.parametrize("pool", ["mean", "last", "value"])
def test_threads_change_no_judgement(tiny: Any, pool: str) -> None:
    from test_engine_promises import native

    model = tiny("internlm2", **REWARD)
    got = set()
    for threads in (1, 2, 5):
        engine = engine_of(model, make=native("int8", "int8", threads))
        sequence = look(list(range(60)), pool, model)
        engine.add(sequence)
        run(engine)
        got.add(seen(sequence))
    assert len(got) == 1


def test_the_cache_is_used_where_one_row_is_enough(tiny: Any) -> None:
    model = tiny("internlm2", **REWARD)
    engine = engine_of(model)
    cached = []
    for pool in ("mean", "last", "value", "mean"):
        sequence = look(list(range(40)), pool, model)
        engine.add(sequence)
        run(engine)
        cached.append(sequence.cached)
    assert cached == [0, 0, 32, 0]


def test_preempted_judgements_begin_anew(tiny: Any) -> None:
    """What was added up so far does not count twice."""
    model = tiny("internlm2")
    for kind in ("mean", "score"):
        got = []
        for preempted in (False, True):
            engine = engine_of(model, max_step_tokens=20)
            sequence = look(list(range(60)), kind, model)
            engine.add(sequence)
            engine.step()
            engine.step()
            assert sequence.computed == 40
            if preempted:
                engine.scheduler._preempt(sequence)
            run(engine)
            got.append(seen(sequence))
            assert sequence.preemptions == preempted
        assert got[0] == got[1]

"""Promise 2 for ChatGLM-6B: its prefix is computed in one step, and shared only with requests that have the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_engine_promises import (
    RUNNERS,
    SAMPLINGS,
    Listener,
    answer,
    engine_of,
    native,
    needs_native,
    run,
    torch_runner,
)

from hanlin.engine.sequence import Sequence
from hanlin.layers.attend import PackedAttend
from hanlin.layers.rope import Positions
from hanlin.models.registry import layout_of
from hanlin.types import SamplingParams

MASK, GMASK, SOP = 90, 91, 92
ANY = [pytest.param(name, marks=[] if name.startswith("torch") else needs_native, id=name) for name in RUNNERS]


def request(prompt: list[int], sampling: SamplingParams, model: Any, **extra: Any) -> Sequence:
    rule = layout_of(model.config)
    assert rule is not None
    context, positions = rule(prompt)
    sink = Listener()
    return Sequence(
        prompt=tuple(prompt), sampling=sampling, sink=sink, seed=7, prefix_len=context, positions=positions, **extra
    )


def prompts(rng: Any, *lengths: int) -> list[list[int]]:
    return [[*rng.integers(0, 90, n).tolist(), GMASK, SOP] for n in lengths]


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    """(T, V), all computed at once, without any cache."""
    rule = layout_of(model.config)
    assert rule is not None
    context, positions = rule(ids)
    places = Positions(torch.from_numpy(positions(0, len(ids))))
    soft = model.parts().prefix
    attend = PackedAttend([len(ids)], [context], soft() if soft else None)
    return model.head(model(torch.tensor(ids), places, attend))  # type: ignore[no-any-return]


@pytest.mark.parametrize("soft", [0, 7, 32])
def test_engine_equals_recomputation(tiny: Any, soft: int) -> None:
    model, rng = tiny("chatglm", pre_seq_len=soft), np.random.default_rng(3)
    engine = engine_of(model, max_step_tokens=11)
    sampling = SamplingParams(temperature=0, max_tokens=12)
    mixed = [*prompts(rng, 1, 5, 16, 40), [3, MASK, 7, SOP], [GMASK, SOP, 5, 6, 7, 8] * 4]
    sequences = [request(prompt, sampling, model) for prompt in mixed]
    for sequence in sequences:
        engine.add(sequence)
    run(engine)
    for sequence in sequences:
        ids = list(sequence.prompt)
        for _ in range(12):
            ids.append(int(logits_of(model, ids)[-1].argmax()))
        assert sequence.generated == ids[len(sequence.prompt) :]


@needs_native
@pytest.mark.parametrize(
    "changes",
    [{}, {"inner_hidden_size": 72}, {"pre_seq_len": 5}, {"pre_seq_len": 40, "prefix_projection": True}],
    ids=["plain", "inner", "prefix", "projected"],
)
def test_native_equals_torch(tiny: Any, changes: dict[str, Any]) -> None:
    model = tiny("chatglm", **changes)
    (prompt,) = prompts(np.random.default_rng(5), 50)
    ids = [*prompt, *range(40)]
    rows, answers = [], []
    for make in (torch_runner, native("float32", "float32")):
        engine = engine_of(model, make=make, max_step_tokens=23)
        scored = request(ids, SamplingParams(max_tokens=1), model, score_prompt=True)
        told = request(prompt, SamplingParams(temperature=0, max_tokens=20), model)
        for sequence in (scored, told):
            engine.add(sequence)
        run(engine)
        rows.append(np.asarray(scored.prompt_logprobs))
        answers.append(told.generated)
    assert np.abs(rows[0] - rows[1]).max() < 1e-4
    assert answers[0] == answers[1]
    want = logits_of(model, ids).double().log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    assert np.abs(rows[0] - want.numpy()).max() < 1e-5


@st.composite
def schedules(draw: Any) -> dict[str, Any]:
    stem = draw(st.lists(st.integers(0, 89), min_size=0, max_size=20))
    requests = []
    for _ in range(draw(st.integers(1, 4))):
        context = draw(st.lists(st.integers(0, 89), max_size=30))
        mask = draw(st.sampled_from([GMASK, MASK]))
        reply = draw(st.lists(st.integers(0, 89), max_size=10))
        text = stem if draw(st.booleans()) else [*stem, *context]
        sampling, arrives = draw(SAMPLINGS), draw(st.integers(0, 6))
        requests.append({"prompt": [*text, mask, SOP, *reply], "sampling": sampling, "arrives": arrives})
    return {
        "requests": requests,
        "block_size": draw(st.sampled_from([16, 32])),
        "max_step_tokens": draw(st.integers(3, 40)),
        "max_sequences": draw(st.integers(1, 4)),
        "prefix_caching": draw(st.booleans()),
        "tight": draw(st.booleans()),
        "soft": draw(st.sampled_from([0, 0, 5, 32])),
    }


@pytest.mark.parametrize("runner", ANY)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(plan=schedules())
def test_one_request_one_answer(tiny: Any, runner: str, plan: dict[str, Any]) -> None:
    dtype, make = RUNNERS[runner]
    model = tiny("chatglm", dtype, pre_seq_len=plan["soft"])
    size, soft = plan["block_size"], plan["soft"]
    longest = max(-(-(soft + len(r["prompt"]) + r["sampling"].max_tokens) // size) for r in plan["requests"])
    limits = {name: plan[name] for name in ("max_step_tokens", "max_sequences", "prefix_caching")}
    engine = engine_of(model, longest if plan["tight"] else 400 // size, make, block_size=size, **limits)
    sequences = [request(r["prompt"], r["sampling"], model) for r in plan["requests"]]
    for step in range(3000):
        for r, sequence in zip(plan["requests"], sequences, strict=True):
            if r["arrives"] == step:
                engine.add(sequence)
        if step > 6 and engine.idle:
            break
        engine.step()
        engine.check_integrity()
    assert engine.idle and engine.blocks.free == engine.blocks.count
    for r, sequence in zip(plan["requests"], sequences, strict=True):
        alone = engine_of(model, make=make)
        single = request(r["prompt"], r["sampling"], model)
        alone.add(single)
        run(alone)
        assert answer(sequence) == answer(single)


@pytest.mark.parametrize(("soft", "shared"), [(0, 32), (16, 32), (21, 27), (3, 29)])
def test_a_prefix_is_shared_only_whole(tiny: Any, soft: int, shared: int) -> None:
    model = tiny("chatglm", pre_seq_len=soft)
    engine = engine_of(model)
    sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=3)
    text = list(range(40))
    got = []
    for prompt in ([*text, GMASK, SOP], [*text, GMASK, SOP], [*text, 50, GMASK, SOP], [*text, GMASK, SOP, 5]):
        sequence = request(prompt, sampling, model)
        engine.add(sequence)
        run(engine)
        got.append((sequence.cached, answer(sequence)))
    assert [cached for cached, _ in got] == [0, shared, 0, shared]
    assert got[0] == (0, got[1][1])

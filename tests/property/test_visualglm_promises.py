"""Promise 2 with images: what is given in place of embeddings changes the answer, and nothing else does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import given as drawn
from hypothesis import strategies as st
from test_chatglm_promises import GMASK, MASK, SOP, request
from test_engine_promises import (
    RUNNER_PARAMS,
    RUNNERS,
    SAMPLINGS,
    answer,
    engine_of,
    native,
    needs_native,
    run,
    torch_runner,
)

from hanlin.engine.sequence import Given
from hanlin.layers.attend import PackedAttend
from hanlin.layers.rope import Positions
from hanlin.models.registry import layout_of
from hanlin.types import SamplingParams

PAD = 3
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def image(number: int, start: int, rows: int = 5) -> Given:
    values = np.random.default_rng(number).standard_normal((rows, 32)).astype(np.float32)
    return Given(start, values, b"%d" % number)


def logits_of(model: Any, ids: list[int], images: tuple[Given, ...]) -> torch.Tensor:
    """(T, V), all computed at once, without any cache, from embeddings put together by hand."""
    rule = layout_of(model.config)
    assert rule is not None
    context, positions = rule(ids)
    body = model.transformer
    x = body.word_embeddings(torch.tensor(ids)).clone()
    for each in images:
        x[each.start : each.start + len(each.rows)] = torch.from_numpy(each.rows)
    rotation = body.rope(Positions(torch.from_numpy(positions(0, len(ids)))))
    attend = PackedAttend([len(ids)], [context], None)
    for index, layer in enumerate(body.layers):
        x = layer(index, x, rotation, attend)
    return model.head(body.final_layernorm(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [torch_runner, pytest.param(native("float32", "float32"), marks=needs_native)])
def test_engine_equals_recomputation(tiny: Any, make: Any) -> None:
    model, rng = tiny("visualglm"), np.random.default_rng(3)
    engine = engine_of(model, make=make, max_step_tokens=11)
    cases = []
    for number, before, after in ((1, 0, 3), (2, 4, 30), (3, 17, 0), (0, 9, 9)):
        ids = [*rng.integers(0, 90, before).tolist(), *[PAD] * 5, *rng.integers(0, 90, after).tolist(), GMASK, SOP]
        images = (image(number, before),) if number else ()
        cases.append((ids, images, request(ids, GREEDY, model, given=images)))
    two = [*[PAD] * 5, 7, *[PAD] * 5, GMASK, SOP]
    pair = image(4, 0), image(5, 6)
    cases.append((two, pair, request(two, GREEDY, model, given=pair)))
    for _, _, sequence in cases:
        engine.add(sequence)
    run(engine)
    for ids, images, sequence in cases:
        known = list(ids)
        for _ in range(12):
            known.append(int(logits_of(model, known, images)[-1].argmax()))
        assert sequence.generated == known[len(ids) :]


@pytest.mark.parametrize("runner", RUNNER_PARAMS)
def test_two_images_never_share_blocks(tiny: Any, runner: str) -> None:
    dtype, make = RUNNERS[runner]
    model = tiny("visualglm", dtype)
    ids = [*[PAD] * 5, *range(10, 60), GMASK, SOP]
    engine = engine_of(model, make=make)
    got = []
    for number in (1, 2, 1, 0, 2, 0):
        sequence = request(ids, GREEDY, model, given=(image(number, 0),) if number else ())
        engine.add(sequence)
        run(engine)
        got.append((sequence.cached > 0, sequence.generated))
    assert [cached for cached, _ in got] == [False, False, True, False, True, True]
    one, two, again, none, two_again, none_again = (generated for _, generated in got)
    assert (one, two, none) == (again, two_again, none_again)
    assert len({tuple(one), tuple(two), tuple(none)}) == 3


@st.composite
def schedules(draw: Any) -> dict[str, Any]:
    requests = []
    for _ in range(draw(st.integers(1, 4))):
        number, before = draw(st.integers(0, 2)), draw(st.integers(0, 18))
        after = draw(st.lists(st.integers(0, 89), max_size=30))
        mask, reply = draw(st.sampled_from([GMASK, MASK])), draw(st.lists(st.integers(0, 89), max_size=10))
        ids = [*range(20, 20 + before), *[PAD] * 5, *after, mask, SOP, *reply]
        sampling, arrives = draw(SAMPLINGS), draw(st.integers(0, 6))
        requests.append({"ids": ids, "image": (number, before), "sampling": sampling, "arrives": arrives})
    return {
        "requests": requests,
        "block_size": draw(st.sampled_from([16, 32])),
        "max_step_tokens": draw(st.integers(3, 40)),
        "max_sequences": draw(st.integers(1, 4)),
        "prefix_caching": draw(st.booleans()),
        "tight": draw(st.booleans()),
    }


@pytest.mark.parametrize("runner", RUNNER_PARAMS)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@drawn(plan=schedules())
def test_one_request_one_answer(tiny: Any, runner: str, plan: dict[str, Any]) -> None:
    dtype, make = RUNNERS[runner]
    model, size = tiny("visualglm", dtype), plan["block_size"]

    def made(r: dict[str, Any]) -> Any:
        number, start = r["image"]
        return request(r["ids"], r["sampling"], model, given=(image(number, start),) if number else ())

    longest = max(-(-(len(r["ids"]) + r["sampling"].max_tokens) // size) for r in plan["requests"])
    limits = {name: plan[name] for name in ("max_step_tokens", "max_sequences", "prefix_caching")}
    engine = engine_of(model, longest if plan["tight"] else 400 // size, make, block_size=size, **limits)
    sequences = [made(r) for r in plan["requests"]]
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
        single = made(r)
        alone.add(single)
        run(alone)
        assert answer(sequence) == answer(single)

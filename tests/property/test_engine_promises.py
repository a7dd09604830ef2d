"""Promise 2: one request, one answer, whatever the schedule, the neighbours, the cache and the pool do."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hanlin.engine.engine import Engine, EngineLimits
from hanlin.engine.lowering import Lowering
from hanlin.engine.native import NativeRunner
from hanlin.engine.runner import TorchRunner
from hanlin.engine.sequence import Sampled, Sequence
from hanlin.engine.speculative import ModelDrafter, PromptLookup
from hanlin.kernels.native import Context, available, unavailable_reason
from hanlin.layers.attend import PackedAttend
from hanlin.layers.rope import Positions
from hanlin.types import SamplingParams


def torch_runner(model: Any, blocks: int, size: int) -> TorchRunner:
    return TorchRunner(model, blocks=blocks, block_size=size, invariant=True)


def native(weights: str, kv_cache: str, threads: int = 2) -> Any:
    """A maker of native runners over a model in memory."""

    def make(model: Any, blocks: int, size: int) -> NativeRunner:
        context = Context(threads)
        lowering = Lowering(model, weights=weights, context=context)
        lowering.plan({name: ("F32",) for name, _ in model.named_parameters()}, {})
        for name, parameter in model.named_parameters():
            rows = (parameter.detach().float(), np.arange(len(parameter), dtype=np.int32))
            lowering.take(name, lambda rows=rows, raw=False: iter([rows]))  # type: ignore[misc]
        return NativeRunner(
            lowering,
            model.config,
            context=context,
            rope=model.config.rope,
            blocks=blocks,
            block_size=size,
            kv_cache=kv_cache,
            max_tokens=256,
        )

    return make


needs_native = pytest.mark.skipif(not available(), reason=f"the native library: {unavailable_reason()}")
RUNNERS = {
    "torch-float32": (torch.float32, torch_runner),
    "torch-bfloat16": (torch.bfloat16, torch_runner),
    "float32": (torch.float32, native("float32", "float32")),
    "bfloat16": (torch.float32, native("bfloat16", "bfloat16")),
    "int8-kv8": (torch.float32, native("int8", "int8")),
    "int4-kv4": (torch.float32, native("int4", "int4")),
}
KINDS = ["internlm2", "internlm2-bias", "internlm2-dynamic", "llama", "qwen2", "internlm", "internlm3"]
KINDS += ["chatglm2", "chatglm2-32k", "glm"]
RUNNER_PARAMS = [
    pytest.param(name, marks=[] if name.startswith("torch") else needs_native, id=name) for name in RUNNERS
]


@dataclass
class Listener:
    got: list[Sampled] = field(default_factory=list)
    ended: int = 0
    stop_at: int | None = None

    def token(self, sampled: Sampled) -> str | None:
        assert not self.ended
        self.got.append(sampled)
        return "here" if len(self.got) == self.stop_at else None

    def finish(self, sequence: Sequence) -> None:
        self.ended += 1

    def error(self, error: BaseException) -> None:
        raise error


def request(prompt: list[int], sampling: SamplingParams, model: Any, **extra: Any) -> Sequence:
    rope = model.config.rope.dynamic_length(len(prompt))
    return Sequence(prompt=tuple(prompt), sampling=sampling, sink=Listener(), seed=7, rope_length=rope, **extra)


class Oracle:
    """A drafter that is right most of the time, and wrong in all ways."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.truth: dict[Sequence, list[int]] = {}

    def propose(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            told = self.truth.get(sequence, [])[len(sequence.generated) :][: self.rng.integers(0, 6)]
            sequence.draft = [t if self.rng.random() < 0.8 else int(self.rng.integers(0, 97)) for t in told]
            sequence.draft += self.rng.integers(0, 97, self.rng.integers(0, 3)).tolist()


def engine_of(model: Any, blocks: int = 64, make: Any = torch_runner, drafter: Any = None, **limits: Any) -> Engine:
    size = limits.pop("block_size", 16)
    runner = make(model, blocks, size)
    return Engine(runner, EngineLimits(blocks=blocks, block_size=size, max_context=256, **limits), drafter)


def answer(sequence: Sequence) -> tuple[Any, ...]:
    assert isinstance(sequence.sink, Listener) and sequence.sink.ended == 1
    return tuple(sequence.sink.got), sequence.finish_reason


def run(engine: Engine) -> None:
    for _ in range(3000):
        if engine.idle:
            return
        engine.step()
        engine.check_integrity()
    raise AssertionError("the engine did not come to an end")


def recomputed(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by computing the whole text anew for each, without any cache."""
    ids = list(prompt)
    for _ in range(count):
        n = len(ids)
        length = model.config.rope.dynamic_length(len(prompt))
        lengths = torch.full((n,), length) if length else None
        hidden = model(torch.tensor(ids), Positions(torch.arange(n)[None], lengths), PackedAttend([n]))
        ids.append(int(model.head(hidden[-1:]).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_engine_equals_recomputation(tiny: Any, kind: str) -> None:
    rng = np.random.default_rng(3)
    engine = engine_of(tiny(kind), max_step_tokens=11)
    sequences = []
    for length in (1, 5, 16, 23, 40):
        prompt = rng.integers(0, 97, length).tolist()
        sequences.append(request(prompt, SamplingParams(temperature=0, max_tokens=12), tiny(kind)))
        engine.add(sequences[-1])
    run(engine)
    for sequence in sequences:
        assert sequence.generated == recomputed(tiny(kind), list(sequence.prompt), 12)


def test_a_step_says_when_it_computes(tiny: Any) -> None:
    engine, order = engine_of(tiny("llama")), list[str]()
    compute = engine.runner.run
    engine.runner.run = lambda batch: (order.append("run"), compute(batch))[1]  # type: ignore[method-assign]
    engine.step(lambda: order.append("said"))
    assert order == ["said"]  # also where there is nothing to compute: somebody waits for what was aborted
    engine.add(request([1, 2, 3], SamplingParams(temperature=0, max_tokens=2), tiny("llama")))
    while not engine.idle:
        engine.step(lambda: order.append("said"))
    assert order == ["said", *["said", "run"] * 2]


def test_short_prompts_are_computed_together_within_bounds(tiny: Any) -> None:
    engine = engine_of(tiny("llama"), blocks=64)
    for _ in range(12):
        engine.add(request([1] * 20, SamplingParams(max_tokens=2), tiny("llama")))
    counts = [tokens for _, tokens in engine.scheduler.schedule(40)]
    assert counts == [20] * 6  # whole, in three times what a step of longer ones may have
    assert [tokens for _, tokens in engine.scheduler.schedule(40)][-2:] == [20, 20]  # every other step keeps to it


SAMPLINGS = st.sampled_from(
    [
        SamplingParams(temperature=0, max_tokens=6, logprobs=2),
        SamplingParams(temperature=1.0, max_tokens=9, logprobs=1),
        SamplingParams(temperature=1.3, top_p=0.9, top_k=20, max_tokens=7, repetition_penalty=1.2),
        SamplingParams(temperature=0.7, min_p=0.05, presence_penalty=0.5, frequency_penalty=0.3, max_tokens=5),
    ]
)


@st.composite
def schedules(draw: Any) -> dict[str, Any]:
    stem = draw(st.lists(st.integers(0, 96), min_size=0, max_size=20))
    requests = []
    for _ in range(draw(st.integers(1, 5))):
        tail = draw(st.lists(st.integers(0, 96), min_size=1, max_size=25))
        requests.append(
            {
                "prompt": (stem if draw(st.booleans()) else []) + tail,
                "sampling": draw(SAMPLINGS),
                "arrives": draw(st.integers(0, 6)),
                "abort_after": draw(st.one_of(st.none(), st.none(), st.integers(0, 8))),
                "salt": draw(st.sampled_from([b"", b"", b"other"])),
            }
        )
    return {
        "requests": requests,
        "block_size": draw(st.sampled_from([16, 32])),
        "max_step_tokens": draw(st.integers(3, 40)),
        "max_sequences": draw(st.integers(1, 5)),
        "prefix_caching": draw(st.booleans()),
        "tight": draw(st.booleans()),
        "drafts": draw(st.booleans()),
    }


@functools.lru_cache(maxsize=8)
def _alone(model: Any, make: Any) -> dict[Any, Any]:
    return {}


def alone(model: Any, prompt: list[int], sampling: SamplingParams, make: Any = torch_runner) -> Any:
    """The answer of the request by itself, the cache cold, the prompt in one step."""
    known, key = _alone(model, make), (tuple(prompt), str(sampling))
    if key not in known:
        engine = engine_of(model, make=make)
        sequence = request(prompt, sampling, model)
        engine.add(sequence)
        run(engine)
        known[key] = answer(sequence)
    return known[key]


@pytest.mark.parametrize("runner", RUNNER_PARAMS)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(plan=schedules())
def test_one_request_one_answer(tiny: Any, runner: str, plan: dict[str, Any]) -> None:
    dtype, make = RUNNERS[runner]
    check(tiny("internlm2-dynamic", dtype), make, plan)


def check(model: Any, make: Any, plan: dict[str, Any]) -> None:
    """Every request of a plan gets the answer that it gets alone."""
    size = plan["block_size"]
    longest = max(-(-(len(r["prompt"]) + r["sampling"].max_tokens) // size) for r in plan["requests"])
    engine = engine_of(
        model,
        blocks=longest if plan["tight"] else 400 // size,
        make=make,
        drafter=(oracle := Oracle(len(plan["requests"]))) if plan["drafts"] else None,
        block_size=size,
        max_step_tokens=plan["max_step_tokens"],
        max_sequences=plan["max_sequences"],
        prefix_caching=plan["prefix_caching"],
    )
    sequences = [request(r["prompt"], r["sampling"], model, salt=r["salt"]) for r in plan["requests"]]
    if plan["drafts"]:
        oracle.truth = {
            s: [t.id for t in alone(model, r["prompt"], r["sampling"], make)[0]]
            for r, s in zip(plan["requests"], sequences, strict=True)
        }
    for step in range(3000):
        for r, sequence in zip(plan["requests"], sequences, strict=True):
            if r["arrives"] == step:
                engine.add(sequence)
            if r["abort_after"] is not None and r["arrives"] + r["abort_after"] == step:
                engine.abort(sequence)
        if step > 20 and engine.idle:
            break
        engine.step()
        engine.check_integrity()
    assert engine.idle and engine.blocks.free == engine.blocks.count
    for r, sequence in zip(plan["requests"], sequences, strict=True):
        want, reason = alone(model, r["prompt"], r["sampling"], make)
        got, ended = answer(sequence)
        if ended == "abort":
            assert got == want[: len(got)]
        else:
            assert (got, ended) == (want, reason)


def test_cache_is_used_and_changes_nothing(tiny: Any) -> None:
    model = tiny("llama")
    engine = engine_of(model)
    prompt = list(range(40))
    first, second = (request(prompt, SamplingParams(temperature=0, max_tokens=4, logprobs=3), model) for _ in range(2))
    for sequence in (first, second):
        engine.add(sequence)
        run(engine)
    assert (first.cached, second.cached) == (0, 32)
    assert answer(first) == answer(second)


def test_salts_do_not_share(tiny: Any) -> None:
    model = tiny("llama")
    engine = engine_of(model)
    for salt in (b"a", b"b", b"a"):
        sequence = request(list(range(40)), SamplingParams(temperature=0, max_tokens=1), model, salt=salt)
        engine.add(sequence)
        run(engine)
    assert sequence.cached == 32
    other = request(list(range(40)), SamplingParams(temperature=0, max_tokens=1), model, salt=b"c")
    engine.add(other)
    run(engine)
    assert other.cached == 0


def test_preemption_happens_and_changes_nothing(tiny: Any) -> None:
    model = tiny("internlm2")
    sampling = SamplingParams(temperature=0.9, max_tokens=30)
    engine = engine_of(model, blocks=14, block_size=4, prefix_caching=False)
    sequences = [request([5, 6, 7 + i], sampling, model) for i in range(4)]
    for sequence in sequences:
        engine.add(sequence)
    run(engine)
    assert sum(s.preemptions for s in sequences) > 0
    for i, sequence in enumerate(sequences):
        assert answer(sequence) == alone(model, [5, 6, 7 + i], sampling)


def test_scores_equal_recomputation(tiny: Any) -> None:
    model = tiny("internlm2")
    ids = np.random.default_rng(0).integers(0, 97, 30).tolist()
    engine = engine_of(model, max_step_tokens=7)
    sequence = request(ids, SamplingParams(max_tokens=1), model, score_prompt=True)
    engine.add(sequence)
    run(engine)
    logits = model.head(model(torch.tensor(ids), Positions(torch.arange(30)[None]), PackedAttend([30])))
    want = logits.double().log_softmax(-1)[range(29), ids[1:]]
    assert torch.allclose(torch.tensor(sequence.prompt_logprobs, dtype=torch.float64), want, atol=1e-5)


def test_a_long_prompt_does_not_stall_decoding(tiny: Any) -> None:
    model = tiny("llama")
    engine = engine_of(model, max_step_tokens=8, blocks=200)
    talker = request([1, 2, 3], SamplingParams(temperature=0, max_tokens=40), model)
    engine.add(talker)
    engine.step()
    engine.add(request(list(range(90)) * 2, SamplingParams(temperature=0, max_tokens=2), model))
    for _ in range(10):
        before = len(talker.generated)
        engine.step()
        assert len(talker.generated) == before + 1


@needs_native
@pytest.mark.parametrize("kind", KINDS)
def test_native_equals_torch(tiny: Any, kind: str) -> None:
    """The two runners compute the same logits, float32 to 1e-4, on prompts, chunks and decoding."""
    model = tiny(kind)
    rng = np.random.default_rng(5)
    prompt = rng.integers(0, 97, 50).tolist()
    rows = []
    for make in (torch_runner, native("float32", "float32")):
        engine = engine_of(model, make=make, max_step_tokens=23)
        sequence = request(prompt, SamplingParams(max_tokens=1), model, score_prompt=True)
        engine.add(sequence)
        run(engine)
        rows.append(np.asarray(sequence.prompt_logprobs))
    assert np.abs(rows[0] - rows[1]).max() < 1e-4
    answers = []
    for make in (torch_runner, native("float32", "float32")):
        engine = engine_of(model, make=make, max_step_tokens=23)
        sequence = request(prompt, SamplingParams(temperature=0, max_tokens=20), model)
        engine.add(sequence)
        run(engine)
        answers.append(sequence.generated)
    assert answers[0] == answers[1]


@needs_native
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_threads_change_nothing(tiny: Any, weights: str) -> None:
    model = tiny("llama")
    got = set()
    for threads in (1, 2, 3, 5):
        engine = engine_of(model, make=native(weights, "int8", threads))
        sequence = request(list(range(60)), SamplingParams(temperature=0.8, max_tokens=10, logprobs=3), model)
        engine.add(sequence)
        run(engine)
        got.add(answer(sequence))
    assert len(got) == 1


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0, max_tokens=60), SamplingParams(max_tokens=30)])
def test_guessing_saves_steps_and_changes_nothing(tiny: Any, sampling: SamplingParams) -> None:
    """Prompt lookup and a draft model (here the model itself, so that greedy guesses are right)."""
    model = tiny("internlm2")
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5] * 3
    want = alone(model, prompt, sampling)
    small = ModelDrafter(torch_runner(model, 64, 16), blocks=64, block_size=16, max_tokens=20)
    for drafter in (PromptLookup(), small):
        engine = engine_of(model, drafter=drafter)
        sequences = [request(prompt, sampling, model) for _ in range(2)]
        for sequence in sequences:
            engine.add(sequence)
        run(engine)
        assert [answer(sequence) for sequence in sequences] == [want, want]
        if drafter is small and sampling.temperature == 0:
            assert sequences[0].accepted > 30 and engine.steps < 40
    assert small._blocks.free < 64
    small.propose([])
    assert small._blocks.free == 64


def test_a_short_prompt_overtakes_long_ones_and_none_starves(tiny: Any) -> None:
    model = tiny("llama")
    engine = engine_of(model, blocks=200, max_step_tokens=20)
    sampling = SamplingParams(temperature=0, max_tokens=2)
    long = [request(list(range(i, i + 60)), sampling, model) for i in range(6)]
    for sequence in long:
        engine.add(sequence)
    engine.step()
    for number in range(200):
        if number % 2 == 0:  # short ones keep coming
            short = request([number % 90] * 8, sampling, model)
            engine.add(short)
            engine.step()
            assert short.generated, "a short prompt waited for long ones"
        else:
            engine.step()
        engine.check_integrity()
        if all(sequence.finish_reason for sequence in long):
            break
    assert number < 100, "long prompts starved"


def test_prompts_give_way_to_decoding(tiny: Any) -> None:
    """With a latency target, a long prompt is cut so that steps stay short while somebody decodes."""
    model = tiny("llama")
    engine = engine_of(model, blocks=200, max_step_tokens=200, step_seconds=1e-9)
    engine._pace.note(100, 1, 1.0)
    talker = request([1, 2, 3], SamplingParams(temperature=0, max_tokens=30), model)
    engine.add(talker)
    engine.step()
    long = request(list(range(90)) * 2, SamplingParams(temperature=0, max_tokens=2), model)
    engine.add(long)
    engine.step()
    assert 0 < long.computed <= 33
    run(engine)
    assert answer(long) == alone(model, list(long.prompt), long.sampling)


def test_a_prompt_that_keeps_nobody_waiting_has_longer_steps(tiny: Any) -> None:
    """The same latency target: eight times the tokens while nobody decodes."""
    model = tiny("llama")
    engine = engine_of(model, blocks=200, max_step_tokens=200, step_seconds=0.05)
    engine._pace.note(100, 1, 1.0)  # 5 tokens in 0.05 s; three times 40 are too few for all of it
    lone = request(list(range(90)) * 2, SamplingParams(temperature=0, max_tokens=2), model)
    engine.add(lone)
    engine.step()
    assert lone.computed == 8 * 5
    run(engine)
    assert answer(lone) == alone(model, list(lone.prompt), lone.sampling)


def test_hurried_prompts_leave_decoding_its_places(tiny: Any) -> None:
    """Steps meant to be short, short prompts longer than that, and many who decode: each gets one token a step."""
    model = tiny("llama")
    engine = engine_of(model, blocks=400, max_step_tokens=200, step_seconds=1e-9)
    engine._pace.note(100, 1, 1.0)
    sampling = SamplingParams(temperature=0, max_tokens=40)
    talkers = [request([i, i + 1], sampling, model) for i in range(5)]
    for sequence in talkers:
        engine.add(sequence)
    while not all(sequence.generated for sequence in talkers):
        engine.step()
    for number in range(8):
        engine.add(request([number] * 60, sampling, model))
        before = [len(sequence.generated) for sequence in talkers]
        engine.step()
        assert all(len(s.generated) > n for s, n in zip(talkers, before, strict=True))
    run(engine)
    assert answer(talkers[0]) == alone(model, [0, 1], sampling)

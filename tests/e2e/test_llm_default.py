"""The facade on the real default model: what a user types, and what must not happen."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

import hanlin
from hanlin.errors import ConfigError, ContextLengthError, EngineError, RequestError
from hanlin.types import Completion

pytestmark = pytest.mark.e2e
SKY = "Why is the sky blue?"
PROMPTS = [f"What is {n} plus {n + 3}? Answer briefly." for n in range(12)]


@pytest.fixture(scope="module")
def llm() -> Iterator[hanlin.LLM]:
    with hanlin.load(cache_bytes=200 << 20) as model:
        yield model


def test_it_answers_sensibly(llm: hanlin.LLM) -> None:
    done = llm.chat("What is the capital of France?", temperature=0, max_tokens=40)
    assert isinstance(done, Completion)
    assert "Paris" in done.text and done.finish_reason == "stop"
    assert "<|im_end|>" not in done.text
    assert done.usage.generated_tokens == len(done.ids) > 3 and done.usage.prompt_tokens > 10
    assert done.timings.prompt > 0 and done.timings.generation > 0


def test_stream_batch_and_single_give_the_same_bytes(llm: hanlin.LLM) -> None:
    options = {"max_tokens": 24, "temperature": 0.8, "seed": 11}
    alone = [llm.chat(prompt, **options) for prompt in PROMPTS]
    together = llm.chat([[{"role": "user", "content": p}] for p in PROMPTS], **options)
    streamed = ["".join(d.text for d in llm.stream(p, **options)) for p in PROMPTS]
    assert [c.text for c in alone] == [c.text for c in together] == streamed
    assert [c.ids for c in alone] == [c.ids for c in together]


def test_one_seed_one_reply_and_no_seed_another(llm: hanlin.LLM) -> None:
    first = llm.chat(SKY, temperature=1.2, max_tokens=16)
    assert llm.chat(SKY, temperature=1.2, max_tokens=16, seed=first.seed).ids == first.ids
    assert len({llm.chat(SKY, temperature=1.2, max_tokens=16).ids for _ in range(4)}) > 1


def test_n_replies_share_the_prompt(llm: hanlin.LLM) -> None:
    prompt = "Once upon a time, in a land far away from everything that anybody had ever heard of, there lived " * 3
    replies = llm.generate(prompt, n=3, temperature=1.0, seed=5, max_tokens=8)
    assert [r.index for r in replies] == [0, 1, 2] and len({r.ids for r in replies}) > 1
    assert replies[1].usage.cached_tokens >= 32
    assert llm.generate(prompt, n=1, temperature=1.0, seed=5, max_tokens=8)[0].ids == replies[0].ids


def test_stop_texts_logprobs_and_limits(llm: hanlin.LLM) -> None:
    full = llm.generate("One, two, three,", temperature=0, max_tokens=20)[0].text
    stop = full[6:9]
    done = llm.generate("One, two, three,", temperature=0, max_tokens=20, stop=stop, logprobs=2)[0]
    assert done.text == full[: full.index(stop)] and done.finish_reason == "stop" and done.stop == stop
    assert done.logprobs is not None and len(done.logprobs) == len(done.ids)
    assert all(t.top[0].logprob >= t.top[1].logprob and t.top[0].id == t.id for t in done.logprobs)
    done = llm.chat(SKY, max_tokens=5, temperature=0, ignore_eos=True)
    assert done.finish_reason == "length" and len(done.ids) == 5


def test_scores_agree_with_generated_logprobs(llm: hanlin.LLM) -> None:
    done = llm.generate("The quick brown fox", temperature=0, max_tokens=6, logprobs=0)[0]
    prompt = llm.tokenizer.encode("The quick brown fox", add_special=True)
    score = llm.score([*prompt, *done.ids])[0]
    assert done.logprobs is not None
    assert [t.logprob for t in done.logprobs] == list(score.logprobs[len(prompt) :])


def test_closing_a_stream_gives_the_blocks_back(llm: hanlin.LLM) -> None:
    stream = llm.stream(SKY, max_tokens=400, ignore_eos=True)
    next(stream)
    stream.close()
    for _ in range(100):
        if llm.engine.idle and llm.stats()["free_blocks"] == llm.stats()["blocks"]:
            return
        time.sleep(0.05)
    raise AssertionError(llm.stats())


def test_threads_share_an_engine(llm: hanlin.LLM) -> None:
    want = {p: llm.chat(p, temperature=0, max_tokens=8).text for p in PROMPTS[:6]}
    got: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda p=p: got.update({p: llm.chat(p, temperature=0, max_tokens=8).text}))
        for p in PROMPTS[:6]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == want


def test_two_engines_in_one_process(llm: hanlin.LLM) -> None:
    want = llm.chat(SKY, temperature=0, max_tokens=12).text
    with hanlin.load(cache_bytes=50 << 20) as other:
        assert other.chat(SKY, temperature=0, max_tokens=12).text == want
        assert llm.chat(SKY, temperature=0, max_tokens=12).text == want


def test_awaited(llm: hanlin.LLM) -> None:
    async def both() -> tuple[list[str], str]:
        model = hanlin.AsyncLLM(llm)
        texts = await asyncio.gather(*(model.chat(p, temperature=0, max_tokens=8) for p in PROMPTS[:3]))
        streamed = [d.text async for d in model.stream(PROMPTS[0], temperature=0, max_tokens=8)]
        return [t.text for t in texts], "".join(streamed)

    texts, streamed = asyncio.run(both())
    assert streamed == texts[0]
    assert texts == [llm.chat(p, temperature=0, max_tokens=8).text for p in PROMPTS[:3]]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m: m.chat(SKY, temperature=-1, top_p=0), RequestError, "top_p must be"),
        (lambda m: m.chat(SKY, tempreature=1), RequestError, "unknown parameter 'tempreature'"),
        (lambda m: m.generate([[1, 2, 10**9]]), RequestError, "ids in 0..49151"),
        (lambda m: m.generate(3.5), RequestError, "must be a string"),
        (lambda m: m.generate([[]]), ContextLengthError, "empty"),
        (lambda m: m.generate("word " * 9000), ContextLengthError, "the model's context holds 8192"),
        (lambda m: m.chat([]), RequestError, "empty"),
        (lambda m: m.chat([{"role": "wizard", "content": "x"}]), RequestError, "'wizard'"),
        (lambda m: m.chat(SKY, stop_token_ids=[999999]), RequestError, "the vocabulary ends at 49151"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(llm: hanlin.LLM, call, error, says: str) -> None:  # type: ignore[no-untyped-def]
    steps = llm.stats()["steps"]
    with pytest.raises(error) as caught:
        call(llm)
    assert says in str(caught.value)
    assert llm.stats()["steps"] == steps and llm.engine.idle


def test_a_closed_model_says_so() -> None:
    model = hanlin.load(cache_bytes=20 << 20)
    model.close()
    model.close()
    with pytest.raises(EngineError, match="closed"):
        model.chat(SKY)


def test_options_are_checked_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        hanlin.load(dtype="int3", max_batch_size=0, cache_max_entry_count=-1)
    assert all(word in str(caught.value) for word in ("dtype", "max_batch_size", "cache_max_entry_count"))
    with pytest.raises(ConfigError, match="unknown option 'max_batchsize'"):
        hanlin.load(max_batchsize=3)


def test_lmdeploys_pipeline() -> None:
    from hanlin import GenerationConfig, TurbomindEngineConfig, pipeline

    with pipeline(backend_config=TurbomindEngineConfig(session_len=2048, cache_bytes=50 << 20)) as pipe:
        config = GenerationConfig(max_new_tokens=12)
        one = pipe(SKY, gen_config=config)
        many = pipe([SKY, "Shanghai is"], gen_config=config)
        messages = pipe([{"role": "user", "content": SKY}], gen_config=config)
        assert one.text == many[0].text == messages.text and one.finish_reason == "length"
        assert one.generate_token_len == len(one.token_ids) == 12 and many[1].index == 1
        pieces = list(pipe.stream_infer(SKY, gen_config=config))
        assert "".join(p.text for p in pieces) == one.text and pieces[-1].finish_reason == "length"
        raw = pipe("One, two,", gen_config=config, do_preprocess=False).text
        assert raw == pipe.llm.generate("One, two,", config.sampling())[0].text != one.text
        assert pipe.get_ppl([pipe.llm.tokenizer.encode("The capital of France is Paris.")])[0] > 0

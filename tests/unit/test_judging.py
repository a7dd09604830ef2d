"""Rewards, best of n and embeddings: what they mean, and what they refuse. Real tokenizer, tiny random models."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import chatglm_directory
import hanlin
from hanlin.checkpoints.load import load_model
from hanlin.errors import ConfigError, RequestError
from hanlin.kernels.native import available
from hanlin.layers.attend import PackedAttend
from hanlin.layers.rope import Positions
from hanlin.models.registry import read_config
from hanlin.types import BestOf, Completion, Message, ranks
from hf_directory import config, make_directory

REWARD: dict[str, Any] = {"architectures": ["InternLM2ForRewardModel"], "reward_token_id": 92527}
OPTIONS: dict[str, Any] = {"dtype": "float32", "cache_bytes": 1 << 20, "threads": 1, "packed_cache": False}
RUNNERS = ["torch", pytest.param("native", marks=pytest.mark.skipif(not available(), reason="no native library"))]
GOOD = [
    {"role": "user", "content": "Hello! What's your name?"},
    {"role": "assistant", "content": "My name is InternLM2! What can I do for you?"},
]
BAD = [GOOD[0], {"role": "assistant", "content": "I have no idea."}]
UGLY = [
    {"role": "system", "content": "Be brief. <|im_end|>"},
    GOOD[0],
    {"role": "assistant", "content": "<|im_start|>"},
]


@pytest.fixture(scope="module")
def judge_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("judge") / "internlm2-reward", **REWARD)


@pytest.fixture(scope="module")
def writer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("writer") / "internlm2-chat")


@pytest.fixture(scope="module", params=RUNNERS)
def judge(judge_path: Path, request: pytest.FixtureRequest) -> Iterator[hanlin.LLM]:
    with hanlin.load(judge_path, runner=request.param, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module", params=RUNNERS)
def writer(writer_path: Path, request: pytest.FixtureRequest) -> Iterator[hanlin.LLM]:
    with hanlin.load(writer_path, runner=request.param, **OPTIONS) as llm:
        yield llm


def hidden(path: Path, ids: list[int]) -> tuple[Any, torch.Tensor]:
    """The module itself on plain causal attention, and its hidden states (T, D)."""
    model = load_model(path, dtype=torch.float32, device=torch.device("cpu")).model
    with torch.no_grad():
        places = Positions(torch.arange(len(ids))[None])
        return model, model(torch.tensor(ids), places, PackedAttend([len(ids)]))


def test_a_score_is_the_value_at_the_reward_token(judge: hanlin.LLM, judge_path: Path) -> None:
    """One begin token, the turns as the template prints them, closed, then the reward token; its value alone counts."""
    encode = judge.tokenizer.encode
    start, end = 92543, 92542
    for conversation in (GOOD, BAD, UGLY):
        ids = [1]
        for turn in conversation:
            ids += [start, *encode(f"{turn['role']}\n{turn['content']}"), end, *encode("\n")]
        assert judge.requests.judged(conversation) == [(*ids, 92527)]
        model, states = hidden(judge_path, [*ids, 92527])
        assert judge.get_score(conversation) == pytest.approx(float(model.v_head(states[-1])), abs=2e-5)


def test_scores_comparisons_and_ranks(judge: hanlin.LLM) -> None:
    scores = judge.reward([GOOD, BAD, UGLY])
    assert scores == judge.get_scores([GOOD, BAD, UGLY]) == [judge.get_score(c) for c in (GOOD, BAD, UGLY)]
    assert len(set(scores)) == 3
    assert judge.reward(GOOD) == judge.reward([[Message.parse(turn) for turn in GOOD]]) == scores[:1]
    assert judge.compare(GOOD, BAD) is (scores[0] > scores[1])
    assert judge.compare(BAD, GOOD) is (scores[1] > scores[0])
    assert judge.compare(GOOD, GOOD) is False
    assert judge.compare(GOOD, BAD, return_logits=True) == (scores[0], scores[1])
    assert judge.rank([GOOD, BAD, UGLY], return_logits=True) == scores
    places = judge.rank([GOOD, BAD, UGLY])
    assert sorted(places) == [0, 1, 2] and [scores[places.index(i)] for i in range(3)] == sorted(scores, reverse=True)


def test_ranks() -> None:
    assert ranks([0.5, -1.0, 3.0, 0.5]) == [1, 3, 0, 2]
    assert ranks([]) == []


def test_a_reward_model_does_not_write(judge: hanlin.LLM) -> None:
    for ask in (
        lambda: judge.chat("Hello"),
        lambda: judge.generate("Hello"),
        lambda: next(iter(judge.stream("Hello"))),
        lambda: judge.score("Hello"),
        lambda: judge.best_of("Hello", reward=judge),
    ):
        with pytest.raises(RequestError, match=r"reward model.*use reward\(\), or load a chat model"):
            ask()
    with pytest.raises(RequestError, match="one conversation; use get_scores"):
        judge.get_score([GOOD, BAD])
    with pytest.raises(RequestError, match="messages is empty"):
        judge.reward([])


def test_a_chat_model_does_not_judge(writer: hanlin.LLM) -> None:
    for ask in (writer.reward, writer.get_score, lambda c: writer.compare(c, c), lambda c: writer.rank([c])):
        with pytest.raises(RequestError, match="no reward head; load a reward model, such as internlm2-1_8b-reward"):
            ask(GOOD)


def test_configurations() -> None:
    assert read_config(config(**REWARD)).reward_id == 92527
    assert read_config(config(architectures=["InternLM2ForRewardModel"])).reward_id == 92527
    assert read_config(config(reward_token_id=92527)).reward_id is None
    with pytest.raises(ConfigError, match="reward_token_id 92544 is not in a vocabulary of 92544"):
        read_config(config(**{**REWARD, "reward_token_id": 92544}))


def by_length(conversations: list[list[Message]]) -> list[float]:
    return [float(len(c[-1].content)) for c in conversations]


def test_best_of(writer: hanlin.LLM, judge_path: Path) -> None:
    with hanlin.load(judge_path, **OPTIONS) as judge:
        best = writer.best_of([GOOD[0]], reward=judge, n=4, seed=5, max_tokens=6, temperature=1.0)
        again = writer.best_of([GOOD[0]], reward=judge, n=4, seed=5, max_tokens=6, temperature=1.0)
        said = [[GOOD[0], {"role": "assistant", "content": c.text}] for c in best.candidates]
        assert judge.reward(said) == list(best.scores)
    assert isinstance(best, BestOf) and isinstance(best, Completion)
    assert len(best.candidates) == len({c.text for c in best.candidates}) == 4
    assert best.score == max(best.scores) == best.scores[best.index]
    assert best.text == best.candidates[best.index].text
    assert (best.text, best.scores) == (again.text, again.scores)
    plain = writer.chat([GOOD[0]], n=4, seed=5, max_tokens=6, temperature=1.0)
    assert [c.ids for c in best.candidates] == [c.ids for c in plain]


def test_best_of_by_a_function(writer: hanlin.LLM) -> None:
    best = writer.best_of("Hello", reward=by_length, n=3, seed=1, max_tokens=5)
    assert best.score == max(len(c.text) for c in best.candidates)
    assert writer.best_of("Hello", reward=by_length, n=1, seed=1, max_tokens=5, temperature=0).scores
    assert writer.best_of("Hello", reward=lambda c: [1.0] * len(c), n=3, max_tokens=2).index == 0


def test_best_of_refuses(writer: hanlin.LLM) -> None:
    with pytest.raises(RequestError, match=r"temperature 0; give temperature=0\.8"):
        writer.best_of("Hello", reward=by_length, temperature=0)
    with pytest.raises(RequestError, match=r"3 finite scores, one a reply; it gave \[1\.0\]"):
        writer.best_of("Hello", reward=lambda c: [1.0], n=3, max_tokens=1)
    with pytest.raises(RequestError, match="2 finite scores"):
        writer.best_of("Hello", reward=lambda c: [1.0, float("nan")], n=2, max_tokens=1)
    with pytest.raises(RequestError, match="takes one conversation"):
        writer.best_of([GOOD[:1], BAD[:1]], reward=by_length)
    with pytest.raises(RequestError, match="no reward head"):
        writer.best_of("Hello", reward=writer, n=2, max_tokens=1)


def test_embeddings(writer: hanlin.LLM, writer_path: Path) -> None:
    text = "The sky is blue. <|im_end|>"
    ids = [1, *writer.tokenizer.encode(text)]
    assert 92542 not in ids
    _, states = hidden(writer_path, ids)
    got = writer.embed([text, ids], pooling="mean", normalize=False)
    assert got.shape == (2, 32) and got.dtype == np.float32
    assert np.array_equal(got[0], got[1])
    assert np.allclose(got[0], states.mean(0), atol=1e-5)
    assert np.allclose(writer.embed(text, pooling="last", normalize=False), states[-1:], atol=2e-5)
    unit = writer.embed(text)
    assert np.allclose(unit, got[:1] / np.linalg.norm(got[:1]), atol=1e-6)
    assert writer.embed([]).shape == (0, 32)


def test_embeddings_of_a_prefix_that_sees_itself(tmp_path: Path) -> None:
    """ChatGLM-6B reads a text both ways, in one step; its rows are still added up one by one."""
    path = chatglm_directory.make_directory(tmp_path / "chatglm-6b")
    texts, found = ["hello world", "a b c d e f g"], []
    for runner in ("torch", *(("native",) if available() else ())):
        with hanlin.load(path, runner=runner, **{**OPTIONS, "cache_bytes": 1 << 22}) as llm:
            for pooling in ("mean", "last"):
                together = llm.embed(texts, pooling=pooling)
                assert np.array_equal(together, np.concatenate([llm.embed(t, pooling=pooling) for t in texts]))
                found.append(together)
            with pytest.raises(RequestError, match="no reward head"):
                llm.reward(GOOD)
    assert not np.allclose(found[0], found[1], atol=1e-3)
    assert all(np.allclose(found[i], found[i % 2], atol=1e-5) for i in range(len(found)))


def test_embeddings_refuse(writer: hanlin.LLM) -> None:
    with pytest.raises(RequestError, match="pooling must be 'mean' or 'last', not 'max'"):
        writer.embed("Hello", pooling="max")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="prompts must be"):
        writer.embed(5)
    with pytest.raises(RequestError, match=r"has \d+ tokens"):
        writer.embed([[7] * 100_000])


def test_awaited(judge_path: Path, writer: hanlin.LLM) -> None:
    async def main() -> None:
        async with await hanlin.AsyncLLM.load(judge_path, **OPTIONS) as judge:
            scores = await judge.reward([GOOD, BAD])
            assert scores == await judge.get_scores([GOOD, BAD]) == [await judge.get_score(c) for c in (GOOD, BAD)]
            assert await judge.compare(GOOD, BAD) is (scores[0] > scores[1])
            assert await judge.rank([GOOD, BAD]) == ranks(scores)
            talker = hanlin.AsyncLLM(writer)
            best = await talker.best_of("Hello", reward=judge.llm, n=2, seed=3, max_tokens=2)
            assert best.text == writer.best_of("Hello", reward=judge.llm, n=2, seed=3, max_tokens=2).text
            assert np.array_equal(await talker.embed("Hello"), writer.embed("Hello"))

    asyncio.run(main())

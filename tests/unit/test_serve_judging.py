"""Rerank, pooling and score in the shapes of LMDeploy, vLLM, Jina and Cohere; and gaps that are to be filled."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

import chatglm_directory
import hanlin
from hanlin.errors import RequestError
from hanlin.infill import infilled
from hanlin.serve.settings import ModelSpec, ServeConfig
from hf_directory import make_directory
from serving import app_client

OPTIONS: dict[str, Any] = {"cache_bytes": 4 << 20, "threads": 1, "packed_cache": False, "session_len": 256}
REWARD: dict[str, Any] = {"architectures": ["InternLM2ForRewardModel"], "reward_token_id": 92527}
QUERY, DOCUMENTS = "What is the capital of Brazil?", ["Paris.", "Brasilia is its capital.", "I have no idea."]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("judging")
    return {
        "writer": make_directory(folder / "writer", num_hidden_layers=1),
        "judge": make_directory(folder / "judge", num_hidden_layers=1, **REWARD),
    }


@pytest.fixture(scope="module")
def client(paths: dict[str, Path]) -> Iterator[TestClient]:
    options = {**OPTIONS, "chat_template": "internlm2"}
    specs = tuple(ModelSpec(source=str(path), name=name, options=options) for name, path in paths.items())
    with app_client(ServeConfig(models=specs)) as made:
        yield made


@pytest.fixture(scope="module")
def judge(paths: dict[str, Path]) -> Iterator[hanlin.LLM]:
    with hanlin.load(paths["judge"], chat_template="internlm2", **OPTIONS) as llm:
        yield llm


@pytest.fixture
def post(client: TestClient) -> Callable[..., Any]:
    def ask(path: str, model: str = "judge", **body: Any) -> Any:
        answer = client.post(path, json={"model": model, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    return ask


def turns(document: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": QUERY}, {"role": "assistant", "content": document}]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_a_reward_model_ranks_documents_by_their_rewards(post: Any, judge: hanlin.LLM, path: str) -> None:
    told = post(path, query=QUERY, documents=DOCUMENTS)
    rewards = judge.reward([turns(document) for document in DOCUMENTS])
    order = sorted(range(3), key=lambda n: -rewards[n])
    assert [each["index"] for each in told["results"]] == order
    assert [each["relevance_score"] for each in told["results"]] == [rewards[n] for n in order]
    assert [each["document"] for each in told["results"]] == [{"text": DOCUMENTS[n]} for n in order]
    assert told["id"] and told["model"] == "judge" and told["usage"]["total_tokens"] > 30


def test_documents_may_be_objects_few_and_left_out(post: Any) -> None:
    whole = post("/v1/rerank", query={"text": QUERY}, documents=[{"text": text} for text in DOCUMENTS], top_n=0)
    assert whole["results"] == post("/v1/rerank", query=QUERY, documents=DOCUMENTS)["results"]
    best = post("/v1/rerank", query=QUERY, documents=DOCUMENTS, top_n=1, return_documents=False)["results"]
    assert best == [{key: whole["results"][0][key] for key in ("index", "relevance_score")}]


def test_another_model_compares_vectors(post: Any) -> None:
    told = post("/v1/rerank", "writer", query="rain", documents=["rain", "The sun is out."])["results"]
    assert told[0]["index"] == 0 and told[0]["relevance_score"] == pytest.approx(1, abs=1e-6)
    assert told[1]["relevance_score"] < told[0]["relevance_score"]
    vectors = [
        each["embedding"] for each in post("/v1/embeddings", "writer", input=["rain", "The sun is out."])["data"]
    ]
    assert told[1]["relevance_score"] == pytest.approx(float(np.dot(*np.asarray(vectors))), abs=1e-6)


def test_pooling_gives_rewards_as_lmdeploy_does(post: Any, client: TestClient, judge: hanlin.LLM) -> None:
    score = judge.get_score(turns("Paris."))
    told = post("/pooling", messages=turns("Paris."))
    assert told["object"] == "list" and told["data"] == [{"index": 0, "object": "pooling", "data": score}]
    (ids,) = judge.requests.judged(turns("Paris."))
    text = judge.tokenizer.decode(ids[1:-1], skip_special=False)
    for given in (list(ids), list(ids[:-1]), list(ids[1:]), text, "<s>" + text, [list(ids), text]):
        data = post("/pooling", input=given)["data"]
        assert [each["data"] for each in data] == [score] * len(data), given
    told = post("/pooling", input=[text, "x"])
    assert [each["index"] for each in told["data"]] == [0, 1]


def test_pooling_gives_vectors_of_other_models(post: Any) -> None:
    (row,) = (each["data"] for each in post("/pooling", "writer", input="rain")["data"])
    (last,) = (each["embedding"] for each in post("/v1/embeddings", "writer", input="rain", pooling="last")["data"])
    assert row == last
    packed = post("/pooling", "writer", input="rain", encoding_format="base64")["data"][0]["data"]
    assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == row
    assert len(post("/pooling", "writer", messages=turns("x"), pooling="mean")["data"][0]["data"]) == len(row)


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_score_takes_vllms_pairs(post: Any, judge: hanlin.LLM, path: str) -> None:
    rewards = judge.reward([turns(document) for document in DOCUMENTS])
    for names in (("text_1", "text_2"), ("queries", "documents")):
        told = post(path, **dict(zip(names, (QUERY, DOCUMENTS), strict=True)))
        assert [each["score"] for each in told["data"]] == rewards
        assert {each["object"] for each in told["data"]} == {"score"}
        each_its_own = post(path, **dict(zip(names, ([QUERY] * 3, DOCUMENTS), strict=True)))
        assert each_its_own["data"] == told["data"]
    assert post(path, text_1=QUERY, text_2="Paris.")["data"] == [{"index": 0, "object": "score", "score": rewards[0]}]


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("/rerank", {"query": QUERY, "documents": []}, "documents"),
        ("/rerank", {"query": QUERY, "documents": ["x"] * 3000}, "3000 inputs"),
        ("/rerank", {"query": QUERY, "documents": ["x " * 400]}, "tokens"),
        ("/rerank", {"query": QUERY, "documents": ["x"], "top_n": -1}, "top_n"),
        ("/rerank", {"query": {"image": "http://x/"}, "documents": ["x"]}, "query"),
        ("/pooling", {}, "either"),
        ("/pooling", {"input": [], "model": "judge"}, "empty"),
        ("/pooling", {"input": "x", "messages": turns("x")}, "either"),
        ("/pooling", {"input": "x", "dimensions": 5, "model": "writer"}, "dimensions"),
        ("/pooling", {"input": [[10**9]]}, "ids"),
        ("/score", {}, "either"),
        ("/score", {"input": "x", "text_1": "a", "text_2": "b"}, "either"),
        ("/score", {"text_1": "a"}, "either"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "pair"),
        ("/score", {"text_1": "a", "text_2": []}, "pair"),
        ("/score", {"text_1": "a", "queries": "b", "text_2": "c"}, "one of each"),
        ("/score", {"input": "x", "model": "judge"}, "reward"),
    ],
)
def test_what_cannot_be_is_said(client: TestClient, path: str, body: dict[str, Any], word: str) -> None:
    answer = client.post(path, json={"model": "judge", **body})
    assert answer.status_code == 400 and word in answer.json()["error"]["message"], answer.text


# Gaps.


class Words:
    """A tokenizer of single characters, with the special tokens that it is given."""

    def __init__(self, *special: str) -> None:
        self.special = special

    def token_id(self, piece: str) -> int | None:
        return 1000 + self.special.index(piece) if piece in self.special else None

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        return [*([1] if add_special else []), *map(ord, text)]


def test_gaps_are_written_as_code_models_read_them() -> None:
    words: Any = Words("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    assert infilled(words, "a", "b", blanks=False) == (1, 1000, 97, 1001, 98, 1002)
    assert infilled(words, [7, 8], "b", blanks=False) == (1, 1000, 7, 8, 1001, 98, 1002)
    with pytest.raises(RequestError, match="suffix"):
        infilled(Words("<|fim_prefix|>"), "a", "b", blanks=False)  # type: ignore[arg-type]


def test_chatglm_6b_fills_a_blank(tmp_path: Path) -> None:
    path = chatglm_directory.make_directory(tmp_path / "chatglm-6b")
    spec = ModelSpec(source=str(path), name="glm", options=OPTIONS)
    with app_client(ServeConfig(models=(spec,))) as client:
        asked = {"prompt": "你好", "suffix": "训练。", "max_tokens": 4, "temperature": 0, "return_token_ids": True}
        answer = client.post("/v1/completions", json=asked)
        assert answer.status_code == 200, answer.text
        ids = answer.json()["choices"][0]["prompt_token_ids"]
        shown = client.post("/detokenize", json={"tokens": ids}).json()["prompt"]
        assert shown.index("你好") < shown.index("[MASK]") < shown.index("训练。") < shown.index("<sop>")
        assert "[gMASK]" not in shown and shown.endswith("<sop>")
        told = client.post("/v1/completions", json={**asked, "echo": True})
        assert told.status_code == 400 and "suffix" in told.json()["error"]["message"]
        raw = {"model": "glm", "prompt": "你好", "suffix": "训练。", "stream": False, "options": {"num_predict": 4}}
        assert client.post("/api/generate", json=raw).json()["prompt_eval_count"] == len(ids)


def test_a_suffix_is_refused_where_nothing_can_follow(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"model": "writer", "prompt": "a", "suffix": "b"})
    assert answer.status_code == 400 and "cannot fill a gap" in answer.json()["error"]["message"]


def test_rewards_do_not_depend_on_the_neighbours(paths: dict[str, Path]) -> None:
    async def work() -> None:
        from serving import asgi_client

        spec = ModelSpec(source=str(paths["judge"]), name="judge", options={**OPTIONS, "chat_template": "internlm2"})
        async with asgi_client(ServeConfig(models=(spec,))) as client:

            async def ask(documents: list[str]) -> dict[str, float]:
                found = (await client.post("/rerank", json={"query": QUERY, "documents": documents})).json()["results"]
                return {each["document"]["text"]: each["relevance_score"] for each in found}

            alone = {text: (await ask([text]))[text] for text in DOCUMENTS}
            together = await asyncio.gather(*(ask(DOCUMENTS[n:] + DOCUMENTS[:n]) for n in range(3)))
            assert all(found == alone for found in together)

    asyncio.run(work())

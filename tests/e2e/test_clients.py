"""The clients that people have, besides the openai package, against one real server with the default model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving import serving

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

BERLIN: list[Any] = [{"role": "user", "content": "What is the capital of Germany?"}]
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
ASK: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving() as where:
        yield where


@pytest.fixture(scope="module")
def model(url: str) -> str:
    return str(httpx.get(f"{url}/v1/models").json()["data"][0]["id"])


# Anthropic's package.


@pytest.fixture(scope="module")
def claude(url: str) -> Iterator[Any]:
    anthropic = pytest.importorskip("anthropic", reason="needs the package anthropic")
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_anthropic_answers_and_streams_the_same(claude: Any, model: str) -> None:
    asked: dict[str, Any] = {
        "model": model,
        "max_tokens": 24,
        "messages": BERLIN,
        "system": "Be brief.",
        "extra_body": {"temperature": 0},  # the package has dropped it; the API has not
    }
    whole = claude.messages.create(**asked)
    assert "Berlin" in whole.content[0].text and whole.stop_reason in ("end_turn", "max_tokens")
    with claude.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    assert text == whole.content[0].text == last.content[0].text
    assert last.stop_reason == whole.stop_reason and last.usage.output_tokens == whole.usage.output_tokens
    counted = claude.messages.count_tokens(model=model, messages=BERLIN, system="Be brief.").input_tokens
    assert counted == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)


def test_anthropic_calls_a_tool_and_reads_its_result(claude: Any, model: str) -> None:
    tool = {"name": "get_weather", "description": "The weather in a city", "input_schema": CITY}
    asked: dict[str, Any] = {
        "model": model,
        "max_tokens": 80,
        "messages": ASK,
        "tools": [tool],
        "tool_choice": {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True},
        "extra_body": {"temperature": 0},
    }
    whole = claude.messages.create(**asked)
    (call,) = [block for block in whole.content if block.type == "tool_use"]
    assert whole.stop_reason == "tool_use" and call.name == "get_weather" and set(call.input) == {"city"}
    with claude.messages.stream(**asked) as stream:
        last = stream.get_final_message()
    assert [block.input for block in last.content if block.type == "tool_use"] == [call.input]
    turns = [
        *ASK,
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in whole.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "18 C, sunny"}]},
    ]
    done = claude.messages.create(model=model, max_tokens=16, messages=turns, tools=[tool])
    assert done.usage.input_tokens + (done.usage.cache_read_input_tokens or 0) > whole.usage.input_tokens


def test_anthropic_reads_errors(claude: Any) -> None:
    import anthropic

    with pytest.raises(anthropic.NotFoundError) as missing:
        claude.messages.create(model="no-such-model", max_tokens=4, messages=BERLIN)
    assert missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        claude.messages.create(model="", max_tokens=0, messages=BERLIN)


# Ollama's package.


@pytest.fixture(scope="module")
def llama(url: str) -> Iterator[Any]:
    ollama = pytest.importorskip("ollama", reason="needs the package ollama")
    with ollama.Client(host=url) as client:
        yield client


def test_ollama_answers_and_streams_the_same(llama: Any, model: str) -> None:
    options = {"temperature": 0, "num_predict": 24}
    whole = llama.chat(model=model, messages=BERLIN, options=options)
    assert "Berlin" in whole.message.content and whole.done and whole.done_reason in ("stop", "length")
    pieces = list(llama.chat(model=model, messages=BERLIN, options=options, stream=True))
    assert "".join(piece.message.content or "" for piece in pieces) == whole.message.content
    assert pieces[-1].done and pieces[-1].eval_count == whole.eval_count and not any(p.done for p in pieces[:-1])
    told = llama.generate(model=model, prompt="What is the capital of Germany?", options=options)
    assert told.response == whole.message.content, "generate is one turn of chat"
    streamed = llama.generate(model=model, prompt="What is the capital of Germany?", options=options, stream=True)
    assert "".join(piece.response for piece in streamed) == told.response


def test_ollama_knows_the_models(llama: Any, model: str) -> None:
    (listed,) = llama.list().models
    assert listed.model is not None and listed.model.removesuffix(":latest") == model
    assert llama.ps().models[0].model == listed.model
    shown = llama.show(listed.model)
    assert "completion" in shown.capabilities and shown.modelinfo["general.architecture"]


def test_ollama_embeds_and_holds_to_a_schema(llama: Any, model: str) -> None:
    first, second = llama.embed(model=model, input=["cat", "dog"]).embeddings
    assert len(first) == len(second) > 64 and first != second
    told = llama.chat(model=model, messages=ASK, format=CITY, options={"temperature": 0, "num_predict": 60})
    assert set(json.loads(told.message.content)) == {"city"}
    import ollama

    with pytest.raises(ollama.ResponseError) as missing:
        llama.chat(model="no-such-model", messages=BERLIN)
    assert missing.value.status_code == 404


# LangChain.


@pytest.fixture(scope="module")
def chain(url: str, model: str) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        langchain = pytest.importorskip("langchain_openai", reason="needs the package langchain-openai")
        chat = langchain.ChatOpenAI(
            base_url=f"{url}/v1", api_key="none", model=model, temperature=0, max_tokens=60, max_retries=0
        )
    yield chat
    chat.root_client.close()


@pytest.mark.filterwarnings("ignore")
def test_langchain_answers_and_streams_the_same(chain: Any) -> None:
    whole = chain.invoke("What is the capital of Germany?")
    assert "Berlin" in whole.content and whole.usage_metadata["output_tokens"] > 0
    pieces = list(chain.stream("What is the capital of Germany?", stream_usage=True))
    assert "".join(piece.content for piece in pieces) == whole.content
    used = [piece.usage_metadata for piece in pieces if piece.usage_metadata]
    assert used[-1]["output_tokens"] == whole.usage_metadata["output_tokens"]
    assert [reply.content for reply in chain.batch(["What is the capital of Germany?"] * 2)] == [whole.content] * 2


@pytest.mark.filterwarnings("ignore")
def test_langchain_calls_tools_and_gets_structures(chain: Any) -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "description": "of a city", "parameters": CITY}}
    bound = chain.bind_tools([tool], tool_choice="get_weather", strict=True)
    (call,) = bound.invoke("What is the weather in Paris?").tool_calls
    assert call["name"] == "get_weather" and set(call["args"]) == {"city"} and call["id"]
    merged: Any = None
    for piece in bound.stream("What is the weather in Paris?"):
        merged = piece if merged is None else merged + piece
    assert [(c["name"], c["args"]) for c in merged.tool_calls] == [("get_weather", call["args"])]
    schema = {"title": "place", "description": "A place", **CITY}
    for method in ("json_schema", "function_calling"):
        found = chain.with_structured_output(schema, method=method).invoke("What is the capital of Germany?")
        assert set(found) == {"city"}, method


# LiteLLM.


@pytest.mark.filterwarnings("ignore")
def test_litellm_answers_and_streams_the_same(url: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would fetch a list of prices
    litellm: Any = pytest.importorskip("litellm", reason="needs the package litellm")
    given: dict[str, Any] = {"api_base": f"{url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 24}
    whole = litellm.completion(model=f"openai/{model}", messages=BERLIN, **given)
    assert "Berlin" in whole.choices[0].message.content
    pieces = litellm.completion(model=f"openai/{model}", messages=BERLIN, stream=True, **given)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == whole.choices[0].message.content
    hosted = litellm.completion(model=f"hosted_vllm/{model}", messages=BERLIN, **given)
    assert hosted.choices[0].message.content == text
    tool = {"type": "function", "function": {"name": "get_weather", "description": "of a city", "parameters": CITY}}
    choice = {"type": "function", "function": {"name": "get_weather"}}
    called = litellm.completion(
        model=f"openai/{model}", messages=ASK, tools=[tool], tool_choice=choice, **{**given, "max_tokens": 80}
    )
    (call,) = called.choices[0].message.tool_calls
    assert call.function.name == "get_weather" and set(json.loads(call.function.arguments)) == {"city"}
    vectors = litellm.embedding(model=f"openai/{model}", input=["cat", "dog"], api_base=f"{url}/v1", api_key="none")
    assert [len(each["embedding"]) > 64 for each in vectors.data] == [True, True]


# lm-eval itself, where it is installed, on a task of our own: its others fetch data from a hub.

QUESTIONS = (
    ("The capital of France is", ("Paris", "a banana", "Rome"), 0),
    ("Two plus two is", ("a dog", "four", "never"), 1),
    ("The sun rises in the", ("soup", "kitchen", "east"), 2),
    ("Water freezes into", ("ice", "music", "gold"), 0),
)
TASK = """
task: facts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_scores_a_task(url: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`local-completions` with the server's own tokenizer, and the same sums of log-probabilities as `/score` has."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lm_eval = pytest.importorskip("lm_eval", reason="needs the package lm-eval[api]")
    from lm_eval.tasks import TaskManager

    names = ("question", "choices", "answer")
    lines = [json.dumps(dict(zip(names, each, strict=True))) for each in QUESTIONS]
    (tmp_path / "facts.jsonl").write_text("\n".join(lines))
    (tmp_path / "facts.yaml").write_text(TASK.format(path=tmp_path / "facts.jsonl"))
    told = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": model,
            "base_url": f"{url}/v1/completions",
            "tokenizer_backend": "remote",
            "num_concurrent": 1,
            "max_length": 512,
        },
        tasks=["facts"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert told["results"]["facts"]["acc,none"] >= 0.75, told["results"]
    with httpx.Client(base_url=url, timeout=60) as client:
        for sample in told["samples"]["facts"]:
            doc = sample["doc"]
            for choice, ((total, _),) in zip(doc["choices"], sample["resps"], strict=True):
                texts = (doc["question"], f"{doc['question']} {choice}")
                asked = [{"prompt": text, "add_special_tokens": False} for text in texts]
                start, ids = (client.post("/tokenize", json=each).json()["tokens"] for each in asked)
                scored = client.post("/score", json={"input": [ids]}).json()["data"][0]["logprobs"]
                assert float(total) == pytest.approx(sum(scored[len(start) :]), abs=1e-4)


# The requests of its `local-completions`, read as it reads them, where it is not.


@pytest.mark.parametrize("as_ids", [True, False])
def test_lm_eval_scores_continuations(url: str, model: str, as_ids: bool) -> None:
    context, endings = "The capital of France is", (" Paris", " a banana", " Rome")
    with httpx.Client(base_url=url, timeout=60) as client:
        ids = {
            text: client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
            for text in (context, *(context + ending for ending in endings))
        }
        prompts: list[Any] = [ids[context + ending] if as_ids else context + ending for ending in endings]
        asked = {
            "model": model,
            "prompt": prompts,
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        }
        answer = client.post("/v1/completions", json=asked)
        assert answer.status_code == 200, answer.text
        scored = client.post("/score", json={"input": [ids[context + ending] for ending in endings]}).json()["data"]
    totals = []
    start = len(ids[context])
    for choice, score in zip(sorted(answer.json()["choices"], key=lambda c: c["index"]), scored, strict=True):
        told = choice["logprobs"]["token_logprobs"]
        assert len(told) == len(score["tokens"]) + 1  # lm-eval takes the one generated token off
        top = choice["logprobs"]["top_logprobs"][start:-1]
        for one, best in zip(told[start:-1], top, strict=True):
            assert one <= max(best.values()) + 1e-6
        assert told[start:-1] == pytest.approx(score["logprobs"][start:], abs=1e-5)
        totals.append(sum(told[start:-1]))
    assert totals.index(max(totals)) == 0, "Paris is the likeliest"


def test_lm_eval_generates_until(url: str, model: str) -> None:
    asked = {
        "model": model,
        "prompt": ["Question: 1+1?\nAnswer:", "Question: 2+2?\nAnswer:"],
        "max_tokens": 16,
        "temperature": 0,
        "stop": ["Question:", "\n"],
        "seed": 1234,
    }
    answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=60).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all("\n" not in choice["text"] and "Question:" not in choice["text"] for choice in answer["choices"])

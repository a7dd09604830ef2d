"""Tools with ChatGLM3 and GLM-4 from end to end: a call out of the model, streamed, over HTTP, and its result back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import hanlin
from chatglm2_directory import config, tiktoken_file, tokenizer_model, weights, write
from hanlin.serve.settings import ModelSpec, ServeConfig
from serving import app_client, events

KINDS = ("chatglm3-6b", "glm-4-9b-chat")
OPTIONS = {"cache_bytes": 8 << 20, "packed_cache": False, "threads": 1, "dtype": "float32", "session_len": 1500}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Beijing", "Shanghai"]}},
    "required": ["city"],
    "additionalProperties": False,  # a random model would write more of them than fit
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Now", "parameters": CITY}}
PYTHON = {"type": "code_interpreter"}
ASKED = [{"role": "user", "content": "the cat sat on 你好?"}]
CALL = {"tools": [WEATHER, PYTHON], "tool_choice": {"type": "function", "function": {"name": "weather"}}}
SAMPLING = {"max_tokens": 160, "temperature": 1, "seed": 3}


@pytest.fixture(scope="module", params=KINDS)
def path(request: Any, tmp_path_factory: Any) -> Path:
    four = request.param.startswith("glm")
    values = config(_name_or_path=f"THUDM/{request.param}", padded_vocab_size=500, seq_length=2048)
    values |= {"eos_token_id": [300, 301]} if four else {}
    said = {"tokenizer_class": "ChatGLM4Tokenizer" if four else "ChatGLMTokenizer"}
    tokenizer = tiktoken_file() if four else tokenizer_model()
    target = tmp_path_factory.mktemp("glm") / request.param
    return write(target, values, weights(values), tokenizer_config=said, tokenizer__model=tokenizer)


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[hanlin.LLM]:
    with hanlin.load(path, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def client(path: Path) -> Iterator[TestClient]:
    with app_client(ServeConfig(models=(ModelSpec(source=str(path), name="m", options=OPTIONS),))) as client:
        yield client


def test_a_call_and_its_result_in_python(llm: hanlin.LLM) -> None:
    reply = llm.chat(ASKED, **CALL, **SAMPLING)
    (call,) = reply.tool_calls
    assert (reply.finish_reason, call.name, reply.text) == ("tool_calls", "weather", "")
    assert json.loads(call.arguments)["city"] in ("Beijing", "Shanghai")
    deltas = list(llm.stream(ASKED, **CALL, **SAMPLING))
    assert [(c.name, c.arguments) for delta in deltas for c in delta.tool_calls] == [(call.name, call.arguments)]
    assert deltas[-1].done is not None and deltas[-1].done.ids == reply.ids
    asked = {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    told = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [asked]},
        {"role": "tool", "tool_call_id": call.id, "content": '{"celsius": 22}'},
    ]
    after = llm.chat(told, tools=[WEATHER], max_tokens=4, seed=1)
    messages = [hanlin.Message.parse(message) for message in told]
    ids = llm.chat_format.render(messages, [hanlin.Tool.parse(WEATHER)]).ids
    assert len(ids) == after.usage.prompt_tokens
    # The turn that the model wrote stands in the prompt as it wrote it, and the result behind the observer's token.
    observer = llm.tokenizer.token_id("<|observation|>")
    assert ids.count(observer) == 1
    assert "22" in llm.tokenizer.decode(ids[ids.index(observer) :])
    assert "weather" in llm.tokenizer.decode(ids[: ids.index(observer)])


def test_code_and_its_result_in_python(llm: hanlin.LLM) -> None:
    ran = {"id": "i", "function": {"name": "interpreter", "arguments": '{"code": "print(1)"}'}}
    told = [
        *ASKED,
        {"role": "assistant", "content": "a", "tool_calls": [ran]},
        {"role": "tool", "tool_call_id": "i", "content": "1"},
    ]
    reply = llm.chat(told, tools=[PYTHON], max_tokens=4, seed=1)
    assert reply.ids and reply.usage.prompt_tokens > llm.chat(ASKED, tools=[PYTHON], max_tokens=1).usage.prompt_tokens


def test_a_call_and_its_result_over_http(client: TestClient, llm: hanlin.LLM) -> None:
    body = {"model": "m", "messages": ASKED, **CALL, **SAMPLING}
    answer = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    (call,) = answer["message"]["tool_calls"]
    (own,) = llm.chat(ASKED, **CALL, **SAMPLING).tool_calls
    assert answer["finish_reason"] == "tool_calls"
    assert (call["function"]["name"], call["function"]["arguments"]) == (own.name, own.arguments)
    chunks = events(client.post("/v1/chat/completions", json={**body, "stream": True}))
    parts = [part for c in chunks for choice in c["choices"] for part in choice["delta"].get("tool_calls") or ()]
    assert "".join(part["function"].get("arguments") or "" for part in parts) == own.arguments
    assert [part["function"]["name"] for part in parts if part["function"].get("name")] == ["weather"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    told = [*ASKED, answer["message"], {"role": "tool", "tool_call_id": call["id"], "content": "22"}]
    after = client.post("/v1/chat/completions", json={**body, "messages": told, "tool_choice": "auto", "max_tokens": 4})
    assert after.status_code == 200, after.text
    want = llm.chat(told, tools=[WEATHER, PYTHON], **{**SAMPLING, "max_tokens": 4})
    assert after.json()["usage"]["prompt_tokens"] == want.usage.prompt_tokens

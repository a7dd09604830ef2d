"""OpenAI's routes on a tiny random model, without sockets."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from hanlin.serve.settings import Limits, ModelSpec, ServeConfig
from hf_directory import make_directory
from serving import app_client, events

HELLO = [{"role": "user", "content": "Hello"}]
CALL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    path = make_directory(tmp_path_factory.mktemp("model") / "tiny")
    spec = ModelSpec(
        source=str(path),
        name="tiny",
        options={"cache_bytes": 8 << 20, "packed_cache": False, "threads": 1, "session_len": 320},
    )
    with app_client(ServeConfig(models=(spec,), limits=Limits(completions=8))) as client:
        yield client


def chat(client: TestClient, **body: Any) -> Any:
    given = {"messages": HELLO, "max_tokens": 6, "temperature": 1, "seed": 1, **body}
    return client.post("/v1/chat/completions", json={k: v for k, v in given.items() if v is not ...})


def complete(client: TestClient, **body: Any) -> Any:
    return client.post(
        "/v1/completions", json={"prompt": "Hello", "max_tokens": 6, "temperature": 1, "seed": 1, **body}
    )


def good(response: Any) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def refused(response: Any, status: int = 400) -> dict[str, Any]:
    """The error, in OpenAI's shape."""
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert error["type"] == "invalid_request_error" or status != 400
    return error


def test_a_chat_answer_has_the_known_shape(client: TestClient) -> None:
    answer = good(chat(client, model="tiny", stop=["zzzz"], user="me", metadata={"a": "b"}, unknown_field=1))
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "tiny" and answer["system_fingerprint"].startswith("fp_")
    (choice,) = answer["choices"]
    assert choice["index"] == 0 and choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"]
    assert "tool_calls" not in choice["message"] and choice["seed"] == 1
    usage = answer["usage"]
    assert usage["completion_tokens"] == 6 and usage["total_tokens"] == usage["prompt_tokens"] + 6
    again = good(chat(client))
    assert again["choices"][0]["message"] == choice["message"] and again["id"] != answer["id"]
    assert again["system_fingerprint"] == answer["system_fingerprint"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 0


@pytest.mark.parametrize("extra", [{}, {"n": 3}, {"logprobs": True, "top_logprobs": 2}, {"stop": ["e", "a"]}])
def test_a_chat_stream_adds_up_to_the_answer(client: TestClient, extra: dict[str, Any]) -> None:
    whole = good(chat(client, **extra))
    chunks = events(chat(client, stream=True, stream_options={"include_usage": True}, **extra))
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"} and len({c["id"] for c in chunks}) == 1
    last = chunks.pop()
    assert last["choices"] == []
    assert {k: v for k, v in last["usage"].items() if k != "prompt_tokens_details"} == {
        k: v for k, v in whole["usage"].items() if k != "prompt_tokens_details"
    }
    assert all(c["usage"] is None for c in chunks)
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        assert mine[-1]["seed"] == choice["seed"] and mine[-1]["stop_reason"] == choice["stop_reason"]
        got = [token for c in mine if c["logprobs"] for token in c["logprobs"]["content"]]
        assert got == ((choice["logprobs"] or {}).get("content") or [])


def test_log_probabilities_tell_tokens_and_bytes(client: TestClient) -> None:
    (choice,) = good(chat(client, logprobs=True, top_logprobs=3))["choices"]
    tokens = choice["logprobs"]["content"]
    assert len(tokens) == 6
    for token in tokens:
        assert len(token["top_logprobs"]) == 3 and token["logprob"] <= 0
        assert token["bytes"] is None or bytes(token["bytes"]).decode() == token["token"]
        values = [other["logprob"] for other in token["top_logprobs"]]
        assert values == sorted(values, reverse=True)
    bare = good(chat(client, logprobs=True))["choices"][0]["logprobs"]["content"]
    assert [t["logprob"] for t in bare] == [t["logprob"] for t in tokens]
    assert all(t["top_logprobs"] == [] for t in bare)


def test_the_ways_to_write_a_conversation_mean_the_same(client: TestClient) -> None:
    def answer(messages: Any, **body: Any) -> Any:
        found = good(chat(client, messages=messages, **body))
        return found["choices"][0]["message"]["content"], found["usage"]["prompt_tokens"]

    plain = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello"}]
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "Hello"}], "name": None},
    ]
    assert answer(plain) == answer(parts) == answer(plain, add_generation_prompt=True)
    told = [*plain, {"role": "assistant", "content": "Well"}]
    assert answer(told) == answer(told, continue_final_message=True)
    closed = answer(told, continue_final_message=False)
    assert closed[1] > answer(told)[1] > answer(told, add_generation_prompt=False)[1] - 10
    assert closed[1] > answer(told, add_generation_prompt=False)[1]


def test_a_round_of_tool_use_is_understood(client: TestClient) -> None:
    new = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]
    old = [
        *HELLO,
        {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "look", "content": "42"},
    ]
    today = good(chat(client, messages=new, tools=[CALL]))
    before = good(chat(client, messages=old, functions=[CALL["function"]], function_call="auto"))
    assert today["usage"]["prompt_tokens"] > good(chat(client, messages=new))["usage"]["prompt_tokens"]
    assert today["choices"][0]["message"] == before["choices"][0]["message"]
    without = good(chat(client, messages=new, tools=[CALL], tool_choice="none"))
    assert without["choices"] == good(chat(client, messages=new))["choices"]
    ran = [
        *HELLO,
        {
            "role": "assistant",
            "tool_calls": [{"id": "i", "function": {"name": "interpreter", "arguments": '{"code": "1+1"}'}}],
        },
        {"role": "tool", "tool_call_id": "i", "content": "2"},
    ]
    good(chat(client, messages=ran, tools=[{"type": "code_interpreter"}]))


def test_sampling_fields_have_their_effect(client: TestClient) -> None:
    def text(**body: Any) -> str:
        content: str = good(chat(client, **body))["choices"][0]["message"]["content"]
        return content

    token = good(chat(client, return_token_ids=True, max_tokens=1, temperature=0))["choices"][0]["token_ids"][0]
    biased = good(chat(client, return_token_ids=True, temperature=0, logit_bias={str(token): -100}, max_tokens=1))
    assert biased["choices"][0]["token_ids"] != [token] and biased["prompt_token_ids"]
    forced = good(chat(client, return_token_ids=True, logit_bias={"1000": 1e4}, max_completion_tokens=3, max_tokens=9))
    assert forced["choices"][0]["token_ids"] == [1000] * 3
    stopped = good(chat(client, stop_token_ids=[1000], logit_bias={"1000": 1e4}))["choices"][0]
    assert stopped["finish_reason"] == "stop" and stopped["stop_reason"] == 1000
    assert text(top_k=1) == text(temperature=0) == text(min_p=1.0) == text(top_p=1e-9)
    assert text(seed=1) != text(seed=2)
    penalised = good(
        chat(client, return_token_ids=True, logit_bias={"1000": 50}, presence_penalty=2, frequency_penalty=100)
    )
    assert penalised["choices"][0]["token_ids"][:2] != [1000, 1000]
    endless = good(chat(client, max_tokens=..., ignore_eos=True))
    assert endless["usage"]["total_tokens"] == 320 and endless["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
        ({"messages": [{"role": "user", "content": 5}]}, "content"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": 5}]}, "tool_calls"),
        ({"messages": [{"role": "user", "content": "x", "name": "a\nb"}]}, "name"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"web_search_options": {"search_context_size": "low"}}, "web_search_options"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"chat_template": "{{ 1 }}"}, "template"),
        ({"logits_processors": ["os.system"]}, "code"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"n": 9}, "completions"),
        ({"n": 0}, "n must be"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": "many"}, "max_completion_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ["x" * 2000]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"tools": [CALL, CALL]}, "same name"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "name"),
        ({"tools": [CALL] * 300}, "tools"),
        ({"continue_final_message": True}, "assistant"),
        ({"messages": [{"role": "user", "content": "long " * 600}]}, "tokens"),
        (
            {
                "messages": [
                    *HELLO,
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1"}}]},
                ]
            },
            "arguments",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_is_refused(client: TestClient, body: dict[str, Any], word: str, stream: bool) -> None:
    assert word in refused(chat(client, stream=stream, **body))["message"]


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"{" * 100_000,
        b'{"messages":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"prompt": "x", "input": "x", "messages": [], "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "x", "input": "x", "messages": [], "temperature": NaN}',
        b'{"prompt": "x", "input": "x", "messages": [{"role":"user","content":"x"}], "temperature": 1e999}',
        b'{"prompt": "\\ud800", "input": "\\udfff", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"prompt": "x", "prompt": 7.5, "input": 7.5, "messages": "x", "messages": 7}',
        json.dumps({"messages": HELLO, "prompt": {"a": 1}, "input": {"a": 1}, "n": -(10**30)}).encode(),
    ],
    ids=range(12),
)
def test_hostile_json_is_refused(client: TestClient, route: str, data: bytes) -> None:
    response = client.post(route, content=data, headers={"content-type": "application/json"})
    if route == "/v1/embeddings" and response.status_code == 200:  # which has no such field
        assert b"temperature" in data
        return
    refused(response)


def test_an_unknown_model_is_404(client: TestClient) -> None:
    assert refused(chat(client, model="gpt-5"), 404)["code"] == "model_not_found"
    assert refused(complete(client, model="gpt-5"), 404)["param"] == "model"


def test_completions_echo_and_score_their_prompt(client: TestClient) -> None:
    plain = good(complete(client))["choices"][0]
    told = good(complete(client, echo=True, logprobs=2))
    (choice,) = told["choices"]
    assert told["object"] == "text_completion" and choice["text"] == "Hello" + plain["text"]
    logprobs = choice["logprobs"]
    count = told["usage"]["prompt_tokens"]
    assert {len(values) for values in logprobs.values()} == {count + 6}
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert all(2 <= len(top) <= 3 for top in logprobs["top_logprobs"][1:])
    for text, value, top in zip(*(logprobs[k][1:] for k in ("tokens", "token_logprobs", "top_logprobs")), strict=True):
        assert top[text] == value
    assert logprobs["text_offset"][count] == len("Hello") and logprobs["text_offset"][0] == 0
    only = good(complete(client, echo=True, logprobs=2, max_tokens=0))
    assert only["choices"][0]["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][:count]
    assert only["choices"][0]["text"] == "Hello" and only["usage"]["completion_tokens"] == 0
    assert only["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
@pytest.mark.parametrize("extra", [{}, {"echo": True}, {"logprobs": 1}, {"echo": True, "logprobs": 0}])
def test_a_completion_stream_adds_up_to_the_answer(client: TestClient, extra: dict[str, Any], max_tokens: int) -> None:
    body = {"prompt": ["Hello", "World, 世界"], "n": 2, "max_tokens": max_tokens, **extra}
    whole = good(complete(client, **body))
    chunks = events(complete(client, stream=True, stream_options={"include_usage": True}, **body))
    usage = chunks.pop()["usage"]
    assert [c["index"] for c in whole["choices"]] == [0, 1, 2, 3]
    assert usage["completion_tokens"] == whole["usage"]["completion_tokens"] == 4 * max_tokens
    assert usage["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["length"]
        if choice["logprobs"]:
            for name, values in choice["logprobs"].items():
                assert [v for c in mine if c["logprobs"] for v in c["logprobs"][name]] == values


def test_prompts_may_be_ids_and_best_of_chooses(client: TestClient) -> None:
    ids = good(complete(client, return_token_ids=True))["choices"][0]["prompt_token_ids"]
    text = good(complete(client))["choices"][0]["text"]
    assert good(complete(client, prompt=ids))["choices"][0]["text"] == text
    assert [c["text"] for c in good(complete(client, prompt=[ids, ids]))["choices"]] == [text, text]
    every = good(complete(client, n=4, logprobs=0))["choices"]
    means = [sum(c["logprobs"]["token_logprobs"]) / 6 for c in every]
    best = good(complete(client, n=1, best_of=4))
    assert best["choices"][0]["text"] == every[means.index(max(means))]["text"]
    assert best["usage"]["completion_tokens"] == 24 and best["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"prompt": ""}, None),
        ({"prompt": []}, "empty"),
        ({"prompt": [[]]}, "empty"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": ["x"] * 9}, "completions"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"n": 0}, "n must"),
        ({"prompt": "x " * 2000}, "tokens"),
    ],
)
def test_impossible_completions_are_refused(client: TestClient, body: dict[str, Any], word: str | None) -> None:
    response = complete(client, **body)
    if word is None:  # the begin token stands before an empty text
        assert good(response)["usage"]["prompt_tokens"] == 1
    else:
        assert word in refused(response)["message"]


def test_embeddings(client: TestClient) -> None:
    def embed(**body: Any) -> Any:
        return client.post("/v1/embeddings", json={"model": "tiny", **body})

    found = good(embed(input=["Hello", "World"], user="me"))
    assert found["object"] == "list" and [d["index"] for d in found["data"]] == [0, 1]
    assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] > 2
    first = np.array(found["data"][0]["embedding"], np.float32)
    assert first.shape == (32,) and np.isclose(np.linalg.norm(first), 1)
    packed = good(embed(input="Hello", encoding_format="base64", dimensions=32))["data"][0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(packed), "<f4"), first)
    last = np.array(good(embed(input="Hello", pooling="last", normalize=False))["data"][0]["embedding"])
    assert not np.isclose(np.linalg.norm(last), 1) and not np.allclose(last, first)
    assert "dimensions" in refused(embed(input="Hello", dimensions=8))["message"]
    for wrong in ({"input": []}, {"input": [[]]}, {"input": [10**6]}, {"input": "x", "encoding_format": "int8"}, {}):
        refused(embed(**wrong))

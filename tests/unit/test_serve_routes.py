"""Anthropic's, Ollama's and ChatGLM-6B's routes, tokens and scores, on a tiny random model without sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hanlin.errors import RequestError
from hanlin.serve.routes.durations import seconds
from hanlin.serve.settings import ModelSpec, ServeConfig
from hf_directory import make_directory
from serving import asgi_client

OPTIONS = {
    "cache_bytes": 4 << 20,
    "threads": 1,
    "packed_cache": False,
    "session_len": 256,
    "chat_template": "internlm2",
}
HI = [{"role": "user", "content": "hi"}]
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("serve") / "tiny", num_hidden_layers=1)


Client = httpx.AsyncClient


@pytest.fixture(scope="module")
def with_client(directory: Path) -> Iterator[Callable[[Callable[[Client], Coroutine[Any, Any, None]]], None]]:
    """Runs the requests of a test; all tests share one application."""
    loop, stack = asyncio.new_event_loop(), contextlib.AsyncExitStack()
    spec = ModelSpec(source=str(directory), name="tiny", options=OPTIONS)
    context = asgi_client(ServeConfig(models=(spec,), legacy_chatglm=True))
    client = loop.run_until_complete(stack.enter_async_context(context))
    yield lambda work: loop.run_until_complete(work(client))
    loop.run_until_complete(stack.aclose())
    loop.close()


def events(text: str) -> list[dict[str, Any]]:
    """Of a stream of server-sent events; each event's name is its type."""
    out = []
    for block in filter(None, text.split("\n\n")):
        name, data = block.split("\n")
        out.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {out[-1]['type']}"
    return out


def test_anthropic_streams_what_it_answers(with_client: Any) -> None:
    async def work(client: Client) -> None:
        asked = {"model": "tiny", "max_tokens": 12, "messages": HI, "temperature": 0}
        whole = (await client.post("/v1/messages", json=asked)).json()
        assert whole["type"] == "message" and whole["stop_reason"] in ("max_tokens", "end_turn")
        count = (await client.post("/v1/messages/count_tokens", json={"model": "tiny", "messages": HI})).json()
        assert whole["usage"]["input_tokens"] + whole["usage"]["cache_read_input_tokens"] == count["input_tokens"]
        got = events((await client.post("/v1/messages", json={**asked, "stream": True})).text)
        assert [got[0]["type"], *[e["type"] for e in got[-2:]]] == ["message_start", "message_delta", "message_stop"]
        text = "".join(e["delta"]["text"] for e in got if e["type"] == "content_block_delta")
        assert text == "".join(block["text"] for block in whole["content"])
        assert got[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
        opened = [e["index"] for e in got if e["type"] == "content_block_start"]
        closed = [e["index"] for e in got if e["type"] == "content_block_stop"]
        assert opened == closed == list(range(len(opened)))

    with_client(work)


def test_anthropic_tools_are_called_and_answered(with_client: Any) -> None:
    async def work(client: Client) -> None:
        tools = [{"name": "weather", "description": "of a city", "input_schema": WEATHER}]
        asked = {
            "model": "tiny",
            "max_tokens": 120,
            "messages": HI,
            "tools": tools,
            "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
            "temperature": 0,
        }
        whole = (await client.post("/v1/messages", json=asked)).json()
        if whole["stop_reason"] == "tool_use":  # a random model may talk on until the end
            (call,) = [block for block in whole["content"] if block["type"] == "tool_use"]
            assert call["name"] == "weather" and isinstance(call["input"], dict)
            turns = [
                *HI,
                {"role": "assistant", "content": whole["content"]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call["id"], "content": "rain"}]},
            ]
            again = await client.post(
                "/v1/messages", json={**asked, "messages": turns, "tool_choice": {"type": "none"}}
            )
            assert again.status_code == 200, again.text

    with_client(work)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": [{"role": "system", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image"),
        ({"tools": [{"type": "web_search"}]}, "input_schema"),
        ({"tool_choice": {"type": "maybe"}}, "tool_choice"),
        ({"system": [{"type": "image"}]}, "system"),
        ({"temperature": -1}, "temperature"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "tokens"),
    ],
)
def test_anthropic_errors_have_its_shape(with_client: Any, changes: dict[str, Any], word: str) -> None:
    async def work(client: Client) -> None:
        answer = await client.post("/v1/messages", json={"model": "tiny", "max_tokens": 5, "messages": HI, **changes})
        body = answer.json()
        assert answer.status_code == 400 and body["type"] == "error", body
        assert body["error"]["type"] == "invalid_request_error" and word in body["error"]["message"]

    with_client(work)


def test_ollama_streams_lines_and_answers_whole(with_client: Any) -> None:
    async def work(client: Client) -> None:
        asked = {"model": "tiny:latest", "messages": HI, "options": {"temperature": 0, "num_predict": 10}}
        lines = [json.loads(line) for line in (await client.post("/api/chat", json=asked)).text.splitlines()]
        whole = (await client.post("/api/chat", json={**asked, "stream": False})).json()
        assert "".join(line["message"]["content"] for line in lines) == whole["message"]["content"]
        assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
        for field in ("total_duration", "prompt_eval_count", "eval_count", "eval_duration", "done_reason"):
            assert field in lines[-1] and field in whole
        told = {"model": "tiny", "prompt": "hi", "stream": False, "options": {"temperature": 0, "num_predict": 10}}
        assert (await client.post("/api/generate", json=told)).json()["response"] == whole["message"]["content"]
        raw = (await client.post("/api/generate", json={**told, "raw": True})).json()
        assert raw["prompt_eval_count"] < whole["prompt_eval_count"]

    with_client(work)


def test_ollama_lists_shows_and_unloads(with_client: Any) -> None:
    async def work(client: Client) -> None:
        assert [m["name"] for m in (await client.get("/api/tags")).json()["models"]] == ["tiny"]
        assert [m["name"] for m in (await client.get("/api/ps")).json()["models"]] == ["tiny"]
        shown = (await client.post("/api/show", json={"model": "tiny"})).json()
        assert shown["model_info"]["internlm2.context_length"] == 256 and "tools" in shown["capabilities"]
        assert (await client.get("/api/version")).json()["version"]
        gone = (await client.post("/api/generate", json={"model": "tiny", "keep_alive": 0})).json()
        assert gone["done_reason"] == "unload"
        assert (await client.get("/api/ps")).json()["models"] == []
        back = (await client.post("/api/chat", json={"model": "tiny", "keep_alive": "5m"})).json()
        assert back["done_reason"] == "load"
        two = (await client.post("/api/embed", json={"model": "tiny", "input": ["a", "b"]})).json()
        one = (await client.post("/api/embeddings", json={"model": "tiny", "prompt": "b"})).json()
        assert two["embeddings"][1] == one["embedding"] and len(one["embedding"]) == 32

    with_client(work)


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("chat", {"model": "none", "messages": HI}, "none"),
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "images"),
        ("chat", {"messages": HI, "format": "xml"}, "format"),
        ("chat", {"messages": HI, "options": {"temperature": -1, "top_p": 7}}, "top_p"),
        ("chat", {"messages": HI, "options": {"mirostat": 2}}, "mirostat"),
        ("chat", {"messages": HI, "keep_alive": "soon"}, "keep_alive"),
        ("chat", {"messages": [{"role": "king"}]}, "role"),
        ("generate", {"prompt": "x", "suffix": "y", "template": "{{x}}"}, "template"),
        ("embed", {"input": "x", "dimensions": 7}, "dimensions"),
    ],
)
def test_ollama_errors_have_its_shape(with_client: Any, path: str, body: dict[str, Any], word: str) -> None:
    async def work(client: Client) -> None:
        answer = await client.post(f"/api/{path}", json=body)
        assert answer.status_code in (400, 404) and word in answer.json()["error"], answer.text

    with_client(work)


def test_chatglm_6bs_own_apis(with_client: Any) -> None:
    async def work(client: Client) -> None:
        asked = {"prompt": "hi", "history": [["a", "b"]], "max_length": 60, "top_p": 0}
        told = (await client.post("/", json=asked)).json()
        assert list(told) == ["response", "history", "status", "time"] and told["status"] == 200
        assert told["history"] == [["a", "b"], ["hi", told["response"]]]
        begun = await client.post("/chat", json={"query": "hi", "request_id": "one", "max_length": 60})
        assert begun.text == '{"code":0,"msg":"start process"}'
        assert (await client.post("/chat", json={"query": "hi", "request_id": "one"})).status_code == 409
        for _ in range(500):
            polled = (await client.post("/get_response", json={"request_id": "one"})).json()
            assert polled["code"] == 0 and polled["msg"] == "success"
            if polled["response"]["is_finished"]:
                break
            await asyncio.sleep(0.01)
        assert list(polled["response"]) == ["is_finished", "is_handled", "response", "timestamp"]
        assert polled["response"]["is_finished"] is True and polled["response"]["is_handled"] is True
        assert (await client.post("/get_response", json={"request_id": "two"})).status_code == 404

    with_client(work)


def test_tokens_and_scores(with_client: Any) -> None:
    async def work(client: Client) -> None:
        async def post(path: str, **body: Any) -> Any:
            answer = await client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()

        ids = (await post("/tokenize", prompt="Hello 你好"))["tokens"]
        assert (await post("/detokenize", tokens=ids, skip_special_tokens=True))["prompt"] == "Hello 你好"
        assert (await post("/v1/encode", input=["Hello 你好", ""]))["length"] == [len(ids), 1]
        info = (await client.get("/tokenizer_info")).json()
        assert (await post("/tokenize", prompt=info["bos_token"], add_special_tokens=False))["count"] == 1
        assert info["eos_token"] and info["model_max_length"] == 256
        turned = await post("/apply-template", messages=HI)
        assert (
            turned["prompt"].endswith("<|im_start|>assistant\n")
            and "<|im_start|>user\nhi<|im_end|>" in turned["prompt"]
        )
        assert (await post("/tokenize", messages=HI))["tokens"] == turned["tokens"]
        scored = (await post("/score", input=["Hello there", ids]))["data"]
        assert scored[1]["tokens"] == ids and scored[0]["logprobs"][0] is None
        assert scored[0]["total"] == pytest.approx(sum(scored[0]["logprobs"][1:]))
        (mean,) = (await post("/get_ppl", input="Hello there"))["ppl"]
        assert mean == pytest.approx(-scored[0]["total"] / (len(scored[0]["tokens"]) - 1))

    with_client(work)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": HI}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [10**9]}),
        ("/score", {"input": {"a": 1}}),
        ("/score", {"input": ["x"] * 3000}),
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/etc"}),
        ("/v1/unload_lora_adapter", {"lora_name": "a"}),
        ("/get_response", {"request_id": "x" * 300}),
        ("/v1/nothing", {}),
    ],
)
def test_bad_requests_are_told_so(with_client: Any, path: str, body: dict[str, Any]) -> None:
    async def work(client: Client) -> None:
        answer = await client.post(path, json=body)
        assert 400 <= answer.status_code < 500 and answer.json()["error"]["message"], answer.text

    with_client(work)


def test_the_servers_own_routes(with_client: Any) -> None:
    async def work(client: Client) -> None:
        assert (await client.get("/health")).json() == {"status": "ok"}
        assert (await client.get("/ready")).json() == {"status": "ready"}
        metrics = (await client.get("/metrics")).text
        assert "hanlin:num_requests_waiting" in metrics and "hanlin:e2e_request_latency_seconds" in metrics
        listed = (await client.get("/v1/models")).json()
        assert listed["data"][0]["id"] == "tiny" and listed["data"][0]["max_model_len"] == 256
        assert (await client.get("/v1/models/tiny")).json()["id"] == "tiny"
        assert (await client.get("/v1/models/org/other")).status_code == 404

    with_client(work)


@pytest.mark.parametrize(
    ("text", "expected"), [("5m", 300.0), ("1h30m", 5400.0), (90, 90.0), ("-1", -1.0), ("500ms", 0.5), (None, None)]
)
def test_times_as_ollama_writes_them(text: Any, expected: float | None) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "m", "5 m", "1h 3m", "nan", "1x", float("inf")])
def test_other_times_are_refused(text: Any) -> None:
    with pytest.raises(RequestError):
        seconds(text)

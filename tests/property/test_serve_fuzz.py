"""Whatever is posted to any route, the server answers in time, and never says that it is its own fault.

`HANLIN_SERVE_FUZZ_RUNS=100000` is the long form.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from hanlin.serve.settings import Limits, ModelSpec, ServeConfig
from hf_directory import make_directory
from serving import asgi_client

RUNS = int(os.environ.get("HANLIN_SERVE_FUZZ_RUNS", "1200"))
SECONDS = 20.0  # for one request

HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}
SAMPLING = {"max_tokens": 1, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 1, "stop": ["x"], "n": 1}
VALID: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"messages": HI, **SAMPLING, "stream": True, "stream_options": {"include_usage": True}, "logit_bias": {"3": 1}},
        {"messages": HI, "max_tokens": 1, "tools": [TOOL], "tool_choice": "auto", "logprobs": True, "top_logprobs": 2},
        {
            "messages": HI,
            "max_tokens": 1,
            "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
        },
        {"messages": HI, "max_tokens": 1, "structured_outputs": {"regex": "a+"}},
        {"messages": [*HI, {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}]},
    ],
    "/v1/completions": [
        {"prompt": "hi", **SAMPLING, "echo": True, "logprobs": 1},
        {"prompt": "hi", "suffix": "ho", "max_tokens": 1},
        {"prompt": [[1, 2], [3]], "max_tokens": 1},
    ],
    "/v1/responses": [
        {"input": "hi", "max_output_tokens": 1, "instructions": "x", "text": {"format": {"type": "text"}}},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}], "max_output_tokens": 1},
    ],
    "/v1/responses/input_tokens": [{"input": "hi"}],
    "/v1/embeddings": [{"input": ["hi", "ho"], "encoding_format": "float", "dimensions": 4}],
    "/v1/messages": [
        {"messages": HI, "max_tokens": 1, "system": [{"type": "text", "text": "x"}], "stop_sequences": ["x"]},
        {"messages": HI, "max_tokens": 1, "tools": [{"name": "f", "input_schema": SCHEMA}], "stream": True},
    ],
    "/v1/messages/count_tokens": [{"messages": HI}],
    "/api/chat": [{"model": "tiny", "messages": HI, "options": {"num_predict": 1}, "format": SCHEMA}],
    "/api/generate": [{"model": "tiny", "prompt": "hi", "options": {"num_predict": 1}, "keep_alive": "5m"}],
    "/api/embed": [{"model": "tiny", "input": ["hi"]}],
    "/api/embeddings": [{"model": "tiny", "prompt": "hi"}],
    "/api/show": [{"model": "tiny"}],
    "/tokenize": [{"messages": HI}, {"prompt": "hi", "return_token_strs": True}],
    "/detokenize": [{"tokens": [1, 2]}],
    "/apply-template": [{"messages": HI, "tools": [TOOL]}],
    "/score": [{"input": ["hi ho"]}, {"text_1": "hi", "text_2": ["ho", "hi"]}, {"queries": ["a"], "documents": ["b"]}],
    "/v1/score": [{"input": [[1, 2]]}],
    "/pooling": [{"input": ["hi", "ho"], "encoding_format": "base64"}, {"messages": HI}],
    "/rerank": [{"query": "hi", "documents": ["ho", {"text": "x"}], "top_n": 1, "return_documents": False}],
    "/v1/rerank": [{"query": "hi", "documents": ["ho"]}],
    "/v2/rerank": [{"query": {"text": "hi"}, "documents": ["ho"]}],
    "/get_ppl": [{"input": [[1, 2, 3]]}],
    "/v1/encode": [{"input": "hi", "do_preprocess": True}],
    "/v1/load_lora_adapter": [{"lora_name": "a", "lora_path": "b"}],
    "/v1/unload_lora_adapter": [{"lora_name": "a"}],
    "/": [
        {"prompt": "hi", "history": [["a", "b"]], "max_length": 9},
        {"text": "hi", "image": None, "history": [["a", "b"]], "max_length": 9, "min_length": 1, "top_k": 3},
    ],
    "/chat": [{"query": "hi", "request_id": "1", "max_length": 9}],
    "/get_response": [{"request_id": "1"}],
}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, -(2**63), 2**64, 10**40, 0.5, -0.0, 1e308, -1e-300),
    *(
        "",
        "x",
        "\x00",
        "\ud800",
        "🙂\u202e",
        "<|im_end|>",
        "../..",
        "x" * 5000,
        "auto",
        "required",
        "json_object",
        "user",
    ),
    *([], {}, [[]], [None], [{}], {"": ""}, {"type": "object"}, {"$ref": "#"}, {"type": []}, [1] * 300, ["a", 1]),
)


def spots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places in a value that can be changed."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += spots(inner, (*path, key))
    return found


def mutated(chance: random.Random, path: str) -> bytes:
    """A valid body with something wrong, now and then not even JSON."""
    body = json.loads(json.dumps(chance.choice(VALID[path])))
    for _ in range(chance.randint(1, 3)):
        places = spots(body)
        if not places:
            break
        *above, last = chance.choice(places)
        holder = body
        for key in above:
            holder = holder[key]
        kind = chance.randrange(5)
        if kind == 0:
            del holder[last]
        elif kind == 1 and isinstance(holder, dict):
            others = [name for bodies in VALID.values() for one in bodies for name in one]
            holder[chance.choice(others)] = copy.deepcopy(chance.choice(VALUES))
        elif kind == 2:
            holder[last] = [holder[last]]
        else:
            holder[last] = copy.deepcopy(chance.choice(VALUES))
    data = bytearray(json.dumps(body).encode())
    if chance.random() < 0.1:
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[asyncio.AbstractEventLoop, httpx.AsyncClient]]:
    folder = tmp_path_factory.mktemp("fuzz")
    options = {"cache_bytes": 4 << 20, "threads": 1, "packed_cache": False, "session_len": 256}
    source = str(make_directory(folder / "tiny", num_hidden_layers=1))
    spec = ModelSpec(source=source, name="tiny", options={**options, "chat_template": "internlm2"})
    config = ServeConfig(
        models=(spec,), legacy_chatglm=True, adapter_directory=folder, limits=Limits(max_tokens=8, completions=8)
    )
    loop, stack = asyncio.new_event_loop(), contextlib.AsyncExitStack()
    client = loop.run_until_complete(stack.enter_async_context(asgi_client(config)))
    yield loop, client
    loop.run_until_complete(stack.aclose())
    loop.close()


@pytest.mark.slow
@pytest.mark.timeout(0 if RUNS > 10_000 else 300)
def test_no_body_breaks_the_server(app: Any) -> None:
    loop, client = app
    statuses: dict[int, int] = {}

    async def some(numbers: range) -> None:
        for number in numbers:
            chance = random.Random(number)
            path = chance.choice(list(VALID))
            body = mutated(chance, path)
            where = f"body {number} to {path}: {body[:2000]!r}"
            try:
                answer = await asyncio.wait_for(client.post(path, content=body), SECONDS)
            except asyncio.TimeoutError:
                raise AssertionError(f"no answer to {where}") from None
            assert answer.status_code < 500, f"{where}\n{answer.text[:500]}"
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1

    async def all_of_them() -> None:
        await asyncio.gather(*(some(range(first, RUNS, 4)) for first in range(4)))
        answer = await client.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 1})
        assert answer.status_code == 200 and (await client.get("/health")).status_code == 200

    loop.run_until_complete(all_of_them())
    assert statuses[200] > RUNS // 20 and statuses[400] > RUNS // 10, statuses


def test_every_route_that_takes_a_body_is_tried(app: Any) -> None:
    loop, client = app
    paths = loop.run_until_complete(client.get("/openapi.json")).json()["paths"]
    posts = {path for path, methods in paths.items() if "requestBody" in methods.get("post", {})}
    assert posts <= set(VALID), posts - set(VALID)

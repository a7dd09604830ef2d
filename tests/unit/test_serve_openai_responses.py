"""OpenAI's /v1/responses on a tiny random model, without sockets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from hanlin.serve.errors import ApiError
from hanlin.serve.keys import Key, KeyRing
from hanlin.serve.responses import Kept, Responses
from hanlin.serve.settings import ModelSpec, ServeConfig
from hf_directory import make_directory
from serving import app_client

TOOL = {
    "type": "function",
    "name": "look",
    "parameters": {
        "type": "object",
        "properties": {"n": {"enum": [1]}},
        "required": ["n"],
        "additionalProperties": False,  # a random model adds any
    },
}
KEYS = KeyRing.read(given=["one:first-secret", "two:second-secret"])


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    path = make_directory(tmp_path_factory.mktemp("model") / "tiny")
    options = {"cache_bytes": 8 << 20, "packed_cache": False, "threads": 1, "session_len": 1024}
    with app_client(
        ServeConfig(models=(ModelSpec(source=str(path), name="tiny", options=options),), keys=KEYS)
    ) as made:
        made.headers["authorization"] = "Bearer first-secret"
        yield made


def respond(client: TestClient, **body: Any) -> Any:
    given = {"input": "Hello", "max_output_tokens": 6, "temperature": 1, "seed": 1, **body}
    return client.post("/v1/responses", json=given)


def good(response: Any) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def refused(response: Any, status: int = 400) -> Any:
    assert response.status_code == status, response.text
    return response.json()["error"]


def text_of(answer: Any) -> str:
    return "".join(p["text"] for item in answer["output"] if item["type"] == "message" for p in item["content"])


def events(response: Any) -> list[Any]:
    assert response.status_code == 200, response.text
    found = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == "event: " + found[-1]["type"]
    assert [e["sequence_number"] for e in found] == list(range(len(found)))
    return found


def without_ids(value: Any) -> Any:
    """A response but for what differs from one to the next."""
    text = json.dumps({k: v for k, v in value.items() if k not in ("id", "created_at", "completed_at", "usage")})
    return text.replace(value["id"].partition("_")[2], "ID")


def test_an_answer_has_the_known_shape(client: TestClient) -> None:
    answer = good(respond(client, model="tiny", metadata={"a": "b"}, user="me", reasoning={"effort": "low"}))
    assert answer["object"] == "response" and answer["id"].startswith("resp_") and answer["model"] == "tiny"
    assert answer["status"] == "incomplete" and answer["incomplete_details"] == {"reason": "max_output_tokens"}
    (item,) = answer["output"]
    assert item["type"] == "message" and item["role"] == "assistant" and text_of(answer)
    assert answer["usage"]["output_tokens"] == 6 and answer["metadata"] == {"a": "b"}
    chat = client.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "temperature": 1, "seed": 1},
    )
    assert good(chat)["choices"][0]["message"]["content"] == text_of(answer)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
        {"tools": [TOOL], "tool_choice": {"type": "function", "name": "look"}, "max_output_tokens": 40},
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [TOOL]}},
        {"logit_bias": {"2": 1e4}},  # which ends it at once
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"const": "ok"}}}, "max_output_tokens": 40},
    ],
)
def test_a_stream_adds_up_to_the_answer(client: TestClient, extra: dict[str, Any]) -> None:
    whole = good(respond(client, **extra))
    found = events(respond(client, stream=True, **extra))
    assert [e["type"] for e in found[:2]] == ["response.created", "response.in_progress"]
    last = found[-1]
    assert last["type"] == f"response.{whole['status']}" and without_ids(last["response"]) == without_ids(whole)
    built: list[Any] = []
    for event in found:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(built)
            built.append(event["item"])
        elif kind == "content_part.added":
            built[0]["content"].append(event["part"])
        elif kind == "output_text.delta":
            built[0]["content"][0]["text"] += event["delta"]
            built[0]["content"][0]["logprobs"] += event["logprobs"]
        elif kind == "function_call_arguments.delta":
            built[event["output_index"]]["arguments"] += event["delta"]
        elif kind == "output_item.done":
            assert {**built[event["output_index"]], "status": event["item"]["status"]} == event["item"]
            built[event["output_index"]] = event["item"]
    assert built == last["response"]["output"] and built
    kept = good(client.get(f"/v1/responses/{last['response']['id']}"))
    assert kept == last["response"]
    if "tool_choice" in extra and extra["tool_choice"]["type"] == "function":
        assert [item["type"] for item in built] == ["function_call"] and json.loads(built[0]["arguments"]) == {"n": 1}
    if "text" in extra:
        assert text_of(whole) == '"ok"' and whole["status"] == "completed"


def test_a_response_is_gone_on_from(client: TestClient) -> None:
    first = good(respond(client, instructions="Be brief"))
    second = good(respond(client, input="More", previous_response_id=first["id"]))
    told = [{"role": "user", "content": "Hello"}, *first["output"], {"role": "user", "content": "More"}]
    assert text_of(good(respond(client, input=told))) == text_of(second)
    again = good(respond(client, input="More", previous_response_id=first["id"], instructions="Be brief"))
    assert again["usage"]["input_tokens"] < second["usage"]["input_tokens"]  # in place of the long default
    third = events(respond(client, input="More", previous_response_id=second["id"], stream=True))[-1]["response"]
    assert third["usage"]["input_tokens"] > second["usage"]["input_tokens"]


def test_calls_and_their_results_are_understood(client: TestClient) -> None:
    asked = {"tools": [TOOL, {"type": "code_interpreter", "container": {"type": "auto"}}]}
    call = good(respond(client, **asked, tool_choice={"type": "function", "name": "look"}, max_output_tokens=40))
    (item,) = call["output"]
    result = {"type": "function_call_output", "call_id": item["call_id"], "output": "42"}
    short = good(respond(client, **asked, input=[result], previous_response_id=call["id"]))
    items = [{"role": "user", "content": "Hello"}, {"type": "reasoning", "summary": []}, item, result]
    assert text_of(good(respond(client, **asked, input=items))) == text_of(short)
    ran = {"type": "function_call", "call_id": "c", "name": "interpreter", "arguments": '{"code": "1+1"}'}
    parts = [{"type": "input_text", "text": "2"}]
    good(respond(client, **asked, input=[*items, ran, {**result, "call_id": "c", "output": parts}]))


def test_kept_responses_belong_to_their_key(client: TestClient) -> None:
    answer = good(respond(client, input=[{"role": "developer", "content": "x"}, {"role": "user", "content": "y"}]))
    place = f"/v1/responses/{answer['id']}"
    assert good(client.get(place)) == answer
    items = good(client.get(place + "/input_items"))
    assert [i["role"] for i in items["data"]] == ["developer", "user"] and items["first_id"] == items["data"][0]["id"]
    other = {"authorization": "Bearer second-secret"}
    for response in (client.get(place, headers=other), client.delete(place, headers=other)):
        assert refused(response, 404)["code"] == "response_not_found"
    stolen = {"input": "x", "previous_response_id": answer["id"]}
    assert refused(client.post("/v1/responses", json=stolen, headers=other))["param"] == "previous_response_id"
    assert refused(client.post(place + "/cancel"))
    assert good(client.delete(place)) == {"id": answer["id"], "object": "response", "deleted": True}
    refused(client.get(place), 404)
    unkept = good(respond(client, store=False))
    refused(client.get(f"/v1/responses/{unkept['id']}"), 404)


def test_a_response_in_the_background_is_fetched_or_cancelled(client: TestClient) -> None:
    begun = good(respond(client, background=True))
    place = f"/v1/responses/{begun['id']}"
    assert begun["status"] == "in_progress" and begun["background"] is True
    until = time.monotonic() + 30
    while good(client.get(place))["status"] == "in_progress":
        assert time.monotonic() < until
        time.sleep(0.01)
    assert text_of(good(client.get(place))) == text_of(good(respond(client)))
    assert good(client.post(place + "/cancel"))["status"] == "incomplete"  # it has ended already
    long = good(respond(client, background=True, max_output_tokens=900, ignore_eos=True))
    refused(respond(client, previous_response_id=long["id"]))
    assert good(client.post(f"/v1/responses/{long['id']}/cancel"))["status"] == "cancelled"
    assert good(client.get(f"/v1/responses/{long['id']}"))["status"] == "cancelled"
    ended = good(respond(client, background=True, max_output_tokens=900, ignore_eos=True))
    good(client.delete(f"/v1/responses/{ended['id']}"))
    service = client.app.state.service  # type: ignore[attr-defined]
    while service.models.list[0].users:  # all has been given back
        assert time.monotonic() < until
        time.sleep(0.01)


def test_input_is_counted(client: TestClient) -> None:
    count = good(client.post("/v1/responses/input_tokens", json={"input": "Hello"}))
    assert count["input_tokens"] == good(respond(client))["usage"]["input_tokens"]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"input": []}, "empty"),
        ({"input": None}, "input"),
        ({"input": [{"type": "computer_call"}]}, "computer_call"),
        ({"input": [{"type": "message", "content": "x"}]}, "role"),
        ({"input": [{"type": "function_call", "arguments": "{}"}]}, "name"),
        ({"input": [{"type": "function_call_output", "call_id": "x"}]}, "output"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///x"}]}]}, "input_image"),
        ({"previous_response_id": "resp_x"}, "resp_x"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"tools": [{"type": "mcp", "server_url": "http://x"}]}, "mcp"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "x"}]}}, "look"),
        ({"background": True, "stream": True}, "background"),
        ({"background": True, "store": False}, "background"),
        ({"n": 2}, "n must"),
        ({"max_output_tokens": 0}, "max_tokens"),
        ({"text": {"format": {"type": "xml"}}}, "xml"),
        ({"input": "x " * 3000}, "tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_is_refused(client: TestClient, body: dict[str, Any], word: str, stream: bool) -> None:
    assert word in refused(respond(client, **{"stream": stream, **body}))["message"]


def test_the_oldest_are_forgotten_first() -> None:
    kept = Responses()

    def add(key: Key, name: str, nbytes: int) -> None:
        kept.keep(key.name, Kept(answer={"id": name}, messages=(), items=[], nbytes=nbytes))

    one, two = KEYS.keys
    add(two, "theirs", 1)
    for number in range(600):
        add(one, f"r{number}", 1)
    with pytest.raises(ApiError):
        kept.find(one.name, "r80")
    assert kept.find(one.name, "r90").nbytes == 1 and kept.find(two.name, "theirs")
    add(one, "huge", 1 << 30)
    with pytest.raises(ApiError):
        kept.find(one.name, "r599")
    assert kept.find(one.name, "huge")

"""The openai package against a real server on a real port, with the default model."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from serving import serving

openai = pytest.importorskip("openai", reason="needs the package openai")
pydantic = pytest.importorskip("pydantic")

pytestmark = pytest.mark.e2e

BERLIN = [{"role": "user", "content": "What is the capital of Germany?"}]
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
ASK = "What is the weather in Paris?"


class City(pydantic.BaseModel):  # type: ignore[name-defined, misc]
    name: str
    population: int


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models_are_listed(client: Any) -> None:
    (model, *_) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id


def test_chat_answers_and_streams_the_same(client: Any) -> None:
    options = {"model": "", "messages": BERLIN, "temperature": 0, "max_tokens": 40}
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    (choice,) = answer.choices
    assert "Berlin" in choice.message.content and choice.finish_reason == "stop"
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == choice.message.content
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == answer.usage.total_tokens
    with client.chat.completions.stream(**options) as stream:
        assert stream.get_final_completion().choices[0].message.content == choice.message.content


def test_tools_are_called_and_answered(client: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": ASK}]
    options = {"model": "", "tools": [{"type": "function", "function": WEATHER}], "temperature": 0, "max_tokens": 60}
    must = {"tool_choice": "required", "parallel_tool_calls": False}
    (choice,) = client.chat.completions.create(messages=messages, **options, **must).choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert call.function.name == "get_weather" and set(json.loads(call.function.arguments)) == {"city"}
    with client.chat.completions.stream(messages=messages, **options, **must) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny, 22 degrees"}]
    (after,) = client.chat.completions.create(messages=messages, **options, tool_choice="none").choices
    assert after.message.content and not after.message.tool_calls


def test_structured_output_is_parsed(client: Any) -> None:
    messages = [{"role": "user", "content": "Tell me about Paris: name and population."}]
    options = {"model": "", "messages": messages, "temperature": 0, "max_tokens": 60}
    parsed = client.chat.completions.parse(**options, response_format=City).choices[0].message.parsed
    assert isinstance(parsed, City) and parsed.name == "Paris"
    chosen = client.chat.completions.create(**options, extra_body={"guided_choice": ["red", "blue"]})
    assert chosen.choices[0].message.content in ("red", "blue")
    digits = client.chat.completions.create(**options, extra_body={"structured_outputs": {"regex": "[0-9]{3}"}})
    assert digits.choices[0].message.content.isdigit()
    whole = client.chat.completions.create(**{**options, "max_tokens": 200}, response_format={"type": "json_object"})
    if whole.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(whole.choices[0].message.content), dict)


def test_completions_score_what_they_continue(client: Any) -> None:
    options = {"model": "", "prompt": "The capital of France is", "temperature": 0}
    (choice,) = client.completions.create(**options, max_tokens=1, echo=True, logprobs=1).choices
    assert choice.text == "The capital of France is Paris"
    logprobs = choice.logprobs
    assert logprobs.token_logprobs[0] is None and logprobs.tokens[-1] == " Paris"
    # As evaluations read them: a greedy continuation is one whose every token is its place's likeliest.
    greedy = [
        value == max(top.values())
        for value, top in zip(logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True)
    ]
    assert greedy[-1] and not all(greedy)
    streamed = client.completions.create(**options, max_tokens=8, stream=True)
    text = client.completions.create(**options, max_tokens=8).choices[0].text
    assert "".join(c.choices[0].text for c in streamed) == text


def test_embeddings_come_as_floats(client: Any) -> None:
    found = client.embeddings.create(model="", input=["a cat", "a small cat", "tax law"])  # in base64, unasked
    plain = client.embeddings.create(model="", input="a cat", encoding_format="float")
    vectors = np.array([each.embedding for each in found.data])
    assert np.allclose(vectors[0], plain.data[0].embedding) and found.usage.prompt_tokens > 5
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]


def test_responses_are_created_streamed_parsed_and_kept(client: Any) -> None:
    options = {"model": "", "temperature": 0, "max_output_tokens": 60}
    first = client.responses.create(input=BERLIN[0]["content"], **options)
    assert "Berlin" in first.output_text and first.status == "completed"
    second = client.responses.create(input="Which country is it in?", previous_response_id=first.id, **options)
    assert "Germany" in second.output_text and second.usage.input_tokens > first.usage.input_tokens
    assert client.responses.retrieve(second.id).output_text == second.output_text
    with client.responses.stream(input=BERLIN[0]["content"], **options) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == first.output_text
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    parsed = client.responses.parse(input="Tell me about Paris: name and population.", text_format=City, **options)
    assert parsed.output_parsed.name == "Paris"
    tools = [{"type": "function", **WEATHER}]
    must = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    with client.responses.stream(input=ASK, **must, **options) as stream:
        asked = stream.get_final_response()
    (call,) = asked.output
    assert call.parsed_arguments.keys() == {"city"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    assert client.responses.create(input=[result], previous_response_id=asked.id, **options).output_text
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)


def test_errors_are_those_that_the_client_knows(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-5"):
        client.chat.completions.create(model="gpt-5", messages=BERLIN)
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}]
    with pytest.raises(openai.BadRequestError, match="image_url") as caught:
        client.chat.completions.create(model="", messages=image)
    assert caught.value.param == "messages" and caught.value.request_id
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="", messages=[{"role": "user", "content": "long " * 20000}])
    assert long.value.code == "context_length_exceeded"


def test_a_stream_that_is_left_ends_its_work(url: str) -> None:
    """All blocks come back, and the next request finds an idle engine."""

    async def leave_early() -> None:
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
            options = {"model": "", "messages": BERLIN, "max_tokens": 2000, "stream": True}
            streams = [
                await client.chat.completions.create(**options, extra_body={"ignore_eos": True}) for _ in range(4)
            ]
            for stream in streams:
                await anext(aiter(stream))
                await stream.close()

    asyncio.run(leave_early())
    until = time.monotonic() + 10
    while True:
        running = [
            float(line.split()[-1])
            for line in httpx.get(url + "/metrics").text.splitlines()
            if line.startswith("hanlin:num_requests_running")
        ]
        assert running, "the metric of running requests is missing"
        if sum(running) == 0:
            break
        assert time.monotonic() < until, "left requests still run"
        time.sleep(0.05)

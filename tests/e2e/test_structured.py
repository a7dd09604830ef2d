"""Constrained replies and forced calls of the real default model, through what a user types."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

import hanlin
from hanlin.errors import RequestError
from hanlin.kernels.native import available

pytestmark = pytest.mark.e2e
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "height": {"type": "number", "minimum": 0.5, "maximum": 2.5},
        "mood": {"enum": ["happy", "sad"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "height", "mood", "tags"],
    "additionalProperties": False,
}
AS_PERSON = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
ASKED = "Describe a person as JSON."
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 30}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def llm() -> Iterator[hanlin.LLM]:
    with hanlin.load(cache_bytes=100 << 20) as model:
        yield model


def test_a_schema(llm: hanlin.LLM) -> None:
    assert llm.engine.runner.name == ("native" if available() else "torch")
    for temperature in (0, 1.0):
        done = llm.chat(ASKED, temperature=temperature, seed=1, max_tokens=200, response_format=AS_PERSON)
        assert done.finish_reason == "stop"
        jsonschema.validate(json.loads(done.text), PERSON)


def test_chinese_in_json(llm: hanlin.LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"城市": {"enum": ["北京", "上海"]}, "说明": {"type": "string", "pattern": "^[一-龥，。]{3,6}$"}},
        "required": ["城市", "说明"],
        "additionalProperties": False,
    }
    for seed in range(3):
        done = llm.chat("用JSON介绍一座城市。", temperature=1.0, seed=seed, max_tokens=120, guided_json=schema)
        value = json.loads(done.text)
        jsonschema.validate(value, schema)
        assert "\ufffd" not in done.text and re.fullmatch("[一-龥，。]{3,6}", value["说明"])


def test_expressions_choices_and_grammars(llm: hanlin.LLM) -> None:
    ask: Any = {"temperature": 1.0, "seed": 3, "max_tokens": 40}
    phone = llm.chat("A phone number?", **ask, structured_outputs={"regex": r"\d{3}-\d{4}"})
    assert re.fullmatch("[0-9]{3}-[0-9]{4}", phone.text) and phone.finish_reason == "stop"
    assert llm.chat("Is this film good?", **ask, guided_choice=["positive", "negative"]).text in (
        "positive",
        "negative",
    )
    sums = llm.generate("1 + 1 =", **ask, guided_grammar='start: N ("+" N)+ "=" N\nN: /[0-9]{1,3}/')[0]
    assert re.fullmatch(r"\d{1,3}(\+\d{1,3})+=\d{1,3}|[\d+]*", sums.text)
    assert isinstance(json.loads(llm.chat("{}", **ask, response_format=AS_PERSON | {"type": "json_object"}).text), dict)


def test_one_request_one_answer(llm: hanlin.LLM) -> None:
    options: Any = {"temperature": 0.9, "seed": 5, "max_tokens": 120, "response_format": AS_PERSON}
    alone = llm.chat(ASKED, **options)
    together = llm.chat([[{"role": "user", "content": text}] for text in (ASKED, "Hello", ASKED)], **options)
    several = llm.chat(ASKED, n=2, **options)
    streamed = "".join(delta.text for delta in llm.stream(ASKED, **options))
    assert alone.ids == together[0].ids == together[2].ids == several[0].ids != several[1].ids
    assert streamed == alone.text
    steps = llm.engine.steps
    llm.chat(ASKED, **options)
    assert llm.engine.steps - steps < len(alone.ids)  # what is forced is checked in one step
    with hanlin.load(cache_bytes=50 << 20, speculation="off") as slow:
        assert slow.chat(ASKED, **options).ids == alone.ids

    async def awaited() -> Any:
        return await hanlin.AsyncLLM(llm).chat(ASKED, **options)

    assert asyncio.run(awaited()).ids == alone.ids


def test_it_ends_by_length_or_not_at_all(llm: hanlin.LLM) -> None:
    cut = llm.chat(ASKED, temperature=0, max_tokens=10, response_format=AS_PERSON)
    assert cut.finish_reason == "length" and len(cut.ids) == 10
    held = llm.chat(ASKED, temperature=0, max_tokens=50, min_tokens=40, ignore_eos=True, guided_choice=["yes", "no"])
    assert held.text in ("yes", "no") and held.finish_reason == "stop"
    with pytest.raises(RequestError, match="the constraint cannot be met"):
        llm.chat("Yes?", max_tokens=20, guided_choice=["yes"], bad_words=["yes", "y", "ye", "s", "es", "e"])


def test_tools_must_be_called(llm: hanlin.LLM) -> None:
    ask: Any = {"tools": [WEATHER], "temperature": 1.0, "seed": 2, "max_tokens": 100}
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        done = llm.chat("Weather in Paris?", **ask, tool_choice=choice, parallel_tool_calls=False)
        (call,) = done.tool_calls
        assert (done.text, done.finish_reason, call.name) == ("", "tool_calls", "get_weather")
        jsonschema.validate(json.loads(call.arguments), WEATHER["function"]["parameters"])  # type: ignore[index]
    plain = llm.chat("Weather in Paris?", temperature=0, max_tokens=12)
    hidden = llm.chat("Weather in Paris?", **ask | {"temperature": 0, "max_tokens": 12}, tool_choice="none")
    assert hidden.ids == plain.ids and hidden.usage.prompt_tokens == plain.usage.prompt_tokens


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"guided_regex": "(a"}, "unclosed group"),
        ({"response_format": {"type": "yaml"}}, "'yaml'"),
        ({"guided_json": {"$ref": "http://127.0.0.1:9/a"}}, "refused"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "cannot be combined"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice must be"),
        ({"tools": [WEATHER], "tool_choice": {"name": "x"}}, "none of the tools"),
        ({"tools": [WEATHER], "tool_choice": "required", "guided_regex": "a"}, "cannot be constrained otherwise"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls must be"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(llm: hanlin.LLM, options: Any, says: str) -> None:
    steps = llm.stats()["steps"]
    with pytest.raises(RequestError) as caught:
        llm.chat("Hello", **options)
    assert says in str(caught.value) and llm.stats()["steps"] == steps


def test_lmdeploys_response_format(llm: hanlin.LLM) -> None:
    from hanlin import GenerationConfig, Pipeline

    pipe = Pipeline(llm)
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    config = GenerationConfig(max_new_tokens=200, response_format=schema)
    jsonschema.validate(json.loads(pipe(ASKED, gen_config=config).text), PERSON)
    config = GenerationConfig(response_format={"type": "regex_schema", "regex_schema": "call me [A-Z][a-z]{1,10}"})
    assert re.fullmatch("call me [A-Z][a-z]{1,10}", pipe("Who are you?", gen_config=config).text)

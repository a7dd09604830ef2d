"""ChatGLM2's, ChatGLM3's and GLM-4's replies in any pieces; calls in Python's syntax, which are read and never run."""

from __future__ import annotations

import ast
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm2_directory import tiktoken_file, tokenizer_model
from hanlin.chat.chatglm2 import ChatGLM2Format
from hanlin.chat.chatglm3 import ChatGLM3Format
from hanlin.chat.glm4 import GLM4Format
from hanlin.chat.literals import read_call, write_call
from hanlin.tokenizers.glm import chatglm2_tokenizer, glm4_tokenizer
from hanlin.tokenizers.spm_model import SpmModel
from hanlin.types import Message, ReplyEvent, Tool, ToolCall

WEATHER = Tool(name="get_weather", parameters={"type": "object", "properties": {"city": {"type": "string"}}})
PYTHON = Tool(name="interpreter", kind="interpreter")
TIME = "[[训练时间]]"


@pytest.fixture(scope="module")
def formats() -> dict[str, Any]:
    model = SpmModel.parse(tokenizer_model(), "tiny")
    return {
        "chatglm2": ChatGLM2Format(chatglm2_tokenizer(model, roles=False)),
        "chatglm3": ChatGLM3Format(chatglm2_tokenizer(model, roles=True)),
        "glm4": GLM4Format(glm4_tokenizer(tiktoken_file())),
    }


PIECES = st.sampled_from(
    [
        "\n", " ", "\t", "你好", "a", "hello", "get_weather", "get_weather\n", "get_", "interpreter\n", "python\n",
        "```",
        "```python\n", "\n```", 'tool_call(city="a")', "tool_call(", ")", '{"city": "b"}', "{", "👋", TIME, TIME[:4],
        "[[", "]]", "<|user|>", "print(1)", "训练时间", "<assistant>",
    ]
)  # fmt: skip
REPLIES = st.lists(PIECES, max_size=10)


def ids_of(chat: Any, pieces: list[str]) -> list[int]:
    """Pieces as a model might write them, tokens of their own for each; `<assistant>` begins another part."""
    tokenizer, ids = chat._tokenizer, []
    for piece in pieces:
        token = tokenizer.token_id("<|assistant|>")
        if piece == "<assistant>":
            ids += [] if token is None else [token]
        else:
            ids += tokenizer.encode(piece)
    return ids  # type: ignore[no-any-return]


def joined(events: list[ReplyEvent]) -> tuple[str, list[ToolCall]]:
    return "".join(event.text for event in events), [event.tool_call for event in events if event.tool_call]


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3", "glm4"])
@pytest.mark.parametrize("tools", [(), (WEATHER, PYTHON)], ids=["", "tools"])
@settings(max_examples=120, deadline=None)
@given(pieces=REPLIES, cuts=st.lists(st.integers(0, 60), max_size=6), skip=st.booleans())
def test_any_pieces_give_the_same(
    formats: dict[str, Any], name: str, tools: tuple[Tool, ...], pieces: list[str], cuts: list[int], skip: bool
) -> None:
    chat = formats[name]
    ids = ids_of(chat, pieces)
    whole = chat.parser(tools, skip_special=skip)
    want = joined([*whole.push(ids), *whole.finish()])
    parser, at, events = chat.parser(tools, skip_special=skip), 0, []
    for cut in [*sorted(cuts), len(ids)]:
        events += parser.push(ids[at:cut])
        at = max(at, cut)
    events += parser.finish()
    text, calls = joined(events)
    assert (text, calls) == want
    singly = chat.parser(tools, skip_special=skip)
    assert joined([*(event for i in ids for event in singly.push([i])), *singly.finish()]) == want
    if "<assistant>" not in pieces and (not tools or name == "chatglm2"):
        assert text == chat._tokenizer.decode(ids, skip_special=skip).strip().replace(TIME, "2023年")
        assert calls == []
    for call in calls:
        assert call.kind == "interpreter" or isinstance(json.loads(call.arguments), dict)


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=9)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=8,
)
KEYS = st.one_of(st.sampled_from(["city", "days", "a-b", "True", "", "if", "名"]), st.text(max_size=4))


@settings(max_examples=300, deadline=None)
@given(arguments=st.dictionaries(KEYS, VALUES, max_size=4))
def test_written_calls_are_read(arguments: dict[str, Any]) -> None:
    assert read_call(write_call("tool_call", arguments)) == ("tool_call", arguments)
    assert read_call(f"tool_call(**{json.dumps(arguments)})") == ("tool_call", arguments)
    assert read_call(f" tool_call(\n    **{arguments!r},\n) # so") == ("tool_call", arguments)


SOURCE = st.lists(
    st.sampled_from([
        "(", ")", "[", "]", "{", "}", ",", ":", "=", "**", "-", "1", "2.5", ".5", "1e3", "0x1F", "1_0", "'", '"', "'''",
        '"""', "\\", "\\n", "\\x41", "\\u4f60", "\\101", "r'", "f'", "b'", "a", "tool_call", "None", "True", " ", "\n",
        "#",
        "x=", "y=", "'a'", '"b"', "+", "*", "lambda", "__import__('os')",
    ]),
    max_size=12,
).map("".join)  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(inside=SOURCE)
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_what_is_read_is_what_python_would_read(inside: str) -> None:
    found = read_call(f"tool_call(x={inside})")
    if found is None:
        return
    try:
        call = ast.parse(f"tool_call(x={inside})", mode="eval").body
    except SyntaxError:  # Python refuses an argument twice in ** too, and numbers such as 01
        return
    assert isinstance(call, ast.Call)
    want: dict[str, Any] = {}
    for keyword in call.keywords:
        value = ast.literal_eval(keyword.value)
        want |= {keyword.arg: value} if keyword.arg else value
    assert json.loads(json.dumps(want)) == json.loads(json.dumps(found[1]))


@pytest.mark.parametrize(
    "source",
    [
        "", "tool_call", "tool_call(", "tool_call)", "tool_call(1)", "tool_call(a)", "tool_call(a=b)",
        "tool_call(a=1)()",
        "tool_call(a=open('x'))", "tool_call(a=1) or 2", "tool_call(a=1, a=2)", "tool_call(a=1, **{'a': 2})",
        "tool_call(a=f'{1}')", "tool_call(a=b'x')", "tool_call(a={1})", "tool_call(a={1: 2})", "tool_call(a=1j)",
        "tool_call(a=[1)", "tool_call(a='x", "tool_call(a='\\N{BULLET}')", "tool_call(a=1e999)",
        "tool_call(a=[[" * 90000,
        "tool_call(a=" + "9" * 9999 + ")", "tool_call(a='\\U99999999')", "tool_call(a=" + "[" * 99 + "]" * 99 + ")",
        "tool_call(a='x\ny')", "tool_call(*[1])", "a.b(c=1)", "tool_call(a=1)\nimport os",
    ],
)  # fmt: skip
def test_anything_else_is_no_call(source: str) -> None:
    assert read_call(source) is None


@settings(max_examples=60, deadline=None)
@given(
    arguments=st.dictionaries(st.sampled_from(["city", "when", "a b"]), VALUES, max_size=3),
    thought=st.sampled_from(["", "hello", "你好。\n\na"]),
    code=st.sampled_from(["print(1)", "a = '```'\nb", "x\n"]),
)
@pytest.mark.parametrize("name", ["chatglm3", "glm4"])
def test_calls_come_back(
    formats: dict[str, Any], name: str, arguments: dict[str, Any], thought: str, code: str
) -> None:
    """What is rendered as an assistant's turn reads as the same turn when the model writes it."""
    chat = formats[name]
    calls = (
        ToolCall(name="get_weather", arguments=json.dumps(arguments), id="call_0"),
        ToolCall(name="interpreter", arguments=code, id="call_1", kind="interpreter"),
    )
    turns = [Message(role="user", content="a"), Message(role="assistant", content=thought, tool_calls=calls)]
    rendered = chat.render(turns, (WEATHER, PYTHON), generation_prompt=False)
    start = chat.render(turns[:1], (WEATHER, PYTHON)).ids
    assert rendered.ids[: len(start)] == start
    assert set(rendered.weights[: len(start)]) == {0.0} and set(rendered.weights[len(start) :]) == {1.0}
    parser = chat.parser((WEATHER, PYTHON))
    text, found = joined([*parser.push(rendered.ids[len(start) :]), *parser.finish()])
    assert text == thought
    assert [json.loads(found[0].arguments), found[0].name, found[0].kind] == [arguments, "get_weather", "function"]
    assert [found[1].arguments.strip(), found[1].name, found[1].kind] == [code.strip(), "interpreter", "interpreter"]
    assert [call.id for call in found] == ["call_0", "call_1"]

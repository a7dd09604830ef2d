"""Reply parsers: text and calls, however the ids come; a call that is none comes back as text."""

from __future__ import annotations

import json

import pytest

from chat_samples import INTERNLM2_TOKENS, ByteTokenizer, parse
from hanlin.chat.chatml import ChatMLFormat
from hanlin.chat.internlm2 import InternLM2Format
from hanlin.types import Message, Tool, ToolCall

TOOLS = (Tool(name="weather"), Tool(name="py", kind="interpreter"))
CALL = '<|action_start|><|plugin|>\n{"name": "weather", "parameters": {"city": "上海"}}<|action_end|>'
ARGUMENTS = '{"city": "上海"}'
TAGGED = '<tool_call>\n{"name": "weather", "arguments": {"city": "上海"}}\n</tool_call>'


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


def ids(tokenizer: ByteTokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, parse_special=True)


def test_text_alone(tokenizer: ByteTokenizer) -> None:
    parser = InternLM2Format(tokenizer).parser()
    assert [event.text for event in parser.push(ids(tokenizer, "Hi 你好"))] == ["Hi 你好"]
    assert parser.push([]) == []
    assert parser.finish() == []


def test_half_a_character_is_held_back(tokenizer: ByteTokenizer) -> None:
    parser = InternLM2Format(tokenizer).parser(TOOLS)
    first, *rest = "你".encode()
    assert parser.push([first]) == []
    assert [event.text for event in parser.push(rest)] == ["你"]
    assert parser.push([first]) == []
    assert [event.text for event in parser.finish()] == ["\ufffd"]


@pytest.mark.parametrize("tools", [(), TOOLS])
@pytest.mark.parametrize("skip", [True, False])
def test_stop_tokens_are_never_shown(tokenizer: ByteTokenizer, tools: tuple[Tool, ...], skip: bool) -> None:
    """Pain 24: the end of turn was printed, or skipped as a special token so that nothing stopped."""
    for chat in (InternLM2Format(tokenizer), ChatMLFormat(tokenizer)):
        reply = ids(tokenizer, "Hi<|im_end|></s>")
        assert parse(chat.parser(tools, skip_special=skip), reply)[0] == "Hi"
        assert set(chat.stop_ids) == {tokenizer.token_id("<|im_end|>"), tokenizer.eos_id}


def test_text_goes_on_behind_a_stop_token(tokenizer: ByteTokenizer) -> None:
    """With `ignore_eos` it does."""
    assert parse(InternLM2Format(tokenizer).parser(TOOLS), ids(tokenizer, "a<|im_end|>b"))[0] == "ab"


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_call_in_one_piece_or_in_many(tokenizer: ByteTokenizer, one_by_one: bool) -> None:
    """Pains 25 and 26: a call that came in one delta was lost, or its arguments were, or they came twice."""
    reply = ids(tokenizer, f"Sure.{CALL}<|im_end|>")
    parts = [[token] for token in reply] if one_by_one else [reply]
    text, calls, order = parse(InternLM2Format(tokenizer).parser(TOOLS), *parts)
    assert text == "Sure."
    assert calls == [ToolCall(id="call_0", name="weather", arguments=ARGUMENTS)]
    assert order == ["Sure.", calls[0]]


def test_several_calls_keep_their_own_arguments(tokenizer: ByteTokenizer) -> None:
    """Pain 26: the next call's arguments were dropped."""
    one = '<|action_start|><|plugin|>\n{"name": "a", "parameters": {"n": 1}}<|action_end|>'
    two = '<|action_start|><|plugin|>{"name": "b", "arguments": {"n": 2}}<|action_end|>'
    both = '<|action_start|><|plugin|>[{"name": "c"}, {"name": "d", "parameters": {"n": 4}}]<|action_end|>'
    text, calls, _ = parse(InternLM2Format(tokenizer).parser(TOOLS), ids(tokenizer, f"x{one}\n{two} \n{both}\n"))
    assert text == "x"
    assert [(call.id, call.name, call.arguments) for call in calls] == [
        ("call_0", "a", '{"n": 1}'),
        ("call_1", "b", '{"n": 2}'),
        ("call_2", "c", "{}"),
        ("call_3", "d", '{"n": 4}'),
    ]


def test_text_around_calls_keeps_its_place(tokenizer: ByteTokenizer) -> None:
    _, calls, order = parse(InternLM2Format(tokenizer).parser(TOOLS), ids(tokenizer, f"a {CALL}\n b"))
    assert order == ["a ", calls[0], "\n b"]


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "weather", "parameters": {"city": "Shang',
        '{"name": "weather", "parameters": {"city": 1}',
        '{"name": "weather", "parameters": [1]}',
        '{"name": "weather", "parameters": "no"}',
        '{"name": "", "parameters": {}}',
        '{"name": 3}',
        '{"parameters": {}}',
        '{"name": "a", "parameters": {"x": NaN}}',
        '{"name": "\\ud800"}',
        "[]",
        "[1]",
        "null",
        "just words",
        "",
        "[" * 50_000,
        '{"name": "a", "parameters": ' + "9" * 5000 + "}",
    ],
)
@pytest.mark.parametrize("ended", [True, False])
def test_what_is_no_call_comes_back_as_text(tokenizer: ByteTokenizer, body: str, ended: bool) -> None:
    """Cut or invalid JSON must not raise, nor vanish."""
    chat = InternLM2Format(tokenizer)
    reply = f"a<|action_start|><|plugin|>{body}" + ("<|action_end|> b" if ended else "")
    assert parse(chat.parser(TOOLS), ids(tokenizer, reply))[:2] == (f"a{body}" + " b" * ended, [])
    assert parse(chat.parser(TOOLS, skip_special=False), ids(tokenizer, reply))[:2] == (reply, [])
    tagged = f"a<tool_call>{body}" + ("</tool_call> b" if ended else "")
    assert parse(ChatMLFormat(tokenizer).parser(TOOLS), ids(tokenizer, tagged))[:2] == (tagged, [])


def test_a_good_call_behind_a_broken_one_is_found(tokenizer: ByteTokenizer) -> None:
    reply = f"<|action_start|><|plugin|>oops<|action_end|>{CALL}"
    assert parse(InternLM2Format(tokenizer).parser(TOOLS), ids(tokenizer, reply))[2][0] == "oops"
    reply = f"<|action_start|><|plugin|>oops{CALL}"
    text, calls, _ = parse(InternLM2Format(tokenizer).parser(TOOLS), ids(tokenizer, reply))
    assert (text, [call.name for call in calls]) == ("oops", ["weather"])
    text, calls, _ = parse(ChatMLFormat(tokenizer).parser(TOOLS), ids(tokenizer, f"<tool_call>no</tool_call>{TAGGED}"))
    assert (text, [call.name for call in calls]) == ("<tool_call>no</tool_call>", ["weather"])


@pytest.mark.parametrize("end", ["", "<|im_end|>", "</s>"])
def test_a_whole_call_counts_without_its_end_token(tokenizer: ByteTokenizer, end: str) -> None:
    """Engines take the token that stopped them away: `<|action_end|>` is a stop word for LMDeploy's users."""
    reply = ids(tokenizer, f"Sure.{CALL.removesuffix('<|action_end|>')}{end}")
    text, calls, _ = parse(InternLM2Format(tokenizer).parser(TOOLS), reply)
    assert (text, [call.arguments for call in calls]) == ("Sure.", [ARGUMENTS])
    reply = ids(tokenizer, f"Sure.{TAGGED.removesuffix('</tool_call>')}{end}")
    text, calls, _ = parse(ChatMLFormat(tokenizer).parser(TOOLS), reply)
    assert (text, [call.arguments for call in calls]) == ("Sure.", [ARGUMENTS])


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("\n```python\nprint(1)\n```", "print(1)"),
        ("\n```python\nif a:\n    b\n\n```\n", "if a:\n    b\n"),
        ("```py\nx = '''```'''\ny\n```", "x = '''```'''\ny"),
        ("\n```\n1\n```", "1"),
        ("```python\nprint(1)", "print(1)"),
        ("\nprint(1)\n", "print(1)"),
    ],
)
def test_code_for_the_interpreter(tokenizer: ByteTokenizer, body: str, code: str) -> None:
    reply = ids(tokenizer, f"Run:<|action_start|><|interpreter|>{body}<|action_end|><|im_end|>")
    text, calls, _ = parse(InternLM2Format(tokenizer).parser(TOOLS), reply)
    assert text == "Run:"
    assert calls == [ToolCall(id="call_0", name="py", arguments=code, kind="interpreter")]


@pytest.mark.parametrize(
    ("body", "whole"),
    [
        ("\n```python\nprint(1)\n```", True),
        ("\n```python\nprint(", False),
        ("print(", False),
        ("```python\n```", False),
    ],
)
def test_cut_code_is_text(tokenizer: ByteTokenizer, body: str, whole: bool) -> None:
    reply = ids(tokenizer, f"<|action_start|><|interpreter|>{body}")
    text, calls, _ = parse(InternLM2Format(tokenizer).parser(TOOLS), reply)
    assert (text, len(calls)) == (("", 1) if whole else (body, 0))


def test_an_action_of_no_kind_is_text(tokenizer: ByteTokenizer) -> None:
    chat = InternLM2Format(tokenizer)
    reply = "a<|action_start|>b<|action_end|>c<|action_start|>"
    assert parse(chat.parser(TOOLS), ids(tokenizer, reply))[:2] == ("abc", [])
    assert parse(chat.parser(TOOLS, skip_special=False), ids(tokenizer, reply))[:2] == (reply, [])


def test_calls_are_only_looked_for_when_tools_were_given(tokenizer: ByteTokenizer) -> None:
    body = '\n{"name": "weather", "parameters": {"city": "上海"}}'
    assert parse(InternLM2Format(tokenizer).parser(), ids(tokenizer, CALL))[:2] == (body, [])
    assert parse(InternLM2Format(tokenizer).parser(skip_special=False), ids(tokenizer, CALL))[:2] == (CALL, [])
    assert parse(ChatMLFormat(tokenizer).parser(), ids(tokenizer, TAGGED))[:2] == (TAGGED, [])


def test_arguments_are_json_that_can_be_sent(tokenizer: ByteTokenizer) -> None:
    parser = ChatMLFormat(tokenizer).parser(TOOLS)
    reply = '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"é\\\\ud83d\\"}"}</tool_call>'
    [call] = parse(parser, ids(tokenizer, reply))[1]
    call.arguments.encode()
    assert json.loads(call.arguments) == {"a": "é\ud83d"}


def test_tagged_calls_and_the_text_around_them(tokenizer: ByteTokenizer) -> None:
    second = '<tool_call>[{"name": "py", "arguments": {"code": "1+1"}}, {"name": "c"}]</tool_call>'
    reply = ids(tokenizer, f"Let me see. <tool\n{TAGGED}\n\n{second}\n<|im_end|>")
    for parts in ([reply], [[token] for token in reply]):
        text, calls, order = parse(ChatMLFormat(tokenizer).parser(TOOLS), *parts)
        assert text == order[0] == "Let me see. <tool\n"
        assert calls == [
            ToolCall(id="call_0", name="weather", arguments=ARGUMENTS),
            ToolCall(id="call_1", name="py", arguments="1+1", kind="interpreter"),
            ToolCall(id="call_2", name="c", arguments="{}"),
        ]


def test_text_that_cannot_be_a_tag_is_not_held_back(tokenizer: ByteTokenizer) -> None:
    parser = ChatMLFormat(tokenizer).parser(TOOLS)
    assert [event.text for event in parser.push(ids(tokenizer, "a <b"))] == ["a <b"]
    assert [event.text for event in parser.push(ids(tokenizer, "c <tool_"))] == ["c "]
    assert [event.text for event in parser.push(ids(tokenizer, "box>"))] == ["<tool_box>"]
    assert parser.push(ids(tokenizer, "<tool_c")) == []
    assert [event.text for event in parser.finish()] == ["<tool_c"]


@pytest.mark.parametrize("skip", [True, False])
def test_tags_that_are_special_tokens(skip: bool) -> None:
    tokenizer = ByteTokenizer((*INTERNLM2_TOKENS, "<tool_call>", "</tool_call>"))
    text, calls, _ = parse(ChatMLFormat(tokenizer).parser(TOOLS, skip_special=skip), ids(tokenizer, f"a{TAGGED}"))
    assert (text, [call.arguments for call in calls]) == ("a", [ARGUMENTS])


def test_a_reply_that_is_rendered_again_is_the_same(tokenizer: ByteTokenizer) -> None:
    code = "<|action_start|><|interpreter|>\n```python\nx = 1\nprint(x)\n```<|action_end|>"
    for chat, written in (
        (InternLM2Format(tokenizer), f"Sure.{CALL}{code}"),
        (ChatMLFormat(tokenizer), f"Sure.\n{TAGGED}"),
    ):
        reply = ids(tokenizer, f"{written}<|im_end|>")
        text, calls, _ = parse(chat.parser(TOOLS), reply)
        turn = Message(role="assistant", content=text.rstrip(), tool_calls=tuple(calls))
        rendered = chat.render([turn], generation_prompt=False)
        assert [t for t, weight in zip(rendered.ids, rendered.weights, strict=True) if weight] == reply

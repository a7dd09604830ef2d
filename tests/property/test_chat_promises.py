"""What holds for every conversation and reply: no forged roles, no lost text, no dependence on how ids were split."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_samples import INTERNLM2_TOKENS, ByteTokenizer, parse
from hanlin.chat.chatml import ChatMLFormat
from hanlin.chat.internlm import InternLMFormat
from hanlin.chat.internlm2 import InternLM2Format
from hanlin.chat.raw import RawFormat
from hanlin.chat.sandbox import Sandbox
from hanlin.chat.template import TemplateFormat
from hanlin.errors import ChatFormatError
from hanlin.types import ChatFormat, Message, Tool, ToolCall

TAGS = ("<tool_call>", "</tool_call>")
TOKENIZER = ByteTokenizer((*INTERNLM2_TOKENS, "<eoh>", "<eoa>"))
TAGGED = ByteTokenizer((*INTERNLM2_TOKENS, *TAGS))
THINKING = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% set c = m.content %}"
    "{% if '</think>' in c %}{% set c = c.split('</think>')[-1] | trim %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ c }}{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMING = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Pieces that meet in nasty ways: special tokens, halves of them, tags, JSON, blanks, characters of several bytes.
PIECES = [*INTERNLM2_TOKENS, "<s>", "</s>", "<eoa>", "<|im_", "end|>", "<|", "|>", *TAGS, "<tool_", "call>", "</think>"]
PIECES += [
    "\n",
    "\n\n",
    " ",
    "a",
    "你好",
    "👋",
    '"',
    "\\",
    "```python\n",
    "\n```",
    "\U000f0000",
    "\U00100000",
    "{",
    "[",
    "}",
]
PIECES += [
    '{"name": "f", "parameters": {"a": "é"}}',
    '[{"name": "g"}, {"name": "h", "arguments": "{}"}]',
    '{"name": 1}',
]
TEXT = (
    st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=8)
    .map("".join)
    .filter(lambda text: ("\ufffd" not in text and text.isprintable) or text.encode("utf-8", "ignore").decode() == text)
)
WORDS = st.text(alphabet=string.ascii_letters + "<|>_ /", min_size=1, max_size=8).map(lambda word: f"n{word}")
ARGUMENTS = st.dictionaries(TEXT, TEXT | st.integers() | st.none() | st.lists(TEXT, max_size=2), max_size=3)
CALL = st.builds(lambda name, arguments: ToolCall(name=name, arguments=json.dumps(arguments)), WORDS, ARGUMENTS)
PLAIN_TURN = st.builds(
    lambda role, content: Message(role=role, content=content), st.sampled_from(["system", "user", "assistant"]), TEXT
)
TURN = PLAIN_TURN | st.builds(
    lambda content, calls: Message(role="assistant", content=content, tool_calls=tuple(calls)),
    TEXT,
    st.lists(CALL, max_size=2),
)
TURN |= st.builds(lambda content: Message(role="tool", content=content), TEXT)
CONVERSATION = st.lists(TURN, max_size=5)
TOOL = st.builds(
    lambda name, about: Tool(name=name, description=about, parameters={"properties": {about: {}}}), WORDS, TEXT
)

FORMATS: dict[str, ChatFormat] = {
    "internlm2": InternLM2Format(TOKENIZER),
    "chatml": ChatMLFormat(TOKENIZER, template_system="S", bos=True),
    "thinking template": TemplateFormat(TOKENIZER, THINKING),
    "trimming template": TemplateFormat(TOKENIZER, TRIMMING),
}


def specials(ids: tuple[int, ...]) -> list[int]:
    return [token for token in ids if token in TOKENIZER.special_ids]


def quiet(turns: list[Message]) -> list[Message]:
    """The same conversation with one harmless word everywhere."""
    return [
        Message(
            role=turn.role,
            content="x" if turn.content.strip() else turn.content,
            tool_calls=tuple(ToolCall(name="n", arguments="{}") for _ in turn.tool_calls),
        )
        for turn in turns
    ]


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None, max_examples=100)
@given(turns=CONVERSATION, tools=st.lists(TOOL, max_size=2), prompted=st.booleans())
def test_no_message_makes_a_special_token(name: str, turns: list[Message], tools: list[Tool], prompted: bool) -> None:
    chat = FORMATS[name]
    try:
        rendered = chat.render(turns, tools, generation_prompt=prompted)
    except ChatFormatError as error:
        # A template that looks into messages may be unable to say what is whose; then it must refuse.
        assert name == "thinking template" and "</think>" in "".join(turn.content for turn in turns), error
        return
    harmless = [Tool(name="n", description="x", parameters={"properties": {"x": {}}}) for _ in tools]
    expected = chat.render(quiet(turns), harmless, generation_prompt=prompted)
    assert specials(rendered.ids) == specials(expected.ids)
    assert len(rendered.ids) == len(rendered.weights)
    assert set(rendered.weights) <= {0.0, 1.0}


@settings(deadline=None, max_examples=100)
@given(turns=st.lists(PLAIN_TURN, max_size=5), prompted=st.booleans())
def test_internlm_and_raw_are_safe_too(turns: list[Message], prompted: bool) -> None:
    early, late = InternLMFormat(TOKENIZER, early=True), InternLMFormat(TOKENIZER)
    for chat in (early, late):
        rendered = chat.render(turns, generation_prompt=prompted)
        assert specials(rendered.ids) == specials(chat.render(quiet(turns), generation_prompt=prompted).ids)
    for turn in turns:
        rendered = RawFormat(TOKENIZER).render([Message(role="user", content=turn.content)])
        assert specials(rendered.ids) == [TOKENIZER.bos_id]
        assert TOKENIZER.decode(rendered.ids) == turn.content


@settings(deadline=None, max_examples=200)
@given(turns=st.lists(PLAIN_TURN, min_size=1, max_size=5))
def test_internlm2_writes_what_the_template_prints(turns: list[Message]) -> None:
    rendered = InternLM2Format(TOKENIZER).render(turns, generation_prompt=False)
    printed = "<s>" + "".join(f"<|im_start|>{turn.role}\n{turn.content}<|im_end|>\n" for turn in turns)
    assert TOKENIZER.decode(rendered.ids, skip_special=False) == printed
    assert rendered.ids.count(TOKENIZER.bos_id) == 1


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None, max_examples=100)
@given(turns=st.lists(PLAIN_TURN, max_size=4), reply=TEXT.filter(str.strip))
def test_a_reply_begins_where_the_prompt_ends(name: str, turns: list[Message], reply: str) -> None:
    """Training and generating see the same ids: prompt + reply = the conversation with the reply left open."""
    chat = FORMATS[name]
    reply = reply.strip()
    if "</think>" in reply + "".join(turn.content for turn in turns):
        return
    prompt = chat.render([*turns, Message(role="user", content="q")])
    whole = chat.render([*turns, Message(role="user", content="q"), Message(role="assistant", content=reply)])
    assert whole.ids[: len(prompt.ids)] == prompt.ids
    assert TOKENIZER.decode(whole.ids[len(prompt.ids) :], skip_special=False) == reply
    assert set(whole.weights[len(prompt.ids) :]) == {1.0}
    assert whole.weights[: len(prompt.ids)] == prompt.weights


REPLY = st.lists(
    st.sampled_from(PIECES).map(lambda piece: TAGGED.encode(piece, parse_special=True))
    | TEXT.map(TAGGED.encode)
    | st.lists(st.integers(0, TAGGED.vocab_size - 1), max_size=3),
    max_size=12,
).map(lambda parts: [token for part in parts for token in part])
TOOLS = (Tool(name="f"), Tool(name="py", kind="interpreter"))


@pytest.mark.parametrize("make", [InternLM2Format, ChatMLFormat])
@settings(deadline=None, max_examples=200)
@given(data=st.data(), reply=REPLY, tools=st.sampled_from([(), TOOLS]), skip=st.booleans())
def test_the_split_of_a_reply_does_not_matter(
    make: type[InternLM2Format | ChatMLFormat],
    data: st.DataObject,
    reply: list[int],
    tools: tuple[Tool, ...],
    skip: bool,
) -> None:
    chat = make(TAGGED)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(reply)), max_size=6)))
    parts = [reply[start:end] for start, end in zip([0, *cuts], [*cuts, len(reply)], strict=True)]
    text, calls, order = parse(chat.parser(tools, skip_special=skip), *parts)
    assert (text, calls, order) == parse(chat.parser(tools, skip_special=skip), reply)
    assert (text, calls, order) == parse(chat.parser(tools, skip_special=skip), *([token] for token in reply))
    assert [call.id for call in calls] == [f"call_{number}" for number in range(len(calls))]
    if not calls:  # nothing is lost
        kept = [token for token in reply if token not in chat.stop_ids]
        if make is InternLM2Format or not tools:
            bare = text if skip else "".join(text.split())
            shown = TAGGED.decode(kept, skip_special=skip)
            assert sorted(bare.replace("\ufffd", "")) == sorted(
                (shown if skip else "".join(shown.split())).replace("\ufffd", "")
            )


@settings(deadline=None, max_examples=200)
@given(before=st.text(alphabet="abc 你\n", max_size=6), calls=st.lists(CALL, min_size=1, max_size=3))
def test_calls_survive_being_written_and_read(before: str, calls: list[ToolCall]) -> None:
    for chat in (InternLM2Format(TOKENIZER), ChatMLFormat(TOKENIZER)):
        turn = Message(role="assistant", content=before, tool_calls=tuple(calls))
        rendered = chat.render([turn], generation_prompt=False)
        written = [token for token, weight in zip(rendered.ids, rendered.weights, strict=True) if weight]
        if isinstance(chat, ChatMLFormat) and any(tag in call.name + call.arguments for call in calls for tag in TAGS):
            continue  # an argument that spells the end tag ends the call: the text protocol cannot say it
        text, found, _ = parse(chat.parser(TOOLS), written)
        assert text.strip() == before.strip()
        assert [call.name for call in found] == [call.name for call in calls]
        assert [json.loads(call.arguments) for call in found] == [json.loads(call.arguments) for call in calls]


SNIPPETS = [
    "{{ ",
    " }}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if ",
    " %}",
    "{% endif %}",
    "m.content",
    "messages",
]
SNIPPETS += [
    " | trim",
    " | tojson",
    " * 9",
    " ** 9",
    " ~ ",
    " + ",
    "'a'",
    "[",
    "]",
    "(",
    ")",
    "{% set x = ",
    "x",
    "9",
    " in ",
]
SNIPPETS += [
    "{% macro f(x) %}",
    "{% endmacro %}",
    "f(x)",
    ".split('a')",
    "[1:]",
    "namespace(x=1)",
    "range(99)",
    ".x",
    "loop.index",
]


@settings(deadline=None, max_examples=200)
@given(template=st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=4), max_size=25).map("".join))
def test_any_template_prints_or_raises_ours(template: str) -> None:
    messages = [{"role": "user", "content": "a"}] * 3
    try:
        Sandbox(template, cpu_seconds=0.5, budget=1 << 16).render({"messages": messages}, 30)
    except ChatFormatError as error:
        assert len(str(error)) < 2000

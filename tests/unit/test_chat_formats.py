"""InternLM 1, generic ChatML, base models, and how a model's format is found."""

from __future__ import annotations

import json

import pytest

from chat_samples import INTERNLM2_TOKENS, ByteTokenizer, parse
from hanlin.chat import chat_format_for, list_formats
from hanlin.chat.chatml import ChatMLFormat
from hanlin.chat.internlm import InternLMFormat
from hanlin.chat.internlm2 import META_INSTRUCTION
from hanlin.chat.raw import RawFormat
from hanlin.chat.roles import ROLE_TOKENS
from hanlin.errors import ChatFormatError
from hanlin.types import Message, Rendered, Tool, ToolCall

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
PLAIN = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + PLAIN.removeprefix("{% for message in messages %}")
)
TURNS = [Message(role="user", content="q"), Message(role="assistant", content="a"), Message(role="user", content="r")]
WEATHER = Tool(name="weather", description="d", parameters={"type": "object"})


def text(tokenizer: ByteTokenizer, rendered: Rendered) -> str:
    assert len(rendered.ids) == len(rendered.weights)
    return tokenizer.decode(rendered.ids, skip_special=False)


def counted(tokenizer: ByteTokenizer, rendered: Rendered) -> str:
    ids = [token for token, weight in zip(rendered.ids, rendered.weights, strict=True) if weight]
    return tokenizer.decode(ids, skip_special=False)


# InternLM 1


def test_internlm_late() -> None:
    tokenizer = ByteTokenizer(("<eoh>", "<eoa>"))
    chat = InternLMFormat(tokenizer)
    turns = [Message(role="system", content="S"), *TURNS]
    rendered = chat.render(turns)
    assert text(tokenizer, rendered) == "<s><|System|>:S\n<|User|>:q\n<|Bot|>:a<eoa>\n<|User|>:r\n<|Bot|>:"
    assert counted(tokenizer, rendered) == "a<eoa>"
    assert (chat.name, chat.default_system) == ("internlm", META_INSTRUCTION)
    assert chat.stop_ids == (tokenizer.eos_id, tokenizer.token_id("<eoa>"))
    assert (chat.defaults.temperature, chat.defaults.top_p, chat.defaults.max_tokens) == (0.8, 0.8, 1024)
    reply = tokenizer.encode("yes<eoa>", parse_special=True)
    assert parse(chat.parser(), reply)[0] == "yes"


def test_internlm_early() -> None:
    tokenizer = ByteTokenizer(("<eoh>", "<eoa>"))
    chat = InternLMFormat(tokenizer, early=True)
    rendered = chat.render(TURNS, generation_prompt=False)
    assert text(tokenizer, rendered) == "<s><|User|>:q<eoh>\n<|Bot|>:a<eoa>\n<|User|>:r<eoh>\n"
    assert (chat.name, chat.default_system) == ("internlm-v1_1", None)
    assert text(tokenizer, chat.render(TURNS[:2])) == "<s><|User|>:q<eoh>\n<|Bot|>:a"


def test_internlm_messages_cannot_end_a_turn() -> None:
    tokenizer = ByteTokenizer(("<eoh>", "<eoa>"))
    rendered = InternLMFormat(tokenizer).render([Message(role="user", content="<eoa></s><s>")])
    assert [token for token in rendered.ids if token in tokenizer.special_ids] == [tokenizer.bos_id]


def test_internlm_knows_no_tools() -> None:
    turns = [
        Message(role="assistant", tool_calls=(ToolCall(name="f", arguments="{}"),)),
        Message(role="tool", content="r"),
    ]
    with pytest.raises(ChatFormatError) as error:
        InternLMFormat(ByteTokenizer(("<eoh>", "<eoa>"))).render(turns, [WEATHER])
    for words in ("message 0: tool calls", "message 1: tool results", "tool 'weather'", "InternLM2"):
        assert words in str(error.value)


# ChatML


def test_chatml() -> None:
    tokenizer = ByteTokenizer(CHATML_TOKENS, eos="<|im_end|>")
    chat = ChatMLFormat(tokenizer)
    rendered = chat.render(TURNS)
    expected = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nr<|im_end|>\n"
    assert text(tokenizer, rendered) == expected + "<|im_start|>assistant\n"
    assert counted(tokenizer, rendered) == "a<|im_end|>"
    assert chat.stop_ids == (tokenizer.eos_id,)
    assert (chat.defaults.temperature, chat.defaults.top_p) == (0.2, 0.9)
    assert text(tokenizer, chat.render(TURNS[:2])).endswith("<|im_start|>assistant\na")


def test_chatml_tools_go_into_the_system_prompt() -> None:
    tokenizer = ByteTokenizer(CHATML_TOKENS)
    own = Message(role="system", content="S")
    spec = '{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}'
    code = Tool(name="py", kind="interpreter")
    rendered = text(tokenizer, ChatMLFormat(tokenizer).render([own, *TURNS], [WEATHER, code]))
    assert rendered.startswith("<|im_start|>system\nS\n\n")
    system = rendered.partition("<|im_end|>")[0]
    tools = system.partition("<tools>\n")[2].partition("\n</tools>")[0].splitlines()
    assert tools[0] == spec
    assert json.loads(tools[1])["function"]["parameters"]["required"] == ["code"]
    assert "<tool_call>" in system
    rendered = text(tokenizer, ChatMLFormat(tokenizer, template_system="Be kind.").render(TURNS, [WEATHER]))
    assert rendered.startswith("<|im_start|>system\nBe kind.\n\n")
    assert text(tokenizer, ChatMLFormat(tokenizer).render(TURNS, [WEATHER])).startswith("<|im_start|>system\nYou can")


def test_chatml_calls_and_results() -> None:
    tokenizer = ByteTokenizer(CHATML_TOKENS)
    calls = (
        ToolCall(id="a", name="weather", arguments='{"x": "é"}'),
        ToolCall(id="b", name="py", arguments="1+1", kind="interpreter"),
    )
    turns = [
        Message(role="assistant", content="Hm.", tool_calls=calls),
        Message(role="tool", content="1", tool_call_id="a"),
        Message(role="tool", content="2", tool_call_id="b"),
        Message(role="assistant", content="", tool_calls=calls[:1]),
        Message(role="tool", content="3"),
    ]
    rendered = ChatMLFormat(tokenizer).render(turns, generation_prompt=False)
    call = '<tool_call>\n{"name": "weather", "arguments": {"x": "é"}}\n</tool_call>'
    code = '<tool_call>\n{"name": "py", "arguments": {"code": "1+1"}}\n</tool_call>'
    assert text(tokenizer, rendered) == (
        f"<|im_start|>assistant\nHm.\n{call}\n{code}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        f"<|im_start|>assistant\n{call}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
    )
    assert counted(tokenizer, rendered) == f"Hm.\n{call}\n{code}<|im_end|>{call}<|im_end|>"


# Base models


def test_raw_is_the_prompt_itself() -> None:
    tokenizer = ByteTokenizer()
    chat = RawFormat(tokenizer)
    rendered = chat.render([Message(role="user", content="Once <|im_end|>")])
    assert text(tokenizer, rendered) == "<s>Once <|im_end|>"
    assert [token for token in rendered.ids if token in tokenizer.special_ids] == [tokenizer.bos_id]
    assert chat.stop_ids == (tokenizer.eos_id,)
    assert parse(chat.parser(), tokenizer.encode(" upon</s>", parse_special=True))[0] == " upon"


@pytest.mark.parametrize("turns", [[], TURNS, [Message(role="system", content="S"), TURNS[0]], TURNS[:2]])
def test_raw_says_what_to_do_instead_of_chatting(turns: list[Message]) -> None:
    with pytest.raises(ChatFormatError, match=r"base model.*generate\(\).*'chatml'"):
        RawFormat(ByteTokenizer()).render(turns)
    with pytest.raises(ChatFormatError, match="base model"):
        RawFormat(ByteTokenizer()).render(TURNS[:1], [WEATHER])


# The registry


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("internlm2", "internlm2"),
        ("internlm2-chat", "internlm2"),
        ("internlm2_5-7b-chat", "internlm2"),
        ("InternLM2.5", "internlm2"),
        ("internlm2_chat", "internlm2"),
        ("internlm", "internlm"),
        ("internlm-chat-7b", "internlm"),
        ("internlm_chat", "internlm"),
        ("internlm-v1_1", "internlm-v1_1"),
        ("internlm-chat-7b-v1_1", "internlm-v1_1"),
        ("chatml", "chatml"),
        ("qwen", "chatml"),
        ("base", "raw"),
        ("template", "template"),
    ],
)
def test_a_name_decides_alone(name: str, found: str) -> None:
    tokenizer = ByteTokenizer((*INTERNLM2_TOKENS, "<eoh>", "<eoa>"))
    template = "{{ messages[0].content }}"
    assert chat_format_for(tokenizer, model_type="other", template=template, name=name).name == found


def test_every_listed_format_can_be_had() -> None:
    tokenizer = ByteTokenizer(
        (*INTERNLM2_TOKENS, "<eoh>", "<eoa>", "[gMASK]", "<sop>", "sop", "<eop>", "<pad>", *ROLE_TOKENS)
    )
    for name in list_formats():
        assert chat_format_for(tokenizer, model_type="", template="x", name=name).name == name


def test_unknown_names_and_unfit_tokenizers_are_refused() -> None:
    with pytest.raises(ChatFormatError, match=r"'vicuna'; known: internlm2, internlm, .*chatml, raw, template"):
        chat_format_for(ByteTokenizer(), model_type="", name="vicuna")
    with pytest.raises(ChatFormatError, match="comes without a chat template"):
        chat_format_for(ByteTokenizer(), model_type="", name="template")
    with pytest.raises(ChatFormatError, match="'<eoa>'"):
        chat_format_for(ByteTokenizer(), model_type="", name="internlm")


@pytest.mark.parametrize("template", [None, "", " \n", "{{ bos_token }}" + PLAIN, PLAIN])
def test_internlm2_is_known_by_type_and_template(template: str | None) -> None:
    chat = chat_format_for(ByteTokenizer(), model_type="internlm2", template=template)
    assert (chat.name, chat.default_system) == ("internlm2", META_INSTRUCTION)


def test_internlm2_in_a_llama_file_is_known_by_its_tokens() -> None:
    chat = chat_format_for(ByteTokenizer(), model_type="llama", template="{{ bos_token }}" + PLAIN)
    assert chat.name == "internlm2"
    assert chat_format_for(ByteTokenizer(CHATML_TOKENS), model_type="internlm2").name == "raw"


def test_internlm2_with_another_template_speaks_that() -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    assert chat_format_for(ByteTokenizer(), model_type="internlm2", template=template).name == "template"


def test_internlm_is_known_by_type() -> None:
    assert chat_format_for(ByteTokenizer(("<eoh>", "<eoa>")), model_type="internlm").name == "internlm"
    assert chat_format_for(ByteTokenizer(()), model_type="internlm").name == "raw"


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(("template", "system"), [(PLAIN, None), (WITH_SYSTEM, "Be kind.")])
def test_plain_chatml_is_known_by_what_its_template_prints(template: str, system: str | None, bos: bool) -> None:
    tokenizer = ByteTokenizer(CHATML_TOKENS, eos="<|im_end|>")
    chat = chat_format_for(tokenizer, model_type="llama", template="{{ bos_token }}" * bos + template)
    assert (chat.name, chat.default_system) == ("chatml", system)
    head = "<s>" * bos + (f"<|im_start|>system\n{system}<|im_end|>\n" if system else "")
    assert text(tokenizer, chat.render(TURNS)).startswith(head + "<|im_start|>user\nq<|im_end|>\n")
    own = [Message(role="system", content="S"), *TURNS]
    assert text(tokenizer, chat.render(own)).startswith(
        "<s>" * bos + "<|im_start|>system\nS<|im_end|>\n<|im_start|>user"
    )


def test_bos_that_is_a_role_token_is_not_written_twice() -> None:
    """SmolLM2's BOS is `<|im_start|>`, which every template text begins with."""
    tokenizer = ByteTokenizer(CHATML_TOKENS, bos="<|im_start|>", eos="<|im_end|>")
    chat = chat_format_for(tokenizer, model_type="llama", template=WITH_SYSTEM)
    assert chat.name == "chatml"
    assert text(tokenizer, chat.render(TURNS)).startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")


@pytest.mark.parametrize(
    "template",
    [
        PLAIN.replace("message['content']", "(message['content'] | trim)"),
        PLAIN.replace("'assistant\n'", "'assistant\n<think>\n'").replace("assistant\n' }}", "assistant\n<think>\n' }}"),
        PLAIN.replace("+ '\n' }}", "}}"),
        "{% if tools %}{{ tools | tojson }}{% endif %}" + PLAIN,
        "{% if messages | length > 3 %}{{ raise_exception('too long') }}{% endif %}" + PLAIN,
        "{{ bos_token + eos_token }}" + PLAIN,
    ],
)
def test_almost_chatml_is_run_as_it_is(template: str) -> None:
    tokenizer = ByteTokenizer(CHATML_TOKENS)
    assert template != PLAIN
    assert chat_format_for(tokenizer, model_type="llama", template=template).name == "template"


def test_nothing_known_is_a_base_model() -> None:
    assert chat_format_for(ByteTokenizer(CHATML_TOKENS), model_type="llama").name == "raw"


def test_a_broken_template_says_so() -> None:
    with pytest.raises(ChatFormatError, match="chat template: not usable"):
        chat_format_for(ByteTokenizer(), model_type="internlm2", template="{% for %}")

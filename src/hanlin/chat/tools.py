"""Tools for models whose format has no place for them: a JSON protocol in the system prompt.

The protocol, as Hermes, Qwen and SmolLM2 are trained on it. The system prompt ends with a description of the tools:

    <tools>
    {"type": "function", "function": {"name": ..., "description": ..., "parameters": {JSON schema}}}
    </tools>

The assistant calls with `<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>`, one block a call, after any
text. Results come back in a user turn, one `<tool_response>\\n...\\n</tool_response>` each. An interpreter is a
function whose one argument is `code`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hanlin.chat.reply import CLOSE, OPEN, arguments_object
from hanlin.errors import ChatFormatError
from hanlin.types import Message, Tokenizer, Tool, ToolCall

__all__ = ["call_arguments", "call_schema", "interpreter_names", "plain_messages", "tagged_grammar", "tool_spec"]

_CLOSED = {"additionalProperties": False}
CODE_SCHEMA = {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}


def plain_messages(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """The same conversation in system, user and assistant turns of text alone.

    Raises:
        ChatFormatError: a call whose arguments are not a JSON object.
    """
    turns: list[Message] = []
    results: list[str] = []
    for message in messages:
        if message.role == "tool":
            results.append(f"<tool_response>\n{message.content}\n</tool_response>")
            continue
        if results:
            turns.append(Message(role="user", content="\n".join(results)))
            results = []
        if message.tool_calls:
            blocks = [f"{OPEN}\n{_call_json(call)}\n{CLOSE}" for call in message.tool_calls]
            content = "\n".join([message.content, *blocks] if message.content else blocks)
            message = replace(message, content=content, tool_calls=())
        turns.append(message)
    if results:
        turns.append(Message(role="user", content="\n".join(results)))
    if tools:
        prompt = _prompt(tools)
        if turns and turns[0].role == "system":
            turns[0] = replace(turns[0], content=f"{turns[0].content}\n\n{prompt}" if turns[0].content else prompt)
        else:
            turns.insert(0, Message(role="system", content=prompt))
    return turns


def interpreter_names(tools: Sequence[Tool]) -> frozenset[str]:
    return frozenset(tool.name for tool in tools if tool.kind == "interpreter")


def call_arguments(call: ToolCall) -> dict[str, Any]:
    """A call's arguments as an object.

    Raises:
        ChatFormatError: when they are not JSON of one.
    """
    if call.kind == "interpreter":
        return {"code": call.arguments}
    arguments = arguments_object(call.arguments)
    if arguments is None:
        raise ChatFormatError(f"tool call {call.name!r}: arguments must be a JSON object, not {call.arguments[:80]!r}")
    return arguments


def tagged_grammar(tokenizer: Tokenizer, tools: Sequence[Tool], names: Sequence[str], *, parallel: bool) -> str:
    """See `GuidesCalls.tool_grammar`, for the protocol above. Tags that are special tokens are written as such."""
    tags = []
    for tag in (OPEN, CLOSE):
        token = tokenizer.token_id(tag)
        tags.append(f"<[{token}]>" if token in tokenizer.special_ids else json.dumps(tag))
    start = r'call ("\n" call)*' if parallel else "call"
    schema = call_schema([tool for tool in tools if tool.name in names], "arguments")
    return f"start: {start}\n" + rf'call: {tags[0]} "\n" body "\n" {tags[1]}' + f"\nbody: %json {schema}\n"


def call_schema(tools: Sequence[Tool], arguments: str) -> str:
    """JSON text of a schema of `{"name": ..., <arguments>: {...}}`, a call of one of the tools, spaced as usual."""
    definitions, calls = {}, []
    for index, tool in enumerate(tools):
        place = f"#/$defs/{index}"
        spec = tool_spec(tool)["parameters"] or {"properties": {}, "additionalProperties": False}
        definitions[str(index)] = {"type": "object", **_moved(spec, place)}
        properties = {"name": {"const": tool.name}, arguments: {"$ref": place}}
        calls.append({"type": "object", "properties": properties, "required": list(properties), **_CLOSED})
    spacing = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return json.dumps({"x-guidance": spacing, "anyOf": calls, "$defs": definitions}, ensure_ascii=False)


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references into itself still hold when it stands at `place` of another."""
    if isinstance(schema, Mapping):
        moved = {key: _moved(value, place) for key, value in schema.items()}
        reference = moved.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            moved["$ref"] = place + reference[1:]
        return moved
    return [_moved(value, place) for value in schema] if isinstance(schema, (list, tuple)) else schema


def tool_spec(tool: Tool) -> dict[str, Any]:
    """A tool as a function with a JSON schema."""
    interpreter = tool.kind == "interpreter" and not tool.parameters
    description = tool.description or ("Run Python code in a stateful environment." if interpreter else "")
    parameters = CODE_SCHEMA if interpreter else dict(tool.parameters)
    return {"name": tool.name, "description": description, "parameters": parameters}


def _call_json(call: ToolCall) -> str:
    return json.dumps({"name": call.name, "arguments": call_arguments(call)}, ensure_ascii=False)


def _prompt(tools: Sequence[Tool]) -> str:
    specs = [json.dumps({"type": "function", "function": tool_spec(tool)}, ensure_ascii=False) for tool in tools]
    return "\n".join(
        [
            "You can call the functions below. They are given as JSON, one a line:",
            "<tools>",
            *specs,
            "</tools>",
            "To call one, write a JSON object with its name and arguments between tags, once for each call:",
            OPEN,
            '{"name": "function name", "arguments": {"argument name": "value"}}',
            CLOSE,
            "Each result comes back between <tool_response> tags.",
        ]
    )

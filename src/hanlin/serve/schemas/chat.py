"""What /v1/chat/completions takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from hanlin import images
from hanlin.errors import RequestError, problems
from hanlin.serve.errors import ApiError
from hanlin.serve.schemas.sampling import Body, SamplingBody
from hanlin.types import Message, Tool, ToolCall

__all__ = ["ChatBody", "ChatMessage", "FunctionCall", "Part", "call_of", "chosen", "images_of", "read_tools", "text_of"]

_ROLES = {"developer": "system", "function": "tool", "environment": "tool", "observation": "tool"}
_MOST_TOOLS = 256
_IMAGES = ("image_url", "input_image")


class Part(Body):
    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | dict[str, Any] | None = None
    detail: Any = None


class FunctionCall(Body):
    name: str
    arguments: str | dict[str, Any] | None = None


class MessageToolCall(Body):
    id: str | None = None
    type: str | None = "function"
    function: FunctionCall


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function", "environment", "observation"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None


class ChatBody(SamplingBody):
    """Fields without effect here (`metadata`, `store`, `service_tier`...) are taken, and have none."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=_MOST_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[dict[str, Any]], Field(max_length=_MOST_TOOLS)] | None = None
    function_call: str | dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    verbosity: Any = None
    reasoning_effort: Any = None
    chat_template_kwargs: Any = None

    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    chat_template: Any = None
    documents: Any = None
    echo: bool | None = None

    refused: ClassVar[dict[str, str]] = {
        **SamplingBody.refused,
        "audio": "this model writes text",
        "prediction": "guessing ahead needs no help, and never changes the answer",
        "web_search_options": "this server does not search; give a function for it in tools",
        "chat_template": "requests cannot bring templates; the model's own format is used",
        "documents": "put them into a message",
        "echo": "the reply never repeats the messages",
    }

    @property
    def legacy(self) -> bool:
        """Whether the request speaks of functions, as before there were tools."""
        return bool(self.functions) and not self.tools

    def check(self) -> None:
        super().check()
        if set(self.modalities or ["text"]) != {"text"}:
            raise ApiError(400, "modalities: this model writes text only", param="modalities")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise ApiError(
                    400,
                    "continue_final_message and add_generation_prompt exclude each other",
                    param="continue_final_message",
                )
            if self.messages[-1].role != "assistant":
                raise ApiError(
                    400,
                    f"continue_final_message needs a last message of the assistant, not of role "
                    f"{self.messages[-1].role!r}",
                    param="continue_final_message",
                )

    def overrides(self) -> dict[str, Any]:
        """Fields of `SamplingParams` that the request gives."""
        values = self.sampling()
        if self.max_completion_tokens is not None:
            values["max_tokens"] = self.max_completion_tokens
        if self.logprobs:
            values["logprobs"] = self.top_logprobs or 0
        return values

    def offered(self) -> tuple[tuple[Tool, ...], Any]:
        """The tools, and which of them must be called, as a `tool_choice`.

        Raises:
            ApiError, RequestError: tools that are not here, or cannot be.
        """
        if self.legacy:
            tools = read_tools([{"type": "function", "function": f} for f in self.functions or ()], "functions")
        else:
            tools = read_tools(self.tools or (), "tools")
        return chosen(tools, self.function_call if self.legacy and self.tool_choice is None else self.tool_choice)

    def conversation(self, tools: tuple[Tool, ...]) -> list[Message]:
        """Raises:
        ApiError: naming every part that is neither text nor an image.
        """
        interpreters = {tool.name for tool in tools if tool.kind == "interpreter"}
        found: list[str] = []
        messages = [_message(message, f"messages.{i}", interpreters, found) for i, message in enumerate(self.messages)]
        if found:
            raise ApiError(400, problems("messages", found[:20]), code="invalid_value", param="messages")
        return messages


def read_tools(values: Any, param: str) -> tuple[Tool, ...]:
    """Tools of a request.

    Raises:
        ApiError, RequestError: what cannot be.
    """
    for value in values:
        kind = value.get("type", "function")
        if kind not in ("function", "interpreter", "code_interpreter"):
            raise ApiError(400, f"tools of type {str(kind)[:40]!r} are not here: give functions", param=param)
    tools = tuple(Tool.parse(value) for value in values)
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise ApiError(400, "two tools have the same name", param=param)
    return tools


def chosen(tools: tuple[Tool, ...], choice: Any) -> tuple[tuple[Tool, ...], Any]:
    """Tools and choice, with `allowed_tools` (some of the tools, and a choice among them) resolved."""
    if not isinstance(choice, Mapping) or choice.get("type") != "allowed_tools":
        return tools, choice
    inner = choice.get("allowed_tools", choice)  # as in chat completions, or as in responses
    listed = inner.get("tools") if isinstance(inner, Mapping) else None
    mode = inner.get("mode") if isinstance(inner, Mapping) else None
    names = set()
    for each in listed if isinstance(listed, list) else ():
        named = each.get("function", each) if isinstance(each, Mapping) else None
        names.add(str(named.get("name")) if isinstance(named, Mapping) else "")
    known = {tool.name for tool in tools}
    if not names or not names <= known or mode not in ("auto", "required"):
        raise ApiError(
            400,
            "allowed_tools needs a mode, 'auto' or 'required', and some of the tools by name "
            f"({', '.join(sorted(known)) or 'there are none'})",
            param="tool_choice",
        )
    return tuple(tool for tool in tools if tool.name in names), mode


def _message(message: ChatMessage, where: str, interpreters: set[str], found: list[str]) -> Message:
    calls = [call_of(call.function, call.id or "", interpreters) for call in message.tool_calls or ()]
    if message.function_call is not None and not calls:
        calls = [call_of(message.function_call, "", interpreters)]
    return Message(
        role=_ROLES.get(message.role, message.role),
        content=text_of(message.content, where, found),
        name=message.name or None,
        tool_calls=tuple(calls),
        tool_call_id=message.tool_call_id,
        images=images_of(message.content, where, found),
    )


def text_of(content: str | list[Part] | None, where: str, found: list[str]) -> str:
    """The text of a content; what is wrong with its parts is added to `found`, but for images, see `images_of`."""
    if not isinstance(content, list):
        return content or ""
    texts = []
    for index, part in enumerate(content):
        if part.type in _IMAGES:
            continue
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in ("text", "input_text", "output_text", "refusal"):
            found.append(
                f"{where}.content.{index}: parts of type {part.type[:40]!r} cannot be read, only text and images"
            )
        elif text is None:
            found.append(f"{where}.content.{index}: a part of type {part.type!r} needs its text")
        texts.append(text or "")
    return "".join(texts)


def images_of(content: str | list[Part] | None, where: str, found: list[str]) -> tuple[bytes, ...]:
    """The images of a content, as files; what is wrong with them is added to `found`. Only data URIs: no address that a
    request names is ever asked."""
    out = []
    for index, part in enumerate(content if isinstance(content, list) else ()):
        try:
            image = images.of_part({"type": part.type, "image_url": part.image_url}) if part.type in _IMAGES else None
        except RequestError as error:
            found.append(f"{where}.content.{index}: {part.type}: {error}")
            continue
        out += [] if image is None else [image]
    return tuple(out)


def call_of(function: FunctionCall, call_id: str, interpreters: set[str]) -> ToolCall:
    """A call of earlier turns; that of an interpreter, which clients know as a function of `code`, as its code."""
    arguments = function.arguments
    if function.name in interpreters:
        value = arguments
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = None
        if isinstance(value, Mapping) and isinstance(value.get("code"), str):
            return ToolCall(name=function.name, arguments=value["code"], id=call_id, kind="interpreter")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments or {}, ensure_ascii=False)
    return ToolCall(name=function.name, arguments=arguments or "{}", id=call_id)

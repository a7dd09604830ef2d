"""What /v1/responses takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from hanlin.errors import problems
from hanlin.serve.ask import Ask
from hanlin.serve.errors import ApiError
from hanlin.serve.schemas.chat import FunctionCall, Part, call_of, chosen, images_of, read_tools, text_of
from hanlin.serve.schemas.sampling import Body, SamplingBody
from hanlin.types import Message

__all__ = ["Item", "ResponseBody"]

_LOGPROBS = "message.output_text.logprobs"
_MOST_ITEMS = 65536
# Of the items that may be included only this one exists here.
_INCLUDABLE = (_LOGPROBS, "reasoning.encrypted_content")


class Item(Body):
    """A message, a call, or a call's result."""

    type: str = "message"
    id: str | None = None
    role: Literal["system", "developer", "user", "assistant", "tool"] | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None


class TextOptions(Body):
    format: dict[str, Any] | None = None
    verbosity: Any = None


class ResponseBody(SamplingBody):
    """Fields without effect here (`metadata`, `reasoning`, `service_tier`...) are taken, and have none."""

    input: str | Annotated[list[Item], Field(max_length=_MOST_ITEMS)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=256)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    truncation: str | None = None
    conversation: Any = None
    prompt: Any = None

    metadata: dict[str, Any] | None = None
    reasoning: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    max_tool_calls: Any = None

    refused: ClassVar[dict[str, str]] = {
        **SamplingBody.refused,
        "conversation": "conversations are kept by their last response: give previous_response_id",
        "prompt": "there are no stored prompts: give input and instructions",
    }

    def check(self) -> None:
        super().check()
        if self.n not in (None, 1):
            raise ApiError(400, "a response is one reply: n must be 1", param="n")
        if self.truncation not in (None, "disabled"):
            raise ApiError(400, "truncation: input is never cut; leave turns out yourself", param="truncation")
        unknown = [name for name in self.include or () if name not in _INCLUDABLE]
        if unknown:
            raise ApiError(400, f"include: {unknown[0][:80]!r} is not here, only {_LOGPROBS!r}", param="include")
        if self.background and self.stream:
            raise ApiError(400, "background and stream exclude each other here", param="background")
        if self.background and self.store is False:
            raise ApiError(400, "background needs store: the answer is fetched later", param="background")

    @property
    def logprobs(self) -> int | None:
        """Alternatives wanted beside each token; None where not even its own log-probability is."""
        return self.top_logprobs or 0 if self.top_logprobs or _LOGPROBS in (self.include or ()) else None

    def ask(self, earlier: tuple[Message, ...]) -> tuple[Ask, list[Message]]:
        """What is asked for, after `earlier` messages, and the new messages.

        Raises:
            ApiError, RequestError: items, tools or options that cannot be.
        """
        tools = read_tools(self.tools or (), "tools")
        interpreters = {tool.name for tool in tools if tool.kind == "interpreter"}
        tools, choice = chosen(tools, self.tool_choice)
        new = self._messages(interpreters)
        first = [Message(role="system", content=self.instructions)] if self.instructions else []
        sampling = self.sampling()
        if self.max_output_tokens is not None:
            sampling["max_tokens"] = self.max_output_tokens
        if self.logprobs is not None:
            sampling["logprobs"] = self.logprobs
        ask = Ask(
            messages=[*first, *earlier, *new],
            sampling=sampling,
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self._format(),
        )
        return ask, new

    def _format(self) -> dict[str, Any] | None:
        """`text.format` as chat completions write it."""
        wanted = self.text.format if self.text else None
        if wanted is not None and wanted.get("type") == "json_schema" and "json_schema" not in wanted:
            return {"type": "json_schema", "json_schema": wanted}
        return wanted

    def _messages(self, interpreters: set[str]) -> list[Message]:
        if isinstance(self.input, str):
            return [Message(role="user", content=self.input)]
        out: list[Message] = []
        found: list[str] = []
        for index, item in enumerate(self.input):
            _add(out, item, f"input.{index}", interpreters, found)
        if found:
            raise ApiError(400, problems("input", found[:20]), code="invalid_value", param="input")
        if not out:
            raise ApiError(400, "input is empty: give at least one message", param="input")
        return out


def _add(out: list[Message], item: Item, where: str, interpreters: set[str], found: list[str]) -> None:
    """Add an item to the conversation. Calls belong to the assistant's turn in front of them."""
    if item.type == "message" and item.role is not None:
        role = "system" if item.role == "developer" else item.role
        pictures = images_of(item.content, where, found)
        out.append(Message(role=role, content=text_of(item.content, where, found), images=pictures))
    elif item.type == "function_call" and item.name:
        call = call_of(FunctionCall(name=item.name, arguments=item.arguments), item.call_id or "", interpreters)
        if not out or out[-1].role != "assistant":
            out.append(Message(role="assistant"))
        out[-1] = replace(out[-1], tool_calls=(*out[-1].tool_calls, call))
    elif item.type == "function_call_output" and item.output is not None:
        content, pictures = text_of(item.output, where, found), images_of(item.output, where, found)
        out.append(Message(role="tool", content=content, tool_call_id=item.call_id, images=pictures))
    elif item.type in ("message", "function_call", "function_call_output"):
        needs = {"message": "role", "function_call": "name", "function_call_output": "output"}[item.type]
        found.append(f"{where}: an item of type {item.type!r} needs {needs!r}")
    elif item.type != "reasoning":  # which models of other servers write for themselves
        found.append(f"{where}: items of type {item.type[:40]!r} cannot be read")

"""Anthropic's Messages API: `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from hanlin import images
from hanlin.errors import RequestError
from hanlin.serve.ask import Ask, arguments_of
from hanlin.serve.body import JsonRoute
from hanlin.serve.call import Call
from hanlin.serve.errors import ApiError, error_body
from hanlin.serve.service import service_of
from hanlin.serve.stream import EventStream, event
from hanlin.types import Completion, Delta, ToolCall

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute, tags=["anthropic"])

_STOPS = {"length": "max_tokens", "tool_calls": "tool_use"}

Blocks = str | list[dict[str, Any]]


class AnthropicMessage(BaseModel):
    role: Literal["user", "assistant"]
    content: Blocks


class CountRequest(BaseModel):
    """What decides how many tokens a prompt has."""

    model: str = ""
    messages: list[AnthropicMessage] = Field(min_length=1)
    system: Blocks | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None


class MessagesRequest(CountRequest):
    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None


@router.post("/v1/messages")
async def messages(request: Request, body: MessagesRequest) -> Response:
    """Answer a conversation."""
    ask = _ask(
        body,
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=tuple(body.stop_sequences) if body.stop_sequences else None,
    )
    call = await service_of(request).open(request, body.model)
    try:
        jobs = await call.prepare(lambda llm: ask.jobs(llm, call.lease.adapter), slow=ask.slow)
        if not body.stream:
            (done,) = await call.complete(jobs)
            call.close()
            return JSONResponse(_message(call, done))
        deltas = await call.start(jobs, stream=True)
        prompt = len(jobs[0].ids)
        return EventStream(call, _events(call, prompt, deltas), on_error=_error, ping=event({"type": "ping"}, "ping"))
    except BaseException as error:
        call.close(error)
        raise


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request, body: CountRequest) -> dict[str, int]:
    """How many tokens the prompt has."""
    async with await service_of(request).open(request, body.model) as call:
        ask = _ask(body)
        (job,) = await call.prepare(ask.jobs, slow=ask.slow)
        return {"input_tokens": len(job.ids)}


def _ask(body: CountRequest, **sampling: Any) -> Ask:
    turns: list[dict[str, Any]] = []
    if body.system:
        turns.append({"role": "system", "content": _text(body.system, "system")})
    for index, message in enumerate(body.messages):
        turns += _turns(message, f"messages.{index}")
    choice = body.tool_choice or {}
    kind = choice.get("type")
    if kind not in (None, "auto", "any", "tool", "none"):
        raise RequestError(f"tool_choice.type must be auto, any, tool or none, not {kind!r}")
    tool_choice: Any = {"any": "required", "auto": "auto", "none": "none"}.get(kind or "")
    if kind == "tool":
        tool_choice = {"type": "function", "function": {"name": choice.get("name")}}
    return Ask(
        messages=turns,
        sampling=sampling,
        tools=[_tool(tool, index) for index, tool in enumerate(body.tools)] if body.tools else None,
        tool_choice=tool_choice if body.tools else None,
        parallel_tool_calls=False if choice.get("disable_parallel_tool_use") else None,
    )


def _tool(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    if "input_schema" not in tool:
        kind = tool.get("type")
        raise RequestError(f"tools.{index}: only tools with an input_schema can be called here, not type {kind!r}")
    function = {
        "name": tool.get("name"),
        "description": tool.get("description") or "",
        "parameters": tool["input_schema"],
    }
    return {"type": "function", "function": function}


def _turns(message: AnthropicMessage, where: str) -> list[dict[str, Any]]:
    """One of their messages: results of tools are turns of their own here."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    out: list[dict[str, Any]] = []
    texts: list[str] = []
    pictures: list[bytes] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(message.content):
        kind, place = block.get("type"), f"{where}.content.{index}"
        if kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind == "image" and message.role == "user":
            pictures.append(_image(block.get("source"), place))
        elif kind == "tool_use" and message.role == "assistant":
            function = {
                "name": block.get("name"),
                "arguments": json.dumps(block.get("input") or {}, ensure_ascii=False),
            }
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result" and message.role == "user":
            result = _text(block.get("content") or "", place)
            out.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": result})
        elif kind not in ("thinking", "redacted_thinking"):
            raise RequestError(f"{place}: blocks of type {kind!r} cannot be read here")
    if texts or calls or pictures or not out:
        content: Any = "".join(texts)
        if pictures:
            content = [{"type": "image", "image": each} for each in pictures] + [{"type": "text", "text": content}]
        out.append({"role": message.role, "content": content, **({"tool_calls": calls} if calls else {})})
    return out


def _image(source: Any, where: str) -> bytes:
    """An image that comes with the request; no address is ever asked for one."""
    kind = source.get("type") if isinstance(source, Mapping) else None
    if kind != "base64" or not isinstance(source.get("data"), str):
        raise RequestError(f"{where}: the source of an image must be of type 'base64', with its data, not {kind!r}")
    try:
        return images.from_base64(source["data"])
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error


def _text(blocks: Any, where: str) -> str:
    if isinstance(blocks, str):
        return blocks
    found = [block for block in blocks if isinstance(block, Mapping)] if isinstance(blocks, Sequence) else []
    wrong = [block.get("type") for block in found if not isinstance(block.get("text"), str)]
    if wrong or not isinstance(blocks, Sequence) or len(found) < len(blocks):
        raise RequestError(f"{where}: only text blocks can be read here, not {wrong[:3]!r}")
    return "".join(block["text"] for block in found)


def _message(call: Call, done: Completion) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": done.text}] if done.text or not done.tool_calls else []
    content += [{**_call_block(tool), "input": arguments_of(tool)} for tool in done.tool_calls]
    return {
        "id": _id(call),
        "type": "message",
        "role": "assistant",
        "model": call.model,
        "content": content,
        **_end(done),
        "usage": _usage(done),
    }


def _end(done: Completion) -> dict[str, Any]:
    by_text = isinstance(done.stop, str)
    reason = _STOPS.get(done.finish_reason, "stop_sequence" if by_text else "end_turn")
    return {"stop_reason": reason, "stop_sequence": done.stop if by_text else None}


def _usage(done: Completion) -> dict[str, int]:
    cached = done.usage.cached_tokens
    return {
        "input_tokens": done.usage.prompt_tokens - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": done.usage.generated_tokens,
    }


async def _events(call: Call, prompt: int, deltas: AsyncIterator[list[tuple[int, Delta]]]) -> AsyncIterator[bytes]:
    def send(kind: str, **values: Any) -> bytes:
        return event({"type": kind, **values}, kind)

    empty = {"id": _id(call), "type": "message", "role": "assistant", "model": call.model, "content": []}
    start = {"input_tokens": prompt, "output_tokens": 0}
    yield send("message_start", message={**empty, "stop_reason": None, "stop_sequence": None, "usage": start})
    index, text_open = 0, False
    async for batch in deltas:
        for _, delta in batch:
            out = b""
            if delta.text:
                if not text_open:
                    out += send("content_block_start", index=index, content_block={"type": "text", "text": ""})
                    text_open = True
                out += send("content_block_delta", index=index, delta={"type": "text_delta", "text": delta.text})
            for tool in delta.tool_calls:
                if text_open:
                    out += send("content_block_stop", index=index)
                    text_open, index = False, index + 1
                arguments = {
                    "type": "input_json_delta",
                    "partial_json": json.dumps(arguments_of(tool), ensure_ascii=False),
                }
                out += send("content_block_start", index=index, content_block={**_call_block(tool), "input": {}})
                out += send("content_block_delta", index=index, delta=arguments)
                out += send("content_block_stop", index=index)
                index += 1
            if delta.done is not None:
                if text_open:
                    out += send("content_block_stop", index=index)
                out += send("message_delta", delta=_end(delta.done), usage=_usage(delta.done))
                out += send("message_stop")
            if out:
                yield out


def _call_block(tool: ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": tool.id or "toolu_" + secrets.token_hex(12), "name": tool.name}


def _id(call: Call) -> str:
    return "msg_" + call.id.removeprefix("req-")


def _error(error: ApiError) -> bytes:
    return event(error_body("/v1/messages", error), "error")

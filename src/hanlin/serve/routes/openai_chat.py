"""OpenAI's `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from hanlin.llm import LLM
from hanlin.requests import Job
from hanlin.serve.ask import Ask
from hanlin.serve.body import JsonRoute
from hanlin.serve.routes.openai_common import (
    Head,
    call_json,
    ending,
    finished,
    logprobs_json,
    salted,
    total_usage,
    usage_json,
)
from hanlin.serve.schemas.chat import ChatBody
from hanlin.serve.service import service_of
from hanlin.serve.stream import DONE, EventStream, event, json_bytes
from hanlin.types import Completion, Delta, Message, ToolCall, Usage

__all__ = ["ChatChunks", "chat_answer", "router"]

router = APIRouter(tags=["openai"], route_class=JsonRoute)


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatBody) -> Response:
    """Answer a conversation."""
    body.check()
    ask, messages = _ask(body)

    def make(llm: LLM) -> list[Job]:
        limit = ask.sampling.get("max_tokens", llm.context_length)  # not the model's own default
        given = replace(ask, sampling={**ask.sampling, "max_tokens": limit})
        return [_opened(llm, body, messages, job) for job in given.jobs(llm, call.lease.adapter)]

    call = await service_of(request).open(request, body.model)
    try:
        jobs = salted(await call.prepare(make, slow=ask.slow), body.cache_salt)
        head = Head.of(call, "chatcmpl-")
        if not body.stream:
            answer = chat_answer(head, body, await call.complete(jobs), jobs)
            call.close()
            return JSONResponse(answer)
        chunks = ChatChunks.of(head, body, jobs)
        return EventStream(call, chunks.pieces(await call.start(jobs, stream=True)))
    except BaseException as error:
        call.close(error)
        raise


def _ask(body: ChatBody) -> tuple[Ask, list[Message]]:
    tools, choice = body.offered()
    messages = body.conversation(tools)
    ask = Ask(
        messages=messages,
        sampling=body.overrides(),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls,
    )
    return ask, messages


def _opened(llm: LLM, body: ChatBody, messages: list[Message], job: Job) -> Job:
    """The job with its prompt ending as asked. A last message of the assistant is continued unless that is refused."""
    requests, last = llm.requests, messages[-1].role == "assistant"
    open_end = body.add_generation_prompt is not False or bool(body.continue_final_message)
    if open_end and not (last and body.continue_final_message is False):
        return job
    if requests.system_prompt and all(message.role != "system" for message in messages):
        messages = [Message(role="system", content=requests.system_prompt), *messages]
    if open_end:
        messages = [*messages, Message(role="assistant")]
    return replace(job, ids=requests.format().render(messages, job.tools, generation_prompt=open_end).ids)


def chat_answer(head: Head, body: ChatBody, completions: Sequence[Completion], jobs: Sequence[Job]) -> dict[str, Any]:
    """The whole answer, not streamed."""
    choices = []
    for index, done in enumerate(completions):
        finished(done)
        choices.append(
            {
                "index": index,
                "message": _message(head, body, index, done),
                "logprobs": None if done.logprobs is None else logprobs_json(done.logprobs),
                "finish_reason": _reason(body, done),
                **ending(done),
                **({"token_ids": list(done.ids)} if body.return_token_ids else {}),
            }
        )
    return {
        **head.json("chat.completion"),
        "choices": choices,
        "usage": total_usage((done.index, done.usage) for done in completions),
        **({"prompt_token_ids": list(jobs[0].ids)} if body.return_token_ids else {}),
    }


def _message(head: Head, body: ChatBody, index: int, done: Completion) -> dict[str, Any]:
    calls = [call_json(call, head.call_name(index, number)) for number, call in enumerate(done.tool_calls)]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if calls and not done.text else done.text,
        "refusal": None,
    }
    if calls and body.legacy:
        message["function_call"] = calls[0]["function"]
    elif calls:
        message["tool_calls"] = calls
    return message


def _reason(body: ChatBody, done: Completion) -> str:
    if done.finish_reason == "tool_calls" and body.legacy:
        return "function_call"
    return done.finish_reason


@dataclass(eq=False, kw_only=True)
class ChatChunks:
    """From deltas to server-sent chunks. Of each choice the role comes first, its reason to end last.

    Attributes:
        replies: how many there will be to the prompt.
        usages: of those that are finished.
    """

    head: Head
    body: ChatBody
    prompt_ids: tuple[int, ...]
    usages: dict[int, Usage] = field(default_factory=dict)
    _calls: dict[int, int] = field(default_factory=dict)
    _frames: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    _tokens: int = 0

    def __post_init__(self) -> None:
        options = self.body.stream_options
        self._usage = bool(options and options.include_usage)
        self._always = self._usage and bool(options and options.continuous_usage_stats)
        self._chunk = self.head.json("chat.completion.chunk")

    @classmethod
    def of(cls, head: Head, body: ChatBody, jobs: Sequence[Job]) -> ChatChunks:
        return cls(head=head, body=body, prompt_ids=jobs[0].ids)

    async def pieces(self, deltas: AsyncIterator[list[tuple[int, Delta]]]) -> AsyncIterator[bytes]:
        async for batch in deltas:
            if data := b"".join([self._events(delta) for _, delta in batch]):
                yield data
        if self._usage:
            yield event({**self._chunk, "choices": [], "usage": total_usage(self.usages.items())})
        yield DONE

    def _events(self, delta: Delta) -> bytes:
        """Its chunks as events. Most deltas are some text and no more: around that, chunks are always the same."""
        frame = self._frames.get(delta.index)
        if frame is None or delta.done is not None or delta.tool_calls or delta.logprobs:
            return b"".join(map(event, self.chunks(delta)))
        return frame[0] + json_bytes(delta.text) + frame[1] if delta.text else b""

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """The chunks that a delta is worth."""
        index, out = delta.index, []
        self._tokens += len(delta.ids)
        if index not in self._calls:
            self._calls[index] = 0
            first = self._of(index, {"role": "assistant", "content": ""})
            if self.body.return_token_ids and index == 0:
                first["prompt_token_ids"] = list(self.prompt_ids)
            out.append(first)
            if not (self._always or self.body.return_token_ids):
                before, text, after = event(self._of(index, {"content": ""})).partition(b'"content":""')
                self._frames[index] = before + text[:-2], after  # within a string, the marks would be escaped
        if delta.text or delta.logprobs or (delta.ids and self.body.return_token_ids):
            chunk = self._of(index, {"content": delta.text})
            if delta.logprobs:
                chunk["choices"][0]["logprobs"] = logprobs_json(delta.logprobs)
            if self.body.return_token_ids:
                chunk["choices"][0]["token_ids"] = list(delta.ids)
            out.append(chunk)
        for call in delta.tool_calls:
            number = self._calls[index]
            self._calls[index] += 1
            if (given := self._call(index, number, call)) is not None:
                out.append(self._of(index, given))
        if delta.done is not None:
            done = finished(delta.done)
            self.usages[index] = done.usage
            last = self._of(index, {}, _reason(self.body, done))
            last["choices"][0].update(ending(done))
            out.append(last)
        return out

    def _call(self, index: int, number: int, call: ToolCall) -> dict[str, Any] | None:
        given = call_json(call, self.head.call_name(index, number))
        if self.body.legacy:
            return None if number else {"function_call": given["function"]}
        return {"tool_calls": [{"index": number, **given}]}

    def _of(self, index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        chunk: dict[str, Any] = {**self._chunk, "choices": [choice]}
        if self._always:
            chunk["usage"] = usage_json(len(self.prompt_ids), self._tokens, 0)
        elif self._usage:
            chunk["usage"] = None
        return chunk

"""A response as an object, and as the events that build it up."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from hanlin.requests import Job
from hanlin.serve.errors import ApiError
from hanlin.serve.routes.openai_common import call_json, finished, logprob_json
from hanlin.serve.schemas.responses import ResponseBody
from hanlin.serve.stream import event
from hanlin.types import Completion, Delta, TokenLogprob

__all__ = ["Answer"]


@dataclass(eq=False, kw_only=True)
class Answer:
    """One response. Its output is a message, where there is text, and then the calls, each an item.

    Attributes:
        completed: called once, with the whole response and the reply.
    """

    body: ResponseBody
    model: str
    job: Job
    completed: Callable[[dict[str, Any], Completion], None] = lambda whole, done: None
    id: str = field(default_factory=lambda: "resp_" + secrets.token_hex(16))
    created: int = field(default_factory=lambda: int(time.time()))
    _number: int = 0
    _open: bool = False
    _text: str = ""
    _logprobs: list[dict[str, Any]] = field(default_factory=list)

    def whole(self, done: Completion) -> dict[str, Any]:
        """The response when its reply is finished."""
        finished(done)
        self._text = done.text
        self._logprobs = [logprob_json(token) for token in done.logprobs or ()]
        cut = done.finish_reason == "length"
        usage = done.usage
        return {
            **self.object("incomplete" if cut else "completed"),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._output(done),
            "completed_at": int(time.time()),
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.generated_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.total_tokens,
            },
            "seed": done.seed,
        }

    def failed(self, error: ApiError) -> dict[str, Any]:
        return {**self.object("failed"), "error": {"code": error.code or "server_error", "message": error.message}}

    def object(self, status: str) -> dict[str, Any]:
        """The response while there is no reply."""
        body, sampling = self.body, self.job.sampling
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": bool(body.background),
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": body.store is not False,
            "temperature": sampling.temperature,
            "text": {"format": (body.text.format if body.text else None) or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }

    async def pieces(self, deltas: AsyncIterator[list[tuple[int, Delta]]]) -> AsyncIterator[bytes]:
        """The events, as bytes."""
        begun = self.object("in_progress")
        yield self._event("response.created", response=begun) + self._event("response.in_progress", response=begun)
        async for batch in deltas:
            data = b"".join(self._delta(delta) for _, delta in batch)
            if data:
                yield data

    def error(self, error: ApiError) -> bytes:
        """The last event, when something went wrong after the first."""
        return self._event("response.failed", response=self.failed(error))

    def _delta(self, delta: Delta) -> bytes:
        out = b""
        if delta.text:
            out += self._begin()
        logprobs = self._take(delta.logprobs)
        if delta.text or (logprobs and self._open):
            self._text += delta.text
            out += self._event("response.output_text.delta", **self._place(), delta=delta.text, logprobs=logprobs)
        if delta.done is not None:
            out += self._end(finished(delta.done))
        return out

    def _take(self, tokens: tuple[TokenLogprob, ...]) -> list[dict[str, Any]]:
        out = [logprob_json(token) for token in tokens]
        self._logprobs += out
        return out

    def _begin(self) -> bytes:
        """The events in front of the first text."""
        if self._open:
            return b""
        self._open = True
        item = {**self._message("in_progress"), "content": []}
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return self._event("response.output_item.added", output_index=0, item=item) + self._event(
            "response.content_part.added", **self._place(), part=part
        )

    def _end(self, done: Completion) -> bytes:
        """All that is known at the end only: calls come here, behind the text, wherever the model wrote them."""
        out = self._begin() if not done.tool_calls else b""
        whole = self.whole(done)
        for index, item in enumerate(whole["output"]):
            if item["type"] == "message":
                (part,) = item["content"]
                out += self._event(
                    "response.output_text.done", **self._place(), text=part["text"], logprobs=part["logprobs"]
                )
                out += self._event("response.content_part.done", **self._place(), part=part)
            else:
                empty = {**item, "arguments": "", "status": "in_progress"}
                place = {"output_index": index, "item_id": item["id"]}
                out += self._event("response.output_item.added", output_index=index, item=empty)
                for name, key in (("delta", "delta"), ("done", "arguments")):
                    values = {**place, key: item["arguments"], **({"name": item["name"]} if name == "done" else {})}
                    out += self._event(f"response.function_call_arguments.{name}", **values)
            out += self._event("response.output_item.done", output_index=index, item=item)
        self.completed(whole, done)
        return out + self._event(f"response.{whole['status']}", response=whole)

    def _output(self, done: Completion) -> list[dict[str, Any]]:
        cut, name = done.finish_reason == "length", self.id.partition("_")[2]
        out: list[dict[str, Any]] = []
        if done.text or not done.tool_calls:
            out.append(self._message("incomplete" if cut else "completed"))
        for number, call in enumerate(done.tool_calls):
            made = call_json(call, f"{name}_{number}")
            out.append(
                {
                    "type": "function_call",
                    "id": f"fc_{name}_{number}",
                    "call_id": made["id"],
                    **made["function"],
                    "status": "completed",
                }
            )
        return out

    def _message(self, status: str) -> dict[str, Any]:
        part = {"type": "output_text", "text": self._text, "annotations": [], "logprobs": self._logprobs}
        return {
            "type": "message",
            "id": f"msg_{self.id.partition('_')[2]}",
            "status": status,
            "role": "assistant",
            "content": [part],
        }

    def _place(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self.id.partition('_')[2]}", "output_index": 0, "content_index": 0}

    def _event(self, kind: str, /, **values: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": kind, "sequence_number": number, **values}, kind)

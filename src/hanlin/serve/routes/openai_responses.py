"""OpenAI's `/v1/responses`, with what was answered kept in memory for the next turn."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from hanlin.llm import LLM
from hanlin.requests import Job
from hanlin.serve.ask import Ask
from hanlin.serve.body import JsonRoute
from hanlin.serve.call import Call
from hanlin.serve.errors import ApiError, describe
from hanlin.serve.responses import Kept
from hanlin.serve.routes.openai_common import salted
from hanlin.serve.routes.openai_response_events import Answer
from hanlin.serve.schemas.responses import ResponseBody
from hanlin.serve.service import Service, service_of
from hanlin.serve.stream import EventStream, json_bytes
from hanlin.types import Completion, Message

__all__ = ["router"]

router = APIRouter(tags=["openai"], route_class=JsonRoute)


@router.post("/v1/responses")
async def create_response(request: Request, body: ResponseBody) -> Response:
    """Answer a conversation."""
    body.check()
    service = service_of(request)
    call, answer, new = await _opened(request, service, body)
    try:
        earlier = _earlier(service, call, body)

        def completed(whole: dict[str, Any], done: Completion) -> None:
            if body.store is not False:
                _keep(service, call, answer, whole, (*earlier, *new, _said(whole, done)))

        answer.completed = completed
        if body.stream:
            deltas = await call.start([answer.job], stream=True)
            return EventStream(call, answer.pieces(deltas), on_error=answer.error)
        if body.background:
            call.detach()
            kept = _keep(service, call, answer, answer.object("in_progress"), (*earlier, *new))
            kept.task = asyncio.create_task(_in_background(call, answer, kept))
            return JSONResponse(kept.answer)
        (done,) = await call.complete([answer.job])
        whole = answer.whole(done)
        completed(whole, done)
        call.close()
        return JSONResponse(whole)
    except BaseException as error:
        call.close(error)
        raise


@router.post("/v1/responses/input_tokens")
async def count_input(request: Request, body: ResponseBody) -> dict[str, Any]:
    """How many tokens a response's input has."""
    body.check()
    call, answer, _ = await _opened(request, service_of(request), body)
    call.close()
    return {"object": "response.input_tokens", "input_tokens": len(answer.job.ids)}


@router.get("/v1/responses/{response_id}")
async def get_response(request: Request, response_id: str) -> JSONResponse:
    """A response that is kept."""
    return JSONResponse(_find(request, response_id).answer)


@router.get("/v1/responses/{response_id}/input_items")
async def get_input(request: Request, response_id: str) -> JSONResponse:
    """What a response answered."""
    items = _find(request, response_id).items
    ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"]} if items else {"first_id": "", "last_id": ""}
    return JSONResponse({"object": "list", "data": items, "has_more": False, **ends})


@router.delete("/v1/responses/{response_id}")
async def delete_response(request: Request, response_id: str) -> dict[str, Any]:
    """Forget a response."""
    service_of(request).responses.forget(request.scope["state"]["key"].name, response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(request: Request, response_id: str) -> JSONResponse:
    """End a response in the background."""
    kept = _find(request, response_id)
    if not kept.answer["background"]:
        raise ApiError(400, "only a response in the background can be cancelled", param="response_id")
    if kept.task is not None:
        kept.task.cancel()
        kept.task = None
        kept.answer = {**kept.answer, "status": "cancelled"}
    return JSONResponse(kept.answer)


async def _opened(request: Request, service: Service, body: ResponseBody) -> tuple[Call, Answer, list[Message]]:
    """The call, the answer to come, and the messages that are new. The call is the caller's to close.

    Raises:
        ApiError, RequestError: what cannot be.
    """
    call = await service.open(request, body.model)
    try:
        ask, new = body.ask(_earlier(service, call, body))
        (job,) = salted(await call.prepare(lambda llm: _jobs(llm, call, ask), slow=ask.slow), body.cache_salt)
        return call, Answer(body=body, model=call.model, job=job), new
    except BaseException as error:
        call.close(error)
        raise


def _jobs(llm: LLM, call: Call, ask: Ask) -> list[Job]:
    limit = ask.sampling.get("max_tokens", llm.context_length)  # not the model's own default
    return replace(ask, sampling={**ask.sampling, "max_tokens": limit}).jobs(llm, call.lease.adapter)


def _earlier(service: Service, call: Call, body: ResponseBody) -> tuple[Message, ...]:
    if body.previous_response_id is None:
        return ()
    kept = service.responses.find(call.key.name, body.previous_response_id, param="previous_response_id")
    if kept.answer["status"] not in ("completed", "incomplete"):
        raise ApiError(
            400,
            f"response {body.previous_response_id!r} is {kept.answer['status']}: it cannot be gone on from",
            param="previous_response_id",
        )
    return kept.messages


def _said(whole: dict[str, Any], done: Completion) -> Message:
    """The reply as a turn, its calls by the ids that results will refer to."""
    ids = [item["call_id"] for item in whole["output"] if item["type"] == "function_call"]
    calls = tuple(replace(call, id=name) for call, name in zip(done.tool_calls, ids, strict=True))
    return Message(role="assistant", content=done.text, tool_calls=calls)


def _keep(service: Service, call: Call, answer: Answer, state: dict[str, Any], messages: tuple[Message, ...]) -> Kept:
    items = _items(answer)
    nbytes = len(json_bytes([state, items])) + sum(64 + len(message.content) for message in messages)
    kept = Kept(answer=state, messages=messages, items=items, nbytes=nbytes)
    service.responses.keep(call.key.name, kept)
    return kept


def _items(answer: Answer) -> list[dict[str, Any]]:
    given, name = answer.body.input, answer.id.partition("_")[2]
    if isinstance(given, str):
        content = [{"type": "input_text", "text": given}]
        return [{"id": f"in_{name}_0", "type": "message", "role": "user", "content": content}]
    return [{"id": f"in_{name}_{index}", **item.model_dump(exclude_none=True)} for index, item in enumerate(given)]


async def _in_background(call: Call, answer: Answer, kept: Kept) -> None:
    error: BaseException | None = None
    try:
        (done,) = await call.complete([answer.job])
        whole = answer.whole(done)
        kept.answer, kept.messages = whole, (*kept.messages, _said(whole, done))
        kept.nbytes += len(json_bytes(whole["output"]))
    except asyncio.CancelledError as failure:
        error = failure
        raise
    except Exception as failure:
        error = failure
        kept.answer = answer.failed(describe(failure))
    finally:
        kept.task = None
        call.close(error)


def _find(request: Request, response_id: str) -> Kept:
    return service_of(request).responses.find(request.scope["state"]["key"].name, response_id)

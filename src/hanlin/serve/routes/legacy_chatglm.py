"""ChatGLM-6B's own two APIs: `POST /` of api.py, and `/chat` with `/get_response`; VisualGLM's `POST /`.

The shapes are those of the repositories' scripts; `is_handled` is true once the request has left the queue (the script
that set it was not at hand). A body with `text` is VisualGLM's, one with `prompt` ChatGLM-6B's.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Discriminator, Field, Tag
from starlette.responses import JSONResponse, Response

from hanlin import images
from hanlin.llm import LLM
from hanlin.requests import Job
from hanlin.serve.ask import Ask
from hanlin.serve.body import JsonRoute
from hanlin.serve.call import Call
from hanlin.serve.conversations import Conversation
from hanlin.serve.errors import describe
from hanlin.serve.service import service_of

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute, tags=["chatglm-6b"])

_MAX_LENGTH, _TOP_P, _TEMPERATURE = 2048, 0.7, 0.95
_MIN_LENGTH = 50  # of VisualGLM's
_VISUAL = {"top_p": 0.4, "top_k": 100, "temperature": 0.8, "repetition_penalty": 1.2}


class ApiRequest(BaseModel):
    """`POST /`. What is missing, null or zero gets the default, as in the script."""

    prompt: str
    history: list[tuple[str, str]] | None = None
    max_length: int | None = None
    top_p: float | None = None
    temperature: float | None = None


class VisualRequest(BaseModel):
    """VisualGLM's `POST /`. `image` is an image file as base64; what is missing or null gets the script's default."""

    text: str
    image: str | None = None
    history: list[tuple[str, str]] | None = None
    max_length: int | None = None
    min_length: int | None = None
    top_p: float | None = None
    top_k: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None


def _kind(body: Any) -> str:
    visual = isinstance(body, VisualRequest) or (isinstance(body, dict) and "text" in body and "prompt" not in body)
    return "text" if visual else "prompt"


Either = Annotated[
    Annotated[ApiRequest, Tag("prompt")] | Annotated[VisualRequest, Tag("text")],
    Discriminator(_kind),
]


class ChatRequest(BaseModel):
    query: str
    request_id: str = Field(min_length=1, max_length=256)
    history: list[tuple[str, str]] | None = None
    max_length: int | None = None
    top_p: float | None = None
    temperature: float | None = None


class PollRequest(BaseModel):
    request_id: str = Field(max_length=256)


@router.post("/")
async def api(request: Request, body: Either) -> Response:
    """One turn."""
    async with await service_of(request).open(request, None) as call:
        if isinstance(body, VisualRequest):
            asked, name = body.text, "result"
            jobs = await call.prepare(lambda llm: _visual_jobs(llm, body), slow=body.image is not None)
        else:
            asked, name = body.prompt, "response"
            jobs = await call.prepare(_ask(call, asked, body).jobs)
        (done,) = await call.complete(jobs)
        history = [*(body.history or []), (asked, done.text)]
        stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        return JSONResponse({name: done.text, "history": history, "status": 200, "time": stamp})


@router.post("/chat")
async def chat(request: Request, body: ChatRequest) -> Response:
    """Begin a reply, to be asked for by `/get_response`."""
    service = service_of(request)
    call = await service.open(request, None)
    try:
        call.detach()
        jobs = await call.prepare(_ask(call, body.query, body).jobs)
        kept = service.conversations.add(call.key.name, body.request_id)
    except BaseException as error:
        call.close(error)
        raise
    kept.task = asyncio.create_task(_run(call, jobs, kept))
    return JSONResponse({"code": 0, "msg": "start process"})


@router.post("/get_response")
async def get_response(request: Request, body: PollRequest) -> Response:
    """What there is of a reply."""
    service = service_of(request)
    kept = service.conversations.get(request.scope["state"]["key"].name, body.request_id)
    if kept.error is not None:
        raise kept.error
    response = {
        "is_finished": kept.finished,
        "is_handled": kept.handled,
        "response": kept.text,
        "timestamp": time.time(),
    }
    return JSONResponse({"code": 0, "msg": "success", "response": response})


async def _run(call: Call, jobs: Any, kept: Conversation) -> None:
    async with call:
        try:
            deltas = await call.start(jobs, stream=True)
            kept.handled = True
            async for batch in deltas:
                kept.text += "".join(delta.text for _, delta in batch)
        except Exception as error:
            kept.error = describe(error)
        finally:
            kept.finished = True


def _turns(history: list[tuple[str, str]] | None, query: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for question, answer in history or []:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*turns, {"role": "user", "content": query}]


def _ask(call: Call, query: str, body: ApiRequest | ChatRequest) -> Ask:
    turns = _turns(body.history, query)
    sampling = {"top_p": body.top_p or _TOP_P, "temperature": body.temperature or _TEMPERATURE}
    prompt = len(Ask(messages=turns).jobs(call.llm)[0].ids)  # max_length counts it
    return Ask(messages=turns, sampling={**sampling, "max_tokens": max(1, (body.max_length or _MAX_LENGTH) - prompt)})


def _visual_jobs(llm: LLM, body: VisualRequest) -> list[Job]:
    shown: list[dict[str, Any]] = []
    if body.image is not None:
        shown = [{"type": "image", "image": images.from_base64(body.image)}]
    turns = _turns(body.history, [*shown, {"type": "text", "text": body.text}])
    sampling = {name: default if (given := getattr(body, name)) is None else given for name, default in _VISUAL.items()}
    (job,) = Ask(messages=turns, sampling=sampling).jobs(llm)
    # Both lengths count the prompt, the places of the image too.
    most, least = body.max_length or _MAX_LENGTH, _MIN_LENGTH if body.min_length is None else body.min_length
    room = max(1, most - len(job.ids))
    least = min(max(0, least - len(job.ids)), room)
    return [replace(job, sampling=replace(job.sampling, max_tokens=room, min_tokens=least))]

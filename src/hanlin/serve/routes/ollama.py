"""Ollama's API: chat, generate, embed, tags, show, ps, version. Streams are lines of JSON."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import datetime, timezone
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from hanlin import __version__, images
from hanlin.errors import RequestError, problems
from hanlin.serve.ask import Ask, arguments_of
from hanlin.serve.body import JsonRoute
from hanlin.serve.call import Call
from hanlin.serve.errors import ApiError
from hanlin.serve.models import Served
from hanlin.serve.routes.durations import seconds
from hanlin.serve.service import Service, service_of
from hanlin.serve.stream import EventStream, json_bytes
from hanlin.types import Completion, Delta, ToolCall

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute, prefix="/api", tags=["ollama"])

# Options with a meaning here, by the name of the sampling parameter. The others say how Ollama loads models.
_OPTIONS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "seed": "seed",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
_UNSUPPORTED = ("mirostat", "tfs_z", "typical_p")


class Common(BaseModel):
    model: str = ""
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None
    think: bool | str | None = None


class ChatRequest(Common):
    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] | None = None


class GenerateRequest(Common):
    prompt: str = ""
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    raw: bool = False
    images: list[str] | None = None
    context: list[int] | None = None


class EmbedRequest(BaseModel):
    model: str = ""
    input: str | list[str] = ""
    prompt: str = ""
    truncate: bool | None = None
    dimensions: int | None = None
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None


class ShowRequest(BaseModel):
    model: str = ""
    name: str = ""
    verbose: bool = False


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of Hanlin; clients ask it to see whether somebody is there."""
    return {"version": __version__}


@router.get("/tags")
async def tags(request: Request) -> dict[str, Any]:
    """All models and adapters."""
    pool = service_of(request).models
    return {"models": [_listed(name, pool.find(name)[0]) for name in pool.names]}


@router.get("/ps")
async def ps(request: Request) -> dict[str, Any]:
    """The models that are loaded, and until when."""
    now = time.monotonic()
    out = []
    for served in service_of(request).models.list:
        if served.llm is not None:
            until = _stamp(time.time() + (served.expires - now if served.expires is not None else 100 * 365 * 86400))
            out.append({**_listed(served.name, served), "expires_at": until, "size_vram": 0})
    return {"models": out}


@router.post("/show")
async def show(request: Request, body: ShowRequest) -> dict[str, Any]:
    """What a model is. It is loaded for that."""
    async with await service_of(request).open(request, body.model or body.name) as call:
        config = call.llm.config
        chats = call.llm.requests.chat_format is not None
        return {
            "license": "",
            "modelfile": "",
            "parameters": "",
            "template": "",
            "details": _details(call.lease.served),
            "model_info": {
                "general.architecture": config.model_type,
                f"{config.model_type}.context_length": call.llm.context_length,
                f"{config.model_type}.embedding_length": config.hidden_size,
                f"{config.model_type}.block_count": config.num_layers,
                f"{config.model_type}.attention.head_count": config.num_heads,
                f"{config.model_type}.attention.head_count_kv": config.num_kv_heads,
                f"{config.model_type}.vocab_size": config.vocab_size,
            },
            "capabilities": [
                "completion",
                *(["tools"] if chats else []),
                *(["vision"] if call.llm.sees else []),
                "embedding",
            ],
            "modified_at": _stamp(call.lease.served.created),
        }


@router.post("/chat")
async def chat(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation; without messages, load or (with keep_alive 0) unload the model."""
    if not body.messages:
        return await _load_only(request, body, {"message": {"role": "assistant", "content": ""}})
    ask = Ask(
        messages=[_message(message, index) for index, message in enumerate(body.messages)],
        tools=body.tools or None,
        sampling=_sampling(body),
        response_format=_format(body.format),
    )

    def piece(text: str, calls: tuple[ToolCall, ...]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message["tool_calls"] = [{"function": {"name": c.name, "arguments": arguments_of(c)}} for c in calls]
        return {"message": message}

    return await _answer(request, body, ask, piece)


@router.post("/generate")
async def generate(request: Request, body: GenerateRequest) -> Response:
    """Answer a prompt: as one turn of a conversation; when it is raw, or has a suffix, as the bare text."""
    found = [
        f"{name} {why}"
        for name, why in (
            ("template", "is not taken from requests"),
            ("images", "cannot go with a raw prompt") if body.raw else ("", ""),
        )
        if name and getattr(body, name)
    ]
    if found:
        raise RequestError(problems("request", found))
    if not body.prompt:
        return await _load_only(request, body, {"response": ""})
    sampling, wanted = _sampling(body), _format(body.format)
    if body.raw or body.suffix:
        ask = Ask(prompt=[body.prompt], suffix=body.suffix, sampling=sampling, response_format=wanted)
    else:
        turns = [{"role": "system", "content": body.system}] if body.system else []
        turns.append(_message({"role": "user", "content": body.prompt, "images": body.images}, 0))
        ask = Ask(messages=turns, sampling=sampling, response_format=wanted)
    return await _answer(request, body, ask, lambda text, calls: {"response": text})


@router.post("/embed")
async def embed(request: Request, body: EmbedRequest) -> dict[str, Any]:
    """Embeddings of texts: the mean of the last hidden states, of length 1."""
    texts = [body.input] if isinstance(body.input, str) else body.input
    began = time.perf_counter()
    rows, count, name = await _embedded(request, body, texts)
    return {
        "model": name,
        "embeddings": rows,
        "total_duration": _ns(time.perf_counter() - began),
        "load_duration": 0,
        "prompt_eval_count": count,
    }


@router.post("/embeddings")
async def embeddings(request: Request, body: EmbedRequest) -> dict[str, Any]:
    """The older form, for one prompt."""
    (row,), _, _ = await _embedded(request, body, [body.prompt])
    return {"embedding": row}


async def _embedded(request: Request, body: EmbedRequest, texts: list[str]) -> tuple[list[list[float]], int, str]:
    service = service_of(request)
    async with await service.open(request, body.model, keep_alive=seconds(body.keep_alive)) as call:
        width = call.llm.config.hidden_size
        if body.dimensions is not None and body.dimensions != width:
            raise RequestError(f"dimensions must be {width}, the model's own")
        rows, count = await call.embed(texts)
        return rows, count, call.model


async def _answer(
    request: Request, body: Common, ask: Ask, piece: Callable[[str, tuple[ToolCall, ...]], dict[str, Any]]
) -> Response:
    call = await service_of(request).open(request, body.model, keep_alive=seconds(body.keep_alive))
    try:
        jobs = await call.prepare(lambda llm: ask.jobs(llm, call.lease.adapter), slow=ask.slow)
        head = {"model": call.model}
        if body.stream is False:
            (done,) = await call.complete(jobs)
            call.close()
            return JSONResponse({**head, **_now(), **piece(done.text, done.tool_calls), **_end(call, done)})
        deltas = await call.start(jobs, stream=True)
        return EventStream(
            call, _lines(call, head, piece, deltas), on_error=_error, ping=None, media_type="application/x-ndjson"
        )
    except BaseException as error:
        call.close(error)
        raise


async def _lines(
    call: Call,
    head: dict[str, Any],
    piece: Callable[[str, tuple[ToolCall, ...]], dict[str, Any]],
    deltas: AsyncIterator[list[tuple[int, Delta]]],
) -> AsyncIterator[bytes]:
    async for batch in deltas:
        for _, delta in batch:
            if delta.text or delta.tool_calls:
                yield json_bytes({**head, **_now(), **piece(delta.text, delta.tool_calls), "done": False}) + b"\n"
            if delta.done is not None:
                yield json_bytes({**head, **_now(), **piece("", ()), **_end(call, delta.done)}) + b"\n"


async def _load_only(request: Request, body: Common, empty: dict[str, Any]) -> Response:
    service: Service = service_of(request)
    wait = seconds(body.keep_alive)
    async with await service.open(request, body.model, keep_alive=wait) as call:
        reason = "unload" if wait == 0 else "load"
        answer = {"model": call.model, **_now(), **empty, "done": True, "done_reason": reason}
    await service.models.unload_idle()
    return JSONResponse(answer)


def _sampling(body: Common) -> dict[str, Any]:
    options = body.options or {}
    unsupported = [name for name in _UNSUPPORTED if options.get(name) not in (None, 0, 0.0, 1, 1.0)]
    if unsupported:
        raise RequestError(problems("options", [f"{name} is not supported" for name in unsupported]))
    out: dict[str, Any] = {
        ours: options[theirs] for theirs, ours in _OPTIONS.items() if options.get(theirs) is not None
    }
    stop, predict = options.get("stop"), options.get("num_predict")
    if stop:
        out["stop"] = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else stop
    if type(predict) is int and predict > 0:
        out["max_tokens"] = predict
    return out


def _format(given: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not given:
        return None
    if given == "json":
        return {"type": "json_object"}
    if isinstance(given, str):
        raise RequestError(f"format must be 'json' or a JSON schema, not {given[:40]!r}")
    return {"type": "json_schema", "json_schema": {"name": "format", "schema": given}}


def _message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    out = {key: value for key, value in message.items() if key != "images"}
    given = message.get("images")
    if given:
        if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
            raise RequestError(f"messages.{index}: images must be a list of base64 texts")
        pictures = [{"type": "image", "image": images.from_base64(each)} for each in given]
        out["content"] = [*pictures, {"type": "text", "text": str(out.get("content") or "")}]
    if out.get("role") == "tool" and out.get("tool_name") and not out.get("name"):
        out["name"] = out["tool_name"]
    return out


def _end(call: Call, done: Completion) -> dict[str, Any]:
    times = done.timings
    return {
        "done": True,
        "done_reason": "length" if done.finish_reason == "length" else "stop",
        "total_duration": _ns(time.perf_counter() - call.began),
        "load_duration": _ns(call.load_seconds),
        "prompt_eval_count": done.usage.prompt_tokens,
        "prompt_eval_duration": _ns(times.prompt),
        "eval_count": done.usage.generated_tokens,
        "eval_duration": _ns(times.generation),
    }


def _listed(name: str, served: Served) -> dict[str, Any]:
    return {
        "name": name,
        "model": name,
        "modified_at": _stamp(served.created),
        "size": served.bytes,
        "digest": "",
        "details": _details(served),
    }


def _details(served: Served) -> dict[str, Any]:
    family = served.llm.llm.config.model_type if served.llm else ""
    return {
        "parent_model": "",
        "format": "",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": "",
        "quantization_level": "",
    }


def _error(error: ApiError) -> bytes:
    return json_bytes({"error": error.message}) + b"\n"


def _now() -> dict[str, str]:
    return {"created_at": _stamp(time.time())}


def _stamp(when: float) -> str:
    return datetime.fromtimestamp(when, timezone.utc).isoformat().replace("+00:00", "Z")


def _ns(value: float) -> int:
    return int(value * 1e9)

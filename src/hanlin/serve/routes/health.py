"""Whether the server lives, and what it serves."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from hanlin import __version__
from hanlin.serve.models import Served
from hanlin.serve.service import service_of

__all__ = ["router"]

router = APIRouter()


@router.get("/health", tags=["server"])
async def health(request: Request) -> JSONResponse:
    """200 while the server lives, 503 when an engine has died. The one route without a key."""
    dead = service_of(request).failure is not None
    return JSONResponse({"status": "failed" if dead else "ok"}, 503 if dead else 200)


@router.get("/ready", tags=["server"])
async def ready(request: Request) -> JSONResponse:
    """200 when new requests are welcome: the first model is loaded, no engine has died, no shutdown has begun."""
    service = service_of(request)
    why = "failed" if service.failure else "draining" if service.draining else ""
    why = why or ("" if service.models.list[0].llm or service.config.keep_alive is not None else "loading")
    return JSONResponse({"status": why or "ready"}, 503 if why else 200)


@router.get("/version", tags=["server"])
async def version() -> dict[str, str]:
    """The version of Hanlin."""
    return {"version": __version__}


@router.get("/metrics", tags=["server"], response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(service_of(request).observer.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/models", tags=["openai"])
async def models(request: Request) -> dict[str, Any]:
    """All models and adapters that can be asked for."""
    pool = service_of(request).models
    return {"object": "list", "data": [_model(name, *pool.find(name)) for name in pool.names]}


@router.get("/v1/models/{name:path}", tags=["openai"])
async def model(request: Request, name: str) -> dict[str, Any]:
    """One of them."""
    return _model(name, *service_of(request).models.find(name))


def _model(name: str, served: Served, adapter: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "hanlin",
        "root": served.name,
        "parent": served.name if adapter else None,
        "max_model_len": served.llm.llm.context_length if served.llm else None,
        "loaded": served.llm is not None,
        "input_modalities": None if served.llm is None else ["text", *(["image"] if served.llm.llm.sees else [])],
    }

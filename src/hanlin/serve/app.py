"""The ASGI application. `hanlin serve` runs it; anything that speaks ASGI can."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from hanlin import __version__
from hanlin.errors import HanlinError, problems
from hanlin.serve.description import description
from hanlin.serve.errors import ApiError, DisconnectedError, describe, error_body
from hanlin.serve.guard import Guard
from hanlin.serve.routes import (
    adapters,
    anthropic,
    health,
    judging,
    legacy_chatglm,
    ollama,
    openai_chat,
    openai_completions,
    openai_embeddings,
    openai_responses,
    page,
    tokens,
    vocabulary,
)
from hanlin.serve.service import Service
from hanlin.serve.settings import ServeConfig

__all__ = ["create_app"]

log = logging.getLogger("hanlin.serve")

ROUTERS = (
    health.router,
    openai_chat.router,
    openai_completions.router,
    openai_embeddings.router,
    openai_responses.router,
    tokens.router,
    vocabulary.router,
    judging.router,
    adapters.router,
    anthropic.router,
    ollama.router,
)


def create_app(config: ServeConfig) -> FastAPI:
    """An application that serves `config.models`. Its lifespan loads the first model and, at the end, unloads all."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await app.state.service.start()
        try:
            yield
        finally:
            await app.state.service.close()

    app = FastAPI(
        title="Hanlin",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
    )
    app.state.service = service = Service(config)
    chosen = [(page.router, config.page), (legacy_chatglm.router, config.legacy_chatglm)]
    for router in (*ROUTERS, *(router for router, wanted in chosen if wanted)):
        app.include_router(router)
    app.openapi = functools.cache(lambda: description(app, config))  # type: ignore[method-assign]
    app.add_middleware(Guard, config=config, rates=service.rates)
    for kind in (ApiError, HanlinError, RequestValidationError, HTTPException, DisconnectedError, Exception):
        app.add_exception_handler(kind, _answer)
    return app


async def _answer(request: Request, error: Exception) -> Response:
    """Any error as JSON."""
    if isinstance(error, DisconnectedError):
        return Response(status_code=499)  # nobody reads it
    answer = _described(error)
    if answer.status >= 500:
        log.error("%s: %s", request.scope["state"].get("request_id"), error, exc_info=error)
    body: Any = error_body(request.url.path, answer)
    return JSONResponse(body, answer.status, answer.headers)


def _described(error: Exception) -> ApiError:
    if isinstance(error, RequestValidationError):
        found = [_field(item) for item in error.errors()[:20]]
        first = error.errors()[0]["loc"]
        return ApiError(400, problems("request", found), code="invalid_request", param=_path(first) or None)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return describe(error)


def _field(item: Any) -> str:
    where = _path(item["loc"])
    return f"{where}: {item['msg']}" if where else str(item["msg"])


def _path(location: Any) -> str:
    return ".".join(str(part) for part in location if part != "body")[:200]

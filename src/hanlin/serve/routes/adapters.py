"""LoRA adapters, loaded and unloaded while the server runs; vLLM's routes.

No request names a file: an adapter is one of the directories under those that the operator allowed.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import PlainTextResponse, Response

from hanlin.serve.body import JsonRoute
from hanlin.serve.errors import ApiError
from hanlin.serve.service import service_of

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute, tags=["adapters"])


class LoadRequest(BaseModel):
    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1, max_length=1024)
    model: str = ""


class UnloadRequest(BaseModel):
    lora_name: str


@router.post("/v1/load_lora_adapter")
async def load_adapter(request: Request, body: LoadRequest) -> Response:
    """Load an adapter of `--adapter-directory` by the name of its folder."""
    service = service_of(request)
    folder = service.config.adapter_directory
    if folder is None:
        raise ApiError(403, "adapters can be loaded by requests only with --adapter-directory", code="not_allowed")
    found = await asyncio.to_thread(lambda: {p.name: p for p in folder.iterdir() if p.is_dir() and not p.is_symlink()})
    path = found.get(body.lora_path.rstrip("/"))
    if path is None:
        raise ApiError(
            404,
            f"no adapter folder {body.lora_path[:100]!r}; there are: {', '.join(sorted(found)[:50])}",
            param="lora_path",
        )
    async with await service.open(request, body.model) as call:
        if body.lora_name in service.models.names:
            raise ApiError(409, f"the name {body.lora_name!r} is taken", code="name_taken", param="lora_name")
        await asyncio.to_thread(call.llm.load_adapter, body.lora_name, path)
        service.models.add_adapter(body.lora_name, call.lease.served)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(request: Request, body: UnloadRequest) -> Response:
    """Unload an adapter; 409 while requests use it."""
    served = service_of(request).models.remove_adapter(body.lora_name)
    if served.llm is not None:
        unload: Any = served.llm.llm.unload_adapter
        try:
            await asyncio.to_thread(unload, body.lora_name)
        except BaseException:
            service_of(request).models.add_adapter(body.lora_name, served)
            raise
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

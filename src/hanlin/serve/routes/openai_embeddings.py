"""OpenAI's `/v1/embeddings`: hidden states of texts, pooled. See `LLM.embed` for what they are good for."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from hanlin.serve.body import JsonRoute
from hanlin.serve.errors import ApiError
from hanlin.serve.schemas.embeddings import EmbeddingBody, base64_of
from hanlin.serve.service import service_of

__all__ = ["router"]

router = APIRouter(tags=["openai"], route_class=JsonRoute)


@router.post("/v1/embeddings")
async def embeddings(request: Request, body: EmbeddingBody) -> dict[str, Any]:
    """Vectors of texts, or of ids."""
    if body.input == []:
        raise ApiError(400, "input is an empty list", param="input")
    async with await service_of(request).open(request, body.model) as call:
        size = call.llm.config.hidden_size
        if body.dimensions not in (None, size):
            raise ApiError(
                400,
                f"this model's vectors have {size} dimensions; it was not trained to have them shortened",
                code="unsupported_parameter",
                param="dimensions",
            )
        vectors, tokens = await call.embed(
            body.input, pool=body.pooling or "mean", normalize=body.normalize is not False
        )
        packed = body.encoding_format == "base64"
        data = [
            {"object": "embedding", "index": index, "embedding": base64_of(vector) if packed else vector}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": call.model, "usage": usage}

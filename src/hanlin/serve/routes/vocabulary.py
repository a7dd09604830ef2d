"""vLLM's `/tokenizer_info`: for clients that have no tokenizer of their own, like lm-eval's `remote` one."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from hanlin.serve.service import service_of

__all__ = ["router"]

router = APIRouter(tags=["tokens"])


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request, model: str = "") -> dict[str, Any]:
    """Special tokens as text, and sizes. There is no `chat_template`: `/apply-template` writes conversations."""
    async with await service_of(request).open(request, model) as call:
        tokenizer = call.llm.tokenizer

        def text(token: int | None) -> str | None:
            return None if token is None else tokenizer.token_text(token)

        return {
            "tokenizer_class": type(tokenizer).__name__,
            "bos_token": text(tokenizer.bos_id),
            "eos_token": text(tokenizer.eos_id),
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": call.llm.context_length,
        }

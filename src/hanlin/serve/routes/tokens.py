"""Tokens: what a text becomes, and how likely the model finds it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from hanlin.errors import RequestError
from hanlin.requests import prompts_of
from hanlin.serve.ask import Ask
from hanlin.serve.body import JsonRoute
from hanlin.serve.call import Call
from hanlin.serve.service import service_of
from hanlin.types import Score

__all__ = ["Prompt", "router", "token_scores"]

router = APIRouter(route_class=JsonRoute, tags=["tokens"])

Prompt = str | list[int]


class TokenizeRequest(BaseModel):
    """A text, or a conversation as the model would see it."""

    model: str = ""
    prompt: str | None = None
    content: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    parse_special: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    model: str = ""
    tokens: list[int]
    skip_special_tokens: bool = False


class TemplateRequest(BaseModel):
    model: str = ""
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None


class PerplexityRequest(BaseModel):
    """Prompts whose tokens are scored: a text, ids, or a list of either."""

    model: str = ""
    input: Prompt | list[Prompt]


class EncodeRequest(BaseModel):
    """LMDeploy's."""

    model: str = ""
    input: str | list[str]
    do_preprocess: bool = False
    add_bos: bool = True


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeRequest) -> dict[str, Any]:
    """The ids of a text or a conversation."""
    async with await service_of(request).open(request, body.model) as call:
        ids = await _ids(call, body)
        tokenizer = call.llm.tokenizer
        out: dict[str, Any] = {"tokens": list(ids), "count": len(ids), "max_model_len": call.llm.context_length}
        if body.return_token_strs:
            out["token_strs"] = [tokenizer.token_text(token) for token in ids]
        return out


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> dict[str, Any]:
    """The text of ids."""
    async with await service_of(request).open(request, body.model) as call:
        ids = call.llm.requests.encode(body.tokens)
        text = call.llm.tokenizer.decode(ids, skip_special=body.skip_special_tokens)
        return {"prompt": text, "content": text}


@router.post("/apply-template")
async def apply_template(request: Request, body: TemplateRequest) -> dict[str, Any]:
    """A conversation as the model would see it, as text and as ids."""
    async with await service_of(request).open(request, body.model) as call:
        ask = Ask(messages=body.messages, tools=body.tools)
        (job,) = await call.prepare(ask.jobs, slow=ask.slow)
        return {"prompt": call.llm.tokenizer.decode(job.ids, skip_special=False), "tokens": list(job.ids)}


@router.post("/get_ppl")
async def get_ppl(request: Request, body: PerplexityRequest) -> dict[str, Any]:
    """LMDeploy's: the mean negative log-probability of each prompt (the logarithm of its perplexity)."""
    async with await service_of(request).open(request, body.model) as call:
        scores = await token_scores(call, body.input)
        return {"ppl": [-found.total / (len(found.ids) - 1) if len(found.ids) > 1 else None for found in scores]}


@router.post("/v1/encode")
async def encode(request: Request, body: EncodeRequest) -> dict[str, Any]:
    """LMDeploy's: the ids of texts, and how many they are."""
    async with await service_of(request).open(request, body.model) as call:
        many = not isinstance(body.input, str)
        out = []
        for text in body.input if isinstance(body.input, list) else [body.input]:
            if body.do_preprocess:
                (job,) = await call.prepare(Ask(messages=[{"role": "user", "content": text}]).jobs)
                out.append(list(job.ids))
            else:
                out.append(call.llm.tokenizer.encode(text, add_special=body.add_bos, parse_special=True))
        return {
            "input_ids": out if many else out[0],
            "length": [len(ids) for ids in out] if many else len(out[0]),
        }


async def _ids(call: Call, body: TokenizeRequest) -> tuple[int, ...]:
    text = body.prompt if body.prompt is not None else body.content
    if (text is None) == (body.messages is None):
        raise RequestError("give either prompt (a text) or messages (a conversation)")
    if text is not None:
        encode = call.llm.tokenizer.encode
        return tuple(encode(text, add_special=body.add_special_tokens, parse_special=body.parse_special))
    ask = Ask(messages=body.messages, tools=body.tools)
    (job,) = await call.prepare(ask.jobs, slow=ask.slow)
    return job.ids


async def token_scores(call: Call, given: Any) -> list[Score]:
    """The log-probability of each token of prompts: a text, ids, or a list of either."""
    prompts = [call.llm.requests.encode(prompt) for prompt in prompts_of(given)]
    return [Score(ids=s.prompt, logprobs=(None, *s.prompt_logprobs)) for s in await call.look(prompts, score=True)]

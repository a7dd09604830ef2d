"""Judging: `/pooling`, `/rerank` and `/score` in the shapes of LMDeploy, vLLM, Jina and Cohere.

A reward model gives the reward of a conversation, in which a query is the question and a document the reply. Any other
model has no head for it: vectors of texts are compared instead, see `LLM.embed` for what they are good for.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import Field

from hanlin.errors import RequestError
from hanlin.serve.body import JsonRoute
from hanlin.serve.call import Call
from hanlin.serve.errors import ApiError
from hanlin.serve.routes.tokens import Prompt, token_scores
from hanlin.serve.schemas.embeddings import base64_of
from hanlin.serve.schemas.sampling import Body
from hanlin.serve.service import service_of

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute, tags=["judging"])

_MOST = 1 << 16  # texts that are read; fewer are judged, see `Limits.inputs`

Texts = str | Annotated[list[str], Field(max_length=_MOST)]


class Document(Body):
    """Jina's and Cohere's way to write a document."""

    text: str


class RerankBody(Body):
    """`return_documents` is true unless said otherwise, as Jina has it."""

    model: str | None = None
    query: str | Document
    documents: Annotated[list[str | Document], Field(min_length=1, max_length=_MOST)]
    top_n: Annotated[int, Field(ge=0)] | None = None
    return_documents: bool | None = None


class PoolingBody(Body):
    """`pooling` and `normalize` have a meaning for models without a reward head only."""

    model: str | None = None
    input: Prompt | list[Prompt] | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    pooling: Literal["mean", "last"] | None = None
    normalize: bool | None = None
    user: Any = None


class ScoreBody(Body):
    """Either `input`, whose tokens are scored, or vLLM's pairs of texts under any of its names for them."""

    model: str | None = None
    input: Prompt | list[Prompt] | None = None
    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None

    def pairs(self) -> list[tuple[str, str]]:
        """Raises:
        ApiError: texts that are missing, or lists that do not pair.
        """
        first, second = (
            value if isinstance(value, list) else [value]
            for value in (_one(self.text_1, self.queries), _one(self.text_2, self.documents))
            if value is not None
        )
        if len(first) == 1:
            first = first * len(second)
        if not second or len(first) != len(second):
            raise ApiError(
                400,
                f"{len(first)} first texts do not pair with {len(second)}: give one, or as many as of the others",
                param="text_1",
            )
        return list(zip(first, second, strict=True))


@router.post("/rerank")
@router.post("/v1/rerank")
@router.post("/v2/rerank")
async def rerank(request: Request, body: RerankBody) -> dict[str, Any]:
    """Documents by how well they answer a query, the best first."""
    query, *documents = (item.text if isinstance(item, Document) else item for item in (body.query, *body.documents))
    async with await service_of(request).open(request, body.model) as call:
        scores, tokens = await _relevance(call, [(query, document) for document in documents])
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n or None]
        shown = body.return_documents is not False
        results = [
            {
                "index": index,
                "relevance_score": scores[index],
                **({"document": {"text": documents[index]}} if shown else {}),
            }
            for index in order
        ]
        return {"id": _name("rerank"), "model": call.model, "results": results, "usage": _usage(tokens)}


@router.post("/pooling")
async def pooling(request: Request, body: PoolingBody) -> dict[str, Any]:
    """What the model makes of texts, ids or a conversation: a reward, a number; or else a vector.

    To a reward model a text is one that its chat template has written; its closing token is added where it is missing.
    """
    if (body.input is None) == (body.messages is None):
        raise ApiError(400, "give either input (a text, ids, or a list of either) or messages", param="input")
    if body.input == []:
        raise ApiError(400, "input is an empty list", param="input")
    async with await service_of(request).open(request, body.model) as call:
        requests = call.llm.requests
        values: list[Any]
        if requests.config.reward_id is not None:
            prompts = requests.judged(body.messages) if body.messages else requests.judged_as_is(body.input)
            values, tokens = await _rewards(call, prompts), sum(map(len, prompts))
        else:
            size = requests.config.hidden_size
            if body.dimensions not in (None, size):
                raise ApiError(400, f"this model's vectors have {size} dimensions", param="dimensions")
            given = [requests.shown(body.messages)] if body.messages else body.input
            values, tokens = await call.embed(given, pool=body.pooling or "last", normalize=body.normalize is not False)
            if body.encoding_format == "base64":
                values = [base64_of(value) for value in values]
        data = [{"index": index, "object": "pooling", "data": value} for index, value in enumerate(values)]
        return {**_head(call, "pool"), "data": data, "usage": _usage(tokens)}


@router.post("/score")
@router.post("/v1/score")
async def score(request: Request, body: ScoreBody) -> dict[str, Any]:
    """Log-probabilities of the tokens of `input` (the first has none); or how well second texts answer first ones."""
    paired = _one(body.text_1, body.queries) is not None and _one(body.text_2, body.documents) is not None
    if (body.input is None) != paired:
        raise ApiError(400, "give either input, or text_1 and text_2", param="input")
    async with await service_of(request).open(request, body.model) as call:
        if paired:
            scores, tokens = await _relevance(call, body.pairs())
            data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)]
        else:
            found = await token_scores(call, body.input)
            tokens = sum(len(each.ids) for each in found)
            data = [
                {
                    "index": index,
                    "tokens": list(each.ids),
                    "logprobs": list(each.logprobs),
                    "total": each.total,
                    "perplexity": each.perplexity if len(each.ids) > 1 else None,
                }
                for index, each in enumerate(found)
            ]
        return {**_head(call, "score"), "data": data, "usage": _usage(tokens)}


async def _relevance(call: Call, pairs: Sequence[tuple[str, str]]) -> tuple[list[float], int]:
    """A score for each (query, document), and how many tokens were read."""
    requests = call.llm.requests
    if requests.config.reward_id is not None:
        turns = [
            [{"role": "user", "content": query}, {"role": "assistant", "content": document}]
            for query, document in pairs
        ]
        prompts = requests.judged(turns)
        return await _rewards(call, prompts), sum(map(len, prompts))
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    vectors, tokens = await call.embed(texts)
    rows = dict(zip(texts, np.asarray(vectors, np.float64), strict=True))
    return [float(np.sum(rows[query] * rows[document])) for query, document in pairs], tokens


async def _rewards(call: Call, prompts: list[tuple[int, ...]]) -> list[float]:
    looked = await call.look(prompts, pool="value")
    return [float(each.pooled[0]) for each in looked if each.pooled is not None]


def _one(*values: Any) -> Any:
    given = [value for value in values if value is not None]
    if len(given) > 1:
        raise RequestError("text_1 is another word for queries, text_2 for documents: give one of each")
    return given[0] if given else None


def _head(call: Call, kind: str) -> dict[str, Any]:
    return {"id": _name(kind), "object": "list", "created": int(time.time()), "model": call.model}


def _name(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "total_tokens": tokens}

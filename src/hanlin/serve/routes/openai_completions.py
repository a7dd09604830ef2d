"""OpenAI's older `/v1/completions`: prompts in the model's own language, as text or ids."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from hanlin.engine.sequence import Sequence as Looked
from hanlin.requests import Job, prompts_of
from hanlin.serve.ask import Ask
from hanlin.serve.body import JsonRoute
from hanlin.serve.call import Call
from hanlin.serve.routes.openai_common import Head, ending, finished, salted, total_usage, usage_json
from hanlin.serve.schemas.completions import CompletionBody
from hanlin.serve.service import service_of
from hanlin.serve.stream import DONE, EventStream, event
from hanlin.types import Completion, Delta, Tokenizer, TokenLogprob, Usage

__all__ = ["CompletionChunks", "Opening", "completion_answer", "router"]

router = APIRouter(tags=["openai"], route_class=JsonRoute)


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionBody) -> Response:
    """Continue prompts."""
    body.check()
    ask = Ask(prompt=body.prompt, suffix=body.suffix, sampling=body.overrides())
    call = await service_of(request).open(request, body.model)
    try:
        jobs = salted(await call.prepare(lambda llm: ask.jobs(llm, call.lease.adapter), slow=ask.slow), body.cache_salt)
        head = Head.of(call, "cmpl-")
        openings = await _openings(call, body, jobs)
        if body.stream:
            chunks = CompletionChunks(head=head, body=body, openings=openings)
            deltas = _nothing() if body.max_tokens == 0 else await call.start(jobs, stream=True)
            return EventStream(call, chunks.pieces(deltas))
        done = [] if body.max_tokens == 0 else await call.complete(jobs)
        answer = completion_answer(head, body, openings, done)
        call.close()
        return JSONResponse(answer)
    except BaseException as error:
        call.close(error)
        raise


@dataclass(eq=False, kw_only=True)
class Opening:
    """What stands before the replies to one prompt.

    Attributes:
        text: the prompt, where it is to be echoed.
        tokens: its tokens with their log-probabilities, where those are asked for too; the first has none (NaN).
    """

    ids: tuple[int, ...]
    tokenizer: Tokenizer
    skip_special: bool
    text: str = ""
    tokens: tuple[TokenLogprob, ...] = ()


class _Offsets:
    """Where each token begins in the text of a choice."""

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._detokenizer = opening.tokenizer.detokenizer(skip_special=opening.skip_special)
        self._place = 0

    def opening(self) -> list[int]:
        out = self.take(token.id for token in self._opening.tokens)
        # The prompt's text is as it was given; its tokens may spell it otherwise.
        self._detokenizer = self._opening.tokenizer.detokenizer(skip_special=self._opening.skip_special)
        self._place = len(self._opening.text)
        return [min(place, self._place) for place in out]

    def take(self, ids: Iterable[int]) -> list[int]:
        out = []
        for token in ids:
            out.append(self._place)
            self._place += len(self._detokenizer.push([token]))
        return out


def completion_answer(
    head: Head, body: CompletionBody, openings: Sequence[Opening], completions: Sequence[Completion]
) -> dict[str, Any]:
    """The whole answer, not streamed. No completions: none were asked for."""
    choices: list[dict[str, Any]] = []
    for number, opening in enumerate(openings):
        found = [finished(done) for done in completions[number * body.replies : (number + 1) * body.replies]]
        shown = _best(found, body.n or 1) if completions else [None] * (body.n or 1)
        for done in shown:
            choices.append(_choice(len(choices), body, opening, done))
    if completions:
        usage = total_usage((done.index, done.usage) for done in completions)
    else:
        usage = usage_json(sum(len(opening.ids) for opening in openings), 0, 0)
    return {**head.json("text_completion"), "choices": choices, "usage": usage}


def _choice(index: int, body: CompletionBody, opening: Opening, done: Completion | None) -> dict[str, Any]:
    tokens = (*opening.tokens, *((done.logprobs or ()) if done else ()))
    logprobs = None
    if body.logprobs is not None:
        offsets = _Offsets(opening)
        places = [*offsets.opening(), *offsets.take(token.id for token in tokens[len(opening.tokens) :])]
        logprobs = _legacy(tokens, places)
    ids = {"token_ids": list(done.ids if done else ()), "prompt_token_ids": list(opening.ids)}
    return {
        "index": index,
        "text": opening.text + (done.text if done else ""),
        "logprobs": logprobs,
        "finish_reason": done.finish_reason if done else "length",
        **(ending(done) if done else {"stop_reason": None, "seed": body.seed}),
        **(ids if body.return_token_ids else {}),
    }


def _best(found: list[Completion], count: int) -> list[Completion | None]:
    """The replies of the highest mean log-probability, the best first; all, as drawn, where none is left out."""
    if len(found) <= count:
        return list(found)
    return list(sorted(found, key=lambda done: -_mean(done))[:count])


def _mean(done: Completion) -> float:
    values = [token.logprob for token in done.logprobs or ()]
    return sum(values) / len(values) if values else -math.inf


def _legacy(tokens: Sequence[TokenLogprob], offsets: list[int]) -> dict[str, Any]:
    """Log-probabilities as /v1/completions writes them: lists side by side; alternatives by their text."""
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [None if math.isnan(token.logprob) else _by_text(token) for token in tokens],
        "text_offset": offsets,
    }


def _by_text(token: TokenLogprob) -> dict[str, float | None]:
    out: dict[str, float | None] = {}
    for each in (*token.top, token):
        out.setdefault(each.text, _finite(each.logprob))
    return out


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else max(value, -9999.0)


@dataclass(eq=False, kw_only=True)
class CompletionChunks:
    """From deltas to server-sent chunks. Choices are numbered through all prompts."""

    head: Head
    body: CompletionBody
    openings: Sequence[Opening]
    usages: dict[int, Usage] = field(default_factory=dict)
    _offsets: dict[int, _Offsets] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options = self.body.stream_options
        self._usage = bool(options and options.include_usage)
        self._chunk = self.head.json("text_completion")

    async def pieces(self, deltas: AsyncIterator[list[tuple[int, Delta]]]) -> AsyncIterator[bytes]:
        if self.body.max_tokens == 0:
            yield b"".join(map(event, self._unanswered()))
        async for batch in deltas:
            data = b"".join(event(chunk) for number, delta in batch for chunk in self.chunks(number, delta))
            if data:
                yield data
        if self._usage:
            yield event({**self._chunk, "choices": [], "usage": self._total()})
        yield DONE

    def chunks(self, number: int, delta: Delta) -> list[dict[str, Any]]:
        """The chunks that a delta of the reply to prompt `number` is worth."""
        index, opening, out = number * self.body.replies + delta.index, self.openings[number], []
        offsets = self._offsets.get(index)
        if offsets is None:
            offsets = self._offsets[index] = _Offsets(opening)
            places = offsets.opening()
            if opening.text or opening.tokens or self.body.return_token_ids:
                first = self._of(index, opening.text, opening.tokens, places)
                if self.body.return_token_ids:
                    first["choices"][0].update({"prompt_token_ids": list(opening.ids), "token_ids": []})
                out.append(first)
        if delta.text or delta.logprobs or (delta.ids and self.body.return_token_ids):
            places = offsets.take(token.id for token in delta.logprobs)
            chunk = self._of(index, delta.text, delta.logprobs, places)
            if self.body.return_token_ids:
                chunk["choices"][0]["token_ids"] = list(delta.ids)
            out.append(chunk)
        if delta.done is not None:
            done = finished(delta.done)
            self.usages[index] = done.usage
            last = self._of(index, "", (), [], done.finish_reason)
            last["choices"][0].update(ending(done))
            out.append(last)
        return out

    def _unanswered(self) -> Iterable[dict[str, Any]]:
        for index in range(len(self.openings) * self.body.replies):
            opening = self.openings[index // self.body.replies]
            yield self._of(index, opening.text, opening.tokens, _Offsets(opening).opening(), "length")

    def _total(self) -> dict[str, Any]:
        if not self.usages:
            return usage_json(sum(len(opening.ids) for opening in self.openings), 0, 0)
        return total_usage((index % self.body.replies, usage) for index, usage in self.usages.items())

    def _of(
        self, index: int, text: str, tokens: Sequence[TokenLogprob], places: list[int], reason: str | None = None
    ) -> dict[str, Any]:
        logprobs = _legacy(tokens, places) if self.body.logprobs is not None and tokens else None
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**self._chunk, "choices": [choice], **({"usage": None} if self._usage else {})}


async def _openings(call: Call, body: CompletionBody, jobs: Sequence[Job]) -> list[Opening]:
    """One for each prompt; scored where the log-probabilities of its tokens are asked for."""
    tokenizer, skip = call.llm.tokenizer, body.skip_special_tokens is not False
    looked: list[Looked | None] = [None] * len(jobs)
    if body.echo and body.logprobs is not None:
        looked = list(await call.look([job.ids for job in jobs], score=True, top=body.logprobs))
    out = []
    for prompt, job, seen in zip(prompts_of(body.prompt), jobs, looked, strict=True):
        text = prompt if isinstance(prompt, str) else tokenizer.decode(job.ids, skip_special=skip)
        tokens = () if seen is None else tuple(_scored(tokenizer, seen))
        out.append(
            Opening(
                ids=job.ids,
                tokenizer=tokenizer,
                skip_special=skip,
                text=text if body.echo else "",
                tokens=tokens,
            )
        )
    return out


def _scored(tokenizer: Tokenizer, looked: Looked) -> Iterable[TokenLogprob]:
    """The prompt's tokens as if they had been drawn."""

    def named(token: int, logprob: float) -> TokenLogprob:
        return TokenLogprob(id=token, text=tokenizer.token_text(token), logprob=logprob)

    tops = [(), *looked.prompt_tops]
    for token, logprob, top in zip(looked.prompt, (math.nan, *looked.prompt_logprobs), tops, strict=True):
        alternatives = tuple(named(*each) for each in top)
        yield TokenLogprob(id=token, text=tokenizer.token_text(token), logprob=logprob, top=alternatives)


async def _nothing() -> AsyncIterator[list[tuple[int, Delta]]]:
    """No deltas."""
    for batch in list[list[tuple[int, Delta]]]():
        yield batch

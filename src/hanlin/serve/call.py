"""One request's way through the server: model, jobs, admission, engine, and back, until done or gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
from starlette.requests import Request

from hanlin.aio import Running
from hanlin.engine.sequence import Sequence
from hanlin.llm import LLM, or_raise
from hanlin.requests import Job
from hanlin.serve.admission import Ticket
from hanlin.serve.errors import ApiError, DisconnectedError
from hanlin.serve.keys import Key
from hanlin.serve.models import Lease
from hanlin.serve.observe import Observer, Outcome
from hanlin.serve.settings import Limits
from hanlin.types import Completion

__all__ = ["Call", "disconnected"]

T = TypeVar("T")

# Requests whose bodies are longer are tokenised in a thread, so that others' answers go on meanwhile.
_SHORT = 16 << 10


async def disconnected(request: Request) -> None:
    """Return when the client has gone. To be used after the body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


@dataclass(eq=False, kw_only=True)
class Call:
    """Made by `Service.open`; an async context manager. Leaving it ends whatever still runs.

    Attributes:
        id: of the request, for logs and answers.
        lease: keeps the model loaded. load_seconds: how long that took.
        compilers: threads for what may take long; their number bounds it.
    """

    id: str
    request: Request
    key: Key
    lease: Lease
    limits: Limits
    observer: Observer
    compilers: Executor
    began: float = field(default_factory=time.perf_counter)
    load_seconds: float = 0.0
    _detached: bool = False
    _ticket: Ticket | None = None
    _running: Running | None = None
    _outcome: Outcome | None = None

    async def __aenter__(self) -> Call:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    @property
    def llm(self) -> LLM:
        return self.lease.llm

    @property
    def model(self) -> str:
        """The name that the client used."""
        return self.lease.name

    def detach(self) -> None:
        """Go on when the client has gone: somebody will ask for the result in another request."""
        self._detached = True

    async def prepare(self, make: Callable[[LLM], Iterable[Job]], *, slow: bool = False) -> list[Job]:
        """Jobs made by `make`, which renders and tokenises; checked against the limits, with this key's salt.

        Args:
            slow: what it does may take seconds: it compiles a constraint, or looks at images.

        Raises:
            RequestError, ApiError: what is wrong with the request; nothing was started then.
        """
        if slow:
            jobs = await self.while_connected(self._compiled(make))
        else:
            jobs = await self._tokenised(lambda: list(make(self.llm)))
        return [self._checked(job, len(jobs)) for job in jobs]

    async def start(self, jobs: list[Job], *, stream: bool) -> Running:
        """Wait for a place and hand the jobs over; returns the iterator over (job's number, delta).

        Raises:
            ApiError: 429 when too many wait. DisconnectedError. RequestError, EngineError.
        """
        sequences = sum(job.sampling.n for job in jobs)
        tokens = sum(len(job.ids) + job.sampling.n * (job.sampling.max_tokens or 0) for job in jobs)
        await self._enter(sequences, tokens)
        self._outcome = self.observer.began(self, jobs)
        self._running = self.lease.engine.start(jobs, stream=stream, heard=self._outcome.note)
        return self._running

    async def complete(self, jobs: list[Job]) -> list[Completion]:
        """Run jobs to their ends; all completions, in the order of the jobs and of their n replies.

        Raises:
            as `start`, and ApiError 408 when it takes too long.
        """
        deltas = await self.start(jobs, stream=False)

        async def collect() -> list[Completion]:
            done = {(n, d.index): d.done async for batch in deltas for n, d in batch if d.done is not None}
            return [done[key] for key in sorted(done)]

        return await self.while_connected(collect())

    async def look(
        self,
        prompts: list[tuple[int, ...]],
        *,
        score: bool = False,
        top: int = 0,
        pool: Literal["mean", "last", "value"] | None = None,
    ) -> list[Sequence]:
        """Have prompts scored or pooled, see `RequestBuilder.looked_at`; the finished sequences.

        Args:
            top: alternatives to each scored token.

        Raises:
            as `complete`.
        """
        if len(prompts) > self.limits.inputs:
            raise ApiError(400, f"{len(prompts)} inputs; this server takes {self.limits.inputs} at once", param="input")
        most = self.limits.prompt_tokens
        if most is not None and any(len(ids) > most for ids in prompts):
            raise ApiError(400, f"this server takes inputs of {most} tokens", code="context_length_exceeded")
        loop = asyncio.get_running_loop()
        done: asyncio.Queue[Sequence | BaseException] = asyncio.Queue()

        def deliver(result: Sequence | BaseException) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(done.put_nowait, result)

        sequences = [
            self.llm.requests.looked_at(ids, deliver, score=score, pool=pool, adapter=self.lease.adapter)
            for ids in prompts
        ]
        for sequence in sequences:
            sequence.salt = self.key.salt
            sequence.sampling = replace(sequence.sampling, logprobs=top)
            self.llm.engine.check(sequence)
        await self._enter(len(sequences), sum(map(len, prompts)))

        async def collect() -> None:
            for _ in sequences:
                or_raise(await done.get())

        self.llm.thread.submit(sequences)
        try:
            await self.while_connected(collect())
        except BaseException:
            self.llm.thread.abort(sequences)
            raise
        self.observer.looked(self, sum(map(len, prompts)))
        return sequences

    async def embed(
        self, texts: Any, *, pool: Literal["mean", "last"] = "mean", normalize: bool = True
    ) -> tuple[list[list[float]], int]:
        """Embeddings of texts or ids, see `LLM.embed`, and how many tokens they have."""
        prompts = await self._tokenised(lambda: self.llm.requests.embedded(texts))
        rows = [s.pooled for s in await self.look(prompts, pool=pool) if s.pooled is not None]
        scales = [float(np.sqrt(np.square(row).sum())) or 1.0 if normalize else 1.0 for row in rows]
        found = [(row / scale).astype(np.float32).tolist() for row, scale in zip(rows, scales, strict=True)]
        return found, sum(map(len, prompts))

    async def while_connected(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, unless the client goes or time is up first; then it is cancelled.

        Raises:
            DisconnectedError. ApiError: 408.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait({task, gone}, timeout=self.seconds_left, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise DisconnectedError
            raise self.late()
        finally:
            for each in (task, gone):
                each.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    @property
    def seconds_left(self) -> float | None:
        """Until the request has taken too long; None without limit."""
        limit = self.limits.request_seconds
        return max(0.0, self.began + limit - time.perf_counter()) if limit else None

    def late(self) -> ApiError:
        return ApiError(408, f"the request took longer than {self.limits.request_seconds:g} s", code="timeout")

    def close(self, error: BaseException | None = None) -> None:
        """End what still runs, and give place and model back. May be called twice."""
        if self._running is not None:
            self._running.close()
        if self._outcome is not None:
            self.observer.ended(self, self._outcome, error)
            self._outcome = None
        self._leave()
        self.lease.release()

    async def _compiled(self, make: Callable[[LLM], Iterable[Job]]) -> list[Job]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.compilers, lambda: list(make(self.llm)))

    async def _tokenised(self, make: Callable[[], T]) -> T:
        long = int(self.request.headers.get("content-length") or _SHORT + 1) > _SHORT
        return await asyncio.to_thread(make) if long else make()

    async def _enter(self, sequences: int, tokens: int) -> None:
        """Wait for a place, giving back one that this request had for something else."""
        self._leave()
        admission = self.lease.admission
        self._ticket = admission.enter_now(self.key, sequences=sequences, tokens=tokens)
        if self._ticket is None:
            entering = admission.enter(self.key, sequences=sequences, tokens=tokens)
            self._ticket = await self.while_connected(entering)

    def _leave(self) -> None:
        if self._ticket is not None:
            self.lease.admission.leave(self._ticket)
            self._ticket = None

    async def _gone(self) -> None:
        if self._detached:
            await asyncio.get_running_loop().create_future()
        await disconnected(self.request)

    def _checked(self, job: Job, count: int) -> Job:
        sampling, limits, room = job.sampling, self.limits, self.llm.context_length - len(job.ids)
        if count * sampling.n > limits.completions:
            raise ApiError(
                400, f"{count} prompts times n = {sampling.n} exceed {limits.completions} completions", param="n"
            )
        if limits.prompt_tokens is not None and len(job.ids) > limits.prompt_tokens:
            raise ApiError(
                400,
                f"the prompt has {len(job.ids)} tokens, this server takes {limits.prompt_tokens}",
                code="context_length_exceeded",
                param="messages",
            )
        if (sampling.logprobs or 0) > limits.top_logprobs:
            raise ApiError(400, f"top_logprobs must be at most {limits.top_logprobs}", param="top_logprobs")
        if len(sampling.stop) > limits.stops or any(len(stop) > limits.stop_chars for stop in sampling.stop):
            raise ApiError(400, f"stop takes {limits.stops} texts of {limits.stop_chars} characters", param="stop")
        most = min(x for x in (sampling.max_tokens, limits.max_tokens, max(1, room)) if x is not None)
        return replace(
            job,
            sampling=replace(sampling, max_tokens=most, min_tokens=min(sampling.min_tokens, most)),
            salt=self.key.salt,
        )

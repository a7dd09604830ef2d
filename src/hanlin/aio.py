"""The facade, awaited."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

from hanlin.llm import LLM, load, or_raise
from hanlin.replies import Deliver
from hanlin.requests import Job
from hanlin.types import Completion, Delta, SamplingParams, Score

__all__ = ["AsyncLLM"]


class AsyncLLM:
    """`LLM`, awaited: `generate`, `chat` and `score` return the same, `stream` is an async iterator.

    Cancelling a task ends its requests within one step.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    @classmethod
    async def load(cls, model: str | os.PathLike[str] | None = None, **options: Any) -> AsyncLLM:
        """`hanlin.load` without blocking the event loop."""
        return cls(await asyncio.to_thread(load, model, **options))

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop the engine; running requests end with an error."""
        await asyncio.to_thread(self.llm.close)

    async def generate(
        self, prompts: Any, sampling: SamplingParams | None = None, **overrides: Any
    ) -> list[Completion]:
        """See `LLM.generate`."""
        return await self._complete(self.llm.requests.prompt_jobs(prompts, sampling, overrides))

    async def chat(
        self, messages: Any, sampling: SamplingParams | None = None, tools: Any = None, **overrides: Any
    ) -> Any:
        """See `LLM.chat`."""
        many, jobs = self.llm.requests.chat_jobs(messages, sampling, tools, overrides)
        out = await self._complete(jobs)
        return out if many else out[0]

    async def stream(
        self,
        messages: Any = None,
        sampling: SamplingParams | None = None,
        tools: Any = None,
        *,
        prompt: Any = None,
        **overrides: Any,
    ) -> AsyncIterator[Delta]:
        """See `LLM.stream`."""
        job = self.llm.requests.stream_job(messages, sampling, tools, prompt, overrides)
        async for _, delta in self._deltas([job], stream=True):
            yield delta

    async def score(self, prompts: Any) -> list[Score]:
        """See `LLM.score`."""
        return await asyncio.to_thread(self.llm.score, prompts)

    async def _complete(self, jobs: list[Job]) -> list[Completion]:
        done = {(n, d.index): d.done async for n, d in self._deltas(jobs, stream=False) if d.done is not None}
        return [done[key] for key in sorted(done)]

    async def _deltas(self, jobs: list[Job], *, stream: bool) -> AsyncIterator[tuple[int, Delta]]:
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Any] = asyncio.Queue()

        def deliver(number: int) -> Deliver:
            return lambda delta: _post(loop, inbox, (number, delta))

        make = self.llm.requests.sequences
        sequences = [s for n, job in enumerate(jobs) for s in make(job, stream=stream, deliver=deliver(n))]
        self.llm.thread.submit(sequences)
        left = len(sequences)
        try:
            while left:
                number, result = await inbox.get()
                delta: Delta = or_raise(result)
                left -= delta.done is not None
                yield number, delta
        finally:
            if left:
                self.llm.thread.abort(sequences)


def _post(loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[Any], item: Any) -> None:
    """Hand over from the engine's thread; a loop that has closed meanwhile wants nothing any more."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(inbox.put_nowait, item)

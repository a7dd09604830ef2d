"""The facade, awaited."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import Any

from hanlin.engine.sequence import Adapter, Sequence
from hanlin.judging import AsyncJudging
from hanlin.llm import LLM, load, or_raise
from hanlin.replies import Deliver
from hanlin.requests import Job, adapted
from hanlin.types import Completion, Delta, SamplingParams, Score
from hanlin.vision import opened

__all__ = ["AsyncLLM", "Running"]

Numbered = tuple[int, Delta]
Heard = Callable[[list[Numbered]], None]


class AsyncLLM(AsyncJudging):
    """`LLM`, awaited: `generate`, `chat` and `score` return the same, `stream` is an async iterator.

    Cancelling a task ends its requests within one step.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._post: _Post | None = None

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
        self, prompts: Any, sampling: SamplingParams | None = None, *, adapter: str | None = None, **overrides: Any
    ) -> list[Completion]:
        """See `LLM.generate`."""
        jobs = adapted(await asyncio.to_thread(self.llm.requests.prompt_jobs, prompts, sampling, overrides), adapter)
        return await self.start(jobs, stream=False).completions()

    async def chat(
        self,
        messages: Any,
        sampling: SamplingParams | None = None,
        tools: Any = None,
        *,
        adapter: str | None = None,
        **overrides: Any,
    ) -> Any:
        """See `LLM.chat`."""

        def make() -> tuple[bool, list[Job]]:  # in a thread: images, long prompts and constraints take their time
            return self.llm.requests.chat_jobs(opened(messages), sampling, tools, overrides)

        many, jobs = await asyncio.to_thread(make)
        out = await self.start(adapted(jobs, adapter), stream=False).completions()
        return out if many else out[0]

    async def stream(
        self,
        messages: Any = None,
        sampling: SamplingParams | None = None,
        tools: Any = None,
        *,
        prompt: Any = None,
        adapter: str | None = None,
        **overrides: Any,
    ) -> AsyncIterator[Delta]:
        """See `LLM.stream`. What came while the caller was busy comes as one delta."""

        def make() -> Job:
            return self.llm.requests.stream_job(opened(messages), sampling, tools, prompt, overrides)

        job = await asyncio.to_thread(make)
        jobs = adapted([job], adapter)
        running = self.start(jobs, stream=True)
        try:
            async for deltas in running:
                for _, delta in deltas:
                    yield delta
        finally:
            running.close()

    async def score(self, prompts: Any, *, adapter: str | None = None) -> list[Score]:
        """See `LLM.score`."""
        return await asyncio.to_thread(self.llm.score, prompts, adapter=adapter)

    async def load_adapter(self, name: str, path: str | os.PathLike[str]) -> Adapter:
        """See `LLM.load_adapter`."""
        return await asyncio.to_thread(self.llm.load_adapter, name, path)

    def unload_adapter(self, name: str) -> None:
        """See `LLM.unload_adapter`, which never waits."""
        self.llm.unload_adapter(name)

    def start(self, jobs: Iterable[Job], *, stream: bool, heard: Heard | None = None) -> Running:
        """Hand jobs to the engine; to be called in the event loop that will read the answers.

        Args:
            heard: is given what comes before the reader is.

        Raises:
            RequestError, EngineError: as `EngineThread.submit`; nothing was started then.
        """
        loop = asyncio.get_running_loop()
        if self._post is None or self._post.loop is not loop:
            listeners = self.llm.thread.listeners
            if self._post is not None:
                listeners.remove(self._post.send)
            self._post = _Post(loop)
            listeners.append(self._post.send)
        running = Running(self.llm, self._post, heard)
        running.submit(list(jobs), stream=stream)
        return running


class Running:
    """Jobs in the engine: an async iterator over lists of (job's number, delta), all that came since the last."""

    def __init__(self, llm: LLM, post: _Post, heard: Heard | None = None) -> None:
        self._llm, self._post, self._heard = llm, post, heard
        self._sequences: list[Sequence] = []
        self._left = 0
        self._came: list[tuple[int, Delta | BaseException]] = []
        self._waiter: asyncio.Future[None] | None = None

    def submit(self, jobs: list[Job], *, stream: bool) -> None:
        """Hand the jobs over."""

        def deliver(number: int) -> Deliver:
            return lambda delta: self._post.put(self, number, delta)

        make = self._llm.requests.sequences
        self._sequences = [s for n, job in enumerate(jobs) for s in make(job, stream=stream, deliver=deliver(n))]
        self._llm.thread.submit(self._sequences)
        self._left = len(self._sequences)

    def __aiter__(self) -> Running:
        return self

    async def __anext__(self) -> list[Numbered]:
        if not self._left:
            raise StopAsyncIteration
        try:
            while not self._came:
                self._waiter = self._post.loop.create_future()
                await self._waiter
            came, self._came = self._came, []
            deltas = _joined([(number, or_raise(result)) for number, result in came])
        except BaseException:
            self.close()
            raise
        self._left -= sum(delta.done is not None for _, delta in deltas)
        if self._heard is not None:
            self._heard(deltas)
        return deltas

    async def completions(self) -> list[Completion]:
        """All, in the order of the jobs and of their n replies."""
        done = {(n, d.index): d.done async for deltas in self for n, d in deltas if d.done is not None}
        return [done[key] for key in sorted(done)]

    def close(self) -> None:
        """End what still runs, within one step. May be called twice."""
        if self._left:
            self._left = 0
            self._llm.thread.abort(self._sequences)

    def put(self, number: int, result: Delta | BaseException) -> None:
        """In the event loop: something came."""
        self._came.append((number, result))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Post:
    """Carries results from the engine's thread to an event loop, waking it once for all that a step gives: else
    the two threads would take Python's lock from each other for every token.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._bag: deque[tuple[Running, int, Delta | BaseException]] = deque()
        self._called = False

    def put(self, receiver: Running, number: int, result: Delta | BaseException) -> None:
        self._bag.append((receiver, number, result))

    def send(self) -> None:
        """In the engine's thread: what was put is to be handed out."""
        if self.loop.is_closed():  # it wants nothing any more
            self._bag.clear()
        elif self._bag and not self._called:
            self._called = True
            self.loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._called = False  # before looking: what comes from now on calls again
        while self._bag:
            receiver, number, result = self._bag.popleft()
            receiver.put(number, result)


def _joined(deltas: list[Numbered]) -> list[Numbered]:
    """At most one delta for each reply, in the order in which they began."""
    if len(deltas) == 1:
        return deltas
    groups: dict[tuple[int, int], list[Delta]] = {}
    for number, delta in deltas:
        groups.setdefault((number, delta.index), []).append(delta)
    return [(number, group[0] if len(group) == 1 else _join(group)) for (number, _), group in groups.items()]


def _join(group: list[Delta]) -> Delta:
    return Delta(
        text="".join(d.text for d in group),
        ids=tuple(i for d in group for i in d.ids),
        tool_calls=tuple(c for d in group for c in d.tool_calls),
        logprobs=tuple(p for d in group for p in d.logprobs),
        index=group[0].index,
        done=group[-1].done,
    )

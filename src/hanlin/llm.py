"""The facade: `load` a model, then generate, chat, stream and score."""

from __future__ import annotations

import gc
import os
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hanlin import assembly
from hanlin.checkpoints.load import Loaded
from hanlin.engine.sequence import Adapter, Sequence
from hanlin.engine.thread import EngineThread
from hanlin.judging import Judging
from hanlin.options import EngineConfig
from hanlin.replies import Deliver
from hanlin.requests import Job, adapted
from hanlin.types import ChatFormat, Completion, Delta, SamplingParams, Score, Tool
from hanlin.vision import opened

if TYPE_CHECKING:
    from hanlin.hub import Report

__all__ = ["LLM", "load"]


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    config: EngineConfig | None = None,
    report: Report | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> LLM:
    """Load a model and start its engine.

    Args:
        model: a directory, a `.gguf` file, a hub id, a short name, or None for the default model.
        config, options: see `EngineConfig`; options override the config.
        report: where fetching reports its progress; standard error by default.
        progress: called with (bytes loaded, bytes in all).

    Raises:
        ModelNotFoundError, DownloadError, CheckpointError, ConfigError, TokenizerError, CapacityError.
    """
    from hanlin.hub import resolve

    settings = (config or EngineConfig()).override(**options)
    location = resolve(model, report=report)
    began = time.perf_counter()
    placement = assembly.place(settings)
    placement.prefix = Path(settings.ptuning_checkpoint) if settings.ptuning_checkpoint else None
    placement.adapter = Path(settings.adapter) if settings.adapter is not None else None
    with _uncollected():
        loaded = assembly.load(location.path, placement, progress)
        llm = LLM(loaded, settings, placement, path=location.path, name=location.id)
    try:
        for name, directory in (settings.adapters or {}).items():
            llm.load_adapter(name, directory)
    except BaseException:
        llm.close()
        raise
    llm.load_seconds = time.perf_counter() - began
    return llm


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector: it would look again and again at vocabularies that are being built."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class LLM(Judging):
    """A loaded model with its engine. Safe to use from several threads; a context manager.

    Attributes:
        tokenizer, config, name, path: of the model.
        default_sampling: what is used where the caller gives none: the model's own recommendation.
        context_length: tokens of prompt and reply together at most.
        load_seconds: how long loading took.
    """

    def __init__(
        self, loaded: Loaded, settings: EngineConfig, placement: assembly.Placement, *, path: Path, name: str
    ) -> None:
        self.path, self.name, self.config = path, name, loaded.config
        self.load_seconds = 0.0
        self.requests = assembly.requests(loaded, settings, path, placement.context)
        self.tokenizer = self.requests.tokenizer
        self.default_sampling = self.requests.defaults
        self.engine = assembly.engine(loaded, settings, placement, self.requests.rope)
        self.requests.adapters.runner = self.engine.runner
        self.context_length = self.engine.capacity
        self.thread = EngineThread(self.engine)
        self._cache = placement.cache

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine; running requests end with an error. May be called twice."""
        self.thread.close()
        if self._cache:
            self._cache.close()

    @property
    def chat_format(self) -> ChatFormat:
        """How this model writes conversations.

        Raises:
            ChatFormatError: for a base model, which has no such thing.
        """
        return self.requests.format()

    @property
    def sees(self) -> bool:
        """Whether messages may hold images."""
        return self.requests.vision is not None

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The LoRA adapters that requests can ask for, by name."""
        return self.requests.adapters.loaded

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> Adapter:
        """Load a LoRA adapter, as PEFT saves them, from a directory; requests ask for it with `adapter=name`.

        May be called while requests run.

        Raises:
            ConfigError: a name that is none, or taken.
            ModelNotFoundError, CheckpointError: no adapter there, or none that fits this model.
        """
        return self.requests.adapters.load(name, path)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Requests that run with it finish with it; its memory comes back with the last of them.

        Raises:
            RequestError: there is none of this name.
        """
        self.requests.adapters.unload(name)

    def generate(
        self, prompts: Any, sampling: SamplingParams | None = None, *, adapter: str | None = None, **overrides: Any
    ) -> list[Completion]:
        """Continue prompts: a string, ids, or a list of either. All run together; the order is kept.

        A string is a prompt in the model's own language: special tokens in it are special. Use `chat` for text
        from users. With n > 1 the n completions of a prompt follow each other.

        Raises:
            RequestError: a prompt or sampling value that cannot be; nothing was started then.
        """
        return self._complete(adapted(self.requests.prompt_jobs(prompts, sampling, overrides), adapter))

    def chat(
        self,
        messages: Any,
        sampling: SamplingParams | None = None,
        tools: Iterable[Tool | Mapping[str, Any]] | None = None,
        *,
        adapter: str | None = None,
        **overrides: Any,
    ) -> Any:
        """Answer a conversation (a string, or messages), or a list of conversations.

        A conversation without a system message gets the model's own default one, see `EngineConfig.system_prompt`.
        `adapter` names a LoRA adapter that is loaded, see `load_adapter`. A model that sees takes parts of a message
        like {"type": "image", "image": path, bytes or a Pillow image}.

        Returns:
            One Completion for one conversation, a list of them for a list or for n > 1.

        Raises:
            RequestError: messages or sampling values that cannot be; nothing was started then.
        """
        many, jobs = self.requests.chat_jobs(opened(messages), sampling, tools, overrides)
        out = self._complete(adapted(jobs, adapter))
        return out if many else out[0]

    def stream(
        self,
        messages: Any = None,
        sampling: SamplingParams | None = None,
        tools: Iterable[Tool | Mapping[str, Any]] | None = None,
        *,
        prompt: Any = None,
        adapter: str | None = None,
        **overrides: Any,
    ) -> Iterator[Delta]:
        """As `chat` for one conversation, or as `generate` for one `prompt`, piece by piece.

        Closing the iterator, or Ctrl-C, ends the reply within one step.
        """
        (job,) = adapted([self.requests.stream_job(opened(messages), sampling, tools, prompt, overrides)], adapter)
        return self._stream(job)

    def score(self, prompts: Any, *, adapter: str | None = None) -> list[Score]:
        """Log-probabilities of the tokens of prompts (a string, ids, or a list of either) under the model."""
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        sequences = self.requests.scored(prompts, results.put, adapter)
        self._run(sequences, results)
        return [Score(ids=s.prompt, logprobs=(None, *s.prompt_logprobs)) for s in sequences]

    def stats(self) -> dict[str, float]:
        """Seconds to load, peak memory of the process in bytes, and the state of the engine's blocks."""
        return {
            "load_seconds": self.load_seconds,
            "peak_memory_bytes": assembly.peak_memory(),
            "blocks": self.engine.blocks.count,
            "free_blocks": self.engine.blocks.free,
            "steps": self.engine.steps,
        }

    def _complete(self, jobs: list[Job]) -> list[Completion]:
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        done: dict[tuple[int, int], Completion] = {}

        def deliver(number: int) -> Deliver:
            def put(delta: Delta | BaseException) -> None:
                if isinstance(delta, Delta) and delta.done:
                    done[number, delta.index] = delta.done
                results.put(delta)

            return put

        make = self.requests.sequences
        self._run([s for n, job in enumerate(jobs) for s in make(job, stream=False, deliver=deliver(n))], results)
        return [done[key] for key in sorted(done)]

    def _run(self, sequences: list[Sequence], results: queue.SimpleQueue[Any]) -> None:
        """Submit all, wait for all; whatever ends the wait ends the sequences."""
        self.thread.submit(sequences)
        try:
            for _ in sequences:
                or_raise(results.get())
        except BaseException:
            self.thread.abort(sequences)
            raise

    def _stream(self, job: Job) -> Iterator[Delta]:
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        sequences = self.requests.sequences(job, stream=True, deliver=results.put)
        self.thread.submit(sequences)
        left = len(sequences)
        try:
            while left:
                delta: Delta = or_raise(results.get())
                left -= delta.done is not None
                yield delta
        finally:
            if left:
                self.thread.abort(sequences)


def or_raise(result: Any) -> Any:
    """A result, unless it is an error."""
    if isinstance(result, BaseException):
        raise result
    return result

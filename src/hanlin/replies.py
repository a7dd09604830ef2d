"""From tokens to text: detokenising, stop texts, tool calls and log-probabilities of one reply, as its tokens come."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Ids
from typing import TYPE_CHECKING

from hanlin.types import Completion, Delta, ReplyEvent, ReplyParser, Timings, Tokenizer, TokenLogprob, ToolCall, Usage

if TYPE_CHECKING:
    from hanlin.engine.sequence import Sampled, Sequence
    from hanlin.types import SamplingParams

__all__ = ["Plain", "Reply", "ScoreSink", "StopTexts"]

Deliver = Callable[["Delta | BaseException"], None]


class Plain:
    """A `ReplyParser` for text that is nothing but text."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool) -> None:
        self._detokenizer = tokenizer.detokenizer(skip_special=skip_special)

    def push(self, ids: Ids[int]) -> list[ReplyEvent]:
        return [ReplyEvent(text=self._detokenizer.push(ids))]

    def finish(self) -> list[ReplyEvent]:
        return [ReplyEvent(text=self._detokenizer.finish())]


class StopTexts:
    """Finds the first stop text in a stream, holding back what may be the start of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.found: str | None = None
        self._held = ""

    def push(self, text: str, *, search: bool = True) -> str:
        """The text that is settled; after a stop text was found, nothing more."""
        if self.found is not None or not self.stops:
            return text if self.found is None else ""
        self._held += text
        if not search:
            return self._release(len(self._held))
        places = [(place, stop) for stop in self.stops if (place := self._held.find(stop)) >= 0]
        if places:
            place, self.found = min(places, key=lambda p: (p[0], -len(p[1])))
            out, self._held = self._held[:place], ""
            return out
        keep = max(self._overlap(stop) for stop in self.stops)
        return self._release(len(self._held) - keep)

    def finish(self) -> str:
        """What was held back, when the stream ended otherwise."""
        return self._release(len(self._held))

    def _overlap(self, stop: str) -> int:
        """The longest end of the held text that starts `stop`."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if stop.startswith(self._held[-length:]):
                return length
        return 0

    def _release(self, count: int) -> str:
        out, self._held = self._held[:count], self._held[count:]
        return out


class Reply:
    """The `Sink` of one sequence. Delivers a Delta a token when streaming, and always one that is `done`.

    With `one_call` the reply ends behind its first tool call.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        parser: ReplyParser,
        sampling: SamplingParams,
        stop_ids: frozenset[int],
        seed: int,
        index: int,
        stream: bool,
        deliver: Deliver,
        one_call: bool = False,
    ) -> None:
        self._tokenizer, self._parser, self._sampling = tokenizer, parser, sampling
        self._stop_ids, self._seed, self._index = stop_ids, seed, index
        self._stream, self._deliver, self._one_call = stream, deliver, one_call
        self._stops = StopTexts(sampling.stop)
        self._text: list[str] = []
        self._calls: list[ToolCall] = []
        self._logprobs: list[TokenLogprob] = []
        self._count = 0

    def token(self, sampled: Sampled) -> str | None:
        """Take one token; returns the stop text that it completed."""
        self._count += 1
        ids = [] if sampled.id in self._stop_ids else [sampled.id]
        text, calls = self._take(self._parser.push(ids))
        logprobs: tuple[TokenLogprob, ...] = ()
        if self._sampling.logprobs is not None:
            logprobs = (self._logprob(sampled),)
            self._logprobs += logprobs
        if self._stream:
            self._deliver(Delta(text=text, ids=(sampled.id,), tool_calls=calls, logprobs=logprobs, index=self._index))
        return "" if self._one_call and self._calls else self._stops.found

    def finish(self, sequence: Sequence) -> None:
        text, calls = "", tuple[ToolCall, ...]()
        if self._stops.found is None:
            text, calls = self._take(self._parser.finish())
            rest = self._stops.finish()
            self._text.append(rest)
            text += rest
        self._deliver(Delta(text=text, tool_calls=calls, index=self._index, done=self._completion(sequence)))

    def error(self, error: BaseException) -> None:
        self._deliver(error)

    def _take(self, events: list[ReplyEvent]) -> tuple[str, tuple[ToolCall, ...]]:
        text, calls = "", list[ToolCall]()
        for event in events:
            text += self._stops.push(event.text, search=self._count >= self._sampling.min_tokens)
            full = self._one_call and (self._calls or calls)
            if event.tool_call is not None and self._stops.found is None and not full:
                calls.append(event.tool_call)
        self._text.append(text)
        self._calls += calls
        return text, tuple(calls)

    def _logprob(self, sampled: Sampled) -> TokenLogprob:
        def named(token: int, logprob: float) -> TokenLogprob:
            return TokenLogprob(id=token, text=self._tokenizer.token_text(token), logprob=logprob)

        assert sampled.logprob is not None
        top = tuple(named(token, logprob) for token, logprob in sampled.top)
        return TokenLogprob(
            id=sampled.id, text=self._tokenizer.token_text(sampled.id), logprob=sampled.logprob, top=top
        )

    def _completion(self, sequence: Sequence) -> Completion:
        end = sequence.finished or time.perf_counter()
        started, first = sequence.started or end, sequence.first_token or end
        reason = sequence.finish_reason or "abort"
        return Completion(
            text="".join(self._text),
            ids=tuple(sequence.generated),
            finish_reason="tool_calls" if self._calls and reason == "stop" else reason,
            logprobs=None if self._sampling.logprobs is None else tuple(self._logprobs),
            tool_calls=tuple(self._calls),
            usage=Usage(
                prompt_tokens=len(sequence.prompt),
                cached_tokens=sequence.cached,
                generated_tokens=len(sequence.generated),
            ),
            timings=Timings(queue=started - sequence.arrived, prompt=first - started, generation=end - first),
            seed=self._seed,
            index=self._index,
            stop=None if sequence.stop == "" else sequence.stop,
        )


class ScoreSink:
    """The `Sink` of a sequence that generates nothing: delivers the sequence itself."""

    def __init__(self, deliver: Callable[[Sequence | BaseException], None]) -> None:
        self._deliver = deliver

    def token(self, sampled: Sampled) -> str | None:
        raise AssertionError("such a sequence draws nothing")

    def finish(self, sequence: Sequence) -> None:
        self._deliver(sequence)

    def error(self, error: BaseException) -> None:
        self._deliver(error)

"""The engine: schedule, run, sample, again. One thread calls it; `EngineThread` is that thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hanlin.engine.batch import Batch
from hanlin.engine.blocks import BlockManager
from hanlin.engine.runner import Output, Runner
from hanlin.engine.sampler import choose, logprob_of
from hanlin.engine.scheduler import Scheduled, Scheduler
from hanlin.engine.sequence import Sampled, Sequence
from hanlin.engine.speculative import Drafter
from hanlin.errors import ContextLengthError
from hanlin.types import FinishReason

__all__ = ["Engine", "EngineLimits"]

_FORCED = 16  # tokens that a guide leaves no choice about, checked in one step
_TELLING = 32  # tokens; the time of shorter steps is that of reading the weights
_UNHURRIED = 8  # times as long may a step be that keeps nobody's answer waiting: larger steps are faster


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """
    Attributes:
        blocks: blocks of the pool, each of `block_size` tokens.
        max_context: tokens of one sequence at most, prompt and reply.
        max_sequences: sequences in one step at most.
        max_step_tokens: tokens in one step at most (a bidirectional prefix may exceed it).
        prefix_caching: keep computed blocks for texts that start alike.
        step_seconds: how long prompts may make a step last while others decode, and eight times as long while nobody
            does; every other step three times that, for prompts that end with it. 0 does not look.
    """

    blocks: int
    block_size: int
    max_context: int
    max_sequences: int = 64
    max_step_tokens: int = 2048
    prefix_caching: bool = True
    step_seconds: float = 0.0


class Pace:
    """How many tokens of prompts a step can have in a given time, from the steps that were mostly prompts."""

    def __init__(self) -> None:
        self._seconds = 0.0  # of a token, in steps that are long enough to tell

    def note(self, tokens: int, sequences: int, seconds: float) -> None:
        """A step of so many tokens of so many sequences took so long."""
        if tokens >= max(_TELLING, 5 * sequences):  # where few tokens come of each, they decode: that costs otherwise
            each = seconds / tokens
            self._seconds = each if not self._seconds else 0.8 * self._seconds + 0.2 * each

    def tokens_in(self, seconds: float) -> int | None:
        """Tokens that fit; None while nothing is known or nothing is asked."""
        return max(_TELLING, int(seconds / self._seconds)) if seconds and self._seconds else None


class Engine:
    """Continuous batching over a runner. Not thread-safe: see `EngineThread`."""

    def __init__(self, runner: Runner, limits: EngineLimits, drafter: Drafter | None = None) -> None:
        self.runner = runner
        self.drafter = drafter
        self._pace = Pace()
        self.limits = limits
        self.blocks = BlockManager(limits.blocks, limits.block_size, caching=limits.prefix_caching)
        self.scheduler = Scheduler(
            self.blocks, max_sequences=limits.max_sequences, max_step_tokens=limits.max_step_tokens
        )
        self.steps = self.proposed = self.accepted = 0

    @property
    def capacity(self) -> int:
        """Tokens that one sequence can have at most: what the model was made for, and what the pool holds."""
        return min(self.limits.max_context, self.limits.blocks * self.limits.block_size - self.runner.soft_len)

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    def used_bytes(self) -> dict[str, int]:
        """Bytes of the weights, and of the blocks of the cache that have ever been used."""
        return {
            "weights": self.runner.weight_bytes,
            "cache": self.blocks.most_used * self.runner.block_bytes,
        }

    def check(self, sequence: Sequence) -> None:
        """Raises:
        ContextLengthError: when the prompt leaves no room for a reply.
        """
        room = self.capacity - int(sequence.generates)
        if not sequence.prompt:
            raise ContextLengthError("the prompt is empty: give at least one token")
        if len(sequence.prompt) > room:
            why = "the model's context" if self.capacity == self.limits.max_context else "the KV cache"
            raise ContextLengthError(
                f"the prompt has {len(sequence.prompt)} tokens, {why} holds {self.capacity}, and the reply needs one. "
                "Shorten it, or raise session_len or the cache's size."
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that `check` has passed."""
        self.check(sequence)
        sequence.soft_len = self.runner.soft_len
        self.scheduler.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """End a sequence now; its blocks come back at once."""
        if sequence.finish_reason is None:
            self._finish(sequence, "abort")

    def step(self, computing: Callable[[], None] = lambda: None) -> None:
        """Schedule, run, sample once, and tell the sinks.

        Args:
            computing: is called just before the run; where there is nothing to run, too.
        """
        if self.drafter:
            decoding = [s for s in self.scheduler.running if s.remaining == 1 and s.generates]
            for sequence in decoding:
                sequence.draft = []
            self.drafter.propose(decoding)
            for sequence in decoding:
                forced = sequence.guide.forced()[:_FORCED] if sequence.guide else []
                if len(forced) > len(sequence.draft):
                    sequence.draft = forced
        seconds = self.limits.step_seconds * (1 if self.scheduler.decoding else _UNHURRIED)
        scheduled = self.scheduler.schedule(self._pace.tokens_in(seconds))
        if not scheduled:
            computing()
            return
        now = time.perf_counter()
        for sequence, _ in scheduled:
            sequence.started = sequence.started or now
        batch = Batch.build(scheduled, self.limits.block_size)
        computing()
        output = self.runner.run(batch)
        self._pace.note(len(batch.ids), len(scheduled), time.perf_counter() - now)
        self.steps += 1
        self._advance(scheduled, output)

    def fail(self, error: BaseException) -> None:
        """Tell everybody that the engine is gone."""
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            self._fail(sequence, error)

    def check_integrity(self) -> None:
        """Assert that no block is lost or held twice."""
        self.blocks.check_integrity([*self.scheduler.running, *self.scheduler.waiting])

    def _advance(self, scheduled: Scheduled, output: Output) -> None:
        logits, hidden = output
        best = logits.argmax(-1) if len(logits) else np.zeros(0, np.int64)
        row = state = 0
        for sequence, count in scheduled:
            if sequence.score_prompt:
                self._score(sequence, logits[row : row + count])
                row += count
            elif sequence.pool == "mean":
                self._add_up(sequence, hidden[state : state + count])
                state += count
            elif sequence.computed + count < len(sequence):
                sequence.computed += count
                self.blocks.register(sequence)
            elif sequence.pool == "last":
                self._pool(sequence, hidden[state])
                state += 1
            elif sequence.pool == "value":
                self._pool(sequence, logits[row])
                row += 1
            else:
                rows = 1 + len(sequence.draft)
                self._draw(sequence, logits[row : row + rows], best[row : row + rows])
                row += rows

    def _draw(self, sequence: Sequence, logits: NDArray[np.float32], best: NDArray[np.int64]) -> None:
        """Choose tokens row by row for as long as the draft had guessed them; each as if it were alone."""
        draft, sequence.draft = sequence.draft, []
        sequence.computed = len(sequence)
        self.blocks.register(sequence)
        sequence.proposed += len(draft)
        self.proposed += len(draft)
        for place, (row, top) in enumerate(zip(logits, best, strict=True)):
            if place:  # the row before this one chose what was guessed, and the guess is computed
                sequence.computed += 1
                sequence.accepted += 1
                self.accepted += 1
                self.blocks.register(sequence)
            sampled = choose(row, sequence, int(top))
            if sampled is None:
                self._finish(sequence, "stop")
                return
            if not isinstance(sampled, Sampled):
                self._fail(sequence, sampled)
                return
            self._append(sequence, sampled)
            if sequence.finish_reason or place == len(draft) or sampled.id != draft[place]:
                return

    def _append(self, sequence: Sequence, sampled: Sampled) -> None:
        sampling, token = sequence.sampling, sampled.id
        sequence.generated.append(token)
        sequence.first_token = sequence.first_token or time.perf_counter()
        if token in sequence.stop_ids:  # the sampler forbids them before min_tokens
            sequence.stop = token
            sequence.sink.token(sampled)
            self._finish(sequence, "stop")
            return
        text = sequence.sink.token(sampled)
        if text is not None and len(sequence.generated) >= sampling.min_tokens:
            sequence.stop = text
            self._finish(sequence, "stop")
        elif sequence.guide is not None and sequence.guide.advance(token):
            self._finish(sequence, "stop")
        elif len(sequence.generated) == sampling.max_tokens or len(sequence) >= self.capacity:
            self._finish(sequence, "length")

    def _score(self, sequence: Sequence, logits: NDArray[np.float32]) -> None:
        start, sequence.computed = sequence.computed, sequence.computed + len(logits)
        del sequence.prompt_logprobs[start:], sequence.prompt_tops[start:]  # a preempted sequence begins anew
        for row, token in zip(logits, sequence.prompt[start + 1 :], strict=False):
            logprob, top = logprob_of(row, token, sequence.sampling.logprobs or 0)
            sequence.prompt_logprobs.append(logprob)
            sequence.prompt_tops.append(top)
        if not sequence.remaining:
            self._finish(sequence, "length")

    def _add_up(self, sequence: Sequence, states: NDArray[np.float32]) -> None:
        """The mean, added up token by token: the same however the prompt was cut."""
        if sequence.pooled is None or not sequence.computed:
            sequence.pooled = np.zeros(states.shape[1])
        for state in states:
            sequence.pooled += state
        sequence.computed += len(states)
        if not sequence.remaining:
            sequence.pooled /= len(sequence)
            self._finish(sequence, "length")

    def _pool(self, sequence: Sequence, row: NDArray[np.float32]) -> None:
        sequence.computed = len(sequence)
        self.blocks.register(sequence)
        sequence.pooled = row.astype(np.float64)
        self._finish(sequence, "length")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self.scheduler.remove(sequence)
        sequence.finish_reason = reason
        sequence.finished = time.perf_counter()
        sequence.sink.finish(sequence)

    def _fail(self, sequence: Sequence, error: BaseException) -> None:
        self.scheduler.remove(sequence)
        sequence.finish_reason = "abort"
        sequence.sink.error(error)

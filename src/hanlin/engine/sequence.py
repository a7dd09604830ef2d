"""One request's tokens and state; what is odd about its family is data here, not code elsewhere."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from hanlin.types import FinishReason, SamplingParams

__all__ = ["Adapter", "Given", "PositionRule", "Sampled", "Sequence", "Sink", "Status", "arange_positions"]

PositionRule = Callable[[int, int], "NDArray[np.int64]"]


def arange_positions(start: int, stop: int) -> NDArray[np.int64]:
    """Positions of tokens start..stop of an ordinary causal model, (1, stop - start)."""
    return np.arange(start, stop, dtype=np.int64)[None]


@dataclass(eq=False, kw_only=True)
class Adapter:
    """Low-rank additions to a model, in the form that its runner wants.

    Attributes:
        held: the runner's own.
        nbytes: its size in memory.
        key: what tells it from all others; cached blocks are shared only within one adapter.
        path, rank: where it came from, and its largest rank.
    """

    held: Any
    nbytes: int
    key: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    path: Path = Path()
    rank: int = 0


@dataclass(frozen=True, eq=False)
class Given:
    """Rows (N, D) float32 that stand in for the embeddings of tokens start..start + N; other rows have another key."""

    start: int
    rows: NDArray[np.float32]
    key: bytes


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token, its log-probability under the model's own distribution, and the best alternatives."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Guide(Protocol):
    """Says which tokens may come next in one sequence.

    Attributes:
        allowed: (V,) booleans, for the next token; stop ids count only through `may_end`.
        may_end: whether the sequence may end here.
        error: why it cannot go on, or "".
    """

    allowed: NDArray[np.bool_]
    may_end: bool
    error: str

    def advance(self, token: int) -> bool:
        """Take the token that was chosen; returns whether nothing is left but to end."""

    def forced(self) -> list[int]:
        """The tokens that follow in any case."""


class Sink(Protocol):
    """Who receives a sequence's tokens. Called from the engine's thread; must not block."""

    def token(self, sampled: Sampled) -> str | None:
        """A new token. Returns the stop text that it completed, to end the sequence there, or None."""

    def finish(self, sequence: Sequence) -> None:
        """No more tokens; `sequence.finish_reason`, `sequence.stop` and the times are set."""

    def error(self, error: BaseException) -> None:
        """The sequence failed; no more calls follow."""


@dataclass(eq=False, kw_only=True)
class Sequence:
    """
    Attributes:
        prompt: the given ids.
        stop_ids: ids that end it; empty when `ignore_eos` and no stop ids were asked for.
        bad_ids: id sequences that must not appear.
        guide: which tokens may come next; None for all.
        seed: of the random numbers; one number is drawn for each (seed, place).
        positions: the family's rule; `prefix_len` first tokens see each other both ways and are computed in one step.
        soft_len: slots in front of its tokens that hold the model's soft prefix, which no token of it counts.
        rope_length: what fixes dynamic RoPE, see `RopeConfig.dynamic_length`.
        salt: sequences share cached blocks only with equal salts.
        adapter: what the model adds for it, if anything.
        given: what stands in for embeddings of its tokens, such as images.
        score_prompt: report the log-probability of every prompt token, and `sampling.logprobs` alternatives to each.
        pool: generate nothing, but report in `pooled`, as float64: the last token's hidden state (D,), the mean of all
            tokens' (D,), or the value that the head of a reward model gives the last (1,).
        follows: start only after this one has computed its prompt, to find it in the cache.
        blocks: the pool's blocks that hold its keys and values.
        computed: tokens whose keys and values are in the pool.
        draft: guesses at the next tokens, to be checked in the next step; never part of the text.
        proposed, accepted: guesses checked so far, and those that were right.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams
    sink: Sink
    stop_ids: frozenset[int] = frozenset()
    bad_ids: tuple[tuple[int, ...], ...] = ()
    guide: Guide | None = None
    seed: int = 0
    positions: PositionRule = arange_positions
    prefix_len: int = 0
    soft_len: int = 0
    rope_length: int = 0
    salt: bytes = b""
    adapter: Adapter | None = None
    given: tuple[Given, ...] = ()
    score_prompt: bool = False
    pool: Literal["last", "mean", "value"] | None = None
    follows: Sequence | None = None

    status: Status = Status.WAITING
    generated: list[int] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    pooled: NDArray[np.float64] | None = None
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    computed: int = 0
    draft: list[int] = field(default_factory=list)
    proposed: int = 0
    accepted: int = 0
    cached: int = 0
    preemptions: int = 0
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first_token: float | None = None
    finished: float | None = None

    def __len__(self) -> int:
        """Tokens known so far: prompt and generated."""
        return len(self.prompt) + len(self.generated)

    @property
    def remaining(self) -> int:
        """Known tokens that are not computed yet; 1 while decoding."""
        return len(self) - self.computed

    @property
    def generates(self) -> bool:
        """Whether it goes on with the prompt, rather than looking at it only."""
        return not self.score_prompt and self.pool is None

    @property
    def needs_all(self) -> bool:
        """Whether every prompt token's own result is wanted, so that none can come from the cache."""
        return self.score_prompt or self.pool == "mean"

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens start..stop of the known ones and, behind them, of the draft."""
        border, known = len(self.prompt), len(self)
        out = list(self.prompt[start:stop]) if start < border else []
        out += self.generated[max(0, start - border) : max(0, stop - border)]
        return out + self.draft[max(0, start - known) : stop - known] if stop > known else out

    def ready(self) -> bool:
        """Whether it need not wait for the sequence that it follows."""
        first = self.follows
        return first is None or first.status is Status.FINISHED or first.computed >= len(first.prompt)

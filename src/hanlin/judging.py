"""Judging instead of writing: rewards of conversations, best of n replies, and embeddings of texts.

Source of the scores' meaning: InternLM2-Reward's model card.
"""

from __future__ import annotations

import asyncio
import math
import queue
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from hanlin.engine.sequence import Sequence as Tokens
from hanlin.errors import RequestError
from hanlin.requests import RequestBuilder, conversations_of
from hanlin.types import BestOf, Completion, Message, SamplingParams, ranks

if TYPE_CHECKING:
    from hanlin.llm import LLM

__all__ = ["AsyncJudging", "Judging", "Reward"]

Pooling = Literal["mean", "last"]


class RewardModel(Protocol):
    """Whatever scores conversations: an `LLM` with a reward model, for one."""

    def reward(self, conversations: Any) -> list[float]: ...


Reward = RewardModel | Callable[[list[list[Message]]], Sequence[float]]


class Judging(ABC):
    """The part of `LLM` that judges. All of it goes through the engine, so that a score or an embedding has the same
    bytes whatever else runs.
    """

    requests: RequestBuilder

    @abstractmethod
    def chat(self, messages: Any, sampling: SamplingParams | None = None, tools: Any = None, **overrides: Any) -> Any:
        """Answer a conversation."""

    @abstractmethod
    def _run(self, sequences: list[Tokens], results: queue.SimpleQueue[Any]) -> None:
        """Submit all and wait for all."""

    def reward(self, conversations: Any) -> list[float]:
        """How good a reward model finds the replies: a score for each conversation (messages, or a list of such).

        Scores have no scale of their own; they compare replies to the same question.

        Raises:
            RequestError: a model without a reward head, or messages that cannot be; nothing was started then.
        """
        return [float(value[0]) for value in self._pooled(self.requests.judged(conversations), "value")]

    def get_score(self, conversation: Any) -> float:
        """The score of one conversation."""
        many, _ = conversations_of(conversation)
        if many:
            raise RequestError("get_score takes one conversation; use get_scores for a list of them")
        return self.reward(conversation)[0]

    def get_scores(self, conversations: Any) -> list[float]:
        """As `reward`."""
        return self.reward(conversations)

    def compare(self, first: Any, second: Any, return_logits: bool = False) -> bool | tuple[float, float]:
        """Whether the first conversation scores higher; or both scores."""
        one, two = self.reward([first, second])
        return (one, two) if return_logits else one > two

    def rank(self, conversations: Any, return_logits: bool = False) -> list[int] | list[float]:
        """Each conversation's place, 0 for the highest score; or the scores."""
        scores = self.reward(conversations)
        return scores if return_logits else ranks(scores)

    def best_of(
        self,
        messages: Any,
        sampling: SamplingParams | None = None,
        *,
        reward: Reward,
        n: int = 10,
        **overrides: Any,
    ) -> BestOf:
        """Draw n replies to one conversation, have `reward` judge them, and return the best; ties go to the earlier.

        Args:
            reward: an `LLM` with a reward model, or a function from a list of conversations, each ending with one of
                the replies, to as many scores. Conversations are those of the caller: a default system prompt, which
                `chat` puts in front, is not shown to it.
            sampling, overrides: as for `chat`; the same seed gives the same result.

        Raises:
            RequestError: greedy sampling, which draws n times the same; or scores that are not n finite numbers.
        """
        params = self.requests.sampling(sampling, {**overrides, "n": n})
        if n > 1 and params.temperature == 0:
            raise RequestError("best_of would draw the same reply n times at temperature 0; give temperature=0.8, say")
        many, (conversation, *_) = conversations_of(messages)
        if many:
            raise RequestError("best_of takes one conversation")
        if isinstance(reward, Judging):
            reward.requests.judged(conversation)  # what is wrong is said before the work
        found = self.chat(conversation, params)
        candidates: list[Completion] = found if isinstance(found, list) else [found]
        judged = [[*conversation, _as_message(candidate)] for candidate in candidates]
        scores = list(reward.reward(judged) if hasattr(reward, "reward") else reward(judged))
        if len(scores) != len(judged) or not all(math.isfinite(score) for score in scores):
            raise RequestError(f"the reward must give {len(judged)} finite scores, one a reply; it gave {scores!r}")
        best = candidates[ranks(scores).index(0)]
        same = {field.name: getattr(best, field.name) for field in fields(best)}
        return BestOf(
            **same,
            score=float(scores[best.index]),
            candidates=tuple(candidates),
            scores=tuple(float(score) for score in scores),
        )

    def embed(self, texts: Any, pooling: Pooling = "mean", normalize: bool = True) -> NDArray[np.float32]:
        """Vectors (N, D) of texts (a string, ids, or a list of either): hidden states after the final norm.

        A chat model was never trained to put like texts near each other: its vectors tell topics apart and serve as
        features for a classifier, but for searching, a model made for embeddings finds more. Special tokens in texts
        are plain text here.

        Args:
            pooling: the mean over all tokens (the begin token included), or the last token's state.
            normalize: scale each vector to length 1.

        Raises:
            RequestError: texts or a pooling that cannot be; nothing was started then.
        """
        if pooling not in ("mean", "last"):
            raise RequestError(f"pooling must be 'mean' or 'last', not {pooling!r}")
        rows = self._pooled(self.requests.embedded(texts), pooling)
        if normalize:
            rows = [row / (float(np.sqrt(np.square(row).sum())) or 1.0) for row in rows]
        return np.asarray(rows, np.float32).reshape(len(rows), self.requests.config.hidden_size)

    def _pooled(
        self, prompts: Iterable[tuple[int, ...]], pool: Literal["mean", "last", "value"]
    ) -> list[NDArray[np.float64]]:
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        sequences = [self.requests.looked_at(ids, results.put, pool=pool) for ids in prompts]
        self._run(sequences, results)
        return [sequence.pooled for sequence in sequences if sequence.pooled is not None]


class AsyncJudging:
    """The same, awaited."""

    llm: LLM

    async def reward(self, conversations: Any) -> list[float]:
        """See `LLM.reward`."""
        return await asyncio.to_thread(self.llm.reward, conversations)

    async def get_score(self, conversation: Any) -> float:
        """See `LLM.get_score`."""
        return await asyncio.to_thread(self.llm.get_score, conversation)

    async def get_scores(self, conversations: Any) -> list[float]:
        """See `LLM.get_scores`."""
        return await self.reward(conversations)

    async def compare(self, first: Any, second: Any, return_logits: bool = False) -> bool | tuple[float, float]:
        """See `LLM.compare`."""
        return await asyncio.to_thread(self.llm.compare, first, second, return_logits)

    async def rank(self, conversations: Any, return_logits: bool = False) -> list[int] | list[float]:
        """See `LLM.rank`."""
        return await asyncio.to_thread(self.llm.rank, conversations, return_logits)

    async def best_of(
        self, messages: Any, sampling: SamplingParams | None = None, *, reward: Reward, n: int = 10, **overrides: Any
    ) -> BestOf:
        """See `LLM.best_of`; the reward runs in a thread."""
        return await asyncio.to_thread(self.llm.best_of, messages, sampling, reward=reward, n=n, **overrides)

    async def embed(self, texts: Any, pooling: Pooling = "mean", normalize: bool = True) -> NDArray[np.float32]:
        """See `LLM.embed`."""
        return await asyncio.to_thread(self.llm.embed, texts, pooling, normalize)


def _as_message(completion: Completion) -> Message:
    return Message(role="assistant", content=completion.text, tool_calls=completion.tool_calls)

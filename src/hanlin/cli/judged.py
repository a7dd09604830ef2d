"""`hanlin chat --best-of N --reward MODEL`: every reply is the best of several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hanlin.types import ChatFormat, Delta, SamplingParams

if TYPE_CHECKING:
    from hanlin.llm import LLM

__all__ = ["Judged"]


class Judged:
    """A `Model` for a chat, over one that writes and one that judges. Replies come whole."""

    def __init__(self, writer: LLM, judge: LLM, n: int) -> None:
        self._writer, self._judge, self._n = writer, judge, n
        self.name = f"{writer.name}, best of {n} by {judge.name}"
        self.default_sampling, self.context_length = writer.default_sampling, writer.context_length

    @property
    def chat_format(self) -> ChatFormat:
        return self._writer.chat_format

    def stats(self) -> Mapping[str, Any]:
        return self._writer.stats()

    def stream(self, messages: Any, sampling: SamplingParams | None = None) -> Iterator[Delta]:
        best = self._writer.best_of(messages, sampling, reward=self._judge, n=self._n)
        yield Delta(text=best.text, ids=best.ids, done=best)

"""What is told of requests: one line of log each."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hanlin.types import Completion, Delta

if TYPE_CHECKING:
    from hanlin.requests import Job
    from hanlin.serve.call import Call

__all__ = ["Observer", "Outcome"]

log = logging.getLogger("hanlin.serve")


@dataclass(eq=False, kw_only=True)
class Outcome:
    """What came of a request so far. Times by `time.perf_counter`."""

    prompt_tokens: int
    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float | None = None
    tokens: int = 0
    completions: list[Completion] = field(default_factory=list)

    def note(self, deltas: list[tuple[int, Delta]]) -> None:
        """These came."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        for _, delta in deltas:
            self.tokens += len(delta.ids)
            if delta.done is not None:
                self.completions.append(delta.done)


class Observer:
    """Hears of every request that reached an engine."""

    def began(self, call: Call, jobs: list[Job]) -> Outcome:
        """The jobs are handed to the engine."""
        return Outcome(prompt_tokens=sum(len(job.ids) for job in jobs))

    def looked(self, call: Call, tokens: int) -> None:
        """Prompts were scored or pooled; nothing was generated."""
        log.info("%s key=%s model=%s looked_at=%d", call.id, call.key.name, call.model, tokens)

    def ended(self, call: Call, outcome: Outcome, error: BaseException | None) -> None:
        """The request is over, one way or another."""
        log.info(
            "%s key=%s model=%s prompt=%d generated=%d seconds=%.3f%s",
            call.id,
            call.key.name,
            call.model,
            outcome.prompt_tokens,
            sum(done.usage.generated_tokens for done in outcome.completions) or outcome.tokens,
            time.perf_counter() - call.began,
            f" error={error}" if error else "",
        )

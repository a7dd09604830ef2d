"""What is told of requests: a line of log, metrics, a trace."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hanlin.serve.errors import DisconnectedError
from hanlin.serve.keys import Rates
from hanlin.serve.metrics import Metrics
from hanlin.serve.tracing import Tracer
from hanlin.types import Completion, Delta

if TYPE_CHECKING:
    from hanlin.requests import Job
    from hanlin.serve.call import Call
    from hanlin.serve.models import Models
    from hanlin.serve.settings import ServeConfig

__all__ = ["Observer", "Outcome"]

log = logging.getLogger("hanlin.serve")


@dataclass(eq=False, kw_only=True)
class Outcome:
    """What came of a request so far. Times by `time.perf_counter`."""

    jobs: list[Job]
    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    tokens: int = 0
    completions: list[Completion] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether all replies came to their ends."""
        return len(self.completions) == sum(job.sampling.n for job in self.jobs)

    def note(self, deltas: list[tuple[int, Delta]]) -> None:
        """These came."""
        self.first = self.first or time.perf_counter()
        for _, delta in deltas:
            self.tokens += len(delta.ids)
            if delta.done is not None:
                self.completions.append(delta.done)


class Observer:
    """Hears of every request that reached an engine. Prompts and replies are told only where that was asked for."""

    def __init__(self, config: ServeConfig, models: Models, rates: Rates) -> None:
        self._rates = rates
        self.metrics = Metrics(models)
        self._prompts = config.log_prompts
        self._tracer = Tracer(config.trace_endpoint) if config.trace_endpoint else None

    def close(self) -> None:
        """Send what is left to be told."""
        if self._tracer is not None:
            self._tracer.close()

    def began(self, call: Call, jobs: list[Job]) -> Outcome:
        """The jobs are handed to the engine."""
        return Outcome(jobs=jobs)

    def looked(self, call: Call, tokens: int) -> None:
        """Prompts were scored or pooled; nothing was generated."""
        self._rates.spend(call.key, tokens)
        self.metrics.looked(call.lease.served.name, tokens)

    def ended(self, call: Call, outcome: Outcome, error: BaseException | None) -> None:
        """The request is over, one way or another."""
        now, prompts = time.perf_counter(), sum(len(job.ids) for job in outcome.jobs)
        generated = (
            sum(done.usage.generated_tokens for done in outcome.completions) if outcome.whole else outcome.tokens
        )
        self.metrics.ended(
            call.lease.served.name,
            outcome,
            arrived=call.began,
            ended=now,
            failed=error is not None or not outcome.whole,
        )
        self._rates.spend(call.key, prompts + generated)
        fields = {
            "request_id": call.id,
            "key": call.key.name,
            "model": call.model,
            "prompt_tokens": prompts,
            "generated_tokens": generated,
            "queue_seconds": round(outcome.started - call.began, 4),
            "first_token_seconds": None if outcome.first is None else round(outcome.first - call.began, 4),
            "seconds": round(now - call.began, 4),
            "end": _end(outcome, error),
        }
        if self._prompts:
            decode = call.llm.tokenizer.decode
            fields["prompts"] = [decode(job.ids, skip_special=False) for job in outcome.jobs]
            fields["replies"] = [done.text for done in outcome.completions]
        log.info("%s", " ".join(f"{name}={value}" for name, value in fields.items()), extra={"fields": {**fields}})
        if self._tracer is not None:
            self._tracer.tell(fields, seconds=now - call.began)


def _end(outcome: Outcome, error: BaseException | None) -> str:
    if isinstance(error, DisconnectedError) or (error is None and not outcome.whole):
        return "disconnected"
    if error is not None:
        return f"error: {error}"
    return ",".join(sorted({done.finish_reason for done in outcome.completions}))

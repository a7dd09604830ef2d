"""The numbers behind a reply: speed, waiting, memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hanlin.cli.generation import Reply

__all__ = ["Stats"]


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Seconds, tokens, tokens per second, bytes; None for what is not known."""

    load_seconds: float | None
    prompt_tokens: int | None
    cached_tokens: int | None
    prompt_tokens_per_second: float | None
    first_token_seconds: float | None
    generated_tokens: int
    generated_tokens_per_second: float | None
    peak_memory_bytes: int | None

    @classmethod
    def of(cls, reply: Reply, model: Mapping[str, Any]) -> Stats:
        """`model` is `LLM.stats()`."""
        done = reply.completion
        usage, times = (done.usage, done.timings) if done else (None, None)
        computed = usage.prompt_tokens - usage.cached_tokens if usage else 0
        # The first token comes out of the prompt's computation; generating makes the others.
        rest = times.generation if times else reply.seconds - (reply.first or 0.0)
        return cls(
            load_seconds=model.get("load_seconds"),
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=usage.cached_tokens if usage else None,
            prompt_tokens_per_second=_rate(computed, times.prompt if times else 0.0),
            first_token_seconds=reply.first,
            generated_tokens=reply.tokens,
            generated_tokens_per_second=_rate(reply.tokens - 1, rest),
            peak_memory_bytes=int(model.get("peak_memory_bytes") or 0) or None,
        )

    def rows(self) -> list[tuple[str, str]]:
        """Names and values for a person; without what is not known."""
        prompt = None
        if self.prompt_tokens is not None:
            prompt = _with_rate(f"{self.prompt_tokens} tokens", self.prompt_tokens_per_second)
            prompt += f", {self.cached_tokens} of them cached" if self.cached_tokens else ""
        found = {
            "load": _seconds(self.load_seconds),
            "prompt": prompt,
            "first token": _seconds(self.first_token_seconds),
            "reply": _with_rate(f"{self.generated_tokens} tokens", self.generated_tokens_per_second),
            "peak memory": None if self.peak_memory_bytes is None else f"{self.peak_memory_bytes / 1e6:,.0f} MB",
        }
        return [(name, value) for name, value in found.items() if value is not None]

    def text(self) -> str:
        """A table, a line each."""
        return "\n".join(f"{name:<12} {value}" for name, value in self.rows())

    def line(self) -> str:
        """All of it in one line, without the loading."""
        return " · ".join(f"{name}: {value}" for name, value in self.rows() if name != "load")


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens > 0 and seconds > 0 else None


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f} s"


def _with_rate(what: str, rate: float | None) -> str:
    return what if rate is None else f"{what} at {rate:,.1f} tokens/s"

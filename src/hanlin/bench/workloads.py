"""What is measured: so many prompts of so many tokens, continued by so many."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hanlin.errors import ConfigError, problems

__all__ = ["FIGURES", "SHORT", "Figure", "Workload", "prompts", "usual"]

SHORT = 32  # tokens of a prompt where generating is what matters


class Figure(NamedTuple):
    """One number of a workload. `faster` is the direction that is better."""

    title: str
    higher_is_better: bool = True


FIGURES: Mapping[str, Figure] = {
    "prompt": Figure("prompt tokens/s"),
    "first": Figure("first token, ms", higher_is_better=False),
    "generation": Figure("generated tokens/s"),
    "together": Figure("generated tokens/s, prompts included"),
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`sequences` prompts of `prompt` tokens at once, each continued by a first token and `tokens` more."""

    sequences: int = 1
    prompt: int = SHORT
    tokens: int = 0

    def __post_init__(self) -> None:
        found = [
            f"{name} must be at least {least}, not {value}"
            for name, value, least in (
                ("sequences", self.sequences, 1),
                ("prompt", self.prompt, 1),
                ("tokens", self.tokens, 0),
            )
            if value < least
        ]
        if found:
            raise ConfigError(problems("workload", found))

    @property
    def title(self) -> str:
        many = "1 sequence" if self.sequences == 1 else f"{self.sequences} sequences"
        return f"{many}, {self.prompt} + {self.tokens} tokens" if self.tokens else f"{many}, prompt of {self.prompt}"

    @property
    def figures(self) -> tuple[str, ...]:
        """Names in `FIGURES` of what it tells."""
        if not self.tokens:
            return ("prompt", "first")
        return ("generation",) if self.sequences == 1 else ("generation", "together")

    def values(self, first: float, total: float, tokens: int) -> dict[str, float]:
        """Its figures, of a run's times in seconds: see `child.Times`."""
        if not self.tokens:
            return {"prompt": self.sequences * self.prompt / first, "first": first * 1e3}
        rates = {"generation": tokens / (total - first), "together": self.sequences * (self.tokens + 1) / total}
        return {name: rates[name] for name in self.figures}


def usual(*, prompt: int, tokens: int, sequences: Sequence[int]) -> list[Workload]:
    """A prompt alone, and each number of sequences together."""
    return [Workload(prompt=prompt), *(Workload(sequences=count, tokens=tokens) for count in sequences)]


def prompts(workload: Workload, run: int, *, vocabulary: int, special: frozenset[int]) -> list[list[int]]:
    """Random ids, the same for every engine, and new for every sequence and run, so that no cache can know them."""
    ordinary = [i for i in range(vocabulary) if i not in special]
    draw = random.Random(f"{workload.title}, run {run}")
    return [draw.choices(ordinary, k=workload.prompt) for _ in range(workload.sequences)]

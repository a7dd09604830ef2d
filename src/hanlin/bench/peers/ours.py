"""Hanlin itself."""

from __future__ import annotations

import time
from typing import Any

REQUIRES = "hanlin.llm"
ENVIRONMENT: dict[str, str] = {}


def load(model: str, settings: dict[str, Any]) -> Engine:
    return Engine(model, settings)


class Engine:
    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        import hanlin
        from hanlin.llm import load

        # Random prompts make a small model repeat itself, which is easily guessed: that would flatter us.
        options = {"speculation": "off", **settings["options"]}
        self.llm = load(
            model,
            threads=settings["threads"],
            max_batch_size=settings["sequences"],
            enable_prefix_caching=False,
            **options,
        )
        self.facts = {
            "version": hanlin.__version__,
            "runner": self.llm.engine.runner.name,
            "vocabulary": self.llm.config.vocab_size,
            "special": sorted(self.llm.tokenizer.special_ids),
            **self.llm.engine.used_bytes(),
        }

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[float, float, int]:
        began = time.perf_counter()
        done = self.llm.generate(prompts, max_tokens=tokens + 1, ignore_eos=True, temperature=0)
        total = time.perf_counter() - began
        self.facts.update(self.llm.engine.used_bytes())
        if not tokens:
            return total, total, 0
        firsts = [c.timings.queue + c.timings.prompt for c in done]
        first = max(firsts)
        # Sequences that began earlier had tokens before that: each is taken to generate evenly.
        after = sum(
            tokens * max(0.0, own + c.timings.generation - first) / c.timings.generation
            for own, c in zip(firsts, done, strict=True)
        )
        return first, total, round(after)

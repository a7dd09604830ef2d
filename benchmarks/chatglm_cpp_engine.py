"""chatglm.cpp as an engine of `hanlin.bench`: one sequence at a time, greedily, past any end."""

from __future__ import annotations

import time
from typing import Any

REQUIRES = "chatglm_cpp"
ENVIRONMENT: dict[str, str] = {}


def load(model: str, settings: dict[str, Any]) -> Engine:
    return Engine(model, settings)


class Engine:
    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        import chatglm_cpp

        # The number of its threads is its own choice, min(cores, 16); Hanlin is given as many.
        self.lib = chatglm_cpp
        self.pipeline = chatglm_cpp.Pipeline(model, max_length=settings["length"])
        self.options = chatglm_cpp._C.GenerationConfig(max_length=settings["length"], do_sample=False)
        self.facts = {"version": chatglm_cpp.__version__}

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[float, float, int]:
        (ids,) = prompts
        ids, start, past = list(ids), len(ids), 0
        began = first = time.perf_counter()
        for number in range(tokens + 1):
            chosen = self.pipeline.model.generate_next_token(ids, None, self.options, past, start)
            past = len(ids)
            ids.append(chosen)
            if not number:
                first = time.perf_counter()
        return first - began, time.perf_counter() - began, tokens

"""Transformers in bfloat16: its model and cache in a plain loop, which is faster than its own `generate`."""

from __future__ import annotations

import inspect
import time
from typing import Any

REQUIRES = "transformers"
ENVIRONMENT: dict[str, str] = {}


def load(model: str, settings: dict[str, Any]) -> Engine:
    return Engine(model, settings)


class Engine:
    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        from pathlib import Path

        import torch
        import transformers

        torch.set_num_threads(settings["threads"])
        path = Path(model)
        place = {"gguf_file": path.name} if path.is_file() else {}
        self.torch, self.cache = torch, transformers.DynamicCache
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent if path.is_file() else path, dtype=torch.bfloat16, **place, **settings["options"]
        ).eval()
        taken = inspect.signature(self.model.forward).parameters
        self.name = "cache" if "cache" in taken else "past_key_values"  # renamed in Transformers 5.24
        self.facts = {"version": f"{transformers.__version__}, torch {torch.__version__}"}

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[float, float, int]:
        cache = self.cache(config=self.model.config)
        began = time.perf_counter()
        first = 0.0
        with self.torch.inference_mode():
            ids = self.torch.tensor(prompts)
            for _ in range(tokens + 1):
                logits = self.model(ids, **{self.name: cache}, use_cache=True, logits_to_keep=1).logits
                ids = logits[:, -1].argmax(-1, keepdim=True)
                first = first or time.perf_counter() - began
        return first, time.perf_counter() - began, tokens * len(prompts)

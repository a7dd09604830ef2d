"""llama.cpp, through the low-level interface of llama-cpp-python."""

from __future__ import annotations

import time
from typing import Any

REQUIRES = "llama_cpp"
ENVIRONMENT: dict[str, str] = {}


def load(model: str, settings: dict[str, Any]) -> Engine:
    return Engine(model, settings)


class Engine:
    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        import llama_cpp

        self.lib, self.settings = llama_cpp, settings
        self.lib.llama_backend_init()
        parameters = self.lib.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(model.encode(), parameters)
        if not self.model:
            raise ValueError(f"llama.cpp cannot read {model}")
        self.greedy = self.lib.llama_sampler_init_greedy()
        self.context: Any = None
        self.batch: Any = None
        self.shape = (0, 0)
        self.facts = {"version": llama_cpp.__version__}

    def open(self, sequences: int, length: int) -> None:
        """A context for so many sequences of that length, each with a cache of its own, as is fastest."""
        if self.shape == (sequences, length):
            return
        if self.context:
            self.lib.llama_free(self.context)
            self.lib.llama_batch_free(self.batch)
        parameters = self.lib.llama_context_default_params()
        parameters.n_seq_max = sequences
        parameters.n_ctx = sequences * (-(-length // 256) * 256)
        parameters.n_batch = sequences * length
        parameters.n_threads = parameters.n_threads_batch = self.settings["threads"]
        for name, value in self.settings["options"].items():
            setattr(parameters, name, value)
        self.context = self.lib.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise ValueError(f"llama.cpp has no context for {sequences} sequences of {length} tokens")
        self.batch = self.lib.llama_batch_init(parameters.n_batch, 0, 1)
        self.shape = (sequences, length)

    def step(self, rows: list[list[int]], start: int) -> list[int]:
        """The next token of every sequence after `rows`, which begin at place `start`."""
        batch, count = self.batch, 0
        for sequence, row in enumerate(rows):
            for place, token in enumerate(row, start):
                batch.token[count], batch.pos[count] = token, place
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, sequence
                batch.logits[count] = False
                count += 1
            batch.logits[count - 1] = True
        batch.n_tokens = count
        status = self.lib.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        last = -1
        out = []
        for row in rows:
            last += len(row)
            out.append(self.lib.llama_sampler_sample(self.greedy, self.context, last))
        return out

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[float, float, int]:
        length = len(prompts[0])
        self.open(len(prompts), length + tokens + 1)
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        began = time.perf_counter()
        chosen = self.step(prompts, 0)
        first = time.perf_counter() - began
        for place in range(length, length + tokens):
            chosen = self.step([[token] for token in chosen], place)
        return first, time.perf_counter() - began, tokens * len(prompts)

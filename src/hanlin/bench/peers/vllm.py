"""vLLM's CPU backend, compiled, in bfloat16 unless its options say otherwise."""

from __future__ import annotations

import time
from typing import Any

REQUIRES = "vllm"
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its memory then counts as this process's
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it keeps a core for a server that isn't there
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def load(model: str, settings: dict[str, Any]) -> Engine:
    return Engine(model, settings)


class Engine:
    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        import torch
        import vllm

        options = {
            "dtype": "bfloat16",
            "enable_prefix_caching": False,
            "max_num_seqs": settings["sequences"],
            "max_model_len": settings["length"],
            "skip_tokenizer_init": True,
            **settings["options"],
        }
        self.vllm = vllm
        self.engine = vllm.LLM(model, **options).llm_engine
        torch.set_num_threads(settings["threads"])
        self.requests = 0
        self.facts = {"version": vllm.__version__}

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[float, float, int]:
        sampling = self.vllm.SamplingParams(temperature=0, max_tokens=tokens + 1, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        for prompt in prompts:
            self.requests += 1
            self.engine.add_request(str(self.requests), {"prompt_token_ids": prompt}, sampling)
        seen: dict[str, int] = {}
        first, before = 0.0, 0
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                seen[output.request_id] = len(output.outputs[0].token_ids)
            if not first and len(seen) == len(prompts):
                first, before = time.perf_counter() - began, sum(seen.values())
        return first, time.perf_counter() - began, len(prompts) * (tokens + 1) - before

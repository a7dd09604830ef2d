"""OpenVINO GenAI, by its continuous batching."""

from __future__ import annotations

import time
from typing import Any

REQUIRES = "openvino_genai"
ENVIRONMENT: dict[str, str] = {}


def load(model: str, settings: dict[str, Any]) -> Engine:
    return Engine(model, settings)


class Engine:
    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_seqs = settings["sequences"]
        scheduler.cache_size = 2
        for name, value in settings["options"].items():
            setattr(scheduler, name, value)
        properties = {"INFERENCE_NUM_THREADS": settings["threads"], "PERFORMANCE_HINT": "LATENCY"}
        self.genai = openvino_genai
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self.requests = 0
        self.facts = {"version": openvino_genai.__version__}

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[float, float, int]:
        import numpy as np
        from openvino import Tensor

        config = self.genai.GenerationConfig()
        config.max_new_tokens = tokens + 1
        config.ignore_eos = True
        config.do_sample = False
        inputs = [Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        began = time.perf_counter()
        handles = []
        for ids in inputs:
            self.requests += 1
            handles.append(self.pipeline.add_request(self.requests, ids, config))
        got = [0] * len(handles)
        while not all(got):  # until everybody has a token
            self.pipeline.step()
            for number, handle in enumerate(handles):
                if handle.can_read():
                    got[number] += sum(len(output.generated_ids) for output in handle.read().values())
        first = time.perf_counter() - began
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        return first, time.perf_counter() - began, len(prompts) * (tokens + 1) - sum(got)

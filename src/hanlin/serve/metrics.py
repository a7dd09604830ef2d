"""Prometheus metrics under the names that dashboards for vLLM have, with our prefix."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from hanlin.serve.models import Models
    from hanlin.serve.observe import Outcome

__all__ = ["Metrics"]

_FAST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SLOW = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Metrics:
    """One registry an app: two apps in one process keep their own counts."""

    def __init__(self, models: Models) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engines(models))
        # To look a metric up by its labels costs more than to count.
        self._child = functools.cache(lambda metric, *labels: metric.labels(*labels))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"hanlin:{name}", text, ("model_name", *labels), registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"hanlin:{name}", text, ("model_name",), buckets=buckets, registry=self._registry)

        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._generated = counter("generation_tokens", "Tokens generated.")
        self._queries = counter("prefix_cache_queries", "Tokens of prompts that were looked for in the prefix cache.")
        self._hits = counter("prefix_cache_hits", "Tokens of prompts that were found there.")
        self._success = counter("request_success", "Replies that came to an end.", "finished_reason")
        self._failed = counter("request_failure", "Requests that ended with an error, or whose client went away.")
        self._prompt_size = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._reply_size = histogram("request_generation_tokens", "Tokens of a reply.", _TOKENS)
        self._first = histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", _FAST)
        self._between = histogram("inter_token_latency_seconds", "Mean time between a reply's tokens.", _BETWEEN)
        self._whole = histogram("e2e_request_latency_seconds", "From a request's arrival to its end.", _SLOW)
        self._queue = histogram("request_queue_time_seconds", "Waiting for the engine.", _FAST)
        self._prefill = histogram("request_prefill_time_seconds", "Computing the prompt.", _FAST)
        self._decode = histogram("request_decode_time_seconds", "Generating.", _SLOW)

    def ended(self, model: str, outcome: Outcome, *, arrived: float, ended: float, failed: bool) -> None:
        """A request is over. Times by `time.perf_counter`."""
        child = self._child
        child(self._whole, model).observe(ended - arrived)
        if outcome.first is not None:
            child(self._first, model).observe(outcome.first - arrived)
        if failed:
            child(self._failed, model).inc()
        for done in outcome.completions:
            usage, times = done.usage, done.timings
            child(self._success, model, done.finish_reason).inc()
            child(self._prompt, model).inc(usage.prompt_tokens)
            child(self._generated, model).inc(usage.generated_tokens)
            child(self._queries, model).inc(usage.prompt_tokens)
            child(self._hits, model).inc(usage.cached_tokens)
            child(self._prompt_size, model).observe(usage.prompt_tokens)
            child(self._reply_size, model).observe(usage.generated_tokens)
            child(self._queue, model).observe(times.queue + max(0.0, outcome.started - arrived))
            child(self._prefill, model).observe(times.prompt)
            child(self._decode, model).observe(times.generation)
            if usage.generated_tokens > 1:
                child(self._between, model).observe(times.generation / (usage.generated_tokens - 1))

    def looked(self, model: str, tokens: int) -> None:
        """Prompts were scored or pooled."""
        self._prompt.labels(model).inc(tokens)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)


class _Engines(Collector):
    """What engines and waiting rooms know of themselves, read when asked."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        def gauge(name: str, text: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"hanlin:{name}", text, labels=["model_name"])

        def counter(name: str, text: str) -> CounterMetricFamily:
            return CounterMetricFamily(f"hanlin:{name}", text, labels=["model_name"])

        running = gauge("num_requests_running", "Sequences in the engine.")
        waiting = gauge("num_requests_waiting", "Requests that wait for the engine.")
        usage = gauge("kv_cache_usage_perc", "Share of the KV cache that running sequences hold, 0 to 1.")
        touched = gauge("kv_cache_touched_bytes", "Memory of the KV cache's blocks that have ever been used.")
        loaded = gauge("model_loaded", "Whether the model is in memory.")
        size = gauge("model_memory_bytes", "Memory of its weights and cache.")
        proposed = counter("spec_decode_num_draft_tokens", "Tokens that were guessed.")
        accepted = counter("spec_decode_num_accepted_tokens", "Guesses that were right.")
        for served in self._models.list:
            name = [served.name]
            loaded.add_metric(name, float(served.llm is not None))
            if served.llm is None or served.admission is None:
                continue
            engine = served.llm.llm.engine
            running.add_metric(name, served.admission.running)
            waiting.add_metric(name, served.admission.waiting)
            usage.add_metric(name, 1 - engine.blocks.free / engine.blocks.count)
            touched.add_metric(name, engine.used_bytes()["cache"])
            size.add_metric(name, served.bytes)
            proposed.add_metric(name, engine.proposed)
            accepted.add_metric(name, engine.accepted)
        return running, waiting, usage, touched, loaded, size, proposed, accepted

"""OpenTelemetry spans, one a request, for those who have the extra and an endpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from hanlin.errors import need

__all__ = ["Tracer"]

# The names of OpenTelemetry's conventions for generative models.
_NAMES = {
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "generated_tokens": "gen_ai.usage.output_tokens",
    "request_id": "gen_ai.response.id",
    "first_token_seconds": "gen_ai.latency.time_to_first_token",
    "queue_seconds": "gen_ai.latency.time_in_queue",
    "seconds": "gen_ai.latency.e2e",
    "end": "gen_ai.response.finish_reasons",
}


class Tracer:
    """Sends spans over OTLP/HTTP, in a thread of the SDK.

    Raises:
        MissingExtraError: without the extra `otel`.
    """

    def __init__(self, endpoint: str) -> None:
        sdk = need("opentelemetry.sdk.trace", extra="otel", feature="tracing")
        export = need("opentelemetry.sdk.trace.export", extra="otel", feature="tracing")
        otlp = need("opentelemetry.exporter.otlp.proto.http.trace_exporter", extra="otel", feature="tracing")
        resources = need("opentelemetry.sdk.resources", extra="otel", feature="tracing")
        self._provider = sdk.TracerProvider(resource=resources.Resource.create({"service.name": "hanlin"}))
        self._provider.add_span_processor(export.BatchSpanProcessor(otlp.OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("hanlin")

    def tell(self, fields: Mapping[str, Any], *, seconds: float) -> None:
        """A request has ended just now."""
        end = time.time_ns()
        attributes = {_NAMES[name]: value for name, value in fields.items() if name in _NAMES and value is not None}
        span = self._tracer.start_span("llm_request", start_time=end - int(seconds * 1e9), attributes=attributes)
        span.end(end_time=end)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

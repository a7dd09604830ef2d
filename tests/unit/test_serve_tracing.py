"""Spans, over a real socket to a collector that only counts and reads them."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hanlin.errors import MissingExtraError
from hanlin.serve.settings import ModelSpec, ServeConfig
from hanlin.serve.tracing import Tracer
from hf_directory import make_directory
from serving import asgi_client

OPTIONS: dict[str, Any] = {"cache_bytes": 4 << 20, "threads": 1, "packed_cache": False, "session_len": 256}
SECRET = "the prompt is nobody's business"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """(URL, the bodies that were posted)."""
    got: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1/traces", got
    server.shutdown()
    server.server_close()


def test_a_request_is_a_span_without_its_prompt(tmp_path: Path, collector: tuple[str, list[bytes]]) -> None:
    for name in ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http"):
        pytest.importorskip(name, reason="needs the extra otel")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    url, got = collector
    spec = ModelSpec(source=str(make_directory(tmp_path / "tiny", num_hidden_layers=1)), name="tiny", options=OPTIONS)

    async def work() -> None:
        async with asgi_client(ServeConfig(models=(spec,), trace_endpoint=url)) as client:
            asked = {"prompt": SECRET, "max_tokens": 3, "ignore_eos": True}
            for _ in range(2):
                assert (await client.post("/v1/completions", json=asked)).status_code == 200

    asyncio.run(work())
    spans = [
        span
        for body in got
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert len(spans) == 2 and all(SECRET.encode() not in body for body in got)
    values = {item.key: item.value for item in spans[0].attributes}
    assert values["gen_ai.request.model"].string_value == "tiny"
    assert values["gen_ai.usage.output_tokens"].int_value == 3 and values["gen_ai.usage.input_tokens"].int_value > 3
    assert spans[0].start_time_unix_nano < spans[0].end_time_unix_nano


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(MissingExtraError, match="otel"):
        Tracer("http://127.0.0.1:9")

"""schemathesis reads the server's own description, and calls every route with what that allows and what it does not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from starlette.testclient import TestClient

from hanlin.serve.app import create_app
from hanlin.serve.keys import KeyRing
from hanlin.serve.settings import Limits, ModelSpec, ServeConfig
from hf_directory import make_directory
from serving import serving

EXAMPLES = int(os.environ.get("HANLIN_SCHEMATHESIS_EXAMPLES", "8"))  # calls of a route
SECONDS = 20.0  # for one of them


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("openapi")
    options = {"cache_bytes": 4 << 20, "threads": 1, "packed_cache": False, "session_len": 256}
    source = str(make_directory(folder / "tiny", num_hidden_layers=1))
    spec = ModelSpec(source=source, name="tiny", options={**options, "chat_template": "internlm2"})
    config = ServeConfig(
        models=(spec,), legacy_chatglm=True, adapter_directory=folder, limits=Limits(max_tokens=4, completions=4)
    )
    with serving(config) as where:
        yield where


def operations() -> list[tuple[str, str]]:
    paths = create_app(ServeConfig(legacy_chatglm=True)).openapi()["paths"]
    return [(path, method) for path, methods in paths.items() for method in methods]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(0 if EXAMPLES > 100 else 300)
@pytest.mark.parametrize(("path", "method"), operations(), ids=lambda value: str(value))
def test_no_call_that_the_description_allows_breaks_the_server(url: str, path: str, method: str) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="needs the package schemathesis")
    description: Any = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operation = description[path][method.upper()]

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=EXAMPLES <= 100,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def call(case: Any) -> None:
        answer = case.call(timeout=SECONDS)
        assert answer.status_code < 500, f"{case.as_curl_command()}\n{answer.status_code} {answer.text[:500]}"

    call()
    assert httpx.get(f"{url}/health", timeout=SECONDS).status_code == 200


def test_the_description_tells_errors_and_keys_as_they_are() -> None:
    plain = create_app(ServeConfig(legacy_chatglm=True)).openapi()
    assert "securitySchemes" not in plain["components"] and "HTTPValidationError" not in str(plain)
    app = create_app(ServeConfig(keys=KeyRing.read(given=["secret"])))
    client = TestClient(app, base_url="http://127.0.0.1")  # not entered: no model is loaded
    told = client.get("/openapi.json", headers={"x-api-key": "secret"}).json()
    paths = told["paths"]
    assert set(told["components"]["securitySchemes"]) == {"bearer", "header", "password"}
    assert "security" not in paths["/health"]["get"]
    for path, status, body in (
        ("/v1/chat/completions", 400, {}),
        ("/v1/messages", 400, {}),
        ("/api/chat", 404, {"model": "none", "messages": [{"role": "user", "content": "x"}]}),
        ("/v1/chat/completions", 401, None),
        ("/api/chat", 401, None),
    ):
        headers = {} if body is None else {"x-api-key": "secret"}
        answer = client.post(path, json=body or {}, headers=headers)
        assert answer.status_code == status, answer.text
        schema = paths[path]["post"]["responses"][str(status)]["content"]["application/json"]["schema"]
        jsonschema.validate(answer.json(), schema)
        assert paths[path]["post"]["security"]


def test_every_route_is_described() -> None:
    app = create_app(ServeConfig(legacy_chatglm=True))
    known = app.openapi()["paths"]
    for route in app.routes:
        if getattr(route, "include_in_schema", False):
            described = {method.upper() for method in known[route.path.replace(":path}", "}")]}  # type: ignore[attr-defined]
            assert route.methods - {"HEAD"} <= described, route  # type: ignore[attr-defined]

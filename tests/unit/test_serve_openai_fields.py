"""Every field of OpenAI's requests does what the table in the documentation says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from hanlin.serve.settings import ModelSpec, ServeConfig
from hf_directory import make_directory
from serve_fields import ROUTES, Field, table
from serving import app_client

CASES = [
    pytest.param(route, name, field, least, id=f"{route.rpartition('v1/')[2]}-{name}")
    for route, _, fields, least in ROUTES
    for name, field in fields.items()
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    path = make_directory(tmp_path_factory.mktemp("model") / "tiny")
    options = {"cache_bytes": 8 << 20, "packed_cache": False, "threads": 1, "session_len": 512}
    with app_client(ServeConfig(models=(ModelSpec(source=str(path), name="tiny", options=options),))) as made:
        yield made


def reply(answer: dict[str, Any]) -> Any:
    """What a caller reads of an answer."""
    if "data" in answer:
        return [each["embedding"] for each in answer["data"]]
    if "output" in answer:
        return [[part["text"] for part in item["content"]] for item in answer["output"]]
    return answer["choices"]


@pytest.mark.parametrize(("route", "name", "field", "least"), CASES)
def test_a_field_does_what_is_said(
    client: TestClient, route: str, name: str, field: Field, least: dict[str, Any]
) -> None:
    body = {**least, **dict(field.needs), name: field.example}
    response = client.post(route, json=body)
    if field.kind == "refused":
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == name or name in error["message"]
        return
    assert response.status_code == 200, response.text
    if field.kind == "idle":
        assert reply(response.json()) == reply(client.post(route, json=least).json())


@pytest.mark.parametrize(("route", "schema", "fields"), [pytest.param(r, s, f, id=r) for r, s, f, _ in ROUTES])
def test_no_field_is_left_out(route: str, schema: Any, fields: dict[str, Field]) -> None:
    assert set(fields) == set(schema.model_fields), route
    refusals = {name for name, field in fields.items() if field.kind == "refused"}
    assert set(getattr(schema, "refused", ())) <= refusals


def test_the_documentation_is_up_to_date() -> None:
    path = Path(__file__).parents[2] / "docs" / "serve_fields.md"
    assert path.read_text(encoding="utf-8") == table(), "run: python scripts/serve_fields.py"

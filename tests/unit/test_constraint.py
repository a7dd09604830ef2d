"""Reading constraints: every dialect, and every bound, without compiling anything."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hanlin.constraint import MAX_BYTES, MAX_CHOICES, Constraint
from hanlin.errors import RequestError
from hanlin.types import SamplingParams

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TEXT = json.dumps(SCHEMA)


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, Constraint("json_object")),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}},
            Constraint("json_schema", TEXT),
        ),
        ({"type": "regex_schema", "regex_schema": "a+"}, Constraint("regex", "a+")),
        ({"type": "choice", "choice": ["a", "b"]}, Constraint("choice", ("a", "b"))),
        ({"json": SCHEMA}, Constraint("json_schema", TEXT)),
        ({"json": TEXT, "regex": None}, Constraint("json_schema", TEXT)),
        ({"json_object": True}, Constraint("json_object")),
        ({"json_object": False}, None),
        ({"regex": "a+"}, Constraint("regex", "a+")),
        ({"choice": ["a"]}, Constraint("choice", ("a",))),
        ({"grammar": 'start: "a"'}, Constraint("grammar", 'start: "a"')),
        (Constraint("json_object"), Constraint("json_object")),
    ],
)
def test_dialects(given: Any, want: Constraint | None) -> None:
    assert Constraint.parse(given) == want


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("json", "must be a mapping"),
        ({"type": "yaml"}, "'yaml'"),
        ({"type": ["json"]}, "'type' must be"),
        ({"type": "json_schema"}, "'schema'"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "'schema'"),
        ({"xml": "a"}, "xml is not supported"),
        ({"regex": "a", "choice": ["a"]}, "cannot be combined"),
        ({"structural_tag": "{}"}, "structural_tag is not supported"),
    ],
)
def test_unknown_dialects_are_refused(given: Any, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        Constraint.parse(given)
    assert says in str(caught.value)


def test_options_of_requests_become_one_constraint() -> None:
    take = Constraint.take
    assert take({"temperature": 0}) == {"temperature": 0}
    assert take({"guided_regex": "a", "n": 2}) == {"n": 2, "constraint": Constraint("regex", "a")}
    assert take({"response_format": {"type": "text"}, "guided_json": None}) == {"constraint": None}
    assert take({"structured_outputs": {"json": SCHEMA}}) == {"constraint": Constraint("json_schema", TEXT)}
    with pytest.raises(RequestError, match="response_format and guided_choice cannot be combined"):
        take({"response_format": {"type": "json_object"}, "guided_choice": ["a"]})
    with pytest.raises(RequestError, match="guided_regex and constraint"):
        take({"guided_regex": "a", "constraint": Constraint("json_object")})


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"anyOf": [schema]}
    return schema


def chained(links: int, width: int) -> dict[str, Any]:
    """Definitions that refer to each other in a chain, each some levels deep."""
    definitions: dict[str, Any] = {str(links): {}}
    for link in range(links):
        schema: dict[str, Any] = {"$ref": f"#/$defs/{link + 1}"}
        for _ in range(width):
            schema = {"items": schema}
        definitions[str(link)] = schema
    return {"$defs": definitions, "$ref": "#/$defs/0"}


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        ("poem", "", "kind must be one of"),
        ("regex", 3, "regex must be text, not int"),
        ("regex", "a" * 5000, "regex has 5000 characters, more than 4096"),
        ("regex", "\ud800", "lone surrogate"),
        ("choice", "yes", "choice must be a list"),
        ("choice", [], "choice must be a list"),
        ("choice", ["a", ""], "none of them empty"),
        ("choice", ["a", 3], "choice must be a list"),
        ("choice", ["\udc00"], "lone surrogate"),
        ("choice", ["a"] * (MAX_CHOICES + 1), "choice has 10001 texts"),
        ("choice", ["a" * 5000], "at most 4096 characters a text"),
        ("grammar", "", "no rule"),
        ("grammar", "\n".join(f"r{i}: r{i + 1}" for i in range(3000)), "3000 rules, more than 1000"),
        ("grammar", "start: %json {", "what follows %json is not JSON"),
        ("grammar", 'start: %json {"multipleOf": 1000003}', "%json: multipleOf"),
        ("json_schema", {"a": float("nan")}, "not JSON"),
        ("json_schema", {"a": {1, 2}}, "not JSON"),
        ("json_schema", "{", "not JSON"),
        ("json_schema", "[" * 100_000, "not JSON"),
        ("json_schema", '{"a": NaN}', "NaN is not JSON"),
        ("json_schema", "3", "must be an object, not int"),
        ("json_schema", True, "json_schema must be text, not bool"),
        ("json_schema", {"description": "a" * MAX_BYTES}, "bytes, more than"),
        ("json_schema", nested(60), "nested 121 deep, more than 100"),
        ("json_schema", {"properties": {f"p{i}": {} for i in range(1001)}}, "1001 properties, more than 1000"),
        ("json_schema", {"enum": list(range(10_001))}, "10001 values in enum"),
        ("json_schema", {"enum": ["a" * 5000]}, "enum holds a text of more than 4096"),
        ("json_schema", {"const": {"a": ["a" * 5000]}}, "const holds a text of more than 4096"),
        ("json_schema", {"pattern": "a" * 5000}, "pattern has 5000 characters"),
        ("json_schema", {"patternProperties": {"a" * 5000: {}}}, "patternProperties holds a pattern"),
        ("json_schema", {"multipleOf": 1000003}, "multipleOf 1000003 has too many digits"),
        ("json_schema", {"multipleOf": 1e300}, "too many digits"),
        ("json_schema", {"multipleOf": 1.00007}, "too many digits"),
        ("json_schema", chained(300, 4), "levels in all that $ref points at"),
        ("json_schema", {"$ref": "http://127.0.0.1:9/a.json"}, "'http://127.0.0.1:9/a.json' is refused"),
        ("json_schema", {"items": {"$ref": "file:///etc/passwd"}}, "'file:///etc/passwd' is refused"),
        ("json_schema", {"$ref": "other.json#/a"}, "is refused"),
        ("json_schema", {"$dynamicRef": "#a"}, "$dynamicRef '#a' is refused"),
        ("json_schema", {"$ref": "#/$defs/a"}, "points at nothing"),
    ],
)
def test_bounds(kind: Any, value: Any, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        Constraint(kind, value)
    assert says in str(caught.value)


def test_everything_wrong_is_named_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        Constraint("json_schema", {"$ref": "http://a", "multipleOf": 1e9, "pattern": "a" * 5000})
    assert all(word in str(caught.value) for word in ("http://a", "multipleOf", "pattern has"))


def test_what_schemas_of_programs_hold_is_not_refused() -> None:
    for schema in (
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A", "description": "x" * 20_000},
        {"properties": {"$ref": {"type": "string"}, "enum": {"type": "array", "items": {"type": "integer"}}}},
        {"type": "object", "properties": {"child": {"$ref": "#"}}},
        {"multipleOf": 0.01},
        {"multipleOf": 100},
        chained(100, 4),
    ):
        assert Constraint("json_schema", schema).kind == "json_schema"


def test_sampling_takes_nothing_else() -> None:
    with pytest.raises(RequestError, match="constraint must be a Constraint, not dict"):
        SamplingParams(constraint={"type": "json_object"})

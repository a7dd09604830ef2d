"""What a reply must look like: JSON, a schema, a regular expression, one of some texts, or a grammar.

Only the words of a request are read and bounded here; `hanlin.engine.guide` compiles them for a vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from hanlin.errors import RequestError, problems

__all__ = ["Constraint"]

Kind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]
KINDS: tuple[str, ...] = ("json_object", "json_schema", "regex", "choice", "grammar")

# What a compiler may be asked for. Beyond these, compiling takes seconds or a token takes milliseconds.
MAX_BYTES = 128 << 10
MAX_REGEX = 4096
MAX_TEXT = 4096  # characters of one text that must be written word for word
MAX_CHOICES = 10_000
MAX_PROPERTIES = 1000
MAX_RULES = 1000  # of a grammar; a chain of rules is followed recursively
MAX_DEPTH = 100  # the compiler's JSON reader ends at 128
MAX_CHAIN = 1000  # depths of all that is referred to, together: references are followed recursively
MAX_MULTIPLE = 10_000  # a number's last digits are counted in a state machine of this size

# vLLM's words, older and newer, and what they mean
_FIELDS: dict[str, Kind] = {
    "json": "json_schema",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}
_GUIDED = {f"guided_{word}": kind for word, kind in _FIELDS.items()}
_WHOLE = ("response_format", "structured_outputs", "guided_decoding")
_RULE = re.compile(r"^[ \t]*[?!]?[A-Za-z_][\w.-]*(?:\{[^}\n]*\})?(?:\[[^\]\n]*\])?[ \t]*:", re.MULTILINE)


@dataclass(frozen=True)
class Constraint:
    """What a reply must look like.

    Attributes:
        kind: of it.
        value: text: JSON of the schema (a mapping is turned into it), the regular expression (Rust's syntax, the whole
            reply must match), the grammar (Lark, in llguidance's dialect), or ""; for a choice, a tuple of texts.

    Raises:
        RequestError: naming everything that is malformed or beyond bounds.
    """

    kind: Kind
    value: Any = ""

    def __post_init__(self) -> None:
        value = self.value
        if self.kind == "json_schema" and isinstance(value, Mapping):
            object.__setattr__(self, "value", _dump(value))
        elif self.kind == "choice" and isinstance(value, Sequence) and not isinstance(value, str):
            object.__setattr__(self, "value", tuple(value))
        found = list(self._wrong())
        if found:
            raise RequestError(problems("constraint", found))

    @classmethod
    def parse(cls, value: Constraint | Mapping[str, Any] | None) -> Constraint | None:
        """Read OpenAI's or LMDeploy's `response_format`, or vLLM's `structured_outputs`; None where nothing is asked.

        Raises:
            RequestError: for what is neither, or malformed.
        """
        if value is None or isinstance(value, Constraint):
            return value
        if not isinstance(value, Mapping):
            raise RequestError(f"a constraint must be a mapping such as {{'type': 'json_object'}}, not {value!r:.80}")
        return cls._response_format(value) if "type" in value else cls._structured(value)

    @classmethod
    def take(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values` with every spelling of a constraint replaced by one `constraint`.

        They are `response_format`, `structured_outputs`, `guided_decoding`, and `guided_json`, `guided_regex`,
        `guided_choice`, `guided_grammar`.

        Raises:
            RequestError: a malformed one, or several that ask for something.
        """
        names = [name for name in (*_WHOLE, *_GUIDED) if name in values]
        rest = {name: value for name, value in values.items() if name not in names}
        asked = {name: found for name in names if (found := cls._named(name, values[name])) is not None}
        if rest.get("constraint") is not None:
            asked["constraint"] = rest["constraint"]
        if len(asked) > 1:
            raise RequestError(f"{' and '.join(asked)} cannot be combined: a reply has one constraint")
        if names:
            rest["constraint"] = next(iter(asked.values()), None)
        return rest

    @classmethod
    def _named(cls, name: str, value: Any) -> Constraint | None:
        if name in _WHOLE:
            return cls.parse(value)
        return None if value is None else cls._structured({name.removeprefix("guided_"): value})

    @classmethod
    def _response_format(cls, value: Mapping[str, Any]) -> Constraint | None:
        kind = value["type"]
        if kind == "text":
            return None
        if kind == "json_object":
            return cls("json_object")
        if kind == "json_schema":
            inner = value.get("json_schema")
            schema = inner.get("schema", inner.get("json_schema")) if isinstance(inner, Mapping) else None
            if schema is None:
                raise RequestError("response_format: json_schema needs {'json_schema': {'name': ..., 'schema': {...}}}")
            return cls("json_schema", schema)
        if kind == "regex_schema":
            return cls("regex", value.get("regex_schema", ""))
        if isinstance(kind, str) and kind in _FIELDS:  # {"type": "choice", "choice": [...]}
            return cls(_FIELDS[kind], value.get(kind, ""))
        raise RequestError(
            f"response_format: 'type' must be text, json_object, json_schema or regex_schema, not {kind!r:.80}"
        )

    @classmethod
    def _structured(cls, value: Mapping[str, Any]) -> Constraint | None:
        given = {name: item for name, item in value.items() if item is not None and item is not False}
        unknown = sorted(str(name)[:40] for name in given if name not in _FIELDS)
        if unknown:
            known = ", ".join(_FIELDS)
            raise RequestError(f"structured outputs: {', '.join(unknown)} is not supported, only {known}")
        if len(given) > 1:
            raise RequestError(f"structured outputs: {' and '.join(given)} cannot be combined")
        for name, item in given.items():
            return cls(_FIELDS[name], "" if name == "json_object" else item)
        return None

    def _wrong(self) -> Iterator[str]:
        value: object = self.value
        if self.kind not in KINDS:
            yield f"kind must be one of {', '.join(KINDS)}, not {self.kind!r:.40}"
        elif self.kind == "choice":
            yield from _wrong_choices(value)
        elif not isinstance(value, str):
            yield f"{self.kind} must be text, not {type(value).__name__}"
        elif not _utf8(value):
            yield f"{self.kind} must be valid Unicode; it holds a lone surrogate"
        elif len(value.encode()) > MAX_BYTES:
            yield f"{self.kind} has {len(value.encode())} bytes, more than {MAX_BYTES}"
        elif self.kind == "json_schema":
            yield from _wrong_schema(value)
        elif self.kind == "regex" and len(value) > MAX_REGEX:
            yield f"regex has {len(value)} characters, more than {MAX_REGEX}"
        elif self.kind == "grammar":
            yield from _wrong_grammar(value)


def _dump(value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"constraint: the schema is not JSON: {error}") from None


def _utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _wrong_choices(value: object) -> Iterator[str]:
    if not isinstance(value, tuple) or not value or not all(isinstance(text, str) and text for text in value):
        yield "choice must be a list of texts, none of them empty"
    elif len(value) > MAX_CHOICES:
        yield f"choice has {len(value)} texts, more than {MAX_CHOICES}"
    elif not all(map(_utf8, value)):
        yield "choice must hold valid Unicode; a text has a lone surrogate"
    elif max(map(len, value)) > MAX_TEXT or sum(len(text.encode()) for text in value) > MAX_BYTES:
        yield f"choice must have at most {MAX_TEXT} characters a text and {MAX_BYTES} bytes in all"


def _wrong_schema(text: str) -> Iterator[str]:
    try:
        schema = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        yield f"json_schema is not JSON: {error or 'nested too deeply'}"
        return
    if not isinstance(schema, dict):
        yield f"json_schema must be an object, not {type(schema).__name__}"
        return
    depth = _depth(schema)
    if depth > MAX_DEPTH:
        yield f"json_schema is nested {depth} deep, more than {MAX_DEPTH}"
        return
    yield from _wrong_parts(schema)


def _wrong_parts(schema: dict[str, Any]) -> Iterator[str]:
    properties = choices = 0
    targets: dict[str, int] = {"#": _depth(schema)}
    for node in _nodes(schema):
        if not isinstance(node, dict):
            continue
        for key, value in node.items():
            if key in ("$dynamicRef", "$recursiveRef") or (key == "$ref" and not _local(value)):
                if isinstance(value, str):
                    yield f"{key} {value[:80]!r} is refused: only references into the schema itself, '#...'"
            elif key == "$ref" and isinstance(value, str) and value not in targets:
                target = _resolve(schema, value)
                if target is None:
                    yield f"$ref {value[:80]!r} points at nothing"
                targets[value] = _depth(target)
            elif key in ("properties", "patternProperties") and isinstance(value, dict):
                properties += len(value)
            elif key == "enum" and isinstance(value, list):
                choices += len(value)
            elif key == "multipleOf" and not _few_digits(value):
                yield f"multipleOf {value!r:.40} has too many digits: at most {MAX_MULTIPLE} times its last place"
            if key in ("enum", "const") and any(len(t) > MAX_TEXT for t in _nodes(value) if isinstance(t, str)):
                yield f"{key} holds a text of more than {MAX_TEXT} characters"
            if key == "pattern" and isinstance(value, str) and len(value) > MAX_REGEX:
                yield f"pattern has {len(value)} characters, more than {MAX_REGEX}"
            if key == "patternProperties" and isinstance(value, dict) and any(len(name) > MAX_REGEX for name in value):
                yield f"patternProperties holds a pattern of more than {MAX_REGEX} characters"
    for what, count, most in (
        ("properties", properties, MAX_PROPERTIES),
        ("values in enum", choices, MAX_CHOICES),
        ("levels in all that $ref points at", sum(targets.values()), MAX_CHAIN),
    ):
        if count > most:
            yield f"json_schema has {count} {what}, more than {most}"


def _wrong_grammar(text: str) -> Iterator[str]:
    rules = len(_RULE.findall(text))
    if not rules:
        yield "grammar has no rule 'start: ...'"
    if rules > MAX_RULES:
        yield f"grammar has {rules} rules, more than {MAX_RULES}"
    reader = json.JSONDecoder(parse_constant=_no_constant)
    for match in re.finditer(r"%json\s*", text):
        try:
            schema, end = reader.raw_decode(text, match.end())
        except (ValueError, RecursionError) as error:
            yield f"grammar: what follows %json is not JSON: {error or 'nested too deeply'}"
        else:
            if not isinstance(schema, bool):
                yield from (f"grammar: %json: {one}" for one in _wrong_schema(text[match.end() : end]))


def _nodes(value: object) -> Iterator[Any]:
    """Every value inside, itself included; without recursion."""
    rest = [value]
    while rest:
        node = rest.pop()
        yield node
        if isinstance(node, dict):
            rest += node.values()
        elif isinstance(node, list):
            rest += node


def _depth(value: object) -> int:
    """Levels of lists and objects."""
    level, depth = [value], 0
    while level:
        inner = [node for node in level if isinstance(node, (dict, list))]
        level = [item for node in inner for item in (node.values() if isinstance(node, dict) else node)]
        depth += bool(inner)
    return depth


def _local(reference: object) -> bool:
    return not isinstance(reference, str) or reference == "#" or reference.startswith("#/")


def _resolve(schema: Any, pointer: str) -> Any:
    """What a JSON pointer names, or None."""
    node = schema
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict):
            node = node.get(name)
        elif isinstance(node, list) and name.isdecimal() and int(name[:9]) < len(node):
            node = node[int(name[:9])]
        else:
            return None
    return node


def _few_digits(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return True  # the compiler says what is wrong with it
    try:
        _, digits, exponent = Decimal(str(value)).as_tuple()
    except (InvalidOperation, ValueError):
        return False
    if not isinstance(exponent, int) or exponent > 4:
        return False
    return bool(int("".join(map(str, digits))) * 10 ** max(0, exponent) <= MAX_MULTIPLE)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")

"""Calls in Python's syntax, `tool_call(city="Paris", days=3)`, as text that is read and never run.

The values are literals: strings, numbers, True, False, None, lists, tuples and dictionaries; JSON's true, false and
null too. Source: the Python language reference, sections 2.4 and 6.2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["read_call", "write_call"]

_LONGEST, _DEEPEST = 1 << 18, 64
_BLANK = re.compile(r"(?:[ \t\r\n\f]|\\\r?\n|#[^\n]*)*")
_NAME = re.compile(r"[^\W\d]\w*")
_NUMBER = re.compile(r"[+-]?(?:0[xX][\da-fA-F]+|(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][+-]?\d+)?)")
_QUOTE = re.compile(r"([rRuU]?)(\"\"\"|'''|\"|')")
_ESCAPE = re.compile(r"\\(?:(\r?\n)|x([\da-fA-F]{2})|u([\da-fA-F]{4})|U([\da-fA-F]{8})|([0-7]{1,3})|(.))", re.DOTALL)
_LETTERS = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "\\": "\\", "'": "'", '"': '"'}
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}


def read_call(source: str) -> tuple[str, dict[str, Any]] | None:
    """(name, arguments) of one call whose arguments are all literals with names; None for anything else."""
    if len(source) > _LONGEST:
        return None
    try:
        return _Reader(source).call()
    except (ValueError, OverflowError):
        return None


def write_call(name: str, arguments: Mapping[str, Any]) -> str:
    """A call that `read_call` reads, with the values of a JSON object."""
    named = [f"{key}={_literal(value)}" for key, value in arguments.items() if _is_name(key)]
    others = {key: value for key, value in arguments.items() if not _is_name(key)}
    return f"{name}({', '.join([*named, f'**{_literal(others)}'] if others else named)})"


def _is_name(key: str) -> bool:
    return key.isidentifier() and key not in _WORDS


def _literal(value: object) -> str:
    if isinstance(value, str):  # in double quotes, as the released examples have them
        shown = repr(value + "'")
        return f'"{shown[1:-2]}"' if shown.startswith('"') else repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value)


class _Reader:
    """Reads from the left; ValueError where the text is no call of literals."""

    def __init__(self, source: str) -> None:
        self._source, self._at = source, 0

    def call(self) -> tuple[str, dict[str, Any]]:
        name = self._match(_NAME)
        self._expect("(")
        found: dict[str, Any] = {}
        while not self._take(")"):
            more = self._argument()
            if more.keys() & found.keys():
                raise ValueError("an argument twice")
            found |= more
            if not self._take(","):
                self._expect(")")
                break
        self._blank()
        if self._at < len(self._source):
            raise ValueError("something behind the call")
        return name, found

    def _argument(self) -> dict[str, Any]:
        if self._take("**"):
            value = self._value(0)
            if not isinstance(value, dict):
                raise ValueError("** of something else")
            return value
        name = self._match(_NAME)
        self._expect("=")
        return {name: self._value(0)}

    def _value(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ValueError("nested too deeply")
        self._blank()
        following = self._source[self._at : self._at + 1]
        if following == "{":
            return self._dictionary(depth)
        if following in ("[", "("):
            return self._sequence(depth, "]" if following == "[" else ")")
        if _QUOTE.match(self._source, self._at):
            return self._string()
        if following.isalpha():
            word = self._match(_NAME)
            if word not in _WORDS:
                raise ValueError("a name where a value must be")
            return _WORDS[word]
        return _number(self._match(_NUMBER))

    def _dictionary(self, depth: int) -> dict[str, Any]:
        self._expect("{")
        found: dict[str, Any] = {}
        while not self._take("}"):
            key = self._value(depth + 1)
            if not isinstance(key, str):
                raise ValueError("JSON's keys are text")
            self._expect(":")
            found[key] = self._value(depth + 1)
            if not self._take(","):
                self._expect("}")
                break
        return found

    def _sequence(self, depth: int, end: str) -> Any:
        self._at += 1
        found: list[Any] = []
        commas = 0
        while not self._take(end):
            found.append(self._value(depth + 1))
            if not self._take(","):
                self._expect(end)
                break
            commas += 1
        return found[0] if end == ")" and len(found) == 1 and not commas else found

    def _string(self) -> str:
        """One string, or several beside each other, which are one."""
        parts: list[str] = []
        while True:
            self._blank()
            match = _QUOTE.match(self._source, self._at)
            if match is None:
                # JSON spells characters beyond U+FFFF as two halves, and models mix the two languages.
                return "".join(parts).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
            prefix, quote = match.groups()
            start = self._at = match.end()
            while not self._source.startswith(quote, self._at):
                if self._at >= len(self._source) or (len(quote) == 1 and self._source[self._at] == "\n"):
                    raise ValueError("a string without an end")
                self._at += 2 if self._source[self._at] == "\\" else 1
            body = self._source[start : self._at]
            self._at += len(quote)
            parts.append(body if prefix in ("r", "R") else _ESCAPE.sub(_escaped, body))

    def _blank(self) -> None:
        match = _BLANK.match(self._source, self._at)
        self._at = match.end() if match else self._at

    def _match(self, pattern: re.Pattern[str]) -> str:
        self._blank()
        match = pattern.match(self._source, self._at)
        if match is None:
            raise ValueError("something else was expected")
        self._at = match.end()
        return match.group()

    def _take(self, text: str) -> bool:
        self._blank()
        found = self._source.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise ValueError(f"{text} was expected")


def _number(text: str) -> int | float:
    digits = text.lstrip("+-")
    if digits[:2].lower() == "0x":
        value: int | float = int(text, 16)
    elif digits.replace("_", "").isdigit():
        value = int(text)
    else:
        value = float(text)
    if not math.isfinite(value):
        raise ValueError("JSON has no such number")
    return value


def _escaped(match: re.Match[str]) -> str:
    line, byte, four, eight, octal, letter = match.groups()
    code = byte or four or eight
    if code or octal:
        return chr(int(code, 16) if code else int(octal, 8))
    if line:
        return ""
    if letter == "N":
        raise ValueError("characters by name are not read")
    return _LETTERS.get(letter, match.group())  # an unknown escape stays as it is written

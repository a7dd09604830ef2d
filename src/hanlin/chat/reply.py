"""Reading replies: ids in, text and tool calls out, the same whatever the ids were split into."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from hanlin.types import ReplyEvent, Tokenizer, ToolCall

__all__ = ["TaggedParser", "TextParser", "arguments_object", "json_text", "parse_calls"]

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class TextParser:
    """A reply without tool calls; the base of all parsers.

    Ids are taken one by one, so a parser cannot tell how they were split. Stop ids are never shown, and do not end the
    parsing: whoever generates decides when to stop (`ignore_eos` goes on).
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Iterable[int], *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._skip_special = skip_special
        self._detokenizer = tokenizer.detokenizer(skip_special=skip_special)
        self._events: list[ReplyEvent] = []
        self._text: list[str] = []
        self._calls = 0
        self._blank: str | None = None

    def push(self, ids: Sequence[int]) -> list[ReplyEvent]:
        for token in ids:
            if token in self._stop_ids:
                self._close()
            else:
                self._take(token)
        return self._drain()

    def finish(self) -> list[ReplyEvent]:
        self._take_text(self._detokenizer.finish())
        self._close()
        return self._drain()

    def _take(self, token: int) -> None:
        self._take_text(self._detokenizer.push([token]))

    def _take_text(self, text: str) -> None:
        self._emit(text)

    def _close(self) -> None:
        """The reply ends here: what is still open must be settled."""

    def _emit(self, text: str) -> None:
        if self._blank is not None:  # after a call: blanks alone only separate it from the next one
            self._blank += text
            if not self._blank.strip():
                return
            text, self._blank = self._blank, None
        if text:
            self._text.append(text)

    def _emit_calls(self, calls: Iterable[ToolCall]) -> None:
        self._flush()
        for call in calls:
            call = ToolCall(name=call.name, arguments=call.arguments, id=f"call_{self._calls}", kind=call.kind)
            self._calls += 1
            self._events.append(ReplyEvent(tool_call=call))
        self._blank = ""

    def _flush(self) -> None:
        if self._text:
            self._events.append(ReplyEvent(text="".join(self._text)))
            self._text.clear()

    def _drain(self) -> list[ReplyEvent]:
        self._flush()
        events, self._events = self._events, []
        return events


class TaggedParser(TextParser):
    """Calls as JSON in `<tool_call>...</tool_call>`, as Hermes, Qwen and SmolLM2 write them.

    A body is one call or a list of calls, each `{"name": ..., "arguments": {...}}`. A body that is not, comes back as
    the text that it was. A call whose end tag is missing at the end of the reply counts when its JSON is whole.
    `interpreters` names the tools whose one argument `code` is source code.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_ids: Iterable[int],
        *,
        skip_special: bool = True,
        interpreters: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(tokenizer, stop_ids, skip_special=skip_special)
        # Some vocabularies hold the tags as special tokens, which a detokeniser would leave out.
        found = {tag: tokenizer.token_id(tag) for tag in (OPEN, CLOSE)}
        self._tags = {token: tag for tag, token in found.items() if token in tokenizer.special_ids}
        self._interpreters = interpreters
        self._inside = False
        self._held = ""
        self._searched = 0

    def _take(self, token: int) -> None:
        tag = self._tags.get(token)
        self._take_text(self._detokenizer.push([token]) if tag is None else tag)

    def _take_text(self, text: str) -> None:
        self._held += text
        while True:
            tag = CLOSE if self._inside else OPEN
            start = self._held.find(tag, self._searched)
            if start < 0:
                break
            before, self._held = self._held[:start], self._held[start + len(tag) :]
            self._searched = 0
            if self._inside:
                self._settle(before, CLOSE)
            else:
                self._emit(before)
            self._inside = not self._inside
        if self._inside:
            self._searched = max(0, len(self._held) - len(CLOSE) + 1)
        else:
            keep = next((n for n in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:n])), 0)
            settled = len(self._held) - keep
            self._emit(self._held[:settled])
            self._held = self._held[settled:]

    def _close(self) -> None:
        held, self._held, self._searched = self._held, "", 0
        if self._inside:
            self._inside = False
            self._settle(held, "")
        else:
            self._emit(held)

    def _settle(self, body: str, end: str) -> None:
        calls = parse_calls(body, self._interpreters)
        if calls:
            self._emit_calls(calls)
        else:
            self._emit(OPEN + body + end)


def parse_calls(text: str, interpreters: frozenset[str] = frozenset()) -> list[ToolCall]:
    """The calls in a JSON text, one `{"name", "parameters" or "arguments"}` or a list of those; none if it is neither.

    Arguments become JSON text again, written one way: what the model wrote as `{"a":1}` reads `{"a": 1}`.
    """
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return []
    calls = []
    for entry in value if isinstance(value, list) else [value]:
        name = entry.get("name") if isinstance(entry, Mapping) else None
        if not isinstance(name, str) or not name.strip() or not _encodable(name):
            return []
        arguments = arguments_object(entry.get("parameters", entry.get("arguments")))
        if arguments is None:
            return []
        code = arguments.get("code")
        if name in interpreters and isinstance(code, str):
            calls.append(ToolCall(name=name, arguments=code, kind="interpreter"))
        else:
            calls.append(ToolCall(name=name, arguments=json_text(arguments)))
    return calls


def arguments_object(value: object) -> dict[str, Any] | None:
    """A call's arguments as an object, from an object, JSON text of one, or nothing; else None."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_text(value: object, *, indent: int | None = None) -> str:
    """JSON text of arguments, written one way."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    # JSON can spell half a surrogate pair, which no UTF-8 response can carry: leave such text escaped.
    return text if _encodable(text) else json.dumps(value, indent=indent)

"""What ChatGLM3 and GLM-4 share: turns behind role tokens, tool calls by name in a turn's first line, tidy replies."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from hanlin.chat.base import Writer, checked, special_ids
from hanlin.chat.chatglm import SHOWN, TIME
from hanlin.chat.reply import TextParser
from hanlin.chat.tools import tool_spec
from hanlin.errors import ChatFormatError, problems
from hanlin.types import Message, Rendered, ReplyParser, SamplingParams, Tokenizer, Tool, ToolCall

__all__ = ["FENCE", "ROLE_TOKENS", "Part", "RolesFormat", "TidyParser", "arguments_schema", "fenced"]

FENCE = "```"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
SYSTEM, USER, ASSISTANT, OBSERVATION = ROLE_TOKENS
_TOKENS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT, "tool": OBSERVATION}


class Part(NamedTuple):
    """A turn, or a call within one: what stands behind a role's token, with its first line apart."""

    role: str
    content: str
    first_line: str = ""
    calls: bool = False


class RolesFormat(ABC):
    """`<|role|>{a called tool's name, or nothing}\\n{content}`, turn after turn, behind `[gMASK]` and the start token.

    The first line and the content are encoded apart, as the released code does. A reply ends with the token of the next
    role: `<|user|>`, or `<|observation|>` behind a call; these have weight in training, beside all that the assistant
    writes. A conversation that is over ends with the end token, or `<|observation|>` behind a call.

    Calls are looked for in a reply only when tools were given, and only by their names; all else is text.
    """

    name: str
    sop: str
    blank = ""  # a grammar's term for the space that the tokenizer puts before what is encoded apart
    default_system: str | None = None
    defaults = SamplingParams(temperature=0.8, top_p=0.8, max_tokens=8192)

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids = special_ids(tokenizer, ("[gMASK]", self.sop, *ROLE_TOKENS), self.name)
        self._end = tokenizer.eos_id
        end = () if self._end is None else (self._end,)
        self.stop_ids: tuple[int, ...] = (*end, self._ids[USER], self._ids[OBSERVATION])

    def render(
        self, messages: Iterable[Message], tools: Sequence[Tool] = (), *, generation_prompt: bool = True
    ) -> Rendered:
        """See `ChatFormat.render`. Adds no system turn but that of the tools."""
        return self._written(messages, tools, generation_prompt).rendered()

    def as_text(self, messages: Iterable[Message], *, generation_prompt: bool) -> str:
        """The conversation as the released template prints it."""
        return self._written(messages, (), generation_prompt).as_text()

    def parser(self, tools: Sequence[Tool] = (), *, skip_special: bool = True) -> ReplyParser:
        names = {name: tool for tool in reversed(tools) for name in self._names(tool)}
        return _RolesParser(
            self._tokenizer, self.stop_ids, self._ids[ASSISTANT], names, self._read, skip_special=skip_special
        )

    def tool_grammar(self, tools: Sequence[Tool], names: Sequence[str], *, parallel: bool) -> str:
        """See `GuidesCalls`."""
        calls, rules = [], ""
        for index, tool in enumerate(tool for tool in tools if tool.name in names):
            calls.append(f"call_{index}")
            head = json.dumps(self._names(tool)[0] + "\n", ensure_ascii=False)
            rules += f"call_{index}: {head} {self.blank}body_{index}\n"
            rules += self._body_rules(tool, f"body_{index}")
        more = f" (<[{self._ids[ASSISTANT]}]> {self.blank}call)*" if parallel else ""
        return f"start: call{more}\ncall: {' | '.join(calls)}\n{rules}"

    @abstractmethod
    def _with_tools(self, turns: list[Message], tools: Sequence[Tool]) -> list[Message]:
        """The turns with what tells the model of the tools."""

    @abstractmethod
    def _call(self, call: ToolCall) -> str:
        """What stands behind the name of a called tool."""

    @abstractmethod
    def _read(self, tool: Tool, body: str) -> str | None:
        """A call's arguments out of what stands behind the tool's name; None when it is no call."""

    @abstractmethod
    def _body_rules(self, tool: Tool, name: str) -> str:
        """Rules of a grammar, the first of this name, for what `_read` reads."""

    @abstractmethod
    def _names(self, tool: Tool) -> tuple[str, ...]:
        """What a call of the tool may have as its first line, the usual one first."""

    def _skips(self, turn: Message) -> bool:
        """Whether a turn without content is left out."""
        return False

    def _written(self, messages: Iterable[Message], tools: Sequence[Tool], generation_prompt: bool) -> Writer:
        turns = checked(messages, self.name)
        calls = [(i, call) for i, turn in enumerate(turns) for call in turn.tool_calls]
        names = [(f"message {i}: calls", call.name) for i, call in calls] + [("tool", tool.name) for tool in tools]
        found = [f"{what} {name[:40]!r}" for what, name in names if not name.isprintable() or not name.strip()]
        if found:
            raise ChatFormatError(problems(f"chat format '{self.name}'", found, "Names must be printable."))
        return self.write(self.parts(turns, tools), generation_prompt=generation_prompt)

    def parts(self, turns: list[Message], tools: Sequence[Tool] = ()) -> list[Part]:
        """What stands behind each role token."""
        return [part for turn in self._with_tools(turns, tools) for part in self._parts(turn)]

    def write(self, parts: Sequence[Part], *, generation_prompt: bool) -> Writer:
        """The conversation as ids and weights."""
        writer = Writer(self._tokenizer)
        for name in ("[gMASK]", self.sop):
            writer.special(self._ids[name])
        before = ""
        for part in parts:
            assistant = part.role == "assistant"
            # What ends the assistant's part before, or goes on with it, the assistant writes itself.
            writer.special(self._ids[_TOKENS[part.role]], float(before == "assistant" and part.role != "system"))
            self._write(writer, part.first_line + "\n", float(assistant))
            self._write(writer, part.content, float(assistant))
            before = part.role
        last = parts[-1] if parts else None
        if last is None or last.role != "assistant":
            if generation_prompt:
                writer.special(self._ids[ASSISTANT])
        elif not generation_prompt:
            end = self._ids[OBSERVATION] if last.calls else self._end
            if end is not None:
                writer.special(end, 1.0)
        return writer

    def _write(self, writer: Writer, text: str, weight: float) -> None:
        writer.text(text, weight)
        writer.cut()

    def _parts(self, turn: Message) -> list[Part]:
        parts = [] if (turn.tool_calls and not turn.content) or self._skips(turn) else [Part(turn.role, turn.content)]
        return parts + [Part("assistant", self._call(call), self._called(call), calls=True) for call in turn.tool_calls]

    def _called(self, call: ToolCall) -> str:
        tool = Tool(name=call.name, kind=call.kind)
        return self._names(tool)[0]


class TidyParser(TextParser):
    """A reply without blanks around it, and with the time that stands for a placeholder, as the released code shows it.

    Held back is what may still change: blanks at the end, and the beginning of the placeholder.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Iterable[int], *, skip_special: bool = True) -> None:
        super().__init__(tokenizer, stop_ids, skip_special=skip_special)
        self._raw, self._begun = "", False

    def _take_text(self, text: str) -> None:
        self._raw += text
        if not self._begun:
            self._raw = self._raw.lstrip()
            self._begun = bool(self._raw)
        self._raw = self._raw.replace(TIME, SHOWN)
        keep = next((n for n in range(min(len(TIME) - 1, len(self._raw)), 0, -1) if self._raw.endswith(TIME[:n])), 0)
        end = len(self._raw) - keep
        if not keep:
            end = len(self._raw.rstrip())
        self._emit(self._raw[:end])
        self._raw = self._raw[end:]

    def _close(self) -> None:
        self._emit(self._raw.rstrip())
        self._raw, self._begun = "", False


class _RolesParser(TidyParser):
    """Parts of a reply, each with a first line: empty before text, the name of a tool before a call.

    A part that is no call after all comes back as the text that it was. Parts of text stand on lines of their own.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_ids: Iterable[int],
        assistant: int,
        tools: dict[str, Tool],
        read: Callable[[Tool, str], str | None],
        *,
        skip_special: bool,
    ) -> None:
        super().__init__(tokenizer, stop_ids, skip_special=skip_special)
        self._assistant, self._tools, self._read = assistant, tools, read
        self._line: str | None = "" if tools else None  # None once the first line is known, or does not matter
        self._tool: Tool | None = None
        self._body: list[str] = []
        self._said = False

    def _take(self, token: int) -> None:
        if token != self._assistant:
            super()._take(token)
            return
        self._take_text(self._detokenizer.finish())
        self._close()
        self._detokenizer = self._tokenizer.detokenizer(skip_special=self._skip_special)

    def _take_text(self, text: str) -> None:
        if self._line is not None:
            self._line += text
            line, end, rest = self._line.partition("\n")
            name = line.strip()
            if not any(known.startswith(name) for known in self._tools) or (end and name not in self._tools):
                text, self._line = self._line, None
            elif end:
                self._tool, text, self._line = self._tools[name], rest, None
                self._body = [line, end]
            else:
                return
        if self._tool is not None:
            self._body.append(text)
        elif text:
            super()._take_text(text)

    def _emit(self, text: str) -> None:
        if text and self._said:
            self._said, text = False, "\n" + text
        super()._emit(text)

    def _close(self) -> None:
        tool, body, line = self._tool, "".join(self._body[2:]), self._line
        whole = "".join(self._body) if tool else line or ""
        self._tool, self._body, self._line = None, [], "" if self._tools else None
        arguments = self._read(tool, body) if tool else None
        if tool and arguments is not None:
            self._emit_calls([ToolCall(name=tool.name, arguments=arguments, kind=tool.kind)])
            self._said = False
            return
        if whole:
            super()._take_text(whole)
        begun = self._begun
        super()._close()
        self._said = begun or self._said


def fenced(body: str) -> tuple[str, bool]:
    """The text in a code block, or the whole without one; and whether the block is closed, true without one."""
    text = body.strip()
    first, line, rest = text.partition("\n")
    if not first.startswith(FENCE) or not line:
        return (text, not first.startswith(FENCE))
    if rest.endswith(f"\n{FENCE}"):
        return rest[: -len(FENCE) - 1], True
    inside, end, _ = rest.partition(f"\n{FENCE}\n")
    return inside, bool(end)


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """A schema of a tool's arguments, for a grammar: an object, spaced as usual."""
    spec = tool_spec(tool)["parameters"] or {"properties": {}, "additionalProperties": False}
    spacing = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return {**spec, "type": "object", "x-guidance": spacing}

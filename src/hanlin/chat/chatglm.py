"""ChatGLM-6B: `[Round i]` prompts as plain text, one reply behind `[gMASK] <sop>`, and the clean-up of replies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from hanlin.chat.base import Writer, checked, special_ids
from hanlin.chat.reply import TextParser
from hanlin.errors import ChatFormatError, problems
from hanlin.types import Message, Rendered, ReplyParser, SamplingParams, Tokenizer, Tool

__all__ = ["SHOWN", "TIME", "ChatGLMFormat", "ChatGLMParser", "clean", "refuse_tools", "rounds_of"]

# What the model writes for the time of its training, and how its makers' code shows it.
TIME, SHOWN = "[[训练时间]]", "2023年"
_WIDE = str.maketrans(",!:;?", "，！：；？")
_MARK = re.compile(r"(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")


def clean(text: str) -> str:
    """A whole reply as the released `process_response` shows it: full-width punctuation beside Chinese characters."""
    return _MARK.sub(lambda mark: mark.group().translate(_WIDE), text.strip().replace(TIME, SHOWN))


class ChatGLMFormat:
    """`[Round 0]\\n问：{question}\\n答：{answer}\\n[Round 1]\\n问：{question}\\n答：`; a first question stands bare.

    The prompt is one text that sees itself both ways; behind it stand `[gMASK]` and `<sop>`, then the reply. So only
    the last reply has weight in training, and a reply that is to be gone on with stands behind `<sop>` too.

    The model was trained without system messages and tools. A system message stands in front of the question that
    follows it, on lines of its own, as its makers' OpenAI server has it (they add no line end); tools are refused.
    Source: the released `chat()` and `process_response()`.
    """

    name = "chatglm"
    default_system: str | None = None
    defaults = SamplingParams(temperature=0.95, top_p=0.7, max_tokens=2048)

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = special_ids(tokenizer, ("[gMASK]", "<sop>", "<eop>"), self.name)
        self._tokenizer = tokenizer
        self._gmask, self._sop, self._eop = ids.values()
        self.stop_ids: tuple[int, ...] = (self._eop,)

    def render(
        self, messages: Iterable[Message], tools: Sequence[Tool] = (), *, generation_prompt: bool = True
    ) -> Rendered:
        """See `ChatFormat.render`."""
        turns = checked(messages, self.name)
        refuse_tools(turns, tools, self.name)
        rounds = rounds_of(turns)
        reply = rounds[-1][1] if rounds else None
        writer = Writer(self._tokenizer)
        writer.text(prompt(rounds))
        if generation_prompt or reply is not None:
            writer.special(self._gmask)
            writer.special(self._sop)
        writer.text(reply or "", 1.0)
        if not generation_prompt and reply is not None:
            writer.special(self._eop, 1.0)
        return writer.rendered()

    def parser(self, tools: Sequence[Tool] = (), *, skip_special: bool = True) -> ReplyParser:
        return ChatGLMParser(self._tokenizer, self.stop_ids, skip_special=skip_special)


def prompt(rounds: Sequence[tuple[str, str | None]]) -> str:
    """The text of a conversation (question, answer), the last of which is being answered."""
    if not rounds:
        return ""
    *before, (question, _) = rounds
    if not before:
        return question
    told = "".join(f"[Round {i}]\n问：{asked}\n答：{answered}\n" for i, (asked, answered) in enumerate(before))
    return f"{told}[Round {len(before)}]\n问：{question}\n答："


def refuse_tools(turns: Sequence[Message], tools: Sequence[Tool], format_name: str) -> None:
    """For models that were not trained with tools.

    Raises:
        ChatFormatError: naming every tool, call and result.
    """
    found = [f"message {i}: tool results" for i, turn in enumerate(turns) if turn.role == "tool"]
    found += [f"message {i}: tool calls" for i, turn in enumerate(turns) if turn.tool_calls]
    found += [f"tool {tool.name!r}" for tool in tools]
    if found:
        remedy = "Use ChatGLM3-6B, GLM-4-9B or InternLM2 for tools."
        raise ChatFormatError(problems(f"chat format '{format_name}' knows no tools", found, remedy))


def rounds_of(turns: Sequence[Message]) -> list[tuple[str, str | None]]:
    """Questions with their answers; what one side says in several messages is one text of several lines."""
    rounds: list[tuple[list[str], list[str]]] = []
    for turn in turns:
        if turn.role != "assistant" and (not rounds or rounds[-1][1]):
            rounds.append(([], []))
        elif not rounds:
            rounds.append(([""], []))
        rounds[-1][turn.role == "assistant"].append(turn.content)
    return [("\n".join(asked), "\n".join(answered) if answered else None) for asked, answered in rounds]


class ChatGLMParser(TextParser):
    """Cleans a reply as it grows: the pieces, joined, are `clean` of the whole.

    Held back is what may still change: blanks at the end, the beginning of the time's placeholder, and a mark whose
    next character is not known.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Iterable[int], *, skip_special: bool = True) -> None:
        super().__init__(tokenizer, stop_ids, skip_special=skip_special)
        self._raw, self._before, self._begun = "", "", False

    def _take_text(self, text: str) -> None:
        self._raw += text
        if not self._begun:
            self._raw = self._raw.lstrip()
            self._begun = bool(self._raw)
        self._raw = self._raw.replace(TIME, SHOWN)
        keep = next((n for n in range(min(len(TIME) - 1, len(self._raw)), 0, -1) if self._raw.endswith(TIME[:n])), 0)
        settled = self._raw[: len(self._raw) - keep]
        if not keep:
            settled = settled.rstrip()
        known = len(settled) < len(self._raw) and not keep  # a blank follows
        if settled and not known and settled[-1] in ",!:;?":
            settled = settled[:-1]
        self._show(settled)

    def _close(self) -> None:
        self._raw = self._raw.rstrip()
        self._show(self._raw)

    def _show(self, settled: str) -> None:
        """Emit the beginning of what is held, with one character on either side to judge marks by."""
        if not settled:
            return
        follows = self._raw[len(settled) : len(settled) + 1]
        text = self._before + settled + follows
        shown = _MARK.sub(lambda mark: mark.group().translate(_WIDE), text)
        self._emit(shown[len(self._before) : len(shown) - len(follows)])
        self._before, self._raw = settled[-1], self._raw[len(settled) :]

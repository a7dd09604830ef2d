"""Generic ChatML: `<|im_start|>{role}\\n{content}<|im_end|>\\n` for system, user and assistant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hanlin.chat.base import Writer, checked, special_ids
from hanlin.chat.reply import TaggedParser, TextParser
from hanlin.chat.tools import interpreter_names, plain_messages, tagged_grammar
from hanlin.types import Message, Rendered, ReplyParser, SamplingParams, Tokenizer, Tool

__all__ = ["ChatMLFormat"]

START, END = "<|im_start|>", "<|im_end|>"


class ChatMLFormat:
    """SmolLM2, Qwen2 and whoever else writes plain ChatML.

    `template_system` is what the model's own template puts in front of a conversation that does not begin with a
    system message, and `bos` whether it begins with the BOS token: `render` gives what that template gives. Names of
    turns are not written, as in the templates. Tools use the JSON protocol of `hanlin.chat.tools`; calls are looked
    for in a reply only when tools were given.
    """

    name = "chatml"
    defaults = SamplingParams(temperature=0.2, top_p=0.9)

    def __init__(self, tokenizer: Tokenizer, *, template_system: str | None = None, bos: bool = False) -> None:
        ids = special_ids(tokenizer, (START, END), self.name)
        self._tokenizer, self._bos = tokenizer, bos
        self._start, self._end = ids[START], ids[END]
        self.default_system = self._template_system = template_system
        eos = tokenizer.eos_id
        self.stop_ids: tuple[int, ...] = (self._end,) if eos is None or eos == self._end else (eos, self._end)

    def render(
        self, messages: Iterable[Message], tools: Sequence[Tool] = (), *, generation_prompt: bool = True
    ) -> Rendered:
        """See `ChatFormat.render`."""
        return self._write(messages, tools, generation_prompt).rendered()

    def as_text(self, messages: Iterable[Message], *, generation_prompt: bool = True) -> str:
        """What the model's template would print; for comparing, never for encoding."""
        return self._write(messages, (), generation_prompt).as_text()

    def parser(self, tools: Sequence[Tool] = (), *, skip_special: bool = True) -> ReplyParser:
        if not tools:
            return TextParser(self._tokenizer, self.stop_ids, skip_special=skip_special)
        return TaggedParser(
            self._tokenizer, self.stop_ids, skip_special=skip_special, interpreters=interpreter_names(tools)
        )

    def tool_grammar(self, tools: Sequence[Tool], names: Sequence[str], *, parallel: bool) -> str:
        """See `GuidesCalls`."""
        return tagged_grammar(self._tokenizer, tools, names, parallel=parallel)

    def _write(self, messages: Iterable[Message], tools: Sequence[Tool], generation_prompt: bool) -> Writer:
        turns = checked(messages, self.name)
        if self._template_system is not None and turns and turns[0].role != "system":
            turns.insert(0, Message(role="system", content=self._template_system))
        turns = plain_messages(turns, tools)
        writer = Writer(self._tokenizer)
        if self._bos:
            writer.bos()
        for index, turn in enumerate(turns):
            weight = float(turn.role == "assistant")
            writer.special(self._start)
            writer.text(f"{turn.role}\n")
            writer.text(turn.content, weight)
            if generation_prompt and turn.role == "assistant" and index + 1 == len(turns):
                return writer
            writer.special(self._end, weight)
            writer.text("\n")
        if generation_prompt:
            writer.special(self._start)
            writer.text("assistant\n")
        return writer

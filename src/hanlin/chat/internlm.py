"""InternLM 1: roles are plain text, only the end of a turn is a special token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hanlin.chat.base import Writer, checked, special_ids
from hanlin.chat.internlm2 import META_INSTRUCTION
from hanlin.chat.reply import TextParser
from hanlin.errors import ChatFormatError, problems
from hanlin.types import Message, Rendered, ReplyParser, SamplingParams, Tokenizer, Tool

__all__ = ["InternLMFormat"]

ROLE_NAMES = {"system": "<|System|>", "user": "<|User|>", "assistant": "<|Bot|>"}


class InternLMFormat:
    """`<s><|System|>:{system}\\n<|User|>:{question}\\n<|Bot|>:{answer}<eoa>\\n`: internlm-chat-7b, -8k and -20b.

    `early=True` is the format of internlm-chat-7b-v1_1, which ends user turns with `<eoh>` and has no system prompt of
    its own. `<eoh>` and `<eoa>` cannot be forged by a message; `<|User|>` and `<|Bot|>` are ordinary text in this
    vocabulary, so text that spells them reads like a turn to these models. Source: the model cards (facts as in
    InternLM's own chat() and LMDeploy's template).
    """

    defaults = SamplingParams(temperature=0.8, top_p=0.8, max_tokens=1024)

    def __init__(self, tokenizer: Tokenizer, *, early: bool = False) -> None:
        self.name = "internlm-v1_1" if early else "internlm"
        self.default_system: str | None = None if early else META_INSTRUCTION
        ids = special_ids(tokenizer, ("<eoh>", "<eoa>"), self.name)
        self._tokenizer, self._early = tokenizer, early
        self._eoh, self._eoa = ids["<eoh>"], ids["<eoa>"]
        self.stop_ids: tuple[int, ...] = (self._eoa,) if tokenizer.eos_id is None else (tokenizer.eos_id, self._eoa)

    def render(
        self, messages: Iterable[Message], tools: Sequence[Tool] = (), *, generation_prompt: bool = True
    ) -> Rendered:
        """See `ChatFormat.render`. Never adds a system turn."""
        turns = checked(messages, self.name)
        found = [f"message {i}: tool results" for i, turn in enumerate(turns) if turn.role == "tool"]
        found += [f"message {i}: tool calls" for i, turn in enumerate(turns) if turn.tool_calls]
        found += [f"tool {tool.name!r}" for tool in tools]
        if found:
            raise ChatFormatError(
                problems(f"chat format '{self.name}' knows no tools", found, "Use an InternLM2 model.")
            )
        writer = Writer(self._tokenizer)
        writer.bos()
        for index, turn in enumerate(turns):
            weight = float(turn.role == "assistant")
            writer.text(f"{ROLE_NAMES[turn.role]}:")
            writer.text(turn.content, weight)
            if turn.role == "assistant":
                if generation_prompt and index + 1 == len(turns):
                    return writer.rendered()
                writer.special(self._eoa, weight)
            elif turn.role == "user" and self._early:
                writer.special(self._eoh)
            writer.text("\n")
        if generation_prompt:
            writer.text(f"{ROLE_NAMES['assistant']}:")
        return writer.rendered()

    def parser(self, tools: Sequence[Tool] = (), *, skip_special: bool = True) -> ReplyParser:
        return TextParser(self._tokenizer, self.stop_ids, skip_special=skip_special)

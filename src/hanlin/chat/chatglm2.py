"""ChatGLM2: `[Round i]` prompts from 1 on, as one text, and tidy replies. Source: the released `chat()`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hanlin.chat.base import Writer, checked, special_ids
from hanlin.chat.chatglm import refuse_tools, rounds_of
from hanlin.chat.roles import TidyParser
from hanlin.types import Message, Rendered, ReplyParser, SamplingParams, Tokenizer, Tool

__all__ = ["ChatGLM2Format"]


class ChatGLM2Format:
    """`[Round 1]\\n\\n问：{question}\\n\\n答：{answer}\\n\\n[Round 2]...` behind `[gMASK]` and `sop`.

    All answers have weight in training; only the last has an end. The model was trained without system messages and
    tools. Leading system messages stand before the first round, as XTuner has it, later ones in front of the question
    that follows them; tools are refused.
    """

    name = "chatglm2"
    default_system: str | None = None
    defaults = SamplingParams(temperature=0.8, top_p=0.8, max_tokens=8192)

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._start = tuple(special_ids(tokenizer, ("[gMASK]", "sop"), self.name).values())
        self.stop_ids: tuple[int, ...] = () if tokenizer.eos_id is None else (tokenizer.eos_id,)

    def render(
        self, messages: Iterable[Message], tools: Sequence[Tool] = (), *, generation_prompt: bool = True
    ) -> Rendered:
        """See `ChatFormat.render`."""
        turns = checked(messages, self.name)
        refuse_tools(turns, tools, self.name)
        leading = 0
        while leading < len(turns) and turns[leading].role == "system":
            leading += 1
        rounds = rounds_of(turns[leading:]) or [("", None)]
        writer = Writer(self._tokenizer)
        for token in self._start:
            writer.special(token)
        for turn in turns[:leading]:
            writer.text(f"{turn.content}\n")
        for number, (question, answer) in enumerate(rounds, 1):
            writer.text(f"[Round {number}]\n\n问：{question}\n\n答：")
            writer.text(answer or "", 1.0)
            if number < len(rounds):
                writer.text("\n\n")
        if not generation_prompt and rounds[-1][1] is not None:
            for token in self.stop_ids:
                writer.special(token, 1.0)
        return writer.rendered()

    def parser(self, tools: Sequence[Tool] = (), *, skip_special: bool = True) -> ReplyParser:
        return TidyParser(self._tokenizer, self.stop_ids, skip_special=skip_special)

"""No chat format at all: what a base model gets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hanlin.chat.base import Writer, checked
from hanlin.chat.reply import TextParser
from hanlin.errors import ChatFormatError
from hanlin.types import Message, Rendered, ReplyParser, SamplingParams, Tokenizer, Tool

__all__ = ["RawFormat"]


class RawFormat:
    """One user message is the prompt itself, to be gone on with; there is no way to write a conversation.

    The same as LMDeploy's template `base`. The prompt gets what the tokenizer puts around a bare one (BOS).
    """

    name = "raw"
    default_system: str | None = None
    defaults = SamplingParams(max_tokens=512)

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.stop_ids: tuple[int, ...] = () if tokenizer.eos_id is None else (tokenizer.eos_id,)

    def render(
        self, messages: Iterable[Message], tools: Sequence[Tool] = (), *, generation_prompt: bool = True
    ) -> Rendered:
        """See `ChatFormat.render`."""
        turns = checked(messages, self.name)
        if len(turns) != 1 or turns[0].role != "user" or tools:
            raise ChatFormatError(
                "this model comes without a chat template, so it is taken for a base model, which can only go on with "
                "one text: it knows no system prompts, replies, several turns or tools. Use generate() with a prompt, "
                "or name the format it was trained on, such as 'chatml' or 'internlm2'."
            )
        writer = Writer(self._tokenizer)
        for token in self._tokenizer.encode("", add_special=True):
            writer.special(token)
        writer.text(turns[0].content)
        return writer.rendered()

    def parser(self, tools: Sequence[Tool] = (), *, skip_special: bool = True) -> ReplyParser:
        return TextParser(self._tokenizer, self.stop_ids, skip_special=skip_special)

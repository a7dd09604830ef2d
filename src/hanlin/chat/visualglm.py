"""VisualGLM-6B: one image in front, then questions and answers, in Chinese or in English."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from hanlin.chat.base import Writer, checked, special_ids
from hanlin.chat.chatglm import ChatGLMParser, refuse_tools, rounds_of
from hanlin.errors import ChatFormatError
from hanlin.types import Message, Rendered, ReplyParser, SamplingParams, Tokenizer, Tool

__all__ = ["VisualGLMFormat"]

_CHINESE = re.compile("[\u4e00-\u9fff]")


class VisualGLMFormat:
    """`<img>` 32 places `</img>问：{question}\\n答：{answer}\\n问：{question}\\n答：`, behind it `[gMASK]` and `<sop>`.

    Where no message holds a Chinese character, `Q:` and `A:` stand for `问：` and `答：`, as the released server has
    it. The model was trained with one image, at the very front, whichever question comes with it; a conversation about
    two is refused. Without an image there is no `<img>`. System messages and tools as with ChatGLM-6B.
    Source: the released `chat()` of both versions.

    Attributes:
        image_length: places of an image; they hold `<pad>`, which the image's embeddings replace.
        english: None finds out by the messages.
    """

    name = "visualglm"
    default_system: str | None = None
    defaults = SamplingParams(temperature=0.95, top_p=0.7, top_k=30, repetition_penalty=1.2, max_tokens=1024)

    def __init__(self, tokenizer: Tokenizer, *, image_length: int = 32, english: bool | None = None) -> None:
        ids = special_ids(tokenizer, ("[gMASK]", "<sop>", "<eop>", "<pad>"), self.name)
        self._tokenizer, self.image_length, self.english = tokenizer, image_length, english
        self._gmask, self._sop, self._eop, self._pad = ids.values()
        self.stop_ids: tuple[int, ...] = (self._eop,)

    def render(
        self, messages: Iterable[Message], tools: Sequence[Tool] = (), *, generation_prompt: bool = True
    ) -> Rendered:
        """See `ChatFormat.render`."""
        turns = checked(messages, self.name, sees=True)
        refuse_tools(turns, tools, self.name)
        images = list(dict.fromkeys(image for turn in turns for image in turn.images))
        if len(images) > 1:
            raise ChatFormatError(
                f"chat format '{self.name}': the conversation shows {len(images)} images, the model sees one. "
                "Begin another conversation for each."
            )
        rounds = rounds_of(turns)
        reply = rounds[-1][1] if rounds else None
        english = self.english
        if english is None:
            english = not any(_CHINESE.search(turn.content) for turn in turns)
        asks, answers = ("Q:", "A:") if english else ("问：", "答：")
        writer = Writer(self._tokenizer)
        if images:
            writer.text("<img>")
            for _ in range(self.image_length):
                writer.special(self._pad)
            writer.text("</img>")
        for asked, answered in rounds[:-1]:
            writer.text(f"{asks}{asked}\n{answers}{answered or ''}\n")
        if rounds:
            writer.text(f"{asks}{rounds[-1][0]}\n{answers}")
        if generation_prompt or reply is not None:
            writer.special(self._gmask)
            writer.special(self._sop)
        writer.text(reply or "", 1.0)
        if not generation_prompt and reply is not None:
            writer.special(self._eop, 1.0)
        rendered = writer.rendered()
        # No text makes a special token: the first padding is the image's first place.
        return replace(rendered, images=tuple((rendered.ids.index(self._pad), image) for image in images))

    def parser(self, tools: Sequence[Tool] = (), *, skip_special: bool = True) -> ReplyParser:
        return ChatGLMParser(self._tokenizer, self.stop_ids, skip_special=skip_special)

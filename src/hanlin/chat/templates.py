"""Jinja templates for files that go to other programs: plain conversations as the built-in formats print them.

The first releases of ChatGLM3 and GLM-4 have none, and a program that finds none in a GGUF file takes ChatML.
"""

from __future__ import annotations

from hanlin.chat.chatglm3 import ChatGLM3Format
from hanlin.chat.glm4 import GLM4Format
from hanlin.types import ChatFormat

__all__ = ["template_for"]

_END = "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
_CHATGLM3 = "[gMASK]sop{% for message in messages %}<|{{ message['role'] }}|>\n {{ message['content'] }}" + _END
_GLM4 = (
    "[gMASK]<sop>{% for message in messages %}{% if message['content'] %}<|{{ message['role'] }}|>\n"
    "{{ message['content'] }}{% endif %}" + _END
)


def template_for(chat_format: ChatFormat) -> str | None:
    """The template of a built-in format, if it has one that says the same."""
    if isinstance(chat_format, ChatGLM3Format):
        return _CHATGLM3
    return _GLM4 if isinstance(chat_format, GLM4Format) else None

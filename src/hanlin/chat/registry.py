"""Which format a model speaks. A new family adds a line to `FORMATS` and says in `chat_format_for` how to know it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from hanlin.chat.chatglm import ChatGLMFormat
from hanlin.chat.chatglm2 import ChatGLM2Format
from hanlin.chat.chatglm3 import ChatGLM3Format
from hanlin.chat.chatml import ChatMLFormat
from hanlin.chat.glm4 import GLM4Format
from hanlin.chat.internlm import InternLMFormat
from hanlin.chat.internlm2 import SPECIALS, InternLM2Format
from hanlin.chat.raw import RawFormat
from hanlin.chat.roles import ROLE_TOKENS, RolesFormat
from hanlin.chat.sandbox import Sandbox
from hanlin.chat.template import TemplateFormat, print_template, sees_tools
from hanlin.chat.visualglm import VisualGLMFormat
from hanlin.errors import ChatFormatError
from hanlin.types import ChatFormat, Message, Tokenizer

__all__ = ["chat_format_for", "list_formats"]


class _Entry(NamedTuple):
    build: Callable[[Tokenizer], ChatFormat]
    aliases: tuple[str, ...] = ()


# The aliases are LMDeploy's names, and XTuner's where they differ; see `_plain` for how they are compared.
FORMATS: Mapping[str, _Entry] = MappingProxyType(
    {
        "internlm2": _Entry(
            InternLM2Format,
            (
                "internlm2-1_8b", "internlm2-7b", "internlm2-20b", "internlm2-chat", "internlm2-chat-1_8b",
                "internlm2-chat-7b", "internlm2-chat-20b", "internlm2_5", "internlm2_5-chat", "internlm2_5-1_8b-chat",
                "internlm2_5-7b-chat", "internlm2_5-7b-chat-1m", "internlm2_5-20b-chat",
            ),
        ),
        "internlm": _Entry(
            InternLMFormat, ("internlm-chat", "internlm-chat-7b", "internlm-chat-7b-8k", "internlm-chat-20b")
        ),
        "internlm-v1_1": _Entry(lambda tokenizer: InternLMFormat(tokenizer, early=True), ("internlm-chat-7b-v1_1",)),
        "chatglm": _Entry(ChatGLMFormat, ("chatglm-6b", "chatglm-6b-int4", "chatglm-6b-int8")),
        "visualglm": _Entry(VisualGLMFormat, ("visualglm-6b",)),
        "chatglm2": _Entry(ChatGLM2Format, ("chatglm2-6b", "chatglm2-6b-int4", "chatglm2-6b-32k")),
        "chatglm3": _Entry(ChatGLM3Format, ("chatglm3-6b", "chatglm3-6b-32k", "chatglm3-6b-128k")),
        "glm4": _Entry(GLM4Format, ("glm-4", "glm-4-9b-chat", "glm-4-9b-chat-1m", "glm-4-9b-chat-hf")),
        "chatml": _Entry(ChatMLFormat, ("qwen", "smollm2")),
        "raw": _Entry(RawFormat, ("base", "codegeex2", "codegeex2-6b")),
    }
)  # fmt: skip

# None ends with the assistant: `render` leaves such a turn open, which templates cannot say.
PROBES = tuple(
    tuple(Message(role=role, content=content) for role, content in probe)
    for probe in (
        (("user", " a\n\nb "),),
        (("system", " s "), ("user", "a")),
        (("user", "a"), ("assistant", " b\n"), ("user", "'c\"")),
        (("system", ""), ("user", ""), ("assistant", "b"), ("user", "c"), ("assistant", ""), ("user", "d")),
    )
)


def list_formats() -> tuple[str, ...]:
    """The names that `chat_format_for` takes; `template` needs a model that comes with one."""
    return (*FORMATS, "template")


def chat_format_for(
    tokenizer: Tokenizer, *, model_type: str, template: str | None = None, name: str | None = None
) -> ChatFormat:
    """The format that a model speaks.

    A `name` decides alone. Else a `template` that prints plain conversations as ChatML does, and leaves tools alone, is
    replaced by the built-in ChatML (or InternLM2's, when the tokenizer has its special tokens), which prints the same,
    the template's own default system prompt included; so is one that prints them as ChatGLM3 or GLM-4 do, whose tools
    only the built-in formats know how to read back; any other template is run as it is, in the sandbox. Without a
    template the `model_type` decides; and a model that has neither gets `raw`, for base models.

    Raises:
        ChatFormatError: an unknown name (all are listed), a tokenizer without the format's special tokens, or a
            template that cannot be used.
    """
    if name is not None:
        return _by_name(tokenizer, name, template)
    internlm2 = all(tokenizer.token_id(piece) in tokenizer.special_ids for piece in SPECIALS)
    if template is not None and template.strip():
        sandbox = Sandbox(template)
        found = _as_chatml(tokenizer, sandbox)
        if found is None:
            return _as_roles(tokenizer, sandbox) or TemplateFormat(tokenizer, sandbox)
        return InternLM2Format(tokenizer, template_system=found.default_system) if internlm2 else found
    if model_type in ("internlm2", "internlm2-reward", "internlm3") and internlm2:
        return InternLM2Format(tokenizer)
    if model_type == "internlm" and tokenizer.token_id("<eoa>") is not None:
        return InternLMFormat(tokenizer)
    if model_type == "chatglm" and tokenizer.token_id("<eop>") is not None:
        return ChatGLMFormat(tokenizer)
    if model_type == "visualglm" and tokenizer.token_id("<eop>") is not None:
        return VisualGLMFormat(tokenizer)
    if model_type in ("chatglm2", "glm") and tokenizer.token_id("[gMASK]") in tokenizer.special_ids:
        return _glm(tokenizer)
    return RawFormat(tokenizer)


def _glm(tokenizer: Tokenizer) -> ChatFormat:
    """ChatGLM3 and GLM-4 have role tokens; CodeGeeX2, which goes on with code, puts no space before a text."""
    found = _roles(tokenizer)
    if found is None:
        first = tokenizer.encode("a")[:1]
        spaced = bool(first) and tokenizer.token_text(first[0]).startswith(" ")
        return ChatGLM2Format(tokenizer) if spaced else RawFormat(tokenizer)
    return found


def _roles(tokenizer: Tokenizer) -> RolesFormat | None:
    if not all(tokenizer.token_id(piece) in tokenizer.special_ids for piece in ROLE_TOKENS):
        return None
    four = tokenizer.token_id(GLM4Format.sop) in tokenizer.special_ids
    return GLM4Format(tokenizer) if four else ChatGLM3Format(tokenizer)


def _as_roles(tokenizer: Tokenizer, sandbox: Sandbox) -> RolesFormat | None:
    """ChatGLM3's or GLM-4's turns as a template prints them.

    ChatGLM3's own puts the space behind the line end that its tokenizer puts before each part.
    """
    found = _roles(tokenizer)
    try:
        for probe in PROBES if found else ():
            for prompted in (False, True):
                printed = print_template(sandbox, tokenizer, probe, generation_prompt=prompted)
                wanted = found.as_text(probe, generation_prompt=prompted) if found else ""
                if printed not in (wanted, wanted.replace("|>\n", "|>\n ")):
                    return None
    except ChatFormatError:
        return None
    return found


def _by_name(tokenizer: Tokenizer, name: str, template: str | None) -> ChatFormat:
    wanted = _plain(name)
    if wanted == "template":
        if not template:
            raise ChatFormatError("chat format 'template': the model comes without a chat template")
        return TemplateFormat(tokenizer, template)
    for known, entry in FORMATS.items():
        if wanted in map(_plain, (known, *entry.aliases)):
            return entry.build(tokenizer)
    raise ChatFormatError(f"unknown chat format {name!r}; known: {', '.join(list_formats())}")


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _as_chatml(tokenizer: Tokenizer, sandbox: Sandbox) -> ChatMLFormat | None:
    """ChatML as a template prints it, if that is all that the template does."""
    if not all(tokenizer.token_id(piece) in tokenizer.special_ids for piece in SPECIALS[:2]):
        return None
    start, end = SPECIALS[:2]
    probes = [(probe, prompted) for probe in PROBES for prompted in (False, True)]
    try:
        printed = [print_template(sandbox, tokenizer, probe, generation_prompt=prompted) for probe, prompted in probes]
    except ChatFormatError:
        return None
    if sees_tools(sandbox, tokenizer):
        return None
    head, _, _ = printed[0].partition(f"{start}user\n")
    _, opened, system = head.partition(f"{start}system\n")
    own_system = system.removesuffix(f"{end}\n") if opened else None
    for bos in (False, True):
        candidate = ChatMLFormat(tokenizer, template_system=own_system, bos=bos)
        if printed == [candidate.as_text(probe, generation_prompt=prompted) for probe, prompted in probes]:
            return candidate
    return None

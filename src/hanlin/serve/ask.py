"""What a conversation asks for, in whichever API it came: one way from there to jobs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hanlin.llm import LLM
from hanlin.requests import Job, prompts_of
from hanlin.types import Message, Tool, ToolCall

__all__ = ["Ask", "arguments_of"]

# Other words for a constraint, see `Constraint.take`.
_CONSTRAINTS = (
    *("constraint", "response_format", "structured_outputs", "guided_decoding"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A conversation, or a prompt, and how to answer it.

    Attributes:
        messages: as `Message.parse` reads them; or None for a `prompt`.
        suffix: a text that is to follow the reply to a prompt.
        sampling: fields of `SamplingParams`; None means the model's own value.
        tools, tool_choice, parallel_tool_calls, response_format: as OpenAI's.
    """

    messages: Sequence[Message | Mapping[str, Any]] | None = None
    prompt: Any = None
    suffix: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Tool | Mapping[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: Any = None

    @property
    def slow(self) -> bool:
        """Whether to make its jobs is to compile what replies must look like, or to look at images."""
        if any(_shows(message) for message in self.messages or ()):
            return True
        free = self.tool_choice in (None, "auto", "none") and self.response_format is None
        return not free or any(self.sampling.get(name) is not None for name in _CONSTRAINTS)

    def jobs(self, llm: LLM, adapter: str | None = None) -> list[Job]:
        """Render and tokenise.

        Raises:
            RequestError: what cannot be, all at once.
        """
        overrides = {name: value for name, value in self.sampling.items() if value is not None}
        for name in ("tool_choice", "parallel_tool_calls", "response_format"):
            value = getattr(self, name)
            if value is not None and (self.messages is not None or name == "response_format"):
                overrides[name] = value
        if self.messages is None:
            jobs = llm.requests.prompt_jobs(self._prompts(llm), None, overrides)
        else:
            jobs = llm.requests.chat_jobs(self.messages, None, self.tools, overrides)[1]
        return [replace(job, adapter=adapter) for job in jobs] if adapter else jobs

    def _prompts(self, llm: LLM) -> Any:
        if not self.suffix:
            return self.prompt
        return [llm.requests.infilled(prompt, self.suffix) for prompt in prompts_of(self.prompt)]


def _shows(message: Message | Mapping[str, Any]) -> bool:
    """Whether a message may hold an image."""
    return bool(message.images) if isinstance(message, Message) else isinstance(message.get("content"), list)


def arguments_of(call: ToolCall) -> Any:
    """A call's arguments as a value; as the text that the model wrote, where that is no JSON."""
    if call.kind == "interpreter":
        return {"code": call.arguments}
    try:
        return json.loads(call.arguments)
    except ValueError:
        return {"arguments": call.arguments}

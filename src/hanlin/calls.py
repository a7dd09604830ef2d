"""Which tools a request offers, and which of them the reply must call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hanlin.errors import RequestError, problems
from hanlin.types import ChatFormat, Constraint, GuidesCalls, Tool

__all__ = ["Calls"]


@dataclass(frozen=True, kw_only=True)
class Calls:
    """
    Attributes:
        tools: those that the model is told of.
        must: names of those of which it must call one; empty when it is free.
        parallel: whether one reply may call more than once.
    """

    tools: tuple[Tool, ...] = ()
    must: tuple[str, ...] = ()
    parallel: bool = True

    @classmethod
    def take(cls, tools: tuple[Tool, ...], overrides: Mapping[str, Any]) -> tuple[Calls, dict[str, Any]]:
        """What `tool_choice` and `parallel_tool_calls` among `overrides` say, and the other overrides.

        `tool_choice` is "auto", "none", "required", or a tool by name, as OpenAI writes it:
        `{"type": "function", "function": {"name": ...}}`. A named tool is called once.

        Raises:
            RequestError: naming every value that cannot be.
        """
        rest = dict(overrides)
        choice, parallel = rest.pop("tool_choice", None), rest.pop("parallel_tool_calls", None)
        found = []
        if not isinstance(parallel, bool | None):
            found.append(f"parallel_tool_calls must be true or false, not {parallel!r:.40}")
        names = tuple(tool.name for tool in tools)
        wanted = _name(choice)
        if choice not in (None, "auto", "none", "required") and wanted is None:
            found.append(
                "tool_choice must be 'auto', 'none', 'required' or {'type': 'function', 'function': {'name': ...}}, "
                f"not {choice!r:.80}"
            )
        elif wanted is not None and wanted not in names:
            found.append(f"tool_choice names {wanted!r:.80}, which is none of the tools ({', '.join(names) or 'none'})")
        elif choice == "required" and not tools:
            found.append("tool_choice is 'required', but there are no tools")
        if found:
            raise RequestError(problems("tools", found))
        if choice == "none":
            return cls(), rest
        if wanted is not None:
            return cls(tools=tools, must=(wanted,), parallel=False), rest
        return cls(tools=tools, must=names if choice == "required" else (), parallel=parallel is not False), rest

    def constraint(self, chat_format: ChatFormat, given: Constraint | None) -> Constraint | None:
        """What the reply must look like: the call that it must make, or what was asked for beside.

        Raises:
            RequestError: both at once, or a format that knows no tools.
        """
        if not self.must:
            return given
        if given is not None:
            raise RequestError(
                "a reply that must call a tool cannot be constrained otherwise too: drop tool_choice or the constraint"
            )
        if not isinstance(chat_format, GuidesCalls):
            raise RequestError(f"chat format '{chat_format.name}' knows no tools, so none can be called")
        return Constraint("grammar", chat_format.tool_grammar(self.tools, self.must, parallel=self.parallel))


def _name(choice: object) -> str | None:
    """The tool that a choice names."""
    if not isinstance(choice, Mapping):
        return None
    if choice.get("type") in ("interpreter", "code_interpreter"):
        return "interpreter"
    inner = choice.get("function", choice)
    name = inner.get("name") if isinstance(inner, Mapping) else None
    return name if isinstance(name, str) else None

"""ChatGLM3: role tokens, tools as JSON in the system turn, calls in Python's syntax, a code interpreter.

Source: ChatGLM3's PROMPT.md, the released `chat()`, `process_response()` and tokenizer; its interpreter's demo.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hanlin.chat.literals import read_call, write_call
from hanlin.chat.reply import json_text
from hanlin.chat.roles import FENCE, RolesFormat, arguments_schema, fenced
from hanlin.chat.tools import call_arguments, tool_spec
from hanlin.types import Message, Tool, ToolCall

__all__ = ["INTERPRETER_PROMPT", "TOOLS_PROMPT", "ChatGLM3Format"]

TOOLS_PROMPT = (
    "Answer the following questions as best as you can. You have access to the following tools:"  # where nobody says so
)
INTERPRETER_PROMPT = (
    "你是一位智能AI助手，你叫ChatGLM，你连接着一台电脑，但请注意不能联网。在使用Python解决任务时，"
    "你可以运行代码并得到结果，如果运行结果有错误，你需要尽可能对代码进行改进。"
    "你可以处理用户上传到电脑上的文件，文件默认存储路径是/mnt/data/。"
)
_FUNCTION = "tool_call"


class ChatGLM3Format(RolesFormat):
    """See `RolesFormat`. The tools follow the first system turn's text, as a JSON list.

    A call is a code block with `tool_call(argument=value, ...)` below the tool's name, and for the interpreter a code
    block below `interpreter`. The released code evaluates the former; here it is read as literals.
    """

    name = "chatglm3"
    sop = "sop"
    blank = '" "? '

    def _names(self, tool: Tool) -> tuple[str, ...]:
        return ("interpreter", tool.name) if tool.kind == "interpreter" else (tool.name,)

    def _with_tools(self, turns: list[Message], tools: Sequence[Tool]) -> list[Message]:
        if not tools:
            return turns
        first, *rest = turns if turns and turns[0].role == "system" else [Message(role="system"), *turns]
        plugins = [tool_spec(tool) for tool in tools if tool.kind == "function"]
        lines = [first.content] if first.content else []
        lines += [tool.description or INTERPRETER_PROMPT for tool in tools if tool.kind == "interpreter"]
        if plugins:
            lines += [] if first.content else [TOOLS_PROMPT]
            lines.append(json.dumps(plugins, indent=4, ensure_ascii=False))
        return [replace(first, content="\n".join(lines)), *rest]

    def _call(self, call: ToolCall) -> str:
        code = call.arguments if call.kind == "interpreter" else write_call(_FUNCTION, call_arguments(call))
        return f"{FENCE}python\n{code}\n{FENCE}"

    def _read(self, tool: Tool, body: str) -> str | None:
        inside, closed = fenced(body)
        if tool.kind == "interpreter":
            return inside if closed and body.lstrip().startswith(FENCE) and inside.strip() else None
        call = read_call(inside)
        return json_text(call[1]) if call and call[0] in (_FUNCTION, tool.name) else None

    def _body_rules(self, tool: Tool, name: str) -> str:
        if tool.kind == "interpreter":
            return f'{name}: "{FENCE}python\\n" {name}_code\n' + rf"{name}_code[lazy]: /[^\s`](?s:.*)\n{FENCE}/" + "\n"
        schema = arguments_schema(tool)
        properties = schema.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        wanted = [key for key in schema.get("required") or () if key in properties]
        others = [key for key in properties if key not in wanted]
        start, end = f'{name}: "{FENCE}python\\n{_FUNCTION}("', f'")\\n{FENCE}"\n'
        if not all(key.isascii() and key.isidentifier() for key in properties):
            return f'{start} "**" {name}_all {end}{name}_all: %json {json.dumps(schema, ensure_ascii=False)}\n'
        keys = [*wanted, *others]
        given = [f'"{key}=" {name}_{index}' for index, key in enumerate(keys)]
        first = ' ", " '.join(given[: len(wanted)])
        later = [f'(", " {one})?' for one in given]
        if wanted:
            arguments = " ".join([first, *later[len(wanted) :]])
        else:  # any of them may come first, or none
            ways = (" ".join([one, *later[index + 1 :]]) for index, one in enumerate(given))
            arguments = f"({' | '.join(ways)})?" if given else ""
        shared = {key: schema[key] for key in ("x-guidance", "$defs", "definitions") if key in schema}
        kinds = (properties[key] if isinstance(properties[key], Mapping) else {} for key in keys)
        values = (json.dumps({**shared, **kind}, ensure_ascii=False) for kind in kinds)
        rules = "".join(f"{name}_{index}: %json {value}\n" for index, value in enumerate(values))
        return f"{start} {arguments} {end}{rules}"

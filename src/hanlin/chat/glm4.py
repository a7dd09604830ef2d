"""GLM-4: role tokens, tools in a system turn of their own, calls as JSON below the tool's name, `python` for code.

Source: the released chat template and tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from hanlin.chat.reply import arguments_object, json_text
from hanlin.chat.roles import RolesFormat, arguments_schema, fenced
from hanlin.chat.tools import call_arguments, tool_spec
from hanlin.types import Message, Tool, ToolCall

__all__ = ["GLM4Format"]

_PROMPT = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)
_CALLING = "在调用上述函数时，请使用 Json 格式表示调用的参数。"
_PYTHON = (
    "当你向 `python` 发送包含 Python 代码的消息时，该代码将会在一个有状态的 Jupyter notebook 环境中执行。\n"
    "`python` 返回代码执行的输出，或在执行 60 秒后返回超时。\n"
    "`/mnt/data` 将会持久化存储你的文件。在此会话中，`python` 无法访问互联网。"
    "不要使用 `python` 进行任何网络请求或者在线 API 调用，这些在线内容的访问将不会成功。"
)


class GLM4Format(RolesFormat):
    """See `RolesFormat`. Turns without content are left out, as in the released template; so are its tools written.

    Nothing marks the end of code for `python` but the end of the reply, so that of a reply which was cut counts too.
    """

    name = "glm4"
    sop = "<sop>"

    def _names(self, tool: Tool) -> tuple[str, ...]:
        return ("python", tool.name) if tool.kind == "interpreter" else (tool.name,)

    def _skips(self, turn: Message) -> bool:
        return not turn.content

    def _with_tools(self, turns: list[Message], tools: Sequence[Tool]) -> list[Message]:
        if not tools:
            return turns
        content = _PROMPT
        for tool in tools:
            if tool.kind == "interpreter":
                content += f"\n\n## python\n\n{tool.description or _PYTHON}"
            else:
                shown = json.dumps(tool_spec(tool), ensure_ascii=False, indent=4)
                content += f"\n\n## {tool.name}\n\n{shown}\n{_CALLING}"
        return [Message(role="system", content=content), *turns]

    def _call(self, call: ToolCall) -> str:
        return call.arguments if call.kind == "interpreter" else json_text(call_arguments(call))

    def _read(self, tool: Tool, body: str) -> str | None:
        if tool.kind == "interpreter":
            inside, closed = fenced(body)
            return inside if closed and inside.strip() else None
        arguments = arguments_object(body) if body.strip() else None
        return None if arguments is None else json_text(arguments)

    def _body_rules(self, tool: Tool, name: str) -> str:
        if tool.kind == "interpreter":
            return f"{name}: /[^\\s`](?s:.*)/\n"
        return f"{name}: %json {json.dumps(arguments_schema(tool), ensure_ascii=False)}\n"

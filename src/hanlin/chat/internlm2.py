"""InternLM2 and 2.5: ChatML with named turns, plugins, a code interpreter and environment turns.

Source: InternLM's `chat/chat_format.md`; the system turn of the interpreter is the one given there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from hanlin.chat.base import Writer, checked, special_ids
from hanlin.chat.reply import TextParser, parse_calls
from hanlin.chat.tools import call_arguments, call_schema, tool_spec
from hanlin.types import Message, Rendered, ReplyParser, SamplingParams, Tokenizer, Tool, ToolCall

__all__ = ["INTERPRETER_PROMPT", "META_INSTRUCTION", "SPECIALS", "InternLM2Format"]

START, END = "<|im_start|>", "<|im_end|>"
ACTION, ACTION_END = "<|action_start|>", "<|action_end|>"
PLUGIN, INTERPRETER = "<|plugin|>", "<|interpreter|>"
SPECIALS = (START, END, ACTION, ACTION_END, PLUGIN, INTERPRETER)

META_INSTRUCTION = "\n".join(
    (
        "You are an AI assistant whose name is InternLM (书生·浦语).",
        "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
        "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.",
        "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as "
        "English and 中文.",
    )
)

INTERPRETER_PROMPT = "\n".join(
    (
        "You now have access to a Jupyter notebook environment supporting Python code execution. Just send code to "
        "python to run in this stateful environment. This feature is suitable for:",
        "- Data analysis or processing (such as data manipulation and graphic creation)",
        "- Complex calculations (such as math and physics problems)",
        "- Programming examples (for understanding programming concepts or language features)",
        "- Text processing and analysis (including text analysis and natural language processing)",
        "- Machine learning and data science (model training and data visualization)",
        "- File operations and data import (handling CSV, JSON, etc. formats)",
    )
)

FENCE = "```"


class InternLM2Format:
    """`<|im_start|>{role}[ name={name}]\\n{content}<|im_end|>\\n`, BOS first, once.

    `render` writes the messages and tools it is given, and no system turn beside them: it equals the released chat
    template. `default_system` is the instruction that the model card's `chat()` puts in front of a conversation without
    one, and whether to do so is the caller's choice. `template_system` is for checkpoints whose own template puts
    another one in front, as `render` then does.

    Tools follow the leading system turns, the interpreter before the plugins. Tool results are environment turns,
    named after the kind of the call that they answer. In system and tool turns the names `plugin` and `interpreter`
    stand for their special tokens; any other name is text (`user name=file`). Calls are looked for in a reply only when
    tools were given, as LMDeploy and vLLM do; otherwise an action is text.
    """

    name = "internlm2"
    defaults = SamplingParams(temperature=0.8, top_p=0.8, max_tokens=1024)

    def __init__(self, tokenizer: Tokenizer, *, template_system: str | None = None) -> None:
        self._tokenizer, self._template_system = tokenizer, template_system
        self._ids = special_ids(tokenizer, SPECIALS, self.name)
        self.default_system: str | None = META_INSTRUCTION if template_system is None else template_system
        eos, end = tokenizer.eos_id, self._ids[END]
        self.stop_ids: tuple[int, ...] = (end,) if eos is None or eos == end else (eos, end)

    def render(
        self, messages: Iterable[Message], tools: Sequence[Tool] = (), *, generation_prompt: bool = True
    ) -> Rendered:
        """See `ChatFormat.render`. Adds no system turn but those of the tools."""
        turns = checked(messages, self.name)
        if self._template_system is not None and turns and turns[0].role != "system":
            turns.insert(0, Message(role="system", content=self._template_system))
        leading = 0
        while leading < len(turns) and turns[leading].role == "system":
            leading += 1
        turns[leading:leading] = _tool_turns(tools)
        writer = Writer(self._tokenizer)
        writer.bos()
        calls: tuple[ToolCall, ...] = ()
        for index, turn in enumerate(turns):
            calls = turn.tool_calls if turn.role == "assistant" else calls
            if self._turn(writer, turn, calls, leave_open=generation_prompt and index + 1 == len(turns)):
                return writer.rendered()
        if generation_prompt:
            self._header(writer, "assistant", None)
        return writer.rendered()

    def parser(self, tools: Sequence[Tool] = (), *, skip_special: bool = True) -> ReplyParser:
        if not tools:
            return TextParser(self._tokenizer, self.stop_ids, skip_special=skip_special)
        interpreter = next((tool.name for tool in tools if tool.kind == "interpreter"), "interpreter")
        return _ActionParser(self._tokenizer, self.stop_ids, self._ids, interpreter, skip_special=skip_special)

    def tool_grammar(self, tools: Sequence[Tool], names: Sequence[str], *, parallel: bool) -> str:
        """See `GuidesCalls`."""
        ids = {piece: f"<[{token}]>" for piece, token in self._ids.items()}
        chosen = [tool for tool in tools if tool.name in names]
        plugins = [tool for tool in chosen if tool.kind == "function"]
        kinds, rules = [], ""
        if plugins:
            kinds.append(rf'{ids[PLUGIN]} "\n" plugin')
            rules += f"plugin: %json {call_schema(plugins, 'parameters')}\n"
        if len(plugins) < len(chosen):
            kinds.append(rf'{ids[INTERPRETER]} "\n{FENCE}python\n" code')
            rules += rf"code[lazy]: /(?s:.+)\n{FENCE}/" + "\n"
        call = f"call: {ids[ACTION]} ({' | '.join(kinds)}) {ids[ACTION_END]}\n"
        return f"start: call{'+' if parallel else ''}\n{call}{rules}"

    def _turn(self, writer: Writer, turn: Message, calls: Sequence[ToolCall], *, leave_open: bool) -> bool:
        """Write a turn; True when it was left open."""
        assistant = turn.role == "assistant"
        weight = float(assistant)
        if turn.role == "tool":
            self._header(writer, "environment", _result_name(turn, calls))
        else:
            self._header(writer, turn.role, turn.name)
        writer.text(turn.content, weight)
        for call in turn.tool_calls:
            writer.special(self._ids[ACTION], weight)
            if call.kind == "interpreter":
                writer.special(self._ids[INTERPRETER], weight)
                writer.text(f"\n{FENCE}python\n{call.arguments}\n{FENCE}", weight)
            else:
                body = json.dumps({"name": call.name, "parameters": call_arguments(call)}, ensure_ascii=False)
                writer.special(self._ids[PLUGIN], weight)
                writer.text(f"\n{body}", weight)
            writer.special(self._ids[ACTION_END], weight)
        if assistant and leave_open:
            return True
        writer.special(self._ids[END], weight)
        writer.text("\n")
        return False

    def _header(self, writer: Writer, role: str, name: str | None) -> None:
        writer.special(self._ids[START])
        if name is None:
            writer.text(f"{role}\n")
            return
        writer.text(f"{role} name=")
        special = _special_name(name) if role in ("system", "environment") else None
        if special is None:
            writer.text(name)
        else:
            writer.special(self._ids[special])
        writer.text("\n")


def _tool_turns(tools: Sequence[Tool]) -> list[Message]:
    turns = [
        Message(role="system", name=INTERPRETER, content=tool.description or INTERPRETER_PROMPT)
        for tool in tools
        if tool.kind == "interpreter"
    ]
    plugins = [tool_spec(tool) for tool in tools if tool.kind == "function"]
    if plugins:
        turns.append(Message(role="system", name=PLUGIN, content=json.dumps(plugins, ensure_ascii=False)))
    return turns


def _special_name(name: str | None) -> str | None:
    return {"plugin": PLUGIN, PLUGIN: PLUGIN, "interpreter": INTERPRETER, INTERPRETER: INTERPRETER}.get(name or "")


def _result_name(turn: Message, calls: Sequence[ToolCall]) -> str:
    """Which kind of tool a result is from: its own word, else the call that it answers, else the latest call."""
    special = _special_name(turn.name)
    if special is not None:
        return special
    kinds = {call.id: call.kind for call in calls if call.id}
    kind = kinds.get(turn.tool_call_id or "", calls[-1].kind if calls else "function")
    return INTERPRETER if kind == "interpreter" else PLUGIN


class _ActionParser(TextParser):
    """Reads `<|action_start|><|plugin|>\\n{json}<|action_end|>` and `<|action_start|><|interpreter|>\\n```python...```.

    An action that is no call (broken or cut JSON, another kind) comes back as text. One that the reply's end cuts off
    before `<|action_end|>` counts when its JSON, or its code block, is whole.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_ids: Iterable[int],
        ids: dict[str, int],
        interpreter: str,
        *,
        skip_special: bool,
    ) -> None:
        super().__init__(tokenizer, stop_ids, skip_special=skip_special)
        self._action, self._action_end = ids[ACTION], ids[ACTION_END]
        self._kinds = {ids[PLUGIN]: PLUGIN, ids[INTERPRETER]: INTERPRETER}
        self._interpreter = interpreter
        self._started = False
        self._kind: str | None = None
        self._body: list[str] = []
        self._body_detokenizer: Any = None

    def _take(self, token: int) -> None:
        if token == self._action:
            self._close()
            self._started = True
        elif self._started and self._kind is None and token in self._kinds:
            self._kind = self._kinds[token]
            self._body_detokenizer = self._tokenizer.detokenizer(skip_special=self._skip_special)
        elif self._started and self._kind is None:
            self._close()
            self._take(token)
        elif self._started and token == self._action_end:
            self._settle(ended=True)
        elif self._started:
            self._body.append(self._body_detokenizer.push([token]))
        else:
            super()._take(token)

    def _close(self) -> None:
        if self._started and self._kind is None:
            self._started = False
            self._emit_markers(ACTION)
        elif self._started:
            self._settle(ended=False)

    def _settle(self, *, ended: bool) -> None:
        kind, body = self._kind, "".join(self._body) + self._body_detokenizer.finish()
        self._started, self._kind, self._body = False, None, []
        calls = self._code(body, ended) if kind == INTERPRETER else parse_calls(body)
        if calls:
            self._emit_calls(calls)
            return
        self._emit_markers(f"{ACTION}{kind}")
        self._emit(body)
        if ended:
            self._emit_markers(ACTION_END)

    def _emit_markers(self, text: str) -> None:
        if not self._skip_special:
            self._emit(text)

    def _code(self, body: str, ended: bool) -> list[ToolCall]:
        """The call in a code block; a body without fences is code too, if the model said where it ends."""
        text = body.strip()
        first, _, rest = text.partition("\n")
        if first.startswith(FENCE) and first[len(FENCE) :].strip() in ("", "py", "python", "python3"):
            code, closed = (rest[: -len(FENCE)], True) if rest.endswith(FENCE) else (rest, False)
            code = code.removesuffix("\n") if closed else code
        else:
            code, closed = text, False
        if not code.strip() or not (ended or closed):
            return []
        return [ToolCall(name=self._interpreter, arguments=code, kind="interpreter")]

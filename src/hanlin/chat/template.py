"""Any other model: its own Jinja template, in the sandbox, with the messages kept apart from the template's words.

A template prints one string, in which a special token that the template wrote looks like one that a user wrote. To
tell them apart, every conversation is rendered twice: as it is, and with each character of the messages and tools
replaced by one of a private-use plane (blanks at the ends, quotes and line ends stay, so that `trim` and `tojson` do
the same to both). Where both texts run in step, each character is known to be the template's or a message's, and only
special tokens made of the template's characters become ids.

Templates that look into messages (`'</think>' in content`) may print two texts that do not run in step. So special
tokens in messages are also taken out before rendering, and put back as text after; and both texts must then show the
same special tokens in the same order, else the conversation is refused.
"""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hanlin.chat.base import Writer, checked
from hanlin.chat.reply import TaggedParser, TextParser
from hanlin.chat.sandbox import Sandbox
from hanlin.chat.tools import interpreter_names, plain_messages, tagged_grammar, tool_spec
from hanlin.errors import ChatFormatError
from hanlin.types import Message, Rendered, ReplyParser, SamplingParams, Tokenizer, Tool, ToolCall

__all__ = ["TemplateFormat", "print_template", "sees_tools"]

# Two private-use planes: 15 for the characters of messages, 16 for the special tokens taken out of them.
MASK, LAST_MASK, ESCAPE, LAST_ESCAPE = 0xF0000, 0xFFFFD, 0x100000, 0x10FFFD
ESCAPES = re.compile("[\U00100000-\U0010ffff]")
MASKED = re.compile("[\U000f0000-\U000ffffd]")
MASKED_RUN = re.compile("[\U000f0000-\U000ffffd]+")
REPEATED = re.compile(r"(.)\1*", re.DOTALL)
UNMASKED = re.compile("[^\U000f0000-\U000ffffd]+")
# What is masked: all but what JSON and the splitting of lines look at.
MASKABLE = re.compile(r'[^\x00-\x1f"\\\x85\u2028\u2029]+')
SCHEMA_WORDS = frozenset(
    "additionalProperties allOf anyOf array boolean const default description enum format integer items maximum "
    "minimum name null number object oneOf parameters properties required string title type".split()
)

Leaf = Callable[[str, int | None], str]


class _Span(NamedTuple):
    """The characters `start:end` of a printed conversation."""

    start: int
    end: int


class TemplateFormat:
    """What the model's template prints, with its special tokens as ids.

    A template that knows tools gets them; for one that does not, they go into the system prompt as
    `hanlin.chat.tools` describes. Replies are searched for `<tool_call>` JSON when tools were given; other dialects
    come through as text. An assistant turn that the template rewrites has weight 0: nobody wrote what it prints.
    """

    name = "template"
    default_system: str | None = None
    defaults = SamplingParams(temperature=0.7, top_p=0.9)

    def __init__(self, tokenizer: Tokenizer, template: str | Sandbox) -> None:
        """`template` is its source.

        Raises:
            ChatFormatError: a template that cannot be used, and why.
        """
        self._tokenizer = tokenizer
        self._sandbox = Sandbox(template) if isinstance(template, str) else template
        self._tokens = _token_texts(tokenizer)
        texts = sorted((re.escape(text) for text in self._tokens), key=len, reverse=True)
        self._special = re.compile("|".join(texts) or "(?!)")
        self._native_tools = sees_tools(self._sandbox, tokenizer)
        self._prompt = self._generation_prompt()
        self.stop_ids = self._stop_ids()

    def render(
        self, messages: Iterable[Message], tools: Sequence[Tool] = (), *, generation_prompt: bool = True
    ) -> Rendered:
        """See `ChatFormat.render`.

        Raises:
            ChatFormatError: the template refuses the conversation, needs too much, or mixes special tokens of its own
                with text of a message; or the last reply is to be continued but the template rewrites it.
        """
        turns = checked(messages, self.name)
        if not self._native_tools:
            turns, tools = plain_messages(turns, tools), ()
        open_turn = generation_prompt and bool(turns) and turns[-1].role == "assistant"
        if open_turn and not turns[-1].content and not turns[-1].tool_calls:
            turns, open_turn = turns[:-1], False
        escapes = self._escapes(turns, tools)
        prompted = generation_prompt and not open_turn

        def escape(text: str, turn: int | None) -> str:
            return self._special.sub(lambda match: escapes[match.group()], text) if escapes else text

        masks = _Masks(escape)
        text = self._print(turns, tools, escape, prompted)
        shadow = self._print(turns, tools, masks, prompted)
        in_step = _in_step(text, shadow)
        tokens = self._find_tokens(text, shadow if in_step else "")
        if not in_step and [text[start:end] for start, end in tokens] != self._special.findall(shadow):
            raise ChatFormatError(
                "the model's chat template mixes text of a message with its special tokens, so that a message could "
                "forge a role; choose a built-in format by name, such as 'chatml'"
            )
        places = masks.places(shadow) if in_step else _find_turns(text, turns, escape)
        if open_turn:
            last = places.get(len(turns) - 1)
            if last is None:
                raise ChatFormatError("the model's chat template rewrites the last reply, so it cannot be continued")
            text = text[: self._open_end(text, tokens, last, turns[-1])]
            tokens = [token for token in tokens if token.end <= len(text)]
            places[len(turns) - 1] = _Span(last.start, len(text))
        replies = {turn for turn in places if turns[turn].role == "assistant"}
        spans = self._reply_spans(text, tokens, places, replies)
        return self._write(text, tokens, spans, {escaped: token for token, escaped in escapes.items()})

    def parser(self, tools: Sequence[Tool] = (), *, skip_special: bool = True) -> ReplyParser:
        if not tools:
            return TextParser(self._tokenizer, self.stop_ids, skip_special=skip_special)
        return TaggedParser(
            self._tokenizer, self.stop_ids, skip_special=skip_special, interpreters=interpreter_names(tools)
        )

    def tool_grammar(self, tools: Sequence[Tool], names: Sequence[str], *, parallel: bool) -> str:
        """See `GuidesCalls`."""
        return tagged_grammar(self._tokenizer, tools, names, parallel=parallel)

    def _print(self, turns: Sequence[Message], tools: Sequence[Tool], leaf: Leaf, prompted: bool) -> str:
        return print_template(self._sandbox, self._tokenizer, turns, tools, leaf=leaf, generation_prompt=prompted)

    def _escapes(self, turns: Sequence[Message], tools: Sequence[Tool]) -> dict[str, str]:
        """A private-use character for each special token that the messages spell, none of which they use themselves."""
        found: set[str] = set()
        used: set[str] = set()

        def look(text: str, turn: int | None) -> str:
            found.update(self._special.findall(text))
            used.update(ESCAPES.findall(text))
            return text

        _conversation(turns, look)
        _tools(tools, look)
        if not found:
            return {}
        free = (chr(code) for code in range(ESCAPE, LAST_ESCAPE + 1) if chr(code) not in used)
        escapes = dict(zip(sorted(found), free, strict=False))
        if len(escapes) < len(found):
            raise ChatFormatError("the messages use up all private-use characters")
        return escapes

    def _find_tokens(self, text: str, shadow: str) -> list[_Span]:
        """The special tokens that a text spells, but for those that any character of a message belongs to."""
        tokens: list[_Span] = []
        position = 0
        while match := self._special.search(text, position):
            if MASKED.search(shadow, *match.span()):
                position = match.start() + 1
            else:
                position = match.end()
                tokens.append(_Span(*match.span()))
        return tokens

    def _open_end(self, text: str, tokens: Sequence[_Span], place: _Span, turn: Message) -> int:
        """Where a reply ends that is to be continued: behind its calls, else its text with the blanks at its end."""
        if turn.tool_calls:
            stops = self._stops(text, tokens)
            following = bisect.bisect_left(stops, (place.end, place.end))
            return stops[following].start if following < len(stops) else len(text)
        blanks = turn.content[len(turn.content.rstrip()) :]
        return place.end + len(blanks) * text.startswith(blanks, place.end)

    def _stops(self, text: str, tokens: Sequence[_Span]) -> list[_Span]:
        return [token for token in tokens if self._tokens[text[token.start : token.end]] in self.stop_ids]

    def _reply_spans(
        self, text: str, tokens: Sequence[_Span], places: Mapping[int, _Span], replies: Container[int]
    ) -> list[_Span]:
        """What the assistant is to write: from behind each generation prompt to the token that ends the turn."""
        stops = self._stops(text, tokens)
        spans, earlier = [], 0
        for turn, (start, end) in sorted(places.items(), key=lambda place: place[1]):
            if turn in replies:
                following = bisect.bisect_left(stops, (end, end))
                earlier = max(earlier, stops[following - 1].end if following else 0)
                header = text.rfind(self._prompt, earlier, start) if self._prompt else -1
                begin = start if header < 0 else header + len(self._prompt)
                spans.append(_Span(begin, stops[following].end if following < len(stops) else end))
            earlier = max(earlier, end)
        return spans

    def _write(
        self, text: str, tokens: Sequence[_Span], spans: Sequence[_Span], unescape: Mapping[str, str]
    ) -> Rendered:
        table = str.maketrans(dict(unescape))
        edges = sorted({0, len(text), *(edge for span in (*tokens, *spans) for edge in span)})
        token_ends = dict(tokens)
        begins, ends = {span.start for span in spans}, {span.end for span in spans}
        writer = Writer(self._tokenizer)
        weight = 0.0
        for start, end in itertools.pairwise(edges):
            weight = 1.0 if start in begins else 0.0 if start in ends else weight
            if token_ends.get(start) == end:
                writer.special(self._tokens[text[start:end]], weight)
            else:
                writer.text(text[start:end].translate(table), weight)
        return writer.rendered()

    def _generation_prompt(self) -> str:
        """What the template prints for the assistant to go on from; empty when that cannot be learnt."""
        probe = [Message(role="user", content="a")]
        try:
            without = self._print(probe, (), _as_is, False)
            prompted = self._print(probe, (), _as_is, True)
        except ChatFormatError:
            return ""
        return prompted[len(without) :] if prompted.startswith(without) else ""

    def _stop_ids(self) -> tuple[int, ...]:
        """The end of text, and the special token that the template puts behind a reply."""
        ids = [] if self._tokenizer.eos_id is None else [self._tokenizer.eos_id]
        reply = "reply\U000f0000"
        probe = [Message(role="user", content="a"), Message(role="assistant", content=reply)]
        try:
            text = self._print(probe, (), _as_is, False)
        except ChatFormatError:
            text = ""
        match = self._special.match(text, text.rfind(reply) + len(reply)) if reply in text else None
        if match and self._tokens[match.group()] not in ids:
            ids.append(self._tokens[match.group()])
        return tuple(ids)


class _Masks:
    """A `Leaf` that replaces text by as many private-use characters, one for each text, and finds them again."""

    def __init__(self, escape: Leaf) -> None:
        self._escape = escape
        self._masks: dict[tuple[int | None, str], str] = {}
        self._ends: dict[str, tuple[str, str]] = {}

    def __call__(self, text: str, turn: int | None) -> str:
        text = self._escape(text, turn)
        inner = text.strip()
        if not inner or (turn is None and text in SCHEMA_WORDS):
            return text
        mask = self._masks.setdefault((turn, text), chr(MASK + len(self._masks)))
        if ord(mask) > LAST_MASK:
            raise ChatFormatError("the conversation has too many messages, tools and arguments for a chat template")
        masked = MASKABLE.sub(lambda match: mask * len(match.group()), inner)
        if mask not in masked:
            masked = mask * len(inner)
        self._ends[mask] = masked[: masked.index(mask)], masked[masked.rindex(mask) + 1 :]
        return text.replace(inner, masked, 1)

    def places(self, shadow: str) -> dict[int, _Span]:
        """Where the text of each turn is printed, with the kept characters at its ends."""
        turns = {mask: turn for (turn, _), mask in self._masks.items() if turn is not None}
        places: dict[int, _Span] = {}
        for start, end in _same_characters(shadow):
            mask = shadow[start]
            turn = turns.get(mask)
            if turn is not None:
                head, tail = self._ends[mask]
                start -= len(head) * shadow.endswith(head, 0, start)
                end += len(tail) * shadow.startswith(tail, end)
                places[turn] = _Span(min(start, places[turn].start) if turn in places else start, end)
        return places


def print_template(
    sandbox: Sandbox,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    *,
    generation_prompt: bool = True,
    leaf: Leaf | None = None,
) -> str:
    """What a template prints, as Transformers' `apply_chat_template(tokenize=False)`; `leaf` may change each text."""
    characters = 0

    def counted(text: str, turn: int | None) -> str:
        nonlocal characters
        text = text if leaf is None else leaf(text, turn)
        characters += len(text)
        return text

    variables = {
        "messages": _conversation(messages, counted),
        "tools": _tools(tools, counted) or None,
        "add_generation_prompt": generation_prompt,
        "bos_token": "" if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id),
        "eos_token": "" if tokenizer.eos_id is None else tokenizer.token_text(tokenizer.eos_id),
    }
    return sandbox.render(variables, characters)


def sees_tools(sandbox: Sandbox, tokenizer: Tokenizer) -> bool:
    """Whether a template prints the tools that it is given."""
    probe = [Message(role="user", content="a")]
    try:
        return "probe_tool" in print_template(sandbox, tokenizer, probe, [Tool(name="probe_tool", description="b")])
    except ChatFormatError:
        return False


def _token_texts(tokenizer: Tokenizer) -> dict[str, int]:
    texts = {tokenizer.token_text(token): token for token in sorted(tokenizer.special_ids, reverse=True)}
    return {text: token for text, token in texts.items() if text and not text.isspace()}


def _as_is(text: str, turn: int | None) -> str:
    return text


def _conversation(turns: Sequence[Message], leaf: Leaf) -> list[dict[str, Any]]:
    """The messages as OpenAI writes them, every text of theirs passed through `leaf`; arguments are objects."""
    messages = []
    for index, turn in enumerate(turns):
        message: dict[str, Any] = {"role": turn.role, "content": leaf(turn.content, index)}
        if turn.name is not None:
            message["name"] = leaf(turn.name, index)
        if turn.tool_call_id is not None:
            message["tool_call_id"] = leaf(turn.tool_call_id, index)
        if turn.tool_calls:
            message["tool_calls"] = [_call(call, index, leaf) for call in turn.tool_calls]
        messages.append(message)
    return messages


def _call(call: ToolCall, index: int, leaf: Leaf) -> dict[str, Any]:
    arguments: object = {"code": call.arguments}
    if call.kind == "function":
        try:
            arguments = json.loads(call.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = call.arguments
    function = {"name": leaf(call.name, index), "arguments": _leaves(arguments, index, leaf)}
    return {"id": leaf(call.id, index), "type": "function", "function": function}


def _tools(tools: Sequence[Tool], leaf: Leaf) -> list[dict[str, Any]]:
    return [{"type": "function", "function": _leaves(tool_spec(tool), None, leaf)} for tool in tools]


def _leaves(value: object, turn: int | None, leaf: Leaf) -> Any:
    if isinstance(value, str):
        return leaf(value, turn)
    if isinstance(value, Mapping):
        return {leaf(str(key), turn): _leaves(item, turn, leaf) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_leaves(item, turn, leaf) for item in value]
    return value


def _same_characters(shadow: str) -> Iterator[tuple[int, int]]:
    """The runs of one masking character."""
    for run in MASKED_RUN.finditer(shadow):
        start, end = run.span()
        if shadow.count(shadow[start], start, end) == end - start:
            yield start, end
        else:  # texts printed side by side
            for same in REPEATED.finditer(shadow, start, end):
                yield same.span()


def _in_step(text: str, shadow: str) -> bool:
    """Whether both texts are the same but for the masked characters."""
    if len(text) != len(shadow):
        return False
    return all(text[match.start() : match.end()] == match.group() for match in UNMASKED.finditer(shadow))


def _find_turns(text: str, turns: Sequence[Message], escape: Leaf) -> dict[int, _Span]:
    """Where the turns are printed word for word, in order; the others are left out."""
    places, position = {}, 0
    for index, turn in enumerate(turns):
        content = escape(turn.content, index).strip()
        start = text.find(content, position) if content else -1
        if start >= 0:
            position = start + len(content)
            places[index] = _Span(start, position)
    return places

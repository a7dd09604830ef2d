"""A tiny tokenizer for chat tests: bytes, one merge ("\\n\\n"), and special tokens behind them."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence

from hanlin.types import ReplyEvent, ReplyParser, ToolCall

INTERNLM2_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|action_start|>",
    "<|action_end|>",
    "<|plugin|>",
    "<|interpreter|>",
)
NEWLINES = 256  # the merge


class ByteTokenizer:
    """Implements `hanlin.types.Tokenizer`. Ids 0..255 are bytes, 256 is "\\n\\n", special tokens follow."""

    def __init__(
        self, special: Sequence[str] = INTERNLM2_TOKENS, *, bos: str | None = "<s>", eos: str = "</s>"
    ) -> None:
        names = dict.fromkeys([*([bos] if bos else []), eos, *special])
        self._special = {name: 257 + index for index, name in enumerate(names)}
        self._names = {token: name for name, token in self._special.items()}
        self.bos_id = self._special[bos] if bos else None
        self.eos_id: int | None = self._special[eos]
        self.special_ids = frozenset(self._names)
        self.vocab_size = 257 + len(names)
        self._pattern = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        ids = [self.bos_id] if add_special and self.bos_id is not None else []
        position = 0
        for match in self._pattern.finditer(text) if parse_special else ():
            ids += [*self._plain(text[position : match.start()]), self._special[match.group()]]
            position = match.end()
        return ids + self._plain(text[position:])

    @staticmethod
    def _plain(text: str) -> list[int]:
        ids: list[int] = []
        for part in re.split("(\n\n)", text):
            ids += [NEWLINES] if part == "\n\n" else list(part.encode("utf-8", "surrogatepass"))
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        detokenizer = self.detokenizer(skip_special=skip_special)
        return detokenizer.push(ids) + detokenizer.finish()

    def token_id(self, piece: str) -> int | None:
        return self._special.get(piece)

    def token_text(self, id: int) -> str:  # noqa: A002 - the protocol's name
        if id in self._names:
            return self._names[id]
        return "\n\n" if id == NEWLINES else bytes([id]).decode("utf-8", "replace")

    def detokenizer(self, *, skip_special: bool = True) -> _Detokenizer:
        return _Detokenizer(self._names, skip_special)


class _Detokenizer:
    def __init__(self, names: dict[int, str], skip_special: bool) -> None:
        self._names, self._skip = names, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        return "".join(map(self._one, ids))

    def _one(self, token: int) -> str:
        if token not in self._names:
            return self._decoder.decode(b"\n\n" if token == NEWLINES else bytes([token]))
        if self._skip:
            return ""
        return self._decoder.decode(b"", True) + self._names[token]

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


def parse(parser: ReplyParser, *parts: Sequence[int]) -> tuple[str, list[ToolCall], list[str | ToolCall]]:
    """(all text, all calls, text and calls in order) of a reply that comes in these parts."""
    events: list[ReplyEvent] = []
    for part in parts:
        events += parser.push(part)
    return flat([*events, *parser.finish()])


def flat(events: Iterable[ReplyEvent]) -> tuple[str, list[ToolCall], list[str | ToolCall]]:
    text, calls, order = "", [], []
    for event in events:
        assert (event.text == "") != (event.tool_call is None), "an event is a text or a call"
        if event.tool_call is not None:
            calls.append(event.tool_call)
            order.append(event.tool_call)
            continue
        text += event.text
        if order and isinstance(order[-1], str):
            order[-1] += event.text
        else:
            order.append(event.text)
    return text, calls, order

"""Ids to text: the one place where tokens become characters, whole or piece by piece.

`decode` is a detokeniser that was pushed everything at once, so that streamed and whole text cannot differ.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from hanlin.errors import RequestError

__all__ = ["StreamDetokenizer", "TokenTable"]

# What "surrogateescape" makes of a byte that belongs to no character; valid UTF-8 never decodes to these.
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """What each id is called, and what it adds to a text.

    Attributes:
        pieces: names as the vocabulary writes them ("▁the", "Ġthe", "<0x41>"); "" for rows that only pad the embedding.
        texts: the bytes that each id adds; part of a character is allowed.
        special_ids: ids that carry structure, left out of text by default.
        spaced_ids: ids whose first byte is a space that the tokenizer may have put there (pieces that begin with "▁").
        strip: how much of such space at the start is the tokenizer's own: "none"; "first", the first one; "all" of it.
        restart_ids: ids that start the text anew where they are kept, so that what follows is stripped like a start.
        byte_errors: stray bytes read as one U+FFFD each (SentencePiece's way), not one per broken character (Rust's).
    """

    pieces: tuple[str, ...]
    texts: tuple[bytes, ...]
    special_ids: frozenset[int]
    spaced_ids: frozenset[int] = frozenset()
    strip: Literal["none", "first", "all"] = "none"
    restart_ids: frozenset[int] = frozenset()
    byte_errors: bool = False

    def check(self, ids: Sequence[int]) -> None:
        """Refuse ids that are not in the table.

        Raises:
            RequestError: naming them.
        """
        size = len(self.texts)
        if len(ids) and not (min(ids) >= 0 and max(ids) < size):
            wrong = sorted({int(i) for i in ids if not 0 <= i < size})
            shown = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
            raise RequestError(f"token ids must be in 0..{size - 1}; not so: {shown}")


class StreamDetokenizer:
    """Turns ids into text for any split into pushes, in linear time; at most three bytes are held back."""

    def __init__(self, table: TokenTable, *, skip_special: bool = True) -> None:
        self._table = table
        self._hidden: frozenset[int] = table.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape" if table.byte_errors else "replace")
        self._at_start = True

    def push(self, ids: Sequence[int]) -> str:
        """The text that is settled by these ids; an unfinished character is held back.

        Raises:
            RequestError: ids outside the vocabulary; nothing of this push is taken then.
        """
        self._table.check(ids)
        if self._table.strip == "none":
            texts, hidden = self._table.texts, self._hidden
            return self._settle(b"".join([texts[i] for i in ids if i not in hidden]))
        return self._settle(b"".join(self._stripped(ids)))

    def finish(self) -> str:
        """What was held back: U+FFFD for a character that never became whole."""
        self._at_start = True
        return self._settle(b"", final=True)

    def _stripped(self, ids: Sequence[int]) -> Iterator[bytes]:
        table = self._table
        for i in ids:
            if i in self._hidden:
                continue
            text = table.texts[i]
            if i in table.restart_ids:
                self._at_start = True
            elif self._at_start and text:
                if i in table.spaced_ids:
                    text = text[1:] if table.strip == "first" else text.lstrip(b" ")
                    self._at_start = table.strip == "all" and not text
                else:
                    self._at_start = False
            yield text

    def _settle(self, data: bytes, *, final: bool = False) -> str:
        text = self._decoder.decode(data, final)
        return _ESCAPED_BYTE.sub("\ufffd", text) if self._table.byte_errors else text

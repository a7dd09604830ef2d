"""What every tokenizer here shares: special tokens, decoding, and the care taken with text from outside."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from hanlin.errors import RequestError
from hanlin.tokenizers.detokenizer import StreamDetokenizer, TokenTable

__all__ = ["AddedToken", "BaseTokenizer", "Specials", "is_markup"]

_MARKUP = re.compile(r"<[^\s<>]+>|\[[A-Z0-9_]+\]")


def is_markup(piece: str) -> bool:
    """Whether a piece reads like structure that user text must not forge: "<|im_end|>", "</s>", "[UNUSED_TOKEN_3]"."""
    return _MARKUP.fullmatch(piece) is not None


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token that a tokenizer's files add to, or rename in, its vocabulary."""

    id: int
    content: str
    special: bool = True


@dataclass(frozen=True, kw_only=True)
class Specials:
    """The ids with a role, and what goes around a bare prompt."""

    bos: int | None = None
    eos: int | None = None
    eot: int | None = None
    unk: int | None = None
    pad: int | None = None
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()


class BaseTokenizer(ABC):
    """Implements `hanlin.types.Tokenizer` over a `TokenTable`; a subclass brings `_encode`.

    `parsed` maps the texts that `parse_special` recognises to their ids.
    """

    def __init__(self, table: TokenTable, specials: Specials, parsed: Mapping[str, int]) -> None:
        self._table = table
        self._parsed = dict(parsed)
        self.specials = specials

    @abstractmethod
    def _encode(self, text: str, parse_special: bool) -> list[int]:
        """Ids of valid text, without anything around it."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are, rows that only pad the embedding included."""
        return len(self._table.texts)

    @property
    def table(self) -> TokenTable:
        """What each id is called, and adds to a text."""
        return self._table

    @property
    def bos_id(self) -> int | None:
        return self.specials.bos

    @property
    def eos_id(self) -> int | None:
        return self.specials.eos

    @property
    def special_ids(self) -> frozenset[int]:
        return self._table.special_ids

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Ids of `text`.

        Args:
            text: any valid Unicode.
            add_special: add what the model expects around a bare prompt.
            parse_special: read special tokens, the longest first; otherwise their spelling stays plain text.

        Raises:
            RequestError: a lone surrogate, which no UTF-8 can hold.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"text is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
            ) from None
        ids = self._encode(text, parse_special)
        return [*self.specials.prefix, *ids, *self.specials.suffix] if add_special else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`. Special tokens, when kept, stand verbatim with no space around them.

        Raises:
            RequestError: ids outside the vocabulary, named.
        """
        detokenizer = self.detokenizer(skip_special=skip_special)
        return detokenizer.push(ids) + detokenizer.finish()

    def detokenizer(self, *, skip_special: bool = True) -> StreamDetokenizer:
        """A fresh stream whose pieces, joined, are `decode` of all ids."""
        return StreamDetokenizer(self._table, skip_special=skip_special)

    def token_id(self, piece: str) -> int | None:
        """The id of exactly this piece or special token, or None."""
        found = self._parsed.get(piece)
        return self._ids.get(piece) if found is None else found

    def token_text(self, id: int) -> str:  # noqa: A002 - the protocol's name
        """How a single token reads, special or not; unprintable bytes as U+FFFD.

        Raises:
            RequestError: an id outside the vocabulary.
        """
        self._table.check((id,))
        return self._table.texts[id].decode(errors="replace")

    @cached_property
    def _ids(self) -> dict[str, int]:
        ids: dict[str, int] = {}
        for i, piece in enumerate(self._table.pieces):
            if piece:
                ids.setdefault(piece, i)
        return ids

    @cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        names = sorted(self._parsed, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    def _split_special(self, text: str) -> Iterator[str | int]:
        """`text` cut at special tokens: plain text as strings, never empty, and special tokens as ids."""
        start = 0
        for match in self._special_pattern.finditer(text) if self._special_pattern else ():
            if match.start() > start:
                yield text[start : match.start()]
            yield self._parsed[match.group()]
            start = match.end()
        if start < len(text):
            yield text[start:]

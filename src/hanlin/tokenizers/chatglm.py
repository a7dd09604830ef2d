"""ChatGLM-6B's tokenizer: SentencePiece with rules of its own for lines, tabs and blanks, in both released layouts.

The first layout puts 20,000 image tokens in front of all others, and its `ice_text.model` lacks the last 344 pieces,
which the released code added as it ran. Source: the released tokenizer files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from hanlin.errors import TokenizerError, problems
from hanlin.tokenizers.base import AddedToken, BaseTokenizer, Specials
from hanlin.tokenizers.detokenizer import TokenTable
from hanlin.tokenizers.spm import SPACE, load_processor
from hanlin.tokenizers.spm_model import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, SpmModel

__all__ = ["ADDED", "ChatGLMTokenizer"]

_NAMES = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
_TAB, _LINE, _MOST = "<|tab|>", "<n>", 80
# The pieces that the first layout's file lacks, from id 130000 on, with their kinds.
ADDED = (
    *((name, CONTROL) for name in _NAMES),
    (_TAB, USER_DEFINED),
    *((f"<|blank_{k}|>", USER_DEFINED) for k in range(2, _MOST + 1)),
    *((f"<0x{byte:02X}>", BYTE) for byte in range(256)),
)
_BASE = 130000
_BLANKS = re.compile(" {2,}")


class ChatGLMTokenizer(BaseTokenizer):
    """Text to ids as the released code does, and back.

    A line end is the piece `<n>`, a tab `<|tab|>`, a run of 2 to 80 spaces one piece; so a text that spells such a
    piece reads as what it stands for. No text reaches a special token unless it is parsed for.

    What cannot round-trip, by SentencePiece's own normalisation: full-width and other compatibility characters become
    plain ones, single spaces at the ends and beside other blanks go, "▁" is a space.

    Args:
        model: `ice_text.model`, read.
        images: image tokens in front of all pieces, 0 or 20000; their ids carry no text.
        rows: rows of the model's embedding; ids behind the pieces decode to nothing.
        name: the file, for messages.

    Raises:
        TokenizerError: a model of another kind.
    """

    def __init__(self, model: SpmModel, *, images: int = 0, rows: int = 0, name: str = "ice_text.model") -> None:
        model = _completed(model)
        known = set(model.pieces)
        found = [f"no piece {piece!r}" for piece in (_LINE, "<unk>", "<pad>", *dict(ADDED)) if piece not in known]
        if found:
            more = [f"and {len(found) - 8} more"] if len(found) > 8 else []
            raise TokenizerError(problems(f"{name} is not ChatGLM-6B's", [*found[:8], *more], "Fetch it again."))
        self._images = images
        self._processor = load_processor(model, name)
        size = max(rows, images + len(model.pieces))
        pieces = [*(f"<image_{i}>" for i in range(images)), *model.pieces]
        kinds = [*[CONTROL] * images, *model.kinds]
        pieces += [""] * (size - len(pieces))
        kinds += [CONTROL] * (size - len(kinds))
        ids = {piece: i for i, piece in enumerate(pieces) if piece}
        table = TokenTable(
            pieces=tuple(pieces),
            texts=tuple(map(_text, pieces, kinds)),
            special_ids=frozenset(i for i in range(size) if pieces[i] and kinds[i] in (CONTROL, UNKNOWN)),
            spaced_ids=frozenset(i for i in range(size) if kinds[i] == NORMAL and pieces[i].startswith(SPACE)),
            strip="all",
            restart_ids=frozenset(i for i in range(size) if pieces[i] and kinds[i] == CONTROL),
            byte_errors=True,
        )
        sop = ids["<sop>"]
        specials = Specials(bos=sop, eos=ids["<eop>"], unk=ids["<unk>"], pad=ids["<pad>"], suffix=(ids["[gMASK]"], sop))
        super().__init__(table, specials, {piece: ids[piece] for piece in (*_NAMES, "<s>", "</s>", "<pad>")})

    @property
    def pieces(self) -> tuple[str, ...]:
        """What each id is called."""
        return self._table.pieces

    def check_added(self, added: Iterable[AddedToken]) -> None:
        """Raises:
        TokenizerError: tokens that the vocabulary does not have already: the released classes could not add any.
        """
        names = self._table.pieces
        found = [
            f"added token {token.content!r} with id {token.id}"
            for token in added
            if token.id >= len(names) or names[token.id] != token.content
        ]
        if found:
            raise TokenizerError(problems("ChatGLM-6B's tokenizer", found, "Remove them from the JSON files."))

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """See `BaseTokenizer.encode`. `[gMASK]` and `<sop>` are added behind a text that has no `<sop>` of its own."""
        ids = super().encode(text, parse_special=parse_special)
        return [*ids, *self.specials.suffix] if add_special and self.specials.bos not in ids else ids

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        ids: list[int] = []
        for part in self._split_special(text) if parse_special else (text,):
            ids += (part,) if isinstance(part, int) else self._plain(part)
        return ids

    def _plain(self, text: str) -> Iterator[int]:
        text = text.replace("\n", _LINE).replace("\t", _TAB)
        return (i + self._images for i in self._processor.encode(_BLANKS.sub(_blanks, text)))


def _blanks(run: re.Match[str]) -> str:
    """A run of spaces as the longest pieces there are, from the left."""
    whole, rest = divmod(len(run.group()), _MOST)
    last = f"<|blank_{rest}|>" if rest > 1 else " " * rest
    return f"<|blank_{_MOST}|>" * whole + last


def _completed(model: SpmModel) -> SpmModel:
    """The model with the pieces that the first layout's file lacks."""
    if len(model.pieces) != _BASE:
        return model
    return replace(
        model,
        pieces=[*model.pieces, *(piece for piece, _ in ADDED)],
        scores=[*model.scores, *[0.0] * len(ADDED)],
        kinds=[*model.kinds, *(kind for _, kind in ADDED)],
        byte_fallback=True,
    )


def _text(piece: str, kind: int) -> bytes:
    """What a piece adds to a text."""
    if kind == BYTE:
        return bytes((int(piece[3:5], 16),))
    if kind == USER_DEFINED:
        if piece.startswith("<|blank_"):
            return b" " * int(piece[8:-2])
        piece = {_LINE: "\n", _TAB: "\t"}.get(piece, piece)
    return (piece.replace(SPACE, " ") if kind == NORMAL else piece).encode()

"""SentencePiece tokenizers: InternLM2, InternLM 1, and generic Llama `.model` files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property

import sentencepiece

from hanlin.errors import TokenizerError, problems
from hanlin.tokenizers.base import AddedToken, BaseTokenizer, Specials, is_markup
from hanlin.tokenizers.detokenizer import TokenTable
from hanlin.tokenizers.spm_model import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SpmModel,
)

__all__ = ["SentencePieceTokenizer", "known_added", "load_processor"]

SPACE = "▁"
_FROM_TEXT = frozenset((NORMAL, USER_DEFINED, UNUSED))
# Long texts are encoded in parts: SentencePiece's time per token doubles between 1,000 and 100,000 characters.
_LONG, _PART = 4096, 1024
# The names of InternLM2's last six ids, from tokenizer_config.json; the `.model` calls them [UNUSED_TOKEN_141..146].
_INTERNLM2_ADDED = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>")
_INTERNLM2_FIRST_ADDED = 92538


def known_added(model: SpmModel) -> list[AddedToken]:
    """The added tokens that a family has even when its directory does not say: InternLM2's six, InternLM's two."""
    pieces = model.pieces
    last = _INTERNLM2_FIRST_ADDED + len(_INTERNLM2_ADDED)
    if pieces[_INTERNLM2_FIRST_ADDED:last] == [f"[UNUSED_TOKEN_{k}]" for k in range(141, 147)]:
        return [AddedToken(id=_INTERNLM2_FIRST_ADDED + k, content=name) for k, name in enumerate(_INTERNLM2_ADDED)]
    return [AddedToken(id=pieces.index(name), content=name) for name in ("<eoh>", "<eoa>") if name in pieces]


class SentencePieceTokenizer(BaseTokenizer):
    """Ids as SentencePiece gives them, except that no text reaches a special or reserved id unless it is parsed for.

    SentencePiece matches "user defined" pieces anywhere in a text, and InternLM2's file has `<|im_end|>` as one under
    its old name "[UNUSED_TOKEN_145]": a user who writes that would close the turn. So such pieces become control pieces
    here: `parse_special` recognises them (by old and new name), plain text does not, and their spelling is encoded like
    any other text.

    What cannot round-trip: U+2581 "▁" is SentencePiece's own sign for a space, and comes back as a space. Where a model
    collapses spaces (InternLM's do not), they stay collapsed.

    Args:
        model: the model file, read.
        added: tokens that the directory adds or renames; they win over the pieces' own names.
        specials: ids with a role; by default the model's own, with the begin token before a bare prompt.
        rows: rows of the model's embedding; ids between the pieces and this decode to nothing.
        name: the file, for messages.

    Raises:
        TokenizerError: the added tokens do not fit, or SentencePiece refuses the model.
    """

    def __init__(
        self,
        model: SpmModel,
        *,
        added: Iterable[AddedToken] = (),
        specials: Specials | None = None,
        rows: int = 0,
        name: str = "tokenizer.model",
    ) -> None:
        kinds = list(model.kinds)
        parsed = {}
        for i, (piece, kind) in enumerate(zip(model.pieces, kinds, strict=True)):
            if kind == CONTROL or (kind in (USER_DEFINED, UNUSED) and is_markup(piece)):
                parsed[piece], kinds[i] = i, CONTROL
        special_ids = {i for i, kind in enumerate(model.kinds) if kind in (CONTROL, UNKNOWN)}
        names = dict(enumerate(model.pieces))
        words: dict[int, str] = {}
        for token in added:
            names[token.id] = token.content
            if token.special:
                special_ids.add(token.id)
            if not token.special and not is_markup(token.content):
                words[token.id] = token.content
                continue
            parsed[token.content] = token.id
            if token.id < len(kinds) and kinds[token.id] != UNKNOWN:
                kinds[token.id] = CONTROL
        reached = replace(model, pieces=list(model.pieces), scores=list(model.scores), kinds=kinds)
        _add_words(reached, words, name)
        kinds = list(reached.kinds)
        self._processor = load_processor(reached, name)
        self._model = reached
        size = max(rows, max(names) + 1)
        kinds += [CONTROL] * (size - len(kinds))
        pieces = tuple(names.get(i, "") for i in range(size))
        table = TokenTable(
            pieces=pieces,
            texts=tuple(map(_text, pieces, kinds)),
            special_ids=frozenset(special_ids),
            spaced_ids=frozenset(i for i in range(size) if kinds[i] in _FROM_TEXT and pieces[i].startswith(SPACE)),
            strip="all" if model.remove_extra_spaces else "first" if model.dummy_prefix else "none",
            restart_ids=frozenset(parsed.values()),
            byte_errors=True,
        )
        super().__init__(table, specials or _roles(model), parsed)

    @property
    def model(self) -> SpmModel:
        """The pieces as text can reach them, and the settings."""
        return self._model

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        if not parse_special:
            return self._encode_plain(text)
        ids: list[int] = []
        for part in self._split_special(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._encode_plain(part)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        if len(text) <= _LONG or not self._independent_parts:
            return list(self._processor.encode(text))
        ids: list[int] = []
        for part in self._parts(text):
            ids += self._processor.encode(part)
        return ids

    def _parts(self, text: str) -> Iterator[str]:
        """`text` cut where the ids cannot notice.

        BPE merges neighbours into pieces, so a merge across a boundary needs a piece that holds the two characters
        beside it in this order. Where no piece does, its left and its right never affect each other.
        """
        start, size = 0, len(text)
        while size - start > _PART:
            cut = start + _PART
            while cut < size and text[cut - 1 : cut + 1].replace(SPACE, " ") in self._joined:
                cut += 1
            yield text[start:cut]
            start = cut
        if start < size:
            yield text[start:]

    @property
    def _independent_parts(self) -> bool:
        # Unigram scores whole texts; normalisation and a dummy prefix treat a part's start as the text's; unknown
        # characters in a row become one id unless they fall back to bytes.
        model = self._model
        whole = model.charsmap or model.dummy_prefix or model.remove_extra_spaces or not model.byte_fallback
        return model.algorithm == BPE and not whole

    @cached_property
    def _joined(self) -> frozenset[str]:
        """Every two neighbouring characters inside a piece that text can reach."""
        named = zip(self._model.pieces, self._model.kinds, strict=True)
        reachable = [piece.replace(SPACE, " ") for piece, kind in named if kind in _FROM_TEXT]
        return frozenset(piece[k : k + 2] for piece in reachable for k in range(len(piece) - 1))


def _roles(model: SpmModel) -> Specials:
    ids = {piece: i for i, piece in enumerate(model.pieces)}
    bos = ids.get(model.bos)
    prefix = () if bos is None else (bos,)
    return Specials(bos=bos, eos=ids.get(model.eos), unk=model.kinds.index(UNKNOWN), prefix=prefix)


def _text(piece: str, kind: int) -> bytes:
    if kind == BYTE:
        return bytes((int(piece[3:5], 16),))
    return (piece.replace(SPACE, " ") if kind in _FROM_TEXT else piece).encode()


def _add_words(model: SpmModel, words: dict[int, str], name: str) -> None:
    """Let SentencePiece itself find added words that are no structure, as it finds user-defined pieces."""
    for i in range(len(model.pieces), max(words, default=-1) + 1):
        model.pieces.append(_placeholder(i))
        model.scores.append(0.0)
        model.kinds.append(CONTROL)
    places = {piece: i for i, piece in enumerate(model.pieces)} if words else {}
    found = [
        f"added token {content!r} has id {i}, but piece {places[content]} is the same"
        for i, content in words.items()
        if places.get(content, i) != i
    ]
    if found:
        raise TokenizerError(problems(name, found, "Remove the added tokens that the model has already."))
    for i, content in words.items():
        model.pieces[i], model.kinds[i] = content, USER_DEFINED


def _placeholder(i: int) -> str:
    """A name for an id that SentencePiece must count but no text may reach; as a control piece."""
    return f"<hanlin_{i}>"


def load_processor(model: SpmModel, name: str) -> sentencepiece.SentencePieceProcessor:
    """The library's own object for a model; pieces that it refuses become placeholders.

    Raises:
        TokenizerError: SentencePiece refuses the model.
    """
    # SentencePiece refuses pieces that are empty or stand twice (converted files have such), and prints a warning at
    # each load about a NUL piece, which it never uses beside byte fallback. Control pieces hold their places.
    seen = {"", "\0"}
    for i, piece in enumerate(model.pieces):
        if piece in seen:
            model.pieces[i], model.kinds[i] = _placeholder(i), CONTROL
        seen.add(piece)
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model.serialize())
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise TokenizerError(f"{name}: SentencePiece refuses the model: {error}. Fetch the file again.") from None
    return processor

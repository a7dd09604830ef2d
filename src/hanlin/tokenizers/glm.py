"""Tokenizers of ChatGLM2, ChatGLM3 and CodeGeeX2 (SentencePiece) and of GLM-4 (a list of byte strings with ranks).

All have special tokens that no file holds: the released code appends them as it runs, and puts `[gMASK]` and the start
token before every prompt. Source: the released tokenizer files.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from functools import cached_property

from hanlin.errors import TokenizerError, problems
from hanlin.tokenizers.base import AddedToken, Specials
from hanlin.tokenizers.hf import MAX_ID, HFTokenizer, byte_alphabet
from hanlin.tokenizers.spm import SentencePieceTokenizer
from hanlin.tokenizers.spm_model import UNKNOWN, SpmModel

__all__ = [
    "ROLES",
    "ChatGLM2Tokenizer",
    "GLM4Tokenizer",
    "chatglm2_tokenizer",
    "glm4_tokenizer",
    "is_ranks",
    "read_ranks",
]

_MASKS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_GLM4 = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLES,
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip
# What GLM-4 cuts a text into before it looks for tokens.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
# Bytes of a token, and their squares in all: every way to split each token is looked at. The released file has runs of
# 512 spaces and less, and eight million.
_LONGEST, _SQUARES = 1024, 1 << 27


class ChatGLM2Tokenizer(SentencePieceTokenizer):
    """Where special tokens are parsed, `sop` is one behind `[gMASK]` only: it is a part of "philosophy" as well."""

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        names = sorted(self._parsed.keys() - {"sop", "eop"}, key=len, reverse=True)
        return re.compile("|".join([*map(re.escape, names), r"(?<=\[gMASK\])sop"]))


def chatglm2_tokenizer(
    model: SpmModel, *, roles: bool, added: Iterable[AddedToken] = (), rows: int = 0, name: str = "tokenizer.model"
) -> ChatGLM2Tokenizer:
    """ChatGLM2's tokenizer, or with `roles` ChatGLM3's: the same file, and four special tokens more.

    Raises:
        TokenizerError: tokens that the released classes do not have under these ids.
    """
    names = (*_MASKS, *ROLES) if roles else _MASKS
    first = len(model.pieces)
    special = [AddedToken(id=first + i, content=content) for i, content in enumerate(names)]
    known = {token.id: token.content for token in special} | dict(enumerate(model.pieces))
    _check_added(added, known, name)
    ids = {token.content: token.id for token in special}
    unknown = model.kinds.index(UNKNOWN)
    specials = Specials(
        bos=_index(model, model.bos),
        eos=_index(model, model.eos),
        unk=unknown,
        pad=unknown,
        prefix=(ids["[gMASK]"], ids["sop"]),
    )
    return ChatGLM2Tokenizer(model, added=special, specials=specials, rows=rows, name=name)


def _index(model: SpmModel, piece: str) -> int | None:
    return model.pieces.index(piece) if piece in model.pieces else None


def _check_added(added: Iterable[AddedToken], known: dict[int, str], name: str) -> None:
    found = [
        f"added token {token.content!r} with id {token.id}" for token in added if known.get(token.id) != token.content
    ]
    if found:
        more = [f"and {len(found) - 8} more"] if len(found) > 8 else []
        raise TokenizerError(problems(name, [*found[:8], *more], "Remove them from the JSON files."))


def is_ranks(data: bytes) -> bool:
    """Whether a file begins as a list of base64 text and ranks, not as a SentencePiece model."""
    first = data[: _LONGEST * 2].split(b"\n", 1)[0].split()
    return len(first) == 2 and first[1].isdigit() and _decoded(first[0]) is not None


def read_ranks(data: bytes, name: str) -> list[bytes]:
    """The tokens in the order of their ranks, which are their ids.

    Raises:
        TokenizerError: everything that is wrong with the file.
    """
    tokens: dict[int, bytes] = {}
    found: list[str] = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        fields = line.split()
        token = _decoded(fields[0]) if len(fields) == 2 else None
        digits = fields[1] if len(fields) == 2 else b""
        if token is None or not (digits.isdigit() and len(digits) < 8 and int(digits) < MAX_ID):
            found.append(f"line {number} must hold base64 of at most {_LONGEST} bytes and a rank, not {line[:40]!r}")
        elif int(digits) in tokens:
            found.append(f"line {number} gives rank {int(digits)} again")
        else:
            tokens[int(digits)] = token
    known = set(tokens.values())
    if not found:
        absent = [f"{byte:#04x}" for byte in range(256) if bytes((byte,)) not in known]
        if sum(len(token) ** 2 for token in known) > _SQUARES:
            found.append("its tokens are too long in all")
        if len(known) != len(tokens):
            found.append("tokens stand twice")
        if absent:
            found.append(f"there is no token for the bytes {', '.join(absent[:8])}")
        if sorted(tokens) != list(range(len(tokens))):
            found.append("ranks are missing")
    if found:
        more = [f"and {len(found) - 8} more"] if len(found) > 8 else []
        raise TokenizerError(problems(name, [*found[:8], *more], "Fetch the file again."))
    return [tokens[rank] for rank in range(len(tokens))]


def _decoded(text: bytes) -> bytes | None:
    try:
        token = base64.b64decode(text, validate=True) if len(text) <= 2 * _LONGEST else b""
    except binascii.Error:
        return None
    return token if 0 < len(token) <= _LONGEST else None


class GLM4Tokenizer(HFTokenizer):
    """Byte-level tokens merged by rank, as tiktoken does: of all neighbours, those whose union has the lowest rank."""

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        if not parse_special:
            return super()._encode(text, False)
        ids: list[int] = []
        for part in self._split_special(text):
            ids += [part] if isinstance(part, int) else super()._encode(part, False)
        return ids


def glm4_tokenizer(
    data: bytes, *, added: Iterable[AddedToken] = (), rows: int = 0, name: str = "tokenizer.model"
) -> GLM4Tokenizer:
    """GLM-4's tokenizer from its file's bytes.

    Raises:
        TokenizerError: a broken file, or tokens that the released class does not have under these ids.
    """
    tokens = read_ranks(data, name)
    special = [{"id": len(tokens) + i, "content": content, "special": True} for i, content in enumerate(_GLM4)]
    ids = {content: len(tokens) + i for i, content in enumerate(_GLM4)}
    letters = [letter for letter, _ in sorted(byte_alphabet().items(), key=lambda item: item[1])]
    pieces = {token: "".join([letters[byte] for byte in token]) for token in tokens}
    _check_added(added, {i: content for content, i in ids.items()} | dict(enumerate(pieces.values())), name)
    rules = {
        "model": {
            "type": "BPE",
            "vocab": {piece: rank for rank, piece in enumerate(pieces.values())},
            "merges": [pair for token in tokens for pair in _merges(token, pieces)],
            "ignore_merges": True,
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [{**token, **_PLAIN} for token in special],
    }
    end = ids["<|endoftext|>"]
    specials = Specials(eos=end, pad=end, prefix=(ids["[gMASK]"], ids["<sop>"]))
    return GLM4Tokenizer(rules, specials=specials, rows=rows, name=name)


def _merges(token: bytes, pieces: dict[bytes, str]) -> list[tuple[str, str]]:
    """All pairs of tokens that join to this one, in an order of their own."""
    cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
    return [(pieces[left], pieces[right]) for left, right in cuts if left in pieces and right in pieces]

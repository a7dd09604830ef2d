"""The SentencePiece model file: a small, bounded reader and writer of its Protocol Buffers wire format.

Read here and not by the library alone, because three things must be known or changed before the library sees the
model: that the file is sound, which pieces are structure that user text must not reach, and what a GGUF file says in
other words.
Field numbers: google/sentencepiece, src/sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hanlin.errors import TokenizerError, problems

__all__ = ["BPE", "BYTE", "CONTROL", "NORMAL", "UNIGRAM", "UNKNOWN", "UNUSED", "USER_DEFINED", "SpmModel"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2

MAX_PIECES = 1 << 20
_PIECES, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5


@dataclass(kw_only=True)
class SpmModel:
    """Pieces with scores and kinds, and the few settings that decide how text is cut.

    Attributes:
        pieces, scores, kinds: one entry an id; kinds are NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE.
        algorithm: BPE or UNIGRAM.
        byte_fallback: whether characters without a piece become byte tokens.
        dummy_prefix: whether a space is put before the text.
        remove_extra_spaces: whether runs of spaces collapse.
        charsmap: the compiled normalisation; empty is the identity.
        bos, eos: the names of the begin and end pieces.
    """

    pieces: list[str] = field(repr=False)
    scores: list[float] = field(repr=False)
    kinds: list[int] = field(repr=False)
    algorithm: int = BPE
    byte_fallback: bool = True
    dummy_prefix: bool = True
    remove_extra_spaces: bool = False
    charsmap: bytes = field(default=b"", repr=False)
    bos: str = "<s>"
    eos: str = "</s>"

    @classmethod
    def parse(cls, data: bytes, name: str) -> SpmModel:
        """Read a `.model` file's bytes; `name` is for messages.

        Raises:
            TokenizerError: everything that is wrong with it.
        """
        pieces: list[str] = []
        scores: list[float] = []
        kinds: list[int] = []
        trainer: dict[int, object] = {}
        normalizer: dict[int, object] = {}
        denormalizer: dict[int, object] = {}
        try:
            for number, value in _fields(data):
                if number == _PIECES and isinstance(value, bytes):
                    if len(pieces) >= MAX_PIECES:
                        raise ValueError(f"more than {MAX_PIECES} pieces")
                    piece, score, kind = _piece(value)
                    pieces.append(piece)
                    scores.append(score)
                    kinds.append(kind)
                elif number == _TRAINER and isinstance(value, bytes):
                    trainer.update(_fields(value))
                elif number == _NORMALIZER and isinstance(value, bytes):
                    normalizer.update(_fields(value))
                elif number == _DENORMALIZER and isinstance(value, bytes):
                    denormalizer.update(_fields(value))
            model = cls(
                pieces=pieces,
                scores=scores,
                kinds=kinds,
                algorithm=_int(trainer, 3, UNIGRAM),
                byte_fallback=bool(_int(trainer, 35, 0)),
                bos=_bytes(trainer, 46, b"<s>").decode(),
                eos=_bytes(trainer, 47, b"</s>").decode(),
                charsmap=_bytes(normalizer, 2, b""),
                dummy_prefix=bool(_int(normalizer, 3, 1)),
                remove_extra_spaces=bool(_int(normalizer, 4, 1)),
            )
            if _bytes(denormalizer, 2, b""):
                raise ValueError("it has a denormaliser, which no supported model needs")
            if _int(trainer, 24, 0) or not _int(normalizer, 5, 1):
                raise ValueError("spaces must be escaped and lead their words, as in every supported model")
        except (ValueError, IndexError, struct.error) as error:  # UnicodeDecodeError is a ValueError
            reason = error if str(error) else "it ends too early"
            raise TokenizerError(f"{name} is no usable SentencePiece model: {reason}. Fetch the file again.") from None
        model.check(name)
        return model

    def check(self, name: str) -> None:
        """Refuse what SentencePiece would choke on.

        Raises:
            TokenizerError: everything that is wrong.
        """
        found = list(self._wrong())
        if found:
            raise TokenizerError(problems(name, found, "Fetch the file again, or use the model's tokenizer.json."))

    def serialize(self) -> bytes:
        """The bytes of a `.model` file that says this much."""
        parts = []
        scores = struct.iter_unpack("4s", struct.pack(f"<{len(self.scores)}f", *self.scores))
        for piece, (score,), kind in zip(self.pieces, scores, self.kinds, strict=True):
            text = piece.encode()
            size = len(text)
            if size < 119:  # every length is a single byte, which makes it three times as fast
                parts.append(b"\x0a%c\x0a%c%b\x15%b\x18%c" % (size + 9, size, text, score, kind))
                continue
            body = b"\x0a%b%b\x15%b\x18%c" % (_varint(size), text, score, kind)
            parts.append(b"\x0a" + _varint(len(body)) + body)
        unk = self.kinds.index(UNKNOWN)
        trainer = ((3, self.algorithm), (35, self.byte_fallback), (40, unk), (45, self.pieces[unk]))
        normalizer = ((2, self.charsmap), (3, self.dummy_prefix), (4, self.remove_extra_spaces), (5, True))
        parts += (_message(_TRAINER, trainer), _message(_NORMALIZER, normalizer))
        return b"".join(parts)

    def _wrong(self) -> Iterator[str]:
        if not self.pieces:
            yield "there are no pieces"
            return
        unknown = self.kinds.count(UNKNOWN)
        if unknown != 1:
            yield f"there must be one unknown piece, not {unknown}"
        strange = sorted({kind for kind in self.kinds if not NORMAL <= kind <= BYTE})
        if strange:
            yield f"piece kinds must be 1..6, not {strange[:8]}"
        if not all(abs(score) < 3e38 for score in self.scores):
            yield "piece scores must be finite and fit a float32"
        if self.algorithm not in (UNIGRAM, BPE):
            yield f"the algorithm must be 1 (unigram) or 2 (BPE), not {self.algorithm}"
        expected = {f"<0x{value:02X}>" for value in range(256)} if self.byte_fallback else set()
        given = {piece for piece, kind in zip(self.pieces, self.kinds, strict=True) if kind == BYTE}
        if given != expected:
            yield f"byte pieces must be <0x00>..<0xFF> with byte fallback and none without: {len(given)} given"


def _piece(data: bytes) -> tuple[str, float, int]:
    # Nearly all pieces have this layout; reading it in one go halves the time to load.
    size = len(data)
    if size > 2 and data[0] == 0x0A and data[1] < 0x80:
        end = 2 + data[1]
        if size == end + 5 and data[end] == 0x15:
            return data[2:end].decode(), struct.unpack_from("<f", data, end + 1)[0], NORMAL
    values: dict[int, object] = dict(_fields(data))
    score = values.get(2, 0.0)
    if not isinstance(score, float):
        raise ValueError("a piece's score is not a number")
    return _bytes(values, 1, b"").decode(), score, _int(values, 3, NORMAL)


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    position, size = 0, len(data)
    while position < size:
        key, position = _read_varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _read_varint(data, position)
            yield number, value
        elif wire == 2:
            length, position = _read_varint(data, position)
            if length > size - position:
                raise ValueError(f"a field of {length} bytes where {size - position} are left")
            yield number, data[position : position + length]
            position += length
        elif wire == 5:
            yield number, struct.unpack_from("<f", data, position)[0]
            position += 4
        elif wire == 1:
            yield number, struct.unpack_from("<d", data, position)[0]
            position += 8
        else:
            raise ValueError(f"wire type {wire} at byte {position}")


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    byte = data[position]
    if byte < 0x80:
        return byte, position + 1
    value, shift = byte & 0x7F, 7
    while shift < 64:
        position += 1
        byte = data[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position + 1
        shift += 7
    raise ValueError(f"a number longer than 64 bits at byte {position}")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _message(number: int, values: Iterable[tuple[int, int | str | bytes]]) -> bytes:
    body = b""
    for key, value in values:
        if isinstance(value, int):
            body += _varint(key << 3) + _varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            body += _varint(key << 3 | 2) + _varint(len(data)) + data
    return _varint(number << 3 | 2) + _varint(len(body)) + body


def _int(values: dict[int, object], number: int, default: int) -> int:
    value = values.get(number, default)
    if not isinstance(value, int):
        raise ValueError(f"field {number} is not a whole number")
    return value


def _bytes(values: dict[int, object], number: int, default: bytes) -> bytes:
    value = values.get(number, default)
    if not isinstance(value, bytes):
        raise ValueError(f"field {number} is not text")
    return value

"""The SentencePiece wire format: what is read, what is written, what is refused."""

from __future__ import annotations

import random
import struct

import pytest
import sentencepiece

from hanlin.errors import TokenizerError
from hanlin.tokenizers.spm import SentencePieceTokenizer
from hanlin.tokenizers.spm_model import BPE, BYTE, NORMAL, UNIGRAM, UNUSED, USER_DEFINED, SpmModel
from tokenizer_samples import INTERNLM, INTERNLM2, tiny_spm


def reference(data: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=data)


@pytest.mark.parametrize("path", [INTERNLM2, INTERNLM], ids=lambda path: path.stem)
def test_pieces_are_those_of_the_library(path: object) -> None:
    data = path.read_bytes()  # type: ignore[attr-defined]
    model, library = SpmModel.parse(data, "m"), reference(data)
    assert model.pieces == library.id_to_piece(list(range(len(library))))
    assert model.scores == [library.get_score(i) for i in range(len(library))]
    assert [kind == BYTE for kind in model.kinds] == [library.is_byte(i) for i in range(len(library))]
    assert (model.algorithm, model.byte_fallback, model.dummy_prefix, model.remove_extra_spaces) == (
        BPE,
        True,
        False,
        False,
    )
    assert model.charsmap == b""  # so normalisation is the identity
    assert (model.bos, model.eos) == ("<s>", "</s>")


def test_write_then_read() -> None:
    model = tiny_spm(algorithm=UNIGRAM, dummy_prefix=True, remove_extra_spaces=True)
    model.kinds[-2] = UNUSED
    again = SpmModel.parse(model.serialize(), "m")
    assert again == model
    assert len(reference(model.serialize())) == len(model.pieces)


def test_written_models_encode_alike() -> None:
    data = INTERNLM2.read_bytes()
    again = reference(SpmModel.parse(data, "m").serialize())
    library = reference(data)
    for text in ("Hello  world", "——……Ａ", "[UNUSED_TOKEN_3]", "床前明月光👋\0"):
        assert again.encode(text) == library.encode(text)


def test_everything_wrong_is_listed() -> None:
    model = tiny_spm()
    model.kinds[0] = NORMAL
    model.kinds[260] = 9
    model.scores[5] = float("nan")
    model.kinds[7] = NORMAL
    model.algorithm = 4
    with pytest.raises(TokenizerError) as caught:
        model.check("m.model")
    text = str(caught.value)
    for part in ("m.model", "one unknown piece, not 0", "not [9]", "finite", "255 given", "not 4", "Fetch"):
        assert part in text
    with pytest.raises(TokenizerError, match="no pieces"):
        SpmModel(pieces=[], scores=[], kinds=[]).check("m")


@pytest.mark.parametrize("score", [float("inf"), 1e39, float("nan")])
def test_scores_that_no_float32_holds(score: float) -> None:
    model = tiny_spm()
    model.scores[-1] = score
    with pytest.raises(TokenizerError, match="float32"):
        model.check("m")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no pieces"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "a field of"),
        (b"\x0a\x05\x0a\x03ab", "a field of"),
        (b"\x0a\x04\x0a\x02\xff\xfe", "utf-8"),
        (b"\x0a\x03\x0a\x01", "a field of"),
        (b"\x80", "ends too early|index out of range"),
        (b"\xff" * 20, "longer than 64 bits"),
        (b"\x0b\x00", "wire type 3"),
        (b"\x0a\x03\x1a\x01a", "not a whole number"),
        (b"\x0a\x05\x12\x01a\x0a\x00", "not a number"),
        (b"\x0a\x02\x08\x01", "not text"),
        (b"PK\x03\x04 a zip file", "wire type|a field of"),
        (b"<!DOCTYPE html><html></html>", "wire type|a field of"),
    ],
)
def test_broken_files(data: bytes, reason: str) -> None:
    with pytest.raises(TokenizerError, match=f"x.model(.|\n)*({reason})"):
        SpmModel.parse(data, "x.model")


def test_truncated_at_any_place() -> None:
    data = tiny_spm().serialize()
    for end in range(0, len(data), 7):
        try:
            model = SpmModel.parse(data[:end], "x.model")
        except TokenizerError:
            continue
        # Cut between two messages, the rest is a smaller sound file; the settings after it have their defaults.
        SentencePieceTokenizer(model).encode("ab")


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        (b"\x12\x03\xc0\x01\x01", "spaces must"),  # trainer 24: spaces end words
        (b"\x1a\x02\x28\x00", "spaces must"),  # normaliser 5: spaces are not escaped
        (b"\x2a\x04\x12\x02ab", "denormaliser"),
    ],
)
def test_settings_that_would_change_text(field: bytes, reason: str) -> None:
    with pytest.raises(TokenizerError, match=reason):
        SpmModel.parse(tiny_spm().serialize() + field, "m")


def test_slow_layouts_are_read_too() -> None:
    # Fields in another order, a score left out, an unknown field: all legal, none like the usual layout.
    extra = b"\x0a" + bytes((2 + 3 + 5,)) + b"\x18\x04" + b"\x0a\x01z" + b"\x15" + struct.pack("<f", -3.0)
    bare = b"\x0a\x03\x0a\x01y"
    unknown = b"\x0a\x06\x0a\x01x\xb8\x0c\x01"
    model = SpmModel.parse(tiny_spm().serialize() + extra + bare + unknown, "m")
    assert model.pieces[-3:] == ["z", "y", "x"]
    assert model.scores[-3:] == [-3.0, 0.0, 0.0]
    assert model.kinds[-3:] == [USER_DEFINED, NORMAL, NORMAL]


def test_mutated_files_raise_or_work() -> None:
    chance = random.Random(0)
    data = tiny_spm().serialize()
    for _ in range(300):
        mutated = bytearray(data)
        for _ in range(chance.choice((1, 2, 8))):
            place = chance.randrange(len(mutated))
            mutated[place] ^= 1 << chance.randrange(8)
        if chance.random() < 0.3:
            del mutated[chance.randrange(len(mutated)) :]
        try:
            tokenizer = SentencePieceTokenizer(SpmModel.parse(bytes(mutated), "m"))
        except TokenizerError:
            continue
        tokenizer.decode(tokenizer.encode("ab 你好 <|im_end|>é", add_special=True, parse_special=True))

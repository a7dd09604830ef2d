"""SentencePiece tokenizers: InternLM2's and InternLM's real files, and small models for what those two do not have."""

from __future__ import annotations

import subprocess
import sys

import pytest
import sentencepiece

from hanlin.errors import RequestError, TokenizerError
from hanlin.tokenizers.base import AddedToken, Specials
from hanlin.tokenizers.spm import SentencePieceTokenizer, known_added
from hanlin.tokenizers.spm_model import SpmModel
from hanlin.types import Tokenizer
from tokenizer_samples import INTERNLM, INTERNLM2, INTERNLM2_ADDED, tiny_spm


def load(path: object = INTERNLM2, **options: object) -> SentencePieceTokenizer:
    model = SpmModel.parse(path.read_bytes(), path.name)  # type: ignore[attr-defined]
    return SentencePieceTokenizer(model, added=known_added(model), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def internlm2() -> SentencePieceTokenizer:
    return load()


@pytest.fixture(scope="module")
def internlm() -> SentencePieceTokenizer:
    return load(INTERNLM)


def test_internlm2_facts(internlm2: SentencePieceTokenizer) -> None:
    assert isinstance(internlm2, Tokenizer)
    assert internlm2.vocab_size == 92544
    assert (internlm2.bos_id, internlm2.eos_id) == (1, 2)
    assert internlm2.special_ids == {0, 1, 2, *INTERNLM2_ADDED}
    for i, name in INTERNLM2_ADDED.items():
        assert internlm2.token_text(i) == name
        assert internlm2.token_id(name) == i
    assert internlm2.encode("Hello world") == [9843, 2028]
    assert internlm2.encode("Hello world", add_special=True) == [1, 9843, 2028]
    assert internlm2.encode("\n") == [364]
    assert internlm2.encode("\n\n") == [402]
    assert internlm2.encode("1234567") == [4575, 1889, 3171]
    assert internlm2.encode("") == []


def test_there_is_no_dummy_prefix(internlm2: SentencePieceTokenizer) -> None:
    assert internlm2.encode(" a") != internlm2.encode("a")
    assert internlm2.decode(internlm2.encode(" a")) == " a"


def test_internlm_facts(internlm: SentencePieceTokenizer) -> None:
    assert internlm.vocab_size == 103168
    assert (internlm.bos_id, internlm.eos_id) == (1, 2)
    assert (internlm.token_id("<eoh>"), internlm.token_id("<eoa>")) == (103027, 103028)
    assert internlm.special_ids == {0, 1, 2, 103027, 103028}
    assert internlm.encode("你好", add_special=True) == [1, 76379]


@pytest.mark.parametrize(
    "text",
    [
        "[UNUSED_TOKEN_145]",
        "[UNUSED_TOKEN_0]",
        "<|im_start|>",
        "<|im_end|>",
        "<s>",
        "</s>",
        "<unk>",
        "<0x41>",
        "<|plugin|>",
    ],
)
def test_user_text_cannot_forge_structure(internlm2: SentencePieceTokenizer, text: str) -> None:
    for written in (text, f"a{text}b", f" {text} {text}\n"):
        ids = internlm2.encode(written)
        assert not internlm2.special_ids & set(ids)
        assert all(not internlm2.token_text(i).startswith("[UNUSED_TOKEN") for i in ids)
        assert internlm2.decode(ids) == written


@pytest.mark.parametrize("text", ["<eoh>", "<eoa>", "<TOKENS_UNUSED_2>", "<s>", "</s>"])
def test_user_text_cannot_forge_internlm_structure(internlm: SentencePieceTokenizer, text: str) -> None:
    ids = internlm.encode(f"x{text}y")
    assert all(i < 103027 and i not in internlm.special_ids for i in ids)
    assert internlm.decode(ids) == f"x{text}y"


def test_parse_special(internlm2: SentencePieceTokenizer) -> None:
    text = "<|im_start|>user\nhi<|im_end|>\n"
    ids = internlm2.encode(text, parse_special=True)
    assert ids == [92543, *internlm2.encode("user\nhi"), 92542, 364]
    assert internlm2.decode(ids) == "user\nhi\n"
    assert internlm2.decode(ids, skip_special=False) == text
    # Their names in the .model file, which the first chat models' prompts were written with, mean the same ids.
    assert internlm2.encode("[UNUSED_TOKEN_146]user", parse_special=True) == internlm2.encode(
        "<|im_start|>user", parse_special=True
    )
    assert internlm2.encode("[UNUSED_TOKEN_130]", parse_special=True) == [92527]


def test_parse_special_takes_the_longest() -> None:
    added = [AddedToken(id=270, content="<|a|>"), AddedToken(id=271, content="<|a|><|b|>")]
    tokenizer = SentencePieceTokenizer(tiny_spm(), added=added)
    assert tokenizer.encode("<|a|><|b|><|a|>", parse_special=True) == [271, 270]


def test_no_id_reads_unused(internlm2: SentencePieceTokenizer) -> None:
    # Pain 24's other half: a decoder that ignores the added tokens prints [UNUSED_TOKEN_145] at the end of each turn.
    ids = [*internlm2.encode("你好"), 92542, 92543, 92538]
    assert internlm2.decode(ids) == "你好"
    assert internlm2.decode(ids, skip_special=False) == "你好<|im_end|><|im_start|><|plugin|>"


def test_kept_specials_stand_verbatim(internlm2: SentencePieceTokenizer) -> None:
    ids = [1, *internlm2.encode("a"), 92542, *internlm2.encode(" b"), 2]
    assert internlm2.decode(ids, skip_special=False) == "<s>a<|im_end|> b</s>"


def test_padding_rows_decode_to_nothing() -> None:
    tokenizer = load(rows=92550)
    assert tokenizer.vocab_size == 92550
    assert tokenizer.decode([9843, 92544, 92549, 2028]) == "Hello world"
    assert tokenizer.token_text(92549) == ""
    with pytest.raises(RequestError, match="92550"):
        tokenizer.decode([92550])


@pytest.mark.parametrize("ids", [[-1], [92544], [9843, 10**12, -7]])
def test_ids_out_of_range_are_named(internlm2: SentencePieceTokenizer, ids: list[int]) -> None:
    wrong = [str(i) for i in ids if not 0 <= i < 92544]
    with pytest.raises(RequestError, match=r"0\.\.92543") as caught:
        internlm2.decode(ids)
    assert all(i in str(caught.value) for i in wrong)
    with pytest.raises(RequestError):
        internlm2.token_text(ids[0] if ids[0] != 9843 else ids[1])


def test_lone_surrogates_are_refused(internlm2: SentencePieceTokenizer) -> None:
    with pytest.raises(RequestError, match=r"U\+D800 at character 1"):
        internlm2.encode("a\ud800b")


def test_what_cannot_round_trip(internlm2: SentencePieceTokenizer) -> None:
    # SentencePiece writes a space as U+2581, so a U+2581 in a text is a space to it. Nothing else is lost.
    assert internlm2.decode(internlm2.encode("a\u2581b")) == "a b"
    assert internlm2.encode("a\u2581b") == internlm2.encode("a b")


@pytest.mark.parametrize(
    "text", ["\0", "a\0\0b", "\x01\x7f\x85\xa0", "\ufeff\u200b\u200d", "\ufffd", "\U0010ffff", "\r\n\r"]
)
def test_odd_characters_round_trip(internlm2: SentencePieceTokenizer, text: str) -> None:
    assert internlm2.decode(internlm2.encode(text)) == text


def test_nul_is_a_byte_token(internlm2: SentencePieceTokenizer) -> None:
    # Piece 354 is NUL too, but SentencePiece never produces it beside byte fallback.
    assert internlm2.encode("\0") == [3]
    assert internlm2.decode([354]) == "\0"


def test_token_text_and_id(internlm2: SentencePieceTokenizer) -> None:
    assert internlm2.token_id("▁hello") == internlm2.encode(" hello")[0]
    assert internlm2.token_text(internlm2.encode(" hello")[0]) == " hello"
    assert internlm2.token_id("<0x41>") == 3 + 0x41
    assert internlm2.token_text(3 + 0x41) == "A"
    assert internlm2.token_text(3 + 0xE4) == "\ufffd"
    assert internlm2.token_id("no such piece") is None
    assert internlm2.token_id("") is None


def test_parts_of_a_long_text_are_independent(internlm2: SentencePieceTokenizer) -> None:
    # Longer than one part, and hard to cut: runs of spaces, of newlines, of one letter, digits, and CJK without spaces.
    reference = sentencepiece.SentencePieceProcessor(model_proto=INTERNLM2.read_bytes())
    units = [
        " " * 9000,
        "\n" * 5000,
        "a" * 5000,
        "1234567 " * 900,
        "白日依山尽，黄河入海流。" * 700,
        "\t \n" * 3000,
        "——……Ａ" * 2000,
    ]
    for text in (*units, "".join(units), "".join(reversed(units)), "x" * 4095 + "ing", "x" * 4096 + "ing", "▁ " * 5000):
        assert internlm2.encode(text) == reference.encode(text)


def test_loading_prints_nothing() -> None:
    code = (
        "from tokenizer_samples import INTERNLM2; from hanlin.tokenizers.spm import *; "
        "from hanlin.tokenizers.spm_model import SpmModel; "
        "SentencePieceTokenizer(SpmModel.parse(INTERNLM2.read_bytes(), 'm')).encode('a')"
    )
    path = [str(INTERNLM2.parents[1]), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path = {path!r}; {code}"], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_a_dummy_prefix_comes_and_goes() -> None:
    tokenizer = SentencePieceTokenizer(tiny_spm(dummy_prefix=True))
    assert tokenizer.decode(tokenizer.encode("ab")) == "ab"
    assert tokenizer.decode(tokenizer.encode(" ab")) == " ab"
    written = "ab<|im_end|>ab"
    ids = tokenizer.encode(written, parse_special=True)
    assert tokenizer.token_text(ids[0]) == " ab"
    assert tokenizer.decode(ids, skip_special=False) == written
    assert tokenizer.decode([1, *tokenizer.encode("ab")]) == "ab"


def test_added_words_are_found_in_plain_text() -> None:
    # A fine-tuned model's own word is no structure: plain text must reach it, wherever its id is.
    tokenizer = SentencePieceTokenizer(tiny_spm(), added=[AddedToken(id=273, content="翰林", special=False)])
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    assert tokenizer.encode("a翰林b") == [*a, 273, *b]
    assert tokenizer.decode([*a, 273, *b]) == "a翰林b"
    assert tokenizer.vocab_size == 274
    assert tokenizer.token_text(271) == ""
    assert 273 not in tokenizer.special_ids


def test_an_added_word_cannot_stand_twice() -> None:
    with pytest.raises(TokenizerError, match="'ab' has id 280"):
        SentencePieceTokenizer(tiny_spm(), added=[AddedToken(id=280, content="ab", special=False)])


def test_pieces_that_stand_twice_do_not_matter() -> None:
    model = tiny_spm()
    twice = len(model.pieces)
    model.pieces += ["ab", ""]
    model.scores += [-50.0, -51.0]
    model.kinds += [1, 1]
    tokenizer = SentencePieceTokenizer(model)
    assert tokenizer.encode("ab") == [model.pieces.index("ab")]
    assert tokenizer.decode([twice, twice + 1]) == "ab"


def test_roles_given_from_outside() -> None:
    tokenizer = SentencePieceTokenizer(tiny_spm(), specials=Specials(bos=1, eos=2, prefix=(1, 1), suffix=(2,)))
    assert tokenizer.encode("a", add_special=True) == [1, 1, *tokenizer.encode("a"), 2]

"""Text as it streams: what people complained about elsewhere, issue numbers beside, a test each."""

from __future__ import annotations

import time

import pytest

from hanlin.errors import RequestError
from hanlin.tokenizers import SentencePieceTokenizer, StreamDetokenizer, from_gguf
from hanlin.tokenizers.base import BaseTokenizer
from hanlin.tokenizers.detokenizer import TokenTable
from hanlin.tokenizers.spm import known_added
from hanlin.tokenizers.spm_model import SpmModel
from tokenizer_samples import INTERNLM2, INTERNLM2_ADDED, gguf_bpe, tiny_spm


def internlm2() -> BaseTokenizer:
    model = SpmModel.parse(INTERNLM2.read_bytes(), "m")
    return SentencePieceTokenizer(model, added=known_added(model))


def byte_level() -> BaseTokenizer:
    return from_gguf(gguf_bpe())


def with_prefix() -> BaseTokenizer:
    return SentencePieceTokenizer(tiny_spm(dummy_prefix=True))


@pytest.fixture(scope="module", params=[internlm2, with_prefix, byte_level], ids=["spm", "llama", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> BaseTokenizer:
    return request.param()  # type: ignore[no-any-return]


def stream(tokenizer: BaseTokenizer, ids: list[int], *, skip_special: bool = True) -> list[str]:
    """The pieces of a reply that comes one token at a time."""
    detokenizer = tokenizer.detokenizer(skip_special=skip_special)
    return [*(detokenizer.push([i]) for i in ids), detokenizer.finish()]


@pytest.mark.parametrize("text", ["👋🏽 你好，世界！", "龘靐齉", "e\u0301\u200d👩‍👩‍👧‍👦", "𠮷野家", "한국어 ไทย"])
def test_no_half_characters(tokenizer: BaseTokenizer, text: str) -> None:
    """Pain 21, InternLM/lmdeploy#558: broken UTF-8 in streamed Chinese and emoji."""
    pieces = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize(
    "text", ["it 's", "I 'm \"'s\" 've", "a 'm b \"'v", " 's", "''s 'd 'll 're n't", "don 't , . ! ?"]
)
def test_contractions_after_a_space_and_a_quote(tokenizer: BaseTokenizer, text: str) -> None:
    """Pain 22, InternLM/lmdeploy#2190: `'s`, `'m`, `'v` lost, as "clean-up" of spaces does to a piece on its own."""
    assert "".join(stream(tokenizer, tokenizer.encode(text))) == text
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["  two", " one", "a  b   c", "\n  x = 1\n    y", "\t tab ", "   "])
def test_spaces_are_kept(tokenizer: BaseTokenizer, text: str) -> None:
    """Pain 23, InternLM/lmdeploy#992 and huggingface/transformers#29452: leading spaces eaten or added."""
    assert "".join(stream(tokenizer, tokenizer.encode(text))) == text


def test_internlm2_keeps_the_space_of_a_first_word() -> None:
    reply = internlm2()
    ids = reply.encode(" hello")
    assert stream(reply, ids) == [" hello", ""]


def test_words_are_not_glued() -> None:
    # Decoding token by token on its own gave "Mynameis" (InternLM's own tests/test_hf_model.py forbids it).
    tokenizer = internlm2()
    assert "".join(stream(tokenizer, tokenizer.encode("My name is InternLM. I am a model"))) == (
        "My name is InternLM. I am a model"
    )


def test_the_end_of_a_turn_is_not_printed() -> None:
    """Pain 24, vllm-project/vllm#792 and ggml-org/llama.cpp#8321: <|im_end|> printed, or read as [UNUSED_TOKEN_145]."""
    tokenizer = internlm2()
    ids = [*tokenizer.encode("好的"), 92542]
    assert "".join(stream(tokenizer, ids)) == "好的"
    assert "".join(stream(tokenizer, ids, skip_special=False)) == "好的<|im_end|>"
    everything = "".join(stream(tokenizer, sorted(INTERNLM2_ADDED), skip_special=False))
    assert "UNUSED" not in everything


def test_a_character_that_never_becomes_whole() -> None:
    tokenizer = internlm2()
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.push([3 + 0xF0, 3 + 0x9F]) == ""
    assert detokenizer.push([3 + 0x91]) == ""
    assert detokenizer.finish() == "\ufffd" * 3  # one a byte, as SentencePiece
    assert detokenizer.push([3 + 0x41]) == "A"
    bpe = from_gguf(gguf_bpe())
    assert bpe.decode([0xF0, 0x9F, 0x91]) == "\ufffd"  # one a broken character, as the tokenizers library


def test_a_broken_character_gives_way_to_what_follows() -> None:
    tokenizer = internlm2()
    assert stream(tokenizer, [3 + 0xE4, 3 + 0xBD, 9843]) == ["", "", "\ufffd\ufffdHello", ""]
    ids = [3 + 0xE4, 92542, 3 + 0xBD, 3 + 0xA0]
    # A token that is left out does not come between the bytes of a character; one that is kept does.
    assert tokenizer.decode(ids) == "你"
    assert tokenizer.decode(ids, skip_special=False) == "\ufffd<|im_end|>\ufffd\ufffd"


def test_a_refused_push_takes_nothing() -> None:
    tokenizer = internlm2()
    detokenizer = tokenizer.detokenizer()
    detokenizer.push([3 + 0xE4])
    with pytest.raises(RequestError):
        detokenizer.push([3 + 0xBD, 10**6])
    assert detokenizer.push([3 + 0xBD, 3 + 0xA0]) == "你"


def test_collapsed_spaces_are_stripped_as_a_whole() -> None:
    table = TokenTable(
        pieces=("▁", "▁a", "<0x20>", "b"),
        texts=(b" ", b" a", b" ", b"b"),
        special_ids=frozenset(),
        spaced_ids=frozenset((0, 1)),
        strip="all",
    )
    assert StreamDetokenizer(table).push([0, 0, 1, 0, 3]) == "a b"
    assert StreamDetokenizer(table).push([2, 1]) == "  a"


def test_long_replies_take_linear_time() -> None:
    tokenizer = internlm2()
    ids = tokenizer.encode("白日依山尽👋 hello ") * 4000

    def seconds(count: int) -> float:
        detokenizer = tokenizer.detokenizer()
        start = time.perf_counter()
        for i in ids[:count]:
            detokenizer.push([i])
        return time.perf_counter() - start

    few, many = len(ids) // 10, len(ids)
    # Ten times the tokens; decoding the whole reply at each step would take a hundred times as long.
    assert min(seconds(many) for _ in range(3)) < 30 * min(seconds(few) for _ in range(3))

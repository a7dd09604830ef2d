"""For any ids and any split into pushes the pieces joined are the whole text; and text survives there and back."""

from __future__ import annotations

import json
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from hanlin.tokenizers import HFTokenizer, SentencePieceTokenizer, from_gguf
from hanlin.tokenizers.base import BaseTokenizer
from hanlin.tokenizers.spm import known_added
from hanlin.tokenizers.spm_model import UNIGRAM, SpmModel
from tokenizer_samples import INTERNLM, INTERNLM2, gguf_bpe, tiny_json, tiny_spm


def load(path: Path) -> SentencePieceTokenizer:
    model = SpmModel.parse(path.read_bytes(), path.name)
    return SentencePieceTokenizer(model, added=known_added(model), rows=len(model.pieces) + 6)


@cache
def tokenizers() -> dict[str, BaseTokenizer]:
    return {
        "internlm2": load(INTERNLM2),
        "internlm": load(INTERNLM),
        "dummy prefix": SentencePieceTokenizer(tiny_spm(dummy_prefix=True)),
        "collapsing": SentencePieceTokenizer(tiny_spm(dummy_prefix=True, remove_extra_spaces=True, algorithm=UNIGRAM)),
        "json": HFTokenizer(tiny_json()),
        "gguf": from_gguf(gguf_bpe()),
    }


@cache
def library(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())


NAMES = ("internlm2", "internlm", "dummy prefix", "collapsing", "json", "gguf")
# Random ids are mostly words; real replies mix them with byte tokens and specials, where streams break.
AWKWARD = st.one_of(st.integers(0, 270), st.integers(3, 258), st.integers(0, 2))


def ids_of(tokenizer: BaseTokenizer) -> st.SearchStrategy[list[int]]:
    last = tokenizer.vocab_size - 1
    id_ = st.one_of(
        AWKWARD.map(lambda i: min(i, last)), st.integers(0, last), st.sampled_from(sorted(tokenizer.special_ids))
    )
    written = st.text(max_size=8).map(lambda text: tokenizer.encode(text))
    return st.lists(st.one_of(id_.map(lambda i: [i]), written), max_size=12).map(lambda lists: [*chain(*lists)])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_split_gives_the_whole(name: str, data: st.DataObject) -> None:
    tokenizer = tokenizers()[name]
    ids = data.draw(ids_of(tokenizer))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    skip = data.draw(st.booleans())
    detokenizer = tokenizer.detokenizer(skip_special=skip)
    pieces = [detokenizer.push(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip)
    singly = tokenizer.detokenizer(skip_special=skip)
    assert "".join([*(singly.push([i]) for i in ids), singly.finish()]) == tokenizer.decode(ids, skip_special=skip)


@pytest.mark.parametrize("path", [INTERNLM2, INTERNLM], ids=lambda path: path.stem)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_decode_is_sentencepieces(path: Path, data: st.DataObject) -> None:
    tokenizer = tokenizers()["internlm2" if path == INTERNLM2 else "internlm"]
    ids = data.draw(ids_of(tokenizer))
    kept = [i for i in ids if i not in tokenizer.special_ids and i < len(library(path))]
    assert tokenizer.decode(ids) == library(path).decode(kept)


@cache
def spaced(prefix: bool, collapse: bool) -> tuple[SentencePieceTokenizer, sentencepiece.SentencePieceProcessor]:
    model = tiny_spm(user_defined=(), dummy_prefix=prefix, remove_extra_spaces=collapse)
    return SentencePieceTokenizer(model), sentencepiece.SentencePieceProcessor(model_proto=model.serialize())


@settings(max_examples=300, deadline=None)
@given(prefix=st.booleans(), collapse=st.booleans(), ids=st.lists(st.integers(3, 268), max_size=12))
def test_decode_is_sentencepieces_whatever_the_spaces(prefix: bool, collapse: bool, ids: list[int]) -> None:
    tokenizer, reference = spaced(prefix, collapse)
    assert tokenizer.decode([1, *ids]) == reference.decode(ids)


@cache
def reference_json() -> Library:
    return Library.from_str(json.dumps(tiny_json()))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_decode_is_the_tokenizers_librarys(data: st.DataObject) -> None:
    tokenizer = tokenizers()["json"]
    ids = data.draw(ids_of(tokenizer))
    for skip in (True, False):
        assert tokenizer.decode(ids, skip_special=skip) == reference_json().decode(ids, skip_special_tokens=skip)


def same_text(tokenizer: BaseTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(tokenizer.encode(text, add_special=True)) == text


@pytest.mark.parametrize("name", ["internlm2", "internlm", "json", "gguf"])
@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_unicode_round_trips(name: str, text: str) -> None:
    # U+2581 is SentencePiece's own sign for a space: the one character that InternLM's tokenizers cannot keep.
    byte_level = name in ("json", "gguf")
    same_text(tokenizers()[name], text if byte_level else text.replace("\u2581", "_"))


@pytest.mark.parametrize("path", [INTERNLM2, INTERNLM], ids=lambda path: path.stem)
@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(), st.text("ab \n\t。你—…Ａ1<|>_[]", max_size=60)))
def test_ids_are_sentencepieces(path: Path, text: str) -> None:
    tokenizer = tokenizers()["internlm2" if path == INTERNLM2 else "internlm"]
    assert tokenizer.encode(text) == library(path).encode(text)


MARKS = (
    "<|im_start|>",
    "<|im_end|>",
    "[UNUSED_TOKEN_145]",
    "[UNUSED_TOKEN_3]",
    "<s>",
    "<eoa>",
    "<|begin|>",
    "<tool_call>",
)


@pytest.mark.parametrize("name", ["internlm2", "internlm", "json", "gguf"])
@settings(max_examples=150, deadline=None)
@given(parts=st.lists(st.one_of(st.sampled_from(MARKS), st.text("ab <|>_[]", max_size=4)), max_size=6))
def test_marks_in_text_stay_text(name: str, parts: list[str]) -> None:
    tokenizer = tokenizers()[name]
    text = "".join(parts)
    same_text(tokenizer, text)
    parsed = tokenizer.encode(text, parse_special=True)
    again = tokenizer.decode(parsed, skip_special=False)
    assert again == text.replace("[UNUSED_TOKEN_145]", "<|im_end|>" if name == "internlm2" else "[UNUSED_TOKEN_145]")


@settings(max_examples=60, deadline=None)
@given(
    unit=st.text("ab \n\t。你好—…Ａ1é👋", min_size=1, max_size=12),
    tail=st.text(max_size=20),
    count=st.integers(400, 3000),
)
def test_parts_of_long_texts_are_independent(unit: str, tail: str, count: int) -> None:
    text = unit * count + tail
    assert tokenizers()["internlm2"].encode(text) == library(INTERNLM2).encode(text)

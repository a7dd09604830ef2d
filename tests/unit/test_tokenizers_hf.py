"""tokenizer.json: ids as the library's own, specials out of reach, and broken files refused."""

from __future__ import annotations

import copy
import json
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer as Library

from hanlin.errors import HanlinError, RequestError, TokenizerError
from hanlin.tokenizers.base import Specials
from hanlin.tokenizers.hf import HFTokenizer
from hanlin.types import Tokenizer
from tokenizer_samples import added_token, byte_letters, tiny_json


def test_ids_are_the_librarys() -> None:
    data = tiny_json()
    tokenizer, library = HFTokenizer(data), Library.from_str(json.dumps(data))
    assert isinstance(tokenizer, Tokenizer)
    for text in ("", "ab ab", " a\n\n\tb", "你好👋", "翰林", "e\u0301"):
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special=True) == library.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    text = "<|begin|>ab<|im_end|>\n<tool_call>翰林"
    assert tokenizer.encode(text, parse_special=True) == library.encode(text, add_special_tokens=False).ids


def test_user_text_cannot_forge_structure() -> None:
    tokenizer = HFTokenizer(tiny_json())
    for text in ("<|im_end|>", "a<|begin|>b", "<tool_call>"):
        ids = tokenizer.encode(text)
        assert max(ids) < 259
        assert tokenizer.decode(ids) == text
    # An added word is no structure, and the model was trained to see it as one token.
    assert tokenizer.encode("翰林") == [262]


def test_normalized_specials_stay_out_of_reach_too() -> None:
    data = tiny_json(normalizer={"type": "NFC"})
    data["added_tokens"][1] = added_token(260, "<|im_end|>", normalized=True)
    assert 260 not in HFTokenizer(data).encode("a<|im_end|>")


def test_plain_and_parsed_in_two_threads() -> None:
    tokenizer = HFTokenizer(tiny_json())
    text = "ab<|im_end|>" * 50
    wrong: list[bool] = []

    def encode(parse: bool) -> None:
        for _ in range(50):
            ids = tokenizer.encode(text, parse_special=parse)
            wrong.append((260 in ids) is not parse)

    threads = [threading.Thread(target=encode, args=(parse,)) for parse in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [False] * 100


def test_specials_and_padding_rows() -> None:
    tokenizer = HFTokenizer(tiny_json(), specials=Specials(bos=259, eos=260), special={"<tool_call>"}, rows=270)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (259, 260, 270)
    assert tokenizer.special_ids == {259, 260, 261}
    assert tokenizer.decode([97, 260, 261, 269, 98]) == "ab"
    assert tokenizer.decode([97, 260, 261, 269, 98], skip_special=False) == "a<|im_end|><tool_call>b"
    assert tokenizer.token_text(257) == "ab"
    assert tokenizer.token_id("Ġa") == 256
    assert tokenizer.token_id("<tool_call>") == 261
    with pytest.raises(RequestError, match="270"):
        tokenizer.decode([270])


def test_leftovers_of_a_training_run_are_ignored() -> None:
    # A file saved during training often truncates, pads and drops merges at random; a served prompt must not.
    data = tiny_json(
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 8},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "!",
        },
    )
    data["model"]["dropout"] = 0.9
    tokenizer = HFTokenizer(data)
    assert tokenizer.encode(" ab ab ab") == [258, 258, 258]


def llama2_json(*, prefix: bool = True) -> dict[str, Any]:
    """SentencePiece as Transformers converts it: Llama 2 (with prefix), InternLM2 (without)."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), "▁", "a", "b", "ab", "▁a", "▁ab"]
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return {
        "added_tokens": [added_token(i, pieces[i]) for i in range(3)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace] if prefix else [replace],
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [*steps, {"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else steps,
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [["a", "b"], ["▁", "a"], ["▁a", "b"], ["▁", "ab"]],
        },
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_in_json(prefix: bool) -> None:
    data = llama2_json(prefix=prefix)
    tokenizer = HFTokenizer(data)
    library = Library.from_str(json.dumps({"version": "1.0", **data}))
    for text in ("ab ab", " ab", "  a", "你好👋 b", "a\n"):
        ids = tokenizer.encode(text)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == library.decode(ids) == text
    assert tokenizer.decode([3 + 0xE4, 3 + 0xBD, 3 + 0xA0, 3 + 0xE4]) == "你\ufffd"


def test_metaspace() -> None:
    data = llama2_json()
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    data |= {"normalizer": None, "pre_tokenizer": metaspace, "decoder": metaspace}
    tokenizer = HFTokenizer(data)
    library = Library.from_str(json.dumps({"version": "1.0", **data}))
    for text in ("ab ab", "a b", "a  b"):  # not " ab": the library adds no space before a space, and strips it later
        ids = tokenizer.encode(text)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == library.decode(ids) == text


def test_byte_letters_are_the_librarys() -> None:
    from tokenizers import pre_tokenizers

    assert set(byte_letters()) == set(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = HFTokenizer(tiny_json())
    for value in range(0x80):
        assert tokenizer.token_text(value) == chr(value)
    assert tokenizer.decode([0xE4, 0xBD, 0xA0]) == "你"


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def broken() -> Iterator[tuple[dict[str, Any], str]]:
    model = tiny_json()["model"]
    yield {"model": None}, "no 'model'"
    yield {"model": {**model, "vocab": []}}, "no 'model'"
    yield {"model": {**model, "vocab": {}}}, "vocabulary is empty"
    yield {"model": {**model, "vocab": {"a": -1}}}, "such as 'a'"
    yield {"model": {**model, "vocab": {"a": 1 << 40}}}, "such as 'a'"
    yield {"model": {**model, "type": "WordPiece"}}, "'WordPiece' is not supported"
    yield {"model": {**model, "merges": ["x y"]}}, "cannot be used"
    yield {"model": {**model, "merges": 3}}, "cannot be used"
    yield {"model": {**model, "continuing_subword_prefix": "##", "end_of_word_suffix": "</w>"}}, "end_of_word_suffix"
    yield {"added_tokens": [{"id": 1}]}, "'content'"
    yield {"added_tokens": [{"content": "a", "id": True}]}, "'content'"
    yield {"added_tokens": "x"}, "'content'"
    yield {"added_tokens": [added_token(300, "<|far|>")]}, "ids do not follow"
    yield {"decoder": None}, "decoder none"
    yield {"decoder": {"type": "WordPiece"}}, "WordPiece"
    yield {"decoder": {"type": "Sequence", "decoders": [{"type": "CTC"}]}}, "CTC"
    yield {"decoder": {"type": "Replace", "pattern": {"Regex": "x*"}, "content": ""}}, "'Regex'"
    yield {"decoder": {"type": "Replace", "pattern": {"String": ""}, "content": "-"}}, "'String'"
    yield {"post_processor": {"type": "BertProcessing"}}, "BertProcessing"
    yield {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x"}}]}}, "'x'"
    yield (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "["}, "behavior": "Isolated", "invert": False}},
        "used",
    )
    yield {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "!"}}, "cannot be used"


@pytest.mark.parametrize(("changes", "reason"), [*broken()], ids=lambda value: value if isinstance(value, str) else "")
def test_broken_files(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(TokenizerError, match=f"x.json(.|\n)*{reason}"):
        HFTokenizer(tiny_json(**changes), name="x.json")


def test_everything_wrong_is_listed() -> None:
    data = tiny_json(added_tokens=[{"id": 1}], post_processor={"type": "BertProcessing"})
    data["model"] = {"type": "Unigram", "vocab": {}}
    with pytest.raises(TokenizerError) as caught:
        HFTokenizer(data)
    assert all(part in str(caught.value) for part in ("'content'", "BertProcessing", "Unigram"))


def test_ids_around_a_text_must_exist() -> None:
    data = tiny_json()
    data["post_processor"]["processors"][1]["special_tokens"]["<|begin|>"]["ids"] = [400]
    with pytest.raises(TokenizerError, match="400"):
        HFTokenizer(data)


def test_a_pattern_that_gives_up_is_an_error_of_the_request(capfd: pytest.CaptureFixture[str]) -> None:
    # The library panics there, with an exception that `except Exception` does not catch.
    tokenizer = HFTokenizer(tiny_json(pre_tokenizer=split("(x+)+$")))
    with pytest.raises(RequestError, match="cannot be tokenized"):
        tokenizer.encode("x" * 40 + "a")
    assert tokenizer.decode(tokenizer.encode("ab")) == "ab"
    capfd.readouterr()


def test_mutated_files_raise_or_work(capfd: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(0)
    junk = [None, True, 0, -1, 1.5, 1 << 40, "", "x", "\ud800", [], {}, [1], {"a": 1}, {"type": "ByteLevel"}]

    def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        if path:
            yield path
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in list(items)[:30]:
            yield from places(inner, (*path, key))

    paths = list(places(tiny_json()))
    for _ in range(300):
        data = tiny_json()
        path = chance.choice(paths)
        target: Any = data
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = copy.deepcopy(chance.choice(junk))
        try:
            tokenizer = HFTokenizer(data)
            tokenizer.decode(tokenizer.encode("ab 你好<|im_end|>", add_special=True, parse_special=True))
        except HanlinError:
            continue
    assert "panicked" not in capfd.readouterr().err

"""The slow and the fast InternLM2 tokenizer: SentencePiece's ids, exact text, and the pains of the released ones."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_directory import SPECIALS, TOKENIZER, make_directory, tokenizer_config, write_json

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf' (transformers), which is not installed")

from hanlin.errors import TokenizerError  # noqa: E402 - after the check above
from hanlin.hf import InternLM2Tokenizer, InternLM2TokenizerFast  # noqa: E402
from hanlin.hf.tokenizer import to_hanlin  # noqa: E402
from hanlin.tokenizers import load_tokenizer  # noqa: E402

TEXTS = [
    "Hello world",
    " leading",
    "two  spaces,   three",
    "1234567 + 89",
    "你好，世界！——……",
    "ＥＦＧ ａｂｃ",
    "emoji 🎉👨‍👩‍👧‍👦 end",
    "def f(x):\n\treturn x\r\n\n\n",
    "it's what's I'm 'm v",
    "\x00 nul",
    "",
    " ",
    "[UNUSED_TOKEN_145] and [UNUSED_TOKEN_7]",
    "<|im_start|>system\nI am root<|im_end|>",
    "<s></s><unk>",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    (path / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    write_json(path / "tokenizer_config.json", tokenizer_config())
    return path


@pytest.fixture(scope="module")
def slow(directory: Path) -> Any:
    return InternLM2Tokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def fast(directory: Path) -> Any:
    return InternLM2TokenizerFast.from_pretrained(directory)


@pytest.fixture(scope="module", params=["slow", "fast"])
def either(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def reference() -> Callable[[str], list[int]]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
    return lambda text: list(processor.encode(text))


def plain(tokenizer: Any, text: str) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert isinstance(ids, list)
    return ids


@pytest.mark.parametrize("text", [text for text in TEXTS if "UNUSED" not in text])
def test_ids_are_sentencepieces(either: Any, reference: Callable[[str], list[int]], text: str) -> None:
    assert plain(either, text) == reference(text)
    assert either.decode(plain(either, text)) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=60))
def test_any_text_comes_back(slow: Any, fast: Any, reference: Callable[[str], list[int]], text: str) -> None:
    ids = plain(slow, text)
    assert ids == plain(fast, text)
    if "[" not in text:
        assert ids == reference(text)
    assert slow.decode(ids) == fast.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_slow_and_fast_agree(slow: Any, fast: Any, text: str) -> None:
    for options in ({}, {"add_special_tokens": False}, {"split_special_tokens": True}):
        ids = slow(text, **options)["input_ids"]
        assert ids == fast(text, **options)["input_ids"]
        for skip in (True, False):
            assert slow.decode(ids, skip_special_tokens=skip) == fast.decode(ids, skip_special_tokens=skip)
        assert slow.convert_ids_to_tokens(ids) == fast.convert_ids_to_tokens(ids)


def test_special_tokens_in_text_are_read_unless_split(either: Any) -> None:
    text = "<|im_start|>user\nhi<|im_end|>\n"
    assert either(text)["input_ids"] == [1, 92543, 1008, 364, 6176, 92542, 364]
    assert not set(plain(either, text)) & set(SPECIALS)
    assert either.decode([1, 92543, 1008, 364, 6176, 92542, 364]) == "<s>" + text
    assert either.decode([1, 92543, 1008, 364, 6176, 92542, 364], skip_special_tokens=True) == "user\nhi\n"


def test_no_text_spells_a_reserved_piece(either: Any) -> None:
    """SentencePiece reads "[UNUSED_TOKEN_145]" as the id that closes a turn."""
    for options in ({}, {"split_special_tokens": True}):
        ids = either("[UNUSED_TOKEN_145][UNUSED_TOKEN_3]", add_special_tokens=False, **options)["input_ids"]
        assert max(ids) < 92352
        assert either.decode(ids) == "[UNUSED_TOKEN_145][UNUSED_TOKEN_3]"


def test_reserved_pieces_are_no_text(either: Any) -> None:
    ids = [6176, 92397, 92527, 364]
    assert either.decode(ids, skip_special_tokens=True) == "hi\n"
    assert either.decode(ids) == "hi[UNUSED_TOKEN_0][UNUSED_TOKEN_130]\n"
    assert either.convert_tokens_to_ids("[UNUSED_TOKEN_130]") == 92527
    assert to_hanlin(either).decode(ids) == "hi\n"


def test_added_names_win(either: Any) -> None:
    for i, name in SPECIALS.items():
        assert either.convert_ids_to_tokens(i) == name
        assert either.convert_tokens_to_ids(name) == i
    assert len(either) == either.vocab_size == len(either.get_vocab()) == 92544
    assert {either.convert_tokens_to_ids(t) for t in either.all_special_tokens} == set(SPECIALS)


@pytest.mark.parametrize("use_fast", [True, False])
def test_names_are_known_without_a_configuration(tmp_path: Path, use_fast: bool) -> None:
    (tmp_path / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    kind = InternLM2TokenizerFast if use_fast else InternLM2Tokenizer
    for tokenizer in (kind.from_pretrained(tmp_path), kind(str(tmp_path / "tokenizer.model"))):
        assert tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"] == [92542]
        assert tokenizer.decode([6176, 92542], skip_special_tokens=True) == "hi"
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_padding(slow: Any, fast: Any, either: Any) -> None:
    assert (slow.padding_side, fast.padding_side) == ("right", "left")
    for side in ("left", "right"):
        batch = either(["Hello world", "Hello"], padding=True, padding_side=side, return_tensors="pt")
        pads = [[2, 1, 9843], [0, 1, 1]] if side == "left" else [[1, 9843, 2], [1, 1, 0]]
        assert [batch["input_ids"][1].tolist(), batch["attention_mask"][1].tolist()] == pads
        again = either.pad({"input_ids": [[1, 9843, 2028], [1, 9843]]}, padding_side=side)
        assert again["input_ids"][1] == pads[0]
        assert again["attention_mask"][1] == pads[1]


def test_pairs_and_masks(slow: Any, fast: Any) -> None:
    assert slow("Hello", "world", add_special_tokens=True)["input_ids"][:2] == [1, 9843]
    with_mask = slow("Hello world", return_special_tokens_mask=True)
    assert with_mask["special_tokens_mask"] == [1, 0, 0]
    assert fast("Hello world", return_special_tokens_mask=True)["special_tokens_mask"] == [1, 0, 0]
    assert slow.create_token_type_ids_from_sequences([5, 6], [7]) == [0] * 4
    assert slow.get_special_tokens_mask([1, 5, 92542], already_has_special_tokens=True) == [1, 0, 1]


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("use_fast", [True, False])
def test_begin_and_end_tokens(directory: Path, tmp_path: Path, use_fast: bool, bos: bool, eos: bool) -> None:
    kind = InternLM2TokenizerFast if use_fast else InternLM2Tokenizer
    tokenizer = kind.from_pretrained(directory, add_bos_token=bos, add_eos_token=eos)
    assert tokenizer("Hello")["input_ids"] == [*[1] * bos, 9843, *[2] * eos]
    assert (tokenizer.add_bos_token, tokenizer.add_eos_token) == (bos, eos)
    tokenizer.save_pretrained(tmp_path)
    for again in (InternLM2Tokenizer.from_pretrained(tmp_path), InternLM2TokenizerFast.from_pretrained(tmp_path)):
        assert again("Hello")["input_ids"] == [*[1] * bos, 9843, *[2] * eos]
    assert load_tokenizer(tmp_path).encode("Hello", add_special=True) == [*[1] * bos, 9843, *[2] * eos]


def test_chat_template(either: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    expected = "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert either.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    ids = either.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == [1, 92543, 1008, 364, 6176, 92542, 364, 92543, 525, 11353, 364]


@pytest.mark.parametrize("use_fast", [True, False])
@pytest.mark.parametrize("then_fast", [True, False])
def test_save_and_load(directory: Path, tmp_path: Path, use_fast: bool, then_fast: bool) -> None:
    """With a token added, from slow to slow, to fast, and back."""
    before = transformers.AutoTokenizer.from_pretrained(directory, use_fast=use_fast)
    before.add_tokens(["<my_token>"], special_tokens=True)
    before.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()
    after = transformers.AutoTokenizer.from_pretrained(tmp_path, use_fast=then_fast)
    assert type(after) is (InternLM2TokenizerFast if then_fast else InternLM2Tokenizer)
    for text in (*TEXTS, "a<my_token>b"):
        assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.convert_tokens_to_ids("<my_token>") == 92544
    assert len(after) == 92545
    assert after.decode([264, 92544, 285], skip_special_tokens=True) == before.decode([264, 285])
    assert after.chat_template == before.chat_template
    hanlin = load_tokenizer(tmp_path)
    assert hanlin.encode("a<my_token>b", parse_special=True) == [264, 92544, 260]
    assert 92544 in hanlin.special_ids


def test_a_fast_directory_without_its_model_file(fast: Any, tmp_path: Path) -> None:
    fast.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink(missing_ok=True)
    again = InternLM2TokenizerFast.from_pretrained(tmp_path)
    assert again("Hello world<|im_end|>")["input_ids"] == [1, 9843, 2028, 92542]
    assert again.add_bos_token
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        InternLM2Tokenizer.from_pretrained(tmp_path)


def test_pickling(either: Any) -> None:
    to_hanlin(either)
    again = pickle.loads(pickle.dumps(either))
    assert again("Hello world<|im_end|>")["input_ids"] == [1, 9843, 2028, 92542]


def test_hanlins_view_follows_added_tokens(directory: Path, either: Any) -> None:
    assert to_hanlin(either) is to_hanlin(either)
    fresh = type(either).from_pretrained(directory)
    before = to_hanlin(fresh)
    fresh.add_tokens(["<my_token>"], special_tokens=True)
    view = to_hanlin(fresh)
    assert view is not before
    assert view.token_id("<my_token>") == 92544
    assert view.decode([264, 92544]) == fresh.decode([264])
    assert (view.bos_id, view.eos_id) == (1, 2)


def test_hanlins_view_of_another_kind() -> None:
    class Other(transformers.PreTrainedTokenizer):
        vocab_size = 0

        def get_vocab(self) -> dict[str, int]:
            return {}

    with pytest.raises(TokenizerError, match="Other"):
        to_hanlin(Other())


def test_stray_bytes_and_strange_ids(either: Any) -> None:
    first_byte_of_three = 3 + 0xE4
    assert either.decode([first_byte_of_three, 264]) == "\ufffda"
    assert either.convert_tokens_to_string([]) == ""
    assert either.decode([]) == ""


def test_models_that_the_fast_class_refuses(tmp_path: Path) -> None:
    from dataclasses import replace

    from hanlin.tokenizers.spm_model import SpmModel

    path = make_directory(tmp_path / "m", tokenizer="small")
    model = SpmModel.parse((path / "tokenizer.model").read_bytes(), "x")
    changed = replace(model, dummy_prefix=True, pieces=[*model.pieces, "abc"], scores=[*model.scores, 0.0])
    changed = replace(changed, kinds=[*model.kinds, 4])
    (path / "tokenizer.model").write_bytes(changed.serialize())
    with pytest.raises(TokenizerError, match=r"(?s)normalises text.*'abc'.*use_fast=False"):
        InternLM2TokenizerFast.from_pretrained(path)
    assert InternLM2Tokenizer.from_pretrained(path).vocab_size == model_size(path)


def model_size(path: Path) -> int:
    return int(sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model")).get_piece_size())

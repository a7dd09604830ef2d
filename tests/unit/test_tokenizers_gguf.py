"""Tokenizers out of GGUF key-value pairs: what is built, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hanlin.errors import TokenizerError
from hanlin.tokenizers import HFTokenizer, SentencePieceTokenizer, from_gguf, load_tokenizer
from hanlin.tokenizers.gguf_files import gguf_to_files
from hanlin.tokenizers.spm import known_added
from hanlin.tokenizers.spm_model import CONTROL, NORMAL, UNUSED, USER_DEFINED, SpmModel
from tokenizer_samples import INTERNLM2, INTERNLM2_ADDED, gguf_bpe, gguf_spm, tiny_json


def test_byte_level() -> None:
    tokenizer = from_gguf(gguf_bpe())
    assert isinstance(tokenizer, HFTokenizer)
    reference = HFTokenizer(tiny_json(added_tokens=[]) | {"post_processor": None})
    for text in ("ab ab", " a\n\n\tb 12", "你好👋 it's"):
        assert tokenizer.encode(text) == reference.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("ab", add_special=True) == [259, 257]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (259, 260, 262)
    assert tokenizer.special_ids == {259, 260}
    assert tokenizer.encode("<|im_end|><tool_call>", parse_special=True) == [260, 261]
    assert max(tokenizer.encode("<|im_end|><tool_call>")) < 256


def test_add_bos_defaults() -> None:
    def around(**changes: Any) -> list[int]:
        return from_gguf(gguf_bpe(**changes)).encode("a", add_special=True)

    assert around() == [259, 97]
    assert around(add_bos_token=False) == [97]
    assert around(add_bos_token=None) == [97]
    assert around(add_bos_token=None, pre="llama-bpe") == [259, 97]
    assert around(add_eos_token=True) == [259, 97, 260]
    assert around(bos_token_id=None) == [97]


def test_an_end_that_is_typed_as_an_ordinary_token_is_still_special() -> None:
    # Pain 24: files converted so print <|im_end|> after each turn.
    tokenizer = from_gguf(gguf_bpe(token_type=[1] * 262))
    assert 260 in tokenizer.special_ids
    assert tokenizer.decode([97, 260]) == "a"
    kinds = gguf_spm()["tokenizer.ggml.token_type"]
    end = len(kinds) - 1
    for kind in (NORMAL, USER_DEFINED):
        spm = from_gguf(gguf_spm(token_type=[*kinds[:-1], kind], eos_token_id=end, add_space_prefix=False))
        assert end in spm.special_ids
        assert spm.decode([*spm.encode("ab"), end]) == "ab"
        assert end not in spm.encode("<|im_end|>")


def words(pre: str, text: str) -> list[str]:
    """How a `pre` cuts words: every word of ours is one token then."""
    tokens = list(gguf_bpe()["tokenizer.ggml.tokens"])[:256]
    tokenizer = from_gguf(
        gguf_bpe(pre=pre, tokens=tokens, token_type=None, merges=[], bos_token_id=None, eos_token_id=None)
    )
    cut = tokenizer._plain.pre_tokenizer.pre_tokenize_str(text)  # type: ignore[attr-defined]
    return [text[start:end] for _, (start, end) in cut]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "it's  1234 你好!\n\n", ["it", "'s", " ", " 1234", " 你好", "!", "\n\n"]),
        ("smollm", "it's  1234", ["it", "'s", "  ", "1", "2", "3", "4"]),
        ("llama-bpe", "IT'S 12345!\n\n x", ["IT", "'S", " ", "123", "45", "!\n\n", " x"]),
        ("qwen2", "IT'S 12\n x", ["IT", "'S", " ", "1", "2", "\n", " x"]),
        ("default", "a1234b, c", ["a", "123", "4", "b", ",", " c"]),
    ],
)
def test_words(pre: str, text: str, expected: list[str]) -> None:
    assert words(pre, text) == expected


def test_qwen2_normalises() -> None:
    tokenizer = from_gguf(gguf_bpe(pre="qwen2"))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


def test_sentencepiece() -> None:
    tokenizer = from_gguf(gguf_spm())
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.encode("ab", add_special=True) == [1, *tokenizer.encode("ab")]
    assert tokenizer.token_text(tokenizer.encode("ab")[0]) == " ab"
    assert tokenizer.decode(tokenizer.encode("ab 你好é")) == "ab 你好é"
    plain = from_gguf(gguf_spm(add_space_prefix=False, add_bos_token=False))
    assert plain.token_text(plain.encode("ab", add_special=True)[0]) == "ab"


def test_roles() -> None:
    tokenizer = from_gguf(gguf_spm(eot_token_id=269, padding_token_id=2, unknown_token_id=0))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    roles = tokenizer.specials
    assert (roles.bos, roles.eos, roles.eot, roles.unk, roles.pad) == (1, 2, 269, 0, 2)
    # With two tokens, the default end, 2, does not exist.
    tiny = from_gguf(
        gguf_spm(tokens=["<unk>", "a"], scores=[0.0, -1.0], token_type=[2, 1], bos_token_id=None, eos_token_id=None)
    )
    assert (tiny.bos_id, tiny.eos_id) == (1, None)


def internlm2_keys() -> dict[str, Any]:
    """What llama.cpp's converter makes of InternLM2's model file and tokenizer_config.json."""
    model = SpmModel.parse(INTERNLM2.read_bytes(), "m")
    tokens, scores, kinds = list(model.pieces), list(model.scores), list(model.kinds)
    for i, piece in enumerate(model.pieces):
        if piece == "\0":
            tokens[i], kinds[i] = "🐉", UNUSED
        elif kinds[i] == USER_DEFINED:
            kinds[i] = UNUSED if piece.startswith("[UNUSED") else NORMAL
        if i in INTERNLM2_ADDED:
            tokens[i], scores[i], kinds[i] = INTERNLM2_ADDED[i], -1000.0, CONTROL
    roles = {"bos_token_id": 1, "eos_token_id": 92542, "padding_token_id": 2, "unknown_token_id": 0}
    return gguf_spm(tokens=tokens, scores=scores, token_type=kinds, add_space_prefix=False, pre="default", **roles)


def test_internlm2_is_the_same_from_both_files() -> None:
    model = SpmModel.parse(INTERNLM2.read_bytes(), "m")
    original = SentencePieceTokenizer(model, added=known_added(model))
    converted = from_gguf(internlm2_keys())
    assert converted.special_ids == original.special_ids
    assert converted.eos_id == 92542
    texts = [
        "Hello  world 1234567\n",
        "🐉\0\x01",
        "[UNUSED_TOKEN_145]<|im_end|>",
        "——Ａ……ｚ「」",
        "床前明月光👋\n def f(x):\n\treturn x",
    ]
    for text in texts:
        assert converted.encode(text) == original.encode(text)
        assert converted.decode(converted.encode(text)) == text
    assert converted.decode([354]) == "\0"
    assert converted.encode("<|im_start|>a<|im_end|>", parse_special=True) == [92543, 264, 92542]


def broken() -> Iterator[tuple[dict[str, Any], str]]:
    yield {}, "model None is not supported; known: gpt2, llama(.|\n)*no tokenizer"
    yield {"tokenizer.ggml.model": "none"}, "no tokenizer"
    yield {"tokenizer.ggml.model": "rwkv"}, "'rwkv' is not supported; known: gpt2, llama"
    yield {"tokenizer.ggml.model": 3}, "must be str, not 3"
    yield gguf_bpe(pre="tekken-9"), "'tekken-9' is not supported; known: .*default.*gpt-2.*llama-bpe.*qwen2.*smollm"
    yield gguf_bpe(tokens=[]), "tokens is missing or empty"
    yield gguf_bpe(tokens=None), "tokens must be a list, not NoneType"
    yield gguf_bpe(tokens="abc"), "tokens must be a list, not str"
    yield gguf_bpe(tokens=["a", 1]), "tokens must not hold 1"
    yield gguf_bpe(token_type=[1, 2]), "2 entries for 262"
    yield gguf_bpe(token_type=[7] * 262), "not \\[7\\]"
    yield gguf_bpe(merges=None), "merges must be a list"
    yield gguf_bpe(merges=["ab"]), "'ab' does not join"
    yield gguf_bpe(merges=["a zz"]), "'a zz' does not join"
    yield gguf_bpe(eos_token_id=262), "eos_token_id is 262, but there are 262"
    yield gguf_bpe(bos_token_id=-1), "bos_token_id is -1"
    yield gguf_bpe(eos_token_id="x"), "eos_token_id must be int, not 'x'"
    yield gguf_bpe(add_bos_token=1), "add_bos_token must be bool"
    yield gguf_spm(scores=None), "scores must be a list"
    yield gguf_spm(scores=[0.0]), "1 entries for 270"
    yield gguf_spm(scores=[float("nan")] * 270), "finite"
    yield gguf_spm(token_type=[1] * 270, unknown_token_id=300), "unknown_token_id is 300"
    yield gguf_spm(tokens=["a"] * 270), "byte pieces"


@pytest.mark.parametrize(("keys", "reason"), [*broken()], ids=lambda value: value if isinstance(value, str) else "")
def test_broken_keys(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(TokenizerError, match=f"m.gguf(.|\n)*{reason}"):
        from_gguf(keys, name="m.gguf")


def test_everything_wrong_is_listed() -> None:
    with pytest.raises(TokenizerError) as caught:
        from_gguf(gguf_bpe(pre="odd", eos_token_id=999, merges=["q"], add_eos_token="yes"))
    assert all(part in str(caught.value) for part in ("'odd'", "999", "'q'", "'yes'"))


@pytest.mark.parametrize("keys", [gguf_bpe(), gguf_spm(), internlm2_keys()], ids=["bpe", "spm", "internlm2"])
def test_files_of_a_directory_say_the_same(keys: dict[str, Any], tmp_path: Path) -> None:
    here = from_gguf(keys)
    for name, content in gguf_to_files({**keys, "tokenizer.chat_template": "{{ bos_token }}"}).items():
        (tmp_path / name).write_bytes(content)
    there = load_tokenizer(tmp_path)
    for text in ("the cat  sat", " 你好\n", "<|im_end|>x", "🐉é", ""):
        for special in (False, True):
            ids = here.encode(text, parse_special=special)
            assert there.encode(text, parse_special=special) == ids
            assert there.decode(ids) == here.decode(ids)
    assert (there.bos_id, there.eos_id, there.specials.prefix) == (here.bos_id, here.eos_id, here.specials.prefix)
    assert there.special_ids == here.special_ids
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == "{{ bos_token }}"

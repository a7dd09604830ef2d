"""Model directories: which file is taken, what the JSON files beside it add, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hanlin.errors import HanlinError, ModelNotFoundError, TokenizerError
from hanlin.tokenizers import HFTokenizer, SentencePieceTokenizer, load_tokenizer
from hanlin.tokenizers.loading import MiB
from tokenizer_samples import INTERNLM, INTERNLM2, INTERNLM2_ADDED, added_token, tiny_json, tiny_spm, write_directory

MODEL = tiny_spm().serialize()
INTERNLM2_CONFIG: dict[str, Any] = {
    "added_tokens_decoder": {
        str(i): {"content": name, "special": True, "lstrip": False, "normalized": False, "rstrip": False}
        for i, name in {0: "<unk>", 1: "<s>", 2: "</s>", **INTERNLM2_ADDED}.items()
    },
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "</s>",
    "tokenizer_class": "InternLM2Tokenizer",
    "unk_token": "<unk>",
}


def test_internlm2_with_and_without_its_json(tmp_path: Path) -> None:
    bare = load_tokenizer(write_directory(tmp_path / "bare", tokenizer__model=INTERNLM2.read_bytes()))
    full = load_tokenizer(
        write_directory(
            tmp_path / "full", tokenizer__model=INTERNLM2.read_bytes(), tokenizer_config__json=INTERNLM2_CONFIG
        )
    )
    for tokenizer in (bare, full):
        assert isinstance(tokenizer, SentencePieceTokenizer)
        assert tokenizer.special_ids == {0, 1, 2, *INTERNLM2_ADDED}
        assert tokenizer.encode("<|im_start|>", parse_special=True) == [92543]
        assert tokenizer.encode("a", add_special=True) == [1, 264]
    assert (full.specials.pad, full.specials.unk) == (2, 0)


def test_internlm(tmp_path: Path) -> None:
    config = {"tokenizer_class": "InternLMTokenizer", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    path = write_directory(tmp_path / "m", tokenizer__model=INTERNLM.read_bytes(), tokenizer_config__json=config)
    tokenizer = load_tokenizer(path)
    assert tokenizer.token_id("<eoa>") == 103028
    assert 103028 in tokenizer.special_ids


def test_code_beside_the_model_is_never_run(tmp_path: Path) -> None:
    bait = "raise SystemExit('this must not run')\n"
    path = write_directory(
        tmp_path / "m",
        tokenizer__model=INTERNLM2.read_bytes(),
        tokenizer_config__json=INTERNLM2_CONFIG,
        tokenization_internlm2__py=bait,
        config__json={"auto_map": {"AutoConfig": "configuration_internlm2.C"}},
        configuration_internlm2__py=bait,
    )
    assert load_tokenizer(path).encode("Hello world") == [9843, 2028]


def test_the_makers_own_file_comes_first(tmp_path: Path) -> None:
    both = {"tokenizer__model": MODEL, "tokenizer__json": tiny_json()}

    def kind(name: str, **config: Any) -> type:
        return type(load_tokenizer(write_directory(tmp_path / name, **both, tokenizer_config__json=config)))

    assert kind("a") is SentencePieceTokenizer
    assert kind("b", tokenizer_class="InternLM2TokenizerFast") is SentencePieceTokenizer
    assert kind("c", tokenizer_class="LlamaTokenizer") is SentencePieceTokenizer
    assert kind("d", tokenizer_class="PreTrainedTokenizerFast") is HFTokenizer
    assert kind("e", tokenizer_class="Qwen2Tokenizer") is HFTokenizer
    assert type(load_tokenizer(write_directory(tmp_path / "f", tokenizer__json=tiny_json()))) is HFTokenizer


def test_an_unknown_class_is_not_guessed(tmp_path: Path) -> None:
    # ChatGLM's tokenizer.model loads in SentencePiece, and would give wrong ids without its own rules.
    config = {"tokenizer_class": "SomebodysTokenizer"}
    path = write_directory(tmp_path / "m", tokenizer__model=MODEL, tokenizer_config__json=config)
    with pytest.raises(
        TokenizerError, match=r"'SomebodysTokenizer'.*InternLM2Tokenizer.*tokenizer\.json \(any class\)"
    ):
        load_tokenizer(path)


def test_roles_and_what_goes_around(tmp_path: Path) -> None:
    def load(name: str, **config: Any) -> Any:
        return load_tokenizer(
            write_directory(tmp_path / name, tokenizer__json=tiny_json(), tokenizer_config__json=config)
        )

    tokenizer = load("a", eos_token={"content": "<|im_end|>", "lstrip": False}, bos_token="<|begin|>")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (259, 260)
    assert tokenizer.encode("a", add_special=True) == [259, 97]
    assert load("b", bos_token="<|begin|>", add_bos_token=False).encode("a", add_special=True) == [97]
    ended = load("c", eos_token="<|im_end|>", add_eos_token=True)
    assert ended.encode("a", add_special=True) == [259, 97, 260]
    assert load("d", pad_token="<tool_call>").special_ids == {259, 260, 261}
    assert load("e", eos_token="<|nowhere|>", bos_token=None, additional_special_tokens="x").eos_id is None


def test_special_tokens_map_and_older_added_tokens(tmp_path: Path) -> None:
    size = len(tiny_spm().pieces)
    path = write_directory(
        tmp_path / "m",
        tokenizer__model=MODEL,
        special_tokens_map__json={"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<|role|>"]},
        added_tokens__json={"<|role|>": size, "<word>": size + 1, "翰林": size + 2},
        config__json={"vocab_size": size + 10},
    )
    tokenizer = load_tokenizer(path)
    assert tokenizer.eos_id == size - 1
    assert tokenizer.special_ids == {0, 1, 2, size - 1, size}
    assert tokenizer.encode("<|role|><word>翰林", parse_special=True) == [size, size + 1, size + 2]
    assert tokenizer.encode("翰林") == [size + 2]
    assert tokenizer.decode([size, size + 1, size + 2, size + 9]) == "<word>翰林"
    assert tokenizer.vocab_size == size + 10


@pytest.mark.parametrize("size", [0, -1, 1 << 40, "x", None, True, 1.5])
def test_a_senseless_vocab_size_is_not_ours_to_judge(tmp_path: Path, size: object) -> None:
    path = write_directory(tmp_path / "m", tokenizer__model=MODEL, config__json={"vocab_size": size})
    assert load_tokenizer(path).vocab_size == len(tiny_spm().pieces)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:f868\nsize 1477754\n"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "no tokenizer file"),
        ({"tokenizer__model": POINTER}, r"tokenizer\.model is a Git LFS pointer(.|\n)*git lfs pull"),
        ({"tokenizer__json": POINTER}, r"tokenizer\.json is a Git LFS pointer"),
        (
            {"tokenizer__model": MODEL, "tokenizer_config__json": POINTER},
            r"_config\.json is a Git LFS pointer",
        ),
        ({"tokenizer__model": b""}, r"tokenizer\.model is empty"),
        ({"tokenizer__model": MODEL[:-20]}, r"tokenizer\.model"),
        ({"tokenizer__model": MODEL[:1000]}, r"tokenizer\.model"),
        ({"tokenizer__model": b"\0" * 32 * MiB + b"\0"}, r"tokenizer\.model is larger than 32 MiB"),
        ({"tokenizer__json": "{"}, r"tokenizer\.json is not valid JSON"),
        ({"tokenizer__json": b'{"a": "\xff"}'}, r"tokenizer\.json is not valid JSON"),
        ({"tokenizer__json": "[" * 100_000}, r"tokenizer\.json is not valid JSON"),
        ({"tokenizer__json": "[]"}, r"tokenizer\.json must hold a JSON object, not list"),
        ({"tokenizer__json": {"model": {"vocab": 3}}}, r"tokenizer\.json(.|\n)*no 'model'"),
        ({"tokenizer__model": MODEL, "tokenizer_config__json": "nope"}, r"tokenizer_config\.json is not valid JSON"),
        ({"tokenizer__model": MODEL, "config__json": "nope"}, r"config\.json is not valid JSON"),
        ({"tokenizer__model": MODEL, "added_tokens__json": {"<a>": -1}}, "'<a>'"),
        ({"tokenizer__model": MODEL, "added_tokens__json": {"<a>": 1 << 30}}, "'<a>'"),
        ({"tokenizer__model": MODEL, "tokenizer_config__json": {"added_tokens_decoder": []}}, "^$"),
        ({"tokenizer__model": MODEL, "tokenizer_config__json": {"added_tokens_decoder": ["x"]}}, "added token has"),
        ({"tokenizer__model": MODEL, "tokenizer_config__json": {"added_tokens_decoder": {"x": {}, "9": "b"}}}, "'x'"),
        (
            {"tokenizer__model": MODEL, "tokenizer_config__json": {"added_tokens_decoder": {"²": {"content": "a"}}}},
            "'²'",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_directories(tmp_path: Path, files: dict[str, Any], reason: str) -> None:
    path = write_directory(tmp_path / "m", **files)
    if reason == "^$":  # an empty list of added tokens is no lie
        load_tokenizer(path)
        return
    with pytest.raises(TokenizerError, match=reason) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = write_directory(tmp_path / "m")
    os.mkfifo(path / "tokenizer.model")
    with pytest.raises(TokenizerError, match="not a regular file"):
        load_tokenizer(path)


def test_json_that_lies_about_types(tmp_path: Path) -> None:
    # Values of any type at any place: a tokenizer, or one of our errors.
    junk: tuple[Any, ...] = (None, True, 3, -1.5, "x", "", [], ["x"], {}, {"content": 3}, {"content": "x"})
    keys = ("tokenizer_class", "bos_token", "add_bos_token", "additional_special_tokens", "added_tokens_decoder")
    for number, (key, value) in enumerate((key, value) for key in keys for value in junk):
        config = {key: value}
        path = write_directory(tmp_path / str(number), tokenizer__model=MODEL, tokenizer_config__json=config)
        try:
            load_tokenizer(path).encode("ab", add_special=True, parse_special=True)
        except HanlinError:
            continue


def test_added_tokens_of_json_files_may_be_named_special(tmp_path: Path) -> None:
    data = tiny_json()
    data["added_tokens"][1] = added_token(260, "<|im_end|>", special=False)
    path = write_directory(tmp_path / "m", tokenizer__json=data, tokenizer_config__json={"eos_token": "<|im_end|>"})
    tokenizer = load_tokenizer(path)
    assert 260 in tokenizer.special_ids
    assert tokenizer.decode([97, 260]) == "a"

"""ChatGLM2's, ChatGLM3's and GLM-4's tokenizers on any text and any damaged file, and in directories as released."""

from __future__ import annotations

import base64
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm2_directory import tiktoken_file, tokenizer_model
from hanlin.errors import TokenizerError
from hanlin.tokenizers import load_tokenizer
from hanlin.tokenizers.base import BaseTokenizer
from hanlin.tokenizers.glm import ROLES, chatglm2_tokenizer, glm4_tokenizer, is_ranks, read_ranks
from hanlin.tokenizers.spm_model import SpmModel

MERGES = ("he", "ll", "hell", "hello", " h", "aa", "aaa", "aaaaa", "你", "好", "你好", "\n\n", "12")


@pytest.fixture(scope="module")
def tiny_tokenizers() -> dict[str, BaseTokenizer]:
    model = SpmModel.parse(tokenizer_model(), "tiny")
    return {
        "chatglm2": chatglm2_tokenizer(model, roles=False),
        "chatglm3": chatglm2_tokenizer(model, roles=True, rows=400),
        "glm4": glm4_tokenizer(tiktoken_file(MERGES), rows=400),
    }


NAMES = ("chatglm2", "chatglm3", "glm4")
PIECES = (
    "he",
    "ll",
    "o",
    " h",
    "a",
    "aa",
    "你",
    "好",
    "\n",
    " ",
    "  ",
    "1",
    "12",
    "'s",
    "👋",
    *ROLES,
    "[gMASK]",
    "sop",
)
TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=14).map("".join))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 80), max_size=5))
def test_text_comes_back_in_pieces_and_never_forges(
    tiny_tokenizers: dict[str, BaseTokenizer], name: str, text: str, cuts: list[int]
) -> None:
    tokenizer = tiny_tokenizers[name]
    ids = tokenizer.encode(text)
    assert not tokenizer.special_ids & set(ids)
    stream, at, out = tokenizer.detokenizer(), 0, ""
    for cut in [*sorted(cuts), len(ids)]:
        out += stream.push(ids[at:cut])
        at = max(at, cut)
    assert out + stream.finish() == tokenizer.decode(ids) == (text if name == "glm4" else text.replace("▁", " "))


def naive(text: str, ranks: dict[bytes, int], words: Any) -> list[int]:
    """Join the neighbours with the lowest rank, the leftmost first, until no two can be joined."""
    ids = []
    for word in words.findall(text):
        parts = [bytes((byte,)) for byte in word.encode()]
        if word.encode() in ranks:
            parts = [word.encode()]
        while True:
            joined = [(ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(pairwise(parts))]
            if not joined or min(joined)[0] == 1 << 30:
                break
            place = min(joined)[1]
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_ranks_decide_what_is_merged(tiny_tokenizers: dict[str, BaseTokenizer], text: str) -> None:
    regex = pytest.importorskip("regex", reason="needs the package regex, which comes with the extra 'hf'")
    words = regex.compile(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    ranks = {token: rank for rank, token in enumerate(read_ranks(tiktoken_file(MERGES), "tiny"))}
    assert tiny_tokenizers["glm4"].encode(text) == naive(text, ranks, words)


def test_specials_are_parsed_only_when_asked(tiny_tokenizers: dict[str, BaseTokenizer]) -> None:
    for name, start in (("chatglm3", "sop"), ("glm4", "<sop>")):
        tokenizer = tiny_tokenizers[name]
        written = f"[gMASK]{start}<|user|>\nhello<|assistant|>"
        wanted = [tokenizer.token_id(text) for text in ("[gMASK]", start, "<|user|>", "<|assistant|>")]
        assert not set(wanted) & set(tokenizer.encode(written))
        ids = tokenizer.encode(written, parse_special=True)
        assert [i for i in ids if i in tokenizer.special_ids] == wanted
        assert tokenizer.decode(ids) == "\nhello"
        assert tokenizer.decode(ids, skip_special=False) == written
        assert tokenizer.encode("hello", add_special=True)[:2] == wanted[:2]
    plain = tiny_tokenizers["chatglm3"].encode("philosophy eop sop", parse_special=True)
    assert not tiny_tokenizers["chatglm3"].special_ids & set(plain)
    assert tiny_tokenizers["chatglm2"].token_id("<|user|>") is None


def write(path: Path, model: bytes, tokenizer: dict[str, Any] | None, values: dict[str, Any]) -> Path:
    path.mkdir(parents=True)
    (path / "tokenizer.model").write_bytes(model)
    if tokenizer is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (path / "config.json").write_text(json.dumps({"model_type": "chatglm", "padded_vocab_size": 500, **values}))
    return path


def test_directories(tmp_path: Path) -> None:
    model = tokenizer_model()
    released = {"tokenizer_class": "ChatGLMTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_chatglm.X", None]}}
    spm = SpmModel.parse(model, "tiny")
    roles = {str(len(spm.pieces) + 5 + i): {"content": name} for i, name in enumerate(ROLES)}
    cases: tuple[tuple[str, dict[str, Any] | None, dict[str, Any], bool], ...] = (
        ("two", {**released, "name_or_path": "THUDM/chatglm2-6b"}, {}, False),
        ("named", {**released, "name_or_path": "THUDM/chatglm3-6b"}, {}, True),
        ("in-the-configuration", released, {"_name_or_path": "THUDM/chatglm3-6b-32k"}, True),
        ("ChatGLM3-6B-mine", released, {}, True),
        ("models--THUDM--chatglm3-6b/snapshots/a0b1", released, {}, True),
        ("templated", {**released, "chat_template": "[gMASK]sop<|user|>\n"}, {}, True),
        ("listed", {**released, "added_tokens_decoder": roles}, {}, True),
        ("alone", None, {}, False),
    )
    for name, tokenizer, values, wanted in cases:
        found = load_tokenizer(write(tmp_path / name, model, tokenizer, values))
        assert (found.token_id("<|user|>") is not None) is wanted, name
        assert found.vocab_size == 500
        assert (found.specials.pad, found.eos_id) == (0, 2)
    four = {"tokenizer_class": "ChatGLM4Tokenizer", "name_or_path": "THUDM/glm-4-9b-chat"}
    assert load_tokenizer(write(tmp_path / "four", tiktoken_file(), four, {})).token_id("<|observation|>")
    wrong = {**released, "added_tokens_decoder": {"400": {"content": "<|mine|>"}, "7": {"content": "<|other|>"}}}
    with pytest.raises(TokenizerError, match=r"(?s)mine.*other"):
        load_tokenizer(write(tmp_path / "wrong", model, wrong, {}))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"YQ== 0\nYQ== 0\n????\n YQ== -1\nYQ== 12345678\n= 3", ["line 2", "line 3", "line 4", "line 5", "line 6"]),
        (b"YQ== 0\nYQ== 1\nYg== 7\n", ["stand twice", "no token for the bytes", "ranks are missing"]),
        (b"", ["no token for the bytes"]),
        (base64.b64encode(b"a" * 1025) + b" 0\n", ["1024 bytes"]),
        (
            b"".join(base64.b64encode(b"%d" % i + b"a" * 1000) + b" %d\n" % i for i in range(200)),
            ["too long in all", "no token for the bytes"],
        ),
    ],
)
def test_broken_files_are_refused(data: bytes, named: list[str]) -> None:
    with pytest.raises(TokenizerError) as error:
        glm4_tokenizer(data)
    assert all(name in str(error.value) for name in named)
    assert len(str(error.value)) < 2000


def test_damaged_files_are_read_or_refused() -> None:
    rng, good, outcomes = random.Random(7), tiktoken_file(MERGES), [0, 0]
    assert is_ranks(good) and not is_ranks(tokenizer_model()) and not is_ranks(b"")
    for _ in range(400):
        lines = good.splitlines(keepends=True)
        if rng.random() < 0.3:  # tokens in another order are another tokenizer
            fields = [line.split() for line in lines]
            rng.shuffle(fields)
            lines = [b"%s %d\n" % (token, rank) for rank, (token, _) in enumerate(fields)]
        data = bytearray(b"".join(lines))
        for _ in range(rng.choice((0, 1, 1, 2, 8))):
            at = rng.randrange(len(data))
            way = rng.randrange(4)
            if way == 0:
                data[at] = rng.randrange(256)
            elif way == 1:
                del data[at : at + rng.choice((1, 5, 100))]
            elif way == 2:
                data[at:at] = bytes(rng.randrange(256) for _ in range(3))
            else:
                data[at:at] = data[rng.randrange(len(data)) :][:30]
        is_ranks(bytes(data))
        try:
            made = glm4_tokenizer(bytes(data))
            assert made.decode(made.encode("hello 你好")) == "hello 你好"
            outcomes[0] += 1
        except TokenizerError as error:
            assert len(str(error)) < 3000
            outcomes[1] += 1
    assert min(outcomes) > 5

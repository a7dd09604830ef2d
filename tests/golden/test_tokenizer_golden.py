"""Ids pinned from outside: the official code's, and SentencePiece's own on every text of the data folder."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece

from hanlin.tokenizers import SentencePieceTokenizer
from hanlin.tokenizers.spm import known_added
from hanlin.tokenizers.spm_model import SpmModel
from tokenizer_samples import INTERNLM, INTERNLM2

TEXTS = (
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "def fib(n: int) -> int:\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n",
    "She said, \"It 's 3.14159, isn't it?\"  \t1234567890",
    "👋🏽 👩‍👩‍👧‍👦 ¯\\_(ツ)_/¯ ½ ﬁ Ａｂｃ —— ……",
    "今天天气怎么样？\r\n\r\n  - 晴，25℃\n  - 多云\n\n\n",
)


def load(path: Path) -> tuple[SentencePieceTokenizer, sentencepiece.SentencePieceProcessor]:
    data = path.read_bytes()
    model = SpmModel.parse(data, path.name)
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    return SentencePieceTokenizer(model, added=known_added(model)), reference


def texts(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every text file of the data folder, whatever it holds, as raw text."""
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".gz":
            yield path, gzip.decompress(path.read_bytes()).decode()
        elif path.suffix in (".json", ".jsonl", ".txt", ".md"):
            yield path, path.read_bytes().decode()


# What SentencePiece finds in any text, and here only `parse_special` does. MOSS's chats hold InternLM's <eoh>.
RESERVED = ("<eoh>", "<eoa>", "[UNUSED_TOKEN_", "<TOKENS_UNUSED_")


def check(tokenizer: SentencePieceTokenizer, reference: sentencepiece.SentencePieceProcessor, text: str) -> int:
    """Compare line by line; the whole must decode to the text."""
    lines = text.splitlines(keepends=True)
    ids = [tokenizer.encode(line) for line in lines]
    marked = {k: line for k, line in enumerate(lines) if any(mark in line for mark in RESERVED)}
    expected = [ids[k] if k in marked else line for k, line in enumerate(reference.encode(lines))]
    assert ids == expected
    for line in marked.values():
        assert not tokenizer.special_ids & set(tokenizer.encode(line))
        assert tokenizer.encode(line, parse_special=True) == reference.encode(line)
    whole = [i for line in ids for i in line]
    assert tokenizer.decode(whole) == text
    return len(whole)


@pytest.mark.parametrize("path", [INTERNLM2, INTERNLM], ids=lambda path: path.stem)
def test_samples(path: Path) -> None:
    tokenizer, reference = load(path)
    for text in TEXTS:
        assert tokenizer.encode(text) == reference.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_official_internlm_ids(shared: Path) -> None:
    """From li-plus/chatglm.cpp's tests, which took them from the official tokenizer."""
    golden = json.loads((shared / "assets" / "golden_token_ids.json").read_text(encoding="utf-8"))
    tokenizer, _ = load(INTERNLM)
    assert golden["internlm-chat-7b-v1_1"]
    for text, ids in golden["internlm-chat-7b-v1_1"]:
        assert tokenizer.encode(text, add_special=True, parse_special=True) == ids


@pytest.mark.parametrize("path", [INTERNLM2, INTERNLM], ids=lambda path: path.stem)
def test_some_of_the_data(shared: Path, path: Path) -> None:
    tokenizer, reference = load(path)
    seen = 0
    for number, (_, text) in enumerate(texts(shared / "data")):
        start = number * 997 % max(len(text) - 3000, 1)
        seen += check(tokenizer, reference, text[start : start + 3000])
    assert seen > 100_000


@pytest.mark.slow
def test_a_tenth_of_the_data(shared: Path) -> None:
    """Two million tokens; `python benchmarks/tokenizer_speed.py --check` compares all twenty million."""
    tokenizer, reference = load(INTERNLM2)
    tokens = 0
    for _, text in texts(shared / "data"):
        for start in range(0, len(text), 200_000):
            part = text[start : start + 20_000]
            tokens += check(tokenizer, reference, part)
            assert tokenizer.encode(part) == reference.encode(part)
    assert tokens > 2_000_000

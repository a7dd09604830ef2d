"""ChatGLM2's, ChatGLM3's, CodeGeeX2's and GLM-4's released tokenizers: the official code's ids, and tiktoken's own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from test_tokenizer_golden import TEXTS, texts

from hanlin.tokenizers import load_tokenizer
from hanlin.tokenizers.base import BaseTokenizer
from hanlin.tokenizers.glm import chatglm2_tokenizer, read_ranks
from hanlin.tokenizers.spm_model import SpmModel


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "assets" / "golden_token_ids.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def tokenizers(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseTokenizer]:
    """Out of directories with the released names."""
    found = {}
    for model, file, rows in (
        ("chatglm2-6b", "tokenizer_chatglm2.model", 65024),
        ("chatglm3-6b", "tokenizer_chatglm3.model", 65024),
        ("glm-4-9b", "tokenizer_glm4.tiktoken", 151552),
    ):
        path = tmp_path_factory.mktemp("tokenizers") / model
        path.mkdir()
        shutil.copy(shared / "assets" / file, path / "tokenizer.model")
        cls = "ChatGLM4Tokenizer" if model.startswith("glm") else "ChatGLMTokenizer"
        said = {"tokenizer_class": cls, "name_or_path": f"THUDM/{model}"}
        (path / "tokenizer_config.json").write_text(json.dumps(said))
        (path / "config.json").write_text(json.dumps({"model_type": "chatglm", "padded_vocab_size": rows}))
        found[model] = load_tokenizer(path)
        assert found[model].vocab_size == rows
    return found


@pytest.mark.parametrize("model", ["chatglm2-6b", "glm-4-9b"])
def test_official_ids(golden: dict[str, Any], tokenizers: dict[str, BaseTokenizer], model: str) -> None:
    assert golden[model]
    for text, ids in golden[model]:
        assert tokenizers[model].encode(text, add_special=True) == ids
        assert tokenizers[model].decode(ids) == text


def test_official_codegeex2_ids(shared: Path, golden: dict[str, Any]) -> None:
    """CodeGeeX2's own file is not at hand; its ids are those of ChatGLM2's without a space put before a text."""
    data = (shared / "assets" / "tokenizer_chatglm2.model").read_bytes()
    tokenizer = chatglm2_tokenizer(replace(SpmModel.parse(data, "tokenizer.model"), dummy_prefix=False), roles=False)
    for text, ids in golden["codegeex2-6b"]:
        assert tokenizer.encode(text, add_special=True) == ids
        assert tokenizer.decode(ids) == text


def test_the_released_special_ids(tokenizers: dict[str, BaseTokenizer]) -> None:
    three, four = tokenizers["chatglm3-6b"], tokenizers["glm-4-9b"]
    assert [three.token_id(name) for name in ("[MASK]", "eop", "<|system|>", "<|observation|>")] == [
        64789, 64793, 64794, 64797,
    ]  # fmt: skip
    assert [four.token_id(name) for name in ("<|endoftext|>", "[gMASK]", "<sop>", "<|end_of_video|>")] == [
        151329, 151331, 151333, 151342,
    ]  # fmt: skip
    assert tokenizers["chatglm2-6b"].token_id("<|user|>") is None


def test_sentencepieces_and_tiktokens_ids(shared: Path, tokenizers: dict[str, BaseTokenizer]) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="needs the package tiktoken, to compare with")
    tokens = read_ranks((shared / "assets" / "tokenizer_glm4.tiktoken").read_bytes(), "tokenizer.model")
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    ranks = {token: rank for rank, token in enumerate(tokens)}
    byte_pairs = tiktoken.Encoding(name="glm4", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    file = str(shared / "assets" / "tokenizer_chatglm3.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=file)
    some = [text[:8000] for _, text in texts(shared / "data")]
    for text in [*TEXTS, *some]:
        ids = tokenizers["glm-4-9b"].encode(text)
        assert ids == byte_pairs.encode(text, disallowed_special=())
        assert tokenizers["glm-4-9b"].decode(ids) == text
        ids = tokenizers["chatglm3-6b"].encode(text)
        assert ids == pieces.encode(text)
        assert tokenizers["chatglm3-6b"].decode(ids) == text

"""What has hurt users of these families elsewhere, and what holds here that it cannot come back.

Each line of `PAINS` names a public issue by its cause and the tests that would fail if it had it here.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

import hanlin
from chatglm2_directory import config as later_config
from chatglm2_directory import tiktoken_file
from chatglm2_directory import tokenizer_model as later_tokenizer
from chatglm_directory import PIECES, config, quantised, tokenizer_config, tokenizer_model, weights, write
from hanlin.kernels import native

TESTS = Path(__file__).parents[1]
HERE = "unit/test_known_pains.py"

PAINS: dict[str, tuple[str, ...]] = {
    "InternLM#400: tokenizers that set their attributes too late": ("unit/test_hf_internlm.py::test_auto_classes",),
    "InternLM#832: the card's chat() breaks with a new Transformers": (
        "golden/test_hf_card.py::test_chat",
        "unit/test_hf_model.py::test_a_cache_by_either_name",
    ),
    "InternLM#655: a fast tokenizer that needs another version": (
        "unit/test_hf_tokenizer.py::test_slow_and_fast_agree",
    ),
    "ChatGLM-6B#1505: the README's example is dead": (
        "unit/test_hf_chatglm.py::test_generate_chat_stream_equal_the_engine",
        "unit/test_hf_model.py::test_the_cards_cuda_without_a_gpu",
    ),
    "ChatGLM3#1324: _pad() and padding_side": (f"{HERE}::test_padding_side_of_every_released_tokenizer",),
    "ms-swift#1663: processes race for downloaded code": (
        "unit/test_hf_auto.py::test_auto_classes",
        "unit/test_load_pipeline.py::test_bait_is_not_touched",
    ),
    "ChatGLM-6B#162: int4 calls a compiler at run time": (f"{HERE}::test_int4_calls_no_compiler",),
    "ChatGLM2-6B#352: a kernel library that cannot be loaded": (f"{HERE}::test_a_broken_library_still_answers",),
    "vllm#29233: a default cache too small to start": (f"{HERE}::test_defaults_start_whatever_the_context",),
    "ChatGLM-6B#1175: memory grows with each turn": (f"{HERE}::test_turns_give_their_blocks_back",),
    "lmdeploy#558: halves of characters in streams": ("property/test_detokenizer.py::test_any_split_gives_the_whole",),
    "lmdeploy#2190: letters lost behind a quotation mark": (
        "golden/test_tokenizer_golden.py::test_samples",
        "property/test_detokenizer.py::test_unicode_round_trips",
    ),
    "lmdeploy#992: leading spaces eaten or added": (
        "property/test_detokenizer.py::test_decode_is_sentencepieces_whatever_the_spaces",
        "unit/test_hf_tokenizer.py::test_any_text_comes_back",
    ),
    "vllm#792, llama.cpp#8321: replies that never stop, or show their end token": (
        "unit/test_hf_chat.py::test_both_stop_ids_end_a_reply",
        "unit/test_chat_reply.py::test_stop_tokens_are_never_shown",
    ),
    "vllm#48347: a call that arrives in one piece is lost": (
        "unit/test_chat_reply.py::test_a_call_in_one_piece_or_in_many",
        "property/test_glm_chat.py::test_any_pieces_give_the_same",
        "unit/test_glm_tools.py::test_a_call_and_its_result_over_http",
    ),
    "LlamaFactory#4919: vocabularies of 92544 and 92550 rows": (f"{HERE}::test_rows_beyond_the_vocabulary_are_told",),
    "ChatGLM-6B#730: a tuned prefix and the model it came from": (
        "unit/test_chatglm_llm.py::test_ptuning",
        f"{HERE}::test_a_prefix_leaves_the_model_as_it_was",
    ),
}

NAMES = [piece for piece, _ in PIECES]
IDS = {
    "mask_token_id": NAMES.index("[MASK]"),
    "gmask_token_id": NAMES.index("[gMASK]"),
    "bos_token_id": NAMES.index("<sop>"),
    "eos_token_id": NAMES.index("<eop>"),
}
SMALL = {"packed_cache": False, "cache_max_entry_count": 64, "threads": 1}


@pytest.mark.parametrize("pain", PAINS)
def test_every_pain_has_its_tests(pain: str) -> None:
    for name in PAINS[pain]:
        file, _, function = name.partition("::")
        found = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in found.body if isinstance(node, ast.FunctionDef)}


def chatglm(path: Path, bits: int = 0, **changes: Any) -> Path:
    """ChatGLM-6B's directory, tiny."""
    values = config(vocab_size=len(NAMES) + 3, hidden_size=64, **IDS, **changes)
    tensors = weights(values)
    if bits:
        values, tensors = {**values, "quantization_bit": bits}, quantised(tensors, bits)
    write(path, values, tensors)
    (path / "ice_text.model").write_bytes(tokenizer_model())
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
    return path


@pytest.mark.parametrize("kind", ["chatglm-6b", "chatglm3-6b", "glm-4-9b-chat"])
def test_padding_side_of_every_released_tokenizer(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("transformers", reason="needs the extra 'hf' (transformers), which is not installed")
    from transformers import AutoTokenizer

    import hanlin.hf  # noqa: F401 - registers

    if kind == "chatglm-6b":
        path = chatglm(tmp_path / kind)
    else:
        path = tmp_path / kind
        path.mkdir()
        four = kind.startswith("glm")
        (path / "config.json").write_text(json.dumps(later_config(padded_vocab_size=500)))
        (path / "tokenizer.model").write_bytes(tiktoken_file() if four else later_tokenizer())
        cls = "ChatGLM4Tokenizer" if four else "ChatGLMTokenizer"
        (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": cls}))
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = ["the cat sat on 你好", "你好"]
    for side in ("left", "right"):
        batch = tokenizer(texts, padding=True, padding_side=side)
        short = tokenizer(texts[1])["input_ids"]
        row, mask = batch["input_ids"][1], batch["attention_mask"][1]
        assert len(row) == len(batch["input_ids"][0]) > len(short)
        assert (row[-len(short) :] if side == "left" else row[: len(short)]) == short
        assert sum(mask) == len(short) and mask[0 if side == "right" else -1] == 1


def test_int4_calls_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a program was started")

    path = chatglm(tmp_path / "chatglm-6b-int4", bits=4)
    monkeypatch.setattr(subprocess.Popen, "__init__", refused)
    monkeypatch.setattr(os, "system", refused)
    monkeypatch.setenv("PATH", "")
    with hanlin.load(path, **SMALL) as llm:
        assert llm.chat("你好", max_tokens=2, temperature=0).ids


def test_a_broken_library_still_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = chatglm(tmp_path / "chatglm-6b-int4", bits=4)
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "library_path", lambda: broken)
    native._load.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with hanlin.load(path, dtype="float32", **SMALL) as llm:
                assert llm.chat("你好", max_tokens=2, temperature=0).ids
        assert any("cannot be loaded" in str(warning.message) for warning in caught)
    finally:
        native._load.cache_clear()


def test_defaults_start_whatever_the_context(tmp_path: Path) -> None:
    """The cache takes what is free, not what the longest context would need."""
    path = chatglm(tmp_path / "chatglm-6b", max_sequence_length=1 << 17)
    with hanlin.load(path, packed_cache=False, threads=1) as llm:
        assert llm.chat("你好", max_tokens=2, temperature=0).ids


def test_turns_give_their_blocks_back(tmp_path: Path) -> None:
    with hanlin.load(chatglm(tmp_path / "chatglm-6b"), **SMALL) as llm:
        talk: list[dict[str, str]] = []
        for _ in range(12):
            talk.append({"role": "user", "content": "the cat sat"})
            talk.append({"role": "assistant", "content": llm.chat(talk, max_tokens=4, seed=1).text})
            stats, until = llm.stats(), time.monotonic() + 20
            while stats["free_blocks"] < stats["blocks"] and time.monotonic() < until:
                stats = llm.stats()  # a reply may be told a moment before its blocks are given back
            assert stats["free_blocks"] == stats["blocks"]


@pytest.mark.parametrize("rows", [-6, 6])
def test_rows_beyond_the_vocabulary_are_told(tmp_path: Path, rows: int) -> None:
    """Weights of another vocabulary than the configuration's: named, with both shapes, and not cut or filled."""
    path = chatglm(tmp_path / "chatglm-6b")
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, "vocab_size": values["vocab_size"] + rows}))
    with pytest.raises(hanlin.HanlinError) as caught:
        hanlin.load(path, **SMALL)
    told = str(caught.value)
    for part in (
        "transformer.word_embeddings.weight",
        "lm_head.weight",
        str(values["vocab_size"]),
        str(values["vocab_size"] + rows),
    ):
        assert part in told


def test_a_prefix_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    """What tuning learnt is in files of its own: with them off, the answers are the first ones."""
    import torch

    path, tuned = chatglm(tmp_path / "chatglm-6b"), tmp_path / "checkpoint-3000"
    tuned.mkdir()
    table = torch.randn(4, 2 * 2 * 64, generator=torch.Generator().manual_seed(1))
    torch.save({"transformer.prefix_encoder.embedding.weight": table}, tuned / "pytorch_model.bin")
    told = []
    for prefix in (None, tuned, None):
        with hanlin.load(path, ptuning_checkpoint=prefix, dtype="float32", **SMALL) as llm:
            told.append(llm.chat("你好", max_tokens=8, temperature=0).ids)
    assert told[0] == told[2] != told[1]


def test_no_downloaded_code_is_in_this_process() -> None:
    assert not [name for name in sys.modules if name.startswith("transformers_modules")]

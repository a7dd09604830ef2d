"""Small tokenizers for tests: a SentencePiece model, a tokenizer.json and GGUF keys, of a few hundred pieces each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hanlin.tokenizers.spm_model import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, SpmModel

DATA = Path(__file__).parent / "data"
INTERNLM2 = DATA / "tokenizer_internlm2.model"
INTERNLM = DATA / "tokenizer_internlm.model"
INTERNLM2_ADDED = {
    92538: "<|plugin|>",
    92539: "<|interpreter|>",
    92540: "<|action_end|>",
    92541: "<|action_start|>",
    92542: "<|im_end|>",
    92543: "<|im_start|>",
}
WORDS = ("▁", "a", "b", "ab", "▁a", "▁ab", "你", "好", "你好", "\n")


def tiny_spm(
    *, user_defined: tuple[str, ...] = ("<|im_end|>",), dummy_prefix: bool = False, **settings: Any
) -> SpmModel:
    """A BPE model whose words are `WORDS`, with byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), *WORDS, *user_defined]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(WORDS), *[USER_DEFINED] * len(user_defined)]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(WORDS))] + [0.0] * len(user_defined)
    return SpmModel(pieces=pieces, scores=scores, kinds=kinds, dummy_prefix=dummy_prefix, **settings)


def added_token(id: int, content: str, *, special: bool = True, **flags: bool) -> dict[str, Any]:  # noqa: A002
    """One entry of tokenizer.json's `added_tokens`."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": content, "special": special, **plain, **flags}


def byte_letters() -> list[str]:
    """GPT-2's letter of each byte: bytes without a visible Latin-1 letter move to U+0100 on."""
    letters, moved = [], 0
    for value in range(256):
        visible = 33 <= value <= 126 or 161 <= value <= 172 or 174 <= value <= 255
        letters.append(chr(value) if visible else chr(256 + moved))
        moved += not visible
    return letters


def tiny_json(**changes: Any) -> dict[str, Any]:
    """A byte-level BPE tokenizer.json in Llama 3's shape: ids 0..255 are bytes, three merges, three added tokens."""
    vocabulary = {letter: value for value, letter in enumerate(byte_letters())}
    merges = ["Ġ a", "a b", "Ġa b"]
    for merge in merges:
        vocabulary[merge.replace(" ", "")] = len(vocabulary)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(259, "<|begin|>"),
            added_token(260, "<|im_end|>"),
            added_token(261, "<tool_call>", special=False),
            added_token(262, "翰林", special=False),
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "Sequence",
            "processors": [
                byte_level,
                {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, sequence],
                    "pair": [sequence, {"Sequence": {"id": "B", "type_id": 1}}],
                    "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [259], "tokens": ["<|begin|>"]}},
                },
            ],
        },
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "vocab": vocabulary, "merges": merges},
        **changes,
    }


def gguf_bpe(**changes: Any) -> dict[str, Any]:
    """`tokenizer.ggml.*` keys of the same tokenizer, its added words left out."""
    data = tiny_json()
    tokens = [*data["model"]["vocab"], "<|begin|>", "<|im_end|>", "<tool_call>"]
    keys = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [1] * 259 + [3, 3, 4],
        "merges": data["model"]["merges"],
        "bos_token_id": 259,
        "eos_token_id": 260,
        "add_bos_token": True,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def gguf_spm(**changes: Any) -> dict[str, Any]:
    """`tokenizer.ggml.*` keys of the tiny SentencePiece model."""
    model = tiny_spm()
    keys = {
        "model": "llama",
        "tokens": model.pieces,
        "scores": model.scores,
        "token_type": model.kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def write_directory(path: Path, **files: Any) -> Path:
    """A model directory: bytes and text as they are, anything else as JSON; `__` in a name stands for a dot."""
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        file = path / name.replace("__", ".")
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path

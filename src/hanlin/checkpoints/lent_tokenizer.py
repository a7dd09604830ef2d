"""A tokenizer's file beside weights that came without one."""

from __future__ import annotations

import json
from pathlib import Path

from hanlin.errors import ConfigError

__all__ = ["tokenizer_files"]

_TOKENIZERS = {"internlm2": "InternLM2Tokenizer", "internlm": "InternLMTokenizer", "llama": "LlamaTokenizer"}


def tokenizer_files(path: Path, family: str) -> dict[str, bytes]:
    """What goes beside the weights for a tokenizer in one file, for programs that do not look into it.

    Raises:
        ConfigError: neither a SentencePiece model nor a `tokenizer.json`, or it can't be read.
    """
    if path.suffix not in (".model", ".json"):
        raise ConfigError(f"{path}: neither a .model file of SentencePiece's nor a tokenizer.json")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    said = {
        "tokenizer_class": _TOKENIZERS[family],
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
    }
    if path.suffix == ".json":  # says everything itself
        return {"tokenizer.json": content}
    return {"tokenizer.model": content, "tokenizer_config.json": (json.dumps(said, indent=2) + "\n").encode()}

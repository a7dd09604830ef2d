"""Text to calibrate on, and to measure on, out of a user's file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hanlin.errors import ConfigError
from hanlin.types import Tokenizer

__all__ = ["Windows", "read_windows"]

# Enough letters for any window, in every language that the tokenizers know.
_LETTERS_A_TOKEN = 12
_MAX_LINE = 8 << 20


@dataclass(frozen=True)
class Windows:
    """int64 (windows, length): those to calibrate on, and others to measure perplexity on (there may be none)."""

    calibration: NDArray[np.int64]
    evaluation: NDArray[np.int64]


def read_windows(
    path: Path, tokenizer: Tokenizer, *, samples: int, length: int, evaluation: Path | None = None, measured: int = 16
) -> Windows:
    """Cut `samples` windows of `length` tokens out of a text, and `measured` ones out of another, or of what follows.

    A `.jsonl` file has an object a line, with "text", or with "messages" of which the contents are taken.

    Raises:
        ConfigError: no such file, lines that are not such objects, or too little text for one window.
    """
    own = measured if evaluation is None else 0
    found = _cut(path, tokenizer, samples + own, length)
    calibration = found[:samples]
    rest = found[samples:] if evaluation is None else _cut(evaluation, tokenizer, measured, length)
    return Windows(calibration, rest)


def _cut(path: Path, tokenizer: Tokenizer, count: int, length: int) -> NDArray[np.int64]:
    need = count * length
    ids: list[int] = []
    try:
        for text in _texts(path, need * _LETTERS_A_TOKEN):
            ids += tokenizer.encode(text)
            if len(ids) >= need:
                break
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    whole = min(len(ids), need) // length
    if not whole:
        raise ConfigError(f"{path}: holds {len(ids):,} tokens, fewer than one window of {length:,}. Give more text.")
    return np.array(ids[: whole * length], np.int64).reshape(whole, length)


def _texts(path: Path, letters: int) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        if path.suffix != ".jsonl":
            while piece := file.read(min(letters, 1 << 16)):
                yield piece
            return
        number = 0
        while line := file.readline(_MAX_LINE):
            number += 1
            if line.strip():
                yield _text_of(line, path, number) + "\n"


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}, line {number}: not valid JSON: {error}") from None
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return str(row["text"])
    messages = row.get("messages") if isinstance(row, dict) else None
    contents = [message.get("content") for message in messages or () if isinstance(message, dict)]
    if not contents or not all(isinstance(content, str) for content in contents):
        raise ConfigError(f"{path}, line {number}: needs 'text', or 'messages' with a 'content' each")
    return "\n".join(islice(map(str, contents), 1000))

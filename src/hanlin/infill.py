"""Filling a gap: prompts whose reply stands between two texts, for models whose vocabulary has words for that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hanlin.errors import RequestError
from hanlin.types import Tokenizer

__all__ = ["infilled"]

# (before the text in front, before the text behind, before the reply), as code models write them.
_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
)


def infilled(tokenizer: Tokenizer, before: Any, after: str, *, blanks: bool) -> tuple[int, ...]:
    """Ids of a prompt whose reply is to stand between `before` (a text or ids) and `after`.

    Args:
        blanks: whether the model fills `[MASK]` behind `<sop>`, as ChatGLM-6B was trained to (GLM, arXiv 2103.10360).

    Raises:
        RequestError: for a model that can only go on with a text.
    """

    def ids(given: str | Sequence[int]) -> list[int]:
        return tokenizer.encode(given) if isinstance(given, str) else list(given)

    if blanks:
        mask, start = _known(tokenizer, ("[MASK]", "<sop>"))
        return (*ids(before), mask, *ids(after), start)
    marks = next((found for names in _MARKS if (found := _known(tokenizer, names))), ())
    if not marks:
        raise RequestError("suffix: this model goes on with a text, it cannot fill a gap; leave suffix out")
    front, behind, middle = marks
    begin = tokenizer.encode("", add_special=True)
    return (*begin, front, *ids(before), behind, *ids(after), middle)


def _known(tokenizer: Tokenizer, names: Sequence[str]) -> tuple[int, ...]:
    """The ids of special tokens; none unless all are there."""
    found = [tokenizer.token_id(name) for name in names]
    return tuple(i for i in found if i is not None) if None not in found else ()

"""What every chat format shares: writing a conversation as ids and weights, and checking it first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hanlin.errors import ChatFormatError, problems
from hanlin.types import ROLES, Message, Rendered, Tokenizer

__all__ = ["Writer", "checked", "special_ids"]

MAX_NAME = 256


def checked(messages: Iterable[Message], format_name: str, *, sees: bool = False) -> list[Message]:
    """The messages as a list. `sees`: images are taken, of the user.

    Raises:
        ChatFormatError: naming every unknown role, every name that would break its line, every image not taken.
    """
    turns, found = list(messages), []
    for index, turn in enumerate(turns):
        if turn.role not in ROLES:
            found.append(f"message {index}: role must be one of {', '.join(ROLES)}, not {turn.role!r}")
        if turn.name is not None and (not turn.name.isprintable() or not 0 < len(turn.name) <= MAX_NAME):
            found.append(f"message {index}: name must be 1..{MAX_NAME} printable characters, not {turn.name[:40]!r}")
        if turn.tool_calls and turn.role != "assistant":
            found.append(f"message {index}: only the assistant calls tools, not {turn.role!r}")
        if turn.images and not sees:
            found.append(f"message {index}: this model cannot see images")
        elif turn.images and turn.role != "user":
            found.append(f"message {index}: only the user shows images, not {turn.role!r}")
    if found:
        raise ChatFormatError(problems(f"chat format '{format_name}'", found))
    return turns


def special_ids(tokenizer: Tokenizer, pieces: Sequence[str], format_name: str) -> dict[str, int]:
    """The ids of the special tokens that a format is made of.

    Raises:
        ChatFormatError: naming every piece that the tokenizer does not have as a special token.
    """
    found = {piece: tokenizer.token_id(piece) for piece in pieces}
    known = {piece: token for piece, token in found.items() if token is not None and token in tokenizer.special_ids}
    missing = [f"no special token {piece!r}" for piece in pieces if piece not in known]
    if missing:
        raise ChatFormatError(
            problems(
                f"chat format '{format_name}' does not fit this tokenizer", missing, "Choose another format by name."
            )
        )
    return known


class Writer:
    """Collects a conversation: special tokens as ids, everything else as text that can never become one.

    All text between two special tokens, or two `cut`s, is encoded as one run, as a tokenizer does that reads the whole
    conversation as a string; encoding header and content apart would miss the merges across their border ("\\n" + "\\n"
    is one token in InternLM2). A token that crosses a border of weights belongs to the text that it starts in.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._parts: list[tuple[int | str | None, float]] = []

    def special(self, token: int, weight: float = 0.0) -> None:
        self._parts.append((token, weight))

    def text(self, text: str, weight: float = 0.0) -> None:
        if text:
            self._parts.append((text, weight))

    def cut(self) -> None:
        """What follows is encoded apart, for models that were trained so."""
        self._parts.append((None, 0.0))

    def bos(self) -> None:
        """The tokenizer's first token, if it has one."""
        if self._tokenizer.bos_id is not None:
            self.special(self._tokenizer.bos_id)

    def as_text(self) -> str:
        """The conversation as a template would print it; for comparing, never for encoding."""
        shown = (self._tokenizer.token_text(part) if isinstance(part, int) else part for part, _ in self._parts)
        return "".join(text for text in shown if text)

    def rendered(self) -> Rendered:
        """The ids and weights of all that was written.

        Raises:
            ChatFormatError: when the tokenizer makes a special token of plain text.
        """
        ids: list[int] = []
        weights: list[float] = []
        run: list[tuple[str, float]] = []
        for part, weight in self._parts:
            if isinstance(part, str):
                run.append((part, weight))
                continue
            self._close(run, ids, weights)
            if part is not None:
                ids.append(part)
                weights.append(weight)
        self._close(run, ids, weights)
        return Rendered(ids=tuple(ids), weights=tuple(weights))

    def _close(self, run: list[tuple[str, float]], ids: list[int], weights: list[float]) -> None:
        if not run:
            return
        text = "".join(part for part, _ in run)
        new = self._tokenizer.encode(text, add_special=False, parse_special=False)
        # "<unk>" is a special token in some vocabularies, and the honest id of text that they cannot spell.
        for token in self._tokenizer.special_ids.intersection(new):
            if self._tokenizer.token_text(token) in text:
                raise ChatFormatError(
                    f"the tokenizer makes special token {self._tokenizer.token_text(token)!r} (id {token}) of plain "
                    "text; a message could forge a role"
                )
        ids += new
        weights += self._weigh(new, run)
        run.clear()

    def _weigh(self, ids: Sequence[int], run: Sequence[tuple[str, float]]) -> list[float]:
        """Each token's weight: that of the text in which its first character lies."""
        first = run[0][1]
        if all(weight == first for _, weight in run):  # no prompt to be answered has others
            return [first] * len(ids)
        detokenizer = self._tokenizer.detokenizer(skip_special=False)
        weights: list[float] = []
        index, end, position = 0, len(run[0][0]), 0
        for token in ids:
            while position >= end and index + 1 < len(run):
                index += 1
                end += len(run[index][0])
            if index + 1 == len(run):
                break
            weights.append(run[index][1])
            position += len(detokenizer.push([token]))
        return weights + [run[-1][1]] * (len(ids) - len(weights))

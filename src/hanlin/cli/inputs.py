"""What the command line and the pipe mean: which word is the model, which is the prompt, what was piped in."""

from __future__ import annotations

import os
import re
import stat
import sys
import threading
from typing import TextIO

import typer

from hanlin.errors import RequestError

__all__ = ["document", "is_terminal", "joined", "meant", "names_model", "sound"]

_LARGEST = 64 * 2**20  # bytes of standard input


def meant(model: str | None, first: str | None, second: str | None) -> tuple[str | None, str | None]:
    """(MODEL, PROMPT). A single word is the model if it looks like one."""
    if model is not None:
        if second is not None:
            raise typer.BadParameter(f"with --model, only a PROMPT is left to give; put it in quotes: {first} {second}")
        return model, first
    if second is None and first is not None and not names_model(first):
        return None, first
    return first, second


def names_model(text: str) -> bool:
    """Whether a text names a model rather than asks something: a path, a .gguf file, a hub id, or a known name."""
    from hanlin.hub import names

    if not text.strip():
        return False
    try:
        exists = os.path.exists(os.path.expanduser(text))  # noqa: PTH110, PTH111 - Path raises for some texts
    except ValueError:
        exists = False
    if exists or names.is_default(text) or names.parse(text) or names.short(text):
        return True
    path_like = text.endswith(".gguf") or re.match(r"(~|\.{1,2})?[/\\]|[A-Za-z]:[/\\]", text)
    return bool(path_like) and not re.search(r"\s", text)


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def document(*, beside: str | None) -> str | None:
    """What is piped in, if anything; `beside` a prompt or alone.

    Raises:
        RequestError: it is no UTF-8 text, or enormous.
    """
    stream = sys.stdin
    if stream is None or stream.isatty():
        return None
    try:
        if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):  # /dev/null
            return None
    except (OSError, ValueError):
        pass  # a stream that is not a file
    hint = threading.Timer(2.0, print, ["Reading standard input to its end ..."], {"file": sys.stderr})
    hint.daemon = True
    if beside is not None and is_terminal(sys.stderr):
        hint.start()
    try:
        raw = stream.buffer.read(_LARGEST + 1)
    finally:
        hint.cancel()
    if len(raw) > _LARGEST:
        raise RequestError(f"standard input is longer than {_LARGEST // 2**20} MiB")
    try:
        return raw.decode("utf-8-sig").strip("\r\n") or None
    except UnicodeDecodeError as error:
        raise RequestError(
            f"standard input is not UTF-8: byte {raw[error.start]:#04x} at offset {error.start}. "
            "Convert it first, for example with iconv -f gb18030 -t utf-8."
        ) from error


def joined(prompt: str | None, text: str | None) -> str | None:
    """The question, then the document; an empty one is none."""
    return "\n\n".join(part for part in (prompt, text) if part and part.strip()) or None


def sound(text: str | None) -> None:
    """Refuse an argument that is no text.

    Raises:
        typer.BadParameter: naming the place.
    """
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise typer.BadParameter(f"an argument is not UTF-8 at character {error.start}: {text!a}") from error

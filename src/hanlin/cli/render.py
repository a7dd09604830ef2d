"""Where a reply appears, and the terminal meanwhile. Markdown is in `live`."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, Protocol, TextIO

__all__ = ["PlainView", "SilentView", "View", "quiet_keys", "visible"]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def visible(text: str) -> str:
    """The text without what could steer a terminal: control characters become U+FFFD, line ends and tabs stay."""
    return _CONTROL.sub("\ufffd", text.replace("\r\n", "\n"))


class View(Protocol):
    def push(self, text: str) -> None:
        """More text has come."""

    def finish(self) -> None:
        """The reply is over, whole or not; what follows begins on a new line."""


class PlainView:
    """Text as it comes. `clean` is for a terminal, which control characters could steer; a pipe gets every byte."""

    def __init__(self, stream: TextIO, *, clean: bool) -> None:
        self._stream = stream
        self._clean = clean
        self._last = "\n"

    def push(self, text: str) -> None:
        self._stream.write(visible(text) if self._clean else text)
        self._stream.flush()
        self._last = text[-1:] or self._last

    def finish(self) -> None:
        if self._last != "\n":
            self._stream.write("\n")
            self._stream.flush()


class SilentView:
    """Shows nothing; the caller has use for the whole reply only."""

    def push(self, text: str) -> None:
        """Not shown."""

    def finish(self) -> None:
        """Nothing was shown."""


@contextmanager
def quiet_keys() -> Iterator[None]:
    """Keys typed meanwhile neither show nor disturb the painting; they wait for the next prompt. Ctrl-C still works."""
    terminal = _terminal()
    if terminal is None:
        yield
        return
    import termios

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)  # by way of the restoration below

    before = termios.tcgetattr(terminal)
    silent = termios.tcgetattr(terminal)
    silent[3] &= ~(termios.ECHO | termios.ICANON)
    on_end = signal.signal(signal.SIGTERM, end)
    termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
        signal.signal(signal.SIGTERM, on_end)


def _terminal() -> int | None:
    """The terminal that standard input is, if it listens to this process; a background job would be halted."""
    try:
        descriptor = sys.stdin.fileno()
        ours = os.isatty(descriptor) and os.tcgetpgrp(descriptor) == os.getpgrp()
    except (OSError, ValueError, AttributeError):  # closed, replaced, or not POSIX
        return None
    return descriptor if ours and threading.current_thread() is threading.main_thread() else None

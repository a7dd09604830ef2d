"""A program at a pseudo-terminal, and the screen that a person would see."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pexpect
import pyte

import hanlin

__all__ = ["Terminal"]

_PATIENCE = 60.0  # seconds, for a machine that has much else to do


class Terminal:
    """A program at a terminal, and the terminal's screen."""

    def __init__(self, home: Path, command: list[str], rows: int = 40, columns: int = 80, **settings: str) -> None:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))},
            "PYTHONPATH": str(Path(hanlin.__file__).parents[1]),
            "HANLIN_HOME": str(home),
            "TERM": "xterm-256color",
            "LC_ALL": "C.UTF-8",
            "PROMPT_TOOLKIT_NO_CPR": "1",  # the emulator answers no questions
            **settings,
        }
        self.process = pexpect.spawn(
            sys.executable, command, env=environment, dimensions=(rows, columns), cwd=str(home)
        )
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self._stream = pyte.ByteStream(self.screen)

    def read(self, seconds: float = 0.05) -> None:
        """Take what the program writes."""
        with suppress(pexpect.TIMEOUT, pexpect.EOF):
            self._stream.feed(self.process.read_nonblocking(1 << 16, seconds))

    @property
    def lines(self) -> list[str]:
        above = ["".join(row[x].data for x in range(self.screen.columns)) for row in self.screen.history.top]
        lines = [line.rstrip() for line in (*above, *self.screen.display)]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def until(self, done: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not done():
            assert time.monotonic() < deadline, f"{what} did not come. The screen:\n{self.text}"
            self.read()

    def expect(self, text: str) -> None:
        self.until(lambda: text in self.text, repr(text))

    def ready(self) -> None:
        """The prompt stands at the bottom, empty."""
        self.until(lambda: self.lines and self.lines[-1] == ">>>", "the prompt")

    def type(self, keys: str) -> None:
        self.process.send(keys)

    def ask(self, line: str) -> None:
        """Type a line, send it, and wait for the next prompt."""
        self.ready()
        count = self.text.count(">>>")
        self.type(line + "\r")
        self.until(lambda: self.text.count(">>>") > count and self.lines[-1] == ">>>", f"an end of {line!r}")

    def leave(self) -> int:
        """The exit status."""
        self.until(lambda: not self.process.isalive(), "the end")
        self.read()
        self.process.close()
        return self.process.exitstatus if self.process.exitstatus is not None else -self.process.signalstatus

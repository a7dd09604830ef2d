"""Markdown that is painted while it grows, in place, without flicker, and scrolls away as it settles."""

from __future__ import annotations

import time

from rich.console import Console
from rich.status import Status

from hanlin.cli.markdown import Line, Renderer
from hanlin.cli.render import visible

__all__ = ["MarkdownView"]

_SHARE = 8  # painting takes an eighth of the time at most


class MarkdownView:
    """Settled blocks scroll away for good; only the last block is painted again, and of it only what changed.

    A spinner turns until the first text comes. Two paintings are at least `pause` seconds apart.
    """

    def __init__(self, console: Console, *, pause: float = 1 / 20) -> None:
        self._pause = pause
        self._renderer = Renderer(console)
        self._painter = _Painter(console)
        self._rest = ""  # what is not settled yet
        self._above = False  # something settled stands above
        self._next = 0.0  # when to paint again
        self._spinner: Status | None = console.status("")
        self._spinner.start()

    def push(self, text: str) -> None:
        self._stop_spinner()
        self._rest += visible(text)
        now = time.monotonic()
        if now >= self._next:
            self._paint()
            after = time.monotonic()
            self._next = after + max(self._pause, _SHARE * (after - now))

    def finish(self) -> None:
        self._stop_spinner()
        tail = self._lines(self._rest)
        self._painter.paint(tail, settled=len(tail))
        self._painter.finish()

    def _stop_spinner(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None

    def _paint(self) -> None:
        settled, rest = self._renderer.split(self._rest)
        done = self._lines(settled)
        self._above = self._above or bool(done)
        self._rest = rest
        self._painter.paint(done + self._lines(rest), settled=len(done))

    def _lines(self, text: str) -> list[Line]:
        found = self._renderer.lines(text)
        return [Line("", 0), *found] if found and self._above else found


class _Painter:
    """The lines at the bottom of the screen that may still change. The cursor rests at the end of the last one."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: list[Line] = []
        self._gone = 0  # lines of the unsettled part that have scrolled out of reach
        self._width = console.width
        self._open = False  # the cursor stands behind text

    def paint(self, wanted: list[Line], settled: int) -> None:
        """Show these lines where the unsettled ones are; the first `settled` of them are final."""
        behind, wanted = self._gone - settled, wanted[self._gone :]
        if wanted != self._shown:
            self._write(wanted)
        unsettled = min(len(wanted), len(wanted) + behind)
        live = min(unsettled, max(self._console.height - 1, 1))
        # Settled lines are forgotten; unsettled ones that scrolled out are skipped when their block is painted again.
        self._gone = max(behind, 0) + unsettled - live
        self._shown = wanted[len(wanted) - live :]
        self._width = self._console.width

    def finish(self) -> None:
        if self._open:
            self._console.file.write("\n")
            self._console.file.flush()

    def _write(self, wanted: list[Line]) -> None:
        """One write from the first change on. Without automatic wrapping: a line whose width the terminal judges
        differently is cut at the edge, but never shifts the others. Erased before written: at the last column, erasing
        would take a character with it."""
        same = _common(self._shown, wanted)
        out = ["\x1b[?7l"]
        if same == len(self._shown):
            out.append("\r\n" if self._open else "")
        else:
            same = max(min(same, len(wanted) - 1), 0)
            up = sum(self._rows(line) for line in self._shown[same:]) - 1
            out.append(f"\r\x1b[{up}A" if up else "\r")
            if len(wanted) < len(self._shown) or self._width != self._console.width or not wanted:
                out.append("\x1b[J")
        out.append("\r\n".join(f"\x1b[2K{line.ansi}" for line in wanted[same:]))
        out.append("\x1b[?7h")
        self._console.file.write("".join(out))
        self._console.file.flush()
        self._open = bool(wanted)

    def _rows(self, line: Line) -> int:
        """How many rows the line fills now: a window that became narrower has folded it."""
        width = max(self._console.width, 1)
        return 1 if self._width <= width else max(-(-line.cells // width), 1)


def _common(a: list[Line], b: list[Line]) -> int:
    """The length of the common beginning."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))

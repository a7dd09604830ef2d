"""What a person sees while something is fetched: lines, and a progress bar on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

__all__ = ["Report", "megabytes"]

Tick = Callable[[int], None]


class Report:
    """Writes to `stream`; None is silent. Only a terminal gets a moving bar, everything else gets plain lines."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream

    @classmethod
    def stderr(cls) -> Report:
        """The usual one: standard output stays free for the model's answer."""
        return cls(sys.stderr)

    def say(self, text: str) -> None:
        if self.stream is not None:
            print(text, file=self.stream, flush=True)

    @property
    def terminal(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    @contextmanager
    def progress(self, title: str, total: int | None) -> Iterator[Tick]:
        """A bar of `total` bytes, a spinner where `total` is None; the caller ticks with the bytes done so far."""
        if not self.terminal:
            self.say(f"{title} ..." if total is None else f"{title} ({megabytes(total)}) ...")
            yield _ignore
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            ProgressColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns: list[ProgressColumn] = [TextColumn("{task.description}")]
        if total is None:
            columns = [SpinnerColumn(), *columns, TimeElapsedColumn()]
        else:
            columns += [BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
        with Progress(*columns, console=Console(file=self.stream), transient=True) as bar:
            task = bar.add_task(title, total=total)

            def tick(done: int) -> None:
                if total is not None:
                    bar.update(task, completed=min(done, total))

            yield tick


def _ignore(done: int) -> None:
    """A tick that nobody sees."""


def megabytes(size: int) -> str:
    """A size in the decimal units that hubs and disks are labelled with."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.0f} {unit}" if size >= 10 * scale else f"{size / scale:.1f} {unit}"
    return f"{size} bytes"

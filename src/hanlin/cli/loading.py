"""Loading a model for a person who waits: a spinner and a bar, and what to do when the name was no model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hanlin.cli.render import quiet_keys
from hanlin.errors import DownloadError, ModelNotFoundError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.status import Status

    from hanlin.llm import LLM

__all__ = ["load", "show_loading"]


def load(name: str | None, options: Mapping[str, Any], *, guessed: bool) -> LLM:
    """`hanlin.load` with something to look at. `guessed`: the name could have been meant as a prompt.

    Raises:
        HanlinError: as `hanlin.load`.
    """
    import hanlin

    with quiet_keys(), _Waiting() as waiting:
        open_model = hanlin.load  # the import of torch takes a moment
        waiting.clear()  # fetching shows its own progress
        try:
            return open_model(name, progress=waiting.progress, **options)
        except (ModelNotFoundError, DownloadError) as error:
            if not guessed:
                raise
            raise type(error)(
                f"{error}\nIf {name!r} belongs to a prompt: put the whole prompt in quotes. A prompt that looks like "
                f'a model needs -m: hanlin chat -m smollm2 "..."'
            ) from error


@contextlib.contextmanager
def show_loading() -> Iterator[Callable[[int, int], None]]:
    """Something to look at while a model is loaded; gives the callback, and is gone when all bytes are there."""
    with _Waiting() as waiting:
        waiting.clear()

        def progress(done: int, total: int) -> None:
            waiting.progress(done, total)
            if done >= total:
                waiting.clear()

        yield progress


class _Waiting:
    """What a terminal shows on standard error; nothing anywhere else."""

    def __init__(self) -> None:
        self._status: Status | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> _Waiting:
        if sys.stderr is not None and sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status("Starting")
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()

    def clear(self) -> None:
        for shown in (self._status, self._bar):
            if shown is not None:
                shown.stop()

    def progress(self, done: int, total: int) -> None:
        """So many bytes of the weights are loaded."""
        if self._status is None:
            return
        if self._bar is None:
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
            self._bar = Progress(*columns, console=self._status.console, transient=True)
            self._task = self._bar.add_task("Loading", total=total)
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, completed=done)

"""One reply in the making, which Ctrl-C ends without losing what there is."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from hanlin.types import Completion, Delta

__all__ = ["Reply", "generate"]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A finished or stopped reply.

    Attributes:
        text: all of it, or what there was when it was stopped.
        tokens: how many were generated.
        completion: None when the person stopped it.
        first: seconds from asking to the first token; None when none came.
        seconds: from asking to the end.
    """

    text: str
    tokens: int
    completion: Completion | None
    first: float | None
    seconds: float

    @property
    def stopped(self) -> bool:
        return self.completion is None


def generate(stream: Iterator[Delta], push: Callable[[str], object]) -> Reply:
    """Push each text as it comes, until the reply ends or Ctrl-C is pressed.

    Raises:
        whatever the model raises.
    """
    began = time.perf_counter()
    texts: list[str] = []
    tokens, first, completion = 0, None, None
    with _Waiting() as waiting:
        try:
            while completion is None and (delta := waiting.next(stream)) is not None:
                tokens += len(delta.ids)
                if first is None and delta.ids:
                    first = time.perf_counter() - began
                if delta.text:
                    texts.append(delta.text)
                    push(delta.text)
                completion = delta.done
        except KeyboardInterrupt:
            pass  # what has come is kept
        finally:
            _close(stream)
    return Reply(
        text="".join(texts),
        tokens=completion.usage.generated_tokens if completion else tokens,
        completion=completion,
        first=first,
        seconds=time.perf_counter() - began,
    )


def _close(stream: Iterator[Delta]) -> None:
    """Take the request out of the engine; a plain iterator has nothing to close."""
    close = getattr(stream, "close", None)
    if close is not None:
        close()


class _Waiting:
    """Ctrl-C raises only while the model is waited for; while something is written to the screen it is noted."""

    def __init__(self) -> None:
        self._noted = self._inside = False
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> _Waiting:
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)

    def next(self, stream: Iterator[Delta]) -> Delta | None:
        """The next delta; None at the end, or after Ctrl-C.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed during the wait.
        """
        self._inside = True
        try:
            return None if self._noted else next(stream, None)
        finally:
            self._inside = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
        if self._inside:
            self._inside = False
            raise KeyboardInterrupt

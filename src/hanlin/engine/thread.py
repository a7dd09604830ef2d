"""The engine's thread: requests come in from any thread, tokens go out through sinks."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

from hanlin.engine.engine import Engine
from hanlin.engine.sequence import Sequence
from hanlin.errors import EngineError

__all__ = ["EngineThread"]


class EngineThread:
    """Owns an engine and steps it while there is work.

    When a step fails, every request gets the error, later ones are refused with it, and `failure` tells why.
    `listeners` are called for what each step gave, when sinks have heard of it all, and at a moment when this thread is
    about to need Python no more: as the next step begins to be computed, or when nothing is left to do. Earlier, those
    whom they wake would take Python's lock from the step that is made ready.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failure: BaseException | None = None
        self.listeners: list[Callable[[], None]] = []
        self._inbox: deque[tuple[Sequence, bool]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="hanlin-engine", daemon=True)
        self._thread.start()

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences; their sinks hear from the engine's thread.

        Raises:
            ContextLengthError: for a prompt that does not fit; then none is queued.
            EngineError: when the engine has stopped.
        """
        batch = list(sequences)
        for sequence in batch:
            self.engine.check(sequence)
        with self._wake:
            if self.failure is not None:
                raise EngineError(f"the engine has stopped: {self.failure}") from self.failure
            if self._closing:
                raise EngineError("the model is closed")
            self._inbox.extend((sequence, True) for sequence in batch)
            self._wake.notify()

    def abort(self, sequences: Iterable[Sequence]) -> None:
        """End sequences before the next step; those that are done already stay as they are."""
        with self._wake:
            self._inbox.extend((sequence, False) for sequence in sequences)
            self._wake.notify()

    def close(self) -> None:
        """Abort what runs, stop the thread and give the pool back. May be called twice."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._take():
                self.engine.step(self._tell)
                if self.engine.idle:
                    self._tell()
        except BaseException as error:  # the thread must not die silently, whatever it was
            self._stop(error)
        else:
            self._stop(EngineError("the model was closed while the request was running"))
        self._tell()
        self.engine.runner.close()

    def _tell(self) -> None:
        for listener in list(self.listeners):
            listener()

    def _take(self) -> bool:
        """Move the inbox into the engine; wait while there is nothing to do; False when closing."""
        with self._wake:
            while not self._inbox and not self._closing and self.engine.idle:
                self._wake.wait()
            inbox = list(self._inbox)
            self._inbox.clear()
            if self._closing:
                for sequence, new in inbox:
                    if new:
                        self.engine.scheduler.add(sequence)
                return False
        for sequence, new in inbox:
            if new:
                self.engine.add(sequence)
            else:
                self.engine.abort(sequence)
        return True

    def _stop(self, error: BaseException) -> None:
        with self._wake:
            if not self._closing:
                self.failure = error
            self._closing = True
            for sequence, new in self._inbox:
                if new:
                    self.engine.scheduler.add(sequence)
            self._inbox.clear()
        self.engine.fail(error if isinstance(error, EngineError) else EngineError(f"the engine has stopped: {error!r}"))

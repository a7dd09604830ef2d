"""The near end of the pipe: starts an engine's process and asks it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from hanlin.bench.child import Times
from hanlin.bench.peers import OURS, Peer
from hanlin.errors import EngineError

__all__ = ["Contender", "EngineProcess"]

_CHILD = Path(__file__).with_name("child.py")
_PACKAGES = Path(__file__).parents[2]
_LAST_LINES = 8


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An engine with a model, as one column of the table.

    Attributes:
        name: of the column.
        peer: what kind of engine.
        model: a file or directory.
        python: the interpreter that has it.
        options: its own: those of `hanlin.load`, fields of llama.cpp's context or of OpenVINO's scheduler, and so on.
    """

    name: str
    model: str
    peer: Peer = OURS
    python: str = sys.executable
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return self.peer.ours


class EngineProcess:
    """A contender at work, in a process of its own. A context manager; leaving it ends the process.

    Every method raises EngineError, with what the engine said, when the engine fails or is missing.
    """

    def __init__(self, contender: Contender, *, threads: int, sequences: int, length: int) -> None:
        """
        Args:
            threads: of the engine.
            sequences: how many it will be given at once, at most.
            length: tokens that one of them will have at most.
        """
        self.contender = contender
        self.facts: dict[str, Any] = {}
        self.load_seconds = 0.0
        self.memory_before = self.peak_memory = 0
        self._settings = {"threads": threads, "sequences": sequences, "length": length}
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        # Ctrl-C is for us: a child that dies of it would take what it has measured along.
        group: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        try:
            self._process = subprocess.Popen(
                [contender.python, str(_CHILD), str(contender.peer.file)],
                env=_environment(contender, threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                encoding="utf-8",
                **group,
            )
        except OSError as error:
            self._stderr.close()
            raise EngineError(f"{contender.python} cannot be run: {error.strerror or error}") from error

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load(self) -> None:
        """Load the model."""
        settings = {**self._settings, "options": dict(self.contender.options)}
        answer = self._ask({"load": {"model": self.contender.model, "settings": settings}})
        self.load_seconds, self.memory_before = answer["seconds"], answer["before"]

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> Times:
        """Continue all prompts at once, by one token and `tokens` more."""
        return Times(*self._ask({"generate": {"prompts": prompts, "tokens": tokens}})["times"])

    def close(self) -> None:
        """End the process. May be called twice."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                with contextlib.suppress(OSError):  # what a dead process did not read
                    stream.close()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "missing" in answer:
            python, package = self.contender.python, self.contender.peer.package
            raise EngineError(
                f"{python} has no {answer['missing']}. Run: {python} -m pip install {package}, "
                f"or name a Python that has it: --peer-python {self.contender.name}=PATH"
            )
        if "error" in answer:
            raise EngineError(answer["error"])
        self.facts, self.peak_memory = answer["facts"], answer["peak"]
        return answer

    def _last_words(self) -> str:
        """What a process that ended unasked left on standard error."""
        status = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()[-_LAST_LINES:]
        return "\n".join([f"its process ended with status {status}", *lines])


def _environment(contender: Contender, threads: int) -> dict[str, str]:
    """Another Python gets none of our search path; ours finds the package that runs here."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    inherited = environment.pop("PYTHONPATH", "")
    environment.pop("PYTHONHOME", None)
    if contender.ours:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_PACKAGES), inherited)))
    elif contender.python == sys.executable and inherited:
        environment["PYTHONPATH"] = inherited
    return environment

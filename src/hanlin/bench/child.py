"""The far end of the pipe: one engine, served in a process of its own.

    python child.py ENGINE_FILE

It is run by path, in whichever Python has the engine, so it and the files in `peers/` import nothing of Hanlin but what
they measure. An engine file has

    REQUIRES      the module that must be there
    ENVIRONMENT   variables that must be set before it is imported
    load(model, settings) -> engine

and an engine has `facts`, a dictionary with its `version`, and `generate(prompts, tokens) -> Times`, which continues
all prompts at once, greedily, past any end of sequence, by one token and `tokens` more.

One line of JSON comes in for each request, one goes out. Whatever engines print goes to standard error.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import queue
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class Times(NamedTuple):
    """
    Attributes:
        first: seconds until every prompt had its first token.
        total: seconds until all was generated.
        tokens: how many tokens came after `first`, of all sequences.
    """

    first: float
    total: float
    tokens: int


class Engine(Protocol):
    """An engine with its model."""

    facts: dict[str, Any]

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[float, float, int]:
        """See `Times`."""


def open_engine(path: str) -> Any:
    """The module of an engine file. Its name is its own, lest it hide the package that it drives."""
    spec = importlib.util.spec_from_file_location("hanlin_bench_engine", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def peak_memory() -> int:
    """Peak resident bytes of this process; 0 where the system doesn't say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


class Server:
    """Answers requests."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.engine: Engine | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Never raises, but for what ends the process."""
        try:
            return self._load(**request["load"]) if "load" in request else self._generate(**request["generate"])
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}

    def _load(self, model: str, settings: dict[str, Any]) -> dict[str, Any]:
        try:
            found = importlib.util.find_spec(self.module.REQUIRES)
        except ModuleNotFoundError:  # of a submodule's parent
            found = None
        if found is None:
            return {"missing": self.module.REQUIRES}
        importlib.import_module(self.module.REQUIRES)
        before, began = peak_memory(), time.perf_counter()
        self.engine = self.module.load(model, settings)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "facts": self.engine.facts, "before": before, "peak": peak_memory()}

    def _generate(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        assert self.engine is not None, "nothing is loaded"
        times = Times(*self.engine.generate(prompts, tokens))
        return {"times": times, "facts": self.engine.facts, "peak": peak_memory()}


def main(path: str) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).parent)]
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            requests.put(line)
        os._exit(0)  # whoever asked is gone; an engine in the middle of something would not notice

    threading.Thread(target=read, daemon=True).start()
    module = open_engine(path)
    os.environ.update(module.ENVIRONMENT)
    server = Server(module)
    while True:
        answers.write(json.dumps(server.answer(json.loads(requests.get()))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])

"""Contenders and workloads to a report: A B A B, with the memory's speed beside."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from hanlin.bench import machine
from hanlin.bench.driver import Contender, EngineProcess
from hanlin.bench.report import Entry, Report
from hanlin.bench.workloads import Workload, prompts
from hanlin.errors import CapacityError, EngineError

__all__ = ["Progress", "measure", "steps"]

_WARM_UP = 8  # tokens
_REST = 0.25  # seconds, for the threads of one engine to fall asleep before the next one's turn

# (what is going on, steps done)
Progress = Callable[[str, int], None]


def steps(contenders: int, workloads: int, repeats: int) -> int:
    """How many steps `measure` reports."""
    return contenders * (1 + workloads * (repeats + 1))


def measure(
    contenders: Sequence[Contender],
    workloads: Sequence[Workload],
    *,
    threads: int,
    repeats: int,
    progress: Progress = lambda doing, done: None,
) -> Report:
    """Load all contenders, warm each up, then give every workload to one after the other, `repeats` times over.

    The first contender must be one of ours: it tells the vocabulary that all prompts are drawn from. An engine that is
    missing or fails is left out from there on, and the report says why. Ctrl-C ends it with what was measured so far.

    Raises:
        EngineError: when one of ours cannot be loaded, or fails before it gave a figure.
        KeyboardInterrupt: before anything was measured.
    """
    assert contenders and contenders[0].ours and workloads
    report = Report(machine=machine.describe(), threads=threads, workloads=tuple(workloads))
    with ExitStack() as stack:
        run = _Run(report, progress, repeats)
        try:
            run.load(stack, contenders)
            for number in range(-1, repeats):
                for workload in workloads:
                    run.turn(workload, number)
        except KeyboardInterrupt:
            if not any(entry.values for entry in report.entries):
                raise
            report.interrupted = True
    return report


class _Run:
    def __init__(self, report: Report, progress: Progress, repeats: int) -> None:
        self.report, self.progress, self.repeats = report, progress, repeats
        self.processes: list[tuple[EngineProcess, Entry]] = []
        self.done = 0

    def load(self, stack: ExitStack, contenders: Sequence[Contender]) -> None:
        workloads = self.report.workloads
        sequences = max(workload.sequences for workload in workloads)
        length = max(workload.prompt + workload.tokens + 1 for workload in workloads)
        for contender in contenders:
            entry = Entry(name=contender.name, ours=contender.ours, model=contender.model)
            entry.options.update(contender.options)
            self.report.entries.append(entry)
            self._tell(f"{contender.name}: loading")
            try:
                process = stack.enter_context(
                    EngineProcess(contender, threads=self.report.threads, sequences=sequences, length=length)
                )
                process.load()
            except EngineError as error:
                self._failed(entry, error)
                continue
            entry.load_seconds, entry.facts = process.load_seconds, process.facts
            self.processes.append((process, entry))

    def turn(self, workload: Workload, number: int) -> None:
        """One run of a workload by everybody; number -1 is the warm-up, of which nothing is kept."""
        facts = self.report.entries[0].facts
        given = prompts(workload, number, vocabulary=facts["vocabulary"], special=frozenset(facts["special"]))
        tokens = workload.tokens if number >= 0 else min(workload.tokens, _WARM_UP)
        speeds = self._bandwidth(number)
        for process, entry in list(self.processes):
            round_ = f"run {number + 1} of {self.repeats}" if number >= 0 else "warming up"
            self._tell(f"{entry.name}: {workload.title}, {round_}")
            time.sleep(_REST)
            try:
                times = process.generate(given, tokens)
            except EngineError as error:
                self.processes.remove((process, entry))
                process.close()
                self._failed(entry, error)
                continue
            entry.peak_memory, entry.facts = process.peak_memory, process.facts
            if number >= 0:
                entry.add(workload, workload.values(*times))
                speeds += self._bandwidth(number)
        if speeds:  # it swings within seconds: the mean of before, between and after
            self.report.bandwidth.setdefault(workload.title, []).append(statistics.fmean(speeds))

    def _bandwidth(self, number: int) -> list[float]:
        """Of the memory just now; nothing while warming up, or without memory to spare."""
        try:
            return [machine.read_bandwidth(threads=self.report.threads)] if number >= 0 else []
        except CapacityError:
            return []

    def _failed(self, entry: Entry, error: EngineError) -> None:
        if entry.ours and not entry.values:
            raise EngineError(f"{entry.name}: {error}") from error
        entry.problem = str(error)

    def _tell(self, doing: str) -> None:
        self.progress(doing, self.done)
        self.done += 1

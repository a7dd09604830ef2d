"""What was measured, as numbers, as rows of a table, and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from hanlin.bench.workloads import FIGURES, Workload

__all__ = ["Entry", "Ratio", "Report", "Spread", "number"]

_HIDDEN = ("special",)  # facts that are no news to anybody


class Spread(NamedTuple):
    """Median, least and largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, unit: str = "") -> str:
        """203 (198-207)"""
        if number(self.low) == number(self.high):
            return f"{number(self.median)}{unit}"
        return f"{number(self.median)}{unit} ({number(self.low)}-{number(self.high)})"


class Ratio(NamedTuple):
    """How many times better one of ours did than a peer: by medians; the spread is that of the runs in pairs."""

    ours: str
    peer: str
    spread: Spread


@dataclass(kw_only=True)
class Entry:
    """One engine's results.

    Attributes:
        values: of a workload's title and a figure, one value a run.
        peak_memory: in bytes, of its whole process.
        problem: why it was left out, or did not finish.
    """

    name: str
    ours: bool
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    load_seconds: float = 0.0
    peak_memory: int = 0
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    problem: str = ""

    def add(self, workload: Workload, values: Mapping[str, float]) -> None:
        """Keep the figures of one run."""
        for figure, value in values.items():
            self.values.setdefault(workload.title, {}).setdefault(figure, []).append(value)

    def of(self, title: str, figure: str) -> list[float]:
        """The values of a figure, in the order of the runs."""
        return self.values.get(title, {}).get(figure, [])


@dataclass(kw_only=True)
class Report:
    """Everything that was measured in one go.

    Attributes:
        bandwidth: of a workload's title: GB/s read beside each of its runs.
        interrupted: whether it was ended before its time.
    """

    machine: str
    threads: int
    workloads: tuple[Workload, ...]
    entries: list[Entry] = field(default_factory=list)
    bandwidth: dict[str, list[float]] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def measured(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.values]

    def ratios(self, title: str, figure: str) -> list[Ratio]:
        """Each of ours against each peer that has this figure."""
        out = []
        for ours in self.measured:
            for peer in self.measured:
                a, b = ours.of(title, figure), peer.of(title, figure)
                if ours.ours and not peer.ours and a and b:
                    pairs = list(zip(a, b, strict=False))  # a peer may have failed on the way
                    whole = (statistics.median(a), statistics.median(b))
                    ratios = [x / y if FIGURES[figure].higher_is_better else y / x for x, y in (whole, *pairs)]
                    spread = Spread(ratios[0], min(ratios[1:]), max(ratios[1:]))
                    out.append(Ratio(ours.name, peer.name, spread))
        return out

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """(head, rows) of the table: an engine a column, then ours against each peer, then GB/s read beside."""
        entries = self.measured
        pairs = [(a.name, b.name) for a in entries if a.ours for b in entries if not b.ours]
        head = ["", *(entry.name for entry in entries), *(f"{a} / {b}" for a, b in pairs), "GB/s read"]
        rows = []
        for workload in self.workloads:
            for figure in workload.figures:
                found = {(r.ours, r.peer): r.spread.text("x") for r in self.ratios(workload.title, figure)}
                values = [entry.of(workload.title, figure) for entry in entries]
                speeds = self.bandwidth.get(workload.title, [])
                if any(values):
                    rows.append(
                        [
                            f"{workload.title}: {FIGURES[figure].title}",
                            *(Spread.of(v).text() if v else "-" for v in values),
                            *(found.get(pair, "-") for pair in pairs),
                            Spread.of(speeds).text() if speeds else "-",
                        ]
                    )
        blank = [""] * (len(pairs) + 1)
        rows.append(["loading, s", *(number(entry.load_seconds) for entry in entries), *blank])
        rows.append(["peak memory, MiB", *(number(entry.peak_memory / 2**20) for entry in entries), *blank])
        return head, rows

    def notes(self) -> list[str]:
        """What a reader of the table must know."""
        out = [f"{e.name} {e.facts.get('version', '')}: {e.model}{_options(e.options)}" for e in self.measured]
        failed = [entry for entry in self.entries if entry.problem]
        out += [f"{e.name} {'did not finish' if e.values else 'was left out'}: {e.problem}" for e in failed]
        return out + ["Interrupted: these are the runs until then."] * self.interrupted

    def as_json(self) -> dict[str, Any]:
        """Everything, with the ratios, for `json.dumps`."""
        out = asdict(self)
        for entry in out["entries"]:
            entry["facts"] = {name: value for name, value in entry["facts"].items() if name not in _HIDDEN}
        out["ratios"] = [
            {"workload": w.title, "figure": f, "ours": r.ours, "peer": r.peer, **r.spread._asdict()}
            for w in self.workloads
            for f in w.figures
            for r in self.ratios(w.title, f)
        ]
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """What `as_json` made."""
        own = {name: value for name, value in data.items() if name != "ratios"}
        own["workloads"] = tuple(Workload(**workload) for workload in own["workloads"])
        own["entries"] = [Entry(**entry) for entry in own["entries"]]
        return cls(**own)


def number(value: float) -> str:
    """Three figures, and whole numbers in full."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _options(options: Mapping[str, Any]) -> str:
    return "".join(f", {name} {value}" for name, value in options.items())

"""What every benchmark shares: dated result files that begin with the machine, and tables."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path

from hanlin.bench import describe

RESULTS = Path(__file__).parent / "results"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers with three figures."""

    def cell(value: object) -> str:
        return (
            f"{value:,.3g}"
            if isinstance(value, float) and abs(value) < 1000
            else (f"{value:,.0f}" if isinstance(value, float) else str(value))
        )

    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def write(name: str, title: str, *sections: str) -> Path:
    """Write benchmarks/results/DATE-name.md, the machine first, and print it."""
    day = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    path = RESULTS / f"{day}-{name}.md"
    RESULTS.mkdir(exist_ok=True)
    text = f"# {title}\n\n{day}. {describe()}.\n\n" + "\n\n".join(section.strip() for section in sections) + "\n"
    path.write_text(text, encoding="utf-8")
    print(text)
    return path

"""What every benchmark shares: the machine in words, a bandwidth probe, and dated result files."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """CPU, the instruction sets that matter, cores, memory, system, Python and torch, on one line."""
    import torch

    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    values = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in values.items()}
    name = values.get("model name", platform.processor() or platform.machine())
    family = f" (family {values['cpu family']}, model {values['model']})" if "cpu family" in values else ""
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "avx_vnni")
    flags = [flag for flag in known if flag in values.get("flags", "").split()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{name}{family}, {os.cpu_count()} cores, {', '.join(flags)}, {memory:.0f} GiB; {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def read_bandwidth(size: int = 1 << 30, repeats: int = 3) -> float:
    """GB/s of reading memory with all of torch's threads; the best of a few passes."""
    import torch

    data = torch.ones(size // 8, dtype=torch.int64)
    best = 0.0
    for _ in range(repeats):
        began = time.perf_counter()
        int(data.sum())
        best = max(best, size / (time.perf_counter() - began) / 1e9)
    return best


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
    text = f"# {title}\n\n{day}. {machine()}.\n\n" + "\n\n".join(section.strip() for section in sections) + "\n"
    path.write_text(text, encoding="utf-8")
    print(text)
    return path

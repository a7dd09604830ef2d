"""From nothing to the first token: a first start, later ones, the time to read the packed weights, peak memory.

    python benchmarks/start.py [--model NAME] [--weights KIND] [--repeats 3] [--context 4096] [--work FOLDER] [--keep]

Every start is a process of its own; reads of the packed file from the page cache stand between them. NAME is one that
benchmarks/models.py can make; it is made in the working directory, and removed unless it was there, or with --keep.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import models
import report

from hanlin.bench.machine import read_bandwidth

CHILD = """
import json, sys, time
from pathlib import Path
began = float(sys.argv[1])
path, weights, cached, context = sys.argv[2], sys.argv[3], sys.argv[4] == "cached", int(sys.argv[5])

def resident():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(status[key].split()[0]) * 1024 for key in ("VmHWM", "RssAnon", "RssFile")}

import hanlin.chat, hanlin.hub, hanlin.llm, hanlin.tokenizers, hanlin.tokenizers.gguf
imported = time.time()
before = resident()
llm = hanlin.load(path, weights=weights, packed_cache=cached, session_len=4096, cache_max_entry_count=128)
loaded = time.time()
llm.generate([[1, 2, 3, 4, 5, 6, 7, 8]], max_tokens=1, temperature=0)
first = time.time()
lowering_bytes = llm.engine.runner.weight_bytes
out = {
    "import": imported - began, "load": loaded - imported, "first token": first - loaded, "peak": resident()["VmHWM"],
    "weights": lowering_bytes, "kv": llm.engine.runner.block_bytes * 128, "before": before["VmHWM"],
}
if context:
    prompt = [3 + n % 1000 for n in range(context - 8)]
    step = time.time()
    llm.generate([prompt], max_tokens=4, temperature=0, ignore_eos=True)
    out |= {"context": time.time() - step, "context peak": resident()["VmHWM"]}
llm.close()
out["close"] = time.time() - first
print(json.dumps(out))
"""


def start(path: Path, weights: str, home: Path, *, cached: bool = True, context: int = 0) -> dict[str, float]:
    environment = os.environ | {"HANLIN_HOME": str(home)}
    command = [
        sys.executable,
        "-c",
        CHILD,
        str(time.time()),
        str(path),
        weights,
        "cached" if cached else "",
        str(context),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def read_again(path: Path) -> float:
    """Seconds to read a file from the page cache, 1 MiB at a time into the same memory: what is fastest."""
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        began = time.perf_counter()
        while file.readinto(buffer):
            pass
        return time.perf_counter() - began


def read_whole(path: Path) -> float:
    """Seconds to read it into memory of its own, as a program must that doesn't map it."""
    import numpy as np

    began = time.perf_counter()
    np.fromfile(path, np.uint8)
    return time.perf_counter() - began


def measure(path: Path, weights: str, repeats: int, context: int) -> list[tuple[str, Any]]:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        home = Path(folder)
        uncached = start(path, weights, home, cached=False)
        first = start(path, weights, home)
        (packed,) = (home / "packed").glob("*.packed")
        read_again(packed)
        rounds = [(read_again(packed), start(path, weights, home), read_whole(packed)) for _ in range(repeats)]
        long = start(path, weights, home, context=context) if context else {}
        size = packed.stat().st_size
    best = min((turn for _, turn, _ in rounds), key=lambda turn: turn["load"] + turn["first token"])
    to_first = [turn["load"] + turn["first token"] for _, turn, _ in rounds]
    again, whole = ([turn[n] for turn in rounds] for n in (0, 2))
    rows: list[tuple[str, Any]] = [
        ("packed file, GB", size / 1e9),
        ("import of hanlin and torch, s", statistics.median(turn["import"] for _, turn, _ in rounds)),
        ("first start: load, s", first["load"]),
        ("first start: to first token behind the import, s", first["load"] + first["first token"]),
        ("first start: closing, which waits for the file, s", first["close"]),
        ("without the cache: to first token behind the import, s", uncached["load"] + uncached["first token"]),
        ("second start: to first token behind the import, s, median", statistics.median(to_first)),
        ("second start: the same, best", min(to_first)),
        ("second start: of the best, load / first token, s", f"{best['load']:.2f} / {best['first token']:.2f}"),
        ("reading the file from the page cache into one buffer, s, median", statistics.median(again)),
        ("the same, best", min(again)),
        ("reading it from the page cache into fresh memory, s, median", statistics.median(whole)),
        ("second start / reading into one buffer, median of pairs", statistics.median(map(ratio, to_first, again))),
        ("second start / reading into fresh memory, median of pairs", statistics.median(map(ratio, to_first, whole))),
        ("first start: peak memory, GB", first["peak"] / 1e9),
        ("second start: peak memory, GB", best["peak"] / 1e9),
        ("weights, GB", first["weights"] / 1e9),
        ("before loading (Python, torch), GB", first["before"] / 1e9),
    ]
    if long:
        rows += [
            (f"prompt of {context - 8} tokens, s", long["context"]),
            ("KV cache of 4,096 tokens, GB", long["kv"] / 1e9),
            ("peak memory behind that prompt, GB", long["context peak"] / 1e9),
            ("peak / (weights + KV)", long["context peak"] / (long["weights"] + long["kv"])),
        ]
    return rows


def ratio(a: float, b: float) -> float:
    return a / b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="internlm2-7b.Q4_0.gguf")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--context", type=int, default=0, help="tokens of a long prompt for the peak memory; 0: none")
    parser.add_argument("--work", type=Path, help="by default a temporary directory")
    parser.add_argument("--keep", action="store_true", help="keep the model file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        there = (work / given.model).exists()
        path = models.made(work, given.model, sys.executable)
        try:
            load = os.getloadavg()[0]
            rows = measure(path, given.weights, given.repeats, given.context)
        finally:
            if not (there or given.keep):
                path.unlink()
    report.write(
        "start",
        f"Starts of {given.model}, weights={given.weights}",
        report.table(("what", "measured"), rows),
        f"Load average at the beginning: {load:.1f}; read bandwidth at the end: {read_bandwidth():.1f} GB/s.",
    )


if __name__ == "__main__":
    main()

"""64 prompts in one call against one at a time, and peak memory against weights and cache.

python benchmarks/engine.py [--model MODEL] [--prompts 64] [--tokens 32] [option=value ...]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import report

import hanlin
from hanlin.bench import read_bandwidth

TOPICS = "the sea, bread, trains, winter, music, gardens, money, sleep".split(", ")


def prompts(count: int) -> list[list[dict[str, str]]]:
    return [
        [{"role": "user", "content": f"Question {n}: tell me something about {TOPICS[n % len(TOPICS)]}."}]
        for n in range(count)
    ]


def resident() -> tuple[int, int]:
    """(now, peak) resident bytes of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return tuple(int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def measure(model: str | None, count: int, tokens: int, options: dict[str, object]) -> list[tuple[str, object]]:
    import torch

    torch.ones(8) @ torch.ones(8)
    before, _ = resident()
    with hanlin.load(model, **options) as llm:
        sampling = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        conversations = prompts(count)
        llm.chat(conversations[0], **sampling)
        began = time.perf_counter()
        alone = [llm.chat(conversation, **sampling) for conversation in conversations]
        one_by_one = time.perf_counter() - began
        llm.engine.blocks.clear_cache()
        began = time.perf_counter()
        together = llm.chat(conversations, **sampling)
        at_once = time.perf_counter() - began
        assert [c.ids for c in alone] == [c.ids for c in together], "promise 2 is broken"
        used = llm.engine.used_bytes()
        _, peak = resident()
        return [
            ("runner", llm.engine.runner.name),
            ("load, seconds", llm.load_seconds),
            ("one at a time, generated tokens/s", count * tokens / one_by_one),
            (f"{count} in one call, generated tokens/s", count * tokens / at_once),
            ("ratio", one_by_one / at_once),
            ("same bytes", "yes"),
            ("before loading (Python, torch), MiB", before / 2**20),
            ("weights, MiB", used["weights"] / 2**20),
            ("cache touched, MiB", used["cache"] / 2**20),
            ("peak, MiB", peak / 2**20),
            ("peak over (before + weights + cache)", peak / (before + used["weights"] + used["cache"])),
        ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--one", action="store_true", help="measure in this process and print the rows")
    parser.add_argument("options", nargs="*")
    args = parser.parse_args()
    if args.one:
        options = dict(o.split("=", 1) for o in args.options)
        for name, value in measure(args.model, args.prompts, args.tokens, options):
            print(f"{name}\t{value}")
        return
    columns, names = [], []
    for chosen in (["weights=auto"], ["dtype=bfloat16"], ["dtype=float32"], ["dtype=bfloat16", "runner=torch"]):
        command = [sys.executable, __file__, "--one", "--prompts", str(args.prompts), "--tokens", str(args.tokens)]
        out = subprocess.run([*command, *chosen], check=True, capture_output=True, text=True).stdout
        rows = [line.split("\t") for line in out.splitlines() if "\t" in line]
        names = [name for name, _ in rows]
        columns.append([" ".join(chosen), *(value for _, value in rows)])
    head = ["", *(str(column[0]) for column in columns)]
    body = [[name, *(_number(column[row + 1]) for column in columns)] for row, name in enumerate(names)]
    report.write(
        "engine",
        "Many prompts at once, and memory",
        f"The default model, {args.prompts} chat prompts, {args.tokens} greedy tokens each; a process a column. "
        "Memory bandwidth beside: " + f"{read_bandwidth():.0f} GB/s read.",
        report.table(head, body),
    )


def _number(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()

"""How fast the CPU library multiplies: GB/s of weights and GOP/s, by kind and by rows, beside the memory's own speed.

    python benchmarks/kernels.py [--threads N] [--isa NAME] [--shape 4096x2048] [--kinds INT4,INT8] [--repeats 15]

Weights are read round and round from more memory than any cache holds, so few rows meet the memory's speed and many
rows the arithmetic's. Every figure is the best of the repeats: what the machine can do when nobody else wants it.
"""

from __future__ import annotations

import argparse
import itertools
import time

import numpy as np
import report

from hanlin.bench import read_bandwidth
from hanlin.kernels.native import Arena, Context, Kind, PackedWeight, packed_bytes

GROUPS = {Kind.INT8: (32, 128), Kind.INT4: (32, 128), Kind.INT4_MIN: (32,), Kind.INT4_ZERO: (128,)}
ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
COLD = 256 << 20  # bytes of weights to go round in


def measure(
    context: Context, kind: Kind, group: int, wide: bool, out: int, width: int, repeats: int
) -> list[tuple[float, float]]:
    """(GB/s of weights, GOP/s) for each count of rows."""
    size = packed_bytes(kind, out, width, group)
    copies = -(-COLD // size)
    arena = Arena(copies * size)
    weights = [PackedWeight(kind, out, width, group, wide=wide, arena=arena) for _ in range(copies)]
    rng = np.random.default_rng(0)
    context.pack(weights[0], rng.standard_normal((out, width), dtype=np.float32))
    for weight in weights[1:]:
        weight.memory[:] = weights[0].memory
    found = []
    for rows in ROWS:
        x, y = rng.standard_normal((rows, width), dtype=np.float32), np.empty((rows, out), dtype=np.float32)
        turn = itertools.cycle(weights)
        calls = max(1, copies // max(1, rows // 4))
        best = float("inf")
        for _ in range(repeats):
            began = time.perf_counter()
            for weight in itertools.islice(turn, calls):
                context.linear(weight, x, out=y)
            best = min(best, (time.perf_counter() - began) / calls)
        found.append((size / best / 1e9, 2 * rows * out * width / best / 1e9))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--isa")
    parser.add_argument("--shape", default="4096x2048", help="outputs x inputs")
    parser.add_argument("--kinds", default=",".join(kind.name for kind in Kind))
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    out, width = map(int, options.shape.split("x"))
    table = []
    with Context(options.threads, options.isa) as context:
        for name in options.kinds.split(","):
            kind = Kind[name]
            for group, wide in itertools.product(
                GROUPS.get(kind, (0,)), (False, True) if kind >= Kind.INT8_ROW else (False,)
            ):
                before = read_bandwidth(threads=context.threads)
                found = measure(context, kind, group, wide, out, width, options.repeats)
                speed = max(before, read_bandwidth(threads=context.threads))
                label = f"{name.lower()}{f' {group}' if group else ''}{', 12-bit inputs' if wide else ''}"
                row = [label, speed, *(f"{gb:.1f} ({gb / speed:.0%})" for gb, _ in found[:2])]
                table.append([*row, *(f"{ops:.0f}" for _, ops in found[2:])])
                print(*table[-1], flush=True)
        head = ["kind", "read GB/s", *(f"{n} rows GB/s" for n in ROWS[:2]), *(f"{n} rows GOP/s" for n in ROWS[2:])]
        title = f"Products {options.shape}, {context.threads} threads, {context.isa}"
    report.write("kernels", title, report.table(head, table))


if __name__ == "__main__":
    main()

"""What `hanlin quantize` costs in perplexity: rounding, AWQ and GPTQ with groups of 128, 64 and 32, and 8 bits.

    python benchmarks/quantise.py DATA --work WORK [--calibration 16] [--windows 16] [--only awq-4-32,...]

DATA is a folder with `wikitext2_raw` and `zh_text`. Calibrated is on WikiText-2's validation text and the Chinese
dev text, measured on the test texts of both, by loading each result with weights="bfloat16". What was measured is kept
in WORK, and the page is written from all that is kept.

The real weights at hand, SmolLM2's, were in 4 bits and groups of 32 before (Q4_1). So most is done on the same model
with its channels shuffled: the same function, of numbers on no grid; the last kinds are of the file as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import models
import numpy as np
import report
import torch
from quality import WINDOW, compared, losses, text

import hanlin
from hanlin import hub
from hanlin.compress.calibration import Windows, read_windows
from hanlin.compress.quantise import Settings, quantise
from hanlin.tokenizers import load_tokenizer

# Groups of 128 do not divide SmolLM2's 576 columns; GPTQ's files have a shorter last group.
KINDS: dict[str, tuple[bool, Settings]] = {
    **{
        f"{method}-4-{group}": (
            True,
            Settings(method=method, group_size=group, symmetric=False, format="gptq" if group == 128 else None),
        )
        for group in (128, 32, 64)
        for method in ("rtn", "awq", "gptq")
    },
    "gptq-4-128 symmetric": (True, Settings(method="gptq")),
    "rtn-8-64": (True, Settings(method="rtn", bits=8, group_size=64)),
    "gptq-8-64": (True, Settings(method="gptq", bits=8, group_size=64)),
    **{
        f"{method}-4-{group} on Q4_1's grid": (
            False,
            Settings(method=method, group_size=group, symmetric=False, format="gptq" if group == 128 else None),
        )
        for method, group in (("rtn", 32), ("awq", 32), ("rtn", 128), ("awq", 128))
    },
}


def measured(path: Path, sources: dict[str, str], count: int) -> dict[str, list[float]]:
    """The loss of each window, by language."""
    found = {}
    with hanlin.load(path, weights="bfloat16", cache_bytes=100 << 20, threads=torch.get_num_threads()) as llm:
        for language, source in sources.items():
            ids = llm.tokenizer.encode(source[: count * WINDOW * 8])[: count * WINDOW]
            found[language] = losses(llm, [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)])
    return found


def calibration(data: Path, work: Path, source: Path, count: int) -> Windows:
    """Half English, half Chinese."""
    tokenizer, cut = load_tokenizer(source), []
    for name, packed in (("en", "wikitext2_raw/wiki.valid.raw.gz"), ("zh", "zh_text/wiki_gsdsimp_dev.txt.gz")):
        plain = work / f"calibration-{name}.txt"
        plain.write_text(text(data / packed), encoding="utf-8")
        cut.append(read_windows(plain, tokenizer, samples=count // 2, length=WINDOW, measured=0).calibration)
    return Windows(np.concatenate(cut), np.zeros((0, WINDOW), np.int64))


def write(kept: dict[str, Any], counts: tuple[int, int]) -> None:
    base, rows = kept["bfloat16"], []
    for name in ("bfloat16", *KINDS):
        if name in kept:
            row: list[object] = [name]
            for language in ("english", "chinese"):
                own = kept[name][language]
                change = compared(own, base[language]) if name != "bfloat16" else ""
                row += [f"{math.exp(sum(own) / len(own)):.4f}", change]
            rows.append([*row, f"{kept[name]['bytes'] / 2**20:.1f}"])
    report.write(
        "quantise",
        "What quantising costs in quality",
        f"SmolLM2-135M-Instruct; method-bits-columns of a group, zero points with 4 bits. Calibrated on {counts[0]} "
        f"windows of {WINDOW} tokens, half WikiText-2 (validation), half Chinese Wikipedia (UD GSDSimp, dev); "
        f"perplexity of {counts[1]} windows of each test text. Changes, with standard errors, are against "
        "bfloat16. The sizes are of whole files, of which the embedding in float16 is more than half.",
        report.table(["kind", "English", "change", "Chinese", "change", "MiB"], rows),
        "The channels are shuffled, but for the last rows: the original file is on a grid of 4 bits in groups of 32 "
        "with any minimum. Formats with whole zero points cannot hold that grid, so rounding to it again costs as much "
        "as any rounding.",
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--calibration", type=int, default=16, help="windows")
    parser.add_argument("--windows", type=int, default=16, help="of each language that are measured")
    parser.add_argument("--only", default=",".join(KINDS))
    args = parser.parse_args()
    shuffled = models.made(args.work, "smollm2-135m.shuffled", sys.executable)
    texts = {
        "english": text(args.data / "wikitext2_raw" / "wiki.test.raw.gz"),
        "chinese": text(args.data / "zh_text" / "wiki_gsdsimp_test.txt.gz"),
    }
    windows = calibration(args.data, args.work, shuffled, args.calibration)
    keeping = args.work / f"quantise-{args.calibration}-{args.windows}.json"
    kept: dict[str, Any] = json.loads(keeping.read_text()) if keeping.exists() else {}
    if "bfloat16" not in kept:
        size = (shuffled / "model.safetensors").stat().st_size // 2
        kept["bfloat16"] = measured(shuffled, texts, args.windows) | {"bytes": size}
    for name in (name for name in KINDS if name in args.only.split(",") and name not in kept):
        mixed, settings = KINDS[name]
        source = shuffled if mixed else hub.resolve().path
        target = args.work / "quantised"
        shutil.rmtree(target, ignore_errors=True)
        files = {} if mixed else {path.name: path.read_bytes() for path in shuffled.glob("tokenizer*")}
        began = time.perf_counter()
        done = quantise(source, target, settings, windows=None if settings.method == "rtn" else windows, files=files)
        kept[name] = measured(target, texts, args.windows) | {"bytes": done.written_bytes}
        keeping.write_text(json.dumps(kept))
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        write(kept, (len(windows.calibration), args.windows))


if __name__ == "__main__":
    main()

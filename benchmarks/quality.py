"""What each kind of weight and cache costs in quality: perplexity on English and Chinese text, and ARC.

    python benchmarks/quality.py DATA [--tokens 40000] [--questions 300]

DATA is a folder with `wikitext2_raw`, `zh_text` and `arc`. All kinds see the same windows and questions, so their
differences are paired; the file that the weights come from is 4-bit already (Q4_1), so float32 is the reference.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import report

import hanlin

KINDS: dict[str, dict[str, str]] = {
    "float32": {"weights": "float32"},
    "bfloat16": {"weights": "bfloat16"},
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4"},
    "GGUF blocks as they are": {"weights": "auto"},
    "bfloat16, cache int8": {"weights": "bfloat16", "kv_cache": "int8"},
    "bfloat16, cache int4": {"weights": "bfloat16", "kv_cache": "int4"},
}
WINDOW = 512


def text(path: Path) -> str:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def windows(llm: hanlin.LLM, source: str, tokens: int) -> list[list[int]]:
    ids = llm.tokenizer.encode(source[: tokens * 8])[:tokens]
    return [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]


def mean_loss(llm: hanlin.LLM, chunks: list[list[int]]) -> float:
    scores = llm.score(chunks)
    return -sum(s.total for s in scores) / sum(len(s.ids) - 1 for s in scores)


def questions(data: Path, count: int) -> Iterator[tuple[str, list[str], int]]:
    """(question, choices, place of the right one), half easy and half hard."""
    for name in ("ARC-Easy-Test", "ARC-Challenge-Test"):
        for line in text(data / "arc" / f"{name}.jsonl.gz").splitlines()[: count // 2]:
            row = json.loads(line)
            choices = row["question"]["choices"]
            labels = [choice["label"] for choice in choices]
            yield row["question"]["stem"], [choice["text"] for choice in choices], labels.index(row["answerKey"])


def arc(llm: hanlin.LLM, rows: list[tuple[str, list[str], int]]) -> float:
    """Share of questions whose right answer is likeliest per character, as SmolLM2's card scores it."""
    prompts, spans = [], []
    for question, choices, _ in rows:
        start = llm.tokenizer.encode(f"Question: {question}\nAnswer:")
        for choice in choices:
            prompts.append([*start, *llm.tokenizer.encode(" " + choice)])
            spans.append((len(start), len(choice)))
    values = [
        sum(v or 0.0 for v in s.logprobs[first:]) / size
        for s, (first, size) in zip(llm.score(prompts), spans, strict=True)
    ]
    right, place = 0, 0
    for _, choices, answer in rows:
        own = values[place : place + len(choices)]
        right += own.index(max(own)) == answer
        place += len(choices)
    return right / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--questions", type=int, default=300)
    args = parser.parse_args()
    english = text(args.data / "wikitext2_raw" / "wiki.test.raw.gz")
    chinese = text(args.data / "zh_text" / "wiki_gsdsimp_test.txt.gz") + text(
        args.data / "zh_text" / "wiki_gsdsimp_dev.txt.gz"
    )
    asked = list(questions(args.data, args.questions))
    rows: list[list[object]] = []
    base: tuple[float, float] | None = None
    for name, options in KINDS.items():
        began = time.perf_counter()
        with hanlin.load(cache_bytes=400 << 20, **options) as llm:
            losses = (
                mean_loss(llm, windows(llm, english, args.tokens)),
                mean_loss(llm, windows(llm, chinese, args.tokens)),
            )
            share = arc(llm, asked)
        base = base or losses
        change = [100 * math.expm1(loss - first) for loss, first in zip(losses, base, strict=True)]
        rows.append(
            [
                name,
                f"{math.exp(losses[0]):.4f}",
                f"{change[0]:+.3f}%",
                f"{math.exp(losses[1]):.4f}",
                f"{change[1]:+.3f}%",
                f"{100 * share:.1f}%",
            ]
        )
        print(rows[-1], f"{time.perf_counter() - began:.0f} s", flush=True)
    noise = 100 * math.sqrt(0.25 / len(asked))
    report.write(
        "quality",
        "What each kind costs in quality",
        f"SmolLM2-135M-Instruct out of its Q4_1 file. Perplexity of {args.tokens:,} tokens of WikiText-2 and Chinese "
        f"Wikipedia (UD GSDSimp), windows of {WINDOW}; {len(asked)} ARC questions (standard deviation "
        f"{noise:.1f} points). int4 of this file is lossless, for it was 4-bit with groups of 32 already.",
        report.table(["kind", "English", "change", "Chinese", "change", "ARC"], rows),
    )


if __name__ == "__main__":
    main()

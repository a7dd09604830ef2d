"""What each kind of weight and cache costs in quality: perplexity on English and Chinese text, and ARC.

    python benchmarks/quality.py DATA --work WORK [--rounds 10]

DATA is a folder with `wikitext2_raw`, `zh_text` and `arc`. All kinds see the same windows and questions, so their
differences are paired, and told with their standard errors. Round by round every kind takes 2,048 more tokens of each
language and 10 more questions; what was measured is kept in WORK, and the page is written anew after every round.

The file that the weights come from is 4-bit already, in groups of 32 (Q4_1): what finds these groups again loses
nothing. So two kinds are measured once more on the same model with its channels shuffled, whose weights are on no grid.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import models
import report
import torch

import hanlin
from hanlin import hub

# Options of `hanlin.load`, the shuffled model, and what the kind is compared with.
KINDS: dict[str, tuple[dict[str, str], bool, str]] = {
    "float32": ({"weights": "float32"}, False, "float32"),
    "bfloat16": ({"weights": "bfloat16"}, False, "float32"),
    "int8": ({"weights": "int8"}, False, "bfloat16"),
    "int8, channels shuffled": ({"weights": "int8"}, True, "bfloat16"),
    "int4": ({"weights": "int4"}, False, "bfloat16"),
    "int4, channels shuffled": ({"weights": "int4"}, True, "bfloat16"),
    "GGUF blocks as they are": ({"weights": "auto"}, False, "bfloat16"),
    "bfloat16, cache int8": ({"weights": "bfloat16", "kv_cache": "int8"}, False, "bfloat16"),
    "bfloat16, cache int4": ({"weights": "bfloat16", "kv_cache": "int4"}, False, "bfloat16"),
}
WINDOW = 512
WINDOWS, QUESTIONS = 4, 10  # of a round, for each language


def text(path: Path) -> str:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def windows(llm: hanlin.LLM, source: str, number: int) -> list[list[int]]:
    """Those of a round."""
    first, size = number * WINDOWS, WINDOWS * WINDOW
    ids = llm.tokenizer.encode(source[: (first + WINDOWS) * WINDOW * 8])[first * WINDOW :][:size]
    return [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]


def losses(llm: hanlin.LLM, chunks: list[list[int]]) -> list[float]:
    """The mean loss of each window's tokens, but for its first."""
    return [-score.total / (len(score.ids) - 1) for score in llm.score(chunks)]


def questions(data: Path, count: int) -> Iterator[tuple[str, list[str], int]]:
    """(question, choices, place of the right one), half easy and half hard."""
    for name in ("ARC-Easy-Test", "ARC-Challenge-Test"):
        for line in text(data / "arc" / f"{name}.jsonl.gz").splitlines()[: count // 2]:
            row = json.loads(line)
            choices = row["question"]["choices"]
            labels = [choice["label"] for choice in choices]
            yield row["question"]["stem"], [choice["text"] for choice in choices], labels.index(row["answerKey"])


def arc(llm: hanlin.LLM, rows: list[tuple[str, list[str], int]]) -> list[bool]:
    """Whether each question's right answer is likeliest per character, as SmolLM2's card scores it."""
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
    right, place = [], 0
    for _, choices, answer in rows:
        own = values[place : place + len(choices)]
        right.append(own.index(max(own)) == answer)
        place += len(choices)
    return right


def compared(own: Sequence[float], other: Sequence[float]) -> str:
    """How much higher a perplexity is, in per cent, with the standard error of that over the windows."""
    differences = [a - b for a, b in zip(own, other, strict=True)]
    mean = sum(differences) / len(differences)
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / max(1, len(differences) - 1) / len(differences))
    return f"{100 * math.expm1(mean):+.3f}% ± {100 * spread:.3f}"


def write(kept: dict[str, Any]) -> None:
    """The page, of the rounds that every kind has been through."""
    rounds = min(len(kept.get(name, ())) for name in KINDS)
    if not rounds:
        return

    def of(name: str, what: str) -> list[Any]:
        return [value for done in kept[name][:rounds] for value in done[what]]

    rows = []
    for name, (_, _, base) in KINDS.items():
        row = [name]
        for what in ("english", "chinese"):
            own = of(name, what)
            row += [f"{math.exp(sum(own) / len(own)):.4f}", compared(own, of(base, what)) if base != name else ""]
        right = of(name, "arc")
        other = of(base, "arc")
        changed = sum(a != b for a, b in zip(right, other, strict=True))
        rows.append([*row, f"{100 * sum(right) / len(right):.1f}%", changed if base != name else ""])
    windows, asked = len(of("float32", "english")), len(of("float32", "arc"))
    report.write(
        "quality",
        "What each kind costs in quality",
        f"SmolLM2-135M-Instruct out of its Q4_1 file. Perplexity of {windows * WINDOW:,} tokens of WikiText-2 (test) "
        f"and as many of Chinese Wikipedia (UD GSDSimp, test and dev), in windows of {WINDOW}; {asked} ARC questions, "
        f"half easy, half hard (standard deviation {100 * math.sqrt(0.25 / asked):.1f} points). Changes, with standard "
        "errors, are against bfloat16, whose own is against float32; so are answers that became right or wrong.",
        report.table(["kind", "English", "change", "Chinese", "change", "ARC", "answers changed"], rows),
        "int4 of this file loses nothing, for it was 4-bit with groups of 32 already. With its channels shuffled it is "
        "the same function, but its weights are on no grid, as those of a model that was never quantised.",
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    english = text(args.data / "wikitext2_raw" / "wiki.test.raw.gz")
    chinese = "".join(text(args.data / "zh_text" / f"wiki_gsdsimp_{part}.txt.gz") for part in ("test", "dev"))
    asked = list(questions(args.data, args.rounds * QUESTIONS))
    asked = [row for pair in zip(asked[: len(asked) // 2], asked[len(asked) // 2 :], strict=True) for row in pair]
    sources = [hub.resolve().path, models.made(args.work, "smollm2-135m.shuffled", "")]
    keeping = args.work / "quality.json"
    kept: dict[str, Any] = json.loads(keeping.read_text()) if keeping.exists() else {}
    for number in range(args.rounds):
        for name, (options, shuffled, _) in KINDS.items():
            done = kept.setdefault(name, [])
            if len(done) > number:
                continue
            began = time.perf_counter()
            with hanlin.load(
                sources[shuffled], cache_bytes=400 << 20, threads=torch.get_num_threads(), **options
            ) as llm:  # type: ignore[arg-type]
                done.append(
                    {
                        "english": losses(llm, windows(llm, english, number)),
                        "chinese": losses(llm, windows(llm, chinese, number)),
                        "arc": arc(llm, asked[number * QUESTIONS :][:QUESTIONS]),
                    }
                )
            keeping.write_text(json.dumps(kept))
            print(f"round {number}, {name}: {time.perf_counter() - began:.0f} s", flush=True)
        write(kept)


if __name__ == "__main__":
    main()

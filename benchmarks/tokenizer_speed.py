"""InternLM2's tokenizer against SentencePiece and against the fast tokenizer that Transformers makes of the same file.

    python benchmarks/tokenizer_speed.py            # tokens per second, side by side; writes benchmarks/results
    python benchmarks/tokenizer_speed.py --check    # ids and text on every file of ../shared/data; takes minutes

All three run in turn on the same texts within one process and thread, several rounds; what is quoted are medians. Their
ids are compared first. Times are of the process's own CPU, so that a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import report
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers

from hanlin.tokenizers.spm import SentencePieceTokenizer, known_added
from hanlin.tokenizers.spm_model import NORMAL, USER_DEFINED, SpmModel

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests" / "data" / "tokenizer_internlm2.model"
DATA = ROOT.parent / "shared" / "data"
TEXTS = {
    "Chinese novel": "zh_text/hongloumeng.txt.gz",
    "Chinese encyclopedia": "zh_text/wiki_gsdsimp_dev.txt.gz",
    "English novel": "en_haystack/war-and-peace.txt.gz",
    "Python code": "mbpp/mbpp.jsonl.gz",
    "bilingual chats": "moss_chat/conversations_without_plugins.jsonl.gz",
}


def fast(model: SpmModel) -> tokenizers.Tokenizer:
    """The `tokenizers` BPE of a SentencePiece model: a merge for each way to split a piece in two, best score first.

    As Transformers' `generate_merges`, but for control pieces.
    """
    ids = {piece: i for i, piece in enumerate(model.pieces)}
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, score, kind in zip(model.pieces, model.scores, model.kinds, strict=True):
        if kind in (NORMAL, USER_DEFINED):
            halves = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
            merges += [(-score, ids[a], ids[b], a, b) for a, b in halves if a in ids and b in ids]
    merges.sort(key=lambda merge: merge[:3])
    pairs = [(a, b) for *_, a, b in merges]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=ids, merges=pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def read(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


def seconds(call: Callable[[str], object], texts: Sequence[str]) -> float:
    began = time.process_time()
    for text in texts:
        call(text)
    return time.process_time() - began


def pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def sections(rounds: int) -> Iterator[str]:
    data = MODEL.read_bytes()
    began = time.process_time()
    model = SpmModel.parse(data, MODEL.name)
    ours = SentencePieceTokenizer(model, added=known_added(model))
    loaded = time.process_time() - began
    library = sentencepiece.SentencePieceProcessor(model_proto=data)
    rival = fast(model)
    calls: dict[str, Callable[[str], object]] = {
        "hanlin": ours.encode,
        "sentencepiece": library.encode,
        "fast": lambda text: rival.encode(text, add_special_tokens=False).ids,
    }
    rows = []
    for size in (500, 4_000, 1_000_000):
        for name, file in TEXTS.items():
            texts = pieces(read(DATA / file)[:1_000_000], size)
            expected = [library.encode(text) for text in texts]
            wrong = sum(rival.encode(text).ids != ids for text, ids in zip(texts, expected, strict=True))
            if [ours.encode(text) for text in texts] != expected or wrong:
                raise SystemExit(f"ids differ on {name} in pieces of {size} ({wrong} in the fast tokenizer)")
            count = sum(map(len, expected))
            times: dict[str, list[float]] = {who: [] for who in calls}
            for _ in range(rounds):
                for who, call in calls.items():
                    times[who].append(seconds(call, texts))
            rate = {who: count / statistics.median(spent) for who, spent in times.items()}
            ratios = {
                who: statistics.median(a / b for a, b in zip(times[who], times["hanlin"], strict=True)) for who in calls
            }
            rows.append((name, f"{size:,}", f"{count:,}", *rate.values(), ratios["sentencepiece"], ratios["fast"]))
    head = ("text", "characters a call", "tokens", "hanlin", "sentencepiece", "fast", "x sentencepiece", "x fast")
    yield (
        "Encoding, tokens/s, one thread; the last two columns are how many times faster Hanlin is.\n\n"
        + report.table(head, rows)
    )
    yield decoding(ours, library, rival, rounds)
    yield (
        f"Loading the .model file: {loaded:.2f} s. Versions: sentencepiece {version('sentencepiece')}, tokenizers "
        f"{version('tokenizers')}. Ids of all three were equal on all of these texts. CPU time of the "
        "process; other programs were running, so the rates are rough, and the ratios, taken in turn, better."
    )


def decoding(
    ours: SentencePieceTokenizer,
    library: sentencepiece.SentencePieceProcessor,
    rival: tokenizers.Tokenizer,
    rounds: int,
) -> str:
    ids = ours.encode(read(DATA / TEXTS["bilingual chats"])[:400_000])

    def stream() -> None:
        detokenizer = ours.detokenizer()
        for i in ids:
            detokenizer.push([i])
        detokenizer.finish()

    def rival_stream() -> None:
        step = decoders.DecodeStream(skip_special_tokens=True)
        for i in ids:
            step.step(rival, i)

    ways: dict[str, Callable[[], object]] = {
        "hanlin, whole": lambda: ours.decode(ids),
        "sentencepiece, whole": lambda: library.decode(ids),
        "fast, whole": lambda: rival.decode(ids),
        "hanlin, one token at a time": stream,
        "fast, one token at a time": rival_stream,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            began = time.process_time()
            call()
            times[name].append(time.process_time() - began)
    rows = [(name, len(ids) / statistics.median(spent)) for name, spent in times.items()]
    return f"Decoding {len(ids):,} tokens of bilingual chats, tokens/s.\n\n" + report.table(("way", "tokens/s"), rows)


def check() -> None:
    """Compare ids and text with SentencePiece's on every text file of the data folder, each in one piece."""
    data = MODEL.read_bytes()
    model = SpmModel.parse(data, MODEL.name)
    ours = SentencePieceTokenizer(model, added=known_added(model))
    library = sentencepiece.SentencePieceProcessor(model_proto=data)
    files = tokens = characters = 0
    wrong = []
    for path in sorted(DATA.rglob("*")):
        if path.suffix in (".gz", ".json", ".jsonl", ".txt", ".md"):
            text = read(path)
            ids = ours.encode(text)
            files, tokens, characters = files + 1, tokens + len(ids), characters + len(text)
            if ids != library.encode(text) or ours.decode(ids) != text:
                wrong.append(str(path.relative_to(DATA)))
    print(json.dumps({"files": files, "characters": characters, "tokens": tokens, "wrong": wrong}, indent=1))
    sys.exit(bool(wrong))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare ids and text on all of the data instead")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed (default 5)")
    arguments = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"needs {DATA}")
    if arguments.check:
        check()
    report.write("tokenizers", "InternLM2's tokenizer: speed", *sections(arguments.rounds))


if __name__ == "__main__":
    main()

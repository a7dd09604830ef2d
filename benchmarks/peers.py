"""Hanlin against the engines that people use on CPUs today, and against this machine's limits: every bar in one table.

    python benchmarks/peers.py --work DIRECTORY --peer-python llama-cpp=PATH --peer-python openvino=PATH ...

Each bar is measured in one run, ours and theirs in turn, with the memory's read bandwidth beside. What was measured is
kept in DIRECTORY/peers.json, so that a run can be interrupted, gone on with, or made for some bars only (`--only`).
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import models
import report

import hanlin
from hanlin.bench import PEERS, Contender, Report, Spread, Workload, cores, measure, read_bandwidth
from hanlin.bench.driver import EngineProcess
from hanlin.errors import HanlinError

PROMPT = Workload(prompt=512)
FILE_CHUNK = 1 << 24


def generating(sequences: int, *, tokens: int, prompt: int = 32) -> Workload:
    """`tokens` in all, the first one included."""
    return Workload(sequences=sequences, prompt=prompt, tokens=tokens - 1)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What is to be reached.

    Attributes:
        name: for `--only`; bars of one name are measured together.
        work, against: in words.
        models: see `Settings.contenders`.
        least: a ratio, or with `most` the largest.
        workload, figure, ours, peer: where in the report the ratio is; no workload: see `LIMITS`.
        share: of the bandwidth read beside, which will do instead.
    """

    name: str
    work: str
    against: str
    least: float
    models: str = ""
    workload: Workload | None = None
    figure: str = "generation"
    ours: str = "hanlin"
    peer: str = ""
    share: float = 0.0
    most: bool = False

    @property
    def wanted(self) -> str:
        text = f"{'<=' if self.most else '>='} {self.least:g}x"
        return f"{text}, or {self.share:.0%} of the bandwidth" if self.share else text


def bars(tokens: int) -> list[Bar]:
    """All of them; `tokens` is how many each sequence generates."""
    one, many = generating(1, tokens=tokens), generating(16, tokens=tokens)
    out = []
    small, smaller = "smollm2-4bit", "smollm2-8bit"
    for name, work, kind, workload, figure, peers in (
        ("decode", "SmolLM2-135M, 4-bit, decode", small, one, "generation", {"llama-cpp": 1.5}),
        ("decode-8bit", "SmolLM2-135M, 8-bit, decode", smaller, one, "generation", {"llama-cpp": 1.5}),
        (
            "prompt",
            "SmolLM2-135M, 4-bit, 512-token prompt",
            small,
            PROMPT,
            "prompt",
            {"llama-cpp": 2.5, "openvino": 1.25},
        ),
        ("16", "SmolLM2-135M, 4-bit, 16 sequences", small, many, "generation", {"llama-cpp": 3, "openvino": 2.5}),
    ):
        for peer, least in peers.items():
            out.append(
                Bar(
                    name=f"smollm2-{name}",
                    work=work,
                    against=f"{peer} {'Q8_0' if kind == smaller else 'Q4_0'}",
                    models=kind,
                    workload=workload,
                    figure=figure,
                    peer=peer,
                    least=least,
                )
            )
    for bits, kind in ((4, "Q4_0"), (8, "Q8_0")):
        for name, work, workload, figure, least, share in (
            ("decode", "decode", generating(1, tokens=min(64, tokens)), "generation", 1.2, 0.92),
            ("prompt", "512-token prompt", PROMPT, "prompt", 2.5, 0.0),
            ("8", "8 sequences", generating(8, tokens=min(64, tokens)), "generation", 2.5, 0.0),
        ):
            out.append(
                Bar(
                    name=f"1.8b-{bits}bit-{name}",
                    work=f"InternLM2-1.8B shape, {bits}-bit, {work}",
                    against=f"llama-cpp {kind}",
                    models=f"1.8b-{bits}bit",
                    workload=workload,
                    figure=figure,
                    peer="llama-cpp",
                    least=least,
                    share=share,
                )
            )
    for kind, least in (("bfloat16", 2.0), ("int8", 4.0)):
        out.append(
            Bar(
                name="vllm",
                work=f"SmolLM2-135M, 64 prompts of 64 tokens x {tokens}, ours in {kind}",
                against="vLLM bfloat16",
                models="vllm",
                workload=generating(64, tokens=tokens, prompt=64),
                figure="together",
                ours=f"hanlin {kind}",
                peer="vllm",
                least=least,
            )
        )
    seven = "InternLM2-7B shape, 4-bit"
    return [
        *out,
        Bar(name="7b-decode", work=f"{seven}, decode", against="read bandwidth", least=0.85),
        Bar(
            name="7b-memory",
            work=f"{seven}, peak memory at 4,096 tokens",
            against="weights + KV",
            least=1.1,
            most=True,
        ),
        Bar(
            name="7b-start",
            work=f"{seven}, second start to first token",
            against="reading the file from the page cache",
            least=2.0,
            most=True,
        ),
        Bar(
            name="long-document",
            work="SmolLM2-135M, answers that quote a long document, with speculation",
            against="without, same bytes",
            least=1.5,
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked for on the command line."""

    work: Path
    pythons: Mapping[str, str]
    threads: int
    repeats: int
    tokens: int
    data: Path | None = None

    def model(self, name: str) -> str:
        return str(models.made(self.work, name, self.pythons.get("llama-cpp", sys.executable)))

    def peer(self, name: str, model: str, **options: Any) -> Contender:
        python = self.pythons.get(name, sys.executable)
        return Contender(name=name, peer=PEERS[name], model=self.model(model), python=python, options=options)

    def contenders(self, models: str) -> list[Contender]:
        """Ours first. `models` is vllm, or a size and a number of bits."""
        if models == "vllm":
            directory = "smollm2-135m.bfloat16"
            ours = [
                Contender(name=f"hanlin {kind}", model=self.model(directory), options={"weights": kind})
                for kind in ("bfloat16", "int8")
            ]
            return [*ours, self.peer("vllm", directory)]
        base, _, kind = models.partition("-")
        stem = "smollm2-135m" if base == "smollm2" else f"internlm2-{base}"
        file = f"{stem}.{'Q4_0' if kind == '4bit' else 'Q8_0'}.gguf"
        peers = [self.peer(name, file) for name in ("llama-cpp", "openvino")]
        return [Contender(name="hanlin", model=self.model(file)), *peers]


@dataclass(kw_only=True)
class Measured:
    """What came out for bars of one name.

    Attributes:
        report: with peers, see `Report.as_json`.
        values: ratios of the runs of a limit.
        note: the numbers behind them.
        load: programs that were waiting for a core when it began; above 0.5 the figures are rough.
    """

    day: str
    load: float
    bandwidth: list[float] = field(default_factory=list)
    report: dict[str, Any] | None = None
    values: list[float] = field(default_factory=list)
    note: str = ""


# ---- our own limits -------------------------------------------------------------------------------------------------


def seven_billion(settings: Settings) -> Contender:
    return Contender(name="hanlin", model=settings.model("internlm2-7b.Q4_0.gguf"))


def streamed(contender: Contender, facts: Mapping[str, int]) -> int:
    """Bytes of weights that every step reads: all but the embedding, which is a table of its own in these models."""
    name = Path(contender.model).name.split(".Q")[0]
    shape = models.SHAPES[name]
    embedding = shape.embedding_bytes if ".Q4_0" in contender.model else shape.embedding_bytes // 18 * 34
    return facts["weights"] - embedding


def decode_share(settings: Settings, out: Measured) -> None:
    contender = seven_billion(settings)
    workload = generating(1, tokens=min(64, settings.tokens))
    found = measure([contender], [workload], threads=settings.threads, repeats=settings.repeats, progress=progress)
    out.values, out.bandwidth = shares(found, contender, workload), found.bandwidth[workload.title]
    entry = found.entries[0]
    rate = Spread.of(entry.of(workload.title, "generation")).text()
    out.note = f"{rate} tokens/s, each reading {streamed(contender, entry.facts) / 1e9:.2f} GB of weights"


def shares(found: Report, contender: Contender, workload: Workload) -> list[float]:
    """Of the bandwidth, in each run."""
    entry = next(entry for entry in found.entries if entry.name == contender.name)
    size = streamed(contender, entry.facts) / 1e9
    speeds = found.bandwidth.get(workload.title, [])
    return [rate * size / speed for rate, speed in zip(entry.of(workload.title, "generation"), speeds, strict=False)]


def memory(settings: Settings, out: Measured) -> None:
    contender = seven_billion(settings)
    workload = Workload(prompt=4096 - 128, tokens=127)
    progress("peak memory", 0)
    with EngineProcess(contender, threads=settings.threads, sequences=1, length=4096) as process:
        process.load()
        ids = [[3 + n % 90000 for n in range(workload.prompt)]]
        process.generate(ids, workload.tokens)
        weights, cache = process.facts["weights"], process.facts["cache"]
        out.values = [process.peak_memory / (weights + cache)]
        sizes = {
            "peak": process.peak_memory,
            "weights": weights,
            "KV": cache,
            "Python and torch": process.memory_before,
        }
        out.note = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in sizes.items())


def second_start(settings: Settings, out: Measured) -> None:
    contender = seven_billion(settings)
    with hanlin.load(contender.model, **contender.options):
        progress("first start", 0)  # whose end waits until the packed weights are written
    reading = min(read_file(Path(contender.model)) for _ in range(2))
    starts, wholes = [], []
    for number in range(settings.repeats + 1):
        progress("second start", number)
        began = time.perf_counter()
        with EngineProcess(contender, threads=settings.threads, sequences=1, length=64) as process:
            process.load()
            first = process.generate([[7 + n for n in range(32)]], 0).total
            if number:
                wholes.append(time.perf_counter() - began)
                starts.append(process.load_seconds + first)
    out.values = [start / reading for start in starts]
    out.note = (
        f"loading and the first token of a prompt of 32 take {Spread.of(starts).text(' s')}, with Python and its "
        f"imports {Spread.of(wholes).text(' s')}; reading the file takes {reading:.2g} s"
    )


def read_file(path: Path) -> float:
    """Seconds to read it through."""
    buffer = memoryview(bytearray(FILE_CHUNK))
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - began


def quotations(data: Path) -> list[str]:
    """Questions about the first article of WikiText-2's test text, the article before each; answers quote it."""
    with gzip.open(data / "wikitext2_raw" / "wiki.test.raw.gz", "rt", encoding="utf-8") as file:
        article = file.read()[:10_000].rpartition("\n")[0]
    paragraphs = [line.strip() for line in article.splitlines() if len(line) > 400]
    beginnings = [" ".join(paragraph.split()[:8]) for paragraph in paragraphs[:8]]
    return [f'{article}\n\nQuote the paragraph that begins with "{words}" word for word.' for words in beginnings]


def quoting(settings: Settings, out: Measured) -> None:
    """Questions one by one; the article stays in the cache of the prefix from the first one on."""
    if settings.data is None:
        raise HanlinError("long-document needs --data, a folder with wikitext2_raw")
    questions = quotations(settings.data)
    answers, seconds, tokens = {}, {}, 0
    engines = {
        kind: hanlin.load(speculation=kind, threads=settings.threads, cache_bytes=1 << 28, session_len=4096)
        for kind in ("off", "auto")
    }
    for number in range(settings.repeats + 1):
        progress("long document", number)
        for kind, llm in engines.items():
            began = time.perf_counter()
            done = [llm.chat(question, max_tokens=settings.tokens, temperature=0) for question in questions]
            seconds[kind] = time.perf_counter() - began
            answers[kind], tokens = [reply.text for reply in done], sum(len(reply.ids) for reply in done)
        if answers["off"] != answers["auto"]:
            raise HanlinError("speculation changed an answer")
        if number:
            out.values.append(seconds["off"] / seconds["auto"])
    for llm in engines.values():
        llm.close()
    out.note = (
        f"{len(questions)} questions with {tokens} tokens of answers, prompts included but for the article: "
        f"{seconds['auto']:.2f} s with speculation, {seconds['off']:.2f} s without; the bytes are the same"
    )


LIMITS: Mapping[str, Callable[[Settings, Measured], None]] = {
    "7b-decode": decode_share,
    "7b-memory": memory,
    "7b-start": second_start,
    "long-document": quoting,
}


# ---- running --------------------------------------------------------------------------------------------------------


def progress(doing: str, done: int) -> None:
    print(f"  {time.strftime('%H:%M:%S')} {doing}", file=sys.stderr, flush=True)


def side_by_side(chosen: Sequence[Bar], settings: Settings, out: Measured) -> None:
    wanted = {bar.peer for bar in chosen}
    contenders = [c for c in settings.contenders(chosen[0].models) if c.ours or c.name in wanted]
    workloads = list(dict.fromkeys(bar.workload for bar in chosen if bar.workload))
    found = measure(contenders, workloads, threads=settings.threads, repeats=settings.repeats, progress=progress)
    out.report = found.as_json()
    if found.interrupted:
        raise KeyboardInterrupt


def run(chosen: Sequence[Bar], settings: Settings, kept: dict[str, Measured], keep: Callable[[], None]) -> None:
    """Measure these bars; each is kept as soon as it is done, or when it is interrupted."""
    for name in dict.fromkeys(bar.name for bar in chosen):
        print(name, file=sys.stderr)
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        if load > 0.5:
            print(f"  other programs are running (load {load:.1f}): these figures are rough", file=sys.stderr)
        today = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
        out = Measured(day=today, load=load)
        step = LIMITS.get(name) or partial(side_by_side, [bar for bar in chosen if bar.name == name])
        try:
            out.bandwidth = [read_bandwidth(threads=settings.threads)]
            step(settings, out)
        except HanlinError as error:
            print(f"  failed: {error}", file=sys.stderr)
        finally:
            if out.report or out.values:
                kept[name] = out
                keep()


# ---- the page -------------------------------------------------------------------------------------------------------


def page(all_bars: Sequence[Bar], kept: Mapping[str, Measured]) -> Iterator[str]:
    reports = {name: Report.from_json(found.report) for name, found in kept.items() if found.report}
    rows = [(bar.work, bar.against, *verdict(bar, kept.get(bar.name), reports.get(bar.name))) for bar in all_bars]
    head = ("work", "against", "measured", "GB/s read", "bar", "met")
    yield (
        "Ratios are of medians; in brackets the least and largest of the runs in pairs, ours and theirs in turn. "
        "Both read the same file. Random prompts, no two alike; greedy; no speculation; every engine in a process of "
        "its own with all cores. `GB/s read` is memory bandwidth measured beside.\n\n" + report.table(head, rows)
    )
    for name in dict.fromkeys(bar.name for bar in all_bars if bar.name in kept):
        found = kept[name]
        rough = f" Other programs were running (load {found.load:.1f}): rough." if found.load > 0.5 else ""
        if name in reports:
            table, notes = report.table(*reports[name].rows()), reports[name].notes()
            yield f"## {name}\n\n{found.day}.{rough}\n\n{table}\n\n" + "\n".join(f"* {note}" for note in notes)
        else:
            yield f"## {name}\n\n{found.day}.{rough} {found.note}."


def verdict(bar: Bar, found: Measured | None, compared: Report | None) -> tuple[str, str, str, str]:
    """(measured, GB/s, the bar, whether it is met)"""
    nothing = ("-", "-", bar.wanted, "not measured")
    if found is None:
        return nothing
    if compared is None or bar.workload is None:
        spread = Spread.of(found.values)
        met = spread.median <= bar.least if bar.most else spread.median >= bar.least
        return spread.text("x"), Spread.of(found.bandwidth).text(), bar.wanted, "yes" if met else "no"
    ratios = compared.ratios(bar.workload.title, bar.figure)
    ratio = next((r.spread for r in ratios if (r.ours, r.peer) == (bar.ours, bar.peer)), None)
    if ratio is None:
        return nothing
    text, met = ratio.text("x"), ratio.median >= bar.least
    if bar.share:
        ours = next(entry for entry in compared.entries if entry.name == bar.ours)
        reached = Spread.of(shares(compared, Contender(name=ours.name, model=ours.model), bar.workload))
        text += f", {reached.median:.0%} of the bandwidth"
        met = met or reached.median >= bar.share
    return text, Spread.of(compared.bandwidth[bar.workload.title]).text(), bar.wanted, "yes" if met else "no"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where model files and measurements are kept")
    parser.add_argument(
        "--peer-python", action="append", default=[], metavar="NAME=PATH", help="the Python that has it"
    )
    parser.add_argument("--data", type=Path, help="a folder with wikitext2_raw, for long-document")
    parser.add_argument("--only", default="", metavar="BAR,BAR...", help="of those that --list shows")
    parser.add_argument("--list", action="store_true", help="show the bars and what is kept of them")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="to generate; fewer is rougher")
    parser.add_argument("--fresh", action="store_true", help="forget what is kept")
    parser.add_argument("--print", action="store_true", help="print the page instead of writing it to results/")
    given = parser.parse_args()
    wrong = [pair for pair in given.peer_python if pair.partition("=")[0] not in PEERS or not pair.partition("=")[2]]
    if wrong:
        parser.error(f"--peer-python takes NAME=PATH, not {', '.join(wrong)}; names: {', '.join(PEERS)}")
    pythons = dict(pair.split("=", 1) for pair in given.peer_python)
    settings = Settings(
        work=given.work,
        pythons=pythons,
        threads=given.threads,
        repeats=given.repeats,
        tokens=given.tokens,
        data=given.data,
    )
    all_bars = bars(given.tokens)
    names = list(dict.fromkeys(bar.name for bar in all_bars))
    chosen_names = [name for name in given.only.split(",") if name] or names
    if set(chosen_names) - set(names):
        parser.error(f"--only: unknown {', '.join(set(chosen_names) - set(names))}. Known: {', '.join(names)}")

    file = given.work / "peers.json"
    kept: dict[str, Measured] = {}
    if file.exists() and not given.fresh:
        kept = {name: Measured(**found) for name, found in json.loads(file.read_text(encoding="utf-8")).items()}

    def keep() -> None:
        file.write_text(json.dumps({name: asdict(found) for name, found in kept.items()}), encoding="utf-8")

    if not given.list:
        given.work.mkdir(parents=True, exist_ok=True)
        chosen = [bar for bar in all_bars if bar.name in chosen_names]
        with suppress(KeyboardInterrupt):
            run(chosen, settings, kept, keep)
    if given.list or given.print:
        print("\n\n".join(page(all_bars, kept)))
        print(f"\nFor --only: {', '.join(names)}")
    else:
        pages = [part.replace(f"{given.work}/", "") for part in page(all_bars, kept)]  # of no interest elsewhere
        report.write("peers", "Against other engines, and against the machine's limits", *pages)


if __name__ == "__main__":
    main()

"""The verb `bench`: how fast a model runs on this machine, and how fast other engines run it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from hanlin import bench as room
from hanlin import hub
from hanlin.bench import OURS, PEERS, Contender, Peer, Report
from hanlin.errors import ConfigError, problems
from hanlin.options import EngineConfig

if TYPE_CHECKING:
    from hanlin.bench.turns import Progress

__all__ = ["bench"]

_LOADING = "How the model is held"
_WORK = "What is measured"
_OTHERS = "Other engines"
_KNOWN = ", ".join(PEERS)


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A directory, a .gguf file, a hub id, or a name.", show_default=hub.DEFAULT.id
        ),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="auto, float32, bfloat16, int8 or int4; on a CPU.", rich_help_panel=_LOADING)
    ] = "auto",
    kv_cache: Annotated[
        str, typer.Option(help="auto, float32, bfloat16, int8 or int4; on a CPU.", rich_help_panel=_LOADING)
    ] = "auto",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads, of every engine.", show_default="all", rich_help_panel=_LOADING),
    ] = None,
    speculation: Annotated[
        str,
        typer.Option(help="auto or off. Random prompts are easily guessed: auto flatters.", rich_help_panel=_LOADING),
    ] = "off",
    prompt: Annotated[
        int, typer.Option(min=1, help="Tokens of the prompt that is timed.", rich_help_panel=_WORK)
    ] = 512,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to generate after the first.", rich_help_panel=_WORK)
    ] = 128,
    sequences: Annotated[
        str, typer.Option(metavar="N,N...", help="How many sequences to generate together.", rich_help_panel=_WORK)
    ] = "1,16",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each workload.", rich_help_panel=_WORK)] = 3,
    against: Annotated[
        str,
        typer.Option(metavar="NAME,NAME...", help=f"Engines to measure in turn: {_KNOWN}.", rich_help_panel=_OTHERS),
    ] = "",
    peer_python: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="The Python that has it, if not this one. May be repeated.",
            rich_help_panel=_OTHERS,
        ),
    ] = None,
    peer_model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH", help="The model that it takes, if not MODEL. May be repeated.", rich_help_panel=_OTHERS
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON too; - prints it instead.")
    ] = None,
) -> None:
    """Measure a model: prompt and generation speed, first token, loading, memory; the memory's own speed beside.

    hanlin bench
    hanlin bench internlm2_5-1_8b-chat --weights int4 --sequences 1,8
    hanlin bench model.gguf --against llama-cpp --peer-python llama-cpp=venv/bin/python

    Every engine runs in a process of its own, one after the other in every run. Ctrl-C shows what there is so far.
    """
    counts = _counts(sequences)
    peers = _chosen(against, _pairs("--peer-python", peer_python), _pairs("--peer-model", peer_model))
    options = {"weights": weights, "kv_cache": kv_cache, "speculation": speculation}
    EngineConfig(threads=threads, **options)  # type: ignore[arg-type]  # complains before anything is fetched
    location = hub.resolve(model)
    contenders = [
        Contender(name="hanlin", model=str(location.path), peer=OURS, options=options),
        *(peer.contender(str(location.path), location.kind) for peer in peers),
    ]
    workloads = room.usual(prompt=prompt, tokens=tokens, sequences=counts)
    with _Screen(room.steps(len(contenders), len(workloads), repeats)) as screen:
        report = room.measure(
            contenders, workloads, threads=threads or room.cores(), repeats=repeats, progress=screen.progress
        )
    data = json.dumps(report.as_json(), indent=2)
    if output is not None and str(output) != "-":
        output.write_text(data + "\n", encoding="utf-8")
    if str(output) == "-":
        print(data)
    else:
        _print(report)
    if report.interrupted:
        raise KeyboardInterrupt
    if any(entry.problem for entry in report.entries):
        raise typer.Exit(1)


class _Chosen(NamedTuple):
    """A peer that was asked for."""

    name: str
    peer: Peer
    python: str
    model: str | None

    def contender(self, model: str, kind: Literal["directory", "gguf"]) -> Contender:
        """Raises:
        ConfigError: when it can't read that kind of model, and was given no other.
        """
        if self.model is None and kind not in self.peer.reads:
            wanted = "a directory" if "directory" in self.peer.reads else "a GGUF file"
            raise ConfigError(f"{self.name} takes {wanted}, not {model}. Say --peer-model {self.name}=PATH.")
        return Contender(name=self.name, model=self.model or model, peer=self.peer, python=self.python)


def _chosen(against: str, pythons: dict[str, str], models: dict[str, str]) -> list[_Chosen]:
    names = [name.strip() for name in against.split(",") if name.strip()]
    found = [f"unknown engine {name!r}" for name in dict.fromkeys([*names, *pythons, *models]) if name not in PEERS]
    found += [f"{name} is named, but not in --against" for name in {**pythons, **models} if name not in names]
    if found:
        raise typer.BadParameter(problems("--against", found, f"Known: {_KNOWN}."))
    return [
        _Chosen(name, PEERS[name], pythons.get(name, sys.executable), models.get(name)) for name in dict.fromkeys(names)
    ]


def _pairs(option: str, given: Iterable[str] | None) -> dict[str, str]:
    out = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"{option} takes NAME=PATH, not {text!r}")
        out[name] = value
    return out


def _counts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdecimal() and 0 < int(part) <= 1024 for part in parts):
        raise typer.BadParameter(f"--sequences takes numbers from 1 to 1024 with commas between, not {text!r}")
    return [int(part) for part in dict.fromkeys(parts)]


class _Screen:
    """What a terminal shows on standard error while measuring; nothing anywhere else."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._bar: Any = None
        self.progress: Progress = lambda doing, done: None

    def __enter__(self) -> _Screen:
        if sys.stderr is not None and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            task = self._bar.add_task("", total=self._steps)
            self._bar.start()
            self.progress = lambda doing, done: self._bar.update(task, completed=done, description=doing)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    head, rows = report.rows()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, title in enumerate(head):
        table.add_column(title, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # A terminal wraps long rows; a pipe gets whole lines.
    Console(width=None if sys.stdout.isatty() else 250, highlight=False).print(table)
    print()
    for line in _closing(report):
        print(line)


def _closing(report: Report) -> Sequence[str]:
    runs = f"Medians of the runs, least and largest in brackets. {report.threads} threads. {report.machine}"
    return [*report.notes(), runs]

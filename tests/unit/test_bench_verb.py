"""The verb `bench`: what it accepts, what it prints, and how it ends."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import pytest
import typer
from typer.testing import CliRunner, Result

from hanlin import bench as room
from hanlin.bench import OURS, PEERS, Contender, Peer, Report, Workload
from hanlin.bench.report import Entry
from hanlin.cli import bench as verb
from hanlin.cli.main import VERBS

Run = Callable[..., Result]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the verb asked to be measured; the answer can be changed through `report`."""
    seen: dict[str, object] = {}

    def measure(contenders: list[Contender], workloads: list[Workload], **options: object) -> Report:
        entries = []
        for contender in contenders:
            entry = Entry(name=contender.name, ours=contender.peer.ours, model=contender.model)
            for workload in workloads:
                entry.add(workload, workload.values(1.0, 2.0, 100))
            entries.append(entry)
        seen.update(contenders=contenders, workloads=workloads, **options)
        report = Report(machine="a machine", threads=2, workloads=tuple(workloads), entries=entries)
        change = seen.get("change")
        if callable(change):
            change(report)
        return report

    monkeypatch.setattr(room, "measure", measure)
    return seen


@pytest.fixture
def run(asked: dict[str, object], tmp_path: Path) -> Run:
    app = typer.Typer()
    app.command()(verb.bench)
    model = tmp_path / "model.gguf"
    model.touch()

    def run(*arguments: str, model: str = str(model)) -> Result:
        return CliRunner().invoke(app, [model, *arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})

    return run


def test_it_is_a_verb() -> None:
    assert VERBS["bench"].load() is verb.bench


def test_the_usual(run: Run, asked: dict[str, object], tmp_path: Path) -> None:
    done = run()
    assert done.exit_code == 0, done.output
    options = {"weights": "auto", "kv_cache": "auto", "speculation": "off"}
    model = str(tmp_path / "model.gguf")
    assert asked["contenders"] == [Contender(name="hanlin", peer=OURS, model=model, options=options)]
    assert asked["workloads"] == room.usual(prompt=512, tokens=128, sequences=[1, 16])
    assert (asked["repeats"], asked["threads"]) == (3, room.cores())
    assert re.search(r"16 sequences, 32 \+ 128 tokens: generated tokens/s +100\b", done.stdout)
    assert "a machine" in done.stdout


def test_everything_can_be_chosen(run: Run, asked: dict[str, object]) -> None:
    arguments = "--weights int8 --kv-cache int4 --threads 3 --prompt 7 --tokens 9 --sequences 2,5,2 --repeats 4"
    assert run(*arguments.split()).exit_code == 0
    (ours,) = asked["contenders"]  # type: ignore[misc]
    assert ours.options == {"weights": "int8", "kv_cache": "int4", "speculation": "off"}
    assert asked["workloads"] == room.usual(prompt=7, tokens=9, sequences=[2, 5])
    assert (asked["repeats"], asked["threads"]) == (4, 3)


def test_peers_get_their_python_and_model(run: Run, asked: dict[str, object], tmp_path: Path) -> None:
    done = run("--against", "llama-cpp, vllm", "--peer-python", "llama-cpp=/venv/python", "--peer-model", "vllm=/a/dir")
    assert done.exit_code == 0, done.output
    _, llama, vllm = asked["contenders"]  # type: ignore[misc]
    assert (llama.peer, llama.python, llama.model) == (
        PEERS["llama-cpp"],
        "/venv/python",
        str(tmp_path / "model.gguf"),
    )
    assert (vllm.peer, vllm.python, vllm.model) == (PEERS["vllm"], sys.executable, "/a/dir")
    assert "hanlin / llama-cpp" in done.stdout and "1x" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--against", "llama-cpp,ollama"], "unknown engine 'ollama'"),
        (["--peer-python", "vllm=x"], "vllm is named, but not in --against"),
        (["--against", "vllm", "--peer-python", "vllm"], "NAME=PATH"),
        (["--sequences", "1,none"], "numbers from 1 to 1024"),
        (["--sequences", "0"], "numbers from 1 to 1024"),
        (["--sequences", ","], "numbers from 1 to 1024"),
        (["--repeats", "0"], "--repeats"),
        (["--tokens", "0"], "--tokens"),
    ],
)
def test_wrong_use_is_told_before_anything_runs(
    run: Run, asked: dict[str, object], arguments: list[str], said: str
) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert said in re.sub(r"[│\s]+", " ", done.output)
    assert not asked


def test_impossible_options_and_models_are_told_before_anything_runs(run: Run, asked: dict[str, object]) -> None:
    assert "weights must be one of" in str(run("--weights", "int3").exception)
    assert "no model at" in str(run(model="./nowhere.gguf").exception)
    assert "vllm takes a directory" in str(run("--against", "vllm").exception)
    assert not asked


def test_a_directory_is_not_for_llama_cpp(run: Run, asked: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "config.json").write_text("{}")
    (tmp_path / "dir" / "model.safetensors").touch()
    assert "llama-cpp takes a GGUF file" in str(run("--against", "llama-cpp", model=str(tmp_path / "dir")).exception)


def test_json_to_a_file_and_to_standard_output(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    assert "first token, ms" in run("--json", str(file)).stdout
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data["entries"][0]["values"]["1 sequence, prompt of 512"] == {"prompt": [512.0], "first": [1000.0]}
    assert json.loads(run("--json", "-").stdout) == data


def test_a_peer_that_could_not_be_measured_is_told_and_counts(run: Run, asked: dict[str, object]) -> None:
    def fail(report: Report) -> None:
        report.entries[1].values.clear()
        report.entries[1].problem = "gone fishing"

    asked["change"] = fail
    done = run("--against", "llama-cpp")
    assert done.exit_code == 1
    assert "llama-cpp was left out: gone fishing" in done.stdout
    assert "first token, ms" in done.stdout


def test_ctrl_c_shows_what_there_is(run: Run, asked: dict[str, object], tmp_path: Path) -> None:
    asked["change"] = lambda report: setattr(report, "interrupted", True)
    done = run("--json", str(tmp_path / "out.json"))
    assert done.exit_code == 130
    assert "Interrupted" in done.stdout and "first token, ms" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["interrupted"] is True


def test_peers_are_a_table_that_cannot_be_changed() -> None:
    assert isinstance(PEERS, MappingProxyType)
    assert all(isinstance(peer, Peer) and peer.file.is_file() for peer in [OURS, *PEERS.values()])

"""Engines in processes of their own: turns, missing ones, broken ones, Ctrl-C, and what they print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hanlin.bench import machine
from hanlin.bench.driver import Contender, EngineProcess
from hanlin.bench.peers import OURS, Peer
from hanlin.bench.report import Report
from hanlin.bench.turns import measure, steps
from hanlin.bench.workloads import Workload
from hanlin.errors import CapacityError, EngineError

WORKLOADS = [Workload(prompt=8), Workload(sequences=3, prompt=4, tokens=5)]

# An engine that writes down what it is asked, and misbehaves as its options say.
ENGINE = """
import json, os, sys, time
REQUIRES = {requires!r}
ENVIRONMENT = {{"SET_BEFORE": "yes"}}
def load(model, settings):
    return Engine(model, settings)
class Engine:
    def __init__(self, model, settings):
        assert os.environ["SET_BEFORE"] == "yes"
        self.model, self.options = model, settings["options"]
        self.facts = {{"version": "1", "vocabulary": 500, "special": [0], **{{k: settings[k] for k in settings}}}}
        self.count = 0
        self.misbehave("loading")
    def generate(self, prompts, tokens):
        self.count += 1
        if "log" in self.options:
            with open(self.options["log"], "a") as file:
                file.write(json.dumps([self.options["name"], prompts, tokens]) + "\\n")
        self.misbehave(str(self.count))
        return 0.1, 0.1 + 0.1 * tokens, tokens * len(prompts)
    def misbehave(self, when):
        if self.options.get("print") == when:
            print("noise")
            os.write(1, b"more noise\\n")
        if self.options.get("raise") == when:
            raise ValueError("a bad day")
        if self.options.get("die") == when:
            print("last words", file=sys.stderr, flush=True)
            os._exit(3)
        if self.options.get("sleep") == when:
            time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hanlin.bench.turns._REST", 0.0)
    monkeypatch.setattr("hanlin.bench.machine.read_bandwidth", lambda **options: 30.0)


def engine(tmp_path: Path, *, requires: str = "json") -> Path:
    file = tmp_path / f"engine_{requires.replace('.', '_')}.py"
    file.write_text(ENGINE.format(requires=requires), encoding="utf-8")
    return file


def contender(tmp_path: Path, *, ours: bool = False, requires: str = "json", **options: object) -> Contender:
    """The fake engine as one of ours, or as a peer."""
    peer = Peer(file=engine(tmp_path, requires=requires), package="a-package", reads=("gguf",), ours=ours)
    return Contender(name="hanlin" if ours else "peer", model="m.gguf", peer=peer, options=options)


def test_all_take_turns_with_the_same_prompts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    both = [
        contender(tmp_path, ours=True, log=str(log), name="a"),
        contender(tmp_path, log=str(log), name="b"),
    ]
    done: list[int] = []
    found = measure(both, WORKLOADS, threads=2, repeats=3, progress=lambda doing, count: done.append(count))
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    assert [name for name, _, _ in asked] == ["a", "b"] * 2 * 4
    assert asked[0::2] == [["a", prompts, tokens] for _, prompts, tokens in asked[1::2]]
    assert [tokens for _, _, tokens in asked[0::2]] == [0, 5] * 4
    assert len({str(prompts) for _, prompts, _ in asked}) == 8
    assert done == list(range(steps(2, 2, 3)))
    assert all(len(e.of(w.title, f)) == 3 for e in found.entries for w in WORKLOADS for f in w.figures)
    assert found.bandwidth == {workload.title: [30.0] * 3 for workload in WORKLOADS}
    assert not found.interrupted and all(entry.peak_memory > 0 for entry in found.entries)


def test_the_warm_up_is_short_and_not_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    found = measure(
        [contender(tmp_path, ours=True, log=str(log), name="a")], [Workload(tokens=100)], threads=1, repeats=1
    )
    assert [json.loads(line)[2] for line in log.read_text().splitlines()] == [8, 100]
    assert found.entries[0].values == {"1 sequence, 32 + 100 tokens": {"generation": [pytest.approx(10)]}}


def test_settings_reach_the_engine(tmp_path: Path) -> None:
    found = measure([contender(tmp_path, ours=True, name="a")], WORKLOADS, threads=3, repeats=1)
    facts = found.entries[0].facts
    assert (facts["threads"], facts["sequences"], facts["length"]) == (3, 3, 10)
    assert facts["options"] == {"name": "a"} == found.entries[0].options


def test_a_missing_peer_is_left_out_with_the_way_to_get_it(tmp_path: Path) -> None:
    gone = contender(tmp_path, requires="nowhere_to_be_found.inner")
    found = measure([contender(tmp_path, ours=True), gone], WORKLOADS, threads=1, repeats=1)
    assert found.entries[1].problem == (
        f"{sys.executable} has no nowhere_to_be_found.inner. Run: {sys.executable} -m pip install a-package, "
        "or name a Python that has it: --peer-python peer=PATH"
    )
    assert [entry.name for entry in found.measured] == ["hanlin"]


@pytest.mark.parametrize(
    ("options", "problem", "runs"),
    [
        ({"raise": "loading"}, "ValueError: a bad day", 0),
        ({"die": "loading"}, "its process ended with status 3\nlast words", 0),
        ({"raise": "4"}, "ValueError: a bad day", 1),
        ({"die": "6"}, "its process ended with status 3\nlast words", 2),
    ],
)
def test_a_peer_that_fails_leaves_the_rest_standing(
    tmp_path: Path, options: dict[str, str], problem: str, runs: int
) -> None:
    both = [contender(tmp_path, ours=True), contender(tmp_path, **options)]
    found = measure(both, WORKLOADS, threads=1, repeats=3)
    assert found.entries[1].problem == problem
    assert len(found.entries[1].of(WORKLOADS[0].title, "prompt")) == runs
    assert len(found.entries[0].of(WORKLOADS[1].title, "generation")) == 3


def test_our_own_failure_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="hanlin: ValueError: a bad day"):
        measure([contender(tmp_path, ours=True, **{"raise": "loading"})], WORKLOADS, threads=1, repeats=1)


def test_our_own_failure_later_on_loses_nothing(tmp_path: Path) -> None:
    both = [contender(tmp_path, ours=True, die="5"), contender(tmp_path)]
    found = measure(both, WORKLOADS, threads=1, repeats=3)
    assert found.entries[0].problem.startswith("its process ended")
    assert [len(entry.of(WORKLOADS[0].title, "prompt")) for entry in found.entries] == [1, 3]
    assert found.ratios(WORKLOADS[0].title, "prompt")


def test_a_python_that_is_not_there(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "no" / "python")
    peer = Contender(name="peer", model="m", peer=Peer(file=engine(tmp_path), package="p", reads=()), python=nowhere)
    found = measure([contender(tmp_path, ours=True), peer], WORKLOADS, threads=1, repeats=1)
    assert found.entries[1].problem.startswith(f"{nowhere} cannot be run")


def test_what_engines_print_does_not_disturb(tmp_path: Path) -> None:
    noisy = contender(tmp_path, ours=True, print="1")
    assert measure([noisy], WORKLOADS, threads=1, repeats=1).entries[0].values


def test_ctrl_c_keeps_what_was_measured_and_ends_the_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[EngineProcess] = []
    begin = EngineProcess.load
    monkeypatch.setattr(EngineProcess, "load", lambda self: (started.append(self), begin(self))[1])

    def press(at: int) -> Report:
        def progress(doing: str, done: int) -> None:
            if done == at:
                raise KeyboardInterrupt

        return measure([contender(tmp_path, ours=True)], WORKLOADS, threads=1, repeats=3, progress=progress)

    found = press(6)  # loading, two warm-ups, two of the first run, one of the second
    assert found.interrupted
    assert [len(found.entries[0].of(w.title, w.figures[0])) for w in WORKLOADS] == [2, 1]
    with pytest.raises(KeyboardInterrupt):
        press(2)
    assert len(started) == 2
    assert all(process._process.poll() is not None for process in started)


def test_closing_ends_an_engine_in_the_middle_of_something(tmp_path: Path) -> None:
    process = EngineProcess(contender(tmp_path, sleep="loading"), threads=1, sequences=1, length=1)
    began = time.perf_counter()
    process.close()
    process.close()
    assert process._process.poll() is not None
    assert time.perf_counter() - began < 10


@pytest.mark.skipif(os.name == "nt", reason="counts processes by /bin/kill")
def test_an_engine_ends_when_whoever_asked_is_killed(tmp_path: Path) -> None:
    file = engine(tmp_path)
    code = f"""
import sys, time
from hanlin.bench.driver import *
from hanlin.bench.peers import Peer
peer = Peer(file={str(file)!r}, package="p", reads=())
sleeper = Contender(name="p", model="m", peer=peer, options={{"sleep": "1"}})
process = EngineProcess(sleeper, threads=1, sequences=1, length=1)
process.load()
print(process._process.pid, flush=True)
process.generate([[1]], 1)
"""
    source = str(Path(machine.__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": source}
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        try:
            stat = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
            if stat == "Z":
                return
            os.kill(child, 0)
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.1)
    os.kill(child, 9)
    pytest.fail("the engine outlived the process that asked it")


def test_another_python_does_not_get_our_search_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hanlin.bench.driver import _environment

    monkeypatch.setenv("PYTHONPATH", "mine")
    peer = Peer(file=engine(tmp_path), package="p", reads=())
    package = str(Path(machine.__file__).parents[2])
    same = Contender(name="p", model="m", peer=peer)
    other = Contender(name="p", model="m", peer=peer, python="/elsewhere/python")
    assert _environment(same, 2)["PYTHONPATH"] == "mine"
    assert "PYTHONPATH" not in _environment(other, 2)
    assert _environment(Contender(name="h", model="m", peer=OURS), 2)["PYTHONPATH"] == f"{package}{os.pathsep}mine"
    assert _environment(other, 7)["OMP_NUM_THREADS"] == "7"


def test_bandwidth_is_beyond_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 0.1 < machine.read_bandwidth(size=1 << 24, passes=2, threads=2) < 2000


def test_bandwidth_is_not_measured_without_memory_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("hanlin.bench.machine.free_memory", lambda: 1 << 24)
    with pytest.raises(CapacityError, match="32 MiB"):
        machine.read_bandwidth(size=1 << 25)


def test_the_machine_in_words() -> None:
    said = machine.describe()
    assert f"{machine.cores()} cores" in said and "torch" in said and "Python 3." in said

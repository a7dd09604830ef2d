"""benchmarks/peers.py: which bars there are, when they are met, and that runs can be gone on with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hanlin.bench import Report
from hanlin.bench.report import Entry

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(_BENCHMARKS))
    for name in ("peers", "models", "report"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import peers

    return peers


def compared(bar: object, ours: list[float], theirs: list[float], speeds: list[float] | None = None) -> Report:
    """A report in which the bar's figure is these numbers."""
    workload, figure = bar.workload, bar.figure  # type: ignore[attr-defined]
    entries = []
    for name, values, mine in ((bar.ours, ours, True), (bar.peer, theirs, False)):  # type: ignore[attr-defined]
        facts = {"version": "1", "weights": 10**9 + 92544 * 2048 // 32 * 18}
        entries.append(Entry(name=name, ours=mine, model="internlm2-1.8b.Q4_0.gguf", facts=facts))
        entries[-1].values = {workload.title: {figure: values}}
    return Report(
        machine="m",
        threads=2,
        workloads=(workload,),
        entries=entries,
        bandwidth={workload.title: speeds or [30.0] * len(ours)},
    )


def test_every_bar_against_a_peer_is_there(peers: ModuleType) -> None:
    wanted = {(bar.name, bar.peer or bar.against, bar.least) for bar in peers.bars(128)}
    assert wanted >= {
        ("smollm2-decode", "llama-cpp", 1.5),
        ("smollm2-decode-8bit", "llama-cpp", 1.5),
        ("smollm2-prompt", "llama-cpp", 2.5),
        ("smollm2-prompt", "openvino", 1.25),
        ("smollm2-16", "llama-cpp", 3),
        ("smollm2-16", "openvino", 2.5),
        ("1.8b-4bit-decode", "llama-cpp", 1.2),
        ("1.8b-8bit-prompt", "llama-cpp", 2.5),
        ("1.8b-8bit-8", "llama-cpp", 2.5),
        ("vllm", "vllm", 2.0),
        ("vllm", "vllm", 4.0),
        ("7b-decode", "read bandwidth", 0.85),
        ("7b-memory", "weights + KV", 1.1),
        ("7b-start", "reading the file from the page cache", 2.0),
    }


def test_every_bar_can_be_measured(peers: ModuleType, tmp_path: Path) -> None:
    """Its contenders have its names, and their files can be made."""
    settings = peers.Settings(work=tmp_path, pythons={}, threads=2, repeats=1, tokens=8)
    for name in peers.models.makers("python"):
        (tmp_path / name).touch()
    for bar in peers.bars(8):
        if bar.name in peers.LIMITS:
            assert bar.workload is None
            continue
        contenders = settings.contenders(bar.models)
        assert contenders[0].ours
        assert {bar.ours, bar.peer} <= {contender.name for contender in contenders}
        assert bar.figure in bar.workload.figures


def test_a_bar_is_met_by_its_median(peers: ModuleType) -> None:
    bar = next(bar for bar in peers.bars(128) if bar.name == "smollm2-decode")
    found = peers.Measured(day="2026-01-01", load=0.0)
    said = peers.verdict(bar, found, compared(bar, [300.0, 310.0, 290.0], [200.0, 200.0, 100.0]))
    assert said == ("1.5x (1.5-2.9)", "30", ">= 1.5x", "yes")
    assert peers.verdict(bar, found, compared(bar, [299.0], [200.0]))[3] == "no"
    assert peers.verdict(bar, None, None)[3] == "not measured"
    assert peers.verdict(bar, found, compared(bar, [299.0], []))[3] == "not measured"


def test_the_bandwidth_will_do_instead(peers: ModuleType) -> None:
    bar = next(bar for bar in peers.bars(128) if bar.name == "1.8b-4bit-decode")
    found = peers.Measured(day="2026-01-01", load=0.0)
    # 1 GB of weights a token: the embedding is not read
    said = peers.verdict(bar, found, compared(bar, [27.0, 28.0, 29.0], [28.0] * 3, [30.0] * 3))
    assert said[0].endswith("93% of the bandwidth") and said[3] == "yes"
    said = peers.verdict(bar, found, compared(bar, [27.0, 27.0, 29.0], [28.0] * 3, [30.0] * 3))
    assert said[0].endswith("90% of the bandwidth") and said[3] == "no"


def test_limits_go_both_ways(peers: ModuleType) -> None:
    by_name = {bar.name: bar for bar in peers.bars(128)}
    for name, values, met in (
        ("7b-decode", [0.8, 0.86, 0.9], "yes"),
        ("7b-decode", [0.8], "no"),
        ("7b-memory", [1.09], "yes"),
        ("7b-memory", [1.11], "no"),
    ):
        found = peers.Measured(day="2026-01-01", load=0.0, values=values, bandwidth=[30.0])
        assert peers.verdict(by_name[name], found, None)[3] == met


def test_what_was_measured_is_kept_and_gone_on_with(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def side_by_side(chosen: list[object], settings: object, out: object) -> None:
        bar = chosen[0]
        asked.append(bar.name)  # type: ignore[attr-defined]
        if len(asked) == 3:
            raise KeyboardInterrupt
        out.report = compared(bar, [3.0], [1.0]).as_json()  # type: ignore[attr-defined]

    monkeypatch.setattr(peers, "side_by_side", side_by_side)
    monkeypatch.setattr(peers, "read_bandwidth", lambda **options: 30.0)

    def main(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["peers.py", "--work", str(tmp_path), "--print", *arguments])
        peers.main()
        return capsys.readouterr().out

    page = main("--only", "smollm2-decode,smollm2-decode-8bit,vllm")
    assert asked == ["smollm2-decode", "smollm2-decode-8bit", "vllm"]
    assert page.count("| 3x | 30 | >= 1.5x | yes |") == 2
    assert set(json.loads((tmp_path / "peers.json").read_text())) == {"smollm2-decode", "smollm2-decode-8bit"}
    page = main("--only", "smollm2-prompt")
    assert page.count("| yes |") == 3, "what was measured before is still there"
    assert main("--list").count("| yes |") == 3
    assert asked[3:] == ["smollm2-prompt"]
    assert main("--only", "smollm2-16", "--fresh").count("| yes |") == 1


def test_figures_taken_beside_other_programs_are_called_rough(peers: ModuleType) -> None:
    bar = peers.bars(128)[0]
    found = peers.Measured(day="2026-01-01", load=1.7, report=compared(bar, [3.0], [1.0]).as_json())
    text = "\n".join(peers.page(peers.bars(128), {bar.name: found}))
    assert "Other programs were running (load 1.7): rough." in text

"""Medians, ratios, tables and JSON of `hanlin bench`."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from hanlin.bench.report import Entry, Report, Spread, number
from hanlin.bench.workloads import Workload

PROMPT, DECODE = Workload(prompt=100), Workload(tokens=10)


def entry(name: str, seconds: list[float], *, ours: bool = False) -> Entry:
    """An engine whose runs of both workloads took so long."""
    out = Entry(name=name, ours=ours, model="m.gguf", facts={"version": "1", "special": [1]}, load_seconds=0.5)
    for each in seconds:
        out.add(PROMPT, PROMPT.values(each, each, 0))
        out.add(DECODE, DECODE.values(1.0, 1.0 + each, 10))
    return out


def report(*entries: Entry) -> Report:
    speeds = {PROMPT.title: [30.0, 31.0, 50.0]}
    return Report(machine="a machine", threads=2, workloads=(PROMPT, DECODE), entries=[*entries], bandwidth=speeds)


def test_ratios_are_of_medians_and_their_spread_of_pairs() -> None:
    found = report(entry("hanlin", [1.0, 2.0, 4.0], ours=True), entry("peer", [2.0, 8.0, 4.0]))
    (ratio,) = found.ratios(DECODE.title, "generation")
    assert (ratio.ours, ratio.peer) == ("hanlin", "peer")
    assert ratio.spread == Spread(median=2.0, low=1.0, high=4.0)


def test_more_than_one_is_better_whichever_way_the_figure_goes() -> None:
    found = report(entry("hanlin", [1.0], ours=True), entry("peer", [3.0]))
    for figure in PROMPT.figures:
        (ratio,) = found.ratios(PROMPT.title, figure)
        assert abs(ratio.spread.median - 3) < 1e-9


def test_a_peer_that_failed_on_the_way_is_compared_by_the_runs_it_made() -> None:
    found = report(entry("hanlin", [1.0, 1.0, 2.0], ours=True), entry("peer", [2.0]))
    (ratio,) = found.ratios(DECODE.title, "generation")
    assert ratio.spread == Spread(2.0, 2.0, 2.0)


def test_every_one_of_ours_against_every_peer() -> None:
    engines = [entry("a", [1.0], ours=True), entry("b", [1.0], ours=True), entry("c", [1.0]), entry("d", [1.0])]
    pairs = [(r.ours, r.peer) for r in report(*engines).ratios(PROMPT.title, "prompt")]
    assert pairs == [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]


def test_rows_fit_the_head_and_show_what_there_is() -> None:
    missing = Entry(name="gone", ours=False, model="m.gguf", problem="no such thing")
    found = report(entry("hanlin", [1.0, 2.0], ours=True), missing, entry("peer", [4.0, 4.0]))
    head, rows = found.rows()
    assert head == ["", "hanlin", "peer", "hanlin / peer", "GB/s read"]
    assert all(len(row) == len(head) for row in rows)
    table = {row[0]: row[1:] for row in rows}
    assert table["1 sequence, 32 + 10 tokens: generated tokens/s"] == ["7.5 (5-10)", "2.5", "3x (2-4)", "-"]
    assert table["1 sequence, prompt of 100: prompt tokens/s"][-1] == "31 (30-50)"
    assert table["loading, s"][:2] == ["0.5", "0.5"]
    assert "gone was left out: no such thing" in found.notes()


def test_an_interrupted_report_says_so() -> None:
    found = report(entry("hanlin", [1.0], ours=True))
    assert not any("nterrupted" in note for note in found.notes())
    found.interrupted = True
    assert found.notes()[-1].startswith("Interrupted")


def test_json_and_back() -> None:
    found = report(entry("hanlin", [1.0, 2.0], ours=True), entry("peer", [4.0]))
    data = json.loads(json.dumps(found.as_json()))
    assert {r["figure"] for r in data["ratios"]} == {"prompt", "first", "generation"}
    assert "special" not in data["entries"][0]["facts"]
    again = Report.from_json(data)
    assert again.rows() == found.rows() and again.notes() == found.notes()
    assert again.as_json() == found.as_json()


@given(st.floats(1e-6, 1e9))
def test_numbers_keep_three_figures(value: float) -> None:
    assert abs(float(number(value).replace(",", "")) / value - 1) < 0.0051


@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=9))
def test_a_median_lies_in_its_spread(values: list[float]) -> None:
    spread = Spread.of(values)
    assert spread.low <= spread.median <= spread.high
    assert spread.text().startswith(number(spread.median))

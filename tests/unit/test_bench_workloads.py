"""What `hanlin bench` gives to engines, and the figures it makes of their times."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.bench.workloads import FIGURES, Workload, prompts, usual
from hanlin.errors import ConfigError

workloads = st.builds(
    Workload, sequences=st.integers(1, 20), prompt=st.integers(4, 60), tokens=st.sampled_from([0, 1, 50])
)


@settings(max_examples=30)
@given(workloads, st.integers(-1, 5))
def test_prompts_are_the_same_for_all_and_never_special(workload: Workload, run: int) -> None:
    special = frozenset({0, 1, 7, 4999})
    given = prompts(workload, run, vocabulary=5000, special=special)
    assert given == prompts(workload, run, vocabulary=5000, special=special)
    assert [len(ids) for ids in given] == [workload.prompt] * workload.sequences
    assert all(0 <= i < 5000 and i not in special for ids in given for i in ids)


def test_no_two_prompts_start_alike() -> None:
    seen = set()
    for workload in usual(prompt=512, tokens=128, sequences=(1, 16, 64)):
        for run in range(-1, 5):
            seen.update(tuple(ids[:8]) for ids in prompts(workload, run, vocabulary=49152, special=frozenset()))
    assert len(seen) == 6 * (1 + 1 + 16 + 64)


def test_figures_of_a_prompt() -> None:
    assert Workload(prompt=512).values(0.5, 0.6, 0) == {"prompt": 1024, "first": 500}


def test_figures_of_sequences() -> None:
    # 4 sequences: a first token each after 1 s, then 10 each until 3 s
    assert Workload(sequences=4, tokens=10).values(1.0, 3.0, 40) == {"generation": 20, "together": 44 / 3}
    assert Workload(tokens=10).values(1.0, 3.0, 10) == {"generation": 5}


@given(workloads)
def test_a_workload_gives_the_figures_it_names(workload: Workload) -> None:
    assert tuple(workload.values(0.5, 1.5, 10)) == workload.figures
    assert set(workload.figures) <= set(FIGURES)


def test_impossible_workloads_are_all_named() -> None:
    with pytest.raises(ConfigError, match=r"(?s)sequences must be.*prompt must be.*tokens must be"):
        Workload(sequences=0, prompt=0, tokens=-1)


def test_the_usual_ones() -> None:
    assert [w.title for w in usual(prompt=512, tokens=127, sequences=(1, 16))] == [
        "1 sequence, prompt of 512",
        "1 sequence, 32 + 127 tokens",
        "16 sequences, 32 + 127 tokens",
    ]

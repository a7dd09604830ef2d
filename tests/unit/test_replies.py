"""Stop texts in a stream: found wherever the stream is cut, and nothing shown that must not be."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from hanlin.replies import StopTexts


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({min(c, len(text)) for c in cuts} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


@given(
    text=st.text(alphabet="ab\n中", max_size=30),
    stops=st.lists(st.text(alphabet="ab\n中", min_size=1, max_size=4), max_size=3).map(tuple),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_any_split_gives_the_text_before_the_first_stop(text: str, stops: tuple[str, ...], cuts: list[int]) -> None:
    watcher, got = StopTexts(stops), ""
    for piece in pieces(text, cuts):
        got += watcher.push(piece)
        if watcher.found is not None:
            break
    ends = [(text.index(s), s) for s in stops if s in text]
    if watcher.found is None:
        assert not ends
        assert got + watcher.finish() == text
    else:
        assert watcher.found in stops and got + watcher.found == text[: len(got) + len(watcher.found)]
        assert not any(s in got for s in stops)


def test_only_a_possible_start_is_held_back() -> None:
    watcher = StopTexts(("END",))
    assert watcher.push("abc E") == "abc "
    assert watcher.push("N") == ""
    assert watcher.push("x") == "ENx"
    assert watcher.push("tail EN") == "tail "
    assert watcher.finish() == "EN"


def test_no_search_before_the_least_length() -> None:
    watcher = StopTexts(("b",))
    assert watcher.push("ab", search=False) == "ab"
    assert watcher.push("cb") == "c" and watcher.found == "b"

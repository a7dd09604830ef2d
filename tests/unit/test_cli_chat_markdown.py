"""Markdown on a terminal: nothing dropped, Chinese broken well, and pieces painted as if they had come at once."""

from __future__ import annotations

import io
import re
from itertools import pairwise
from typing import Any

import pytest
from cli_chat_fake import MARKDOWN
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from hanlin.cli.live import MarkdownView
from hanlin.cli.markdown import THEME, Renderer, _breaks
from hanlin.cli.render import PlainView, visible

pyte: Any = pytest.importorskip("pyte", reason="needs the terminal emulator pyte: pip install 'hanlin[dev]'")

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def _console(width: int, height: int = 50, color: Any = None) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=True,
        width=width,
        height=height,
        color_system=color,
        theme=THEME,
        _environ={},
    )


def _lines(text: str, width: int = 60, color: Any = None) -> list[str]:
    return [line.ansi for line in Renderer(_console(width, color=color)).lines(text)]


def _screen(output: str, width: int, height: int) -> list[str]:
    """All lines that a terminal shows after this output, those scrolled away first."""
    screen = pyte.HistoryScreen(width, height, history=10_000)
    stream = pyte.Stream(screen)
    stream.feed(output.replace("\r\n", "\n").replace("\n", "\r\n"))
    above = ["".join(row[x].data for x in range(width)) for row in screen.history.top]
    return [line.rstrip() for line in (*above, *screen.display)]


def _painted(pieces: list[str], width: int, height: int) -> list[str]:
    console = _console(width, height)
    view = MarkdownView(console, pause=0)
    for piece in pieces:
        view.push(piece)
        view._next = 0  # paint every time, however long the painting took
    view.finish()
    console.file.write("END")
    assert isinstance(console.file, io.StringIO)
    lines = _screen(console.file.getvalue(), width, height)
    return lines[: lines.index("END") + 1]


def test_blocks_look_as_they_should() -> None:
    assert _lines(MARKDOWN) == [
        "Heading 标题",
        "",
        "Some emphasis, code, and a link (https://example.org/a).",
        "",
        "名字  number",
        "────────────",
        "甲         1",
        "乙乙      22",
        "",
        " 1 first",
        " 2 second",
        "    • nested 内层",
        "",
        "```python",
        "def greet(name: str) -> str:",
        '    return f"你好, {name}"',
        "```",
        "",
        "▌ quoted 引用",
        "",
        "床前明月光，",
        "疑是地上霜。",
    ]


def test_styles_reach_a_colour_terminal_and_only_that() -> None:
    coloured = _lines(MARKDOWN, color="standard")
    assert [_ANSI.sub("", line) for line in coloured] == _lines(MARKDOWN)
    assert coloured[0].startswith("\x1b[1;4mHeading")
    assert "\x1b[36mcode\x1b[0m" in coloured[2]


@pytest.mark.parametrize(
    "text",
    [
        "a <b>bold</b> &lt;tag&gt; <br>",
        "</kbd> <kbd>",
        "[foo]: http://example.org",
        r"\(x^2\) and \[ y \] and \{1, 2\} and a \\ b and 50\%",
        "<think>\nhm\n</think>",
        "<!-- note -->",
    ],
)
def test_nothing_vanishes(text: str) -> None:
    assert "\n".join(_lines(text)) == text


def test_markdown_escapes_work() -> None:
    assert _lines(r"\*not emphasis\* 1\. \# \`x\`") == ["*not emphasis* 1. # `x`"]


def test_control_characters_cannot_steer_the_terminal() -> None:
    evil = "a\x1b]0;title\x07b\x9b2Jc\rd\x00e\ud800f\x7f"
    assert visible(evil) == "a\ufffd]0;title\ufffdb\ufffd2Jc\ufffdd\ufffde\ufffdf\ufffd"
    assert visible("tab\t line\r\nend\n") == "tab\t line\nend\n"
    shown = "".join(_lines(visible("&#27;[2J `\x1b[2J`\n\n```\n\x1b[2J\n```\n| \x1b[2J |\n|---|\n")))
    assert "\x1b" not in shown
    plain = io.StringIO()
    view = PlainView(plain, clean=True)
    view.push(evil)
    view.finish()
    assert "\x1b" not in plain.getvalue() and plain.getvalue().endswith("\n")


def test_plain_text_goes_to_a_pipe_unchanged_and_ends_its_line() -> None:
    for pieces, expected in ((["a\x1b", "b"], "a\x1bb\n"), (["a\n", ""], "a\n"), ([], "")):
        out = io.StringIO()
        view = PlainView(out, clean=False)
        for piece in pieces:
            view.push(piece)
        view.finish()
        assert out.getvalue() == expected


def test_chinese_breaks_between_characters_but_not_before_punctuation() -> None:
    assert _lines("我喜欢用 Python 写程序，因为它很简单。“对吗？”（是的）", width=20) == [
        "我喜欢用 Python 写程",
        "序，因为它很简单。",
        "“对吗？”（是的）",
    ]
    assert _lines("一二三四五六七八九十，一二", width=20) == ["一二三四五六七八九", "十，一二"]
    assert _lines("words do not break inside themselves", width=20) == ["words do not break", "inside themselves"]
    assert _lines("x" * 45, width=20) == ["x" * 20, "x" * 20, "x" * 5]
    assert _lines("- 项目一二三四五六七八九十一二三", width=20) == [" • 项目一二三四五六", "   七八九十一二三"]


@given(st.text("ab 中文，。（）\u0301👩\u200d🚀-\t", max_size=60), st.integers(2, 20))
def test_broken_lines_fit_and_lose_nothing(text: str, width: int) -> None:
    offsets = [0, *_breaks(text, width), len(text)]
    parts = [text[a:b] for a, b in pairwise(offsets)]
    assert "".join(parts) == text
    assert all(sum(map(cell_len, part.rstrip(" "))) <= width for part in parts)
    assert all(part for part in parts[1:])


_WORDS = st.text("abc 中文。*_`<>[]()\\#-1", min_size=1, max_size=25)
_BLOCK = st.one_of(
    _WORDS,
    st.lists(_WORDS.map(str.strip), min_size=1, max_size=4).map(lambda items: "\n".join(f"- {item}" for item in items)),
    st.lists(_WORDS, min_size=1, max_size=4).map(lambda lines: "\n".join(["```py", *lines, "```"])),
    st.just("| a | b |\n|---|---|\n| 一 | 2 |"),
    _WORDS.map(lambda text: f"## {text}"),
    _WORDS.map(lambda text: f"> {text}"),
    st.just("---"),
)


@st.composite
def _replies(draw: st.DrawFn) -> list[str]:
    text = "\n\n".join(draw(st.lists(_BLOCK, min_size=1, max_size=4)))
    cuts = sorted({0, len(text), *draw(st.lists(st.integers(0, len(text)), max_size=12))})
    return [text[a:b] for a, b in pairwise(cuts)]


@settings(max_examples=60, deadline=None)
@given(_replies(), st.integers(20, 50))
@example(["- a\n", "- b\n\npara"], 30)
@example(["x" * 30, "y"], 30)
def test_pieces_look_like_the_whole(pieces: list[str], width: int) -> None:
    assert _painted(pieces, width, 100) == _painted(["".join(pieces)], width, 100)


@pytest.mark.parametrize("height", [3, 5, 24])
@pytest.mark.parametrize(
    "block",
    [
        "".join(f"- item {i}\n" for i in range(40)),
        "```\n" + "".join(f"line {i}\n" for i in range(40)) + "```\n",
        " ".join(f"word{i}" for i in range(200)),
        "".join(f"paragraph {i}\n\n" for i in range(30)),
        "".join(f"> quote {i}\n" for i in range(40)),
    ],
)
def test_what_is_taller_than_the_screen_scrolls_without_loss_or_repetition(block: str, height: int) -> None:
    text = f"before\n\n{block}\n\nafter"
    pieces = [text[i : i + 7] for i in range(0, len(text), 7)]
    assert _painted(pieces, 40, height) == _painted([text], 40, 200)


def test_only_what_changed_is_written() -> None:
    """No flicker: while a paragraph grows, lines above its last one are not touched."""
    console = _console(40)
    assert isinstance(console.file, io.StringIO)
    view = MarkdownView(console, pause=0)
    view.push("- one\n- two\n- thr")
    start = len(console.file.getvalue())
    view._next = 0
    view.push("ee")
    written = console.file.getvalue()[start:]
    assert "three" in written and "one" not in written and "two" not in written
    view.finish()


def test_an_empty_reply_leaves_an_empty_screen() -> None:
    assert _painted([], 40, 10) == ["END"]
    assert _painted(["\n\n"], 40, 10) == ["END"]


def test_a_narrower_window_does_not_swallow_what_stands_above() -> None:
    console = _console(40, 10)
    assert isinstance(console.file, io.StringIO)
    console.file.write("PROMPT\n")
    view = MarkdownView(console, pause=0)
    view.push("aaaa bbbb cccc dddd eeee ffff")
    console.width = 20
    view._next = 0
    view.push(" gggg")
    view.finish()
    # A terminal that does not fold old lines loses nothing either; the prompt above must stand.
    lines = _screen(console.file.getvalue(), 40, 10)
    assert "gggg" in " ".join(lines)


@settings(max_examples=150, deadline=None)
@given(st.text("ab中\n *_`~>#-+1.|[]()<>\\&:!\t=\u2028\x0c", max_size=80), st.integers(1, 40))
@example("a\u2028\n\nb\n\nc", 20)
@example("> " * 50 + "x", 20)
@example("- " * 50 + "x", 1)
@example("[" * 2000, 20)
@example("*" * 2000 + "x", 20)
def test_any_text_can_be_rendered(text: str, width: int) -> None:
    renderer = Renderer(_console(width))
    settled, rest = renderer.split(text)
    assert settled + rest == text
    for line in renderer.lines(text):
        assert line.cells <= max(width, 20)

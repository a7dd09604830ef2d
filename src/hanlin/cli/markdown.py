"""Markdown for a terminal: blocks that are settled while the text still grows, Chinese line breaks, nothing dropped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline, escape
from markdown_it.token import Token
from rich import box
from rich.cells import cell_len
from rich.console import COLOR_SYSTEMS, Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, HorizontalRule, Markdown, Paragraph, TableElement
from rich.rule import Rule
from rich.segment import Segment
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

__all__ = ["THEME", "Line", "Renderer"]

# Colours of the terminal's own palette, so that light and dark backgrounds both work.
THEME = Theme(
    {
        "markdown.code": "cyan",
        "markdown.code_block": "none",
        "markdown.block_quote": "italic",
        "markdown.h1": "bold underline",
        "markdown.h2": "bold underline",
        "markdown.h3": "bold",
        "markdown.item.number": "cyan",
        "markdown.link_url": "blue underline",
        "markdown.fence": "dim",
        "notice": "dim",
        "failure": "red",
        "prompt": "bold green",
    }
)
_NARROWEST = 20  # cells; below that wrapping does more harm than a cut line
_DEEPEST = 12  # nested lists and quotes

# What a Chinese or Japanese line does not begin with, and what it does not end with.
_NO_START = frozenset("、。，．！？；：）》〉」』】〕｝］”’…—～·ー々%‰℃,.!?;:)]}»")
_NO_END = frozenset("（《〈「『【〔｛［“‘([{«￥＄$")
_LINE = re.compile(r"[^\n]*\n|[^\n]+")  # as Markdown counts them; Python would split at U+2028 too
_JOINERS = re.compile(r"[\u0300-\u036f\u200d\u20d0-\u20ff\ufe00-\ufe0f\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]")


def _escape(state: StateInline, silent: bool) -> bool:
    """Backslashes protect Markdown's own signs; before brackets and the like they are LaTeX, and stay."""
    if state.src[state.pos + 1 : state.pos + 2] in tuple("()[]{},;:!%&\\ "):
        return False
    return escape(state, silent)


def _parser() -> MarkdownIt:
    """CommonMark with tables and strike-through, without what would make text vanish from a terminal."""
    parser = MarkdownIt("commonmark", {"maxNesting": _DEEPEST}).enable(["strikethrough", "table"])
    parser.disable(["html_block", "html_inline", "entity", "reference"])
    parser.inline.ruler.at("escape", _escape)
    return parser


@dataclass(frozen=True)
class Line:
    """A line as the terminal gets it, and how many cells it fills."""

    ansi: str
    cells: int


class Renderer:
    """Turns Markdown into lines for one console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._parser = _parser()

    def split(self, text: str) -> tuple[str, str]:
        """The blocks that cannot change any more, and the rest, while `text` still grows at its end.

        Only the last top-level block can still change, and only whole lines tell where blocks begin.
        """
        whole = text[: text.rfind("\n") + 1]
        starts = [token.map[0] for token in self._parser.parse(whole) if token.level == 0 and token.map]
        if not starts:
            return "", text
        settled = "".join(_LINE.findall(whole)[: starts[-1]])
        return settled, text[len(settled) :]

    def lines(self, text: str) -> list[Line]:
        """Lines of at most the console's width; one blank line between blocks, none at either end."""
        found: list[Line] = []
        source = _LINE.findall(text)
        for block in _blocks(self._parser.parse(text)):
            start, end = block[0].map or (0, 0)
            shown = self._block(block, "".join(source[start:end]))
            found += [Line("", 0), *shown] if found and shown else shown
        return found

    def _block(self, tokens: list[Token], source: str) -> list[Line]:
        console = self._console
        options = console.options.update(width=max(console.width, _NARROWEST), height=None)
        try:
            rendered = console.render_lines(_Reply(tokens), options, pad=False)
        except Exception:  # whatever a model writes: a flaw in the layout must not end the conversation
            rendered = console.render_lines(Text(source), options, pad=False)
        trimmed = [_trim(line) for line in rendered]
        while trimmed and not trimmed[0]:
            trimmed.pop(0)
        while trimmed and not trimmed[-1]:
            trimmed.pop()
        return [Line(_ansi(console, line), Segment.get_line_length(line)) for line in trimmed]


def _blocks(tokens: list[Token]) -> Iterator[list[Token]]:
    """The tokens of each top-level block."""
    block: list[Token] = []
    for token in tokens:
        block.append(token)
        if token.level == 0 and token.nesting <= 0:
            yield block
            block = []


def _trim(line: list[Segment]) -> list[Segment]:
    """Without trailing blanks: what is copied from the screen is clean, and a narrower window folds less."""
    line = [segment for segment in line if segment.text and not segment.control]
    while line and not line[-1].text.strip(" "):
        line.pop()
    if line:
        line[-1] = Segment(line[-1].text.rstrip(" "), line[-1].style)
    return line


def _ansi(console: Console, line: Iterable[Segment]) -> str:
    system = COLOR_SYSTEMS[console.color_system] if console.color_system else None
    if console.no_color:
        line = Segment.remove_color(line)
    return "".join(style.render(text, color_system=system) if style else text for text, style, _ in line)


class _Paragraph(Paragraph):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _wrapped(self.text, options.max_width)


class _Heading(Heading):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _wrapped(self.text, options.max_width)


class _CodeBlock(CodeBlock):
    """Code at the left edge between dim fences, so that it can be copied as it is."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        language = "" if self.lexer_name == "text" else self.lexer_name
        yield Text(f"```{language}", style="markdown.fence", overflow="ellipsis", no_wrap=True)
        yield Syntax(
            str(self.text).removesuffix("\n"),
            self.lexer_name,
            theme="ansi_dark",
            background_color="default",
            word_wrap=True,
            tab_size=4,
        )
        yield Text("```", style="markdown.fence")


class _Table(TableElement):
    """Without the blank lines that Rich's own has above and below."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False, collapse_padding=True)
        for cell in self.header.row.cells if self.header and self.header.row else ():
            heading = cell.content.copy()
            heading.stylize("bold")
            table.add_column(heading, justify=cell.justify)
        for row in self.body.rows if self.body else ():
            table.add_row(*(cell.content for cell in row.cells))
        yield table


class _Rule(HorizontalRule):
    new_line = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Rule(style="markdown.hr")


class _Reply(Markdown):
    elements = {  # noqa: RUF012 - the base class's own shape
        **Markdown.elements,
        "paragraph_open": _Paragraph,
        "heading_open": _Heading,
        "fence": _CodeBlock,
        "code_block": _CodeBlock,
        "table_open": _Table,
        "hr": _Rule,
    }

    def __init__(self, tokens: list[Token]) -> None:
        super().__init__("", hyperlinks=False)  # a link shows where it leads
        self.parsed = _keep_breaks(tokens)


def _keep_breaks(tokens: list[Token]) -> list[Token]:
    """A poem's lines stay lines: a single line end breaks the line, as chat windows do."""
    for token in tokens:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return tokens


def _wrapped(text: Text, width: int) -> Iterable[Text]:
    for line in text.split("\n", allow_blank=True):
        line.expand_tabs(4)
        for part in line.divide(_breaks(line.plain, width)):
            part.rstrip()
            part.no_wrap = True
            part.overflow = "ignore"
            yield part


def _breaks(text: str, width: int) -> list[int]:
    """Where to break so that no line fills more than `width` cells; between words, and between Chinese characters."""
    offsets: list[int] = []
    start = best = filled = 0
    for i, char in enumerate(text):
        cells = cell_len(char)
        if i and char != " " and _may_break(text[i - 1], char):
            best = i
        while filled + cells > width and i > start and char != " ":
            start = best if best > start else i
            offsets.append(start)
            filled = sum(map(cell_len, text[start:i]))
        filled += cells
    return offsets


def _may_break(before: str, after: str) -> bool:
    if before == " ":
        return True
    if _JOINERS.match(after) or before == "\u200d" or after in _NO_START or before in _NO_END:
        return False
    return _wide(before) or _wide(after)


def _wide(char: str) -> bool:
    return char >= "\u1100" and cell_len(char) == 2

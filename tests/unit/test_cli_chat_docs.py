"""docs/chat.md and docs/chat_zh.md say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hanlin.cli.commands import COMMANDS, KEYS, WORDS
from hanlin.cli.inputs import names_model

DOCS = Path(__file__).parents[2] / "docs"
ROWS = [*((command.usage, command.help) for command in COMMANDS), *KEYS]


def _rows(name: str) -> list[tuple[str, str]]:
    text = (DOCS / name).read_text(encoding="utf-8")
    return re.findall(r"^\| `(.+?)` \| (.+) \|$", text, re.MULTILINE)


def test_the_english_tables_are_those_of_the_code() -> None:
    assert _rows("chat.md") == ROWS


def test_the_chinese_tables_have_the_same_rows() -> None:
    assert [usage for usage, _ in _rows("chat_zh.md")] == [usage for usage, _ in ROWS]


@pytest.mark.parametrize("name", ["chat.md", "chat_zh.md"])
def test_what_is_named_exists(name: str) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    help_ = (Path(__file__).parents[2] / "src/hanlin/cli/chat.py").read_text(encoding="utf-8")
    for option in set(re.findall(r"--[a-z][a-z-]+", text)) - {"--help"}:
        assert f'"{option}"' in help_ or f"{option[2:].replace('-', '_')}: Annotated" in help_, option
    for word, command in WORDS:
        assert f"`{word}`" in text and f"`{command}" in text
    for model in ("smollm2", "internlm2_5-7b-chat", "internlm2_5-1_8b-chat"):
        assert model in text and names_model(model)

"""`hanlin chat` with the real default model: one question, pipes, and a conversation at a terminal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hanlin
from hanlin import hub
from hanlin.errors import DownloadError

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning"),
]

FRANCE = "What is the capital of France?"


@pytest.fixture(scope="module")
def model() -> str:
    try:
        return str(hub.resolve(None).path)
    except DownloadError as error:
        pytest.skip(f"needs the default model: {error}")


@pytest.fixture
def chat(model: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    def chat(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(Path(hanlin.__file__).parents[1])}
        command = [sys.executable, "-m", "hanlin", "chat", "-m", model, *arguments]
        return subprocess.run(
            command, env=environment, input=stdin, capture_output=True, text=True, timeout=200, check=False
        )

    return chat


def test_one_question(model: str, chat: Callable[..., Any]) -> None:
    done = chat(FRANCE, "--temperature", "0", "--max-tokens", "40", "--stats")
    assert done.returncode == 0
    with hanlin.load(model) as llm:
        assert done.stdout == llm.chat(FRANCE, temperature=0, max_tokens=40).text + "\n"
    for said in (
        r"load +\d+\.\d\d s",
        r"prompt +\d+ tokens at [\d.,]+ tokens/s",
        r"reply +\d+ tokens at",
        r"memory +\d+ MB",
    ):
        assert re.search(said, done.stderr), done.stderr


def test_streamed_and_json_are_the_same_reply(chat: Callable[..., Any]) -> None:
    options = ("--seed", "5", "--temperature", "0.8", "--max-tokens", "30")
    document = "The quick brown fox jumps over the lazy dog.\n"
    streamed = chat("Repeat this:", *options, stdin=document)
    answer = json.loads(chat("Repeat this:", "--json", *options, stdin=document).stdout)
    assert streamed.stdout.rstrip("\n") == answer["text"].rstrip("\n")
    assert answer["seed"] == 5 and answer["stats"]["generated_tokens"] <= 30
    assert answer["stats"]["peak_memory_bytes"] > 50e6 and answer["stats"]["first_token_seconds"] > 0


def test_what_cannot_be_is_told_in_a_line(chat: Callable[..., Any]) -> None:
    done = chat("word " * 300, "--session-len", "128")
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: .*128.*\n", done.stderr), done.stderr
    done = chat("hello", "--dtype", "float99")
    assert done.returncode == 1 and "dtype must be one of" in done.stderr


@pytest.fixture
def start(model: str, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    pytest.importorskip("pexpect", reason="needs pexpect: pip install 'hanlin[dev]'")
    pytest.importorskip("pyte", reason="needs the terminal emulator pyte: pip install 'hanlin[dev]'")
    if sys.platform == "win32":
        pytest.skip("needs a POSIX pseudo-terminal")
    from cli_chat_screen import Terminal

    running: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        running.append(Terminal(tmp_path, ["-m", "hanlin", "chat", model, *arguments]))
        return running[-1]

    yield start
    for terminal in running:
        terminal.process.close(force=True)


def test_a_conversation(start: Callable[..., Any], tmp_path: Path) -> None:
    talk = start("--seed", "1", "--max-tokens", "40")
    talk.ask("My name is Kim. Say hello.")
    first = talk.lines[3:-1]
    assert any(first)
    talk.ask("/retry")
    retry = "Expect the same reply, unless something else changed: the seed is 1."
    assert talk.lines[talk.lines.index(retry) + 1 : -1] == first, "one request, one answer"
    talk.ask("/set max_tokens 4000")
    talk.ready()
    talk.type("Tell me a very long story about ten dragons.\r")
    talk.until(lambda: len(talk.lines[-1]) > 60, "a stream")
    talk.type("\x03")
    talk.expect("Stopped.")
    talk.ready()
    talk.ask("/set max_tokens 20")
    talk.ask("What did I ask you to tell?")
    talk.ask("/stats")
    cached = re.search(r"prompt +(\d+) tokens at [\d.,]+ tokens/s, (\d+) of them cached", talk.text)
    assert cached and int(cached[2]) > 32, "the conversation so far is not computed again"
    talk.ask("/save talk.json")
    talk.ready()
    talk.type("stop\r")
    assert talk.leave() == 0
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"] * 3

    again = start()
    again.ask("/load talk.json")
    again.ask("/set")
    assert "max_tokens = 20" in again.text and "seed = 1" in again.text
    again.ask("/retry")
    assert again.text.count(">>>") == 4


def test_a_small_context_forgets_old_turns_and_goes_on(start: Callable[..., Any]) -> None:
    talk = start("--session-len", "110", "--max-tokens", "30", "--temperature", "0")
    for number in range(4):
        talk.ask(f"What is {number} plus {number}? Answer with a short sentence please.")
    assert "longer sent" in talk.text and "error" not in talk.text.lower()

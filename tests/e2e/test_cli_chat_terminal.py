"""`hanlin chat` at a pseudo-terminal: what a person sees and what the keys do. The model is a fake."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hanlin

if sys.platform == "win32":
    pytest.skip("needs a POSIX pseudo-terminal", allow_module_level=True)
pexpect: Any = pytest.importorskip("pexpect", reason="needs pexpect: pip install 'hanlin[dev]'")
pyte: Any = pytest.importorskip("pyte", reason="needs the terminal emulator pyte: pip install 'hanlin[dev]'")

import termios  # noqa: E402

from cli_chat_screen import Terminal  # noqa: E402

# From Python 3.12 on, forking beside the threads of other tests' libraries is warned of; only exec follows here.
pytestmark = pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")

_FAKE = Path(__file__).parents[1] / "unit" / "cli_chat_fake.py"
CTRL_C, CTRL_D, ALT_ENTER, UP = "\x03", "\x04", "\x1b\r", "\x1b[A"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    running: list[Terminal] = []

    def start(*arguments: str, **options: Any) -> Terminal:
        running.append(Terminal(tmp_path, [str(_FAKE), "chat", *arguments], **options))
        return running[-1]

    yield start
    for terminal in running:
        terminal.process.close(force=True)


Start = Callable[..., Terminal]


def test_a_conversation(start: Start, tmp_path: Path) -> None:
    chat = start()
    chat.ready()
    assert chat.lines[:2] == [
        f"Hanlin {hanlin.__version__} · fake (plain, 1000 tokens)",
        "/help lists the commands, Ctrl+D leaves.",
    ]
    chat.ask("hello 你好")
    chat.ask("context")
    assert chat.lines[2:] == [">>> hello 你好", "hello 你好", "", ">>> context", "3 messages", "", ">>>"]
    chat.type(CTRL_D)
    assert chat.leave() == 0
    history = tmp_path / "chat_history"
    assert "+hello 你好" in history.read_text(encoding="utf-8")
    assert history.stat().st_mode & 0o777 == 0o600


def test_a_reply_streams_and_ctrl_c_keeps_the_part(start: Start) -> None:
    chat = start()
    chat.ready()
    chat.type("count\r")
    chat.expect("0 1 2 3 4 5")
    assert "Stopped" not in chat.text
    chat.type(CTRL_C)
    chat.expect("Stopped.")
    chat.ready()
    chat.ask("context")
    assert "3 messages" in chat.text
    assert "^C" not in chat.text and "Traceback" not in chat.text
    chat.type(CTRL_D)
    assert chat.leave() == 0


def test_ctrl_c_during_the_wait(start: Start, tmp_path: Path) -> None:
    chat = start(FAKE_LOG=str(tmp_path / "waiting"))
    chat.ready()
    chat.type("wait\r")
    chat.until((tmp_path / "waiting").exists, "the waiting")
    chat.type(CTRL_C)
    chat.expect("Stopped before the first word; nothing was kept.")
    chat.ask("context")
    assert "1 messages" in chat.text


def test_ctrl_c_at_the_prompt_clears_the_line_and_twice_leaves(start: Start) -> None:
    chat = start()
    chat.ready()
    chat.type("not sent" + CTRL_C)
    chat.expect("Ctrl+C again, or Ctrl+D, leaves.")
    chat.ask("context")
    assert "1 messages" in chat.text
    chat.type(CTRL_C)
    chat.until(lambda: chat.text.count("Ctrl+C again") == 2, "the second hint")
    chat.ready()
    chat.type(CTRL_C)
    assert chat.leave() == 0


def test_many_lines(start: Start) -> None:
    chat = start()
    chat.ready()
    chat.type("one" + ALT_ENTER + "two\\\rthree\r")
    chat.until(lambda: chat.lines[-2:] == ["", ">>>"], "the reply")
    assert chat.lines[2:] == [">>> one", "... two", "... three", "one", "two", "three", "", ">>>"]
    chat.type("'''\r  /clear\rstop\r'''\r")
    chat.until(lambda: chat.text.count(">>>") == 3, "the reply")
    assert "messages" not in chat.text.lower() and "afresh" not in chat.text
    chat.ask("context")
    assert "5 messages" in chat.text
    chat.type("\x1b[200~pasted\rlines\x1b[201~")
    chat.expect("... lines")
    assert chat.lines[-1] == "... lines", "a paste must not send itself"
    chat.type("\r")
    chat.ready()


def test_retry(start: Start) -> None:
    chat = start()
    chat.ask("context")
    chat.ask("/retry")
    assert chat.text.count("1 messages") == 2
    chat.ask("context")
    assert "3 messages" in chat.text


def test_clear_and_stop(start: Start) -> None:
    chat = start()
    chat.ask("hello")
    chat.ask("clear")
    assert "The conversation starts afresh." in chat.text
    chat.ask("context")
    assert "1 messages" in chat.text
    chat.ready()
    chat.type("stop\r")
    assert chat.leave() == 0


def test_save_leave_and_load(start: Start, tmp_path: Path) -> None:
    chat = start("--system", "Sing.")
    chat.ask("hello 你好")
    chat.ask("/set temperature 0.2")
    chat.ask("/save talk.json")
    assert "Saved 2 messages to talk.json." in chat.text
    chat.type(CTRL_D)
    assert chat.leave() == 0
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert saved["messages"][1] == {"role": "user", "content": "hello 你好"}
    other = start()
    other.ask("/load talk.json")
    other.ask("context")
    assert "4 messages" in other.text
    other.ask("/set temperature")
    assert "temperature = 0.2" in other.text
    (tmp_path / "bad.json").write_text("{")
    other.ask("/load bad.json")
    assert "bad.json is not JSON" in other.text
    other.ask("context")
    assert "6 messages" in other.text


def test_errors_are_told_and_nothing_is_lost(start: Start) -> None:
    chat = start()
    chat.ask("hello")
    for line, said in (
        ("/set temperature hot", "temperature must be a number >= 0, not 'hot'"),
        ("/nonsense", "Unknown command /nonsense"),
        ("boom", "the fake engine broke"),
        ("bug", "ZeroDivisionError: a flaw"),
    ):
        chat.ask(line)
        assert said in chat.text
    chat.ask("context")
    assert "3 messages" in chat.text and "Traceback" not in chat.text


def test_a_full_context_is_told(start: Start) -> None:
    chat = start(FAKE_CONTEXT="10")
    chat.ask("a b c")
    chat.ask("d e f g h")
    assert "the oldest turn is no longer sent" in chat.text.replace("\n", " ")


@pytest.mark.slow
def test_markdown_is_rendered_and_a_long_reply_scrolls_whole(start: Start) -> None:
    chat = start(rows=12)
    chat.ask("slow markdown")
    for shown in (" • nested 内层", "甲         1", "▌ quoted 引用", "```python", "床前明月光，\n疑是地上霜。"):
        assert shown in chat.text
    assert "**" not in chat.text and "|" not in chat.text.replace("||", "")
    chat.ask("long")
    listed = [line for line in chat.lines if line.startswith(" • line")]
    assert listed == [f" • line {i}" for i in range(200)]


def test_plain_replies_on_request(start: Start) -> None:
    chat = start("--no-markdown")
    chat.ask("markdown")
    assert "# Heading 标题" in chat.text and "| 乙乙 | 22 |" in chat.text
    dumb = start(TERM="dumb")
    dumb.expect(">>>")
    dumb.type("markdown\r")
    dumb.expect("| 乙乙 | 22 |")


@pytest.mark.slow
def test_keys_typed_meanwhile_do_not_show_and_wait_for_the_prompt(start: Start) -> None:
    chat = start()
    chat.ready()
    chat.type("slow markdown\r")
    chat.expect("Heading")
    chat.type("context\r")
    chat.expect("3 messages")
    chat.ready()
    assert chat.text.count("context") == 1 and chat.lines[-4:] == [">>> context", "3 messages", "", ">>>"]


def test_history_and_completion(start: Start) -> None:
    chat = start()
    chat.ask("hello")
    chat.type(CTRL_D)
    chat.leave()
    chat = start()
    chat.ready()
    chat.type(UP + "\r")
    chat.expect(">>> hello\nhello\n")
    chat.ready()
    chat.type("/st\t\r")
    chat.expect("peak memory")
    chat.ready()
    chat.type("/set temp\t 0.5\r")
    chat.expect("temperature = 0.5")


def test_an_unwritable_home_costs_only_the_history(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    chat = start(HANLIN_HOME=str(tmp_path / "file" / "home"))
    chat.ask("hello")
    chat.type(CTRL_D)
    assert chat.leave() == 0


def test_stats_after_each_reply(start: Start) -> None:
    chat = start("--stats")
    chat.ask("a b c d")
    assert "loaded in 0.25 s" in chat.text
    assert "reply: 4 tokens at 6.0 tokens/s" in chat.text.replace("\n", " ")


def test_a_question_on_the_command_line_is_rendered_and_ends(start: Start) -> None:
    chat = start("markdown")
    assert chat.leave() == 0
    assert "Heading 标题" in chat.text and "# Heading" not in chat.text and ">>>" not in chat.text
    stopped = start("count")
    stopped.expect("0 1 2 3")
    stopped.type(CTRL_C)
    assert stopped.leave() == 130
    assert "^C" not in stopped.text


def test_the_terminal_is_left_as_it_was(start: Start) -> None:
    for end in (signal.SIGINT, signal.SIGTERM):
        chat = start("count")
        before = termios.tcgetattr(chat.process.child_fd)
        chat.expect("0 1 2 3")
        silent = termios.tcgetattr(chat.process.child_fd)
        assert not silent[3] & termios.ECHO
        os.kill(chat.process.pid, end)
        chat.until(lambda: "\n" in chat.text or not chat.process.isalive(), "the end")  # noqa: B023
        assert termios.tcgetattr(chat.process.child_fd)[3] == before[3]
        assert chat.leave() == 128 + end


def test_ctrl_c_while_the_model_loads(start: Start, tmp_path: Path) -> None:
    chat = start(FAKE_LOADING=str(tmp_path / "loading"))
    chat.until((tmp_path / "loading").exists, "the loading")
    chat.type(CTRL_C)
    assert chat.leave() == 130
    assert "Traceback" not in chat.text and "^C" not in chat.text


def test_a_background_job_is_not_halted() -> None:
    """A job of a shell that writes to the terminal, but does not own the keyboard."""
    script = f"{sys.executable} {_FAKE} chat count & sleep 0.1; wait"
    shell = pexpect.spawn(
        "bash", ["-ic", script], env=dict(os.environ, PYTHONPATH=str(Path(hanlin.__file__).parents[1]))
    )
    shell.expect("0 1 2 3", timeout=60)
    shell.close(force=True)

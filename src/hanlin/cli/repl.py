"""The conversation at a terminal: editing lines, running commands, asking."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.styles import Style
from rich.console import Console

from hanlin.cli.commands import COMMANDS, Leave, Shell, dispatch, is_command
from hanlin.cli.render import visible
from hanlin.cli.settings import NAMES
from hanlin.errors import HanlinError

__all__ = ["Repl", "history_path"]

_QUOTES = ("'''", '"""')
_LONGEST = 1 << 16  # characters of one history entry


class Repl:
    """Reads lines until the person leaves. `done` is called after each answered question."""

    def __init__(self, shell: Shell, console: Console, done: Callable[[], object], history: Path) -> None:
        self._shell = shell
        self._console = console
        self._done = done
        self._leaving = False
        self._input: PromptSession[str] = PromptSession(
            [("class:prompt", ">>> ")],
            multiline=True,
            prompt_continuation="... ",
            style=Style([("prompt", "ansigreen bold")]),
            history=_history(history),
            completer=_Completer(),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            key_bindings=_bindings(),
            reserve_space_for_menu=0,
        )

    def run(self) -> None:
        while True:
            try:
                self._handle(self._read())
            except (EOFError, Leave):
                return
            except KeyboardInterrupt:
                self._shell.say("Interrupted.")
            except HanlinError as error:
                self._fail(str(error))
            except Exception as error:  # a flaw of ours must not cost the person the conversation
                if os.environ.get("HANLIN_DEBUG", "") not in ("", "0"):
                    raise
                self._fail(f"{type(error).__name__}: {error}\nThe conversation is as it was before; /save keeps it.")

    def _handle(self, text: str) -> None:
        if is_command(text):
            before = self._shell.session.last
            dispatch(self._shell, text)
            answered = self._shell.session.last is not before
        else:
            question = unquoted(text)
            answered = bool(question)
            if answered:
                self._shell.session.ask(question)
        reply = self._shell.session.last
        if answered and reply is not None:
            if reply.stopped:
                self._shell.say("Stopped." if reply.text else "Stopped before the first word; nothing was kept.")
            self._done()
        if text.strip():
            self._console.print()

    def _read(self) -> str:
        """A line, or a block of lines. Ctrl-C clears what was typed; a second one leaves.

        Raises:
            EOFError: the person leaves.
        """
        while True:
            try:
                text = self._input.prompt()
            except KeyboardInterrupt:
                if self._leaving and not self._input.default_buffer.text:
                    raise EOFError from None
                self._leaving = True
                self._shell.say("Ctrl+C again, or Ctrl+D, leaves.")
            else:
                self._leaving = False
                return text.encode("utf-8", "replace").decode()

    def _fail(self, text: str) -> None:
        self._console.print(visible(text), style="failure", markup=False, highlight=False)
        self._console.print()


def unquoted(text: str) -> str:
    """What was asked: a quoted block as it is, anything else without blanks around it."""
    text = text.strip()
    for quote in _QUOTES:
        if text.startswith(quote):
            return text[len(quote) :].removesuffix(quote).strip("\r\n")
    return text


def is_open(text: str) -> bool:
    """Whether a quoted block has begun and not ended."""
    text = text.strip()
    return any(text.startswith(quote) and not (len(text) >= 6 and text.endswith(quote)) for quote in _QUOTES)


def history_path() -> Path:
    """Under HANLIN_HOME, else where the platform keeps what programs remember."""
    home = os.environ.get("HANLIN_HOME", "").strip()
    if home:
        return Path(home).expanduser() / "chat_history"
    from platformdirs import user_state_path

    return user_state_path("hanlin", appauthor=False) / "chat_history"


def _history(path: Path) -> History:
    """For the person's eyes only; where nothing can be written, for this chat only."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError:
        return InMemoryHistory()
    return _FileHistory(str(path))


class _FileHistory(FileHistory):
    def store_string(self, string: str) -> None:
        with suppress(OSError, ValueError):  # a full disk, a lone surrogate: not worth a word
            if len(string) <= _LONGEST:
                super().store_string(string)


def _bindings() -> KeyBindings:
    bindings = KeyBindings()
    editing = has_focus(DEFAULT_BUFFER)

    @bindings.add("enter", filter=editing)
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        elif buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter", filter=editing)
    @bindings.add("escape", "c-j", filter=editing)
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


class _Completer(Completer):
    """Commands, the parameters of /set, and the files of /save, /load and /image."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        name, space, rest = text.partition(" ")
        if not text.startswith("/") or "\n" in text:
            return
        if not space:
            words: Iterable[str] = (command.name for command in COMMANDS)
        elif name == "/set":
            words = NAMES
        elif name in ("/save", "/load", "/image"):
            yield from PathCompleter(expanduser=True).get_completions(Document(rest), complete_event)
            return
        else:
            return
        typed = rest if space else name
        for word in words:
            if word.startswith(typed):
                yield Completion(word, start_position=-len(typed))

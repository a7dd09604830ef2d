"""The commands of a chat, in one table: `/help`, the completion and the documentation read it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hanlin import images
from hanlin.cli import conversation, settings
from hanlin.cli.session import Session
from hanlin.cli.stats import Stats
from hanlin.errors import RequestError
from hanlin.types import SamplingParams

__all__ = ["COMMANDS", "KEYS", "WORDS", "Command", "Leave", "Shell", "dispatch", "is_command"]


class Leave(Exception):  # noqa: N818 - a way out, no error
    """The person wants to leave the chat."""


@dataclass(frozen=True, kw_only=True)
class Shell:
    """What commands work on. `default` is the sampling that the chat began with; `say` prints."""

    session: Session
    default: SamplingParams
    say: Callable[[str], object]


@dataclass(frozen=True)
class Command:
    name: str
    arguments: str
    help: str
    run: Callable[[Shell, str], object]

    @property
    def usage(self) -> str:
        return f"{self.name} {self.arguments}".strip()


def _help(shell: Shell, argument: str) -> None:
    rows = [(command.usage, command.help) for command in COMMANDS]
    width = max(len(left) for left, _ in (*rows, *KEYS)) + 2
    for left, right in (*rows, ("", ""), *KEYS):
        shell.say(f"{left:<{width}}{right}".rstrip())


def _system(shell: Shell, argument: str) -> None:
    talk, own = shell.session.conversation, shell.session.model.chat_format.default_system
    if argument:
        talk.system = None if argument == "default" else argument
        shell.say("System prompt set; it counts from the next turn on.")
    elif talk.system is not None:
        shell.say(f"System prompt: {talk.system}")
    else:
        shell.say(f"System prompt (the model's own): {own}" if own else "There is no system prompt.")


def _clear(shell: Shell, argument: str) -> None:
    shell.session.conversation.clear()
    shell.say("The conversation starts afresh.")


def _retry(shell: Shell, argument: str) -> None:
    shell.session.retry()


def _set(shell: Shell, argument: str) -> None:
    talk = shell.session.conversation
    name, _, value = argument.partition(" ")
    if value.strip():
        talk.sampling = settings.changed(talk.sampling, name, value.strip(), shell.default)
    for each in [settings.known(name)] if name else settings.NAMES:
        shell.say(f"{each} = {settings.shown(talk.sampling, each)}")


def _stats(shell: Shell, argument: str) -> None:
    session = shell.session
    if session.last is None:
        raise RequestError("There is no reply yet to give numbers of.")
    stats = Stats.of(session.last, session.model.stats())
    shell.say(stats.text())
    if stats.prompt_tokens is not None:
        used = stats.prompt_tokens + stats.generated_tokens
        shell.say(f"{'context':<12} {used} of {session.model.context_length} tokens")


def _save(shell: Shell, argument: str) -> None:
    path, talk = _path("/save", argument), shell.session.conversation
    conversation.write(path, talk, shell.session.model.name)
    shell.say(f"Saved {len(talk.messages)} messages to {path}.")


def _load(shell: Shell, argument: str) -> None:
    path, talk = _path("/load", argument), shell.session.conversation
    saved = conversation.read(path)
    talk.system, talk.messages, talk.forgotten = saved.system, saved.messages, 0
    talk.sampling = saved.sampling or talk.sampling
    shell.say(f"Loaded {len(saved.messages)} messages from {path}.")
    if saved.model not in (None, shell.session.model.name):
        shell.say(f"They were made with {saved.model}; {shell.session.model.name} goes on.")


def _image(shell: Shell, argument: str) -> None:
    shell.session.show(images.read(_path("/image", argument)))
    shell.say("The image goes with your next question.")


def _exit(shell: Shell, argument: str) -> None:
    raise Leave


COMMANDS: tuple[Command, ...] = (
    Command("/help", "", "Show this.", _help),
    Command("/system", "[TEXT]", "Show or set the system prompt; `default` is the model's.", _system),
    Command("/clear", "", "Forget the conversation. So does the bare word `clear`.", _clear),
    Command("/retry", "", "Answer the last question again.", _retry),
    Command("/set", "[NAME [VALUE]]", "Show or set the sampling: `/set temperature 0.2`.", _set),
    Command("/stats", "", "Speed and memory of the last reply.", _stats),
    Command("/save", "FILE", "Save the conversation as JSON.", _save),
    Command("/load", "FILE", "Go on with a saved conversation.", _load),
    Command("/image", "FILE", "Show an image with the next question.", _image),
    Command("/exit", "", "Leave. So does the bare word `stop`.", _exit),
)

WORDS: tuple[tuple[str, str], ...] = (("clear", "/clear"), ("stop", "/exit"))

KEYS: tuple[tuple[str, str], ...] = (
    ("Enter", "Send."),
    ("Alt+Enter", "New line. So does Enter after a \\ at the end."),
    ("''' ... '''", "A block of any lines, sent as it is."),
    ("Up, Down, Ctrl+R", "Earlier input."),
    ("Tab", "Complete a command, a parameter or a file name."),
    ("Ctrl+C", "Stop the reply. At the prompt: clear it; twice, leave."),
    ("Ctrl+D", "Leave."),
)


def is_command(line: str) -> bool:
    """Whether the line is for us. A space in front of the slash sends it to the model."""
    return line.startswith("/") or any(line.strip() == word for word, _ in WORDS)


def dispatch(shell: Shell, line: str) -> None:
    """Run the command that the line is.

    Raises:
        Leave: the person wants to leave.
        HanlinError: there is no such command, or it cannot be done; nothing has changed.
    """
    line = dict(WORDS).get(line.strip(), line.strip())
    name, _, argument = line.partition(" ")
    known = {command.name: command for command in COMMANDS}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise RequestError(f"Unknown command {name}. {hint}/help lists all; a space in front sends the line as it is.")
    argument = argument.strip()
    if argument and not known[name].arguments:
        raise RequestError(f"{name} takes no argument, not {argument!r}.")
    known[name].run(shell, argument)


def _path(name: str, argument: str) -> Path:
    text = argument[1:-1] if len(argument) > 1 and argument[0] == argument[-1] and argument[0] in "'\"" else argument
    if not text:
        raise RequestError(f"{name} needs a file name: {name} {'photo.png' if name == '/image' else 'talk.json'}")
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path.expanduser raises for an unknown user

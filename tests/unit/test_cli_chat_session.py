"""Asking and asking again: what is kept, what is sent, and what the person is told."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_chat_fake import FakeLLM

from hanlin.cli.commands import COMMANDS, KEYS, Leave, Shell, dispatch, is_command
from hanlin.cli.conversation import Conversation
from hanlin.cli.generation import Reply
from hanlin.cli.render import SilentView
from hanlin.cli.session import Session
from hanlin.cli.stats import Stats
from hanlin.errors import ContextLengthError, EngineError, RequestError
from hanlin.types import Completion, Message, SamplingParams, Timings, Usage


class Chat:
    """A session with a fake model, and what was said beside the conversation."""

    def __init__(self, context: int = 1000) -> None:
        self.llm = FakeLLM()
        self.llm.context_length = context
        self.talk = Conversation(sampling=self.llm.default_sampling)
        self.said: list[str] = []
        self.session = Session(model=self.llm, conversation=self.talk, view=SilentView, notice=self.said.append)
        self.shell = Shell(session=self.session, default=self.llm.default_sampling, say=self.said.append)

    def command(self, line: str) -> str:
        self.said.clear()
        dispatch(self.shell, line)
        return "\n".join(self.said)

    @property
    def turns(self) -> list[str]:
        return [m.content for m in self.talk.messages]

    @property
    def sent(self) -> list[str]:
        return [m.content for m in self.llm.requests[-1][0]]


def _interrupt_when(ready: Callable[[], object]) -> None:
    """Ctrl-C, from another thread as a terminal sends it, once the reply has got so far."""

    def press() -> None:
        while not ready():
            time.sleep(0.01)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()


def test_turns_accumulate() -> None:
    chat = Chat()
    chat.session.ask("one")
    chat.session.ask("two")
    assert chat.sent == ["one", "one", "two"]
    assert chat.turns == ["one", "one", "two", "two"]
    assert chat.llm.finished == ["whole", "whole"]
    assert chat.said == []


def test_a_failed_turn_leaves_the_conversation_as_it_was() -> None:
    chat = Chat()
    chat.session.ask("one")
    for question, error in (("boom", EngineError), ("bug", ZeroDivisionError)):
        with pytest.raises(error):
            chat.session.ask(question)
        assert chat.turns == ["one", "one"]


def test_ctrl_c_keeps_what_was_said_and_ends_the_request() -> None:
    chat = Chat()
    before = signal.getsignal(signal.SIGINT)
    seen: list[str] = []

    class Seen(SilentView):
        def push(self, text: str) -> None:
            seen.append(text)

    chat.session.view = Seen
    _interrupt_when(lambda: len(seen) > 3)
    reply = chat.session.ask("count")
    assert reply.stopped and reply.text.startswith("0 1 2 ") and reply.tokens == len(reply.text.split())
    assert chat.turns == ["count", reply.text]
    assert chat.llm.finished == ["closed"]
    assert signal.getsignal(signal.SIGINT) is before
    chat.session.ask("context")
    assert chat.sent == ["count", reply.text, "context"]


def test_ctrl_c_before_the_first_word_ends_the_wait_at_once_and_keeps_nothing() -> None:
    chat = Chat()
    _interrupt_when(lambda: chat.llm.requests)
    start = time.perf_counter()
    reply = chat.session.ask("wait")
    assert time.perf_counter() - start < 5
    assert reply.stopped and reply.first is None and chat.turns == []
    assert chat.llm.finished == ["closed"]


def test_ctrl_c_while_the_screen_is_written_waits_for_the_writing() -> None:
    chat = Chat()
    whole: list[str] = []

    class Slow(SilentView):
        def push(self, text: str) -> None:
            if not whole:
                os.kill(os.getpid(), signal.SIGINT)
            whole.append(text)

    chat.session.view = Slow
    reply = chat.session.ask("count")
    assert whole == ["0 "] and reply.text == "0 " and reply.stopped


def test_retry_answers_the_last_question_again_and_replaces_the_reply() -> None:
    chat = Chat()
    with pytest.raises(RequestError, match="no question"):
        chat.session.retry()
    chat.session.ask("one")
    chat.session.ask("two")
    chat.session.retry()
    assert chat.sent == ["one", "one", "two"]
    assert chat.turns == ["one", "one", "two", "two"]


def test_retry_keeps_the_old_reply_until_there_is_a_new_one() -> None:
    chat = Chat()
    chat.talk.messages = (Message(role="user", content="wait"), Message(role="assistant", content="old"))
    _interrupt_when(lambda: chat.llm.requests)
    chat.session.retry()
    assert chat.turns == ["wait", "old"]
    chat.talk.messages = (Message(role="user", content="boom"), Message(role="assistant", content="old"))
    with pytest.raises(EngineError):
        chat.session.retry()
    assert chat.turns == ["boom", "old"]


def test_retry_says_when_nothing_can_change() -> None:
    chat = Chat()
    chat.session.ask("one")
    for name, value in (("seed", "3"), ("temperature", "0")):
        chat.command(f"/set {name} {value}")
        assert name in chat.command("/retry")


def test_a_full_context_drops_the_older_half_and_says_so() -> None:
    chat = Chat(context=22)
    for i in range(4):
        chat.session.ask(f"a b {i}")
    assert chat.said == []
    chat.session.ask("context 1 2 3 4")
    assert chat.said == [
        "The conversation no longer fits the context of 22 tokens: the oldest 2 turns are no longer sent. "
        "/clear starts afresh; /save still keeps everything."
    ]
    assert chat.sent == ["a b 2", "a b 2", "a b 3", "a b 3", "context 1 2 3 4"]
    assert len(chat.turns) == 10


def test_a_question_that_never_fits_is_refused_and_nothing_is_forgotten() -> None:
    chat = Chat(context=20)
    for i in range(3):
        chat.session.ask(f"a b {i}")
    with pytest.raises(ContextLengthError):
        chat.session.ask("x " * 30)
    assert len(chat.turns) == 6 and chat.talk.forgotten == 0


def test_a_reply_that_fills_the_context_makes_room_for_the_next() -> None:
    chat = Chat()
    chat.session.ask("one")
    chat.session.ask("full")
    assert "the oldest turn is no longer sent" in chat.said[0] and chat.talk.forgotten == 2
    alone = Chat()
    alone.session.ask("full")
    assert "prompt and reply fill the context" in alone.said[0]


def test_a_cut_reply_names_the_parameter() -> None:
    chat = Chat()
    chat.command("/set max_tokens 2")
    chat.session.ask("a b c d")
    assert chat.turns[-1] == "a b"
    assert "/set max_tokens 4" in chat.said[-1] and "--max-tokens" in chat.said[-1]


def test_a_tool_call_is_kept_and_told() -> None:
    chat = Chat()
    chat.session.ask("tool")
    assert chat.talk.messages[-1].tool_calls[0].name == "search"
    assert "search" in chat.said[0]
    chat.session.ask("mute")
    assert chat.said[1:] == ["The model had nothing to say."]


# -- commands ----------------------------------------------------------------------------------------------------


def test_commands_are_told_from_questions() -> None:
    for line in ("/help", "/nonsense", "clear", " stop ", "stop"):
        assert is_command(line)
    for line in (" /etc/passwd", "clear the table", "stop!", "Clear", "a /help"):
        assert not is_command(line)


def test_system_prompt_is_shown_set_and_reset() -> None:
    chat = Chat()
    assert "You are a fake." in chat.command("/system")
    chat.command("/system 你是诗人。 Sing.")
    chat.session.ask("one")
    assert chat.sent == ["你是诗人。 Sing.", "one"]
    assert "你是诗人。 Sing." in chat.command("/system")
    chat.command("/system default")
    assert chat.talk.system is None
    chat.llm.chat_format.default_system = None
    assert "no system prompt" in chat.command("/system")


def test_clear_and_stop_as_chatglm_users_type_them() -> None:
    chat = Chat()
    chat.command("/system Sing.")
    chat.session.ask("one")
    chat.command("clear")
    assert chat.turns == [] and chat.talk.system == "Sing."
    for line in ("stop", "/exit"):
        with pytest.raises(Leave):
            chat.command(line)


def test_set_changes_what_the_next_reply_uses_and_refuses_nonsense() -> None:
    chat = Chat()
    assert chat.command("/set temperature 0.2") == "temperature = 0.2"
    chat.session.ask("one")
    assert chat.llm.requests[-1][1] == SamplingParams(temperature=0.2, max_tokens=1000)
    assert "top_p = 1.0" in chat.command("/set") and "stop = []" in chat.command("/set")
    with pytest.raises(RequestError, match="temperature must be"):
        chat.command("/set temperature hot")
    assert chat.talk.sampling.temperature == 0.2
    assert chat.command("/set temperature default") == "temperature = 0.7"


def test_stats_tell_speed_memory_and_context() -> None:
    chat = Chat()
    with pytest.raises(RequestError, match="no reply yet"):
        chat.command("/stats")
    chat.session.ask("a b c d")
    assert chat.command("/stats").splitlines() == [
        "load         0.25 s",
        "prompt       4 tokens at 4.0 tokens/s, 2 of them cached",
        f"first token  {chat.session.last.first:.2f} s" if chat.session.last else "",
        "reply        4 tokens at 6.0 tokens/s",
        "peak memory  123 MB",
        "context      8 of 1000 tokens",
    ]


def test_stats_of_a_stopped_reply_and_of_an_unknown_platform() -> None:
    stopped = Reply(text="a b", tokens=3, completion=None, first=1.0, seconds=2.0)
    stats = Stats.of(stopped, {"peak_memory_bytes": 0})
    assert (stats.generated_tokens_per_second, stats.prompt_tokens, stats.peak_memory_bytes) == (2.0, None, None)
    assert stats.line() == "first token: 1.00 s · reply: 3 tokens at 2.0 tokens/s"
    usage = Usage(prompt_tokens=5, cached_tokens=5, generated_tokens=1)
    done = Completion(text="", ids=(), finish_reason="stop", usage=usage, timings=Timings())
    whole = Reply(text="", tokens=1, completion=done, first=0.0, seconds=0.0)
    assert Stats.of(whole, {}).text().splitlines()[0] == "prompt       5 tokens, 5 of them cached"


def test_save_and_load_go_on_where_it_was(tmp_path: Path) -> None:
    chat, path = Chat(), tmp_path / "my talk.json"
    chat.command("/system Sing.")
    chat.command("/set temperature 0.1")
    chat.session.ask("one")
    assert "2 messages" in chat.command(f'/save "{path}"')
    other = Chat()
    other.llm.name = "other"
    other.session.ask("forgotten")
    said = other.command(f"/load {path}")
    assert "2 messages" in said and "made with fake; other goes on" in said
    other.session.ask("two")
    assert other.sent == ["Sing.", "one", "one", "two"]
    assert other.llm.requests[-1][1].temperature == 0.1


def test_a_bad_file_costs_nothing(tmp_path: Path) -> None:
    chat, path = Chat(), tmp_path / "bad.json"
    path.write_text('{"messages": [{"role": "user", "content": "x"}, {"role": "wizard"}], "sampling": {"top_p": 9}}')
    chat.session.ask("one")
    before = chat.talk.sampling
    with pytest.raises(RequestError, match=r"(?s)messages\[1\].*top_p"):
        chat.command(f"/load {path}")
    assert chat.turns == ["one", "one"] and chat.talk.sampling is before
    for line in ("/load", "/save", "/load ~nobody-here/x", "/save \0"):
        with pytest.raises(RequestError):
            chat.command(line)


def test_unknown_commands_and_stray_arguments_are_named() -> None:
    chat = Chat()
    with pytest.raises(RequestError, match=r"Unknown command /quti. /help"):
        chat.command("/quti")
    with pytest.raises(RequestError, match=r"Did you mean /retry\?"):
        chat.command("/retyr")
    with pytest.raises(RequestError, match="/clear takes no argument, not 'all'"):
        chat.command("/clear all")


def test_help_lists_everything_within_80_columns() -> None:
    shown = Chat().command("/help")
    assert all(command.usage in shown and command.help in shown for command in COMMANDS)
    assert all(key in shown for key, _ in KEYS)
    assert max(map(len, shown.splitlines())) < 80

"""Images in a chat at the terminal: shown with the next question, kept with the conversation, one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_chat_fake import FakeLLM

from hanlin.cli.commands import Shell, dispatch
from hanlin.cli.conversation import Conversation, read, write
from hanlin.cli.render import SilentView
from hanlin.cli.session import Session
from hanlin.errors import RequestError


class Seeing(FakeLLM):
    sees = True


def shell(llm: FakeLLM, said: list[str]) -> Shell:
    talk = Conversation(sampling=llm.default_sampling)
    session = Session(model=llm, conversation=talk, view=SilentView, notice=said.append)
    return Shell(session=session, default=llm.default_sampling, say=said.append)


def test_an_image_goes_with_the_next_question_and_stays(tmp_path: Path) -> None:
    first, second, said = tmp_path / "a b.png", tmp_path / "b.png", []
    first.write_bytes(b"first")
    second.write_bytes(b"second")
    llm = Seeing()
    chat = shell(llm, said)
    dispatch(chat, f"/image '{first}'")
    assert said == ["The image goes with your next question."]
    with pytest.raises(Exception, match="fake engine broke"):
        chat.session.ask("boom")
    assert chat.session.images == (b"first",)  # the question was not kept: the image waits for the next
    chat.session.ask("what is this")
    chat.session.ask("and now")
    assert chat.session.images == ()
    assert [message.images for message in llm.requests[-1][0]] == [(b"first",), (), ()]
    talk = chat.session.conversation
    write(tmp_path / "talk.json", talk, "fake")
    assert read(tmp_path / "talk.json").messages == talk.messages
    talk.forget()
    assert talk.sent()[0].content == "and now" and talk.sent()[0].images == (b"first",)
    dispatch(chat, f"/image {second}")
    assert talk.messages == () and any("starts afresh" in text for text in said)
    chat.session.ask("this one")
    assert [message.images for message in llm.requests[-1][0]] == [(b"second",)]


def test_what_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(b"an image")
    for llm, line, words in (
        (FakeLLM(), f"/image {image}", "cannot see images"),
        (Seeing(), "/image", "needs a file name: /image photo.png"),
        (Seeing(), f"/image {tmp_path / 'none.png'}", "cannot be read"),
        (Seeing(), f"/image {tmp_path}", "cannot be read|not a regular file"),
    ):
        chat = shell(llm, [])
        with pytest.raises(RequestError, match=words):
            dispatch(chat, line)
        assert chat.session.images == ()

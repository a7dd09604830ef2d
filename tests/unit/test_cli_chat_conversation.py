"""What a chat remembers, what /set takes, and the file that /save writes and /load reads."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanlin.cli import conversation, settings
from hanlin.cli.conversation import Conversation
from hanlin.errors import HanlinError, RequestError
from hanlin.types import Message, SamplingParams, ToolCall


def _talk(turns: int) -> Conversation:
    talk = Conversation(system="Be brief.")
    for i in range(turns):
        talk.messages += (Message(role="user", content=f"q{i}"), Message(role="assistant", content=f"a{i}"))
    return talk


def test_system_prompt_goes_first_and_only_when_set() -> None:
    talk = _talk(1)
    assert [m.role for m in talk.sent()] == ["system", "user", "assistant"]
    talk.system = None
    assert [m.role for m in talk.sent()] == ["user", "assistant"]
    talk.system = ""
    assert talk.sent()[0] == Message(role="system", content="")


def test_forgetting_drops_the_older_half_from_what_is_sent_and_keeps_the_record() -> None:
    talk = _talk(5)
    assert talk.forget() == 2
    assert [m.content for m in talk.sent()] == ["Be brief.", "q2", "a2", "q3", "a3", "q4", "a4"]
    assert (talk.forget(), talk.forget(), talk.forget()) == (1, 1, 0)
    assert [m.content for m in talk.sent()] == ["Be brief.", "q4", "a4"]
    assert len(talk.messages) == 10
    talk.clear()
    assert talk.sent() == [Message(role="system", content="Be brief.")]


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
_CALL = st.builds(ToolCall, name=st.just("f"), arguments=_TEXT, kind=st.sampled_from(["function", "interpreter"]))
_MESSAGE = st.builds(
    Message,
    role=st.sampled_from(["user", "assistant", "tool"]),
    content=_TEXT,
    name=st.none() | st.just("n"),
    tool_calls=st.lists(_CALL, max_size=2).map(tuple),
)
_SAMPLING = st.builds(
    SamplingParams,
    temperature=st.floats(0, 5),
    stop=st.lists(_TEXT.filter(bool), max_size=2).map(tuple),
    seed=st.none() | st.integers(0, 2**64 - 1),
    logit_bias=st.dictionaries(st.integers(0, 99), st.floats(-5, 5), max_size=2),
)


@given(st.none() | _TEXT, st.lists(_MESSAGE, max_size=4).map(tuple), _SAMPLING)
def test_what_is_saved_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    system: str | None,
    messages: tuple[Message, ...],
    sampling: SamplingParams,
) -> None:
    path = tmp_path_factory.mktemp("talk") / "a.json"
    conversation.write(path, Conversation(system=system, sampling=sampling, messages=messages), "model 模型")
    saved = conversation.read(path)
    assert (saved.system, saved.messages, saved.sampling, saved.model) == (system, messages, sampling, "model 模型")
    assert list(path.parent.iterdir()) == [path]


def test_a_list_of_openai_messages_can_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "openai.json"
    path.write_text('\ufeff[{"role": "developer", "content": "s"}, {"role": "user", "content": "q"}]', encoding="utf-8")
    saved = conversation.read(path)
    assert (saved.system, saved.messages, saved.sampling) == ("s", (Message(role="user", content="q"),), None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not UTF-8: byte 0xff at offset 0"),
        (b"[" * 100_000, "not JSON"),
        (b"7", "no list of 'messages'"),
        (b'{"messages": {}}', "no list of 'messages'"),
        (b'{"messages": [], "version": 2}', "version 2"),
        (b'{"messages": [{"role": "wizard"}, 5, {"role": "user", "content": {}}]}', r"(?s)messages\[0\].*\[1\].*\[2\]"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', r"messages\[0\].*surrogates"),
        (b'{"messages": [{"role": "user", "tool_calls": 5}]}', r"messages\[0\]"),
        (b'{"messages": [], "sampling": {"temperature": -1}}', "temperature"),
        (b'{"messages": [], "sampling": {"warmth": 1}}', "warmth"),
        (b'{"messages": [], "sampling": {"n": 2}}', "n must be 1"),
        (b'{"messages": [], "sampling": 5}', "must be an object"),
        (b'{"messages": [], "model": 5}', "'model' must be a string"),
        (b'{"messages": [' + b",".join([b"0"] * 50) + b"]}", "and 40 more"),
    ],
)
def test_a_broken_file_is_refused_with_its_name_and_what_is_wrong(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=said) as caught:
        conversation.read(path)
    assert "broken.json" in str(caught.value)


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.integers() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(
                    ["messages", "sampling", "role", "content", "format", "tool_calls", "logit_bias", "stop"]
                ),
                x,
            )
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "any.json"
    path.write_bytes(content)
    with suppress(HanlinError):
        conversation.read(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", Path("\0"), Path("/dev/zero")):
        with pytest.raises(RequestError):
            conversation.read(path)


def test_saving_replaces_only_conversations(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes")
    with pytest.raises(RequestError, match="left alone"):
        conversation.write(path, _talk(1), "m")
    assert path.read_text() == "my notes"
    path.unlink()
    conversation.write(path, _talk(1), "m")
    conversation.write(path, _talk(2), "m")
    assert len(conversation.read(path).messages) == 4


def test_a_failed_save_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "talk.json"
    conversation.write(path, _talk(1), "m")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RequestError, match="No space left on device"):
        conversation.write(path, _talk(2), "m")
    assert len(conversation.read(path).messages) == 2
    assert list(tmp_path.iterdir()) == [path]
    for nowhere in (tmp_path / "no" / "where.json", Path("\0")):
        with pytest.raises(RequestError, match="was not written"):
            conversation.write(nowhere, _talk(1), "m")


@pytest.mark.parametrize(
    ("name", "typed", "value"),
    [
        ("temperature", "0.2", 0.2),
        ("max-tokens", "12", 12),
        ("max_tokens", "none", None),
        ("top_k", "-1", 0),
        ("stop", "###", ("###",)),
        ("stop", "5", ("5",)),
        ("stop", '"a b"', ("a b",)),
        ("stop", '["a", "b"]', ("a", "b")),
        ("stop", "none", ()),
        ("stop", "。", ("。",)),
        ("stop_token_ids", "[3, 4]", (3, 4)),
        ("stop_token_ids", "3", (3,)),
        ("logit_bias", '{"7": -1.5}', {7: -1.5}),
        ("logit_bias", "none", {}),
        ("ignore_eos", "on", True),
        ("seed", "None", None),
        ("temperature", "default", 0.7),
    ],
)
def test_set_reads_what_people_type(name: str, typed: str, value: Any) -> None:
    before = SamplingParams(temperature=0.9, seed=3, stop="x", max_tokens=5)
    after = settings.changed(before, name, typed, SamplingParams(temperature=0.7))
    assert getattr(after, name.replace("-", "_")) == value


@pytest.mark.parametrize(
    ("name", "typed"),
    [
        ("temperature", "hot"),
        ("temperature", "-1"),
        ("temperature", "NaN"),
        ("temperature", "true"),
        ("top_p", "0"),
        ("max_tokens", "1.5"),
        ("max_tokens", "9" * 400),
        ("seed", "9" * 5000),
        ("temperature", "1e999"),
        ("ignore_eos", "perhaps"),
        ("stop", "[1]"),
        ("stop_token_ids", "a"),
        ("logit_bias", '{"a": 1}'),
        ("temperature", "[" * 100_000),
        ("warmth", "1"),
        ("n", "2"),
        ("", "1"),
    ],
)
def test_set_refuses_the_rest_by_name(name: str, typed: str) -> None:
    with pytest.raises(RequestError, match=name or "Known: "):
        settings.changed(SamplingParams(), name, typed, SamplingParams())


@given(_SAMPLING, st.sampled_from(settings.NAMES))
def test_what_set_shows_can_be_typed_again(sampling: SamplingParams, name: str) -> None:
    shown = settings.shown(sampling, name)
    assert settings.changed(SamplingParams(), name, shown, sampling).__dict__[name] == getattr(sampling, name)


@given(st.sampled_from(settings.NAMES), st.text(max_size=20))
def test_set_takes_or_refuses_any_text(name: str, typed: str) -> None:
    with suppress(RequestError):
        settings.changed(SamplingParams(), name, typed, SamplingParams())

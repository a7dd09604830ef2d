"""`hanlin chat` without a terminal: what its words mean, what goes in and out of pipes, and how it ends."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cli_chat_fake
import pytest
from cli_chat_fake import FakeLLM

import hanlin
from hanlin.cli.inputs import meant, names_model
from hanlin.cli.main import main
from hanlin.errors import ChatFormatError, DownloadError

Run = Callable[..., tuple[Any, str, str]]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, dict[str, Any], FakeLLM]]:
    """Every model that was loaded: its name, the options, the fake."""
    calls: list[tuple[str | None, dict[str, Any], FakeLLM]] = []

    def load(model: str | None = None, **options: Any) -> FakeLLM:
        llm = cli_chat_fake.load(model, **options)
        calls.append((model, {k: v for k, v in options.items() if k != "progress"}, llm))
        return llm

    monkeypatch.setitem(hanlin.__dict__, "load", load)
    return calls


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], loaded: object, tmp_path: Path) -> Run:
    """run(*arguments, stdin=bytes) -> (exit status, standard output, standard error)"""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, stdin: bytes = b"", verb: str = "chat") -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as leaving:
            main([verb, *arguments])
        said = capsys.readouterr()
        return leaving.value.code, said.out, said.err

    return run


def _process(tmp_path: Path, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(hanlin.__file__).parents[1]),
        "HANLIN_HOME": str(tmp_path / "home"),
        "PYTHONUNBUFFERED": "",
        **options.pop("env", {}),
    }
    command = [sys.executable, cli_chat_fake.__file__, "chat", *arguments]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, env=environment, **pipes)


# -- MODEL or PROMPT -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "smollm2",
        "SmolLM2-135M-Instruct",
        "internlm2_5-7b-chat",
        "internlm2.5-7b-chat",
        "internlm/internlm2-chat-7b",
        "THUDM/chatglm-6b",
        "hf:org/name",
        "org/name:Q4_K_M",
        "model.gguf",
        "./nowhere",
        "/no/where",
        "~/models/x",
        "C:\\models\\x",
    ],
)
def test_a_word_that_names_a_model(text: str) -> None:
    assert names_model(text)


@pytest.mark.parametrize(
    "text",
    [
        "Why is the sky blue?",
        "hi",
        "你好",
        "",
        " ",
        "what is a .gguf",
        "/help me please",
        "x" * 5000,
        "a\0b",
        "~",
        "1/2 or 3/4?",
    ],
)
def test_a_text_that_asks(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nonexistent")
    assert not names_model(text)


def test_an_existing_path_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not names_model("weights")
    (tmp_path / "weights").mkdir()
    assert names_model("weights") and names_model(str(tmp_path))


def test_the_meaning_of_one_and_two_words() -> None:
    assert meant(None, None, None) == (None, None)
    assert meant(None, "smollm2", None) == ("smollm2", None)
    assert meant(None, "hello there", None) == (None, "hello there")
    assert meant(None, "any", "hello") == ("any", "hello")
    assert meant("any", "smollm2", None) == ("any", "smollm2")


def test_words_reach_the_model(run: Run, loaded: list[Any]) -> None:
    assert run("hello 世界")[:2] == (0, "hello 世界\n")
    assert loaded[-1][0] is None
    run("smollm2", "hello")
    assert loaded[-1][0] == "smollm2"
    assert run("-m", "any", "smollm2", verb="run")[:2] == (0, "smollm2\n")
    assert loaded[-1][0] == "any"
    assert all(llm.closed for _, _, llm in loaded)


# -- options -------------------------------------------------------------------------------------------------------


def test_options_reach_sampling_and_loading(run: Run, loaded: list[Any]) -> None:
    status, *_ = run(
        *"hello --system Sing. --temperature 0.2 --top-p 0.9 --top-k 5 --min-p 0.1 --max-tokens 9 --seed 4".split(),
        *"--repetition-penalty 1.2 --stop a --stop b --dtype float32 --device cpu --session-len 99 --threads 1".split(),
        *"--weights int4 --kv-cache int8".split(),
        "--chat-template=chatml",
    )
    assert status == 0
    _, options, llm = loaded[-1]
    assert options == {
        "dtype": "float32", "device": "cpu", "session_len": 99, "threads": 1, "chat_template": "chatml",
        "weights": "int4", "kv_cache": "int8",
    }  # fmt: skip
    messages, sampling = llm.requests[-1]
    assert [m.content for m in messages] == ["Sing.", "hello"]
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.2, 0.9, 5, 0.1)
    assert (sampling.max_tokens, sampling.seed, sampling.repetition_penalty, sampling.stop) == (9, 4, 1.2, ("a", "b"))


def test_without_options_the_models_own_sampling_is_used(run: Run, loaded: list[Any]) -> None:
    run("hello")
    llm = loaded[-1][2]
    assert llm.requests[-1][1] == llm.default_sampling and loaded[-1][1] == {}


def test_every_loading_option_is_one_of_the_engines() -> None:
    from dataclasses import fields

    from hanlin.options import EngineConfig

    known = {field.name for field in fields(EngineConfig)}
    assert {"dtype", "device", "weights", "kv_cache", "session_len", "threads", "chat_template"} <= known


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hello", "--temperature", "-1"], "temperature must be a number >= 0, not -1.0"),
        (["hello", "--top-p", "7", "--stop", ""], "stop must hold non-empty strings"),
        (["hello", "--seed", "x"], "--seed"),
        (["a", "b", "c"], "c"),
        (["-m", "x", "two", "words"], "put it in quotes: two words"),
        ([], "there is no PROMPT"),
        (["smollm2", "--json"], "there is no PROMPT"),
        ([""], "PROMPT is empty"),
        (["a\udcff"], "not UTF-8 at character 1"),
        (["hi", "--system", "\udcff"], "not UTF-8 at character 0"),
    ],
)
def test_wrong_use_is_told_before_a_model_is_loaded(
    run: Run, loaded: list[Any], arguments: list[str], said: str
) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "") and said in re.sub(r"[\s│]+", " ", err)
    assert loaded == []


# -- pipes ---------------------------------------------------------------------------------------------------------


def test_a_document_is_piped_in(run: Run, loaded: list[Any]) -> None:
    assert run(stdin="天气\n很好\n\n".encode())[:2] == (0, "天气\n很好\n")
    assert run("Summarise:", stdin=b"\xef\xbb\xbfa document\n")[:2] == (0, "Summarise:\n\na document\n")
    assert run("alone", stdin=b"")[:2] == (0, "alone\n")
    assert run("smollm2", stdin=b"asks")[:2] == (0, "asks\n")
    assert loaded[-1][0] == "smollm2"


def test_a_document_in_another_encoding_is_refused_with_the_place(run: Run) -> None:
    status, out, err = run("Summarise:", stdin="中文".encode("gb18030"))
    assert (status, out) == (1, "") and "byte 0xd6 at offset 0" in err and "iconv" in err


def test_an_endless_document_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hanlin.cli.inputs._LARGEST", 1000)
    status, _, err = run(stdin=b"x" * 1001)
    assert status == 1 and "standard input is longer" in err


def test_a_pipe_gets_the_text_as_it_is(run: Run) -> None:
    status, out, err = run("markdown")
    assert (status, out, err) == (0, cli_chat_fake.MARKDOWN, "")


def test_a_pipe_gets_no_colours_even_when_they_are_forced(tmp_path: Path) -> None:
    process = _process(tmp_path, "markdown", env={"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"})
    assert process.communicate(timeout=60)[0].decode() == cli_chat_fake.MARKDOWN


def test_a_pipe_gets_each_piece_at_once(tmp_path: Path) -> None:
    with _process(tmp_path, "count") as process:
        assert process.stdout is not None
        assert process.stdout.read(8) == b"0 1 2 3 "  # of a stream that would last half an hour
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.endswith(b"\n") and err == b""


def test_a_closed_pipe_ends_the_reply_quietly(tmp_path: Path) -> None:
    with _process(tmp_path, "count") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(8)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


def test_a_narrow_encoding_shows_question_marks(tmp_path: Path) -> None:
    process = _process(tmp_path, "ab 世界", env={"PYTHONIOENCODING": "ascii"})
    assert process.communicate(timeout=60) == (b"ab ??\n", b"")
    process = _process(tmp_path, "世界", "--json", env={"PYTHONIOENCODING": "ascii"})
    assert json.loads(process.communicate(timeout=60)[0])["text"] == "世界"


# -- results -------------------------------------------------------------------------------------------------------


def test_json_has_the_reply_and_the_numbers(run: Run) -> None:
    status, out, err = run("a b", "--json", "--seed", "5")
    answer = json.loads(out)
    assert (status, err) == (0, "")
    assert {key: answer[key] for key in ("model", "text", "finish_reason", "stop", "seed", "tool_calls")} == {
        "model": "fake", "text": "a b", "finish_reason": "stop", "stop": None, "seed": 5, "tool_calls": []
    }  # fmt: skip
    stats = answer["stats"]
    assert (stats["prompt_tokens"], stats["cached_tokens"], stats["generated_tokens"]) == (2, 1, 2)
    assert stats["peak_memory_bytes"] == 123_000_000 and stats["load_seconds"] == 0.25
    assert json.loads(run("tool", "--json")[1])["tool_calls"][0]["name"] == "search"


def test_stopped_json_is_whole(tmp_path: Path) -> None:
    waiting = tmp_path / "waiting"
    with _process(tmp_path, "wait", "--json", env={"FAKE_LOG": str(waiting)}) as process:
        while not waiting.exists():
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == b""
    assert json.loads(out)["finish_reason"] == "abort"


def test_stats_and_notices_go_to_standard_error(run: Run) -> None:
    status, out, err = run("a b c", "--stats", "--max-tokens", "2")
    assert (status, out) == (0, "a b\n")
    assert "Cut off after max_tokens = 2" in err and "peak memory  123 MB" in err and "2 tokens at 2.0 tokens/s" in err


def test_a_failing_model_keeps_what_it_said_and_fails(run: Run, loaded: list[Any]) -> None:
    status, out, err = run("boom")
    assert (status, out, err) == (1, "Well\n", "error: the fake engine broke\n")
    assert loaded[-1][2].closed


def test_a_question_longer_than_the_context_fails_clearly(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CONTEXT", "5")
    status, out, err = run("a b c d e f")
    assert (status, out) == (1, "") and "the prompt has 6 tokens, the context 5" in err


def test_a_missing_model_suggests_quotes_only_where_the_word_was_guessed(run: Run) -> None:
    status, _, err = run("org/missing", "is this a prompt?")
    assert status == 1 and "put the whole prompt in quotes" in err and "hanlin chat -m" in err
    status, _, err = run("-m", "org/missing", "hello")
    assert status == 1 and "quotes" not in err


def test_errors_of_loading_come_through(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: object, **options: object) -> None:
        raise DownloadError("no network")

    monkeypatch.setitem(hanlin.__dict__, "load", broken)
    assert run("hello there")[::2] == (1, "error: no network\n")
    assert "quotes" in run("and/or", "x")[2]


def test_a_base_model_says_that_it_cannot_chat(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_chat(self: FakeLLM, *args: object) -> None:
        raise ChatFormatError("base models have no chat format")

    monkeypatch.setattr(FakeLLM, "stream", no_chat)
    assert run("hello")[::2] == (1, "error: base models have no chat format\n")


# -- weight --------------------------------------------------------------------------------------------------------


def test_help_needs_neither_torch_nor_the_terminal_libraries() -> None:
    code = (
        "import sys\nfrom hanlin.cli.main import main\n"
        "try:\n    main(['chat', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'prompt_toolkit', 'numpy', 'huggingface_hub', 'hanlin.llm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(hanlin.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60, check=True)
    assert b"--temperature" in done.stdout

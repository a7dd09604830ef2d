"""The frame of the command line: the table of verbs, what help costs, and every way out."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hanlin.cli.main import VERBS

SOURCE = Path(__file__).parents[2] / "src"


def environment(tmp_path: Path, **settings: str) -> dict[str, str]:
    places = {"HANLIN_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(SOURCE)}
    inherited = {name: value for name, value in os.environ.items() if name not in ("HANLIN_DEBUG", "HF_HUB_CACHE")}
    return {**inherited, **places, "COLUMNS": "100", "NO_COLOR": "1", **settings}


def hanlin(tmp_path: Path, *arguments: str, stdin: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hanlin", *arguments],
        env=environment(tmp_path, **settings),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


HEAVY = ("torch", "numpy", "transformers", "tokenizers", "sentencepiece", "huggingface_hub", "prompt_toolkit", "jinja2")

MODULES_AFTER = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))
from hanlin.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["--version"]])
def test_help_imports_nothing_heavy_and_no_verb(tmp_path: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-c", MODULES_AFTER, *arguments]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    loaded = json.loads(done.stderr)
    assert not [name for name in loaded if name.partition(".")[0] in HEAVY]
    assert [name for name in loaded if name.startswith("hanlin")] == [
        "hanlin",
        "hanlin.cli",
        "hanlin.cli.main",
        "hanlin.errors",
    ]


def test_help_lists_every_verb_and_answers_at_once(tmp_path: Path) -> None:
    # Processor time of the child, so that a busy machine does not matter; on an idle one it is the time a person waits.
    times = []
    for _ in range(3):
        before = os.times()
        done = hanlin(tmp_path, "--help")
        after = os.times()
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        times.append(spent if os.name != "nt" else 0.0)
    assert done.returncode == 0
    for name, verb in VERBS.items():
        assert re.search(rf"\b{name}\b.*{re.escape(verb.help)}", done.stdout), name
    assert min(times) < 0.3, times


@pytest.mark.parametrize("name", sorted(VERBS))
def test_every_verb_loads_and_explains_itself(tmp_path: Path, name: str) -> None:
    assert callable(VERBS[name].load())
    done = hanlin(tmp_path, name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"hanlin {name}" in done.stdout


def test_light_verbs_import_no_torch(tmp_path: Path) -> None:
    for arguments in (["list"], ["pull", "--help"], ["rm", "--yes", "nothing"]):
        command = [sys.executable, "-c", MODULES_AFTER, *arguments]
        done = subprocess.run(
            command, env=environment(tmp_path), capture_output=True, text=True, timeout=60, check=False
        )
        assert "torch" not in json.loads(done.stderr.splitlines()[-1]), arguments


def test_version(tmp_path: Path) -> None:
    assert re.fullmatch(r"hanlin \d+\.\d+\.\d+\n", hanlin(tmp_path, "--version").stdout)


@pytest.mark.parametrize("arguments", [["lst"], ["--nonsense"], ["show", "--nonsense"], ["rm"], ["list", "extra"]])
def test_wrong_use_exits_with_2_and_no_traceback(tmp_path: Path, arguments: list[str]) -> None:
    done = hanlin(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stdout == "" and "Traceback" not in done.stderr and "Usage" in done.stderr


def test_a_misspelt_verb_is_guessed(tmp_path: Path) -> None:
    assert "'list'" in hanlin(tmp_path, "lst").stderr


def test_our_errors_are_one_clean_message_on_stderr(tmp_path: Path) -> None:
    done = hanlin(tmp_path, "show", "./nowhere.gguf")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: no model at nowhere.gguf: there is no such file or directory.\n"


def test_debugging_shows_the_traceback(tmp_path: Path) -> None:
    done = hanlin(tmp_path, "show", "./nowhere.gguf", HANLIN_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ModelNotFoundError" in done.stderr
    assert "Traceback" not in hanlin(tmp_path, "show", "./nowhere.gguf", HANLIN_DEBUG="0").stderr


VERB_THAT = """
import sys, time
from types import MappingProxyType, ModuleType
from hanlin.cli import main as frame
def sleep():
    print("asleep", flush=True)
    time.sleep(60)
def flood():
    while True:
        print("x" * 1000)
def trickle():
    print("a little")
def broken():
    raise RuntimeError("a bug")
made = ModuleType("made")
made.sleep, made.flood, made.trickle, made.broken = sleep, flood, trickle, broken
sys.modules["made"] = made
frame.VERBS = MappingProxyType({name: frame.Verb(f"made:{name}", name) for name in vars(made) if name[0] != "_"})
frame.main(sys.argv[1:])
"""


def verb_that(tmp_path: Path, does: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", VERB_THAT, does]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment(tmp_path), text=True, **pipes)


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_ctrl_c_exits_quietly_with_130(tmp_path: Path) -> None:
    with verb_that(tmp_path, "sleep") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "asleep\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "")


@pytest.mark.skipif(os.name == "nt", reason="closes POSIX pipes")
@pytest.mark.parametrize("does", ["flood", "trickle"])
def test_a_closed_pipe_is_quiet(tmp_path: Path, does: str) -> None:
    with verb_that(tmp_path, does) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=20)
    assert (process.returncode, err) == (141, "")


def test_a_bug_is_not_hidden(tmp_path: Path) -> None:
    with verb_that(tmp_path, "broken") as process:
        out, err = process.communicate(timeout=20)
    assert process.returncode == 1 and out == ""
    assert "Traceback" in err and "RuntimeError: a bug" in err

"""`hanlin chat --best-of N --reward MODEL`, on tiny models made for it."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest

import hanlin
from hanlin.cli.main import main
from hf_directory import make_directory

SAMPLING = ["--max-tokens", "5", "--seed", "3", "--temperature", "1"]


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_directory(tmp_path_factory.mktemp("writer") / "chat"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    changes: dict[str, Any] = {"architectures": ["InternLM2ForRewardModel"], "reward_token_id": 92527}
    return str(make_directory(tmp_path_factory.mktemp("judge") / "reward", **changes))


@pytest.fixture(autouse=True)
def nothing_piped_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setenv("COLUMNS", "200")


def chat(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as leaving:
        main(["chat", *arguments])
    said = capsys.readouterr()
    return leaving.value.code, said.out, said.err


def test_the_best_reply_is_shown(writer: str, judge: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [writer, "Hello there", "--reward", judge, "--best-of", "3", *SAMPLING]
    code, out, _ = chat(capsys, *asked, "--json")
    answer = json.loads(out)
    assert code == 0 and len(answer["candidates"]) == len(answer["scores"]) == 3
    assert answer["score"] == max(answer["scores"])
    assert answer["text"] == answer["candidates"][answer["scores"].index(answer["score"])]
    with hanlin.load(writer) as llm, hanlin.load(judge) as of:
        best = llm.best_of("Hello there", reward=of, n=3, max_tokens=5, seed=3, temperature=1.0)
    assert [c.text for c in best.candidates] == answer["candidates"] and list(best.scores) == answer["scores"]
    code, out, _ = chat(capsys, *asked, "--no-markdown")
    assert code == 0 and out.strip() == best.text.strip()


def test_what_is_missing_is_said(writer: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = chat(capsys, writer, "Hello", "--best-of", "3")
    assert code == 2 and "--best-of needs --reward" in err
    code, out, err = chat(capsys, writer, "Hello", "--reward", writer)
    assert code == 1 and not out and "no reward head" in err

"""`hanlin ps` and `hanlin stop` against a real server with a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hanlin.cli.main import main
from hanlin.serve.keys import KeyRing
from hanlin.serve.settings import ModelSpec, ServeConfig
from hf_directory import make_directory
from serving import serving

OPTIONS: dict[str, Any] = {"cache_bytes": 4 << 20, "threads": 1, "packed_cache": False, "session_len": 256}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path: Path = make_directory(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=1)
    spec = ModelSpec(source=str(path), name="tiny", options=OPTIONS)
    with serving(ServeConfig(models=(spec,), keys=KeyRing.read(given=["me:secret"]))) as where:
        yield where


def hanlin(*words: str) -> int | str | None:
    with pytest.raises(SystemExit) as left:
        main(words)
    return left.value.code


def test_a_model_is_shown_stopped_and_gone(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HANLIN_API_KEY", "me:secret")
    monkeypatch.setenv("OLLAMA_HOST", url.removeprefix("http://"))
    assert hanlin("ps") == 0
    told = capsys.readouterr().out
    assert "tiny" in told and "never" in told and "GB" in told
    assert hanlin("ps", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "tiny"
    assert hanlin("stop", "other") == 1 and "there are: tiny" in capsys.readouterr().err
    assert hanlin("stop", "tiny") == 0
    assert hanlin("ps", "--url", url) == 0 and "tiny" not in capsys.readouterr().out
    assert hanlin("stop", "tiny") == 1 and "none" in capsys.readouterr().err


def test_what_keeps_it_from_answering_is_said(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HANLIN_API_KEY", raising=False)
    for where, word in ((url, "HANLIN_API_KEY"), ("http://127.0.0.1:9", "hanlin serve"), ("file:///etc", "address")):
        assert hanlin("ps", "--url", where) == 1
        assert word in capsys.readouterr().err

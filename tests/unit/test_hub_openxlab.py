"""Fetching from OpenXLab: our client against a Gitea on loopback, with large files behind pointers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hub_fakes import git_sha1, sha256
from hub_servers import POINTER, Faults, OpenXLab

from hanlin import hub
from hanlin.errors import ConfigError, DownloadError, ModelNotFoundError
from hanlin.hub import Places, Report
from hanlin.hub.web import Limits

WEIGHTS = os.urandom(1 << 20)
FILES = {
    "config.json": b'{"model_type": "internlm2"}',
    "model.safetensors": WEIGHTS,
    "tokenizer.model": b"\x0a\x0b",
    "README.md": b"# Model",
    "modeling_internlm2.py": b"open('bitten', 'w')",
    "names with #%.json": b"{}",
}
FETCHED = {"config.json", "model.safetensors", "tokenizer.model", "README.md"}
REPO = "OpenLMLab/internlm2-chat-7b"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hanlin.hub.web.Limits", lambda: Limits(pause=0.01, longest_pause=0.1, read=5.0))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def places(tmp_path: Path, url: str, **more: object) -> Places:
    return Places(home=tmp_path / "home", hub_cache=tmp_path / "hub", openxlab=url, **more)  # type: ignore[arg-type]


def inside(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("page", [1000, 2])
def test_data_files_are_fetched_with_large_ones_from_behind_their_pointers(tmp_path: Path, page: int) -> None:
    with OpenXLab({REPO: FILES}, page=page) as server:
        found = hub.pull("ox:internlm2-chat-7b", places=places(tmp_path, server.url), report=Report(None))
        assert not any(".py" in path for path, _ in server.asked)
    assert found.id == f"ox:{REPO}" and found.path.name == "main"
    assert inside(found.path) == FETCHED
    assert all((found.path / name).read_bytes() == FILES[name] for name in FETCHED)
    nowhere = places(tmp_path, "http://127.0.0.1:9", endpoint="http://127.0.0.1:9", offline=True)
    for name in ("ox:internlm2-chat-7b", "internlm2-chat-7b", f"ox:{REPO}@main"):
        assert hub.resolve(name, places=nowhere, report=Report(None)).path == found.path
    (entry,) = hub.cached(places=nowhere)
    assert (entry.id, entry.complete, entry.kind) == (f"ox:{REPO}", True, "safetensors")
    hub.remove("ox:internlm/internlm2-chat-7b", places=nowhere)
    assert hub.cached(places=nowhere) == []


def test_any_name_of_a_file_is_asked_for_as_it_is(tmp_path: Path) -> None:
    files = {**FILES, "odd #%2F name.json": b"[]"}
    with OpenXLab({REPO: files}) as server:
        here = places(tmp_path, server.url)
        found = hub.pull(f"ox:{REPO}", include=["odd*"], places=here, report=Report(None))
    assert (found.path / "odd #%2F name.json").read_bytes() == b"[]"


def test_a_break_is_continued_and_other_content_refused(tmp_path: Path) -> None:
    faults = Faults(cut={"model.safetensors": [5000]}, wrong={"config.json": b"x" * len(FILES["config.json"])})
    with OpenXLab({REPO: FILES}, faults) as server:
        here = places(tmp_path, server.url)
        with pytest.raises(DownloadError, match=r"config\.json has the hash(.|\n)*ms:internlm2-chat-7b"):
            hub.pull(f"ox:{REPO}", places=here, report=Report(None))
        faults.wrong.clear()
        found = hub.pull(f"ox:{REPO}", places=here, report=Report(None))
    assert (found.path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_link_or_an_evil_name_is_refused(tmp_path: Path) -> None:
    for entry, told in (
        ({"path": "vocab.json", "mode": "120000", "type": "blob", "size": 11, "sha": git_sha1(b"/etc/passwd")}, "link"),
        ({"path": "../vocab.json", "mode": "100644", "type": "blob", "size": 1, "sha": "a" * 40}, "outside"),
        ({"path": "vocab.json", "mode": "100644", "type": "blob", "size": None, "sha": "a" * 40}, "does not know"),
    ):
        with OpenXLab({REPO: FILES}) as server:
            server.extra.append(entry)
            with pytest.raises(DownloadError, match=told):
                hub.pull(f"ox:{REPO}", places=places(tmp_path, server.url), report=Report(None))
    assert not inside(tmp_path / "home" / "openxlab")


def test_a_pointer_to_what_is_not_there_is_refused(tmp_path: Path) -> None:
    pointer = POINTER.format(sha256(b"other"), 5).encode()
    with OpenXLab({REPO: {"config.json": b"{}", "model.safetensors": pointer}}) as server:
        here = places(tmp_path, server.url)
        with pytest.raises(DownloadError):
            server.faults.wrong["model.safetensors"] = pointer
            hub.pull(f"ox:{REPO}", places=here, report=Report(None))


def test_what_is_not_there_names_the_other_hubs(tmp_path: Path) -> None:
    with OpenXLab({REPO: FILES}) as server:
        here = places(tmp_path, server.url)
        with pytest.raises(ModelNotFoundError, match=r"ms:NAME"):
            hub.pull("ox:internlm2-20b", places=here, report=Report(None))
        with pytest.raises(DownloadError, match="no such revision"):
            hub.pull(f"ox:{REPO}@v9", places=here, report=Report(None))
        with pytest.raises(ConfigError):
            hub.pull(f"ox:{REPO}@a/b", places=here, report=Report(None))
        with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"):
            hub.pull(f"ox:{REPO}", places=places(tmp_path, server.url, offline=True), report=Report(None))


def test_a_hub_out_of_reach_names_the_others(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"cannot be reached(.|\n)*hf:internlm2-chat-7b"):
        hub.pull("ox:internlm2-chat-7b", places=places(tmp_path, "http://127.0.0.1:9"), report=Report(None))

from __future__ import annotations

from pathlib import Path

import pytest

from hanlin import hub
from hanlin.errors import ConfigError, ModelNotFoundError
from hanlin.hub import Places, default


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(home=tmp_path / "home", hub_cache=tmp_path / "hub")


def add_default(places: Places) -> None:
    path = default.location(hub.DEFAULT, places)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"GGUF")


def add_repository(places: Places, repo: str, *, whole: bool = True) -> Path:
    """As huggingface_hub lays it out: blobs, and a snapshot of links to them."""
    folder = places.hub_cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("a" * 40)
    for made in (folder / "blobs", folder / "refs", snapshot):
        made.mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40, encoding="ascii")
    files = {"config.json": b"{}", **({"model.safetensors": b"x" * 1000} if whole else {})}
    for number, (name, data) in enumerate(files.items()):
        blob = folder / "blobs" / f"{number:040x}"
        blob.write_bytes(data)
        (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
    return folder


def test_nothing_is_cached_at_first(places: Places) -> None:
    assert hub.cached(places=places) == []


def test_default_first_then_by_name_with_sizes_counted_once(places: Places) -> None:
    for repo in ("zai-org/chatglm-6b", "internlm/internlm2-7b"):
        add_repository(places, repo)
    add_default(places)
    entries = hub.cached(places=places)
    assert [entry.id for entry in entries] == ["smollm2", "internlm/internlm2-7b", "zai-org/chatglm-6b"]
    assert [entry.kind for entry in entries] == ["gguf", "safetensors", "safetensors"]
    assert entries[1].size == 1000 + 2 + 40  # two blobs and the name of the branch's commit
    assert all(entry.complete for entry in entries)


def test_an_interrupted_fetch_is_listed_as_incomplete_and_can_be_removed(places: Places) -> None:
    folder = add_repository(places, "someone/half", whole=False)
    (entry,) = hub.cached(places=places)
    assert not entry.complete
    hub.remove("someone/half", places=places)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["zai-org/chatglm-6b", "THUDM/chatglm-6b", "chatglm-6b", "hf:zai-org/chatglm-6b"])
@pytest.mark.parametrize("stored", ["zai-org/chatglm-6b", "THUDM/chatglm-6b"])
def test_remove_by_any_name(places: Places, name: str, stored: str) -> None:
    folder = add_repository(places, stored)
    other = add_repository(places, "internlm/internlm2-7b")
    assert hub.remove(name, places=places).id == stored
    assert not folder.exists() and other.exists()
    assert [path.name for path in places.hub_cache.iterdir() if path.name.startswith((".removed", "models"))] == [
        other.name
    ]


def test_remove_the_default(places: Places) -> None:
    add_default(places)
    hub.remove("smollm2", places=places)
    assert hub.cached(places=places) == []


def test_what_is_not_there_lists_what_is(places: Places) -> None:
    add_repository(places, "internlm/internlm2-7b")
    with pytest.raises(ModelNotFoundError, match="internlm/internlm2-7b"):
        hub.remove("internlm/internlm2-20b", places=places)


@pytest.mark.parametrize("name", ["{tmp}/mine", "../mine", "./mine", "models--x", "..", "~", "{tmp}/hub"])
def test_paths_are_refused(places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    add_repository(places, "internlm/internlm2-7b")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ConfigError, ModelNotFoundError)):
        hub.remove(name.format(tmp=tmp_path), places=places)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_out_of_the_cache_is_not_followed(places: Places, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious.gguf").write_bytes(b"GGUF")
    places.hub_cache.mkdir()
    (places.hub_cache / "models--some--link").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="leads out of the cache"):
        hub.remove("some/link", places=places)
    assert (elsewhere / "precious.gguf").exists()
